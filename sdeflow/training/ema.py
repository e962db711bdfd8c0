"""The moving average of a run's weights, which sampling uses afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from sdeflow.scores import Score

if TYPE_CHECKING:
    from sdeflow.training.run import Run

__all__ = ["MovingAverage"]

Tensors = list[Tensor] | tuple[Tensor, ...]


class _Averaged(AveragedModel):
    module: Score  # a copy of the score


class MovingAverage:
    """An exponential moving average of the weights and buffers, a callback.

    Args:
        score: the score in training.
        decay: of the average, reached as (1 + n) / (10 + n) after n updates.

    Attributes:
        score: a score with the averaged weights.
    """

    def __init__(self, score: Score, decay: float) -> None:
        self._averaged = _Averaged(score, multi_avg_fn=_moving_average(decay), use_buffers=True)
        self.score = self._averaged.module

    @property
    def updates(self) -> Tensor:
        """The number of steps averaged, ()."""
        return self._averaged.n_averaged

    def after_step(self, run: Run, loss: float) -> None:
        """Counts the weights of this step, unless it was skipped."""
        if math.isfinite(loss):
            self._averaged.update_parameters(run.score)


def _moving_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """The moving average's update, its decay reached as (1 + n) / (10 + n)."""

    @torch.no_grad()
    def update(averages: Tensors, current: Tensors, n: Tensor | int) -> None:
        if averages[0].is_floating_point():  # they come grouped by dtype
            weight = 1.0 - min(decay, (1.0 + float(n)) / (10.0 + float(n)))
            torch._foreach_lerp_(averages, current, weight)
        else:
            torch._foreach_copy_(averages, current)

    return update
