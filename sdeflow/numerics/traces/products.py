"""Vector-Jacobian products Jᵀ v of fields of samples, and the forms and traces made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdeflow.errors import ScoreError

_CHUNK = 2**24  # elements of vector-Jacobian products held in memory at once


class Products:
    """Vector-Jacobian products of fields of samples, as many at once as the memory and the network allow.

    Args:
        create_graph: whether the products can be differentiated.

    Attributes:
        count: products taken so far.
    """

    def __init__(self, create_graph: bool = False) -> None:
        self.create_graph = create_graph
        self.count = 0
        self._batched = True

    def gradients(self, output: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """Jᵀ v of each sample, (k, samples, d) for vectors (k, samples, d), in the dtype of the output.

        The products are batched over k if all operations of the network allow it, else taken one by one.
        """
        vectors = vectors.to(output.dtype).reshape(-1, *output.shape)
        self.count += len(vectors)
        options = {"retain_graph": True, "create_graph": self.create_graph, "allow_unused": True}

        def checked(gradient: Tensor | None) -> Tensor:
            if gradient is None:
                raise ScoreError("the field does not depend on x by its graph, so it has no divergence.")
            return gradient

        size = self.at_once(output)
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
        """vᵀ J v of each sample, (k, samples) in float64, for vectors (k, samples, d)."""
        parts = self.chunks(vectors, output)
        return torch.cat([dot(self.gradients(output, x, part), part.to(output.dtype)) for part in parts])

    @staticmethod
    def at_once(output: Tensor) -> int:
        """How many products with an output of this size are held in memory at once."""
        return max(1, _CHUNK // max(1, output.numel()))

    def chunks(self, vectors: Tensor, output: Tensor) -> Sequence[Tensor]:
        """Vectors (k, samples, d) in parts whose products are held in memory at once."""
        return vectors.split(self.at_once(output))

    def divergence(self, output: Tensor, x: Tensor) -> Tensor:
        """tr J of each sample from all d products, (samples,) in float64."""
        d = math.prod(output.shape[1:])
        size = max(1, min(d, self.at_once(output)))
        total = torch.zeros(len(output), dtype=torch.float64, device=output.device)
        for first in range(0, d, size):
            index = torch.arange(first, min(first + size, d), device=output.device)
            basis = torch.zeros(len(index), 1, d, dtype=output.dtype, device=output.device)
            basis[torch.arange(len(index)), 0, index] = 1.0
            basis = basis.expand(-1, len(output), -1)
            # Entry i of row i of J; the rest of the row is not needed.
            gradients = self.gradients(output, x, basis)
            diagonal = gradients.gather(2, index[:, None, None].expand(-1, len(output), 1))
            total = total + diagonal.sum((0, 2), dtype=torch.float64)
        return total


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b over the last dimension, summed in float64."""
    return (a * b).sum(-1, dtype=torch.float64)
