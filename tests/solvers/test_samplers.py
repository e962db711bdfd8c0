"""Samplers: Euler, Heun, EDM's churn, Langevin dynamics, predictor-corrector, restarts and the adaptive SDE solver.

Laws are checked without Monte Carlo where a sampler is linear for Gaussian data: its output covariance follows from
unit impulses sent through the real code. Where it is not, bounds are standard errors of the moment measured.
"""

import math
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import sympy as sp
import torch
from problems import COUPLED, gaussian, ring

import sdeflow
from sdeflow import SDE, catalog, x
from sdeflow.numerics.basis import Orthogonal
from sdeflow.numerics.noise import NoiseStream
from sdeflow.scores import GaussianMixture
from sdeflow.solvers import Diffusion, Exponential, Field, Problem, Torchdiffeq, Torchsde, View, Watch, make_clock
from sdeflow.solvers.edm import StochasticHeun
from sdeflow.solvers.euler import Euler, EulerMaruyama, Heun
from sdeflow.solvers.exponential.singlestep import SingleStep
from sdeflow.solvers.gotta_go_fast import GottaGoFast, _Memory
from sdeflow.solvers.langevin import (
    AnnealedLangevin,
    PredictorCorrector,
    annealed_langevin,
    geometric_scales,
    langevin,
    matched_eps,
    number_of_scales,
    scale_ratio,
)
from sdeflow.solvers.restart import Restart

double = torch.float64
SDES = {"VP": catalog.VP, "VE": catalog.VE, "EDM": catalog.EDM, "FlowMatching": catalog.FlowMatching}
PER_COORDINATE = SDE("-k*x", "sqrt(2*k)", params={"k": torch.tensor([0.5, 1.0, 2.0])}, T=3)


# ------------------------------------------------------------------------------------------------ exact covariances


def covariance(kernel, like, t, std):
    """The covariance of u_t for data N(0, std²), as a map of states."""
    path = kernel.path(like, torch.as_tensor(t, dtype=double))
    spread = (path.alpha @ kernel.scale(torch.as_tensor(std, dtype=double), like)).gram
    return spread + path.sigma.gram


def exact_score(kernel, std):
    """The score of centred states for data N(0, std²)."""
    return lambda u, t: -covariance(kernel, u, t, std).inverse(u)


class Impulses:
    """Noise for rows that are blocks of n: block k + 1 receives the n unit vectors in draw k, and nothing else."""

    seed = 0

    def __init__(self, n):
        self.n, self.draws = n, 0

    def normal(self, shape, dtype=None, device="cpu"):
        self.draws += 1
        out = torch.zeros(shape, dtype=dtype)
        rows = out[self.draws * self.n : (self.draws + 1) * self.n]
        if len(rows):
            rows += torch.eye(self.n, dtype=dtype)
        return out


def problem_of(kernel, noise, event, std=0.5, grid=None, score=None, field=None, on_step=None, on_call=None, **view):
    clock = make_clock(grid, kernel, kernel.cutoff, kernel.T, std or 1.0)
    seen = View(event, score or exact_score(kernel, std), kernel, **view)
    return Problem(field, clock, backward=True, view=seen, watch=Watch(10**6, on_call, on_step), noise=noise)


def propagated(solver, sde, steps, std=0.5, event=(1,), start=None, **options):
    """The exact covariance (n, n) of the flattened output of a linear sampler, from x_T ~ p_T or variance ``start``."""
    kernel, n = sde.kernel, math.prod(event)

    def run(blocks):
        noise = Impulses(n)
        y = torch.zeros(blocks * n, n, dtype=double)
        y[:n] = torch.eye(n, dtype=double)
        with torch.no_grad():
            out = solver.solve(problem_of(kernel, noise, event, std, **options), y, steps, 1e-9, 1e-9)
        return out, noise.draws

    draws = run(1)[1]
    out = run(draws + 1)[0]
    first, rest = out[:n].mT, out[n:]
    at_T = dense(covariance(kernel, out.reshape(-1, *event), kernel.T, std), event) if start is None else start
    return first @ at_T @ first.mT + rest.mT @ rest


def dense(linear, event):
    """A map of states as a matrix of flattened ones."""
    n = math.prod(event)
    return linear(torch.eye(n, dtype=double).reshape(n, *event)).reshape(n, n).mT


def true_covariance(sde, std=0.5, event=(1,)):
    like = torch.zeros(1, *event, dtype=double)
    return dense(covariance(sde.kernel, like, sde.cutoff, std), event)


def error_of(solver, sde, steps, std=0.5, event=(1,), **options):
    """The relative error of the output's covariance, by its largest entry."""
    truth = true_covariance(sde, std, event)
    return float((propagated(solver, sde, steps, std, event, **options) - truth).abs().max() / truth.abs().max())


def slopes(errors):
    return [math.log2(a / b) for a, b in pairwise(errors)]


# ------------------------------------------------------------------------------------------------ Euler, Heun

EVERY_NOISE = {
    "one motion each": (lambda: catalog.VP(), (3,)),
    "on the velocity": (lambda: catalog.CriticallyDampedLangevin(), (2, 3)),
    "a matrix": (COUPLED["noise matrix"], (2, 3)),
    "of the state": (lambda: SDE(x / 10, 3 * x / 10), (2,)),
    "without a kernel": (lambda: SDE(sp.sin(x), 1, T=2), (2,)),
}


