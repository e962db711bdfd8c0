"""log p as one more coordinate of the state, by torchdiffeq's methods: for every SDE, to rtol and atol."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import ScoreError, SolverError
from sdeflow.likelihood.options import DEFAULT_PROBES, Options, is_exact
from sdeflow.likelihood.result import Solved
from sdeflow.likelihood.route import Continuous
from sdeflow.likelihood.tolerance import Held, require_reached
from sdeflow.numerics.noise import NoiseStream
from sdeflow.numerics.traces import (
    Estimate,
    Exact,
    Given,
    Products,
    Spread,
    are_few,
    columns_of,
    hadamard,
    heavy_dof,
    spread_dof,
    until,
)
from sdeflow.solvers import Field, Problem, Watch
from sdeflow.solvers.clock import Clock
from sdeflow.solving.model import Model
from sdeflow.solving.plan import Plan
from sdeflow.solving.reference import reference, reference_growth
from sdeflow.symbolic.equations import Equation

_MANY_PROBES = 8  # from here on the spread of fixed probes tells their error
_FIRST_OF_HELD = 0.01  # times the error that log p is held to: the first tolerance of dopri5, between the next two
_MOST_FIRST = 1e-4
_LOOSE = 1e-3  # from this tolerance on the error does not follow the tolerance; two tighter ones tell it

__all__ = ["Flow", "by_torchdiffeq", "fixed_probes"]


def by_torchdiffeq(
    model: Model, equation: Equation, x: Tensor, rows: Tensor, options: Options, way: Continuous, dtype: torch.dtype,
    on_call: Callable[[], object] | None,
) -> Solved:  # fmt: skip
    """log p of states x (batch, *event) in float64 at the cutoff.

    Args:
        model: the SDE with its score and prior.
        equation: its probability flow.
        x: at the cutoff.
        rows: which rows of all samples these are, for their probes.
        options: as asked for.
        way: the method, and its steps or tolerances.
        dtype: in which the score is called.
        on_call: called at each call of the score.
    """
    plan, clock = way.plan, model.clock(options.grid)
    compared = clock if plan.steps is None else clock.splitting(plan.steps)
    model = model.carried_by(plan, clock)
    calls: list[int] = []
    everyone = torch.arange(len(x), device=x.device)

    def solved(
        part: Tensor, plan: Plan, round: int = 0, graph: bool = False, clock: Clock = clock
    ) -> tuple[Estimate, Tensor]:
        vectors = _probes(model, x[part], rows[part], options, round)
        estimate, x_T, nfe = Flow(model.rows(part), equation, clock, dtype, vectors, graph)(x[part], plan, on_call)
        calls.append(nfe)
        return estimate, x_T

    def measured(part: Tensor, plan: Plan) -> tuple[Estimate, Tensor, Tensor]:
        """log p and x_T, with probes until their error is small where that is asked for; and log p by the first."""
        found: list[tuple[Estimate, Tensor]] = []

        def run(round: int, some: Tensor) -> Estimate:
            found.append(solved(part[some.to(part.device)], plan, round, options.gradient is not None))
            return found[-1][0]

        total = (
            run(0, torch.arange(len(part)))
            if options.target is None
            else until(run, len(part), options.target, rounds=8)
        )
        first, x_T = found[0]
        return total, x_T, first.value.detach()

    if way.held is not None:
        return _to_tolerance(x, plan, way.held, options, dtype, calls, solved, measured)
    estimate, x_T, first = measured(everyone, plan)
    error, used = torch.full_like(first, math.nan), sum(calls)
    if options.full:
        error = _compared(first, plan, lambda other: solved(everyone, other, clock=compared)[0].value.detach())
    return Solved(estimate.value, estimate.stderr, estimate.dof, error, x_T, used)


def _to_tolerance(
    x: Tensor, plan: Plan, error: float, options: Options, dtype: torch.dtype, calls: list[int],
    solved: Callable[[Tensor, Plan], tuple[Estimate, Tensor]],
    measured: Callable[[Tensor, Plan], tuple[Estimate, Tensor, Tensor]],
) -> Solved:  # fmt: skip
    """log p of each sample to an ``error`` in nats: at tolerances of dopri5 that become tighter until two solves agree.

    The tolerances are those of a solve with the probes of the first round, and without a graph; where more is asked
    for, it is found at the tolerance that served.
    """
    held = Held.nothing(x)

    def at(rtol: float) -> Plan:
        return Plan(plan.solver, None, rtol, rtol, max(1, plan.max_calls - sum(calls)))

    def allowed(value: Tensor) -> Tensor:
        return torch.full_like(value, error)

    first = min(_FIRST_OF_HELD * error, _MOST_FIRST)
    with torch.no_grad():
        left = held.settle(
            torch.arange(len(x), device=x.device), lambda part, rtol: solved(part, at(rtol)), allowed, first, dtype
        )
    require_reached(left, held.value, held.error, allowed(held.value[left]), sum(calls), dtype)
    if options.target is None and options.gradient is None:
        return Solved(held.value, held.stderr, held.dof, held.error, held.x_T, sum(calls))
    value, stderr, dof = torch.zeros_like(held.value), held.stderr, held.dof
    for rtol in {*held.rtol.tolist()}:
        part = (held.rtol == rtol).nonzero().flatten()
        found, _, _ = measured(part, Plan(plan.solver, None, rtol, rtol, plan.max_calls))
        value, stderr = value.index_copy(0, part, found.value), stderr.index_copy(0, part, found.stderr)
        dof = dof.index_copy(0, part, found.dof)
    return Solved(value, stderr, dof, held.error, held.x_T, sum(calls))


def _compared(value: Tensor, plan: Plan, solve: Callable[[Plan], Tensor]) -> Tensor:
    """What log p of a solve may be off by: its difference to a finer one, and what that one may be off by.

    The finer solve has errors of its own, and may agree by chance. They are told by

        the same method      a tenth of the difference to a looser one: ten times the tolerance, or half the steps
        a loose tolerance    a solve at a hundredth of it too: the error does not fall as the tolerance does there
        rk4 for another      what rk4 changes by in half of its own steps

    Where nothing finer comes to an end, it is the whole difference to the looser one.
    """
    finer = plan.finer()
    try:
        best = solve(finer)
        parts = [value - best, torch.finfo(torch.float64).eps * value]
        if plan.solver != finer.solver:
            parts.append(best - solve(finer.looser()))
        else:
            parts.append(0.1 * (value - solve(plan.looser())))
        if plan.steps is None and max(plan.rtol, plan.atol) >= _LOOSE:
            parts.append(value - solve(finer.finer()))
    except SolverError:
        return (value - solve(plan.looser())).abs()
    return torch.stack(parts).norm(dim=0)


def _probes(model: Model, x: Tensor, rows: Tensor, options: Options, round: int) -> FixedProbes | None:
    """The probes of a solve, or None for the exact trace."""
    if isinstance(options.trace, Given):
        given = options.trace if model.gaussian is None else options.trace.mapped(model.kernel.to_basis, x.shape[1:])
        return FixedProbes(given.of_rows(rows, tuple(x.shape), x.device), 1.0, None)
    if options.trace not in (None, "exact", "hutchinson") and not isinstance(options.trace, Exact):
        others = (
            "others go with the exponential solver, which needs a Gaussian kernel."
            if model.gaussian is None
            else "others go with steps= or atol= alone."
        )
        raise ValueError(
            f'trace must be "exact" or "hutchinson" with a method of torchdiffeq, not {options.trace!r}: {others}'
        )
    if is_exact(x, options):
        return None
    probes = DEFAULT_PROBES if options.probes in (None, "auto") else options.probes
    return fixed_probes(x, rows, options, probes * 2**round, round)


class FixedProbes(NamedTuple):
    """Probes that stay as they are over a solve.

    Attributes:
        vectors: (probes, batch, *event).
        left: the part of a mean's variance over independent probes that is left: less than 1 for distinct columns.
        normals: whether they are normal numbers, or random signs; None where their law is not known.
    """

    vectors: Tensor
    left: float
    normals: bool | None


def fixed_probes(x: Tensor, rows: Tensor, options: Options, probes: int, round: int = 0) -> FixedProbes:
    """Probes of states x (batch, *event).

    Where random signs could all be the same by chance they are distinct columns of a randomised Hadamard matrix, as
    those of :class:`~sdeflow.numerics.traces.Hutchinson`; as many as it has are the exact trace.
    """
    event, left = tuple(x.shape[1:]), 1.0
    first, purpose = int(rows.min()) if len(rows) else 0, "probe" if round == 0 else f"probe {round}"
    stream = NoiseStream(options.key, purpose, first)
    draw = stream.rademacher if options.law == "rademacher" else stream.normal
    count, d = int(rows.max()) + 1 - first if len(rows) else 0, math.prod(event)
    few = options.law == "rademacher" and are_few(d, probes)
    drawn = draw((count, 1 if few else probes, *event), torch.float64)[rows.cpu() - first]
    if few:
        order = columns_of(d, options.key, purpose)
        columns = order[:probes]
        drawn = drawn * hadamard(torch.arange(d), columns).reshape(-1, *event)
        left = 1.0 - len(columns) / len(order)
    return FixedProbes(drawn.to(x.device).movedim(1, 0).contiguous(), left, options.law == "gaussian")


class Flow:
    """d/dt of (x, what the divergence adds to log p), and its solves."""

    def __init__(
        self,
        model: Model,
        equation: Equation,
        clock: Clock,
        dtype: torch.dtype,
        probes: FixedProbes | None,
        graph: bool,
    ) -> None:
        self.model, self.clock, self.dtype, self.graph = model, clock, dtype, graph
        self.probes, self.columns = probes, 1 if probes is None else len(probes.vectors)
        self.drift, self.products = model.drift(equation), Products(create_graph=graph)

    def __call__(self, x: Tensor, plan: Plan, on_call: Callable[[], object] | None) -> tuple[Estimate, Tensor, int]:
        """log p, x_T and the calls."""
        model, d, columns = self.model, math.prod(x.shape[1:]), self.columns
        extra = 0 if self.probes is None else 1

        def row_norm(error: Tensor) -> Tensor:
            error = error.detach()  # a step's length has no gradient
            of_state, of_log_p = error[:, :d], error[:, d : d + columns].mean(1)
            return torch.maximum(of_state.square().mean(1).sqrt(), of_log_p.abs())

        def rate(y: Tensor, t: Tensor) -> Tensor:
            return self.rate(y, t, tuple(x.shape[1:]))

        with torch.enable_grad() if self.graph else torch.no_grad():
            watch = Watch(plan.max_calls, on_call, hint=model.declaration.domain_hint)
            problem = Problem(Field(rate), self.clock, backward=False, watch=watch, row_norm=row_norm)
            start = model.to_solver(x, model.cutoff).flatten(1)
            y = torch.cat([start, start.new_zeros(len(x), columns + extra)], dim=1)
            y = plan.solver.solve(problem, y, plan.steps, plan.rtol, plan.atol)
            x_T, integrals = model.from_solver(y[:, :d].reshape(x.shape), model.T), y[:, d : d + columns]
            prior = model.prior_for(x.detach().to(self.dtype))
            value = prior.log_prob(x_T) + integrals.mean(1) + reference_growth(model, x[:1].detach())
        stderr, dof = torch.zeros_like(value.detach()), torch.full_like(value.detach(), math.inf)
        if self.probes is not None:
            # The bound is too large where J is far from symmetric; many probes tell by themselves.
            few = columns < _MANY_PROBES and self.probes.normals is not None
            spread = y[:, -1].detach() if few else integrals.detach().std(1)
            stderr = spread * math.sqrt(self.probes.left / columns)
            stderr = stderr if columns > 1 else torch.full_like(stderr, math.nan)
            if self.probes.left:
                known = heavy_dof(columns) if few else spread_dof(columns)
                own = self.probes.normals is None  # probes that were handed over tell by their own spread
                dof = torch.full_like(dof, columns - 1.0 if own else known)
        return Estimate(value, stderr, dof, columns), x_T.detach(), problem.nfe

    def rate(self, y: Tensor, t: Tensor, event: tuple[int, ...]) -> Tensor:
        """For y (batch, d + columns)."""
        kernel, d = self.model.gaussian, math.prod(event)
        with torch.enable_grad():
            u = y[:, :d].reshape(-1, *event)
            u = u if self.graph and u.requires_grad else u.detach().requires_grad_(True)
            s = self.model.solver_score(u, t, self.dtype)
            velocity = self.drift(u, t, s)
            if kernel is None:
                change, spread = self._divergence(velocity, u)
            else:
                _, _, q = kernel.equation(u, t)
                inverse = reference(self.model, t, u).inverse
                known = (q @ inverse.T @ inverse).trace(event)
                divergence, spread = self._divergence(q(s), u)
                change, spread = -0.5 * (divergence + known), 0.5 * spread
            rate = torch.cat([velocity.flatten(1), change.mT.to(y.dtype), spread.mT.to(y.dtype)], dim=1)
        return rate if self.graph else rate.detach()

    def _divergence(self, field: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """div of a field, (columns, batch): exact in one column, or vᵀ J v for each probe v, and its deviation.

        Of fixed probes the errors at all times add up, so that the integral of the standard deviation over probes (none
        for the exact trace, else one row) is that of the integral, or more.
        """
        if not field.requires_grad:
            raise ScoreError("no gradient flows through the score (a detach or no_grad inside?): it has no divergence.")
        if self.probes is None:
            divergence = self.products.divergence(field, u)[None]
            return divergence, divergence.detach()[:0]
        forms, spread = [], Spread(bool(self.probes.normals))
        for vectors in self.products.chunks(self.probes.vectors.flatten(2), field):
            gradients = self.products.gradients(field, u, vectors)
            forms.append((gradients * vectors.to(gradients.dtype)).sum(-1, dtype=torch.float64))
            spread.add(vectors, gradients.detach())
        return torch.cat(forms), spread.variance().nan_to_num(0.0).sqrt()[None]
