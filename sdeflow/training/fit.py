r"""``fit``: a score is trained on an objective, on accelerate.

By default an SDE with a Gaussian kernel is trained by denoising score matching, one with another exact kernel on that
kernel's score, and any other on simulated paths (:mod:`sdeflow.training.objectives`). The loss estimates the objective
that the weighting stands for (:mod:`sdeflow.training.weightings`), whatever the law of the times
(:mod:`sdeflow.training.times`).

Each step draws a batch, one time per sample, and noise; the optimiser follows the gradient of the mean loss, clipped.
After each step the callbacks are called (:mod:`sdeflow.training.callbacks`): the moving average of the weights, which
sampling uses afterwards, the validation, the user's own, the progress bar and the checkpoints, in this order.

Everything random in step n comes from (seed, n) alone (paths from the seed and the block of n). So a run that is
stopped and resumed equals one that is not: weights, optimiser, average and losses are equal bit by bit on the same
machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from sdeflow.errors import DataError, DataScaleWarning, ScoreError, warn
from sdeflow.numerics.checks import (
    checked_choice,
    checked_count,
    checked_flag,
    checked_numbers,
    checked_real,
    checked_within,
)
from sdeflow.numerics.conditions import Condition, described, picked
from sdeflow.numerics.noise import resolve_seed
from sdeflow.numerics.options import named
from sdeflow.scores import Score
from sdeflow.scores.network import HIDDEN
from sdeflow.training import identity
from sdeflow.training.batches import Batches, SampleData
from sdeflow.training.callbacks import Callback, Checkpoints, Progress, Trackers, Validation, checked_callbacks
from sdeflow.training.checkpoint import run_lock
from sdeflow.training.ema import MovingAverage
from sdeflow.training.interrupts import Interrupts
from sdeflow.training.objectives import Objective, chosen
from sdeflow.training.processes import own_accelerator
from sdeflow.training.run import Fit, Run, drawn_steps, seed_global
from sdeflow.training.times import Times
from sdeflow.training.weightings import Weighting

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Fit", "fit"]

_UNUSUAL_STD = 50.0
_LR = 1e-3
_VALIDATIONS = 10  # values of the validation data in a run, at most

OptimiserFactory = Callable[[list[torch.nn.Parameter]], Optimizer]


@named
@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    score: Score,
    data: SampleData | DataLoader[Any],
    steps: int,
    batch_size: int = 64,
    weighting: Weighting | None = None,
    times: Times | None = None,
    *,
    objective: Objective | str | None = None,
    label_dropout: float = 0.0,
    optimiser: Optimizer | OptimiserFactory | None = None,
    lr: float | None = None,
    schedule: Callable[[float], float] | str | None = None,
    ema: float = 0.999,
    clip: float = 1.0,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    allow: Iterable[str] = (),
    checkpoint_every: int = 1000,
    mixed_precision: str | None = None,
    accelerator: Accelerator | None = None,
    gap: int | None = None,
    simulation_steps: int | None = None,
    callbacks: Iterable[Callback] = (),
    validation: SampleData | None = None,
    progress: bool | None = None,
) -> Fit:
    """Trains ``score`` in place, inside ``no_grad`` too; then its weights are the moving average, in eval mode.

    That holds after an error and an interrupt as well. SIGTERM and Ctrl-C finish the step, write a checkpoint where
    there is ``out``, and leave: with the exit status 143, and with a KeyboardInterrupt.

    Args:
        score: the score, whose network has parameters.
        data: (n, *event), a tensor, an array or a list; a tuple (x, y) of it with conditions, a tensor (n, ...) or a
            tuple or dict of such; or a Dataset or DataLoader of such samples or pairs. A DataLoader brings its own
            batches, and a resumed run starts it anew.
        steps: how many steps the run has in all.
        batch_size: samples of a step, over all processes.
        weighting: what the loss means: "likelihood", "score", "edm", "min_snr", "p2", or a function w(t); see
            :mod:`sdeflow.training.weightings`. None is "likelihood" with a Gaussian kernel, and "score" without.
        times: where the objective is sampled, which changes the loss's variance alone: "t", "log_snr", "edm",
            "importance", or a density of t; see :mod:`sdeflow.training.times`. None is the weighting's best.
        objective: None for what fits the SDE; "denoising", "kernel_matching" or "local_matching"; or an object of
            ``sdeflow.objectives``, to which weighting, times, gap and simulation_steps belong then.
        label_dropout: the share of samples whose condition is dropped, so that the network learns the unconditional
            score too, for ``score.given(None)`` and ``score.guided``: integer labels become ``net.classes``, everything
            else zeros, unless the network has ``null(y)``.
        optimiser: a function from the list of trainable parameters to a torch optimiser (``torch.optim.AdamW``), or a
            torch optimiser of the score's parameters. Its learning rates are its own. None is Adam with ``lr``.
        lr: Adam's step size, 1e-3 by default.
        schedule: "cosine" to zero, "constant", or a function of the fraction of steps done: a factor of the learning
            rates, after a warm-up over the first 2 % of the steps. None is "cosine" for Adam, none for another.
        ema: the decay of the average, reached gradually.
        clip: the largest norm of the gradient. Before it is taken, the loss is divided by its value at an error of eps
            of unit variance.
        seed: of the order, the times and the noise; the global random state is left as it was.
        out: a folder for checkpoints.
        resume: whether to go on from the newest checkpoint in ``out``, if there is one.
        allow: names of what may differ from the run in ``out`` when it is resumed, as the error names them ("data",
            "schedule", ...).
        checkpoint_every: steps between checkpoints.
        mixed_precision: "bf16" or "fp16", as accelerate takes it.
        accelerator: an accelerate ``Accelerator`` of your own. Its precision is taken, its gradient accumulation makes
            each step in parts of the batch, and its trackers get the loss and the learning rate of each step.
        gap: of an SDE without a kernel: the length of the last step of a path, whose law is the target, in steps of it,
            5 by default. A longer one gives targets of less variance and more bias.
        simulation_steps: of such an SDE: the steps of a path, 200 by default.
        callbacks: objects with ``after_step(run, loss)``; where one raises, the step is written to ``out`` first.
        validation: held-out data, a tensor, a tuple (x, y) or a Dataset: the objective of the moving average on them,
            up to ten times in the run. ``callbacks=[Validation(data, every=...)]`` chooses the steps.
        progress: a progress bar; None shows it on a terminal only.

    Raises:
        DataError: for data that is empty, not floating, not finite, of ragged shape, or not what the network takes.
        ScoreError: for a network without parameters to train.
        ScheduleError: for a simulated SDE whose noise does not reach every component within a gap.
        NonFiniteStateError: where a simulated path explodes.
        TrainingDivergedError: after 10 steps in a row whose loss or gradient is not finite.
        CheckpointMismatch: when resuming a run that differs in something that ``allow`` does not name.
        CheckpointError: where ``out`` cannot be written, or another process trains into it.
        ValueError: for options that make no sense.
        TypeError: for callbacks and optimisers that are none.
        NotAffineError: for an objective that this SDE cannot serve.
        WeightingError: for a weighting or a density of times with negative or infinite values.
    """
    _check_options(score, steps, batch_size, ema, clip, checkpoint_every, label_dropout)
    if accelerator is not None and mixed_precision is not None:
        raise ValueError("mixed_precision= is of fit's own Accelerator: yours has its own precision.")
    if resume and out is None:
        raise ValueError("resume=True needs out=, the folder of the run to go on with.")
    lr = _checked_lr(lr, optimiser)
    objective = chosen(score, objective, weighting, times, gap, simulation_steps)
    draws = objective.draws(score)
    rate = None if optimiser is not None and schedule is None else _learning_rate(schedule, steps)
    held_out = () if validation is None else (Validation(validation, -(-steps // _VALIDATIONS)),)
    watching = (*held_out, *checked_callbacks(callbacks))
    folder, seed = _folder(out), resolve_seed(seed)
    with ExitStack() as stack:
        if accelerator is None:
            accelerator = stack.enter_context(own_accelerator(score, mixed_precision))
        stack.enter_context(torch.random.fork_rng([] if accelerator.device.type == "cpu" else None))
        if folder is not None and accelerator.is_main_process:
            stack.enter_context(run_lock(folder))
        seed_global(seed, accelerator)
        batches = Batches(data, batch_size, seed, accelerator, score.dtype)
        law = objective.law(score, _prepare_score(score, objective, batches, label_dropout, accelerator))
        made = _optimiser(score, optimiser, lr)
        run = Run(score, objective, law, accelerator, made, rate, clip, MovingAverage(score, ema), steps)
        if folder is not None:
            compared = {
                **identity.of_score(score),
                **objective.identity(),
                **identity.of_optimiser(made, optimiser is None, schedule),
                **({"label_dropout": label_dropout} if label_dropout else {}),
                **{"seed": seed, "batch_size": batch_size, "ema": ema, "clip": clip, "data": batches.fingerprint()},
                **{"precision": accelerator.mixed_precision, "processes": accelerator.num_processes},
            }
            run.checkpoints = Checkpoints(folder, checkpoint_every, compared, watching)
            run.checkpoints.begin(run, resume, allow)
        score.train()
        dropped = (label_dropout, score.no_condition()) if label_dropout else None
        drawn = drawn_steps(objective, draws, batches, batch_size, law, seed, run.step, accelerator, dropped)
        try:
            with Progress(steps, run.step, _hidden(progress, accelerator)) as bar, Interrupts() as interrupts:
                run.callbacks = (run.average, *watching, bar, Trackers(), *filter(None, [run.checkpoints]))
                while not (run.stopped or run.step >= steps):
                    run.take(*next(drawn), interrupted=interrupts.caught is not None)
        finally:
            run.keep_average()
            score.eval()
    interrupts.leave()
    return run.result


def _hidden(progress: bool | None, accelerator: Accelerator) -> bool | None:
    """Whether the progress bar is hidden; None where a terminal decides."""
    shown = checked_flag(progress, "progress", optional=True)
    if not accelerator.is_local_main_process:
        return True
    return None if shown is None else not shown


def _checked_lr(lr: float | None, optimiser: object) -> float:
    """The learning rate of fit's own Adam."""
    if lr is not None and optimiser is not None:
        raise ValueError("lr is of fit's own Adam: a given optimiser has its own learning rate.")
    return checked_within(_LR if lr is None else lr, "lr", 0.0, math.inf)


