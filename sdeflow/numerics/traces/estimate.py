"""An estimate of Σ_n w_n div F_n with its standard error; several independent passes pooled into one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.numerics.checks import checked_count
from sdeflow.numerics.traces.standard_error import widening


@dataclass(frozen=True)
class Estimate:
    """An estimate of Σ_n w_n div F_n and its standard error.

    Attributes:
        value: (batch,) in float64.
        stderr: (batch,), the standard error of ``value``; 0 if the value is exact, NaN if the error is unknown.
        dof: (batch,), degrees of freedom of ``stderr``: the interval is value ± t(dof) stderr. Infinite if exact.
        products: vector-Jacobian products per sample.
    """

    value: Tensor
    stderr: Tensor
    dof: Tensor
    products: int

    @property
    def bar(self) -> Tensor:
        """``stderr`` widened so that value ± 2 bars is the 95.45 % interval of its degrees of freedom."""
        return self.stderr * widening(self.dof)


def pool(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate from independent estimates of the same sum: their mean, weighted by their numbers of products.

    Weights from estimated variances would correlate with the values. If a standard error is unknown, it is taken from
    the spread of the estimates.

    Raises:
        ValueError: for no estimates.
    """
    if not estimates:
        raise ValueError("pool needs at least one estimate.")
    if len(estimates) == 1:
        return estimates[0]
    products = sum(e.products for e in estimates)
    shares = torch.tensor([e.products / products for e in estimates], dtype=torch.float64)[:, None]
    values, stderrs, dofs = (torch.stack([getattr(e, name) for e in estimates]) for name in ("value", "stderr", "dof"))
    shares = shares.to(values.device)
    value = (shares * values).sum(0)
    parts = shares.square() * stderrs.square()
    variance = parts.sum(0)
    # Σ p (T - T̄)² has expectation (1 - Σ p²) times the variance of one product, for variances as 1 / products.
    spread = (shares * (values.detach() - value.detach()).square()).sum(0) / (len(estimates) - 1)
    unknown = variance.isnan()
    dof = torch.where(variance > 0, variance.square() / (parts.square() / dofs).sum(0), math.inf)
    variance, dof = torch.where(unknown, spread, variance), torch.where(unknown, len(estimates) - 1.0, dof)
    return Estimate(value, variance.sqrt(), dof, products)


def until(run: Callable[[int, Tensor], Estimate], samples: int, target: float, rounds: int = 16) -> Estimate:
    """Repeats passes with new probes until each sample's standard error is at most ``target``.

    A sample that has reached the target takes no further passes, so neither its value nor its error depends on the
    other samples of the batch.

    Args:
        run: (round, rows) -> the estimate of those rows; it passes both on to :meth:`Trace.start`.
        samples: the number of rows.
        target: the largest standard error, widened by its degrees of freedom, in nats.
        rounds: the largest number of passes.

    Returns:
        The pooled estimate, (samples,). Its ``products`` are those of the sample that took the most passes.
    """
    checked_count(rounds, "rounds", 1)
    if not target > 0:
        raise ValueError(f"target must be a positive standard error in nats, not {target!r}.")
    rows = torch.arange(samples)
    history: list[Estimate] = []
    done: Estimate | None = None
    for number in range(rounds):
        history.append(run(number, rows))
        pooled = pool(history)
        if done is None:
            done = pooled
        else:
            put = {name: getattr(done, name).index_copy(0, rows.to(pooled.value.device), getattr(pooled, name))
                   for name in ("value", "stderr", "dof")}  # fmt: skip
            done = Estimate(**put, products=pooled.products)
        open_ = ~(pooled.bar <= target)  # NaN stays open
        if not bool(open_.any()):
            break
        rows = rows[open_.to(rows.device)]
        history = [Estimate(e.value[open_], e.stderr[open_], e.dof[open_], e.products) for e in history]
    if done is None:
        raise ValueError(f"rounds must be at least 1, not {rounds}.")
    return done
