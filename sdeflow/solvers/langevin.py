r"""Langevin dynamics: on one score, annealed over noise scales, and as the corrector of a predictor.

Unadjusted Langevin dynamics on a density p, in the convention with ε (others write ε/2 and √ε: their ε is twice this),

    x <- x + ε ∇ log p(x) + √(2ε) ξ,      ξ ~ N(0, 1),

keeps p up to O(ε): for p = N(0, c²) its stationary variance is c² / (1 - ε / (2 c²)), and from ε = 2 c² on it explodes.

**At a time of an SDE** the kernel's covariance P = sigma sigmaᵀ is the natural preconditioner. With a number e,

    u <- u + sigma (e sigmaᵀ s(u, t) + √(2e) ξ),

that is ε = e sigma² elementwise, while a coupled state, or a schedule per coordinate, gets a step along each direction
in proportion to its noise. Whatever the data, sigmaᵀ (-∇² log p_t) sigma ⪯ 1 (it is 1 minus a covariance): below
e = 2 no direction of any p_t is too steep, for every SDE and at every t. Three published rules are choices of e::

    NCSN     e = ε / zeta_L², the same for all scales: in z = x / alpha, ε_i = ε zeta_i² / zeta_L², zeta = sigma / alpha
    "snr"    e = 2 α_i (r |ξ| / |sigmaᵀ s|)² for each sample, which elementwise is Song's ε = 2 α_i (r |ξ| / |s|)²
    "kernel" e = 2 r², a function of nothing: what "snr" comes to where p_t is close to its noise, and α_i = 1

In Song's code α_i = 1 - beta_i for VP and sub-VP, and 1 for VE. For a step between t and an earlier s it is here
(alpha_t / alpha_s)², the same number, and for a matrix det(Φ_t Φ_s⁻¹)^(2/k); never above 1.

Song & Ermon 2019 (arXiv:1907.05600), Song & Ermon 2020 (arXiv:2006.09011), Song et al. 2021 (arXiv:2011.13456).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import NonFiniteStateError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.numerics.checks import (
    checked_choice,
    checked_count,
    checked_dtype,
    checked_flag,
    checked_numbers,
    checked_real,
    checked_shape,
    checked_states,
    checked_within,
)
from sdeflow.numerics.linear import Factor, Linear, multiplied, per_sample
from sdeflow.numerics.noise import NoiseStream, resolve_seed
from sdeflow.scores import DeclaredSDE, ScoreFunction, as_score, evaluating
from sdeflow.scores.function import checked, network_time
from sdeflow.solvers.base import Solver
from sdeflow.solvers.clock import Clock
from sdeflow.solvers.problem import Problem, View
from sdeflow.solvers.watch import Watch

__all__ = [
    "AnnealedLangevin",
    "PredictorCorrector",
    "annealed_langevin",
    "geometric_scales",
    "langevin",
    "matched_eps",
    "number_of_scales",
    "scale_ratio",
]

AnyScore = ScoreFunction | Callable[[Tensor, Tensor], Tensor]
Predictor = Callable[[Problem, Tensor, float, float], Tensor]
Seed = int | torch.Generator | None

_LARGEST_STEP = 1.0  # of e: the drift then goes all the way to alpha E[x_0 | x_t]


# -------------------------------------------------------------------------------------------- predictor and corrector


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    r"""A step of the reverse SDE, then Langevin steps at the time it arrives at, which mend its law.

    A predictor takes u at t to the earlier time s. With the forward transition u_t = A u_s + Σ ξ and Q = Σ Σᵀ,

        "reverse_diffusion"    u <- (2 - A) u + Q s(u, t) + Σ ξ             (Song's, its discrete step the exact one)
        "ancestral"            u <- A⁻¹ (u + Q s(u, t)) + root(C) ξ         C = Cov(u_s | u_t, x_0), as in DDPM
        "none"                 u <- u                                       (the corrector alone)

    and each of ``corrector_steps`` Langevin steps at s is u <- u + sigma (e sigmaᵀ s(u, s) + √(2e) ξ) with e by the
    rule ``step`` (see the module).

    Args:
        predictor: a name, or any function (problem, u, t, s) -> u of states (batch, *event), centred and in the
            kernel's basis; it may draw ``problem.normal`` and should call ``problem.score`` once.
        corrector_steps: Langevin steps after each predictor step; 0 leaves the predictor alone.
        snr: r, the ratio of a step's drift to its noise.
        step: "snr", from the score and the noise of each sample (never of the batch, so that a sample does not depend
            on others), or "kernel", a number.

    Raises:
        ValueError: for options out of range, and for options of the corrector without corrector steps.

    References:
        | Score-based generative modeling through stochastic differential equations (Song et al., 2021), algorithm 1
        | https://arxiv.org/abs/2011.13456

    Note:
        Half of the calls go to the corrector, which exponential solvers of order 2 use better. "snr" needs many
        dimensions: its e is a ratio of norms, capped at 1, and with a handful of coordinates it is mostly noise; take
        "kernel" there. Song's "reverse diffusion" is not Euler-Maruyama, and DDPM's ancestral sampling has other
        noise than Song's code of that name, whose variance is Q.
    """

    predictor: str | Predictor = "reverse_diffusion"
    corrector_steps: int = 1
    snr: float = 0.16
    step: str = "kernel"

    kinds = ("sde",)
    needs_kernel = True
    adaptive = False

    def __post_init__(self) -> None:
        if not callable(self.predictor):
            checked_choice(self.predictor, "predictor", _PREDICTORS, "a function")
        checked_count(self.corrector_steps, "corrector_steps", 0)
        if self.predictor == "none" and not self.corrector_steps:
            raise ValueError(f"there is nothing to do with {self.corrector_steps} corrector steps and no predictor.")
        checked_choice(self.step, "step", ("snr", "kernel"))
        wanted = "between 0 and 1, where Langevin dynamics turn unstable"
        checked_real(self.snr, "snr", wanted, lambda number: 0.0 < number < 1.0)
        if not self.corrector_steps and (self.snr, self.step) != (0.16, "kernel"):
            raise ValueError(f"snr and step are of the corrector: give corrector_steps > 0, or leave them out: {self}.")

    @property
    def calls_per_step(self) -> int:
        """Calls of the score in a step."""
        return self.corrector_steps + (self.predictor != "none")

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        problem.start(y)
        u = y.reshape(-1, *problem.event)
        times = problem.times(steps)
        predict = self.predictor if callable(self.predictor) else _PREDICTORS[self.predictor]
        path = problem.kernel.path(u, torch.as_tensor(times, dtype=torch.float64))
        langevin = _LangevinSteps(problem, path.sigma[1:], times[1:], u)
        log_scale = _log_scale(path.alpha)
        kept = torch.exp(2.0 * (log_scale[:-1] - log_scale[1:])).clamp(max=1.0).tolist()
        for i in range(len(times) - 1):
            u = predict(problem, u, float(times[i]), float(times[i + 1]))
            for _ in range(self.corrector_steps):
                u = langevin(i, u, self._rule(kept[i]))
            problem.observe(i + 1, float(times[i + 1]), u)
        return problem.finish(u.flatten(1))

    def _rule(self, kept: float) -> float | Callable[[Tensor, Tensor], Tensor]:
        """e, or the function of the noise and the whitened score that gives it for each sample."""
        if self.step == "kernel":
            return 2.0 * self.snr**2

        def by_ratio(noise: Tensor, whitened: Tensor) -> Tensor:
            smallest = torch.finfo(noise.dtype).tiny
            ratio = _square_norm(noise) / _square_norm(whitened).clamp_min(smallest)
            return (2.0 * kept * self.snr**2 * ratio).clamp(max=_LARGEST_STEP)

        return by_ratio


def _reverse_diffusion(problem: Problem, u: Tensor, t: float, s: float) -> Tensor:
    """(2 - A) u + Q s(u, t) + Σ ξ."""
    path = problem.kernel.transition(u, s, t, exactly=True)
    score = problem.score(u, t)
    noise = problem.normal(tuple(u.shape), u.dtype, u.device)
    return 2.0 * u - path.alpha(u) + path.sigma(path.sigma.T(score) + noise)


def _ancestral(problem: Problem, u: Tensor, t: float, s: float) -> Tensor:
    """A⁻¹ (u + Q s(u, t)) + root(C) ξ with C = (P_s⁻¹ + Aᵀ Q⁻¹ A)⁻¹ = R L⁻ᵀ L⁻¹ Rᵀ, L Lᵀ = 1 + Rᵀ Aᵀ Q⁻¹ A R."""
    path = problem.kernel.transition(u, s, t, exactly=True)
    root = problem.kernel.path(u, torch.tensor(s, dtype=torch.float64)).sigma
    seen = path.sigma.inverse @ path.alpha @ root
    spread = root @ seen.T.root_of_one_plus_gram.T.inverse
    score = problem.score(u, t)
    noise = problem.normal(tuple(u.shape), u.dtype, u.device)
    return path.alpha.inverse(u + path.sigma.gram(score)) + spread(noise)


def _unmoved(problem: Problem, u: Tensor, t: float, s: float) -> Tensor:
    return u


_PREDICTORS: dict[str, Predictor] = {
    "reverse_diffusion": _reverse_diffusion,
    "ancestral": _ancestral,
    "none": _unmoved,
}


# -------------------------------------------------------------------------------------------- Langevin on one score


def langevin(score: AnyScore, x: Tensor, steps: int, step: float, *, t: float, seed: Seed = None) -> Tensor:
    """Unadjusted Langevin dynamics x <- x + step · s(x, t) + √(2 step) ξ on the score at one time.

    Args:
        score: a score, or any function (x, t) -> ∇ log p, which sees t as (batch,).
        x: where it starts, (batch, *event).
        steps: how many steps.
        step: ε. Of p = N(0, c²) it leaves variance c² / (1 - ε / (2 c²)), and it must stay below 2 c².
        t: the time at which the score is asked.
        seed: makes the result reproducible; sample i does not depend on the batch size.

    Returns:
        The last state, shaped as ``x``.

    Raises:
        ValueError: for ``steps`` or ``step`` out of range.
        NonFiniteStateError: where it explodes, so that the step is too large.

    Note:
        At a small noise level it cannot find the weights of modes far apart, in any useful time; see
        :func:`annealed_langevin`. There is no Metropolis step: the law is right up to O(step).
    """
    checked_count(steps, "steps", 0)
    checked_within(step, "step", 0.0, math.inf)
    x = checked_states(x)
    checked_real(t, "t", "a finite number", math.isfinite)
    stream, width, dtype = NoiseStream(seed, "langevin"), math.sqrt(2.0 * step), x.dtype
    time = torch.tensor(t, dtype=torch.float64)
    time = time if isinstance(score, ScoreFunction) else network_time(time, x)
    with torch.inference_mode(False), torch.no_grad(), evaluating(score):
        x = (x.float() if dtype in (torch.float16, torch.bfloat16) else x).clone()  # small steps need the digits
        for _ in range(steps):
            noise = stream.normal(tuple(x.shape), x.dtype, x.device)
            seen = x.to(dtype) if dtype != x.dtype else x.clone()
            x.add_(checked(score(seen, time), seen, "the score").to(x.dtype), alpha=step).add_(noise, alpha=width)
    bad = (~torch.isfinite(x.flatten(1)).all(1)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteStateError(
            f"Langevin dynamics exploded in {len(bad)} of {len(x)} samples: step = {step:g} is too large for this "
            "score, whose steepest direction must stay below 2 / step.",
            t=t, nfe=steps, bad_rows=bad, partial=x,
        )  # fmt: skip
    return x.to(dtype)


# -------------------------------------------------------------------------------------------- annealed Langevin


@dataclass(frozen=True)
class AnnealedLangevin(Solver):
    r"""Langevin dynamics at falling noise scales (NCSN), as a solver: ``steps`` is the number of scales below T.

    At scale i of L, ``steps_per_scale`` times z <- z + ε_i ∇_z log p + √(2 ε_i) ξ with ε_i = ε zeta_i² / zeta_L², in
    z = x / alpha and zeta = sigma / alpha; then on to the next scale with the same z. In u it is the preconditioned
    step of the module with e = ε / zeta_L², and u <- Φ_{i+1} Φ_i⁻¹ u between scales, for coupled states too. At T
    itself there is nothing to do: the solve starts from the prior.

    Args:
        steps_per_scale: Langevin steps at each scale.
        eps: ε, as in the papers; None chooses it by :func:`matched_eps` for the scales of the solve.

    References:
        | Generative modeling by estimating gradients of the data distribution (Song & Ermon, 2019)
        | https://arxiv.org/abs/1907.05600
        | Improved techniques for training score-based generative models (Song & Ermon, 2020), whose ε this is
        | https://arxiv.org/abs/2006.09011

    Note:
        NCSN (2019) writes ε/2 and √ε: its ε is twice this one. The method is biased: under VP, of Gaussian data, the
        variance is 14 % too large at 300 scales of 5 steps, 20 % at 100 of 5 and 108 % at 300 of 1. It needs hundreds
        of scales (``steps``), since
        nothing but the Langevin steps carries the law from one scale to the next; a solver of the reverse SDE needs
        fewer calls, and :class:`PredictorCorrector` combines both. The scales are those of ``grid``, geometric by
        default.
    """

    steps_per_scale: int = 5
    eps: float | None = None

    kinds = ("sde",)
    needs_kernel = True
    adaptive = False
    default_grid = "log_snr"

    def __post_init__(self) -> None:
        checked_count(self.steps_per_scale, "steps_per_scale", 1)
        _require_eps(self.eps)

    @property
    def calls_per_step(self) -> int:
        """Calls of the score at each scale."""
        return self.steps_per_scale

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        problem.start(y)
        times = problem.times(steps)
        step = _relative_step(problem.kernel, times, self.steps_per_scale, self.eps)
        u = _anneal(problem, y.reshape(-1, *problem.event), times, step, self.steps_per_scale, first=1)
        return problem.finish(u.flatten(1))


def annealed_langevin(
    score: AnyScore,
    shape: tuple[int, ...],
    scales: Sequence[float] | Tensor | None = None,
    steps_per_scale: int = 5,
    eps: float | None = None,
    seed: Seed = None,
    *,
    times: Sequence[float] | Tensor | None = None,
    denoise: bool = True,
    sde: DeclaredSDE | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples by annealed Langevin dynamics over given noise scales; see :class:`AnnealedLangevin`.

    Args:
        score: a score of an SDE with a Gaussian kernel.
        shape: (batch, *event).
        scales: falling noise scales sigma / alpha, such as ``geometric_scales(50.0, 0.01, 232)``.
        steps_per_scale: Langevin steps at each scale.
        eps: ε in ε_i = ε scale_i² / scale_L²; None chooses it by :func:`matched_eps`.
        seed: makes the result reproducible; sample i does not depend on the batch size.
        times: falling times of the SDE instead of ``scales``.
        denoise: whether to return E[x_0 | x] at the end, as NCSNv2 does; else the state at the last scale.
        sde: the SDE of a ``score`` that is a bare function (x, t); with ``catalog.EDM(T=50)``, t is the scale itself.
        dtype, device: of the samples; by default torch's dtype, and the score's device.

    Returns:
        (batch, *event), in the user's coordinates.

    Raises:
        ValueError: for scales or times that do not fall, or lie outside the SDE's.
        SolverError: where it went wrong.
    """
    checked_count(steps_per_scale, "steps_per_scale", 1)
    _require_eps(eps)
    checked_flag(denoise, "denoise")
    (score, kernel), seed = _bound(score, sde), resolve_seed(seed)
    falling = _falling_times(kernel, scales, times)
    x = _start(score, kernel, shape, float(falling[0]), seed, dtype, device)
    if not len(x):
        return x
    last = torch.tensor(falling[-1], dtype=torch.float64)

    def of_basis(u: Tensor, t: Tensor) -> Tensor:
        return kernel.to_basis(score(kernel.from_basis(u + _level(kernel, u, t)), t))

    problem = Problem(
        None,
        Clock(kernel.cutoff, kernel.T),
        backward=True,
        view=View(tuple(x.shape[1:]), of_basis, kernel),
        watch=Watch(len(falling) * steps_per_scale),
        noise=NoiseStream(seed, "path"),
    )
    with torch.inference_mode(False), torch.no_grad(), evaluating(score):
        problem.start(x.flatten(1))
        u = kernel.to_basis(x) - _level(kernel, x, torch.tensor(falling[0], dtype=torch.float64))
        step = _relative_step(kernel, falling, steps_per_scale, eps)
        u = problem.finish(_anneal(problem, u, falling, step, steps_per_scale, first=0).flatten(1)).reshape(x.shape)
        x = kernel.from_basis(u + _level(kernel, u, last))
        return score.denoise(x, last) if denoise else x


def geometric_scales(sigma_max: float, sigma_min: float, n: int) -> Tensor:
    """``n`` noise scales from ``sigma_max`` down to ``sigma_min``, each the same multiple of the next, (n,) float64.

    NCSNv2 takes sigma_max = the largest distance between two data points, and sigma_min = 0.01.
    """
    checked_count(n, "n", 2)
    if not 0.0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"scales fall from sigma_max to a positive sigma_min; given {sigma_max!r} and {sigma_min!r}.")
    return torch.logspace(math.log10(sigma_max), math.log10(sigma_min), n, dtype=torch.float64)


