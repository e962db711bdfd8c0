"""Certificates: every SDE of the tests is certified, and every planted mistake is found."""

import functools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import sympy as sp
import torch
from problems import AWKWARD, CATALOGUE, COUPLED
from scipy import special
from sympy import Rational as R

import sdeflow
import sdeflow.kernel
from sdeflow import SDE, t, x
from sdeflow.basis import DCT, Orthogonal
from sdeflow.certificate import Certificate, Check, certify
from sdeflow.symbolic.evaluate import evaluate

k = sp.Symbol("k")
HALF_WELL = sdeflow.schedule(([0, 0.5, 1], [0.1, 5, 20]), name="beta")
GENERAL = {
    "geometric Brownian motion": lambda: SDE(-x / 4, x / 2),
    "Stratonovich": lambda: SDE(-x, x / 2, calculus="stratonovich"),
    "sinh": lambda: SDE(2 * (x - 1), 2 * sp.sqrt((x - 1) ** 2 + 3)),
    "logistic": lambda: SDE(x * (1 - x) * (1 - 2 * x) / 8, x * (1 - x) / 2),
    "square root that folds": lambda: SDE(R(1, 16) - x, sp.sqrt(x) / 2),
    "CIR": lambda: SDE(R(6, 5) * (R(7, 10) - x), R(4, 5) * sp.sqrt(x)),
    "CIR that hits 0": lambda: SDE(R(1, 4) - x, sp.sqrt(2 * x)),
    "Jacobi": lambda: SDE(R(6, 5) * (R(7, 10) - x), R(4, 5) * sp.sqrt(x * (1 - x))),
    "double well": lambda: SDE(x - x**3, R(1, 2)),
    "coupled, not linear": lambda: SDE(
        lambda a, v, t: [v, -v - a], lambda a, v, t: [[R(1, 10), v], [1 + a**2, R(3, 10)]], state=("a", "v")
    ),
}  # fmt: skip
SPECIAL = {
    "table": lambda: SDE(-HALF_WELL(t) * x / 2, sp.sqrt(HALF_WELL(t))),
    "tensor": lambda: SDE(-k * x + t, sp.sqrt(k), params={k: torch.linspace(0.5, 3, 12).reshape(3, 4)}),
    "parameter": lambda: SDE(-k * x, 1, params={k: torch.nn.Parameter(torch.tensor(0.7))}),
    "heat": lambda: SDE(-k * x, 1, params={k: DCT(2).frequencies((8, 8)) + 0.1}, basis=DCT(2)),
    "rotated": lambda: SDE(-x, 1, basis=Orthogonal(torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0])),
    "without noise for a while": lambda: SDE(-x, sp.Piecewise((1, t < 0.5), (0, t < 0.6), (1, True))),
    "narrow": lambda: SDE(0, sp.sqrt(1 + 30 * sp.exp(-(((t - 0.31) * 2000) ** 2)))),
    "fast": lambda: SDE(-100 * x, sp.sin(40 * t) + 2, T=5),
}
EVERY = {**CATALOGUE, **AWKWARD, **{f"coupled {name}": make for name, make in COUPLED.items()}, **GENERAL, **SPECIAL}


@functools.cache
def build(name):
    """Shared by tests that leave the SDE as it is."""
    return EVERY[name]()


def failed(sde):
    return {check.name for check in certify(sde).failures}


@pytest.mark.parametrize("name", EVERY)
def test_every_sde_is_certified(name):
    certificate = build(name).verify()
    assert certificate, str(certificate)
    assert len(certificate.checks) >= 3


@pytest.mark.parametrize("name", ["SubVP", "coupled critically damped"])
def test_a_certificate_takes_little_time(name):
    sde = EVERY[name]()
    start = time.process_time()
    sde.verify()
    assert time.process_time() - start < 2.0


def test_random_schedules_raise_no_alarm():
    rng = np.random.default_rng(5)
    for _ in range(3):
        c = rng.uniform(0.1, 3, 6).tolist()
        f = -(c[0] + c[1] * t ** (1 + c[2])) * x + sp.sin(c[3] * t)
        certificate = SDE(f, c[4] + c[5] * sp.Abs(t - R(2, 5)), T=c[3]).verify()
        assert certificate, str(certificate)


