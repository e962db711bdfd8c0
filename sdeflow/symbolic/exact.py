"""Values of expressions in SymPy's own arithmetic, for proofs and messages only: it is slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy as sp
from sympy.functions.elementary.piecewise import ExprCondPair
from sympy.logic.boolalg import Boolean

from sdeflow.symbolic.patience import patiently, within

__all__ = ["numbers_at", "rationalised", "value_at", "without_poles"]

_FINITE = (
    sp.Symbol, sp.NumberSymbol, sp.Add, sp.Mul, sp.exp, sp.sin, sp.cos, sp.sinh, sp.cosh, sp.tanh, sp.atan, sp.asinh,
    sp.erf, sp.erfc, sp.Abs, sp.sign, sp.Heaviside, sp.floor, sp.ceiling, sp.frac, sp.Max, sp.Min, sp.Piecewise,
    ExprCondPair, Boolean,
)  # fmt: skip

Point = Mapping[sp.Symbol, float | sp.Expr]


def value_at(expr: sp.Expr, at: Point, digits: int | None = None) -> sp.Expr:
    """``expr`` at values of its symbols, exact or to some digits; NaN if SymPy fails or needs too long."""
    huge = any(power.exp.free_symbols & at.keys() for power in expr.atoms(sp.Pow))  # such as 999**(6 * 1000**2)
    if huge:
        found = within(0.2, _value_at, expr, dict(at), digits)
        return sp.nan if found is None else found
    return patiently(_value_at, expr, dict(at), digits, otherwise=sp.nan, seconds=0.2)


def numbers_at(expressions: Sequence[sp.Expr], at: Point) -> list[sp.Expr]:
    """The real parts of the expressions at values of their symbols, in 40 digits; NaN if that takes too long."""
    return patiently(_numbers_at, list(expressions), dict(at), otherwise=[sp.nan] * len(expressions))


def rationalised(expr: sp.Expr) -> sp.Expr:
    """``expr`` with its floats as exact rationals, 0.1 as 1/10, because SymPy does not cancel floats."""
    floats = {number: sp.Rational(str(number)) for number in expr.atoms(sp.Float)}
    return expr.xreplace(floats)


def without_poles(expr: sp.Basic) -> bool:
    """Whether ``expr`` is finite for all finite values of its symbols, as its parts show: none of them has a pole."""
    return all(map(_is_finite, sp.preorder_traversal(expr)))


def _is_finite(node: sp.Basic) -> bool:
    """Whether a node is finite where its arguments are."""
    if isinstance(node, sp.Pow):
        return (node.exp.is_Rational and node.exp > 0) or (node.base.is_Rational and node.base > 0)
    return isinstance(node, _FINITE) or (isinstance(node, sp.Number) and node.is_finite)


def _value_at(expr: sp.Expr, at: Point, digits: int | None) -> sp.Expr:
    value = expr.subs(at)
    return value if digits is None else value.evalf(digits)


def _numbers_at(expressions: list[sp.Expr], at: Point) -> list[sp.Expr]:
    return [sp.re(e.subs(at).evalf(40)) for e in expressions]
