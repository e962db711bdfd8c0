"""Which way log p is computed: the one place where that is decided, before anything is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.likelihood.options import Options, estimator
from sdeflow.numerics.traces import Trace
from sdeflow.scores import evaluating
from sdeflow.solvers import Exponential, Grid
from sdeflow.solvers.clock import steps_of
from sdeflow.solving.model import Model
from sdeflow.solving.plan import Plan, make_plan, require_calls

__all__ = ["Continuous", "OnNodes", "route"]

_STILL = 1e-3  # a rate of the half-log-SNR, over the horizon


@dataclass(frozen=True)
class OnNodes:
    """On the nodes of an exponential solver, whose integral of the divergence is a sum over them.

    Attributes:
        solver: which.
        grid: in which variable, or at which times.
        steps: how many; None for as many as an error of log p in nats takes.
        trace: how the divergence is found at a node.
        gradient: "backprop", "adjoint", or None.
    """

    solver: Exponential
    grid: Grid
    steps: int | None
    trace: Trace
    gradient: str | None


@dataclass(frozen=True)
class Continuous:
    """As one more coordinate of the state, by a method of torchdiffeq.

    Attributes:
        plan: the method, with its steps or tolerances.
        held: the error in nats that log p of each sample is held to, by tolerances that become tighter; None where the
            plan is taken as it is.
        gradient: "backprop" or None.
    """

    plan: Plan
    held: float | None
    gradient: str | None


def route(model: Model, x: Tensor, options: Options) -> OnNodes | Continuous:
    """The way to log p of states ``x`` (batch, *event) that ``options`` ask for.

        an Exponential is named                           on its nodes: in steps=, or to atol= nats
        no solver, and nothing, steps= or atol= alone,    on the nodes of an Exponential, likewise,
                                                          where the SDE has a Gaussian kernel
        else                                              by torchdiffeq: in steps=, to tolerances, or with atol=
                                                          alone to an error in nats

    Raises:
        ValueError: for options that do not go together, or do not fit the SDE.
    """
    nodes = _on_nodes(model, options)
    plan = None if nodes else _plan(options, x.dtype)
    gradient = _gradient(model, x, options, nodes)
    if plan is not None:
        alone = options.solver is None and options.steps is None and options.rtol is None
        return Continuous(plan, options.atol if alone else None, gradient)
    kernel = model.kernel.require_gaussian("log p on nodes")
    solver = options.solver if isinstance(options.solver, Exponential) else Exponential(2 if kernel.coupled else 3)
    steps, times = _steps(options), steps_of(options.grid)
    grid = options.grid
    if grid is None:
        grid = "pilot" if steps is None else "log_snr"
    if steps is not None and steps != times and options.solver is None:
        steps = max(1, steps - 1)  # without a solver, calls are what is counted
    return OnNodes(solver, grid, steps, estimator(x, options), gradient)


def _on_nodes(model: Model, options: Options) -> bool:
    """Whether the integral is taken on an exponential solver's nodes."""
    solver, steps, rtol, atol = options.solver, options.steps, options.rtol, options.atol
    if isinstance(solver, Exponential):
        if solver.stochastic:
            raise ValueError(f"the likelihood is the flow's: {solver} draws noise.")
        if model.gaussian is None:
            raise ValueError(f"{solver} needs a Gaussian kernel, which this SDE has not.")
        if rtol is not None or (_steps(options) is None) == (atol is None):
            raise ValueError("an exponential solver takes either steps= or atol=, the error of log p in nats.")
        return True
    if steps is not None and options.max_calls is not None and steps > options.max_calls:
        raise ValueError(f"{steps} steps take more than max_calls={options.max_calls} calls.")
    require_calls(steps or 0, f"{steps} steps", options.max_calls)
    return solver is None and model.gaussian is not None and rtol is None and (steps is None or atol is None)


def _steps(options: Options) -> int | None:
    """Steps, or times of a grid, as asked for; None where log p is held to an error."""
    return steps_of(options.grid) if options.steps is None and options.atol is None else options.steps


def _plan(options: Options, dtype: torch.dtype) -> Plan:
    """The method of torchdiffeq, and its steps or tolerances."""
    if options.gradient == "adjoint":
        raise ValueError(
            'gradient="adjoint" goes along the nodes of an exponential solver, which needs a Gaussian kernel, and '
            'steps= or atol= alone; a method of torchdiffeq takes gradient="backprop".'
        )
    return make_plan(
        "likelihood", options.solver, options.steps, options.rtol, options.atol, options.max_calls, dtype, options.grid
    )


def _gradient(model: Model, x: Tensor, options: Options, nodes: bool) -> str | None:
    """The gradient that is meant.

    Raises:
        ValueError: where it would miss something that requires grad.
    """
    chosen = options.gradient
    if chosen is None and not (x.requires_grad and torch.is_grad_enabled()):
        return None
    if any(tensor.requires_grad for tensor in model.values.tensors.values()):
        raise ValueError(
            "the gradient of log p does not reach the parameters of the SDE itself: freeze them with "
            "requires_grad_(False)."
        )
    hidden = len(x) > 0 and _reaches_more_than_parameters(model, x)
    if chosen == "adjoint" and hidden:
        raise ValueError(
            'gradient="adjoint" finds the parameters of a score that is a module; this one uses others, in a closure. '
            'Pass the module itself, or take gradient="backprop".'
        )
    still = nodes and _stands_still(model)
    if chosen == "adjoint" and still:
        raise ValueError(
            'gradient="adjoint" integrates over the log-SNR, which stands still at an end of this SDE or on the way '
            '(g = 0 there): take gradient="backprop".'
        )
    return chosen or ("adjoint" if nodes and not (hidden or still) else "backprop")


def _reaches_more_than_parameters(model: Model, x: Tensor) -> bool:
    """Whether the score depends on tensors that require grad and are none of its parameters."""
    one = model.rows(slice(0, 1))
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model.score):
        output = one.score(x[:1].detach().clone(), model.T)
    known = {id(p) for p in model.score.parameters()}
    seen: set[object] = set()
    queue = [output.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in known:
            return True
        queue += [parent for parent, _ in node.next_functions]
    return False


def _stands_still(model: Model) -> bool:
    """Whether the log-SNR stands still at the cutoff or at T, where an integrand over it has a pole.

    On the way too where break points are times of the grid (coupled states, schedules per coordinate); else none falls
    into a pause.
    """
    kernel = model.kernel.require_gaussian("The adjoint equation")
    times = torch.tensor([model.cutoff, model.T], dtype=torch.float64)
    with torch.no_grad():
        still = not bool((kernel.half_log_snr_rate(times) < 0).all())
        if still or not (kernel.coupled or kernel.values.shape):
            return still
        return bool((kernel.half_log_snr_rate(kernel.numbers.probes) * (model.T - model.cutoff) > -_STILL).any())
