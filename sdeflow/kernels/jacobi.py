r"""The kernel of Jacobi diffusions (Wright-Fisher with mutation), by its eigenfunctions.

With the orthonormal polynomials p_n of the stationary Beta(A, B) law, lambda_n = ½ n (n - 1 + A + B) and the clock tau,

    p(u_t | u_0) = Beta(u_t; A, B) Σ_n p_n(u_t) p_n(u_0) e^{-lambda_n tau},
    P(u_t <= u | u_0) = I_u(A, B) - ½ u (1 - u) Beta(u; A, B) Σ_{n>0} p_n'(u) p_n(u_0) e^{-lambda_n tau} / lambda_n

(the second because (½ u (1 - u) Beta p_n')' = -lambda_n Beta p_n; Karlin & Taylor 1981, 15.13). About sqrt(80 / tau)
terms are needed. They cancel in the far tails, and everywhere where the drift is strong against the noise (A = B = 200,
from a start far from the mean); there, and at clocks for which they are too many, the density is that of a mixture of
positive terms (:mod:`sdeflow.kernels.ancestral`), down to a clock of 1e-7. It takes some 30 ms for each number.

Draws invert the distribution function at late times; at early ones, and where the drift has moved the mean by several
standard deviations of the noise, they follow the mixture: M lineages, of which L ~ Binomial(M, u_0) are of the first
kind, and a Beta(A + L, B + M - L) variable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from scipy import special
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from sdeflow.errors import ScheduleError
from sdeflow.kernels.ancestral import draw_count, mixture, typical_count
from sdeflow.kernels.pearson import PearsonKernel, Standard, as_array

__all__ = ["JacobiKernel"]

Number = TypeVar("Number", np.ndarray, Tensor)  # or mpmath's, which has no types

_MOST_TERMS = 6_000  # a clock of 4e-6 where A + B is about 1, 1e-4 where it is 200
_SHORTEST = 1e-7  # clock of the mixture, whose log-density has an error of some 1e-14 / tau
_FIRST_CLOCK = 1e-4  # at the default cutoff of the Jacobi kernel, where about 1,000 terms are needed
_MANY = 16.0  # lineages, from which their distribution function is had to 1e-11
_DRIVEN = 4.0  # nats that the noise alone would pay for the drift's displacement, above which draws follow the mixture
_LEVEL_ERROR = 1e-6  # of the distribution function that draws invert
_LOST = 1e-10  # the relative rounding error of a sum above which the mixture is taken instead


class JacobiKernel(PearsonKernel):
    """The kernel of g² = s (x - p)(q - x) with an affine drift, by its eigenfunctions."""

    family = "Jacobi"

    @property
    def cutoff(self) -> float:
        """The first time that training and solvers visit."""
        if self.declaration.cutoff is not None:
            return self.declaration.cutoff
        with torch.no_grad():
            return float(self.inner.time_of(-0.5 * math.log(_FIRST_CLOCK)))

    def _ends(self, origin: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return origin, origin + scale

    def _inside(self, u: Tensor) -> Tensor:
        return (u >= 0) & (u <= 1)

    def _log_density(self, law: Standard) -> Tensor:
        total, _, lost = self._summed(law)
        log_p = _log_weight(law) + torch.where(lost, 1.0, total).log()
        if not bool(lost.any()):
            return log_p
        far = [part[lost] for part in (law.u, law.u_0, law.var, *law.shape)]
        return log_p.masked_scatter(lost, _Mixture.apply(*far)[0])

    def _slope(self, law: Standard) -> Tensor:
        A, B = law.shape
        total, slope, lost = self._summed(law)
        below = torch.where(A == 1.0, 0.0, (A - 1.0) / law.u)
        push = below - torch.where(B == 1.0, 0.0, (B - 1.0) / (1.0 - law.u))
        push = push + slope / torch.where(lost, 1.0, total)
        if not bool(lost.any()):
            return push
        far = [part[lost] for part in (law.u, law.u_0, law.var, *law.shape)]
        if law.needs_grad:
            raise ScheduleError(
                "the score of this Jacobi kernel is not differentiable where its eigenfunctions cancel or are too "
                "many: in the far tails, under a strong drift or at early times. Its log-density is: differentiate "
                "log_prob, or take the score under "
                "torch.no_grad()."
            )
        return push.masked_scatter(lost, _Mixture.apply(*far)[1])

    def _summed(self, law: Standard) -> tuple[Tensor, Tensor, Tensor]:
        """Σ p_n(u) p_n(u_0) e^{-lambda_n tau}, its derivative in u, and where its digits are lost."""
        tau, theta = law.var.detach(), float((law.shape[0] + law.shape[1]).detach().max()) if len(law.u) else 0.0
        if bool((tau < _SHORTEST).any()):
            raise ScheduleError(
                f"the clock ∫ s dt = {float(tau.min()):.3g} is too small: below {_SHORTEST:g} the density and the "
                "score of a Jacobi kernel cannot be computed in float64. Its moments and its draws (sample without "
                'noise=, simulate with solver="exact") can. Ask for a later t, or take N(mean, std²) of moments().'
            )
        short = tau < _first_clock(theta)
        law = Standard(law.u, law.u_0, law.alpha, torch.where(short, 1.0, law.var), law.shape)
        total, slope, _, size, _ = (torch.as_tensor(part, device=law.u.device) for part in _series(law))
        lost = short | ~(torch.finfo(torch.float64).eps * size.detach() < _LOST * total.detach())
        return total, torch.where(lost, 0.0, slope), lost

    def _draw(self, uniform: Callable[[], Tensor], law: Standard) -> Tensor:
        level = uniform()
        strong = _has_many_lineages(law)
        drawn = torch.empty_like(level)
        if not bool(strong.all()):
            rest = law.mapped(lambda part: part[~strong])
            drawn[~strong] = self._quantile(level[~strong], rest)
        if bool(strong.any()):
            chosen = law.mapped(lambda part: part[strong])
            drawn[strong] = _by_lineages(chosen, *(part[strong] for part in (level, uniform(), uniform())))
        return drawn

    def _quantile(self, level: Tensor, law: Standard) -> Tensor:
        """By bracketed Newton steps in log(u / (1 - u)), in which an end that is attained has room."""
        target, start, tau, *shape = (as_array(part).reshape(-1) for part in (level, law.u_0, law.var, *law.shape))
        u = np.copy(start)
        left = np.flatnonzero(tau > 0)
        low, high, error = np.full_like(u, -690.0), np.full_like(u, 36.0), np.zeros_like(u)
        angle = np.clip(2.0 * np.arcsin(np.sqrt(u)) + special.ndtri(target) * np.sqrt(tau), 0.05, math.pi - 0.05)
        line = 2.0 * np.log(np.tan(0.5 * angle))
        for _ in range(80):
            if not left.size:
                break
            u[left] = special.expit(line[left])
            below, density, rounding = _distribution(*(part[left] for part in (u, start, tau, *shape)))
            excess = below - target[left]
            error[left] = np.abs(excess) + rounding
            low[left] = np.where(excess < 0, line[left], low[left])
            high[left] = np.where(excess < 0, high[left], line[left])
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                step = line[left] - excess / (density * u[left] * (1.0 - u[left]))
            inside = (step > low[left]) & (step < high[left])
            step = np.where(inside, step, 0.5 * (low[left] + high[left]))
            found = np.abs(excess) <= rounding + np.finfo(float).eps * target[left]  # no step tells more
            step = np.where(found, line[left], step)
            moving = np.abs(step - line[left]) > 1e-13 * (1.0 + np.abs(step))
            line[left] = step
            left = left[moving]
        resolved = (line > -680.0) & (line < 22.0)  # at an end, float64 is what limits the distribution
        if not (error[resolved] < _LEVEL_ERROR).all():
            raise ScheduleError(
                f"the Jacobi diffusion with A, B = {self.shape[0]:.3g}, {self.shape[1]:.3g} has too little noise for "
                "its drift: from this x_0 its distribution function cannot be summed in float64. Its density can, and "
                "draws without noise= can."
            )
        return torch.as_tensor(special.expit(line)).reshape(level.shape)

    def _width(self, u: Tensor, var: Tensor) -> Tensor:
        return (var * (1.0 - u) / u).sqrt()

    def _damping(self, u: Tensor, var: Tensor) -> Tensor:
        across = 4.0 * u * (1.0 - u)
        return (across / (across + var.clamp_max(1.0))).sqrt()


def _log_weight(law: Standard) -> Tensor:
    """The logarithm of the stationary density."""
    (A, B), u = law.shape, law.u
    constant = torch.lgamma(A) + torch.lgamma(B) - torch.lgamma(A + B)
    return torch.special.xlogy(A - 1.0, u) + torch.special.xlog1py(B - 1.0, -u) - constant


def _distribution(
    u: np.ndarray, u_0: np.ndarray, tau: np.ndarray, A: np.ndarray, B: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P(u_t <= u | u_0), its density, and the rounding error of the first."""
    total, _, integral, _, size = _numbers(u, u_0, tau, A, B)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        weight = np.exp(special.xlogy(A - 1.0, u) + special.xlog1py(B - 1.0, -u) - special.betaln(A, B))
        factor = np.where((u > 0) & (u < 1), 0.5 * u * (1.0 - u) * weight, 0.0)
        below = special.betainc(A, B, u) - factor * integral
        return below, weight * total, np.finfo(float).eps * factor * size


