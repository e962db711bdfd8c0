"""What a run is compared with when it resumes: everything that its next steps depend on, as JSON holds it.

Functions are told apart by their code, its constants, defaults and closures, and by the values of the global names that
they use; data by a hash of all rows. What cannot be told apart is said in the value itself ("a DataLoader of (2,), not
hashed").
"""

from __future__ import annotations

import functools
import hashlib
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sdeflow.storage import tables_of
from sdeflow.symbolic.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer

    from sdeflow.scores import Score

__all__ = ["differences", "hash_of", "of_optimiser", "of_score", "shown"]

_DIGITS = 16  # of a hash that is shown
_KNOWN_MODULES = ("torch.", "sdeflow.")
_ADDED = frozenset({"network", "processes", "precision", "data"})  # by format 3, or told in other words since


def differences(theirs: dict[str, Any], ours: dict[str, Any], written: int, allow: Iterable[str]) -> list[str]:
    """The names of what differs, but for those in ``allow``.

    Args:
        theirs: the identity in a checkpoint.
        ours: that of the run.
        written: the format of the checkpoint; formats 1 and 2 did not tell functions apart.
        allow: what may differ.
    """
    names = ours.keys() | theirs.keys()
    if written < 3:
        functions = {name for name, value in theirs.items() if value == "a function"}
        names = {name for name in names if name not in _ADDED | functions}
    if written == 1:  # which knew no other objectives
        theirs = {"objective": ours.get("objective"), **theirs}
    return sorted(name for name in names - set(allow) if ours.get(name) != theirs.get(name))


def of_score(score: Score) -> dict[str, Any]:
    """The declaration, the network and the parametrisation."""
    declaration = score.declaration
    expressions = [*declaration.drifts, *declaration.diffusions, *(declaration.path or ())]
    functions = {type(call) for e in expressions for call in e.atoms(Schedule)}
    tables = {
        **tables_of(declaration),
        **{kind.__name__: shown(kind.source) for kind in functions if kind.table is None},
    }
    return {
        "f": str(declaration.f),
        "g": str(declaration.g),
        "T": declaration.T,
        "cutoff": declaration.cutoff,
        "P0": [v for row in declaration.initial_covariance for v in row] if declaration.coupled else declaration.P0,
        "basis": None if score.basis is None else repr(score.basis),
        "schedules": tables,
        "parameters": score.values.fixed,
        "network": shown(score.net),
        "predicts": score.predicts,
        "time": shown(score.time),
    }


def of_optimiser(optimiser: Optimizer, ours: bool, schedule: object) -> dict[str, Any]:
    """The optimiser and the learning rate; ``ours`` is whether it is fit's own Adam."""
    if ours:
        return {"lr": optimiser.param_groups[0]["lr"], "schedule": "cosine" if schedule is None else shown(schedule)}
    groups = [{k: repr(v) for k, v in group.items() if k != "params"} for group in optimiser.param_groups]
    return {"optimiser": type(optimiser).__name__, "groups": groups, "schedule": shown(schedule)}


def shown(value: object) -> Any:
    """``value`` as JSON holds it, the same for equal values; functions, modules and objects with a hash."""
    if value is None or isinstance(value, str | int | float):
        return value
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{name} {hash_of(value)}"


def hash_of(*values: object) -> str:
    """A hash of what ``values`` are made of."""
    digest = hashlib.blake2b()
    for value in values:
        _feed(digest, value, {})
    return digest.hexdigest()[:_DIGITS]


def _feed(digest: hashlib.blake2b, value: object, seen: dict[int, object]) -> None:
    """Adds ``value`` to a hash: numbers and tensors by their bytes, functions by what they compute.

    ``seen`` keeps what was visited, so that no other object gets its id meanwhile.
    """
    digest.update(type(value).__qualname__.encode())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        digest.update(repr(value).encode())
        return
    if isinstance(value, Tensor):
        _feed_tensor(digest, value)
        return
    if isinstance(value, np.ndarray):
        digest.update(repr((value.dtype, value.shape)).encode() + np.ascontiguousarray(value).tobytes())
        return
    if id(value) in seen:
        return
    seen[id(value)] = value
    for part in _parts(value):
        _feed(digest, part, seen)


def _feed_tensor(digest: hashlib.blake2b, value: Tensor) -> None:
    """A tensor's dtype, shape and bytes, a piece at a time."""
    digest.update(repr((value.dtype, tuple(value.shape))).encode())
    rows = value.detach().reshape(len(value), -1) if value.ndim else value.detach().reshape(1, 1)
    for piece in rows.split(max(1, 2**22 // max(1, rows.shape[1]))):
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)


def _parts(value: object) -> list[object]:
    """What an object is made of, for a hash."""
    if isinstance(value, nn.Module):
        # its configuration and what a user wrote; the weights are compared by their layout
        own = [part for part in value.modules() if not type(part).__module__.startswith(_KNOWN_MODULES)]
        return [type(value).__module__, repr(value), *(_written(part) for part in own)]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        known = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        plain = [part for part in known if not isinstance(part, types.ModuleType | type)]
        return [value.__code__, value.__defaults__, value.__kwdefaults__, cells, plain]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, list(value.co_consts)]
    if isinstance(value, dict):
        return [part for item in sorted(value.items(), key=repr) for part in item]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        return [getattr(value, "__module__", None), value.__name__]
    return [getattr(value, "__dict__", {})]


def _written(module: nn.Module) -> list[object]:
    """The code of a user's module, and its plain attributes and functions."""
    plain = (bool, int, float, str, tuple, types.FunctionType, types.BuiltinFunctionType, functools.partial)
    attributes = {
        name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"
        and isinstance(value, plain)
    }  # fmt: skip
    return [type(module).__qualname__, type(module).forward, attributes]


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  raises where a cell is still empty
    except ValueError:
        return False
    return True
