"""Derivations: every step checks, wrong moments are found, and text, LaTeX and HTML are well formed."""

import re
import time
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import sympy as sp
from problems import AWKWARD, CATALOGUE, cpu_seconds

import sdeflow
from sdeflow import SDE, t, x
from sdeflow.symbolic.derivation import Step, pearson_steps, reducible_steps, verify
from sdeflow.symbolic.derivation.substitution import initial_value
from sdeflow.symbolic.mathml import mathml
from sdeflow.symbolic.moments import integral_moments

position, velocity = sdeflow.state("x v")
kappa, theta, sigma = sp.symbols("kappa theta sigma")
VALUES = {"kappa": 1.2, "theta": 0.7, "sigma": 0.8}
beta = sdeflow.schedule(lambda u: 1 + u, name="my_beta")
HALF = sp.Rational(1, 2)

QUADRATURE = ("Gaussian bump", "offset drift", "1 + sin", "sub-VP with floats")
CLOSED = ("parameters", "mean reversion", "initial variance")
CASES = {
    **CATALOGUE,
    **{name: AWKWARD[name] for name in (*QUADRATURE, *CLOSED)},
    "schedule": lambda: SDE(-beta(t) * x / 2, sp.sqrt(t + 1)),
    "CLD": lambda: SDE(f=[16 * velocity, -16 * velocity - 4 * position], g=[0, sp.sqrt(8)], P0=[0, 0.01]),
    "not commuting": lambda: SDE(f=[velocity, 1 - t * position - velocity], g=[1, 1 + t]),
    "GBM": lambda: SDE(x / 5, x / 2),
    "Gompertz": lambda: SDE(x * (1 - sp.log(x)), x / 2),
    "fold": lambda: SDE(sigma**2 / 4 - kappa * x, sigma * sp.sqrt(x), params={"kappa": 1.2, "sigma": 0.5}),
    "moving shift": lambda: SDE((x + t) / 5 - 1, (x + t) * HALF),
    "sinh": lambda: SDE(x / 2, sp.sqrt(1 + x**2)),
    "CIR": lambda: SDE(kappa * (theta - x), sigma * sp.sqrt(x), params=VALUES),
    "Jacobi": lambda: SDE(1 - 5 * x / 2, sp.sqrt(x * (1 - x))),
    "double well": lambda: SDE(x - x**3, 1),
    "modulus": lambda: SDE(-sp.Abs(x), 1),
    "coupled pendulum": lambda: SDE(f=[velocity, -sp.sin(position)], g=[0, 1], P0=0.1),
}

WAYS = {
    "VP": "closed form", "CLD": "closed form", "Gaussian bump": "quadrature", "1 + sin": "quadrature",
    "not commuting": "quadrature", "schedule": "quadrature", "GBM": "Lamperti", "fold": "Lamperti", "sinh": "Lamperti",
    "CIR": "Pearson", "Jacobi": "Pearson", "double well": "local linearisation", "modulus": "simulation",
    "coupled pendulum": "local linearisation",
}  # fmt: skip


@cache
def case(name):
    """An SDE that tests share, with the kernel that it has derived."""
    return CASES[name]()


@pytest.mark.parametrize("name", CASES)
def test_every_step_checks_and_every_form_is_well_formed(name, tmp_path):
    sde = case(name)
    start = time.process_time()
    derivation = sde.derivation()
    assert name not in CATALOGUE or time.process_time() - start < 2
    assert derivation.holds, derivation.verdict
    assert "FAILED" not in str(derivation)
    assert any(step.check for step in derivation.steps)
    assert max(map(len, str(derivation).splitlines())) <= 100
    derivation.save(tmp_path / "page.html")
    require_well_formed((tmp_path / "page.html").read_text(encoding="utf-8"))
    derivation.save(tmp_path / "paper.tex")
    document = (tmp_path / "paper.tex").read_text(encoding="utf-8")
    require_balanced(document)
    assert document.isascii()


@pytest.mark.parametrize(
    ("name", "moment", "title"),
    [
        ("VP", "alpha", "The integrating factor"),
        ("SubVP", "var", "The variance"),
        ("EDM", "var", "The variance"),
        ("mean reversion", "offset", "The mean"),
        ("Gaussian bump", "var", "The variance"),
        ("offset drift", "offset", "The mean"),
        ("CLD", "var", "The covariance"),
        ("CLD", "alpha", "The fundamental matrix"),
    ],
)
def test_a_wrong_moment_fails_its_step(name, moment, title, monkeypatch):
    sde = case(name)
    shown = sde.kernel.shown
    wrong = replace(shown, **{moment: getattr(shown, moment) * (1 + t / 10**6)})
    monkeypatch.setitem(sde.kernel.__dict__, "shown", wrong)
    derivation = sde.derivation()
    failed = {step.title: step for step in derivation.steps if not step.holds}
    assert title in failed and failed[title].check.startswith("FAILED")
    assert "FAILED" in derivation.verdict
    assert f"!!! Check: {failed[title].check}" in str(derivation)
    assert 'class="check failed"' in derivation._repr_html_() and r"\textbf{Check: FAILED" in derivation.latex()


