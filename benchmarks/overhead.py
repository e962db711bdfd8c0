"""What sdeflow costs over code written by hand, as ratios measured side by side in one run.

    python benchmarks/overhead.py                     # everything, about six minutes on one core
    python benchmarks/overhead.py kernel solvers      # some parts: kernel train solvers import derive

The hand-written side is the variance-preserving SDE with beta linear from 0.1 to 20, the formulas typed in,
with expm1 where 1 - exp would cancel. Each ratio is sdeflow's time over the hand-written one's; the two are
measured alternately in short bursts, and the median of the bursts' ratios is printed beside its target, with
the quartiles. On a CPU it is CPU time of one thread that counts, so that other work on the machine disturbs
little; absolute times drift all the same, ratios hardly. On a GPU it is wall time, synchronised.

Parts and targets:

    kernel    kernel.sample against the perturbation by hand                                   at most 1.20
    train     a step of sdeflow.fit against a loop by hand, same network and objective         at most 1.03
    solvers   our adapters against torchsde and torchdiffeq by hand, with a free score         at most 1.00
    import    importing sdeflow against importing torch and sympy                              at most 1.10
    derive    declaring each SDE of the catalogue and deriving all of it, in a new process     at most 0.5 s

Exits with status 1 under ``--strict`` if a target is missed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sdeflow import Kernel

BETA_MIN, BETA_MAX = 0.1, 20.0
PARTS = ("kernel", "train", "solvers", "import", "derive")
CATALOGUE = ("VP", "SubVP", "VE", "CosineVP", "OU", "EDM", "FlowMatching")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what was measured.
        ours, theirs: medians, in ``unit``; ``theirs`` is None where there is only a time.
        unit: of the medians.
        value: what is compared with the target: the median ratio, or the time itself.
        low, high: its quartiles.
        target: the largest value allowed, or None for a line that only informs.
    """

    name: str
    ours: float
    theirs: float | None
    unit: str
    value: float
    low: float
    high: float
    target: float | None

    @property
    def missed(self) -> bool:
        """Whether the target is missed."""
        return self.target is not None and self.value > self.target


def main() -> int:
    """Runs the parts named on the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cpu", help="where kernel, train and solvers run (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the repeats: a rough look")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a target is missed")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    share = 0.25 if arguments.quick else 1.0
    device = torch.device(arguments.device)
    print(_machine(device))
    measure = {
        "kernel": lambda: kernel_rows(device, share),
        "train": lambda: train_rows(device, share),
        "solvers": lambda: solver_rows(device, share),
        "import": lambda: import_rows(share),
        "derive": lambda: derive_rows(share),
    }
    print(f"\n{'':66s}{'sdeflow':>11s}{'by hand':>11s}{'':4s}{'ratio':>8s}  {'quartiles':15s}{'target':>8s}")
    missed = 0
    for part in arguments.parts or PARTS:
        print(f"-- {part}")
        for row in measure[part]():
            print(_line(row), flush=True)
            missed += row.missed
    print(f"\n{missed} target{'' if missed == 1 else 's'} missed" if missed else "\nall targets met")
    return 1 if missed and arguments.strict else 0


# ---------------------------------------------------------------- measuring


def paired(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    repeats: int,
    burst: int = 1,
    per: float = 1.0,
    target: float | None,
    device: torch.device,
) -> Row:
    """Times two functions alternately, in an order that alternates too.

    Args:
        name: of the row.
        ours, theirs: what is timed.
        repeats: pairs of bursts.
        burst: calls in a burst.
        per: units of work in one call, by which times are divided.
        target: of the ratio.
        device: where they run.
    """
    for function in (ours, theirs, ours, theirs):
        function()
    samples: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for repeat in range(max(3, repeats)):
        for function in (ours, theirs) if repeat % 2 else (theirs, ours):
            start = now(device)
            for _ in range(burst):
                function()
            samples[function].append((now(device) - start) / (burst * per) * 1e6)
    return _ratio_row(name, samples[ours], samples[theirs], "µs", target)


def _ratio_row(name: str, ours: list[float], theirs: list[float], unit: str, target: float | None) -> Row:
    low, middle, high = _quartiles([a / b for a, b in zip(ours, theirs, strict=True)])
    return Row(name, statistics.median(ours), statistics.median(theirs), unit, middle, low, high, target)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 3:
        return min(values), statistics.median(values), max(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def now(device: torch.device) -> float:
    """Seconds of CPU time of this process, or of wall time once a GPU has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------- the hand-written side


def log_alpha_by_hand(t: Tensor) -> Tensor:
    """log alpha of the linear VP schedule, -½ ∫ beta."""
    return -0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN


