r"""The two equations that turn noise into data, derived from f, g and the score s(x, t).

Reverse-time SDE (Anderson 1982; arXiv:2011.13456, eq. 6), with dt < 0 and w̄ a Brownian motion backwards in time:

    dx = [f - ∇·(g gᵀ) - g gᵀ s] dt + g dw̄

Probability-flow ODE (arXiv:2011.13456, eq. 13), which has the same marginals p_t:

    dx/dt = f - ½ ∇·(g gᵀ) - ½ g gᵀ s

The divergence ∇·(g gᵀ) has the components Σ_j ∂(g gᵀ)_ij / ∂x_j. It is 0 if the noise does not depend on the
state, and ∂(g²)/∂x for an elementwise SDE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.derivative import derivative
from sdeflow.symbolic.symbols import score_symbols, x

__all__ = ["Equation", "forward", "probability_flow", "reverse_time"]

_ELEMENTWISE = (x,)


@dataclass(frozen=True)
class Equation:
    """dx = drift dt + diffusion dw, as it is written in papers.

    Attributes:
        drift: the bracket before dt: an expression, or a column for a coupled state.
        diffusion: the factor of the noise: an expression, or a matrix for a coupled state; 0 for an ordinary
            differential equation.
        noise: the name of the Brownian motion, for display.
        state: the components.
    """

    drift: sp.Expr | sp.ImmutableMatrix
    diffusion: sp.Expr | sp.ImmutableMatrix
    noise: str = "w"
    state: tuple[sp.Symbol, ...] = _ELEMENTWISE

    @property
    def coupled(self) -> bool:
        """Whether the state has components."""
        return self.state != _ELEMENTWISE

    @property
    def drifts(self) -> tuple[sp.Expr, ...]:
        """The drift of each component."""
        return tuple(self.drift) if self.coupled else (self.drift,)

    @property
    def noise_matrix(self) -> sp.ImmutableMatrix:
        """The diffusion as a matrix, components by Brownian motions."""
        return self.diffusion if self.coupled else sp.ImmutableMatrix([[self.diffusion]])

    def __str__(self) -> str:
        return ",  ".join(self._lines(str, "d{0}/dt = {1}", "d{0} = {1}", "[{0}] dt", self.noise, "{0}_{1}"))

    def latex(self) -> str:
        r"""LaTeX of the equation, without delimiters."""
        noise = {"w": "w", "w̄": r"\bar{w}"}[self.noise]
        lines = self._lines(
            sp.latex, r"\frac{{d{0}}}{{dt}} = {1}", "d{0} = {1}", r"\left[{0}\right] dt", noise, "{0}_{{{1}}}"
        )
        return (
            lines[0]
            if len(lines) == 1
            else r"\begin{aligned}" + r" \\ ".join(line.replace("=", "&=", 1) for line in lines) + r"\end{aligned}"
        )

    def _lines(
        self, printer: Callable[[sp.Expr], str], ode: str, sde: str, bracket: str, noise: str, index: str
    ) -> list[str]:
        """One line for each component, in the syntax of ``printer``."""
        matrix, lines = self.noise_matrix, []
        for i, (component, drift) in enumerate(zip(self.state, self.drifts, strict=True)):
            if self.diffusion == 0:
                lines.append(ode.format(printer(component), printer(drift)))
                continue
            terms = [] if drift == 0 else [bracket.format(printer(drift))]
            for j in range(matrix.shape[1]):
                if matrix[i, j] != 0:
                    name = noise if matrix.shape[1] == 1 else index.format(noise, j + 1)
                    terms.append(f"{_factor(matrix[i, j], printer)}d{name}")
            lines.append(sde.format(printer(component), " + ".join(terms) or "0"))
        return lines

    def _repr_latex_(self) -> str:
        return f"$\\displaystyle {self.latex()}$"


def forward(declaration: Declaration) -> Equation:
    """dx = f dt + g dw."""
    return Equation(declaration.f, declaration.g, "w", declaration.state)


def reverse_time(declaration: Declaration) -> Equation:
    """dx = [f - ∇·(g gᵀ) - g gᵀ s] dt + g dw̄."""
    return Equation(_drift(declaration, sp.Integer(1)), declaration.g, "w̄", declaration.state)


def probability_flow(declaration: Declaration) -> Equation:
    """dx/dt = f - ½ ∇·(g gᵀ) - ½ g gᵀ s."""
    return Equation(_drift(declaration, sp.Rational(1, 2)), sp.Integer(0), "w", declaration.state)


def _drift(declaration: Declaration, share: sp.Expr) -> sp.Expr | sp.ImmutableMatrix:
    """f - share (∇·(g gᵀ) + g gᵀ s)."""
    state, gram = declaration.state, declaration.gram
    score = score_symbols(state)
    drifts = []
    for i, f in enumerate(declaration.drifts):
        terms = [derivative(gram[i, j], state[j]) + gram[i, j] * score[j] for j in range(len(state))]
        drifts.append(f - sum(sp.expand_mul(share * term) if term.is_Add else share * term for term in terms))
    return sp.ImmutableMatrix(drifts) if declaration.coupled else drifts[0]


def _factor(expr: sp.Expr, printer: Callable[[sp.Expr], str]) -> str:
    """The factor before a differential: empty for 1, with brackets for a sum."""
    text = printer(expr)
    return "" if expr == 1 else f"({text}) " if expr.is_Add else f"{text} "
