r"""The exact log-likelihood of the probability flow (Chen et al. 2018; arXiv:2011.13456, appendix D.2).

Along dx/dt = v(x, t), log p(x(cutoff)) = log π(x(T)) + ∫ div v dt. For v = a x + b - ½ Q s with Q = g gᵀ,
everything that is linear is done exactly: with S Sᵀ = alpha c² alphaᵀ + sigma sigmaᵀ, the covariance of a
Gaussian reference of scale c,

    log p = log π(x_T) + log|S_T| - log|S_cutoff| - ∫ ½ (div Q s + tr Q (S Sᵀ)⁻¹) dt

for any c > 0, and the integrand vanishes for Gaussian data of scale c. Only the divergence is estimated:

    exact        d vector-Jacobian products on one graph
    hutchinson   vᵀ (∂s/∂x) v with E[v vᵀ] = 1, Rademacher or Gaussian, fixed over the solve (arXiv:1810.01367)
    hadamard, hutch++, fresh probes at each node: :mod:`sdeflow.traces`, where the nodes are known beforehand

Two ways lead to the integral. With ``steps=`` or ``atol=`` alone it is taken on the exponential solver's own nodes
(:mod:`sdeflow.density`), at half the calls; ``atol`` is then the error of log p itself in nats, held for each sample by
comparing grids of N and 1.5 N steps until they agree. A solver of torchdiffeq carries log p as one more coordinate of
the state, to rtol and atol.

What is measured is the density at the cutoff, joint for a coupled state; in nats, in float64. The density of
the data component alone is bounded by

    log p(x) >= E_q(v|x) [log p(x, v) - log q(v | x)],

with q the kernel's own law of the other components given x_0 = x, an average over draws of v.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow.density import carry, reference, reference_growth
from sdeflow.dequantisation import Dequantisation, Uniform, bits_from
from sdeflow.errors import MaxStepsError, ScoreError, TraceErrorWarning
from sdeflow.linear import Linear
from sdeflow.model import Model, checked_state
from sdeflow.noise import NoiseStream, resolve_seed
from sdeflow.pilot import pilot
from sdeflow.plan import Plan, make_plan
from sdeflow.scores import evaluating
from sdeflow.solvers import Exponential, Problem, Solver
from sdeflow.solvers.clock import Clock, Grid
from sdeflow.symbolic.equations import Equation
from sdeflow.traces import Exact, Hadamard, Hutchinson, HutchPP, Trace

__all__ = ["LogProb", "bits_per_dim", "data_log_prob", "log_prob"]

EXACT_BY_DEFAULT = 128
EXACT_LIMIT = 4096
DEFAULT_PROBES = 16
_NOISY_BITS = 0.01  # bits per dimension
_FIRST_STEPS = 20  # of the coarsest grid
_CHUNK = 2**24  # elements of vector-Jacobian products held at once


@dataclass(frozen=True)
class LogProb:
    """A log-likelihood and what is known of its error, each (batch,) in nats.

    Attributes:
        value: log p(x) at the cutoff.
        stderr: the standard error of the trace estimate; 0 for the exact trace, NaN for a single probe.
        solver_error: the difference to a solve with ten times the tolerance, or fewer steps, whose error is larger
            than that of ``value``; with ``atol`` twice what the order leaves of it.
        nfe: calls of the score: for ``value``, or of all grids where the steps were chosen.
    """

    value: Tensor
    stderr: Tensor
    solver_error: Tensor
    nfe: int


def log_prob(
    model: Model,
    equation: Equation,
    x: Tensor,
    *,
    trace: str | Trace | None = None,
    probes: int | None = None,
    probe: str = "rademacher",
    solver: str | Solver | None = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    grid: Grid = None,
    seed: int | torch.Generator | None = None,
    full: bool = False,
    max_calls: int | None = None,
    progress: bool | None = None,
    warn_above: float = 0.1,
) -> Tensor | LogProb:
    """log p(x) in nats under the probability flow. Works inside ``torch.no_grad()`` and ``torch.inference_mode()``.

    Args:
        model: the SDE with its score and prior.
        equation: its probability flow.
        x: (batch, *event), finite.
        trace: "exact" or "hutchinson"; None is exact up to 128 dimensions, and 16 probes above. With the exponential
            solver also "hadamard", "hutch++" or an object of :mod:`sdeflow.traces`.
        probes: how many probes; giving it chooses Hutchinson.
        probe: "rademacher" or "gaussian".
        solver: a method of torchdiffeq, or an :class:`~sdeflow.solvers.Exponential` of eta 0.
        steps: steps of the solver; without one, calls of the score (at least 2), by the exponential solver.
        atol: alone, the error of log p itself in nats, of each sample, by exponential steps on the pilot grid.
        rtol: with or without ``atol``, tolerances of torchdiffeq's dopri5, per sample, of the state and of log p alike.
        grid, max_calls, progress: as ``FlowODE.decode``.
        seed: of the probes.
        full: whether to return a :class:`LogProb` with standard error, solver error and calls.
        warn_above: the standard error in nats above which a plain call warns.

    Returns:
        (batch,) in float64, or a :class:`LogProb`.

    Raises:
        DataError: for a state that is not a finite floating tensor (batch, *event).
        ScoreError: for a score through which no gradient flows.
        ValueError: for options that make no sense.
        SolverError: for a solve that did not end well; never a number then.
    """
    checked_state(x)
    model.require_dtype(x)
    if _by_exponential_steps(model, solver, steps, rtol, atol):
        estimator = _estimator(x, trace, probes, probe)
        hidden, seed = None if progress is None else not progress, resolve_seed(seed)
        with (
            evaluating(model.score), torch.inference_mode(False), torch.no_grad(),
            tqdm(desc="log p", disable=hidden, leave=False) as bar,
        ):  # fmt: skip
            on_call = None if bar.disable else bar.update
            if steps is None:
                found = _to_tolerance(model, x, estimator, solver, atol, grid, seed, max_calls, on_call)
            else:
                found = _in_steps(model, x, estimator, solver, steps, grid, seed, full, on_call)
        if not full:
            _warn_if_noisy(found.stderr, warn_above)
        return found if full else found.value
    plan = make_plan("likelihood", solver, steps, rtol, atol, max_calls, x.dtype)
    vectors = _probes(x, trace, probes, probe, seed)
    clock = model.clock(grid)
    with evaluating(model.score):
        value, stderr, nfe = _solve(model, equation, x, vectors, clock, plan, progress)
        if not full:
            _warn_if_noisy(stderr, warn_above)
            return value
        rough, _, _ = _solve(model, equation, x, vectors, clock, plan.looser(), progress)
    return LogProb(value, stderr, (value - rough).abs(), nfe)


def data_log_prob(
    model: Model,
    equation: Equation,
    x: Tensor,
    *,
    samples: int = 16,
    seed: int | torch.Generator | None = None,
    full: bool = False,
    **options: object,
) -> Tensor | LogProb:
    """A lower bound on log p(x) of the data component alone, in nats, (batch,): E_q [log p(x, v) - log q(v | x)].

    The average over ``samples`` draws of v is returned; its expectation is the bound, and ``full`` gives its
    standard error as ``stderr``. Without auxiliary components it is :func:`log_prob`.

    Args:
        model, equation: as :func:`log_prob`.
        x: data (batch, *event).
        samples: draws of the auxiliary components for each sample.
        seed: of the draws and the probes.
        options: as :func:`log_prob`.

    Raises:
        DataError, ValueError, SolverError: as :func:`log_prob`.
    """
    kernel = model.kernel
    if kernel is None and model.declaration.auxiliary:
        model.declaration.require_affine("The likelihood bound of the data component")
    if not model.declaration.auxiliary:
        return log_prob(model, equation, x, seed=seed, full=full, **options)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive integer, not {samples!r}.")
    checked_state(x)
    seed = resolve_seed(seed)
    states = kernel.lift(x.double(), noisy=False).repeat(samples, *(1,) * x.ndim)
    path = kernel.path(states, torch.tensor(model.cutoff, dtype=torch.float64))
    auxiliary = list(model.declaration.auxiliary)
    root = Linear(torch.linalg.cholesky(path.sigma.gram.values[auxiliary][:, auxiliary]), True)
    level = (path.alpha(states) + path.offset)[:, auxiliary]
    noise = NoiseStream(seed, "auxiliary").normal((len(x), samples, *level.shape[1:]), torch.float64, x.device)
    noise = noise.transpose(0, 1).flatten(0, 1)
    states[:, auxiliary] = level + root(noise)
    joint = log_prob(model.repeated(samples), equation, states.to(x.dtype), seed=seed, full=True, **options)
    normaliser = root.log_det(tuple(level.shape[1:])) + 0.5 * level[0].numel() * math.log(2.0 * math.pi)
    draws = (joint.value + 0.5 * noise.square().flatten(1).sum(1) + normaliser).reshape(samples, len(x))
    if not full:
        return draws.mean(0)
    stderr = draws.std(0) / math.sqrt(samples) if samples > 1 else torch.full_like(draws[0], math.nan)
    return LogProb(draws.mean(0), stderr, joint.solver_error.reshape(samples, len(x)).mean(0), joint.nfe)


def bits_per_dim(
    model: Model, equation: Equation, images: Tensor, *, levels: int, low: float, high: float, full: bool = False,
    dequantise: Dequantisation | None = None, draws: int = 1, importance: bool | None = None,
    seed: int | torch.Generator | None = None, **options: object,
) -> Tensor | LogProb:  # fmt: skip
    """Bits per dimension of integer images by dequantisation, an upper bound on the discrete code length.

    Of a coupled SDE with auxiliary components it is that of :func:`data_log_prob`, again an upper bound.
    Integer k in 0 .. levels - 1 stands for x = low + (high - low) (k + u) / levels, and with u ~ q

        bits = -((log p(x) - log q(u | k)) / d + log((high - low) / levels)) / log 2;

    several draws of u are averaged as weights p / q, which tightens the bound, or as logarithms.

    Args:
        model, equation: as :func:`log_prob`.
        images: (batch, *event), of an integer dtype.
        levels: how many grey levels there are.
        low, high: the range of x that the model was trained on.
        full: whether to return a :class:`LogProb` in bits per dimension instead.
        dequantise: q, of :mod:`sdeflow.dequantisation`; uniform by default.
        draws: of u, for each image.
        importance: whether draws are averaged as weights; by default where log p is no estimate itself, since noise in
            it would be taken for probability.
        seed: of the dequantisation and the probes.
        options: as :func:`log_prob`.

    Raises:
        DataError: for images that are not integers in 0 .. levels - 1.
        ValueError: for levels < 2, low >= high, or importance weights of an estimate.
    """
    seed, auxiliary = resolve_seed(seed), model.declaration.auxiliary
    parameter = next(model.score.parameters(), None)
    dtype = parameter.dtype if parameter is not None else torch.get_default_dtype()
    if dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"bits_per_dim needs a network in float32 or float64: {dtype} cannot hold k + u.")
    scheme = Uniform() if dequantise is None else dequantise
    drawn = scheme.sample(images, levels=levels, low=low, high=high, seed=seed, draws=draws, dtype=dtype)
    d = math.prod(images.shape[1:])
    options.setdefault("warn_above", _NOISY_BITS * d * math.log(2.0))
    measure = data_log_prob if auxiliary else log_prob
    many = full or draws > 1
    found = measure(model.repeated(draws), equation, drawn.x.flatten(0, 1), seed=seed, full=many, **options)
    if not many:
        return bits_from(drawn, found[None]).value
    value, stderr, error = (v.reshape(draws, -1) for v in (found.value, found.stderr, found.solver_error))
    noisy = bool(auxiliary) or bool((stderr > 0).any() | stderr.isnan().any())
    if importance and noisy and draws > 1:
        raise ValueError("importance=True needs the exact trace, and an SDE without auxiliary components.")
    bits = bits_from(drawn, value, stderr, not noisy if importance is None else importance)
    if not full:
        return bits.value
    return LogProb(bits.value, bits.stderr, error.mean(0) / (d * math.log(2.0)), found.nfe)


def _warn_if_noisy(stderr: Tensor, limit: float) -> None:
    """A warning where the trace's standard error is large in some sample, or unknown."""
    if not stderr.numel():
        return
    if bool(torch.isnan(stderr).any()):
        message = "one probe tells nothing of its own error; take probes=2 or more."
    elif float(stderr.max()) > limit:
        message = f"the trace's standard error is up to {float(stderr.max()):.2g} nats; more probes= lower it."
    else:
        return
    warnings.warn(message, TraceErrorWarning, stacklevel=5)


