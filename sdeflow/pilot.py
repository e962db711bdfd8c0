r"""The pilot grid: steps placed where an exponential solver's error arises, measured once for a score.

A step of length h and order p at u (a half-log-SNR) contributes an error h^{p+1} ‖B(u) F^{(p)}(u)‖ at the end of the
solve, B the weight with which a prediction F enters there. A short solve on a few samples of the prior measures F and
its p-th divided differences; the grid then makes each step's share equal:

    du/dn ∝ 1 / ρ(u),     ρ = ‖B F^{(p)}‖^{1/(p+1)},  smoothed, plus a tenth of its maximum.

What is added keeps the grid safe where the few samples happen to see nothing. The measurement costs 32 calls on 32
samples, and is kept for as long as the score lives and its parameters stay as they are.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.model import Model
from sdeflow.scores import Conditional, ScoreFunction, evaluating
from sdeflow.solvers import Clock, Exponential, Problem, Solver, make_clock
from sdeflow.thresholding import Thresholded

__all__ = ["Pilot", "pilot"]

_CALLS = 32
_SAMPLES = 32
_FLOOR = 0.1
_POINTS = 129
_KEPT = 16  # grids for each score

_measured: weakref.WeakKeyDictionary[object, dict[tuple, Pilot]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Pilot:
    """A measured grid and what it cost.

    Attributes:
        clock: the time variable in which its steps are uniform.
        calls: calls of the score.
        samples: the batch size of each.
    """

    clock: Clock
    calls: int
    samples: int


def pilot(model: Model, solver: Solver, like: Tensor) -> Pilot:
    """The pilot grid of a score for ``solver``, measured where it is not known yet.

    Args:
        model: the SDE with its score and prior.
        solver: an :class:`~sdeflow.solvers.Exponential`; for another solver, the grid of the default one.
        like: states (batch, *event), for their shape, dtype and device.

    Raises:
        ValueError: for an SDE without a Gaussian kernel.
    """
    if model.kernel is None:
        raise ValueError('grid="pilot" needs a Gaussian kernel, which this SDE has not; use grid="t" or a tensor.')
    known = solver if isinstance(solver, Exponential) else Exponential()
    event = tuple(like.shape[1:])
    owner, given = _owner(model.score)
    kernel, state = weakref.ref(model.kernel), [*model.score.parameters(), *model.score.buffers()]
    versions = tuple(tensor._version for tensor in state)  # training makes it another score
    given += (event, like.dtype, repr(model._prior), versions, known.prediction, known.order, known.variable)
    key = (kernel, *given, *_identity_of(known))
    try:
        found = _measured.setdefault(owner, {})
    except TypeError:  # neither hashable nor weakly referable
        found = {}
    if key not in found:
        found[key] = _measure(model, known, like)
        while len(found) > _KEPT:
            del found[next(iter(found))]
    return found[key]


def _owner(score: ScoreFunction) -> tuple[object, tuple]:
    """What lives as long as the user's own score does, beneath what each solve wraps anew, and the wrapping."""
    given: tuple = ()
    while isinstance(score, Conditional | Thresholded):
        if isinstance(score, Conditional):
            given += ("labels", *score.y.flatten().tolist())
        else:
            given += ("threshold", score.quantile, score.low, score.high)
        score = score.score
    return getattr(score, "function", score), given


def _identity_of(solver: Exponential) -> tuple:
    """What of a solver's reference the grid depends on."""
    scale = tuple(torch.as_tensor(solver.scale).flatten().tolist()) if solver.scale is not None else None
    return scale, None if solver.basis is None else id(solver.basis)


def _measure(model: Model, solver: Exponential, like: Tensor) -> Pilot:
    model, event = model.of_probes(_SAMPLES), tuple(like.shape[1:])
    kernel = model.kernel
    runner = Exponential(2, solver.prediction, variable=solver.variable, scale=solver.scale, basis=solver.basis)
    dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
    with torch.no_grad(), evaluating(model.score):
        x = model.prior_for(like[:0]).sample((_SAMPLES, *event), seed=0, dtype=dtype, device=like.device)
        problem = Problem(
            lambda y, t: y, model.clock("log_snr"), backward=True, **model.solver_inputs(event, like.dtype)
        )
        u = model.to_solver(x, model.T)
        problem.start(u.flatten(1))
        times = problem.times(_CALLS)
        program = runner.compile(problem, times, u)
        record: list[Tensor] = []
        u = program.run(problem, u if solver.basis is None else solver.basis.forward(u), record)
        problem.finish(u.flatten(1))
    lam = kernel.half_log_snr(torch.as_tensor(times)).detach().numpy()
    centres, density = _density(lam, torch.stack(record).double(), program.steps.transfer, solver.order)
    fine = np.linspace(lam[0], lam[-1], 32 * _POINTS)
    rho = np.interp(fine, centres, density)
    work = np.concatenate([[0.0], np.cumsum(0.5 * (rho[1:] + rho[:-1]))])
    nodes = np.interp(np.linspace(0.0, work[-1], _POINTS), work, fine)
    grid = kernel.time_of(torch.as_tensor(nodes))
    grid[0], grid[-1] = model.T, model.cutoff
    return Pilot(make_clock(grid, kernel, model.cutoff, model.T), problem.nfe, _SAMPLES)


def _density(lam: np.ndarray, F: Tensor, transfer: object, order: int) -> tuple[np.ndarray, np.ndarray]:
    """ρ at the centres of order + 1 successive nodes."""
    n = len(F)
    differences = F
    for k in range(1, order + 1):
        width = torch.as_tensor(lam[k:n] - lam[: n - k]).reshape(-1, *(1,) * (F.ndim - 1))
        differences = (differences[1:] - differences[:-1]) / width.to(F.device)
    size = differences.square().flatten(1).mean(1).sqrt().cpu().numpy() * math.factorial(order)
    centres = np.array([lam[i : i + order + 1].mean() for i in range(n - order)])
    middle = 0.5 * (lam[1:] + lam[:-1])
    weight = np.exp(np.interp(centres, middle, np.log(_influence(transfer, np.diff(lam)))))
    density = (weight * size) ** (1.0 / (order + 1))
    padded = np.pad(density, 2, mode="edge")
    smooth = np.convolve(padded, np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0, mode="valid")
    return centres, smooth + _FLOOR * smooth.max()


def _influence(transfer: object, h: np.ndarray) -> np.ndarray:
    """The size of B in each step: what a unit of F there adds at the end, per unit of half-log-SNR."""
    state, first = transfer.state, transfer.moments[:, 0]
    coupled = transfer.length is None
    after = torch.eye(state.shape[-1], dtype=state.dtype) if coupled else torch.ones_like(state[0])
    sizes = []
    for n in range(len(state) - 1, -1, -1):
        reached = after @ first[n] if coupled else after * first[n]
        sizes.append(float(reached.square().mean().sqrt()))
        after = after @ state[n] if coupled else after * state[n]
    return np.array(sizes[::-1]) / np.abs(h)
