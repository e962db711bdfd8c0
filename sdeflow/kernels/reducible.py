r"""The transition kernel of a reducible SDE: that of an affine one, seen through a change of the state.

Where y = H(x, t) obeys dy = (a y + b) dt + c dw (``sdeflow.symbolic.lamperti``), y_t given y_0 is N(m, v) with
m = alpha y_0 + offset and v = sigma^2, and for x_t = X(y_t, t)

    log p(x_t | x_0) = log N(y_t; m, v) - log abs X'(y_t)
    ∇ log p(x_t | x_0) = [ (m - y_t) / v - X'' / X' ] / X'.

Where the map folds, both y_t and -y_t are sent to x_t, and the Gaussian becomes N(y; m, v) + N(-y; m, v): its
logarithm gains log(1 + e^{-2 y m / v}), and m in the score becomes m tanh(y m / v). Either way it integrates to one.

All of it is closed, computed in float64, and differentiable by autograd.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from typing import overload

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DataError, DeclarationError, NotAffineError
from sdeflow.kernels.gaussian import Kernel, broadcast_to_event, inside_ends, require_density
from sdeflow.kernels.notgaussian import NotGaussian, present_only
from sdeflow.laws.gaussian import Gaussian, normal_log_density
from sdeflow.numerics.checks import checked_dtype, checked_noise, checked_point, checked_start
from sdeflow.numerics.compile import Compiled, compile_expressions
from sdeflow.numerics.noise import NoiseStream, kernel_noise
from sdeflow.numerics.parameters import Values
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.lamperti import Reduction, line_mean, line_var, reduction_or_reason, y
from sdeflow.symbolic.moments import square_root
from sdeflow.symbolic.symbols import t as time_symbol
from sdeflow.symbolic.symbols import x as state_symbol
from sdeflow.symbolic.symbols import x_0 as data_symbol

__all__ = ["SAME_STATE", "PushForward", "ReducibleKernel", "reducible_or_reason"]

SAME_STATE = "g is free of x, so that the Lamperti coordinate is x itself, with the same drift"
"""Why noise that is free of x leaves neither a change of the state nor Pearson's class to look for."""

# Trapezoids converge geometrically on a smooth function times a Gaussian, unlike Gauss-Hermite on a steep one.
_STEP = 1.0 / 16.0
_NODES = np.arange(-160, 161) * _STEP
_WEIGHTS = np.exp(-0.5 * _NODES**2) * _STEP / math.sqrt(2.0 * math.pi)