def _probes(
    x: Tensor, trace: str | None, probes: int | None, probe: str, seed: int | torch.Generator | None
) -> Tensor | None:
    """Probe vectors (probes, batch, *event), or None for the exact trace."""
    if trace not in (None, "exact", "hutchinson"):
        raise ValueError(
            f'trace must be "exact" or "hutchinson" with a method of torchdiffeq, not {trace!r}: others go with steps='
        )
    if _is_exact(x, trace, probes, probe):
        return None
    stream = NoiseStream(seed, "probe")
    draw = stream.rademacher if probe == "rademacher" else stream.normal
    shape = (len(x), probes or DEFAULT_PROBES, *x.shape[1:])
    return draw(shape, torch.float64, x.device).movedim(1, 0).contiguous()


def _is_exact(x: Tensor, trace: str | None, probes: int | None, probe: str) -> bool:
    """Whether the trace is to be exact; the options checked."""
    d = math.prod(x.shape[1:])
    if probe not in ("rademacher", "gaussian"):
        raise ValueError(f'probe must be "rademacher" or "gaussian", not {probe!r}.')
    if probes is not None and (isinstance(probes, bool) or not isinstance(probes, int) or probes < 1):
        raise ValueError(f"probes must be a positive integer, not {probes!r}.")
    if trace == "exact" and probes is not None:
        raise ValueError("the exact trace takes no probes.")
    if trace == "exact" and d > EXACT_LIMIT:
        raise ValueError(f'the exact trace in {d} dimensions takes {d} products a call; use trace="hutchinson".')
    return trace == "exact" or (trace is None and probes is None and d <= EXACT_BY_DEFAULT)


