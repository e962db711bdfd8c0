"""Derivatives by the rules of calculus, node by node.

``sympy.diff`` gives the same results, but tests every intermediate result for zero. For a polynomial of fifty terms it
tries the signs of all its derivatives, which takes minutes.
"""

from __future__ import annotations

import sympy as sp

from sdeflow.symbolic.squares import is_even_root

__all__ = ["derivative"]

_BRANCHED = (sp.Abs, sp.sign, sp.Max, sp.Min, sp.Heaviside, sp.floor, sp.ceiling, sp.frac, sp.Mod)


def derivative(expr: sp.Expr, symbol: sp.Symbol) -> sp.Expr:
    """∂ ``expr`` / ∂ ``symbol`` as a SymPy expression."""
    if not expr.has(symbol):
        return sp.Integer(0)
    if expr == symbol:
        return sp.Integer(1)
    if isinstance(expr, sp.Add):
        return sp.Add(*(derivative(term, symbol) for term in expr.args))
    if isinstance(expr, sp.Mul):
        factors = expr.args
        return sp.Add(
            *(
                sp.Mul(*factors[:i], derivative(factor, symbol), *factors[i + 1 :])
                for i, factor in enumerate(factors)
                if factor.has(symbol)
            )
        )
    if isinstance(expr, sp.Pow):
        base, power = expr.args
        if is_even_root(expr):  # |u| to some power, which has a kink
            modulus, power = sp.Abs(base.base), base.exp * power
            return power * modulus ** (power - 1) * derivative(modulus, symbol)
        if not power.has(symbol):
            return power * base ** (power - 1) * derivative(base, symbol)
        rate = derivative(power, symbol) * sp.log(base) + derivative(base, symbol) * power / base
        return expr * rate
    if isinstance(expr, sp.Abs):  # of a real argument: all symbols stand for real numbers
        return sp.sign(expr.args[0]) * derivative(expr.args[0], symbol)
    if isinstance(expr, sp.Piecewise):
        branches = ((derivative(value, symbol), condition) for value, condition in expr.args)
        return sp.Piecewise(*branches, evaluate=False)
    if isinstance(expr, sp.Function) and not isinstance(expr, _BRANCHED):
        slopes = ((i, argument) for i, argument in enumerate(expr.args, 1) if argument.has(symbol))
        return sp.Add(*(expr.fdiff(i) * derivative(argument, symbol) for i, argument in slopes))
    return sp.diff(expr, symbol)
