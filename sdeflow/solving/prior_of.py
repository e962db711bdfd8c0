"""p(x_T) of a score: given, of the data's moments, or read off the score at T."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sdeflow.errors import MissingPriorError, PriorMismatchWarning, ScoreError, warn
from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.reducible import PushForward
from sdeflow.laws.each import EachGaussian, EachSample
from sdeflow.laws.each import Law as Prior
from sdeflow.laws.gaussian import Gaussian
from sdeflow.scores import DeclaredSDE, ScoreFunction, evaluating
from sdeflow.solving.mismatch import Mismatch, compare, is_new

__all__ = ["READ", "Prior", "PriorOf", "fitted_moments", "require_score"]

READ = 1024  # states from which a prior is read off a score, and that are given to it at once
_COMPARED = 32  # conditions of a batch whose prior is compared with the score
_READ_OF_EACH = 256  # where each sample has a condition of its own
_READ_ELEMENTS = 2**20  # elements of the states that are given to it at once, where they are small
_MISMATCH = 0.01  # nats per dimension

_Moments = tuple[Tensor, Tensor, Tensor]  # means, standard deviations or roots, and whether they can be used


@dataclass(frozen=True)
class PriorOf:
    """The prior of a score, found once for each shape of events.

    Samples with conditions of their own have priors of their own, an :class:`~sdeflow.laws.each.EachSample`.

    Attributes:
        gaussian: the SDE's kernel where it is Gaussian, else None.
        score: the score of the whole batch.
        given: the prior that the user gave.
        sde: what may have a ``default_prior(score, like)``, for an SDE without a Gaussian kernel.
        batch: how many samples the batch has, where that is known.
        index: which samples of it are meant; None for all.
        found: what has been found, for (event, samples); samples is None where all have the same prior. Shared by the
            parts of a batch.
        quiet: whether nothing starts from it, so that nothing is said of it.
    """

    gaussian: Kernel | None
    score: ScoreFunction | None
    given: Prior | None
    sde: DeclaredSDE
    batch: int | None = None
    index: Tensor | None = None
    found: dict[tuple[tuple[int, ...], int | None], Prior] = field(default_factory=dict)
    quiet: bool = False

    def of_score(self, score: ScoreFunction) -> PriorOf:
        """That of another score, but for what is known already."""
        return replace(self, score=score, found=dict(self.found))

    def of_batch(self, score: ScoreFunction, samples: int) -> PriorOf:
        """For a batch of so many samples, the score told of it."""
        return self if self.index is not None else replace(self, score=score, batch=samples)

    def rows(self, index: Tensor | slice) -> PriorOf:
        """Of some samples of the batch."""
        ours = torch.arange(self.batch or 0) if self.index is None else self.index
        return replace(self, index=ours[index])

    def own(self) -> PriorOf:
        """The prior that follows from the data's moments or the score, whichever was given."""
        return self if self.given is None else replace(self, given=None, found={}, quiet=True)

    @property
    def samples(self) -> int | None:
        """How many samples are meant, where that is known."""
        return self.batch if self.index is None else len(self.index)

    @property
    def _exact(self) -> Prior | None:
        """p(x_T) where the score itself knows it."""
        return None if self.gaussian is None or self.score is None else self.score.marginal_law(self.gaussian.T)

    @property
    def known(self) -> Prior | None:
        """The prior, or None where it is still to be read off the score."""
        known = self._exact if self.given is None else self.given
        if known is not None:
            return known
        moments = None if self.score is None else self.score.prior_moments()
        if moments is not None and self.gaussian is not None and self.gaussian.basis is None:
            return self.gaussian.marginal(*moments, self.gaussian.T)  # in a basis a mean over it needs the event
        return next(iter(self.found.values()), None)

    def of(self, like: Tensor) -> Prior:
        """The prior for states shaped as ``like`` (batch, *event).

        Raises:
            MissingPriorError: for an SDE without a Gaussian kernel and without ``prior=``.
        """
        known = self._exact if self.given is None else self.given
        if known is not None:
            return known
        score, event, kernel = require_score(self.score), tuple(like.shape[1:]), self.gaussian
        moments = score.prior_moments()
        if moments is not None and kernel is not None and kernel.basis is None:
            kernel.require_event(event)
            return self._of_moments(kernel, moments, like)  # which training may change
        prior = self.found.get((event, None))
        if prior is None:
            samples = self.batch or score.samples or len(like) or 1
            prior = self.found.get((event, samples))
            if prior is None:
                prior = self._derived(score, like, samples)
                self.found[event, samples if isinstance(prior, EachSample) else None] = prior
        return prior.rows(self.index) if self.index is not None and isinstance(prior, EachSample) else prior

    def _of_moments(self, kernel: Kernel, moments: tuple[Tensor, Tensor], like: Tensor) -> Gaussian:
        prior, score = kernel.marginal(*moments, kernel.T), require_score(self.score)
        if not self.quiet:
            compare(prior, kernel, score, moments[1], like, self.batch or score.samples or 1)
        return prior

    def _derived(self, score: ScoreFunction, like: Tensor, samples: int) -> Prior:
        kernel, event, moments = self.gaussian, tuple(like.shape[1:]), score.prior_moments()
        if kernel is None:
            return self._default(score.of_batch(samples), like, samples)
        kernel.require_event(event)
        if moments is not None:
            return self._of_moments(kernel, (moments[0].expand(event), moments[1]), like)
        return _read(kernel, score.of_batch(samples), like, samples, self.quiet)

    def _default(self, score: ScoreFunction, like: Tensor, samples: int) -> Prior:
        """Of an SDE without a Gaussian kernel: pushed forward, for each condition, or the stationary law."""
        default = getattr(self.sde, "default_prior", None)
        conditions = _distinct(score, like.new_full((samples, *like.shape[1:]), 0.5))
        if default is None:
            prior = None
        elif conditions is None:
            prior = default(score, like)
        else:
            first, *others = (score.rows(row.repeat(READ)) for row in conditions[0])
            prior = default(first, like)
            if isinstance(prior, PushForward):
                laws = [prior, *(default(other, like) for other in others)]
                prior = None if None in laws else EachSample(laws, conditions[1])
        if prior is None:
            raise MissingPriorError(
                "this SDE has no Gaussian kernel from which p(x_T) would follow, and no stationary law was found: pass "
                "prior=, such as sde.fit_prior(data), sdeflow.Gaussian(mean, std), or any object with "
                "sample(shape, seed, dtype, device) and log_prob(x)."
            )
        return prior

    def warn_of_mismatch(self) -> None:
        """A warning where the given prior is far from p(x_T) of the data's moments."""
        if not isinstance(self.given, Gaussian) or self.gaussian is None or self.score is None:
            return
        moments = self.score.prior_moments()
        if moments is not None:
            kl = self.gaussian.marginal(*moments, self.gaussian.T).kl_per_dimension(self.given)
            if not kl <= _MISMATCH:
                warn(
                    f"the prior given is {kl:.3g} nats per dimension (KL) from p(x_T) of the data's moments.",
                    PriorMismatchWarning,
                )


