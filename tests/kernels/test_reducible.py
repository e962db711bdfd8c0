"""Kernels of reducible SDEs: mass, Fokker-Planck, Chapman-Kolmogorov, scores, moments, and what is refused."""

import functools
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sympy as sp
import torch
from densities import case, fokker_planck_residual, log_density, numbers_of, quadrature, require_draws, score_error
from scipy.stats import lognorm, ncx2

from sdeflow import SDE, t, x, x_0
from sdeflow.errors import (
    DataError,
    DeclarationError,
    MissingPriorError,
    NonFiniteStateError,
    NotAffineError,
    ScheduleError,
)
from sdeflow.kernels.reducible import PushForward, ReducibleKernel
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.lamperti import reduce

kappa, theta, sigma, mu = sp.symbols("kappa theta sigma mu")
VALUES = {kappa: 1.2, theta: 0.3, sigma: 0.5, mu: 0.2}
HALF = sp.Rational(1, 2)
LOGIT = sp.log(x / (1 - x))


CASES = {
    "geometric Brownian motion": case(mu * x, sigma * x, 0.7, np.exp, np.exp, (-8, 8)),
    "with coefficients of time": case(sp.sin(3 * t) * x, (1 + t) * x / 2, 0.7, np.exp, np.exp, (-9, 9), steady=False),
    "Gompertz": case(x * (theta - kappa * sp.log(x)), sigma * x, 1.4, np.exp, np.exp, (-8, 8)),
    "shifted": case(mu * (x + 2), sigma * (x + 2), -1.2, lambda z: np.exp(z) - 2, np.exp, (-8, 8)),
    "falling side": case(mu * (1 - x), sigma * (1 - x), 0.2, lambda z: 1 - np.exp(z), np.exp, (-8, 8)),
    "moving shift": case(mu * (x + t) - 1, (x + t) * HALF, 0.8, lambda z: np.exp(z) - 0.4, np.exp, (-9, 9), False),
    "sinh": case(
        sigma**2 * x / 2 + (theta - kappa * sp.asinh(x)) * sp.sqrt(1 + x**2), sigma * sp.sqrt(1 + x**2), -0.6,
        np.sinh, np.cosh, (-7, 7),
    ),
    "shifted sinh": case(2 * (x - 1), 2 * sp.sqrt((x - 1) ** 2 + 3), 1.5, np.sinh, np.cosh, (-16, 16)),
    "logistic": case(
        sigma**2 * x * (1 - x) * (1 - 2 * x) / 2 + x * (1 - x) * (theta - kappa * LOGIT), sigma * x * (1 - x), 0.35,
        lambda z: 1 / (1 + np.exp(-z)), lambda z: 1 / (4 * np.cosh(z / 2) ** 2), (-8, 8),
    ),
    "square root": case(sigma**2 / 4 - kappa * x, sigma * sp.sqrt(x), 0.1, np.square, lambda z: 2 * z, (0, 3)),
    "cosh": case(
        sigma**2 * x / 2 - kappa * sp.acosh(x) * sp.sqrt(x**2 - 1), sigma * sp.sqrt(x**2 - 1), 1.1,
        np.cosh, np.sinh, (0, 6),
    ),
}  # fmt: skip
TIMES = (0.05, 0.4)


@functools.cache
def build(name):
    return ReducibleKernel(Declaration(CASES[name].f, CASES[name].g, parameters=tuple(VALUES)), VALUES)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", CASES)
def test_the_density_has_mass_one_and_the_moments_that_the_kernel_tells(name, time):
    example, kernel = CASES[name], build(name)
    if name == "moving shift":  # the end of the domain moves
        example = SimpleNamespace(**{**vars(example), "to_x": lambda z: np.exp(z) - time})
    mass, mean, std = numbers_of(kernel, example.start, time, example)
    told = [float(m) for m in kernel.moments(torch.tensor([[example.start]], dtype=torch.float64), time)]
    assert abs(mass - 1) < 1e-10
    np.testing.assert_allclose(told, [mean, std], rtol=1e-9)
    if name == "logistic":
        assert kernel.mean is None
    else:
        shown = [float(e.subs({**VALUES, x_0: example.start, t: time}).evalf(15)) for e in (kernel.mean, kernel.std)]
        np.testing.assert_allclose(shown, told, rtol=1e-9)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", CASES)
