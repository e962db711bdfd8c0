r"""The moments of the perturbation kernel of an affine SDE, in closed form if a rule gives one.

For dx = (a(t) x + b(t)) dt + g(t) dw with Var[x_0 | x_0] = P0, the kernel p(x_t | x_0) is
N(alpha x_0 + offset, sigma^2) with

    log alpha = ∫_0^t a ds,
    offset    = ∫_0^t (alpha(t) / alpha(s)) b(s) ds,
    sigma^2   = alpha^2 P0 + ∫_0^t (alpha(t) / alpha(s))^2 g(s)^2 ds.

Rules are tried in order. If none applies, the moment stays an unevaluated integral, and its numbers come from
quadrature (``sdeflow.numerics.quadrature``). A closed form found here is a candidate: the kernel uses it only if its
compiled numbers agree with quadrature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy as sp
from sympy.core.function import AppliedUndef

from sdeflow.symbolic.antiderivative import definite
from sdeflow.symbolic.declaration import AffineDrift, Declaration
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.symbols import t, unused

__all__ = [
    "Moments",
    "completed",
    "constant_ratio",
    "derive_moments",
    "integral_moments",
    "moments_of",
    "square_root",
]

_LARGEST_FACTORED = 32  # the largest power of alpha; for more, SymPy finds hundreds of factors, or none in minutes
_LARGEST_ROOT = 10**6
_SECONDS = 0.4  # for each moment of a large schedule
_UNSOLVED = (None, "by quadrature")


@dataclass(frozen=True)
class Moments:
    """log alpha, alpha, offset and variance of the kernel as SymPy expressions in t, with the rules that gave them.

    For a coupled state, alpha and var are matrices, offset is a column, and log_alpha is the time change ∫ beta.
    """

    log_alpha: sp.Expr
    alpha: sp.Expr | sp.ImmutableMatrix
    offset: sp.Expr | sp.ImmutableMatrix
    var: sp.Expr | sp.ImmutableMatrix
    rules: tuple[str, ...]

    @property
    def closed(self) -> bool:
        """Whether no integral and no undefined function is left."""
        unsolved = (sp.Integral, AppliedUndef)
        return not any(e.has(*unsolved) for e in (self.log_alpha, self.alpha, self.offset, self.var))


def derive_moments(
    drift: AffineDrift, g: sp.Expr, P0: float, T: float, values: Mapping[sp.Symbol, float], integrals: bool = True
) -> Moments:
    """The moments by rules; a moment without a rule is an integral.

    Args:
        drift: ``(a, b)`` of the drift a(t) x + b(t).
        g: the diffusion g(t).
        P0: the variance at t = 0.
        T: the horizon.
        values: numbers of the parameters, used only for the signs of the arguments of logarithms.
        integrals: whether integrals are written; if not, a function stands for each until it is :func:`completed`.
    """
    found = _by_rules(drift, g, P0, T, values)
    return completed(found, drift, g, P0) if integrals else found


def completed(moments: Moments, drift: AffineDrift, g: sp.Expr, P0: float) -> Moments:
    """``moments`` with integrals for those that no rule gave."""
    if moments.closed:
        return moments
    unsolved = integral_moments(drift, g, P0)
    if moments.log_alpha.has(AppliedUndef):
        return unsolved
    offset, var = (
        other if own.has(AppliedUndef) else own
        for own, other in ((moments.offset, unsolved.offset), (moments.var, unsolved.var))
    )
    return replace(moments, offset=offset, var=var)


def _by_rules(drift: AffineDrift, g: sp.Expr, P0: float, T: float, values: Mapping[sp.Symbol, float]) -> Moments:
    """The moments that rules give, and functions A(t), m(t), v(t) for the others."""
    a, b = drift
    named = _named(b)
    start, midpoint = rationalised(sp.Float(P0)), {**values, t: T / 2}
    log_alpha, alpha = patiently(_growth, a, midpoint, otherwise=(None, None), seconds=_SECONDS)
    if log_alpha is None:
        return named
    offset, offset_rule = patiently(_offset, a, b, alpha, midpoint, otherwise=_UNSOLVED, seconds=_SECONDS)
    known = a, g, log_alpha, alpha, start, midpoint
    var, var_rule = patiently(_variance, *known, otherwise=_UNSOLVED, seconds=_SECONDS)
    offset, var = named.offset if offset is None else offset, named.var if var is None else var
    rules = ("log alpha: antiderivative of a", f"offset: {offset_rule}", f"variance: {var_rule}")
    return Moments(log_alpha, alpha, offset, var, rules)


def _growth(a: sp.Expr, midpoint: dict) -> tuple[sp.Expr | None, sp.Expr | None]:
    """log alpha and alpha, or (None, None)."""
    log_alpha = definite(rationalised(a), t, midpoint)
    if log_alpha is None or _is_a_power_too_far(log_alpha):
        return None, None
    return log_alpha, sp.powsimp(sp.exp(sp.expand_log(log_alpha, force=False)))


def moments_of(declaration: Declaration, values: Mapping[sp.Symbol, float]) -> Moments:
    """The moments of an affine declaration, by rules."""
    drift = declaration.require_affine("moments")
    return derive_moments(drift, declaration.g, declaration.P0, declaration.T, values)


def integral_moments(drift: AffineDrift, g: sp.Expr, P0: float) -> Moments:
    """The moments as integrals, for any schedule; as functions A(t), m(t) and v(t) if that takes too long."""
    return patiently(_rational_integrals, *drift, g, P0, otherwise=_named(drift[1]), seconds=_SECONDS)


def _named(b: sp.Expr) -> Moments:
    log_alpha, offset, var = (sp.Function(name, real=True)(t) for name in ("A", "m", "v"))
    return Moments(log_alpha, sp.exp(log_alpha), offset if b != 0 else b, var, ("by quadrature",) * 3)


def _rational_integrals(a: sp.Expr, b: sp.Expr, g: sp.Expr, P0: float) -> Moments:
    return _integrals(*(rationalised(e) for e in (a, b, g**2, sp.Float(P0))))


def _integrals(a: sp.Expr, b: sp.Expr, q: sp.Expr, P0: sp.Expr) -> Moments:
    """The moments as integrals; ``q`` is g²."""
    u, v = (sp.Symbol(unused(name, (a, b, q)), nonnegative=True) for name in ("u", "v"))
    log_alpha = sp.Integral(a.xreplace({t: u}), (u, 0, t))
    alpha = sp.exp(log_alpha)
    since = sp.Integral(a.xreplace({t: v}), (v, u, t))
    offset = sp.Integer(0) if b == 0 else sp.Integral(b.xreplace({t: u}) * sp.exp(since), (u, 0, t))
    var = P0 * alpha**2 + sp.Integral(q.xreplace({t: u}) * sp.exp(2 * since), (u, 0, t))
    return Moments(log_alpha, alpha, offset, var, ("by quadrature",) * 3)


def square_root(var: sp.Expr, at: dict[sp.Symbol, float]) -> sp.Expr:
    """The positive square root of a variance, without a modulus if the sign at ``at`` is known."""
    return patiently(_square_root, var, at, otherwise=sp.Pow(var, sp.Rational(1, 2), evaluate=False))


def _square_root(var: sp.Expr, at: dict[sp.Symbol, float]) -> sp.Expr:
    root = sp.sqrt(var)
    for modulus in root.atoms(sp.Abs):
        value = modulus.args[0].subs(at).evalf()
        if value.is_number and value.is_real:
            root = root.subs(modulus, modulus.args[0] if value >= 0 else -modulus.args[0])
    return root


def _offset(a: sp.Expr, b: sp.Expr, alpha: sp.Expr, midpoint: dict) -> tuple[sp.Expr | None, str]:
    a, b = rationalised(a), rationalised(b)
    if b == 0:
        return sp.Integer(0), "none"
    level = constant_ratio(-b / a) if a != 0 else None
    if level is not None:
        return level * (1 - alpha), "mean reversion, b = -mu a gives mu (1 - alpha)"
    integral = definite(b / alpha, t, midpoint)
    if integral is None:
        return _UNSOLVED
    return _tidy(alpha * integral), "antiderivative of b / alpha"


def _variance(
    a: sp.Expr, g: sp.Expr, log_alpha: sp.Expr, alpha: sp.Expr, P0: sp.Expr, midpoint: dict
) -> tuple[sp.Expr | None, str]:
    a, q = rationalised(a), rationalised(g**2)
    if a == 0:
        integral = definite(q, t, midpoint)
        rule = "a = 0, antiderivative of g^2"
        return _UNSOLVED if integral is None else (_tidy(P0 + integral), rule)
    level = constant_ratio(-q / (2 * a))
    if level is not None:
        rule = "g^2 = -2 c a gives c (1 - alpha^2) + P0 alpha^2"
        if isinstance(alpha, sp.cos):
            return level * sp.sin(alpha.args[0]) ** 2 + P0 * alpha**2, rule
        return level + (P0 - level) * alpha**2, rule
    power = _power_of_alpha(a, q, alpha, midpoint)
    if power is not None:
        return power + P0 * alpha**2, "g^2 = -2a (c0 + c1 alpha^k), integrated in alpha"
    integral = definite(q * sp.exp(-2 * log_alpha), t, midpoint)
    if integral is None:
        return _UNSOLVED
    return _tidy(alpha**2 * (P0 + integral)), "antiderivative of g^2 / alpha^2"


def _power_of_alpha(a: sp.Expr, q: sp.Expr, alpha: sp.Expr, midpoint: dict) -> sp.Expr | None:
    """sigma^2 for g^2 = -2a (c0 + c1 alpha^k), k != 2: c0 (1 - alpha^2) - 2 c1 (alpha^k - alpha^2) / (k - 2).

    With r = g^2 / (-2a), r' = k c1 a alpha^k, so k = (r'/a)' / r' is constant. This is tested at three points in 30
    digits; the comparison with quadrature decides.
    """
    if (a.free_symbols | q.free_symbols) - {t}:
        return None  # k and the coefficients would hold for one set of parameter values only
    r = q / (-2 * a)
    slope = sp.diff(r, t)
    try:
        samples = []
        for fraction in ("3/10", "1/2", "9/10"):
            at = {**midpoint, t: midpoint[t] * 2 * sp.Rational(fraction)}
            k = (sp.diff(slope / a, t) / slope).subs(at).evalf(30)
            c1 = (slope / (k * a * alpha**k)).subs(at).evalf(30)
            c0 = (r - c1 * alpha**k).subs(at).evalf(30)
            samples.append([complex(value) for value in (k, c1, c0)])
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    spread = max(abs(u - v) for sample in samples for u, v in zip(sample, samples[0], strict=True))
    if not spread < 1e-9 or any(value.imag for value in samples[0]):
        return None
    k, c1, c0 = (sp.Rational(value.real).limit_denominator(10**6) for value in samples[0])
    if k == 2:
        return None
    w = sp.Dummy("w", positive=True)
    step = 2 if (k / 2).is_Integer else 1  # a polynomial in alpha^2 or alpha can be factored
    polynomial = c0 * (1 - w ** (2 // step)) - 2 * c1 * (w ** (k / step) - w ** (2 // step)) / (k - 2)
    factors = k.is_Integer and abs(k) <= _LARGEST_FACTORED
    return (sp.factor(polynomial) if factors else polynomial).subs(w, alpha**step)


def _is_a_power_too_far(log_alpha: sp.Expr) -> bool:
    """Whether exp(log alpha) would raise numbers to rational powers of many digits, which SymPy cannot do."""
    return log_alpha.has(sp.log) and any(number.q > _LARGEST_ROOT for number in log_alpha.atoms(sp.Rational))


def constant_ratio(ratio: sp.Expr) -> sp.Expr | None:
    """``ratio`` if it does not depend on t, else None."""
    if ratio.has(t):
        ratio = sp.cancel(ratio) if ratio.is_rational_function(t) else sp.powsimp(sp.expand(ratio))
    if ratio.has(t):
        ratio = sp.cancel(sp.together(ratio))
    return None if ratio.has(t) else ratio


def _tidy(expr: sp.Expr) -> sp.Expr:
    """``expr`` with common factors cancelled: factored if rational in t, else with exponentials merged."""
    if expr.is_rational_function(t):
        return sp.factor(sp.cancel(expr))
    return sp.powsimp(sp.expand(expr))
