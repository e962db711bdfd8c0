r"""Exponential single-step solvers: several calls within a step, and no memory of the steps before.

With stages at the fractions r_j of a step in half-log-SNR, each from the predictions F before it (DPM-Solver-2S and 3S,
arXiv:2206.00927, 2211.01095):

    order 2   u(r) from F(0);                           u(1) from F(0), F(r)
    order 3   u(r_1) from F(0);  u(r_2) from F(0), F(r_1);   u(1) from F(0), F(r_2)

Propagators and weights are those of :mod:`sdeflow.solvers.exponential.weights`. A multistep solver reaches the same
order with one call a step, so these are for scores that change from call to call (guidance that is switched on and
off), and for comparison. With noise, a stage's noise is part of its step's: both are of one Brownian path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sdeflow.numerics.checks import checked_real, checked_within
from sdeflow.numerics.linear import Factor, add_multiple, multiplied
from sdeflow.solvers.base import Solver
from sdeflow.solvers.exponential.program import predictions
from sdeflow.solvers.exponential.weights import PREDICTIONS, RULES, Transfer, derive, weights
from sdeflow.solvers.problem import Problem

__all__ = ["SingleStep"]

# The fractions of the stages, and for each stage and the end of the step the predictions that it is made of.
_STAGES = {1: ((), ((0,),)), 2: ((0.5,), ((0,), (0, 1))), 3: ((1 / 3, 2 / 3), ((0,), (0, 1), (0, 2)))}


@dataclass(frozen=True)
class SingleStep(Solver):
    """An exponential single-step solver.

    Args:
        order: calls in a step, 1 to 3; 1 is DDIM and its relatives.
        prediction: as of :class:`~sdeflow.solvers.exponential.solver.Exponential`.
        eta: the stochasticity, 0 for the flow, 1 for the reverse SDE.
        rule: "exact", or "midpoint" for the published weights of order 2.
        ratio: the fraction at which order 2 has its stage.

    Raises:
        ValueError: for options that do not exist.
    """

    order: int = 2
    prediction: str = "data"
    eta: float = 0.0
    rule: str = "exact"
    ratio: float = 0.5

    needs_kernel = True
    adaptive = False
    default_grid = "log_snr"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("order", self.order, (1, 2, 3)), ("prediction", self.prediction, PREDICTIONS),
            ("rule", self.rule, ("exact", "midpoint")),
        ):  # fmt: skip
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}.")
        checked_real(self.eta, "eta", "a number >= 0", lambda number: 0 <= number < math.inf)
        checked_within(self.ratio, "ratio", 0, 1)
        if self.order != 2 and (self.rule, self.ratio) != ("exact", 0.5):
            raise ValueError(f'rule="midpoint" and ratio are of order 2, and mean nothing to order {self.order}.')

    @property
    def calls_per_step(self) -> int:
        """Calls of the score in a step."""
        return self.order

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return self.eta > 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """With eta = 0 the whole family is the flow."""
        return ("sde",) if self.stochastic else ("ode", "sde")

    @property
    def convergence_order(self) -> int:
        """The order of convergence: strong for the flow, weak with noise."""
        return min(self.order, 2) if self.stochastic else self.order

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        problem.start(y)
        u = y.reshape(-1, *problem.event)
        times = problem.times(steps)
        plan = _Plan(self, problem, times, u)
        for n in range(len(times) - 1):
            u = plan.step(problem, n, u)
            problem.observe(n + 1, float(times[n + 1]), u)
        return problem.finish(u.flatten(1))


class _Plan:
    """The numbers of a grid: for each stage, and the end of the step, propagators and weights from the step's start."""

    def __init__(self, solver: SingleStep, problem: Problem, times: np.ndarray, like: Tensor) -> None:
        kernel, n = problem.kernel, len(times) - 1
        fractions, self.uses = _STAGES[solver.order]
        self.fractions = (solver.ratio,) if solver.order == 2 else fractions
        lam = kernel.bounded_log_snr(torch.as_tensor(times)).detach()
        points = [times[:-1]]
        for r in self.fractions:
            stage = kernel.time_of(lam[:-1] + r * (lam[1:] - lam[:-1])).numpy()  # within, even where the noise pauses
            points.append(stage.clip(np.minimum(times[:-1], times[1:]), np.maximum(times[:-1], times[1:])))
        points.append(times[1:])

        def between(start: np.ndarray, stop: np.ndarray) -> Transfer:
            return derive(kernel, start, stop, solver.prediction, problem.scale, solver.eta, 2)

        whole = [between(points[0], stop) for stop in points[1:]]
        parts = [between(a, b) for a, b in pairwise(points)]
        maps = kernel.maps

        def ready(values: Tensor) -> list[Factor]:
            return maps.shaped(values, like).at_each(like)

        self.state = [ready(transfer.state) for transfer in whole]
        self.weights = []
        for transfer, use, end in zip(whole, self.uses, (*self.fractions, 1.0), strict=True):
            nodes = np.array([0.0, *self.fractions])[list(use)] / end
            nodes = np.broadcast_to(nodes, (n, len(use)))
            values = weights(RULES[solver.rule](transfer.moments[:, : len(use)], nodes, transfer.length), nodes)
            self.weights.append([ready(values[:, j]) for j in range(len(use))])
        # Of each part of the step, and how it moves on; none of the flow.
        self.noise = [(ready(part.state), ready(part.noise)) for part in parts if part.noise is not None]
        at = np.stack(points[:-1], axis=1).reshape(-1)
        self.score = problem.on_grid(torch.as_tensor(at), like)
        own, of_noise = (
            torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            for name in ("of_state", "of_noise")
        )
        self.of_state, self.of_output, self.constant = predictions(own, of_noise, self.score, like, maps)

    def step(self, problem: Problem, n: int, u: Tensor) -> Tensor:
        """The state at the end of step number ``n``."""
        found, state, noise = [], u, None
        for j, use in enumerate(self.uses):
            found.append(self._prediction(problem, n * len(self.uses) + j, state))
            state = multiplied(self.state[j][n], u)
            for factors, i in zip(self.weights[j], use, strict=True):
                add_multiple(state, factors[n], found[i])
            if self.noise:
                keep, spread = self.noise[j]
                fresh = multiplied(spread[n], problem.normal(tuple(u.shape), u.dtype, u.device))
                noise = fresh if noise is None else fresh.add_(multiplied(keep[n], noise))
                state = state.add_(noise)
        return state

    def _prediction(self, problem: Problem, i: int, u: Tensor) -> Tensor:
        output = self.score.call(i, u)
        problem.watch.called(u, output, i)
        F = add_multiple(multiplied(self.of_output[i], output), self.of_state[i], u)
        return F if self.constant is None else F.add_(self.constant[i])