@pytest.mark.parametrize("name", EVERY_NOISE)
def test_euler_maruyama_is_torchsdes_euler(name):
    declare, event = EVERY_NOISE[name]
    sde = declare()
    reverse = sde.reverse(lambda state, time: -state, prior=sdeflow.Gaussian(torch.full(event, 0.1), 1.0))
    ours = reverse.sample((5, *event), EulerMaruyama(), steps=20, seed=0)
    theirs = reverse.sample((5, *event), Torchsde("euler"), steps=20, seed=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ours, theirs", [(Euler(), "euler"), (Heun(), "heun2")], ids=["Euler", "Heun"])
def test_euler_and_heun_are_torchdiffeqs(ours, theirs):
    sde = catalog.CosineVP()
    flow = sde.flow_ode(ring(sde))
    z = torch.randn(5, 2)
    back = flow.decode(z, ours, 15)
    torch.testing.assert_close(back, flow.decode(z, Torchdiffeq(theirs), 15), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flow.encode(back, ours, 15), flow.encode(back, Torchdiffeq(theirs), 15))


@pytest.mark.parametrize("solver, order", [(Euler(), 1), (Heun(), 2), (StochasticHeun(), 2)])
def test_ode_solvers_converge_with_their_order(solver, order):
    sde = SDE(-x, sp.sqrt(2), T=2, cutoff=0.05)
    flow = sde.flow_ode(ring(sde, std=0.4))
    z = torch.randn(16, 2, dtype=double)
    truth = flow.decode(z, Torchdiffeq("dopri8"), rtol=1e-11, atol=1e-11)
    grid = {"grid": "log_snr"} if isinstance(solver, StochasticHeun) else {}
    out = [flow.decode(z, solver, n * (2 if order == 1 else 1), **grid) for n in (32, 64, 128)]
    errors = [float((state - truth).square().mean().sqrt()) for state in out]
    assert abs(slopes(errors)[-1] - order) < 0.2


def test_heun_of_a_coupled_flow_converges():
    sde = catalog.CriticallyDampedLangevin()
    flow = sde.flow_ode(exact_for_states(sde))
    z = torch.randn(8, 2, 1, dtype=double)
    truth = flow.decode(z, Torchdiffeq("dopri8"), rtol=1e-10, atol=1e-10)
    errors = [float((flow.decode(z, Heun(), n) - truth).abs().max()) for n in (100, 200, 400)]
    assert abs(slopes(errors)[-1] - 2) < 0.25


def exact_for_states(sde, std=0.5):
    """The exact score of N(0, std²) data as a function of states (offset zero, no basis)."""
    return lambda state, time: exact_score(sde.kernel, std)(state.double(), time[0].double()).to(state.dtype)


# ------------------------------------------------------------------------------------------------ EDM


def test_without_churn_edm_is_heun_in_the_noise_ratio():
    """Algorithm 1 of the paper as it is written there, for alpha = 1 and sigma = t."""
    sde = catalog.EDM()
    exact = ring(sde)
    times = torch.logspace(math.log10(sde.cutoff), math.log10(sde.T), 13, dtype=double)
    state = 80 * torch.randn(6, 2, dtype=double)
    ours = sde.flow_ode(exact).decode(state, StochasticHeun(), 12, grid=times)
    for now, then in pairwise(times.flip(0)):
        slope = (state - exact.denoise(state, now)) / now
        ahead = state + (then - now) * slope
        state = state + (then - now) * 0.5 * (slope + (ahead - exact.denoise(ahead, then)) / then)
    torch.testing.assert_close(ours, state, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("churn", [0.0, 5.0])
@pytest.mark.parametrize("name", ["VP", "FlowMatching"])
def test_every_elementwise_sde_is_edm_in_x_over_alpha(name, churn):
    """At the same noise ratios, with the same noise, z = x / alpha is the same in all of them."""
    solver, ratios = StochasticHeun(S_churn=churn, S_min=0.01, S_max=10.0), geometric_scales(30.0, 0.005, 16)
    ends = []
    for sde in (SDES[name](), catalog.EDM()):
        kernel = sde.kernel
        times = kernel.time_of(-ratios.log())
        alpha = kernel.coefficients(times)[0]
        exact = ring(sde)
        problem = problem_of(kernel, NoiseStream(0, "path"), (2,), score=exact)
        problem.times = lambda steps, times=times: times.numpy()
        start = 30.0 * NoiseStream(1, "start").normal((4, 2), double) * alpha[0]
        ends.append(solver.solve(problem, start, 15, 0, 0) / alpha[-1])
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", SDES)
def test_churn_keeps_the_law(name):
    sde = SDES[name]()
    errors = [error_of(StochasticHeun(S_churn=20.0), sde, n, grid="log_snr") for n in (80, 160, 320)]
    assert errors[-1] < 2e-3
    assert all(abs(slope - 2) < 0.15 for slope in slopes(errors))


def test_churn_keeps_the_law_of_a_schedule_per_coordinate():
    errors = [error_of(StochasticHeun(S_churn=20.0), PER_COORDINATE, n, event=(3,)) for n in (60, 120, 240)]
    assert errors[-1] < 3e-3 and abs(slopes(errors)[-1] - 2) < 0.15


def test_wrong_churn_is_found():
    """Noise inflated by 3 %."""
    sde = catalog.VP()
    right = error_of(StochasticHeun(S_churn=20.0), sde, 160, grid="log_snr")
    wrong = error_of(StochasticHeun(S_churn=20.0, S_noise=1.03), sde, 160, grid="log_snr")
    assert wrong > 10 * right


def test_churn_acts_between_its_bounds_only_and_never_passes_T():
    sde = catalog.VP()
    kernel = sde.kernel
    problem = problem_of(kernel, None, (1,), grid="log_snr")
    times = problem.times(10)
    raised = StochasticHeun(S_churn=10.0, S_min=0.05, S_max=5.0)._raised(problem, times)
    ratio = torch.exp(-kernel.half_log_snr(torch.as_tensor(times[:-1]))).numpy()
    inside = (ratio >= 0.05) & (ratio <= 5.0)
    assert (raised[~inside] == times[:-1][~inside]).all() and inside.any() and not inside.all()
    grown = torch.exp(-kernel.half_log_snr(torch.as_tensor(raised))).numpy() / ratio
    np.testing.assert_allclose(grown[inside], math.sqrt(2.0), rtol=1e-9)  # 10 / 10 is beyond √2 - 1
    assert StochasticHeun(S_churn=10.0)._raised(problem, times)[0] == kernel.T


# ------------------------------------------------------------------------------------------------ predictor-corrector


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("name", ["VP", "VE"])
def test_predictors_have_weak_order_one(predictor, name):
    solver = PredictorCorrector(predictor, corrector_steps=0)
    errors = [error_of(solver, SDES[name](), n) for n in (100, 200, 400)]
    assert all(0.85 < slope < 1.15 for slope in slopes(errors))


POINTS = {"VP": (catalog.VP, (1,)), "VE": (catalog.VE, (1,)), "per coordinate": (lambda: PER_COORDINATE, (3,))}
POINTS["coupled"] = (catalog.CriticallyDampedLangevin, (2, 1))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", POINTS)
def test_ancestral_steps_are_exact_where_the_data_are_one_point(name, steps):
    """Then p(u_s | u_t) is the posterior that it draws from, at any length of the step."""
    declare, event = POINTS[name]
    assert error_of(PredictorCorrector("ancestral", 0), declare(), steps, std=0.0, event=event) < 1e-7


def test_reverse_diffusion_is_songs_for_ve():
    """x <- x + (σ_{i+1}² - σ_i²) s + √(σ_{i+1}² - σ_i²) z, as in the paper's algorithm 2."""
    sde = catalog.VE()
    ours, theirs = torch.full((2, 4, 1), 7.0, dtype=double)
    problem = problem_of(sde.kernel, NoiseStream(0, "path"), (1,))
    ours = PredictorCorrector("reverse_diffusion", 0).solve(problem, ours, 9, 0, 0)
    stream = NoiseStream(0, "path")
    for now, then in pairwise(problem.times(9)):
        gap = sum(sign * float(sde.kernel.moments(torch.zeros(1, 1), t)[1]) ** 2 for sign, t in ((1, now), (-1, then)))
        score = exact_score(sde.kernel, 0.5)(theirs, torch.tensor(now))
        theirs = theirs + gap * score + math.sqrt(gap) * stream.normal((4, 1), double)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["VP", "coupled"])
def test_correctors_reduce_the_error_of_too_few_steps(name):
    sde, event = (catalog.VP(), (1,)) if name == "VP" else (catalog.CriticallyDampedLangevin(), (2, 1))
    alone = error_of(PredictorCorrector(corrector_steps=0), sde, 20, event=event)
    mended = error_of(PredictorCorrector(corrector_steps=2, snr=0.3, step="kernel"), sde, 20, event=event)
    assert mended < 0.7 * alone


@pytest.mark.parametrize("name", ["VP", "per coordinate", "coupled"])
def test_the_corrector_has_its_stationary_law(name):
    """On p_t = its noise the preconditioned step leaves P / (1 - e / 2), for every SDE."""
    declare, event = POINTS[name]
    solver = PredictorCorrector("none", corrector_steps=120, snr=0.4, step="kernel")
    out = propagated(solver, declare(), 1, std=0.0, event=event)
    truth = true_covariance(declare(), std=0.0, event=event) / (1.0 - 0.4**2)
    torch.testing.assert_close(out, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))


