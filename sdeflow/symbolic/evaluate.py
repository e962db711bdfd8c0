"""SymPy expressions evaluated by NumPy, node by node, at arrays of points: an independent reading of a declaration.

It shares no code with the compiler that solvers use (``sdeflow.numerics.compile``), rewrites nothing and interpolates
nothing, so that the two can be compared. Special functions come from mpmath in double precision, one number at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

import mpmath
import numpy as np
import sympy as sp
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom

from sdeflow.errors import DeclarationError
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.patience import time_left
from sdeflow.symbolic.schedule import Schedule
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Declared", "UnknownValue", "by_sympy", "evaluate", "number_at", "require_time"]

DIFFERENCES = tuple(
    (sign * o, sign * w) for o, w in ((1, 4 / 5), (2, -1 / 5), (3, 4 / 105), (4, -1 / 280)) for sign in (1, -1)
)
"""The central difference of eighth order: (offset, weight)."""

Value = np.ndarray | float


class UnknownValue(DeclarationError):
    """A value that only the code under test could give."""


_FOLDED: dict[type, Callable[..., np.ndarray]] = {
    sp.Add: np.add, sp.Mul: np.multiply, sp.Max: np.maximum, sp.Min: np.minimum,
    sp.And: np.logical_and, sp.Or: np.logical_or,
}  # fmt: skip

_PLAIN: dict[type, Callable[..., np.ndarray]] = {
    sp.Pow: np.power, sp.Not: np.logical_not, sp.Mod: np.mod,
    sp.Lt: np.less, sp.Le: np.less_equal, sp.Gt: np.greater, sp.Ge: np.greater_equal,
    sp.Eq: np.equal, sp.Ne: np.not_equal,
    sp.exp: np.exp, sp.log: np.log, sp.Abs: np.abs, sp.sign: np.sign,
    sp.sin: np.sin, sp.cos: np.cos, sp.tan: np.tan, sp.asin: np.arcsin, sp.acos: np.arccos, sp.atan: np.arctan,
    sp.sinh: np.sinh, sp.cosh: np.cosh, sp.tanh: np.tanh,
    sp.asinh: np.arcsinh, sp.acosh: np.arccosh, sp.atanh: np.arctanh, sp.atan2: np.arctan2,
    sp.sech: lambda u: 1.0 / np.cosh(u), sp.csch: lambda u: 1.0 / np.sinh(u), sp.coth: lambda u: 1.0 / np.tanh(u),
    sp.sec: lambda u: 1.0 / np.cos(u), sp.csc: lambda u: 1.0 / np.sin(u), sp.cot: lambda u: 1.0 / np.tan(u),
    sp.floor: np.floor, sp.ceiling: np.ceil, sp.frac: lambda u: u - np.floor(u),
    sp.Heaviside: np.heaviside,
}  # fmt: skip

_SPECIAL: dict[str, Callable[..., float]] = {
    "lowergamma": lambda a, z: mpmath.fp.gammainc(a, 0.0, z),
    "uppergamma": mpmath.fp.gammainc,
    "LambertW": lambda z, k=0: mpmath.fp.lambertw(z, int(k)).real,
}


def evaluate(expr: sp.Basic, at: Mapping[sp.Symbol, Value]) -> np.ndarray:
    """``expr`` at the given values of its symbols, which broadcast, in float64; NaN at points where it is not real.

    Raises:
        UnknownValue: if neither NumPy, mpmath nor SymPy can evaluate a function, or if a deadline has passed.
    """
    require_time()
    shape = np.broadcast_shapes(*(np.shape(value) for value in at.values()))
    with np.errstate(all="ignore"):
        return np.broadcast_to(np.asarray(_walk(expr, at), dtype=np.float64), shape)


def require_time() -> None:
    """Raises an UnknownValue if the deadline has passed."""
    if time_left() <= 0:
        raise UnknownValue("the processor time allowed for all of this has run out.")


def _walk(expr: sp.Basic, at: Mapping[sp.Symbol, Value]) -> Value:
    if expr in at:
        return at[expr]
    if isinstance(expr, BooleanAtom):
        return bool(expr)
    if not expr.free_symbols and not isinstance(expr, Relational) and not expr.has(Schedule):
        return float(expr.evalf(20))
    if isinstance(expr, sp.Piecewise):
        branches, conditions = zip(*((_walk(e, at), _walk(c, at)) for e, c in expr.args), strict=True)
        shape = np.broadcast(*branches, *conditions).shape
        values, taken = ([np.broadcast_to(part, shape) for part in parts] for parts in (branches, conditions))
        return np.select(taken, values, default=np.nan)
    arguments = [_walk(argument, at) for argument in expr.args]
    if expr.func in _FOLDED:
        return reduce(_FOLDED[expr.func], arguments)
    if expr.func in _PLAIN:
        return _PLAIN[expr.func](*arguments)
    if isinstance(expr, Schedule):
        if not expr.known:
            raise UnknownValue(f"{expr} is the derivative of a schedule without a formula.")
        return expr.values(np.asarray(arguments[0], dtype=np.float64).reshape(-1)).reshape(np.shape(arguments[0]))
    return np.vectorize(lambda *numbers: _one(expr, numbers), otypes=[np.float64])(*arguments)


def _one(expr: sp.Basic, numbers: tuple[float, ...]) -> float:
    """A special function of numbers."""
    require_time()
    name = expr.func.__name__
    function = _SPECIAL.get(name) or getattr(mpmath.fp, name, None)
    try:
        value = function(*map(float, numbers)) if function else expr.func(*map(float, numbers)).evalf(17)
    except (OverflowError, ZeroDivisionError):  # an intermediate result is too large for doubles
        if not hasattr(mpmath, name):
            return math.nan
        value = getattr(mpmath, name)(*map(float, numbers))
    try:
        return float(value)
    except TypeError:
        if isinstance(value, sp.Basic) and not value.is_number:
            raise UnknownValue(f"the function {name} cannot be evaluated.") from None
        return math.nan  # not real


class Declared:
    """f and g gᵀ as declared, at states (n, k) and times (n,) or at one time."""

    def __init__(self, declaration: Declaration, numbers: dict[sp.Symbol, float]) -> None:
        self.declaration, self.numbers, self.k = declaration, numbers, len(declaration.state)

    def _at(self, expressions: tuple[sp.Expr, ...], x: np.ndarray, at: np.ndarray | float) -> np.ndarray:
        point = {**self.numbers, **dict(zip(self.declaration.state, x.T, strict=True)), time_symbol: at}
        return np.stack([evaluate(e, point) for e in expressions], axis=-1)

    def f(self, x: np.ndarray, at: np.ndarray | float) -> np.ndarray:
        """The drift, (n, k)."""
        return self._at(self.declaration.drifts, x, at)

    def gram(self, x: np.ndarray, at: np.ndarray | float) -> np.ndarray:
        """g gᵀ, (n, k, k)."""
        g = self._at(self.declaration.diffusions, x, at).reshape(len(x), self.k, -1)
        return g @ _transposed(g)

    def affine(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """F, b and g gᵀ of an affine SDE at times (n,), from differences of f between unit states."""
        plus, minus = (
            [self.f(np.tile(sign * unit, (len(times), 1)), times) for unit in np.eye(self.k)] for sign in (1, -1)
        )
        F = np.stack([0.5 * (p - m) for p, m in zip(plus, minus, strict=True)], axis=-1)
        b = self.f(np.zeros((len(times), self.k)), times)
        b = np.where(np.isfinite(b), b, 0.5 * (plus[0] + minus[0]))  # f may be written so that it is 0/0 at x = 0
        return F, b, self.gram(np.ones((len(times), self.k)), times)

    def local(self, x: np.ndarray, at: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """f, g gᵀ, the divergence of g gᵀ by differences, and the size of the terms, for the drifts of an equation."""
        f, Q, dQ = self.f(x, at), self.gram(x, at), np.zeros_like(x)
        if self.declaration.state_dependent_noise:
            h = 2e-3 * (0.2 + abs(x))
            dQ = self._divergence(x, at, h)
            for shorter in (8.0, 64.0):  # near a state where g is singular: until two steps agree
                finer = self._divergence(x, at, h / shorter)
                dQ = np.where(abs(finer - dQ) <= 1e-9 * (abs(finer) + abs(Q).sum(-1)), dQ, finer)
        return f, Q, dQ, abs(f) + abs(dQ) + abs(Q).sum(-1)

    def _divergence(self, x: np.ndarray, at: float, h: np.ndarray) -> np.ndarray:
        """∇·(g gᵀ), (n, k), by differences with the steps ``h``."""
        out = np.zeros_like(x)
        for j in range(self.k):
            move = np.eye(self.k)[j] * h
            rise = reduce(np.add, [w * self.gram(x + o * move, at) for o, w in DIFFERENCES])
            out += rise[:, :, j] / h[:, j : j + 1]
        return out


def by_sympy(
    declaration: Declaration, numbers: dict[sp.Symbol, float], times: np.ndarray, states: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """f (n, k) and g gᵀ (n, k, k) in SymPy's own arithmetic."""
    values = []
    for at, state in zip(times, states, strict=True):
        point = {**numbers, **dict(zip(declaration.state, state, strict=True))}
        values.append([number_at(e, point, at) for e in (*declaration.drifts, *declaration.diffusions)])
    k = len(declaration.state)
    f, g = np.split(np.array(values), [k], axis=1)
    g = g.reshape(len(times), k, -1)
    return f, g @ _transposed(g)


def number_at(expr: sp.Expr, numbers: dict[sp.Symbol, float], at: float) -> float:
    """``expr`` in 30 digits by SymPy; by NumPy if it contains a function without a formula."""
    require_time()
    point = {**numbers, time_symbol: float(at)}
    if expr.has(Schedule):
        return float(evaluate(expr, point))
    value = expr.xreplace({symbol: sp.Float(float(number), 30) for symbol, number in point.items()})
    value = value.evalf(30)
    if not value.is_number or not value.is_real:
        return float(evaluate(expr, point))
    return float(value)


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return matrices.swapaxes(-1, -2)