def test_the_density_satisfies_fokker_planck(name, time):
    example = CASES[name]
    assert fokker_planck_residual(build(name), example.f, example.g, example.start, time, VALUES) < 1e-7


@pytest.mark.parametrize("symbol", [kappa, sigma])
@pytest.mark.parametrize("name", ["Gompertz", "sinh", "cosh", "square root", "logistic"])
def test_fokker_planck_finds_a_wrong_parameter(name, symbol):
    example, wrong = CASES[name], {**VALUES, symbol: VALUES[symbol] + 0.01}
    assert fokker_planck_residual(build(name), example.f, example.g, example.start, 0.4, wrong) > 1e-4


@pytest.mark.parametrize("name", ["square root", "cosh"])
def test_one_branch_of_a_fold_is_no_density(name):
    """It satisfies Fokker-Planck inside the domain all the same: only the mass tells."""
    example, kernel = CASES[name], build.__wrapped__(name)
    kernel.reduction = replace(kernel.reduction, map=replace(kernel.reduction.map, fold=False))
    assert numbers_of(kernel, example.start, 0.4, example)[0] < 0.99


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].steady])
def test_chapman_kolmogorov(name):
    example, kernel = CASES[name], build(name)
    between, weights = quadrature(example)
    ends = example.to_x(np.array([0.3, 0.5, 1.1]))
    first = weights * np.exp(log_density(kernel, between, example.start, 0.15))
    second = np.exp(log_density(kernel, ends[:, None], between, 0.25))
    direct = np.exp(log_density(kernel, ends, example.start, 0.4))
    np.testing.assert_allclose(second @ first, direct, rtol=1e-9)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", CASES)
def test_the_score_is_the_gradient_of_log_prob(name, time):
    kernel, start = build(name), torch.full((6, 2), CASES[name].start, dtype=torch.float64)
    assert score_error(kernel, CASES[name].start, time) < 1e-8
    states = kernel.sample(start, time, seed=4).requires_grad_()
    (gradient,) = torch.autograd.grad(kernel.log_prob(states, start, time).sum(), states)
    # Near an end the score is c / (x - end), c of order 1: rounding of x moves it by |x| eps score² / c.
    rounding = 8 * torch.finfo(torch.float64).eps * states.detach().abs() * gradient.square()
    error = (kernel.score(states, start, time) - gradient).abs()
    assert bool((error <= 1e-10 * (1 + gradient.abs()) + rounding).all())


@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_kernels_moments(name):
    states = require_draws(build(name), CASES[name].start, 20_000, seed=0)
    again = build(name).sample(torch.full((100, 1), CASES[name].start, dtype=torch.float64), 0.3, seed=0)
    torch.testing.assert_close(states[:100], again, rtol=1e-14, atol=0.0)  # cosh rounds by the place in a vector


def test_the_square_root_process_at_one_dimension_is_noncentral_chi_squared():
    kernel, start, time = build("square root"), 0.1, 0.4
    states = np.geomspace(1e-6, 2, 200)
    c = 2 * 1.2 / (0.25 * -math.expm1(-1.2 * time))
    truth = ncx2.logpdf(2 * c * states, 1, 2 * c * start * math.exp(-1.2 * time)) + math.log(2 * c)
    np.testing.assert_allclose(log_density(kernel, states, start, time), truth, rtol=1e-11, atol=1e-11)


def test_geometric_brownian_motion_is_log_normal():
    kernel = build("geometric Brownian motion")
    assert sp.simplify(kernel.mean - x_0 * sp.exp(mu * t)) == 0
    assert sp.simplify(kernel.var - x_0**2 * sp.exp(2 * mu * t) * (sp.exp(sigma**2 * t) - 1)) == 0
    states = np.geomspace(0.05, 20, 50)
    truth = lognorm.logpdf(states, 0.5 * 0.4**0.5, scale=0.7 * math.exp((0.2 - 0.125) * 0.4))
    np.testing.assert_allclose(log_density(kernel, states, 0.7, 0.4), truth, rtol=1e-12)
    assert kernel.form == "closed"


