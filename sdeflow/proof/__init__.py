"""Derivations shown step by step, and certificates that the numbers follow from them."""
