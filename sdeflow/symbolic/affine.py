"""Tells an affine drift f = a(t) x + b(t) from any other.

The second derivative alone is not a test: it vanishes almost everywhere for ``Abs(x)``, ``Max(x, 0)``
or a ``Piecewise`` whose conditions hold x. So functions with a kink in x are named first, and what is
left must have a slope free of x, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp
from sympy.core.relational import Relational

from sdeflow.symbolic.symbols import t

__all__ = ["affine_split", "kink_in_state"]

_KINKED = (
    sp.Abs, sp.Max, sp.Min, sp.sign, sp.floor, sp.ceiling, sp.frac, sp.Mod, sp.Heaviside, sp.DiracDelta,
    sp.re, sp.im, sp.arg, sp.conjugate, Relational,
)  # fmt: skip


def kink_in_state(f: sp.Expr, state: Sequence[sp.Symbol]) -> sp.Basic | None:
    """The first sub-expression of ``f`` that is not smooth in the state, or None.

    A Piecewise counts through its conditions: if they hold t alone, its branches decide.
    """
    for node in sp.preorder_traversal(f):
        if isinstance(node, _KINKED) and node.has(*state):
            return node
    return None


def affine_split(f: sp.Expr, state: Sequence[sp.Symbol]) -> tuple[tuple[sp.Expr, ...], sp.Expr] | None:
    """``(slopes, b)`` with f = Σ slope_i(t) state_i + b(t) identically, or None where f is not affine in the state."""
    if not f.has(*state):
        return (sp.Integer(0),) * len(state), f
    if kink_in_state(f, state) is not None:
        return None
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
