"""One digits model at 5, 8, 12, 20 and 50 calls: our default beside DDIM, DPM-Solver++(2M) and Euler-Maruyama.

Every method starts from the same noise. The flow's methods share one solution, to which their distance is printed; how
close samples are to digits is measured for all by the distance to the nearest training image.
`make few-calls` runs it with the model that `make demo` trained, or trains it. Results go to out/few_calls.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import digits
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from sdeflow.solvers import Exponential

CALLS = (5, 8, 12, 20, 50)
METHODS = {
    "ours, default": ("flow", None, None),
    "ours, pilot grid": ("flow", None, "pilot"),
    "DPM-Solver++(2M)": ("flow", "dpmpp2m", None),
    "DDIM": ("flow", "ddim", None),
    "ours, reverse SDE": ("reverse", None, None),
    "Euler-Maruyama": ("reverse", "euler", None),
}


def main() -> None:
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    images = torch.as_tensor(load_digits().images).long()[:, None]
    train = images[: digits.TRAIN]
    sde, score = digits.declared()
    digits.fit(score, train, args.steps, 0, Path(args.model) / "checkpoints", resume=True)
    equations = {"flow": sde.flow_ode(score), "reverse": sde.reverse(score)}
    shape = (args.samples, 1, 8, 8)
    truth = equations["flow"].sample(shape, Exponential(4), 200, seed=1, progress=True)
    known = digits.scaled(train)
    unseen = nearest(digits.scaled(images[digits.TRAIN :]), known)
    print(f"to the nearest training image: converged flow {nearest(truth, known):.3f}, test images {unseen:.3f}\n")
    pictures, table = {}, {}
    print(f"{'rms to the converged flow / nearest training image':52s}" + "".join(f"{n:>16d}" for n in CALLS))
    for name, (kind, solver, grid) in METHODS.items():
        pictures[name] = [
            equations[kind].sample(shape, solver, calls, seed=1, **({"grid": grid} if grid else {})) for calls in CALLS
        ]
        table[name] = [row(batch, truth, known, kind) for batch in pictures[name]]
        print(f"{name:52s}" + "".join(f"{r['rms']:8.4f} /{r['nearest']:6.3f}" for r in table[name]))
    save(out / "few_calls.png", pictures, truth)
    (out / "results.json").write_text(json.dumps({"calls": CALLS, "methods": table}, indent=1) + "\n")
    print(f"\nsaved {out}/few_calls.png, {out}/results.json")


def row(batch: torch.Tensor, truth: torch.Tensor, known: torch.Tensor, kind: str) -> dict[str, float]:
    """The root mean square distance to the flow's solution, which noise makes meaningless, and to the nearest digit."""
    rms = float((batch - truth).square().mean().sqrt()) if kind == "flow" else float("nan")
    return {"rms": rms, "nearest": nearest(batch, known)}


def nearest(batch: torch.Tensor, known: torch.Tensor) -> float:
    """The mean over images of the root mean square distance to the nearest known one."""
    return float(torch.cdist(batch.flatten(1), known.flatten(1)).amin(1).mean() / 8.0)


def save(path: Path, pictures: dict[str, list[torch.Tensor]], truth: torch.Tensor) -> None:
    columns = len(CALLS) + 1
    figure, axes = plt.subplots(len(pictures), columns, figsize=(2.3 * columns, 1.35 * len(pictures) + 0.4))
    for i, (name, batches) in enumerate(pictures.items()):
        last = truth if METHODS[name][0] == "flow" else None  # noise leads elsewhere
        for axis, batch, calls in zip(axes[i], [*batches, last], [*CALLS, None], strict=True):
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_title("converged flow" if calls is None else f"{calls} calls", fontsize=10)
            if batch is None:
                axis.set_axis_off()
            else:
                axis.imshow(digits.tiled(batch[:8], 4), cmap="gray_r", vmin=digits.LOW, vmax=digits.HIGH)
        axes[i, 0].set_ylabel(name.replace(", ", ",\n"), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the model (default %(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="samples for the figures (default %(default)s)")
    parser.add_argument("--model", default="out/digits", help="where make demo left its model (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--out", default="out/few_calls", help="where results go (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
