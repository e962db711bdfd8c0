r"""The integral that carries a density along the probability flow, by the exponential multistep solver.

With the Gaussian reference S Sᵀ = alpha c² alphaᵀ + sigma sigmaᵀ of the data's scale c and r = s + (S Sᵀ)⁻¹ u,

    log p(x) = log π(x_T) + log|S_T| - log|S_cutoff| - ∫ ½ div (Q r) dt,      Q = g gᵀ.

What is linear is exact; the integrand vanishes for Gaussian data. It is known where the solver calls the score, and is
integrated over the half-log-SNR by the polynomial of degree 4 through the five nodes nearest to each step: a fixed sum
Σ_n w_n ½ div (Q r)_n with weights of the grid alone, so that the traces may be estimated afresh at each node.

The error is that of log p itself. It is measured for each sample by comparing grids, of N and 1.5 N steps; where it is to
be held to a tolerance, the samples that miss it, and they alone, are solved again on finer grids.
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

__all__ = ["Carried", "carry", "quadrature_weights", "reference", "reference_growth"]

_DEGREE = 4

Divergence = Callable[[Tensor, Tensor], Tensor]


class Carried(NamedTuple):
    """The state at T, and the integral of what the divergence adds to log p, (batch, columns) in float64."""

    x_T: Tensor
    integrals: Tensor
    calls: int


def carry(
    model: Model,
    x: Tensor,
    divergence: Divergence,
    columns: int,
    solver: Exponential,
    clock: Clock,
    steps: int,
    dtype: torch.dtype,
    on_call: Callable[[], object] | None = None,
) -> Carried:
    """The flow from the cutoff to T in ``steps`` steps, with -∫ ½ div (Q r) dt along it; steps + 1 calls.

    Args:
        model: an SDE with a Gaussian kernel, and its score.
        x: (batch, *event) in float64.
        divergence: (field, u) -> its divergence, (columns, batch), from a graph in u.
        columns: how many estimates of it.
        solver: of the flow.
        clock: the time variable of the grid.
        steps: how many.
        dtype: in which the score is called.
        on_call: called at each call, for a progress bar.
    """
    kernel, event = model.kernel, tuple(x.shape[1:])
    inputs = model.solver_inputs(event, dtype)
    u = model.to_solver(x, model.cutoff)
    total = torch.zeros(len(x), columns, dtype=torch.float64, device=x.device)
    plan: _Plan | None = None

    def traced(times: Tensor, like: Tensor) -> GridScore:
        def call(i: int, state: Tensor) -> Tensor:
            with torch.enable_grad():
                state = state.detach().requires_grad_(True)
                output = plan.score.call(i, state)
                change = divergence(multiplied(plan.push[i], output), state)
            total.add_(change.detach().mT, alpha=plan.weight[i]).add_(plan.known[i])
            return output.detach()

        return GridScore(model.score.on_grid(times, like, dtype).readout, call)

    problem = Problem(
        _no_drift, clock, backward=False, max_calls=2 * steps + 10, on_call=on_call, **{**inputs, "on_grid": traced}
    )
    problem.start(u.flatten(1))
    times = solver.grid(problem, steps)
    plan = _Plan(model, torch.as_tensor(times), u, dtype)
    program = solver.compile(problem, times, u)
    u = program.run(problem, u)
    program.score.call(len(times) - 1, u)
    return Carried(model.from_solver(problem.finish(u.flatten(1)).reshape(x.shape), model.T), total, problem.nfe + 1)


class _Plan:
    """The integrand's numbers on a grid: Σ_n weight_n div (push_n F_n) + known_n, F the score's raw output.

    ½ Q s = -½ Q sigma⁻ᵀ eps with eps = of_state u + of_output F; what is linear in u has a known trace.
    """

    def __init__(self, model: Model, times: Tensor, like: Tensor, dtype: torch.dtype) -> None:
        kernel, event, n = model.kernel, tuple(like.shape[1:]), len(times)
        self.score = model.score.on_grid(times, like, dtype)
        with torch.no_grad():
            path, (_, _, q) = kernel.path(like, times), kernel.equation(like, times)
            ones = torch.ones((1,) * (like.ndim - 1), dtype=torch.float64)
            identity = Linear.scaling(ones, False).values if not kernel.coupled else _eye(like)
            of_state, of_output, _ = self.score.coefficients(n, identity)
            half = (q @ path.sigma.T.inverse).scaled(-0.5)
            inverse = reference(model, times, like).inverse
            known = half @ Linear(of_state, kernel.coupled)
            known = Linear(known.values + 0.5 * (q @ inverse.T @ inverse).values, kernel.coupled).trace(event)
            lam = kernel.half_log_snr(times)
            weight = torch.as_tensor(quadrature_weights(lam.numpy())) / kernel.half_log_snr_rate(times)
            self.push = rows(half @ Linear(of_output, kernel.coupled), like)
            self.weight = (-weight).tolist()
            self.known = (-weight * known.reshape(-1).expand(n)).tolist()


def _eye(like: Tensor) -> Tensor:
    k = like.shape[1]
    return torch.eye(k, dtype=torch.float64).reshape(*(1,) * (like.ndim - 2), k, k)


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
