"""Declarations, the affine test, and the derived equations."""

import warnings

import pytest
import sympy as sp

from sdeflow import SDE, NotAffineError, s, t, x
from sdeflow.errors import UnusedParameterWarning
from sdeflow.symbolic.affine import affine_split

AFFINE = {
    "constant": (sp.Integer(3), (0, 3)),
    "linear": (-2 * x + t, (-2, t)),
    "expanded square": ((x + 1) ** 2 - x**2, (2, 1)),
    "identity hidden in sin and cos": ((sp.sin(x) ** 2 + sp.cos(x) ** 2) * t, (0, t)),
    "piecewise in t": (
        sp.Piecewise((x, t < 1), (2 * x + 1, True)),
        (sp.Piecewise((1, t < 1), (2, True)), sp.Piecewise((0, t < 1), (1, True))),
    ),
    "quotient": (x * (x + 1) / (x + 1), (1, 0)),
    "brackets": (t * (3 - x), (-t, 3 * t)),
    "modulus of t": (sp.Abs(t - 1) * x, (sp.Abs(t - 1), 0)),
    "log of exp": (sp.log(sp.exp(x)), (1, 0)),
}

NOT_AFFINE = {
    "modulus": sp.Abs(x),
    "maximum": sp.Max(x, 0),
    "minimum": sp.Min(x, t),
    "sign": sp.sign(x),
    "floor": sp.floor(x),
    "modulo": sp.Mod(x, 2),
    "step": sp.Heaviside(x) * x,
    "piecewise in x": sp.Piecewise((x, x > 0), (2 * x, True)),
    "square": x**2,
    "double well": x - x**3,
    "tanh": -sp.tanh(x),
    "tiny nonlinearity": -x + sp.Rational(1, 10**12) * x**2,
    "sawtooth": sp.atan(sp.tan(x)),
    "square of a root": sp.sqrt(x**2),
    "relation": sp.Piecewise((1, sp.Eq(x, 0)), (0, True)) + x,
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_drifts_split(name):
    f, (a, b) = AFFINE[name]
    split = affine_split(f, (x,))
    assert split is not None
    assert sp.simplify(split[0][0] - a) == 0
    assert sp.simplify(split[1] - b) == 0


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_other_drifts_do_not(name):
    assert affine_split(NOT_AFFINE[name], (x,)) is None


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_a_general_sde_declares_and_derives_but_has_no_kernel(name):
    sde = SDE(NOT_AFFINE[name], 1)
    assert sde.kind == "general"
    assert sde.reverse().drift == NOT_AFFINE[name] - s
    with pytest.raises(NotAffineError, match=r"Still available"):
        sde.kernel.alpha  # noqa: B018


def test_functions_numbers_and_expressions_declare_the_same():
    expressions = SDE(-x * t, sp.Integer(1))
    functions = SDE(lambda x, t: -x * t, lambda x, t: 1)
    numbers = SDE(-x * t, 1.0)
    assert expressions.declaration == functions.declaration == numbers.declaration


def test_repr_reads_as_the_equation():
    assert repr(SDE(-x, sp.sqrt(2), T=5)) == "SDE(dx = [-x] dt + sqrt(2) dw on [0, 5])"
    assert repr(SDE(0, 1 + t)) == "SDE(dx = (t + 1) dw on [0, 1])"
    latex = SDE(-x, sp.sqrt(2))._repr_latex_()
    assert latex == r"$\displaystyle dx = \left[- x\right] dt + \sqrt{2} dw, \quad t \in [0, 1]$"


def test_reverse_and_flow_equations():
    beta = 1 + t
    sde = SDE(-beta * x / 2 + t, sp.sqrt(beta))
    assert sp.simplify(sde.reverse().drift - (-beta * x / 2 + t - beta * s)) == 0
    assert sde.reverse().diffusion == sp.sqrt(beta)
    assert sp.simplify(sde.flow_ode().drift - (-beta * x / 2 + t - beta * s / 2)) == 0
    assert sde.flow_ode().diffusion == 0
    assert repr(SDE(-x, 1).reverse()) == "ReverseSDE(dx = [-x - s(x, t)] dt + dw̄)"
    assert repr(SDE(-x, sp.sqrt(2)).flow_ode()) == "FlowODE(dx/dt = -x - s(x, t))"
    assert r"d\bar{w}" in SDE(-x, 1).reverse()._repr_latex_()


def test_state_dependent_noise_brings_its_divergence():
    """Geometric Brownian motion: the reverse drift is f - ∂(g²)/∂x - g² s."""
    sde = SDE(x, x)
    assert sp.expand(sde.reverse().drift - (x - 2 * x - x**2 * s)) == 0
    assert sp.expand(sde.flow_ode().drift - (x - x - x**2 * s / 2)) == 0


def test_stratonovich_is_converted():
    assert SDE(x, 2 * x, calculus="stratonovich").declaration.f == 3 * x
    assert SDE(-x, t, calculus="stratonovich").declaration == SDE(-x, t).declaration


def test_a_parameter_that_changes_nothing_is_told_at_the_users_line():
    k, c = sp.symbols("k c", positive=True)
    with pytest.warns(UnusedParameterWarning, match="without effect: k, c") as seen:
        SDE(-x, 1, params={"k": 1, c: 2})
    assert seen[0].filename == __file__
    with pytest.warns(UnusedParameterWarning, match="without effect: c"):
        SDE.from_kernel(sp.exp(-k * t), params={k: 1, c: 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SDE("-k*x", "c", params={"k": 1, "c": 2}).with_params(k=2)
        SDE.from_kernel(sp.exp(-k * t), sp.sqrt(1 - sp.exp(-2 * k * t)), params={k: 1})
