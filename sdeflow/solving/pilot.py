r"""The pilot grid: steps placed where an exponential solver's error arises, measured once for a score.

A step of length h and order p at u (a half-log-SNR) contributes an error h^{p+1} ‖B(u) F^{(p)}(u)‖ at the end of the
solve, B the weight with which a prediction F enters there. A short solve on a few samples of the prior measures F and
its p-th divided differences; the grid then makes each step's share equal:

    du/dn ∝ 1 / ρ(u),     ρ = ‖B F^{(p)}‖^{1/(p+1)},  smoothed, plus a tenth of its maximum.

What is added keeps the grid safe where the few samples happen to see nothing. The measurement costs 32 calls on 32
samples, and is kept for as long as the score lives and its parameters stay as they are.

For log p another size of the same local error δ = B_u F^{(p)}, B_u the weight at u itself, counts. An error of the
state there changes log p by its product with the score, whatever follows (∇ log p_t is the adjoint of the flow), and
the divergence is taken at predicted states, which are off by a multiple of h^{p+1} δ:

    ρ = ((s·δ)² + (∂_δ div G)²)^{1/(2p+2)},     G = ½ Q s dt/du.

Coherent errors of all coordinates, which a norm hardly sees, and passages between modes, where the divergence turns
within few steps, get their share. ∂_δ is a central difference, two more calls at every third node; the square of its
trace is the product of two independent estimates, so that probes do not add their variance. The first solve has 48
calls on 64 samples here, so that such passages are seen at all; 78 calls together.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sdeflow.kernels.gaussian import Kernel
from sdeflow.numerics.linear import multiplied, per_sample
from sdeflow.numerics.traces import Hutchinson
from sdeflow.scores import GridScore, evaluating
from sdeflow.solvers import Clock, Exponential, Problem, Solver
from sdeflow.solvers.clock import smooth_clock
from sdeflow.solvers.exponential.weights import Transfer
from sdeflow.solving.model import Model
from sdeflow.solving.reference import reference

__all__ = ["Pilot", "pilot"]

_CALLS, _SAMPLES = 32, 32
_CALLS_IN_NATS, _SAMPLES_IN_NATS = 48, 64  # passages between modes are short and rare
_STRIDE = 3  # of the nodes at which it is asked what an error does to log p
_FLOOR = 0.1
_POINTS = 129
_KEPT = 16  # grids for each score
_APART = 0.05  # half a central difference, in norm relative to the reference's standard deviation

_measured: weakref.WeakKeyDictionary[object, dict[tuple[object, ...], Pilot]] = weakref.WeakKeyDictionary()


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


def pilot(model: Model, solver: Solver, like: Tensor, likelihood: bool = False) -> Pilot:
    """The pilot grid of a score for ``solver``, measured where it is not known yet.

    Args:
        model: the SDE with its score and prior.
        solver: an :class:`~sdeflow.solvers.Exponential`; for another solver, the grid of the default one.
        like: states (batch, *event), for their shape, dtype and device.
        likelihood: whether the error of log p counts, rather than that of samples.

    Raises:
        ValueError: for an SDE without a Gaussian kernel.
        ScoreError: for a score through which no gradient flows, where the likelihood counts.
    """
    if model.gaussian is None:
        raise ValueError('grid="pilot" needs a Gaussian kernel, which this SDE has not; use grid="t" or a tensor.')
    known = solver if isinstance(solver, Exponential) else Exponential()
    event = tuple(like.shape[1:])
    kernel, state = weakref.ref(model.kernel), [*model.score.parameters(), *model.score.buffers()]
    versions = tuple(tensor._version for tensor in state)  # training makes it another score
    key: tuple[object, ...] = (
        kernel, event, like.dtype, repr(model.prior.given), versions, known.prediction, known.order, known.variable,
        *_identity_of(known), likelihood,
    )  # fmt: skip
    try:
        found = _measured.setdefault(model.score.bare, {})
    except TypeError:  # neither hashable nor weakly referable
        found = {}
    grid = found.get((*key, *model.score.wrapping))
    if grid is None:
        grid = _measure(model, model.gaussian, known, like, likelihood)
        asked_again = (*key, *model.score.wrapping)  # a function now tells whether it is tied to its batch
        found[asked_again] = grid
        while len(found) > _KEPT:
            del found[next(iter(found))]
    return grid


def _identity_of(solver: Exponential) -> tuple[object, ...]:
    """What of a solver's reference the grid depends on."""
    scale = tuple(torch.as_tensor(solver.scale).flatten().tolist()) if solver.scale is not None else None
    return scale, None if solver.basis is None else id(solver.basis)


