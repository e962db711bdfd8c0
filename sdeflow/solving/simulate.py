r"""Paths of the forward SDE, and what score matching learns from them where no kernel is known.

**Simulation.** :func:`simulate` solves dx = f dt + g dw from x_0 at t = 0 by any method of torchsde's.

**Local score matching.** Where p(x_t | x_0) is unknown, that of a short step is not. For any s < t

    ∇ log p_t(x) = E[ ∇ log p(x_t | x_s) | x_t = x ],

so the score is learned from pairs (x_s, x_t), x_s simulated (arXiv:2407.07998). Over h = t - s the SDE is linearised
at x_s: with J = ∂f/∂x and Q = g gᵀ, the step is N(m, P),

    m = x_s + ∫_0^h e^{Ju} du (f + h/4 tr(Q ∇²f)),     P = ∫_0^h e^{Ju} Q e^{Jᵀu} du,

which is Ozaki's (1992) with the curvature of Shoji & Ozaki (1998), to the leading order in h. Time is frozen at the
middle of the step; Q too is taken there. J is never inverted, and P need not be: where noise drives some components
only, it reaches the others through J. The target -P⁻¹ (x_t - m) is the exact score of the step that drew x_t, so all
bias comes from the law of that one step, O(h²) as far as it is not Gaussian.

A longer step lowers the variance of the target, tr P⁻¹ ~ 1 / h, and raises its bias. With T / dt steps in [0, T],
h = gap · dt; a gap of 1 is a step of Euler-Maruyama, for which the targets are exact, in a chain that is not the SDE's.
Measured on dx = (x - x³) dt + dw, T = 2, 200 steps, data N(0.3, 0.2²), with exact p_s on a grid: the standard deviation
of the target, and the rms of E[target | x_t] - ∇ log p_t, relative to that of ∇ log p_t (which is 1.9):

    ====  ===========  =====  ========================================
    gap   target std   bias   bias of Ozaki's step, without curvature
    ====  ===========  =====  ========================================
    1     10.0         0.5 %  (Euler-Maruyama)
    2     7.2          0.1 %
    5     4.7          0.7 %  1.7 %
    10    3.4          3.6 %  6.2 %
    20    2.7          14 %   19 %
    ====  ===========  =====  ========================================

Not to be confused with matching p(x_t | x_0) itself, which :mod:`sdeflow.training.losses` does wherever it is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import sympy as sp
import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow.errors import DataError, NonFiniteStateError, ScheduleError, TooLargeError
from sdeflow.kernels.gaussian import broadcast_to_event
from sdeflow.numerics.basis import Basis
from sdeflow.numerics.brownian import BrownianPath, BrownianRows
from sdeflow.numerics.checks import (
    checked_count,
    checked_dtype,
    checked_flag,
    checked_numbers,
    checked_point,
    checked_states,
)
from sdeflow.numerics.compile import Compiled, compile_expressions
from sdeflow.numerics.linear import Linear
from sdeflow.numerics.noise import NoiseStream, resolve_seed
from sdeflow.scores import DeclaredSDE
from sdeflow.solvers import Clock, EulerMaruyama, Problem, Solver, Torchsde, names_for, resolve
from sdeflow.solving.boundary import Boundary
from sdeflow.solving.gradients import is_meant, require_graph
from sdeflow.solving.model import Model
from sdeflow.solving.plan import Plan, make_plan
from sdeflow.solving.run import require_follower
from sdeflow.symbolic.coupled import rank
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.derivative import derivative
from sdeflow.symbolic.equations import forward
from sdeflow.symbolic.symbols import t as time_symbol
from sdeflow.training.batches import mixed_seed
from sdeflow.training.losses import Pairs
from sdeflow.training.weightings import Weighting, of_times, require_weighting

__all__ = ["LocalLaw", "SimulatedPairs", "simulate", "start"]

_STEPS = 500
_MOST_STEPS = 1_000_000
_SMALL = 0.25  # |J h| below which the series converges to rounding in _TERMS terms
_TERMS = 12
_SINGULAR = 1e-6  # of a pivot, relative to the component's standard deviation


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
        steps: of a fixed-step method between 0 and the last time, 500 by default; each interval of ``ts`` gets its
            share, and at least one.
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
    model, basis = Model(sde, None, None), getattr(sde, "basis", None)
    times = _checked_times(ts, model.T)
    x = _checked_start(model, checked_states(x_0, "x_0"), checked_dtype(dtype))
    graph = is_meant(gradient, x)
    plan = _plan(solver, steps, rtol, atol, max_calls, x.dtype)
    if not len(x):
        return x.new_empty(len(times), *x.shape)
    working = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    ends = None if boundary is None else _boundary(boundary, model, working, plan)
    if graph and ends is not None:
        ends.require_gradient()
    if noise is not None:
        _require_path(noise, seed, plan.solver, model.declaration.coupled)
    path = _Path(model, tuple(x.shape[1:]), plan, resolve_seed(seed) if noise is None else noise, ends)
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
                y = path.advance(y, now, time, times[-1], None if bar.disable else bar.update)
            shown = _restored(y, working, basis)
            found.append(shown if ends is None else ends.nearest(shown, time))
            now = time
        states = torch.stack(found).to(x.dtype)
    if graph:
        require_graph(states, (x, *model.values.tensors.values()))
    return states


def _require_path(noise: object, seed: object, solver: Solver, coupled: bool) -> None:
    """That ``noise`` is a path, alone, and the solver follows paths."""
    if not isinstance(noise, BrownianPath):
        raise TypeError(f"noise must be a sdeflow.BrownianPath, not {noise!r}.")
    if seed is not None:
        raise ValueError("the noise is the path's: give seed= or noise=, not both.")
    require_follower(solver, coupled)


def _exactly(
    sde: DeclaredSDE, x_0: Tensor, ts: Sequence[float] | Tensor, seed: int | torch.Generator | None,
    dtype: torch.dtype | None, gradient: str | None,
) -> Tensor:  # fmt: skip
    """States at the times ``ts``, each drawn from its law given the one before."""
    model, kernel = Model(sde, None, None), sde.kernel
    times = _checked_times(ts, model.T)
    x, noise, now, found = (
        _checked_start(model, checked_states(x_0, "x_0"), checked_dtype(dtype)),
        NoiseStream(seed, "simulation"),
        0.0,
        [],
    )
    graph = is_meant(gradient, x)
    with torch.enable_grad() if graph else torch.no_grad():
        for time in times:
            if time > now and len(x):
                x = kernel.advance(x, now, time, noise)
            found.append(x)
            now = time
        states = torch.stack(found)
    if graph:
        require_graph(states)
    return states


def _boundary(kind: str, model: Model, x: Tensor, plan: Plan) -> Boundary:
    """The ends of a simulation from ``x``."""
    ends = Boundary(kind, model.declaration, model.values, x)
    if plan.solver not in (EulerMaruyama(), Torchsde("euler")):
        raise ValueError(f'boundary="{kind}" is a scheme of solver="euler", not of {plan.solver}.')
    coefficients = (*model.declaration.drifts, *model.declaration.diffusions)
    compiled = compile_expressions(coefficients, (time_symbol, *model.state), model.values, model.T)
    components = x.unbind(1) if model.declaration.coupled else (x,)
    values = compiled(torch.zeros((), dtype=x.dtype, device=x.device), *components)
    bad = torch.stack([(~torch.isfinite(v)).expand_as(components[0]).reshape(len(x), -1).any(1) for v in values]).any(0)
    if bool(bad.any()):
        raise DataError(f"x_0 = {x[bad][0].tolist()} lies outside the domain of this SDE, where f and g are real.")
    return ends


class _Path:
    """Stretches of one path, each a solve of its own in t, that share their noise."""

    def __init__(
        self, model: Model, event: tuple[int, ...], plan: Plan, seed: int | BrownianPath, ends: Boundary | None = None
    ) -> None:
        self.plan, self.seed, self.event, self.ends = plan, seed, event, ends
        self.noise = seed.rows() if isinstance(seed, BrownianPath) else NoiseStream(seed, "simulation")
        self._drift = model.function_of_state(model.declaration.drifts)
        self._diffusion = model.noise(forward(model.declaration), event)
        if ends is not None:
            self._drift = self._at_nearest(self._drift, event)
            self._diffusion["diffusion"] = self._at_nearest(self._diffusion["diffusion"], event)
        self._stretch = 0

    def _at_nearest(self, function: Callable[[Tensor, Tensor], Tensor], event: tuple[int, ...]) -> Callable:
        """``function`` of the nearest states of the domain, of states or flattened states."""

        def nearest(x: Tensor, time: Tensor) -> Tensor:
            inside = self.ends.nearest(x.reshape(-1, *event), float(time))
            return function(inside.reshape(x.shape), time)

        return nearest

    def advance(self, y: Tensor, first: float, last: float, end: float, on_call: Callable[[], object] | None) -> Tensor:
        """Flattened states at ``last`` from those at ``first``."""
        plan, noise = self.plan, self.noise
        if plan.solver.adaptive and isinstance(
            noise, NoiseStream
        ):  # torchsde's own Brownian motion starts from a seed: each stretch needs another
            noise = NoiseStream(mixed_seed(self.seed, self._stretch), "simulation")
        self._stretch += 1
        steps = None if plan.steps is None else max(1, math.ceil(plan.steps * (last - first) / end - 1e-9))
        if self.ends is None:
            return self._solved(y, first, last, steps, noise, on_call)
        times = [first + (last - first) * k / steps for k in range(steps + 1)]
        for before, after in pairwise(times):  # one solve for each step, and then the end of the domain
            y = self._solved(y, before, after, 1, noise, on_call)
            y = self.ends.after_step(y.reshape(-1, *self.event), after).flatten(1)
        return y

    def _solved(
        self, y: Tensor, first: float, last: float, steps: int | None, noise: NoiseStream | BrownianRows,
        on_call: Callable[[], object] | None,
    ) -> Tensor:  # fmt: skip
        plan = self.plan
        problem = Problem(
            self._field, Clock(first, last), backward=False, noise=noise, max_calls=plan.max_calls, on_call=on_call,
            **self._diffusion,
        )  # fmt: skip
        return plan.solver.solve(problem, y, steps, plan.rtol, plan.atol)

    def _field(self, y: Tensor, time: Tensor) -> Tensor:
        x = y.reshape(-1, *self.event)
        return self._drift(x, time).to(y.dtype).expand_as(x).flatten(1)


def _restored(y: Tensor, like: Tensor, basis: Basis | None) -> Tensor:
    x = y.reshape(like.shape)
    return x if basis is None else basis.inverse(x)


def _plan(
    solver: str | Solver | None, steps: int | None, rtol: float | None, atol: float | None, max_calls: int | None,
    dtype: torch.dtype,
) -> Plan:  # fmt: skip
    """As :func:`sdeflow.solving.plan.make_plan`, with steps by default; the kernel's own solvers run backwards
    alone."""
    names = names_for("sde", with_kernel=False)
    if (isinstance(solver, str) and solver not in names) or getattr(solver, "needs_kernel", False):
        raise ValueError(
            f'solver={solver!r} does not simulate the forward SDE; those that do: {", ".join(names)}, and "exact" '
            "where there is a kernel."
        )
    chosen = resolve("euler" if solver is None else solver, "sde")
    if steps is None and rtol is None and atol is None and not chosen.adaptive:
        steps = _STEPS
    return make_plan("sde", chosen, steps, rtol, atol, max_calls, dtype, with_kernel=False)


def _checked_times(ts: Sequence[float] | Tensor, T: float) -> list[float]:
    times = checked_numbers(ts, "ts").detach().cpu()
    allowed = times.ndim == 1 and len(times) and bool(((times >= 0) & (times <= T)).all())
    if not allowed or not bool((times.diff() > 0).all()):
        raise ValueError(
            f"ts must be increasing times in [0, T] = [0, {T:g}], not {ts!r}; for later times declare a larger T."
        )
    return times.tolist()


def _checked_start(model: Model, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` as whole states of the model's SDE in ``dtype``."""
    _require_components(model.declaration, tuple(x.shape[1:]))
    if model.kernel is not None:
        model.kernel.require_event(tuple(x.shape[1:]))
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
    P0 = torch.tensor(declaration.P0.tolist(), dtype=torch.float64).to(state.device)
    return state + Linear(_semidefinite_root(P0, True), True)(drawn)


