"""Trains on scikit-learn's 8x8 digits: samples, the way from noise to digit, and bits per dimension.

Everything follows from the two lines that declare the SDE. `make demo` runs it; flags are in --help.
Results go to out/digits: samples.png, path.png, results.json, checkpoints/.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import matplotlib
import numpy as np
import sympy as sp
import torch
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

import sdeflow
from sdeflow import SDE, t, x

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEVELS, LOW, HIGH = 17, -1.0, 1.0  # grey level k stands for [LOW + (HIGH - LOW) k / 17, ... (k + 1) / 17)
TRAIN = 1437  # the first images train, the other 360 test


class Dequantised(torch.utils.data.Dataset):
    """Images as x = LOW + (HIGH - LOW) (k + u) / levels, with a fresh u ~ U(0, 1) at every look."""

    def __init__(self, images: torch.Tensor, levels: int = LEVELS) -> None:
        self.images, self.levels = images, levels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        k = self.images[indices]
        return list(LOW + (HIGH - LOW) * (k + torch.rand(k.shape)) / self.levels)


def declared() -> tuple[SDE, sdeflow.Score]:
    """The SDE and a network bound to it."""
    beta = sp.Rational(1, 10) + sp.Rational(199, 10) * t
    sde = SDE(f=-beta * x / 2, g=sp.sqrt(beta))
    net = sdeflow.nets.UNet(1, width=32, multipliers=(1, 2), blocks=1, attention=(-1,), dropout=0.1)
    return sde, sdeflow.Score(net, sde, predicts="edm")


def fit(
    score: sdeflow.Score, train: torch.Tensor, steps: int, seed: int, out: Path, resume: bool
) -> sdeflow.training.fit.Fit:
    """Trains on integer images, with checkpoints in ``out``."""
    return sdeflow.fit(
        score, Dequantised(train), steps, batch_size=64, lr=2e-3, seed=seed, out=out, resume=resume, progress=True
    )


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    images = torch.as_tensor(load_digits().images).long()[:, None]
    train, test = images[:TRAIN], images[TRAIN : TRAIN + args.test_images]

    sde, score = declared()
    print(sde, sde.kernel, sde.reverse(), sde.flow_ode(), sep="\n")
    print(f"\ntraining {sum(p.numel() for p in score.net.parameters()):,} parameters for {args.steps} steps")
    if not args.resume:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    started = time.perf_counter()
    fitted = fit(score, train, args.steps, args.seed, out / "checkpoints", args.resume)
    seconds = time.perf_counter() - started
    loss = f", loss {np.nanmean(fitted.losses[-200:]):.4f}" if fitted.losses else ""
    print(f"trained in {seconds:.0f} s{loss}")

    reverse, flow = sde.reverse(score), sde.flow_ode(score)
    shape = (args.samples, 1, 8, 8)
    by_sde = reverse.sample(shape, solver="euler", steps=args.solver_steps, seed=1, progress=True)
    by_flow = flow.sample(shape, seed=1, progress=True)
    real = scaled(test[: args.samples])
    save_samples(out / "samples.png", {"reverse SDE": by_sde, "probability flow": by_flow, "test images": real})
    save_path(out / "path.png", sde, score, seed=1)

    print(f"\nbits per dimension of {len(test)} test images, {LEVELS} grey levels:")
    bits = [
        flow.bits_per_dim(
            part, levels=LEVELS, low=LOW, high=HIGH, probes=args.probes, solver="rk4", steps=24, seed=2, full=True
        )
        for part in tqdm(test.split(64), desc="likelihood")
    ]
    ours = torch.cat([b.value for b in bits])
    trace_error = float(torch.cat([b.stderr for b in bits]).square().sum().sqrt()) / len(ours)
    solver_error = float(torch.cat([b.solver_error for b in bits]).mean())
    rows = {"sdeflow": (float(ours.mean()), standard_error(ours)), **baselines(train, test, args.seed)}
    for name, (mean, error) in rows.items():
        print(f"  {name:28s} {mean:.3f} ± {error:.3f}")
    print(f"  (of ours, the trace's estimate contributes {trace_error:.4f}, the solver less than {solver_error:.1e})")
    results = {
        "bits_per_dim": {name: {"mean": mean, "stderr": error} for name, (mean, error) in rows.items()},
        "trace_stderr": trace_error, "solver_error": solver_error, "calls": bits[0].nfe, "training_seconds": seconds,
        "steps": args.steps, "test_images": len(test),
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nsaved {out}/samples.png, {out}/path.png, {out}/results.json")


def baselines(train: torch.Tensor, test: torch.Tensor, seed: int) -> dict[str, tuple[float, float]]:
    """Bits per dimension of a full-covariance Gaussian and of the best diagonal mixture on the same data."""
    rng = np.random.default_rng(seed)
    k = train.flatten(1).numpy()
    points = np.concatenate([(k + rng.random(k.shape)) for _ in range(8)])
    held_out = test.flatten(1).numpy() + rng.random(test.flatten(1).shape)
    full = GaussianMixture(1, covariance_type="full", random_state=seed).fit(points)
    diagonal = [
        GaussianMixture(n, covariance_type="diag", random_state=seed, reg_covar=1e-3).fit(points)
        for n in tqdm((20, 40, 80, 120), desc="mixtures", leave=False)
    ]
    best = max(diagonal, key=lambda mixture: mixture.score(held_out))  # chosen on the test set, in its favour
    found = {}
    for name, model in (("full-covariance Gaussian", full), (f"diagonal mixture of {best.n_components}", best)):
        bits = torch.as_tensor(-model.score_samples(held_out) / (64 * math.log(2)))  # unit spacing of grey levels
        found[name] = (float(bits.mean()), standard_error(bits))
    return found


def standard_error(values: torch.Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def scaled(images: torch.Tensor) -> torch.Tensor:
    return LOW + (HIGH - LOW) * (images + 0.5) / LEVELS


def save_samples(path: Path, grids: dict[str, torch.Tensor]) -> None:
    figure, axes = plt.subplots(1, len(grids), figsize=(4 * len(grids), 4.3))
    for axis, (title, batch) in zip(axes, grids.items(), strict=True):
        axis.imshow(tiled(batch, 8), cmap="gray_r", vmin=LOW, vmax=HIGH)
        axis.set_title(title)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_path(path: Path, sde: SDE, score: sdeflow.Score, seed: int) -> None:
    """The flow from noise to digit: x_t above, and what the score makes of it, E[x_0 | x_t], below."""
    noise = sde.prior_for(score.data_mean, score.data_std).sample((8, 1, 8, 8), seed=seed)
    levels = torch.linspace(
        float(sde.kernel.half_log_snr(sde.T)), float(sde.kernel.half_log_snr(sde.cutoff)), 9, dtype=torch.float64
    )
    times = sde.kernel.time_of(levels)
    states = [(sde.T, noise)]
    for start, stop in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        part = SDE(sde.declaration.f, sde.declaration.g, T=start, cutoff=stop)
        states.append(
            (stop, part.flow_ode(lambda x_t, time: score(x_t, time)).decode(states[-1][1], rtol=1e-4, atol=1e-4))
        )
    figure, axes = plt.subplots(2, len(states), figsize=(1.5 * len(states), 6.2))
    with torch.no_grad():
        for column, (time_, state) in zip(axes.T, states, strict=True):
            alpha, sigma, _ = sde.kernel.coefficients(torch.tensor(time_, dtype=torch.float64))
            edge = float((alpha**2 + 4 * sigma**2).sqrt())  # HIGH for data, two standard deviations for noise
            column[0].imshow(tiled(state, 2, -edge), cmap="gray_r", vmin=-edge, vmax=edge)
            column[0].set_title(f"t = {time_:.2g}", fontsize=9)
            column[1].imshow(tiled(score.denoise(state, time_), 2), cmap="gray_r", vmin=LOW, vmax=HIGH)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle("probability flow: x_t (above) and E[x_0 | x_t] (below)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tiled(batch: torch.Tensor, columns: int, background: float = LOW) -> np.ndarray:
    """A grid of images with one pixel of background between them."""
    batch = batch[: len(batch) // columns * columns, 0]
    padded = torch.nn.functional.pad(batch, (0, 1, 0, 1), value=background)
    rows = padded.reshape(-1, columns, *padded.shape[1:]).permute(0, 2, 1, 3)
    return rows.reshape(-1, columns * padded.shape[-1]).numpy()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps of batch 64 (default %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="images in each grid (default %(default)s)")
    parser.add_argument("--solver-steps", type=int, default=500, help="steps of the reverse SDE (default %(default)s)")
    parser.add_argument(
        "--test-images", type=int, default=128, help="for the likelihood, up to 360 (default %(default)s)"
    )
    parser.add_argument("--probes", type=int, default=4, help="trace probes per image (default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, times and noise (default %(default)s)")
    parser.add_argument("--out", default="out/digits", help="where results go (default %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    return args


if __name__ == "__main__":
    main()
