r"""The declaration of an SDE by the user: dx = f(x, t) dt + g(x, t) dw on [0, T], with its affine split.

A :class:`Declaration` is frozen and hashable. Parameters stay symbols in it, so a new value of a parameter needs no new
derivation. The state is one symbol x, which stands for each coordinate, or several components that influence each other
(:func:`~sdeflow.symbolic.symbols.state`); then f is a column, and g a matrix, components by Brownian motions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import sympy as sp
from sympy.core.function import AppliedUndef

from sdeflow.errors import DeclarationError, NotAffineError, ScheduleError
from sdeflow.symbolic.affine import affine_split, kink_in_state
from sdeflow.symbolic.arguments import applied
from sdeflow.symbolic.derivative import derivative
from sdeflow.symbolic.grammar import parse
from sdeflow.symbolic.squares import with_squares_read
from sdeflow.symbolic.symbols import StateSymbol, require_not_the_start, require_plain, state, t, x
from sdeflow.symbolic.tree import OF_TIME_ALONE

__all__ = [
    "AffineDrift",
    "Coefficient",
    "Declaration",
    "coefficient_of",
    "declare",
    "parameter_symbols",
    "stratonovich_correction",
]

Coefficient: TypeAlias = sp.Expr | float | str | Callable[..., sp.Expr] | Sequence["Coefficient"] | sp.MatrixBase
AffineDrift: TypeAlias = tuple[sp.Expr, sp.Expr] | tuple[sp.ImmutableMatrix, sp.ImmutableMatrix]

_ELEMENTWISE = (x,)
_LONGEST_NUMBER = 2**13  # bits of the numerator or the denominator of a number: about 2,500 digits


@dataclass(frozen=True)
class Declaration:
    """dx = f dt + g dw on [0, T], in the sense of Itô.

    Attributes:
        f: the drift, a SymPy expression in the state, t and the parameters; a column for a coupled state.
        g: the diffusion, in the same symbols; for a coupled state a matrix, components by Brownian motions.
        T: the horizon, the last time at which f and g are finite.
        cutoff: the first time of solvers and of training; None lets the kernel choose it.
        P0: the kernel's covariance at t = 0: a variance, or a matrix for a coupled state.
        parameters: the other symbols in f and g.
        state: the components; (x,) if x stands for each coordinate.
        path: (alpha, sigma) if f and g were derived from a Gaussian path, else None.
    """

    f: sp.Expr | sp.ImmutableMatrix
    g: sp.Expr | sp.ImmutableMatrix
    T: float = 1.0
    cutoff: float | None = None
    P0: float | sp.ImmutableMatrix = 0.0
    parameters: tuple[sp.Symbol, ...] = ()
    state: tuple[sp.Symbol, ...] = _ELEMENTWISE
    path: tuple[sp.Expr, sp.Expr] | None = None

    @property
    def coupled(self) -> bool:
        """Whether the state has components."""
        return self.state != _ELEMENTWISE

    @property
    def drifts(self) -> tuple[sp.Expr, ...]:
        """The drift of each component."""
        return tuple(self.f) if self.coupled else (self.f,)

    @property
    def diffusions(self) -> tuple[sp.Expr, ...]:
        """The entries of g, one row of the matrix after the other."""
        return tuple(self.g) if self.coupled else (self.g,)

    @cached_property
    def gram(self) -> sp.ImmutableMatrix:
        """g gᵀ, components by components; 1 by 1 for an elementwise SDE."""
        return sp.ImmutableMatrix(self.g * self.g.T) if self.coupled else sp.ImmutableMatrix([[self.g**2]])

    @property
    def diagonal(self) -> bool:
        """Whether each component has its own Brownian motion."""
        return not self.coupled or (self.g.is_square and self.g.is_diagonal())

    @property
    def state_dependent_noise(self) -> bool:
        """Whether g depends on the state."""
        return any(entry.has(*self.state) for entry in self.diffusions)

    @property
    def initial_variances(self) -> tuple[float, ...]:
        """The kernel's variance of each component at t = 0."""
        if isinstance(self.P0, sp.MatrixBase):
            return tuple(float(self.P0[i, i]) for i in range(len(self.state)))
        return (self.P0,)

    @property
    def initial_covariance(self) -> list[list[float]]:
        """P0 as the rows of a matrix over the components."""
        rows = self.P0.tolist() if isinstance(self.P0, sp.MatrixBase) else [[self.P0]]
        return [[float(entry) for entry in row] for row in rows]

    @property
    def held(self) -> set[sp.Symbol]:
        """The symbols that f, g and the path hold."""
        return set().union(*(e.free_symbols for e in (*self.drifts, *self.diffusions, *(self.path or ()))))

    @property
    def domain_hint(self) -> str:
        """The advice if a step of a solve has left the domain of coefficients such as √x; empty if no state can."""
        if not self.state_dependent_noise:
            return ""
        return (
            " A step may have left the states where f, g and the score are real, such as x < 0 for √x: take more "
            "steps (the flow adapts them where steps= is left out); the score should be finite wherever paths go."
        )

    @property
    def simulation_hint(self) -> str:
        """The same for a simulation."""
        if not self.state_dependent_noise:
            return ""
        return (
            " A step may have left the states where f and g are real, such as x < 0 for √x: take more steps; "
            'simulate() takes boundary="truncate", "reflect" or "absorb", and solver="exact" if there is a kernel.'
        )

    @property
    def auxiliary(self) -> tuple[int, ...]:
        """Auxiliary components, which hold no data and start as noise: those with P0 > 0 if others have P0 = 0."""
        noisy = tuple(i for i, variance in enumerate(self.initial_variances) if variance > 0)
        return noisy if len(noisy) < len(self.state) else ()

    @cached_property
    def affine(self) -> AffineDrift | None:
        """``(a, b)`` if f = a(t) x + b(t) and g does not depend on the state; otherwise None.

        For a coupled state a is the matrix F(t) and b a column.
        """
        splits = [split for split in self._splits if split is not None]
        if self.state_dependent_noise or len(splits) < len(self._splits):
            return None
        if not self.coupled:
            (((a,), b),) = splits
            return a, b
        return sp.ImmutableMatrix([slopes for slopes, _ in splits]), sp.ImmutableMatrix([b for _, b in splits])

    def with_cutoff(self, cutoff: float | None) -> Declaration:
        """A copy with another cutoff; it keeps the derived results."""
        other = replace(self, cutoff=_first_time(cutoff, self.T))
        for derived in ("affine", "gram", "_splits"):
            if derived in vars(self):
                vars(other)[derived] = vars(self)[derived]
        return other

    @cached_property
    def _splits(self) -> list[tuple[tuple[sp.Expr, ...], sp.Expr] | None]:
        """The affine split of each drift, or None."""
        return [affine_split(f, self.state) for f in self.drifts]

    def require_affine(self, purpose: str, also: str = "") -> AffineDrift:
        """``(a, b)``; if f is not affine, a :class:`NotAffineError` that names the sub-expression at fault."""
        if self.affine is None:
            raise self.not_affine(purpose, also)
        return self.affine

    def not_affine(self, purpose: str, also: str = "") -> NotAffineError:
        """The error that says why this SDE has no Gaussian kernel, and what can be done instead."""
        why = f"{self.obstacle}; {also}" if also else self.obstacle
        return NotAffineError(
            f"{purpose}: this SDE has no Gaussian perturbation kernel, because {why}. Still available: "
            "sde.simulate(), sde.reverse() and sde.flow_ode() as equations, training by simulation (fit on a "
            'Score that predicts="score"), and with a score their sample(), encode(), decode() and log_prob().'
        )

    @property
    def obstacle(self) -> str:
        """A clause that says why this SDE has no Gaussian kernel; empty if it has one."""
        for g in self.diffusions:
            if g.has(*self.state):
                return f"the diffusion g = {g} depends on the state (read in the sense of Itô)"
        for f, split in zip(self.drifts, self._splits, strict=True):
            if split is None:
                kink = kink_in_state(f, self.state)
                because = f", because of {kink}" if kink is not None and kink != f else ""
                return f"the drift f = {f} is not affine in {', '.join(map(str, self.state))}{because}"
        return ""


