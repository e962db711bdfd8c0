"""Hidden squares under a root: sqrt(t**2 - 2*t/3 + 1/9) is |t - 1/3|, with a kink at 1/3.

In the form in which it is declared, such a root cannot be differentiated at its zero, and panels cannot resolve it
unless they end there. So a declaration is read with the square taken out of the root. Every symbol stands for a real
number: SymPy writes the root of u² as |u| if it knows that u is real. Otherwise it keeps (u**2)**(1/2), which is the
same.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp

from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.patience import patiently

__all__ = ["is_even_root", "with_squares_read"]

_SECONDS = 0.2
_LARGEST_POWER = 8


def is_even_root(expr: sp.Basic) -> bool:
    """Whether ``expr`` is a root of an even power, such as (u**2)**(1/2): |u| to some power."""
    return isinstance(expr, sp.Pow) and expr.base.is_Pow and expr.base.exp.is_even and expr.exp.is_integer is False


def with_squares_read(expr: sp.Expr, variables: Sequence[sp.Symbol]) -> sp.Expr:
    """``expr`` with the squares that contain one of ``variables`` taken out of its roots.

    If SymPy needs too long to find them, ``expr`` is returned unchanged.
    """
    roots = [power for power in expr.atoms(sp.Pow) if _may_hold_squares(power, variables)]
    if not roots:
        return expr
    nothing: dict[sp.Pow, sp.Expr] = {}
    read = patiently(_read, sorted(roots, key=sp.count_ops), list(variables), otherwise=nothing, seconds=_SECONDS)
    return expr.xreplace(read)


def _may_hold_squares(power: sp.Pow, variables: Sequence[sp.Symbol]) -> bool:
    """Whether ``power`` is a root of an expression that contains a sum in the variables."""
    base, exponent = power.args
    return exponent.is_Rational and not exponent.is_Integer and base.has(sp.Add) and base.has(*variables)


def _read(roots: list[sp.Pow], variables: list[sp.Symbol]) -> dict[sp.Pow, sp.Expr]:
    """The roots that contain squares, inner roots first, with their new forms."""
    found: dict[sp.Pow, sp.Expr] = {}
    for root in roots:
        read = _without_squares(root.base.xreplace(found), root.exp, variables)
        if read is not None:
            found[root] = read
    return found


def _without_squares(base: sp.Expr, exponent: sp.Rational, variables: list[sp.Symbol]) -> sp.Expr | None:
    """base**exponent with the squares of polynomials taken out; None if there are none."""
    standing: dict[sp.Expr, sp.Dummy] = {}
    polynomial = _polynomial(rationalised(base), standing)
    back = {dummy: part for part, dummy in standing.items()}
    inside, factors = sp.sqf_list(polynomial)
    outside = sp.Integer(1)
    for factor, times in factors:
        lead = sp.LC(factor)
        if lead.is_Rational:  # t - 1/3, not 3 t - 1
            factor, inside = sp.expand(factor / lead), inside * lead**times
        factor = factor.xreplace(back)
        squares = times // 2 if factor.is_Add and factor.has(*variables) else 0
        outside *= (factor**2) ** (squares * exponent)
        inside *= factor ** (times - 2 * squares)
    return None if outside == 1 else outside * inside**exponent


def _polynomial(expr: sp.Expr, standing: dict[sp.Expr, sp.Dummy]) -> sp.Expr:
    """``expr`` with a symbol for each part that is not a polynomial of low degree; SymPy stores all powers up to it."""
    if expr.is_Rational or expr.is_Symbol:
        return expr
    if expr.is_Add or expr.is_Mul:
        return expr.func(*(_polynomial(part, standing) for part in expr.args))
    if expr.is_Pow and expr.exp.is_Integer and 0 < expr.exp <= _LARGEST_POWER:
        return _polynomial(expr.base, standing) ** expr.exp
    return standing.setdefault(expr, sp.Dummy())
