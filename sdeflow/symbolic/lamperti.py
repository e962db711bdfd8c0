r"""Reducible SDEs: a change of the state, y = H(x, t), makes them affine (Lamperti, J. Math. Kyoto Univ. 4, 1964).

Let g(x, t) = c(t) h(x, t), and let x = X(y, t) solve ∂X/∂y = h(X, t), so that H is ∫ dx / h. Itô's formula gives

    dy = [(f - ∂X/∂t) / X' - ½ c² X'' / X'] dt + c dw        (f at X(y, t), primes are ∂/∂y).

If the bracket is a(t) y + b(t), then y has a Gaussian kernel, and the kernel of x is its push-forward. H must map the
domain onto R, or X must be even in y with b = 0 (a "fold", whose kernel is the sum over ±y). The maps, for u = x +
k(t):

    =========  ==============================  ==================  =====  ====================
    name       h                               X                   range  domain
    =========  ==============================  ==================  =====  ====================
    identity   1                               y                   R      R
    exp        u                               -k + e^y            R      u > 0
    sinh       sqrt((x - m)² + w²)             m + w sinh y        R      R
    logistic   (x - p)(q - x)                  m + r tanh(y / 2)   R      p < x < q
    square     sqrt(u)                         -k + y² / 4         fold   u >= 0
    cosh       sqrt((x - m)² - w²)             m + w cosh y        fold   x >= m + w
    =========  ==============================  ==================  =====  ====================

All other maps are refused; the page :doc:`theory_kernels` says why. SymPy integrates nothing here, so nothing can hang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy as sp

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.symbols import t, x

__all__ = [
    "Map", "Reduction", "line_mean", "line_var", "rationals", "reduce", "reduction_or_reason", "shown", "sign_at", "y",
]  # fmt: skip

y = sp.Dummy("y", real=True)  # a Dummy: no parameter can be the same symbol
"""The new state, on the line, in which the SDE is affine."""

line_mean = sp.Dummy("m", real=True)
"""The mean of y."""

line_var = sp.Dummy("v", nonnegative=True)
"""The variance of y."""


@dataclass(frozen=True)
class Map:
    """x = X(y, t) with g = c ∂X/∂y.

    Attributes:
        name: its name in the table of this module.
        to_state: X, in y and t.
        to_line: the inverse H, in x and t; of a fold, the branch y >= 0.
        c: the noise of y.
        lower: the lower end of the domain, in t; -oo if there is none.
        upper: the upper end of the domain, in t; oo if there is none.
        log_slope: log |∂X/∂y|, in y and t.
        fold: whether X(y) = X(-y).
        mean: E[X(y, t)] for y of mean ``line_mean`` and variance ``line_var``; None without a closed form.
        var: Var[X(y, t)] for the same y; None without a closed form.
        signs: expressions in the parameters, with the sign that each must have.
    """

    name: str
    to_state: sp.Expr
    to_line: sp.Expr
    c: sp.Expr
    lower: sp.Expr
    upper: sp.Expr
    log_slope: sp.Expr
    fold: bool = False
    mean: sp.Expr | None = None
    var: sp.Expr | None = None
    signs: tuple[tuple[sp.Expr, int], ...] = ()


@dataclass(frozen=True)
class Reduction:
    """A map under which dy = (a(t) y + b(t)) dt + c(t) dw.

    Attributes:
        map: the change of the state, with c.
        a: the slope of the drift of y.
        b: the offset of the drift of y; 0 for a fold.
        at_values: whether it holds only for the present values of the parameters, which are then substituted.
    """

    map: Map
    a: sp.Expr
    b: sp.Expr
    at_values: bool = False

    def inner(self, declaration: Declaration) -> Declaration:
        """The affine SDE of y, with x as the symbol of its state."""
        return replace(declaration, f=self.a * x + self.b, g=self.map.c)

    def holds_at(self, values: Mapping[sp.Symbol, float]) -> bool:
        """Whether the parameters' ``values`` give the same map."""
        numbers = rationals(values)
        signs = all(sign_at(expr, numbers) == sign for expr, sign in self.map.signs)
        return not self.at_values and signs and _is_regular(self.map, self.a, self.b, numbers)


_TOO_LONG = "SymPy needs too long to find one"
_SHOWN = 120  # the most characters of an expression in a reason


def reduce(f: sp.Expr, g: sp.Expr, values: Mapping[sp.Symbol, float] | None = None) -> Reduction | None:
    """The reduction of dx = f dt + g dw (Itô), or None: :func:`reduction_or_reason` without the reason."""
    found = reduction_or_reason(f, g, values)
    return found if isinstance(found, Reduction) else None


def reduction_or_reason(f: sp.Expr, g: sp.Expr, values: Mapping[sp.Symbol, float] | None = None) -> Reduction | str:
    """The reduction of dx = f dt + g dw (Itô), or a clause that says why no map was found in the time allowed.

    A reduction for all values of the parameters is tried first, then one for those given.

    Args:
        f: the drift, in x, t and parameters.
        g: the diffusion, in the same symbols.
        values: numbers of the parameters; they also decide signs, such as that of u = 1 - x.
    """
    return patiently(_reduced, rationalised(f), rationalised(g), rationals(values), otherwise=_TOO_LONG)


