"""Dequantisation against the probabilities of bins, by quadrature over known densities."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from sdeflow import catalog
from sdeflow.errors import DataError
from sdeflow.likelihood import dequantisation
from sdeflow.likelihood.bounds import elbo
from sdeflow.likelihood.dequantisation import (
    Dequantised,
    Levels,
    TruncatedNormal,
    Uniform,
    Variational,
    bits_from,
    bits_per_dim,
)
from sdeflow.scores import GaussianMixture

LOG2 = math.log(2.0)
GRID = {"levels": 8, "low": -1.0, "high": 1.0}
WIDTH = 0.25
MEANS, STDS, WEIGHTS = (-0.45, 0.3), (0.09, 0.2), (0.35, 0.65)  # narrower than a bin, and not


def density(x):
    return sum(w * stats.norm.pdf(x, m, s) for m, s, w in zip(MEANS, STDS, WEIGHTS, strict=True))


def bin_probability(k):
    cdf = lambda x: sum(w * stats.norm.cdf(x, m, s) for m, s, w in zip(MEANS, STDS, WEIGHTS, strict=True))  # noqa: E731
    return cdf(-1 + WIDTH * (k + 1)) - cdf(-1 + WIDTH * k)


def log_prob(x):
    """log of the mixture's density, the coordinates independent."""
    terms = [
        math.log(w) - 0.5 * ((x - m) / s) ** 2 - math.log(s * math.sqrt(2 * math.pi))
        for m, s, w in zip(MEANS, STDS, WEIGHTS, strict=True)
    ]
    return torch.logsumexp(torch.stack(terms), 0).flatten(1).sum(1)


def jensen_gap(k):
    """log P(k) - E_u log (p(x) width) for uniform u, in nats, by quadrature."""
    mean = quad(lambda u: math.log(density(-1 + WIDTH * (k + u)) * WIDTH), 0, 1, epsabs=1e-11)[0]
    return math.log(bin_probability(k)) - mean


ALL = torch.arange(8)[:, None]


def test_the_bins_of_the_test_are_right():
    for k in range(8):
        assert bin_probability(k) == pytest.approx(quad(density, -1 + WIDTH * k, -1 + WIDTH * (k + 1))[0], rel=1e-9)


# -------------------------------------------------------------------- uniform


def test_uniform_bits_exceed_the_truth_by_the_jensen_gap():
    draws = 4000
    bits = bits_per_dim(log_prob, ALL, **GRID, draws=draws, importance=False, seed=0, dtype=torch.float64)
    truth = torch.tensor([-math.log2(bin_probability(k)) for k in range(8)])
    gap = torch.tensor([jensen_gap(k) / LOG2 for k in range(8)])
    z = (bits.value - truth - gap) / bits.stderr
    assert float(z.abs().max()) < 4
    assert bool((gap > 0).all())
    assert float((gap / bits.stderr).max()) > 50  # the gap is seen, not just allowed for


def test_two_dimensions_add_up():
    images = torch.tensor([[2, 4], [3, 5], [7, 1]])
    bits = bits_per_dim(log_prob, images, **GRID, draws=4000, seed=0, importance=False, dtype=torch.float64)
    truth = torch.tensor([-sum(math.log2(bin_probability(int(k))) for k in row) / 2 for row in images])
    gap = torch.tensor([sum(jensen_gap(int(k)) for k in row) / (2 * LOG2) for row in images])
    assert float(((bits.value - truth - gap) / bits.stderr).abs().max()) < 4


@pytest.mark.parametrize("scheme", [Uniform(), TruncatedNormal(0.1)], ids=repr)
def test_many_weighted_draws_give_the_probability(scheme):
    images = torch.tensor([[2, 4], [3, 5], [7, 1], [0, 6]])
    bits = bits_per_dim(log_prob, images, **GRID, dequantise=scheme, draws=4096, seed=1, dtype=torch.float64)
    truth = torch.tensor([-sum(math.log2(bin_probability(int(k))) for k in row) / 2 for row in images])
    assert float(((bits.value - truth) / bits.stderr).abs().max()) < 4
    assert float(bits.stderr.max()) < 0.05
    assert bool((bits.effective > 300).all() & (bits.effective <= 4096).all())


