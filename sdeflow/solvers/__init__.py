"""Solvers of the derived equations: small objects, each of which says what it solves and what it needs.

A bare name stands for the solver of that name which fits the equation, sdeflow's own where both exist; ``Torchsde`` and
``Torchdiffeq`` are the adapters to those libraries, imported when first used. A solver of your own
is a subclass of :class:`Solver`.
"""

from __future__ import annotations

from sdeflow.solvers.adapters.torchdiffeq import Torchdiffeq
from sdeflow.solvers.adapters.torchsde import Torchsde
from sdeflow.solvers.base import Solver
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
from sdeflow.solvers.problem import Diffusion, Field, Problem, View
from sdeflow.solvers.registry import available, names_for, resolve
from sdeflow.solvers.restart import Restart
from sdeflow.solvers.watch import Watch

__all__ = [
    "AnnealedLangevin", "Clock", "Diffusion", "Euler", "EulerMaruyama", "Exponential", "Field", "GottaGoFast", "Grid",
    "Heun", "PredictorCorrector", "Problem", "Restart", "SingleStep", "Solver", "StochasticHeun", "Torchdiffeq",
    "Torchsde", "View", "Watch", "annealed_langevin", "available", "geometric_scales", "langevin", "make_clock",
    "matched_eps", "names_for", "number_of_scales", "presets", "resolve",
]  # fmt: skip
