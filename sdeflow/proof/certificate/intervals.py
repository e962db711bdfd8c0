"""Bounds of expressions of t over many intervals at once, and the times at which an expression breaks.

Interval arithmetic on NumPy arrays: each value is a pair (low, high), one entry for each interval. What comes out
holds every value that the expression takes there, and often more; the more, the wider the interval. A narrow feature
cannot hide from it between two points, which is why the oracle looks with it. The rounding of the ends is not
directed: bounds are good to some units in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import sympy as sp
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom

from sdeflow.symbolic.evaluate import UnknownValue, evaluate
from sdeflow.symbolic.schedule import Schedule
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Interval", "breaks", "conditions", "enclose"]

Interval = tuple[np.ndarray, np.ndarray]
Numbers = Mapping[sp.Symbol, float]

_ROOTS = 4096  # of one condition
_LEVELS = 75  # halvings: from the horizon down to the rounding of its times
_RISING = (sp.exp, sp.sinh, sp.tanh, sp.atan, sp.asinh, sp.asin, sp.erf, sp.floor, sp.ceiling, sp.sign, sp.Heaviside)
_FALLING = (sp.acos, sp.erfc)
_SAMPLES = 9


def enclose(expr: sp.Basic, low: np.ndarray, high: np.ndarray, numbers: Numbers) -> Interval:
    """Bounds of ``expr`` over the times [low, high], (n,) each; infinite where nothing is known."""
    with np.errstate(all="ignore"):
        low, high = _Bounds(low, high, numbers)(expr)
    return np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)


class _Bounds:
    """The walk over one expression; a sub-expression that occurs twice is bounded once."""

    def __init__(self, low: np.ndarray, high: np.ndarray, numbers: Numbers) -> None:
        self.low, self.high, self.numbers = low, high, numbers
        self.known: dict[sp.Basic, Interval] = {time_symbol: (low, high)}

    def __call__(self, expr: sp.Basic) -> Interval:
        if expr not in self.known:
            low, high = self._bound(expr)
            self.known[expr] = np.broadcast_to(low, self.low.shape), np.broadcast_to(high, self.low.shape)
        return self.known[expr]

    def _bound(self, expr: sp.Basic) -> Interval:
        if not expr.has(time_symbol):
            boolean = isinstance(expr, BooleanAtom)
            value = np.asarray(float(bool(expr))) if boolean else evaluate(expr, self.numbers)
            return value, value
        function = expr.func
        if isinstance(expr, sp.Piecewise):
            return self._branches(expr)
        if isinstance(expr, Schedule):
            return self._schedule(expr)
        inner = [self(argument) for argument in expr.args]
        if isinstance(expr, Relational):
            return _relation(expr, *inner)
        if function in _FOLDS:
            total = inner[0]
            for other in inner[1:]:
                total = _FOLDS[function](total, other)
            return total
        if function is sp.Pow:
            return _power(expr, *inner)
        if function in _OTHERS:
            return _OTHERS[function](*inner)
        if function in _RISING or function in _FALLING:
            ends = [self._value(expr, end) for end in inner[0]]
            return (ends[0], ends[1]) if function in _RISING else (ends[1], ends[0])
        return self._sampled(expr)

    @staticmethod
    def _value(expr: sp.Basic, argument: np.ndarray) -> np.ndarray:
        hole = sp.Dummy()
        return evaluate(expr.func(hole, *expr.args[1:], evaluate=False), {hole: argument})

    def _branches(self, expr: sp.Piecewise) -> Interval:
        """The hull of the branches that may hold somewhere in the interval."""
        low, high = np.full_like(self.low, np.inf), np.full_like(self.low, -np.inf)
        open_ = np.ones_like(self.low, dtype=bool)
        for branch, condition in expr.args:
            surely, maybe = (np.asarray(part, dtype=float) > 0.5 for part in self(condition))
            here = open_ & maybe
            if here.any():
                below, above = self(branch)
                low, high = np.where(here, np.minimum(low, below), low), np.where(here, np.maximum(high, above), high)
            open_ = open_ & ~surely
        return low, high

    def _schedule(self, expr: Schedule) -> Interval:
        """A table, or its derivative, is monotone between its turns; a function is known at its points alone."""
        if expr.table is None:
            return self._sampled(expr)
        low, high = self(expr.args[0])
        turns, values = _turns(type(expr))
        low, high = (np.clip(end, turns[0], turns[-1]) for end in (low, high))
        ends = np.stack([expr.values(low), expr.values(high)])
        below, above = ends.min(0), ends.max(0)
        first, last = np.searchsorted(turns, low, "left"), np.searchsorted(turns, high, "right")
        for i in np.flatnonzero(first < last):
            inside = values[first[i] : last[i]]
            below[i], above[i] = min(below[i], inside.min()), max(above[i], inside.max())
        return below, above

    def _sampled(self, expr: sp.Basic) -> Interval:
        """No rule: the hull of some values."""
        share = np.linspace(0.0, 1.0, _SAMPLES)[:, None]
        try:
            values = evaluate(expr, {**self.numbers, time_symbol: self.low + share * (self.high - self.low)})
        except UnknownValue:
            return np.full_like(self.low, -np.inf), np.full_like(self.low, np.inf)
        return values.min(0), values.max(0)


def _turns(kind: type[Schedule]) -> Interval:
    """Times and values between which a table's curve, or its derivative, is monotone.

    These are its knots, with the values on both sides, and where its slope vanishes.
    """
    if kind.table is None or kind.curve is None:
        raise UnknownValue(f"{kind.__name__} is no table.")
    knots, curve = kind.table[0], kind.curve
    slope = curve.derivative()
    inner = slope.roots(discontinuity=False, extrapolate=False)
    inner = inner[np.isfinite(inner)]  # NaN stands for a piece that is constant
    ends = np.polyval(curve.c, np.diff(knots))  # from the left
    times, values = np.concatenate([knots, inner, knots[1:]]), np.concatenate([curve(knots), curve(inner), ends])
    order = np.argsort(times, kind="stable")
    return times[order], values[order]


def _add(a: Interval, b: Interval) -> Interval:
    return a[0] + b[0], a[1] + b[1]


def _multiply(a: Interval, b: Interval) -> Interval:
    products = np.stack([np.where((p == 0) | (q == 0), 0.0, p * q) for p in a for q in b])
    return products.min(0), products.max(0)


def _power(expr: sp.Pow, base: Interval, exponent: Interval) -> Interval:
    low, high = base
    if not expr.exp.is_number:
        low, high = np.log(np.maximum(low, 0.0)), np.log(np.maximum(high, 0.0))
        low, high = _multiply((low, high), exponent)
        return np.exp(low), np.exp(high)
    power = float(expr.exp)
    if not expr.exp.is_Integer:
        low, high = np.maximum(low, 0.0), np.maximum(high, 0.0)
    ends = np.stack([low**power, high**power])
    below, above = ends.min(0), ends.max(0)
    across = (low <= 0) & (high >= 0) & expr.exp.is_Integer
    if power > 0:
        even = bool(expr.exp.is_Integer) and int(power) % 2 == 0
        return (np.where(across, 0.0, below) if even else below), above
    even = bool(expr.exp.is_Integer) and int(power) % 2 == 0
    return np.where(across & (not even), -np.inf, below), np.where(across, np.inf, above)


def _relation(expr: Relational, left: Interval, right: Interval) -> Interval:
    """(surely, maybe) as 0 and 1."""
    low, high = left[0] - right[1], left[1] - right[0]
    if isinstance(expr, sp.Gt | sp.Ge):
        surely, maybe = low > 0, high >= 0
    elif isinstance(expr, sp.Lt | sp.Le):
        surely, maybe = high < 0, low <= 0
    else:
        surely, maybe = np.zeros_like(low, dtype=bool), (low <= 0) & (high >= 0)
        if isinstance(expr, sp.Ne):
            surely, maybe = ~maybe, ~surely
    return surely.astype(float), maybe.astype(float)


def _wave(phase: float) -> Callable[[Interval], Interval]:
    """cos(u - phase): its tops at phase + 2πn, its bottoms half a period on."""

    def bound(u: Interval) -> Interval:
        low, high = u[0] - phase, u[1] - phase
        ends = np.stack([np.cos(low), np.cos(high)])
        turn = 2 * math.pi
        top = np.floor(high / turn) >= np.ceil(low / turn)
        bottom = np.floor(high / turn - 0.5) >= np.ceil(low / turn - 0.5)
        return np.where(bottom, -1.0, ends.min(0)), np.where(top, 1.0, ends.max(0))

    return bound


def _poles(function: Callable[[np.ndarray], np.ndarray], at: float, period: float, rising: bool) -> Callable:
    """A function that is monotone between poles ``at`` + n ``period``."""

    def bound(u: Interval) -> Interval:
        ends = [function(end) for end in (u if rising else u[::-1])]
        through = np.floor((u[1] - at) / period) != np.floor((u[0] - at) / period)
        return np.where(through, -np.inf, ends[0]), np.where(through, np.inf, ends[1])

    return bound


def _modulus(u: Interval) -> Interval:
    low, high = np.abs(u[0]), np.abs(u[1])
    return np.where((u[0] <= 0) & (u[1] >= 0), 0.0, np.minimum(low, high)), np.maximum(low, high)


def _logarithm(u: Interval) -> Interval:
    return np.log(np.maximum(u[0], 0.0)), np.log(np.maximum(u[1], 0.0))


def _hyperbolic_cosine(u: Interval) -> Interval:
    low, high = _modulus(u)
    return np.cosh(low), np.cosh(high)


def _remainder(u: Interval, period: Interval) -> Interval:
    same = (period[0] == period[1]) & (np.floor(u[0] / period[0]) == np.floor(u[1] / period[0]))
    low, high = np.minimum(0.0, period[0]), np.maximum(0.0, period[1])
    return np.where(same, np.mod(u[0], period[0]), low), np.where(same, np.mod(u[1], period[0]), high)


_FOLDS: dict[type, Callable[[Interval, Interval], Interval]] = {
    sp.Add: _add,
    sp.Mul: _multiply,
    sp.Max: lambda a, b: (np.maximum(a[0], b[0]), np.maximum(a[1], b[1])),
    sp.Min: lambda a, b: (np.minimum(a[0], b[0]), np.minimum(a[1], b[1])),
    sp.And: lambda a, b: (np.minimum(a[0], b[0]), np.minimum(a[1], b[1])),
    sp.Or: lambda a, b: (np.maximum(a[0], b[0]), np.maximum(a[1], b[1])),
}

_OTHERS: dict[type, Callable[..., Interval]] = {
    sp.Not: lambda a: (1.0 - a[1], 1.0 - a[0]),
    sp.Abs: _modulus,
    sp.log: _logarithm,
    sp.cosh: _hyperbolic_cosine,
    sp.cos: _wave(0.0),
    sp.sin: _wave(math.pi / 2),
    sp.tan: _poles(np.tan, math.pi / 2, math.pi, True),
    sp.cot: _poles(lambda u: 1.0 / np.tan(u), 0.0, math.pi, False),
    sp.Mod: _remainder,
    sp.frac: lambda u: _remainder(u, (np.ones_like(u[0]), np.ones_like(u[0]))),
}


# -------------------------------------------------------------------- where an expression breaks


def breaks(expressions: list[sp.Expr], T: float, numbers: Numbers) -> np.ndarray:
    """The times inside (0, T) at which a condition, a step, a kink or a table's knot stands in the expressions."""
    found = [np.zeros(0)]
    for inner, whole in dict.fromkeys(_kinks(expressions)):
        if inner.has(time_symbol):
            found.append(_crossings(inner, None if whole else np.zeros(1), T, numbers))
    for knots, argument in _knots(expressions):
        if argument == time_symbol:
            found.append(knots)
        else:
            found.append(_crossings(argument, knots, T, numbers))
    points = np.sort(np.concatenate(found))
    points = points[(points > 4e-16 * T) & (points < T)]
    return points[np.diff(points, prepend=-T) > 4e-16 * T]  # one time may be found in several ways


