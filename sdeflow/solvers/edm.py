r"""EDM's stochastic sampler (Karras et al. 2022, algorithm 2), for every elementwise affine SDE.

In z = x / alpha and zeta = sigma / alpha every such SDE is the one of EDM, in which z is data plus zeta times noise:
dz/dzeta = eps(x, t) = -sigma s(x, t) along the probability flow. Step i of N from t to t' first adds noise::

    gamma = min(S_churn / N, √2 - 1) where S_min <= zeta <= S_max, else 0,       zeta^ = (1 + gamma) zeta,
    x^    = (alpha^ / alpha) x + alpha^ √(zeta^² - zeta²) S_noise ξ,             ξ ~ N(0, 1),

which with S_noise = 1 is the forward SDE's exact transition from t to t^, and then takes Heun's step on z in zeta::

    x_    = (alpha' / alpha^) x^ + alpha' (zeta' - zeta^) eps(x^, t^),
    x'    = (alpha' / alpha^) x^ + alpha' (zeta' - zeta^) ½ (eps(x^, t^) + eps(x_, t')).

t^ never passes T (there is no churn at the first step), and the last step ends at the cutoff, where EDM goes on to
sigma = 0 by an Euler step: ``denoise=True`` does that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.numerics.checks import checked_real
from sdeflow.numerics.linear import multiplied
from sdeflow.solvers.base import Solver
from sdeflow.solvers.problem import Problem

__all__ = ["StochasticHeun"]


@dataclass(frozen=True)
class StochasticHeun(Solver):
    r"""EDM's sampler: noise is added ("churn"), then Heun's method runs the flow in sigma / alpha.

    Without churn it is deterministic, of order 2, and solves the probability flow in either direction. With churn it
    samples the reverse-time SDE: not an integrator of it (the noise comes first and the flow takes it away again), but
    with the same law as the steps shrink, for any S_churn.

    Args:
        S_churn: the noise added, over all steps: each multiplies zeta = sigma / alpha by 1 + S_churn / steps, or by √2.
        S_min, S_max: churn only where zeta is between them; without S_churn they change nothing.
        S_noise: the noise's factor. Other than 1 the law is not kept: above 1 it makes up for scores that remove too
            much noise (1.003 to 1.007 in the paper), and it is no cure for anything else.

    Raises:
        ValueError: for options out of range, S_noise without churn, and a coupled state.

    References:
        | Elucidating the design space of diffusion-based generative models (Karras et al., 2022)
        | https://arxiv.org/abs/2206.00364

    Note:
        Not to be confused with :class:`~sdeflow.solvers.euler.Heun` (in the clock's variable), with torchsde's "heun"
        (a Stratonovich method), nor with "ancestral" sampling, whose noise follows the step. For few steps without
        churn, multistep exponential solvers need half the calls.
    """

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    needs_kernel = True
    elementwise = True
    adaptive = False
    calls_per_step = 2
    default_grid = "karras"

    def __post_init__(self) -> None:
        for name in ("S_churn", "S_noise"):
            checked_real(getattr(self, name), name, "finite and not negative", lambda number: 0.0 <= number < math.inf)
        for name in ("S_min", "S_max"):
            checked_real(getattr(self, name), name, "a noise level sigma / alpha >= 0", lambda number: number >= 0.0)
        if not self.S_min <= self.S_max:
            raise ValueError(f"S_min and S_max are noise levels sigma / alpha, 0 <= S_min <= S_max: {self}.")

        if not self.S_churn and self.S_noise != 1.0:
            raise ValueError(f"S_noise is of the churn: give S_churn > 0 too, or leave it out: {self}.")

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise."""
        return self.S_churn > 0.0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The reverse-time SDE, and without churn the probability flow."""
        return ("sde",) if self.stochastic else ("sde", "ode")

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        kernel = problem.kernel
        problem.start(y)
        u = y.reshape(-1, *problem.event)
        times = problem.times(steps)
        raised = self._raised(problem, times)
        heun = _HeunSteps(problem, u, raised, times[1:])
        for i in range(len(times) - 1):
            if raised[i] > times[i]:
                path = kernel.transition(u, float(times[i]), float(raised[i]), exactly=True)
                noise = problem.normal(tuple(u.shape), u.dtype, u.device)
                u = path.alpha(u) + path.sigma.scaled(self.S_noise)(noise)
            u = heun(i, u)
            problem.observe(i + 1, float(times[i + 1]), u)
        return problem.finish(u.flatten(1))

    def _raised(self, problem: Problem, times: np.ndarray) -> np.ndarray:
        """t^ of each step, the time to which its churn raises the noise, (steps,)."""
        begins = torch.as_tensor(times[:-1], dtype=torch.float64)
        gamma = min(self.S_churn / len(begins), math.sqrt(2.0) - 1.0)
        if not gamma:
            return begins.numpy()
        half_log_snr = problem.kernel.bounded_log_snr(begins).detach()
        zeta = torch.exp(-half_log_snr)
        raised = problem.kernel.time_of(half_log_snr - math.log1p(gamma))
        churned = (zeta >= self.S_min) & (zeta <= self.S_max)
        return torch.where(churned, torch.maximum(raised, begins), begins).numpy()


class _HeunSteps:
    """Heun's steps on z = x / alpha in zeta = sigma / alpha, between pairs of times known beforehand."""

    def __init__(self, problem: Problem, like: Tensor, begins: np.ndarray, ends: np.ndarray) -> None:
        self.problem = problem
        self.begins, self.ends = (torch.tensor(np.asarray(t), dtype=torch.float64) for t in (begins, ends))
        first, last = (problem.kernel.path(like, t) for t in (self.begins, self.ends))
        keep = last.alpha @ first.alpha.inverse
        self.keep = keep.at_each(like)
        self.slope = (last.sigma - keep @ first.sigma).at_each(like)  # alpha' (zeta' - zeta^)
        self.sigma = first.sigma.at_each(like), last.sigma.at_each(like)

    def __call__(self, i: int, u: Tensor) -> Tensor:
        """The state at the end of step i."""
        kept = multiplied(self.keep[i], u)
        first = multiplied(self.sigma[0][i], self.problem.score(u, self.begins[i])).neg_()
        ahead = kept + multiplied(self.slope[i], first)
        second = multiplied(self.sigma[1][i], self.problem.score(ahead, self.ends[i])).neg_()
        return kept + multiplied(self.slope[i], 0.5 * (first + second))
