"""A training run: what each step draws, one step, and what callbacks see of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from sdeflow.errors import CheckpointError, TrainingDivergedError
from sdeflow.numerics.conditions import Condition, leaves, mapped, of_samples, picked
from sdeflow.numerics.memory import memory_hint
from sdeflow.numerics.noise import NoiseStream, mixed_seed
from sdeflow.scores import Score
from sdeflow.training.batches import Batches
from sdeflow.training.ema import MovingAverage
from sdeflow.training.objectives import Batch, Objective
from sdeflow.training.objectives.base import Draws
from sdeflow.training.times import WeightedTimes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sdeflow.training.callbacks import Callback, Checkpoints

__all__ = ["Fit", "Run", "drawn_steps", "recent", "seed_global"]

_PATIENCE = 10  # steps in a row whose loss is not finite
_HINT = (
    "A step does not fit into memory: lower batch_size, or pass accelerator=Accelerator(gradient_accumulation_steps=k) "
    "for the same step in k parts. Checkpoints that were written stay whole."
)
_BLOCK_NUMBERS = 2**18  # at most so many numbers are simulated at once


@dataclass
class Fit:
    """What a training run did.

    Attributes:
        losses: the loss of each step, NaN where the step was skipped.
        steps: the number of steps.
        skipped: how many steps had a loss or gradient that was not finite.
        validation: (step, objective, standard error) of the moving average on the validation data.

    All are of the whole run, with the earlier calls of a resumed one.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    skipped: int = 0
    validation: list[tuple[int, float, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        skipped = f", skipped={self.skipped}" if self.skipped else ""
        held_out = f", validation: {self.validation[-1][1]:.4g}" if self.validation else ""
        return (
            f"Fit(steps={self.steps}, losses: {len(self.losses)}, lately {recent(self.losses):.4g}{skipped}{held_out})"
        )


class Run:
    """The state of a run, as callbacks see it.

    Args:
        score: the score in training.
        objective: what it is trained on.
        times: the law of the times.
        accelerator: an accelerate ``Accelerator``.
        optimiser: of the score's parameters.
        rate: maps a step to a factor of the optimiser's own learning rates, or None to leave them alone.
        clip: the largest norm of the gradient.
        average: the moving average.
        steps: the steps of the whole run.

    Attributes:
        score: the score, with the weights of the step.
        optimiser: the optimiser, as accelerate wraps it.
        objective: what is trained on.
        average: the moving average; ``average.score`` is a score with its weights.
        steps: how many steps the whole run has.
        result: the :class:`Fit` that ``fit`` returns.
        stopped: whether a callback has asked for the end.
        callbacks: what is called after each step, in this order.
        checkpoints: the callback that writes checkpoints, or None.
    """

    def __init__(
        self,
        score: Score,
        objective: Objective,
        times: WeightedTimes,
        accelerator: Accelerator,
        optimiser: Optimizer,
        rate: Callable[[int], float] | None,
        clip: float,
        average: MovingAverage,
        steps: int,
    ) -> None:
        self.score, self.objective, self.average, self.steps = score, objective, average, steps
        self.result, self.stopped = Fit(), False
        self.callbacks: Sequence[Callback] = ()
        self.checkpoints: Checkpoints | None = None
        self.accelerator, self._times, self._rate, self._clip = accelerator, times, rate, clip
        self._rates = [group["lr"] for group in optimiser.param_groups] if rate is not None else []
        self._loss, self.optimiser = accelerator.prepare(_Loss(score, objective), optimiser)
        self._failures = 0

    @property
    def step(self) -> int:
        """The number of steps done in all."""
        return self.result.steps

    @property
    def losses(self) -> list[float]:
        """The losses of the whole run so far."""
        return self.result.losses

    @property
    def last(self) -> bool:
        """Whether no step follows."""
        return self.stopped or self.step == self.steps

    def stop(self) -> None:
        """Ends the run after this step, as if it had been its last."""
        self.stopped = True

    def take(self, batch: Batch, weight: Tensor, y: Condition | None, interrupted: bool = False) -> None:
        """One step on a batch: it counts, or is skipped and changes nothing; then the callbacks.

        Where the process was ``interrupted``, or another of the run's, the run ends after the step.

        Raises:
            TrainingDivergedError: after too many skipped steps in a row.
        """
        loss = self._step(batch, weight, y)
        self.result.losses.append(loss)
        self.result.skipped += math.isnan(loss)
        self.result.steps += 1
        if self.any_process(interrupted):
            self.stop()
        try:
            for callback in self.callbacks:
                callback.after_step(self, loss)
        except CheckpointError:
            raise
        except BaseException:
            if self.checkpoints is not None:
                self.checkpoints.rescue(self)
            raise

    def any_process(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process of the run: all must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    def keep_average(self) -> None:
        """Puts the moving average in the score's place, and the optimiser's own learning rates back."""
        self.score.load_state_dict(self.average.score.state_dict())
        self._set_rates(1.0)

    def _step(self, batch: Batch, weight: Tensor, y: Condition | None) -> float:
        """The loss of one step, or NaN where it was skipped and changed nothing."""
        buffers = [buffer.clone() for buffer in self.score.buffers()]
        if self._rate is not None:
            self._set_rates(self._rate(self.step))
        self.optimiser.zero_grad()
        loss = self._gradient(batch, weight, y)
        norm = self.accelerator.clip_grad_norm_(self.score.parameters(), self._clip)
        value = float(self.accelerator.reduce(loss.detach(), "mean"))
        if math.isfinite(value) and math.isfinite(float(norm)):
            self.optimiser.step()
            self._failures = 0
            return value
        for buffer, before in zip(self.score.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self._failures += 1
        if self._failures >= _PATIENCE:
            kept = "" if self.checkpoints is None else self.checkpoints.described()
            raise TrainingDivergedError(
                f"the loss or its gradient was not finite for {self._failures} steps up to step {self.step}{kept}: "
                "lower lr, or look for extreme values in the data."
            )
        return math.nan

    def _gradient(self, batch: Batch, weight: Tensor, y: Condition | None) -> Tensor:
        """The mean loss of a batch, and its gradient, put into the parameters.

        An Accelerator that accumulates gradients gets the batch in as many parts: the same step in less memory.
        """
        samples, accumulated = len(weight), self.accelerator.gradient_accumulation_steps
        size, total = -(-samples // accumulated), torch.zeros((), device=weight.device)
        for first in range(0, samples, size):
            rows = slice(first, first + size)
            last = first + size >= samples
            with memory_hint(_HINT), nullcontext() if last else self.accelerator.no_sync(self._loss):
                with self.accelerator.autocast():
                    part = self._loss(None if y is None else picked(y, rows), weight[rows], *(b[rows] for b in batch))
                    loss = part * (len(weight[rows]) / samples)
                # accelerate divides by the number of parts that were declared
                self.accelerator.backward(loss * accumulated / self._times.total)
            total = total + loss.detach()
        return total

    def _set_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=False):
            group["lr"] = rate * factor


class _Loss(torch.nn.Module):
    """The mean loss of a batch as a module, so that accelerate's wrappers see every call."""

    def __init__(self, score: Score, objective: Objective) -> None:
        super().__init__()
        self.score, self.objective = score, objective

    def forward(self, y: Condition | None, weight: Tensor, *batch: Tensor) -> Tensor:
        loss = self.objective.loss(self.score, batch, y)
        return (weight.to(loss.dtype) * loss).mean()


def drawn_steps(
    objective: Objective,
    draws: Draws,
    batches: Batches,
    batch_size: int,
    times: WeightedTimes,
    seed: int,
    done: int,
    accelerator: Accelerator,
    dropped: tuple[float, Condition] | None = None,
) -> Iterator[tuple[Batch, Tensor, Condition | None]]:
    """The batch of each step from ``done`` on, the weights of its samples, and their conditions.

    With ``dropped``, a share and what stands for no condition, each sample's condition is replaced with that
    probability. A block of steps is drawn at once, and from its first step whatever ``done`` is, so that it never
    differs. Global generators are seeded.
    """
    numbers = max(1, batch_size * math.prod(batches.first.shape[1:]))
    block = max(1, min(objective.most_steps, _BLOCK_NUMBERS // numbers))
    first = done - done % block
    seed_global(mixed_seed(seed, first), accelerator)
    source = batches.from_step(first)
    while True:
        parts = []
        for step in range(first, first + block):
            seed_global(mixed_seed(seed, step), accelerator)  # for what the data set and dropout draw
            parts.append(next(source))
        sizes, device = [len(x) for x, _ in parts], parts[0][0].device
        noise = NoiseStream(mixed_seed(seed, first, accelerator.process_index), "training")
        t, weight = (torch.cat(parts).to(device) for parts in zip(*(times.draw(n, noise) for n in sizes), strict=True))
        drawn = (weight, *draws(torch.cat([x for x, _ in parts]) if block > 1 else parts[0][0], t, noise))
        for step, (_, y), counted, *batch in zip(
            range(first, first + block), parts, *(part.split(sizes) for part in drawn), strict=True
        ):
            if step >= done:
                if block > 1:
                    seed_global(mixed_seed(seed, step, 1), accelerator)
                yield tuple(batch), counted, _dropped(y, dropped, mixed_seed(seed, step, accelerator.process_index))
        first += block


def _dropped(y: Condition | None, dropped: tuple[float, Condition] | None, seed: int) -> Condition | None:
    """The conditions of a batch, some of them replaced by none."""
    if y is None or dropped is None:
        return y
    share, null = dropped
    samples = len(next(leaves(y)))
    gone = NoiseStream(seed, "label dropout").uniform((samples, 1), torch.float64)[:, 0] < share

    def replaced(leaf: Tensor, none: Tensor) -> Tensor:
        mask = gone.to(leaf.device).reshape(-1, *(1,) * (leaf.ndim - 1))
        return torch.where(mask, none.to(leaf), leaf)

    return mapped(replaced, y, of_samples(null, samples))


def seed_global(seed: int, accelerator: Accelerator) -> None:
    """Seeds torch's global generators, within the fork that ``fit`` makes; the CPU's alone where that is enough."""
    if accelerator.device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for every accelerator: 0.8 ms
    else:
        torch.manual_seed(seed)


def recent(losses: list[float]) -> float:
    """The mean of the last hundred losses, those of skipped steps left out."""
    finite = [value for value in losses[-100:] if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
