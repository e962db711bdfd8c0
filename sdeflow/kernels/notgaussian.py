"""What all kernels that are not Gaussian have in common, so that callers need not ask which kind a kernel is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NoReturn, overload

from torch import Tensor
from typing_extensions import Self

from sdeflow.numerics.parameters import Values
from sdeflow.symbolic.declaration import Declaration

__all__ = ["NotGaussian", "present_only"]


class _GaussianOnly:
    """An attribute of Gaussian kernels: asked of another, it raises the error that says why the kernel is none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, kernel: None, owner: type) -> Self: ...

    @overload
    def __get__(self, kernel: NotGaussian, owner: type) -> NoReturn: ...

    def __get__(self, kernel: NotGaussian | None, owner: type) -> Self:
        return self if kernel is None else kernel.require_gaussian(f"kernel.{self.name}")


class NotGaussian(ABC):
    """A kernel that is not Gaussian: solvers carry the state itself, not centred and in no basis.

    What users may ask of a Gaussian kernel alone (``alpha``, ``half_log_snr``, ...) raises a
    :class:`~sdeflow.errors.NotAffineError`.

    Attributes:
        declaration: dx = f dt + g dw.
        values: numbers and tensors of its parameters.
        gaussian: None; of a Gaussian kernel the kernel itself.
        exact: whether p(x_t | x_0) is known over any time, so that scores are learned from it.
        basis: None: only an affine SDE may be declared in a basis.
        has_offset: False: no part of the mean is subtracted from the state.
    """

    declaration: Declaration
    values: Values
    gaussian: None = None
    exact = True
    basis: None = None
    has_offset = False

    alpha, offset, log_snr, marginal = _GaussianOnly(), _GaussianOnly(), _GaussianOnly(), _GaussianOnly()
    coefficients, sde_coefficients = _GaussianOnly(), _GaussianOnly()
    half_log_snr, half_log_snr_rate, time_of = _GaussianOnly(), _GaussianOnly(), _GaussianOnly()

    @property
    @abstractmethod
    def cutoff(self) -> float:
        """The first time that training and solvers visit."""

    @property
    def also(self) -> str:
        """A clause that errors add to the reason why there is no Gaussian kernel."""
        return "its kernel is exact all the same, with moments, sample, score and log_prob"

    @property
    def score_from(self) -> float:
        """The first time at which a score is asked for: the cutoff, before which it may be infinite."""
        return self.cutoff

    def require_gaussian(self, purpose: str) -> NoReturn:
        """Raises the :class:`~sdeflow.errors.NotAffineError` that says why there is no Gaussian kernel."""
        raise self.declaration.not_affine(purpose, self.also)

    def require_event(self, event: tuple[int, ...]) -> None:  # noqa: B027 - any event is right by default
        """Accepts an event of any shape."""

    def to_basis(self, x: Tensor) -> Tensor:
        """The state itself."""
        return x

    def from_basis(self, x: Tensor) -> Tensor:
        """The state itself."""
        return x


def present_only(values: Values) -> str:
    """Why a form that holds at the present values only does not serve: a tensor may take others."""
    names = ", ".join(map(str, values.tensors))
    return f"it has an exact kernel at the parameters' present values only, and a tensor ({names}) may take others"
