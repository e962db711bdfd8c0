"""A design of probes and its options, :class:`Trace`; the sum over the nodes while it is taken, :class:`Integral`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from sdeflow.errors import ScoreError
from sdeflow.numerics.noise import NoiseStream, resolve_seed
from sdeflow.numerics.traces.estimate import Estimate
from sdeflow.numerics.traces.products import Products


@dataclass(frozen=True)
class Setting:
    """The arguments of :meth:`Trace.start`, checked."""

    shape: tuple[int, ...]
    weights: Tensor
    seed: int
    purpose: str
    rows: Tensor | None
    device: torch.device | str
    create_graph: bool
    draws: Sequence[int] | None = None

    @property
    def samples(self) -> int:
        return self.shape[0] if self.rows is None else len(self.rows)

    @property
    def first(self) -> int:
        """The first row for which probes are drawn."""
        return 0 if self.rows is None or not len(self.rows) else int(self.rows.min())

    @property
    def d(self) -> int:
        return math.prod(self.shape[1:])


class Trace(ABC):
    """A design: how the divergence is estimated. It holds options alone; :meth:`start` begins a trajectory."""

    def start(
        self,
        shape: tuple[int, ...],
        weights: Sequence[float] | Tensor,
        *,
        seed: int | torch.Generator | None = None,
        round: int = 0,
        rows: Tensor | None = None,
        device: torch.device | str = "cpu",
        create_graph: bool = False,
        purpose: str = "probe",
        draws: Sequence[int] | None = None,
    ) -> Integral:
        """An empty sum over the nodes of a trajectory.

        Args:
            shape: (batch, *event) of the whole batch.
            weights: (nodes,), w_n in the order in which the nodes will be added; of any sign.
            seed: seed of the probes. A sample's probes depend on the seed, the purpose, the round and its row alone.
            round: the number of this pass, among independent passes with the same seed.
            rows: (samples,) indices of the rows that will be added; None means all rows.
            device: the device of the fields.
            create_graph: whether the value can be differentiated.
            purpose: a word that separates the probes of different sums with the same seed.
            draws: (nodes,), rising: for each node, the node of a coarser grid whose probes it takes. Two sums over two
                grids then differ by the grids alone; such a sum has no error of its own. By default each node draws
                its own probes.
        """
        weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
        if weights.ndim != 1 or not len(weights):
            raise ValueError(f"weights must be of shape (nodes,), not {tuple(weights.shape)}.")
        purpose = purpose if round == 0 else f"{purpose} {round}"
        shape = tuple(shape)
        return self._integral(Setting(shape, weights, resolve_seed(seed), purpose, rows, device, create_graph, draws))

    @abstractmethod
    def _integral(self, setting: Setting) -> Integral:
        """The empty sum."""


@dataclass(frozen=True)
class Probed(Trace):
    """A design with a number of probes at each node.

    Attributes:
        probes: this number.
    """

    probes: int

    def with_probes(self, probes: int) -> Self:
        """The same design with another number of probes."""
        return replace(self, probes=probes)


class Integral(ABC):
    """A sum over the nodes while it is taken: :meth:`add` at each node in order, then :meth:`result`."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.weights = setting.weights
        self.d = setting.d
        self.node = 0
        self.value = torch.zeros(setting.samples, dtype=torch.float64, device=setting.device)
        self._stream = NoiseStream(setting.seed, setting.purpose, setting.first)
        self._products = Products(setting.create_graph)
        self._drawn: int | None = None

    draws_per_node = 0
    """The number of draws of probes at each node, without those at the start."""

    def _draw_of(self, node: int) -> int:
        """The number of the draw of probes that the node takes."""
        return node if self.setting.draws is None else int(self.setting.draws[node])

    def _is_new(self) -> bool:
        """Whether this node needs new probes. If so, the stream is moved to its draw."""
        draw, last = self._draw_of(self.node), self._drawn
        if last is not None and draw == last:
            return False
        if last is not None and draw > last + 1:
            self._stream.skip((draw - last - 1) * self.draws_per_node)
        self._drawn = draw
        return True

    def revisit(self, node: int) -> None:
        """Makes the first :meth:`add` of this sum that of ``node``, with the probes of that node."""
        self.node = node
        self._stream.skip(node * self.draws_per_node)

    def add(self, output: Tensor, x: Tensor) -> Tensor:
        """Adds w_n div F at the next node, and returns the estimate of div F there, (samples,) in float64.

        The graph of ``output`` is kept.

        Args:
            output: F(x), (samples, *event), computed from ``x`` with a graph, each sample from its own row alone.
            x: (samples, *event), requires grad.

        Raises:
            ScoreError: if no gradient flows from ``output`` to ``x``.
            ValueError: if a shape is not that given to :meth:`Trace.start`, or if all nodes have been added.
        """
        expected = (self.setting.samples, *self.setting.shape[1:])
        if tuple(output.shape) != expected or tuple(x.shape) != expected:
            raise ValueError(f"expected F and x of shape {expected}, got {tuple(output.shape)} and {tuple(x.shape)}.")
        if self.node == len(self.weights):
            raise ValueError(f"all {self.node} nodes have been added.")
        if not output.requires_grad:
            raise ScoreError("no gradient flows through the field (a detach or no_grad inside?): it has no divergence.")
        divergence = self._divergence(output, x) if len(output) else self.value.clone()
        self.value = self.value + float(self.weights[self.node]) * divergence
        self.node += 1
        return divergence

    def result(self) -> Estimate:
        """The estimate.

        Raises:
            ValueError: if nodes are missing.
        """
        if self.node < len(self.weights):
            raise ValueError(f"{self.node} of {len(self.weights)} nodes have been added.")
        if len(self.value):
            stderr, dof = self._error()
        else:
            stderr, dof = self.value.detach().clone(), self.value.detach().clone()
        return Estimate(self.value, stderr, dof, self._products.count)

    @abstractmethod
    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        """div F at this node, (samples,)."""

    @abstractmethod
    def _error(self) -> tuple[Tensor, Tensor]:
        """The standard error of the sum and its degrees of freedom, (samples,) each."""

    def _signs(self, *shape: int) -> Tensor:
        """The next draw of random signs, (*shape, samples, d), equal in every dtype."""
        return self._rows(self._stream.rademacher, torch.float32, shape)

    def _normal(self, *shape: int) -> Tensor:
        return self._rows(self._stream.normal, torch.float64, shape)

    def _rows(self, draw: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A draw for the samples: noise is drawn from the first of their rows to the last, and theirs is kept."""
        rows, first = self.setting.rows, self.setting.first
        if rows is None or not len(rows):
            drawn = draw((self.setting.samples, *shape, self.d), dtype)
        else:
            drawn = draw((int(rows.max()) + 1 - first, *shape, self.d), dtype)[rows.cpu() - first]
        return drawn.movedim(0, -2).to(self.setting.device)