def test_snr_steps_are_songs_for_each_sample():
    """ε = 2 α (r |z| / |g|)², x <- x + ε g + √(2ε) z, with α = 1 - beta of the step."""
    sde = catalog.VP()
    solver = PredictorCorrector("none", 1, snr=0.1, step="snr")
    start = torch.randn(5, 64, dtype=double)
    problem = problem_of(sde.kernel, NoiseStream(0, "path"), (64,))
    ours = solver.solve(problem, start, 1, 0, 0)
    g = exact_score(sde.kernel, 0.5)(start, torch.tensor(sde.cutoff, dtype=double))
    z = NoiseStream(0, "path").normal((5, 64), double)
    ends = sde.kernel.coefficients(torch.tensor([sde.T, sde.cutoff], dtype=double))[0]
    eps = 2 * float(ends[0] / ends[1]) ** 2 * (0.1 * z.norm(dim=1) / g.norm(dim=1))[:, None] ** 2
    torch.testing.assert_close(ours, start + eps * g + (2 * eps).sqrt() * z, rtol=1e-9, atol=1e-9)


def test_snr_steps_sample_the_right_law_in_many_dimensions():
    sde, n, d = catalog.VP(), 256, 64
    exact = gaussian(sde, std=0.5, d=d)
    out = sde.reverse(exact).sample((n, d), PredictorCorrector("ancestral"), steps=150, seed=0)
    truth = float(sde.kernel.marginal(0.0, 0.5, sde.cutoff).std ** 2)
    assert abs(float(out.square().mean()) / truth - 1) < 4 * math.sqrt(2 / (n * d)) + 0.03