def test_verify_tells_identities_from_others():
    u = sp.Symbol("u")
    integral = sp.Integral(sp.exp(-(u**2)), (u, 0, t))
    assert verify([(sp.diff(t * integral, t), integral + t * sp.exp(-(t**2)))], {}, 1.0) == ("0, by substitution", True)
    assert verify([(sp.sin(2 * t), 2 * sp.sin(t) * sp.cos(t))], {}, 1.0) == ("≤ 1e-29 at 5 times", True)
    assert not verify([(sp.sin(2 * t), 2 * sp.sin(t))], {}, 1.0)[1]
    assert not verify([(integral, 2 * integral)], {}, 1.0)[1]
    assert not verify([(kappa * t, t)], {kappa: 1.0 + 1e-6}, 1.0)[1]
    assert not verify([(sp.zoo, t)], {}, 1.0)[1]


def test_a_table_has_its_values_at_numbers():
    """alpha(0) = exp(-B(0)/2) is 1 where the table of B starts at 0, and no arbitrary number."""
    for table in ([0.9, 0.7, 0.5, 0.3, 0.1], ([0, 0.5, 1], [1, 0.6, 0.1])):
        failures = [step for step in SDE.from_kernel(table).derivation().steps if not step.holds]
        assert not failures, failures
    B, late = (sdeflow.schedule(([0, 1], [start, 5])) for start in (0, 0.001))
    assert verify([(sp.exp(-B(0) / 2), 1), (B(t), B(t) + B(0)), (sp.diff(B(t), t).subs(t, 0), 5)], {}, 1.0)[1]
    assert not verify([(sp.exp(-late(0) / 2), 1)], {}, 1.0)[1]
    assert not verify([(B(t), 5 * t)], {}, 1.0)[1]


STEPS = sp.Piecewise((1, t < HALF / 2), (2, t < HALF), (3, t < HALF + HALF / 2), (4, True))


@pytest.mark.parametrize("factor", [1 + sp.sin(t) ** 2, 2 - sp.exp(-(t**2)), kappa + sigma * sp.exp(-(t**2))])
@pytest.mark.parametrize("branches", [(1, 2), (2 - t, sp.exp(t)), (0, 2), (2, 0), (theta, 2 + theta)])
def test_the_variance_of_a_switched_noise_is_no_false_alarm(factor, branches):
    """The derivative of such an integral has factors in t that are sums, and a branch that may be 0."""
    g = sp.Piecewise((branches[0], t < HALF), (branches[1], True))
    moments = integral_moments((-factor, sp.Integer(0)), g, 0.0)
    (rate, true), (start, zero) = initial_value(moments.var, -2 * factor * moments.var + g**2, sp.Integer(0))
    assert verify([(rate, true), (start, zero)], VALUES, 1.0)[1]
    assert not verify([(rate, true + g**2 / 100)], VALUES, 1.0)[1]


def test_four_constants_are_derived_and_what_is_only_named_is_left_out():
    whole = SDE(-STEPS * x / 2, sp.sqrt(STEPS)).derivation()
    assert whole.complete and whole.holds and len(whole.steps) == 14
    named = SDE(-x, 1)
    named.kernel.shown = replace(named.kernel.shown, log_alpha=sp.Function("A", real=True)(t))
    derivation = named.derivation()  # as of 40 constants, of which SymPy finds no integral in time
    assert not (derivation.complete or derivation.holds or derivation.steps[-1].holds)
    assert "left out" in derivation.verdict and "!!! Check: not made" in str(derivation)


def test_a_cutoff_just_after_a_pause_is_found_to_the_rounding_of_its_time():
    derivation = SDE(-x, sp.Piecewise((0, t < HALF), (2, True))).derivation()
    assert derivation.holds, derivation.verdict


@pytest.mark.parametrize("make, steps", [
    (lambda: SDE(-(1 + sp.exp(-(t**2))) * x, x * sp.Piecewise((1, t < HALF), (2, True))), lambda sde: reducible_steps(
        sde.declaration, sde.kernel.reduction, {})),
    (lambda: SDE((1 + sp.exp(-(t**2))) * (1 - x), sp.sqrt((1 + sp.exp(-(t**2))) * x)), lambda sde: pearson_steps(
        sde.declaration, sde.kernel.pearson, {})),
], ids=["reducible", "square root"])  # fmt: skip
def test_a_density_is_checked_whatever_integrals_its_moments_hold(make, steps):
    found = steps(make())
    assert found[-1].title.startswith("The kernel") and all(step.holds for step in found)


def test_the_steps_of_an_affine_sde():
    derivation = sdeflow.catalog.VP().derivation()
    titles = [step.title for step in derivation.steps]
    assert titles[:3] == ["The declaration", "Classification", "The integrating factor"]
    assert titles[-3:] == ["The reverse-time SDE", "The probability-flow ODE", "The log-likelihood"]
    assert all(isinstance(step, Step) for step in derivation.steps) and isinstance(derivation.steps, tuple)
    assert "14 steps" in repr(derivation)
    text = str(derivation)
    assert "σ/α = 1/500" in text and "dx/dt" in text and "dm/dt = a⋅m + b" in text
    assert r"\begin{align*}" in derivation._repr_latex_()


