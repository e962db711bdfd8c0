r"""Scores s(x, t) = ∇ log p_t(x): networks in every parametrisation, and exact ones of Gaussian mixtures.

With x_t = alpha x_0 + offset + sigma eps, one network output F stands for any of

    ============  ===========================================  =================================
    predicts      the network approximates                      eps from F,  x̃ = x - offset
    ============  ===========================================  =================================
    "score"       ∇ log p_t(x)                                  -sigma F
    "noise"       E[eps | x_t]                                  F
    "data"        E[x_0 | x_t]                                  (x̃ - alpha F) / sigma
    "v"           E[alpha eps - sigma x_0 | x_t]                (sigma x̃ + alpha F) / (alpha² + sigma²)
    "velocity"    E[dx_t/dt | x_t], the flow's drift            2 sigma (F - a x - b) / g²
    "edm"         the part of x_0 that scaling leaves over      sigma y / S² - alpha c F / S,  y = x̃ - alpha m
    ============  ===========================================  =================================

and then s = -eps / sigma, E[x_0 | x_t] = (x̃ - sigma eps) / alpha. In "edm", m and c are the data's mean and
standard deviation, S² = alpha² c² + sigma², the network sees y / S, and it is exact for Gaussian data where
F = 0: D = m + alpha c² y / S² + (c sigma / S) F (Karras et al. 2022, arXiv:2206.00364, for any alpha).
The "v" parametrisation is from Salimans & Ho 2022 (arXiv:2202.00512).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdeflow.errors import DataError, NotAffineError, ScheduleError, ScoreError
from sdeflow.kernel import Kernel, broadcast_to_event
from sdeflow.noise import NoiseStream
from sdeflow.symbolic.declaration import Declaration

__all__ = ["CallableScore", "Conditional", "GaussianMixture", "Score", "ScoreFunction", "as_score"]

PREDICTIONS = ("score", "noise", "data", "v", "velocity", "edm")
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class DeclaredSDE(Protocol):
    """What a score needs of an SDE: its declaration, and its kernel where there is one."""

    declaration: Declaration
    values: dict

    @property
    def kernel(self) -> Kernel: ...


class ScoreFunction(nn.Module):
    """A score of a declared SDE: ``score(x, t)`` -> ∇ log p_t(x). Abstract; see its subclasses.

    Attributes:
        declaration: the SDE it belongs to.
        kernel: its perturbation kernel, or None where the SDE has none.
    """

    def __init__(self, sde: DeclaredSDE) -> None:
        super().__init__()
        self.declaration = sde.declaration
        self.values = dict(sde.values)
        try:
            self.kernel: Kernel | None = sde.kernel
        except NotAffineError:
            self.kernel = None

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p_t(x), shaped as x, for x (batch, *event) and t a number, () or (batch,)."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, t)")

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[eps | x_t] = -sigma s, shaped as x."""
        _, sigma, _ = self._coefficients(x, t)
        return -sigma * self(x, t)

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[x_0 | x_t] = (x - offset + sigma² s) / alpha (Tweedie), shaped as x."""
        alpha, sigma, offset = self._coefficients(x, t)
        return (x - offset + sigma.square() * self(x, t)) / alpha

    def data_moments(self) -> tuple[Tensor, Tensor] | None:
        """The data's mean and standard deviation (each () or *event) where they are known, else None."""
        return None

    def same_sde(self, declaration: Declaration, values: dict) -> bool:
        """Whether this score belongs to that declaration."""
        return self.declaration == declaration and self.values == values

    def _coefficients(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma, offset, each ready to multiply x."""
        self._require_kernel("noise and denoise")
        alpha, sigma, offset = self.kernel.coefficients(_time(x, t))
        return broadcast_to_event(alpha, x), broadcast_to_event(sigma, x), broadcast_to_event(offset, x)

    def _require_kernel(self, purpose: str) -> None:
        if self.kernel is None:
            self.declaration.require_affine(purpose)


class Score(ScoreFunction):
    """A network bound to an SDE as its score.

    Args:
        net: called as ``net(x, time)`` or ``net(x, time, y)``, with x (batch, *event), time (batch,) and
            labels y (batch,); returns a tensor shaped as x.
        sde: the declaration it belongs to (an ``SDE``).
        predicts: what the network's output means; see the table above.
        data_mean: the data's mean, a number or a tensor that broadcasts to an event. ``fit`` measures
            it, and data_std, where they are None.
        data_std: the data's standard deviation, likewise.
        time: what the network gets as its time: "log_snr" (log alpha²/sigma²), "t", or a function of t.

    Raises:
        ScoreError: at a call, where the network returns something else than a tensor like x.
        ValueError: for an unknown ``predicts`` or ``time``.
        NotAffineError: where ``predicts`` or ``time`` needs a kernel that the SDE does not have.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        sde: DeclaredSDE,
        predicts: str = "edm",
        data_mean: Tensor | float | None = None,
        data_std: Tensor | float | None = None,
        time: str | Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(sde)
        if not callable(net):
            raise ScoreError(f"net must be callable as net(x, time), not {net!r}.")
        if predicts not in PREDICTIONS:
            raise ValueError(f"predicts must be one of {', '.join(PREDICTIONS)}, not {predicts!r}.")
        if time is None:
            time = "t" if self.kernel is None else "log_snr"
        if not callable(time) and time not in ("log_snr", "t"):
            raise ValueError(f'time must be "log_snr", "t" or a function of t, not {time!r}.')
        if predicts != "score":
            self._require_kernel(f"predicts={predicts!r}")
        if time == "log_snr":
            self._require_kernel('time="log_snr"')
        self.net = net
        self.predicts = predicts
        self.time = time
        self.register_buffer("data_mean", torch.as_tensor(0.0 if data_mean is None else data_mean).double())
        self.register_buffer("data_std", torch.as_tensor(1.0 if data_std is None else data_std).double())
        self.register_buffer("moments_known", torch.tensor(data_mean is not None and data_std is not None))
        if not bool((self.data_std > 0).all() & torch.isfinite(self.data_std).all()):
            raise ValueError(f"data_std must be positive and finite, not {data_std}.")

    def set_data_moments(self, mean: Tensor | float, std: Tensor | float) -> None:
        """Declares the data's mean and standard deviation, as measured."""
        self.data_mean = torch.as_tensor(mean, dtype=self.data_mean.dtype, device=self.data_mean.device)
        self.data_std = torch.as_tensor(std, dtype=self.data_std.dtype, device=self.data_std.device)
        self.moments_known = torch.ones_like(self.moments_known)

    def data_moments(self) -> tuple[Tensor, Tensor] | None:
        return (self.data_mean, self.data_std) if bool(self.moments_known) else None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Score:
        """Moves and casts the network; the data's moments move, but keep their digits."""
        mean, std = self.data_mean, self.data_std
        super()._apply(fn, recurse)
        self.data_mean, self.data_std = mean.to(self.data_mean.device), std.to(self.data_std.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes the moments' shapes from what is loaded: numbers, or one per coordinate."""
        for name in ("data_mean", "data_std"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Tensor:
        """∇ log p_t(x), shaped as x; with labels ``y`` (batch,), the score of x given y."""
        if self.predicts == "score":
            time = _time(x, t)
            if self.kernel is not None:
                self.kernel.require_times(time)
            return self._network(x.clone(), time, y)
        eps, (_, sigma, _) = self._noise(x, t, y)
        return -eps / sigma

    def noise(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Tensor:
        """E[eps | x_t], shaped as x."""
        return self._noise(x, t, y)[0]

    def denoise(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t], shaped as x."""
        if self.predicts == "data":
            time = _time(x, t)
            self.kernel.require_times(time)
            return self._network(x.clone(), time, y)
        eps, (alpha, sigma, offset) = self._noise(x, t, y)
        return (x - offset - sigma * eps) / alpha

    def given(self, y: Tensor | int) -> Conditional:
        """The score of x given the labels ``y``, (batch,) or one for all; itself a score."""
        return Conditional(self, y)

    def _noise(self, x: Tensor, t: Tensor | float, y: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """E[eps | x_t] and (alpha, sigma, offset): the one place where a network's output is interpreted."""
        self._require_kernel("the conversion of a score")
        time = _time(x, t)
        self.kernel.require_times(time)
        alpha, sigma, offset = (broadcast_to_event(c, x) for c in self.kernel.coefficients(time))
        centred = x - offset
        match self.predicts:
            case "score":
                eps = -sigma * self._network(x.clone(), time, y)
            case "noise":
                eps = self._network(x.clone(), time, y)
            case "data":
                eps = (centred - alpha * self._network(x.clone(), time, y)) / sigma
            case "v":
                eps = (sigma * centred + alpha * self._network(x.clone(), time, y)) / (alpha.square() + sigma.square())
            case "velocity":
                a, b, q = (broadcast_to_event(c, x) for c in self.kernel.sde_coefficients(time))
                eps = 2.0 * sigma * (self._network(x.clone(), time, y) - a * x - b) / q
            case "edm":
                mean, std = self.data_mean.to(x.dtype), self.data_std.to(x.dtype)
                y_ = centred - alpha * mean
                scale = torch.sqrt((alpha * std).square() + sigma.square())
                output = self._network(y_ / scale, time, y)
                eps = (sigma / scale.square()) * y_ - (alpha * std / scale) * output
        return eps, (alpha, sigma, offset)

    def _network(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network's output, checked. ``x`` is a tensor of its own, which it may change."""
        if self.time == "log_snr":
            time = 2.0 * self.kernel.half_log_snr(t)
        elif self.time == "t":
            time = t
        else:
            time = torch.as_tensor(self.time(t), device=x.device)
        time = _network_time(time, x)
        return _checked(self.net(x, time) if y is None else self.net(x, time, y), x, "the network")

    def extra_repr(self) -> str:
        """predicts, time and the data's scale."""
        return f"predicts={self.predicts!r}, time={self.time!r}, data_std={self.data_std.mean():.4g}"


class Conditional(ScoreFunction):
    """A class-conditional score with its labels fixed: a score like any other.

    Args:
        score: a :class:`Score` whose network takes labels.
        y: labels, (batch,) for a batch of that size, or one integer for every sample.
    """

    def __init__(self, score: Score, y: Tensor | int) -> None:
        super().__init__(score)
        self.score = score
        self.register_buffer("y", torch.as_tensor(y))

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.score(x, t, self._labels(x))

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.score.noise(x, t, self._labels(x))

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.score.denoise(x, t, self._labels(x))

    def data_moments(self) -> tuple[Tensor, Tensor] | None:
        return self.score.data_moments()

    def _labels(self, x: Tensor) -> Tensor:
        if self.y.ndim and len(self.y) != len(x):
            raise DataError(f"{len(self.y)} labels were given for a batch of {len(x)}.")
        return self.y.to(x.device).expand(len(x))


class CallableScore(ScoreFunction):
    """Any function (x, t) -> ∇ log p_t(x) as a score. It sees x (batch, *event) and t (batch,)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], sde: DeclaredSDE) -> None:
        super().__init__(sde)
        self.function = function

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        time = _time(x, t)
        if self.kernel is not None:
            self.kernel.require_times(time)
        return _checked(self.function(x.clone(), _network_time(time, x)), x, "the score")


class GaussianMixture(ScoreFunction):
    r"""The exact score of data from a mixture of Gaussians, diffused by any affine SDE: the truth for tests.

    p_t(x) = Σ_k w_k N(x; alpha m_k + offset, alpha² C_k + sigma²). Computed in float64, whatever the state's dtype.

    Args:
        sde: the SDE.
        means: (n, *event).
        covariances: variances (n,) for isotropic components, (n, *event) for diagonal ones, and with
            ``full=True`` matrices (n, d, d) over the flattened event; not negative.
        weights: (n,), positive, normalised here; equal by default.
        full: whether ``covariances`` are matrices.
    """

    def __init__(
        self,
        sde: DeclaredSDE,
        means: Tensor,
        covariances: Tensor,
        weights: Tensor | None = None,
        full: bool = False,
    ) -> None:
        super().__init__(sde)
        self._require_kernel("the exact score of a diffused mixture")
        means, covariances = (torch.as_tensor(v, dtype=torch.float64) for v in (means, covariances))
        if means.ndim < 2:
            raise DataError(f"means must be of shape (n, *event), not {tuple(means.shape)}.")
        n, self.event = len(means), tuple(means.shape[1:])
        flat = means.flatten(1)
        d = flat.shape[1]
        allowed = {(n, d, d)} if full else {(n,), tuple(means.shape)}
        if tuple(covariances.shape) not in allowed:
            wanted = " or ".join(map(str, sorted(allowed)))
            raise DataError(f"covariances must be of shape {wanted}, not {tuple(covariances.shape)}.")
        weights = torch.ones(n) if weights is None else torch.as_tensor(weights)
        if weights.shape != (n,) or not bool((weights > 0).all()):
            raise DataError(f"weights must be {n} positive numbers, not {weights}.")
        weights = weights.to(torch.float64) / weights.to(torch.float64).sum()
        if full:
            variances, rotations = torch.linalg.eigh(0.5 * (covariances + covariances.mT))
            marginal = covariances.diagonal(dim1=1, dim2=2)
        else:
            variances = covariances.flatten(1) if covariances.ndim > 1 else covariances[:, None].expand(n, d)
            rotations, marginal = None, variances
        if not bool((variances >= -1e-12).all()):
            raise DataError("covariances must not be negative.")
        mean = (weights[:, None] * flat).sum(0)
        std = ((weights[:, None] * (marginal + flat.square())).sum(0) - mean.square()).clamp_min(0).sqrt()
        for name, value in (
            ("means", flat), ("variances", variances.clamp_min(0)), ("rotations", rotations), ("weights", weights),
            ("data_mean", mean.reshape(self.event)), ("data_std", std.reshape(self.event)),
        ):  # fmt: skip
            self.register_buffer(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GaussianMixture:
        """Moves to a device, but stays in float64: this is the truth."""
        return super()._apply(lambda v: v.to(fn(torch.empty(0, device=v.device)).device), recurse)

    def data_moments(self) -> tuple[Tensor, Tensor] | None:
        return self.data_mean, self.data_std

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        log_joint, whitened, variance = self._components(x, t)
        responsibility = torch.softmax(log_joint, dim=1)
        gradient = -whitened / variance
        if self.rotations is not None:
            gradient = torch.einsum("bne,nde->bnd", gradient, self.rotations)
        return (responsibility[..., None] * gradient).sum(1).reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """log p_t(x) in nats, (batch,) in float64; t = 0 is the data's own density."""
        return torch.logsumexp(self._components(x, t)[0], dim=1)

    def sample(self, n: int, seed: int | torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Samples of the data, (n, *event)."""
        stream = NoiseStream(seed, "mixture")
        cumulative = self.weights.cumsum(0)[:-1].cpu()
        k = torch.searchsorted(cumulative, stream.uniform((n,), torch.float64))
        whitened = stream.normal((n, self.means.shape[1]), torch.float64) * self.variances.cpu()[k].sqrt()
        if self.rotations is not None:
            whitened = torch.einsum("be,bde->bd", whitened, self.rotations.cpu()[k])
        return (self.means.cpu()[k] + whitened).reshape(n, *self.event).to(dtype or torch.get_default_dtype())

    def _components(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N_k (batch, n), and in each component's axes the deviation and the variance (batch, n, d)."""
        if tuple(x.shape[1:]) != self.event:
            raise DataError(f"x must be of shape (batch, {', '.join(map(str, self.event))}), not {tuple(x.shape)}.")
        alpha, sigma, offset = (c.reshape(-1, 1, 1) for c in self.kernel.coefficients(self.kernel.times_for(x, t)))
        deviation = x.to(torch.float64).flatten(1)[:, None] - alpha * self.means - offset
        if self.rotations is not None:
            deviation = torch.einsum("bnd,nde->bne", deviation, self.rotations)
        variance = alpha.square() * self.variances + sigma.square()
        if variance.device.type == "cpu" and not bool((variance > 0).all()):
            raise ScheduleError("a component of zero covariance has no density and no score at sigma = 0 (t = 0).")
        log_normal = -0.5 * (deviation.square() / variance + torch.log(2.0 * math.pi * variance)).sum(-1)
        return log_normal + self.weights.log(), deviation, variance


def as_score(score: ScoreFunction | Callable[[Tensor, Tensor], Tensor], sde: DeclaredSDE) -> ScoreFunction:
    """``score`` as a score of ``sde``.

    Raises:
        ScoreError: if it is not callable.
        ValueError: if it belongs to another declaration.
    """
    if isinstance(score, ScoreFunction):
        if not score.same_sde(sde.declaration, sde.values):
            raise ValueError(
                f"this score belongs to another SDE, dx = ({score.declaration.f}) dt + ({score.declaration.g}) dw with "
                f"T = {score.declaration.T:g}, than dx = ({sde.declaration.f}) dt + ({sde.declaration.g}) dw with "
                f"T = {sde.declaration.T:g}."
            )
        return score
    if not callable(score):
        raise ScoreError(f"a score must be callable as score(x, t), not {score!r}.")
    return CallableScore(score, sde)


def _time(x: Tensor, t: Tensor | float) -> Tensor:
    """t as float64, () or (batch,)."""
    if isinstance(t, Tensor) and t.ndim == 0 and t.dtype == torch.float64:
        return t  # as solvers give it
    t = torch.as_tensor(t, dtype=torch.float64)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
        raise DataError(f"t must be a number or of shape (batch,) = ({len(x)},), not {tuple(t.shape)}.")
    return t.to(x.device) if t.ndim else t


def _network_time(t: Tensor, x: Tensor) -> Tensor:
    """t as a network gets it: a tensor of its own, (batch,), in the dtype of x (float32 under half precision)."""
    dtype = torch.float32 if x.dtype in _LOW_PRECISION else x.dtype
    return t.to(device=x.device, dtype=dtype).expand(len(x)).clone()


def _checked(output: object, x: Tensor, who: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ScoreError(f"{who} must return a tensor, not {type(output).__name__}.")
    if output.shape != x.shape:
        raise ScoreError(f"{who} returned shape {tuple(output.shape)} for a state of shape {tuple(x.shape)}.")
    if output.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ScoreError(f"{who} returned {output.dtype} for a state of {x.dtype}.")
    if output.device != x.device:
        raise ScoreError(f"{who} returned a tensor on {output.device} for a state on {x.device}.")
    return output.to(x.dtype)
