"""The solvers that have a name, and which of them fit."""

from __future__ import annotations

from collections.abc import Iterable

from sdeflow.numerics.checks import checked_choice, checked_flag
from sdeflow.scores import DeclaredSDE
from sdeflow.solvers.adapters.torchdiffeq import Torchdiffeq
from sdeflow.solvers.adapters.torchsde import Torchsde
from sdeflow.solvers.base import DEMANDS, Solver, unmet
from sdeflow.solvers.edm import StochasticHeun
from sdeflow.solvers.euler import Euler, EulerMaruyama, Heun
from sdeflow.solvers.exponential import presets
from sdeflow.solvers.exponential.solver import Exponential
from sdeflow.solvers.gotta_go_fast import GottaGoFast
from sdeflow.solvers.langevin import AnnealedLangevin, PredictorCorrector
from sdeflow.symbolic.declaration import Declaration

__all__ = ["available", "demands_of", "names_for", "names_that_meet", "require", "resolve", "resolved"]

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


def names_that_meet(kind: str, demands: Iterable[str] = ()) -> tuple[str, ...]:
    """The names of the solvers of equations of this kind that meet all ``demands``, keys of ``base.DEMANDS``."""
    demands = tuple(demands)
    return tuple(name for name, solver in _NAMED[kind].items() if unmet(solver, demands) is None)


def names_for(kind: str, with_kernel: bool = True) -> tuple[str, ...]:
    """The names that an equation of this kind, "sde" or "ode", accepts; those of an SDE without a Gaussian kernel."""
    checked_choice(kind, "kind", _NAMED)
    return names_that_meet(kind, () if checked_flag(with_kernel, "with_kernel") else ("no kernel",))


def demands_of(declaration: Declaration, with_kernel: bool) -> tuple[str, ...]:
    """What an SDE asks of its solvers."""
    shared = not declaration.diagonal and declaration.state_dependent_noise
    asked = {"no kernel": not with_kernel, "coupled": declaration.coupled, "shared noise": shared}
    return tuple(demand for demand, holds in asked.items() if holds)


def available(sde: DeclaredSDE) -> dict[str, tuple[str, ...]]:
    """The names of the solvers that fit an SDE: of its reverse-time SDE ("sde") and its probability flow ("ode")."""
    if not isinstance(getattr(sde, "declaration", None), Declaration):
        raise TypeError(f"available takes an SDE, not {type(sde).__name__}.")
    demands = demands_of(sde.declaration, sde.kernel.gaussian is not None)
    return {kind: names_that_meet(kind, demands) for kind in _NAMED}


def require(solver: Solver, kind: str, demands: Iterable[str], **given: object) -> None:
    """A ValueError unless the solver meets all ``demands``, keys of ``base.DEMANDS``; with the names that do.

    ``given`` are the values that the words of a demand name beside the solver and the names.
    """
    demands = tuple(demands)
    failed = unmet(solver, demands)
    if failed is not None:
        raise ValueError(failed.words.format(solver=solver, names=", ".join(names_that_meet(kind, demands)), **given))


def resolve(solver: str | Solver, kind: str) -> Solver:
    """``solver`` as an object that solves equations of ``kind``.

    Raises:
        ValueError: for a name or a solver that does not fit, with those that do; for a class, and for an object that
            is no :class:`~sdeflow.solvers.Solver`.
    """
    return resolved(solver, kind, kind)


def resolved(solver: str | Solver, kind: str, demand: str) -> Solver:
    """As :func:`resolve`, for a solver that meets ``demand``, a key of ``base.DEMANDS``."""
    if isinstance(solver, str):
        if solver in _NAMED[kind]:
            return _NAMED[kind][solver]
        if kind == "sde" and solver in _NAMED["ode"] and "sde" in _NAMED["ode"][solver].kinds:
            return _NAMED["ode"][solver]  # the member without noise of a family of reverse equations
        raise ValueError(DEMANDS[demand].words.format(solver=solver, names=", ".join(names_that_meet(kind, (demand,)))))
    if isinstance(solver, type):
        raise ValueError(f"solver must be a solver object, such as {solver.__name__}(), not the class itself.")
    if not isinstance(solver, Solver):
        raise ValueError(
            f"solver must be a name or an object of a subclass of sdeflow.solvers.Solver, whose attributes that class "
            f"lists, not {solver!r}; names are {', '.join(names_that_meet(kind, (demand,)))}."
        )
    require(solver, kind, (demand,))
    return solver