def _by_exponential_steps(
    model: Model, solver: str | Solver | None, steps: int | None, rtol: float | None, atol: float | None
) -> bool:
    """Whether the integral is taken on an exponential solver's nodes."""
    if isinstance(solver, Exponential):
        if solver.stochastic:
            raise ValueError(f"the likelihood is the flow's: {solver} draws noise.")
        if not model.log_snr_falls:
            raise ValueError(f"{solver} needs a Gaussian kernel, and noise at all times, which this SDE has not.")
        if rtol is not None or (steps is None) == (atol is None):
            raise ValueError("an exponential solver takes either steps= or atol=, the error of log p in nats.")
        return True
    steady = model.log_snr_falls and model.kernel.log_snr_falls_steadily
    alone = (steps is None) != (atol is None) and rtol is None
    return solver is None and steady and alone


def _estimator(x: Tensor, trace: str | Trace | None, probes: int | None, probe: str) -> Trace:
    """The trace estimator meant."""
    if isinstance(trace, Trace):
        if probes is not None:
            raise ValueError("a trace object has its own number of probes.")
        return trace
    if trace == "hadamard":
        return Hadamard(probes or DEFAULT_PROBES)
    if trace == "hutch++":
        return HutchPP(probes or DEFAULT_PROBES)
    if trace not in (None, "exact", "hutchinson"):
        raise ValueError(f'trace must be "exact", "hutchinson", "hadamard" or "hutch++", not {trace!r}.')
    if _is_exact(x, trace, probes, probe):
        return Exact()
    return Hutchinson(probes or DEFAULT_PROBES, probe)


