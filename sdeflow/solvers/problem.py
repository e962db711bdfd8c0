"""What a solver is given: an initial value problem, guarded.

A :class:`Problem` counts the calls of the score, keeps within a budget, stays inside [cutoff, T] and finds the
first sample and time at which something is not finite. It has two faces:

  - for methods of any equation, a drift and a diffusion of flattened states (batch, n) in the clock's increasing
    variable r (or of rows (batch · n / k, k) where a k x m noise matrix mixes the components of a coupled state);
  - for methods that know the perturbation kernel, the kernel itself and the score of states (batch, *event) at
    times of the SDE, which run from T down to the cutoff, or up when the flow encodes.

Either way states are as the model carries them: centred, in the kernel's basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import MaxStepsError, NonFiniteStateError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.numerics.brownian import BrownianRows
from sdeflow.numerics.noise import NoiseStream
from sdeflow.scores import GridScore
from sdeflow.solvers.clock import Clock
from sdeflow.solvers.schemes import Scheme

__all__ = ["Normalised", "Problem"]

_BESIDE = 1e-11  # of the clock's u: how far from a break point f and g are asked for, at most
_BESIDE_TIME = 1e-13  # of the horizon: how far from it they are asked for, at least
_CHECK_EVERY = 50
_EXPLOSION = 1e12  # of a state, relative to 1 + the largest initial value

Coefficient = Callable[[Tensor, Tensor], Tensor]


class Problem:
    """dy = drift dt + diffusion dw, from T to cutoff or from cutoff to T.

    Args:
        drift: (y, t) -> (batch, n), for y (batch, n) and t () in float64.
        clock: the time variable.
        backward: whether t runs from T down to cutoff.
        diffusion: (y, t) -> what broadcasts to (batch, n); None for an ODE.
        correction: (y, t) -> ½ Σ g ∂g/∂x, where the noise depends on the state; else None.
        hint: a sentence for the message of a state that is not finite.
        components: k where the diffusion is a matrix: it is then (batch · n / k, k, motions).
        motions: m, the number of Brownian motions of each coordinate then.
        noise: where the Brownian increments come from: fresh numbers, or a path that other solves can follow too.
        row_norm: (batch, n) -> (batch,), the size of an error in each sample; root mean square by default.
        max_calls: the budget of calls of the drift.
        on_call: called at each call of the drift, for a progress bar.
        kernel: the perturbation kernel where it is Gaussian, else None.
        event: the shape of one state.
        score: (u, t) -> ∇ log p_t of states (batch, *event), for t () or (batch,) in float64.
        on_grid: (times, like) -> the score on a fixed grid, a :class:`~sdeflow.scores.GridScore`.
        mean, scale: the data's mean and standard deviation where they are known, else 0 and 1: a reference, no more.
        on_step: called as (step, t, y) after each step, for trajectories and callbacks.
        on_correction: called as (n, predicted, corrected) where the state at time number n is corrected.
    """

    def __init__(
        self,
        drift: Coefficient,
        clock: Clock,
        *,
        backward: bool,
        diffusion: Coefficient | None = None,
        correction: Coefficient | None = None,
        hint: str = "",
        components: int | None = None,
        motions: int | None = None,
        noise: NoiseStream | BrownianRows | None = None,
        row_norm: Callable[[Tensor], Tensor] | None = None,
        max_calls: int = 10_000,
        on_call: Callable[[], object] | None = None,
        kernel: Kernel | None = None,
        event: tuple[int, ...] = (),
        score: Coefficient | None = None,
        on_grid: Callable[[Tensor, Tensor], GridScore] | None = None,
        mean: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        on_step: Callable[[int, float, Tensor], object] | None = None,
        on_correction: Callable[[int, Tensor, Tensor], object] | None = None,
    ) -> None:
        self._drift = drift
        self._diffusion = diffusion
        self._correction = correction
        self.hint = hint
        self.components, self.motions = components, motions
        self.clock = clock
        self.backward = backward
        self.noise = noise
        self.row_norm = row_norm or (lambda error: error.detach().square().mean(1).sqrt())  # steps have no gradient
        self.max_calls = max_calls
        self.on_call = on_call
        self.kernel, self.event = kernel, event
        self._score, self._on_grid = score, on_grid
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.scale = torch.as_tensor(scale, dtype=torch.float64)
        self.on_step, self.on_correction = on_step, on_correction
        self.nfe = 0
        self.eager_checks = False
        self._end: float | None = 1.0
        self._limit = math.inf
        self._bad_since = torch.empty(0)
        self._times: list[float] = []
        self._sums: list[Tensor] = []
        self.failure: Exception | None = None
        self.grid_times: list[float] = []
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
    ) -> Sequence[float]:
        """Before a solve, by a method of this ``order``; ``eager_checks`` reads the finiteness at every call.

        Of a method with a tableau, ``scheme``, the order is that one's, and steps that spoil Gaussian data are told.

        Returns:
            The rising values of r (steps + 1,) at which its steps begin and end: 0, 1, ..., steps, or t itself (-t
            where t falls) where the times were given. Without ``steps``, 0 and ``end``, between which a solve chooses.
            On a named grid the break points of f and g are among them; see :meth:`smooth_parts`.
        """
        given = steps is not None and self.clock.given is not None
        self._end = None if given else end if steps is None else float(steps)
        self.eager_checks, self._part = eager_checks, None
        self._divide(steps, order if scheme is None else scheme.order, scheme)
        y = y.detach()
        if not bool(torch.isfinite(y).all()):
            rows = _rows(~torch.isfinite(y).all(1))
            raise NonFiniteStateError(f"the initial state is not finite in samples {rows}.", nfe=0, bad_rows=rows)
        largest = float(y.abs().max()) if y.numel() else 0.0
        self._limit = _EXPLOSION * (1.0 + largest)
        self._bad_since = torch.full((len(y),), math.inf, device=y.device)
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

        Until the next run is asked for, times are those inside this one: f, g and dt/du on its own side of its ends.
        """
        if not self._edges:
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
                    low + short * (low > self.clock.cutoff), high - short * (high < self.clock.T),
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
        if self.kernel is None or self.clock.normalised is None or self.scale.ndim:
            return None
        return Normalised(self, self.clock.normalised)

    def to_rows(self, y: Tensor) -> Tensor:
        """States (batch, n), components first, as rows of components (batch · n / k, k)."""
        return y.reshape(len(y), self.components, -1).mT.reshape(-1, self.components) if self.components else y

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`to_rows`."""
        batch = len(self._bad_since)
        return rows.reshape(batch, -1, self.components).mT.reshape(batch, -1) if self.components else rows

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next standard normal numbers, for states or rows of them: those of a sample are drawn together."""
        batch = len(self._bad_since)
        return self.noise.normal((batch, math.prod(shape) // max(batch, 1)), dtype, device).reshape(shape)

    def motion(
        self, between: tuple[float, float], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The increment of the Brownian motion between two times of the SDE, over the root of their distance."""
        if not isinstance(self.noise, BrownianRows):
            return self.normal(shape, dtype, device)
        return self._along(between, shape, dtype, device)[0]

    def motion_in(self, a: float, b: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """:meth:`motion` between two values of the clock's variable r."""
        if not isinstance(self.noise, BrownianRows):
            return self.normal(shape, dtype, device)
        return self._along(self._times_of(a, b), shape, dtype, device)[0]

    def area_in(self, a: float, b: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Its space-time area, likewise normalised, of variance 1/12: ∫ (w - w_a) dr = h (Δw / 2 + area)."""
        if not isinstance(self.noise, BrownianRows):
            return self.normal(shape, dtype, device) * math.sqrt(1.0 / 12.0)
        return self._along(self._times_of(a, b), shape, dtype, device)[1]

    def _times_of(self, a: float, b: float) -> tuple[float, float]:
        return self._at(a)[0], self._at(b)[0]

    def _along(
        self, between: tuple[float, float], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        batch = len(self._bad_since)
        found = self.noise.step(*between, (batch, math.prod(shape) // max(batch, 1)))
        return tuple(part.reshape(shape).to(device=device, dtype=dtype) for part in found)

    def time(self, r: Tensor | float) -> tuple[Tensor, float]:
        """t () in float64, and |dt/dr|."""
        r = _number(r)
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
        r = _number(r)
        if self._last is not None and self._last[0] == r and self._last[1] is y:
            return self._last[2]  # torchsde asks for the first drift twice
        rows, y = y, self.from_rows(y)
        t, rate = self.time(r)
        value = self._asked(self._drift, y, t)
        rate *= length
        value = self.to_rows(value * (-rate if self.backward else rate))
        self._last = (r, rows, value)
        return value

    def _asked(self, function: Coefficient, y: Tensor, t: Tensor) -> Tensor:
        """A function of flattened states and t, as one call of the score."""
        self._require_budget(y, float(t))
        try:
            value = function(y, t)
        except Exception as error:
            self.failure = error  # the user's own, which libraries' errors must not be taken for
            raise
        self._count(y, value, float(t))
        return value

    def diffusion(self, r: Tensor | float, y: Tensor, length: float = 1.0) -> Tensor:
        """The factor of dw(r), (batch, n), or a matrix for each row (batch · n / k, k, m); over a step, of ξ."""
        t, rate = self.time(r)
        rate *= length
        if self.components:
            return (self._diffusion(self.from_rows(y), t) * math.sqrt(rate)).to(y.dtype)
        return (self._diffusion(y, t) * math.sqrt(rate)).to(y.dtype).expand_as(y)

    def stratonovich_drift(self, r: Tensor | float, y: Tensor) -> Tensor:
        """The drift of the same equation in the sense of Stratonovich, dy/dr."""
        value = self.drift(r, y)
        if self._correction is None:
            return value
        t, rate = self.time(r)
        return value - self.to_rows(rate * self._correction(self.from_rows(y), t).expand_as(self.from_rows(y)))

    # ---------------------------------------------------------------- for methods that know the kernel

    def times(self, steps: int) -> np.ndarray:
        """The times of a solve in ``steps`` steps from its start to its end, (steps + 1,); see the clock's."""
        times = self.clock.times(steps)
        return times[::-1].copy() if self.backward else times

    def score(self, u: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p_t of states (batch, *event), at one time or (batch,); one call."""
        t = torch.as_tensor(t, dtype=torch.float64)
        last = float(t.max()) if t.ndim else float(t)
        self._require_budget(u, last)
        value = self._score(u, t)
        self._count(u.flatten(1), value.flatten(1), last)
        return value

    def flat_score(self, y: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t of flattened states (batch, n) at one time; one call."""
        return self._asked(lambda y, t: self._score(y.reshape(-1, *self.event), t).flatten(1), y, t)

    def on_grid(self, times: Tensor, like: Tensor) -> GridScore:
        """The score at the fixed ``times`` (n,) of a solve, for states like ``like``; see :meth:`called`."""
        self.grid_times = times.tolist()
        return self._on_grid(times, like)

    def called(self, u: Tensor, value: Tensor, i: int) -> None:
        """To be called after the score was called at time number ``i`` of :meth:`on_grid`."""
        if self.nfe >= self.max_calls:
            self._require_budget(u, self.grid_times[i])
        self.nfe += 1
        if self.on_call is not None:
            self.on_call()
        self._times.append(self.grid_times[i])
        self._sums.append(value.detach().sum())  # not read now: that would wait for an accelerator
        if len(self._sums) == _CHECK_EVERY:
            self._read_sums(u.detach().flatten(1))

    def _read_sums(self, y: Tensor) -> None:
        """Finds the first of the calls noted that was not finite."""
        sums, self._sums = self._sums, []
        first = (~torch.isfinite(torch.stack(sums))).nonzero().flatten()
        if len(first):
            bad = ~torch.isfinite(y).all(1)  # what is not finite stays so
            call = float(self.nfe - len(sums) + 1 + int(first[0]))
            self._bad_since = torch.where(bad, call, self._bad_since)
        self._read(y)

    def observe(self, step: int, t: float, y: Tensor) -> None:
        """To be called after step number ``step`` (from 1), with the state (batch, ...) at time t."""
        if self.on_step is not None:
            self.on_step(step, t, y)

    def _require_budget(self, y: Tensor, t: float) -> None:
        if self.nfe >= self.max_calls:
            raise MaxStepsError(
                f"the budget of {self.max_calls} calls was used up at t = {t:.6g}: loosen rtol and atol, take "
                "fixed steps, or raise max_calls. A score that draws its own randomness never lets an adaptive "
                "method converge.",
                t=t, nfe=self.nfe, partial=y.detach(),
            )  # fmt: skip

    def _count(self, y: Tensor, value: Tensor, t: float) -> None:
        self.nfe += 1
        if self.on_call is not None:
            self.on_call()
        self._watch(y, value, t)

    @property
    def last_time(self) -> float:
        """The time of the last call of the drift."""
        return self._times[-1] if self._times else math.nan

    @property
    def noise_depends_on_state(self) -> bool:
        """Whether Itô and Stratonovich differ."""
        return self._correction is not None

    def finish(self, y: Tensor) -> Tensor:
        """After a solve: the state (batch, n), once it is known to be finite."""
        if self._sums:
            self._read_sums(y.detach())
        self._read(y.detach())
        return y

    def _watch(self, y: Tensor, value: Tensor, t: float) -> None:
        """Notes which samples are not finite at this call.

        The CPU says so at once; an accelerator is read every 50 calls, or at each one under ``eager_checks``.
        """
        self._times.append(t)
        y, value = y.detach(), value.detach()
        on_cpu = value.device.type == "cpu"
        suspicious = not (on_cpu and math.isfinite(float(value.sum())))
        if suspicious:
            finite = torch.isfinite(value.sum(1))
            self._bad_since = torch.minimum(self._bad_since, torch.where(finite, math.inf, float(self.nfe)))
        if self.nfe % _CHECK_EVERY == 0 or (suspicious and (on_cpu or self.eager_checks)):
            self._read(y)

    def _read(self, y: Tensor) -> None:
        bad = torch.isfinite(self._bad_since)
        exploded = ~(y.abs() <= self._limit).all(1)
        if not bool((bad | exploded).any()):
            del self._times[:-1]  # memory must not grow with the number of steps
            return
        call, t, what = self.nfe, self.last_time, "the state exploded"
        if bool(bad.any()):
            call = int(self._bad_since.min())
            t = self._times[call - 1 - (self.nfe - len(self._times))]
            what = "the drift (the score, or the equation itself) is not finite"
        rows = _rows(bad | exploded)
        raise NonFiniteStateError(
            f"{what} at t = {t:.6g}, call {call}, in {len(rows)} of {len(y)} samples: {rows[:8]}"
            f"{' ...' if len(rows) > 8 else ''}.{self.hint}",
            t=t, nfe=self.nfe, bad_rows=rows, partial=y.detach(),
        )  # fmt: skip


class Normalised:
    r"""The flow of one schedule for all coordinates, for y = u / S with S² = alpha² c² + sigma²:

        dy/dr = -ζ ζ' / (c² + ζ²) (y + S s(S y, t)),      ζ = sigma / alpha.

    Neither f nor g occurs, nor do their pauses, pulses and jumps, and the bracket is 0 for Gaussian data of scale c.

    Args:
        problem: an ODE, whose calls it counts.
        curve: u -> t and ζ ζ' / (c² + ζ²).
    """

    def __init__(self, problem: Problem, curve: Callable[[float], tuple[float, float]]) -> None:
        self._problem, self._curve = problem, curve

    def size(self, r: float) -> float:
        """S at r."""
        return self._size(self.time(r))

    def time(self, r: float) -> float:
        """t at r."""
        return self._time(r)[0]

    def _time(self, r: float) -> tuple[float, float]:
        return self._curve(1.0 - r if self._problem.backward else r)

    def _size(self, t: float) -> float:
        alpha, sigma, _ = self._problem.kernel.numbers.of_kernel(torch.tensor(t, dtype=torch.float64))
        return math.hypot(float(alpha) * float(self._problem.scale), float(sigma))

    def drift(self, r: Tensor | float, y: Tensor) -> Tensor:
        """dy/dr; one call."""
        t, rate = self._time(_number(r))
        size = self._size(t)
        score = self._problem.flat_score(y * size, torch.tensor(t, dtype=torch.float64))
        return (y + size * score) * (rate if self._problem.backward else -rate)


def _number(r: Tensor | float) -> float:
    return float(r.detach() if isinstance(r, Tensor) else r)  # steps chosen by an error have its graph


def _rows(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
