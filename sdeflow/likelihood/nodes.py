r"""The integral that carries a density along the probability flow, by the exponential multistep solver.

With the Gaussian reference S Sᵀ = alpha c² alphaᵀ + sigma sigmaᵀ of the data's scale c and r = s + (S Sᵀ)⁻¹ u,

    log p(x) = log π(x_T) + log|S_T| - log|S_cutoff| - ∫ ½ div (Q r) dt,      Q = g gᵀ.

What is linear is exact; the integrand vanishes for Gaussian data. It is known where the solver calls the score, and is
integrated over the half-log-SNR by the polynomial of degree 4 through the five nodes nearest to each step: a fixed
sum Σ_n w_n ½ div (Q r)_n with weights of the grid alone, so that traces may be estimated afresh at each node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow.kernels.gaussian import Kernel
from sdeflow.numerics.linear import Factor, multiplied
from sdeflow.numerics.traces import Integral, Trace
from sdeflow.scores import GridScore
from sdeflow.solvers import Clock, Exponential, Problem, Watch
from sdeflow.solving.model import Model
from sdeflow.solving.reference import reference, reference_growth

__all__ = ["Carried", "Carrier", "Integrand", "quadrature_weights"]

_DEGREE = 4
_CLOSEST = 1e-3  # of nodes, relative to their mean distance
_MORE_EVENLY = 0.4  # the longest step, relative to that in the half-log-SNR
_BESIDE_INFINITE = 1e-200  # of the horizon: a time at which what is infinite at t = 0 is not


class Carried(NamedTuple):
    """log p of the flow with its trace's error, (batch,) each in nats and float64, and where the flow went.

    ``defect`` is Σ_n |s·δ_n| over the nodes, δ_n what the corrector moved the state there: the size in nats of the
    predictor's local errors, since the score is the adjoint of the flow. NaN of a solver without a corrector.
    """

    value: Tensor
    stderr: Tensor
    dof: Tensor
    x_T: Tensor
    calls: int
    defect: Tensor


@dataclass(frozen=True)
class Carrier:
    """A fixed grid of an exponential solver, on which log p of any samples is measured.

    Args:
        trace: how the divergence is found.
        solver: of the flow.
        clock: the time variable of the grid.
        steps: how many.
        seed: of the probes.
        dtype: in which the score is called; the state itself is carried in float64.
        on_call: called at each call, for a progress bar.
        refined: into how many parts each step is split. All parts take the probes of their step, so that log p on the
            two grids differs by the grids alone; it has no standard error then.
    """

    trace: Trace
    solver: Exponential
    clock: Clock
    steps: int
    seed: int
    dtype: torch.dtype
    on_call: Callable[[], object] | None = None
    refined: int = 1

    def __call__(self, model: Model, x: Tensor, rows: Tensor, round: int = 0) -> Carried:
        """log p of x at the cutoff, by the flow to T; one call of the score more than the solver's.

        With gradients enabled the value can be differentiated, in x and in the score's parameters.

        Args:
            model: an SDE with a Gaussian kernel, and its score.
            x: (batch, *event) in float64.
            rows: which rows of all samples these are, (batch,), for their probes.
            round: which of several independent draws of probes.
        """
        u, graph = model.to_solver(x, model.cutoff), torch.is_grad_enabled()
        basis, defect = self.solver.basis, torch.zeros(len(x), dtype=torch.float64, device=x.device)
        last: list[Tensor] = []

        def traced(times: Tensor, like: Tensor) -> GridScore:
            return GridScore(model.score.on_grid(times, like, self.dtype).readout, call)

        def call(i: int, state: Tensor) -> Tensor:
            with torch.enable_grad():
                state = state if graph else state.detach()
                state = state if state.requires_grad else state.requires_grad_(True)
                output = integrand.output(i, state)
                integral.add(multiplied(integrand.push[i], output), state)
            last[:] = state.detach(), output.detach()
            return output if graph else output.detach()

        @torch.no_grad()
        def corrected(i: int, before: Tensor, after: Tensor) -> None:
            moved = (after - before).detach()
            moved = moved if basis is None else basis.inverse(moved)
            defect.add_((integrand.of_score(i, *last) * moved).flatten(1).sum(1).abs())

        problem = self.problem(model, u, traced, corrected)
        problem.start(u.flatten(1))
        times = self.solver.grid(problem, self.steps * self.refined)
        draws = None if self.refined == 1 else _nearest_before(times, self.solver.grid(problem, self.steps))
        integrand = Integrand(model, times, u, self.dtype)
        integral = self.integral(integrand.weight, u, rows, round, create_graph=graph, draws=draws)
        program = self.solver.compile(problem, times, u)
        u = program.run(problem, u if basis is None else basis.forward(u))
        u = u if basis is None else basis.inverse(u)
        call(len(times) - 1, u)
        x_T = model.from_solver(problem.finish(u.flatten(1)).reshape(x.shape), model.T)
        found = integral.result()
        value = model.prior_for(x.detach().to(self.dtype)).log_prob(x_T) + found.value
        value = value + reference_growth(model, x[:1].detach()) + integrand.known
        if not self.solver.past:
            defect = defect + math.nan
        return Carried(value, found.stderr, found.dof, x_T.detach(), problem.nfe + 1, defect)

    def problem(
        self,
        model: Model,
        u: Tensor,
        on_grid: Callable[[Tensor, Tensor], GridScore] | None = None,
        on_correction: Callable[[int, Tensor, Tensor], object] | None = None,
    ) -> Problem:
        """What the solver is given for its states like ``u``; by default with the model's own score."""
        view, budget = model.view(tuple(u.shape[1:]), self.dtype), 2 * self.steps * self.refined + 10
        view = view if on_grid is None else replace(view, on_grid=on_grid)
        watch = Watch(budget, self.on_call, on_correction=on_correction)
        return Problem(None, self.clock, backward=False, view=view, watch=watch)

    def integral(
        self, weight: list[float], u: Tensor, rows: Tensor, round: int, create_graph: bool,
        draws: list[int] | None = None,
    ) -> Integral:  # fmt: skip
        """The sum over the nodes, empty."""
        return self.trace.start(
            tuple(u.shape), weight, seed=self.seed, round=round, rows=rows, device=u.device, create_graph=create_graph,
            draws=draws,
        )  # fmt: skip


