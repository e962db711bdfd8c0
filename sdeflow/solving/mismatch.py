r"""How far the derived prior is from the law whose gradient the score is at T; told once for each score.

Of states x of the prior N(m, R Rᵀ) or near it, z = R⁻¹ (x - m), and the score s there,

    e = Rᵀ s(x, T) + z

is the gradient of log p_T - log π in the prior's own units, 0 where both are the same. Of a coordinate of mean μ and
standard deviation ρ in these units, e = μ / ρ² + (1 - 1 / ρ²) z, so a line through e tells of both. Whatever else p_T
is, ½ E |e|² (Fisher's divergence) is no less than KL(p_T || π) if the mean is that of p_T (the logarithmic Sobolev
inequality); here it is that of the states.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.errors import PriorMismatchWarning, ScoreError, warn
from sdeflow.kernels.gaussian import Kernel
from sdeflow.laws.gaussian import Gaussian
from sdeflow.scores import ScoreFunction, evaluating

__all__ = ["Mismatch", "compare"]

_STATES = 64  # of the prior, at which the score is asked
_KEPT = 32  # of a score: events, conditions, and states of its training
_LEFT = 0.03  # alpha c / sigma: below, the law is the prior to 5e-4 nats per dimension, whatever the data
_FAR = 0.02  # nats per dimension: a mean that is off by 0.2 standard deviations, or two modes 3 % of whose mass is off
_FAR_IN_ONE = 0.1  # nats in one dimension among many
_ROUNDED = 1e-3  # of a prior that was read off the score at the same states there is no difference left

_compared: weakref.WeakKeyDictionary[object, dict[tuple[object, ...], None]] = weakref.WeakKeyDictionary()


class Mismatch(NamedTuple):
    """How far a score is from that of a prior.

    Attributes:
        fisher: ½ E e² in nats, its mean over the coordinates.
        largest: the same of the coordinate where it is largest.
        shift: of the mean, in standard deviations of the prior, of the coordinate where it is largest.
        spread: of the standard deviation, relative to the prior's, likewise.
    """

    fisher: float
    largest: float
    shift: float
    spread: float

    @classmethod
    def of(cls, prior: Gaussian, x: Tensor, s: Tensor) -> Mismatch:
        """From scores ``s``, in the prior's basis, of states ``x``, (batch, *event) each, in float64."""
        z = prior.whitened(x)
        e = prior.root.to(x.device).T(s) + z
        apart = z - z.mean(0)
        slope = (apart * e).mean(0) / apart.square().mean(0)
        variance = torch.where(slope < 1.0, 1.0 / (1.0 - slope), torch.inf)
        shift = (e.mean(0) - slope * z.mean(0)) * variance
        each, spread = 0.5 * e.square().mean(0), (variance.sqrt() - 1.0).abs()
        return cls(float(each.mean()), float(each.max()), float(shift.abs().max()), float(spread.max()))

    @property
    def visible(self) -> bool:
        """Whether samples and log p show it, and it is more than the errors of a trained network; NaN is."""
        return not (self.fisher <= _FAR and self.largest <= _FAR_IN_ONE)

    def warn(self, prior: Gaussian, T: float) -> None:
        """A warning that says by how much, and what to do."""
        affine = f", means by up to {self.shift:.2g} and standard deviations by up to {self.spread:.2g} of the prior's"
        affine = affine if max(self.shift, self.spread) > _ROUNDED else ""
        warn(
            f"the prior {prior} is not the law that the score has at T = {T:g}, so samples and log p are wrong: by "
            f"{self.fisher:.2g} nats per dimension (Fisher's divergence), {self.largest:.2g} in one of them"
            f"{affine}. Declare a larger T, standardise the data, or pass prior=, such as sde.fit_prior(data). (A "
            "network that has not learned the score at T shows the same.)",
            PriorMismatchWarning,
        )


def compare(prior: Gaussian, kernel: Kernel, score: ScoreFunction, std: Tensor, like: Tensor, samples: int) -> None:
    """A warning, once, where the score at T is not that of a prior that follows from the data's moments.

    It takes one call of the score; none where T is so late that the data is forgotten.

    Args:
        prior: that of the data's moments.
        kernel: of the score's SDE.
        score: of a batch of ``samples``.
        std: the data's standard deviation.
        like: states (batch, *event), for their shape, dtype and device.
        samples: how many it is of.
    """
    event = tuple(like.shape[1:])
    if kernel.left_of(std, event, kernel.T) <= _LEFT or not is_new(score, event):
        return
    with torch.inference_mode(False), torch.no_grad(), evaluating(score):
        x = prior.sample((_STATES, *event), seed=0, dtype=like.dtype, device=like.device)
        try:
            s = score.of_batch(samples).rows(torch.arange(_STATES) % samples)(x, kernel.T)
        except ScoreError:  # it cannot be asked, as a network of conditions without one; a solve will say so
            return
        found = Mismatch.of(prior, x.double(), kernel.to_basis(s.double()))
    if found.visible:
        found.warn(prior, kernel.T)


def is_new(score: ScoreFunction, event: tuple[int, ...]) -> bool:
    """Whether this is the first time that one asks this for a score as it is: training makes it another one."""
    state = (*score.parameters(), *score.buffers())
    versions = tuple(tensor._version for tensor in state if not tensor.is_inference())
    key = (weakref.ref(score.kernel), event, versions, *score.wrapping)
    try:
        known = _compared.setdefault(score.bare, {})
    except TypeError:  # neither hashable nor weakly referable
        return True
    if key in known:
        return False
    known[key] = None
    while len(known) > _KEPT:
        del known[next(iter(known))]
    return True
