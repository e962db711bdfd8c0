"""What is known of a log-likelihood: the value, and where its error comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.numerics.traces import widening

__all__ = ["LogProb", "Solved", "joined", "shown"]

_SHOWN = 5  # values of each part, where it is printed


@dataclass(frozen=True, repr=False)
class LogProb:
    """A log-likelihood and its error budget, each (batch,) in float64; two bars cover 95 % of the samples.

    Attributes:
        value: log p(x), at the cutoff or of the data, as asked for.
        stderr: the standard error of the trace estimate, widened by Student's t so that two of it cover 95 %; 0 for the
            exact trace, NaN for a single probe.
        solver_error: what the solver may be off by. With ``atol`` what is left of the difference between two grids,
            as their defects fall; else the difference to a finer solve, with what that may be off by itself.
        truncation: log p of the data, without P0, minus log p at the cutoff, as estimated; where that has been
            applied, what may be left of it. 0 with auxiliary components, whose joint law at the cutoff is what is
            measured.
        prior_mismatch: log p_T(x_T) - log π(x_T): how much of log p is due to the prior not being the law that the
            score has at T.
        nfe: calls of the score for ``value``, those of all grids where the steps were chosen; the budget takes some
            more.
        prior_error: what ``prior_mismatch`` itself may be off by, an estimate of its own.
        unit: of all of these: "nats", or of :func:`~sdeflow.likelihood.bits_per_dim` "bits per dimension".
    """

    value: Tensor
    stderr: Tensor
    solver_error: Tensor
    truncation: Tensor = field(default_factory=lambda: torch.zeros(()))
    prior_mismatch: Tensor = field(default_factory=lambda: torch.zeros(()))
    nfe: int = 0
    prior_error: Tensor = field(default_factory=lambda: torch.zeros(()))
    unit: str = "nats"

    @property
    def error(self) -> Tensor:
        """One bar for all of it, the root of the sum of squares."""
        parts = (self.solver_error, self.truncation, self.prior_mismatch, self.prior_error)
        return sum((part.square() for part in parts), self.stderr.square()).sqrt()

    def __repr__(self) -> str:
        """The first values of each part; ``value.tolist()`` has all."""
        names = ("value", "error", "stderr", "solver_error", "truncation", "prior_mismatch", "prior_error")
        rows = [f"    {name:<14} {shown(getattr(self, name))}" for name in names]
        return "\n".join([f"LogProb(shape={tuple(self.value.shape)}, unit={self.unit!r}, nfe={self.nfe},", *rows]) + ")"


def joined(parts: list[LogProb]) -> LogProb:
    """The parts of one batch as one."""

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    budget = whole("solver_error"), whole("truncation"), whole("prior_mismatch")
    calls = sum(part.nfe for part in parts)
    return LogProb(whole("value"), whole("stderr"), *budget, calls, whole("prior_error"), parts[0].unit)


class Solved(NamedTuple):
    """What one solve found of some samples: log p in nats, (batch,) each, and x_T (batch, *event)."""

    value: Tensor
    stderr: Tensor
    dof: Tensor
    error: Tensor
    x_T: Tensor
    calls: int

    @property
    def bar(self) -> Tensor:
        """The standard error, widened by its degrees of freedom."""
        return self.stderr * widening(self.dof)


def shown(values: Tensor) -> str:
    """The first values of a tensor."""
    numbers = values.detach().flatten()
    first = ", ".join(f"{number:.5g}" for number in numbers[:_SHOWN].tolist())
    return f"[{first}, ...]" if len(numbers) > _SHOWN else f"[{first}]"
