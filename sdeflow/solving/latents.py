r"""Ways between latents z = x_T that stay where the prior has its mass.

Samples of N(0, 1) in many dimensions lie near a sphere, and straight lines between them pass far inside it. With e the
whitened latents and Ω the angle between them (Shoemake 1985),

    e(τ) = [sin((1 - τ) Ω) e_a + sin(τ Ω) e_b] / sin Ω,

of norms between theirs. Where Ω is 0 or π, as always in one dimension, the straight line is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.laws.each import EachSample
from sdeflow.laws.gaussian import Gaussian
from sdeflow.numerics.checks import checked_start, checked_state
from sdeflow.solving.prior_of import Prior

__all__ = ["spherical"]

_PARALLEL = 1e-4  # of sin Ω


def spherical(prior: Prior, z_a: Tensor, z_b: Tensor, points: int) -> Tensor:
    """Latents from z_a to z_b (batch, *event), (points, batch, *event), both ends included.

    Raises:
        ValueError: for a prior that is not Gaussian, whose sphere is not known.
    """
    prior = getattr(prior, "gaussian", prior)  # of a law that is not Gaussian but has the moments of one
    if not (isinstance(prior, Gaussian) or (isinstance(prior, EachSample) and prior.is_gaussian)):
        raise ValueError(f"spherical interpolation needs a Gaussian prior, not {prior}.")
    z_a = checked_state(z_a, "z_a")
    z_b = checked_start(z_b, z_a, "z_b", "z_a")
    a, b = (prior.whitened(z.double()).flatten(1) for z in (z_a, z_b))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(a.dtype).tiny)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    tau = torch.linspace(0.0, 1.0, points, dtype=a.dtype, device=a.device)[:, None]
    sine = angle.sin()
    curved = sine > _PARALLEL
    sine = torch.where(curved, sine, 1.0)
    of_a = torch.where(curved, ((1.0 - tau) * angle).sin() / sine, 1.0 - tau)
    of_b = torch.where(curved, (tau * angle).sin() / sine, tau)
    path = of_a[..., None] * a + of_b[..., None] * b
    return torch.stack([prior.coloured(e.reshape(z_a.shape)) for e in path]).to(z_a.dtype)
