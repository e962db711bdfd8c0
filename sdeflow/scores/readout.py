r"""How a score's numbers follow from what its network returns: linearly, with coefficients of t alone.

    E[eps | x_t] = state(u - shift) + output(F) + level,      F the network's output at what it sees,

for the centred state u = x - offset in the kernel's basis. Since the coefficients depend on t alone, a solver on a
fixed grid computes them once for all of its times (:class:`GridScore`), and a call then costs the network and little
more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.numerics.linear import Linear

__all__ = ["GridScore", "Readout"]


class Readout(NamedTuple):
    """E[eps | x_t] = state(u - shift) + output(F) + level.

    Attributes:
        output: the map of the network's output; None is the identity.
        state: the map of the centred state, or None.
        level: what is added, or None.
        shift: what is taken off the state first, or None.
        input: the network sees input(u - shift) where this is given, else the state x itself.
    """

    output: Linear | None
    state: Linear | None = None
    level: Tensor | None = None
    shift: Tensor | None = None
    input: Linear | None = None

    def shifted(self, centred: Tensor) -> Tensor:
        """u - shift."""
        return centred if self.shift is None else centred - self.shift.to(centred.dtype)

    def noise(self, output: Tensor, centred: Tensor) -> Tensor:
        """E[eps | x_t] from the network's output and the centred state, which is not read where ``state`` is None."""
        eps = output if self.output is None else self.output(output)
        if self.state is not None:
            eps = eps + self.state(self.shifted(centred))
        return eps if self.level is None else eps + self.level.to(eps.dtype)


class GridScore:
    """A score at the n times of a fixed grid.

    Args:
        readout: its coefficients, with a leading side for the times.
        call: (i, u) -> the network's output F for solver states u (batch, *event) at time number i, in the basis.
    """

    def __init__(self, readout: Readout, call: Callable[[int, Tensor], Tensor]) -> None:
        self.readout = readout
        self.call = call

    def coefficients(self, n: int, identity: Linear) -> tuple[Linear, Linear, Tensor | None]:
        """eps = of_state u + of_output F + constant at each time: two maps, of values (n, ...), and the constant.

        Args:
            n: how many times.
            identity: the identity map, where the output is eps itself.
        """
        readout = self.readout
        each = identity.of(identity.values.expand(n, *identity.values.shape))
        output = each if readout.output is None else readout.output
        state = output.of(torch.zeros_like(output.values)) if readout.state is None else readout.state
        constant = readout.level
        if readout.state is not None and readout.shift is not None:
            moved = -readout.state(readout.shift.expand(n, *readout.shift.shape[1:]))
            constant = moved if constant is None else constant + moved
        return state, output, constant