def _optimiser(score: Score, optimiser: Optimizer | OptimiserFactory | None, lr: float) -> Optimizer:
    """The optimiser of the score's trainable parameters, checked."""
    parameters = [p for p in score.parameters() if p.requires_grad]
    if optimiser is None:
        return torch.optim.Adam(parameters, lr=lr)
    made = optimiser if isinstance(optimiser, Optimizer) or not callable(optimiser) else optimiser(parameters)
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"optimiser must be a torch optimiser, or a function from parameters to one, not {type(made).__name__}."
        )
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the loss several times a step, which fit does not: take another optimiser.")
    ours = set(map(id, parameters))
    if not any(id(p) in ours for group in made.param_groups for p in group["params"]):
        raise ValueError("the optimiser holds none of the score's trainable parameters: make it of score.parameters().")
    return made


def _prepare_score(
    score: Score, objective: Objective, batches: Batches, label_dropout: float, accelerator: Accelerator
) -> Tensor:
    """Measures the data's moments where they were not given, and tries the network on a few samples: one of them."""
    kernel = score.gaussian
    seen = objective.states(score, batches.first.double())
    std = float(seen.std(correction=0))
    if std == 0:
        raise DataError(f"the data is constant ({float(seen.mean()):g}): there is nothing to learn.")
    if std > _UNUSUAL_STD and kernel is not None:
        warn(f"the data's standard deviation is {std:.3g}; schedules expect about 1.", DataScaleWarning)
    if not score.declaration.coupled:
        _warn_of_constants(seen)
    score.to(accelerator.device)
    if score.declaration.coupled:  # one number for each component
        parts = seen.movedim(1, 0).flatten(1)
        score.measure(*(m.reshape(-1, *(1,) * (seen.ndim - 2)) for m in (parts.mean(1), parts.std(1, correction=0))))
    else:
        score.measure(seen.mean(), std)
    conditions = batches.first_conditions
    if conditions is None and label_dropout:
        raise DataError(f"label_dropout={label_dropout:g}: the data holds no conditions; pass (x, y).")
    _require_labels(score, conditions)
    measure = getattr(score.net, "measure_condition", None)
    if conditions is not None and not score.conditional and callable(measure):
        measure(conditions)
    score.learns(conditions, label_dropout)
    x = objective.states(score, batches.first[:2]).to(accelerator.device)
    y = None if conditions is None else picked(conditions, slice(2))
    training = score.training
    try:
        with torch.no_grad():
            (score.eval() if kernel is None else score.eval().noise)(x, score.declaration.T, y)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        if isinstance(error, ScoreError | torch.OutOfMemoryError):
            raise
        with_y, called = ("", "net(x, time)") if y is None else (f" with conditions {described(y)}", "net(x, time, y)")
        raise DataError(
            f"the network does not take samples of shape {tuple(x.shape[1:])} in {x.dtype}{with_y} (its parameters are "
            f"{next(score.parameters()).dtype}; it is called as {called}, time of shape (batch,)): {error}"
        ) from error
    finally:
        score.train(training)
    return x[:1].detach().cpu()