def scale_ratio(d: int) -> float:
    """NCSNv2's ratio gamma of successive scales for data of ``d`` dimensions.

    Samples at one scale then fall within 3 standard deviations of the next scale's shell with probability ½:
    Φ(√(2d)(γ - 1) + 3γ) - Φ(√(2d)(γ - 1) - 3γ) = ½ (arXiv:2006.09011, technique 2).

    Raises:
        ValueError: for d < 5, where the shells overlap at any ratio.
    """
    if d < 5:
        raise ValueError(f"in d = {d} < 5 dimensions the shells of any two scales overlap, so no ratio follows.")

    def overlap(ratio: float) -> float:
        shift, width = math.sqrt(2.0 * d) * (ratio - 1.0), 3.0 * ratio
        return 0.5 * (math.erf((shift + width) / math.sqrt(2.0)) - math.erf((shift - width) / math.sqrt(2.0)))

    low, high = 1.0, 2.0
    while overlap(high) > 0.5:
        high *= 2.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if overlap(middle) > 0.5 else (low, middle)
    return high


def number_of_scales(d: int, sigma_max: float, sigma_min: float) -> int:
    """How many geometric scales NCSNv2 takes from ``sigma_max`` to ``sigma_min``: neighbours gamma apart."""
    return max(2, 1 + round(math.log(sigma_max / sigma_min) / math.log(scale_ratio(d))))


