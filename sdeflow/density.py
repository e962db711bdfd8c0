r"""The integral that carries a density along the probability flow, by the exponential multistep solver.

With the Gaussian reference S Sᵀ = alpha c² alphaᵀ + sigma sigmaᵀ of the data's scale c and r = s + (S Sᵀ)⁻¹ u,

    log p(x) = log π(x_T) + log|S_T| - log|S_cutoff| - ∫ ½ div (Q r) dt,      Q = g gᵀ.

What is linear is exact; the integrand vanishes for Gaussian data. It is known where the solver calls the score, and is
integrated over the half-log-SNR by the polynomial of degree 4 through the five nodes nearest to each step: a fixed
sum Σ_n w_n ½ div (Q r)_n with weights of the grid alone, so that traces may be estimated afresh at each node.

The error is that of log p itself, measured for each sample by comparing two grids (:mod:`sdeflow.likelihood`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow.linear import Linear, multiplied, rows
from sdeflow.model import Model
from sdeflow.scores import GridScore
from sdeflow.solvers import Clock, Exponential, Problem
from sdeflow.solvers.program import identity
from sdeflow.traces import Trace

__all__ = ["Carried", "carry", "quadrature_weights", "reference", "reference_growth"]

_DEGREE = 4


class Carried(NamedTuple):
    """log p of the flow with its trace's error, (batch,) each in nats and float64, and where the flow went."""

    value: Tensor
    stderr: Tensor
    dof: Tensor
    x_T: Tensor
    calls: int


def carry(
    model: Model,
    x: Tensor,
    trace: Trace,
    solver: Exponential,
    clock: Clock,
    steps: int,
    *,
    seed: int,
    rows: Tensor | None = None,
    batch: int | None = None,
    on_call: Callable[[], object] | None = None,
) -> Carried:
    """log p(x) by the flow from the cutoff to T in ``steps`` steps; one call more than its steps.

    Args:
        model: an SDE with a Gaussian kernel, and its score.
        x: (batch, *event), of the dtype in which the score is called; the state itself is carried in float64.
        trace: how the divergence is found.
        solver: of the flow.
        clock: the time variable of the grid.
        steps: how many.
        seed: of the probes.
        rows: which rows of a batch of ``batch`` these are; None for all of it.
        batch: the size of the whole batch.
        on_call: called at each call, for a progress bar.
    """
    event, dtype = tuple(x.shape[1:]), x.dtype
    inputs = model.solver_inputs(event, dtype)
    u = model.to_solver(x.detach().double(), model.cutoff)

    def traced(times: Tensor, like: Tensor) -> GridScore:
        return GridScore(model.score.on_grid(times, like, dtype).readout, lambda i, state: call(i, state))

    problem = Problem(
        _no_drift, clock, backward=False, max_calls=2 * steps + 10, on_call=on_call, **{**inputs, "on_grid": traced}
    )
    problem.start(u.flatten(1))
    times = solver.grid(problem, steps)
    plan = _Plan(model, torch.as_tensor(times), u, dtype)
    shape = (len(x) if batch is None else batch, *event)
    integral = trace.start(shape, plan.weight, seed=seed, rows=rows, device=x.device)

    def call(i: int, state: Tensor) -> Tensor:
        with torch.enable_grad():
            state = state.detach().requires_grad_(True)
            output = plan.score.call(i, state)
            integral.add(multiplied(plan.push[i], output), state)
        return output.detach()

    u = solver.compile(problem, times, u).run(problem, u)
    call(len(times) - 1, u)
    x_T = model.from_solver(problem.finish(u.flatten(1)).reshape(x.shape), model.T)
    found = integral.result()
    value = model.prior_for(x.detach().clone()).log_prob(x_T) + found.value.detach()
    value = value + reference_growth(model, x[:1].detach().double()) + plan.known
    return Carried(value, found.stderr, found.dof, x_T, problem.nfe + 1)


class _Plan:
    """The integrand's numbers on a grid: Σ_n weight_n div (push_n F_n) + known, F the score's raw output.

    ½ Q s = -½ Q sigma⁻ᵀ eps with eps = of_state u + of_output F; what is linear in u has a known trace.
    """

    def __init__(self, model: Model, times: Tensor, like: Tensor, dtype: torch.dtype) -> None:
        kernel, event, n = model.kernel, tuple(like.shape[1:]), len(times)
        self.score = model.score.on_grid(times, like, dtype)
        with torch.no_grad():
            path, (_, _, q) = kernel.path(like, times), kernel.equation(like, times)
            of_state, of_output, _ = self.score.coefficients(n, identity(like, kernel.coupled))
            half = (q @ path.sigma.T.inverse).scaled(-0.5)
            inverse = reference(model, times, like).inverse
            known = half @ Linear(of_state, kernel.coupled)
            known = Linear(known.values + 0.5 * (q @ inverse.T @ inverse).values, kernel.coupled).trace(event)
            lam = kernel.half_log_snr(times)
            weight = torch.as_tensor(quadrature_weights(lam.numpy())) / kernel.half_log_snr_rate(times)
            self.push = rows(half @ Linear(of_output, kernel.coupled), like)
            self.weight = (-weight).tolist()
            self.known = float(-(weight * known.reshape(-1).expand(n)).sum())


def _no_drift(y: Tensor, t: Tensor) -> Tensor:
    raise TypeError("the exponential solver does not ask for a drift")


def reference(model: Model, t: Tensor, like: Tensor) -> Linear:
    """S of the Gaussian reference at t, S Sᵀ = alpha c² alphaᵀ + sigma sigmaᵀ, as a map of states like ``like``."""
    path = model.kernel.path(like, t)
    spread = path.sigma.inverse @ path.alpha @ model.kernel.scale(model.reference(like), like)
    return path.sigma @ spread.root_of_one_plus_gram


def reference_growth(model: Model, like: Tensor) -> float:
    """log|S_T| - log|S_cutoff|, the exact integral of the reference's divergence."""
    if model.kernel is None:
        return 0.0
    event = tuple(like.shape[1:])
    first, last = (
        float(reference(model, torch.tensor(t, dtype=torch.float64), like).log_det(event).sum())
        for t in (model.cutoff, model.T)
    )
    return last - first


def quadrature_weights(nodes: np.ndarray, degree: int = _DEGREE) -> np.ndarray:
    """Weights (n,) with which values at ``nodes`` (n,) sum to their integral from the first node to the last.

    Over each interval the polynomial through the degree + 1 nodes around it is integrated.
    """
    n = len(nodes)
    size = min(degree + 1, n)
    points, mass = np.polynomial.legendre.leggauss(size)
    total = np.zeros(n)
    for i in range(n - 1):
        first = min(max(i - (size - 2) // 2, 0), n - size)
        centre, half = 0.5 * (nodes[i] + nodes[i + 1]), 0.5 * (nodes[i + 1] - nodes[i])
        vandermonde = np.vander((nodes[first : first + size] - centre) / half, size, increasing=True)
        moments = half * mass @ np.vander(points, size, increasing=True)
        total[first : first + size] += np.linalg.solve(vandermonde.T, moments)
    return total
