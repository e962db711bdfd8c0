r"""The check whether two expressions are equal, by substitution.

:func:`verify` expands the difference of both sides. If this is not 0, it evaluates both sides in 30 digits at five
times and points. For this, derivatives are taken, constants are moved out of integrals, and then integrals, schedules
and undefined functions are replaced by arbitrary numbers, for which the identity must hold. A schedule at a number,
such as B(0), keeps its value. A derivation is only as good as these checks. They do not use the rules by which a
formula was found.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import sympy as sp
from sympy.core.function import AppliedUndef

from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.lamperti import rationals
from sdeflow.symbolic.schedule import Schedule
from sdeflow.symbolic.symbols import t

__all__ = ["Identity", "Numbers", "check_times", "initial_value", "judged", "verify"]

Identity = tuple[sp.Expr | sp.MatrixBase, sp.Expr | sp.MatrixBase]
Numbers = Mapping[sp.Symbol, float]

_TIMES = tuple(sp.Rational(k, 97) for k in (7, 29, 47, 71, 96))  # in units of the horizon
_STANDING = (sp.Integral, sp.Derivative, AppliedUndef, Schedule)
_STEPPED = (sp.floor, sp.ceiling, sp.frac, sp.Mod)
_TOLERANCE = 1e-10
_FLOOR = 1e-29  # the resolution of 30 digits
_EXPANDABLE = 400  # the most operations of an expression that is expanded


def verify(
    identities: Iterable[Identity], numbers: Numbers, T: float, positive: sp.Expr | None = None
) -> tuple[str, bool]:
    """How well both sides of each identity agree, in words, and whether they agree.

    Args:
        identities: pairs of expressions or matrices; symbols without a number get arbitrary numbers.
        numbers: values of the parameters.
        T: the horizon.
        positive: what the identities divide by; times at which it is 0 are left out, as long as some are left.
    """
    pairs = [pair for sides in identities for pair in zip(*map(_entries, sides), strict=True)]
    differences = [left - right for left, right in pairs]
    if all(d == 0 or (d.count_ops() < _EXPANDABLE and sp.expand(d) == 0) for d in differences):
        return "0, by substitution", True
    try:
        held = pairs if positive is None else [*pairs, (positive, positive)]
        points = [at for at in _evaluators(held, numbers, T) if positive is None or at(positive) > _FLOOR]
        worst = max(_defect(at(left), at(right)) for at in points for left, right in pairs)
        return judged(worst, times=len(points))
    except (TypeError, ValueError, ArithmeticError):  # no number, so no proof
        return "FAILED: it could not be evaluated", False


def judged(worst: float, tolerance: float = _TOLERANCE, times: int = len(_TIMES)) -> tuple[str, bool]:
    """The check of a step whose largest relative residual is ``worst``, at so many times."""
    if worst <= tolerance:
        return f"≤ {max(worst, _FLOOR):.0e} at {times} times", True
    return f"FAILED: off by {worst:.1g} of its size", False


def initial_value(value: sp.Expr, rate: sp.Expr, start: sp.Expr, time: sp.Symbol = t) -> list[Identity]:
    """The identities of ``value`` as the solution of value' = rate, value(0) = start."""
    return [(sp.diff(value, time), rate), (value.subs(time, 0), start)]


def check_times(T: float) -> list[float]:
    """The times at which identities are evaluated."""
    return [float(fraction * T) for fraction in _TIMES]


def _entries(side: sp.Expr | sp.MatrixBase) -> list[sp.Expr]:
    return [_settled(rationalised(entry)) for entry in (side if isinstance(side, sp.MatrixBase) else [sp.S(side)])]


