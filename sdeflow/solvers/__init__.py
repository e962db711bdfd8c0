"""Solvers of the derived equations: small objects, each saying which equations it takes.

A bare name stands for the solver of that name which fits the equation, sdeflow's own where both exist; ``Torchsde`` and
``Torchdiffeq`` are the adapters to those libraries, imported when first used.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sdeflow.solvers.clock import Clock, make_clock
from sdeflow.solvers.problem import Problem
from sdeflow.solvers.torchdiffeq import Torchdiffeq
from sdeflow.solvers.torchsde import Torchsde

__all__ = ["Clock", "Problem", "Solver", "Torchdiffeq", "Torchsde", "make_clock", "names_for", "resolve"]


class Solver(Protocol):
    """What a solver says of itself, and does.

    Attributes:
        kinds: the equations it solves, of "sde" (the reverse-time SDE) and "ode" (the probability flow).
        needs_kernel: whether it needs the SDE's Gaussian kernel.
        stochastic: whether it draws noise.
        adaptive: whether it chooses its steps, to rtol and atol.
        calls_per_step: calls of the score in a step of fixed size.
        default_grid: the time variable it takes its steps in, where it prefers one.
    """

    kinds: tuple[str, ...]
    needs_kernel: bool
    stochastic: bool
    adaptive: bool
    calls_per_step: int
    default_grid: str | None

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state (batch, n) at the end of ``problem`` from ``y`` (batch, n)."""
        ...


_NAMED = {
    "sde": {name: Torchsde(name) for name in Torchsde.methods},
    "ode": {name: Torchdiffeq(name) for name in Torchdiffeq.methods},
}


def names_for(kind: str) -> tuple[str, ...]:
    """The names that an equation of this kind, "sde" or "ode", accepts."""
    return tuple(_NAMED[kind])


def resolve(solver: str | Solver, kind: str) -> Solver:
    """``solver`` as an object that solves equations of ``kind``.

    Raises:
        ValueError: for a name or an object that does not fit, with those that do.
    """
    if isinstance(solver, str):
        if solver in _NAMED[kind]:
            return _NAMED[kind][solver]
    elif kind in getattr(solver, "kinds", ()):
        return solver
    what = "a reverse-time SDE" if kind == "sde" else "the probability-flow ODE"
    raise ValueError(f"{solver!r} does not solve {what}; those that do: {', '.join(names_for(kind))}.")
