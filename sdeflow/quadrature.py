r"""The moments of an affine SDE by quadrature: every schedule, a few milliseconds, 1e-12 relative.

On panels small enough that the solution changes by no more than a factor of a few, each moment is
carried from the start of the panel by the exact recursions

    sigma²(t) = e^{2 (A(t) - A(s))} sigma²(s) + ∫_s^t g(u)² e^{2 (A(t) - A(u))} du,     A = ∫ a,
    N(t)      = Φ(t,s) N(s) Φ(t,s)ᵀ + Φ(t,s) [∫_s^t Φ(u,s)⁻¹ g gᵀ Φ(u,s)⁻ᵀ du] Φ(t,s)ᵀ,

whose terms are all positive, so that nothing cancels however small the noise is. Φ and its inverse come
from Picard's iteration Φ = 1 + ∫ F Φ at Chebyshev points, which converges to rounding in every entry,
whether F(t) commutes with itself or not. Panels are composed in a logarithmic number of passes.

All is float64 and differentiable in the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sdeflow.chebyshev import (
    PiecewiseChebyshev,
    evaluate,
    fit_values,
    geometric_edges,
    nodes_of,
    running_integral,
)
from sdeflow.errors import ScheduleError

__all__ = ["MomentTable", "integrate_coupled", "integrate_elementwise", "panel_edges"]

_LARGEST_ALPHA = 1e4
_LARGEST_CHANGE = 1.5  # of log alpha over one panel
_LARGEST_TURN = 0.75  # of the norm of ∫ F over one panel, for Picard's iteration
_ITERATIONS = 18  # 0.75^18 / 18! is 1e-18

Coefficients = Callable[[np.ndarray], np.ndarray]


class MomentTable:
    """Moments of a kernel as Chebyshev series on panels of [0, T].

    Args:
        edges: (panels + 1,).
        rows: values at the panels' nodes, (*shape, panels, nodes) each.
    """

    def __init__(self, edges: np.ndarray, rows: tuple[Tensor, ...]) -> None:
        self.edges = torch.as_tensor(edges)
        self.times = torch.as_tensor(nodes_of(edges))
        self.rows = rows
        self._series = tuple(fit_values(row) for row in rows)

    def __call__(self, t: Tensor) -> tuple[Tensor, ...]:
        """Each row at times of any shape, (*t.shape, *shape)."""
        edges = self.edges.to(t.device)
        values = (evaluate(edges, series.to(t.device), t) for series in self._series)
        return tuple(_times_first(value, t.ndim) for value in values)


def _times_first(values: Tensor, sides: int) -> Tensor:
    """(*shape, *t.shape) as (*t.shape, *shape)."""
    own = values.ndim - sides
    return values.permute((*range(own, values.ndim), *range(own)))


def panel_edges(coefficients: Coefficients, T: float, components: int | None) -> np.ndarray:
    """Panels of [0, T] on which the coefficients are resolved and the solution changes little.

    Args:
        coefficients: maps times (n,) to rows (rows, n): a, b, g² elementwise (perhaps of several schedules, all the
            a first), or the entries of F before the others.
        T: the horizon.
        components: k of a coupled state, or None.

    Raises:
        ScheduleError: for a coefficient that is not finite or not integrable.
    """

    def changes_too_much(values: np.ndarray, width: np.ndarray) -> np.ndarray:
        if components is None:
            return np.abs(values[: len(values) // 3]).mean(-1).max(0) * width > _LARGEST_CHANGE
        drift = values[: components**2].reshape(components, components, *values.shape[1:])
        return np.abs(drift).sum(1).max(0).mean(-1) * width > _LARGEST_TURN

    return PiecewiseChebyshev.fit(
        coefficients, geometric_edges(0.0, T), halve=changes_too_much, name="a coefficient of the SDE"
    ).edges


def integrate_elementwise(edges: np.ndarray, a: Tensor, b: Tensor, q: Tensor, P0: float) -> MomentTable:
    """log alpha, variance and offset of the kernel.

    Args:
        edges: (panels + 1,).
        a, b, q: the drift's slope, its offset and g² at the panels' nodes, (*shape, panels, nodes).
        P0: the variance at t = 0.

    Raises:
        ScheduleError: for an explosive drift.
    """
    width = torch.as_tensor(np.diff(edges))
    change, change_total = running_integral(a, width)
    forced_b, total_b = running_integral(b * torch.exp(-change), width)
    forced_q, total_q = running_integral(q * torch.exp(-2.0 * change), width)

    def compose(later: list[Tensor], earlier: list[Tensor]) -> list[Tensor]:
        (A, m, v), (A0, m0, v0) = later, earlier
        return [A + A0, m + torch.exp(A) * m0, v + torch.exp(2.0 * A) * v0]

    growth = torch.exp(change_total)
    initial = [
        torch.zeros_like(growth[..., :1]),
        torch.zeros_like(growth[..., :1]),
        torch.full_like(growth[..., :1], P0),
    ]
    A, m, v = _scan([change_total, growth * total_b, growth.square() * total_q], initial, compose)
    _require_no_explosion(A, edges)
    A, m, v = (start[..., :-1, None] for start in (A, m, v))
    growth = torch.exp(change)
    return MomentTable(edges, (A + change, growth.square() * (v + forced_q), growth * (m + forced_b)))


def integrate_coupled(edges: np.ndarray, F: Tensor, b: Tensor, Q: Tensor, P0: Tensor) -> MomentTable:
    """Φ, the lower Cholesky factor of P and the offset of the kernel of a coupled state.

    Args:
        edges: (panels + 1,).
        F, Q: (*shape, panels, nodes, k, k); b: (*shape, panels, nodes, k).
        P0: (k, k), the covariance at t = 0.

    Raises:
        ScheduleError: for an explosive drift.
    """
    width = torch.as_tensor(np.diff(edges))
    one = torch.eye(F.shape[-1], dtype=F.dtype)

    def integral(values: Tensor) -> tuple[Tensor, Tensor]:
        """Running and total integrals of matrices (..., panels, nodes, r, c) over each panel."""
        running, total = running_integral(values.movedim((-2, -1), (0, 1)), width)
        return running.movedim((0, 1), (-2, -1)), total.movedim((0, 1), (-2, -1))

    phi, inverse = one.expand_as(F), one.expand_as(F)
    for _ in range(_ITERATIONS):
        phi, inverse = one + integral(F @ phi)[0], one - integral(inverse @ F)[0]
    phi_total = one + integral(F @ phi)[1]
    forced_b, total_b = integral(inverse @ b[..., None])
    forced_q, total_q = integral(inverse @ Q @ inverse.mT)

    def compose(later: list[Tensor], earlier: list[Tensor]) -> list[Tensor]:
        (G, m, N), (G0, m0, N0) = later, earlier
        return [G @ G0, m + G @ m0, N + G @ N0 @ G.mT]

    zero = torch.zeros_like(phi_total[..., :1, :, :])
    initial = [one.expand_as(zero), zero[..., :1], zero]
    totals = [phi_total, phi_total @ total_b, phi_total @ total_q @ phi_total.mT]
    G, m, N = _scan(totals, initial, compose, dim=-3)
    _require_no_explosion(G.detach().abs().amax((-2, -1)).clamp_min(1e-300).log(), edges)
    G, m, N = (start[..., :-1, None, :, :] for start in (G, m, N))
    noise = phi @ (N + forced_q) @ phi.mT
    phi_now, offset = phi @ G, (phi @ (m + forced_b))[..., 0]
    root = _root_of_sum(phi_now @ _root(P0), _root(noise))
    back = (-2, -1)
    return MomentTable(edges, (phi_now.movedim(back, (0, 1)), root.movedim(back, (0, 1)), offset.movedim(-1, 0)))


def _scan(
    totals: list[Tensor],
    initial: list[Tensor],
    compose: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    dim: int = -1,
) -> list[Tensor]:
    """The state at every edge: ``initial``, then the panels' maps composed one after the other, in log2 passes."""
    states = [torch.cat([start, total], dim=dim) for start, total in zip(initial, totals, strict=True)]
    count, shift = states[0].shape[dim], 1
    while shift < count:
        later = [state.narrow(dim, shift, count - shift) for state in states]
        earlier = [state.narrow(dim, 0, count - shift) for state in states]
        composed = compose(later, earlier)
        states = [torch.cat([s.narrow(dim, 0, shift), c], dim=dim) for s, c in zip(states, composed, strict=True)]
        shift *= 2
    return states


