"""Hadamard matrices: entries, columns in a random order, and the fast Walsh-Hadamard transform."""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.numerics.noise import NoiseStream


def columns_of(d: int, seed: int, purpose: str) -> Tensor:
    """The columns of the Hadamard matrix of d dimensions, padded to a power of two, in a random order.

    The order is the same for all samples. Their errors are uncorrelated all the same, because their signs differ.
    """
    return NoiseStream(seed, f"{purpose} order").uniform((1, padded(d)), torch.float64)[0].argsort()


def padded(d: int) -> int:
    """The smallest power of two that is at least d."""
    return 1 << (max(1, d) - 1).bit_length()


def hadamard(index: Tensor, columns: Tensor) -> Tensor:
    """Entries ``index`` of the columns of the Hadamard matrix, (columns, index) in int8.

    An entry is 1 if its index and its column have an even number of bits in common, else -1.
    """
    bits = index & columns[:, None]
    for shift in (32, 16, 8, 4, 2, 1):  # the parity of 64 bits
        bits = bits ^ (bits >> shift)
    return (1 - 2 * (bits & 1)).to(torch.int8)


def walsh_hadamard(values: Tensor) -> Tensor:
    """H times ``values`` along the last dimension, whose size is a power of two."""
    size, shape, half = values.shape[-1], values.shape, 1
    while half < size:
        pairs = values.reshape(*shape[:-1], size // (2 * half), 2, half)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack([even + odd, even - odd], dim=-2)
        half *= 2
    return values.reshape(shape)