def _settled(expr: sp.Expr) -> sp.Expr:
    """``expr`` with constant factors moved before its integrals, without integrals over empty intervals, and with the
    slopes of floor, Mod and their like between jumps."""
    expr = expr.replace(_is_slope_of_steps, _slope_of_steps) if expr.has(*_STEPPED) else expr

    def pull(function: sp.Expr, *limits: sp.Tuple) -> sp.Expr:
        variable, *ends = limits[0]
        if len(ends) == 2 and ends[0] == ends[1]:
            return sp.Integer(0)
        if isinstance(function, sp.Piecewise) and any(value != 0 for value, _ in function.args):
            constant, function = _scaled(function, variable)
        else:
            constant, function = function.as_independent(variable, as_Add=False)
        return constant * sp.Integral(function, *limits)

    return expr.replace(sp.Integral, pull) if expr.has(sp.Integral) else expr


def _is_slope_of_steps(node: sp.Basic) -> bool:
    """Whether a node is the derivative of a floor or its like, or, inner parts first, that derivative at a place."""
    if isinstance(node, sp.Derivative):
        return node.expr.func in _STEPPED and node.expr.args[:1] == node.variables
    return isinstance(node, sp.Subs) and node.expr.is_number


def _slope_of_steps(node: sp.Basic) -> sp.Expr:
    return node.expr if isinstance(node, sp.Subs) else sp.Integer(node.expr.func in (sp.Mod, sp.frac))


def _scaled(function: sp.Piecewise, variable: sp.Symbol) -> tuple[sp.Expr, sp.Piecewise]:
    """The factor of the first branch but 0 that does not contain ``variable``, and the function divided by it."""
    factors = [value.as_independent(variable, as_Add=False) for value, _ in function.args]
    constant = next(own for (own, _), (value, _) in zip(factors, function.args, strict=True) if value != 0)
    inside = {atom for own, _ in factors for atom in own.atoms(sp.Piecewise)}
    standing = {atom: sp.Dummy() for atom in inside}  # SymPy inverts a Piecewise by branches: no cancellation
    back = {dummy: atom for atom, dummy in standing.items()}
    scales = [sp.cancel(own.xreplace(standing) / constant.xreplace(standing)).xreplace(back) for own, _ in factors]
    branches = zip(scales, factors, function.args, strict=True)
    return constant, sp.Piecewise(*((scale * rest, when) for scale, (_, rest), (_, when) in branches))


def _evaluators(
    pairs: Sequence[tuple[sp.Expr, sp.Expr]], numbers: Numbers, T: float
) -> Iterator[Callable[[sp.Expr], sp.Expr]]:
    """Functions that evaluate an expression at numbers, one for each time."""
    sides = [side for pair in pairs for side in pair]
    atoms = sorted(set().union(*map(_outermost, sides)), key=sp.default_sort_key)
    dummies = {atom: sp.Dummy(f"c{i}") for i, atom in enumerate(atoms)}
    known = rationals(numbers)
    symbols = set().union(*(side.free_symbols for side in sides)) - {t, *known}
    free = [*sorted(symbols, key=lambda symbol: (symbol.name, sp.default_sort_key(symbol))), *dummies.values()]
    for j, fraction in enumerate(_TIMES):
        generator = random.Random(j)
        drawn = {symbol: sp.Float(0.3 + 0.6 * generator.random(), 40) for symbol in free}
        yield partial(_number_of, dummies, {**drawn, **known, t: sp.Float(fraction * sp.Rational(str(T)), 40)})


def _number_of(dummies: dict[sp.Basic, sp.Dummy], at: Numbers, expr: sp.Expr) -> sp.Expr:
    return expr.xreplace(dummies).subs(at).evalf(30)


def _outermost(expr: sp.Basic) -> set[sp.Basic]:
    """The outermost integrals, derivatives and undefined functions in ``expr`` that have no value."""
    if isinstance(expr, Schedule) and expr.known and expr.args[0].is_number:
        return set()
    if isinstance(expr, _STANDING):
        return {expr}
    return {atom for part in expr.args for atom in _outermost(part)}


def _defect(left: sp.Expr, right: sp.Expr) -> float:
    """The difference of two numbers, relative to their size."""
    size = float(abs(left) + abs(right))
    if not math.isfinite(size):
        raise ValueError(f"{left} and {right} are not numbers")
    return float(abs(left - right)) / size if size > 1e-25 else 0.0
