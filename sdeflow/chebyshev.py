"""Piecewise Chebyshev interpolants on panels that refine themselves, in float64.

A function of one variable is sampled at the Chebyshev points of each panel; a panel whose last
coefficients have not decayed is halved. Kinks and jumps (Piecewise, Abs, Max, floor) are closed in on
by halving, to 14 digits of their position, and powers of t near 0 by panels in geometric progression.
The nodes never include a panel's ends, so a singularity at 0 that can be integrated does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import ScheduleError

__all__ = ["PiecewiseChebyshev", "evaluate", "fit_values", "geometric_edges", "nodes_of", "running_integral"]

NODES = 24
_TOLERANCE = 2e-13
_MAX_PANELS = 20_000
_NEGLIGIBLE = 1e-20
_EPSILON = float(np.finfo(np.float64).eps)

_theta = (np.arange(NODES) + 0.5) * math.pi / NODES
_points = -np.cos(_theta)  # increasing, inside (-1, 1)
_to_coefficients = np.cos(np.outer(np.arange(NODES), np.pi - _theta)) * (2.0 / NODES)
_to_coefficients[0] /= 2.0

Function = Callable[[np.ndarray], np.ndarray]


def geometric_edges(start: float, stop: float, ratio: float = 4.0) -> np.ndarray:
    """Panel edges that shrink towards ``start`` down to 1e-30 of the interval, and are nowhere wider than 1/256 of it.

    The width is for features that no node of a wide panel would see.
    """
    length = stop - start
    count = int(round(30 / math.log10(ratio)))
    edges = start + length * ratio ** -np.arange(count, -1.0, -1.0)
    return np.unique(np.concatenate([[start], edges, np.linspace(start, stop, 257)]))


class PiecewiseChebyshev:
    """k functions of one variable, each a Chebyshev series on every panel.

    Args:
        edges: (panels + 1,) increasing.
        coefficients: (k, panels, terms).
    """

    def __init__(self, edges: np.ndarray, coefficients: np.ndarray) -> None:
        self.edges = edges
        self.coefficients = coefficients
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def fit(
        cls,
        function: Function,
        edges: np.ndarray,
        *,
        halve: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
        name: str = "the function",
    ) -> PiecewiseChebyshev:
        """Interpolates ``function`` to about 1e-13 of its size on each panel.

        Args:
            function: maps points (n,) to values (k, n).
            edges: the panels to start from.
            halve: an additional test, (k, panels, nodes) values and (panels,) widths to a mask of panels to halve.
            name: what the error messages call it.

        Raises:
            ScheduleError: where the function is not finite, or has a pole.
        """
        done: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        left, right = edges[:-1], edges[1:]
        finished = 0
        whole = None
        while left.size:
            nodes = 0.5 * (left + right)[:, None] + 0.5 * (right - left)[:, None] * _points
            values = function(nodes.reshape(-1)).reshape(-1, *nodes.shape)
            _require_finite(nodes, values, name)
            coefficients = values @ _to_coefficients.T
            size = np.abs(values).max(-1)
            width = right - left
            # The nodes themselves are rounded, which moves values by up to eps * position / width of their size.
            tolerance = _TOLERANCE + 4 * _EPSILON * np.maximum(np.abs(left), np.abs(right)) / width
            tolerance = np.minimum(tolerance, 1e-3)  # a pole must not pass for rounding
            resolved = (np.abs(coefficients[..., -3:]).max(-1) <= tolerance * size + 1e-300).all(0)
            # What is left unresolved of a panel may also be a vanishing share of the whole integral.
            whole = (size * width).max(1, keepdims=True) if whole is None else whole
            resolved |= (np.abs(coefficients[..., -3:]).max(-1) * width <= _NEGLIGIBLE * whole).all(0)
            if halve is not None:
                resolved &= ~halve(values, width)
            # The first panel of a geometric grid, and a jump, can never be resolved: they end here, if harmless.
            smallest = width <= 1e-14 * np.maximum(np.abs(left), np.abs(right))
            smallest |= (left == edges[0]) & (width <= 1e-25 * (edges[-1] - edges[0]))
            _require_integrable(size, width, smallest & ~resolved, edges, nodes, name)
            keep = resolved | smallest
            done.append((left[keep], right[keep], coefficients[:, keep]))
            finished += int(keep.sum())
            middle = 0.5 * (left + right)[~keep]
            left, right = np.concatenate([left[~keep], middle]), np.concatenate([middle, right[~keep]])
            if finished + left.size > _MAX_PANELS:
                raise ScheduleError(
                    f"{name} is too stiff, oscillates too fast or is singular near {float(left.min()):.6g}: more than "
                    f"{_MAX_PANELS} panels are needed to resolve it."
                )
        left = np.concatenate([part[0] for part in done])
        order = np.argsort(left)
        right = np.concatenate([part[1] for part in done])[order]
        coefficients = np.concatenate([part[2] for part in done], axis=1)[:, order]
        return cls(np.concatenate([left[order][:1], right]), coefficients)

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
    panel = torch.searchsorted(edges[1:-1], points.contiguous(), right=True)
    left, right = edges[panel], edges[panel + 1]
    # Just inside (-1, 1), where the derivative of acos is finite.
    u = ((2.0 * points - left - right) / (right - left)).clamp(-1.0, 1.0) * (1.0 - 1e-15)
    order = torch.arange(coefficients.shape[-1], dtype=torch.float64, device=points.device)
    basis = torch.cos(torch.acos(u)[..., None] * order)
    return (coefficients[..., panel, :] * basis).sum(-1)


def running_integral(values: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Integrals of panel functions from the left end of each panel.

    Args:
        values: (..., panels, nodes) at the Chebyshev points.
        width: (panels,) of each panel.

    Returns:
        The integral up to each node, as ``values``, and over the whole panel, (..., panels).
    """
    scaled = values * (0.5 * width[:, None])
    return scaled @ _to_running.T, scaled @ _to_total


def fit_values(values: Tensor) -> Tensor:
    """Chebyshev coefficients (..., nodes) of values at the Chebyshev points of each panel."""
    return values @ torch.as_tensor(_to_coefficients.T)


def _integration_matrices() -> tuple[Tensor, Tensor]:
    identity = np.eye(NODES)
    series = np.polynomial.chebyshev.chebint(_to_coefficients @ identity, lbnd=-1, axis=0)
    running = np.polynomial.chebyshev.chebval(_points, series).T
    total = np.polynomial.chebyshev.chebval(1.0, series)
    return torch.as_tensor(running), torch.as_tensor(total)


_to_running, _to_total = _integration_matrices()


def _require_finite(nodes: np.ndarray, values: np.ndarray, name: str) -> None:
    bad = ~np.isfinite(values).all(0)
    if bad.any():
        raise ScheduleError(f"{name} is not finite (or not real) at t = {nodes[bad].min():.6g}.")


def _require_integrable(
    size: np.ndarray, width: np.ndarray, unresolved: np.ndarray, edges: np.ndarray, nodes: np.ndarray, name: str
) -> None:
    """A pole leaves a finite share of the integral in the smallest panel; a jump leaves nothing."""
    share = (size * width).max(0)
    bad = unresolved & (share > 1e-9)
    if bad.any():
        at = float(nodes[bad].mean())
        raise ScheduleError(f"{name} is singular at t = {at:.6g}; choose T (or a cutoff) that leaves it out.")
