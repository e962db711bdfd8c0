"""The symbols in which an SDE is declared: the state x, the time t, the data x_0, the score s(x, t).

``x`` stands for each coordinate of the state. Components that influence each other, such as position and
velocity, are declared by :func:`state`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import sympy as sp

from sdeflow.errors import DeclarationError, UnsafeExpressionError

__all__ = [
    "StateSymbol", "data_symbols", "require_not_the_start", "require_plain", "s", "score_symbols", "state", "t",
    "unused", "x", "x_0",
]  # fmt: skip

x = sp.Symbol("x", real=True)
"""The state, elementwise."""

t = sp.Symbol("t", nonnegative=True)
"""Time: 0 at the data, T at the prior."""

x_0 = sp.Symbol("x_0", real=True)
"""The state at t = 0."""

s = sp.Function("s", real=True)(x, t)
"""The score: the gradient of log p_t(x), elementwise."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}\Z")


class StateSymbol(sp.Symbol):
    """One component of a coupled state. Its index in the state is part of its identity.

    Attributes:
        index: the index of the component.
        names: the names of all components, in order.
    """

    __slots__ = ("index", "names")

    def __new__(cls, index: int, names: tuple[str, ...]) -> StateSymbol:
        symbol = sp.Symbol.__xnew__(cls, names[index], real=True)
        symbol.index, symbol.names = index, names
        return symbol

    def __getnewargs_ex__(self) -> tuple[tuple, dict]:
        return (self.index, self.names), {}

    def _hashable_content(self) -> tuple:
        return (*super()._hashable_content(), self.index, self.names)

    @property
    def siblings(self) -> tuple[StateSymbol, ...]:
        """All components of the state, in order."""
        return tuple(StateSymbol(i, self.names) for i in range(len(self.names)))


def state(names: str | Sequence[str]) -> tuple[StateSymbol, ...]:
    """The components of a coupled state, as ``x, v = sdeflow.state("x v")``.

    Raises:
        UnsafeExpressionError: if a name is not a plain identifier.
        DeclarationError: if there is no name, a name is repeated, or one is ``t``.
    """
    if not isinstance(names, str | list | tuple):
        raise DeclarationError(f'a state is declared by its components\' names, as "x v" or ("x", "v"), not {names!r}.')
    names = tuple(names.replace(",", " ").split()) if isinstance(names, str) else tuple(names)
    for name in names:
        require_plain(name)
    if not names or len(set(names)) != len(names) or "t" in names:
        raise DeclarationError(f"a state needs different names, none of them t: {names}.")
    for name in names:
        require_not_the_start(name, names)
    return tuple(StateSymbol(i, names) for i in range(len(names)))


def data_symbols(components: Sequence[sp.Symbol]) -> tuple[sp.Symbol, ...]:
    """The components at t = 0: x_0 for x."""
    return tuple(sp.Symbol(f"{component.name}_0", real=True) for component in components)


def score_symbols(components: Sequence[sp.Symbol]) -> tuple[sp.Expr, ...]:
    """The components of the score: s(x, t) of an elementwise SDE; s_x(x, v, t), s_v(x, v, t) of a coupled state."""
    if tuple(components) == (x,):
        return (s,)
    return tuple(sp.Function(f"s_{component.name}", real=True)(*components, t) for component in components)


def require_not_the_start(name: str, components: Iterable[str]) -> None:
    """Raises a DeclarationError if ``name`` is that of a component at t = 0, such as x_0."""
    if name in {f"{component}_0" for component in components}:
        raise DeclarationError(f"{name} is the state at t = 0: choose another name.")


def unused(name: str, taken: Iterable[sp.Basic]) -> str:
    """``name``; or name_1, name_2, ... if a symbol in the expressions ``taken`` has it, so that they print apart."""
    names = {symbol.name for expr in taken for symbol in expr.free_symbols}
    return next(free for free in (name, *(f"{name}_{i + 1}" for i in range(len(names)))) if free not in names)


def require_plain(name: object) -> str:
    """``name``; an UnsafeExpressionError if it is not a plain identifier."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise UnsafeExpressionError(f"a symbol's name must match [A-Za-z_][A-Za-z0-9_]*, 32 letters at most: {name!r}.")
    return name
