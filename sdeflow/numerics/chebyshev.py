"""Piecewise Chebyshev interpolants on panels that are refined automatically, in float64.

A function of one variable is sampled at the Chebyshev points of each panel, and a panel whose last coefficients have
not decayed is halved. Samples can miss a narrow feature. So a panel is also halved until bounds of the function on a
disc around it prove that the interpolant is accurate. If there are no bounds, the function is tested at points between
the nodes. Known kinks and jumps are edges from the start. Others are located by halving, to 14 digits of their
position, and powers of t near 0 are resolved by panels in geometric progression. The nodes do not include the ends of a
panel, so an integrable singularity at 0 is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ScheduleError
from sdeflow.symbolic.patience import time_left

__all__ = [
    "MAX_PANELS",
    "NODES",
    "Bound",
    "PiecewiseChebyshev",
    "derivative_matrix",
    "end_weights",
    "evaluate",
    "fit_values",
    "geometric_edges",
    "halved",
    "nodes_of",
    "polynomials",
    "require_time",
    "running_integral",
]

NODES = 24
MAX_PANELS = 60_000
_TOLERANCE = 2e-13
_NEGLIGIBLE = 1e-20
_SMALLEST = 1e-14
_HARMLESS = 1e-11
_AT_ONCE = 256  # panels between two checks of the deadline
_EPSILON = float(np.finfo(np.float64).eps)
_ROUNDED_BETWEEN = 30.0  # the rounding of an interpolant, in units of that of each of its 24 values

# On the ellipse with rho = 4 around a panel, inside the disc of 2.125 times its half width, a function that varies
# by M is interpolated at 24 nodes to 4 M rho^-23 / (rho - 1) (Trefethen, Approximation Theory, theorem 8.2).
_REACH = 2.125
_TRUNCATION = 4.0 * 4.0**-23 / 3.0
_CERTAIN = 5e-13
_LEBESGUE = 4.0  # interpolants at 24 nodes are so much worse than the best constant

_theta = (np.arange(NODES) + 0.5) * math.pi / NODES
_points = -np.cos(_theta)  # increasing, inside (-1, 1)
_to_coefficients = np.cos(np.outer(np.arange(NODES), np.pi - _theta)) * (2.0 / NODES)
_to_coefficients[0] /= 2.0

_to_halves = [
    (_to_coefficients @ np.polynomial.chebyshev.chebvander(0.5 * (_points + shift), NODES - 1)).T
    for shift in (-1.0, 1.0)
]

Function = Callable[[np.ndarray], np.ndarray]
Rounding = Callable[[np.ndarray, np.ndarray], np.ndarray]


def geometric_edges(start: float, stop: float, ratio: float = 4.0) -> np.ndarray:
    """Edges of panels that become narrower towards ``start``, down to 1e-30 of the interval.

    No panel is wider than 1/256 of the interval, because of features that fall between the nodes of a wide panel.
    """
    length = stop - start
    count = int(round(30 / math.log10(ratio)))
    edges = start + length * ratio ** -np.arange(count, -1.0, -1.0)
    return np.unique(np.concatenate([[start], edges, np.linspace(start, stop, 257)]))


def require_time(name: str) -> None:
    """Raises a ScheduleError if the deadline of a declaration has passed while ``name`` is computed."""
    if time_left() <= 0:
        raise ScheduleError(
            f"{name} takes too long to resolve: seconds of processor time are not enough for its panels. Choose "
            "a smaller T, or give the part that depends on t alone as a table: sdeflow.schedule((times, values))."
        )


class Bound(Protocol):
    """Bounds of a function, such as those of :class:`sdeflow.symbolic.enclosure.Enclosure`."""

    def __call__(self, centre: np.ndarray, radius: np.ndarray, analytic: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Values (k, n) at real centres, and their largest distance to values on discs around, complex or real."""

    def between(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest values (k, n) on intervals without a break point inside."""


class PiecewiseChebyshev:
    """k functions of one variable, each a Chebyshev series on every panel.

    Args:
        edges: (panels + 1,) increasing.
        coefficients: (k, panels, terms).
        unresolved: (panels,), true for panels of the smallest width that are not resolved.
    """

    def __init__(self, edges: np.ndarray, coefficients: np.ndarray, unresolved: np.ndarray | None = None) -> None:
        self.edges = edges
        self.coefficients = coefficients
        self.unresolved = np.zeros(len(edges) - 1, dtype=bool) if unresolved is None else unresolved
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def fit(
        cls,
        function: Function,
        edges: np.ndarray,
        *,
        bound: Bound | None = None,
        rounding: Rounding | None = None,
        lenient: bool = False,
        name: str = "the function",
    ) -> PiecewiseChebyshev:
        """Interpolates ``function`` to about 1e-13 of its size on each panel.

        Args:
            function: maps points (n,) to values (k, n).
            edges: the edges at the start: points where the function is not smooth, and others.
            bound: bounds of the same functions, or of functions with the same features, which each panel must
                satisfy too. Without bounds, points between the nodes are tested.
            rounding: maps points (n,) and values (k, n) to the rounding errors of these values, which no panel
                resolves. For use without ``bound``, which contains them.
            lenient: whether poles and values that are not finite are accepted.
            name: the name of the function in error messages.

        Raises:
            ScheduleError: if the function is not finite, has a pole, or needs too many panels or too much time.
        """
        done: list[tuple[np.ndarray, ...]] = []
        left, right = edges[:-1], edges[1:]
        test, whole = _Test(function, bound, rounding), None
        finished = 0
        while left.size:
            parts = []
            for i in range(0, left.size, _AT_ONCE):  # for hundreds of schedules, all panels at once would take seconds
                require_time(name)
                ends = left[i : i + _AT_ONCE], right[i : i + _AT_ONCE]
                nodes = 0.5 * (ends[0] + ends[1])[:, None] + 0.5 * (ends[1] - ends[0])[:, None] * _points
                values = function(nodes.reshape(-1)).reshape(-1, *nodes.shape)
                nowhere = ~np.isfinite(values).any((0, 2)) if lenient else False
                if lenient:
                    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
                _require_finite(nodes, values, name)
                coefficients = values @ _to_coefficients.T
                parts.append((values, coefficients, test(*ends, nodes, values, coefficients) | nowhere))
            values, coefficients = (np.concatenate([part[j] for part in parts], axis=1) for j in (0, 1))
            resolved = np.concatenate([part[2] for part in parts])
            width = right - left
            share = np.abs(values).max(-1) * width
            whole = share.sum(1, keepdims=True) if whole is None else np.maximum(whole, share.sum(1, keepdims=True))
            # The first panel of a geometric grid is never resolved, nor is a jump of a function without a formula.
            smallest = width <= _SMALLEST * np.maximum(np.abs(left), np.abs(right))
            smallest |= (left == edges[0]) & (width <= 1e-25 * (edges[-1] - edges[0]))
            bad = smallest & ~resolved
            if bad.any() and not lenient:
                _require_integrable(test.share(left[bad], right[bad], values[:, bad]), whole, left[bad], name)
            keep = resolved | smallest
            done.append((left[keep], right[keep], coefficients[:, keep], bad[keep]))
            finished += int(keep.sum())
            middle = 0.5 * (left + right)[~keep]
            left, right = np.concatenate([left[~keep], middle]), np.concatenate([middle, right[~keep]])
            if finished + left.size > MAX_PANELS:
                raise ScheduleError(
                    f"{name} oscillates too fast, is singular or has too narrow features near "
                    f"{float(left.min()):.6g}: more than {MAX_PANELS} panels are needed to resolve it."
                )
        left, right, unresolved = (np.concatenate([part[i] for part in done]) for i in (0, 1, 3))
        order = np.argsort(left)
        coefficients = np.concatenate([part[2] for part in done], axis=1)[:, order]
        return cls(np.concatenate([left[order][:1], right[order]]), coefficients, unresolved[order])

    @property
    def nodes(self) -> np.ndarray:
        """The interpolation points, (panels, nodes)."""
        return nodes_of(self.edges)

    def __call__(self, points: Tensor) -> Tensor:
        """Values (k, *points.shape) in float64, on the device of ``points``."""
        return evaluate(*self._moved(points.device), points.to(torch.float64))

    def derivative(self) -> PiecewiseChebyshev:
        """The derivative, panel by panel."""
        width = np.diff(self.edges)
        series = np.polynomial.chebyshev.chebder(self.coefficients, axis=-1) * (2.0 / width)[:, None]
        return PiecewiseChebyshev(self.edges, np.concatenate([series, np.zeros_like(series[..., :1])], axis=-1))

    def _moved(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = (
                torch.as_tensor(self.edges, device=device),
                torch.as_tensor(self.coefficients, device=device),
            )
        return self._on_device[device]


def nodes_of(edges: np.ndarray) -> np.ndarray:
    """The interpolation points of each panel, (panels, nodes)."""
    left, right = edges[:-1, None], edges[1:, None]
    return 0.5 * (left + right) + 0.5 * (right - left) * _points


def evaluate(edges: Tensor, coefficients: Tensor, points: Tensor) -> Tensor:
    """Values (*leading, *points.shape) of series (*leading, panels, terms), all in float64; differentiable."""
    panel, basis = polynomials(edges, points, coefficients.shape[-1])
    return (coefficients[..., panel, :] * basis).sum(-1)


def polynomials(edges: Tensor, points: Tensor, terms: int = NODES) -> tuple[Tensor, Tensor]:
    """The panel of each point, and the Chebyshev polynomials at it, (*points.shape, terms); differentiable."""
    panel = torch.searchsorted(edges[1:-1], points.contiguous(), right=True)
    left, right = edges[panel], edges[panel + 1]
    # Just inside (-1, 1), where the derivative of acos is finite.
    u = ((2.0 * points - left - right) / (right - left)).clamp(-1.0, 1.0) * (1.0 - 1e-15)
    order = torch.arange(terms, dtype=torch.float64, device=points.device)
    return panel, torch.cos(torch.acos(u)[..., None] * order)


def running_integral(values: Tensor, width: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Integrals of panel functions from the left end of each panel.

    Args:
        values: (..., panels, nodes) at the Chebyshev points; (..., panels, nodes, entries) for ``dim`` -2.
        width: (panels,) of each panel.
        dim: the dim of the nodes, -1 or -2.

    Returns:
        The integral up to each node, in the shape of ``values``, and over the whole panel, without the nodes' dim.
    """
    if dim == -2:
        scaled = values * (0.5 * width[:, None, None])
        return _to_running @ scaled, _to_total @ scaled
    scaled = values * (0.5 * width[:, None])
    return scaled @ _to_running.T, scaled @ _to_total


def fit_values(values: Tensor) -> Tensor:
    """Chebyshev coefficients (..., nodes) of values at the Chebyshev points of each panel."""
    return values @ torch.as_tensor(_to_coefficients.T)


def halved(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The series (..., terms) on the left half and on the right half of each panel."""
    return coefficients @ _to_halves[0], coefficients @ _to_halves[1]


def derivative_matrix() -> np.ndarray:
    """The matrix (nodes, nodes) from values at the Chebyshev points of (-1, 1) to values of the derivative there."""
    series = np.polynomial.chebyshev.chebder(_to_coefficients, axis=0)
    return np.polynomial.chebyshev.chebvander(_points, NODES - 2) @ series


def end_weights() -> tuple[np.ndarray, np.ndarray]:
    """The weights (nodes,) of values at the Chebyshev points that give the values at -1 and at 1."""
    signs = (-1.0) ** np.arange(NODES)
    return signs @ _to_coefficients, _to_coefficients.sum(0)


def _integration_matrices() -> tuple[Tensor, Tensor]:
    identity = np.eye(NODES)
    series = np.polynomial.chebyshev.chebint(_to_coefficients @ identity, lbnd=-1, axis=0)
    running = np.polynomial.chebyshev.chebval(_points, series).T
    total = np.polynomial.chebyshev.chebval(1.0, series)
    return torch.as_tensor(running), torch.as_tensor(total)


_to_running, _to_total = _integration_matrices()


def _rounded(bound: Bound, points: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (k, panels, points), and their rounding errors (k, panels) if times are known to ``radius``."""
    values, error = bound(points.reshape(-1), radius.reshape(-1), analytic=False)
    error = np.where(np.isfinite(error), error, 0.0).reshape(-1, *points.shape)
    return values.reshape(-1, *points.shape), 8.0 * error.max(-1)


class _Test:
    """The test whether panels are resolved: by the last coefficients, and by bounds or points between the nodes."""

    def __init__(self, function: Function, bound: Bound | None, rounding: Rounding | None = None) -> None:
        self.function, self.bound, self.rounding = function, bound, rounding
        self._largest: dict[str, np.ndarray] = {}

    def __call__(
        self, left: np.ndarray, right: np.ndarray, nodes: np.ndarray, values: np.ndarray, coefficients: np.ndarray
    ) -> np.ndarray:
        """The mask (panels,) of resolved panels, for values (k, panels, nodes) and their coefficients."""
        width, size = right - left, np.abs(values).max(-1)
        # The nodes are rounded, which changes values by up to eps * position / width of their size.
        tolerance = _TOLERANCE + 4 * _EPSILON * np.maximum(np.abs(left), np.abs(right)) / width
        tolerance = np.minimum(tolerance, 1e-3)  # a pole must not pass for rounding
        tail = np.abs(coefficients[..., -3:]).max(-1)
        with np.errstate(over="ignore"):  # on the first panel, 1e-30 wide
            negligible = self._negligible("values", size, width) / width
        if self.bound is None:
            small = np.maximum(tolerance * size + 1e-300, negligible)
            rounded = np.zeros_like(size)
            if self.rounding is not None:
                flat = self.rounding(nodes.reshape(-1), values.reshape(len(values), -1))
                rounded = flat.reshape(values.shape).max(-1)
            resolved = (tail <= np.maximum(small, rounded)).all(0)
            between = np.maximum(1e3 * small, _ROUNDED_BETWEEN * rounded)
            resolved[resolved] = self._holds_between(nodes, coefficients, between, resolved)
            return resolved
        certain, rounding = self._is_certain(self.bound, left, right, nodes[:, _LOOKED_AT])
        # A computed value may have the rounding error of its formula, but not a larger one.
        floor = rounding if len(rounding) == len(tail) else rounding.max(0)
        small = np.maximum(np.maximum(tolerance * size, floor) + 1e-300, negligible)
        return certain & (tail <= small).all(0)

    def _is_certain(
        self, bound: Bound, left: np.ndarray, right: np.ndarray, points: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether bounds prove all functions to be interpolated, (panels,); their rounding errors, (k, panels)."""
        width = right - left
        radius = bound(0.5 * (left + right), _REACH * 0.5 * width)[1]
        values, rounding = _rounded(bound, points, 0.5 * _EPSILON * np.abs(points))
        size = np.nan_to_num(np.abs(values)).max(-1)
        coarse = (rounding > 1e-3 * size).any(0)
        if coarse.any():  # either a hidden zero, which is allowed, or too narrow to distinguish times
            own = _rounded(bound, points[coarse], np.zeros_like(points[coarse]))[1]
            rounding[:, coarse] = np.minimum(rounding[:, coarse], np.maximum(own, 1e-3 * size[:, coarse]))
        certain = _TRUNCATION * radius <= np.maximum(_CERTAIN * size, rounding)
        negligible = self._negligible("bounds", size, width)
        certain |= radius * width <= negligible
        rest = ~certain.all(0)
        if rest.any():  # beside the end of a root, where nothing is analytic, a panel may hold next to nothing
            low, high = bound.between(left[rest], right[rest])
            certain[:, rest] |= (high - low) * width[rest] <= negligible
            certain[:, rest] |= _LEBESGUE * (high - low) <= _CERTAIN * size[:, rest]
        return certain.all(0), rounding

    def share(self, left: np.ndarray, right: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Bounds of the integrals of the moduli over panels, (k, panels)."""
        size = np.abs(values).max(-1)
        if self.bound is not None:
            largest = reduce(np.maximum, map(np.abs, self.bound.between(left, right)))
            if len(largest) == len(size):  # for tensor parameters a constant has one bound, but a value for each entry
                # At 0 an integrable power is unbounded.
                size = np.where(left > 0, np.maximum(size, largest), size)
        return size * (right - left)

    def _negligible(self, which: str, size: np.ndarray, width: np.ndarray) -> np.ndarray:
        """A negligible share of the integral of each of k functions, (k, 1)."""
        found = (size * width).max(1, keepdims=True)
        self._largest[which] = np.maximum(found, self._largest.get(which, 0.0))
        return _NEGLIGIBLE * self._largest[which]

    def _holds_between(
        self, nodes: np.ndarray, coefficients: np.ndarray, tolerance: np.ndarray, among: np.ndarray
    ) -> np.ndarray:
        """Whether the interpolants of the panels ``among`` agree with the function at points between the nodes."""
        nodes, coefficients, tolerance = nodes[among], coefficients[:, among], tolerance[:, among]
        if not len(nodes):
            return np.ones(0, dtype=bool)
        left, right = nodes[:, :1], nodes[:, -1:]
        points = 0.5 * (left + right) + 0.5 * (right - left) * _between
        values = np.nan_to_num(self.function(points.reshape(-1)).reshape(-1, *points.shape))
        # The outermost nodes are inside the panel.
        basis = np.cos(np.arange(NODES)[:, None] * np.arccos(_points[-1] * _between))
        return (np.abs(coefficients @ basis - values).max(-1) <= tolerance).all(0)


_LOOKED_AT = np.array([0, 5, 11, 17, 23])
_between = np.array([-0.91, -0.63, -0.27, 0.12, 0.44, 0.83])


def _require_finite(nodes: np.ndarray, values: np.ndarray, name: str) -> None:
    bad = ~np.isfinite(values).all(0)
    if bad.any():
        raise ScheduleError(f"{name} is not finite (or not real) at t = {nodes[bad].min():.6g}.")


def _require_integrable(share: np.ndarray, whole: np.ndarray, at: np.ndarray, name: str) -> None:
    """Raises a ScheduleError for a pole, which leaves a finite share of the integral in the smallest panel."""
    bad = ~(share <= _HARMLESS * whole).all(0)
    if bad.any():
        raise ScheduleError(
            f"{name} is singular at t = {float(at[bad].mean()):.6g}, or has a feature there that is too narrow for "
            "double precision; choose T (or a cutoff) that leaves it out."
        )
