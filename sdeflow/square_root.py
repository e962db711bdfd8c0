r"""The kernel of square-root diffusions (CIR, squared Bessel): the noncentral chi² law.

With alpha, sigma² of the affine SDE behind it (``sdeflow.symbolic.pearson``) and u_t the state in its standard form,

    u_t / sigma²  ~  noncentral chi²(delta, alpha² u_0 / sigma²),

whose density and its derivatives are those of :mod:`sdeflow.noncentral`. A draw is a gamma variable of shape
delta / 2 + N, N a Poisson variable of mean l / 2, both by inversion of their distribution functions; for large
noncentralities l and delta > 1 it is (sqrt(l) + Z)² + chi²(delta - 1) instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import special
from torch import Tensor

from sdeflow import noncentral
from sdeflow.pearson import PearsonKernel, Standard, as_array

__all__ = ["SquareRootKernel"]

_LARGE = 1e6  # noncentralities from which SciPy's Poisson and chi² functions are not relied on
_MOST_STEPS = 60


class SquareRootKernel(PearsonKernel):
    """The noncentral chi² kernel of g² = s (x - l) with an affine drift: CIR, squared Bessel and their kin."""

    kind = "square root"
    _per_dimension = 0.5

    def _ends(self, origin: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(scale > 0, origin, -torch.inf), torch.where(scale > 0, torch.inf, origin)

    def _inside(self, u: Tensor) -> Tensor:
        return u >= 0

    def _log_density(self, law: Standard) -> Tensor:
        return noncentral.log_density(*_noncentral(law)) - law.var.log()

    def _slope(self, law: Standard) -> Tensor:
        return noncentral.slope(*_noncentral(law)) / law.var

    def _draw(self, uniform: Callable[[], Tensor], law: Standard) -> Tensor:
        (delta,), var = law.shape, law.var
        level, other = uniform(), uniform()
        noncentrality = law.alpha**2 * law.u_0 / torch.where(var > 0, var, torch.inf)
        # Exact: (Z + sqrt(l))² + chi²(delta - 1), where there is more than one dimension.
        shifted = (torch.special.ndtri(level.clamp(1e-300, 1 - 2**-53)) + noncentrality.sqrt()).square()
        large = shifted + 2.0 * _gamma_quantile(0.5 * (delta - 1.0).clamp_min(1e-3), other)
        count = _poisson(as_array(level), as_array(0.5 * noncentrality.clamp_max(_LARGE)))
        small = 2.0 * _gamma_quantile(0.5 * delta + torch.as_tensor(count), other)
        is_large = noncentrality > _LARGE
        drawn = torch.where(is_large & (delta > 1), large, small)
        rest = is_large & (delta <= 1)
        if bool(rest.any()):
            drawn[rest] = _large_quantile(level[rest], noncentrality[rest], 0.5 * delta[rest] - 1.0)
        return var * drawn

    def _quantile(self, level: Tensor, law: Standard) -> Tensor:
        from scipy.stats import ncx2  # slow to import, and only this needs it

        (delta,), var = law.shape, law.var
        noncentrality = law.alpha**2 * law.u_0 / torch.where(var > 0, var, torch.inf)
        large = (noncentrality + delta) > _LARGE
        c = torch.empty_like(level)
        if bool(large.any()):
            c[large] = _large_quantile(level[large], noncentrality[large], 0.5 * delta[large] - 1.0)
        if not bool(large.all()):
            given = (as_array(part[~large]) for part in (level, delta, noncentrality))
            c[~large] = torch.as_tensor(ncx2.ppf(*given))
        return var * c

    def _width(self, u: Tensor, var: Tensor) -> Tensor:
        return 2.0 * (var / u).sqrt()

    def _damping(self, u: Tensor, var: Tensor) -> Tensor:
        return (u / (u + var)).sqrt()


def _noncentral(law: Standard) -> tuple[Tensor, Tensor, Tensor]:
    """c, l and nu."""
    (delta,) = law.shape
    return law.u / law.var, law.alpha.square() * law.u_0 / law.var, 0.5 * delta - 1.0


def _gamma_quantile(shape: Tensor, level: Tensor) -> Tensor:
    return torch.as_tensor(special.gammaincinv(as_array(shape), as_array(level)))


def _poisson(level: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The Poisson variable whose distribution function first reaches ``level``."""
    with np.errstate(invalid="ignore"):
        above = np.ceil(np.nan_to_num(special.pdtrik(level, mean)))  # NaN where the mean is 0
    below = np.maximum(above - 1.0, 0.0)
    return np.where(special.pdtr(below, mean) >= level, below, above)


_GAUSS = np.polynomial.legendre.leggauss(64)


def _large_quantile(level: Tensor, noncentrality: Tensor, nu: Tensor) -> Tensor:
    """The quantile of a noncentral chi² law of mean above 1e6, by Newton's method on its integrated density.

    The density of w = sqrt(c) has unit width or less there, and is a Gaussian's to 1e-3.
    """
    centre = (noncentrality + 2.0 * nu + 1.0).sqrt()  # of w, to a part of its width
    spread = ((noncentrality + nu + 1.0) / (noncentrality + 2.0 * nu + 2.0)).sqrt()
    nodes, weights = (torch.as_tensor(part)[:, None] for part in _GAUSS)
    mirrored = level > 0.5
    target = torch.where(mirrored, 1.0 - level, level).clamp_min(1e-300)
    w = centre + spread * torch.special.ndtri(level.clamp(1e-16, 1.0 - 2**-53))
    for _ in range(_MOST_STEPS):
        far = torch.where(mirrored, w.maximum(centre) + 12.0 * spread, w.minimum(centre) - 12.0 * spread)
        half = 0.5 * (w - far)
        v = far + half * (nodes + 1.0)
        density = torch.exp(noncentral.log_density(v.square(), *(p.expand_as(v) for p in (noncentrality, nu)))) * v * 2
        tail = (density * weights).sum(0) * half.abs()
        here = torch.exp(noncentral.log_density(w.square(), noncentrality, nu)) * w * 2
        step = (torch.where(mirrored, tail - target, target - tail) / here).clamp(-spread, spread)
        w = w + step
        if float(step.abs().max()) <= 1e-13 * float(w.max()):
            break
    return w.square()
