r"""The kernel of square-root diffusions (CIR, squared Bessel): the noncentral chi² law.

With alpha, sigma² of the affine SDE behind it (``sdeflow.symbolic.pearson``) and u_t the state in its standard form,

    u_t / sigma²  ~  noncentral chi²(delta, alpha² u_0 / sigma²),

whose density and its derivatives are those of :mod:`sdeflow.numerics.noncentral`. A draw is a gamma variable of shape
delta / 2 + N, N a Poisson variable of mean l / 2, both by inversion of their distribution functions; for large
noncentralities l and delta > 1 it is (sqrt(l) + Z)² + chi²(delta - 1) instead.

**Conditioned on its end** (Pitman & Yor, Z. Wahrscheinlichkeitstheorie 59, 1982, for squared Bessel processes): with
alpha_1, v_1 of the way from s to t, alpha_2, v_2 from t to T and alpha, v from s to T,

    u_t / tau | u_s, u_T  ~  noncentral chi²(delta + 4 N, l_1 + l_2),     tau = v_1 v_2 / v,
    l_1 = alpha_1² tau u_s / v_1²,     l_2 = alpha_2² tau u_T / v_2²,     z = sqrt(l_1 l_2) = alpha sqrt(u_s u_T) / v,
    P(N = n) = (z / 2)^{2 n + nu} / (I_nu(z) n! Γ(n + nu + 1)),     nu = delta / 2 - 1,

which is p(u_t | u_s) p(u_T | u_t) / p(u_T | u_s) with the power series of both Bessel functions of u_t.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import special
from torch import Tensor

from sdeflow.errors import ScheduleError
from sdeflow.kernels.gaussian import inside_ends
from sdeflow.kernels.pearson import PearsonKernel, Standard, as_array
from sdeflow.numerics import noncentral
from sdeflow.numerics.noise import NoiseStream

__all__ = ["Pinned", "SquareRootKernel"]

_LARGE = 1e6  # noncentralities from which SciPy's Poisson and chi² functions are not relied on
_MOST_STEPS = 60
_REACH, _NODES = 9.0, 96  # of the counts N that are tried: standard deviations, and how many on either side
_AT_ONCE = 20_000  # counts drawn
_LARGEST = 1e10  # z, from which the rounding error of log P(N = n) would exceed 1e-4


class SquareRootKernel(PearsonKernel):
    """The noncentral chi² kernel of g² = s (x - l) with an affine drift: CIR, squared Bessel and their kin."""

    family = "square root"
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

    def pinned(self, x_s: Tensor, x_T: Tensor, s: float, t: float) -> Pinned:
        """The law of x_t given x_s and x_T, (batch, *event) both, for s < t < T.

        Raises:
            DataError: for an x_s or x_T outside the domain.
        """
        origin, scale, before = self._standard(x_s, x_s, t, s)
        end = self._standard_start(x_T, origin, scale, "x_T")
        end = end.clamp_min(1e-300)  # at 0, where the density of x_T may be 0 or infinite, the law is the limit
        alpha, var = self._alpha_var(x_s, self.T, t)
        return Pinned(self, before, Standard(end, before.u_0, alpha, var, before.shape), (origin, scale), x_s.dtype)


class Pinned:
    """The law of x_t given x_s and x_T, as :meth:`SquareRootKernel.pinned` makes it; see the module.

    Args:
        kernel: of the process.
        before: the law of u_t given x_s.
        after: the law of u_T given a state at t, at the u of x_T.
        frame: origin and scale, x = origin + scale u.
        dtype: of draws.
    """

    def __init__(
        self,
        kernel: SquareRootKernel,
        before: Standard,
        after: Standard,
        frame: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.kernel, self.before, self.after, self.dtype = kernel, before, after, dtype
        self.origin, self.scale = frame
        end = after.u
        (_, start, alpha_1, v_1, self.delta), (_, _, alpha_2, v_2, _) = before.parts, after.parts
        v = v_2 + alpha_2.square() * v_1
        self.whole = Standard(end, start, alpha_1 * alpha_2, v, before.shape)
        self.tau = v_1 * v_2 / v
        self.noncentrality = (alpha_1 / v_1).square() * self.tau * start + (alpha_2 / v_2).square() * self.tau * end
        self.z_squared = (alpha_1 * alpha_2 / v).square() * start * end

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t."""
        count, spread = noncentral.bessel_counts(self.z_squared, 0.5 * self.delta - 1.0)
        mean = self.delta + 4.0 * count + self.noncentrality
        var = 2.0 * (mean + self.noncentrality) + 16.0 * spread
        return self.origin + self.scale * self.tau * mean, self.scale.abs() * self.tau * var.sqrt()

    def log_prob(self, x_t: Tensor) -> Tensor:
        """log p(x_t | x_s, x_T) for each coordinate; -inf outside the domain."""
        u = (x_t.to(torch.float64) - self.origin) / self.scale
        inside, density = self.kernel._inside(u), self.kernel._log_density
        u = torch.where(inside, u, 1.0)
        onward = Standard(self.after.u, u, self.after.alpha, self.after.var, self.after.shape)
        log_p = density(self.before.at(u)) + density(onward) - density(self.whole) - self.scale.abs().log()
        return torch.where(inside, log_p, -torch.inf)

    def draw(self, noise: NoiseStream) -> Tensor:
        """x_t, exactly, without a gradient.

        Raises:
            ValueError: where a gradient would be lost.
            ScheduleError: where the noise is too small for float64.
        """
        if self.before.needs_grad or self.after.needs_grad:
            raise ValueError(
                "draws of a square-root bridge have no gradient, its moments and log_prob do: call it under "
                "torch.no_grad()."
            )
        tau, noncentrality, z_squared, delta = (
            part.detach().cpu() for part in (self.tau, self.noncentrality, self.z_squared, self.delta)
        )

        def uniform() -> Tensor:
            return noise.uniform(tuple(tau.shape), torch.float64)

        count = _counts(uniform(), z_squared.sqrt(), 0.5 * delta - 1.0)
        law = Standard(tau, noncentrality * tau, torch.ones_like(tau), tau, (delta + 4.0 * count,))
        x = self.origin + self.scale * self.kernel._draw(uniform, law).to(self.tau.device)
        return inside_ends(x, *self.kernel._ends(self.origin, self.scale), self.dtype).to(self.dtype)


