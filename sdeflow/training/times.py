r"""Where training looks: densities p(t) of times on [cutoff, T], drawn in strata.

The objective of a weighting is c ∫ L(t) dt (:mod:`sdeflow.training.weightings`). The loss at a time drawn from p(t) is
divided by p(t), so that p changes the variance alone.

==============  ====================================================================================================
"t"             uniform in t
"log_snr"       uniform in the half-log-SNR
"edm"           log(sigma / alpha) ~ N(-1.2, 1.2²) within the horizon (arXiv:2206.00364)
"importance"    in proportion to the weighting's own integrand at an error of unit variance (arXiv:2101.09258), which
                is "log_snr" for "likelihood" and "t" for "score"
a function      a positive density of t, up to a factor
==============  ====================================================================================================

Every law is constant on cells of t or of the half-log-SNR, so that its density is known exactly, whatever the cells.
"edm" and "importance" are mixed with a thousandth of a uniform law, which bounds the weights in their tails.
The n times of a batch are stratified: u_i = (u + i / n) mod 1 (arXiv:2107.00630).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.errors import DataError, WeightingError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.kinds import AnyKernel
from sdeflow.numerics.checks import checked_choice, checked_numbers
from sdeflow.numerics.noise import NoiseStream
from sdeflow.training.weightings import EDM_MEAN, EDM_STD, Weighting

__all__ = ["NAMES", "TimeLaw", "Times", "WeightedTimes", "default_times", "require_times"]

Times = str | Callable[[Tensor], Tensor]

NAMES = ("t", "log_snr", "edm", "importance")

_BEST = {"likelihood": "log_snr", "score": "t", "edm": "edm"}
_CELLS = 1024
_FLOOR = 1e-3  # the share of a uniform law in "edm" and "importance", so that no time is left out
_INSIDE = 2.0**-40  # no time is an end itself, where rates may be infinite


def default_times(weighting: Weighting, gaussian: bool) -> Times:
    """The law of times in proportion to the weighting's integrand at an error of unit variance."""
    if not gaussian:
        return "t"
    return "importance" if callable(weighting) else _BEST.get(weighting, "importance")


def require_times(times: Times, gaussian: bool) -> None:
    """Raises a ValueError for what is no law of times, or none of an SDE without a Gaussian kernel."""
    if callable(times):
        return
    checked_choice(times, "times", NAMES, "a density of t")
    if not gaussian and times != "t":
        raise _needs_a_log_snr(times)


def _needs_a_log_snr(times: str) -> ValueError:
    return ValueError(f'times="{times}" needs a Gaussian kernel, which this SDE has not; use times="t" or a density.')


