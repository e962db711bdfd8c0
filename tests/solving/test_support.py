"""Laws with bounded support: what leaks is told, and rejection draws from the law conditioned on the support."""

import math
import re

import pytest
import torch
from scipy.stats import kstest, truncnorm

from sdeflow import catalog
from sdeflow.errors import LeakageWarning, OptionError, SolverError
from sdeflow.scores import GaussianMixture, ScoreFunction

MEANS = torch.tensor([0.0, 1.0, -0.5])
STD, LOW = 0.8, 0.2


def above(x):
    return x[:, 0] > LOW


def equations(score):
    sde = catalog.VP()
    return {"flow": sde.flow_ode(score(sde)), "reverse": sde.reverse(score(sde))}


def gaussian(sde):
    return GaussianMixture(sde, torch.tensor([[0.3, -1.0]]), torch.tensor([STD**2]))


class OfEach(ScoreFunction):
    """Sample i has data N(means[i], STD²) in its one coordinate."""

    def __init__(self, sde, means):
        super().__init__(sde)
        self.sde, self.means = sde, means

    def forward(self, x, t):
        alpha, sigma, _ = (
            v.to(x.dtype).reshape(-1, 1) for v in self.sde.kernel.coefficients(torch.as_tensor(t).double())
        )
        return (alpha * self.means[:, None] - x) / (alpha**2 * STD**2 + sigma**2)

    def rows(self, index):
        return OfEach(self.sde, self.means[index])


def p_value(x, mean):
    low = (LOW - float(mean)) / STD
    return kstest(x.double(), truncnorm(low, math.inf, float(mean), STD).cdf).pvalue


@pytest.mark.parametrize("name", ["flow", "reverse"])
def test_rejection_draws_the_law_within_the_support(name):
    """N(0.3, 0.8²) above 0.2 is a truncated normal law, and leaves the other coordinate as it was."""
    bound = equations(gaussian)[name]
    found = bound.solve((3000, 2), steps=20, seed=0, support=above, reject=True)
    assert above(found.x).all()
    assert p_value(found.x[:, 0], 0.3) > 0.01
    assert kstest(found.x[:, 1].double(), "norm", (-1.0, STD)).pvalue > 0.01
    outside = 0.5 * math.erfc((0.3 - LOW) / STD / math.sqrt(2))
    assert abs(found.leaked - outside) < 4 * math.sqrt(outside * (1 - outside) / 3000)
    assert f"{found.leaked:.2%}" in repr(found)


@pytest.mark.parametrize("name", ["flow", "reverse"])
def test_a_sample_depends_neither_on_the_batch_nor_on_chunks(name):
    bound, options = equations(gaussian)[name], {"steps": 6, "seed": 0, "support": above, "reject": True}
    whole = bound.sample((1300, 2), **options)
    assert torch.equal(bound.sample((300, 2), **options), whole[:300])
    torch.testing.assert_close(bound.sample((1300, 2), chunk=170, **options), whole, rtol=0, atol=1e-5)
    plain = bound.sample((1300, 2), steps=6, seed=0)
    assert torch.equal(whole[above(plain)], plain[above(plain)])


@pytest.mark.parametrize("name", ["flow", "reverse"])
def test_each_sample_keeps_its_condition(name):
    which = torch.arange(4500) % 3
    bound = equations(lambda sde: OfEach(sde, MEANS[which]))[name]
    x = bound.sample((4500, 1), steps=20, seed=1, support=above, reject=True)
    for i, mean in enumerate(MEANS):
        assert p_value(x[which == i, 0], mean) > 0.01


def test_denoised_states_are_drawn_anew_too():
    found = equations(gaussian)["flow"].solve(
        (200, 2), steps=6, seed=0, support=above, reject=True, return_denoised=True
    )
    sde = catalog.VP()
    torch.testing.assert_close(found.denoised, gaussian(sde).denoise(found.x, sde.cutoff))


def test_what_leaks_is_told():
    flow = equations(gaussian)["flow"]
    with pytest.warns(LeakageWarning, match=r"of 500 samples .* lie outside the support; reject=True"):
        found = flow.solve((500, 2), steps=6, seed=0, support=above)
    assert found.leaked == float((~above(found.x)).double().mean())
    assert torch.equal(found.x, flow.sample((500, 2), steps=6, seed=0))
    assert flow.solve((5, 2), steps=6, support=lambda x: x[:, 0] > -99).leaked == 0.0
    assert flow.solve((5, 2), steps=6).leaked is None
    assert flow.solve((0, 2), steps=6, support=above, reject=True).leaked == 0.0


BAD = {
    "not a function": ({"support": 3}, TypeError, "callable as support"),
    "of coordinates": ({"support": lambda x: x > 0}, ValueError, r"\(5,\) of bool, not \(5, 2\)"),
    "not bool": ({"support": lambda x: x[:, 0]}, ValueError, "not (5,) of torch.float32"),
    "no support": ({"reject": True}, ValueError, "reject=True needs support="),
    "trajectory": ({"support": above, "reject": True, "trajectory": True}, ValueError, "no trajectory"),
    "nothing inside": ({"support": lambda x: x[:, 0] > 99, "reject": True}, SolverError, "100 draws of 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_supports(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message if "\\" in message else re.escape(message)):
        equations(gaussian)["flow"].sample((5, 2), steps=4, seed=0, **options)


def test_a_given_state_has_no_support():
    with pytest.raises(OptionError, match="support means nothing"):
        equations(gaussian)["flow"].solve(torch.zeros(2, 2), steps=4, support=above)
