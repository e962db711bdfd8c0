"""Samples of a law whose support is bounded: what leaks out of it, and draws anew in its place.

A learned score knows nothing of the bounds of a prior, so some samples of its posterior lie beyond them. Rejection
draws from the model's law, conditioned on the support: its density is p(x) / (1 - leaked) within.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sdeflow.errors import LeakageWarning, SolverError, warn
from sdeflow.numerics.noise import mixed_seed
from sdeflow.solving.solution import Solution

__all__ = ["Support", "within"]

Support = Callable[[Tensor], Tensor]

_ATTEMPTS = 100  # for each sample


def within(draw: Callable[[int, Tensor | None], Solution], seed: int, support: Support, reject: bool) -> Solution:
    """Samples with their share outside ``support``, told in the solution; with ``reject`` all of them inside.

    Sample i depends on the seed and on its own condition alone, with rejection too.

    Args:
        draw: (seed, rows) -> the samples ``rows`` of a batch, all where it is None.
        seed: of the first draw.
        support: states (batch, *event) -> whether each is inside, (batch,) of bool.
        reject: whether samples outside are drawn anew.

    Raises:
        ValueError: for a support that returns something else.
        SolverError: where 100 draws of a sample are outside.
    """
    solution = draw(seed, None)
    inside = _inside(support, solution.x)
    outside, drawn, calls, seconds = int((~inside).sum()), len(inside), solution.calls, solution.seconds
    if not reject:
        if outside:
            warn(
                f"{outside} of {drawn} samples ({outside / drawn:.2%}) lie outside the support; reject=True draws them "
                "anew.",
                LeakageWarning,
            )
        return replace(solution, leaked=outside / max(drawn, 1))
    x, denoised = solution.x.clone(), None if solution.denoised is None else solution.denoised.clone()
    for attempt in range(1, _ATTEMPTS):
        rows = (~inside).nonzero()[:, 0]
        if not len(rows):
            break
        again = draw(mixed_seed(seed, attempt), rows)
        found = _inside(support, again.x)
        x[rows[found]] = again.x[found]
        if denoised is not None and again.denoised is not None:
            denoised[rows[found]] = again.denoised[found]
        inside[rows] = found
        outside, drawn = outside + int((~found).sum()), drawn + len(rows)
        calls, seconds = calls + again.calls, seconds + again.seconds
    if not inside.all():
        rows = (~inside).nonzero()[:, 0]
        raise SolverError(
            f"{_ATTEMPTS} draws of {len(rows)} of the samples all lie outside the support ({outside / drawn:.2%} of "
            "all draws do): the model's law has hardly any mass within it there.",
            nfe=calls, bad_rows=rows.tolist(), partial=x,
        )  # fmt: skip
    return replace(solution, x=x, denoised=denoised, leaked=outside / max(drawn, 1), calls=calls, seconds=seconds)


def _inside(support: Support, x: Tensor) -> Tensor:
    """What ``support`` says of each sample, checked."""
    inside = support(x)
    if not isinstance(inside, Tensor) or inside.shape != x.shape[:1] or inside.dtype != torch.bool:
        what = f"{tuple(inside.shape)} of {inside.dtype}" if isinstance(inside, Tensor) else repr(inside)
        raise ValueError(
            f"support(x) must say of each sample whether it is inside, ({len(x)},) of bool, not {what}: for a box "
            "write lambda x: ((x > low) & (x < high)).flatten(1).all(1)."
        )
    return inside
