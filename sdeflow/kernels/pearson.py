r"""Exact kernels of Pearson diffusions, what the two families share: ``sdeflow.symbolic.pearson``.

A Pearson diffusion is x = origin + scale u, where u is the standard square-root process
(:mod:`sdeflow.kernels.square_root`) or Jacobi's (:mod:`sdeflow.kernels.jacobi`), and alpha and sigma² are those of an
affine SDE behind it. Everything is computed in float64. Densities, scores and moments are differentiable by autograd in
the states, the data and the parameters.

**Draws** are exact, and never an end of the domain, where a density may be infinite: what is nearer to an end than the
state's dtype tells apart becomes the number next to the end. A gradient of a draw is that of the quantile on which it
lies: with F the distribution function and p the density, F(u; θ) = const gives ∂u/∂θ = -∂_θ F / p (implicit
reparametrisation, arXiv:1805.08498), and ∂_θ F = ∫ ∂_θ p below u is integrated numerically.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DataError, DeclarationError, NotAffineError, ScheduleError
from sdeflow.kernels.gaussian import Kernel, inside_ends, require_density
from sdeflow.kernels.notgaussian import NotGaussian, present_only
from sdeflow.numerics.checks import checked_noise, checked_point, checked_start
from sdeflow.numerics.compile import compile_expressions
from sdeflow.numerics.noise import NoiseStream
from sdeflow.numerics.parameters import Values
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.moments import square_root
from sdeflow.symbolic.pearson import Pearson, decay, pearson_or_reason, spread
from sdeflow.symbolic.symbols import t as time_symbol
from sdeflow.symbolic.symbols import x_0 as data_symbol

__all__ = ["PearsonKernel", "Standard", "as_array", "pearson_kernel", "pearson_kernel_or_reason"]

_LEAST = 1e-300  # of u where the distribution function is integrated
# Of the double-exponential rule ∫ f dz = Σ f(z_k) w_k over z > 0, z = exp(s - e^-s).
_STEPS = torch.arange(-3.25, 6.75, 1.0 / 12.0, dtype=torch.float64)
_NODES = torch.exp(_STEPS - torch.exp(-_STEPS))
_WEIGHTS = _NODES * (1.0 + torch.exp(-_STEPS)) / 12.0
_AT_ONCE = 12  # nodes


class Standard:
    """States in the standard coordinate u, and what their law depends on, all of one shape in float64.

    Attributes:
        u: the states.
        u_0: the data.
        alpha, var: of the affine SDE behind it.
        shape: (delta,) or (A, B).
    """

    __slots__ = ("alpha", "shape", "u", "u_0", "var")

    def __init__(self, u: Tensor, u_0: Tensor, alpha: Tensor, var: Tensor, shape: tuple[Tensor, ...]) -> None:
        self.u, self.u_0, self.alpha, self.var, *of_shape = torch.broadcast_tensors(u, u_0, alpha, var, *shape)
        self.shape = tuple(of_shape)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """u, u_0, alpha, var and the shape's numbers."""
        return self.u, self.u_0, self.alpha, self.var, *self.shape

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient may be asked of what is computed from this."""
        return torch.is_grad_enabled() and any(part.requires_grad for part in self.parts)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Standard:
        """The same with a function applied to each part."""
        u, u_0, alpha, var, *shape = (change(part) for part in self.parts)
        return Standard(u, u_0, alpha, var, tuple(shape))

    def at(self, u: Tensor) -> Standard:
        """The same law at other states."""
        return Standard(u, self.u_0, self.alpha, self.var, self.shape)


def pearson_kernel(
    declaration: Declaration, values: Mapping[sp.Symbol, float | Tensor] | None = None
) -> PearsonKernel | None:
    """The exact kernel of a square-root or Jacobi diffusion; None where the declaration is neither.

    Where it is one only for the values that the parameters have, they must be numbers.
    """
    found = pearson_kernel_or_reason(declaration, Values.of(values))
    return None if isinstance(found, str) else found


def pearson_kernel_or_reason(declaration: Declaration, values: Values) -> PearsonKernel | str:
    """The same kernel, or in a clause why there is none."""
    from sdeflow.kernels.jacobi import JacobiKernel
    from sdeflow.kernels.square_root import SquareRootKernel

    found = _family_or_reason(declaration, values)
    if isinstance(found, str):
        return found
    return (SquareRootKernel if found.kind == "square root" else JacobiKernel)(declaration, values, like=found)


def _family_or_reason(declaration: Declaration, values: Values) -> Pearson | str:
    found = pearson_or_reason(declaration.f, declaration.g, values.numbers)
    if isinstance(found, Pearson):
        return present_only(values) if found.at_values and values.tensors else found
    return f"it is no square root or Jacobi diffusion with an exact kernel ({found})"


class PearsonKernel(NotGaussian, ABC):
    """p(x_t | x_0) of a Pearson diffusion: what the two families share.

    Args:
        declaration: dx = f dt + g dw with f affine and g² quadratic in x.
        values: numbers and tensors of its parameters.
        like: a kernel of the same declaration, or the standard form itself, whose derivation is shared.

    Attributes:
        kind: "pearson".
        family: "square root" or "Jacobi".
        pearson: the standard form of the diffusion.
        inner: the affine kernel that gives alpha and sigma² (the clock, for Jacobi); its ``time_of`` is not that of x.
        form: "closed" or "quadrature", that of ``inner``.
        T: the horizon.

    Raises:
        NotAffineError: where the SDE is not of this family.
        DeclarationError: for P0 > 0, under which x_0 would leave the domain.
        ScheduleError: for coefficients that are singular or complex on the horizon, and for a shape that is not
            positive once a parameter has moved.
    """

    kind = "pearson"
    family = ""
    pearson: Pearson

    def __init__(
        self,
        declaration: Declaration,
        values: Mapping[sp.Symbol, float | Tensor] | None = None,
        like: PearsonKernel | Pearson | None = None,
    ) -> None:
        self.declaration = declaration
        self.values = Values.of(values)
        shared = like if isinstance(like, PearsonKernel) else None
        self.pearson = self._classify() if like is None else like if isinstance(like, Pearson) else like.pearson
        if declaration.P0 > 0:
            raise DeclarationError(f"P0 = {declaration.P0:g} spreads x_0 beyond the domain; this SDE needs P0 = 0.")
        self.inner = self._affine_kernel(shared)
        self.form, self.T = self.inner.form, self.inner.T
        form = (self.pearson.origin, self.pearson.scale, *self.pearson.shape)
        self._standard_form = compile_expressions(form, (time_symbol,), self.values, declaration.T)
        arguments = (data_symbol, decay, spread)
        self._moments = compile_expressions((self.pearson.mean, self.pearson.var), arguments, self.values)
        self._form()  # what is wrong with it is said now

    def _classify(self) -> Pearson:
        found = _family_or_reason(self.declaration, self.values)
        if isinstance(found, str) or found.kind != self.family:
            raise NotAffineError(
                f"dx = ({self.declaration.f}) dt + ({self.declaration.g}) dw is no {self.family} diffusion with "
                "constant, positive shape: see sdeflow.symbolic.pearson."
            )
        return found

    def _affine_kernel(self, like: PearsonKernel | None) -> Kernel:
        inner = self.pearson.inner(self.declaration)
        try:
            return Kernel(inner, self.values) if like is None else like.inner.with_values(self.values)
        except ScheduleError:
            if self.declaration.cutoff is not None:
                raise
            # The default cutoff measures the noise against data of size 1, and there may be too little of it.
            return Kernel(replace(inner, cutoff=1e-3 * inner.T), self.values)

    def with_values(self, values: Values) -> PearsonKernel | None:
        """The same kernel with other values of the parameters; None where they make it another diffusion."""
        return type(self)(self.declaration, values, like=self) if self.pearson.holds_at(values.numbers) else None

    def with_cutoff(self, declaration: Declaration) -> PearsonKernel:
        """The kernel of the same declaration with another cutoff; the standard form is shared."""
        return type(self)(declaration, self.values, like=self.pearson)

    @property
    def cutoff(self) -> float:
        """The first time that training and solvers visit."""
        return self.inner.cutoff

    @property
    def shape(self) -> tuple[float, ...]:
        """(delta,) or (A, B); of a tensor the entry in the middle."""
        with torch.no_grad():
            return tuple(float(part.flatten().median()) for part in self._form()[2])

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the domain, the lower first; of a tensor the entries in the middle."""
        with torch.no_grad():
            origin, scale, _ = self._form()
            low, high = self._ends(origin, scale)
            return float(low.flatten().median()), float(high.flatten().median())

    def _form(self, like: Tensor | None = None) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """origin, scale and shape for the current values, in float64; () or shaped as the parameters."""
        device = "cpu" if like is None else like.device
        origin, scale, *shape = self._standard_form(torch.zeros((), dtype=torch.float64, device=device))
        for part in shape:
            if not bool((part > 0).all() & torch.isfinite(part).all()):
                raise ScheduleError(
                    f"the shape {', '.join(map(str, self.pearson.shape))} of this {self.family} diffusion must be "
                    f"positive and finite, and is {float(part.detach().min()):.4g} for {self.values}."
                )
        return origin, scale, tuple(shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, x = {self.pearson.origin} + {self.pearson.scale} u)"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.declaration, self.values)

    def __deepcopy__(self, memo: dict[int, object]) -> PearsonKernel:
        """Copies of a score share its kernel, unless they bring their own learned parameters."""
        values = copy.deepcopy(self.values, memo)
        return self if values is self.values else type(self)(self.declaration, values, like=self)

    # ---------------------------------------------------------------- symbolic side

    @cached_property
    def mean(self) -> sp.Expr:
        """E[x_t | x_0] in x_0 and t. In SymPy; in numbers: :meth:`moments`."""
        return self._shown(self.pearson.mean)

    @cached_property
    def var(self) -> sp.Expr:
        """Var[x_t | x_0] in x_0 and t. In SymPy; in numbers: :meth:`moments`."""
        return self._shown(self.pearson.var)

    @property
    def std(self) -> sp.Expr:
        """The square root of :attr:`var`."""
        return square_root(self.var, {})

    def _shown(self, moment: sp.Expr) -> sp.Expr:
        return moment.xreplace({decay: self.inner.alpha, spread: self.inner.var})

    # ---------------------------------------------------------------- the kernel as a distribution

    def moments(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The true mean and standard deviation of x_t given x_0, each (batch, *event), in the dtype of x_0.

        Args:
            x_0: (batch, *event), in the domain, its ends included.
            t: a number or (batch,), in [0, T].
        """
        x_0 = checked_point(x_0, "x_0")
        self._standard_start(x_0, *self._form(x_0)[:2])
        x = x_0.to(torch.float64)
        alpha, var = (part.expand_as(x) for part in self._alpha_var(x_0, t))
        mean, second = self._moments(x, alpha, var)
        return mean.to(x_0.dtype), second.clamp_min(0).sqrt().to(x_0.dtype)

    def sample(
        self, x_0: Tensor, t: Tensor | float, seed: int | torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A draw of x_t given x_0, shaped as x_0, exact at any t, and never an end of the domain where t > 0.

        Where x_0 or a parameter requires a gradient, so does the draw: see the module.

        Args:
            x_0: (batch, *event).
            t: a number or (batch,), in [0, T].
            seed: seeds the draw; None draws from the global generator.
            noise: standard normal numbers z shaped as x_0, instead of a seed: x_t is then the quantile of x_t at
                Φ(z) (in u, where x falls with u).
        """
        x_0 = checked_point(x_0, "x_0")
        if noise is None:
            return self._sampled(x_0, t, 0.0, self._from_stream(NoiseStream(seed, "kernel")))
        level = torch.special.ndtr(checked_noise(noise, x_0).detach().to("cpu", torch.float64))
        return self._sampled(x_0, t, 0.0, lambda law: self._quantile(level.expand_as(law.u), law))

    def advance(self, x: Tensor, s: float, t: float, noise: NoiseStream) -> Tensor:
        """A draw of x_t given that the state at s is ``x``, shaped and typed as x (batch, *event)."""
        return self._sampled(x, t, s, self._from_stream(noise))

    def _from_stream(self, stream: NoiseStream) -> Callable[[Standard], Tensor]:
        """What draws u from its law with a stream's noise."""
        return lambda law: self._draw(lambda: stream.uniform(tuple(law.u.shape), torch.float64), law)

    def _sampled(self, x_0: Tensor, t: Tensor | float, s: float, draw: Callable[[Standard], Tensor]) -> Tensor:
        """A draw of x_t given the state x_0 at s, by what draws u from its law on the CPU."""
        origin, scale, law = self._standard(x_0, x_0, t, s)
        with torch.no_grad():
            fixed = law.mapped(lambda part: part.detach().cpu())
            u, noisy = draw(fixed).to(x_0.device), (fixed.var > 0).to(x_0.device)
        if law.needs_grad:
            u = self._implicit(u, law, noisy)
        x = origin + scale * torch.where(noisy, u, law.u_0)
        return torch.where(noisy, inside_ends(x, *self._ends(origin, scale), x_0.dtype), x).to(x_0.dtype)

    def _implicit(self, u: Tensor, law: Standard, noisy: Tensor) -> Tensor:
        """``u`` with the gradient of the quantile on which it lies."""
        at = law.at(torch.where(noisy, u, 0.5)).mapped(Tensor.detach)
        at = Standard(at.u, at.u_0, at.alpha, torch.where(noisy, at.var, 1.0), at.shape)
        rates = self._distribution_rates(at)
        with torch.no_grad():
            density = self._log_density(at).exp()
        for part, rate in zip(law.parts[1:], rates, strict=True):
            u = u - torch.where(noisy, rate / density, 0.0) * (part - part.detach())
        return u

    def _distribution_rates(self, law: Standard) -> list[Tensor]:
        """The derivatives of P(u_t <= u) in u_0, alpha, var and the shape's numbers.

        By the double-exponential rule for ∫ p(u e^-z) u e^-z dz over z > 0, in units of the density's width.
        """
        width = self._width(law.u, law.var).clamp_max(1.0)
        rates = [torch.zeros_like(law.u) for _ in law.parts[1:]]
        for first in range(0, len(_NODES), _AT_ONCE):
            nodes, weights = (
                part[first : first + _AT_ONCE].to(law.u.device).reshape(-1, *(1,) * law.u.ndim)
                for part in (_NODES, _WEIGHTS)
            )
            with torch.enable_grad():
                parts = [part.clone().requires_grad_() for part in law.parts[1:]]
                u = (law.u * torch.exp(-width * nodes)).clamp_min(_LEAST)
                inner = Standard(u, parts[0], parts[1], parts[2], tuple(parts[3:]))
                below = (self._log_density(inner).exp() * u * width * weights).sum()
                found = torch.autograd.grad(below, parts, materialize_grads=True, allow_unused=True)
            rates = [total + rate for total, rate in zip(rates, found, strict=True)]
        return rates

    def log_prob(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """log p(x_t | x_0) in nats, (batch,) in float64; -inf for an x_t outside the domain."""
        x_t = checked_point(x_t, "x_t")
        scale, law, inside = self._located(x_t, x_0, t)
        log_p = torch.where(inside, self._log_density(law) - scale.abs().log(), -torch.inf)
        return log_p.reshape(len(x_t), -1).sum(1)

    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p(x_t | x_0), shaped and typed as x_t; NaN for coordinates outside the domain."""
        x_t = checked_point(x_t, "x_t")
        scale, law, inside = self._located(x_t, x_0, t)
        return torch.where(inside, self._slope(law) / scale, torch.nan).to(x_t.dtype)

    # ---------------------------------------------------------------- near the ends of the domain

    @property
    def attained(self) -> bool:
        """Whether paths reach an end of the domain, where E[g² ‖∇ log p‖²] is then infinite."""
        return any(bool((exponent < 0).any()) for exponent in self._exponents())

    @property
    def unbounded(self) -> bool:
        """Whether E|∇ log p|² is infinite, as it is where the density falls as u or slower towards an end."""
        return any(bool(((exponent <= 1) & (exponent != 0)).any()) for exponent in self._exponents())

    def _exponents(self) -> tuple[Tensor, ...]:
        """The powers of the distance to which the density is proportional near each end."""
        with torch.no_grad():
            return tuple(part * self._per_dimension - 1.0 for part in self._form()[2])

    def require_inside(self, x: Tensor, name: str) -> None:
        """A DataError where ``x`` lies outside the domain."""
        self._standard_start(x, *self._form(x)[:2], name)

    def damping(self, x: Tensor, t: Tensor) -> Tensor:
        """A factor in [0, 1) that falls as the distance from an end, in float64: it makes g ∇ log p bounded there."""
        origin, scale, _ = self._form(x)
        _, var = self._alpha_var(x, t)
        return self._damping((x.to(torch.float64) - origin) / scale, var)

    # ---------------------------------------------------------------- helpers

    def _standard(self, x_t: Tensor, x_0: Tensor, t: Tensor | float, s: float = 0.0) -> tuple[Tensor, Tensor, Standard]:
        """origin, scale and the law of u_t given the state x_0 at s."""
        origin, scale, shape = self._form(x_t)
        u_0 = self._standard_start(checked_start(x_0, x_t), origin, scale)
        u = (x_t.to(torch.float64) - origin) / scale
        return origin, scale, Standard(u, u_0, *self._alpha_var(x_t, t, s), shape)

    def _located(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Standard, Tensor]:
        """scale, the law of u_t and whether x_t lies in the domain; outside it, u is that of x_0."""
        _, scale, law = self._standard(x_t, x_0, t)
        require_density(law.var)
        inside = self._inside(law.u)
        return scale, law.at(torch.where(inside, law.u, law.u_0.detach())), inside

    def _alpha_var(self, x: Tensor, t: Tensor | float, s: float = 0.0) -> tuple[Tensor, Tensor]:
        """alpha and sigma² from s to t, a number where s > 0, shaped to go with ``x``."""
        if self.values.shape:
            self.inner.require_event(tuple(x.shape[1:]))
        path = self.inner.transition(x, s, float(t)) if s else self.inner.path(x, self.inner.times_for(x, t))
        return path.alpha.values, path.sigma.values.square()

    def _standard_start(self, x_0: Tensor, origin: Tensor, scale: Tensor, name: str = "x_0") -> Tensor:
        u_0 = (x_0.to(torch.float64) - origin) / scale
        inside = self._inside(u_0)
        if not bool(inside.all()):
            low, high = (end.expand_as(u_0)[~inside][0] for end in self._ends(origin, scale))
            raise DataError(
                f"{name} = {float(x_0.expand_as(u_0)[~inside][0]):g} lies outside the domain of this SDE, "
                f"{float(low):g} <= x <= {float(high):g}."
            )
        return u_0

    # ---------------------------------------------------------------- the family's own, in the standard state u

    _per_dimension = 1.0  # of the density's power at an end, per number of the shape

    @abstractmethod
    def _ends(self, origin: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the domain in x, the lower first."""

    @abstractmethod
    def _inside(self, u: Tensor) -> Tensor:
        """Whether u lies in the domain, its ends included."""

    @abstractmethod
    def _log_density(self, law: Standard) -> Tensor:
        """log p(u | u_0)."""

    @abstractmethod
    def _slope(self, law: Standard) -> Tensor:
        """∂ log p(u | u_0) / ∂u."""

    @abstractmethod
    def _draw(self, uniform: Callable[[], Tensor], law: Standard) -> Tensor:
        """An exact draw from numbers uniform on [0, 1); each call of ``uniform`` gives new ones."""

    @abstractmethod
    def _quantile(self, level: Tensor, law: Standard) -> Tensor:
        """The u at which the distribution function takes the value ``level``."""

    @abstractmethod
    def _width(self, u: Tensor, var: Tensor) -> Tensor:
        """The width of the density near u, relative to u, as far as the noise alone decides."""

    @abstractmethod
    def _damping(self, u: Tensor, var: Tensor) -> Tensor:
        """See :meth:`damping`."""


def as_array(x: Tensor) -> np.ndarray:
    """A tensor as NumPy takes it, in float64."""
    return x.detach().to("cpu", torch.float64).numpy()
