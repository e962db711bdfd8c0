r"""Hutchinson's estimator: the mean of vᵀ J v over independent probes v with E[v vᵀ] = 1 (arXiv:1810.01367).

With S = (J + Jᵀ)/2 the variance of one form is 2 ‖S‖²_F for normal probes, and 2 (‖S‖²_F - Σ_i s_ii²) for random signs.
With fresh probes at each node the variances w_n² K_nn of the nodes add up; with the same probes at all nodes the errors
themselves add up. The page :doc:`theory_traces` has both sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.numerics.checks import checked_choice, checked_count, checked_flag
from sdeflow.numerics.traces.integral import Integral, Probed, Setting
from sdeflow.numerics.traces.products import dot
from sdeflow.numerics.traces.standard_error import ZERO, Nodewise, Spread, are_few
from sdeflow.numerics.traces.walsh import columns_of, hadamard, padded


@dataclass(frozen=True)
class Hutchinson(Probed):
    """Independent probes.

    Args:
        probes: the number of probes at each node.
        probe: "rademacher" or "gaussian".
        fresh: whether each node has new probes. False keeps the same probes, as adaptive solvers need; the error is
            then much larger.
        distinct: whether distinct columns of a randomised Hadamard matrix replace random signs in low dimensions, where
            all probes could be equal by chance: d <= 3 or (d - 1) (probes - 1) < 10. All its columns together give
            the exact trace.
    """

    probes: int = 4
    probe: str = "rademacher"
    fresh: bool = True
    distinct: bool = True

    def __post_init__(self) -> None:
        checked_count(self.probes, "probes", 1)
        checked_choice(self.probe, "probe", ("rademacher", "gaussian"))
        checked_flag(self.fresh, "fresh")
        checked_flag(self.distinct, "distinct")

    def _integral(self, setting: Setting) -> Integral:
        return _Hutchinson(setting, self)


class _Hutchinson(Integral):
    def __init__(self, setting: Setting, trace: Hutchinson) -> None:
        super().__init__(setting)
        self._trace = trace
        self.draws_per_node = int(trace.fresh)
        self._normals = trace.probe == "gaussian"
        self._distinct = trace.distinct and not self._normals and are_few(self.d, trace.probes)
        self.probes = min(trace.probes, padded(self.d)) if self._distinct else trace.probes
        self._left = 1.0 - self.probes / padded(self.d) if self._distinct else 1.0
        self._vectors: Tensor | None = None
        self._sum = ZERO
        self._nodes = Nodewise(self.value, self.probes)

    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        if self._vectors is None or (self._trace.fresh and self._is_new()):
            self._vectors = self._drawn_vectors(self._drawn or 0)
        forms, parts, spread = [], [], Spread(self._normals)
        for vectors in self._products.chunks(self._vectors, output):
            gradients = self._products.gradients(output, x, vectors)
            forms.append(dot(gradients, vectors.to(gradients.dtype)))
            if self._trace.fresh:
                spread.add(vectors, gradients.detach())
            else:
                parts.append(gradients.detach().double())
        weight = float(self.weights[self.node])
        if self._trace.fresh:
            self._nodes.add(weight, self._left * spread.variance())
        else:
            self._sum = self._sum + weight * torch.cat(parts)
        return torch.cat(forms).mean(0)

    def _drawn_vectors(self, draw: int) -> Tensor:
        if self._normals:
            return self._normal(self.probes)
        if not self._distinct:
            return self._signs(self.probes)
        columns = columns_of(self.d, self.setting.seed, f"{self.setting.purpose} {draw}")
        signs = hadamard(torch.arange(self.d), columns[: self.probes])
        return self._signs() * signs[:, None].to(self.setting.device)

    def _error(self) -> tuple[Tensor, Tensor]:
        if not self._trace.fresh:
            if self._vectors is None:
                raise ValueError("no node has been added.")
            spread = Spread(self._normals)
            spread.add(self._vectors, self._sum)
            self._nodes.add(1.0, self._left * spread.variance())
        return self._nodes.error()
