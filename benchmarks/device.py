"""Checks the numbers on one GPU, then times it: sampling, log p and a training step of a U-Net of 30 M parameters.

    python benchmarks/device.py                       # about five minutes on a GPU, eight at most
    python benchmarks/device.py --tiny                # the same lines on the CPU with a tiny network, half a minute
    python benchmarks/device.py --out device.txt      # writes what it prints to a file too

The machine needs Python with torch, torchsde, torchdiffeq, sympy, numpy, scipy, safetensors, tqdm and accelerate, the
package on its path, and for the comparison diffusers (with what that imports: huggingface_hub, filelock, regex,
requests, importlib_metadata, Pillow). On a machine without a network take the wheels along; what is missing is named
and left out.

**Checks.** Each line compares the device with the CPU, from the same seeds, and prints the largest difference beside
what is allowed. The kernel and its draws, every solver, log p with each trace, its bounds, conditions, ``chunk=`` and
training are among them. In float64 only sums in another order differ, so little is allowed; in float32 the state is
rounded in other places in each step.

**Times.** The U-Net takes 32 x 32 images with 3 channels; float32 (with TF32 where the GPU has it) and bfloat16
(autocast), eager and compiled. Samplers of diffusers are given the same network and the same number of calls. A time
is the median of several runs after one for warming up, with the device waited for. ``host waits`` counts the times
that the host waits for the device in a solve, as torch's profiler sees them.

It ends with 1 if a check fails. What takes longer than the minutes that are left is named as left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import sdeflow
from sdeflow.solvers import names_for
from sdeflow.training.run import Run

SMALL = {"float32": 2e-3, "float64": 1e-9}  # allowed differences of solves
ADAPTIVE = 1e-3  # of solves that choose their steps: a rounding can change which
STEPS = 10  # of training, in a time
STEPS_OF = {"implicit_adams": 200, "fixed_adams": 200}  # whose iterations need short steps
CHECKS = 0.6  # the share of the minutes that checks may take
Comparison = tuple[str, float, Callable[[torch.device], Tensor]]
NEEDED = ("torch", "torchsde", "torchdiffeq", "sympy", "numpy", "scipy", "safetensors", "tqdm", "accelerate")


@dataclass(frozen=True)
class Size:
    """What is timed.

    Attributes:
        net: arguments of the U-Net.
        side: of the images.
        batch, log_p_batch: images of a solve.
        calls: of the network in a solve.
        repeats: of each time.
    """

    net: dict[str, object]
    side: int
    batch: int
    log_p_batch: int
    calls: int
    repeats: int


FULL = Size({"width": 136, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (1,)}, 32, 256, 32, 10, 3)
TINY = Size({"width": 8, "multipliers": (1, 2)}, 8, 4, 2, 4, 1)


def main() -> int:
    """Prints the checks and the times; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="by default the first GPU, or the CPU with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, not compiled: shows that everything runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="what it may take (default %(default)s)")
    parser.add_argument("--out", type=Path, help="a file for what it prints")
    arguments = parser.parse_args()
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cpu" and not arguments.tiny:
        parser.error("there is no GPU: --tiny runs everything on the CPU")
    warnings.simplefilter("ignore")
    report = Report(device, arguments.minutes, arguments.out)
    report(heading(device))
    failed = check(report)
    measure(report, TINY if arguments.tiny else FULL)
    report(f"\n{failed or 'no'} check{'' if failed == 1 else 's'} failed; {report.seconds:.0f} s in all")
    return 1 if failed else 0


class Report:
    """Prints lines, to a file too, and knows the time that is left."""

    def __init__(self, device: torch.device, minutes: float, out: Path | None) -> None:
        self.device, self.began, self.limit, self.out = device, time.perf_counter(), 60.0 * minutes, out
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("")

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(line + "\n")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began

    def has_time_for(self, what: str, share: float = 1.0) -> bool:
        """Whether a share of the minutes is not used up yet; else a line says what is left out."""
        if self.seconds < share * self.limit:
            return True
        self(f"{what:66s} left out: the time is up")
        return False


