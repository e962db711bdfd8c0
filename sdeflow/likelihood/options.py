"""How log p is asked for: checked once, before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Required

from sdeflow.likelihood.dequantisation import Dequantisation
from sdeflow.numerics.checks import checked_choice, checked_count, checked_flag, checked_real, checked_state
from sdeflow.numerics.noise import resolve_seed
from sdeflow.numerics.traces import Exact, Given, Hadamard, Hutchinson, HutchPP, Probed, Trace
from sdeflow.solvers import Grid, Solver
from sdeflow.solvers.clock import as_grid

__all__ = [
    "DEFAULT_PROBES", "EXACT_BY_DEFAULT", "BitsOptions", "DataOptions", "LogProbOptions", "Options", "estimator",
    "is_exact",
]  # fmt: skip

EXACT_BY_DEFAULT = 128
EXACT_LIMIT = 4096
DEFAULT_PROBES = 16
TRACES = ("exact", "hutchinson", "hadamard", "hutch++")


class LogProbOptions(TypedDict, total=False):
    """Options of a log-likelihood.

    Attributes:
        trace: "exact", "hutchinson", "hadamard", "hutch++", or an object of :mod:`sdeflow.numerics.traces`; None is
            exact up to 128 dimensions, and Hutchinson's with 16 probes above. The last three go with the exponential
            solver.
            A tensor holds probes that are taken as they are, at every node and with every solver: (m, *event), or
            (m, batch, *event) for probes of each sample.
        probes: how many at each node; giving it chooses Hutchinson. "auto" adds probes until the standard error of
            each sample is at most ``warn_above``, doubling them (Hadamard's, where no trace is named). Or a tensor of
            probes, as for ``trace``.
        probe: "rademacher", the default, or "gaussian"; giving it chooses Hutchinson, of which alone it is.
        solver: a method of torchdiffeq, or an :class:`~sdeflow.solvers.Exponential` of eta 0.
        steps: steps of the solver; without one, calls of the score (at least 2), by the exponential solver.
        atol: alone, the error of log p itself in nats, of each sample.
        rtol: with or without ``atol``, tolerances of torchdiffeq's dopri5, per sample, of the state and of log p alike.
        grid: as ``FlowODE.decode``; with ``atol`` alone "pilot" by default.
        at: "cutoff" measures log p of the flow at the cutoff, in x itself. "data" measures the data's own density: x is
            taken along the data's mean path to the cutoff, and the blur of the cutoff's noise is taken off to second
            order (:mod:`sdeflow.likelihood.budget`); two calls more.
        gradient: "backprop" or "adjoint", for a result that can be differentiated in x and in the parameters of the
            score (once). Backpropagation goes through the steps taken, exactly, and keeps the graph of every call;
            "adjoint" solves the adjoint equation on the same nodes when the gradient is asked for. By default
            "adjoint" where x requires grad and the solver allows it, else none: parameters alone have to be meant.
        seed: of the probes, and of what else is drawn.
        first_row: the number of the first sample where x is a part of a larger set, whose probes it then takes.
        chunk: how many samples to solve at once; by default as many as make 4 million numbers. It changes no result
            but for the tolerance.
        max_calls: the budget of an adaptive solve (of each chunk), 10,000 by default.
        progress: a progress bar; None shows it on a terminal only.
        warn_above: the standard error in nats above which a plain call warns.
    """

    trace: str | Trace | Tensor | None
    probes: int | str | Tensor | None
    probe: str | None
    solver: str | Solver | None
    steps: int | None
    rtol: float | None
    atol: float | None
    grid: Grid
    at: str
    gradient: str | None
    seed: int | torch.Generator | None
    first_row: int
    chunk: int | None
    max_calls: int | None
    progress: bool | None
    warn_above: float


class DataOptions(LogProbOptions, total=False):
    """Options of the bound on log p of the data component: those of :class:`LogProbOptions`, and

    Attributes:
        samples: draws of the auxiliary components for each sample.
    """

    samples: int


class BitsOptions(DataOptions, total=False):
    """Options of bits per dimension: those of :class:`DataOptions`, and

    Attributes:
        levels: how many grey levels there are.
        low: the least x that the model was trained on.
        high: the largest.
        dequantise: q, of :mod:`sdeflow.likelihood.dequantisation`; uniform by default.
        draws: of u, for each image.
        importance: whether draws are averaged as weights; by default where log p is no estimate itself, since noise in
            it would be taken for probability.
    """

    levels: Required[int]
    low: Required[float]
    high: Required[float]
    dequantise: Dequantisation | None
    draws: int
    importance: bool | None


@dataclass(frozen=True)
class Options:
    """What a log-likelihood was asked for, checked: the options above, and ``full``.

    ``key`` is what :meth:`seeded` makes of ``seed``.
    """

    trace: str | Trace | Tensor | None = None
    probes: int | str | Tensor | None = None
    probe: str | None = None
    solver: str | Solver | None = None
    steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    grid: Grid = None
    at: str = "cutoff"
    gradient: str | None = None
    seed: int | torch.Generator | None = None
    first_row: int = 0
    chunk: int | None = None
    full: bool = False
    max_calls: int | None = None
    progress: bool | None = None
    warn_above: float = 0.1
    key: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", as_grid(self.grid))
        checked_choice(self.at, "at", ("cutoff", "data"))
        checked_choice(self.gradient, "gradient", ("backprop", "adjoint", None))
        checked_choice(self.probe, "probe", ("rademacher", "gaussian", None))
        checked_flag(self.full, "full")
        checked_flag(self.progress, "progress", optional=True)
        checked_real(self.warn_above, "warn_above", "a positive number of nats (inf never warns)", lambda v: v > 0)
        for name in ("steps", "max_calls", "chunk"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_count(getattr(self, name), name))
        object.__setattr__(self, "first_row", checked_count(self.first_row, "first_row", 0))
        atol = self.atol
        if atol is not None:
            checked_real(atol, "atol", "a positive error in nats", lambda v: 0 < v < math.inf)
        for name in ("trace", "probes"):
            if isinstance(getattr(self, name), np.ndarray | list | tuple):
                object.__setattr__(self, name, checked_state(getattr(self, name), "the probes"))
        given = [value for value in (self.trace, self.probes) if isinstance(value, Tensor)]
        if given:
            if self.trace is not None and self.probes is not None:
                raise ValueError("give the probes alone, as trace= or as probes=.")
            object.__setattr__(self, "trace", Given(given[0], self.first_row))
            object.__setattr__(self, "probes", None)
        if self.solver is None and self.steps is not None and (atol is not None or self.rtol is not None):
            raise ValueError("give steps=, or atol= for an error of log p in nats, or rtol= and atol=; not both.")
        if isinstance(self.probes, str):
            checked_choice(self.probes, "probes", ("auto",), "a positive integer")
        elif self.probes is not None:
            object.__setattr__(self, "probes", checked_count(self.probes, "probes"))
        if isinstance(self.trace, str) or not isinstance(self.trace, Trace | None):
            checked_choice(self.trace, "trace", TRACES, "an object of sdeflow.numerics.traces, or a tensor of probes")
        if self.probe is not None and self.trace not in (None, "hutchinson"):
            raise ValueError(f"probe={self.probe!r} is of Hutchinson's trace, not of trace={self.trace!r}.")

    def seeded(self, x: Tensor | None = None) -> Options:
        """With the key of what is drawn. Without a seed it comes from torch's global generator, which is left alone
        where the trace of states like ``x`` is exact, and so nothing is drawn."""
        exact = self.seed is None and x is not None and is_exact(x, self)
        return self if exact else replace(self, key=resolve_seed(self.seed))

    @property
    def law(self) -> str:
        """That of Hutchinson's probes."""
        return self.probe or "rademacher"

    @property
    def target(self) -> float | None:
        """The standard error of the trace in nats that probes are added for, or None."""
        return self.warn_above if self.probes == "auto" else None


def is_exact(x: Tensor, options: Options) -> bool:
    """Whether the trace is to be exact."""
    d = math.prod(x.shape[1:])
    if options.trace == "exact" and options.probes is not None:
        raise ValueError("the exact trace takes no probes.")
    if options.trace == "exact" and d > EXACT_LIMIT:
        raise ValueError(f'the exact trace in {d} dimensions takes {d} products a call; use trace="hutchinson".')
    if options.trace == "exact" or isinstance(options.trace, Exact):
        return True
    return options.trace is None and options.probes is None and options.probe is None and d <= EXACT_BY_DEFAULT


def estimator(x: Tensor, options: Options) -> Trace:
    """The trace estimator meant, on nodes that are known beforehand."""
    trace, auto = options.trace, options.probes == "auto"
    if isinstance(trace, Trace):
        if options.probes is not None and not (auto and isinstance(trace, Probed)):
            raise ValueError("a trace object has its own number of probes.")
        return trace
    probes = options.probes if isinstance(options.probes, int) else DEFAULT_PROBES
    if trace == "hadamard" or (auto and trace is None and options.probe is None):
        return Hadamard(probes // 2 if auto else probes)
    if trace == "hutch++":
        return HutchPP(probes)
    return Exact() if is_exact(x, options) else Hutchinson(probes, options.law)
