r"""An adaptive solver of the reverse-time SDE with steps of each sample's own (Jolicoeur-Martineau et al. 2021).

For du = f(u, t) dt + g(t) dw̄ run backwards, f = a u - g gᵀ s, one attempt from t to t - h of one sample is::

    x'  = u - h f(u, t) + g(t) ΔW                             Euler-Maruyama
    x~  = u - h f(x', t - h) + g(t - h) ΔW
    x'' = ½ (x' + x~)                                         improved Euler
    E   = |(x' - x'') / max(atol, rtol max(|x'|, |x'_prev|))| / √d

It is accepted where E <= 1, with the better x'' as the new state, and then or not

    h <- min(t - cutoff, safety · h E^{-exponent}).

**Brownian motion.** ΔW decides whether an attempt is rejected, so it must not be drawn anew after a rejection, as the
published code does: the increments that remain are then no Brownian motion (for Gaussian data in four dimensions under
VP the variance came out 16 % too large at tolerances of 0.05, and 21 % at 0.01). Here a rejected ΔW is kept: the
shorter attempt takes its part by a Brownian bridge, ΔW(h') = (h'/h) ΔW + √(h' (h - h') / h) ξ, and what remains is
used when the time comes (rejection sampling with memory, Rackauckas & Nie 2017, doi:10.3934/dcdsb.2017133). So every
path is one path of Brownian motion, however its steps were chosen.

**Rounding.** ΔW = √h ξ carries what rounding does to E into h, and back into the next E: in hundreds of attempts it
grew from 1e-16 to 1e-3 and more in a sample of a hundred. So h is cut to few binary digits, which rounding does not
reach.

Times are the SDE's own, one for each sample: E chooses the steps, and the clock has no part in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import StepUnderflowError
from sdeflow.numerics.checks import checked_real
from sdeflow.numerics.linear import Linear, per_sample
from sdeflow.solvers.base import Solver
from sdeflow.solvers.problem import Problem

__all__ = ["GottaGoFast"]

_SMALLEST_ERROR = 1e-4  # of E: a step does not grow more than 0.9 · 1e4^0.9-fold
_SMALLEST_STEP = 1e-13  # relative to T
_DIGITS = 6  # binary ones of a step's length: it is cut by 1 % in the mean


@dataclass(frozen=True)
class GottaGoFast(Solver):
    """The adaptive SDE solver of "Gotta go fast": Euler-Maruyama inside improved Euler, two calls an attempt.

    ``rtol`` and ``atol`` are the paper's ε_r and ε_a: it takes ε_r from 0.01 to 0.10, and for ε_a the step between
    two of 256 grey levels, 0.0078 for images in [-1, 1] and 0.0039 in [0, 1]. The weak order is 1, so that calls grow
    like 1 / tolerance, and much smaller tolerances are not meant.

    Args:
        safety: of the next step, below 1.
        exponent: r of E^{-r}, between 0.5 and 1.
        first_step: the first step, as a fraction of the horizon.

    Raises:
        ValueError: for options out of range.
        StepUnderflowError: where a step shrinks to nothing.
        MaxStepsError: where the budget of calls is used up.

    References:
        | Gotta go fast when generating data with score-based models (Jolicoeur-Martineau et al., 2021)
        | https://arxiv.org/abs/2105.14080

    Note:
        A call of the score costs the whole batch, however few samples are still on their way: the slowest decides.
        ``grid`` has no effect. torchsde's adaptive methods control their error over the whole batch; here a sample is
        the same in any batch. Where a number of steps is known to do, exponential solvers need far fewer calls.
    """

    safety: float = 0.9
    exponent: float = 0.9
    first_step: float = 0.01

    kinds = ("sde",)
    needs_kernel = True
    adaptive = True
    per_sample = True
    calls_per_step = 2
    default_grid = "t"
    default_tolerances = (0.02, 0.0078)  # rtol and atol

    def __post_init__(self) -> None:
        checked_real(self.safety, "safety", "in (0, 1)", lambda number: 0.0 < number < 1.0)
        checked_real(self.exponent, "exponent", "in (0, 1]", lambda number: 0.0 < number <= 1.0)
        checked_real(self.first_step, "first_step", "in (0, 1]", lambda number: 0.0 < number <= 1.0)

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        problem.start(y, eager_checks=True)
        u = y.reshape(-1, *problem.event)
        cutoff, T = problem.clock.cutoff, problem.clock.T
        t = torch.full((len(u),), T, dtype=torch.float64, device=u.device)
        h = torch.full_like(t, self.first_step * (T - cutoff))
        memory, previous, attempts = _Memory(u), u, 0
        while bool((t > cutoff).any()):
            noise = problem.normal(tuple(u.shape), u.dtype, u.device)
            h, increment = memory.take(h, noise)
            later = torch.where(h >= (t - cutoff) * (1 - 1e-12), cutoff, t - h).clamp_min(cutoff)
            euler, improved = _attempt(problem, u, t, later, h, increment)
            scale = torch.maximum(euler.abs(), previous.abs()).mul_(rtol).clamp_min_(atol)
            error = problem.row_norm(((euler - improved) / scale).flatten(1)).double()
            accepted = error <= 1.0
            memory.put_back(~accepted & (h > 0), h, increment)
            kept = per_sample(accepted & (h > 0), u)
            u, previous = torch.where(kept, improved, u), torch.where(kept, euler, previous)
            t = torch.where(accepted, later, t)
            wanted = _cut(self.safety * h * error.clamp_min(_SMALLEST_ERROR).pow(-self.exponent))
            h = torch.minimum(t - cutoff, wanted)
            self._require_progress(problem, h, ~accepted, t)
            attempts += 1
            problem.observe(attempts, float(t.max()), u)
        return problem.finish(u.flatten(1))

    def _require_progress(self, problem: Problem, h: Tensor, rejected: Tensor, t: Tensor) -> None:
        """A step may be tiny to end at the cutoff, but not because it was rejected again and again."""
        stuck = rejected & (h < _SMALLEST_STEP * problem.clock.T)
        if bool(stuck.any()):
            rows = stuck.nonzero().flatten().tolist()
            at = float(t[rows[0]])
            raise StepUnderflowError(
                f"the step shrank to nothing at t = {at:.6g} in samples {rows[:8]}: loosen rtol and atol.",
                t=at, nfe=problem.nfe, bad_rows=rows,
            )  # fmt: skip


def _cut(h: Tensor) -> Tensor:
    """h (batch,) in float64 to its first binary digits, nearly always the same for numbers that differ by rounding."""
    return (h.view(torch.int64) & -(1 << 52 - _DIGITS)).view(torch.float64)


def _attempt(
    problem: Problem, u: Tensor, t: Tensor, later: Tensor, h: Tensor, increment: Tensor
) -> tuple[Tensor, Tensor]:
    """x' and x'' after a step of each sample's own length."""
    length = per_sample(h, u).to(u.dtype)
    drift, root = _reverse(problem, u, t)
    euler = u - length * drift + root(increment)
    drift, root = _reverse(problem, euler, later)
    again = u - length * drift + root(increment)
    return euler, 0.5 * (euler + again)


def _reverse(problem: Problem, u: Tensor, t: Tensor) -> tuple[Tensor, Linear]:
    """a u - g gᵀ s, and the symmetric root of g gᵀ, at times (batch,).

    Of all roots this one changes smoothly in t, as one ΔW at two times needs it.
    """
    a, _, q = problem.kernel.equation(u, t)
    return a(u) - q(problem.score(u, t)), q.symmetric_root


class _Memory:
    """For each sample, the stack of Brownian increments that rejected attempts have revealed, the nearest on top."""

    def __init__(self, like: Tensor) -> None:
        self.depth = torch.zeros(len(like), dtype=torch.long, device=like.device)
        self.lengths = torch.zeros(0, len(like), dtype=torch.float64, device=like.device)
        self.increments = like.new_zeros(0, *like.shape)
        self.row = torch.arange(len(like), device=like.device)

    def take(self, h: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The length (batch,) of the next attempt, ``h`` or what is left of the top increment, and ΔW over it."""
        if not len(self.lengths):
            return h, per_sample(h.sqrt(), noise).to(noise.dtype) * noise
        known = self.depth > 0
        top = (self.depth - 1).clamp_min(0)
        whole, revealed = self.lengths[top, self.row], self.increments[top, self.row]
        cut = h < whole * (1 - 1e-12)
        step = torch.where(known & ~cut, whole, h)
        share = torch.where(known, step / whole, 0.0)  # of the increment on top
        width = (step * (1.0 - share)).clamp_min(0.0).sqrt()
        share, width = (per_sample(v, noise).to(noise.dtype) for v in (share, width))
        taken = torch.where(per_sample(known, noise), share * revealed, 0.0) + width * noise
        split = known & cut
        self.lengths[top, self.row] = torch.where(split, whole - step, whole)
        self.increments[top, self.row] = torch.where(per_sample(split, noise), revealed - taken, revealed)
        self.depth -= (known & ~cut).long()
        return step, taken

    def put_back(self, rejected: Tensor, length: Tensor, increment: Tensor) -> None:
        """Keeps the increments of rejected attempts for the next ones."""
        if not bool(rejected.any()):
            return
        if int(self.depth.max()) == len(self.lengths):
            self.lengths = torch.cat([self.lengths, torch.zeros_like(length)[None]])
            self.increments = torch.cat([self.increments, torch.zeros_like(increment)[None]])
        at = self.depth.clamp_max(len(self.lengths) - 1)
        self.lengths[at, self.row] = torch.where(rejected, length, self.lengths[at, self.row])
        self.increments[at, self.row] = torch.where(
            per_sample(rejected, increment), increment, self.increments[at, self.row]
        )
        self.depth += rejected.long()
