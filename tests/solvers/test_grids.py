"""Grids of given times: steps in t between exactly these, by every solver, against formulas in t written by hand."""

import math
import warnings
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import sympy as sp
import torch
from problems import ring

from sdeflow import SDE, scores, solvers, state, x
from sdeflow import t as time_symbol
from sdeflow.errors import CoarseStepsWarning
from sdeflow.numerics.noise import NoiseStream
from sdeflow.solvers import Exponential, Torchdiffeq, Torchsde

double = torch.float64
BETA_MIN, BETA_MAX = 0.1, 20.0


def random_times(sde, n, seed, spread=1.0):
    """``n`` steps from cutoff to T whose lengths differ e^spread-fold."""
    lengths = np.exp(spread * np.random.default_rng(seed).uniform(-1.0, 1.0, n))
    inner = sde.cutoff + (sde.T - sde.cutoff) * np.cumsum(lengths)[:-1] / lengths.sum()
    return torch.tensor([sde.cutoff, *inner, sde.T], dtype=double)


@lru_cache
def problem(pushed=False):
    """VP on [0.01, 1] with an exact score, and its flow and reverse drift in t; with b = 12 t cos 3 t if pushed."""
    beta = sp.Rational(1, 10) + sp.Rational(199, 10) * time_symbol
    b = 12 * time_symbol * sp.cos(3 * time_symbol) if pushed else 0
    sde = SDE(-beta * x / 2 + b, sp.sqrt(beta), cutoff=0.01)
    score = ring(sde, std=0.4)

    def rate(time):
        return BETA_MIN + (BETA_MAX - BETA_MIN) * time

    def push(time):
        return 12.0 * time * math.cos(3.0 * time) if pushed else 0.0

    def flow(state, t):
        return -0.5 * rate(t) * (state + score(state, t)) + push(t)

    def reverse(state, t):
        return -0.5 * rate(t) * state + push(t) - rate(t) * score(state, t)

    return sde, score, flow, reverse, lambda t: math.sqrt(rate(t))


