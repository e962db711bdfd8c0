r"""Embeddings of the two inputs of a net besides the state: the noise level and the condition.

A single number t is a poor input for a network, which must react to small changes of t with bounded
activations. So t is first mapped to Fourier features

    \gamma(t) = (sin \omega_k t, cos \omega_k t),   k = 0, ..., n - 1,
    \omega_k = \omega_min (\omega_max / \omega_min)^{k / (n - 1)},

with *fixed*, geometrically spaced angular frequencies (Vaswani et al., arXiv 1706.03762, for the
positions of a transformer; Ho et al., arXiv 2006.11239, for diffusion models), then to a learned
embedding by a small MLP. The lowest frequency, 1/64, has a period of 402 and separates all noise levels
up to 80 and all log-SNRs. The highest, 64, has a period of 0.1 and resolves a hundredth of the unit
interval. So the same embedding serves for a time, a noise level and a log-SNR.

Do not confuse them with *random* Fourier features (Tancik et al., arXiv 2006.10739), as in the score
models of Song et al. (arXiv 2011.13456). Those draw the frequencies from a Gaussian, so they depend on a
seed and need an input of a known scale. Frequencies that are too high have a cost: the net may then vary
quickly with t, and solvers of the probability flow need more steps.

A class is a learned vector that is added to the embedding of t, and a condition vector is added through a small
MLP. "No label" and "no condition" have learned vectors of their own, as classifier-free guidance needs (Ho and
Salimans, arXiv 2207.12598).
"""

import math
from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TimeEmbedding(nn.Module):
    r"""Creates an embedding of numbers: fixed Fourier features, then a small MLP.

    Args:
        features: The length of the embedding.
        frequencies: The number of angular frequencies; each gives a sine and a cosine.
        lowest: The lowest angular frequency, in radians per unit of t. Numbers further apart than
            2 pi / lowest may have the same features.
        highest: The highest angular frequency.

    Raises:
        ValueError: If a number is not positive or the frequencies are out of order.
    """

    def __init__(
        self,
        features: int,
        *,
        frequencies: int = 32,
        lowest: float = 1 / 64,
        highest: float = 64.0,
    ) -> None:
        super().__init__()
        require_sizes("TimeEmbedding", features=features, frequencies=frequencies)
        if frequencies < 2:
            raise ValueError(f"TimeEmbedding(frequencies={frequencies}): give at least 2 frequencies")
        if not all(map(is_number, (lowest, highest))) or not 0 < lowest < highest:
            raise ValueError(
                f"TimeEmbedding(lowest={lowest}, highest={highest}): give angular frequencies with 0 < lowest < highest"
            )
        omega = torch.logspace(math.log10(lowest), math.log10(highest), frequencies)
        self.omega: Tensor
        self.register_buffer("omega", omega)
        first = nn.Linear(2 * frequencies, features)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(features, features))

    def forward(self, t: Tensor) -> Tensor:
        """Embeds t, shape (batch,), as a tensor of shape (batch, features)."""
        # Half precision has too few digits for the phase.
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        phase = t[:, None] * self.omega.to(t.dtype)
        waves = torch.cat([phase.sin(), phase.cos()], dim=-1)
        dtype = self.mlp[0].weight.dtype
        return self.mlp(waves.to(dtype))  # type: ignore[arg-type]  # the first layer's weight is a tensor


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer, of Python or NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number, of Python or NumPy."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_sizes(what: str, **sizes: object) -> None:
    """Raises a ValueError if the sizes of ``what`` are not positive integers."""
    for name, size in sizes.items():
        if not is_whole(size) or not 0 < size < 2**31:
            raise ValueError(f"{what}({name}={size!r}): give a positive integer below 2^31")


def require_dropout(dropout: object) -> None:
    """Raises a ValueError if ``dropout`` is not a probability below 1."""
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}: give a probability in [0, 1)")


def checked_input(x: object, weight: Tensor, what: str = "x") -> Tensor:
    """x as a floating tensor of the dtype of ``weight``. Arrays and lists are converted.

    Raises:
        TypeError: if x is not a state, or a tensor of another dtype than the net's.
    """
    if not isinstance(x, Tensor):
        if hasattr(x, "filled"):  # a masked array: torch would drop its mask silently
            raise TypeError(f"{what} is a masked array, with entries without a value: pass {what}.filled(value)")
        try:
            if isinstance(x, list | tuple) and any(hasattr(part, "shape") for part in x):
                x = torch.stack([torch.as_tensor(part) for part in x])
            else:
                x = torch.tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{what} must be a tensor or an array, not {type(x).__name__}: {error}") from error
        x = x.to(weight.dtype) if x.is_floating_point() else x
    if x.layout != torch.strided:
        raise TypeError(f"{what} is a sparse tensor: pass {what}.to_dense()")
    if not x.is_floating_point():
        raise TypeError(f"{what} is {x.dtype}, a net takes floating states: pass {what}.to({weight.dtype})")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{what} is {x.dtype} and the net {weight.dtype}: pass {what}.to({weight.dtype}), or net.to({x.dtype})"
        )
    return x


