"""Bounds of the reverse-time SDE against densities in closed form, and divergences between Gaussians."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import CATALOGUE
from scipy.integrate import quad, solve_ivp

import sdeflow
from sdeflow import SDE, catalog, t, x
from sdeflow.errors import DataError, NotAffineError
from sdeflow.likelihood import bounds
from sdeflow.likelihood.bounds import elbo, kl_bound
from sdeflow.scores import GaussianMixture

NAMES = [name for name in CATALOGUE if name != "OU"]
COUPLED = "CriticallyDampedLangevin"


class Exact:
    """The prior that is p_T itself."""

    def __init__(self, truth):
        self.truth = truth

    def sample(self, shape, seed=None, dtype=None, device="cpu"):
        kernel = self.truth.kernel
        return kernel.sample(self.truth.sample(shape[0], seed=seed, dtype=dtype), kernel.T, seed=seed).to(device)

    def log_prob(self, x):
        return self.truth.log_prob(x, self.truth.kernel.T)


def declared(name):
    return getattr(catalog, name)()


def one(sde, mean=0.3, std=0.5):
    return GaussianMixture(sde, torch.tensor([[mean]]), torch.tensor([std**2]))


def two(sde):
    return GaussianMixture(sde, torch.tensor([[-0.8], [0.6]]), torch.tensor([0.09, 0.04]), torch.tensor([0.4, 0.6]))


def over_kernel(kernel, x_0, function, nodes=200):
    """E f(x_cutoff) over p(x_cutoff | x_0) for scalar data x_0 (batch, 1), by Gauss-Hermite quadrature, (batch,)."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    alpha, sigma, offset = (float(v) for v in kernel.coefficients(torch.tensor(kernel.cutoff, dtype=torch.float64)))
    states = alpha * x_0 + offset + sigma * torch.tensor(z)  # (batch, nodes)
    values = function(x_0.expand_as(states).reshape(-1, 1), states.reshape(-1, 1)).reshape(states.shape)
    return values @ torch.tensor(w / w.sum())


def kl_of_gaussians(m, v, n, w):
    return 0.5 * (v / w + (m - n) ** 2 / w - 1 + math.log(w / v))


def marginal(sde, mean, std, time):
    """Mean and covariance of the (joint) state at ``time`` for scalar Gaussian data."""
    g = sde.kernel.marginal(torch.tensor([mean]), torch.tensor([std]), time)
    if not sde.kernel.coupled:
        return g.mean.reshape(1).numpy(), (g.std.reshape(1, 1) ** 2).numpy()
    root = g.root.values.reshape(2, 2)
    return g.mean.reshape(2).numpy(), (root @ root.mT).numpy()


def kl_of_states(first, second):
    (m, V), (n, W) = first, second
    ratio = np.linalg.solve(W, V)
    shift = m - n
    return 0.5 * float(np.trace(ratio) - len(m) + shift @ np.linalg.solve(W, shift) - np.linalg.slogdet(ratio)[1])


def agree(error, stderr):
    """Whether independent errors fit their standard errors: their sum and their size, each of which is pooled."""
    pooled = float(stderr.square().mean().sqrt())
    together = float(error.mean()) * math.sqrt(len(error)) / pooled
    size = float(error.square().mean().sqrt()) / pooled
    return abs(together) < 4 and size < 1 + 4 / math.sqrt(len(error))


# -------------------------------------------------------------------- exact scores: the bound is the density


@pytest.mark.parametrize("name", NAMES)
def test_for_gaussian_data_it_is_the_density_without_any_variance(name):
    sde = declared(name)
    truth = one(sde)
    data = truth.sample(5, seed=0, dtype=torch.float64)
    model = sde.reverse(truth).model
    at_cutoff, at_data = elbo(model, data, at="cutoff", draws=4, seed=1), elbo(model, data, draws=4, seed=1)
    assert float(at_cutoff.stderr.max()) < 1e-10
    assert float(at_data.stderr.max()) < 1e-10
    expected = over_kernel(sde.kernel, data, lambda _, y: truth.log_prob(y, sde.cutoff), nodes=20)
    torch.testing.assert_close(at_cutoff.value, expected, rtol=0, atol=1e-9)
    # Of the data's own density the decoder leaves ½ (ratio - 1 - log ratio) + ..., second order in sigma² / alpha².
    noise = 0.01 if name == "VE" else 2e-3
    torch.testing.assert_close(at_data.value, truth.log_prob(data), rtol=0, atol=10 * (noise / 0.5) ** 2)


