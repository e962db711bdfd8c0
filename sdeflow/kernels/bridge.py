r"""Bridges: a linear SDE conditioned on where it ends (Doob's h-transform).

With p(x_T | x_t) = N(Φ_Tt x_t + m_Tt, P_T|t), the SDE conditioned on x_T = y is

    dx = [f + g gᵀ Φ_Ttᵀ P_T|t⁻¹ (y - m_Tt - Φ_Tt x)] dt + g dw,

and its law given x_0 is Gaussian, exactly: with the gain K = P_t Φ_Ttᵀ P_T⁻¹,

    x_t | x_0, y  ~  N(mean_t + K (y - mean_T),  P_t - K P_T Kᵀ).

Elementwise K = r alpha_t / alpha_T with r = SNR_T / SNR_t, and the variance is sigma_t² (1 - r). Paths are
drawn from the exact transitions: a bridge from (s, x_s) is again a bridge.

**Reducible SDEs** are conditioned where they are linear. With y = H(x, t) (``sdeflow.symbolic.lamperti``) x_T = z means
y_T = H(z, T), and x_t = X(y_t, t) of the bridge of y, so that

    dx = [f + g² H' Φ_Tt P_T|t⁻¹ (H(z, T) - m_Tt - Φ_Tt H(x, t))] dt + g dw        (H' = ∂H/∂x).

Where the map folds, z is reached by y_T = ±H(z, T), and the bridge of y is a mixture of two, of weights proportional to
p(y_T | y_t); in the drift H(z, T) gains the factor tanh(H(z, T) (m_Tt + Φ_Tt H(x, t)) / P_T|t).

**Square-root processes** are conditioned through their own kernel (:mod:`sdeflow.kernels.square_root`): the drift
f + g² ∂/∂x log p(x_T | x_t = x) is a ratio of Bessel functions, and a bridge is drawn exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import sympy as sp
import torch
from torch import Tensor
from typing_extensions import assert_never

from sdeflow.errors import ScheduleError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.kinds import AnyKernel
from sdeflow.kernels.local import LocalKernel
from sdeflow.kernels.pearson import PearsonKernel
from sdeflow.kernels.reducible import ReducibleKernel
from sdeflow.kernels.square_root import SquareRootKernel
from sdeflow.numerics.checks import (
    checked_finite,
    checked_numbers,
    checked_point,
    checked_start,
    checked_state,
    checked_time,
)
from sdeflow.numerics.linear import Linear
from sdeflow.numerics.noise import NoiseStream, resolve_seed
from sdeflow.symbolic.conditioned import bridge_drift, reducible_bridge_drift, square_root_bridge_drift
from sdeflow.symbolic.equations import Equation, forward

__all__ = ["Bridge", "ReducibleBridge", "SquareRootBridge", "bridge_of"]


K = TypeVar("K", Kernel, ReducibleKernel, SquareRootKernel)


class _Bridge(ABC, Generic[K]):
    """What every bridge shares: the equation, single times and paths, from the law of a subclass."""

    def __init__(self, kernel: K, x_T: Tensor | float) -> None:
        self.kernel: K = kernel
        self.x_T = checked_finite(checked_state(x_T, "x_T", 0, torch.float64).double(), "x_T")
        self.T = kernel.T

    @property
    @abstractmethod
    def drift(self) -> sp.Expr | sp.ImmutableMatrix:
        """The drift of the conditioned SDE, SymPy: ``drift.subs({x: 0.3, t: 0.5, ...})`` has its value there."""

    @abstractmethod
    def _draw(self, x: Tensor, s: float, t: float, noise: NoiseStream, exactly: bool = False) -> Tensor:
        """x_t given x at s and x_T. At s = 0, x is the kernel's x_0 unless it is the state ``exactly``."""

    @property
    def equation(self) -> Equation:
        """The conditioned SDE, SymPy, with the components of x_T as symbols."""
        return Equation(self.drift, self.kernel.declaration.g, "w", self.kernel.declaration.state)

    @property
    def diffusion(self) -> sp.Expr | sp.ImmutableMatrix:
        """g, which conditioning leaves as it is."""
        return self.kernel.declaration.g

    def sample(self, x_0: Tensor, t: float, seed: int | torch.Generator | None = None) -> Tensor:
        """x_t given x_0 and x_T, shaped as x_0."""
        return self._draw(checked_point(x_0, "x_0"), 0.0, _within(t, self.T), NoiseStream(seed, "bridge"))

    def paths(self, x_0: Tensor, ts: Sequence[float] | Tensor, seed: int | torch.Generator | None = None) -> Tensor:
        """States at increasing times ``ts`` of [0, T], (len(ts), batch, *event), by exact transitions.

        Raises:
            ScheduleError: for times that do not increase within [0, T].
        """
        x_0, times = checked_point(x_0, "x_0"), _increasing(ts, self.T)
        noise, s, x, out, exactly = NoiseStream(resolve_seed(seed), "bridge"), 0.0, x_0, [], False
        for t in times:
            x = self._draw(x, s, t, noise, exactly)  # from the kernel's x_0, then from states that are known
            s, exactly = t, True
            out.append(x)
        return torch.stack(out)

    def _end_beside(self, x: Tensor) -> Tensor:
        """x_T, shaped as the states x."""
        end = self.x_T.to(x.device)
        end = end[None] if end.ndim and end.ndim == x.ndim - 1 else end  # one event for all
        return checked_start(end, x, "x_T", "x_0")

    def __repr__(self) -> str:
        equation = forward(self.kernel.declaration)
        return f"{type(self).__name__}({equation} on [0, {self.T:g}], x_T of shape {tuple(self.x_T.shape)})"