def _counts(level: Tensor, z: Tensor, nu: Tensor) -> Tensor:
    """The N of Bessel's distribution whose distribution function first reaches ``level``; arguments of one shape.

    Where N spreads widely only every second, third, ... n is tried: a trapezoidal rule for its mixture of chi² laws,
    which are smooth in n, with an error of e^-100.
    """
    if not level.numel():
        return level
    if float(z.max()) > _LARGEST:
        raise ScheduleError(
            f"the noise of this bridge is too small to draw from it: x is {float(z.max()):.1e} times its variance per "
            f"unit of x, and {_LARGEST:.0e} is the most."
        )
    found, offsets = [], torch.arange(-_NODES, _NODES + 1, dtype=torch.float64)
    parts = (part.reshape(-1, 1).split(_AT_ONCE) for part in (level, z, nu))
    for level_, z_, nu_ in zip(*parts, strict=True):
        mode = 0.5 * (torch.hypot(nu_, z_) - nu_)
        std = ((mode + 1.0) * (mode + nu_ + 1.0) / (2.0 * mode + nu_ + 2.0)).sqrt()
        n = mode.round() + (_REACH * std / _NODES).ceil() * offsets
        log_p = 2.0 * torch.special.xlogy(n, 0.5 * z_) - torch.lgamma(n + 1.0) - torch.lgamma(n + nu_ + 1.0)
        total = torch.where(n < 0, -torch.inf, log_p).softmax(1).cumsum(1)
        first = torch.searchsorted(total, level_ * total[:, -1:])
        found.append(n.gather(1, first.clamp_max(2 * _NODES)))
    return torch.cat(found).reshape(level.shape)


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
