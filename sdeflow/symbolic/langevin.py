r"""Underdamped Langevin dynamics: a position and a velocity in contact with a heat bath.

    dx = a v dt,      dv = [F(x) - gamma(x) v] dt + s(x) dw,      s² = 2 gamma θ with θ > 0 constant.

If the coefficients do not depend on t, the stationary law is Boltzmann's for every potential Φ:

    p(x, v) ∝ exp(-Φ(x) - v² / (2 θ)),      Φ' = -F / (a θ).

In the Fokker-Planck equation the terms of friction and noise cancel at each x, and so do those of a v ∂_x and F ∂_v
(Pavliotis, Stochastic Processes and Applications, 2014, section 6.1).
"""

from __future__ import annotations

from typing import NamedTuple

import sympy as sp

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.symbols import t, x

__all__ = ["Langevin", "find_langevin"]


class Langevin(NamedTuple):
    """The parts of underdamped Langevin dynamics.

    Attributes:
        position, velocity: the indices of these components.
        slope: -Φ', in ``x`` and parameters.
        temperature: θ, the variance of the velocity.
    """

    position: int
    velocity: int
    slope: sp.Expr
    temperature: sp.Expr

    def overdamped(self, declaration: Declaration) -> Declaration:
        """dx = -Φ' dt + √2 dw, whose stationary law is that of the position."""
        return Declaration(self.slope, sp.sqrt(2), declaration.T, parameters=declaration.parameters)


def find_langevin(declaration: Declaration) -> Langevin | None:
    """The parts of a declaration of two components that is underdamped Langevin dynamics, else None."""
    if len(declaration.state) != 2 or any(e.has(t) for e in (*declaration.drifts, *declaration.diffusions)):
        return None
    return patiently(_found, declaration)


def _found(declaration: Declaration) -> Langevin | None:
    state = declaration.state
    gram = declaration.gram
    for position, velocity in ((0, 1), (1, 0)):
        q, v = state[position], state[velocity]
        a = sp.diff(declaration.drifts[position], v)
        if gram[position, position] != 0 or a == 0 or a.has(q, v) or sp.expand(declaration.drifts[position] - a * v):
            continue
        friction = -sp.diff(declaration.drifts[velocity], v)
        square = gram[velocity, velocity]
        if friction == 0 or friction.has(v) or square.has(v):
            continue
        temperature = sp.cancel(sp.expand(square) / (2 * friction))
        if temperature.has(q, v):
            temperature = sp.simplify(temperature)
        if temperature.has(q, v):
            continue
        force = sp.expand(declaration.drifts[velocity] + friction * v)
        return Langevin(position, velocity, (force / (a * temperature)).subs(q, x), temperature)
    return None
