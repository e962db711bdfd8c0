"""Options that several functions share: each is a key of one TypedDict, with its type and its meaning.

A function with these options is written ``def solve(self, x, **options: Unpack[SolveOptions])``. Editors then list
them, and a type checker refuses other names. :func:`takes` checks the names in each call, and shows them in the
signature.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from sdeflow.errors import OptionError

__all__ = ["named", "takes"]

_MEANT = {
    "method": "solver", "optimizer": "optimiser", "samples": "draws", "n_steps": "steps", "num_steps": "steps",
    "epochs": "steps", "learning_rate": "lr", "p0": "P0", "param": "params", "variances": "covariances",
    "stds": "covariances",
}  # fmt: skip
"""Names of other libraries, and what they are here."""
_ELSEWHERE = {
    "y": "A condition goes with the score: score.given(y).",
    "label": "A condition goes with the score: score.given(label).",
    "guidance": "Guidance goes with the score: score.guided(y, strength=...).",
}
"""What is no option, and where it goes."""

F = TypeVar("F", bound=Callable[..., Any])


def takes(options: type, like: Callable[..., object]) -> Callable[[F], F]:
    """A decorator for a function that takes ``**options``: its signature then lists them, with their defaults.

    Args:
        options: the TypedDict whose keys are the options.
        like: a function or dataclass that has all of them as arguments, with their defaults.

    Raises:
        OptionError: if the function is called with an argument of another name.
    """
    theirs = inspect.signature(like).parameters
    listed = [theirs[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in options.__annotations__]
    # Options without a default come first.
    listed.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)

    def decorate(function: F) -> F:
        """``function`` with its options' names checked and shown."""
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        signature = signature.replace(parameters=[*own, *listed])
        return _checked(function, signature)

    return decorate


def named(function: F) -> F:
    """``function`` without ``**options``, with the names of its arguments checked in each call.

    Raises:
        OptionError: if the function is called with an argument of another name.
    """
    return _checked(function, inspect.signature(function))


def _checked(function: F, signature: inspect.Signature) -> F:
    known, name = frozenset(signature.parameters), function.__qualname__
    name = name.removesuffix(".__init__") if name.endswith(".__init__") else function.__name__

    @functools.wraps(function)
    def checked(*args: object, **given: object) -> object:
        if not known.issuperset(given):
            raise _unknown(name, [*given], [name for name in signature.parameters if name != "self"])
        return function(*args, **given)

    checked.__signature__ = signature  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def _unknown(function: str, given: list[str], known: list[str]) -> OptionError:
    name = next(name for name in given if name not in known)
    near = [_MEANT[name]] if _MEANT.get(name) in known else difflib.get_close_matches(name, known, 1, 0.5)
    meant = f" Did you mean {near[0]}?" if near else ""
    meant = f" {_ELSEWHERE[name]}" if name in _ELSEWHERE else meant
    return OptionError(f"{function} has no option {name}.{meant} It takes {', '.join(known)}.")