def test_the_data_component_of_a_coupled_state():
    sde = catalog.CriticallyDampedLangevin()
    truth = GaussianMixture(sde, torch.tensor([[0.3, -0.2]]), torch.tensor([[0.25, 0.6]]))
    data = truth.sample(4, seed=0, dtype=torch.float64)[:, 0]
    bound = elbo(sde.reverse(truth).model, data, draws=4, seed=1)
    plain = GaussianMixture(catalog.VP(), torch.tensor([[0.3, -0.2]]), torch.tensor([[0.25, 0.6]]))
    torch.testing.assert_close(bound.value, plain.log_prob(data), rtol=0, atol=1e-6)
    assert float(bound.stderr.max()) < 1e-9


@pytest.mark.parametrize(("name", "times"), [*((n, "log_snr") for n in (*NAMES, COUPLED)), *((n, "t") for n in NAMES)])
def test_for_a_mixture_it_is_the_density_at_the_cutoff(name, times):
    sde = declared(name)
    truth = two(sde)
    model = sde.reverse(truth, prior=Exact(truth)).model
    if name == COUPLED:
        data, draws = torch.tensor([[-0.7], [0.5]], dtype=torch.float64), 256
        lifted = sde.kernel.lift(data, noisy=False).repeat(400, 1, 1)
        values = truth.log_prob(sde.kernel.sample(lifted, sde.cutoff, seed=4), sde.cutoff).reshape(400, 2)
        expected, spread = values.mean(0), values.std(0) / 20
    else:
        data, draws = two(sde).sample(16, seed=0, dtype=torch.float64), 512
        expected, spread = over_kernel(sde.kernel, data, lambda _, y: truth.log_prob(y, sde.cutoff)), 0.0
    bound = elbo(model, data, at="cutoff", draws=draws, times=times, seed=1)
    assert agree(bound.value - expected, (bound.stderr.square() + spread**2).sqrt())
    assert float(bound.stderr.mean()) < (0.25 if times == "log_snr" else 1.0)


def test_at_a_coarse_cutoff_the_decoder_is_counted_exactly():
    """Against E [log p_c(x_c) + log r(x | x_c) - log q(x_c | x)] by quadrature, r written out here."""
    sde = SDE(-x / 2, 1, cutoff=0.05)
    for truth in (one(sde), two(sde)):
        data = truth.sample(12, seed=0, dtype=torch.float64)
        alpha, sigma, _ = (float(v) for v in sde.kernel.coefficients(torch.tensor(0.05, dtype=torch.float64)))

        def integrand(x_0, x_c, truth=truth, width=sigma / alpha):
            middle = truth.denoise(x_c, 0.05)
            r = -0.5 * ((x_0 - middle) / width) ** 2 - math.log(width * math.sqrt(2 * math.pi))
            return truth.log_prob(x_c, 0.05) + r[:, 0] - sde.kernel.log_prob(x_c, x_0, 0.05)

        expected = over_kernel(sde.kernel, data, integrand)
        bound = elbo(sde.reverse(truth, prior=Exact(truth)).model, data, draws=1024, seed=2)
        assert agree(bound.value - expected, bound.stderr + 1e-10)
        gap = (truth.log_prob(data) - expected).abs().mean()
        assert float(gap) > 2e-3  # so that the comparison above says something


