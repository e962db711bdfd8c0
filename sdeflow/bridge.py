r"""Bridges: a linear SDE conditioned on where it ends (Doob's h-transform).

With p(x_T | x_t) = N(Φ_Tt x_t + m_Tt, P_T|t), the SDE conditioned on x_T = y is

    dx = [f + g gᵀ Φ_Ttᵀ P_T|t⁻¹ (y - m_Tt - Φ_Tt x)] dt + g dw,

and its law given x_0 is Gaussian, exactly: with the gain K = P_t Φ_Ttᵀ P_T⁻¹,

    x_t | x_0, y  ~  N(mean_t + K (y - mean_T),  P_t - K P_T Kᵀ).

Elementwise K = r alpha_t / alpha_T with r = SNR_T / SNR_t, and the variance is sigma_t² (1 - r). Paths are
drawn from the exact transitions: a bridge from (s, x_s) is again a bridge.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DataError, ScheduleError
from sdeflow.kernel import Kernel
from sdeflow.linear import Linear
from sdeflow.noise import NoiseStream, resolve_seed
from sdeflow.symbolic.equations import Equation, forward
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Bridge"]


class Bridge:
    """A linear SDE conditioned on x_T.

    Args:
        kernel: the SDE's Gaussian kernel.
        x_T: where it ends, (batch, *event) or one event (*event) for all; a number for all coordinates.

    Attributes:
        T: the time of the end.
    """

    def __init__(self, kernel: Kernel, x_T: Tensor | float) -> None:
        self.kernel = kernel
        self.x_T = torch.as_tensor(x_T, dtype=torch.float64)
        if not bool(torch.isfinite(self.x_T).all()):
            raise DataError("x_T must be finite.")
        self.T = kernel.T

    @property
    def equation(self) -> Equation:
        """The conditioned SDE, SymPy, with the components of x_T as symbols."""
        return Equation(self.drift, self.kernel.declaration.g, "w", self.kernel.declaration.state)

    @property
    def drift(self) -> sp.Expr | sp.ImmutableMatrix:
        """f + g gᵀ Φ_Ttᵀ P_T|t⁻¹ (y - m_Tt - Φ_Tt x), SymPy, with y the symbols x_T (v_T, ...)."""
        kernel, declaration = self.kernel, self.kernel.declaration
        matrix = (lambda e: e) if kernel.coupled else (lambda e: sp.ImmutableMatrix([[e]]))
        phi, P, m = matrix(kernel.alpha), matrix(kernel.var), matrix(kernel.offset)
        T = sp.nsimplify(kernel.T, rational=True)
        phi_T, P_T, m_T = (e.subs(time_symbol, T) for e in (phi, P, m))
        across = phi_T * phi.adjugate() / phi.det()
        rest = P_T - across * P * across.T
        inverse = rest.adjugate() / rest.det()
        x = sp.Matrix(declaration.state)
        y = sp.Matrix([sp.Symbol(f"{component.name}_T", real=True) for component in declaration.state])
        pull = declaration.gram * across.T * inverse * (y - m_T - across * (x - m))
        drift = sp.Matrix(declaration.drifts) + pull
        return sp.ImmutableMatrix(drift) if kernel.coupled else drift[0]

    @property
    def diffusion(self) -> sp.Expr | sp.ImmutableMatrix:
        """g, which conditioning leaves as it is."""
        return self.kernel.declaration.g

    def moments(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean (batch, *event) and standard deviation (which broadcasts to it) of x_t given x_0 and x_T.

        For a coupled state the second is the covariance (k, k, 1, ...). In a ``basis`` it is that of the coefficients.

        Args:
            x_0: (batch, *event).
            t: a number in [0, T].
        """
        mean, root = self._law(x_0, 0.0, t)
        mean = self.kernel.from_basis(mean).to(x_0.dtype)
        if not self.kernel.coupled:
            return mean, root.values.to(x_0.dtype)
        covariance = root.gram.values.to(x_0.dtype)
        return mean, covariance.reshape(*covariance.shape, *(1,) * (x_0.ndim - 2))

    def sample(self, x_0: Tensor, t: float, seed: int | torch.Generator | None = None) -> Tensor:
        """x_t given x_0 and x_T, shaped as x_0."""
        return self._draw(x_0, 0.0, t, NoiseStream(seed, "bridge"))

    def paths(self, x_0: Tensor, ts: Sequence[float] | Tensor, seed: int | torch.Generator | None = None) -> Tensor:
        """States at increasing times ``ts`` of [0, T], (len(ts), batch, *event), by exact transitions.

        Raises:
            ScheduleError: for times that do not increase within [0, T].
        """
        times = [float(t) for t in ts]
        if any(b <= a for a, b in zip([-1.0, *times], times, strict=False)) or not times or times[0] < 0:
            raise ScheduleError(f"the times of a path must increase within [0, T] = [0, {self.T:g}], not {times}.")
        noise, s, x, out, exactly = NoiseStream(resolve_seed(seed), "bridge"), 0.0, x_0, [], False
        for t in times:
            x = self._draw(x, s, t, noise, exactly)  # from the kernel's x_0, then from states that are known
            s, exactly = t, True
            out.append(x)
        return torch.stack(out)

    def _draw(self, x: Tensor, s: float, t: float, noise: NoiseStream, exactly: bool = False) -> Tensor:
        mean, root = self._law(x, s, t, exactly)
        eps = noise.normal(tuple(x.shape), torch.float64, x.device)
        return self.kernel.from_basis(mean + root(eps)).to(x.dtype)

    def _law(self, x: Tensor, s: float, t: Tensor | float, exactly: bool = False) -> tuple[Tensor, Linear]:
        """Mean and a root of the covariance, in the basis, of x_t given x at s and x_T.

        At s = 0, x is the kernel's x_0, with P0 still to come, unless it is the state ``exactly``.
        """
        if not x.is_floating_point():
            raise DataError(f"x must be floating, not {x.dtype}.")
        t = float(t)
        if not s <= t <= self.T * (1 + 1e-9):
            raise ScheduleError(f"the bridge is defined on [0, T] = [0, {self.T:g}], not at {t:g}.")
        kernel, state = self.kernel, x.to(torch.float64)
        start = kernel.to_basis(state)
        end = kernel.to_basis(self.x_T.to(x.device).expand(x.shape))
        now, whole = kernel.transition(state, s, t, exactly), kernel.transition(state, s, self.T, exactly)
        if t == s and (exactly or not any(kernel.declaration.initial_variances)):
            return start, now.sigma.scaled(0.0)
        onward = kernel.transition(state, t, self.T, exactly=True)
        # K = P_t Φ_Ttᵀ P_T⁻¹, in whitened form: W = sigma_T⁻¹ Φ_Tt sigma_t, 1 - Wᵀ W is what is left of the covariance.
        W = whole.sigma.inverse @ onward.alpha @ now.sigma
        surprise = whole.sigma.inverse(end - whole.alpha(start) - whole.offset)
        mean = now.alpha(start) + now.offset + now.sigma(W.T(surprise))
        # P_t - K P_T Kᵀ = (P_t⁻¹ + Φ_Ttᵀ P_T|t⁻¹ Φ_Tt)⁻¹, and the latter does not cancel as t -> T.
        if t >= self.T:
            return mean, now.sigma.scaled(0.0)
        V = onward.sigma.inverse @ onward.alpha @ now.sigma
        return mean, now.sigma @ V.T.root_of_one_plus_gram.T.inverse

    def __repr__(self) -> str:
        return f"Bridge({forward(self.kernel.declaration)} on [0, {self.T:g}], x_T of shape {tuple(self.x_T.shape)})"
