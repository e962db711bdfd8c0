r"""The arguments of users, checked in one place: states, times, x_0, dtypes, shapes and counts.

Every public function reads its arguments here, so that one rule holds everywhere:

    ==========================  =============================================================================
    a state                     is read as
    ==========================  =============================================================================
    floating tensor             itself: float16, bfloat16, float32 or float64, with its graph
    floating NumPy array        a tensor of its dtype (of the network's, where a network is asked)
    number, list of numbers     a tensor of torch's default dtype (of the network's, where a network is asked)
    integers, in any form       an error (except for one number): they are mostly grey levels, which need a scale
    float128, sparse, masked    an error that says what to write
    bool, complex, text, other  an error
    ==========================  =============================================================================

Data and x_0 of a solve must be finite. States at which a law returns its moments, draws, density or score must not be
NaN. A score itself does not check its input, because solvers call it at each step: for NaN it returns NaN, and the
solver reports the rows and the time.

The dtype of a tensor is the user's choice. If a network has another dtype, an error says what to write.

**Times** are a number for all samples, or one for each, (batch,), and become float64. If a time is NaN or outside of
the range on which the result is defined, a :class:`~sdeflow.errors.ScheduleError` names the range. Times on an
accelerator are not read back, because this would make it wait: times outside become NaN there, and so do the results.

**x_0** beside x_t has the shape of x_t, or is one for all samples: (1, *event) or a number. Nothing else is broadcast.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Callable, Iterable
from functools import cache
from numbers import Real
from typing import Literal, SupportsIndex, TypeGuard, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import DataError, ScheduleError, TooLargeError

Given = TypeVar("Given")
Choice = TypeVar("Choice", bound="str | None")

__all__ = [
    "checked_choice",
    "checked_count",
    "checked_dtype",
    "checked_finite",
    "checked_flag",
    "checked_images",
    "checked_methods",
    "checked_names",
    "checked_noise",
    "checked_numbers",
    "checked_point",
    "checked_range",
    "checked_real",
    "checked_shape",
    "checked_start",
    "checked_state",
    "checked_states",
    "checked_time",
    "checked_within",
    "require_memory",
]

_LEAST_MEMORY = 2**36  # bytes
_MOST = 2**62  # the largest count
OF_PRIOR = (("sample", "log_prob"), "sdeflow.Gaussian(mean, std)", any)  # one of them is enough
OF_BASIS = (("forward", "inverse"), "sdeflow.basis.DCT(2)")
FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

# -------------------------------------------------------------------- states


def checked_state(x: object, name: str = "x", sides: int = 2, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` as a floating tensor (batch, *event), by the table of this module. It may hold values that are not finite.

    Args:
        x: the user's argument.
        name: its name in messages.
        sides: the least number of dims: 2 if an event has at least one dim, 1 if an event may be a number, 0 if one
            number may stand for all states.
        dtype: the dtype for arrays, lists and numbers, such as that of a network.

    Raises:
        DataError: if ``x`` is not a state.
    """
    if not isinstance(x, Tensor):
        x = _converted(x, name, dtype)
    _require_dense(x, name)
    if x.dtype not in FLOATING:
        raise DataError(f"{name} must be floating, not {x.dtype}: {_remedy(x.dtype, name)}.")
    if x.ndim < sides:
        wanted = "(batch, *event)" if sides > 1 else "(batch,) or (batch, *event)"
        hint = f"; one sample is {name}[None], samples that are numbers are {name}[:, None]" if x.ndim else ""
        raise DataError(f"{name} must be a tensor {wanted}, not of shape {tuple(x.shape)}{hint}.")
    return x


def checked_states(x: object, name: str = "x", dtype: torch.dtype | None = None) -> Tensor:
    """As :func:`checked_state`, and finite. It is called once before a solve, not at each call of a score.

    Raises:
        DataError: if ``x`` is not a state, or if samples are not finite, with their rows.
    """
    return checked_finite(checked_state(x, name, dtype=dtype), name)


