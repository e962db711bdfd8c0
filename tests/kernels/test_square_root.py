"""The square-root kernel: right at small noise, differentiable in everything, and near its end."""

import math
import os

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from scipy.stats import kstest

import sdeflow
from sdeflow import SDE, t, x
from sdeflow.errors import ScheduleError, WeightingError
from sdeflow.kernels.pearson import pearson_kernel
from sdeflow.numerics.noise import NoiseStream
from sdeflow.numerics.noncentral import log_density, slope
from sdeflow.symbolic import pearson as symbolic_pearson
from sdeflow.symbolic.declaration import Declaration
from sdeflow.training.losses import KernelPairs

kappa, theta, sigma = sp.symbols("kappa theta sigma")
HALF = sp.Rational(1, 2)


def cir(**values):
    return SDE(kappa * (theta - x), sigma * sp.sqrt(x), T=2.0, cutoff=1e-3, params=values)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- the noncentral chi² density


def bessel_density(c, noncentrality, nu):
    """log of ½ (c / l)^(nu / 2) e^{-(c + l) / 2} I_nu(sqrt(c l)), as it stands, in mpmath's digits."""
    bessel = mp.besseli(nu, mp.sqrt(c * noncentrality))
    return nu / 2 * mp.log(c / noncentrality) - (c + noncentrality) / 2 + mp.log(bessel / 2)


def uniform_density(c, noncentrality, nu):
    """The same where z is so large that three terms of Debye's expansion are exact to 1e-20, in mpmath's digits."""
    r = mp.sqrt(c * noncentrality)
    z = mp.hypot(nu, r)
    p = nu / z
    terms = 1 + (3 * p - 5 * p**3) / (24 * nu) + (81 * p**2 - 462 * p**4 + 385 * p**6) / (1152 * nu**2)
    log_i = z + nu * mp.log(r / (nu + z)) - mp.log(2 * mp.pi * z) / 2 + mp.log(terms)
    return nu / 2 * mp.log(c / noncentrality) - (c + noncentrality) / 2 + log_i - mp.log(2)


def derivative(function, point, index):
    step = mp.mpf(10) ** -20 * (point[index] if point[index] != 0 else 1)
    ahead, behind = ([*point[:index], point[index] + s * step, *point[index + 1 :]] for s in (1, -1))
    return (function(*ahead) - function(*behind)) / (2 * step)


@pytest.mark.parametrize("nu", [-0.97, -0.5, 0.0, 0.3, 5.0, 39.0, 45.0, 1000.0])
def test_the_density_and_all_its_derivatives(nu):
    generator = np.random.default_rng(0)
    with mp.workdps(70):
        for noncentrality in (1e-3, 0.5, 30.0, 2e3):
            mean, width = noncentrality + 2 * nu + 2, math.sqrt(4 * (noncentrality + nu + 1))
            for c in (abs(mean + width * generator.normal()), 1e-6 * mean, 1.5 * mean):
                point = [mp.mpf(float(v)) for v in (c, noncentrality, nu)]
                arguments = [tensor(float(v)).requires_grad_() for v in point]
                value = log_density(*arguments)
                truth = bessel_density(*point)
                assert abs(value.item() - truth) < 1e-12 * (1 + abs(truth))
                rates = [derivative(bessel_density, point, i) for i in range(3)]
                ours = [*torch.autograd.grad(value, arguments), slope(*arguments)]
                for rate, found in zip([*rates, rates[0]], ours, strict=True):
                    assert abs(found.item() - rate) < 1e-10 * (abs(rate) + 1 / width)


