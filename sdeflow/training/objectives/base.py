"""What every objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from sdeflow.errors import NotAffineError
from sdeflow.numerics.checks import checked_count
from sdeflow.numerics.conditions import Condition, on
from sdeflow.numerics.noise import NoiseStream, mixed_seed, resolve_seed
from sdeflow.scores import ScoreFunction
from sdeflow.scores.function import evaluating
from sdeflow.solving.simulate import start
from sdeflow.training.batches import SampleData, Samples
from sdeflow.training.identity import shown
from sdeflow.training.losses import data_std_of
from sdeflow.training.times import Times, WeightedTimes, default_times, require_times
from sdeflow.training.weightings import Weighting, mean_weight, of_times, require_weighting, share

if TYPE_CHECKING:
    pass

__all__ = ["Batch", "Draws", "Objective"]

Batch = tuple[Tensor, ...]
"""What a step compares: tensors whose first dimension is the batch."""
Draws = Callable[[Tensor, Tensor, NoiseStream], Batch]
"""Draws a batch for data (n, *event) at times (n,)."""


class Objective(ABC):
    r"""An objective of a score: the mean over data, times and noise of a loss,

        c ∫ E L(t) dt over [cutoff, T],    c = :attr:`share`.

    A subclass says what it needs of an SDE (``needs``), how a batch is drawn (:meth:`draws`) and the loss of a batch
    (:meth:`loss`).

    Args:
        weighting: a name or a function w(t); see :mod:`sdeflow.training.weightings`.
        times: a name or a density of t; see :mod:`sdeflow.training.times`. None is the weighting's own law.

    Attributes:
        needs: what of an SDE it needs: a "Gaussian kernel" (which all weightings and laws of times are for), another
            "exact kernel", or "nothing".
        most_steps: the number of steps whose batches are drawn at once.

    Raises:
        ValueError: for a weighting or times that it does not have.
    """

    needs: ClassVar[Literal["Gaussian kernel", "exact kernel", "nothing"]] = "Gaussian kernel"
    most_steps: ClassVar[int] = 1

    def __init__(self, weighting: Weighting = "score", times: Times | None = None) -> None:
        gaussian = self.needs == "Gaussian kernel"
        require_weighting(weighting, gaussian)
        self.weighting = weighting
        self.times = default_times(weighting, gaussian) if times is None else times
        require_times(self.times, gaussian)

    @abstractmethod
    def draws(self, score: ScoreFunction) -> Draws:
        """How batches are drawn for this score: a function of data (n, *event), times (n,) and a noise stream."""

    @abstractmethod
    def loss(self, score: ScoreFunction, batch: Batch, y: Condition | None = None) -> Tensor:
        """L(t) of each sample, averaged over its coordinates, (batch,).

        Args:
            score: the score.
            batch: what :meth:`draws` gave.
            y: a condition for each sample, for a network that takes them.
        """

    @property
    def share(self) -> float:
        """c, what the objective is of ∫ L(t) dt: ½ for "likelihood", otherwise 1."""
        return share(self.weighting)

    def weights(self, score: ScoreFunction, example: Tensor, t: Tensor) -> Tensor:
        """c L(t) for an error of unit variance, (n,) in float64: it scales the gradient, and "importance" follows it.

        Args:
            score: the score.
            example: one whole state, (1, *event).
            t: times, (n,), in float64.
        """
        if self.needs == "Gaussian kernel":
            kernel = score.kernel.require_gaussian(type(self).__name__)
            return mean_weight(kernel, self.weighting, example, t, data_std_of(score, self.weighting))
        return of_times(self.weighting, t) if callable(self.weighting) else torch.full_like(t, self.share)

    def states(self, score: ScoreFunction, data: Tensor) -> Tensor:
        """Whole states (n, *event) from data: auxiliary components are added without their P0."""
        if self.needs == "Gaussian kernel":
            return score.kernel.require_gaussian(type(self).__name__).lift(data, noisy=False)
        return start(score.declaration, data)

    def require(self, score: ScoreFunction) -> None:
        """Raises a NotAffineError where the score's SDE has not what this objective needs."""
        gaussian = score.gaussian is not None
        met = {"Gaussian kernel": gaussian, "exact kernel": score.kernel.exact and not gaussian, "nothing": True}
        if not met[self.needs]:
            other = ", but not a Gaussian one," if self.needs == "exact kernel" else ""
            raise NotAffineError(
                f"{type(self).__name__} needs a {self.needs}{other} which this SDE has not; fit(objective=None) takes "
                "what fits the SDE."
            )

    def law(self, score: ScoreFunction, example: Tensor) -> WeightedTimes:
        """Where times are drawn, each with what its loss counts."""
        return WeightedTimes(
            self.times,
            score.kernel,
            lambda t: self.weights(score, example, t),
            self.share,
            gaussian=self.needs == "Gaussian kernel",
        )

    def value(
        self, score: ScoreFunction, data: SampleData, seed: int = 0, batch_size: int = 256
    ) -> tuple[float, float]:
        """The objective and its standard error over data, times and noise, the network in eval mode.

        Each sample is used once, at its own time of n strata and with its own noise. These depend on the seed and the
        batch size alone, so that two scores are compared at the same draws. With v_i the samples' losses in the order
        of their times, the squared standard error is Σ (v_{i+1} - v_i)² / (2 (n - 1) n). It leaves out how the loss
        varies with time, which strata remove from the error.

        Args:
            score: any score of an SDE that the objective serves.
            data: (n, *event), a tensor, an array or a list; a tuple (x, y) of it with conditions; or a Dataset of
                samples.
            seed: of the times, their order and the noise.
            batch_size: samples evaluated at once.

        Returns:
            The mean, in the unit of ``fit``'s losses, and its standard error, NaN for a single sample.

        Raises:
            NotAffineError: for an SDE that the objective does not serve.
            DataError: for data that are empty or not finite, and for a DataLoader.
        """
        self.require(score)
        samples, batch_size, seed = Samples(data), checked_count(batch_size, "batch_size"), resolve_seed(seed)
        n, draws, found = len(samples), self.draws(score), []
        device = next((tensor.device for tensor in (*score.parameters(), *score.buffers())), torch.device("cpu"))
        stream = NoiseStream(seed, "objective")
        order = stream.uniform((1, n), torch.float64)[0].argsort(stable=True).tolist()
        dtype = score.dtype
        with torch.no_grad(), evaluating(score):
            example = self.states(score, samples.take(order[:1], dtype)[0]).cpu()
            t, weight = self.law(score, example).draw(n, stream)
            for first in range(0, n, batch_size):
                part = slice(first, first + batch_size)
                x, y = samples.take(order[part], dtype)
                noise = NoiseStream(mixed_seed(seed, first), "objective")
                batch = draws(x.to(device), t[part].to(device), noise)
                loss = self.loss(score, batch, None if y is None else on(y, device))
                found.append(weight[part] * loss.double().cpu())
        values = torch.cat(found)
        spread = float(values.diff().square().sum()) / (2 * (n - 1)) if n > 1 else float("nan")
        return float(values.mean()), (spread / n) ** 0.5

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, as JSON holds it: the class and its attributes."""
        return {"objective": type(self).__name__, **{name: shown(value) for name, value in vars(self).items()}}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(value)!r}' for name, value in vars(self).items())})"


def _shown(value: object) -> object:
    """``value`` as JSON holds it: a function's own text would not tell it from another."""
    if value is None or isinstance(value, str | int | float):
        return value
    return "a function" if callable(value) else repr(value)
