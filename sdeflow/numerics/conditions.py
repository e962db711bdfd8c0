"""What conditions a sample: a tensor (batch, ...) of any dtype, or tuples and dicts of such, one entry for each sample.

Labels (batch,), vectors (batch, d), images, sequences with their masks: whatever a network takes as its third argument.
This module knows how a condition is read, cut into samples and compared; what it means, the network alone knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sdeflow.errors import DataError

__all__ = [
    "Condition",
    "checked_condition",
    "concatenated",
    "described",
    "distinct",
    "expanded",
    "from_named_leaves",
    "key_of",
    "leaves",
    "mapped",
    "named_leaves",
    "of_samples",
    "on",
    "picked",
    "read_condition",
    "samples_of",
]

Condition = Tensor | tuple["Condition", ...] | dict[str, "Condition"]


def read_condition(y: object, name: str = "y") -> Condition:
    """``y`` as tensors: numbers, arrays and lists of numbers are converted; tuples and dicts are kept.

    Raises:
        DataError: for what is no tensor, and no tuple or dict of such.
    """
    if isinstance(y, Mapping | tuple) and not y:
        raise DataError(f"{name} is an empty {type(y).__name__}.")
    if isinstance(y, Mapping):
        wrong = [key for key in y if not (isinstance(key, str) and key.isidentifier())]
        if wrong:
            raise DataError(f"the keys of {name} must be names, not {wrong[0]!r}.")
        return {key: read_condition(value, f"{name}[{key!r}]") for key, value in y.items()}
    if isinstance(y, tuple):
        return tuple(read_condition(value, f"{name}[{i}]") for i, value in enumerate(y))
    try:
        found = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} must be a tensor (batch, ...), or a tuple or dict of such, not {type(y).__name__}: {error}"
        ) from error
    if found.is_complex() or found.layout != torch.strided or found.is_quantized:
        raise DataError(f"{name} must hold dense real numbers, whole numbers or bools, not {found.dtype}.")
    return found


def checked_condition(y: object, name: str = "y") -> Condition:
    """As :func:`read_condition`, and finite: read once, where users hand conditions in, and not at each call.

    Raises:
        DataError: for what is no condition, and for samples whose condition is not finite.
    """
    y = read_condition(y, name)
    for leaf in leaves(y):
        finite = torch.isfinite(leaf)
        if not bool(finite.all()):
            bad = (~finite).reshape(len(leaf) if leaf.ndim else 1, -1).any(1).nonzero().flatten().tolist()
            raise DataError(f"{name} is not finite in samples {bad[:5]}{' ...' if len(bad) > 5 else ''}.")
    return y


def leaves(y: Condition) -> Iterator[Tensor]:
    """The tensors of a condition, in their order."""
    return (leaf for _, leaf in named_leaves(y))


def named_leaves(y: Condition, name: str = "y") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a condition, each with its place: "y", "y-image", "y-0-mask"; dicts are sorted."""
    if isinstance(y, Tensor):
        yield name, y
    else:
        for key, part in sorted(y.items()) if isinstance(y, dict) else enumerate(y):
            yield from named_leaves(part, f"{name}-{key}")


def from_named_leaves(named: Mapping[str, Tensor], name: str = "y") -> Condition:
    """The condition with these tensors at their places, in whatever order; the inverse of :func:`named_leaves`."""
    if name in named:
        return named[name]
    keys = {place[len(name) + 1 :].split("-")[0] for place in named if place.startswith(f"{name}-")}
    if all(key.isdigit() for key in keys):
        return tuple(from_named_leaves(named, f"{name}-{key}") for key in sorted(keys, key=int))
    return {key: from_named_leaves(named, f"{name}-{key}") for key in sorted(keys)}


