"""Posteriors of two simulators from simulations alone, beside the exact ones.

A network learns the score of the parameters θ given the observation y from pairs (θ, y) that a simulator makes. Every
new y then has its posterior, without further training or simulations (neural posterior score estimation, arXiv
2209.14249). Both simulators here have a known posterior:

* a linear Gaussian one, y = A θ + noise, with 3 parameters and 3 observations. To be seen: the standard deviations,
  and the coverage of credible regions over 1,500 new observations: the 80 % region holds the true θ in 80 %.
* two moons (arXiv 1905.07488), whose posterior has two thin crescents in the box of a uniform prior. To be seen: a
  classifier cannot tell samples from exact ones (accuracy near 0.5), and how many samples leak out of the box; those
  are drawn anew.

All options are fit's defaults. `make simulation` runs it. Results go to out/simulation: posteriors.png, results.json.
With --short it learns little.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.stats import chi2
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

import sdeflow

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SDE = sdeflow.catalog.VP()
LEVELS = (0.5, 0.8, 0.9)  # of credible regions
CALLS = 20  # of the network, for a sample

A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.3, 0.0, 1.0]])
NOISE = torch.tensor([0.3, 0.5, 0.8])
PRECISION = torch.eye(3) + A.T @ torch.diag(NOISE**-2) @ A  # of the posterior, for θ ~ N(0, 1)


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    results = {"linear Gaussian": linear(args), "two moons": two_moons(args, out)}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nsaved {out}/posteriors.png, {out}/results.json")


def learned(theta: torch.Tensor, y: torch.Tensor, args: argparse.Namespace) -> tuple[sdeflow.Score, float]:
    """The score of θ given y, and the seconds of its training."""
    score = sdeflow.Score(sdeflow.nets.MLP(theta.shape[1], condition=y.shape[1]), SDE)
    started = time.perf_counter()
    sdeflow.fit(score, (theta, y), args.steps, 256, args.weighting, seed=args.seed, progress=args.progress)
    return score, time.perf_counter() - started


# ---------------------------------------------------------------------- a linear Gaussian simulator


def linear_simulations(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """θ from its prior, and y given θ."""
    random = torch.Generator().manual_seed(seed)
    theta = torch.randn(n, 3, generator=random)
    return theta, theta @ A.T + NOISE * torch.randn(n, 3, generator=random)


def linear(args: argparse.Namespace) -> dict[str, object]:
    """Standard deviations and coverage of the learned posterior, beside the exact ones."""
    score, seconds = learned(*linear_simulations(args.simulations, args.seed), args)
    theta, y = linear_simulations(args.observations, args.seed + 1)
    draws = 150
    flow = SDE.flow_ode(score.given(y.repeat_interleave(draws, 0)))
    samples = flow.sample((len(y) * draws, 3), steps=CALLS, seed=2).reshape(len(y), draws, 3)

    exact_std = torch.linalg.inv(PRECISION).diagonal().sqrt()
    ratio = (samples.std(1) / exact_std).mean(0)
    centre = y @ torch.diag(NOISE**-2) @ A @ torch.linalg.inv(PRECISION)
    exact = ((theta - centre) @ PRECISION * (theta - centre)).sum(1)
    apart = samples - samples.mean(1, keepdim=True)
    precision = torch.linalg.inv(apart.mT @ apart / (draws - 1))
    of_truth = distance(theta[:, None] - samples.mean(1, keepdim=True), precision)[:, 0]
    of_samples = distance(apart, precision)
    print(f"linear Gaussian: trained on {args.simulations:,} simulations in {seconds:.0f} s")
    print(f"  std of the posterior / the exact one: {', '.join(f'{value:.3f}' for value in ratio)}")
    found = {"std ratio": ratio.tolist(), "seconds": seconds, "coverage": {}}
    for level in LEVELS:
        covered = float((of_truth <= of_samples.quantile(level, dim=1)).float().mean())
        of_exact = float((exact <= chi2.ppf(level, 3)).float().mean())
        error = math.sqrt(level * (1 - level) / len(y))
        print(
            f"  the {level:.0%} region covers {covered:.1%}; the exact one {of_exact:.1%} (standard error {error:.1%})"
        )
        found["coverage"][f"{level:g}"] = {"learned": covered, "exact": of_exact, "stderr": error}
    return found


def distance(apart: torch.Tensor, precision: torch.Tensor) -> torch.Tensor:
    """Squared Mahalanobis distances, (observations, n), of differences (observations, n, 3)."""
    return (apart @ precision * apart).sum(2)


# ---------------------------------------------------------------------- two moons


def crescent(n: int, random: torch.Generator) -> torch.Tensor:
    """Points of one crescent, (n, 2)."""
    angle = math.pi * (torch.rand(n, generator=random) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(n, generator=random)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)


def moons_simulations(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """θ, uniform in [-1, 1]², and y = crescent + (-|θ_1 + θ_2|, θ_2 - θ_1) / √2."""
    random = torch.Generator().manual_seed(seed)
    theta = 2 * torch.rand(n, 2, generator=random) - 1
    shift = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
    return theta, crescent(n, random) + shift


def in_box(theta: torch.Tensor) -> torch.Tensor:
    """Whether θ is in the support of its prior."""
    return (theta.abs() < 1).all(1)


def moons_posterior(y: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Exact draws of θ given y: the shift of θ is y minus a crescent, its sum has either sign, and θ is in the box."""
    random, kept = torch.Generator().manual_seed(seed), torch.empty(0, 2)
    while len(kept) < n:
        shift = y - crescent(4 * n, random)
        shift = shift[shift[:, 0] < 0]
        total = -shift[:, 0] * (2 * torch.randint(2, (len(shift),), generator=random) - 1)
        theta = torch.stack([total - shift[:, 1], total + shift[:, 1]], 1) / math.sqrt(2)
        kept = torch.cat([kept, theta[in_box(theta)]])
    return kept[:n]


