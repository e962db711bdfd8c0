r"""Pairs of states from which a score is learned where no kernel p(x_t | x_0) is known.

The law of a short step is known. For any s < t

    ∇ log p_t(x) = E[ ∇ log p(x_t | x_s) | x_t = x ],

so the score is learned from pairs (x_s, x_t), x_s simulated (arXiv:2407.07998). The law of the step is that of
:mod:`sdeflow.kernels.local`, and the target -P⁻¹ (x_t - m) is the exact score of the step that drew x_t. A longer step
lowers the variance of the target and raises its bias; the page :doc:`theory_training` has both, measured.

Not to be confused with matching p(x_t | x_0) itself, which :mod:`sdeflow.training.losses` does wherever it is known.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import NonFiniteStateError, ScheduleError, TooLargeError
from sdeflow.kernels.local import LocalLaw, semidefinite_root
from sdeflow.numerics.breakpoints import Features
from sdeflow.numerics.checks import checked_count
from sdeflow.numerics.linear import Linear
from sdeflow.numerics.noise import NoiseStream
from sdeflow.scores import DeclaredSDE
from sdeflow.solving.simulate import start
from sdeflow.symbolic.coupled import rank
from sdeflow.training.losses import Pairs
from sdeflow.training.weightings import Weighting, of_times, require_weighting

__all__ = ["SimulatedPairs"]

_MOST_STEPS = 1_000_000
_SHORT = 1e-12  # of the horizon


class SimulatedPairs:
    """Pairs (x_s, x_t) of a chain of Euler-Maruyama, and the local target of the last step.

    Args:
        sde: an SDE without a kernel, or a score of it.
        weighting: "score", in units of the last step's standard deviation; "likelihood", in those of g; or w(t).
        gap: the last step's length in units of T / steps; near t = 0 it is cut to [0, t].
        steps: of the chain over [0, T]; each path spends as many on its own [0, s].

    Warns:
        CoarseStepsWarning: where the steps jump over something smooth that f or g does in t.

    Raises:
        ScheduleError: for gap = 1 where g gᵀ is singular, for then a step has no density.
        ValueError: for a gap or steps that make no sense.
        TooLargeError: for more than a million steps.
    """

    def __init__(self, sde: DeclaredSDE, weighting: Weighting, gap: int, steps: int) -> None:
        require_weighting(weighting, gaussian=False)
        self.declaration = sde.declaration
        for name, value in (("gap", gap), ("simulation_steps", steps)):
            checked_count(value, name)
        if gap > steps:
            raise ValueError(f"gap = {gap} exceeds simulation_steps = {steps}.")
        if steps > _MOST_STEPS:
            raise TooLargeError(
                f"simulation_steps = {steps:,} are simulated for each batch; at most {_MOST_STEPS:,} are allowed."
            )
        if gap == 1 and rank(self.declaration.gram) < len(self.declaration.state):
            raise ScheduleError(
                "g gᵀ is singular, so one step of Euler-Maruyama has no density: take gap >= 2, over which the noise "
                "spreads to every component."
            )
        self.weighting, self.gap, self.steps = weighting, gap, steps
        self.law, features, T = LocalLaw(sde), Features(sde), self.declaration.T
        self._breaks = torch.as_tensor(features.edges(steps))
        features.warn_of_missed(np.union1d(np.linspace(0.0, T, steps + 1), features.edges(steps)))

    @torch.no_grad()
    def __call__(self, data: Tensor, t: Tensor, noise: NoiseStream) -> Pairs:
        """Pairs at the times t (batch,) for data (batch, *event)."""
        h = self._last_step(t)
        x_s = self.path(start(self.declaration, data, noise), t - h, noise)
        mean, root = (self.law.euler if self.gap == 1 else self.law)(x_s.double(), self._inside(t - h, h), h)
        eps = noise.normal(tuple(x_s.shape), torch.float64, x_s.device)
        x_t = mean + root(eps)
        _require_finite(x_t, "the local step")
        target = -root.T.inverse(eps)
        return Pairs(x_t.to(x_s.dtype), t, target.to(x_s.dtype), self._metric(x_t, t, h))

    def _last_step(self, t: Tensor) -> Tensor:
        """Its length for each t: no step crosses a break point of f and g."""
        T = self.declaration.T
        h = torch.clamp_max(t, self.gap * T / self.steps)
        for at in self._breaks.tolist():
            h = torch.where(t > at + _SHORT * T, torch.minimum(h, t - at), h)
        return h

    def _inside(self, t: Tensor, h: Tensor) -> Tensor:
        """Where f and g of a step of length h from t are taken: beside a break point, not on it."""
        if not len(self._breaks):
            return t
        near = (t[..., None] - self._breaks.to(t)).abs().amin(-1) <= _SHORT * self.declaration.T
        return torch.where(near, t + torch.clamp_max(0.25 * h, 2.0 * _SHORT * self.declaration.T), t)

    def path(self, x: Tensor, s: Tensor, noise: NoiseStream) -> Tensor:
        """x_s of each sample from its x_0, for its own time s (batch,), in steps of s / steps and to break points."""
        ends = torch.arange(self.steps, device=s.device) * (s / self.steps)[:, None]
        if len(self._breaks):
            stops = torch.minimum(self._breaks.to(s.device), s.double()[:, None])
            ends = torch.cat([ends.double(), stops], dim=1).sort(1).values
        ends = torch.cat([ends, s[:, None].to(ends.dtype)], dim=1)
        ends = ends if len(self._breaks) else ends.to(x.dtype)
        for begin, end in pairwise(ends.unbind(1)):
            motions = noise.normal(
                (len(x), self.law.motions, *x.shape[2:]) if self.law.coupled else tuple(x.shape), x.dtype, x.device
            )
            length = end - begin
            x = x + self.law.increment(x, self._inside(begin, length), length, motions)
        _require_finite(x, "Euler-Maruyama")
        return x

    def _metric(self, x_t: Tensor, t: Tensor, h: Tensor) -> Linear:
        """The root of the weight. It must not know x_s, or the minimiser would be another function than the score."""
        if callable(self.weighting):
            return self.law.scaling(of_times(self.weighting, t).sqrt(), x_t)
        gram = self.law.gram(x_t, t) if self.weighting == "likelihood" else self.law.moments(x_t, t, h)[1]
        return semidefinite_root(self.law.maps(gram))


def _require_finite(x: Tensor, who: str) -> None:
    bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteStateError(
            f"{who} left the finite states in {len(bad)} of {len(x)} paths: raise simulation_steps, or declare f and g "
            "so that they hold wherever a step may lead (sqrt(Max(x, 0)), say).",
            bad_rows=bad,
        )
