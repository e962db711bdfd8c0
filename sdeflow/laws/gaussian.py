"""A Gaussian law of states: the prior p(x_T), and any marginal of Gaussian data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.errors import DataError
from sdeflow.numerics.basis import Basis
from sdeflow.numerics.checks import OF_BASIS, checked_dtype, checked_methods, checked_numbers, checked_point
from sdeflow.numerics.linear import Blocks, Diagonal, Linear
from sdeflow.numerics.noise import NoiseStream

__all__ = ["Gaussian", "normal_log_density"]


class Gaussian:
    """N(mean, std²) elementwise, or N(mean, root rootᵀ) with k x k blocks for the components of a coupled state.

    Args:
        mean: () or a tensor that broadcasts to an event.
        std: the standard deviation, positive, () or a tensor that broadcasts to an event; or the root, a coupled
            :class:`~sdeflow.numerics.linear.Linear`.
        basis: an orthogonal basis. If given, mean and std are those of the coefficients.
    """

    def __init__(self, mean: Tensor | float, std: Tensor | float | Linear, basis: Basis | None = None) -> None:
        self.mean = checked_numbers(mean, "mean")
        self.root = std if isinstance(std, Linear) else Diagonal(checked_numbers(std, "std"))
        self.basis = checked_methods(basis, "basis", *OF_BASIS)
        if not bool(torch.isfinite(self.mean).all()) or not bool((self.std > 0).all() & torch.isfinite(self.std).all()):
            raise DataError(f"a Gaussian needs a finite mean and a positive, finite std, not {mean} and {std}.")

    @property
    def std(self) -> Tensor:
        """The standard deviation of each coordinate; (k, ...) for a coupled state."""
        root = self.root.values
        if not isinstance(self.root, Blocks):
            return root
        std = root.square().sum(-1).sqrt().movedim(-1, 0 if root.ndim == 2 else 1)
        return std if root.ndim == 2 else std[0]

    def sample(
        self,
        shape: tuple[int, ...],
        seed: int | torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Samples of the given ``shape`` (batch, *event)."""
        self.require_event(tuple(shape[1:]))
        return self.coloured(NoiseStream(seed, "prior").normal(tuple(shape), checked_dtype(dtype), device))

    def coloured(self, noise: Tensor) -> Tensor:
        """mean + root noise, (batch, *event): a sample of this law if ``noise`` is a sample of N(0, 1)."""
        noise = checked_point(noise, "noise")
        x = self._mean_for(noise) + self.root.to(noise.device)(noise)
        return x if self.basis is None else self.basis.inverse(x)

    def whitened(self, x: Tensor) -> Tensor:
        """root⁻¹ (x - mean), the inverse of :meth:`coloured`; standard normal for samples of this law."""
        x = checked_point(x)
        self.require_event(tuple(x.shape[1:]))
        x = x if self.basis is None else self.basis.forward(x)
        return self.root.to(x.device).inverse(x - self._mean_for(x))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (batch,) in float64, for x (batch, *event)."""
        x = checked_point(x)
        event = tuple(x.shape[1:])
        z, log_det = self.whitened(x.to(torch.float64)), self.root.to(x.device).log_det(event)
        d = math.prod(event)
        return -0.5 * z.square().reshape(len(x), d).sum(1) - log_det - 0.5 * d * math.log(2.0 * math.pi)

    def kl_per_dimension(self, other: Gaussian) -> float:
        """KL(self || other) in nats, averaged over coordinates."""
        if isinstance(self.root, Blocks):
            inverse = other.root.inverse
            relative = (inverse @ self.root).values
            k, dims = relative.shape[-1], max(self.mean.ndim, other.mean.ndim) - 1
            like = relative.new_zeros(1, k, *(1,) * dims)
            apart = like[0] + self._mean_for(like) - other._mean_for(like)
            shift = inverse.values @ apart.movedim(0, -1)[..., None]
            trace, log_det = relative.square().sum((-1, -2)), torch.linalg.slogdet(relative)[1]
            return float((0.5 * (trace - k) - log_det).mean() / k + 0.5 * shift.square().mean())
        ratio = (self.std / other.std).square()
        shift = ((self.mean - other.mean) / other.std).square()
        return float((0.5 * (ratio + shift - 1.0 - torch.log(ratio))).mean())

    def __repr__(self) -> str:
        basis = "" if self.basis is None else f", basis={self.basis}"
        return f"Gaussian(mean={_short(self.mean)}, std={_short(self.std)}{basis})"

    def _mean_for(self, x: Tensor) -> Tensor:
        """The mean in a shape that broadcasts with ``x``; for a coupled state, dims are added at the end."""
        mean = self.mean.to(device=x.device, dtype=x.dtype)
        if isinstance(self.root, Blocks) and mean.ndim < x.ndim - 1:
            mean = mean.reshape(*mean.shape, *(1,) * (x.ndim - 1 - mean.ndim))
        return mean

    def require_event(self, event: tuple[int, ...]) -> None:
        """Raises a DataError if this law is not one of events of this shape."""
        for value in (self.mean, self.std):
            given = tuple(value.shape)
            from_first = isinstance(self.root, Blocks)  # where the components are; else they are matched from the last
            sizes = zip(given, event, strict=False) if from_first else zip(given[::-1], event[::-1], strict=False)
            if len(given) > len(event) or any(n not in (1, m) for n, m in sizes):
                raise DataError(f"this prior is of events of shape {given}, not {event}.")


def normal_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std²) in nats, summed over the event, (batch,) in float64, for x (batch, *event)."""
    z = (x.to(torch.float64) - mean) / std
    return (-0.5 * z * z - torch.log(std) - 0.5 * math.log(2.0 * math.pi)).flatten(1).sum(1)


def _short(value: Tensor) -> str:
    if value.numel() == 1:
        return f"{float(value):.6g}"
    return f"<{tuple(value.shape)}, {float(value.min()):.4g} to {float(value.max()):.4g}>"
