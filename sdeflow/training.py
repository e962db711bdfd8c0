r"""``fit``: denoising score matching with the derived weighting, on accelerate.

Each step draws a batch, one time per sample, and noise; Adam follows the gradient of the mean loss,
clipped; an exponential moving average of the weights is what sampling uses afterwards. Times are
stratified, u_i = (u + i / batch) mod 1 (arXiv:2107.00630), and uniform in log-SNR or in t.

Everything random in step n comes from (seed, n) alone, so a run that was stopped and resumed is the run
that was not: weights, optimiser, average and loss are equal bit by bit on the same machine.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from tqdm import tqdm

from sdeflow.checkpoint import latest_checkpoint, write_checkpoint
from sdeflow.errors import (
    CheckpointError,
    CheckpointMismatch,
    DataError,
    DataScaleWarning,
    ScoreError,
    TrainingDivergedError,
)
from sdeflow.losses import Weighting, denoising_score_matching
from sdeflow.noise import NoiseStream
from sdeflow.scores import Score

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Fit", "fit", "sample_times"]

_PATIENCE = 10  # steps in a row whose loss is not finite
_MOMENT_SAMPLES = 10_000


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


def fit(
    score: Score,
    data: Tensor | Dataset | DataLoader,
    steps: int,
    batch_size: int = 64,
    weighting: Weighting = "score",
    times: str = "log_snr",
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
    progress: bool | None = None,
) -> Fit:
    """Trains ``score`` in place; afterwards its weights are the moving average, in eval mode.

    Args:
        score: the score, whose network has parameters.
        data: (n, *event), or a Dataset or DataLoader of such samples, alone or with labels as (x, y). A
            DataLoader brings its own batches.
        steps: how many steps the run has in all.
        batch_size: samples of a step, over all processes.
        weighting: "score", "likelihood", or a function w(t); see :mod:`sdeflow.losses`.
        times: "log_snr" or "t", the variable in which times are uniform. The objective is the weighting's
            average over these times; it is not divided by their density.
        lr: Adam's step size, after a warm-up over the first 2 % of the steps.
        schedule: "cosine" to zero, "constant", or a function of the fraction of steps done.
        ema: the decay of the average, reached gradually.
        clip: the largest norm of the gradient.
        seed: of the order, the times and the noise.
        out: a folder for checkpoints.
        resume: whether to go on from the newest checkpoint in ``out``, if there is one.
        checkpoint_every: steps between checkpoints.
        mixed_precision: "bf16" or "fp16", as accelerate takes it.
        accelerator: an accelerate ``Accelerator`` of your own.
        progress: a progress bar; None shows it on a terminal only.

    Raises:
        DataError: for data that is empty, not floating, not finite or of ragged shape.
        ScoreError: for a network without parameters to train.
        NotAffineError: for an SDE without a Gaussian kernel.
        TrainingDivergedError: after 10 steps in a row whose loss or gradient is not finite.
        CheckpointMismatch: when resuming a run of another SDE, network or seed.
        ValueError: for options that make no sense.
    """
    _check_options(score, steps, batch_size, times, lr, ema, clip, checkpoint_every)
    if accelerator is None:
        from accelerate import Accelerator

        on_cpu = next(score.parameters()).device.type == "cpu" and not torch.distributed.is_initialized()
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu)
    source = _Batches(data, batch_size, seed, accelerator)
    if not bool(score.moments_known):
        score.set_data_moments(*_data_moments(source.look()))
    _check_first_batch(source.look(), score)

    torch.manual_seed(seed)  # for dropout; nothing of ours draws from it
    optimiser = torch.optim.Adam([p for p in score.parameters() if p.requires_grad], lr=lr)
    model, optimiser = accelerator.prepare(score, optimiser)
    average = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=_average(ema), use_buffers=True)
    run = _Run(score=score, optimiser=optimiser, average=average, folder=None if out is None else Path(out))
    identity = _identity(score, seed, batch_size)
    result = Fit()
    if resume:
        result.steps = run.restore(identity)
    rate = _learning_rate(schedule, steps)

    score.train()
    failures = 0
    batches = source.from_step(result.steps)
    shown = accelerator.is_local_main_process
    with tqdm(
        total=steps,
        initial=result.steps,
        desc="fit",
        disable=(None if progress is None else not progress) if shown else True,
    ) as bar:
        for step in range(result.steps, steps):
            x_0, y = next(batches)
            torch.manual_seed(_mixed_seed(seed, step))
            noise = NoiseStream(_mixed_seed(seed, step, accelerator.process_index), "training")
            t = sample_times(score, len(x_0), times, noise).to(x_0.device)
            for group in optimiser.param_groups:
                group["lr"] = lr * rate(step)
            optimiser.zero_grad()
            with accelerator.autocast():
                loss = model_loss(
                    model, score, x_0, t, noise.normal(tuple(x_0.shape), x_0.dtype, x_0.device), weighting, y
                )
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), clip)
            value = float(accelerator.reduce(loss.detach(), "mean"))
            healthy = math.isfinite(value) and math.isfinite(float(norm))
            result.losses.append(value if healthy else math.nan)
            if healthy:
                optimiser.step()
                average.update_parameters(accelerator.unwrap_model(model))
                failures = 0
            else:
                result.skipped += 1
                failures += 1
                if failures >= _PATIENCE:
                    raise TrainingDivergedError(
                        f"the loss or its gradient was not finite for {failures} steps up to step {step}"
                        f"{run.last_good()}: lower lr, or look for extreme values in the data."
                    )
            result.steps = step + 1
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{_recent(result.losses):.4g}")
            if run.folder is not None and (result.steps % checkpoint_every == 0 or result.steps == steps):
                run.save(result.steps, identity, accelerator)
    run.use_average()
    score.eval()
    return result


def model_loss(
    model: nn.Module, score: Score, x_0: Tensor, t: Tensor, noise: Tensor, weighting: Weighting, y: Tensor | None
) -> Tensor:
    """The mean loss of a batch; ``model`` is ``score`` as accelerate wrapped it, so that its hooks see the call."""
    if model is score:
        return denoising_score_matching(score, x_0, t, noise, weighting, y).mean()
    return denoising_score_matching(_Wrapped(model, score), x_0, t, noise, weighting, y).mean()


class _Wrapped:
    """A score whose network is called through accelerate's wrapper."""

    def __init__(self, model: nn.Module, score: Score) -> None:
        self.kernel, self._model = score.kernel, model

    def noise(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        _, sigma, _ = self.kernel.coefficients(t)
        return -sigma.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) * self._model(x, t, y)


