r"""What a weighting means: one objective, however its times are drawn.

With half-log-SNR lambda = log(alpha / sigma), zeta = sigma / alpha, and eps_hat the network's estimate of the noise, a
weighting stands for

    ∫ w(lambda) E‖eps - eps_hat‖² dlambda  per coordinate  =  c ∫ L(t) dt over [cutoff, T].

==============  =================================================  ===============================================
name            w(lambda)                                          source
==============  =================================================  ===============================================
"likelihood"    1                                                  arXiv:2101.09258: ½ ∫ g² E‖s - s*‖² dt, the bound
                                                                   of the KL divergence in nats
"score"         abs(dt/dlambda)                                    arXiv:2011.13456 with lambda(t) = 1 / E‖∇ log p‖²;
                                                                   DDPM's simple loss
"edm"           N(log zeta; -1.2, 1.2²) (zeta² + c²) / c²          arXiv:2206.00364, c the data's standard deviation
"min_snr"       abs(dt/dlambda) min(SNR, 5) / SNR                  arXiv:2303.09556, SNR = exp(2 lambda)
"p2"            abs(dt/dlambda) / (1 + SNR)                        arXiv:2204.00227, k = gamma = 1
a function      w(t) abs(dt/dlambda) / sigma²                      ∫ w(t) E‖s - s*‖² dt
==============  =================================================  ===============================================

In t, L(t) = E epsᵀ M eps of the error of eps, where M is the identity for "score", sigma⁻¹ g gᵀ sigma⁻ᵀ for
"likelihood" (so that L is g² times the squared error of the score, and c = ½) and w sigma⁻¹ sigma⁻ᵀ for a function.
So the definitions hold for coupled states, for schedules per coordinate and where the log-SNR stands still. There the
log-SNR of "edm", "min_snr" and "p2" is the kernel's half_log_snr, a mean over the event or the information of the
whole state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.errors import DataError, WeightingError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.numerics.checks import checked_choice, checked_numbers
from sdeflow.numerics.linear import Linear

__all__ = ["NAMES", "Weighting", "mean_weight", "metric", "of_times", "overall_std", "require_weighting", "share"]

Weighting = str | Callable[[Tensor], Tensor]

NAMES = ("likelihood", "score", "edm", "min_snr", "p2")
OF_ANY_KERNEL = ("likelihood", "score")

EDM_MEAN, EDM_STD = -1.2, 1.2  # of log zeta
_MOST_SNR = 5.0  # min-SNR's gamma


def require_weighting(weighting: Weighting, gaussian: bool = True) -> None:
    """Raises a ValueError for what is no weighting, or none of an SDE without a Gaussian kernel."""
    names = NAMES if gaussian else OF_ANY_KERNEL
    if not callable(weighting):
        other = "a function of t" if gaussian else "a function of t for an SDE without a Gaussian kernel"
        checked_choice(weighting, "weighting", names, other)


def share(weighting: Weighting) -> float:
    """c, what the objective is of ∫ L(t) dt."""
    return 0.5 if weighting == "likelihood" else 1.0


def metric(kernel: Kernel, weighting: Weighting, x: Tensor, t: Tensor, data_std: float = 1.0) -> Linear:
    """M of L(t) = epsᵀ M eps, a map of errors of eps like ``x`` (batch, *event) in the kernel's basis; t (batch,).

    Raises:
        ValueError: for an unknown name.
        WeightingError: for a function whose values are negative, not finite, or not shaped as t.
    """
    require_weighting(weighting)
    identity = kernel.maps.identity(x).to(x.device)
    if callable(weighting):
        return kernel.path(x, t).sigma.inverse.gram.times_each(of_times(weighting, t), x)
    if weighting == "score":
        return identity
    if weighting == "likelihood":
        whiten = kernel.path(x, t).sigma.inverse
        return whiten @ kernel.equation(x, t)[2] @ whiten.T
    return identity.times_each(_OF_LOG_SNR[weighting](kernel, t, data_std), x)


def mean_weight(kernel: Kernel, weighting: Weighting, x: Tensor, t: Tensor, data_std: float = 1.0) -> Tensor:
    """c tr M / d, the objective's integrand at an error of eps of unit variance, (batch,) in float64."""
    map_of_error = metric(kernel, weighting, x, t, data_std)
    trace = map_of_error.trace(tuple(x.shape[1:])) / math.prod(x.shape[1:])
    return share(weighting) * trace.to(torch.float64).expand(t.shape)


def overall_std(data_std: Tensor) -> float:
    """The root mean square of the data's standard deviations, auxiliary components (of 0) left out."""
    return float(data_std[data_std > 0].square().mean().sqrt())


def of_times(weighting: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The values of a function w(t) at times (n,), checked, in float64.

    Raises:
        WeightingError: for values that are negative, not finite, or neither one number nor shaped as t.
    """
    try:
        values = checked_numbers(weighting(t), "weighting(t)").to(t.device)
    except DataError as error:
        raise WeightingError(str(error)) from error
    if values.ndim and values.shape != t.shape:
        raise WeightingError(
            f"weighting(t) returned shape {tuple(values.shape)} for times of shape {tuple(t.shape)}: it must return a "
            "weight for each time."
        )
    values = values.expand(t.shape)
    wrong = ~(torch.isfinite(values) & (values >= 0))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise WeightingError(
            f"weighting(t) = {float(values[at]):g} at t = {float(t[at]):.6g}: weights must be finite and not negative."
        )
    return values


def _edm(kernel: Kernel, t: Tensor, data_std: float) -> Tensor:
    log_zeta = -kernel.half_log_snr(t)
    density = torch.exp(-0.5 * ((log_zeta - EDM_MEAN) / EDM_STD).square()) / (EDM_STD * math.sqrt(2.0 * math.pi))
    return density * (1.0 + (2.0 * log_zeta).exp() / data_std**2) * kernel.half_log_snr_rate(t).abs()


_OF_LOG_SNR: dict[str, Callable[[Kernel, Tensor, float], Tensor]] = {
    "edm": _edm,
    "min_snr": lambda kernel, t, data_std: (_MOST_SNR * torch.exp(-2.0 * kernel.half_log_snr(t))).clamp_max(1.0),
    "p2": lambda kernel, t, data_std: torch.sigmoid(-2.0 * kernel.half_log_snr(t)),
}
"""Weights over t, w(lambda) |dlambda/dt|."""