def test_bits_fall_with_the_number_of_draws():
    """In expectation: groups of K of 8,192 draws, their means within standard errors of a falling sequence."""
    images = ALL[[0, 2, 3]]  # of the largest gaps
    drawn = Uniform().sample(images, **GRID, seed=2, draws=8192, dtype=torch.float64)
    log_p = torch.stack([log_prob(x) for x in drawn.x])
    means, errors = [], []
    for K in (1, 2, 4, 16, 64):
        groups = [
            bits_from(Dequantised(drawn.x[i : i + K], drawn.log_q[i : i + K], drawn.log_det), log_p[i : i + K]).value
            for i in range(0, 8192, K)
        ]
        values = torch.stack(groups)
        means.append(values.mean(0))
        errors.append(values.std(0) / math.sqrt(len(values)))
    truth = torch.tensor([-math.log2(bin_probability(k)) for k in (0, 2, 3)])
    for first, second, error in zip(means[:-1], means[1:], errors[:-1], strict=True):
        assert bool((second < first + 2 * error).all())
    assert bool((means[0] > means[-1] + 4 * errors[0]).all())
    assert bool((means[-1] > truth - 4 * errors[-1]).all())
    together = bits_from(drawn, log_p, importance=False).value
    assert bool((bits_from(drawn, log_p).value <= together).all())


def test_the_standard_error_is_calibrated():
    drawn = Uniform().sample(ALL[[2]], **GRID, seed=3, draws=128 * 200, dtype=torch.float64)
    log_p = torch.stack([log_prob(x) for x in drawn.x])
    truth = -math.log2(bin_probability(2))
    errors, stderrs = [], []
    for i in range(0, 128 * 200, 128):
        part = Dequantised(drawn.x[i : i + 128], drawn.log_q[i : i + 128], drawn.log_det)
        bits = bits_from(part, log_p[i : i + 128])
        errors.append(float(bits.value) - truth)
        stderrs.append(float(bits.stderr))
    ratio = np.std(errors) / np.sqrt(np.mean(np.square(stderrs)))
    assert 0.8 < ratio < 1.2  # 1 within 4 / √400
    bias = LOG2 * np.mean(np.square(stderrs)) / 2  # half the squared standard error in nats
    assert abs(np.mean(errors) - bias) < 4 * np.std(errors) / math.sqrt(200)


@pytest.mark.parametrize(("low", "high", "expected"), [(-1.0, 1.0, 7.0), (0.0, 1.0, 8.0), (0.0, 256.0, 0.0)])
def test_the_offset_comes_from_the_transform(low, high, expected):
    """Of the unit density on [low, low + 1): bits are log₂ (levels / (high - low)); and dx/du by finite difference."""
    images = torch.randint(0, 256, (3, 2, 4))
    bits = bits_per_dim(lambda x: torch.zeros(len(x)), images, levels=256, low=low, high=high, seed=0)
    torch.testing.assert_close(bits.value, torch.full((3,), expected, dtype=torch.float64))
    grid = Levels(256, low, high)
    k = torch.tensor(17.3, dtype=torch.float64)
    slope = float(grid.state(k + 0.5) - grid.state(k - 0.5))
    assert grid.log_det(8) == pytest.approx(8 * math.log(slope), abs=1e-9)
    assert float(grid.state(torch.tensor(0.0))) == low
    assert float(grid.state(torch.tensor(256.0))) == high


def test_draws_lie_in_their_bins_and_do_not_depend_on_their_number():
    images = torch.randint(0, 17, (5, 1, 4, 4))
    variational = Variational(Constant(0.4, -0.5))
    for scheme in (Uniform(), TruncatedNormal(0.05), variational):
        drawn = scheme.sample(images, levels=17, low=-1, high=1, seed=4, draws=3, dtype=torch.float64)
        assert drawn.x.shape == (3, 5, 1, 4, 4)
        assert drawn.log_q.shape == (3, 5)
        assert drawn.log_q.dtype == torch.float64
        k = (drawn.x + 1) * 17 / 2
        assert bool((k >= images - 1e-9).all() & (k <= images + 1 + 1e-9).all())
        fewer = scheme.sample(images[:2], levels=17, low=-1, high=1, seed=4, draws=2, dtype=torch.float64)
        torch.testing.assert_close(fewer.x, drawn.x[:2, :2])
        torch.testing.assert_close(fewer.log_q, drawn.log_q[:2, :2])
        assert not torch.equal(drawn.x[0], drawn.x[1])


