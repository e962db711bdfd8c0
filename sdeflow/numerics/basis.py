r"""Orthogonal bases of an event, in which a declaration acts on each coefficient separately.

With ``SDE(..., basis=B)`` the coefficients u = B x of the state follow the declaration, and tensors among the
parameters hold a value for each coefficient. In heat dissipation, for example, each frequency of an image decays at its
own rate. An orthogonal B does not change densities or white noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from sdeflow.errors import DataError
from sdeflow.numerics.checks import checked_count, checked_finite, checked_numbers, checked_state

__all__ = ["DCT", "Basis", "CentreOfMassFree", "Orthogonal"]


class Basis(Protocol):
    """An orthogonal transform of events."""

    def forward(self, x: Tensor) -> Tensor:
        """The coefficients of x (batch, *event), in the same shape."""
        ...

    def inverse(self, u: Tensor) -> Tensor:
        """The state with coefficients u."""
        ...


class DCT:
    """The orthonormal discrete cosine transform (type II) over the last dims of an event.

    Args:
        sides: the number of dims that are transformed: 2 for images (batch, channels, height, width).
    """

    def __init__(self, sides: int = 2) -> None:
        self.sides = checked_count(sides, "sides")

    def forward(self, x: Tensor) -> Tensor:
        return self._transformed(checked_state(x), transpose=False)

    def inverse(self, u: Tensor) -> Tensor:
        return self._transformed(checked_state(u, "u"), transpose=True)

    def frequencies(self, event: tuple[int, ...]) -> Tensor:
        """π² Σ (n_i / N_i)², the eigenvalue of the Laplacian for each coefficient with unit spacing, (*last dims)."""
        total = torch.zeros((), dtype=torch.float64)
        for size in event[-self.sides :]:
            total = total[..., None] + (math.pi * torch.arange(size, dtype=torch.float64) / size) ** 2
        return total

    def _transformed(self, x: Tensor, *, transpose: bool) -> Tensor:
        if x.ndim <= self.sides:
            raise DataError(f"this basis transforms {self.sides} dims of an event; x is {tuple(x.shape)}.")
        for dim in range(-self.sides, 0):
            matrix = _cosines(x.shape[dim]).to(device=x.device, dtype=x.dtype)
            x = torch.tensordot(x, matrix if transpose else matrix.mT, dims=([dim], [0])).movedim(-1, dim)
        return x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DCT) and self.sides == other.sides

    def __hash__(self) -> int:
        return hash((DCT, self.sides))

    def __repr__(self) -> str:
        return f"DCT(sides={self.sides})"


class Orthogonal:
    """Any orthogonal matrix, which acts on the flattened event.

    Args:
        matrix: (d, d), whose rows are the basis vectors.

    Raises:
        DataError: if the matrix is not orthogonal to 1e-6.
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

    __hash__ = None  # type: ignore[assignment]  # Python's own way to say that there is none

    def __repr__(self) -> str:
        return f"Orthogonal({len(self.matrix)} coordinates)"


class CentreOfMassFree:
    r"""Coordinates of n particles without their centre of mass, from (batch, n, \*dims) to (batch, n - 1, \*dims).

    Molecules are states (n, 3) whose position in space does not matter, so they lie in the subspace of mean 0, which
    has (n - 1) · 3 dimensions (arXiv:2203.17003). The map u = Q x is an isometry of that subspace; Q holds the n - 1
    orthonormal rows of Helmert's matrix, each with the sum 0. White noise in u is white noise without centre of mass in
    x, and densities of u are densities on the subspace. So an SDE of u is an SDE of such states, with the right prior,
    kernel, noise, trace and log p, and every x = Qᵀ u has mean 0 to rounding. Rotations of the dims commute with Q.

    Unlike the other classes of this module this map changes the shape. Apply it to data and samples; do not pass it to
    ``SDE``. Give ``Score(..., data_mean=0.)``, because molecules have no preferred direction.

    Args:
        particles: n, at least 2.

    Raises:
        ValueError: if ``particles`` is less than 2.

    >>> import sdeflow
    >>> shapes = sdeflow.basis.CentreOfMassFree(5)
    >>> x = torch.randn(4, 5, 3)
    >>> torch.allclose(shapes.inverse(shapes.forward(x)), x - x.mean(1, keepdim=True), atol=1e-6)
    True
    """

    def __init__(self, particles: int) -> None:
        self.particles = particles = checked_count(particles, "particles", 2)
        k = torch.arange(1, particles, dtype=torch.float64)[:, None]
        i = torch.arange(particles, dtype=torch.float64)
        self.matrix = torch.where(i < k, 1.0, torch.where(i == k, -k, 0.0)) / (k * (k + 1.0)).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        r"""The coordinates u (batch, n - 1, \*dims) of x (batch, n, \*dims), without its centre of mass."""
        return self._times(checked_state(x), self.matrix)

    def inverse(self, u: Tensor) -> Tensor:
        r"""The states (batch, n, \*dims) of mean 0 that have the coordinates u."""
        return self._times(checked_state(u, "u"), self.matrix.mT)

    def wrap(self, net: Callable[..., Tensor]) -> nn.Module:
        """A network or score of coordinates from one of states: u, t, ... -> Q net(Qᵀ u, t, ...)."""
        return _OnCoordinates(self, net)

    def _times(self, x: Tensor, matrix: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != matrix.shape[1]:
            raise DataError(
                f"expected (batch, {matrix.shape[1]}, ...) for {self.particles} particles, not {tuple(x.shape)}."
            )
        return torch.tensordot(matrix.to(device=x.device, dtype=x.dtype), x, dims=([1], [1])).movedim(0, 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CentreOfMassFree) and self.particles == other.particles

    def __hash__(self) -> int:
        return hash((CentreOfMassFree, self.particles))

    def __repr__(self) -> str:
        return f"CentreOfMassFree({self.particles})"


class _OnCoordinates(nn.Module):
    def __init__(self, space: CentreOfMassFree, net: Callable[..., Tensor]) -> None:
        super().__init__()
        self.space, self.net = space, net
        if hasattr(net, "classes"):
            self.classes = net.classes

    def forward(self, u: Tensor, *others: object) -> Tensor:
        return self.space.forward(self.net(self.space.inverse(u), *others))


_tables: dict[int, Tensor] = {}


def _cosines(n: int) -> Tensor:
    """The orthonormal DCT-II matrix, row by frequency."""
    if n not in _tables:
        k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        matrix = torch.cos(math.pi * k * (i + 0.5) / n) * math.sqrt(2.0 / n)
        matrix[0] /= math.sqrt(2.0)
        _tables[n] = matrix
    return _tables[n]
