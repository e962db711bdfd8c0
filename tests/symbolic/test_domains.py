"""Declarations whose coefficients are real on a part of the states alone, wherever that lies."""

import pytest
import sympy as sp
import torch

from sdeflow import SDE, ScheduleError, state, t, x
from sdeflow.symbolic.exact import without_poles

R, k = sp.Rational, sp.Symbol("k")
S, V = state("S V")

PEARSON = {
    "between 0 and 0.2": (R(1, 10) - x, sp.sqrt(x * (R(1, 5) - x)), {}, 0.1),
    "between 0 and a parameter": (R(1, 10) - x, sp.sqrt(x * (k - x)), {k: 0.2}, 0.1),
    "between 0 and 1e-7": (R(1, 2 * 10**7) - x, sp.sqrt(x * (R(1, 10**7) - x)), {}, 5e-8),
    "above 5": (10 - x, sp.sqrt(x - 5), {}, 10.0),
    "above a million": (1000010 - x, sp.sqrt(x - 1000000), {}, 1000010.0),
    "between 5 and 20": (10 - x, sp.sqrt((x - 5) * (20 - x)), {}, 10.0),
    "below -2": (-(x + 2) - 1, sp.sqrt(-2 - x), {}, -3.0),
}

GENERAL = {
    "a logarithm above 3": (sp.log(x - 3), 1),
    "an end that moves": (3 * t + 10 - x, sp.sqrt(x - 5 - 3 * t)),
    "an arc cosine from 2 to 4, without an end that is told": (-x, sp.acos(x - 3)),
    "exp(x) above 20": (-x, sp.sqrt(sp.exp(x) - 20)),
    "one of two components": ([0, 1 - V], [sp.sqrt(V - 3), sp.sqrt(V - 3)]),
    "both of two components": ([0, 1 - V], [sp.sqrt(V - 30) * sp.sqrt(S * (R(1, 10) - S)), 1]),
    "components that mix": ([-S, -V], [sp.sqrt(S - V - 7), 1]),
}


@pytest.mark.parametrize("name", PEARSON)
def test_pearson_laws_are_declared_wherever_their_domain_lies(name):
    f, g, params, mean = PEARSON[name]
    sde = SDE(f, g, params=params)
    assert sde.kind == "pearson"
    x_0 = torch.full((4096, 1), mean, dtype=torch.float64)
    drawn = sde.kernel.sample(x_0, 1.0, seed=0)  # from the mean, which then stays
    assert abs(float(drawn.mean()) - mean) <= 4 * float(drawn.std()) / 64
    around = mean * (1.0 + torch.linspace(-1e-7, 1e-7, 2, dtype=torch.float64)[:, None])
    assert torch.isfinite(sde.kernel.log_prob(around, x_0[:2], 0.5)).all()


@pytest.mark.parametrize("name", GENERAL)
def test_general_equations_are_declared_wherever_their_domain_lies(name):
    assert SDE(*GENERAL[name]).kind == "general"


def test_a_simulation_runs_between_far_ends():
    f, g, _, mean = PEARSON["between 5 and 20"]
    states = SDE(f, g).simulate(torch.full((2048, 1), 10.0), [0.5, 1.0], steps=64, boundary="truncate", seed=0)
    assert 5 <= float(states.min()) < float(states.max()) <= 20
    assert abs(float(states[-1].mean()) - mean) <= 4 * float(states[-1].std()) / 2048**0.5


@pytest.mark.parametrize("g", [sp.sqrt(-1 - x**2), sp.log(-sp.exp(x)), sp.sqrt(R(1, 2) - t) * (1 + x**2)])
def test_what_is_real_nowhere_is_refused(g):
    with pytest.raises(ScheduleError, match="not finite and real at t = "):
        SDE(-x, g)


def test_what_has_a_pole_is_seen():
    q = R(1, 2)
    finite = (
        sp.exp(-(((t - 0.3) / 1e-3) ** 2)), sp.sqrt(1 + t), sp.Piecewise((1, (t < 1) | (t > 2)), (t**2, True)),
        2**t * sp.sin(k * t), sp.Max(t, 1) + sp.pi, sp.Abs(t - 1) * sp.tanh(t) / 10, sp.Integer(0),
    )  # fmt: skip
    poles = (
        1 / t, sp.log(t), sp.tan(t), t**-q, t**k, sp.exp(1 / (1 - t)), sp.gamma(t), sp.atanh(t), (-2) ** t,
        sp.Mod(t, 1), sp.oo * sp.Symbol("p", positive=True), sp.log(sp.cos(t)) * sp.sin(t),
    )  # fmt: skip
    assert all(map(without_poles, finite))
    assert not any(map(without_poles, poles))
