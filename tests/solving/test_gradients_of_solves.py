"""Gradients through decode, encode and simulate against central differences, and errors where there is none."""

import copy

import pytest
import sympy as sp
import torch
from torch import nn

import sdeflow
from sdeflow import SDE, BrownianPath, ScoreError, catalog, x
from sdeflow.solvers import SingleStep, Torchdiffeq, Torchsde

double = torch.float64
R = sp.Rational


def small_flow():
    torch.manual_seed(0)
    sde = catalog.VP(0.1, 4.0)
    score = sdeflow.Score(sdeflow.nets.MLP(2, 8).double(), sde, data_mean=0.1, data_std=0.8)
    return sde.flow_ode(score), score


def central(function, tensor, direction, h=1e-5):
    """The derivative of ``function()`` as ``tensor`` moves along ``direction``."""
    found = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            tensor.add_(direction, alpha=sign * h)
            found.append(float(function()))
            tensor.add_(direction, alpha=-sign * h)
    return (found[0] - found[1]) / (2 * h)


def agree(function, tensors, rtol=2e-5, h=1e-5):
    """Whether backpropagation of ``function(gradient)`` has the central differences along a fixed direction."""
    gradients = torch.autograd.grad(function("backprop"), tensors)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        direction = torch.linspace(-1.0, 1.3, tensor.numel(), dtype=double).reshape(tensor.shape)
        measured = central(lambda: function(None), tensor.data, direction, h)
        assert abs(float((gradient * direction).sum()) - measured) < rtol * (1.0 + abs(measured)), tensor.shape


WAYS = {
    "exponential": {"steps": 9}, "pilot": {"steps": 9, "grid": "pilot"}, "chunks": {"steps": 5, "chunk": 2},
    "single step": {"solver": SingleStep(2), "steps": 5}, "heun": {"solver": "heun", "steps": 6},
    "euler": {"solver": "euler", "steps": 9}, "rk4": {"solver": Torchdiffeq("rk4"), "steps": 4},
    "dopri5": {"rtol": 1e-9, "atol": 1e-9},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_decode_has_the_gradient_of_what_it_computes(way):
    flow, score = small_flow()
    z = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.1]], dtype=double, requires_grad=True)
    weight = list(score.net.parameters())[-2]

    def loss(gradient):
        return flow.decode(z, gradient=gradient, **WAYS[way]).square().sum()

    agree(loss, [z, weight])


def test_encode_and_trajectories_have_gradients_too_and_the_input_may_ask():
    flow, score = small_flow()
    y = torch.tensor([[0.3, -1.0], [0.2, 0.4]], dtype=double, requires_grad=True)
    agree(
        lambda gradient: flow.encode(y, steps=6, gradient=gradient).pow(3).sum(),
        [y, next(iter(score.net.parameters()))],
    )
    states, _ = flow.decode(y, steps=4, trajectory=True)
    assert states.requires_grad  # y requires grad
    (found,) = torch.autograd.grad(states[2].sum(), y)
    assert bool((found != 0).all())
    assert not flow.decode(y.detach(), steps=4).requires_grad
    with torch.no_grad():
        assert not flow.decode(y, steps=4).requires_grad
        assert flow.decode(y, steps=4, gradient="backprop").requires_grad


@pytest.mark.parametrize("solver", ["euler", "exact", Torchsde("milstein"), Torchsde("srk"), Torchsde("heun")], ids=str)
def test_simulate_has_the_gradient_in_the_start_and_in_the_parameters_of_the_sde(solver):
    a, b = sp.symbols("a b", positive=True)
    rate, size = (nn.Parameter(torch.tensor(v, dtype=double)) for v in (0.7, 0.4))
    sde = SDE(-a * x, b if solver == "exact" else b * x, T=1, params={a: rate, b: size})
    start = torch.tensor([[1.0, 0.5], [2.0, 1.0]], dtype=double, requires_grad=True)
    how = {"seed": 3} if solver == "exact" else {"steps": 12, "noise": BrownianPath(seed=3)}

    def loss(gradient):
        return sde.simulate(start, [0.4, 1.0], solver, gradient=gradient, **how).square().sum()

    agree(loss, [start, rate, size])


