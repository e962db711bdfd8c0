r"""The reverse-time SDE and the probability-flow ODE of a declaration, bound to a score.

    reverse:  dx = [f - ∇·(g gᵀ) - g gᵀ s] dt + g dw̄          flow:  dx/dt = f - ½ ∇·(g gᵀ) - ½ g gᵀ s

Both carry noise at t = T to data at t = cutoff with the same marginals. They print as equations, give
their ``drift`` and ``diffusion`` as SymPy, and solve themselves once they have a score. A sample at the
cutoff follows the model whose density ``FlowODE.log_prob`` measures; ``denoise=True`` replaces it by
E[x_0 | x], which looks cleaner and has another law.

``solve`` returns a :class:`~sdeflow.solving.solution.Solution`; ``sample``, ``encode`` and ``decode`` take the same
options (:mod:`sdeflow.solving.options`) and return its tensors alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NoReturn, overload

import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DataError, OptionError
from sdeflow.likelihood import LogProb, bits, measure
from sdeflow.likelihood.bounds import BoundOptions, Elbo, ElboOptions, KLBound, elbo, kl_bound
from sdeflow.likelihood.options import BitsOptions, DataOptions, LogProbOptions
from sdeflow.numerics.checks import checked_count, checked_dtype, checked_flag, checked_shape
from sdeflow.numerics.noise import resolve_seed
from sdeflow.numerics.options import takes
from sdeflow.scores import DeclaredSDE, ScoreFunction
from sdeflow.solvers import Exponential, Solver, resolve
from sdeflow.solving.gradients import is_meant
from sdeflow.solving.latents import spherical
from sdeflow.solving.model import Model
from sdeflow.solving.options import DrawOptions, NoiseOptions, Options, WayOptions
from sdeflow.solving.pilot import Pilot, pilot
from sdeflow.solving.prior_of import Prior
from sdeflow.solving.run import run
from sdeflow.solving.solution import Answer, Solution
from sdeflow.solving.support import within
from sdeflow.symbolic.equations import Equation, probability_flow, reverse_time

if TYPE_CHECKING:
    from typing_extensions import TypeIs, Unpack

__all__ = ["FlowODE", "ReverseSDE"]

AnyScore = ScoreFunction | Callable[[Tensor, Tensor], Tensor] | None
AnySolver = str | Solver | None
Shape = tuple[int, ...]
_OF_THE_OTHER = {
    **{("ReverseSDE", name): f"the flow, sde.flow_ode(score).{name}" for name in (
        "log_prob", "likelihood", "data_log_prob", "bits_per_dim", "encode", "decode", "interpolate",
        "round_trip_error",
    )},
    **{("FlowODE", name): f"the reverse SDE, sde.reverse(score).{name}" for name in ("elbo", "kl_bound")},
}  # fmt: skip
No = Literal[False]
Yes = Literal[True]


class _Bound:
    """An equation with its model: display, and the parts that both equations share."""

    def __init__(self, equation: Equation, model: Model) -> None:
        self.equation = equation
        self.model = model

    @property
    def drift(self) -> sp.Expr:
        """The factor of dt, SymPy, with s(x, t) for the score; dt < 0 for the reverse SDE."""
        return self.equation.drift

    @property
    def diffusion(self) -> sp.Expr:
        """The factor of the noise, SymPy; 0 for the flow."""
        return self.equation.diffusion

    @property
    def prior(self) -> Prior | None:
        """p(x_T) as used; None while it is still to be read off the score, at the first solve."""
        return self.model.known_prior

    def pilot(
        self,
        event: Shape,
        solver: AnySolver = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Pilot:
        """The grid that ``grid="pilot"`` takes for states of shape ``event``, and what its measurement cost.

        See :mod:`sdeflow.solving.pilot`. It is measured once for a score and solver, here or at the first solve.
        """
        chosen = Exponential() if solver is None else resolve(solver, "ode" if self.equation.diffusion == 0 else "sde")
        like = self.model.initial_state((1, *event), 0, dtype, device)
        return pilot(self.model, chosen, like)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.equation})"

    def _repr_latex_(self) -> str:
        return self.equation._repr_latex_()

    def _drawn(self, shape: Shape, options: Options, noisy: bool) -> Solution:
        """Solved from draws of the prior, with noise on the way where it is ``noisy``."""
        seed, model = resolve_seed(options.seed), self.model.of_batch(checked_shape(shape)[0])
        dtype = checked_dtype(options.dtype) or model.state_dtype

        def draw(seed: int, rows: Tensor | None) -> Solution:
            """The samples ``rows`` of the batch, all where it is None."""

            def start() -> Tensor:
                x = model.initial_state(shape, seed, dtype, options.device)
                model.require_dtype(x)
                return x if rows is None else x[rows]

            part = model if rows is None else model.rows(rows)
            return run(part, self.equation, start, dtype, options, seed=seed if noisy else None, rows=rows)

        return draw(seed, None) if options.support is None else within(draw, seed, options.support, options.reject)

    def __getattr__(self, name: str) -> NoReturn:
        theirs = _OF_THE_OTHER.get((type(self).__name__, name))
        hint = "" if theirs is None else f": that is of {theirs}"
        raise AttributeError(f"{type(self).__name__} has no attribute {name}{hint}.")


class ReverseSDE(_Bound):
    """The reverse-time SDE; see :func:`sdeflow.symbolic.equations.reverse_time`.

    Args:
        sde: the declaration.
        score: its score, or None for the equation alone.
        prior: p(x_T), where it should not follow from the data's moments or the score.
    """

    def __init__(self, sde: DeclaredSDE, score: AnyScore = None, prior: Prior | None = None) -> None:
        super().__init__(reverse_time(sde.declaration), Model.of(sde, score, prior))

    @takes(NoiseOptions, Options)
    def solve(
        self, shape: Shape, solver: AnySolver = None, steps: int | None = None, *, trajectory: bool = False,
        denoise: bool = False, return_denoised: bool = False, **options: Unpack[NoiseOptions],
    ) -> Solution:  # fmt: skip
        """Solves the reverse SDE from draws of the prior to t = cutoff.

        Without a Gaussian kernel a step may lead out of the domain where f and g are real (x < 0 for √x): f, g and the
        score are then asked for at the nearest state within, and states are shown there (truncation).

        Args:
            shape: (batch, *event).
            solver: a name that ``sdeflow.solvers.names_for("sde")`` lists, or a solver object; by default that of
                :func:`sdeflow.solving.plan.default_solver`.
            steps: of a solver of fixed steps; without a solver, the number of calls of the score, which has a default.
                A solver that is given a tensor for ``grid`` may do without: it takes the steps between its times.
            trajectory: whether to keep the state after each step and its time.
            denoise: whether E[x_0 | x] takes the place of the state at the end (Tweedie).
            return_denoised: whether to find E[x_0 | x_t] of each state returned as well. It takes a call of the score
                for each, beside those of the solver.
            options: see :class:`~sdeflow.solving.options.NoiseOptions`.

        Raises:
            OptionError: for an option of another name.
            TypeError, ValueError: for an option that makes no sense, or does not fit the solver or the SDE.
            NotAffineError: for denoised predictions of an SDE without a Gaussian kernel.
            SolverError: where the solve went wrong, with the time, calls and samples.
        """
        asked = Options(solver, steps, trajectory, denoise, return_denoised, **options)
        return self._drawn(shape, asked, noisy=True)

    @overload
    def sample(
        self, shape: Shape, solver: AnySolver = None, steps: int | None = None, *, trajectory: No = False,
        denoise: bool = False, return_denoised: No = False, **options: Unpack[NoiseOptions],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def sample(
        self, shape: Shape, solver: AnySolver = None, steps: int | None = None, *, trajectory: bool = False,
        denoise: bool = False, return_denoised: bool = False, **options: Unpack[NoiseOptions],
    ) -> Answer: ...  # fmt: skip

    @takes(NoiseOptions, Options)
    def sample(
        self, shape: Shape, solver: AnySolver = None, steps: int | None = None, *, trajectory: bool = False,
        denoise: bool = False, return_denoised: bool = False, **options: Unpack[NoiseOptions],
    ) -> Answer:  # fmt: skip
        """Samples at t = cutoff: what :meth:`solve` finds, as tensors.

        Args:
            shape: (batch, *event).
            solver, steps, trajectory, denoise, return_denoised, options: as of :meth:`solve`.

        Returns:
            x (batch, *event), or as asked for (x, denoised), (states, times), (states, times, denoised): states
            (steps + 1, batch, *event) from t = T to the cutoff, both included, their times (steps + 1,) in float64, and
            denoised predictions shaped as the states.
        """
        asked = Options(solver, steps, trajectory, denoise, return_denoised, **options)
        return self._drawn(shape, asked, noisy=True).asked_for

    @takes(ElboOptions, elbo)
    def elbo(self, x: Tensor, **options: Unpack[ElboOptions]) -> Elbo:
        """A lower bound on log p of this SDE's samples, in nats; see :func:`sdeflow.likelihood.bounds.elbo`."""
        return elbo(self.model, x, **options)

    @takes(BoundOptions, kl_bound)
    def kl_bound(self, data: Tensor, score_of_data: AnyScore = None, **options: Unpack[BoundOptions]) -> KLBound:
        """An upper bound on KL(data || this SDE's samples), in nats; see :func:`sdeflow.likelihood.bounds.kl_bound`."""
        return kl_bound(self.model, data, score_of_data, **options)