def checked_point(x: object, name: str = "x", sides: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """As :func:`checked_state`, and not NaN: for the moments, draws, density or score of a law.

    An infinite x is a state of density 0. States on an accelerator are not checked, because this would make it wait;
    NaN gives NaN there.
    """
    x = checked_state(x, name, sides, dtype)
    if x.device.type == "cpu" and bool(x.isnan().any()):
        raise DataError(f"{name} holds NaN{_in_samples(x.isnan())}.")
    return x


def checked_images(images: object) -> Tensor:
    """Integer images (batch, *event), a tensor, an array or a list, as an integer tensor.

    Raises:
        DataError: if ``images`` is anything else.
    """
    if not isinstance(images, Tensor):
        array = _as_array(images)
        if array is not None and array.dtype.kind in "iu":
            images = torch.from_numpy(array.astype(np.int64))
    if not isinstance(images, Tensor) or images.dtype.is_floating_point or images.dtype == torch.bool:
        given = getattr(images, "dtype", type(images).__name__)
        raise DataError(f"images must be integers (batch, *event), not {given}; for floating states use log_prob.")
    if images.is_complex() or images.ndim < 2:
        raise DataError(f"images must be integers (batch, *event), not {images.dtype} of shape {tuple(images.shape)}.")
    return images


def checked_finite(x: Tensor, name: str = "x", rows: list[int] | None = None) -> Tensor:
    """``x``, if it is finite.

    Raises:
        DataError: if not. It names the samples (by ``rows``, if given).
    """
    if x.is_meta:
        raise DataError(f'{name} is on the device "meta", which holds no numbers: pass a tensor that does.')
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        raise DataError(f"{name} is not finite{_in_samples(~finite, rows)}.")
    return x


def _in_samples(wrong: Tensor, rows: list[int] | None = None) -> str:
    """A clause that names the samples with wrong values; empty if there are no samples."""
    if wrong.ndim < 2:
        return ""
    bad = wrong.flatten(1).any(1).nonzero().flatten().tolist()
    bad = bad if rows is None else [rows[row] for row in bad]
    return f" in samples {bad[:8]}{' ...' if len(bad) > 8 else ''}"


def checked_start(x_0: object, x_t: Tensor, name: str = "x_0", beside: str = "x_t") -> Tensor:
    """``x_0`` as a tensor of the shape of ``x_t`` (batch, *event).

    It may be one for all samples, (1, *event) or a number.

    Raises:
        DataError: for any other shape; the message names both shapes.
    """
    x_0 = checked_point(x_0, name, 0, torch.float64)  # numbers keep their digits
    if x_0.shape == x_t.shape:
        return x_0
    if not x_0.ndim or (x_0.ndim == x_t.ndim and len(x_0) == 1 and x_0.shape[1:] == x_t.shape[1:]):
        return x_0.expand(x_t.shape)
    raise DataError(
        f"{name} is of shape {tuple(x_0.shape)} and {beside} of {tuple(x_t.shape)}: {name} must have the same shape, "
        f"or be one for all samples, of shape {(1, *x_t.shape[1:])} or a number."
    )


def checked_noise(noise: object, x: Tensor) -> Tensor:
    """``noise`` for states like ``x``, of exactly its shape, in its dtype.

    Raises:
        DataError: for any other shape.
    """
    noise = checked_point(noise, "noise", 0)
    if noise.shape != x.shape:
        raise DataError(f"noise is of shape {tuple(noise.shape)}, and must be shaped as x_0, {tuple(x.shape)}.")
    return noise.to(dtype=x.dtype, device=x.device)


def _converted(x: object, name: str, dtype: torch.dtype | None) -> Tensor:
    """An array, a list or a number as a floating tensor.

    Raises:
        DataError: for anything else.
    """
    if isinstance(x, list | tuple) and any(isinstance(part, Tensor) for part in x):
        try:
            return torch.stack([checked_state(part, name, 0, dtype) for part in x])
        except RuntimeError as error:
            raise DataError(f"{name} is a list of tensors that do not fit together: {error}") from error
    plain = isinstance(x, Real | list | tuple)
    wanted = f"{name} must be a tensor, an array or a list of numbers, not {_shown(x)}"
    if not plain and not hasattr(x, "__array__"):
        raise DataError(f"{wanted}.")
    array = _as_array(x)
    if array is None:
        raise DataError(f"{wanted} (its parts are of different shapes or kinds).")
    kind = array.dtype.kind
    if kind in "bc" or (kind in "iu" and not isinstance(x, Real)):
        remedy = "write 1.0 for 1" if isinstance(x, list | tuple) and kind in "iu" else _remedy(array.dtype, name)
        raise DataError(f"{name} must be floating, not {array.dtype}: {remedy}.")
    if kind == "f" and array.dtype.itemsize > 8:
        raise DataError(f"{name} is of {array.dtype}, which PyTorch does not have: write {name}.astype('float64').")
    if kind not in "fiu":
        raise DataError(f"{wanted}.")
    if plain:
        return torch.tensor(array.astype(np.float64), dtype=dtype or torch.get_default_dtype())
    native = array.astype(array.dtype.newbyteorder("="))  # a copy, which PyTorch may write to
    return torch.from_numpy(native).to(dtype) if dtype is not None else torch.from_numpy(native)


def _as_array(x: object) -> np.ndarray | None:
    """``x`` as an array; None for a ragged list, and for a list that mixes bool with numbers."""
    if _holds_masked(x):
        raise DataError("a masked array has entries without a value: pass array.filled(value), with one for these.")
    try:
        array = np.asarray(x)
        return None if array.dtype.kind in "fiuO" and _holds_bool(x) else array
    except ValueError:
        return None


def _holds_masked(x: object) -> bool:
    """Whether a (nested) list holds a masked array, whose mask NumPy would drop silently."""
    if isinstance(x, list | tuple):
        return any(map(_holds_masked, x))
    return isinstance(x, np.ma.MaskedArray)


def _require_dense(x: Tensor, name: str) -> None:
    """Raises a DataError for a sparse or nested tensor, for which few operations are defined."""
    if x.layout != torch.strided or x.is_nested:
        to = "torch.nested.to_padded_tensor(..., 0.0)" if x.is_nested else f"{name}.to_dense()"
        raise DataError(f"{name} is a {'nested' if x.is_nested else 'sparse'} tensor: write {to}.")


def _holds_bool(x: object) -> bool:
    """Whether a (nested) list holds True or False, which NumPy reads as 1 and 0 among numbers."""
    if isinstance(x, list | tuple):
        return any(map(_holds_bool, x))
    return isinstance(x, bool | np.bool_) or (isinstance(x, Tensor) and x.dtype == torch.bool)


def _remedy(dtype: object, name: str) -> str:
    """The advice for a state whose dtype is not floating."""
    if "complex" in str(dtype):
        return "states are real; declare real and imaginary part as two components"
    convert = f"convert it ({name}.float() of a tensor, {name}.astype('float32') of an array)"
    return f"{convert}, and dequantise integer levels (bits_per_dim)" if "int" in str(dtype) else convert


def _shown(x: object) -> str:
    """``x`` as text for messages."""
    text = repr(x)
    return text if len(text) <= 80 else f"{text[:76]} ..."


# -------------------------------------------------------------------- times


def checked_time(t: object, batch: int | None, low: float, high: float, what: str) -> Tensor:
    """``t`` as float64, () or (batch,), within [low, high], by the rules of this module.

    Args:
        t: a number, or one for each sample.
        batch: the number of samples; None if there is one time for all.
        low, high: the range, up to a relative 1e-6.
        what: the statement that the message makes, such as "the kernel is defined for t in [0, T]".

    Raises:
        DataError: if ``t`` is not a time, or has another shape.
        ScheduleError: if a time is outside of the range or NaN.
    """
    t = checked_numbers(t, "t")
    if t.ndim and (t.ndim > 1 or len(t) != batch):
        shapes = "a number" if batch is None else f"a number or of shape (batch,) = ({batch},)"
        raise DataError(f"t must be {shapes}, not {tuple(t.shape)}.")
    return checked_range(t, low, high, what)


def checked_range(t: Tensor, low: float, high: float, what: str) -> Tensor:
    """As :func:`checked_time` for float64 times of any shape."""
    least, most = low * (1.0 - 1e-6), high * (1.0 + 1e-6)
    if t.device.type != "cpu":
        return torch.where((t >= least) & (t <= most), t, math.nan)
    if not t.ndim:
        first = last = float(t.detach())
    elif t.numel():
        first, last = (float(end) for end in torch.aminmax(t.detach()))
    else:
        return t
    if not (first >= least and last <= most):
        asked = f"{first:.6g}" if first == last or math.isnan(first) else f"{first:.6g} to {last:.6g}"
        raise ScheduleError(f"{what} = [{low:.6g}, {high:g}]; asked for {asked}.")
    return t


def checked_numbers(values: object, name: str) -> Tensor:
    """Real numbers of any shape as float64: times, moments, weights. Integers are numbers too.

    Raises:
        DataError: for bool, complex, text and anything else that is not a real number.
    """
    if isinstance(values, Tensor):
        _require_dense(values, name)
        if values.dtype == torch.float64:
            return values
        if values.dtype != torch.bool and not values.is_complex():
            return values.to(torch.float64)
    elif isinstance(values, list | tuple) and any(isinstance(part, Tensor) for part in values):
        parts = [checked_numbers(part, name) for part in values]
        if len({part.shape for part in parts}) == 1:
            return torch.stack(parts)
    elif isinstance(values, list | tuple) or hasattr(values, "__array__"):
        array = _as_array(values)
        if array is not None and array.dtype.kind in "fiuO":
            try:
                return torch.tensor(array.astype(np.float64))  # numbers of SymPy are objects
            except (TypeError, ValueError):
                pass
    elif hasattr(values, "__float__") and not isinstance(values, bool):
        try:
            return torch.tensor(float(values), dtype=torch.float64)
        except TypeError:
            pass  # an expression, not a number
    raise DataError(f"{name} must be a real number or a tensor of them, not {_shown(values)}.")


# -------------------------------------------------------------------- dtypes, shapes, options


def checked_dtype(dtype: object, name: str = "dtype") -> torch.dtype | None:
    """A floating dtype of states; None stays None.

    Raises:
        TypeError: if ``dtype`` is not a ``torch.dtype``.
        DataError: if states cannot have this dtype.
    """
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, such as torch.float32, not {dtype!r}.")
    if dtype not in FLOATING:
        allowed = ", ".join(sorted(map(str, FLOATING)))
        raise DataError(f"{name} must be a floating dtype ({allowed}), not {dtype}.")
    return dtype


def checked_shape(shape: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """``shape`` as (batch, *event) of non-negative integers, with at least one event dimension."""
    sizes: tuple[int, ...] = ()
    with contextlib.suppress(TypeError):
        if not any(isinstance(n, bool) for n in shape):
            sizes = tuple(operator.index(n) for n in shape)
    if len(sizes) < 2 or sizes[0] < 0 or min(sizes[1:]) < 1:
        wanted = "(batch, *event) of integers, batch >= 0 and at least one event dim"
        raise ValueError(f"shape must be {wanted}, not {shape!r}.")
    require_memory(math.prod(sizes), f"states of shape {sizes}")
    return sizes


def require_memory(numbers: int, what: str, size: int = 4) -> None:
    """Raises a TooLargeError if ``numbers`` of ``size`` bytes each do not fit into the memory of this machine."""
    if numbers * size > _memory():
        raise TooLargeError(
            f"{what} need {numbers * size / 2**30:,.0f} GiB, over {_memory() / 2**30:,.0f} GiB of memory."
        )


@cache
def _memory() -> int:
    """The most bytes of a state: the memory of this machine, and at least 64 GiB for an accelerator."""
    try:
        return max(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _LEAST_MEMORY)
    except (AttributeError, ValueError, OSError):  # not POSIX
        return 2**40


def checked_choice(value: object, name: str, choices: Iterable[Choice], other: str = "") -> Choice:
    """One of the names in ``choices``; the message adds ``other``, which says what is allowed besides names.

    Raises:
        ValueError: for anything else.
    """
    known = tuple(choices)
    if (value is None or isinstance(value, str)) and value in known:  # an array is not compared
        return known[known.index(value)]
    listed = [f'"{choice}"' for choice in known if choice is not None] + ["None"] * (None in known)
    listed += [other] * bool(other)
    wanted = f"{', '.join(listed[:-1])} or {listed[-1]}" if len(listed) > 1 else listed[0]
    raise ValueError(f"{name} must be {wanted}, not {_shown(value)}.")


@overload
def checked_flag(value: object, name: str, optional: Literal[False] = False) -> bool: ...


@overload
def checked_flag(value: object, name: str, optional: Literal[True]) -> bool | None: ...


def checked_flag(value: object, name: str, optional: bool = False) -> bool | None:
    """True or False, of Python or NumPy; with ``optional`` also None.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if value is None and optional:
        return None
    raise TypeError(f"{name} must be True{', False or None' if optional else ' or False'}, not {_shown(value)}.")


def is_real(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number: of Python or NumPy, or a fraction. It then counts as a float."""
    return isinstance(value, Real) and not isinstance(value, bool)


def checked_real(value: object, name: str, wanted: str, holds: Callable[[float], bool]) -> float:
    """A real number for which ``holds`` is true; ``wanted`` is this condition in words. ``holds`` is false for NaN.

    Raises:
        ValueError: for anything else.
    """
    if is_real(value) and holds(value):
        return value
    raise ValueError(f"{name} must be {wanted}, not {_shown(value)}.")


def checked_within(value: object, name: str, low: float, high: float) -> float:
    """A real number with low < value < high.

    Raises:
        ValueError: for anything else.
    """
    wanted = "positive and finite" if (low, high) == (0.0, math.inf) else f"between {low:g} and {high:g}"
    return checked_real(value, name, wanted, lambda number: low < number < high)


def checked_methods(
    value: Given, name: str, methods: tuple[str, ...], example: str, enough: Callable[[Iterable], bool] = all
) -> Given:
    """An object that has all (or any) of ``methods``, such as a prior or a basis; None stays None.

    Raises:
        TypeError: for anything else, also for a class instead of an object.
    """
    found = (callable(getattr(value, method, None)) for method in methods)
    if value is None or (not isinstance(value, type) and enough(found)):
        return value
    raise TypeError(f"{name} must be an object with {' and '.join(methods)}, such as {example}, not {_shown(value)}.")


def checked_names(names: object, name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Some of the ``known`` names.

    Raises:
        ValueError: for a name that is not known, and for what is no list of names.
    """
    known = sorted(known)
    found = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else (names,)
    for each in found:
        if each not in known:
            raise ValueError(f"{name} is a list of names of {', '.join(known)}, and {each!r} is none of them.")
    return found


def checked_count(value: object, name: str, least: int = 1) -> int:
    """An integer of at least ``least``, of Python or NumPy.

    Raises:
        ValueError: for anything else.
        TooLargeError: if it does not fit into 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {_shown(value)}.")
    if value > _MOST:
        raise TooLargeError(f"{name} must be at most 2^62, not {_shown(value)}.")
    return int(value)


def checked_data(x: object, what: str = "data", indices: list[int] | None = None) -> Tensor:
    """``x`` as a floating, finite tensor (n, *event) with n >= 1.

    Raises:
        DataError: if not. It names the samples (by ``indices``, if given).
    """
    data = checked_state(x, what, 0)
    if data.ndim < 2 or not len(data):
        hint = "; samples that are numbers are data[:, None]" if data.ndim == 1 and len(data) else ""
        raise DataError(f"{what} must be of shape (n, *event) with n >= 1, not {tuple(data.shape)}{hint}.")
    return checked_finite(data.clone() if data.is_inference() else data, what, indices)
