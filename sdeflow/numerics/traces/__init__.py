r"""Estimators of Σ_n w_n div F_n along a trajectory: a field F_n(x_n) at each node, with a known weight w_n.

With J_n = ∂F_n/∂x and probes v with E[v vᵀ] = 1,

    E[vᵀ J v] = tr J,

so one vector-Jacobian product gives an unbiased estimate for any square J (Hutchinson 1990; arXiv:1810.01367).

    deterministic     Exact: all d products.  Given: probes that the caller passes
    hutchinson        Hutchinson: independent probes, new ones at each node or the same at all nodes
    cycled            Hadamard: columns of a randomised Hadamard matrix, cycled over the nodes
    hutchpp           HutchPP: the trace in a sketched subspace exactly, the rest by probes (arXiv:2010.09649)
    integral          Trace, a design and its options; Integral, the sum while nodes are added
    products          vector-Jacobian products, in batches that fit into memory
    walsh             Hadamard matrices
    standard_error    variances of the designs, and their degrees of freedom
    estimate          Estimate; independent passes pooled, until a standard error is reached

A field has the shape (samples, *event), an estimate (samples,) in float64. The page :doc:`theory_traces` derives the
variance of each design and says how good the standard errors are. Up to some hundred dimensions use the exact trace:
it costs no more than the probes that a small error needs.
"""

from __future__ import annotations

from sdeflow.numerics.traces.cycled import Hadamard
from sdeflow.numerics.traces.deterministic import Exact, Given
from sdeflow.numerics.traces.estimate import Estimate, pool, until
from sdeflow.numerics.traces.hutchinson import Hutchinson
from sdeflow.numerics.traces.hutchpp import HutchPP
from sdeflow.numerics.traces.integral import Integral, Probed, Trace
from sdeflow.numerics.traces.products import Products
from sdeflow.numerics.traces.standard_error import (
    Spread,
    are_few,
    heavy_dof,
    heavy_tails,
    spread_dof,
    total_variance,
    widening,
)
from sdeflow.numerics.traces.walsh import columns_of, hadamard, walsh_hadamard

__all__ = [
    "Estimate",
    "Exact",
    "Given",
    "Hadamard",
    "HutchPP",
    "Hutchinson",
    "Integral",
    "Probed",
    "Products",
    "Spread",
    "Trace",
    "are_few",
    "columns_of",
    "hadamard",
    "heavy_dof",
    "heavy_tails",
    "pool",
    "spread_dof",
    "total_variance",
    "until",
    "walsh_hadamard",
    "widening",
]
