"""Tells an affine drift f = a(t) x + b(t) from any other.

The second derivative alone is not a test: it vanishes almost everywhere for ``Abs(x)``, ``Max(x, 0)``
or a ``Piecewise`` whose conditions hold x. So functions with a kink in x are named first. Then a and b are
read off the sums and products as they stand; where that does not do, as for (x + 1)² - x², by derivatives,
whose slope must be free of x, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom

from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.symbols import t

__all__ = ["affine_split", "kink_in_state"]

_KINKED = (
    sp.Abs, sp.Max, sp.Min, sp.sign, sp.floor, sp.ceiling, sp.frac, sp.Mod, sp.Heaviside, sp.DiracDelta,
    sp.re, sp.im, sp.arg, sp.conjugate, Relational,
)  # fmt: skip

Split = tuple[tuple[sp.Expr, ...], sp.Expr]


def kink_in_state(f: sp.Expr, state: Sequence[sp.Symbol]) -> sp.Basic | None:
    """The first sub-expression of ``f`` that is not smooth in the state, or None.

    A Piecewise counts through its conditions: if they hold t alone, its branches decide.
    """
    for node in sp.preorder_traversal(f):
        if isinstance(node, _KINKED) and node.has(*state):
            return node
    return None


def affine_split(f: sp.Expr, state: Sequence[sp.Symbol]) -> Split | None:
    """``(slopes, b)`` with f = Σ slope_i(t) state_i + b(t) identically, or None where f is not affine in the state.

    None also where f is not written as sums and products of affine terms, and SymPy needs too long to tell.
    """
    if not f.has(*state):
        return _constant(f, state)
    if kink_in_state(f, state) is not None:
        return None
    return _read(f, tuple(state)) or patiently(_differentiated, f, tuple(state))


def _constant(f: sp.Expr, state: Sequence[sp.Symbol]) -> Split:
    return (sp.Integer(0),) * len(state), f


def _read(f: sp.Expr, state: tuple[sp.Symbol, ...]) -> Split | None:
    """The split as f is written: sums of affine terms, multiples of one, Piecewise of them; None for anything else."""
    if not f.has(*state):
        return _constant(f, state)
    if f in state:
        return tuple(sp.Integer(f == component) for component in state), sp.Integer(0)
    if isinstance(f, sp.Mul):
        varying = [factor for factor in f.args if factor.has(*state)]
        inner = _read(varying[0], state) if len(varying) == 1 else None
        if inner is None:
            return None
        scale = sp.Mul(*(factor for factor in f.args if factor is not varying[0]))
        return tuple(scale * slope for slope in inner[0]), scale * inner[1]
    if isinstance(f, sp.Add):
        parts = _read_all(f.args, state)
        if parts is None:
            return None
        slopes = zip(*(slopes for slopes, _ in parts), strict=True)
        return tuple(sp.Add(*column) for column in slopes), sp.Add(*(b for _, b in parts))
    if isinstance(f, sp.Piecewise):
        parts = _read_all([value for value, _ in f.args], state)
        if parts is None:
            return None
        conditions = [condition for _, condition in f.args]
        slopes = zip(*(slopes for slopes, _ in parts), strict=True)
        return tuple(_piecewise(c, conditions) for c in slopes), _piecewise([b for _, b in parts], conditions)
    return None


def _read_all(parts: Sequence[sp.Expr], state: tuple[sp.Symbol, ...]) -> list[Split] | None:
    """The split of each, or None where one has none."""
    found = []
    for part in parts:
        split = _read(part, state)
        if split is None:
            return None
        found.append(split)
    return found


def _piecewise(values: Sequence[sp.Expr], conditions: Sequence[sp.Basic]) -> sp.Expr:
    """The values under their conditions; SymPy solves compound ones for their symbol if it may, which can take long."""
    simple = all(isinstance(condition, Relational | BooleanAtom) for condition in conditions)
    pairs = zip(values, conditions, strict=True)
    return sp.Piecewise(*pairs) if simple else sp.Piecewise(*pairs, evaluate=False)


def _differentiated(f: sp.Expr, state: tuple[sp.Symbol, ...]) -> Split | None:
    """The split by derivatives in the state."""
    slopes = []
    for component in state:
        slope = sp.diff(f, component)
        if slope.has(*state):
            slope = sp.expand(slope)
        if slope.has(*state) and _is_constant_at_probes(slope, state):
            slope = sp.simplify(slope)
        if slope.has(*state):
            return None
        slopes.append(slope)
    rest = f - sum(slope * component for slope, component in zip(slopes, state, strict=True))
    if not f.is_polynomial(*state) and not _is_constant_at_probes(rest, state):
        return None  # such as atan(tan(x)): slope 1, with jumps
    offset = f.subs(dict.fromkeys(state, 0))
    finite = offset.is_finite is not False and not offset.has(sp.nan, sp.zoo, sp.oo, -sp.oo)
    return tuple(slopes), offset if finite else sp.simplify(rest)


def _is_constant_at_probes(expr: sp.Expr, state: Sequence[sp.Symbol]) -> bool:
    """Whether ``expr`` takes one value at a few states: most nonlinear drifts end here, before any ``simplify``."""
    others = sorted(expr.free_symbols - {*state, t}, key=str)
    fixed = {symbol: sp.Float(0.7) + sp.Float(0.1) * i for i, symbol in enumerate(others)}
    fixed[t] = sp.Rational(37, 100)
    values = []
    for n in (-57, 3, 11, 29, 47):
        point = {component: sp.Rational(n + 5 * i * i, 16) for i, component in enumerate(state)}
        values.append(expr.subs({**fixed, **point}).evalf(30))
    if not all(value.is_number and value.is_finite for value in values):
        return False
    return all(abs(value - values[0]) <= 1e-15 * (1 + abs(values[0])) for value in values)
