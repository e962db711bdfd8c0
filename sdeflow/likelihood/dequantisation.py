r"""Discrete data under a continuous density: dequantisation, uniform, truncated normal, variational.

Integer k in 0 .. levels - 1 stands for the bin x = low + (high - low) (k + u) / levels, u in [0, 1]. A density p of
x gives the image k the probability of its bin, and any law q(u | k) on [0, 1]^d bounds it (Jensen):

    log P(k) = log ∫ p(x(k, u)) |dx/du| du  >=  E_q [log p(x) + log|dx/du| - log q(u | k)]  =  E_q log w,

with log|dx/du| = d log((high - low) / levels), and bits per dimension = -log P(k) / (d log 2). K draws of u tighten it:

    E log (1/K Σ_k w_k)   rises with K to log P(k)   (Burda et al. 2015, arXiv:1509.00519).

    Uniform            q = 1 (Theis et al. 2015, arXiv:1511.01844): +7 bits for [-1, 1] and 256 levels, +8 for [0, 1]
    TruncatedNormal    u = ½ + n / (2 τ), n ~ N(0, 1) on [-τ, τ] (i-DODE, arXiv:2305.03935)
    Variational        u = sigmoid(m(k) + e^{l(k)} ε), m and l by a network (Flow++, arXiv:1902.00275)

The truncated normal adds to the middle of the bin the noise sigma / alpha that a model which was trained on the
integers themselves has seen at its cutoff, cut off at the edges of the bin: τ = width alpha / (2 sigma). Its entropy
per dimension is H(n) - log(2 τ), H(n) = ½ log(2πe) + log Z - τ φ(τ) / Z, Z = 2 Φ(τ) - 1. With x_ε = alpha x, the
state at the cutoff, and p(x) = alpha^d p_ε(alpha x), all scales but one cancel:

    E_q log w = E log p_ε(x_ε) + d (H(n) + log sigma),

the form of arXiv:2305.03935; the width of the bins enters by τ alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sdeflow.errors import DataError
from sdeflow.numerics.checks import (
    checked_count,
    checked_dtype,
    checked_flag,
    checked_images,
    checked_methods,
    checked_numbers,
    checked_real,
)
from sdeflow.numerics.noise import NoiseStream, resolve_seed
from sdeflow.numerics.traces import heavy_tails, widening
from sdeflow.solving.model import Model

__all__ = [
    "Bits",
    "Dequantisation",
    "Dequantised",
    "Levels",
    "TruncatedNormal",
    "Uniform",
    "Variational",
    "bits_from",
    "bits_per_dim",
]


_OF_SCHEME = (("sample",), "sdeflow.likelihood.dequantisation.Uniform()")


@dataclass(frozen=True)
class Levels:
    """The affine map x = low + (high - low) (k + u) / levels from integers k and u in [0, 1] to a model's range.

    Args:
        levels: how many grey levels there are, at least 2.
        low, high: the range of x that the model was trained on, finite, low < high.

    Raises:
        ValueError: otherwise.
    """

    levels: int
    low: float
    high: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", checked_count(self.levels, "levels", 2))
        for name in ("low", "high"):
            checked_real(getattr(self, name), name, "finite, with low < high", math.isfinite)
        if not self.low < self.high:
            raise ValueError(f"low and high must be finite and low < high, not low={self.low!r}, high={self.high!r}.")

    def state(self, position: Tensor) -> Tensor:
        """x of k + u, shaped alike."""
        return self.low + (self.high - self.low) * position / self.levels

    @property
    def width(self) -> float:
        """dx/du of :meth:`state`, the width of a bin."""
        return (self.high - self.low) / self.levels

    def log_det(self, d: int) -> float:
        """log|dx/du| in nats over d dimensions."""
        return d * math.log(self.width)

    def checked(self, images: Tensor) -> Tensor:
        """``images`` if they are integers (batch, *event) in 0 .. levels - 1.

        Raises:
            DataError: otherwise.
        """
        images = checked_images(images)
        if images.numel() and (int(images.min()) < 0 or int(images.max()) >= self.levels):
            raise DataError(f"images hold {int(images.min())} .. {int(images.max())}, outside 0 .. {self.levels - 1}.")
        return images


@dataclass(frozen=True)
class Dequantised:
    """Draws of the continuous data behind integer images.

    Attributes:
        x: (draws, batch, *event).
        log_q: log q(u | k) in nats, a density of u in [0, 1]^d, (draws, batch) in float64.
        log_det: log|dx/du| in nats, over the event.
        moment: powers s -> log E[q^-s] up to a constant times s, where it is known.
    """

    x: Tensor
    log_q: Tensor
    log_det: float
    moment: Callable[[Tensor], Tensor] | None = None

    def log_weight(self, log_p: Tensor) -> Tensor:
        """log p(x) + log|dx/du| - log q(u | k), (draws, batch), for log p(x) of the same shape, in nats.

        Its expectation is at most log P(k), and that of its exponential is P(k).
        """
        if tuple(log_p.shape) != tuple(self.log_q.shape):
            raise DataError(f"log_p must be (draws, batch) = {tuple(self.log_q.shape)}, not {tuple(log_p.shape)}.")
        return log_p.to(torch.float64) + self.log_det - self.log_q


class Dequantisation(Protocol):
    """A law q(u | k) of the position inside a bin."""

    def sample(
        self,
        images: Tensor,
        *,
        levels: int,
        low: float,
        high: float,
        seed: int | torch.Generator | None = None,
        draws: int = 1,
        dtype: torch.dtype | None = None,
        first_row: int = 0,
    ) -> Dequantised: ...


class Uniform:
    """q(u | k) = 1 (arXiv:1511.01844). Its gap is the variation of log p within a bin."""

    def sample(
        self,
        images: Tensor,
        *,
        levels: int,
        low: float,
        high: float,
        seed: int | torch.Generator | None = None,
        draws: int = 1,
        dtype: torch.dtype | None = None,
        first_row: int = 0,
    ) -> Dequantised:
        """Draws of x; the first ``n`` of more draws are those of ``n`` draws.

        Args:
            images: integers (batch, *event) in 0 .. levels - 1.
            levels, low, high: as :class:`Levels`.
            seed: of the draws.
            draws: for each image.
            dtype: of x; by default torch's.
            first_row: the number of the first image, where these are a part of a larger set.

        Raises:
            DataError: for images of another kind.
            ValueError: for levels, a range or a number of draws that make no sense.
        """
        grid, images, stream = _begin(images, levels, low, high, seed, draws, first_row)
        # Drawn in the dtype of x, so that the same seed means the same images as it always has.
        u = torch.stack([stream.uniform(tuple(images.shape), _float(dtype), images.device) for _ in range(draws)])
        log_q = torch.zeros(draws, len(images), dtype=torch.float64, device=images.device)
        return _dequantised(grid, images, u, log_q, dtype)

    def __repr__(self) -> str:
        return "Uniform()"


class TruncatedNormal:
    """Gaussian noise about the middle of the bin, cut off at its edges (i-DODE, arXiv:2305.03935).

    For models trained on the integers themselves (the middles of their bins) instead of dequantised data: it asks of
    the model what it has seen. Of other models it is a valid bound, and a poor one where the noise is far
    narrower than the bins.

    Args:
        noise: sigma / alpha at the model's cutoff, in the units of x; or the model, from which it is read
            (``flow.model``; the mean in the logarithm where it differs between coordinates).

    Raises:
        ValueError: for noise that is not positive and finite.
    """

    def __init__(self, noise: float | Model) -> None:
        if isinstance(noise, Model):
            kernel = noise.kernel.require_gaussian("The noise at the cutoff")
            with torch.no_grad():
                noise = math.exp(-float(kernel.half_log_snr(kernel.cutoff)))
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 < noise < math.inf:
            raise ValueError(f"noise must be positive and finite, sigma / alpha at the cutoff, not {noise!r}.")
        self.noise = float(noise)

    def tau(self, levels: int, low: float, high: float) -> float:
        """τ, half the width of a bin in units of the noise."""
        return Levels(levels, low, high).width / (2.0 * self.noise)

    def entropy(self, levels: int, low: float, high: float) -> float:
        """E[-log q(u | k)] in nats per dimension, H(n) - log(2 τ); never positive, and 0 in the limit of wide noise."""
        tau = self.tau(levels, low, high)
        density = math.exp(-0.5 * tau * tau - 0.5 * math.log(2.0 * math.pi) - _log_mass(tau))
        return 0.5 * math.log(2.0 * math.pi * math.e) + _log_mass(tau) - tau * density - math.log(2.0 * tau)

    def sample(
        self,
        images: Tensor,
        *,
        levels: int,
        low: float,
        high: float,
        seed: int | torch.Generator | None = None,
        draws: int = 1,
        dtype: torch.dtype | None = None,
        first_row: int = 0,
    ) -> Dequantised:
        """Draws of x; arguments as :meth:`Uniform.sample`."""
        grid, images, stream = _begin(images, levels, low, high, seed, draws, first_row)
        tau = self.tau(levels, low, high)
        level = torch.stack(
            [stream.uniform(tuple(images.shape), torch.float64, images.device) for _ in range(draws)]
        )  # fmt: skip
        # By inversion: Φ(n) - ½ is uniform on ± ½ Z.
        n = torch.special.ndtri(0.5 + (level - 0.5) * math.exp(_log_mass(tau))).clamp(-tau, tau)
        d = math.prod(images.shape[1:])
        log_q = -0.5 * n.square().flatten(2).sum(2)
        log_q = log_q + d * (math.log(2.0 * tau) - 0.5 * math.log(2.0 * math.pi) - _log_mass(tau))
        points, mass = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(64))
        square = 0.5 * (tau * points).square()

        def moment(power: Tensor) -> Tensor:
            """log E[q^-power] up to a constant times the power."""
            inside = (power.cpu()[..., None] - 1.0) * square + mass.log()
            return d * (inside.logsumexp(-1) - (mass.log() - square).logsumexp(0)).to(power.device)

        return _dequantised(grid, images, 0.5 + n / (2.0 * tau), log_q, dtype, moment)

    def __repr__(self) -> str:
        return f"TruncatedNormal(noise={self.noise:.6g})"


class Variational(nn.Module):
    """u = sigmoid(m + e^l ε), ε ~ N(0, 1), with m and l from a network (variational dequantisation, arXiv:1902.00275).

    By change of variables log q(u | k) = Σ log N(ε; 0, 1) - l - log(u (1 - u)), exactly. Gradients flow to the network
    through x and log q: to train it, maximise ``drawn.log_weight(log_p(drawn.x)).mean()``. At m = 0, l = 0.5 it is
    nearly uniform.

    Args:
        net: a module that takes the middles of the bins as states, (batch, *event), and returns m and l, a pair of
            tensors that broadcast to them.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def sample(
        self,
        images: Tensor,
        *,
        levels: int,
        low: float,
        high: float,
        seed: int | torch.Generator | None = None,
        draws: int = 1,
        dtype: torch.dtype | None = None,
        first_row: int = 0,
    ) -> Dequantised:
        """Draws of x, differentiable in the network's parameters; arguments as :meth:`Uniform.sample`.

        Raises:
            DataError: also for a network that does not return a pair of finite tensors of the images' shape.
        """
        grid, images, stream = _begin(images, levels, low, high, seed, draws, first_row)
        middles = grid.state(images + 0.5).to(_float(dtype))
        mean, log_std = self._moments(middles)
        eps = torch.stack([stream.normal(tuple(images.shape), torch.float64, images.device) for _ in range(draws)])
        z = mean + log_std.exp() * eps
        # log u = -softplus(-z) and log(1 - u) = -softplus(z), which keep their digits next to the edges.
        log_u = -0.5 * eps.square() - 0.5 * math.log(2.0 * math.pi) - log_std + softplus(-z) + softplus(z)
        return _dequantised(grid, images, torch.sigmoid(z), log_u.flatten(2).sum(2), dtype)

    def _moments(self, middles: Tensor) -> tuple[Tensor, Tensor]:
        """m and l, (batch, *event) in float64."""
        output = self.net(middles)
        if not isinstance(output, tuple | list) or len(output) != 2 or not all(isinstance(v, Tensor) for v in output):
            raise DataError(
                f"the network must return a pair of tensors, mean and log std, not {type(output).__name__}."
            )
        shape = tuple(middles.shape)
        try:
            mean, log_std = (v.to(torch.float64).expand(shape) for v in output)
        except RuntimeError as error:
            given = " and ".join(str(tuple(v.shape)) for v in output)
            raise DataError(f"mean and log std must broadcast to the images, {shape}; they are {given}.") from error
        if not bool(torch.isfinite(mean).all() & torch.isfinite(log_std).all()):
            raise DataError("the network's mean and log std are not finite.")
        return mean, log_std


