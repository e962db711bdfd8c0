"""Simulation at the ends of a domain: Heston and its kin by truncation, reflection, absorption, and exact draws."""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from scipy.integrate import solve_ivp
from scipy.stats import chi2, gamma, kstest, ncx2

import sdeflow
from sdeflow import SDE, t, x
from sdeflow.errors import DataError, DeclarationError, NonFiniteStateError, NotAffineError

R = sp.Rational
log_s, v = sdeflow.state("y v")
MU, KAPPA, THETA, XI, RHO = 0.05, 2.0, 0.04, 0.3, -0.7
HESTON = SDE(
    [MU - v / 2, KAPPA * (THETA - v)],
    [[sp.sqrt(v), 0], [XI * RHO * sp.sqrt(v), XI * math.sqrt(1 - RHO**2) * sp.sqrt(v)]],
)
CIR = SDE(2 * (R(1, 25) - x), sp.sqrt(x))  # delta = 0.32


def heston_moments(time, start):
    """E[v], E[v²], E[y], E[y v], E[y²] by their closed system of ordinary differential equations."""

    def rhs(_, m):
        ev, evv, ey, eyv, _ = m
        return [
            KAPPA * (THETA - ev),
            (2 * KAPPA * THETA + XI**2) * ev - 2 * KAPPA * evv,
            MU - ev / 2,
            (MU + RHO * XI) * ev - evv / 2 + KAPPA * (THETA * ey - eyv),
            2 * (MU * ey - eyv / 2) + ev,
        ]

    m = solve_ivp(rhs, (0, time), [start, start**2, 0, 0, 0], method="DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
    return m


def test_heston_by_full_truncation_has_the_moments_of_v_and_of_log_s():
    n, steps = 20_000, 100
    start = torch.tensor([[0.0, 0.04]], dtype=torch.float64).expand(n, 2)
    paths = HESTON.simulate(start, [0.5, 1.0], steps=steps, seed=1, boundary="truncate")
    assert bool((paths[:, :, 1] >= 0).all())
    for time, states in zip((0.5, 1.0), paths, strict=True):
        y, vol = states.unbind(1)
        for values, truth in zip((vol, vol**2, y, y * vol, y**2), heston_moments(time, 0.04), strict=True):
            error = float(values.std()) / math.sqrt(n)
            bias = 2.0 * abs(truth) / steps  # of weak order 1
            assert abs(float(values.mean()) - truth) < 3.5 * error + bias


def test_without_a_boundary_the_message_names_the_options():
    start = torch.tensor([[0.0, 0.01]], dtype=torch.float64).expand(2000, 2)
    with pytest.raises(NonFiniteStateError, match='"truncate", "reflect" or "absorb"'):
        HESTON.simulate(start, [1.0], steps=50, seed=1)


def test_truncation_evolves_the_state_and_clamps_the_coefficients():
    """Lord et al.: v + κ(θ - v⁺) h + ξ sqrt(v⁺) dw, and v⁺ is what is shown."""
    start = torch.full((200, 1), 0.01, dtype=torch.float64)
    steps = 20
    shown = CIR.simulate(start, [k / steps for k in range(1, steps + 1)], steps=steps, seed=3, boundary="truncate")
    noise = sdeflow.numerics.noise.NoiseStream(3, "simulation")
    state, h = start, 1 / steps
    for ours in shown:
        positive = state.clamp_min(0)
        dw = noise.normal((200, 1), torch.float64) * math.sqrt(h)
        state = state + 2 * (0.04 - positive) * h + positive.sqrt() * dw
        torch.testing.assert_close(ours, state.clamp_min(0), rtol=1e-9, atol=1e-12)
    assert bool((state < 0).any())


@pytest.mark.parametrize(("end", "side"), [(0, 1), (2, 1), (-1, 1), (0, -1), (3, -1)])
def test_a_reflected_path_is_mirrored_after_each_step(end, side):
    """At ends below the state and above it, wherever they lie: the distance from the end is that of the first case."""
    distance = side * (x - end)
    sde = SDE(side * 2 * (R(1, 25) - distance), sp.sqrt(distance))
    state = torch.full((200, 1), 0.01, dtype=torch.float64)
    shown = sde.simulate(end + side * state, [0.05, 0.1], steps=2, seed=3, boundary="reflect")
    noise = sdeflow.numerics.noise.NoiseStream(3, "simulation")
    for ours in shown:
        dw = side * noise.normal((200, 1), torch.float64) * math.sqrt(0.05)
        state = (state + 2 * (0.04 - state) * 0.05 + state.sqrt() * dw).abs()
        torch.testing.assert_close(side * (ours - end), state, rtol=1e-9, atol=1e-12)


def test_an_absorbed_path_stays():
    """dx = 2 sqrt(x) dw from 1 is absorbed by t with probability exp(-1 / (2 t)) (Feller)."""
    bessel = SDE(0, 2 * sp.sqrt(x))
    start = torch.ones(4000, 1, dtype=torch.float64)
    half, whole = bessel.simulate(start, [0.5, 1.0], steps=400, seed=0, boundary="absorb")[:, :, 0]
    assert bool((whole[half == 0] == 0).all()) and bool((whole >= 0).all())
    for states, time in ((half, 0.5), (whole, 1.0)):
        truth = math.exp(-0.5 / time)
        assert abs(float((states == 0).double().mean()) - truth) < 3.5 * math.sqrt(truth / 4000) + 0.03
    up = SDE(1, sp.sqrt(x)).simulate(torch.zeros(5, 1), [1.0], steps=10, seed=0, boundary="absorb")
    assert bool((up == 0).all())  # where it starts on the end, too


@pytest.mark.parametrize("boundary", ["truncate", "reflect"])
def test_both_ends_of_an_interval(boundary):
    jacobi = SDE((R(1, 2) - x) / 2, sp.sqrt(x * (1 - x)), T=2)
    start = torch.full((4000, 1), 0.3, dtype=torch.float64)
    states = jacobi.simulate(start, [1.0], steps=400, seed=0, boundary=boundary)[0]
    mean, std = (float(m[0]) for m in jacobi.kernel.moments(start[:1], 1.0))
    assert bool(((states >= 0) & (states <= 1)).all())
    assert abs(float(states.mean()) - mean) < 4 * std / 4000**0.5 + 0.02
    assert abs(float(states.std()) / std - 1) < 0.05


def test_ends_of_a_quadratic():
    """dx = -x dt + sqrt(1 - x²) dw lives on [-1, 1], and E x² = (1 - e^{-3 t}) / 3 from 0."""
    start = torch.zeros(2000, 1, dtype=torch.float64)
    states = SDE(-x, sp.sqrt(1 - x**2)).simulate(start, [1.0], steps=100, seed=0, boundary="reflect")[0]
    truth, error = (1 - math.exp(-3)) / 3, float((states**2).std()) / math.sqrt(2000)
    assert bool((states.abs() <= 1).all())
    assert abs(float((states**2).mean()) - truth) < 3.5 * error + 0.01


def test_ends_that_move_and_ends_below_which_the_state_lies():
    falling = SDE(-x, sp.sqrt(1 + t / 2 - x))
    states = falling.simulate(torch.full((500, 1), 0.9), [0.5, 1.0], steps=20, seed=0, boundary="reflect")
    assert bool((states[0] <= 1.25).all()) and bool((states[1] <= 1.5).all()) and float(states[1].max()) > 1.0
    k = sp.Symbol("k")
    shifted = SDE(-x, sp.sqrt(x + k), params={"k": torch.tensor([1.0, 2.0])})
    states = shifted.simulate(torch.zeros(500, 2), [1.0], steps=10, seed=0, boundary="truncate")[0]
    assert bool((states >= torch.tensor([-1.0, -2.0])).all()) and float(states[:, 1].min()) < -1.0


def test_a_geometric_brownian_motion_and_a_cev_process_stay_positive():
    rough = SDE(x / 10, 2 * x).simulate(torch.ones(500, 1), [1.0], steps=4, seed=0, boundary="truncate")
    assert bool((rough >= 0).all()) and bool((rough == 0).any())
    cev = SDE(x / 20, x ** R(3, 4) / 2)
    paths = cev.simulate(torch.full((4000, 1), 0.05, dtype=torch.float64), [1.0], steps=100, seed=0, boundary="absorb")
    error = float(paths[0].std()) / 4000**0.5
    assert abs(float(paths[0].mean()) - 0.05 * math.exp(0.05)) < 3.5 * error + 1e-3


def test_refusals():
    start = torch.full((2, 1), 0.5)
    for sde, options, error, match in (
        (SDE(-x, 1), {"boundary": "reflect"}, DeclarationError, "real everywhere"),
        (CIR, {"boundary": "bounce"}, ValueError, '"truncate", "reflect", "absorb"'),
        (CIR, {"boundary": "truncate", "solver": "milstein"}, ValueError, 'solver="euler"'),
        (CIR, {"solver": "exact", "steps": 5}, ValueError, "takes no steps"),
        (SDE(x - x**3, sp.sqrt(x)), {"solver": "exact"}, NotAffineError, "kernel"),
        (SDE(-x, sp.sqrt(x**3 + 1)), {"boundary": "truncate"}, DeclarationError, "interval of each component"),
    ):
        with pytest.raises(error, match=match):
            sde.simulate(start, [1.0], **options)
    with pytest.raises(DataError, match="outside the domain"):
        CIR.simulate(-start, [1.0], boundary="truncate")


# ---------------------------------------------------------------- exact draws


def test_exact_paths_of_a_square_root_process_have_its_transition_law():
    start = torch.full((3000, 1), 0.3, dtype=torch.float64)
    sde = SDE(1.2 * (1 + t) * (R(7, 10) - x), sp.sqrt((1 + t) * x) * R(4, 5), T=2)
    first, second = sde.simulate(start, [0.4, 1.5], solver="exact", seed=0)
    c = 2 * 1.2 / 0.64  # of the clock t + t²/2
    for begun, ended, clock in ((start, first, 0.48), (first, second, 2.625 - 0.48), (start, second, 2.625)):
        scale = 2 * c / -math.expm1(-1.2 * clock)
        level = ncx2.cdf(scale * ended.numpy(), 2 * c * 0.7, scale * begun.numpy() * math.exp(-1.2 * clock))
        assert kstest(level[:, 0], "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("sde", "start"),
    [
        (SDE(-x, sp.sqrt(2), T=3, P0=0.5), 1.0),
        (SDE(x / 10, 3 * x / 10), 1.0),
        (SDE(R(1, 4) - x, sp.sqrt(x)), 0.3),
        (SDE((R(1, 2) - x) * 2, sp.sqrt(x * (1 - x))), 0.2),
    ],
)
def test_exact_paths_have_the_kernels_moments(sde, start):
    n = 4000
    begun = torch.full((n, 1), start, dtype=torch.float64)
    paths = sde.simulate(begun, [0.2, 0.7], solver="exact", seed=2)
    exact = SDE(-x, sp.sqrt(2), T=3) if sde.kind == "affine" else sde  # x_0 is known: P0 is not drawn
    for states, time in zip(paths, (0.2, 0.7), strict=True):
        mean, std = (float(m.flatten()[0]) for m in exact.kernel.moments(begun[:1], time))
        squares = (states - mean).square()
        assert abs(float(states.mean()) - mean) < 4 * std / n**0.5
        assert abs(float(squares.mean()) - std**2) < 4 * float(squares.std()) / n**0.5


def test_exact_paths_of_a_coupled_state():
    a, b = sdeflow.state("a b")
    sde = SDE([b, -a - b], [0, 1], T=2)
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(5000, 2)
    states = sde.simulate(start, [0.5, 1.5], solver="exact", seed=0)[1]
    mean, cov = sde.kernel.moments(start[:1], 1.5)
    np.testing.assert_allclose(states.mean(0), mean[0], atol=4 * float(cov.max()) ** 0.5 / 5000**0.5)
    np.testing.assert_allclose(np.cov(states.numpy().T), cov[0].reshape(2, 2), atol=0.03)


def test_exact_and_started_on_the_end():
    """From 0 the square-root process is sigma² chi²(delta)."""
    states = CIR.simulate(torch.zeros(3000, 1, dtype=torch.float64), [0.6], solver="exact", seed=0)[0]
    var = -math.expm1(-1.2) / 8
    assert kstest(chi2.cdf(states[:, 0].numpy() / var, 0.32), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("theta", [0.3, 0.1])  # δ = 1.8 and 0.6: paths reach 0
def test_the_reverse_sde_keeps_to_the_domain(theta):
    """Stationary data of a square-root process, whose score is known: Gamma(2 κ θ / σ²) at every time."""
    sde = SDE(1.5 * (theta - x), sp.sqrt(x), T=1)
    a, rate = 3.0 * theta, 3.0
    law = torch.distributions.Gamma(torch.tensor(a, dtype=torch.float64), rate)

    class Stationary:
        def sample(self, shape, seed=None, dtype=None, device=None):
            level = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            return torch.from_numpy(gamma.ppf(level.numpy(), a, scale=1 / rate)).clamp_min(1e-12).to(dtype)

        def log_prob(self, x):
            return law.log_prob(x).sum(1)

    reverse = sde.reverse(lambda x, t: (a - 1) / x - rate, prior=Stationary())
    states, _ = reverse.sample((4000, 1), steps=200, seed=0, dtype=torch.float64, trajectory=True)
    assert bool((states > 0).all())
    spread, found = math.sqrt(a) / rate, states[-1].numpy().ravel()
    assert abs(found.mean() - a / rate) < 4 * spread / math.sqrt(4000)
    assert abs(found.std() / spread - 1) < 4 * math.sqrt((2 + 6 / a) / 4 / 4000)
    if theta > 0.2:  # below, 13 % of the samples lie on the end
        assert kstest(found, "gamma", (a, 0, 1 / rate)).statistic < 0.03


def test_steps_of_the_flow_that_leave_the_domain_say_what_to_do():
    sde = SDE(1.5 * (0.3 - x), sp.sqrt(x), T=1)
    flow = sde.flow_ode(lambda x, t: -50 * x.log() / x, prior=sdeflow.Gaussian(0.3, 0.1))
    points = torch.tensor([[0.01], [2.0]], dtype=torch.float64)
    for solve in (lambda: flow.encode(points, steps=4), lambda: flow.log_prob(points, steps=4)):
        with pytest.raises(sdeflow.errors.NonFiniteStateError, match="where steps= is left out"):
            solve()
