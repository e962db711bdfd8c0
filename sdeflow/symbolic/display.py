"""SymPy's own integration and matrix exponential, for display only; without them a formula keeps its integral."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from sdeflow.symbolic.moments import Moments
from sdeflow.symbolic.patience import within

__all__ = ["exponential_within", "integrate_within"]


def integrate_within(moments: Moments, seconds: float = 2.0) -> Moments | None:
    """``moments`` with its integrals evaluated, or None if SymPy cannot do this in time."""
    return within(seconds, _integrated, moments)


def exponential_within(F: sp.ImmutableMatrix, B: sp.Expr, seconds: float = 2.0) -> sp.ImmutableMatrix | None:
    """exp(F B), or None if SymPy cannot find it in time."""
    return within(seconds, _exponential, F, B)


def _integrated(moments: Moments) -> Moments | None:
    log_alpha = moments.log_alpha.doit()
    offset, var = (e.subs(moments.log_alpha, log_alpha).doit() for e in (moments.offset, moments.var))
    done = replace(moments, log_alpha=log_alpha, alpha=sp.exp(log_alpha), offset=offset, var=var)
    return done if done.closed and not var.has(sp.I) else None


def _exponential(F: sp.ImmutableMatrix, B: sp.Expr) -> sp.ImmutableMatrix:
    rate = sp.Dummy("B", positive=True)
    return sp.ImmutableMatrix((F * rate).exp().applyfunc(sp.simplify)).subs(rate, B)