def test_a_predictor_may_be_a_function():
    def ours(problem, u, t, s):
        path = problem.kernel.transition(u, s, t, exactly=True)
        return u - path.alpha(u) + u + path.sigma.gram(problem.score(u, t)) + path.sigma(noise_of(problem, u))

    def noise_of(problem, u):
        return problem.normal(tuple(u.shape), u.dtype, u.device)

    sde = catalog.VP()
    reverse = sde.reverse(ring(sde))
    named = reverse.sample((4, 2), PredictorCorrector("reverse_diffusion"), steps=12, seed=0)
    torch.testing.assert_close(reverse.sample((4, 2), PredictorCorrector(ours), steps=12, seed=0), named)


# ------------------------------------------------------------------------------------------------ Langevin


def test_langevin_has_its_stationary_variance():
    """c² / (1 - ε / (2c²)), where ε/2 and √ε would leave c² / (1 - ε / (4c²)): 1.333 and 1.143, 19 standard errors."""
    n = 20_000
    start = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=double)
    out = langevin(lambda state, time: -state, start, 30, 0.5, t=0.0, seed=0)
    truth = 1 / (1 - 0.25)
    assert abs(float(out.var()) / truth - 1) < 4 * math.sqrt(2 / n)
    assert abs(1 / (1 - 0.125) / truth - 1) > 10 * math.sqrt(2 / n)


def test_langevin_is_reproducible_row_by_row_and_leaves_modes_alone():
    class Net(torch.nn.Module):
        def forward(self, state, time):
            assert not self.training and time.shape == (len(state),)
            return -state

    net = Net().train()
    start = torch.randn(6, 2, 3)
    out = langevin(net, start, 5, 0.1, t=0.3, seed=4)
    assert net.training and out.shape == start.shape and out.dtype == start.dtype
    assert torch.equal(langevin(net, start[:2], 5, 0.1, t=0.3, seed=4), out[:2])
    assert not torch.equal(langevin(net, start, 5, 0.1, t=0.3, seed=5), out)


def test_langevin_says_when_its_step_explodes():
    with pytest.raises(sdeflow.errors.NonFiniteStateError, match="step = 3 is too large"):
        langevin(lambda state, time: -state, torch.ones(3, 1), 3000, 3.0, t=0.0, seed=0)


@pytest.mark.parametrize("options", [{"steps": -1}, {"step": 0.0}, {"step": math.nan}, {"steps": 1.5}])
def test_langevin_checks_its_options(options):
    with pytest.raises(ValueError):
        langevin(lambda state, time: -state, torch.ones(3, 1), **{"steps": 2, "step": 0.1, "t": 0.0, **options})


def test_the_numbers_of_ncsnv2():
    """CIFAR-10: gamma = 1.0398 in 3072 dimensions, and ε = 6.2e-6 at T = 5 for its 232 scales from 50 to 0.01."""
    assert scale_ratio(3072) == pytest.approx(1.0398, abs=1e-4)
    assert number_of_scales(3072, 50.0, 0.01) == 219
    assert matched_eps(geometric_scales(50.0, 0.01, 232), 5) == pytest.approx(6.2e-6, rel=0.01)
    scales = geometric_scales(50.0, 0.01, 232)
    assert float(scales[0]) == pytest.approx(50.0) and float(scales[-1]) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="overlap"):
        scale_ratio(4)


def test_annealed_langevin_is_ncsns_loop():
    """With alpha = 1 and t = sigma, as the paper writes it, the score an unknown function."""
    scales, eps = geometric_scales(5.0, 0.1, 6), 1e-3

    def score(state, time):
        return -(state - 0.2) / (0.3 + time[:, None] ** 2)

    options = {"sde": catalog.EDM(), "denoise": False, "dtype": double, "seed": 3}
    ours = annealed_langevin(score, (4, 2), scales, 7, eps, **options)
    start = catalog.EDM().kernel.marginal(torch.zeros(2), 0.0, 5.0)  # the data's moments are not known: noise alone
    state, stream = start.sample((4, 2), 3, double, "cpu"), NoiseStream(3, "path")
    for sigma in scales:
        step = eps * sigma**2 / scales[-1] ** 2
        for _ in range(7):
            noise = stream.normal((4, 2), double)
            state = state + step * score(state, sigma.expand(4)) + torch.sqrt(2 * step) * noise
    torch.testing.assert_close(ours, state, rtol=1e-8, atol=1e-9)
    denoised = annealed_langevin(score, (4, 2), scales, 7, eps, **{**options, "denoise": True})
    last = scales[-1].expand(4)
    torch.testing.assert_close(denoised, state + scales[-1] ** 2 * score(state, last), rtol=1e-8, atol=1e-9)


