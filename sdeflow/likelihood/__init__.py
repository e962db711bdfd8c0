r"""The exact log-likelihood of the probability flow (Chen et al. 2018; arXiv:2011.13456, appendix D.2).

Along dx/dt = v(x, t), log p(x(cutoff)) = log π(x(T)) + ∫ div v dt. For v = a x + b - ½ Q s with Q = g gᵀ,
everything that is linear is done exactly: with S Sᵀ = alpha c² alphaᵀ + sigma sigmaᵀ, the covariance of a
Gaussian reference of scale c,

    log p = log π(x_T) + log|S_T| - log|S_cutoff| - ∫ ½ (div Q s + tr Q (S Sᵀ)⁻¹) dt

for any c > 0, and the integrand vanishes for Gaussian data of scale c.

    route                 which of these ways is taken
    nodes, exponential    on the exponential solver's own nodes, in so many calls or to an error of log p in nats
    continuous            log p as one more coordinate of the state, by torchdiffeq: for every SDE
    adjoint               the gradient in x and the parameters, in memory that does not grow with the steps
    budget                what the cutoff and the prior contribute
    bits                  of integer data, by dequantisation

What is measured is the density at the cutoff, or that of the data; joint for a coupled state; in nats, in float64.
"""

from __future__ import annotations

from sdeflow.likelihood.bits import bits_per_dim
from sdeflow.likelihood.measure import data_log_prob, log_prob
from sdeflow.likelihood.result import LogProb

__all__ = ["LogProb", "bits_per_dim", "data_log_prob", "log_prob"]