@pytest.mark.parametrize(
    ("f", "g", "name", "a", "b"),
    [
        (mu * x, sigma * x, "exp", 0, mu - sigma**2 / 2),
        (sp.log(2 + t) * x, sp.exp(t) * x, "exp", 0, sp.log(t + 2) - sp.exp(2 * t) / 2),
        (x * (theta - kappa * sp.log(x)), sigma * x, "exp", -kappa, theta - sigma**2 / 2),
        (x / 2, sp.sqrt(1 + x**2), "sinh", 0, 0),
        (-x, 1 + t, "identity", -1, 0),
        (sigma**2 / 4 - kappa * x, sigma * sp.sqrt(x), "square", -kappa / 2, 0),
        (CASES["logistic"].f, CASES["logistic"].g, "logistic", -kappa, theta),
        (CASES["cosh"].f, CASES["cosh"].g, "cosh", -kappa, 0),
    ],
)
def test_what_is_accepted_holds_for_all_parameters(f, g, name, a, b):
    reduction = reduce(f, g, VALUES)
    assert not reduction.at_values
    assert reduction.map.name == name
    assert sp.simplify(reduction.a - a) == 0
    assert sp.simplify(reduction.b - b) == 0


REFUSED = {
    "CIR": (kappa * (theta - x), sigma * sp.sqrt(x)),
    "square root with a force": (sp.sqrt(x) + sp.Rational(1, 4), sp.sqrt(x)),
    "Jacobi": (HALF - x, sp.sqrt(x * (1 - x))),
    "Jacobi with two folds": (HALF / 2 - x / 2, sp.sqrt(x * (1 - x))),
    "logistic growth": (mu * x * (1 - x), sigma * x),
    "a moving map": (sp.Integer(0), x + t),
    "cosh with a force": (CASES["cosh"].f + sp.sqrt(x**2 - 1), CASES["cosh"].g),
    "a cube whose end absorbs or not": (x ** sp.Rational(1, 3) / 3, x ** sp.Rational(2, 3)),
    "explosion": (x**3, x**2),
    "half a line": (-sp.exp(-2 * x) / 2, sp.exp(-x)),
    "tan": (x * (1 + x**2), 1 + x**2),
    "no antiderivative": (-x, 2 + sp.sin(x)),
    "a kink": (mu * x, sigma * sp.Abs(x)),
    "nonlinear": (-(x**3), sp.Integer(1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    f, g = REFUSED[name]
    assert reduce(f, g, VALUES) is None
    with pytest.raises(NotAffineError, match="change of the state"):
        ReducibleKernel(Declaration(f, g, parameters=tuple(VALUES)), VALUES)


def test_a_reduction_may_hold_at_the_parameters_values_only():
    f, g = REFUSED["CIR"]
    reduction = reduce(f, g, {kappa: 0.5, theta: 0.02, sigma: 0.2})
    assert reduction.at_values
    assert (reduction.a, reduction.b) == (-sp.Rational(1, 4), 0)
    assert reduce(f, g, {kappa: 0.51, theta: 0.02, sigma: 0.2}) is None
    assert reduce(mu * x, sigma * x + theta, {mu: 0.5, sigma: 0.0, theta: 0.1}).map.name == "identity"


def test_states_outside_the_domain():
    kernel = build("geometric Brownian motion")
    good, bad = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.5, -1.0]])
    assert kernel.log_prob(bad, good, 0.5).tolist() == [-math.inf]
    assert torch.isnan(kernel.score(bad, good, 0.5)).tolist() == [[False, True]]
    for call in (kernel.moments, kernel.sample, kernel.transport):
        with pytest.raises(DataError, match="outside the domain 0 < x < oo"):
            call(bad, 0.5)


def test_errors():
    kernel, state = build("Gompertz"), torch.ones(2, 3)
    for call in (kernel.log_prob, kernel.score):
        with pytest.raises(ScheduleError, match="sigma = 0 at t = 0"):
            call(state, state, 0.0)
        with pytest.raises(ScheduleError, match=r"asked for 1\.5"):
            call(state, state, 1.5)
    with pytest.raises(DataError, match="shape"):
        kernel.sample(state, torch.ones(3))
    with pytest.raises(DataError, match="floating"):
        kernel.sample(state.long(), 0.5)
    with pytest.raises(DeclarationError, match="P0"):
        ReducibleKernel(Declaration(x, x, P0=0.1))


