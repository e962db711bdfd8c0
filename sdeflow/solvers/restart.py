r"""Restart sampling (Xu et al. 2023): the flow down to low noise, back up by the forward SDE, and down again.

For each interval (low, high) of the noise ratio zeta = sigma / alpha, once the flow has come down to ``low``,

    K times:    u(t_high) = A u(t_low) + Σ ξ       the forward SDE's exact transition, ξ ~ N(0, 1)
                u(t_low)  = flow of u(t_high)      n steps of a solver of the probability flow

and then the flow goes on. Exact flows and scores leave every p_t as it is, so restarts change nothing; of errors made
before, each restart forgets what the noise up to ``high`` hides, at the price of the flow's error over one interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from sdeflow.kernels.gaussian import Path
from sdeflow.scores import GridScore
from sdeflow.solvers.base import Solver
from sdeflow.solvers.clock import Clock
from sdeflow.solvers.problem import Field, Problem, View
from sdeflow.solvers.watch import Watch

__all__ = ["Restart"]

Interval = tuple[float, float, int, int]


@dataclass(frozen=True)
class Restart(Solver):
    """Restart sampling with any solver of the probability flow inside.

    Args:
        solver: a solver object for the flow, such as ``solvers.Heun()``.
        intervals: tuples (low, high, K, n): noise ratios sigma / alpha, how many restarts, and the flow's steps in
            each (ignored by an adaptive solver). For alpha = 1, as in the paper, these are its (t_min, t_max, K, N).

    ``steps`` counts all steps of the flow, those of restarts included: steps - Σ K n are left for the way down, and
    spread over it in proportion to the clock.

    Raises:
        ValueError: for intervals that are empty or outside the SDE's noise ratios, too few ``steps`` for them, or a
            ``grid`` of times.

    References:
        | Restart sampling for improving generative processes (Xu et al., 2023)
        | https://arxiv.org/abs/2306.14878

    Note:
        It samples what the reverse-time SDE samples, but solves the flow. Restarts help a score that is wrong, or a
        flow solved coarsely; with an exact score and many steps they only cost calls. EDM's churn
        (:class:`~sdeflow.solvers.edm.StochasticHeun`) spreads its noise over all steps instead.
    """

    solver: Solver
    intervals: Sequence[Interval]

    kinds = ("sde",)
    needs_kernel = True

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver) or "ode" not in self.solver.kinds:
            raise ValueError(f"Restart needs a solver object of the probability flow, not {self.solver!r}.")
        for interval in self.intervals:
            valid = isinstance(interval, Sequence) and len(interval) == 4 and all(isinstance(v, Real) for v in interval)
            if not valid or not 0.0 < interval[0] < interval[1] or any(int(v) != v or v < 1 for v in interval[2:]):
                raise ValueError(f"an interval is (low, high, K, n), 0 < low < high, K and n at least 1: {interval}.")
        object.__setattr__(self, "intervals", tuple(sorted(map(tuple, self.intervals), reverse=True)))

    @property
    def adaptive(self) -> bool:
        """Whether the solver inside chooses its steps."""
        return self.solver.adaptive

    @property
    def observable(self) -> bool:
        """Whether the solver inside says when a step ends."""
        return self.solver.observable

    @property
    def elementwise(self) -> bool:
        """Whether coupled states are beyond the solver inside."""
        return self.solver.elementwise

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow through the solver inside."""
        return self.solver.differentiable

    @property
    def calls_per_step(self) -> int:
        """Calls of the score in a step of the flow."""
        return self.solver.calls_per_step

    @property
    def default_grid(self) -> str | None:
        """That of the solver inside."""
        return self.solver.default_grid

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        if problem.clock.given is not None:
            raise ValueError(f"{self} stops at the ends of its intervals, so it takes no times: give grid= a name.")
        plan = list(self._plan(problem, steps))
        problem.start(y)
        seen = _Observer(problem)
        for begin, end, n, transition in plan:
            if transition is not None:
                u = y.reshape(-1, *problem.event)
                noise = problem.normal(tuple(u.shape), u.dtype, u.device)
                y = (transition.alpha(u) + transition.sigma(noise)).flatten(1)
            flow = _flow(problem, _part(problem.clock, end, begin), seen)
            y = self.solver.solve(flow, y, n, rtol, atol)
        return problem.finish(y)

    def _plan(self, problem: Problem, steps: int | None) -> Iterator[tuple[float, float, int | None, Path | None]]:
        """Stretches (u of the clock at their begin and end, steps, the transition up to the begin if any)."""
        kernel = problem.kernel
        like = torch.empty(0, *problem.event)
        ends = torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64)
        lowest, highest = torch.exp(-kernel.half_log_snr(ends)).tolist()
        lows = [low for low, *_ in self.intervals]
        for low, high, _, _ in self.intervals:
            if not lowest * (1 - 1e-6) <= low < high <= highest * (1 + 1e-6):
                raise ValueError(
                    f"the interval from {low:g} to {high:g} is not within this SDE's noise ratios sigma / alpha, "
                    f"{lowest:.4g} to {highest:.4g}."
                )
        stops = [1.0, *(_u_of(problem, low) for low in lows), 0.0]
        main = self._main_steps([a - b for a, b in pairwise(stops)], steps)
        for i, (begin, end) in enumerate(pairwise(stops)):
            if begin > end:
                yield begin, end, main[i], None
            if i == len(self.intervals):
                return
            low, high, repeats, n = self.intervals[i]
            t_low, t_high = (float(kernel.time_of(-torch.tensor(v, dtype=torch.float64).log())) for v in (low, high))
            transition = kernel.transition(like, t_low, t_high, exactly=True)
            top = _u_of(problem, high)
            for _ in range(repeats):
                yield top, end, None if steps is None else n, transition

    def _main_steps(self, lengths: list[float], steps: int | None) -> list[int | None]:
        """What ``steps`` leaves for the way down, shared out by length with at least one for each stretch."""
        if steps is None:
            return [None] * len(lengths)
        stretches = [length > 0 for length in lengths]
        spare = steps - sum(repeats * n for *_, repeats, n in self.intervals) - sum(stretches)
        if spare < 0:
            raise ValueError(
                f"{steps} steps are too few for these restarts, which take {steps - spare} with one step for each "
                "stretch between them (steps counts all steps, those of restarts included)."
            )
        total, done = sum(lengths), 0.0
        main: list[int | None] = []
        for length, counted in zip(lengths, stretches, strict=True):
            before, done = round(spare * done / total), done + length
            main.append(round(spare * done / total) - before + counted)
        return main