class SimulatedPairs:
    """Pairs (x_s, x_t) of a chain of Euler-Maruyama, and the local target of the last step.

    Args:
        sde: an SDE without a kernel, or a score of it.
        weighting: "score", in units of the last step's standard deviation; "likelihood", in those of g; or w(t).
        gap: the last step's length in units of T / steps; near t = 0 it is cut to [0, t].
        steps: of the chain over [0, T]; each path spends as many on its own [0, s].

    Raises:
        ScheduleError: for gap = 1 where g gᵀ is singular, for then a step has no density.
        ValueError: for a gap or steps that make no sense.
        TooLargeError: for more than a million steps.
    """

    def __init__(self, sde: DeclaredSDE, weighting: Weighting, gap: int, steps: int) -> None:
        require_weighting(weighting, gaussian=False)
        self.model = Model(sde, None, None)
        for name, value in (("gap", gap), ("simulation_steps", steps)):
            checked_count(value, name)
        if gap > steps:
            raise ValueError(f"gap = {gap} exceeds simulation_steps = {steps}.")
        if steps > _MOST_STEPS:
            raise TooLargeError(
                f"simulation_steps = {steps:,} are simulated for each batch; at most {_MOST_STEPS:,} are allowed."
            )
        if gap == 1 and rank(self.model.declaration.gram) < len(self.model.state):
            raise ScheduleError(
                "g gᵀ is singular, so one step of Euler-Maruyama has no density: take gap >= 2, over which the noise "
                "spreads to every component."
            )
        self.weighting, self.gap, self.steps = weighting, gap, steps
        self.law = LocalLaw(self.model)

    @torch.no_grad()
    def __call__(self, data: Tensor, t: Tensor, noise: NoiseStream) -> Pairs:
        """Pairs at the times t (batch,) for data (batch, *event)."""
        h = torch.clamp_max(t, self.gap * self.model.T / self.steps)
        x_s = self.path(start(self.model.declaration, data, noise), t - h, noise)
        mean, root = (self.law.euler if self.gap == 1 else self.law)(x_s.double(), t - h, h)
        eps = noise.normal(tuple(x_s.shape), torch.float64, x_s.device)
        x_t = mean + root(eps)
        _require_finite(x_t, "the local step")
        target = -root.T.inverse(eps)
        return Pairs(x_t.to(x_s.dtype), t, target.to(x_s.dtype), self._metric(x_t, t, h))

    def path(self, x: Tensor, s: Tensor, noise: NoiseStream) -> Tensor:
        """x_s of each sample from its x_0, for its own time s (batch,), in steps of s / steps."""
        length = s / self.steps
        for i in range(self.steps):
            motions = noise.normal(
                (len(x), self.law.motions, *x.shape[2:]) if self.law.coupled else tuple(x.shape), x.dtype, x.device
            )
            x = x + self.law.increment(x, i * length, length, motions)
        _require_finite(x, "Euler-Maruyama")
        return x

    def _metric(self, x_t: Tensor, t: Tensor, h: Tensor) -> Linear:
        """The root of the weight. It must not know x_s, or the minimiser would be another function than the score."""
        if callable(self.weighting):
            return self.law.scaling(of_times(self.weighting, t).sqrt(), x_t)
        gram = self.law.gram(x_t, t) if self.weighting == "likelihood" else self.law.moments(x_t, t, h)[1]
        return Linear(_semidefinite_root(gram, self.law.coupled), self.law.coupled)


