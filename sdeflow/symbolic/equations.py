r"""The two equations that turn noise into data, derived from f, g and the score s(x, t).

Reverse-time SDE (Anderson 1982; arXiv:2011.13456, eq. 6), with dt < 0 and w̄ a Brownian motion backwards in time:

    dx = [f - ∂(g^2)/∂x - g^2 s] dt + g dw̄

Probability-flow ODE (arXiv:2011.13456, eq. 13), which has the same marginals p_t:

    dx/dt = f - ½ ∂(g^2)/∂x - ½ g^2 s

The derivative of g^2 vanishes unless the noise depends on the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp

from sdeflow.symbolic.symbols import s, x

__all__ = ["Equation", "forward", "probability_flow", "reverse_time"]


@dataclass(frozen=True)
class Equation:
    """dx = drift dt + diffusion dw, as it stands in a paper.

    Attributes:
        drift: the bracket before dt.
        diffusion: the factor of the noise; 0 for an ordinary differential equation.
        noise: the name of the Brownian motion, for display.
    """

    drift: sp.Expr
    diffusion: sp.Expr
    noise: str = "w"

    def __str__(self) -> str:
        if self.diffusion == 0:
            return f"dx/dt = {self.drift}"
        drift = "" if self.drift == 0 else f"[{self.drift}] dt + "
        return f"dx = {drift}{_factor(self.diffusion, str)}d{self.noise}"

    def latex(self) -> str:
        r"""LaTeX of the equation, without delimiters."""
        drift = sp.latex(self.drift)
        if self.diffusion == 0:
            return rf"\frac{{dx}}{{dt}} = {drift}"
        noise = {"w": "w", "w̄": r"\bar{w}"}[self.noise]
        bracket = "" if self.drift == 0 else rf"\left[{drift}\right] dt + "
        return rf"dx = {bracket}{_factor(self.diffusion, sp.latex)}d{noise}"

    def _repr_latex_(self) -> str:
        return f"$\\displaystyle {self.latex()}$"


def forward(f: sp.Expr, g: sp.Expr) -> Equation:
    """dx = f dt + g dw."""
    return Equation(f, g)


def reverse_time(f: sp.Expr, g: sp.Expr) -> Equation:
    """dx = [f - ∂(g^2)/∂x - g^2 s] dt + g dw̄."""
    return Equation(f - sp.diff(g**2, x) - g**2 * s, g, "w̄")


def probability_flow(f: sp.Expr, g: sp.Expr) -> Equation:
    """dx/dt = f - ½ ∂(g^2)/∂x - ½ g^2 s."""
    return Equation(f - sp.diff(g**2, x) / 2 - g**2 * s / 2, sp.Integer(0))


def _factor(expr: sp.Expr, printer: Callable[[sp.Expr], str]) -> str:
    """The factor before a differential: nothing for 1, brackets around a sum."""
    text = printer(expr)
    return "" if expr == 1 else f"({text}) " if expr.is_Add else f"{text} "
