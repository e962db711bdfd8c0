r"""``fit``: score matching with the derived weighting, on accelerate.

An SDE with a Gaussian kernel is trained by denoising score matching; one with another exact kernel on that kernel's
score; any other on simulated paths (:mod:`sdeflow.solving.simulate`), many steps' paths at once.

Each step draws a batch, one time per sample, and noise; Adam follows the gradient of the mean loss,
clipped; an exponential moving average of the weights is what sampling uses afterwards. The loss estimates the objective
that the weighting stands for (:mod:`sdeflow.training.weightings`), whatever the law of the times
(:mod:`sdeflow.training.times`).

Everything random in step n comes from (seed, n) alone (paths from the seed and the block of n), so a run that was
stopped and resumed is the run that was not: weights, optimiser, average and loss are equal bit by bit on the same
machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sdeflow.errors import (
    CheckpointError,
    CheckpointMismatch,
    DataError,
    DataScaleWarning,
    ScoreError,
    TrainingDivergedError,
    warn,
)
from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.local import LocalKernel
from sdeflow.kernels.pearson import PearsonKernel
from sdeflow.kernels.reducible import ReducibleKernel
from sdeflow.numerics.checks import (
    checked_choice,
    checked_count,
    checked_flag,
    checked_numbers,
    checked_real,
    checked_within,
)
from sdeflow.numerics.linear import Linear
from sdeflow.numerics.noise import NoiseStream, mixed_seed, resolve_seed
from sdeflow.scores import Score
from sdeflow.scores.network import HIDDEN
from sdeflow.solving.model import Model
from sdeflow.solving.simulate import start
from sdeflow.storage import tables_of
from sdeflow.training.batches import Batches
from sdeflow.training.checkpoint import latest_checkpoint, run_lock, write_checkpoint
from sdeflow.training.losses import KernelPairs, Pairs, denoising_score_matching, score_error
from sdeflow.training.pairs import SimulatedPairs
from sdeflow.training.times import Times, WeightedTimes, require_times
from sdeflow.training.weightings import Weighting, mean_weight, of_times, overall_std, require_weighting, share

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Fit", "fit"]

_PATIENCE = 10  # steps in a row whose loss is not finite
_UNUSUAL_STD = 50.0
_GAP = 5  # see sdeflow.solving.simulate
_SIMULATION_STEPS = 200
_BLOCK, _BLOCK_NUMBERS = 16, 2**18  # at most so many steps, and so many numbers, are simulated at once


@dataclass
class Fit:
    """What a training run did.

    Attributes:
        losses: the loss of each step of this call, NaN where the step was skipped.
        steps: the number of steps done in all, earlier calls of a resumed run included.
        skipped: how many steps of this call had a loss or gradient that was not finite.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    skipped: int = 0

    def __repr__(self) -> str:
        skipped = f", skipped={self.skipped}" if self.skipped else ""
        return f"Fit(steps={self.steps}, losses: {len(self.losses)}, lately {_recent(self.losses):.4g}{skipped})"


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    score: Score,
    data: Tensor | tuple[Tensor, Tensor] | Dataset | DataLoader,
    steps: int,
    batch_size: int = 64,
    weighting: Weighting | None = None,
    times: Times | None = None,
    *,
    lr: float = 1e-3,
    schedule: Callable[[float], float] | str = "cosine",
    ema: float = 0.999,
    clip: float = 1.0,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 1000,
    mixed_precision: str | None = None,
    accelerator: Accelerator | None = None,
    gap: int | None = None,
    simulation_steps: int | None = None,
    progress: bool | None = None,
) -> Fit:
    """Trains ``score`` in place; afterwards its weights are the moving average, in eval mode.

    It works inside ``torch.no_grad()`` too, since to train is to ask for gradients.

    Args:
        score: the score, whose network has parameters.
        data: (n, *event), a tensor, an array or a list; a tuple (x, y) of it with labels; or a Dataset or DataLoader
            of such samples, alone or with labels as (x, y). It is converted to the network's dtype. A DataLoader
            brings its own batches, and a resumed run starts it anew.
        steps: how many steps the run has in all.
        batch_size: samples of a step, over all processes.
        weighting: what the loss means, whatever the times: "likelihood", "score", "edm", "min_snr", "p2", or a
            function w(t); see :mod:`sdeflow.training.weightings`. None is "likelihood" where the SDE has a Gaussian
            kernel, and "score" elsewhere.
        times: where the objective is sampled: "t", "log_snr", "edm", "importance", or a density of t; see
            :mod:`sdeflow.training.times`. The loss is divided by the density, so this changes its variance alone. None
            is "log_snr" for "likelihood", "edm" for "edm", "t" for "score" and without a Gaussian kernel, and
            "importance" for the others.
        lr: Adam's step size, after a warm-up over the first 2 % of the steps.
        schedule: "cosine" to zero, "constant", or a function of the fraction of steps done.
        ema: the decay of the average, reached gradually.
        clip: the largest norm of the gradient of the loss over its value at an error of eps of unit variance.
        seed: of the order, the times and the noise; the global random state is left as it was.
        out: a folder for checkpoints.
        resume: whether to go on from the newest checkpoint in ``out``, if there is one.
        checkpoint_every: steps between checkpoints.
        mixed_precision: "bf16" or "fp16", as accelerate takes it.
        accelerator: an accelerate ``Accelerator`` of your own.
        gap: of an SDE without a kernel: the length of the last step, whose law is the target, in steps of the
            simulation, 5 by default. A longer one gives targets of less variance and more bias.
        simulation_steps: of such an SDE: the steps of a path, 200 by default.
        progress: a progress bar; None shows it on a terminal only.

    Raises:
        DataError: for data that is empty, not floating, not finite, of ragged shape, or not what the network takes.
        ScoreError: for a network without parameters to train.
        ScheduleError: for a simulated SDE whose noise does not reach every component within a gap.
        NonFiniteStateError: where a simulated path explodes.
        TrainingDivergedError: after 10 steps in a row whose loss or gradient is not finite.
        CheckpointMismatch: when resuming a run of another SDE, network or seed.
        CheckpointError: where ``out`` cannot be written, or another process trains into it.
        ValueError: for options that make no sense.
        WeightingError: for a weighting or a density of times with negative or infinite values.
    """
    _check_options(score, steps, batch_size, lr, ema, clip, checkpoint_every)
    weighting, times = _resolved(score, weighting, times)
    objective = _objective(score, weighting, gap, simulation_steps)
    rate = _learning_rate(schedule, steps)
    if accelerator is None:
        accelerator = _make_accelerator(score, mixed_precision)
    folder, seed = _folder(out), resolve_seed(seed)
    lock = run_lock(folder) if folder is not None and accelerator.is_main_process else nullcontext()
    devices = [] if accelerator.device.type == "cpu" else None
    with torch.random.fork_rng(devices), lock:
        _seed_global(seed, accelerator)
        batches = Batches(data, batch_size, seed, accelerator, score.dtype)
        example = _prepare_score(score, objective, batches, accelerator)
        times_drawn = WeightedTimes(
            times,
            objective.schedule,
            lambda t: objective.weights(score, example, t),
            share(weighting),
            gaussian=score.gaussian is not None,
        )
        identity = {
            **_identity(score, weighting),
            **{"seed": seed, "batch_size": batch_size, "lr": lr, "ema": ema, "clip": clip},
            "times": times if isinstance(times, str) else "a function",
            "schedule": schedule if isinstance(schedule, str) else "a function",
            "data": batches.fingerprint(),
            **objective.identity,
        }
        run = _Run(score, objective, times_drawn, accelerator, lr, ema, clip, folder, identity)
        done = run.restore(steps) if resume else run.require_new_folder()
        result = Fit(steps=done)
        score.train()
        shown = checked_flag(progress, "progress", optional=True)
        hidden = (None if shown is None else not shown) if accelerator.is_local_main_process else True
        drawn = _drawn(objective, batches, batch_size, times_drawn, seed, done, accelerator)
        with tqdm(total=steps, initial=min(done, steps), desc="fit", disable=hidden) as bar:
            for step in range(done, steps):
                loss = run.step(*next(drawn), step, rate(step))
                result.losses.append(loss)
                result.skipped += math.isnan(loss)
                result.steps = step + 1
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{_recent(result.losses):.4g}")
                if folder is not None and (result.steps % checkpoint_every == 0 or result.steps == steps):
                    run.save(result.steps)
        run.use_average()
    score.eval()
    return result


