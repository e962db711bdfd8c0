"""torchdiffeq's methods for the probability flow, with its traps closed.

Adaptive methods assume that the equation is smooth. Where one schedule holds for all coordinates, they carry the state
relative to its scale, as a function of sigma / alpha alone, in which f and g do not occur; their tolerances are then
those of the state at the end. Otherwise they begin anew at each break point of f and g.

Adaptive methods of torchdiffeq step past the end and interpolate back, and guess a first step that can
leave the horizon altogether: ``step_t`` and the problem's clock prevent both. Without a Gaussian kernel a step that
leaves the states where the drift is finite is tried again, shorter. Their error norm is the largest over samples, so
that a sample's accuracy does not depend on its batch. Fixed methods take the steps that were asked for, and nothing is
signalled by ``assert`` alone. SciPy's methods do not say when a step ends, so they give no trajectory.

Chen 2018; https://github.com/rtqichen/torchdiffeq
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import SolverError, StepUnderflowError
from sdeflow.numerics.checks import checked_choice
from sdeflow.solvers.base import Solver
from sdeflow.solvers.problem import Normalised, Problem
from sdeflow.solvers.schemes import ADAMS, EULER, HEUN, HEUN_3, MIDPOINT, RK4

__all__ = ["Torchdiffeq"]

_FIRST, _LONGEST = 0.02, 0.25  # steps of the whole way, where it is relative to the state's scale
_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
_ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
_ADAMS_ORDER = 5  # their max_order: one above the explicit one's order, 4. It rises to 11 by default, which explodes
_SCHEMES = {
    "euler": EULER, "midpoint": MIDPOINT, "heun2": HEUN, "heun3": HEUN_3, "rk4": RK4, "explicit_adams": ADAMS,
}  # fmt: skip
_UNEVEN = 1e-4  # of a step
_SCIPY = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")


@dataclass(frozen=True)
class Torchdiffeq(Solver):
    """A method of torchdiffeq, by its name.

    Args:
        method: one of ``Torchdiffeq.methods``.
        scipy: for "scipy_solver", the method of ``scipy.integrate.solve_ivp``.

    Raises:
        ValueError: for an unknown method, and for ``scipy`` of another one.

    Note:
        The Adams methods have the weights of equal steps: given times that are uneven between two break points of f and
        g are refused. Their order is at most 4 (explicit) and 5: by default torchdiffeq's rises to 11 with the steps,
        and explodes where a step moves the state by 0.4 %.
    """

    method: str = "dopri5"
    scipy: str = "RK45"

    kinds = ("ode",)
    needs_kernel = False
    integrates_divergence = True
    methods = _ADAPTIVE + _FIXED

    def __post_init__(self) -> None:
        checked_choice(self.method, "method", self.methods)
        checked_choice(self.scipy, "scipy", _SCIPY)
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
    def differentiable(self) -> bool:
        """Whether gradients flow through a solve; SciPy's methods have none."""
        return self.method != "scipy_solver"

    @property
    def iterates(self) -> bool:
        """Whether fixed steps are found by iteration."""
        return self.method in ("implicit_adams", "fixed_adams")

    @property
    def calls_per_step(self) -> int:
        """Calls of the score in a step of a fixed method."""
        return {"midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "implicit_adams": 5, "fixed_adams": 5}.get(
            self.method, 1
        )

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        scheme = _SCHEMES.get(self.method)
        points = problem.start(
            y, None if self.adaptive else steps, eager_checks=self.adaptive, order=4, scheme=scheme,
            retries=self.adaptive and self.method != "scipy_solver" and not problem.has_kernel,
        )  # fmt: skip
        flow = problem.normalised() if self.adaptive else None
        observed = None if problem.watch.on_step is None else _Observed(problem, points[0], flow)
        if flow is not None:
            first, last = flow.size(points[0]), flow.size(points[-1])
            y = self._integrated(problem, observed, flow, y / first, points, rtol, atol / last)
            return problem.finish(y * last)
        if self.method in _ADAMS:
            for part in problem.smooth_parts(points):
                self._require_even(part)
        for part in problem.smooth_parts(points):
            y = self._integrated(problem, observed, flow, y, part, rtol, atol)
        return problem.finish(y)

    def _integrated(
        self, problem: Problem, observed: _Observed | None, flow: Normalised | None, y: Tensor,
        points: Sequence[float], rtol: float, atol: float,
    ) -> Tensor:  # fmt: skip
        """The state at the last of ``points``, between which a fixed method steps."""
        from torchdiffeq import odeint

        grid = torch.tensor(points, dtype=torch.float64, device=y.device)
        ts = grid[[0, -1]]
        if self.method == "scipy_solver":
            options: dict[str, object] = {"solver": self.scipy}
        elif self.adaptive:
            options = {"step_t": ts[-1:], "norm": lambda error: problem.watch.tried(problem.row_norm(error).max())}
            if flow is not None:  # which is 0 where the data is Gaussian, or forgotten: that says nothing of the rest
                options.update(first_step=_FIRST, max_step=_LONGEST)
        else:
            options = {"grid_constructor": lambda func, y0, t: grid}
            if self.method in _ADAMS:
                options["max_order"] = _ADAMS_ORDER
        drift = observed or (problem.drift if flow is None else flow.drift)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Functional iteration did not converge")
                warnings.filterwarnings("ignore", message="The following arguments have no")  # SciPy, of min_step
                out = odeint(drift, y, ts, rtol=rtol, atol=atol, method=self.method, options=options)
        except (UserWarning, AssertionError) as error:
            if error is problem.watch.failure or (observed is not None and observed.failure is error):
                raise  # the score's or an observer's own
            raise problem.watch.just_left or self._failure(problem, error) from error
        if len(out) != 2:
            t = problem.watch.last_time
            raise SolverError(f"SciPy's {self.scipy} gave up at t = {t:.6g}.", t=t, nfe=problem.nfe)
        if observed is not None:
            observed.step_ended(float(ts[-1]), out[-1])
        return out[-1]

    def _require_even(self, points: Sequence[float]) -> None:
        """A ValueError where steps between ``points`` differ in length."""
        lengths = np.diff(points)
        if (lengths.max() - lengths.min()) > _UNEVEN * lengths.max():
            raise ValueError(
                f"grid: the weights of {self.method} are those of equal steps, and the given times are "
                f"{lengths.min():.4g} to {lengths.max():.4g} apart; take rk4, a named grid, or even times between "
                "the break points of f and g."
            )

    def _failure(self, problem: Problem, error: Exception) -> SolverError:
        """torchdiffeq's warnings and assertions as what they mean."""
        t = problem.watch.last_time
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

    def __init__(self, problem: Problem, start: float, flow: Normalised | None) -> None:
        self._problem, self._r, self._steps, self._flow = problem, start, 0, flow
        self.failure: Exception | None = None

    def __call__(self, r: Tensor, y: Tensor) -> Tensor:
        return (self._flow or self._problem).drift(r, y)

    def callback_step(self, r: Tensor, y: Tensor, length: Tensor) -> None:
        """A step begins at r, from y."""
        if float(r) > self._r:
            self.step_ended(float(r), y)

    def step_ended(self, r: float, y: Tensor) -> None:
        """Passes the state at r on."""
        self._r, self._steps = r, self._steps + 1
        try:
            y = y if self._flow is None else y * self._flow.size(r)
            time = self._problem.time(r)[0] if self._flow is None else self._flow.time(r)
            self._problem.observe(self._steps, float(time), y)
        except Exception as error:
            self.failure = error
            raise
