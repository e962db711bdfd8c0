"""Which kernel an SDE has: the one table of ways, best first.

    =============  ==================================================================  ===================
    ``kind``       p(x_t | x_0)                                                        class
    =============  ==================================================================  ===================
    "affine"       Gaussian                                                            ``Kernel``
    "reducible"    Gaussian behind a change of the state (Lamperti)                    ``ReducibleKernel``
    "pearson"      in special functions: square-root and Jacobi processes (Pearson)    ``PearsonKernel``
    "general"      known for short steps alone, by local linearisation                 ``LocalKernel``
    =============  ==================================================================  ===================

Each way gives the kernel, or says in a clause why it does not serve. The refusals of the ways that were tried are what
``explain()`` prints and what the :class:`~sdeflow.errors.NotAffineError` of a :class:`LocalKernel` says.
"""

from __future__ import annotations

from collections.abc import Callable

from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.local import LocalKernel
from sdeflow.kernels.pearson import PearsonKernel, pearson_kernel_or_reason
from sdeflow.kernels.reducible import SAME_STATE, ReducibleKernel, reducible_or_reason
from sdeflow.numerics.basis import Basis
from sdeflow.numerics.parameters import Values
from sdeflow.symbolic.declaration import Declaration

__all__ = ["WAYS", "AnyKernel", "find_kernel"]

ExactKernel = Kernel | ReducibleKernel | PearsonKernel
AnyKernel = ExactKernel | LocalKernel
"""p(x_t | x_0) of any SDE."""


def _gaussian(declaration: Declaration, values: Values, basis: Basis | None) -> Kernel | str:
    """The Gaussian kernel of an affine SDE."""
    return Kernel(declaration, values, basis) if declaration.affine is not None else declaration.obstacle


def _reducible(declaration: Declaration, values: Values, basis: Basis | None) -> ReducibleKernel | str:
    """The kernel of an SDE that a change of the state makes affine."""
    found = _no_scalar_start(declaration) or reducible_or_reason(declaration, values)
    return found if isinstance(found, str) else ReducibleKernel(declaration, values, like=found)


def _pearson(declaration: Declaration, values: Values, basis: Basis | None) -> PearsonKernel | str:
    """The kernel of a square-root or Jacobi process."""
    if refusal := _no_scalar_start(declaration):
        return refusal
    return pearson_kernel_or_reason(declaration, values) if declaration.state_dependent_noise else SAME_STATE


def _no_scalar_start(declaration: Declaration) -> str:
    """Why neither a change of state nor Pearson's class is looked for; empty where they are."""
    if declaration.coupled:
        return "a change of state is only looked for in one dimension"
    return "with P0 > 0 a change of state has no Gaussian start" if declaration.P0 > 0 else ""


WAYS: tuple[Callable[[Declaration, Values, Basis | None], ExactKernel | str], ...] = (_gaussian, _reducible, _pearson)
"""In order: each gives a kernel, or in a clause the reason why not. Where none does, short steps are left."""


def find_kernel(declaration: Declaration, values: Values, basis: Basis | None = None) -> AnyKernel:
    """The kernel of an SDE, by the first way that serves it.

    Args:
        declaration: dx = f dt + g dw.
        values: numbers and tensors of its parameters.
        basis: an orthogonal transform of events, of affine SDEs alone.

    Raises:
        ScheduleError: for coefficients that are singular, complex or explosive on the horizon.
    """
    refusals: list[str] = []
    for way in WAYS:
        found = way(declaration, values, basis)
        if not isinstance(found, str):
            return found
        if found not in refusals:  # what keeps two ways from an SDE is said once
            refusals.append(found)
    return LocalKernel(declaration, values, tuple(refusals))
