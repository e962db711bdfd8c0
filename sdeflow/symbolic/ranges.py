r"""The range of an expression's real values over an interval of t, up to its ends, where a part may be infinite.

In exp(-1/(1 - u²)) on |u| < 1, 1/0 stands at the edge, and no disc around the edge has a bound. Interval arithmetic has
one for real values: 1 - u² runs over [0, h], -1/(1 - u²) over [-oo, -1/h], and exp over [0, e^(-1/h)]. So a bounded
function of an infinite argument is bounded. An end that is 0 up to rounding counts as 0: 1 - u² has one sign.

0 * oo and oo - oo say nothing. A range that meets them is NaN, and that of :func:`towards_ends` is taken instead, of
parts that become narrower towards both ends, up to the last digits of t.

A range holds for the branch that is taken in the middle of the interval, which must have no break point inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, reduce
from typing import NamedTuple, Protocol

import numpy as np
import sympy as sp

from sdeflow.symbolic.squares import is_even_root
from sdeflow.symbolic.symbols import t

__all__ = ["Range", "Ranges", "towards_ends"]

_ZERO = 2.0  # an end of that many rounding errors is 0
_NARROWEST = 8 * 2.0**-52  # of t: nearer to an end, times have no digits
_HALVINGS = 48
_DEGREE = 4  # of polynomials that are factored

Array = np.ndarray | float


class _Disc(Protocol):
    @property
    def centre(self) -> Array: ...

    @property
    def radius(self) -> Array: ...


class Range(NamedTuple):
    """low <= value <= high; NaN if nothing is known."""

    low: Array
    high: Array


class Ranges:
    """The ranges of expressions over intervals.

    Args:
        discs: gives the disc of an expression over each interval: in its middle branches are chosen, and a function
            without a rule has the range of its disc.
        rounding: gives the rounding error of an expression at the ends of each interval.
        known: the ranges of symbols.
    """

    def __init__(
        self,
        discs: Callable[[sp.Basic], _Disc],
        rounding: Callable[[sp.Basic], Array],
        known: dict[sp.Basic, Range],
    ) -> None:
        self._discs, self._rounding, self._known = discs, rounding, known

    def __call__(self, expr: sp.Basic) -> Range:
        """The range of an expression over each interval, (entries, n)."""
        found = self._known.get(expr)
        if found is None:
            if expr.free_symbols:
                found = self._settled(expr, self._operation(expr))
            else:
                number = self._discs(expr).centre
                found = Range(number, number)
            self._known[expr] = found
        return found

    def _settled(self, expr: sp.Basic, found: Range) -> Range:
        """An end that is 0 up to rounding is 0, if the middle is not."""
        small, middle = _ZERO * self._rounding(expr), self._discs(expr).centre
        low, high = found
        return Range(
            np.where((np.abs(low) <= small) & (middle > 2.0 * small), 0.0, low),
            np.where((np.abs(high) <= small) & (middle < -2.0 * small), 0.0, high),
        )

    def _operation(self, expr: sp.Basic) -> Range:
        kind = type(expr)
        if isinstance(expr, sp.Add) and (factors := _factored(expr)) != expr:
            return self(factors)
        if isinstance(expr, sp.Piecewise):
            return self._piecewise(expr)
        if is_even_root(expr):
            return _power(_size(self(expr.base.base)), float(expr.base.exp * expr.exp))
        if isinstance(expr, sp.Pow):
            base, exponent = expr.args
            if exponent.is_Integer:
                return _integer_power(self(base), int(exponent))
            if exponent.is_number:
                return _power(self(base), float(exponent))
            return _rising(np.exp, _product(self(exponent), _rising(np.log, self(base))))
        if isinstance(expr, sp.Mod | sp.frac):
            u, v = expr.args if len(expr.args) == 2 else (expr.args[0], sp.Integer(1))
            count = np.floor(self._discs(u).centre / np.asarray(self._discs(v).centre))
            return _sum(self(u), _product(Range(-count, -count), self(v)))
        if kind in _FOLDED:
            return reduce(_FOLDED[kind], map(self, expr.args))
        if kind in _RULES:
            return _RULES[kind](self(expr.args[0]))
        disc = self._discs(expr)
        return Range(disc.centre - disc.radius, disc.centre + disc.radius)

    def _piecewise(self, expr: sp.Piecewise) -> Range:
        chosen = Range(np.nan, np.nan)
        for branch, condition in reversed(expr.args):
            own, taken = self(branch), self._discs(condition).centre
            chosen = Range(np.where(taken, own.low, chosen.low), np.where(taken, own.high, chosen.high))
        return chosen


def towards_ends(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts (n, m) of intervals (n,), which halve towards both ends, up to the last digits of t."""
    shares = 0.5 ** np.arange(_HALVINGS, 1.0, -1.0)
    shares = np.concatenate([[0.0], shares, [0.5], 1.0 - shares[::-1], [1.0]])
    points = left[:, None] + (right - left)[:, None] * shares
    nearest = _NARROWEST * np.maximum(np.abs(left), np.abs(right))[:, None]
    points = np.clip(points, left[:, None] + nearest, right[:, None] - nearest)
    return points[:, :-1], points[:, 1:]