def declare(
    f: Coefficient,
    g: Coefficient,
    T: float = 1.0,
    cutoff: float | None = None,
    parameters: Iterable[sp.Symbol] = (),
    P0: object = 0.0,
    calculus: str = "ito",
    names: Sequence[str] | None = None,
) -> Declaration:
    r"""Reads and checks a declaration.

    With ``calculus="stratonovich"`` the drift is converted: f_i + ½ Σ_jl g_jl ∂g_il/∂x_j.

    Args:
        f, g: one coefficient; for a coupled state a list, and for g also a matrix, components by Brownian motions.
        T, cutoff, P0: see :class:`Declaration`; P0 may be a list of variances.
        parameters: the symbols other than the state and t.
        calculus: "ito" or "stratonovich".
        names: the names of the components, needed if f and g are text or functions of several components.

    Raises:
        DeclarationError: if an argument does not fit, or a parameter is named x_0. The message names the argument and
            what is expected.
        UnsafeExpressionError: if text is outside the grammar, or a name is not a plain identifier.
        ScheduleError: if the diffusion is identically zero.
    """
    parameters = tuple(parameters)
    components = _components(f, g, names)
    for parameter in parameters:
        require_not_the_start(parameter.name, [component.name for component in components])
    coupled = components != _ELEMENTWISE
    column = applied(f, "f", components) if coupled and _is_function(f) else f
    matrix = applied(g, "g", components) if coupled and _is_function(g) else g
    if coupled:
        drift = sp.ImmutableMatrix(
            [coefficient_of(v, "f", components, parameters) for v in _column(column, components)]
        )
        entries = [[coefficient_of(v, "g", components, parameters) for v in row] for row in _matrix(matrix, components)]
        diffusion = sp.ImmutableMatrix(entries)
    else:
        drift, diffusion = (coefficient_of(v, n, components, parameters) for v, n in ((f, "f"), (g, "g")))
    if all(entry == 0 for entry in (diffusion if coupled else (diffusion,))):
        raise ScheduleError("g is identically 0: the equation has no noise, so no kernel, score or reverse SDE.")
    if not isinstance(calculus, str) or calculus not in ("ito", "stratonovich"):
        raise DeclarationError(f'calculus must be "ito" or "stratonovich", not {calculus!r}.')
    if calculus == "stratonovich":
        correction = stratonovich_correction(diffusion if coupled else sp.ImmutableMatrix([[diffusion]]), components)
        drift = sp.ImmutableMatrix(drift + correction) if coupled else drift + correction[0]
    T = _real(T, "T")
    if T <= 0:
        raise DeclarationError(f"T must be positive, not {T:g}.")
    cutoff = _first_time(cutoff, T)
    covariance = _covariance(P0, len(components)) if coupled else _variance(P0)
    return Declaration(drift, diffusion, T, cutoff, covariance, parameters, components)


