"""Presentation MathML of SymPy expressions, which browsers show without scripts or a network.

SymPy's printer does most of the work. This module corrects it: names of functions keep their case and their subscripts,
derivatives have brackets and the order on the variable, Piecewise has a brace, and the result is well-formed XML.
"""

from __future__ import annotations

import html
from xml.dom.minidom import Element, Node, Text

import sympy as sp
from sympy.core.function import AppliedUndef
from sympy.printing.conventions import requires_partial
from sympy.printing.mathml import MathMLPresentationPrinter

from sdeflow.symbolic.schedule import Schedule

__all__ = ["mathml"]

_PLAIN = {"&ExponentialE;": "e", "&dd;": "d"}


def mathml(expr: sp.Basic) -> str:
    """A ``<math>`` element; an expression that cannot be printed becomes text, never an error."""
    try:
        element = _Printer()._print(expr)
        _escape(element)
        return f'<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">{element.toxml()}</math>'
    except Exception:  # the printer does not know some nodes; plain text is better than an error
        return f"<code>{html.escape(str(expr))}</code>"


def _escape(node: Node) -> None:
    """Replaces entities that only HTML knows by characters, and escapes text, which SymPy does not."""
    if isinstance(node, Text):
        node.data = html.escape(_PLAIN.get(node.data) or html.unescape(node.data), quote=False)
    for child in node.childNodes:
        _escape(child)


class _Printer(MathMLPresentationPrinter):
    """The printer; SymPy finds its methods by the names of the classes that they print."""

    def _element(self, tag: str, *children: Element | str) -> Element:
        element = self.dom.createElement(tag)
        for child in children:
            element.appendChild(self.dom.createTextNode(child) if isinstance(child, str) else child)
        return element

    def _print_Function(self, expr: sp.Function) -> Element:
        if not isinstance(expr, AppliedUndef | Schedule):
            return super()._print_Function(expr)
        name = self._print(sp.Symbol(expr.func.__name__))
        return self._element("mrow", name, self._paren_comma_separated(*expr.args))

    def _print_besseli(self, expr: sp.besseli) -> Element:
        name = self._element("msub", self._element("mi", "I"), self._print(expr.order))
        return self._element("mrow", name, self._paren_comma_separated(expr.argument))

    def _print_Derivative(self, expr: sp.Derivative) -> Element:
        d, order = "∂" if requires_partial(expr.expr) else "d", sum(count for _, count in expr.variable_count)
        below = self._element("mrow")
        for variable, count in expr.variable_count:
            below.appendChild(self._element("mo", d))
            below.appendChild(self._power(self._print(variable), count))
        fraction = self._element("mfrac", self._power(self._element("mo", d), order), below)
        inner = self._print(expr.expr)
        if expr.expr.is_Add or expr.expr.is_Mul:
            inner = self._element("mrow", self._element("mo", "("), inner, self._element("mo", ")"))
        return self._element("mrow", fraction, inner)

    def _power(self, base: Element, exponent: sp.Expr) -> Element:
        return base if exponent == 1 else self._element("msup", base, self._print(sp.Integer(exponent)))

    def _print_Piecewise(self, expr: sp.Piecewise) -> Element:
        table = self._element("mtable")
        for value, condition in expr.args:
            when = [self._element("mtext", "for "), self._print(condition)]
            when = [self._element("mtext", "otherwise")] if condition == sp.true else when
            cells = self._element("mtd", self._print(value)), self._element("mtd", self._element("mrow", *when))
            table.appendChild(self._element("mtr", *cells))
        return self._element("mrow", self._element("mo", "{"), table)
