"""Break points: the times at which the declaration is not smooth. They must be edges of panels.

Each :class:`~sdeflow.symbolic.switches.Switch` of an expression gives a function u(t) and the levels at which the
expression is not smooth. If u is linear, the times are fractions, rounded once. If not, u is interpolated on panels
between the break points found before, with bounds so that no crossing is missed, and each panel's series is halved
until it has no root or is monotone.

:class:`Features` says where steps in t must end for the sake of any SDE, and whether they jump over something smooth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import sympy as sp
from numpy.polynomial.chebyshev import chebder, chebval

from sdeflow.errors import CoarseStepsWarning, ScheduleError, warn
from sdeflow.numerics.chebyshev import MAX_PANELS, PiecewiseChebyshev, geometric_edges, halved
from sdeflow.numerics.parameters import Declared
from sdeflow.symbolic.enclosure import Enclosure, NoEnclosure
from sdeflow.symbolic.switches import Switch, exact, switches
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Features", "break_points"]

_LARGEST_COUNT = MAX_PANELS // 2
_DEPTH = 48  # the most halvings of a panel
_ROUNDING = 1e-14
_EARLIEST = 1e-15
_AT_END = 5e-14  # of the horizon: a time so close to T is T, rounded
_PANELS = 37  # panels at the start: a prime number, so that their edges are rarely roots

_MOST_PIECES = 33  # that have a step of their own, however few steps there are
_MISSED, _FEW = 0.25, 4.0  # of an integral over the horizon; the last over the number of steps

Numbers = Mapping[sp.Symbol, "float | np.ndarray"]


def break_points(expressions: Sequence[sp.Expr], values: Numbers, T: float) -> np.ndarray:
    """The times in (0, T) at which the expressions may not be smooth, increasing.

    What is compiled on the horizon has limits from inside at 0 and T; no step needs to end there for its sake.

    Args:
        expressions: of t and the parameters.
        values: the parameters' numbers, or arrays (entries, 1); for arrays, the times of all entries are returned.
        T: the horizon.

    Raises:
        ScheduleError: if there are more break points than allowed panels.
    """
    found = np.zeros(0)
    for switch in switches(expressions):
        if not switch.expr.free_symbols <= {time_symbol, *values}:
            continue  # it depends on the state too: no times
        line = switch.line
        times = _of_line(*line, switch, values, T) if line else _of_curve(switch, values, T, found)
        found = np.union1d(found, times[(times > 0.0) & (times < T * (1.0 - _AT_END))])
        if len(found) > _LARGEST_COUNT:
            raise _too_many(switch, T)
    return found


class Features:
    """What f and g of an SDE do in t alone, whatever its kernel: for methods that go forwards in steps of t.

    Attributes:
        breaks: the times in (0, T) at which f or g may not be smooth; none where they are too many to be found.
    """

    def __init__(self, sde: Declared) -> None:
        declaration, self._numbers, self._T = sde.declaration, sde.values.entries(), sde.declaration.T
        rows = (declaration.drifts, 1), (declaration.diffusions, 2)
        self._parts = [
            (part, power) for row, power in rows for e in row for part in _parts_of_time(e, declaration.state)
        ]
        try:
            self.breaks = break_points([e for row, _ in rows for e in row], self._numbers, self._T)
        except ScheduleError:
            self.breaks = np.zeros(0)

    def edges(self, steps: int | None) -> np.ndarray:
        """Those of the break points at which steps are to end: none where they are more than the steps, and many."""
        return self.breaks if len(self.breaks) < max(steps or 0, _MOST_PIECES) else np.zeros(0)

    def warn_of_missed(self, times: np.ndarray) -> None:
        """A :class:`~sdeflow.errors.CoarseStepsWarning` where steps between rising ``times`` jump over f or g.

        The integrals of what depends on t alone, of |f| and g², by trapezoids or by the value at the start of each
        step, are compared with the true ones.
        """
        steps = len(times) - 1
        for part, power in self._parts:
            missed, at = self._missed(part, power, times)
            if missed > max(_MISSED, _FEW / steps):
                warn(
                    f"{steps} steps jump over what f or g does near t = {at:.6g}: between them they miss {missed:.0%} "
                    f"of the integral of {'|f|' if power == 1 else 'g²'} over the horizon, as far as it depends on t "
                    'alone. Take more steps, or solver="exact" where the SDE has an exact kernel.',
                    CoarseStepsWarning,
                )
                return

    def _missed(self, part: sp.Expr, power: int, times: np.ndarray) -> tuple[float, float]:
        """What the steps miss of the integral of |part|^power, relative to it, and where they miss most."""
        try:
            bound = Enclosure([part], self._numbers, self._T)

            def function(points: np.ndarray) -> np.ndarray:
                return bound(points, np.zeros_like(points), analytic=False)[0]

            start = np.union1d(geometric_edges(0.0, self._T), self.breaks)
            panels = PiecewiseChebyshev.fit(function, start, bound=bound, lenient=True, name=str(part)).edges
        except (NoEnclosure, ScheduleError):
            return 0.0, 0.0
        inner = panels[(panels > times[0]) & (panels < times[-1])]
        ends = np.union1d(times, inner)
        middle, half = 0.5 * (ends[1:] + ends[:-1]), 0.5 * np.diff(ends)
        nodes, weights = np.polynomial.legendre.leggauss(8)
        beside = np.diff(times) * 1e-6  # the value of the step's own side
        with np.errstate(all="ignore"):
            size, first, last = (
                np.nan_to_num(np.abs(function(at)) ** power, nan=0.0, posinf=0.0).max(0)
                for at in (
                    (middle[:, None] + half[:, None] * nodes).reshape(-1),
                    times[:-1] + beside,
                    times[1:] - beside,
                )
            )
        pieces = (size.reshape(len(middle), -1) * weights).sum(1) * half
        true = np.add.reduceat(pieces, np.searchsorted(ends, times[:-1]))
        apart = np.minimum(*(np.abs(true - np.diff(times) * value) for value in (first, 0.5 * (first + last))))
        total = true.sum()
        if not total > 0.0 or not math.isfinite(total):
            return 0.0, 0.0
        worst = int(apart.argmax())
        inside = np.flatnonzero((middle > times[worst]) & (middle < times[worst + 1]))
        return float(apart.sum() / total), float(middle[inside[pieces[inside].argmax()]])


def _parts_of_time(expr: sp.Expr, state: Sequence[sp.Symbol]) -> Iterator[sp.Expr]:
    """The largest parts of an expression that depend on t and not on the state; none of a polynomial in t."""
    if not expr.has(time_symbol):
        return
    if not expr.has(*state):
        if not expr.is_polynomial(time_symbol):
            yield expr
        return
    alone = [part for part in expr.args if not part.has(*state)]
    rest = [part for part in expr.args if part.has(*state)]
    if isinstance(expr, sp.Add | sp.Mul):
        alone = [expr.func(*alone)]
    for part in (*alone, *rest):
        if isinstance(part, sp.Expr):
            yield from _parts_of_time(part, state)


def _too_many(switch: Switch, T: float) -> ScheduleError:
    return ScheduleError(
        f"{switch.expr} switches more than {_LARGEST_COUNT} times on [0, {T:g}]: quadrature has no more panels."
    )


def _of_line(slope: sp.Expr, start: sp.Expr, switch: Switch, values: Numbers, T: float) -> np.ndarray:
    """Solutions of start + slope t = level: exact if all are fractions, else by long doubles or doubles."""
    symbols = slope.free_symbols | start.free_symbols
    if any(isinstance(values[symbol], np.ndarray) for symbol in symbols):
        at = np.zeros(1)
        slopes, starts = (Enclosure([e], values)(at, at)[0] for e in (slope, start))
        return _solutions(slopes, starts, switch, T)
    numbers = {symbol: sp.Rational(values[symbol]) for symbol in symbols}
    slope, start = exact(slope).xreplace(numbers), exact(start).xreplace(numbers)
    if slope.is_Rational and start.is_Rational:
        slope, start = Fraction(int(slope.p), int(slope.q)), Fraction(int(start.p), int(start.q))
        levels = (
            switch.levels if switch.levels is not None else _integers(start, start + slope * Fraction(T), switch, T)
        )
        return np.array([float((Fraction(level) - start) / slope) for level in levels])
    slope, start = (np.longdouble(str(e.evalf(25))) for e in (slope, start))
    return _solutions(slope, start, switch, T)


def _solutions(slope: np.ndarray, start: np.ndarray, switch: Switch, T: float) -> np.ndarray:
    ends = np.broadcast_arrays(start, start + slope * T)
    lowest, highest = float(np.min(ends)), float(np.max(ends))
    levels = np.array(switch.levels if switch.levels is not None else _integers(lowest, highest, switch, T))
    with np.errstate(all="ignore"):
        times = ((levels - start) / slope).astype(np.float64).reshape(-1)
    return times[np.isfinite(times)]


def _integers(one: float | Fraction, other: float | Fraction, switch: Switch, T: float) -> range:
    first, last = sorted((one, other))
    if last - first > _LARGEST_COUNT:
        raise _too_many(switch, T)
    return range(-int(-first // 1), int(last // 1) + 1)


def _of_curve(switch: Switch, values: Numbers, T: float, known: np.ndarray) -> np.ndarray:
    """Solutions of u(t) = level for any u, on panels between the break points already ``known``."""
    try:
        bound = Enclosure([switch.expr], values, T)
    except NoEnclosure:  # the panels of the coefficients will be halved around it
        return np.zeros(0)
    edges = np.union1d(np.linspace(0.0, T, _PANELS + 1), known)
    curve = PiecewiseChebyshev.fit(
        lambda points: bound(points, np.zeros_like(points), analytic=False)[0],
        edges, bound=bound, lenient=True, name=f"the switch {switch.expr}",
    )  # fmt: skip
    left, right = curve.edges[:-1], curve.edges[1:]
    middle = 0.5 * (left + right)
    rounding = bound(middle, 2.0**-53 * middle, analytic=False)[1]
    panel = np.broadcast_to(np.arange(len(left)), rounding.shape)[np.isfinite(rounding)]
    series = curve.coefficients[np.isfinite(rounding)]
    rounding = 8.0 * rounding[np.isfinite(rounding)]
    spread = np.abs(series[:, 1:]).sum(1) + rounding
    which, level = _levels_within(series[:, 0] - spread, series[:, 0] + spread, switch, T)
    series = series[which].copy()
    series[:, 0] -= level
    clear = np.abs(series).max(1) > rounding[which]
    which = which[clear]
    times = _roots(series[clear], left[panel[which]], right[panel[which]], rounding[which])
    hidden = curve.unresolved
    times = np.concatenate([times, left[hidden], right[hidden]])
    return times[times > _EARLIEST * T]  # nearer times cannot be distinguished from 0


def _levels_within(low: np.ndarray, high: np.ndarray, switch: Switch, T: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (series, level) for the levels in [low, high] of each series."""
    if switch.levels is None:
        first, last = np.ceil(low), np.floor(high)
        counts = np.maximum(last - first + 1, 0)
        if counts.sum() > 2 * _LARGEST_COUNT:  # perhaps too many for an integer
            raise _too_many(switch, T)
        counts = counts.astype(np.int64)
        which = np.repeat(np.arange(len(low)), counts)
        return which, first[which] + np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    levels = np.asarray(switch.levels)
    which, index = np.nonzero((levels >= low[:, None]) & (levels <= high[:, None]))
    return which, levels[index]