def require_score(score: ScoreFunction | None) -> ScoreFunction:
    """The score, or a ScoreError where there is none."""
    if score is None:
        raise ScoreError("no score is bound to this equation: pass one, as in sde.reverse(score).")
    return score


def _read(kernel: Kernel, score: ScoreFunction, like: Tensor, samples: int, quiet: bool) -> Prior:
    """N(m, V) from s(x, T) = -V⁻¹ (x - m), fitted to the score on one batch: V by coordinate, or k x k blocks.

    Where samples have conditions of their own, one for each condition.
    """
    event, start = tuple(like.shape[1:]), kernel.marginal(0.0, 1.0, kernel.T)
    x_T = start.sample((READ, *event), seed=0, dtype=like.dtype, device=like.device)
    conditions = _distinct(score, x_T[:1].expand(samples, *event))
    rows = torch.zeros(1, dtype=torch.long) if conditions is None else conditions[0]
    x_T = x_T if conditions is None else x_T[:_READ_OF_EACH]
    (mean, root, near), gradients = _fitted(kernel, score, rows, x_T, start)
    if not near.all():
        warn(
            "the score at T is not that of a Gaussian near N(offset, sigma²), so the prior could not be read off "
            f"it; {start} is used. Give the data's moments, or prior=.",
            PriorMismatchWarning,
        )
    elif not quiet and is_new(score, event):
        read_off = [Gaussian(mean[i], kernel.maps(root[i]), kernel.basis) for i in range(len(gradients))]
        apart = [Mismatch.of(prior, x_T.double(), s) for prior, s in zip(read_off, gradients, strict=True)]
        i = max(range(len(apart)), key=lambda i: apart[i].fisher)
        if apart[i].visible:
            apart[i].warn(read_off[i], kernel.T)
    if conditions is not None and not kernel.coupled:
        read = near.reshape(-1, *(1,) * len(event))
        mean, std = torch.where(read, mean, start.mean), torch.where(read, root, start.std)
        return EachGaussian(mean, std, conditions[1], kernel.basis)
    priors = [
        Gaussian(centre, kernel.maps(spread), kernel.basis) if usable else start
        for centre, spread, usable in zip(mean, root, near, strict=True)
    ]
    return priors[0] if conditions is None else EachSample(priors, conditions[1])