# The Runge-Kutta tableaux: stages' times, their weights, the step's weights. torchdiffeq's rk4 is the 3/8 rule.
TABLEAUX = {
    "euler": ([], [1.0]),
    "midpoint": ([(0.5, [0.5])], [0.0, 1.0]),
    "heun2": ([(1.0, [1.0])], [0.5, 0.5]),
    "heun3": ([(1 / 3, [1 / 3]), (2 / 3, [0.0, 2 / 3])], [0.25, 0.0, 0.75]),
    "rk4": ([(1 / 3, [1 / 3]), (2 / 3, [-1 / 3, 1.0]), (1.0, [1.0, -1.0, 1.0])], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
}


def runge_kutta(field, state, times, tableau):
    """Steps in t from times[0] to times[-1], and the times asked."""
    stages, weights = tableau
    asked = []
    for t, later in pairwise(times):
        h, slopes = later - t, []
        for part, of_slopes in [(0.0, []), *stages]:
            asked.append(t + part * h)
            ahead = state + h * sum((a * k for a, k in zip(of_slopes, slopes, strict=True)), torch.zeros_like(state))
            slopes.append(field(ahead, asked[-1]))
        state = state + h * sum(b * k for b, k in zip(weights, slopes, strict=True))
    return state, asked


class Watched:
    """A score that notes the times at which it is asked."""

    def __init__(self, score):
        self.score, self.asked = score, []

    def __call__(self, state, t):
        self.asked.append(float(t[0]))
        return self.score(state, t)


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("name", ["Euler", "Heun", *TABLEAUX])
def test_the_flow_takes_the_steps_written_by_hand(name, rising):
    sde, score, flow, _, _ = problem(pushed=rising)
    solver = {"Euler": solvers.Euler(), "Heun": solvers.Heun()}.get(name) or Torchdiffeq(name)
    tableau = TABLEAUX[{"Euler": "euler", "Heun": "heun2"}.get(name, name)]
    state = torch.randn(3, 2, dtype=double, generator=torch.Generator().manual_seed(0))
    for seed in range(2):
        times = random_times(sde, 5, seed, spread=2.0)
        grid = times if rising else times.flip(0)
        for solve, order in (("decode", times.flip(0)), ("encode", times)):
            watched = Watched(score)
            found = getattr(sde.flow_ode(watched, prior=sde.prior), solve)(state, solver, grid=grid)
            expected, asked = runge_kutta(flow, state, order.tolist(), tableau)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(watched.asked, asked, rtol=1e-12)
            if not tableau[0]:
                assert watched.asked == order.tolist()[:-1]


def maruyama(f, g, state, times, noise):
    for t, later in pairwise(times):
        h = t - later
        state = state - h * f(state, t) + g(t) * math.sqrt(h) * noise()
    return state


def stratonovich_heun(f, g, state, times, noise):
    for t, later in pairwise(times):
        h, w = t - later, math.sqrt(t - later) * noise()
        slope = f(state, t)
        ahead = state - h * slope + g(t) * w
        state = state - 0.5 * h * (slope + f(ahead, later)) + 0.5 * (g(t) + g(later)) * w
    return state


def midpoint(f, g, state, times, noise):
    for t, later in pairwise(times):
        h, w = t - later, math.sqrt(t - later) * noise()
        ahead, middle = state - 0.5 * h * f(state, t) + 0.5 * g(t) * w, 0.5 * (t + later)
        state = state - h * f(ahead, middle) + g(middle) * w
    return state


def reversible_heun(f, g, state, times, noise):
    other = state
    for t, later in pairwise(times):
        h, w = t - later, math.sqrt(t - later) * noise()
        ahead = 2.0 * state - other - h * f(other, t) + g(t) * w
        state = state - 0.5 * h * (f(other, t) + f(ahead, later)) + 0.5 * (g(t) + g(later)) * w
        other = ahead
    return state


STEPS_OF_SDE = {
    "EulerMaruyama": (solvers.EulerMaruyama(), maruyama),
    "euler": (Torchsde("euler"), maruyama),
    "milstein": (Torchsde("milstein"), maruyama),
    "heun": (Torchsde("heun"), stratonovich_heun),
    "midpoint": (Torchsde("midpoint"), midpoint),
    "log_ode": (Torchsde("log_ode"), midpoint),
    "reversible_heun": (Torchsde("reversible_heun"), reversible_heun),
}


@pytest.mark.parametrize("name", STEPS_OF_SDE)
def test_the_reverse_sde_takes_the_steps_written_by_hand(name):
    solver, by_hand = STEPS_OF_SDE[name]
    shape = (3, 2)
    for seed in range(2):
        sde, score, _, reverse, g = problem(pushed=seed == 1)
        times, watched, stream = random_times(sde, 6, seed, spread=2.0), Watched(score), NoiseStream(seed, "path")
        equation = sde.reverse(watched, prior=sde.prior)
        found = equation.sample(shape, solver, grid=times, seed=seed, dtype=double)
        start = equation.model.initial_state(shape, seed, double, None)
        falling = times.flip(0).tolist()
        expected = by_hand(reverse, g, start, falling, lambda: stream.normal(shape, double, "cpu"))  # noqa: B023
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert min(watched.asked) >= sde.cutoff
        assert max(watched.asked) <= sde.T
        if by_hand is maruyama:
            assert watched.asked == falling[:-1]
        with_states, visited = equation.sample(shape, solver, grid=times, seed=seed, dtype=double, trajectory=True)
        assert visited.tolist() == falling
        torch.testing.assert_close(with_states[-1], found)


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
def test_adams_weights_are_of_b_too(method):
    """dx = e^{3 t} dt + dw and the score 0: along the flow dx/dt = e^{3 t}, of which their formulas have errors."""
    sde = SDE(sp.exp(3 * time_symbol), 1, T=1, cutoff=0.001)
    flow, zero = sde.flow_ode(lambda state, t: 0.0 * state, prior=sde.prior), torch.zeros(1, 1, dtype=double)
    exact, errors = (math.exp(3.0) - math.exp(0.003)) / 3.0, []
    for n in (10, 20):
        found = flow.encode(zero, method, grid=torch.linspace(0.001, 1.0, n + 1, dtype=double))
        errors.append(abs(float(found) - exact))
    assert errors[1] > 1e-8 and math.log2(errors[0] / errors[1]) > 2.75
    assert abs(float(flow.encode(zero, method, steps=20, grid="t")) - exact) < 1e-12  # centred


@pytest.mark.parametrize("kind", ["coupled", "per coordinate"])
def test_b_of_coupled_states_and_of_schedules_per_coordinate(kind):
    """Euler's steps by hand, back and forth, with their trajectory."""
    if kind == "coupled":
        a, b = state("a b")
        sde = SDE([b + sp.sin(time_symbol), 2 - a - b], [sp.Rational(1, 2), 1], T=1, cutoff=0.01)
        F, g2 = torch.tensor([[0.0, 1.0], [-1.0, -1.0]], dtype=double), torch.tensor([0.25, 1.0], dtype=double)
        push = lambda t: torch.tensor([math.sin(t), 2.0], dtype=double)  # noqa: E731
    else:
        k, rate = sp.Symbol("k", positive=True), torch.tensor([1.0, 3.0], dtype=double)
        sde = SDE(-k * x + k * time_symbol, 1, T=1, cutoff=0.01, params={k: rate})
        F, g2, push = -torch.diag(rate), torch.ones(2, dtype=double), lambda t: rate * t
    score = lambda x, t: torch.sin(3 * x) - x  # noqa: E731
    start = torch.randn(3, 2, dtype=double, generator=torch.Generator().manual_seed(0))
    times = random_times(sde, 4, 0)
    flow = sde.flow_ode(score, prior=sde.prior_for(0.0, 1.0))
    for solve, order in (("decode", times.flip(0).tolist()), ("encode", times.tolist())):
        states = [start]
        for now, later in pairwise(order):
            y = states[-1]
            states.append(y + (later - now) * (y @ F.T + push(now) - 0.5 * g2 * score(y, now)))
        found, visited = getattr(flow, solve)(start, "euler", grid=times, trajectory=True)
        assert visited.tolist() == order
        torch.testing.assert_close(found, torch.stack(states), rtol=1e-10, atol=1e-10)


def constant():
    """f = 0, g = 1, score -2 everywhere: dx/dt = 1 along the flow, 2 along the reverse SDE."""
    sde = SDE(0, 1, T=1, cutoff=0.001)
    return sde, lambda state, t: torch.full_like(state, -2.0), torch.tensor([0.001, 0.1, 0.2, 0.9, 1.0], dtype=double)


FIXED = [name for name in Torchdiffeq.methods if not Torchdiffeq(name).adaptive]


@pytest.mark.parametrize("solver", [solvers.Euler(), solvers.Heun(), *map(Torchdiffeq, FIXED)], ids=str)
def test_the_steps_sum_to_the_interval(solver):
    sde, score, times = constant()
    if "adams" in str(solver):  # which take even times
        times = torch.linspace(0.001, 1.0, 6, dtype=double)
    flow = sde.flow_ode(score, prior=sde.prior)
    zeros = torch.zeros(2, 1, dtype=double)
    torch.testing.assert_close(flow.decode(zeros, solver, grid=times), zeros - 0.999)
    torch.testing.assert_close(flow.encode(zeros, solver, grid=times), zeros + 0.999)


@pytest.mark.parametrize("solver", [solvers.EulerMaruyama(), *map(Torchsde, Torchsde.methods)], ids=str)
def test_the_noise_sums_to_the_interval(solver):
    sde, score, times = constant()
    equation, n = sde.reverse(score, prior=sde.prior), 4000
    start = equation.model.initial_state((n, 1), 3, double, None)
    moved = equation.sample((n, 1), solver, grid=times, seed=3, dtype=double) - start
    assert abs(float(moved.mean()) + 2 * 0.999) < 4 * math.sqrt(0.999 / n)
    assert abs(float(moved.var()) / 0.999 - 1.0) < 4 * math.sqrt(2 / n)


@lru_cache
def converged():
    """A flow, where it starts, and where it ends."""
    sde = SDE(-x, sp.sqrt(2), T=2, cutoff=0.05)
    flow = sde.flow_ode(ring(sde, modes=4, std=0.5))
    z = torch.randn(6, 2, dtype=double, generator=torch.Generator().manual_seed(1))
    return sde, flow, z, flow.decode(z, "rk4", steps=600)


ORDERS = [
    (solvers.Euler(), 1, 48), (solvers.Heun(), 2, 32), (Torchdiffeq("midpoint"), 2, 32), (Torchdiffeq("heun3"), 3, 24),
    (Torchdiffeq("rk4"), 4, 24), (solvers.StochasticHeun(), 2, 24), (Exponential(1, "data", False), 1, 24),
    (Exponential(2, "data", False), 2, 32), (solvers.SingleStep(2), 2, 24), (solvers.SingleStep(3), 3, 40),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "order", "least"), ORDERS, ids=[f"{s}-{o}" for s, o, _ in ORDERS])
