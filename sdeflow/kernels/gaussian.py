r"""The Gaussian perturbation kernel p(x_t | x_0) = N(alpha x_0 + offset, sigma sigmaᵀ) of an affine SDE, as numbers.

A :class:`Kernel` is a declaration with values for its parameters, compiled. Its symbolic side
(``alpha``, ``std``, ``log_snr``, ...) and its numbers (:mod:`sdeflow.kernels.coefficients`) come from one derivation.

Elementwise, alpha and sigma are numbers, or one per coordinate where a parameter is a tensor. For a
coupled state alpha is the matrix Φ(t) and sigma the lower Cholesky factor of the covariance. With an
orthogonal ``basis`` all of this holds for the coefficients of the state in that basis.

Kernel (from x_0) and marginal (over all x_0) are not the same; the marginal of Gaussian data is
:meth:`Kernel.marginal`. All coefficients are float64 and functions of t alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DataError, DeclarationError, ScheduleError
from sdeflow.kernels.coefficients import Coefficients
from sdeflow.laws.gaussian import Gaussian
from sdeflow.numerics.basis import Basis
from sdeflow.numerics.checks import (
    checked_finite,
    checked_flag,
    checked_noise,
    checked_numbers,
    checked_point,
    checked_range,
    checked_start,
    checked_time,
)
from sdeflow.numerics.linear import Blocks, Diagonal, Linear, maps_of, per_sample
from sdeflow.numerics.noise import NoiseStream, kernel_noise
from sdeflow.numerics.parameters import Values
from sdeflow.symbolic.coupled import derive_coupled, information, symbolic_cholesky
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.display import integrate_within
from sdeflow.symbolic.exact import numbers_at
from sdeflow.symbolic.moments import Moments, completed, derive_moments, integral_moments, square_root
from sdeflow.symbolic.symbols import data_symbols
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["FORGOTTEN", "Kernel", "Path", "broadcast_to_event", "inside_ends", "require_density"]

_NEXT, _LEAST = 4.0, 1e-300  # distance of a draw from an end at 0, in its dtype's least normal numbers; at least

FORGOTTEN = -math.log(1e12)
"""The half-log-SNR below which x_0 is forgotten, as far as solvers can tell."""
_FRESH = 1e-4  # of the variance at t, the share that must have come since s for a difference to keep its digits
_DEFINED = "the kernel is defined for t in [0, T]"


class Path(NamedTuple):
    """x_t = alpha x_0 + offset + sigma eps at given times, ready for a state (batch, *event)."""

    alpha: Linear
    sigma: Linear
    offset: Tensor


class Kernel:
    """The compiled perturbation kernel of an affine declaration.

    ``alpha``, ``offset``, ``mean``, ``var``, ``std`` and ``log_snr`` are SymPy expressions, to be read and not to be
    called. Their numbers at times ts are ``alpha, sigma, offset = kernel.coefficients(ts)``,
    ``mean, std = kernel.moments(x_0, ts)`` and ``2 * kernel.half_log_snr(ts)``.

    Args:
        declaration: an affine :class:`~sdeflow.symbolic.declaration.Declaration`.
        values: numbers and tensors of its parameters.
        basis: an orthogonal transform of the event in which the declaration holds, coordinate by coordinate.
        like: a kernel of the same declaration, whose derivation is shared.

    Attributes:
        T: the horizon.
        numbers: the coefficients as functions of t, a :class:`~sdeflow.kernels.coefficients.Coefficients`, for inner
            loops: its times are not checked.
        has_offset: whether the mean has a part that does not depend on x_0.
        kind: "affine"; see :mod:`sdeflow.kernels.kinds`.

    Raises:
        NotAffineError: where there is no Gaussian kernel.
        ScheduleError: for coefficients that are singular, complex or explosive on the horizon.
    """

    kind = "affine"
    exact = True

    def __init__(
        self,
        declaration: Declaration,
        values: Mapping[sp.Symbol, float | Tensor] | None = None,
        basis: Basis | None = None,
        like: Kernel | None = None,
    ) -> None:
        self.declaration = declaration
        self.values = Values.of(values)
        self.basis = basis
        self.T = declaration.T
        self.coupled = declaration.coupled
        self.maps = maps_of(self.coupled)
        self.components = len(declaration.state)
        if self.coupled and self.values.shape:
            raise DeclarationError("the parameters of a coupled state must be numbers or tensors of one element.")
        self._drift = declaration.require_affine("The perturbation kernel")
        self.has_offset = any(entry != 0 for entry in self._drift[1]) if self.coupled else self._drift[1] != 0
        if like is not None and not self.coupled:
            self._derived = like._derived
        self.clocks: dict[tuple[object, ...], Any] = {}  # kept for solvers, which know what they are
        # Closed forms of a coupled state are for display alone, and wait until they are asked for.
        self.numbers = Coefficients(declaration, self.values, None if self.coupled else self._derived)

    @property
    def gaussian(self) -> Kernel:
        """This kernel; None of one that is not Gaussian."""
        return self

    def require_gaussian(self, purpose: str) -> Kernel:
        """This kernel; of one that is not Gaussian, a :class:`~sdeflow.errors.NotAffineError` about ``purpose``."""
        return self

    @property
    def cutoff(self) -> float:
        """The first time that training and solvers visit."""
        return self.numbers.cutoff

    @property
    def score_from(self) -> float:
        """The first time at which a score is asked for: the cutoff."""
        return self.numbers.cutoff

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and offset at times t of any shape in [0, T], (*t.shape, *parameters) each, float64.

        For a coupled state Φ, the Cholesky factor of the covariance (*t.shape, k, k), and the offset (*t.shape, k).

        Raises:
            ScheduleError: for a time outside [0, T]; on an accelerator the result is NaN there.
        """
        return self.numbers.of_kernel(self._times(t))

    def sde_coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and g² of dx = (a x + b) dt + g dw at times t of any shape in [0, T], float64.

        Shapes and errors are as of :meth:`coefficients`; for a coupled state F, b and g gᵀ.
        """
        return self.numbers.of_sde(self._times(t))

    def half_log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha / sigma) at times t of any shape in [0, T], shaped as t, float64.

        The mean where it differs between coordinates; half the log of the Fisher information of a coupled state's data.
        """
        return self.numbers.half_log_snr(self._times(t))

    def half_log_snr_rate(self, t: Tensor | float) -> Tensor:
        """d/dt of :meth:`half_log_snr`, elementwise -g² / (2 sigma²); never positive. Shaped as t."""
        return self.numbers.half_log_snr_rate(self._times(t))

    def bounded_log_snr(self, t: Tensor | float) -> Tensor:
        """:meth:`half_log_snr` for solvers: not below ``FORGOTTEN``, except where it is a mean over coordinates.

        Over a long horizon it falls by thousands, long after x_0 is forgotten, and alpha leaves the range of float64.
        """
        return self._bounded(self.half_log_snr(t))

    def bounded_log_snr_and_rate(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """:meth:`bounded_log_snr` and its rate, which is 0 where it rests on its bound, from one evaluation."""
        level, rate = self.numbers.half_log_snr_and_rate(self._times(t))
        bounded = self._bounded(level)
        return bounded, rate.masked_fill(level < bounded, 0.0)

    def _bounded(self, level: Tensor) -> Tensor:
        return level if self.coupled or self.values.shape else level.clamp_min(FORGOTTEN)

    def time_of(self, half_log_snr: Tensor | float) -> Tensor:
        """The time in [cutoff, T] at which :meth:`half_log_snr` takes the given value, float64.

        Values outside the range give its ends. Where g = 0 on an interval, the log-SNR is flat there and any of its
        times may come back.
        """
        level = checked_numbers(half_log_snr, "half_log_snr")
        if level.device.type == "cpu" and bool(level.isnan().any()):
            raise DataError("half_log_snr must not be NaN.")
        return self.numbers.time_of(level)

    def _times(self, t: Tensor | float) -> Tensor:
        return checked_range(checked_numbers(t, "t"), 0.0, self.T, _DEFINED)

    @cached_property
    def log_snr_falls(self) -> bool:
        """Whether half_log_snr falls at all times, as it does wherever there is noise."""
        times = self.numbers.probes
        with torch.no_grad():
            return bool((self.half_log_snr_rate(times) < 0).all())

    def with_values(self, values: Values) -> Kernel:
        """The same kernel with other values of the parameters; nothing is derived anew."""
        return Kernel(self.declaration, values, self.basis, like=self)

    def with_cutoff(self, declaration: Declaration) -> Kernel:
        """The same kernel for the same declaration with another cutoff; nothing is computed anew."""
        other = object.__new__(Kernel)
        other.__dict__.update(vars(self))
        other.declaration, other.numbers, other.clocks = declaration, self.numbers.with_cutoff(declaration), {}
        vars(other).pop("log_snr_falls", None)
        return other

    # ---------------------------------------------------------------- symbolic side

    @cached_property
    def _derived(self) -> Moments:
        """The moments of an elementwise SDE, in closed form where rules give it, and as functions A(t), m(t), v(t)."""
        if self.declaration.path is not None:
            alpha, sigma = self.declaration.path
            rules = ("alpha: declared", "offset: none", "variance: declared")
            return Moments(sp.log(alpha), alpha, sp.Integer(0), sigma**2, rules)
        return derive_moments(self._drift, self.declaration.g, self.declaration.P0, self.T, self.values.numbers, False)

    @cached_property
    def shown(self) -> Moments:
        """The moments for display: SymPy's integrals where it finds them in 2 s and they agree with quadrature."""
        if self.coupled:
            return self._coupled_moments
        if self.numbers.closed is not None:
            return self._derived
        if self._derived.closed and self._is_true(self._derived):
            return self._derived  # true, but not computed as it stands: digits would cancel
        given = self._drift, self.declaration.g, self.declaration.P0
        unsolved = integral_moments(*given) if self._derived.closed else completed(self._derived, *given)
        integrated = integrate_within(unsolved)
        if integrated is None:
            return unsolved
        try:
            points = np.linspace(max(self.cutoff, 1e-3 * self.T), self.T, 16)
            agrees = self.numbers.agrees(self.numbers.compile_closed(integrated), points, 1e-10)
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
        closed = self._coupled_moments.closed if self.coupled else self.numbers.closed is not None
        return "closed" if closed else "quadrature"

    def _is_true(self, moments: Moments) -> bool:
        """Whether formulas give the quadrature's numbers when they are evaluated in 40 digits."""
        for fraction in (0.05, 0.4, 1.0):
            at = {**self.values.numbers, time_symbol: sp.Float(fraction * self.T, 40)}
            t = torch.tensor(fraction * self.T, dtype=torch.float64)
            if self.coupled:
                phi, root, offset = self.numbers.table(t)
                pairs = ((moments.alpha, phi), (moments.var, root @ root.mT), (moments.offset, offset))
            elif self.values.shape:
                return True  # one number stands for many: the formula is an identity in the parameters or nothing
            else:
                log_alpha, var, offset = self.numbers.table(t)
                pairs = ((moments.log_alpha, log_alpha), (moments.var, var), (moments.offset, offset))
            for expression, truth in pairs:
                ours = list(expression) if isinstance(expression, sp.MatrixBase) else [expression]
                scale = float(truth.abs().max())
                for number, expected in zip(numbers_at(ours, at), truth.reshape(-1).tolist(), strict=True):
                    if not number.is_finite or abs(number - expected) > 1e-9 * (abs(expected) + 1e-6 * (1 + scale)):
                        return False
        return True

    @property
    def alpha(self) -> sp.Expr:
        """alpha(t): the mean is alpha x_0 + offset. The matrix Φ(t) of a coupled state."""
        return self.shown.alpha

    @property
    def offset(self) -> sp.Expr:
        """The part of the mean that does not depend on x_0."""
        return self.shown.offset

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
        return self.shown.var

    @property
    def std(self) -> sp.Expr:
        """sigma(t), the lower Cholesky factor of a coupled state's covariance."""
        if self.coupled:
            return symbolic_cholesky(self.var)
        return square_root(self.var, {**self.values.numbers, time_symbol: self.T / 2})

    @property
    def log_snr(self) -> sp.Expr:
        """log(alpha² / sigma²) in SymPy; log of the Fisher information of x_0 for a coupled state.

        At times ts it is 2 :meth:`half_log_snr` (ts).
        """
        if self.coupled:
            return sp.log(information(self.alpha, self.var, self.numbers.data[0]))
        return 2 * self.shown.log_alpha - sp.log(self.var)

    @property
    def rules(self) -> tuple[str, ...]:
        """The rule behind each moment: of alpha, offset and variance."""
        return self.shown.rules

    def __repr__(self) -> str:
        names = [symbol.name for symbol in self.declaration.state]
        given = f"{names[0]}_t | {names[0]}_0" if len(names) == 1 else f"{', '.join(names)} | {names[0]}_0, ..."
        mean, var = (v.tolist() if isinstance(v, sp.MatrixBase) else v for v in (self.mean, self.var))
        return f"Kernel(p({given}) = N({mean}, {var}), form={self.form!r})"

    def _repr_latex_(self) -> str:
        mean, var = sp.latex(self.mean), sp.latex(self.var)
        state = ", ".join(symbol.name for symbol in self.declaration.state)
        return rf"$\displaystyle p({state}_t \mid {state}_0) = \mathcal{{N}}\left({mean},\; {var}\right)$"

    def __reduce__(self) -> tuple[object, ...]:
        return Kernel, (self.declaration, self.values, self.basis)

    def __deepcopy__(self, memo: dict[int, object]) -> Kernel:
        """Copies of a score share its kernel, unless they bring their own learned parameters."""
        values = copy.deepcopy(self.values, memo)
        return self if values is self.values else self.with_values(values)

    # ---------------------------------------------------------------- coefficients of t

    def path(self, x: Tensor, t: Tensor) -> Path:
        """alpha, sigma and offset as maps of states like ``x`` (batch, *event), for t () or (batch,)."""
        alpha, sigma, offset = self.numbers.of_kernel(t if t.device == x.device else t.to(x.device))
        return self._shaped(alpha, sigma, offset, x, t.ndim > 0)

    def transition(self, x: Tensor, s: float, t: float, exactly: bool = False) -> Path:
        """x_t = alpha x_s + offset + sigma eps given x_s, as maps of states like ``x``, for s <= t.

        alpha = Φ_t Φ_s⁻¹ and sigma sigmaᵀ = P_t - alpha P_s alphaᵀ, elementwise sigma_t² (1 - SNR_t / SNR_s); where
        these are nearly equal, and for a coupled state, by quadrature from s on. From s = 0 it is the kernel
        itself, P0 included, unless x_0 is known ``exactly``.

        Raises:
            ScheduleError: for times that do not lie in order in [0, T].
        """
        if not 0.0 <= s <= t <= self.T * (1.0 + 1e-6):
            raise ScheduleError(
                f"a transition runs from s to t with 0 <= s <= t <= T = {self.T:g}, not from {s} to {t}."
            )
        if s == 0.0 and not (checked_flag(exactly, "exactly") and any(self.declaration.initial_variances)):
            return self.path(x, torch.as_tensor(t, dtype=torch.float64))
        if self.coupled:
            return self._coupled_transition(x, s, t)
        times = [torch.tensor(time, dtype=torch.float64) for time in (t, s)]  # on the CPU, as the numbers are read
        (_, later, offset), (_, earlier, before) = (self.numbers.of_kernel(time) for time in times)
        change = self.numbers.log_alpha(times[0]) - self.numbers.log_alpha(times[1])
        fresh = -torch.expm1(2.0 * (change + earlier.log() - later.log()))
        if s < t and not bool((fresh >= _FRESH).all()):  # a difference of nearly equal numbers
            log_alpha, var, offset = self.numbers.from_point(s, t)
            alpha, sigma = torch.exp(log_alpha), var.clamp_min(0.0).sqrt()
        else:
            alpha = torch.exp(change)  # alpha_t and alpha_s may both have underflowed
            sigma = later * fresh.nan_to_num(0.0).clamp_min(0.0).sqrt()
            offset = offset - alpha * before
        return Path(Diagonal(alpha.to(x.device)), Diagonal(sigma.to(x.device)), offset.to(x.device))

    def advance(self, x: Tensor, s: float, t: float, noise: NoiseStream) -> Tensor:
        """A draw of x_t given that the state at s is exactly ``x``, shaped and typed as x (batch, *event)."""
        state = self._state(x).to(torch.float64)
        path = self.transition(state, s, t, exactly=True)
        mean = path.alpha(self.to_basis(state)) + path.offset
        eps = noise.normal(tuple(x.shape), torch.float64, x.device)
        return self.from_basis(mean + path.sigma(eps)).to(x.dtype)

    def _coupled_transition(self, x: Tensor, s: float, t: float) -> Path:
        """The moments integrated from s on: the inverse of Φ_s may have lost all digits."""
        if s == t:
            k = self.components
            zero = torch.zeros(k, k, dtype=torch.float64)
            return Path(Blocks(torch.eye(k, dtype=torch.float64)), Blocks(zero), zero[0])
        with torch.no_grad():
            alpha, sigma, offset = self.numbers.from_point(s, t)
        return self._shaped(alpha, sigma, offset, x, False)

    def equation(self, x: Tensor, t: Tensor) -> tuple[Linear, Tensor, Linear]:
        """a, b and g gᵀ of the SDE as maps of states like ``x``."""
        a, b, q = self.numbers.of_sde(t if t.device == x.device else t.to(x.device))
        maps, batched = self.maps, t.ndim > 0
        return maps.shaped(a, x, batched), maps.offset(b, x, batched), maps.shaped(q, x, batched)

    def scale(self, std: Tensor, x: Tensor) -> Linear:
        """The map that multiplies states like ``x`` by the data's standard deviation, a number or (*event)."""
        std = std.to(device=x.device, dtype=torch.float64)
        return self.maps.scaling(self.of_state(std) if self.coupled and not std.ndim else std, x)

    def data_level(self, mean: Tensor, x: Tensor) -> Tensor | None:
        """The data's mean in the basis, shaped to be subtracted from states like ``x``; None where it is 0."""
        if not mean.ndim and not float(mean):
            return None
        mean = mean.to(device=x.device, dtype=x.dtype)
        mean = self.of_state(mean) if self.coupled and not mean.ndim else mean
        if self.coupled and mean.ndim < x.ndim - 1:
            mean = mean.reshape(*mean.shape, *(1,) * (x.ndim - 1 - mean.ndim))
        try:
            level = mean.expand(x.shape[1:])[None]
        except RuntimeError as error:
            sides = ", ".join(map(str, x.shape[1:]))
            raise DataError(f"data_mean is of shape {tuple(mean.shape)}, the state of (batch, {sides}).") from error
        return self.to_basis(level)

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
        x_0, path = self._at(x_0, t)
        mean = self.from_basis(self._mean(path, self.to_basis(x_0)))
        if not self.coupled:
            return mean, path.sigma.values.to(x_0.dtype)
        covariance = path.sigma.gram.values.to(x_0.dtype)
        if covariance.ndim == 2:
            covariance = covariance.reshape(1, *(1,) * (x_0.ndim - 2), *covariance.shape)
        return mean, covariance.movedim((-2, -1), (1, 2))

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
        x_0, path = self._at(x_0, t)
        noise = kernel_noise(x_0, seed) if noise is None else checked_noise(noise, x_0)
        mean = self._mean(path, self.to_basis(x_0))
        if self.coupled or self.basis is not None:
            return self.from_basis(mean + path.sigma(self.to_basis(noise)))
        return mean.addcmul_(path.sigma.values.to(x_0.dtype), noise)

    def log_prob(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """log p(x_t | x_0) in nats, (batch,) in float64; joint for a coupled state.

        Args:
            x_t: (batch, *event).
            x_0: of the same shape, or one for all samples: (1, *event) or a number.
            t: a number or (batch,), in [0, T].
        """
        x_t, path, whitened = self._whitened(x_t, x_0, t)
        event = tuple(x_t.shape[1:])
        log_det, d = path.sigma.log_det(event), math.prod(event)
        return -0.5 * whitened.square().reshape(len(x_t), d).sum(1) - log_det - 0.5 * d * math.log(2.0 * math.pi)

    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p(x_t | x_0) = -sigma⁻ᵀ sigma⁻¹ (x_t - mean), shaped as x_t; arguments as :meth:`log_prob`."""
        x_t, path, whitened = self._whitened(x_t, x_0, t)
        return self.from_basis(-path.sigma.T.inverse(whitened)).to(x_t.dtype)

    def marginal(self, mean: Tensor | float, std: Tensor | float, t: Tensor | float) -> Gaussian:
        """p(x_t) for Gaussian data: N(alpha mean + offset, alpha diag(std²) alphaᵀ + sigma sigmaᵀ).

        ``mean`` and ``std`` are of the data, numbers or (*event); for a coupled state numbers are of its data
        components, and the others start at zero.
        """
        mean, std = (
            checked_finite(checked_numbers(m, name).detach().cpu(), name) for m, name in ((mean, "mean"), (std, "std"))
        )
        if not bool((std >= 0).all()):
            raise DataError(f"std must not be negative, and is {float(std.min()):g}.")
        t = checked_time(t, None, 0.0, self.T, _DEFINED)
        if self.coupled:
            mean, std = (self.of_state(m) for m in (mean, std))
            sides = max(mean.ndim, std.ndim)
            mean, std = (m.reshape(*m.shape, *(1,) * (sides - m.ndim)) for m in (mean, std))
        event = tuple(torch.broadcast_shapes(mean.shape, std.shape, self.values.shape))
        centre = mean.expand(event)[None]
        with torch.no_grad():
            path = self.path(centre, t.cpu())
            if self.basis is not None and mean.ndim:
                centre = self.to_basis(centre)
            elif self.basis is not None and float(mean) != 0:
                raise DataError("in a basis the data's mean must be a whole event (*event), or 0.")
            level = path.alpha(centre) + path.offset
            spread = path.sigma.inverse @ path.alpha @ self.scale(std, centre)
            root = path.sigma @ spread.root_of_one_plus_gram
        return Gaussian(level[0], root, self.basis)

    def left_of(self, std: Tensor, event: tuple[int, ...], t: float) -> float:
        """The largest entry of sigma⁻¹ alpha c at t: how much of data of standard deviation ``std`` the noise leaves.

        The law of x_t then is that of :meth:`marginal`, whatever the data, to half of its square in nats per dimension.
        """
        like = torch.empty((1, *event), dtype=torch.float64)
        with torch.no_grad():
            path = self.path(like, torch.tensor(t, dtype=torch.float64))
            left = path.sigma.inverse @ path.alpha @ self.scale(std.cpu(), like)
        return float(left.values.abs().max())

    def to_basis(self, x: Tensor) -> Tensor:
        """The coefficients of a state in the kernel's basis."""
        return x if self.basis is None else self.basis.forward(x)

    def from_basis(self, x: Tensor) -> Tensor:
        """The state with these coefficients."""
        return x if self.basis is None else self.basis.inverse(x)

    def lift(self, data: Tensor, seed: int | torch.Generator | None = None, noisy: bool = True) -> Tensor:
        """States (batch, k, *event) from data (batch, *event), the auxiliary components drawn from P0 (or zero)."""
        checked_flag(noisy, "noisy")
        data = checked_point(data, "data", 2)
        if not self.coupled or not self.declaration.auxiliary:
            return data
        if len(self.numbers.data) != 1:
            raise DataError("lift needs a state with one data component; give states (batch, k, *event) instead.")
        state = data.new_zeros(len(data), self.components, *data.shape[1:])
        if noisy:
            noise = NoiseStream(seed, "lift").normal(tuple(state.shape), data.dtype, data.device)
            state = self._initial_root().to(data.device)(noise)
        state[:, self.numbers.data[0]] += data
        return state

    def require_times(self, t: Tensor) -> None:
        """Raises a ScheduleError for times outside [cutoff, T]; times on an accelerator are not read."""
        checked_time(t, t.numel(), self.cutoff, self.T, "the score is defined for t in [cutoff, T]")

    def times_for(self, x: Tensor, t: Tensor | float) -> Tensor:
        """t as float64, () or (batch,), within [0, T]."""
        return checked_time(t, len(x) if x.ndim else None, 0.0, self.T, _DEFINED).to(x.device)

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

    def _state(self, x: Tensor, name: str = "x_0") -> Tensor:
        x = checked_point(x, name)
        if self.coupled or self.values.shape:
            self.require_event(tuple(x.shape[1:]))
        return x

    def _at(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Path]:
        """x_0 checked, and the path at t for it."""
        x_0 = self._state(x_0)
        return x_0, self.path(x_0, self.times_for(x_0, t))

    def _mean(self, path: Path, x_0: Tensor) -> Tensor:
        mean = path.alpha(x_0)
        return mean + path.offset.to(x_0.dtype) if self.has_offset else mean

    def _whitened(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Path, Tensor]:
        """x_t checked, the path, and sigma⁻¹ (x_t - mean) in float64."""
        x_t = self._state(x_t, "x_t")
        x_0, path = checked_start(x_0, x_t), self.path(x_t, self.times_for(x_t, t))
        self._require_noise(path.sigma)
        deviation = self.to_basis(x_t.to(torch.float64)) - self._mean(path, self.to_basis(x_0.to(torch.float64)))
        return x_t, path, path.sigma.inverse(deviation)

    def _shaped(self, alpha: Tensor, sigma: Tensor, offset: Tensor, x: Tensor, batched: bool) -> Path:
        """Coefficients at a time, or at one for each sample, as maps of states like ``x``."""
        maps = self.maps
        return Path(maps.shaped(alpha, x, batched), maps.shaped(sigma, x, batched), maps.offset(offset, x, batched))

    def of_state(self, moment: Tensor) -> Tensor:
        """A moment of the data, a number or (*event), as one of a coupled state, (k, ...): 0 for auxiliary components.

        A moment that has a component dimension, the first of several, is returned as it is; so is any moment with
        dimensions where all components are data.
        """
        if moment.ndim and (not self.declaration.auxiliary or (moment.ndim > 1 and len(moment) == self.components)):
            return moment
        return torch.stack([moment * (i in self.numbers.data) for i in range(self.components)])

    def _require_noise(self, sigma: Linear) -> None:
        values = sigma.diagonal
        if values.device.type == "cpu":
            require_density(values)

    def _initial_root(self) -> Blocks:
        return Blocks(torch.tensor(self.declaration.initial_covariance, dtype=torch.float64)).symmetric_root


def broadcast_to_event(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (batch,) shaped to multiply x (batch, *event), in the dtype of x."""
    coefficient = coefficient.to(x.dtype)
    return coefficient if coefficient.ndim == 0 else per_sample(coefficient, x)


def require_density(spread: Tensor) -> None:
    """Raises a ScheduleError where a standard deviation or a variance is 0; it is read, wherever it lies."""
    if not bool((spread > 0).all()):
        raise ScheduleError("sigma = 0 at t = 0: the kernel is a point there, without a density or a score.")


def inside_ends(x: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` kept within the numbers of ``dtype`` that lie between the ends, none of them an end."""
    limits = torch.finfo(dtype)
    least = max(_NEXT * limits.tiny, _LEAST)
    step = [torch.clamp_min(limits.eps * end.detach().abs(), least) for end in (low, high)]
    low = torch.where(torch.isfinite(low), low.detach() + step[0], low.detach())
    high = torch.where(torch.isfinite(high), high.detach() - step[1], high.detach())
    inner = torch.maximum(torch.minimum(x.detach(), high), low)
    return torch.where(inner == x.detach(), x, inner)