def conditions(expressions: list[sp.Expr]) -> list[sp.Expr]:
    """What decides where the expressions break."""
    arguments = [argument for _, argument in _knots(expressions)]
    return [*(inner for inner, _ in _kinks(expressions)), *arguments]


def _kinks(expressions: list[sp.Expr]) -> Iterator[tuple[sp.Expr, bool]]:
    """What vanishes, or (True) takes a whole number, at a break."""
    for node in (node for expression in expressions for node in sp.preorder_traversal(expression)):
        if isinstance(node, Relational):
            yield node.lhs - node.rhs, False
        elif isinstance(node, sp.Abs | sp.sign | sp.Heaviside):
            yield node.args[0], False
        elif isinstance(node, sp.Max | sp.Min):
            yield from ((a - b, False) for i, a in enumerate(node.args) for b in node.args[:i])
        elif isinstance(node, sp.floor | sp.ceiling | sp.frac):
            yield node.args[0], True
        elif isinstance(node, sp.Mod):
            yield node.args[0] / node.args[1], True


def _knots(expressions: list[sp.Expr]) -> Iterator[tuple[np.ndarray, sp.Expr]]:
    for node in {node for expression in expressions for node in expression.atoms(Schedule)}:
        if node.breakpoints:
            yield np.array(node.breakpoints, dtype=float), node.args[0]


