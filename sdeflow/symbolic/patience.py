"""SymPy in a process of its own, with seconds to live.

``sympy.integrate`` and ``simplify`` can run for minutes, and cannot be interrupted from within. Numbers
never wait for them; only what is printed may, and does without where the time is over.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

__all__ = ["within"]

Result = TypeVar("Result")


def within(seconds: float, function: Callable[..., Result], *arguments: object) -> Result | None:
    """``function(*arguments)`` in a process of its own; None where it takes longer, or fails."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send(sender: Connection, function: Callable[..., Result], arguments: tuple) -> None:
    try:
        sender.send(function(*arguments))
    except Exception:  # whatever SymPy stumbles on, the integral sign stays
        sender.send(None)
