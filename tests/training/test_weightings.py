"""A weighting is one objective, ∫ w(lambda) E|eps - eps_hat|² dlambda, whatever the law of the times."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import sympy as sp
import torch
from problems import training_times

import sdeflow
from sdeflow import SDE, Score, catalog, fit, t, x
from sdeflow.errors import WeightingError
from sdeflow.numerics.noise import NoiseStream
from sdeflow.training.losses import denoising_score_matching
from sdeflow.training.times import WeightedTimes
from sdeflow.training.weightings import mean_weight, metric, share

R = sp.Rational
STD = 0.7  # of the data, which "edm" knows


def own(time):
    return 0.1 + time**2


WEIGHTINGS = ("likelihood", "score", "edm", "min_snr", "p2", own)
TIMES = ("t", "log_snr", "edm", "importance", lambda time: 0.05 + time)

position, velocity = sdeflow.state("position velocity")

SDES = {
    "VP": catalog.VP(),
    "VE": catalog.VE(),  # with P0
    "EDM": catalog.EDM(),
    "flow matching": catalog.FlowMatching(),
    "with an offset": SDE(-2 * (x - 3), 1, T=2),
    "a jump of g": SDE(-x, sp.Piecewise((1, t < R(1, 3)), (10, True))),
    "a schedule per coordinate": SDE("-k*x", "sqrt(2*k)", params={"k": torch.tensor([0.5, 2.0, 7.0])}),
    "in a basis": catalog.Blurring((2, 2)),
    "coupled": SDE(f=[4 * velocity, -4 * velocity - position], g=[0, sp.sqrt(2)], P0=[0, R(1, 100)]),
}
EVENTS = {"a schedule per coordinate": (3,), "in a basis": (2, 2), "coupled": (2, 1)}


def by_the_table(sde, weighting, times):
    """The integrand over t by the definitions, from alpha and sigma; log-SNRs are differentiated numerically."""
    kernel = sde.kernel

    def half_log_snr(at):
        return kernel.half_log_snr(torch.as_tensor(at)).numpy()

    step = 1e-6 * np.minimum(times, sde.T - times)
    rate = np.abs(half_log_snr(times + step) - half_log_snr(times - step)) / (2 * step)
    level = half_log_snr(times)
    if weighting == "edm":
        log_zeta = -level
        normal = np.exp(-((log_zeta + 1.2) ** 2) / (2 * 1.2**2)) / (1.2 * math.sqrt(2 * math.pi))
        return normal * (np.exp(2 * log_zeta) + STD**2) / STD**2 * rate
    if weighting in ("score", "min_snr", "p2"):
        snr = np.exp(2 * level)
        return {"score": 1 + 0 * snr, "min_snr": np.minimum(snr, 5) / snr, "p2": 1 / (1 + snr)}[weighting]
    sigma = kernel.coefficients(torch.as_tensor(times))[1].numpy()
    if sde.declaration.coupled:
        inverse, Q = np.linalg.inv(sigma), np.diag([0.0, 2.0])
        M = 0.5 * inverse @ Q @ inverse.swapaxes(1, 2)
        if weighting is own:
            M = own(times)[:, None, None] * inverse @ inverse.swapaxes(1, 2)
        return np.trace(M, axis1=1, axis2=2) / 2
    flat = sigma.reshape(len(times), -1)
    if weighting is own:
        return own(times) * (1 / flat**2).mean(1)
    before, after = (kernel.coefficients(torch.as_tensor(times + sign * step)) for sign in (-1, 1))
    change = ((before[0] / before[1]).log() - (after[0] / after[1]).log()).numpy().reshape(len(times), -1)
    return change.mean(1) / (2 * step)


def zero_score(sde, **options):
    return Score(lambda u, _: torch.zeros_like(u), sde, predicts="noise", data_std=STD, data_mean=0.0, **options)


def panels(edges, order=4):
    """Nodes and weights of Gauss's rule on every panel."""
    nodes, shares = np.polynomial.legendre.leggauss(order)
    middles, halves = 0.5 * (edges[1:] + edges[:-1]), 0.5 * np.diff(edges)
    return (middles[:, None] + halves[:, None] * nodes).ravel(), (halves[:, None] * shares).ravel()


def contributions(sde, name, weighting, times):
    """Times of a law, and what an error of unit variance counts there in the mean over draws, L(t) c / p(t) du."""
    kernel, event = sde.kernel, EVENTS.get(name, (1,))
    example = torch.zeros(1, *event, dtype=torch.float64)
    law = WeightedTimes(
        times, kernel, lambda at: mean_weight(kernel, weighting, example, at, STD), share(weighting), gaussian=True
    )
    tail = np.geomspace(1e-11, 0.5, 200)
    u, du = panels(np.unique(np.concatenate([[0], tail, 1 - tail, np.linspace(0, 1, 1501), [1]])))
    at, weight = law.weighted(torch.as_tensor(u))
    score, loss = zero_score(sde), 0.0
    axes = torch.eye(2, dtype=torch.float64)[:, :, None] if sde.declaration.coupled else torch.ones(1, *event).double()
    for eps in axes:  # errors of unit variance: the components of a coupled state one after the other
        eps = kernel.from_basis(eps.expand(len(at), *event))
        loss = loss + denoising_score_matching(score, torch.zeros_like(eps), at, eps, weighting)
    return at.numpy(), (weight * loss).numpy() * du, law


