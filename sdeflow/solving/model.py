"""An SDE with its score and its prior: what the reverse SDE, the flow and the likelihood share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sdeflow.errors import DataError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.kinds import AnyKernel
from sdeflow.numerics.checks import OF_PRIOR, checked_dtype, checked_methods, checked_shape, checked_states
from sdeflow.numerics.parameters import Values
from sdeflow.scores import DeclaredSDE, Score, ScoreFunction, as_score
from sdeflow.solvers import Clock, Field, View
from sdeflow.solvers.clock import Grid
from sdeflow.solving.fields import Fields
from sdeflow.solving.plan import Plan
from sdeflow.solving.prior_of import Prior, PriorOf, require_score
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.equations import Equation

__all__ = ["Model"]


@dataclass(frozen=True, eq=False)
class Model:
    """A declaration, its score and its prior; see :meth:`of`.

    Attributes:
        fields: f and g, compiled.
        bound: the score, or None for equations alone.
        prior: p(x_T) as it is found.
    """

    fields: Fields
    bound: ScoreFunction | None
    prior: PriorOf

    @classmethod
    def of(
        cls, sde: DeclaredSDE, score: ScoreFunction | Callable[[Tensor, Tensor], Tensor] | None, prior: Prior | None
    ) -> Model:
        """The model of an SDE.

        Args:
            sde: the SDE.
            score: a score, any callable (x, t) -> ∇ log p_t(x), or None for equations alone.
            prior: p(x_T); None derives it from the data's moments, or reads it off the score at T.
        """
        fields, bound = Fields(sde), None if score is None else as_score(score, sde)
        found = PriorOf(fields.gaussian, bound, checked_methods(prior, "prior", *OF_PRIOR), sde)
        found.warn_of_mismatch()
        return cls(fields, bound, found)

    def with_score(self, score: ScoreFunction) -> Model:
        """The same model with another score of its SDE; what was compiled, and the prior, are shared."""
        return self if score is self.bound else Model(self.fields, score, self.prior.of_score(score))

    def with_own_prior(self) -> Model:
        """The same model with the prior that follows from the data's moments or the score, whichever was given."""
        return self if self.gaussian is None else replace(self, prior=self.prior.own())

    def carried_by(self, plan: Plan, clock: Clock) -> Model:
        """The same model as the solver of ``plan`` carries its states: the one place that decides it.

        Between given times a method that knows nothing of the kernel means its own formula in x and t. Else b(t) is
        taken out exactly; see :attr:`Fields.centred`.
        """
        plain = clock.given is not None and plan.steps is not None and not plan.solver.needs_kernel
        return Model(self.fields.of_states(), self.bound, self.prior) if plain else self

    def of_batch(self, samples: int) -> Model:
        """The same model for a batch of ``samples`` samples, told at the start of a solve.

        Raises:
            DataError: where the score holds conditions of another number of samples.
        """
        score = self.score.of_batch(samples)
        return Model(self.fields, score, self.prior.of_batch(score, samples))

    def rows(self, index: Tensor | slice) -> Model:
        """The same model of some samples of the batch that :meth:`of_batch` named: the only place where it is cut.

        Args:
            index: numbers of samples, which may repeat, or a slice.
        """
        if isinstance(index, Tensor):
            index = index.cpu()
            if len(index) == self.samples and torch.equal(index, torch.arange(len(index))):
                return self
        return Model(self.fields, self.score.rows(index), self.prior.rows(index))

    def spread(self, count: int) -> Model:
        """The same model of ``count`` samples with the conditions of the batch, evenly."""
        batch = self.samples or self.score.samples or 1
        model, number = self.of_batch(batch), torch.arange(count)
        return model.rows(number % batch if batch <= count else number * batch // count)

    @property
    def samples(self) -> int | None:
        """How many samples the batch has, where :meth:`of_batch` or :meth:`rows` said so."""
        return self.prior.samples

    @property
    def score(self) -> ScoreFunction:
        """The score, or a ScoreError where there is none."""
        return require_score(self.bound)

    # ---------------------------------------------------------------- of the fields

    @property
    def declaration(self) -> Declaration:
        """The SDE's declaration."""
        return self.fields.declaration

    @property
    def values(self) -> Values:
        """The values of its parameters."""
        return self.fields.values

    @property
    def kernel(self) -> AnyKernel:
        """Its kernel, of whichever kind."""
        return self.fields.kernel

    @property
    def gaussian(self) -> Kernel | None:
        """The same where it is Gaussian, else None."""
        return self.fields.gaussian

    @property
    def T(self) -> float:
        """The end of its horizon."""
        return self.fields.T

    @property
    def cutoff(self) -> float:
        """The first time at which its score is asked for."""
        return self.fields.cutoff

    def drift(self, equation: Equation) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """:meth:`Fields.drift`."""
        return self.fields.drift(equation)

    def to_solver(self, x: Tensor, time: Tensor | float) -> Tensor:
        """:meth:`Fields.to_solver`."""
        return self.fields.to_solver(x, time)

    def from_solver(self, u: Tensor, time: Tensor | float) -> Tensor:
        """:meth:`Fields.from_solver`."""
        return self.fields.from_solver(u, time)

    def clock(self, grid: Grid) -> Clock:
        """The time variable, centred on the data's scale where it is known."""
        return self.fields.clock(grid, self.reference_scale())

    # ---------------------------------------------------------------- for solvers

    def solver_score(self, u: Tensor, time: Tensor, dtype: torch.dtype) -> Tensor:
        """∇ log p_t of what solvers carry, the score asked in ``dtype``."""
        score = self.score(self.fields.from_solver(u, time).to(dtype), time).to(u.dtype)
        return self.fields.kernel.to_basis(score)

    def field(self, equation: Equation, event: tuple[int, ...], dtype: torch.dtype, noisy: bool = False) -> Field:
        """The equation of flattened states (batch, n) as solvers carry them, the score asked in ``dtype``.

        Args:
            equation: the reverse SDE or the flow.
            event: the shape of one state.
            dtype: in which the score is called.
            noisy: whether it has its noise: whether it is the reverse SDE.
        """
        drift, score = self.fields.drift(equation), self.solver_score

        def flat(y: Tensor, t: Tensor) -> Tensor:
            u = y.reshape(-1, *event)
            return drift(u, t, score(u, t, dtype)).flatten(1)

        return Field(flat, self.fields.diffusion(equation, event) if noisy else None)

    def view(self, event: tuple[int, ...], dtype: torch.dtype) -> View:
        """The same for methods that know the kernel."""
        score = partial(self.solver_score, dtype=dtype)
        if self.gaussian is None:
            return View(event, score)
        moments, on_grid = self.score.data_moments(), partial(self.score.on_grid, dtype=dtype)
        mean = 0.0 if moments is None else moments[0]
        return View(event, score, self.gaussian, on_grid, mean, self.reference_scale())

    def reference_scale(self) -> float:
        """c of the Gaussian reference N(alpha m, alpha² c² + sigma²); any positive number is exact."""
        moments = self.score.data_moments()
        if moments is None:
            return 1.0
        std = moments[1].double()
        if self.declaration.coupled and std.ndim:
            std = std[[i for i in range(len(self.declaration.state)) if i not in self.declaration.auxiliary]]
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

    def states(self, x: object, name: str = "x") -> Tensor:
        """``x`` as finite states (batch, *event) that the score takes; see :mod:`sdeflow.numerics.checks`."""
        x = checked_states(x, name, None if isinstance(x, Tensor) or self.bound is None else self.bound.dtype)
        if self.bound is not None:
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
