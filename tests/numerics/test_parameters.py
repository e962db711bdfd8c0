"""Parameters that are tensors or learned, bases, schedules that are no formulas, paths, and stored declarations."""

import copy
import json
import math

import numpy as np
import pytest
import sympy as sp
import torch
from problems import AWKWARD, CATALOGUE, COUPLED, cpu_seconds
from torch import nn

import sdeflow
from sdeflow import SDE, DeclarationError, ScheduleError, catalog, state, t, x
from sdeflow.errors import UnsafeExpressionError
from sdeflow.nets import MLP
from sdeflow.numerics.basis import DCT, Orthogonal
from sdeflow.scores import GaussianMixture

k, c = sp.symbols("k c", positive=True)
X, V = state("x v")


def parameter(value):
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


LEARNED = {
    "OU": (lambda a, b: SDE(-k * x, sp.sqrt(c), params={k: a, c: b}), [1.3, 0.7]),
    "VP": (lambda a, b: SDE(-(k + c * t) * x / 2, sp.sqrt(k + c * t), params={k: a, c: b}), [0.1, 19.9]),
    "by quadrature": (
        lambda a, b: SDE(-(k + c * sp.sin(t) ** 2) * x / 2 + sp.cos(k * t), sp.sqrt(1 + c * t**3), params={k: a, c: b}),
        [0.5, 2.0],
    ),
    "per coordinate": (
        lambda a, b: SDE(-(k + c * t) * x / 2, sp.sqrt(k + c * t), params={k: a, c: b}),
        [[0.1, 0.2, 0.3], [19.9, 10.0, 5.0]],
    ),
    "per coordinate by quadrature": (
        lambda a, b: SDE(-(k + c * sp.tanh(t**2)) * x / 2, sp.sqrt(1 + k * t), params={k: a, c: b}),
        [[0.1, 0.2, 0.3], 5.0],
    ),
    "piecewise": (
        lambda a, b: SDE(-sp.Piecewise((k, t < 0.5), (c, True)) * x, sp.sqrt(1 + k * t), params={k: a, c: b}),
        [1.0, 2.0],
    ),
    "coupled": (
        lambda a, b: SDE(f=[k * V, -k * X - c * V], g=[0, sp.sqrt(2 * c)], P0=[0, 0.1], params={k: a, c: b}),
        [2.0, 4.0],
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_of_a_learned_schedule_are_those_of_finite_differences(name):
    make, start = LEARNED[name]
    values = [parameter(v) for v in start]
    sde = make(*values)
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def functional():
        alpha, sigma, offset = sde.kernel.coefficients(times)
        return alpha.sum() + 2 * sigma.sum() + offset.sum() + sde.kernel.half_log_snr(times).square().sum()

    found = torch.autograd.grad(functional(), values)
    for value, gradient in zip(values, found, strict=True):
        for index in range(value.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    value.view(-1)[index] += step
                    ends.append(float(functional()))
                    value.view(-1)[index] -= step
            difference = (ends[0] - ends[1]) / 2e-5
            assert abs(float(gradient.view(-1)[index]) - difference) < 1e-6 * (1 + abs(difference))


@pytest.mark.parametrize("name", LEARNED)
def test_changed_values_give_the_kernel_declared_with_them(name):
    """After an optimiser's step the same kernel object follows, inverse and cutoff included."""
    make, start = LEARNED[name]
    values = [parameter(v) for v in start]
    sde = make(*values)
    before = sde.kernel.cutoff
    sde.kernel.half_log_snr(torch.tensor(0.3))
    with torch.no_grad():
        for value in values:
            value.mul_(1.7)
    fresh = make(*(parameter(value.tolist()) for value in values))
    times = torch.linspace(0.05, 1.0, 7, dtype=torch.float64)
    for ours, theirs in zip(sde.kernel.coefficients(times), fresh.kernel.coefficients(times), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    target = fresh.kernel.half_log_snr(times)
    assert torch.allclose(sde.kernel.time_of(target), times, rtol=1e-9)
    assert abs(sde.kernel.cutoff / fresh.kernel.cutoff - 1) < 1e-6 and sde.kernel.cutoff != before


MOVED = {
    "affine": (-k * x, sp.sqrt(2 * k), 2e-3**2 / 2),
    "reducible": (0, k * x, None),
    "square root": (k * (1 - x), sp.sqrt(k * x), 4 * 2e-3**2),
    "Jacobi": (k * (sp.Rational(1, 2) - x), sp.sqrt(k * x * (1 - x)), 1e-4),
}


@pytest.mark.parametrize("name", MOVED)
def test_the_default_cutoff_follows_its_rule_whoever_asks_first(name):
    """k t is a known number at the cutoff, for every k; of a stored, a copied and a certified SDE too."""
    f, g, clock = MOVED[name]
    value = parameter(4.0)
    sde = SDE(f, g, T=3, params={k: value})
    flow = sde.flow_ode(lambda x, t: -x)
    before = sde.cutoff, flow.model.cutoff, flow.model.fields.clock(None, 1.0)(0.0)[0]
    with torch.no_grad():
        value.fill_(1.0)
    certificate = sde.verify() if name == "affine" else None  # the first to ask
    found = [flow.model.cutoff, sde.cutoff, sde.with_cutoff(None).cutoff, sde.with_params(k=1.0).cutoff]
    found += [SDE.from_dict(json.loads(json.dumps(sde.to_dict()))).cutoff, copy.deepcopy(sde).cutoff]
    assert found == pytest.approx([sde.cutoff] * 6, rel=1e-9)
    assert found[0] != before[1] and flow.model.fields.clock(None, 1.0)(0.0)[0] == pytest.approx(found[0], rel=1e-6)
    if clock is not None:
        assert (4 * before[0], sde.cutoff) == pytest.approx((clock, clock), rel=1e-4)
    assert certificate is None or certificate


def test_a_score_that_starts_later_than_its_sde_is_refused_at_once():
    sde = SDE(-x, sp.sqrt(2), T=3)
    with pytest.raises(ValueError, match=r"cutoff 0\.01"):
        sde.flow_ode(sdeflow.Score(lambda x, t: x, sde.with_cutoff(0.01)))
    sde.with_cutoff(0.01).flow_ode(sdeflow.Score(lambda x, t: x, sde))


def test_with_params_derives_nothing_anew(monkeypatch):
    import sdeflow.kernels.gaussian as module

    sde = SDE(-(k + c * t) * x / 2, sp.sqrt(k + c * t), params={k: 0.1, c: 19.9})

    def forbidden(*_):
        raise AssertionError("derived anew")

    for name in ("derive_moments", "derive_coupled", "integrate_within"):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(type(sde.declaration), "affine", property(lambda self: self.__dict__["affine"]))
    other = sde.with_params(k=0.2, c=5.0)
    assert other.kernel.form == "closed" and other.kernel.alpha == sde.kernel.alpha
    at = torch.tensor(0.7, dtype=torch.float64)
    assert abs(float(other.kernel.coefficients(at)[0]) - math.exp(-(0.2 * 0.7 + 2.5 * 0.49) / 2)) < 1e-14


def test_a_schedule_per_pixel_is_each_pixel_s_own_kernel():
    rates = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    sde = SDE(-k * x, sp.sqrt(2 * k), T=2, params={k: rates})
    x_0 = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0.1, 2.0, 5, dtype=torch.float64)
    x_t = sde.kernel.sample(x_0, times, seed=0)
    total = torch.zeros(5, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            one = SDE(-k * x, sp.sqrt(2 * k), T=2, params={k: float(rates[i, j])}).kernel
            mean, std = sde.kernel.moments(x_0, times)
            own_mean, own_std = one.moments(x_0[..., i, j], times)
            assert torch.allclose(mean[..., i, j], own_mean) and torch.allclose(std[..., i, j], own_std)
            assert torch.allclose(
                sde.kernel.score(x_t, x_0, times)[..., i, j], one.score(x_t[..., i, j], x_0[..., i, j], times)
            )
            total += one.log_prob(x_t[..., i, j], x_0[..., i, j], times)
    assert torch.allclose(sde.kernel.log_prob(x_t, x_0, times), total)


@pytest.mark.parametrize("full", [False, True])
def test_flow_density_with_a_schedule_per_coordinate(full):
    sde = SDE(-k * x, sp.sqrt(2 * k), T=6, params={k: torch.tensor([0.5, 1.0, 2.0])})
    means = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 0.5, 1.0]])
    covariances = torch.tensor([[0.2, 0.1, 0.3], [0.1, 0.2, 0.1]])
    exact = GaussianMixture(sde, means, torch.diag_embed(covariances) if full else covariances, full=full)
    x_c = sde.kernel.sample(exact.sample(30, seed=0, dtype=torch.float64), sde.cutoff, seed=1)
    found = sde.flow_ode(exact).log_prob(x_c, rtol=1e-6, atol=1e-6)
    assert (found - exact.log_prob(x_c, sde.cutoff)).abs().max() < 5e-3
    samples = sde.reverse(exact).sample((4000, 3), steps=300, seed=0, dtype=torch.float64)
    truth = exact.sample(4000, seed=3, dtype=torch.float64)
    assert ((samples.mean(0) - truth.mean(0)) / truth.std(0)).abs().max() < 5 * math.sqrt(2 / 4000)
    assert (samples.var(0) / truth.var(0) - 1).abs().max() < 0.1


def test_a_learned_schedule_belongs_to_the_score_and_is_trained_averaged_and_restored(tmp_path):
    rate, scale = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(5.0))
    sde = SDE(-(k + c * t) * x / 2, sp.sqrt(k + c * t), params={k: rate, c: scale})
    torch.manual_seed(0)
    score = sdeflow.Score(MLP(2, 16), sde)
    assert {id(p) for p in score.parameters()} >= {id(rate), id(scale)}
    other = copy.deepcopy(score)
    with torch.no_grad():
        rate.add_(1.0)
    at = torch.tensor(0.5, dtype=torch.float64)
    assert float(other.kernel.half_log_snr(at)) != float(score.kernel.half_log_snr(at))
    with torch.no_grad():
        rate.sub_(1.0)
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    sdeflow.fit(score, data, 10, batch_size=32, weighting="likelihood", seed=0, out=tmp_path)
    assert float(rate) != 1.0 and float(sde.kernel.values[k]) == float(rate)
    trained = float(sde.kernel.half_log_snr(at))
    clean = SDE(-(k + c * t) * x / 2, sp.sqrt(k + c * t), params={k: float(rate), c: float(scale)})
    assert abs(trained - float(clean.kernel.half_log_snr(at))) < 1e-6


