"""What is watched while an equation is solved: the budget of calls, the first state that is not finite, each step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.errors import MaxStepsError, NonFiniteStateError

__all__ = ["Coefficient", "Watch"]

_CHECK_EVERY = 50
_MOST_RETRIES = 12  # of steps in a row that are not finite, each a fifth of the one before
_REFUSED = 1e10  # an error relative to the tolerance, of a step that is not finite
_JUST_NOW = 50  # calls
_EXPLOSION = 1e12  # of a state, relative to 1 + the largest initial value

Coefficient = Callable[[Tensor, Tensor], Tensor]


class Watch:
    """Counts the calls of a score, keeps within a budget and finds the first sample and time that are not finite.

    Args:
        max_calls: the budget of calls.
        on_call: called at each call, for a progress bar.
        on_step: called as (step, t, y) after each step, for trajectories and callbacks.
        on_correction: called as (n, predicted, corrected) where the state at time number n is corrected.
        hint: a sentence for the message of a state that is not finite.

    Attributes:
        nfe: calls so far.
        failure: what the score raised, which errors of libraries must not be taken for.
        batch: how many samples there are.
        grid_times: the times of a fixed grid, by their numbers.
    """

    def __init__(
        self,
        max_calls: int = 10_000,
        on_call: Callable[[], object] | None = None,
        on_step: Callable[[int, float, Tensor], object] | None = None,
        on_correction: Callable[[int, Tensor, Tensor], object] | None = None,
        hint: str = "",
    ) -> None:
        self.max_calls, self.on_call, self.hint = max_calls, on_call, hint
        self.on_step, self.on_correction = on_step, on_correction
        self.nfe, self.batch = 0, 0
        self.failure: Exception | None = None
        self.grid_times: list[float] = []
        self._eager = False
        self._retries = False
        self._refused, self._left = 0, NonFiniteStateError("", nfe=0)
        self._limit = math.inf
        self._bad_since = torch.empty(0)
        self._times: list[float] = []
        self._sums: list[Tensor] = []

    def start(self, y: Tensor, eager_checks: bool = False, retries: bool = False) -> None:
        """Before a solve from y (batch, n); with ``eager_checks`` finiteness is read at every call.

        With ``retries`` the method tries a step that is not finite again, and says so to :meth:`tried`.
        """
        self._eager, self.batch = eager_checks or retries, len(y)
        self._retries, self._refused = retries, 0
        if not bool(torch.isfinite(y).all()):
            rows = _rows(~torch.isfinite(y).all(1))
            raise NonFiniteStateError(f"the initial state is not finite in samples {rows}.", nfe=0, bad_rows=rows)
        largest = float(y.abs().max()) if y.numel() else 0.0
        self._limit = _EXPLOSION * (1.0 + largest)
        self._bad_since = torch.full((len(y),), math.inf, device=y.device)

    def asked(self, function: Coefficient, y: Tensor, t: Tensor) -> Tensor:
        """A function of flattened states and t, as one call of the score."""
        self.require_budget(y, float(t))
        try:
            value = function(y, t)
        except Exception as error:
            self.failure = error
            raise
        self.count(y, value, float(t))
        return value

    def require_budget(self, y: Tensor, t: float) -> None:
        """Before a call of states y at t: a MaxStepsError where it is one too many."""
        if self.nfe >= self.max_calls:
            raise MaxStepsError(
                f"the budget of {self.max_calls} calls was used up at t = {t:.6g}: loosen rtol and atol, take "
                "fixed steps, or raise max_calls. A score that draws its own randomness never lets an adaptive "
                "method converge.",
                t=t, nfe=self.nfe, partial=y.detach(),
            )  # fmt: skip

    def count(self, y: Tensor, value: Tensor, t: float) -> None:
        """After a call of flattened states at t: notes which samples are not finite.

        The CPU says so at once; an accelerator is read every 50 calls, or at each one under ``eager_checks``.
        """
        self.nfe += 1
        if self.on_call is not None:
            self.on_call()
        self._times.append(t)
        y, value = y.detach(), value.detach()
        on_cpu = value.device.type == "cpu"
        suspicious = not (on_cpu and math.isfinite(float(value.sum())))
        if suspicious:
            finite = torch.isfinite(value.sum(1))
            self._bad_since = torch.minimum(self._bad_since, torch.where(finite, math.inf, float(self.nfe)))
        if self.nfe % _CHECK_EVERY == 0 or (suspicious and (on_cpu or self._eager)):
            self._read_or_retry(y)

    def tried(self, error: Tensor) -> Tensor:
        """After a step by a method that ``retries``: its error (), as large as can be where it is not finite.

        Raises:
            NonFiniteStateError: where shorter and shorter steps are no better.
        """
        if bool(torch.isfinite(error)):
            self._refused = 0
            return error
        self._refused += 1
        if self._refused > _MOST_RETRIES:
            raise self._left
        return torch.full_like(error, _REFUSED)

    @property
    def just_left(self) -> NonFiniteStateError | None:
        """What was wrong with one of the last steps, where it was not finite."""
        nfe = self._left.nfe or 0
        return self._left if nfe > max(0, self.nfe - _JUST_NOW) else None

    def leaves(self, y: Tensor) -> bool:
        """Whether y (batch, n) is no state to ask for, in a step that will be tried again."""
        return self._retries and self.nfe > 0 and not bool(torch.isfinite(y.detach()).all())

    def _read_or_retry(self, y: Tensor) -> None:
        try:
            self._read(y)
        except NonFiniteStateError as error:
            exploded = not bool(torch.isfinite(self._bad_since).any())
            if exploded or not self._retries or self.nfe == 1:
                raise
            self._left = error
            self._bad_since = torch.full_like(self._bad_since, math.inf)

    def called(self, u: Tensor, value: Tensor, i: int) -> None:
        """After a call of states u (batch, ...) at time number ``i`` of a fixed grid, which counts it too."""
        if self.nfe >= self.max_calls:
            self.require_budget(u, self.grid_times[i])
        self.nfe += 1
        if self.on_call is not None:
            self.on_call()
        self._times.append(self.grid_times[i])
        self._sums.append(value.detach().sum())  # not read now: that would wait for an accelerator
        if len(self._sums) == _CHECK_EVERY:
            self._read_sums(u.detach().flatten(1))

    def finish(self, y: Tensor) -> None:
        """After a solve, at the state y (batch, n)."""
        if self._sums:
            self._read_sums(y)
        self._read(y)

    @property
    def last_time(self) -> float:
        """The time of the last call."""
        return self._times[-1] if self._times else math.nan

    def _read_sums(self, y: Tensor) -> None:
        """Finds the first of the calls noted that was not finite."""
        sums, self._sums = self._sums, []
        first = (~torch.isfinite(torch.stack(sums))).nonzero().flatten()
        if len(first):
            bad = ~torch.isfinite(y).all(1)  # what is not finite stays so
            call = float(self.nfe - len(sums) + 1 + int(first[0]))
            self._bad_since = torch.where(bad, call, self._bad_since)
        self._read(y)

    def _read(self, y: Tensor) -> None:
        bad = torch.isfinite(self._bad_since)
        exploded = ~(y.abs() <= self._limit).all(1)
        if not bool((bad | exploded).any()):
            del self._times[:-1]  # memory must not grow with the number of steps
            return
        call, t, what = self.nfe, self.last_time, "the state exploded"
        if bool(bad.any()):
            call = int(self._bad_since.min())
            t = self._times[call - 1 - (self.nfe - len(self._times))]
            what = "the drift (the score, or the equation itself) is not finite"
        rows = _rows(bad | exploded)
        raise NonFiniteStateError(
            f"{what} at t = {t:.6g}, call {call}, in {len(rows)} of {len(y)} samples: {rows[:8]}"
            f"{' ...' if len(rows) > 8 else ''}.{self.hint}",
            t=t, nfe=self.nfe, bad_rows=rows, partial=y.detach(),
        )  # fmt: skip


def _rows(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