def test_annealed_langevin_is_the_same_in_every_sde():
    """In z = x / alpha, at the same noise ratios: VP, flow matching and EDM give the same data."""
    scales = geometric_scales(20.0, 0.02, 30)
    out = [
        annealed_langevin(ring(declare()), (5, 2), scales, 3, seed=0, dtype=double)
        for declare in (catalog.EDM, catalog.VP, catalog.FlowMatching)
    ]
    torch.testing.assert_close(out[1], out[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out[2], out[0], rtol=1e-6, atol=1e-7)


def test_the_solver_and_the_function_are_one():
    """From the state at T that stands for the function's start, z = x / alpha being kept on the way."""
    sde = catalog.VP()
    exact, kernel = ring(sde), sde.kernel
    problem = problem_of(kernel, NoiseStream(0, "path"), (2,), grid="log_snr", score=exact)
    times = torch.tensor(problem.times(25))
    theirs = annealed_langevin(exact, (3, 2), times=times[1:], steps_per_scale=4, seed=0, denoise=False, dtype=double)
    start = kernel.marginal(*exact.data_moments(), float(times[1])).sample((3, 2), 0, double, "cpu")
    alpha = kernel.coefficients(times)[0]
    ours = AnnealedLangevin(4).solve(problem, start * alpha[0] / alpha[1], 25, 0, 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_annealed_langevin_on_noise_alone_follows_ncsnv2s_variances():
    """v <- (1 - e)^{2T} v + r (1 - (1 - e)^{2T}) at each scale in units of the scale, and matched_eps aims at 1."""
    sde, scales, T = catalog.VP(), 40, 5
    out = propagated(AnnealedLangevin(T), sde, scales, std=0.0, grid="log_snr")
    ratios = torch.exp(-sde.kernel.half_log_snr(torch.tensor([sde.T, sde.cutoff], dtype=double)))
    gamma = float(ratios[0] / ratios[1]) ** (1 / scales)
    e = matched_eps([gamma, 1.0], T)
    r, kept, v = 1 / (1 - e / 2), (1 - e) ** (2 * T), 1.0
    for _ in range(scales):
        v = kept * gamma**2 * v + r * (1 - kept)
    assert float(out) / float(true_covariance(sde, std=0.0)) == pytest.approx(v, rel=1e-6)


def test_annealed_langevin_finds_the_weights_of_distant_modes_and_langevin_does_not():
    """Modes 10 standard deviations apart with weights 0.8 and 0.2, within 4 standard errors; from equal starts."""
    sde, n = catalog.EDM(), 2000
    exact = GaussianMixture(sde, [[-2.5], [2.5]], [0.25, 0.25], torch.tensor([0.8, 0.2]))
    out = annealed_langevin(exact, (n, 1), geometric_scales(20.0, 0.05, 60), 20, seed=0)
    error = math.sqrt(0.8 * 0.2 / n)
    assert abs(float((out < 0).double().mean()) - 0.8) < 4 * error + 0.01
    start = torch.where(torch.arange(n)[:, None] % 2 == 0, -2.5, 2.5)
    stuck = langevin(exact, start, 1200, 0.02, t=0.05, seed=0)
    assert abs(float((stuck < 0).double().mean()) - 0.8) > 10 * error


def test_annealed_langevin_takes_coupled_states():
    """The law within the bias of its step and of its scales."""
    error = error_of(AnnealedLangevin(10), catalog.CriticallyDampedLangevin(), 150, event=(2, 1), grid="log_snr")
    assert error < 0.15


@pytest.mark.parametrize(
    "scales, options, match",
    [
        ([1.0, 2.0], {}, "falling"),
        ([200.0, 1.0], {}, "runs from"),
        ([1.0, 0.1], {"eps": 0.5}, "explode"),
        (None, {}, "either"),
        ([1.0, 0.1], {"times": [1.0, 0.1]}, "either"),
        ([1.0, 0.1], {"steps_per_scale": 0}, "at least 1"),
        ([1.0, 0.1], {"eps": -1.0}, "positive"),
    ],
)
def test_annealed_langevin_checks_its_options(scales, options, match):
    with pytest.raises(ValueError, match=match):
        annealed_langevin(ring(catalog.EDM()), (2, 2), scales, **options)
    with pytest.raises(ValueError, match="sde="):
        annealed_langevin(lambda state, time: -state, (2, 2), [1.0, 0.1])


@pytest.mark.parametrize("name", ["offset", "basis", "coupled"])
def test_annealed_langevin_returns_the_users_coordinates(name):
    """Data of one narrow mode, at 3 times (1, 2, 3, 4): found through an offset, a basis and a lifted state."""
    centre = 3.0 * torch.arange(1.0, 5.0)
    if name == "offset":
        sde, means, scales = catalog.OU(mu=7.0), centre[None], geometric_scales(20.0, 0.01, 40)
    elif name == "basis":
        sde, means = catalog.Blurring((2, 2)), centre.reshape(1, 1, 2, 2)
        scales = None
    else:
        sde, means = catalog.CriticallyDampedLangevin(), centre[None]
        scales = None
    times = (
        None if scales is not None else torch.linspace(1.0, 0.0, 40).double() ** 3 * (sde.T - sde.cutoff) + sde.cutoff
    )
    exact = GaussianMixture(sde, means, torch.full((1,), 0.01))
    shape = (50, 2, 4) if name == "coupled" else (50, *means.shape[1:])
    out = annealed_langevin(exact, shape, scales, seed=0, times=times)
    data = out[:, 0] if name == "coupled" else out
    torch.testing.assert_close(data.mean(0).flatten(), centre, rtol=0, atol=0.1)
    assert annealed_langevin(exact, (0, *shape[1:]), scales, seed=0, times=times).shape == (0, *shape[1:])


# ------------------------------------------------------------------------------------------------ restart

INNER = {"Heun": Heun(), "StochasticHeun": StochasticHeun(), "torchdiffeq": Torchdiffeq("heun2")}


@pytest.mark.parametrize("inner", INNER)
def test_restarts_keep_the_law(inner):
    solver = Restart(INNER[inner], [(0.05, 0.5, 2, 40), (0.5, 2.0, 3, 40)])
    assert error_of(solver, catalog.VP(), 400, grid="log_snr") < 1e-3


@pytest.mark.parametrize("name", ["VE", "per coordinate", "coupled"])
def test_restarts_keep_the_law_of_every_sde(name):
    declare, event = POINTS[name]
    assert error_of(Restart(Heun(), [(0.1, 0.5, 2, 60)]), declare(), 400, event=event) < 4e-3


def test_restarts_with_an_exponential_solver():
    """Which calls the score through a fixed grid; every call counts."""
    sde = catalog.VP()
    exact, counted = gaussian(sde, std=0.5), []
    options = {"grid": "log_snr", "on_grid": partial(exact.on_grid, dtype=double), "on_call": lambda: counted.append(1)}
    solver = Restart(Exponential(2, prediction="data"), [(0.1, 0.5, 2, 20)])
    assert error_of(solver, sde, 200, **options) < 1e-3
    assert len(counted) == 2 * 200


def test_restarts_with_an_adaptive_flow():
    assert error_of(Restart(Torchdiffeq("dopri5"), [(0.1, 0.5, 2, 1)]), catalog.VP(), None) < 1e-6


def test_a_restart_forgets_errors_as_it_should():
    """An excess of variance at T falls by (A S_low / S_high)² with each restart, A the transition's alpha."""
    sde, repeats = catalog.VP(), 3
    kernel, truth = sde.kernel, float(true_covariance(catalog.VP()))
    solver = Restart(Torchdiffeq("dopri5"), [(0.4, 0.8, repeats, 1)])
    start = 1.5 * float(covariance(kernel, torch.zeros(1, 1), kernel.T, 0.5).values)
    excess = float(propagated(solver, sde, None, start=torch.tensor([[start]], dtype=double))) / truth - 1
    ratios = torch.tensor([0.4, 0.8], dtype=double)
    alpha, sigma, _ = kernel.coefficients(kernel.time_of(-ratios.log()))
    S = (alpha.square() * 0.25 + sigma.square()).sqrt()
    factor = float(alpha[1] / alpha[0] * S[0] / S[1]) ** 2
    assert excess == pytest.approx(0.5 * factor**repeats, rel=1e-4)


def test_restart_counts_all_its_steps():
    calls = []

    def score(state, time):
        calls.append(float(time[0]))
        return -state

    sde = catalog.VP()
    solver = Restart(Heun(), [(0.05, 0.3, 2, 3)])
    sde.reverse(score, prior=sde.prior).sample((2, 3), solver, steps=20, seed=0)
    assert len(calls) == 40
    with pytest.raises(ValueError, match="too few"):
        sde.reverse(score, prior=sde.prior).sample((2, 3), solver, steps=7, seed=0)
    with pytest.raises(ValueError, match="not within"):
        sde.reverse(score, prior=sde.prior).sample((2, 3), Restart(Heun(), [(1.0, 1e9, 1, 1)]), steps=9, seed=0)
    with pytest.raises(ValueError, match="an interval is"):
        Restart(Heun(), [(0.3, 0.05, 1, 1)])
    with pytest.raises(ValueError, match="probability flow"):
        Restart(EulerMaruyama(), [])


# ------------------------------------------------------------------------------------------------ Gotta go fast


def broken(memory):
    """The mistake of drawing anew after a rejection."""
    memory.put_back = lambda rejected, length, increment: None
    return memory


@pytest.mark.parametrize("kind", ["right", "drawn anew"])
def test_steps_chosen_by_their_noise_leave_one_brownian_motion(kind):
    """Attempts are rejected where |ΔW| is large, twice over; W(1) must be N(0, 1) all the same."""
    n, stream = 4000, NoiseStream(0, "path")
    memory = _Memory(torch.zeros(n, 1, dtype=double))
    memory = memory if kind == "right" else broken(memory)
    t, w = torch.zeros(n, dtype=double), torch.zeros(n, 1, dtype=double)
    h = torch.full((n,), 0.3, dtype=double)
    for _ in range(2000):
        if bool((t >= 1.0).all()):
            break
        step, increment = memory.take(h, stream.normal((n, 1), double))
        good = increment[:, 0].abs() < 0.35
        memory.put_back(~good & (step > 0), step, increment)
        w = torch.where(good[:, None], w + increment, w)
        t = torch.where(good, torch.where(step >= (1 - t) * (1 - 1e-12), 1.0, t + step), t)
        h = torch.minimum(1.0 - t, torch.where(good, 2.0 * step, 0.5 * step).clamp_max(0.3))
    assert bool((t >= 1.0).all()) and (kind != "right" or len(memory.lengths) > 1)
    variance, p = float(w.var()), scipy.stats.kstest(w[:, 0].numpy(), "norm").pvalue
    if kind == "right":
        assert abs(variance - 1) < 4 * math.sqrt(2 / n) and p > 0.01
    else:
        assert abs(variance - 1) > 10 * math.sqrt(2 / n)


def variance_of(sde, tolerance, n=10_000, d=4, **options):
    """The variance relative to the truth, and the number of calls."""
    calls = []
    exact = gaussian(sde, std=0.5, d=d)

    def score(state, time):
        calls.append(1)
        return exact(state, time)

    reverse = sde.reverse(score, prior=sde.prior_for(0.0, 0.5))
    out = reverse.sample((n, d), GottaGoFast(**options), rtol=tolerance, atol=tolerance, seed=0, dtype=double)
    return float(out.square().mean() / sde.kernel.marginal(0.0, 0.5, sde.cutoff).std ** 2) - 1, len(calls)


def test_gotta_go_fast_samples_the_right_law_the_better_the_tighter():
    """Within 4 standard errors and 1 %, where a tolerance of 1 doubles the variance."""
    error = math.sqrt(2 / 40_000)
    coarse, few = variance_of(catalog.VP(), 1.0)
    fine, many = variance_of(catalog.VP(), 0.03)
    assert abs(fine) < 4 * error + 0.01 and coarse > 0.5
    assert few < many < 400


@pytest.mark.parametrize("name", ["VE", "EDM", "FlowMatching"])
def test_gotta_go_fast_takes_every_sde(name):
    excess, _ = variance_of(SDES[name](), 0.05, n=3000)
    assert abs(excess) < 4 * math.sqrt(2 / 12_000) + 0.02


def test_noise_drawn_anew_after_a_rejection_is_found(monkeypatch):
    """What the published code does: the variance is too large, by more the tighter the tolerance."""
    monkeypatch.setattr(_Memory, "put_back", lambda self, rejected, length, increment: None)
    assert variance_of(catalog.VP(), 0.05, n=4000)[0] > 0.1


def test_a_sample_of_gotta_go_fast_does_not_depend_on_its_batch():
    sde = catalog.VP()
    reverse = sde.reverse(ring(sde))
    options = {"rtol": 0.05, "atol": 0.02, "seed": 0, "dtype": double}
    alone = reverse.sample((1, 2), GottaGoFast(), **options)
    torch.testing.assert_close(reverse.sample((9, 2), GottaGoFast(), **options)[:1], alone, rtol=1e-9, atol=1e-9)


def test_rounding_does_not_grow_in_the_steps_of_gotta_go_fast():
    """Where a step's length follows E to the last digit, these differ by 5e-12, and more of them by 1e-3."""
    sde = catalog.VP()
    means = torch.tensor([[-1.0, 0.0, 0.3], [1.0, 0.5, 0.0]], dtype=double)
    reverse = sde.reverse(GaussianMixture(sde, means, torch.tensor([0.04, 0.01], dtype=double)))
    options = {"rtol": 0.05, "atol": 0.02, "seed": 3, "dtype": double}
    whole, parts = (reverse.sample((20, 3), GottaGoFast(), chunk=n, **options) for n in (20, 7))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)


def test_gotta_go_fast_takes_coupled_states():
    sde, n = catalog.CriticallyDampedLangevin(), 1500
    kernel = sde.kernel
    root = dense(covariance(kernel, torch.zeros(1, 2, 1), kernel.T, 0.5), (2, 1))
    start = NoiseStream(1, "start").normal((n, 2), double) @ torch.linalg.cholesky(root).mT

    def score(u, t):  # P_t of each sample's own time
        path = kernel.path(u, t)
        spread = (path.alpha @ kernel.scale(torch.tensor(0.5, dtype=double), u)).gram
        return -(spread + path.sigma.gram).inverse(u)

    problem = problem_of(kernel, NoiseStream(0, "path"), (2, 1), score=score)
    with torch.no_grad():
        out = GottaGoFast().solve(problem, start, None, 0.05, 0.02)
    truth = true_covariance(sde, event=(2, 1)).diagonal()
    excess = out.square().mean(0) / truth - 1
    assert float(excess.abs().max()) < 4 * math.sqrt(2 / n) + 0.03


def test_gotta_go_fast_keeps_within_its_budget():
    sde = catalog.VP()
    with pytest.raises(sdeflow.errors.MaxStepsError):
        sde.reverse(ring(sde)).sample((4, 2), GottaGoFast(), rtol=1e-3, atol=1e-3, seed=0, max_calls=50)


# ------------------------------------------------------------------------------------------------ what all promise

STOCHASTIC = {
    "EulerMaruyama": EulerMaruyama(),
    "StochasticHeun": StochasticHeun(S_churn=4.0),
    "PredictorCorrector": PredictorCorrector(),
    "ancestral": PredictorCorrector("ancestral", corrector_steps=2, step="kernel"),
    "AnnealedLangevin": AnnealedLangevin(3),
    "Restart": Restart(Heun(), [(0.05, 0.3, 2, 3)]),
    "GottaGoFast": GottaGoFast(),
    "Exponential": Exponential(2, eta=1.0),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_sampler_keeps_its_promises(name):
    """Calls as declared and within [cutoff, T], the state's dtype, reproducible, a sample alone or in a batch."""
    solver, sde, times = STOCHASTIC[name], catalog.VP(), []
    exact = ring(sde)

    def score(state, time):
        times.extend([float(time.min()), float(time.max())])
        return exact(state, time)

    reverse = sde.reverse(score, prior=sde.prior)
    options = {"rtol": 0.1, "atol": 0.1} if solver.adaptive else {"steps": 14}
    out = reverse.sample((6, 2), solver, seed=1, **options)
    assert out.dtype == torch.float32 and bool(torch.isfinite(out).all())
    assert min(times) >= sde.cutoff * (1 - 1e-6) and max(times) <= sde.T * (1 + 1e-6)
    if not solver.adaptive:
        assert len(times) == 2 * 14 * solver.calls_per_step
    torch.testing.assert_close(reverse.sample((2, 2), solver, seed=1, **options), out[:2], rtol=1e-4, atol=1e-5)
    assert not torch.equal(reverse.sample((6, 2), solver, seed=2, **options), out)
    assert solver.stochastic and solver.kinds == ("sde",)
    with pytest.raises(ValueError, match="does not solve"):
        sde.flow_ode(exact).decode(out, solver, **options)


@pytest.mark.parametrize(
    "solver", [v for k, v in STOCHASTIC.items() if k != "Exponential"] + [StochasticHeun()], ids=repr
)
def test_every_step_is_observed(solver):
    sde, seen = catalog.VP(), []
    kernel = sde.kernel

    def drift(y, t):
        a, _, q = kernel.equation(y, t)
        return a(y) - q(exact_score(kernel, 0.5)(y, t))

    problem = problem_of(
        kernel, NoiseStream(0, "path"), (2,), score=lambda u, t: -u,
        field=Field(drift, Diffusion(lambda y, t: kernel.equation(y, t)[2].values.sqrt())),
        on_step=lambda step, t, y: seen.append((step, t, tuple(y.shape))),
    )  # fmt: skip
    steps = None if solver.adaptive else 12
    with torch.no_grad():
        out = solver.solve(problem, torch.ones(3, 2, dtype=double), steps, 0.1, 0.1)
    assert out.shape == (3, 2)
    assert [step for step, _, _ in seen] == list(range(1, len(seen) + 1)) and {shape for *_, shape in seen} == {(3, 2)}
    assert solver.adaptive or len(seen) == steps
    assert seen[-1][1] == pytest.approx(sde.cutoff, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "StochasticHeun"])
def test_components_that_share_their_noise_stay_in_order(name):
    """Components at 5 and -5, under a matrix of noise."""
    sde, solver = COUPLED["noise matrix"](), STOCHASTIC[name]
    exact = GaussianMixture(sde, torch.tensor([[[5.0] * 3, [-5.0] * 3]]), torch.full((1, 2, 3), 0.01))
    options = {"rtol": 0.1, "atol": 0.1} if solver.adaptive else {"steps": 30}
    out = sde.reverse(exact).sample((4, 2, 3), solver, seed=0, **options)
    assert bool((out[:, 0] > 0).all()) and bool((out[:, 1] < 0).all())


def test_noise_ratios_of_a_coupled_state_are_refused_where_they_mean_nothing():
    sde = catalog.CriticallyDampedLangevin()
    with pytest.raises(ValueError, match="coupled state"):
        sde.reverse(lambda u, t: -u, prior=sde.prior).sample((2, 2, 1), StochasticHeun(), steps=3, seed=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StochasticHeun(S_churn=-1.0),
        lambda: StochasticHeun(S_min=2.0, S_max=1.0),
        lambda: StochasticHeun(S_noise=math.inf),
        lambda: PredictorCorrector("euler"),
        lambda: PredictorCorrector(corrector_steps=-1),
        lambda: PredictorCorrector("none", 0),
        lambda: PredictorCorrector(snr=1.5),
        lambda: PredictorCorrector(step="fixed"),
        lambda: AnnealedLangevin(0),
        lambda: AnnealedLangevin(eps=0.0),
        lambda: GottaGoFast(safety=1.0),
        lambda: GottaGoFast(exponent=0.0),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: StochasticHeun(S_noise=1.003), "S_noise"),
        (lambda: PredictorCorrector(corrector_steps=0, snr=0.3), "snr"),
        (lambda: PredictorCorrector(corrector_steps=0, step="snr"), "corrector"),
        (lambda: Torchsde("euler", initial_steps=50), "initial_steps"),
        (lambda: Torchdiffeq("rk4", scipy="LSODA"), "scipy"),
        (lambda: SingleStep(3, ratio=0.3), "ratio"),
        (lambda: SingleStep(1, rule="midpoint"), "midpoint"),
        (lambda: Exponential(basis=Orthogonal(torch.eye(2))), "basis"),
    ],
)
def test_options_that_would_change_nothing_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_tolerances_of_a_method_that_does_not_iterate_are_refused():
    sde = catalog.VP()
    flow = sde.flow_ode(lambda u, t: -u, prior=sde.prior)
    with pytest.raises(ValueError, match="rtol and atol mean nothing"):
        flow.sample((2, 1), "explicit_adams", steps=10, rtol=1e-3)


def test_reversible_heun_says_where_its_two_states_come_apart():
    gentle, stiff = sdeflow.SDE(-sdeflow.x, math.sqrt(2.0), T=1.0), sdeflow.catalog.CosineVP()
    means = torch.tensor([[-2.0], [1.0]], dtype=torch.float64)
    for sde, variance in ((gentle, 1.0), (stiff, 0.01)):
        exact = sdeflow.scores.GaussianMixture(sde, means if variance < 1 else 0 * means, torch.full((2,), variance))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sde.reverse(exact).sample((200, 1), "reversible_heun", 100, seed=0, dtype=torch.float64)
        assert any("come apart" in str(warning.message) for warning in told) == (sde is stiff)