def test_what_is_proven_is_said_to_be():
    methods = {check.identity: check.method for check in sdeflow.catalog.VP().verify().checks}
    assert methods["dP/dt - F P - P Fᵀ - g gᵀ = 0"] == "symbolic"
    assert methods["= ∇ log p"] == "numeric"


def test_what_cannot_be_checked_is_said():
    assert "no law of it is known" in GENERAL["double well"]().verify().unchecked[0]
    assert not sdeflow.catalog.VP().verify().unchecked


def test_a_certificate_reads_well():
    good, bad = (
        Check("sigma", "P' = ...", "numeric", 1e-12, 1e-9),
        Check("f", "f = f", "numeric", np.inf, 1e-9, "t = 1"),
    )
    certificate = Certificate("SDE(...)", (good, bad), ("the rest",))
    assert not certificate
    assert certificate.failures == (bad,)
    assert certificate.largest is bad
    assert certificate.largest_residual == np.inf
    assert "1 of 2 identities FAIL" in str(certificate)
    assert "not checked: the rest" in repr(certificate)
    assert "<td>FAILS</td>" in certificate._repr_html_()
    assert not Check("f", "f = f", "numeric", np.nan, 1.0).holds


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (sp.Piecewise((1, t < R(1, 2)), (t**2, True)), lambda u: np.where(u < 0.5, 1.0, u**2)),
        (sp.besselj(0, 5 * t), lambda u: special.jv(0, 5 * u)),
        (sp.uppergamma(R(2, 3), t), lambda u: special.gammaincc(2 / 3, u) * special.gamma(2 / 3)),
        (sp.LambertW(t), lambda u: special.lambertw(u).real),
        (sp.sqrt(t - R(1, 2)), lambda u: np.sqrt(np.where(u < 0.5, np.nan, u - 0.5))),
        (sp.Max(t, R(1, 2)) + sp.pi, lambda u: np.maximum(u, 0.5) + np.pi),
    ],
)
def test_expressions_read_plainly(expr, expected):
    points = np.array([0.2, 0.9])
    np.testing.assert_allclose(evaluate(expr, {t: points}), expected(points), rtol=1e-13)


# -------------------------------------------------------------------------------- planted mistakes


def scaled(method, *factors):
    """A method whose outputs are multiplied by ``factors``."""
    return lambda *args: tuple(v * c for v, c in zip(method(*args), factors, strict=True))


@pytest.mark.parametrize("name", ["VP", "offset drift", "coupled offset"])
@pytest.mark.parametrize(("row", "size"), [(1, 5e-3), (0, 1e-8), (1, 1e-8), (2, 1e-8)])
def test_wrong_moments_are_found(monkeypatch, name, row, size):
    sde = build(name)
    if row == 2 and not sde.kernel.has_offset:
        pytest.skip("it has no offset")
    factors = [1 + size * (i == row) for i in range(3)]
    monkeypatch.setattr(sde.kernel, "coefficients", scaled(sde.kernel.coefficients, *factors))
    assert {"alpha", "sigma²", "offset"} & failed(sde)


@pytest.mark.parametrize("name", ["SubVP", "coupled not commuting"])
@pytest.mark.parametrize(("row", "expected"), [(0, "f"), (2, "g")])
def test_wrong_coefficients_of_the_sde_are_found(monkeypatch, name, row, expected):
    sde = build(name)
    factors = [1 + 1e-8 * (i == row) for i in range(3)]
    monkeypatch.setattr(sde.kernel, "sde_coefficients", scaled(sde.kernel.sde_coefficients, *factors))
    assert expected in failed(sde)


def test_a_noise_that_is_wrong_for_a_short_while_is_found(monkeypatch):
    sde = sdeflow.catalog.OU()
    method = sde.kernel.coefficients

    def wrong(s):
        alpha, sigma, offset = method(s)
        return alpha, torch.where((s > 2.0) & (s < 2.05), sigma * 1.001, sigma), offset

    monkeypatch.setattr(sde.kernel, "coefficients", wrong)
    assert "sigma²" in failed(sde)