class Still(torch.nn.Module):
    """Returns 0, and has a parameter that cannot change it."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))

    def forward(self, u, _):
        return 0.0 * self.p * u


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_pair_is_the_weightings_own_quadrature(name, weighting):
    """The whole integral, and its share in each quarter of the log-SNR, for every law of the times."""
    sde = SDES[name]
    ends = sde.kernel.half_log_snr(torch.tensor([sde.cutoff, sde.T], dtype=torch.float64))
    quarters = sde.kernel.time_of(torch.linspace(*ends.tolist(), 5, dtype=torch.float64)).numpy()
    expected = []
    for low, high in pairwise(quarters):
        inside = [1 / 3] if low < 1 / 3 < high and name == "a jump of g" else []
        points, shares = panels(np.union1d(low + (high - low) * np.geomspace(1e-6, 1, 1000), [low, *inside, high]))
        expected.append(float(by_the_table(sde, weighting, points) @ shares))
    total = sum(expected)
    for times in TIMES:
        at, counted, law = contributions(sde, name, weighting, times)
        assert law.total == pytest.approx(total, rel=0.01)
        for low, high, right in zip(quarters[:-1], [*quarters[1:-1], np.inf], expected, strict=True):
            part = float(counted[(at >= low) & (at < high)].sum())
            panel = 4 * float(counted.max())  # the border may lie within it
            assert abs(part - right) < 2e-3 * total + panel, (times, low, high)


def test_errors_of_a_coupled_noise_count_in_the_likelihood_as_those_of_the_score():
    """epsᵀ M eps is ‖gᵀ e‖² of the error e = sigma⁻ᵀ eps of the score, here twice the velocity's squared."""
    kernel, state = SDES["coupled"].kernel, torch.zeros(5, 2, 1, dtype=torch.float64)
    eps = torch.randn(5, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.linspace(0.1, 1.0, 5, dtype=torch.float64)
    found = (eps * metric(kernel, "likelihood", state, times)(eps)).flatten(1).sum(1)
    error = kernel.path(state, times).sigma.T.inverse(eps)
    torch.testing.assert_close(found, 2 * error[:, 1, 0].square())


def test_the_laws_of_times_are_densities():
    """Each integrates to one, and its draws follow it."""
    kernel = catalog.SubVP().kernel
    points, shares = panels(
        np.union1d(kernel.cutoff + (1 - kernel.cutoff) * np.geomspace(1e-7, 1, 3000), [kernel.cutoff])
    )
    for times in TIMES:
        law = WeightedTimes(times, kernel, lambda at: torch.ones_like(at), 1.0, gaussian=True)
        mass = law._law.density(torch.as_tensor(points)).numpy() * shares
        assert abs(mass.sum() - 1) < 2e-3
        drawn, weight = law.draw(20_000, NoiseStream(0, "test"))
        assert kernel.cutoff <= float(drawn.min()) and float(drawn.max()) <= kernel.T
        torch.testing.assert_close(1 / law._law.density(drawn), weight, rtol=1e-6, atol=0)
        for border in (0.02, 0.1, 0.4):
            below = float((drawn < border).double().mean())
            assert abs(below - mass[points < border].sum()) < 3e-3


def test_the_levels_of_edm_are_its_normal_law():
    """log(sigma / alpha) ~ N(-1.2, 1.2²) within the horizon, but for a thousandth of a uniform law."""
    kernel = catalog.EDM().kernel
    law = WeightedTimes("edm", kernel, lambda at: torch.ones_like(at), 1.0, gaussian=True)
    levels = -kernel.half_log_snr(law.draw(20_000, NoiseStream(0, "test"))[0])
    low, high = (-kernel.half_log_snr(torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64))).tolist()
    normal = NormalDist(-1.2, 1.2)
    whole = normal.cdf(high) - normal.cdf(low)
    for level in (-4.0, -2.0, -1.2, 0.0, 1.5):
        below = float((levels < level).double().mean())
        assert abs(below - (normal.cdf(level) - normal.cdf(low)) / whole) < 1.5e-3


def test_a_training_step_estimates_the_objective():
    """The losses of a network that returns 0 and cannot move have the objective as their mean: 5 standard errors."""
    sde = catalog.VP()
    for weighting, times in (("likelihood", "t"), ("likelihood", None), ("score", "log_snr"), (own, None)):
        score = Score(Still(), sde, predicts="noise", data_mean=0.0, data_std=STD)
        losses = np.array(fit(score, torch.randn(256, 2), 60, 256, weighting, times, progress=False).losses)
        edges = np.geomspace(sde.cutoff, 1, 4000)
        points, shares = panels(edges)
        expected = by_the_table(sde, weighting, points) @ shares
        error = losses.std(ddof=1) / len(losses) ** 0.5
        assert error < 0.1 * expected
        assert abs(losses.mean() - expected) < 5 * error