def test_the_standard_error_is_calibrated():
    sde = catalog.VP()
    truth = two(sde)
    data = truth.sample(400, seed=3, dtype=torch.float64)
    bound = elbo(sde.reverse(truth, prior=Exact(truth)).model, data, at="cutoff", draws=64, seed=5)
    expected = over_kernel(sde.kernel, data, lambda _, y: truth.log_prob(y, sde.cutoff))
    error = bound.value - expected
    ratio = float(error.square().mean() / bound.stderr.square().mean())
    assert 0.7 < ratio < 1.4  # 1 within 4 √(2 / 400), and the same again for the variance's own error
    assert abs(float(error.mean())) < 4 * float(error.std()) / 20


def test_the_decoders_variance_is_that_of_its_mean():
    """What the decoder adds to the squared standard error, against its variance over rows of one datum."""
    sde = catalog.VP(cutoff=0.05)  # where the decoder's part is not negligible
    truth = two(sde)
    data = truth.sample(1, seed=3, dtype=torch.float64).expand(1000, -1)
    model = sde.reverse(truth, prior=Exact(truth)).model
    whole, rest = (elbo(model, data, at=at, draws=16, seed=5) for at in ("data", "cutoff"))
    ratio = float((whole.stderr.square() - rest.stderr.square()).mean() / whole.reconstruction.var())
    assert 0.7 < ratio < 1.4


def test_the_priors_variance_is_that_of_its_mean():
    """The squared standard error, where the prior's part is all of it, against its variance over rows of one datum."""

    class Laplace(Exact):
        def log_prob(self, x):
            return torch.distributions.Laplace(0.0, 1.0).log_prob(x.double()).flatten(1).sum(1)

    sde = SDE(-x / 2, 1)
    exact = one(sde)  # Gaussian data: the reference's part has no variance
    data = torch.full((1000, 1), 0.6, dtype=torch.float64)
    bound = elbo(sde.reverse(exact, prior=Laplace(exact)).model, data, at="cutoff", draws=16, seed=5)
    ratio = float(bound.stderr.square().mean() / bound.prior.var())
    assert 0.7 < ratio < 1.4


def test_schedules_per_coordinate_and_in_a_basis():
    k = torch.linspace(0.3, 2.0, 6, dtype=torch.float64).reshape(2, 3)
    pixels = SDE("-k*x", "sqrt(2*k)", params={"k": k}, T=3)
    blurring = catalog.Blurring((4, 4), blur=2.0)
    for sde, event in ((pixels, (2, 3)), (blurring, (1, 4, 4))):
        generator = torch.Generator().manual_seed(0)
        if sde is pixels:
            truth = GaussianMixture(sde, torch.randn(1, *event, generator=generator), torch.rand(1, *event) + 0.1)
        else:
            truth = GaussianMixture(sde, torch.randn(1, *event, generator=generator), torch.tensor([0.3]))
        data = truth.sample(3, seed=0, dtype=torch.float64)
        bound = elbo(sde.reverse(truth).model, data, draws=8, seed=0)
        assert float(bound.stderr.max()) < 1e-9
        # The cutoff is that of the mean of the log-SNRs: some coordinates have more noise there than 2e-3.
        torch.testing.assert_close(bound.value, truth.log_prob(data), rtol=0, atol=1e-3)


