"""A score that holds something for each sample: every call gives sample i what that sample alone gets."""

import math

import pytest
import torch

from sdeflow import DataError, Score, catalog
from sdeflow.laws.each import EachSample
from sdeflow.scores import ScoreFunction
from sdeflow.scores.thresholded import Thresholded

N, D, STD = 5, 2, 0.5
MEANS = torch.linspace(-1.5, 2.0, N * D, dtype=torch.float64).reshape(N, D)
SDE = catalog.VP()


def exact_score(x, t, means, sde=SDE):
    """∇ log N(x; alpha m, alpha² STD² + sigma²), m of each sample."""
    alpha, sigma, _ = (v.to(x.dtype).reshape(-1, 1) for v in sde.kernel.coefficients(torch.as_tensor(t).double()))
    return -(x - alpha * means.to(x.dtype)) / (alpha**2 * STD**2 + sigma**2)


class Held(ScoreFunction):
    """The exact score of data N(mean_i, STD²), a mean for each sample, as a user writes it."""

    def __init__(self, sde, means):
        super().__init__(sde)
        self.sde, self.means = sde, means

    def forward(self, x, t):
        if len(x) != len(self.means):
            raise ValueError(f"{len(self.means)} means and {len(x)} states")
        return exact_score(x, t, self.means)

    def rows(self, index):
        return Held(self.sde, self.means[index])


def held(rows=slice(None)):
    return Held(SDE, MEANS[rows])


def function(rows=slice(None)):
    """The same as a function, which cannot be cut."""
    return lambda x, t: exact_score(x, t, MEANS[rows])


def wrapped(rows=slice(None)):
    return Thresholded(held(rows), (-50.0, 50.0))


def given(rows=slice(None)):
    """A network of (x, t, y) with a dict of conditions, one of them for each sample and one for all."""

    def net(x, t, y):
        return exact_score(x, t, y["mean"] * y["factor"][:, None])

    score = Score(net, SDE, predicts="score", time="t")
    return score.given({"mean": MEANS[rows] / 2, "factor": torch.tensor(2.0, dtype=torch.float64)})


def states(seed=0):
    return MEANS + STD * torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def truth(x, rows=slice(None)):
    return torch.distributions.Normal(MEANS[rows], STD).log_prob(x).sum(1)


