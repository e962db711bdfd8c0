"""log p on an exponential solver's nodes: in a fixed number of steps, or to an error in nats for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from sdeflow.errors import LongSolveWarning, warn
from sdeflow.likelihood import adjoint
from sdeflow.likelihood.continuous import FixedProbes, Flow, fixed_probes
from sdeflow.likelihood.nodes import Carried, Carrier
from sdeflow.likelihood.options import DEFAULT_PROBES, Options
from sdeflow.likelihood.result import Solved
from sdeflow.likelihood.route import OnNodes
from sdeflow.likelihood.tolerance import Held, not_reached, require_reached
from sdeflow.numerics.traces import Estimate, Exact, Given, Hutchinson, Probed, until
from sdeflow.solvers import Torchdiffeq
from sdeflow.solving.model import Model
from sdeflow.solving.pilot import pilot
from sdeflow.solving.plan import Plan
from sdeflow.symbolic.equations import Equation

__all__ = ["by_exponential", "carrier_of"]

_ATOL, _BITS, _RTOL = 1e-3, 1e-4, 1e-5  # by default: nats, bits per dimension and of log p, whichever is most
_ATOL_IN_FLOAT32 = 5e-3  # where scores are networks, and rough
_OF_TRACE = 0.3  # and this part of the standard error that is warned of, where the trace is an estimate
_FIRST_STEPS = 20  # of the coarsest grid
_FINER = 1.5  # each next one has so many times the steps
_MOST_STEPS = 520  # of the finest
_FIRST_RTOL = 1e-5  # of dopri5, where these are not enough
_SAFETY = 3.0  # of that the error of a finer grid falls as its defect does
_LEAST_FALL = 0.75  # of a defect on the next grid: with less, two grids tell little
_OF_DEFECT = 2.7, 0.04  # over the steps, and no less: this part of its defect is what a grid is off by, measured
_UNRESOLVED = 15.0  # times its defect is what a grid is off by only where it does not resolve the flow
_DOUBTS = 2.0  # times what the fall of the defects leaves of the difference between two grids
_LONG, _LARGE = 10_000, 100_000  # products, and parameters, from which on a solve is said to be long
_COMPARED_WITH = 20  # steps, at least, of the finer grid that a solve in fixed steps is compared with


def carrier_of(model: Model, x: Tensor, way: OnNodes, key: int, on_call: Callable[[], object] | None) -> Carrier:
    """The grid of ``way`` with its solver and trace, the same for all chunks of x.

    Args:
        model: an SDE with a Gaussian kernel, and its score.
        x: all states (batch, *event), in the dtype in which the score is called.
        way: as chosen.
        key: of the probes.
        on_call: called at each call of the score.
    """
    if isinstance(way.grid, str) and way.grid == "pilot":
        clock = pilot(model, way.solver, x.detach()[:1], likelihood=True).clock
    else:
        clock = model.clock(way.grid)
    trace = way.trace
    if isinstance(trace, Given):
        trace = trace.mapped(model.kernel.to_basis, tuple(x.shape[1:]))
    return Carrier(trace, way.solver, clock, way.steps or _FIRST_STEPS, key, x.dtype, on_call)


def by_exponential(
    carrier: Carrier, model: Model, equation: Equation, x: Tensor, rows: Tensor, options: Options, in_steps: bool
) -> Solved:
    """log p of states x (batch, *event) in float64 at the cutoff.

    Args:
        carrier: of :func:`carrier_of`.
        model: an SDE with a Gaussian kernel, and its score.
        equation: its probability flow.
        x: at the cutoff.
        rows: which rows of all samples these are, for their probes.
        options: as asked for.
        in_steps: whether in the carrier's steps, rather than to an error in nats.
    """
    if in_steps:
        return _in_steps(carrier, model, x, rows, options)
    return _to_tolerance(carrier, model, equation, x, rows, options)


def _measured(carrier: Carrier, model: Model, x: Tensor, rows: Tensor, options: Options) -> tuple[Carried, Carried]:
    """log p on one grid, with the gradient asked for, and with probes until their error is small where that is.

    The second is that of the first round of probes.
    """
    mode = {None: torch.no_grad, "backprop": torch.enable_grad}.get(options.gradient, nullcontext)
    with mode():
        return _until(carrier, model, x, rows, options)


def _until(carrier: Carrier, model: Model, x: Tensor, rows: Tensor, options: Options) -> tuple[Carried, Carried]:
    def once(carrier: Carrier, part: Tensor, round: int) -> Carried:
        of_part = model.rows(part)
        if options.gradient == "adjoint":
            return adjoint.carried(carrier, of_part, x[part], rows[part], round)
        return carrier(of_part, x[part], rows[part], round)

    everyone = torch.arange(len(x), device=x.device)
    if options.target is None:
        total = once(carrier, everyone, 0)
        return total, total
    found: list[Carried] = []

    design = carrier.trace
    if not isinstance(design, Probed):
        raise ValueError(f'probes="auto" is of a trace with a number of probes, not of {design}.')

    def run(round: int, part: Tensor) -> Estimate:
        """Twice the probes of the round before, on the samples that need them."""
        trace = design.with_probes(design.probes * 2**round)
        found.append(once(replace(carrier, trace=trace), part.to(x.device), round))
        last = found[-1]
        return Estimate(last.value, last.stderr, last.dof, trace.probes)

    pooled = until(run, len(x), options.target, rounds=8)
    calls = sum(part.calls for part in found)
    return Carried(pooled.value, pooled.stderr, pooled.dof, found[0].x_T, calls, found[0].defect), found[0]


def _same_for_all_grids(carrier: Carrier) -> Carrier:
    """The carrier with a trace that does not differ between grids, so that only the solver does."""
    same = isinstance(carrier.trace, Exact | Given)
    return carrier if same else replace(carrier, trace=Hutchinson(2, fresh=False))


@torch.no_grad()
def _alone(carrier: Carrier, model: Model, x: Tensor, rows: Tensor) -> Carried:
    return carrier(model, x.detach(), rows)


def _in_steps(carrier: Carrier, model: Model, x: Tensor, rows: Tensor, options: Options) -> Solved:
    """log p in a fixed number of steps; with ``full``, compared with a finer grid."""
    found, first = _measured(carrier, model, x, rows, options)
    error = torch.full_like(found.value.detach(), math.nan)
    if options.full:
        error = _compared(carrier, model, x, rows, first)
    return Solved(found.value, found.stderr, found.dof, error, found.x_T, found.calls)


def _compared(carrier: Carrier, model: Model, x: Tensor, rows: Tensor, found: Carried) -> Tensor:
    """What log p on a grid may be off by: its difference to a grid twice as fine, and what that may be off by.

    Every step is split in two (in more where 20 steps are not reached), and takes its probes along. The error of the
    finer grid is of the size of its defect; where steps resolve the flow it is smaller by the factor by which the
    defect has fallen, three times of which is taken. Between narrow modes they do not resolve it, both grids may be off
    by as much, and the defect tells.
    """
    solver = carrier.solver if carrier.solver.past else replace(carrier.solver, corrector=True)
    refined = max(2, math.ceil(_COMPARED_WITH / carrier.steps))
    finer = _alone(replace(carrier, solver=solver, refined=refined), model, x, rows)
    # Where the trace is estimated the difference is too, and may be small by chance.
    error = finer.defect
    if isinstance(carrier.trace, Exact):
        error = error * (_SAFETY * finer.defect / found.defect).nan_to_num(1.0).clamp_max(1.0)
    rounding = torch.finfo(carrier.dtype).eps * finer.value.abs()
    return torch.stack([found.value.detach() - finer.value, error, rounding]).norm(dim=0)


def _to_tolerance(
    carrier: Carrier, model: Model, equation: Equation, x: Tensor, rows: Tensor, options: Options
) -> Solved:
    """log p of each sample to ``atol`` nats: on grids of N, 1.5 N, ... steps until two of them agree.

    What a grid is off by is found by :func:`_off_by`, and three grids are the least. Samples that 518 steps do not
    settle are solved by dopri5, at tolerances ten times tighter until two agree: such as lie between narrow modes,
    where the flow contracts faster than explicit steps of one grid for all can follow. A
    stochastic trace is compared with two fixed probes, and taken on the grid, or at the tolerance, that was found.
    """
    same, budget = _same_for_all_grids(carrier), options.max_calls or 10_000
    order = carrier.solver.convergence_order
    held = Held.nothing(x)
    value, stderr, dof, error, x_T = held.value, held.stderr, held.dof, held.error, held.x_T
    defect = value.clone()
    steps_of = torch.zeros(len(x), dtype=torch.long, device=x.device)
    left, steps, calls, told = torch.arange(len(x), device=x.device), _FIRST_STEPS, 0, False
    while len(left) and steps <= _MOST_STEPS:
        if calls + steps + 1 > budget:
            raise not_reached(left, value, f"within the budget of {budget} calls", calls)
        told = told or _told_if_long(carrier, model, options, calls, math.prod(x.shape[1:]))
        found = _alone(replace(same, steps=steps), model.rows(left), x[left], rows[left])
        before, coarse, last = value[left], defect[left], error[left]
        value[left], stderr[left], x_T[left], steps_of[left] = found.value, found.stderr, found.x_T, steps
        dof[left], defect[left] = found.dof, found.defect
        calls += found.calls
        if steps > _FIRST_STEPS:
            error[left] = _off_by(found, before, coarse, last, steps, order, carrier.dtype)
            left = left[~((error[left] <= _tolerance(carrier, options, value[left], x)) & ~last.isnan())]
        steps = math.ceil(_FINER * steps)

    def adaptively(part: Tensor, rtol: float) -> tuple[Estimate, Tensor]:
        nonlocal calls
        found, ends, nfe = _adaptively(same, model, equation, x.detach(), rows, part, options, rtol, budget - calls)
        calls += nfe
        return found, ends

    def allowed(value: Tensor) -> Tensor:
        return _tolerance(carrier, options, value, x)

    left = held.settle(left, adaptively, allowed, _FIRST_RTOL, carrier.dtype)
    require_reached(left, value, error, allowed(value[left]), calls, carrier.dtype)
    if same is carrier and options.gradient is None:
        return Solved(value, stderr, dof, error, x_T, calls)
    value = torch.zeros_like(value)
    for n, rtol in {*zip(steps_of.tolist(), held.rtol.tolist(), strict=True)}:
        part = ((steps_of == n) & (held.rtol == rtol)).nonzero().flatten()
        if rtol:
            graph = options.gradient is not None and torch.is_grad_enabled()
            of_part: Estimate | Carried
            of_part, _, nfe = _adaptively(carrier, model, equation, x, rows, part, options, rtol, budget, graph)
        else:
            of_part, _ = _measured(replace(carrier, steps=n), model.rows(part), x[part], rows[part], options)
            nfe = of_part.calls
        calls += nfe
        value, stderr = value.index_copy(0, part, of_part.value), stderr.index_copy(0, part, of_part.stderr)
        dof = dof.index_copy(0, part, of_part.dof)
    return Solved(value, stderr, dof, error, x_T, calls)


def _off_by(
    found: Carried, before: Tensor, coarse: Tensor, last: Tensor, steps: int, order: int, dtype: torch.dtype
) -> Tensor:
    """What log p on the finer of two grids is off by, (batch,).

    Where the error falls by a factor r from a grid to the next, the finer one has r / (1 - r) of their difference as
    its error; twice that is taken, for learned scores are rough in time. Of r the defects tell, which fall one order
    more slowly than the error and have no signs that cancel. Two grids may agree by chance, so the error is no less
    than r times that of the grid before, or than what a grid with this defect is off by as a rule, whichever of the two
    is less.

    Args:
        found: on the finer grid.
        before, coarse, last: log p on the coarser grid, its defect, and what it is off by (NaN where not known).
        steps: of the finer grid.
        order: of the solver, the fastest that a defect is taken to fall with.
        dtype: in which the score was called.
    """
    fell = (found.defect / coarse).nan_to_num(_FINER**-order)
    falls = fell.clamp(_FINER**-order, _LEAST_FALL)
    change = _DOUBTS * falls / (1.0 - falls) * (found.value - before).abs()
    by_chance = torch.fmin(falls * last, max(_OF_DEFECT[0] / steps, _OF_DEFECT[1]) * found.defect)
    # Defects that fall far faster than the order says, or are far below what was off, are of an unresolved grid.
    unresolved = (fell < 0.5 * _FINER**-order) | (last > _UNRESOLVED * coarse)
    by_chance = torch.where(unresolved, falls * last, by_chance)
    return torch.fmax(change, by_chance).maximum(torch.finfo(dtype).eps * found.value.abs())


def _told_if_long(carrier: Carrier, model: Model, options: Options, calls: int, d: int) -> bool:
    """Says so once where much work on a large network goes on and no bar shows it, as off a terminal."""
    products = carrier.trace.probes if isinstance(carrier.trace, Probed) else d
    if carrier.on_call is not None or options.progress is not None or calls * products < _LONG:
        return False
    if sum(parameter.numel() for parameter in model.score.parameters()) < _LARGE:
        return False
    warn(
        f"log_prob has taken {calls} calls with {products} products each and goes on: a learned score is rough. A "
        "larger atol=, steps=, or probes= take less; progress=True shows the work, and progress=False says nothing.",
        LongSolveWarning,
    )
    return True


def _adaptively(
    carrier: Carrier, model: Model, equation: Equation, x: Tensor, rows: Tensor, part: Tensor, options: Options,
    rtol: float, budget: int, graph: bool = False,
) -> tuple[Estimate, Tensor, int]:  # fmt: skip
    """log p of the samples ``part`` by dopri5, with as many probes as the carrier's trace has, fixed."""
    trace = carrier.trace
    if isinstance(trace, Exact):
        probes = None
    elif isinstance(trace, Given):
        probes = FixedProbes(trace.of_rows(rows[part], tuple(x.shape), x.device), 1.0, None)
    else:
        count = trace.probes if isinstance(trace, Probed) else DEFAULT_PROBES
        probes = fixed_probes(x[part], rows[part], options, count)
    flow = Flow(model.rows(part), equation, model.clock(None), carrier.dtype, probes, graph)
    return flow(x[part], Plan(Torchdiffeq("dopri5"), None, rtol, rtol, max(1, budget)), carrier.on_call)


def _tolerance(carrier: Carrier, options: Options, value: Tensor, x: Tensor) -> Tensor:
    """The error in nats that each sample of log p ``value`` is held to."""
    if options.atol is not None:
        return torch.full_like(value, options.atol)
    least = _ATOL if carrier.dtype == torch.float64 else _ATOL_IN_FLOAT32
    least = max(least, _BITS * math.log(2.0) * math.prod(x.shape[1:]))
    if not isinstance(carrier.trace, Exact):
        least = max(least, _OF_TRACE * options.warn_above)
    return (_RTOL * value.abs()).clamp_min(least)
