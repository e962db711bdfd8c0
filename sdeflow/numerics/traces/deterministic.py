"""Designs that draw nothing: all d products, and probes that the caller passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import DataError
from sdeflow.numerics.checks import checked_finite
from sdeflow.numerics.traces.integral import Integral, Setting, Trace
from sdeflow.numerics.traces.standard_error import ZERO, of_whole_integrals


@dataclass(frozen=True)
class Exact(Trace):
    """The exact trace, by all d products."""

    def _integral(self, setting: Setting) -> Integral:
        return _Exact(setting)


class _Exact(Integral):
    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        return self._products.divergence(output, x)

    def _error(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.value.detach()), torch.full_like(self.value.detach(), math.inf)


@dataclass(frozen=True, eq=False)
class Given(Trace):
    """The mean of vᵀ J v over the given probes, which are the same at every node.

    Args:
        vectors: (m, *event), used for every sample, or (m, batch, *event). The estimate is unbiased if E[v vᵀ] = 1.
        first_row: the number of the first sample of that batch.

    Raises:
        DataError: if ``vectors`` is not a finite floating tensor with m >= 1.
    """

    vectors: Tensor
    first_row: int = 0

    def __post_init__(self) -> None:
        v = self.vectors
        if not isinstance(v, Tensor) or not v.is_floating_point() or v.ndim < 2 or not len(v):
            given = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v)
            raise DataError(f"probes are a floating tensor (m, *event) or (m, batch, *event), m >= 1, not {given}.")
        checked_finite(v, "the probes' tensor")

    def require(self, shape: tuple[int, ...]) -> None:
        """Raises a DataError if the probes do not fit states of ``shape`` (batch, *event)."""
        if tuple(self.vectors.shape[1:]) not in (tuple(shape), tuple(shape[1:])):
            raise DataError(
                f"probes for states {tuple(shape)} are (m, {', '.join(map(str, shape[1:]))}) or "
                f"(m, {', '.join(map(str, shape))}), not {tuple(self.vectors.shape)}."
            )

    def mapped(self, transform: Callable[[Tensor], Tensor], event: tuple[int, ...]) -> Given:
        """The probes in other coordinates; ``transform`` is a linear map of states (batch, *event)."""
        moved = transform(self.vectors.reshape(-1, *event)).reshape(self.vectors.shape)
        return Given(moved, self.first_row)

    def of_rows(self, rows: Tensor | None, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """The probes of the given rows, (m, samples, d), for states of ``shape`` (batch, *event)."""
        samples, d = shape[0] if rows is None else len(rows), math.prod(shape[1:])
        v = self.vectors.to(device)
        if v.ndim == len(shape):
            return v.reshape(len(v), 1, d).expand(-1, samples, -1)
        return (v if rows is None else v[:, rows.to(device) - self.first_row]).reshape(len(v), samples, d)

    def _integral(self, setting: Setting) -> Integral:
        return _Given(setting, self.of_rows(setting.rows, setting.shape, setting.device))


class _Given(Integral):
    def __init__(self, setting: Setting, vectors: Tensor) -> None:
        super().__init__(setting)
        self._vectors, self._integrals = vectors, ZERO

    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        forms = self._products.forms(output, x, self._vectors)
        self._integrals = self._integrals + float(self.weights[self.node]) * forms.detach()
        return forms.mean(0)

    def _error(self) -> tuple[Tensor, Tensor]:
        return of_whole_integrals(self._integrals)
