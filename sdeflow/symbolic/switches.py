"""Places where an expression of t may not be smooth: its parts that switch, and the values at which they switch.

A Piecewise switches where the two sides of a condition are equal; Abs, sign and the root of a square where their
argument is 0; Max and Min where two arguments are equal; floor and Mod at integers; a table at its knots. Each of these
is a :class:`Switch`. The break points are the solutions of ``expr == level``. They are exact if the expression is
linear in t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import sympy as sp
from sympy.core.relational import Relational

from sdeflow.symbolic.patience import small
from sdeflow.symbolic.schedule import Schedule
from sdeflow.symbolic.squares import is_even_root
from sdeflow.symbolic.symbols import t

__all__ = ["JUMPING", "Switch", "exact", "jumps", "switches"]

_ROUNDED = (sp.floor, sp.ceiling, sp.frac)
_SIGNED = (sp.Abs, sp.sign, sp.Heaviside)
JUMPING = (Relational, sp.sign, sp.Heaviside, *_ROUNDED, sp.Mod, sp.atan2)


@dataclass(frozen=True)
class Switch:
    """A change of branch where ``expr`` equals one of ``levels``, or any integer if ``levels`` is None."""

    expr: sp.Expr
    levels: tuple[float, ...] | None = (0.0,)

    @property
    def line(self) -> tuple[sp.Expr, sp.Expr] | None:
        """Slope and value at t = 0 if the expression is linear in t; else None."""
        if not small(self.expr) or not self.expr.is_polynomial(t):
            return None
        line = sp.Poly(exact(self.expr), t)
        return (line.coeff_monomial(t), line.coeff_monomial(1)) if line.degree() == 1 else None


def switches(expressions: Sequence[sp.Expr]) -> list[Switch]:
    """The switches in the expressions that depend on t, inner parts first."""
    return _found(expressions, sp.Basic)


def jumps(expressions: Sequence[sp.Expr]) -> list[Switch]:
    """The switches at which a value may jump: without Abs, Max, Min and tables, which have only kinks."""
    return _found(expressions, JUMPING)


def _found(expressions: Sequence[sp.Expr], kinds: type | tuple[type, ...]) -> list[Switch]:
    found: dict[Switch, None] = {}
    for expression in expressions:
        for node in sp.postorder_traversal(expression):
            for switch in _of(node) if isinstance(node, kinds) else ():
                if switch.expr.has(t):
                    found.setdefault(switch)
    return list(found)


def exact(expr: sp.Expr) -> sp.Expr:
    """``expr`` with its floats as fractions of exactly their value."""
    return expr.xreplace({number: sp.Rational(number) for number in expr.atoms(sp.Float)})


def _of(node: sp.Basic) -> Iterator[Switch]:
    if isinstance(node, Relational):
        yield Switch(node.lhs - node.rhs)
    elif isinstance(node, _SIGNED):
        yield Switch(node.args[0])
    elif is_even_root(node):
        yield Switch(node.base.base)
    elif isinstance(node, sp.Max | sp.Min):
        yield from (Switch(first - second) for first, second in combinations(node.args, 2))
    elif isinstance(node, _ROUNDED):
        yield Switch(node.args[0], None)
    elif isinstance(node, sp.Mod):
        yield Switch(node.args[0] / node.args[1], None)
    elif isinstance(node, sp.atan2):
        yield Switch(node.args[0])
    elif isinstance(node, Schedule) and node.breakpoints:
        yield Switch(node.args[0], node.breakpoints)
