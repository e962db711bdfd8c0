"""Finds a and b of an affine drift f = a(t) x + b(t), or that f is not affine.

The second derivative alone is not a test: it is zero almost everywhere for ``Abs(x)``, ``Max(x, 0)`` or a
``Piecewise`` with x in its conditions. So functions with a kink in x are found first. Then a and b are read from
the sums and products as they are written. If this is not possible, as for (x + 1)² - x², they come from
derivatives, whose slope must not depend on x, exactly.
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

    A Piecewise counts if the state is in its conditions; if they contain only t, its branches decide.
    """
    for node in sp.preorder_traversal(f):
        if isinstance(node, _KINKED) and node.has(*state):
            return node
    return None


def affine_split(f: sp.Expr, state: Sequence[sp.Symbol]) -> Split | None:
    """``(slopes, b)`` with f = Σ slope_i(t) state_i + b(t) identically, or None if f is not affine in the state.

    None also if f is not written as sums and products of affine terms, and SymPy needs too long to decide.
    """
    if not f.has(*state):
        return _constant(f, state)
    if kink_in_state(f, state) is not None:
        return None
    return _read(f, tuple(state)) or patiently(_differentiated, f, tuple(state))


def _constant(f: sp.Expr, state: Sequence[sp.Symbol]) -> Split:
    return (sp.Integer(0),) * len(state), f


def _read(f: sp.Expr, state: tuple[sp.Symbol, ...]) -> Split | None:
    """The split of f as it is written: sums, multiples and Piecewise of affine terms; None for anything else."""
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
    """The splits of all parts, or None if one has none."""
    found = []
    for part in parts:
        split = _read(part, state)
        if split is None:
            return None
        found.append(split)
    return found


def _piecewise(values: Sequence[sp.Expr], conditions: Sequence[sp.Basic]) -> sp.Expr:
    """A Piecewise, unevaluated for compound conditions, which SymPy would solve for their symbol; this may be slow."""
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
        return None  # such as atan(tan(x)), with slope 1 and jumps
    offset = f.subs(dict.fromkeys(state, 0))
    finite = offset.is_finite is not False and not offset.has(sp.nan, sp.zoo, sp.oo, -sp.oo)
    return tuple(slopes), offset if finite else sp.simplify(rest)


def _is_constant_at_probes(expr: sp.Expr, state: Sequence[sp.Symbol]) -> bool:
    """Whether ``expr`` is equal at a few states; for most nonlinear drifts it is not, and no ``simplify`` is needed."""
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
