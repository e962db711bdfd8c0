"""What a solver is given: an initial value problem, guarded.

A :class:`Problem` has two faces:

  - for methods of any equation, a :class:`Field`: a drift and a diffusion of flattened states (batch, n) in the clock's
    increasing variable r (or of rows (batch · n / k, k) where a k x m noise matrix mixes the components of a coupled
    state);
  - for methods that know the perturbation kernel, a :class:`View`: the kernel itself and the score of states
    (batch, *event) at times of the SDE, which run from T down to the cutoff, or up when the flow encodes.

Either way states are as the model carries them: in the kernel's basis, and centred, x - offset(t). Only methods without
``needs_kernel``, in steps between given times, carry x itself. A :class:`~sdeflow.solvers.watch.Watch` counts the
calls, keeps the budget and finds the first sample that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sdeflow.kernels.gaussian import Kernel
from sdeflow.numerics.brownian import BrownianRows
from sdeflow.scores import GridScore
from sdeflow.solvers.clock import Clock
from sdeflow.solvers.schemes import Scheme
from sdeflow.solvers.watch import Coefficient, Watch

__all__ = ["Diffusion", "Field", "Normalised", "Normals", "Problem", "View"]

_BESIDE = 1e-11  # of the clock's u: how far from a break point f and g are asked for, at most
_BESIDE_TIME = 1e-13  # of the horizon: how far from it they are asked for, at least


@dataclass(frozen=True)
class Diffusion:
    """g of dy = drift dt + g dw.

    Attributes:
        g: (y, t) -> what broadcasts to (batch, n).
        correction: (y, t) -> ½ Σ g ∂g/∂x, where the noise depends on the state; else None.
        components: k where g is a matrix: it is then (batch · n / k, k, motions).
        motions: m, the number of Brownian motions of each coordinate then.
    """

    g: Coefficient
    correction: Coefficient | None = None
    components: int | None = None
    motions: int | None = None


@dataclass(frozen=True)
class Field:
    """The equation of flattened states, an SDE or an ODE.

    Attributes:
        drift: (y, t) -> (batch, n), for y (batch, n) and t () in float64.
        diffusion: that of an SDE; None for an ODE.
    """

    drift: Coefficient
    diffusion: Diffusion | None = None


@dataclass(frozen=True)
class View:
    """The same equation for methods that know the perturbation kernel.

    Attributes:
        event: the shape of one state.
        score: (u, t) -> ∇ log p_t of states (batch, *event), for t () or (batch,) in float64.
        kernel: the perturbation kernel where it is Gaussian, else None.
        on_grid: (times, like) -> the score on a fixed grid, a :class:`~sdeflow.scores.GridScore`.
        mean: the data's mean where it is known, else 0: a reference, no more.
        scale: the data's standard deviation likewise, else 1.
    """

    event: tuple[int, ...]
    score: Coefficient
    kernel: Kernel | None = None
    on_grid: Callable[[Tensor, Tensor], GridScore] | None = None
    mean: Tensor | float = 0.0
    scale: Tensor | float = 1.0


class Normals(Protocol):
    """Where standard normal numbers come from, such as a :class:`~sdeflow.numerics.noise.NoiseStream`."""

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next ones, those of a sample together."""