def test_the_first_draw_is_that_of_the_likelihood():
    sde = catalog.VP()
    score = GaussianMixture(sde, torch.zeros(1, 1, 2, 2), torch.tensor([0.3]))
    images = torch.tensor([[[[0, 3], [12, 16]]], [[[8, 8], [9, 7]]]])
    flow = sde.flow_ode(score)
    theirs = flow.bits_per_dim(images, levels=17, low=-1.0, high=1.0, seed=0)
    ours = bits_per_dim(flow.log_prob, images, levels=17, low=-1.0, high=1.0, seed=0)
    torch.testing.assert_close(ours.value, theirs, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- truncated normal


@pytest.mark.parametrize("noise", [2e-3, 0.05, 0.125, 3.0])
def test_the_truncated_normal_against_quadrature(noise):
    scheme = TruncatedNormal(noise)
    tau = scheme.tau(**GRID)
    assert tau == pytest.approx(WIDTH / 2 / noise)
    law = stats.truncnorm(-tau, tau)
    # u = ½ + n / (2 τ) has the density 2 τ times that of n, and this entropy.
    pdf = lambda u: 2 * tau * law.pdf((u - 0.5) * 2 * tau)  # noqa: E731
    nodes = [0.0, *np.clip(0.5 + np.array([-6, 0, 6]) / (2 * tau), 0, 1), 1.0]
    pieces = [(a, b) for a, b in pairwise(nodes) if b > a]
    assert sum(quad(pdf, a, b)[0] for a, b in pieces) == pytest.approx(1, abs=1e-8)
    entropy = sum(quad(lambda u: -pdf(u) * math.log(max(pdf(u), 1e-300)), a, b)[0] for a, b in pieces)
    assert scheme.entropy(**GRID) == pytest.approx(entropy, abs=1e-7)
    drawn = scheme.sample(ALL, **GRID, seed=0, draws=2000, dtype=torch.float64)
    u = (drawn.x + 1) / WIDTH - ALL
    expected = torch.tensor(np.log(pdf(u.numpy())))[..., 0]
    torch.testing.assert_close(drawn.log_q, expected, rtol=1e-6, atol=1e-6)
    assert abs(float(-drawn.log_q.mean()) - entropy) < 4 * float(drawn.log_q.std()) / math.sqrt(16000) + 1e-12
    assert stats.kstest(u.flatten().numpy(), lambda v: law.cdf((v - 0.5) * 2 * tau)).pvalue > 1e-3


def test_the_form_of_the_paper():
    """bits = -(E log p_ε(x_ε) / d + H(n) + log sigma_ε) / log 2, x_ε = alpha x_0 + sigma n, with no width in it."""
    sde = catalog.VP()
    alpha, sigma, _ = (float(v) for v in sde.kernel.coefficients(torch.tensor(sde.cutoff, dtype=torch.float64)))
    truth = GaussianMixture(sde, torch.tensor([[0.1, -0.2]]), torch.tensor([0.2]))
    scheme = TruncatedNormal(sde.flow_ode(truth).model)
    assert scheme.noise == pytest.approx(sigma / alpha, rel=1e-9)
    images, levels = torch.tensor([[3, 200], [128, 127]]), 256
    options = {"levels": levels, "low": -1.0, "high": 1.0}
    drawn = scheme.sample(images, **options, seed=0, draws=200, dtype=torch.float64)
    # Here p is the density of x = x_ε / alpha, alpha^d p_ε(alpha x).
    log_p_cut = torch.stack([truth.log_prob(alpha * x, sde.cutoff) for x in drawn.x])
    bits = bits_from(drawn, log_p_cut + 2 * math.log(alpha), importance=False).value
    tau = alpha / (256 * sigma)
    Z = 2 * stats.norm.cdf(tau) - 1
    H = 0.5 * math.log(2 * math.pi * math.e) + math.log(Z) - tau * stats.norm.pdf(tau) / Z
    theirs = -(log_p_cut.mean(0) / 2 + H + math.log(sigma)) / LOG2
    # Ours draws log q where the paper takes its mean.
    middle = -drawn.log_q.mean(0) / 2 - (H - math.log(2 * tau))
    torch.testing.assert_close(bits + middle / LOG2, theirs, rtol=0, atol=1e-9)
    assert scheme.entropy(**options) == pytest.approx(H - math.log(2 * tau), abs=1e-12)


# -------------------------------------------------------------------- variational


class Constant(torch.nn.Module):
    def __init__(self, mean, log_std):
        super().__init__()
        self.mean, self.log_std = (
            torch.nn.Parameter(torch.as_tensor(v, dtype=torch.float64)) for v in (mean, log_std)
        )  # fmt: skip

    def forward(self, middles):
        return self.mean.expand_as(middles), self.log_std.expand_as(middles)


class PerLevel(torch.nn.Module):
    """A logit-normal for each level."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor([[0.0] * 8, [0.5] * 8], dtype=torch.float64))

    def forward(self, middles):
        k = ((middles + 1) / WIDTH).floor().long()
        return self.table[0][k], self.table[1][k]


def logit_normal(u, mean, std):
    z = np.log(u / (1 - u))
    return stats.norm.pdf(z, mean, std) / (u * (1 - u))


def test_log_q_of_the_variational_scheme_is_a_density():
    assert quad(lambda u: logit_normal(u, 0.4, math.exp(-0.5)), 0, 1)[0] == pytest.approx(1, abs=1e-8)
    drawn = Variational(Constant(0.4, -0.5)).sample(ALL, **GRID, seed=0, draws=50, dtype=torch.float64)
    u = ((drawn.x + 1) / WIDTH - ALL).detach().numpy()
    expected = torch.tensor(np.log(logit_normal(u, 0.4, math.exp(-0.5))))[..., 0]
    torch.testing.assert_close(drawn.log_q.detach(), expected, rtol=0, atol=1e-7)


def test_the_true_posterior_is_exact_without_variance():
    """p(x) = P(k) LN(u) / width: the posterior of u is the logit-normal itself."""
    P = torch.softmax(torch.linspace(0, 2, 8, dtype=torch.float64), 0)

    def piecewise(x):
        position = (x + 1) / WIDTH
        k = position.floor().long().clamp(0, 7)
        u = (position - k).detach().numpy()
        return (P[k].log() + torch.tensor(np.log(logit_normal(u, -0.3, 0.8) / WIDTH))).sum(1)

    scheme = Variational(Constant(-0.3, math.log(0.8)))
    for importance in (True, False):
        bits = bits_per_dim(
            piecewise, ALL, **GRID, dequantise=scheme, draws=20, seed=0, importance=importance, dtype=torch.float64
        )
        torch.testing.assert_close(bits.value.detach(), -P.log2(), rtol=0, atol=1e-9)
        assert float(bits.stderr.detach().max()) < 1e-9
    narrow = TruncatedNormal(0.04)  # of a density that is one truncated normal in each bin
    tau = narrow.tau(**GRID)

    def comb(x):
        n = ((x + 1) / WIDTH - ((x + 1) / WIDTH).floor() - 0.5) * 2 * tau
        return (
            -math.log(8) + torch.tensor(stats.truncnorm(-tau, tau).logpdf(n.numpy())) + math.log(2 * tau / WIDTH)
        ).sum(1)

    bits = bits_per_dim(comb, ALL, **GRID, dequantise=narrow, draws=20, seed=0, dtype=torch.float64)
    torch.testing.assert_close(bits.value, torch.full((8,), 3.0, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(bits.stderr.max()) < 1e-6


def test_training_closes_the_gap():
    net = PerLevel()
    scheme = Variational(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(250):
        drawn = scheme.sample(ALL, **GRID, seed=step, draws=16, dtype=torch.float64)
        loss = -drawn.log_weight(torch.stack([log_prob(x) for x in drawn.x])).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        ours, uniform = (
            bits_per_dim(log_prob, ALL, **GRID, dequantise=s, draws=2000, importance=False, seed=9, dtype=torch.float64)
            for s in (scheme, Uniform())
        )
    truth = torch.tensor([-math.log2(bin_probability(k)) for k in range(8)])
    assert bool((ours.value > truth - 4 * ours.stderr).all())
    wide = uniform.value - truth > 0.1
    assert int(wide.sum()) >= 2
    assert bool((ours.value - truth < 0.35 * (uniform.value - truth))[wide].all())


# -------------------------------------------------------------------- errors of log p, and planted mistakes


def test_errors_of_log_p_are_carried():
    drawn = Uniform().sample(ALL, **GRID, seed=0, dtype=torch.float64)
    log_p, stderr = log_prob(drawn.x[0])[None], torch.full((1, 8), 0.3)
    one = bits_from(drawn, log_p, stderr)
    torch.testing.assert_close(one.stderr, torch.full((8,), 0.3 / LOG2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert bool(torch.isnan(bits_from(drawn, log_p).stderr).all())
    sde = catalog.VP()
    truth = GaussianMixture(sde, torch.zeros(1, 2), torch.tensor([0.2]))
    model = sde.reverse(truth).model
    images = torch.tensor([[3, 9], [8, 8]])
    bits = bits_per_dim(
        lambda x: elbo(model, x, draws=8, seed=0),
        images,
        levels=17,
        low=-1,
        high=1,
        draws=4,
        seed=0,
        dtype=torch.float64,
    )
    flat = Uniform().sample(images, levels=17, low=-1, high=1, draws=4, seed=0, dtype=torch.float64)
    expected = bits_from(flat, torch.stack([truth.log_prob(x) for x in flat.x]))
    torch.testing.assert_close(bits.value, expected.value, rtol=0, atol=1e-4)


def _distance(bits):
    truth = torch.tensor([-math.log2(bin_probability(k)) for k in range(8)])
    return float(((bits.value - truth) / bits.stderr.clamp_min(1e-3)).abs().max())


@pytest.mark.parametrize("mistake", ["none", "offset", "no width", "no log_q", "sign", "mean for sum", "untruncated"])
def test_planted_mistakes_are_found(mistake, monkeypatch):
    scheme, grid = TruncatedNormal(0.1), dict(GRID)
    weight = Dequantised.log_weight
    if mistake == "offset":
        monkeypatch.setattr(Levels, "state", lambda self, k: self.low + (self.high - self.low) * k / (self.levels - 1))
    elif mistake == "no width":
        monkeypatch.setattr(Levels, "log_det", lambda self, d: 0.0)
    elif mistake == "no log_q":
        monkeypatch.setattr(Dequantised, "log_weight", lambda self, p: weight(self, p) + self.log_q)
    elif mistake == "sign":
        monkeypatch.setattr(Dequantised, "log_weight", lambda self, p: weight(self, p) + 2 * self.log_q)
    elif mistake == "mean for sum":
        monkeypatch.setattr(Dequantised, "log_weight", lambda self, p: weight(self, p) + math.log(len(p)))
    elif mistake == "untruncated":
        monkeypatch.setattr(dequantisation, "_log_mass", lambda tau: 0.0)
    bits = bits_per_dim(log_prob, ALL, **grid, dequantise=scheme, draws=4096, seed=1, dtype=torch.float64)
    assert (_distance(bits) < 4) == (mistake == "none")


# -------------------------------------------------------------------- what is refused


def test_what_makes_no_sense_is_refused():
    for images, words in (
        (torch.zeros(2, 3), "integer"), (torch.zeros(2, 3, dtype=torch.bool), "integer"),
        (torch.tensor([1, 2]), "integer"), (torch.tensor([[8]]), "outside"), (torch.tensor([[-1]]), "outside"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            Uniform().sample(images, **GRID)
    for levels, low, high in ((1, 0, 1), (True, 0, 1), (8, 1, 1), (8, 2, 1), (8, 0, math.inf), (8, math.nan, 1)):
        with pytest.raises(ValueError, match=r"levels|low"):
            Uniform().sample(ALL, levels=levels, low=low, high=high)
    with pytest.raises(ValueError, match="draws"):
        Uniform().sample(ALL, **GRID, draws=0)
    with pytest.raises(ValueError, match="cannot hold"):
        Uniform().sample(ALL, **GRID, dtype=torch.bfloat16)
    for noise in (0.0, -1.0, math.inf, True, "x"):
        with pytest.raises(ValueError, match="noise"):
            TruncatedNormal(noise)
    with pytest.raises(DataError, match="pair"):
        Variational(torch.nn.Identity()).sample(ALL, **GRID)
    with pytest.raises(DataError, match="finite"):
        Variational(Constant(math.nan, 0.0)).sample(ALL, **GRID)
    with pytest.raises(DataError, match="draws, batch"):
        bits_from(Uniform().sample(ALL, **GRID), torch.zeros(8))
