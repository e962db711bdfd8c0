"""Numerical tools in torch, which know nothing about SDEs."""
