r"""The reverse-time SDE and the probability-flow ODE of a declaration, bound to a score.

    reverse:  dx = [f - ∇·(g gᵀ) - g gᵀ s] dt + g dw̄          flow:  dx/dt = f - ½ ∇·(g gᵀ) - ½ g gᵀ s

Both carry noise at t = T to data at t = cutoff with the same marginals. They print as equations, give
their ``drift`` and ``diffusion`` as SymPy, and solve themselves once they have a score. A sample at the
cutoff follows the model whose density ``FlowODE.log_prob`` measures; ``denoise=True`` replaces it by
E[x_0 | x], which looks cleaner and has another law.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import sympy as sp
import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow.likelihood import LogProb, bits_per_dim, data_log_prob, log_prob
from sdeflow.model import Model, Prior, checked_state, evaluating
from sdeflow.noise import NoiseStream, resolve_seed
from sdeflow.plan import Plan, make_plan
from sdeflow.scores import DeclaredSDE, ScoreFunction
from sdeflow.solvers import Problem, Solver
from sdeflow.solvers.clock import Grid
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.equation})"

    def _repr_latex_(self) -> str:
        return self.equation._repr_latex_()

    def _field(self, event: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        """The drift of flattened states (batch, n) as solvers carry them, the score asked in ``dtype``."""
        drift, score = self.model.drift(self.equation), self.model.solver_score

        def field(y: Tensor, t: Tensor) -> Tensor:
            u = y.reshape(-1, *event)
            return drift(u, t, score(u, t, dtype)).flatten(1)

        return field

    def _solve(
        self, x: Tensor, make_problem: Callable[..., Problem], plan: Plan, *, backward: bool, progress: bool | None
    ) -> Tensor:
        """The state at the other end, in float32 on the way where the state is in half precision."""
        model = self.model
        start, end = (model.T, model.cutoff) if backward else (model.cutoff, model.T)
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = model.to_solver(y, start).flatten(1)
        hidden = None if progress is None else not progress
        bar = tqdm(total=plan.expected_calls, desc="solving", disable=hidden, leave=False)
        with bar, torch.no_grad(), evaluating(model.score):
            problem = make_problem(
                backward=backward, max_calls=plan.max_calls, on_call=None if bar.disable else bar.update,
                kernel=model.kernel, event=tuple(x.shape[1:]), score=partial(model.solver_score, dtype=x.dtype),
            )  # fmt: skip
            y = plan.solver.solve(problem, y, plan.steps, plan.rtol, plan.atol)
        return model.from_solver(y.reshape(x.shape), end).to(x.dtype)

    def _denoised(self, x: Tensor) -> Tensor:
        with torch.no_grad(), evaluating(self.model.score):
            return self.model.score.denoise(x, self.model.cutoff)


class ReverseSDE(_Bound):
    """The reverse-time SDE; see :func:`sdeflow.symbolic.equations.reverse_time`.

    Args:
        sde: the declaration.
        score: its score, or None for the equation alone.
        prior: p(x_T), where it should not follow from the data's moments or the score.
    """

    def __init__(self, sde: DeclaredSDE, score: AnyScore = None, prior: Prior | None = None) -> None:
        super().__init__(reverse_time(sde.declaration), Model(sde, score, prior))

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
        progress: bool | None = None,
    ) -> Tensor:
        """Samples at t = cutoff, by simulating the reverse SDE from the prior.

        Args:
            shape: (batch, *event).
            solver: a name of torchsde's ("euler", "milstein", "srk", ...) or a solver object; "euler" by default.
            steps: the number of steps; 500 by default without a solver.
            seed: makes the result reproducible; sample i does not depend on the batch size.
            rtol, atol: without ``steps``, tolerances of an adaptive solve.
            grid: the variable in which steps are uniform: "angle", "log_snr", "t" or a tensor of times.
            denoise: whether to return E[x_0 | x] at the end (Tweedie).
            dtype, device: of the state; by default the score's.
            max_calls: the budget of an adaptive solve, 10,000 by default.
            progress: a progress bar; None shows it on a terminal only.

        Raises:
            ValueError: for a solver, shape, steps or tolerance that does not fit.
            SolverError: where the solve went wrong, with the time, calls and samples.
        """
        model = self.model
        seed = resolve_seed(seed)
        x = model.initial_state(shape, seed, dtype, device)
        plan = make_plan("sde", solver, steps, rtol, atol, max_calls, x.dtype)
        if not len(x):
            return x
        make_problem = partial(
            Problem,
            self._field(tuple(x.shape[1:]), x.dtype),
            model.clock(grid),
            noise=NoiseStream(seed, "path"),
            **model.noise(self.equation, tuple(x.shape[1:])),
        )
        x = self._solve(x, make_problem, plan, backward=True, progress=progress)
        return self._denoised(x) if denoise else x


class FlowODE(_Bound):
    """The probability-flow ODE; see :func:`sdeflow.symbolic.equations.probability_flow`.

    Args:
        sde: the declaration.
        score: its score, or None for the equation alone.
        prior: p(x_T), where it should not follow from the data's moments or the score.
    """

    def __init__(self, sde: DeclaredSDE, score: AnyScore = None, prior: Prior | None = None) -> None:
        super().__init__(probability_flow(sde.declaration), Model(sde, score, prior))

    def sample(
        self,
        shape: tuple[int, ...],
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        seed: Seed = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: object,
    ) -> Tensor:
        """Samples at t = cutoff: :meth:`decode` of draws from the prior. Its options apply."""
        make_plan(
            "ode", solver, steps, options.get("rtol"), options.get("atol"), options.get("max_calls"), torch.float64
        )
        x = self.model.initial_state(shape, resolve_seed(seed), dtype, device)
        return self.decode(x, solver, steps, **options)

    def decode(
        self,
        z: Tensor,
        solver: str | Solver | None = None,
        steps: int | None = None,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        grid: Grid = None,
        denoise: bool = False,
        max_calls: int | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """x at t = cutoff from z = x_T, shaped as z.

        Args:
            z: (batch, *event).
            solver: a name of torchdiffeq's ("dopri5", "dopri8", "bosh3", "rk4", "heun3", "euler", ...) or a solver
                object; by default dopri5, and with ``steps`` Heun's method.
            steps: of a fixed method; without a solver, the number of calls of the score.
            rtol, atol: of an adaptive method, per sample; 1e-5 by default.
            grid: the time variable: "angle", "log_snr", "t" or a tensor of times.
            denoise: whether to return E[x_0 | x] at the end (Tweedie).
            max_calls: the budget of an adaptive solve, 10,000 by default.
            progress: a progress bar; None shows it on a terminal only.

        Raises:
            DataError: for a state that is not a finite floating tensor (batch, *event).
            ValueError, SolverError: as :meth:`ReverseSDE.sample`.
        """
        x = self._transport(z, solver, steps, rtol, atol, grid, max_calls, backward=True, progress=progress)
        return self._denoised(x) if denoise and len(x) else x

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
        progress: bool | None = None,
    ) -> Tensor:
        """z = x_T from x at t = cutoff, shaped as x, not whitened. Arguments as :meth:`decode`."""
        return self._transport(x, solver, steps, rtol, atol, grid, max_calls, backward=False, progress=progress)

    def log_prob(self, x: Tensor, **options: object) -> Tensor | LogProb:
        """log p(x) in nats, (batch,) in float64; see :func:`sdeflow.likelihood.log_prob` for the options."""
        return log_prob(self.model, self.equation, x, **options)

    def data_log_prob(self, x: Tensor, **options: object) -> Tensor | LogProb:
        """A lower bound on log p of the data component; see :func:`sdeflow.likelihood.data_log_prob`."""
        return data_log_prob(self.model, self.equation, x, **options)

    def bits_per_dim(self, images: Tensor, *, levels: int, low: float, high: float, **options: object) -> Tensor:
        """Bits per dimension of integer images, (batch,); see :func:`sdeflow.likelihood.bits_per_dim`."""
        return bits_per_dim(self.model, self.equation, images, levels=levels, low=low, high=high, **options)

    def _transport(
        self,
        x: Tensor,
        solver: str | Solver | None,
        steps: int | None,
        rtol: float | None,
        atol: float | None,
        grid: Grid,
        max_calls: int | None,
        *,
        backward: bool,
        progress: bool | None,
    ) -> Tensor:
        """The flow between T and cutoff, from x on."""
        plan = make_plan("ode", solver, steps, rtol, atol, max_calls, checked_state(x).dtype)
        self.model.require_dtype(x)
        if not len(x):
            return x
        make_problem = partial(Problem, self._field(tuple(x.shape[1:]), x.dtype), self.model.clock(grid))
        return self._solve(x, make_problem, plan, backward=backward, progress=progress)
