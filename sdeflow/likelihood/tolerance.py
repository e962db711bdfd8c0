"""log p of each sample to an error in nats, at tolerances of an adaptive solve that become tighter until two agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import MaxStepsError, SolverError, ToleranceWarning, warn
from sdeflow.numerics.traces import Estimate

__all__ = ["Held", "not_reached", "require_reached"]

_TIGHTEST = {torch.float64: 1e-9}  # of the state and of log p, by the dtype of the score
_TIGHTEST_ELSE = 1e-6
_OF_TOLERANCES = 0.5  # of the difference of two solves is what the finer may be off by
_ROUNDING = 100.0  # times the tolerance: what is left above is none of rounding


@dataclass
class Held:
    """What is known of each of some samples, (batch,), and x_T (batch, *event); NaN where nothing is.

    Attributes:
        value, stderr, dof, error, x_T: as of :class:`~sdeflow.likelihood.result.Solved`.
        rtol: the tolerance of the solve that found it, 0 for none.
    """

    value: Tensor
    stderr: Tensor
    dof: Tensor
    error: Tensor
    x_T: Tensor
    rtol: Tensor

    @classmethod
    def nothing(cls, x: Tensor) -> Held:
        """Of states x (batch, *event) nothing is known yet."""
        unknown = x.detach().new_full((len(x),), math.nan)
        zero = torch.zeros_like(unknown)
        return cls(unknown, zero, torch.full_like(zero, math.inf), unknown.clone(), x.detach().clone(), zero.clone())

    def settle(
        self, left: Tensor, solve: Callable[[Tensor, float], tuple[Estimate, Tensor]],
        allowed: Callable[[Tensor], Tensor], rtol: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Solves the samples ``left`` at ten times tighter tolerances until two solves agree; what is left then.

        Args:
            left: numbers of samples.
            solve: (samples, tolerance) -> their log p and x_T.
            allowed: log p of some samples -> the error in nats that each is held to.
            rtol: the first tolerance.
            dtype: in which the score is called.

        Raises:
            SolverError: where not even the first solve of a sample comes to an end.
        """
        before, tightest = torch.full_like(self.value, math.nan), _TIGHTEST.get(dtype, _TIGHTEST_ELSE)
        rtol = max(rtol, 10.0 * tightest)
        while len(left) and rtol > 0.5 * tightest:
            try:
                found, ends = solve(left, rtol)
            except SolverError:  # noise, or the budget
                if bool(self.value[left].isnan().any()):
                    raise
                break
            change = _OF_TOLERANCES * (found.value - before[left]).abs()
            closer, before[left] = (change < self.error[left]) | self.error[left].isnan(), found.value
            better = left[closer]
            self.value[better], self.stderr[better], self.x_T[better] = (
                found.value[closer], found.stderr[closer], ends[closer],
            )  # fmt: skip
            self.dof[better], self.error[better], self.rtol[better] = found.dof[closer], change[closer], rtol
            left = left[~(self.error[left] <= allowed(self.value[left]))]
            rtol *= 0.1
        return left


def require_reached(
    left: Tensor, value: Tensor, error: Tensor, allowed: Tensor, calls: int, dtype: torch.dtype
) -> None:
    """Warns of samples ``left`` that did not reach ``allowed``: an error where they are too far off for rounding."""
    if not len(left):
        return
    worst = float(error[left].max())
    reached = "before the calls ran out" if math.isnan(worst) else f"and come no closer than {worst:.2g}"
    problem = not_reached(left, value, reached, calls)
    if not bool((error[left] <= _ROUNDING * allowed).all()):
        raise problem
    warn(f"{problem} (or {dtype} rounds.)", ToleranceWarning)


def not_reached(bad: Tensor, value: Tensor, where: str, calls: int) -> MaxStepsError:
    """What has been found of the others is in its ``partial``."""
    value = value.clone()
    value[bad] = math.nan
    return MaxStepsError(
        f"{len(bad)} of {len(value)} samples did not reach the tolerance of log p {where}: loosen atol, raise "
        "max_calls, or look at those samples, where the score may be rough, or the data far away. A score that draws "
        "its own randomness never lets two solves agree.",
        nfe=calls, bad_rows=bad.tolist(), partial=value,
    )  # fmt: skip
