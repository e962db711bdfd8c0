"""Classes of digits with classifier-free guidance of strength 1, 2 and 4.

A U-Net learns the score of scikit-learn's 8x8 digits given their label. In a tenth of the samples the label is
dropped, so that it learns the score without a label too, and ``score.guided(y, strength)`` joins the two (arXiv
2207.12598). To be seen: with more strength the digits become clearer and more alike. A classifier that was trained
on the real digits agrees with the label more often, and the spread of the samples falls: strength 1 is the learned
law, more is not.

`make guidance` runs it. Results go to out/guidance: guidance.png, results.json. With --short it learns little.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import sdeflow

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STRENGTHS = (1.0, 2.0, 4.0)
TRAIN = 1437  # the first images train, the other 360 test


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    digits = load_digits()
    images = torch.as_tensor(digits.images).float()[:, None] / 8 - 1  # grey levels 0 to 16 in [-1, 1]
    labels = torch.as_tensor(digits.target)

    sde = sdeflow.catalog.VP()
    net = sdeflow.nets.UNet(1, width=32, multipliers=(1, 2), attention=(-1,), classes=10, dropout=0.1)
    score = sdeflow.Score(net, sde)
    print(f"training {sum(p.numel() for p in net.parameters()):,} parameters for {args.steps} steps")
    started = time.perf_counter()
    sdeflow.fit(
        score, (images[:TRAIN], labels[:TRAIN]), args.steps, batch_size=64, lr=2e-3, weighting="score",
        label_dropout=0.1, seed=args.seed, out=out / f"model-{args.steps}", resume=True,
        checkpoint_every=args.steps, progress=args.progress,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    print(f"trained in {seconds:.0f} s\n")

    judge = SVC(gamma=0.05, C=10.0).fit(images[:TRAIN].flatten(1), labels[:TRAIN])
    real, wanted = images[TRAIN:], labels[TRAIN:]
    rows = {"test images": told(judge, real, wanted)}
    y = torch.arange(10).repeat_interleave(args.samples)
    drawn = {}
    for strength in STRENGTHS:
        flow = sde.flow_ode(score.guided(y, strength=strength))
        drawn[strength] = flow.sample((len(y), 1, 8, 8), steps=args.calls, seed=1)
        rows[f"strength {strength:g}"] = told(judge, drawn[strength], y)
    print(f"{'':16s}{'classifier agrees':>19s}{'spread in a class':>19s}")
    for name, row in rows.items():
        print(f"{name:16s}{row['agrees']:19.1%}{row['spread']:19.3f}")
    draw(out / "guidance.png", drawn, args.samples)
    (out / "results.json").write_text(json.dumps({"rows": rows, "seconds": seconds}, indent=1) + "\n")
    print(f"\nsaved {out}/guidance.png, {out}/results.json")


def told(judge: SVC, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """How often the classifier sees the label, and the root mean square distance of images from their class's mean."""
    seen = torch.as_tensor(judge.predict(images.flatten(1).clamp(-1, 1)))
    apart = [images[labels == label] - images[labels == label].mean(0) for label in range(10)]
    spread = torch.cat(apart).square().mean().sqrt()
    return {"agrees": float((seen == labels).double().mean()), "spread": float(spread)}


def draw(path: Path, drawn: dict[float, torch.Tensor], samples: int) -> None:
    """Ten of each class in a row, a panel for each strength."""
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.0 * len(drawn), 4.3), layout="constrained")
    shown = min(samples, 10)
    for axis, (strength, images) in zip(axes, drawn.items(), strict=True):
        grid = images.reshape(10, samples, 8, 8)[:, :shown].clamp(-1, 1)
        grid = torch.nn.functional.pad(grid, (0, 1, 0, 1), value=1.0)
        axis.imshow(grid.permute(0, 2, 1, 3).reshape(90, 9 * shown), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(f"strength {strength:g}")
        axis.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500, help="training steps of batch 64 (default %(default)s)")
    parser.add_argument("--samples", type=int, default=50, help="of each class and strength (default %(default)s)")
    parser.add_argument("--calls", type=int, default=20, help="of the score in a solve (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="out/guidance")
    parser.add_argument("--no-progress", dest="progress", action="store_const", const=False, default=None)
    parser.add_argument("--short", action="store_true", help="a fast run that learns little")
    args = parser.parse_args()
    if args.short:
        args.steps, args.samples, args.calls = 30, 10, 6
    return args


if __name__ == "__main__":
    main()