class LocalLaw:
    """N(m, P), the law of a short step from x at t to t + h; see the module.

    Vectors are shaped as states; matrices are (batch, ...) numbers elementwise, (batch, ..., k, k) of a coupled state.

    Args:
        model: the SDE.
    """

    def __init__(self, model: Model) -> None:
        declaration = model.declaration
        state, f, gram, g = declaration.state, declaration.drifts, declaration.gram, declaration.diffusions
        self.coupled, self.k, self.motions = declaration.coupled, len(state), len(g) // len(state)
        self._additive = not declaration.state_dependent_noise
        self._entries = [divmod(i, self.motions) for i, entry in enumerate(g) if entry != 0]
        pairs = [(i, j) for i in range(self.k) for j in range(self.k)]
        first = [[derivative(row, component) for component in state] for row in f]
        slopes = [_regular(slope) for row in first for slope in row]
        curvatures = [_regular(sum(gram[i, j] * derivative(row[i], state[j]) for i, j in pairs)) for row in first]
        euler, local, spread = (*f, *(e for e in g if e != 0)), (*f, *slopes, *curvatures), tuple(gram)
        self._euler, self._local, self._gram = (
            compile_expressions(e, (time_symbol, *state), model.values, model.T) for e in (euler, local, spread)
        )

    def increment(self, x: Tensor, t: Tensor, h: Tensor, motions: Tensor) -> Tensor:
        """f h + g sqrt(h) motions, the step of Euler-Maruyama for standard normal motions (batch, m, ...)."""
        values = self._values(self._euler, x, t)
        h = self._side(h, x).to(x.dtype)
        if not self.coupled:
            return values[0] * h + values[1] * (h.sqrt() * motions)
        rows, dw = [f * h for f in values[: self.k]], (h[:, None].sqrt() * motions).unbind(1)
        for (i, j), g in zip(self._entries, values[self.k :], strict=True):
            rows[i] = rows[i] + g * dw[j]
        return torch.stack(rows, dim=1)

    def gram(self, x: Tensor, t: Tensor) -> Tensor:
        """g gᵀ."""
        return self._matrix(self._values(self._gram, x, t))

    def euler(self, x: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Linear]:
        """x + f h, and a root of g gᵀ h."""
        f = self._values(self._euler, x, t)[: self.k]
        mean = x + self._vector(self._column(f) * self._wide(h, x))
        return mean, self._root(self.gram(x, t) * self._wide(h, x))

    def __call__(self, x: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Linear]:
        """m, and a root of P, for x in float64 and t, h (batch,).

        Raises:
            ScheduleError: where P is singular.
        """
        mean, P = self.moments(x, t, h)
        return mean, self._root(P)

    def moments(self, x: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """m and P."""
        middle, length = t + 0.5 * h, self._wide(h, x)
        values, k = self._values(self._local, x, middle), self.k
        f, J, c = self._column(values[:k]), self._matrix(values[k : k + k * k]), self._column(values[k + k * k :])
        f = f + 0.25 * length * c
        Q = self.gram(x if self._additive else x + self._vector(0.5 * length * f), middle)
        shift, P = (_integrals if self.coupled else _scalar_integrals)(J * length, f * length, Q * length)
        return x + self._vector(shift), P

    def scaling(self, factor: Tensor, x: Tensor) -> Linear:
        """The map that multiplies states like ``x`` by a number for each sample."""
        wide = self._wide(factor, x)
        return Linear(
            wide * torch.eye(self.k, dtype=wide.dtype, device=x.device) if self.coupled else wide, self.coupled
        )

    def _values(self, compiled: Compiled, x: Tensor, t: Tensor) -> list[Tensor]:
        """The compiled expressions at x (batch, ...) and t (batch,), each shaped as a component."""
        components = x.unbind(1) if self.coupled else (x,)
        values = compiled(self._side(t, x).to(x.dtype), *components)
        return [value.expand_as(components[0]) for value in values]

    def _side(self, t: Tensor, x: Tensor) -> Tensor:
        return broadcast_to_event(t, x[:, 0] if self.coupled else x)

    def _wide(self, h: Tensor, x: Tensor) -> Tensor:
        """h, shaped to multiply columns and matrices."""
        side = self._side(h, x)
        return side[..., None, None] if self.coupled else side

    def _column(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values, dim=-1)[..., None] if self.coupled else values[0]

    def _matrix(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values, dim=-1).unflatten(-1, (self.k, self.k)) if self.coupled else values[0]

    def _vector(self, column: Tensor) -> Tensor:
        """A column as a state."""
        return column[..., 0].movedim(-1, 1) if self.coupled else column

    def _root(self, P: Tensor) -> Linear:
        """The Cholesky factor of P."""
        if self.coupled:
            root, failed = torch.linalg.cholesky_ex(P)
            pivots = root.diagonal(dim1=-2, dim2=-1) / P.diagonal(dim1=-2, dim2=-1).sqrt()
            dense = (failed == 0).all() & (pivots > _SINGULAR).all()
        else:
            root = P.clamp_min(0).sqrt()
            dense = (root > 0).all()
        if not bool(dense):
            raise ScheduleError(
                "a short step of this SDE has no density: its noise vanishes at some state that paths visit, or never "
                "reaches some component."
            )
        return Linear(root, self.coupled)


def _scalar_integrals(z: Tensor, f: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """∫ e^{zu} du f and ∫ e^{2zu} du Q over [0, 1]."""
    return f * _phi(z), Q * _phi(2.0 * z)


def _phi(z: Tensor) -> Tensor:
    """(e^z - 1) / z."""
    small = z.abs() < 1e-8
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1.0 + 0.5 * z, torch.expm1(safe) / safe)


def _integrals(A: Tensor, f: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """∫ e^{Au} du f and ∫ e^{Au} Q e^{Aᵀu} du over [0, 1], of k x k matrices, without inverting A.

    By Taylor series over a part 2^-n of the step, which is then doubled n times: E <- E², P <- P + E P Eᵀ.
    """
    size = float(A.abs().sum(-1).max())
    n = max(0, math.ceil(math.log2(size / _SMALL))) if size > 0 else 0
    scale = 0.5**n
    A, f, Q = A * scale, f * scale, Q * scale
    E = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    shift, P, of_E = f, Q, E
    for i in range(1, _TERMS):
        of_E, f = A @ of_E / i, A @ f / (i + 1)
        Q = A @ Q
        Q = (Q + Q.mT) / (i + 1)
        E, shift, P = E + of_E, shift + f, P + Q
    for _ in range(n):
        shift, P, E = shift + E @ shift, P + E @ P @ E.mT, E @ E
    return shift, P


def _semidefinite_root(gram: Tensor, coupled: bool) -> Tensor:
    """A root of g gᵀ, which may be singular; 0 where it does not exist."""
    gram = torch.nan_to_num(gram, 0.0, 0.0, 0.0)
    if not coupled:
        return gram.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt()[..., None, :]


def _regular(expression: sp.Expr) -> sp.Expr:
    """A derivative without its impulses, at kinks and jumps of f, that no sample meets."""
    return expression.replace(sp.DiracDelta, lambda *_: sp.Integer(0)).replace(
        lambda e: isinstance(e, sp.Derivative) and e.expr.has(sp.sign, sp.Heaviside), lambda _: sp.Integer(0)
    )


def _require_finite(x: Tensor, who: str) -> None:
    bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteStateError(
            f"{who} left the finite states in {len(bad)} of {len(x)} paths: raise simulation_steps, or declare f and g "
            "so that they hold wherever a step may lead (sqrt(Max(x, 0)), say).",
            bad_rows=bad,
        )
