"""Perturbation kernels against the moment ODE, Fokker-Planck, and closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import sympy as sp
import torch
from problems import AWKWARD, CATALOGUE, cpu_seconds
from scipy.integrate import solve_ivp
from sympy.codegen.rewriting import expm1_opt, optimize

import sdeflow
from sdeflow import SDE, t, x, x_0
from sdeflow.errors import ScheduleError
from sdeflow.kernels.gaussian import Kernel
from sdeflow.symbolic.declaration import Declaration

EVERY = {**CATALOGUE, **AWKWARD}


def moment_ode(sde, times):
    """log alpha, variance and offset at ``times``, by an ODE solver that shares no code with sdeflow.

    It runs in u = log t from t = 1e-40 T, where whatever the moments have gathered is below rounding later on.
    """
    values = {k: sp.Float(v, 30) for k, v in sde.values.items()}
    stable = (optimize(e.subs(values), [expm1_opt]) for e in (*sde.declaration.affine, sde.declaration.g))
    a, b, g = (sp.lambdify(t, e, ["scipy", "numpy"]) for e in stable)

    def rhs(u, y):
        at = np.exp(u)
        return [at * a(at), at * (2 * a(at) * y[1] + g(at) ** 2), at * (a(at) * y[2] + b(at))]

    start = 1e-40 * sde.T
    y = np.array([0.0, sde.declaration.P0 + start * g(start) ** 2, 0.0])
    kinks = [p for p in (0.3, 1 / 3, 0.5) if p < sde.T]
    breaks = sorted({start, *times, *kinks})
    found = {}
    for low, high in pairwise(breaks):
        solved = solve_ivp(rhs, (np.log(low), np.log(high)), y, method="DOP853", rtol=1e-13, atol=[1e-14, 1e-30, 1e-14])
        y = found[high] = solved.y[:, -1]
    return np.array([found[at] for at in times]).T


@pytest.mark.parametrize("name", EVERY)
def test_moments_agree_with_the_moment_ode(name):
    sde = EVERY[name]()
    kernel = sde.kernel
    first = max(kernel.cutoff, 1e-8 * sde.T)
    times = [*np.geomspace(first, sde.T, 9)[:-1], sde.T]
    log_alpha, var, offset = moment_ode(sde, times)
    alpha, sigma, shift = (c.numpy() for c in kernel.coefficients(torch.tensor(times, dtype=torch.float64)))
    np.testing.assert_allclose(alpha, np.exp(log_alpha), rtol=1e-10)
    np.testing.assert_allclose(sigma**2, var, rtol=2e-10)  # that is 1e-10 of sigma
    np.testing.assert_allclose(shift, offset, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", CATALOGUE)
def test_quadrature_and_closed_form_agree_down_to_the_cutoff(name):
    kernel = CATALOGUE[name]().kernel
    assert kernel.form == "closed"
    times = torch.as_tensor(np.geomspace(max(kernel.cutoff, 1e-6 * kernel.T), kernel.T, 400))
    log_alpha, var, _ = kernel.numbers.table(times)
    alpha, sigma, _ = kernel.coefficients(times)
    assert ((alpha / log_alpha.exp() - 1).abs() < 1e-10).all()
    assert ((sigma / var.sqrt() - 1).abs() < 1e-10).all()


def test_the_comparison_rejects_a_wrong_closed_form(monkeypatch):
    """A mistake in a rule cannot become a number: the kernel falls back to quadrature."""
    from dataclasses import replace

    import sdeflow.kernels.gaussian as module

    derive = module.derive_moments
    monkeypatch.setattr(module, "derive_moments", lambda *args: replace(derive(*args), var=1.001 * derive(*args).var))
    kernel = sdeflow.catalog.VP().kernel
    assert kernel.form == "quadrature"
    _, sigma, _ = kernel.coefficients(torch.tensor(0.5, dtype=torch.float64))
    assert abs(float(sigma) - np.sqrt(-np.expm1(-0.05 - 19.9 / 8))) < 1e-12


@pytest.mark.parametrize(
    ("name", "alpha", "std"),
    [
        (
            "VP",
            sp.exp(-t / 20 - sp.Rational(199, 40) * t**2),
            sp.sqrt(1 - sp.exp(-t / 10 - sp.Rational(199, 20) * t**2)),
        ),
        ("SubVP", sp.exp(-t / 20 - sp.Rational(199, 40) * t**2), 1 - sp.exp(-t / 10 - sp.Rational(199, 20) * t**2)),
        ("VE", sp.Integer(1), sp.Rational(1, 100) * 5000**t),
        ("CosineVP", sp.cos(sp.pi * t / 2), sp.sin(sp.pi * t / 2)),
        ("OU", sp.exp(-t), sp.sqrt(1 - sp.exp(-2 * t))),
        ("EDM", sp.Integer(1), t),
        ("FlowMatching", 1 - t, t),
    ],
)
def test_catalogue_kernels_are_those_of_the_literature(name, alpha, std):
    kernel = CATALOGUE[name]().kernel
    for ours, theirs in ((kernel.alpha, alpha), (kernel.std, std), (kernel.log_snr, 2 * sp.log(alpha / std))):
        for value in (sp.Rational(1, 20), sp.Rational(2, 5), sp.Rational(9, 10)):
            assert abs((ours - theirs).subs(t, value).evalf(25)) < 1e-18 * (1 + abs(theirs.subs(t, value).evalf()))
    assert kernel.mean == kernel.alpha * x_0


def fokker_planck_residual(kernel, sde, points=2000, seed=0):
    """Median of |∂p/∂t + ∂(f p)/∂x - ½ ∂²(g² p)/∂x²| relative to its largest term, for a diffused mixture.

    p is built from the compiled kernel's numbers; time is differenced by a sixth-order stencil.
    """
    rng = np.random.default_rng(seed)
    means, stds, weights = np.array([-1.0, 0.3, 1.2]), np.array([0.3, 0.5, 0.2]), np.array([0.3, 0.5, 0.2])
    low, high = max(kernel.cutoff, 0.05 * sde.T), 0.95 * sde.T
    times = rng.uniform(low, high, points)

    def parts(s):
        alpha, sigma, offset = (c.numpy() for c in kernel.coefficients(torch.as_tensor(s)))
        return alpha[:, None] * means + offset[:, None], (alpha[:, None] * stds) ** 2 + sigma[:, None] ** 2

    mean, var = parts(times)
    at = mean[np.arange(points), rng.integers(0, 3, points)] + np.sqrt(var.mean(1)) * rng.standard_normal(points)

    def density(s):
        mean, var = parts(s)
        return (weights * np.exp(-0.5 * (at[:, None] - mean) ** 2 / var) / np.sqrt(2 * np.pi * var)).sum(1)

    h = 1e-3 * np.minimum(times, sde.T - times)
    dp_dt = (
        sum(c * (density(times + k * h) - density(times - k * h)) for k, c in ((1, 0.75), (2, -0.15), (3, 1 / 60))) / h
    )
    normal = weights * np.exp(-0.5 * (at[:, None] - mean) ** 2 / var) / np.sqrt(2 * np.pi * var)
    z = -(at[:, None] - mean) / var
    p, dp, d2p = normal.sum(1), (normal * z).sum(1), (normal * (z**2 - 1 / var)).sum(1)
    a, b, q = (c.numpy() for c in kernel.sde_coefficients(torch.as_tensor(times)))
    terms = np.stack([dp_dt, a * p + (a * at + b) * dp, -0.5 * q * d2p])
    return float(np.median(np.abs(terms.sum(0)) / np.abs(terms).max(0)))


@pytest.mark.parametrize("name", [*CATALOGUE, "sigmoid", "sine squared", "Bessel", "offset drift", "initial variance"])
def test_marginals_satisfy_fokker_planck(name):
    sde = EVERY[name]()
    assert fokker_planck_residual(sde.kernel, sde) < 1e-6


@pytest.mark.parametrize("mistake", ["variance", "diffusion", "drift"])
def test_fokker_planck_finds_planted_mistakes(mistake):
    sde = sdeflow.catalog.VP()

    class Wrong:
        cutoff = sde.kernel.cutoff

        def coefficients(self, s):
            alpha, sigma, offset = sde.kernel.coefficients(s)
            return alpha, sigma * (1.005 if mistake == "variance" else 1.0), offset

        def sde_coefficients(self, s):
            a, b, q = sde.kernel.sde_coefficients(s)
            return a * (1.02 if mistake == "drift" else 1.0), b, q * (1.02 if mistake == "diffusion" else 1.0)

    assert fokker_planck_residual(Wrong(), sde) > 1e-3


@pytest.mark.parametrize("name", AWKWARD)
def test_no_schedule_hangs(name):
    AWKWARD[name]()
    start = cpu_seconds()
    AWKWARD[name]()
    assert cpu_seconds() - start < 3.0


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "CosineVP", "EDM", "FlowMatching", "sigmoid", "piecewise"])
def test_time_of_inverts_the_half_log_snr(name):
    kernel = EVERY[name]().kernel
    ends = kernel.half_log_snr(torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64))
    target = torch.linspace(float(ends[0]), float(ends[1]), 301, dtype=torch.float64)
    times = kernel.time_of(target)
    assert float((kernel.half_log_snr(times) - target).abs().max()) < 1e-11
    assert times.min() >= kernel.cutoff
    assert times.max() <= kernel.T


@pytest.mark.parametrize("name", ["VP", "FlowMatching", "EDM"])
def test_steps_read_nothing_from_an_accelerator(name):
    """On the device "meta", whose numbers cannot be read: what would wait for an accelerator is an error there."""
    kernel = CATALOGUE[name]().kernel
    state, level = torch.zeros(3, 2, device="meta"), torch.zeros(5, dtype=torch.float64, device="meta")
    for later in (0.5, 0.10001):  # by a difference, and by quadrature
        path = kernel.transition(state, 0.1 * kernel.T, later * kernel.T)
        assert {part.device.type for part in (path.alpha.values, path.sigma.values, path.offset)} == {"meta"}
    found = kernel.time_of(level)
    assert found.device.type == "meta" and found.shape == level.shape


def test_time_of_survives_a_flat_log_snr():
    sde = SDE(-x, sp.Piecewise((1, t < 0.5), (0, t < 0.6), (1, True)))
    kernel = sde.kernel
    target = kernel.half_log_snr(torch.tensor([0.2, 0.55, 0.9], dtype=torch.float64))
    assert float((kernel.half_log_snr(kernel.time_of(target)) - target).abs().max()) < 1e-10


def test_negative_diffusion_is_the_same_sde():
    one, other = SDE(-x, 1 + t).kernel, SDE(-x, -1 - t).kernel
    times = torch.linspace(0.01, 1, 20, dtype=torch.float64)
    for u, v in zip(one.coefficients(times), other.coefficients(times), strict=True):
        assert torch.equal(u, v)


def test_default_cutoff_and_given_cutoff():
    kernel = sdeflow.catalog.VP().kernel
    alpha, sigma, _ = kernel.coefficients(torch.tensor(kernel.cutoff, dtype=torch.float64))
    assert abs(float(sigma / alpha) - 2e-3) < 1e-12
    assert sdeflow.catalog.VE().cutoff == 0.0
    assert SDE(-x, 1, cutoff=0.01).cutoff == 0.01


def test_sample_log_prob_and_score_are_one_distribution():
    sde = sdeflow.catalog.SubVP()
    data = torch.randn(4, 3, 5, dtype=torch.float64)
    times = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    mean, std = sde.kernel.moments(data, times)
    assert mean.shape == data.shape
    assert std.shape == (4, 1, 1)
    state = sde.kernel.sample(data, times, seed=3).requires_grad_()
    truth = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(state).flatten(1).sum(1)
    torch.testing.assert_close(sde.kernel.log_prob(state, data, times), truth, rtol=1e-13, atol=1e-12)
    (gradient,) = torch.autograd.grad(truth.sum(), state)
    torch.testing.assert_close(sde.kernel.score(state, data, times), gradient, rtol=1e-12, atol=1e-12)


def test_sampled_moments_match_within_their_standard_errors():
    sde = sdeflow.catalog.VP()
    n = 200_000
    state = sde.kernel.sample(torch.full((n, 1), 0.7, dtype=torch.float64), 0.2, seed=0)
    alpha, sigma, _ = sde.kernel.coefficients(torch.tensor(0.2, dtype=torch.float64))
    assert abs(float(state.mean() - 0.7 * alpha)) < 4 * float(sigma) / n**0.5
    assert abs(float(state.var() / sigma**2 - 1)) < 4 * (2 / n) ** 0.5


def test_weightings_and_prior():
    sde = SDE(-t * x, sp.exp(t))
    assert sp.simplify(sde.weighting - sde.kernel.var) == 0
    assert sde.likelihood_weighting == sp.exp(t) ** 2
    prior = sde.prior_for(2.0, 0.5)
    alpha, sigma, _ = sde.kernel.coefficients(torch.tensor(1.0, dtype=torch.float64))
    assert abs(float(prior.mean - 2 * alpha)) < 1e-14
    assert abs(float(prior.std**2 - (0.25 * alpha**2 + sigma**2))) < 1e-14
    assert abs(float(sde.prior.std - sigma)) < 1e-14


def test_the_weighting_is_the_inverse_mean_squared_score():
    """1 / E|∇ log p(x_t | x_0)|² by Monte Carlo, within four standard errors."""
    sde = sdeflow.catalog.SubVP()
    n, s = 100_000, 0.4
    data = torch.zeros(n, 1, dtype=torch.float64)
    squared = sde.kernel.score(sde.kernel.sample(data, s, seed=1), data, s).square()
    error = float(squared.std() / n**0.5 / squared.mean())
    assert abs(float(squared.mean()) * float(sde.weighting.subs(t, s)) - 1) < 4 * error


def test_what_sympy_can_integrate_is_shown_and_what_it_cannot_stays_an_integral():
    shown = SDE(-(t**2) * x, 1).kernel
    assert shown.form == "quadrature"
    assert not shown.alpha.has(sp.Integral)
    assert abs(float(shown.alpha.subs(t, 0.7)) - np.exp(-(0.7**3) / 3)) < 1e-12
    start = cpu_seconds()
    hidden = SDE(-(1 + sp.sin(3 * t) ** 2) / 2 * x, sp.sqrt(1 + sp.cos(t))).kernel
    assert hidden.var.has(sp.Integral)
    assert cpu_seconds() - start < 4.0


def test_an_integral_that_stays_is_the_truth():
    kernel = SDE(-sp.exp(sp.sin(t)) * x, sp.cos(t) + 2).kernel
    assert kernel.alpha.has(sp.Integral)
    expected = float(kernel.coefficients(torch.tensor(0.5, dtype=torch.float64))[0])
    assert abs(float(kernel.alpha.subs(t, sp.Rational(1, 2)).evalf(14)) - expected) < 1e-12


def test_a_kernel_follows_its_parameters():
    k = sp.Symbol("k")
    sde = SDE(-k * x, 1, params={k: 1.0})
    other = sde.with_params(k=2.0)
    assert other.declaration is sde.declaration
    for model, value in ((sde, 1.0), (other, 2.0)):
        alpha, sigma, _ = model.kernel.coefficients(torch.tensor(0.5, dtype=torch.float64))
        assert abs(float(alpha) - np.exp(-0.5 * value)) < 1e-13
        assert abs(float(sigma) ** 2 + np.expm1(-value) / (2 * value)) < 1e-13


def test_a_declaration_alone_builds_a_kernel():
    kernel = Kernel(Declaration(-x, sp.Integer(1)))
    assert kernel.form == "closed"


def test_float32_states_near_the_cutoff_keep_their_digits():
    sde = sdeflow.catalog.VP(0.1, 20.0)
    times = torch.tensor([4e-5, 1e-4, 1e-3], dtype=torch.float64)
    _, std = sde.kernel.moments(torch.zeros(3, 1, dtype=torch.float32), times)
    exact = np.sqrt(-np.expm1(-(0.1 * times.numpy() + 9.95 * times.numpy() ** 2)))
    np.testing.assert_allclose(std[:, 0].numpy(), exact, rtol=1e-7)


@pytest.mark.parametrize("centre", [0.31, 0.5, 0.7])
def test_a_narrow_feature_is_not_missed(centre):
    width = 2000
    sde = SDE(0, sp.sqrt(1 + 30 * sp.exp(-(((t - centre) * width) ** 2))))
    truth = 1 + 30 * np.sqrt(np.pi) / width
    assert abs(float(sde.kernel.coefficients(torch.tensor(1.0, dtype=torch.float64))[1]) ** 2 / truth - 1) < 1e-10


def test_parameters_at_which_a_rule_divides_by_zero():
    """dx = -k x dt + dw at k = 0 is Brownian motion."""
    k = sp.Symbol("k")
    for sde in (SDE(-k * x, 1, params={k: 0.0}), SDE(-k * x, 1, params={k: 1.0}).with_params(k=0.0)):
        assert sde.kernel.form == "quadrature"
        alpha, sigma, _ = sde.kernel.coefficients(torch.tensor(0.5, dtype=torch.float64))
        assert abs(float(alpha) - 1) < 1e-14
        assert abs(float(sigma) ** 2 - 0.5) < 1e-13
        assert not sde.kernel.var.has(sp.zoo, sp.nan)


@pytest.mark.parametrize(("f", "g"), [(-x, t), (-x + t**2, 1)])
def test_a_closed_form_that_cancels_below_the_cutoff_is_not_used(f, g):
    kernel = SDE(f, g).kernel
    times = torch.tensor([1e-6, 1e-5, 1e-4], dtype=torch.float64)
    _, sigma, offset = kernel.coefficients(times)
    leading = times**1.5 / 3**0.5 if g == t else times**0.5  # of sigma for small t
    assert ((sigma / leading - 1).abs() < 2e-4).all()
    if g != t:
        assert ((offset / (times**3 / 3) - 1).abs() < 1e-4).all()
    assert not kernel.var.has(sp.Integral)  # the formula is still shown


def test_a_wrong_formula_is_not_shown(monkeypatch):
    from dataclasses import replace

    import sdeflow.kernels.gaussian as module

    derive = module.derive_moments
    monkeypatch.setattr(module, "derive_moments", lambda *args: replace(derive(*args), var=1.001 * derive(*args).var))
    kernel = SDE(-x, 1).kernel
    assert abs(float(kernel.var.subs(t, sp.Rational(1, 2)).evalf(12)) - (1 - np.exp(-1)) / 2) < 1e-10


def test_gradients_in_time_are_finite_everywhere():
    kernel = SDE(-sp.tanh(t) * x, 1).kernel
    for at in (0.25, 0.5, 1.0):
        time = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(kernel.half_log_snr(time), time)
        expected = float(kernel.half_log_snr_rate(torch.tensor(at, dtype=torch.float64)))
        assert abs(float(slope) / expected - 1) < 1e-6


def test_kernels_and_scores_pickle():
    import pickle

    sde = SDE(-x, 1)
    other = pickle.loads(pickle.dumps(sde))
    times = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    assert torch.equal(other.kernel.half_log_snr(times), sde.kernel.half_log_snr(times))


def test_a_transition_keeps_its_digits_after_a_great_stretch_of_noise():
    """Known variances of Brownian motion, where the noise since s is a tiny share of that at t."""
    half, least = sp.Rational(1, 2), sp.Rational(1, 10**7)
    k = sp.Symbol("k", positive=True)
    state = torch.zeros(1, 2, dtype=torch.float64)
    noise = sp.Piecewise((k, t < half), (least, True))
    sde = SDE(0, sp.sqrt(noise), params={"k": torch.tensor([1.0, 1e9], dtype=torch.float64)})
    for s, later in ((0.6, 0.61), (0.999, 0.99999), (0.4, 0.6)):
        var = sde.kernel.transition(state, s, later).sigma.values.square()
        before = max(0.5 - s, 0.0) * torch.tensor([1.0, 1e9], dtype=torch.float64)
        expected = before + (later - max(s, 0.5)) * 1e-7
        torch.testing.assert_close(var.reshape(-1), expected, rtol=1e-8, atol=0.0)
    ornstein = SDE(1 - x, sp.sqrt(sp.Piecewise((10**9, t < half), (1, True))))
    path = ornstein.kernel.transition(state, 0.7, 0.701)
    for value, known in ((path.alpha.values, math.exp(-1e-3)), (path.offset, -math.expm1(-1e-3))):
        assert float(value) == pytest.approx(known, rel=1e-11)
    assert float(path.sigma.values.square()) == pytest.approx(-0.5 * math.expm1(-2e-3), rel=1e-11)
    # The bridge to a point: the variance (Q - r) r / Q, with r what is still to come of Q.
    sde = SDE(0, sp.sqrt(1 + 10**9 * sp.Piecewise((1, t < half), (0, True))))
    whole, rest = 5e8 + 1.0, 1e-3
    std = float(sde.bridge(0.5).moments(state[:, :1], 0.999)[1])
    assert std == pytest.approx(math.sqrt((whole - rest) * rest / whole), rel=1e-9)


@pytest.mark.parametrize(
    "jump",
    [
        lambda k: sp.Piecewise((3 * k, t < k), (1, True)),
        lambda k: 1 + sp.Heaviside(t - k),
        lambda k: 1 + sp.floor(t / k),
        lambda k: 2 + sp.sign(t - k),
        lambda k: 1 + sp.Mod(t, k),
    ],
)
def test_a_break_point_that_moves_with_a_learned_parameter_is_refused(jump):
    """Its gradient would miss the boundary term; the values alone are right."""
    k, one = sp.Symbol("k", positive=True), torch.tensor(1.0, dtype=torch.float64)
    value = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    sde = SDE(-x, sp.sqrt(jump(k)), params={"k": value})
    with pytest.raises(ScheduleError, match="parameter k requires a gradient and moves a break point"):
        sde.kernel.coefficients(one)
    with torch.no_grad():
        sigma = sde.kernel.coefficients(one)[1]
    assert float(sigma) == pytest.approx(float(SDE(-x, sp.sqrt(jump(0.37))).kernel.coefficients(one)[1]), rel=1e-10)


def test_a_bend_that_moves_with_a_learned_parameter_has_a_gradient():
    """∫ Min(t, k) dt over [0, 1] is k - k²/2."""
    k, one = sp.Symbol("k", positive=True), torch.tensor(1.0, dtype=torch.float64)
    value = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    sde = SDE(0, sp.sqrt(sp.Min(t, k)), params={"k": value})
    (gradient,) = torch.autograd.grad(sde.kernel.coefficients(one)[1].square(), value)
    assert float(gradient) == pytest.approx(1.0 - 0.37, rel=1e-10)


def test_a_bridge_adds_the_noise_at_the_start_once():
    """With P0 > 0, a path that is asked at t = 0 too has the same law later: v_s (T - s) / v_T with v = P0 + t."""
    sde = SDE(0, 1, P0=0.5)
    x_0, n = torch.zeros(20_000, 1, dtype=torch.float64), 20_000
    first, later = sde.bridge(torch.zeros(1, dtype=torch.float64)).paths(x_0, [0.0, 0.5], seed=0)
    for found, expected in ((first, 0.5 * 1.0 / 1.5), (later, 1.0 * 0.5 / 1.5)):
        assert abs(float(found.square().mean()) - expected) < 4 * expected * (2 / n) ** 0.5
