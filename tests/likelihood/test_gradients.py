"""Gradients of log p: by backpropagation and by the adjoint equation, against closed forms and finite differences."""

import math
import weakref

import pytest
import torch
from problems import ring

import sdeflow
from sdeflow import SDE, catalog, x
from sdeflow.likelihood import adjoint
from sdeflow.scores import GaussianMixture
from sdeflow.solvers import Exponential

MODES = ["backprop", "adjoint"]


class Learned(torch.nn.Module):
    """The score of N(m, v) with m and v to be learned, under ``sde``."""

    def __init__(self, sde, mean=0.3, variance=0.5):
        super().__init__()
        self.sde = sde
        self.m = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.v = torch.nn.Parameter(torch.tensor(variance, dtype=torch.float64))

    def forward(self, state, time):
        alpha, sigma, _ = (v.reshape(-1, *(1,) * (state.ndim - 1)) for v in self.sde.kernel.coefficients(time.double()))
        return -(state - alpha * self.m) / (alpha**2 * self.v + sigma**2)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 24), torch.nn.Tanh(), torch.nn.Linear(24, 2)).double()

    def forward(self, state, time):
        return self.layers(torch.cat([state, time[:, None] / 10], 1))


def points(n=6, d=2):
    return 0.7 * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("name", ["VP", "VE", "SubVP", "CosineVP", "EDM", "FlowMatching"])
def test_the_gradient_in_x_is_the_score(name, gradient):
    """∇ log p at the cutoff is the exact score there."""
    sde = getattr(catalog, name)()
    exact = ring(sde, std=0.3)
    state = points().requires_grad_(True)
    value = sde.flow_ode(exact).log_prob(state, steps=80, grid="pilot", gradient=gradient)
    (found,) = torch.autograd.grad(value.sum(), state)
    truth = exact(state.detach(), sde.cutoff)
    assert float((found - truth).abs().max()) < 2e-3 * float(truth.abs().max())


