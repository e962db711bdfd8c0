"""The SDE under test: what it was declared to be, what the oracle says of it, and what the library computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DataError, SdeflowError
from sdeflow.kernels.bridge import Bridge, ReducibleBridge, SquareRootBridge
from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.reducible import ReducibleKernel
from sdeflow.laws.gaussian import Gaussian
from sdeflow.numerics.linear import Linear
from sdeflow.proof.certificate.oracle import Law, Oracle
from sdeflow.proof.certificate.report import Check
from sdeflow.scores import DeclaredSDE
from sdeflow.solving.fields import Fields
from sdeflow.symbolic.equations import Equation
from sdeflow.symbolic.evaluate import Declared, UnknownValue, Value
from sdeflow.symbolic.patience import operations, time_left
from sdeflow.symbolic.schedule import Schedule

if TYPE_CHECKING:
    from sdeflow.proof.certificate.formulas import Reader

__all__ = ["CertifiedSDE", "Subject", "product", "tensor", "transposed"]

_MOST_ENTRIES = 1024  # of tensor parameters
_LONG, _MOST_OPERATIONS = 40, 400  # of f and g; where they are longer, only so many operations of all entries
_TOGETHER = 1024  # integrated at once
_NEAR = 1e-9  # of the horizon: which side of a break a time lies on is not compared closer

Array = np.ndarray


class CertifiedSDE(DeclaredSDE, Protocol):
    """What is certified of an SDE, as ``sdeflow.SDE`` has it; what is missing of it is left out."""

    @property
    def equation(self) -> Equation: ...

    @property
    def prior(self) -> Gaussian: ...

    @property
    def weighting(self) -> sp.Expr: ...

    @property
    def likelihood_weighting(self) -> sp.Expr: ...

    def prior_for(self, mean: Tensor | float, std: Tensor | float) -> Gaussian: ...

    def reverse(self) -> Shown: ...

    def flow_ode(self) -> Shown: ...

    def lift(self, data: Tensor, seed: int | torch.Generator | None = None) -> Tensor: ...

    def bridge(self, x_T: Tensor | float) -> Bridge | ReducibleBridge | SquareRootBridge: ...

    def with_params(self, **values: float) -> CertifiedSDE: ...


class Shown(Protocol):
    """An equation as it is printed."""

    @property
    def drift(self) -> sp.Expr | sp.MatrixBase: ...

    @property
    def diffusion(self) -> sp.Expr | sp.MatrixBase: ...


class Subject:
    """An SDE with its kernel, and the checks made of it so far.

    Attributes:
        broken: checks that ended in an error of Python's.
        kind: "affine", "reducible", "pearson" or "general", by its kernel.
        k: the number of components.
        readers: of formulas, by entry, so that what one has integrated is not integrated again.
        cost: seconds that a density of a kernel that is not Gaussian takes, once measured.
        rows: the entries of tensor parameters that are compared, places in the flattened event; (0,) without tensors.
        numbers: the parameters' values at these entries.
    """

    def __init__(self, sde: CertifiedSDE) -> None:
        self.sde, self.declaration, self.values = sde, sde.declaration, sde.values
        self.kernel, self.fields = sde.kernel, Fields(sde)
        self.kind, self.basis = self.kernel.kind, self.kernel.basis
        self.T, self.cutoff = self.kernel.T, self.kernel.cutoff
        self.k, self.coupled = len(self.declaration.state), self.declaration.coupled
        self.checks: list[Check] = []
        self.unchecked: list[str] = self._without_bounds()
        self.broken: list[str] = []
        self.rng = np.random.default_rng(0)
        self.readers: dict[int, Reader] = {}
        self.cost: list[float] = []
        self.rows, self.numbers = self._entries()

    @property
    def affine(self) -> Kernel:
        """The kernel of an affine SDE."""
        if not isinstance(self.kernel, Kernel):
            raise UnknownValue("the kernel is not Gaussian.")
        return self.kernel

    @property
    def reducible(self) -> ReducibleKernel:
        """The kernel behind a change of the state."""
        if not isinstance(self.kernel, ReducibleKernel):
            raise UnknownValue("the kernel is not behind a change of the state.")
        return self.kernel

    @property
    def first(self) -> float:
        """The earliest time that is looked at."""
        return max(self.cutoff, 1e-6 * self.T)

    # ---------------------------------------------------------------- checks

    @contextmanager
    def allowing(self, name: str) -> Iterator[None]:
        """What has no independent value to compare with is said, and what the library refuses is a failure.

        Any other error is one of this program's, which knows nothing of the identity: there is no verdict.
        """
        try:
            yield
        except UnknownValue as error:
            self.unchecked.append(f"{name}: {error}")
        except Exception as error:
            if time_left() <= 0:  # it may have been refused for want of time
                self.unchecked.append(f"{name}: {error}")
            elif isinstance(error, SdeflowError):
                self.checks.append(Check(name, f"can be computed: {error}", "numeric", math.inf, 0.0))
            else:
                self.broken.append(name)
                self.unchecked.append(f"{name}: {type(error).__name__}: {error}")

    def note(
        self,
        name: str,
        identity: str,
        residual: Array | Tensor | float,
        tolerance: float,
        times: Array | float | None = None,
        states: Array | None = None,
        doubt: Array | float = 0.0,
    ) -> None:
        """Records the largest of residuals (n, ...), found at times (n,) and states (n, k); NaN is the largest.

        ``doubt`` (n,) is what the expected value itself may be off by; residuals count in units of it where it is
        the larger.
        """
        if isinstance(residual, Tensor):
            residual = residual.detach().numpy()
        sizes = np.asarray(np.nan_to_num(np.abs(np.asarray(residual, dtype=float)), nan=np.inf))
        rows = sizes.reshape(len(sizes), -1).max(1) if sizes.ndim else sizes.reshape(1)
        rows = rows / (1.0 + np.asarray(doubt) / tolerance) if tolerance else rows
        worst = int(rows.argmax())
        where = "" if times is None else f"t = {np.broadcast_to(times, rows.shape)[worst]:.4g}"
        if states is not None:
            where += ", x = " + ", ".join(f"{value:.4g}" for value in states.reshape(len(rows), -1)[worst])
        self.checks.append(Check(name, identity, "numeric", float(rows[worst]), tolerance, where))

    # ---------------------------------------------------------------- what was declared

    def _without_bounds(self) -> list[str]:
        """The Python functions among the schedules: between the points visited nothing is known of them."""
        d = self.declaration
        calls = set().union(*(e.atoms(Schedule) for e in (*d.drifts, *d.diffusions, *(d.path or ()))))
        names = {type(call).__name__.removesuffix("_t" * call.order) for call in calls if call.table is None}
        width = f"{1e-4 * d.T:.3g}"
        return [
            f"{name} between its points: a Python function has no bounds, and features of it narrower than about "
            f"1e-4 T = {width} may be missed"
            for name in sorted(names)
        ]

    def _entries(self) -> tuple[Array, dict[sp.Symbol, Value]]:
        shape = self.values.shape
        if not shape:
            return np.zeros(1, dtype=int), {**self.values.numbers}
        rows = np.arange(math.prod(shape))
        length = sum(operations(e) for e in (*self.declaration.drifts, *self.declaration.diffusions))
        most = _MOST_ENTRIES if length <= _LONG else max(2, _MOST_OPERATIONS // length)
        if len(rows) > most:
            rows = np.sort(self.rng.choice(rows, most, replace=False))
            self.unchecked.append(f"{math.prod(shape) - most} of the {math.prod(shape)} entries of params")
        numbers: dict[sp.Symbol, Value] = {}
        for symbol, value in self.values.items():
            if isinstance(value, Tensor):
                numbers[symbol] = value.detach().double().cpu().expand(shape).reshape(-1).numpy()[rows]
            else:
                numbers[symbol] = value
        return rows, numbers

    def numbers_of(self, entry: int) -> dict[sp.Symbol, float]:
        """The parameters of one of ``rows``."""
        return {symbol: float(v[entry] if isinstance(v, np.ndarray) else v) for symbol, v in self.numbers.items()}

    def truth(self, entry: int = 0) -> Declared:
        """f and g as declared, for one of ``rows``."""
        return Declared(self.declaration, self.numbers_of(entry))

    @cached_property
    def some_entries(self) -> list[int]:
        """Three of ``rows``, for what takes an entry at a time."""
        return np.unique(np.linspace(0, len(self.rows) - 1, 3).astype(int)).tolist()

    @cached_property
    def oracles(self) -> list[Oracle]:
        first, parts, numbers = 0.5 * self.first, range(0, len(self.rows), _TOGETHER), self.numbers.items()
        cut = ({n: v[i : i + _TOGETHER] if isinstance(v, np.ndarray) else v for n, v in numbers} for i in parts)
        return [Oracle(self.declaration, some, first) for some in cut]

    def oracle(self, entry: int = 0) -> Oracle:
        """The oracle of one of ``rows``."""
        if len(self.rows) == 1:
            return self.oracles[0]
        return Oracle(self.declaration, self.numbers_of(entry), 0.5 * self.first)

    def law(self, times: Array, since: float = 0.0, known: bool = False) -> Law:
        """The moments of the oracle at times (n,) for all ``rows``; ``known``: without P0, from t = 0 too."""
        cov = np.zeros((self.k, self.k)) if known else None
        laws = [oracle.law(np.asarray(times, dtype=float), since, cov) for oracle in self.oracles]
        if len(laws) == 1:
            return laws[0]
        arrays, doubts = zip(*((law[:5], law[5:]) for law in laws), strict=True)
        joined = (np.concatenate(parts, axis=1) for parts in zip(*arrays, strict=True))
        return Law(*joined, *(np.max(parts, axis=0) for parts in zip(*doubts, strict=True)))

    @cached_property
    def times(self) -> Array:
        """Random times: uniform, log-uniform, and in panels of the oracle, so that narrow features get some."""
        return self._random_times(12, np.random.default_rng(3))

    @cached_property
    def dense(self) -> Array:
        """As many of them as show what is wrong for a short while."""
        return self._random_times(200, np.random.default_rng(4))

    def apart(self, times: Array) -> Array:
        """Times for coefficients: those within 1e-9 T of a break move before it: there rounding decides nothing."""
        near, points = _NEAR * self.T, np.unique(np.concatenate([oracle.jumps for oracle in self.oracles]))
        for _ in range(8):  # the place before a break may be another's
            close = (np.abs(times[:, None] - points) <= near).any(1)
            times = np.where(close, times - 4.0 * near, times)
        return times

    def _random_times(self, n: int, rng: np.random.Generator) -> Array:
        first, T = self.first, self.T
        even = first + (T - first) * (np.arange(n) + rng.uniform(size=n)) / n
        early = np.exp(rng.uniform(math.log(first), math.log(T), n))
        panels = self.oracles[0].panels
        chosen = np.sort(rng.integers(0, len(panels) - 1, n))
        within = panels[chosen] + rng.uniform(size=n) * np.diff(panels)[chosen]
        return np.unique(np.clip(np.concatenate([[first, T], even, early, within]), first, T))

    # ---------------------------------------------------------------- what the library computes

    def pick(self, values: Tensor, lead: int = 1) -> Array:
        """Coefficients (*n, *parameters) of one component at ``rows``, (*n, e)."""
        values = values.detach().cpu()
        shape = self.values.shape or (1,)
        if not self.values.shape:
            return values.reshape(*values.shape[:lead], 1).numpy()
        if values.ndim > lead:
            full = values.expand(*values.shape[:lead], *shape)
        else:
            full = values.reshape(*values.shape, *(1 for _ in shape))
        return full.expand(*values.shape[:lead], *shape).reshape(*values.shape[:lead], -1).numpy()[..., self.rows]

    def gaussian(self, times: Array) -> tuple[Array, Array, Array]:
        """The kernel's Φ (n, e, k, k), covariance and offset (n, e, k)."""
        values = self.affine.coefficients(torch.as_tensor(times))
        if self.coupled:
            alpha, sigma, offset = (v.numpy()[:, None] for v in values)
            return alpha, sigma @ transposed(sigma), offset
        alpha, sigma, offset = (self.pick(v)[..., None] for v in values)
        return alpha[..., None], sigma[..., None] ** 2, offset

    def map(self, linear: Linear, like: Tensor) -> Array:
        """A linear map at one time as matrices (e, k, k), for states like ``like``."""
        if self.coupled:
            return linear.values.reshape(-1, self.k, self.k)[:1].numpy()
        return self.level(linear.values, like)[..., None]

    def level(self, values: Tensor, like: Tensor) -> Array:
        """What broadcasts to states like ``like`` (1, *event) as (e, k)."""
        full = torch.as_tensor(values).broadcast_to(like.shape).detach()
        if self.coupled:
            return full.reshape(1, self.k).numpy()
        return self.of_entries(full)[0][:, None]

    def of_entries(self, states: Tensor) -> Array:
        """Coordinates of states (n, *event) at ``rows``, (n, e)."""
        flat = states.detach().flatten(1).numpy()
        return flat[:, self.rows] if self.values.shape else flat[:, :1]

    # ---------------------------------------------------------------- where to look

    @cached_property
    def event(self) -> tuple[int, ...]:
        """An event that the SDE takes; in a basis, one that it transforms."""
        inner = (1,) if self.coupled else self.values.shape or (1,)
        shapes = [inner] if self.basis is None else [inner, (*(1,) * 2, *inner), (8,), (8, 8), (1, 8, 8)]
        matrix = getattr(self.basis, "matrix", None)
        if matrix is not None:
            shapes.append((len(matrix),))
        for shape in shapes:
            event = (self.k, *shape) if self.coupled else tuple(shape)
            try:
                if self.basis is not None:
                    self.basis.forward(torch.zeros(1, *event, dtype=torch.float64))
                return event
            except DataError:
                continue
        raise UnknownValue("no event was found that the basis transforms")

    def states(self, n: int) -> Tensor:
        """Random states (n, *event) in float64."""
        return torch.as_tensor(self.rng.normal(size=(n, *self.event)))


def tensor(values: Array) -> Tensor:
    """An array as a tensor of its own."""
    return torch.as_tensor(np.ascontiguousarray(values))


def transposed(matrices: Array) -> Array:
    return matrices.swapaxes(-1, -2)


def product(matrices: Array, vectors: Array) -> Array:
    """(..., i, j) times (..., j)."""
    return (matrices @ vectors[..., None])[..., 0]
