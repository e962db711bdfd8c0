r"""The noncentral chi² density in torch: exact to rounding at every noncentrality, and differentiable.

With nu = delta / 2 - 1 > -1 and r = sqrt(c l), the density of c ~ noncentral chi²(delta, l) is

    p(c) = ½ (c / l)^{nu / 2} e^{-(c + l) / 2} I_nu(r).

**Large arguments.** Debye's expansion (DLMF 10.41.3) of I_nu, in 1 / z with z = sqrt(nu² + r²), gives

    log p = φ - ½ log(8 π z) + log Σ_k U_k(nu / z) / nu^k,     φ = nu log(c / (nu + z)) + z - ½ (c + l).

φ is 0 at its peak c = l + 2 nu, but its terms are as large as l, so they would cancel. With q = (nu + z) / c and

    q - 1 = ε = (l + 2 nu - c) / (c (1 + l / (nu + z))),     φ = ½ ε (c - l / q) - nu log(q),
    ∂φ/∂c = ½ ε,     ∂φ/∂l = -½ ε / q,     ∂φ/∂nu = -log(q),

no term of that size is left: ε contains the only difference. U_k(nu / z) / nu^k is z^{-k} times a polynomial in
(nu / z)², so the expansion also holds for nu = 0 and for small or negative orders (Hankel's expansion).

**Small arguments.** The power series of I_nu has only positive terms:

    log p = -log 2 + nu log(c / 2) - ½ (c + l) - log Γ(nu + 1) + log S_nu,     S_nu = Σ_k (r² / 4)^k / (k! (nu + 1)_k).
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["bessel_counts", "log_bessel", "log_density", "slope"]

_LARGE = 40.0  # Debye's expansion is used for z >= 40, where the first term left out is 1e-15
_ORDER = 13  # terms of that expansion
_TERMS = 72  # terms of the power series, for r up to _LARGE


def log_density(c: Tensor, noncentrality: Tensor, nu: Tensor) -> Tensor:
    """log p(c) of the noncentral chi² law of dimension 2 nu + 2, in nats, elementwise, differentiable in all arguments.

    Args:
        c: the points, c >= 0, in float64.
        noncentrality: l >= 0, of the shape of c.
        nu: the order, nu > -1, of the shape of c.
    """
    return _by_size(_debye, _series, c, noncentrality, nu)


def slope(c: Tensor, noncentrality: Tensor, nu: Tensor) -> Tensor:
    """∂ log p / ∂c of :func:`log_density`, with the same arguments; differentiable too."""
    return _by_size(_debye_slope, _series_slope, c, noncentrality, nu)


def log_bessel(nu: Tensor, r: Tensor) -> Tensor:
    """log of e^{-r} (r / 2)^{-nu} I_nu(r), for nu > -1 and r >= 0, of one shape, in float64."""

    def large(r: Tensor, nu: Tensor) -> Tensor:
        z = torch.hypot(nu, r)
        exponent = nu.square() / (z + r) - nu * torch.log(0.5 * (nu + z))  # z - r + nu log(2 / (nu + z))
        return exponent - 0.5 * torch.log(2.0 * math.pi * z) + _correction(z, nu)[0].log()

    def small(r: Tensor, nu: Tensor) -> Tensor:
        return _power_series(0.25 * r.square(), nu).log() - torch.lgamma(nu + 1.0) - r

    return _by_size(lambda r, _, nu: large(r, nu), lambda r, _, nu: small(r, nu), r, r, nu)


def bessel_counts(z_squared: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of Bessel's distribution P(n) = (z / 2)^{2n + nu} / (I_nu(z) n! Γ(n + nu + 1)), differentiable.

    2 E[N] + nu = z I_nu'(z) / I_nu(z) and E[N (N + nu)] = z² / 4. With ζ = sqrt(nu² + z²) and ε from Debye's expansion,
    the mean is (ζ - nu) / 2 + ε and the variance -ε (ζ + ε), without cancellation.

    Args:
        z_squared: z², >= 0, in float64.
        nu: the order, nu > -1, of the shape of z².
    """

    def parts(z_squared: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zeta = torch.sqrt(nu.square() + z_squared)
        value, rate = _correction(zeta, nu)
        return zeta, 0.5 * z_squared / (zeta + nu), 0.25 * z_squared / zeta * (2.0 * rate / value - 1.0 / zeta)

    def large_mean(z_squared: Tensor, _: Tensor, nu: Tensor) -> Tensor:
        _, middle, excess = parts(z_squared, nu)
        return middle + excess

    def large_variance(z_squared: Tensor, _: Tensor, nu: Tensor) -> Tensor:
        zeta, _, excess = parts(z_squared, nu)
        return -excess * (zeta + excess)

    def small_mean(z_squared: Tensor, _: Tensor, nu: Tensor) -> Tensor:
        y = 0.25 * z_squared
        return y / (nu + 1.0) * _power_series(y, nu + 1.0) / _power_series(y, nu)

    def small_variance(z_squared: Tensor, _: Tensor, nu: Tensor) -> Tensor:
        mean = small_mean(z_squared, _, nu)
        return 0.25 * z_squared - mean * (mean + nu)

    one = torch.ones_like(z_squared)
    mean = _by_size(large_mean, small_mean, z_squared, one, nu)
    return mean, _by_size(large_variance, small_variance, z_squared, one, nu)


def _by_size(large, small, c: Tensor, noncentrality: Tensor, nu: Tensor) -> Tensor:  # noqa: ANN001
    """``large`` where z >= 40, ``small`` elsewhere."""
    is_large = (nu.square() + c * noncentrality).detach() >= _LARGE**2
    if bool(is_large.all()):
        return large(c, noncentrality, nu)
    if not bool(is_large.any()):
        return small(c, noncentrality, nu)
    out = torch.zeros_like(c)
    out = out.masked_scatter(is_large, large(*(part[is_large] for part in (c, noncentrality, nu))))
    return out.masked_scatter(~is_large, small(*(part[~is_large] for part in (c, noncentrality, nu))))


# -------------------------------------------------------------------- large arguments


def _tilt(c: Tensor, noncentrality: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """z and ε = (nu + z) / c - 1."""
    z = torch.sqrt(nu.square() + c * noncentrality)
    return z, (noncentrality + 2.0 * nu - c) / (c * (1.0 + noncentrality / (z + nu)))


class _Context(Protocol):
    """The object that autograd passes from ``forward`` to ``backward``."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Exponent(torch.autograd.Function):
    """φ(c, l, nu) with the derivatives of the module's docstring, which do not cancel."""

    @staticmethod
    def forward(ctx: _Context, c: Tensor, noncentrality: Tensor, nu: Tensor) -> Tensor:
        ctx.save_for_backward(c, noncentrality, nu)
        _, tilt = _tilt(c, noncentrality, nu)
        return 0.5 * tilt * (c - noncentrality / (1.0 + tilt)) - nu * torch.log1p(tilt)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, tilt = _tilt(*ctx.saved_tensors)
        return 0.5 * gradient * tilt, -0.5 * gradient * tilt / (1.0 + tilt), -gradient * torch.log1p(tilt)


def _debye(c: Tensor, noncentrality: Tensor, nu: Tensor) -> Tensor:
    z, _ = _tilt(c, noncentrality, nu)
    return _Exponent.apply(c, noncentrality, nu) - 0.5 * torch.log(8.0 * math.pi * z) + _correction(z, nu)[0].log()


def _debye_slope(c: Tensor, noncentrality: Tensor, nu: Tensor) -> Tensor:
    z, tilt = _tilt(c, noncentrality, nu)
    value, rate = _correction(z, nu)  # ∂z/∂c = l / (2 z)
    return 0.5 * tilt + 0.5 * noncentrality / z * (rate / value - 0.5 / z)


def _correction(z: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_k U_k(nu / z) / nu^k, and its derivative in z."""
    s = 1.0 / z
    P = (nu * s).square()[..., None]
    table = torch.tensor(_coefficients(), dtype=z.dtype, device=z.device)  # (j, k)
    power = torch.arange(_ORDER, device=z.device)
    values = torch.zeros_like(P) + table[-1]
    slopes = torch.zeros_like(values)
    for row in range(_ORDER - 2, -1, -1):  # Horner's rule in P, and its derivative
        slopes = slopes * P + values
        values = values * P + table[row]
    rates = -(power * values + 2.0 * P * slopes)  # of z^-k A_k(nu² / z²), times z^(k + 1)
    total, rate = torch.zeros_like(s), torch.zeros_like(s)
    for k in range(_ORDER - 1, -1, -1):
        total, rate = total * s + values[..., k], rate * s + rates[..., k]
    return total, rate * s


@cache
def _coefficients() -> list[list[float]]:
    """a_{k, j} of U_k(p) = p^k Σ_j a_{k, j} p^{2j}, as rows over k for each j, by DLMF 10.41.9."""
    u = {0: Fraction(1)}
    out = [[0.0] * _ORDER for _ in range(_ORDER)]
    for k in range(_ORDER):
        for power, a in u.items():
            out[(power - k) // 2][k] = float(a)
        following: dict[int, Fraction] = {}
        for n, a in u.items():  # ½ p² (1 - p²) U' + ⅛ ∫ (1 - 5 p²) U
            for power, value in (
                (n + 1, a * n / 2 + a / (8 * (n + 1))),
                (n + 3, -a * n / 2 - 5 * a / (8 * (n + 3))),
            ):
                following[power] = following.get(power, Fraction(0)) + value
        u = following
    return out


# -------------------------------------------------------------------- small arguments


def _power_series(y: Tensor, nu: Tensor) -> Tensor:
    """S_nu = Σ_k y^k / (k! (nu + 1)_k)."""
    total = torch.ones_like(y)
    for k in range(_TERMS, 0, -1):
        total = 1.0 + total * (y / (k * (nu + k)))
    return total


def _series(c: Tensor, noncentrality: Tensor, nu: Tensor) -> Tensor:
    log_s = _power_series(0.25 * c * noncentrality, nu).log()
    edge = torch.special.xlogy(nu, 0.5 * c) - torch.lgamma(nu + 1.0) - math.log(2.0)
    return edge - 0.5 * (c + noncentrality) + log_s


def _series_slope(c: Tensor, noncentrality: Tensor, nu: Tensor) -> Tensor:
    y = 0.25 * c * noncentrality
    pull = 0.25 * noncentrality / (nu + 1.0) * _power_series(y, nu + 1.0) / _power_series(y, nu)
    push = torch.where((c == 0) & (nu == 0), torch.zeros_like(c), nu / c)
    return push - 0.5 + pull
