"""log p of samples, with its error budget; of the data component alone, a bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow.errors import NonFiniteStateError, TraceErrorWarning, warn
from sdeflow.likelihood.budget import mean_path, prior_mismatch, truncation
from sdeflow.likelihood.continuous import by_torchdiffeq
from sdeflow.likelihood.exponential import by_exponential, carrier_of
from sdeflow.likelihood.options import DataOptions, LogProbOptions, Options
from sdeflow.likelihood.result import LogProb, Solved, joined
from sdeflow.likelihood.route import Continuous, OnNodes, route
from sdeflow.numerics.checks import checked_count
from sdeflow.numerics.linear import Blocks
from sdeflow.numerics.memory import memory_hint
from sdeflow.numerics.noise import NoiseStream
from sdeflow.numerics.options import takes
from sdeflow.numerics.traces import Exact, Given, Hutchinson, widening
from sdeflow.scores import evaluating
from sdeflow.solving.model import Model
from sdeflow.symbolic.equations import Equation

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["data_log_prob", "log_prob", "of_data", "of_states", "warn_if_noisy"]

_HINT = "log p does not fit into memory: pass chunk=, the number of samples to solve at once."
_LARGEST = 2**22  # elements of states carried at once

Solve = Callable[[Model, Tensor, Tensor], Solved]


@overload
def log_prob(
    model: Model, equation: Equation, x: Tensor, *, full: Literal[False] = False, **options: Unpack[LogProbOptions]
) -> Tensor: ...


@overload
def log_prob(
    model: Model, equation: Equation, x: Tensor, *, full: bool, **options: Unpack[LogProbOptions]
) -> Tensor | LogProb: ...


@takes(LogProbOptions, Options)
def log_prob(
    model: Model, equation: Equation, x: Tensor, *, full: bool = False, **options: Unpack[LogProbOptions]
) -> Tensor | LogProb:
    """log p(x) in nats under the probability flow. Works inside ``torch.no_grad()`` and ``torch.inference_mode()``.

    Without a solver its error is held to ``atol`` for each sample by exponential steps, on grids that are made finer
    until they agree, and by dopri5 where they do not. By default that is 1e-3 nats (5e-3 in float32), or 1e-4 bits per
    dimension, 1e-5 of log p, or 0.3 ``warn_above`` of an estimated trace, where that is more. An SDE without a Gaussian
    kernel is solved by torchdiffeq's dopri5, to rtol = atol = 1e-5 by default, and with ``atol`` at tolerances that
    become tighter until two solves agree.

    Args:
        model: the SDE with its score and prior.
        equation: its probability flow.
        x: (batch, *event), finite.
        full: whether to return a :class:`LogProb`, with all that is known of the error. It takes a finer solve where
            the steps are given, a call with its divergence at the cutoff, and fourteen calls or more at T.
        options: see :class:`~sdeflow.likelihood.options.LogProbOptions`.

    Returns:
        (batch,) in float64, or a :class:`LogProb`.

    Raises:
        DataError: for a state that is not a finite floating tensor (batch, *event).
        ScoreError: for a score through which no gradient flows.
        OptionError: for an option of another name.
        ValueError: for options that make no sense.
        SolverError: for a solve that did not end well; never a number then.
    """
    x = model.states(x)
    asked = Options(full=full, **options).seeded(x)
    found = of_states(model, equation, x, asked)
    if full:
        return found
    warn_if_noisy(found.stderr, asked.warn_above)
    return found.value


def likelihood(model: Model, equation: Equation, x: Tensor, **options: Unpack[LogProbOptions]) -> LogProb:
    """:func:`log_prob` with ``full``."""
    x = model.states(x)
    return of_states(model, equation, x, Options(full=True, **options).seeded(x))


def of_states(model: Model, equation: Equation, x: Tensor, options: Options) -> LogProb:
    """log p of x (batch, *event); parts of the budget that nobody asked for are NaN."""
    model.require_dtype(x)
    model = model.of_batch(len(x))
    if options.at == "data" and model.declaration.auxiliary:
        raise ValueError(
            'at="data": this state has auxiliary components; data_log_prob bounds the density of the data.'
        )
    if isinstance(options.trace, Given):
        options.trace.require(tuple(x.shape))
    way = route(model, x, options)
    options = replace(options, gradient=way.gradient)
    if not len(x):
        empty = torch.zeros(0, dtype=torch.float64, device=x.device)
        return LogProb(empty, empty, empty, empty, empty, 0, empty)
    size = options.chunk or max(1, _LARGEST // math.prod(x.shape[1:]))
    rows = options.first_row + torch.arange(len(x), device=x.device)
    no_bar = None if options.progress is None else not options.progress
    with (
        evaluating(model.score), torch.inference_mode(False),
        nullcontext() if options.gradient else torch.no_grad(), memory_hint(_HINT),
        tqdm(desc="log p", disable=no_bar, leave=False) as bar,
    ):  # fmt: skip
        on_call = None if bar.disable else bar.update
        if x.is_inference():
            x = x.clone()
        solve = _solver(model, equation, x, way, options, on_call)
        if len(x) <= size:
            return _chunk(model, x, rows, options, way, solve)
        parts = [
            _chunk(model.rows(part), x[part], rows[part], options, way, solve)
            for part in torch.arange(len(x), device=x.device).split(size)
        ]
    return joined(parts)


def _solver(
    model: Model, equation: Equation, x: Tensor, way: OnNodes | Continuous, options: Options,
    on_call: Callable[[], object] | None,
) -> Solve:  # fmt: skip
    """What solves for samples of x, by their model, states at the cutoff in float64 and rows."""
    if isinstance(way, OnNodes):
        carrier = carrier_of(model, x, way, options.key, on_call)
        in_steps = way.steps is not None
        return lambda part, state, rows: by_exponential(carrier, part, equation, state, rows, options, in_steps)
    return lambda part, state, rows: by_torchdiffeq(part, equation, state, rows, options, way, x.dtype, on_call)


def _chunk(model: Model, x: Tensor, rows: Tensor, options: Options, way: OnNodes | Continuous, solve: Solve) -> LogProb:
    """log p of some samples."""
    state, volume, from_data = x.double(), 0.0, options.at == "data"
    if from_data:
        state, volume = mean_path(model, x)
    found = solve(model, state, rows)
    bad = (~torch.isfinite(found.value)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteStateError(f"log p is not finite in samples {bad[:8]}.", nfe=found.calls, bad_rows=bad)
    unknown = torch.full_like(found.value.detach(), math.nan)
    value, left, mismatch = found.value + volume, unknown, (unknown, unknown)
    if options.full or from_data:
        of_cutoff = way.trace if isinstance(way, OnNodes) else Hutchinson() if found.stderr.any() else Exact()
        change, left = truncation(model, x, of_cutoff, seed=options.key, rows=rows, from_data=from_data)
        value, left = (value + change, left) if from_data else (value, change)
    if options.full:
        mismatch = prior_mismatch(model, found.x_T, x.dtype)
    return LogProb(value, found.bar, found.error, left, mismatch[0], found.calls, mismatch[1])


def warn_if_noisy(stderr: Tensor, limit: float) -> None:
    """A warning where the trace's standard error is large in some sample, or unknown."""
    if not stderr.numel():
        return
    if bool(torch.isnan(stderr).any()):
        message = "so few probes tell nothing of their own error; take more (2, and 6 of Hutch++)."
    elif float(stderr.max()) > limit:
        message = f"the trace's standard error is up to {float(stderr.max()):.2g} nats; more probes= lower it."
    else:
        return
    warn(message, TraceErrorWarning)