def heading(device: torch.device) -> str:
    """The device, and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    versions = ", ".join(f"{module} {importlib.import_module(module).__version__}" for module in ("torch", "sdeflow"))
    missing = [module for module in (*NEEDED, "diffusers") if importlib.util.find_spec(module) is None]
    return f"{name}; {versions}; Python {platform.python_version()}" + (
        f"; without {', '.join(missing)}" if missing else ""
    )


# ---------------------------------------------------------------------- checks


def check(report: Report) -> int:
    """Compares the device with the CPU, line by line; how many lines failed."""
    report(f"\n{'against the CPU, same seeds: largest difference':66s} {'difference':>11s} {'allowed':>9s}")
    failed = 0
    for name, allowed, of_device in comparisons():
        if not report.has_time_for(name, CHECKS):
            continue
        try:
            here, there = of_device(torch.device("cpu")), of_device(report.device)
            difference = largest(here, there)
        except Exception as error:  # a check that cannot run has failed, and the rest goes on
            report(f"{name:66s} {type(error).__name__}: {str(error)[:120]}  FAILED")
            failed += 1
            continue
        wrong = not difference <= allowed
        failed += wrong
        report(f"{name:66s} {difference:11.1e} {allowed:9.0e}{'  FAILED' if wrong else ''}")
    return failed


def largest(here: Tensor, there: Tensor) -> float:
    """The largest difference on the scale of each sample: |a - b| / (1 + |a|)."""
    a, b = here.detach().double().cpu(), there.detach().double().cpu()
    if a.shape != b.shape:
        return math.inf
    return float(((a - b).abs() / (1.0 + a.abs())).max())


def comparisons() -> Iterator[Comparison]:
    """Name, allowed difference, and what gives the numbers on a device."""
    yield from kernel_comparisons()
    yield from solver_comparisons()
    yield from likelihood_comparisons()
    yield from training_comparisons()


SDES: dict[str, Callable[[], sdeflow.SDE]] = {
    "VP": sdeflow.catalog.VP,
    "VE": sdeflow.catalog.VE,
    "flow matching": sdeflow.catalog.FlowMatching,
    "critically damped Langevin": sdeflow.catalog.CriticallyDampedLangevin,
}


def kernel_comparisons() -> Iterator[Comparison]:
    """Draws, moments and scores of kernels, Gaussian and not."""
    for name, make in SDES.items():
        for kind, allowed in (("float32", 1e-5), ("float64", 1e-12)):

            def numbers(device: torch.device, make: Callable[[], sdeflow.SDE] = make, kind: str = kind) -> Tensor:
                sde, dtype = make(), getattr(torch, kind)
                data = torch.linspace(-1.0, 1.0, 6, dtype=dtype).reshape(3, 2).to(device)
                data = sde.lift(data, seed=1) if sde.declaration.coupled else data
                t = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64, device=device) * sde.T
                x = sde.kernel.sample(data, t, seed=2)
                score = sde.kernel.score(x, data, t).double()
                return torch.cat([x.double(), *(part.double() for part in sde.kernel.moments(data, t)[:1]), score])

            yield f"kernel of {name}: draws, mean, score, {kind}", allowed, numbers

    def square_root(device: torch.device) -> Tensor:
        sde = sdeflow.SDE("1 - x", "sqrt(x)")
        x_0 = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64, device=device)
        x = sde.kernel.sample(x_0, 0.7, seed=3)
        return torch.cat([x, sde.kernel.score(x, x_0, 0.7)])

    yield "kernel of a square-root SDE: draws, score, float64", 1e-9, square_root


def mixture(sde: sdeflow.SDE, device: torch.device) -> sdeflow.scores.GaussianMixture:
    """An exact score on a device."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]])
    return sdeflow.scores.GaussianMixture(sde, means, torch.tensor([0.04, 0.01, 0.09])).to(device)


