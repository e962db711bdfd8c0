"""The steps of an affine SDE: its coefficients, and the moments of the kernel by their differential equations."""

from __future__ import annotations

from collections.abc import Mapping

import sympy as sp

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.derivation.coupled import coupled_moments
from sdeflow.symbolic.derivation.equations import declared
from sdeflow.symbolic.derivation.gaussian import kernel_steps, variance_symbol
from sdeflow.symbolic.derivation.step import Notation, Step, equals, own, vector
from sdeflow.symbolic.derivation.substitution import Numbers, initial_value, judged, verify
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.moments import Moments
from sdeflow.symbolic.symbols import data_symbols, t

__all__ = ["linear_steps", "moment_steps"]


def linear_steps(
    declaration: Declaration, moments: Moments, numbers: Numbers, measured: Mapping[str, float] | None = None
) -> list[Step]:
    """From f and g to the Gaussian kernel, its score and the prior.

    Args:
        declaration: an affine declaration.
        moments: the moments of its kernel, in the form that is shown and checked.
        numbers: values of the parameters.
        measured: relative residuals of the numbers of the moments, for a coupled state without a formula for Φ.
    """
    return [
        declared(declaration),
        _classification(declaration, numbers),
        *moment_steps(declaration, moments, numbers, measured),
        *kernel_steps(declaration, moments, numbers),
    ]


def moment_steps(
    declaration: Declaration, moments: Moments, numbers: Numbers, measured: Mapping[str, float] | None = None
) -> list[Step]:
    """alpha, the mean and the variance (Φ and P of a coupled state) by their differential equations."""
    F, b, Q, P0 = map(_matrix, (*declaration.require_affine("moments"), declaration.gram, sp.S(declaration.P0)))
    alpha, offset, var = map(_matrix, (moments.alpha, moments.offset, moments.var))
    start = sp.Matrix(data_symbols(declaration.state))
    mean = alpha * start + offset
    problems = {
        "alpha": initial_value(alpha, F * alpha, sp.eye(len(start))),
        "mean": initial_value(mean, F * mean + b, start),
        "var": initial_value(var, F * var + var * F.T + Q, P0),
    }
    proofs = []
    for rule, (name, identities) in zip(moments.rules, problems.items(), strict=True):
        found = verify(identities, numbers, declaration.T) if measured is None else judged(measured[name], 1e-8)
        proofs.append((_bare(rule), *found))
    if declaration.coupled:
        return coupled_moments(declaration, moments, numbers, proofs, closed=measured is None)
    return _scalar_moments(declaration, moments, proofs)


def _classification(declaration: Declaration, numbers: Numbers) -> Step:
    F, b = map(_matrix, declaration.require_affine("moments"))
    u = sp.ImmutableMatrix(declaration.state)
    if declaration.coupled:
        names = [equals(vector("f"), Notation("F") * vector("u") + vector("b")), equals(vector("u"), u)]
        names += [equals("F", F), equals(vector("b"), b), equals("G", declaration.g)]
    else:
        names = [equals("f", Notation("a") * Notation("x") + Notation("b"))]
        names += [equals("a", F[0]), equals("b", b[0]), equals("g", declaration.g)]
    return Step(
        "Classification",
        "The drift is affine in the state and the diffusion does not hold it, so that the state given its start is "
        "Gaussian: its mean and variance determine it.",
        tuple(names),
        "f affine in the state, g a function of t alone",
        *verify([(sp.Matrix(declaration.drifts), F * u + b)], numbers, declaration.T),
    )


def _scalar_moments(declaration: Declaration, moments: Moments, proofs: list[tuple[str, str, bool]]) -> list[Step]:
    a_t, q_t = declaration.require_affine("moments")[0], rationalised(declaration.gram[0])
    P0, v = sp.S(declaration.P0), variance_symbol(declaration)
    a, b, m, q, alpha = Notation("a"), Notation("b"), Notation("m"), Notation("g²"), own(declaration, "alpha")
    r = own(declaration, "r", nonnegative=True)
    growth = sp.exp(sp.Integral(a_t.subs(t, r), (r, 0, t)))
    past = sp.Function(alpha.name)(r)
    (start,) = data_symbols(declaration.state)
    return [
        Step(
            "The integrating factor",
            "The homogeneous equation dα/dt = a α, α(0) = 1, is solved by the exponential of the integral of a.",
            tuple(equals(alpha, side) for side in dict.fromkeys((growth, moments.alpha))),
            *proofs[0],
        ),
        Step(
            "The mean",
            "Taking the expectation removes the noise: dm/dt = a m + b, m(0) = x_0. By variation of constants "
            "m = α x_0 + offset with offset = α ∫ b/α.",
            (
                equals("dm/dt", a * m + b),
                *([equals("offset", moments.offset)] if moments.offset != 0 else []),
                equals(m, moments.alpha * start + moments.offset),
            ),
            *proofs[1],
        ),
        Step(
            "The variance",
            "Itô's formula for (x - m)² gives a linear equation for its expectation, of which the integral of g²/α² "
            "is the solution" + (f", from P0 = {declaration.P0:g}." if declaration.P0 else "."),
            (
                equals("dσ²/dt" if v.is_Pow else "dv/dt", 2 * a * v + q),
                equals(v, alpha**2 * (P0 + sp.Integral(q_t.subs(t, r) / past**2, (r, 0, t)))),
                equals(v, moments.var),
            ),
            *proofs[2],
        ),
    ]


def _matrix(value: sp.Expr | sp.MatrixBase) -> sp.ImmutableMatrix:
    return sp.ImmutableMatrix(value if isinstance(value, sp.MatrixBase) else [[value]])


def _bare(rule: str) -> str:
    """A rule without the name of its moment; empty if the moment is 0."""
    name, _, text = rule.partition(": ")
    return "" if text == "none" else text or name
