"""Certificates: every SDE of the tests is certified, and every planted mistake is found."""

import functools
import math
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import sympy as sp
import torch
from problems import AWKWARD, CATALOGUE, COUPLED, slowness
from scipy import special
from sympy import Rational as R

import sdeflow
import sdeflow.kernels.gaussian
import sdeflow.proof.certificate.transport as transport
from sdeflow import SDE, t, x
from sdeflow.kernels.bridge import Bridge
from sdeflow.numerics.basis import DCT, Orthogonal
from sdeflow.proof.certificate import Certificate, Check, bridge, certify, changes, draws, formulas, moments
from sdeflow.proof.certificate.intervals import breaks, enclose
from sdeflow.proof.certificate.oracle import Oracle
from sdeflow.proof.certificate.subject import Subject
from sdeflow.symbolic.coupled import information
from sdeflow.symbolic.evaluate import evaluate, number_at

k = sp.Symbol("k")
HALF_WELL = sdeflow.schedule(([0, 0.5, 1], [0.1, 5, 20]), name="beta")
WAVY = sdeflow.schedule((np.linspace(0, 1, 41), np.sin(40 * np.linspace(0, 1, 41))), name="wavy")
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


@pytest.fixture(autouse=True)
def integrals_stay(monkeypatch):
    """Formulas keep their integral signs, which SymPy tries for two seconds to take off."""
    monkeypatch.setattr(sdeflow.kernels.gaussian, "integrate_within", lambda *args: None)
    monkeypatch.setattr("sdeflow.symbolic.conditioned._SECONDS", 20.0)  # however slow the machine is


@functools.cache
def build(name):
    """Shared by tests that leave the SDE as it is."""
    return EVERY[name]()


def failed(sde, *checks):
    """The names of what fails of a certificate, or of some of its checks alone."""
    if not checks:
        return {check.name for check in certify(sde).failures}
    subject = Subject(sde)
    with torch.no_grad():
        for check in checks:
            with subject.allowing(check.__name__):
                check(subject)
    return {check.name for check in subject.checks if not check.holds}


@pytest.mark.parametrize(
    "name", [name if i % 3 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(EVERY)]
)
def test_every_sde_is_certified(name):
    certificate = build(name).verify()
    assert certificate, str(certificate)
    assert len(certificate.checks) >= 3


@pytest.mark.parametrize("name", ["SubVP", "coupled critically damped"])
def test_a_certificate_takes_little_time(name):
    sde = EVERY[name]()
    start = time.process_time()
    sde.verify()
    assert time.process_time() - start < 2.0 * slowness()


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
    certificate = sdeflow.catalog.VP().verify()
    assert not certificate.unchecked
    assert str(certificate).splitlines()[-1] == "not checked: nothing"
    assert "<p>not checked: nothing</p>" in certificate._repr_html_()
    assert build("Jacobi").verify().unchecked == ("the bridge: none is known of a Jacobi diffusion.",)
    certificate = SDE(R(1, 300) - x, sp.sqrt(x)).verify()  # 0.5 % of the states are below 1e-300
    assert certificate, str(certificate)
    assert "closer to an end of the domain than numbers can tell" in certificate.unchecked[0]


def test_a_python_function_has_no_bounds_and_the_certificate_says_so():
    """Also one of tensors alone, of which the oracle needs the values."""
    rate, other = (sdeflow.schedule(lambda u: torch.sigmoid(u) + 1, name) for name in ("rate", "other"))
    assert np.allclose(rate.values(np.array([0.0, 1.0])), 1 + special.expit([0.0, 1.0]), rtol=1e-15)
    for f, g, names in (
        (-rate(t) * x / 2, sp.sqrt(rate(t)), ["rate"]),
        (x - x**3, rate(t) + other(t), ["other", "rate"]),
        (-HALF_WELL(t) * x, 1, []),
    ):
        sde = SDE(f, g, T=0.5)
        certificate = sde.verify()
        assert certificate, str(certificate)
        said = [why for why in certificate.unchecked if "no bounds" in why]
        assert [why.split()[0] for why in said] == names
        assert all("narrower than about 1e-4 T = 5e-05 may be missed" in why for why in said)
        assert len(certificate.checks) > (50 if len(names) < 2 else 3)


