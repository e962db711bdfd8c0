"""What a solve found, and how."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sdeflow.solvers import Solver

__all__ = ["Answer", "Solution"]

Answer = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """What a solve of the reverse SDE or the flow found. What was not asked for is None.

    Attributes:
        x: the state at the end, (batch, *event): samples at the cutoff, or x_T where the flow encodes. With ``denoise``
            E[x_0 | x] in its place.
        states: with ``trajectory``, the state at the start and after each step, (steps + 1, batch, *event).
        times: of ``states``, (steps + 1,) in float64, from the start to the end.
        denoised: with ``return_denoised``, E[x_0 | x_t] of each of ``states``, or without a trajectory of ``x``.
        calls: how often the score was called, each time with a batch or, of many samples, with a chunk of it. The calls
            for denoised predictions count; what is measured once for a score, such as a pilot grid or a prior that is
            read off the score, does not.
        solver: which solver was taken.
        grid: the time variable of its steps by name, or the tensor of times.
        seconds: how long it took.
        leaked: with ``support``, the share of all samples drawn that lay outside of it.
    """

    x: Tensor
    states: Tensor | None
    times: Tensor | None
    denoised: Tensor | None
    calls: int
    solver: Solver
    grid: str | Tensor
    seconds: float
    leaked: float | None = None

    @property
    def asked_for(self) -> Answer:
        """What sample, decode and encode return: x, (x, denoised), (states, times) or (states, times, denoised)."""
        denoised = () if self.denoised is None else (self.denoised,)
        if self.states is not None and self.times is not None:
            return self.states, self.times, *denoised
        return (self.x, *denoised) if denoised else self.x

    def __repr__(self) -> str:
        lines = [f"x: {_shown(self.x)}"]
        if self.states is not None and self.times is not None:
            first, last = float(self.times[0]), float(self.times[-1])
            lines.append(f"states: {_shown(self.states)}, at {len(self.times)} times from {first:.4g} to {last:.4g}")
        if self.denoised is not None:
            lines.append(f"denoised: {_shown(self.denoised)}")
        grid = f'"{self.grid}"' if isinstance(self.grid, str) else f"{self.grid.numel()} given times"
        lines.append(f"{self.calls} calls of the score in {self.seconds:.3g} s, by {self.solver} on grid {grid}")
        if self.leaked is not None:
            lines.append(f"{self.leaked:.2%} of the samples drawn lay outside the support")
        return "\n  ".join(["Solution", *lines])


def _shown(x: Tensor) -> str:
    return f"{tuple(x.shape)} in {str(x.dtype).removeprefix('torch.')}"