@pytest.mark.parametrize(("wrong", "expected"), [("exp", "alpha"), ("expm1", "sigma²"), ("expm1 as exp", "sigma²")])
def test_a_mistake_in_compilation_is_found(monkeypatch, wrong, expected):
    """The closed form compiled with a torch function that is another, or off by 1e-8."""
    import sdeflow.compile as module

    sde, exp, expm1 = sdeflow.catalog.VP(), torch.exp, torch.expm1
    with monkeypatch.context() as patch:
        if wrong == "exp":
            patch.setitem(module._UNARY, sp.exp, lambda u: exp(u) * (1 + 1e-8))
        else:
            patch.setattr(torch, "expm1", exp if wrong == "expm1 as exp" else lambda u: expm1(u) * (1 + 1e-8))
        sde.kernel.numbers.closed = module.compile_expressions(sde.kernel.numbers.closed.expr, (t,), {}, 1.0)
    assert expected in failed(sde)


@pytest.mark.parametrize("part", ["var", "alpha"])
def test_a_wrong_closed_form_is_found_where_nothing_else_compares_it(monkeypatch, part):
    derive = sdeflow.kernel.derive_moments

    def wrong(*args):
        right = derive(*args)
        log_alpha = right.log_alpha * (1 + R(1, 10**6)) if part == "alpha" else right.log_alpha
        changed = sp.exp(log_alpha) if part == "alpha" else right.var * (1 + R(1, 10**6))
        return replace(right, log_alpha=log_alpha, **{part: changed})

    monkeypatch.setattr(sdeflow.kernel, "derive_moments", wrong)
    monkeypatch.setattr(sdeflow.coefficients.Coefficients, "agrees", lambda *args: True)
    sde = sdeflow.catalog.SubVP()
    assert sde.kernel.form == "closed"
    assert failed(sde) >= {"alpha" if part == "alpha" else "sigma²", "formula"}


@pytest.mark.parametrize("name", ["VP", "coupled offset", "tensor", "square root that folds", "CIR", "double well"])
@pytest.mark.parametrize(
    ("equation", "share"), [("reverse_time", R(1, 2)), ("probability_flow", R(1, 2) + R(1, 10**6))]
)
def test_wrong_equations_are_found(monkeypatch, name, equation, share):
    from sdeflow.symbolic.equations import Equation, _drift

    def wrong(declaration):
        diffusion = declaration.g if equation == "reverse_time" else sp.Integer(0)
        return Equation(_drift(declaration, sp.sympify(share)), diffusion, "w̄", declaration.state)

    sde = build(name)
    monkeypatch.setattr(f"sdeflow.certificate.{equation}", wrong)
    assert {"flow", "reverse"} & failed(sde)


@pytest.mark.parametrize("name", ["square root that folds", "Stratonovich", "CIR", "coupled, not linear"])
def test_a_forgotten_divergence_is_found(monkeypatch, name):
    sde, right = build(name), sdeflow.certificate.reverse_time

    def without(declaration):
        equation, state = right(declaration), declaration.state
        rows = [
            drift + sum(sp.diff(declaration.gram[i, j], state[j]) for j in range(len(state)))
            for i, drift in enumerate(equation.drifts)
        ]
        return replace(equation, drift=sp.ImmutableMatrix(rows) if declaration.coupled else rows[0])

    monkeypatch.setattr(sdeflow.certificate, "reverse_time", without)
    assert "reverse" in failed(sde)


def test_wrong_noise_for_the_solvers_is_found(monkeypatch):
    from sdeflow.model import Model

    for name in ("VP", "coupled noise matrix", "CIR"):
        sde, right = build(name), Model.noise

        def wrong(self, equation, event, right=right):
            given = right(self, equation, event)
            return {**given, "diffusion": lambda y, time: given["diffusion"](y, time) * (1 + 1e-6)}

        with monkeypatch.context() as patch:
            patch.setattr(Model, "noise", wrong)
            assert "noise" in failed(sde)


