r"""Pearson diffusions: f affine and g² quadratic in the state, with exact kernels in two families.

**Square root**, g² = s(t) (x - l) with the drift a(t) x + b(t). With u = x - l and a constant delta = 4 (a l + b) / s >
0,

    du = (a u + delta s / 4) dt + sqrt(s u) dw,      u_t / sigma²  ~  noncentral chi²(delta, alpha² u_0 / sigma²),

where alpha and sigma² are those of the affine SDE dz = ½ a z dt + ½ sqrt(s) dw.

**Jacobi**, g² = s(t) (x - p)(q - x). With u = (x - p) / (q - p) in [0, 1], constant A, B > 0 and the clock tau = ∫ s
dt,

    du = ½ s (A (1 - u) - B u) dt + sqrt(s u (1 - u)) dw.

The page :doc:`theory_kernels` has the moments, the sources and the diffusions that are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import sympy as sp

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.lamperti import rationals, shown, sign_at
from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.symbols import t, x, x_0

__all__ = ["Pearson", "classify", "decay", "pearson_or_reason", "spread"]

decay = sp.Dummy("alpha", positive=True)  # a Dummy: no parameter can be the same symbol
"""alpha of the affine SDE behind a Pearson diffusion."""

spread = sp.Dummy("v", nonnegative=True)
"""sigma² of that affine SDE; for the Jacobi diffusion the clock tau."""


@dataclass(frozen=True)
class Pearson:
    """A Pearson diffusion in the standard state u, x = origin + scale u.

    Attributes:
        kind: "square root" (u >= 0) or "Jacobi" (0 <= u <= 1).
        origin: x at u = 0.
        scale: dx/du, with its sign.
        shape: (delta,) or (A, B), constants.
        a: the slope of the drift of the affine SDE that gives alpha and sigma².
        c: the noise of that SDE.
        mean: E[x_t | x_0] in x_0, ``decay`` and ``spread``.
        var: Var[x_t | x_0] in x_0, ``decay`` and ``spread``.
        signs: expressions of g² and of the shape, with the sign that each must have.
        at_values: whether the form holds only for the present values of the parameters, which are then substituted.
    """

    kind: Literal["square root", "Jacobi"]
    origin: sp.Expr
    scale: sp.Expr
    shape: tuple[sp.Expr, ...]
    a: sp.Expr
    c: sp.Expr
    mean: sp.Expr
    var: sp.Expr
    signs: tuple[tuple[sp.Expr, int], ...]
    at_values: bool = False

    def holds_at(self, values: Mapping[sp.Symbol, float]) -> bool:
        """Whether the parameters' ``values`` give the same standard form."""
        numbers = rationals(values)
        return not self.at_values and all(sign_at(expr, numbers) == sign for expr, sign in self.signs)

    def inner(self, declaration: Declaration) -> Declaration:
        """The affine SDE that gives alpha and sigma²."""
        return replace(declaration, f=self.a * x, g=self.c)


def classify(f: sp.Expr, g: sp.Expr, values: Mapping[sp.Symbol, float] | None = None) -> Pearson | None:
    """dx = f dt + g dw (Itô) as a Pearson diffusion, or None: :func:`pearson_or_reason` without the reason."""
    found = pearson_or_reason(f, g, values)
    return found if isinstance(found, Pearson) else None


def pearson_or_reason(f: sp.Expr, g: sp.Expr, values: Mapping[sp.Symbol, float] | None = None) -> Pearson | str:
    """dx = f dt + g dw (Itô) as a Pearson diffusion, or a clause that says why it is in neither family.

    Args:
        f: the drift, in x, t and parameters.
        g: the diffusion, in the same symbols.
        values: numbers of the parameters, which decide the signs of delta, A and B.
    """
    found = patiently(_classified, rationalised(f), rationalised(g), rationals(values))
    return "SymPy needs too long to tell" if found is None else found


def _classified(f: sp.Expr, g: sp.Expr, numbers: dict[sp.Symbol, sp.Expr]) -> Pearson | str:
    """The diffusion for all values of the parameters, or for those given."""
    found = _classify(f, g, numbers)
    if isinstance(found, Pearson) or not (f.free_symbols | g.free_symbols) & set(numbers):
        return found
    there = _classify(f.subs(numbers), g.subs(numbers), {})  # such as a delta that is constant at these values only
    return replace(there, at_values=True) if isinstance(there, Pearson) else found