def perturb_by_hand(x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma noise, as a training loop would write it."""
    log_alpha = log_alpha_by_hand(t).reshape(-1, *(1,) * (x_0.ndim - 1))
    return torch.exp(log_alpha) * x_0 + torch.sqrt(-torch.expm1(2.0 * log_alpha)) * noise


def time_of_by_hand(half_log_snr: Tensor) -> Tensor:
    """t at which log(alpha / sigma) takes the given value (arXiv:2206.00927, appendix D.4)."""
    spread = BETA_MAX - BETA_MIN
    tau = 2.0 * spread * torch.logaddexp(-2.0 * half_log_snr, torch.zeros_like(half_log_snr))
    return tau / ((torch.sqrt(BETA_MIN**2 + tau) + BETA_MIN) * spread)


# ---------------------------------------------------------------- kernel


def kernel_rows(device: torch.device, share: float) -> Iterator[Row]:
    """``kernel.sample`` for t (batch,) in float32, with the noise drawn inside and with the noise given."""
    import sdeflow

    for shape, burst in (((64, 1, 28, 28), 40), ((256, 3, 32, 32), 4), ((4096, 2), 100)):
        yield from _kernel_rows(sdeflow.catalog.VP(BETA_MIN, BETA_MAX).kernel, shape, burst, int(60 * share), device)


def _kernel_rows(
    kernel: Kernel, shape: tuple[int, ...], burst: int, repeats: int, device: torch.device
) -> Iterator[Row]:
    x_0 = torch.randn(shape, device=device)
    t = torch.rand(shape[0], device=device) * 0.99 + 0.01
    noise = torch.randn(shape, device=device)
    for how, ours, theirs in (
        ("", lambda: kernel.sample(x_0, t), lambda: perturb_by_hand(x_0, t, torch.randn_like(x_0))),
        (", seed given", lambda: kernel.sample(x_0, t, seed=0), lambda: perturb_by_hand(x_0, t, torch.randn_like(x_0))),
        (", noise given", lambda: kernel.sample(x_0, t, noise=noise), lambda: perturb_by_hand(x_0, t, noise)),
    ):
        name, target = f"kernel.sample {shape}{how}", 1.2
        yield paired(name, ours, theirs, repeats=repeats, burst=burst, target=target, device=device)


# ---------------------------------------------------------------- train


def train_rows(device: torch.device, share: float) -> Iterator[Row]:
    """A step of ``sdeflow.fit``, alternating with a step by hand: U-Net, 32 images of 1 x 28 x 28.

    ``fit`` asks its learning-rate schedule once in every step, so a schedule that takes a step by hand
    in passing alternates the two step by step.
    """
    for predicts, times in (("edm", "log_snr"), ("noise", "t")):
        steps = max(12, int(80 * share))
        ours, theirs = _train(predicts, times, steps, device)
        yield _ratio_row(f'fit, predicts="{predicts}", times="{times}"', ours, theirs, "ms", 1.03)


def _train(predicts: str, times: str, steps: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Milliseconds of each step of fit and of each step by hand, the first five of both left out."""
    import sdeflow

    torch.manual_seed(0)
    data = torch.randn(1024, 1, 28, 28, device=device).clamp(-1, 1)
    net = sdeflow.nets.UNet(1, width=16, multipliers=(1, 2, 2), attention=(-1,)).to(device)
    step_by_hand = hand_loop(copy.deepcopy(net), data, predicts, times)
    score = sdeflow.Score(net, sdeflow.catalog.VP(BETA_MIN, BETA_MAX), predicts=predicts).to(device)
    ours: list[float] = []
    theirs: list[float] = []
    resumed = 0.0

    def schedule(done: float) -> float:
        nonlocal resumed
        paused = now(device)
        if resumed:
            ours.append((paused - resumed) * 1e3)
        step_by_hand()
        resumed = now(device)
        theirs.append((resumed - paused) * 1e3)
        return 1.0

    sdeflow.fit(
        score, data, steps=steps + 6, batch_size=32, times=times, lr=2e-4, schedule=schedule, progress=False
    )  # fmt: skip
    return ours[5:], theirs[5:-1]


def hand_loop(net: nn.Module, data: Tensor, predicts: str, times: str, batch: int = 32) -> Callable[[], float]:
    """A training step as one writes it for this one SDE: Adam, clipping, an average of the weights, the loss read.

    Args:
        net: called as net(x, log-SNR).
        data: (n, *event).
        predicts: "edm" or "noise".
        times: "log_snr" or "t", stratified.
        batch: samples of a step.
    """
    cutoff, device = 4e-5, data.device
    mean, std = data.mean(), data.std()
    parameters = list(net.parameters())
    average = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.Adam(parameters, lr=2e-4)
    ends = torch.tensor([cutoff, 1.0], dtype=torch.float64)
    log_alpha = log_alpha_by_hand(ends)
    first, last = (log_alpha - 0.5 * torch.log(-torch.expm1(2.0 * log_alpha))).tolist()
    net.train()

    def step() -> float:
        x_0 = data[torch.randint(len(data), (batch,), device=device)]
        u = (torch.rand((), device=device) + torch.arange(batch, device=device) / batch) % 1.0
        t = cutoff + (1.0 - cutoff) * u if times == "t" else time_of_by_hand(first + (last - first) * u)
        noise = torch.randn_like(x_0)
        log_alpha = log_alpha_by_hand(t)
        alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2.0 * log_alpha))
        log_snr = 2.0 * (log_alpha - torch.log(sigma))
        alpha, sigma = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
        x_t = alpha * x_0 + sigma * noise
        optimiser.zero_grad()
        if predicts == "noise":
            eps = net(x_t, log_snr)
        else:
            centred = x_t - alpha * mean
            scale = torch.sqrt((alpha * std) ** 2 + sigma**2)
            eps = (sigma / scale**2) * centred - (alpha * std / scale) * net(centred / scale, log_snr)
        loss = (eps - noise).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1e-3)
        return float(loss.detach())

    return step


