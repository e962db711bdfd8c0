"""A mixture of Gaussians fitted to states.

EM fits the mixture to states that are simulated from data: one mixture over the whole event if the event is small, else
one for each coordinate (with all components of a coupled state together). The quality of the fit is the
Kolmogorov-Smirnov distance of each coordinate to states that were not used in the fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.errors import DataError
from sdeflow.laws.drawn import DrawnLaw
from sdeflow.numerics.checks import checked_point
from sdeflow.numerics.noise import NoiseStream

__all__ = ["FittedPrior"]

_JOINT = 8  # an event of up to this many numbers is fitted by one mixture
_GROUPS = 32  # mixtures fitted at once
_ROUNDS, _PROGRESS = 200, 1e-5  # of EM: the most rounds, and the gain in nats per state at which it ends
_FLOOR = 1e-5  # of a component's variance, in units of the variance of all states


class FittedPrior(DrawnLaw):
    """A mixture of Gaussians fitted to states by EM: of whole events of up to 8 numbers, else of each coordinate.

    Args:
        states: (n, *event), used for the fit.
        others: (m, *event), states that test the fit.
        components: the number of Gaussians.
        coupled: whether the first dim of the event holds components; a coordinate keeps its components together.

    Attributes:
        event: the shape of a state.
        ks: the Kolmogorov-Smirnov distance of each coordinate to ``others``, (*event).
        tested: the number of ``others``; sampling alone gives a distance of up to 1.36 / sqrt(tested) in 95 % of cases.
    """

    def __init__(self, states: Tensor, others: Tensor, components: int, coupled: bool) -> None:
        self.event, self.fitted, self.tested = tuple(states.shape[1:]), len(states), len(others)
        self._size = self.event[0] if coupled else 1  # the numbers that one mixture is of
        if math.prod(self.event) <= _JOINT:
            self._size = math.prod(self.event)
        grouped = self._grouped(states.double())
        self._mean, self._scale = grouped.mean(1, keepdim=True), grouped.std(1, keepdim=True)
        if not bool((self._scale > 0).all()):
            raise DataError("some coordinate of x_T is constant: it has no density.")
        fits = [_fit_mixture(part, components) for part in ((grouped - self._mean) / self._scale).split(_GROUPS)]
        self._weights, self._centres, self._roots = (torch.cat(part) for part in zip(*fits, strict=True))
        self.ks = self._distances(self._grouped(others.double()))

    def drawn(self, shape: tuple[int, ...], noise: NoiseStream) -> Tensor:
        groups, _, size = self._centres.shape
        uniform = noise.uniform((shape[0], groups, 1), torch.float64)
        chosen = (uniform > self._weights.cumsum(1)[:, :-1]).sum(2)
        z = noise.normal((shape[0], groups, size), torch.float64)
        index = torch.arange(groups)
        u = self._centres[index, chosen] + (self._roots[index, chosen] @ z[..., None])[..., 0]
        x = self._mean[:, 0] + self._scale[:, 0] * u  # (batch, groups, size)
        return x.mT.reshape(shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (batch,) in float64, for x (batch, *event)."""
        x = checked_point(x, sides=2)
        self.require_event(tuple(x.shape[1:]))
        u = (self._grouped(x.double().cpu()) - self._mean) / self._scale
        log_p = torch.logsumexp(_log_joint(u, self._weights, self._centres, self._roots), dim=2)
        return (log_p - self._scale.log().sum(2)).sum(0).to(x.device)

    def _grouped(self, x: Tensor) -> Tensor:
        """States (batch, *event) as (groups, batch, size); each group has its own mixture."""
        return x.reshape(len(x), self._size, -1).permute(2, 0, 1)

    def _distances(self, grouped: Tensor) -> Tensor:
        """The Kolmogorov-Smirnov distance of each coordinate."""
        u = ((grouped - self._mean) / self._scale).sort(dim=1).values
        spread = self._roots.square().sum(-1).sqrt()
        cdf = torch.zeros_like(u)
        for weight, centre, std in zip(self._weights.T, self._centres.movedim(1, 0), spread.movedim(1, 0), strict=True):
            cdf += weight[:, None, None] * torch.special.ndtr((u - centre[:, None]) / std[:, None])
        n = u.shape[1]
        rank = torch.arange(1, n + 1, dtype=torch.float64)[:, None] / n
        return torch.maximum((cdf - rank).abs(), (cdf - rank + 1.0 / n).abs()).amax(1).mT.reshape(self.event)

    def require_event(self, event: tuple[int, ...]) -> None:
        if event != self.event:
            raise DataError(f"this prior is of states of shape {self.event}, not {event}.")

    def __repr__(self) -> str:
        over = "whole states" if self._size == math.prod(self.event) else "each coordinate"
        return (
            f"FittedPrior({self._weights.shape[1]} Gaussians over {over}, fitted to {self.fitted} simulated states; "
            f"Kolmogorov-Smirnov distance to {self.tested} others {float(self.ks.max()):.4f} at most, where sampling "
            f"alone gives {1.36 / math.sqrt(self.tested):.4f})"
        )


def _fit_mixture(u: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and Cholesky roots by EM, for standardised states (groups, n, size)."""
    groups, n, size = u.shape
    axis = torch.linalg.eigh(u.mT @ u)[1][..., -1:]
    order = (u @ axis)[..., 0].argsort(dim=1)
    places = ((torch.arange(components) + 0.5) / components * n).long()
    centres = torch.gather(u, 1, order[:, places, None].expand(-1, -1, size))
    one = torch.eye(size, dtype=u.dtype)
    roots, weights = (
        0.5 * one.expand(groups, components, size, size),
        u.new_full((groups, components), 1 / components),
    )
    squares = (u[..., None] * u[..., None, :]).flatten(2)
    previous = -math.inf
    for _ in range(_ROUNDS):
        log_joint = _log_joint(u, weights, centres, roots)
        total = torch.logsumexp(log_joint, dim=2, keepdim=True)
        share = torch.exp(log_joint - total)
        mass = share.sum(1) + 1e-9 * n
        weights = mass / mass.sum(1, keepdim=True)
        centres = (share.mT @ u) / mass[..., None]
        second = (share.mT @ squares / mass[..., None]).unflatten(-1, (size, size))
        roots = torch.linalg.cholesky(second - centres[..., None] * centres[..., None, :] + _FLOOR * one)
        mean = float(total.mean())
        if mean - previous < _PROGRESS:
            break
        previous = mean
    return weights, centres, roots


def _log_joint(u: Tensor, weights: Tensor, centres: Tensor, roots: Tensor) -> Tensor:
    """log w_k N(u; m_k, L_k L_kᵀ), (groups, batch, k), for u (groups, batch, size)."""
    inverse = torch.linalg.inv(roots)
    z = u @ inverse.flatten(1, 2).mT - (inverse @ centres[..., None]).flatten(1)[:, None]
    log_det = roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = weights.log() - log_det - 0.5 * u.shape[-1] * math.log(2.0 * math.pi)
    return constant[:, None] - 0.5 * z.square().unflatten(-1, centres.shape[1:]).sum(-1)