# -------------------------------------------------------------------- the form of the bound


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "CosineVP"])
def test_the_collapsed_form_is_the_uncollapsed_one_on_the_same_draws(name):
    """ScoreFlow: E[-log π] + ½ ∫ E[g² |s - ∇log q|² - g² |∇log q|² - 2 div f] dt, each part from f, g and scores."""
    sde = declared(name)
    truth = two(sde)
    model = sde.reverse(lambda x, t: 0.9 * truth(x, t), prior=Exact(truth)).model
    data = truth.sample(8, seed=0, dtype=torch.float64)
    bound = elbo(model, data, at="cutoff", draws=64, seed=7)
    sample = bounds._Sample(model, data)
    ends = sde.kernel.half_log_snr(torch.tensor([sde.cutoff, sde.T], dtype=torch.float64))
    length = float(ends[0] - ends[1])
    uncollapsed, collapsed = [], []
    with torch.no_grad():
        for draw in sample.draws(bounds._Times(sde.kernel, "log_snr"), 64, 7, False):
            x_0 = data.repeat(draw.times, 1)
            _, _, g2 = sde.kernel.sde_coefficients(draw.t)
            target, ours = sde.kernel.score(draw.x_t, x_0, draw.t), model.score(draw.x_t, draw.t)
            _, std = sde.kernel.moments(x_0, draw.t)
            # ½ g² |∇log q|² has the mean ½ g² / sigma², and what it deviates by has the mean 0.
            deviation = 0.5 * g2 * (target[:, 0].square() - 1 / std[:, 0] ** 2)
            integrand = 0.5 * g2 * ((ours - target).square() - target.square())[:, 0] + deviation
            error = (draw.eps + std * ours)[:, 0].square()
            uncollapsed.append((integrand * draw.rate).reshape(draw.times, -1))
            collapsed.append((length * error - 0.5 * g2 / std[:, 0] ** 2 * draw.rate).reshape(draw.times, -1))
            torch.testing.assert_close(
                0.5 * g2 / std[:, 0] ** 2 * draw.rate, torch.full_like(g2, length), rtol=2e-3, atol=0
            )
    draws = torch.cat(collapsed)
    uncollapsed, collapsed = torch.cat(uncollapsed).mean(0), draws.mean(0)
    torch.testing.assert_close(uncollapsed, collapsed, rtol=2e-3, atol=1e-3)

    def rest(time):
        a, _, g2 = (float(v) for v in sde.kernel.sde_coefficients(torch.tensor(time, dtype=torch.float64)))
        sigma = float(sde.kernel.coefficients(torch.tensor(time, dtype=torch.float64))[1])
        return -0.5 * g2 / sigma**2 - a

    points = np.geomspace(max(sde.cutoff, 1e-3 * sde.T), sde.T, 30)[1:-1]
    edges = [sde.cutoff, *points, sde.T]
    integral = sum(quad(rest, a, b, epsrel=1e-9)[0] for a, b in pairwise(edges))
    assert abs(integral - bound.entropy) < 1e-6
    # The whole bound, whose draws are the same, less what a Gaussian would give.
    stderr = bounds._stratified_variance(draws).sqrt()
    assert agree(collapsed + length + bound.prior + bound.entropy + bound.value, stderr + bound.stderr)


def test_the_parts_add_up_and_a_batch_does_not_matter():
    sde = catalog.VP()
    truth = two(sde)
    data = truth.sample(40, seed=0, dtype=torch.float64)
    model = sde.reverse(truth).model
    bound = elbo(model, data, draws=12, seed=3)
    total = bound.prior + bound.diffusion + bound.entropy + bound.reconstruction
    torch.testing.assert_close(bound.value, -total)
    for n in (1, 17):
        fewer = elbo(model, data[:n], draws=12, seed=3)
        torch.testing.assert_close(fewer.value, bound.value[:n])
        torch.testing.assert_close(fewer.stderr, bound.stderr[:n])
    assert bound.nfe == 12 + 3
    assert elbo(model, data[:0]).value.shape == (0,)


# -------------------------------------------------------------------- imperfect scores


def test_it_bounds_the_model_of_a_linear_score():
    """For s = -c(t) x the reverse SDE's law at the cutoff is Gaussian, its variance from an ODE."""
    sde = catalog.VP()
    beta = lambda s: 0.1 + 19.9 * s  # noqa: E731
    sigma2 = lambda s: -math.expm1(-0.1 * s - 9.95 * s * s)  # noqa: E731
    slope = lambda s: (1 + 0.4 * math.sin(6 * s)) / (0.25 * (1 - sigma2(s)) + sigma2(s))  # noqa: E731
    score = lambda x, s: -x * torch.tensor([slope(float(v)) for v in s], dtype=x.dtype)[:, None]  # noqa: E731
    backward = solve_ivp(
        lambda s, V: -beta(s) * V + 2 * beta(s) * slope(s) * V - beta(s),
        (1.0, sde.cutoff),
        [1.0],
        rtol=1e-10,
        atol=1e-12,
    )  # dV/dt of dx = [-½ beta x + beta c x] dt + √beta dw̄
    V = float(backward.y[0, -1])
    model = sde.reverse(score, prior=sdeflow.Gaussian(0.0, 1.0)).model
    data = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    bound = elbo(model, data, at="cutoff", draws=2048, seed=0)
    alpha, sigma, _ = (float(v) for v in sde.kernel.coefficients(torch.tensor(sde.cutoff, dtype=torch.float64)))
    exact = -0.5 * ((alpha * data[:, 0]) ** 2 + sigma**2) / V - 0.5 * math.log(2 * math.pi * V)
    assert bool((bound.value < exact + 4 * bound.stderr).all())
    gap = float((exact - bound.value).mean())
    assert 4 * float(bound.stderr.max()) < gap < 1.0, "neither violated nor vacuous"


