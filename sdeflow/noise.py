"""Reproducible normal numbers that no global state, batch size or chunk can change.

Samples are grouped in blocks of 1,024 rows. The numbers of block ``b`` in draw ``k`` depend on
``(seed, purpose, b, k)`` alone, and the first rows of a block do not depend on how many rows are
asked for. So sample ``i`` of a solve is the same for 10 samples as for 10,000, and on every device:
the numbers are drawn on the CPU and moved.

PyTorch's CPU generator reads the lower 32 bits of its seed only. The draws of one block therefore
walk through distinct 32-bit seeds (an odd stride modulo 2^32) from a hashed start.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["BLOCK", "NoiseStream", "kernel_noise", "resolve_seed"]

BLOCK = 1024
_STRIDE = 0x9E3779B1  # odd, so that k -> k * stride is a bijection modulo 2^32


def resolve_seed(seed: int | torch.Generator | None) -> int:
    """The integer behind ``seed``; None and a Generator each give one draw of theirs.

    Raises:
        TypeError: if ``seed`` is not an int, a ``torch.Generator`` or None.
    """
    if seed is None or isinstance(seed, torch.Generator):
        device = "cpu" if seed is None else seed.device
        return int(torch.randint(2**62, (), generator=seed, device=device))
    try:
        return operator.index(None if isinstance(seed, bool) else seed)
    except TypeError:
        raise TypeError(f"seed must be an int, a torch.Generator or None, not {seed!r}") from None


class NoiseStream:
    """Standard normal (or uniform, or Rademacher) draws for ``(seed, purpose)``.

    Args:
        seed: an int, a generator (one draw seeds the stream), or None (the global generator does).
        purpose: a word that separates streams with one seed, such as "prior" and "path".
        first: the number of the first row, for rows from the middle of a larger batch.
    """

    def __init__(self, seed: int | torch.Generator | None, purpose: str, first: int = 0) -> None:
        self.seed = resolve_seed(seed)
        self.purpose = purpose
        self._block, self._skipped = divmod(first, BLOCK)  # whole blocks before, and rows of the first one
        self._generator = torch.Generator()
        self._starts: list[int] = []
        self._draws = 0

    def normal(
        self, shape: tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The next draw of N(0, 1), of the given ``shape`` (batch, *event)."""
        return self._draw(Tensor.normal_, shape, dtype, device)

    def uniform(
        self, shape: tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The next draw of U(0, 1), of the given ``shape`` (batch, *event)."""
        return self._draw(Tensor.uniform_, shape, dtype, device)

    def rademacher(
        self, shape: tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The next draw of independent signs, of the given ``shape`` (batch, *event)."""
        half = self._draw(Tensor.uniform_, shape, torch.float32, "cpu") < 0.5
        return (1.0 - 2.0 * half).to(device=device, dtype=dtype or torch.get_default_dtype())

    def skip(self, draws: int) -> None:
        """Leaves out the next draws."""
        self._draws += draws

    def _start(self, block: int) -> int:
        while len(self._starts) <= block:
            key = f"{self.seed}/{self.purpose}/{self._block + len(self._starts)}".encode()
            self._starts.append(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little"))
        return self._starts[block]

    def _draw(
        self,
        fill: Callable[..., Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> Tensor:
        dtype = dtype or torch.get_default_dtype()
        narrow = dtype in (torch.float16, torch.bfloat16)
        row = 1
        for side in shape[1:]:
            row *= side
        count = self._skipped + shape[0] if shape[0] else 0
        blocks = -(-count // BLOCK)
        # PyTorch fills in groups of 16 and redoes an incomplete last group: whole groups keep
        # the first numbers of a draw independent of its length.
        rest = (count - (blocks - 1) * BLOCK) * row if blocks else 0
        padded = (blocks - 1) * BLOCK * row + -(-rest // 16) * 16 if blocks else 0
        flat = torch.empty(padded, dtype=torch.float32 if narrow else dtype)
        for block, part in enumerate(flat.split(BLOCK * row) if padded else ()):
            self._generator.manual_seed((self._start(block) + self._draws * _STRIDE) % 2**32)
            fill(part, generator=self._generator)
        self._draws += 1
        rows = flat[self._skipped * row : count * row] if count else flat
        return rows.reshape(shape).to(device=device, dtype=dtype)


def kernel_noise(like: Tensor, seed: int | torch.Generator | None) -> Tensor:
    """The standard normal numbers of a kernel's draw, shaped as ``like``; without a seed the global generator's."""
    if seed is None:
        return torch.randn_like(like)
    return NoiseStream(seed, "kernel").normal(tuple(like.shape), like.dtype, like.device)
