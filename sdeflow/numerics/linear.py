r"""Linear maps of states, with which each formula of a Gaussian kernel is written once.

A state is (batch, *event). A :class:`Diagonal` map multiplies each coordinate by a number, which may differ between
samples and coordinates. A :class:`Blocks` map mixes the k components of states (batch, k, *event) by k x k matrices.
Both have the same algebra: the square root of I + A Aᵀ, for example, is √(1 + a²) or a Cholesky factor. Each also knows
the layout of states: which dimension holds the samples, and which the components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Blocks", "Diagonal", "Factor", "Linear", "add_multiple", "add_multiples", "levels", "maps_of", "multiplied",
    "per_sample",
]  # fmt: skip


class Linear:
    """A linear map of states, a :class:`Diagonal` or a :class:`Blocks`; maps of different kinds do not combine.

    No abstract base class, because solvers ask ``isinstance`` at every step.

    Args:
        values: the map's numbers; see the two kinds.
    """

    __slots__ = ("values",)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    # ---------------------------------------------------------------- defined by each kind

    @classmethod
    def scaling(cls, numbers: Tensor, like: Tensor) -> Self:
        """The map that multiplies states like ``like`` by ``numbers`` (*event), or by one number for each component."""
        raise NotImplementedError

    @classmethod
    def identity(cls, like: Tensor) -> Self:
        """The identity map of states like ``like``, in float64, without the dimension of the samples."""
        raise NotImplementedError

    @staticmethod
    def offset(numbers: Tensor, like: Tensor, batched: bool) -> Tensor:
        """The numbers of a vector in a shape that broadcasts with states like ``like``.

        Args:
            numbers: of Diagonal (*parameters), of Blocks (k,); if ``batched``, after a dimension of samples or times.
            like: a state (batch, *event).
            batched: whether the first dimension of ``numbers`` holds samples or times.
        """
        raise NotImplementedError

    @classmethod
    def shaped(cls, numbers: Tensor, like: Tensor, batched: bool = True) -> Self:
        """A map of states like ``like``, from numbers as in :meth:`offset`, but (k, k) for Blocks."""
        raise NotImplementedError

    def __matmul__(self, other: Linear) -> Self:
        """The map that applies ``other`` first."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """The map applied to a state (batch, *event), in the state's dtype."""
        raise NotImplementedError

    def times_each(self, numbers: Tensor, like: Tensor) -> Self:
        """The map times a number for each sample, (batch,), for states like ``like``."""
        raise NotImplementedError

    @property
    def T(self) -> Self:
        """The transpose."""
        raise NotImplementedError

    @property
    def inverse(self) -> Self:
        """The inverse."""
        raise NotImplementedError

    @property
    def pseudo_inverse(self) -> Self:
        """An inverse A⁺ on the range of A: A A⁺ A = A, A⁺ A symmetric; what is exactly singular included."""
        raise NotImplementedError

    @property
    def one(self) -> Self:
        """The identity map of the same kind."""
        raise NotImplementedError

    @property
    def root_of_one_plus_gram(self) -> Self:
        """A square root L of I + A Aᵀ = L Lᵀ, lower triangular."""
        raise NotImplementedError

    @property
    def root(self) -> Self:
        """A square root R of a symmetric, positive semidefinite map, R Rᵀ; negative eigenvalues count as 0."""
        raise NotImplementedError

    @property
    def symmetric_root(self) -> Self:
        """The symmetric square root of a symmetric, positive semidefinite map."""
        raise NotImplementedError

    @property
    def diagonal(self) -> Tensor:
        """The entries of the diagonal; for Blocks along the last dimension."""
        raise NotImplementedError

    @property
    def log_size(self) -> Tensor:
        """log|det|^(1/k) of each block, log|a| of each number."""
        raise NotImplementedError

    def log_det(self, event: tuple[int, ...]) -> Tensor:
        """log|det| over an event, (batch,)."""
        raise NotImplementedError

    def trace(self, event: tuple[int, ...]) -> Tensor:
        """The trace over an event, (batch,)."""
        raise NotImplementedError

    def at_each(self, like: Tensor) -> list[Factor]:
        """The maps at each of n times, from ``values`` (n, ...), prepared for states like ``like`` (batch, *event)."""
        raise NotImplementedError

    # ---------------------------------------------------------------- common to both kinds

    def of(self, values: Tensor) -> Self:
        """A map of the same kind."""
        return type(self)(values)

    def __getitem__(self, index: slice) -> Self:
        """The maps of some of the samples or times."""
        return type(self)(self.values[index])

    def __add__(self, other: Linear) -> Self:
        return type(self)(self.values + other.values)

    def __sub__(self, other: Linear) -> Self:
        return type(self)(self.values - other.values)

    @property
    def gram(self) -> Self:
        """A Aᵀ."""
        return self @ self.T

    def scaled(self, factor: Tensor | float) -> Self:
        """The map times a number."""
        return type(self)(self.values * factor)

    def to(self, device: torch.device | str) -> Self:
        """The map on a device."""
        return type(self)(self.values.to(device))


