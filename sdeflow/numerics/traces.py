r"""Estimators of Σ_n w_n div F_n along a trajectory: a field F_n(x_n) at each node, its weight w_n known beforehand.

With J_n = ∂F_n/∂x, S_n = (J_n + J_nᵀ)/2 and E[v vᵀ] = 1, E[vᵀ J v] = tr J, so that one vector-Jacobian product gives
an unbiased number, for any square J (Hutchinson 1990; for flows arXiv:1810.01367). Its variance is

    Gaussian v      2 ‖S‖²_F
    Rademacher v    2 (‖S‖²_F - Σ_i s_ii²)  =:  K

and what the sum over the nodes makes of it depends on how the probes of different nodes go together. Let
K_nm = 2 <off S_n, off S_m>, off the part outside the diagonal.

    fixed        the same v at every node: Σ_nm w_n w_m K_nm / probes, since S_n changes slowly and errors add up
    fresh        independent v at every node: Σ_n w_n² K_nn / probes, several times less in standard deviation
    Hadamard     v = D h_c: D random signs, h_c the columns of the Hadamard matrix (d padded to P, a power of two)

Over all P columns the mean of vᵀ J v is tr J *exactly*, for every D: with (h_c)_i = (-1)^popcount(i & c) the mean over
c of (h_c)_i (h_c)_j is 1 for i = j and else 0, padded or not. One column alone is unbiased over D. The columns come
in one random order and go round: node n takes the next ``probes`` of them. Each column then samples its own smooth
function of n at equal distances, and the error is the trapezoidal rule's, with P / probes nodes to a step: it falls
faster than any power where S_n is smooth. With a random order the terms h_cᵀ D S D h_c of different Walsh
functions are uncorrelated, and with o_nm the columns that nodes n and m share, over probes²,

    variance = Σ_nm w_n w_m K_nm (P o_nm - 1) / (P - 1).                                                     (1)

That is small because columns are *not* independent, so neither the spread of the probes nor that of halves of them
tells it: with r independent replicates it would be told, but each has probes/r columns a node and pays for it. (d = 64,
51 nodes, 4 probes: 0.57 nats with one order, 1.10 with two replicates, whose interval has one degree of freedom and so
another factor 6.) (1) is therefore estimated itself. The scale of K_nn is the spread within a node; the correlation
over nodes comes at no cost from the gradients: for slots a of node n and b of node m

    E[(v_bᵀ J_nᵀ v_a) (v_aᵀ J_mᵀ v_b)] ≈ ½ K_nm,

for symmetric J (as of exact scores; what a score network lacks of it only shortens the correlation found). The
products against all v_b are a fast Walsh-Hadamard transform of the gradient. To these a correlation
sech((n - m) / length) is fitted, one length per sample, and 5 % of K_nn counts as without any correlation (nugget):
cancellation beyond that cannot be told from noise, and the standard error is too large rather than too small there.
Few columns tell less, and of 16 or fewer all of K_nn counts so until each has come round 6.5 times, and (6.5 / times)⁴
of it then; of P columns (16 / P)². How far that holds depends on the field. Along paths of ten random mixtures in 64
dimensions with full covariances, the 95 % intervals of 16 columns cover 89 to 100 %, 97.6 % on average, and the
standard error is 0.73 to 3.4 of the rms error; of 2 and 4 columns 96 to 100 %, and 0.95 to 1.25.

Hutch++ (arXiv:2010.09649): with Q an orthonormal basis of Jᵀ Ω for random Ω,

    tr J = tr Qᵀ J Q + tr (1 - Q Qᵀ) J (1 - Q Qᵀ),

the first exactly and the second by probes, uniform on the sphere of the complement (arXiv:2301.07825): unbiased for
every J, better where S is close to low rank, worse where its spectrum is flat, because a third of the products is left
for the noise. Exactly: d products on one graph.

Standard errors use what each design makes independent: of fixed probes, the whole integrals; of fresh ones, the spread
within each node, nodes adding up, with Satterthwaite's degrees of freedom (far more of them than probes - 1). A single
probe says nothing of its error, so it is NaN. All of these are moments of few numbers: where S is of rank one and few
nodes matter, vᵀ S v is far from normal, and the 95 % intervals of four probes cover about 88 % (fixed) or 91 to 94 %
(fresh). When not to use this: up to some hundred dimensions the exact trace costs
no more than the probes that a small error needs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.errors import DataError, ScoreError
from sdeflow.numerics.checks import checked_choice, checked_count, checked_finite, checked_flag
from sdeflow.numerics.noise import NoiseStream, resolve_seed

__all__ = [
    "Estimate",
    "Exact",
    "Given",
    "Hadamard",
    "HutchPP",
    "Hutchinson",
    "Integral",
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
    "widening",
]

_CHUNK = 2**24  # elements of vector-Jacobian products held at once
_GRAM = 2**9  # slots whose mutual products are kept, per sample
_NUGGET, _FEW_COLUMNS = 0.05, 16.0  # of K_nn, without correlation over the nodes; all of it with so few columns
_ROUNDS = 6.5  # of the columns, from which on there is less of that
_NOTHING = torch.zeros((), dtype=torch.float64)  # to which sums begin to be added, on any device
_LENGTHS = [0.5 * 1.25**k for k in range(22)]  # nodes, 0.5 to 54


@dataclass(frozen=True)
class Estimate:
    """Σ_n w_n div F_n and what is known of its error.

    Attributes:
        value: (batch,) in float64.
        stderr: (batch,), of ``value``; 0 where it is exact, NaN where unknown.
        dof: (batch,), degrees of freedom of ``stderr``: value ± t(dof) stderr is the interval. Infinite where exact.
        products: vector-Jacobian products per sample.
    """

    value: Tensor
    stderr: Tensor
    dof: Tensor
    products: int

    @property
    def bar(self) -> Tensor:
        """``stderr`` widened so that value ± 2 bars is the 95.45 % interval of its degrees of freedom."""
        return self.stderr * widening(self.dof)


def widening(dof: Tensor) -> Tensor:
    """Half of Student's two-sided 95.45 % quantile: 1 for many degrees of freedom, 2.3 for 2, and 7 for 1."""
    from scipy.special import stdtrit  # half a second to import

    known = dof.detach().double().clamp(1.0, 1e6).cpu().numpy()
    return 0.5 * torch.as_tensor(stdtrit(known, 0.977249868), dtype=torch.float64, device=dof.device)


