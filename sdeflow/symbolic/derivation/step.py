"""The parts of a derivation: steps, equations, and notation that is not an expression, such as dσ²/dt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.dom.minidom import Element

import sympy as sp
from sympy.printing.mathml import MathMLPresentationPrinter
from sympy.printing.pretty.stringpict import prettyForm

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.symbols import unused

__all__ = ["SIGNS", "N", "Notation", "Step", "dt", "dw", "equals", "own", "vector"]

SIGNS = {
    "w̄": r"\bar{w}", "⁻¹": "^{-1}", "⁻ᵀ": r"^{-\top}", "²": "^2", "ᵀ": r"^\top", "₀": "_0", "½": r"\frac12",
    "α": r"\alpha", "β": r"\beta", "δ": r"\delta", "ε": r"\varepsilon", "λ": r"\lambda", "π": r"\pi", "σ": r"\sigma",
    "τ": r"\tau", "χ": r"\chi", "Σ": r"\Sigma", "Φ": r"\Phi", "∂": r"\partial", "∇": r"\nabla", "∫": r"\int",
    "·": r"\cdot", "√": r"\sqrt{\ }", "→": r"\to", "≤": r"\le", "≥": r"\ge",
}  # fmt: skip
"""LaTeX, in math mode, of the signs in texts."""

_WORDS = {
    "log ": r"\log ", " | ": r" \mid ", "E[": r"\mathbb{E}[", "Var[": r"\mathrm{Var}[", "offset": r"\mathrm{offset}",
}  # fmt: skip
_KNOWN = re.compile("|".join(map(re.escape, (*SIGNS, *_WORDS))))
_FRACTION = re.compile(r"(\w+)/(\w+)")


@dataclass(frozen=True)
class Step:
    """One step of a derivation.

    Attributes:
        title: the name of the result.
        text: the derivation, in one or two sentences.
        equations: the results.
        rule: the rule that gave them; empty if there is only one way.
        check: the outcome of substituting the result; empty if nothing can be substituted.
        holds: whether the check has passed.
    """

    title: str
    text: str
    equations: tuple[sp.Basic, ...] = ()
    rule: str = ""
    check: str = ""
    holds: bool = True


class Notation(sp.Symbol):
    """A symbol with its own LaTeX, by default that of its name; products keep their order."""

    __slots__ = ("tex",)

    def __new__(cls, text: str, tex: str | None = None) -> Notation:
        symbol = sp.Symbol.__xnew__(cls, text, commutative=False)
        symbol.tex = _in_latex(text) if tex is None else tex
        return symbol

    def _hashable_content(self) -> tuple:
        return (*super()._hashable_content(), self.tex)

    def _latex(self, printer: object) -> str:
        return self.tex

    def _pretty(self, printer: object) -> prettyForm:
        return prettyForm(self.name)

    def _mathml_presentation(self, printer: MathMLPresentationPrinter) -> Element:
        fraction = printer.dom.createElement("mfrac")
        for name in self.name.split("/") if _FRACTION.fullmatch(self.name) else [self.name]:
            part = fraction.appendChild(printer.dom.createElement("mi"))
            part.appendChild(printer.dom.createTextNode(name))
        return fraction if len(fraction.childNodes) == 2 else part


def own(declaration: Declaration, name: str, **assumptions: bool) -> sp.Symbol:
    """A symbol for the derivation, with a name that no parameter and no component has."""
    return sp.Symbol(unused(name, (*declaration.parameters, *declaration.state)), **assumptions)


def vector(name: str) -> Notation:
    """The name of a column; its first letter is bold in LaTeX."""
    return Notation(name, rf"\mathbf{{{name[0]}}}{_in_latex(name[1:])}")


def equals(left: sp.Basic | str, right: object) -> sp.Eq:
    """An unevaluated equation; a text on its left side is notation."""
    return sp.Eq(Notation(left) if isinstance(left, str) else left, right, evaluate=False)


def _in_latex(text: str) -> str:
    tex = _KNOWN.sub(lambda found: {**SIGNS, **_WORDS}[found[0]], text)
    return r"\frac{" + tex.replace("/", "}{") + "}" if _FRACTION.fullmatch(text) else tex


dt, dw = Notation("dt"), Notation("dw")
N = sp.Function("N")  # the normal law
