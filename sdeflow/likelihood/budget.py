r"""What the ends of the flow contribute to log p: the cutoff, below which no score is known, and the prior.

**The cutoff.** The flow's density is that of x_c = y + noise, y = Φ x_0 + offset the data's mean path from 0 to the
cutoff and P the covariance of the kernel there, P0 included. A density q of y that is smooth on the scale of that
noise is blurred as by the heat equation, log q_P = log q + ½ (div P s + sᵀ P s) + O(P²): with the score s at the cutoff

    log p_data(x) = log p_c(y) + log|Φ| + C,      C = -½ (div P s + sᵀ P s).

A second call at twice the noise tells how C changes on the way to no noise at all: with C' the same at that score,
C + ½ (C - C') is correct to second order, and half the difference of C and C' says how far to trust it. Data on a
lower-dimensional set have no density, and a C of the size of their missing dimensions. With auxiliary components the
joint law at the cutoff is what is meant: their noise is not small there.

Without a Gaussian kernel p changes along the flow's v as ∂_t log p = -(div v + v·s), which is drift and blur in one:

    log p_data(x) = log p_c(x) + C,      C = div w + w·s,      w = ∫_0^c v(x, t; s) dt - ½ P0 s

with the score s at the cutoff c; again that at 2c tells how C changes, and half the difference is taken off.

**The prior.** What the flow measures with is π, and the score at T belongs to some p_T. Along the straight line from a
point m, ∫ s·dx = log p_T(x) - log p_T(m), and what is missing, log p_T(m), follows from E_q[p_T / q] = 1 for any q near
p_T: the prior that the data's moments or the score itself suggest. The draws of q are doubled until the standard error
of that mean is small, and the integral is taken by Gauss and Kronrod, so that both parts know their own error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sdeflow.kernels.gaussian import Path
from sdeflow.laws.each import EachSample
from sdeflow.laws.gaussian import Gaussian
from sdeflow.numerics.linear import Linear
from sdeflow.numerics.traces import Trace, widening
from sdeflow.solving.model import Model
from sdeflow.solving.prior_of import Prior
from sdeflow.symbolic.equations import probability_flow

__all__ = ["mean_path", "prior_mismatch", "truncation"]

_Way = Callable[[Tensor, Tensor], Tensor]
"""(x, s) -> a field of x and of the score s there."""

# Kronrod's seven points in (-1, 1), their weights, and those of the three of Gauss among them.
_RAY = np.array([-0.960491268708020283, -0.774596669241483377, -0.434243749346802558, 0.0])
_MASS = np.array([0.104656226026467265, 0.268488089868333440, 0.401397414775962222, 0.450916538658474142])
_GAUSS = np.array([0.0, 5.0 / 9.0, 0.0, 8.0 / 9.0])
_RAY, _MASS, _GAUSS = np.append(_RAY, -_RAY[2::-1]), np.append(_MASS, _MASS[2::-1]), np.append(_GAUSS, _GAUSS[2::-1])
_GAUSS_TIMES, _GAUSS_MASS = np.polynomial.legendre.leggauss(3)  # between 0 and the cutoff
_DRAWS, _MOST_DRAWS = 64, 1024  # of the prior, for the constant
_SMALL = 0.01  # nats, of the constant's error, and of the integral's
_PIECES = 2, 4, 8  # of a line integral that one formula does not find
_TAILS = 2.0  # weights have heavy tails, of which few draws tell too little


def mean_path(model: Model, x: Tensor) -> tuple[Tensor, float]:
    """y = Φ x + offset at the cutoff in float64, for data x, and log|Φ|; x and 0 without a Gaussian kernel."""
    x = x.double()
    if model.gaussian is None:
        return x, 0.0
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
    found = partial(_change, model, dtype=x.dtype, trace=trace, seed=seed, rows=rows)
    if model.gaussian is None:
        return _along_the_flow(model, x, found, from_data)
    path = _path(model, x.double(), model.cutoff)
    y = _moved(model, path, x.double())
    noise = path.sigma.gram
    first, error, s = found(y if from_data else x.double(), model.cutoff, _blur(model, noise))
    if not from_data:
        shift = (s * (y - x)).flatten(1).sum(1) + _volume(path, x)
        return first + shift, error
    time = torch.as_tensor(model.cutoff, dtype=torch.float64)
    later = float(model.kernel.time_of(model.kernel.half_log_snr(time) - 0.5 * math.log(2.0)))
    further = _path(model, x.double(), later)
    onward = further.alpha @ path.alpha.inverse
    twice, _, _ = found(_moved(model, further, x.double()), later, _blur(model, onward @ noise @ onward.T))
    return _extrapolated(first, twice, error)


def _along_the_flow(
    model: Model, x: Tensor, found: Callable[[Tensor, float, _Way], tuple[Tensor, Tensor, Tensor]], from_data: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`truncation`, without a Gaussian kernel: w is the integral of the flow's velocity over [0, cutoff]."""
    cutoff, declaration = model.cutoff, model.declaration
    drift = model.drift(probability_flow(declaration))
    times = torch.as_tensor(0.5 * cutoff * (1.0 + _GAUSS_TIMES))
    P0 = x.new_tensor(declaration.initial_covariance, dtype=torch.float64)

    def way(x: Tensor, s: Tensor) -> Tensor:
        moved = -0.5 * (torch.einsum("ij,bj...->bi...", P0, s) if declaration.coupled else P0[0, 0] * s)
        for time, mass in zip(times, _GAUSS_MASS.tolist(), strict=True):
            moved = moved + 0.5 * cutoff * mass * drift(x, time, s)
        return moved

    first, error, _ = found(x.double(), cutoff, way)
    if not from_data:
        return first, error
    later = min(2.0 * cutoff, model.T)
    if bool(P0.any()):  # a blur that no later score tells of
        return first, first.detach().abs() + error
    twice, _, _ = found(x.double(), later, way)
    return _extrapolated(first, twice, error)