def heavy_tails(draws: int) -> float:
    """By what a bar is widened for the heavy tails of few draws, measured: 3.3 for 4, 1.25 for 64."""
    return 1.0 + min(6.5 * draws**-0.75, 16.0 / draws)


def total_variance(parts: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
    """The sum of independent estimated variances, each with its degrees of freedom, and Satterthwaite's of the sum."""
    variance = sum((part for part, _ in parts), _NOTHING)
    squares = sum((part.square() / (dof + 2.0) for part, dof in parts), _NOTHING)
    return variance, _satterthwaite(variance, squares).clamp_min(min(dof for _, dof in parts))


class Trace(ABC):
    """A way to estimate the divergence; it holds options alone, and :meth:`start` begins a trajectory."""

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
        """The sum over the nodes, empty.

        Args:
            shape: (batch, *event) of the whole batch.
            weights: (nodes,), w_n in the order in which the nodes will be added; of any sign.
            seed: of the probes. A sample's probes depend on the seed, the purpose, the round and its row alone.
            round: which of several independent passes with one seed this is.
            rows: (samples,) indices of the rows that will be added; None for all of them.
            device: where the fields live.
            create_graph: whether the value can be differentiated in turn.
            purpose: a word that separates the probes of different sums with one seed.
            draws: which node of a coarser grid each node takes the probes of, (nodes,) and rising: sums over two grids
                then differ by the grids alone. Such a sum has no error of its own. By default each node has its own.
        """
        weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
        if weights.ndim != 1 or not len(weights):
            raise ValueError(f"weights must be of shape (nodes,), not {tuple(weights.shape)}.")
        purpose = purpose if round == 0 else f"{purpose} {round}"
        shape = tuple(shape)
        return self._integral(
            Integral._Setting(shape, weights, resolve_seed(seed), purpose, rows, device, create_graph, draws)
        )

    @abstractmethod
    def _integral(self, setting: Integral._Setting) -> Integral:
        """The empty sum."""


class Integral(ABC):
    """A sum over the nodes under way: :meth:`add` at each node in turn, then :meth:`result`."""

    @dataclass(frozen=True)
    class _Setting:
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
            """The first row for which probes are drawn: those of rows before it are not needed."""
            return 0 if self.rows is None or not len(self.rows) else int(self.rows.min())

        @property
        def d(self) -> int:
            return math.prod(self.shape[1:])

    def __init__(self, setting: Integral._Setting) -> None:
        self.setting = setting
        self.weights = setting.weights
        self.d = setting.d
        self.node = 0
        self.value = torch.zeros(setting.samples, dtype=torch.float64, device=setting.device)
        self._stream = NoiseStream(setting.seed, setting.purpose, setting.first)
        self._products = Products(setting.create_graph)
        self._drawn: int | None = None

    draws_per_node = 0
    """How many draws of probes a node takes, beyond those at the start."""

    def _draw_of(self, node: int) -> int:
        """Which draw of probes the node takes."""
        return node if self.setting.draws is None else int(self.setting.draws[node])

    def _is_new(self) -> bool:
        """Whether this node's draw is another one than that of the node before, up to which the stream then is."""
        draw, last = self._draw_of(self.node), self._drawn
        if last is not None and draw == last:
            return False
        if last is not None and draw > last + 1:
            self._stream.skip((draw - last - 1) * self.draws_per_node)
        self._drawn = draw
        return True

    def revisit(self, node: int) -> None:
        """Makes the next :meth:`add`, the first of this sum, that of ``node``, with the probes it has."""
        self.node = node
        self._stream.skip(node * self.draws_per_node)

    def add(self, output: Tensor, x: Tensor) -> Tensor:
        """Adds w_n div F at the next node, and returns the estimate of div F there, (samples,) in float64.

        The graph of ``output`` is left as it is.

        Args:
            output: F(x), (samples, *event), on a graph from ``x``, each sample from its own row alone.
            x: (samples, *event), requires grad.

        Raises:
            ScoreError: if no gradient flows from ``output`` to ``x``.
            ValueError: for another shape than announced, or more nodes than weights.
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
        """The next draw of signs, (*shape, samples, d), the same in every dtype."""
        return self._rows(self._stream.rademacher, torch.float32, shape)

    def _normal(self, *shape: int) -> Tensor:
        return self._rows(self._stream.normal, torch.float64, shape)

    def _rows(self, draw: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A draw for the samples, from the first of their rows to the last."""
        rows, first = self.setting.rows, self.setting.first
        if rows is None or not len(rows):
            drawn = draw((self.setting.samples, *shape, self.d), dtype)
        else:
            drawn = draw((int(rows.max()) + 1 - first, *shape, self.d), dtype)[rows.cpu() - first]
        return drawn.movedim(0, -2).to(self.setting.device)


class Products:
    """Vector-Jacobian products of fields of samples, as many at once as memory and the network allow.

    Args:
        create_graph: whether they can be differentiated in turn.

    Attributes:
        count: products taken so far.
    """

    def __init__(self, create_graph: bool = False) -> None:
        self.create_graph = create_graph
        self.count = 0
        self._batched = True

    def gradients(self, output: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """Jᵀ v of each sample for vectors (k, samples, d), (k, samples, d), in the dtype of the output.

        Batched over k where the network's operations allow it, else one by one.
        """
        vectors = vectors.to(output.dtype).reshape(-1, *output.shape)
        self.count += len(vectors)
        options = {"retain_graph": True, "create_graph": self.create_graph, "allow_unused": True}

        def checked(gradient: Tensor | None) -> Tensor:
            if gradient is None:
                raise ScoreError("the field does not depend on x by its graph, so it has no divergence.")
            return gradient

        size = max(1, _CHUNK // max(1, output.numel()))
        parts: list[Tensor] = []
        if self._batched and len(vectors) > 1:
            try:
                for chunk in vectors.split(size):
                    parts.append(checked(torch.autograd.grad(output, x, chunk, is_grads_batched=True, **options)[0]))
                return torch.cat(parts).flatten(2)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError):  # an operation without a rule for vmap
                self._batched = False
        parts = [checked(torch.autograd.grad(output, x, vector, **options)[0]) for vector in vectors]
        return torch.stack(parts).flatten(2)

    def forms(self, output: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """vᵀ J v of each sample for vectors (k, samples, d), (k, samples) in float64."""
        parts = self.chunks(vectors, output)
        return torch.cat([_dot(self.gradients(output, x, part), part.to(output.dtype)) for part in parts])

    def chunks(self, vectors: Tensor, output: Tensor) -> Sequence[Tensor]:
        """Vectors (k, samples, d) in parts whose products may be held at once."""
        return vectors.split(max(1, _CHUNK // max(1, output.numel())))

    def divergence(self, output: Tensor, x: Tensor) -> Tensor:
        """tr J of each sample by all d products, (samples,) in float64."""
        d = math.prod(output.shape[1:])
        size = max(1, min(d, _CHUNK // output.numel()))
        total = torch.zeros(len(output), dtype=torch.float64, device=output.device)
        for first in range(0, d, size):
            index = torch.arange(first, min(first + size, d), device=output.device)
            basis = torch.zeros(len(index), 1, d, dtype=output.dtype, device=output.device)
            basis[torch.arange(len(index)), 0, index] = 1.0
            basis = basis.expand(-1, len(output), -1)
            # Row i of J, entry i; the rest of the row has been computed in vain.
            gradients = self.gradients(output, x, basis)
            diagonal = gradients.gather(2, index[:, None, None].expand(-1, len(output), 1))
            total = total + diagonal.sum((0, 2), dtype=torch.float64)
        return total


# ---------------------------------------------------------------- the estimators


@dataclass(frozen=True)
class Exact(Trace):
    """All d products."""

    def _integral(self, setting: Integral._Setting) -> Integral:
        return _Exact(setting)


class _Exact(Integral):
    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        return self._products.divergence(output, x)

    def _error(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.value.detach()), torch.full_like(self.value.detach(), math.inf)


@dataclass(frozen=True)
class Hutchinson(Trace):
    """Independent probes.

    Args:
        probes: at each node.
        probe: "rademacher" or "gaussian".
        fresh: new ones at each node; False keeps them, as adaptive solvers need, with a much larger error.

        distinct: whether random signs of so few coordinates that all probes could be the same by chance,
            d <= 3 or (d - 1) (probes - 1) < 10, are distinct columns of a randomised Hadamard matrix instead; as many
            as it has are the exact trace.
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

    def _integral(self, setting: Integral._Setting) -> Integral:
        return _Hutchinson(setting, self)


class _Hutchinson(Integral):
    def __init__(self, setting: Integral._Setting, trace: Hutchinson) -> None:
        super().__init__(setting)
        self._trace = trace
        self.draws_per_node = int(trace.fresh)
        self._normals = trace.probe == "gaussian"
        self._distinct = trace.distinct and not self._normals and are_few(self.d, trace.probes)
        self.probes = min(trace.probes, _padded(self.d)) if self._distinct else trace.probes
        self._left = 1.0 - self.probes / _padded(self.d) if self._distinct else 1.0
        self._vectors: Tensor | None = None
        self._sum = _NOTHING
        self._nodes = _Nodewise(self.value, self.probes)

    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        if self._vectors is None or (self._trace.fresh and self._is_new()):
            self._vectors = self._drawn_vectors(self._drawn or 0)
        forms, parts, spread = [], [], Spread(self._normals)
        for vectors in self._products.chunks(self._vectors, output):
            gradients = self._products.gradients(output, x, vectors)
            forms.append(_dot(gradients, vectors.to(gradients.dtype)))
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


@dataclass(frozen=True, eq=False)
class Given(Trace):
    """The mean of vᵀ J v over probes that are handed over and taken as they are, the same at every node.

    Args:
        vectors: (m, *event) for all samples alike, or (m, batch, *event). Unbiased for the trace where E[v vᵀ] = 1.
        first_row: the number of the first sample of that batch.

    Raises:
        DataError: for what is no finite floating tensor with m >= 1.
    """

    vectors: Tensor
    first_row: int = 0

    def __post_init__(self) -> None:
        v = self.vectors
        if not isinstance(v, Tensor) or not v.is_floating_point() or v.ndim < 2 or not len(v):
            given = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v)
            raise DataError(f"probes are a floating tensor (m, *event) or (m, batch, *event), m >= 1, not {given}.")
        checked_finite(v, "the probes' tensor")

    def require(self, shape: tuple[int, ...]) -> None:
        """A DataError unless the probes are those of states of ``shape`` (batch, *event)."""
        if tuple(self.vectors.shape[1:]) not in (tuple(shape), tuple(shape[1:])):
            raise DataError(
                f"probes for states {tuple(shape)} are (m, {', '.join(map(str, shape[1:]))}) or "
                f"(m, {', '.join(map(str, shape))}), not {tuple(self.vectors.shape)}."
            )

    def mapped(self, transform: Callable[[Tensor], Tensor], event: tuple[int, ...]) -> Given:
        """The probes of other coordinates: ``transform`` is linear, and takes (batch, *event)."""
        moved = transform(self.vectors.reshape(-1, *event)).reshape(self.vectors.shape)
        return Given(moved, self.first_row)

    def of_rows(self, rows: Tensor | None, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """The probes of some rows of all samples, (m, samples, d), for states of ``shape``."""
        samples, d = shape[0] if rows is None else len(rows), math.prod(shape[1:])
        v = self.vectors.to(device)
        if v.ndim == len(shape):
            return v.reshape(len(v), 1, d).expand(-1, samples, -1)
        return (v if rows is None else v[:, rows.to(device) - self.first_row]).reshape(len(v), samples, d)

    def _integral(self, setting: Integral._Setting) -> Integral:
        return _Given(setting, self.of_rows(setting.rows, setting.shape, setting.device))


class _Given(Integral):
    def __init__(self, setting: Integral._Setting, vectors: Tensor) -> None:
        super().__init__(setting)
        self._vectors, self._integrals = vectors, _NOTHING

    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        forms = self._products.forms(output, x, self._vectors)
        self._integrals = self._integrals + float(self.weights[self.node]) * forms.detach()
        return forms.mean(0)

    def _error(self) -> tuple[Tensor, Tensor]:
        return _of_whole_integrals(self._integrals)


@dataclass(frozen=True)
class HutchPP(Trace):
    """Hutch++: a third of the products each for the sketch, the trace within it, and the rest; fresh at each node.

    Args:
        probes: products at each node, at least 3. The standard error needs two probes of the rest, so 6.
    """

    probes: int = 6

    def __post_init__(self) -> None:
        checked_count(self.probes, "probes", 3)

    def _integral(self, setting: Integral._Setting) -> Integral:
        return _HutchPP(setting, self.probes)


class _HutchPP(Integral):
    draws_per_node = 2

    def __init__(self, setting: Integral._Setting, probes: int) -> None:
        super().__init__(setting)
        self._rank = min(probes // 3, self.d)
        self._rest = probes - 2 * (probes // 3)
        self._nodes = _Nodewise(self.value, self._rest)

    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        if self._is_new():
            self._probes = self._signs(self._rank), self._normal(self._rest).permute(1, 2, 0)
        signs, probes = self._probes
        sketch = self._products.gradients(output, x, signs).detach()
        # The choice of Q carries no derivative: the value is unbiased for every Q, so its derivative is too.
        q = torch.linalg.qr(sketch.double().permute(1, 2, 0)).Q  # (samples, d, rank)
        # Uniform on the sphere of the complement: what is a multiple of the identity there costs nothing.
        probes = probes - q @ (q.mT @ probes)
        norm = probes.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        probes = probes * (math.sqrt(self.d - self._rank) / norm)
        vectors = torch.cat([q, probes], dim=2).permute(2, 0, 1)
        gradients = self._products.gradients(output, x, vectors)
        forms = _dot(gradients, vectors.to(gradients.dtype))
        within, rest = forms[: self._rank].sum(0), forms[self._rank :]
        # On a sphere of c dimensions the variance of pᵀMp is twice the mean square of what Mp has across p.
        across = gradients[self._rank :].detach().double().permute(1, 2, 0)
        across = across - q @ (q.mT @ across)
        left = across.square().sum((1, 2)) - rest.detach().square().sum(0) / max(1, self.d - self._rank)
        self._nodes.add(float(self.weights[self.node]), 2.0 * left.clamp_min(0.0) / self._rest)
        return within + rest.mean(0)

    def _error(self) -> tuple[Tensor, Tensor]:
        return self._nodes.error()


@dataclass(frozen=True)
class Hadamard(Trace):
    """Columns of a randomised Hadamard matrix, cycled over the nodes: best where nodes x probes exceeds d.

    Args:
        probes: columns at each node; no more than the padded dimension are taken, which is exact.
    """

    probes: int = 4

    def __post_init__(self) -> None:
        checked_count(self.probes, "probes", 1)

    def _integral(self, setting: Integral._Setting) -> Integral:
        return _Hadamard(setting, self.probes)


class _Hadamard(Integral):
    def __init__(self, setting: Integral._Setting, probes: int) -> None:
        super().__init__(setting)
        self.padded = _padded(self.d)
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
        # Correlations matter once columns come round; before that, leaving them out errs on the safe side.
        few = min(self.probes, 4, _GRAM // nodes)
        rounds = 2 * nodes * self.probes > self.padded > self.probes
        self._few = few if few > 1 and rounds and setting.draws is None else 0

    def _divergence(self, output: Tensor, x: Tensor) -> Tensor:
        rows = torch.arange(self.d, device=output.device)
        signs = hadamard(rows, self.columns[self.node].to(output.device))
        vectors = self._diagonal.to(output.dtype) * signs[:, None].to(output.dtype)
        size = max(self._few, _CHUNK // max(1, output.numel()), 1)
        parts, spread = [], Spread()
        for first in range(0, self.probes, size):
            chunk = vectors[first : first + size]
            gradients = self._products.gradients(output, x, chunk)
            parts.append(_dot(gradients, chunk))
            spread.add(chunk, gradients.detach())
            if self._few and first == 0:
                self._gram.append(self._against_all(gradients[: self._few].detach()))
        forms = torch.cat(parts)
        self._values.append(forms.detach())
        self._spreads.append(spread.variance())
        return forms.mean(0)

    def _against_all(self, gradients: Tensor) -> Tensor:
        """v_bᵀ g for the few first slots b of every node and gradients g (few, samples, d), (few, samples, slots)."""
        scaled = gradients.double() * self._diagonal
        scaled = torch.nn.functional.pad(scaled, (0, self.padded - self.d))
        return walsh_hadamard(scaled)[..., self.columns[:, : self._few].flatten().to(scaled.device)]

    def _error(self) -> tuple[Tensor, Tensor]:
        if self.probes == self.padded:
            return torch.zeros_like(self.value.detach()), torch.full_like(self.value.detach(), math.inf)
        if self.probes == 1:
            return _unknown(self.value)
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
        # Fewer than of independent probes, measured: all nodes share their signs, and the length has its error.
        dof = _satterthwaite(own.sum(1), own.square().sum(1) / (self.probes + 1.5))
        return variance.sqrt(), (dof / max(5, self.probes - 1)).clamp_min(2.0)

    def _nugget(self) -> float:
        """The part of K_nn that counts as without correlation: the less, the more often each column has come round."""
        rounds = len(self.weights) * self.probes / self.padded
        return min((_ROUNDS / rounds) ** 4, max(_NUGGET, min(1.0, (_FEW_COLUMNS / self.padded) ** 2)))

    def _correlations(self, traces: Tensor) -> Tensor:
        """½ K_nm up to noise, (samples, nodes, nodes), NaN where two nodes share all their columns."""
        nodes, few = len(self.weights), self._few
        columns = self.columns[:, :few].flatten()
        gram = torch.stack(self._gram).permute(2, 0, 1, 3).reshape(len(traces), nodes * few, nodes * few)
        # The mean of the diagonal shows where padding leaves columns that are not orthogonal.
        inner = walsh_hadamard(
            torch.nn.functional.pad(torch.ones(self.d, dtype=torch.float64), (0, self.padded - self.d))
        )
        inner = inner[columns[:, None] ^ columns].to(gram.device)
        gram = gram - (traces / self.d).repeat_interleave(few, dim=1)[:, :, None] * inner
        different = (columns[:, None] != columns).to(gram)
        pairs = different.reshape(nodes, few, nodes, few).sum((1, 3))
        products = (gram * gram.mT * different).reshape(-1, nodes, few, nodes, few).sum((2, 4))
        return torch.where(pairs > 0, products / pairs.clamp_min(1.0), math.nan)


# ---------------------------------------------------------------- several passes


def pool(estimates: Sequence[Estimate]) -> Estimate:
    """Independent estimates of one sum, as one: their mean, each weighted by its products.

    Weights from estimated variances would correlate with the values. Where a standard error is unknown, it is
    the spread of the estimates.

    Raises:
        ValueError: for no estimates.
    """
    if not estimates:
        raise ValueError("pool needs at least one estimate.")
    if len(estimates) == 1:
        return estimates[0]
    products = sum(e.products for e in estimates)
    shares = torch.tensor([e.products / products for e in estimates], dtype=torch.float64)[:, None]
    values, stderrs, dofs = (torch.stack([getattr(e, name) for e in estimates]) for name in ("value", "stderr", "dof"))
    shares = shares.to(values.device)
    value = (shares * values).sum(0)
    parts = shares.square() * stderrs.square()
    variance = parts.sum(0)
    # Σ p (T - T̄)² has expectation (1 - Σ p²) times the variance of one product, for variances as 1 / products.
    spread = (shares * (values.detach() - value.detach()).square()).sum(0) / (len(estimates) - 1)
    unknown = variance.isnan()
    dof = torch.where(variance > 0, variance.square() / (parts.square() / dofs).sum(0), math.inf)
    variance, dof = torch.where(unknown, spread, variance), torch.where(unknown, len(estimates) - 1.0, dof)
    return Estimate(value, variance.sqrt(), dof, products)


def until(run: Callable[[int, Tensor], Estimate], samples: int, target: float, rounds: int = 16) -> Estimate:
    """Passes with new probes until every sample's standard error is at most ``target``, or for ``rounds`` rounds.

    A sample that has reached it is done: neither its value nor its error depends on its batch-mates.

    Args:
        run: (round, rows) -> the estimate of those rows; it passes both on to :meth:`Trace.start`.
        samples: how many rows there are.
        target: of the standard error as widened by its degrees of freedom, in nats.
        rounds: at most.

    Returns:
        The pooled estimate, (samples,); its ``products`` are those of the sample that took most.
    """
    checked_count(rounds, "rounds", 1)
    if not target > 0:
        raise ValueError(f"target must be a positive standard error in nats, not {target!r}.")
    rows = torch.arange(samples)
    history: list[Estimate] = []
    done: Estimate | None = None
    for number in range(rounds):
        history.append(run(number, rows))
        pooled = pool(history)
        if done is None:
            done = pooled
        else:
            put = {name: getattr(done, name).index_copy(0, rows.to(pooled.value.device), getattr(pooled, name))
                   for name in ("value", "stderr", "dof")}  # fmt: skip
            done = Estimate(**put, products=pooled.products)
        open_ = ~(pooled.bar <= target)  # NaN stays open
        if not bool(open_.any()):
            break
        rows = rows[open_.to(rows.device)]
        history = [Estimate(e.value[open_], e.stderr[open_], e.dof[open_], e.products) for e in history]
    if done is None:
        raise ValueError(f"rounds must be at least 1, not {rounds}.")
    return done


# ---------------------------------------------------------------- pieces


class Spread:
    """The variance of vᵀJv over probes v from the gradients Jᵀv, each of whose coordinates tells of it.

    For random signs, Σ_i Var(v_i (Jᵀv)_i) is half of the variance, and for normal numbers E‖Jᵀv‖² is, for symmetric J
    (for another J it is more). The spread of the forms themselves has the same mean and far more noise of its own.
    """

    def __init__(self, normals: bool = False) -> None:
        self.normals, self.count = normals, 0
        self.total = self.squares = _NOTHING

    def add(self, vectors: Tensor, gradients: Tensor) -> None:
        """More probes (k, samples, d) and their gradients."""
        products = gradients.double() * vectors if not self.normals else gradients.double()
        self.count += len(vectors)
        self.total = self.total + products.sum(0)
        self.squares = self.squares + products.square().sum((0, 2))

    def variance(self) -> Tensor:
        """(samples,); NaN for one probe."""
        if self.count < 2:
            return self.squares * math.nan
        if self.normals:
            return 2.0 * self.squares / self.count
        apart = self.squares - self.total.square().sum(1) / self.count
        return 2.0 * apart.clamp_min(0.0) / (self.count - 1)


class _Nodewise:
    """The error of a sum whose nodes are independent, from the variance at each of k probes.

    A variance is taken to have k - ½ degrees of freedom: forms of rank one have k, and of two signs each some part of J
    is not seen at all.
    """

    def __init__(self, like: Tensor, k: int) -> None:
        self.variance = torch.zeros_like(like)
        self.squares = torch.zeros_like(like)
        self.k, self.dof = k, k - 0.5

    def add(self, weight: float, variance: Tensor) -> None:
        """The variance (samples,) of one probe at a node."""
        part = weight**2 * variance / self.k
        self.variance = self.variance + part
        self.squares = self.squares + part.square() / (self.dof + 2.0)

    def error(self) -> tuple[Tensor, Tensor]:
        """The standard error, and Satterthwaite's degrees of freedom."""
        if self.k < 2:
            return _unknown(self.variance)
        dof = _satterthwaite(self.variance, self.squares).clamp_min(self.dof)
        return self.variance.sqrt(), torch.where(self.variance > 0, dof.clamp_max(heavy_dof(self.k)), dof)


def are_few(d: int, probes: int) -> bool:
    """Whether random signs could all be the same, up to the sign of a whole probe, with a probability above 1e-3.

    Up to three coordinates have four such probes at most, of which even many may miss one.
    """
    return probes > 1 and (d <= 3 or (d - 1) * (probes - 1) < 10)


def heavy_dof(probes: int) -> float:
    """Degrees of freedom for means of forms vᵀJv, whose tails are heavier than those of normal numbers; measured."""
    return max(min(probes - 0.5, 6.0), probes / 4.0)


def spread_dof(probes: int) -> float:
    """Degrees of freedom of the spread of eight and more forms vᵀJv themselves, which is the noisier; measured.

    On exact mixtures in 4 to 12 dimensions 2.5 for 8 probes cover 95 % and more, 3.2 for them 94 % at the least.
    """
    return max(2.5, 0.23 * probes)


def columns_of(d: int, seed: int, purpose: str) -> Tensor:
    """The columns of the Hadamard matrix of d dimensions, padded to a power of two, in a random order.

    One order for all samples, whichever they are: their signs differ, so their errors are uncorrelated.
    """
    return NoiseStream(seed, f"{purpose} order").uniform((1, _padded(d)), torch.float64)[0].argsort()


def _padded(d: int) -> int:
    return 1 << (max(1, d) - 1).bit_length()


def hadamard(rows: Tensor, columns: Tensor) -> Tensor:
    """Entries of the Hadamard matrix, (columns, rows) in int8: 1 for an even number of common bits, else -1."""
    bits = rows & columns[:, None]
    for shift in (32, 16, 8, 4, 2, 1):  # the parity of 64 bits
        bits = bits ^ (bits >> shift)
    return (1 - 2 * (bits & 1)).to(torch.int8)


def walsh_hadamard(values: Tensor) -> Tensor:
    """H values along the last dimension, a power of two."""
    size, shape, half = values.shape[-1], values.shape, 1
    while half < size:
        pairs = values.reshape(*shape[:-1], size // (2 * half), 2, half)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack([even + odd, even - odd], dim=-2)
        half *= 2
    return values.reshape(shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, dtype=torch.float64)


def _satterthwaite(variance: Tensor, squares: Tensor) -> Tensor:
    """(Σ V_n)² / Σ (V_n² / k) from v_n with k degrees of freedom each: variance Σ v_n, squares Σ v_n² / (k + 2).

    E v_n² = V_n² (k + 2) / k, which makes ``squares`` unbiased, and its double is too much in variance².
    """
    dof = variance.square() / squares.clamp_min(torch.finfo(torch.float64).tiny) - 2.0
    return torch.where(squares > 0, dof, math.inf)


def _of_whole_integrals(integrals: Tensor) -> tuple[Tensor, Tensor]:
    """The error of a mean of independent integrals (k, samples), from their spread."""
    k = len(integrals)
    if k == 1:
        return _unknown(integrals[0])
    return integrals.std(0) / math.sqrt(k), torch.full_like(integrals[0], k - 1)


def _unknown(like: Tensor) -> tuple[Tensor, Tensor]:
    nan = torch.full_like(like.detach(), math.nan)
    return nan, torch.zeros_like(nan)


def _smoothed(scale: Tensor, weights: Tensor) -> Tensor:
    """K_nn (samples, nodes) without most of its noise: smooth over nodes is what it is per node, K_nn step².

    The weights themselves may alternate (as Simpson's do), so the step is their local mean.
    """
    n = torch.arange(len(weights), dtype=torch.float64, device=scale.device)
    window = torch.exp(-0.5 * ((n[:, None] - n) / 1.5).square())
    window = window / window.sum(1, keepdim=True)
    step = (window @ weights.abs()).clamp_min(torch.finfo(torch.float64).tiny).square()
    return (scale * step) @ window.mT / step


def _fitted(scale: Tensor, products: Tensor, weights: Tensor) -> Tensor:
    """K_nm (samples, nodes, nodes) of the scale K_nn with the correlation sech(|n - m| / length) that fits best."""
    nodes = len(weights)
    n = torch.arange(nodes, dtype=torch.float64, device=scale.device)
    distance = (n[:, None] - n).abs()
    amplitude = scale.sqrt()
    outer = amplitude[:, :, None] * amplitude[:, None]
    # The diagonal takes no part: it is K_nn, whatever the length.
    trust = (weights[:, None] * weights).square() * ~products[0].isnan() * (distance > 0)
    products = products.nan_to_num()
    best = torch.full((len(scale),), -math.inf, dtype=torch.float64, device=scale.device)
    length = torch.full_like(best, _LENGTHS[0])
    for candidate in _LENGTHS:
        model = outer / torch.cosh((distance / candidate).clamp_max(50.0))
        along = (trust * products * model).sum((1, 2)).clamp_min(0.0)
        size = (trust * model.square()).sum((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
        gain = along.square() / size  # what the model with its best factor takes from the sum of squares
        better = gain > best
        best, length = torch.where(better, gain, best), torch.where(better, torch.full_like(length, candidate), length)
    return outer / torch.cosh((distance / length[:, None, None]).clamp_max(50.0))
