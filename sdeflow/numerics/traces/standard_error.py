r"""Standard errors of trace estimates and their degrees of freedom.

Each design has draws that are independent: with fixed probes the whole integrals, with fresh ones the forms at each
node. Their spread gives the variance, with Satterthwaite's degrees of freedom

    (Σ V_n)² / Σ (V_n² / k_n)

for a sum of variances V_n of k_n degrees of freedom each. One probe has no spread, so its standard error is NaN. The
page :doc:`theory_traces` has the measured coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ZERO = torch.zeros((), dtype=torch.float64)  # the start of a sum, on any device


def widening(dof: Tensor) -> Tensor:
    """Half of Student's two-sided 95.45 % quantile: 1 for many degrees of freedom, 2.3 for 2, and 7 for 1."""
    from scipy.special import stdtrit  # half a second to import

    known = dof.detach().double().clamp(1.0, 1e6).cpu().numpy()
    return 0.5 * torch.as_tensor(stdtrit(known, 0.977249868), dtype=torch.float64, device=dof.device)


def heavy_tails(draws: int) -> float:
    """The factor that widens a bar for the heavy tails of few draws, as measured: 3.3 for 4 draws, 1.25 for 64."""
    return 1.0 + min(6.5 * draws**-0.75, 16.0 / draws)


def total_variance(parts: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
    """The sum of independent estimated variances, and Satterthwaite's degrees of freedom of the sum.

    Args:
        parts: pairs of a variance, a tensor, and its degrees of freedom.
    """
    variance = sum((part for part, _ in parts), ZERO)
    squares = sum((part.square() / (dof + 2.0) for part, dof in parts), ZERO)
    return variance, satterthwaite(variance, squares).clamp_min(min(dof for _, dof in parts))


class Spread:
    """The variance of vᵀJv over probes v, from all coordinates of the gradients Jᵀv.

    For symmetric J half of the variance is Σ_i Var(v_i (Jᵀv)_i) if v holds random signs, and E‖Jᵀv‖² if v is normal.
    For other J these numbers are larger. The spread of the forms vᵀJv has the same mean, but it is much noisier.
    """

    def __init__(self, normals: bool = False) -> None:
        self.normals, self.count = normals, 0
        self.total = self.squares = ZERO

    def add(self, vectors: Tensor, gradients: Tensor) -> None:
        """Adds probes (k, samples, d) and their gradients."""
        products = gradients.double() * vectors if not self.normals else gradients.double()
        self.count += len(vectors)
        self.total = self.total + products.sum(0)
        self.squares = self.squares + products.square().sum((0, 2))

    def variance(self) -> Tensor:
        """The variance of the form of one probe, (samples,); NaN after a single probe."""
        if self.count < 2:
            return self.squares * math.nan
        if self.normals:
            return 2.0 * self.squares / self.count
        apart = self.squares - self.total.square().sum(1) / self.count
        return 2.0 * apart.clamp_min(0.0) / (self.count - 1)


class Nodewise:
    """The error of a sum whose nodes are independent, from the variance of one of k probes at each node.

    Each variance counts with k - ½ degrees of freedom. Forms of rank one have k, but a few random signs do not see all
    of J.
    """

    def __init__(self, like: Tensor, k: int) -> None:
        self.variance = torch.zeros_like(like)
        self.squares = torch.zeros_like(like)
        self.k, self.dof = k, k - 0.5

    def add(self, weight: float, variance: Tensor) -> None:
        """Adds a node: its weight, and the variance (samples,) of one probe there."""
        part = weight**2 * variance / self.k
        self.variance = self.variance + part
        self.squares = self.squares + part.square() / (self.dof + 2.0)

    def error(self) -> tuple[Tensor, Tensor]:
        """The standard error and Satterthwaite's degrees of freedom, (samples,) each."""
        if self.k < 2:
            return unknown(self.variance)
        dof = satterthwaite(self.variance, self.squares).clamp_min(self.dof)
        return self.variance.sqrt(), torch.where(self.variance > 0, dof.clamp_max(heavy_dof(self.k)), dof)


def are_few(d: int, probes: int) -> bool:
    """Whether all probes of random signs are equal, up to a sign of each, with a probability above 1e-3.

    Up to d = 3 there are at most four different probes, and even many draws may miss one of them.
    """
    return probes > 1 and (d <= 3 or (d - 1) * (probes - 1) < 10)


def heavy_dof(probes: int) -> float:
    """Degrees of freedom of a mean of forms vᵀJv, as measured: their tails are heavier than normal ones."""
    return max(min(probes - 0.5, 6.0), probes / 4.0)


def spread_dof(probes: int) -> float:
    """Degrees of freedom of the spread of eight or more forms vᵀJv, as measured.

    On exact mixtures in 4 to 12 dimensions with 8 probes, intervals of 2.5 degrees of freedom cover at least 95 %, and
    those of 3.2 at least 94 %.
    """
    return max(2.5, 0.23 * probes)


def satterthwaite(variance: Tensor, squares: Tensor) -> Tensor:
    """Satterthwaite's (Σ V_n)² / Σ (V_n² / k) from estimates v_n of V_n with k degrees of freedom each.

    Args:
        variance: Σ v_n.
        squares: Σ v_n² / (k + 2). It is an unbiased estimate of Σ V_n² / k, because E v_n² = V_n² (k + 2) / k. The
            expectation of variance² is too large by twice that sum, so 2 is subtracted from the quotient.
    """
    dof = variance.square() / squares.clamp_min(torch.finfo(torch.float64).tiny) - 2.0
    return torch.where(squares > 0, dof, math.inf)


def of_whole_integrals(integrals: Tensor) -> tuple[Tensor, Tensor]:
    """The standard error of a mean of independent integrals (k, samples), from their spread, and its k - 1."""
    k = len(integrals)
    if k == 1:
        return unknown(integrals[0])
    return integrals.std(0) / math.sqrt(k), torch.full_like(integrals[0], k - 1)


def unknown(like: Tensor) -> tuple[Tensor, Tensor]:
    """A standard error that is not known: NaN, with 0 degrees of freedom."""
    nan = torch.full_like(like.detach(), math.nan)
    return nan, torch.zeros_like(nan)
