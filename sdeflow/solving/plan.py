"""What a solver, steps and tolerances mean together: one :class:`Plan` for one solve."""

from __future__ import annotations

import torch

from sdeflow.errors import TooLargeError
from sdeflow.numerics.checks import checked_count
from sdeflow.solvers import EulerMaruyama, Exponential, Grid, Solver, Torchdiffeq, Torchsde, resolve
from sdeflow.solvers.clock import steps_of
from sdeflow.solvers.registry import require

__all__ = ["MAX_CALLS", "Plan", "default_solver", "make_plan", "require_calls"]

_SDE_STEPS = 100
_EULER_STEPS = 500

MAX_CALLS = 1_000_000
"""Calls of the score that fixed steps may take where ``max_calls`` says nothing."""
_COMPARED_WITH = 20  # steps, at least, of a solve that tells the error of another


class Plan:
    """A solver with what it needs for one solve.

    Attributes:
        solver, steps, rtol, atol: as they will be used.
        max_calls: the budget.
        grid: the time variable where the user names none; None leaves it to the solver.
        expected_calls: of a fixed-step solve, for the progress bar; None for an adaptive one.
    """

    def __init__(
        self, solver: Solver, steps: int | None, rtol: float, atol: float, max_calls: int, grid: str | None = None
    ) -> None:
        self.solver, self.steps, self.rtol, self.atol, self.max_calls = solver, steps, rtol, atol, max_calls
        self.grid = grid
        self.expected_calls = None if steps is None else solver.calls(steps)

    def looser(self) -> Plan:
        """The same with half the steps, or ten times the tolerance: for an error estimate."""
        steps = None if self.steps is None else max(1, self.steps // 2)
        return Plan(self.solver, steps, 10 * self.rtol, 10 * self.atol, self.max_calls)

    def finer(self) -> Plan:
        """What is far more accurate: a tenth of the tolerance; or rk4 in twice the steps, in more for less than ten.

        In as many steps rk4 may be off by as much as heun3, and in the same direction.
        """
        if self.steps is None:
            return Plan(self.solver, None, 0.1 * self.rtol, 0.1 * self.atol, 4 * self.max_calls)
        reference, steps = Torchdiffeq("rk4"), self.steps * max(2, -(-_COMPARED_WITH // self.steps))
        return Plan(reference, steps, self.rtol, self.atol, 8 * steps + 10)


def default_solver(
    kind: str, steps: int | None, with_kernel: bool, pilot: bool = False, coupled: bool = False
) -> tuple[Solver, str | None]:
    """What solves an equation where no solver is named, and its time variable: the fewest calls for an accuracy.

    Measured by benchmarks/solvers.py on exact scores, and below 16 calls on a trained network (examples/few_calls.py).

    Args:
        kind: "sde", "ode", or "likelihood": the flow with its divergence.
        steps: calls of the score, or None for an adaptive solve.
        with_kernel: whether the SDE has a Gaussian kernel, whose log-SNR is a good measure of steps.
        pilot: whether the grid is the pilot's, which serves lower orders better when calls are few.
        coupled: whether the state is coupled: its steps turn, and high orders are stable in many of them alone.
    """
    if kind == "likelihood" or (kind == "ode" and not with_kernel):
        return Torchdiffeq("dopri5" if steps is None else "euler" if steps == 1 else "heun2"), None
    if kind == "sde" and not with_kernel:
        return EulerMaruyama(), None
    if kind == "ode" and steps is None:
        return Torchdiffeq("dopri5"), None
    if steps is None:
        raise ValueError("a reverse SDE with a Gaussian kernel is solved in a number of steps by default.")
    if kind == "ode" and coupled:
        return Exponential(1 if steps < 16 else 2 if steps < 100 else 3), None
    if kind == "ode" and pilot:
        return Exponential(2 if steps < 10 else 3 if steps < 17 else 4, corrector=steps > 5), None
    if kind == "ode":
        return (
            (Exponential(1 if steps < 10 else 2), "angle")
            if steps < 16
            else (Exponential(3 if steps < 25 else 4), None)
        )
    return Exponential(1 if coupled else 2, corrector=steps > 16, eta=1.0), None


def make_plan(
    kind: str,
    solver: str | Solver | None,
    steps: int | None,
    rtol: float | None,
    atol: float | None,
    max_calls: int | None,
    dtype: torch.dtype,
    grid: Grid = None,
    demands: tuple[str, ...] = (),
) -> Plan:
    """What ``solver``, ``steps`` and the tolerances mean for an equation of ``kind``.

    Without a solver, ``steps`` counts calls of the score. See :func:`default_solver`; without steps a flow is solved by
    dopri5 to rtol = atol = 1e-5, and an SDE in 100 steps, or in 500 of Euler's where it has no Gaussian kernel.

    Args:
        kind: "sde", "ode" or "likelihood".
        solver: a name, an object, or None.
        steps, rtol, atol, max_calls: as given.
        dtype: of the state.
        grid: where it is a tensor of times, a fixed-step solver takes the steps between them.
        demands: what else is asked of the solver, keys of ``solvers.base.DEMANDS``.

    Raises:
        ValueError: for a solver that does not fit, and for steps and tolerances that make no sense.
        TooLargeError: for more than :data:`MAX_CALLS` calls without ``max_calls``.
    """
    steps = None if steps is None else checked_count(steps, "steps")
    max_calls = None if max_calls is None else checked_count(max_calls, "max_calls")
    equation = "sde" if kind == "sde" else "ode"
    demands = ("divergence", *demands) if kind == "likelihood" else demands
    with_kernel = "no kernel" not in demands
    tolerances = rtol is not None or atol is not None
    chosen: Solver
    clock: str | None = None
    fixed = not tolerances and (solver is None or not resolve(solver, equation).adaptive)
    named = steps_of(grid)  # times are steps between them, whatever each costs
    steps = named if steps is None and fixed else steps
    if solver is None:
        if kind == "sde" and tolerances:
            chosen = Torchsde("euler")
        else:
            if kind == "sde" and steps is None:
                steps = _SDE_STEPS if with_kernel else _EULER_STEPS
            pilot = isinstance(grid, str) and grid == "pilot"
            chosen, clock = default_solver(kind, steps, with_kernel, pilot, "coupled" in demands)
            if steps not in (None, named) and not chosen.adaptive:
                steps = max(1, steps // chosen.calls_per_step)
    elif kind == "sde" and tolerances and steps is None and isinstance(solver, str) and solver in Torchsde.methods:
        chosen = Torchsde(solver, adaptive=True)  # ours of that name take fixed steps
    else:
        chosen = resolve(solver, equation)
    if steps is None and tolerances:
        chosen = chosen.with_own_steps()
    require(chosen, equation, demands)
    if chosen.adaptive and steps is not None:
        raise ValueError(f"{chosen} chooses its own steps: give rtol= and atol= instead of steps={steps}.")
    if not chosen.adaptive and steps is None:
        hint = ", or rtol= and atol= for adaptive ones" if kind == "sde" else ""
        raise ValueError(f"{chosen} takes fixed steps: give steps={hint}.")
    if not chosen.adaptive and not chosen.iterates and tolerances:
        raise ValueError(f"{chosen} takes fixed steps, to which rtol and atol mean nothing.")
    usual = chosen.default_tolerances
    rtol = _tolerance(usual[0] if rtol is None else rtol, "rtol", dtype)
    atol = _tolerance(usual[1] if atol is None else atol, "atol", dtype)
    plan = Plan(chosen, steps, rtol, atol, max_calls or 10_000, clock)
    if plan.expected_calls is not None:
        if max_calls is not None and plan.expected_calls > max_calls:
            raise ValueError(f"{steps} steps of {chosen} take {plan.expected_calls} calls, over max_calls={max_calls}.")
        require_calls(plan.expected_calls, f"{steps} steps of {chosen}", max_calls)
        # Adams methods begin anew at break points, with four calls a step.
        plan.max_calls = 4 * plan.expected_calls + 10
    return plan


def require_calls(calls: int, what: str, max_calls: int | None) -> None:
    """Raises a TooLargeError for more calls than :data:`MAX_CALLS`, where ``max_calls`` does not allow them."""
    if calls > (max_calls or MAX_CALLS):
        raise TooLargeError(
            f"{what} take {calls:,} calls, over the {MAX_CALLS:,} of a solve: give max_calls= for more."
        )


def _tolerance(value: float, name: str, dtype: torch.dtype) -> float:
    smallest = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    if isinstance(value, bool) or not isinstance(value, int | float) or not smallest <= value < float("inf"):
        raise ValueError(f"{name} must be at least {smallest:.2g}, the rounding of the state's dtype; it is {value!r}.")
    return float(value)
