"""The options of a solve: what each means, its type and its default, for all functions that solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from sdeflow.numerics.brownian import BrownianPath
from sdeflow.numerics.checks import checked_count, checked_flag
from sdeflow.scores.thresholded import Threshold
from sdeflow.solvers import Grid, Solver
from sdeflow.solvers.clock import as_grid
from sdeflow.solving.support import Support

__all__ = ["Callback", "DrawOptions", "NoiseOptions", "Options", "SolveOptions", "WayOptions"]

Callback = Callable[[int, float, Tensor], object]


class SolveOptions(TypedDict, total=False):
    """Options of every solve.

    Attributes:
        rtol: without ``steps``, the relative tolerance of an adaptive solve; by default the solver's own, 1e-5 of most.
            Methods of the flow hold each sample to it, torchsde's the whole batch.
        atol: the absolute tolerance, likewise.
        grid: the variable in which steps are uniform: "angle", "log_snr", "karras", "t" or "pilot", measured once for a
            score (:mod:`sdeflow.solving.pilot`); by default what the solver prefers, or else the angle. A tensor of
            times, rising or falling, means steps in t between exactly these.
        max_calls: the budget of an adaptive solve (of each chunk), 10,000 by default.
        callback: called as callback(step, t, x) after each step, step counting from 1, with a copy of the state
            (batch, *event); with chunks, through all steps of each chunk in turn. What it returns is ignored, and what
            it raises ends the solve.
        threshold: keeps E[x_0 | x_t] in range on the way: (low, high) clips it, a quantile in (0, 1) is Imagen's
            dynamic rule for data in [-1, 1]; for other data pass a :class:`~sdeflow.scores.thresholded.Thresholded`
            score yourself.
        chunk: how many samples to solve at once; by default all, up to 2^24 elements. Solvers that choose steps for the
            whole batch take no chunks.
        progress: a progress bar; None shows it on a terminal only.
    """

    rtol: float | None
    atol: float | None
    grid: Grid
    max_calls: int | None
    callback: Callback | None
    threshold: Threshold | None
    chunk: int | None
    progress: bool | None


class WayOptions(SolveOptions, total=False):
    """Options of a solve of the flow from a given state: those of :class:`SolveOptions`, and

    Attributes:
        gradient: "backprop" for a result that can be differentiated in the state and in the parameters of the score,
            exactly through the steps taken, which keeps the graph of every call. By default where the state requires
            grad; parameters alone have to be meant.
    """

    gradient: str | None


class DrawOptions(SolveOptions, total=False):
    """Options of a solve from draws of the prior: those of :class:`SolveOptions`, and

    Attributes:
        seed: makes the result reproducible; sample i depends neither on the batch size nor on chunks.
        dtype: of the state; by default the score's.
        device: of the state; by default the score's.
        support: (batch, *event) -> (batch,) of bool: whether each sample lies in the support of the law that was
            learned, such as the box of a uniform prior. How many do not is told by a warning, and by ``leaked`` of the
            :class:`~sdeflow.solving.solution.Solution`.
        reject: whether samples outside ``support`` are drawn anew until all are inside.
    """

    seed: int | torch.Generator | None
    dtype: torch.dtype | None
    device: torch.device | str | None
    support: Support | None
    reject: bool


class NoiseOptions(DrawOptions, total=False):
    """Options of a solve with noise on the way: those of :class:`DrawOptions`, and

    Attributes:
        noise: a :class:`~sdeflow.BrownianPath` to follow, for solves of one path in different steps; ``seed`` is then
            that of the prior's draw alone.
    """

    noise: BrownianPath | None


@dataclass(frozen=True)
class Options:
    """All that a solve was asked for, checked: the options above, with the solver, its steps and what is returned.

    Raises:
        TypeError, ValueError: for a value that makes no sense.
    """

    solver: str | Solver | None = None
    steps: int | None = None
    trajectory: bool = False
    denoise: bool = False
    return_denoised: bool = False
    rtol: float | None = None
    atol: float | None = None
    grid: Grid = None
    max_calls: int | None = None
    callback: Callback | None = None
    threshold: Threshold | None = None
    chunk: int | None = None
    progress: bool | None = None
    gradient: str | None = None
    seed: int | torch.Generator | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    noise: BrownianPath | None = None
    support: Support | None = None
    reject: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "max_calls", "chunk"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_count(getattr(self, name), name))
        object.__setattr__(self, "grid", as_grid(self.grid))
        for name in ("trajectory", "denoise", "return_denoised", "reject"):
            object.__setattr__(self, name, checked_flag(getattr(self, name), name))
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable as callback(step, t, x), not {self.callback!r}.")
        if not (self.noise is None or isinstance(self.noise, BrownianPath)):
            raise TypeError(f"noise must be a sdeflow.BrownianPath, not {self.noise!r}; seed= is for the rest.")
        if self.support is not None and not callable(self.support):
            raise TypeError(f"support must be callable as support(x), not {self.support!r}.")
        if self.reject and self.support is None:
            raise ValueError("reject=True needs support=, a function that says which samples are inside.")
        if self.reject and (self.observed or self.noise is not None):
            raise ValueError("reject=True draws some samples anew: it takes no trajectory, callback or noise path.")
        object.__setattr__(self, "progress", checked_flag(self.progress, "progress", optional=True))

    @property
    def observed(self) -> bool:
        """Whether anyone looks at the states on the way."""
        return self.trajectory or self.callback is not None
