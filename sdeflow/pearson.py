r"""Exact kernels of the square-root (CIR, squared Bessel) and Jacobi diffusions: ``sdeflow.symbolic.pearson``.

**Square root.** With alpha, sigma² of the affine SDE behind it, c = u_t / sigma², l = alpha² u_0 / sigma²,
r = sqrt(c l) and nu = delta / 2 - 1, the noncentral chi² density and its derivative are

    log p(u_t | u_0) = -log(2 sigma²) + nu log(c / 2) - ½ (sqrt(c) - sqrt(l))² + log G_nu(r)
    ∂ log p / ∂u_t   = [ nu / c - ½ + ½ sqrt(l / c) I_{nu+1}(r) / I_nu(r) ] / sigma²,
    G_nu(r) = e^{-r} (r / 2)^{-nu} I_nu(r),

which neither overflows at small times (r of 1e6) nor divides by zero at u_0 = 0. A draw is a gamma variable of shape
delta / 2 + N, N a Poisson variable of mean l / 2, both by inversion of their distribution functions.

**Jacobi.** With the orthonormal polynomials p_n of the stationary Beta(A, B) law and lambda_n = ½ n (n - 1 + A + B),

    p(u_t | u_0) = Beta(u_t; A, B) Σ_n p_n(u_t) p_n(u_0) e^{-lambda_n tau},
    P(u_t <= u | u_0) = I_u(A, B) - ½ u (1 - u) Beta(u; A, B) Σ_{n>0} p_n'(u) p_n(u_0) e^{-lambda_n tau} / lambda_n

(the second because (½ u (1 - u) Beta p_n')' = -lambda_n Beta p_n; Karlin & Taylor 1981, 15.13). About sqrt(80 / tau)
terms are needed. Where they cancel, in the far tails, the sum is done again in as many digits as it takes. Draws invert
the distribution function.

Both are computed in float64 by NumPy and SciPy on the CPU, whatever the device of the state, and their densities and
scores are **not differentiable by autograd**; mean and standard deviation are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property

import mpmath
import numpy as np
import sympy as sp
import torch
from scipy import special
from torch import Tensor

from sdeflow.compile import compile_expressions
from sdeflow.errors import DataError, DeclarationError, NotAffineError, ScheduleError
from sdeflow.kernel import Kernel, broadcast_to_event
from sdeflow.noise import NoiseStream
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.pearson import Pearson, classify, decay, spread
from sdeflow.symbolic.symbols import x_0 as data_symbol

__all__ = ["JacobiKernel", "PearsonKernel", "SquareRootKernel", "pearson_kernel"]

Number = np.ndarray | float | mpmath.mpf

_MOST_TERMS = 6_000  # a clock of 4e-6
_FIRST_CLOCK = 1e-4  # at the default cutoff of the Jacobi kernel, where about 1,000 terms are needed
_MOST_DIGITS = 320  # densities below 1e-300 of their peak are reported as 0
_LEVEL_ERROR = 1e-6  # of the distribution function that draws invert
_LOST = 1e-8  # the relative rounding error of a float64 sum above which it is done again in more digits


def pearson_kernel(declaration: Declaration, values: Mapping[sp.Symbol, float] | None = None) -> PearsonKernel | None:
    """The exact kernel of a square-root or Jacobi diffusion; None where the declaration is neither."""
    pearson = classify(declaration.f, declaration.g, values)
    if pearson is None:
        return None
    return (SquareRootKernel if pearson.kind == "square root" else JacobiKernel)(declaration, values)


class PearsonKernel(ABC):
    """p(x_t | x_0) of a Pearson diffusion: what the two families share.

    Args:
        declaration: dx = f dt + g dw with f affine and g² quadratic in x.
        values: numbers of its parameters.

    Attributes:
        pearson: the standard form of the diffusion.
        shape: (delta,) or (A, B), as numbers.
        inner: the affine kernel that gives alpha and sigma² (the clock, for Jacobi); its ``time_of`` is not that of x.
        form: "closed" or "quadrature", that of ``inner``.
        T: the horizon.
        cutoff: the first time that training and solvers visit.

    Raises:
        NotAffineError: where the SDE is not of this family.
        DeclarationError: for P0 > 0, under which x_0 would leave the domain.
        ScheduleError: for coefficients that are singular or complex on the horizon.
    """

    kind = ""

    def __init__(self, declaration: Declaration, values: Mapping[sp.Symbol, float] | None = None) -> None:
        self.declaration = declaration
        self.values = dict(values or {})
        self.pearson = self._classify()
        if declaration.P0 > 0:
            raise DeclarationError(f"P0 = {declaration.P0:g} spreads x_0 beyond the domain; this SDE needs P0 = 0.")
        origin, scale, *shape = self._numbers(self.pearson.origin, self.pearson.scale, *self.pearson.shape)
        self._origin, self._scale, self.shape = origin, scale, tuple(shape)
        self.inner = Kernel(self.pearson.inner(declaration), self.values)
        self.form, self.T, self.cutoff = self.inner.form, self.inner.T, self.inner.cutoff
        arguments = (data_symbol, decay, spread)
        self._moments = compile_expressions((self.pearson.mean, self.pearson.var), arguments, self.values)

    def _classify(self) -> Pearson:
        pearson = classify(self.declaration.f, self.declaration.g, self.values)
        if pearson is None or pearson.kind != self.kind:
            raise NotAffineError(
                f"dx = ({self.declaration.f}) dt + ({self.declaration.g}) dw is no {self.kind} diffusion with "
                "constant, positive shape: see sdeflow.symbolic.pearson."
            )
        return pearson

    def _numbers(self, *expressions: sp.Expr) -> list[float]:
        exact = {symbol: sp.Float(value, 30) for symbol, value in self.values.items()}
        return [float(expression.xreplace(exact).evalf(20)) for expression in expressions]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, x = {self.pearson.origin} + {self.pearson.scale} u)"

    def __reduce__(self) -> tuple:
        return type(self), (self.declaration, self.values)

    def __deepcopy__(self, memo: dict) -> PearsonKernel:
        return self  # immutable: copies of a score share it

    # ---------------------------------------------------------------- symbolic side

    @cached_property
    def mean(self) -> sp.Expr:
        """E[x_t | x_0] in x_0 and t."""
        return self._shown(self.pearson.mean)

    @cached_property
    def var(self) -> sp.Expr:
        """Var[x_t | x_0] in x_0 and t."""
        return self._shown(self.pearson.var)

    @property
    def std(self) -> sp.Expr:
        """The square root of :attr:`var`."""
        return sp.sqrt(self.var)

    def _shown(self, moment: sp.Expr) -> sp.Expr:
        return moment.subs({decay: self.inner.alpha, spread: self.inner.var}, simultaneous=True)

    # ---------------------------------------------------------------- the kernel as a distribution

    def moments(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The true mean and standard deviation of x_t given x_0, each (batch, *event), in the dtype of x_0.

        Args:
            x_0: (batch, *event), in the domain, its ends included.
            t: a number or (batch,), in [0, T].
        """
        self._standard_start(x_0)
        x = x_0.to(torch.float64)
        alpha, sigma, _ = self.inner.coefficients(self.inner.times_for(x_0, t))
        alpha, var = (broadcast_to_event(c, x).expand_as(x) for c in (alpha, sigma.square()))
        mean, second = self._moments(x, alpha, var)
        return mean.to(x_0.dtype), second.clamp_min(0).sqrt().to(x_0.dtype)

    def sample(
        self, x_0: Tensor, t: Tensor | float, seed: int | torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A draw of x_t given x_0, shaped as x_0, exact at any t.

        Args:
            x_0: (batch, *event).
            t: a number or (batch,), in [0, T].
            seed: seeds the draw; None draws from the global generator.
            noise: standard normal numbers z shaped as x_0, instead of a seed: x_t is then the quantile of x_t at
                Φ(z) (in u, where x falls with u).
        """
        u_0, alpha, var = self._standard(x_0, x_0, t)[1:]
        if noise is not None:
            u = self._quantile(special.ndtr(np.broadcast_to(_array(noise), u_0.shape)), u_0, alpha, var)
        else:
            stream = NoiseStream(seed, "kernel")
            u = self._draw(lambda: _array(stream.uniform(tuple(x_0.shape), torch.float64)), u_0, alpha, var)
        return _tensor(self._origin + self._scale * np.where(var > 0, u, u_0), x_0)

    def log_prob(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """log p(x_t | x_0) in nats, (batch,) in float64; -inf for an x_t outside the domain."""
        u, u_0, alpha, var = self._standard(x_t, x_0, t)
        self._require_noise(var)
        log_p, _ = self._density(u, u_0, alpha, var)
        log_p = np.where(self._inside(u), log_p - math.log(abs(self._scale)), -np.inf)
        return torch.as_tensor(log_p.reshape(len(x_t), -1).sum(1), device=x_t.device)

    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p(x_t | x_0), shaped and typed as x_t; NaN for coordinates outside the domain."""
        u, u_0, alpha, var = self._standard(x_t, x_0, t)
        self._require_noise(var)
        _, slope = self._density(u, u_0, alpha, var)
        return _tensor(np.where(self._inside(u), slope / self._scale, np.nan), x_t)

    def _standard(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> tuple[np.ndarray, ...]:
        """u_t, u_0, alpha and sigma² as arrays of one shape."""
        u_0 = self._standard_start(x_0)
        u = (_array(x_t) - self._origin) / self._scale
        alpha, sigma, _ = self.inner.coefficients(self.inner.times_for(x_t, t))
        alpha, var = (_array(broadcast_to_event(c, x_t.to(torch.float64))) for c in (alpha, sigma.square()))
        return tuple(np.ascontiguousarray(part) for part in np.broadcast_arrays(u, u_0, alpha, var))

    def _standard_start(self, x_0: Tensor) -> np.ndarray:
        if not x_0.is_floating_point():
            raise DataError(f"x_0 must be floating, not {x_0.dtype}.")
        u_0 = (_array(x_0) - self._origin) / self._scale
        inside = self._inside(u_0)
        if not inside.all():
            raise DataError(
                f"x_0 = {float(_array(x_0)[~inside].flat[0]):g} lies outside the domain of this SDE, "
                f"x = {self._origin:g} + {self._scale:g} u with {self._domain}."
            )
        return u_0

    @staticmethod
    def _require_noise(var: np.ndarray) -> None:
        if not (var > 0).all():
            raise ScheduleError("sigma = 0 at t = 0: the kernel is a point there, without a density or a score.")

    # ---------------------------------------------------------------- the family's own, in the standard state u

    _domain = ""

    @abstractmethod
    def _inside(self, u: np.ndarray) -> np.ndarray:
        """Whether u lies in the domain, its ends included."""

    @abstractmethod
    def _density(
        self, u: np.ndarray, u_0: np.ndarray, alpha: np.ndarray, var: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p(u | u_0) and its derivative in u."""

    @abstractmethod
    def _draw(
        self, uniform: Callable[[], np.ndarray], u_0: np.ndarray, alpha: np.ndarray, var: np.ndarray
    ) -> np.ndarray:
        """An exact draw from numbers uniform on [0, 1); each call of ``uniform`` gives new ones."""

    @abstractmethod
    def _quantile(self, level: np.ndarray, u_0: np.ndarray, alpha: np.ndarray, var: np.ndarray) -> np.ndarray:
        """The u at which the distribution function takes the value ``level``."""


class SquareRootKernel(PearsonKernel):
    """The noncentral chi² kernel of g² = s (x - l) with an affine drift: CIR, squared Bessel and their kin."""

    kind = "square root"
    _domain = "u >= 0"

    def _inside(self, u: np.ndarray) -> np.ndarray:
        return u >= 0

    def _density(
        self, u: np.ndarray, u_0: np.ndarray, alpha: np.ndarray, var: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        nu = 0.5 * self.shape[0] - 1.0
        u = np.maximum(u, 0.0)
        root, root_0 = np.sqrt(u), alpha * np.sqrt(u_0)
        r = root * root_0 / var
        log_g = _log_g(nu, r)
        log_p = special.xlogy(nu, 0.5 * u / var) - 0.5 * (root - root_0) ** 2 / var - np.log(2.0 * var) + log_g
        # ½ sqrt(l / c) I_{nu+1} / I_nu, with I_{nu+1} / I_nu = (r / 2) G_{nu+1} / G_nu; it is finite at u = 0.
        pull = 0.25 * root_0**2 / var * np.exp(_log_g(nu + 1.0, r) - log_g)
        with np.errstate(divide="ignore", invalid="ignore"):
            push = np.where(nu == 0.0, 0.0, nu / (u / var))
        return log_p, (push - 0.5 + pull) / var

    def _draw(
        self, uniform: Callable[[], np.ndarray], u_0: np.ndarray, alpha: np.ndarray, var: np.ndarray
    ) -> np.ndarray:
        count = _poisson(uniform(), 0.5 * alpha**2 * u_0 / np.where(var > 0, var, np.inf))
        return 2.0 * var * special.gammaincinv(0.5 * self.shape[0] + count, uniform())

    def _quantile(self, level: np.ndarray, u_0: np.ndarray, alpha: np.ndarray, var: np.ndarray) -> np.ndarray:
        from scipy.stats import ncx2  # slow to import, and only this needs it

        return var * ncx2.ppf(level, self.shape[0], alpha**2 * u_0 / np.where(var > 0, var, np.inf))


class JacobiKernel(PearsonKernel):
    """The kernel of g² = s (x - p)(q - x) with an affine drift, by its eigenfunctions."""

    kind = "Jacobi"
    _domain = "0 <= u <= 1"

    def __init__(self, declaration: Declaration, values: Mapping[sp.Symbol, float] | None = None) -> None:
        super().__init__(declaration, values)
        if declaration.cutoff is None:
            self.cutoff = float(self.inner.time_of(-0.5 * math.log(_FIRST_CLOCK)))

    def _inside(self, u: np.ndarray) -> np.ndarray:
        return (u >= 0) & (u <= 1)

    def _density(
        self, u: np.ndarray, u_0: np.ndarray, alpha: np.ndarray, var: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        A, B = self.shape
        shape, (u, u_0, tau) = u.shape, (part.reshape(-1) for part in (np.clip(u, 0.0, 1.0), u_0, var))
        total, slope, _, size, _ = self._series(u, u_0, tau)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_sum, ratio = np.log(total), slope / total
            for i in np.flatnonzero(~(np.finfo(float).eps * size < _LOST * total)):
                log_sum[i], ratio[i] = self._series_in_digits(u[i], u_0[i], tau[i])
            push = np.where(A == 1.0, 0.0, (A - 1.0) / u) - np.where(B == 1.0, 0.0, (B - 1.0) / (1.0 - u))
        return (self._log_weight(u) + log_sum).reshape(shape), (push + ratio).reshape(shape)

    def _draw(
        self, uniform: Callable[[], np.ndarray], u_0: np.ndarray, alpha: np.ndarray, var: np.ndarray
    ) -> np.ndarray:
        return self._quantile(uniform(), u_0, alpha, var)

    def _quantile(self, level: np.ndarray, u_0: np.ndarray, alpha: np.ndarray, var: np.ndarray) -> np.ndarray:
        """By bracketed Newton steps in the angle φ = 2 arcsin sqrt(u), where the noise has unit size."""
        target, start, tau = (part.reshape(-1) for part in (level, u_0, var))
        u = np.copy(start)
        left = np.flatnonzero(tau > 0)
        low, high, error = np.zeros_like(u), np.full_like(u, math.pi), np.zeros_like(u)
        angle = np.clip(2.0 * np.arcsin(np.sqrt(u)) + special.ndtri(target) * np.sqrt(tau), 0.05, math.pi - 0.05)
        for _ in range(80):
            if not left.size:
                break
            u[left] = np.sin(0.5 * angle[left]) ** 2
            below, density, rounding = self._distribution(u[left], start[left], tau[left])
            excess = below - target[left]
            error[left] = np.abs(excess) + rounding
            low[left] = np.where(excess < 0, angle[left], low[left])
            high[left] = np.where(excess < 0, high[left], angle[left])
            with np.errstate(divide="ignore", invalid="ignore"):
                step = angle[left] - excess / (density * np.sqrt(u[left] * (1.0 - u[left])))
            inside = (step > low[left]) & (step < high[left])
            step = np.where(inside, step, 0.5 * (low[left] + high[left]))
            moving = np.abs(step - angle[left]) > 1e-13
            angle[left] = step
            left = left[moving]
        resolved = (angle > 1e-6) & (angle < math.pi - 1e-6)  # at an end, float64 is what limits the distribution
        if not (error[resolved] < _LEVEL_ERROR).all():
            raise ScheduleError(
                f"the Jacobi diffusion with A, B = {self.shape[0]:.3g}, {self.shape[1]:.3g} has too little noise for "
                "its drift: from this x_0 its distribution function cannot be summed in float64. Its density can; or "
                "simulate the SDE."
            )
        return np.where(tau > 0, np.sin(0.5 * angle) ** 2, start).reshape(u_0.shape)

    def _distribution(self, u: np.ndarray, u_0: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, ...]:
        """P(u_t <= u | u_0), its density, and the rounding error of the first."""
        total, _, integral, _, size = self._series(u, u_0, tau)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            weight = np.exp(self._log_weight(u))
            factor = np.where((u > 0) & (u < 1), 0.5 * u * (1.0 - u) * weight, 0.0)
            below = special.betainc(*self.shape, u) - factor * integral
            return below, weight * total, np.finfo(float).eps * factor * size

    def _log_weight(self, u: np.ndarray) -> np.ndarray:
        """The logarithm of the stationary density."""
        A, B = self.shape
        return special.xlogy(A - 1.0, u) + special.xlog1py(B - 1.0, -u) - special.betaln(A, B)

    def _terms(self, tau: float, nats: float) -> int:
        """How many terms leave a rest of e^-nats: n with lambda_n tau - (theta + 2) log n > nats."""
        theta = sum(self.shape)
        n = 8.0
        for _ in range(8):
            n = 2.0 + math.sqrt(2.0 * (nats + (theta + 2.0) * math.log(n + 2.0)) / tau)
        return math.ceil(n)

    def _series(self, u: np.ndarray, u_0: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, ...]:
        """Σ p_n(u) p_n(u_0) e^{-lambda_n tau}, its derivative in u, the sum of the distribution function, and the
        sums of moduli of the first and the third."""
        count = self._terms(float(tau.min()), 45.0) if tau.size else 0
        if count > _MOST_TERMS:
            raise ScheduleError(
                f"the clock ∫ s dt = {float(tau.min()):.3g} is too small: the Jacobi kernel would need {count} terms, "
                f"and {_MOST_TERMS} are allowed; ask for a later t."
            )
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite, and is found by its size
            return _sums(u, u_0, tau, *self.shape, count)

    def _series_in_digits(self, u: float, u_0: float, tau: float) -> tuple[float, float]:
        """The logarithm of the same sum and its logarithmic derivative, in as many digits as cancel."""
        # The kernel falls about as a Gaussian of variance tau does in the angle.
        distance = 2.0 * abs(math.asin(math.sqrt(u)) - math.asin(math.sqrt(u_0)))
        digits = 40 + int(min(distance**2 / (2.0 * tau * math.log(10.0)), 2 * _MOST_DIGITS))
        while digits <= _MOST_DIGITS:
            with mpmath.workdps(digits):
                numbers = [mpmath.mpf(number) for number in (u, u_0, tau, *self.shape)]
                total, derivative, _, size, _ = _sums(*numbers, self._terms(tau, 2.31 * digits), mpmath.exp)
                if total > size * mpmath.mpf(10) ** (14 - digits):
                    return float(mpmath.log(total)), float(derivative / total)
            digits *= 2
        return -math.inf, math.nan


def _sums(
    u: Number, u_0: Number, tau: Number, A: Number, B: Number, count: int, exp: Callable[[Number], Number] = np.exp
) -> tuple[Number, ...]:
    """The sums of ``JacobiKernel._series`` over n = 0 to ``count``, in float64 or in mpmath's digits."""
    one = 0.0 * u + 1.0
    p, p_before, slope, slope_before, q, q_before = one, 0.0 * one, 0.0 * one, 0.0 * one, one, 0.0 * one
    total, derivative, integral = one, 0.0 * one, 0.0 * one
    size, integral_size = one, 0.0 * one
    below = 0.0
    for n in range(count):
        middle, above = _recurrence(n, A, B)
        z, z_0 = 2.0 * u - 1.0 - middle, 2.0 * u_0 - 1.0 - middle
        slope, slope_before = (z * slope + 2.0 * p - below * slope_before) / above, slope
        p, p_before = (z * p - below * p_before) / above, p
        q, q_before = (z_0 * q - below * q_before) / above, q
        eigenvalue = (n + 1) * (n + A + B) / 2
        weight = q * exp(-eigenvalue * tau)
        total = total + weight * p
        derivative = derivative + weight * slope
        integral = integral + weight * slope / eigenvalue
        size = size + abs(weight * p)
        integral_size = integral_size + abs(weight * slope) / eigenvalue
        below = above
    return total, derivative, integral, size, integral_size


def _recurrence(n: int, A: Number, B: Number) -> tuple[Number, Number]:
    """a_n and b_{n+1} of z p_n = b_{n+1} p_{n+1} + a_n p_n + b_n p_{n-1}, z = 2u - 1, orthonormal under Beta(A, B)."""
    k = 2 * n + A + B
    sqrt = math.sqrt if isinstance(k, float) else mpmath.sqrt
    if n == 0:  # where k - 2, which cancels, may be 0
        return (A - B) / k, 2 * sqrt(A * B / (k + 1)) / k
    middle = (A - B) * (A + B - 2) / ((k - 2) * k)
    return middle, 2 * sqrt((n + 1) * (n + A) * (n + B) * (n + A + B - 1) / ((k + 1) * (k - 1))) / k


def _log_g(nu: float, r: np.ndarray) -> np.ndarray:
    """log of e^{-r} (r/2)^{-nu} I_nu(r), for nu > -1 and r >= 0, where I_nu itself may over- or underflow."""
    out = -special.gammaln(nu + 1.0) - r + np.log(special.hyp0f1(nu + 1.0, 0.25 * np.minimum(r, 2.0) ** 2))
    large = r > 2.0
    scaled = special.ive(nu, np.where(large, r, 1.0))
    plain = large & (r < 1e8) & (scaled > 1e-250)
    rest = large & ~plain
    out[plain] = np.log(scaled[plain]) - nu * np.log(0.5 * r[plain])
    out[rest] = _log_g_asymptotic(nu, r[rest])
    return out


def _log_g_asymptotic(nu: float, r: np.ndarray) -> np.ndarray:
    """The same for r > 1e8, or for an order so large that I_nu underflows."""
    if nu < 100.0:
        return -0.5 * np.log(2.0 * math.pi * r) + np.log1p(-(4.0 * nu**2 - 1.0) / (8.0 * r)) - nu * np.log(0.5 * r)
    # Debye's expansion, uniform in r (DLMF 10.41.3, with U_1 to U_4 of 10.41.10).
    hypotenuse = np.hypot(nu, r)
    p = nu / hypotenuse
    terms = (
        np.polyval([-5, 0, 3, 0], p) / 24,
        np.polyval([385, 0, -462, 0, 81, 0, 0], p) / 1152,
        np.polyval([-425425, 0, 765765, 0, -369603, 0, 30375, 0, 0, 0], p) / 414720,
        np.polyval([185910725, 0, -446185740, 0, 349922430, 0, -94121676, 0, 4465125, 0, 0, 0, 0], p) / 39813120,
    )
    correction = sum(term / nu ** (k + 1) for k, term in enumerate(terms))
    # nu η - r - nu log(r/2) with η = hypotenuse / nu + log(r / (nu + hypotenuse)); hypotenuse - r without cancelling.
    exponent = nu**2 / (hypotenuse + r) - nu * np.log(0.5 * (nu + hypotenuse))
    return exponent - 0.5 * np.log(2.0 * math.pi * hypotenuse) + np.log1p(correction)


def _poisson(level: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The Poisson variable whose distribution function first reaches ``level``."""
    with np.errstate(invalid="ignore"):
        above = np.ceil(np.nan_to_num(special.pdtrik(level, mean)))  # NaN where the mean is 0
    below = np.maximum(above - 1.0, 0.0)
    return np.where(special.pdtr(below, mean) >= level, below, above)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).numpy()


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)
