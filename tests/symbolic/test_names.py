"""Parameters that have the names of the library's own symbols: told apart, or refused."""

import pytest
import sympy as sp

from sdeflow import SDE, state, t, x, x_0
from sdeflow.errors import DeclarationError
from sdeflow.symbolic.conditioned import end_symbols
from sdeflow.symbolic.symbols import unused


def test_an_unused_name():
    u, u_1 = sp.symbols("u u_1", positive=True)
    assert [unused("u", taken) for taken in ((), (t,), (u,), (u * u_1,))] == ["u", "u", "u_1", "u_2"]


@pytest.mark.parametrize(
    "declare",
    [
        lambda: SDE("-x*x_0", 1, params={"x_0": 1.0}),
        lambda: SDE(-x * x_0, 1, params={x_0: 1.0}),
        lambda: SDE.from_kernel("1 - t*x_0", "t", T=0.5, params={"x_0": 1.0}),
        lambda: SDE(["v", "-v_0"], [0, 1], state=("x", "v"), params={"v_0": 1.0}),
        lambda: state("x x_0"),
    ],
)
def test_the_state_at_0_is_no_other_symbol(declare):
    with pytest.raises(DeclarationError, match=r"_0 is the state at t = 0"):
        declare()


@pytest.mark.parametrize("name", ["u", "v"])
def test_a_parameter_is_not_taken_for_the_variable_of_an_integral(name):
    """Of one component, with integrals that stay, and of several, whose offset and covariance are integrals."""
    u = sp.Symbol(name, nonnegative=True)
    sde = SDE(-u * sp.exp(-sp.sin(t)) * x, u * (1 + t), params={u: 2.0})
    assert sde.kernel.var.has(sp.Integral) and u in sde.kernel.var.free_symbols
    assert sde.verify() and sde.derivation().holds
    y, z = state("y z")
    root = sp.sqrt(1 + u * sp.sin(t) ** 2)
    coupled = SDE([z - y, -z + u * root], [root, u], params={u: 0.5})
    assert coupled.kernel.var.has(sp.Integral) and u in coupled.kernel.var.free_symbols
    assert coupled.verify() and coupled.derivation().holds


def test_the_end_of_a_bridge_is_not_a_parameter():
    end = sp.Symbol("x_T", real=True)
    sde = SDE(-end * x, 1, params={end: 2.0})
    ours = sp.Symbol("x_T_1", real=True)
    assert end_symbols(sde.declaration) == (ours,)
    drift = sde.bridge(1.3).drift
    assert {ours, end} < drift.free_symbols
    # For dx = -k x dt + dw from x at t to y at 1: f + k (y - e^-kτ x) / sinh(kτ), τ = 1 - t.
    k, tau = 2.0, 0.6
    expected = -k * 0.5 + k * (1.3 - sp.exp(-k * tau) * 0.5) / sp.sinh(k * tau)
    assert abs(drift.subs({x: 0.5, t: 0.4, ours: 1.3, end: k}) - expected) < 1e-12
    assert sde.verify()


@pytest.mark.parametrize("name", ["alpha", "u", "m", "J"])
def test_a_derivation_keeps_its_own_symbols_apart(name):
    p, half = sp.Symbol(name, positive=True), sp.Rational(1, 2)
    affine, reducible, general = (-p * x, 1 + p * t), (p * x, p * x), (p * x - x**3, p)
    for f, g in (affine, reducible, general, (p * (1 - x), sp.sqrt(x)), (p * (half - x), sp.sqrt(x - x**2))):
        derivation = SDE(f, g, params={p: 2.0}).derivation()
        assert derivation.holds, derivation.verdict
        sides = [equation.lhs for step in derivation.steps for equation in step.equations]
        assert p not in sides and sp.Symbol(name) not in sides
