"""torchdiffeq's methods for the probability flow, with its traps closed.

Adaptive methods of torchdiffeq step past the end and interpolate back, and guess a first step that can
leave the horizon altogether: ``step_t`` and the problem's clock prevent both. Their error norm is the
largest over samples, so that a sample's accuracy does not depend on its batch. Fixed methods take the
steps that were asked for, and nothing is signalled by ``assert`` alone. SciPy's methods do not say when a step
ends, so they give no trajectory.

Chen 2018; https://github.com/rtqichen/torchdiffeq
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import SolverError, StepUnderflowError
from sdeflow.solvers.problem import Problem

__all__ = ["Torchdiffeq"]

_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")


@dataclass(frozen=True)
class Torchdiffeq:
    """A method of torchdiffeq, by its name.

    Args:
        method: one of ``Torchdiffeq.methods``.
        scipy: for "scipy_solver", the method of ``scipy.integrate.solve_ivp``.

    Raises:
        ValueError: for an unknown method, and for ``scipy`` of another one.

    Note:
        The Adams methods have the weights of equal steps. Between given times that are uneven they are of order 1:
        take rk4, or a named grid.
    """

    method: str = "dopri5"
    scipy: str = "RK45"

    kinds = ("ode",)
    needs_kernel = False
    stochastic = False
    default_grid = None
    methods = _ADAPTIVE + _FIXED

    def __post_init__(self) -> None:
        if self.method not in self.methods:
            raise ValueError(f"torchdiffeq's methods are {', '.join(self.methods)}, not {self.method!r}.")
        if self.scipy != "RK45" and self.method != "scipy_solver":
            raise ValueError(f'scipy={self.scipy!r} is of method="scipy_solver", not of {self.method!r}.')

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its steps."""
        return self.method in _ADAPTIVE

    @property
    def observable(self) -> bool:
        """Whether the method says when a step ends."""
        return self.method != "scipy_solver"

    @property
    def calls_per_step(self) -> int:
        """Calls of the score in a step of a fixed method."""
        return {"midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "implicit_adams": 5, "fixed_adams": 5}.get(
            self.method, 1
        )

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        from torchdiffeq import odeint

        points = problem.start(y, None if self.adaptive else steps, eager_checks=self.adaptive)
        grid = torch.tensor(points, dtype=torch.float64, device=y.device)
        ts = grid[[0, -1]]
        if self.method == "scipy_solver":
            options: dict = {"solver": self.scipy}
        elif self.adaptive:
            options = {"step_t": ts[-1:], "norm": lambda error: problem.row_norm(error).max()}
        else:
            options = {"grid_constructor": lambda func, y0, t: grid}
        drift = problem.drift if problem.on_step is None else _Observed(problem, float(ts[0]))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Functional iteration did not converge")
                warnings.filterwarnings("ignore", message="The following arguments have no")  # SciPy, of min_step
                out = odeint(drift, y, ts, rtol=rtol, atol=atol, method=self.method, options=options)
        except (UserWarning, AssertionError) as error:
            if error is problem.failure or (isinstance(drift, _Observed) and drift.failure is error):
                raise  # the score's or an observer's own
            raise self._failure(problem, error) from error
        if len(out) != 2:
            t = problem.last_time
            raise SolverError(f"SciPy's {self.scipy} gave up at t = {t:.6g}.", t=t, nfe=problem.nfe)
        if problem.on_step is not None:
            drift.step_ended(float(ts[-1]), out[-1])
        return problem.finish(out[-1])

    def _failure(self, problem: Problem, error: Exception) -> SolverError:
        """torchdiffeq's warnings and assertions as what they mean."""
        t = problem.last_time
        if isinstance(error, UserWarning):
            message = f"the iteration of {self.method} did not converge near t = {t:.6g}: take more steps."
            return SolverError(message, t=t, nfe=problem.nfe)
        return StepUnderflowError(
            f"the step of {self.method} shrank to nothing at t = {t:.6g}: the equation is too stiff there, or rtol "
            "and atol are too tight for the state's dtype.",
            t=t, nfe=problem.nfe,
        )  # fmt: skip


class _Observed:
    """The drift, with the method's word of each step it begins, at which the one before it has ended.

    An adaptive method begins again where it rejects a step. torchdiffeq's word of an accepted step gives the state at
    its start.
    """

    def __init__(self, problem: Problem, start: float) -> None:
        self._problem, self._r, self._steps = problem, start, 0
        self.failure: Exception | None = None

    def __call__(self, r: Tensor, y: Tensor) -> Tensor:
        return self._problem.drift(r, y)

    def callback_step(self, r: Tensor, y: Tensor, length: Tensor) -> None:
        """A step begins at r, from y."""
        if float(r) > self._r:
            self.step_ended(float(r), y)

    def step_ended(self, r: float, y: Tensor) -> None:
        """Passes the state at r on."""
        self._r, self._steps = r, self._steps + 1
        try:
            self._problem.observe(self._steps, float(self._problem.time(r)[0]), y)
        except Exception as error:
            self.failure = error
            raise
