r"""The times that a solve visits, and the variable in which it takes its steps.

A method's steps are uniform in its own variable, so that variable matters as much as the method. A
:class:`Clock` maps u in [0, 1] to the SDE's time t in [cutoff, T], with dt/du, and solvers of any equation integrate

    dx/du = drift(x, t(u)) dt/du,    and for noise  diffusion · √(dt/du).

    "angle"    phi = atan2(sigma, alpha c), c the data's scale: spreads the work evenly (the default)
    "log_snr"  -log(alpha / sigma) (the default of SDEs of many scales: coupled ones, and schedules per coordinate)
    "karras"   (sigma / alpha)^{1/7}, which sets its steps close together at the data (arXiv:2206.00364)
    "t"        t itself
    a tensor   times from cutoff to T: steps in t between exactly these

Here log(alpha / sigma) is the kernel's half_log_snr, whose rate is -g² / (2 sigma²) elementwise.

**Where the noise pauses.** A named variable w of the log-SNR stands still where g = 0, or nearly so. dt/dw is then
infinite or very large, at one time (g(0) = 0 with P0 > 0) or over a stretch, and the state moves all the same. There
u is a mixture, which never stands still,

    u ∝ w + ¼ t + ¼ log(1 + (t - cutoff) / τ),        each from 0 at the cutoff to 1 at T,

τ the time in which sigma / alpha first grows by √2. Methods that know the kernel need times alone, and no dt/du. They
cross a pause exactly, and visit the times at which w itself is uniform.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdeflow.chebyshev import PiecewiseChebyshev
from sdeflow.errors import ScheduleError
from sdeflow.kernel import Kernel

__all__ = ["GRIDS", "Clock", "Grid", "as_grid", "make_clock", "smooth_clock", "steps_of"]

GRIDS = ("angle", "log_snr", "karras", "t")

_RHO = 7.0  # of Karras et al.
_LEAST_PANEL = 1e-12  # of the panels of u
_STEEPEST = 150.0  # of dt/du relative to the horizon; that of the catalogue is at most 117 (EDM's angle)
_MISSED = 1e-6  # of the horizon
_MOST_NODES = 6_000
_INSIDE = 1e-10  # of t, relative to T
_OF_TIME = 0.25  # of t, and of its logarithm, in the mixture
_KNOTS = 1025  # of each of its parts

Grid = str | Tensor | Sequence[float] | np.ndarray | None
Curve = Callable[[float], tuple[float, float]]


class Clock:
    """The time variable of a solve, and its times.

    Args:
        cutoff: t(0).
        T: t(1).
        curve: u -> t and dt/du on [0, 1], increasing, as fast scalar functions; None for t linear in u.
        levels: u (n,) -> the times at which methods that know the kernel stop; None for ``curve``'s.
        given: times that were named one by one, rising, (n,): steps are taken in t between exactly these.
        first: the least u at which the equation is asked; above 0 where f or g is infinite at the cutoff, while
            drift · dt/du has a limit.
    """

    def __init__(
        self,
        cutoff: float,
        T: float,
        curve: Curve | None = None,
        levels: Callable[[np.ndarray], np.ndarray] | None = None,
        given: np.ndarray | None = None,
        first: float = 0.0,
    ) -> None:
        self.cutoff, self.T, self.given, self._first = cutoff, T, given, first
        self._curve, self._levels = curve, levels

    def __call__(self, u: float) -> tuple[float, float]:
        """t, never outside [cutoff, T], and dt/du."""
        u = min(max(u, self._first), 1.0)
        if self._curve is None:
            length = self.T - self.cutoff
            return min(self.cutoff + u * length, self.T), length
        t, rate = self._curve(u)
        return min(max(t, self.cutoff), self.T), rate

    def times(self, steps: int) -> np.ndarray:
        """The rising times (steps + 1,) of a solve in ``steps`` steps.

        Of given times these themselves; for another number of steps, times spread as they are.
        """
        if self.given is not None and len(self.given) == steps + 1:
            return self.given
        u = np.linspace(0.0, 1.0, steps + 1)
        times = np.array([self(v)[0] for v in u]) if self._levels is None else self._levels(u)
        times[0] = self.cutoff if self._first else times[0]
        return times


def as_grid(grid: Grid) -> str | Tensor | None:
    """``grid`` with a list or an array of times as a tensor."""
    if grid is None or isinstance(grid, str | Tensor):
        return grid
    try:
        return torch.as_tensor(grid, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)} or a tensor of times, not {grid!r}.") from error


def steps_of(grid: Grid) -> int | None:
    """How many steps the times of ``grid`` are, or None where it names no times."""
    return None if grid is None or isinstance(grid, str) else max(1, len(torch.as_tensor(grid).reshape(-1)) - 1)


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
    grid = as_grid(grid)
    if isinstance(grid, Tensor):
        return _of_times(grid, cutoff, T)
    if grid is not None and grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)} or a tensor of times, not {grid!r}.")
    if grid == "t" or (grid is None and kernel is None):
        return Clock(cutoff, T)
    if kernel is None:
        raise ValueError(f'grid="{grid}" needs a Gaussian kernel, which this SDE has not; use grid="t" or a tensor.')
    many_scales = kernel.coupled or kernel.values.shape
    variable = _Variable(kernel, grid or ("log_snr" if many_scales else "angle"), scale)
    with torch.no_grad():
        curve = variable.curve()
        if curve is not None:
            return Clock(cutoff, T, curve, first=_first(kernel, curve))
        curve = variable.mixture()
        return Clock(cutoff, T, curve, variable.levels, first=_first(kernel, curve))


def smooth_clock(times: Tensor, kernel: Kernel) -> Clock:
    """The clock in which ``times`` (n,), from the kernel's cutoff to its T or back, are uniform: a cubic through them.

    As for the names, it is a mixture for solvers that need dt/du, where the noise pauses.
    """
    points = _checked(times, kernel.cutoff, kernel.T)
    u = np.linspace(0.0, 1.0, len(points))
    curve = _Cubics.through(u, points)
    if _Variable(kernel, "log_snr", 1.0).curve() is not None:
        return Clock(kernel.cutoff, kernel.T, curve, first=_first(kernel, curve))

    def levels(u: np.ndarray) -> np.ndarray:
        return np.array([curve(v)[0] for v in u]).clip(kernel.cutoff, kernel.T)

    back = _Cubics.through(points, u)
    mixture = _mixture(kernel, lambda t: np.array([back(v) for v in t]).T, levels)
    return Clock(kernel.cutoff, kernel.T, mixture, levels, first=_first(kernel, mixture))


def _first(kernel: Kernel, curve: Curve) -> float:
    """The least u at which to ask for f and g: 0, but where they are infinite at the cutoff, which is t = 0 then."""
    at = kernel.sde_coefficients(torch.tensor(kernel.cutoff, dtype=torch.float64))
    if all(bool(torch.isfinite(value).all()) for value in at):
        return 0.0
    return next(u for u in np.geomspace(1e-9, 1.0, 28).tolist() if curve(u)[0] > _INSIDE * kernel.T)


class _Variable:
    """w(zeta) of a named grid, zeta = sigma / alpha = e^{-half_log_snr}, from 0 at the cutoff to 1 at T."""

    def __init__(self, kernel: Kernel, grid: str, scale: float) -> None:
        self._kernel, self._name = kernel, grid
        self._forward, self._back = {
            "angle": (lambda zeta: np.arctan2(zeta, scale), lambda w: (scale * np.tan(w), scale / np.cos(w) ** 2)),
            "log_snr": (np.log, lambda w: (np.exp(w), np.exp(w))),
            "karras": (lambda zeta: zeta ** (1 / _RHO), lambda w: (w**_RHO, _RHO * w ** (_RHO - 1))),
        }[grid]
        ends = kernel.half_log_snr(torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64))
        self._first, last = self._forward(np.exp(-ends.detach().numpy()))
        self._length = last - self._first

    def levels(self, u: np.ndarray) -> np.ndarray:
        """The times at which w is u; the cutoff and T themselves at its ends."""
        t = self._at(u)[0]
        return np.where(u <= 0.0, self._kernel.cutoff, np.where(u >= 1.0, self._kernel.T, t))

    def curve(self) -> Curve | None:
        """t and dt/du for u = w; None where w stands still, or nearly so, while t goes on."""
        horizon = self._kernel.T - self._kernel.cutoff

        def function(u: np.ndarray) -> np.ndarray:
            t, zeta, slope = self._at(u)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                rate = slope / (-zeta * self._kernel.half_log_snr_rate(torch.as_tensor(t)).detach().numpy())
            if not (rate <= _STEEPEST * horizon).all():
                raise ScheduleError("the log-SNR stands still.")
            return np.stack([t, rate])

        try:
            table = PiecewiseChebyshev.fit(function, self._panels(), name=f"grid {self._name}")
        except ScheduleError:
            return None
        jumped = abs(_integral(table, 1) / horizon - 1.0)  # of a pause that no u falls in, dt/du knows nothing
        return _Series(table) if jumped <= _MISSED else None

    def _panels(self) -> np.ndarray:
        """Edges in u to start from: the break points of f and g among them, where dt/du jumps or has a kink."""
        even, breaks = np.linspace(0.0, 1.0, 9), np.asarray(self._kernel.numbers.breaks, dtype=np.float64)
        inside = breaks[(breaks > self._kernel.cutoff) & (breaks < self._kernel.T)]
        if not len(inside):
            return even
        zeta = np.exp(-self._kernel.half_log_snr(torch.as_tensor(inside)).detach().numpy())
        edges = np.union1d(even, ((self._forward(zeta) - self._first) / self._length).clip(0.0, 1.0))
        return edges[np.append(edges[1:] - edges[:-1] > _LEAST_PANEL, True)]

    def mixture(self) -> Curve:
        """t and dt/du of the mixture with t."""

        def of_time(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            at = torch.as_tensor(t)
            zeta = np.exp(-self._kernel.half_log_snr(at).detach().numpy())
            w = self._forward(zeta)
            rate = -zeta * self._kernel.half_log_snr_rate(at).detach().numpy() / self._back(w)[1]
            return (w - self._first) / self._length, rate / self._length

        return _mixture(self._kernel, of_time, self.levels)

    def _at(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """t, zeta, and dzeta/du where w is u."""
        zeta, slope = self._back(self._first + self._length * u)
        t = self._kernel.time_of(torch.as_tensor(-np.log(zeta))).detach().numpy()
        return t, zeta, slope * self._length


def _mixture(
    kernel: Kernel,
    of_time: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    levels: Callable[[np.ndarray], np.ndarray],
) -> Curve:
    """t and dt/du of u ∝ w + ¼ t + ¼ log(1 + (t - cutoff) / τ), a monotone cubic through many times.

    Args:
        kernel: the kernel.
        of_time: w, from 0 at the cutoff to 1 at T, and dw/dt.
        levels: times at which w takes given values.
    """
    cutoff, horizon = kernel.cutoff, kernel.T - kernel.cutoff
    grown = kernel.half_log_snr(cutoff).detach() - 0.5 * math.log(2.0)
    onset = max(float(kernel.time_of(grown)) - cutoff, 1e-12 * horizon)
    share, most = np.linspace(0.0, 1.0, _KNOTS), math.log1p(horizon / onset)

    def mixed(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (w, rate), passed = of_time(t), t - cutoff
        u = w + _OF_TIME * (passed / horizon + np.log1p(passed / onset) / most)
        rate = rate + _OF_TIME * (1.0 / horizon + 1.0 / ((onset + passed) * most))
        return u / (1.0 + 2.0 * _OF_TIME), rate / (1.0 + 2.0 * _OF_TIME)

    knots = [cutoff + horizon * share, cutoff + onset * np.expm1(most * share), levels(share)]
    t = np.unique(np.concatenate(knots).clip(cutoff, kernel.T))
    u, rate = mixed(t)
    u, apart = np.unique(np.maximum.accumulate(u).clip(0.0, 1.0).round(10), return_index=True)
    apart[-1] = len(t) - 1
    u[0], u[-1] = 0.0, 1.0
    cubics = _Cubics(u, t[apart], 1.0 / rate[apart])
    return _refined(cubics, mixed, kernel.T) or cubics


def _refined(
    rough: _Cubics, of_time: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], T: float
) -> _Series | None:
    """t and dt/du to rounding by Newton's steps from ``rough``, where few panels hold them; else None.

    At kinks of the schedule, which no series holds, cubics do; elsewhere tight tolerances would see theirs.
    """
    left = _MOST_NODES

    def function(u: np.ndarray) -> np.ndarray:
        nonlocal left
        left -= len(u)
        t = np.array([rough(v)[0] for v in u])
        for _ in range(5):
            found, rate = of_time(t)
            t = (t - (found - u) / rate).clip(rough(0.0)[0], T)
        found, rate = of_time(t)
        if left < 0 or not (np.abs(found - u) < 1e-12).all():
            raise ScheduleError("t has kinks.")
        return np.stack([t, 1.0 / rate])

    try:
        return _Series(PiecewiseChebyshev.fit(function, np.linspace(0.0, 1.0, 9), name="the grid"))
    except ScheduleError:
        return None


class _Series:
    """t and dt/du by an interpolant with these rows."""

    def __init__(self, table: PiecewiseChebyshev) -> None:
        self._edges, self._coefficients = table.edges.tolist(), table.coefficients
        self._orders = np.arange(table.coefficients.shape[-1])

    def __call__(self, u: float) -> tuple[float, float]:
        panel = min(max(bisect_right(self._edges, u) - 1, 0), len(self._edges) - 2)
        left, right = self._edges[panel], self._edges[panel + 1]
        v = min(max((2.0 * u - left - right) / (right - left), -1.0), 1.0)
        basis = np.cos(self._orders * math.acos(v))
        t, rate = self._coefficients[:, panel] @ basis
        return float(t), float(rate)


class _Cubics:
    """t and dt/du by the cubics with these values and slopes at u; slopes too large for a monotone one are cut."""

    def __init__(self, u: np.ndarray, t: np.ndarray, slope: np.ndarray) -> None:
        h, secant = np.diff(u), np.diff(t) / np.diff(u)
        least = np.minimum(np.append(secant, secant[-1]), np.insert(secant, 0, secant[0]))
        slope = np.clip(slope, 0.0, 3.0 * least)  # Fritsch and Carlson
        first, last = slope[:-1], slope[1:]
        pieces = (first + last - 2.0 * secant) / h**2, (3.0 * secant - 2.0 * first - last) / h, first, t[:-1]
        self._edges, self._pieces = u.tolist(), np.stack(pieces, axis=1).tolist()

    @classmethod
    def through(cls, u: np.ndarray, t: np.ndarray) -> _Cubics:
        """With slopes found from the points."""
        from scipy.interpolate import PchipInterpolator  # half a second to import

        return cls(u, t, np.diff(t)[[0, 0]] / np.diff(u) if len(u) == 2 else PchipInterpolator(u, t).derivative()(u))

    def __call__(self, u: float) -> tuple[float, float]:
        piece = min(max(bisect_right(self._edges, u) - 1, 0), len(self._pieces) - 1)
        v, (a, b, c, d) = u - self._edges[piece], self._pieces[piece]
        return ((a * v + b) * v + c) * v + d, (3.0 * a * v + 2.0 * b) * v + c


def _integral(table: PiecewiseChebyshev, row: int) -> float:
    """∫ of a row over all panels."""
    even = np.arange(0, table.coefficients.shape[-1], 2)
    mass = table.coefficients[row][:, ::2] @ (1.0 / (1.0 - even**2))  # of the unit interval
    return float(mass @ np.diff(table.edges))


def _of_times(times: Tensor, cutoff: float, T: float) -> Clock:
    points = _checked(times, cutoff, T)
    return Clock(cutoff, T, _Cubics.through(np.linspace(0.0, 1.0, len(points)), points), given=points)


def _checked(times: Tensor, cutoff: float, T: float) -> np.ndarray:
    """Times as a rising array from cutoff to T."""
    points = times.detach().cpu().to(torch.float64).numpy().reshape(-1)
    points = points[::-1].copy() if len(points) > 1 and points[0] > points[-1] else points.copy()
    if len(points) < 2 or not np.isfinite(points).all() or (np.diff(points) <= 0).any():
        raise ValueError("a grid of times needs at least two different, finite times, which rise or fall.")
    if abs(points[0] - cutoff) > 1e-6 * max(cutoff, 1e-3 * T) or abs(points[-1] - T) > 1e-6 * T:
        raise ValueError(
            f"a grid of times must run from cutoff = {cutoff:.8g} to T = {T:g}, "
            f"not from {points[0]:.8g} to {points[-1]:g}."
        )
    points[0], points[-1] = cutoff, T
    return points
