"""Denoising score matching."""

from __future__ import annotations

from torch import Tensor

from sdeflow.numerics.conditions import Condition
from sdeflow.numerics.noise import NoiseStream
from sdeflow.scores import ScoreFunction
from sdeflow.training.losses import denoising_score_matching
from sdeflow.training.objectives.base import Batch, Draws, Objective

__all__ = ["Denoising"]


class Denoising(Objective):
    """Denoising score matching to a Gaussian kernel (Vincent 2011; arXiv:2011.13456, eq. 7).

        L(t) = w(t) E ‖s(x_t, t) - ∇ log p(x_t | x_0)‖²

    A batch is (x_0, t, eps), x_0 and eps (batch, *event) and t (batch,); x_t = alpha x_0 + offset + sigma eps.

    >>> import torch, sdeflow
    >>> objective = sdeflow.objectives.Denoising(weighting="likelihood")
    >>> sde = sdeflow.catalog.VP()
    >>> exact = sdeflow.scores.GaussianMixture(sde, [[0.0, 0.0]], [1.0])
    >>> mean, error = objective.value(exact, exact.sample(1000, seed=0))
    >>> blind = sdeflow.Score(lambda x, t: 0 * x, sde, predicts="noise")
    >>> mean < objective.value(blind, exact.sample(1000, seed=0))[0]
    True
    """

    def draws(self, score: ScoreFunction) -> Draws:
        def draw(data: Tensor, t: Tensor, noise: NoiseStream) -> Batch:
            x_0 = self.states(score, data)
            return x_0, t, noise.normal(tuple(x_0.shape), x_0.dtype, x_0.device)

        return draw

    def loss(self, score: ScoreFunction, batch: Batch, y: Condition | None = None) -> Tensor:
        x_0, t, eps = batch
        return denoising_score_matching(score, x_0, t, eps, self.weighting, y)