@pytest.mark.parametrize("alpha", [[0.9, 0.7, 0.5, 0.3, 0.1], ([0, 0.2, 1], [1, 0.8, 0.1])], ids=["late", "early"])
def test_the_path_through_a_table_is_certified_and_a_wrong_one_found(monkeypatch, alpha):
    sde = SDE.from_kernel(alpha)
    certificate = sde.verify()
    assert certificate, str(certificate)
    assert len(certificate.checks) > 60
    assert not certificate.unchecked
    knots = Subject(sde).oracles[0].breaks
    inner = np.array([0.2, 0.4, 0.6, 0.8] if isinstance(alpha, list) else [0.2])
    assert np.isin(inner, knots).all()
    right = sde.kernel.coefficients

    def wrong(times):
        alpha, sigma, offset = right(times)
        return alpha, sigma * (1 + 1e-6 * (times > 0.5)), offset

    monkeypatch.setattr(sde.kernel, "coefficients", wrong)
    assert "sigma²" in failed(sde, moments.moments)


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


@pytest.mark.parametrize(
    ("expr", "exact"),
    [
        ((sp.exp(t / 10**25) - 1 - t / 10**25) * 10**50, lambda u: u**2 / 2),  # 45 digits are not enough, nor are 65
        (sp.sqrt(t - 1) * sp.sqrt(t - 2) - t, lambda u: -np.sqrt((1 - u) * (2 - u)) - u),  # by SymPy
        (
            sp.Piecewise((sp.sinh(t), (t < 1) & (t > R(1, 4))), (sp.Max(t, 3), True)) / sp.pi,
            lambda u: np.sinh(u) / np.pi,
        ),
        (
            sp.atan2(t, -2) ** 3 * sp.E + sp.erf(t) + 0.1 * t,
            lambda u: np.arctan2(u, -2) ** 3 * np.e + special.erf(u) + u / 10,
        ),
        (t - t, lambda u: 0.0),
    ],
)
def test_numbers_at_a_time_have_all_digits(expr, exact):
    assert abs(number_at(expr, {}, 0.7) - exact(0.7)) <= 4e-16 * abs(exact(0.7))


@pytest.mark.parametrize("name", ["sine squared", "offset drift", "coupled offset", "coupled not commuting", "tensor"])
def test_the_oracle_has_the_same_moments_by_every_way(name):
    """From edges that are kept, by twos, and panel after panel; in two steps the same as in one."""
    subject = Subject(build(name))
    (oracle,), T = subject.oracles, subject.T
    times = np.array([0.003, 0.31, 0.5, 1.0]) * T
    kept, one_by_one = oracle._from_edges(times, oracle.P0), oracle._composed(times, 0.0, oracle.P0)
    for found, expected in ((kept[i], one_by_one[i]) for i in (0, 1, 2, 4)):
        assert np.allclose(found, expected, rtol=1e-12, atol=1e-14 * np.abs(expected).max())
    first, whole = oracle.law(times[1:2]), oracle.law(times[2:3])
    second = oracle.law(times[2:3], float(times[1]))
    phi = second.phi[0]
    assert np.allclose(phi @ first.phi[0], whole.phi[0], rtol=1e-12, atol=1e-14)
    assert np.allclose(phi @ first.cov[0] @ phi.swapaxes(-1, -2) + second.cov[0], whole.cov[0], rtol=1e-11, atol=1e-14)
    moved = (phi @ first.offset[0][..., None])[..., 0] + second.offset[0]
    assert np.allclose(moved, whole.offset[0], rtol=1e-11, atol=1e-13)


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
    import sdeflow.numerics.compile as module

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
    derive = sdeflow.kernels.gaussian.derive_moments

    def wrong(*args):
        right = derive(*args)
        log_alpha = right.log_alpha * (1 + R(1, 10**6)) if part == "alpha" else right.log_alpha
        changed = sp.exp(log_alpha) if part == "alpha" else right.var * (1 + R(1, 10**6))
        return replace(right, log_alpha=log_alpha, **{part: changed})

    monkeypatch.setattr(sdeflow.kernels.gaussian, "derive_moments", wrong)
    monkeypatch.setattr(sdeflow.kernels.coefficients.Coefficients, "agrees", lambda *args: True)
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
    monkeypatch.setattr(transport, equation, wrong)
    assert {"flow", "reverse"} & failed(sde)


