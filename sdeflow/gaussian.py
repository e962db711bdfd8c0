r"""A Gaussian over events with independent coordinates: the prior p(x_T), and any marginal of Gaussian data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.errors import DataError
from sdeflow.noise import NoiseStream

__all__ = ["Gaussian", "normal_log_density"]


class Gaussian:
    """N(mean, std^2), elementwise.

    Args:
        mean: () or a tensor that broadcasts to an event.
        std: the standard deviation, likewise, positive.
    """

    def __init__(self, mean: Tensor | float, std: Tensor | float) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.std = torch.as_tensor(std, dtype=torch.float64)
        if not bool(torch.isfinite(self.mean).all()) or not bool((self.std > 0).all() & torch.isfinite(self.std).all()):
            raise DataError(f"a Gaussian needs a finite mean and a positive, finite std, not {mean} and {std}.")

    def sample(
        self,
        shape: tuple[int, ...],
        seed: int | torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Samples of the given ``shape`` (batch, *event)."""
        for value in (self.mean, self.std):
            if len(value.shape) > len(shape) - 1 or any(
                n not in (1, m) for n, m in zip(reversed(value.shape), reversed(shape), strict=False)
            ):
                raise DataError(f"this prior is of events of shape {tuple(value.shape)}, not {tuple(shape[1:])}.")
        noise = NoiseStream(seed, "prior").normal(shape, dtype, device)
        mean, std = (value.to(device=device, dtype=noise.dtype) for value in (self.mean, self.std))
        return mean + std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (batch,) in float64, for x (batch, *event)."""
        return normal_log_density(x, self.mean.to(x.device), self.std.to(x.device))

    def kl_per_dimension(self, other: Gaussian) -> float:
        """KL(self || other) in nats, averaged over coordinates."""
        ratio = (self.std / other.std).square()
        shift = ((self.mean - other.mean) / other.std).square()
        return float((0.5 * (ratio + shift - 1.0 - torch.log(ratio))).mean())

    def __repr__(self) -> str:
        return f"Gaussian(mean={_short(self.mean)}, std={_short(self.std)})"


def normal_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std²) in nats, summed over the event, (batch,) in float64, for x (batch, *event)."""
    z = (x.to(torch.float64) - mean) / std
    return (-0.5 * z * z - torch.log(std) - 0.5 * math.log(2.0 * math.pi)).flatten(1).sum(1)


def _short(value: Tensor) -> str:
    if value.numel() == 1:
        return f"{float(value):.6g}"
    return f"<{tuple(value.shape)}, {float(value.min()):.4g} to {float(value.max()):.4g}>"
