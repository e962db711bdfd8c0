r"""Bounds of an expression: discs that contain its values over discs of t, where samples could miss a feature.

An expression is evaluated node by node on discs |z - c| <= r of the complex plane with real centres c (Johansson,
"Numerical integration in arbitrary-precision ball arithmetic", arXiv:1802.07942). The result is a disc around f(c) that
contains f(z) for every z in the disc of t. It has two uses:

- On a disc around a whole panel, a finite radius proves that f is analytic there, and bounds its variation. This bounds
  the error of the Chebyshev interpolant on the panel, even if f was evaluated at few points.
- On discs of the size of a rounding error, the radius is the rounding error of f: each operation adds its own.

A function that switches (Piecewise, Abs, Max, floor, ...) takes the branch of the disc's centre. The bound is then that
of the branch, and holds on a panel without a break point inside. A function without a formula (a Python function of t)
has no bound; there the samples decide. A special function counts as smooth if its argument varies by less than its
distance from 0, and by less than 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import sympy as sp
from sympy.core.relational import Relational
from sympy.functions.elementary.piecewise import ExprCondPair
from sympy.logic.boolalg import BooleanAtom

from sdeflow.errors import DeclarationError
from sdeflow.symbolic.ranges import Range, Ranges, towards_ends
from sdeflow.symbolic.schedule import Schedule
from sdeflow.symbolic.special import special_functions
from sdeflow.symbolic.squares import is_even_root
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Enclosure", "NoEnclosure"]

_ROUNDING = 2.0**-53
_LARGE = 300.0  # larger arguments of exp, cosh and sinh are near overflow
_VARIES = 4.0

Array = np.ndarray | float


class NoEnclosure(Exception):
    """A part of an expression has neither values nor bounds here, such as the derivative of a table."""


class Disc(NamedTuple):
    """|z - centre| <= radius; ``low`` bounds |z| from below if the others overflow."""

    centre: Array
    radius: Array
    low: Array | None = None

    @property
    def smallest(self) -> Array:
        """A lower bound of |z|, at least 0."""
        low = np.nan_to_num(np.abs(self.centre) - self.radius, nan=0.0, posinf=0.0, neginf=0.0).clip(0.0)
        return low if self.low is None else np.maximum(low, self.low)

    @property
    def largest(self) -> Array:
        """An upper bound of |z|."""
        return np.abs(self.centre) + self.radius


class Enclosure:
    """Discs that contain the values of expressions in t.

    Args:
        expressions: expressions in t and the parameters.
        values: the parameters' numbers; for an array (entries, 1) the result has one line for each entry.
        T: the horizon; functions without a formula are tried at T / 2.

    Raises:
        NoEnclosure: if a function has neither values nor bounds.
    """

    def __init__(self, expressions: Sequence[sp.Expr], values: Mapping[sp.Symbol, Array], T: float = 1.0) -> None:
        self.expressions = tuple(expressions)
        self._known = {symbol: Disc(value, 0.0) for symbol, value in values.items()}
        _require_rules(self.expressions)
        if any(expression.has(Schedule) for expression in self.expressions):
            try:
                self(np.array([0.5 * T]), np.zeros(1))
            except DeclarationError as error:  # such as a function of torch tensors
                raise NoEnclosure(str(error)) from error

    def __call__(self, centre: np.ndarray, radius: np.ndarray, analytic: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Centres and radii of the values, (m, n) each; an infinite radius if there is no bound.

        Args:
            centre, radius: discs of t, (n,) each.
            analytic: whether a function must be analytic on the disc to have a finite radius. If not, only the
                values at real points of the disc are bounded, which is enough for rounding.
        """
        walk = self._walk(centre, radius, analytic)
        with np.errstate(all="ignore"):
            discs = [walk(expression) for expression in self.expressions]
        # Each is (entries, n), or (1, n) for a part without arrays of parameters.
        parts = [np.broadcast_arrays(disc.centre, disc.radius, np.empty((1, centre.size)))[:2] for disc in discs]
        centres, radii = (np.concatenate(part, dtype=np.float64) for part in zip(*parts, strict=True))
        return centres, np.where(np.isnan(radii), np.inf, radii)

    def between(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest real values on intervals without a break point inside, (m, n) each.

        Values are infinite where there is no bound. At the ends of the intervals a part may be infinite, such as the
        exponent of exp(-1/u).
        """
        low, high = self._between(left, right, settled=True)
        unknown = (np.isnan(low) | np.isnan(high)).any(0)
        if unknown.any():
            first, last = towards_ends(left[unknown], right[unknown])
            lows, highs = self._between(first.reshape(-1), last.reshape(-1), settled=False)
            low[:, unknown] = lows.reshape(len(low), *first.shape).min(-1)
            high[:, unknown] = highs.reshape(len(low), *first.shape).max(-1)
        nowhere = np.isnan(low) | np.isnan(high)
        return np.where(nowhere, -np.inf, low), np.where(nowhere, np.inf, high)

    def _between(self, left: np.ndarray, right: np.ndarray, settled: bool) -> tuple[np.ndarray, np.ndarray]:
        """The ends of the ranges, NaN if interval arithmetic knows none; with ``settled``, 0 up to rounding is 0."""
        n, ends = len(left), np.concatenate([left, right])
        discs = self._walk(0.5 * (left + right), 0.5 * (right - left), analytic=False)
        beside = self._walk(ends, _ROUNDING * np.abs(ends), analytic=False)

        def rounding(expr: sp.Basic) -> np.ndarray | float:
            """The rounding error at an end where the value is no more than that; 0 where it is not."""
            if not settled:
                return 0.0
            value, radius = np.broadcast_arrays(*beside(expr)[:2], np.empty(2 * n))[:2]
            radius = np.where(np.isfinite(radius) & (np.abs(value) <= 2.0 * radius), radius, 0.0)
            return radius.reshape(*radius.shape[:-1], 2, n).max(-2)

        known = {symbol: Range(disc.centre, disc.centre) for symbol, disc in self._known.items()}
        ranges = Ranges(discs, rounding, {**known, time_symbol: Range(left, right)})
        with np.errstate(all="ignore"):
            found = [_common(discs(expression), ranges(expression), n) for expression in self.expressions]
        low, high = (np.concatenate(part, dtype=np.float64) for part in zip(*found, strict=True))
        return low, high

    def _walk(self, centre: np.ndarray, radius: np.ndarray, analytic: bool) -> _Walk:
        return _Walk({**self._known, time_symbol: Disc(centre, radius)}, self._known, analytic)


def _common(disc: Disc, found: Range, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The ends (entries, n) of what lies in a range and in a disc, which knows more where terms cancel."""
    low, high, centre, radius = np.broadcast_arrays(*found, disc.centre, disc.radius, np.empty((1, n)))[:4]
    return (
        np.where(np.isnan(low), np.nan, np.fmax(low, centre - radius)),
        np.where(np.isnan(high), np.nan, np.fmin(high, centre + radius)),
    )


class _Walk:
    """One walk over an expression. Equal sub-expressions share their disc; ``kept`` holds constants between walks."""

    def __init__(self, known: dict[sp.Basic, Disc], kept: dict[sp.Basic, Disc], analytic: bool) -> None:
        self._known, self._kept, self.analytic = known, kept, analytic

    def __call__(self, expr: sp.Basic) -> Disc:
        disc = self._known.get(expr)
        if disc is None:
            if not expr.free_symbols and not isinstance(expr, _LOGICAL):
                disc = self._kept[expr] = _constant(expr)
            else:
                disc = self._operation(expr)
            self._known[expr] = disc
        return disc

    def _operation(self, expr: sp.Basic) -> Disc:
        if isinstance(expr, BooleanAtom):
            return Disc(bool(expr), 0.0)
        if isinstance(expr, sp.Piecewise):
            return self._piecewise(expr)
        if is_even_root(expr):
            return self._power(sp.Abs(expr.base.base), expr.base.exp * expr.exp)
        if isinstance(expr, sp.Pow):
            return self._power(*expr.args)
        if isinstance(expr, sp.Heaviside):
            (u, at_zero) = map(self, expr.args)
            return Disc(np.heaviside(u.centre, at_zero.centre), 0.0)
        discs = [self(argument) for argument in expr.args]
        kind = type(expr)
        if kind in _COMPARED:
            return Disc(_COMPARED[kind](*(disc.centre for disc in discs)), 0.0)
        if kind in _FOLDED:
            return reduce(_FOLDED[kind], discs)
        if kind is sp.log:
            return self._log(*discs)
        if kind in _RULES:
            return _RULES[kind](*discs)
        if kind in _SLOPES:
            (u,) = discs
            disc = self._by_slope(*_SLOPES[kind], u)
            return disc if self.analytic else _of_real_values(kind, u, disc)
        if isinstance(expr, Schedule):
            return self._table(kind, *discs)
        return self._special(special_functions()[kind], *discs)

    def _piecewise(self, expr: sp.Piecewise) -> Disc:
        chosen = Disc(np.nan, np.nan)
        for branch, condition in reversed(expr.args):
            disc, taken = self(branch), self(condition).centre
            chosen = Disc(
                np.where(taken, disc.centre, chosen.centre), np.where(taken, disc.radius, chosen.radius),
                None if disc.low is None and chosen.low is None else np.where(taken, disc.smallest, chosen.smallest),
            )  # fmt: skip
        return chosen

    def _power(self, base: sp.Expr, exponent: sp.Expr) -> Disc:
        u = self(base)
        if exponent.is_Integer and abs(int(exponent)) < 2**31:
            n = int(exponent)
            return _integer_power(u if n > 0 else _reciprocal(u), abs(n))
        if exponent.free_symbols:
            return _exp(_product(self(exponent), self._log(u)))
        p = float(self(exponent).centre)
        value = np.power(u.centre, p)
        # |z^p - c^p| by the series of (1 + w)^p, whose coefficients are at most those of (1 - |w|)^-|p|.
        share = np.where(u.radius < u.centre, u.radius / u.centre, np.nan)
        radius = _risen(value, p * np.log(u.centre), -abs(p) * np.log1p(-share))
        if p > 0:
            radius = np.where(u.largest == 0, 0.0, radius)  # exactly 0, as Max(t - 1/3, 0) before 1/3
        if p > 0 and not self.analytic:
            radius = np.fmin(radius, np.maximum(value, np.power(u.largest, p)))
        return Disc(value, radius + 2 * _ROUNDING * value, None if u.low is None else np.power(u.smallest, p))

    def _log(self, u: Disc) -> Disc:
        value = np.log(u.centre)
        share = np.where(u.radius < u.centre, u.radius / u.centre, np.nan)
        return Disc(value, -np.log1p(-share) + 2 * _ROUNDING * np.abs(value))

    def _by_slope(self, function: Callable, slope: Callable, u: Disc) -> Disc:
        """A function whose derivative has at most the modulus ``slope(c, r)`` on the disc."""
        value = function(u.centre)
        return Disc(value, u.radius * slope(u.centre, u.radius) + 2 * _ROUNDING * np.abs(value))

    def _table(self, kind: type[Schedule], u: Disc) -> Disc:
        points = np.broadcast_to(np.asarray(u.centre, dtype=np.float64), np.shape(u.centre))
        ends = (np.nan, np.nan) if kind.table is None else (kind.table[0][0], kind.table[0][-1])
        inside = points.clip(*ends) if kind.table is not None else points
        value = kind.values(inside.reshape(-1)).reshape(points.shape)
        if kind.table is None or kind.order:
            return Disc(value, _ROUNDING * np.abs(value))
        # A polynomial of degree three between two knots; its derivatives have the size of the steps over the gaps.
        times, values = kind.table
        piece = np.clip(np.searchsorted(times, inside, side="right") - 1, 0, len(times) - 2)
        steepness = 3.0 * np.abs(np.diff(values)) / np.diff(times)
        gap = np.diff(times)[piece]
        reach = u.radius / gap
        radius = steepness[piece] * u.radius * (1.0 + reach) ** 2
        return Disc(value, radius + 4 * _ROUNDING * np.abs(value))

    def _special(self, function: Callable, *arguments: Disc) -> Disc:
        value = np.asarray(function(*(u.centre for u in arguments)), dtype=np.float64)
        smooth = reduce(
            np.logical_and,
            ((u.radius <= 0.99 * np.abs(u.centre)) & (u.radius <= _VARIES) | (u.radius == 0) for u in arguments),
        )
        share = np.minimum(sum(u.radius for u in arguments), 1.0) + 16 * _ROUNDING
        return Disc(value, np.where(smooth, share * np.abs(value), np.inf))


def _constant(expr: sp.Expr) -> Disc:
    number = float(expr.evalf(20))
    exact = expr.is_Integer or expr.is_Float
    return Disc(number, 0.0 if exact else _ROUNDING * abs(number))


def _sum(u: Disc, v: Disc) -> Disc:
    value, low = u.centre + v.centre, None
    if u.low is not None or v.low is not None:
        low = np.fmax(u.smallest - v.largest, v.smallest - u.largest).clip(0.0)
    return Disc(value, u.radius + v.radius + _ROUNDING * np.abs(value), low)


def _product(u: Disc, v: Disc) -> Disc:
    value = u.centre * v.centre
    radius = np.abs(u.centre) * v.radius + u.radius * np.abs(v.centre) + u.radius * v.radius
    low = None if u.low is None and v.low is None else u.smallest * v.smallest
    exact = (np.abs(u.centre) == 1) & (u.radius == 0) | (np.abs(v.centre) == 1) & (v.radius == 0)
    return Disc(value, radius + np.where(exact, 0.0, _ROUNDING * np.abs(value)), low)


def _reciprocal(u: Disc) -> Disc:
    value, smallest = 1.0 / np.asarray(u.centre, dtype=np.float64), u.smallest
    radius = np.where(np.isfinite(u.centre), u.radius * np.abs(value) / smallest, 1.0 / smallest)
    # If the disc itself is lost, 2 / |z| bounds the difference of two values.
    radius = np.where(smallest > 0, np.fmin(radius, 2.0 / smallest), np.inf)
    return Disc(value, radius + _ROUNDING * np.abs(value))


def _integer_power(u: Disc, n: int) -> Disc:
    if n == 1:
        return u
    size = np.abs(u.centre)
    value = np.power(u.centre, n) if n != 2 else u.centre * u.centre
    if n == 2:
        radius = u.radius * (2.0 * size + u.radius)
    else:
        risen = _risen(np.power(size, n), n * np.log(size), n * np.log1p(u.radius / size))
        radius = np.where(size > 0, risen, u.radius**n)
    return Disc(value, radius + n * _ROUNDING * np.abs(value), None if u.low is None else np.power(u.low, n))


def _risen(value: Array, logarithm: Array, rise: Array) -> Array:
    """value (e^rise - 1); of a value that underflows with a rise that overflows too, from its logarithm."""
    return np.where(rise < 1.0, value * np.expm1(rise), np.exp(logarithm + rise))


def _exp(u: Disc) -> Disc:
    value = np.exp(u.centre)
    radius = np.where(u.radius < 1.0, value * np.expm1(u.radius), np.exp(u.centre + u.radius))
    low = np.exp(np.minimum(u.centre - u.radius, _LARGE)) if _is_wide(u) else None
    return Disc(value, radius + 2 * _ROUNDING * value, low)


def _is_wide(u: Disc) -> bool:
    """Whether an exponential of ``u`` varies so much, or is so large, that its disc gives no lower bound."""
    return bool(np.max(u.radius) > 0.3 or np.max(np.abs(u.centre)) > _LARGE)


def _sine(u: Disc, value: np.ndarray, quadrature: np.ndarray) -> Disc:
    radius = np.abs(value) * _cosh_minus_one(u.radius) + np.abs(quadrature) * np.sinh(u.radius)
    return Disc(value, radius + 2 * _ROUNDING * np.abs(value))


def _hyperbolic(u: Disc, value: np.ndarray, quadrature: np.ndarray) -> Disc:
    radius = np.abs(value) * _cosh_minus_one(u.radius) + np.abs(quadrature) * np.sinh(u.radius)
    low = np.sinh(np.clip(np.abs(u.centre) - u.radius, 0.0, _LARGE)) if _is_wide(u) else None
    return Disc(value, radius + 2 * _ROUNDING * np.abs(value), low)


def _cosh_minus_one(r: Array) -> Array:
    return 2.0 * np.sinh(0.5 * r) ** 2


def _tangent_slope(distance: Array, r: Array) -> Array:
    """sup 1/|cos|² if the nearest pole has the distance ``distance``."""
    return np.where(r < distance, 1.0 / np.sin(np.minimum(distance - r, np.pi / 2)) ** 2, np.inf)


def _to_multiple(c: Array) -> Array:
    """The distance to the nearest multiple of pi."""
    return np.abs(c - np.pi * np.round(c / np.pi))


def _tanh_slope(c: Array, r: Array) -> Array:
    """sup 1/|cosh|²: |cosh(x + iy)|² is sinh² x + cos² y."""
    inner = np.maximum(np.abs(c) - r, 0.0)
    below = np.maximum(np.sinh(inner) ** 2, np.where(r < np.pi / 2, np.cosh(inner) ** 2 - np.sin(r) ** 2, 0.0))
    return np.where(below > 0, 1.0 / below, np.inf)


def _erf_slope(c: Array, r: Array) -> Array:
    """sup of 2/√pi |exp(-z²)|: the largest y² - x² on the disc."""
    size = np.abs(c)
    return 2.0 / np.sqrt(np.pi) * np.exp(np.where(size >= 2 * r, -((size - r) ** 2), r * r - 0.5 * c * c))


def _over(*factors: Array) -> Array:
    """1 / the product of factors that must be positive; a repeated factor counts as a power."""
    product = reduce(np.multiply, factors)
    positive = reduce(np.logical_and, (np.greater(factor, 0) for factor in factors))
    return np.where(positive, 1.0 / product, np.inf)


def _erf(c: Array) -> Array:
    return special_functions()[sp.erf](c)


def _erfc(c: Array) -> Array:
    return special_functions()[sp.erfc](c)


def _atan2(y: Disc, x: Disc) -> Disc:
    both = y.radius + x.radius
    return Disc(np.arctan2(y.centre, x.centre), both * _over(np.hypot(y.centre, x.centre) - both) + 4 * _ROUNDING)


def _chosen(first: Array, u: Disc, v: Disc) -> Disc:
    return Disc(np.where(first, u.centre, v.centre), np.where(first, u.radius, v.radius))


def _remainder(u: Disc, v: Disc) -> Disc:
    count = np.floor(u.centre / v.centre)
    return Disc(u.centre - v.centre * count, u.radius + np.abs(count) * v.radius)


_ONE = Disc(1.0, 0.0)
_LOGICAL = (Relational, BooleanAtom, sp.And, sp.Or, sp.Not)

_COMPARED: dict[type, Callable] = {
    sp.Lt: np.less, sp.Le: np.less_equal, sp.Gt: np.greater, sp.Ge: np.greater_equal,
    sp.Eq: np.equal, sp.Ne: np.not_equal, sp.Not: np.logical_not,
    sp.And: lambda *parts: reduce(np.logical_and, parts), sp.Or: lambda *parts: reduce(np.logical_or, parts),
}  # fmt: skip

_FOLDED: dict[type, Callable[[Disc, Disc], Disc]] = {
    sp.Add: _sum, sp.Mul: _product,
    sp.Max: lambda u, v: _chosen(u.centre >= v.centre, u, v), sp.Min: lambda u, v: _chosen(u.centre <= v.centre, u, v),
}  # fmt: skip

_RULES: dict[type, Callable[..., Disc]] = {
    sp.exp: _exp,
    sp.sin: lambda u: _sine(u, np.sin(u.centre), np.cos(u.centre)),
    sp.cos: lambda u: _sine(u, np.cos(u.centre), np.sin(u.centre)),
    sp.sec: lambda u: _reciprocal(_sine(u, np.cos(u.centre), np.sin(u.centre))),
    sp.csc: lambda u: _reciprocal(_sine(u, np.sin(u.centre), np.cos(u.centre))),
    sp.sinh: lambda u: _hyperbolic(u, np.sinh(u.centre), np.cosh(u.centre)),
    sp.cosh: lambda u: _hyperbolic(u, np.cosh(u.centre), np.sinh(u.centre)),
    sp.sech: lambda u: _reciprocal(_hyperbolic(u, np.cosh(u.centre), np.sinh(u.centre))),
    sp.csch: lambda u: _reciprocal(_hyperbolic(u, np.sinh(u.centre), np.cosh(u.centre))),
    sp.Abs: lambda u: Disc(np.abs(u.centre), u.radius, u.low),
    sp.sign: lambda u: Disc(np.sign(u.centre), 0.0),
    sp.floor: lambda u: Disc(np.floor(u.centre), 0.0),
    sp.ceiling: lambda u: Disc(np.ceil(u.centre), 0.0),
    sp.frac: lambda u: _remainder(u, _ONE),
    sp.Mod: _remainder,
    sp.atan2: _atan2,
}  # fmt: skip

# The function, and the largest modulus of its derivative on the disc (c, r).
_SLOPES: dict[type, tuple[Callable, Callable[[Array, Array], Array]]] = {
    sp.tan: (np.tan, lambda c, r: _tangent_slope(_to_multiple(c - np.pi / 2), r)),
    sp.cot: (lambda c: 1.0 / np.tan(c), lambda c, r: _tangent_slope(_to_multiple(c), r)),
    sp.tanh: (np.tanh, _tanh_slope),
    sp.coth: (lambda c: 1.0 / np.tanh(c), lambda c, r: _over(np.sinh(np.maximum(np.abs(c) - r, 0.0)) ** 2)),
    sp.asin: (np.arcsin, lambda c, r: np.sqrt(_over(1 - c - r, 1 + c - r))),
    sp.acos: (np.arccos, lambda c, r: np.sqrt(_over(1 - c - r, 1 + c - r))),
    sp.atan: (np.arctan, lambda c, r: _over(np.hypot(1.0, c) - r) ** 2),
    sp.asinh: (np.arcsinh, lambda c, r: _over(np.hypot(1.0, c) - r)),
    sp.acosh: (np.arccosh, lambda c, r: np.sqrt(_over(c - r - 1, c - r + 1))),
    sp.atanh: (np.arctanh, lambda c, r: _over(1 - c - r, 1 + c - r)),
    sp.erf: (_erf, _erf_slope),
    sp.erfc: (_erfc, _erf_slope),
}  # fmt: skip


# Functions that end, with a finite value, where their slope is infinite: the real arguments that they take.
_ENDS: dict[type, tuple[float, float]] = {sp.asin: (-1.0, 1.0), sp.acos: (-1.0, 1.0), sp.acosh: (1.0, np.inf)}


def _of_real_values(kind: type, u: Disc, disc: Disc) -> Disc:
    """A disc with the real values alone: a function of ``_ENDS`` is monotone, and its ends bound it."""
    if kind not in _ENDS:
        return disc
    ends = (_SLOPES[kind][0](np.clip(end, *_ENDS[kind])) for end in (u.centre - u.radius, u.centre + u.radius))
    farthest = reduce(np.maximum, (np.abs(end - disc.centre) for end in ends))
    return Disc(disc.centre, np.fmin(disc.radius, farthest + 4 * _ROUNDING * np.abs(disc.centre)))


def _require_rules(expressions: Sequence[sp.Expr]) -> None:
    """Raises NoEnclosure for a function that the walk does not know."""
    known = {sp.Pow, sp.Piecewise, ExprCondPair, sp.Heaviside, sp.log, *_COMPARED, *_FOLDED, *_RULES, *_SLOPES}
    for node in {node for e in expressions for node in sp.preorder_traversal(e) if node.args and node.free_symbols}:
        if isinstance(node, Schedule):
            if node.order and node.table is None:
                raise NoEnclosure(f"{node} is the derivative of a schedule without a formula.")
        elif type(node) not in known and type(node) not in special_functions():
            raise NoEnclosure(f"{node}: no bounds of {type(node).__name__} are known.")
