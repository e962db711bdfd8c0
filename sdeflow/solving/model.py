"""An SDE with its score and its prior: what the reverse SDE, the flow and the likelihood share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DataError, ScoreError
from sdeflow.numerics.checks import OF_PRIOR, checked_dtype, checked_methods, checked_shape, checked_states
from sdeflow.numerics.compile import compile_expressions
from sdeflow.numerics.linear import Linear
from sdeflow.scores import DeclaredSDE, Score, ScoreFunction, as_score
from sdeflow.solvers import Clock, make_clock
from sdeflow.solvers.clock import Grid
from sdeflow.solving.prior_of import Prior, PriorOf
from sdeflow.symbolic.declaration import stratonovich_correction
from sdeflow.symbolic.derivative import derivative
from sdeflow.symbolic.equations import Equation
from sdeflow.symbolic.symbols import score_symbols, t

__all__ = ["Model"]


class Model:
    """A declaration, its score and its prior.

    Args:
        sde: the SDE.
        score: a score, any callable (x, t) -> ∇ log p_t(x), or None for equations alone.
        prior: p(x_T); None derives it from the data's moments, or reads it off the score at T.

    Attributes:
        kernel: the SDE's kernel, of whichever kind.
        gaussian: the same where it is Gaussian, else None.
    """

    def __init__(
        self, sde: DeclaredSDE, score: ScoreFunction | Callable[[Tensor, Tensor], Tensor] | None, prior: Prior | None
    ) -> None:
        self.declaration, self.values = sde.declaration, sde.values
        self.kernel = sde.kernel
        self.gaussian = self.kernel.gaussian
        self.state = self.declaration.state
        self._score = None if score is None else as_score(score, sde)
        self.prior = PriorOf(self.gaussian, self._score, checked_methods(prior, "prior", *OF_PRIOR), sde)
        self._drifts: dict[Equation, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
        self._clocks: dict[tuple[str | None, float], Clock] = {}
        self.T, self.cutoff = self.declaration.T, self.kernel.cutoff
        self.prior.warn_of_mismatch()

    def __getstate__(self) -> dict:
        """What is pickled: all but the functions compiled for solves, which are compiled again when needed."""
        return {**self.__dict__, "_drifts": {}, "_clocks": {}}

    def __copy__(self) -> Model:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def with_score(self, score: ScoreFunction) -> Model:
        """The same model with another score of its SDE; what was compiled, and the prior, are shared."""
        if score is self._score:
            return self
        return self._with(_score=score, prior=self.prior.of_score(score))

    def with_own_prior(self) -> Model:
        """The same model with the prior that follows from the data's moments or the score, whichever was given."""
        return self if self.gaussian is None else self._with(prior=self.prior.own())

    def of_batch(self, samples: int) -> Model:
        """The same model for a batch of ``samples`` samples, told at the start of a solve.

        Raises:
            DataError: where the score holds conditions of another number of samples.
        """
        score = self.score.of_batch(samples)
        return self._with(_score=score, prior=self.prior.of_batch(score, samples))

    def rows(self, index: Tensor | slice) -> Model:
        """The same model of some samples of the batch that :meth:`of_batch` named: the only place where it is cut.

        Args:
            index: numbers of samples, which may repeat, or a slice.
        """
        if isinstance(index, Tensor):
            index = index.cpu()
            if len(index) == self.samples and torch.equal(index, torch.arange(len(index))):
                return self
        return self._with(_score=self.score.rows(index), prior=self.prior.rows(index))

    def spread(self, count: int) -> Model:
        """The same model of ``count`` samples with the conditions of the batch, evenly."""
        batch = self.samples or self.score.samples or 1
        model, number = self.of_batch(batch), torch.arange(count)
        return model.rows(number % batch if batch <= count else number * batch // count)

    @property
    def samples(self) -> int | None:
        """How many samples the batch has, where :meth:`of_batch` or :meth:`rows` said so."""
        return self.prior.samples

    def _with(self, **parts: object) -> Model:
        other = copy.copy(self)
        other.__dict__.update(parts)
        return other

    @property
    def score(self) -> ScoreFunction:
        """The score, or a ScoreError where there is none."""
        if self._score is None:
            raise ScoreError("no score is bound to this equation: pass one, as in sde.reverse(score).")
        return self._score

    def drift(self, equation: Equation) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The compiled drift of ``equation``, a function of (x, t, s).

        Of an affine SDE it is that of the centred state u = x - offset(t) in the kernel's basis, which is
        A(t) u + C(t) s: b(t) drops out exactly (it would be an end-point singularity in the angle).
        """
        if equation not in self._drifts:
            self._drifts[equation] = self._compile_drift(equation)
        return self._drifts[equation]

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

        def linear(u: Tensor, time: Tensor, score: Tensor) -> Tensor:
            values = [v.to(u.device) for v in numbers(time.reshape((1,) * len(self.values.shape)))]
            if coupled:
                values = [torch.stack(half).reshape(k, k) for half in (values[: k * k], values[k * k :])]
            a, c = (Linear(v, coupled) for v in values)
            return a(u) + c(score)

        return linear

    def offset(self, time: Tensor | float, like: Tensor) -> float | Tensor:
        """The offset that solvers take off states like ``like``; 0 without b(t), and for an SDE without a kernel."""
        if not self.kernel.has_offset:
            return 0.0
        level = self.kernel.path(like, torch.as_tensor(time, dtype=torch.float64)).offset
        return float(level.detach()) if not level.ndim else level.to(dtype=like.dtype, device=like.device)

    def to_solver(self, x: Tensor, time: Tensor | float) -> Tensor:
        """The state as solvers carry it: its coefficients in the kernel's basis, centred."""
        return self.kernel.to_basis(x) - self.offset(time, x)

    def from_solver(self, u: Tensor, time: Tensor | float) -> Tensor:
        """The state behind what solvers carry."""
        level = self.offset(time, u)
        return self.kernel.from_basis(u if isinstance(level, float) and not level else u + level)

    def solver_score(self, u: Tensor, time: Tensor, dtype: torch.dtype) -> Tensor:
        """∇ log p_t of what solvers carry, the score asked in ``dtype``."""
        score = self.score(self.from_solver(u, time).to(dtype), time).to(u.dtype)
        return self.kernel.to_basis(score)

    def solver_inputs(self, event: tuple[int, ...], dtype: torch.dtype) -> dict[str, object]:
        """What a :class:`~sdeflow.solvers.Problem` needs for the methods that know the kernel."""
        given: dict[str, object] = {
            "kernel": self.gaussian, "event": event, "score": partial(self.solver_score, dtype=dtype),
        }  # fmt: skip
        if self.gaussian is not None:
            moments = self.score.data_moments()
            given["on_grid"] = partial(self.score.on_grid, dtype=dtype)
            given["scale"] = self.reference_scale()
            given["mean"] = 0.0 if moments is None else moments[0]
        return given

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

    def noise(self, equation: Equation, event: tuple[int, ...]) -> dict[str, object]:
        """What a :class:`~sdeflow.solvers.Problem` needs to know of the noise, for flattened states of ``event``."""
        g = equation.noise_matrix
        k, m = g.shape
        correction = stratonovich_correction(g, self.state)
        given: dict[str, object] = {"hint": self.declaration.domain_hint}
        if not correction.is_zero_matrix:
            given["correction"] = _flat(self.function_of_state(tuple(correction)), event)
        if self.declaration.diagonal:
            own = [g[i, i] if g[i, i].has(*self.state) else sp.Abs(g[i, i]) for i in range(k)]  # g(t): no sign
            given["diffusion"] = _flat(self.function_of_state(own), event)
            return given
        columns = [self.function_of_state(tuple(g[:, j])) for j in range(m)]

        def matrix(y: Tensor, time: Tensor) -> Tensor:
            """(batch · coordinates, k, m): one k x m matrix for each coordinate of the event."""
            x = y.reshape(-1, *event)
            entries = torch.stack([column(x, time) for column in columns], dim=-1)
            return entries.movedim(1, -2).reshape(-1, k, m)

        return {**given, "diffusion": matrix, "components": k, "motions": m}

    def _sided(self, time: Tensor) -> Tensor:
        """A time with a side for each of the parameters' sides."""
        return time.reshape((1,) * len(self.values.shape)) if self.values.shape else time

    def clock(self, grid: Grid) -> Clock:
        """The time variable, centred on the data's scale where it is known."""
        scale = self.reference_scale()
        if grid is not None and not isinstance(grid, str):
            return make_clock(grid, self.gaussian, self.cutoff, self.T, scale)
        if (grid, scale) not in self._clocks:  # some milliseconds to build
            self._clocks[grid, scale] = make_clock(grid, self.gaussian, self.cutoff, self.T, scale)
        return self._clocks[grid, scale]

    def reference_scale(self) -> float:
        """c of the Gaussian reference N(alpha m, alpha² c² + sigma²); any positive number is exact."""
        moments = self.score.data_moments()
        if moments is None:
            return 1.0
        std = moments[1].double()
        if self.declaration.coupled and std.ndim:
            std = std[[i for i in range(len(self.state)) if i not in self.declaration.auxiliary]]
        return float(std.square().mean().sqrt()) or 1.0

    def reference(self, like: Tensor) -> Tensor:
        """c of each coordinate, () or (*event): the isotropic scale, none for auxiliary components."""
        return torch.tensor(self.reference_scale(), dtype=torch.float64, device=like.device)

    # ---------------------------------------------------------------- prior

    @property
    def known_prior(self) -> Prior | None:
        """The prior, or None where it is still to be read off the score."""
        return self.prior.known

    def prior_for(self, like: Tensor) -> Prior:
        """The prior for states shaped as ``like`` (batch, *event); see :meth:`PriorOf.of`."""
        return self.prior.of(like)

    # ---------------------------------------------------------------- states

    def states(self, x: Tensor, name: str = "x") -> Tensor:
        """``x`` as finite states (batch, *event) that the score takes; see :mod:`sdeflow.numerics.checks`."""
        x = checked_states(x, name, None if isinstance(x, Tensor) or self._score is None else self._score.dtype)
        if self._score is not None:
            self.require_dtype(x)
        return x

    def require_dtype(self, x: Tensor) -> None:
        """Raises a DataError where the network's parameters and ``x`` differ in dtype."""
        ours = self.score.dtype
        if not isinstance(self.score.bare, Score) or ours in (None, x.dtype):
            return
        if not torch.is_autocast_enabled(x.device.type):
            raise DataError(
                f"x is {x.dtype} and the network {ours}: pass x.to({ours}), or convert the score with "
                f"score.to({x.dtype})."
            )

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of states where none is given: the network's."""
        return self.score.dtype or torch.get_default_dtype()

    def initial_state(
        self, shape: tuple[int, ...], seed: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> Tensor:
        """x_T from the prior; shape, dtype and device checked or taken from the score."""
        shape = checked_shape(shape)
        parameter = next(self.score.parameters(), None)
        holder = parameter if parameter is not None else next(self.score.buffers(), None)
        dtype = checked_dtype(dtype) or self.state_dtype
        if device is None:
            device = holder.device if holder is not None else "cpu"
        self.kernel.require_event(shape[1:])
        like = torch.empty((0, *shape[1:]), dtype=dtype, device=device)
        prior = checked_methods(self.prior_for(like), "prior", ("sample",), "sdeflow.Gaussian(mean, std)")
        return prior.sample(shape, seed=seed, dtype=dtype, device=device)


def _flat(function: Callable[[Tensor, Tensor], Tensor], event: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of states as one of flattened states; what depends on t alone stays a number."""

    def flat(y: Tensor, t: Tensor) -> Tensor:
        value = function(y.reshape(-1, *event), t)
        return value.expand(len(y), *event).flatten(1) if value.ndim else value

    return flat
