"""Jacobi kernels of any strength of drift: densities, scores, gradients and draws."""

import math

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from scipy import stats
from scipy.special import betaln, xlog1py, xlogy

from sdeflow import SDE, x
from sdeflow.errors import ScheduleError
from sdeflow.kernels.ancestral import draw_count, log_count, mixture
from sdeflow.kernels.jacobi import _of_binomial, _sums, _terms

a, b = sp.symbols("a b")
FAR = [  # u, u_0, tau, A, B
    (0.3, 0.05, 0.0025, 200.0, 200.0),
    (0.45, 0.5, 0.01, 200.0, 200.0),
    (0.06, 0.05, 0.001, 200.0, 200.0),
    (0.8, 0.05, 0.02, 2.0, 3.0),
    (0.01, 0.9, 0.05, 0.4, 0.3),
    (0.3, 0.2, 0.5, 1.0, 1.5),
    (0.9, 0.02, 0.02, 20.0, 100.0),
]


def jacobi(A, B, T=1.0):
    """du = ½ (A (1 - u) - B u) dt + sqrt(u (1 - u)) dw, whose clock is t."""
    return SDE((a * (1 - x) - b * x) / 2, sp.sqrt(x * (1 - x)), T=T, params={"a": A, "b": B})


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("point", FAR)
def test_the_mixture_is_the_series_of_eigenfunctions_in_many_digits(point):
    u, _, tau, A, B = point
    digits = 260 if tau < 0.004 else 120
    with mp.workdps(digits):
        numbers = [mp.mpf(value) for value in point]
        total, derivative, *_ = _sums(*numbers, _terms(tau, A + B, 2.31 * digits), mp)
        truth = mp.log(total) + (A - 1) * mp.log(u) + (B - 1) * mp.log1p(-u) - mp.log(mp.beta(A, B))
        slope = derivative / total + (A - 1) / u - (B - 1) / (1 - u)
    log_p, slopes = mixture(*point)
    assert abs(log_p - truth) < 1e-11 * (1 + abs(truth))
    assert abs(slopes[0] - slope) < 1e-11 * (1 + abs(slope))
    for i in range(5):
        ahead, behind = (mixture(*[v * (1 + s * 1e-6 * (i == j)) for j, v in enumerate(point)])[0] for s in (1, -1))
        rate = (ahead - behind) / (2e-6 * point[i])
        assert abs(slopes[i] - rate) < 1e-5 * (1 + abs(rate))


@pytest.mark.parametrize(("tau", "theta"), [(0.5, 0.4), (2.0, 1.5), (0.1, 3.0), (0.02, 60.0)])
def test_the_number_of_lineages(tau, theta):
    """q_m against its alternating series in many digits (Griffiths 1979), and draws against their law."""
    counts = np.arange(0.0, 150.0)
    ours = np.exp(log_count(counts, np.full(150, tau), np.full(150, theta))[0])
    with mp.workdps(120):
        for m in (0, 1, 3, 12):
            truth = mp.mpf(0)
            for k in range(m, 160):
                size = mp.exp(-k * (k + theta - 1) * mp.mpf(tau) / 2) if k else mp.mpf(1)
                if k:
                    size *= (2 * k + mp.mpf(theta) - 1) * mp.gamma(theta + m + k - 1) / mp.gamma(mp.mpf(theta) + m)
                    size /= mp.factorial(m) * mp.factorial(k - m)
                truth += (-1) ** (k - m) * size
            assert abs(ours[m] / truth - 1) < 1e-9
    if tau == 0.02:  # where draws follow the mixture
        level = (np.arange(400) + 0.5) / 400
        drawn = draw_count(level, np.full(400, tau), np.full(400, theta))
        np.testing.assert_array_equal(drawn, np.searchsorted(np.cumsum(ours), level))
        few = [
            draw_count(some, np.full(40, tau), np.full(40, theta)) for some in np.split(level, 10)
        ]  # without a table
        np.testing.assert_array_equal(drawn, np.concatenate(few))


def test_binomial_numbers_are_those_of_scipy():
    level, count = np.random.default_rng(0).uniform(size=(2, 500))
    count = np.floor(1e4 ** (2 * count) - 1)
    for chance in (0.0, 1e-6, 0.3, 0.97, 1.0):
        drawn = _of_binomial(level, count, np.full(500, chance))
        np.testing.assert_array_equal(drawn, stats.binom.ppf(level, count, chance).clip(0, count))


def test_a_strong_drift():
    """A = B = 200 from near an end: the density has mass one and the kernel's moments, and draws follow it."""
    kernel, start, time = jacobi(200.0, 200.0).kernel, 0.02, 0.004
    mean, std = (float(m) for m in kernel.moments(doubles(start), time))
    nodes, weights = np.polynomial.legendre.leggauss(48)
    points = mean + 8.5 * std * nodes
    p = np.exp(kernel.log_prob(doubles(*points), doubles(start).expand(48, 1), time).numpy()) * weights * 8.5 * std
    assert abs(p.sum() - 1) < 1e-8
    assert abs((p * points).sum() / mean - 1) < 1e-9
    assert abs(math.sqrt((p * (points - mean) ** 2).sum()) / std - 1) < 1e-7
    n = 4000
    drawn = kernel.sample(doubles(start).expand(n, 1), time, seed=0)[:, 0].numpy()
    third = (p * ((points - mean) / std) ** 3).sum()
    assert abs(drawn.mean() - mean) < 4 * std / n**0.5
    assert abs(drawn.std() / std - 1) < 4 * math.sqrt(0.5 / n)
    assert abs((((drawn - mean) / std) ** 3).mean() - third) < 4 * math.sqrt(15 / n)


