r"""Exponential multistep solvers of the reverse SDE and the flow, for every affine SDE, coupled ones included.

One step, with the propagator Ψ and the weights of :mod:`sdeflow.solvers.exponential.weights`, past predictions F_j and
ξ ~ N(0, 1):

    predict:   u_{n+1} = Ψ u_n + Σ_j w_j F_{n-j} + noise ξ              the polynomial through p past values
    correct:   u_{n+1} = Ψ u_n + w F_{n+1} + Σ_j w_j F_{n-j} + noise ξ  with the value just computed at the prediction

A step costs one call of the score. The corrector costs none: the call at the predicted state serves the next step.

DDIM, DDPM, DPM-Solver, DPM-Solver++ in all its forms, DEIS, UniPC, SA-Solver and ER-SDE are this step with different
options (:mod:`sdeflow.solvers.exponential.presets`). The orders are measured by the tests, the first steps included. A
solve starts with lower orders, for want of past values: that costs nothing where the score at T is nearly linear, but
bounds the order in theory; ``start="graded"`` grades the first steps so finely that the order is that of the formula.

With noise (eta > 0) the weak order is 1 for order 1 and 2 above: the polynomial ignores that the past values are noisy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import DataError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.numerics.basis import Basis, Orthogonal
from sdeflow.numerics.checks import (
    OF_BASIS,
    checked_finite,
    checked_methods,
    checked_numbers,
    checked_real,
    checked_states,
)
from sdeflow.solvers.base import Solver
from sdeflow.solvers.exponential.program import Program, Steps, kept
from sdeflow.solvers.exponential.weights import PREDICTIONS, RULES, VARIABLES, Eta, Transfer, derive
from sdeflow.solvers.problem import Problem

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RULES", "Exponential"]

_CLOSEST = 1e-3  # of past nodes, relative to the step
_CLOSEST_WITH_NOISE = 0.25


class ExponentialOptions(TypedDict, total=False):
    """Options of :class:`Exponential`, with their meaning there, but for those of its reference."""

    order: int
    prediction: str
    corrector: bool | int
    eta: float | Callable[[np.ndarray], np.ndarray]
    variance: str
    variable: str
    rule: str
    start: str


@dataclass(frozen=True, eq=False)
class Exponential(Solver):
    """An exponential multistep solver.

    Args:
        order: p, how many past values the predictor takes, 1 to 4.
        prediction: the slowly changing quantity, "data", "noise", "velocity" or "reference"; see
            :mod:`sdeflow.solvers.exponential.weights`. "reference" is exact for Gaussian data of the reference's scale.
        corrector: whether to correct each step, or with how many past values; one call a step all the same.
        eta: the stochasticity, 0 for the flow, 1 for the reverse SDE; or a function of the half-log-SNR (an array).
            Orders above 1 extrapolate, and are unstable where (1 + eta²) times a step passes about 2.
        variance: what a number eta multiplies, the "sde"'s noise, or the "posterior" standard deviation of each step
            as in DDIM.
        variable: the variable in which predictions are polynomials, "log_snr", "ratio" (sigma / alpha) or "t".
        rule: "exact", or a published simplification, one of ``RULES``; of order 1 without a corrector all are the same,
            and so are all variables.
        start: "ramp", the first steps have lower orders; "graded", they are also shorter where the order asks for it
            (from order 3 on), which takes some more calls. At lower orders the two are the same.
        scale: c of the reference: a number, or one for each coordinate; the data's standard deviation where known.
        basis: an orthogonal basis whose coordinates ``scale`` is of, such as the data's principal directions
            (:meth:`along`); of elementwise SDEs without a basis of their own.

    Raises:
        ValueError: for options that do not exist.
    """

    order: int = 2
    prediction: str = "reference"
    corrector: bool | int = True
    eta: float | Callable[[np.ndarray], np.ndarray] = 0.0
    variance: str = "sde"
    variable: str = "log_snr"
    rule: str = "exact"
    start: str = "ramp"
    scale: float | Tensor | None = field(default=None, repr=False)
    basis: Basis | None = field(default=None, repr=False)

    needs_kernel = True
    follows_path = True
    adaptive = False
    calls_per_step = 1
    default_grid = "log_snr"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("order", self.order, (1, 2, 3, 4)),
            ("prediction", self.prediction, PREDICTIONS),
            ("variance", self.variance, ("sde", "posterior")),
            ("variable", self.variable, tuple(VARIABLES)),
            ("rule", self.rule, tuple(RULES)),
            ("start", self.start, ("ramp", "graded")),
        ):
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}.")
        if not isinstance(self.corrector, int) or self.corrector not in (0, 1, 2, 3, 4):
            raise ValueError(f"corrector must be a bool or a number of past values up to 4, not {self.corrector!r}.")
        if not callable(self.eta):
            wanted = "a number >= 0 or a function of the half-log-SNR"
            checked_real(self.eta, "eta", wanted, lambda number: 0 <= number < math.inf)
        if self.variance == "posterior" and (callable(self.eta) or self.eta > 1 or self.order > 1):
            raise ValueError('variance="posterior" is of order 1, with a number eta in [0, 1].')
        if self.rule == "half_step" and (self.prediction, self.variable) != ("data", "log_snr"):
            raise ValueError('rule="half_step" is of prediction="data" and variable="log_snr".')
        checked_methods(self.basis, "basis", *OF_BASIS)
        if self.basis is not None and self.scale is None:
            raise ValueError("basis is of scale=, one for each of its coordinates; without one it changes nothing.")
        if self.scale is not None:
            scale = checked_finite(checked_numbers(self.scale, "scale"), "scale")
            if self.prediction != "reference":
                raise ValueError('scale is of prediction="reference".')
            if not bool(torch.isfinite(scale).all()) or not bool((scale >= 0).all()):
                raise ValueError(f"scale must be finite and not negative, not {self.scale!r}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Exponential) and self._options == other._options

    def __hash__(self) -> int:
        return hash(self._options)

    @property
    def _options(self) -> tuple[object, ...]:
        """All options as numbers and names; a basis is itself alone."""
        scale = None if self.scale is None else tuple(torch.as_tensor(self.scale).flatten().tolist())
        plain = (self.order, self.prediction, self.past, self.eta, self.variance, self.variable, self.rule, self.start)
        return (*plain, scale, None if self.basis is None else id(self.basis))

    @property
    def elementwise(self) -> bool:
        """Whether coupled states are beyond it."""
        posterior = self.variance == "posterior" and self.stochastic
        return self.prediction == "velocity" or self.rule == "half_step" or posterior

    @classmethod
    def along(cls, data: Tensor, **options: Unpack[ExponentialOptions]) -> Exponential:
        """A solver whose reference has the data's own standard deviation in each of its principal directions.

        It is exact for Gaussian data of any covariance, and gains most in few calls on data of very different scales.

        Args:
            data: (samples, *event).
            options: as of the class; its ``scale`` and ``basis`` are found here.
        """
        data = checked_states(data, "data")
        if len(data) < 2:
            raise DataError("principal directions need data (samples, *event) of at least two samples, not one.")
        flat = data.detach().flatten(1).double().cpu()
        variances, vectors = torch.linalg.eigh(torch.cov(flat.T).reshape(flat.shape[1], flat.shape[1]))
        std = variances.clamp_min(0.0).sqrt().reshape(data.shape[1:])
        return cls(**options, scale=std, basis=Orthogonal(vectors.mT))

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return callable(self.eta) or self.eta > 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """With eta = 0 the whole family is the flow."""
        return ("sde",) if self.stochastic else ("ode", "sde")

    @property
    def past(self) -> int:
        """How many past values the corrector takes; 0 without."""
        return (self.order if self.corrector else 0) if isinstance(self.corrector, bool) else self.corrector

    @property
    def formula_order(self) -> int:
        """The order of the formula between starting values that are good enough."""
        order = min(self.order, self.past) + 1 if self.past else self.order
        return min(order, 2) if self.rule in ("half_curvature", "uncentred") else order

    @property
    def convergence_order(self) -> int:
        """The order of convergence with its starting values: strong for the flow, weak with noise."""
        if self.stochastic:
            return min(self.formula_order, 2)
        return self.formula_order if self.start == "graded" else min(self.formula_order, 3 if self.past else 2)

    def calls(self, steps: int) -> int:
        """Calls of the score in a solve."""
        return steps + len(self._extra(steps))

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        problem.start(y)
        u = y.reshape(-1, *problem.event)
        program = self.compile(problem, self.grid(problem, steps), u)
        u = program.run(problem, u if self.basis is None else self.basis.forward(u))
        return problem.finish((u if self.basis is None else self.basis.inverse(u)).flatten(1))

    def grid(self, problem: Problem, steps: int | None) -> np.ndarray:
        """The times of a solve, from its start to its end."""
        times = problem.times(steps)
        extra = self._extra(len(times) - 1)
        if not len(extra):
            return times
        if problem.clock.given is not None:
            raise ValueError(
                'start="graded" divides the first step: name its times in grid= too, or take start="ramp".'
            )
        first, second = problem.kernel.bounded_log_snr(torch.as_tensor(times[:2])).tolist()
        between = problem.kernel.time_of(torch.as_tensor(first + (second - first) * extra)).numpy()
        return np.concatenate([times[:1], between, times[1:]])

    def _extra(self, steps: int) -> np.ndarray:
        """Points in (0, 1) of the first step that grade it.

        The error of the first step, h² without a corrector and h³ with one, is to be h^p.
        """
        free = 3 if self.past else 2
        if self.start == "ramp" or self.formula_order <= free or steps < 2:
            return np.empty(0)
        finest = steps ** (1.0 - self.formula_order / free)
        count = math.ceil(math.log2(1.0 / finest))
        return 2.0 ** -np.arange(count, 0.0, -1.0)

    def compile(self, problem: Problem, times: np.ndarray, like: Tensor) -> Program:
        """The numbers of a grid, and the score on it."""
        kernel = problem.kernel
        if kernel.coupled and self.elementwise:
            raise ValueError(f"{self} is of elementwise SDEs, not of coupled states.")
        scale = torch.as_tensor(problem.scale if self.scale is None else self.scale, dtype=torch.float64)

        def make() -> Steps:
            eta, orders = self._eta(kernel, times), 1 + max(self.order, self.past)
            transfer = derive(kernel, times[:-1], times[1:], self.prediction, scale, eta, orders, self.variable)
            nodes = self._nodes(transfer, self._noise_in(kernel, times), problem.clock.since_stop(times))
            return Steps(transfer, nodes, RULES[self.rule], like, kernel.maps)

        steps = kept(kernel, self._key(kernel, times, scale, like), make)
        score = problem.on_grid(torch.as_tensor(times[:-1]), like)
        mean = kernel.data_level(problem.mean, like) if self.prediction == "reference" else None
        if self.basis is not None:
            mean = None if mean is None else self.basis.forward(mean.expand(1, *like.shape[1:]))
        return Program(steps, score, times, mean, like, kernel, self.basis)

    def _key(self, kernel: Kernel, times: np.ndarray, scale: Tensor, like: Tensor) -> tuple[object, ...] | None:
        """What the numbers of a grid depend on; None where that is more than numbers and names."""
        if callable(self.eta) or kernel.values.shape or kernel.values.learned:
            return None
        options = (self.order, self.prediction, self.past, self.eta, self.variance, self.variable, self.rule)
        return (
            *options,
            times.tobytes(),
            tuple(scale.flatten().tolist()),
            scale.shape,
            like.shape[1:],
            like.dtype,
            like.device,
        )

    def _eta(self, kernel: Kernel, times: np.ndarray) -> Eta:
        """eta of the SDE; in each step the one that leaves eta times the posterior's deviation, where that is meant."""
        if self.variance == "sde" or callable(self.eta) or not self.eta:
            return self.eta
        if self.eta == 1:
            return 1.0
        if kernel.values.shape:
            raise ValueError('variance="posterior" is of one schedule for all coordinates; take variance="sde".')
        h = np.diff(kernel.bounded_log_snr(torch.as_tensor(times)).numpy())
        with np.errstate(divide="ignore"):
            kept = -0.5 * np.log1p(-(self.eta**2) * -np.expm1(-2.0 * h))  # e^{-2 eta² h} = 1 - eta_d² (1 - e^{-2h})
        return np.sqrt(kept / h)

    def _noise_in(self, kernel: Kernel, times: np.ndarray) -> np.ndarray:
        """(1 + eta²) times the length of each step in the half-log-SNR, where noise is drawn; 0 for the flow."""
        half_log_snr = kernel.bounded_log_snr(torch.as_tensor(times)).detach().numpy()
        eta = self.eta(half_log_snr[:-1]) if callable(self.eta) else self.eta
        return (1.0 + np.square(eta)) * np.abs(np.diff(half_log_snr)) * self.stochastic

    def _nodes(
        self, transfer: Transfer, noise: np.ndarray, most: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """The nodes θ of predictor and corrector at each step, the newest first; ``most`` of the past at each."""
        n = len(transfer.start)
        nodes = []
        for step in range(n):
            first, width = transfer.start[step], transfer.stop[step] - transfer.start[step]
            back = (transfer.start[step::-1] - first) / width if width else np.zeros(1)
            back = back[: min(self._usable(back, noise[step]), most[step])]
            corrected = None
            if self.past and step < n - 1:  # the last step's corrector would take a call of its own
                corrected = np.concatenate([[1.0], back[: self.past]])
            nodes.append((back[: self.order], corrected))
        return nodes

    def _usable(self, back: np.ndarray, noise: float) -> int:
        """How many past nodes are far enough apart, in units of the step, for a polynomial through their values.

        A step that is thousands of times as long as the one before it, as behind a pause of the noise, would multiply
        the rounding of the values. With noise they differ at random, which a step multiplies that is both long and
        several times as long as the one before it; published formulas (``rule``) are left as they are.
        """
        least = _CLOSEST
        if self.rule == "exact" and noise > 0:
            least = max(least, min(_CLOSEST_WITH_NOISE, 0.5 * noise))
        apart = -np.diff(back[: max(self.order, self.past) + 1])
        close = np.flatnonzero(apart < least)
        return int(close[0]) + 1 if len(close) else len(back)
