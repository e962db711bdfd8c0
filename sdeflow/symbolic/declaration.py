r"""What the user declares: dx = f(x, t) dt + g(x, t) dw on [0, T], and nothing derived but the affine split.

A :class:`Declaration` is frozen, hashable and free of numbers of any schedule: parameters stay symbols,
so that changing a value derives nothing anew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import sympy as sp
from sympy.core.function import AppliedUndef

from sdeflow.errors import DeclarationError, NotAffineError, ScheduleError, UnsafeExpressionError
from sdeflow.symbolic.affine import AffineDrift, affine_split, kink_in_state
from sdeflow.symbolic.symbols import t, x

__all__ = ["Coefficient", "Declaration", "declare", "parameter_symbols"]

Coefficient = sp.Expr | float | Callable[[sp.Symbol, sp.Symbol], sp.Expr]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}\Z")


@dataclass(frozen=True)
class Declaration:
    """dx = f dt + g dw on [0, T], read in the sense of Itô.

    Attributes:
        f: the drift, a SymPy expression in x, t and the parameters.
        g: the diffusion, likewise.
        T: the horizon, the last time at which f and g are finite.
        cutoff: the first time that solvers and training visit; None lets the kernel choose it.
        P0: the kernel's variance at t = 0.
        parameters: the other symbols in f and g.
    """

    f: sp.Expr
    g: sp.Expr
    T: float = 1.0
    cutoff: float | None = None
    P0: float = 0.0
    parameters: tuple[sp.Symbol, ...] = ()

    @cached_property
    def affine(self) -> AffineDrift | None:
        """``(a, b)`` where f = a(t) x + b(t) and g does not hold x; otherwise None."""
        return None if self.g.has(x) else affine_split(self.f)

    def require_affine(self, purpose: str) -> AffineDrift:
        """``(a, b)``, or a :class:`NotAffineError` that says which sub-expression stands in the way."""
        if self.affine is not None:
            return self.affine
        if self.g.has(x):
            reason = f"the diffusion g = {self.g} depends on the state (read in the sense of Itô)"
        else:
            kink = kink_in_state(self.f)
            reason = f"the drift f = {self.f} is not affine in x"
            if kink is not None and kink != self.f:
                reason += f", because of {kink}"
        raise NotAffineError(
            f"{purpose}: this SDE has no Gaussian perturbation kernel, for {reason}. Still available: "
            "sde.reverse() and sde.flow_ode() as equations, and with a score and a prior= of your own "
            "their sample(), encode(), decode() and log_prob()."
        )


def declare(
    f: Coefficient,
    g: Coefficient,
    T: float = 1.0,
    cutoff: float | None = None,
    parameters: Iterable[sp.Symbol] = (),
    P0: float = 0.0,
    calculus: str = "ito",
) -> Declaration:
    r"""Reads and checks a declaration.

    With ``calculus="stratonovich"`` the drift is converted: f + ½ g ∂g/∂x.

    Raises:
        DeclarationError: naming what was given and what is expected.
        UnsafeExpressionError: for text and for parameter names that are not plain identifiers.
        ScheduleError: for a diffusion that is identically zero.
    """
    parameters = tuple(parameters)
    drift = _coefficient(f, "f", parameters)
    diffusion = _coefficient(g, "g", parameters)
    if diffusion == 0:
        raise ScheduleError("g is identically 0: the equation has no noise, so no kernel, score or reverse SDE.")
    if calculus not in ("ito", "stratonovich"):
        raise DeclarationError(f'calculus must be "ito" or "stratonovich", not {calculus!r}.')
    if calculus == "stratonovich":
        drift = drift + diffusion * sp.diff(diffusion, x) / 2
    T = _real(T, "T")
    if T <= 0:
        raise DeclarationError(f"T must be positive, not {T:g}.")
    if cutoff is not None:
        cutoff = _real(cutoff, "cutoff")
        if not 0 <= cutoff < T:
            raise DeclarationError(f"cutoff must lie in [0, T) = [0, {T:g}), not at {cutoff:g}.")
    P0 = _real(P0, "P0")
    if P0 < 0:
        raise DeclarationError(f"P0 is a variance and must not be negative; it is {P0:g}.")
    return Declaration(drift, diffusion, T, cutoff, P0, parameters)


def parameter_symbols(params: Mapping[sp.Symbol | str, object], f: object, g: object) -> dict[sp.Symbol, object]:
    """``params`` with each key the very Symbol that f or g holds (a name stands for the symbol so called).

    Raises:
        UnsafeExpressionError: for a name that is not a plain identifier.
        DeclarationError: for a key that is neither a Symbol nor a name, and for x and t.
    """
    if not isinstance(params, Mapping):
        raise DeclarationError(f"params must be a dict of Symbols or names to values, not {params!r}.")
    used = {symbol.name: symbol for e in (f, g) if isinstance(e, sp.Expr) for symbol in e.free_symbols}
    resolved = {}
    for key, value in params.items():
        if not isinstance(key, sp.Symbol | str):
            raise DeclarationError(f"a key of params must be a Symbol or a name, not {key!r}.")
        name = key if isinstance(key, str) else key.name
        _require_plain(name)
        if name in ("x", "t"):
            raise DeclarationError(f"{name} is the {'state' if name == 'x' else 'time'} and cannot be a parameter.")
        resolved[key if isinstance(key, sp.Symbol) else used.get(name, sp.Symbol(name))] = value
    return resolved


def _require_plain(name: str) -> None:
    if not _NAME.match(name):
        raise UnsafeExpressionError(f"a symbol's name must match [A-Za-z_][A-Za-z0-9_]*, 32 letters at most: {name!r}.")


def _real(value: object, name: str) -> float:
    if isinstance(value, sp.Expr) and value.is_number and value.is_real:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise DeclarationError(f"{name} must be a finite real number, not {value!r}.")
    return float(value)


def _coefficient(value: Coefficient, name: str, parameters: tuple[sp.Symbol, ...]) -> sp.Expr:
    """``value`` as a checked SymPy expression in x, t and the parameters."""
    if isinstance(value, str):
        raise UnsafeExpressionError(
            f"{name} was given as text, {value[:60]!r}, and text is never evaluated: "
            "write it with sdeflow.x and sdeflow.t, as a SymPy expression."
        )
    if callable(value) and not isinstance(value, sp.Basic | sp.MatrixBase):
        try:
            value = value(x, t)
        except TypeError as error:
            raise DeclarationError(f"{name} is a function that could not be called with (x, t): {error}") from error
    if isinstance(value, Real) and not isinstance(value, bool | sp.Basic):
        number = _real(value, name)
        value = sp.Integer(int(number)) if number.is_integer() else sp.Float(number)
    if not isinstance(value, sp.Expr) or isinstance(value, sp.MatrixBase):
        raise DeclarationError(
            f"{name} must be a scalar SymPy expression in sdeflow.x and sdeflow.t, a function of (x, t) "
            f"or a number, not {type(value).__name__}: {value!r}"
        )
    if value.has(sp.nan, sp.zoo, sp.oo, -sp.oo):
        raise ScheduleError(f"{name} = {value} is not finite.")
    known = {symbol.name: symbol for symbol in (x, t, *parameters)}
    for symbol in sorted(value.free_symbols, key=str):
        twin = known.get(symbol.name)
        _require_plain(symbol.name)
        if twin is None:
            raise DeclarationError(
                f"{name} holds the symbol {symbol.name}, which is neither sdeflow.x, sdeflow.t nor a declared "
                f"parameter; give it a value with params={{{symbol.name!r}: ...}}."
            )
        if twin != symbol:
            raise DeclarationError(
                f"{name} holds a different Symbol({symbol.name!r}), with other assumptions: use sdeflow.{symbol.name}."
                if symbol.name in ("x", "t")
                else f"{name} holds a different Symbol({symbol.name!r}) than params: use the same Symbol in both."
            )
    for call in value.atoms(AppliedUndef):
        _require_plain(call.func.__name__)
        raise DeclarationError(f"{name} holds {call}, a function without a definition.")
    return value
