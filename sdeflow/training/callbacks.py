"""What is called after each step of a run: the protocol, and fit's own callbacks.

A callback is an object with ``after_step(run, loss)``. It may read the :class:`sdeflow.training.run.Run`, call
``run.stop()``, and hold state: with ``state_dict()`` and ``load_state_dict(state)``, of tensors, numbers, texts, lists
and dicts, its state goes into checkpoints. In several processes each has its own callbacks, and all must stop at the
same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow.errors import CheckpointError, CheckpointMismatch, warn
from sdeflow.numerics.checks import checked_count, checked_names
from sdeflow.training.batches import SampleData, Samples
from sdeflow.training.checkpoint import Checkpoint, latest_checkpoint, packed, unpacked, write_checkpoint
from sdeflow.training.identity import differences
from sdeflow.training.run import Run, recent

__all__ = ["Callback", "Checkpoints", "Progress", "Trackers", "Validation", "checked_callbacks"]

_WRITES = 3  # failures in a row that end a run
_OF_SOME_RUNS = ("callbacks", "groups", "label_dropout", "lr", "optimiser", "schedule")  # names for ``allow``
_EXTRA = "extra state/"  # names of a module's tensors hold no slash before their dots


@runtime_checkable
class Callback(Protocol):
    """Called after each step of ``fit``.

    >>> class EarlyStop:
    ...     def after_step(self, run, loss):
    ...         if run.step >= 100 and sum(run.losses[-50:]) > 0.99 * sum(run.losses[-100:-50]):
    ...             run.stop()
    """

    def after_step(self, run: Run, loss: float) -> None:
        """Sees the run after a step, and the step's loss, NaN where it was skipped."""


class StatefulCallback(Callback, Protocol):
    """A callback whose state goes into checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Its state: tensors, numbers, texts, None, and lists, tuples and dicts of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a state back."""


def _has_state(callback: Callback) -> TypeGuard[StatefulCallback]:
    return hasattr(callback, "state_dict")


def checked_callbacks(callbacks: Iterable[Callback]) -> tuple[Callback, ...]:
    """The callbacks as a tuple.

    Raises:
        TypeError: for what is no sequence of them.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks must be a list of callbacks, not {type(callbacks).__name__}.")
    found = tuple(callbacks)
    for callback in found:
        if isinstance(callback, type) or not isinstance(callback, Callback):
            raise TypeError(f"a callback must have a method after_step(run, loss), and {callback!r} has none.")
    return found


class Validation:
    """The objective of the moving average on held-out data, always at the same draws: ``run.result.validation``.

    Args:
        data: what :meth:`sdeflow.objectives.Objective.value` takes.
        every: steps between two values; one is taken after the last step too.
        seed: of the draws.
    """

    def __init__(self, data: SampleData, every: int, seed: int = 0) -> None:
        Samples(data)  # an error now rather than after some steps
        self.data, self.every, self.seed = data, checked_count(every, "every"), seed

    def after_step(self, run: Run, loss: float) -> None:
        """Adds (step, value, standard error)."""
        if run.step % self.every == 0 or run.last:
            run.result.validation.append((run.step, *run.objective.value(run.average.score, self.data, self.seed)))


class Progress:
    """A progress bar with the mean of the last losses; a context that closes it.

    Args:
        steps: of the whole run.
        done: steps done already.
        hidden: None hides it where there is no terminal.
    """

    def __init__(self, steps: int, done: int, hidden: bool | None) -> None:
        self._bar = tqdm(total=steps, initial=min(done, steps), desc="fit", disable=hidden)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def after_step(self, run: Run, loss: float) -> None:
        """Moves the bar."""
        self._bar.update()
        if run.step % 10 == 1:
            self._bar.set_postfix(loss=f"{recent(run.losses):.4g}")


class Trackers:
    """Tells the trackers of the user's Accelerator of each step: loss, learning rate, and new validation values."""

    def after_step(self, run: Run, loss: float) -> None:
        """Logs a step."""
        if not run.accelerator.trackers:
            return
        values = {"loss": loss, "lr": run.optimiser.param_groups[0]["lr"]}
        if run.result.validation and run.result.validation[-1][0] == run.step:
            _, values["validation"], values["validation_stderr"] = run.result.validation[-1]
        run.accelerator.log(values, step=run.step)