def test_shapes_dtypes_and_transport():
    kernel, start = build("sinh"), torch.randn(4, 3, 2)
    time = torch.tensor([0.1, 0.3, 0.5, 1.0])
    noise = torch.randn(4, 3, 2)
    states = kernel.sample(start, time, noise=noise)
    mean, std = kernel.line_moments(start, time)
    torch.testing.assert_close(kernel.transport(states, time).double(), mean + std * noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel.restore(kernel.transport(start, time), time), start, rtol=1e-5, atol=1e-6)
    assert kernel.log_prob(states, start, time).shape == (4,)
    assert kernel.log_prob(states, start, time).dtype == torch.float64
    for tensor in (states, kernel.score(states, start, time), *kernel.moments(start, time)):
        assert (tensor.shape, tensor.dtype) == (start.shape, torch.float32)
    torch.testing.assert_close(kernel.sample(start, 0.0, seed=0), start)


def test_a_kernel_pickles():
    kernel, state = build("cosh"), torch.full((2, 1), 1.3)
    other = pickle.loads(pickle.dumps(kernel))
    assert torch.equal(kernel.log_prob(state, state, 0.5), other.log_prob(state, state, 0.5))


def test_the_prior_of_a_reducible_sde_is_pushed_forward():
    """Log-normal data under geometric Brownian motion: p(x_T) is log-normal, and so are log p(x) and the samples."""
    sde = SDE(f=x / 10, g=sp.Rational(3, 10) * x)
    mean, var = 0.2, 0.04

    def score(u, time):
        """∇ log p_t of exp(N(mean + (0.1 - 0.045) t, var + 0.09 t))."""
        t_ = time.reshape(-1, *(1,) * (u.ndim - 1))
        return -1.0 / u - (u.log() - mean - 0.055 * t_) / (var + 0.09 * t_) / u

    flow = sde.flow_ode(score)
    u = torch.exp(mean + 0.2 * torch.linspace(-2, 2, 9, dtype=torch.float64)).reshape(-1, 1)
    found = flow.log_prob(u, rtol=1e-7, atol=1e-7)
    assert isinstance(flow.prior, PushForward)
    assert abs(float(flow.prior.law.mean) - 0.255) < 1e-6 and abs(float(flow.prior.law.std) - math.sqrt(0.13)) < 1e-6
    spread = var + 0.09 * flow.model.cutoff
    line = u.log() - mean - 0.055 * flow.model.cutoff
    truth = -0.5 * line**2 / spread - 0.5 * math.log(2 * math.pi * spread) - u.log()
    assert (found - truth[:, 0]).abs().max() < 1e-5
    samples = sde.reverse(score).sample((4000, 1), steps=200, seed=0, dtype=torch.float64).log()
    assert abs(float(samples.mean()) - mean) < 4 * math.sqrt(var / 4000) + 2e-3
    assert abs(float(samples.var()) / var - 1) < 4 * math.sqrt(2 / 4000) + 0.02


def test_a_prior_that_is_no_pushed_gaussian_is_not_invented():
    sde = SDE(f=x / 10, g=sp.Rational(3, 10) * x)
    with pytest.raises(MissingPriorError, match="fit_prior"):
        sde.flow_ode(lambda u, time: torch.zeros_like(u)).log_prob(torch.ones(2, 1, dtype=torch.float64))


def test_what_only_gaussian_kernels_have_is_refused_elsewhere():
    sde = SDE(f=x / 10, g=sp.Rational(3, 10) * x)
    with pytest.raises(MissingPriorError, match="fit_prior"):
        sde.prior  # noqa: B018
    with pytest.raises(NotAffineError, match="weighting"):
        sde.weighting  # noqa: B018
    root = SDE(f=2 * (sp.Rational(1, 2) - x), g=sp.sqrt(x), T=2)
    with pytest.raises(NonFiniteStateError, match="left the states where"):
        root.simulate(torch.full((1000, 1), 0.01), [0, 2], steps=20, seed=0)