def matched_eps(scales: Sequence[float] | Tensor, steps_per_scale: int) -> float:
    """The ε with which ``steps_per_scale`` steps bring the variance of one scale closest to that of the next.

    It minimises the size of (1 - ε/σ_L²)^{2T} (γ² - r) + r - 1, r = 2ε / (σ_L² - σ_L² (1 - ε/σ_L²)²),
    T = ``steps_per_scale`` and γ the (largest) ratio of successive ``scales`` (arXiv:2006.09011, technique 4): the
    excess of the variance after T steps on noise alone, whose stationary variance is r.
    """
    levels = torch.as_tensor(scales, dtype=torch.float64)
    ratio = float((levels[:-1] / levels[1:]).max())
    return _matched_step(ratio, steps_per_scale) * float(levels[-1]) ** 2


# -------------------------------------------------------------------------------------------- parts of the above


class _LangevinSteps:
    """The preconditioned step u <- u + sigma (e sigmaᵀ s + √(2e) ξ) at times known beforehand."""

    def __init__(self, problem: Problem, sigma: Linear, times: np.ndarray, like: Tensor) -> None:
        self.problem = problem
        self.times = torch.tensor(np.asarray(times), dtype=torch.float64)
        self.sigma: list[Factor] = sigma.at_each(like)
        self.transposed: list[Factor] = self.sigma if sigma.T is sigma else sigma.T.at_each(like)

    def __call__(self, i: int, u: Tensor, rule: float | Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """One step at time number i; ``rule`` is e, or gives it from ξ and sigmaᵀ s, (batch, 1, ...)."""
        whitened = multiplied(self.transposed[i], self.problem.score(u, self.times[i]))
        noise = self.problem.normal(tuple(u.shape), u.dtype, u.device)
        if isinstance(rule, float):
            moved = torch.add(rule * whitened, noise, alpha=math.sqrt(2.0 * rule))
        else:
            step = rule(noise, whitened)
            moved = step * whitened + (2.0 * step).sqrt() * noise
        return u + multiplied(self.sigma[i], moved)


def _anneal(problem: Problem, u: Tensor, times: np.ndarray, step: float, steps_per_scale: int, first: int) -> Tensor:
    """``steps_per_scale`` Langevin steps at each of ``times`` from the ``first`` on, z = Φ⁻¹ u kept in between."""
    path = problem.kernel.path(u, torch.as_tensor(times, dtype=torch.float64))
    langevin = _LangevinSteps(problem, path.sigma, times, u)
    carry = (path.alpha[1:] @ path.alpha[:-1].inverse).at_each(u)
    for i, t in enumerate(times.tolist()):
        u = u if i == 0 else multiplied(carry[i - 1], u)
        if i < first:
            continue
        for _ in range(steps_per_scale):
            u = langevin(i, u, step)
        problem.observe(i + 1 - first, t, u)
    return u


def _relative_step(kernel: Kernel, times: np.ndarray, steps_per_scale: int, eps: float | None) -> float:
    """e = ε / zeta_L²."""
    zeta = torch.exp(-kernel.half_log_snr(torch.as_tensor(times, dtype=torch.float64))).detach()
    last = float(zeta[-1]) ** 2
    step = matched_eps(zeta, steps_per_scale) / last if eps is None else eps / last
    if not step < 2.0:
        raise ValueError(
            f"eps = {eps:g} is {step:.3g} times the square of the last scale, {math.sqrt(last):.3g}; Langevin dynamics "
            "explode from 2 on, and papers take some 0.05."
        )
    return step


def _matched_step(ratio: float, steps: int) -> float:
    """e = ε / σ_L² of :func:`matched_eps`, by a scan and its refinement (the excess may or may not cross zero)."""
    low, high = 1e-9, 1.0
    for _ in range(6):
        e = np.geomspace(low, high, 1001)
        left = (1.0 - e) ** (2 * steps)
        best = int(np.abs(left * (ratio**2 - 1.0) + (1.0 - left) * e / (2.0 - e)).argmin())  # r - 1 = e / (2 - e)
        low, high = e[max(best - 1, 0)], e[min(best + 1, 1000)]
    return float(e[best])


def _bound(score: AnyScore, sde: DeclaredSDE | None) -> tuple[ScoreFunction, Kernel]:
    """``score`` as a score with a Gaussian kernel, and the kernel."""
    if sde is not None:
        score = as_score(score, sde)
    elif not isinstance(score, ScoreFunction):
        raise ValueError("a score that is a bare function needs sde=, such as catalog.EDM(T=50), whose t is the scale.")
    return score, score.kernel.require_gaussian("annealed Langevin dynamics over scales sigma / alpha")


def _falling_times(
    kernel: Kernel, scales: Sequence[float] | Tensor | None, times: Sequence[float] | Tensor | None
) -> np.ndarray:
    """The times of the scales, within [cutoff, T]."""
    if (scales is None) == (times is None):
        raise ValueError("give either scales= (noise scales sigma / alpha) or times=.")
    name, values = ("scales", scales) if times is None else ("times", times)
    given = checked_numbers(values, name).detach().cpu().reshape(-1)
    if len(given) < 2 or not bool((given[1:] < given[:-1]).all()) or not bool(torch.isfinite(given).all()):
        raise ValueError(f"{'scales' if times is None else 'times'} must be at least two falling numbers, not {given}.")
    if times is None:
        allowed = torch.exp(-kernel.half_log_snr(torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64)))
    else:
        allowed = torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64)
    low, high = allowed.tolist()
    if not low * (1.0 - 1e-6) <= float(given[-1]) or not float(given[0]) <= high * (1.0 + 1e-6):
        what = "sigma / alpha" if times is None else "t"
        raise ValueError(
            f"{what} of this SDE runs from {low:.6g} to {high:.6g}, not from {given[-1]:.6g} to {given[0]:.6g}: choose "
            "its T and cutoff accordingly."
        )
    falling = kernel.time_of(-given.log()) if times is None else given.clamp(kernel.cutoff, kernel.T)
    return falling.detach().numpy()


