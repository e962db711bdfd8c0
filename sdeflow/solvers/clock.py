r"""The times that a solve visits, and the variable in which it takes its steps.

A :class:`Clock` maps u in [0, 1] to the SDE's time t in [cutoff, T], with dt/du, and solvers of any equation integrate

    dx/du = drift(x, t(u)) dt/du,    and for noise  diffusion · √(dt/du).

    "angle"    phi = atan2(sigma, alpha c), c the data's scale: spreads the work evenly (the default)
    "log_snr"  -log(alpha / sigma), compressed beyond 10^4 c (the default of coupled SDEs and schedules per coordinate)
    "karras"   (sigma / alpha)^{1/7}, which sets its steps close together at the data (arXiv:2206.00364)
    "t"        t itself
    a tensor   times from cutoff to T: steps in t between exactly these

The page :doc:`theory_solvers` says what happens where the noise pauses, and where f or g jumps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import DataError, ScheduleError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.numerics.chebyshev import PiecewiseChebyshev
from sdeflow.numerics.checks import checked_numbers, checked_real
from sdeflow.solvers.resolution import Plain, require_given, require_plain, require_resolved
from sdeflow.solvers.schemes import Scheme

__all__ = ["GRIDS", "Clock", "Grid", "as_grid", "make_clock", "smooth_clock", "steps_of"]

GRIDS = ("angle", "log_snr", "karras", "t")

_RHO = 7.0  # of Karras et al.
_LEAST_PANEL = 1e-12  # of the panels of u
_STEEPEST = 150.0  # of dt/du relative to the horizon; that of the catalogue is at most 117 (EDM's angle)
_STEEPEST_COUPLED = 6.0  # of it for a coupled state, which moves on while the log-SNR of its data hardly does
_STEEPEST_WITH_DRIFT = 10.0  # of it where the data is not yet noise, and the drift moves it:
_MOST_DRIFT = 10.0  # of the logarithm of the state, per u
_MISSED = 1e-6  # of the horizon
_MOST_NODES = 6_000
_BESIDE = 1e-13  # of the horizon, from a break point
_BESIDE_NODE = 1e-7  # of a step
_INSIDE = 1e-10  # of t, relative to T
_OF_TIME = 0.25  # of t, and of its logarithm, in the mixture
_FAR = math.log(1e4)  # of sigma / alpha relative to the data's scale: from here on "log_snr" is compressed
_MOST_RESTARTS = 32  # break points at which adaptive methods begin anew
_KNOTS = 1025  # of each of its parts
_SAME = 5e-14  # of the horizon: a given time this close to a break point is that point, rounded

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
        breaks: times at which f or g is not smooth, rising: those inside, and the cutoff if it is one.
        stops: such times, and u there as ``levels`` has it, which are times of every grid with enough steps.
        normalised: u -> t and ζ ζ'/(c² + ζ²), for methods that carry u / √(alpha² c² + sigma²); None without.
        check: of rising times, and the method that visits them if it does not know the kernel; raises where they cannot
            do, and warns where they hardly can.
        name: what it is uniform in, or the times that were given.
    """

    def __init__(
        self,
        cutoff: float,
        T: float,
        curve: Curve | None = None,
        levels: Callable[[np.ndarray], np.ndarray] | None = None,
        given: np.ndarray | None = None,
        first: float = 0.0,
        breaks: np.ndarray | None = None,
        stops: tuple[np.ndarray, np.ndarray] | None = None,
        normalised: Curve | None = None,
        check: Callable[[np.ndarray, Plain | None], None] | None = None,
        name: str | Tensor = "t",
    ) -> None:
        self.name = name
        self.cutoff, self.T, self.given, self._first = cutoff, T, given, first
        self._curve, self._levels = curve, levels
        self._breaks, self._stops, self.normalised, self._check = breaks, stops, normalised, check
        self._split: int | None = None

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
        stops = None if self._stops is None else _shared(self._stops[1], steps)
        if stops is not None:
            u, fixed = stops
        times = np.array([self(v)[0] for v in u]) if self._levels is None else self._levels(u)
        times[0] = self.cutoff if self._first else times[0]
        if self._stops is not None and stops is not None:
            times[fixed] = self._stops[0]
        if self._check is not None:
            self._check(times, None)
        return times

    def splitting(self, steps: int) -> Clock:
        """The same, for solves that tell the error of one in ``steps`` steps: a multiple of these splits each of them.

        Else a pause that takes one step on both grids spoils both alike. Nothing is warned of.
        """
        clock = copy(self)
        clock._split, clock._check = steps, None
        return clock

    def nodes(
        self, steps: int, order: int, stochastic: bool, backward: bool, scheme: Scheme | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """u (steps + 1,) between which methods of any equation step, and at which numbers the break points are; None
        for even steps, where there are no break points, or too many. Of the method see
        :class:`~sdeflow.solvers.resolution.Plain`."""
        parts = 1 if self._split is None or steps % self._split else steps // self._split
        shared = _shared(np.array([u for u, _ in self.breaks]), steps // parts) if self.breaks else None
        u, fixed = shared or (np.linspace(0.0, 1.0, steps // parts + 1), None)
        if parts > 1:
            u = np.interp(np.arange(steps + 1) / parts, np.arange(len(u)), u)
            fixed = None if fixed is None else parts * fixed
        if self._check is not None:
            stages = partial(self._stages, u[::-1] if backward else u)
            restarts = frozenset([] if fixed is None else (steps - fixed if backward else fixed).tolist())
            plain = Plain(order, stochastic, backward, scheme, restarts, stages)
            self._check(np.array([self(v)[0] for v in u]), plain)
        return u, fixed

    def check_given(self, times: np.ndarray, stochastic: bool, backward: bool, scheme: Scheme | None) -> None:
        """Warns where steps in t between ``times`` that were given, rising, cannot serve; see :meth:`nodes`."""
        if self._check is None or scheme is None:
            return
        ends, fixed = (times[::-1] if backward else times), np.flatnonzero(np.isin(times, self.given_breaks))
        restarts = frozenset((len(times) - 1 - fixed if backward else fixed).tolist())

        def stages(places: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
            at = ends[:-1] + np.clip(places, _BESIDE_NODE, 1.0 - _BESIDE_NODE)[:, None] * np.diff(ends)
            return at, np.abs(np.diff(ends)) + np.zeros_like(at)

        self._check(times, Plain(scheme.order, stochastic, backward, scheme, restarts, stages))

    def _stages(self, u: np.ndarray, places: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
        """t and |dt/dr|, (len(places), steps), at places in the steps from each u to the next, of length 1 in r.

        Ends of a step are taken from inside it, where f or g may jump at them.
        """
        inside = np.clip(places, _BESIDE_NODE, 1.0 - _BESIDE_NODE)[:, None]
        at, length = u[:-1] + inside * np.diff(u), np.abs(np.diff(u))
        t, rate = np.array([self(v) for v in at.ravel().tolist()]).T.reshape(2, *at.shape)
        return t, rate * length

    def since_stop(self, times: np.ndarray) -> np.ndarray:
        """How many of ``times`` of a solve lie between each one and the stop before it, both included: a polynomial
        through values on both sides of a stop would have a kink."""
        count = np.arange(1, len(times) + 1)
        if self._stops is None:
            return count
        at = np.isin(times, self._stops[0])
        return count - np.maximum.accumulate(np.where(at, count - 1, 0))

    @cached_property
    def given_breaks(self) -> np.ndarray:
        """Those of the given times at which f or g is not smooth: a step that ends there takes them from before it."""
        if self.given is None or self._breaks is None or not len(self._breaks):
            return np.zeros(0)
        inner = self.given[1:-1]
        return inner[np.abs(inner[:, None] - self._breaks).min(1) <= _SAME * (self.T - self.cutoff)]

    @cached_property
    def starts_at_break(self) -> bool:
        """Whether the cutoff is a break point: f and g are taken from after it there."""
        near = _SAME * (self.T - self.cutoff)
        return self._breaks is not None and bool((np.abs(self._breaks - self.cutoff) <= near).any())

    @cached_property
    def breaks(self) -> tuple[tuple[float, float], ...]:
        """(u, t) of each break point, rising: none where they are too many to begin anew at each."""
        times = np.zeros(0) if self._breaks is None else self._breaks
        times = times[(times > self.cutoff) & (times < self.T)]
        if len(times) > _MOST_RESTARTS:
            return ()
        found = []
        for t in times.tolist():
            low, high = self._first, 1.0
            for _ in range(60):
                middle = 0.5 * (low + high)
                low, high = (middle, high) if self(middle)[0] < t else (low, middle)
            found.append((high, t))
        return tuple(found)


def as_grid(grid: Grid) -> str | Tensor | None:
    """``grid`` with a list or an array of times as a tensor."""
    if grid is None or isinstance(grid, str | Tensor):
        return grid
    try:
        return checked_numbers(grid, "grid")
    except DataError as error:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)} or a tensor of times, not {grid!r}.") from error


def steps_of(grid: Grid) -> int | None:
    """How many steps the times of ``grid`` are, or None where it names no times."""
    return None if grid is None or isinstance(grid, str) else max(1, len(torch.as_tensor(grid).reshape(-1)) - 1)


def make_clock(
    grid: Grid, kernel: Kernel | None, cutoff: float, T: float, scale: float = 1.0, breaks: np.ndarray | None = None
) -> Clock:
    """The clock for ``grid``; None takes the angle, log_snr for an SDE of many scales, and t without a kernel.

    Args:
        grid: a name, a tensor of times, or None.
        kernel: the SDE's kernel, or None.
        cutoff: the first time.
        T: the last time.
        scale: the data's scale c, for the angle.
        breaks: times at which f or g is not smooth, where there is no kernel to say so.

    Raises:
        ValueError: for an unknown name, one that this SDE has not, or times that do not run from cutoff to T.
    """
    grid = as_grid(grid)
    breaks = None if breaks is None else checked_numbers(breaks, "breaks").detach().cpu().numpy()
    if isinstance(grid, Tensor):
        points = _checked(grid, cutoff, T)
        through = _Cubics.through(np.linspace(0.0, 1.0, len(points)), points)
        of_given = None if kernel is None or kernel.values.shape else partial(require_given, kernel, scale)
        every = breaks if kernel is None else _all_breaks(kernel)
        return Clock(cutoff, T, through, given=points, breaks=every, check=of_given, name=torch.as_tensor(points))
    if grid is not None and grid not in GRIDS and grid != "pilot":
        names = f"one of {', '.join(GRIDS)}, pilot" if kernel is not None else '"t" (all that this SDE has)'
        raise ValueError(f"grid must be {names} or a tensor of times, not {grid!r}.")
    if grid == "t" or (grid is None and kernel is None):
        if kernel is None:
            return Clock(cutoff, T, breaks=breaks)
        return Clock(cutoff, T, breaks=_all_breaks(kernel), check=partial(require_resolved, kernel, scale))
    if kernel is None:
        raise ValueError(f'grid="{grid}" needs a Gaussian kernel, which this SDE has not; use grid="t" or a tensor.')
    if grid == "pilot":
        raise ValueError(f'grid="pilot" goes with an exponential solver: name one of {", ".join(GRIDS)} here.')
    checked_real(scale, "scale", "positive and finite", lambda number: 0.0 < number < math.inf)
    many_scales = _many_scales(kernel)
    variable = _Variable(kernel, grid or ("log_snr" if many_scales else "angle"), scale)
    with torch.no_grad():
        curve = variable.curve()
        levels = variable.levels if curve is None else None
        where = variable.normalised(curve)
        curve = variable.mixture() if curve is None else curve
        breaks = _breaks(kernel)
        stops = (breaks, variable.of_time(breaks)[0]) if many_scales and len(breaks) else None
        normalised, first = None if many_scales else where, _first(kernel, curve)
        check = _check(kernel, variable.name, scale)
        every = _all_breaks(kernel)
        return Clock(cutoff, T, curve, levels, None, first, every, stops, normalised, check, variable.name)


def _breaks(kernel: Kernel) -> np.ndarray:
    """The break points of f and g between the cutoff and T."""
    breaks = _all_breaks(kernel)
    return breaks[(breaks > kernel.cutoff) & (breaks < kernel.T)]


def _all_breaks(kernel: Kernel) -> np.ndarray:
    """The break points of f and g on the whole horizon, the cutoff too if it is one."""
    return np.asarray(kernel.numbers.breaks, dtype=np.float64)


def _shared(stops: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray] | None:
    """u of ``steps`` steps, as even as can be, ``stops`` (n,) among them, and at which numbers; None for too few steps.

    Between two stops that coincide, as the ends of a pause do, is one step.
    """
    ends = np.concatenate([[0.0], stops, [1.0]])
    lengths = np.maximum.accumulate(ends)[1:] - np.maximum.accumulate(ends)[:-1]
    if 2 * len(lengths) > steps:
        return None
    counts = np.ones(len(lengths), dtype=int)
    for _ in range(steps - len(lengths)):
        counts[np.argmax(lengths / counts)] += 1
    pieces = [np.linspace(a, b, n + 1)[:-1] for a, b, n in zip(ends[:-1], ends[1:], counts, strict=True)]
    return np.append(np.concatenate(pieces), 1.0), np.cumsum(counts)[:-1]


def smooth_clock(times: Tensor, kernel: Kernel, name: str, scale: float = 1.0) -> Clock:
    """The clock in which ``times`` (n,), from the kernel's cutoff to its T or back, are uniform: a cubic through them.

    Where the noise pauses it is a mixture for solvers that need dt/du, as for the named grids. Its slope may jump at
    break points of f and g.

    Args:
        times: rising or falling.
        kernel: the kernel.
        name: of the grid, for messages.
        scale: the data's scale c.
    """
    points = _checked(times, kernel.cutoff, kernel.T)
    u, breaks = np.linspace(0.0, 1.0, len(points)), _breaks(kernel)
    through, corners = _Cubics.through(u, points), _corners(kernel, points, u)
    at = corners[1][np.isin(corners[0], breaks)]
    stops = (breaks, at) if _many_scales(kernel) and 0 < len(breaks) == len(at) else None
    check = _check(kernel, name, scale)
    every = _all_breaks(kernel)
    clock = partial(Clock, kernel.cutoff, kernel.T, breaks=every, stops=stops, check=check, name=name)
    if _Variable(kernel, "log_snr", 1.0).curve() is not None:
        curve = _Cubics.through(*corners[::-1], at)
        return clock(curve, first=_first(kernel, curve))

    def levels(u: np.ndarray) -> np.ndarray:
        return np.array([through(v)[0] for v in u]).clip(kernel.cutoff, kernel.T)

    back = _Cubics.through(*corners, breaks)
    mixture = _mixture(kernel, lambda t: np.array([back(v) for v in t]).T, levels)
    return clock(mixture, levels, first=_first(kernel, mixture))


def _corners(kernel: Kernel, times: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``times`` with the break points among them, and ``u`` there: by the log-SNR, between the times beside each."""
    breaks = np.setdiff1d(_breaks(kernel), times)
    level, at = (-kernel.bounded_log_snr(torch.as_tensor(t)).detach().numpy() for t in (times, breaks))
    between = np.interp(at, np.maximum.accumulate(level), u)
    order = np.argsort(np.concatenate([times, breaks]))
    t, u = np.concatenate([times, breaks])[order], np.concatenate([u, between])[order]
    apart = np.append(np.diff(t) > 1e-12 * t[-1], True)
    apart[0] = True
    return t[apart], np.maximum.accumulate(u[apart])


def _many_scales(kernel: Kernel) -> bool:
    """Whether components or coordinates have schedules of their own."""
    return bool(kernel.coupled or kernel.values.shape)


def _check(kernel: Kernel, name: str, scale: float) -> Callable[[np.ndarray, Plain | None], None] | None:
    """What is asked of the times of a grid; nothing where coordinates have schedules of their own."""
    return None if kernel.values.shape else partial(require_plain, kernel, name, scale)


def _first(kernel: Kernel, curve: Curve) -> float:
    """The least u at which to ask for f and g: 0, but where they are infinite at the cutoff, which is t = 0 then."""
    at = kernel.sde_coefficients(torch.tensor(kernel.cutoff, dtype=torch.float64))
    if all(bool(torch.isfinite(value).all()) for value in at):
        return 0.0
    return next(u for u in np.geomspace(1e-9, 1.0, 28).tolist() if curve(u)[0] > _INSIDE * kernel.T)


class _Variable:
    """w(v) of a named grid, v = log(sigma / alpha) = -half_log_snr, from 0 at the cutoff to 1 at T."""

    def __init__(self, kernel: Kernel, grid: str, scale: float) -> None:
        self._kernel, self.name, self._scale = kernel, grid, scale
        c = math.log(scale)
        far = math.inf if kernel.coupled or kernel.values.shape else c + _FAR
        self._forward, self._back = {
            "angle": (lambda v: np.arctan(np.exp(v - c)), lambda w: (c + np.log(np.tan(w)), 2.0 / np.sin(2.0 * w))),
            "log_snr": (lambda v: _compressed(v, far), lambda w: _expanded(w, far)),
            "karras": (
                lambda v: np.exp(_compressed(v, far) / _RHO),
                lambda w: _expanded(_RHO * np.log(w), far, _RHO / w),
            ),
        }[grid]
        self._kinks = [far] if grid in ("log_snr", "karras") and far < math.inf else []
        self._first, last = self._forward(self._at_time(np.array([kernel.cutoff, kernel.T])))
        self._length = last - self._first

    def _at_time(self, t: np.ndarray) -> np.ndarray:
        return -self._kernel.bounded_log_snr(torch.as_tensor(t)).detach().numpy()

    def levels(self, u: np.ndarray) -> np.ndarray:
        """The times at which w is u; the cutoff and T themselves at its ends."""
        t = self._at(u)[0]
        return np.where(u <= 0.0, self._kernel.cutoff, np.where(u >= 1.0, self._kernel.T, t))

    def curve(self) -> Curve | None:
        """t and dt/du for u = w; None where w stands still, or nearly so, while t goes on."""
        horizon = self._kernel.T - self._kernel.cutoff
        steepest = _STEEPEST_COUPLED if self._kernel.coupled else _STEEPEST

        def rate_at(t: np.ndarray, slope: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                return slope / -self._kernel.half_log_snr_rate(torch.as_tensor(t)).detach().numpy()

        def function(u: np.ndarray) -> np.ndarray:
            t, v, slope = self._at(u)
            rate = rate_at(t, slope)
            with np.errstate(invalid="ignore"):
                moved = self._drift_rate(t, v) * rate > _MOST_DRIFT
            jumped_over = moved & (rate > _STEEPEST_WITH_DRIFT * horizon)
            if jumped_over.any() or not (rate <= steepest * horizon).all():
                raise ScheduleError("the log-SNR stands still.")
            return np.stack([t, rate])

        def rounding(u: np.ndarray, values: np.ndarray) -> np.ndarray:
            """What the last digits of t change of dt/du: near the end of a path into noise they are those of 1 - t."""
            t, rate = values
            beside = rate_at(t - 4.0 * np.spacing(t), self._back(self._first + self._length * u)[1] * self._length)
            return np.stack([np.zeros_like(t), np.abs(beside - rate)])

        try:
            table = PiecewiseChebyshev.fit(function, self._panels(), rounding=rounding, name=f"grid {self.name}")
        except ScheduleError:
            return None
        jumped = abs(_integral(table, 1) / horizon - 1.0)  # of a pause that no u falls in, dt/du knows nothing
        return _Series(table) if jumped <= _MISSED else None

    def _drift_rate(self, t: np.ndarray, v: np.ndarray) -> np.ndarray:
        """What f moves at each time that noise does not make up for.

        |a| beside the data; where the data is noise, as after a pulse of g, the rate at which the flow contracts it,
        -a - ½ g² / S² with S² = alpha² c² + sigma².
        """
        a, _, gram = (part.detach() for part in self._kernel.sde_coefficients(torch.as_tensor(t)))
        beside_data = a.abs().reshape(len(t), -1).amax(1).numpy()
        if self._kernel.coupled or self._kernel.values.shape:
            return np.where(v < math.log(self._scale), beside_data, 0.0)
        alpha, sigma, _ = (part.detach() for part in self._kernel.coefficients(torch.as_tensor(t)))
        contracts = -a - 0.5 * gram / ((alpha * self._scale).square() + sigma.square())
        return np.where(v < math.log(self._scale), beside_data, contracts.numpy())

    def normalised(self, curve: Curve | None) -> Curve:
        """t, by ``curve`` where there is one, and ζ ζ'/(c² + ζ²) = v' / (1 + c²/ζ²), for u = w."""

        def function(u: float) -> tuple[float, float]:
            u = min(max(u, 0.0), 1.0)
            v, slope = self._back(np.float64(self._first + self._length * u))
            t = float(self.levels(np.array([u]))[0]) if curve is None else curve(u)[0]
            t = min(max(t, self._kernel.cutoff), self._kernel.T)
            return t, float(slope * self._length / (1.0 + self._scale**2 * np.exp(-2.0 * v)))

        return function

    def _panels(self) -> np.ndarray:
        """Edges in u to start from: the break points of f and g, and where compression begins: dt/du has a kink there.

        At a break point it may jump too.
        """
        levels = np.append(self._at_time(_breaks(self._kernel)), self._kinks)
        edges = ((self._forward(levels) - self._first) / self._length).clip(0.0, 1.0)
        edges = np.union1d(np.linspace(0.0, 1.0, 9), edges)
        return edges[np.append(edges[1:] - edges[:-1] > _LEAST_PANEL, True)]

    def mixture(self) -> Curve:
        """t and dt/du of the mixture with t."""
        return _mixture(self._kernel, self.of_time, self.levels)

    def of_time(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """w and dw/dt; nothing moves once x_0 is forgotten."""
        level, rate = self._kernel.bounded_log_snr_and_rate(torch.as_tensor(t))
        w = self._forward(-level.detach().numpy())
        return (w - self._first) / self._length, -rate.detach().numpy() / self._back(w)[1] / self._length

    def _at(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """t, v, and dv/du where w is u."""
        v, slope = self._back(self._first + self._length * u)
        t = self._kernel.time_of(torch.as_tensor(-v)).detach().numpy()
        return t, v, slope * self._length


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

    breaks = _breaks(kernel)
    knots = [cutoff + horizon * share, cutoff + onset * np.expm1(most * share), levels(share), breaks]
    t = np.unique(np.concatenate(knots).clip(cutoff, kernel.T))
    u, _ = mixed(t)
    u, apart = np.unique(np.maximum.accumulate(u).clip(0.0, 1.0).round(10), return_index=True)
    apart[-1] = len(t) - 1
    u[0], u[-1] = 0.0, 1.0
    t = t[apart]
    beside = (mixed((t + side).clip(cutoff, kernel.T))[1] for side in (_BESIDE * horizon, -_BESIDE * horizon))
    cubics = _Cubics(u, t, *(1.0 / rate for rate in beside))  # at break points the slopes of either side differ
    edges = np.union1d(np.linspace(0.0, 1.0, 9), mixed(breaks)[0] if len(breaks) else []).clip(0.0, 1.0)
    edges = edges[np.append(np.diff(edges) > _LEAST_PANEL, True)]
    return _refined(cubics, mixed, edges, kernel.T) or cubics


def _refined(
    rough: _Cubics, of_time: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], edges: np.ndarray, T: float
) -> _Series | None:
    """t and dt/du to rounding by Newton's steps from ``rough``, where few panels hold them; else None.

    At kinks of the schedule, which no series holds, cubics do; elsewhere tight tolerances would see theirs.
    """
    left = _MOST_NODES

    def function(u: np.ndarray) -> np.ndarray:
        nonlocal left
        left -= len(u)
        t = np.array([rough(v)[0] for v in u])
        found, rate = of_time(t)
        for _ in range(5):
            if (np.abs(found - u) < 1e-15).all():
                break
            t = (t - (found - u) / rate).clip(rough(0.0)[0], T)
            found, rate = of_time(t)
        if left < 0 or not (np.abs(found - u) < 1e-12).all():
            raise ScheduleError("t has kinks.")
        return np.stack([t, 1.0 / rate])

    try:
        return _Series(PiecewiseChebyshev.fit(function, edges, name="the grid"))
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
    """t and dt/du by the cubics with these values, and slopes to the right and left, at u; slopes too large for a
    monotone one are cut."""

    def __init__(self, u: np.ndarray, t: np.ndarray, right: np.ndarray, left: np.ndarray) -> None:
        h, secant = np.diff(u), np.diff(t) / np.diff(u)
        first, last = (np.clip(slope, 0.0, 3.0 * secant) for slope in (right[:-1], left[1:]))  # Fritsch and Carlson
        pieces = (first + last - 2.0 * secant) / h**2, (3.0 * secant - 2.0 * first - last) / h, first, t[:-1]
        self._edges, self._pieces = u.tolist(), np.stack(pieces, axis=1).tolist()

    @classmethod
    def through(cls, u: np.ndarray, t: np.ndarray, corners: Sequence[float] | np.ndarray = ()) -> _Cubics:
        """With slopes found from the points, on each side of the ``corners`` (of u) by themselves."""
        from scipy.interpolate import PchipInterpolator  # half a second to import

        right, left = np.empty_like(t), np.empty_like(t)
        ends = np.unique([0, len(u) - 1, *(int(np.abs(u - corner).argmin()) for corner in corners)])
        for first, last in pairwise(ends):
            part = slice(first, last + 1)
            if last - first == 1:
                slope = np.full(2, (t[last] - t[first]) / (u[last] - u[first]))
            else:
                slope = PchipInterpolator(u[part], t[part]).derivative()(u[part])
            right[first:last], left[first + 1 : last + 1] = slope[:-1], slope[1:]
        right[-1], left[0] = left[-1], right[0]
        return cls(u, t, right, left)

    def __call__(self, u: float) -> tuple[float, float]:
        piece = min(max(bisect_right(self._edges, u) - 1, 0), len(self._pieces) - 1)
        v, (a, b, c, d) = u - self._edges[piece], self._pieces[piece]
        return ((a * v + b) * v + c) * v + d, (3.0 * a * v + 2.0 * b) * v + c


def _compressed(v: np.ndarray, most: float) -> np.ndarray:
    """v, and most + log(1 + v - most) beyond ``most``: where hardly anything is left of x_0, steps may be long."""
    beyond = np.maximum(v - most, 0.0)
    return np.minimum(v, most) + np.log1p(beyond)


def _expanded(w: np.ndarray, most: float, slope: np.ndarray | float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of :func:`_compressed`, and its slope times that of w."""
    beyond = np.maximum(w - most, 0.0)
    return np.minimum(w, most) + np.expm1(beyond), np.exp(beyond) * slope


def _integral(table: PiecewiseChebyshev, row: int) -> float:
    """∫ of a row over all panels."""
    even = np.arange(0, table.coefficients.shape[-1], 2)
    mass = table.coefficients[row][:, ::2] @ (1.0 / (1.0 - even**2))  # of the unit interval
    return float(mass @ np.diff(table.edges))


def _checked(times: Tensor, cutoff: float, T: float) -> np.ndarray:
    """Times as a rising array from cutoff to T."""
    if times.ndim != 1:
        raise ValueError(f"a grid of times is one row of them, (n,), not of shape {tuple(times.shape)}.")
    points = times.detach().cpu().to(torch.float64).numpy()
    points = points[::-1].copy() if len(points) > 1 and points[0] > points[-1] else points.copy()
    if len(points) < 2 or not np.isfinite(points).all() or (np.diff(points) <= 0).any():
        wrong = np.flatnonzero(~(np.diff(points) > 0))
        where = f"; {points[wrong[0]]:g} is followed by {points[wrong[0] + 1]:g}" if len(wrong) else ""
        raise ValueError(f"a grid of times needs at least two finite times which all rise or all fall{where}.")
    if abs(points[0] - cutoff) > 1e-6 * max(cutoff, 1e-3 * T) or abs(points[-1] - T) > 1e-6 * T:
        raise ValueError(
            f"a grid of times must run from cutoff = {cutoff:.8g} to T = {T:g}, "
            f"not from {points[0]:.8g} to {points[-1]:g}."
        )
    points[0], points[-1] = cutoff, T
    return points