def test_orders_on_uneven_grids(solver, order, least):
    """The slope of log error over log steps, by regression over several grids for each number."""
    sde, flow, z, truth = converged()
    rows = []
    for n in (least, 2 * least, 4 * least):
        for seed in range(2):
            found = flow.decode(z, solver, grid=random_times(sde, n, seed, spread=0.5))
            rows.append((math.log(n), math.log(float((found - truth).square().mean().sqrt()))))
    slope = -np.polyfit(*zip(*rows, strict=True), 1)[0]
    assert abs(slope - order) < 0.4, slope


ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")


@pytest.mark.parametrize("method", ADAMS)
def test_adams_weights_are_those_of_equal_steps(method, monkeypatch):
    """Uneven times are refused, since its order falls to 1 there; even ones between break points are not."""
    sde, flow, z, truth = converged()
    with pytest.raises(ValueError, match="equal steps"):
        flow.decode(z, method, grid=random_times(sde, 40, 0, spread=0.5))

    def slope(grid, least=48):
        found = [flow.decode(z, method, grid=grid(n)) for n in (least, 2 * least, 4 * least)]
        size = [math.log2(float((y - truth).square().mean().sqrt())) for y in found]
        return 0.5 * (size[0] - size[-1])

    assert slope(lambda n: torch.linspace(sde.cutoff, sde.T, n + 1)) > 2.75  # float32: even to rounding
    with monkeypatch.context() as patch:
        patch.setattr("sdeflow.solvers.adapters.torchdiffeq._UNEVEN", 1.0)
        assert slope(lambda n: random_times(sde, n, 0, spread=0.5)) < 1.5