def _default_exponential(model: Model) -> Exponential:
    return Exponential(2 if model.kernel.coupled else 3)


def _in_steps(
    model: Model, x: Tensor, trace: Trace, solver: Exponential | None, steps: int, grid: Grid, seed: int, full: bool,
    on_call: Callable[[], object] | None,
) -> LogProb:  # fmt: skip
    """log p in a fixed number of steps; with ``full``, compared with two thirds of them."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, not {steps!r}.")
    if solver is None:
        solver, steps = _default_exponential(model), max(1, steps - 1)  # without a solver, calls are what is counted
    if not len(x):
        return _of_no_samples(x)
    clock = _nodes(model, grid, solver, x)
    found = carry(model, x, trace, solver, clock, steps, seed=seed, on_call=on_call)
    error = torch.full_like(found.value, math.nan)
    if full:  # with probes that do not differ between the grids, so that only the solver does
        same = trace if isinstance(trace, Exact) else Hutchinson(2, fresh=False)
        fine = found if same is trace else carry(model, x, same, solver, clock, steps, seed=seed, on_call=on_call)
        rough = carry(model, x, same, solver, clock, max(1, 2 * steps // 3), seed=seed, on_call=on_call)
        error = (fine.value - rough.value).abs()
    return LogProb(found.value, found.stderr, error, found.calls)


def _to_tolerance(
    model: Model, x: Tensor, trace: Trace, solver: Exponential | None, atol: float, grid: Grid, seed: int,
    max_calls: int | None, on_call: Callable[[], object] | None,
) -> LogProb:  # fmt: skip
    """log p of each sample to ``atol`` nats: grids of N, 1.5 N, ... steps until they agree.

    Of order q, the finer of two has 1 / (1.5^q - 1) of their difference as its error. Twice that is taken, and as much
    from the difference before, since two grids may agree by chance. A stochastic trace is compared with two fixed
    probes, and taken on the grid that was found.
    """
    if not isinstance(atol, int | float) or isinstance(atol, bool) or not 0 < atol < math.inf:
        raise ValueError(f"atol must be a positive error in nats, not {atol!r}.")
    if not len(x):
        return _of_no_samples(x)
    solver, budget = solver or _default_exponential(model), max_calls or 10_000
    clock = _nodes(model, "pilot" if grid is None else grid, solver, x)
    same = trace if isinstance(trace, Exact) else Hutchinson(2, fresh=False)
    value, stderr = (x.new_full((len(x),), math.nan, dtype=torch.float64) for _ in range(2))
    error, steps_of = value.clone(), torch.zeros(len(x), dtype=torch.long)
    rows, steps, calls = torch.arange(len(x)), _FIRST_STEPS, 0
    before, last = None, None  # log p on the grid before, and the difference to the one before that
    ratio = 1.5 ** (solver.convergence_order - model.kernel.coupled)  # coupled states come to their order late
    while len(rows):
        if calls + steps + 1 > budget:
            raise MaxStepsError(
                f"{len(rows)} of {len(x)} samples did not reach atol = {atol:g} nats in {calls} calls: loosen it, "
                "raise max_calls, or look at those samples, where the score may be rough.",
                nfe=calls, bad_rows=rows.tolist(),
            )  # fmt: skip
        part = carry(
            model.of_indices(rows, len(x)), x[rows.to(x.device)], same, solver, clock, steps, seed=seed, rows=rows,
            batch=len(x), on_call=on_call,
        )  # fmt: skip
        calls += part.calls
        found = rows.to(x.device)
        value[found], stderr[found] = part.value, part.stderr
        if before is None:
            before, steps = part.value, -(-3 * steps // 2)
            continue
        change = (part.value - before).abs()
        error[found] = 2.0 / (ratio - 1.0) * (change if last is None else torch.maximum(change, last / ratio))
        steps_of[rows] = steps
        left = ~(error[found] <= atol)
        before, last, rows = part.value[left], change[left], rows[left.cpu()]
        steps = -(-3 * steps // 2)
    if same is not trace:
        for n in steps_of.unique().tolist():
            rows = (steps_of == n).nonzero().flatten()
            part = carry(
                model.of_indices(rows, len(x)), x[rows.to(x.device)], trace, solver, clock, n, seed=seed, rows=rows,
                batch=len(x), on_call=on_call,
            )  # fmt: skip
            calls += part.calls
            value[rows.to(x.device)], stderr[rows.to(x.device)] = part.value, part.stderr
    return LogProb(value, stderr, error, calls)


def _nodes(model: Model, grid: Grid, solver: Exponential, x: Tensor) -> Clock:
    """The time variable in which steps are uniform."""
    if isinstance(grid, str) and grid == "pilot":
        return pilot(model, solver, x).clock
    return model.clock("log_snr" if grid is None else grid)


def _of_no_samples(x: Tensor) -> LogProb:
    empty = torch.zeros(0, dtype=torch.float64, device=x.device)
    return LogProb(empty, empty, empty, 0)


def _solve(
    model: Model, equation: Equation, x: Tensor, vectors: Tensor | None, clock: Clock, plan: Plan, progress: bool | None
) -> tuple[Tensor, Tensor, int]:
    """log p, its standard error, and the calls."""
    if not len(x):
        empty = torch.zeros(0, dtype=torch.float64, device=x.device)
        return empty, empty, 0
    d = math.prod(x.shape[1:])
    columns = 1 if vectors is None else len(vectors)
    rate = _augmented_rate(model, equation, tuple(x.shape[1:]), vectors, x.dtype)

    def row_norm(error: Tensor) -> Tensor:
        of_state, of_log_p = error[:, :d], error[:, d:].mean(1)
        return torch.maximum(of_state.square().mean(1).sqrt(), of_log_p.abs())

    with (
        torch.inference_mode(False),
        torch.no_grad(),
        tqdm(
            total=plan.expected_calls, desc="log p", disable=None if progress is None else not progress, leave=False
        ) as bar,
    ):
        problem = Problem(
            rate, clock, backward=False, row_norm=row_norm, max_calls=plan.max_calls,
            on_call=None if bar.disable else bar.update,
        )  # fmt: skip
        start = model.to_solver(x.detach().double(), model.cutoff).flatten(1)
        y = torch.cat([start, start.new_zeros(len(x), columns)], dim=1)
        y = plan.solver.solve(problem, y, plan.steps, plan.rtol, plan.atol)
        x_T, integrals = model.from_solver(y[:, :d].reshape(x.shape), model.T), y[:, d:]
        prior = model.prior_for(x.detach().clone())
        value = prior.log_prob(x_T) + integrals.mean(1) + reference_growth(model, x[:1].detach().double())
    if vectors is None:
        stderr = torch.zeros_like(value)
    else:
        stderr = integrals.std(1) / math.sqrt(columns) if columns > 1 else torch.full_like(value, math.nan)
    return value, stderr, problem.nfe


def _augmented_rate(
    model: Model, equation: Equation, event: tuple[int, ...], vectors: Tensor | None, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], Tensor]:
    """d/dt of (x, what the divergence adds to log p), as a function of (y, t) with y (batch, d + columns)."""
    drift, kernel = model.drift(equation), model.kernel
    d = math.prod(event)

    def rate(y: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            u = y[:, :d].detach().reshape(-1, *event).requires_grad_(True)
            s = model.solver_score(u, t, dtype)
            velocity = drift(u, t, s)
            if kernel is None:
                change = _divergence(velocity, u, vectors)
            else:
                _, _, q = kernel.equation(u, t)
                inverse = reference(model, t, u).inverse
                known = (q @ inverse.T @ inverse).trace(event)
                change = -0.5 * (_divergence(q(s), u, vectors) + known)
        return torch.cat([velocity.detach().flatten(1), change.detach().mT.to(y.dtype)], dim=1)

    return rate


def _divergence(s: Tensor, x: Tensor, vectors: Tensor | None) -> Tensor:
    """div s, (columns, batch): exact in one column, or vᵀ (∂s/∂x) v for each probe v."""
    if not s.requires_grad:
        raise ScoreError("no gradient flows through the score (a detach or no_grad inside?), so it has no divergence.")
    if vectors is not None:
        return _products(s, x, vectors)
    d = math.prod(x.shape[1:])
    size = max(1, min(d, _CHUNK // x.numel()))
    total = torch.zeros(len(x), dtype=s.dtype, device=x.device)
    for first in range(0, d, size):
        index = torch.arange(first, min(first + size, d), device=x.device)
        basis = torch.zeros(len(index), 1, d, dtype=s.dtype, device=x.device)
        basis[torch.arange(len(index)), 0, index] = 1.0
        basis = basis.expand(-1, len(x), -1).reshape(len(index), *x.shape)
        total = total + _products(s, x, basis, last=index[-1] == d - 1).sum(0)
    return total[None]


def _products(s: Tensor, x: Tensor, vectors: Tensor, last: bool = True) -> Tensor:
    """vᵀ (∂s/∂x) v of each sample for vectors (k, batch, *event), (k, batch), on one graph."""
    if len(vectors) == 1:
        (gradient,) = torch.autograd.grad(s, x, vectors[0], retain_graph=not last)
        gradient = gradient[None]
    else:
        (gradient,) = torch.autograd.grad(s, x, vectors, retain_graph=not last, is_grads_batched=True)
    return (gradient * vectors).flatten(2).sum(2)