def sample_times(score: Score, n: int, times: str, noise: NoiseStream) -> Tensor:
    """n stratified times in [cutoff, T], uniform in "log_snr" or in "t", (n,) in float64."""
    kernel = score.kernel
    u = (noise.uniform((1,), torch.float64) + torch.arange(n, dtype=torch.float64) / n) % 1.0
    if times == "t":
        return kernel.cutoff + (kernel.T - kernel.cutoff) * u
    first, last = kernel.half_log_snr(torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64))
    return kernel.time_of(first + (last - first) * u)


class _Run:
    """The state of a run: what a checkpoint holds."""

    def __init__(
        self, score: Score, optimiser: torch.optim.Optimizer, average: AveragedModel, folder: Path | None
    ) -> None:
        self.score, self.optimiser, self.average, self.folder = score, optimiser, average, folder
        self._failed_saves = 0

    def save(self, step: int, identity: dict, accelerator: Accelerator) -> None:
        if accelerator.is_main_process:
            adam = self.optimiser.state_dict()["state"]
            tensors = {
                "weights": self.score.state_dict(),
                "average": self.average.module.state_dict(),
                "adam": {f"{i}.{name}": value for i, slot in adam.items() for name, value in slot.items()},
                "counters": {"n_averaged": self.average.n_averaged},
            }
            try:
                write_checkpoint(self.folder, step, {"identity": identity}, tensors)
                self._failed_saves = 0
            except CheckpointError as error:
                self._failed_saves += 1
                if self._failed_saves >= 3:
                    raise
                warnings.warn(f"{error} Training goes on.", stacklevel=3)
        accelerator.wait_for_everyone()

    def restore(self, identity: dict) -> int:
        """The number of steps done, all state put back; 0 where there is no checkpoint."""
        found = None if self.folder is None else latest_checkpoint(self.folder)
        if found is None:
            return 0
        state, tensors = found
        differing = sorted(
            k for k in identity.keys() | state["identity"].keys() if identity.get(k) != state["identity"].get(k)
        )
        if differing:
            shown = "; ".join(f"{k}: {state['identity'].get(k)!r} there, {identity.get(k)!r} here" for k in differing)
            raise CheckpointMismatch(f"the checkpoint in {self.folder} is of another run: {shown}.")
        try:
            self.score.load_state_dict(tensors["weights"])
            self.average.module.load_state_dict(tensors["average"])
        except RuntimeError as error:
            raise CheckpointMismatch(f"the checkpoint in {self.folder} is of another network: {error}") from error
        self.average.n_averaged.copy_(tensors["counters"]["n_averaged"])
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["adam"].items():
            index, name = key.split(".", 1)
            slots.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": slots})
        return int(state["step"])

    def use_average(self) -> None:
        self.score.load_state_dict(self.average.module.state_dict())

    def last_good(self) -> str:
        return "" if self.folder is None else f"; the last checkpoint is in {self.folder}"