@lru_cache(maxsize=1000)
def _factored(expr: sp.Add) -> sp.Expr:
    """A polynomial in t as a product: t - t² runs over both signs below 1, and t (1 - t) does not."""
    few = len(expr.args) <= 2 * _DEGREE and expr.free_symbols == {t} and expr.is_polynomial(t)
    polynomial = sp.Poly(expr, t) if few else None
    if (
        polynomial is None
        or not 1 < polynomial.degree() <= _DEGREE
        or not (polynomial.domain.is_ZZ or polynomial.domain.is_QQ)
    ):
        return expr
    return sp.factor(expr)


def _sum(u: Range, v: Range) -> Range:
    opposite = np.isposinf(u.high) & np.isneginf(v.low) | np.isneginf(u.low) & np.isposinf(v.high)
    return Range(np.where(opposite, np.nan, u.low + v.low), np.where(opposite, np.nan, u.high + v.high))


def _product(u: Range, v: Range) -> Range:
    products = [a * b for a in u for b in v]
    return Range(reduce(np.minimum, products), reduce(np.maximum, products))


def _reciprocal(u: Range) -> Range:
    low, high = np.asarray(u.low, dtype=np.float64), np.asarray(u.high, dtype=np.float64)
    crosses = (low < 0) & (high > 0)
    # 1 / 0 is infinite with the sign of the rest.
    return Range(
        np.where(crosses, -np.inf, np.where(high == 0, -np.inf, 1.0 / high)),
        np.where(crosses, np.inf, np.where(low == 0, np.inf, 1.0 / low)),
    )


def _size(u: Range) -> Range:
    low = np.where((u.low <= 0) & (u.high >= 0), 0.0, np.minimum(np.abs(u.low), np.abs(u.high)))
    return Range(low, np.maximum(np.abs(u.low), np.abs(u.high)))


def _integer_power(u: Range, n: int) -> Range:
    if n < 0:
        u, n = _reciprocal(u), -n
    u = u if n % 2 else _size(u)
    return Range(np.power(u.low, n), np.power(u.high, n))


def _power(u: Range, p: float) -> Range:
    """u^p of u >= 0."""
    return _rising(lambda z: np.power(z, p), u) if p > 0 else _power(_reciprocal(u), -p)


def _rising(function: Callable[[Array], Array], u: Range) -> Range:
    return Range(function(u.low), function(u.high))


def _falling(function: Callable[[Array], Array], u: Range) -> Range:
    return Range(function(u.high), function(u.low))


def _wave(function: Callable[[Array], Array], peak: float, u: Range) -> Range:
    """A sine or cosine, with its peaks at ``peak`` + 2 pi n."""
    ends = function(u.low), function(u.high)

    def passes(level: float) -> np.ndarray:
        turns = [(end - level) / (2.0 * np.pi) for end in u]
        return ~(np.floor(turns[1]) < np.ceil(turns[0]))

    return Range(
        np.where(passes(peak + np.pi), -1.0, np.minimum(*ends)), np.where(passes(peak), 1.0, np.maximum(*ends))
    )


def _sine(u: Range) -> Range:
    return _wave(np.sin, 0.5 * np.pi, u)


def _cosine(u: Range) -> Range:
    return _wave(np.cos, 0.0, u)


def _tangent(u: Range) -> Range:
    turns = [np.floor(end / np.pi + 0.5) for end in u]
    same = turns[0] == turns[1]
    return Range(np.where(same, np.tan(u.low), -np.inf), np.where(same, np.tan(u.high), np.inf))


_FOLDED: dict[type, Callable[[Range, Range], Range]] = {
    sp.Add: _sum, sp.Mul: _product,
    sp.Max: lambda u, v: Range(np.maximum(u.low, v.low), np.maximum(u.high, v.high)),
    sp.Min: lambda u, v: Range(np.minimum(u.low, v.low), np.minimum(u.high, v.high)),
}  # fmt: skip

_RULES: dict[type, Callable[[Range], Range]] = {
    sp.exp: lambda u: _rising(np.exp, u), sp.log: lambda u: _rising(np.log, u),
    sp.sinh: lambda u: _rising(np.sinh, u), sp.cosh: lambda u: _rising(np.cosh, _size(u)),
    sp.tanh: lambda u: _rising(np.tanh, u), sp.coth: lambda u: _reciprocal(_rising(np.tanh, u)),
    sp.sech: lambda u: _reciprocal(_rising(np.cosh, _size(u))), sp.csch: lambda u: _reciprocal(_rising(np.sinh, u)),
    sp.atan: lambda u: _rising(np.arctan, u), sp.asinh: lambda u: _rising(np.arcsinh, u),
    sp.asin: lambda u: _rising(np.arcsin, _within(u, -1.0, 1.0)),
    sp.acos: lambda u: _falling(np.arccos, _within(u, -1.0, 1.0)),
    sp.acosh: lambda u: _rising(np.arccosh, _within(u, 1.0, np.inf)),
    sp.sin: _sine, sp.cos: _cosine, sp.tan: _tangent, sp.cot: lambda u: _reciprocal(_tangent(u)),
    sp.csc: lambda u: _reciprocal(_sine(u)), sp.sec: lambda u: _reciprocal(_cosine(u)),
    sp.Abs: _size,
}  # fmt: skip


def _within(u: Range, low: float, high: float) -> Range:
    """The part of a range that a function takes: rounding may pass its end."""
    return Range(np.clip(u.low, low, high), np.clip(u.high, low, high))
