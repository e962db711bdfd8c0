r"""Columns of a randomised Hadamard matrix, cycled over the nodes of a trajectory.

The probes are v = D h_c: D random signs, h_c the columns of the Hadamard matrix, d padded to P, a power of two. The
mean of vᵀ J v over all P columns is tr J exactly, for every D. The columns are taken in one random order, ``probes`` of
them at each node, from the first again after the last. With o_nm the number of columns that nodes n and m share, over
probes², and K_nm = 2 <off S_n, off S_m>, off S the part of S = (J + Jᵀ)/2 outside the diagonal,

    variance = Σ_nm w_n w_m K_nm (P o_nm - 1) / (P - 1).

K_nm is estimated from the gradients Jᵀ v of the same products. The page :doc:`theory_traces` says how, and what the
intervals cover.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.numerics.checks import checked_count
from sdeflow.numerics.traces.integral import Integral, Probed, Setting
from sdeflow.numerics.traces.products import dot
from sdeflow.numerics.traces.standard_error import Spread, satterthwaite, unknown
from sdeflow.numerics.traces.walsh import columns_of, hadamard, padded, walsh_hadamard

_GRAM = 2**9  # slots (columns of all nodes) whose mutual products are kept, per sample
_NUGGET, _FEW_COLUMNS = (
    0.05,
    16.0,
)  # the uncorrelated part of K_nn; with _FEW_COLUMNS columns or fewer it is all of K_nn
_ROUNDS = 6.5  # the number of rounds of the columns above which this part becomes smaller
_LENGTHS = [0.5 * 1.25**k for k in range(22)]  # correlation lengths tried, in nodes: 0.5 to 54


@dataclass(frozen=True)
class Hadamard(Probed):
    """Columns of a randomised Hadamard matrix, cycled over the nodes: the best design if nodes x probes exceeds d.

    Args:
        probes: columns at each node. At most the padded dimension is taken, and then the trace is exact.
    """

    probes: int = 4

    def __post_init__(self) -> None:
        checked_count(self.probes, "probes", 1)

    def _integral(self, setting: Setting) -> Integral:
        return _Hadamard(setting, self.probes)


class _Hadamard(Integral):
    def __init__(self, setting: Setting, probes: int) -> None:
        super().__init__(setting)
        self.padded = padded(self.d)
        self.probes = min(probes, self.padded)
        nodes = len(self.weights)
        self._diagonal = self._signs()  # D: (samples, d)
        order = columns_of(self.d, setting.seed, setting.purpose)
        draws = torch.tensor([self._draw_of(node) for node in range(nodes)])
        slots = (draws[:, None] * self.probes + torch.arange(self.probes)) % self.padded
        self.columns = order[slots]
        self._values: list[Tensor] = []
        self._spreads: list[Tensor] = []
        self._gram: list[Tensor] = []
        # Correlations matter when columns return. Without them the error is too large rather than too small.
        few = min(self.probes, 4, _GRAM // nodes)
        rounds = 2 * nodes * self.probes > self.padded > self.probes
        self._few = few if few > 1 and rounds and setting.draws is None else 0

    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        index = torch.arange(self.d, device=output.device)
        signs = hadamard(index, self.columns[self.node].to(output.device))
        vectors = self._diagonal.to(output.dtype) * signs[:, None].to(output.dtype)
        size = max(self._few, self._products.at_once(output))
        parts, spread = [], Spread()
        for first in range(0, self.probes, size):
            chunk = vectors[first : first + size]
            gradients = self._products.gradients(output, x, chunk)
            parts.append(dot(gradients, chunk))
            spread.add(chunk, gradients.detach())
            if self._few and first == 0:
                self._gram.append(self._against_all(gradients[: self._few].detach()))
        forms = torch.cat(parts)
        self._values.append(forms.detach())
        self._spreads.append(spread.variance())
        return forms.mean(0)

    def _against_all(self, gradients: Tensor) -> Tensor:
        """v_bᵀ g of gradients g (few, samples, d) for the first few slots b of every node: (few, samples, slots)."""
        scaled = gradients.double() * self._diagonal
        scaled = torch.nn.functional.pad(scaled, (0, self.padded - self.d))
        return walsh_hadamard(scaled)[..., self.columns[:, : self._few].flatten().to(scaled.device)]

    def _error(self) -> tuple[Tensor, Tensor]:
        if self.probes == self.padded:
            return torch.zeros_like(self.value.detach()), torch.full_like(self.value.detach(), math.inf)
        if self.probes == 1:
            return unknown(self.value)
        forms = torch.stack(self._values).permute(2, 0, 1)  # (samples, nodes, probes)
        weights, P, nodes = self.weights.to(forms.device), self.padded, len(self.weights)
        scale = torch.stack(self._spreads, dim=1) * (P - 1) / P  # K_nn: columns repel each other by 1 / (P - 1)
        own = weights.square() * scale
        alone = (P / self.probes - 1.0) / (P - 1.0)
        variance = alone * own.sum(1)
        if self._few:
            shares = torch.zeros(nodes, P, dtype=torch.float64)
            shares.scatter_(1, self.columns, 1.0 / self.probes)
            overlap = (P * shares @ shares.mT - 1.0) / (P - 1.0)
            smooth = _smoothed(scale, weights)
            correlated = _fitted(smooth, self._correlations(forms.mean(2)), weights)
            coefficients = overlap.to(forms.device) * weights[:, None] * weights
            variance = (correlated * coefficients).sum((1, 2)).clamp_min(0.0) + self._nugget() * variance
        # Fewer than independent probes have (measured): all nodes share the signs, and the length is estimated too.
        dof = satterthwaite(own.sum(1), own.square().sum(1) / (self.probes + 1.5))
        return variance.sqrt(), (dof / max(5, self.probes - 1)).clamp_min(2.0)

    def _nugget(self) -> float:
        """The part of K_nn that is taken as uncorrelated over nodes: smaller, the more often each column was used."""
        rounds = len(self.weights) * self.probes / self.padded
        return min((_ROUNDS / rounds) ** 4, max(_NUGGET, min(1.0, (_FEW_COLUMNS / self.padded) ** 2)))

    def _correlations(self, traces: Tensor) -> Tensor:
        """½ K_nm with noise, (samples, nodes, nodes); NaN where two nodes share all their columns."""
        nodes, few = len(self.weights), self._few
        columns = self.columns[:, :few].flatten()
        gram = torch.stack(self._gram).permute(2, 0, 1, 3).reshape(len(traces), nodes * few, nodes * few)
        # Padding leaves columns that are not orthogonal, so the mean of the diagonal contributes and is subtracted.
        inner = walsh_hadamard(
            torch.nn.functional.pad(torch.ones(self.d, dtype=torch.float64), (0, self.padded - self.d))
        )
        inner = inner[columns[:, None] ^ columns].to(gram.device)
        gram = gram - (traces / self.d).repeat_interleave(few, dim=1)[:, :, None] * inner
        different = (columns[:, None] != columns).to(gram)
        pairs = different.reshape(nodes, few, nodes, few).sum((1, 3))
        products = (gram * gram.mT * different).reshape(-1, nodes, few, nodes, few).sum((2, 4))
        return torch.where(pairs > 0, products / pairs.clamp_min(1.0), math.nan)


def _smoothed(scale: Tensor, weights: Tensor) -> Tensor:
    """K_nn (samples, nodes) with less noise: K_nn step² is smooth over nodes, and is averaged over neighbours.

    Weights may alternate from node to node (Simpson's rule), so the step is their local mean.
    """
    n = torch.arange(len(weights), dtype=torch.float64, device=scale.device)
    window = torch.exp(-0.5 * ((n[:, None] - n) / 1.5).square())
    window = window / window.sum(1, keepdim=True)
    step = (window @ weights.abs()).clamp_min(torch.finfo(torch.float64).tiny).square()
    return (scale * step) @ window.mT / step


def _fitted(scale: Tensor, products: Tensor, weights: Tensor) -> Tensor:
    """K_nm (samples, nodes, nodes) from the scale K_nn and the correlation sech(|n - m| / length) that fits best."""
    nodes = len(weights)
    n = torch.arange(nodes, dtype=torch.float64, device=scale.device)
    distance = (n[:, None] - n).abs()
    amplitude = scale.sqrt()
    outer = amplitude[:, :, None] * amplitude[:, None]
    # The diagonal is left out: it is K_nn for every length.
    trust = (weights[:, None] * weights).square() * ~products[0].isnan() * (distance > 0)
    products = products.nan_to_num()
    best = torch.full((len(scale),), -math.inf, dtype=torch.float64, device=scale.device)
    length = torch.full_like(best, _LENGTHS[0])
    for candidate in _LENGTHS:
        model = outer / torch.cosh((distance / candidate).clamp_max(50.0))
        along = (trust * products * model).sum((1, 2)).clamp_min(0.0)
        size = (trust * model.square()).sum((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
        gain = along.square() / size  # by which the model with its best factor reduces the sum of squares
        better = gain > best
        best, length = torch.where(better, gain, best), torch.where(better, torch.full_like(length, candidate), length)
    return outer / torch.cosh((distance / length[:, None, None]).clamp_max(50.0))
