"""SymPy expressions evaluated by NumPy, node by node, at arrays of points: an independent reading of a declaration.

It shares no code with the compiler that solvers use (``sdeflow.numerics.compile``), rewrites nothing and interpolates
nothing, so that the two can be compared. Special functions come from mpmath in double precision, one number at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial, reduce
from typing import NamedTuple

import mpmath
import numpy as np
import sympy as sp
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom

from sdeflow.errors import DeclarationError
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.patience import time_left
from sdeflow.symbolic.schedule import Schedule
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Declared", "OutOfTime", "UnknownValue", "evaluate", "in_digits", "number_at", "require_time"]

DIFFERENCES = tuple(
    (sign * o, sign * w) for o, w in ((1, 4 / 5), (2, -1 / 5), (3, 4 / 105), (4, -1 / 280)) for sign in (1, -1)
)
"""The central difference of eighth order: (offset, weight)."""

Value = np.ndarray | float


class UnknownValue(DeclarationError):
    """A value that only the code under test could give."""


class OutOfTime(UnknownValue):
    """A value for which no processor time is left: nothing follows from it."""


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


def evaluate(expr: sp.Basic, at: Mapping[sp.Expr, Value]) -> np.ndarray:
    """``expr`` at the given values of its symbols, which broadcast, in float64; NaN at points where it is not real.

    Raises:
        UnknownValue: if neither NumPy, mpmath nor SymPy can evaluate a function, or if a deadline has passed.
    """
    require_time()
    shape = np.broadcast_shapes(*{np.shape(value) for value in at.values()})
    with np.errstate(all="ignore"):
        return np.broadcast_to(np.asarray(_program(expr)(at), dtype=np.float64), shape)


def require_time() -> None:
    """Raises an OutOfTime error if the deadline has passed."""
    if time_left() <= 0:
        raise OutOfTime("the processor time allowed for all of this has run out.")


Step = Callable[[list[Value]], Value]


class _Program(NamedTuple):
    """An expression as steps, inner nodes first and each node once."""

    steps: tuple[tuple[Step | sp.Expr, tuple[int, ...], tuple[int, ...]], ...]
    """A function, or what is given with the point; the steps whose values it takes, and those no later step takes."""

    def __call__(self, at: Mapping[sp.Expr, Value]) -> Value:
        values: list[Value] = []
        for step, taken, last in self.steps:
            values.append(_given(step, at) if isinstance(step, sp.Expr) else step([values[i] for i in taken]))
            for i in last:
                values[i] = 0.0  # values of many entries at many times take much memory
        return values[-1]


def _given(expr: sp.Expr, at: Mapping[sp.Expr, Value]) -> Value:
    if expr not in at and isinstance(expr, AppliedUndef):
        raise UnknownValue(f"the function {expr.func.__name__} cannot be evaluated.")
    return at[expr]


@lru_cache(maxsize=512)
def _program(expr: sp.Basic) -> _Program:
    """What to compute for ``expr``: the questions to SymPy are asked once, not at each evaluation."""
    places: dict[sp.Basic, int] = {}
    nodes: list[tuple[Step | sp.Expr, tuple[int, ...]]] = []

    def place(node: sp.Basic) -> int:
        if node not in places:
            step, arguments = _step(node)
            nodes.append((step, tuple([place(argument) for argument in arguments])))
            places[node] = len(nodes) - 1
        return places[node]

    place(expr)
    last = {i: at for at, (_, taken) in enumerate(nodes) for i in taken}
    gone: list[list[int]] = [[] for _ in nodes]
    for i, at in last.items():
        gone[at].append(i)
    return _Program(tuple((*node, tuple(i)) for node, i in zip(nodes, gone, strict=True)))


def _step(expr: sp.Basic) -> tuple[Step | sp.Expr, tuple[sp.Basic, ...]]:
    """The function of its arguments that a node is, and these."""
    if isinstance(expr, sp.Symbol) or (isinstance(expr, AppliedUndef) and not isinstance(expr, Schedule)):
        return expr, ()
    if isinstance(expr, BooleanAtom):
        truth = bool(expr)
        return lambda _: truth, ()
    if not expr.free_symbols and not isinstance(expr, Relational) and not expr.has(Schedule):
        constant = expr.evalf(20)
        number = math.nan if constant.is_extended_real is False else float(constant)  # as on a branch never taken
        return lambda _: number, ()
    if isinstance(expr, sp.Derivative | sp.Subs):  # as of a floor
        raise UnknownValue(f"{expr} cannot be evaluated.")
    if isinstance(expr, sp.Piecewise):
        return _selected, tuple(part for branch in expr.args for part in branch)
    function = expr.func
    if function in _FOLDED:
        return partial(reduce, _FOLDED[function]), expr.args
    if function in _PLAIN:
        plain = _PLAIN[function]
        return lambda arguments: plain(*arguments), expr.args
    if isinstance(expr, Schedule):
        return partial(_of_schedule, expr), expr.args
    special = np.vectorize(lambda *numbers: _one(expr, numbers), otypes=[np.float64])
    return lambda arguments: special(*arguments), expr.args


def _selected(arguments: list[Value]) -> Value:
    """Of branches and their conditions in turn the first branch that is taken."""
    shape = np.broadcast(*arguments).shape
    parts = [np.broadcast_to(part, shape) for part in arguments]
    return np.select(parts[1::2], parts[::2], default=np.nan)


def _of_schedule(expr: Schedule, arguments: list[Value]) -> Value:
    if not expr.known:
        raise UnknownValue(f"{expr} is the derivative of a schedule without a formula.")
    times = np.asarray(arguments[0], dtype=np.float64)
    return expr.values(times.reshape(-1)).reshape(times.shape)


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


def in_digits(
    declaration: Declaration, numbers: dict[sp.Symbol, float], times: np.ndarray, states: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """f (n, k) and g gᵀ (n, k, k) in 30 digits."""
    values = []
    for at, state in zip(times, states, strict=True):
        point = {**numbers, **dict(zip(declaration.state, state, strict=True))}
        values.append([number_at(e, point, at) for e in (*declaration.drifts, *declaration.diffusions)])
    k = len(declaration.state)
    f, g = np.split(np.array(values), [k], axis=1)
    g = g.reshape(len(times), k, -1)
    return f, g @ _transposed(g)


def number_at(expr: sp.Expr, numbers: Mapping[sp.Symbol, float], at: float) -> float:
    """``expr`` in 30 digits; by NumPy if it contains a function without a formula.

    By mpmath with 45 digits and with 65: where these agree in 30, that is the number. Where they do not, SymPy's own
    evaluation of numbers of 80 digits decides; it takes some thirty times as long.
    """
    require_time()
    point = {**numbers, time_symbol: float(at)}
    if expr.has(Schedule):
        return float(evaluate(expr, point))
    try:
        some, more = (_Digits(context, point)(expr) for context in _CONTEXTS)
        if abs(some - more) <= 1e-30 * abs(more) and mpmath.isfinite(more):
            return float(more)
    except (_Unsure, ArithmeticError, TypeError):  # TypeError: a comparison of what is not real
        pass
    value = expr.xreplace({symbol: sp.Float(float(number), 80) for symbol, number in point.items()})
    value = value.evalf(30)
    if not value.is_number or not value.is_real:
        return float(evaluate(expr, point))
    return float(value)


class _Unsure(Exception):
    """A value that SymPy is asked for."""


def _context(digits: int) -> mpmath.MPContext:
    context = mpmath.MPContext()
    context.dps = digits
    return context


_CONTEXTS = _context(45), _context(65)
_BY_NAME = {
    sp.exp, sp.log, sp.sin, sp.cos, sp.tan, sp.asin, sp.acos, sp.atan, sp.atan2,
    sp.sinh, sp.cosh, sp.tanh, sp.asinh, sp.acosh, sp.atanh, sp.erf, sp.erfc,
}  # fmt: skip
_CONSTANTS = {sp.pi: "pi", sp.E: "e"}
_SIDES: dict[type, Callable[[bool, bool], bool]] = {  # of (less, equal)
    sp.Lt: lambda less, equal: less, sp.Le: lambda less, equal: less or equal,
    sp.Gt: lambda less, equal: not (less or equal), sp.Ge: lambda less, equal: not less,
    sp.Eq: lambda less, equal: equal, sp.Ne: lambda less, equal: not equal,
}  # fmt: skip


class _Digits:
    """A walk over an expression in the numbers of one of mpmath's contexts; a part that occurs twice is read once."""

    def __init__(self, context: mpmath.MPContext, point: Mapping[sp.Symbol, float]) -> None:
        self.context = context
        self.known: dict[sp.Basic, mpmath.mpf] = {
            symbol: context.mpf(float(number)) for symbol, number in point.items()
        }

    def __call__(self, expr: sp.Basic) -> mpmath.mpf:
        if expr not in self.known:
            value = self._value(expr)
            if not isinstance(value, self.context.mpf):
                raise _Unsure
            self.known[expr] = value
        return self.known[expr]

    def _value(self, expr: sp.Basic) -> mpmath.mpf:
        context, function = self.context, expr.func
        if isinstance(expr, sp.Rational):
            return context.mpf(expr.p) / expr.q
        if isinstance(expr, sp.Float):
            return context.make_mpf(expr._mpf_)
        if expr in _CONSTANTS:
            return +getattr(context, _CONSTANTS[expr])
        if isinstance(expr, sp.Piecewise):
            return self(next((branch for branch, condition in expr.args if self._holds(condition)), sp.nan))
        if function is sp.Pow and isinstance(expr.exp, sp.Integer):
            return self(expr.base) ** int(expr.exp)
        arguments = [self(argument) for argument in expr.args]
        if function is sp.Add:
            return context.fsum(arguments)
        if function is sp.Mul:
            return context.fprod(arguments)
        if function is sp.Pow:
            return context.power(*arguments)
        if function is sp.Abs:
            return abs(arguments[0])
        if function in (sp.Max, sp.Min):
            return (max if function is sp.Max else min)(arguments)
        if function in _BY_NAME:
            return getattr(context, function.__name__)(*arguments)
        raise _Unsure

    def _holds(self, condition: sp.Basic) -> bool:
        if isinstance(condition, BooleanAtom):
            return bool(condition)
        if isinstance(condition, sp.And | sp.Or):
            return (all if isinstance(condition, sp.And) else any)(map(self._holds, condition.args))
        if condition.func not in _SIDES:
            raise _Unsure
        left, right = self(condition.lhs), self(condition.rhs)
        if left != right and abs(left - right) <= 1e-30 * (abs(left) + abs(right)):
            raise _Unsure  # rounding decides
        return _SIDES[condition.func](left < right, left == right)


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return matrices.swapaxes(-1, -2)