def test_a_coupled_simulation_has_gradients():
    u, v = sdeflow.state("u v")
    w = sp.Symbol("w", positive=True)
    stiffness = nn.Parameter(torch.tensor(1.5, dtype=double))
    sde = SDE([v, -w * sp.sin(u) - v], [0, 1], T=1, params={w: stiffness})
    start = torch.full((3, 2, 1), 0.4, dtype=double, requires_grad=True)
    agree(
        lambda gradient: sde.simulate(start, [1.0], steps=10, seed=1, gradient=gradient).pow(3).sum(),
        [start, stiffness],
    )


k, theta, size, end = sp.symbols("kappa theta sigma e", positive=True)


def learned(*numbers):
    return [nn.Parameter(torch.tensor(number, dtype=double)) for number in numbers]


def cir_with_its_numbers():
    numbers = learned(2.0, 0.04, 0.6)
    return SDE(k * (theta - x), size * sp.sqrt(x), params=dict(zip((k, theta, size), numbers, strict=True))), numbers


@pytest.mark.parametrize("solver", ["euler", Torchsde("euler")], ids=str)
@pytest.mark.parametrize("boundary", ["truncate", "reflect"])
def test_a_square_root_process_at_its_end_has_gradients(boundary, solver):
    sde, numbers = cir_with_its_numbers()
    start = torch.full((40, 1), 0.05, dtype=double, requires_grad=True)

    def loss(gradient):
        states = sde.simulate(start, [0.5, 1.0], solver, 20, seed=0, boundary=boundary, gradient=gradient)
        return (10 * states).square().mean()

    agree(loss, [start, *numbers], h=1e-8)
    beyond = sde.simulate(start.detach(), [k / 20 for k in range(1, 21)], solver, 20, seed=0, boundary="truncate")
    assert bool((beyond == 0).any(0).sum() > 10)  # paths that were cut


def test_heston_by_truncation_has_gradients():
    _, v = sdeflow.state("y v")
    rho = sp.Symbol("rho")
    numbers = learned(2.0, 0.04, 0.6, -0.7)
    sde = SDE(
        [R(1, 20) - v / 2, k * (theta - v)],
        [[sp.sqrt(v), 0], [rho * size * sp.sqrt(v), size * sp.sqrt(1 - rho**2) * sp.sqrt(v)]],
        params=dict(zip((k, theta, size, rho), numbers, strict=True)),
    )
    start = torch.tensor([[0.0, 0.04]], dtype=double).repeat(40, 1).requires_grad_()

    def loss(gradient):
        states = sde.simulate(start, [0.5, 1.0], steps=20, seed=0, boundary="truncate", gradient=gradient)
        return (3 * states).exp().mean()

    agree(loss, [start, *numbers], h=1e-8)


def test_a_reflected_ornstein_uhlenbeck_process_has_the_gradients_of_its_mean():
    """|y| of an Ornstein-Uhlenbeck process y, whose Euler chain is |N(m, v)| too. The drift 0 sqrt(x) has the end 0."""
    replicas, n, steps, h = 64, 100, 25, 1 / 25
    rate, noise, start = (
        torch.full((replicas,), number, dtype=double, requires_grad=True) for number in (1.5, 0.8, 0.3)
    )
    sde = SDE(-k * x + theta * sp.sqrt(x), size, params={k: rate, size: noise, theta: 0.0})
    states = sde.simulate(
        start.expand(n, replicas), [1.0], steps=steps, seed=0, boundary="reflect", gradient="backprop"
    )
    found = torch.autograd.grad(states.mean((0, 1)).sum(), (rate, noise, start))
    a, s, y = (part[0].detach().requires_grad_() for part in (rate, noise, start))
    m, v = (1 - a * h) ** steps * y, s**2 * h * sum((1 - a * h) ** (2 * j) for j in range(steps))
    mean = (2 * v / torch.pi).sqrt() * torch.exp(-(m**2) / (2 * v)) + m * torch.erf(m / (2 * v).sqrt())
    for ours, truth in zip(found, torch.autograd.grad(mean, (a, s, y)), strict=True):
        assert abs(float(ours.mean() - truth)) < 4 * float(ours.std()) / replicas**0.5