class FlowODE(_Bound):
    """The probability-flow ODE; see :func:`sdeflow.symbolic.equations.probability_flow`.

    Args:
        sde: the declaration.
        score: its score, or None for the equation alone.
        prior: p(x_T), where it should not follow from the data's moments or the score.
    """

    def __init__(self, sde: DeclaredSDE, score: AnyScore = None, prior: Prior | None = None) -> None:
        super().__init__(probability_flow(sde.declaration), Model.of(sde, score, prior))

    @takes(DrawOptions, Options)
    def solve(
        self, z: Shape | Tensor, solver: AnySolver = None, steps: int | None = None, *, encode: bool = False,
        trajectory: bool = False, denoise: bool = False, return_denoised: bool = False, gradient: str | None = None,
        **options: Unpack[DrawOptions],
    ) -> Solution:  # fmt: skip
        """Solves the flow from z = x_T to t = cutoff, or with ``encode`` the other way.

        Args:
            z: (batch, *event); or the shape of draws from the prior.
            solver: a name that ``sdeflow.solvers.names_for("ode")`` lists, or a solver object; by default dopri5, and
                with ``steps`` that of :func:`sdeflow.solving.plan.default_solver`.
            steps: of a solver of fixed steps; without a solver, the number of calls of the score.
            encode: whether ``z`` is a state x at t = cutoff, and x_T is to be found.
            trajectory: whether to keep the state after each step and its time; of an adaptive method, after each step
                that it accepted.
            denoise, return_denoised: as of :meth:`ReverseSDE.solve`; not with ``encode``.
            gradient: see :class:`~sdeflow.solving.options.WayOptions`; of a given state.
            options: see :class:`~sdeflow.solving.options.DrawOptions`; ``seed``, ``dtype`` and ``device`` are of draws.

        Raises:
            DataError: for a state that is not a finite floating tensor (batch, *event).
            OptionError: for an option of another name, or one that is of draws alone or of states alone.
            TypeError, ValueError, SolverError: as :meth:`ReverseSDE.solve`.
            ValueError, ScoreError: where a gradient is asked for and cannot be had.
        """
        asked = Options(solver, steps, trajectory, denoise, return_denoised, gradient=gradient, **options)
        checked_flag(encode, "encode")
        if _is_shape(z):
            _refused("draws from the prior", encode=encode, gradient=gradient)
            return self._drawn(z, asked, noisy=False)
        of_draws = {name: getattr(asked, name) for name in ("seed", "dtype", "device", "support", "reject")}
        _refused("a given state", **of_draws)
        if encode:
            _refused("encoding", denoise=denoise, return_denoised=return_denoised)
        return self._transported(z, asked, backward=not encode)

    @overload
    def sample(
        self, shape: Shape, solver: AnySolver = None, steps: int | None = None, *, trajectory: No = False,
        denoise: bool = False, return_denoised: No = False, **options: Unpack[DrawOptions],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def sample(
        self, shape: Shape, solver: AnySolver = None, steps: int | None = None, *, trajectory: bool = False,
        denoise: bool = False, return_denoised: bool = False, **options: Unpack[DrawOptions],
    ) -> Answer: ...  # fmt: skip

    @takes(DrawOptions, Options)
    def sample(
        self, shape: Shape, solver: AnySolver = None, steps: int | None = None, *, trajectory: bool = False,
        denoise: bool = False, return_denoised: bool = False, **options: Unpack[DrawOptions],
    ) -> Answer:  # fmt: skip
        """Samples at t = cutoff: :meth:`decode` of draws from the prior (batch, *event).

        For the options see :meth:`solve`; what is returned is as of :meth:`ReverseSDE.sample`.
        """
        asked = Options(solver, steps, trajectory, denoise, return_denoised, **options)
        return self._drawn(shape, asked, noisy=False).asked_for

    @overload
    def decode(
        self, z: Tensor, solver: AnySolver = None, steps: int | None = None, *, trajectory: No = False,
        denoise: bool = False, return_denoised: No = False, **options: Unpack[WayOptions],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def decode(
        self, z: Tensor, solver: AnySolver = None, steps: int | None = None, *, trajectory: bool = False,
        denoise: bool = False, return_denoised: bool = False, **options: Unpack[WayOptions],
    ) -> Answer: ...  # fmt: skip

    @takes(WayOptions, Options)
    def decode(
        self, z: Tensor, solver: AnySolver = None, steps: int | None = None, *, trajectory: bool = False,
        denoise: bool = False, return_denoised: bool = False, **options: Unpack[WayOptions],
    ) -> Answer:  # fmt: skip
        """x at t = cutoff from z = x_T, shaped as z: what :meth:`solve` finds, as tensors.

        For the arguments see :meth:`solve`, and :class:`~sdeflow.solving.options.WayOptions`; what is returned is as of
        :meth:`ReverseSDE.sample`.
        """
        asked = Options(solver, steps, trajectory, denoise, return_denoised, **options)
        return self._transported(z, asked, backward=True).asked_for

    @overload
    def encode(
        self, x: Tensor, solver: AnySolver = None, steps: int | None = None, *, trajectory: No = False,
        **options: Unpack[WayOptions],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def encode(
        self, x: Tensor, solver: AnySolver = None, steps: int | None = None, *, trajectory: bool = False,
        **options: Unpack[WayOptions],
    ) -> Answer: ...  # fmt: skip

    @takes(WayOptions, Options)
    def encode(
        self, x: Tensor, solver: AnySolver = None, steps: int | None = None, *, trajectory: bool = False,
        **options: Unpack[WayOptions],
    ) -> Answer:  # fmt: skip
        """z = x_T from x at t = cutoff, shaped as x, not whitened. Arguments as :meth:`decode`; times increase."""
        return self._transported(x, Options(solver, steps, trajectory, **options), backward=False).asked_for

    def _transported(self, x: Tensor, options: Options, *, backward: bool) -> Solution:
        """The flow between T and cutoff, from x on."""
        x = self.model.states(x, "z" if backward else "x")
        graph = is_meant(options.gradient, x)
        return run(
            self.model.of_batch(len(x)), self.equation, lambda: x, x.dtype, options, backward=backward, graph=graph
        )

    @takes(WayOptions, Options)
    def round_trip_error(
        self, x: Tensor, solver: AnySolver = None, steps: int | None = None, **options: Unpack[WayOptions]
    ) -> Tensor:
        """How far decode(encode(x)) is from x in each sample, (batch,): the root mean square over the event.

        Args:
            x: (batch, *event).
            solver, steps, options: of both ways, as of :meth:`encode`.
        """
        x = self.model.states(x)
        there = self.encode(x, solver, steps, **options)
        back = self.decode(there, solver, steps, **options)
        return (back - x).double().flatten(1).square().mean(1).sqrt()

    @takes(WayOptions, Options)
    def interpolate(
        self, x_a: Tensor, x_b: Tensor, points: int = 9, solver: AnySolver = None, steps: int | None = None,
        **options: Unpack[WayOptions],
    ) -> Tensor:  # fmt: skip
        """States from x_a to x_b along the sphere of the prior, (points, batch, *event), both ends included.

        Both are encoded, whitened by the Gaussian prior (of a mixture by the Gaussian of its moments), interpolated by
        :func:`sdeflow.solving.latents.spherical` and decoded. The ends come back up to :meth:`round_trip_error`.

        Args:
            x_a, x_b: (batch, *event) each, at t = cutoff.
            points: how many, at least 2.
            solver, steps, options: of both ways, as of :meth:`encode`.

        Raises:
            DataError: for states of different shapes.
            ValueError: for a prior that is not Gaussian, and for fewer points.
        """
        points = checked_count(points, "points", 2)
        x_a, x_b = self.model.states(x_a, "x_a"), self.model.states(x_b, "x_b")
        if x_a.shape != x_b.shape:
            raise DataError(f"x_a is {tuple(x_a.shape)} and x_b {tuple(x_b.shape)}: they must be of one shape.")
        model, rows = self.model.of_batch(len(x_a)), torch.arange(len(x_a))
        z = self._of(model.rows(rows.repeat(2))).encode(torch.cat([x_a, x_b]), solver, steps, **options)
        path = spherical(model.prior_for(x_a), z[: len(x_a)], z[len(x_a) :], points)
        x = self._of(model.rows(rows.repeat(points))).decode(path.flatten(0, 1), solver, steps, **options)
        return x.reshape(path.shape)

    def latent_log_prob(self, z: Tensor) -> Tensor:
        """log π(z) of latents z = x_T in nats, (batch,) in float64: the prior's density, not that of x."""
        z = self.model.states(z, "z")
        return self.model.of_batch(len(z)).prior_for(z).log_prob(z)

    def _of(self, model: Model) -> FlowODE:
        """The same equation with another model."""
        other = copy.copy(self)
        other.model = model
        return other

    @takes(LogProbOptions, measure.log_prob)
    def likelihood(self, x: Tensor, **options: Unpack[LogProbOptions]) -> LogProb:
        """log p(x) in nats with its error budget: :func:`sdeflow.likelihood.log_prob` with ``full``."""
        return measure.likelihood(self.model, self.equation, x, **options)

    @overload
    def log_prob(self, x: Tensor, *, full: No = False, **options: Unpack[LogProbOptions]) -> Tensor: ...

    @overload
    def log_prob(self, x: Tensor, *, full: Yes, **options: Unpack[LogProbOptions]) -> LogProb: ...

    @takes(LogProbOptions, measure.log_prob)
    def log_prob(self, x: Tensor, *, full: bool = False, **options: Unpack[LogProbOptions]) -> Tensor | LogProb:
        """log p(x) in nats, (batch,) in float64; see :func:`sdeflow.likelihood.log_prob` for the options."""
        return measure.log_prob(self.model, self.equation, x, full=full, **options)

    @overload
    def data_log_prob(self, x: Tensor, *, full: No = False, **options: Unpack[DataOptions]) -> Tensor: ...

    @overload
    def data_log_prob(self, x: Tensor, *, full: Yes, **options: Unpack[DataOptions]) -> LogProb: ...

    @takes(DataOptions, measure.data_log_prob)
    def data_log_prob(self, x: Tensor, *, full: bool = False, **options: Unpack[DataOptions]) -> Tensor | LogProb:
        """A lower bound on log p of the data component; see :func:`sdeflow.likelihood.data_log_prob`."""
        return measure.data_log_prob(self.model, self.equation, x, full=full, **options)

    @overload
    def bits_per_dim(self, images: Tensor, *, full: No = False, **options: Unpack[BitsOptions]) -> Tensor: ...

    @overload
    def bits_per_dim(self, images: Tensor, *, full: Yes, **options: Unpack[BitsOptions]) -> LogProb: ...

    @takes(BitsOptions, bits.bits_per_dim)
    def bits_per_dim(self, images: Tensor, *, full: bool = False, **options: Unpack[BitsOptions]) -> Tensor | LogProb:
        """Bits per dimension of integer images, (batch,); see :func:`sdeflow.likelihood.bits_per_dim`."""
        return bits.bits_per_dim(self.model, self.equation, images, full=full, **options)


def _is_shape(z: Shape | Tensor) -> TypeIs[Shape]:
    """Whether z is the shape of a state; a list or tuple of integers alone is never a state."""
    return isinstance(z, tuple | list) and all(isinstance(n, int) for n in z)


def _refused(what: str, **given: object) -> None:
    """An OptionError for the first option that was given although it means nothing for ``what``."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise OptionError(f"{name} means nothing for {what}.")
