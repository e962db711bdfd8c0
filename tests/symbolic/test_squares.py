"""Squares under a root that are not written as such are read: as |u|, with a break point at the zero of u."""

import math
import time

import pytest
import sympy as sp
import torch

from sdeflow import SDE, state, t, x
from sdeflow.numerics.breakpoints import break_points
from sdeflow.symbolic.squares import with_squares_read

a = sp.Symbol("a")
third, half = sp.Rational(1, 3), sp.Rational(1, 2)


@pytest.mark.parametrize(
    ("text", "expected", "at"),
    [
        ("sqrt(t**2 - 2*t/3 + 1/9)", sp.Abs(t - third), 1 / 3),
        ("(t**2 - t + 1/4)**(1/2)", sp.Abs(t - half), 0.5),
        ("sqrt(4*t**2 - 4*t + 1)", 2 * sp.Abs(t - half), 0.5),
        ("sqrt(t**2 - 0.6*t + 0.09)", sp.Abs(t - sp.Rational(3, 10)), 0.3),
        ("sqrt(t**2 - pi*t/4 + pi**2/64)", sp.Abs(t - sp.pi / 8), math.pi / 8),
        ("sqrt(log(1+t)**2 - log(1+t) + 1/4)", sp.Abs(sp.log(1 + t) - half), math.exp(0.5) - 1),
        ("sqrt((t**2 - t + 1/4)*(1 + t))", sp.sqrt(t + 1) * sp.Abs(t - half), 0.5),
        ("(t**2 - t + 1/4)**(1/4)", sp.sqrt(sp.Abs(t - half)), 0.5),
        ("sqrt(t**2 - 2*a*t + a**2)", sp.sqrt((t - a) ** 2), 0.3),
        ("sqrt(1 + sqrt(t**2 - 2*t/3 + 1/9))", sp.sqrt(1 + sp.Abs(t - third)), 1 / 3),
    ],
)
def test_a_square_under_a_root_is_read(text, expected, at):
    params = {"a": 0.3} if "a**2" in text else {}
    sde = SDE(f"-x*{text}", text, params=params)
    assert sde.declaration.g == expected and sp.expand(sde.declaration.f + x * expected) == 0
    found = break_points(sde.declaration.diffusions, sde.values.numbers, 1.0)
    assert len(found) == 1 and abs(found[0] - at) < 1e-12


@pytest.mark.parametrize(
    "expr",
    [
        sp.sqrt(1 + t),
        sp.sqrt(10**6 * sp.exp(-1000 * t) + 1),
        sp.sqrt(sp.exp(-4 * t) + sp.exp(-2 * t)),
        sp.sqrt(t**2 - 2 * t / 3 + sp.Rational(1, 8)),
        (1 + t) ** 2,
        sp.sqrt((1 + a) ** 2 * t + 1),
    ],
)
def test_what_holds_no_square_of_t_stays(expr):
    assert with_squares_read(expr, (x, t)) is expr


def test_a_negative_square_is_still_no_real_number():
    assert with_squares_read(sp.sqrt(-(t**2) + t - sp.Rational(1, 4)), (t,)) == sp.I * sp.Abs(t - half)


@pytest.mark.parametrize("value", [0.3, torch.tensor([0.3, 0.6], dtype=torch.float64)])
def test_the_kernel_of_a_root_with_a_parameter(value):
    """alpha(1) = exp(-∫ |t - a| dt), and where g is |t - a| the variance is its known integral."""
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.as_tensor(value, dtype=torch.float64)
    alpha, _, _ = SDE("-x*sqrt(t**2 - 2*a*t + a**2)", 1, params={"a": value}).kernel.coefficients(one)
    torch.testing.assert_close(alpha, torch.exp(-(zero**2 + (1 - zero) ** 2) / 2), rtol=1e-10, atol=0)
    _, sigma, _ = SDE(0, "sqrt(t**2 - 2*a*t + a**2)", params={"a": value}).kernel.coefficients(one)
    torch.testing.assert_close(sigma**2, (zero**3 + (1 - zero) ** 3) / 3, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "root",
    [
        sp.sqrt(1 + sp.exp(-((t - sp.Rational(1, 3)) ** 2) * 10**10)),
        sp.sqrt(1 + t ** (10**6)),
        sp.sqrt(1 - (t + a) ** 999),
    ],
)
def test_what_would_be_a_polynomial_of_enormous_degree_takes_no_time(root):
    before = time.process_time()
    assert with_squares_read(root, (t,)) == root
    assert time.process_time() - before < 1.0


def test_squares_of_the_state_are_read_too():
    y, v = state("y v")
    sde = SDE([sp.sqrt(y**2 - 2 * y * v + v**2), 0], [1, 1])
    assert sde.declaration.f[0] == sp.Abs(y - v)
    assert SDE(x, sp.sqrt(x**2 - 2 * x + 1)).declaration.g == sp.Abs(x - 1)


def test_a_declaration_with_a_read_square_passes_its_certificate():
    sde = SDE("-x*sqrt(t**2 - 2*a*t + a**2)", "1 + sqrt(t**2 - 2*a*t + a**2)", params={"a": 0.3})
    assert sde.verify() and sde.derivation().holds
    assert SDE.from_dict(sde.to_dict()).declaration == sde.declaration
