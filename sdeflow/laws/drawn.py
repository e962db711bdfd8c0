"""The common part of laws that are drawn in float64 on the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sdeflow.numerics.checks import checked_dtype, checked_shape
from sdeflow.numerics.noise import NoiseStream

__all__ = ["DrawnLaw"]


class DrawnLaw(ABC):
    """A law p(x) of states (batch, *event) that is drawn in float64 on the CPU, for every dtype and device."""

    def sample(
        self,
        shape: tuple[int, ...],
        seed: int | torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Independent draws of the given ``shape`` (batch, *event)."""
        shape, dtype = checked_shape(shape), checked_dtype(dtype)
        self.require_event(shape[1:])
        drawn = self.drawn(shape, NoiseStream(seed, "prior"))
        return drawn.to(device=device, dtype=dtype or torch.get_default_dtype())

    @abstractmethod
    def drawn(self, shape: tuple[int, ...], noise: NoiseStream) -> Tensor:
        """Draws of the given ``shape``, in float64 on the CPU."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (batch,) in float64, for x (batch, *event)."""

    def require_event(self, event: tuple[int, ...]) -> None:  # noqa: B027 - any event is right by default
        """Raises a DataError if this law is not one of events of this shape."""
