"""Scores of x given y, and classifier-free guidance between them and the unconditional score."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdeflow.numerics.checks import checked_real
from sdeflow.numerics.conditions import (
    Condition,
    checked_condition,
    concatenated,
    distinct,
    from_named_leaves,
    key_of,
    named_leaves,
    of_samples,
    picked,
    samples_of,
)
from sdeflow.numerics.linear import per_sample
from sdeflow.scores.function import Wrapping
from sdeflow.scores.readout import GridScore

if TYPE_CHECKING:
    from sdeflow.scores.network import Score

__all__ = ["Conditional", "Guided", "Held"]

_FORGOTTEN = 1e-2  # alpha std / sigma at T, below which p(x_T) is the same for every condition


class Held(nn.Module):
    """A condition as buffers, which move and are saved with the module that holds them."""

    def __init__(self, y: Condition) -> None:
        super().__init__()
        for name, leaf in named_leaves(y):
            self.register_buffer(name, leaf)

    @property
    def value(self) -> Condition:
        """The condition."""
        return from_named_leaves({name: leaf for name, leaf in self._buffers.items() if leaf is not None})

    def _apply(self, fn: Any, recurse: bool = True) -> Held:
        """Moves the condition, and leaves its dtypes alone: a network's cast is no cast of conditions."""
        kept = {name: leaf.dtype for name, leaf in self._buffers.items() if leaf is not None}
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            leaf = self._buffers[name]
            self._buffers[name] = None if leaf is None else leaf.to(dtype)
        return self


class Conditional(Wrapping):
    """The score of x given y, with y fixed: a score like any other.

    Args:
        score: a :class:`~sdeflow.scores.network.Score` whose network takes conditions.
        y: a tensor, or a tuple or dict of such. What has the batch's length is one condition for each sample; what is a
            number or has length 1 holds for all.

    Raises:
        DataError: for conditions that are no tensors, or not finite, and at a call for another number of samples.
    """

    score: Score

    def __init__(self, score: Score, y: Condition) -> None:
        super().__init__(score)
        self.held = Held(checked_condition(y))

    @property
    def y(self) -> Condition:
        """The condition."""
        return self.held.value

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.score(x, t, self.y)

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.score.noise(x, t, self.y)

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.score.denoise(x, t, self.y)

    def on_grid(self, times: Tensor, like: Tensor, dtype: torch.dtype) -> GridScore:
        return self.score.on_grid(times, like, dtype, self.y)

    def rows(self, index: Tensor | slice) -> Conditional:
        if samples_of(self.y) is None:
            return self
        part = copy.copy(self)  # of conditions that were checked
        part._modules = {**self._modules, "held": Held(picked(self.y, index))}
        return part

    def of_batch(self, samples: int) -> Conditional:
        of_samples(self.y, samples)
        return self

    @property
    def samples(self) -> int | None:
        return samples_of(self.y)

    def conditions(self, x: Tensor) -> Tensor | None:
        return distinct(self.y)

    @property
    def wrapping(self) -> tuple[object, ...]:
        return ("given", *key_of(self.y), *super().wrapping)

    def prior_moments(self) -> tuple[Tensor, Tensor] | None:
        """The data's moments, where p(x_T) is the same for every condition; else None, for they are not those given y.

        The same means that alpha_T times the data's standard deviation is below 1 % of sigma_T: then the laws differ by
        about 1e-4 nats per dimension (KL).
        """
        moments, kernel = self.score.data_moments(), self.gaussian
        if moments is None or kernel is None or kernel.coupled:
            return None
        alpha, sigma, _ = kernel.coefficients(torch.tensor(kernel.T, dtype=torch.float64))
        return moments if float((alpha / sigma).max() * moments[1].max()) <= _FORGOTTEN else None

    def marginal_law(self, t: float) -> None:
        """None: that of all data is not that given y."""


class Guided(Wrapping):
    """Classifier-free guidance (arXiv:2207.12598): s(x) + strength (s(x|y) - s(x)), one call of twice the samples.

    Strength 1 is the score given y, 0 the unconditional one. Above 1 this is not the score of any diffused law: samples
    are nearer to the modes of p(y|x), and less diverse.

    Args:
        score: a :class:`Conditional` whose network was trained with label dropout.
        strength: how much of the difference is taken.
        interval: (low, high), the times at which there is guidance (arXiv:2404.07724); outside, the score given y. None
            is all times.

    Raises:
        ScoreError: for a network that was not trained with label dropout.
        ValueError: for a strength that is not finite, and an interval that is none.
    """

    score: Conditional

    def __init__(self, score: Conditional, strength: float = 2.0, interval: tuple[float, float] | None = None) -> None:
        super().__init__(score)
        self.strength = checked_real(strength, "strength", "finite", math.isfinite)
        score.score.require_unconditional()
        if interval is not None:
            if not isinstance(interval, tuple | list) or len(interval) != 2 or not interval[0] < interval[1]:
                raise ValueError(f"interval must be two rising times (low, high), not {interval!r}.")
            interval = (float(interval[0]), float(interval[1]))
        self.interval = interval

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._mixed(self.score.score, x, t)

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._mixed(self.score.score.noise, x, t)

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._mixed(self.score.score.denoise, x, t)

    def _mixed(self, function: Any, x: Tensor, t: Tensor | float) -> Tensor:
        """What ``function`` (a score, noise or denoised state, all linear in the score) gives, with guidance."""
        x, time = self._entered(x, t)
        if self.interval is not None and time.ndim == 0 and not self._inside(float(time)):
            return function(x, time, self.score.y)
        twice = time if time.ndim == 0 else torch.cat([time, time])
        with_y, without = function(torch.cat([x, x]), twice, self._both(len(x))).chunk(2)
        if self.interval is None or time.ndim == 0:
            return torch.lerp(without, with_y, self.strength)
        inside = (time >= self.interval[0]) & (time <= self.interval[1])
        strength = torch.where(inside, self.strength, 1.0).to(x.dtype)
        return without + per_sample(strength, x) * (with_y - without)

    def on_grid(self, times: Tensor, like: Tensor, dtype: torch.dtype) -> GridScore:
        whole = self.score.score.on_grid(times, torch.cat([like, like]), dtype, self._both(len(like)))
        plain = self.score.on_grid(times, like, dtype)
        inside = [self._inside(time) for time in times.tolist()]

        def call(i: int, u: Tensor) -> Tensor:
            if not inside[i]:
                return plain.call(i, u)
            with_y, without = whole.call(i, torch.cat([u, u])).chunk(2)
            return torch.lerp(without, with_y, self.strength)

        return GridScore(plain.readout, call)

    def _both(self, samples: int) -> Condition:
        """The batch's conditions, and as many times none."""
        y = of_samples(self.score.y, samples)
        return concatenated(y, of_samples(self.score.score.no_condition(), samples))

    def _inside(self, time: float) -> bool:
        return self.interval is None or self.interval[0] <= time <= self.interval[1]

    def around(self, score: Any) -> Guided:
        return self if score is self.score else Guided(score, self.strength, self.interval)

    @property
    def wrapping(self) -> tuple[object, ...]:
        return ("guided", self.strength, self.interval, *super().wrapping)

    def extra_repr(self) -> str:
        """The strength and the interval."""
        return f"strength={self.strength:g}" + ("" if self.interval is None else f", interval={self.interval}")
