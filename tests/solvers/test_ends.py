"""A step that ends at T, or begins at 0 or at the cutoff, takes f and g from inside, whatever they are at that instant.

Each SDE stands beside its twin, which differs from it at one instant alone, or outside [0, T]: all numbers must agree.
"""

import pytest
import sympy as sp
import torch

from sdeflow import SDE, scores, state, t, x
from sdeflow.numerics.compile import compile_expressions

D = torch.float64
R, P = sp.Rational, sp.Piecewise
k = sp.Symbol("k", positive=True)
position, velocity = state("a b")
STAIRS = P((1, t < R(1, 4)), (2, t < R(1, 2)), (3, t < R(3, 4)), (4, True))
SAW = P((3 * t, t < R(1, 3)), (3 * t - 1, t < R(2, 3)), (3 * t - 2, True))


def turning(g):
    return SDE([4 * velocity, -4 * velocity - position], [0, g], P0=[R(1, 10), R(1, 10)], T=1)


def per_coordinate(last):
    return SDE(-x, P((1, t < k), (30, True)), params={k: torch.tensor([0.5, last], dtype=D)}, P0=R(1, 10))


PAIRS = {
    "a pulse after T": lambda: (SDE(-x, P((1, t < 1), (30, True)), P0=R(1, 10)), SDE(-x, 1, P0=R(1, 10))),
    "floor": lambda: (SDE(-x * sp.floor(1 + 4 * t), sp.floor(1 + 4 * t)), SDE(-x * STAIRS, STAIRS)),
    "Mod": lambda: (SDE(-x, 1 + 9 * sp.Mod(3 * t, 1)), SDE(-x, 1 + 9 * SAW)),
    "a curve": lambda: (SDE(-x + P((1, t**2 < R(1, 2)), (30, True)), 1, T=0.5**0.5), SDE(1 - x, 1, T=0.5**0.5)),
    "per coordinate": lambda: (per_coordinate(1.0), per_coordinate(2.0)),
    "coupled": lambda: (turning(P((1, t < 1), (30, True))), turning(1)),
    "at 0": lambda: (SDE(-x, P((30, t <= 0), (1, True)), P0=R(1, 10)), SDE(-x, 1, P0=R(1, 10))),
    "f at 0": lambda: (SDE(-x * (1 + 30 * sp.floor(1 - t)), 2, P0=1), SDE(-x, 2, P0=1)),
    "at the cutoff": lambda: (
        SDE(-x, P((30, t <= R(1, 8)), (2, True)), cutoff=0.125), SDE(-x, P((30, t < R(1, 8)), (2, True)), cutoff=0.125),
    ),
}  # fmt: skip


def numbers(sde):
    """What solvers of each kind make of an SDE."""
    shape = (2, 2, 1) if sde.declaration.coupled else (2, 2)
    exact = scores.GaussianMixture(sde, torch.full((1, *shape[1:]), 0.5, dtype=D), torch.ones(1, dtype=D))
    z = torch.linspace(-1, 1, 4, dtype=D).reshape(shape)
    given = torch.linspace(sde.cutoff, sde.T, 9, dtype=D)
    flow, reverse = sde.flow_ode(exact), sde.reverse(exact)
    yield "decode by Heun", flow.decode(z, "heun", grid=given)
    yield "encode by torchdiffeq", flow.encode(z, "rk4", steps=8)
    yield "encode by Euler", flow.encode(z, "euler", grid=given)
    yield "sample by Euler and Maruyama", reverse.sample(shape, "euler", grid=given, seed=0, dtype=D)
    by_torchsde = "heun" if sde.declaration.coupled else "srk"
    yield "sample by torchsde", reverse.sample(shape, by_torchsde, grid=given, seed=0, dtype=D)
    yield "log p", flow.log_prob(z, solver="rk4", grid=given)
    yield "simulate", sde.simulate(z, [sde.T], "heun", steps=8, seed=0)
    yield "coefficients", torch.cat([v.flatten() for v in sde.kernel.sde_coefficients(sde.T)])
    yield "rate of the log-SNR", sde.kernel.half_log_snr_rate(torch.tensor(sde.T, dtype=D))


@pytest.mark.filterwarnings("ignore::sdeflow.errors.CoarseStepsWarning")
@pytest.mark.parametrize("name", PAIRS)
def test_one_instant_changes_nothing(name):
    for (what, found), (_, true) in zip(*map(numbers, PAIRS[name]()), strict=True):
        assert torch.allclose(found, true, rtol=1e-8, atol=1e-10), what


def test_limits_are_from_inside_at_the_ends_alone():
    """Known values, in each dtype; a value that belongs to what is singular beside it stays as it is declared."""
    jumps = (sp.floor(2 * t), sp.Mod(-t, 1), P((5, t < 2), (t, True)) * x, sp.sign(t) * k)
    whole = compile_expressions(jumps, (t, x), {k: torch.tensor(3.0)}, horizon=2.0)
    for dtype in (torch.float32, D):
        time, ones = torch.tensor([0.0, 1.0, 2.0], dtype=dtype), torch.ones(3, dtype=dtype)
        values = whole(time, ones)
        for value, true in zip(values, ([0, 2, 3], [1, 0, 0], [5, 5, 5], [3, 3, 3]), strict=True):
            assert torch.allclose(value, torch.tensor(true, dtype=dtype), atol=2e-6)
    guard = compile_expressions(P((0, t <= 0), (t ** R(-1, 4), True)), (t,), horizon=1.0)
    assert guard(torch.zeros(1, dtype=D)).tolist() == [0.0]
    root = compile_expressions(P((0, t <= 0), (sp.sqrt(t), True)), (t,), horizon=1.0)
    assert root(torch.zeros(1, dtype=D)).tolist() == [0.0]


def test_a_time_keeps_its_gradient():
    level = compile_expressions(P((t**2, t < 1), (0, True)), (t,), horizon=1.0)
    time = torch.ones((), dtype=D, requires_grad=True)
    assert float(torch.autograd.grad(level(time), time)[0]) == pytest.approx(2.0)
