"""Functions that declare a coefficient: called once, with symbols, in the order of the names of their arguments.

    lambda x, t: -x / 2        as documented
    lambda t, x: -x / 2        as in torchsde and torchdiffeq: read by its names

An argument named t (or time, tau) is the time, and an argument with the name of a component is that component, at any
place. If there is one component, y, z or state mean the state too. Capitals, a plural s, digits and underscores change
nothing: T, ts, ``t_`` and t0 are the time. All other arguments take the remaining symbols, in the order (x, t) or
(x, v, ..., t). Names that contradict each other, or of which none is known, are refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence

import sympy as sp

from sdeflow.errors import DeclarationError
from sdeflow.symbolic.symbols import t

__all__ = ["applied", "takes_one"]

_TIMES = ("t", "time", "tau")
_STATES = ("x", "xt", "y", "z", "state")  # names of a state in other libraries

# Messages of NumPy, PyTorch, math and SymPy if a function of numbers gets a symbol, with the name of the function.
_NUMERIC = tuple(
    map(
        re.compile,
        (
            r"no callable (\w+) method",
            r"^(\w+)\(\).*must be Tensor",
            r"^(\w+)\(\) received an invalid combination",
            r"has no attribute '(\w+)'",
            r"annot convert expression to float|must be real number",
        ),
    )
)
_OURS = {
    "abs": "Abs",
    "absolute": "Abs",
    "maximum": "Max",
    "minimum": "Min",
    "where": "Piecewise",
    "clamp": "Min",
    "clip": "Min",
}


def applied(function: Callable, name: str, components: Sequence[sp.Symbol]) -> object:
    """The result of ``function`` for the components of the state and t.

    Args:
        function: a function of the components and t, in the order of the names of its arguments.
        name: the name of the coefficient, for messages.
        components: the components of the state.

    Raises:
        DeclarationError: if the function does not take them, its names contradict each other, or it calls a function
            that is not SymPy's.
    """
    symbols = (*components, t)
    wanted = ", ".join(symbol.name for symbol in symbols)
    arguments = _in_order(function, name, symbols)
    try:
        return function(*arguments)
    except (TypeError, AttributeError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        if len(symbols) > 1 and takes_one(function):
            said = f"it takes one argument: write lambda {wanted}: ..., with all of them"
        raise DeclarationError(
            f"{name} is a function that could not be called with ({wanted}): {said}{_hint(said)}"
        ) from error


def takes_one(function: Callable) -> bool:
    """Whether a function takes a single argument; False if unknown."""
    try:
        inspect.signature(function).bind(t)
        return len(_argument_names(function) or ()) == 1
    except (TypeError, ValueError):
        return False


def _in_order(function: Callable, name: str, symbols: tuple[sp.Symbol, ...]) -> tuple[sp.Symbol, ...]:
    """The symbols in the order of the arguments of the function."""
    names = _argument_names(function)
    if names is None or len(names) < len(symbols):
        return symbols
    further, names = names[len(symbols) :], names[: len(symbols)]
    told = {symbol.name: symbol for symbol in symbols}
    told.update({other: t for other in _TIMES if other not in told})
    found = [told.get(argument) or _meant(argument, symbols) for argument in names]
    known = [symbol for symbol in found if symbol is not None]
    left = [symbol for symbol in symbols if symbol not in known]
    clash = len(set(known)) < len(known) or any(argument in told for argument in further)
    clash = clash or (not known and len(symbols) > 1)
    if left == [t]:  # the last argument is the time, so it must not have the name of a state
        clash = clash or next(n for n, symbol in zip(names, found, strict=True) if symbol is None) in _STATES
    if clash:
        raise DeclarationError(
            f"{name} is a function of ({', '.join(names)}), whose names do not show which argument is the time: write "
            f"a function of ({', '.join(symbol.name for symbol in symbols)}), in any order."
        )
    rest = iter(left)
    return tuple(next(rest) if symbol is None else symbol for symbol in found)


def _meant(argument: str, symbols: tuple[sp.Symbol, ...]) -> sp.Symbol | None:
    """The time, or the only component, if a name is a usual one for it, such as T, ts or x0; else None."""
    plain = re.sub(r"[_\d]", "", argument).lower()
    forms = {plain, plain.removesuffix("s")}
    if forms.intersection(_TIMES):
        return t
    return symbols[0] if len(symbols) == 2 and forms.intersection(_STATES) else None


def _argument_names(function: Callable) -> list[str] | None:
    """The names of the positional arguments; None if unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in by_position]


def _hint(message: str) -> str:
    """The advice for a function that takes only numbers."""
    once = ". It is called once, with SymPy symbols: write"
    if "truth value" in message:
        return f"{once} a condition as sp.Piecewise((value, condition), ...), sp.Max or sp.Min."
    match = next(filter(None, (pattern.search(message) for pattern in _NUMERIC)), None)
    if match is None:
        return ""
    called = match.group(1) if match.re.groups else "sqrt"
    return f"{once} SymPy's functions, as sp.{_OURS.get(called, called)} for {called} of NumPy, PyTorch or math."
