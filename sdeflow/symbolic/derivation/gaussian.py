"""The Gaussian kernel of an affine SDE, its score, the weighting, the log-SNR and the prior.

The checks use general symbols, with the derivatives that the steps before have checked.
"""

from __future__ import annotations

import itertools
import random
from functools import cache

import sympy as sp

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.derivation.step import N, Notation, Step, equals, own, vector
from sdeflow.symbolic.derivation.substitution import Identity, Numbers, verify
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.moments import Moments
from sdeflow.symbolic.symbols import t, x, x_0

__all__ = ["kernel_steps", "variance_symbol"]

Equations = tuple[sp.Basic, ...]


def kernel_steps(declaration: Declaration, moments: Moments, numbers: Numbers) -> list[Step]:
    """The Gaussian kernel, its score, the weighting, the log-SNR and the prior."""
    coupled, T = declaration.coupled, declaration.T
    law, score, snr, prior = _of_components() if coupled else _elementwise(declaration, moments)
    solves, slopes, informs, propagates = _proofs(len(declaration.state))
    if coupled:
        falls = "The Fisher information of the start falls."
        data = "covariance C (P0 is in P)"
    else:
        falls = "The signal-to-noise ratio falls, at the rate -g²/σ²; half of it is minus the rate of half_log_snr."
        data = "mean m_0 and standard deviation c"
        rate = -rationalised(declaration.gram[0]) / moments.var
        informs = verify([(sp.diff(snr[0].rhs, t), rate)], numbers, T, positive=moments.var)
    return [
        Step(
            "The perturbation kernel",
            "The noise enters linearly, so that the kernel is the normal law with this mean "
            "and variance. It solves the Fokker-Planck equation.",
            law,
            "",
            *solves,
        ),
        Step(
            "Its score and the weighting",
            "The score of the kernel is linear in the state. E|∇ log p|² = -E[∇·∇ log p] is "
            "the inverse variance (per coordinate), so that λ(t), which gives every time equal weight, is this "
            "variance.",
            score,
            "",
            *slopes,
        ),
        Step("The log-SNR", falls, snr, "", *informs),
        Step(
            "The prior",
            f"At T = {T:g} data with {data} have become this Gaussian, which the reverse equations start from.",
            prior,
            "",
            *propagates,
        ),
    ]


def variance_symbol(declaration: Declaration) -> sp.Expr:
    """The symbol of the variance: sigma², or v if a parameter is called sigma."""
    taken = any(parameter.name == "sigma" for parameter in declaration.parameters)
    return own(declaration, "v", positive=True) if taken else sp.Symbol("sigma", positive=True) ** 2


def _elementwise(declaration: Declaration, moments: Moments) -> tuple[Equations, Equations, Equations, Equations]:
    """The equations shown for the kernel, the score, the log-SNR and the prior."""
    v, a, c, m, m_0 = variance_symbol(declaration), *(own(declaration, name) for name in ("alpha", "c", "m", "m_0"))
    weighting = Notation("λ = 1/E|∇ log p|²", r"\lambda = 1 / \mathbb{E}|\nabla \log p|^2")
    ratio = r"\log \frac{\alpha^2}{\sigma^2}"
    log_snr = 2 * moments.log_alpha - sp.log(moments.var)
    rate = Notation("d(log α²/σ²)/dt", rf"\frac{{d}}{{dt}} {ratio}")
    start = Notation("p(x(T) | x₀ = 0)", r"p(x_T \mid x_0 = 0)")
    return (
        (equals("p(x | x₀)", N(moments.alpha * x_0 + moments.offset, moments.var)),),
        (equals("∇ log p", -(x - m) / v), equals(weighting, v), equals(v, moments.var)),
        (equals(Notation("log α²/σ²", ratio), log_snr), equals(rate, -Notation("g²") / v)),
        (
            equals(start, N(moments.offset, v)),
            equals(Notation("p(x(T))", "p(x_T)"), N(a * m_0 + moments.offset, a**2 * c**2 + v)),
        ),
    )


def _of_components() -> tuple[Equations, Equations, Equations, Equations]:
    """The equations of :func:`_elementwise` for a coupled state, in matrices."""
    u, m, P = vector("u"), vector("m"), Notation("P")
    law = Notation("p(u | u₀)", r"p(\mathbf{u} \mid \mathbf{u}_0)")
    last = Notation("p(u(T))", r"p(\mathbf{u}_T)")
    return (
        (equals(law, N(m, P)),),
        (equals("∇ log p", -Notation("P⁻¹") * (u - m)), equals("λ", P)),
        (equals("J", Notation("Φᵀ P⁻¹ Φ")), equals("dJ/dt", -Notation("Φᵀ P⁻¹ GGᵀ P⁻¹ Φ"))),
        (equals(last, N(m, Notation("Φ C Φᵀ + P"))),),
    )


@cache
def _proofs(k: int) -> tuple[tuple[str, bool], ...]:
    """The checks of identities that hold for every Gaussian of k dimensions."""
    return tuple(verify(identities, {}, 1.0) for identities in _identities(k))


def _identities(k: int) -> tuple[list[Identity], list[Identity], list[Identity], list[Identity]]:
    """Identities of the k-dimensional normal law N(m, P) with m' = F m + b, P' = F P + P Fᵀ + Q and Φ' = F Φ.

    They use symbols for k = 1, and arbitrary rational numbers for larger k, where symbols would take seconds.

    Returns:
        The Fokker-Planck equation, the score and its slope, the rate of the information, the law for Gaussian data.
    """
    generator, count = random.Random(k), itertools.count()

    def entry(i: int, j: int) -> sp.Expr:
        return sp.Dummy(f"c{next(count)}") if k == 1 else sp.Rational(generator.randint(1, 99), 97)

    F, phi = sp.Matrix(k, k, entry), sp.Matrix(k, k, entry)
    Q, C, P = (matrix + matrix.T for matrix in (sp.Matrix(k, k, entry) for _ in range(3)))
    P += 2 * k * sp.eye(k)  # not close to singular
    m, b = sp.Matrix(k, 1, entry), sp.Matrix(k, 1, entry)
    u = sp.Matrix(k, 1, lambda i, _: sp.Dummy(f"u{i}"))
    inverse, rest = P.inv(), u - m
    P_t, m_t, phi_t = F * P + P * F.T + Q, F * m + b, F * phi
    score, log_p = -inverse * rest, -(rest.T * inverse * rest)[0] / 2
    log_p_t = (-score.T * m_t + score.T * P_t * score / 2)[0] - (inverse * P_t).trace() / 2
    spread = (score.T * Q * score)[0] / 2 - (Q * inverse).trace() / 2
    information_t = phi_t.T * inverse * phi + phi.T * inverse * phi_t - phi.T * inverse * P_t * inverse * phi
    total = phi * C * phi.T + P
    return (
        [(log_p_t, spread - F.trace() - ((F * u + b).T * score)[0])],
        [(score, sp.Matrix([sp.diff(log_p, component) for component in u])), (-score.jacobian(u), inverse)],
        [(information_t, -phi.T * inverse * Q * inverse * phi)],
        [(phi_t * C * phi.T + phi * C * phi_t.T + P_t, F * total + total * F.T + Q)],
    )
