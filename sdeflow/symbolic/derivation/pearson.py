"""The steps of a Pearson diffusion: its standard form, the affine SDE behind it, its moments and its kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import sympy as sp

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.derivation.equations import declared, log_fokker_planck
from sdeflow.symbolic.derivation.linear import moment_steps
from sdeflow.symbolic.derivation.step import Step, dt, dw, equals, own
from sdeflow.symbolic.derivation.substitution import Numbers, initial_value, verify
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.moments import Moments, moments_of
from sdeflow.symbolic.pearson import Pearson, decay, spread
from sdeflow.symbolic.symbols import x, x_0

__all__ = ["pearson_steps"]

Check = Callable[..., tuple[str, bool]]


def pearson_steps(declaration: Declaration, pearson: Pearson, numbers: Numbers) -> list[Step]:
    """The standard form of a Pearson diffusion, the affine SDE behind it, its mean, variance and kernel."""
    check = partial(verify, numbers=numbers, T=declaration.T)
    u, u_0 = (own(declaration, name, positive=True) for name in ("u", "u_0"))
    f, q = rationalised(declaration.f), rationalised(declaration.gram[0])
    state = pearson.origin + pearson.scale * u
    if pearson.kind == "square root":
        (delta,) = pearson.shape
        drift, gram = 2 * pearson.a * u + delta * pearson.c**2, 4 * pearson.c**2 * u
        names, domain, kernel = ["delta"], "u >= 0", _noncentral
    else:
        drift, gram = pearson.c**2 * _jacobi_drift(pearson, u), pearson.c**2 * u * (1 - u)
        names, domain, kernel = ["A", "B"], "0 <= u <= 1", _jacobi
    standard = [(f.subs(x, state), pearson.scale * drift), (q.subs(x, state), pearson.scale**2 * gram)]
    shape = [equals(own(declaration, name), value) for name, value in zip(names, pearson.shape, strict=True)]

    inner = pearson.inner(declaration)
    moments = moments_of(inner, numbers)
    mean, var = (e.subs({decay: moments.alpha, spread: moments.var}) for e in (pearson.mean, pearson.var))
    mean_square = q.subs(x, mean) + sp.diff(q, x, 2) * var / 2
    closed = initial_value(mean, f.subs(x, mean), x_0)
    closed += initial_value(var, 2 * sp.diff(f, x) * var + mean_square, sp.Integer(0))
    behind = [step for step in moment_steps(inner, moments, numbers) if step.title != "The mean"]
    return [
        declared(declaration),
        Step(
            "Classification (Pearson)",
            f"f is affine and g² quadratic in x: a {pearson.kind} diffusion in u, with constant "
            f"shape and, in u, the domain {domain}.",
            (equals("x", state), *shape, equals("du", sp.Mul(drift, dt) + sp.Mul(sp.sqrt(gram), dw))),
            f"Pearson, {pearson.kind}",
            *check(standard),
        ),
        *(replace(step, title=f"{step.title} of the affine SDE behind it") for step in behind),
        Step(
            "The true mean and variance",
            "The moment equations of a Pearson diffusion are closed: m' = f(m), "
            "v' = 2 f' v + E[g²], E[g²] = g²(m) + ½ (g²)'' v.",
            (equals("E[x | x₀]", mean), equals("Var[x | x₀]", var)),
            "triangular moment equations",
            *check(closed),
        ),
        kernel(declaration, pearson, moments, check, u, u_0),
    ]


def _noncentral(
    declaration: Declaration, pearson: Pearson, moments: Moments, check: Check, u: sp.Symbol, u_0: sp.Symbol
) -> Step:
    """The noncentral chi² kernel, in u = (x - origin) / scale."""
    nu, v, a = pearson.shape[0] / 2 - 1, *(own(declaration, name, positive=True) for name in ("v", "alpha"))
    bessel = sp.besseli(nu, a * sp.sqrt(u * u_0) / v)
    ratio, exponent = u / (a**2 * u_0), -(u + a**2 * u_0) / (2 * v)
    density = ratio ** (nu / 2) / (2 * v) * sp.exp(exponent) * bessel
    log_p = nu / 2 * sp.log(ratio) - sp.log(v) + exponent + sp.log(bessel)
    units = {u: (x - pearson.origin) / pearson.scale, u_0: (x_0 - pearson.origin) / pearson.scale}
    rates = {a: pearson.a * a, v: 2 * pearson.a * v + pearson.c**2}
    place = {x: pearson.origin + pearson.scale * u, x_0: pearson.origin + pearson.scale * u_0}
    return Step(
        "The kernel",
        "u / σ² follows the noncentral χ² law of δ degrees of freedom and noncentrality α² u₀ / σ²; v is σ².",
        (equals("p(u | u₀)", density),),
        "Feller 1951",
        *check(log_fokker_planck(declaration, log_p.subs(units), rates, place)),
    )


def _jacobi(
    declaration: Declaration, pearson: Pearson, moments: Moments, check: Check, u: sp.Symbol, u_0: sp.Symbol
) -> Step:
    """The expansion of the kernel in Jacobi polynomials, which are eigenfunctions of its generator."""
    A, B = pearson.shape
    tau, n = own(declaration, "tau", positive=True), own(declaration, "n", integer=True, nonnegative=True)
    h = sp.Function("h")

    def polynomial(degree: sp.Expr | int, at: sp.Expr) -> sp.Expr:
        return sp.jacobi(degree, B - 1, A - 1, 2 * at - 1)

    def rate(degree: sp.Expr | int) -> sp.Expr:
        return degree * (degree - 1 + A + B) / 2

    def generator(p: sp.Expr) -> sp.Expr:
        return u * (1 - u) * sp.diff(p, u, 2) / 2 + _jacobi_drift(pearson, u) * sp.diff(p, u)

    eigen = [(generator(polynomial(k, u)), -rate(k) * polynomial(k, u)) for k in range(5)]
    terms = polynomial(n, u) * polynomial(n, u_0) * sp.exp(-rate(n) * tau) / h(n)
    weight = u ** (A - 1) * (1 - u) ** (B - 1) / sp.Function("B")(A, B)
    expansion = sp.Mul(weight, sp.Sum(terms, (n, 0, sp.oo)), evaluate=False)
    return Step(
        "The kernel",
        "The stationary law Beta(A, B) times a sum over its orthogonal polynomials, each an eigenfunction of "
        "the generator, of squared norm h(n); τ is the clock ∫ c². The check is the "
        "eigenvalue equation for n = 0 to 4.",
        (equals(tau, moments.var), equals("p(u | u₀)", expansion)),
        "eigenfunction expansion",
        *check(eigen),
    )


def _jacobi_drift(pearson: Pearson, u: sp.Symbol) -> sp.Expr:
    """The drift of u in the time of the clock."""
    A, B = pearson.shape
    return (A * (1 - u) - B * u) / 2
