"""Text such as "-beta*x/2" to a SymPy expression, by a grammar that allows nothing else::

    expression := prefix (operator expression)*       by binding power, as in Python; ^ is **
    prefix     := number | name | function "(" expression ("," expression)* ")" | "(" expression ")"
                | ("-" | "+" | "not") expression
                | "Piecewise" "(" pair ("," pair)* ")"      pair := "(" expression "," condition ")"

Text is never evaluated. It is read into the tree of :mod:`sdeflow.symbolic.tree`, with the same checks and limits as
a file.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple, NoReturn

import sympy as sp

from sdeflow.errors import DeclarationError, UnsafeExpressionError
from sdeflow.symbolic.tree import FUNCTIONS, MAX_DEPTH, MAX_INTEGER, from_tree

__all__ = ["MAX_LENGTH", "parse"]

MAX_LENGTH = 20_000

_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<operator>\*\*|<=|>=|==|!=|[-+*/^()<>,])|(?P<space>[ \t\r\n]+)"
)

# Operator: (binding power, binding power of the operand on its right, operation).
_BINARY = {
    "or": (1, 2, "Or"), "and": (2, 3, "And"),
    **{relation: (4, 5, relation) for relation in ("<", "<=", ">", ">=", "==", "!=")},
    "+": (5, 6, "Add"), "-": (5, 6, "Add"), "*": (6, 7, "Mul"), "/": (6, 7, "Mul"),
    "**": (8, 7, "Pow"), "^": (8, 7, "Pow"),
}  # fmt: skip
_NOT, _SIGN = 3, 7

_ALIASES = {"ln": "log", "abs": "Abs"}
_WORDS = {"and", "or", "not"}
_CONSTANTS: dict[str, dict] = {
    "pi": {"constant": "pi"}, "E": {"constant": "E"}, "True": {"bool": True}, "False": {"bool": False},
}  # fmt: skip
_MINUS_ONE = {"int": -1}
_NO_SCHEDULES = (
    " Text knows no schedule by name: write the formula in its place, such as (0.1 + 19.9*t), or declare f and g in "
    "SymPy, with b = sdeflow.schedule(function or table) and f = -b(t)*x/2."
)


def parse(text: str, names: Mapping[str, sp.Basic]) -> sp.Expr:
    """The expression of ``text``; decimals are exact, so 0.1 is the fraction 1/10.

    Args:
        text: numbers, ``+ - * / ** ^``, parentheses, pi, E, the functions of :data:`~sdeflow.symbolic.tree.FUNCTIONS`
            with sqrt, ln and abs, and ``Piecewise((value, condition), ..., (value, True))``.
        names: the symbols of all other names; a name given here replaces pi or E.

    Raises:
        DeclarationError: if a name is not in ``names``.
        UnsafeExpressionError: if the text is outside the grammar or exceeds the limits.

    >>> from sdeflow import t, x
    >>> from sdeflow.symbolic.grammar import parse
    >>> parse("-(0.1 + 19.9*t)*x/2", {"x": x, "t": t})
    x*(-199*t/10 - 1/10)/2
    """
    if not isinstance(text, str):
        raise DeclarationError(f"text is needed, not {type(text).__name__}: {text!r}")
    parser = _Parser(text, names)
    tree = parser.whole()
    expr = from_tree(tree, names)
    if not isinstance(expr, sp.Expr):
        raise UnsafeExpressionError(f"{text[:60]!r} is a condition, and a value is needed.")
    return expr


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


class _Parser:
    """Reads tokens by precedence climbing, with one token of lookahead."""

    def __init__(self, text: str, names: Mapping[str, sp.Basic]) -> None:
        if len(text) > MAX_LENGTH:
            raise UnsafeExpressionError(f"an expression has at most {MAX_LENGTH} characters, not {len(text)}.")
        self._text, self._names = text, names
        self._tokens = self._tokenize()
        self._next = 0
        self._depth = 0

    def whole(self) -> dict:
        tree = self._expression(0)
        self._expect("")
        return tree

    def _tokenize(self) -> list[_Token]:
        tokens, position = [], 0
        while position < len(self._text):
            match = _TOKEN.match(self._text, position)
            if match is None or match.lastgroup is None:
                self._refuse(f"{self._text[position]!r} is not part of the grammar", position)
            if match.lastgroup != "space":
                tokens.append(_Token(match.lastgroup, match.group(), position))
            position = match.end()
        return [*tokens, _Token("end", "", position)]

    def _refuse(
        self, reason: str, position: int, error: type[DeclarationError] = UnsafeExpressionError, hint: str = ""
    ) -> NoReturn:
        around = self._text[max(0, position - 20) : position] + " >>> " + self._text[position : position + 20]
        raise error(f"{reason}, at character {position + 1}: {around!r}. Text is never evaluated, only read.{hint}")

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._token
        self._next += 1
        return token

    def _expect(self, text: str) -> None:
        if self._token.text != text:
            found = repr(self._token.text[:40]) if self._token.text else "the end"
            self._refuse(f"{repr(text) if text else 'an operator'} is expected, not {found}", self._token.position)
        if text:
            self._next += 1

    def _expression(self, weakest: int) -> dict:
        """The expression up to the first operator that binds more weakly than ``weakest``."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"the expression is nested more than {MAX_DEPTH} deep", self._token.position)
        left, gathered = self._prefix(), None
        while (operator := self._token.text) in _BINARY and _BINARY[operator][0] >= weakest:
            self._take()
            _, power, operation = _BINARY[operator]
            right = self._expression(power)
            if operator == "-":
                right = _operation("Mul", _MINUS_ONE, right)
            elif operator == "/":
                right = _operation("Pow", right, _MINUS_ONE)
            # A long sum is one wide node, not a deep tree.
            if operation == gathered and operation in ("Add", "Mul", "And", "Or"):
                left["args"].append(right)
            else:
                left, gathered = _operation(operation, left, right), operation
        self._depth -= 1
        return left

    def _prefix(self) -> dict:
        token = self._take()
        match token:
            case _Token("number"):
                return self._number(token)
            case _Token(_, "-"):
                return _operation("Mul", _MINUS_ONE, self._expression(_SIGN))
            case _Token(_, "+"):
                return self._expression(_SIGN)
            case _Token(_, "not"):
                return _operation("Not", self._expression(_NOT))
            case _Token(_, "("):
                inner = self._expression(0)
                self._expect(")")
                return inner
            case _Token("name", name) if name not in _WORDS:
                return self._call(token) if self._token.text == "(" else self._name(token)
        self._refuse("a number, a name or '(' is expected", token.position)

    def _number(self, token: _Token) -> dict:
        digits, _, exponent = token.text.lower().partition("e")
        # Before any power of ten is computed.
        short = len(digits) <= 40 and len(exponent) <= 4 and abs(int(exponent or 0)) <= 40
        value = Fraction(token.text) if short else None
        if value is None or value.numerator >= MAX_INTEGER or value.denominator >= MAX_INTEGER:
            self._refuse("a number must be a fraction of integers below 2**63", token.position)
        return {"int": int(value)} if value.denominator == 1 else {"rational": [value.numerator, value.denominator]}

    def _name(self, token: _Token) -> dict:
        name = token.text
        if name in self._names:
            return {"symbol": name}
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if "__" in name or keyword.iskeyword(name):
            self._refuse(f"{name[:40]!r} is not part of the grammar", token.position)
        known = ", ".join([*self._names, "pi", "E"])
        message = f"unknown name {name[:40]!r}; known are {known}. A parameter needs params={{{name[:40]!r}: ...}}"
        self._refuse(message, token.position, DeclarationError)

    def _call(self, token: _Token) -> dict:
        name = _ALIASES.get(token.text, token.text)
        if name not in FUNCTIONS and name not in ("sqrt", "Piecewise"):
            times = "; write * to multiply" if name in self._names else ""
            reason = f"{token.text[:40]!r} is not a function of the grammar{times}"
            self._refuse(reason, token.position, hint="" if times else _NO_SCHEDULES)
        self._expect("(")
        args = self._pair() if name == "Piecewise" else [self._expression(0)]
        while self._token.text == ",":
            self._take()
            args += self._pair() if name == "Piecewise" else [self._expression(0)]
        self._expect(")")
        if name == "beta" and len(args) == 1:
            reason = "beta(a, b), Euler's function, takes 2 arguments, not 1"
            self._refuse(reason, token.position, hint=_NO_SCHEDULES)
        if name != "sqrt":
            return _operation(name, *args)
        if len(args) != 1:
            self._refuse(f"sqrt takes 1 argument, not {len(args)}", token.position)
        return _operation("Pow", *args, {"rational": [1, 2]})

    def _pair(self) -> list[dict]:
        self._expect("(")
        value = self._expression(0)
        self._expect(",")
        condition = self._expression(0)
        self._expect(")")
        return [value, condition]


def _operation(name: str, *args: dict) -> dict:
    return {"op": name, "args": list(args)}
