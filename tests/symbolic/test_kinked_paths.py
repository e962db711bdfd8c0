"""Gaussian paths with kinks and with long derivatives: declared with the moments that they were given."""

import pytest
import sympy as sp
import torch
from problems import cpu_seconds

import sdeflow
from sdeflow import SDE, t
from sdeflow.errors import ScheduleError
from sdeflow.kernels import continuity
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


HALF = R(1, 2)
UP = "signal-to-noise ratio alpha / sigma must fall in time, and at t = 0.5 it jumps up"
JUMPING = {
    "alpha falls": (sp.Piecewise((1 - t / 2, t < HALF), (HALF - t / 4, True)), None, "0.75 to 0.375 and sigma from"),
    "text": ("Piecewise((1 - t/2, t < 1/2), (1/2 - t/4, True))", None, "at t = 0.5: alpha from 0.75 to 0.375"),
    "a function": (lambda t: exp(-t) * (1 - sp.Heaviside(t - HALF) / 2), None, "at t = 0.5: alpha from 0.6065"),
    "of numbers": (sdeflow.schedule(lambda s: 1 - s / 2 if s < 0.5 else 0.5 - s / 4)(t), None, "from 0.75 to 0.375"),
    "of alpha up": (sp.Piecewise((1 - t, t < HALF), (R(9, 10) - t / 2, True)), t, UP),
    "sigma doubles": (1 - t / 2, sp.Piecewise((t / 2, t < HALF), (t, True)), "at t = 0.5: sigma from 0.25 to 0.5"),
    "sigma halves": (1, sp.Piecewise((t, t < HALF), (t / 2, True)), UP),
    "sigma from the start": (1, sp.Piecewise((0, t <= 0), (t + 1, True)), "at t = 0: sigma from 0 to 1"),
    "stairs": (1 - t / 2 - sp.floor(4 * t) / 10, t, "at t = 0.25: alpha from 0.875 to 0.775"),
    "teeth": (exp(-t), 1 + t - sp.Mod(t, R(2, 3)) / 2, "at t = 0.6666666667|at t = 0.666667"),
    "a sign": (1, t + 1 + sp.sign(t - HALF), "sigma from 0.5 to 1.5"),
    "steps alone": (1, sp.Piecewise((R(1, 100), t < HALF), (1, True)), "jumps alone, where t - 1/2 switches"),
    "a pulse": (exp(-t) * sp.Piecewise((HALF, (t > HALF) & (t < HALF + R(1, 10**5))), (1, True)), None, "at t = 0.5"),
    "log-SNR": (1 / sp.sqrt(1 + t**2 * exp(sp.Heaviside(t - HALF))), None, "at t = 0.5: alpha from"),
    "stairs from 0": (exp(-t - sp.ceiling(5 * t) / 7), None, "at t = 0: alpha from 1 to 0.8668"),
    "little": (sp.Piecewise((1 - t / 2, t < HALF), (1 - t / 2 - R(1, 10**6), True)), t, "alpha from 0.75 to 0.749999"),
}  # fmt: skip


@pytest.mark.parametrize("name", JUMPING)
def test_a_jump_of_a_path_is_refused_with_its_place(name):
    alpha, sigma, message = JUMPING[name]
    with pytest.raises(ScheduleError, match=message) as caught:
        SDE.from_kernel(alpha, sigma)
    assert message == UP or "Min(Max((t - c)/w, 0), 1)" in str(caught.value)


def test_a_jump_for_which_no_time_is_left_is_refused(monkeypatch):
    def out_of_time(*_):
        raise continuity.OutOfTime("the processor time allowed for all of this has run out.")

    monkeypatch.setattr(continuity, "number_at", out_of_time)
    with pytest.raises(ScheduleError, match="takes too long to find out"):
        SDE.from_kernel(JUMPING["alpha falls"][0])


def test_a_jump_of_one_coordinate_or_of_new_parameters_is_refused():
    path = sp.Piecewise((1 - t / 2, t < k), (R(3, 4) - (t - HALF) / 4, True))
    sde = SDE.from_kernel(path, t, params={k: torch.tensor([0.5, 0.5], dtype=torch.float64)})
    with pytest.raises(ScheduleError, match=r"at t = 0\.4: alpha from 0\.8 to 0\.775"):
        SDE.from_kernel(path, t, params={k: torch.tensor([0.5, 0.4], dtype=torch.float64)})
    with pytest.raises(ScheduleError, match=r"at t = 0\.4"):
        sde.with_params(k=0.4)
    sde.values[k].copy_(torch.tensor([0.5, 0.4]))  # as an optimiser does
    with pytest.raises(ScheduleError, match=r"jumps at t = 0\.4"):
        _ = sde.cutoff


RAMP = sp.Min(sp.Max((t - HALF) * 10**9, 0), 1)
CONTINUOUS = {
    "a steep ramp": (1 - t / 2 - RAMP / 10, t),
    "a ramp at the limit of numbers": (1 - t / 2 - sp.Min(sp.Max((t - HALF) * 10**12, 0), 1) / 10, None),
    "a line by floor": (1 - (sp.floor(4 * t) + sp.Mod(4 * t, 1) ** 2) / 5, t),
    "a kink by Heaviside": (1 - t / 2 - (t - HALF) * sp.Heaviside(t - HALF) / 4, None),
    "another value at one time": (exp(-t), sp.Piecewise((t, sp.Ne(t, HALF)), (5, True))),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_continuous_path_is_none_that_jumps(name):
    alpha, sigma = CONTINUOUS[name]
    sde = SDE.from_kernel(alpha, sigma, T=0.95)
    times = torch.tensor([0.2, 0.45, 0.7, 0.9], dtype=torch.float64)
    found = sde.kernel.coefficients(times)
    sigma = sp.sqrt(1 - alpha**2) if sigma is None else sigma
    for values, declared in zip(found, (alpha, sigma), strict=False):
        exact = torch.tensor([float(declared.subs(t, sp.Rational(float(s)))) for s in times], dtype=torch.float64)
        torch.testing.assert_close(values, exact, rtol=5e-6 if "limit" in name else 3e-8, atol=0)


def test_the_steps_of_a_line_by_floor_check():
    assert SDE.from_kernel(*CONTINUOUS["a line by floor"], T=0.95).derivation().holds


def test_the_slope_of_a_modulus_has_a_value_at_its_kink():
    for modulus in (Abs(t - k), sp.sqrt((t - k) ** 2), ((t - k) ** 4) ** R(1, 4)):
        slope = derivative(modulus, t)
        assert [slope.subs({k: R(1, 2), t: at}) for at in (0, R(1, 2), 1)] == [-1, 0, 1]


def test_the_start_of_a_path_is_known_when_no_time_is_left():
    alpha = exp(-SLOWER) * exp(-(sin(t) ** 20) * (1 + t) ** 50)
    with budget(0.0):
        assert float(_at_start(alpha)) == 1
