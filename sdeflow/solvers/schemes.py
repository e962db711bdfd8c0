r"""Plain methods as tableaux, and what they make of a linear equation.

A Runge-Kutta method with the tableau (a, b, c) takes a step of dx = F x dr + G dw of unit length by

    X_j = x + Σ_l a_jl (F_l X_l + G_l ξ),      x' = x + Σ_j b_j (F_j X_j + G_j ξ),      F_j, G_j at r + c_j,

of which x' = R x + N ξ is linear too: the covariance goes on as R P Rᵀ + N Nᵀ, whatever the score's cost. Stochastic
methods weigh the noise as they weigh the drift; where theirs is finer, this is near it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["ADAMS", "EULER", "HEUN", "HEUN_3", "MIDPOINT", "RK4", "Scheme", "carried"]

Array = np.ndarray

_BASHFORTH = {3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}  # latest slope first


class Scheme(NamedTuple):
    """An explicit method of fixed steps.

    Attributes:
        order: in smooth equations, without noise.
        a: the weights of earlier stages, a row for each.
        b: the weights of the step.
        c: where in the step the stages are.
        adams: whether slopes of earlier steps take the place of the stages once there are three of them.
    """

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    adams: bool = False


EULER = Scheme(1, ((),), (1.0,), (0.0,))
MIDPOINT = Scheme(2, ((), (0.5,)), (0.0, 1.0), (0.0, 0.5))
HEUN = Scheme(2, ((), (1.0,)), (0.5, 0.5), (0.0, 1.0))
HEUN_3 = Scheme(3, ((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), (0.0, 1 / 3, 2 / 3))
RK4 = Scheme(4, ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), (0.0, 1 / 3, 2 / 3, 1.0))
ADAMS = RK4._replace(adams=True)


def carried(scheme: Scheme, drift: Array, noise: Array, start: Array, restarts: frozenset[int] = frozenset()) -> Array:
    """The covariance (k, k) in which a linear equation ends, from ``start``.

    Args:
        scheme: the method.
        drift: F times the step's length, (stages, n, k, k).
        noise: G times the root of it, of the same shape; 0 of an ODE.
        start: the covariance at its start, (k, k).
        restarts: the steps before which earlier ones are forgotten.
    """
    k = start.shape[-1]
    slopes: list[Array] = []  # of each stage, (n, k, 2k): F_j X_j + G_j ξ as factors of x and ξ
    for weights, F, G in zip(scheme.a, drift, noise, strict=True):
        state = np.concatenate([np.broadcast_to(np.eye(k), F.shape), np.zeros_like(F)], axis=-1)
        state = state + sum((w * slope for w, slope in zip(weights, slopes, strict=True)), np.zeros_like(state))
        slopes.append(F @ state + np.concatenate([np.zeros_like(F), G], axis=-1))
    step = sum((w * slope for w, slope in zip(scheme.b, slopes, strict=True)), np.zeros_like(slopes[0]))
    R, N = np.eye(k) + step[..., :k], step[..., k:]
    if scheme.adams:
        propagator = _by_history(R, drift[0], restarts)
        return propagator @ start @ propagator.T
    P = start
    for growth, shake in zip(R, N, strict=True):
        P = growth @ P @ growth.T + shake @ shake.T
    return P


def _by_history(R: Array, F: Array, restarts: frozenset[int]) -> Array:
    """The propagator (k, k) of Adams and Bashforth's steps, which begin by one-step factors R (n, k, k)."""
    whole = np.eye(R.shape[-1])
    slopes: list[Array] = []
    for step, (growth, rate) in enumerate(zip(R, F, strict=True)):
        slopes = [rate @ whole, *([] if step in restarts else slopes[:3])]
        weights = _BASHFORTH.get(len(slopes))
        if weights is None:
            whole = growth @ whole
        else:
            whole = whole + sum(w * slope for w, slope in zip(weights, slopes, strict=True))
    return whole