@pytest.mark.parametrize("name", ["square root that folds", "Stratonovich", "CIR", "coupled, not linear"])
def test_a_forgotten_divergence_is_found(monkeypatch, name):
    sde, right = build(name), transport.reverse_time

    def without(declaration):
        equation, state = right(declaration), declaration.state
        rows = [
            drift + sum(sp.diff(declaration.gram[i, j], state[j]) for j in range(len(state)))
            for i, drift in enumerate(equation.drifts)
        ]
        return replace(equation, drift=sp.ImmutableMatrix(rows) if declaration.coupled else rows[0])

    monkeypatch.setattr(transport, "reverse_time", without)
    assert "reverse" in failed(sde)


def test_wrong_noise_for_the_solvers_is_found(monkeypatch):
    from sdeflow.solving.fields import Fields

    for name in ("VP", "coupled noise matrix", "CIR"):
        sde, right = build(name), Fields.diffusion

        def wrong(self, equation, event, right=right):
            given = right(self, equation, event)
            return replace(given, g=lambda y, time: given.g(y, time) * (1 + 1e-6))

        with monkeypatch.context() as patch:
            patch.setattr(Fields, "diffusion", wrong)
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
    kernel, one = sdeflow.kernels.gaussian.Kernel, build("OU").kernel
    plants = {
        "weighting": (SDE, "weighting", property(lambda self: self.kernel.var * (1 + R(1, 10**6)))),
        "prior": (kernel, "marginal", lambda self, m, c, s, right=kernel.marginal: right(self, m, c, s * 0.9999)),
        "time_of": (one, "time_of", lambda v, right=one.time_of: right(v) * (1 + 1e-7)),
        "half_log_snr": (one, "half_log_snr", lambda s, right=one.half_log_snr: right(s) + 1e-7),
    }
    right = kernel.transition

    def transition(self, y, s, t, exactly=False):
        path = right(self, y, s, t, exactly)
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
    good = sdeflow.proof.certificate.Check("a", "x", "numeric", 1e-12, 1e-9)
    broken = sdeflow.proof.certificate.Check("b", "can be computed", "numeric", math.inf, 0.0)
    certificate = sdeflow.proof.certificate.Certificate("s", (good, broken))
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


def test_each_mutation_stands_in_its_file():
    """The texts that tests/mutations.py replaces, so that its list keeps up with the package."""
    import mutations

    assert not mutations.misplaced()
    assert len(mutations.MUTATIONS) >= 150
    assert len({mutation.name for mutation in mutations.MUTATIONS}) == len(mutations.MUTATIONS)
    named = {name for mutation in mutations.MUTATIONS for name in mutation.sdes}
    assert named <= mutations.sdes().keys()


def test_the_summary_of_mutations_counts_what_is_found_alone(capsys):
    import mutations

    def verdict(who, where, hidden=""):
        mutation = mutations.Mutation("a sign", "a.py", "+", "-", ("offset",), ("tests/test_a.py",), hidden)
        return mutations.Verdict(mutation, who, where)

    found = [verdict("verify", "offset: kernel.var"), verdict("tests", "tests/test_a.py::test_b")] * 10
    assert mutations._summary([*found, verdict("", "", "Nobody sees it.")], [], 1.0) == 0
    assert "found: 20 of 20 that a user sees (100.0 %; 10 by verify(), 10 by tests" in capsys.readouterr().out
    assert mutations._summary([*found, verdict("", "")], [], 1.0) == 0
    assert "20 of 21" in (text := capsys.readouterr().out) and "alive: a.py: a sign. A test is missing." in text
    assert mutations._summary([*found, verdict("", ""), verdict("", "")], [], 1.0) == 1  # of 22, less than 95 %
    for judge in ("tests/test_a.py::test_b", "offset"):  # what fails without a mistake
        assert mutations._summary(found, [judge], 1.0) == 1
        assert "found: 10 of 20" in capsys.readouterr().out
    gone = mutations.Mutation("no text", "kernel.py", "this text is nowhere", "", ("offset",))
    ((lost, _),) = mutations._verdicts([gone], jobs=1)
    assert lost.who == "ERROR" and "stands 0 times in kernel.py" in lost.where
    assert mutations._summary([*found, lost], [], 1.0) == 1
    assert "not judged: kernel.py: no text" in capsys.readouterr().out


