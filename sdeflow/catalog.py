"""The named SDEs of the literature, each a declaration like any user's."""

from __future__ import annotations

import math
from numbers import Real

import sympy as sp

from sdeflow.errors import DeclarationError
from sdeflow.sde import SDE
from sdeflow.symbolic.symbols import t, x

__all__ = ["EDM", "OU", "VE", "VP", "CosineVP", "FlowMatching", "SubVP"]


def VP(beta_min: float = 0.1, beta_max: float = 20.0, T: float = 1.0) -> SDE:
    """Variance preserving, the limit of DDPM (arXiv:2011.13456): dx = -½ beta x dt + √beta dw, beta linear in t."""
    beta_min, beta_max = _exact(beta_min), _exact(beta_max)
    beta = beta_min + (beta_max - beta_min) * t
    return SDE(f=-beta * x / 2, g=sp.sqrt(beta), T=T)


def SubVP(beta_min: float = 0.1, beta_max: float = 20.0, T: float = 1.0) -> SDE:
    """Sub-variance preserving (arXiv:2011.13456): VP's drift, g² = beta (1 - exp(-2 ∫ beta)), sigma = 1 - alpha²."""
    beta_min, beta_max = _exact(beta_min), _exact(beta_max)
    beta = beta_min + (beta_max - beta_min) * t
    integral = beta_min * t + (beta_max - beta_min) * t**2 / 2
    return SDE(f=-beta * x / 2, g=sp.sqrt(beta * (1 - sp.exp(-2 * integral))), T=T)


def VE(sigma_min: float = 0.01, sigma_max: float = 50.0) -> SDE:
    """Variance exploding, the limit of NCSN (arXiv:2011.13456): sigma(t) geometric from sigma_min to sigma_max.

    The kernel starts with variance P0 = sigma_min², so that sigma(t)² is the variance itself.
    """
    start, ratio = _exact(sigma_min), _exact(sigma_max) / _exact(sigma_min)
    return SDE(f=0, g=start * ratio**t * sp.sqrt(2 * sp.log(ratio)), P0=start**2)


def CosineVP(T: float = 0.995) -> SDE:
    """The cosine schedule (arXiv:2102.09672) in continuous time: alpha = cos(πt/2), sigma = sin(πt/2)."""
    beta = sp.pi * sp.tan(sp.pi * t / 2)
    return SDE(f=-beta * x / 2, g=sp.sqrt(beta), T=T)


def OU(theta: float = 1.0, mu: float = 0.0, sigma: float | sp.Expr = sp.sqrt(2), T: float = 5.0) -> SDE:  # noqa: B008
    """Ornstein-Uhlenbeck: dx = theta (mu - x) dt + sigma dw, stationary law N(mu, sigma² / (2 theta))."""
    return SDE(f=_exact(theta) * (_exact(mu) - x), g=_exact(sigma), T=T)


def EDM(T: float = 80.0) -> SDE:
    """Karras et al. 2022 (arXiv:2206.00364): alpha = 1, sigma = t."""
    return SDE(f=0, g=sp.sqrt(2 * t), T=T)


def FlowMatching(T: float = 0.999) -> SDE:
    """The SDE whose kernel is (1 - t) x_0 + t noise, the path of flow matching (arXiv:2210.02747)."""
    return SDE(f=-x / (1 - t), g=sp.sqrt(2 * t / (1 - t)), T=T)


def _exact(value: float | sp.Expr) -> sp.Expr:
    """A number as it was typed, 0.1 as 1/10, so that formulas read as in the papers."""
    if isinstance(value, sp.Expr):
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise DeclarationError(f"a number of the catalogue must be finite and real, not {value!r}.")
    return sp.Rational(str(float(value)))
