"""Batches for training from a tensor, a Dataset or a DataLoader: checked, endless, the same after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from sdeflow.errors import DataError
from sdeflow.numerics.checks import checked_data
from sdeflow.numerics.conditions import Condition, checked_condition, leaves, mapped, on, picked
from sdeflow.numerics.noise import NoiseStream
from sdeflow.training.identity import hash_of

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Batch", "Batches", "SampleData", "Samples"]

_LOOK = 10_000  # rows of a tensor, from which moments are measured
_LOOK_ITEMS = 512  # items of a Dataset

Batch = tuple[Tensor, Condition | None]
Rows = Tensor | ArrayLike
SampleData = Rows | tuple[Rows, Rows | Condition] | Dataset[Any]
"""Samples (n, *event), such with conditions (n, ...), or a Dataset with a length."""
T = TypeVar("T")


class Indexed(Protocol):
    """Samples by index, as a Dataset with a length is."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


class Batches:
    """Batches (x_0, y or None) without end.

    A tensor or a Dataset is shuffled anew in every epoch, from (seed, epoch) alone, so that training can go
    on at any step. A DataLoader brings its own order and batches, and a resumed run starts it from its beginning.

    Args:
        data: (n, *event), a tensor, an array or a list of samples; a tuple (x, y) of such with conditions, a tensor
            (n, ...) or a tuple or dict of such; or a Dataset or DataLoader of samples, alone or as (x, y).
        batch_size: of a tensor or a Dataset, over all processes.
        seed: of the order.
        accelerator: tells the device and this process's share.
        dtype: of the network, to which floating data are converted; None leaves them as they are.

    Raises:
        DataError: for data of another kind, and for an empty one.
    """

    def __init__(
        self,
        data: SampleData | DataLoader[Any],
        batch_size: int,
        seed: int,
        accelerator: Accelerator,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._accelerator, self._dtype = accelerator, dtype
        self._order: _Shuffled | None = None
        if isinstance(data, DataLoader | IterableDataset):
            self._loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=batch_size)
            x, self.first_conditions = _first_batch(self._loader)
        else:
            samples = _indexed(data)
            self._order = _Shuffled(len(samples), batch_size, seed)
            collate = _as_it_is if isinstance(samples, _Rows) else None
            # torch asks for both methods of a Dataset, not for the class
            self._loader = DataLoader(samples, batch_sampler=self._order, collate_fn=collate)  # type: ignore[arg-type]
            x, self.first_conditions = _some_of(samples)
        self.first = x if dtype is None else x.to(dtype)

    def from_step(self, step: int) -> Iterator[Batch]:
        """This process's share of the batches from ``step`` on, each checked."""
        loader = self._loader
        if self._order is not None:
            self._order.first_step = step
        else:
            loader = self._accelerator.prepare_data_loader(loader)
        # Made now: a DataLoader's iterator draws from the global random state when it begins.
        return self._checked(iter(loader), loader, step)

    def _checked(self, iterator: Iterator[object], loader: DataLoader[Any], step: int) -> Iterator[Batch]:
        device, event = self._accelerator.device, tuple(self.first.shape[1:])
        checked_already = isinstance(self._loader.dataset, _Rows)
        while True:
            for batch in iterator:
                x, y = _split(batch)
                if not checked_already:
                    x = checked_data(x, f"a batch at step {step}", self._order.latest if self._order else None)
                if tuple(x.shape[1:]) != event:
                    raise DataError(f"the batch at step {step} has shape {tuple(x.shape)}, samples before it {event}.")
                if self._order is not None:
                    mine = slice(self._accelerator.process_index, None, self._accelerator.num_processes)
                    x, y = x[mine], None if y is None else picked(y, mine)
                yield x.to(device=device, dtype=self._dtype or x.dtype), None if y is None else on(y, device)
                step += 1
            iterator = iter(loader)

    def fingerprint(self) -> str:
        """A text that tells these data from others: a resumed run compares it with that of its own data.

        Of a tensor it is a hash of all rows and of their conditions; of a Dataset one of its length and of the items
        looked at first; of a DataLoader the shape alone.
        """
        samples = self._loader.dataset
        if isinstance(samples, _Rows):
            return f"{tuple(samples.data.shape)} {hash_of(samples.data, samples.conditions)}"
        shape = tuple(self.first.shape[1:])
        if self._order is not None:
            return f"{self._order.n} items of {shape}, of which {len(self.first)} {hash_of(self.first)}"
        return f"a DataLoader of {shape}, not hashed"


def _first_batch(loader: DataLoader[Any]) -> Batch:
    """The first batch of a loader, for shape and scale."""
    for batch in loader:
        x, y = _split(batch)
        return checked_data(x, "the first batch"), y
    raise DataError("the data loader is empty: it brings no batch.")


