"""Solvers of the derived equations: small objects, each saying which equations it takes.

A bare name stands for the solver of that name which fits the equation; ``Torchsde`` and ``Torchdiffeq``
are the adapters to those libraries, imported when first used.
"""

from __future__ import annotations

from sdeflow.solvers.clock import Clock, make_clock
from sdeflow.solvers.problem import Problem
from sdeflow.solvers.torchdiffeq import Torchdiffeq
from sdeflow.solvers.torchsde import Torchsde

__all__ = ["Clock", "Problem", "Solver", "Torchdiffeq", "Torchsde", "make_clock", "names_for", "resolve"]

Solver = Torchsde | Torchdiffeq

_FAMILIES: dict[str, type[Torchsde] | type[Torchdiffeq]] = {"sde": Torchsde, "ode": Torchdiffeq}


def names_for(kind: str) -> tuple[str, ...]:
    """The names that an equation of this kind, "sde" or "ode", accepts."""
    return _FAMILIES[kind].methods


def resolve(solver: str | Solver, kind: str) -> Solver:
    """``solver`` as an object that solves equations of ``kind``.

    Raises:
        ValueError: for a name or an object that does not fit, with those that do.
    """
    if isinstance(solver, str):
        if solver in names_for(kind):
            return _FAMILIES[kind](solver)
    elif getattr(solver, "kind", None) == kind:
        return solver
    what = "an SDE" if kind == "sde" else "the probability-flow ODE"
    raise ValueError(f"{solver!r} does not solve {what}; those that do: {', '.join(names_for(kind))}.")
