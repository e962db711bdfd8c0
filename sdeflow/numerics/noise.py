"""Reproducible random numbers that do not depend on global state, batch size, chunk or device.

Samples are grouped in blocks of 1,024 rows. The numbers of block ``b`` in draw ``k`` depend on
``(seed, purpose, b, k)`` alone, and the first rows of a block do not depend on the number of rows drawn. So sample
``i`` of a solve is the same among 10 samples and among 10,000.

The generator is Philox4x64-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405): a bijection of a 256-bit counter,
given a 128-bit key. The key is a hash of the seed and the purpose. ``b`` and ``k`` are two of the four words of the
counter, so two draws of one stream never share a number, and two streams share one with probability 2^-128.

**Normal numbers** come from Box and Muller's method, a pair from each 64-bit word, with u and θ from its halves:

    z = sqrt(-2 log u) (cos θ, sin θ),      u = (i + 1/2) 2^-32,     |z| <= 6.77.

They are computed on the CPU and then moved, so they are equal on every device. In float32 they equal the numbers of
float64 up to the rounding of u: about 1e-6, and at most 7e-4 where the radius is nearly zero. The log, cos and sin of
another machine may differ in the last digit. **Uniform numbers** are the midpoints of 2^52 cells (2^23 in float32),
never 0 or 1. Random signs are the bits themselves.
"""

from __future__ import annotations

import hashlib
import math
import operator
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["BLOCK", "NoiseStream", "kernel_noise", "key_of", "resolve_seed", "words"]

BLOCK = 1024
_GROUP = 512  # normal numbers are formed in groups: half of each are cosines, half sines
_PIECE = 256  # groups formed at once, in the processor's cache


def resolve_seed(seed: int | torch.Generator | None) -> int:
    """``seed`` as an integer; a Generator gives one draw, and None one draw of the global generator.

    Raises:
        TypeError: if ``seed`` is not an int, a ``torch.Generator`` or None.
    """
    if seed is None or isinstance(seed, torch.Generator):
        device = "cpu" if seed is None else seed.device
        return int(torch.randint(2**62, (), generator=seed, device=device))
    try:
        number = operator.index(seed)
    except TypeError:
        number = None
    if number is None or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, a torch.Generator or None, not {seed!r}")
    return number


class NoiseStream:
    """Standard normal (or uniform, or Rademacher) draws for ``(seed, purpose)``.

    Args:
        seed: an int, a generator (one draw of it seeds the stream), or None (one draw of the global generator).
        purpose: a word that separates streams with the same seed, such as "prior" and "path".
        rows: which rows of a larger batch these are: the number of the first one, or of each, (n,).
    """

    def __init__(self, seed: int | torch.Generator | None, purpose: str, rows: int | Tensor = 0) -> None:
        self.seed = resolve_seed(seed)
        self.purpose = purpose
        first = 0 if isinstance(rows, Tensor) else rows
        self._rows = rows.cpu() if isinstance(rows, Tensor) else None
        self._reach = 0 if self._rows is None or not len(self._rows) else int(self._rows.max()) + 1
        self._block, self._skipped = divmod(first, BLOCK)  # whole blocks before, and rows of the first one
        self._key = key_of(f"{self.seed}/{purpose}")
        self._draws = 0

    def normal(
        self, shape: tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The next draw of N(0, 1), of the given ``shape`` (batch, *event)."""
        return self._draw(_normals, 2, _GROUP, shape, dtype, device)

    def uniform(
        self, shape: tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The next draw of U(0, 1), of the given ``shape`` (batch, *event); never 0 or 1."""
        return self._draw(_uniforms, 1, 1, shape, dtype, device)

    def rademacher(
        self, shape: tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The next draw of independent signs, of the given ``shape`` (batch, *event)."""
        return self._draw(_signs, 64, 64, shape, dtype, device)

    def skip(self, draws: int) -> None:
        """Skips the next ``draws`` draws."""
        self._draws += draws

    def _draw(
        self,
        form: Callable[[np.ndarray, type[np.floating]], np.ndarray],
        density: int,
        group: int,
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> Tensor:
        """Numbers that ``form`` makes from words, ``density`` from each word, in whole groups for each block."""
        dtype, wanted = dtype or torch.get_default_dtype(), self._rows
        if wanted is not None:
            shape = (self._reach, *shape[1:])
        row, count = math.prod(shape[1:]), self._skipped + shape[0] if shape[0] else 0
        drawn = [
            words(self._key, (0, 0, self._draws, self._block + block), -(-rows * row // group) * group // density)
            for block, rows in enumerate(min(BLOCK, count - first) for first in range(0, count, BLOCK))
        ]
        self._draws += 1
        made = form(_joined(drawn), np.float64 if dtype == torch.float64 else np.float32)
        drawn_rows = torch.from_numpy(made[self._skipped * row : count * row].reshape(shape))
        return (drawn_rows if wanted is None else drawn_rows[wanted]).to(device=device, dtype=dtype)


class _Philox(threading.local):
    """A generator for each thread. It keeps no state between calls of :func:`words`."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(0)


_philox = _Philox()


def key_of(name: str) -> tuple[int, int]:
    """A key of Philox: 128 bits of the BLAKE2b hash of ``name``."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def words(key: tuple[int, int], counter: tuple[int, int, int, int], n: int) -> np.ndarray:
    """``n`` words of 64 bits, (n,): four for each value of the counter after ``counter``, whose first word counts."""
    _philox.bits.state = {
        "bit_generator": "Philox", "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
        # NumPy's types ask for arrays; it takes tuples, four times as fast.
        "state": {"counter": counter, "key": key}, "buffer": (0, 0, 0, 0),  # type: ignore[typeddict-item]
    }  # fmt: skip
    return _philox.bits.random_raw(n)


def kernel_noise(like: Tensor, seed: int | torch.Generator | None) -> Tensor:
    """Standard normal numbers for a draw of a kernel, like ``like``; for None, from the global generator."""
    if seed is None:
        return torch.randn_like(like)
    return NoiseStream(seed, "kernel").normal(tuple(like.shape), like.dtype, like.device)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The words of all blocks, with the same byte order on every machine."""
    whole = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint64), *parts])
    return whole.astype("<u8", copy=False)


def _normals(words: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    halves = words.view("<u4").reshape(-1, 2, _GROUP // 2)
    out = np.empty(halves.shape, dtype)
    for first in range(0, len(halves), _PIECE):
        piece, z = halves[first : first + _PIECE], out[first : first + _PIECE]
        radius, angle = piece[:, 0].astype(dtype), piece[:, 1].view("<i4").astype(dtype)
        radius *= dtype(2.0**-32)
        radius += dtype(2.0**-33)
        np.log(radius, out=radius)
        radius *= dtype(-2.0)
        np.sqrt(radius, out=radius)
        angle *= dtype(math.pi * 2.0**-31)
        np.multiply(radius, np.cos(angle), out=z[:, 0])
        np.multiply(radius, np.sin(angle, out=angle), out=z[:, 1])
    return out.reshape(-1)


def _uniforms(words: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    digits = np.finfo(dtype).nmant  # one digit more than is stored, for the half
    whole = words if dtype is np.float64 else words.view("<u4")[1::2]
    out = (whole >> (8 * whole.itemsize - digits)).astype(dtype)
    out += dtype(0.5)
    out *= dtype(2.0**-digits)
    return out


def _signs(words: np.ndarray, dtype: type) -> np.ndarray:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return dtype(1.0) - dtype(2.0) * bits


def mixed_seed(*parts: int) -> int:
    """One seed from several integers."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = (value ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 29
    return value % 2**63
