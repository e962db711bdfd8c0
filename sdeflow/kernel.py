r"""The perturbation kernel p(x_t | x_0) = N(alpha x_0 + offset, sigma^2) of an affine SDE, as numbers.

A :class:`Kernel` is a declaration with values for its parameters, compiled. Its symbolic side
(``alpha``, ``std``, ``log_snr``, ...) and its numbers come from one derivation; where a closed form was
found, its compiled numbers have been compared with quadrature on the whole horizon (1e-11 relative).

Kernel (from x_0) and marginal (over all x_0) are not the same; the marginal of Gaussian data is
:meth:`Kernel.marginal`. All coefficients are float64 and functions of t alone.

The log-SNR is log(alpha^2 / sigma^2); half of it, log(alpha / sigma), is called half_log_snr.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from sdeflow.compile import Compiled, compile_expressions
from sdeflow.errors import DataError, DeclarationError, ScheduleError
from sdeflow.gaussian import Gaussian, normal_log_density
from sdeflow.noise import NoiseStream
from sdeflow.quadrature import integrate_moments
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.display import integrate_within
from sdeflow.symbolic.moments import Moments, derive_moments, integral_moments, square_root
from sdeflow.symbolic.symbols import t as time_symbol
from sdeflow.symbolic.symbols import x_0 as data_symbol

__all__ = ["Kernel", "broadcast_to_event"]

_CUTOFF_NOISE = 2e-3  # sigma / alpha at the default cutoff
_AGREEMENT = 1e-11  # of closed forms with quadrature, relative
_SMALLEST_STD = float(torch.finfo(torch.float32).tiny)


class Kernel:
    """The compiled perturbation kernel of an affine declaration.

    Args:
        declaration: an affine :class:`~sdeflow.symbolic.declaration.Declaration`.
        values: numbers of its parameters.

    Attributes:
        form: "closed" where rules gave every moment and their numbers agree with quadrature, else "quadrature".
        T: the horizon.
        cutoff: the first time that training and solvers visit.

    Raises:
        NotAffineError: where there is no Gaussian kernel.
        ScheduleError: for coefficients that are singular, complex or explosive on the horizon.
    """

    def __init__(self, declaration: Declaration, values: Mapping[sp.Symbol, float] | None = None) -> None:
        self.declaration = declaration
        self.values = dict(values or {})
        self.T = declaration.T
        self._drift = declaration.require_affine("The perturbation kernel")
        a, b = self._drift
        self._require_end_is_regular()
        self._coefficients = compile_expressions((a, b, declaration.g**2), (time_symbol,), self.values, horizon=self.T)
        self._require_noise_somewhere()
        self._table = integrate_moments(self._finite_coefficients, self.T, declaration.P0)
        self._derived = derive_moments(self._drift, declaration.g, declaration.P0, self.T, self.values)
        self._times, self._half_log_snrs = self._monotone_samples()
        self.cutoff = self._find_cutoff() if declaration.cutoff is None else declaration.cutoff
        self._require_usable_cutoff()
        self._closed = self._compile_closed_form()
        self.form = "quadrature" if self._closed is None else "closed"

    # ---------------------------------------------------------------- symbolic side

    @cached_property
    def _shown(self) -> Moments:
        """The moments for display: SymPy's integrals where it finds them in 2 s and they agree with quadrature."""
        if self._closed is not None:
            return self._derived
        if self._derived.closed and self._is_true(self._derived):
            return self._derived  # true, but not computed as it stands: digits would cancel
        unsolved = self._derived
        if self._derived.closed:
            unsolved = integral_moments(self._drift, self.declaration.g**2, sp.Float(self.declaration.P0))
        integrated = integrate_within(unsolved)
        if integrated is None:
            return unsolved
        try:
            compiled = compile_expressions(_outputs(integrated, self._middle), (time_symbol,), self.values, self.T)
            agrees = self._agrees(compiled, np.linspace(max(self.cutoff, 1e-3 * self.T), self.T, 16), 1e-10)
        except Exception:  # a form that cannot be computed is not shown
            agrees = False
        return integrated if agrees else unsolved

    def _is_true(self, moments: Moments) -> bool:
        """Whether formulas give the quadrature's numbers when they are evaluated in 40 digits."""
        for fraction in (0.05, 0.4, 1.0):
            at = {**self.values, time_symbol: sp.Float(fraction * self.T, 40)}
            ours = [e.subs(at).evalf(40) for e in (moments.log_alpha, moments.var, moments.offset)]
            truth = self._table(torch.tensor(fraction * self.T, dtype=torch.float64)).tolist()
            for value, expected in zip(ours, truth, strict=True):
                if not value.is_finite or abs(value - expected) > 1e-9 * (abs(expected) + 1e-6):
                    return False
        return True

    @property
    def alpha(self) -> sp.Expr:
        """alpha(t), the factor of x_0."""
        return self._shown.alpha

    @property
    def offset(self) -> sp.Expr:
        """The mean of x_t for x_0 = 0."""
        return self._shown.offset

    @property
    def mean(self) -> sp.Expr:
        """alpha(t) x_0 + offset(t)."""
        return self.alpha * data_symbol + self.offset

    @property
    def var(self) -> sp.Expr:
        """sigma(t)^2."""
        return self._shown.var

    @property
    def std(self) -> sp.Expr:
        """sigma(t)."""
        return square_root(self.var, self._middle)

    @property
    def log_snr(self) -> sp.Expr:
        """log(alpha^2 / sigma^2)."""
        return 2 * self._shown.log_alpha - sp.log(self.var)

    @property
    def _middle(self) -> dict[sp.Symbol, float]:
        return {**self.values, time_symbol: self.T / 2}

    def __repr__(self) -> str:
        return f"Kernel(p(x_t | x_0) = N({self.mean}, {self.var}), form={self.form!r})"

    def _repr_latex_(self) -> str:
        mean, var = sp.latex(self.mean), sp.latex(self.var)
        return rf"$\displaystyle p(x_t \mid x_0) = \mathcal{{N}}\left({mean},\; {var}\right)$"

    def __reduce__(self) -> tuple:
        return Kernel, (self.declaration, self.values)

    def __deepcopy__(self, memo: dict) -> Kernel:
        return self  # immutable: copies of a score share it

    # ---------------------------------------------------------------- coefficients of t

    def sde_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a(t), b(t) and g(t)^2 of dx = (a x + b) dt + g dw, each shaped as t, float64."""
        return self._coefficients(t.to(torch.float64))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and offset at t, each shaped as t, float64."""
        t = t.to(torch.float64)
        if self._closed is not None:
            alpha, offset, std, _ = self._closed(t)
        else:
            log_alpha, var, offset = self._table(t)
            alpha, std = torch.exp(log_alpha), torch.sqrt(var)
        return alpha, std, offset

    def half_log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha / sigma) at t, shaped as t, float64."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if self._closed is not None:
            _, _, std, log_alpha = self._closed(t)
            return log_alpha - torch.log(std)
        log_alpha, var, _ = self._table(t)
        return log_alpha - 0.5 * torch.log(var)

    def half_log_snr_rate(self, t: Tensor) -> Tensor:
        """d/dt log(alpha / sigma) = -g^2 / (2 sigma^2), never positive."""
        _, std, _ = self.coefficients(t)
        return -0.5 * self.sde_coefficients(t)[2] / std.square()

    def time_of(self, half_log_snr: Tensor | float) -> Tensor:
        """The time at which log(alpha / sigma) takes the given value, in [cutoff, T], float64.

        By bracketed Newton steps to rounding. Values outside the range give its ends. Where g = 0 on an
        interval, the log-SNR is flat there and any of its times may come back.
        """
        target = torch.as_tensor(half_log_snr, dtype=torch.float64)
        times, falling = (table.to(target.device) for table in (self._times, -self._half_log_snrs))
        upper = torch.searchsorted(falling, -target.contiguous()).clamp(1, len(times) - 1)
        low, high = times[upper - 1], times[upper]
        t = low + (high - low) * ((-target - falling[upper - 1]) / (falling[upper] - falling[upper - 1])).clamp(0, 1)
        for _ in range(4):
            excess = self.half_log_snr(t) - target
            low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
            step = t - excess / self.half_log_snr_rate(t)
            t = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
        return t.clamp(self.cutoff, self.T)

    # ---------------------------------------------------------------- the kernel as a distribution

    def moments(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t given x_0.

        Args:
            x_0: (batch, *event).
            t: a number or (batch,), in [0, T].

        Returns:
            mean (batch, *event) and std, which broadcasts to it, in the dtype of x_0.
        """
        alpha, std, offset = self.coefficients(self.times_for(x_0, t))
        mean = broadcast_to_event(alpha, x_0) * x_0
        if self._drift[1] != 0:
            mean = mean + broadcast_to_event(offset, x_0)
        return mean, broadcast_to_event(std, x_0)

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
        mean, std = self.moments(x_0, t)
        if noise is None and seed is None:
            noise = torch.randn_like(x_0)
        elif noise is None:
            noise = NoiseStream(seed, "kernel").normal(tuple(x_0.shape), x_0.dtype, x_0.device)
        return mean.addcmul_(std, noise)

    def log_prob(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """log p(x_t | x_0) in nats, (batch,) in float64."""
        mean, std = self.moments(x_0.to(torch.float64), t)
        self._require_noise(std)
        return normal_log_density(x_t, mean, std)

    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p(x_t | x_0) = -(x_t - mean) / sigma^2, shaped as x_t."""
        mean, std = self.moments(x_0, t)
        self._require_noise(std)
        return (mean - x_t) / std.square()

    def marginal(self, mean: Tensor | float, std: Tensor | float, t: Tensor | float) -> Gaussian:
        """p(x_t) for Gaussian data: N(alpha mean + offset, alpha^2 std^2 + sigma^2)."""
        alpha, sigma, offset = self.coefficients(torch.as_tensor(t, dtype=torch.float64))
        mean, std = (torch.as_tensor(m, dtype=torch.float64).cpu() for m in (mean, std))
        return Gaussian(alpha * mean + offset, torch.sqrt((alpha * std).square() + sigma.square()))

    def require_times(self, t: Tensor) -> None:
        """Raises a ScheduleError for times outside [cutoff, T]; times on an accelerator are trusted, for speed."""
        if t.device.type != "cpu" or not t.numel():
            return
        if not _within(t, self.cutoff * (1 - 1e-6), self.T * (1 + 1e-6)):
            low, high = float(t.min()), float(t.max())
            raise ScheduleError(
                f"the score is defined for t in [cutoff, T] = [{self.cutoff:.6g}, {self.T:g}] "
                f"(sigma is {'0' if self.declaration.P0 == 0 else 'sqrt(P0)'} at t = 0); asked for "
                f"{low:.6g}{'' if low == high else f' to {high:.6g}'}."
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

    @staticmethod
    def _require_noise(std: Tensor) -> None:
        if std.device.type == "cpu" and not bool((std > 0).all()):
            raise ScheduleError("sigma = 0 at t = 0: the kernel is a point there, without a density or a score.")

    # ---------------------------------------------------------------- building

    def _finite_coefficients(self, points: np.ndarray) -> np.ndarray:
        """(a, b, g^2) at points, or a ScheduleError with the first bad time and the exact value there."""
        values = torch.stack(self._coefficients(torch.as_tensor(points))).numpy()
        bad = ~np.isfinite(values).all(0) | (values[2] < 0)
        if bad.any():
            at = float(points[bad].min())
            exact = {
                name: e.subs({**self.values, time_symbol: sp.Float(at)}).evalf(6)
                for name, e in (("f", self.declaration.f), ("g", self.declaration.g))
            }
            shown = ", ".join(f"{name} = {value}" for name, value in exact.items())
            kind = "complex" if any(value.has(sp.I) for value in exact.values()) else "not finite"
            raise ScheduleError(
                f"a coefficient is {kind} at t = {at:.6g}: {shown}. f and g must be real and finite on (0, T]."
            )
        return values

    def _require_end_is_regular(self) -> None:
        """A pole exactly at T escapes rounding (tan(pi/2) is 1.6e16 in float64): SymPy evaluates there."""
        for name, e in (("f", self.declaration.f), ("g", self.declaration.g)):
            at_end = e.subs({**self.values, time_symbol: sp.nsimplify(self.T, rational=True)})
            if at_end.has(sp.zoo, sp.oo, -sp.oo):
                raise ScheduleError(f"{name} is singular at t = T = {self.T:g}; use T = {0.999 * self.T:g}, say.")

    def _require_noise_somewhere(self) -> None:
        """A g that is 0 in disguise, such as sin² + cos² - 1, leaves nothing but rounding."""
        points = np.linspace(0.0, self.T, 258)[1:-1]
        if not (np.abs(torch.stack(self._coefficients(torch.as_tensor(points))).numpy()[2]) > 1e-30).any():
            raise ScheduleError(f"g = {self.declaration.g} is 0 on the whole horizon: no noise, so no kernel.")

    def _monotone_samples(self) -> tuple[Tensor, Tensor]:
        """Times and their half log-SNR, falling; the inverse starts from them."""
        nodes = np.concatenate([self._table.nodes.reshape(-1), [self.T]])
        if self.declaration.P0 > 0:
            nodes = np.concatenate([[0.0], nodes])
        fine = np.arange((len(nodes) - 1) * 8 + 1) / 8.0  # dense enough for 4 Newton steps to end at rounding
        times = torch.as_tensor(np.interp(fine, np.arange(len(nodes)), nodes))
        log_alpha, var, _ = self._table(times)
        half_log_snr = log_alpha - 0.5 * torch.log(var)
        finite = torch.isfinite(half_log_snr)
        if not bool(finite.any()):
            raise ScheduleError("g is 0 on the whole horizon: no noise, so no kernel.")
        times, half_log_snr = times[finite], half_log_snr[finite]
        falls = torch.cat([torch.ones(1, dtype=torch.bool), half_log_snr[1:] < half_log_snr.cummin(0).values[:-1]])
        return times[falls], half_log_snr[falls]

    def _find_cutoff(self) -> float:
        if self.declaration.P0 > 0:
            return 0.0
        target = -math.log(_CUTOFF_NOISE)
        if float(self._half_log_snrs[-1]) > target:
            raise ScheduleError(
                f"sigma / alpha reaches only {math.exp(-float(self._half_log_snrs[-1])):.3g} at T = {self.T:g}, too "
                f"little noise to start from (with {_CUTOFF_NOISE:g} at the cutoff). Choose a larger T or g, or give "
                "cutoff= or P0=."
            )
        after = int(torch.searchsorted(-self._half_log_snrs, torch.tensor(-target, dtype=torch.float64)))
        low, high = float(self._times[max(after - 1, 0)]), float(self._times[after])
        for _ in range(60):  # bisection in the table, to rounding: the closed form is not verified yet
            middle = 0.5 * (low + high)
            log_alpha, var, _ = self._table(torch.tensor(middle, dtype=torch.float64))
            low, high = (middle, high) if float(log_alpha - 0.5 * torch.log(var)) > target else (low, middle)
        return high

    def _require_usable_cutoff(self) -> None:
        """sigma at the cutoff must be a normal number in float32, and t must be where the table resolves it."""
        if self.cutoff == 0 and math.sqrt(self.declaration.P0) >= _SMALLEST_STD:
            return
        resolved = self._times[self._times >= self._table.edges[1]]
        std = self._table(torch.tensor(self.cutoff, dtype=torch.float64))[1].clamp_min(0).sqrt()
        std = float(std) if self.cutoff >= float(resolved[0]) else 0.0
        if std < _SMALLEST_STD:
            enough = resolved[self._table(resolved)[1].sqrt() >= _SMALLEST_STD]
            raise ScheduleError(
                f"sigma = {std:.3g} at cutoff = {self.cutoff:g} cannot be told from 0 in float32; the smallest "
                f"usable cutoff is about {float(enough[0]):.3g}; None takes sigma/alpha = {_CUTOFF_NOISE:g}."
            )

    def _compile_closed_form(self) -> Compiled | None:
        """The rules' closed form compiled, if its numbers agree with quadrature on [cutoff, T]; else None."""
        if not self._derived.closed:
            return None
        try:
            compiled = compile_expressions(_outputs(self._derived, self._middle), (time_symbol,), self.values, self.T)
        except DeclarationError:  # such as 0/0 at these values of the parameters
            return None
        nodes = self._table.nodes.reshape(-1)
        inside = nodes[nodes >= 1e-12 * self.T]
        points = np.concatenate([inside[inside < 0.1 * self.T][::4], inside[:: max(1, len(inside) // 512)], [self.T]])
        return compiled if self._agrees(compiled, np.sort(points), _AGREEMENT) else None

    def _agrees(self, compiled: Compiled, points: np.ndarray, tolerance: float) -> bool:
        t = torch.as_tensor(points)
        alpha, offset, std, log_alpha = compiled(t)
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