@pytest.mark.parametrize("gradient", MODES)
def test_the_gradient_of_a_coupled_state_is_the_joint_score(gradient):
    sde = catalog.CriticallyDampedLangevin()
    exact = GaussianMixture(sde, torch.tensor([[-0.6, 0.0], [0.6, 0.4]]), torch.tensor([0.3, 0.2]))
    state = torch.stack([points(), 0.1 * points().flip(0)], 1).requires_grad_(True)
    value = sde.flow_ode(exact).log_prob(state, steps=400, gradient=gradient)
    (found,) = torch.autograd.grad(value.sum(), state)
    truth = exact(state.detach(), sde.cutoff)
    assert float((found - truth).abs().max()) < 5e-3 * float(truth.abs().max())


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("name", ["VP", "VE", "CosineVP"])
def test_the_gradient_in_the_parameters_has_its_closed_form(name, gradient):
    """Of a Gaussian model and a prior that stays: x_T = α_T m + (S_T / S_c) (x - α_c m)."""
    sde = getattr(catalog, name)()
    score = Learned(sde)
    state = points(5, 1)
    prior = sde.prior_for(0.3, math.sqrt(0.5))
    value = sde.flow_ode(score, prior=prior).log_prob(state, steps=80, grid="pilot", gradient=gradient)
    weight = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    found = torch.autograd.grad((weight * value).sum(), [score.m, score.v])

    m, v = (p.detach().clone().requires_grad_(True) for p in (score.m, score.v))
    ends = torch.tensor([sde.cutoff, sde.T], dtype=torch.float64)
    alpha, sigma, _ = sde.kernel.coefficients(ends)
    S = (alpha**2 * v + sigma**2).sqrt()
    x_T = alpha[1] * m + S[1] / S[0] * (state - alpha[0] * m)
    exactly = prior.log_prob(x_T) + torch.log(S[1] / S[0])
    truth = torch.autograd.grad((weight * exactly).sum(), [m, v])
    torch.testing.assert_close(value.detach(), exactly.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(found), torch.stack(truth), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("predicts", ["edm", "noise", "data", "v", "velocity", "score"])
def test_both_agree_for_every_prediction(predicts):
    sde = catalog.VP()
    score = sdeflow.Score(Net(), sde, predicts=predicts, data_mean=torch.tensor([0.4, -0.2]), data_std=0.7)
    flow, parameters = sde.flow_ode(score), list(score.net.parameters())

    def gradients(gradient, **options):
        state = points().requires_grad_(True)
        value = flow.log_prob(state, gradient=gradient, **options)
        return torch.autograd.grad(value.square().sum(), [state, *parameters])

    exactly = gradients("backprop", steps=150)
    by_torchdiffeq = gradients("backprop", solver="rk4", steps=100)
    for found, bound in ((gradients("adjoint", steps=150), 2e-3), (by_torchdiffeq, 0.1)):
        if predicts == "data" and found is by_torchdiffeq:
            continue  # a random denoiser's score is too stiff for it
        for a, b in zip(found, exactly, strict=True):
            assert float((a - b).abs().max()) < bound * float(b.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("gradient", MODES)
def test_the_value_is_that_without_a_gradient(gradient):
    sde = catalog.VP()
    flow = sde.flow_ode(ring(sde))
    for options in ({"steps": 30}, {"atol": 0.01}, {"steps": 30, "trace": "hadamard", "probes": 1, "full": True}):
        plain, state = flow.log_prob(points(), seed=0, **options), points().requires_grad_(True)
        value = flow.log_prob(state, seed=0, gradient=gradient, **options)
        plain, value = (v if isinstance(v, torch.Tensor) else v.value for v in (plain, value))
        assert value.requires_grad and not plain.requires_grad
        torch.testing.assert_close(value.detach(), plain, rtol=1e-9, atol=1e-9)


def test_backpropagation_is_the_gradient_of_the_number_computed():
    sde = catalog.VP()
    flow = sde.flow_ode(ring(sde))
    plain = Exponential(4, "data", corrector=False)
    for options in (
        {"steps": 12}, {"steps": 12, "at": "data"}, {"steps": 9, "trace": "hutchinson", "probes": 2},
        {"solver": "heun2", "steps": 8}, {"solver": plain, "steps": 9},
    ):  # fmt: skip
        state = points().requires_grad_(True)
        value = flow.log_prob(state, seed=0, gradient="backprop", warn_above=99, **options)
        (found,) = torch.autograd.grad(value.sum(), state)
        shift = torch.zeros_like(state)
        shift[:, 1] = 1e-5
        ahead, back = (flow.log_prob(state.detach() + s, seed=0, warn_above=99, **options) for s in (shift, -shift))
        torch.testing.assert_close(found[:, 1], (ahead - back) / 2e-5, rtol=1e-5, atol=1e-5)


def test_probes_at_a_node_are_the_same_on_the_way_back():
    """With fresh probes at each node the adjoint gradient is that of the estimate, and not of another."""
    sde = catalog.VP()
    score = sdeflow.Score(Net(), sde, predicts="edm", data_mean=0.0, data_std=0.7)
    weight = score.net.layers[0].weight
    for trace, probes in (("hutchinson", 1), ("hadamard", 1), ("hutch++", 3)):
        found, again, other = (
            torch.autograd.grad(value.sum(), weight)[0]
            for value in (
                sde.flow_ode(score)
                .log_prob(points(), steps=100, trace=trace, probes=probes, seed=seed, gradient=gradient, full=True)
                .value
                for seed, gradient in ((3, "adjoint"), (3, "backprop"), (4, "backprop"))
            )
        )
        apart = float((found - again).abs().max())
        assert apart < 5e-3 * float(found.abs().max())
        if trace != "hutch++":  # exact in two dimensions
            assert apart < 0.2 * float((found - other).abs().max())


def test_the_adjoint_keeps_nothing_of_the_steps():
    """No more of the score's outputs live at once in 60 steps than in 10; backpropagation keeps them all."""
    sde = catalog.VP()
    net, alive, most = Net().requires_grad_(False), [], {}

    class Counted(torch.autograd.Function):
        """The identity, whose graph holds a token for as long as it lives."""

        @staticmethod
        def forward(ctx, value):
            ctx.token = type("Token", (), {})()
            alive.append(weakref.ref(ctx.token))
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.clone()

    def score(state, time):
        alive[:] = [reference for reference in alive if reference() is not None]
        most[key] = max(most.get(key, 0), len(alive))
        return Counted.apply(net(state, time) - state)

    flow = sde.flow_ode(score, prior=sde.prior_for(0.0, 1.0))
    for gradient in MODES:
        for steps in (10, 60):
            key = gradient, steps
            state = points(2).requires_grad_(True)
            flow.log_prob(state, steps=steps, gradient=gradient).sum().backward()
    assert most["backprop", 60] >= 55 and most["adjoint", 60] <= most["adjoint", 10] <= 3


def test_gradients_that_are_meant_and_those_that_are_not():
    sde = catalog.VP()
    score = sdeflow.Score(Net(), sde, data_mean=0.0, data_std=0.7)
    flow = sde.flow_ode(score)
    assert not flow.log_prob(points(), steps=8).requires_grad  # parameters alone have to be meant
    assert flow.log_prob(points().requires_grad_(True), steps=8).requires_grad
    assert flow.log_prob(points().requires_grad_(True), rtol=1e-3).requires_grad
    with torch.no_grad():
        assert not flow.log_prob(points().requires_grad_(True), steps=8).requires_grad
    with pytest.raises(ValueError, match="gradient must be"):
        flow.log_prob(points(), gradient="yes")
    with pytest.raises(ValueError, match="backprop"):
        flow.log_prob(points(), gradient="adjoint", solver="dopri5")
    value = flow.log_prob(points(), steps=8, gradient="adjoint")
    with torch.no_grad():
        score.net.layers[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified"):
        value.sum().backward()


def test_a_learned_schedule_is_refused_and_a_general_equation_is_not():
    rate = torch.nn.Parameter(torch.tensor(1.0))
    sde = SDE("-k*x", 1, params={"k": rate}, T=2.0)
    exact = GaussianMixture(sde, torch.zeros(1, 1), torch.ones(1))
    with pytest.raises(ValueError, match="SDE itself"):
        sde.flow_ode(exact).log_prob(points(3, 1), steps=8, gradient="backprop")
    rate.requires_grad_(False)
    assert sde.flow_ode(exact).log_prob(points(3, 1), steps=8, gradient="backprop").shape == (3,)
    general = SDE(x - x**3, 1, T=1.0)
    flow = general.flow_ode(lambda state, time: -state, prior=sdeflow.Gaussian(0.0, 1.0))
    state = points(3, 1).requires_grad_(True)
    (found,) = torch.autograd.grad(flow.log_prob(state).sum(), state)
    ahead, back = (flow.log_prob(state.detach() + s) for s in (1e-4, -1e-4))
    torch.testing.assert_close(found[:, 0], (ahead - back) / 2e-4, rtol=1e-3, atol=1e-3)


def test_planted_mistakes_in_the_adjoint_are_found(monkeypatch):
    sde = catalog.VP()
    exact = ring(sde, std=0.3)
    truth = exact(points(), sde.cutoff)

    def off():
        state = points().requires_grad_(True)
        value = sde.flow_ode(exact).log_prob(state, steps=80, grid="pilot", gradient="adjoint")
        return float((torch.autograd.grad(value.sum(), state)[0] - truth).abs().max() / truth.abs().max())

    assert off() < 2e-3
    rates, moved = adjoint._Hamiltonian.rates, adjoint._moved
    with monkeypatch.context() as patch:
        patch.setattr(adjoint._Hamiltonian, "rates", lambda *a: (rates(*a)[0], -rates(*a)[1]))
        assert off() > 0.02
    with monkeypatch.context() as patch:
        patch.setattr(adjoint, "_moved", lambda base, past, nodes, *ends: moved(base, [past[0]], nodes[:1], *ends))
        assert off() > 4e-3


def test_parameters_in_a_closure_are_reached_or_refused():
    sde, net = catalog.VP(), Net()
    flow = sde.flow_ode(lambda state, time: net(state, time) - state, prior=sde.prior_for(0.0, 1.0))
    with pytest.raises(ValueError, match="closure"):
        flow.log_prob(points(), steps=8, gradient="adjoint")
    flow.log_prob(points().requires_grad_(True), steps=8).sum().backward()  # by backpropagation then
    assert all(bool(parameter.grad.any()) for parameter in net.parameters())
    tensor = torch.tensor([5.0, 9.0], dtype=torch.float64, requires_grad=True)
    scaled = SDE("-b*x/2", "sqrt(b)", params={"b": tensor})
    exact = GaussianMixture(scaled, torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="SDE itself"):
        scaled.flow_ode(exact).log_prob(points(), steps=8, gradient="backprop")


@pytest.mark.parametrize("gradient", MODES)
def test_the_bound_of_the_data_component_has_its_gradient(gradient):
    sde = catalog.CriticallyDampedLangevin()
    exact = GaussianMixture(sde, torch.tensor([[-0.6, 0.0], [0.6, 0.4]]), torch.tensor([0.3, 0.2]))
    flow, options = sde.flow_ode(exact), {"samples": 2, "seed": 0, "steps": 60}
    state = points(3).requires_grad_(True)
    (found,) = torch.autograd.grad(flow.data_log_prob(state, gradient=gradient, **options).sum(), state)
    shift = torch.zeros_like(state)
    shift[:, 0] = 1e-5
    ahead, back = (flow.data_log_prob(state.detach() + s, **options) for s in (shift, -shift))
    bound = 1e-4 if gradient == "backprop" else 0.1
    assert float((found[:, 0] - (ahead - back).detach() / 2e-5).abs().max()) < bound * float(found.abs().max())