def _fitted(
    kernel: Kernel, score: ScoreFunction, rows: Tensor, x_T: Tensor, start: Gaussian
) -> tuple[_Moments, Tensor]:
    """The moments of p(x_T) of each of the samples ``rows``, from the score at states x_T of each; and the scores of
    the first of these samples, (samples, states, *event)."""
    first: list[Tensor] = []
    states, u, found = len(x_T), kernel.to_basis(x_T.double()), []
    fit = _fitted_blocks if kernel.coupled else fitted_moments
    with torch.no_grad(), evaluating(score):
        for part in rows.split(max(1, READ // states, _READ_ELEMENTS // max(1, x_T.numel()))):
            of_part = score.rows(part.repeat_interleave(states))
            x = x_T.repeat(len(part), *(1,) * (x_T.ndim - 1))
            gradient = kernel.to_basis(of_part(x, kernel.T).double())
            gradient = gradient.unflatten(0, (len(part), states))
            first = first or [gradient[:_COMPARED]]
            found.append(fit(u, gradient, start))
    mean, root, near = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return (mean, root, near), first[0]


def _distinct(score: ScoreFunction, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """A sample of each condition, and the number of each sample's condition, (batch,); None where all have one."""
    conditions = score.conditions(x)
    if conditions is None:
        return None
    distinct, which = conditions.unique(return_inverse=True)
    first = torch.full_like(distinct, len(x)).scatter_reduce(0, which, torch.arange(len(x)), "amin")
    return first, which


def fitted_moments(x: Tensor, gradient: Tensor, start: Gaussian) -> _Moments:
    """Mean and standard deviation of each coordinate from s = -(x - m) / v.

    Args:
        x: (states, *event).
        gradient: s at these states under each of several conditions, (conditions, states, *event).
        start: the law that it should be near.

    Returns:
        mean, std (conditions, *event); and of each condition whether it is near ``start``, (conditions,) of bool.
    """
    centred = x - x.mean(0)
    slope = (centred * gradient).mean(1) / centred.square().mean(0)
    variance = -1.0 / slope
    mean = x.mean(0) + variance * gradient.mean(1)
    return mean, variance.sqrt(), _near(mean, variance, start.std.square().to(x.device))


def _fitted_blocks(x: Tensor, gradient: Tensor, start: Gaussian) -> _Moments:
    """As :func:`fitted_moments` from s = -V⁻¹ (x - m), of states (states, k, ...): Cholesky factors for std."""
    centred = (x - x.mean(0)).movedim(1, -1)  # (states, ..., k)
    of_state = torch.einsum("b...i,b...j->...ij", centred, centred)
    of_score = torch.einsum("nb...i,b...j->n...ij", gradient.movedim(2, -1), centred)
    precision = -(of_score @ torch.linalg.inv(of_state))
    covariance = torch.linalg.inv(0.5 * (precision + precision.mT))
    root, failed = torch.linalg.cholesky_ex(covariance)
    mean = (x.mean(0).movedim(0, -1)[..., None] + covariance @ gradient.mean(1).movedim(1, -1)[..., None])[..., 0]
    usual = (start.root.values @ start.root.values.mT).diagonal(dim1=-2, dim2=-1).to(x.device)
    near = _near(mean, covariance.diagonal(dim1=-2, dim2=-1), usual) & (failed == 0).flatten(1).all(1)
    return mean.movedim(-1, 1), root if root.ndim == 3 else root[:, None], near


def _near(mean: Tensor, variance: Tensor, usual: Tensor) -> Tensor:
    """Whether the moments of each condition, (conditions, ...), are finite and of a usual size, (conditions,)."""
    near = torch.isfinite(mean) & (variance > 0.1 * usual) & (variance < 10 * usual)
    return near.flatten(1).all(1)
