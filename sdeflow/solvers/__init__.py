"""Solvers of the derived equations: small objects, each saying which equations it takes.

A bare name stands for the solver of that name which fits the equation, sdeflow's own where both exist; ``Torchsde`` and
``Torchdiffeq`` are the adapters to those libraries, imported when first used.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sdeflow.scores import DeclaredSDE
from sdeflow.solvers import presets
from sdeflow.solvers.clock import Clock, Grid, make_clock
from sdeflow.solvers.exponential import Exponential
from sdeflow.solvers.problem import Problem
from sdeflow.solvers.torchdiffeq import Torchdiffeq
from sdeflow.solvers.torchsde import Torchsde

__all__ = [
    "Clock", "Exponential", "Grid", "Problem", "Solver", "Torchdiffeq", "Torchsde", "available", "make_clock",
    "names_for", "presets", "resolve",
]  # fmt: skip


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


_OURS: dict[str, Solver] = {
    "exponential": Exponential(),
    "ddim": presets.ddim(),
    "ddpm": presets.ddpm(),
    "dpmpp2m": presets.dpmpp2m(),
    "dpmpp3m": presets.dpmpp3m(),
    "dpmpp3m_published": presets.dpmpp3m(published=True),
    "dpmpp_sde": presets.dpmpp_sde(),
    "unipc": presets.unipc(),
    "deis": presets.deis(),
    "sa_solver": presets.sa_solver(),
    "er_sde": presets.er_sde(),
}
_NAMED: dict[str, dict[str, Solver]] = {
    "sde": {name: Torchsde(name) for name in Torchsde.methods},
    "ode": {name: Torchdiffeq(name) for name in Torchdiffeq.methods},
}
for _name, _solver in _OURS.items():  # a bare name is ours where both exist
    for _kind in _solver.kinds:
        _NAMED[_kind][_name] = _solver


def names_for(kind: str, with_kernel: bool = True) -> tuple[str, ...]:
    """The names that an equation of this kind, "sde" or "ode", accepts; those of an SDE without a Gaussian kernel."""
    return tuple(name for name, solver in _NAMED[kind].items() if with_kernel or not solver.needs_kernel)


def available(sde: DeclaredSDE) -> dict[str, tuple[str, ...]]:
    """The names of the solvers that fit an SDE: of its reverse-time SDE ("sde") and its probability flow ("ode")."""
    kernel = None if sde.declaration.affine is None else sde.kernel
    return {kind: names_for(kind, kernel is not None) for kind in _NAMED}


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
