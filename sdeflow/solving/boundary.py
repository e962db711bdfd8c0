r"""What a step of a simulation does at the end of the domain where f and g are real.

A step of fixed length may lead beyond an end that no path of the SDE crosses, as below 0 in a square-root process.

==========  ===========================================================================================================
truncate    f and g are taken at the nearest state of the domain; the state itself goes on from where it is, and is
            reported as the nearest state of the domain. This is full truncation (Lord, Koekkoek & van Dijk,
            Quantitative Finance 10, 2010), which has the least bias of the schemes compared there for Heston's model.
reflect     a state beyond an end is mirrored at it after each step: an instantaneously reflecting end.
absorb      a path that reaches an end stays there: an absorbing end, such as bankruptcy. Where the SDE's own paths
            leave an end again (a square-root process with 0 < delta < 2), this is another process.
==========  ===========================================================================================================

Each has a bias of the scheme, which falls with the step: of order h^1/2 at an end that is often reached. Where the SDE
has an exact kernel, ``solver="exact"`` has none.

**Gradients** of truncated and reflected states are those of the steps taken. Near an end a derivative such as that of
sqrt(x) has heavy tails, and so has its mean over paths. Absorption has no such gradient: whether a path is absorbed
jumps as a parameter moves, so that the mean of the paths' derivatives is not the derivative of the mean. Measured on
dx = 2 (θ - x) dt + 0.6 sqrt(x) dw at θ = 0.04 from 0.05, in 25 steps: d E[x_1] / dθ of the absorbed chain is
0.55 ± 0.01, and the mean over its paths 0.369 ± 0.002.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DeclarationError
from sdeflow.numerics.checks import checked_choice
from sdeflow.numerics.compile import compile_expressions
from sdeflow.solvers.problem import Field
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.domain import ends_of, ends_that_are_told
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["BOUNDARIES", "Boundary", "Kept", "states_to_try"]

BOUNDARIES = ("truncate", "reflect", "absorb")

_OFF = 1e-9  # from an end, in the units of the state
_TRIED = 512  # states of a coupled SDE, beside and without regard to its ends


def states_to_try(declaration: Declaration, values: Mapping[sp.Symbol, float], times: Tensor) -> list[Tensor]:
    """For each component numbers (n, len(times)): an SDE that is real somewhere should be real at one of the n states.

    Some lie between and beside the ends of the domain at these times, as far as f and g tell them. The others have all
    magnitudes from 1e-6 to 1e6, both signs, and the multiples of 0.1 up to 20. Which numbers several components have
    together is drawn, with a fixed seed.

    Args:
        declaration: the SDE.
        values: numbers of its parameters.
        times: one-dimensional, float64.
    """
    sizes = torch.logspace(-6.0, 6.0, 121, dtype=torch.float64)
    anywhere = torch.cat([-sizes, sizes, torch.arange(-200, 201, dtype=torch.float64) / 10.0])
    generator, tried = torch.Generator().manual_seed(0), []
    for ends in ends_that_are_told(declaration):
        found = [compile_expressions(end, (time_symbol,), values, declaration.T)(times) for end in ends]
        parts = [_beside(torch.stack(found)) if found else anywhere[:, None], anywhere[:, None]]
        if declaration.coupled:
            parts = [part[torch.randint(len(part), (_TRIED,), generator=generator)] for part in parts]
        tried.append(torch.cat([part.expand(-1, len(times)) for part in parts]))
    return tried


def _beside(ends: Tensor) -> Tensor:
    """Numbers between each two neighbours of ``ends`` (n, times), and on either side of all; NaN is no end."""
    ends = ends.sort(0).values  # NaN comes last
    steps = torch.tensor([1e-3, 1.0, 1e3], dtype=ends.dtype)[:, None, None] * (1.0 + ends.abs())
    return torch.cat([0.5 * (ends[1:] + ends[:-1]), (ends - steps).flatten(0, 1), (ends + steps).flatten(0, 1)])


class Kept:
    """The domain of an SDE without a Gaussian kernel in a solve of its reverse SDE, by truncation.

    f, g and the score are asked for at the nearest state off the ends, and states are shown there.

    Args:
        declaration: the SDE.
        values: numbers and tensors of its parameters.
        x: states (batch, *event) at the start.
        t: its time.
    """

    def __init__(
        self, declaration: Declaration, values: Mapping[sp.Symbol, float | Tensor], x: Tensor, t: float
    ) -> None:
        self._event = tuple(x.shape[1:])
        try:
            self._ends: Boundary | None = Boundary("truncate", declaration, values, x, t)
        except DeclarationError:  # no end, or none that is told for each component by itself
            self._ends = None

    def state(self, x: Tensor, t: float) -> Tensor:
        """States as they are shown."""
        return x if self._ends is None else self._ends.inside(x, t)

    def field(self, field: Field) -> Field:
        """The equation of flattened states, asked for within the domain."""
        ends, event, diffusion = self._ends, self._event, field.diffusion
        if ends is None:
            return field

        def within(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
            def kept(y: Tensor, t: Tensor) -> Tensor:
                return function(ends.inside(y.reshape(-1, *event), float(t)).flatten(1), t)

            return kept

        if diffusion is not None:
            correction = None if diffusion.correction is None else within(diffusion.correction)
            diffusion = replace(diffusion, g=within(diffusion.g), correction=correction)
        return Field(within(field.drift), diffusion)


class Boundary:
    """The ends of the domain of states (batch, *event) of one simulation, and what happens there.

    Args:
        kind: "truncate", "reflect" or "absorb".
        declaration: the SDE.
        values: numbers and tensors of its parameters.
        x: the states at the start, inside the domain, which tell on which side of each end it lies.
        t: the time of the start.

    Raises:
        ValueError: for another kind.
        DeclarationError: for an SDE whose coefficients are real everywhere, or whose domain is no interval for each
            component by itself.
    """

    def __init__(
        self,
        kind: str,
        declaration: Declaration,
        values: Mapping[sp.Symbol, float | Tensor],
        x: Tensor,
        t: float = 0.0,
    ) -> None:
        checked_choice(kind, "boundary", (*BOUNDARIES, None))
        self.kind, self._coupled, self._values = kind, declaration.coupled, values
        found = ends_of(declaration)
        if not any(found):
            raise DeclarationError(
                f'boundary="{kind}" needs a domain with an end, and f and g of this SDE are real everywhere: '
                "leave it out."
            )
        self._symbols = set().union(*(root.free_symbols for ends in found for root, _ in ends))
        self._roots, self._below = [], []
        start = torch.tensor(t, dtype=torch.float64)
        for part, component, ends in zip(self._components(x), declaration.state, found, strict=True):
            roots = [compile_expressions(root, (time_symbol,), values, declaration.T) for root, _ in ends]
            signs = [compile_expressions(factor, (time_symbol, component), values, declaration.T) for _, factor in ends]
            sides = []
            for root, sign in zip(roots, signs, strict=True):
                end = root(start).to(part)
                above = (
                    sign(start, end + 1e-6 * (1.0 + end.abs())).to(part) > 0
                )  # where a state starts on the end itself
                sides.append(torch.where(part == end, above, part > end))
            self._roots.append(roots)
            self._below.append(sides)
        low, high = self._limits(x, t)
        self._stopped = (x <= low) | (x >= high), x

    def _components(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind(1) if self._coupled else (x,)

    def _limits(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The lower and the upper end for each number of ``x``; infinite where there is none."""
        time, lows, highs = torch.tensor(t, dtype=torch.float64), [], []
        for part, roots, sides in zip(self._components(x), self._roots, self._below, strict=True):
            low, high = torch.full_like(part, -torch.inf), torch.full_like(part, torch.inf)
            for root, is_lower in zip(roots, sides, strict=True):
                end = root(time).to(part)
                real = torch.isfinite(end)
                low = torch.where(is_lower & real, torch.maximum(low, end), low)
                high = torch.where(~is_lower & real, torch.minimum(high, end), high)
            lows.append(low)
            highs.append(high)
        return (torch.stack(lows, 1), torch.stack(highs, 1)) if self._coupled else (lows[0], highs[0])

    def require_gradient(self) -> None:
        """That the states have a gradient in whatever requires grad.

        Raises:
            ValueError: for absorption; for states at t = 0 that require grad and lie on an end; and, under truncation,
                for a parameter that requires grad and moves an end.
        """
        if self.kind == "absorb":
            raise ValueError(
                'boundary="absorb" has no gradient: whether a path is absorbed jumps as a parameter or x_0 moves, and '
                "no derivative of a path shows that. Simulate under torch.no_grad() with gradient=None, or take "
                '"truncate" or "reflect"; where f and g are 0 at the end, "truncate" shows the same states.'
            )
        on_end, x = self._stopped
        if x.requires_grad and bool(on_end.any()):
            raise ValueError(
                "x_0 requires grad and lies on an end of the domain, where the states have no derivative in it: start "
                "inside, or detach x_0."
            )
        moved = [s for s, v in self._values.items() if s in self._symbols and getattr(v, "requires_grad", False)]
        if self.kind == "truncate" and moved:
            raise ValueError(
                f"an end of the domain moves with {', '.join(map(str, moved))}, which requires grad: the derivative of "
                'truncated coefficients in it is not known there. Freeze it, or take boundary="reflect".'
            )

    def nearest(self, x: Tensor, t: float) -> Tensor:
        """The nearest states of the domain."""
        low, high = self._limits(x, t)
        return torch.maximum(torch.minimum(x, high), low)

    def inside(self, x: Tensor, t: float) -> Tensor:
        """The nearest states that lie off the ends, where a score may be infinite."""
        low, high = (end + side * self._off(end) for end, side in zip(self._limits(x, t), (1.0, -1.0), strict=True))
        return torch.maximum(torch.minimum(x, high), low)

    @staticmethod
    def _off(end: Tensor) -> Tensor:
        return (4.0 * torch.finfo(end.dtype).eps * end.abs()).clamp_min(_OFF).nan_to_num(posinf=0.0)

    def after_step(self, x: Tensor, t: float) -> Tensor:
        """The states from which the next step starts."""
        if self.kind == "truncate":
            return x
        low, high = self._limits(x, t)
        if self.kind == "reflect":
            x = torch.where(x < low, 2.0 * low - x, x)
            x = torch.where(x > high, 2.0 * high - x, x)
            return torch.maximum(torch.minimum(x, high), low)
        x = torch.maximum(torch.minimum(x, high), low)
        stopped, where = self._stopped
        x = torch.where(stopped, where, x)
        self._stopped = (x <= low) | (x >= high), x
        return x