def _some_of(samples: Indexed) -> Batch:
    """Some samples with their conditions, for shape and scale; the order of training is not disturbed."""
    if isinstance(samples, _Rows):
        seen = slice(None, None, max(1, len(samples) // _LOOK))
        return _split(samples[seen])
    indices = list(range(0, len(samples), max(1, len(samples) // _LOOK_ITEMS)))
    try:
        x, y = _split(default_collate([samples[i] for i in indices]))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the data set's samples are no tensors, or have different shapes: {error}") from error
    return checked_data(x, "the data set", indices), y


class Samples:
    """Samples, with their conditions where they have some, by their indices.

    Args:
        data: a tensor, an array or a list (n, *event); a tuple (x, y) of such with conditions; or a Dataset with a
            length.

    Raises:
        DataError: for data of another kind, and for an empty one.
    """

    def __init__(self, data: SampleData) -> None:
        if isinstance(data, DataLoader | IterableDataset):
            raise DataError(
                f"samples are needed by their indices, which a {type(data).__name__} has not: pass a tensor, (x, y) or "
                "a Dataset."
            )
        self._data = _indexed(data)

    def __len__(self) -> int:
        return len(self._data)

    def take(self, indices: list[int], dtype: torch.dtype | None = None) -> Batch:
        """The samples at ``indices``, floating and finite, in ``dtype`` where it is given, and their conditions."""
        if isinstance(self._data, _Rows):
            x, y = _split(self._data[indices])
        else:
            x, y = _split(default_collate([self._data[i] for i in indices]))
            x = checked_data(x, "the data set", indices)
        return x if dtype is None else x.to(dtype), y


def _indexed(data: object) -> Indexed:
    """``data`` as samples by index.

    Raises:
        DataError: for what is none, and for an empty one.
    """
    samples = _Rows(*_with_conditions(data)) if _holds_rows(data) else data
    if not _is_indexed(samples):
        raise DataError(f"data must be a tensor (n, *event), a Dataset or a DataLoader, not {type(data).__name__}.")
    if len(samples) == 0:
        raise DataError("the data set is empty.")
    return samples


def _is_indexed(data: object) -> TypeGuard[Indexed]:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping)


def _holds_rows(data: object) -> bool:
    """Whether ``data`` are samples side by side; a list of pairs (x, y) is a Dataset."""
    if isinstance(data, list):
        return not (data and isinstance(data[0], tuple))
    return isinstance(data, Tensor | tuple) or hasattr(data, "__array__")


def _with_conditions(data: object) -> Batch:
    """Samples, and their conditions where ``data`` is a tuple (x, y)."""
    if not isinstance(data, tuple):
        return checked_data(data), None
    if len(data) != 2:
        raise DataError(
            f"data that is a tuple is (x, y), samples and their conditions, and has {len(data)} parts here; several "
            "conditions are a tuple of their own, (x, (y, z))."
        )
    x, y = checked_data(data[0], "x of the data (x, y)"), checked_condition(data[1], "y of the data (x, y)")
    for leaf in leaves(y):
        if not leaf.ndim or len(leaf) != len(x):
            raise DataError(
                f"data (x, y) has {len(x)} samples and a condition of shape {tuple(leaf.shape)}: one for each, please."
            )
    return x, y


class _Rows(Dataset[Tensor | tuple[Tensor, Condition]]):
    """Rows of a tensor, and of their conditions, a batch of indices at once."""

    def __init__(self, data: Tensor, conditions: Condition | None = None) -> None:
        self.data, self.conditions = data, conditions

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | slice | list[int]) -> Tensor | tuple[Tensor, Condition]:
        if self.conditions is None:
            return self.data[index]
        return self.data[index], mapped(lambda leaf: leaf[index], self.conditions)

    __getitems__ = __getitem__


class _Shuffled(Sampler[list[int]]):
    """Batches of indices, a permutation per epoch from (seed, epoch), from any step on.

    Attributes:
        first_step: where iteration starts.
        latest: the batch given last.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self.first_step = 0
        self.latest: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.n // self.batch_size
        epoch, position = divmod(self.first_step, per_epoch)
        while True:
            level = NoiseStream(self.seed, f"order {epoch}").uniform((1, self.n), torch.float64)[0]
            order = level.argsort(stable=True)
            for i in range(position, per_epoch):
                self.latest = order[i * self.batch_size : (i + 1) * self.batch_size].tolist()
                yield self.latest
            epoch, position = epoch + 1, 0


def _as_it_is(batch: T) -> T:
    return batch


def _split(batch: object) -> Batch:
    """The samples and the conditions of a batch; what a collate function made lists of becomes tuples again."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2) and isinstance(batch[0], Tensor):
        return batch[0], checked_condition(_tuples(batch[1]), "y of a batch") if len(batch) == 2 else None
    what = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}"
    raise DataError(
        f"a batch must be a tensor (batch, *event), alone or with conditions as (x, y), not {what}; several conditions "
        "are a tuple of their own, (x, (y, z))."
    )


def _tuples(y: object) -> object:
    if isinstance(y, Mapping):
        return {key: _tuples(value) for key, value in y.items()}
    return tuple(map(_tuples, y)) if isinstance(y, tuple | list) and not isinstance(y[0], int | float) else y
