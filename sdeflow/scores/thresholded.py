r"""Scores whose denoised prediction is kept within the data's range.

With D = E[x_0 | x_t] (Tweedie) and D′ the same brought into range, the thresholded score is that of a denoiser D′,

    s′ = s + (sigma sigmaᵀ)⁻¹ alpha (D′ - D),

which is s itself, to the last bit, wherever D was in range. Two rules for D′::

    static     D′ = min(max(D, low), high)
    dynamic    with D = centre + half u for the range centre ± half, s = max(q-quantile of |u|, 1) in each sample and
               D′ = centre + half min(max(u, -s), s) / s

The dynamic rule is that of Imagen (Saharia et al. 2022, arXiv:2205.11487, section 2.3) for data in [-1, 1], carried to
any range: where more than a share 1 - q of a sample's values leave the range, the whole sample is scaled back into it,
instead of saturating. It is meant for samples of many values, such as images; the quantile of a few is one of them.

A thresholded score is a score: every solver takes it. It is no gradient of a density, though the flow it defines has
one; samples move off the model that the plain score defines, so compare likelihoods without it.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor

from sdeflow.numerics.checks import checked_state
from sdeflow.numerics.linear import per_sample
from sdeflow.scores.function import ScoreFunction, Wrapping

__all__ = ["Threshold", "Thresholded"]

Threshold = tuple[float, float] | float


class Thresholded(Wrapping):
    """A score whose E[x_0 | x_t] stays within the data's range; see the module.

    Of a coupled state only the components that are data are kept in range.

    Args:
        score: a score of an affine SDE.
        threshold: (low, high) clips to that range; a quantile q in (0, 1) is the dynamic rule.
        data_range: (low, high) of the data for the dynamic rule, (-1, 1) by default.

    Raises:
        TypeError: for a score that is a bare function, of which no SDE is known.
        ValueError: for a threshold or a range that makes no sense.
        NotAffineError: for a score of an SDE without a Gaussian kernel.
    """

    def __init__(
        self, score: ScoreFunction, threshold: Threshold, data_range: tuple[float, float] | None = None
    ) -> None:
        if not isinstance(score, ScoreFunction):
            raise TypeError(f"a score of sdeflow's is thresholded, such as Score or GaussianMixture, not {score!r}.")
        super().__init__(score)
        self._require_kernel("threshold=")
        self.quantile: float | None = None
        if _is_number(threshold) and 0 < threshold < 1:
            self.quantile, limits = float(threshold), (-1.0, 1.0) if data_range is None else data_range
        elif _is_range(threshold):
            limits = threshold
        else:
            raise ValueError(
                f"threshold must be (low, high) with low < high, or a quantile between 0 and 1, not {threshold!r}."
            )
        if data_range is not None and (self.quantile is None or not _is_range(data_range)):
            wanted = "is (low, high), low < high, of a quantile's rule" if self.quantile else "is of a quantile's rule"
            raise ValueError(f"data_range {wanted}, not {data_range!r} with threshold={threshold!r}.")
        self.low, self.high = map(float, limits)
        auxiliary = self.declaration.auxiliary
        self._data = [i for i in range(len(self.declaration.state)) if i not in auxiliary] if auxiliary else None

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        x, t = self._entered(x, t)
        score = self.score(x, t)
        kernel, (alpha, sigma, offset) = self._path(x, t)
        centred = kernel.to_basis(x) - offset.to(x.dtype)
        denoised = kernel.from_basis(alpha.inverse(centred + sigma.gram(kernel.to_basis(score))))
        change = kernel.to_basis(self.in_range(denoised) - denoised)
        return score + kernel.from_basis((sigma.T.inverse @ sigma.inverse @ alpha)(change))

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.in_range(self.score.denoise(x, t))

    @property
    def wrapping(self) -> tuple[object, ...]:
        return ("threshold", self.quantile, self.low, self.high, *super().wrapping)

    def in_range(self, denoised: Tensor) -> Tensor:
        """D′ for D = ``denoised``, (batch, *event) both."""
        denoised = checked_state(denoised, "denoised")
        if self._data is None:
            return self._in_range(denoised)
        kept = denoised.clone()
        kept[:, self._data] = self._in_range(denoised[:, self._data])
        return kept

    def _in_range(self, data: Tensor) -> Tensor:
        if self.quantile is None:
            return data.clamp(self.low, self.high)
        centre, half = 0.5 * (self.high + self.low), 0.5 * (self.high - self.low)
        u = (data - centre) / half
        limit = per_sample(_quantile(u.flatten(1).abs(), self.quantile).clamp_min(1.0), u)
        scaled = torch.where(limit > 1, centre + half * (u / limit), data)  # where the limit is 1, to the last bit
        return scaled.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        """The rule and the range."""
        rule = "" if self.quantile is None else f"quantile={self.quantile:g}, "
        return f"{rule}low={self.low:g}, high={self.high:g}"


def _quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of each row of (batch, n), linear between order statistics; torch's takes 2^24 numbers at most."""
    rank = q * (values.shape[1] - 1)
    below, above = (torch.kthvalue(values, k + 1, dim=1).values for k in (math.floor(rank), math.ceil(rank)))
    return torch.lerp(below, above, rank - math.floor(rank))


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_range(value: object) -> TypeGuard[tuple[float, float]]:
    """Whether ``value`` is a pair of finite numbers, low < high."""
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(map(_is_number, value)):
        return False
    return -math.inf < value[0] < value[1] < math.inf
