r"""Linear maps of states, with which each formula of a Gaussian kernel is written once.

A state is (batch, *event). Elementwise maps multiply each coordinate by a number, which may differ between samples and
coordinates. Coupled maps mix the k components of states (batch, k, *event) by k x k matrices. Both have the same
algebra: the square root of I + A Aᵀ, for example, is √(1 + a²) or a Cholesky factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Factor", "Linear", "add_multiple", "levels", "multiplied", "rows"]


class Linear:
    """A linear map of states.

    Args:
        values: of an elementwise map, a tensor that broadcasts to the state; of a coupled map, matrices
            (*leading, k, k), whose leading dims broadcast to the state without its component dim.
        coupled: whether the map is coupled.
    """

    __slots__ = ("coupled", "values")

    def __init__(self, values: Tensor, coupled: bool = False) -> None:
        self.values = values
        self.coupled = coupled

    @classmethod
    def scaling(cls, values: Tensor, coupled: bool) -> Linear:
        """The map that multiplies by ``values``: elementwise, or (k, *event) numbers for a coupled state."""
        return cls(torch.diag_embed(values.movedim(0, -1)), True) if coupled else cls(values)

    def __matmul__(self, other: Linear) -> Linear:
        """The map that applies ``other`` first."""
        return Linear(self.values @ other.values if self.coupled else self.values * other.values, self.coupled)

    def __call__(self, x: Tensor) -> Tensor:
        """The map applied to a state (batch, *event), in the state's dtype."""
        values = self.values.to(x.dtype)
        if not self.coupled:
            return values * x
        if values.ndim == 2 or all(size == 1 for size in values.shape[1:-2]):
            k = values.shape[-1]
            return torch.matmul(values.reshape(-1, k, k), x.reshape(len(x), k, -1)).reshape(-1, *x.shape[1:])
        return torch.matmul(values, x.movedim(1, -1)[..., None])[..., 0].movedim(-1, 1)

    @property
    def T(self) -> Linear:
        """The transpose."""
        return Linear(self.values.mT, True) if self.coupled else self

    @property
    def inverse(self) -> Linear:
        """The inverse."""
        return Linear(torch.linalg.inv(self.values), True) if self.coupled else Linear(1.0 / self.values)

    @property
    def gram(self) -> Linear:
        """A Aᵀ."""
        return self @ self.T

    @property
    def root_of_one_plus_gram(self) -> Linear:
        """A square root L of I + A Aᵀ = L Lᵀ, lower triangular."""
        if not self.coupled:
            return Linear(torch.sqrt(1.0 + self.values.square()))
        one = torch.eye(self.values.shape[-1], dtype=self.values.dtype, device=self.values.device)
        return Linear(torch.linalg.cholesky(one + self.values @ self.values.mT), True)

    def scaled(self, factor: Tensor | float) -> Linear:
        """The map times a number."""
        return Linear(self.values * factor, self.coupled)

    def log_det(self, event: tuple[int, ...]) -> Tensor:
        """log|det| over an event, in the shape of the leading (batch) dim."""
        return self._summed(torch.linalg.slogdet(self.values)[1] if self.coupled else self.values.abs().log(), event)

    def trace(self, event: tuple[int, ...]) -> Tensor:
        """The trace over an event, in the shape of the leading (batch) dim."""
        return self._summed(self.values.diagonal(dim1=-2, dim2=-1).sum(-1) if self.coupled else self.values, event)

    def _summed(self, entries: Tensor, event: tuple[int, ...]) -> Tensor:
        """The sum of ``entries`` over coordinates; an entry that broadcasts counts once for each coordinate."""
        sizes = event[1:] if self.coupled else event
        lead = entries.shape[: max(0, entries.ndim - len(sizes))]
        full = entries.expand(*lead, *sizes) if sizes else entries
        return full.flatten(len(lead)).sum(-1) if sizes else full


Factor = float | Tensor | Linear
"""A linear map at one time, as cheap as it can be: a number, numbers for each coordinate, or matrices."""


def rows(of_times: Linear, like: Tensor) -> list[Factor]:
    """The maps at each of n times, from ``values`` (n, ...), prepared for states like ``like`` (batch, *event)."""
    if not of_times.coupled:
        return [*levels(of_times.values, like)]
    values = of_times.values.detach().to(dtype=like.dtype, device=like.device)
    k = values.shape[-1]
    return [Linear(v.reshape(k, k) if v.numel() == k * k else v[None], True) for v in values]


def levels(values: Tensor, like: Tensor) -> list[float | Tensor]:
    """Numbers or tensors that are added to states like ``like`` at each of n times, from ``values`` (n, ...)."""
    values = values.detach()
    if values.numel() == len(values):
        return values.reshape(-1).tolist()
    return list(values.to(dtype=like.dtype, device=like.device))


def multiplied(factor: Factor, x: Tensor) -> Tensor:
    """A map applied to states (batch, *event)."""
    return factor(x) if isinstance(factor, Linear) else x * factor


def add_multiple(total: Tensor, factor: Factor, x: Tensor) -> Tensor:
    """``total`` plus a map applied to ``x``, in place."""
    if isinstance(factor, float):
        return total.add_(x, alpha=factor)
    return total.add_(factor(x)) if isinstance(factor, Linear) else total.addcmul_(factor, x)