def test_what_breaks_a_check_is_no_verdict(monkeypatch):
    monkeypatch.setattr(Bridge, "moments", lambda *args: 1 / 0)
    certificate = build("OU").verify()
    assert not certificate and "NO VERDICT" in str(certificate).splitlines()[0]
    assert certificate.unchecked == ("the bridge's moments: ZeroDivisionError: division by zero",)


@pytest.mark.parametrize("g", ["1+floor(4*t)", "sqrt(1/10+Mod(4*t,1))", sp.Piecewise((1, t < 1), (30, True))], ids=str)
def test_a_jump_at_T_is_no_mistake(g):
    sde = SDE("-x", g) if isinstance(g, str) else SDE(-x, g)
    assert not failed(sde, moments.log_snr, transport.drifts)


# -------------------------------------------------------------------------------- the oracle

PULSE = sp.sqrt(sp.Piecewise((1 + 10**4, (t > 0.3137) & (t < 0.3138)), (1, True)))


def variance_of_pulse(T, height, start, end):
    """∫ g² e^{-2 (T - u)} du of g² = 1 + height on (start, end), 1 elsewhere."""
    return (1 - math.exp(-2 * T)) / 2 + height * (math.exp(2 * (end - T)) - math.exp(2 * (start - T))) / 2


@pytest.mark.parametrize(
    ("declare", "expected"),
    [
        (lambda: (-x, PULSE, 1), variance_of_pulse(1, 1e4, 0.3137, 0.3138)),
        (
            lambda: (-x, sp.sqrt(sp.Piecewise((1 + 10**4, (t > 999) & (t < R(99901, 100))), (1, True))), 1000),
            variance_of_pulse(1000, 1e4, 999, 999.01),
        ),
        *(
            (
                lambda w=w: (0, sp.sqrt(1 + 10**5 * sp.exp(-(((t - R(31371, 10**5)) / w) ** 2))), 1),
                1 + 1e5 * w * math.sqrt(math.pi),
            )
            for w in (1e-5, 1e-6, 1e-7)
        ),
        (lambda: (0, sp.sqrt(1 + sp.Mod(t, R(1, 7))), 1), 1 + 1 / 14),
        (lambda: (0, sp.sqrt(sp.floor(10 * t) + sp.Abs(sp.Abs(t - R(1, 2)) - R(1, 4))), 1), 4.5 + 0.125),
        (lambda: (0, sp.sqrt(sp.Piecewise((1, sp.sin(40 * sp.pi * t) > R(1, 2)), (2, True))), 1), 5 / 3),
        (lambda: (-(10**6) * x, 10**3, 1), 0.5),
        (lambda: (-x, 1, 10**6), 0.5),
        (lambda: (-x / sp.sqrt(t), t ** R(-1, 4), 1), (1 - math.exp(-4)) / 2),
    ],
)
def test_the_oracle_finds_what_is_narrow_steep_or_long(declare, expected):
    f, g, T = declare()
    declaration = sdeflow.symbolic.declaration.declare(f, g, T, None, {}, 0.0, "ito", None)
    law = Oracle(declaration, {}).law(np.array([float(T)]))
    assert law.cov[0, 0, 0, 0] == pytest.approx(expected, rel=1e-10)


def test_the_oracle_follows_components_that_influence_each_other():
    """Integrated noise: P = t³/3, t²/2, t, each entry to rounding however small t is; and a law since s."""
    sde = SDE(lambda a, v, t: [v, 0], [0, 1], state=("a", "v"), T=2)
    oracle, times = Oracle(sde.declaration, {}), np.array([1e-7, 1e-3, 2.0])
    P = oracle.law(times).cov[:, 0]
    exact = np.array([[[u**3 / 3, u**2 / 2], [u**2 / 2, u]] for u in times])
    np.testing.assert_allclose(P, exact, rtol=1e-9)
    since = oracle.law(np.array([1.5]), since=0.5)
    np.testing.assert_allclose(since.cov[0, 0], [[1 / 3, 1 / 2], [1 / 2, 1]], rtol=1e-9)
    np.testing.assert_allclose(since.phi[0, 0], [[1, 1], [0, 1]], rtol=1e-12)