@dataclass(frozen=True)
class Bits:
    """Bits per dimension of images, each (batch,) in float64.

    Attributes:
        value: an upper bound on -log₂ P(k) / d in expectation; it falls with the number of draws.
        stderr: its standard error over the draws (and of log p itself where that was given); NaN for one draw.
        effective: the effective number of draws, (Σ w)² / Σ w², from 1 to ``draws``: near 1 the standard error
            of the importance-weighted value is not to be trusted.
        draws: K.
    """

    value: Tensor
    stderr: Tensor
    effective: Tensor
    draws: int


def bits_from(
    drawn: Dequantised, log_p: Tensor, log_p_stderr: Tensor | None = None, importance: bool = True
) -> Bits:  # fmt: skip
    r"""Bits per dimension from log p of the draws.

        importance       -log (1/K Σ w_k) / (d log 2)     stderr  log(1 + std(w) / (√K mean(w)))
        not importance   -(1/K Σ log w_k) / (d log 2)     stderr  std(log w) / √K

    each widened by Student's t and by up to 2 for heavy tails of few, so that two cover 95 %. Where q is
    narrow in the bin and p is not, few draws see little of the spread of w = p / q; of a law whose log q is known
    (``Dequantised.moment``), w is taken to be a power of 1 / q, fitted to the draws, and no less than its spread under
    all of q is taken.

    Both bound -log₂ P(k) / d from above in expectation; the first is never larger than the second, falls with K
    (arXiv:1509.00519), and tends to it. Its bias is var(w) / (2 K mean(w)²) nats for large K, half the square of its
    standard error. Errors of log p itself break this: noise in log p raises E w, so that with a noisy
    trace the importance-weighted value may fall below -log₂ P(k).

    Args:
        drawn: what a scheme's ``sample`` returned.
        log_p: log p(x) in nats, (draws, batch).
        log_p_stderr: its standard error, likewise, if it is an estimate.
        importance: whether the draws are averaged as weights or as logarithms.

    Raises:
        DataError: for a log_p of another shape.
    """
    checked_flag(importance, "importance")
    log_w = drawn.log_weight(log_p)
    draws, d = len(log_w), math.prod(drawn.x.shape[2:])
    share = torch.softmax(log_w, dim=0)
    value = torch.logsumexp(log_w, dim=0) - math.log(draws) if importance else log_w.mean(0)
    stderr = torch.full_like(value.detach(), math.nan)
    if draws > 1:
        spread = (draws * share if importance else log_w).detach().std(0)
        stderr = spread * (widening(value.new_tensor(draws - 1.0)) / math.sqrt(draws))
        if importance:
            stderr = torch.maximum(torch.log1p(stderr), softplus(_unseen(drawn, log_w.detach())))
        stderr = heavy_tails(draws) * stderr
    variance = stderr.square()
    if log_p_stderr is not None:
        log_p_stderr = checked_numbers(log_p_stderr, "log_p_stderr").to(log_w.device)
        if log_p_stderr.shape not in ((), log_w.shape):
            raise DataError(f"log_p_stderr is of shape {tuple(log_p_stderr.shape)}, log_p of {tuple(log_w.shape)}.")
        weight = share if importance else torch.full_like(share, 1.0 / draws)
        # The error of log p is already part of the spread of several draws; of one it is all that is known.
        own = (weight * log_p_stderr.to(torch.float64)).square().sum(0)
        variance = torch.where(torch.isnan(variance), own, torch.maximum(variance, own))
    scale = 1.0 / (d * math.log(2.0))
    return Bits(-value * scale, variance.sqrt() * scale, 1.0 / share.square().sum(0), draws)