class Checkpoints:
    """Writes and reads a run's checkpoints (:mod:`sdeflow.training.checkpoint`).

    Args:
        folder: where they lie.
        every: steps between two; one is written after the last step too.
        identity: what must be the same for a run to be resumed.
        of_user: the callbacks whose state belongs to the run.
    """

    def __init__(self, folder: Path, every: int, identity: dict[str, Any], of_user: Iterable[Callback]) -> None:
        self._stateful = [callback for callback in of_user if _has_state(callback)]
        self.folder, self.every = folder, every
        self.identity = identity
        if self._stateful:
            self.identity = {**identity, "callbacks": [type(callback).__name__ for callback in self._stateful]}
        self._failures = 0
        self._saved: int | None = None

    def after_step(self, run: Run, loss: float) -> None:
        """Writes a checkpoint where one is due. A failure is a warning; the third in a row ends all processes."""
        if run.step % self.every and not run.last:
            return
        failure: CheckpointError | None = None
        if run.accelerator.is_main_process:
            state = self._state(run)
            try:
                self._write(run.step, *state)
                self._failures = 0
            except CheckpointError as error:
                self._failures, failure = self._failures + 1, error
                if self._failures < _WRITES:
                    warn(f"{error} Training goes on.")
        if run.any_process(self._failures >= _WRITES):  # which waits for the main process
            raise failure or CheckpointError(f"the main process could not write {_WRITES} checkpoints in a row.")

    def rescue(self, run: Run) -> None:
        """Writes the last whole step of a run that ends by a callback's error, if it is not written already."""
        if self._saved == run.step or not run.accelerator.is_main_process:
            return
        try:
            self._write(run.step, *self._state(run))
        except Exception as error:  # the callback's own error goes on
            warn(f"step {run.step} is not in a checkpoint: {error}")

    def described(self) -> str:
        """Where the last checkpoint is, for an error's text."""
        return "" if self._saved is None else f" (the last checkpoint, of step {self._saved}, is in {self.folder})"

    def begin(self, run: Run, resume: bool, allow: Iterable[str] = ()) -> None:
        """Puts the newest checkpoint's state back, if there is one; ``allow`` names what may differ.

        A network's state that a checkpoint cannot hold is an error now, before the first step.

        Raises:
            CheckpointError: where there is one and it is not to be resumed.
            CheckpointMismatch: for a checkpoint of another run, or with more steps done than the run has; nothing is
                changed then.
        """
        layout, _ = _parted(run.score.state_dict())
        found = latest_checkpoint(self.folder)
        there = {} if found is None else found[0].get("identity", {})
        allow = checked_names(allow, "allow", {*self.identity, *there, *_OF_SOME_RUNS})
        if found is None:
            return
        if not resume:
            raise CheckpointError(
                f"{self.folder} holds the checkpoints of an earlier run: pass resume=True to go on with it, "
                "or another out=."
            )
        state, tensors = found
        if state["step"] > run.steps:
            raise CheckpointMismatch(
                f"the run in {self.folder} has done {state['step']} steps, more than steps={run.steps}."
            )
        theirs, ours = state.get("identity", {}), self.identity
        differing = differences(theirs, ours, state["format"], allow)
        if differing:
            shown = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing)
            raise CheckpointMismatch(
                f"the checkpoint in {self.folder} is of another run: {shown}. fit(allow={differing}) goes on with it "
                "all the same."
            )
        for group in ("weights", "average"):
            _require_same_layout(layout, tensors.get(group, {}), self.folder)
        run.score.load_state_dict(_with_others(tensors["weights"], state, "weights"))
        run.average.score.load_state_dict(_with_others(tensors["average"], state, "average"))
        run.average.updates.copy_(tensors["counters"]["n_averaged"])
        if ours.get("optimiser") == theirs.get("optimiser"):  # another one begins anew
            try:
                run.optimiser.load_state_dict(_optimiser_state(run, state, tensors))
            except (KeyError, RuntimeError, ValueError) as error:
                raise CheckpointMismatch(
                    f"the optimiser's state in {self.folder} does not fit this run's: {error!r}."
                ) from error
        kept = list(zip(theirs.get("callbacks", ()), state.get("callbacks", ()), strict=False))
        for callback in self._stateful:
            place = next((i for i, (name, _) in enumerate(kept) if name == type(callback).__name__), None)
            if place is not None:
                callback.load_state_dict(unpacked(kept.pop(place)[1], tensors["callbacks"]))
        self._saved = run.result.steps = int(state["step"])
        if "losses" in tensors["counters"]:  # since format 3
            run.result.losses[:] = tensors["counters"]["losses"].tolist()
            run.result.skipped = sum(map(math.isnan, run.result.losses))
            run.result.validation[:] = [(int(n), mean, error) for n, mean, error in state["validation"]]

    def _write(self, step: int, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        write_checkpoint(self.folder, step, state, tensors)
        self._saved = step

    def _state(self, run: Run) -> Checkpoint:
        """All that a resumed run needs.

        Raises:
            CheckpointError: for state that a checkpoint cannot hold.
        """
        of_optimiser: dict[str, Tensor] = {}
        of_callbacks: dict[str, Tensor] = {}
        weights, of_weights = _parted(run.score.state_dict())
        average, of_average = _parted(run.average.score.state_dict())
        state = {
            "identity": self.identity,
            "validation": run.result.validation,
            "others": {"weights": of_weights, "average": of_average},
            "optimiser": packed(run.optimiser.state_dict(), of_optimiser, "the optimiser"),
            "callbacks": [packed(c.state_dict(), of_callbacks, type(c).__name__) for c in self._stateful],
        }
        tensors = {
            "weights": weights,
            "average": average,
            "counters": {
                "n_averaged": run.average.updates,
                "losses": torch.tensor(run.result.losses, dtype=torch.float64),
            },
            "optimiser": of_optimiser,
            "callbacks": of_callbacks,
        }
        return state, tensors


def _parted(state: dict[str, Any]) -> tuple[dict[str, Tensor], object]:
    """The tensors of a state dict; and the rest, a module's extra state, as JSON and tensors beside them.

    Raises:
        CheckpointError: for extra state that a checkpoint cannot hold.
    """
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    held: dict[str, Tensor] = {}
    others = packed({key: value for key, value in state.items() if key not in tensors}, held, "the network")
    return {**tensors, **{f"{_EXTRA}{name}": tensor for name, tensor in held.items()}}, others


def _with_others(tensors: dict[str, Tensor], state: dict[str, Any], group: str) -> dict[str, Any]:
    """The state dict that :func:`_parted` was given."""
    others = state.get("others", {}).get(group)
    held = {key.removeprefix(_EXTRA): value for key, value in tensors.items() if key.startswith(_EXTRA)}
    plain = {key: value for key, value in tensors.items() if not key.startswith(_EXTRA)}
    return plain if others is None else {**plain, **unpacked(others, held)}


def _optimiser_state(run: Run, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """The optimiser's state in a checkpoint; the first format held Adam's tensors alone."""
    if state["format"] > 1:
        return unpacked(state["optimiser"], tensors["optimiser"])
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors["adam"].items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    return {**run.optimiser.state_dict(), "state": slots}


def _require_same_layout(ours: dict[str, Tensor], theirs: dict[str, Tensor], folder: Path) -> None:
    added = {"meaning"}  # since format 3, and compared by a score itself
    differing = [
        f"{key}: {_layout(theirs.get(key))} there, {_layout(ours.get(key))} here"
        for key in sorted((ours.keys() | theirs.keys()) - added)
        if _layout(ours.get(key)) != _layout(theirs.get(key))
    ]
    if differing:
        more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise CheckpointMismatch(f"the checkpoint in {folder} is of another network: {'; '.join(differing[:8])}{more}.")


def _layout(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
