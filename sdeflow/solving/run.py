"""One solve of the reverse SDE or the flow as its user asked for it: chunks, trajectories and callbacks.

Batches too large for memory are solved in chunks. Each row draws its noise as in the whole batch
(:mod:`sdeflow.numerics.noise`), so that no sample depends on where the batch was cut. A trajectory is the state after
each of the solver's steps, as the solver tells it; nothing is interpolated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow.errors import SolverError
from sdeflow.numerics.brownian import BrownianRows
from sdeflow.numerics.memory import memory_hint
from sdeflow.numerics.noise import BLOCK, NoiseStream
from sdeflow.scores import evaluating
from sdeflow.scores.thresholded import Thresholded
from sdeflow.solvers import Clock, Grid, Problem, Solver, Watch
from sdeflow.solvers.registry import demands_of, require
from sdeflow.solving.boundary import Kept
from sdeflow.solving.gradients import require_graph, require_reach
from sdeflow.solving.model import Model
from sdeflow.solving.options import Options
from sdeflow.solving.pilot import pilot
from sdeflow.solving.plan import Plan, make_plan
from sdeflow.solving.solution import Solution
from sdeflow.symbolic.equations import Equation

__all__ = ["demand_of_path", "run"]

_HINT = "The solve does not fit into memory: pass chunk=, the number of samples to solve at once."
_LARGEST = 2**24  # elements of a state that are solved at once


@torch.inference_mode(False)  # what is kept for later calls must be able to carry gradients
def run(
    model: Model,
    equation: Equation,
    start: Callable[[], Tensor],
    dtype: torch.dtype,
    options: Options,
    *,
    backward: bool = True,
    seed: int | None = None,
    rows: Tensor | None = None,
    graph: bool = False,
) -> Solution:
    """The state at the other end, and what else ``options`` ask for.

    Args:
        model: the SDE with its score.
        equation: its reverse SDE or its flow.
        start: gives the state (batch, *event) to start from; asked once the options are known to fit.
        dtype: of that state.
        options: as the user gave them.
        backward: whether t runs from T down to the cutoff.
        seed: of the noise, for an SDE; None for an ODE.
        rows: which samples of a larger batch these are, for the noise of an SDE; None for the first ones.
        graph: whether the result is to be differentiated.
    """
    began = time.perf_counter()
    if options.threshold is not None:
        model = model.with_score(Thresholded(model.score, options.threshold))
    with torch.no_grad():
        plan = _plan(model, "ode" if seed is None else "sde", options, dtype, graph)
        x = start()
        clock = _clock(model, plan.grid if options.grid is None else options.grid, plan.solver, x.detach())
        model = model.carried_by(plan, clock)
    checks = 0
    if graph:
        x = x.clone() if x.is_inference() else x
        checks = require_reach(model, x)
    with torch.enable_grad() if graph else torch.no_grad():
        found = _chunks(model, equation, x, clock, plan, options, backward, seed, rows)
    if graph:
        require_graph(found.x if found.states is None else found.states)
    seconds = time.perf_counter() - began
    calls = checks + found.calls
    return Solution(found.x, found.states, found.times, found.denoised, calls, plan.solver, clock.name, seconds)


def _chunks(
    model: Model, equation: Equation, x: Tensor, clock: Clock, plan: Plan, options: Options, backward: bool,
    seed: int | None, rows: Tensor | None,
) -> _Found:  # fmt: skip
    """The solves of all chunks, joined."""
    if not len(x):
        return _of_no_samples(x, plan, clock, backward, options)
    event, pieces = tuple(x.shape[1:]), _pieces(x, options.chunk, plan.solver)
    noisy = seed is not None
    hint = model.declaration.domain_hint
    calls = None if plan.expected_calls is None else plan.expected_calls * len(pieces)
    hidden = None if options.progress is None else not options.progress
    found = []
    with tqdm(total=calls, desc="solving", disable=hidden, leave=False) as bar:
        for first, last in pieces:
            part = model if last - first == len(x) else model.rows(slice(first, last))
            kept = _kept(part, x[first:last]) if noisy else None
            field = part.field(equation, event, x.dtype, noisy)
            problem = Problem(
                field if kept is None else kept.field(field), clock, backward=backward, view=part.view(event, x.dtype),
                watch=Watch(plan.max_calls, None if bar.disable else bar.update, hint=hint),
                noise=_noise(options, seed, first if rows is None else rows[first:last]),
            )  # fmt: skip
            with evaluating(part.score), _rows_counted_from(first), memory_hint(_HINT):
                found.append(_solve(part, x[first:last], problem, plan, options, kept))
    return found[0] if len(found) == 1 else _joined(found)


def _kept(model: Model, x: Tensor) -> Kept | None:
    """The domain that the reverse SDE of an SDE without a Gaussian kernel keeps to, from states x at T."""
    if model.gaussian is not None:
        return None
    working = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return Kept(model.declaration, model.values, working, model.T)


def _noise(options: Options, seed: int | None, rows: int | Tensor) -> NoiseStream | BrownianRows | None:
    """What drives the rows of a solve: those from a number on, or those of the numbers given."""
    if options.noise is not None and isinstance(rows, int):
        return options.noise.rows(rows)
    return None if seed is None else NoiseStream(seed, "path", rows)


# -------------------------------------------------------------------- before a solve


def _plan(model: Model, kind: str, options: Options, dtype: torch.dtype, graph: bool) -> Plan:
    """The plan of a solve, once its options are known to fit the equation and each other."""
    declaration, with_kernel = model.declaration, model.gaussian is not None
    demands = demands_of(declaration, with_kernel) + _demands(options, declaration.coupled, graph)
    plan = make_plan(
        kind, options.solver, options.steps, options.rtol, options.atol, options.max_calls, dtype, options.grid, demands
    )
    if options.chunk is not None:
        require(plan.solver, kind, ("chunk",), chunk=options.chunk)
    if not with_kernel and (options.denoise or options.return_denoised):
        model.kernel.require_gaussian("denoise=True" if options.denoise else "return_denoised=True")
    return plan


def _demands(options: Options, coupled: bool, graph: bool) -> tuple[str, ...]:
    """What the options ask of a solver."""
    asked = {
        "trajectory": options.trajectory,
        "common times": options.trajectory,
        "callback": options.callback is not None,
        demand_of_path(coupled): options.noise is not None,
        "gradient": graph,
    }
    return tuple(demand for demand, holds in asked.items() if holds)


def demand_of_path(coupled: bool) -> str:
    """What a given path of Brownian motion asks of a solver."""
    return "path of components" if coupled else "path"


def _clock(model: Model, grid: Grid, solver: Solver, x: Tensor) -> Clock:
    """The time variable asked for, or the one that the solver prefers where this SDE has it."""
    if isinstance(grid, str) and grid == "pilot":
        return pilot(model, solver, x).clock
    preferred = None if model.gaussian is None else solver.default_grid
    return model.clock(preferred if grid is None else grid)


def _pieces(x: Tensor, chunk: int | None, solver: Solver) -> list[tuple[int, int]]:
    """First and last row of each chunk; without ``chunk`` one alone, unless the batch is very large."""
    batch = len(x)
    if chunk is None and (x.numel() <= _LARGEST or solver.of_whole_batch):
        return [(0, batch)]
    size = chunk or max(1, _LARGEST // math.prod(x.shape[1:]))
    size = size // BLOCK * BLOCK if size > BLOCK and chunk is None else size  # whole blocks of noise cost less
    return [(first, min(first + size, batch)) for first in range(0, batch, size)]


@contextmanager
def _rows_counted_from(first: int) -> Iterator[None]:
    """Errors of a chunk name the rows of the batch."""
    try:
        yield
    except SolverError as error:
        if first and error.bad_rows:
            error.bad_rows = [first + row for row in error.bad_rows]
            error.args = (f"{error} (Rows count from sample {first}, where their chunk begins.)",)
        raise


# -------------------------------------------------------------------- a solve


@dataclass
class _Found:
    """What a solve finds, as in :class:`~sdeflow.solving.solution.Solution`."""

    x: Tensor
    states: Tensor | None = None
    times: Tensor | None = None
    denoised: Tensor | None = None
    calls: int = 0


def _solve(model: Model, x: Tensor, problem: Problem, plan: Plan, options: Options, kept: Kept | None) -> _Found:
    """What one solve from x finds; in float32 on the way where the state is in half precision."""
    seen = _Seen(model, x, options, kept)
    if options.observed:
        problem.watch.on_step = seen
    start, end = (model.T, model.cutoff) if problem.backward else (model.cutoff, model.T)
    y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    y = model.to_solver(y, start).flatten(1)
    y = plan.solver.solve(problem, y, plan.steps, plan.rtol, plan.atol)
    found = _Found(_shown(model, y.reshape(x.shape), end, kept).to(x.dtype), calls=problem.nfe)
    if options.trajectory:
        if not seen.times:
            raise ValueError(f"trajectory=True: {plan.solver} did not call problem.observe after its steps.")
        found.states = torch.stack([x, *seen.states[:-1], found.x])
        found.times = torch.tensor([start, *seen.times[:-1], end], dtype=torch.float64)
    if options.denoise or options.return_denoised:
        _denoise(model, found, end, options)
    return found


def _shown(model: Model, u: Tensor, t: float, kept: Kept | None) -> Tensor:
    """The states behind what a solver carries, within the domain where it is kept."""
    x = model.from_solver(u, t)
    return x if kept is None else kept.state(x, t)


def _denoise(model: Model, found: _Found, end: float, options: Options) -> None:
    """Adds E[x_0 | x] of every state that is returned, and puts it in place of the last, where that was asked for."""
    denoise = model.score.denoise
    if options.return_denoised and found.states is not None and found.times is not None:
        found.denoised = torch.stack([denoise(x, t) for x, t in zip(found.states, found.times.tolist(), strict=True)])
        found.calls += len(found.states)
        last = found.denoised[-1]
    else:
        last = denoise(found.x, end)
        found.calls += 1
        found.denoised = last if options.return_denoised else None
    if options.denoise:
        found.x = last.clone() if options.return_denoised else last
        if found.states is not None:
            found.states[-1] = found.x


class _Seen:
    """Sees the state after each step as its user does: keeps it for the trajectory, shows it to the callback."""

    def __init__(self, model: Model, x: Tensor, options: Options, kept: Kept | None) -> None:
        self._model, self._shape, self._dtype, self._options = model, x.shape, x.dtype, options
        self._kept = kept
        self.states: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, step: int, t: float, y: Tensor) -> None:
        x = _shown(self._model, y.reshape(self._shape), t, self._kept).to(self._dtype)
        if self._options.trajectory:
            self.states.append(x.clone())  # a solver may go on in place
            self.times.append(t)
        if self._options.callback is not None:
            self._options.callback(step, t, x.clone())  # and what a callback does in place must not reach the solver


def _of_no_samples(x: Tensor, plan: Plan, clock: Clock, backward: bool, options: Options) -> _Found:
    """As :func:`_solve` for an empty batch, which is given to no solver."""
    found = _Found(x)
    if options.trajectory:
        times = torch.as_tensor(clock.times(plan.steps or 1))
        found.times = times.flip(0) if backward else times
        found.states = x.new_empty(len(times), *x.shape)
    if options.return_denoised:
        found.denoised = x if found.states is None else found.states
    return found


def _joined(found: list[_Found]) -> _Found:
    """What the solves of all chunks found."""

    def whole(name: str, dim: int) -> Tensor | None:
        parts = [getattr(part, name) for part in found]
        return None if parts[0] is None else torch.cat(parts, dim)

    x, states, times = torch.cat([part.x for part in found]), whole("states", 1), found[0].times
    return _Found(x, states, times, whole("denoised", 0 if states is None else 1), sum(part.calls for part in found))