def two_moons(args: argparse.Namespace, out: Path) -> dict[str, object]:
    """What a classifier makes of posterior samples beside exact ones, and what leaks out of the box."""
    score, seconds = learned(*moons_simulations(args.simulations, args.seed), args)
    _, y = moons_simulations(args.classified, args.seed + 1)
    print(f"two moons: trained on {args.simulations:,} simulations in {seconds:.0f} s")
    accuracies, leaked, panels = [], [], []
    for number, observation in enumerate(y):
        flow = SDE.flow_ode(score.given(observation))
        found = flow.solve((1000, 2), steps=CALLS, seed=3, support=in_box, reject=True)
        exact = moons_posterior(observation, 1000, seed=number)
        accuracies.append(classifier_accuracy(exact, found.x, args.seed))
        leaked.append(found.leaked)
        panels.append((observation, exact, found.x))
        print(
            f"  y = ({observation[0]:+.2f}, {observation[1]:+.2f}): accuracy {accuracies[-1]:.3f}, "
            f"{found.leaked:.2%} leaked"
        )
    print(f"  accuracy of a classifier, mean: {np.mean(accuracies):.3f} (0.5: it cannot tell them apart)")
    draw(out / "posteriors.png", panels[:3])
    return {"accuracy": accuracies, "leaked": leaked, "seconds": seconds}


def classifier_accuracy(exact: torch.Tensor, samples: torch.Tensor, seed: int) -> float:
    """Held-out accuracy of a small network that tells samples from exact ones (C2ST), in five folds."""
    centre, scale = exact.mean(0), exact.std(0)
    points = ((torch.cat([exact, samples]) - centre) / scale).numpy()
    labels = np.repeat([0, 1], [len(exact), len(samples)])
    folds = KFold(5, shuffle=True, random_state=seed)
    network = MLPClassifier((20, 20), max_iter=1000, random_state=seed)
    return float(cross_val_score(network, points, labels, cv=folds).mean())


def draw(path: Path, panels: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Exact and learned posteriors of some observations."""
    plt.rcParams.update({"font.size": 9})
    figure, axes = plt.subplots(2, len(panels), figsize=(3.2 * len(panels), 6.4), layout="constrained", squeeze=False)
    for column, (observation, exact, samples) in enumerate(panels):
        low, high = exact.amin(0) - 0.1, exact.amax(0) + 0.1
        for axis, (title, points) in zip(axes[:, column], {"exact": exact, "learned": samples}.items(), strict=True):
            axis.scatter(*points.T, s=3, alpha=0.5, color="#0072B2" if title == "exact" else "#D55E00", linewidths=0)
            axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="θ₁", ylabel="θ₂")
            axis.set_title(f"{title}, y = ({observation[0]:.2f}, {observation[1]:.2f})")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="training steps of batch 256 (default %(default)s)")
    parser.add_argument("--weighting", help="of fit; by default its own")
    parser.add_argument("--simulations", type=int, default=10_000, help="of each simulator (default %(default)s)")
    parser.add_argument("--observations", type=int, default=1500, help="for the coverage (default %(default)s)")
    parser.add_argument("--classified", type=int, default=6, help="observations of two moons (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="out/simulation")
    parser.add_argument("--no-progress", dest="progress", action="store_const", const=False, default=None)
    parser.add_argument("--short", action="store_true", help="a fast run that learns little")
    args = parser.parse_args()
    if args.short:
        args.steps, args.simulations, args.observations, args.classified = 40, 500, 20, 1
    return args


if __name__ == "__main__":
    main()