class _Shuffled(Sampler):
    """Batches of indices, a permutation per epoch from (seed, epoch), from any step on."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self.per_epoch = n // self.batch_size
        self.first_step = 0

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            epoch, position = divmod(step, self.per_epoch)
            generator = torch.Generator().manual_seed(_mixed_seed(self.seed, epoch, -1))
            order = torch.randperm(self.n, generator=generator)
            for i in range(position, self.per_epoch):
                yield order[i * self.batch_size : (i + 1) * self.batch_size].tolist()
                step += 1


class _Tensors(Dataset):
    """Rows of a tensor, a batch of indices at once."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.data[indices]


class _Batches:
    """Batches (x_0, y or None) from a tensor, a Dataset or a DataLoader, without end."""

    def __init__(
        self, data: Tensor | Dataset | DataLoader, batch_size: int, seed: int, accelerator: Accelerator
    ) -> None:
        self._device = accelerator.device
        self._shuffled: _Shuffled | None = None
        self._accelerator = accelerator
        if isinstance(data, DataLoader):
            self._loader = accelerator.prepare_data_loader(data)
            return
        if isinstance(data, Tensor):
            _check_tensor(data)
            data, collate = _Tensors(data), _as_they_are
        elif isinstance(data, IterableDataset):
            self._loader = accelerator.prepare_data_loader(DataLoader(data, batch_size=batch_size))
            return
        elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            collate = None
        else:
            raise DataError(f"data must be a tensor (n, *event), a Dataset or a DataLoader, not {type(data).__name__}.")
        if len(data) == 0:
            raise DataError("the data set is empty.")
        self._shuffled = _Shuffled(len(data), batch_size, seed)
        self._loader = DataLoader(data, batch_sampler=self._shuffled, collate_fn=collate)

    def look(self) -> Tensor:
        """Some samples, for their shape and scale, without disturbing the order of training."""
        if self._shuffled is not None:
            dataset = self._loader.dataset
            if isinstance(dataset, _Tensors):
                return dataset.data[:_MOMENT_SAMPLES]
            stride = max(1, len(dataset) // 512)
            items = [dataset[i] for i in range(0, len(dataset), stride)]
            try:
                return torch.stack(
                    [torch.as_tensor(item[0] if isinstance(item, tuple | list) else item) for item in items]
                )
            except RuntimeError as error:
                raise DataError(f"the data set's samples have different shapes: {error}") from error
        if not hasattr(self, "_seen"):
            for batch in self._loader:
                self._seen = self._split(batch)[0]
                break
            else:
                raise DataError("the data loader is empty.")
        return self._seen

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches from ``step`` on. A DataLoader of the user's is continued at its own position, not bit by bit."""
        if self._shuffled is not None:
            self._shuffled.first_step = step
            share = slice(self._accelerator.process_index, None, self._accelerator.num_processes)
            for batch in self._loader:
                x, y = self._split(batch)
                yield x[share].to(self._device), None if y is None else y[share].to(self._device)
        while True:
            for batch in self._loader:
                x, y = self._split(batch)
                yield x.to(self._device), None if y is None else y.to(self._device)

    @staticmethod
    def _split(batch: object) -> tuple[Tensor, Tensor | None]:
        if isinstance(batch, tuple | list) and len(batch) in (1, 2) and all(isinstance(part, Tensor) for part in batch):
            x, y = batch[0], batch[1] if len(batch) == 2 else None
        elif isinstance(batch, Tensor):
            x, y = batch, None
        else:
            raise DataError(
                f"a batch must be a tensor (batch, *event), or such a tensor with labels, not {type(batch).__name__}."
            )
        return x, y


def _as_they_are(batch: Tensor) -> Tensor:
    return batch


def _check_tensor(data: Tensor) -> None:
    if data.ndim < 2 or not len(data):
        raise DataError(f"data must be of shape (n, *event) with n >= 1, not {tuple(data.shape)}.")
    if not data.is_floating_point():
        raise DataError(f"data must be floating, not {data.dtype}: convert it, and dequantise integer levels.")
    finite = torch.isfinite(data).flatten(1).all(1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        raise DataError(f"data is not finite in samples {rows[:8]}{' ...' if len(rows) > 8 else ''}.")


def _check_first_batch(x: Tensor, score: Score) -> None:
    """What a Dataset or DataLoader brings, and whether the network takes it."""
    _check_tensor(x)
    if float(x.double().std()) > 50:
        warnings.warn(
            f"the data's standard deviation is {float(x.double().std()):.3g}; schedules expect about 1.",
            DataScaleWarning,
            stacklevel=3,
        )


def _data_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation over all samples and coordinates."""
    _check_tensor(x)
    x = x.double()
    std = x.std(correction=0)
    if not float(std) > 0:
        raise DataError(f"the data is constant ({float(x.mean()):g}): there is nothing to learn.")
    return x.mean(), std


def _check_options(
    score: Score, steps: int, batch_size: int, times: str, lr: float, ema: float, clip: float, checkpoint_every: int
) -> None:
    if not isinstance(score, Score):
        raise ScoreError(f"fit trains an sdeflow.Score, not {type(score).__name__}.")
    if score.kernel is None:
        score.declaration.require_affine("Denoising score matching")
    if not any(p.requires_grad for p in score.parameters()):
        raise ScoreError("the score has no parameters to train.")
    for name, value in (("steps", steps), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}.")
    if times not in ("log_snr", "t"):
        raise ValueError(f'times must be "log_snr" or "t", not {times!r}.')
    for name, value, allowed in (("lr", lr, lr > 0), ("ema", ema, 0 <= ema < 1), ("clip", clip, clip > 0)):
        if not allowed or not math.isfinite(value):
            raise ValueError(f"{name} = {value!r} makes no sense.")


def _learning_rate(schedule: Callable[[float], float] | str, steps: int) -> Callable[[int], float]:
    shapes = {"cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)), "constant": lambda done: 1.0}
    if not callable(schedule) and schedule not in shapes:
        raise ValueError(f'schedule must be "cosine", "constant" or a function of the fraction done, not {schedule!r}.')
    shape = schedule if callable(schedule) else shapes[schedule]
    warm_up = max(1.0, 0.02 * steps)
    return lambda step: min(1.0, (step + 1) / warm_up) * shape(step / steps)


def _average(decay: float):  # noqa: ANN202
    """The moving average's update, its decay reached as (1 + n) / (10 + n)."""

    @torch.no_grad()
    def update(averages: list[Tensor], current: list[Tensor], n: Tensor | int) -> None:
        weight = 1.0 - min(decay, (1.0 + float(n)) / (10.0 + float(n)))
        floating = [(a, c) for a, c in zip(averages, current, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [c for _, c in floating], weight)
        for a, c in zip(averages, current, strict=True):
            if not a.is_floating_point():
                a.copy_(c)

    return update


def _identity(score: Score, seed: int, batch_size: int) -> dict:
    """What must be the same for a run to be resumed."""
    declaration = score.declaration
    return json.loads(
        json.dumps(
            {
                "f": str(declaration.f), "g": str(declaration.g), "T": declaration.T, "P0": declaration.P0,
                "parameters": {str(k): v for k, v in score.values.items()}, "predicts": score.predicts,
                "time": score.time if isinstance(score.time, str) else "function",
                "seed": seed, "batch_size": batch_size,
            }
        )
    )  # fmt: skip


def _mixed_seed(*parts: int) -> int:
    """One seed from several integers."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = (value ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 29
    return value % 2**63


def _recent(losses: list[float]) -> float:
    finite = [value for value in losses[-100:] if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
