"""Paths of the forward SDE: :func:`simulate` solves dx = f dt + g dw from x_0 at t = 0 by any method of torchsde's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow.errors import DataError
from sdeflow.kernels.local import semidefinite_root
from sdeflow.numerics.basis import Basis
from sdeflow.numerics.breakpoints import Features
from sdeflow.numerics.brownian import BrownianPath, BrownianRows
from sdeflow.numerics.checks import (
    checked_dtype,
    checked_flag,
    checked_numbers,
    checked_point,
    checked_states,
)
from sdeflow.numerics.compile import compile_expressions
from sdeflow.numerics.linear import Blocks
from sdeflow.numerics.noise import NoiseStream, mixed_seed, resolve_seed
from sdeflow.scores import DeclaredSDE
from sdeflow.solvers import Clock, EulerMaruyama, Field, Problem, Solver, Torchsde, Watch
from sdeflow.solvers.registry import demands_of, resolved
from sdeflow.solving.boundary import Boundary
from sdeflow.solving.fields import Fields
from sdeflow.solving.gradients import is_meant, require_graph
from sdeflow.solving.plan import Plan, make_plan
from sdeflow.solving.run import demand_of_path
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.equations import forward
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["simulate", "start"]

_STEPS = 500
_BESIDE = 1e-13  # of the horizon: how far from a break point f and g are asked for


def simulate(
    sde: DeclaredSDE,
    x_0: Tensor,
    ts: Sequence[float] | Tensor,
    solver: str | Solver | None = None,
    steps: int | None = None,
    *,
    seed: int | torch.Generator | None = None,
    noise: BrownianPath | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    dtype: torch.dtype | None = None,
    boundary: str | None = None,
    gradient: str | None = None,
    max_calls: int | None = None,
    progress: bool | None = None,
) -> Tensor:
    """States of the forward SDE at the times ``ts``, (len(ts), batch, *event), from x_0 at t = 0.

    Args:
        sde: the declaration.
        x_0: (batch, *event); of a coupled state (batch, k, *event).
        ts: increasing times in [0, T].
        solver: a name of torchsde's or a solver object; "euler" by default. "exact" draws each state from the
            transition law, for every SDE with an exact kernel (affine, reducible, Pearson): it takes no steps.
        steps: of a fixed-step method between 0 and the last time, 500 by default; each interval between ``ts`` and
            break points of f and g in t (up to ``steps`` of these, or 32) gets its share, and at least one.
        seed: makes the result reproducible; path i does not depend on the batch size.
        noise: a :class:`~sdeflow.BrownianPath` to follow in place of ``seed``, for one path in different steps.
        rtol, atol: of an adaptive solver.
        dtype: of the states; that of x_0 by default.
        boundary: what a step does at the end of the domain where f and g are real: "truncate", "reflect" or "absorb"
            (:mod:`sdeflow.solving.boundary`). With solver="euler".
        gradient: "backprop" for states that can be differentiated in x_0 and in the parameters of the SDE, exactly
            through the steps taken, for the noise drawn. By default where x_0 requires grad; parameters have to be
            meant. Not with boundary="absorb".
        max_calls: the budget of an adaptive solve, 10,000 by default.
        progress: a progress bar; None shows it on a terminal only.

    Warns:
        CoarseStepsWarning: where fixed steps jump over something smooth that f or g does in t.

    Raises:
        DataError: for an x_0 that is not a finite floating tensor, or not a state of this SDE.
        ValueError: for times, steps or a solver that make no sense, and for a gradient that a boundary= does not have.
        NonFiniteStateError: where a path explodes or leaves the domain of f and g.
        NotAffineError: for solver="exact" where the SDE has no exact kernel.
        DeclarationError: for a boundary= that the SDE does not have.
    """
    if isinstance(solver, str) and solver == "exact":
        given = (
            ("noise", noise),
            ("steps", steps),
            ("rtol", rtol),
            ("atol", atol),
            ("max_calls", max_calls),
            ("boundary", boundary),
        )
        if any(value is not None for _, value in given):
            names = ", ".join(name for name, value in given if value is not None)
            raise ValueError(f'solver="exact" draws each state at once, within the domain: it takes no {names}.')
        return _exactly(sde, x_0, ts, seed, dtype, gradient)
    fields, basis = Fields(sde), getattr(sde, "basis", None)
    times = _checked_times(ts, fields.T)
    x = _checked_start(fields, checked_states(x_0, "x_0"), checked_dtype(dtype))
    graph = is_meant(gradient, x)
    if noise is not None:
        _require_path(noise, seed)
    plan = _plan(fields.declaration, solver, steps, rtol, atol, max_calls, x.dtype, noise is not None, graph)
    if not len(x):
        return x.new_empty(len(times), *x.shape)
    working = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    ends = None if boundary is None else _boundary(boundary, fields, working, plan)
    if graph and ends is not None:
        ends.require_gradient()
    path = _Path(fields, tuple(x.shape[1:]), plan, resolve_seed(seed) if noise is None else noise, times, ends)
    shown = checked_flag(progress, "progress", optional=True)
    hidden = None if shown is None else not shown
    found, now = [], 0.0
    with (
        torch.enable_grad() if graph else torch.no_grad(),
        tqdm(total=plan.expected_calls, desc="simulating", disable=hidden, leave=False) as bar,
    ):
        y = (working if basis is None else basis.forward(working)).flatten(1)
        for time in times:
            if time > now:
                y = path.advance(y, now, time, None if bar.disable else bar.update)
            state = _restored(y, working, basis)
            found.append(state if ends is None else ends.nearest(state, time))
            now = time
        states = torch.stack(found).to(x.dtype)
    if graph:
        require_graph(states, (x, *fields.values.tensors.values()))
    return states


def _require_path(noise: object, seed: object) -> None:
    """An error unless ``noise`` is a path and is given alone."""
    if not isinstance(noise, BrownianPath):
        raise TypeError(f"noise must be a sdeflow.BrownianPath, not {noise!r}.")
    if seed is not None:
        raise ValueError("the noise is the path's: give seed= or noise=, not both.")


def _exactly(
    sde: DeclaredSDE, x_0: Tensor, ts: Sequence[float] | Tensor, seed: int | torch.Generator | None,
    dtype: torch.dtype | None, gradient: str | None,
) -> Tensor:  # fmt: skip
    """States at the times ``ts``, each drawn from its law given the one before."""
    fields, advance = Fields(sde), sde.kernel.advance
    times = _checked_times(ts, fields.T)
    x, noise, now, found = (
        _checked_start(fields, checked_states(x_0, "x_0"), checked_dtype(dtype)),
        NoiseStream(seed, "simulation"),
        0.0,
        [],
    )
    graph = is_meant(gradient, x)
    with torch.enable_grad() if graph else torch.no_grad():
        for time in times:
            if time > now and len(x):
                x = advance(x, now, time, noise)
            found.append(x)
            now = time
        states = torch.stack(found)
    if graph:
        require_graph(states)
    return states


def _boundary(kind: str, fields: Fields, x: Tensor, plan: Plan) -> Boundary:
    """The ends of a simulation from ``x``."""
    ends = Boundary(kind, fields.declaration, fields.values, x)
    if plan.solver not in (EulerMaruyama(), Torchsde("euler")):
        raise ValueError(f'boundary="{kind}" is a scheme of solver="euler", not of {plan.solver}.')
    coefficients = (*fields.declaration.drifts, *fields.declaration.diffusions)
    compiled = compile_expressions(coefficients, (time_symbol, *fields.state), fields.values, fields.T)
    components = x.unbind(1) if fields.declaration.coupled else (x,)
    values = compiled(torch.zeros((), dtype=x.dtype, device=x.device), *components)
    bad = torch.stack([(~torch.isfinite(v)).expand_as(components[0]).reshape(len(x), -1).any(1) for v in values]).any(0)
    if bool(bad.any()):
        raise DataError(f"x_0 = {x[bad][0].tolist()} lies outside the domain of this SDE, where f and g are real.")
    return ends


class _Path:
    """Stretches of one path, each a solve of its own in t, that share their noise."""

    def __init__(
        self, fields: Fields, event: tuple[int, ...], plan: Plan, seed: int | BrownianPath, times: list[float],
        ends: Boundary | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.seed, self.event, self.ends = plan, seed, event, ends
        self.noise = seed.rows() if isinstance(seed, BrownianPath) else NoiseStream(seed, "simulation")
        self._drift = fields.function_of_state(fields.declaration.drifts)
        self._diffusion, self._hint = (
            fields.diffusion(forward(fields.declaration), event),
            fields.declaration.simulation_hint,
        )
        if ends is not None:
            self._drift = self._at_nearest(ends, self._drift)
            self._diffusion = replace(self._diffusion, g=self._at_nearest(ends, self._diffusion.g))
        self._stretch, self._end = 0, times[-1]
        features = Features(fields)
        self._breaks, self._beside = features.edges(plan.steps), _BESIDE * fields.T
        if plan.steps is not None and self._end > 0.0:
            stops = np.unique([0.0, *times, *self._breaks[self._breaks < self._end].tolist()]).tolist()
            visited = [self._steps(plan.steps, a, b) for a, b in pairwise(stops)]
            features.warn_of_missed(np.array([0.0, *(t for part in visited for t in part[1:])]))
        self._drift = self._sided(self._drift)
        g, correction = self._diffusion.g, self._diffusion.correction
        self._diffusion = replace(
            self._diffusion, g=self._sided(g), correction=None if correction is None else self._sided(correction)
        )

    def _steps(self, steps: int, first: float, last: float) -> list[float]:
        """The ends of the steps from one break point, or time that is shown, to the next; ``steps`` of the whole."""
        count = max(1, math.ceil(steps * (last - first) / self._end - 1e-9))
        return [first + (last - first) * k / count for k in range(count)] + [last]

    def _at_nearest(
        self, ends: Boundary, function: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """``function`` of the nearest states of the domain, of states or flattened states."""

        def nearest(x: Tensor, time: Tensor) -> Tensor:
            inside = ends.nearest(x.reshape(-1, *self.event), float(time))
            return function(inside.reshape(x.shape), time)

        return nearest

    def advance(self, y: Tensor, first: float, last: float, on_call: Callable[[], object] | None) -> Tensor:
        """Flattened states at ``last`` from those at ``first``: a solve for each piece between break points of f, g."""
        inner = self._breaks[(self._breaks > first) & (self._breaks < last)].tolist()
        for begin, end in pairwise([first, *inner, last]):
            y = self._over_piece(y, begin, end, on_call)
        return y

    def _over_piece(self, y: Tensor, first: float, last: float, on_call: Callable[[], object] | None) -> Tensor:
        steps, noise = self.plan.steps, self.noise
        if self.plan.solver.adaptive and not isinstance(self.seed, BrownianPath):
            # torchsde's own Brownian motion starts from a seed: each stretch needs another
            noise = NoiseStream(mixed_seed(self.seed, self._stretch), "simulation")
        self._stretch += 1
        self._set_sides(first, last)
        if self.ends is None or steps is None:
            count = None if steps is None else len(self._steps(steps, first, last)) - 1
            return self._solved(y, first, last, count, noise, on_call)
        for before, after in pairwise(self._steps(steps, first, last)):
            # A solve for each step, and then the end of the domain.
            y = self._solved(y, before, after, 1, noise, on_call)
            y = self.ends.after_step(y.reshape(-1, *self.event), after).flatten(1)
        return y

    def _set_sides(self, first: float, last: float) -> None:
        """From now on f and g are asked inside [first, last], not at ends where they may jump."""
        inside = min(self._beside, 0.25 * (last - first))
        self._inside = tuple(
            end + side * inside * bool((self._breaks == end).any()) for end, side in ((first, 1.0), (last, -1.0))
        )

    def _sided(self, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """``function`` of a state and t, taken on the side of the present piece."""
        if not len(self._breaks):
            return function
        return lambda x, time: function(x, time.clamp(*self._inside))

    def _solved(
        self, y: Tensor, first: float, last: float, steps: int | None, noise: NoiseStream | BrownianRows,
        on_call: Callable[[], object] | None,
    ) -> Tensor:  # fmt: skip
        plan = self.plan
        watch = Watch(plan.max_calls, on_call, hint=self._hint)
        field = Field(self._field, self._diffusion)
        problem = Problem(field, Clock(first, last), backward=False, watch=watch, noise=noise)
        return plan.solver.solve(problem, y, steps, plan.rtol, plan.atol)

    def _field(self, y: Tensor, time: Tensor) -> Tensor:
        x = y.reshape(-1, *self.event)
        return self._drift(x, time).to(y.dtype).expand_as(x).flatten(1)


def _restored(y: Tensor, like: Tensor, basis: Basis | None) -> Tensor:
    x = y.reshape(like.shape)
    return x if basis is None else basis.inverse(x)


def _plan(
    declaration: Declaration, solver: str | Solver | None, steps: int | None, rtol: float | None, atol: float | None,
    max_calls: int | None, dtype: torch.dtype, follows: bool, graph: bool,
) -> Plan:  # fmt: skip
    """As :func:`sdeflow.solving.plan.make_plan`, with steps by default; the kernel's own solvers run backwards
    alone."""
    chosen = resolved("euler" if solver is None else solver, "sde", "forward")
    demands = ("forward", *demands_of(declaration, with_kernel=False))
    demands += (demand_of_path(declaration.coupled),) * follows + ("gradient",) * graph
    if steps is None and rtol is None and atol is None and not chosen.adaptive:
        steps = _STEPS
    return make_plan("sde", chosen, steps, rtol, atol, max_calls, dtype, demands=demands)


def _checked_times(ts: Sequence[float] | Tensor, T: float) -> list[float]:
    times = checked_numbers(ts, "ts").detach().cpu()
    allowed = times.ndim == 1 and len(times) and bool(((times >= 0) & (times <= T)).all())
    if not allowed or not bool((times.diff() > 0).all()):
        raise ValueError(
            f"ts must be increasing times in [0, T] = [0, {T:g}], not {ts!r}; for later times declare a larger T."
        )
    return times.tolist()


def _checked_start(fields: Fields, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` as whole states of the SDE in ``dtype``."""
    _require_components(fields.declaration, tuple(x.shape[1:]))
    fields.kernel.require_event(tuple(x.shape[1:]))
    return x.to(dtype or x.dtype)