def _measure(model: Model, kernel: Kernel, solver: Exponential, like: Tensor, likelihood: bool) -> Pilot:
    n, samples = (_CALLS_IN_NATS, _SAMPLES_IN_NATS) if likelihood else (_CALLS, _SAMPLES)
    model, event = model.spread(samples), tuple(like.shape[1:])
    order = solver.order
    runner = Exponential(2, solver.prediction, variable=solver.variable, scale=solver.scale, basis=solver.basis)
    dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
    states: list[Tensor] = []

    def seen(times: Tensor, like_states: Tensor) -> GridScore:
        score = model.score.on_grid(times, like_states, like.dtype)

        def call(i: int, u: Tensor) -> Tensor:
            states.append(u.double())
            return score.call(i, u)

        return GridScore(score.readout, call)

    view = model.view(event, like.dtype)
    with torch.no_grad(), evaluating(model.score):
        x = model.prior_for(like[:0]).sample((samples, *event), seed=0, dtype=dtype, device=like.device)
        if likelihood:
            view = replace(view, on_grid=seen)
        problem = Problem(None, model.clock("log_snr"), backward=True, view=view)
        u = model.to_solver(x, model.T)
        problem.start(u.flatten(1))
        times = problem.times(n)
        program = runner.compile(problem, times, u)
        record: list[Tensor] = []
        u = program.run(problem, u if solver.basis is None else solver.basis.forward(u), record)
        problem.finish(u.flatten(1))
        calls = problem.nfe
        lam = kernel.bounded_log_snr(torch.as_tensor(times)).detach().numpy()
        differences = _differences(lam, torch.stack(record).double(), order)
        centres = np.array([lam[i : i + order + 1].mean() for i in range(len(differences))])
        transfer = program.steps.transfer
        if likelihood:
            at = torch.as_tensor(times)
            size = _sizes_in_nats(model, kernel, solver, transfer, at, lam, states, differences, like.dtype)
            calls += 2 * len(size[::_STRIDE])
        else:
            middle = 0.5 * (lam[1:] + lam[:-1])
            size = differences.square().flatten(1).mean(1).sqrt().cpu().numpy()
            size = size * np.exp(np.interp(centres, middle, np.log(_influence(transfer, np.diff(lam)).clip(1e-300))))
    density = _density(size, order)
    fine = np.linspace(lam[0], lam[-1], 32 * _POINTS)
    rho = np.interp(fine, centres, density)
    work = np.concatenate([[0.0], np.cumsum(0.5 * (rho[1:] + rho[:-1]))])
    nodes = np.interp(np.linspace(0.0, work[-1], _POINTS), work, fine)
    grid = kernel.time_of(torch.as_tensor(nodes))
    grid[0], grid[-1] = model.T, model.cutoff
    return Pilot(smooth_clock(grid, kernel, "pilot", model.reference_scale()), calls, samples)


def _differences(lam: np.ndarray, F: Tensor, order: int) -> Tensor:
    """F^{(p)} at the centres of order + 1 successive nodes."""
    n = len(F)
    for k in range(1, order + 1):
        width = per_sample(torch.as_tensor(lam[k:n] - lam[: n - k]), F)
        F = (F[1:] - F[:-1]) / width.to(F.device)
    return F * math.factorial(order)


def _density(size: np.ndarray, order: int) -> np.ndarray:
    """ρ where the p-th derivatives have these sizes."""
    density = size ** (1.0 / (order + 1))
    padded = np.pad(density, 2, mode="edge")
    smooth = np.convolve(padded, np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0, mode="valid")
    return smooth + _FLOOR * smooth.max()


def _sizes_in_nats(
    model: Model, kernel: Kernel, solver: Exponential, transfer: Transfer, times: Tensor, lam: np.ndarray,
    states: list[Tensor], differences: Tensor, dtype: torch.dtype,
) -> np.ndarray:  # fmt: skip
    """What local errors δ = B_u F^{(p)} do to log p, root mean square over the samples."""
    like = states[0]
    length = torch.as_tensor(np.diff(lam)).reshape(-1, *(1,) * (transfer.moments.ndim - 2))
    back, forward = (kernel.maps.shaped(v, like) for v in (transfer.state, transfer.moments[:, 0] / length))
    forcing = (back.inverse @ forward).at_each(like)
    found, looked_at = [], range(0, len(differences), _STRIDE)
    for i in looked_at:
        derivative, j = differences[i], i + solver.order // 2  # the node nearest to the centre
        delta = multiplied(forcing[j], derivative)
        delta = delta if solver.basis is None else solver.basis.inverse(delta)
        t, u = times[j].to(like.device), states[j]
        size = per_sample(reference(model, t, u).inverse(delta).flatten(1).norm(dim=1), u)
        step = _APART / size.clamp_min(torch.finfo(torch.float64).tiny)
        rate = kernel.half_log_snr_rate(t).clamp(max=-torch.finfo(torch.float64).tiny)  # g = 0 where it is 0
        half = kernel.equation(u, t)[2].scaled(0.5 / rate)
        trace = Hutchinson(2, fresh=False, distinct=False)
        pair = [trace.start(u.shape, [0.5, -0.5], seed=k, device=u.device) for k in (0, 1)]
        score = torch.zeros_like(u)
        with torch.enable_grad():
            for shifted in (u + step * delta, u - step * delta):
                shifted = shifted.detach().requires_grad_(True)
                s = model.solver_score(shifted, t, dtype)
                for integral in pair:
                    integral.add(half(s), shifted)
                score += 0.5 * s.detach()
        of_score = (score * delta).flatten(1).sum(1).square()
        of_divergence = math.prod(integral.value / step.flatten() for integral in pair)
        found.append((of_score + of_divergence).mean().clamp_min(0.0).sqrt())
    sizes = np.log(torch.stack(found).clamp_min(torch.finfo(torch.float64).tiny).cpu().numpy())
    return np.exp(np.interp(np.arange(len(differences)), looked_at, sizes))


def _influence(transfer: Transfer, h: np.ndarray) -> np.ndarray:
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
