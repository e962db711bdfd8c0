"""SIGTERM and Ctrl-C during a run: the step is finished and saved before the process goes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_Handler = Callable[[int, FrameType | None], Any] | int | None


class Interrupts:
    """Notes a signal instead of dying of it; a context. A second signal has its usual effect at once.

    Outside the main thread, where Python takes no handlers, it does nothing.

    Attributes:
        caught: the signal, or None.
    """

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._usual: dict[signal.Signals, _Handler] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                usual = signal.getsignal(number)
                if usual is not signal.SIG_IGN and usual is not None:
                    self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # a DataLoader's worker waits for the run to end
            self.caught = signal.Signals(number)
            self._restore()

    def _restore(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._usual = {}

    def leave(self) -> None:
        """After the run is saved: what the signal does usually, which for SIGTERM is to exit with 143.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            SystemExit: for SIGTERM.
        """
        if self.caught is None:
            return
        usual = signal.getsignal(self.caught)
        if usual is signal.SIG_DFL:
            raise SystemExit(128 + self.caught)
        signal.raise_signal(self.caught)
