"""Values of expressions in SymPy's own arithmetic, for proofs and messages only: it is slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy as sp

from sdeflow.symbolic.patience import patiently, within

__all__ = ["numbers_at", "rationalised", "value_at"]

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


def _value_at(expr: sp.Expr, at: Point, digits: int | None) -> sp.Expr:
    value = expr.subs(at)
    return value if digits is None else value.evalf(digits)


def _numbers_at(expressions: list[sp.Expr], at: Point) -> list[sp.Expr]:
    return [sp.re(e.subs(at).evalf(40)) for e in expressions]