def _require_labels(score: Score, conditions: Condition | None) -> None:
    """Raises a DataError where labels reach the number of classes, which stands for "no label"."""
    classes = getattr(score.net, "classes", None)
    labels = conditions[0] if isinstance(conditions, tuple) else conditions
    if not isinstance(classes, int) or not classes or not isinstance(labels, Tensor) or labels.is_floating_point():
        return
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise DataError(
            f"labels lie in [{int(labels.min())}, {int(labels.max())}], and the network takes 0 to {classes - 1} "
            f"({classes} means no label): count them from 0, or build it with classes={int(labels.max()) + 1}."
        )


def _warn_of_constants(seen: Tensor) -> None:
    """A warning for channels, or coordinates of vectors, that have one value in all samples seen."""
    parts = seen.movedim(1, 0).flatten(1)
    constant = (parts == parts[:, :1]).all(1).nonzero().flatten().tolist() if len(seen) > 1 else []
    if constant:
        what = "channels" if seen.ndim > 2 else "coordinates"
        warn(
            f"{what} {constant[:8]} of the data are constant in all {len(seen)} samples looked at: there the score is "
            "that of a point, and log p grows without bound as t falls to 0. Leave them out, or add noise.",
            DataScaleWarning,
        )


def _check_options(
    score: Score,
    steps: int,
    batch_size: int,
    ema: float,
    clip: float,
    checkpoint_every: int,
    label_dropout: float,
) -> None:
    if not isinstance(score, Score):
        raise ScoreError(f"fit trains an sdeflow.Score, not {type(score).__name__}: write sdeflow.Score(net, sde).")
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
    checked_within(clip, "clip", 0.0, math.inf)
    checked_real(label_dropout, "label_dropout", "at least 0 and below 1", lambda share: 0 <= share < 1)
    checked_real(ema, "ema", "at least 0 and below 1", lambda number: 0 <= number < 1)


def _folder(out: str | Path | None) -> Path | None:
    try:
        return None if out is None else Path(out)
    except TypeError:
        raise TypeError(f"out must be a folder's path, as text or a Path, not {out!r}.") from None


def _learning_rate(schedule: Callable[[float], float] | str | None, steps: int) -> Callable[[int], float]:
    """The factor of the learning rates at each step; None is "cosine"."""
    schedule = "cosine" if schedule is None else schedule
    shapes = {"cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)), "constant": lambda done: 1.0}
    if not callable(schedule):
        checked_choice(schedule, "schedule", shapes, "a function of the fraction done")
    shape = schedule if callable(schedule) else shapes[schedule]
    warm_up = max(1.0, 0.02 * steps)
    return lambda step: min(1.0, (step + 1) / warm_up) * float(checked_numbers(shape(step / steps), "schedule(done)"))