def _crossings(expr: sp.Expr, levels: np.ndarray | None, T: float, numbers: Numbers) -> np.ndarray:
    """Times at which ``expr`` is one of ``levels`` (None: an integer), by halving the intervals that may hold one.

    Where it is so on a whole interval, the halving has no end, and the ends of that interval are returned.
    """
    edges = np.linspace(0.0, T, 65)
    low, high = edges[:-1], edges[1:]
    most = _ROOTS if levels is None else max(_ROOTS, 4 * len(levels))
    for _ in range(_LEVELS):
        below, above = enclose(expr, low, high, numbers)
        if levels is None:
            hit = np.floor(above) >= np.ceil(below)
        else:
            hit = np.searchsorted(levels, below, "left") < np.searchsorted(levels, above, "right")
        if hit.sum() > most:
            _must_rest(expr, levels, 0.5 * (low + high)[hit], numbers)
            break
        low, high = low[hit], high[hit]
        if not ((high - low) > np.maximum(2e-16 * high, 1e-18 * T)).any():  # early times have more digits than T
            break
        middle = 0.5 * (low + high)
        wide = (high - low) > 1e-16 * np.maximum(high, 1e-300)
        low, high = np.concatenate([low, middle[wide]]), np.concatenate([np.where(wide, middle, high), high[wide]])
    if not len(low):
        return np.zeros(0)
    order = np.argsort(low)
    low, high = low[order], high[order]
    apart = np.flatnonzero(low[1:] > high[:-1] + 4e-16 * T)
    first, last = low[np.r_[0, apart + 1]], high[np.r_[apart, len(high) - 1]]
    point = last - first <= 64e-16 * T
    return np.concatenate([0.5 * (first + last)[point], first[~point], last[~point]])


def _must_rest(expr: sp.Expr, levels: np.ndarray | None, times: np.ndarray, numbers: Numbers) -> None:
    """Raises where ``expr`` does not rest on a level at most times: it crosses levels more often than is followed."""
    values = evaluate(expr, {**numbers, time_symbol: times})
    resting = values == np.round(values) if levels is None else np.isin(values, levels)
    if resting.mean() < 0.5:
        raise UnknownValue(f"{expr} passes more break points than the {_ROOTS} that are followed.")