@pytest.mark.parametrize("x_over_std", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("nu", [0.3, 4e5, 2e8])
def test_small_noise_costs_no_digits(nu, x_over_std):
    """The score to 1e-6 of its size (here 1e-8), and log p, for a state of up to a million standard deviations."""
    with mp.workdps(70):
        noncentrality = mp.mpf(4 * x_over_std**2)
        mean, width = noncentrality + 2 * nu + 2, 2 * mp.sqrt(noncentrality + nu + 1)
        density = uniform_density if nu > 1 else bessel_density
        for deviation in (-2.0, -1.0, 0.5, 2.0):
            c = mp.mpf(float(mean + deviation * width))
            point = [c, noncentrality, mp.mpf(nu)]
            arguments = [tensor(float(v)).requires_grad_() for v in point]
            value, truth = log_density(*arguments), density(*point)
            assert abs(value.item() - truth) < 1e-8
            rate = derivative(density, point, 0)
            assert abs(slope(*arguments).item() / rate - 1) < 1e-8
            assert abs(torch.autograd.grad(value, arguments)[0].item() / rate - 1) < 1e-8


def test_the_score_where_noise_is_small_against_x():
    sde = SDE(f=10**8 - x, g=sp.sqrt(x), T=2, cutoff=1e-3)
    start = torch.full((5, 1), 1e8, dtype=torch.float64)
    mean, std = sde.kernel.moments(start, 0.01)
    deviations = tensor(-2, -1, 0.5, 1, 2)[:, None]
    scores = sde.kernel.score(mean + std * deviations, start, 0.01) * std
    truth = tensor(2.00002246, 1.0, -0.50000562, -1.0, -1.99997754)[:, None]
    torch.testing.assert_close(scores, truth, rtol=1e-7, atol=0)
    states = sde.kernel.sample(start, 0.01, noise=deviations)
    torch.testing.assert_close((states - mean) / std, deviations, rtol=1e-5, atol=1e-5)
    drawn = (sde.kernel.sample(start[:1].expand(4000, 1), 0.01, seed=1) - mean[0]) / std[0]
    assert kstest(drawn[:, 0].numpy(), "norm").pvalue > 1e-3


def test_rates_of_small_volatility():
    """sigma = 1e-5: the kernel is a Gaussian to some 1e-5, needs no cutoff=, and its score is exact."""
    kernel = SDE(kappa * (theta - x), sigma * sp.sqrt(x), params={"kappa": 0.5, "theta": 0.03, "sigma": 1e-5}).kernel
    start = torch.full((4, 1), 0.05, dtype=torch.float64)
    mean, std = kernel.moments(start, 0.25)
    deviations = tensor(-2.0, -0.5, 1.0, 3.0)[:, None]
    states = mean + std * deviations
    torch.testing.assert_close(kernel.score(states, start, 0.25) * std, -deviations, rtol=1e-4, atol=1e-4)
    normal = -0.5 * deviations[:, 0] ** 2 - std[:, 0].log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(kernel.log_prob(states, start, 0.25), normal, rtol=0, atol=1e-3)
    assert torch.isfinite(kernel.sample(start.float(), 0.25, seed=0)).all()


# ---------------------------------------------------------------- parameters


PARAMETERS = {
    "CIR": {"kappa": 1.2, "theta": 0.7, "sigma": 0.8},
    "CIR that hits 0": {"kappa": 1.2, "theta": 0.1, "sigma": 0.9},
    "CIR of little noise": {"kappa": 2.0, "theta": 0.7, "sigma": 0.01},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_gradients_of_densities_scores_moments_and_draws(name):
    numbers = PARAMETERS[name]
    learned = {symbol: torch.nn.Parameter(tensor(value).squeeze()) for symbol, value in numbers.items()}
    kernel = cir(**learned).kernel
    noise = tensor(-1.0, 0.0, 0.7, 1.5)[:, None]

    def results(kernel, start, states):
        moments = kernel.moments(start, 0.4)
        draws = kernel.sample(start, 0.4, noise=noise)
        return [kernel.log_prob(states, start, 0.4), kernel.score(states, start, 0.4), *moments, draws]

    start = torch.full((4, 1), 0.3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        states = kernel.sample(start, 0.4, noise=noise)
    states.requires_grad_()
    ours = results(kernel, start, states)
    for name, value in numbers.items():
        h = 1e-5 * value
        ahead, behind = (results(cir(**{**numbers, name: value + s * h}).kernel, start, states) for s in (1, -1))
        for found, after, before in zip(ours, ahead, behind, strict=True):
            rate = torch.autograd.grad(found.sum(), learned[name], retain_graph=True)[0]
            truth = float((after - before).sum().detach()) / (2 * h)
            assert abs(float(rate) - truth) < 1e-5 * (abs(truth) + float(found.detach().abs().sum()))
    for index, point in ((0, start), (1, states)):
        h = 1e-6
        moved = [[p + s * h * (i == index) for i, p in enumerate((start, states))] for s in (1, -1)]
        ahead, behind = (results(kernel, *pair) for pair in moved)
        for found, after, before in zip(ours, ahead, behind, strict=True):
            if found.grad_fn is None or (index == 1 and found is not ours[0] and found is not ours[1]):
                continue
            rate = torch.autograd.grad(found.sum(), point, retain_graph=True)[0].sum()
            truth = float((after - before).sum().detach()) / (2 * h)
            assert abs(float(rate) - truth) < 2e-5 * (abs(truth) + float(found.detach().abs().sum()))


def test_draws_far_from_the_end_are_a_shifted_square_and_a_chi_square_of_one_dimension_less():
    """c = (Z + √l)² + chi²(delta - 1): beside the square, whose width is 4,000, the second part is hard to see."""
    a, level, width, time, n = 1.2, 0.4, 0.8, 0.5, 4000
    scale, delta = width**2 * (1 - math.exp(-a * time)) / (4 * a), 4 * a * level / width**2
    start = torch.full((n, 1), 4e5, dtype=torch.float64)
    c = cir(kappa=a, theta=level, sigma=width).kernel.sample(start, time, seed=0) / scale
    z = torch.special.ndtri(NoiseStream(0, "kernel").uniform((n, 1), torch.float64))
    rest = c - (z + (start * math.exp(-a * time) / scale).sqrt()) ** 2
    assert kstest(rest.flatten().numpy(), "chi2", args=(delta - 1,)).pvalue > 1e-3


def test_tensors_hold_one_process_per_coordinate():
    rates, levels = tensor(0.5, 2.0, 1.0), tensor(0.7, 0.2, 0.1)
    kernel = cir(kappa=rates, theta=levels, sigma=0.8).kernel
    start, states = torch.rand(2, 5, 3, dtype=torch.float64).unbind(0)
    log_p, score, drawn = (
        kernel.log_prob(states, start, 0.3), kernel.score(states, start, 0.3), kernel.sample(start, 0.3, seed=0)
    )  # fmt: skip
    alone = [cir(kappa=float(a), theta=float(b), sigma=0.8).kernel for a, b in zip(rates, levels, strict=True)]
    parts = [(states[:, i : i + 1], start[:, i : i + 1], 0.3) for i in range(3)]
    torch.testing.assert_close(log_p, sum(one.log_prob(*part) for one, part in zip(alone, parts, strict=True)))
    torch.testing.assert_close(score, torch.cat([k.score(*part) for k, part in zip(alone, parts, strict=True)], 1))
    assert drawn.shape == start.shape and bool((drawn > 0).all())


def test_maximum_likelihood_recovers_the_rate():
    """docs/kernels.rst does the same: 500 months of a CIR rate."""
    truth = {"kappa": 2.0, "theta": 0.05, "sigma": 0.2}
    simulated = cir(**truth).kernel
    rates = [torch.full((1, 1), 0.05, dtype=torch.float64)]
    for month in range(500):
        rates.append(simulated.sample(rates[-1], 1 / 12, seed=month))
    rates = torch.cat(rates)
    a, b, c = sp.symbols("a b c")
    logs = [torch.nn.Parameter(tensor(value).log().squeeze()) for value in (1.0, 0.1, 0.4)]
    model = SDE(sp.exp(a) * (sp.exp(b) - x), sp.exp(c) * sp.sqrt(x), T=2.0, cutoff=1e-3,
                params=dict(zip((a, b, c), logs, strict=True)))  # fmt: skip
    optimiser = torch.optim.LBFGS(logs, max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = -model.kernel.log_prob(rates[1:], rates[:-1], 1 / 12).mean()
        value.backward()
        return value

    optimiser.step(loss)
    total = model.kernel.log_prob(rates[1:], rates[:-1], 1 / 12).sum()
    slopes = torch.autograd.grad(total, logs, create_graph=True)
    information = -torch.stack([torch.stack(torch.autograd.grad(slope, logs, retain_graph=True)) for slope in slopes])
    errors = torch.linalg.inv(information).diagonal().sqrt()
    found = torch.stack(logs).detach()
    assert float(torch.stack(slopes).detach().abs().max()) < 1.0
    assert bool(((found - tensor(*truth.values()).log()).abs() < 3 * errors).all())
    assert bool((errors < 0.2).all())


def test_with_params_derives_nothing_anew(monkeypatch):
    sde = cir(kappa=1.2, theta=0.7, sigma=0.8)
    start, states = torch.rand(2, 4, 1, dtype=torch.float64).unbind(0)
    _, expected = sde.kernel, cir(kappa=2.0, theta=0.3, sigma=0.8).kernel.log_prob(states, start, 0.5)
    monkeypatch.setattr(symbolic_pearson, "_classify", lambda *_: pytest.fail("classified anew"))
    other = sde.with_params(kappa=2.0, theta=0.3)
    assert other.kind == "pearson"
    torch.testing.assert_close(other.kernel.log_prob(states, start, 0.5), expected, rtol=1e-12, atol=1e-12)


def test_with_params_notices_another_process():
    sde = cir(kappa=1.2, theta=0.7, sigma=0.8)
    assert sde.kind == "pearson" and sde.with_params(theta=-0.7).kind == "general"


def test_a_parameter_that_leaves_the_family_is_told():
    level = torch.nn.Parameter(tensor(0.7).squeeze())
    kernel = cir(kappa=1.2, theta=level, sigma=0.8).kernel
    with torch.no_grad():
        level.fill_(-0.1)
    with pytest.raises(ScheduleError, match="must be positive and finite"):
        kernel.log_prob(torch.ones(1, 1), torch.ones(1, 1), 0.5)


def test_a_dimension_that_is_constant_at_some_values_takes_numbers():
    f = kappa * (theta * (1 + (sigma - sp.Rational(4, 5)) * t) - x)
    declaration = Declaration(f, sigma * sp.sqrt(x), parameters=(kappa, theta, sigma))
    assert pearson_kernel(declaration, {kappa: 1.2, theta: 0.7, sigma: 0.8}) is not None
    assert pearson_kernel(declaration, {kappa: 1.2, theta: 0.7, sigma: tensor(0.8)}) is None


# ---------------------------------------------------------------- ends that are attained


ATTAINED = {
    "square root, delta = 1": SDE(HALF / 2 - x, sp.sqrt(x), cutoff=0.15),
    "square root, delta = 0.17": SDE(HALF / 12 - x, sp.sqrt(x), cutoff=0.15),
    "square root that falls": SDE(-sp.Rational(1, 6) + 2 - x, sp.sqrt(2 - x), cutoff=0.15),
    "Jacobi, A = B = 0.5": SDE((HALF - x) / 2, sp.sqrt(x * (1 - x)), cutoff=0.15),
    "Jacobi, A = B = 0.083": SDE(-x * sp.Rational(83, 1000), sp.sqrt(1 - x**2), cutoff=0.15),
    "cosh": SDE(x / 2, sp.sqrt(x**2 - 1), cutoff=0.15),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ATTAINED)
def test_draws_never_lie_on_an_end(name, dtype):
    sde = ATTAINED[name]
    start = torch.full((4000, 1), 1.3 if name == "cosh" else 0.6, dtype=dtype)
    states = sde.kernel.sample(start, 0.9, seed=0)
    assert torch.isfinite(sde.kernel.log_prob(states, start, 0.9)).all()
    assert torch.isfinite(sde.kernel.score(states, start, 0.9)).all()


@pytest.mark.parametrize("name", ATTAINED)
def test_the_loss_is_bounded_where_an_end_is_attained(name):
    sde = ATTAINED[name]
    score = sdeflow.Score(lambda u, _: u, sde, predicts="score", time="t")
    data = torch.full((4000, 1), 1.3 if name == "cosh" else 0.6)
    time = torch.linspace(0.15, 1.0, 4000, dtype=torch.float64)
    pairs = KernelPairs(score, "score")(data, time, NoiseStream(0, "test"))
    weighted = pairs.root.T(pairs.target)
    assert torch.isfinite(weighted).all()
    assert float(weighted.abs().max()) < 10 and float(weighted.square().mean()) < 3
    for weighting in ("likelihood", lambda t: t):
        with pytest.raises(WeightingError, match=r'infinite.*weighting="score"'):
            KernelPairs(score, weighting)


class Near(torch.nn.Module):
    """a + b / u + c / (1 - u), with a, b and c learned functions of the state and of t; c = 0 on the half line."""

    def __init__(self, both):
        super().__init__()
        self.both = both
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 32), torch.nn.SiLU(), torch.nn.Linear(32, 3)
        )

    def forward(self, u, time):
        side = (1 - u).clamp_min(1e-7) if self.both else 1 + u
        features = torch.cat([u.clamp_min(1e-30).sqrt(), side.sqrt(), time[:, None]], 1)
        a, b, c = self.net(features).split(1, 1)
        return a + b / u.clamp_min(1e-37) + c / side


LEARNED = [("square root, delta = 1", 150, 0.25)]
if os.environ.get("SDEFLOW_LONG"):  # some ten seconds more
    LEARNED.append(("Jacobi, A = B = 0.5", 100, 0.45))


@pytest.mark.parametrize(("name", "steps", "bound"), LEARNED)
def test_training_learns_the_score_up_to_an_attained_end(name, steps, bound):
    sde = ATTAINED[name]
    torch.manual_seed(0)
    score = sdeflow.Score(Near(both=name[0] == "J"), sde, predicts="score", time="t")
    data = torch.cat([torch.full((512, 1), 0.35), torch.full((512, 1), 0.55)])
    run = sdeflow.fit(score, data, steps=steps, batch_size=150, lr=1e-2, progress=False)
    assert all(map(math.isfinite, run.losses)) and not run.skipped
    starts = torch.cat([torch.full((500, 1), 0.35), torch.full((500, 1), 0.55)]).double()
    for time in (0.4, 0.9):
        states = sde.kernel.sample(starts, time, seed=3)
        each = [torch.full_like(states, value) for value in (0.35, 0.55)]
        log_p = torch.stack([sde.kernel.log_prob(states, one, time) for one in each])
        scores = torch.stack([sde.kernel.score(states, one, time)[:, 0] for one in each])
        truth = (torch.softmax(log_p, 0) * scores).sum(0)
        times = torch.full((1000,), time, dtype=torch.float64)
        root = KernelPairs(score, "score")._root(states, times)[:, 0]
        with torch.no_grad():
            learned = score(states.float(), times)[:, 0].double()
        error = ((root * (learned - truth)).square().mean() / (root * truth).square().mean()).sqrt()
        assert error < bound  # of the size of the score