SCORES = {"held": held, "function": function, "wrapped": wrapped, "given": given}
SCORE = pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
DOUBLE = {"dtype": torch.float64, "seed": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@SCORE
def test_the_prior_of_each_sample_is_its_own(make):
    flow = SDE.flow_ode(make())
    x = flow.sample((N, D), steps=4, **DOUBLE)
    assert x.shape == (N, D) and isinstance(flow.prior, EachSample)
    alpha, sigma, _ = (float(v) for v in SDE.kernel.coefficients(torch.tensor(SDE.T, dtype=torch.float64)))
    torch.testing.assert_close(flow.prior.mean, alpha * MEANS, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        flow.prior.std, torch.full_like(MEANS, math.hypot(alpha * STD, sigma)), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(
        flow.latent_log_prob(x)[3:4], SDE.flow_ode(make(slice(3, 4))).latent_log_prob(x[3:4]), **CLOSE
    )


@SCORE
@pytest.mark.parametrize("kind", ["reverse", "flow_ode"])
def test_samples_do_not_depend_on_chunks(make, kind):
    equation = getattr(SDE, kind)(make())
    solver = "euler" if kind == "reverse" else "rk4"
    options = {"solver": solver, "steps": 30, "grid": "log_snr", "return_denoised": True, **DOUBLE}
    whole, denoised = equation.sample((N, D), **options)
    for chunk in (1, 2, 4):
        part, of_part = equation.sample((N, D), chunk=chunk, **options)
        torch.testing.assert_close(part, whole, **CLOSE)
        torch.testing.assert_close(of_part, denoised, **CLOSE)
    assert (denoised - MEANS).abs().max() < 5 * STD


@SCORE
def test_a_flow_takes_each_sample_where_it_belongs(make):
    """The flow of Gaussian data is known: x at the cutoff is mean + std ratio times the whitened latent."""
    flow, x = SDE.flow_ode(make()), states()
    ends = {}
    for t in (SDE.cutoff, SDE.T):
        alpha, sigma, _ = (float(v) for v in SDE.kernel.coefficients(torch.tensor(t, dtype=torch.float64)))
        ends[t] = alpha * MEANS, math.hypot(alpha * STD, sigma)
    (m, s), (m_T, s_T) = ends[SDE.cutoff], ends[SDE.T]
    z = flow.encode(x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(z, m_T + (x - m) * s_T / s, rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.decode(z, rtol=1e-8, atol=1e-8), x, rtol=0, atol=1e-5)
    for options in (
        {"steps": 20, "chunk": 2},
        {"steps": 20, "grid": "pilot"},
        {"steps": 20, "grid": "pilot", "chunk": 3},
    ):
        torch.testing.assert_close(flow.encode(x, **options), z, rtol=0, atol=2e-2)
        torch.testing.assert_close(flow.decode(z, **options), x, rtol=0, atol=2e-2)
    assert float(flow.round_trip_error(x, steps=20).max()) < 2e-2


@SCORE
def test_ways_between_samples(make):
    a, b = states(1), states(2)
    options = {"solver": "rk4", "steps": 30, "grid": "log_snr"}
    whole = SDE.flow_ode(make()).interpolate(a, b, points=3, **options)
    for i in (0, 3):
        one = slice(i, i + 1)
        alone = SDE.flow_ode(make(one)).interpolate(a[one], b[one], points=3, **options)
        torch.testing.assert_close(whole[:, one], alone, **CLOSE)
    pilot = SDE.flow_ode(make()).interpolate(a, b, points=3, steps=20, grid="pilot")
    torch.testing.assert_close(pilot, whole, rtol=0, atol=2e-2)


MODES = {
    "to tolerance": {"atol": 1e-4, "at": "data"},
    "in steps": {"steps": 30, "at": "data"},
    "by dopri5": {"rtol": 1e-7, "atol": 1e-7, "at": "data"},
    "in chunks": {"atol": 1e-4, "at": "data", "chunk": 2},
    "probes": {"steps": 30, "at": "data", "trace": "hutchinson", "probes": 2, "seed": 0},
    "adaptive probes": {"at": "data", "probes": "auto", "seed": 0},
    "adjoint": {"steps": 30, "at": "data", "gradient": "adjoint"},
    "backprop": {"steps": 30, "at": "data", "gradient": "backprop"},
}


@SCORE
@pytest.mark.parametrize("mode", MODES)
def test_log_densities(make, mode):
    x = states().requires_grad_("gradient" in MODES[mode])
    found = SDE.flow_ode(make()).log_prob(x, **MODES[mode])
    torch.testing.assert_close(found.detach(), truth(x.detach()), rtol=0, atol=5e-3)
    if x.requires_grad:
        (gradient,) = torch.autograd.grad(found.sum(), x)
        torch.testing.assert_close(gradient, (MEANS - x.detach()) / STD**2, rtol=0, atol=5e-2)


@SCORE
def test_the_budget_of_each_sample(make):
    found = SDE.flow_ode(make()).log_prob(states(), full=True, chunk=3)
    assert float(found.prior_mismatch.abs().max()) < 1e-3
    given = SDE.kernel.marginal(0.0, STD, SDE.T)
    found = SDE.flow_ode(make(), prior=given).log_prob(states(), full=True)
    assert float((found.value + found.truncation + found.prior_mismatch - truth(states())).abs().max()) < 2e-2


@SCORE
def test_bounds(make):
    x = states()
    bound = SDE.reverse(make()).elbo(x, at="cutoff", draws=16, seed=0)
    flow = SDE.flow_ode(make()).log_prob(x, atol=1e-4)
    assert bool(((bound.value - flow).abs() < 4 * bound.error + 0.05).all())
    data = SDE.reverse(make()).elbo(x, draws=16, seed=0).value
    assert bool(((data - truth(x)).abs() < 4 * bound.error + 0.05).all())
    kl = SDE.reverse(make()).kl_bound(x, make(), draws=8, seed=0)
    assert kl.score == 0.0
    wrong = SDE.reverse(make()).kl_bound(x, Held(SDE, MEANS.flip(0)), draws=8, seed=0)
    assert wrong.score > 1.0


@SCORE
def test_bits(make):
    images = torch.randint(0, 8, (N, D), generator=torch.Generator().manual_seed(0))
    options = {"levels": 8, "low": -3.0, "high": 3.0, "draws": 64, "steps": 30, "at": "data", "seed": 0}
    torch.set_default_dtype(torch.float64)
    try:
        found = SDE.flow_ode(make()).bits_per_dim(images, full=True, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    law = torch.distributions.Normal(MEANS, STD)
    edges = -3.0 + 6.0 * images / 8
    mass = (law.cdf(edges + 0.75) - law.cdf(edges)).log().sum(1)
    want = -mass / (D * math.log(2.0))
    assert bool(((found.value - want).abs() < 4 * found.stderr + 0.02).all())


def test_a_function_that_is_tied_to_its_batch_is_called_with_the_whole_of_it():
    seen = []

    def tied(x, t):
        seen.append(len(x))
        return exact_score(x, t, MEANS)

    SDE.flow_ode(tied, prior=SDE.kernel.marginal(0.0, 1.0, SDE.T)).sample((N, D), "euler", 4, chunk=2, **DOUBLE)
    assert seen.count(N) == 12 and len(seen) == 13  # three chunks of four calls, and one trial
    free, seen[:] = lambda x, t: (seen.append(len(x)), exact_score(x, t, 0 * x))[1], []
    SDE.flow_ode(free, prior=SDE.kernel.marginal(0.0, 1.0, SDE.T)).sample((N, D), "euler", 4, chunk=2, **DOUBLE)
    assert seen == 4 * [2] + 4 * [2] + 4 * [1]


def test_what_is_wrong_with_a_function_is_not_hidden():
    def broken(x, t):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        SDE.flow_ode(broken).sample((N, D), "euler", 4)
    with pytest.raises(DataError, match="batch of 5 samples, not of 4"):
        EachSample([SDE.kernel.marginal(0.0, 1.0, SDE.T)], torch.zeros(5, dtype=torch.long)).log_prob(states()[:4])
