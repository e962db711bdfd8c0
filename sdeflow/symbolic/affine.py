"""Tells an affine drift f = a(t) x + b(t) from any other.

The second derivative alone is not a test: it vanishes almost everywhere for ``Abs(x)``, ``Max(x, 0)``
or a ``Piecewise`` whose conditions hold x. So functions with a kink in x are named first, and what is
left must have a slope free of x, exactly.
"""

from __future__ import annotations

import sympy as sp
from sympy.core.relational import Relational

from sdeflow.symbolic.symbols import t, x

__all__ = ["AffineDrift", "affine_split", "kink_in_state"]

_KINKED = (
    sp.Abs, sp.Max, sp.Min, sp.sign, sp.floor, sp.ceiling, sp.frac, sp.Mod, sp.Heaviside, sp.DiracDelta,
    sp.re, sp.im, sp.arg, sp.conjugate, Relational,
)  # fmt: skip

AffineDrift = tuple[sp.Expr, sp.Expr]


def kink_in_state(f: sp.Expr) -> sp.Basic | None:
    """The first sub-expression of ``f`` that is not smooth in x, or None.

    A Piecewise counts through its conditions: if they hold t alone, its branches decide.
    """
    for node in sp.preorder_traversal(f):
        if isinstance(node, _KINKED) and node.has(x):
            return node
    return None


def affine_split(f: sp.Expr) -> AffineDrift | None:
    """``(a, b)`` with f = a(t) x + b(t) identically, or None where f is not affine in x."""
    if not f.has(x):
        return sp.Integer(0), f
    if kink_in_state(f) is not None:
        return None
    slope = sp.diff(f, x)
    if slope.has(x):
        slope = sp.expand(slope)
    if slope.has(x) and _is_constant_at_probes(slope):
        slope = sp.simplify(slope)
    if slope.has(x):
        return None
    rest = f - slope * x
    if not f.is_polynomial(x) and not _is_constant_at_probes(rest):
        return None  # such as atan(tan(x)): slope 1, with jumps
    offset = f.subs(x, 0)
    return slope, offset if offset.is_finite is not False and not offset.has(sp.nan) else sp.simplify(rest)


def _is_constant_at_probes(expr: sp.Expr) -> bool:
    """Whether ``expr`` takes one value at a few x: most nonlinear drifts end here, before any ``simplify``."""
    others = sorted(expr.free_symbols - {x, t}, key=str)
    fixed = {symbol: sp.Float(0.7) + sp.Float(0.1) * i for i, symbol in enumerate(others)}
    fixed[t] = sp.Rational(37, 100)
    values = [expr.subs({**fixed, x: sp.Rational(n, 16)}).evalf(30) for n in (-57, 3, 11, 29, 47)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    return all(abs(value - values[0]) <= 1e-15 * (1 + abs(values[0])) for value in values)