def _part(clock: Clock, low: float, high: float) -> Clock:
    """A clock on part of its range: v in [0, 1] stands for u in [low, high]."""
    width = high - low

    def curve(v: float) -> tuple[float, float]:
        t, rate = clock(low + width * v)
        return t, rate * width

    return Clock(clock(low)[0], clock(high)[0], curve)


class _Observer:
    """Numbers the steps of all stretches in one sequence."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.steps = problem, 0

    def __call__(self, step: int, t: float, y: Tensor) -> None:
        self.steps += 1
        self.problem.observe(self.steps, t, y)


def _flow(problem: Problem, clock: Clock, on_step: Callable[[int, float, Tensor], object]) -> Problem:
    """The probability flow du/dt = a u - ½ g gᵀ s on part of the way; calls count in ``problem``."""
    kernel = problem.kernel

    def drift(y: Tensor, t: Tensor) -> Tensor:
        u = y.reshape(-1, *problem.event)
        a, _, q = kernel.equation(u, t)
        return (a(u) - q.scaled(0.5)(problem.score(u, t))).flatten(1)

    def on_grid(times: Tensor, like: Tensor) -> GridScore:
        grid = problem.on_grid(times, like)

        def call(i: int, u: Tensor) -> Tensor:
            value = grid.call(i, u)
            problem.watch.called(u, value, i)
            return value

        return GridScore(grid.readout, call)

    watch, view = problem.watch, View(problem.event, problem.score, kernel, on_grid, problem.mean, problem.scale)
    return Problem(
        Field(drift), clock, backward=True, view=view,
        watch=Watch(watch.max_calls + 1, on_step=on_step if watch.on_step else None, hint=watch.hint),
        row_norm=problem.row_norm,
    )  # fmt: skip


def _u_of(problem: Problem, ratio: float) -> float:
    """The clock's u at which sigma / alpha is ``ratio``."""
    target = float(problem.kernel.time_of(-torch.tensor(ratio, dtype=torch.float64).log()))
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if problem.clock(middle)[0] < target else (low, middle)
    return high if target > problem.clock(0.0)[0] else 0.0