def solver_comparisons() -> Iterator[Comparison]:
    """Every solver by name, in both precisions; chunks; a coupled SDE."""
    vp = sdeflow.catalog.VP()
    for kind in ("ode", "sde"):
        for solver in (None, *names_for(kind)):
            adaptive = solver is not None and sdeflow.solvers.resolve(solver, kind).adaptive
            for name, allowed in SMALL.items():

                def solved(
                    device: torch.device, kind: str = kind, solver: str | None = solver, adaptive: bool = adaptive,
                    name: str = name,
                ) -> Tensor:  # fmt: skip
                    score, steps = mixture(vp, device), None if adaptive else STEPS_OF.get(str(solver), 24)
                    bound = vp.reverse(score) if kind == "sde" else vp.flow_ode(score)
                    return bound.sample((64, 2), solver, steps, seed=0, dtype=getattr(torch, name), device=device)

                what = f"{'flow' if kind == 'ode' else 'reverse SDE'}: {solver or 'default'}, {name}"
                yield what, max(allowed, ADAPTIVE) if adaptive else allowed, solved

    def chunked(device: torch.device) -> Tensor:
        chunk = None if device.type == "cpu" else 17
        bound = vp.reverse(mixture(vp, device))
        return bound.sample((64, 2), steps=12, seed=0, dtype=torch.float64, device=device, chunk=chunk)

    yield "reverse SDE: chunks on the device, none on the CPU", 1e-9, chunked

    def coupled(device: torch.device) -> Tensor:
        sde = sdeflow.catalog.CriticallyDampedLangevin()
        bound = sde.flow_ode(mixture(sde, device))
        return bound.sample((64, 2, 2), steps=20, seed=0, dtype=torch.float64, device=device)

    yield "flow of critically damped Langevin: default, float64", 1e-8, coupled


def likelihood_comparisons() -> Iterator[Comparison]:
    """log p by each route and trace, and the bounds."""
    vp = sdeflow.catalog.VP()
    points = torch.tensor([[-1.0, 0.1], [0.9, 0.4], [0.1, -1.2]], dtype=torch.float64)
    ways: dict[str, dict[str, object]] = {
        "16 steps, exact trace": {"steps": 16},
        "default": {},
        "dopri5": {"solver": "dopri5"},
        "16 steps, Hutchinson": {"steps": 16, "trace": "hutchinson", "probes": 2, "seed": 0, "warn_above": 1e9},
        "16 steps, Hadamard": {"steps": 16, "trace": "hadamard", "probes": 2, "seed": 0, "warn_above": 1e9},
    }
    for name, options in ways.items():

        def log_p(device: torch.device, options: dict[str, object] = options) -> Tensor:
            return vp.flow_ode(mixture(vp, device)).log_prob(points.to(device), **options)  # type: ignore[arg-type]

        yield f"log p: {name}, float64", 1e-9 if "steps" in options else ADAPTIVE, log_p

    def truth(device: torch.device) -> Tensor:
        exact = mixture(vp, device)
        if device.type == "cpu":
            return exact.log_prob(points, vp.cutoff)
        return vp.flow_ode(exact).log_prob(points.to(device))

    yield "log p: default on the device, the exact one on the CPU", 5e-3, truth

    def elbo(device: torch.device) -> Tensor:
        return vp.reverse(mixture(vp, device)).elbo(points.to(device), draws=16, seed=0).value

    yield "elbo, 16 draws, float64", 1e-9, elbo


