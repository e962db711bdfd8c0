"""The exact score of a mixture of Gaussians: the truth for tests and teaching."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sdeflow.errors import DataError, ScheduleError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.laws.drawn import DrawnLaw
from sdeflow.laws.gaussian import Gaussian
from sdeflow.numerics.checks import (
    checked_count,
    checked_dtype,
    checked_finite,
    checked_flag,
    checked_numbers,
    checked_point,
)
from sdeflow.numerics.noise import NoiseStream
from sdeflow.numerics.options import named
from sdeflow.scores.function import DeclaredSDE, ScoreFunction

__all__ = ["DiffusedMixture", "GaussianMixture"]

_FORGOTTEN = 0.03  # alpha c / sigma
_ASYMMETRIC = 1e-5  # of a covariance's largest entry


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
        full: whether ``covariances`` are matrices, symmetric ones.

    Raises:
        DataError: for means, covariances or weights of other shapes, without a component, or not as said above.
    """

    kernel: Kernel
    means: Tensor  # (n, d)
    variances: Tensor  # (n, d), of the columns of ``rotations`` where these are given
    rotations: Tensor | None  # (n, d, d)
    roots: Tensor | None  # (n, d, rank), of covariances that do not stay apart in the kernel's basis; else None
    weights: Tensor
    data_mean: Tensor
    data_std: Tensor

    @named
    def __init__(
        self,
        sde: DeclaredSDE,
        means: Tensor | ArrayLike,
        covariances: Tensor | ArrayLike,
        weights: Tensor | ArrayLike | None = None,
        full: bool = False,
    ) -> None:
        super().__init__(sde)
        checked_flag(full, "full")
        self.kernel = self._require_kernel("the exact score of a diffused mixture")
        means, covariances = (_numbers(v, name) for v, name in ((means, "means"), (covariances, "covariances")))
        if means.ndim < 2 or not means.numel():
            raise DataError(f"means must be (n, *event), with one component at least, not {tuple(means.shape)}.")
        n, d = len(means), means[0].numel()
        allowed = {(n, d, d)} if full else {(n,), tuple(means.shape)}
        if tuple(covariances.shape) not in allowed:
            wanted = " or ".join(map(str, sorted(allowed)))
            raise DataError(f"covariances must be of shape {wanted}, not {tuple(covariances.shape)}.")
        weights = torch.ones(n, dtype=torch.float64) if weights is None else _numbers(weights, "weights")
        if weights.shape != (n,) or not bool((weights > 0).all()):
            raise DataError(f"weights must be {n} positive numbers, not {weights}.")
        weights = weights / weights.sum()
        if full:
            _require_symmetric(covariances)
            variances, rotations = torch.linalg.eigh(0.5 * (covariances + covariances.mT))
            marginal = covariances.diagonal(dim1=1, dim2=2)
        else:
            variances = covariances.flatten(1) if covariances.ndim > 1 else covariances[:, None].expand(n, d)
            rotations, marginal = None, variances
        if not bool((variances >= -1e-12).all()):
            raise DataError("covariances must not be negative.")
        variances, marginal = variances.clamp_min(0), marginal.clamp_min(0)
        isotropic = not full and covariances.ndim == 1
        dense = self.kernel.coupled or not (self.kernel.basis is None or isotropic)
        roots = None
        if dense or (full and self.kernel.values.shape):
            roots = torch.diag_embed(variances.sqrt()) if rotations is None else rotations * variances.sqrt()[:, None]
            means, roots, variances = self._lifted(means, roots, marginal)
            rotations, marginal = None, variances
        self._is_one = n == 1 and not full  # then p_t is the Gaussian of the data's moments
        self.event = tuple(means.shape[1:])
        flat = means.flatten(1)
        mean = (weights[:, None] * flat).sum(0)
        std = ((weights[:, None] * (marginal + flat.square())).sum(0) - mean.square()).clamp_min(0).sqrt()
        for name, value in (
            ("means", flat), ("variances", variances), ("rotations", rotations), ("roots", roots),
            ("weights", weights), ("data_mean", mean.reshape(self.event)), ("data_std", std.reshape(self.event)),
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

    def marginal_law(self, t: float) -> DiffusedMixture | None:
        """p_t, a mixture; None where the Gaussian of the data's moments is the same, exactly or almost.

        Almost is where alpha_t times the data's standard deviation is below 3 % of sigma_t: 5e-4 nats per dimension.
        """
        if self._is_one:
            return None
        forgotten = self.kernel.left_of(self.data_std, self.event, t) <= _FORGOTTEN
        return None if forgotten else DiffusedMixture(self, t)

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        x, t = self._entered(x, t, least=0.0)
        log_joint, gradient = self._components(x, t)
        responsibility = torch.softmax(log_joint, dim=1)
        total = (responsibility[..., None] * gradient).sum(1).reshape(x.shape)
        return self.kernel.from_basis(total).to(x.dtype)

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """log p_t(x) in nats, (batch,) in float64; t = 0 is the data's own density."""
        x = checked_point(x, sides=2)
        return torch.logsumexp(self._components(*self._entered(x, t, least=0.0))[0], dim=1)

    def sample(self, n: int, seed: int | torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Samples of the data, (n, *event); the auxiliary components of a coupled state are zero (see ``sde.lift``).

        Args:
            n: how many.
            seed: as everywhere.
            dtype: theirs; None is PyTorch's default dtype, whatever that of the means: these are kept in float64.
        """
        n, dtype = checked_count(n, "n", 0), checked_dtype(dtype)
        return self.drawn(n, NoiseStream(seed, "mixture")).to(dtype or torch.get_default_dtype())

    def drawn(self, n: int, stream: NoiseStream) -> Tensor:
        """As :meth:`sample`, in float64 on the CPU."""
        cumulative = self.weights.cumsum(0)[:-1].cpu()
        k = torch.searchsorted(cumulative, stream.uniform((n,), torch.float64))
        if self.roots is not None:
            root = self.roots.cpu()
            deviation = torch.einsum("bde,be->bd", root[k], stream.normal((n, root.shape[-1]), torch.float64))
        else:
            deviation = stream.normal((n, self.means.shape[1]), torch.float64) * self.variances.cpu()[k].sqrt()
            if self.rotations is not None:
                deviation = torch.einsum("be,bde->bd", deviation, self.rotations.cpu()[k])
        return (self.means.cpu()[k] + deviation).reshape(n, *self.event)

    def _components(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """log w_k N_k (batch, n), and each component's gradient (batch, n, d), in the kernel's basis."""
        if tuple(x.shape[1:]) != self.event:
            lifted = self.declaration.auxiliary and x.ndim == len(self.event) + 2
            hint = " elbo and kl_bound take data, which they lift to states; log_prob takes states." if lifted else ""
            wanted = ", ".join(map(str, self.event))
            raise DataError(f"x must be of shape (batch, {wanted}), not {tuple(x.shape)}.{hint}")
        if self.roots is not None:
            return self._dense_components(x.to(torch.float64), time, self.roots)
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

    def _dense_components(self, x: Tensor, t: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`_components`, by d x d covariances; times that differ are taken one by one."""
        if t.ndim and len(t) and not bool((t == t[0]).all()):
            densities, gradients = zip(
                *(self._dense_components(x[i : i + 1], time, roots) for i, time in enumerate(t)), strict=True
            )
            return torch.cat(densities), torch.cat(gradients)
        kernel, (n, d, rank) = self.kernel, roots.shape
        path = kernel.path(x, t.reshape(-1)[0] if t.numel() else t.new_tensor(kernel.T))
        columns = roots.mT.reshape(n * rank, *self.event)
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


class DiffusedMixture(DrawnLaw):
    """p_t of data from a mixture of Gaussians: alpha x_0 + offset + sigma eps.

    Args:
        mixture: its score.
        t: a time in [0, T].
    """

    def __init__(self, mixture: GaussianMixture, t: float) -> None:
        self.mixture, self.t = mixture, t

    def drawn(self, shape: tuple[int, ...], noise: NoiseStream) -> Tensor:
        kernel, x_0 = self.mixture.kernel, self.mixture.drawn(shape[0], noise)
        path = kernel.path(x_0, torch.tensor(self.t, dtype=torch.float64))
        eps = noise.normal(tuple(shape), torch.float64)
        return kernel.from_basis(path.alpha(kernel.to_basis(x_0)) + path.offset + path.sigma(eps))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.mixture.log_prob(x, self.t)

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian law of its mean and standard deviations."""
        mean, std = self.mixture.data_mean, self.mixture.data_std
        return self.mixture.kernel.marginal(mean.expand(self.mixture.event), std, self.t)

    def require_event(self, event: tuple[int, ...]) -> None:
        if tuple(event) != self.mixture.event:
            raise DataError(f"this prior is of events of shape {self.mixture.event}, not {tuple(event)}.")

    def __repr__(self) -> str:
        return f"DiffusedMixture({len(self.mixture.means)} components at t = {self.t:g})"


def _require_symmetric(covariances: Tensor) -> None:
    """An error unless the matrices are symmetric, up to the rounding of single precision."""
    apart, size = ((v.abs().amax((1, 2))) for v in (covariances - covariances.mT, covariances))
    wrong = (apart > _ASYMMETRIC * size).nonzero().flatten().tolist()
    if wrong:
        raise DataError(
            f"covariances must be symmetric, and number {wrong[0]} is not: entries that mirror each other "
            f"differ by up to {float(apart[wrong[0]]):.3g}."
        )


def _numbers(values: object, name: str) -> Tensor:
    return checked_finite(checked_numbers(values, name), name)
