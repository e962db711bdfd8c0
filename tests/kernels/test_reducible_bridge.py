"""Bridges of reducible SDEs, in the coordinate in which they are linear; and pickled equations."""

import math
import pickle

import numpy as np
import pytest
import sympy as sp
import torch

import sdeflow
from sdeflow import SDE, t, x
from sdeflow.errors import DataError, NotAffineError, ScheduleError

R = sp.Rational
k = sp.Symbol("k")
CASES = {  # an SDE with coefficients free of t, x_0, x_T
    "geometric Brownian motion": (SDE(x / 10, 3 * x / 10), 1.0, 1.3),
    "with a learned volatility": (SDE(x / 10, k * x, params={k: torch.nn.Parameter(torch.tensor(0.3))}), 1.0, 1.3),
    "falling": (SDE((x - 2) / 5, (2 - x) / 2), 1.2, 1.5),
    "hyperbolic sine": (SDE(x / 2, sp.sqrt(1 + x**2)), 0.4, -0.3),
    "logistic": (SDE(x * (1 - x) * (1 - 2 * x) / 2, x * (1 - x)), 0.3, 0.6),
    "square, folded": (SDE(R(1, 4) - x, sp.sqrt(x)), 0.3, 0.6),
    "square, ends near the fold": (SDE(R(1, 4) - x, sp.sqrt(x)), 0.3, 1e-4),
}
DOMAIN = {"falling": (-3.0, 2.0), "hyperbolic sine": (-8.0, 8.0), "logistic": (0.0, 1.0)}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def law_by_bayes(name, time, n=40_001):
    """Points and the density p(x_t | x_0) p(x_T | x_t) / p(x_T | x_0) of the bridge on them, as weights."""
    sde, start, end = CASES[name]
    low, high = DOMAIN.get(name, (0.0, 6.0))
    u = np.linspace(0, 1, n)[1:-1]
    v = u**2 * (3 - 2 * u)
    points = low + (high - low) * v**2 * (3 - 2 * v)  # dense at both ends, where the density may be infinite
    slope = (high - low) * 36 * u * (1 - u) * v * (1 - v)
    points = torch.as_tensor(np.clip(points, low + 1e-14 * (low != 0), high - 1e-12))[:, None]
    with torch.no_grad():
        log_p = sde.kernel.log_prob(points, torch.full_like(points, start), time)
        log_p += sde.kernel.log_prob(torch.full_like(points, end), points, 1.0 - time)
        log_p -= sde.kernel.log_prob(doubles(end), doubles(start), 1.0)
    return points[:, 0].numpy(), np.exp(log_p.numpy()) * slope / (n - 1)


@pytest.mark.parametrize("time", [0.2, 0.8])
@pytest.mark.parametrize("name", CASES)
def test_moments_and_draws_have_the_law_of_bayes(name, time):
    sde, start, end = CASES[name]
    points, weights = law_by_bayes(name, time)
    assert abs(weights.sum() - 1) < 1e-5
    mean = (weights * points).sum()
    std = math.sqrt((weights * (points - mean) ** 2).sum())
    bridge = sde.bridge(end)
    told = [float(m.detach()) for m in bridge.moments(doubles(start), time)]
    np.testing.assert_allclose(told, [mean, std], rtol=2e-4)
    n = 4000
    with torch.no_grad():
        states = bridge.sample(doubles(start).expand(n, 1), time, seed=0)[:, 0].numpy()
        through = bridge.paths(doubles(start).expand(n, 1), [0.1, time, 1.0], seed=1)[:, :, 0].numpy()
    np.testing.assert_allclose(through[2], end, rtol=1e-6, atol=1e-9)
    for drawn in (states, through[1]):
        assert abs(drawn.mean() - mean) < 4 * std / math.sqrt(n)
        level = np.interp(np.sort(drawn), points, np.cumsum(weights))
        assert np.abs(level - np.arange(1, n + 1) / n).max() < 1.95 / math.sqrt(n)  # Kolmogorov, at 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_drift_is_dooobs(name):
    """f + g² ∂/∂x log p(x_T | x_t = x), the kernel of the time that is left by autograd."""
    sde, start, end = CASES[name]
    state = doubles(start, 0.5 * (start + end)).requires_grad_()
    log_p = sde.kernel.log_prob(doubles(end, end), state, 0.6)
    pull = torch.autograd.grad(log_p.sum(), state)[0][:, 0].numpy()
    numbers = sde.values.numbers
    drift = sde.bridge(end).drift.subs(numbers)
    end_symbol = sp.Symbol("x_T", real=True)
    for i, point in enumerate(state.detach()[:, 0].tolist()):
        f, g = (float(e.subs({**numbers, x: point})) for e in (sde.declaration.f, sde.declaration.g))
        ours = float(drift.subs({x: point, t: R(2, 5), end_symbol: end}).evalf(15))
        assert abs(ours - (f + g**2 * pull[i])) < 1e-7 * (1 + abs(ours))