class Conditioning(nn.Module):
    r"""Creates the vector that modulates the blocks of a net: SiLU(embedding of t + embedding of y).

    A label has a learned vector, and so has "no label". A condition vector passes through a small MLP, after it is
    standardised by the mean and the standard deviation that `measure` has seen (0 and 1 at first); "no condition" has a
    learned vector too.

    Args:
        features: The length of the vector.
        classes: The number of classes; 0 for a net without labels.
        condition: The length of a condition vector; 0 for a net without one.

    Raises:
        ValueError: If `classes` or `condition` is negative.
    """

    def __init__(self, features: int, classes: int = 0, condition: int = 0) -> None:
        super().__init__()
        require_sizes("Conditioning", features=features)
        if not is_whole(classes) or classes < 0:
            raise ValueError(f"classes={classes}: give the number of classes, or 0 for none")
        if not is_whole(condition) or condition < 0:
            raise ValueError(f"condition={condition}: give the length of a condition vector, or 0 for none")
        self.classes, self.condition = classes, condition
        self.time = TimeEmbedding(features)
        self.label = nn.Embedding(classes + 1, features) if classes else None
        self.vector: nn.Sequential | None = None
        if condition:
            first = nn.Linear(condition, features)
            self.vector = nn.Sequential(first, nn.SiLU(), nn.Linear(features, features))
            self.no_vector = nn.Parameter(torch.zeros(features))
            self.mean: Tensor
            self.std: Tensor
            self.register_buffer("mean", torch.zeros(condition))
            self.register_buffer("std", torch.ones(condition))

    def forward(self, batch: int, t: Tensor, y: object = None) -> Tensor:
        r"""Embeds t and y.

        Args:
            batch: The number of samples, which t and y must match.
            t: The time, noise level or log-SNR, shape (batch,).
            y: The conditions; None if no sample has one. With `classes`, labels of shape
                (batch,), integers in [0, classes]; the label `classes` means "no label". With `condition`, vectors of
                shape (batch, condition); a vector of NaN means "no condition". With both, the tuple (labels, vectors).

        Returns:
            The vectors, shape (batch, features).

        Raises:
            ValueError: If t or y does not fit. Labels out of range are checked on the CPU only;
                an accelerator reports them itself.
            TypeError: If labels do not hold integers, or vectors no floating numbers.
        """
        if t.shape != (batch,):
            raise ValueError(
                f"t has shape {tuple(t.shape)}, a net takes one number per sample, "
                f"shape ({batch},): pass t.expand({batch}) for a time that all samples share"
            )
        h = self.time(t)
        labels, vectors = self._parts(y)
        if self.label is not None:
            h = h + self._of_labels(self.label, t, labels)
        if self.vector is not None:
            h = h + self._of_vectors(self.vector, t, vectors)
        return F.silu(h)

    def null(self, y: object) -> object:
        """The y that means "no condition", in the shapes of y: the label `classes`, and vectors of NaN."""
        labels, vectors = self._parts(y)
        labels = torch.full_like(labels, self.classes) if isinstance(labels, Tensor) else labels
        vectors = torch.full_like(vectors, math.nan) if isinstance(vectors, Tensor) else vectors
        return (labels, vectors) if self.classes and self.condition else labels if self.classes else vectors

    def measure(self, y: object) -> None:
        """Takes the mean and the standard deviation of condition vectors from those of the training data."""
        vectors = self._parts(y)[1]
        if isinstance(vectors, Tensor):
            self._require_floating(vectors)
            seen = vectors.to(torch.float64)
            std = seen.std(0, correction=0)
            self.mean.copy_(seen.mean(0))
            self.std.copy_(torch.where(std > 0, std, 1.0))

    def _require_floating(self, vectors: Tensor) -> None:
        if not vectors.is_floating_point():
            raise TypeError(
                f"condition vectors y are {vectors.dtype}, a net takes a floating tensor (batch, {self.condition}): "
                "pass y.float()"
            )

    def _parts(self, y: object) -> tuple[object, object]:
        """The labels and the vectors of y."""
        if y is not None and not (self.classes or self.condition):
            raise ValueError(
                "a condition y was given to a net without any: build it with classes=, the number of classes, or "
                "condition=, the length of a vector, or leave y out"
            )
        if self.classes and self.condition:
            if y is None:
                return None, None
            if not isinstance(y, tuple | list) or len(y) != 2:
                raise ValueError("y must be the tuple (labels, vectors) of a net with classes= and condition=")
            return y[0], y[1]
        return (y, None) if self.classes else (None, y)

    def _of_labels(self, table: nn.Embedding, t: Tensor, y: object) -> Tensor:
        """The embedding of labels."""
        if y is None:
            y = torch.full_like(t, self.classes, dtype=torch.long)
        if not isinstance(y, Tensor):
            raise TypeError(f"labels y are {type(y).__name__}, a net takes a tensor of integers")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            write = "y.argmax(1)" if y.ndim == 2 else "y.long()"
            raise TypeError(f"labels y are {y.dtype} of shape {tuple(y.shape)}, a net takes integers: pass {write}")
        if y.shape != t.shape:
            raise ValueError(
                f"labels y have shape {tuple(y.shape)}, a net takes one label per sample, shape ({len(t)},)"
            )
        try:
            return table(y.long())
        except IndexError as error:
            raise ValueError(
                f"labels y lie in [{y.min()}, {y.max()}], this net takes 0 to {self.classes - 1}, "
                f"and {self.classes} for no label"
            ) from error

    def _of_vectors(self, embed: nn.Sequential, t: Tensor, y: object) -> Tensor:
        """The embedding of condition vectors."""
        if y is None:
            return self.no_vector.expand(len(t), -1)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"condition vectors y are {type(y).__name__}, a net takes a floating tensor (batch, {self.condition})"
            )
        self._require_floating(y)
        if y.shape != (len(t), self.condition):
            raise ValueError(
                f"condition vectors y have shape {tuple(y.shape)}, this net takes ({len(t)}, {self.condition})"
            )
        none = y.isnan().all(1, keepdim=True)
        seen = (torch.where(none, self.mean.to(y.dtype), y) - self.mean.to(y.dtype)) / self.std.to(y.dtype)
        return torch.where(none, self.no_vector, embed(seen.to(self.no_vector.dtype)))