def _require_components(declaration: Declaration, event: tuple[int, ...]) -> None:
    names = declaration.state
    if declaration.coupled and event[0] != len(names):
        raise DataError(
            f"a state of ({', '.join(map(str, names))}) is (batch, {len(names)}, *event), not (batch, {event})."
        )


# -------------------------------------------------------------------- pairs for training


def start(declaration: Declaration, data: Tensor, noise: NoiseStream | None = None) -> Tensor:
    """States at t = 0 of an SDE without a kernel: data plus N(0, P0), auxiliary components added; no noise for None.

    Raises:
        DataError: for data that is no state, where it cannot be made one.
    """
    state, k = checked_point(data, "data", 2), len(declaration.state)
    auxiliary = declaration.auxiliary
    if auxiliary:
        own = [i for i in range(k) if i not in auxiliary]
        if len(own) != 1:
            raise DataError("give P0 = 0, or one data component: which of several the data is, cannot be told.")
        state = data.new_zeros(len(data), k, *data.shape[1:])
        state[:, own[0]] = data
    _require_components(declaration, tuple(state.shape[1:]))
    if noise is None or not any(declaration.initial_variances):
        return state
    drawn = noise.normal(tuple(state.shape), state.dtype, state.device)
    if not declaration.coupled:
        return state + math.sqrt(declaration.P0) * drawn
    P0 = torch.tensor(declaration.initial_covariance, dtype=torch.float64).to(state.device)
    return state + semidefinite_root(Blocks(P0))(drawn)
