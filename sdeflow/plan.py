"""What a solver, steps and tolerances mean together: one :class:`Plan` for one solve."""

from __future__ import annotations

import torch

from sdeflow.solvers import Solver, Torchdiffeq, Torchsde, resolve

__all__ = ["Plan", "make_plan"]

_DEFAULT_SDE_STEPS = 500


class Plan:
    """A solver with what it needs for one solve.

    Attributes:
        solver, steps, rtol, atol: as they will be used.
        max_calls: the budget.
        expected_calls: of a fixed-step solve, for the progress bar; None for an adaptive one.
    """

    def __init__(self, solver: Solver, steps: int | None, rtol: float, atol: float, max_calls: int) -> None:
        self.solver, self.steps, self.rtol, self.atol, self.max_calls = solver, steps, rtol, atol, max_calls
        self.expected_calls = None if steps is None else steps * solver.calls_per_step

    def looser(self) -> Plan:
        """The same with half the steps, or ten times the tolerance: for an error estimate."""
        steps = None if self.steps is None else max(1, self.steps // 2)
        return Plan(self.solver, steps, 10 * self.rtol, 10 * self.atol, self.max_calls)


def make_plan(
    kind: str,
    solver: str | Solver | None,
    steps: int | None,
    rtol: float | None,
    atol: float | None,
    max_calls: int | None,
    dtype: torch.dtype,
) -> Plan:
    """What ``solver``, ``steps`` and the tolerances mean for an equation of ``kind``, "sde" or "ode".

    Without a solver: an ODE is solved by dopri5 to rtol = atol = 1e-5, or with ``steps`` calls by Heun's
    method (two calls a step); an SDE by Euler-Maruyama in ``steps`` steps, 500 by default.

    Raises:
        ValueError: for a solver that does not fit, and for steps and tolerances that make no sense.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be a positive integer, not {steps!r}.")
    if max_calls is not None and (isinstance(max_calls, bool) or not isinstance(max_calls, int) or max_calls < 1):
        raise ValueError(f"max_calls must be a positive integer, not {max_calls!r}.")
    if solver is None and kind == "sde" and rtol is None and atol is None:
        chosen, steps = Torchsde("euler"), steps or _DEFAULT_SDE_STEPS
    elif solver is None and kind == "ode" and steps is not None:
        chosen = Torchdiffeq("euler" if steps == 1 else "heun2")
        steps = max(1, steps // 2)
    else:
        chosen = resolve(solver or ("euler" if kind == "sde" else "dopri5"), kind)
    if isinstance(chosen, Torchsde) and steps is None and (rtol is not None or atol is not None):
        chosen = Torchsde(chosen.method, adaptive=True)
    if chosen.adaptive and steps is not None:
        raise ValueError(f"{chosen} chooses its own steps: give rtol= and atol= instead of steps={steps}.")
    if not chosen.adaptive and steps is None:
        hint = ", or rtol= and atol= for adaptive ones" if kind == "sde" else ""
        raise ValueError(f"{chosen} takes fixed steps: give steps={hint}.")
    if not chosen.adaptive and "adams" not in chosen.method and (rtol is not None or atol is not None):
        raise ValueError(f"{chosen} takes fixed steps, to which rtol and atol mean nothing.")
    rtol, atol = (_tolerance(v, n, dtype) for v, n in ((rtol, "rtol"), (atol, "atol")))
    plan = Plan(chosen, steps, rtol, atol, max_calls or 10_000)
    if plan.expected_calls is not None:
        if max_calls is not None and plan.expected_calls > max_calls:
            raise ValueError(f"{steps} steps of {chosen} take {plan.expected_calls} calls, over max_calls={max_calls}.")
        plan.max_calls = 2 * plan.expected_calls + 10
    return plan


def _tolerance(value: float | None, name: str, dtype: torch.dtype) -> float:
    value = 1e-5 if value is None else value
    smallest = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    if isinstance(value, bool) or not isinstance(value, int | float) or not smallest <= value < float("inf"):
        raise ValueError(f"{name} must be at least {smallest:.2g}, the rounding of the state's dtype; it is {value!r}.")
    return float(value)