class _Measured(Protocol):
    """log p with its standard error, (batch,) each in nats."""

    @property
    def value(self) -> Tensor: ...

    @property
    def stderr(self) -> Tensor: ...


def bits_per_dim(
    log_prob: Callable[[Tensor], Tensor | _Measured],
    images: Tensor,
    *,
    levels: int,
    low: float,
    high: float,
    dequantise: Dequantisation | None = None,
    draws: int = 1,
    importance: bool = True,
    seed: int | torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Bits:
    """Bits per dimension of integer images under any density of x.

    Args:
        log_prob: log p(x) in nats, (batch,), of x (batch, *event) in the range [low, high]; perhaps an object with
            ``value`` and ``stderr``, as of ``flow.log_prob(x, full=True)`` or :func:`sdeflow.likelihood.bounds.elbo`.
            It is called once for each draw.
        images: integers (batch, *event) in 0 .. levels - 1.
        levels, low, high: as :class:`Levels`. They have no defaults: a wrong one changes the answer silently.
        dequantise: the scheme; :class:`Uniform` by default.
        draws: K.
        importance: as :func:`bits_from`; False where log_prob is a noisy estimate or a lower bound itself, of which
            the average is meant.
        seed: of the dequantisation.
        dtype: of x.

    Raises:
        DataError, ValueError: as :meth:`Uniform.sample`.
    """
    checked_flag(importance, "importance")
    scheme = Uniform() if dequantise is None else checked_methods(dequantise, "dequantise", *_OF_SCHEME)
    drawn = scheme.sample(images, levels=levels, low=low, high=high, seed=seed, draws=draws, dtype=dtype)
    results = [log_prob(x) for x in drawn.x]
    values = torch.stack([result if isinstance(result, Tensor) else result.value for result in results])
    stderrs = [result.stderr for result in results if not isinstance(result, Tensor)]
    return bits_from(drawn, values, torch.stack(stderrs) if len(stderrs) == len(results) else None, importance)


def _unseen(drawn: Dequantised, log_w: Tensor) -> Tensor:
    """log of std(w) / (√K mean(w)) under q, (batch,), for w = q^-s with the s that fits the K draws best.

    -∞ where the law of log q is not known.
    """
    if drawn.moment is None:
        return torch.full_like(log_w[0], -math.inf)
    of_q = -(drawn.log_q - drawn.log_q.mean(0)).detach()
    fitted = (of_q * (log_w - log_w.mean(0))).sum(0) / of_q.square().sum(0).clamp_min(1e-300)
    power = fitted.nan_to_num(0.0).clamp(0.0, 1.0)
    excess = (drawn.moment(2.0 * power) - 2.0 * drawn.moment(power)).clamp_min(1e-300)
    return 0.5 * (excess + torch.log(-torch.expm1(-excess)) - math.log(len(log_w)))


def _begin(
    images: Tensor, levels: int, low: float, high: float, seed: int | torch.Generator | None, draws: int, first_row: int
) -> tuple[Levels, Tensor, NoiseStream]:
    """The grid of levels, the images and the stream of draws, all checked."""
    grid = Levels(levels, low, high)
    images = grid.checked(images)
    checked_count(draws, "draws")
    return grid, images, NoiseStream(resolve_seed(seed), "dequantise", first_row)


def _float(dtype: torch.dtype | None) -> torch.dtype:
    dtype = checked_dtype(dtype) or torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dequantised data need float32 or float64: {dtype} cannot hold k + u.")
    return dtype


def _dequantised(
    grid: Levels, images: Tensor, u: Tensor, log_q: Tensor, dtype: torch.dtype | None,
    moment: Callable[[Tensor], Tensor] | None = None,
) -> Dequantised:  # fmt: skip
    x = grid.state(images + u).to(_float(dtype))
    return Dequantised(x, log_q, grid.log_det(math.prod(images.shape[1:])), moment)


def _log_mass(tau: float) -> float:
    """log Z, Z = 2 Φ(τ) - 1."""
    return math.log(math.erf(tau / math.sqrt(2.0)))