def _start(
    score: ScoreFunction,
    kernel: Kernel,
    shape: tuple[int, ...],
    t: float,
    seed: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    """The Gaussian of the data's moments at t, or of noise alone where they are not known."""
    shape, dtype = checked_shape(shape), checked_dtype(dtype)
    kernel.require_event(shape[1:])
    held = next(score.parameters(), next(score.buffers(), None))
    device = device if device is not None else ("cpu" if held is None else held.device)
    moments = score.data_moments() or (torch.zeros(()), torch.zeros(()))
    mean, std = moments[0].expand(tuple(shape[1:])), moments[1]
    return kernel.marginal(mean, std, t).sample(tuple(shape), seed, dtype, device)


def _level(kernel: Kernel, like: Tensor, t: Tensor) -> Tensor | float:
    """The kernel's offset, which solver states are without."""
    return kernel.path(like, t).offset.to(like.dtype) if kernel.has_offset else 0.0


def _log_scale(alpha: Linear) -> Tensor:
    """log alpha at each of n times, the mean over coordinates where it differs, (n,); of matrices log|det| / k."""
    logs = alpha.log_size.detach()
    return logs.reshape(len(logs), -1).mean(1)


def _square_norm(x: Tensor) -> Tensor:
    """|x|² of each sample, (batch, 1, ...)."""
    return per_sample(x.square().flatten(1).sum(1), x)


def _require_eps(eps: float | None) -> None:
    if eps is not None:
        checked_within(eps, "eps", 0.0, math.inf)