def mapped(function: Callable[..., Tensor], y: Condition, *others: Condition) -> Condition:
    """``function`` of each tensor, together with those of ``others`` that stand at the same place.

    Raises:
        DataError: where the conditions differ in their structure.
    """
    alike: list[Any]
    if isinstance(y, Tensor):
        alike = [other for other in others if isinstance(other, Tensor)]
    elif isinstance(y, dict):
        alike = [other for other in others if isinstance(other, dict) and other.keys() == y.keys()]
    else:
        alike = [other for other in others if isinstance(other, tuple) and len(other) == len(y)]
    if len(alike) < len(others):
        shown = " and ".join(map(described, (y, *others)))
        raise DataError(f"conditions of different structure: {shown}.")
    if isinstance(y, Tensor):
        return function(y, *alike)
    if isinstance(y, dict):
        return {key: mapped(function, value, *(other[key] for other in alike)) for key, value in y.items()}
    return tuple(mapped(function, *parts) for parts in zip(y, *alike, strict=True))


def samples_of(y: Condition, name: str = "y") -> int | None:
    """For how many samples ``y`` holds conditions: None where it holds one for all (numbers, or of length 1).

    Raises:
        DataError: for tensors of different lengths.
    """
    lengths = {len(leaf) for leaf in leaves(y) if leaf.ndim and len(leaf) != 1}
    if len(lengths) > 1:
        raise DataError(f"the parts of {name} are of {' and '.join(map(str, sorted(lengths)))} samples.")
    return lengths.pop() if lengths else None


def of_samples(y: Condition, samples: int, name: str = "y") -> Condition:
    """``y`` with one entry for each of ``samples`` samples: what holds for all is expanded.

    Raises:
        DataError: for conditions of another number of samples.
    """
    own = samples_of(y, name)
    if own not in (None, samples):
        raise DataError(f"{name} holds conditions of {own} samples, the batch has {samples}.")
    return mapped(lambda leaf: expanded(leaf, samples), y)


def expanded(leaf: Tensor, samples: int) -> Tensor:
    """A tensor of a condition with ``samples`` entries."""
    return leaf.expand(samples) if not leaf.ndim else leaf.expand(samples, *leaf.shape[1:])


def on(y: Condition, device: torch.device | str) -> Condition:
    """The condition on a device."""
    return mapped(lambda leaf: leaf.to(device), y)


def picked(y: Condition, index: Tensor | slice) -> Condition:
    """The conditions of some samples; what holds for all stays."""
    return mapped(lambda leaf: leaf[index] if leaf.ndim and len(leaf) != 1 else leaf, y)


def concatenated(*parts: Condition) -> Condition:
    """The conditions of several batches, one after the other."""
    return mapped(lambda *tensors: torch.cat(tensors), *parts)


def distinct(y: Condition) -> Tensor | None:
    """A number for each sample, (batch,), the same for samples of one condition; None where one holds for all."""
    if samples_of(y) is None:
        return None
    numbers = [
        torch.unique(leaf.detach().cpu(), return_inverse=True, dim=0)[1]
        for leaf in leaves(y)
        if leaf.ndim and len(leaf) != 1
    ]
    return numbers[0] if len(numbers) == 1 else torch.unique(torch.stack(numbers, 1), return_inverse=True, dim=0)[1]


def key_of(y: Condition) -> tuple:
    """A hashable value that is the same for equal conditions."""
    bits = (leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for leaf in leaves(y))
    described_bits = zip(leaves(y), bits, strict=True)
    return tuple((str(leaf.dtype), tuple(leaf.shape), hashlib.blake2b(b).digest()) for leaf, b in described_bits)


def described(y: Condition) -> str:
    """Shapes and dtypes, for messages."""
    if isinstance(y, Tensor):
        return f"{str(y.dtype).removeprefix('torch.')} {tuple(y.shape)}"
    if isinstance(y, dict):
        return "{" + ", ".join(f"{key!r}: {described(value)}" for key, value in y.items()) + "}"
    return "(" + ", ".join(map(described, y)) + ")"
