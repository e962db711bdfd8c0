"""Declared paths are continuous: where alpha or sigma jumps, f or g would be infinite.

f and g are made of the slopes of a path between its jumps. Where the path jumps, the integrals of f and g part from it,
and stay apart from there on. The first of many times at which they are apart is taken, and the time since which they
are apart is found by halving, down to the rounding of times; there the path is read in 30 digits. A ramp, however
steep, is in f and g, and a value such as 0/0 at one time hides nothing on its sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import sympy as sp

from sdeflow.errors import ScheduleError
from sdeflow.symbolic.evaluate import OutOfTime, UnknownValue, number_at
from sdeflow.symbolic.path import RAMP

__all__ = ["Readings", "require_continuous"]

_APART = 1e-8  # relative: quadrature promises 1e-10
_CANCELLED = 1e-13  # of alpha²: what the variance 1 - alpha² has lost in float64
_ROUNDING = 16 * 2.0**-52  # of a time
_READ = 8  # times that are read in 30 digits
_HALVINGS = 1100  # down to the least number
_AT_ZERO = 1e-40  # of a time: what jumps before it jumps at 0

Numbers = Mapping[sp.Symbol, float]
Point = tuple[float, float]  # alpha and sigma


class Readings(NamedTuple):
    """At times (n,) for e sets of parameters, (n, e) each."""

    declared_alpha: np.ndarray
    declared_sigma: np.ndarray
    alpha: np.ndarray  # by quadrature of f and g
    var: np.ndarray
    a: np.ndarray  # f / x
    q: np.ndarray  # g²

    def apart(self, times: np.ndarray) -> np.ndarray:
        """Where the path is not the one that f and g have, (n, e); not where it has no value."""
        at = _ROUNDING * times[:, None]
        off = np.abs(self.declared_alpha - self.alpha) > (_APART + at * np.abs(self.a)) * self.alpha
        moved = at * (2.0 * np.abs(self.a) * self.var + self.q)
        return off | (
            np.abs(self.declared_sigma**2 - self.var) > _APART * self.var + moved + _CANCELLED * self.alpha**2
        )


def require_continuous(
    path: tuple[sp.Expr, sp.Expr],
    times: np.ndarray,
    read: Callable[[np.ndarray], Readings],
    numbers_of: Callable[[int], Numbers],
) -> None:
    """Raises where alpha or sigma of a declared path jumps.

    Args:
        path: alpha and sigma.
        times: in (0, T], (n,), increasing: at least one in each piece of the path.
        read: the path in float64, and what f and g make of it.
        numbers_of: the parameters of one set.

    Raises:
        ScheduleError: with the place of the first jump, and alpha and sigma before and after it.
    """
    apart = read(times).apart(times)
    for entry in np.flatnonzero(apart.any(0))[:1]:
        rows = np.flatnonzero(apart[:, entry])
        exact = _Exact(path, read, int(entry), numbers_of(int(entry)))
        chosen = rows[np.linspace(0, len(rows) - 1, min(_READ, len(rows))).astype(int)]
        # In float64 a formula may have lost its digits near a time: a jump is still there in 30 of them.
        found = next((row for row in chosen if exact.apart(float(times[row]))), None)
        if found is not None:
            before = np.setdiff1d(np.arange(found), rows)
            _refuse(path, exact, float(times[before[-1]]) if len(before) else 0.0, float(times[found]))


class _Exact:
    """The path of one set of parameters in 30 digits."""

    def __init__(
        self, path: tuple[sp.Expr, sp.Expr], read: Callable[[np.ndarray], Readings], entry: int, numbers: Numbers
    ) -> None:
        self.path, self._read, self._entry, self._numbers = path, read, entry, numbers

    def at(self, time: float) -> Point:
        try:
            alpha, sigma = (number_at(e, self._numbers, time) for e in self.path)
        except OutOfTime as error:
            raise ScheduleError(
                f"whether the path alpha = {self.path[0]}, sigma = {self.path[1]} jumps near t = {time:.6g} takes too "
                "long to find out. Write it in simpler pieces."
            ) from error
        except UnknownValue:
            return math.nan, math.nan
        return alpha, sigma

    def readings(self, *times: float) -> Readings:
        return Readings(*(v[:, self._entry : self._entry + 1] for v in self._read(np.array(times))))

    def apart(self, time: float) -> bool:
        read, times = self.readings(time), np.array([time])
        alpha, sigma = (np.array([[v]]) for v in self.at(time))
        return bool(read._replace(declared_alpha=alpha, declared_sigma=sigma).apart(times)[0, 0])


def _refuse(path: tuple[sp.Expr, sp.Expr], exact: _Exact, low: float, high: float) -> None:
    """The error for what happens between two times, at the later of which path and integrals are apart."""
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if not low < middle < high or high < _AT_ZERO:
            break
        low, high = (low, middle) if exact.apart(middle) else (middle, high)
    before, after, beside = exact.at(low), exact.at(high), exact.readings(low, high)
    # Beside a ramp the rounding of times moves the path by its slope.
    steep = _APART + 4.0 * _ROUNDING * high * np.array([beside.a, 2.0 * beside.a + beside.q / beside.var])
    names = [
        f"{name} from {p:.10g} to {q:.10g}"
        for name, p, q, least in zip(("alpha", "sigma"), before, after, np.abs(steep).max((1, 2)), strict=True)
        if abs(q - p) > least * max(abs(p), abs(q))
    ]
    at = f"t = {high if high > _AT_ZERO else 0.0:.6g}"
    if not names:
        return
    if after[0] * abs(before[1]) > before[0] * abs(after[1]) * (1.0 + _APART):
        raise ScheduleError(
            f"no SDE has the path alpha = {path[0]}, sigma = {path[1]}: its signal-to-noise ratio alpha / sigma must "
            f"fall in time, and at {at} it jumps up ({' and '.join(names)})."
        )
    raise ScheduleError(
        f"the path jumps at {at}: {' and '.join(names)}. There f or g would be infinite; a path is continuous. {RAMP}"
    )
