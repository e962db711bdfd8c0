"""Antiderivatives in t by a short table of rules: fast, real, and None if no rule applies.

``sympy.integrate`` is not used for numbers: on common schedules it hangs for minutes, crashes or
returns a complex branch. A schedule without a rule is integrated by quadrature, which always works.
"""

from __future__ import annotations

import sympy as sp

__all__ = ["antiderivative", "definite"]


def definite(integrand: sp.Expr, t: sp.Symbol, midpoint: dict[sp.Symbol, float]) -> sp.Expr | None:
    """The integral of ``integrand`` from 0 to t, or None if no rule gives a real, finite expression.

    Args:
        midpoint: values of t and of every parameter, at which the sign of each logarithm's argument is
            evaluated, so that 1/(t - 1) on [0, 1) gives log(1 - t) and not a complex branch.
    """
    primitive = antiderivative(integrand, t)
    if primitive is None:
        return None
    for log in primitive.atoms(sp.log):
        argument = log.args[0].subs(midpoint).evalf()
        if argument.is_negative:
            primitive = primitive.subs(log, sp.log(-log.args[0]))
    result = primitive - primitive.subs(t, 0)
    return None if result.has(sp.nan, sp.zoo, sp.oo, -sp.oo, sp.I) else result


def antiderivative(integrand: sp.Expr, t: sp.Symbol) -> sp.Expr | None:
    """An antiderivative of ``integrand`` in t, up to a constant, or None if no rule applies."""
    integrand = sp.powsimp(sp.expand(integrand))
    if integrand.is_rational_function(t) and not integrand.is_polynomial(t):
        integrand = sp.apart(sp.together(integrand), t)
    total = sp.Integer(0)
    for term in sp.Add.make_args(integrand):
        constant, factor = term.as_independent(t, as_Add=False)
        part = _of_factor(factor, t)
        if part is None:
            return None
        total += constant * part
    return total


def _of_factor(factor: sp.Expr, t: sp.Symbol) -> sp.Expr | None:
    if not factor.has(t):
        return factor * t
    if factor.is_Pow and factor.base == t and factor.exp.is_Integer and factor.exp > 0:
        return t ** (factor.exp + 1) / (factor.exp + 1)  # a Poly would hold every power up to it
    if factor.is_polynomial(t):
        return sp.Poly(factor, t).integrate().as_expr()
    if isinstance(factor, sp.Function) and type(factor) in _PRIMITIVES:
        slope = _slope(factor.args[0], t)
        return _PRIMITIVES[type(factor)](factor.args[0]) / slope if slope is not None else None
    if factor.is_Pow and not factor.exp.has(t):
        slope, power = _slope(factor.base, t), factor.exp
        if slope is None:
            return None
        return sp.log(factor.base) / slope if power == -1 else factor.base ** (power + 1) / (slope * (power + 1))
    polynomial, rest = factor.as_independent(sp.exp, sp.Pow, as_Add=False)
    if factor.is_Mul:
        powers = [arg for arg in factor.args if not arg.is_polynomial(t)]
        if len(powers) == 1:
            rest, polynomial = powers[0], sp.cancel(factor / powers[0])
    rate = _rate(rest, t)
    if rate is None or not polynomial.is_polynomial(t):
        return None
    # Integration by parts, until the derivatives of the polynomial are 0: sum (-1)^j p^(j) e^{kt} / k^{j+1}.
    total, sign, derivative = sp.Integer(0), 1, polynomial
    for j in range(sp.degree(polynomial, t) + 1 if polynomial.has(t) else 1):
        total += sign * derivative * rest / rate ** (j + 1)
        sign, derivative = -sign, sp.diff(derivative, t)
    return total


_PRIMITIVES = {
    sp.sin: lambda u: -sp.cos(u),
    sp.cos: sp.sin,
    sp.tan: lambda u: -sp.log(sp.cos(u)),
    sp.cot: lambda u: sp.log(sp.sin(u)),
    sp.sinh: sp.cosh,
    sp.cosh: sp.sinh,
    sp.tanh: lambda u: sp.log(sp.cosh(u)),
}


def _slope(u: sp.Expr, t: sp.Symbol) -> sp.Expr | None:
    """du/dt if u is linear in t, else None."""
    slope = sp.expand(sp.diff(u, t))
    return None if slope.has(t) or slope == 0 else slope


def _rate(factor: sp.Expr, t: sp.Symbol) -> sp.Expr | None:
    """k if factor = c e^{kt}, an exponential or a power of a constant with a linear exponent; else None."""
    if isinstance(factor, sp.exp):
        return _slope(factor.args[0], t)
    if factor.is_Pow and not factor.base.has(t):
        slope = _slope(factor.exp, t)
        return None if slope is None else slope * sp.log(factor.base)
    return None