def _root(covariance: Tensor) -> Tensor:
    """A square root of covariances, by scaling to unit diagonal: accurate however different the scales are."""
    scale = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)
    correlation = covariance / (safe[..., :, None] * safe[..., None, :])
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if bool((failed != 0).any()):  # rank deficient, as noise that never reaches some component
        values, vectors = torch.linalg.eigh(correlation)
        factor = torch.where(
            (failed != 0)[..., None, None], vectors * values.clamp_min(0.0).sqrt()[..., None, :], factor
        )
    return scale[..., :, None] * factor


def _root_of_sum(first: Tensor, second: Tensor) -> Tensor:
    """The lower Cholesky factor of A Aᵀ + B Bᵀ by a QR factorisation, which squares nothing."""
    both = torch.cat([first, second.expand(*first.shape[:-1], second.shape[-1])], dim=-1)
    lower = torch.linalg.qr(both.mT).R.mT
    return lower * torch.where(lower.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]


def _require_no_explosion(log_growth: Tensor, edges: np.ndarray) -> None:
    largest = log_growth.detach().reshape(-1, log_growth.shape[-1]).amax(0)
    bad = largest > math.log(_LARGEST_ALPHA)
    if bool(bad.any()):
        at = edges[int(bad.nonzero()[0])]
        raise ScheduleError(
            f"the drift is explosive: alpha = exp(∫ a dt) passes {_LARGEST_ALPHA:g} at t = {at:.4g}. "
            "Choose a smaller T, or a drift that contracts."
        )