@pytest.mark.parametrize("method", ADAMS)
def test_adams_begins_anew_at_jumps(method):
    """Even times on each side of a pause, of lengths that differ; the flow of a Gaussian, exactly."""
    beta = sp.Piecewise((2, time_symbol < 0.3), (0, time_symbol < 0.5), (12, True))
    sde = SDE(-beta * x / 2, sp.sqrt(beta), cutoff=0.01)
    start, end = (float(sde.kernel.marginal(0.0, 0.5, t).std) for t in (0.01, 1.0))
    law = torch.zeros(1, 1, dtype=double), torch.full((1,), 0.25, dtype=double)
    flow, errors = sde.flow_ode(scores.GaussianMixture(sde, *law)), []
    for n in (32, 64):
        times = [torch.linspace(a, b, n + 1, dtype=double) for a, b in ((0.01, 0.3), (0.5, 1.0))]
        found = flow.decode(torch.full((1, 1), end, dtype=double), method, grid=torch.cat(times))
        errors.append(abs(float(found) / start - 1.0))
    assert errors[1] < 1e-4 and math.log2(errors[0] / errors[1]) > 2.75


def test_ddim_and_ancestral_steps_by_hand():
    sde, score, _, _, _ = problem()
    times = random_times(sde, 7, 4, spread=2.0)
    alpha, sigma, _ = sde.kernel.coefficients(times.flip(0))
    z = torch.randn(3, 2, dtype=double)
    state, stream = z, NoiseStream(2, "path")
    for i, t in enumerate(times.flip(0)[:-1].tolist()):
        data = (state + sigma[i] ** 2 * score(state, t)) / alpha[i]
        noise = (state - alpha[i] * data) / sigma[i]
        state = alpha[i + 1] * data + sigma[i + 1] * noise
    torch.testing.assert_close(sde.flow_ode(score).decode(z, "ddim", grid=times), state, rtol=1e-9, atol=1e-9)
    reverse = sde.reverse(score)
    state = reverse.model.initial_state((3, 2), 2, double, None)
    for i, t in enumerate(times.flip(0)[:-1].tolist()):
        data, keep = (state + sigma[i] ** 2 * score(state, t)) / alpha[i], alpha[i] / alpha[i + 1]
        left = sigma[i] ** 2 - (keep * sigma[i + 1]) ** 2
        mean = keep * sigma[i + 1] ** 2 / sigma[i] ** 2 * state + alpha[i + 1] * left / sigma[i] ** 2 * data
        spread = sigma[i + 1] * left.sqrt() / sigma[i]
        state = mean + spread * stream.normal((3, 2), double, "cpu")
    found = reverse.sample((3, 2), "ddpm", grid=times, seed=2, dtype=double)
    torch.testing.assert_close(found, state, rtol=1e-9, atol=1e-9)