# ---------------------------------------------------------------- solvers


def free_score(x: Tensor, t: Tensor) -> Tensor:
    """-2 x, for t (batch,) as a network wants it: next to nothing. (With -x the flow of this SDE would stand still.)"""
    return -2.0 * x


class ReverseVP:
    """The reverse SDE of the linear VP in r = 1 - t, as torchsde takes it."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, r: Tensor, y: Tensor) -> Tensor:
        """½ beta x + beta s."""
        beta = BETA_MIN + (BETA_MAX - BETA_MIN) * (1.0 - r)
        return 0.5 * beta * y + beta * free_score(y, (1.0 - r).expand(len(y)))

    def g(self, r: Tensor, y: Tensor) -> Tensor:
        """√beta, in every coordinate."""
        return torch.sqrt(BETA_MIN + (BETA_MAX - BETA_MIN) * (1.0 - r)).expand_as(y)


def flow_by_hand(t: Tensor, x: Tensor) -> Tensor:
    """The probability flow of the linear VP, as torchdiffeq takes it."""
    beta = BETA_MIN + (BETA_MAX - BETA_MIN) * t
    return -0.5 * beta * (x + free_score(x, t.expand(len(x))))


def solver_rows(device: torch.device, share: float) -> Iterator[Row]:
    """Microseconds per call of the score, uniform in t on both sides, whole solves divided by their calls."""
    for shape in ((4096, 2), (32, 1, 28, 28)):
        yield from _torchsde_rows(shape, device, share)
        yield from _torchdiffeq_rows(shape, device, share)


def _torchsde_rows(shape: tuple[int, ...], device: torch.device, share: float, steps: int = 100) -> Iterator[Row]:
    import torchsde

    import sdeflow

    sde = sdeflow.catalog.VP(BETA_MIN, BETA_MAX)
    prior = sdeflow.Gaussian(0.0, 1.0)
    reverse = sde.reverse(free_score, prior=prior)
    cutoff = sde.cutoff
    dt = (1.0 - cutoff) / steps
    ts = torch.tensor([0.0, 1.0 - cutoff], device=device)
    flat = (shape[0], math.prod(shape[1:]))

    def ours() -> Tensor:
        return reverse.sample(shape, solver="euler", steps=steps, grid="t", device=device, seed=0, progress=False)

    def by_hand(tuned: bool) -> Tensor:
        y = torch.randn(flat, device=device)
        bm = torchsde.BrownianInterval(0.0, 1.0 - cutoff, size=flat, device=device, dt=dt) if tuned else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torchsde.sdeint(ReverseVP(), y, ts, bm=bm, dt=dt, method="euler")[-1].reshape(shape)

    for how, tuned in (("its default noise", False), ("BrownianInterval(dt)", True)):
        yield paired(
            f"torchsde euler {shape}, {how}",
            ours, lambda tuned=tuned: by_hand(tuned),
            repeats=int(25 * share), per=steps, target=1.0, device=device,
        )  # fmt: skip


def _torchdiffeq_rows(shape: tuple[int, ...], device: torch.device, share: float) -> Iterator[Row]:
    import torchdiffeq

    import sdeflow

    sde = sdeflow.catalog.VP(BETA_MIN, BETA_MAX)
    flow = sde.flow_ode(free_score, prior=sdeflow.Gaussian(0.0, 1.0))
    ts = torch.tensor([1.0, sde.cutoff], device=device)
    x_T = torch.randn(shape, device=device)
    for method, steps, grid in (("euler", 100, "t"), ("rk4", 25, "t"), ("dopri5", None, "t"), ("euler", 100, "angle")):

        def ours(method: str = method, steps: int | None = steps, grid: str = grid) -> Tensor:
            tolerances = {"rtol": 1e-6, "atol": 1e-6} if steps is None else {}
            return flow.decode(x_T, solver=method, steps=steps, grid=grid, progress=False, **tolerances)

        def by_hand(method: str = method, steps: int | None = steps) -> Tensor:
            options = {} if steps is None else {"step_size": (1.0 - sde.cutoff) / steps}
            tolerances = {"rtol": 1e-6, "atol": 1e-6} if steps is None else {}
            with torch.no_grad():
                return torchdiffeq.odeint(flow_by_hand, x_T, ts, method=method, options=options, **tolerances)[-1]

        name, target = f"torchdiffeq {method} {shape}", 1.0
        if grid != "t":  # another variable than by hand, which costs something: only to be seen
            name, target = f"{name}, ours in the {grid}", None
        yield _per_call_row(name, ours, by_hand, int(40 * share), target, device)


def _per_call_row(
    name: str,
    ours: Callable[[], Tensor],
    by_hand: Callable[[], Tensor],
    repeats: int,
    target: float | None,
    device: torch.device,
) -> Row:
    """A paired row in which each side's time is divided by its own calls of the score."""
    calls = [_calls(ours), _calls(by_hand)]
    name = f"{name}, {calls[0]} / {calls[1]} calls"
    row = paired(name, ours, by_hand, repeats=repeats, target=target, device=device)
    scale = calls[1] / calls[0]
    return Row(
        row.name, row.ours / calls[0], row.theirs / calls[1], "µs",
        row.value * scale, row.low * scale, row.high * scale, row.target,
    )  # fmt: skip


