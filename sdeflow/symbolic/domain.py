r"""The domain on which the coefficients of an SDE are real: the ends of each component.

An end of component v is a zero of the argument of a square root, of another power that is not an integer, or of a
logarithm in f or g, if this argument is of first or second degree in v. A zero of all noises of v at which its drift is
zero too is also an end, such as 0 for geometric Brownian motion. The process does not pass an end.
"""

from __future__ import annotations

import contextlib

import sympy as sp

from sdeflow.errors import DeclarationError
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.squares import is_even_root

__all__ = ["ends_of", "ends_that_are_told"]


def ends_of(declaration: Declaration) -> list[list[tuple[sp.Expr, sp.Expr]]]:
    """The ends of each component, in t and the parameters, each with an expression that is positive inside.

    Raises:
        DeclarationError: if the domain mixes components, or is not an interval that can be found.
    """
    found = patiently(_told, declaration, otherwise="SymPy takes too long to find where f and g are real.")
    if isinstance(found, str):
        raise DeclarationError(found)
    return found


def ends_that_are_told(declaration: Declaration) -> list[list[sp.Expr]]:
    """The ends of each component that are found, in t and the parameters; none if SymPy needs too long."""
    none: list[list[sp.Expr]] = [[] for _ in declaration.state]
    return patiently(_some_ends, declaration, otherwise=none)


def _told(declaration: Declaration) -> list[list[tuple[sp.Expr, sp.Expr]]] | str:
    """The ends, or a reason why there are none."""
    try:
        return _ends(declaration)
    except DeclarationError as error:
        return str(error)


def _some_ends(declaration: Declaration) -> list[list[sp.Expr]]:
    found: list[dict] = [{} for _ in declaration.state]
    for factor in _must_be_positive(declaration):
        with contextlib.suppress(DeclarationError):
            _add(found, factor, declaration.state)
    return [list(ends) for ends in found]


def _ends(declaration: Declaration) -> list[list[tuple[sp.Expr, sp.Expr]]]:
    state = declaration.state
    found: list[dict[sp.Expr, sp.Expr]] = [{} for _ in state]
    for factor in _must_be_positive(declaration):
        _add(found, factor, state)
    motions = len(declaration.diffusions) // len(state)
    for i, component in enumerate(state):
        row = [g for g in declaration.diffusions[i * motions : (i + 1) * motions] if g != 0]
        for factor in sp.Mul.make_args(row[0]) if row else ():
            if factor.is_polynomial(component) and factor.free_symbols & set(state) == {component}:
                for root in _roots(factor, component):
                    if all(g.subs(component, root) == 0 for g in (*row, declaration.drifts[i])):
                        found[i].setdefault(root, factor)
    return [list(ends.items()) for ends in found]


def _must_be_positive(declaration: Declaration) -> list[sp.Expr]:
    """The factors of the arguments of roots and logarithms in f or g."""
    bases = []
    for expr in (*declaration.drifts, *declaration.diffusions):
        roots = [power for power in expr.atoms(sp.Pow) if power.exp.is_integer is not True]
        bases += [power.base for power in roots if not (is_even_root(power) and power.exp.is_positive)]
        bases += [log.args[0] for log in expr.atoms(sp.log)]
    return [factor for base in bases if base.free_symbols for factor in sp.Mul.make_args(base)]


def _add(found: list[dict], factor: sp.Expr, state: tuple[sp.Symbol, ...]) -> None:
    held = [i for i, component in enumerate(state) if factor.has(component)]
    if not held:
        return
    base = factor.base if factor.is_Pow else factor
    if len(held) > 1 or not base.is_polynomial(state[held[0]]) or sp.degree(base, state[held[0]]) > 2:
        raise DeclarationError(
            f"the domain {factor} > 0 is not an interval of each component, which boundary= needs: "
            "declare f and g so that they are defined wherever a step may go (sqrt(Max(x, 0)), say)."
        )
    for root in _roots(base, state[held[0]]):
        found[held[0]].setdefault(root, base)


def _roots(polynomial: sp.Expr, component: sp.Symbol) -> list[sp.Expr]:
    """The roots of a polynomial of first or second degree; complex roots are compiled to NaN."""
    coefficients = sp.Poly(polynomial, component).all_coeffs()
    if len(coefficients) == 2:
        return [-coefficients[1] / coefficients[0]]
    if len(coefficients) != 3:
        return []
    a, b, c = coefficients
    middle, half = -b / (2 * a), sp.sqrt(b**2 - 4 * a * c) / (2 * a)
    return [] if half.is_real is False else [middle - half, middle + half]
