"""Gaussian paths with kinks and with long derivatives: declared with the moments that they were given."""

import pytest
import sympy as sp
import torch
from problems import cpu_seconds

from sdeflow import SDE, t
from sdeflow.symbolic.derivative import derivative
from sdeflow.symbolic.path import _at_start
from sdeflow.symbolic.patience import budget

R, k = sp.Rational, sp.Symbol("k")
exp, sin, tanh, Abs = sp.exp, sp.sin, sp.tanh, sp.Abs

KINKED = {
    "a modulus in alpha": (exp(-2 * t - Abs(t - R(1, 3)) + R(1, 3)), t),
    "a root of a square": (exp(-2 * t - sp.sqrt((t - k) ** 2) + k), t),
    "a modulus in sigma": (exp(-t), t + Abs(t - R(1, 3)) / 3 - R(1, 9)),
    "a broken line": (1 - t / 2 - Abs(t - R(1, 4)) / 4 + R(1, 16), t),
    "a power of a modulus": (exp(-2 * t - Abs(t - k) ** R(3, 2) + k ** R(3, 2)), t),
    "many": (exp(-8 * t - Abs(sin(7 * t))), t),
    "a maximum": (exp(-t - 2 * sp.Max(t - R(1, 3), 0)), t),
}

SLOWER = sp.Piecewise((t, t < R(1, 2)), (t**2 + R(1, 4), True))

LONG = {
    "branches and a wave": (exp(-SLOWER), t * (1 + sin(2 * t) ** 2 / 100)),
    "a fast wave": (exp(-t), t * (1 + sin(40 * t) ** 2 / 100)),
    "hyperbolic tangents": (1 - tanh(3 * t) ** 3, tanh(2 * t)),
    "branches": (sp.Piecewise((1 - t**2, t < R(1, 2)), (R(5, 4) - t, True)), tanh(2 * t) * (1 + t)),
}


@pytest.mark.parametrize("name", [*KINKED, *LONG])
def test_a_path_has_the_moments_that_were_declared(name):
    alpha, sigma = {**KINKED, **LONG}[name]
    before = cpu_seconds()
    sde = SDE.from_kernel(alpha, sigma, params={k: 1 / 3} if alpha.has(k) else None)
    assert cpu_seconds() - before < 3
    times = torch.tensor([0.05, 0.25, 1 / 3, 0.34, 0.5, 0.77, 1.0], dtype=torch.float64)
    mean, std = sde.kernel.moments(torch.ones(7, 1, dtype=torch.float64), times)
    for computed, declared in ((mean, alpha), (std, sigma)):
        exact = [float(declared.subs({t: float(time), k: 1 / 3})) for time in times]
        torch.testing.assert_close(computed[:, 0], torch.tensor(exact, dtype=torch.float64), rtol=1e-10, atol=0)


def test_the_slope_of_a_modulus_has_a_value_at_its_kink():
    for modulus in (Abs(t - k), sp.sqrt((t - k) ** 2), ((t - k) ** 4) ** R(1, 4)):
        slope = derivative(modulus, t)
        assert [slope.subs({k: R(1, 2), t: at}) for at in (0, R(1, 2), 1)] == [-1, 0, 1]


def test_the_start_of_a_path_is_known_when_no_time_is_left():
    alpha = exp(-SLOWER) * exp(-(sin(t) ** 20) * (1 + t) ** 50)
    with budget(0.0):
        assert float(_at_start(alpha)) == 1
