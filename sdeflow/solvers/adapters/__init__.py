"""Solvers of other libraries."""