class Integrand:
    """½ Q r = push F + pull u + level on a grid, F the score's raw output.

    ½ Q s = -½ Q sigma⁻ᵀ eps with eps = of_state u + of_output F + constant; what is linear in u has a known trace, and
    -∫ ½ div (Q r) dt = Σ_n weight_n div (push_n F_n) + known.

    Attributes:
        times: (n,) of the grid.
        score: on it.
        push: a map at each node.
        weight: of each node.
        known: what the linear part adds to the integral.
        rate: of the half-log-SNR at each node.
    """

    def __init__(self, model: Model, times: np.ndarray, like: Tensor, dtype: torch.dtype) -> None:
        kernel, n = model.kernel.require_gaussian("log p on the nodes of an exponential solver"), len(times)
        self.times = torch.as_tensor(times)
        self.score = model.score.on_grid(self.times, like, dtype)
        self._model, self._kernel, self._like = model, kernel, like[:1].detach()
        self._score: tuple[list[Factor], list[Factor], Tensor | None] | None = None
        with torch.no_grad():
            moving = _where_finite(kernel, self.times)
            path, (_, _, q) = kernel.path(like, self.times), kernel.equation(like, moving)
            of_state, of_output, self._constant = self.score.coefficients(n, kernel.maps.identity(like))
            inverse = reference(model, self.times, like).inverse
            self._half = (q @ path.sigma.T.inverse).scaled(-0.5)
            self._of_reference = (q @ inverse.T @ inverse).scaled(0.5)
            self._linear = self._half @ of_state + self._of_reference
            self.push = (self._half @ of_output).at_each(like)
            self._of_output, self._of_state = of_output, of_state
            self._noise_to_score = path.sigma.T.inverse.scaled(-1.0)
            self.rate = kernel.half_log_snr_rate(moving)
            lam = kernel.bounded_log_snr(self.times).numpy()
            weight = _weights_in_time(lam, self.rate.numpy(), model.reference_scale())
            self.weight = (-weight).tolist()
            traces = self._linear.trace(tuple(like.shape[1:])).reshape(-1).expand(n)
            self.known = -float((weight * traces).sum())

    def output(self, i: int, u: Tensor) -> Tensor:
        """F at node i, on a graph from u even where it is the same for all states."""
        output = self.score.call(i, u)
        if not output.requires_grad and torch.equal(self.score.call(i, u.detach() + 1.0), output):
            output = output + 0.0 * u
        return output

    def of_score(self, i: int, u: Tensor, output: Tensor) -> Tensor:
        """s at node i, of the state u and the output F there."""
        if self._score is None:
            of_state, of_output = (self._noise_to_score @ part for part in (self._of_state, self._of_output))
            level = None if self._constant is None else self._noise_to_score(self._constant.to(torch.float64))
            self._score = of_state.at_each(self._like), of_output.at_each(self._like), level
        by_state, by_output, level = self._score
        s = multiplied(by_state[i], u) + multiplied(by_output[i], output)
        return s if level is None else s + level[i]

    def mean(self) -> Tensor | None:
        """alpha m at each node, m the data's mean in the basis; None where it is 0."""
        kernel, like, moments = self._kernel, self._like, self._model.score.data_moments()
        mean = None if moments is None else kernel.data_level(moments[0], like)
        return None if mean is None else kernel.path(like, self.times.to(like.device)).alpha(mean)

    def rest(self) -> Callable[[int, Tensor], Tensor]:
        """(n, u) -> ½ Q r - push F at node n; r is that of the data's mean too."""
        pull, level, mean = self._linear.at_each(self._like), None, self.mean()
        if self._constant is not None:
            level = self._half(self._constant.to(torch.float64))
        if mean is not None:
            of_mean = self._of_reference(mean)
            level = -of_mean if level is None else level - of_mean

        def rest(n: int, u: Tensor) -> Tensor:
            value = multiplied(pull[n], u)
            return value if level is None else value + level[n]

        return rest


