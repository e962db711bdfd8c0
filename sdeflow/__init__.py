"""sdeflow: write a stochastic differential equation as it stands in a paper, and everything else follows."""

from sdeflow import catalog, errors, nets, scores, solvers
from sdeflow._version import __version__
from sdeflow.errors import (
    DataError,
    DeclarationError,
    MissingPriorError,
    NotAffineError,
    ScheduleError,
    ScoreError,
    SdeflowError,
    SolverError,
)
from sdeflow.kernels.gaussian import Kernel
from sdeflow.laws.gaussian import Gaussian
from sdeflow.numerics import basis
from sdeflow.numerics.brownian import BrownianPath
from sdeflow.scores import Score
from sdeflow.sde import SDE
from sdeflow.symbolic.schedule import schedule
from sdeflow.symbolic.symbols import s, state, t, x, x_0
from sdeflow.training import callbacks, losses, objectives
from sdeflow.training.fit import fit

__all__ = [
    "SDE",
    "BrownianPath",
    "DataError",
    "DeclarationError",
    "Gaussian",
    "Kernel",
    "MissingPriorError",
    "NotAffineError",
    "ScheduleError",
    "Score",
    "ScoreError",
    "SdeflowError",
    "SolverError",
    "__version__",
    "basis",
    "callbacks",
    "catalog",
    "errors",
    "fit",
    "losses",
    "nets",
    "objectives",
    "s",
    "schedule",
    "scores",
    "solvers",
    "state",
    "t",
    "x",
    "x_0",
]
