"""The named SDEs of the literature, each a declaration like any user's; ``T`` and ``cutoff`` are as in ``SDE``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TypeAlias, TypeGuard

import numpy as np
import sympy as sp

from sdeflow.errors import DeclarationError
from sdeflow.numerics.basis import DCT
from sdeflow.sde import SDE
from sdeflow.symbolic.patience import rehearsed, small
from sdeflow.symbolic.symbols import state, t, x

Matrix: TypeAlias = sp.MatrixBase | np.ndarray | Sequence[Sequence[float | sp.Expr]]

__all__ = [
    "EDM",
    "OU",
    "VE",
    "VP",
    "Blurring",
    "CosineVP",
    "CriticallyDampedLangevin",
    "FlowMatching",
    "SubVP",
    "from_recipe",
]


_SECONDS = 2.0


def VP(beta_min: float = 0.1, beta_max: float = 20.0, T: float = 1.0, cutoff: float | None = None) -> SDE:
    """Variance preserving, the limit of DDPM (arXiv:2011.13456): dx = -½ beta x dt + √beta dw, beta linear in t."""
    beta_min, beta_max = _exact(beta_min), _exact(beta_max)
    beta = beta_min + (beta_max - beta_min) * t
    return SDE(f=-beta * x / 2, g=sp.sqrt(beta), T=T, cutoff=cutoff)


def SubVP(beta_min: float = 0.1, beta_max: float = 20.0, T: float = 1.0, cutoff: float | None = None) -> SDE:
    """Sub-variance preserving (arXiv:2011.13456): VP's drift, g² = beta (1 - exp(-2 ∫ beta)), sigma = 1 - alpha².

    Published checkpoints were sampled and measured down to cutoff=1e-5.
    """
    beta_min, beta_max = _exact(beta_min), _exact(beta_max)
    beta = beta_min + (beta_max - beta_min) * t
    integral = beta_min * t + (beta_max - beta_min) * t**2 / 2
    return SDE(f=-beta * x / 2, g=sp.sqrt(beta * (1 - sp.exp(-2 * integral))), T=T, cutoff=cutoff)


def VE(sigma_min: float = 0.01, sigma_max: float = 50.0, cutoff: float | None = None) -> SDE:
    """Variance exploding, the limit of NCSN (arXiv:2011.13456): sigma(t) geometric from sigma_min to sigma_max.

    The kernel starts with variance P0 = sigma_min², so that sigma(t)² is the variance itself.
    """
    start, ratio = _exact(sigma_min), _exact(sigma_max) / _exact(sigma_min)
    return SDE(f=0, g=start * ratio**t * sp.sqrt(2 * sp.log(ratio)), cutoff=cutoff, P0=start**2)


def CosineVP(T: float = 0.995, cutoff: float | None = None) -> SDE:
    """The cosine schedule (arXiv:2102.09672) in continuous time: alpha = cos(πt/2), sigma = sin(πt/2)."""
    beta = sp.pi * sp.tan(sp.pi * t / 2)
    return SDE(f=-beta * x / 2, g=sp.sqrt(beta), T=T, cutoff=cutoff)


def OU(
    theta: float = 1.0, mu: float = 0.0, sigma: float | sp.Expr = sp.sqrt(2), T: float = 5.0,  # noqa: B008
    cutoff: float | None = None,
) -> SDE:  # fmt: skip
    """Ornstein-Uhlenbeck: dx = theta (mu - x) dt + sigma dw, stationary law N(mu, sigma² / (2 theta))."""
    return SDE(f=_exact(theta) * (_exact(mu) - x), g=_exact(sigma), T=T, cutoff=cutoff)


def EDM(T: float = 80.0, cutoff: float | None = None) -> SDE:
    """Karras et al. 2022 (arXiv:2206.00364): alpha = 1, sigma = t."""
    return SDE(f=0, g=sp.sqrt(2 * t), T=T, cutoff=cutoff)


def FlowMatching(T: float = 0.999, cutoff: float | None = None) -> SDE:
    """The SDE whose kernel is (1 - t) x_0 + t noise, the path of flow matching (arXiv:2210.02747)."""
    return SDE(f=-x / (1 - t), g=sp.sqrt(2 * t / (1 - t)), T=T, cutoff=cutoff)


def CriticallyDampedLangevin(
    beta: float | sp.Expr = 4.0,
    mass: float = 0.25,
    gamma: float = 0.04,
    T: float = 1.0,
    friction: float | None = None,
    cutoff: float | None = None,
) -> SDE:
    """Dockhorn et al. 2022 (arXiv:2112.07068): data x coupled to a velocity v that starts as N(0, gamma mass).

    dx = beta v / M dt,  dv = -beta (x + Γ v / M) dt + √(2 Γ beta) dw, critically damped at Γ = 2 √M.
    """
    x_, v = state("x v")
    beta, M = _exact(beta), _exact(mass)
    friction = 2 * sp.sqrt(M) if friction is None else _exact(friction)
    return SDE(
        f=[beta * v / M, -beta * (x_ + friction * v / M)],
        g=[0, sp.sqrt(2 * friction * beta)],
        T=T,
        cutoff=cutoff,
        P0=[0, _exact(gamma) * M],
    )


def from_recipe(
    D: Matrix, Q: Matrix, S: Matrix | None = None, T: float = 1.0,
    P0: object = 0.0, names: str | Sequence[str] | None = None, params: Mapping[sp.Symbol | str, float] | None = None,
    cutoff: float | None = None,
) -> SDE:  # fmt: skip
    """The complete recipe (Ma et al. 2015, arXiv:1506.04696): every linear SDE with stationary covariance S.

    du = -½ (D + Q) S⁻¹ u dt + √D dw, which leaves N(0, S) invariant for any D ⪰ 0 and any skew Q, both perhaps
    functions of t. With D = 2 Γ beta on the velocity and Q = 2 beta ((0, -1), (1, 0)) it is critically damped
    Langevin dynamics; PSLD (arXiv:2303.01748) adds noise on x.

    Args:
        D: k x k, symmetric, not negative.
        Q: k x k, skew.
        S: k x k, symmetric, positive; the identity by default.
        T, P0, params, cutoff: as in ``SDE``.
        names: the components, as text or a list: "x v" for k = 2 and "x1 x2 ..." by default.

    Raises:
        DeclarationError: for matrices without these properties.
    """
    diffusion, skew = _matrix(D, "D"), _matrix(Q, "Q")
    k = diffusion.shape[0]
    covariance = sp.eye(k) if S is None else _matrix(S, "S")
    shapes = diffusion.shape, skew.shape, covariance.shape
    if any(shape != (k, k) for shape in shapes):
        raise DeclarationError("D, Q and S must be square and alike, not {}, {} and {}.".format(*shapes))
    if diffusion != diffusion.T or skew != -skew.T or covariance != covariance.T:
        raise DeclarationError("the recipe needs D and S symmetric, and Q skew (Q = -Qᵀ).")
    usual = "x v" if k == 2 else [f"x{i + 1}" for i in range(k)]
    components = state(usual if names is None else names)
    if not (small(diffusion, skew, covariance) or rehearsed(_SECONDS, _recipe, diffusion, skew, covariance)):
        raise DeclarationError(f"SymPy takes too long to invert S and to find a root of D, for k = {k}.")
    F, g = _recipe(diffusion, skew, covariance)
    return SDE(f=F * sp.Matrix(components), g=g, T=T, cutoff=cutoff, P0=P0, params=params)


def _recipe(D: sp.Matrix, Q: sp.Matrix, S: sp.Matrix) -> tuple[sp.Matrix, sp.Matrix]:
    """-½ (D + Q) S⁻¹ and √D."""
    if any(S[:n, :n].det().is_nonpositive for n in range(1, S.shape[0] + 1)):
        raise DeclarationError(f"S must be positive definite: {S.tolist()}.")
    return -(D + Q) * S.inv() / 2, _root(D)


def _matrix(value: object, name: str) -> sp.Matrix:
    """Rows of numbers and expressions as a matrix; no text, which SymPy would evaluate."""
    if hasattr(value, "__array__") and not isinstance(value, sp.MatrixBase):
        value = np.asarray(value).tolist()
    rows = value.tolist() if isinstance(value, sp.MatrixBase) else value
    if not _is_square(rows) or not all(isinstance(entry, sp.Expr | Real) for row in rows for entry in row):
        raise DeclarationError(f"{name} must be a square matrix, rows of numbers and expressions, not {value!r}.")
    return sp.Matrix(rows).applyfunc(_exact)


def _is_square(rows: object) -> TypeGuard[Sequence[Sequence[object]]]:
    """Whether ``rows`` are n rows of n entries, n > 0."""
    if not isinstance(rows, list | tuple) or not rows:
        return False
    return all(isinstance(row, list | tuple) and len(row) == len(rows) for row in rows)


def _root(D: sp.Matrix) -> sp.Matrix:
    """A square root of a symmetric matrix that is not negative: G Gᵀ = D."""
    if any(D[i, i].is_negative for i in range(D.shape[0])):
        raise DeclarationError(f"D must not be negative: {D.tolist()}.")
    if D.is_diagonal():
        return sp.diag(*(sp.sqrt(D[i, i]) for i in range(D.shape[0])))
    k, L = D.shape[0], sp.zeros(*D.shape)
    for j in range(k):  # Cholesky, in which a zero pivot leaves a zero column
        pivot = sp.simplify(D[j, j] - sum(L[j, n] ** 2 for n in range(j)))
        if pivot.is_negative:
            raise DeclarationError(f"D must not be negative: {D.tolist()}.")
        L[j, j] = sp.sqrt(pivot)
        for i in range(j + 1, k):
            rest = sp.simplify(D[i, j] - sum(L[i, n] * L[j, n] for n in range(j)))
            if pivot == 0 and rest != 0:
                raise DeclarationError(f"D must not be negative: {D.tolist()}.")
            L[i, j] = 0 if pivot == 0 else rest / L[j, j]
    return L


def Blurring(
    event: tuple[int, int], blur: float = 20.0, floor: float = 1e-3, T: float = 0.995, cutoff: float | None = None
) -> SDE:
    """Blurring diffusion (Hoogeboom & Salimans 2022, arXiv:2209.05557), which dissipates heat and adds noise.

    In the DCT basis, alpha_i = cos(πt/2) ((1 - d) e^{-w_i tau} + d) and sigma = sin(πt/2), with
    tau = ½ (blur sin²(πt/2))² and w_i the Laplacian's eigenvalue of frequency i.

    Args:
        event: height and width of the images (batch, channels, height, width).
        blur: the largest width of the blur, in pixels.
        floor: d, what is left of the highest frequencies.
        T: the horizon.
        cutoff: the first time that solvers visit, as in ``SDE``.
    """
    basis, w = DCT(2), sp.Symbol("w", nonnegative=True)
    d, phase = _exact(floor), sp.pi * t / 2
    tau = (_exact(blur) * sp.sin(phase) ** 2) ** 2 / 2
    alpha = sp.cos(phase) * ((1 - d) * sp.exp(-w * tau) + d)
    return SDE.from_kernel(alpha, sp.sin(phase), T, cutoff, params={w: basis.frequencies(tuple(event))}, basis=basis)


def _exact(value: float | sp.Expr) -> sp.Expr:
    """A number as it was typed, 0.1 as 1/10, so that formulas read as in the papers."""
    if isinstance(value, sp.Expr):
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise DeclarationError(f"a number of the catalogue must be finite and real, not {value!r}.")
    return sp.Rational(str(float(value)))
