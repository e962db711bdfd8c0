"""The symbols in which an SDE is declared: the state x, the time t, the data x_0, the score s(x, t)."""

from __future__ import annotations

import sympy as sp

__all__ = ["s", "t", "x", "x_0"]

x = sp.Symbol("x", real=True)
"""The state, elementwise."""

t = sp.Symbol("t", nonnegative=True)
"""Time: 0 at the data, T at the prior."""

x_0 = sp.Symbol("x_0", real=True)
"""The state at t = 0."""

s = sp.Function("s", real=True)(x, t)
"""The score: the gradient of log p_t(x), elementwise."""