@overload
def data_log_prob(
    model: Model, equation: Equation, x: Tensor, *, full: Literal[False] = False, **options: Unpack[DataOptions]
) -> Tensor: ...


@overload
def data_log_prob(
    model: Model, equation: Equation, x: Tensor, *, full: bool, **options: Unpack[DataOptions]
) -> Tensor | LogProb: ...


@takes(LogProbOptions, Options)
def data_log_prob(
    model: Model, equation: Equation, x: Tensor, *, samples: int = 16, full: bool = False,
    **options: Unpack[LogProbOptions],
) -> Tensor | LogProb:  # fmt: skip
    """A lower bound on log p(x) of the data component alone, in nats, (batch,): E_q [log p(x, v) - log q(v | x)].

    q is the kernel's own law of the other components at the cutoff given x_0 = x. The average over ``samples`` draws of
    v is returned; its expectation is the bound, and ``full`` gives its standard error as ``stderr``. Without auxiliary
    components it is :func:`log_prob`.

    Args:
        model, equation: as :func:`log_prob`.
        x: data (batch, *event).
        samples: draws of the auxiliary components for each sample.
        full: whether to return a :class:`LogProb`.
        options: as :func:`log_prob`, with at="cutoff"; ``seed`` is of the draws too, and gradients flow as there.

    Raises:
        DataError, ValueError, SolverError: as :func:`log_prob`.
    """
    if not model.declaration.auxiliary:
        return log_prob(model, equation, x, full=full, **options)
    samples = checked_count(samples, "samples")
    x = model.states(x)
    found = of_data(model, equation, x, samples, Options(full=full, **options).seeded())
    return found if full else found.value


def of_data(model: Model, equation: Equation, x: Tensor, samples: int, options: Options) -> LogProb:
    """The bound of :func:`data_log_prob`."""
    kernel = model.kernel.require_gaussian("The likelihood bound of the data component")
    if options.at != "cutoff":
        raise ValueError("the bound of the data component is measured at the cutoff.")
    states = kernel.lift(x.double(), noisy=False).repeat_interleave(samples, 0)
    path = kernel.path(states, torch.tensor(model.cutoff, dtype=torch.float64))
    auxiliary = list(model.declaration.auxiliary)
    root = Blocks(torch.linalg.cholesky(path.sigma.gram.values[auxiliary][:, auxiliary]))
    level = (path.alpha(states) + path.offset)[:, auxiliary]
    stream = NoiseStream(options.key, "auxiliary", options.first_row * samples)
    noise = stream.normal(tuple(level.shape), torch.float64, x.device)
    states[:, auxiliary] = level + root(noise)
    options = replace(options, first_row=options.first_row * samples)
    of_draw = model.of_batch(len(x)).rows(torch.arange(len(x)).repeat_interleave(samples))
    joint = of_states(of_draw, equation, states.to(x.dtype), options)
    normaliser = root.log_det(tuple(level.shape[1:])) + 0.5 * level[0].numel() * math.log(2.0 * math.pi)
    draws = (joint.value + 0.5 * noise.square().flatten(1).sum(1) + normaliser).reshape(len(x), samples)
    stderr = torch.full_like(draws[:, 0], math.nan)
    if samples > 1:
        stderr = draws.std(1) * (widening(stderr.new_tensor(samples - 1.0)) / math.sqrt(samples))

    def mean(part: Tensor) -> Tensor:
        return part.reshape(len(x), samples).mean(1)

    return LogProb(
        draws.mean(1), stderr, mean(joint.solver_error), mean(joint.truncation), mean(joint.prior_mismatch), joint.nfe,
        mean(joint.prior_error),
    )  # fmt: skip