class Bridge(_Bridge[Kernel]):
    """A linear SDE conditioned on x_T.

    Args:
        kernel: the SDE's Gaussian kernel.
        x_T: where it ends, (batch, *event) or one event (*event) for all; a number for all coordinates.

    Attributes:
        T: the time of the end.
    """

    @property
    def drift(self) -> sp.Expr | sp.ImmutableMatrix:
        """f + g gᵀ Φ_Ttᵀ P_T|t⁻¹ (y - m_Tt - Φ_Tt x), SymPy, with y the symbols x_T (v_T, ...).

        Where the kernel's moments are integrals, T stands in it as a symbol. Where SymPy takes too long, it is
        f + g gᵀ h with h(x, t) for ∇ log p(x_T | x_t = x).
        """
        return bridge_drift(self.kernel.declaration, self.kernel.shown)

    def moments(self, x_0: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Mean (batch, *event) and standard deviation (which broadcasts to it) of x_t given x_0 and x_T.

        For a coupled state the second is the covariance (k, k, 1, ...). In a ``basis`` it is that of the coefficients.

        Args:
            x_0: (batch, *event).
            t: a number in [0, T].
        """
        x_0 = checked_point(x_0, "x_0")
        mean, root = self.law(x_0, 0.0, _within(t, self.T))
        mean = self.kernel.from_basis(mean).to(x_0.dtype)
        if not self.kernel.coupled:
            return mean, root.values.to(x_0.dtype)
        covariance = root.gram.values.to(x_0.dtype)
        return mean, covariance.reshape(*covariance.shape, *(1,) * (x_0.ndim - 2))

    def _draw(self, x: Tensor, s: float, t: float, noise: NoiseStream, exactly: bool = False) -> Tensor:
        mean, root = self.law(x, s, t, exactly)
        eps = noise.normal(tuple(x.shape), torch.float64, x.device)
        return self.kernel.from_basis(mean + root(eps)).to(x.dtype)

    def law(self, x: Tensor, s: float, t: float, exactly: bool = False) -> tuple[Tensor, Linear]:
        """Mean and a root of the covariance, in the basis, of x_t given x at s and x_T.

        Args:
            x: (batch, *event).
            s: its time.
            t: a time in [s, T].
            exactly: whether x is the state at s = 0 itself, not the kernel's x_0, to which P0 is still to be added.
        """
        kernel, state = self.kernel, x.to(torch.float64)
        start = kernel.to_basis(state)
        end = kernel.to_basis(self._end_beside(x))
        now, whole = kernel.transition(state, s, t, exactly), kernel.transition(state, s, self.T, exactly)
        if t >= self.T:  # x_T itself: by the formula below it would be rounded in units of sigma_T
            return end, now.sigma.scaled(0.0)
        if t == s and (exactly or not any(kernel.declaration.initial_variances)):
            return start, now.sigma.scaled(0.0)
        onward = kernel.transition(state, t, self.T, exactly=True)
        if not bool(now.sigma.values.any()):  # no noise since s
            return now.alpha(start) + now.offset, now.sigma
        if not bool(onward.sigma.values.any()):  # and none from t on: x_t follows from x_T
            return onward.alpha.inverse(end - onward.offset), now.sigma.scaled(0.0)
        noisy = bool((onward.sigma.diagonal != 0.0).all())  # Cholesky factors: 0 in components whose noise has ended
        white = whole.sigma.inverse if noisy else whole.sigma.pseudo_inverse
        # K = P_t Φ_Ttᵀ P_T⁻¹, in whitened form: W = sigma_T⁻¹ Φ_Tt sigma_t, 1 - Wᵀ W is what is left of the covariance.
        W = white @ onward.alpha @ now.sigma
        surprise = white(end - whole.alpha(start) - whole.offset)
        mean = now.alpha(start) + now.offset + now.sigma(W.T(surprise))
        if not noisy:
            # With U = sigma_T⁻¹ sigma_T|t, 1 - Wᵀ W = (1 - Wᵀ W)² + Wᵀ U Uᵀ W, for W Wᵀ + U Uᵀ is 1, or projects.
            rest, U = W.one - W.T @ W, white @ onward.sigma
            return mean, now.sigma @ (rest.gram + (W.T @ U).gram).root
        # P_t - K P_T Kᵀ = (P_t⁻¹ + Φ_Ttᵀ P_T|t⁻¹ Φ_Tt)⁻¹, and the latter does not cancel as t -> T.
        V = onward.sigma.inverse @ onward.alpha @ now.sigma
        return mean, now.sigma @ V.T.root_of_one_plus_gram.T.inverse


class ReducibleBridge(_Bridge[ReducibleKernel]):
    """A reducible SDE conditioned on x_T, through the coordinate in which it is linear.

    Args:
        kernel: the SDE's kernel, with its change of state.
        x_T: where it ends, in the domain: (batch, *event) or one event (*event) for all; a number for all coordinates.

    Attributes:
        T: the time of the end.
        line: the bridge of y, with y_T >= 0 where the map folds.

    Raises:
        DataError: for an x_T outside the domain.
    """

    def __init__(self, kernel: ReducibleKernel, x_T: Tensor | float) -> None:
        super().__init__(kernel, x_T)
        self.line = Bridge(kernel.inner, kernel.transport(self.x_T, self.T))
        self._mirrored = Bridge(kernel.inner, -self.line.x_T)

    @property
    def drift(self) -> sp.Expr:
        """f + g² ∂/∂x log p(x_T | x_t = x), SymPy, with x_T a symbol; see the module.

        Where the moments are integrals, T stands in it as a symbol. Where SymPy takes too long, h(x, t) stands for that
        derivative.
        """
        kernel = self.kernel
        return reducible_bridge_drift(kernel.declaration, kernel.reduction.map, kernel.inner.shown)

    def moments(self, x_0: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The true mean and standard deviation of x_t given x_0 and x_T, each (batch, *event).

        Args:
            x_0: (batch, *event), in the domain.
            t: a number in [0, T].
        """
        x_0, t = checked_point(x_0, "x_0"), _within(t, self.T)
        y = self.kernel.transport(x_0.to(torch.float64), 0.0)
        mean, std = self._pushed(self.line, y, x_0, t)
        if self.kernel.reduction.map.fold:
            other, spread = self._pushed(self._mirrored, y, x_0, t)
            chance = self._chance(y, 0.0)
            centre = chance * mean + (1.0 - chance) * other
            var = chance * (std.square() + (mean - centre).square())
            mean, std = centre, (var + (1.0 - chance) * (spread.square() + (other - centre).square())).sqrt()
        return mean.to(x_0.dtype), std.to(x_0.dtype)

    def _pushed(self, line: Bridge, y: Tensor, x_0: Tensor, t: float) -> tuple[Tensor, Tensor]:
        mean, root = line.law(y, 0.0, t, exactly=True)
        return self.kernel.pushed_moments(mean, root.values.expand_as(mean), t)

    def _draw(self, x: Tensor, s: float, t: float, noise: NoiseStream, exactly: bool = False) -> Tensor:
        y = self.kernel.transport(x.to(torch.float64), s)
        mean, root = self.line.law(y, s, t, exactly=True)
        if self.kernel.reduction.map.fold:
            other, _ = self._mirrored.law(y, s, t, exactly=True)
            level = noise.uniform(tuple(x.shape), torch.float64, x.device)
            mean = torch.where(level < self._chance(y, s), mean, other)
        eps = noise.normal(tuple(x.shape), torch.float64, x.device)
        return self.kernel.restore_inside(mean + root(eps), t, x.dtype)

    def _chance(self, y: Tensor, s: float) -> Tensor:
        """The probability of y_T = +H(x_T, T) given y at s, and that x_T is reached."""
        if s >= self.T:
            return torch.ones_like(y)
        whole = self.kernel.inner.transition(y, s, self.T, exactly=True)
        end = self.line.x_T.to(y.device).expand(y.shape)
        return torch.sigmoid(2.0 * end * (whole.alpha(y) + whole.offset) / whole.sigma.values.square())


class SquareRootBridge(_Bridge[SquareRootKernel]):
    """A square-root process (CIR, squared Bessel) conditioned on x_T.

    Args:
        kernel: the SDE's kernel.
        x_T: where it ends, in the domain: (batch, *event) or one event (*event) for all; a number for all coordinates.

    Attributes:
        T: the time of the end.

    Raises:
        DataError: for an x_T outside the domain.
    """

    def __init__(self, kernel: SquareRootKernel, x_T: Tensor | float) -> None:
        super().__init__(kernel, x_T)
        kernel.require_inside(self.x_T, "x_T")

    @property
    def drift(self) -> sp.Expr:
        """f + g² ∂/∂x log p(x_T | x_t = x), SymPy, with x_T a symbol.

        Where the moments are integrals, T stands in it as a symbol. Where SymPy takes too long, h(x, t) stands for that
        derivative.
        """
        return square_root_bridge_drift(self.kernel.declaration, self.kernel.pearson, self.kernel.inner.shown)

    def moments(self, x_0: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The true mean and standard deviation of x_t given x_0 and x_T, each (batch, *event).

        Args:
            x_0: (batch, *event), in the domain.
            t: a number in [0, T].
        """
        x_0, t = checked_point(x_0, "x_0"), _within(t, self.T)
        known = self._known(x_0, 0.0, t)
        if known is not None:
            return known, torch.zeros_like(known)
        mean, std = self.kernel.pinned(x_0, self._end_beside(x_0), 0.0, t).moments()
        return mean.to(x_0.dtype), std.to(x_0.dtype)

    def log_prob(self, x_t: Tensor, x_0: Tensor, t: float) -> Tensor:
        """log p(x_t | x_0, x_T) in nats, (batch,) in float64; -inf for an x_t outside the domain.

        Args:
            x_t: (batch, *event).
            x_0: of the same shape, or one for all.
            t: a number in (0, T).

        Raises:
            ScheduleError: for another t: there the state is known, and has no density.
        """
        x_t = checked_point(x_t, "x_t")
        x_0, t = checked_start(x_0, x_t), _within(t, self.T)
        if not 0.0 < t < self.T:
            raise ScheduleError(f"a bridge has a density for t in (0, T) = (0, {self.T:g}), and none at t = {t:g}.")
        return self.kernel.pinned(x_0, self._end_beside(x_t), 0.0, t).log_prob(x_t).reshape(len(x_t), -1).sum(1)

    def _draw(self, x: Tensor, s: float, t: float, noise: NoiseStream, exactly: bool = False) -> Tensor:
        known = self._known(x, s, t)
        return self.kernel.pinned(x, self._end_beside(x), s, t).draw(noise) if known is None else known

    def _known(self, x: Tensor, s: float, t: float) -> Tensor | None:
        """The state at t where it is that at s or x_T."""
        if t >= self.T:
            return self._end_beside(x).to(x.dtype)
        return x if t <= s else None


def bridge_of(kernel: AnyKernel, x_T: Tensor | float) -> Bridge | ReducibleBridge | SquareRootBridge:
    """The SDE of ``kernel`` conditioned on x_T.

    Raises:
        NotAffineError: for an SDE that is neither linear, nor reducible, nor a square-root process.
    """
    match kernel:
        case Kernel():
            return Bridge(kernel, x_T)
        case ReducibleKernel():
            return ReducibleBridge(kernel, x_T)
        case SquareRootKernel():
            return SquareRootBridge(kernel, x_T)
        case PearsonKernel() | LocalKernel():
            known = "bridges are known of linear, reducible and square-root SDEs alone"
            raise kernel.declaration.not_affine("A bridge", known)
        case _:
            assert_never(kernel)


def _increasing(ts: Sequence[float] | Tensor, T: float) -> list[float]:
    """``ts`` as times that increase within [0, T]."""
    times = checked_numbers(ts, "ts")
    if times.ndim != 1 or not len(times) or not bool((times.diff() > 0).all()):
        raise ScheduleError(f"the times of a path must increase within [0, T] = [0, {T:g}], not {ts!r}.")
    return [_within(time, T) for time in times.tolist()]


def _within(t: object, T: float) -> float:
    """One time in [0, T]."""
    return min(float(checked_time(t, None, 0.0, T, "the bridge is defined for t in [0, T]")), T)
