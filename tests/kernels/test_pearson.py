"""Kernels of square-root and Jacobi diffusions: mass, Fokker-Planck, Chapman-Kolmogorov, scores, moments, draws."""

import functools
import math
import pickle

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch
from densities import case, fokker_planck_residual, log_density, numbers_of, quadrature, require_draws, score_error
from scipy.integrate import solve_ivp
from scipy.special import ndtr
from scipy.stats import beta, chi2, ncx2

from sdeflow import SDE, t, x, x_0
from sdeflow.errors import DataError, DeclarationError, NotAffineError, ScheduleError
from sdeflow.kernels.jacobi import JacobiKernel
from sdeflow.kernels.pearson import pearson_kernel
from sdeflow.kernels.reducible import ReducibleKernel
from sdeflow.kernels.square_root import SquareRootKernel
from sdeflow.numerics.noncentral import log_bessel
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.pearson import classify

kappa, theta, sigma = sp.symbols("kappa theta sigma")
VALUES = {kappa: 1.2, theta: 0.7, sigma: 0.8}
TIMES = (0.05, 0.5)
ROOT = sigma * sp.sqrt(x)


def on_half_line(f, g, start, end=2.2, steady=True):
    return case(f, g, start, np.square, lambda z: 2 * z, (0, end), steady)


def on_interval(f, g, start, low=0.0, high=1.0, steady=True):
    """The ends, where the density may be singular, are approached as z³."""

    def to_x(z):
        return low + (high - low) * z**3 / (z**3 + (1 - z) ** 3)

    def slope(z):
        return (high - low) * 3 * z**2 * (1 - z) ** 2 / (z**3 + (1 - z) ** 3) ** 2

    return case(f, g, start, to_x, slope, (0, 1), steady)


SQUARE_ROOT = {
    "CIR": on_half_line(kappa * (theta - x), ROOT, 0.4),
    "CIR that hits 0": case(
        kappa * (theta / 2 - x), 2 * ROOT, 0.3, lambda z: z**6, lambda z: 6 * z**5, (0, 1.7)
    ),  # delta = 0.66
    "squared Bessel": on_half_line(sp.Integer(3), 2 * sp.sqrt(x), 0.5, 6),
    "CIR with coefficients of time": on_half_line(
        theta * (1 + t) - sp.sin(4 * t) * x, sigma * sp.sqrt((1 + t) * x), 0.4, 3, steady=False
    ),
    "shifted": case(
        kappa * (theta - x), sigma * sp.sqrt(x + 1), -0.2, lambda z: z**2 - 1, lambda z: 2 * z, (0, 3)
    ),
    "falling": case(
        kappa * (theta - x), sigma * sp.sqrt(2 - x), 0.9, lambda z: 2 - z**2, lambda z: 2 * z, (0, 3)
    ),
}  # fmt: skip
JACOBI = {
    "Jacobi": on_interval(kappa * (theta - x), sigma * sp.sqrt(x * (1 - x)), 0.4),
    "Jacobi that hits its ends": on_interval(0.6 - 1.2 * x, ROOT * sp.sqrt(2 - 2 * x), 0.4),
    "on [-1, 2]": on_interval(-x, sp.sqrt((x + 1) * (2 - x)), 0.7, -1.0, 2.0),
    "with a clock": on_interval(
        (1 + sp.sin(3 * t)) * kappa * (theta - x), sigma * sp.sqrt((1 + sp.sin(3 * t)) * x * (1 - x)), 0.6, steady=False
    ),
}
CASES = {**SQUARE_ROOT, **JACOBI}


@functools.cache
def build(name):
    example = CASES[name]
    return pearson_kernel(Declaration(example.f, example.g, parameters=tuple(VALUES)), VALUES)


