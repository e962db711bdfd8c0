"""A nonlinear SDE with no known kernel: dx = (x - x³) dt + dw, from data in one well to both.

The score is learned from simulated pairs, and everything it gives is compared with the Fokker-Planck equation solved
on a grid: the score itself, samples by the reverse SDE and by the flow, and the density that the flow computes.
Results go to out/double_well: densities.png, results.json. With --short it takes seconds, and learns little.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import matplotlib
import numpy as np
import scipy.linalg
import torch

import sdeflow
from sdeflow import SDE, x

matplotlib.use("Agg")
import matplotlib.pyplot as plt

T, MEAN, STD = 2.0, 0.3, 0.2  # data ~ N(MEAN, STD²)
TIMES = (0.02, 0.1, 0.3, 1.0, 2.0)
COLOURS = ("#0b3c5d", "#1f78a4", "#2a9d8f", "#e0a030", "#c8553d")


class FokkerPlanck:
    """∂p/∂t = -∂(f p)/∂x + ½ ∂²p/∂x² by Chang & Cooper's scheme (1970), exact in time by an eigenbasis of its cells."""

    def __init__(self, cells: int = 1200, reach: float = 3.2) -> None:
        edges = np.linspace(-reach, reach, cells + 1)
        self.x, self.h = 0.5 * (edges[1:] + edges[:-1]), edges[1] - edges[0]
        drift = edges[1:-1] - edges[1:-1] ** 3
        z = 2.0 * drift * self.h  # the Péclet number of a cell wall: f h / (g² / 2)
        share = np.where(np.abs(z) < 1e-8, 1.0 - 0.5 * z, z / np.expm1(np.where(z == 0, 1.0, z)))
        left, right = 0.5 / self.h**2 * share, 0.5 / self.h**2 * (share + z)
        # Rates right[i] from cell i to i + 1 and left[i] back: symmetric in the basis of their stationary law.
        self.root = np.exp(0.5 * np.concatenate([[0.0], np.cumsum(np.log(right / left))]))
        out = np.concatenate([right, [0.0]]) + np.concatenate([[0.0], left])
        self.rates, self.vectors = scipy.linalg.eigh_tridiagonal(-out, np.sqrt(left * right))
        start = np.exp(-0.5 * ((self.x - MEAN) / STD) ** 2) / (STD * np.sqrt(2.0 * np.pi))
        self.start = self.vectors.T @ (start / self.root)

    def density(self, t: float) -> np.ndarray:
        """p_t on the cells."""
        return self.root * (self.vectors @ (np.exp(self.rates * t) * self.start))

    def quantiles(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """The distribution function at the cells' right walls, and those walls."""
        return np.cumsum(self.density(t)) * self.h, self.x + 0.5 * self.h

    def score(self, t: float) -> np.ndarray:
        """∇ log p_t on the cells."""
        return np.gradient(np.log(np.maximum(self.density(t), 1e-300)), self.h)


class FlowNet(torch.nn.Module):
    """A score s = 2 (f - v) / g², v the network: the velocity of the flow, since dx/dt = f - ½ g² s.

    Far out, where no sample teaches anything, the cubic drift then cancels exactly; a network for s itself leaves
    a rest of it, which throws the flow to infinity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.velocity = sdeflow.nets.MLP(1, width=64, depth=2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 2.0 * (x - x**3 - self.velocity(x, t))


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    sde, truth = SDE(f=x - x**3, g=1, T=T), FokkerPlanck()
    print(sde, sde.reverse(), sde.flow_ode(), sep="\n")

    data = MEAN + STD * torch.randn(20_000, 1)
    score = sdeflow.Score(FlowNet(), sde, predicts="score", time="t")
    started = time.perf_counter()
    sdeflow.fit(score, data, args.steps, batch_size=512, lr=3e-3, seed=args.seed, progress=args.progress)
    print(f"\ntrained {args.steps} steps on simulated pairs in {time.perf_counter() - started:.0f} s")

    prior = sde.fit_prior(data, n=20_000, seed=args.seed)
    print(f"prior: {prior}")
    reverse, flow = sde.reverse(score, prior=prior), sde.flow_ode(score, prior=prior)
    by_sde = reverse.sample((args.samples, 1), steps=300, seed=1)[:, 0].numpy()
    by_flow = flow.sample((args.samples, 1), seed=1)[:, 0].numpy()

    cutoff = reverse.model.cutoff
    kept = np.abs(truth.x - MEAN) < 3.0 * STD
    points = torch.as_tensor(truth.x[kept][::8], dtype=torch.float32)[:, None]
    log_p, exact = flow.log_prob(points).numpy(), np.log(truth.density(cutoff)[kept][::8])
    exact_samples = np.interp(np.random.default_rng(0).uniform(size=args.samples), *truth.quantiles(cutoff))
    results = {
        "score, rms error over rms, in p_t": {t: score_error(score, truth, t) for t in TIMES},
        "L1 distance of samples to p_t at the cutoff": {
            name: l1(samples, truth, cutoff) for name, samples in (("reverse SDE", by_sde), ("flow", by_flow))
        },
        "L1 distance of as many exact samples": l1(exact_samples, truth, cutoff),
        "L1 distance of the simulated prior": l1(prior.sample((args.samples, 1), seed=2)[:, 0].numpy(), truth, T),
        "log p by the flow, largest error within 3 std (nats)": float(np.abs(log_p - exact).max()),
        "log p by the flow, mean error (nats)": float(np.sum((log_p - exact) * np.exp(exact)) / np.sum(np.exp(exact))),
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=2))
    print(f"\nagainst the Fokker-Planck equation on {len(truth.x)} cells (cutoff t = {cutoff:g}):")
    for name, value in results.items():
        shown = ", ".join(f"{k}: {v:.3f}" for k, v in value.items()) if isinstance(value, dict) else f"{value:.3f}"
        print(f"  {name}: {shown}")
    draw(out / "densities.png", sde, score, truth, data, (by_sde, by_flow), (points[:, 0].numpy(), log_p), cutoff)
    print(f"\npicture: {out / 'densities.png'}")


def score_error(score: sdeflow.Score, truth: FokkerPlanck, t: float) -> float:
    """The root mean square error of the learned score under p_t, relative to the score's own."""
    p, exact = truth.density(t), truth.score(t)
    with torch.no_grad():
        learned = score(torch.as_tensor(truth.x, dtype=torch.float32)[:, None], t)[:, 0].numpy()
    return float(np.sqrt(np.sum(p * (learned - exact) ** 2) / np.sum(p * exact**2)))


def l1(samples: np.ndarray, truth: FokkerPlanck, t: float, bins: int = 60) -> float:
    """∫ |histogram - p_t| dx, over bins that hold all but the last of p_t."""
    mass, walls = truth.quantiles(t)
    edges = np.linspace(*walls[np.searchsorted(mass, [1e-5, 1 - 1e-5])], bins + 1)
    exact = np.diff(np.interp(edges, walls, mass))
    counts = np.histogram(samples, edges)[0] / len(samples)
    return float(np.abs(counts - exact).sum() + abs(counts.sum() - exact.sum()))


def draw(
    path: Path,
    sde: SDE,
    score: sdeflow.Score,
    truth: FokkerPlanck,
    data: torch.Tensor,
    samples: tuple[np.ndarray, np.ndarray],
    likelihood: tuple[np.ndarray, np.ndarray],
    cutoff: float,
) -> None:
    """Densities on the way, the score, and the density that comes back."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (forward, scores, back) = plt.subplots(1, 3, figsize=(13.5, 4.0), layout="constrained")
    simulated = sde.simulate(data, TIMES, steps=400, seed=3)[..., 0].numpy()
    for t, colour, paths in zip(TIMES, COLOURS, simulated, strict=True):
        p, exact = truth.density(t), truth.score(t)
        shown = p > 1e-3 * p.max()
        forward.hist(paths, 90, range=(-2.4, 2.4), density=True, color=colour, alpha=0.25)
        forward.plot(truth.x, p, color=colour, lw=1.5, label=f"t = {t:g}")
        with torch.no_grad():
            learned = score(torch.as_tensor(truth.x, dtype=torch.float32)[:, None], t)[:, 0].numpy()
        scores.plot(truth.x[shown], exact[shown], color=colour, lw=3.5, alpha=0.35)
        scores.plot(truth.x[shown], learned[shown], color=colour, lw=1.2)
    forward.set(xlim=(-2.4, 2.4), xlabel="x", title="p(x, t): Fokker-Planck (lines), simulated (bars)")
    forward.legend(frameon=False)
    scores.plot([], [], color="gray", lw=3.5, alpha=0.35, label="exact")
    scores.plot([], [], color="gray", lw=1.2, label="learned")
    scores.axhline(0.0, color="gray", lw=0.5)
    scores.set(xlim=(-2.4, 2.4), ylim=(-14, 14), xlabel="x", title="the score ∇ log p(x, t), where p > 10⁻³ max p")
    scores.legend(frameon=False)
    for values, colour, name in zip(samples, (COLOURS[1], COLOURS[3]), ("reverse SDE", "flow"), strict=True):
        back.hist(values, 70, range=(-0.7, 1.3), density=True, color=colour, alpha=0.4, label=f"samples, {name}")
    back.plot(truth.x, truth.density(cutoff), color="black", lw=1.5, label=f"exact, t = {cutoff:g}")
    back.plot(likelihood[0], np.exp(likelihood[1]), "o", ms=3, color=COLOURS[4], label="exp(flow.log_prob)")
    back.set(xlim=(-0.7, 1.3), ylim=(0, 3.1), xlabel="x", title="back from t = T to the data")
    back.legend(frameon=False)
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3500, help="training steps (default: 3500)")
    parser.add_argument("--samples", type=int, default=10_000, help="samples by each solver (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="out/double_well")
    parser.add_argument("--progress", action="store_true", default=None, help="show progress bars")
    parser.add_argument("--short", action="store_true", help="a few seconds: 200 steps, 2000 samples")
    args = parser.parse_args()
    if args.short:
        args.steps, args.samples = 200, 2000
    return args


if __name__ == "__main__":
    main()