class _Denoising:
    """Denoising score matching to a Gaussian kernel."""

    identity: dict = {}
    most_steps = 1  # drawn at once

    def __init__(self, score: Score, weighting: Weighting) -> None:
        self.schedule, self.weighting = score.kernel, weighting

    def weights(self, score: Score, example: Tensor, t: Tensor) -> Tensor:
        """The objective's integrand at an error of eps of unit variance, at times (n,)."""
        return mean_weight(self.schedule, self.weighting, example, t, overall_std(score.data_std))

    def states(self, data: Tensor) -> Tensor:
        """Whole states from data; P0 is part of the kernel."""
        return self.schedule.lift(data, noisy=False)

    def draw(self, data: Tensor, t: Tensor, noise: NoiseStream) -> tuple[Tensor, ...]:
        x_0 = self.states(data)
        return x_0, t, noise.normal(tuple(x_0.shape), x_0.dtype, x_0.device)

    def loss(self, score: Score, y: Tensor | None, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return denoising_score_matching(score, x_0, t, eps, self.weighting, y)


class _Matching:
    """Score matching on pairs, of an exact kernel that is not Gaussian, or of simulated paths."""

    def __init__(self, score: Score, pairs: KernelPairs | SimulatedPairs, identity: dict, most_steps: int) -> None:
        self.schedule = Model(score, None, None)
        self.pairs, self.identity, self.most_steps = pairs, identity, most_steps

    def weights(self, score: Score, example: Tensor, t: Tensor) -> Tensor:
        """The weight of times (n,): w(t) where a function says it, else one."""
        weighting = self.pairs.weighting
        return of_times(weighting, t) if callable(weighting) else torch.full_like(t, share(weighting))

    def states(self, data: Tensor) -> Tensor:
        """Whole states from data."""
        return start(self.schedule.declaration, data)

    def draw(self, data: Tensor, t: Tensor, noise: NoiseStream) -> tuple[Tensor, ...]:
        x_t, t, target, root = self.pairs(data, t, noise)
        return x_t, t, target, root.values

    def loss(self, score: Score, y: Tensor | None, x_t: Tensor, t: Tensor, target: Tensor, root: Tensor) -> Tensor:
        return score_error(score, Pairs(x_t, t, target, Linear(root, score.declaration.coupled)), y)


def _objective(
    score: Score, weighting: Weighting, gap: int | None, simulation_steps: int | None
) -> _Denoising | _Matching:
    """What this SDE is trained on."""
    kernel = score.kernel
    if not isinstance(kernel, LocalKernel) and (gap is not None or simulation_steps is not None):
        raise ValueError("gap and simulation_steps are of SDEs without a kernel, which are trained on simulated paths.")
    match kernel:
        case Kernel():
            return _Denoising(score, weighting)
        case ReducibleKernel() | PearsonKernel():
            return _Matching(score, KernelPairs(score, weighting), {}, 1)
        case LocalKernel():
            gap = _GAP if gap is None else gap
            steps = _SIMULATION_STEPS if simulation_steps is None else simulation_steps
            pairs = SimulatedPairs(score, weighting, gap, steps)
            return _Matching(score, pairs, {"gap": gap, "simulation_steps": steps}, _BLOCK)
        case _:
            assert_never(kernel)


def _drawn(
    objective: _Denoising | _Matching,
    batches: Batches,
    batch_size: int,
    times: WeightedTimes,
    seed: int,
    done: int,
    accelerator: Accelerator,
) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
    """What each step from ``done`` on compares, with its labels; the global generators are seeded for the step.

    A block of steps is drawn at once, and from its first step whatever ``done`` is, so that it never differs.
    """
    numbers = max(1, batch_size * math.prod(batches.first.shape[1:]))
    block = max(1, min(objective.most_steps, _BLOCK_NUMBERS // numbers))
    first = done - done % block
    _seed_global(mixed_seed(seed, first), accelerator)
    source = batches.from_step(first)
    while True:
        parts = []
        for step in range(first, first + block):
            _seed_global(mixed_seed(seed, step), accelerator)  # for what the data set and dropout draw
            parts.append(next(source))
        sizes, device = [len(x) for x, _ in parts], parts[0][0].device
        noise = NoiseStream(mixed_seed(seed, first, accelerator.process_index), "training")
        t, weight = (torch.cat(parts).to(device) for parts in zip(*(times.draw(n, noise) for n in sizes), strict=True))
        drawn = (weight, *objective.draw(torch.cat([x for x, _ in parts]) if block > 1 else parts[0][0], t, noise))
        for step, (_, y), *of_step in zip(
            range(first, first + block), parts, *(part.split(sizes) for part in drawn), strict=True
        ):
            if step >= done:
                if block > 1:
                    _seed_global(mixed_seed(seed, step, 1), accelerator)
                yield tuple(of_step), y
        first += block


class _Run:
    """The state of a run, one step of it, and its checkpoints."""

    def __init__(
        self,
        score: Score,
        objective: _Denoising | _Matching,
        times: WeightedTimes,
        accelerator: Accelerator,
        lr: float,
        ema: float,
        clip: float,
        folder: Path | None,
        identity: dict,
    ) -> None:
        self.score, self.times, self.accelerator, self.lr, self.clip = score, times, accelerator, lr, clip
        self.folder, self.identity = folder, identity
        optimiser = torch.optim.Adam([p for p in score.parameters() if p.requires_grad], lr=lr)
        self.loss, self.optimiser = accelerator.prepare(_Loss(score, objective), optimiser)
        self.average = AveragedModel(score, multi_avg_fn=_moving_average(ema), use_buffers=True)
        self._failures = 0
        self._failed_saves = 0
        self._saved_step: int | None = None

    def step(self, drawn: tuple[Tensor, ...], y: Tensor | None, step: int, rate: float) -> float:
        """One step on what was drawn for it: the loss, or NaN where it was skipped and changed nothing.

        Raises:
            TrainingDivergedError: after too many skipped steps in a row.
        """
        buffers = [buffer.clone() for buffer in self.score.buffers()]
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * rate
        self.optimiser.zero_grad()
        with self.accelerator.autocast():
            loss = self.loss(y, *drawn)
        self.accelerator.backward(loss / self.times.total)
        norm = self.accelerator.clip_grad_norm_(self.score.parameters(), self.clip)
        value = float(self.accelerator.reduce(loss.detach(), "mean"))
        if math.isfinite(value) and math.isfinite(float(norm)):
            self.optimiser.step()
            self.average.update_parameters(self.score)
            self._failures = 0
            return value
        for buffer, before in zip(self.score.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self._failures += 1
        if self._failures >= _PATIENCE:
            kept = (
                ""
                if self._saved_step is None
                else f" (the last checkpoint, of step {self._saved_step}, is in {self.folder})"
            )
            raise TrainingDivergedError(
                f"the loss or its gradient was not finite for {self._failures} steps up to step {step}{kept}: "
                "lower lr, or look for extreme values in the data."
            )
        return math.nan

    def save(self, step: int) -> None:
        """Writes a checkpoint. A failure is a warning; the third in a row is an error."""
        if self.accelerator.is_main_process:
            adam = self.optimiser.state_dict()["state"]
            tensors = {
                "weights": self.score.state_dict(),
                "average": self.average.module.state_dict(),
                "adam": {f"{i}.{name}": value for i, slot in adam.items() for name, value in slot.items()},
                "counters": {"n_averaged": self.average.n_averaged},
            }
            try:
                write_checkpoint(self.folder, step, {"identity": self.identity}, tensors)
                self._failed_saves, self._saved_step = 0, step
            except CheckpointError as error:
                self._failed_saves += 1
                if self._failed_saves >= 3:
                    raise
                warn(f"{error} Training goes on.")
        self.accelerator.wait_for_everyone()

    def require_new_folder(self) -> int:
        """0, the number of steps done; a CheckpointError where the folder holds another run's checkpoints."""
        if self.folder is not None and latest_checkpoint(self.folder) is not None:
            raise CheckpointError(
                f"{self.folder} holds the checkpoints of an earlier run: pass resume=True to go on with it, "
                "or another out=."
            )
        return 0

    def restore(self, steps: int) -> int:
        """The number of steps done, all state put back; 0 where there is no checkpoint.

        Raises:
            CheckpointMismatch: for a checkpoint of another run, or with more than ``steps`` done; nothing is
                changed then.
        """
        found = None if self.folder is None else latest_checkpoint(self.folder)
        if found is None:
            return 0
        state, tensors = found
        if state["step"] > steps:
            raise CheckpointMismatch(
                f"the run in {self.folder} has done {state['step']} steps, more than steps={steps}."
            )
        theirs, ours = state.get("identity", {}), self.identity
        differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if differing:
            shown = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing)
            raise CheckpointMismatch(f"the checkpoint in {self.folder} is of another run: {shown}.")
        for group in ("weights", "average"):
            _require_same_layout(self.score.state_dict(), tensors.get(group, {}), self.folder)
        self.score.load_state_dict(tensors["weights"])
        self.average.module.load_state_dict(tensors["average"])
        self.average.n_averaged.copy_(tensors["counters"]["n_averaged"])
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["adam"].items():
            index, name = key.split(".", 1)
            slots.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": slots})
        self._saved_step = int(state["step"])
        return self._saved_step

    def use_average(self) -> None:
        """Puts the moving average in the score's place."""
        self.score.load_state_dict(self.average.module.state_dict())


class _Loss(torch.nn.Module):
    """The mean loss of a batch as a module, so that accelerate's wrappers see every call."""

    def __init__(self, score: Score, objective: _Denoising | _Matching) -> None:
        super().__init__()
        self.score, self.objective = score, objective

    def forward(self, y: Tensor | None, weight: Tensor, *drawn: Tensor) -> Tensor:
        loss = self.objective.loss(self.score, y, *drawn)
        return (weight.to(loss.dtype) * loss).mean()


def _make_accelerator(score: Score, mixed_precision: str | None) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    on_cpu = next(score.parameters()).device.type == "cpu"
    if alone:
        AcceleratorState._reset_state()  # it would hold this process to the first fit's precision for ever
    checked_choice(mixed_precision, "mixed_precision", ("no", "fp8", "fp16", "bf16", None))
    return Accelerator(mixed_precision=mixed_precision, cpu=alone and on_cpu)


def _seed_global(seed: int, accelerator: Accelerator) -> None:
    """Seeds torch's global generators, within the fork that ``fit`` makes; the CPU's alone where that is enough."""
    if accelerator.device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for every accelerator: 0.8 ms
    else:
        torch.manual_seed(seed)


def _prepare_score(
    score: Score, objective: _Denoising | _Matching, batches: Batches, accelerator: Accelerator
) -> Tensor:
    """Measures the data's moments where they were not given, and tries the network on a few samples: one of them."""
    kernel = score.gaussian
    seen = objective.states(batches.first.double())
    std = float(seen.std(correction=0))
    if std == 0:
        raise DataError(f"the data is constant ({float(seen.mean()):g}): there is nothing to learn.")
    if std > _UNUSUAL_STD and kernel is not None:
        warn(f"the data's standard deviation is {std:.3g}; schedules expect about 1.", DataScaleWarning)
    score.to(accelerator.device)
    if score.declaration.coupled:  # one number for each component
        parts = seen.movedim(1, 0).flatten(1)
        score.measure(*(m.reshape(-1, *(1,) * (seen.ndim - 2)) for m in (parts.mean(1), parts.std(1, correction=0))))
    else:
        score.measure(seen.mean(), std)
    labels = batches.first_labels
    x, y = (
        objective.states(batches.first[:2]).to(accelerator.device),
        None if labels is None else labels[:2].to(accelerator.device),
    )
    training = score.training
    try:
        with torch.no_grad():
            (score.eval() if kernel is None else score.eval().noise)(x, score.declaration.T, y)
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, ScoreError):
            raise
        raise DataError(
            f"the network does not take samples of shape {tuple(x.shape[1:])} in {x.dtype}"
            f"{'' if y is None else f' with labels of {y.dtype}'} (its parameters are "
            f"{next(score.parameters()).dtype}): {error}"
        ) from error
    finally:
        score.train(training)
    return x[:1].detach().cpu()


def _check_options(
    score: Score,
    steps: int,
    batch_size: int,
    lr: float,
    ema: float,
    clip: float,
    checkpoint_every: int,
) -> None:
    if not isinstance(score, Score):
        raise ScoreError(f"fit trains an sdeflow.Score, not {type(score).__name__}.")
    if not any(p.requires_grad for p in score.parameters()):
        if score.is_function:
            reason = f"its net is a function, which hides those that it may use: {HIDDEN}"
        else:
            reason = "they are all frozen" if any(True for _ in score.parameters()) else "its network holds none"
        raise ScoreError(f"the score has no parameters to train: {reason}.")
    if any(p.is_inference() for p in score.parameters()):
        raise ScoreError(
            "the network was made inside torch.inference_mode(), where nothing can be trained: make it outside."
        )
    for name, value in (("steps", steps), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        checked_count(value, name)
    checked_within(lr, "lr", 0.0, math.inf)
    checked_within(clip, "clip", 0.0, math.inf)
    checked_real(ema, "ema", "at least 0 and below 1", lambda number: 0 <= number < 1)


_BEST_TIMES = {"likelihood": "log_snr", "score": "t", "edm": "edm"}


def _resolved(score: Score, weighting: Weighting | None, times: Times | None) -> tuple[Weighting, Times]:
    """The weighting and the law of times, their defaults resolved, checked."""
    gaussian = score.gaussian is not None
    if weighting is None:
        weighting = "likelihood" if gaussian else "score"
    require_weighting(weighting, gaussian)
    if times is None:
        times = (
            "t" if not gaussian else "importance" if callable(weighting) else _BEST_TIMES.get(weighting, "importance")
        )
    require_times(times, gaussian)
    return weighting, times


def _folder(out: str | Path | None) -> Path | None:
    try:
        return None if out is None else Path(out)
    except TypeError:
        raise TypeError(f"out must be a folder's path, as text or a Path, not {out!r}.") from None


def _learning_rate(schedule: Callable[[float], float] | str, steps: int) -> Callable[[int], float]:
    shapes = {"cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)), "constant": lambda done: 1.0}
    if not callable(schedule):
        checked_choice(schedule, "schedule", shapes, "a function of the fraction done")
    shape = schedule if callable(schedule) else shapes[schedule]
    warm_up = max(1.0, 0.02 * steps)
    return lambda step: min(1.0, (step + 1) / warm_up) * float(checked_numbers(shape(step / steps), "schedule(done)"))


def _moving_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """The moving average's update, its decay reached as (1 + n) / (10 + n)."""

    @torch.no_grad()
    def update(averages: list[Tensor], current: list[Tensor], n: Tensor | int) -> None:
        if averages[0].is_floating_point():  # they come grouped by dtype
            weight = 1.0 - min(decay, (1.0 + float(n)) / (10.0 + float(n)))
            torch._foreach_lerp_(averages, current, weight)
        else:
            torch._foreach_copy_(averages, current)

    return update


def _identity(score: Score, weighting: Weighting) -> dict:
    """What of the score and its loss must be the same for a run to be resumed, as JSON holds it."""
    declaration = score.declaration
    return {
        "f": str(declaration.f),
        "g": str(declaration.g),
        "T": declaration.T,
        "cutoff": declaration.cutoff,
        "P0": list(map(float, declaration.P0)) if declaration.coupled else declaration.P0,
        "basis": None if score.basis is None else repr(score.basis),
        "schedules": tables_of(declaration),
        "parameters": score.values.fixed,
        "predicts": score.predicts,
        "time": score.time if isinstance(score.time, str) else "a function",
        "weighting": weighting if isinstance(weighting, str) else "a function",
    }


def _require_same_layout(ours: dict[str, Tensor], theirs: dict[str, Tensor], folder: Path) -> None:
    differing = [
        f"{key}: {_layout(theirs.get(key))} there, {_layout(ours.get(key))} here"
        for key in sorted(ours.keys() | theirs.keys())
        if _layout(ours.get(key)) != _layout(theirs.get(key))
    ]
    if differing:
        more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise CheckpointMismatch(f"the checkpoint in {folder} is of another network: {'; '.join(differing[:8])}{more}.")


def _layout(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def _recent(losses: list[float]) -> float:
    finite = [value for value in losses[-100:] if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