def test_geometric_brownian_motion_is_a_brownian_bridge_in_the_logarithm():
    """Mean, covariance over time and drift of log x_t, in closed form, with coefficients of t."""
    rate, sigma = t / 5, R(3, 10) * sp.sqrt(1 + t)
    bridge = SDE(rate * x, sigma * x, T=2).bridge(doubles(1.3, 0.9))
    clock = [0.09 * (s + s * s / 2) for s in (0.5, 1.2, 2.0)]
    n = 20_000
    paths = bridge.paths(torch.ones(2, 1, dtype=torch.float64), [0.5, 1.2, 2.0], seed=0)
    torch.testing.assert_close(paths[2], doubles(1.3, 0.9))
    one = SDE(rate * x, sigma * x, T=2).bridge(1.3)
    logs = one.paths(torch.ones(n, 1, dtype=torch.float64), [0.5, 1.2], seed=0)[:, :, 0].log().numpy()
    drift = [s * s / 10 - c / 2 for s, c in zip((0.5, 1.2, 2.0), clock, strict=True)]
    for i in range(2):
        mean = drift[i] + clock[i] / clock[2] * (math.log(1.3) - drift[2])
        assert abs(logs[i].mean() - mean) < 4 * math.sqrt(clock[i] / n)
    covariance = [[clock[min(i, j)] * (1 - clock[max(i, j)] / clock[2]) for j in range(2)] for i in range(2)]
    np.testing.assert_allclose(np.cov(logs), covariance, rtol=0.05)


def test_bridges_that_are_refused():
    with pytest.raises(DataError, match="outside the domain"):
        SDE(x / 10, x).bridge(-1.0)
    with pytest.raises(DataError, match="outside the domain"):
        SDE(x / 10, x).bridge(1.0).sample(torch.tensor([[-1.0]]), 0.5)
    with pytest.raises(NotAffineError, match="bridge"):
        SDE(x - x**3, 1).bridge(0.5)
    with pytest.raises(ScheduleError, match="must increase"):
        SDE(x / 10, x).bridge(1.0).paths(torch.ones(1, 1), [0.5, 0.2])


class Decaying(torch.nn.Module):
    """The score of a log-normal, or of a Gamma, law."""

    def __init__(self, gamma):
        super().__init__()
        self.gamma = gamma

    def forward(self, u, time):
        return 15 / u - 16 if self.gamma else -(1 + u.log() / 0.2) / u


@pytest.mark.parametrize("name", ["Gaussian", "pushed forward", "stationary", "network"])
def test_equations_that_have_sampled_are_pickled(name):
    gamma = name == "stationary"
    if name in ("Gaussian", "network"):
        sde = sdeflow.catalog.VP()
    else:
        sde = SDE(2 * (1 - x), sp.sqrt(x) / 2, T=3) if gamma else SDE(x / 10, 3 * x / 10)
    score = Decaying(gamma)
    if name == "Gaussian":
        score = sdeflow.scores.GaussianMixture(
            sde, torch.tensor([[-1.0], [1.0]]), torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.5])
        )
    elif name == "network":
        torch.manual_seed(0)
        score = sdeflow.Score(sdeflow.nets.MLP(1), sde, data_mean=0.0, data_std=1.0)
    for equation in (sde.reverse(score), sde.flow_ode(score)):
        drawn = equation.sample((4, 1), solver="euler", steps=40, seed=0)
        again = pickle.loads(pickle.dumps(equation))
        assert torch.equal(again.sample((4, 1), solver="euler", steps=40, seed=0), drawn)
    log_p = equation.log_prob(drawn, steps=20, solver="rk4")
    torch.testing.assert_close(pickle.loads(pickle.dumps(equation)).log_prob(drawn, steps=20, solver="rk4"), log_p)