def _reduced(f: sp.Expr, g: sp.Expr, numbers: dict[sp.Symbol, sp.Expr]) -> Reduction | str:
    """The reduction for all values of the parameters, or for those given."""
    found = _reduce(f, g, numbers)
    if isinstance(found, Reduction) or not (f.free_symbols | g.free_symbols) & set(numbers):
        return found
    at_values = _reduce(f.subs(numbers), g.subs(numbers), {}, at_values=True)
    return at_values if isinstance(at_values, Reduction) else found


def rationals(values: Mapping[sp.Symbol, float] | None) -> dict[sp.Symbol, sp.Rational]:
    """The parameters' numbers as rationals, as they are printed, so that 4 · 0.5 · 0.02 = 0.2² holds exactly."""
    return {symbol: sp.Rational(str(float(value))) for symbol, value in (values or {}).items()}


def sign_at(expr: sp.Expr, numbers: Mapping[sp.Symbol, sp.Expr]) -> int | None:
    """The sign of ``expr`` at the parameters' ``numbers`` and an early time, or None if it has no sign."""
    value = expr.subs({**numbers, t: sp.Rational(1, 64)})
    value = value if value.is_Rational else value.evalf(30)
    if not (value.is_number and value.is_real):
        return 1 if expr.is_positive else -1 if expr.is_negative else None
    return int(sp.sign(value))


def shown(expr: sp.Expr) -> str:
    """ " = expr" for reasons; empty if it is long."""
    text = str(expr.subs(y, sp.Symbol("y")))
    return f" = {text}" if len(text) <= _SHOWN else ""


def _reduce(f: sp.Expr, g: sp.Expr, numbers: dict[sp.Symbol, sp.Expr], at_values: bool = False) -> Reduction | str:
    change = _map_of(g, numbers)
    if isinstance(change, str):
        return change
    drift = _line_drift(f, g, change)
    affine = Declaration(drift, sp.Integer(1)).affine
    if affine is None:
        return f"the drift of y{shown(change.to_line)} is not affine in y"
    a, b = affine
    if b.has(sp.zoo, sp.nan):  # terms that cancel, but are singular one by one at y = 0, the end of a fold
        b = drift - a * x
    a, b = (sp.simplify(e) if sp.count_ops(e) < 100 else e for e in (a, b))
    if not _is_regular(change, a, b, {}) or not _is_regular(change, a, b, numbers):
        return f"y{shown(change.to_line)} is not finite and real at the parameters' values"
    if change.fold and b != 0:
        return f"y{shown(change.to_line)} ends at 0, where its drift{shown(a * y + b)} does not vanish"
    return Reduction(change, a, b, at_values)


def _is_regular(change: Map, a: sp.Expr, b: sp.Expr, numbers: dict[sp.Symbol, sp.Expr]) -> bool:
    """Whether a map and its drift are finite and real at ``numbers``; log(σx + ρ)/σ at σ = 0 is not."""
    parts = (a, b, change.c, change.to_state, change.to_line)
    return not any(e.subs(numbers).has(sp.zoo, sp.nan, sp.I) for e in parts)


def _line_drift(f: sp.Expr, g: sp.Expr, change: Map) -> sp.Expr:
    """The drift of y, with x as the symbol of y."""
    # The branch of a fold is y > 0, so sqrt(y²) is y.
    line = sp.Dummy("y", positive=True) if change.fold else sp.Dummy("y", real=True)
    state = change.to_state.subs(y, line)
    slope = sp.diff(state, line)
    # Replaced as written in f, because SymPy simplifies sqrt(1 + sinh²) slowly and acosh(cosh) never.
    constant, h = g.as_independent(x, as_Add=False)
    f = f.subs({change.to_line: line, h: slope * change.c / constant})
    drift = (f.subs(x, state) - sp.diff(state, t)) / slope - change.c**2 * sp.diff(slope, line) / slope / 2
    if change.name == "logistic":
        drift = _in_exponentials(drift, line)
    return drift.subs(line, x)


def _in_exponentials(drift: sp.Expr, line: sp.Symbol) -> sp.Expr:
    """``drift`` with tanh(y/2) written as (z - 1)/(z + 1), z = e^y, and with log z written as y."""
    z = sp.Dummy("z", positive=True)
    drift = drift.subs(sp.tanh(line / 2), (z - 1) / (z + 1))
    drift = drift.replace(sp.log, lambda u: sp.expand_log(sp.log(sp.factor(u))))
    drift = sp.cancel(sp.together(sp.expand(drift))) if drift.is_rational_function(z, sp.log(z)) else drift
    return sp.expand(drift).subs(sp.log(z), line).subs(z, sp.exp(line))


