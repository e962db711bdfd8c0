r"""Hutch++ (arXiv:2010.09649): the trace in a sketched subspace exactly, the rest by probes.

With Q an orthonormal basis of Jᵀ Ω for random Ω,

    tr J = tr Qᵀ J Q + tr (1 - Q Qᵀ) J (1 - Q Qᵀ).

The first term is computed exactly, the second by probes that are uniform on the sphere of the complement
(arXiv:2301.07825). The estimate is unbiased for every J. It is better than Hutchinson's if S = (J + Jᵀ)/2 is close to
low rank, and worse if its spectrum is flat, because only a third of the products is left for the second term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.numerics.checks import checked_count
from sdeflow.numerics.traces.integral import Integral, Probed, Setting
from sdeflow.numerics.traces.products import dot
from sdeflow.numerics.traces.standard_error import Nodewise


@dataclass(frozen=True)
class HutchPP(Probed):
    """Hutch++: a third of the products for the sketch, a third for the trace within it, a third for the rest.

    Sketch and probes are drawn anew at each node.

    Args:
        probes: the number of products at each node, at least 3. A standard error needs two probes of the rest, so 6.
    """

    probes: int = 6

    def __post_init__(self) -> None:
        checked_count(self.probes, "probes", 3)

    def _integral(self, setting: Setting) -> Integral:
        return _HutchPP(setting, self.probes)


class _HutchPP(Integral):
    draws_per_node = 2

    def __init__(self, setting: Setting, probes: int) -> None:
        super().__init__(setting)
        self._rank = min(probes // 3, self.d)
        self._rest = probes - 2 * (probes // 3)
        self._nodes = Nodewise(self.value, self._rest)

    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        if self._is_new():
            self._probes = self._signs(self._rank), self._normal(self._rest).permute(1, 2, 0)
        signs, probes = self._probes
        sketch = self._products.gradients(output, x, signs).detach()
        # Q needs no derivative: the value is unbiased for every Q, so its derivative is unbiased too.
        q = torch.linalg.qr(sketch.double().permute(1, 2, 0)).Q  # (samples, d, rank)
        # Uniform on the sphere of the complement: a multiple of the identity there adds no variance.
        probes = probes - q @ (q.mT @ probes)
        norm = probes.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        probes = probes * (math.sqrt(self.d - self._rank) / norm)
        vectors = torch.cat([q, probes], dim=2).permute(2, 0, 1)
        gradients = self._products.gradients(output, x, vectors)
        forms = dot(gradients, vectors.to(gradients.dtype))
        within, rest = forms[: self._rank].sum(0), forms[self._rank :]
        # On a sphere of c dimensions the variance of pᵀMp is twice the mean square of the part of Mp orthogonal to p.
        across = gradients[self._rank :].detach().double().permute(1, 2, 0)
        across = across - q @ (q.mT @ across)
        left = across.square().sum((1, 2)) - rest.detach().square().sum(0) / max(1, self.d - self._rank)
        self._nodes.add(float(self.weights[self.node]), 2.0 * left.clamp_min(0.0) / self._rest)
        return within + rest.mean(0)

    def _error(self) -> tuple[Tensor, Tensor]:
        return self._nodes.error()
