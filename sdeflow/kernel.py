r"""The Gaussian perturbation kernel p(x_t | x_0) = N(alpha x_0 + offset, sigma sigmaᵀ) of an affine SDE, as numbers.

A :class:`Kernel` is a declaration with values for its parameters, compiled. Its symbolic side
(``alpha``, ``std``, ``log_snr``, ...) and its numbers come from one derivation; where a closed form was
found, its numbers have been compared with quadrature on the whole horizon (1e-11 relative).

Elementwise, alpha and sigma are numbers, or one per coordinate where a parameter is a tensor. For a
coupled state alpha is the matrix Φ(t) and sigma the lower Cholesky factor of the covariance. With an
orthogonal ``basis`` all of this holds for the coefficients of the state in that basis.

Kernel (from x_0) and marginal (over all x_0) are not the same; the marginal of Gaussian data is
:meth:`Kernel.marginal`. All coefficients are float64 and functions of t alone.

half_log_snr is log(alpha / sigma) elementwise, and in general the mean over the data's components and
coordinates of ½ log J, J = diag(Φᵀ P⁻¹ Φ) the Fisher information that the state holds of x_0: it falls
in time for every SDE.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from sdeflow.basis import Basis
from sdeflow.chebyshev import nodes_of
from sdeflow.compile import Compiled, compile_expressions
from sdeflow.errors import DataError, DeclarationError, ScheduleError
from sdeflow.gaussian import Gaussian
from sdeflow.linear import Linear
from sdeflow.noise import NoiseStream
from sdeflow.parameters import Values
from sdeflow.quadrature import MomentTable, integrate_coupled, integrate_elementwise, panel_edges
from sdeflow.symbolic.coupled import derive_coupled, symbolic_cholesky
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.display import integrate_within
from sdeflow.symbolic.moments import Moments, derive_moments, integral_moments, square_root
from sdeflow.symbolic.symbols import data_symbols
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Kernel", "Path", "broadcast_to_event"]

_CUTOFF_NOISE = 2e-3  # sigma / alpha at the default cutoff
_AGREEMENT = 1e-11  # of closed forms with quadrature, relative
_SMALLEST_STD = float(torch.finfo(torch.float32).tiny)
_REPRESENTATIVES = 32  # entries of tensor parameters from which the panels are chosen


class Path(NamedTuple):
    """x_t = alpha x_0 + offset + sigma eps at given times, ready for a state (batch, *event)."""

    alpha: Linear
    sigma: Linear
    offset: Tensor


class Kernel:
    """The compiled perturbation kernel of an affine declaration.

    Args:
        declaration: an affine :class:`~sdeflow.symbolic.declaration.Declaration`.
        values: numbers and tensors of its parameters.
        basis: an orthogonal transform of the event in which the declaration holds, coordinate by coordinate.
        like: a kernel of the same declaration, whose derivation is shared.

    Attributes:
        T: the horizon.
        cutoff: the first time that training and solvers visit.
        has_offset: whether the mean has a part that does not depend on x_0.

    Raises:
        NotAffineError: where there is no Gaussian kernel.
        ScheduleError: for coefficients that are singular, complex or explosive on the horizon.
    """

    def __init__(
        self,
        declaration: Declaration,
        values: Mapping[sp.Symbol, float | Tensor] | None = None,
        basis: Basis | None = None,
        like: Kernel | None = None,
    ) -> None:
        self.declaration = declaration
        self.values = values if isinstance(values, Values) else Values(values or {})
        self.basis = basis
        self.T = declaration.T
        self.coupled = declaration.coupled
        self.components = len(declaration.state) if self.coupled else None
        if self.coupled and self.values.shape:
            raise DeclarationError("the parameters of a coupled state must be numbers or tensors of one element.")
        drift = declaration.require_affine("The perturbation kernel")
        self.has_offset = any(entry != 0 for entry in drift[1]) if self.coupled else drift[1] != 0
        self._compiled = compile_expressions(_entries(declaration), (time_symbol,), self.values, horizon=self.T)
        self._require_end_is_regular()
        self._derived = like._derived if like is not None else self._derive()
        with torch.no_grad():
            self._build()

    def _build(self) -> None:
        """The numbers: the table, the closed form where it agrees with it, and the cutoff."""
        self._require_noise_somewhere()
        self._table = self._integrate()
        self._version = self.values.version
        self._closed = self._compile_closed_form()
        self._times, self._half_log_snrs = self._monotone_samples()
        self.cutoff = self._find_cutoff() if self.declaration.cutoff is None else self.declaration.cutoff
        self._require_usable_cutoff()

    def with_values(self, values: Values) -> Kernel:
        """The same kernel with other values of the parameters; nothing is derived anew."""
        return Kernel(self.declaration, values, self.basis, like=self)

    # ---------------------------------------------------------------- symbolic side

    def _derive(self) -> Moments | None:
        """Closed forms by rule. A coupled state's are for display alone, and wait until they are asked for."""
        if self.coupled:
            return None
        if self.declaration.path is not None:
            alpha, sigma = self.declaration.path
            rules = ("alpha: declared", "offset: none", "variance: declared")
            return Moments(sp.log(alpha), alpha, sp.Integer(0), sigma**2, rules)
        return derive_moments(
            self.declaration.affine, self.declaration.g, self.declaration.P0, self.T, self.values.numbers
        )

    @cached_property
    def _shown(self) -> Moments:
        """The moments for display: SymPy's integrals where it finds them in 2 s and they agree with quadrature."""
        if self.coupled:
            return self._coupled_moments
        if self._closed is not None:
            return self._derived
        if self._derived.closed and self._is_true(self._derived):
            return self._derived  # true, but not computed as it stands: digits would cancel
        unsolved = self._derived
        if self._derived.closed:
            unsolved = integral_moments(self.declaration.affine, self.declaration.g**2, sp.Float(self.declaration.P0))
        integrated = integrate_within(unsolved)
        if integrated is None:
            return unsolved
        try:
            outputs = _outputs(integrated, self._middle)
            compiled = compile_expressions(outputs, (time_symbol,), self.values.numbers, self.T)
            agrees = not self.values.shape and self._agrees(
                compiled, np.linspace(max(self.cutoff, 1e-3 * self.T), self.T, 16), 1e-10
            )
        except Exception:  # a form that cannot be computed is not shown
            agrees = False
        return integrated if agrees else unsolved

    @cached_property
    def _coupled_moments(self) -> Moments:
        """Φ, the covariance and the offset of a coupled state, closed where a rule's result is true in 40 digits."""
        candidate = derive_coupled(self.declaration)
        if candidate.closed and not self._is_true(candidate):
            return derive_coupled(self.declaration, rules=False)
        return candidate

    @cached_property
    def form(self) -> str:
        """ "closed" where rules gave every moment and their numbers agree with quadrature, else "quadrature"."""
        closed = self._coupled_moments.closed if self.coupled else self._closed is not None
        return "closed" if closed else "quadrature"

    def _is_true(self, moments: Moments) -> bool:
        """Whether formulas give the quadrature's numbers when they are evaluated in 40 digits."""
        for fraction in (0.05, 0.4, 1.0):
            at = {**self.values.numbers, time_symbol: sp.Float(fraction * self.T, 40)}
            t = torch.tensor(fraction * self.T, dtype=torch.float64)
            if self.coupled:
                phi, root, offset = self._table(t)
                pairs = ((moments.alpha, phi), (moments.var, root @ root.mT), (moments.offset, offset))
            elif self.values.shape:
                return True  # one number stands for many: the formula is an identity in the parameters or nothing
            else:
                log_alpha, var, offset = self._table(t)
                pairs = ((moments.log_alpha, log_alpha), (moments.var, var), (moments.offset, offset))
            for expression, truth in pairs:
                ours = list(expression) if isinstance(expression, sp.MatrixBase) else [expression]
                scale = float(truth.abs().max())
                for value, expected in zip(ours, truth.reshape(-1).tolist(), strict=True):
                    number = sp.re(value.subs(at).evalf(40))
                    if not number.is_finite or abs(number - expected) > 1e-9 * (abs(expected) + 1e-6 * (1 + scale)):
                        return False
        return True

    @property
    def alpha(self) -> sp.Expr:
        """alpha(t): the mean is alpha x_0 + offset. The matrix Φ(t) of a coupled state."""
        return self._shown.alpha

    @property
    def offset(self) -> sp.Expr:
        """The part of the mean that does not depend on x_0."""
        return self._shown.offset

    @property
    def mean(self) -> sp.Expr:
        """E[x_t | x_0], an expression in x_0 and t; a column for a coupled state."""
        data = data_symbols(self.declaration.state)
        if self.coupled:
            return sp.ImmutableMatrix(self.alpha * sp.Matrix(data) + self.offset)
        return self.alpha * data[0] + self.offset

    @property
    def var(self) -> sp.Expr:
        """sigma(t)², the covariance matrix of a coupled state."""
        return self._shown.var

    @property
    def std(self) -> sp.Expr:
        """sigma(t), the lower Cholesky factor of a coupled state's covariance."""
        if self.coupled:
            return symbolic_cholesky(self.var)
        return square_root(self.var, self._middle)

    @property
    def log_snr(self) -> sp.Expr:
        """log(alpha² / sigma²); log of the Fisher information of x_0 for a coupled state."""
        if self.coupled:
            (first, *_) = self._data_components
            information = self.alpha.T * self.var.inv() * self.alpha
            return sp.log(information[first, first])
        return 2 * self._shown.log_alpha - sp.log(self.var)

    @property
    def rules(self) -> tuple[str, ...]:
        """The rule behind each moment: of alpha, offset and variance."""
        return self._shown.rules

    @property
    def _middle(self) -> dict[sp.Symbol, float]:
        return {**self.values.numbers, time_symbol: self.T / 2}

    @property
    def _data_components(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.components) if i not in self.declaration.auxiliary)

    def __repr__(self) -> str:
        names = [symbol.name for symbol in self.declaration.state]
        given = f"{names[0]}_t | {names[0]}_0" if len(names) == 1 else f"{', '.join(names)} | {names[0]}_0, ..."
        mean, var = (v.tolist() if isinstance(v, sp.MatrixBase) else v for v in (self.mean, self.var))
        return f"Kernel(p({given}) = N({mean}, {var}), form={self.form!r})"

    def _repr_latex_(self) -> str:
        mean, var = sp.latex(self.mean), sp.latex(self.var)
        state = ", ".join(symbol.name for symbol in self.declaration.state)
        return rf"$\displaystyle p({state}_t \mid {state}_0) = \mathcal{{N}}\left({mean},\; {var}\right)$"

    def __reduce__(self) -> tuple:
        return Kernel, (self.declaration, self.values, self.basis)

    def __deepcopy__(self, memo: dict) -> Kernel:
        """Copies of a score share its kernel, unless they bring their own learned parameters."""
        values = copy.deepcopy(self.values, memo)
        return self if values is self.values else self.with_values(values)

    # ---------------------------------------------------------------- coefficients of t

    def sde_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a(t), b(t) and g(t)² of dx = (a x + b) dt + g dw, (*t.shape, *parameters), float64.

        For a coupled state the matrices F and g gᵀ (*t.shape, k, k), and b (*t.shape, k).
        """
        values = self._evaluated(self._compiled, t)
        if not self.coupled:
            return values
        k = self.components
        entries = torch.stack(values, dim=-1)
        F, b, Q = entries.split([k * k, k, k * k], dim=-1)
        return F.unflatten(-1, (k, k)), b, Q.unflatten(-1, (k, k))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and offset at t, (*t.shape, *parameters), float64; for a coupled state Φ, its Cholesky
        factor (*t.shape, k, k), and the offset (*t.shape, k)."""
        t = t.to(torch.float64)
        if self._closed is not None:
            alpha, offset, std, _ = self._evaluated(self._closed, t)
            return alpha, std, offset
        if self.coupled:
            return self._current_table()(t)
        log_alpha, var, offset = self._current_table()(t)
        return torch.exp(log_alpha), torch.sqrt(var), offset

    def path(self, x: Tensor, t: Tensor) -> Path:
        """alpha, sigma and offset as maps of states like ``x`` (batch, *event), for t () or (batch,)."""
        alpha, sigma, offset = self.coefficients(t if t.device == x.device else t.to(x.device))
        return Path(self._as_map(alpha, x, t.ndim), self._as_map(sigma, x, t.ndim), self._as_level(offset, x, t.ndim))

    def transition(self, x: Tensor, s: float, t: float) -> Path:
        """x_t = alpha x_s + offset + sigma eps given x_s, as maps of states like ``x``, for s <= t.

        alpha = Φ_t Φ_s⁻¹ and sigma sigmaᵀ = P_t - alpha P_s alphaᵀ, elementwise sigma_t² (1 - SNR_t / SNR_s). From
        s = 0 it is the kernel itself, P0 included.
        """
        if s == 0.0:
            return self.path(x, torch.as_tensor(t, dtype=torch.float64))
        if self.coupled:
            return self._coupled_transition(x, s, t)
        later, earlier = (self.path(x, torch.as_tensor(time, dtype=torch.float64)) for time in (t, s))
        alpha = later.alpha @ earlier.alpha.inverse
        kept = (earlier.sigma @ alpha @ later.sigma.inverse).values.square()
        left = later.sigma.scaled((-torch.expm1(kept.log())).clamp_min(0.0).sqrt())
        return Path(alpha, left, later.offset - alpha.values * earlier.offset)

    def _coupled_transition(self, x: Tensor, s: float, t: float) -> Path:
        """The moments integrated from s on: the inverse of Φ_s may have lost all digits."""
        if s == t:
            k = self.components
            zero = torch.zeros(k, k, dtype=torch.float64)
            return Path(Linear(torch.eye(k, dtype=torch.float64), True), Linear(zero, True), zero[0])
        inside = self._table.edges[(self._table.edges > s) & (self._table.edges < t)].numpy()
        edges = np.concatenate([[s], inside, [t]])
        with torch.no_grad():
            a, b, q = self.sde_coefficients(torch.as_tensor(nodes_of(edges)))
            table = integrate_coupled(edges, a, b, q, torch.zeros_like(a[0, 0]))
            alpha, sigma, offset = table(torch.tensor(t, dtype=torch.float64))
        return Path(self._as_map(alpha, x, 0), self._as_map(sigma, x, 0), self._as_level(offset, x, 0))

    def equation(self, x: Tensor, t: Tensor) -> tuple[Linear, Tensor, Linear]:
        """a, b and g gᵀ of the SDE as maps of states like ``x``."""
        a, b, q = self.sde_coefficients(t if t.device == x.device else t.to(x.device))
        return self._as_map(a, x, t.ndim), self._as_level(b, x, t.ndim), self._as_map(q, x, t.ndim)

    def scale(self, std: Tensor, x: Tensor) -> Linear:
        """The map that multiplies states like ``x`` by the data's standard deviation, a number or (*event)."""
        std = std.to(device=x.device, dtype=torch.float64)
        if not self.coupled:
            return Linear(std)
        if std.ndim == 0:
            std = torch.stack(
                [torch.zeros_like(std) if i in self.declaration.auxiliary else std for i in range(self.components)]
            )
        return Linear.scaling(std.reshape(*std.shape, *(1,) * (x.ndim - 1 - std.ndim))[None].movedim(1, 0), True)

    def data_level(self, mean: Tensor, x: Tensor) -> Tensor | None:
        """The data's mean in the basis, ready to be taken off states like ``x``; None where it is 0."""
        if not mean.ndim and not float(mean):
            return None
        mean = mean.to(device=x.device, dtype=x.dtype)
        mean = self._of_components(mean) if self.coupled else mean
        if self.coupled and mean.ndim < x.ndim - 1:
            mean = mean.reshape(*mean.shape, *(1,) * (x.ndim - 1 - mean.ndim))
        level = mean.expand(x.shape[1:])[None]
        return self.to_basis(level)

    def half_log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha / sigma) at t, shaped as t, float64: the mean where it differs between coordinates."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if self.coupled:
            return self._over_event(0.5 * torch.log(self._information(t)[0]), t)
        if self._closed is not None:
            _, _, std, log_alpha = self._evaluated(self._closed, t)
            return self._over_event(log_alpha - torch.log(std), t)
        log_alpha, var, _ = self._current_table()(t)
        return self._over_event(log_alpha - 0.5 * torch.log(var), t)

    def half_log_snr_rate(self, t: Tensor) -> Tensor:
        """d/dt of half_log_snr, elementwise -g² / (2 sigma²); never positive. Shaped as t."""
        if self.coupled:
            information, rate = self._information(t)
            return self._over_event(0.5 * rate / information, t)
        _, std, _ = self.coefficients(t)
        return self._over_event(-0.5 * self.sde_coefficients(t)[2] / std.square(), t)

    def _information(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """J = diag(Φᵀ P⁻¹ Φ) of the data's components and dJ/dt = -diag(Φᵀ P⁻¹ g gᵀ P⁻¹ Φ), (*t.shape, data)."""
        phi, root, _ = self.coefficients(t)
        _, _, Q = self.sde_coefficients(t)
        data = list(self._data_components)
        whitened = torch.linalg.solve_triangular(root, phi[..., data], upper=False)
        precise = torch.linalg.solve_triangular(root.mT, whitened, upper=True)
        return whitened.square().sum(-2), -(precise * (Q @ precise)).sum(-2)

    def time_of(self, half_log_snr: Tensor | float) -> Tensor:
        """The time at which half_log_snr takes the given value, in [cutoff, T], float64.

        By bracketed Newton steps to rounding. Values outside the range give its ends. Where g = 0 on an
        interval, the log-SNR is flat there and any of its times may come back.
        """
        self._refresh()
        target = torch.as_tensor(half_log_snr, dtype=torch.float64)
        times, falling = (table.to(target.device) for table in (self._times, -self._half_log_snrs))
        upper = torch.searchsorted(falling, -target.contiguous()).clamp(1, len(times) - 1)
        low, high = times[upper - 1], times[upper]
        t = low + (high - low) * ((-target - falling[upper - 1]) / (falling[upper] - falling[upper - 1])).clamp(0, 1)
        with torch.no_grad():
            for _ in range(4 if not self.values.shape else 8):
                excess = self.half_log_snr(t) - target
                low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
                step = t - excess / self.half_log_snr_rate(t)
                t = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
        return t.clamp(self.cutoff, self.T)

    # ---------------------------------------------------------------- the kernel as a distribution

    def moments(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t given x_0; for a coupled state mean and covariance.

        Args:
            x_0: (batch, *event).
            t: a number or (batch,), in [0, T].

        Returns:
            mean (batch, *event) and std, which broadcasts to it, in the dtype of x_0; for a coupled state the
            covariance (batch or 1, k, k, 1, ...). In a ``basis``, std is that of the coefficients.
        """
        path = self.path(self._state(x_0), self.times_for(x_0, t))
        mean = self.from_basis(self._mean(path, self.to_basis(x_0)))
        if not self.coupled:
            return mean, path.sigma.values.to(x_0.dtype)
        covariance = path.sigma.gram.values.to(x_0.dtype)
        return mean, covariance.movedim((-2, -1), (1, 2)) if covariance.ndim > 2 else covariance

    def sample(
        self, x_0: Tensor, t: Tensor | float, seed: int | torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """x_t = alpha x_0 + offset + sigma noise, shaped as x_0.

        Args:
            x_0: (batch, *event).
            t: a number or (batch,), in [0, T].
            seed: seeds the noise; None draws from the global generator.
            noise: the noise itself, shaped as x_0, instead of a seed.
        """
        if not x_0.is_floating_point():
            raise DataError(f"x_0 must be floating, not {x_0.dtype}.")
        path = self.path(self._state(x_0), self.times_for(x_0, t))
        if noise is None and seed is None:
            noise = torch.randn_like(x_0)
        elif noise is None:
            noise = NoiseStream(seed, "kernel").normal(tuple(x_0.shape), x_0.dtype, x_0.device)
        mean = self._mean(path, self.to_basis(x_0))
        if self.coupled or self.basis is not None:
            return self.from_basis(mean + path.sigma(self.to_basis(noise)))
        return mean.addcmul_(path.sigma.values.to(x_0.dtype), noise)

    def log_prob(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """log p(x_t | x_0) in nats, (batch,) in float64; joint for a coupled state."""
        path, whitened = self._whitened(x_t, x_0, t)
        log_det = path.sigma.log_det(tuple(x_0.shape[1:]))
        d = math.prod(x_0.shape[1:])
        return -0.5 * whitened.square().flatten(1).sum(1) - log_det - 0.5 * d * math.log(2.0 * math.pi)

    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p(x_t | x_0) = -sigma⁻ᵀ sigma⁻¹ (x_t - mean), shaped as x_t."""
        path, whitened = self._whitened(x_t, x_0, t)
        return self.from_basis(-path.sigma.T.inverse(whitened)).to(x_t.dtype)

    def marginal(self, mean: Tensor | float, std: Tensor | float, t: Tensor | float) -> Gaussian:
        """p(x_t) for Gaussian data: N(alpha mean + offset, alpha diag(std²) alphaᵀ + sigma sigmaᵀ).

        ``mean`` and ``std`` are of the data, numbers or (*event); for a coupled state numbers are of its data
        components, and the others start at zero.
        """
        mean, std = (torch.as_tensor(m, dtype=torch.float64).detach().cpu() for m in (mean, std))
        if self.coupled:
            mean, std = (self._of_components(m) for m in (mean, std))
        event = tuple(torch.broadcast_shapes(mean.shape, std.shape, self.values.shape))
        centre = mean.expand(event)[None]
        with torch.no_grad():
            path = self.path(centre, torch.as_tensor(t, dtype=torch.float64).cpu())
            if self.basis is not None and mean.ndim:
                centre = self.to_basis(centre)
            elif self.basis is not None and float(mean) != 0:
                raise DataError("in a basis the data's mean must be a whole event (*event), or 0.")
            level = path.alpha(centre) + path.offset
            spread = path.sigma.inverse @ path.alpha @ self.scale(std, centre)
            root = path.sigma @ spread.root_of_one_plus_gram
        return Gaussian(level[0], root if self.coupled else root.values, self.basis)

    def to_basis(self, x: Tensor) -> Tensor:
        """The coefficients of a state in the kernel's basis."""
        return x if self.basis is None else self.basis.forward(x)

    def from_basis(self, x: Tensor) -> Tensor:
        """The state with these coefficients."""
        return x if self.basis is None else self.basis.inverse(x)

    def lift(self, data: Tensor, seed: int | torch.Generator | None = None, noisy: bool = True) -> Tensor:
        """States (batch, k, *event) from data (batch, *event), the auxiliary components drawn from P0 (or zero)."""
        if not self.coupled or not self.declaration.auxiliary:
            return data
        if len(self._data_components) != 1:
            raise DataError("lift needs a state with one data component; give states (batch, k, *event) instead.")
        state = data.new_zeros(len(data), self.components, *data.shape[1:])
        if noisy:
            noise = NoiseStream(seed, "lift").normal(tuple(state.shape), data.dtype, data.device)
            state = Linear(self._initial_root().to(data.device), True)(noise)
        state[:, self._data_components[0]] += data
        return state

    def require_times(self, t: Tensor) -> None:
        """Raises a ScheduleError for times outside [cutoff, T]; times on an accelerator are trusted, for speed."""
        if t.device.type != "cpu" or not t.numel():
            return
        if not _within(t, self.cutoff * (1 - 1e-6), self.T * (1 + 1e-6)):
            low, high = float(t.min()), float(t.max())
            start = "that of P0" if any(self.declaration.initial_variances) else "0"
            raise ScheduleError(
                f"the score is defined for t in [cutoff, T] = [{self.cutoff:.6g}, {self.T:g}] (sigma is {start} at "
                f"t = 0); asked for {low:.6g}{'' if low == high else f' to {high:.6g}'}."
            )

    def times_for(self, x: Tensor, t: Tensor | float) -> Tensor:
        """t as float64, () or (batch,), within [0, T]."""
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
            raise DataError(f"t must be a number or of shape (batch,) = ({len(x)},), not {tuple(t.shape)}.")
        if t.device.type == "cpu" and t.numel() and not _within(t, 0.0, self.T * (1 + 1e-6)):
            raise ScheduleError(
                f"the kernel is defined for t in [0, T] = [0, {self.T:g}], not for {t.min():g} to {t.max():g}."
            )
        return t

    def require_event(self, event: tuple[int, ...]) -> None:
        """Raises a DataError for an event that does not have the state's components, or not the parameters' shape."""
        if self.coupled and (not event or event[0] != self.components):
            names = ", ".join(symbol.name for symbol in self.declaration.state)
            raise DataError(
                f"a state of this SDE is (batch, {self.components}, *event), its components {names} along the second "
                f"axis; the shape given is (batch, {', '.join(map(str, event))}). sde.lift(data) adds components."
            )
        if self.values.shape:
            try:
                fits = torch.broadcast_shapes(self.values.shape, event) == event
            except RuntimeError:
                fits = False
            if not fits:
                raise DataError(f"the parameters are of shape {self.values.shape}, the event of {tuple(event)}.")

    # ---------------------------------------------------------------- helpers of the above

    def _state(self, x: Tensor) -> Tensor:
        if self.coupled or self.values.shape:
            self.require_event(tuple(x.shape[1:]))
        return x

    def _mean(self, path: Path, x_0: Tensor) -> Tensor:
        mean = path.alpha(x_0)
        return mean + path.offset.to(x_0.dtype) if self.has_offset else mean

    def _whitened(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> tuple[Path, Tensor]:
        """sigma⁻¹ (x_t - mean) in float64."""
        path = self.path(self._state(x_0), self.times_for(x_0, t))
        self._require_noise(path.sigma)
        deviation = self.to_basis(x_t.to(torch.float64)) - self._mean(path, self.to_basis(x_0.to(torch.float64)))
        return path, path.sigma.inverse(deviation)

    def _evaluated(self, compiled: Compiled, t: Tensor) -> tuple[Tensor, ...]:
        """Functions of t and the parameters, (*t.shape, *parameters) each."""
        t = t.to(torch.float64)
        if not self.values.tensors:
            return compiled(t)
        sides = len(self.values.shape)
        values = compiled(t.reshape((*t.shape, *(1,) * sides)))
        return tuple(value.expand((*t.shape, *self.values.shape)) for value in values)

    def _as_map(self, values: Tensor, x: Tensor, lead: int) -> Linear:
        """Coefficients (*batch, *parameters) or (*batch, k, k) as a map of states like ``x``."""
        if self.coupled:
            sides = (1,) * (x.ndim - 2)
            return Linear(values.reshape(*values.shape[:lead], *sides, *values.shape[lead:]) if lead else values, True)
        return Linear(self._as_level(values, x, lead))

    def _as_level(self, values: Tensor, x: Tensor, lead: int) -> Tensor:
        """Coefficients (*batch, *parameters) or (*batch, k), shaped to broadcast with states like ``x``."""
        if self.coupled:
            return values.reshape(*values.shape, *(1,) * (x.ndim - 2))
        if not lead:
            return values
        own = values.shape[1:]
        return values.reshape(len(values), *(1,) * (x.ndim - 1 - len(own)), *own)

    def _of_components(self, value: Tensor) -> Tensor:
        """A moment of the data as one of the state: a number belongs to the data's components."""
        if value.ndim:
            return value
        return torch.stack([value * (i not in self.declaration.auxiliary) for i in range(self.components)])

    def _over_event(self, values: Tensor, t: Tensor) -> Tensor:
        return values if values.ndim == t.ndim else values.flatten(t.ndim).mean(-1)

    def _require_noise(self, sigma: Linear) -> None:
        values = sigma.values.diagonal(dim1=-2, dim2=-1) if self.coupled else sigma.values
        if values.device.type == "cpu" and not bool((values > 0).all()):
            raise ScheduleError("sigma = 0 at t = 0: the kernel is a point there, without a density or a score.")

    def _initial_root(self) -> Tensor:
        covariance = torch.tensor(self.declaration.P0.tolist(), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariance)
        return vectors * values.clamp_min(0).sqrt() @ vectors.mT

    # ---------------------------------------------------------------- building

    def _integrate(self) -> MomentTable:
        """The moments' table for the current values; differentiable in them where a gradient is asked for."""
        with torch.no_grad():
            edges = panel_edges(self._sampled_rows, self.T, self.components)
        table_times = torch.as_tensor(nodes_of(edges))
        a, b, q = self.sde_coefficients(table_times)
        if self.coupled:
            P0 = torch.tensor(self.declaration.P0.tolist(), dtype=torch.float64)
            return integrate_coupled(edges, a, b, q, P0)
        sides = range(2, 2 + len(self.values.shape))
        a, b, q = (v.permute((*sides, 0, 1)) for v in (a, b, q))
        return integrate_elementwise(edges, a, b, q, self.declaration.P0)

    def _current_table(self) -> MomentTable:
        """The table, with a graph where the values need a gradient, and never out of date."""
        if self.values.needs_grad:
            return self._integrate()
        self._refresh()
        return self._table

    def _refresh(self) -> None:
        """Follows values that were changed in place, as by an optimiser."""
        if self._version == self.values.version:
            return
        self._version = self.values.version
        with torch.no_grad():
            if self._closed is None:
                self._table = self._integrate()
            else:
                t = self._table.times
                _, offset, std, log_alpha = self._evaluated(self._closed, t)
                sides = range(2, 2 + len(self.values.shape))
                rows = (v.permute((*sides, 0, 1)) for v in (log_alpha, std.square(), offset))
                self._table = MomentTable(self._table.edges.numpy(), tuple(rows))
            self._times, self._half_log_snrs = self._monotone_samples()
            if self.declaration.cutoff is None:
                self.cutoff = self._find_cutoff()

    def _sampled_rows(self, points: np.ndarray) -> np.ndarray:
        """The coefficients at points as rows, of some entries of the tensor parameters only."""
        values = self._evaluated(self._compiled, torch.as_tensor(points))
        rows = [v.detach().reshape(len(points), -1) for v in values]
        count = rows[0].shape[1]
        if count > 1:
            ranked = torch.stack([row[len(points) // 2] for row in rows]).sum(0).argsort()
            chosen = ranked[torch.linspace(0, count - 1, min(count, _REPRESENTATIVES)).long()]
            rows = [row[:, chosen] for row in rows]
        rows = torch.cat([row.mT for row in rows]).numpy()
        self._require_finite(points, rows)
        return rows

    def _require_finite(self, points: np.ndarray, rows: np.ndarray) -> None:
        """A ScheduleError with the first bad time and the exact value there."""
        bad = ~np.isfinite(rows).all(0)
        if not self.coupled:
            bad |= (rows[2 * len(rows) // 3 :] < 0).any(0)
        if bad.any():
            at = float(points[bad].min())
            exact = [
                (name, entry.subs({**self.values.numbers, time_symbol: sp.Float(at)}).evalf(6))
                for name, entry in self._named_entries()
            ]
            shown = ", ".join(f"{name} = {value}" for name, value in exact)
            kind = "complex" if any(value.has(sp.I) for _, value in exact) else "not finite"
            if self.declaration.path is not None:
                alpha, sigma = self.declaration.path
                raise ScheduleError(
                    f"no SDE has the path alpha = {alpha}, sigma = {sigma}: its signal-to-noise ratio alpha / sigma "
                    f"must fall in time, and g² = 2 sigma sigma' - 2 (alpha'/alpha) sigma² is not positive and "
                    f"finite at t = {at:.6g} ({shown})."
                )
            raise ScheduleError(
                f"a coefficient is {kind} at t = {at:.6g}: {shown}. f and g must be real and finite on (0, T]."
            )

    def _named_entries(self) -> list[tuple[str, sp.Expr]]:
        declaration = self.declaration
        entries = [*(("f", e) for e in declaration.drifts), *(("g", e) for e in declaration.diffusions)]
        return [(name, entry) for name, entry in entries if entry != 0 or not self.coupled]

    def _require_end_is_regular(self) -> None:
        """A pole exactly at T escapes rounding (tan(pi/2) is 1.6e16 in float64): SymPy evaluates there."""
        for name, e in self._named_entries():
            at_end = e.subs({**self.values.numbers, time_symbol: sp.nsimplify(self.T, rational=True)})
            if at_end.has(sp.zoo, sp.oo, -sp.oo):
                raise ScheduleError(f"{name} is singular at t = T = {self.T:g}; use T = {0.999 * self.T:g}, say.")

    def _require_noise_somewhere(self) -> None:
        """A g that is 0 in disguise, such as sin² + cos² - 1, leaves nothing but rounding."""
        points = torch.linspace(0.0, self.T, 258, dtype=torch.float64)[1:-1]
        with torch.no_grad():
            noise = self.sde_coefficients(points)[2]
        if not bool((noise.abs() > 1e-30).any()):
            raise ScheduleError(f"g = {self.declaration.g} is 0 on the whole horizon: no noise, so no kernel.")

    def _monotone_samples(self) -> tuple[Tensor, Tensor]:
        """Times and their half log-SNR, falling; the inverse starts from them."""
        nodes = np.concatenate([self._table.times.reshape(-1).numpy(), [self.T]])
        if all(variance > 0 for variance in self.declaration.initial_variances):
            nodes = np.concatenate([[0.0], nodes])
        # Dense enough for 4 Newton steps to end at rounding; the nodes alone, and 8 steps, for many schedules.
        per_node = 1 if self.values.shape or self.coupled else 8
        fine = np.arange((len(nodes) - 1) * per_node + 1) / float(per_node)
        times = torch.as_tensor(np.interp(fine, np.arange(len(nodes)), nodes))
        with torch.no_grad():
            if self.coupled:
                half_log_snr = self.half_log_snr(times)
            else:
                log_alpha, var, _ = self._table(times)
                half_log_snr = self._over_event(log_alpha - 0.5 * torch.log(var), times)
        finite = torch.isfinite(half_log_snr)
        if not bool(finite.any()):
            raise ScheduleError(
                "the noise never reaches some component, so that the kernel has no density: give it noise or P0."
                if self.coupled
                else "g is 0 on the whole horizon: no noise, so no kernel."
            )
        times, half_log_snr = times[finite], half_log_snr[finite]
        falls = torch.cat([torch.ones(1, dtype=torch.bool), half_log_snr[1:] < half_log_snr.cummin(0).values[:-1]])
        return times[falls], half_log_snr[falls]

    def _noise_to_signal(self, t: Tensor) -> Tensor:
        """sigma / alpha at t; of a coupled state, that of its data component alone."""
        if self.coupled:
            i = self._data_components[0]
            phi, root, _ = self._table(t)
            return root[..., i, :].norm(dim=-1) / phi[..., i, i].abs()
        log_alpha, var, _ = self._table(t)
        return torch.exp(-self._over_event(log_alpha - 0.5 * torch.log(var), t))

    def _find_cutoff(self) -> float:
        if all(variance > 0 for variance in self.declaration.initial_variances):
            return 0.0
        ratios = self._noise_to_signal(self._times)
        reached = (ratios >= _CUTOFF_NOISE).nonzero()
        if not len(reached):
            raise ScheduleError(
                f"sigma / alpha reaches only {float(ratios.max()):.3g} at T = {self.T:g}, too "
                f"little noise to start from (with {_CUTOFF_NOISE:g} at the cutoff). Choose a larger T or g, or give "
                "cutoff= or P0=."
            )
        after = int(reached[0])
        low, high = float(self._times[max(after - 1, 0)]), float(self._times[after])
        for _ in range(60):  # bisection in the table, to rounding: the closed form is not verified yet
            middle = 0.5 * (low + high)
            ratio = float(self._noise_to_signal(torch.tensor(middle, dtype=torch.float64)))
            low, high = (middle, high) if ratio < _CUTOFF_NOISE else (low, middle)
        return high

    def _require_usable_cutoff(self) -> None:
        """sigma at the cutoff must be a normal number in float32, and t must be where the table resolves it."""
        smallest = math.sqrt(min(self.declaration.initial_variances))
        if self.cutoff == 0 and smallest >= _SMALLEST_STD:
            return
        resolved = self._times[self._times >= self._table.edges[1]]
        std = self._smallest_std(torch.tensor(self.cutoff, dtype=torch.float64))
        std = float(std) if self.cutoff >= float(resolved[0]) else 0.0
        if not std >= _SMALLEST_STD:
            enough = resolved[self._smallest_std(resolved) >= _SMALLEST_STD]
            raise ScheduleError(
                f"sigma = {std:.3g} at cutoff = {self.cutoff:g} cannot be told from 0 in float32; the smallest "
                f"usable cutoff is about {float(enough[0]):.3g}; None takes sigma/alpha = {_CUTOFF_NOISE:g}."
                if len(enough)
                else "the noise never reaches some component, so that the kernel has no density: give it noise or P0."
            )

    def _smallest_std(self, t: Tensor) -> Tensor:
        if self.coupled:
            return self._table(t)[1].diagonal(dim1=-2, dim2=-1).amin(-1)
        std = self._table(t)[1].clamp_min(0).sqrt()
        return std if std.ndim == t.ndim else std.flatten(t.ndim).amin(-1)

    def _compile_closed_form(self) -> Compiled | None:
        """The rules' closed form compiled, if its numbers agree with quadrature on [cutoff, T]; else None."""
        if self.coupled or not self._derived.closed:
            return None
        try:
            compiled = compile_expressions(_outputs(self._derived, self._middle), (time_symbol,), self.values, self.T)
        except DeclarationError:  # such as 0/0 at these values of the parameters
            return None
        nodes = self._table.times.reshape(-1).numpy()
        inside = nodes[nodes >= 1e-12 * self.T]
        points = np.concatenate([inside[inside < 0.1 * self.T][::4], inside[:: max(1, len(inside) // 512)], [self.T]])
        return compiled if self._agrees(compiled, np.sort(points), _AGREEMENT) else None

    def _agrees(self, compiled: Compiled, points: np.ndarray, tolerance: float) -> bool:
        t = torch.as_tensor(points)
        with torch.no_grad():
            alpha, offset, std, log_alpha = self._evaluated(compiled, t)
            true_log_alpha, true_var, true_offset = self._table(t)
        true_alpha, true_std = true_log_alpha.exp(), true_var.sqrt()
        # An offset may cross 0: 1e-4 of what it has reached before is then the measure.
        scale = true_offset.abs() + 1e-4 * true_offset.abs().cummax(0).values
        return bool(
            ((alpha - true_alpha).abs() <= tolerance * true_alpha).all()
            and ((std - true_std).abs() <= tolerance * true_std).all()
            and ((offset - true_offset).abs() <= tolerance * scale).all()
            and ((log_alpha - true_log_alpha).abs() <= tolerance * (1 + true_log_alpha.abs())).all()
        )


def _entries(declaration: Declaration) -> tuple[sp.Expr, ...]:
    """a, b and g², or the entries of F, b and g gᵀ, for one compilation."""
    a, b = declaration.affine
    if declaration.coupled:
        return (*a, *b, *declaration.gram)
    return a, b, declaration.g**2


def _outputs(moments: Moments, middle: dict[sp.Symbol, float]) -> tuple[sp.Expr, ...]:
    """What a kernel's closed form computes: alpha, offset, sigma, log alpha."""
    return moments.alpha, moments.offset, square_root(moments.var, middle), moments.log_alpha


def _within(t: Tensor, low: float, high: float) -> bool:
    """Whether all of ``t`` lies in [low, high]; reads the device once."""
    if t.ndim == 0:
        return low <= float(t) <= high
    first, last = torch.aminmax(t)
    return float(first) >= low and float(last) <= high


def broadcast_to_event(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (batch,) shaped to multiply x (batch, *event), in the dtype of x."""
    coefficient = coefficient.to(x.dtype)
    return coefficient if coefficient.ndim == 0 else coefficient.reshape(-1, *(1,) * (x.ndim - 1))
