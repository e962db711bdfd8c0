"""f and g of a declaration, compiled for solvers: drifts of its equations, noise, and the states that solvers carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import sympy as sp
import torch
from torch import Tensor

from sdeflow.kernels.kinds import AnyKernel
from sdeflow.numerics.breakpoints import Features
from sdeflow.numerics.compile import compile_expressions
from sdeflow.numerics.linear import maps_of
from sdeflow.scores import DeclaredSDE
from sdeflow.solvers import Clock, Diffusion, make_clock
from sdeflow.solvers.clock import Grid
from sdeflow.symbolic.declaration import stratonovich_correction
from sdeflow.symbolic.derivative import derivative
from sdeflow.symbolic.equations import Equation
from sdeflow.symbolic.symbols import score_symbols, t

__all__ = ["Fields"]


class Fields:
    """The compiled functions of an SDE, whatever its score. What was compiled is kept.

    Args:
        sde: the SDE.

    Attributes:
        kernel: the SDE's kernel, of whichever kind.
        gaussian: the same where it is Gaussian, else None.
        centred: whether solvers carry u = x - offset(t) where there is an offset, rather than x; see :meth:`of_states`.
    """

    def __init__(self, sde: DeclaredSDE) -> None:
        self.centred = True
        self.declaration, self.values = sde.declaration, sde.values
        self.kernel: AnyKernel = sde.kernel
        self.gaussian = self.kernel.gaussian
        self.state = self.declaration.state
        self.T = self.declaration.T
        self._drifts: dict[Equation, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}

    @property
    def cutoff(self) -> float:
        """The first time that training and solvers visit, for the parameters' present values."""
        return self.kernel.cutoff

    def __getstate__(self) -> dict[str, object]:
        """What is pickled: all but the functions compiled for solves, which are compiled again when needed."""
        return {**self.__dict__, "_drifts": {}}

    def of_states(self) -> Fields:
        """The same for methods that carry x itself, in the kernel's basis, and have b(t) in their drift."""
        other = copy(self)
        other.centred, other._drifts = False, {}
        return other

    def drift(self, equation: Equation) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The compiled drift of ``equation``, a function of (x, t, s).

        Of an affine SDE it is that of the centred state u = x - offset(t) in the kernel's basis, which is
        A(t) u + C(t) s: b(t) drops out exactly (it would be an end-point singularity in the angle). Where the state
        is not ``centred``, it is A(t) x + b(t) + C(t) s.
        """
        if equation not in self._drifts:
            drift = self._compile_drift(equation)
            self._drifts[equation] = drift if self.centred else self._with_push(drift)
        return self._drifts[equation]

    def _with_push(self, drift: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        """``drift`` + b(t)."""
        kernel = self.gaussian
        if kernel is None or not kernel.has_offset:
            return drift

        def pushed(x: Tensor, time: Tensor, score: Tensor) -> Tensor:
            b = kernel.maps.offset(kernel.numbers.of_sde(time)[1].detach(), x, False)
            return drift(x, time, score) + b.to(dtype=x.dtype, device=x.device)

        return pushed

    def _compile_drift(self, equation: Equation) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if self.gaussian is None:
            return self.function_of_state(equation.drifts, with_score=True)
        scores = score_symbols(self.state)
        standing = {score: sp.Dummy(f"s{i}") for i, score in enumerate(scores)}
        rows = [drift.xreplace(standing) for drift in equation.drifts]
        A = [derivative(row, component) for row in rows for component in self.state]
        C = [derivative(row, standing[score]) for row in rows for score in scores]
        numbers = compile_expressions((*A, *C), (t,), self.values, self.T)
        if self.declaration.coupled or self.values.shape:
            return self._linear_drift(numbers)

        def elementwise(u: Tensor, time: Tensor, score: Tensor) -> Tensor:
            a, c = (float(v.detach()) for v in numbers(time))
            return torch.add(u * a, score, alpha=c) if a else score * c

        return elementwise

    def _linear_drift(self, numbers: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[..., Tensor]:
        k, coupled = len(self.state), self.declaration.coupled
        maps = maps_of(coupled)

        def linear(u: Tensor, time: Tensor, score: Tensor) -> Tensor:
            values = [v.to(u.device) for v in numbers(time.reshape((1,) * len(self.values.shape)))]
            if coupled:
                values = [torch.stack(half).reshape(k, k) for half in (values[: k * k], values[k * k :])]
            a, c = map(maps, values)
            return a(u) + c(score)

        return linear

    def offset(self, time: Tensor | float, like: Tensor) -> float | Tensor:
        """The offset that solvers take off states like ``like``; 0 without b(t), without a kernel, and of x itself."""
        if self.gaussian is None or not self.gaussian.has_offset or not self.centred:
            return 0.0
        level = self.gaussian.path(like, torch.as_tensor(time, dtype=torch.float64)).offset
        return float(level.detach()) if not level.ndim else level.to(dtype=like.dtype, device=like.device)

    def to_solver(self, x: Tensor, time: Tensor | float) -> Tensor:
        """The state as solvers carry it: its coefficients in the kernel's basis, and ``centred``."""
        return self.kernel.to_basis(x) - self.offset(time, x)

    def from_solver(self, u: Tensor, time: Tensor | float) -> Tensor:
        """The state behind what solvers carry."""
        return self.kernel.from_basis(u + self.offset(time, u) if self.kernel.has_offset and self.centred else u)

    def function_of_state(self, expressions: Sequence[sp.Expr], with_score: bool = False) -> Callable[..., Tensor]:
        """A compiled function of (x, t) or (x, t, s), one expression for each component of the result.

        Of an elementwise state x it returns what broadcasts to x (a number where x does not occur); of a coupled
        one the components along the second axis.
        """
        symbols = (*self.state, t, *(score_symbols(self.state) if with_score else ()))
        k = len(self.state)
        if not self.declaration.coupled:
            (expression,) = expressions
            if not with_score and not expression.has(*self.state):
                compiled = compile_expressions(expression, (t,), self.values, self.T)
                return lambda _, time: compiled(self._sided(time))
            # The state comes last, whose shape a constant takes.
            order = (t, *symbols[2:], symbols[0])
            compiled = compile_expressions(expression, order, self.values, self.T)
            return lambda x, time, *score: compiled(time, *score, x)
        order = (t, *symbols[k + 1 :], *self.state)
        compiled = compile_expressions(tuple(expressions), order, self.values, self.T)

        def coupled(x: Tensor, time: Tensor, *score: Tensor) -> Tensor:
            values = compiled(time, *(part for whole in score for part in whole.unbind(1)), *x.unbind(1))
            return torch.stack([value.expand_as(x[:, 0]).to(x.dtype) for value in values], dim=1)

        return coupled

    def diffusion(self, equation: Equation, event: tuple[int, ...]) -> Diffusion:
        """The diffusion of ``equation``, of flattened states of shape ``event``."""
        g = equation.noise_matrix
        k, m = g.shape
        correction = stratonovich_correction(g, self.state)
        moved = None if correction.is_zero_matrix else _flat(self.function_of_state(tuple(correction)), event)
        if self.declaration.diagonal:
            own = [g[i, i] if g[i, i].has(*self.state) else sp.Abs(g[i, i]) for i in range(k)]  # g(t): no sign
            return Diffusion(_flat(self.function_of_state(own), event), moved)
        columns = [self.function_of_state(tuple(g[:, j])) for j in range(m)]

        def matrix(y: Tensor, time: Tensor) -> Tensor:
            """(batch · coordinates, k, m): one k x m matrix for each coordinate of the event."""
            x = y.reshape(-1, *event)
            entries = torch.stack([column(x, time) for column in columns], dim=-1)
            return entries.movedim(1, -2).reshape(-1, k, m)

        return Diffusion(matrix, moved, k, m)

    def _sided(self, time: Tensor) -> Tensor:
        """A time with a side for each of the parameters' sides."""
        return time.reshape((1,) * len(self.values.shape)) if self.values.shape else time

    def clock(self, grid: Grid, scale: float) -> Clock:
        """The time variable, centred on data of that ``scale``."""
        if self.gaussian is None:
            return make_clock(grid, None, self.cutoff, self.T, scale, Features(self).breaks)
        if grid is not None and not isinstance(grid, str):
            return make_clock(grid, self.gaussian, self.cutoff, self.T, scale)
        kept, version = self.gaussian.clocks, self.values.version
        if (version, grid, scale) not in kept:  # up to some tenths of a second to build
            for old in [key for key in kept if key[0] != version]:
                del kept[old]
            kept[version, grid, scale] = make_clock(grid, self.gaussian, self.cutoff, self.T, scale)
        return kept[version, grid, scale]


def _flat(function: Callable[[Tensor, Tensor], Tensor], event: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of states as one of flattened states; what depends on t alone stays a number."""

    def flat(y: Tensor, t: Tensor) -> Tensor:
        value = function(y.reshape(-1, *event), t)
        return value.expand(len(y), *event).flatten(1) if value.ndim else value

    return flat