class Diagonal(Linear):
    """The map that multiplies each coordinate by a number.

    Args:
        values: a tensor that broadcasts to the state.
    """

    __slots__ = ()

    @classmethod
    def scaling(cls, numbers: Tensor, like: Tensor) -> Diagonal:
        return cls(numbers)

    @classmethod
    def identity(cls, like: Tensor) -> Diagonal:
        return cls(torch.ones((1,) * (like.ndim - 1), dtype=torch.float64))

    @staticmethod
    def offset(numbers: Tensor, like: Tensor, batched: bool) -> Tensor:
        if not batched:
            return numbers
        own = numbers.shape[1:]
        return numbers.reshape(len(numbers), *(1,) * (like.ndim - 1 - len(own)), *own)

    @classmethod
    def shaped(cls, numbers: Tensor, like: Tensor, batched: bool = True) -> Diagonal:
        return cls(cls.offset(numbers, like, batched))

    def __matmul__(self, other: Linear) -> Diagonal:
        return Diagonal(self.values * other.values)

    def __call__(self, x: Tensor) -> Tensor:
        return self.values.to(x.dtype) * x

    def times_each(self, numbers: Tensor, like: Tensor) -> Diagonal:
        return self.scaled(per_sample(numbers, like))

    @property
    def T(self) -> Diagonal:
        return self

    @property
    def inverse(self) -> Diagonal:
        return Diagonal(1.0 / self.values)

    @property
    def pseudo_inverse(self) -> Diagonal:
        return Diagonal(torch.where(self.values == 0.0, 0.0, 1.0 / self.values))

    @property
    def one(self) -> Diagonal:
        return Diagonal(torch.ones((), dtype=self.values.dtype, device=self.values.device))

    @property
    def root_of_one_plus_gram(self) -> Diagonal:
        return Diagonal(torch.sqrt(1.0 + self.values.square()))

    @property
    def root(self) -> Diagonal:
        return Diagonal(self.values.clamp_min(0.0).sqrt())

    symmetric_root = root

    @property
    def diagonal(self) -> Tensor:
        return self.values

    @property
    def log_size(self) -> Tensor:
        return self.values.abs().log()

    def log_det(self, event: tuple[int, ...]) -> Tensor:
        return _summed(self.log_size, event)

    def trace(self, event: tuple[int, ...]) -> Tensor:
        return _summed(self.values, event)

    def at_each(self, like: Tensor) -> list[Factor]:
        return [*levels(self.values, like)]


