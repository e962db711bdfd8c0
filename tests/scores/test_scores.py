"""Scores: the parametrisations agree, preconditioning is exact for Gaussians, and mixtures are the truth."""

import math

import pytest
import torch
from problems import CATALOGUE, correlated, ring

import sdeflow
from sdeflow import SDE, Score, catalog, nets, t, x
from sdeflow.errors import ScoreError
from sdeflow.scores import PREDICTIONS, GaussianMixture
from sdeflow.training.losses import denoising_score_matching


def network_for(predicts, sde, exact, time):
    """The network output that makes a Score with ``predicts`` equal to ``exact``, from the definitions alone."""
    kernel = sde.kernel
    alpha, sigma, offset = (float(c) for c in kernel.coefficients(torch.tensor(time, dtype=torch.float64)))
    mean, std = 0.2, 0.7

    def net(seen, _):
        state = seen
        if predicts == "edm":
            scale = ((alpha * std) ** 2 + sigma**2) ** 0.5
            state = seen * scale + alpha * mean + offset
        s = exact(state, time)
        eps = -sigma * s
        data = (state - offset - sigma * eps) / alpha
        h = 1e-5
        ends = torch.tensor([time - h, time + h], dtype=torch.float64)
        slopes = [float((c[1] - c[0]) / (2 * h)) for c in kernel.coefficients(ends)]
        return {
            "score": s,
            "noise": eps,
            "data": data,
            "v": alpha * eps - sigma * data,
            "velocity": slopes[0] * data + slopes[1] * eps + slopes[2],
            "edm": (data - mean - alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * (state - offset - alpha * mean))
            / (sigma * std / ((alpha * std) ** 2 + sigma**2) ** 0.5),
        }[predicts]

    return net


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("name", [*CATALOGUE, "offset"])
def test_every_parametrisation_gives_the_same_score(name, predicts):
    sde = SDE(-2 * (x - 3 * t), 1 + t) if name == "offset" else CATALOGUE[name]()
    exact = correlated(sde)
    time = 0.3 * sde.T
    score = Score(network_for(predicts, sde, exact, time), sde, predicts=predicts, data_mean=0.2, data_std=0.7)
    score.double()
    score.set_data_moments(torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    state = sde.kernel.sample(exact.sample(16, seed=0, dtype=torch.float64), time, seed=1)
    for ours, truth in ((score, exact), (score.noise, exact.noise), (score.denoise, exact.denoise)):
        torch.testing.assert_close(ours(state, time), truth(state, time), rtol=1e-6, atol=1e-6)


def test_edm_preconditioning_is_exact_for_gaussian_data_when_the_network_is_zero():
    for name in CATALOGUE:
        sde = CATALOGUE[name]()
        exact = GaussianMixture(sde, torch.full((1, 3), 0.4), torch.tensor([0.25]))
        score = Score(lambda seen, _: torch.zeros_like(seen), sde, data_mean=0.4, data_std=0.5).double()
        state = torch.randn(8, 3, dtype=torch.float64)
        for time in (sde.cutoff + 1e-3 * sde.T, 0.5 * sde.T, sde.T):
            torch.testing.assert_close(score(state, time), exact(state, time), rtol=1e-6, atol=1e-6)


def test_edm_keeps_the_networks_input_at_unit_variance():
    sde = catalog.EDM()
    seen = []
    score = Score(lambda u, _: seen.append(u) or torch.zeros_like(u), sde, data_mean=1.0, data_std=0.5)
    data = 1.0 + 0.5 * torch.randn(20_000, 1)
    for time in (0.01, 1.0, 80.0):
        score(sde.kernel.sample(data, time, seed=0), time)
    for u in seen:
        assert abs(float(u.std()) - 1) < 4 / (2 * 20_000) ** 0.5 + 0.01
        assert abs(float(u.mean())) < 4 / 20_000**0.5


@pytest.mark.parametrize("make", [ring, correlated])
def test_a_mixtures_score_is_the_gradient_of_its_density(make):
    sde = catalog.SubVP()
    exact = make(sde)
    times = torch.linspace(sde.cutoff, sde.T, 6, dtype=torch.float64)
    state = sde.kernel.sample(exact.sample(6, seed=0, dtype=torch.float64), times, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(exact.log_prob(state, times).sum(), state)
    torch.testing.assert_close(exact(state, times), gradient, rtol=1e-9, atol=1e-9)


def test_a_mixtures_density_is_that_of_torch_distributions():
    sde = catalog.VP()
    exact = correlated(sde)
    alpha, sigma, _ = sde.kernel.coefficients(torch.tensor(0.3, dtype=torch.float64))
    full = torch.einsum("nde,ne,nfe->ndf", exact.rotations, exact.variances, exact.rotations)
    components = torch.distributions.MultivariateNormal(
        alpha * exact.means, alpha**2 * full + sigma**2 * torch.eye(4, dtype=torch.float64)
    )
    truth = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(exact.weights), components)
    state = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(exact.log_prob(state, 0.3), truth.log_prob(state), rtol=1e-11, atol=1e-11)


def test_a_mixtures_samples_have_its_moments():
    exact = correlated(catalog.VP())
    n = 100_000
    samples = exact.sample(n, seed=0, dtype=torch.float64)
    mean, std = exact.data_moments()
    assert bool(((samples.mean(0) - mean).abs() < 4 * std / n**0.5).all())
    assert bool(((samples.std(0) / std - 1).abs() < 4 * (1 / n) ** 0.5).all())


def test_a_diagonal_mixture_is_the_full_one_with_diagonal_matrices():
    sde = catalog.VP()
    means, variances = torch.randn(3, 4), torch.rand(3, 4) + 0.1
    state = torch.randn(5, 4, dtype=torch.float64)
    diagonal = GaussianMixture(sde, means, variances)
    full = GaussianMixture(sde, means, torch.diag_embed(variances), full=True)
    torch.testing.assert_close(diagonal(state, 0.2), full(state, 0.2), rtol=1e-9, atol=1e-9)


def test_tweedie_is_the_posterior_mean():
    """E[x_0 | x_t] of Gaussian data in closed form."""
    sde = SDE(-2 * (x - 3), 1)
    exact = GaussianMixture(sde, torch.tensor([[1.0]]), torch.tensor([0.49]))
    alpha, sigma, offset = sde.kernel.coefficients(torch.tensor(0.4, dtype=torch.float64))
    state = torch.linspace(-1, 3, 5, dtype=torch.float64)[:, None]
    gain = alpha * 0.49 / (alpha**2 * 0.49 + sigma**2)
    torch.testing.assert_close(exact.denoise(state, 0.4), 1 + gain * (state - offset - alpha * 1.0))


def test_the_loss_at_the_exact_score_is_its_known_value():
    """For Gaussian data, E‖eps - E[eps | x_t]‖² per coordinate is 1 - sigma²/v, v the marginal variance."""
    sde = catalog.VP()
    exact = GaussianMixture(sde, torch.zeros(1, 1), torch.tensor([0.25]))
    n = 200_000
    data = exact.sample(n, seed=0, dtype=torch.float64)
    noise = torch.randn(n, 1, dtype=torch.float64)

    class AsScore:
        kernel, dtype = sde.kernel, None

        def __init__(self, factor):
            self.factor = factor

        def noise(self, state, time, y=None):
            return self.factor * exact.noise(state, time)

    for time in (0.05, 0.3, 0.8):
        times = torch.full((n,), time, dtype=torch.float64)
        losses = denoising_score_matching(AsScore(1.0), data, times, noise)
        alpha, sigma, _ = sde.kernel.coefficients(torch.tensor(time, dtype=torch.float64))
        expected = float(1 - sigma**2 / (alpha**2 * 0.25 + sigma**2))
        assert abs(float(losses.mean()) - expected) < 4 * float(losses.std()) / n**0.5
        worse = denoising_score_matching(AsScore(1.1), data, times, noise) - losses  # paired: finds a 10 % error
        assert float(worse.mean()) > 4 * float(worse.std()) / n**0.5


def test_the_likelihood_weighting_is_g_squared_on_the_score():
    sde = catalog.VP()
    score = Score(lambda u, _: torch.zeros_like(u), sde, predicts="noise")
    data, times = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    noise = torch.randn(4, 3, dtype=torch.float64)
    by_name = denoising_score_matching(score, data, times, noise, weighting="likelihood")
    state = sde.kernel.sample(data, times, noise=noise)
    difference = score(state, times) - sde.kernel.score(state, data, times)
    expected = sde.kernel.sde_coefficients(times)[2] * difference.square().mean(1)
    torch.testing.assert_close(by_name, expected, rtol=1e-10, atol=1e-10)
    own = denoising_score_matching(score, data, times, noise, weighting=lambda s: sde.kernel.sde_coefficients(s)[2])
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


def test_what_the_network_gets_as_time():
    sde = catalog.VP()
    for time, expected in (
        ("t", 0.3),
        ("log_snr", 2 * float(sde.kernel.half_log_snr(0.3))),
        (lambda s: s.log(), -1.2039728),
    ):
        seen = []
        Score(lambda u, c, seen=seen: seen.append(c) or u, sde, predicts="noise", time=time)(torch.randn(3, 2), 0.3)
        assert seen[0].shape == (3,)
        assert seen[0].dtype == torch.float32
        assert abs(float(seen[0][0]) - expected) < 1e-5


def test_labels_reach_the_network_and_a_conditional_score_is_a_score():
    sde = catalog.VP()
    net = sdeflow.nets.MLP(2, width=16, depth=1, classes=3)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    score = Score(net, sde, data_mean=0.0, data_std=1.0)
    state = torch.randn(4, 2)
    given = score.given(1)
    assert torch.equal(given(state, 0.5), score(state, 0.5, torch.ones(4, dtype=torch.long)))
    assert not torch.allclose(given(state, 0.5), score.given(2)(state, 0.5))
    assert sde.reverse(given).sample((4, 2), steps=3, seed=0).shape == (4, 2)
    assert torch.isfinite(sde.flow_ode(given).log_prob(state, steps=4)).all()


def test_a_score_of_another_declaration_is_refused():
    score = ring(catalog.VP())
    with pytest.raises(ValueError, match="another SDE"):
        catalog.VE().reverse(score)
    assert catalog.VP().reverse(score)  # an equal declaration is the same SDE


def test_moving_a_mixture_keeps_its_precision():
    exact = ring(catalog.VP())
    before = exact(torch.ones(1, 2, dtype=torch.float64), 0.3)
    assert torch.equal(exact.float()(torch.ones(1, 2, dtype=torch.float64), 0.3), before)


def test_weights_are_not_loaded_as_something_else():
    def score(sde, **options):
        return Score(nets.MLP(2, width=4, depth=1), sde, **options)

    one = score(catalog.VP())
    again = score(catalog.VP(cutoff=1e-5))
    again.load_state_dict(one.state_dict())
    for other in (score(catalog.VP(beta_max=10.0)), score(catalog.OU()), score(catalog.VP(), predicts="noise")):
        with pytest.raises(ScoreError, match=r"is of a score of dx = .*predicts='edm'.*into one of dx = "):
            other.load_state_dict(one.state_dict())
    old = {key: value for key, value in one.state_dict().items() if key != "meaning"}
    again.load_state_dict(old)


@pytest.mark.parametrize("components", [1, 2])
def test_the_prior_of_a_mixture_is_its_law_at_the_horizon(components):
    """dx = (1 - x) dt + (1 - t) dw leaves much of the data at T = 1, and its correlations."""
    sde = SDE(1 - x, 1 - t, T=1)
    C = torch.tensor([[0.5, 0.45], [0.45, 0.5]], dtype=torch.float64)
    means = torch.tensor([[0.3, -1.0], [-0.5, 2.0]], dtype=torch.float64)[:components]
    exact = GaussianMixture(sde, means, C.expand(components, 2, 2), full=True)
    flow, decay = sde.flow_ode(exact), math.exp(-1)
    var = (1.0 - 5.0 * math.exp(-2)) / 4.0  # ∫ e^{-2 (1 - t)} (1 - t)² dt
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(components, dtype=torch.float64)),
        torch.distributions.MultivariateNormal(
            1.0 + decay * (means - 1.0), decay**2 * C + var * torch.eye(2, dtype=torch.float64)
        ),
    )
    points = 0.8 * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flow.prior.log_prob(points), law.log_prob(points))
    drawn = flow.prior.sample((20_000, 2), seed=0, dtype=torch.float64)
    spread = torch.cov(means.T, correction=0) if components > 1 else 0.0
    expected = decay**2 * (C + spread) + var * torch.eye(2, dtype=torch.float64)
    level = 1.0 + decay * (means.mean(0) - 1.0)
    assert bool(((drawn.mean(0) - level).abs() < 5 * (expected.diagonal() / 20_000).sqrt()).all())
    assert float((drawn.T.cov() - expected).abs().max()) < 5 * float(expected.max()) * math.sqrt(2 / 20_000)
    samples = flow.sample((5_000, 2), "rk4", 20, seed=0, dtype=torch.float64)
    assert float((samples.T.cov() - C - spread).abs().max()) < 5 * float((C + spread).max()) * math.sqrt(2 / 5_000)
    vp = sdeflow.catalog.VP()
    assert isinstance(
        vp.flow_ode(GaussianMixture(vp, means, C.expand(components, 2, 2), full=True)).prior, sdeflow.Gaussian
    )
    one = sde.flow_ode(GaussianMixture(sde, means[:1], torch.tensor([0.5])))
    assert isinstance(one.prior, sdeflow.Gaussian)
