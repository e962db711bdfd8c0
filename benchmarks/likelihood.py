"""Calls for an accuracy of log p: ours beside torchdiffeq's dopri5 and SciPy's RK45, with the exact trace.

Everyone integrates the same flow from the cutoff to T, with its divergence, from the same points, and ends in the same
prior. The reference is our solve in 600 steps, whose distance to dopri5 at 1e-9 is printed. The peers' solvers run as
their users write them, on log p as one more coordinate of the state: torchdiffeq with its norm over the batch, SciPy on
the whole batch as one vector, as score_sde_pytorch does.

    python benchmarks/likelihood.py [--samples 32]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import scipy.integrate
import torch
from problems import Problem, problem
from torch import Tensor

from sdeflow.solvers import Exponential

TARGETS = (0.1, 0.01, 0.001)
TOLERANCES = 10.0 ** np.arange(-1.0, -7.1, -0.25)
CALLS = (12, 15, 18, 21, 24, 27, 30, 34, 38, 42, 46, 50, 55, 60, 70, 80, 90, 100, 120, 150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=32, help="points for each problem (default %(default)s)")
    samples = parser.parse_args().samples
    torch.set_num_threads(1)
    print("calls for an RMS error of log p of " + " / ".join(f"{target:g}" for target in TARGETS) + " nats\n")
    for law in ("g64", "ring"):
        case = problem(law, "VP")
        data = case.score.sample(samples, seed=7, dtype=torch.float64)
        points = case.sde.kernel.sample(data, case.sde.cutoff, seed=8)
        flow = case.sde.flow_ode(case.score)
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
        print()


def methods(case: Problem, points: Tensor, flow: object) -> Iterator[tuple[str, Iterator[tuple[int, Tensor]]]]:
    """Each method's name, and (calls, log p) at growing accuracy."""
    yield "torchdiffeq dopri5, in t", (by_torchdiffeq(case, points, flow, tolerance) for tolerance in TOLERANCES)
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
            v = case.by_hand.drift(t) * x - 0.5 * case.by_hand.diffusion(t) * case.score(x, float(t))
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
