"""Bridges of square-root processes: the law by Bayes, moments, exact draws, Doob's drift."""

import math

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch
from scipy.special import gammaln, iv
from scipy.stats import chi2, kstest

from sdeflow import SDE, t, x
from sdeflow.errors import DataError, NotAffineError, ScheduleError
from sdeflow.kernels.bridge import ReducibleBridge, SquareRootBridge
from sdeflow.kernels.pearson import pearson_kernel
from sdeflow.kernels.square_root import _counts
from sdeflow.numerics.noncentral import bessel_counts
from sdeflow.symbolic.declaration import Declaration

R = sp.Rational
END = sp.Symbol("x_T", real=True)
CASES = {  # an SDE, x_0, x_T, the end of the domain and the side on which it lies
    "CIR": (SDE(R(6, 5) * (R(7, 10) - x), R(4, 5) * sp.sqrt(x)), 0.4, 0.9, 0.0, 1),  # delta = 5.25
    "that hits 0": (SDE(R(1, 10) - x, sp.sqrt(x)), 0.3, 0.05, 0.0, 1),  # delta = 0.4
    "squared Bessel": (SDE(3, 2 * sp.sqrt(x)), 0.5, 4.0, 0.0, 1),
    "falling": (SDE(R(1, 2) - x, R(3, 5) * sp.sqrt(2 - x)), 0.9, 1.5, 2.0, -1),
    "to its end": (SDE(R(1, 10) - x, sp.sqrt(x)), 0.3, 0.0, 0.0, 1),
    "to an end that is not reached": (SDE(3, 2 * sp.sqrt(x)), 0.5, 0.0, 0.0, 1),
    "coefficients of time": (SDE((1 + t) * (R(2, 5) - x), sp.sqrt((1 + t) * x)), 0.3, 0.7, 0.0, 1),
    "little noise": (SDE(1 - x, sp.sqrt(x) / 100), 1.0, 1.003, 0.0, 1),  # N is about 2e4
}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def law(name, time, n=60_001):
    """Points and the weights of the bridge's density on them."""
    sde, start, end, edge, side = CASES[name]
    mean, std = (float(part) for part in sde.bridge(end).moments(doubles(start), time))
    away = side * (mean - edge)
    width = (away + 40.0 * std) ** (1 / 12), max(away - 14.0 * std, 0.0) ** (1 / 12)
    z = np.linspace(width[1], width[0], n)[1:]  # the distance is z^12: it may have an infinite density at 0
    points = torch.as_tensor(edge + side * z**12)[:, None]
    log_p = sde.bridge(end).log_prob(points, doubles(start).expand(n - 1, 1), time)
    return points[:, 0].numpy(), (log_p.exp().numpy() * 12 * z**11) * (z[1] - z[0])


@pytest.mark.parametrize("time", [0.15, 0.8])
@pytest.mark.parametrize("name", CASES)
def test_density_moments_and_draws_agree(name, time):
    sde, start, end, _, side = CASES[name]
    points, weights = law(name, time)
    assert abs(weights.sum() - 1) < 1e-5
    mean = (weights * points).sum()
    std = math.sqrt((weights * (points - mean) ** 2).sum())
    bridge, n = sde.bridge(end), 4000
    np.testing.assert_allclose([float(part) for part in bridge.moments(doubles(start), time)], [mean, std], rtol=1e-5)
    begun = doubles(start).expand(n, 1)
    through = bridge.paths(begun, [0.1, time, 1.0], seed=1)[:, :, 0].numpy()
    np.testing.assert_array_equal(through[2], end)
    order = slice(None, None, side)
    for drawn in (bridge.sample(begun, time, seed=0)[:, 0].numpy(), through[1]):
        assert abs(drawn.mean() - mean) < 4 * std / math.sqrt(n)
        level = np.interp(drawn, points[order], np.cumsum(weights[order]))
        assert kstest(level, "uniform").pvalue > 1e-4  # of 32 levels


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] != case[3]])
def test_density_and_drift_are_those_of_bayes_and_of_doob(name):
    """p(x_t | x_0) p(x_T | x_t) / p(x_T | x_0), and f + g² ∂/∂x log p(x_T | x_t = x), by the kernels."""
    sde, start, end, *_ = CASES[name]
    left = SDE(sde.declaration.f.subs(t, t + R(2, 5)), sde.declaration.g.subs(t, t + R(2, 5)), T=R(3, 5))
    bridge, state = sde.bridge(end), doubles(start, 0.5 * (start + end), end).requires_grad_()
    onward = left.kernel.log_prob(doubles(end, end, end), state, 0.6)
    begun, ended = doubles(start).expand(3, 1), doubles(end).expand(3, 1)
    with torch.no_grad():
        log_p = sde.kernel.log_prob(state, begun, 0.4) + onward - sde.kernel.log_prob(ended, begun, 1.0)
        torch.testing.assert_close(bridge.log_prob(state, begun, 0.4), log_p, rtol=1e-8, atol=1e-7)
    if name == "little noise":
        return  # mpmath does not sum these Bessel functions
    (pull,) = torch.autograd.grad(onward.sum(), state)
    for point, slope in zip(state[:, 0].tolist(), pull[:, 0].tolist(), strict=True):
        f, g = (float(e.subs({x: point, t: R(2, 5)})) for e in (sde.declaration.f, sde.declaration.g))
        ours = bridge.drift.subs({x: point, t: R(2, 5), END: end, sp.Symbol("T", positive=True): 1})
        assert abs(float(ours.evalf(15)) - (f + g**2 * slope)) < 1e-6 * (1 + abs(slope) * g**2)