def training_comparisons() -> Iterator[Comparison]:
    """Twenty steps of training, stopped and resumed in the middle too; conditions."""
    vp = sdeflow.catalog.VP()
    data = mixture(vp, torch.device("cpu")).sample(512, seed=0)

    def network(device: torch.device, **conditions: int) -> sdeflow.Score:
        torch.manual_seed(0)
        net = sdeflow.nets.MLP(2, width=32, depth=2, **conditions)
        return sdeflow.Score(net, vp, data_mean=0.0, data_std=1.0).to(device)

    def trained(device: torch.device) -> Tensor:
        run = sdeflow.fit(network(device), data, 20, batch_size=64, seed=0, progress=False)
        return torch.tensor(run.losses)

    yield "fit: losses of 20 steps, float32", 1e-4, trained

    def resumed(device: torch.device) -> Tensor:
        if device.type == "cpu":
            return trained(device)
        with tempfile.TemporaryDirectory() as folder:
            for callbacks in ([StopAt(10)], []):
                run = sdeflow.fit(
                    network(device), data, 20, batch_size=64, seed=0, progress=False, callbacks=callbacks, out=folder,
                    resume=True,
                )  # fmt: skip
        return torch.tensor(run.losses)

    yield "fit: stopped and resumed on the device", 1e-4, resumed

    def conditional(device: torch.device) -> Tensor:
        vectors = torch.linspace(-1.0, 1.0, 120, device=device).reshape(60, 2)
        y = (torch.arange(60, device=device) % 3, vectors)
        score = network(device, classes=3, condition=2)
        for parameter in score.parameters():  # a network whose last layer is zero would compare nothing
            parameter.data += 0.05 * torch.sin(torch.arange(parameter.numel()).float()).reshape(parameter.shape).to(
                device
            )
        return vp.flow_ode(score.given(y)).sample((60, 2), steps=8, seed=0)

    yield "a network with labels and vectors: 8 steps, float32", 2e-3, conditional


class StopAt:
    """A callback that ends a run at a step: a checkpoint is written, and fit returns."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, run: Run, loss: float) -> None:
        """Stops the run at its step."""
        if run.step >= self.step:
            run.stop()


# ---------------------------------------------------------------------- times


def measure(report: Report, size: Size) -> None:
    """Times of sampling, log p and training, in both precisions, eager and compiled."""
    net = sdeflow.nets.UNet(3, **size.net).to(report.device)
    count = sum(parameter.numel() for parameter in net.parameters())
    report(
        f"\nU-Net of {count / 1e6:.1f} M parameters, {size.side} x {size.side} x 3, {size.calls} calls of it in a solve"
    )
    report(f"{'':66s} {'eager':>10s} {'compiled':>10s} {'images/s':>10s} {'host waits':>10s}")
    compiled = None if size is TINY else compiled_or_none(report, net, size)
    for what, of_net in measurements(report.device, size):
        for precision in ("float32", "bfloat16"):
            name = f"{what}, {precision}"
            if not report.has_time_for(name):
                continue
            found = []
            for part in (net, compiled):
                found.append(None if part is None else timed(report, of_net(part, precision), precision, size.repeats))
            report(row(name, found, size.log_p_batch if what.startswith("log p") else size.batch))
    torch.compiler.reset()


def compiled_or_none(report: Report, net: nn.Module, size: Size) -> nn.Module | None:
    """The network compiled, or None where the machine has no compiler for it."""
    compiled = torch.compile(net)
    try:
        with torch.no_grad():
            compiled(*inputs(report.device, size))
    except Exception as error:  # torch has no common error for it
        report(f"nothing is compiled here: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return None
    return compiled


def inputs(device: torch.device, size: Size) -> tuple[Tensor, Tensor]:
    """A state and its times, as the network is called."""
    x = torch.randn(size.batch, 3, size.side, size.side, device=device)
    return x, torch.zeros(size.batch, device=device)


def measurements(
    device: torch.device, size: Size
) -> Iterator[tuple[str, Callable[[nn.Module, str], Callable[[], object]]]]:
    """What is timed: a function of the network and the precision gives what runs once."""
    vp = sdeflow.catalog.VP()
    shape = (size.batch, 3, size.side, size.side)

    def score_of(net: nn.Module) -> sdeflow.Score:
        return sdeflow.Score(net, vp, predicts="noise", data_mean=0.0, data_std=0.5)

    def flow(net: nn.Module, precision: str) -> Callable[[], object]:
        bound = vp.flow_ode(score_of(net))
        return lambda: bound.sample(shape, steps=size.calls, seed=0, device=device)

    def reverse(net: nn.Module, precision: str) -> Callable[[], object]:
        bound = vp.reverse(score_of(net))
        return lambda: bound.sample(shape, steps=size.calls, seed=0, device=device)

    yield "flow_ode.sample, default solver", flow
    yield "reverse.sample, default solver", reverse
    if importlib.util.find_spec("diffusers") is not None:
        yield "diffusers DDIM, the same network and calls", partial(of_diffusers, "DDIMScheduler", device, shape, size)
        yield (
            "diffusers UniPC, the same network and calls",
            partial(of_diffusers, "UniPCMultistepScheduler", device, shape, size),
        )

    def log_p(net: nn.Module, precision: str) -> Callable[[], object]:
        bound, x = vp.flow_ode(score_of(net)), torch.randn(size.log_p_batch, *shape[1:], device=device)
        options = {"steps": size.calls, "trace": "hutchinson", "probes": 1, "seed": 0, "warn_above": 1e9}
        return lambda: bound.log_prob(x, **options)  # type: ignore[arg-type]

    yield "log p, one probe", log_p

    def training(net: nn.Module, precision: str) -> Callable[[], object]:
        score, data = score_of(net), torch.randn(4 * size.batch, *shape[1:])
        mixed = "bf16" if precision == "bfloat16" else None

        def steps() -> float:
            watch = Stopwatch(device)
            sdeflow.fit(
                score, data, STEPS, size.batch, seed=0, lr=1e-9, mixed_precision=mixed, progress=False,
                callbacks=[watch],
            )  # fmt: skip
            return watch.per_step

        return steps

    yield "fit, a step", training


class Stopwatch:
    """A callback that measures the seconds from step to step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def after_step(self, run: Run, loss: float) -> None:
        """Notes the time."""
        wait(self.device)
        self.times.append(time.perf_counter())

    @property
    def per_step(self) -> float:
        """The median seconds of a step."""
        return statistics.median(later - earlier for earlier, later in pairwise(self.times))


