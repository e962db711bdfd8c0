"""What to do where memory runs out: torch's error with a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["memory_hint"]


@contextmanager
def memory_hint(hint: str) -> Iterator[None]:
    """A context whose out-of-memory error says what to do, once; it stays a ``torch.OutOfMemoryError``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if hint in str(error):
            raise
        raise torch.OutOfMemoryError(f"{error}\n{hint}") from error
