"""Batches for training from a tensor, a Dataset or a DataLoader: checked, endless, the same after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from sdeflow.errors import DataError
from sdeflow.noise import NoiseStream

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Batch", "Batches", "checked_data", "mixed_seed"]

_LOOK = 10_000  # rows of a tensor, from which moments are measured
_LOOK_ITEMS = 512  # items of a Dataset

Batch = tuple[Tensor, Tensor | None]


class Batches:
    """Batches (x_0, y or None) without end.

    A tensor or a Dataset is shuffled anew in every epoch, from (seed, epoch) alone, so that training can go
    on at any step. A DataLoader brings its own order and batches, and a resumed run starts it from its beginning.

    Args:
        data: (n, *event), or a Dataset or DataLoader of samples, alone or with labels as (x, y).
        batch_size: of a tensor or a Dataset, over all processes.
        seed: of the order.
        accelerator: tells the device and this process's share.

    Raises:
        DataError: for data of another kind, and for an empty one.
    """

    def __init__(
        self, data: Tensor | Dataset | DataLoader, batch_size: int, seed: int, accelerator: Accelerator
    ) -> None:
        self._accelerator = accelerator
        self._order: _Shuffled | None = None
        if isinstance(data, DataLoader | IterableDataset):
            self._loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=batch_size)
        else:
            if isinstance(data, Tensor):
                data = _Rows(checked_data(data))
            elif isinstance(data, Mapping) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
                raise DataError(
                    f"data must be a tensor (n, *event), a Dataset or a DataLoader, not {type(data).__name__}."
                )
            if len(data) == 0:
                raise DataError("the data set is empty.")
            self._order = _Shuffled(len(data), batch_size, seed)
            collate = _as_it_is if isinstance(data, _Rows) else None
            self._loader = DataLoader(data, batch_sampler=self._order, collate_fn=collate)
        self.first, self.first_labels = self._look()

    def from_step(self, step: int) -> Iterator[Batch]:
        """This process's share of the batches from ``step`` on, each checked."""
        loader = self._loader
        if self._order is not None:
            self._order.first_step = step
        else:
            loader = self._accelerator.prepare_data_loader(loader)
        # Made now: a DataLoader's iterator draws from the global random state when it begins.
        return self._checked(iter(loader), loader, step)

    def _checked(self, iterator: Iterator, loader: DataLoader, step: int) -> Iterator[Batch]:
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
                    x, y = x[mine], None if y is None else y[mine]
                yield x.to(device), None if y is None else y.to(device)
                step += 1
            iterator = iter(loader)

    def fingerprint(self) -> list:
        """What JSON can hold of the data, to tell other data from the same: shape and moments of some samples."""
        x = self.first.double()
        return [*self.first.shape, float(f"{float(x.mean()):.9g}"), float(f"{float(x.std(correction=0)):.9g}")]

    def _look(self) -> Batch:
        """Some samples with their labels, for shape and scale; the order of training is not disturbed."""
        dataset = self._loader.dataset
        if isinstance(dataset, _Rows):
            return dataset.data[:: max(1, len(dataset) // _LOOK)], None
        if self._order is None:
            for batch in self._loader:
                x, y = _split(batch)
                return checked_data(x, "the first batch"), y
            raise DataError("the data loader is empty: it brings no batch.")
        indices = list(range(0, len(dataset), max(1, len(dataset) // _LOOK_ITEMS)))
        items = [dataset[i] for i in indices]
        labelled = isinstance(items[0], tuple | list)
        try:
            x = torch.stack([torch.as_tensor(item[0] if labelled else item) for item in items])
            y = torch.stack([torch.as_tensor(item[1]) for item in items]) if labelled and len(items[0]) > 1 else None
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"the data set's samples are no tensors, or have different shapes: {error}") from error
        return checked_data(x, "the data set", indices), y


def checked_data(x: Tensor, what: str = "data", indices: list[int] | None = None) -> Tensor:
    """``x`` if it is a floating, finite tensor (n, *event) with n >= 1.

    Raises:
        DataError: otherwise, naming the samples (by ``indices`` where given).
    """
    if x.ndim < 2 or not len(x):
        raise DataError(f"{what} must be of shape (n, *event) with n >= 1, not {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise DataError(f"{what} must be floating, not {x.dtype}: convert it, and dequantise integer levels.")
    finite = torch.isfinite(x).flatten(1).all(1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        rows = rows if indices is None else [indices[row] for row in rows]
        raise DataError(f"{what} is not finite in samples {rows[:8]}{' ...' if len(rows) > 8 else ''}.")
    return x


def mixed_seed(*parts: int) -> int:
    """One seed from several integers."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = (value ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 29
    return value % 2**63


class _Rows(Dataset):
    """Rows of a tensor, a batch of indices at once."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.data[indices]


class _Shuffled(Sampler):
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


def _as_it_is(batch: Tensor) -> Tensor:
    return batch


def _split(batch: object) -> Batch:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2) and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1] if len(batch) == 2 else None
    raise DataError(f"a batch must be a tensor (batch, *event), alone or with labels, not {type(batch).__name__}.")
