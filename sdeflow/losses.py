r"""Denoising score matching (Vincent 2011; arXiv:2011.13456, eq. 7).

    L(t) = w(t) E ‖s(x_t, t) - ∇ log p(x_t | x_0)‖²,   x_t ~ p(x_t | x_0)

whose minimiser is ∇ log p_t whatever w > 0. Since ∇ log p(x_t | x_0) = -sigma⁻ᵀ eps, it is computed from the
error of eps, in which nothing is large near t = 0. Two weightings are derived:

    "score"        w = 1 / E|∇ log p(x_t | x_0)|² per coordinate = sigma²; for a coupled state ‖sigmaᵀ (s - ∇ log p)‖²
    "likelihood"   w = g²,  ‖gᵀ (s - ∇ log p)‖² in general, under which ½ ∫ L dt bounds the KL divergence
                   (arXiv:2101.09258)

An SDE whose kernel is known but not Gaussian is matched to the kernel's own score, in units of the kernel's
standard deviation at each x_0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.kernel import Kernel
from sdeflow.scores import Score

__all__ = ["Weighting", "denoising_score_matching", "score_error", "weighted_error"]

Weighting = str | Callable[[Tensor], Tensor]


def denoising_score_matching(
    score: Score, x_0: Tensor, t: Tensor, noise: Tensor, weighting: Weighting = "score", y: Tensor | None = None
) -> Tensor:
    """The loss of each sample, averaged over its coordinates, (batch,).

    Args:
        score: a score whose SDE has a Gaussian kernel.
        x_0: data, (batch, *event); whole states (batch, k, *event) of a coupled SDE.
        t: times, (batch,), in [cutoff, T].
        noise: eps ~ N(0, 1), shaped as x_0.
        weighting: "score", "likelihood", or w as a function of t.
        y: labels, (batch,), for a class-conditional network.
    """
    x_t = score.kernel.sample(x_0, t, noise=noise)
    return weighted_error(score.kernel, weighting, score.noise(x_t, t, y) - noise, t)


def score_error(score: Score, x_t: Tensor, t: Tensor, target: Tensor, std: Tensor, y: Tensor | None = None) -> Tensor:
    """‖std (s(x_t, t) - target)‖² per coordinate, (batch,): score matching to a target whose spread is 1 / std."""
    return ((score(x_t, t, y) - target) * std).square().flatten(1).mean(1)


def weighted_error(kernel: Kernel, weighting: Weighting, error: Tensor, t: Tensor) -> Tensor:
    """w ‖sigma⁻ᵀ error‖² per coordinate for an error of eps (batch, *event), (batch,) in its dtype.

    Raises:
        ValueError: for an unknown name.
    """
    if weighting == "score":
        return error.square().flatten(1).mean(1)
    if weighting != "likelihood" and not callable(weighting):
        raise ValueError(f'weighting must be "score", "likelihood" or a function of t, not {weighting!r}.')
    error = kernel.to_basis(error)
    path = kernel.path(error, t)
    of_score = path.sigma.T.inverse
    if weighting == "likelihood":
        _, _, q = kernel.equation(error, t)
        metric = path.sigma.inverse @ q @ of_score
        return (error * metric(error)).flatten(1).mean(1)
    weight = torch.as_tensor(weighting(t), device=t.device).expand_as(t).to(error.dtype)
    return weight * of_score(error).square().flatten(1).mean(1)