def test_the_flow_may_lie_above_the_bound():
    """p_0 = N(0, 1) and s = -x + δ, B = ∫ beta: bound ½ B δ², the SDE's 2 δ² (1 - e^{-B/2})², the flow's B² δ² / 8."""
    sde, shift = catalog.VP(), 0.1
    B = 0.1 * (1 - sde.cutoff) + 9.95 * (1 - sde.cutoff**2)
    score = lambda x, s: -x + shift  # noqa: E731
    prior = sdeflow.Gaussian(0.0, 1.0)
    truth = one(sde, 0.0, 1.0)
    data = truth.sample(2000, seed=0, dtype=torch.float64)
    bound = kl_bound(sde.reverse(score, prior=prior).model, data, truth, draws=8, seed=0)
    assert abs(bound.value - 0.5 * B * shift**2) < 4 * bound.stderr + 1e-6
    points = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    flow = sde.flow_ode(score, prior=prior).log_prob(points, rtol=1e-8, atol=1e-8)
    mean = 0.5 * B * shift
    expected = -0.5 * (points[:, 0] - mean).square() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-6)
    of_sde, of_flow = 2 * shift**2 * (1 - math.exp(-B / 2)) ** 2, 0.5 * mean**2
    assert of_sde < bound.value < of_flow
    drawn = sde.reverse(score, prior=prior).sample((4000, 1), solver="euler", steps=400, seed=0, dtype=torch.float64)
    assert abs(float(drawn.mean()) - math.sqrt(2 * of_sde)) < 4 / math.sqrt(4000) + 0.01 * math.sqrt(2 * of_sde)


# -------------------------------------------------------------------- the divergence


@pytest.mark.parametrize("name", [*NAMES, COUPLED])
@pytest.mark.parametrize("times", ["log_snr", "t"])
def test_equality_for_the_score_of_another_diffused_gaussian(name, times):
    sde = declared(name)
    (m, s), (n, w) = (0.3, 0.5), (0.1, 0.6)
    of_p, of_q = one(sde, m, s), one(sde, n, w)
    data = of_p.sample(100 if name == COUPLED else 4000, seed=0, dtype=torch.float64)
    data = data[:, 0] if name == COUPLED else data
    bound = kl_bound(sde.reverse(of_q).model, data, of_p, draws=8, times=times, seed=1)
    first, last = (kl_of_states(marginal(sde, m, s, time), marginal(sde, n, w, time)) for time in (sde.cutoff, sde.T))
    assert bound.kind == "kl"
    assert abs(bound.value - first) < 4 * bound.stderr
    assert abs(bound.score - (first - last)) < 4 * bound.stderr
    assert bound.stderr < 0.3 * first


def test_equality_in_closed_form():
    """½ ∫ g² E |∇log p_t - ∇log q_t|² dt = KL(p_0 ‖ q_0) - KL(p_T ‖ q_T), by quadrature."""
    sde = catalog.VP()
    (m, v), (n, w) = (0.3, 0.25), (0.1, 0.36)

    def rate(s):
        a2 = math.exp(-0.1 * s - 9.95 * s * s)
        V, W, shift = a2 * v + 1 - a2, a2 * w + 1 - a2, math.sqrt(a2) * (m - n)
        return 0.5 * (0.1 + 19.9 * s) * (V * (1 / W - 1 / V) ** 2 + (shift / W) ** 2)

    integral = quad(rate, 0, 1, epsabs=1e-12)[0]
    a2 = math.exp(-10.05)
    end = kl_of_gaussians(math.sqrt(a2) * m, a2 * v + 1 - a2, math.sqrt(a2) * n, a2 * w + 1 - a2)
    assert abs(integral - (kl_of_gaussians(m, v, n, w) - end)) < 1e-9
    data = one(sde, m, v**0.5).sample(20000, seed=0, dtype=torch.float64)
    bound = kl_bound(sde.reverse(one(sde, n, w**0.5)).model, data, one(sde, m, v**0.5), draws=8, seed=1)
    assert abs(bound.score - integral) < 4 * bound.stderr < 0.05 * integral


