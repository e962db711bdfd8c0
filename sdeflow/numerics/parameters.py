"""Values of a declaration's parameters: numbers, tensors that broadcast over an event, and nn.Parameters.

A number becomes a constant of the compiled functions. A tensor is read at each call, so a changed value needs
no new derivation, and gradients flow to the tensor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Protocol

import numpy as np
import sympy as sp
import torch
from torch import Tensor, nn

from sdeflow.errors import DeclarationError
from sdeflow.numerics.checks import require_memory
from sdeflow.symbolic.declaration import Declaration

__all__ = ["Declared", "Values"]

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NUMBERS = 10_000  # the least number of values in the kernel's table of one coordinate


class Values(Mapping[sp.Symbol, "float | Tensor"]):
    """Parameter values by symbol, read-only; tensors may change in place.

    Raises:
        DeclarationError: if a value is neither a finite real number nor a finite floating tensor, or if the
            shapes of the tensors do not broadcast.
    """

    def __init__(self, values: Mapping[sp.Symbol, object]) -> None:
        for symbol, value in values.items():
            if isinstance(value, Tensor):
                require_memory(_NUMBERS * value.numel(), f"kernels of {symbol}'s {value.numel():,} entries", 8)
        self._values = {symbol: _checked(value, symbol) for symbol, value in values.items()}
        try:
            self.shape = tuple(torch.broadcast_shapes(*(tuple(v.shape) for v in self.tensors.values())))
        except RuntimeError as error:
            shapes = ", ".join(f"{symbol}: {tuple(v.shape)}" for symbol, v in self.tensors.items())
            raise DeclarationError(f"the tensors of params must broadcast to one event: {shapes}.") from error

    @classmethod
    def of(cls, values: Mapping[sp.Symbol, float | Tensor] | None) -> Values:
        """``values`` as they are if they are Values already; None stands for no parameters."""
        return values if isinstance(values, Values) else cls(values or {})

    def __getitem__(self, symbol: sp.Symbol) -> float | Tensor:
        return self._values[symbol]

    def __iter__(self) -> Iterator[sp.Symbol]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values) or self.keys() != other.keys():
            return False
        return all(_same(value, other[symbol]) for symbol, value in self.items())

    __hash__ = None  # type: ignore[assignment]  # Python's own way to say that there is none

    def __repr__(self) -> str:
        return ", ".join(f"{symbol} = {_shown(value)}" for symbol, value in self.items())

    def __deepcopy__(self, memo: dict) -> Values:
        """The same object, or a copy if it holds learned parameters."""
        if not self.learned:
            return self
        return Values({symbol: copy.deepcopy(value, memo) for symbol, value in self.items()})

    @property
    def tensors(self) -> dict[sp.Symbol, Tensor]:
        """The values that are tensors, by symbol."""
        return {symbol: value for symbol, value in self._values.items() if isinstance(value, Tensor)}

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The values that training may change, by name."""
        return {symbol.name: value for symbol, value in self._values.items() if isinstance(value, nn.Parameter)}

    @property
    def fixed(self) -> dict[str, float | list | str]:
        """The values that training does not change, as JSON; a learned parameter appears by name only."""
        return {
            symbol.name: "learned" if isinstance(v, nn.Parameter) else v.tolist() if isinstance(v, Tensor) else v
            for symbol, v in self._values.items()
        }

    @property
    def needs_grad(self) -> bool:
        """Whether some value requires a gradient now."""
        return torch.is_grad_enabled() and any(value.requires_grad for value in self.tensors.values())

    @property
    def version(self) -> tuple:
        """A tuple that changes when a tensor is written to."""
        return tuple((value.data_ptr(), value._version) for value in self.tensors.values())

    @property
    def numbers(self) -> dict[sp.Symbol, float]:
        """One number for each value, for signs, display and error messages: the median of a tensor."""
        return {
            symbol: value if isinstance(value, float) else float(value.detach().double().flatten().median())
            for symbol, value in self._values.items()
        }

    def entries(self) -> dict[sp.Symbol, float | np.ndarray]:
        """The values as numbers; of tensors each different entry of their common shape, (entries, 1)."""
        tensors = self.tensors
        if not tensors:
            return dict(self._values)
        columns = [v.detach().double().cpu().expand(self.shape).reshape(-1) for v in tensors.values()]
        entries = torch.stack(columns, dim=-1).unique(dim=0).numpy()
        arrays = {symbol: entries[:, i : i + 1] for i, symbol in enumerate(tensors)}
        if len(entries) == 1:
            arrays = {symbol: float(array[0, 0]) for symbol, array in arrays.items()}
        return {**self._values, **arrays}

    def numbers_at(self, entry: int) -> dict[sp.Symbol, float]:
        """The values at one place of the flattened common shape of tensors."""
        return {
            symbol: value
            if isinstance(value, float)
            else float(value.detach().double().expand(self.shape).reshape(-1)[entry])
            for symbol, value in self._values.items()
        }

    def replaced(self, changes: Mapping[sp.Symbol, object]) -> Values:
        """A copy with some values changed."""
        return Values({**self._values, **changes})


class Declared(Protocol):
    """A declaration with values of its parameters: an SDE, a score of it, a model."""

    declaration: Declaration
    values: Values


def _checked(value: object, symbol: sp.Symbol) -> float | Tensor:
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not value.numel() or not bool(torch.isfinite(value).all()):
            raise DeclarationError(
                f"the parameter {symbol} must be a finite floating tensor, not {value}"
                f"{f'; write {symbol}.double()' if value.dtype in _WHOLE else ''}."
            )
        return value
    if isinstance(value, int | sp.Integer) and abs(int(value)).bit_length() > 1024:
        raise DeclarationError(f"the parameter {symbol} must be within double precision, which ends at 1.8e308.")
    if isinstance(value, sp.Expr) and value.is_number and value.is_real:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        several = hasattr(value, "__array__") or isinstance(value, list | tuple)
        hint = f"; write torch.as_tensor({symbol}, dtype=torch.float64) for an array or a list" if several else ""
        raise DeclarationError(f"the parameter {symbol} must be a finite real number or a tensor, not {value!r}{hint}.")
    return float(value)


def _same(ours: float | Tensor, theirs: float | Tensor) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours is theirs or (ours.shape == theirs.shape and bool((ours.cpu() == theirs.cpu()).all()))
    return not isinstance(ours, Tensor) and not isinstance(theirs, Tensor) and ours == theirs


def _shown(value: float | Tensor) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    value = value.detach()
    if value.numel() == 1:
        return f"{float(value):.6g}"
    return f"<{tuple(value.shape)}, {float(value.min()):.4g} to {float(value.max()):.4g}>"
