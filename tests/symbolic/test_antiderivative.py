"""Antiderivatives by rule, each differentiated again, and the closed moments that rest on them."""

import pytest
import sympy as sp
from sympy import Rational as R

import sdeflow
from sdeflow import SDE, t, x
from sdeflow.symbolic.antiderivative import antiderivative

u = sp.Symbol("u", nonnegative=True)


@pytest.mark.parametrize(
    "integrand",
    [
        sp.sin(3 * u), sp.cos(2 * u + 1), sp.tan(u / 2), sp.cot(u + 1), sp.sinh(u), sp.cosh(2 * u), sp.tanh(3 * u),
        u**3 - 2 * u, 1 / (u + 2), 2**u, u**2 * sp.exp(-3 * u), (1 + u) * 2 ** (-u),
        1 / ((u + 1) * (u + 3)),
    ],
)  # fmt: skip
def test_the_derivative_of_an_antiderivative_is_the_integrand(integrand):
    found = antiderivative(integrand, u)
    error = sp.diff(found, u) - integrand
    for at in (R(1, 5), R(4, 5)):
        assert abs(float(error.subs(u, at).evalf(30))) < 1e-15


@pytest.mark.parametrize(
    "make",
    [
        sdeflow.catalog.VP,
        sdeflow.catalog.SubVP,
        lambda: SDE(3 - x, 1, P0=0.3),
        lambda: SDE(-x, sp.sqrt(t), P0=0.04),
        lambda: SDE(-x, sp.sqrt(1 + sp.exp(-4 * t)), P0=0.3),
        lambda: SDE(-(2 + sp.cos(t)) * x, sp.sqrt(2 + sp.cos(t))),
        lambda: SDE(-x + t * sp.exp(-t), 1),
    ],
)
def test_a_rule_gives_the_closed_form(make):
    """A rule that is wrong shows here: its formula disagrees with quadrature, and is not taken."""
    assert make().kernel.form == "closed"
