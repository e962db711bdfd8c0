r"""The moments of an affine SDE by quadrature, for every schedule: a few milliseconds, 1e-12 relative.

The panels are so small that the solution changes by a small factor on each. The exact recursions carry each moment from
the start s of a panel:

    sigma²(t) = e^{2 (A(t) - A(s))} sigma²(s) + ∫_s^t g(u)² e^{2 (A(t) - A(u))} du,     A = ∫ a,
    N(t)      = Φ(t,s) N(s) Φ(t,s)ᵀ + Φ(t,s) [∫_s^t Φ(u,s)⁻¹ g gᵀ Φ(u,s)⁻ᵀ du] Φ(t,s)ᵀ,

All terms are positive, so there is no cancellation even for very small noise. If the drift contracts too strongly to be
resolved by any panel, the moments no longer depend on their start and follow the coefficients: they are the only
polynomial that satisfies their equation on the panel. Φ and its inverse come from Picard's iteration Φ = 1 + ∫ F Φ at
Chebyshev points. It converges to rounding in every entry, also if F(t) does not commute with itself. Panels are
composed in a logarithmic number of passes.

All numbers are float64 and differentiable in the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ScheduleError
from sdeflow.numerics.chebyshev import (
    MAX_PANELS,
    Bound,
    PiecewiseChebyshev,
    derivative_matrix,
    end_weights,
    fit_values,
    geometric_edges,
    nodes_of,
    polynomials,
    require_time,
    running_integral,
)

__all__ = ["MomentTable", "integrate_coupled", "integrate_elementwise", "panel_edges", "with_resolved_roots"]

_LARGEST_ALPHA = 1e4
_LARGEST_CHANGE = 1.5  # of log alpha over one panel
_SLOW = 50.0  # the least decay of log alpha over a panel whose transient is left out
_FADED = 1e-12
_LARGEST_GROWTH = 1e3  # of the variance over a panel
_NOTHING = 1e-290  # a variance that counts as 0
_ROOT_TOLERANCE = 1e-11
_LARGEST_TURN = 0.75  # the largest norm of ∫ F over one panel, for Picard's iteration
_AT_ONCE = 2**15  # values of series computed at once
_MATRICES = "the covariance of the components"
_ITERATIONS = (18, 8, 3)  # of Picard: 0.75^18 / 18! is 1e-18,
_LARGEST_SIZES = np.array([0.02, 1e-6])  # and so are 0.02^8 / 8! and 1e-6^3 / 3!

Coefficients = Callable[[np.ndarray], np.ndarray]

_derivative = torch.as_tensor(derivative_matrix())
_to_left, _to_right = (torch.as_tensor(weights) for weights in end_weights())


class MomentTable:
    """Moments of a kernel as Chebyshev series on panels of [0, T].

    Args:
        edges: (panels + 1,).
        rows: the values of each moment at the panels' nodes, (*shape, panels, nodes): log alpha, the variance and the
            offset; of a coupled state Φ, the Cholesky factor of the covariance and the offset.

    Attributes:
        series: their Chebyshev coefficients, in the same shapes.
    """

    def __init__(self, edges: np.ndarray, rows: tuple[Tensor, Tensor, Tensor]) -> None:
        self.edges = torch.as_tensor(edges)
        self.times = torch.as_tensor(nodes_of(edges))
        self.rows = rows
        self.series = tuple(fit_values(row) for row in rows)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each moment at times of any shape, (*t.shape, *shape)."""
        alpha, spread, offset = self._at(self.series, t)
        return alpha, spread, offset

    def of_component(self, i: int, t: Tensor) -> tuple[Tensor, Tensor]:
        """For a coupled state, Φ_ii (*t.shape) and row i of the Cholesky factor (*t.shape, k)."""
        phi, root, _ = self.series
        diagonal, row = self._at((phi[i, i], root[i]), t)
        return diagonal, row

    def _at(self, several: Sequence[Tensor], t: Tensor) -> tuple[Tensor, ...]:
        panel, basis = polynomials(self.edges.to(t.device), t)
        values = (_sums(series.to(t.device), panel, basis) for series in several)
        return tuple(_times_first(value, t.ndim) for value in values)