class Blocks(Linear):
    """The map that mixes the k components of a coupled state by matrices.

    Args:
        values: (*leading, k, k), whose leading dimensions broadcast to the state without its components' dimension.
    """

    __slots__ = ()

    @classmethod
    def scaling(cls, numbers: Tensor, like: Tensor) -> Blocks:
        padded = numbers.reshape(*numbers.shape, *(1,) * (like.ndim - 1 - numbers.ndim))
        return cls(torch.diag_embed(padded[None].movedim(1, -1)))

    @classmethod
    def identity(cls, like: Tensor) -> Blocks:
        k = like.shape[1]
        return cls(torch.eye(k, dtype=torch.float64).reshape(*(1,) * (like.ndim - 2), k, k))

    @staticmethod
    def offset(numbers: Tensor, like: Tensor, batched: bool) -> Tensor:
        return numbers.reshape(*numbers.shape, *(1,) * (like.ndim - 2))

    @classmethod
    def shaped(cls, numbers: Tensor, like: Tensor, batched: bool = True) -> Blocks:
        if not batched:
            return cls(numbers)
        return cls(numbers.reshape(len(numbers), *(1,) * (like.ndim - 2), *numbers.shape[1:]))

    def __matmul__(self, other: Linear) -> Blocks:
        return Blocks(self.values @ other.values)

    def __call__(self, x: Tensor) -> Tensor:
        values = self.values.to(x.dtype)
        if values.ndim == 2 or all(size == 1 for size in values.shape[1:-2]):
            k = values.shape[-1]
            return torch.matmul(values.reshape(-1, k, k), x.reshape(len(x), k, -1)).reshape(-1, *x.shape[1:])
        return torch.matmul(values, x.movedim(1, -1)[..., None])[..., 0].movedim(-1, 1)

    def times_each(self, numbers: Tensor, like: Tensor) -> Blocks:
        return self.scaled(numbers.reshape(-1, *(1,) * like.ndim))

    @property
    def T(self) -> Blocks:
        return Blocks(self.values.mT)

    @property
    def inverse(self) -> Blocks:
        return Blocks(torch.linalg.inv(self.values))

    @property
    def pseudo_inverse(self) -> Blocks:
        size = self.values.norm(dim=-1, keepdim=True)  # of each row, as components may be of very different sizes
        size = torch.where(size == 0.0, 1.0, size)
        return Blocks(torch.linalg.pinv(self.values / size) / size.mT)

    @property
    def one(self) -> Blocks:
        return Blocks(torch.eye(self.values.shape[-1], dtype=self.values.dtype, device=self.values.device))

    @property
    def root_of_one_plus_gram(self) -> Blocks:
        return Blocks(torch.linalg.cholesky(self.one.values + self.values @ self.values.mT))

    @property
    def root(self) -> Blocks:
        values, vectors = torch.linalg.eigh(self.values)
        return Blocks(vectors * values.clamp_min(0.0).sqrt()[..., None, :])

    @property
    def symmetric_root(self) -> Blocks:
        values, vectors = torch.linalg.eigh(self.values)
        return Blocks((vectors * values.clamp_min(0.0).sqrt()[..., None, :]) @ vectors.mT)

    @property
    def diagonal(self) -> Tensor:
        return self.values.diagonal(dim1=-2, dim2=-1)

    @property
    def log_size(self) -> Tensor:
        return torch.linalg.slogdet(self.values)[1] / self.values.shape[-1]

    def log_det(self, event: tuple[int, ...]) -> Tensor:
        return _summed(torch.linalg.slogdet(self.values)[1], event[1:])

    def trace(self, event: tuple[int, ...]) -> Tensor:
        return _summed(self.diagonal.sum(-1), event[1:])

    def at_each(self, like: Tensor) -> list[Factor]:
        values = self.values.detach().to(dtype=like.dtype, device=like.device)
        k = values.shape[-1]
        return [Blocks(v.reshape(k, k) if v.numel() == k * k else v[None]) for v in values]


def maps_of(coupled: bool) -> type[Diagonal] | type[Blocks]:
    """The kind of the maps of an SDE: Blocks if it is coupled, else Diagonal."""
    return Blocks if coupled else Diagonal


def _summed(entries: Tensor, event: tuple[int, ...]) -> Tensor:
    """The sum of ``entries`` over the coordinates of an event; an entry that broadcasts counts for each coordinate."""
    lead = entries.shape[: max(0, entries.ndim - len(event))]
    full = entries.expand(*lead, *event) if event else entries
    return full.flatten(len(lead)).sum(-1) if event else full


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Numbers (n,) of samples or times in the shape (n, 1, ...), which broadcasts with states like ``like``."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


Factor = float | Tensor | Linear
"""A linear map at one time in its cheapest form: a number, a number for each coordinate, or matrices."""


def levels(values: Tensor, like: Tensor) -> list[float | Tensor]:
    """Numbers or tensors that are added to states like ``like`` at each of n times, from ``values`` (n, ...)."""
    values = values.detach()
    if values.numel() == len(values):
        return values.reshape(-1).tolist()
    return list(values.to(dtype=like.dtype, device=like.device))


def multiplied(factor: Factor, x: Tensor) -> Tensor:
    """A map applied to states (batch, *event)."""
    return factor(x) if isinstance(factor, Linear) else x * factor


def add_multiple(total: Tensor, factor: Factor, x: Tensor) -> Tensor:
    """``total`` plus a map applied to ``x``, in place."""
    if isinstance(factor, float):
        return total.add_(x, alpha=factor)
    return total.add_(factor(x)) if isinstance(factor, Linear) else total.addcmul_(factor, x)


def add_multiples(total: Tensor, factors: Sequence[Factor], xs: Iterable[Tensor]) -> Tensor:
    """``total`` plus each map applied to the tensor of its number in ``xs``, in place."""
    for factor, x in zip(factors, xs, strict=False):
        if isinstance(factor, float):
            total.add_(x, alpha=factor)  # a call for each would cost more than this
        else:
            add_multiple(total, factor, x)
    return total