def test_steps_inside_a_pause_of_the_noise_cost_nothing():
    """Past values at one and the same log-SNR give no polynomial; the state moves by its drift alone."""
    g = sp.Piecewise((1, time_symbol < 0.3), (0, time_symbol < 0.6), (2, True))
    sde = SDE(-x, g, P0=1e-3)
    flow = sde.flow_ode(ring(sde, std=0.5))
    z = torch.randn(4, 2, dtype=double)
    truth = flow.decode(z, Exponential(3), steps=150)
    outside = torch.cat([torch.linspace(0, 0.3, 12), torch.linspace(0.6, 1.0, 12)]).double()
    within = torch.cat([outside, torch.linspace(0.3, 0.6, 12).double()[1:-1]]).sort().values
    for solver in (Exponential(3), Exponential(4, "data", False), solvers.SingleStep(2)):
        errors = [float((flow.decode(z, solver, grid=grid) - truth).abs().max()) for grid in (outside, within)]
        assert errors[1] < 2 * errors[0] + 1e-4


@pytest.mark.parametrize("convert", [list, np.asarray, lambda v: torch.tensor(v), lambda v: torch.tensor(v).float()])
def test_lists_arrays_and_float32_are_grids_too(convert):
    sde, score, times = constant()
    grid, zeros = convert(times.tolist()), torch.zeros(1, 1, dtype=double)
    flow = sde.flow_ode(score, prior=sde.prior)
    torch.testing.assert_close(flow.decode(zeros, "euler", grid=grid), zeros - 0.999)
    _, visited = flow.decode(zeros, "euler", grid=grid, trajectory=True)
    torch.testing.assert_close(visited, times.flip(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(flow.decode(zeros, "euler", steps=2, grid=grid), zeros - 0.999)


@pytest.mark.parametrize("pushed", [False, True])
def test_log_prob_between_given_times_by_hand(pushed):
    """Euler's steps of x and of log p, for data N(0, 1/4), whose divergence is known."""
    sde, _, _, _, _ = problem(pushed)
    times = random_times(sde, 9, 1, spread=1.5)

    def law(t):
        alpha, sigma, offset = sde.kernel.coefficients(torch.tensor(t, dtype=double))
        return float(offset), float(alpha**2 / 4 + sigma**2)

    def score(state, t):
        mean, variance = law(float(t[0]))
        return (mean - state) / variance

    prior = sde.prior_for(0.0, 0.5)
    flow = sde.flow_ode(score, prior=prior)
    points = torch.tensor([[0.3], [-0.7]], dtype=double)
    state, divergence = points, 0.0
    for time, later in pairwise(times.tolist()):
        rate = BETA_MIN + (BETA_MAX - BETA_MIN) * time
        mean, variance = law(time)
        push = 12.0 * time * math.cos(3.0 * time) if pushed else 0.0
        divergence -= (later - time) * 0.5 * rate * (1.0 - 1.0 / variance)
        state = state + (later - time) * (push - 0.5 * rate * (state + (mean - state) / variance))
    expected = prior.log_prob(state) + divergence
    found = flow.log_prob(points, solver=Torchdiffeq("euler"), grid=times.flip(0))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [None, "rk4", Exponential(3)], ids=["default", "rk4", "Exponential"])
def test_log_prob_between_given_times_is_right(solver):
    sde, _, _, _, _ = problem()
    exact = ring(sde, std=0.5)
    points, times = exact.sample(4, seed=0, dtype=double), random_times(sde, 40, 0, spread=0.5)
    watched = Watched(exact)
    flow = sde.flow_ode(watched, prior=sde.prior_for(*exact.data_moments()))
    truth = sde.flow_ode(exact).log_prob(points, rtol=1e-8, atol=1e-8)
    assert float((flow.log_prob(points, solver=solver, grid=times) - truth).abs().max()) < 0.05
    if solver != "rk4":
        assert {round(t, 12) for t in watched.asked} <= {round(t, 12) for t in times.tolist()}


def test_what_takes_no_given_times_says_so():
    sde, score, times = constant()
    reverse = sde.reverse(score, prior=sde.prior)
    restart = solvers.Restart(solvers.Heun(), [(0.1, 0.5, 1, 3)])
    with pytest.raises(ValueError, match="takes no times"):
        reverse.sample((2, 1), restart, grid=times)
    with pytest.raises(ValueError, match="graded"):
        sde.flow_ode(score, prior=sde.prior).decode(
            torch.zeros(1, 1), Exponential(4, start="graded"), grid=random_times(sde, 20, 0)
        )
    with pytest.raises(ValueError, match="rise or all fall"):
        reverse.sample((2, 1), "euler", grid=[0.001, 0.5, 0.2, 1.0])


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("rk4", 4), ("exponential", 2)])
def test_jumps_among_the_given_times_are_taken_from_each_side(name, order):
    beta = sp.Piecewise((2, time_symbol < 0.3), (0, time_symbol < 0.5), (12, True))
    sde = SDE(-beta * x / 2, sp.sqrt(beta), cutoff=0.01)
    start, end = (float(sde.kernel.marginal(0.0, 0.5, t).std) for t in (0.01, 1.0))

    score, errors = (
        scores.GaussianMixture(sde, torch.zeros(1, 1, dtype=double), torch.full((1,), 0.25, dtype=double)),
        [],
    )
    for n in (16, 32):
        times = [torch.linspace(a, b, n + 1, dtype=double) for a, b in ((0.01, 0.3), (0.5, 1.0))]
        found = sde.flow_ode(score).decode(torch.full((1, 1), end, dtype=double), name, grid=torch.cat(times))
        errors.append(abs(float(found) / start - 1.0))
    assert errors[1] < 0.06
    assert errors[1] < 1e-9 or math.log2(errors[0] / errors[1]) > order - 0.4


