"""torchsde's methods for a reverse-time SDE, with its traps closed.

The adapter integrates forwards in its own variable with steps of exactly 1 (torchsde's accumulated
``t + dt`` would add a sliver of a step), flattens states to (batch, n), declares diagonal noise (with
"scalar" noise all pixels would share one Brownian motion) or one small matrix for each coordinate where
the components of a coupled state share theirs, converts to Stratonovich where the
method needs it, and brings its own Brownian increments: torchsde's are seeded from NumPy's global state.
An observed solve is one of torchsde's for each step. Between the steps of its adaptive methods torchsde
draws straight lines, which no path of an SDE follows, so adaptive solves give no trajectory.

Kidger et al. 2021 (arXiv:2102.03657); https://github.com/google-research/torchsde
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from sdeflow.errors import CoarseStepsWarning, StepUnderflowError, warn
from sdeflow.numerics.checks import checked_choice, checked_count, checked_flag
from sdeflow.numerics.noise import NoiseStream
from sdeflow.solvers.base import Solver
from sdeflow.solvers.problem import Problem
from sdeflow.solvers.schemes import EULER, HEUN, MIDPOINT

__all__ = ["Torchsde"]

_APART = 0.1  # of the state's size
_ITO = ("euler", "milstein", "srk")
_SCHEMES = {  # for noise that does not depend on the state; srk, of two normals, and reversible_heun have no tableau
    "euler": EULER, "milstein": EULER, "euler_heun": EULER, "midpoint": MIDPOINT, "log_ode": MIDPOINT, "heun": HEUN,
}  # fmt: skip
_STRATONOVICH = ("midpoint", "heun", "euler_heun", "log_ode", "reversible_heun")


@dataclass(frozen=True)
class Torchsde(Solver):
    """A method of torchsde, by its name.

    Args:
        method: one of ``Torchsde.methods``.
        adaptive: steps of varying size, to rtol and atol. torchsde's error norm is taken over the
            whole batch, so a sample then depends on its batch.
        initial_steps: the first step of an adaptive solve, as a fraction 1 / initial_steps.

    Raises:
        ValueError: for an unknown method, and for initial_steps without adaptive.

    Note:
        "reversible_heun" carries an auxiliary state that can run away where the score is stiff: on a mixture
        under VP it gave a tenth of the variance at 500 steps; a warning tells where that happens. "midpoint"
        and "log_ode" need some 200 steps.
    """

    method: str = "euler"
    adaptive: bool = False
    initial_steps: int = 100

    kinds = ("sde",)
    needs_kernel = False
    follows_path = True
    methods = _ITO + _STRATONOVICH

    def __post_init__(self) -> None:
        checked_choice(self.method, "method", self.methods)
        checked_flag(self.adaptive, "adaptive")
        count = checked_count(self.initial_steps, "initial_steps")
        if count != 100 and not self.adaptive:
            raise ValueError(f"initial_steps={count} is of adaptive steps: give adaptive=True too, or leave it out.")

    @property
    def observable(self) -> bool:
        """Whether the method says when a step ends."""
        return not self.adaptive

    @property
    def diagonal(self) -> bool:
        """Whether noise that depends on the state must be one for each component."""
        return self.method in ("milstein", "srk", "log_ode")

    @property
    def calls_per_step(self) -> int:
        """Calls of the score in a step."""
        return {"srk": 10, "midpoint": 2, "heun": 2, "log_ode": 2}.get(self.method, 1)

    def with_own_steps(self) -> Torchsde:
        """The adaptive solver of this method."""
        return replace(self, adaptive=True)

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        if self.adaptive:
            points = problem.start(y, end=float(self.initial_steps), eager_checks=True)
        else:
            points = problem.start(y, steps, order=2, scheme=_SCHEMES.get(self.method))
        y = problem.to_rows(y)
        system = _System(problem, "stratonovich" if self.method in _STRATONOVICH else "ito")
        end = float(points[-1])
        brownian, tolerances = self._brownian(problem, y, end), (rtol, atol, 1e-6 * end)
        observed = problem.watch.on_step is not None and self.observable
        if not observed and problem.in_unit_steps:
            points = [points[0], points[-1]]
        step = 0
        for part in problem.smooth_parts(points):
            extra = None
            for span in pairwise(part):
                y, extra = self._advance(problem, system, brownian, y, span, extra, tolerances)
                step += 1
                if observed:
                    problem.observe(step, float(problem.time(span[1])[0]), problem.from_rows(y))
        if self.method == "reversible_heun" and extra is not None:
            _warn_if_apart(y, extra[-1])
        return problem.finish(problem.from_rows(y))

    def _advance(
        self, problem: Problem, system: _System, brownian: object, y: Tensor, span: tuple[float, float],
        extra: tuple[Tensor, ...] | None, tolerances: tuple[float, float, float],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The rows at the end of ``span``, and what the method carries on from there beside them.

        Steps are of length 1, or one is the whole of a span whose ends were given (torchsde stops at its end).
        """
        import torchsde

        ts = torch.tensor(span, dtype=torch.float64, device=y.device)
        rtol, atol, dt_min = tolerances
        dt = 1.0 if problem.in_unit_steps else 2.0 * (span[1] - span[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Hitting minimum allowed step size")
            if not problem.noise_depends_on_state:  # the noise is additive; "diagonal" is how torchsde takes it
                warnings.filterwarnings("ignore", message="Numerical solution is not guaranteed to converge")
            try:
                out, extra = torchsde.sdeint(
                    system, y, ts, bm=brownian, method=self.method, dt=dt, adaptive=self.adaptive, rtol=rtol,
                    atol=atol, dt_min=dt_min, extra=True, extra_solver_state=extra,
                )  # fmt: skip
            except (UserWarning, AssertionError) as error:
                if error is problem.watch.failure:
                    raise
                t = problem.watch.last_time
                raise StepUnderflowError(
                    f"the adaptive step of {self.method} shrank to nothing at t = {t:.6g}: loosen rtol and atol.",
                    t=t, nfe=problem.nfe,
                ) from error  # fmt: skip
        return out[-1], extra

    def _brownian(self, problem: Problem, y: Tensor, end: float) -> object:
        """The Brownian motion of rows like ``y``."""
        import torchsde

        size = (len(y), problem.motions or y.shape[1])
        if not self.adaptive or not isinstance(problem.noise, NoiseStream):
            return _Increments(problem, size, y, _levy_area(self.method))
        return torchsde.BrownianInterval(
            0.0, end, size=size, dtype=y.dtype, device=y.device, dt=1.0,
            entropy=problem.noise.seed, levy_area_approximation=_levy_area(self.method),
        )  # fmt: skip


class _System:
    """The drift and diffusion under the names that torchsde calls."""

    def __init__(self, problem: Problem, sde_type: str) -> None:
        self.noise_type = "diagonal"
        if problem.components:  # a matrix for each row mixes its components
            self.noise_type = "general" if problem.noise_depends_on_state else "additive"
        self.sde_type = sde_type
        self.f = problem.drift if sde_type == "ito" else problem.stratonovich_drift
        self.g = problem.diffusion


class _Increments:
    """Brownian increments over steps, drawn when asked for from sdeflow's own stream, or those of a path.

    For a step [a, b] of length h: W ~ N(0, h), and with ``return_U`` the space-time integral
    U = h (W / 2 + H), H ~ N(0, h / 12) independent of W. Memory does not grow with the steps.
    """

    def __init__(self, problem: Problem, size: tuple[int, int], like: Tensor, levy_area_approximation: str) -> None:
        self.levy_area_approximation = levy_area_approximation
        self.shape, self.dtype, self.device = size, like.dtype, like.device
        self._problem = problem
        self._step: tuple[float, float] | None = None

    def size(self) -> tuple[int, ...]:
        """The shape of an increment."""
        return self.shape

    def __call__(
        self, a: Tensor, b: Tensor, return_U: bool = False, return_A: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        step = (float(a), float(b))
        if step != self._step:
            h = step[1] - step[0]
            self._step, self._length = step, h
            self._w = self._problem.motion_in(*step, self.shape, self.dtype, self.device) * math.sqrt(h)
            self._h: Tensor | None = None
        out = [self._w]
        if return_U:
            if self._h is None:
                area = self._problem.area_in(*self._step, self.shape, self.dtype, self.device)
                self._h = area * math.sqrt(self._length)
            out.append(self._length * (0.5 * self._w + self._h))
        if return_A:
            out.append(torch.zeros((), dtype=self.dtype, device=self.device))  # diagonal noise commutes
        return out[0] if len(out) == 1 else tuple(out)


def _warn_if_apart(y: Tensor, auxiliary: Tensor) -> None:
    """A warning where the two states that reversible Heun carries, both of them the solution, have come apart."""
    apart = float((auxiliary - y).detach().square().mean().sqrt() / y.detach().square().mean().sqrt())
    if not apart <= _APART:
        warn(
            f"reversible_heun: its two states of the same solution have come apart by {apart:.2g} times their size, so "
            "that samples may be far off. The method is not stable where the drift contracts fast, as near data; more "
            'steps need not help. Take "heun", "midpoint" or the default solver.',
            CoarseStepsWarning,
        )


def _levy_area(method: str) -> str:
    return {"srk": "space-time", "log_ode": "foster"}.get(method, "none")
