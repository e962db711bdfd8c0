r"""Gaussian paths x_t = alpha(t) x_0 + sigma(t) eps as declarations, and tables of alpha as in discrete models.

The SDE of a path has f = alpha'/alpha x and g² = 2 sigma sigma' - 2 (alpha'/alpha) sigma².

**A table that starts at alpha < 1** does not include the data; that of DDPM (arXiv:2006.11239) starts at 0.99995. It is
continued to the data at t = 0, linearly in -log alpha² (DDPM's -log ᾱ), and the cutoff is its first entry. Between the
entries, -2 log alpha is a monotone cubic, so alpha equals the table at the times of the table.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeGuard

import numpy as np
import sympy as sp

from sdeflow.errors import DeclarationError, ScheduleError
from sdeflow.symbolic.arguments import applied, takes_one
from sdeflow.symbolic.declaration import Coefficient, Declaration, coefficient_of, declare
from sdeflow.symbolic.derivative import derivative
from sdeflow.symbolic.evaluate import UnknownValue, evaluate
from sdeflow.symbolic.exact import value_at
from sdeflow.symbolic.patience import patiently, small, within
from sdeflow.symbolic.schedule import Schedule, schedule, table_of
from sdeflow.symbolic.switches import jumps
from sdeflow.symbolic.symbols import t, x

__all__ = ["RAMP", "declare_path", "is_table"]

RAMP = (
    "For a jump at t = c from p to q write a steep ramp that takes a short time w: "
    "p + (q - p)*Min(Max((t - c)/w, 0), 1)."
)
"""What to write for a jump."""

_SMALL = 40  # operations
_SECONDS = 0.2  # of processor time to shorten f, and g²; the declaration needs the rest of its time for checks
_STEPS = (sp.floor, sp.ceiling, sp.sign, sp.Heaviside)
_SWITCHING = (sp.Abs, sp.sign, sp.Max, sp.Min, sp.Heaviside, sp.floor, sp.ceiling, sp.frac, sp.Mod)
_LEAST = 0.5  # the least alpha at the first entry of a table
_JOIN = 1e-3  # of the first step: the end of the continuation, for a table that starts at t = 0 with alpha < 1


def is_table(value: object) -> TypeGuard[Sequence]:
    """Whether ``value`` is a table of numbers, not a coefficient."""
    return not isinstance(value, str | sp.Basic | type) and (hasattr(value, "__len__") or hasattr(value, "__array__"))


def declare_path(
    alpha: Coefficient | object,
    sigma: Coefficient | None = None,
    T: float | None = None,
    cutoff: float | None = None,
    parameters: Iterable[sp.Symbol] = (),
) -> Declaration:
    r"""The SDE whose kernel is N(alpha(t) x_0, sigma(t)²).

    Args:
        alpha: a function of t; or a table: (times, values), pairs (time, value), or values at T/n, 2T/n, ..., T (at
            0, T/(n - 1), ..., T if the first value is 1).
        sigma: a function of t; None means √(1 - alpha²), variance preserving.
        T: the horizon; by default the last time of a table, else 1.
        cutoff: the first time of solvers; for a table that starts at alpha < 1, by default its first time.
        parameters: the symbols other than t.

    Raises:
        DeclarationError: if the path depends on x, or does not start at alpha = 1.
        ScheduleError: if the path has no noise, or a table does not decrease.
    """
    parameters = tuple(parameters)
    if is_table(alpha):
        if sigma is not None:
            raise DeclarationError(
                "a table of alpha has sigma = sqrt(1 - alpha²). For another sigma declare both as functions: a = "
                "sdeflow.schedule((times, alphas)), from_kernel(a(t), ...)."
            )
        alpha, T, cutoff = _of_table(alpha, T, cutoff)
    T = 1.0 if T is None else T
    mean = coefficient_of(_of_time(alpha, "alpha"), "alpha", (x,), parameters)
    if sigma is None:
        return _declared(mean, sp.sqrt(1 - mean**2), T, cutoff, parameters)
    noise = coefficient_of(_of_time(sigma, "sigma"), "sigma", (x,), parameters)
    return _declared(mean, noise, T, cutoff, parameters)


def _declared(
    alpha: sp.Expr, sigma: sp.Expr, T: float, cutoff: float | None, parameters: tuple[sp.Symbol, ...]
) -> Declaration:
    """The declaration, from alpha and sigma as expressions."""
    if alpha.has(x) or sigma.has(x):
        raise DeclarationError(f"alpha = {alpha} and sigma = {sigma} must be functions of t alone.")
    found = patiently(_path_coefficients, alpha, sigma)
    if found is None:
        raise DeclarationError(
            f"alpha = {alpha} and sigma = {sigma} are too large to derive f and g from them: declare f and g."
        )
    rate, gram = found
    if gram == 0 and (steps := jumps((alpha, sigma))):
        raise ScheduleError(
            f"alpha = {alpha} and sigma = {sigma} change by jumps alone, where {steps[0].expr} switches: there f or g "
            f"would be infinite, and elsewhere g is 0. A path is continuous. {RAMP}"
        )
    start, initial = (_at_start(e) for e in (alpha, sigma))
    first = float(sp.re(start)) if start.is_number and start.is_finite else math.nan
    if start.is_number and not abs(first - 1) <= 1e-12:
        join = _first_step(alpha)
        if join is None or not _LEAST <= first < 1:
            raise DeclarationError(f"the path starts at the data: alpha(0) must be 1, and is {start}.")
        rate, gram, alpha, sigma = _continued(rate, gram, alpha, sigma, join)
        cutoff, initial = join if cutoff is None else cutoff, sp.Integer(0)
    if not initial.is_number or not initial.is_real or not initial.is_finite:
        raise DeclarationError(f"sigma(0) = {initial} must be a real number; parameters may not change it.")
    declaration = declare(rate * x, sp.sqrt(gram), T, cutoff, parameters, P0=float(initial) ** 2)
    return replace(declaration, path=(alpha, sigma))


def _of_time(value: object, name: str) -> object:
    """The expression that a function of t returns, such as ``lambda t: 1 - t``; other values unchanged."""
    if callable(value) and not isinstance(value, sp.Basic | type) and takes_one(value):
        return applied(value, name, ())
    return value


def _of_table(table: Sequence, T: float | None, cutoff: float | None) -> tuple[sp.Expr, float, float | None]:
    """alpha from a table, with its horizon and its cutoff."""
    table = table.detach().cpu().numpy() if hasattr(table, "detach") else table
    if all(np.ndim(value) == 0 for value in table):
        from_data = len(table) > 1 and float(table[0]) == 1.0  # its first value is that of t = 0
        steps = np.arange(0 if from_data else 1, len(table) + (0 if from_data else 1), dtype=float)
        table = steps / steps[-1] * (1.0 if T is None else T), table
    times, values = table_of(table, "alpha", "alpha is continuous, for where it jumps f = alpha'/alpha x is infinite")
    rises = np.flatnonzero(np.diff(values) >= 0)
    if values[-1] == 0 and not len(rises):
        raise ScheduleError(
            f"alpha = 0 at t = {times[-1]:g} leaves nothing of the data (zero terminal SNR), and f = alpha'/alpha x is "
            "infinite there: leave out the last entry and pass the times, from_kernel((times[:-1], alphas[:-1])). "
            "Without times the other entries would move, since n values alone stand for T/n, 2T/n, ..., T."
        )
    if len(rises):
        i = int(rises[0])
        raise ScheduleError(
            f"a table of alpha falls: its entry {i + 1}, {values[i + 1]:g}, is not below its entry {i}, {values[i]:g} "
            "(counted from 0). Its squares are DDPM's alphas_cumprod."
        )
    if not (values[-1] > 0 and values[0] <= 1):
        raise ScheduleError(
            "a table of alpha falls from 1, or below it, and stays above 0: its squares are DDPM's alphas_cumprod; "
            f"this one runs from {values[0]:g} to {values[-1]:g}."
        )
    B = -2.0 * np.log(values)
    if times[0] < 0:
        raise DeclarationError(f"a table of alpha starts at t >= 0, not at {times[0]:g}.")
    if times[0] > 0 and values[0] == 1:
        raise ScheduleError(
            f"a table of alpha has alpha = 1, which is the data without noise, at t = {times[0]:g}: only t = 0 may "
            "have it. Begin the table at t = 0, or leave this entry out."
        )
    if times[0] > 0:
        # A monotone cubic through knots on a line is this line.
        first, cutoff = times[0], times[0] if cutoff is None else cutoff
        knots = np.array([0.0, 0.5, 0.99]) * first
        times, B = np.concatenate([knots, times]), np.concatenate([knots / first * B[0], B])
    return sp.exp(-schedule((times, B), "B")(t) / 2), float(times[-1]) if T is None else T, cutoff


def _at_start(expr: sp.Expr) -> sp.Expr:
    """``expr`` at t = 0, exact if SymPy finds it in the time allowed."""
    exact = value_at(expr, {t: sp.Integer(0)})
    if exact is sp.nan and expr.free_symbols == {t}:
        with contextlib.suppress(UnknownValue):
            number = float(evaluate(expr, {t: 0.0}))
            exact = sp.Float(number) if math.isfinite(number) else exact
    if exact.is_number and exact.is_real is None:
        number = value_at(exact, {}, 17)
        return sp.Float(0) if number.is_number and number.is_finite and abs(number) < 1e-12 else number
    return exact


def _first_step(alpha: sp.Expr) -> float | None:
    """The time at which the continuation of a path through a table ends; None if there is none."""
    kinds: list[type[Schedule]] = [type(call) for call in alpha.atoms(Schedule)]
    steps = [kind.table[0][1] - kind.table[0][0] for kind in kinds if kind.table is not None]
    return _JOIN * float(min(steps)) if steps else None


def _continued(
    rate: sp.Expr, gram: sp.Expr, alpha: sp.Expr, sigma: sp.Expr, join: float
) -> tuple[sp.Expr, sp.Expr, sp.Expr, sp.Expr]:
    """The path from ``join`` on; before it, the Ornstein-Uhlenbeck process from the data to it."""
    a, s = (float(value_at(e, {t: sp.Float(join)}, 17)) for e in (alpha, sigma))
    end, speed = sp.Float(join), sp.Float(math.log(a) / join)
    level = sp.Float(s**2 / (1.0 - a**2))
    early = (speed, -2 * speed * level, sp.exp(speed * t), sp.sqrt(level * (1 - sp.exp(2 * speed * t))))
    late = (rate, gram, alpha, sigma)
    return tuple(sp.Piecewise((e, t < end), (v, True)) for e, v in zip(early, late, strict=True))


def _path_coefficients(alpha: sp.Expr, sigma: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """f / x = alpha' / alpha and g² = 2 sigma sigma' - 2 f sigma² / x."""
    rate = _simplest(sum(_slope(factor) / factor for factor in sp.Mul.make_args(alpha)))
    if sp.expand(sigma**2 + alpha**2) == 1:
        return rate, -2 * rate
    return rate, _simplest(2 * sigma * _slope(sigma) - 2 * rate * sigma**2)


def _slope(expr: sp.Expr) -> sp.Expr:
    """d/dt between the jumps; whether there are any, numbers say (:mod:`sdeflow.kernels.continuity`)."""
    plain = expr.replace(sp.Mod, lambda u, p: u - p * sp.floor(u / p)).replace(sp.frac, lambda u: u - sp.floor(u))
    constant = {step: sp.Dummy(real=True) for step in plain.atoms(*_STEPS)}
    back = {dummy: step for step, dummy in constant.items()}
    return derivative(plain.xreplace(constant), t).xreplace(back)


def _simplest(expr: sp.Expr) -> sp.Expr:
    """``expr`` simplified, if it is small and SymPy needs little time.

    Expressions that switch stay unchanged, because SymPy rewrites sign(u) as u / |u|, which has no value at u = 0.
    """
    standing = {part: sp.Dummy(real=True) for part in expr.atoms(*_SWITCHING)}
    smooth = expr.xreplace(standing)
    if smooth.is_rational_function(t, *standing.values()) and small(smooth):
        found = sp.factor(smooth)
    else:
        patient = not expr.has(Schedule) and sp.count_ops(expr) <= _SMALL
        found = within(_SECONDS, sp.simplify, smooth) if patient else None
    return expr if found is None else found.xreplace({dummy: part for part, dummy in standing.items()})
