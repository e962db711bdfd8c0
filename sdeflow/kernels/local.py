r"""The law of a short step of any SDE: local linearisation.

Over a step of length h from x_s the SDE is linearised at x_s: with J = ∂f/∂x and Q = g gᵀ, the step is N(m, P),

    m = x_s + ∫_0^h e^{Ju} du (f + h/4 tr(Q ∇²f)),     P = ∫_0^h e^{Ju} Q e^{Jᵀu} du,

which is Ozaki's (1992) with the curvature of Shoji & Ozaki (1998), to the leading order in h. Time is frozen at the
middle of the step; Q too is taken there. J is never inverted, and P need not be: where noise drives some components
only, it reaches the others through J.

Of an SDE without an exact kernel this is all that is known of p(x_t | x_s): its ``kernel`` is a :class:`LocalKernel`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from typing import NoReturn

import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import ScheduleError
from sdeflow.kernels.notgaussian import NotGaussian
from sdeflow.numerics.compile import Compiled, compile_expressions
from sdeflow.numerics.linear import Linear, maps_of, per_sample
from sdeflow.numerics.parameters import Declared, Values
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.derivative import derivative
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["LocalKernel", "LocalLaw", "semidefinite_root"]

_SMALL = 0.25  # |J h| below which the series converges to rounding in _TERMS terms
_TERMS = 12
_SINGULAR = 1e-6  # of a pivot, relative to the component's standard deviation
_FIRST = 1e-3  # of the horizon: the first time that is visited where P0 = 0 and none was declared

UNKNOWN = frozenset({
    "mean", "var", "std", "rules", "shown", "moments", "sample", "advance", "transition", "log_prob", "score", "lift",
    "path", "scale", "data_level", "of_state", "equation", "numbers", "components", "bounded_log_snr",
    "log_snr_falls", "require_times", "times_for", "inner", "reduction", "transport", "restore", "restore_inside",
    "line_moments", "line_score", "pushed_moments", "pushed_log_prob", "pearson", "family", "shape", "ends",
    "attained", "unbounded", "damping", "require_inside", "pinned", "maps", "clocks", "bounded_log_snr_and_rate",
    "left_of",
})  # fmt: skip
"""What exact kernels tell, and a :class:`LocalKernel` cannot."""


class LocalLaw:
    """N(m, P), the law of a short step from x at t to t + h; see the module.

    Vectors are shaped as states; matrices are (batch, ...) numbers elementwise, (batch, ..., k, k) of a coupled state.

    Args:
        sde: the declaration, with values of its parameters.
    """

    def __init__(self, sde: Declared) -> None:
        declaration = sde.declaration
        state, f, gram, g = declaration.state, declaration.drifts, declaration.gram, declaration.diffusions
        self.coupled, self.k, self.motions = declaration.coupled, len(state), len(g) // len(state)
        self.maps = maps_of(self.coupled)
        self._additive = not declaration.state_dependent_noise
        self._entries = [divmod(i, self.motions) for i, entry in enumerate(g) if entry != 0]
        pairs = [(i, j) for i in range(self.k) for j in range(self.k)]
        first = [[derivative(row, component) for component in state] for row in f]
        slopes = [_regular(slope) for row in first for slope in row]
        curvatures = [_regular(sum(gram[i, j] * derivative(row[i], state[j]) for i, j in pairs)) for row in first]
        euler, local, spread = (*f, *(e for e in g if e != 0)), (*f, *slopes, *curvatures), tuple(gram)
        self._euler, self._local, self._gram = (
            compile_expressions(e, (time_symbol, *state), sde.values, declaration.T) for e in (euler, local, spread)
        )

    def increment(self, x: Tensor, t: Tensor, h: Tensor, motions: Tensor) -> Tensor:
        """f h + g sqrt(h) motions, the step of Euler-Maruyama for standard normal motions (batch, m, ...)."""
        values = self._values(self._euler, x, t)
        h = self._side(h, x).to(x.dtype)
        if not self.coupled:
            return values[0] * h + values[1] * (h.sqrt() * motions)
        rows, dw = [f * h for f in values[: self.k]], (h[:, None].sqrt() * motions).unbind(1)
        for (i, j), g in zip(self._entries, values[self.k :], strict=True):
            rows[i] = rows[i] + g * dw[j]
        return torch.stack(rows, dim=1)

    def gram(self, x: Tensor, t: Tensor) -> Tensor:
        """g gᵀ."""
        return self._matrix(self._values(self._gram, x, t))

    def euler(self, x: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Linear]:
        """x + f h, and a root of g gᵀ h."""
        f = self._values(self._euler, x, t)[: self.k]
        mean = x + self._vector(self._column(f) * self._wide(h, x))
        return mean, self._root(self.gram(x, t) * self._wide(h, x))

    def __call__(self, x: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Linear]:
        """m, and a root of P, for x in float64 and t, h (batch,).

        Raises:
            ScheduleError: where P is singular.
        """
        mean, P = self.moments(x, t, h)
        return mean, self._root(P)

    def moments(self, x: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """m and P."""
        middle, length = t + 0.5 * h, self._wide(h, x)
        values, k = self._values(self._local, x, middle), self.k
        f, J, c = self._column(values[:k]), self._matrix(values[k : k + k * k]), self._column(values[k + k * k :])
        f = f + 0.25 * length * c
        Q = self.gram(x if self._additive else x + self._vector(0.5 * length * f), middle)
        shift, P = (_integrals if self.coupled else _scalar_integrals)(J * length, f * length, Q * length)
        return x + self._vector(shift), P

    def scaling(self, factor: Tensor, x: Tensor) -> Linear:
        """The map that multiplies states like ``x`` by a number for each sample."""
        return self.maps.identity(x).to(x.device).times_each(factor, x)

    def _values(self, compiled: Compiled[tuple[Tensor, ...]], x: Tensor, t: Tensor) -> list[Tensor]:
        """The compiled expressions at x (batch, ...) and t (batch,), each shaped as a component."""
        components = x.unbind(1) if self.coupled else (x,)
        values = compiled(self._side(t, x), *components)
        return [value.expand_as(components[0]).to(x.dtype) for value in values]

    def _side(self, t: Tensor, x: Tensor) -> Tensor:
        """t, shaped to go with a component, in its own dtype: single precision has too few digits for short pulses."""
        like = x[:, 0] if self.coupled else x
        return t if t.ndim == 0 else per_sample(t, like)

    def _wide(self, h: Tensor, x: Tensor) -> Tensor:
        """h, shaped to multiply columns and matrices."""
        side = self._side(h, x)
        return side[..., None, None] if self.coupled else side

    def _column(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values, dim=-1)[..., None] if self.coupled else values[0]

    def _matrix(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values, dim=-1).unflatten(-1, (self.k, self.k)) if self.coupled else values[0]

    def _vector(self, column: Tensor) -> Tensor:
        """A column as a state."""
        return column[..., 0].movedim(-1, 1) if self.coupled else column

    def _root(self, P: Tensor) -> Linear:
        """The Cholesky factor of P."""
        if self.coupled:
            root, failed = torch.linalg.cholesky_ex(P)
            pivots = root.diagonal(dim1=-2, dim2=-1) / P.diagonal(dim1=-2, dim2=-1).sqrt()
            dense = (failed == 0).all() & (pivots > _SINGULAR).all()
        else:
            root = P.clamp_min(0).sqrt()
            dense = (root > 0).all()
        if not bool(dense):
            raise ScheduleError(
                "a short step of this SDE has no density: its noise vanishes at some state that paths visit, or never "
                "reaches some component."
            )
        return self.maps(root)


class LocalKernel(NotGaussian):
    """The kernel of an SDE that has no exact one: of p(x_t | x_s) short steps alone are known.

    Whatever an exact kernel tells beyond them (``alpha``, ``moments``, ``sample``, ``score``, ...) raises a
    :class:`~sdeflow.errors.NotAffineError` that says why no exact kernel was found.

    Args:
        declaration: dx = f dt + g dw.
        values: numbers and tensors of its parameters.
        refusals: why each better way does not serve this SDE, a clause each, in the order of
            :data:`sdeflow.kernels.kinds.WAYS`.

    Attributes:
        kind: "general".
        form: "none": there are no moments in closed form or by quadrature.
        T: the horizon.
        cutoff: the first time that training and solvers visit: as declared, or 0 where P0 > 0 in every component, else
            T / 1000.
    """

    kind = "general"
    form = "none"
    exact = False

    def __init__(
        self,
        declaration: Declaration,
        values: Mapping[sp.Symbol, float | Tensor] | None = None,
        refusals: tuple[str, ...] = (),
    ) -> None:
        self.declaration, self.refusals = declaration, refusals
        self.values = Values.of(values)
        self.T, self.coupled = declaration.T, declaration.coupled

    @property
    def cutoff(self) -> float:
        """The first time that training and solvers visit."""
        if self.declaration.cutoff is not None:
            return self.declaration.cutoff
        return 0.0 if all(v > 0 for v in self.declaration.initial_variances) else _FIRST * self.T

    @property
    def score_from(self) -> float:
        """0: nothing is known of the score's size at early times."""
        return 0.0

    @cached_property
    def law(self) -> LocalLaw:
        """N(m, P) of a short step, compiled when first asked for: ``mean, root = kernel.law(x, t, h)``."""
        return LocalLaw(self)

    @property
    def also(self) -> str:
        """Why no other kernel than a Gaussian one serves, in a clause."""
        return ", and ".join(self.refusals[1:])

    def __getattr__(self, name: str) -> NoReturn:
        if name in UNKNOWN:
            self.require_gaussian(f"kernel.{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def with_values(self, values: Values) -> None:
        """None: other values may have an exact kernel, and are looked at anew."""

    def with_cutoff(self, declaration: Declaration) -> LocalKernel:
        """The kernel of the same declaration with another cutoff."""
        return LocalKernel(declaration, self.values, self.refusals)

    def __repr__(self) -> str:
        return f"LocalKernel(short steps alone, for {'; '.join(filter(None, (self.declaration.obstacle, self.also)))})"

    def __reduce__(self) -> tuple[object, ...]:
        return LocalKernel, (self.declaration, self.values, self.refusals)

    def __deepcopy__(self, memo: dict[int, object]) -> LocalKernel:
        """Copies of a score share its kernel, unless they bring their own learned parameters."""
        values = copy.deepcopy(self.values, memo)
        return self if values is self.values else LocalKernel(self.declaration, values, self.refusals)


def _scalar_integrals(z: Tensor, f: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """∫ e^{zu} du f and ∫ e^{2zu} du Q over [0, 1]."""
    return f * _phi(z), Q * _phi(2.0 * z)


def _phi(z: Tensor) -> Tensor:
    """(e^z - 1) / z."""
    small = z.abs() < 1e-8
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1.0 + 0.5 * z, torch.expm1(safe) / safe)


def _integrals(A: Tensor, f: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """∫ e^{Au} du f and ∫ e^{Au} Q e^{Aᵀu} du over [0, 1], of k x k matrices, without inverting A.

    By Taylor series over a part 2^-n of the step, which is then doubled n times: E <- E², P <- P + E P Eᵀ.
    """
    size = float(A.abs().sum(-1).max())
    n = max(0, math.ceil(math.log2(size / _SMALL))) if size > 0 else 0
    scale = 0.5**n
    A, f, Q = A * scale, f * scale, Q * scale
    E = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    shift, P, of_E = f, Q, E
    for i in range(1, _TERMS):
        of_E, f = A @ of_E / i, A @ f / (i + 1)
        Q = A @ Q
        Q = (Q + Q.mT) / (i + 1)
        E, shift, P = E + of_E, shift + f, P + Q
    for _ in range(n):
        shift, P, E = shift + E @ shift, P + E @ P @ E.mT, E @ E
    return shift, P


def semidefinite_root(gram: Linear) -> Linear:
    """A root of g gᵀ, which may be singular; 0 where it does not exist."""
    return gram.of(torch.nan_to_num(gram.values, 0.0, 0.0, 0.0)).root


def _regular(expression: sp.Expr) -> sp.Expr:
    """A derivative without its impulses, at kinks and jumps of f, that no sample meets."""
    return expression.replace(sp.DiracDelta, lambda *_: sp.Integer(0)).replace(
        lambda e: isinstance(e, sp.Derivative) and e.expr.has(sp.sign, sp.Heaviside), lambda _: sp.Integer(0)
    )
