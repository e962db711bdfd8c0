r"""Scores s(x, t) = ∇ log p_t(x): networks in every parametrisation, and exact ones of Gaussian mixtures.

With x_t = alpha x_0 + offset + sigma eps, one network output F stands for any of

    ============  ===========================================  =================================
    predicts      the network approximates                      eps from F,  x̃ = x - offset
    ============  ===========================================  =================================
    "score"       ∇ log p_t(x)                                  -sigmaᵀ F
    "noise"       E[eps | x_t]                                  F
    "data"        E[x_0 | x_t]                                  sigma⁻¹ (x̃ - alpha F)
    "v"           E[alpha eps - sigma x_0 | x_t]                (sigma x̃ + alpha F) / (alpha² + sigma²)
    "velocity"    E[dx_t/dt | x_t], the flow's drift            2 sigmaᵀ (g gᵀ)⁻¹ (F - a x - b)
    "edm"         the part of x_0 that scaling leaves over      K⁻ᵀ z - M L⁻ᵀ F,  z = K⁻¹ sigma⁻¹ (x̃ - alpha m)
    ============  ===========================================  =================================

and then s = -sigma⁻ᵀ eps, E[x_0 | x_t] = alpha⁻¹ (x̃ - sigma eps). alpha and sigma are numbers, or matrices
for the components of a coupled state ("v" is elementwise alone). In "edm", m and c are the data's mean and
standard deviation, M = sigma⁻¹ alpha c, K Kᵀ = 1 + M Mᵀ, L Lᵀ = 1 + Mᵀ M; the network sees the whitened
state z, and it is exact for Gaussian data where F = 0. For alpha = 1 that is Karras et al. 2022
(arXiv:2206.00364): K = L = S / sigma with S² = alpha² c² + sigma². "v" is from Salimans & Ho 2022
(arXiv:2202.00512).

With a basis, all of this holds for coefficients; networks see and return the state itself. A network for
a coupled state (batch, k, C, ...) sees its components as channels, (batch, k C, ...).
"""

from __future__ import annotations

from sdeflow.scores.conditional import Conditional, Guided
from sdeflow.scores.function import CallableScore, DeclaredSDE, ScoreFunction, as_score, evaluating
from sdeflow.scores.mixture import GaussianMixture
from sdeflow.scores.network import PREDICTIONS, Score
from sdeflow.scores.readout import GridScore, Readout

__all__ = [
    "PREDICTIONS",
    "CallableScore",
    "Conditional",
    "DeclaredSDE",
    "GaussianMixture",
    "GridScore",
    "Guided",
    "Readout",
    "Score",
    "ScoreFunction",
    "as_score",
    "evaluating",
]
