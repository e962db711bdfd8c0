"""Gradients through solves, asked for with ``gradient="backprop"`` or by an input that requires grad.

Backpropagation goes through the steps that were taken, exactly, and keeps the graph of every call. What it cannot reach
is an error: no solve returns a result whose gradient is silently missing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sdeflow.errors import ScoreError
from sdeflow.numerics.checks import checked_choice
from sdeflow.scores import evaluating
from sdeflow.solving.model import Model

__all__ = ["is_meant", "require_graph", "require_reach"]


def is_meant(gradient: str | None, x: Tensor) -> bool:
    """Whether a solve from ``x`` is to keep its graph.

    Raises:
        ValueError: for a gradient of another name.
    """
    if isinstance(gradient, str) and gradient == "adjoint":
        raise ValueError('gradient="adjoint" is log_prob\'s; a solve goes by gradient="backprop".')
    checked_choice(gradient, "gradient", ("backprop", None))
    return gradient is not None or (x.requires_grad and torch.is_grad_enabled())


def require_reach(model: Model, x: Tensor) -> int:
    """An error where the flow's gradient would miss something that requires grad.

    Returns:
        How often the score was called to know.

    Raises:
        ValueError: for parameters of the SDE that require grad.
        ScoreError: for a score through which no gradient flows to the state.
    """
    if any(tensor.requires_grad for tensor in model.values.tensors.values()):
        raise ValueError(
            "the gradient of the flow does not reach the parameters of the SDE itself: freeze them with "
            "requires_grad_(False), or differentiate simulate()."
        )
    if not (x.requires_grad and len(x)):
        return 0
    one = model.rows(slice(0, 1))
    with torch.enable_grad(), evaluating(model.score):
        state = x[:1].detach().clone().requires_grad_(True)
        output = one.score(state, model.T)
        reached = output.requires_grad and torch.autograd.grad(output.sum(), state, allow_unused=True)[0] is not None
    if not reached:
        raise ScoreError("no gradient flows through the score to the state (a detach or no_grad inside?).")
    return 1


def require_graph(x: Tensor, sources: Iterable[Tensor] | None = None) -> None:
    """A ValueError where a gradient was asked for and neither the result x nor one of its ``sources`` requires grad.

    A solver that differentiates by itself, as Milstein's, returns a graph that leads to nothing of the user's.
    """
    if len(x) and not (x.requires_grad and (sources is None or any(source.requires_grad for source in sources))):
        raise ValueError(
            'gradient="backprop": neither the state nor a parameter that this solve reaches requires grad.'
        )