class ReducibleKernel(NotGaussian):
    """p(x_t | x_0) of an SDE that a change of the state makes affine.

    Args:
        declaration: dx = f dt + g dw, such that ``reduce(f, g, values)`` finds a map.
        values: numbers and tensors of its parameters.
        like: a kernel of the same declaration, or the reduction itself, whose derivation is shared.

    Attributes:
        kind: "reducible".
        reduction: the map and the affine SDE of y.
        inner: the kernel of y, a :class:`~sdeflow.kernels.gaussian.Kernel`; its ``alpha``, ``sigma`` and ``time_of``
            are those of y, not of x.
        form: "closed" or "quadrature", that of ``inner``.
        T: the horizon.

    Raises:
        NotAffineError: where no map makes the SDE affine.
        DeclarationError: for P0 > 0: a Gaussian x at t = 0 is no Gaussian y.
        ScheduleError: for coefficients that are singular, complex or explosive on the horizon.
    """

    kind = "reducible"
    reduction: Reduction
    inner: Kernel

    def __init__(
        self,
        declaration: Declaration,
        values: Mapping[sp.Symbol, float | Tensor] | None = None,
        like: ReducibleKernel | Reduction | None = None,
    ) -> None:
        self.declaration = declaration
        self.values = Values.of(values)
        if isinstance(like, ReducibleKernel):
            self.reduction, self.inner = like.reduction, like.inner.with_values(self.values)
        else:
            self.reduction = self._reduce() if like is None else like
            self.inner = Kernel(self.reduction.inner(declaration), self.values)
        change = self.reduction.map
        self.form, self.T = self.inner.form, self.inner.T
        slope, curvature = sp.diff(change.to_state, y), sp.diff(change.log_slope, y)
        self._to_line = self._compile(change.to_line, state_symbol)
        self._to_state = self._compile(change.to_state, y)
        self._slopes = self._compile((slope, change.log_slope, curvature), y)
        self._ends = [None if end.is_infinite else self._compile(end) for end in (change.lower, change.upper)]
        self._moments = None
        if change.mean is not None:
            arguments = (line_mean, line_var, time_symbol)
            self._moments = compile_expressions((change.mean, change.var), arguments, self.values, self.T)

    def _reduce(self) -> Reduction:
        if self.declaration.P0 > 0:
            raise DeclarationError(
                f"P0 = {self.declaration.P0:g} is the variance of a Gaussian x at t = 0, which the change of state "
                "makes another law; a reducible SDE needs P0 = 0."
            )
        found = reducible_or_reason(self.declaration, self.values)
        if isinstance(found, str):
            raise NotAffineError(
                f"no change of the state makes dx = ({self.declaration.f}) dt + ({self.declaration.g}) dw affine on "
                f"the whole line, for {found}: see sdeflow.symbolic.lamperti for the maps that are tried."
            )
        return found

    @overload
    def _compile(self, expressions: tuple[sp.Expr, ...], *state: sp.Symbol) -> Compiled[tuple[Tensor, ...]]: ...

    @overload
    def _compile(self, expressions: sp.Expr, *state: sp.Symbol) -> Compiled[Tensor]: ...

    def _compile(
        self, expressions: sp.Expr | tuple[sp.Expr, ...], *state: sp.Symbol
    ) -> Compiled[Tensor] | Compiled[tuple[Tensor, ...]]:
        return compile_expressions(expressions, (*state, time_symbol), self.values, self.T)

    @property
    def cutoff(self) -> float:
        """The first time that training and solvers visit."""
        return self.inner.cutoff

    def __repr__(self) -> str:
        change = self.reduction.map
        return f"ReducibleKernel(x_t = {change.to_state}, y = {change.to_line}, {self.inner!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return ReducibleKernel, (self.declaration, self.values)

    def __deepcopy__(self, memo: dict[int, object]) -> ReducibleKernel:
        values = copy.deepcopy(self.values, memo)
        return self if values is self.values else ReducibleKernel(self.declaration, values, like=self)

    def with_values(self, values: Values) -> ReducibleKernel | None:
        """The same kernel with other values of the parameters; None where another map may serve them."""
        return ReducibleKernel(self.declaration, values, like=self) if self.reduction.holds_at(values.numbers) else None

    def with_cutoff(self, declaration: Declaration) -> ReducibleKernel:
        """The kernel of the same declaration with another cutoff; the change of the state is shared."""
        return ReducibleKernel(declaration, self.values, like=self.reduction)

    # ---------------------------------------------------------------- symbolic side

    @cached_property
    def mean(self) -> sp.Expr | None:
        """E[x_t | x_0] in x_0 and t; None where it has no closed form (the logistic map).

        In SymPy; in numbers: :meth:`moments`.
        """
        return self._shown(self.reduction.map.mean)

    @cached_property
    def var(self) -> sp.Expr | None:
        """Var[x_t | x_0] in x_0 and t; None where it has no closed form (the logistic map).

        In SymPy; in numbers: :meth:`moments`.
        """
        return self._shown(self.reduction.map.var)

    @property
    def std(self) -> sp.Expr | None:
        """The square root of :attr:`var`."""
        return None if self.var is None else square_root(self.var, {})

    def _shown(self, moment: sp.Expr | None) -> sp.Expr | None:
        if moment is None:
            return None
        start = self.reduction.map.to_line.xreplace({state_symbol: data_symbol, time_symbol: sp.Integer(0)})
        line = self.inner.alpha * start + self.inner.offset
        return moment.xreplace({line_mean: line, line_var: self.inner.var})

    # ---------------------------------------------------------------- the change of state

    def transport(self, x: Tensor, t: Tensor | float) -> Tensor:
        """y = H(x, t), shaped and typed as x (batch, *event); the branch y >= 0 where the map folds.

        Raises:
            DataError: for a state outside the domain.
        """
        x = checked_point(x, sides=0)
        time = self._times(x, t)
        return self._located(self._require_inside(x, time), time)[0].to(x.dtype)

    def restore(self, y: Tensor, t: Tensor | float) -> Tensor:
        """x = X(y, t), shaped and typed as y (batch, *event)."""
        y = checked_point(y, "y")
        return self._to_state(y.to(torch.float64), self._times(y, t)).to(y.dtype)

    def restore_inside(self, y: Tensor, t: Tensor | float, dtype: torch.dtype) -> Tensor:
        """X(y, t) in ``dtype``, kept off the ends of the domain, on which rounding may put it."""
        return self._drawn(y.to(torch.float64), self._times(y, t), dtype)

    def _times(self, x: Tensor, t: Tensor | float) -> Tensor:
        """t in float64, shaped to go with x."""
        return broadcast_to_event(self.inner.times_for(x, t), x.to(torch.float64))

    def _located(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """H(x, t), and whether x lies in the domain; outside it, y is some number."""
        inside = torch.isfinite(x)
        for end, outward in zip(self._ends, (-1.0, 1.0), strict=True):
            if end is not None:
                beyond = outward * (x - end(time))
                inside = inside & (beyond <= 0 if self.reduction.map.fold else beyond < 0)
        safe = self._to_state(torch.ones_like(x), time)
        return self._to_line(torch.where(inside, x, safe), time), inside

    def _require_inside(self, x: Tensor, time: Tensor) -> Tensor:
        """``x`` in float64, or a DataError for a state outside the domain."""
        x = x.to(torch.float64)
        inside = self._located(x, time)[1]
        if not bool(inside.all()):
            change = self.reduction.map
            ends = f"{change.lower} {'<=' if change.fold else '<'} x < {change.upper}"
            raise DataError(f"the state {float(x[~inside][0]):g} lies outside the domain {ends} of this SDE.")
        return x

    # ---------------------------------------------------------------- the kernel as a distribution

    def line_moments(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of y_t given x_0, in float64.

        Args:
            x_0: (batch, *event).
            t: a number or (batch,), in [0, T].
        """
        x_0 = checked_point(x_0, "x_0")
        start = self._times(x_0, 0.0)
        return self.inner.moments(self._located(self._require_inside(x_0, start), start)[0], t)

    def moments(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The true mean and standard deviation of x_t given x_0, each (batch, *event), in the dtype of x_0."""
        x_0 = checked_point(x_0, "x_0")
        mean, second = self.pushed_moments(*self.line_moments(x_0, t), t)
        return mean.to(x_0.dtype), second.to(x_0.dtype)

    def pushed_moments(self, mean: Tensor, std: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation of X(y, t) where y is N(mean, std²), in float64, shaped as ``mean``."""
        time = self._times(mean, t)
        if self._moments is not None:
            first, second = self._moments(mean, std.square().expand_as(mean), time.expand_as(mean))
            return first, second.clamp_min(0).sqrt()
        first = second = torch.zeros_like(mean)
        centre = self._to_state(mean, time)
        for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
            shift = self._to_state(mean + node * std, time) - centre  # small where std is: nothing cancels
            first, second = first + weight * shift, second + weight * shift.square()
        return centre + first, (second - first.square()).clamp_min(0).sqrt()

    def sample(
        self, x_0: Tensor, t: Tensor | float, seed: int | torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """x_t = X(m + sigma noise, t), shaped as x_0, and never an end of the domain.

        Args:
            x_0: (batch, *event).
            t: a number or (batch,), in [0, T].
            seed: seeds the noise; None draws from the global generator.
            noise: the standard normal noise itself, shaped as x_0, instead of a seed.
        """
        x_0 = checked_point(x_0, "x_0")
        mean, std = self.line_moments(x_0, t)
        noise = kernel_noise(x_0, seed) if noise is None else checked_noise(noise, x_0)
        return self._drawn(mean + std * noise, self._times(x_0, t), x_0.dtype)

    def advance(self, x: Tensor, s: float, t: float, noise: NoiseStream) -> Tensor:
        """A draw of x_t given that the state at s is ``x``, shaped and typed as x (batch, *event)."""
        before = self._times(x, s)
        line = self._located(self._require_inside(x, before), before)[0]
        return self._drawn(self.inner.advance(line, s, t, noise), self._times(x, t), x.dtype)

    def _drawn(self, line: Tensor, time: Tensor, dtype: torch.dtype) -> Tensor:
        """X(y, t) in ``dtype``, kept off the ends, on which rounding may put it."""
        low, high = (
            torch.tensor(infinite, dtype=line.dtype, device=line.device) if end is None else end(time)
            for end, infinite in zip(self._ends, (-math.inf, math.inf), strict=True)
        )
        return inside_ends(self._to_state(line, time), low, high, dtype).to(dtype)

    def log_prob(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """log p(x_t | x_0) in nats, (batch,) in float64; -inf for an x_t outside the domain."""
        x_t = checked_point(x_t, "x_t")
        return self.pushed_log_prob(x_t, *self._noisy_moments(checked_start(x_0, x_t), t), t)

    def pushed_log_prob(self, x: Tensor, mean: Tensor, std: Tensor, t: Tensor | float) -> Tensor:
        """log p(x) in nats, (batch,) in float64, where y is N(mean, std²) at t, every branch counted."""
        time = self._times(x, t)
        line, inside = self._located(x.to(torch.float64), time)
        rest = -self._slopes(line, time)[1].expand_as(line)
        if self.reduction.map.fold:
            rest = rest + torch.nn.functional.softplus(-2.0 * line * mean / std.square())
        total = normal_log_density(line, mean, std) + rest.flatten(1).sum(1)
        return torch.where(inside.flatten(1).all(1), total, -math.inf)

    def line_score(self, x: Tensor, score: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """y and the gradient of its log-density, from ∇ log p(x): s X' + X'' / X', both in float64."""
        time = self._times(x, t)
        line, _ = self._located(x.to(torch.float64), time)
        slope, _, curvature = self._slopes(line, time)
        return line, score.to(torch.float64) * slope + curvature

    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p(x_t | x_0), shaped and typed as x_t; NaN for coordinates outside the domain."""
        x_t = checked_point(x_t, "x_t")
        mean, std = self._noisy_moments(checked_start(x_0, x_t), t)
        time = self._times(x_t, t)
        line, inside = self._located(x_t.to(torch.float64), time)
        slope, _, curvature = self._slopes(line, time)
        var = std.square()
        if self.reduction.map.fold:
            mean = mean * torch.tanh(line * mean / var)
        return torch.where(inside, ((mean - line) / var - curvature) / slope, math.nan).to(x_t.dtype)

    @property
    def attained(self) -> bool:
        """Whether paths reach an end of the domain, where E[g² ‖∇ log p‖²] is then infinite."""
        return self.reduction.map.fold

    @property
    def unbounded(self) -> bool:
        """Whether E|∇ log p|² is infinite, as it is where paths reach an end of the domain."""
        return self.reduction.map.fold

    def damping(self, x: Tensor, t: Tensor) -> Tensor:
        """A factor in [0, 1] that falls as |y| towards a fold, in float64: it makes g ∇ log p bounded there."""
        if not self.reduction.map.fold:
            return torch.ones((), dtype=torch.float64, device=x.device)
        time = self._times(x, t)
        line, _ = self._located(x.to(torch.float64), time)
        return (line.square() / (line.square() + self.inner.path(x, t).sigma.values.square())).sqrt()

    def _noisy_moments(self, x_0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        mean, std = self.line_moments(x_0, t)
        if std.device.type == "cpu":
            require_density(std)
        return mean, std


def reducible_or_reason(declaration: Declaration, values: Values) -> Reduction | str:
    """The change of the state that makes an SDE affine, or in a clause why there is none."""
    found = reduction_or_reason(declaration.f, declaration.g, values.numbers)
    if isinstance(found, Reduction):
        return present_only(values) if found.at_values and values.tensors else found
    if not declaration.state_dependent_noise:
        return SAME_STATE
    return f"no change of state tried makes it affine ({found})"


class PushForward:
    """The law of x = X(y, t) where y is Gaussian: the prior of a reducible SDE.

    Args:
        kernel: the SDE's kernel, which brings the map.
        law: of y, elementwise.
        t: the time.
    """

    def __init__(self, kernel: ReducibleKernel, law: Gaussian, t: float) -> None:
        self.kernel, self.law, self.t = kernel, law, t

    def sample(
        self,
        shape: tuple[int, ...],
        seed: int | torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Samples of the given ``shape`` (batch, *event)."""
        dtype = checked_dtype(dtype)
        line = self.law.sample(shape, seed, torch.float64, device)
        return self.kernel.restore_inside(line, self.t, dtype or torch.get_default_dtype())

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (batch,) in float64; -inf outside the domain."""
        x = checked_point(x, sides=2)
        self.law.require_event(tuple(x.shape[1:]))
        return self.kernel.pushed_log_prob(x, self.law.mean.to(x.device), self.law.std.to(x.device), self.t)

    def __repr__(self) -> str:
        return f"PushForward(x = {self.kernel.reduction.map.to_state}, y ~ {self.law})"