def test_a_dropped_branch_is_found(monkeypatch):
    """The naive push-forward of the folded square-root process, which has a mass of less than one."""
    sde = GENERAL["square root that folds"]()
    reduction = sde.kernel.reduction
    sde.kernel.reduction = replace(reduction, map=replace(reduction.map, fold=False))
    assert {"kernel.log_prob", "Fokker-Planck (kernel)"} & failed(sde)


@pytest.mark.parametrize("shift", [1e-2, 1e-5])
def test_a_pearson_kernel_of_another_rate_is_found(shift):
    sde = GENERAL["CIR"]()
    other = SDE((R(6, 5) + sp.Float(shift)) * (R(7, 10) - x), R(4, 5) * sp.sqrt(x))
    sde.__dict__["_exact_kernel"] = sde.__dict__["kernel"] = other.kernel
    assert "Fokker-Planck (kernel)" in failed(sde)


@pytest.mark.parametrize("method", ["log_prob", "score", "moments"])
def test_wrong_answers_of_a_kernel_are_found(monkeypatch, method):
    for name in ("VP", "geometric Brownian motion", "CIR", "tensor"):
        sde = build(name)
        owner, right = type(sde.kernel), getattr(type(sde.kernel), method)

        def wrong(self, *args, right=right):
            found = right(self, *args)
            return (found[0] * (1 + 1e-5), found[1]) if isinstance(found, tuple) else found + 1e-5 * found.abs()

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, wrong)
            assert failed(sde), name


def test_wrong_weighting_prior_transition_and_log_snr_are_found(monkeypatch):
    kernel, one = sdeflow.kernel.Kernel, build("OU").kernel
    plants = {
        "weighting": (SDE, "weighting", property(lambda self: self.kernel.var * (1 + R(1, 10**6)))),
        "prior": (kernel, "marginal", lambda self, m, c, s, right=kernel.marginal: right(self, m, c, s * 0.9999)),
        "time_of": (one, "time_of", lambda v, right=one.time_of: right(v) * (1 + 1e-7)),
        "half_log_snr": (one, "half_log_snr", lambda s, right=one.half_log_snr: right(s) + 1e-7),
    }
    right = kernel.transition

    def transition(self, y, s, t):
        path = right(self, y, s, t)
        return path._replace(sigma=path.sigma.scaled(1 + 1e-6))

    plants["transition"] = (kernel, "transition", transition)
    for expected, (owner, attribute, wrong) in plants.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, wrong)
            assert expected in failed(build("OU")), expected
            assert attribute not in ("weighting", "transition") or expected in failed(build("coupled noise matrix"))


def test_a_basis_that_is_not_orthogonal_is_found():
    sde = SPECIAL["rotated"]()
    sde.basis.matrix = sde.basis.matrix * (1 + 1e-5)
    assert "basis" in failed(sde)


def test_the_largest_residual_is_that_of_all_checks():
    good = sdeflow.certificate.Check("a", "x", "numeric", 1e-12, 1e-9)
    broken = sdeflow.certificate.Check("b", "can be computed", "numeric", math.inf, 0.0)
    certificate = sdeflow.certificate.Certificate("s", (good, broken))
    assert not certificate.ok and certificate.largest_residual == math.inf and certificate.largest is broken


def test_wrong_draws_and_a_wrong_rate_of_the_log_snr_are_found():
    from sdeflow import SDE, x

    for sde in (SDE(f=x / 10, g=x / 2), SDE(f=2 * (1 - x), g=sp.sqrt(x) / 2)):
        right = sde.kernel.sample
        sde.kernel.sample = lambda *args, right=right, **options: 1.01 * right(*args, **options)
        assert "kernel.sample" in failed(sde)
    sde = sdeflow.catalog.VP()
    rate = sde.kernel.half_log_snr_rate
    sde.kernel.half_log_snr_rate = lambda times: (1 + 1e-4) * rate(times)
    assert "half_log_snr_rate" in failed(sde)
