"""Whether the prior is the law that the score has at T: numbers against closed forms and quadrature, told once, at one
call at most."""

import math

import numpy as np
import pytest
import torch

import sdeflow
from sdeflow import SDE, catalog, x
from sdeflow.errors import PriorMismatchWarning
from sdeflow.scores import GaussianMixture, ScoreFunction
from sdeflow.solving.mismatch import Mismatch

double = torch.float64
SHORT = SDE(-x, math.sqrt(2.0), T=1)  # e^-1 of the data is left at T, of variance 1 - e^-2


class Counted(ScoreFunction):
    """The score of a mixture, known by the data's moments alone; it counts its calls, and how many states they were."""

    def __init__(self, exact, factor=1.0):
        super().__init__(exact)
        self.exact, self.calls = exact, []
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, state, t):
        self.calls.append(len(state))
        return self.factor.detach() * self.exact(state, t)

    def data_moments(self):
        return self.exact.data_moments()


def modes(sde, apart, d=1, var=0.1):
    """Two modes at ± ``apart`` along the first coordinate."""
    means = torch.zeros(2, d, dtype=double)
    means[:, 0] = torch.tensor([-apart, apart])
    return GaussianMixture(sde, means, torch.full((2,), var, dtype=double))


def test_a_gaussian_is_told_exactly():
    """Of p_T with mean m + R μ and standard deviation R ρ."""
    prior = sdeflow.Gaussian(torch.tensor([1.0, -2.0], dtype=double), torch.tensor([0.5, 3.0], dtype=double))
    mean, ratio = torch.tensor([1.0 + 0.5 * 0.3, -2.0], dtype=double), torch.tensor([1.0, 1.2], dtype=double)
    states = prior.sample((64, 2), seed=0, dtype=double)
    found = Mismatch.of(prior, states, (mean - states) / (ratio * prior.std).square())
    assert found.shift == pytest.approx(0.3, rel=1e-9) and found.spread == pytest.approx(0.2, rel=1e-9)
    assert not Mismatch.of(prior, states, (prior.mean - states) / prior.std.square()).visible
    assert Mismatch.of(prior, states, states * torch.nan).visible and Mismatch.of(prior, states, states).visible


def test_what_is_not_gaussian_is_told_as_by_quadrature():
    exact = modes(SHORT, 3.0, d=2)
    prior = SHORT.kernel.marginal(*exact.data_moments(), 1.0)
    width = float(prior.std[0])
    z, weight = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(80))
    s = exact(torch.stack([width * z, 0 * z], 1), 1.0)[:, 0]
    each = 0.5 * (width * s + z).square()
    truth = float((weight * each).sum() / weight.sum())
    error = float(((weight * each.square()).sum() / weight.sum() - truth**2).sqrt()) / math.sqrt(4096)
    states = prior.sample((4096, 2), seed=0, dtype=double)
    found = Mismatch.of(prior, states, exact(states, 1.0))
    assert abs(found.largest - truth) < 4 * error and found.fisher == pytest.approx(0.5 * found.largest, abs=1e-3)
    assert truth > 0.1 and found.visible


def test_it_is_told_once_at_one_call():
    """By sampling or by log p, whichever is first; of each equation no more; and again once the score has changed."""
    score = Counted(modes(SHORT, 3.0))
    with pytest.warns(PriorMismatchWarning, match=r"law that the score has at T = 1, .* sde\.fit_prior\(data\)"):
        SHORT.reverse(score).sample((5, 1), steps=4, seed=0)
    assert score.calls.pop(0) == 64 and set(score.calls) == {5}
    before = len(score.calls)
    flow = SHORT.flow_ode(score)
    solution = flow.solve((5, 1), "euler", 6, seed=0)
    assert len(score.calls) - before == solution.calls == 6
    flow.log_prob(torch.zeros(5, 1), steps=4)
    with torch.no_grad():
        score.factor.mul_(1.01)
    with pytest.warns(PriorMismatchWarning, match="law that the score has"):
        flow.log_prob(torch.zeros(5, 1), steps=4)


def test_a_function_is_told_of_by_the_states_that_read_its_prior():
    exact, calls = modes(SHORT, 3.0), []

    def score(state, t):
        calls.append(len(state))
        return exact(state, t)

    with pytest.warns(PriorMismatchWarning, match="Fisher"):
        SHORT.reverse(score).sample((5, 1), steps=4, seed=0)
    assert sum(n > 5 for n in calls) == 1
    SHORT.flow_ode(score).log_prob(torch.zeros(5, 1), steps=4)


def test_functions_of_n_samples_are_told_of_too():
    """Samples of their own modes: each has a prior of its own, and one has none."""
    exact = [modes(SHORT, apart) for apart in (0.1, 3.0)]

    def score(state, t):
        if len(state) != 2:
            raise ValueError("of two samples")
        return torch.cat([one(state[i : i + 1], t[:1]) for i, one in enumerate(exact)])

    with pytest.warns(PriorMismatchWarning, match="Fisher"):
        assert SHORT.flow_ode(score).sample((2, 1), steps=4, seed=0).shape == (2, 1)


class Unasked(Counted):
    def forward(self, state, t):
        raise sdeflow.errors.ScoreError("of a condition")


def test_where_nothing_is_to_be_said_nothing_is_asked():
    """Forgotten data, a prior that was given, the exact law of a mixture; and a score that cannot be asked is left."""
    for sde, apart in ((catalog.VP(), 3.0), (catalog.VE(), 0.3), (catalog.EDM(), 2.0)):
        score = Counted(modes(sde, apart))
        sde.reverse(score).sample((5, 1), steps=4, seed=0)
        assert set(score.calls) == {5}
    score = Counted(modes(SHORT, 3.0))
    SHORT.flow_ode(score, prior=sdeflow.Gaussian(0.0, 1.4478)).log_prob(torch.zeros(5, 1), steps=4)
    SHORT.flow_ode(modes(SHORT, 3.0)).log_prob(torch.zeros(5, 1), steps=4)
    flow = SHORT.flow_ode(Unasked(modes(SHORT, 3.0)))
    assert flow.latent_log_prob(torch.zeros(5, 1)).shape == (5,)
    with pytest.raises(sdeflow.errors.ScoreError, match="of a condition"):
        flow.sample((5, 1), steps=4)


def test_small_differences_are_not_told():
    """KL(p_T || π) = 0.003 nats of modes at ± 2; a factor as a trained network may have it."""
    for factor in (1.0, 0.97, 1.03):
        score = Counted(modes(SHORT, 2.0), factor)
        SHORT.flow_ode(score).sample((5, 1), steps=4, seed=0)
        assert 64 in score.calls


def test_a_coupled_state_is_compared_in_its_own_units():
    langevin = catalog.CriticallyDampedLangevin(T=0.4)
    wide, narrow = (Counted(modes(langevin, apart)) for apart in (6.0, 0.5))
    langevin.reverse(narrow).sample((5, 2, 1), steps=4, seed=0)
    with pytest.warns(PriorMismatchWarning, match="Fisher"):
        langevin.reverse(wide).sample((5, 2, 1), steps=4, seed=0)
