"""Schedules without a formula: a Python function of t, or a table, as a SymPy function.

    beta = sdeflow.schedule(lambda t: ...)          f = -beta(t) * x / 2

The derivation stays symbolic, with integrals of beta(t). The numbers come from quadrature of an interpolant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
import sympy as sp

from sdeflow.errors import DeclarationError, ScheduleError, TooLargeError
from sdeflow.symbolic.symbols import require_plain

__all__ = ["CALLS", "MAX_KNOTS", "Schedule", "schedule", "table_of"]

MAX_KNOTS = 20_000
"""The most times of a table: each is an edge of a panel of the quadrature."""

CALLS: list[Callable[[Callable, np.ndarray], np.ndarray]] = []
"""Other ways to call a function at times (n,), if it takes neither arrays nor numbers.

The layer that has tensors adds its own.
"""

_JUMP = (
    "for a jump write sympy.Piecewise((before(t), t < c), (after(t), True)), where before and after are numbers, "
    "formulas or tables of their own"
)
_unnamed = count(1)
_tables: WeakValueDictionary = WeakValueDictionary()


class Curve(Protocol):
    """A piecewise polynomial of time, as in SciPy; ``c`` are its coefficients, (degree + 1, pieces)."""

    c: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray: ...

    def derivative(self) -> Curve: ...

    def roots(self, discontinuity: bool = ..., extrapolate: bool = ...) -> np.ndarray: ...


class Schedule(sp.Function):
    """A real function of one argument, given by its values; :func:`schedule` makes its subclasses.

    Attributes:
        values: maps times (n,) to values (n,).
        breakpoints: the times at which it is not smooth.
        order: the order of the derivative: 0 for the function itself.
        table: the (times, values) from which it was made, or None.
        curve: the piecewise cubic through the table, or its derivative.
        source: the function from which it was made, or None.
    """

    nargs = 1
    is_real = True
    values: Callable[[np.ndarray], np.ndarray]
    breakpoints: tuple[float, ...] = ()
    order: int = 0
    table: tuple[np.ndarray, np.ndarray] | None = None
    source: Callable | None = None
    curve: Curve | None = None

    @property
    def known(self) -> bool:
        """Whether its values are known. They are not for derivatives of a Python function."""
        return not self.order or self.table is not None

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        """The derivative, which is a schedule too."""
        return type(self).derivative()(self.args[0])

    def _eval_evalf(self, prec: int) -> sp.Float | None:
        """The value at a number, in double precision; derivatives of Python functions are not evaluated."""
        if not self.known or not self.args[0].is_number:
            return None
        return sp.Float(float(self.values(np.array([float(self.args[0])]))[0]))

    def __reduce__(self) -> tuple:
        """Pickles the table or the function, because the class has no importable name."""
        cls = type(self)
        name = cls.__name__.removesuffix("_t" * cls.order)
        return _restored, (cls.source if cls.table is None else cls.table, name, cls.order, self.args)

    @classmethod
    def derivative(cls) -> type[Schedule]:
        """The class of the derivative. Each schedule has only one, so that equal expressions compare equal."""
        if "_derivative" not in cls.__dict__:
            members: dict[str, object] = {"order": cls.order + 1}
            if cls.curve is not None and cls.table is not None:
                members |= _of_curve(cls.curve.derivative(), cls.table[0], cls.__name__)
            cls._derivative = type(f"{cls.__name__}_t", (cls,), members)
        return cls._derivative


def schedule(source: Callable[[float], float] | Sequence, name: str | None = None) -> type[Schedule]:
    """A SymPy function of one argument from a Python function or a table.

    Args:
        source: a function of t that takes a NumPy array, a number or a tensor; or a table, (times, values) or
            pairs (time, value), interpolated by a monotone cubic. It is used on [0, T], which a table must cover.
        name: its name in prints; by default "schedule1" and so on.

    Raises:
        DeclarationError: if ``source`` is neither, or if a table is not finite or its times do not increase.

    Example:
        >>> import sympy as sp
        >>> import sdeflow
        >>> from sdeflow import SDE, t, x
        >>> beta = sdeflow.schedule(([0, 0.5, 1], [0.1, 5, 20]), name="beta")
        >>> SDE(f=-beta(t) * x / 2, g=sp.sqrt(beta(t)))
        SDE(dx = [-x*beta(t)/2] dt + sqrt(beta(t)) dw on [0, 1])
    """
    name = f"schedule{next(_unnamed)}" if name is None else name
    require_plain(name)
    if callable(source):
        members = {"values": staticmethod(_vectorised(source, name)), "source": staticmethod(source)}
        return type(name, (Schedule,), members)
    times, values = table_of(source, name)
    identity = (name, times.tobytes(), values.tobytes())
    if identity in _tables:  # equal tables give one function, so that equal declarations compare equal
        return _tables[identity]
    from scipy.interpolate import PchipInterpolator  # half a second to import

    curve = PchipInterpolator(times, values, extrapolate=False)
    members = {"breakpoints": tuple(times.tolist()), "table": (times, values), **_of_curve(curve, times, name)}
    _tables[identity] = made = type(name, (Schedule,), members)
    return made


def _of_curve(curve: Curve, times: np.ndarray, name: str) -> dict[str, object]:
    """The attributes of a schedule that equals ``curve`` between the times of a table."""

    def within(points: np.ndarray) -> np.ndarray:
        found = curve(points)
        if np.isnan(found).any():
            at = float(np.asarray(points)[np.isnan(found)].flat[0])
            raise ScheduleError(
                f"the table of {name} runs from t = {times[0]:g} to {times[-1]:g}; it is asked for t = {at:.6g}."
            )
        return found

    return {"curve": staticmethod(curve), "values": staticmethod(within)}


def _restored(source: Callable | tuple, name: str, order: int, args: tuple) -> Schedule:
    kind = schedule(source, name)
    for _ in range(order):
        kind = kind.derivative()
    return kind(*args)


def table_of(source: Sequence, name: str, jump: str = _JUMP) -> tuple[np.ndarray, np.ndarray]:
    """Times and values of a table, checked; ``jump`` is what to do where a time is there twice."""
    try:
        if any(isinstance(part, np.ma.MaskedArray) for part in (source, *source)):
            raise DeclarationError(f"{name}: a masked array has entries without a value: leave these out of the table.")
        array = np.asarray(source, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DeclarationError(f"{name}: a schedule is a function of t or a table (times, values): {error}") from error
    if array.ndim == 2 and array.shape[0] != 2 and array.shape[1] == 2:
        array = array.T
    if array.ndim != 2 or array.shape[0] != 2 or array.shape[1] < 2:
        raise DeclarationError(f"{name}: a table is (times, values) of one length, not of shape {array.shape}.")
    if array.shape[1] > MAX_KNOTS:
        raise TooLargeError(f"{name}: a table has at most {MAX_KNOTS:,} times, not {array.shape[1]:,}: thin it out.")
    times, values = array
    if np.isfinite(array).all() and (np.diff(times) == 0).any() and (np.diff(times) >= 0).all():
        twice = float(times[:-1][np.diff(times) == 0][0])
        raise DeclarationError(
            f"{name}: a table is a smooth curve and has each time once, and t = {twice:g} is there twice: {jump}."
        )
    if not np.isfinite(array).all() or (np.diff(times) <= 0).any():
        raise DeclarationError(f"{name}: a table needs finite values at finite, increasing times.")
    return times, values


def _vectorised(function: Callable, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """``function`` on arrays: called with an array if it takes one, else number by number, else by ``CALLS``."""

    def values(points: np.ndarray) -> np.ndarray:
        """The function at ``points``, in the same shape."""
        failures = []
        for call in (_at_once, _number_by_number, *CALLS):
            try:
                out = np.asarray(call(function, points), dtype=np.float64)
            except Exception as error:  # such as from math.exp, which takes only numbers
                failures.append(error)
                continue
            if out.size == 1:
                return np.broadcast_to(out.reshape(()), points.shape)
            if out.size == points.size and (out.shape == points.shape or call is _number_by_number):
                return out.reshape(points.shape)
        last = failures[-1]
        raise DeclarationError(f"{name}: the function could not be called with a time: {last}") from last

    return values


def _at_once(function: Callable, points: np.ndarray) -> object:
    return function(points)


def _number_by_number(function: Callable, points: np.ndarray) -> np.ndarray:
    return np.array([float(function(float(point))) for point in points.reshape(-1)])