def test_breaks_are_where_the_declaration_says():
    third, sixth = 1 / 3, 1 / 6
    expression = sp.Piecewise((t, t < R(1, 3)), (sp.Max(t, R(1, 2)), True)) + sp.floor(6 * t) * sp.Abs(t**2 - R(1, 16))
    found = breaks([expression], 1.0, {})
    expected = sorted({sixth, third, 0.5, 4 * sixth, 5 * sixth, 0.25})
    np.testing.assert_allclose(found, expected, rtol=4e-16 * 4)
    knots = np.linspace(0, 1, 201)
    table = sdeflow.schedule((knots, knots**2))
    for expression in (table(t**2), sp.diff(table(t**2), t)):
        np.testing.assert_allclose(breaks([expression], 1.0, {}), np.sqrt(knots[1:-1]), rtol=1e-15)


@pytest.mark.parametrize(
    "expr",
    [
        sp.exp(-(((t - R(1, 3)) * 20) ** 2)), sp.sin(9 * t) / (1 + t), sp.cos(5 * t) ** 3, t ** R(1, 3) - sp.log(1 + t),
        sp.Mod(3 * t, R(1, 2)), sp.tan(t) * sp.Abs(t - R(1, 2)), sp.Piecewise((t, t < R(1, 3)), (1 - t, True)),
        (t - R(1, 2)) ** -2, sp.tanh(t) + sp.Max(t, 1 - t) * sp.Min(t, R(1, 4)), HALF_WELL(t) - sp.floor(4 * t), 2**t,
        WAVY(t), sp.diff(WAVY(t), t), sp.diff(WAVY(t), t, 2) * t,
    ],
)  # fmt: skip
def test_bounds_hold_every_value(expr):
    edges = np.linspace(0, 1, 24)
    low, high = enclose(expr, edges[:-1], edges[1:], {})
    values = evaluate(expr, {t: edges[:-1, None] + np.linspace(1e-9, 1 - 1e-9, 50) * np.diff(edges)[:, None]})
    assert (values >= low[:, None] - 1e-12).all() and (values <= high[:, None] + 1e-12).all()


# -------------------------------------------------------------------------------- no miss, and no false alarm


def test_a_kernel_whose_panels_miss_a_feature_is_found(monkeypatch):
    """Numbers as panels that miss the pulse give them: those of the SDE without it."""
    sde, without = SDE(-x, PULSE), SDE(-x, 1)
    for name in ("coefficients", "half_log_snr", "half_log_snr_rate", "time_of"):
        monkeypatch.setattr(sde.kernel, name, getattr(without.kernel, name))
    monkeypatch.setattr(sde.kernel.numbers, "of_kernel", without.kernel.numbers.of_kernel)
    assert failed(sde) >= {"sigma²", "half_log_snr", "prior", "transition", "kernel.log_prob", "bridge.moments"}


