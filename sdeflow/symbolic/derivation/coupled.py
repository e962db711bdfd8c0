"""The moments of a coupled state: the fundamental matrix, the mean, the covariance and its Cholesky factor."""

from __future__ import annotations

import sympy as sp

from sdeflow.symbolic.coupled import stationary_covariance, symbolic_cholesky
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.derivation.step import Notation, Step, equals, vector
from sdeflow.symbolic.derivation.substitution import Numbers, verify
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.lamperti import rationals
from sdeflow.symbolic.moments import Moments
from sdeflow.symbolic.symbols import t

__all__ = ["coupled_moments"]

_F, _F_T, _GRAM = Notation("F"), Notation("Fᵀ"), Notation("GGᵀ")


def coupled_moments(
    declaration: Declaration, moments: Moments, numbers: Numbers, proofs: list[tuple[str, str, bool]], closed: bool
) -> list[Step]:
    """The steps of the moments.

    Args:
        declaration: a coupled affine SDE.
        moments: the moments of its kernel.
        numbers: values of the parameters.
        proofs: for Φ, the mean and the covariance, the rule, the check and its outcome.
        closed: whether Φ has a formula.
    """
    Phi, P, m = Notation("Φ"), Notation("P"), vector("m")
    how = (
        ", the matrix exponential if F commutes with itself at all times."
        if closed
        else "; F does not commute with itself by any rule here, so that Φ is defined by its equation, and its numbers "
        "come by quadrature."
    )
    fundamental = [equals("dΦ/dt", _F * Phi), equals("Φ(0)", sp.Integer(1))]
    mean = [equals(Notation("dm/dt", r"\frac{d\mathbf{m}}{dt}"), _F * m + vector("b"))]
    mean += [equals(m, Phi * vector("u₀") + Notation("offset"))]
    mean += [] if moments.offset.is_zero_matrix else [equals("offset", moments.offset)]
    covariance = [equals("dP/dt", _F * P + P * _F_T + _GRAM), equals("P(0)", rationalised(declaration.P0))]
    if closed:
        fundamental.append(equals(Phi, moments.alpha))
        covariance.append(equals(P, moments.var))
    return [
        Step(
            "The fundamental matrix",
            f"The homogeneous equation maps a start u₀ to Φ u₀{how}",
            tuple(fundamental),
            *proofs[0],
        ),
        Step(
            "The mean",
            "The expectation follows the drift; by variation of constants it is Φ u₀ + offset with offset = Φ ∫ Φ⁻¹ b.",
            tuple(mean),
            *proofs[1],
        ),
        Step(
            "The covariance",
            "Itô's formula for (u - m)(u - m)ᵀ gives the Lyapunov equation, from P(0) = P0.",
            tuple(covariance),
            *proofs[2],
        ),
        *_stationary(declaration, numbers),
        _cholesky(declaration, moments.var, numbers, closed),
    ]


def _stationary(declaration: Declaration, numbers: Numbers) -> list[Step]:
    """The stationary covariance, if it is the same at all times and positive."""
    F, Q = rationalised(declaration.require_affine("moments")[0]), rationalised(declaration.gram)
    S = stationary_covariance(F, Q)
    if S is None or S.has(t):
        return []
    values = S.subs(rationals(numbers))
    if not all(values[:n, :n].det().evalf().is_positive for n in range(1, len(declaration.state) + 1)):
        return []
    name = Notation("S")
    return [
        Step(
            "The stationary covariance",
            "If P is constant, it solves the algebraic Lyapunov equation.",
            (equals(_F * name + name * _F_T + _GRAM, sp.Integer(0)), equals(name, S)),
            "a linear system for S",
            *verify([(F * S + S * F.T + Q, sp.zeros(*S.shape))], numbers, declaration.T),
        )
    ]


def _cholesky(declaration: Declaration, P: sp.ImmutableMatrix, numbers: Numbers, closed: bool) -> Step:
    equations, check = [equals(Notation("L") * Notation("Lᵀ"), Notation("P"))], ("", True)
    if closed:
        L = symbolic_cholesky(P)
        equations += [equals(sp.Symbol(f"L_{i + 1}{j + 1}"), L[i, j]) for i in range(L.rows) for j in range(i + 1)]
        check = verify([(L * L.T, P)], numbers, declaration.T)
    text = "x_t = m + L ε with standard normal ε draws from the kernel" + (
        "." if closed else "; L comes by quadrature."
    )
    return Step("The Cholesky factor", text, tuple(equations), "entry by entry", *check)
