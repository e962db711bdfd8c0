"""SymPy to torch: values against mpmath, gradients, stability near 0, and what is refused."""

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch

from sdeflow import t, x
from sdeflow.errors import DeclarationError, ScheduleError
from sdeflow.numerics.compile import compile_expressions

EXPRESSIONS = {
    "constant power": sp.exp(2) * t + sp.sqrt(2) * t + sp.log(5000) * t,
    "maximum": sp.Max(t, sp.Rational(1, 2)) + sp.Min(t, sp.Rational(1, 3), 2 * t),
    "trigonometry": sp.sec(t) + sp.csc(t + 1) + sp.cot(t + 1) + sp.tan(t),
    "hyperbolic": sp.coth(t + 1) + sp.sech(t) + sp.csch(t + 1) + sp.tanh(t),
    "inverse": sp.atan(t) + sp.asin(t / 2) + sp.acosh(t + 2) + sp.atan2(t, 2),
    "powers": t ** sp.Rational(3, 2) + (1 + t) ** -2 + 3**t + (1 + t) ** t,
    "special": sp.erf(t) + sp.erfc(t) + sp.loggamma(t + 1) + sp.gamma(t + 1),
    "bessel": sp.besselj(0, 3 * t) + sp.besseli(1, t) + sp.besselk(0, t + 1),
    "incomplete gamma": sp.lowergamma(sp.Rational(1, 3), t) + sp.uppergamma(2, t),
    "lambert": sp.LambertW(t + 1),
    "incomplete gamma of a root": sp.lowergamma(sp.Rational(3, 2), t),
    "exponential integral": sp.Ei(t + 1) + sp.expint(1, t + 1) + sp.erfi(t),
    "piecewise": sp.Piecewise((t, t < 0.2), (t**2, (t < 0.5) & (t > 0.1)), (1 / t, True)),
    "modulus": sp.Abs(t - sp.Rational(1, 2)) + sp.sign(t - sp.Rational(1, 3)),
    "rounding": sp.floor(5 * t) + sp.ceiling(3 * t) + sp.Mod(t, sp.Rational(1, 4)),
    "step": sp.Heaviside(t - sp.Rational(1, 2)),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_values(name):
    expr = EXPRESSIONS[name]
    compiled = compile_expressions(expr, (t,), horizon=1.0)
    points = np.array([0.07, 0.26, 0.41, 0.63, 0.97])
    truth = [float(expr.subs(t, sp.Rational(str(p))).evalf(20)) for p in points]
    np.testing.assert_allclose(compiled(torch.as_tensor(points)).numpy(), truth, rtol=1e-12)


def test_constants_take_the_arguments_shape():
    compiled = compile_expressions(sp.sqrt(2), (t,))
    out = compiled(torch.zeros(3, dtype=torch.float64))
    assert out.shape == (3,)
    assert abs(float(out[0]) - 2**0.5) < 1e-15


@pytest.mark.parametrize(
    "expr",
    [
        1 - sp.exp(-t),
        sp.sqrt(1 - sp.exp(-t / 10 - t**2)),
        3 - 3 * 2 ** (-t),
        1 - sp.cos(t),
        1 - sp.cos(t) ** 2,
        sp.log(1 + t),
        t - t * sp.exp(-t),
        (1 - sp.exp(-t)) ** 2,
    ],
)
def test_nothing_cancels_near_zero(expr):
    compiled = compile_expressions(expr, (t,))
    with mpmath.workdps(40):
        for at in (1e-3, 1e-6, 1e-9, 1e-12):
            truth = float(expr.subs(t, sp.Rational(str(at))).evalf(40))
            for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
                assert abs(float(compiled(torch.tensor(at, dtype=dtype))) / truth - 1) < tolerance


def test_gradients_do_not_turn_nan_in_branches_not_taken():
    compiled = compile_expressions(
        sp.Piecewise((sp.sqrt(t), t > 0), (0, True)) + sp.Piecewise((1 / x, x > 0), (x, True)), (x, t)
    )
    state = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    time = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    compiled(state, time).sum().backward()
    assert torch.isfinite(state.grad).all()
    assert torch.isfinite(time.grad).all()
    torch.testing.assert_close(state.grad, torch.tensor([1.0, 1.0, -0.25], dtype=torch.float64))


def test_gradients_are_those_of_sympy():
    expr = sp.exp(-(x**2)) * sp.sin(3 * x) + sp.log(1 + x**2)
    state = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    compile_expressions(expr, (x,))(state).sum().backward()
    slope = compile_expressions(sp.diff(expr, x), (x,))(state.detach())
    torch.testing.assert_close(state.grad, slope)


def test_common_parts_are_computed_once_and_the_source_can_be_read():
    compiled = compile_expressions((sp.exp(-t) + 1, sp.exp(-t) * 2), (t,))
    assert compiled.source.count("exp(") == 1
    assert compiled.source.startswith("def compiled(t):")
    assert compiled.expr == (sp.exp(-t) + 1, 2 * sp.exp(-t))


def test_func_and_compile_take_it():
    compiled = compile_expressions(sp.exp(-x) * t, (x, t))
    state = torch.randn(4, dtype=torch.float64)
    time = torch.tensor(0.5, dtype=torch.float64)
    slope = torch.func.vmap(torch.func.grad(lambda s: compiled(s, time)))(state)
    torch.testing.assert_close(slope, -0.5 * torch.exp(-state))
    traced = torch.compile(compiled, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(state, time), compiled(state, time))


def test_what_cannot_be_computed_is_named():
    with pytest.raises(DeclarationError, match="interpolant serves only functions of t alone"):
        compile_expressions(sp.besselj(0, x), (x, t), horizon=1.0)
    with pytest.raises(DeclarationError, match="meijerg"):
        compile_expressions(sp.meijerg([], [], [0], [], t), (t,))
    with pytest.raises(DeclarationError, match="k, which has no value"):
        compile_expressions(sp.Symbol("k") * t, (t,))
    with pytest.raises(ScheduleError, match="not a finite real number"):
        compile_expressions(sp.log(-2) * t, (t,))