def test_an_end_that_moves_with_a_parameter():
    """Reflected, its gradient is exact; truncated, the coefficients' derivative on the end is unknown: refused."""
    (moved,) = learned(0.01)
    sde = SDE(2 * (R(1, 25) - x), R(3, 5) * sp.sqrt(x - end), params={end: moved})
    start = torch.full((40, 1), 0.05, dtype=double)

    def loss(gradient, boundary="reflect"):
        return sde.simulate(start, [1.0], steps=20, seed=0, boundary=boundary, gradient=gradient).square().mean()

    agree(loss, [moved], h=1e-8)
    with pytest.raises(ValueError, match="moves with e"):
        loss("backprop", "truncate")
    assert not loss(None, "truncate").requires_grad


def test_gradients_that_an_end_does_not_have():
    sde, _ = cir_with_its_numbers()
    start = torch.full((3, 1), 0.05, dtype=double)
    with pytest.raises(ValueError, match="absorbed jumps"):
        sde.simulate(start, [1.0], steps=5, seed=0, boundary="absorb", gradient="backprop")
    asked = torch.tensor([[0.1], [0.0]], dtype=double, requires_grad=True)
    for boundary in ("truncate", "reflect"):
        with pytest.raises(ValueError, match="lies on an end"):
            sde.simulate(asked, [1.0], steps=5, seed=0, boundary=boundary)
        states = sde.simulate(asked.detach(), [1.0], steps=5, seed=0, boundary=boundary, gradient="backprop")
        found = torch.autograd.grad(states.sum(), list(sde.values.tensors.values()))
        assert all(bool(torch.isfinite(part).all()) for part in found)
    feller = SDE(-x, sp.sqrt(x))  # f = g = 0 at the end: truncation shows what absorption does
    shown = [feller.simulate(start, [1.0], steps=50, seed=0, boundary=kind) for kind in ("truncate", "absorb")]
    assert torch.equal(*shown) and bool((shown[0] == 0).any())


def test_a_gradient_that_cannot_be_had_is_an_error():
    flow, score = small_flow()
    z = torch.zeros(2, 2, dtype=double, requires_grad=True)

    def blind(x, t):
        with torch.no_grad():
            return score(x, t)

    with pytest.raises(ScoreError, match="no gradient flows"):
        sdeflow.catalog.VP(0.1, 4.0).flow_ode(blind, prior=sdeflow.Gaussian(0.0, 1.0)).decode(z, steps=4)
    with pytest.raises(ValueError, match=r"no gradient flows through .*scipy_solver"):
        flow.decode(z, Torchdiffeq("scipy_solver"))
    with pytest.raises(ValueError, match="adjoint"):
        flow.decode(z, steps=4, gradient="adjoint")
    with pytest.raises(ValueError, match="backprop"):
        flow.decode(z, steps=4, gradient="yes")
    frozen = copy.deepcopy(score).requires_grad_(False)
    with pytest.raises(ValueError, match="requires grad"):
        catalog.VP(0.1, 4.0).flow_ode(frozen).decode(z.detach(), steps=4, gradient="backprop")
    with pytest.raises(ValueError, match="requires grad"):
        SDE(-x, 1).simulate(z.detach(), [1.0], steps=4, gradient="backprop")
    a = sp.Symbol("a", positive=True)
    learned = SDE(-a * x, 1, params={a: nn.Parameter(torch.tensor(1.0))})
    with pytest.raises(ValueError, match="parameters of the SDE"):
        learned.flow_ode(lambda x, t: -x, prior=sdeflow.Gaussian(0.0, 1.0)).decode(z, steps=4)