class Problem:
    """An equation with its start, its end and its noise.

    Args:
        field: the equation of flattened states; None where only methods that know the kernel solve it.
        clock: the time variable.
        backward: whether t runs from T down to cutoff, rather than up.
        view: the same equation for methods that know the kernel.
        watch: the budget, the check of finiteness and what is called on the way.
        noise: where the Brownian increments come from: fresh numbers, or a path that other solves can follow too.
        row_norm: (batch, n) -> (batch,), the size of an error in each sample; root mean square by default.

    Attributes:
        event, mean, scale: those of ``view``.
        components, motions: those of its diffusion.
    """

    def __init__(
        self,
        field: Field | None,
        clock: Clock,
        *,
        backward: bool,
        view: View | None = None,
        watch: Watch | None = None,
        noise: Normals | BrownianRows | None = None,
        row_norm: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.view = view
        self._drift = _no_drift if field is None else field.drift
        self._diffusion = None if field is None else field.diffusion
        self.components, self.motions = None, None
        if self._diffusion is not None:
            self._g, self._correction = self._diffusion.g, self._diffusion.correction
            self.components, self.motions = self._diffusion.components, self._diffusion.motions
        if view is not None:
            self.event, self._score = view.event, view.score
            self.mean = torch.as_tensor(view.mean, dtype=torch.float64)
            self.scale = torch.as_tensor(view.scale, dtype=torch.float64)
        self.clock, self.backward, self.noise = clock, backward, noise
        self.watch = Watch() if watch is None else watch
        self.row_norm = row_norm or _root_mean_square
        self._end: float | None = 1.0
        self._last: tuple[float, Tensor, Tensor] | None = None
        self._nodes: np.ndarray | None = None
        self._edges: list[tuple[float, float]] = []
        self._part: tuple[float, float, float, float] | None = None

    def start(
        self,
        y: Tensor,
        steps: int | None = None,
        end: float = 1.0,
        eager_checks: bool = False,
        order: int = 1,
        scheme: Scheme | None = None,
        retries: bool = False,
    ) -> Sequence[float]:
        """Before a solve, by a method of this ``order``; ``eager_checks`` reads the finiteness at every call.

        A method that ``retries`` tries a step again, shorter, where the drift is not finite; see
        :meth:`~sdeflow.solvers.watch.Watch.tried`.

        Of a method with a tableau, ``scheme``, the order is that one's, and steps that spoil Gaussian data are told.

        Returns:
            The rising values of r (steps + 1,) at which its steps begin and end: 0, 1, ..., steps, or t itself (-t
            where t falls) where the times were given. Without ``steps``, 0 and ``end``, between which a solve chooses.
            On a named grid the break points of f and g are among them; see :meth:`smooth_parts`.
        """
        given = steps is not None and self.clock.given is not None
        self._end = None if given else end if steps is None else float(steps)
        self._part = None
        self._divide(steps, order if scheme is None else scheme.order, scheme)
        self.watch.start(y.detach(), eager_checks, retries)
        if given:
            return (-self.times(steps) if self.backward else self.times(steps)).tolist()
        return [0.0, end] if steps is None else range(steps + 1)

    @property
    def in_unit_steps(self) -> bool:
        """Whether steps are of length 1 in r, as they are where the times were not given."""
        return self._end is not None

    def _divide(self, steps: int | None, order: int, scheme: Scheme | None) -> None:
        """Sets where r the break points of f and g are, and how u goes with r where its nodes are uneven for them."""
        self._nodes, self._edges = None, []
        if self._end is None:
            if steps is not None:
                self.clock.check_given(self.clock.times(steps), self._diffusion is not None, self.backward, scheme)
            at = self.clock.given_breaks.tolist()
            self._edges = [(-t, t) for t in reversed(at)] if self.backward else [(t, t) for t in at]
            return
        at = [self._end * u for u, _ in self.clock.breaks]
        if steps is not None:
            u, at = self.clock.nodes(steps, order, self._diffusion is not None, self.backward, scheme)
            if at is None:
                return
            self._nodes = u[::-1].copy() if self.backward else u
        edges = [(float(r), t) for r, (_, t) in zip(at, self.clock.breaks, strict=True)]
        self._edges = [(self._end - r, t) for r, t in reversed(edges)] if self.backward else edges

    def smooth_parts(self, points: Sequence[float]) -> Iterator[Sequence[float]]:
        """``points`` of :meth:`start` in runs, each from one break point of f and g to the next.

        Until the next run is asked for, times are those inside this one: f, g and dt/du on its own side of its ends. At
        0 and T they are so as they are compiled (:mod:`sdeflow.numerics.compile`), and at a cutoff where f or g jumps.
        """
        from_break = self.clock.starts_at_break
        if not self._edges and not from_break:
            yield points
            return
        times = (self.clock.T, self.clock.cutoff) if self.backward else (self.clock.cutoff, self.clock.T)
        ends = [(points[0], times[0]), *self._edges, (points[-1], times[1])]
        for (first, begin), (last, end) in pairwise(ends):
            if first < last:
                inside = min(_BESIDE * self._end, 0.25 * (last - first)) if self._end else 0.0
                low, high = sorted((begin, end))
                short = min(_BESIDE_TIME * (self.clock.T - self.clock.cutoff), 0.25 * (high - low))
                self._part = (
                    first + inside * (first > points[0]), last - inside * (last < points[-1]),
                    low + short * (from_break or low > self.clock.cutoff), high - short * (high < self.clock.T),
                )  # fmt: skip
                self._last = None
                yield [first, *(r for r in points if first < r < last), last]
        self._part = None

    def steps(self, points: Sequence[float]) -> Iterator[tuple[int, float, float]]:
        """Number (from 1), begin and end of each step between ``points`` of :meth:`start`, in :meth:`smooth_parts`."""
        number = 0
        for part in self.smooth_parts(points):
            for begin, end in pairwise(part):
                number += 1
                yield number, begin, end

    def normalised(self) -> Normalised | None:
        """The flow of the state relative to its scale, where the clock has it; see :class:`Normalised`."""
        if self.view is None or self.view.kernel is None or self.clock.normalised is None or self.scale.ndim:
            return None
        return Normalised(self, self.view.kernel, self.clock.normalised)

    def to_rows(self, y: Tensor) -> Tensor:
        """States (batch, n), components first, as rows of components (batch · n / k, k)."""
        return y.reshape(len(y), self.components, -1).mT.reshape(-1, self.components) if self.components else y

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`to_rows`."""
        batch = self.watch.batch
        return rows.reshape(batch, -1, self.components).mT.reshape(batch, -1) if self.components else rows

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next standard normal numbers, for states or rows of them: those of a sample are drawn together."""
        batch, noise = self.watch.batch, self.noise
        if noise is None or isinstance(noise, BrownianRows):
            raise ValueError("this solver draws normal numbers, which a problem without noise or with a path has not.")
        return noise.normal((batch, math.prod(shape) // max(batch, 1)), dtype, device).reshape(shape)

    def motion(
        self, between: tuple[float, float], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The increment of the Brownian motion between two times of the SDE, over the root of their distance."""
        if not isinstance(self.noise, BrownianRows):
            return self.normal(shape, dtype, device)
        return self._along(self.noise, between, shape, dtype, device)[0]

    def motion_in(self, a: float, b: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """:meth:`motion` between two values of the clock's variable r."""
        if not isinstance(self.noise, BrownianRows):
            return self.normal(shape, dtype, device)
        return self._along(self.noise, self._times_of(a, b), shape, dtype, device)[0]

    def area_in(self, a: float, b: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Its space-time area, likewise normalised, of variance 1/12: ∫ (w - w_a) dr = h (Δw / 2 + area)."""
        if not isinstance(self.noise, BrownianRows):
            return self.normal(shape, dtype, device) * math.sqrt(1.0 / 12.0)
        return self._along(self.noise, self._times_of(a, b), shape, dtype, device)[1]

    def _times_of(self, a: float, b: float) -> tuple[float, float]:
        return self._at(a)[0], self._at(b)[0]

    def _along(
        self, path: BrownianRows, between: tuple[float, float], shape: tuple[int, ...], dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        batch = self.watch.batch
        found = path.step(*between, (batch, math.prod(shape) // max(batch, 1)))
        return tuple(part.reshape(shape).to(device=device, dtype=dtype) for part in found)

    def time(self, r: Tensor | float) -> tuple[Tensor, float]:
        """t () in float64, and |dt/dr|."""
        r = float(r.detach() if isinstance(r, Tensor) else r)
        if self._part is None:
            t, rate = self._at(r)
        else:
            first, last, low, high = self._part
            t, rate = self._at(min(max(r, first), last))
            t = min(max(t, low), high)
        return torch.tensor(t, dtype=torch.float64), rate

    def _at(self, r: float) -> tuple[float, float]:
        """t and |dt/dr|, where f and g may jump that to one side."""
        if self._end is None:
            return abs(r), 1.0
        if self._nodes is None:
            t, rate = self.clock(1.0 - r / self._end if self.backward else r / self._end)
            return t, rate / self._end
        k = min(max(int(r), 0), len(self._nodes) - 2)
        width = float(self._nodes[k + 1] - self._nodes[k])
        t, rate = self.clock(float(self._nodes[k]) + (r - k) * width)
        return t, rate * abs(width)

    def drift(self, r: Tensor | float, y: Tensor, length: float = 1.0) -> Tensor:
        """dy/dr, shaped as y, times the length of a step."""
        r = float(r.detach() if isinstance(r, Tensor) else r)  # steps chosen by an error have its graph
        if self._last is not None and self._last[0] == r and self._last[1] is y:
            return self._last[2]  # torchsde asks for the first drift twice
        if self.watch.leaves(y):
            return torch.full_like(y, math.nan)
        rows, y = y, self.from_rows(y) if self.components else y
        t, rate = self.time(r)
        value = self.watch.asked(self._drift, y, t)
        rate *= length
        value = value * (-rate if self.backward else rate)
        value = self.to_rows(value) if self.components else value
        self._last = (r, rows, value)
        return value

    def diffusion(self, r: Tensor | float, y: Tensor, length: float = 1.0) -> Tensor:
        """The factor of dw(r), (batch, n), or a matrix for each row (batch · n / k, k, m); over a step, of ξ."""
        t, rate = self.time(r)
        rate *= length
        if self.components:
            return (self._g(self.from_rows(y), t) * math.sqrt(rate)).to(y.dtype)
        return (self._g(y, t) * math.sqrt(rate)).to(y.dtype).expand_as(y)

    def stratonovich_drift(self, r: Tensor | float, y: Tensor) -> Tensor:
        """The drift of the same equation in the sense of Stratonovich, dy/dr."""
        value = self.drift(r, y)
        if self._correction is None:
            return value
        t, rate = self.time(r)
        return value - self.to_rows(rate * self._correction(self.from_rows(y), t).expand_as(self.from_rows(y)))

    # ---------------------------------------------------------------- for methods that know the kernel

    @property
    def has_kernel(self) -> bool:
        """Whether there is a Gaussian perturbation kernel."""
        return self.view is not None and self.view.kernel is not None

    @property
    def kernel(self) -> Kernel:
        """The perturbation kernel.

        Raises:
            ValueError: where it is not Gaussian.
        """
        if self.view is None or self.view.kernel is None:
            raise ValueError("this equation has no Gaussian kernel; a solver that needs one has needs_kernel = True.")
        return self.view.kernel

    def times(self, steps: int | None) -> np.ndarray:
        """The times of a solve in ``steps`` steps from its start to its end, (steps + 1,); see the clock's.

        Raises:
            ValueError: without ``steps``.
        """
        if steps is None:
            raise ValueError("this solver takes fixed steps: give steps=.")
        times = self.clock.times(steps)
        return times[::-1].copy() if self.backward else times

    def score(self, u: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p_t of states (batch, *event), at one time or (batch,); one call."""
        t = torch.as_tensor(t, dtype=torch.float64)
        last = float(t.max()) if t.ndim else float(t)
        self.watch.require_budget(u, last)
        value = self._score(u, t)
        self.watch.count(u.flatten(1), value.flatten(1), last)
        return value

    def flat_score(self, y: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t of flattened states (batch, n) at one time; one call."""
        return self.watch.asked(lambda y, t: self._score(y.reshape(-1, *self.event), t).flatten(1), y, t)

    def on_grid(self, times: Tensor, like: Tensor) -> GridScore:
        """The score at the fixed ``times`` (n,) of a solve, for states like ``like``; after a call at time number i say
        so to ``watch.called``."""
        if self.view is None or self.view.on_grid is None:
            raise ValueError("this equation has no score on a grid, which is that of a Gaussian kernel.")
        self.watch.grid_times = times.tolist()
        return self.view.on_grid(times, like)

    def observe(self, step: int, t: float, y: Tensor) -> None:
        """To be called after step number ``step`` (from 1), with the state (batch, ...) at time t."""
        if self.watch.on_step is not None:
            self.watch.on_step(step, t, y)

    @property
    def nfe(self) -> int:
        """Calls of the score so far."""
        return self.watch.nfe

    @property
    def noise_depends_on_state(self) -> bool:
        """Whether Itô and Stratonovich differ."""
        return self._correction is not None

    def finish(self, y: Tensor) -> Tensor:
        """After a solve: the state (batch, n), once it is known to be finite."""
        self.watch.finish(y.detach())
        return y


class Normalised:
    r"""The flow of one schedule for all coordinates, for y = u / S with S² = alpha² c² + sigma²:

        dy/dr = -ζ ζ' / (c² + ζ²) (y + S s(S y, t)),      ζ = sigma / alpha.

    Neither f nor g occurs, nor do their pauses, pulses and jumps, and the bracket is 0 for Gaussian data of scale c.

    Args:
        problem: an ODE, whose calls it counts.
        kernel: of its SDE.
        curve: u -> t and ζ ζ' / (c² + ζ²).
    """

    def __init__(self, problem: Problem, kernel: Kernel, curve: Callable[[float], tuple[float, float]]) -> None:
        self._problem, self._kernel, self._curve = problem, kernel, curve

    def size(self, r: float) -> float:
        """S at r."""
        return self._size(self.time(r))

    def time(self, r: float) -> float:
        """t at r."""
        return self._time(r)[0]

    def _time(self, r: float) -> tuple[float, float]:
        return self._curve(1.0 - r if self._problem.backward else r)

    def _size(self, t: float) -> float:
        alpha, sigma, _ = self._kernel.numbers.of_kernel(torch.tensor(t, dtype=torch.float64))
        return math.hypot(float(alpha) * float(self._problem.scale), float(sigma))

    def drift(self, r: Tensor | float, y: Tensor) -> Tensor:
        """dy/dr; one call."""
        t, rate = self._time(float(r.detach() if isinstance(r, Tensor) else r))
        size = self._size(t)
        score = self._problem.flat_score(y * size, torch.tensor(t, dtype=torch.float64))
        return (y + size * score) * (rate if self._problem.backward else -rate)


def _no_drift(y: Tensor, t: Tensor) -> Tensor:
    raise TypeError("this problem has no drift: it is for methods that know the kernel.")


def _root_mean_square(error: Tensor) -> Tensor:
    return error.detach().square().mean(1).sqrt()  # steps have no gradient