@pytest.mark.parametrize("name", ["VP", "VE"])
def test_the_cross_entropy_is_the_divergence_and_the_entropy(name):
    sde = declared(name)
    of_p, of_q = one(sde, 0.3, 0.5), one(sde, 0.1, 0.6)
    data = of_p.sample(4000, seed=0, dtype=torch.float64)
    bound = kl_bound(sde.reverse(of_q).model, data, draws=8, seed=1)
    assert bound.kind == "cross_entropy"
    mean, cov = marginal(sde, 0.3, 0.5, sde.cutoff)
    entropy = 0.5 * math.log(2 * math.pi * math.e * float(cov[0, 0]))
    divergence = kl_of_states((mean, cov), marginal(sde, 0.1, 0.6, sde.cutoff))
    assert abs(bound.value - entropy - divergence) < 4 * bound.stderr


def test_without_a_density_of_the_data_the_priors_part_is_bounded():
    sde = catalog.VP(beta_max=4.0)  # so that x_T still knows x_0
    of_p = one(sde, 0.8, 0.5)
    data = of_p.sample(4000, seed=0, dtype=torch.float64)
    model = sde.reverse(one(sde, 0.7, 0.6)).model
    known = kl_bound(model, data, of_p, seed=0)
    plain = kl_bound(model, data, lambda x, s: of_p(x, s), seed=0)
    assert plain.score == pytest.approx(known.score, rel=1e-9)
    assert plain.prior > known.prior + 4 * known.stderr


# -------------------------------------------------------------------- planted mistakes


def _mismatch(truth, prior=None, **options):
    """The distance of the bound to the density in standard errors (with 1e-6 for what has none)."""
    sde = catalog.VP()
    data = truth.sample(256, seed=0, dtype=torch.float64)  # of 64 a mistake is worth 4 to 10 of them, by chance
    bound = elbo(sde.reverse(truth, prior=prior or Exact(truth)).model, data, at="data", draws=256, seed=1, **options)
    error = (bound.value - truth.log_prob(data)).mean()
    return abs(float(error)) / (float(bound.stderr.square().sum().sqrt()) / len(data) + 1e-4)


def test_the_right_bound_passes_the_test_of_the_planted_mistakes():
    assert _mismatch(two(catalog.VP())) < 4


