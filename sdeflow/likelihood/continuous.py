"""log p as one more coordinate of the state, by torchdiffeq's methods: for every SDE, to rtol and atol."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.errors import ScoreError
from sdeflow.likelihood.options import DEFAULT_PROBES, Options, is_exact
from sdeflow.likelihood.result import Solved
from sdeflow.model import Model
from sdeflow.noise import NoiseStream
from sdeflow.plan import Plan, make_plan
from sdeflow.reference import reference, reference_growth
from sdeflow.solvers import Problem
from sdeflow.solvers.clock import Clock
from sdeflow.symbolic.equations import Equation
from sdeflow.traces import Estimate, Exact, Given, Products, until

__all__ = ["Flow", "by_torchdiffeq", "fixed_probes", "plan_of"]


def plan_of(options: Options, dtype: torch.dtype) -> Plan:
    """The method meant, and its steps or tolerances."""
    if options.gradient == "adjoint":
        raise ValueError(
            'gradient="adjoint" goes along the nodes of an exponential solver: give steps= or atol= alone; a method of '
            'torchdiffeq takes gradient="backprop".'
        )
    return make_plan("likelihood", options.solver, options.steps, options.rtol, options.atol, options.max_calls, dtype)


def by_torchdiffeq(
    model: Model, equation: Equation, x: Tensor, rows: Tensor, options: Options, dtype: torch.dtype,
    on_call: Callable[[], object] | None,
) -> Solved:  # fmt: skip
    """log p of states x (batch, *event) in float64 at the cutoff.

    Args:
        model: the SDE with its score and prior.
        equation: its probability flow.
        x: at the cutoff.
        rows: which rows of all samples these are, for their probes.
        options: as asked for.
        dtype: in which the score is called.
        on_call: called at each call of the score.
    """
    plan, clock = plan_of(options, dtype), model.clock(options.grid)
    found: list[tuple[Estimate, Tensor, Tensor | None, int]] = []

    def run(round: int, part: Tensor) -> Estimate:
        part = part.to(x.device)
        vectors = _probes(model, x[part], rows[part], options, round)
        solve = Flow(model.of_indices(part, len(x)), equation, clock, dtype, vectors, options.gradient is not None)
        estimate, x_T, nfe = solve(x[part], plan, on_call)
        found.append((estimate, x_T, vectors, nfe))
        return estimate

    if options.target is None:
        estimate = run(0, torch.arange(len(x)))
    else:
        estimate = until(run, len(x), options.target, rounds=8)
    first, x_T, vectors, _ = found[0]
    error = torch.full_like(first.value.detach(), math.nan)
    if options.full:
        rough = Flow(model, equation, clock, dtype, vectors, False)(x.detach(), plan.looser(), on_call)[0]
        error = (first.value.detach() - rough.value).abs()
    return Solved(estimate.value, estimate.stderr, error, x_T, sum(nfe for *_, nfe in found))


def _probes(model: Model, x: Tensor, rows: Tensor, options: Options, round: int) -> Tensor | None:
    """Probe vectors (probes, batch, *event), or None for the exact trace."""
    if isinstance(options.trace, Given):
        given = options.trace if model.kernel is None else options.trace.mapped(model.kernel.to_basis, x.shape[1:])
        return given.of_rows(rows, tuple(x.shape), x.device)
    if options.trace not in (None, "exact", "hutchinson") and not isinstance(options.trace, Exact):
        raise ValueError(
            f'trace must be "exact" or "hutchinson" with a method of torchdiffeq, not {options.trace!r}: others go '
            "with steps= or atol= alone."
        )
    if is_exact(x, options):
        return None
    probes = DEFAULT_PROBES if options.probes in (None, "auto") else options.probes
    return fixed_probes(x, rows, options, probes * 2**round, round)


def fixed_probes(x: Tensor, rows: Tensor, options: Options, probes: int, round: int = 0) -> Tensor:
    """Probe vectors (probes, batch, *event), which stay as they are over a solve."""
    first = int(rows.min()) if len(rows) else 0
    stream = NoiseStream(options.seed, "probe" if round == 0 else f"probe {round}", first)
    draw = stream.rademacher if options.probe == "rademacher" else stream.normal
    count = int(rows.max()) + 1 - first if len(rows) else 0
    drawn = draw((count, probes, *x.shape[1:]), torch.float64)[rows.cpu() - first]
    return drawn.to(x.device).movedim(1, 0).contiguous()


class Flow:
    """d/dt of (x, what the divergence adds to log p), and its solves."""

    def __init__(
        self, model: Model, equation: Equation, clock: Clock, dtype: torch.dtype, vectors: Tensor | None, graph: bool
    ) -> None:
        self.model, self.clock, self.dtype, self.vectors, self.graph = model, clock, dtype, vectors, graph
        self.drift, self.products = model.drift(equation), Products(create_graph=graph)

    def __call__(self, x: Tensor, plan: Plan, on_call: Callable[[], object] | None) -> tuple[Estimate, Tensor, int]:
        """log p, x_T and the calls."""
        model, d = self.model, math.prod(x.shape[1:])
        columns = 1 if self.vectors is None else len(self.vectors)

        def row_norm(error: Tensor) -> Tensor:
            error = error.detach()  # a step's length has no gradient
            of_state, of_log_p = error[:, :d], error[:, d:].mean(1)
            return torch.maximum(of_state.square().mean(1).sqrt(), of_log_p.abs())

        def rate(y: Tensor, t: Tensor) -> Tensor:
            return self.rate(y, t, tuple(x.shape[1:]))

        with torch.enable_grad() if self.graph else torch.no_grad():
            problem = Problem(
                rate, self.clock, backward=False, row_norm=row_norm, max_calls=plan.max_calls, on_call=on_call
            )
            start = model.to_solver(x, model.cutoff).flatten(1)
            y = torch.cat([start, start.new_zeros(len(x), columns)], dim=1)
            y = plan.solver.solve(problem, y, plan.steps, plan.rtol, plan.atol)
            x_T, integrals = model.from_solver(y[:, :d].reshape(x.shape), model.T), y[:, d:]
            prior = model.prior_for(x.detach().to(self.dtype))
            value = prior.log_prob(x_T) + integrals.mean(1) + reference_growth(model, x[:1].detach())
        plain = integrals.detach()
        if self.vectors is None:
            stderr, dof = torch.zeros_like(plain[:, 0]), torch.full_like(plain[:, 0], math.inf)
        else:
            stderr = plain.std(1) / math.sqrt(columns) if columns > 1 else torch.full_like(plain[:, 0], math.nan)
            dof = torch.full_like(stderr, columns - 1.0)
        return Estimate(value, stderr, dof, columns), x_T.detach(), problem.nfe

    def rate(self, y: Tensor, t: Tensor, event: tuple[int, ...]) -> Tensor:
        """For y (batch, d + columns)."""
        kernel, d = self.model.kernel, math.prod(event)
        with torch.enable_grad():
            u = y[:, :d].reshape(-1, *event)
            u = u if self.graph and u.requires_grad else u.detach().requires_grad_(True)
            s = self.model.solver_score(u, t, self.dtype)
            velocity = self.drift(u, t, s)
            if kernel is None:
                change = self._divergence(velocity, u)
            else:
                _, _, q = kernel.equation(u, t)
                inverse = reference(self.model, t, u).inverse
                known = (q @ inverse.T @ inverse).trace(event)
                change = -0.5 * (self._divergence(q(s), u) + known)
            rate = torch.cat([velocity.flatten(1), change.mT.to(y.dtype)], dim=1)
        return rate if self.graph else rate.detach()

    def _divergence(self, field: Tensor, u: Tensor) -> Tensor:
        """div of a field, (columns, batch): exact in one column, or vᵀ J v for each probe v."""
        if not field.requires_grad:
            raise ScoreError("no gradient flows through the score (a detach or no_grad inside?): it has no divergence.")
        if self.vectors is None:
            return self.products.divergence(field, u)[None]
        return self.products.forms(field, u, self.vectors.flatten(2))