def _series(law: Standard) -> tuple[Tensor, ...] | tuple[np.ndarray, ...]:
    """The sums of :func:`_sums`: by NumPy, or by torch where a gradient is asked for."""
    u, u_0, _, tau, A, B = law.parts
    if law.needs_grad:
        return _sums(u, u_0, tau, A, B, _count(float(tau.detach().min()), float((A + B).detach().max())), torch)
    return _numbers(*(as_array(part) for part in (u, u_0, tau, A, B)))


def _numbers(u: np.ndarray, u_0: np.ndarray, tau: np.ndarray, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, ...]:
    u_0, tau, A, B = (_once(part) for part in (u_0, tau, A, B))
    count = _count(float(tau.min()), float((A + B).max())) if tau.size else 0
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite, and is found by its size
        return _sums(u, u_0, tau, A, B, count, np)


def _once(part: np.ndarray) -> np.ndarray:
    """What is the same in all rows as one row, with which the recurrences cost less."""
    return part[:1] if part.ndim and (part == part[:1]).all() else part


def _count(tau: float, theta: float) -> int:
    count = _terms(tau, theta, 45.0)
    if count > _MOST_TERMS:
        raise ScheduleError(
            f"the clock ∫ s dt = {tau:.3g} is too small: the Jacobi kernel's distribution function would need {count} "
            f"terms, and {_MOST_TERMS} are allowed. Draw without noise=, or ask for a later t."
        )
    return count