HARD = {
    "CIR of small dimension": lambda: SDE((R(3, 20) - x) / 2, sp.sqrt(x), T=2),
    "CIR of tiny dimension": lambda: SDE(R(1, 100) - x, sp.sqrt(x), T=3),
    "CIR of hardly any noise": lambda: SDE((R(4, 100) - x) / 2, sp.sqrt(x) * R(1, 10**5)),
    "three components": lambda: SDE(
        lambda a, b, c, t: [-a + t * b + 1, -t * a - 2 * b + sp.exp(-t) * c, sp.cos(t) - c + t**2 * a],
        [[1, R(1, 3), 0], [0, 1, t], [R(1, 4), 0, 1]], state=("a", "b", "c"),
    ),
    "narrow lognormal": lambda: SDE(x / 10, x / 300),
    "skewed lognormal": lambda: SDE(x / 10, x),
    "falling square root": lambda: SDE(-x - 1, sp.sqrt(3 - x)),
    "narrow Jacobi": lambda: SDE(R(1, 2) - x, sp.sqrt(x * (1 - x)) / 10, T=2),
    "stiff": lambda: SDE(-1000 * x + sp.cos(t), 1 + t),
    "tiny": lambda: SDE(-x, R(1, 10**4) * (1 + t), cutoff=0.01),
    "huge and long": lambda: SDE((10**6 - x) / 100, 10**5, T=1000),
    "a bridge that comes near the end": lambda: SDE(2 * (R(1, 8) - x), sp.sqrt(x)),
    "each entry breaks elsewhere": lambda: SDE(
        -x, sp.sqrt(sp.Piecewise((3, t < k), (1, True))), params={k: torch.linspace(0.05, 0.93, 24)}
    ),
    "a break at the horizon": lambda: SDE(0, sp.sqrt(1 + sp.Mod(t, R(1, 100)))),
    "breaks on round times": lambda: SDE(0, sp.sqrt(1 + sp.floor(1 / (t + R(1, 100))))),
    "a pulse of arguments that overflow": lambda: SDE(-x + 10**4 * sp.sech((t - R(2, 5)) * 10**4), 1),
    "a sawtooth that falls to zero at the horizon": lambda: SDE(-x * sp.Mod(-3 * t, 1), 1),
    "constant elasticity of variance": lambda: SDE(x / 20, x ** R(3, 4) / 5),
    "an infinite slope at 0": lambda: SDE(-t * x * sp.log(t), 1),
    "an infinite drift at 0": lambda: SDE(-x * sp.log(1 + 1 / t), 1),
    "noise that falls below rounding": lambda: SDE(-x, sp.exp(-50 * t)),
    "noise that falls below all digits": lambda: SDE(-x, sp.exp(-100 * t)),
    "silent until a round time": lambda: SDE(-x, sp.Piecewise((0, t < R(1, 2)), (1, True))),
    "noise between round times": lambda: SDE(
        -x, sp.Piecewise((0, t < R(23, 100)), (1, t < R(71, 100)), (0, True))
    ),
    "Jacobi of mass at its ends": lambda: SDE(R(1, 100) * (1 - 2 * x), sp.sqrt(x * (1 - x)), T=1),
    "decoupled scales": lambda: SDE(lambda a, v, t: [v, 10**4 - v], [R(1, 10**4), 10**3], state=("a", "v")),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_right_kernels_raise_no_alarm(name):
    start = os.times()
    certificate = HARD[name]().verify()
    assert certificate, str(certificate)
    spent = sum(after - before for after, before in zip(os.times()[:4], start[:4], strict=True))
    assert spent < 10.0


NARROW = "exp(-(10**6*t-3*10**5)**2)"


def test_a_point_that_hits_a_narrow_feature_by_luck_has_not_resolved_it():
    """log alpha = -t - √π 1e-6 after the feature; one of the oracle's points lies on it."""
    sde = SDE(f"-x*(1+{NARROW})", 1)
    law = Oracle(sde.declaration, {}, 1e-4).law(np.array([0.5, 1.0]))
    assert np.abs(law.log_phi.ravel() + [0.5, 1.0] + math.sqrt(math.pi) * 1e-6).max() < 1e-10
    assert certify(sde)


def test_the_information_that_is_shown_keeps_its_digits():
    """Exponents that are multiplied out, as in the determinant of P, hold 1e11 - 1e11 for a narrow feature."""
    phi, P = sp.eye(2), sp.Matrix([[1 + sp.sympify(NARROW, locals={"t": t}), t], [t, 2]])
    shown = information(sp.ImmutableMatrix(phi), sp.ImmutableMatrix(P), 0)
    at = 0.3 + 1e-6
    bump = math.exp(-((1e6 * at - 3e5) ** 2))
    assert abs(float(evaluate(shown, {t: np.float64(at)})) * (1 + bump - at**2 / 2) - 1) < 1e-9


def test_a_break_early_on_the_horizon_is_found_to_more_digits_than_those_of_the_horizon():
    early = breaks([sp.Heaviside(sp.sin(10 * t) - sp.Rational(1, 27))], 1.947, {})
    assert np.abs(early - math.asin(1 / 27) / 10).min() < 2e-17


def test_more_breaks_than_are_followed_are_said():
    certificate = SDE(0, sp.sqrt(sp.Mod(t, R(1, 10**4)) * 10**4)).verify()
    assert not certificate and "NO VERDICT" in str(certificate)  # nothing failed, and the moments were not visited
    assert any("break points" in why for why in certificate.unchecked)
    resting = sp.Max(t - R(1, 2), 0)  # vanishes on a whole interval, which is not many breaks
    assert np.allclose(breaks([sp.Abs(resting)], 1.0, {}), [0.5], atol=1e-12)


@pytest.mark.parametrize("rest", [R(1, 2), sp.Piecewise((R(1, 2), t < R(3, 4)), (R(5, 4) - t, True))])
def test_a_path_that_rests_is_certified(rest):
    """The derivative of sqrt(-f/x) has a branch that is 1/0 where the path rests."""
    certificate = SDE.from_kernel(sp.Piecewise((1 - t, t < R(1, 2)), (rest, True))).verify()
    assert certificate, str(certificate)
    values = evaluate(sp.Piecewise((t, t < 1), (sp.zoo, t < 2), (t * sp.I, True)), {t: np.array([0.5, 1.5, 3.0])})
    assert values[0] == 0.5 and np.isnan(values[1:]).all()


def test_an_error_of_python_is_no_identity_that_fails():
    sde = sdeflow.catalog.OU()
    sde.kernel.log_prob = lambda *_: float(1j)
    certificate = certify(sde)
    assert not certificate and not certificate.failures
    assert "NO VERDICT, for the kernel's density" in str(certificate)
    assert any("the kernel's density: TypeError" in why for why in certificate.unchecked)


def test_functions_beyond_the_largest_double_are_read():
    at = {t: np.array([-4000.0, 0.0, 800.0])}
    assert evaluate(sp.sech(t), at).tolist() == [0.0, 1.0, 0.0]
    assert evaluate(sp.gamma(t), {t: np.array([200.0, 3.0])}).tolist() == [np.inf, 2.0]
    assert evaluate(sp.besseli(1, t), {t: np.array([1e3])}).tolist() == [np.inf]


def test_a_kernel_that_resolves_the_feature_is_certified():
    assert SDE(-x, PULSE).verify()


def test_all_entries_of_tensors_are_compared(monkeypatch):
    rates = torch.linspace(0.5, 3.0, 30).reshape(5, 6)
    sde = SDE(-k * x + t, sp.sqrt(k), params={k: rates})
    right = sde.kernel.coefficients

    def wrong(times):
        alpha, sigma, offset = right(times)
        factor = torch.ones(5, 6)
        factor[3, 1] += 1e-6
        return alpha, sigma * factor, offset

    monkeypatch.setattr(sde.kernel, "coefficients", wrong)
    assert "sigma²" in failed(sde, moments.moments)


def test_of_long_formulas_a_few_entries_are_compared():
    subject = Subject(sdeflow.catalog.Blurring((8, 8)))
    assert len(subject.rows) == 4 and subject.unchecked == ["60 of the 64 entries of params"]


# -------------------------------------------------------------------------------- more planted mistakes


@pytest.mark.parametrize("name", ["OU", "sine squared", "initial variance", "coupled offset", "coupled not commuting"])
@pytest.mark.parametrize("formula", ["alpha", "var", "offset", "std", "log_snr"])
def test_a_wrong_formula_is_found_closed_or_not(monkeypatch, name, formula):
    sde = build(name)
    if formula == "offset" and not sde.kernel.has_offset:
        pytest.skip("it has no offset")
    right = getattr(sdeflow.kernels.gaussian.Kernel, formula).fget
    monkeypatch.setattr(
        sdeflow.kernels.gaussian.Kernel, formula, property(lambda self: right(self) * (1 + R(1, 10**5)))
    )
    assert f"kernel.{formula}" in failed(sde, formulas.shown)


def test_a_power_of_alpha_that_is_lost_in_an_integral_is_found(monkeypatch):
    """P0 alpha for P0 alpha², and exp(∫ a) for exp(2 ∫ a) under the integral."""
    import sdeflow.symbolic.moments as module

    right = module.integral_moments

    def wrong(drift, q, P0):
        found = right(drift, q, P0)
        return replace(found, var=found.var + P0 * (found.alpha - found.alpha**2))

    monkeypatch.setattr(module, "integral_moments", wrong)
    sde = SDE(-(1 + sp.sin(3 * t) ** 2) / 2 * x, sp.sqrt(1 + sp.exp(-(t**2))), P0=0.3)
    assert sde.kernel.form == "quadrature"
    assert "kernel.var" in failed(sde, formulas.shown)


@pytest.mark.parametrize("name", ["OU", "initial variance", "coupled noise matrix", "tensor"])
def test_wrong_bridges_are_found(monkeypatch, name):
    sde = build(name)
    of_moments, of_paths = Bridge.moments, Bridge.paths

    def shifted(self, x_0, at):
        mean, spread = of_moments(self, x_0, at)
        return mean + 1e-6 * mean.abs(), spread

    def wider(self, x_0, ts, seed=None):
        found = of_paths(self, x_0, ts, seed)
        return found + 0.2 * (found - found.mean(1, keepdim=True))

    for expected, attribute, wrong in (("bridge.moments", "moments", shifted), ("bridge.paths", "paths", wider)):
        with monkeypatch.context() as patch:
            patch.setattr(Bridge, attribute, wrong)
            assert expected in failed(sde, bridge.bridge_moments, bridge.bridge_paths)


def test_a_wrong_drift_of_a_bridge_is_found(monkeypatch):
    """Without the offset, or without the transpose of Φ_Tt."""
    right = Bridge.drift.fget
    for name in ("OU", "coupled noise matrix"):
        sde = build(name)
        with monkeypatch.context() as patch:
            patch.setattr(Bridge, "drift", property(lambda self: right(self) * (1 + R(1, 10**4))))
            assert "bridge.drift" in failed(sde, bridge.bridge_drift)


def test_wrong_seeded_draws_are_found(monkeypatch):
    for name in ("VP", "CIR", "Jacobi", "geometric Brownian motion", "square root that folds"):
        sde = build(name)
        kernel, right = type(sde.kernel), type(sde.kernel).sample

        def wrong(self, x_0, at, seed=None, noise=None, right=right):
            found = right(self, x_0, at, seed, noise)
            return found if seed is None else found.mean() + 0.8 * (found - found.mean())

        with monkeypatch.context() as patch:
            patch.setattr(kernel, "sample", wrong)
            check = draws.gaussian_draws if name == "VP" else draws.other_draws
            assert "kernel.sample" in failed(sde, check), name


def test_a_wrong_line_score_cutoff_or_bessel_function_is_found(monkeypatch):
    from sdeflow.kernels import pearson
    from sdeflow.kernels.reducible import ReducibleKernel

    right = ReducibleKernel.line_score
    with monkeypatch.context() as patch:
        patch.setattr(ReducibleKernel, "line_score", lambda *args: (lambda y, s: (y, s * 1.001))(*right(*args)))
        assert "line_score" in failed(build("geometric Brownian motion"), changes.line)
    with monkeypatch.context() as patch:
        patch.setattr("sdeflow.kernels.coefficients._CUTOFF_NOISE", 2.1e-3)
        assert "cutoff" in failed(sdeflow.catalog.VP(), moments.cutoff_rule)
        assert "cutoff" in failed(GENERAL["CIR"](), changes.clock)
    log_prob = pearson.PearsonKernel.log_prob

    def far_off(self, x_t, x_0, at):
        found = log_prob(self, x_t, x_0, at)
        return found + 1e-4 * (x_0.double().flatten(1).amax(1) > 1e4)

    with monkeypatch.context() as patch:
        patch.setattr(pearson.PearsonKernel, "log_prob", far_off)
        assert "kernel.log_prob" in failed(build("CIR"), changes.bessel)


@pytest.mark.parametrize("name", ["a spike", "a step"])
def test_the_oracle_sees_narrow_features_beside_slow_changes(name):
    """No higher than what varies slowly beside it: bounds of the drift alone do not tell it from that."""
    c, at = R(1, 50), sp.Float(392.0354)
    width = R(1, 800) if name == "a spike" else R(1, 2 * 10**6)
    shape = 1 / sp.cosh((t - at) / width) if name == "a spike" else sp.tanh((t - at) / width)
    sde = SDE(-(R(1, 100) + R(1, 50) * t / 451 + c * shape) * x, R(1, 10), T=451)
    found = Oracle(sde.declaration, {}, 1e-3).law(np.array([390.0, 393.0, 451.0]))
    for end, log_phi in zip([390.0, 393.0, 451.0], found.log_phi[:, 0], strict=True):
        z = (end - float(at)) / float(width)
        smooth = end / 100 + end**2 / (50 * 902)
        of_spike = float(width) * 2 * math.atan(math.exp(min(z, 700.0)))
        of_step = abs(end - float(at)) - float(at)
        truth = -(smooth + float(c) * (of_spike if name == "a spike" else of_step))
        assert abs(log_phi - truth) < 1e-8 * abs(truth)