def _calls(solve: Callable[[], Tensor]) -> int:
    """How often ``solve`` calls the free score."""
    calls = 0
    code = free_score.__code__

    def count(frame, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code is code

    sys.setprofile(count)
    try:
        solve()
    finally:
        sys.setprofile(None)
    return calls


# ---------------------------------------------------------------- import and derive


def import_rows(share: float) -> Iterator[Row]:
    """Importing sdeflow against importing torch and sympy, each in a new process."""
    commands = {"theirs": "import torch, sympy", "ours": "import sdeflow"}
    samples: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(max(3, int(9 * share)) + 1):
        for side in ("ours", "theirs") if repeat % 2 else ("theirs", "ours"):
            code = f"import time; a = time.process_time(); {commands[side]}; print(time.process_time() - a)"
            samples[side].append(float(_fresh_process(code)))
    # The first pair only fills the disk's cache.
    yield _ratio_row("import sdeflow / import torch, sympy", samples["ours"][1:], samples["theirs"][1:], "s", 1.1)


_DERIVE = """
import time, sdeflow
a = time.process_time()
sde = sdeflow.catalog.{name}()
b = time.process_time()
kernel = sde.kernel
everything = (kernel.mean, kernel.std, kernel.log_snr, sde.weighting, sde.likelihood_weighting, sde.prior,
              sde.reverse().drift, sde.flow_ode().drift, repr(sde), repr(kernel))
print(b - a, time.process_time() - a, kernel.form)
"""


def derive_rows(share: float) -> Iterator[Row]:
    """The time to declare each SDE of the catalogue and to derive all of it, each in a new process."""
    for name in CATALOGUE:
        declared, derived = [], []
        for _ in range(max(1, int(3 * share))):
            first, total, form = _fresh_process(_DERIVE.format(name=name)).split()
            declared.append(float(first))
            derived.append(float(total))
        low, middle, high = _quartiles(derived)
        label = f"{name}: {statistics.median(declared):.3f} s to declare, with what it prints as ({form})"
        yield Row(label, middle, None, "s", middle, low, high, 0.5)


def _fresh_process(code: str) -> str:
    """What ``code`` prints in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


# ---------------------------------------------------------------- printing


def _line(row: Row) -> str:
    theirs = " " * 11 if row.theirs is None else f"{row.theirs:11.4g}"
    target = "" if row.target is None else f"{row.target:8.2f}{'  MISSED' if row.missed else ''}"
    times = f"{row.name:66s}{row.ours:11.4g}{theirs} {row.unit:3s}"
    return f"{times}{row.value:8.3f}  {row.low:6.3f} {row.high:6.3f}  {target}"


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("torch", "torchsde", "torchdiffeq", "accelerate", "sympy", "numpy", "scipy")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    import sdeflow

    return (
        f"sdeflow {sdeflow.__version__} against code by hand: VP, beta {BETA_MIN:g} .. {BETA_MAX:g}, float32\n"
        f"device: {device} ({name}), {os.cpu_count()} cores, {torch.get_num_threads()} thread\n"
        f"Python {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
