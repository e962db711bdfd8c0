r"""Orthogonal bases of an event, in which a declaration may act on each coefficient by itself.

With ``SDE(..., basis=B)`` the state's coefficients u = B x follow the declaration, and tensors among the
parameters are per coefficient: heat dissipation, for example, decays each frequency of an image at a
rate of its own. An orthogonal B leaves densities and white noise as they are.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from sdeflow.checks import checked_finite, checked_numbers, checked_state
from sdeflow.errors import DataError

__all__ = ["DCT", "Basis", "Orthogonal"]


class Basis(Protocol):
    """An orthogonal transform of events."""

    def forward(self, x: Tensor) -> Tensor:
        """The coefficients of x (batch, *event), in the same shape."""
        ...

    def inverse(self, u: Tensor) -> Tensor:
        """The state with coefficients u."""
        ...


class DCT:
    """The orthonormal discrete cosine transform (type II) over the last sides of an event.

    Args:
        sides: how many sides are transformed: 2 for images (batch, channels, height, width).
    """

    def __init__(self, sides: int = 2) -> None:
        if sides < 1:
            raise ValueError(f"sides must be at least 1, not {sides}.")
        self.sides = sides

    def forward(self, x: Tensor) -> Tensor:
        return self._transformed(checked_state(x), transpose=False)

    def inverse(self, u: Tensor) -> Tensor:
        return self._transformed(checked_state(u, "u"), transpose=True)

    def frequencies(self, event: tuple[int, ...]) -> Tensor:
        """π² Σ (n_i / N_i)², the Laplacian's eigenvalue of each coefficient with unit spacing, (*last sides)."""
        total = torch.zeros((), dtype=torch.float64)
        for size in event[-self.sides :]:
            total = total[..., None] + (math.pi * torch.arange(size, dtype=torch.float64) / size) ** 2
        return total

    def _transformed(self, x: Tensor, *, transpose: bool) -> Tensor:
        if x.ndim <= self.sides:
            raise DataError(f"this basis transforms {self.sides} sides of an event; x is {tuple(x.shape)}.")
        for side in range(-self.sides, 0):
            matrix = _cosines(x.shape[side]).to(device=x.device, dtype=x.dtype)
            x = torch.tensordot(x, matrix if transpose else matrix.mT, dims=([side], [0])).movedim(-1, side)
        return x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DCT) and self.sides == other.sides

    def __hash__(self) -> int:
        return hash((DCT, self.sides))

    def __repr__(self) -> str:
        return f"DCT(sides={self.sides})"


class Orthogonal:
    """Any orthogonal matrix, acting on the flattened event.

    Args:
        matrix: (d, d), its rows the basis vectors.

    Raises:
        DataError: for a matrix that is not orthogonal to 1e-6.
    """

    def __init__(self, matrix: Tensor) -> None:
        matrix = checked_finite(checked_numbers(matrix, "matrix"), "matrix")
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise DataError(f"a basis is a square matrix, not of shape {tuple(matrix.shape)}.")
        error = float((matrix @ matrix.mT - torch.eye(len(matrix), dtype=torch.float64)).abs().max())
        if not error < 1e-6:
            raise DataError(f"a basis must be orthogonal; B Bᵀ differs from 1 by {error:.3g}.")
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return self._times(checked_state(x), self.matrix.mT)

    def inverse(self, u: Tensor) -> Tensor:
        return self._times(checked_state(u, "u"), self.matrix)

    def _times(self, x: Tensor, matrix: Tensor) -> Tensor:
        if math.prod(x.shape[1:]) != len(matrix):
            raise DataError(f"this basis is of {len(matrix)} coordinates; the event is {tuple(x.shape[1:])}.")
        return (x.flatten(1) @ matrix.to(device=x.device, dtype=x.dtype)).reshape(x.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Orthogonal) and torch.equal(self.matrix, other.matrix)

    __hash__ = None

    def __repr__(self) -> str:
        return f"Orthogonal({len(self.matrix)} coordinates)"


_tables: dict[int, Tensor] = {}


def _cosines(n: int) -> Tensor:
    """The orthonormal DCT-II matrix, row by frequency."""
    if n not in _tables:
        k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        matrix = torch.cos(math.pi * k * (i + 0.5) / n) * math.sqrt(2.0 / n)
        matrix[0] /= math.sqrt(2.0)
        _tables[n] = matrix
    return _tables[n]