def _roots(series: np.ndarray, left: np.ndarray, right: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """Roots of Chebyshev series (m, terms) on [left, right] (m,); for a series that touches 0, a point near it."""
    found: list[np.ndarray] = []
    for _ in range(_DEPTH):
        spread = np.abs(series[:, 1:]).sum(1)
        keep = np.abs(series[:, 0]) <= spread + rounding
        series, left, right, rounding, spread = (v[keep] for v in (series, left, right, rounding, spread))
        if not len(series):
            return np.concatenate([*found, left])
        slope = chebder(series, axis=1)
        monotone = np.abs(slope[:, 0]) > np.abs(slope[:, 1:]).sum(1)
        tiny = (right - left <= _ROUNDING * np.abs(right)) | (np.abs(series[:, 0]) + spread <= rounding)
        found.append(_root_of_monotone(*(v[monotone] for v in (series, left, right, rounding))))
        found.append(0.5 * (left + right)[tiny & ~monotone])
        on = ~monotone & ~tiny
        first, second = halved(series[on])
        middle, rounding = 0.5 * (left + right)[on], np.tile(rounding[on], 2)
        series = np.concatenate([first, second])
        left, right = np.concatenate([left[on], middle]), np.concatenate([middle, right[on]])
    return np.concatenate([*found, 0.5 * (left + right)])


def _root_of_monotone(series: np.ndarray, left: np.ndarray, right: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """The root of each monotone series that has one, by bracketed Newton steps."""
    at_ends = [chebval(np.full(len(series), end), series.T, tensor=False) for end in (-1.0, 1.0)]
    close = np.minimum(*map(np.abs, at_ends)) <= rounding + _ROUNDING * np.abs(series).sum(1)
    has = (at_ends[0] * at_ends[1] <= 0) | close
    series, left, right, rising = series[has], left[has], right[has], (at_ends[1] > at_ends[0])[has]
    slope = chebder(series, axis=1)
    low, high = -np.ones(len(series)), np.ones(len(series))
    v = np.zeros(len(series))
    for _ in range(40):
        value = chebval(v, series.T, tensor=False)
        below = (value < 0) == rising
        low, high = np.where(below, v, low), np.where(below, high, v)
        step = v - value / chebval(v, slope.T, tensor=False)
        v = np.where((step >= low) & (step <= high), step, 0.5 * (low + high))
    return 0.5 * (left + right) + 0.5 * (right - left) * v
