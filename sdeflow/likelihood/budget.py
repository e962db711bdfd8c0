r"""What the ends of the flow contribute to log p: the cutoff, below which no score is known, and the prior.

**The cutoff.** The flow's density is that of x_c = y + noise, y = Φ x_0 + offset the data's mean path from 0 to the
cutoff and P the covariance of the kernel there, P0 included. A density q of y that is smooth on the scale of that
noise is blurred as by the heat equation, log q_P = log q + ½ (div P s + sᵀ P s) + O(P²): with the score s at the cutoff

    log p_data(x) = log p_c(y) + log|Φ| + C,      C = -½ (div P s + sᵀ P s).

A second call at twice the noise tells how C changes on the way to no noise at all: with C' the same at that score,
C + ½ (C - C') is correct to second order, and half the difference of C and C' says how far to trust it. Data on a
lower-dimensional set have no density, and a C of the size of their missing dimensions. With auxiliary components the
joint law at the cutoff is what is meant: their noise is not small there.

**The prior.** What the flow measures with is π, and the score at T belongs to some p_T. Along the straight line from a
point m, ∫ s·dx = log p_T(x) - log p_T(m), and what is missing, log p_T(m), follows from E_q[p_T / q] = 1 for any q near
p_T: the prior that the data's moments or the score itself suggest.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sdeflow.gaussian import Gaussian
from sdeflow.kernel import Path
from sdeflow.linear import Linear
from sdeflow.model import Model
from sdeflow.traces import Trace

__all__ = ["mean_path", "prior_mismatch", "truncation"]

_RAY, _MASS = np.polynomial.legendre.leggauss(4)
_DRAWS = 64  # of the prior, for the constant


def mean_path(model: Model, x: Tensor) -> tuple[Tensor, float]:
    """y = Φ x + offset at the cutoff in float64, for data x, and log|Φ|."""
    x = x.double()
    path = _path(model, x, model.cutoff)
    return _moved(model, path, x), _volume(path, x)


def truncation(
    model: Model, x: Tensor, trace: Trace, *, seed: int, rows: Tensor | None = None, from_data: bool = False
) -> tuple[Tensor, Tensor]:
    """log p_data(x) minus what the flow measures, and what may be left of it, (batch,) each in nats.

    Args:
        model: the SDE with its score.
        x: data (batch, *event).
        trace: how the divergence is found.
        seed, rows: of its probes.
        from_data: what the flow measures is log p_c(y) + log|Φ|, for :func:`mean_path`; else log p_c(x).
    """
    zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if not len(x) or model.declaration.auxiliary:
        return zero, zero
    if model.kernel is None:
        return zero + math.nan, zero + math.nan
    path = _path(model, x.double(), model.cutoff)
    y = _moved(model, path, x.double())
    noise = path.sigma.gram
    first, error, s = _deblurring(
        model, y if from_data else x.double(), x.dtype, model.cutoff, noise, trace, seed, rows
    )
    if not from_data:
        shift = (s * (y - x)).flatten(1).sum(1) + _volume(path, x)
        return first + shift, error
    time = torch.as_tensor(model.cutoff, dtype=torch.float64)
    later = float(model.kernel.time_of(model.kernel.half_log_snr(time) - 0.5 * math.log(2.0)))
    further = _path(model, x.double(), later)
    onward = further.alpha @ path.alpha.inverse
    twice, _, _ = _deblurring(
        model, _moved(model, further, x.double()), x.dtype, later, onward @ noise @ onward.T, trace, seed, rows
    )
    half = 0.5 * (first - twice)
    return first + half, half.detach().abs() + error


def _path(model: Model, x: Tensor, t: float) -> Path:
    return model.kernel.path(x, torch.as_tensor(t, dtype=torch.float64))


def _moved(model: Model, path: Path, x: Tensor) -> Tensor:
    kernel = model.kernel
    return kernel.from_basis(path.alpha(kernel.to_basis(x)) + path.offset)


def _volume(path: Path, x: Tensor) -> float:
    """log|Φ|, whose determinant is positive."""
    return float(path.alpha.log_det(tuple(x.shape[1:])).sum())


def _deblurring(
    model: Model, x: Tensor, dtype: torch.dtype, t: float, noise: Linear, trace: Trace, seed: int, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """C = -½ (div P s + sᵀ P s) at t, its standard error, and s."""
    kernel, graph = model.kernel, torch.is_grad_enabled()
    integral = trace.start(
        tuple(x.shape), [1.0], seed=seed, rows=rows, device=x.device, create_graph=graph, purpose="truncation"
    )
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_(True)
        s = model.score(x.to(dtype), t).double()
        field = kernel.from_basis(noise(kernel.to_basis(s)))
        integral.add(field, x)
        change = -0.5 * (integral.result().value + (field * s).flatten(1).sum(1))
    if not graph:
        change, s = change.detach(), s.detach()
    return change, 0.5 * integral.result().stderr, s


@torch.no_grad()
def prior_mismatch(model: Model, x_T: Tensor, dtype: torch.dtype) -> Tensor:
    """log p_T(x_T) - log π(x_T), (batch,) in nats, p_T the law whose gradient the score is at T.

    The constant is a mean over 64 draws; of a score with labels for each sample, over the labels too.

    Args:
        model: the SDE with its score and prior.
        x_T: (batch, *event) in float64.
        dtype: in which the score is called.
    """
    like, event = x_T[:1].to(dtype), tuple(x_T.shape[1:])
    prior, near = model.prior_for(like), model.with_own_prior().prior_for(like)
    draws = near.sample((_DRAWS, *event), seed=0, dtype=torch.float64, device=x_T.device)
    centre = draws.mean(0, keepdim=True)
    if isinstance(near, Gaussian):  # in pairs about the centre, whose odd moments cancel
        centre = near.coloured(torch.zeros_like(centre))
        draws = torch.cat([draws[::2], 2.0 * centre - draws[::2]])

    def from_centre(model: Model, x: Tensor) -> Tensor:
        """log p_T at x, minus that at the centre."""
        way, total = x - centre, torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for node, mass in zip(_RAY, _MASS, strict=True):
            s = model.score((centre + 0.5 * (1.0 + node) * way).to(dtype), model.T).double()
            total += 0.5 * mass * (s * way).flatten(1).sum(1)
        return total

    of_draws = from_centre(model.of_probes(_DRAWS), draws) - near.log_prob(draws)
    at_centre = math.log(_DRAWS) - torch.logsumexp(of_draws, 0)
    x_T = x_T.detach()
    return from_centre(model, x_T) + at_centre - prior.log_prob(x_T)
