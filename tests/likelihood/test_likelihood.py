"""Log-likelihoods against exact mixtures."""

import math

import pytest
import sympy as sp
import torch
from problems import CATALOGUE, correlated, gaussian, ring

import sdeflow
from sdeflow import SDE, catalog, t, x
from sdeflow.likelihood import LogProb

TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def prior_mismatch(sde, exact, n=4000):
    """The mean over x_T of |log p_T - log prior|: what a Gaussian prior costs on a mixture, in nats."""
    x_0 = exact.sample(n, seed=5, dtype=torch.float64)
    x_T = sde.kernel.sample(x_0, sde.T, seed=6)
    prior = sde.prior_for(*exact.data_moments())
    return float((exact.log_prob(x_T, sde.T) - prior.log_prob(x_T)).abs().max())


@pytest.mark.parametrize("make", [ring, correlated], ids=["ring", "correlated"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_log_prob_is_the_density_at_the_cutoff(name, make):
    """Within what the Gaussian prior costs at most (largest over 4,000 draws) and the solver's tolerance."""
    sde = CATALOGUE[name]()
    exact = make(sde)
    data = exact.sample(24, seed=0, dtype=torch.float64)
    x_cut = sde.kernel.sample(data, sde.cutoff, seed=1)
    error = (sde.flow_ode(exact).log_prob(x_cut, **TIGHT) - exact.log_prob(x_cut, sde.cutoff)).abs().max()
    assert float(error) < prior_mismatch(sde, exact) + 2e-5


def test_log_prob_of_gaussian_data_is_exact():
    for name in CATALOGUE:
        sde = CATALOGUE[name]()
        exact = gaussian(sde, std=0.7, d=5)
        x_0 = exact.sample(8, seed=0, dtype=torch.float64)
        value = sde.flow_ode(exact).log_prob(x_0, **TIGHT)
        torch.testing.assert_close(value, exact.log_prob(x_0, sde.cutoff), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_a_wrong_score_is_found(factor):
    sde = catalog.VP()
    exact = correlated(sde)
    x_0 = exact.sample(16, seed=0, dtype=torch.float64)
    flow = sde.flow_ode(lambda x, t: factor * exact(x, t), prior=sde.prior_for(*exact.data_moments()))
    error = (flow.log_prob(x_0, rtol=1e-6, atol=1e-6) - exact.log_prob(x_0, sde.cutoff)).abs().mean()
    assert float(error) > 0.05


@pytest.mark.slow
def test_the_density_sums_to_one_over_the_plane():
    sde = catalog.VP()
    flow = sde.flow_ode(ring(sde, std=0.3))
    side = torch.linspace(-3.2, 3.2, 65, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    total = flow.log_prob(points, rtol=1e-6, atol=1e-6).exp().sum() * (side[1] - side[0]) ** 2
    assert abs(float(total) - 1) < 1e-3


def test_alone_and_in_a_batch():
    sde = catalog.VP()
    flow = sde.flow_ode(ring(sde))
    x_0 = ring(sde).sample(32, seed=0, dtype=torch.float64)
    x_0[0] *= 30  # a batch-mate far out
    together = flow.log_prob(x_0, rtol=1e-6, atol=1e-6)
    alone = torch.cat([flow.log_prob(x_0[i : i + 1], rtol=1e-6, atol=1e-6) for i in (1, 7, 31)])
    assert float((together[[1, 7, 31]] - alone).abs().max()) < 1e-5 * (1 + float(alone.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_agrees_within_its_standard_error_and_the_error_is_calibrated(probe):
    sde = catalog.VP()
    exact = correlated(sde)
    x_0 = exact.sample(64, seed=0, dtype=torch.float64)
    flow = sde.flow_ode(exact)
    truth = flow.log_prob(x_0, rtol=1e-6, atol=1e-6)
    info = flow.log_prob(x_0, trace="hutchinson", probes=96, probe=probe, seed=0, full=True, rtol=1e-6, atol=1e-6)
    assert isinstance(info, LogProb)
    z = (info.value - truth) / info.stderr
    assert abs(float(z.mean())) < 4 / math.sqrt(64)
    assert 0.75 < float(z.square().mean().sqrt()) < 1.35  # 1 within 4 / sqrt(128), less for heavy tails
    assert float(info.solver_error.max()) < 1e-2
    assert info.nfe > 20


def test_more_probes_mean_less_error():
    sde = catalog.VP()
    exact = correlated(sde)
    x_0 = exact.sample(32, seed=0, dtype=torch.float64)
    few, many = (
        sde.flow_ode(exact).log_prob(x_0, probes=n, seed=0, full=True, steps=40).stderr.mean() for n in (8, 128)
    )
    assert 2.5 < float(few / many) < 6.5  # 4, and the spread of the standard errors themselves


def test_the_solver_error_covers_the_error():
    sde = catalog.VP()
    flow = sde.flow_ode(ring(sde, std=0.3))
    x_0 = ring(sde, std=0.3).sample(32, seed=0, dtype=torch.float64)
    truth = flow.log_prob(x_0, **TIGHT)
    for options in ({"rtol": 1e-4, "atol": 1e-4}, {"solver": "rk4", "steps": 20}):
        info = flow.log_prob(x_0, full=True, **options)
        within = (info.value - truth).abs() <= 2 * info.solver_error + 1e-6
        assert float(within.double().mean()) >= 0.85


def test_exact_is_the_default_up_to_128_dimensions_and_probes_above():
    sde = catalog.VP()
    small = gaussian(sde, std=0.5, d=128)
    assert float(sde.flow_ode(small).log_prob(torch.randn(1, 128), full=True, steps=4).stderr.max()) == 0
    large = sde.flow_ode(lambda x, t: -x + 0.01 * x.flip(1).sin(), prior=sde.prior)
    info = large.log_prob(torch.randn(2, 200, dtype=torch.float64), seed=0, full=True, steps=4)
    assert float(info.stderr.min()) > 0


def test_inside_no_grad_and_inference_mode():
    sde = catalog.VP()
    flow = sde.flow_ode(ring(sde))
    x_0 = ring(sde).sample(4, seed=0)
    outside = flow.log_prob(x_0)
    with torch.no_grad():
        assert torch.equal(flow.log_prob(x_0), outside)
    with torch.inference_mode():
        assert torch.equal(flow.log_prob(x_0.clone()), outside)


def test_images_are_events():
    sde = catalog.VP()
    exact = sdeflow.scores.GaussianMixture(sde, torch.zeros(2, 1, 3, 3), torch.tensor([0.2, 0.5]))
    x_0 = exact.sample(4, seed=0, dtype=torch.float64)
    value = sde.flow_ode(exact).log_prob(x_0, **TIGHT)
    torch.testing.assert_close(value, exact.log_prob(x_0, sde.cutoff), rtol=0, atol=1e-3)


def test_bits_per_dim_of_a_known_density():
    """For data uniform in effect (a wide Gaussian), the code length is the density's, per level."""
    sde = catalog.VP()
    exact = gaussian(sde, std=0.5, d=4)
    images = torch.randint(0, 16, (64, 4), generator=torch.Generator().manual_seed(0))
    flow = sde.flow_ode(exact)
    bits = flow.bits_per_dim(images, levels=16, low=-1.0, high=1.0, seed=3)
    uniform = sdeflow.numerics.noise.NoiseStream(3, "dequantise").uniform((64, 4))
    x_0 = -1 + 2 * (images + uniform) / 16
    expected = -(exact.log_prob(x_0, sde.cutoff) / 4 + math.log(2 / 16)) / math.log(2)
    torch.testing.assert_close(bits, expected, rtol=1e-4, atol=1e-4)
    # the data's own scale does not matter: the same images in other units cost the same bits
    wide = gaussian(sde, std=1.0, d=4)
    other = sde.flow_ode(wide).bits_per_dim(images, levels=16, low=-2.0, high=2.0, seed=3)
    torch.testing.assert_close(other, bits, rtol=1e-3, atol=1e-3)


def test_a_noisy_trace_warns():
    sde = catalog.VP()
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
    flow = sde.flow_ode(lambda x, t: -x @ (torch.eye(64) + 0.5 * (mix + mix.T)), prior=sde.prior)
    with pytest.warns(sdeflow.errors.TraceErrorWarning, match="more probes"):
        flow.log_prob(torch.randn(4, 64), probes=2, seed=0, steps=10)


def test_a_float32_network_without_moments():
    """Its prior is read off the score, in the network's own dtype."""
    sde = catalog.VP()
    layer = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(layer.weight)

    class Minus(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, state, _):
            return -self.layer(state)

    points = torch.randn(3, 2)
    truth = torch.distributions.Normal(0.0, 1.0).log_prob(points).sum(1).double()  # the flow of s = -x stands still
    for score in (sdeflow.Score(Minus(), sde, predicts="score"), Minus()):
        torch.testing.assert_close(sde.flow_ode(score).log_prob(points), truth, rtol=1e-4, atol=1e-4)


def test_an_offset_costs_nothing():
    """dx = (2 - x (1 + t)) dt + ... with fixed steps: b(t) is integrated exactly, so the error is that without it."""
    still, moving = (SDE(f=level - x * (1 + t), g=sp.sqrt(1 + t), T=3) for level in (sp.Integer(0), 2 + sp.sin(t)))
    errors = []
    for sde in (still, moving):
        exact = sdeflow.scores.GaussianMixture(sde, torch.full((1, 2), 0.5), torch.tensor([0.04]))
        x_0 = exact.sample(16, seed=0, dtype=torch.float64)
        value = sde.flow_ode(exact).log_prob(x_0, solver="rk4", steps=40)
        errors.append(float((value - exact.log_prob(x_0, sde.cutoff)).abs().max()))
        samples = sde.flow_ode(exact).sample((4000, 1 + 1), steps=60, seed=0, dtype=torch.float64)
        assert abs(float(samples.mean()) - 0.5) < 4 * 0.2 / 8000**0.5 + 2e-3
    assert errors[1] < 2 * errors[0] + 1e-6
    assert errors[1] < 1e-3


def test_one_probe_warns_that_its_error_is_unknown():
    sde = catalog.VP()
    with pytest.warns(sdeflow.errors.TraceErrorWarning, match="so few probes"):
        sde.flow_ode(ring(sde)).log_prob(torch.ones(2, 2), probes=1, seed=0, steps=4)