class TimeLaw:
    """A density of times that is constant on cells.

    Args:
        edges: (cells + 1,), monotone: times, or half-log-SNRs.
        masses: (cells,), not negative; they need not sum to one.
        kernel: the kernel whose half-log-SNR ``edges`` holds, or None where they are times.
    """

    def __init__(self, edges: Tensor, masses: Tensor, kernel: Kernel | None = None) -> None:
        self._edges = edges.detach().to(torch.float64)
        masses = masses.detach().to(torch.float64)
        self._masses = masses / masses.sum()
        self._cumulated = torch.cat([torch.zeros(1, dtype=torch.float64), self._masses.cumsum(0)])
        self._kernel = kernel

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The times t(u) whose cumulated probability is u (n,) and p(t) there, (n,) each in float64."""
        u = u.clamp(_INSIDE, 1.0 - _INSIDE)
        cell = (torch.searchsorted(self._cumulated, u, right=True) - 1).clamp(0, len(self._masses) - 1)
        left, width, mass = self._edges[cell], self._edges.diff()[cell], self._masses[cell]
        v = left + width * ((u - self._cumulated[cell]) / mass).clamp(0.0, 1.0)
        if self._kernel is None:
            return v, mass / width
        with torch.no_grad():
            t = self._kernel.time_of(v)
        return t, self._in_t(mass / width.abs(), t)

    def density(self, t: Tensor) -> Tensor:
        """p(t) at times (n,), in float64."""
        v = t if self._kernel is None else self._kernel.half_log_snr(t)
        rising = self._edges if self._kernel is None else -self._edges
        cell = torch.searchsorted(rising, v if self._kernel is None else -v, right=True) - 1
        cell = cell.clamp(0, len(self._masses) - 1)
        return self._in_t(self._masses[cell] / self._edges.diff()[cell].abs(), t)

    def _in_t(self, density: Tensor, t: Tensor) -> Tensor:
        if self._kernel is None:
            return density
        with torch.no_grad():
            return density * self._kernel.half_log_snr_rate(t).abs()


class WeightedTimes:
    """Times of training steps, each with the weight of its loss.

    Args:
        times: a name or a density.
        kernel: of the SDE.
        weights: maps times (n,) to the objective's integrand at an error of unit variance.
        share: c.
        gaussian: whether cells and laws may follow the log-SNR, which a Gaussian kernel alone has.

    Attributes:
        total: the objective at an error of unit variance at all times, ∫ weights dt.

    Raises:
        WeightingError: for weights or a density that make no sense, and for a law that never draws times which the
            weighting counts.
        NotAffineError: with ``gaussian``, for a kernel that is not.
    """

    def __init__(
        self, times: Times, kernel: AnyKernel, weights: Callable[[Tensor], Tensor], share: float, gaussian: bool
    ) -> None:
        self._times, self._kernel, self._weights, self._share = times, kernel, weights, share
        self._gaussian = kernel.require_gaussian("a law of times in the log-SNR") if gaussian else None
        self._refresh()

    def draw(self, n: int, noise: NoiseStream) -> tuple[Tensor, Tensor]:
        """n stratified times and c / p(t) there, (n,) each in float64."""
        if self._version != self._kernel.values.version:  # a learned schedule has moved
            self._refresh()
        return self.weighted((noise.uniform((1,), torch.float64) + torch.arange(n, dtype=torch.float64) / n) % 1.0)

    def weighted(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """t(u) and c / p(t) there: the mean over uniform u (n,) of the loss times these is the objective."""
        t, density = self._law(u)
        return t, self._share / density

    @torch.no_grad()
    def _refresh(self) -> None:
        self._version = self._kernel.values.version
        edges = self._cells()
        middles, widths = 0.5 * (edges[1:] + edges[:-1]), edges.diff()
        weights = torch.cat([self._weights(part) for part in middles.split(256)])
        self.total = float((weights * widths).sum())
        if not 0.0 < self.total < float("inf"):
            raise WeightingError(f"the weighting's integral over the times is {self.total:g}: it must be positive.")
        self._law = self._made(edges, weights)
        unseen = (weights > 0) & ~(self._law.density(middles) > 0)
        if bool(unseen.any()):
            first = float(middles[unseen][0])
            named = "this density" if callable(self._times) else f'times="{self._times}"'
            why = "" if callable(self._times) else ", where the log-SNR stands still"
            raise WeightingError(
                f"{named} never draws times near t = {first:.4g}{why}, but the weighting counts them: use "
                'times="t" or "importance".'
            )

    def _cells(self) -> Tensor:
        """Edges of cells of [cutoff, T]: fine in t, and in the half-log-SNR of a Gaussian kernel."""
        first, last = self._kernel.cutoff, self._kernel.T
        edges = torch.linspace(first, last, _CELLS + 1, dtype=torch.float64)
        if self._gaussian is not None:
            levels = _even_levels(self._gaussian, edges[[0, -1]])
            edges = torch.cat([edges, self._gaussian.time_of(levels)]).unique()
            edges = edges[(edges >= first) & (edges <= last)]
        keep = torch.cat([torch.ones(1, dtype=torch.bool), edges.diff() > 1e-14 * last])
        return edges[keep]

    def _made(self, edges: Tensor, weights: Tensor) -> TimeLaw:
        """The law that ``times`` names."""
        ends, middles, widths = edges[[0, -1]], 0.5 * (edges[1:] + edges[:-1]), edges.diff()
        if callable(self._times):
            density = _values(self._times, middles)
            if not bool((torch.isfinite(density) & (density >= 0)).all()) or not float(density.sum()) > 0:
                raise WeightingError("times(t) must be a density: finite, not negative, and positive somewhere.")
            return TimeLaw(edges, density * widths)
        if self._times == "t":
            return TimeLaw(ends, torch.ones(1))
        if self._times == "importance":
            masses = weights * widths
            return TimeLaw(edges, masses / masses.sum() + _FLOOR * widths / (ends[1] - ends[0]))
        if self._gaussian is None:
            raise _needs_a_log_snr(self._times)
        if self._times == "log_snr":
            return TimeLaw(self._gaussian.half_log_snr(ends), torch.ones(1), self._gaussian)
        levels = _even_levels(self._gaussian, ends)
        masses = _normal_masses((-levels - EDM_MEAN) / EDM_STD)
        return TimeLaw(levels, masses / masses.sum().clamp_min(1e-300) + _FLOOR / _CELLS, self._gaussian)


def _even_levels(kernel: Kernel, ends: Tensor) -> Tensor:
    """Half-log-SNRs at even distances, from that at the first of two times to that at the second."""
    high, low = kernel.half_log_snr(ends).tolist()
    return torch.linspace(high, low, _CELLS + 1, dtype=torch.float64)


def _values(density: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The values of a density at times (n,)."""
    try:
        values = checked_numbers(density(t), "times(t)")
    except DataError as error:
        raise WeightingError(str(error)) from error
    if values.ndim and values.shape != t.shape:
        raise WeightingError(f"times(t) returned shape {tuple(values.shape)} for times of shape {tuple(t.shape)}.")
    return values.expand_as(t)


def _normal_masses(z: Tensor) -> Tensor:
    """The masses of a standard normal variable between rising points, in the tails too."""
    low, high = z[:-1], z[1:]
    upper = low + high > 0  # by symmetry both ends lie in the lower tail, where nothing cancels
    low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
    return torch.special.ndtr(high) - torch.special.ndtr(low)
