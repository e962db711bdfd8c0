r"""Euler's and Heun's methods, for every equation, in the clock's variable r.

For dy = f(y, r) dr + g(y, r) dw, in steps of length h from r_k to r_{k+1}::

    EulerMaruyama    y_{k+1} = y_k + h f(y_k, r_k) + √h g(y_k, r_k) ξ_k,     ξ_k ~ N(0, 1)    (sde, in Itô's sense)
    Euler            y_{k+1} = y_k + h f(y_k, r_k)                                            (ode)
    Heun             y'      = y_k + h f(y_k, r_k)
                     y_{k+1} = y_k + ½ h (f(y_k, r_k) + f(y', r_{k+1}))                       (ode)

On a named grid N steps are of length 1, from r = 0 to N; times that are given are steps in t between them.

They ask for a drift and a diffusion alone, so they take affine, reducible and general SDEs, noise that depends on the
state, and matrices of noise. Maruyama 1955; Kloeden & Platen 1992, chapters 8 to 10.

Euler-Maruyama converges with weak order 1, and strong order 1/2 (1 where the noise does not depend on the state).
Not to be confused with torchsde's "euler" (the same numbers, with more overhead), with "euler_heun" (which converges
to Stratonovich's sense), with EDM's Heun method (:class:`~sdeflow.solvers.edm.StochasticHeun`, whose steps are in
sigma / alpha) or with the exponential integrators of order 1 (DDIM, ancestral sampling), which treat what is linear
in the state exactly and need far fewer steps where there is a Gaussian kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.solvers.base import Solver
from sdeflow.solvers.problem import Problem
from sdeflow.solvers.schemes import EULER, HEUN

__all__ = ["Euler", "EulerMaruyama", "Heun"]


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    r"""The simplest method of a reverse-time SDE, y_{k+1} = y_k + h f + √h g ξ_k; weak order 1.

    In Itô's sense, with diagonal noise or a matrix for each coordinate, which may depend on the state.

    References:
        | Continuous Markov processes and stochastic equations (Maruyama, 1955)
        | Score-based generative modeling through stochastic differential equations (Song et al., 2021)
        | https://arxiv.org/abs/2011.13456

    Note:
        Below some hundred steps its variance is visibly too large. Where the SDE has a Gaussian kernel, the
        exponential solvers take a tenth of the steps.
    """

    kinds = ("sde",)
    needs_kernel = False
    adaptive = False
    calls_per_step = 1
    follows_path = True

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        r = problem.start(y, steps, scheme=EULER)
        y = problem.to_rows(y)
        shape = (len(y), problem.motions or y.shape[1])
        for k, begin, end in problem.steps(r):
            h, noise = end - begin, problem.motion_in(begin, end, shape, y.dtype, y.device)
            y = torch.add(y, problem.drift(begin, y, h)).add_(_shaken(problem.diffusion(begin, y, h), noise))
            _observe(problem, k, end, y)
        return problem.finish(problem.from_rows(y))


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method for the probability flow, y_{k+1} = y_k + h f(y_k, r_k); order 1, one call a step.

    Note:
        DDIM is Euler's method too, but of z = x / alpha in sigma / alpha, where less is left to integrate.
    """

    kinds = ("ode",)
    needs_kernel = False
    adaptive = False
    calls_per_step = 1

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        for k, begin, end in problem.steps(problem.start(y, steps, scheme=EULER)):
            y = y + problem.drift(begin, y, end - begin)
            _observe(problem, k, end, y)
        return problem.finish(y)


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method for the probability flow, the explicit trapezoid rule; order 2, two calls a step.

    Note:
        EDM's method is this one for z = x / alpha in sigma / alpha (:class:`~sdeflow.solvers.edm.StochasticHeun`);
        here the variable is that of the clock, the angle by default.
    """

    kinds = ("ode",)
    needs_kernel = False
    adaptive = False
    calls_per_step = 2

    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""
        for k, begin, end in problem.steps(problem.start(y, steps, scheme=HEUN)):
            slope = problem.drift(begin, y, end - begin)
            ahead = problem.drift(end, y + slope, end - begin)
            y = y + 0.5 * (slope + ahead)
            _observe(problem, k, end, y)
        return problem.finish(y)


def _shaken(diffusion: Tensor, noise: Tensor) -> Tensor:
    """g ξ: (rows, n) where g is diagonal, else k x m matrices (rows, k, m) times (rows, m)."""
    if diffusion.ndim == 2:
        return diffusion * noise
    return torch.matmul(diffusion, noise[..., None])[..., 0]


def _observe(problem: Problem, step: int, r: float, y: Tensor) -> None:
    if problem.watch.on_step is not None:  # the time and the states' shape cost more than the call
        problem.observe(step, float(problem.time(r)[0]), problem.from_rows(y))