def _extrapolated(first: Tensor, twice: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """C to second order from that at the cutoff and at twice its noise, and how far to trust it."""
    half = 0.5 * (first - twice)
    return first + half, half.detach().abs() + error


def _path(model: Model, x: Tensor, t: float) -> Path:
    return model.kernel.require_gaussian("log p of the data").path(x, torch.as_tensor(t, dtype=torch.float64))


def _moved(model: Model, path: Path, x: Tensor) -> Tensor:
    kernel = model.kernel
    return kernel.from_basis(path.alpha(kernel.to_basis(x)) + path.offset)


def _volume(path: Path, x: Tensor) -> float:
    """log|Φ|, whose determinant is positive."""
    return float(path.alpha.log_det(tuple(x.shape[1:])).sum())


def _blur(model: Model, noise: Linear) -> Callable[[Tensor, Tensor], Tensor]:
    """w = -½ P s."""
    kernel = model.kernel
    return lambda _, s: -0.5 * kernel.from_basis(noise(kernel.to_basis(s)))


def _change(
    model: Model, x: Tensor, t: float, way: _Way, *, dtype: torch.dtype, trace: Trace,
    seed: int, rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """C = div w + w·s, w a function of x and of the score s at t; its standard error, and s."""
    graph = torch.is_grad_enabled()
    integral = trace.start(
        tuple(x.shape), [1.0], seed=seed, rows=rows, device=x.device, create_graph=graph, purpose="truncation"
    )
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_(True)
        s = model.score(x.to(dtype), t).double()
        field = way(x, s)
        integral.add(field, x)
        change = integral.result().value + (field * s).flatten(1).sum(1)
    if not graph:
        change, s = change.detach(), s.detach()
    return change, integral.result().bar, s


@torch.no_grad()
def prior_mismatch(model: Model, x_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log p_T(x_T) - log π(x_T) and its own error bar, (batch,) each in nats, p_T the law whose gradient the score is.

    Samples with conditions of their own have a constant for each condition.

    Args:
        model: the SDE with its score and prior.
        x_T: (batch, *event) in float64.
        dtype: in which the score is called.
    """
    model, x_T = model.of_batch(len(x_T)), x_T.detach()
    conditions, near = model.score.conditions(x_T.to(dtype)), model.with_own_prior().prior_for(x_T.to(dtype))
    if conditions is None or not len(x_T):
        return _mismatch(model, near, x_T, dtype)
    found = torch.zeros(2, len(x_T), dtype=torch.float64, device=x_T.device)
    for condition in conditions.unique():
        rows = (conditions == condition).nonzero().flatten()
        of_these = near.laws[near.which[rows[0]]] if isinstance(near, EachSample) else near
        found[:, rows] = torch.stack(_mismatch(model.rows(rows), of_these, x_T[rows.to(x_T.device)], dtype))
    return found[0], found[1]


def _mismatch(model: Model, near: Prior, x_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As :func:`prior_mismatch`, of samples with the same condition, whose p_T is about ``near``."""
    prior = model.prior_for(x_T.to(dtype))
    if isinstance(near, Gaussian):
        centre = near.coloured(torch.zeros_like(x_T[:1]))
    else:
        centre = _drawn(near, x_T, 0).mean(0, keepdim=True)
    log_weight = torch.empty(0, dtype=torch.float64, device=x_T.device)
    while True:
        draws = _drawn(near, x_T, len(log_weight) // _DRAWS)
        if isinstance(near, Gaussian):  # in pairs about the centre, whose odd moments cancel
            draws = torch.cat([draws[::2], 2.0 * centre - draws[::2]])
        of_draws, _ = _from_centre(model.spread(len(draws)), centre, draws, dtype)
        of_draws = (of_draws - near.log_prob(draws)).reshape(2, -1).logsumexp(0) - math.log(2.0)
        log_weight = torch.cat([log_weight, of_draws])
        count = len(log_weight)
        share = torch.softmax(log_weight, 0) * count
        dof = share.new_tensor(count - 1.0)
        of_constant = torch.log1p(_TAILS * widening(dof) * share.std() / math.sqrt(count))
        if float(of_constant) <= _SMALL or 2 * count >= _MOST_DRAWS:
            break
    at_centre = math.log(count) - torch.logsumexp(log_weight, 0)
    found, error = _from_centre(model, centre, x_T, dtype)
    return found + at_centre - prior.log_prob(x_T), torch.hypot(error, of_constant)


def _drawn(near: Prior, like: Tensor, round: int) -> Tensor:
    """Some draws near p_T, those of each round independent."""
    return near.sample((_DRAWS, *like.shape[1:]), seed=round, dtype=torch.float64, device=like.device)


def _from_centre(model: Model, centre: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log p_T at x, minus that at the centre, and what it may be off by, (batch,) each.

    The error is the difference to a formula of lower order; where that is not small, to as many pieces of half the
    length, as long as that tells more.
    """
    total, error = _in_pieces(model, centre, x, dtype, 1)
    for pieces in _PIECES:
        if not float(error.max()) > _SMALL:
            break
        finer, _ = _in_pieces(model, centre, x, dtype, pieces)
        change = (finer - total).abs()
        better = change < error
        total, error = torch.where(better, finer, total), torch.where(better, change, error)
    return total, error


def _in_pieces(model: Model, centre: Tensor, x: Tensor, dtype: torch.dtype, pieces: int) -> tuple[Tensor, Tensor]:
    """The integral of s from the centre to x, and its difference to a formula of lower order, (batch,) each."""
    way, total = x - centre, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    rough = torch.zeros_like(total)
    for piece in range(pieces):
        for node, mass, of_gauss in zip(_RAY, _MASS, _GAUSS, strict=True):
            along = (piece + 0.5 * (1.0 + node)) / pieces
            s = model.score((centre + along * way).to(dtype), model.T).double()
            rate = 0.5 * (s * way).flatten(1).sum(1) / pieces
            total, rough = total + mass * rate, rough + of_gauss * rate
    return total, (total - rough).abs()
