r"""The steps of an exponential multistep solve as numbers, and the loop that uses them.

What depends on the kernel and the grid alone (:class:`Steps`) is kept for the next solve; a :class:`Program` joins it
to the score, whose own coefficients on the grid (:class:`~sdeflow.scores.GridScore`) are multiplied in. A step then
costs the call, one fused operation for each coefficient, and nothing else.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdeflow.kernels.gaussian import Kernel
from sdeflow.numerics.basis import Basis
from sdeflow.numerics.linear import Factor, Linear, add_multiple, add_multiples, multiplied
from sdeflow.scores import GridScore
from sdeflow.solvers.exponential.weights import Rule, Transfer, weights
from sdeflow.solvers.problem import Problem

__all__ = ["Program", "Steps", "kept", "predictions"]

Nodes = Sequence[tuple[np.ndarray, np.ndarray | None]]

_KEPT = 16  # grids for each kernel
_known: weakref.WeakKeyDictionary[Kernel, OrderedDict[object, Steps]] = weakref.WeakKeyDictionary()


def kept(kernel: Kernel, key: object, make: Callable[[], Steps]) -> Steps:
    """``make()``, or what it gave for the same ``key`` before; None is never kept."""
    if key is None:
        return make()
    found = _known.setdefault(kernel, OrderedDict())
    if key not in found:
        found[key] = make()
        while len(found) > _KEPT:
            found.popitem(last=False)
    found.move_to_end(key)
    return found[key]


class Steps:
    """Propagators and weights of a grid, ready for states like ``like``.

    Args:
        transfer: of the grid.
        nodes: the nodes θ of predictor and corrector at each step, the newest first.
        rule: how moments become those of a published formula.
        like: states (batch, *event), for their shape, dtype and device.
        maps: the kind of the SDE's maps.

    Attributes:
        state, noise: factors of the state and of ξ in each step; noise is None for the flow.
        predictor, corrector: factors of the predictions F in each step.
    """

    def __init__(self, transfer: Transfer, nodes: Nodes, rule: Rule, like: Tensor, maps: type[Linear]) -> None:
        self.transfer = transfer
        self._rule, self._like, self._maps = rule, like[:0], maps
        self.state = self._ready(transfer.state)
        self.noise = None if transfer.noise is None else self._ready(transfer.noise)
        self.predictor = self._weighed([points for points, _ in nodes])
        self.corrector = self._weighed([points for _, points in nodes])
        self.longest = max(len(w) for pair in (self.predictor, self.corrector) for w in pair)

    def _ready(self, values: Tensor) -> list[Factor]:
        return self._maps.shaped(values, self._like).at_each(self._like)

    def _weighed(self, nodes: Sequence[np.ndarray | None]) -> list[list[Factor]]:
        """The weights of each step, computed together for all steps with as many nodes."""
        found: list[list[Factor]] = [[] for _ in nodes]
        given = [(step, points) for step, points in enumerate(nodes) if points is not None]
        for count in {len(points) for _, points in given}:
            steps = [step for step, points in given if len(points) == count]
            points = np.stack([nodes for _, nodes in given if len(nodes) == count])
            length = None if self.transfer.length is None else self.transfer.length[steps]
            values = weights(self._rule(self.transfer.moments[steps, :count], points, length), points)
            for j in range(count):
                for step, factor in zip(steps, self._ready(values[:, j]), strict=True):
                    found[step].append(factor)
        return found


class Program:
    """A solve: its steps, the score on its grid, and the loop.

    Args:
        steps: of the grid.
        score: on the grid.
        times: of the grid, from start to end.
        mean: the data's mean, (1, *event), for predictions relative to a reference; None where it is 0.
        like: states (batch, *event).
        kernel: the perturbation kernel.
        basis: in which the states are, where it is the solver's own.

    Raises:
        ValueError: for a basis that the SDE or the score cannot be taken to.
    """

    def __init__(
        self,
        steps: Steps,
        score: GridScore,
        times: np.ndarray,
        mean: Tensor | None,
        like: Tensor,
        kernel: Kernel,
        basis: Basis | None = None,
    ) -> None:
        self.steps, self.score, self.times, self.basis = steps, score, times.tolist(), basis
        transfer, n, maps = steps.transfer, len(steps.state), kernel.maps
        if basis is not None:
            sizes = [m.values.numel() for m in score.coefficients(n, maps.identity(like))[:2]]
            if kernel.basis is not None or kernel.coupled or max(sizes) > n:
                raise ValueError("a solver's basis needs an elementwise SDE, and one data_std for all coordinates.")
        own, of_noise = transfer.of_state, transfer.of_noise
        self.of_state, self.of_output, self.constant = predictions(own, of_noise, score, like, maps)
        self.mean = None if mean is None else mean.to(like)
        if mean is not None:  # F and the steps are of u - alpha mean
            alpha_0, alpha_1, keep, read = (
                maps.shaped(v, like) for v in (*transfer.alpha, transfer.state, transfer.of_state)
            )
            self.mean_in_prediction = (read @ alpha_0).scaled(-1.0).at_each(like)
            self.mean_in_step = (alpha_1 - keep @ alpha_0).at_each(like)
        self.first_order = self._fused()

    def _fused(self) -> list[tuple[float, float]] | None:
        """Factors of the state and the output in each step of a first-order solve with numbers alone, else None."""
        plain = self.constant is None and self.mean is None and self.basis is None
        if not plain or self.steps.longest > 1:
            return None
        found = []
        each = zip(self.steps.state, self.of_state, self.of_output, self.steps.predictor, strict=True)
        for keep, of_state, of_output, (weight,) in each:
            if not (isinstance(keep, float) and isinstance(weight, float)):
                return None
            if not (isinstance(of_state, float) and isinstance(of_output, float)):
                return None
            found.append((keep + weight * of_state, weight * of_output))
        return found

    def run(self, problem: Problem, u: Tensor, record: list[Tensor] | None = None) -> Tensor:
        """The state after the last step, from ``u`` (batch, *event); ``record`` receives every prediction F."""
        if self.first_order is not None and record is None:
            return self._run_first_order(problem, u, self.first_order)
        past: deque[Tensor] = deque(maxlen=self.steps.longest)
        base, noise, observed = u, None, problem.watch.on_step is not None
        for n in range(len(self.steps.state)):
            if len(past) == self.steps.longest:
                past.appendleft(self._prediction(problem, n, u, past.pop()))
            else:
                past.appendleft(self._prediction(problem, n, u, torch.empty_like(u)))
            if record is not None:
                record.append(past[0].clone())
            if n and self.steps.corrector[n - 1]:
                base = self._moved(n - 1, base, self.steps.corrector[n - 1], past, noise)
                if problem.watch.on_correction is not None:
                    problem.watch.on_correction(n, u, base)
            else:
                base = u
            if self.steps.noise is not None:
                noise = multiplied(self.steps.noise[n], self._motion(problem, n, u))
            u = self._moved(n, base, self.steps.predictor[n], past, noise)
            if observed:
                problem.observe(n + 1, self.times[n + 1], u if self.basis is None else self.basis.inverse(u))
        return u

    def _run_first_order(self, problem: Problem, u: Tensor, factors: list[tuple[float, float]]) -> Tensor:
        """The same, a step's prediction and propagation in one; ``factors`` are of the state and of the output."""
        noise, observed = self.steps.noise, problem.watch.on_step is not None
        for n, (of_state, of_output) in enumerate(factors):
            output = self.score.call(n, u)
            problem.watch.called(u, output, n)
            u = torch.mul(u, of_state).add_(output, alpha=of_output)
            if noise is not None:
                add_multiple(u, noise[n], self._motion(problem, n, u))
            if observed:
                problem.observe(n + 1, self.times[n + 1], u)
        return u

    def _motion(self, problem: Problem, n: int, u: Tensor) -> Tensor:
        """The normal numbers of step n."""
        return problem.motion((self.times[n], self.times[n + 1]), tuple(u.shape), u.dtype, u.device)

    def _prediction(self, problem: Problem, n: int, u: Tensor, out: Tensor) -> Tensor:
        """F at time number n, in the memory of ``out``."""
        if self.basis is None:
            output = self.score.call(n, u)
        else:
            output = self.basis.forward(self.score.call(n, self.basis.inverse(u)))
        problem.watch.called(u, output, n)
        factor = self.of_output[n]
        if torch.is_grad_enabled() and (output.requires_grad or u.requires_grad):
            out = multiplied(factor, output)  # memory that a graph holds must not be written again
        elif isinstance(factor, Linear):
            out.copy_(factor(output))
        else:
            torch.mul(output, factor, out=out)
        add_multiple(out, self.of_state[n], u)
        if self.mean is not None:
            add_multiple(out, self.mean_in_prediction[n], self.mean)
        return out if self.constant is None else out.add_(self.constant[n])

    def _moved(
        self, n: int, base: Tensor, factors: list[Factor], past: Sequence[Tensor], noise: Tensor | None
    ) -> Tensor:
        """Ψ base + Σ_j w_j F_j + noise, over step n."""
        u = add_multiples(multiplied(self.steps.state[n], base), factors, past)
        if self.mean is not None:
            add_multiple(u, self.mean_in_step[n], self.mean)
        return u if noise is None else u.add_(noise)


def predictions(
    of_state: Tensor, of_noise: Tensor, score: GridScore, like: Tensor, maps: type[Linear]
) -> tuple[list[Factor], list[Factor], Tensor | None]:
    """F at each time from what the score returns: factors of the state and of the output, and a constant.

    F = of_state u + of_noise eps, with eps as :meth:`~sdeflow.scores.GridScore.coefficients` has it.
    """
    own, map_of_noise = (maps.shaped(v, like) for v in (of_state, of_noise))
    of_u, of_output, constant = score.coefficients(len(of_state), maps.identity(like))
    of_u, of_output = map_of_noise @ of_u, map_of_noise @ of_output
    constant = None if constant is None else map_of_noise(constant.to(of_noise.dtype)).to(like)
    return (of_u + own).at_each(like), of_output.at_each(like), constant
