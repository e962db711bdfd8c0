"""Checkpoints that survive a kill at any byte and hold no code: safetensors, JSON, SHA-256.

A checkpoint is a folder ``step-00001000`` with one safetensors file for each group of tensors and a
``state.json`` that lists the files' hashes; its own hash stands in ``state.sha256``. It is written beside its place,
flushed to disk and renamed, so that a folder of that name is always whole. The two newest are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sdeflow.errors import CheckpointCorrupt, CheckpointError, CheckpointVersionError, warn

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not locked there
    fcntl = None  # type: ignore[assignment]  # a module or None

__all__ = ["FORMAT", "Checkpoint", "latest_checkpoint", "packed", "run_lock", "unpacked", "write_checkpoint"]

FORMAT = 3
"""1 held Adam's tensors in a file of their own, and no objective, optimiser or callbacks; 2 no hash of state.json."""
KEEP = 2
MAX_FILE = 2**34
"""Bytes of a file of tensors, 16 GiB: a larger one is neither written nor read."""
_LARGEST_STATE = 2**24  # bytes of state.json that are written and read

_held: set[str] = set()
"""Folders that runs of this process hold: the operating system's lock is one between processes."""

Checkpoint = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Writes one checkpoint and removes all but the two newest.

    Args:
        folder: where the checkpoints of one run lie.
        step: the number of steps done.
        state: what JSON can hold.
        tensors: groups of tensors, a file each.

    Raises:
        CheckpointError: where the disk refuses; older checkpoints are untouched then.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        hashes = {}
        for name, group in tensors.items():
            data = save_tensors(_of_their_own(group))
            if len(data) > MAX_FILE:
                raise CheckpointError(
                    f"{name} has {len(data) / 2**30:.0f} GiB, over {MAX_FILE / 2**30:.0f} in one file."
                )
            hashes[name] = hashlib.sha256(data).hexdigest()
            _write(partial / f"{name}.safetensors", data)
        listed = json.dumps({"format": FORMAT, **state, "step": step, "sha256": hashes}, indent=1).encode()
        if len(listed) > _LARGEST_STATE:
            raise CheckpointError(f"state.json has {len(listed):,} bytes, over the {_LARGEST_STATE:,} that are read.")
        _write(partial / "state.json", listed)
        _write(partial / "state.sha256", hashlib.sha256(listed).hexdigest().encode())
        aside = target.with_suffix(".old")  # still read if a kill comes between the two renames
        if target.exists():
            os.replace(target, aside)
        os.replace(partial, target)
        _flush(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the checkpoint of step {step} could not be written to {folder}: {error}") from error
    for old in [*_steps(folder)[:-KEEP], *folder.glob(".partial-*")]:
        shutil.rmtree(old, ignore_errors=True)
    return target


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for one run; the operating system lets go of it when the process ends, however it ends.

    Raises:
        CheckpointError: where another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115  held open for as long as the run
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written to: {error}") from error
    with file:
        place = os.path.realpath(folder)
        try:
            if place in _held:
                raise OSError("held by this process")
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process alone, not of a worker it forks
        except OSError as error:
            raise CheckpointError(f"another run is training into {folder}: choose another out=.") from error
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in ``folder`` as (state, tensors), or None where there is none.

    A corrupt one is passed over with a warning; where all are corrupt, that is an error.

    Raises:
        CheckpointCorrupt: where no checkpoint is whole.
        CheckpointVersionError: for a newer format.
    """
    candidates = _steps(folder)
    problem = None
    for candidate in reversed(candidates):
        try:
            return _read(candidate)
        except CheckpointCorrupt as error:
            warn(f"{error} The one before it is tried.")
            problem = error
    if problem is not None:
        raise CheckpointCorrupt(f"none of the {len(candidates)} checkpoints in {folder} is whole.") from problem
    return None


def packed(state: object, tensors: dict[str, Tensor], owner: str) -> object:
    """``state`` as JSON holds it, its tensors moved into ``tensors``; :func:`unpacked` is its inverse.

    Args:
        state: tensors, numbers, texts, None, and lists, tuples and dicts of them.
        tensors: is added to.
        owner: whose state it is, for an error.

    Raises:
        CheckpointError: for anything else, which a checkpoint without code cannot hold.
    """
    if state is None or isinstance(state, bool | int | float | str):
        return state
    if isinstance(state, Tensor):
        name = str(len(tensors))
        tensors[name] = state
        return {"tensor": name}
    if isinstance(state, list | tuple):
        return {"tuple" if isinstance(state, tuple) else "list": [packed(value, tensors, owner) for value in state]}
    if isinstance(state, dict):
        return {"dict": [[packed(part, tensors, owner) for part in item] for item in state.items()]}
    raise CheckpointError(
        f"the state of {owner} holds a {type(state).__name__}; a checkpoint takes tensors, numbers, texts, None, and "
        "lists, tuples and dicts of them."
    )


def unpacked(plain: object, tensors: dict[str, Tensor]) -> Any:
    """What :func:`packed` was given."""
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {unpacked(key, tensors): unpacked(part, tensors) for key, part in value}
    parts = [unpacked(part, tensors) for part in value]
    return tuple(parts) if kind == "tuple" else parts


def _read(path: Path) -> Checkpoint:
    try:
        with open(path / "state.json", "rb") as file:
            text = file.read(_LARGEST_STATE)
        own = path / "state.sha256"
        if own.exists() and own.read_bytes() != hashlib.sha256(text).hexdigest().encode():
            raise CheckpointCorrupt(f"{path}/state.json is not what was written (its SHA-256 differs).")
        state = json.loads(text)
        version, hashes, step = state["format"], state["sha256"], state["step"]
        if not own.exists() and version > 2:
            raise CheckpointCorrupt(f"{path}/state.sha256 is missing.")
        if not isinstance(step, int) or not isinstance(hashes, dict):
            raise CheckpointCorrupt(f"{path}/state.json holds no step, or no hashes.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{path}/state.json cannot be read: {error}.") from error
    if not isinstance(version, int) or version > FORMAT:
        raise CheckpointVersionError(f"{path} has format {version}; this sdeflow reads up to {FORMAT}.")
    tensors = {}
    for name, expected in hashes.items():
        if not name.isidentifier():
            raise CheckpointCorrupt(f"{path}/state.json names a file {name!r}.")
        try:
            data = _bytes_of(path / f"{name}.safetensors")
            if hashlib.sha256(data).hexdigest() != expected:
                raise CheckpointCorrupt(f"{path}/{name}.safetensors is not what was written (its SHA-256 differs).")
            tensors[name] = load_tensors(data)
        except (OSError, SafetensorError) as error:
            raise CheckpointCorrupt(f"{path}/{name}.safetensors cannot be read: {error}.") from error
    for group in ("weights", "average", "optimiser"):
        for key, value in tensors.get(group, {}).items():
            learned = not key.startswith("null.")  # what stands for no condition may be NaN
            if learned and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise CheckpointCorrupt(f"{path}: {key} of the {group} is not finite.")
    return state, tensors


def _of_their_own(group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each with memory of its own: tied weights share theirs, which safetensors refuses."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, value in group.items():
        here = value.detach().cpu().contiguous()
        found[key] = here.clone() if here.untyped_storage().data_ptr() in taken else here
        taken.add(here.untyped_storage().data_ptr())
    return found


def _bytes_of(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_FILE:
        raise CheckpointCorrupt(
            f"{path} has {size / 2**30:.0f} GiB, over the {MAX_FILE / 2**30:.0f} that are written and read."
        )
    return path.read_bytes()


def _steps(folder: Path) -> list[Path]:
    """The checkpoints, oldest first; one that was being replaced comes before its replacement."""
    found = (path for path in folder.glob("step-*") if path.is_dir())
    return sorted(found, key=lambda path: (path.stem, path.suffix == ""))


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