def _first_clock(theta: float) -> float:
    """The clock from which on the eigenfunctions needed are not too many."""
    return 2.0 * (45.0 + (theta + 2.0) * math.log(_MOST_TERMS + 2.0)) / (_MOST_TERMS - 3.0) ** 2


def _terms(tau: float, theta: float, nats: float) -> int:
    """How many terms leave a rest of e^-nats: n with lambda_n tau - (theta + 2) log n > nats."""
    n = 8.0
    for _ in range(8):
        n = 2.0 + math.sqrt(2.0 * (nats + (theta + 2.0) * math.log(n + 2.0)) / tau)
    return math.ceil(n)


class _Mixture(torch.autograd.Function):
    """log p and its derivative in u, of states (n,) by the mixture; log p is differentiable once."""

    @staticmethod
    def forward(ctx: FunctionCtx, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """log p and d log p / du, (n,) each, from u, u_0, the clock tau, A and B, (n,) each."""
        rows = zip(*(part.detach().cpu().tolist() for part in parts), strict=True)
        found = [_mixed(*row) for row in rows]
        log_p, slopes = (torch.as_tensor(np.array(part), device=parts[0].device) for part in zip(*found, strict=True))
        lost = ~torch.isfinite(log_p)
        if bool(lost.any()):
            u, u_0, tau = (float(part[lost][0]) for part in parts[:3])
            raise ScheduleError(
                f"{int(lost.sum())} of {len(lost)} states lie too far in the tail for the density of this Jacobi "
                f"kernel: {u:.4g} of the way between the ends, from {u_0:.4g} in a clock of {tau:.3g}."
            )
        ctx.save_for_backward(slopes)
        slope = slopes[:, 0].clone()
        ctx.mark_non_differentiable(slope)
        return log_p, slope

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        (slopes,) = ctx.saved_tensors
        return tuple((gradient[:, None] * slopes).unbind(1))


def _mixed(u: float, u_0: float, tau: float, A: float, B: float) -> tuple[float, np.ndarray]:
    u = min(max(u, 1e-300), 1.0 - 2.0**-53)
    with np.errstate(all="ignore"):  # what is not finite is told
        return mixture(u, u_0, tau, A, B)


def _has_many_lineages(law: Standard) -> Tensor:
    """Where draws follow the mixture: at early times, and where the drift makes the eigenfunctions cancel."""
    A, B = law.shape
    level = A / (A + B)
    mean = level + (law.u_0 - level) * torch.exp(-0.5 * (A + B) * law.var)
    moved = 2.0 * (mean.clamp(0, 1).sqrt().asin() - law.u_0.clamp(0, 1).sqrt().asin())
    tau = torch.where(law.var > 0, law.var, 1.0)
    count = torch.as_tensor(typical_count(as_array(tau), as_array(A + B))[0])
    return ((moved.square() > 2.0 * _DRIVEN * law.var) | (count > _MANY)) & (law.var > 0)


def _by_lineages(law: Standard, level: Tensor, of_kind: Tensor, of_state: Tensor) -> Tensor:
    """Exact draws by the mixture, from three numbers uniform on [0, 1) for each."""
    _, u_0, _, tau, A, B = (as_array(part) for part in law.parts)
    lineages = draw_count(as_array(level), tau, A + B)
    left = _of_binomial(as_array(of_kind), lineages, u_0)
    return torch.as_tensor(special.betaincinv(A + left, B + lineages - left, as_array(of_state)))


def _of_binomial(level: np.ndarray, count: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """The successes whose distribution function first reaches ``level``; scipy.stats would take a second to import."""

    def reached(k: np.ndarray) -> np.ndarray:
        return (k >= count) | (special.betainc(np.maximum(count - k, 1.0), k + 1.0, 1.0 - chance) >= level)

    k = np.clip(np.nan_to_num(np.ceil(special.bdtrik(level, count, chance))), 0.0, count)  # NaN at a chance of 0
    k = np.where((k > 0) & reached(k - 1.0), k - 1.0, k)
    return np.where(reached(k), k, k + 1.0)


def _sums(
    u: Number, u_0: Number, tau: Number, A: Number, B: Number, count: int, library: ModuleType
) -> tuple[Number, ...]:
    """Σ p_n(u) p_n(u_0) e^{-lambda_n tau} over n = 0 to ``count``, its derivative in u, the sum of the distribution
    function, and the sums of moduli of the first and the third, in the numbers of NumPy, torch or mpmath."""
    one = 0.0 * u + 1.0
    p, p_before, slope, slope_before, q, q_before = one, 0.0 * one, 0.0 * one, 0.0 * one, 0.0 * u_0 + 1.0, 0.0 * u_0
    total, derivative, integral = one, 0.0 * one, 0.0 * one
    size, integral_size = one, 0.0 * one
    below = 0.0 * one
    for n in range(count):
        middle, above = _recurrence(n, A, B, library)
        z, z_0 = 2.0 * u - 1.0 - middle, 2.0 * u_0 - 1.0 - middle
        slope, slope_before = (z * slope + 2.0 * p - below * slope_before) / above, slope
        p, p_before = (z * p - below * p_before) / above, p
        q, q_before = (z_0 * q - below * q_before) / above, q
        eigenvalue = (n + 1) * (n + A + B) / 2
        weight = q * library.exp(-eigenvalue * tau)
        total = total + weight * p
        derivative = derivative + weight * slope
        integral = integral + weight * slope / eigenvalue
        size = size + abs(weight * p)
        integral_size = integral_size + abs(weight * slope) / eigenvalue
        below = above
    return total, derivative, integral, size, integral_size


def _recurrence(n: int, A: Number, B: Number, library: ModuleType) -> tuple[Number, Number]:
    """a_n and b_{n+1} of z p_n = b_{n+1} p_{n+1} + a_n p_n + b_n p_{n-1}, z = 2u - 1, orthonormal under Beta(A, B)."""
    k = 2 * n + A + B
    if n == 0:  # where k - 2, which cancels, may be 0
        return (A - B) / k, 2 * library.sqrt(A * B / (k + 1)) / k
    middle = (A - B) * (A + B - 2) / ((k - 2) * k)
    return middle, 2 * library.sqrt((n + 1) * (n + A) * (n + B) * (n + A + B - 1) / ((k + 1) * (k - 1))) / k