def _map_of(g: sp.Expr, numbers: dict[sp.Symbol, sp.Expr]) -> Map | str:
    """The map of the table for g, or the reason why there is none."""
    c, h = g.as_independent(x, as_Add=False)
    if not h.has(x):
        return Map("identity", y, x, g, -sp.oo, sp.oo, sp.Integer(0), False, line_mean, line_var)
    root = h.is_Pow and h.exp == sp.Rational(1, 2)
    polynomial = h.base if root else h
    if not polynomial.is_polynomial(x):
        return _NOT_TABLED
    lead, *rest = (sp.factor(e) for e in sp.Poly(polynomial, x).all_coeffs())
    if len(rest) == 1:
        return (_square if root else _exp)(c, lead, rest[0] / lead, numbers)
    if len(rest) != 2:
        return _NOT_TABLED
    middle = -rest[0] / (2 * lead)
    spread = sp.factor(rest[1] / lead - middle**2)  # h or h² is lead ((x - middle)² + spread)
    return (_hyperbolic if root else _logistic)(c, lead, middle, spread, numbers)


_NOT_TABLED = "g is neither a polynomial of x of second degree at most, nor the root of one, times a function of t"


def _unsigned(expr: sp.Expr) -> str:
    return f"{expr}, on whose sign the domain depends, is 0 or has none that is known"


def _exp(c: sp.Expr, lead: sp.Expr, k: sp.Expr, numbers: dict) -> Map | str:
    """g = c lead u, u = x + k, on the side where lead u > 0."""
    side = sign_at(lead, numbers) if not lead.has(t) else 1  # a noise may pass through 0; then u > 0 is taken
    if not side:
        return _unsigned(lead)
    lower, upper = (-k, sp.oo) if side > 0 else (-sp.oo, -k)
    mean = -k + side * sp.exp(line_mean + line_var / 2)
    var = sp.exp(2 * line_mean + line_var) * (sp.exp(line_var) - 1)
    to_state, to_line = -k + side * sp.exp(y), sp.log(side * (x + k))
    signs = () if lead.has(t) else ((lead, side),)
    return Map("exp", to_state, to_line, c * lead, lower, upper, y, False, mean, var, signs)


def _square(c: sp.Expr, lead: sp.Expr, k: sp.Expr, numbers: dict) -> Map | str:
    """g = c sqrt(lead u), u = x + k, on the side where lead u >= 0."""
    side = sign_at(lead, numbers)
    if not side:
        return _unsigned(lead)
    lower, upper = (-k, sp.oo) if side > 0 else (-sp.oo, -k)
    to_state, to_line = -k + side * y**2 / 4, 2 * sp.sqrt(side * (x + k))
    mean = -k + side * (line_mean**2 + line_var) / 4
    var = line_var * (2 * line_mean**2 + line_var) / 8
    noise = side * c * sp.sqrt(side * lead)
    return Map("square", to_state, to_line, noise, lower, upper, sp.log(y / 2), True, mean, var, ((lead, side),))


def _hyperbolic(c: sp.Expr, lead: sp.Expr, middle: sp.Expr, spread: sp.Expr, numbers: dict) -> Map | str:
    """g = c sqrt(lead ((x - middle)² + spread))."""
    if sign_at(lead, numbers) != 1:
        return f"the factor {lead} of x² in g² must be positive: else y = ∫ dx / g covers only a part of the line"
    side = sign_at(spread, numbers)
    if not side:
        return _unsigned(spread)
    w, noise = sp.sqrt(side * spread), c * sp.sqrt(lead)
    growth, to_line, signs = sp.exp(line_var), (x - middle) / w, ((lead, 1), (spread, side))
    var = w**2 * (growth - 1) * (growth * sp.cosh(2 * line_mean) + side) / 2
    if side > 0:
        mean = middle + w * sp.sinh(line_mean) * sp.exp(line_var / 2)
        log_slope = sp.log(w) + sp.log(sp.cosh(y))
        ends = (-sp.oo, sp.oo)
        return Map("sinh", middle + w * sp.sinh(y), sp.asinh(to_line), noise, *ends, log_slope, False, mean, var, signs)
    mean = middle + w * sp.cosh(line_mean) * sp.exp(line_var / 2)
    log_slope = sp.log(w) + sp.log(sp.sinh(y))
    ends = (middle + w, sp.oo)
    return Map("cosh", middle + w * sp.cosh(y), sp.acosh(to_line), noise, *ends, log_slope, True, mean, var, signs)


def _logistic(c: sp.Expr, lead: sp.Expr, middle: sp.Expr, spread: sp.Expr, numbers: dict) -> Map | str:
    """g = c lead ((x - middle)² + spread) between its two zeros."""
    if sign_at(spread, numbers) != -1:
        return "g has no two zeros with the state between them, so y = ∫ dx / g covers only a part of the line"
    r = sp.sqrt(-spread)
    to_line = sp.log((x - middle + r) / (middle + r - x))
    log_slope = sp.log(r / 2) - 2 * sp.log(sp.cosh(y / 2))
    return Map(
        "logistic", middle + r * sp.tanh(y / 2), to_line, -2 * c * lead * r, middle - r, middle + r, log_slope, False,
        signs=((spread, -1),),
    )  # fmt: skip
