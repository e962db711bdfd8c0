"""Declarations and derivations in SymPy; no tensors here."""
