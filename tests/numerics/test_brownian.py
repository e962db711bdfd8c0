"""A Brownian path that refines: its law, its consistency, and strong orders measured along it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import sympy as sp
import torch

import sdeflow
from sdeflow import SDE, BrownianPath, catalog, solvers, t, x
from sdeflow.solvers import Exponential, Torchsde

double = torch.float64


def covariance_agrees(numbers, expected):
    """Columns (n, k) against a covariance, within 4.5 standard errors of each entry."""
    n = len(numbers)
    products = numbers[:, :, None] * numbers[:, None]
    error = products.std(0) / math.sqrt(n)
    return bool(((products.mean(0) - expected).abs() < 4.5 * error + 1e-12).all())


def test_increments_and_areas_have_their_law():
    """Over steps of very different lengths, joined or apart: independent, N(0, 1), areas N(0, 1/12)."""
    rows = BrownianPath(seed=1).rows()
    times = (0.0, 1e-9, 3e-7, 1.1e-3, 0.3, 0.30001, 0.7, 1.9, 77.7)
    found = [part[:, 0] for a, b in pairwise(times) for part in rows.step(a, b, (6000, 1))]
    assert covariance_agrees(torch.stack(found, dim=1), torch.diag(torch.tensor([1.0, 1 / 12] * 8, dtype=double)))


@pytest.mark.parametrize("order", [1, -1])
def test_two_steps_are_the_whole_one_whatever_was_asked_before(order):
    a, b, c = (0.1234567, 0.2, 0.87654321)[::order]
    fresh, used = BrownianPath(seed=2).rows(), BrownianPath(seed=2).rows()
    for time in np.random.default_rng(0).uniform(0, 3, 20):
        used.value(float(time), (5, 2))
    (W, H), (W_1, H_1), (W_2, H_2) = (
        tuple(math.sqrt(abs(v - u)) * part for part in rows.step(u, v, (5, 2)))
        for rows, u, v in ((fresh, a, c), (used, a, b), (used, b, c))
    )
    torch.testing.assert_close(W, W_1 + W_2, rtol=0, atol=1e-12)
    h, l, r = abs(c - a), abs(b - a), abs(c - b)
    torch.testing.assert_close(h * (W / 2 + H), l * (W_1 / 2 + H_1) + r * (W_1 + W_2 / 2 + H_2), rtol=0, atol=1e-12)


def test_a_row_does_not_depend_on_its_batch():
    path = BrownianPath(seed=3)
    assert torch.equal(path.at(0.37, (2000, 3))[:5], path.at(0.37, (5, 3)))
    assert torch.equal(path.rows(1500).value(0.37, (4, 3))[0], path.at(0.37, (1504, 3))[1500:])
    assert not torch.equal(path.at(0.37, (5, 3)), BrownianPath(seed=4).at(0.37, (5, 3)))
    with pytest.raises(ValueError, match="t >= 0"):
        path.at(-0.1, (5, 3))


# ---------------------------------------------------------------------- strong orders


def order_of(solve, exact, steps):
    """The slope of log rms error over log steps."""
    errors = [float((solve(n) - exact).square().mean().sqrt()) for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


GEOMETRIC = SDE(x / 2, sp.Rational(4, 5) * x, T=1)  # dx = x/2 dt + 0.8 x dw
EXACT = {"euler": 0.5, "torchsde euler": 0.5, "milstein": 1.0, "srk": 1.5, "heun": 1.0}


@pytest.mark.parametrize(("name", "power"), [*((name, 1.0) for name in EXACT), ("srk", 1.5)])
def test_strong_orders_with_noise_that_depends_on_the_state(name, power):
    """Against x_0 exp((mu - sigma²/2) t + sigma W(t)) of the same path, by the mean of log|error| over 1,600 paths.

    The mean square is that of a few paths, whose error grows as exp(0.8 W): its slope has a standard error of 0.04 to
    0.08, and more than it says itself. That of the logarithm is 0.019: four and a half of them are 0.085, and what 16
    steps are away from the limit is below 0.065.
    """
    path, shape = BrownianPath(seed=5), (1600, 1)
    solver = solvers.EulerMaruyama() if name == "euler" else Torchsde(name.removeprefix("torchsde "))
    exact = torch.exp((0.5 - 0.32) * 1.0 + 0.8 * path.at(1.0, shape))

    def solve(n):
        times = [1.0] if power == 1.0 else torch.linspace(0, 1, n // 4 + 1, dtype=double)[1:] ** power
        return GEOMETRIC.simulate(torch.ones(shape, dtype=double), times, solver, n, noise=path)[-1]

    coarse, fine = ((solve(n) - exact).abs().log().mean() for n in (16, 128))
    assert abs(float(coarse - fine) / math.log(8) - EXACT[name]) < 0.15


@pytest.mark.parametrize(("name", "order"), [("euler", 1.0), ("srk", 1.5)])
def test_strong_orders_with_additive_noise_on_times_that_are_not_uniform(name, order):
    """dx = -x dt + (1 + t) dw, whose exact x(1) is taken from 512 steps of srk."""
    sde, path, shape = SDE(-x, 1 + t, T=1), BrownianPath(seed=6), (200, 1)
    start = torch.ones(shape, dtype=double)
    fine = sde.simulate(start, [1.0], Torchsde("srk"), 512, noise=path)[-1]

    def solve(n):
        times = torch.linspace(0, 1, n // 4 + 1, dtype=double)[1:] ** 1.5  # four steps between two
        return sde.simulate(start, times, Torchsde(name) if name == "srk" else name, n, noise=path)[-1]

    assert order_of(solve, fine, (16, 64)) > order - 0.15


REVERSE = catalog.VP(0.1, 5.0)


def along(path, solver, n, grid=None, rows=60, **options):
    reverse = REVERSE.reverse(sdeflow.scores.GaussianMixture(REVERSE, [[-1.0], [1.0]], [0.2, 0.1]))
    return reverse.sample((rows, 1), solver, n, seed=0, noise=path, grid=grid, dtype=double, **options)


@pytest.fixture(scope="module")
def fine():
    return along(BrownianPath(seed=7), "euler", 1024, "angle")


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["angle", "t", "tensor"])
def test_the_reverse_sde_follows_the_path_on_every_clock(grid, fine):
    """Euler-Maruyama has order 1 where the noise is additive; all clocks end at one place."""

    def solve(n, grid=grid):
        if grid == "tensor":
            grid = REVERSE.cutoff + (1.0 - REVERSE.cutoff) * torch.linspace(0, 1, n + 1, dtype=double) ** 2
        return along(BrownianPath(seed=7), "euler", n, grid)

    assert order_of(solve, fine, (25, 100)) > 0.8


def test_srk_keeps_its_order_on_given_times_that_are_not_uniform(monkeypatch):
    """At least 3/2 along the reverse SDE of Gaussian data, and 2 as the noise is additive; without areas it is 1."""
    sde, path = catalog.VP(0.1, 5.0, cutoff=0.05), BrownianPath(seed=7)
    reverse = sde.reverse(sdeflow.scores.GaussianMixture(sde, [[0.5]], [0.2]))

    def solve(n, grid=None):
        u = torch.linspace(0, 1, n + 1, dtype=double)
        uneven = sde.cutoff + (1.0 - sde.cutoff) * (u + 0.06 * torch.sin(4.0 * math.pi * u))  # 0.25 to 1.75 of the mean
        grid = uneven if grid is None else grid
        return reverse.sample((60, 1), Torchsde("srk"), n, seed=0, noise=path, grid=grid, dtype=double)

    fine = solve(96, "t")
    assert order_of(solve, fine, (8, 24)) > 1.7
    right = sdeflow.solvers.problem.Problem.area_in
    monkeypatch.setattr(sdeflow.solvers.problem.Problem, "area_in", lambda *given: 0.0 * right(*given))
    assert order_of(solve, fine, (8, 24)) < 1.3


@pytest.mark.slow
def test_exponential_solvers_and_torchsde_follow_the_same_path(fine):
    for solver, n in ((Exponential(2, eta=1.0), 100), (Torchsde("srk"), 50), (Torchsde("euler"), 200)):
        found = along(BrownianPath(seed=7), solver, n)
        # Between the modes paths part: a few of the 60 amplify any error, and are most of a mean square.
        assert float((found - fine).abs().quantile(0.8)) < 0.02, solver
    other = along(BrownianPath(seed=9), solver, n)
    assert float((other - fine).square().mean().sqrt()) > 0.2
    split = along(BrownianPath(seed=7), solver, n, chunk=37)
    torch.testing.assert_close(split, found, rtol=1e-9, atol=1e-9)


def test_shared_noise_of_a_coupled_state_follows_the_path():
    u, v = sdeflow.state("u v")
    sde, path = SDE([v, -u - v], [[0], [1]], T=1), BrownianPath(seed=10)
    start = torch.ones(50, 2, 3, dtype=double)
    coarse, fine = (sde.simulate(start, [1.0], "euler", n, noise=path)[-1] for n in (32, 256))
    assert 1e-3 < float((coarse - fine).abs().max()) < 0.1


def test_what_cannot_follow_a_path_says_so():
    sde = catalog.VP()
    reverse = sde.reverse(sdeflow.scores.GaussianMixture(sde, [[0.0]], [0.2]))
    path = BrownianPath(seed=0)
    for solver in (solvers.StochasticHeun(S_churn=10.0), solvers.PredictorCorrector(), solvers.GottaGoFast()):
        with pytest.raises(ValueError, match="does not follow"):
            reverse.sample((2, 1), solver, None if solver.adaptive else 10, noise=path)
    with pytest.raises(TypeError, match="BrownianPath"):
        reverse.sample((2, 1), "euler", 10, noise=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="not both"):
        sde.simulate(torch.zeros(2, 1), [0.5], noise=path, seed=0)