def test_given_times_are_one_row_and_are_told_where_they_cannot_serve():
    """Even times over a long horizon jump over the data, whose smaller direction then ends 40 times too wide."""
    sde = SDE(-x, sp.sqrt(2), T=50)
    ends = torch.tensor([[sde.cutoff, 50.0]])
    data = torch.tensor([[1.0, 0.01]], dtype=double)
    flow = sde.flow_ode(scores.GaussianMixture(sde, torch.zeros(1, 2, dtype=double), data))
    z = torch.ones(2, 2, dtype=double)
    with pytest.raises(ValueError, match="one row"):
        flow.decode(z, "euler", grid=ends)
    with pytest.warns(CoarseStepsWarning, match="the given times are far apart"):
        flow.decode(z, "heun", grid=torch.linspace(sde.cutoff, 50, 201, dtype=double))
    fine = torch.tensor(sde.cutoff) + 3 * torch.linspace(0, 1, 33).double() ** 3
    late = torch.cat([fine, torch.linspace(3, 50, 20, dtype=double)[1:]])  # where (1 - h)² > 1 in the reverse SDE
    with pytest.warns(CoarseStepsWarning, match="the given times: 51 steps are long .* the spread"):
        sde.reverse(lambda x, t: -x).sample((2, 2), "euler", grid=late, seed=0, dtype=double)
    short = SDE(-x, sp.sqrt(2), T=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short.reverse(lambda x, t: -x).sample((2, 2), "euler", grid=fine, seed=0, dtype=double)
