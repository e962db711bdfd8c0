"""Flows of geometric Brownian motion, whose states are positive, against their exact maps between log-normal laws."""

import pytest
import sympy as sp
import torch

from sdeflow import SDE, t, x
from sdeflow.errors import NonFiniteStateError

D, R = torch.float64, sp.Rational
X = torch.tensor([[0.3], [0.8], [1.2], [3.0]], dtype=D)


class LogNormal:
    """The law at T, as a prior."""

    def __init__(self, law):
        self.law = law

    def sample(self, shape, seed=None, dtype=None, device=None):
        raise NotImplementedError

    def log_prob(self, z):
        return self.law.log_prob(z).flatten(1).sum(1)


def flow(vol, spent):
    """The flow of dx = x/10 dt + vol x dw from log-normal data, with the exact x_T of X, and log p of it at the cutoff.

    ``spent`` is ∫ vol² dt up to a time.
    """

    def law(q):
        return 0.2 + 0.1 * q - spent(q) / 2, 0.16 + spent(q)

    def score(u, q):
        assert bool(torch.isfinite(u).all())  # a step that is not finite asks for nothing more
        mean, variance = law(q.double()[:, None])
        return -1 / u - (u.log() - mean) / variance / u

    sde = SDE(x / 10, vol * x)
    (first, early), (mean, late) = (law(torch.tensor(q, dtype=D)) for q in (sde.cutoff, 1.0))
    at_cutoff, at_end = (torch.distributions.LogNormal(m, v.sqrt()) for m, v in ((first, early), (mean, late)))
    z = torch.exp(mean + (late / early).sqrt() * (X.log() - first))
    return sde.flow_ode(score, prior=LogNormal(at_end)), z, at_cutoff.log_prob(X)[:, 0]


def jump():
    vol = sp.Piecewise((R(3, 10), t < R(1, 2)), (1, True))
    return flow(vol, lambda q: 0.09 * q.clamp(max=0.5) + (q - 0.5).clamp(min=0.0))


@pytest.mark.parametrize("declared", [jump, lambda: flow(sp.Integer(2), lambda q: 4.0 * q)], ids=["jump", "large"])
def test_adaptive_steps_stay_inside(declared):
    """Within some tens of the tolerance 1e-5 of the state."""
    made, z, log_p = declared()
    assert torch.allclose(made.encode(X), z, rtol=1e-3, atol=1e-3)
    assert torch.allclose(made.decode(z), X, rtol=1e-3, atol=1e-3)
    assert torch.allclose(made.log_prob(X), log_p, rtol=0.0, atol=1e-3)


def test_a_jump_is_an_end_of_fixed_steps():
    """rk4 keeps its order: in steps that jump over it 1e-2 is left."""
    made, z, _ = jump()
    for grid in (None, torch.cat([torch.linspace(0, 0.5, 21, dtype=D), torch.linspace(0.5, 1, 21, dtype=D)[1:]])):
        times = None if grid is None else grid.clamp_min(made.model.cutoff)
        assert torch.allclose(made.decode(z, "rk4", 40, grid=times), X, rtol=1e-6)


def test_a_score_that_stays_infinite_is_told():
    calls = []

    def score(u, q):
        calls.append(float(q.max()))
        return torch.where(q[:, None] < 0.4, torch.nan, -u)

    made = SDE(-x, sp.sqrt(2)).flow_ode(score, prior=SDE(-x, sp.sqrt(2)).prior)
    with pytest.raises(NonFiniteStateError, match=r"not finite at t = 0[.]"):
        made.decode(torch.ones(2, 1, dtype=D))
    assert len(calls) < 500