@pytest.mark.parametrize(("z", "nu"), [(1e-2, -0.8), (0.3, 0.0), (20.0, -0.5), (20.0, 30.0)])
def test_the_counts_have_bessels_distribution(z, nu):
    n = np.arange(60)
    below = np.cumsum(np.exp((2 * n + nu) * math.log(z / 2) - gammaln(n + 1) - gammaln(n + nu + 1)) / iv(nu, z))
    seen = n[(below > 1e-6) & (below < 1 - 1e-6)]
    for shift in (-1e-9, 1e-9):
        level = torch.as_tensor(below[seen] + shift)
        counts = _counts(level, torch.full_like(level, z), torch.full_like(level, nu))
        assert counts.tolist() == (seen + (shift > 0)).tolist()


@pytest.mark.parametrize("nu", [-0.97, -0.5, 0.0, 3.0, 45.0, 2e4, 2e6])
def test_mean_and_variance_of_the_counts(nu):
    """Against mpmath: 2 E[N] + nu = z I_nu' / I_nu, E[N (N + nu)] = z² / 4."""
    z = [1e-3, 0.5, 30.0, 41.0, 3e3]
    with mpmath.workdps(60):

        def mean(u):  # I_{nu+1} / I_nu by its continued fraction, from below
            ratio = mpmath.mpf(0)
            for k in range(int(3 * u) + 200, 0, -1):
                ratio = u / (2 * (nu + k) + u * ratio)
            return u * ratio / 2

        means = [mean(mpmath.mpf(u)) for u in z]
        spreads = [mpmath.mpf(u) ** 2 / 4 - m * (m + nu) for u, m in zip(z, means, strict=True)]
    ours = bessel_counts(torch.tensor(z, dtype=torch.float64).square(), torch.full((len(z),), nu, dtype=torch.float64))
    np.testing.assert_allclose(ours[0], [float(m) for m in means], rtol=1e-13)
    np.testing.assert_allclose(ours[1], [float(m) for m in spreads], rtol=1e-12)


@pytest.mark.parametrize(("z", "nu"), [(1e4, 0.3), (1e8, -0.7), (1e8, 1e5), (4e6, 2e6)])
def test_many_counts_are_drawn_from_a_grid_with_their_moments(z, nu):
    level = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    counts = _counts(level, torch.full_like(level, z), torch.full_like(level, nu))
    mean, var = bessel_counts(torch.full_like(level[:1], z * z), torch.full_like(level[:1], nu))
    assert abs(float(counts.mean() - mean)) < 1e-3 * float(var) ** 0.5  # of the midpoint rule in the level
    assert abs(float(counts.var() / var) - 1) < 2e-3


def test_of_dimension_one_it_is_the_folded_bridge():
    """The same declaration is reducible: its bridge by the other way, with moments by quadrature."""
    sde = SDE(R(1, 4) - x, sp.sqrt(x))
    kernel = pearson_kernel(Declaration(sde.declaration.f, sde.declaration.g), {})
    start = doubles(0.3, 1e-3, 2.0)
    for end in (0.6, 1e-4):
        other = sde.bridge(end)
        assert isinstance(other, ReducibleBridge)
        ours, theirs = SquareRootBridge(kernel, end).moments(start, 0.3), other.moments(start, 0.3)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


def test_from_0_to_0_it_is_a_gamma_law():
    """|z|² of a Brownian bridge of three dimensions: t (1 - t) chi²(3)."""
    zero = torch.zeros(3000, 1, dtype=torch.float64)
    bridge = SDE(3, 2 * sp.sqrt(x)).bridge(0.0)
    drawn = bridge.sample(zero, 0.3, seed=0)[:, 0].numpy()
    assert kstest(chi2.cdf(drawn / 0.21, 3), "uniform").pvalue > 1e-3
    mean, std = bridge.moments(zero[:1], 0.3)
    assert abs(float(mean) - 0.63) < 1e-12 and abs(float(std) - 0.21 * math.sqrt(6)) < 1e-12


def test_moments_and_density_are_differentiable():
    k = sp.Symbol("k")
    rate = torch.nn.Parameter(torch.tensor(1.2, dtype=torch.float64))
    bridge = SDE(k * (R(7, 10) - x), R(4, 5) * sp.sqrt(x), params={k: rate}).bridge(0.9)
    start = doubles(0.4, 0.0)

    def values():
        return torch.cat([*bridge.moments(start, 0.3), bridge.log_prob(start + 0.2, start, 0.3)[:, None]])[:, 0]

    ours = torch.stack([torch.autograd.grad(part, rate, retain_graph=True)[0] for part in values()])
    with torch.no_grad():
        rate += 1e-6
        above = values()
        rate -= 2e-6
        below = values()
    torch.testing.assert_close(ours, (above - below) / 2e-6, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="no gradient"):
        bridge.sample(start, 0.3, seed=0)
    with torch.no_grad():
        assert bridge.sample(start.float(), 0.3, seed=0).dtype == torch.float32
        assert bridge.sample(start[:0], 0.3, seed=0).shape == (0, 1)


def test_refusals():
    cir = CASES["CIR"][0]
    with pytest.raises(DataError, match=r"x_T = -0\.1 lies outside"):
        cir.bridge(-0.1)
    with pytest.raises(DataError, match="x_0 = -1 lies outside"):
        cir.bridge(0.1).sample(doubles(-1.0), 0.5)
    with pytest.raises(ScheduleError, match="none at t = 1"):
        cir.bridge(0.1).log_prob(doubles(0.2), 0.2, 1.0)
    with pytest.raises(NotAffineError, match="square-root SDEs alone"):
        SDE(R(1, 2) - x, sp.sqrt(x * (1 - x))).bridge(0.5)
    assert float(cir.bridge(0.1).log_prob(doubles(-0.2), 0.2, 0.5)) == -math.inf
    assert isinstance(cir.bridge(0.1), SquareRootBridge)