def _sums(series: Tensor, panel: Tensor, basis: Tensor) -> Tensor:
    """Values (*shape, *times) of series (*shape, panels, terms); ``panel`` (*times) and ``basis`` (*times, terms)."""
    many = max(1, _AT_ONCE // max(1, math.prod(series.shape[:-2])))
    if panel.ndim != 1 or len(panel) <= many:
        return (series[..., panel, :] * basis).sum(-1)
    # For hundreds of series and a thousand times, the products would take a hundred megabytes.
    parts = zip(panel.split(many), basis.split(many), strict=True)
    return torch.cat([(series[..., own, :] * part).sum(-1) for own, part in parts], dim=-1)


def _times_first(values: Tensor, dims: int) -> Tensor:
    """(*shape, *t.shape) as (*t.shape, *shape)."""
    own = values.ndim - dims
    return values.permute((*range(own, values.ndim), *range(own)))


def panel_edges(
    coefficients: Coefficients,
    T: float,
    components: int | None,
    P0: float = 0.0,
    breaks: np.ndarray | None = None,
    bound: Bound | None = None,
) -> np.ndarray:
    """Panels of [0, T] on which the coefficients are resolved, and on which the solution changes little or is slow.

    Args:
        coefficients: maps times (n,) to values (m, n): a, b and g² of an elementwise SDE (for several schedules, first
            all a, then all b, then all g²), or the entries of F before the others.
        T: the horizon.
        components: k of a coupled state, or None.
        P0: the variance at t = 0 of an elementwise SDE.
        breaks: the times in (0, T) at which the coefficients are not smooth.
        bound: bounds of the coefficients.

    Raises:
        ScheduleError: if a coefficient is not finite or not integrable, or needs too many panels.
    """
    edges = geometric_edges(0.0, T)
    if breaks is not None and len(breaks):
        # No very narrow panel between a break point and an edge that only limits the width.
        near = np.abs(edges - breaks[np.abs(breaks - edges[:, None]).argmin(1)]) if len(breaks) < 64 else np.inf
        edges = np.union1d(edges[(near > 1e-6 * edges) | (edges == 0.0) | (edges == T)], breaks)
    edges = PiecewiseChebyshev.fit(coefficients, edges, bound=bound, name="a coefficient of the SDE").edges
    while True:
        require_time("a coefficient of the SDE")
        nodes, width = nodes_of(edges), np.diff(edges)
        values = torch.as_tensor(coefficients(nodes.reshape(-1)).reshape(-1, *nodes.shape))
        if components is None:
            a, b, q = values.chunk(3)
            too_wide, growth = _changes_too_much(edges, a, b, q, P0)
        else:
            drift = values[: components**2].unflatten(0, (components, components))
            too_wide, growth = drift.abs().sum(1).amax(0).mean(-1).numpy() * width > _LARGEST_TURN, None
        if not too_wide.any():
            return edges
        edges = _halved(edges, too_wide, growth)


def _changes_too_much(
    edges: np.ndarray, a: Tensor, b: Tensor, q: Tensor, P0: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Panels (panels,) on which a solution changes too much, and is not slow from its start on.

    Returns:
        The mask, and the factor by which the variance grows on each panel, or None if it was not computed.
    """
    width = torch.as_tensor(np.diff(edges))
    slow = _is_slow(a, q, width)
    too_wide = ((a.abs().mean(-1) * width > _LARGEST_CHANGE) & ~slow).any(0)
    if bool(too_wide.any()):
        return too_wide.numpy(), None
    (_, _, own_v, carried), totals = _panel_maps(a, b, q, width)
    _, m, v = (start[..., :-1] for start in _at_edges(totals, P0))
    # If a variance grows much from its start, its first part keeps few digits.
    grown = (carried.square() * v[..., None] + own_v).amax(-1)
    # A variance near the lower end of float64 has no digits to keep: it counts as 0.
    too_wide = ((grown > _LARGEST_GROWTH * v.clamp_min(_NOTHING)) & ~slow).any(0) & torch.as_tensor(
        _is_divisible(edges)
    )
    if bool(slow.any()):
        # The moments that enter a slow panel must no longer depend on their start.
        steady_m, steady_v = (_steady(power * a, rate, width, slow) @ _to_left for power, rate in ((1.0, b), (2.0, q)))
        faded = (m - steady_m).abs() <= _FADED * m.abs().cummax(-1).values
        faded &= (v - steady_v).abs() <= _FADED * v
        too_wide |= (slow & ~faded).any(0)
    growth = torch.where(slow, 1.0, grown / v.clamp_min(_NOTHING)).amax(0)
    return too_wide.numpy(), growth.numpy()


def _is_divisible(edges: np.ndarray) -> np.ndarray:
    """Panels (panels,) that may be halved: they do not begin at 0, and are wider than rounding."""
    return (edges[:-1] > 0) & (np.diff(edges) > 1e-14 * edges[1:])


def with_resolved_roots(
    edges: np.ndarray, integrate: Callable[[np.ndarray], MomentTable]
) -> tuple[np.ndarray, MomentTable]:
    """Panels on which the Cholesky factor of a coupled state is a polynomial, and its table.

    At t = 0, and where the noise jumps up, the factor grows like a square root. All panels but the first are halved
    until they resolve it. If both halves of a panel fail too, its factor is only rounding, and further halving does not
    help.
    """
    table = integrate(edges)
    candidates = edges[:-1] > 0.0
    while True:
        require_time("the noise")
        unresolved = candidates & _has_unresolved_root(table)
        if not unresolved.any():
            return edges, table
        # Values near the ends of the panels show by how much the noise grows.
        sizes = table.rows[1].diagonal(dim1=0, dim2=1).square()
        growth = (sizes[:, -1] / sizes[:, 0].clamp_min(1e-300)).amax(-1).numpy()
        finer = _halved(edges, unresolved, growth)
        parent = np.searchsorted(edges, finer[:-1], side="right") - 1
        table = integrate(finer)
        fails = unresolved[parent] & _has_unresolved_root(table)
        candidates = fails & (np.bincount(parent, fails, len(edges) - 1) < 2)[parent]
        edges = finer


def _has_unresolved_root(table: MomentTable) -> np.ndarray:
    """Panels (panels,) on which the last coefficients of the Cholesky factor have not decayed."""
    root, series = table.rows[1].detach(), table.series[1].detach()
    size = root.square().sum(1).sqrt().amax(-1)  # the size of each component
    tail = series[..., -3:].abs().amax(-1).amax(1)
    return (tail > _ROOT_TOLERANCE * size).any(0).numpy() & _is_divisible(table.edges.numpy())


def _halved(edges: np.ndarray, too_wide: np.ndarray, growth: np.ndarray | None = None) -> np.ndarray:
    """Edges with the middles of the panels ``too_wide`` added.

    Panels on which the variance grows by a large factor ``growth`` are divided in geometric steps towards their start.

    Raises:
        ScheduleError: if there are too many panels.
    """
    left, width = edges[:-1][too_wide], np.diff(edges)[too_wide]
    added = [left + 0.5 * width]
    if growth is not None:
        steps = np.ceil(np.log(np.clip(growth[too_wide], 1.0, 1e15)) / np.log(4.0))
        for k in range(1, int(steps.max(initial=0)) + 1):
            added.append((left + width * 4.0**-k)[(k <= steps) & (width * 4.0**-k > 1e-14 * left)])
    edges = np.union1d(edges, np.concatenate(added))
    if len(edges) > MAX_PANELS:
        raise ScheduleError(
            f"the drift is too stiff: more than {MAX_PANELS} panels are needed on [0, {edges[-1]:g}]. "
            "Choose a smaller T, or rescale the time."
        )
    return edges


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
    (change, own_m, own_v, carried), totals = _panel_maps(a, b, q, width)
    A, m, v = _at_edges(totals, P0)
    _require_no_explosion(A, edges)
    A, m, v = (start[..., :-1, None] for start in (A, m, v))
    var = (carried.square() * v + own_v).clamp_min(0.0)  # rounding may make a variance of 0 negative
    return MomentTable(edges, (A + change, var, carried * m + own_m))


def _panel_maps(a: Tensor, b: Tensor, q: Tensor, width: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The maps from the moments at the start of each panel, for coefficients (..., panels, nodes).

    Returns:
        At the nodes: the change of log alpha; the offset and the variance of a start with both 0; and the factor of an
        offset at the start. Over the whole panel: the change of log alpha, the offset and the variance.
    """
    change, change_total = running_integral(a, width)
    slow = _is_slow(a, q, width)
    some = bool(slow.any())
    held = torch.where(slow[..., None], 0.0, change) if some else change
    growth, growth_total = torch.exp(held), torch.exp(torch.where(slow, 0.0, change_total) if some else change_total)
    own_m, total_m = running_integral(b * torch.exp(-held), width)
    own_v, total_v = running_integral(q * torch.exp(-2.0 * held), width)
    own_m, total_m = growth * own_m, growth_total * total_m
    own_v, total_v = growth.square() * own_v, growth_total.square() * total_v
    if some:
        steady_m, steady_v = (_steady(power * a, rate, width, slow) for power, rate in ((1.0, b), (2.0, q)))
        own_m, own_v = (torch.where(slow[..., None], s, o) for s, o in ((steady_m, own_m), (steady_v, own_v)))
        total_m, total_v = (
            torch.where(slow, steady @ _to_right, total) for steady, total in ((steady_m, total_m), (steady_v, total_v))
        )
        growth = torch.where(slow[..., None], 0.0, growth)
    return (change, own_m, own_v, growth), [change_total, total_m, total_v]


def _at_edges(totals: list[Tensor], P0: float) -> list[Tensor]:
    """log alpha, offset and variance at each edge, (..., panels + 1)."""

    def compose(later: list[Tensor], earlier: list[Tensor]) -> list[Tensor]:
        (A, m, v), (A0, m0, v0) = later, earlier
        return [A + A0, m + torch.exp(A) * m0, v + torch.exp(2.0 * A) * v0]

    initial = [torch.full_like(totals[0][..., :1], start) for start in (0.0, 0.0, P0)]
    return _scan(totals, initial, compose)


def _is_slow(a: Tensor, q: Tensor, width: Tensor) -> Tensor:
    """Panels (..., panels) on which the drift contracts by at least e^-50 at an even rate, with even noise.

    There the moments follow the coefficients and do not depend on the start: they are the only solution without a
    transient.
    """
    weakest, strongest = -a.amax(-1), -a.amin(-1)
    even = (strongest <= 2.0 * weakest) & (q.amax(-1) <= 4.0 * q.amin(-1)) & (q.amin(-1) > 0)
    return (weakest * width >= _SLOW) & even


def _steady(rate: Tensor, source: Tensor, width: Tensor, slow: Tensor) -> Tensor:
    """The polynomial y with y' = rate y + source at the nodes of slow panels, (..., panels, nodes); else 0."""
    at = slow.nonzero(as_tuple=True)
    rates, step = rate[at], (2.0 / width)[at[-1]]
    matrix = torch.eye(rates.shape[-1], dtype=rates.dtype) - (step[:, None] / rates)[..., None] * _derivative
    solution = torch.linalg.solve(matrix, -source[at] / rates)
    return torch.zeros_like(source).index_put(at, solution)


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

    phi, inverse = _picard(F, width)
    phi_total = one + _integral(F @ phi, width)[1]
    forced_b, total_b = _integral(inverse @ b[..., None], width)
    require_time(_MATRICES)
    forced_q, total_q = _integral(inverse @ Q @ inverse.mT, width)

    def compose(later: list[Tensor], earlier: list[Tensor]) -> list[Tensor]:
        require_time(_MATRICES)
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
    require_time(_MATRICES)
    noise = _root(noise)
    require_time(_MATRICES)
    root = _root_of_sum(phi_now @ _root(P0), noise)
    back = (-2, -1)
    return MomentTable(edges, (phi_now.movedim(back, (0, 1)), root.movedim(back, (0, 1)), offset.movedim(-1, 0)))


def _integral(values: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Running and total integrals of matrices (..., panels, nodes, r, c) over each panel."""
    running, total = running_integral(values.flatten(-2), width, dim=-2)
    return running.unflatten(-1, values.shape[-2:]), total.unflatten(-1, values.shape[-2:])


def _picard(F: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Φ and its inverse at the nodes (..., panels, nodes, k, k) of each panel, from 1 at its left end.

    After n of Picard's iterations the error is below (∫ |F|)^n / n!. Most panels are near t = 0 and need only a few.
    """
    one = torch.eye(F.shape[-1], dtype=F.dtype)
    size = F.detach().abs().sum(-1).amax(-1).amax(-1).reshape(-1, len(width)).amax(0) * width
    needed = np.searchsorted(-_LARGEST_SIZES, -size.numpy()) if len(width) > 1 else np.array([0])
    parts, places = [], []
    for i in np.unique(needed):
        place = torch.as_tensor(np.flatnonzero(needed == i))
        own, step = F.index_select(-4, place), width[place]
        phi, inverse = one.expand_as(own), one.expand_as(own)
        for _ in range(_ITERATIONS[i]):  # of tens of components each takes a part of a second
            require_time(_MATRICES)
            phi, inverse = one + _integral(own @ phi, step)[0], one - _integral(inverse @ own, step)[0]
        parts.append((phi, inverse))
        places.append(place)
    order = torch.cat(places).argsort()
    phi, inverse = (torch.cat(found, dim=-4).index_select(-4, order) for found in zip(*parts, strict=True))
    return phi, inverse


def _scan(
    totals: list[Tensor],
    initial: list[Tensor],
    compose: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    dim: int = -1,
) -> list[Tensor]:
    """The state at every edge: ``initial``, then the maps of the panels composed in order, in log2(panels) passes."""
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
    """A square root of covariances, by scaling to unit diagonal: accurate even for very different scales."""
    scale = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)
    correlation = covariance / (safe[..., :, None] * safe[..., None, :])
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if bool((failed != 0).any()):  # rank deficient: the noise does not reach every component
        values, vectors = torch.linalg.eigh(correlation)
        factor = torch.where(
            (failed != 0)[..., None, None], vectors * values.clamp_min(0.0).sqrt()[..., None, :], factor
        )
    return scale[..., :, None] * factor


def _root_of_sum(first: Tensor, second: Tensor) -> Tensor:
    """The lower Cholesky factor of A Aᵀ + B Bᵀ, by a QR factorisation and so without squares."""
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
