"""What conditions a sample: a tensor (batch, ...) of any dtype, or tuples and dicts of such, one entry for each sample.

Labels (batch,), vectors (batch, d), images, sequences with their masks: whatever a network takes as its third argument.
This module knows how a condition is read, cut into samples and compared; what it means, the network alone knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

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
    "key_of",
    "leaves",
    "mapped",
    "of_samples",
    "picked",
    "samples_of",
]

Condition = Tensor | tuple["Condition", ...] | dict[str, "Condition"]


def checked_condition(y: object, name: str = "y") -> Condition:
    """``y`` as tensors: numbers, arrays and lists of numbers are converted; tuples and dicts are kept.

    Raises:
        DataError: for what is no tensor, and for values that are NaN or infinite.
    """
    if isinstance(y, Mapping):
        if not y:
            raise DataError(f"{name} is an empty dict.")
        return {key: checked_condition(value, f"{name}[{key!r}]") for key, value in y.items()}
    if isinstance(y, tuple):
        if not y:
            raise DataError(f"{name} is an empty tuple.")
        return tuple(checked_condition(value, f"{name}[{i}]") for i, value in enumerate(y))
    if not isinstance(y, Tensor):
        try:
            y = torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{name} must be a tensor (batch, ...), or a tuple or dict of such, not {type(y).__name__}: {error}"
            ) from error
    if (y.is_floating_point() or y.is_complex()) and y.device.type == "cpu" and not bool(torch.isfinite(y).all()):
        bad = (~torch.isfinite(y)).reshape(max(1, len(y) if y.ndim else 1), -1).any(1).nonzero().flatten().tolist()
        raise DataError(f"{name} is not finite in samples {bad[:5]}{' ...' if len(bad) > 5 else ''}.")
    return y


def leaves(y: Condition) -> Iterator[Tensor]:
    """The tensors of a condition, in their order."""
    if isinstance(y, Tensor):
        yield y
    else:
        for part in y.values() if isinstance(y, dict) else y:
            yield from leaves(part)


def mapped(function: Callable[..., Tensor], y: Condition, *others: Condition) -> Condition:
    """``function`` of each tensor, together with those of ``others`` that stand at the same place.

    Raises:
        DataError: where the conditions differ in their structure.
    """
    if isinstance(y, Tensor):
        if not all(isinstance(other, Tensor) for other in others):
            raise _of_other_structure(y, others)
        return function(y, *others)
    if isinstance(y, dict):
        if not all(isinstance(other, dict) and other.keys() == y.keys() for other in others):
            raise _of_other_structure(y, others)
        return {key: mapped(function, value, *(other[key] for other in others)) for key, value in y.items()}
    if not all(isinstance(other, tuple) and len(other) == len(y) for other in others):
        raise _of_other_structure(y, others)
    return tuple(mapped(function, *parts) for parts in zip(y, *others, strict=True))


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


def _of_other_structure(y: Condition, others: tuple[Condition, ...]) -> DataError:
    return DataError(f"conditions of different structure: {described(y)} and {' and '.join(map(described, others))}.")