def stratonovich_correction(g: sp.ImmutableMatrix, components: Sequence[sp.Symbol]) -> sp.ImmutableMatrix:
    """½ Σ_jl g_jl ∂g_il/∂x_j, a column: the Itô drift minus the Stratonovich drift."""
    k, m = g.shape
    return sp.ImmutableMatrix(
        [
            sum(g[j, n] * derivative(g[i, n], components[j]) for j in range(k) for n in range(m)) / 2
            for i in range(k)
        ]
    )  # fmt: skip


def parameter_symbols(
    params: Mapping[sp.Symbol | str, object] | None, *coefficients: object
) -> dict[sp.Symbol, object]:
    """``params`` with the Symbols of f and g as keys; a name stands for the Symbol of this name.

    Raises:
        UnsafeExpressionError: if a name is not a plain identifier.
        DeclarationError: if a key is neither a Symbol nor a name, or is x or t.
    """
    if params is None:
        return {}
    if not isinstance(params, Mapping):
        raise DeclarationError(f"params must be a dict of Symbols or names to values, not {params!r}.")
    used = {symbol.name: symbol for e in _expressions(coefficients) for symbol in e.free_symbols}
    resolved = {}
    for key, value in params.items():
        if not isinstance(key, sp.Symbol | str):
            raise DeclarationError(f"a key of params must be a Symbol or a name, not {key!r}.")
        name = key if isinstance(key, str) else key.name
        require_plain(name)
        if name in ("x", "t") or isinstance(used.get(name), StateSymbol):
            raise DeclarationError(f"{name} is the {'time' if name == 't' else 'state'} and cannot be a parameter.")
        resolved[key if isinstance(key, sp.Symbol) else used.get(name, sp.Symbol(name))] = value
    return resolved


def _expressions(values: object) -> list[sp.Basic]:
    """The SymPy expressions in (nested) lists."""
    if isinstance(values, sp.MatrixBase):
        return list(values)
    if isinstance(values, sp.Basic):
        return [values]
    return [e for value in values for e in _expressions(value)] if isinstance(values, list | tuple) else []


