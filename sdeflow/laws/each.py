"""A law for each sample of a batch: the prior of a score in which each sample has its own condition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sdeflow.errors import DataError
from sdeflow.laws.gaussian import Gaussian, normal_log_density
from sdeflow.numerics.basis import Basis
from sdeflow.numerics.noise import NoiseStream

__all__ = ["EachGaussian", "EachSample", "Law"]


Kind = TypeVar("Kind")


class Law(Protocol):
    """The protocol of a prior: samples and log p."""

    def sample(
        self,
        shape: tuple[int, ...],
        seed: int | torch.Generator | None,
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


class EachSample:
    """A law for each sample of a batch: sample i has the law ``laws[which[i]]``.

    Args:
        laws: the different laws.
        which: (batch,) integers on the CPU, indices of ``laws``.
    """

    def __init__(self, laws: Sequence[Law], which: Tensor) -> None:
        self.laws, self.which = tuple(laws), which

    def rows(self, index: Tensor | slice) -> EachSample:
        """The laws of the samples ``index``, which may repeat."""
        other = copy.copy(self)
        other.which = self.which[index]
        return other

    def sample(
        self,
        shape: tuple[int, ...],
        seed: int | torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Samples of the given ``shape`` (batch, *event): sample i is that of its law in such a batch."""
        if self.is_gaussian:
            self._require_event(tuple(shape[1:]))
            return self.coloured(NoiseStream(seed, "prior").normal(tuple(shape), dtype, device))
        like = torch.empty(shape, device="meta")
        return self._joined(self.laws, like, lambda law, rows: law.sample(shape, seed, dtype, device)[rows.to(device)])

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats of each sample under its law, (batch,), for x (batch, *event)."""
        return self._joined(self.laws, x, lambda law, rows: law.log_prob(x[rows.to(x.device)]))

    @property
    def is_gaussian(self) -> bool:
        """Whether all laws are Gaussian."""
        return all(isinstance(law, Gaussian) for law in self.laws)

    @property
    def _gaussians(self) -> tuple[Gaussian, ...]:
        found = tuple(law for law in self.laws if isinstance(law, Gaussian))
        if len(found) < len(self.laws):
            raise DataError("this needs Gaussian laws, but some laws of this prior are not Gaussian.")
        return found

    def coloured(self, noise: Tensor) -> Tensor:
        """mean + root noise of each sample, as :meth:`~sdeflow.laws.gaussian.Gaussian.coloured`."""
        return self._joined(self._gaussians, noise, lambda law, rows: law.coloured(noise[rows.to(noise.device)]))

    def whitened(self, x: Tensor) -> Tensor:
        """root⁻¹ (x - mean) of each sample, the inverse of :meth:`coloured`."""
        return self._joined(self._gaussians, x, lambda law, rows: law.whitened(x[rows.to(x.device)]))

    @property
    def mean(self) -> Tensor:
        """The mean of each sample, (batch, *event), if all laws are Gaussian."""
        return torch.stack([law.mean for law in self._gaussians])[self.which]

    @property
    def std(self) -> Tensor:
        """The standard deviation of each sample, (batch, *event), if all laws are Gaussian."""
        return torch.stack([law.std for law in self._gaussians])[self.which]

    def _joined(self, laws: Sequence[Kind], x: Tensor, of_law: Callable[[Kind, Tensor], Tensor]) -> Tensor:
        """The results of ``of_law`` for each law and its samples, in the order of the samples."""
        self._require_batch(x)
        order = self.which.argsort(stable=True)
        numbers, counts = torch.unique_consecutive(self.which[order], return_counts=True)
        if not len(numbers):
            return of_law(laws[0], order)
        parts = order.split(counts.tolist())
        found = torch.cat([of_law(laws[i], rows) for i, rows in zip(numbers.tolist(), parts, strict=True)])
        return found[order.argsort().to(found.device)]

    def _require_event(self, event: tuple[int, ...]) -> None:
        for law in self._gaussians:
            law.require_event(event)

    def _require_batch(self, x: Tensor) -> None:
        if len(x) != len(self.which):
            raise DataError(f"this prior is of a batch of {len(self.which)} samples, not of {len(x)}.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.laws)} laws for {len(self.which)} samples, such as {self.laws[0]})"


class EachGaussian(EachSample):
    """N(means[i], stds[i]²) elementwise, i = ``which`` of each sample: many conditions, at the cost of one.

    Args:
        means, stds: (laws, *event), with a basis those of the coefficients.
        which: (batch,) integers on the CPU, rows of ``means``.
        basis: an orthogonal basis, or None.
    """

    def __init__(self, means: Tensor, stds: Tensor, which: Tensor, basis: Basis | None = None) -> None:
        self.means, self.stds, self.which, self.basis = means, stds, which, basis

    @cached_property
    def laws(self) -> tuple[Gaussian, ...]:  # type: ignore[override]  # found when asked for, unlike EachSample's
        """Each law by itself."""
        return tuple(Gaussian(mean, std, self.basis) for mean, std in zip(self.means, self.stds, strict=True))

    @property
    def is_gaussian(self) -> bool:
        """Whether all laws are Gaussian."""
        return True

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each sample, like x."""
        self._require_batch(x)
        return self.means[self.which].to(x), self.stds[self.which].to(x)

    def _require_event(self, event: tuple[int, ...]) -> None:
        if event != self.means.shape[1:]:
            raise DataError(f"this prior is of events of shape {tuple(self.means.shape[1:])}, not {event}.")

    def coloured(self, noise: Tensor) -> Tensor:
        """mean + std noise of each sample."""
        mean, std = self._moments(noise)
        x = mean + std * noise
        return x if self.basis is None else self.basis.inverse(x)

    def whitened(self, x: Tensor) -> Tensor:
        """(x - mean) / std of each sample, the inverse of :meth:`coloured`."""
        mean, std = self._moments(x)
        return ((x if self.basis is None else self.basis.forward(x)) - mean) / std

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats of each sample, (batch,) in float64, for x (batch, *event)."""
        x = x.to(torch.float64)
        mean, std = self._moments(x)
        return normal_log_density(x if self.basis is None else self.basis.forward(x), mean, std)
