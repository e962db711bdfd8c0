r"""Which way an SDE is served, and why no better one serves it, in a few lines.

The ways, best first:

    closed form -> quadrature -> Lamperti -> Pearson -> local linearisation -> simulation
"""

from __future__ import annotations

import textwrap

import sympy as sp
from typing_extensions import assert_never

from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.local import LocalKernel
from sdeflow.kernels.pearson import PearsonKernel
from sdeflow.kernels.reducible import ReducibleKernel
from sdeflow.scores import DeclaredSDE
from sdeflow.symbolic.derivation import is_smooth
from sdeflow.symbolic.moments import moments_of
from sdeflow.symbolic.patience import patiently

__all__ = ["explain"]

_EXACT = "exact kernel (numbers to 1e-10), training, solvers, likelihood, priors matched to the data"
_BY_SIMULATION = (
    "training on simulated paths{}; simulate(), and with a score solvers and likelihood, from a prior that is "
    "stationary, fitted or given"
)


def explain(sde: DeclaredSDE) -> str:
    """Which way serves this SDE, why no better one does, and what is available."""
    kernel = sde.kernel
    match kernel:
        case Kernel():
            way, why, available = *_affine_way(kernel, sde.values.numbers), _EXACT
        case ReducibleKernel():
            way, why, available = _reducible_way(kernel)
        case PearsonKernel():
            way, why, available = _pearson_way(kernel)
        case LocalKernel():
            way, why, available = _local_way(kernel)
        case _:
            assert_never(kernel)
    lines = (f"{way}: {why}.", f"Available: {available}.")
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="    ") for line in lines)


def _affine_way(kernel: Kernel, numbers: dict[sp.Symbol, float]) -> tuple[str, str]:
    """The way of an affine SDE, with the integral that keeps it from a closed form."""
    declaration = kernel.declaration
    if kernel.form == "closed":
        return "closed form", "f is affine in the state, g free of it, and rules integrate every moment"
    if declaration.coupled:
        gap = "no rule gives Φ, the offset and the covariance in closed form"
        return "quadrature", f"the kernel is Gaussian, but {gap}"
    (a, b), moments = declaration.require_affine("moments"), moments_of(declaration, numbers)
    if moments.closed:
        form = "has a closed form, whose digits cancel in float64 on this horizon"
        return "quadrature", f"the kernel is Gaussian and {form}"
    if moments.log_alpha.has(sp.Integral):
        integrand = a
    elif moments.offset.has(sp.Integral):
        integrand = b / moments.alpha
    else:
        integrand = declaration.g**2 / moments.alpha**2
    shown = patiently(sp.powsimp, integrand, otherwise=integrand)
    return "quadrature", f"the kernel is Gaussian, but no rule integrates {shown}"


def _reducible_way(kernel: ReducibleKernel) -> tuple[str, str, str]:
    """The way of an SDE that a change of the state makes affine, why, and what is available."""
    form = kernel.reduction
    drift = form.a * sp.Symbol("y") + form.b
    why = f"{_obstacle(kernel)}; but y = {form.map.to_line} has the drift {drift}, affine in y, and noise free of it"
    pushed = "pushed forward, both branches summed" if form.map.fold else "pushed forward"
    return "Lamperti", why, f"exact kernel ({pushed}), training on its score, solvers, likelihood"


def _pearson_way(kernel: PearsonKernel) -> tuple[str, str, str]:
    """The way of a Pearson diffusion, why, and what is available."""
    form = kernel.pearson
    why = f"{_obstacle(kernel)}, and no change of state makes it affine; but f is affine and g² quadratic in x: a "
    why += f"{form.kind} diffusion of shape {', '.join(map(str, form.shape))}"
    return "Pearson", why, "exact kernel, moments and draws, training on its score, solvers, likelihood"


def _local_way(kernel: LocalKernel) -> tuple[str, str, str]:
    """The way of an SDE without an exact kernel, why, and what is available."""
    why = f"{_obstacle(kernel)}; {kernel.also}"
    if is_smooth(kernel.declaration):
        return "local linearisation", why, _BY_SIMULATION.format(", by a Gaussian law over short times")
    needs = "a drift with a Jacobian everywhere"
    return "simulation", f"{why}; local linearisation needs {needs}", _BY_SIMULATION.format("")


def _obstacle(kernel: ReducibleKernel | PearsonKernel | LocalKernel) -> str:
    return f"no Gaussian kernel, for {kernel.declaration.obstacle}"
