r"""The Gaussian reference of the data's scale, whose flow has the divergence that is known exactly.

S Sᵀ = alpha c² alphaᵀ + sigma sigmaᵀ,      Ṡ = (a + ½ Q (S Sᵀ)⁻¹) S,      ∫ div dt = log|S_T| - log|S_cutoff|
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.numerics.linear import Linear
from sdeflow.solving.model import Model

__all__ = ["reference", "reference_growth"]


def reference(model: Model, t: Tensor, like: Tensor) -> Linear:
    """S of the Gaussian reference at t, as a map of states like ``like``."""
    kernel = model.kernel.require_gaussian("the Gaussian reference")
    path = kernel.path(like, t)
    spread = path.sigma.inverse @ path.alpha @ kernel.scale(model.reference(like), like)
    return path.sigma @ spread.root_of_one_plus_gram


def reference_growth(model: Model, like: Tensor) -> float:
    """log|S_T| - log|S_cutoff|, the exact integral of the reference's divergence; 0 for an SDE without a kernel."""
    if model.gaussian is None:
        return 0.0
    event = tuple(like.shape[1:])
    first, last = (
        float(reference(model, torch.tensor(t, dtype=torch.float64), like).log_det(event).sum())
        for t in (model.cutoff, model.T)
    )
    return last - first
