r"""Denoising score matching (Vincent 2011; arXiv:2011.13456, eq. 7), and the error of pairs (x_t, target).

    L(t) = w(t) E ‖s(x_t, t) - ∇ log p(x_t | x_0)‖²,   x_t ~ p(x_t | x_0)
    L = E ‖rootᵀ (s(x_t, t) - target)‖²,               root a function of (x_t, t) alone

Since ∇ log p(x_t | x_0) = -sigma⁻ᵀ eps, the first is computed from the error of eps, in which nothing is large near
t = 0. The weightings are those of :mod:`sdeflow.training.weightings`. The second is of SDEs without a Gaussian kernel:
the mean of the target given x_t is the score (:class:`KernelPairs`, :mod:`sdeflow.training.pairs`). The page
:doc:`theory_training` says why the weight must not depend on x_0, and which weights are finite where paths reach an end
of the domain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import NotAffineError, WeightingError
from sdeflow.kernels.gaussian import Kernel, broadcast_to_event
from sdeflow.kernels.local import LocalKernel
from sdeflow.numerics.checks import checked_noise, checked_numbers, checked_state
from sdeflow.numerics.compile import compile_expressions
from sdeflow.numerics.conditions import Condition
from sdeflow.numerics.linear import Diagonal, Linear
from sdeflow.numerics.noise import NoiseStream
from sdeflow.scores import Score, ScoreFunction
from sdeflow.symbolic.symbols import t as time_symbol
from sdeflow.training.weightings import Weighting, metric, of_times, overall_std, require_weighting

__all__ = [
    "KernelPairs",
    "Pairs",
    "Weighting",
    "data_std_of",
    "denoising_score_matching",
    "score_error",
    "weighted_error",
]


def denoising_score_matching(
    score: ScoreFunction,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    weighting: Weighting = "score",
    y: Condition | None = None,
) -> Tensor:
    """L(t) of each sample at its time, averaged over its coordinates, (batch,).

    Args:
        score: a score whose SDE has a Gaussian kernel.
        x_0: data, (batch, *event); whole states (batch, k, *event) of a coupled SDE.
        t: times, (batch,), in [cutoff, T].
        noise: eps ~ N(0, 1), shaped as x_0.
        weighting: "score", "likelihood", "edm", "min_snr", "p2", or w as a function of t.
        y: a condition for each sample, for a conditional network.

    Raises:
        ValueError: for an unknown weighting, and a WeightingError for one whose values make no sense.
    """
    require_weighting(weighting)
    x_0 = checked_state(x_0, "x_0", dtype=score.dtype)
    noise, t = checked_noise(noise, x_0), checked_numbers(t, "t")
    kernel = score.kernel.require_gaussian("denoising score matching")
    error = score.noise(kernel.sample(x_0, t, noise=noise), t, *_given(y)) - noise
    return weighted_error(kernel, weighting, error, t, data_std_of(score, weighting))


def _given(y: Condition | None) -> tuple[Condition, ...]:
    """Conditions as the last arguments of a score, which not every score takes."""
    return () if y is None else (y,)


def data_std_of(score: ScoreFunction, weighting: Weighting) -> float:
    """The data's standard deviation, where it is known and the weighting is "edm", which alone asks for it; else 1."""
    if callable(weighting) or weighting != "edm":
        return 1.0
    if isinstance(score, Score):  # it may be declared where the mean is not
        return overall_std(score.data_std)
    moments = score.data_moments()
    return 1.0 if moments is None else overall_std(moments[1])


class Pairs(NamedTuple):
    """States and times with a target whose mean given x_t is the score, and the root of a weight."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    root: Linear


def score_error(score: ScoreFunction, pairs: Pairs, y: Condition | None = None) -> Tensor:
    """‖rootᵀ (s(x_t, t) - target)‖² per coordinate, (batch,)."""
    x_t, t, target, root = pairs
    return root.T(score(x_t, t, *_given(y)) - target).square().flatten(1).mean(1)


class KernelPairs:
    """Pairs from an exact kernel that is not Gaussian: x_t ~ p(x_t | x_0) with ∇ log p(x_t | x_0).

    Args:
        score: a score whose SDE has such a kernel, one behind a change of the state or of the Pearson class.
        weighting: "likelihood", root = g(x_t, t); "score", that times the standard deviation over g of the affine SDE
            behind it, which makes a target of unit size for y = H(x), and times what keeps it bounded at an end that
            paths reach (see the module); or w(t).

    Raises:
        NotAffineError: for another SDE.
        WeightingError: for a weighting under which the loss is infinite, since paths come too near an end.
    """

    def __init__(self, score: ScoreFunction, weighting: Weighting) -> None:
        require_weighting(weighting, gaussian=False)
        kernel = score.kernel
        if isinstance(kernel, Kernel | LocalKernel):
            raise NotAffineError("the pairs of KernelPairs need an exact kernel that is not Gaussian: see fit.")
        self.kernel, self.weighting = kernel, weighting
        infinite = kernel.unbounded if callable(weighting) else kernel.attained
        if infinite and weighting != "score":
            what = "w(t) |∇ log p|²" if callable(weighting) else "g² |∇ log p|²"
            raise WeightingError(
                f"E[{what}], the loss of this weighting, is infinite: the density of this SDE falls too slowly towards "
                'an end of the domain, where its score is infinite. Use weighting="score", which weighs states near '
                "the end so that the loss is finite, and has the same minimiser."
            )
        declaration = score.declaration
        self._g = compile_expressions(declaration.g, (time_symbol, *declaration.state), score.values, declaration.T)

    @torch.no_grad()
    def __call__(self, x_0: Tensor, t: Tensor, noise: NoiseStream) -> Pairs:
        """Pairs at the times t (batch,) for data (batch, *event)."""
        x_t = self.kernel.sample(x_0, t, seed=noise.seed)
        return Pairs(x_t, t, self.kernel.score(x_t, x_0, t), Diagonal(self._root(x_t, t)))

    def _root(self, x: Tensor, t: Tensor) -> Tensor:
        if callable(self.weighting):
            return broadcast_to_event(of_times(self.weighting, t).sqrt(), x)
        g = self._g(broadcast_to_event(t, x), x)
        if self.weighting == "likelihood":
            return g
        inner = self.kernel.inner
        _, _, q = inner.equation(x, t)
        scale = inner.path(x, t).sigma.values / q.values.sqrt()
        return g * (scale * self.kernel.damping(x, t)).to(x.dtype)


def weighted_error(kernel: Kernel, weighting: Weighting, error: Tensor, t: Tensor, data_std: float = 1.0) -> Tensor:
    """L(t) = errorᵀ M error per coordinate for an error of eps (batch, *event), (batch,) in its dtype.

    Args:
        kernel: the Gaussian kernel.
        weighting: M of :func:`sdeflow.training.weightings.metric`.
        error: of eps, (batch, *event).
        t: times, (batch,).
        data_std: the data's standard deviation, which "edm" knows.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(weighting, str) and weighting == "score":
        return error.square().flatten(1).mean(1)
    error = kernel.to_basis(error)
    return (error * metric(kernel, weighting, error, t, data_std)(error)).flatten(1).mean(1)