def test_parameters_that_cannot_be_meant_are_refused():
    for value in (torch.tensor([1, 2]), torch.tensor(math.nan), "1", None, True, torch.zeros(0)):
        with pytest.raises(DeclarationError, match="parameter k"):
            SDE(-k * x, 1, params={k: value})
    sde = SDE(-k * x, 1, params={k: torch.ones(3)})
    with pytest.raises(sdeflow.DataError, match="parameters are of shape"):
        sde.kernel.sample(torch.zeros(4, 2), 0.5)
    with pytest.raises(DeclarationError, match="coupled"):
        SDE(f=[V, -k * X - V], g=[0, 1], params={k: torch.ones(3)})


# ------------------------------------------------------------------ bases


@pytest.mark.parametrize("event", [(8, 8), (3, 5, 4), (1, 7, 1)])
def test_the_cosine_transform_is_orthonormal_and_scipy_s(event):
    from scipy.fft import dctn

    basis = DCT(2)
    images = torch.randn(4, *event, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert np.allclose(basis.forward(images).numpy(), dctn(images.numpy(), axes=(-2, -1), norm="ortho"))
    assert torch.allclose(basis.inverse(basis.forward(images)), images)


def test_blurring_is_its_formula_in_each_frequency():
    sde = catalog.Blurring((8, 8), blur=5.0)
    assert sde.kernel.form == "closed"
    w, at = DCT(2).frequencies((8, 8)), 0.4
    alpha, sigma, _ = sde.kernel.coefficients(torch.tensor(at, dtype=torch.float64))
    tau = (5.0 * math.sin(math.pi * at / 2) ** 2) ** 2 / 2
    assert torch.allclose(alpha, math.cos(math.pi * at / 2) * (0.999 * torch.exp(-w * tau) + 1e-3), rtol=1e-12)
    assert torch.allclose(sigma, torch.full_like(sigma, math.sin(math.pi * at / 2)), rtol=1e-12)
    # The mean of an image is a blurred image: a constant stays one, scaled.
    mean, _ = sde.kernel.moments(torch.ones(1, 1, 8, 8, dtype=torch.float64), at)
    assert torch.allclose(mean, torch.full_like(mean, math.cos(math.pi * at / 2)))
    # A wave of 2 / 8 and 3 / 4 half turns per pixel loses exp(-(πn/N)² tau) by each side: the heat equation.
    waves = (torch.cos(math.pi * n * (torch.arange(size) + 0.5).double() / size) for n, size in ((2, 8), (3, 4)))
    image, tau = torch.outer(*waves), math.sin(math.pi * at / 2) ** 4 / 2
    left = 0.999 * math.exp(-(math.pi**2) * (2**2 / 8**2 + 3**2 / 4**2) * tau) + 1e-3
    mean, _ = catalog.Blurring((8, 4), blur=1.0).kernel.moments(image[None, None], at)
    assert torch.allclose(mean[0, 0], math.cos(math.pi * at / 2) * left * image, rtol=1e-9)


@pytest.mark.parametrize("basis", [DCT(2), Orthogonal(torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0])])
def test_everything_holds_in_a_basis(basis):
    """Score, Tweedie, density and samples of a mixture of images whose frequencies diffuse at rates of their own."""
    rates = torch.linspace(0.5, 3.0, 16).reshape(4, 4) if isinstance(basis, DCT) else torch.linspace(0.5, 3.0, 16)
    event = (1, 4, 4) if isinstance(basis, DCT) else (16,)
    sde = SDE(-k * x, sp.sqrt(2 * k), T=6, params={k: rates}, basis=basis)
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, *event, dtype=torch.float64, generator=generator)
    exact = GaussianMixture(sde, means, torch.tensor([0.1, 0.2, 0.3]))
    diagonal = GaussianMixture(
        sde, means, torch.tensor([0.1, 0.2, 0.3]).reshape(3, *(1,) * len(event)).expand(3, *event)
    )
    x_t = sde.kernel.sample(exact.sample(10, seed=0, dtype=torch.float64), 0.5, seed=1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(exact.log_prob(x_t, 0.5).sum(), x_t)
    assert torch.allclose(exact(x_t, 0.5), gradient)
    assert torch.allclose(exact(x_t, 0.5), diagonal(x_t, 0.5))
    assert diagonal.roots is not None and exact.roots is None
    x_c = sde.kernel.sample(exact.sample(10, seed=0, dtype=torch.float64), sde.cutoff, seed=1)
    found = sde.flow_ode(exact).log_prob(x_c, rtol=1e-6, atol=1e-6)
    assert (found - exact.log_prob(x_c, sde.cutoff)).abs().max() < 2e-2
    one = GaussianMixture(sde, torch.zeros(1, *event), torch.tensor([0.25]))
    score = sdeflow.Score(lambda z, time: torch.zeros_like(z), sde, data_mean=0.0, data_std=0.5)
    state = x_t.detach()
    assert torch.allclose(score(state, 0.4), one(state, 0.4)) and torch.allclose(
        score.denoise(state, 0.4), one.denoise(state, 0.4)
    )
    velocity = sdeflow.Score(lambda z, time: flow_velocity(sde, one, z, time), sde, predicts="velocity", time="t")
    assert torch.allclose(velocity(state, 0.4), one(state, 0.4))
    assert sde.reverse(exact).sample((3, *event), steps=20, seed=0).shape == (3, *event)
    mean, std = sde.kernel.moments(state, 0.4)
    assert torch.allclose(
        sde.kernel.score(state, state, 0.4), sde.kernel.from_basis(sde.kernel.to_basis(mean - state) / std**2)
    )


def flow_velocity(sde, exact, z, time):
    """a x - ½ g² s in the basis, as a network would predict it."""
    kernel = sde.kernel
    a, _, q = kernel.equation(z, time[0].double())
    return kernel.from_basis(a(kernel.to_basis(z)) - 0.5 * q(kernel.to_basis(exact(z, float(time[0])))))


# ------------------------------------------------------------------ schedules and paths


def test_a_schedule_from_a_function_is_the_formula():
    for function in (lambda s: 0.1 + 19.9 * s, lambda s: 0.1 + 19.9 * float(s), lambda s: torch.tensor(0.1) + 19.9 * s):
        beta = sdeflow.schedule(function)
        sde, plain = SDE(-beta(t) * x / 2, sp.sqrt(beta(t))), catalog.VP()
        assert sde.kernel.form == "quadrature"
        times = torch.linspace(1e-4, 1, 30, dtype=torch.float64)
        for ours, theirs in zip(sde.kernel.coefficients(times), plain.kernel.coefficients(times), strict=True):
            assert torch.allclose(ours, theirs, rtol=2e-8 if "tensor" in str(function) else 1e-6, atol=0)
    assert sde.kernel.alpha.has(sp.Integral)


def test_a_table_is_joined_by_a_monotone_cubic_and_its_ends_are_guarded():
    from scipy.interpolate import PchipInterpolator

    times, values = [0.0, 0.3, 0.5, 1.0], [0.1, 5.0, 5.0, 20.0]
    beta = sdeflow.schedule((times, values), name="beta")
    sde = SDE(-beta(t) * x / 2, sp.sqrt(beta(t)))
    at = torch.linspace(0.001, 1, 50, dtype=torch.float64)
    _, _, q = sde.kernel.sde_coefficients(at)
    assert np.allclose(q.numpy(), PchipInterpolator(times, values)(at.numpy()), rtol=1e-12)
    integral = PchipInterpolator(times, values).antiderivative()(at.numpy())
    assert np.allclose(sde.kernel.coefficients(at)[0].numpy(), np.exp(-integral / 2), rtol=1e-11)
    with pytest.raises(ScheduleError, match="runs from t = 0 to 1"):
        SDE(-beta(t) * x / 2, sp.sqrt(beta(t)), T=1.5)
    for wrong in ([1.0, 2.0], ([0, 0], [1, 2]), ([0, 1], [1, math.nan]), "table", ([0, 1], [1, 2, 3])):
        with pytest.raises(DeclarationError):
            sdeflow.schedule(wrong)


def test_a_coupled_sde_takes_schedules_too():
    beta = sdeflow.schedule(lambda s: 1 + 4 * s)
    ours, theirs = catalog.CriticallyDampedLangevin(beta=beta(t)), catalog.CriticallyDampedLangevin(beta=1 + 4 * t)
    at = torch.linspace(0.01, 1, 9, dtype=torch.float64)
    for a, b in zip(ours.kernel.coefficients(at), theirs.kernel.coefficients(at), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-14)


PATHS = {
    "flow matching": (1 - t, t, 0.999),
    "cosine": (sp.cos(sp.pi * t / 2), sp.sin(sp.pi * t / 2), 0.995),
    "variance exploding": (1, sp.Rational(1, 100) * 5000**t, 1),
    "quadratic": (1 - t**2, t, 0.99),
    "trigonometric": (1 / sp.cosh(3 * t), sp.tanh(3 * t), 1),
    "text": ("exp(-t^2)", "sqrt(1 - exp(-2*t^2))", 1),
}


@pytest.mark.parametrize("name", PATHS)
def test_from_kernel_has_the_declared_kernel(name):
    alpha, sigma, T = PATHS[name]
    sde = SDE.from_kernel(alpha, sigma, T=T)
    assert sde.kernel.form == "closed"
    # The kernel is derived again from f and g alone, by quadrature.
    again = SDE(sde.declaration.f, sde.declaration.g, T=T, P0=sde.declaration.P0)
    times = torch.linspace(0.01, T, 40, dtype=torch.float64)
    for ours, theirs in zip(sde.kernel.coefficients(times), again.kernel.coefficients(times), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)
    f = sp.lambdify(t, sp.sympify(sde.kernel.alpha), "math")  # a test may: the expression is ours
    assert abs(f(0.3) - float(sde.kernel.coefficients(torch.tensor(0.3, dtype=torch.float64))[0])) < 1e-12


def test_paths_that_no_sde_has_are_refused():
    with pytest.raises(ScheduleError, match="signal-to-noise"):
        SDE.from_kernel(1, 1 - t / 2)
    with pytest.raises(DeclarationError, match=r"alpha\(0\) must be 1"):
        SDE.from_kernel(t, 1 - t)
    with pytest.raises(DeclarationError, match="functions of t alone"):
        SDE.from_kernel(1 - t, x)


def test_a_path_of_schedules():
    alpha = sdeflow.schedule(lambda s: np.cos(np.pi * s / 2), name="alpha")
    sigma = sdeflow.schedule(lambda s: np.sin(np.pi * s / 2), name="sigma")
    sde, plain = SDE.from_kernel(alpha(t), sigma(t), T=0.99), catalog.CosineVP(T=0.99)
    times = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    for ours, theirs in zip(sde.kernel.coefficients(times), plain.kernel.coefficients(times), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)


# ------------------------------------------------------------------ bridges


@pytest.mark.parametrize("name", ["VP", "OU", "SubVP"])
def test_bridge_has_the_conditional_law_and_its_equation(name):
    sde = CATALOGUE[name]()
    bridge = sde.bridge(0.7)
    x_0 = torch.full((1, 1), 0.3, dtype=torch.float64)
    a_T, s_T, o_T = (float(v) for v in sde.kernel.coefficients(torch.tensor(sde.T, dtype=torch.float64)))
    for at in (0.2 * sde.T, 0.7 * sde.T):
        a, s, o = (float(v) for v in sde.kernel.coefficients(torch.tensor(at, dtype=torch.float64)))
        r = (a_T / s_T) ** 2 / (a / s) ** 2
        mean, std = bridge.moments(x_0, at)
        assert abs(float(mean) - (a * 0.3 + o + r * a / a_T * (0.7 - a_T * 0.3 - o_T))) < 1e-9
        assert abs(float(std) - s * math.sqrt(1 - r)) < 1e-9
    # The conditioned equation, declared anew, has the bridge's moments: the h-transform is right.
    end = sp.Symbol("x_T", real=True)
    declared = SDE(bridge.drift, bridge.diffusion, T=0.8 * sde.T, params={end: 0.7})
    mean, std = declared.kernel.moments(x_0, 0.7 * sde.T)
    truth = bridge.moments(x_0, 0.7 * sde.T)
    assert torch.allclose(mean, truth[0], atol=1e-8) and torch.allclose(std, truth[1], atol=1e-8)


def test_bridge_paths_are_pinned_and_have_the_marginals():
    sde = catalog.CriticallyDampedLangevin()
    end = torch.tensor([[0.5], [0.1]])
    start = sde.kernel.lift(torch.full((4000, 1), 0.3, dtype=torch.float64), noisy=False)
    bridge = sde.bridge(end)
    paths = bridge.paths(start, [0.25, 0.5, 1.0], seed=0)
    assert torch.allclose(paths[-1], end.double().expand(4000, 2, 1), atol=1e-10)
    mean, covariance = bridge.moments(start[:1], 0.5)
    spread = covariance[..., 0].diagonal().sqrt()
    assert ((paths[1].mean(0) - mean[0])[:, 0] / spread).abs().max() < 4 / math.sqrt(4000)
    assert (paths[1].var(0)[:, 0] / spread**2 - 1).abs().max() < 4 * math.sqrt(2 / 4000)
    assert torch.equal(bridge.paths(start[:7], [0.25, 0.5, 1.0], seed=0), paths[:, :7])
    for times in ([0.5, 0.2], [], [-0.1, 0.5], [0.5, 1.5]):
        with pytest.raises(ScheduleError):
            bridge.paths(start, times)


# ------------------------------------------------------------------ stored declarations

BETA = sdeflow.schedule(([0, 0.5, 1], [0.1, 5, 20]), name="beta")
STORED = {
    **CATALOGUE,
    **AWKWARD,
    **COUPLED,
    "blurring": lambda: catalog.Blurring((4, 4)),
    "from a path": lambda: SDE.from_kernel(1 - t, t, T=0.999),
    "table": lambda: SDE(-BETA(t) * x / 2, sp.sqrt(BETA(t))),
    "derivative of a table": lambda: SDE(-x, sp.sqrt(1 + sp.diff(BETA(t), t) ** 2)),
    "tensor": lambda: SDE(-k * x, c, params={k: torch.rand(2, 3), c: nn.Parameter(torch.tensor(0.5))}),
    "basis": lambda: SDE(-k * x, 1, params={k: 1.0}, basis=Orthogonal(torch.eye(3))),
    "double well": lambda: SDE(x - x**3, 1, T=4, cutoff=0.01),
    "stratonovich": lambda: SDE(x, sp.sin(x) + 2, calculus="stratonovich"),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_declarations_come_back_exactly(name):
    sde = STORED[name]()
    back = SDE.from_dict(json.loads(json.dumps(sde.to_dict())))
    assert back.declaration == sde.declaration and back.values == sde.values and back.basis == sde.basis
    assert back.to_dict() == sde.to_dict() and back.kind == sde.kind
    if sde.kind == "affine":
        times = torch.linspace(0.01, 1.0, 256, dtype=torch.float64) * sde.T
        for ours, theirs in zip(sde.kernel.coefficients(times), back.kernel.coefficients(times), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(sde.kernel.sde_coefficients(times), back.kernel.sde_coefficients(times), strict=True):
            assert torch.equal(ours, theirs)


def test_what_cannot_be_stored_says_so():
    with pytest.raises(DeclarationError, match="Python function"):
        SDE(-sdeflow.schedule(lambda s: s)(t) * x, 1).to_dict()
    with pytest.raises(DeclarationError, match="prior"):
        SDE(-x, 1, prior=sdeflow.Gaussian(0.0, 1.0)).to_dict()


TENSOR = {"data": [1.0], "shape": [2], "dtype": "float32", "learned": False}  # of another shape


def test_hostile_and_broken_dicts_are_refused(tmp_path):
    marker = tmp_path / "marker"
    good = catalog.CriticallyDampedLangevin().to_dict()
    hostile = f"open('{marker}','w').write('x')"
    cases = [
        None, [], {}, {**good, "format": 2}, {**good, "f": hostile}, {**good, "f": {"symbol": hostile}},
        {**good, "f": {"call": hostile, "args": []}}, {**good, "T": "1"}, {**good, "T": math.inf}, {**good, "T": -1.0},
        {**good, "state": ["x"]}, {**good, "state": [hostile, "v"]}, {**good, "P0": [[1.0]]}, {**good, "P0": 0.0},
        {**good, "parameters": {hostile: {"assumptions": {}, "value": 1.0}}},
        {**good, "parameters": {"x": {"assumptions": {}, "value": 1.0}}},
        {**good, "parameters": {"k": {"assumptions": {hostile: True}, "value": 1.0}}},
        {**good, "parameters": {"k": {"assumptions": {}, "value": TENSOR}}},
        {**good, "basis": {"eval": 1}}, {**good, "schedules": {"b": [[0, 1], [hostile, 2]]}}, {**good, "cutoff": 2.0},
        {key: value for key, value in good.items() if key != "g"},
    ]  # fmt: skip
    for case in cases:
        began = cpu_seconds()
        with pytest.raises(DeclarationError):
            SDE.from_dict(case)
        assert cpu_seconds() - began < 1.0
    assert not marker.exists()
    with pytest.raises(UnsafeExpressionError):
        SDE.from_dict({**good, "f": {"op": "__import__", "args": []}})


# ------------------------------------------------------------------ everything downstream of a learned schedule


@pytest.mark.parametrize("name", ["OU", "by quadrature", "coupled"])
def test_a_learned_schedule_samples_encodes_and_scores(name):
    make, start = LEARNED[name]
    sde = make(*(parameter(v) for v in start))
    shape = (3, 2, 2) if sde.declaration.coupled else (3, 2)
    score = sdeflow.Score(lambda z, time: torch.zeros_like(z), sde, data_mean=0.0, data_std=0.5)
    flow = sde.flow_ode(score)
    assert torch.isfinite(sde.reverse(score).sample(shape, steps=5, seed=0)).all()
    x_c = flow.sample(shape, seed=0)
    assert torch.allclose(flow.decode(flow.encode(x_c)), x_c, atol=1e-3)
    assert torch.isfinite(flow.log_prob(x_c)).all()


@pytest.mark.parametrize("make", [
    lambda: (catalog.Blurring((8, 8)), (1, 8, 8)),
    lambda: (SDE(f=-k * x / 2, g=sp.sqrt(k), T=2, params={k: torch.tensor([0.01, 50.0])}), (2,)),
], ids=["blurring", "spread rates"])  # fmt: skip
def test_euler_samples_of_spread_schedules_have_the_variance(make):
    sde, event = make()
    exact = GaussianMixture(sde, torch.zeros(1, *event), torch.tensor([0.25]))
    samples = sde.reverse(exact).sample((2000, *event), steps=300, seed=0)
    truth = 0.25 + float(sde.kernel.coefficients(torch.tensor(sde.cutoff))[1].square().mean())
    assert abs(float(samples.var()) / truth - 1) < 4 * math.sqrt(2 / samples.numel()) + 0.03


def test_data_with_a_mean_is_learned_in_a_basis():
    basis, w = DCT(2), sp.Symbol("w", nonnegative=True)
    sde = SDE(-2 * t * w * x, sp.Rational(1, 10), P0=1e-4, params={w: basis.frequencies((4, 4))}, basis=basis)
    score = sdeflow.Score(lambda z, time: torch.zeros_like(z), sde, data_mean=0.5, data_std=0.05)
    flow = sde.flow_ode(score)
    samples = flow.sample((500, 1, 4, 4), seed=0)
    assert abs(float(samples.mean()) - 0.5) < 0.01
    truth = GaussianMixture(sde, torch.full((1, 1, 4, 4), 0.5), torch.tensor([0.0025]))
    assert torch.allclose(flow.log_prob(samples.double()), truth.log_prob(samples, sde.cutoff), atol=0.05)


def test_a_score_of_another_basis_or_table_is_another_score(tmp_path):
    w, values = sp.Symbol("w", nonnegative=True), DCT(2).frequencies((4, 4))
    one, other = (SDE(-t * w * x, 1, params={w: values}, basis=basis) for basis in (DCT(2), None))
    with pytest.raises(ValueError, match="another SDE"):
        other.flow_ode(GaussianMixture(one, torch.zeros(1, 1, 4, 4), torch.tensor([0.1])))
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))

    def train(table, resume):
        rate = sdeflow.schedule(table, name="rate")
        torch.manual_seed(0)
        sdeflow.fit(sdeflow.Score(MLP(2, 8), SDE(-rate(t) * x, 1)), data, 2, 16, out=tmp_path, resume=resume)

    train(([0, 1], [1, 3]), resume=False)
    with pytest.raises(sdeflow.errors.CheckpointMismatch, match="schedules"):
        train(([0, 1], [5, 30]), resume=True)


def test_schedules_of_tensor_functions_and_pickles():
    import pickle

    decay = sdeflow.schedule(lambda s: torch.exp(-s))
    alpha = SDE(-decay(t) * x, 1).kernel.coefficients(torch.tensor(1.0, dtype=torch.float64))[0]
    assert abs(float(alpha) - math.exp(-(1 - math.exp(-1)))) < 1e-7
    sde = SDE(-BETA(t) * x / 2, sp.sqrt(BETA(t) + sp.diff(BETA(t), t) ** 2))
    assert pickle.loads(pickle.dumps(sde.declaration)) == sde.declaration


def test_stiff_drifts_are_integrated():
    sde = SDE(f=-1000 * x, g=1, T=5)
    assert abs(float(sde.kernel.coefficients(torch.tensor(5.0, dtype=torch.float64))[1]) - math.sqrt(1 / 2000)) < 1e-12
    a, b = state("a b")
    kernel = SDE(f=[200 * (b - a), -a - b], g=[1, 1], T=5).kernel
    _, root, _ = kernel.coefficients(torch.tensor(5.0, dtype=torch.float64))
    F, P = torch.tensor([[-200.0, 200.0], [-1.0, -1.0]], dtype=torch.float64), root @ root.T
    assert (F @ P + P @ F.T + torch.eye(2)).abs().max() < 1e-2 * 1e-3  # stationary up to e^{-2 · 2 · 5}


def test_a_bridge_from_noise_is_one_law_at_all_times():
    """With P0 > 0 the state at 0 is random; paths, moments and the limit t -> 0 agree."""
    bridge = SDE(f=-x, g=1, P0=0.3).bridge(1.0)
    start = torch.zeros(20_000, 1, dtype=torch.float64)
    paths = bridge.paths(start, [0.0, 0.5, 1.0], seed=0)
    for path, at in zip(paths, (0.0, 0.5), strict=False):
        mean, std = bridge.moments(start[:1], at)
        assert abs(float(path.mean() - mean)) < 4 * float(std) / math.sqrt(20_000)
        assert abs(float(path.std() / std) - 1) < 4 * math.sqrt(0.5 / 20_000)
    assert float(paths[2].std()) < 1e-12
    sde = SDE(f=[V + 1, -X - V], g=[0, 1], P0=[0, 0.5])
    coupled = sde.bridge(torch.tensor([[1.0], [0.4]]))
    data = torch.tensor([[[0.7], [-0.2]]], dtype=torch.float64)
    for one, other in zip(coupled.moments(data, 0.0), coupled.moments(data, 1e-9), strict=True):
        assert torch.allclose(one, other, atol=1e-7)
    began = cpu_seconds()
    repr(SDE(f="-x*exp(-t**2)", g=1).bridge(1.0))
    assert cpu_seconds() - began < 5.0
