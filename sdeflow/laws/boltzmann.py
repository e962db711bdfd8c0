"""Boltzmann's law, the stationary law of underdamped Langevin dynamics (``sdeflow.symbolic.langevin``)."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from sdeflow.errors import DataError
from sdeflow.laws.drawn import DrawnLaw
from sdeflow.numerics.checks import checked_point
from sdeflow.numerics.noise import NoiseStream

__all__ = ["BoltzmannLaw"]


class _OfPosition(Protocol):
    def quantile(self, probability: Tensor) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...

    def cdf(self, x: Tensor) -> Tensor: ...


class BoltzmannLaw(DrawnLaw):
    """p(x, v) ∝ exp(-Φ(x) - v² / (2 θ)) of states (batch, 2, *event); coordinates of the event are independent.

    Args:
        of_position: the law ∝ exp(-Φ) of the position.
        temperature: θ, the variance of the velocity.
        position, velocity: the indices of these components, 0 and 1 or 1 and 0.
    """

    def __init__(self, of_position: _OfPosition, temperature: float, position: int, velocity: int) -> None:
        self.of_position, self.temperature = of_position, temperature
        self.position, self.velocity = position, velocity

    def drawn(self, shape: tuple[int, ...], noise: NoiseStream) -> Tensor:
        part = (shape[0], *shape[2:])
        positions = self.of_position.quantile(noise.uniform(part, torch.float64))
        velocities = math.sqrt(self.temperature) * noise.normal(part, torch.float64)
        return torch.stack((positions, velocities) if self.position == 0 else (velocities, positions), dim=1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x, v) in nats, (batch,) in float64, for states (batch, 2, *event); -inf outside the domain."""
        x = checked_point(x, sides=2)
        self.require_event(tuple(x.shape[1:]))
        positions, velocities = (x[:, i].double().reshape(len(x), -1) for i in (self.position, self.velocity))
        constant = 0.5 * math.log(2.0 * math.pi * self.temperature)
        of_velocity = -0.5 * velocities.square() / self.temperature - constant
        return self.of_position.log_prob(positions) + of_velocity.sum(1)

    def require_event(self, event: tuple[int, ...]) -> None:
        if event[0] != 2:
            raise DataError(f"this prior is of states (batch, 2, *event), position and velocity, not (batch, {event}).")

    def __repr__(self) -> str:
        return f"BoltzmannLaw(position ~ {self.of_position}, velocity variance {self.temperature:.6g})"
