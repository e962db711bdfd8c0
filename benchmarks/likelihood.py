"""Calls for an accuracy of log p, ours beside torchdiffeq, torchode and SciPy, and the noise of trace estimators.

With the exact trace: everyone integrates the same flow from the cutoff to T, with its divergence, from the same points,
and ends in the same prior. The reference is our solve in 600 steps, whose distance to dopri5 at 1e-9 is printed. The
peers' solvers run as their users write them, on log p as one more coordinate of the state: torchdiffeq with its norm
over the batch, torchode with steps of each sample's own, SciPy on the whole batch as one vector, as score_sde_pytorch
does. A call is one evaluation of the score on the batch. The last lines of each problem say how the error is spread.

Of estimated traces: the standard deviation over seeds of log p on 51 nodes, and the standard error that a single solve
reports, both root mean squares over the points. The two agree where the reported error is right.

    python benchmarks/likelihood.py [--samples 32] [--seeds 24]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import scipy.integrate
import torch
from problems import Problem, problem
from torch import Tensor

from sdeflow.numerics.traces import Hadamard, Hutchinson, HutchPP, Trace
from sdeflow.solvers import Exponential

TARGETS = (0.1, 0.01, 0.001)
TOLERANCES = 10.0 ** np.arange(-1.0, -7.1, -0.25)
PROBES = (1, 4, 16, 32)
CALLS = (12, 15, 18, 21, 24, 27, 30, 34, 38, 42, 46, 50, 55, 60, 70, 80, 90, 100, 120, 150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=32, help="points for each problem (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=24, help="seeds for each trace (default %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("calls for an RMS error of log p of " + " / ".join(f"{target:g}" for target in TARGETS) + " nats\n")
    for law in ("g64", "ring"):
        calls(problem(law, "VP"), given.samples)
    traces(problem("g64", "VP"), min(given.samples, 8), given.seeds)


def points_of(case: Problem, samples: int) -> Tensor:
    """Data with the noise of the cutoff."""
    data = case.score.sample(samples, seed=7, dtype=torch.float64)
    return case.sde.kernel.sample(data, case.sde.cutoff, seed=8)


def calls(case: Problem, samples: int) -> None:
    """Prints the calls that each method needs."""
    points, flow = points_of(case, samples), case.sde.flow_ode(case.score)
    truth = flow.log_prob(points, steps=600, grid="pilot")
    apart = float((flow.log_prob(points, solver="dopri5", rtol=1e-9, atol=1e-9) - truth).abs().max())
    print(f"{case.name}, {samples} points (two references differ by {apart:.1e} at most)")
    for name, runs in methods(case, points, flow):
        print(f"  {name:42s} {' / '.join(needed(runs, truth))}", flush=True)
    for atol in TARGETS:
        found = flow.log_prob(points, atol=atol, full=True)
        error = (found.value - truth).abs()
        covered = float((error <= 2 * found.solver_error).double().mean())
        print(
            f"  ours, atol = {atol:<29g} {found.nfe} calls in all, rms {float(error.square().mean().sqrt()):.1e}, "
            f"largest {float(error.max()):.1e}; {covered:.0%} within two of their bars"
        )
    for n in (30, 50, 60):
        error = (flow.log_prob(points, steps=n, grid="pilot") - truth).abs().sort(descending=True).values
        largest = ", ".join(f"{e:.1e}" for e in error[:3].tolist())
        print(f"  ours, order 3, pilot, {n} calls: median {float(error.median()):.1e}, largest {largest}")
    print()


def traces(case: Problem, samples: int, seeds: int) -> None:
    """Prints the standard deviation of log p by estimated traces, and beside it the reported standard error."""
    points, flow = points_of(case, samples), case.sde.flow_ode(case.score)
    print(f"{case.name}, {samples} points, 51 nodes: standard deviation over {seeds} seeds (reported error), in nats")
    print(f"  {'probes at each node':28s}" + "".join(f"{probes:>16d}" for probes in PROBES))
    for name, make in estimators():
        cells = []
        for probes in PROBES:
            trace = make(probes)
            if trace is None:
                cells.append("-")
                continue
            runs = [flow.log_prob(points, trace=trace, steps=51, grid="pilot", seed=k, full=True) for k in range(seeds)]
            spread = torch.stack([run.value for run in runs]).var(0).mean().sqrt()
            reported = torch.stack([run.stderr for run in runs]).square().mean().sqrt()
            cells.append(f"{float(spread):.2g} ({'-' if reported.isnan() else f'{float(reported):.2g}'})")
        print(f"  {name:28s}" + "".join(f"{cell:>16s}" for cell in cells), flush=True)


def estimators() -> Iterator[tuple[str, Callable[[int], Trace | None]]]:
    """Each estimator's name, and what makes it for a number of products at each node; None where that is too few."""
    yield "Gaussian, fixed", lambda n: Hutchinson(n, "gaussian", fresh=False)
    yield "Rademacher, fixed", lambda n: Hutchinson(n, fresh=False)
    yield "Rademacher, fresh", lambda n: Hutchinson(n)
    yield "Hadamard columns, cycled", lambda n: Hadamard(n)
    yield "Hutch++, fresh", lambda n: HutchPP(n) if n >= 3 else None


