"""Score matching on pairs (x_t, target), where there is no Gaussian kernel."""

from __future__ import annotations

from torch import Tensor

from sdeflow.numerics.conditions import Condition
from sdeflow.numerics.linear import maps_of
from sdeflow.numerics.noise import NoiseStream
from sdeflow.scores import ScoreFunction
from sdeflow.training.losses import KernelPairs, Pairs, score_error
from sdeflow.training.objectives.base import Batch, Draws, Objective
from sdeflow.training.pairs import SimulatedPairs
from sdeflow.training.times import Times
from sdeflow.training.weightings import Weighting

__all__ = ["KernelMatching", "LocalMatching"]

_GAP = 5  # see sdeflow.training.pairs
_SIMULATION_STEPS = 200
_BLOCK = 16  # simulated at once, which costs little more than one


class KernelMatching(Objective):
    """Score matching to an exact kernel that is not Gaussian.

        L(t) = E ‖rootᵀ (s(x_t, t) - ∇ log p(x_t | x_0))‖²

    with the root of :class:`sdeflow.training.losses.KernelPairs`. A batch is (x_t, t, target, root), all but t
    (batch, *event).

    Raises:
        ValueError: for a weighting or times in the log-SNR, which these SDEs do not have.
        WeightingError: at :meth:`draws`, for a weighting under which the loss is infinite.
    """

    needs = "exact kernel"

    def draws(self, score: ScoreFunction) -> Draws:
        return _drawn_from(KernelPairs(score, self.weighting))

    def loss(self, score: ScoreFunction, batch: Batch, y: Condition | None = None) -> Tensor:
        return _error_of_pairs(score, batch, y)


class LocalMatching(Objective):
    """Score matching to the law of the last step of a simulated path, of any SDE (arXiv:2407.07998).

        L(t) = E ‖rootᵀ (s(x_t, t) - ∇ log p(x_t | x_s))‖²,    t - s = gap T / simulation_steps

    with the root of :class:`sdeflow.training.pairs.SimulatedPairs`. A batch is (x_t, t, target, root).

    Args:
        weighting: "score", "likelihood" or a function w(t).
        times: "t" (the default) or a density of t.
        gap: the length of the last step, in steps of the simulation. A longer one gives targets of less variance and
            more bias.
        simulation_steps: the steps of a path.

    Raises:
        ValueError: for a weighting or times in the log-SNR; at :meth:`draws`, for a gap or steps that make no sense.
        ScheduleError: at :meth:`draws`, where the noise does not reach every component within a gap.
    """

    needs = "nothing"
    most_steps = _BLOCK

    def __init__(
        self,
        weighting: Weighting = "score",
        times: Times | None = None,
        gap: int = _GAP,
        simulation_steps: int = _SIMULATION_STEPS,
    ) -> None:
        super().__init__(weighting, times)
        self.gap, self.simulation_steps = gap, simulation_steps

    def draws(self, score: ScoreFunction) -> Draws:
        return _drawn_from(SimulatedPairs(score, self.weighting, self.gap, self.simulation_steps))

    def loss(self, score: ScoreFunction, batch: Batch, y: Condition | None = None) -> Tensor:
        return _error_of_pairs(score, batch, y)


def _drawn_from(pairs: KernelPairs | SimulatedPairs) -> Draws:
    def draw(data: Tensor, t: Tensor, noise: NoiseStream) -> Batch:
        x_t, t, target, root = pairs(data, t, noise)
        return x_t, t, target, root.values

    return draw


def _error_of_pairs(score: ScoreFunction, batch: Batch, y: Condition | None) -> Tensor:
    x_t, t, target, root = batch
    return score_error(score, Pairs(x_t, t, target, maps_of(score.declaration.coupled)(root)), y)
