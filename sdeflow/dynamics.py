r"""The reverse-time SDE and the probability-flow ODE of a declaration, bound to a score.

    reverse:  dx = [f - ∇·(g gᵀ) - g gᵀ s] dt + g dw̄          flow:  dx/dt = f - ½ ∇·(g gᵀ) - ½ g gᵀ s

Both carry noise at t = T to data at t = cutoff with the same marginals. They print as equations, give
their ``drift`` and ``diffusion`` as SymPy, and solve themselves once they have a score. A sample at the
cutoff follows the model whose density ``FlowODE.log_prob`` measures; ``denoise=True`` replaces it by
E[x_0 | x], which looks cleaner and has another law. What a solve may do beside is in :mod:`sdeflow.solving.run`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, overload

import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DataError
from sdeflow.likelihood import LogProb, bits_per_dim, data_log_prob, log_prob
from sdeflow.likelihood.bounds import Elbo, KLBound, elbo, kl_bound
from sdeflow.numerics.brownian import BrownianPath
from sdeflow.numerics.checks import checked_count, checked_dtype, checked_shape
from sdeflow.numerics.noise import resolve_seed
from sdeflow.scores import DeclaredSDE, ScoreFunction
from sdeflow.scores.thresholded import Threshold
from sdeflow.solvers import Exponential, Grid, Solver, resolve
from sdeflow.solving.gradients import is_meant
from sdeflow.solving.latents import spherical
from sdeflow.solving.model import Model
from sdeflow.solving.pilot import Pilot, pilot
from sdeflow.solving.prior_of import Prior
from sdeflow.solving.run import Answer, Callback, Options, field, run
from sdeflow.symbolic.equations import Equation, probability_flow, reverse_time

__all__ = ["FlowODE", "ReverseSDE"]

Seed = int | torch.Generator | None
AnyScore = ScoreFunction | Callable[[Tensor, Tensor], Tensor] | None


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
        event: tuple[int, ...],
        solver: str | Solver | None = None,
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

    def _field(self, event: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        """The drift of flattened states (batch, n) as solvers carry them, the score asked in ``dtype``."""
        return field(self.model, self.equation, event, dtype)

    def _drawn(
        self,
        shape: tuple[int, ...],
        options: Options,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        seed: int,
        noisy: bool,
    ) -> Answer:
        """Solved from draws of the prior, with noise on the way where it is ``noisy``."""
        model = self.model.of_batch(checked_shape(shape)[0])
        dtype = checked_dtype(dtype) or model.state_dtype

        def start() -> Tensor:
            x = model.initial_state(shape, seed, dtype, device)
            model.require_dtype(x)
            return x

        return run(model, self.equation, start, dtype, options, seed=seed if noisy else None)


class ReverseSDE(_Bound):
    """The reverse-time SDE; see :func:`sdeflow.symbolic.equations.reverse_time`.

    Args:
        sde: the declaration.
        score: its score, or None for the equation alone.
        prior: p(x_T), where it should not follow from the data's moments or the score.
    """

    def __init__(self, sde: DeclaredSDE, score: AnyScore = None, prior: Prior | None = None) -> None:
        super().__init__(reverse_time(sde.declaration), Model.of(sde, score, prior))

    @overload
    def sample(
        self,
        shape: tuple[int, ...],
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        seed: Seed = None,
        noise: BrownianPath | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        max_calls: int | None = None,
        trajectory: Literal[False] = False,
        callback: Callback | None = None,
        denoise: bool = False,
        return_denoised: Literal[False] = False,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        progress: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        shape: tuple[int, ...],
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        seed: Seed = None,
        noise: BrownianPath | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        max_calls: int | None = None,
        trajectory: bool = False,
        callback: Callback | None = None,
        denoise: bool = False,
        return_denoised: bool = False,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        progress: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Answer: ...

    def sample(
        self,
        shape: tuple[int, ...],
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        seed: Seed = None,
        noise: BrownianPath | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        max_calls: int | None = None,
        trajectory: bool = False,
        callback: Callback | None = None,
        denoise: bool = False,
        return_denoised: bool = False,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        progress: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Answer:
        """Samples at t = cutoff, by simulating the reverse SDE from the prior.

        Args:
            shape: (batch, *event).
            solver: a name that ``sdeflow.solvers.names_for("sde")`` lists, or a solver object; by default that of
                :func:`sdeflow.solving.plan.default_solver`.
            steps: of a solver of fixed steps; without a solver, the number of calls of the score, which has a default.
                A solver that is given a tensor for ``grid`` may do without: it takes the steps between its times.
            seed: makes the result reproducible; sample i depends neither on the batch size nor on chunks.
            noise: a :class:`~sdeflow.BrownianPath` to follow, for solves of one path in different steps; ``seed`` is
                then that of the prior's draw alone.
            rtol, atol: without ``steps``, tolerances of an adaptive solve.
            grid: the variable in which steps are uniform: "angle", "log_snr", "karras", "t" or "pilot", measured once
                for a score (:mod:`sdeflow.solving.pilot`); by default what the solver prefers, or else the angle. A
                tensor of times, rising or falling, means steps in t between exactly these.
            max_calls: the budget of an adaptive solve (of each chunk), 10,000 by default.
            trajectory: whether to return (states, times) instead, the state after each step and its time: states
                (steps + 1, batch, *event) from t = T to the cutoff, both included, and times (steps + 1,) in float64.
            callback: called as callback(step, t, x) after each step, step counting from 1, with a copy of the state
                (batch, *event); with chunks, through all steps of each chunk in turn. What it returns is ignored, and
                what it raises ends the solve.
            denoise: whether to return E[x_0 | x] in place of the state at the end (Tweedie).
            return_denoised: whether to return E[x_0 | x_t] of each state returned as well, shaped alike, as the last of
                a tuple. A call of the score for each, which is not counted among the solver's.
            threshold: keeps E[x_0 | x_t] in range on the way: (low, high) clips it, a quantile in (0, 1) is Imagen's
                dynamic rule for data in [-1, 1]; for other data pass a :class:`~sdeflow.scores.thresholded.Thresholded`
                score yourself.
            chunk: how many samples to solve at once; by default all, up to 2^24 elements. Solvers that choose steps for
                the whole batch take no chunks.
            progress: a progress bar; None shows it on a terminal only.
            dtype, device: of the state; by default the score's.

        Returns:
            x (batch, *event), or (x, denoised), (states, times), (states, times, denoised), as asked for.

        Raises:
            TypeError, ValueError: for an option that makes no sense, or does not fit the solver or the SDE.
            NotAffineError: for denoised predictions of an SDE without a Gaussian kernel.
            SolverError: where the solve went wrong, with the time, calls and samples.
        """
        options = Options(
            solver, steps, rtol=rtol, atol=atol, grid=grid, max_calls=max_calls, trajectory=trajectory,
            callback=callback, denoise=denoise, return_denoised=return_denoised, threshold=threshold, chunk=chunk,
            progress=progress, noise=noise,
        )  # fmt: skip
        return self._drawn(shape, options, dtype, device, resolve_seed(seed), noisy=True)

    def elbo(self, x: Tensor, **options: object) -> Elbo:
        """A lower bound on log p of this SDE's samples, in nats; see :func:`sdeflow.likelihood.bounds.elbo`."""
        return elbo(self.model, x, **options)

    def kl_bound(self, data: Tensor, score_of_data: AnyScore = None, **options: object) -> KLBound:
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

    @overload
    def sample(
        self,
        shape: tuple[int, ...],
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        seed: Seed = None,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        denoise: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_calls: int | None = None,
        trajectory: Literal[False] = False,
        callback: Callback | None = None,
        return_denoised: Literal[False] = False,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        progress: bool | None = None,
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        shape: tuple[int, ...],
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        seed: Seed = None,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        denoise: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_calls: int | None = None,
        trajectory: bool = False,
        callback: Callback | None = None,
        return_denoised: bool = False,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        progress: bool | None = None,
    ) -> Answer: ...

    def sample(
        self,
        shape: tuple[int, ...],
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        seed: Seed = None,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        denoise: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_calls: int | None = None,
        trajectory: bool = False,
        callback: Callback | None = None,
        return_denoised: bool = False,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        progress: bool | None = None,
    ) -> Answer:
        """Samples at t = cutoff: :meth:`decode` of draws from the prior, with its options."""
        options = Options(
            solver, steps, rtol=rtol, atol=atol, grid=grid, max_calls=max_calls, trajectory=trajectory,
            callback=callback, denoise=denoise, return_denoised=return_denoised, threshold=threshold, chunk=chunk,
            progress=progress,
        )  # fmt: skip
        return self._drawn(shape, options, dtype, device, resolve_seed(seed), noisy=False)

    @overload
    def decode(
        self,
        z: Tensor,
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        max_calls: int | None = None,
        trajectory: Literal[False] = False,
        callback: Callback | None = None,
        denoise: bool = False,
        return_denoised: Literal[False] = False,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        gradient: str | None = None,
        progress: bool | None = None,
    ) -> Tensor: ...

    @overload
    def decode(
        self,
        z: Tensor,
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        max_calls: int | None = None,
        trajectory: bool = False,
        callback: Callback | None = None,
        denoise: bool = False,
        return_denoised: bool = False,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        gradient: str | None = None,
        progress: bool | None = None,
    ) -> Answer: ...

    def decode(
        self,
        z: Tensor,
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        max_calls: int | None = None,
        trajectory: bool = False,
        callback: Callback | None = None,
        denoise: bool = False,
        return_denoised: bool = False,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        gradient: str | None = None,
        progress: bool | None = None,
    ) -> Answer:
        """x at t = cutoff from z = x_T, shaped as z.

        Args:
            z: (batch, *event).
            solver: a name that ``sdeflow.solvers.names_for("ode")`` lists, or a solver object; by default dopri5, and
                with ``steps`` that of :func:`sdeflow.solving.plan.default_solver`.
            steps: of a solver of fixed steps; without a solver, the number of calls of the score.
            rtol, atol: of an adaptive method, per sample; 1e-5 by default.
            grid, max_calls, trajectory, callback, denoise, return_denoised, threshold, chunk, progress: as
                :meth:`ReverseSDE.sample`. The steps of an adaptive method are those it accepted.
            gradient: "backprop" for a result that can be differentiated in z and in the parameters of the score,
                exactly through the steps taken, which keeps the graph of every call. By default where z requires grad;
                parameters alone have to be meant.

        Returns:
            As :meth:`ReverseSDE.sample`.

        Raises:
            DataError: for a state that is not a finite floating tensor (batch, *event).
            TypeError, ValueError, SolverError: as :meth:`ReverseSDE.sample`.
            ValueError, ScoreError: where a gradient is asked for and cannot be had.
        """
        options = Options(
            solver, steps, rtol=rtol, atol=atol, grid=grid, max_calls=max_calls, trajectory=trajectory,
            callback=callback, denoise=denoise, return_denoised=return_denoised, threshold=threshold, chunk=chunk,
            progress=progress, gradient=gradient,
        )  # fmt: skip
        return self._transported(z, options, backward=True)

    def encode(
        self,
        x: Tensor,
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        max_calls: int | None = None,
        trajectory: bool = False,
        callback: Callback | None = None,
        threshold: Threshold | None = None,
        chunk: int | None = None,
        gradient: str | None = None,
        progress: bool | None = None,
    ) -> Answer:
        """z = x_T from x at t = cutoff, shaped as x, not whitened. Arguments as :meth:`decode`; times increase."""
        options = Options(
            solver, steps, rtol=rtol, atol=atol, grid=grid, max_calls=max_calls, trajectory=trajectory,
            callback=callback, threshold=threshold, chunk=chunk, progress=progress, gradient=gradient,
        )  # fmt: skip
        return self._transported(x, options, backward=False)

    def _transported(self, x: Tensor, options: Options, *, backward: bool) -> Answer:
        """The flow between T and cutoff, from x on."""
        x = self.model.states(x, "z" if backward else "x")
        graph = is_meant(options.gradient, x)
        return run(
            self.model.of_batch(len(x)), self.equation, lambda: x, x.dtype, options, backward=backward, graph=graph
        )

    def round_trip_error(self, x: Tensor, solver: str | Solver | None = None, **options: object) -> Tensor:
        """How far decode(encode(x)) is from x in each sample, (batch,): the root mean square over the event.

        Args:
            x: (batch, *event).
            solver: of both ways, with the ``options`` of :meth:`encode`.
        """
        x = self.model.states(x)
        there = self.encode(x, solver, **options)
        back = self.decode(there, solver, **options)
        return (back - x).double().flatten(1).square().mean(1).sqrt()

    def interpolate(
        self, x_a: Tensor, x_b: Tensor, points: int = 9, solver: str | Solver | None = None, **options: object
    ) -> Tensor:
        """States from x_a to x_b along the sphere of the prior, (points, batch, *event), both ends included.

        Both are encoded, whitened by the Gaussian prior, interpolated by :func:`sdeflow.solving.latents.spherical` and
        decoded. The ends come back up to :meth:`round_trip_error`.

        Args:
            x_a, x_b: (batch, *event) each, at t = cutoff.
            points: how many, at least 2.
            solver: of both ways, with the ``options`` of :meth:`encode`.

        Raises:
            DataError: for states of different shapes.
            ValueError: for a prior that is not Gaussian, and for fewer points.
        """
        points = checked_count(points, "points", 2)
        x_a, x_b = self.model.states(x_a, "x_a"), self.model.states(x_b, "x_b")
        if x_a.shape != x_b.shape:
            raise DataError(f"x_a is {tuple(x_a.shape)} and x_b {tuple(x_b.shape)}: they must be of one shape.")
        model, rows = self.model.of_batch(len(x_a)), torch.arange(len(x_a))
        ends = self._of(model.rows(rows.repeat(2))).encode(torch.cat([x_a, x_b]), solver, **options)
        path = spherical(model.prior_for(x_a), *ends.chunk(2), points)
        x = self._of(model.rows(rows.repeat(points))).decode(path.flatten(0, 1), solver, **options)
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

    @overload
    def log_prob(self, x: Tensor, *, full: Literal[False] = False, **options: object) -> Tensor: ...

    @overload
    def log_prob(self, x: Tensor, *, full: Literal[True], **options: object) -> LogProb: ...

    def log_prob(self, x: Tensor, **options: object) -> Tensor | LogProb:
        """log p(x) in nats, (batch,) in float64; see :func:`sdeflow.likelihood.log_prob` for the options."""
        return log_prob(self.model, self.equation, x, **options)

    @overload
    def data_log_prob(self, x: Tensor, *, full: Literal[False] = False, **options: object) -> Tensor: ...

    @overload
    def data_log_prob(self, x: Tensor, *, full: Literal[True], **options: object) -> LogProb: ...

    def data_log_prob(self, x: Tensor, **options: object) -> Tensor | LogProb:
        """A lower bound on log p of the data component; see :func:`sdeflow.likelihood.data_log_prob`."""
        return data_log_prob(self.model, self.equation, x, **options)

    def bits_per_dim(self, images: Tensor, *, levels: int, low: float, high: float, **options: object) -> Tensor:
        """Bits per dimension of integer images, (batch,); see :func:`sdeflow.likelihood.bits_per_dim`."""
        return bits_per_dim(self.model, self.equation, images, levels=levels, low=low, high=high, **options)