@pytest.mark.parametrize("name", [name for name in AWKWARD if name not in CLOSED])
def test_integrals_that_stay_check_as_they_stand(name, monkeypatch):
    monkeypatch.setattr("sdeflow.kernels.gaussian.integrate_within", lambda moments: None)
    derivation = AWKWARD[name]().derivation()
    assert derivation.holds, derivation.verdict


def test_stratonovich_shows_both_drifts():
    first = SDE(x, 2 * x, calculus="stratonovich").derivation().steps[0]
    assert first.equations[-1].rhs == x


def test_save_refuses_other_suffixes(tmp_path):
    derivation = sdeflow.catalog.OU().derivation()
    for name in ("x.pdf", "x", "x.HTML.txt"):
        with pytest.raises(ValueError, match=r"\.html or \.tex"):
            derivation.save(tmp_path / name)


def test_hostile_names_and_titles_are_escaped(tmp_path):
    k = sp.Symbol("a__b_")
    derivation = SDE(-k * x, sp.Symbol("script"), params={k: 1.0, "script": 1.0}).derivation()
    hostile = replace(
        derivation,
        title="<script>alert(1)</script> & \\input{x} $%#_^~",
        steps=(*derivation.steps, Step("</h2><img src=x>", "<b>&", (sp.Symbol("<img>"),), "\\write18{", "]]>")),
    )
    hostile.save(tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    require_well_formed(page)
    assert "<script>" not in page and "<img" not in page
    hostile.save(tmp_path / "x.tex")
    document = (tmp_path / "x.tex").read_text(encoding="utf-8")
    require_balanced(document)
    assert r"\input" not in document and r"\write" not in document


@pytest.mark.parametrize("name", WAYS)
def test_explain_names_the_way(name):
    sde = case(name)
    start = cpu_seconds()
    text = sde.explain()
    assert cpu_seconds() - start < 1
    assert text.startswith(WAYS[name] + ": ")
    assert "Available: " in text


def test_explain_says_why():
    assert "no rule integrates -exp(-sin(t))" in SDE(-sp.exp(-sp.sin(t)) * x, 1).explain()
    assert "not affine in x" in case("double well").explain()
    assert "y = log(x)" in case("GBM").explain()
    assert "Abs(x)" in case("modulus").explain()


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (sp.Symbol("x_0"), "<msub><mi>x</mi><mi>0</mi></msub>"),
        (sp.Symbol("Phi"), "<mi>Φ</mi>"),
        (sp.Function("s_v")(x, t), "<msub><mi>s</mi><mi>v</mi></msub>"),
        (sp.Function("N")(x), "<mi>N</mi>"),
        (sp.exp(-x), "<msup><mi>e</mi>"),
        (sp.sqrt(x + 1), "<msqrt>"),
        (1 / (1 + 1 / (1 + x)), "<mfrac><mn>1</mn>"),
        (sp.Integral(sp.exp(-x), (x, 0, t)), "<msubsup><mo>∫</mo><mn>0</mn><mi>t</mi></msubsup>"),
        (sp.Derivative(sp.Function("p")(x, t), (x, 2)), "<msup><mi>x</mi><mn>2</mn></msup>"),
        (sp.Piecewise((1, t < 1), (2, True)), "<mtext>otherwise</mtext>"),
        (beta(t), "<msub><mi>my</mi><mi>β</mi></msub>"),
        (sp.Matrix([[1, x]]), "<mtable>"),
    ],
)
def test_mathml(expr, expected):
    text = mathml(expr)
    ElementTree.fromstring(text)
    assert expected in text


def test_mathml_falls_back_to_text():
    class Unprintable(sp.Symbol):
        def _mathml_presentation(self, printer):
            raise RuntimeError

    assert mathml(Unprintable("a<b")) == "<code>a&lt;b</code>"


def require_balanced(latex):
    plain = re.sub(r"\\[{}]", "", latex)
    depth = 0
    for char in plain:
        depth += (char == "{") - (char == "}")
        assert depth >= 0
    assert depth == 0
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", plain):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    assert len(re.findall(r"\\left\b", plain)) == len(re.findall(r"\\right\b", plain))
    assert len(re.findall(r"(?<!\\)\$", plain)) % 2 == 0


def require_well_formed(page):
    """The page is XML but for its doctype, and so is each formula; nothing comes from a network."""
    assert page.startswith("<!DOCTYPE html>")
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    HTMLParser().feed(page)
    formulas = re.findall(r"<math.*?</math>", page, re.DOTALL)
    assert formulas
    for formula in formulas:
        ElementTree.fromstring(formula)
    assert not re.search(r"<[^>]*src=|<link|@import|url\(", page)
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/1998/Math/MathML"}
