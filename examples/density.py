"""A learned density in the plane beside the true one: log p by the probability flow, point by point.

The data are a pinwheel: a mixture of Gaussians, so that its density, diffused to the SDE's cutoff, is known exactly.
A small network learns the score from samples alone, and ``flow.log_prob`` integrates the density of what it learned on
a grid. To be seen: the learned density is normalised (its integral over the grid is 1, which nothing in the training
asked for), it has the arms where they are, and log p is off most at their tips and edges, where there were few data.
`make density` runs it. Results go to out/density: density.png, results.json. With --short it learns little.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import matplotlib
import sympy as sp
import torch

import sdeflow
from sdeflow import SDE, t, x

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ARMS, LINKS, REACH = 5, 9, 3.6  # arms of LINKS Gaussians each; the grid covers [-REACH, REACH]²
SHOWN = 1e-3  # log p is compared where the true density is above this part of its maximum


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    beta = sp.Rational(1, 10) + sp.Rational(199, 10) * t
    sde = SDE(f=-beta * x / 2, g=sp.sqrt(beta))
    truth = pinwheel(sde)
    score = sdeflow.Score(sdeflow.nets.MLP(2), sde, predicts="edm")
    started = time.perf_counter()
    sdeflow.fit(
        score, truth.sample(args.data, seed=1), args.steps, batch_size=256, lr=1e-3, seed=args.seed,
        out=out / f"model-{args.steps}", resume=True, checkpoint_every=args.steps, progress=args.progress,
    )  # fmt: skip
    trained = time.perf_counter() - started
    print(f"{sde}\ntrained {args.steps} steps on {args.data:,} samples in {trained:.0f} s\n")

    flow = sde.flow_ode(score)
    held_out = sde.kernel.sample(truth.sample(args.held_out, seed=2), sde.cutoff, seed=3)  # p at the cutoff, exactly
    points, cell = square(args.grid)
    started = time.perf_counter()
    on_grid, on_data = (
        flow.log_prob(part, steps=args.calls, grid="pilot", full=True, progress=args.progress)
        for part in (points, held_out)
    )
    measured = time.perf_counter() - started
    exact_grid, exact_data = (truth.log_prob(part, sde.cutoff) for part in (points, held_out))
    results = {
        "integral over the grid": {
            "truth": float(exact_grid.exp().sum() * cell), "learned": float(on_grid.value.exp().sum() * cell)
        },
        "held-out log p": {
            "truth": mean_and_error(exact_data), "learned": mean_and_error(on_data.value),
            "truth - learned": mean_and_error(exact_data - on_data.value),
        },
        "solver error": {
            "grid": float(on_grid.solver_error.mean()), "held-out": float(on_data.solver_error.mean()),
            "held-out, largest": float(on_data.solver_error.max()),
        },
        "calls": on_grid.nfe,
        "seconds": {"training": trained, "log p": measured},
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{'':42s}{'truth':>18s}{'learned':>18s}")
    integrals = "".join(f"{value:18.5f}" for value in results["integral over the grid"].values())
    print(f"{f'integral of p over {args.grid} x {args.grid} cells':42s}{integrals}")
    means = [f"{row['mean']:.3f} ± {row['stderr']:.3f}" for row in results["held-out log p"].values()]
    print(f"{f'mean log p of {args.held_out} held-out points, nats':42s}{means[0]:>18s}{means[1]:>18s}")
    print(f"{'  their difference, KL(truth || learned)':42s}{means[2]:>36s}")
    mean, largest = results["solver error"]["held-out"], results["solver error"]["held-out, largest"]
    print(
        f"log p of {len(points) + len(held_out):,} points in {on_grid.nfe} calls, {measured:.0f} s; "
        f"solver error of a held-out point less than {mean:.1e} nats in the mean, {largest:.1e} at most"
    )
    draw(out / "density.png", exact_grid, on_grid.value, args.grid)
    print(f"\nsaved {out}/density.png, {out}/results.json")


def pinwheel(sde: SDE) -> sdeflow.scores.GaussianMixture:
    """Arms that curl outwards, each a chain of Gaussians that lie along it and fade."""
    radius = torch.linspace(0.35, 2.35, LINKS, dtype=torch.float64).repeat(ARMS)
    turn = torch.arange(ARMS, dtype=torch.float64).repeat_interleave(LINKS) * 2.0 * math.pi / ARMS + 0.75 * radius
    means = torch.stack([radius * turn.cos(), radius * turn.sin()], dim=1)
    along = turn + torch.atan(0.75 * radius)  # of the arm at r: d(r e^{i turn})/dr
    axes = torch.stack([along.cos(), along.sin(), -along.sin(), along.cos()], dim=1).reshape(-1, 2, 2)  # rows
    lengths = torch.stack([0.16 * (1 + (0.75 * radius).square()).sqrt(), 0.05 + 0.05 * radius], dim=1)
    covariances = axes.mT @ torch.diag_embed(lengths.square()) @ axes
    return sdeflow.scores.GaussianMixture(
        sde, means, covariances, weights=lengths.prod(1) * (-0.5 * radius).exp(), full=True
    )


def square(n: int) -> tuple[torch.Tensor, float]:
    """The centres of n x n cells, (n², 2), and the area of a cell."""
    centres = (torch.arange(n) + 0.5) / n * 2.0 * REACH - REACH
    return torch.cartesian_prod(centres, centres), (2.0 * REACH / n) ** 2


def mean_and_error(values: torch.Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "stderr": float(values.std() / math.sqrt(len(values)))}


def draw(path: Path, exact: torch.Tensor, learned: torch.Tensor, n: int) -> None:
    plt.rcParams.update({"font.size": 9})
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.3), layout="constrained")
    square = {"origin": "lower", "extent": (-REACH, REACH, -REACH, REACH)}
    panels = {"truth: p(x)": exact, "learned: exp(flow.log_prob(x))": learned}
    for axis, (title, log_p) in zip(axes, panels.items(), strict=False):
        density = log_p.exp().reshape(n, n).mT
        picture = axis.imshow(density, cmap="magma", vmin=0.0, vmax=float(exact.exp().max()), **square)
        axis.set_title(title)
    figure.colorbar(picture, ax=axes[:2], label="density", shrink=0.9)
    difference = torch.where(exact > exact.max() + math.log(SHOWN), learned - exact, math.nan)
    picture = axes[2].imshow(difference.reshape(n, n).mT, cmap="RdBu_r", vmin=-1.0, vmax=1.0, **square)
    axes[2].set_facecolor("0.85")
    axes[2].set_title(f"log p, learned - true\n(grey: true p below {SHOWN:g} of its maximum)")
    figure.colorbar(picture, ax=axes[2], label="nats", shrink=0.9, extend="both")
    for axis in axes:
        axis.set(xlabel="x₁", ylabel="x₂")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="training steps of batch 256 (default %(default)s)")
    parser.add_argument("--data", type=int, default=50_000, help="training samples (default %(default)s)")
    parser.add_argument("--held-out", type=int, default=4000, help="samples for the mean log p (default %(default)s)")
    parser.add_argument("--grid", type=int, default=120, help="cells to a side (default %(default)s)")
    parser.add_argument("--calls", type=int, default=80, help="of the network for log p (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, times and noise (default %(default)s)")
    parser.add_argument("--out", default="out/density", help="where results go (default %(default)s)")
    parser.add_argument("--progress", action="store_true", default=None, help="show progress bars")
    parser.add_argument("--short", action="store_true", help="some seconds: 200 steps, a coarse grid, 200 samples")
    args = parser.parse_args()
    if args.short:
        args.steps, args.data, args.held_out, args.grid, args.calls = 200, 5000, 200, 48, 30
    return args


if __name__ == "__main__":
    main()
