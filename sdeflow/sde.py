"""The declaration that users hold: ``SDE(f, g, T)``, and all that follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from numbers import Real

import sympy as sp
import torch

from sdeflow.compile import compile_expressions
from sdeflow.dynamics import AnyScore, FlowODE, ReverseSDE
from sdeflow.errors import DeclarationError, ScheduleError
from sdeflow.gaussian import Gaussian
from sdeflow.kernel import Kernel
from sdeflow.model import Prior
from sdeflow.scores import as_score
from sdeflow.symbolic.declaration import Coefficient, declare, parameter_symbols
from sdeflow.symbolic.equations import Equation, forward
from sdeflow.symbolic.symbols import t, x

__all__ = ["SDE"]


class SDE:
    r"""dx = f(x, t) dt + g(x, t) dw on [0, T], data at t = 0; everything else is derived.

    Args:
        f: the drift: a SymPy expression in ``sdeflow.x`` and ``sdeflow.t``, a function of (x, t), or a number.
        g: the diffusion, likewise; its sign does not matter.
        T: the horizon, the last time at which f and g are finite.
        cutoff: the first time that training, solvers and likelihood visit. None: 0 where P0 > 0, else the
            time at which sigma / alpha = 2e-3 (without a kernel: T / 1000).
        params: values of the other symbols in f and g, keyed by Symbol or name.
        P0: the kernel's variance at t = 0; the model is then of data plus N(0, P0).
        calculus: "ito", or "stratonovich" for a declaration in that sense, which is converted.

    Attributes:
        declaration: what was declared, frozen.
        kind: "affine", with a Gaussian perturbation kernel, or "general".
        T, cutoff: as above.

    Raises:
        DeclarationError: for what is not a scalar SDE in x, t and the parameters.
        ScheduleError: for coefficients that are singular, complex, explosive or without noise on the horizon.

    Example:
        >>> import sympy as sp
        >>> from sdeflow import SDE, t, x
        >>> sde = SDE(f=-x, g=sp.sqrt(2), T=5)
        >>> sde
        SDE(dx = [-x] dt + sqrt(2) dw on [0, 5])
        >>> sde.kernel.mean, sde.kernel.var
        (x_0*exp(-t), 1 - exp(-2*t))
        >>> sde.flow_ode()
        FlowODE(dx/dt = -x - s(x, t))
    """

    def __init__(
        self,
        f: Coefficient,
        g: Coefficient,
        T: float = 1.0,
        cutoff: float | None = None,
        params: Mapping[sp.Symbol | str, float] | None = None,
        P0: float = 0.0,
        calculus: str = "ito",
        prior: Prior | None = None,
    ) -> None:
        resolved = parameter_symbols(params or {}, f, g)
        self.declaration = declare(f, g, T, cutoff, resolved, P0, calculus)
        self.values = {symbol: _value(value, symbol) for symbol, value in resolved.items()}
        self._prior = prior
        self._score: AnyScore = None
        if self.declaration.affine is not None:
            self.kernel  # noqa: B018  derived now, so that what is wrong with a schedule is said here
        else:
            self._require_finite_somewhere()

    def with_params(self, **values: float) -> SDE:
        """The same declaration, its affine split included, with other values of some parameters.

        Raises:
            DeclarationError: for a name that is not a parameter.
        """
        by_name = {symbol.name: symbol for symbol in self.declaration.parameters}
        unknown = set(values) - set(by_name)
        if unknown:
            raise DeclarationError(
                f"{', '.join(sorted(unknown))} is no parameter; there are: {', '.join(by_name) or 'none'}."
            )
        other = self._copy()
        other.values = {**self.values, **{by_name[n]: _value(v, by_name[n]) for n, v in values.items()}}
        for derived in ("kernel", "_cutoff"):
            other.__dict__.pop(derived, None)
        return other

    def bind(self, score: AnyScore) -> SDE:
        """A copy that carries ``score``: its ``reverse()`` and ``flow_ode()`` need none."""
        other = self._copy()
        other._score = None if score is None else as_score(score, self)
        return other

    @property
    def kind(self) -> str:
        """ "affine" or "general"."""
        return "general" if self.declaration.affine is None else "affine"

    @property
    def T(self) -> float:
        """The horizon."""
        return self.declaration.T

    @property
    def cutoff(self) -> float:
        """The first time that training, solvers and likelihood visit."""
        return self._cutoff

    @cached_property
    def _cutoff(self) -> float:
        return ReverseSDE(self).model.cutoff

    @cached_property
    def kernel(self) -> Kernel:
        """p(x_t | x_0), or NotAffineError where it is not Gaussian."""
        return Kernel(self.declaration, self.values)

    @property
    def weighting(self) -> sp.Expr:
        """lambda(t) = 1 / E|∇ log p(x_t | x_0)|² per coordinate, which is sigma(t)²."""
        return self.kernel.var

    @property
    def likelihood_weighting(self) -> sp.Expr:
        """g(t)², under which score matching bounds the likelihood (arXiv:2101.09258)."""
        self.declaration.require_affine("The likelihood weighting")
        return self.declaration.g**2

    @property
    def prior(self) -> Gaussian:
        """p(x_T | x_0 = 0) = N(offset(T), sigma(T)²); :meth:`prior_for` matches the data as well."""
        return self.kernel.marginal(0.0, 0.0, self.T)

    def prior_for(self, mean: torch.Tensor | float, std: torch.Tensor | float) -> Gaussian:
        """p(x_T) for data with this mean and standard deviation: N(alpha m + offset, alpha² c² + sigma²) at T."""
        return self.kernel.marginal(mean, std, self.T)

    def reverse(self, score: AnyScore = None, prior: Prior | None = None) -> ReverseSDE:
        """The reverse-time SDE; without a score, the equation itself."""
        return ReverseSDE(self, self._score if score is None else score, prior or self._prior)

    def flow_ode(self, score: AnyScore = None, prior: Prior | None = None) -> FlowODE:
        """The probability-flow ODE; without a score, the equation itself."""
        return FlowODE(self, self._score if score is None else score, prior or self._prior)

    @property
    def equation(self) -> Equation:
        """dx = f dt + g dw."""
        return forward(self.declaration.f, self.declaration.g)

    def __repr__(self) -> str:
        values = ", ".join(f"{symbol} = {value:g}" for symbol, value in self.values.items())
        noise = f", P0 = {self.declaration.P0:g}" if self.declaration.P0 else ""
        return f"SDE({self.equation} on [0, {self.T:g}]{noise}{f', {values}' if values else ''})"

    def _repr_latex_(self) -> str:
        return rf"$\displaystyle {self.equation.latex()}, \quad t \in [0, {self.T:g}]$"

    def _copy(self) -> SDE:
        other = object.__new__(SDE)
        other.__dict__.update(self.__dict__)
        return other

    def _require_finite_somewhere(self) -> None:
        """f and g of a general SDE must be finite at every time for some state."""
        times = torch.linspace(0.0, self.T, 1025, dtype=torch.float64)[1:]
        states = torch.tensor([-1.7, -0.6, 0.3, 0.9, 2.1], dtype=torch.float64)[:, None]
        for name in ("f", "g"):
            expr = getattr(self.declaration, name)
            values = compile_expressions(expr, (x, t), self.values, self.T)(states, times.expand(5, -1))
            bad = ~torch.isfinite(values.expand(5, len(times))).any(0)
            if bool(bad.any()):
                raise ScheduleError(
                    f"{name} = {expr} is not finite and real at t = {float(times[bad][0]):.4g}, for any x tried."
                )


def _value(value: object, symbol: sp.Symbol) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise DeclarationError(f"the parameter {symbol} must be a finite real number, not {value!r}.")
    return float(value)