def _classify(f: sp.Expr, g: sp.Expr, numbers: dict[sp.Symbol, sp.Expr]) -> Pearson | str:
    square = sp.expand(g**2)
    if not square.has(x) or not square.is_polynomial(x):
        return "g² is no polynomial of x"
    affine = Declaration(f, sp.Integer(1)).affine
    coefficients = sp.Poly(square, x).all_coeffs()
    if affine is None:
        return "f is not affine in x"
    if len(coefficients) > 3:
        return f"g² is of degree {len(coefficients) - 1} in x"
    return (_square_root if len(coefficients) == 2 else _jacobi)(*affine, coefficients, numbers)


def _square_root(a: sp.Expr, b: sp.Expr, coefficients: list[sp.Expr], numbers: dict) -> Pearson | str:
    slope, constant = coefficients
    side = sign_at(slope, numbers)
    if not side:
        return f"the sign of {slope}, the slope of g² in x, is not known"
    origin = _constant(-constant / slope)
    if origin is None:
        return f"the zero of g² at x{shown(-constant / slope)} moves with t, or is not finite"
    dimension = 4 * (a * origin + b) / slope
    delta = _constant(dimension)
    if delta is None:
        return f"the shape delta{shown(dimension)} must not depend on t"
    if sign_at(delta, numbers) != 1:
        return f"{_not_positive('the shape delta', delta)}: x ends at the zero of g², or passes beyond"
    u_0 = decay**2 * side * (x_0 - origin)
    mean, var = origin + side * (u_0 + delta * spread), 2 * spread * (2 * u_0 + delta * spread)
    noise, signs = sp.sqrt(side * slope) / 2, ((slope, side), (delta, 1))
    return Pearson("square root", origin, sp.Integer(side), (delta,), a / 2, noise, mean, var, signs)


def _jacobi(a: sp.Expr, b: sp.Expr, coefficients: list[sp.Expr], numbers: dict) -> Pearson | str:
    s, middle = -coefficients[0], _constant(-coefficients[1] / (2 * coefficients[0]))
    if sign_at(s, numbers) != 1:
        return f"the factor {-s} of x² in g² must be negative: else the spectrum has a continuous part"
    squared = None if middle is None else _constant(coefficients[2] / s + middle**2)  # the square of half the interval
    if squared is None:
        return "the zeros of g² move with t, or are not finite"
    if sign_at(squared, numbers) != 1:
        return "g² has no two real zeros"
    half = sp.sqrt(squared)
    p, length = middle - half, 2 * half
    shape = []
    for name, towards in (("A", 2 * (a * p + b) / (length * s)), ("B", -2 * (a * (p + length) + b) / (length * s))):
        found = _constant(towards)
        if found is None:
            return f"the shape {name}{shown(towards)} must not depend on t"
        if sign_at(found, numbers) != 1:
            return f"{_not_positive(f'the shape {name}', found)}: x ends at a zero of g², or passes beyond"
        shape.append(found)
    A, B = shape
    theta = A + B
    D = (x_0 - p) / length - A / theta

    def fading(k: sp.Expr) -> sp.Expr:
        return (1 - sp.exp(-k * spread)) / k

    forget = sp.exp(-theta * spread / 2)
    mean = p + length * (A / theta + D * forget)
    var = length**2 * (
        A * B / theta**2 * fading(theta + 1)
        + D * (B - A) / theta * forget * fading(theta / 2 + 1)
        - D**2 * forget**2 * fading(sp.Integer(1))
    )
    signs = ((s, 1), (squared, 1), (A, 1), (B, 1))
    return Pearson("Jacobi", p, length, (A, B), sp.Integer(0), sp.sqrt(s), mean, var, signs)


def _not_positive(name: str, value: sp.Expr) -> str:
    return f"{name}{shown(value)} must be positive{'' if value.is_number else ', and is not at these parameters'}"


def _constant(expr: sp.Expr) -> sp.Expr | None:
    """``expr`` simplified, if it is finite and does not depend on t; else None."""
    expr = sp.simplify(expr) if expr.has(t) else sp.factor(expr)
    return None if expr.has(t, sp.zoo, sp.nan) else expr
