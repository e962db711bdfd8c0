r"""Denoising score matching (Vincent 2011; arXiv:2011.13456, eq. 7).

    L(t) = w(t) E ‖s(x_t, t) - ∇ log p(x_t | x_0)‖²,   x_t ~ p(x_t | x_0)

whose minimiser is ∇ log p_t whatever w > 0. Since ∇ log p(x_t | x_0) = -eps / sigma, it is computed as
(w / sigma²) ‖eps - E[eps | x_t]‖², in which nothing is large near t = 0. Two weightings are derived:

    "score"        w = 1 / E|∇ log p(x_t | x_0)|² per coordinate = sigma²
    "likelihood"   w = g², under which ½ ∫ L dt bounds the KL divergence (arXiv:2101.09258)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.kernel import Kernel
from sdeflow.scores import Score

__all__ = ["Weighting", "denoising_score_matching", "noise_weight"]

Weighting = str | Callable[[Tensor], Tensor]


def denoising_score_matching(
    score: Score, x_0: Tensor, t: Tensor, noise: Tensor, weighting: Weighting = "score", y: Tensor | None = None
) -> Tensor:
    """The loss of each sample, averaged over its coordinates, (batch,).

    Args:
        score: a score with a Gaussian kernel.
        x_0: data, (batch, *event).
        t: times, (batch,), in [cutoff, T].
        noise: eps ~ N(0, 1), shaped as x_0.
        weighting: "score", "likelihood", or w as a function of t.
        y: labels, (batch,), for a class-conditional network.
    """
    x_t = score.kernel.sample(x_0, t, noise=noise)
    error = (score.noise(x_t, t, y) - noise).square().flatten(1).mean(1)
    return noise_weight(score.kernel, weighting, t).to(error.dtype) * error


def noise_weight(kernel: Kernel, weighting: Weighting, t: Tensor) -> Tensor:
    """w(t) / sigma(t)², the weight of the noise's squared error, shaped as t.

    Raises:
        ValueError: for an unknown name.
    """
    if weighting == "score":
        return torch.ones_like(t)
    _, sigma, _ = kernel.coefficients(t)
    if weighting == "likelihood":
        return kernel.sde_coefficients(t)[2] / sigma.square()
    if not callable(weighting):
        raise ValueError(f'weighting must be "score", "likelihood" or a function of t, not {weighting!r}.')
    return torch.as_tensor(weighting(t), device=t.device).expand_as(t) / sigma.square()
