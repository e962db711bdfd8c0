r"""The time variable in which torchsde and torchdiffeq integrate.

A method's steps are uniform in its own variable, so that variable matters as much as the method. A
:class:`Clock` maps u in [0, 1] to the SDE's time t in [cutoff, T], with dt/du, and solvers integrate

    dx/du = drift(x, t(u)) dt/du,    and for noise  diffusion · √(dt/du).

    "angle"    phi = atan2(sigma, alpha c), c the data's scale: spreads the work evenly (the default)
    "log_snr"  -log(alpha / sigma) (the default of SDEs of many scales: coupled ones, and schedules per coordinate)
    "karras"   (sigma / alpha)^{1/7}, which sets its steps close together at the data (arXiv:2206.00364)
    "t"        t itself
    a tensor   times from cutoff to T, joined by a monotone cubic, so that uniform steps in u visit them

Here log(alpha / sigma) is the kernel's half_log_snr, whose rate is -g² / (2 sigma²) elementwise.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sdeflow.chebyshev import PiecewiseChebyshev
from sdeflow.errors import ScheduleError
from sdeflow.kernel import Kernel

__all__ = ["GRIDS", "Clock", "Grid", "make_clock"]

GRIDS = ("angle", "log_snr", "karras", "t")

_RHO = 7.0  # of Karras et al.

Grid = str | Tensor | None


class Clock:
    """t(u) and dt/du on [0, 1], increasing, as fast scalar functions.

    Args:
        cutoff: t(0).
        T: t(1).
        table: an interpolant with rows t and dt/du, or None for t linear in u.
    """

    def __init__(self, cutoff: float, T: float, table: PiecewiseChebyshev | None = None) -> None:
        self.cutoff, self.T = cutoff, T
        self._table = table
        if table is not None:
            self._edges = table.edges.tolist()
            self._orders = np.arange(table.coefficients.shape[-1])

    def __call__(self, u: float) -> tuple[float, float]:
        """t, never outside [cutoff, T], and dt/du."""
        u = min(max(u, 0.0), 1.0)
        if self._table is None:
            length = self.T - self.cutoff
            return self.cutoff + u * length, length
        panel = min(max(bisect_right(self._edges, u) - 1, 0), len(self._edges) - 2)
        left, right = self._edges[panel], self._edges[panel + 1]
        v = min(max((2.0 * u - left - right) / (right - left), -1.0), 1.0)
        basis = np.cos(self._orders * math.acos(v))
        t, rate = self._table.coefficients[:, panel] @ basis
        return min(max(float(t), self.cutoff), self.T), float(rate)


def make_clock(grid: Grid, kernel: Kernel | None, cutoff: float, T: float, scale: float = 1.0) -> Clock:
    """The clock for ``grid``; None takes the angle, log_snr for an SDE of many scales, and t without a kernel.

    Args:
        grid: a name, a tensor of times, or None.
        kernel: the SDE's kernel, or None.
        cutoff: the first time.
        T: the last time.
        scale: the data's scale c, for the angle.

    Raises:
        ValueError: for an unknown name, one that this SDE has not, or times that do not run from cutoff to T.
    """
    if isinstance(grid, Tensor):
        return _through(grid, cutoff, T)
    if grid is not None and not (isinstance(grid, str) and grid in GRIDS):
        raise ValueError(f"grid must be one of {', '.join(GRIDS)} or a tensor of times, not {grid!r}.")
    if grid == "t" or (grid is None and kernel is None):
        return Clock(cutoff, T)
    if kernel is None:
        raise ValueError(f'grid="{grid}" needs a Gaussian kernel, which this SDE has not; use grid="t" or a tensor.')
    many_scales = kernel.coupled or kernel.values.shape
    chosen = grid or ("log_snr" if many_scales else "angle")
    try:
        with torch.no_grad():
            function = _clock(kernel, chosen, scale)
            table = PiecewiseChebyshev.fit(function, np.linspace(0.0, 1.0, 9), name=f"grid {chosen}")
        return Clock(cutoff, T, table)
    except ScheduleError as error:
        if grid is None:  # g vanishes somewhere, the log-SNR stands still, and t runs through it as an infinite rate
            return Clock(cutoff, T)
        raise ValueError(f'grid="{grid}" does not exist for this SDE ({error}); use grid="t".') from error


def _clock(kernel: Kernel, grid: str, scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """u -> t and dt/du, where w(zeta) is linear in u, zeta = sigma / alpha = e^{-half_log_snr}."""
    forward, back = {
        "angle": (lambda zeta: np.arctan2(zeta, scale), lambda w: (scale * np.tan(w), scale / np.cos(w) ** 2)),
        "log_snr": (np.log, lambda w: (np.exp(w), np.exp(w))),
        "karras": (lambda zeta: zeta ** (1 / _RHO), lambda w: (w**_RHO, _RHO * w ** (_RHO - 1))),
    }[grid]
    ends = kernel.half_log_snr(torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64))
    first, last = forward(np.exp(-ends.numpy()))

    def function(u: np.ndarray) -> np.ndarray:
        zeta, slope = back(first + (last - first) * u)  # zeta and dzeta/dw
        t = kernel.time_of(torch.as_tensor(-np.log(zeta)))
        return np.stack([t.numpy(), (last - first) * slope / (-zeta * kernel.half_log_snr_rate(t).numpy())])

    return function


def _through(times: Tensor, cutoff: float, T: float) -> Clock:
    points = np.sort(times.detach().cpu().to(torch.float64).numpy().reshape(-1))
    if len(points) < 2 or not np.isfinite(points).all() or (np.diff(points) <= 0).any():
        raise ValueError("a grid of times needs at least two different, finite times.")
    if abs(points[0] - cutoff) > 1e-6 * max(cutoff, 1e-3 * T) or abs(points[-1] - T) > 1e-6 * T:
        raise ValueError(
            f"a grid of times must run from cutoff = {cutoff:.8g} to T = {T:g}, "
            f"not from {points[0]:.8g} to {points[-1]:g}."
        )
    points[0], points[-1] = cutoff, T
    if len(points) == 2:
        return Clock(cutoff, T)
    from scipy.interpolate import PchipInterpolator  # half a second to import

    u = np.linspace(0.0, 1.0, len(points))
    curve = PchipInterpolator(u, points)
    slope = curve.derivative()
    return Clock(cutoff, T, PiecewiseChebyshev.fit(lambda v: np.stack([curve(v), slope(v)]), u, name="the grid"))