def methods(case: Problem, points: Tensor, flow: object) -> Iterator[tuple[str, Iterator[tuple[int, Tensor]]]]:
    """Each method's name, and (calls, log p) at growing accuracy."""
    yield "torchdiffeq dopri5, in t", (by_torchdiffeq(case, points, flow, tolerance) for tolerance in TOLERANCES)
    yield "torchode dopri5, in t", (by_torchode(case, points, flow, tolerance) for tolerance in TOLERANCES)
    yield "SciPy RK45, in t", (by_scipy(case, points, flow, tolerance) for tolerance in TOLERANCES)
    for order in (3, 4):
        for grid in ("log_snr", "pilot"):
            solver = Exponential(order)
            runs = ((n, flow.log_prob(points, solver=solver, steps=n - 1, grid=grid)) for n in CALLS)
            yield f"ours, order {order} with corrector, {grid}", runs


def needed(runs: Iterator[tuple[int, Tensor]], truth: Tensor) -> list[str]:
    """The calls at which each target is first met."""
    found: dict[float, int] = {}
    for calls, value in runs:
        error = float((value - truth).square().mean().sqrt())
        for target in TARGETS:
            if error <= target:
                found.setdefault(target, calls)
        if len(found) == len(TARGETS):
            break
    return [str(found.get(target, "-")) for target in TARGETS]


def by_torchdiffeq(case: Problem, points: Tensor, flow: object, tolerance: float) -> tuple[int, Tensor]:
    from torchdiffeq import odeint

    T, cutoff = case.span
    case.score.start()
    ts = torch.tensor([cutoff, T], dtype=torch.float64)
    y = torch.cat([points, points.new_zeros(len(points), 1)], 1)
    try:
        out = odeint(augmented(case), y, ts, rtol=tolerance, atol=tolerance, options={"step_t": ts[1:]})[-1]
    except AssertionError:  # "underflow in dt"
        return case.score.calls, torch.full((len(points),), torch.inf, dtype=torch.float64)
    return case.score.calls, closed(flow, points, out)


def by_torchode(case: Problem, points: Tensor, flow: object, tolerance: float) -> tuple[int, Tensor]:
    import torchode

    case.score.start()
    term = torchode.ODETerm(augmented(case))
    start, end = (torch.full((len(points),), t, dtype=torch.float64) for t in reversed(case.span))
    y = torch.cat([points, points.new_zeros(len(points), 1)], 1)
    controller = torchode.IntegralController(tolerance, tolerance, term=term)
    with torch.no_grad():
        out = torchode.solve_ivp(term, y, None, t_span=(start, end), method="dopri5", controller=controller)
    failed = bool((out.status != 0).any()) or not bool(torch.isfinite(out.ys).all())
    value = (
        torch.full((len(points),), torch.inf, dtype=torch.float64) if failed else closed(flow, points, out.ys[:, -1])
    )
    return case.score.calls, value


def by_scipy(case: Problem, points: Tensor, flow: object, tolerance: float) -> tuple[int, Tensor]:
    T, cutoff = case.span
    case.score.start()
    rate, shape = augmented(case), (len(points), points.shape[1] + 1)
    y = torch.cat([points, points.new_zeros(len(points), 1)], 1)

    def field(t: float, flat: np.ndarray) -> np.ndarray:
        return rate(torch.tensor(t, dtype=torch.float64), torch.as_tensor(flat).reshape(shape)).numpy().reshape(-1)

    out = scipy.integrate.solve_ivp(field, (cutoff, T), y.numpy().reshape(-1), rtol=tolerance, atol=tolerance)
    return case.score.calls, closed(flow, points, torch.as_tensor(out.y[:, -1]).reshape(shape))


def augmented(case: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """d/dt of (x, ∫ div v), with the exact trace."""

    def rate(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = y[:, :-1].detach().requires_grad_(True)
            side = t[:, None] if t.ndim else t  # torchode: a time for each sample
            v = case.by_hand.drift(side) * x - 0.5 * case.by_hand.diffusion(side) * case.score(x, t)
            d = x.shape[1]
            basis = torch.eye(d, dtype=x.dtype)[:, None].expand(d, len(x), d)
            (rows,) = torch.autograd.grad(v, x, basis, is_grads_batched=True)
        return torch.cat([v.detach(), rows.diagonal(dim1=0, dim2=2).sum(1, keepdim=True)], 1)

    return rate


def closed(flow: object, points: Tensor, out: Tensor) -> Tensor:
    """log p from the state at T and the integral of the divergence."""
    return flow.model.prior_for(points).log_prob(out[:, :-1]) + out[:, -1]


if __name__ == "__main__":
    main()