def _within_doubles(expr: sp.Expr) -> sp.Expr:
    """exp(1e6 (t - 0.3)) if SymPy has written it as 4e-130289 exp(1e6 t): numbers return to the exponent."""

    def is_extreme(number: sp.Expr) -> bool:
        return number.is_Float and number != 0 and not 1e-300 < abs(number) < 1e300

    def held(product: sp.Mul) -> sp.Expr:
        number = next(factor for factor in product.args if is_extreme(factor))
        power = next(factor for factor in product.args if isinstance(factor, sp.exp))
        shift = sp.Rational(str(sp.log(abs(number)).evalf(30)))
        rest = [factor for factor in product.args if factor not in (number, power)]
        return sp.Mul(sp.sign(number), sp.exp(power.args[0] + shift), *rest)

    if not any(map(is_extreme, expr.atoms(sp.Float))):
        return expr
    return expr.replace(
        lambda e: e.is_Mul and any(map(is_extreme, e.args)) and any(isinstance(f, sp.exp) for f in e.args), held
    )


def _is_function(value: object) -> TypeGuard[Callable[..., Any]]:
    return callable(value) and not isinstance(value, sp.Basic | sp.MatrixBase | type)


def _components(f: object, g: object, names: Sequence[str] | None) -> tuple[sp.Symbol, ...]:
    """The state of a declaration: from the symbols in f and g, from ``names``, or x alone."""
    found = {s for e in _expressions([f, g]) for s in e.free_symbols if isinstance(s, StateSymbol)}
    states = {symbol.names for symbol in found}
    if names is not None:
        states.add(tuple(symbol.name for symbol in state(names)))
    if len(states) > 1:
        shown = " and ".join(f"({', '.join(one)})" for one in sorted(states))
        raise DeclarationError(f"f and g mix the components of different states: {shown}.")
    if states:
        if any(x in e.free_symbols for e in _expressions([f, g])):
            raise DeclarationError(f"f and g hold sdeflow.x beside the state ({', '.join(states.pop())}); use one.")
        return state(states.pop())
    size = next((len(_as_list(v)) for v in (f, g) if isinstance(v, list | tuple | sp.MatrixBase)), None)
    if size is None:
        return _ELEMENTWISE
    if any(isinstance(v, str) or _is_function(v) for v in (f, g, *_as_list(f), *_as_list(g))):
        raise DeclarationError('text and functions of several components need their names: state=("x", "v").')
    if any(x in e.free_symbols for e in _expressions([f, g])):
        name, value = next((n, v) for n, v in (("f", f), ("g", g)) if isinstance(v, list | tuple | sp.MatrixBase))
        raise DeclarationError(
            f"{name} is a {type(value).__name__}, so of a coupled state, and sdeflow.x is none of its components: "
            'declare them by x, v = sdeflow.state("x v").'
        )
    return state([f"x{i + 1}" for i in range(size)])


