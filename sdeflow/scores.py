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

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdeflow.errors import DataError, NotAffineError, ScheduleError, ScoreError
from sdeflow.kernel import Kernel, Path
from sdeflow.noise import NoiseStream
from sdeflow.parameters import Values
from sdeflow.symbolic.declaration import Declaration

__all__ = ["CallableScore", "Conditional", "GaussianMixture", "Score", "ScoreFunction", "as_score"]

PREDICTIONS = ("score", "noise", "data", "v", "velocity", "edm")
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class DeclaredSDE(Protocol):
    """What a score needs of an SDE: its declaration, and its kernel where there is one."""

    declaration: Declaration
    values: Values

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
        self.schedule = nn.ParameterDict(sde.values.learned)  # so that score.parameters() holds a learned schedule
        self.values = sde.values
        self.basis = getattr(sde, "basis", None)
        try:
            self.kernel = sde.kernel
        except NotAffineError:
            self.kernel = None

    @property
    def gaussian(self) -> Kernel | None:
        """The kernel, where it is Gaussian."""
        return self.kernel if isinstance(self.kernel, Kernel) else None

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p_t(x), shaped as x, for x (batch, *event) and t a number, () or (batch,)."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, t)")

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[eps | x_t] = -sigmaᵀ s, shaped as x."""
        kernel, path = self._path(x, t)
        return kernel.from_basis(-path.sigma.T(kernel.to_basis(self(x, t))))

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[x_0 | x_t] = alpha⁻¹ (x - offset + sigma sigmaᵀ s) (Tweedie), shaped as x."""
        kernel, path = self._path(x, t)
        centred = kernel.to_basis(x) - path.offset.to(x.dtype)
        return kernel.from_basis(path.alpha.inverse(centred + path.sigma.gram(kernel.to_basis(self(x, t)))))

    def data_moments(self) -> tuple[Tensor, Tensor] | None:
        """The data's mean and standard deviation (each () or *event) where they are known, else None."""
        return None

    def same_sde(self, sde: DeclaredSDE) -> bool:
        """Whether this score belongs to that SDE: declaration, values of the parameters and basis."""
        return (self.declaration, self.values, self.basis) == (sde.declaration, sde.values, getattr(sde, "basis", None))

    def _path(self, x: Tensor, t: Tensor | float) -> tuple[Kernel, Path]:
        """The Gaussian kernel, and its alpha, sigma and offset ready for x."""
        self._require_kernel("noise and denoise")
        return self.gaussian, self.gaussian.path(x, _time(x, t))

    def _require_kernel(self, purpose: str) -> None:
        if self.gaussian is None:
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
        data_std: the data's standard deviation, likewise; with a basis, of the coefficients.
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
            time = "t" if self.gaussian is None else "log_snr"
        if not callable(time) and time not in ("log_snr", "t"):
            raise ValueError(f'time must be "log_snr", "t" or a function of t, not {time!r}.')
        if predicts != "score":
            self._require_kernel(f"predicts={predicts!r}")
        if time == "log_snr":
            self._require_kernel('time="log_snr"')
        self.net = net
        self.predicts = predicts
        self.time = time
        self.register_buffer("data_mean", _exact_tensor(0.0 if data_mean is None else data_mean))
        self.register_buffer("data_std", _exact_tensor(1.0 if data_std is None else data_std))
        if self.declaration.coupled and self.gaussian is not None:
            for name in ("data_mean", "data_std"):
                moment = getattr(self, name)
                setattr(self, name, self.gaussian.of_state(moment) if moment.ndim else moment)
        self.register_buffer("moments_known", torch.tensor(data_mean is not None and data_std is not None))
        coupled = self.declaration.coupled and self.data_std.ndim > 0  # auxiliary components have no data: 0
        positive = bool(
            (self.data_std >= 0).all() & (self.data_std > 0).any() if coupled else (self.data_std > 0).all()
        )
        if not positive or not bool(torch.isfinite(self.data_std).all()):
            raise ValueError(f"data_std must be positive and finite, not {data_std}.")
        if self.declaration.coupled and predicts == "v":
            raise ValueError('predicts="v" is of elementwise SDEs; a coupled one takes the others.')
        if predicts == "velocity" and self.declaration.gram.det() == 0:
            raise ValueError('predicts="velocity": g gᵀ is singular, so the flow does not determine the score.')

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
            return self._network(x, self._checked_time(x, t), y)
        eps, path = self._noise(x, t, y)
        return self.kernel.from_basis(-path.sigma.T.inverse(eps))

    def noise(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Tensor:
        """E[eps | x_t], shaped as x."""
        return self.kernel.from_basis(self._noise(x, t, y)[0]) if self.gaussian else super().noise(x, t)

    def denoise(self, x: Tensor, t: Tensor | float, y: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t], shaped as x."""
        if self.predicts == "data":
            return self._network(x, self._checked_time(x, t), y)
        eps, path = self._noise(x, t, y)
        kernel = self.kernel
        centred = kernel.to_basis(x) - path.offset.to(x.dtype)
        return kernel.from_basis(path.alpha.inverse(centred - path.sigma(eps)))

    def given(self, y: Tensor | int) -> Conditional:
        """The score of x given the labels ``y``, (batch,) or one for all; itself a score."""
        return Conditional(self, y)

    def _noise(self, x: Tensor, t: Tensor | float, y: Tensor | None) -> tuple[Tensor, Path]:
        """E[eps | x_t] in the kernel's basis, and the path: the one place where a network's output is interpreted."""
        self._require_kernel("the conversion of a score")
        kernel, time = self.gaussian, self._checked_time(x, t)
        path = kernel.path(x, time)
        alpha, sigma, offset = path
        if self.predicts == "noise":
            return kernel.to_basis(self._network(x, time, y)), path
        if self.predicts == "score":
            return -sigma.T(kernel.to_basis(self._network(x, time, y))), path
        state = kernel.to_basis(x)
        centred = state - offset.to(x.dtype)
        if self.predicts == "edm":
            return self._preconditioned(centred, path, time, y), path
        output = kernel.to_basis(self._network(x, time, y))
        if self.predicts == "data":
            return sigma.inverse(centred - alpha(output)), path
        if self.predicts == "v":
            total = 1.0 / (alpha.values.square() + sigma.values.square())
            return sigma.scaled(total)(centred) + alpha.scaled(total)(output), path
        a, b, q = kernel.equation(x, time)
        return (sigma.T @ q.inverse).scaled(2.0)(output - a(state) - b.to(x.dtype)), path

    def _preconditioned(self, centred: Tensor, path: Path, time: Tensor, y: Tensor | None) -> Tensor:
        """eps of "edm": the network sees a whitened state and adds what Gaussian data would leave over."""
        kernel = self.gaussian
        mean = kernel.data_level(self.data_mean, centred)
        M = path.sigma.inverse @ path.alpha @ kernel.scale(self.data_std, centred)
        K = M.root_of_one_plus_gram
        L = M.T.root_of_one_plus_gram if M.coupled else K
        z = (path.sigma @ K).inverse(centred - path.alpha(mean) if mean is not None else centred)
        output = kernel.to_basis(self._network(kernel.from_basis(z), time, y))
        return K.T.inverse(z) - (M @ L.T.inverse)(output)

    def _checked_time(self, x: Tensor, t: Tensor | float) -> Tensor:
        time = _time(x, t)
        if self.gaussian is not None:
            self.gaussian.require_times(time)
        return time

    def _network(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network's output, checked. It gets a copy of ``x``, which it may change, its components as channels."""
        if self.time == "log_snr":
            time = 2.0 * self.gaussian.half_log_snr(t)
        elif self.time == "t":
            time = t
        else:
            time = torch.as_tensor(self.time(t), device=x.device)
        time = _network_time(time, x)
        folded = x.flatten(1, 2) if self.declaration.coupled and x.ndim > 2 else x
        folded = folded.clone() if folded.data_ptr() == x.data_ptr() else folded
        output = self.net(folded, time) if y is None else self.net(folded, time, y)
        return _checked(output, folded, "the network").reshape(x.shape)

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
        if self.gaussian is not None:
            self.gaussian.require_times(time)
        return _checked(self.function(x.clone(), _network_time(time, x)), x, "the score")


class GaussianMixture(ScoreFunction):
    r"""The exact score of data from a mixture of Gaussians, diffused by any affine SDE: the truth for tests.

    p_t(x) = Σ_k w_k N(x; alpha m_k + offset, alpha C_k alphaᵀ + sigma sigmaᵀ). In float64, whatever the state's dtype.

    Args:
        sde: the SDE.
        means: (n, *event); of a coupled state (n, k, *event), or (n, *event) where one component is data and the
            others start as noise. What has k along the first of several sides of an event is taken as whole states.
        covariances: variances (n,) for isotropic components, shaped as ``means`` for diagonal ones, and with
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
        n, d = len(means), means[0].numel()
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
        variances, marginal = variances.clamp_min(0), marginal.clamp_min(0)
        isotropic = not full and covariances.ndim == 1
        self._dense = self.kernel.coupled or not (self.kernel.basis is None or isotropic)
        self._dense |= bool(full and self.kernel.values.shape)
        if self._dense:  # a square root of each component's covariance, over the whole state
            root = torch.diag_embed(variances.sqrt()) if rotations is None else rotations * variances.sqrt()[:, None]
            means, root, marginal = self._lifted(means, root, marginal)
            rotations, variances = root, marginal
        self.event = tuple(means.shape[1:])
        flat = means.flatten(1)
        mean = (weights[:, None] * flat).sum(0)
        std = ((weights[:, None] * (marginal + flat.square())).sum(0) - mean.square()).clamp_min(0).sqrt()
        for name, value in (
            ("means", flat), ("variances", variances), ("rotations", rotations), ("weights", weights),
            ("data_mean", mean.reshape(self.event)), ("data_std", std.reshape(self.event)),
        ):  # fmt: skip
            self.register_buffer(name, value)

    def _lifted(self, means: Tensor, root: Tensor, marginal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and square roots of covariances over the whole state, the auxiliary components at zero."""
        kernel = self.kernel
        joint = means.ndim > 2 and means.shape[1] == kernel.components
        if joint or not kernel.declaration.auxiliary:
            kernel.require_event(tuple(means.shape[1:]))
            return means, root, marginal
        states = kernel.lift(means, noisy=False)
        kernel.require_event(tuple(states.shape[1:]))
        n, d = len(means), means[0].numel()
        columns = root.mT.reshape(n * d, *means.shape[1:])
        root = kernel.lift(columns, noisy=False).reshape(n, d, -1).mT
        return states, root, kernel.lift(marginal.reshape(means.shape), noisy=False).flatten(1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GaussianMixture:
        """Moves to a device, but stays in float64: this is the truth."""
        return super()._apply(lambda v: v.to(fn(torch.empty(0, device=v.device)).device), recurse)

    def data_moments(self) -> tuple[Tensor, Tensor] | None:
        return self.data_mean, self.data_std

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        log_joint, gradient = self._components(x, t)
        responsibility = torch.softmax(log_joint, dim=1)
        total = (responsibility[..., None] * gradient).sum(1).reshape(x.shape)
        return self.kernel.from_basis(total).to(x.dtype)

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """log p_t(x) in nats, (batch,) in float64; t = 0 is the data's own density."""
        return torch.logsumexp(self._components(x, t)[0], dim=1)

    def sample(self, n: int, seed: int | torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Samples of the data, (n, *event); the auxiliary components of a coupled state are zero (see ``sde.lift``)."""
        stream = NoiseStream(seed, "mixture")
        cumulative = self.weights.cumsum(0)[:-1].cpu()
        k = torch.searchsorted(cumulative, stream.uniform((n,), torch.float64))
        if self._dense:
            root = self.rotations.cpu()
            deviation = torch.einsum("bde,be->bd", root[k], stream.normal((n, root.shape[-1]), torch.float64))
        else:
            deviation = stream.normal((n, self.means.shape[1]), torch.float64) * self.variances.cpu()[k].sqrt()
            if self.rotations is not None:
                deviation = torch.einsum("be,bde->bd", deviation, self.rotations.cpu()[k])
        return (self.means.cpu()[k] + deviation).reshape(n, *self.event).to(dtype or torch.get_default_dtype())

    def _components(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """log w_k N_k (batch, n), and each component's gradient (batch, n, d), in the kernel's basis."""
        if tuple(x.shape[1:]) != self.event:
            raise DataError(f"x must be of shape (batch, {', '.join(map(str, self.event))}), not {tuple(x.shape)}.")
        time = self.kernel.times_for(x, t)
        if self._dense:
            return self._dense_components(x.to(torch.float64), time)
        kernel = self.kernel
        path = kernel.path(x, time)
        alpha, sigma, offset = (self._per_coordinate(c, x) for c in (path.alpha.values, path.sigma.values, path.offset))
        means = kernel.to_basis(self.means.reshape(-1, *self.event)).flatten(1)
        deviation = kernel.to_basis(x.to(torch.float64)).flatten(1)[:, None] - alpha * means - offset
        if self.rotations is not None:
            deviation = torch.einsum("bnd,nde->bne", deviation, self.rotations)
        variance = alpha.square() * self.variances + sigma.square()
        if variance.device.type == "cpu" and not bool((variance > 0).all()):
            raise ScheduleError("a component of zero covariance has no density and no score at sigma = 0 (t = 0).")
        log_normal = -0.5 * (deviation.square() / variance + torch.log(2.0 * math.pi * variance)).sum(-1)
        gradient = -deviation / variance
        if self.rotations is not None:
            gradient = torch.einsum("bne,nde->bnd", gradient, self.rotations)
        return log_normal + self.weights.log(), gradient

    def _per_coordinate(self, coefficient: Tensor, x: Tensor) -> Tensor:
        """A coefficient of states like ``x`` as (batch or 1, 1, d or 1)."""
        if not self.kernel.values.shape:
            return coefficient.reshape(-1, 1, 1)
        batch = len(coefficient) if coefficient.ndim == x.ndim else 1
        return coefficient.expand(batch, *self.event).flatten(1)[:, None]

    def _dense_components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`_components`, by d x d covariances; times that differ are taken one by one."""
        if t.ndim and len(t) and not bool((t == t[0]).all()):
            parts = [self._dense_components(x[i : i + 1], time) for i, time in enumerate(t)]
            return tuple(torch.cat(part) for part in zip(*parts, strict=True))
        kernel, d = self.kernel, self.means.shape[1]
        n, rank = len(self.means), self.rotations.shape[-1]
        path = kernel.path(x, t.reshape(-1)[0] if t.numel() else t.new_tensor(kernel.T))
        columns = self.rotations.mT.reshape(n * rank, *self.event)
        spread = path.alpha(kernel.to_basis(columns)).reshape(n, rank, d).mT
        noise = path.sigma(torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, *self.event)).reshape(d, d).mT
        means = (path.alpha(kernel.to_basis(self.means.reshape(n, *self.event))) + path.offset).flatten(1)
        factor, failed = torch.linalg.cholesky_ex(spread @ spread.mT + noise @ noise.mT)
        if bool((failed != 0).any()):
            raise ScheduleError("a component of zero covariance has no density and no score at sigma = 0 (t = 0).")
        deviation = kernel.to_basis(x).flatten(1)[:, None] - means
        whitened = torch.linalg.solve_triangular(factor, deviation.movedim(0, -1), upper=False)  # (n, d, batch)
        gradient = -torch.linalg.solve_triangular(factor.mT, whitened, upper=True).movedim(-1, 0)
        log_det = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        log_normal = -0.5 * whitened.square().sum(1).mT - log_det - 0.5 * d * math.log(2.0 * math.pi)
        return log_normal + self.weights.log(), gradient


def as_score(score: ScoreFunction | Callable[[Tensor, Tensor], Tensor], sde: DeclaredSDE) -> ScoreFunction:
    """``score`` as a score of ``sde``.

    Raises:
        ScoreError: if it is not callable.
        ValueError: if it belongs to another declaration.
    """
    if isinstance(score, ScoreFunction):
        if not score.same_sde(sde):
            raise ValueError(
                f"this score belongs to another SDE, dx = ({score.declaration.f}) dt + ({score.declaration.g}) dw with "
                f"T = {score.declaration.T:g}, than dx = ({sde.declaration.f}) dt + ({sde.declaration.g}) dw with "
                f"T = {sde.declaration.T:g}."
            )
        return score
    if not callable(score):
        raise ScoreError(f"a score must be callable as score(x, t), not {score!r}.")
    return CallableScore(score, sde)


def _exact_tensor(value: Tensor | float) -> Tensor:
    """``value`` in float64; a number keeps all its digits."""
    return torch.as_tensor(value, dtype=torch.float64)


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
