"""Solvers of the derived equations: small objects, each saying which equations it takes.

A bare name stands for the solver of that name which fits the equation, sdeflow's own where both exist; ``Torchsde`` and
``Torchdiffeq`` are the adapters to those libraries, imported when first used.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sdeflow.numerics.checks import checked_choice, checked_flag
from sdeflow.scores import DeclaredSDE
from sdeflow.solvers.adapters.torchdiffeq import Torchdiffeq
from sdeflow.solvers.adapters.torchsde import Torchsde
from sdeflow.solvers.clock import Clock, Grid, make_clock
from sdeflow.solvers.edm import StochasticHeun
from sdeflow.solvers.euler import Euler, EulerMaruyama, Heun
from sdeflow.solvers.exponential import presets
from sdeflow.solvers.exponential.singlestep import SingleStep
from sdeflow.solvers.exponential.solver import Exponential
from sdeflow.solvers.gotta_go_fast import GottaGoFast
from sdeflow.solvers.langevin import (
    AnnealedLangevin,
    PredictorCorrector,
    annealed_langevin,
    geometric_scales,
    langevin,
    matched_eps,
    number_of_scales,
)
from sdeflow.solvers.problem import Problem
from sdeflow.solvers.restart import Restart
from sdeflow.symbolic.declaration import Declaration

__all__ = [
    "AnnealedLangevin", "Clock", "Euler", "EulerMaruyama", "Exponential", "GottaGoFast", "Grid", "Heun",
    "PredictorCorrector", "Problem", "Restart", "SingleStep", "Solver", "StochasticHeun", "Torchdiffeq", "Torchsde",
    "annealed_langevin", "available", "geometric_scales", "langevin", "make_clock", "matched_eps", "names_for",
    "number_of_scales", "presets", "resolve",
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

    Two more are read where a solver has them: ``observable`` (True by default), whether it says when a step ends, and
    ``per_sample`` (False), whether each sample has steps of its own; ``elementwise`` (False), whether coupled states
    are beyond it; and ``calls(steps)``, where calls are not steps
    times calls_per_step.
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


_NAMED: dict[str, dict[str, Solver]] = {
    "sde": {
        "exponential": Exponential(eta=1.0),
        "ddpm": presets.ddpm(),
        "dpmpp_sde": presets.dpmpp_sde(),
        "sa_solver": presets.sa_solver(),
        "er_sde": presets.er_sde(),
        "euler": EulerMaruyama(),
        "edm": StochasticHeun(S_churn=40.0),
        "predictor_corrector": PredictorCorrector(),
        "annealed_langevin": AnnealedLangevin(),
        "gotta_go_fast": GottaGoFast(),
        **{name: Torchsde(name) for name in Torchsde.methods if name != "euler"},
    },
    "ode": {
        "exponential": Exponential(),
        "ddim": presets.ddim(),
        "dpmpp2m": presets.dpmpp2m(),
        "dpmpp3m": presets.dpmpp3m(),
        "dpmpp3m_published": presets.dpmpp3m(published=True),
        "unipc": presets.unipc(),
        "deis": presets.deis(),
        "dpmpp2s": presets.dpmpp2s(),
        "dpmpp3s": presets.dpmpp3s(),
        "euler": Euler(),
        "heun": Heun(),
        "edm": StochasticHeun(),
        **{name: Torchdiffeq(name) for name in Torchdiffeq.methods if name != "euler"},
    },
}
"""By kind of equation; where a library has a method of the same name, ours: Torchsde("euler") is theirs."""


def names_for(kind: str, with_kernel: bool = True) -> tuple[str, ...]:
    """The names that an equation of this kind, "sde" or "ode", accepts; those of an SDE without a Gaussian kernel."""
    checked_choice(kind, "kind", _NAMED)
    checked_flag(with_kernel, "with_kernel")
    return tuple(name for name, solver in _NAMED[kind].items() if with_kernel or not solver.needs_kernel)


def available(sde: DeclaredSDE) -> dict[str, tuple[str, ...]]:
    """The names of the solvers that fit an SDE: of its reverse-time SDE ("sde") and its probability flow ("ode")."""
    if not isinstance(getattr(sde, "declaration", None), Declaration):
        raise TypeError(f"available takes an SDE, not {type(sde).__name__}.")
    with_kernel = sde.kernel.gaussian is not None
    coupled = sde.declaration.coupled
    shared = not sde.declaration.diagonal and sde.declaration.state_dependent_noise
    return {
        kind: tuple(
            name
            for name in names_for(kind, with_kernel)
            if not (coupled and getattr(_NAMED[kind][name], "elementwise", False))
            and not (shared and getattr(_NAMED[kind][name], "diagonal", False))
        )
        for kind in _NAMED
    }


def resolve(solver: str | Solver, kind: str) -> Solver:
    """``solver`` as an object that solves equations of ``kind``.

    Raises:
        ValueError: for a name or an object that does not fit, with those that do.
    """
    if isinstance(solver, str):
        if solver in _NAMED[kind]:
            return _NAMED[kind][solver]
        if kind == "sde" and solver in _NAMED["ode"] and "sde" in _NAMED["ode"][solver].kinds:
            return _NAMED["ode"][solver]  # the member without noise of a family of reverse equations
    elif not isinstance(solver, type) and kind in getattr(solver, "kinds", ()):
        return solver
    if isinstance(solver, type):
        raise ValueError(f"solver must be a solver object, such as {solver.__name__}(), not the class itself.")
    what = "a reverse-time SDE" if kind == "sde" else "the probability-flow ODE"
    raise ValueError(f"{solver!r} does not solve {what}; those that do: {', '.join(names_for(kind))}.")
