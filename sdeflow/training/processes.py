"""Accelerate for one run: the process group that there is, and no trace in accelerate's shared state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sdeflow.numerics.checks import checked_choice
from sdeflow.scores import Score

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["own_accelerator"]


@contextmanager
def own_accelerator(score: Score, mixed_precision: str | None) -> Iterator[Accelerator]:
    """An accelerator of the process group that there is; accelerate's shared state is left as it was."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    checked_choice(mixed_precision, "mixed_precision", ("no", "fp8", "fp16", "bf16", None))
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()  # it would hold this run to the precision of the one before
    on_cpu = next(score.parameters()).device.type == "cpu"
    try:
        with _environment_of_group():
            accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu)
        yield accelerator
    finally:
        for state, kept in zip(shared, before, strict=True):
            state.clear()
            state.update(kept)


@contextmanager
def _environment_of_group() -> Iterator[None]:
    """The variables from which accelerate learns of a process group that the user made."""
    group = torch.distributed
    if not group.is_available() or not group.is_initialized() or "LOCAL_RANK" in os.environ:
        yield
        return
    rank, size = str(group.get_rank()), str(group.get_world_size())
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    ours.update({k: v for k, v in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")) if k not in os.environ})
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