def test_the_default_is_the_likelihood_where_it_was_and_names_what_it_takes():
    sde = catalog.VP()
    data = torch.randn(64, 2)

    def trained(**options):
        torch.manual_seed(0)
        score = Score(sdeflow.nets.MLP(2, width=16, depth=1), sde)
        return fit(score, data, 5, 32, progress=False, **options).losses

    assert trained() == trained(weighting="likelihood", times="log_snr")
    assert trained(weighting="score") == trained(weighting="score", times="t")
    assert trained(weighting="edm") == trained(weighting="edm", times="edm")
    assert trained(weighting="p2") == trained(weighting="p2", times="importance")
    assert len({tuple(trained(weighting=w)) for w in ("likelihood", "score", "edm", "min_snr", "p2", own)}) == 6
    assert len({tuple(trained(times=law)) for law in ("log_snr", "t", "edm", own)}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "uniform"}, '"likelihood", "score", "edm"'),
        ({"times": "uniform"}, '"t", "log_snr", "edm"'),
        ({"weighting": lambda at: -at}, "not negative"),
        ({"weighting": lambda at: 1 / (at - at)}, "finite"),
        ({"weighting": lambda at: torch.ones(3)}, "shape"),
        ({"weighting": lambda at: 0.0}, "positive"),
        ({"times": lambda at: at - 0.5}, "density"),
        ({"times": lambda at: (at > 0.5).double()}, "never draws"),
    ],
)
def test_weightings_and_times_that_make_no_sense(options, message):
    score = Score(sdeflow.nets.MLP(2, width=16, depth=1), catalog.VP())
    with pytest.raises(ValueError, match=message):
        fit(score, torch.randn(64, 2), 3, progress=False, **options)


def test_a_log_snr_that_stands_still_is_never_left_out_silently():
    flat = SDE(-x, sp.Piecewise((1, t < R(1, 3)), (0, t < R(2, 3)), (1, True)))
    data = torch.randn(64, 1)

    def losses(**options):
        torch.manual_seed(0)
        return fit(Score(sdeflow.nets.MLP(1, width=16, depth=1), flat), data, 3, progress=False, **options).losses

    assert all(map(math.isfinite, losses()))  # the likelihood does not count times without noise
    assert all(map(math.isfinite, losses(weighting="score")))
    with pytest.raises(WeightingError, match="stands still"):
        losses(weighting="score", times="log_snr")


@pytest.mark.parametrize("sde", [SDE(f=x / 10, g=3 * x / 10), SDE(f=x - x**3, g=1, T=2)], ids=["reducible", "general"])
def test_without_a_gaussian_kernel_times_change_the_variance_alone(sde):
    """Means of fit's losses over two laws agree within 5 standard errors, and weightings in log-SNR are refused."""

    data = 1 + 0.1 * torch.rand(256, 1, dtype=torch.float64)
    for weighting in ("score", lambda at: at):
        found = []
        for times in ("t", lambda at: 1 + at):
            score = Score(Still().double(), sde, predicts="score", data_mean=0.0, data_std=1.0)
            losses = np.array(
                fit(score, data, 32, 128, weighting, times, progress=False,
                    **({} if sde.kind == "reducible" else {"simulation_steps": 20, "gap": 2})).losses
            )  # fmt: skip
            found.append((losses.mean(), losses.std(ddof=1) / len(losses) ** 0.5))
        (first, a), (second, b) = found
        assert a < 0.1 * first
        assert abs(first - second) < 5 * math.hypot(a, b)
    for refused in ({"weighting": "edm"}, {"times": "log_snr"}):
        score = Score(Still().double(), sde, predicts="score", data_mean=0.0, data_std=1.0)
        with pytest.raises(ValueError, match="Gaussian kernel"):
            fit(score, data, 2, progress=False, **refused)


@pytest.mark.parametrize("n, least, seed", [(1000, 998, 0), *((10, 10, seed) for seed in range(6))])
@pytest.mark.parametrize("times", ["log_snr", "t"])
def test_times_are_stratified_and_stay_inside(times, n, least, seed):
    kernel = catalog.SubVP().kernel
    drawn = training_times(kernel, n, times, seed=seed)
    assert kernel.cutoff <= drawn.min()
    assert drawn.max() <= kernel.T
    values = kernel.half_log_snr(drawn) if times == "log_snr" else drawn
    ends = torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64)
    first, last = kernel.half_log_snr(ends) if times == "log_snr" else ends
    cells = ((values - first) / (last - first) * n).floor().clamp(0, n - 1)
    assert cells.unique().numel() >= least  # one in each cell, but for rounding at the walls of a thousand
