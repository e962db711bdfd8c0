"""Exponential solvers, derived from the declaration."""