def _as_list(value: object) -> list:
    if isinstance(value, sp.MatrixBase | np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def _column(value: object, components: tuple[sp.Symbol, ...]) -> list:
    """f as one coefficient for each component."""
    entries = _as_list(value)
    entries = [entry[0] if isinstance(entry, list | tuple) and len(entry) == 1 else entry for entry in entries]
    if isinstance(value, str) or len(entries) != len(components):
        raise DeclarationError(f"f must have {len(components)} components ({_listed(components)}), not {value!r}.")
    return entries


def _matrix(value: object, components: tuple[sp.Symbol, ...]) -> list[list]:
    """g as a matrix, components by Brownian motions; a list is its diagonal."""
    rows, k = _as_list(value), len(components)
    if not isinstance(value, list | tuple | sp.MatrixBase | np.ndarray) or len(rows) != k:
        raise DeclarationError(
            f"g must be a list of {k} coefficients or a matrix of {k} rows ({_listed(components)}), not {value!r}."
        )
    if not any(isinstance(row, list | tuple) for row in rows):
        return [[row if i == j else 0 for j in range(k)] for i, row in enumerate(rows)]
    if not all(isinstance(row, list | tuple) and len(row) == len(rows[0]) >= 1 for row in rows):
        raise DeclarationError(f"the rows of g must be of one length, not {value!r}.")
    return [list(row) for row in rows]


def _listed(components: tuple[sp.Symbol, ...]) -> str:
    return ", ".join(component.name for component in components)


def _real(value: object, name: str) -> float:
    if isinstance(value, sp.Expr) and value.is_number and value.is_real:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise DeclarationError(f"{name} must be a finite real number, not {value!r}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DeclarationError(f"{name} must be a finite real number within double precision, not {_shown(value)}.")
    return number


def _shown(value: object) -> str:
    """``value`` as text for messages; for a long integer, which Python may refuse to print, its size."""
    if isinstance(value, int | sp.Integer) and int(value).bit_length() > 256:
        return f"one of about {int(int(value).bit_length() * math.log10(2)) + 1} digits"
    return repr(value)


def _require_short_numbers(value: sp.Expr, name: str) -> None:
    """Raises an error for fractions that are far from every double, or that Python may refuse to print."""
    for number in value.atoms(sp.Rational):
        bits = max(abs(number.p).bit_length(), number.q.bit_length())
        if bits > _LONGEST_NUMBER:
            raise DeclarationError(
                f"{name} holds an exact number of about {int(bits * math.log10(2)) + 1} digits, and doubles end at "
                "1.8e308: write it with fewer digits, as sympy.Float, or in another unit."
            )


def _first_time(cutoff: object, T: float) -> float | None:
    if cutoff is None:
        return None
    cutoff = _real(cutoff, "cutoff")
    if not 0 <= cutoff < T:
        raise DeclarationError(f"cutoff must lie in [0, T) = [0, {T:g}), not at {cutoff:g}.")
    return cutoff


def _variance(value: object) -> float:
    value = _real(value, "P0")
    if value < 0:
        raise DeclarationError(f"P0 is a variance and must not be negative; it is {value:g}.")
    return value


def _covariance(value: object, k: int) -> sp.ImmutableMatrix:
    """P0 of a coupled state: a matrix, a list of variances, or one variance for all."""
    rows = _as_list(value)
    if not isinstance(value, list | tuple | sp.MatrixBase | np.ndarray):
        rows = [value] * k
    if not any(isinstance(row, list | tuple) for row in rows):
        rows = [[row if i == j else 0 for j in range(len(rows))] for i, row in enumerate(rows)]
    if len(rows) != k or any(not isinstance(row, list | tuple) or len(row) != k for row in rows):
        raise DeclarationError(f"P0 must be a number, {k} variances or a {k} by {k} covariance, not {value!r}.")
    matrix = sp.ImmutableMatrix([[sp.Float(_real(entry, "P0")) for entry in row] for row in rows])
    values = np.array(matrix.tolist(), dtype=np.float64)
    if matrix != matrix.T or np.linalg.eigvalsh(values).min() < -1e-12 * np.abs(values).max():
        raise DeclarationError(f"P0 is a covariance and must be symmetric and not negative; it is {value!r}.")
    return matrix


def coefficient_of(
    value: object, name: str, components: tuple[sp.Symbol, ...], parameters: tuple[sp.Symbol, ...]
) -> sp.Expr:
    """``value`` as a checked SymPy expression in the state, t and the parameters."""
    known = {symbol.name: symbol for symbol in (*components, t, *parameters)}
    if isinstance(value, str):
        value = parse(value, known)
    if _is_function(value):
        value = applied(value, name, components)
    if isinstance(value, Real) and not isinstance(value, bool | sp.Basic):
        number = _real(value, name)
        value = sp.Integer(int(number)) if number.is_integer() else sp.Float(number)
    if not isinstance(value, sp.Expr) or isinstance(value, sp.MatrixBase):
        raise DeclarationError(
            f"{name} must be a scalar SymPy expression in sdeflow.x and sdeflow.t, a function of (x, t), text "
            f"or a number (of a coupled state a list of these), not {type(value).__name__}: {value!r}"
        )
    expr: sp.Expr = value
    _require_short_numbers(expr, name)
    if expr.has(sp.nan, sp.zoo, sp.oo, -sp.oo):
        raise ScheduleError(f"{name} = {expr} is not finite.")
    # A float with fewer digits than a double would reduce the precision of all other numbers.
    expr = expr.xreplace({number: sp.Float(float(number)) for number in expr.atoms(sp.Float) if number._prec < 53})
    expr = _within_doubles(with_squares_read(expr, (*components, t)))
    for symbol in sorted(expr.free_symbols, key=str):
        twin = known.get(symbol.name)
        require_plain(symbol.name)
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
    for call in expr.atoms(*OF_TIME_ALONE):
        if call.has(*components):
            raise DeclarationError(f"{name} holds {call}: {type(call).__name__} is computed as a function of t alone.")
    for call in expr.atoms(AppliedUndef):
        require_plain(call.func.__name__)
        raise DeclarationError(
            f"{name} holds {call}, a function without a definition; sdeflow.schedule(function or table) makes one."
        )
    return expr