def _nearest_before(times: np.ndarray, coarse: np.ndarray) -> list[int]:
    """The number of the coarse time at or before each time, both from the cutoff on."""
    slack = 1e-9 * (times[-1] - times[0])
    return (np.searchsorted(coarse, times + slack, side="right") - 1).clip(0).tolist()


def _where_finite(kernel: Kernel, times: Tensor) -> Tensor:
    """``times`` to ask for g and the rate of the log-SNR, whose ratio is finite where both are infinite, at t = 0."""
    infinite = not all(bool(torch.isfinite(value).all()) for value in kernel.sde_coefficients(times[:1]))
    return times.clamp_min(_BESIDE_INFINITE * kernel.T) if infinite else times


def _weights_in_time(lam: np.ndarray, rate: np.ndarray, scale: float) -> Tensor:
    """Weights (n,) of values per unit of time at nodes with this half-log-SNR and rate, for their integral over time.

    Polynomials are in the half-log-SNR, or in the angle atan(e^-lambda / scale) where that spaces the nodes far more
    evenly. Where the noise pauses, at a time or over a stretch, neither they nor the integral move: such nodes have no
    weight, nor have those that are hardly apart.
    """
    angle, slope = np.arctan2(np.exp(-lam), scale), -scale * np.exp(-lam) / (scale**2 + np.exp(-2.0 * lam))
    longest = [np.abs(np.diff(v)).max() / abs(v[-1] - v[0]) for v in (lam, angle)]
    w, rate = (angle, rate * slope) if longest[1] < _MORE_EVENLY * longest[0] else (lam, rate)
    used: list[int] = []
    for i in np.flatnonzero(rate):
        if not used or abs(w[i] - w[used[-1]]) > _CLOSEST * abs(w[-1] - w[0]) / len(w):
            used.append(int(i))
    weight = np.zeros(len(w))
    weight[used] = quadrature_weights(w[used], ends=(w[0], w[-1])) / rate[used]
    return torch.as_tensor(weight)


def quadrature_weights(nodes: np.ndarray, degree: int = _DEGREE, ends: tuple[float, float] | None = None) -> np.ndarray:
    """Weights (n,) with which values at ``nodes`` (n,) sum to their integral from the first node to the last.

    Over each interval the polynomial through the degree + 1 nodes around it is integrated; ``ends`` other than those
    nodes belong to the intervals beside them.
    """
    n = len(nodes)
    if n == 1:
        return np.zeros(1) if ends is None else np.array([ends[1] - ends[0]])
    bounds = nodes if ends is None else np.concatenate([[ends[0]], nodes[1:-1], [ends[1]]])
    size = min(degree + 1, n)
    points, mass = np.polynomial.legendre.leggauss(size)
    total = np.zeros(n)
    for i in range(n - 1):
        first = min(max(i - (size - 2) // 2, 0), n - size)
        centre, half = 0.5 * (bounds[i] + bounds[i + 1]), 0.5 * (bounds[i + 1] - bounds[i])
        vandermonde = np.vander((nodes[first : first + size] - centre) / half, size, increasing=True)
        moments = half * mass @ np.vander(points, size, increasing=True)
        total[first : first + size] += np.linalg.solve(vandermonde.T, moments)
    return total
