"""log p of images that are no digits, under a model of digits: what the likelihood tells apart, and what it does not.

Bits per dimension of scikit-learn's held-out digits beside those of other 8x8 images, and for each kind the AUROC: the
probability that a held-out digit is more likely than one of them (1: told apart, 0.5: not at all, below: the wrong way
round). To be seen: noise, shuffled pixels, inverted, faded and evenly grey images take more bits than any digit does,
mirrored digits more than most. But simple images do not: one vertical bar is more likely than the average digit, and
a blank page or half a digit nearly as likely, since log p tells how well pixels are predicted, and not whether they
make a digit.
`make ood` runs it with the model that `make demo` trained, or trains it. Results go to out/out_of_distribution:
out_of_distribution.png, results.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import digits
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from tqdm import tqdm

HELD_OUT = "held-out digits"


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    images = torch.as_tensor(load_digits().images).long()[:, None]
    train, test = images[: digits.TRAIN], images[digits.TRAIN :]
    sde, score = digits.declared()
    digits.fit(score, train, args.steps, 0, Path(args.model) / "checkpoints", resume=True)
    flow = sde.flow_ode(score)
    kinds = {HELD_OUT: test[: args.images], "training digits": train[: args.images], **strangers(test[: args.images])}
    found = {
        name: flow.bits_per_dim(
            batch, levels=digits.LEVELS, low=digits.LOW, high=digits.HIGH, trace="hadamard", probes=args.probes,
            steps=args.calls, grid="pilot", seed=seed, full=True,
        )
        for seed, (name, batch) in enumerate(tqdm(kinds.items(), desc="likelihood"))
    }  # fmt: skip
    bits = {name: of_kind.value for name, of_kind in found.items()}
    median = bits[HELD_OUT].median()
    rows = {
        name: {
            "bits": float(values.mean()), "stderr": digits.standard_error(values), "std": float(values.std()),
            "auroc": auroc(bits[HELD_OUT], values), "above_median": float((values < median).double().mean()),
            "trace_stderr": float(found[name].stderr.mean()), "solver_error": float(found[name].solver_error.mean()),
        }
        for name, values in bits.items()
    }  # fmt: skip
    print(f"\n{args.images} images of each kind, 17 grey levels; log p by the flow in {found[HELD_OUT].nfe} calls")
    print(f"{'':24s}{'bits per dimension':>20s}{'AUROC':>9s}   likelier than the median digit")
    for name, row in rows.items():
        shown = "" if name == HELD_OUT else f"{row['auroc']:9.3f}{row['above_median']:12.0%}"
        print(f"{name:24s}{row['bits']:12.3f} ± {row['stderr']:.3f}{shown}")
    worst = max(rows.values(), key=lambda row: row["solver_error"])
    print("the AUROC is against held-out digits; of training digits it shows how much was learned by heart")
    print(
        f"errors of one image's bits, held-out: trace {rows[HELD_OUT]['trace_stderr']:.3f}, solver less than"
        f" {rows[HELD_OUT]['solver_error']:.3f}; the largest of a kind {worst['solver_error']:.2f}"
    )
    results = {"images": args.images, "calls": found[HELD_OUT].nfe, "probes": args.probes, "kinds": rows}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(out / "out_of_distribution.png", kinds, bits, rows)
    print(f"\nsaved {out}/out_of_distribution.png, {out}/results.json")


def strangers(held_out: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images of 17 grey levels that are no digits, as many of each kind as are given."""
    n, random = len(held_out), torch.Generator().manual_seed(seed)
    order = torch.rand(n, 64, generator=random).argsort(1)  # another for each image
    grey = torch.randint(1, digits.LEVELS, (n, 1, 1, 1), generator=random)
    column = torch.randint(3, 5, (n, 1, 1, 1), generator=random)
    black = digits.LEVELS - 1
    return {
        "left half of a digit": torch.cat([held_out[..., :4], torch.zeros_like(held_out[..., 4:])], dim=-1),
        "mirrored digits": held_out.flip(-1),
        "one vertical bar": black * (torch.arange(8) == column).long().expand(held_out.shape).clone(),
        "blank, k = 0": torch.zeros_like(held_out),
        "faded, k // 2": held_out // 2,
        "evenly grey, k > 0": grey.expand(held_out.shape).clone(),
        "pixels shuffled": held_out.flatten(1).gather(1, order).reshape(held_out.shape),
        "uniform noise": torch.randint(digits.LEVELS, held_out.shape, generator=random),
        "inverted, 16 - k": black - held_out,
    }


def auroc(of_digits: torch.Tensor, of_others: torch.Tensor) -> float:
    """The probability that a digit takes fewer bits than one of the others, ties counting half, by ranks."""
    n, m = len(of_digits), len(of_others)
    above = rankdata(torch.cat([of_others, of_digits]).numpy())[:m].sum() - m * (m + 1) / 2
    return float(above / (n * m))


def draw(path: Path, kinds: dict[str, torch.Tensor], bits: dict[str, torch.Tensor], rows: dict[str, dict]) -> None:
    """Of each kind some images, and the histogram of its bits in front of the held-out digits'."""
    plt.rcParams.update({"font.size": 9})
    figure, axes = plt.subplots(
        len(kinds), 2, figsize=(9.5, 0.72 * len(kinds) + 0.6), width_ratios=(1, 2.1), layout="constrained"
    )
    largest = float(torch.cat(list(bits.values())).max())
    bins = np.geomspace(float(torch.cat(list(bits.values())).min()) * 0.97, largest * 1.03, 70)
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16) if bins[0] <= tick <= bins[-1]]
    for (shown, axis), (name, batch) in zip(axes, kinds.items(), strict=True):
        shown.imshow(digits.tiled(digits.scaled(batch[:8]), 8), cmap="gray_r", vmin=digits.LOW, vmax=digits.HIGH)
        shown.set(xticks=[], yticks=[])
        shown.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.hist(bits[HELD_OUT], bins, color="0.8")
        if name != HELD_OUT:
            axis.hist(bits[name], bins, color="#1f78a4", alpha=0.8)
            axis.text(1.01, 0.4, f"AUROC {rows[name]['auroc']:.3f}", transform=axis.transAxes, va="center")
        axis.set(xscale="log", xlim=(bins[0], bins[-1]), yticks=[])
        axis.minorticks_off()
        axis.set_xticks(ticks, map(str, ticks) if axis is axes[-1, 1] else [""] * len(ticks))
        axis.spines[["top", "left", "right"]].set_visible(False)
    axes[0, 1].set_title("grey: held-out digits; blue: images of this row", fontsize=9)
    axes[-1, 1].set_xlabel("bits per dimension (left: more likely)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the model (default %(default)s)")
    parser.add_argument("--images", type=int, default=128, help="of each kind, up to 360 (default %(default)s)")
    parser.add_argument("--calls", type=int, default=24, help="of the network, for each image (default %(default)s)")
    parser.add_argument("--probes", type=int, default=8, help="trace probes at each call (default %(default)s)")
    parser.add_argument("--model", default="out/digits", help="where make demo left its model (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--out", default="out/out_of_distribution", help="where results go (default %(default)s)")
    parser.add_argument("--short", action="store_true", help="half a minute: 60 training steps, 8 images of each kind")
    args = parser.parse_args()
    if args.short:
        args.steps, args.images, args.calls, args.probes = 60, 8, 10, 2
        args.model = args.out if args.model == parser.get_default("model") else args.model
    return args


if __name__ == "__main__":
    main()