def of_diffusers(
    scheduler: str, device: torch.device, shape: tuple[int, ...], size: Size, net: nn.Module, precision: str
) -> Callable[[], object]:
    """A loop over a scheduler of diffusers, as its pipelines write it."""
    made = getattr(importlib.import_module("diffusers"), scheduler)(prediction_type="epsilon")

    @torch.no_grad()
    def loop() -> Tensor:
        made.set_timesteps(size.calls, device=device)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        for t in made.timesteps:
            x = made.step(net(x, t.float().expand(len(x))).float(), t, x).prev_sample
        return x

    return loop


def timed(report: Report, run: Callable[[], object], precision: str, repeats: int) -> tuple[float, int | None]:
    """The median seconds of a run, or of what it says itself, and how often the host waited in one."""
    device = report.device
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
    seconds, waits = [], None
    with autocast:
        run()
        for _ in range(repeats):
            wait(device)
            began = time.perf_counter()
            result = run()
            wait(device)
            seconds.append(result if isinstance(result, float) else time.perf_counter() - began)
        if device.type == "cuda":
            waits = host_waits(run)
    return statistics.median(seconds), waits


def wait(device: torch.device) -> None:
    """Waits until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_waits(run: Callable[[], object]) -> int:
    """How often the host waits for the GPU in a run, as torch warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def row(name: str, found: list[tuple[float, int | None] | None], images: int) -> str:
    """A line of the table."""
    seconds = [math.nan if part is None else part[0] for part in found]
    waits = next((part[1] for part in found if part is not None), None)
    best = min((s for s in seconds if not math.isnan(s)), default=math.nan)
    columns = [f"{s:8.3f} s" if not math.isnan(s) else f"{'-':>10s}" for s in seconds]
    return f"{name:66s} {columns[0]:>10s} {columns[1]:>10s} {images / best:10.1f} {'-' if waits is None else waits:>10}"


if __name__ == "__main__":
    sys.exit(main())