@pytest.mark.filterwarnings("ignore::sdeflow.errors.PriorMismatchWarning")
@pytest.mark.parametrize(
    "mistake", ["double", "half", "metric", "no decoder", "no entropy", "prior", "times", "reference"]
)
def test_planted_mistakes_are_found(mistake, monkeypatch):
    sde = catalog.VP()
    truth, prior = two(sde), None
    right = {name: getattr(bounds._Sample, name) for name in ("excess", "reconstruction", "reference", "end")}
    if mistake == "double":
        monkeypatch.setattr(bounds._Sample, "excess", lambda self, draw: 2 * right["excess"](self, draw))
    elif mistake == "half":
        monkeypatch.setattr(bounds._Sample, "excess", lambda self, draw: 0.5 * right["excess"](self, draw))
    elif mistake == "metric":
        monkeypatch.setattr(bounds._Draw, "product", lambda self, a, b: (a * b).sum(1).reshape(self.times, -1))
    elif mistake == "no decoder":  # then value is E[log p^θ_cutoff] - H: nothing of the sort
        constant = 0.5 * (1 + math.log(2 * math.pi)) + math.log(2e-3)
        monkeypatch.setattr(
            bounds._Sample, "reconstruction", lambda self, *_: (self.x_0[:, 0] * 0 - constant, self.x_0[:, 0] * 0)
        )
    elif mistake == "no entropy":
        wrong = lambda self, *a: (right["reconstruction"](self, *a)[0] + 0.5, self.x_0[:, 0] * 0)  # noqa: E731
        monkeypatch.setattr(bounds._Sample, "reconstruction", wrong)
    elif mistake == "prior":
        prior = sdeflow.Gaussian(0.0, 2.0)
    elif mistake == "times":
        call = bounds._Times.__call__
        monkeypatch.setattr(bounds._Times, "__call__", lambda self, u: call(self, u**3))
    else:  # a reference that is not the one whose closed form is added
        inner = bounds._Sample.excess

        def other(self, draw):
            scale, self.scale = self.scale, self.scale.scaled(0.5)
            try:
                return inner(self, draw)
            finally:
                self.scale = scale

        monkeypatch.setattr(bounds._Sample, "excess", other)
    assert _mismatch(truth, prior) > 6


@pytest.mark.filterwarnings("ignore::sdeflow.errors.PriorMismatchWarning")
def test_a_wrong_prior_costs_its_divergence():
    sde = catalog.VP()
    truth = one(sde, 0.0, 0.5)
    data = truth.sample(2000, seed=0, dtype=torch.float64)
    right, wrong = (
        elbo(sde.reverse(truth, prior=prior).model, data, at="cutoff", draws=16, seed=0)
        for prior in (None, sdeflow.Gaussian(0.2, 1.05))
    )
    mean, cov = marginal(sde, 0.0, 0.5, sde.T)
    lost = right.value - wrong.value
    expected = kl_of_gaussians(float(mean[0]), float(cov[0, 0]), 0.2, 1.05**2)
    assert abs(float(lost.mean()) - expected) < 4 * float(lost.std()) / math.sqrt(2000)


# -------------------------------------------------------------------- use


class Labelled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x, t, y=None):
        return self.weight * x + (0 if y is None else y[:, None].to(x.dtype))


def test_networks_in_float32_and_with_labels():
    sde = catalog.VP()
    score = sdeflow.Score(Labelled(), sde, predicts="edm", data_mean=0.0, data_std=0.5)
    data = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) / 2
    bound = elbo(sde.reverse(score).model, data, draws=8, seed=0)
    assert bound.value.dtype == torch.float64
    assert bool(torch.isfinite(bound.value).all() & (bound.stderr > 0).all())
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    labelled = elbo(sde.reverse(score.given(labels)).model, data, draws=8, seed=0)
    torch.testing.assert_close(labelled.value[0::2], bound.value[0::2])
    assert bool((labelled.value[1::2] - bound.value[1::2]).abs().min() > 1e-3)
    with pytest.raises(DataError, match="float64"):
        elbo(sde.reverse(score).model, data.double())
    with torch.inference_mode():
        torch.testing.assert_close(elbo(sde.reverse(score).model, data, draws=8, seed=0).value, bound.value)


def test_what_makes_no_sense_is_refused():
    sde = catalog.VP()
    truth = one(sde)
    model, data = sde.reverse(truth).model, torch.zeros(3, 1, dtype=torch.float64)
    for options, words in (
        ({"draws": 3}, "even"),
        ({"draws": 0}, "even"),
        ({"at": "end"}, "cutoff"),
        ({"times": "x"}, "log_snr"),
    ):
        with pytest.raises(ValueError, match=words):
            elbo(model, data, **options)
    with pytest.raises(DataError, match="floating"):
        elbo(model, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(DataError, match="empty"):
        kl_bound(model, data[:0], truth)
    with pytest.raises(ValueError, match="another SDE"):
        kl_bound(model, data, one(catalog.VE()))
    well = SDE(f=x - x**3, g=1 + 0 * t, T=2)
    with pytest.raises(NotAffineError):
        elbo(well.reverse(lambda x, s: -x).model, data)
