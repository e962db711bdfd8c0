r"""A path of Brownian motion that does not depend on the times at which it is evaluated.

W is a function of (seed, row, coordinate, t) alone. Solves with different steps, grids, clocks and methods therefore
follow the same path: their difference is the error of the method, and strong orders can be measured.

For every k the interval [2^k, 2^{k+1}] has its own increment. It is halved towards t, at most 26 times, so the relative
resolution is 2^-26 at every t, for any horizon. Each interval of length h has an increment W ~ N(0, h) and an
independent space-time area H ~ N(0, h/12), with ∫ W dt = h (W/2 + H). Its halves have

    W_l = W/2 + 3H/2 + Z,     W_r = W/2 - 3H/2 - Z,     H_l = H/4 - Z/2 + N/2,     H_r = H/4 - Z/2 - N/2,

with Z ~ N(0, h/16) and N ~ N(0, h/12) (Foster et al. 2020, arXiv:1904.02998), which are counter-based numbers of the
interval. Below the resolution the path is the parabola that is its expectation given W and H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.numerics.checks import checked_count
from sdeflow.numerics.noise import NoiseStream, resolve_seed

__all__ = ["BrownianPath", "BrownianRows"]

_DEPTH = 26  # halvings
_LOWEST = -40  # below 2^-40 the path is one parabola from 0


class BrownianPath:
    """Brownian motion in the SDE's time t, for ``noise=`` of ``reverse.sample`` and ``sde.simulate``.

    The reverse SDE takes the same path backwards in t. Euler-Maruyama, all methods of torchsde and the multistep
    exponential solver follow it. Samplers with another kind of noise (churn, Langevin steps, restarts) refuse it. It
    costs about twenty draws per step, so it is meant for measurements.

    Args:
        seed: the seed of the path; None draws one seed from torch's global generator, once.

    Raises:
        TypeError: if ``seed`` is not an integer, a generator or None.

    >>> import sdeflow
    >>> path = sdeflow.BrownianPath(seed=0)
    >>> W = path.at(0.5, (1000, 2))
    >>> bool((path.at(0.5, (3, 2)) == W[:3]).all()), W.shape
    (True, torch.Size([1000, 2]))
    """

    def __init__(self, seed: int | torch.Generator | None = None) -> None:
        self.seed = resolve_seed(seed)

    def at(self, t: float, shape: tuple[int, ...]) -> Tensor:
        """W(t), of the given ``shape`` (batch, *event), in float64.

        The event is that of the state. If components of a coupled state share noise, it is (coordinates, motions).

        Raises:
            ValueError: if ``t`` is negative or infinite.
        """
        flat = (shape[0], math.prod(shape[1:]))
        return BrownianRows(self.seed).value(t, flat)[0].reshape(shape).clone()

    def rows(self, first: int = 0) -> BrownianRows:
        """The path of rows from number ``first`` on, an integer >= 0."""
        first = checked_count(first, "first", 0)
        return BrownianRows(self.seed, first)

    def __repr__(self) -> str:
        return f"BrownianPath(seed={self.seed})"


@dataclass(frozen=True)
class _Interval:
    """[left, left + h]: W and ∫ W dt at its left end, its increment and its space-time area."""

    left: float
    h: float
    start: Tensor
    integral: Tensor
    W: Tensor
    H: Tensor

    def at(self, t: float) -> tuple[Tensor, Tensor]:
        """W and its integral at t, of the parabola of this interval."""
        u = (t - self.left) / self.h
        W = self.start + u * self.W + (6.0 * u * (1.0 - u)) * self.H
        inner = u * self.start + (0.5 * u * u) * self.W + (u * u * (3.0 - 2.0 * u)) * self.H
        return W, self.integral + self.h * inner

    def half(self, right: bool, z: Tensor, n: Tensor) -> _Interval:
        """The left or the right half, from two standard normal numbers."""
        Z, N, half = math.sqrt(self.h / 16.0) * z, math.sqrt(self.h / 12.0) * n, 0.5 * self.h
        W, H = 0.5 * self.W + 1.5 * self.H + Z, 0.25 * self.H - 0.5 * Z + 0.5 * N
        if not right:
            return _Interval(self.left, half, self.start, self.integral, W, H)
        integral = self.integral + half * (self.start + 0.5 * W + H)
        return _Interval(self.left + half, half, self.start + W, integral, self.W - W, H - N)


class BrownianRows:
    """The values of a path for the rows of one solve; the intervals used last are cached.

    Args:
        seed: the seed of the path.
        first: the number of the first row.
    """

    def __init__(self, seed: int, first: int = 0) -> None:
        self.seed, self.first = seed, first
        self._octaves: dict[int, _Interval] = {}
        self._kept: list[tuple[tuple[int, int, int], _Interval]] = []
        self._shape = (0, 0)

    def value(self, t: float, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """W(t) and its integral from 0, (batch, n) in float64."""
        if not 0.0 <= t < math.inf:
            raise ValueError(f"a Brownian path has times t >= 0, not {t}.")
        if shape != self._shape:
            self._shape, self._octaves, self._kept = shape, {}, []
        k = max(math.frexp(t)[1] - 1, _LOWEST - 1) if t else _LOWEST - 1
        interval, index, kept = self._octave(k), 0, []
        for depth in range(_DEPTH):
            if t == interval.left:
                break
            middle = interval.left + 0.5 * interval.h
            index = 2 * index + (t >= middle)
            name = (k, depth, index)
            if depth < len(self._kept) and self._kept[depth][0] == name:
                interval = self._kept[depth][1]
            else:
                interval = interval.half(t >= middle, *self._drawn(f"{k} {depth} {index // 2}"))
            kept.append((name, interval))
        self._kept = kept
        return interval.at(t)

    def step(self, a: float, b: float, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The increment from a to b and the space-time area in the order from a to b, both divided by √|b - a|.

        They are independent normal numbers, of variance 1 and 1/12.
        """
        (W_a, I_a), (W_b, I_b), h = self.value(a, shape), self.value(b, shape), abs(b - a)
        W = W_b - W_a
        area = math.copysign(1.0, b - a) * (I_b - I_a) / h - W_a - 0.5 * W
        return W / math.sqrt(h), area / math.sqrt(h)

    def _octave(self, k: int) -> _Interval:
        """[2^k, 2^{k+1}], and the first interval from 0."""
        if k not in self._octaves:
            z, n = self._drawn(f"{k}")
            if k < _LOWEST:
                left, h, start, integral = 0.0, 2.0**_LOWEST, torch.zeros_like(z), torch.zeros_like(z)
            else:
                before, left = self._octave(k - 1), 2.0**k
                (start, integral), h = before.at(left), left
            self._octaves[k] = _Interval(left, h, start, integral, math.sqrt(h) * z, math.sqrt(h / 12.0) * n)
        return self._octaves[k]

    def _drawn(self, name: str) -> tuple[Tensor, Tensor]:
        batch, n = self._shape
        drawn = NoiseStream(self.seed, f"brownian {name}", self.first).normal((batch, 2, n), torch.float64)
        return drawn[:, 0], drawn[:, 1]
