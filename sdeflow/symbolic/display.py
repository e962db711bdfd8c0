"""SymPy's own integration, for display only: in a process of its own, with seconds to live.

``sympy.integrate`` can run for minutes, and cannot be interrupted from within. Numbers never wait for
it; only a printed formula may, and keeps its integral sign when the time is over.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection

import sympy as sp

from sdeflow.symbolic.moments import Moments

__all__ = ["integrate_within"]


def integrate_within(moments: Moments, seconds: float = 2.0) -> Moments | None:
    """``moments`` with its integrals carried out, or None if SymPy cannot do so in time."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_integrate, args=(moments, sender), daemon=True)
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


def _integrate(moments: Moments, sender: Connection) -> None:
    try:
        log_alpha = moments.log_alpha.doit()
        offset, var = (e.subs(moments.log_alpha, log_alpha).doit() for e in (moments.offset, moments.var))
        done = replace(moments, log_alpha=log_alpha, alpha=sp.exp(log_alpha), offset=offset, var=var)
        sender.send(done if done.closed and not var.has(sp.I) else None)
    except Exception:  # whatever SymPy stumbles on, the integral sign stays
        sender.send(None)