@pytest.mark.parametrize("numbers", [(200.0, 200.0, 0.02, 0.004), (0.5, 0.7, 0.3, 0.2), (3.0, 2.0, 0.4, 0.05)])
def test_gradients(numbers):
    """log_prob in A, B, x_0 and x_t, where the mixture serves and where the eigenfunctions do."""
    *shape, start, time = numbers
    A, B = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in shape)
    kernel = jacobi(A, B).kernel
    mean, std = (float(m.detach()) for m in kernel.moments(doubles(start), time))
    point = [doubles(start).requires_grad_(), doubles(mean + 0.7 * std).requires_grad_()]
    log_p = kernel.log_prob(point[1], point[0], time)
    ours = torch.autograd.grad(log_p.sum(), [A, B, *point])
    given = [*shape, start, mean + 0.7 * std]
    for i, rate in enumerate(ours):
        moved = []
        for s in (1, -1):
            v = [value * (1 + s * 1e-4 * (i == j)) for j, value in enumerate(given)]
            moved.append(float(jacobi(v[0], v[1]).kernel.log_prob(doubles(v[3]), doubles(v[2]), time)))
        assert abs(float(rate) - (moved[0] - moved[1]) / (2e-4 * given[i])) < 1e-4 * (1 + abs(float(rate)))
    with torch.no_grad():
        score = kernel.score(point[1], point[0], time)
    torch.testing.assert_close(score, ours[3], rtol=1e-7, atol=1e-7)


def test_draws_are_differentiable_in_the_parameters():
    numbers, noise = (0.8, 1.5), doubles(-1.0, 0.3, 1.2)
    A, B = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in numbers)
    start = doubles(0.3, 0.3, 0.3).requires_grad_()
    drawn = jacobi(A, B).kernel.sample(start, 0.3, noise=noise)
    ours = torch.autograd.grad(drawn.sum(), [A, B, start])
    for i, rate in enumerate(ours):
        moved = []
        for s in (1, -1):
            v = [value * (1 + s * 1e-5 * (i == j)) for j, value in enumerate((*numbers, 0.3))]
            states = jacobi(v[0], v[1]).kernel.sample(torch.full((3, 1), v[2], dtype=torch.float64), 0.3, noise=noise)
            moved.append(float(states.sum()))
        truth = (moved[0] - moved[1]) / (2e-5 * (*numbers, 0.3)[i])
        assert abs(float(rate.sum()) - truth) < 1e-5 * (1 + abs(truth))


def test_what_is_not_differentiable_says_so():
    A = torch.nn.Parameter(torch.tensor(200.0, dtype=torch.float64))
    with pytest.raises(ScheduleError, match="differentiate log_prob"):
        jacobi(A, 200.0).kernel.score(doubles(0.6), doubles(0.02), 0.004)


@pytest.mark.parametrize(
    ("A", "B", "tau", "u_0"), [(100.0, 100.0, 2e-5, 0.3), (1.0, 1.5, 2e-6, 0.02), (0.3, 0.4, 2e-6, 0.001)]
)
def test_at_clocks_of_too_many_terms_the_density_is_that_of_the_mixture(A, B, tau, u_0):
    """Against the series with all its terms, and to mass one; the mixture's error is measured as 1e-14 / tau."""
    kernel = jacobi(A, B).kernel
    std = math.sqrt(tau * u_0 * (1 - u_0))
    u = doubles(u_0 + 0.5 * std, u_0 + 3.0 * std)
    start, whole = torch.full_like(u, u_0), (u[:, 0].numpy(), np.array(u_0), np.array(tau), np.array(A), np.array(B))
    total, slope, *_ = _sums(*whole, _terms(tau, A + B, 45.0), np)
    weight = xlogy(A - 1, whole[0]) + xlog1py(B - 1, -whole[0]) - betaln(A, B)
    np.testing.assert_allclose(kernel.log_prob(u, start, tau), weight + np.log(total), atol=3e-14 / tau)
    push = ((A - 1) / u - (B - 1) / (1 - u))[:, 0].numpy() + slope / total
    np.testing.assert_allclose(kernel.score(u, start, tau)[:, 0], push, rtol=1e-6)
    angle = np.linspace(-8, 8, 33) * math.sqrt(tau) + 2 * math.asin(math.sqrt(u_0))  # in which the noise is constant
    angle = angle[angle > 0.05 * math.sqrt(tau)]
    points = torch.as_tensor(np.sin(0.5 * angle) ** 2)[:, None]
    log_p = kernel.log_prob(points, torch.full_like(points, u_0), tau)
    mass = (log_p.exp().numpy() * 0.5 * np.sin(angle)).sum() * 0.5 * math.sqrt(tau)
    assert abs(mass - 1) < 1e-6


def test_a_tail_that_cannot_be_computed_is_an_error():
    kernel = jacobi(0.3, 0.4).kernel
    for way in (kernel.log_prob, kernel.score):
        with pytest.raises(ScheduleError, match=r"1 of 1 states lie too far in the tail.*0\.9 of the way"):
            way(doubles(0.9), doubles(0.1), 1e-5)