@pytest.mark.parametrize("time", [0.15, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_the_density_has_mass_one_and_the_moments_that_the_kernel_tells(name, time):
    example, kernel = CASES[name], build(name)
    assert isinstance(kernel, SquareRootKernel if name in SQUARE_ROOT else JacobiKernel)
    mass, mean, std = numbers_of(kernel, example.start, time, example)
    told = [float(m) for m in kernel.moments(torch.tensor([[example.start]], dtype=torch.float64), time)]
    assert abs(mass - 1) < 1e-8
    np.testing.assert_allclose(told, [mean, std], rtol=1e-7)
    if example.steady:
        shown = [float(e.subs({**VALUES, x_0: example.start, t: time}).evalf(15)) for e in (kernel.mean, kernel.std)]
        np.testing.assert_allclose(shown, told, rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_moments_solve_the_moment_equation(name):
    """E[x]' = a E[x] + b and E[x²]' = 2 (a E[x²] + b E[x]) + E[g²], by an ODE solver."""
    example, kernel = CASES[name], build(name)
    f, square = (sp.Poly(sp.expand(e.subs(VALUES)), x).all_coeffs()[::-1] for e in (example.f, example.g**2))
    f, square = ([sp.lambdify(t, c) for c in (*e, *[sp.Integer(0)] * (3 - len(e)))] for e in (f, square))

    def rhs(s, m):
        powers = (1.0, m[0], m[1])
        noise = sum(c(s) * power for c, power in zip(square, powers, strict=True))
        return [f[0](s) + f[1](s) * m[0], 2 * (f[0](s) * m[0] + f[1](s) * m[1]) + noise]

    m = solve_ivp(rhs, (0, 0.8), [example.start, example.start**2], method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    told = [float(c) for c in kernel.moments(torch.tensor([[example.start]], dtype=torch.float64), 0.8)]
    np.testing.assert_allclose(told, [m[0], math.sqrt(m[1] - m[0] ** 2)], rtol=1e-9)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", CASES)
def test_the_density_satisfies_fokker_planck(name, time):
    example = CASES[name]
    assert fokker_planck_residual(build(name), example.f, example.g, example.start, time, VALUES) < 1e-6


@pytest.mark.parametrize("symbol", [kappa, theta, sigma])
@pytest.mark.parametrize("name", ["CIR", "CIR that hits 0", "shifted", "Jacobi", "with a clock"])
def test_fokker_planck_finds_a_wrong_parameter(name, symbol):
    example, wrong = CASES[name], {**VALUES, symbol: VALUES[symbol] + 0.01}
    assert fokker_planck_residual(build(name), example.f, example.g, example.start, 0.5, wrong) > 1e-4


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].steady])
def test_chapman_kolmogorov(name):
    example, kernel = CASES[name], build(name)
    between, weights = quadrature(example)
    ends = np.array([0.2, 0.4, 0.75])
    first = weights * np.exp(log_density(kernel, between, example.start, 0.15))
    second = np.exp(log_density(kernel, ends[:, None], between, 0.25))
    direct = np.exp(log_density(kernel, ends, example.start, 0.4))
    np.testing.assert_allclose(second @ first, direct, rtol=1e-7)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", CASES)
def test_the_score_is_the_gradient_of_log_prob(name, time):
    assert score_error(build(name), CASES[name].start, time) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_kernels_moments(name):
    states = require_draws(build(name), CASES[name].start, 8_000, seed=1)
    again = build(name).sample(torch.full((100, 1), CASES[name].start, dtype=torch.float64), 0.3, seed=1)
    torch.testing.assert_close(states[:100], again, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["CIR", "falling", "Jacobi", "on [-1, 2]"])
def test_given_noise_is_the_level_of_a_quantile(name):
    example, kernel = CASES[name], build(name)
    noise = torch.tensor([[-1.0], [0.0], [0.5], [2.0]], dtype=torch.float64)
    states = kernel.sample(torch.full((4, 1), example.start, dtype=torch.float64), 0.3, noise=noise)
    between, weights = quadrature(example)
    p = weights * np.exp(log_density(kernel, between, example.start, 0.3))
    below = [p[(between <= s) if kernel.pearson.scale > 0 else (between >= s)].sum() for s in states.numpy()[:, 0]]
    truth = [0.15865525393, 0.5, 0.69146246127, 0.97724986805]
    np.testing.assert_allclose(below, truth, atol=1.5 * float(np.max(p)))  # a panel of the quadrature


@pytest.mark.parametrize("time", [1e-4, 0.01, 1.0])
def test_cir_is_noncentral_chi_squared(time):
    kernel, start = build("CIR"), 0.4
    c = 2 * 1.2 / (0.64 * -math.expm1(-1.2 * time))
    df, nc = 4 * 1.2 * 0.7 / 0.64, 2 * c * start * math.exp(-1.2 * time)
    states = ncx2.ppf(np.linspace(0.001, 0.999, 50), df, nc) / (2 * c)
    truth = ncx2.logpdf(2 * c * states, df, nc) + math.log(2 * c)
    np.testing.assert_allclose(log_density(kernel, states, start, time), truth, rtol=1e-8, atol=1e-8)


def test_squared_bessel_is_the_formula_of_its_name():
    """p = 1/(2t) (x/x_0)^(nu/2) e^{-(x + x_0)/(2t)} I_nu(sqrt(x x_0)/t), nu = delta/2 - 1, in 30 digits."""
    kernel, nu, time = build("squared Bessel"), mpmath.mpf(1) / 2, mpmath.mpf(1) / 8
    with mpmath.workdps(30):
        for state in (0.01, 0.6, 4.0):
            s, s_0 = mpmath.mpf(state), mpmath.mpf(0.5)
            p = (s / s_0) ** (nu / 2) * mpmath.exp(-(s + s_0) / (2 * time)) / (2 * time)
            p *= mpmath.besseli(nu, mpmath.sqrt(s * s_0) / time)
            assert abs(float(mpmath.log(p)) - log_density(kernel, state, 0.5, 0.125)) < 1e-12


def test_at_4_kappa_theta_equal_to_sigma_squared_it_is_the_folded_gaussian():
    declaration = Declaration(sp.Rational(4, 25) - kappa * x, ROOT, parameters=tuple(VALUES))
    one, other = pearson_kernel(declaration, VALUES), ReducibleKernel(declaration, VALUES)
    states, start = torch.rand(50, 1, dtype=torch.float64), torch.rand(50, 1, dtype=torch.float64)
    torch.testing.assert_close(one.log_prob(states, start, 0.3), other.log_prob(states, start, 0.3))
    torch.testing.assert_close(one.score(states, start, 0.3), other.score(states, start, 0.3))
    for ours, theirs in zip(one.moments(start, 0.3), other.moments(start, 0.3), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_ends_of_the_domain_are_states():
    """x_0 = 0 gives a central chi², and a Jacobi kernel may start and end anywhere in [0, 1]."""
    cir, jacobi = build("CIR"), build("Jacobi")
    states = np.array([0.1, 0.5, 1.0])
    var = 0.64 / 4 * -math.expm1(-1.2 * 0.5) / 1.2
    truth = chi2.logpdf(states / var, 4 * 1.2 * 0.7 / 0.64) - math.log(var)
    np.testing.assert_allclose(log_density(cir, states, 0.0, 0.5), truth, rtol=1e-12)
    assert np.isfinite(log_density(jacobi, [0.3, 0.3], [0.0, 1.0], 0.5)).all()
    late = pearson_kernel(Declaration(CASES["Jacobi"].f, CASES["Jacobi"].g, T=60.0, parameters=tuple(VALUES)), VALUES)
    shape = (2 * 1.2 * 0.7 / 0.64, 2 * 1.2 * 0.3 / 0.64)
    np.testing.assert_allclose(log_density(late, states[:2], 0.0, 60.0), beta.logpdf(states[:2], *shape), rtol=1e-10)


@pytest.mark.parametrize("name", ["CIR", "Jacobi"])
def test_small_times_and_far_tails_keep_their_digits(name):
    """log p + distance² / (2 v), in the coordinate of unit noise, is smooth: nothing under- or overflows or cancels."""
    kernel = build(name)
    to_state = (lambda y: y**2 / 4) if name == "CIR" else (lambda y: np.sin(y / 2) ** 2)
    start, time = 1.3, 4e-3
    std = 0.8 * time**0.5
    line = start + std * np.array([-12.0, -9.0, -6.3, -6.0, -3.0, 0.0, 3.0, 6.0, 6.3, 9.0, 12.0])
    rest = log_density(kernel, to_state(line), to_state(start), time) + 0.5 * ((line - start) / std) ** 2
    assert np.isfinite(rest).all()
    smooth = np.polynomial.Polynomial.fit(line, rest, 5)
    assert np.abs(rest - smooth(line)).max() < 1e-3


def test_bessel_functions_that_overflow_and_underflow():
    def log_g(nu, r):
        return log_bessel(torch.tensor([nu], dtype=torch.float64), torch.tensor([r], dtype=torch.float64)).item()

    for nu in (-0.9, 0.0, 0.7, 20.0, 150.0, 600.0, 5000.0):
        for r in (0.0, 1e-8, 0.3, 1.99, 2.01, 30.0, 700.0, 1e4):
            with mpmath.workdps(40):
                truth = mpmath.log(mpmath.hyp0f1(nu + 1, mpmath.mpf(r) ** 2 / 4)) - mpmath.loggamma(nu + 1) - r
            assert abs(float(truth) - log_g(nu, r)) < 1e-12 * (1 + abs(truth))
    # For large r: e^{-r} I_nu(r) sqrt(2 pi r) = 1 - (4 nu² - 1) / (8 r) + ...
    for r in (0.99e8, 1.01e8, 1e12):
        assert abs(log_g(0.7, r) + 0.5 * math.log(2 * math.pi * r) + 0.7 * math.log(r / 2)) < 1e-8


@pytest.mark.parametrize(
    ("f", "g", "kind", "shape"),
    [
        (kappa * (theta - x), ROOT, "square root", (4 * kappa * theta / sigma**2,)),
        (sp.Integer(3), 2 * sp.sqrt(x), "square root", (3,)),
        (t * x + 2 * (1 + t), sp.sqrt((1 + t) * x), "square root", (8,)),
        (kappa * (theta - x), sigma * sp.sqrt(x) * sp.sqrt(1 - x), "Jacobi",
         (2 * kappa * theta / sigma**2, 2 * kappa * (1 - theta) / sigma**2)),
        (-kappa * x, sigma * sp.sqrt(1 - x**2), "Jacobi", (kappa / sigma**2, kappa / sigma**2)),
    ],
)  # fmt: skip
def test_what_is_recognised(f, g, kind, shape):
    found = classify(f, g, VALUES)
    assert found.kind == kind
    assert all(sp.simplify(ours - theirs) == 0 for ours, theirs in zip(found.shape, shape, strict=True))


REFUSED = {
    "geometric Brownian motion": (kappa * (1 - x), sigma * x),
    "Student": (-x, sp.sqrt(1 + x**2)),
    "Fisher-Snedecor": (kappa * (theta - x), sp.sqrt(x * (1 + x))),
    "state-free noise": (-x, sp.Integer(1)),
    "a drift that is not affine": (x * (1 - x), ROOT),
    "an end that absorbs": (-kappa * x, ROOT),
    "an end that is left": (-1 - x, ROOT),
    "Wright-Fisher without mutation": (sp.Integer(0), sp.sqrt(x * (1 - x))),
    "a dimension that changes": (kappa * (theta * (1 + t) - x), ROOT),
    "no polynomial": (-x, 1 + sp.sqrt(x)),
    "cubic": (-x, x ** sp.Rational(3, 2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    f, g = REFUSED[name]
    declaration = Declaration(f, g, parameters=tuple(VALUES))
    assert pearson_kernel(declaration, VALUES) is None
    with pytest.raises(NotAffineError, match="diffusion with constant, positive shape"):
        JacobiKernel(declaration, VALUES)


@pytest.mark.parametrize(
    ("f", "g", "reason"),
    [
        (kappa * (theta - x), ROOT, "the shape delta = 4*kappa*theta/sigma**2 must be positive, and is not at these"),
        (-x, sp.sqrt(x), "the shape delta = 0 must be positive"),
        (1 + t - x, sp.sqrt(x), "the shape delta = 4*t + 4 must not depend on t"),
        (1 - x, sp.sqrt(x + t), "the zero of g² at x = -t moves with t"),
        (-x, sp.sqrt(x * (1 - x)), "the shape A = 0 must be positive"),
        (1 + x, sp.sqrt(x * (1 - x)), "the shape B = -4 must be positive"),
        (-x, sp.sqrt((x + t) * (1 - x)), "the zeros of g² move with t"),
        (2 - x, sp.sqrt(1 + x**2), "the factor 1 of x² in g² must be negative"),
        (-(x**2), sp.sqrt(x), "f is not affine in x"),
        (-x, x**2, "g² is of degree 4 in x"),
        (-x, sp.cos(x), "g² is no polynomial of x"),
        (-(x**2), x, "the drift of y = log(x) is not affine in y"),
        (x, sp.sqrt(x) + x, "g is neither a polynomial of x of second degree at most"),
        (x, sp.sqrt(1 - x**2), "the factor -1 of x² in g² must be positive"),
        (-x, x**2, "g has no two zeros with the state between them"),
    ],
)
def test_the_refusal_of_an_exact_kernel_says_why(f, g, reason):
    values = {symbol: -value if symbol == kappa else value for symbol, value in VALUES.items()}
    sde = SDE(f, g, params={symbol: values[symbol] for symbol in (f + g).free_symbols - {x, t}})
    assert sde.kind == "general"
    assert reason in " ".join(sde.explain().split())
    with pytest.raises(NotAffineError) as caught:
        sde.kernel.alpha  # noqa: B018
    assert reason in str(caught.value)


def test_a_tensor_parameter_keeps_the_kernel_that_holds_for_all_its_values():
    """At 4 κθ = σ² a fold would serve, but for these values alone."""
    sde = SDE(kappa * (theta - x), ROOT, params={kappa: 1.0, theta: torch.tensor([0.25]), sigma: 1.0})
    assert sde.kind == "pearson" and "Pearson" in sde.explain() and "χ²" in str(sde.derivation())
    moving = SDE(kappa * (1 - x) + theta * t, sp.sqrt(x), params={kappa: 1.0, theta: torch.zeros(2)})
    assert moving.kind == "general" and "at the parameters' present values only" in " ".join(moving.explain().split())


def test_a_dimension_may_be_constant_at_the_parameters_values_only():
    f = kappa * (theta * (1 + (sigma - sp.Rational(4, 5)) * t) - x)
    assert classify(f, ROOT, VALUES).kind == "square root"
    assert classify(f, ROOT, {**VALUES, sigma: 0.81}) is None


@pytest.mark.parametrize("name", ["CIR", "Jacobi"])
def test_errors_and_states_outside_the_domain(name):
    kernel = build(name)
    good, bad = torch.tensor([[0.5, 0.4]]), torch.tensor([[0.5, -0.1]])
    assert kernel.log_prob(bad, good, 0.5).tolist() == [-math.inf]
    assert torch.isnan(kernel.score(bad, good, 0.5)).tolist() == [[False, True]]
    for call in (kernel.moments, kernel.sample):
        with pytest.raises(DataError, match=r"x_0 = -0\.1 lies outside the domain"):
            call(bad, 0.5)
        with pytest.raises(DataError, match="floating"):
            call(good.long(), 0.5)
    for call in (kernel.log_prob, kernel.score):
        with pytest.raises(ScheduleError, match="sigma = 0 at t = 0"):
            call(good, good, 0.0)
        with pytest.raises(ScheduleError, match="asked for"):
            call(good, good, 1.5)
    with pytest.raises(DeclarationError, match="P0"):
        pearson_kernel(Declaration(CASES[name].f, CASES[name].g, P0=0.1, parameters=tuple(VALUES)), VALUES)


def test_a_jacobi_clock_that_is_too_small():
    kernel = build("Jacobi")
    assert abs(0.64 * kernel.cutoff - 1e-4) < 1e-12
    start = torch.full((1000, 1), 0.5, dtype=torch.float64)
    with pytest.raises(ScheduleError, match=r"too small.*draws"):
        kernel.log_prob(start[:1], start[:1], 1e-7)
    mean, std = (float(m[0]) for m in kernel.moments(start, 1e-7))
    level = ndtr((kernel.sample(start, 1e-7, seed=0)[:, 0] - mean).numpy() / std)
    assert np.abs(np.sort(level) - np.arange(1, 1001) / 1000).max() < 1.95 / math.sqrt(1000)  # Kolmogorov, at 1e-3


def test_a_jacobi_diffusion_with_little_noise():
    """Far from the mode of its stationary law the eigenfunctions cancel: the mixture serves densities and draws."""
    kernel = pearson_kernel(Declaration(1.2 * (0.7 - x), sp.sqrt(x * (1 - x)) / 10))
    start = torch.full((8, 1), 0.05, dtype=torch.float64)
    mean, std = (float(m[0]) for m in kernel.moments(start, 0.3))
    assert (kernel.sample(start, 0.3, seed=0) - mean).abs().max() < 4 * std
    with pytest.raises(ScheduleError, match="too little noise"):
        kernel.sample(start, 0.3, noise=torch.randn(8, 1, dtype=torch.float64))
    normal = -math.log(std * math.sqrt(2 * math.pi))
    assert abs(log_density(kernel, mean, 0.05, 0.3) - normal) < 0.05
    assert torch.isfinite(kernel.sample(torch.full_like(start, 0.65), 0.3, seed=0)).all()


@pytest.mark.parametrize("name", ["CIR", "Jacobi"])
def test_shapes_dtypes_and_pickles(name):
    kernel, start = pickle.loads(pickle.dumps(build(name))), torch.rand(4, 3, 2)
    time = torch.tensor([0.1, 0.3, 0.5, 1.0])
    states = kernel.sample(start, time, seed=0)
    assert kernel.log_prob(states, start, time).shape == (4,)
    assert kernel.log_prob(states, start, time).dtype == torch.float64
    for tensor in (states, kernel.score(states, start, time), *kernel.moments(start, time)):
        assert (tensor.shape, tensor.dtype) == (start.shape, torch.float32)
        assert torch.isfinite(tensor).all()
    torch.testing.assert_close(kernel.sample(start, 0.0, seed=0), start)
    assert kernel.form == "closed"
    one = sum(kernel.log_prob(states[..., i : i + 1], start[..., i : i + 1], time) for i in range(2))
    torch.testing.assert_close(kernel.log_prob(states, start, time), one)
