"""The kernel's numbers however narrow f's and g's features are: against DOP853 with restarts, and closed forms.

``SDEFLOW_DECLARATIONS=500`` draws as many random declarations; the default is a few tens.
"""

import cmath
import math
import os
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from declarations import coupled, elementwise, integrate

import sdeflow
from sdeflow import SDE, t, x
from sdeflow.errors import ScheduleError
from sdeflow.numerics.breakpoints import break_points
from sdeflow.numerics.chebyshev import PiecewiseChebyshev
from sdeflow.symbolic.enclosure import Enclosure

R, PW = sp.Rational, sp.Piecewise
EPSILON = float(np.finfo(np.float64).eps)
COUNT = int(os.environ.get("SDEFLOW_DECLARATIONS", "24"))
FIRST = int(os.environ.get("SDEFLOW_FIRST_DECLARATION", "0"))


def visited(random, terms):
    """Times at random, near the features, and T."""
    T, rng = random.T, random.rng
    near = [c + w * rng.uniform(-2, 2) for term in terms for c, w in term.spikes]
    # Nearer to a jump of the noise, the variance is that of the last digit of the break point.
    near += [b + T * rng.choice([-1, 1]) * 10 ** rng.uniform(-5, -2) for term in terms for b in term.breaks[:2]]
    return sorted({s for s in [*rng.uniform(0.01 * T, T, 3), *near, T] if 0 < s <= T})


def allowed(random, terms):
    """The relative error: 1e-10, or 100 eps T/w for a feature of width w; and whether a refusal is right."""
    narrowest = min((w for term in terms for w in term.widths), default=random.T)
    smooth = min((w for term in terms for _, w in term.spikes), default=random.T)
    return max(1e-10, 100 * EPSILON * random.T / narrowest), smooth < 1e-6 * random.T


def declared(make, refusable):
    try:
        return make()
    except ScheduleError:
        if refusable:
            return None
        raise


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_random_declarations(seed):
    if seed % 4 == 3:
        check_coupled(seed)
    else:
        check_elementwise(seed)


def check_elementwise(seed):
    random, make, a, b, q, P0 = elementwise(seed)
    terms = (a, b, q)
    tolerance, refusable = allowed(random, terms)
    sde = declared(make, refusable)
    if sde is None:
        return
    times = visited(random, terms)

    def right(s, y):
        rate = a.value(s)
        return np.array([rate, rate * y[1] + b.value(s), 2 * rate * y[2] + q.value(s)])

    truth, largest = integrate(right, np.array([0.0, 0.0, P0]), terms, random.T, times)
    with torch.no_grad():
        alpha, std, offset = sde.kernel.numbers.of_kernel(torch.tensor(times, dtype=torch.float64))
    alpha, std, offset = (v.expand(len(times)).numpy() for v in (alpha, std, offset))
    for i, (log_alpha, m, v) in enumerate(truth):
        assert alpha[i] == pytest.approx(math.exp(log_alpha), rel=tolerance)
        assert std[i] == pytest.approx(math.sqrt(v), rel=tolerance)
        assert abs(offset[i] - m) <= tolerance * largest[i][1]


def check_coupled(seed):
    random, make, terms, functions = coupled(seed)
    tolerance, refusable = allowed(random, terms)
    sde = declared(make, refusable)
    if sde is None:
        return
    times = visited(random, terms)

    def right(s, y):
        F, b, Q = functions(s)
        P = y[6:].reshape(2, 2)
        return np.concatenate([(F @ y[:4].reshape(2, 2)).ravel(), F @ y[4:6] + b, (F @ P + P @ F.T + Q).ravel()])

    truth, _ = integrate(right, np.concatenate([np.eye(2).ravel(), np.zeros(6)]), terms, random.T, times)
    with torch.no_grad():
        phi, root, offset = sde.kernel.numbers.of_kernel(torch.tensor(times, dtype=torch.float64))
    for i, y in enumerate(truth):
        true_phi, m, P = y[:4].reshape(2, 2), y[4:6], y[6:].reshape(2, 2)
        scale = np.sqrt(np.outer(P.diagonal(), P.diagonal()))
        assert abs(phi[i].numpy() - true_phi).max() <= tolerance * abs(true_phi).max()
        assert abs(offset[i].numpy() - m).max() <= tolerance * abs(m).max()
        assert (abs((root[i] @ root[i].mT).numpy() - P) <= 2 * tolerance * scale).all()


# ------------------------------------------------------------------ closed forms


def at(sde, time=None):
    """alpha, variance and offset at a time, by default T."""
    with torch.no_grad():
        alpha, std, offset = sde.kernel.numbers.of_kernel(torch.tensor(time or sde.T, dtype=torch.float64))
    return float(alpha), float(std) ** 2, float(offset)


def exposed(low, high, T=1.0, rate=1.0):
    """∫ e^{-2 rate (T - t)} dt from low to high: the variance of unit noise between these times."""
    return (math.exp(-2 * rate * (T - high)) - math.exp(-2 * rate * (T - low))) / (2 * rate)


def pulse(low, high, height):
    return PW((1 + height, (t > low) & (t < high)), (1, True))


@pytest.mark.parametrize("make, variance", [
    (lambda: SDE(-x, sp.sqrt(pulse(0.3137, 0.3138, 10**4))), exposed(0, 1) + 1e4 * exposed(0.3137, 0.3138)),
    (lambda: SDE(-x / 100, sp.sqrt(pulse(313.7, 313.71, 10**4)), T=1000),
     exposed(0, 1000, 1000, 0.01) + 1e4 * exposed(313.7, 313.71, 1000, 0.01)),
    (lambda: SDE(-x, PW((1000, t < R(1, 3)), (2000, True))), 1e6 * exposed(0, 1 / 3) + 4e6 * exposed(1 / 3, 1)),
    (lambda: SDE(-x, PW((1, t < R(1, 3)), (10**7, True))), exposed(0, 1 / 3) + 1e14 * exposed(1 / 3, 1)),
    (lambda: SDE(-x, sp.Rational(1, 10**12), P0=1e-26), 1e-24 * exposed(0, 1) + 1e-26 * math.exp(-2)),
    (lambda: SDE(0, sp.sqrt(sp.Mod(t, R(1, 1000))), T=2), 1e-3),
    (lambda: SDE(0, sp.sqrt(sp.Abs(sp.sin(40 * t))), T=20 * sp.pi / 40), 1.0),
    (lambda: SDE(-10**5 * x, PW((1, t < R(1, 3)), (1000, True))), 5.0),
    (lambda: SDE(-x, 1, T=1e6), 0.5),
], ids=["pulse", "long pulse", "jump", "large jump", "small", "sawtooth", "|sin|", "stiff", "T = 1e6"])  # fmt: skip
def test_variances_known_in_closed_form(make, variance):
    assert at(make())[1] == pytest.approx(variance, rel=1e-11)


def test_the_values_of_the_first_report():
    assert at(SDE(-x, sp.sqrt(pulse(0.3137, 0.3138, 10**4))))[1] == pytest.approx(0.68580484438, rel=1e-10)
    assert at(SDE(0, sp.sqrt(1 + 1e5 * sp.exp(-(((t - 0.31371) / 1e-5) ** 2)))))[1] == pytest.approx(
        2.772453850905516, rel=1e-10
    )


@pytest.mark.parametrize("width", [1e-2, 1e-5, 1e-7, 1e-9, 1e-12])
@pytest.mark.parametrize("shape, area", [
    (lambda u: sp.exp(-u**2), math.sqrt(math.pi)),
    (lambda u: sp.sech(u) ** 2, 2.0),
    (lambda u: sp.sech(u) ** 2 * (1 + sp.tanh(u)) + sp.exp(-u**2), 2.0 + math.sqrt(math.pi)),
], ids=["Gaussian", "sech", "sum"])  # fmt: skip
def test_smooth_spikes_of_any_width(width, shape, area):
    height = 0.3 / width
    g = sp.sqrt(1 + height * shape((t - sp.Float(0.31371)) / sp.Float(width)))
    assert at(SDE(0, g))[1] == pytest.approx(1 + height * width * area, rel=max(1e-10, 100 * EPSILON / width))


@pytest.mark.parametrize("width", [1e-3, 1e-6, 1e-8, 1e-11])
def test_spikes_of_the_drift_keep_the_bound_that_both_pages_state(width):
    f = -x * sp.exp(-(((t - sp.Float(0.31371)) / sp.Float(width)) ** 2)) / sp.Float(width)
    assert at(SDE(f, 1))[0] == pytest.approx(math.exp(-math.sqrt(math.pi)), rel=max(1e-10, 100 * EPSILON / width))
    for page in ("README.md", "docs/declare.rst"):
        text = " ".join((Path(__file__).parents[2] / page).read_text(encoding="utf-8").split())
        assert "the bound is 100 ε T/w if that is more than 1e-10, where ε = 2.2e-16 is the rounding" in text


def test_a_lorentzian_and_a_step():
    c, w = 0.77, 1e-6
    turned = w * (math.atan((1 - c) / w) + math.atan(c / w))
    assert at(SDE(0, sp.sqrt(1 + 10**6 / (1 + ((t - c) / w) ** 2))))[1] == pytest.approx(1 + 1e6 * turned, rel=1e-10)
    alpha = at(SDE(-x * (2 + sp.tanh((t - c) / w)), 1))[0]
    assert alpha == pytest.approx(math.exp(-2 - (1 - c) + c), rel=1e-10)
    alpha = at(SDE(-x / (1 + sp.exp(1e6 * (t - 0.3))), 1))[0]  # SymPy makes 1e-130289 exp(1e6 t) of it
    assert alpha == pytest.approx(math.exp(-0.3), rel=1e-10)


def test_after_a_jump_every_digit_of_a_small_variance_is_kept():
    sde = SDE(0, PW((R(1, 10**4), t < R(1, 3)), (10**4, True)))
    for later in (1e-15, 1e-13, 1e-10, 1e-6):
        time = 1 / 3 + later
        assert at(sde, time)[1] == pytest.approx(1e-8 / 3 + 1e8 * (time - 1 / 3), rel=1e-11)
    free = SDE(lambda a, b, t: [0, 0], [PW((R(1, 10**4), t < R(1, 3)), (10**4, True)), 1], state=("a", "b"))
    for later in (1e-13, 1e-10, 1e-6):
        time = 1 / 3 + later
        root = free.kernel.numbers.of_kernel(torch.tensor(time, dtype=torch.float64))[1]
        assert float(root[0, 0]) ** 2 == pytest.approx(1e-8 / 3 + 1e8 * (time - 1 / 3), rel=1e-10)


@pytest.mark.parametrize("rate", [10**3, 10**5, 10**7])
def test_a_stiff_drift_with_schedules_that_vary(rate):
    """x' = -rate (x - cos 3t), with g² = rate (2 + sin 3t): resonance, once the start is forgotten."""
    sde = SDE(-rate * (x - sp.cos(3 * t)), sp.sqrt(rate * (2 + sp.sin(3 * t))), P0=1e4)
    z, w = 1 / (rate + 3j), 1 / (2 * rate + 3j)
    for time in (0.3, 1.0):
        _, variance, offset = at(sde, time)
        assert offset == pytest.approx((rate * z * cmath.exp(3j * time)).real, rel=1e-11)
        assert variance == pytest.approx(1 + (rate * w * cmath.exp(3j * time)).imag, rel=1e-11)
    time = 3 / rate
    moved = rate * z * (cmath.exp(3j * time) - math.exp(-rate * time))
    assert at(sde, time)[2] == pytest.approx(moved.real, rel=1e-11)


@pytest.mark.parametrize("sde", [
    lambda: SDE(-x + x * sp.sin(t) ** 2 + x * sp.cos(t) ** 2, 1),
    lambda: SDE(sp.sin(t) ** 2 + sp.cos(t) ** 2 - 1, 1),
    lambda: SDE(10**6 * (sp.sin(t) ** 2 + sp.cos(t) ** 2 - 1), 1),
], ids=["slope", "offset", "large offset"])  # fmt: skip
def test_zeros_in_disguise_are_zeros(sde):
    alpha, variance, offset = at(sde())
    assert alpha == pytest.approx(1, rel=1e-14) and variance == pytest.approx(1, rel=1e-14) and offset == 0.0


def test_what_is_refused_says_why():
    with pytest.raises(ScheduleError, match="overflows"):
        SDE(-x + sp.exp(700 * t), 1)
    with pytest.raises(ScheduleError, match="no noise"):
        SDE(-x, 10**6 * (sp.sin(t) ** 2 + sp.cos(t) ** 2 - 1))
    with pytest.raises(ScheduleError, match=r"0\.33333"):
        SDE(-x, 1 / (t - 0.33333331))
    with pytest.raises(ScheduleError, match="switches more than"):
        SDE(-x, 2 + sp.floor(10**7 * t) / 10**7)
    with pytest.raises(ScheduleError, match="panels"):
        SDE(-x, 2 + sp.sin(10**8 * t))


def test_noise_in_a_pulse_alone():
    sde = SDE(0, 1000 * PW((1, (t > R(1, 2)) & (t < R(1, 2) + R(1, 10**6))), (0, True)), P0=0.5)
    assert at(sde)[1] == pytest.approx(1.5, rel=1e-10)
    assert not sde.kernel.log_snr_falls
    narrow = PW((0, (t > R(1, 2)) & (t < R(1, 2) + R(1, 10**6))), (1, True))
    assert not SDE(0, narrow).kernel.log_snr_falls and SDE(0, 1).kernel.log_snr_falls


# ------------------------------------------------------------------ break points

p = sp.Symbol("p", real=True)
TABLE = sdeflow.schedule(([0.0, 0.2, 0.55, 1.0], [1.0, 3.0, 3.5, 9.0]), name="knotted")


@pytest.mark.parametrize("expr, expected", [
    (pulse(0.3137, 0.3138, 1), [0.3137, 0.3138]),
    (PW((1, t < p), (2, True)), [0.1]),
    (PW((1, sp.Or(p * t > R(1, 20), sp.Not(t > R(1, 7)))), (2, True)), [1 / 7, 0.5]),
    (sp.Heaviside(3 * t - 1) + sp.sign(t - R(1, 4)) + sp.Abs(7 * t - 2), [1 / 4, 2 / 7, 1 / 3]),
    (sp.Max(t, R(1, 3), 1 - t), [1 / 3, 1 / 2, 2 / 3]),
    (sp.Min(t**2, R(1, 9)), [1 / 3]),
    (sp.floor(3 * t + R(1, 2)), [1 / 6, 1 / 2, 5 / 6]),
    (sp.frac(2 * t) + sp.ceiling(3 * t), [1 / 3, 1 / 2, 2 / 3]),
    (sp.Mod(t, R(2, 7)), [2 / 7, 4 / 7, 6 / 7]),
    (sp.Mod(t**2, R(1, 2)), [math.sqrt(0.5)]),
    (TABLE(t), [0.2, 0.55]),
    (TABLE(t**2), [math.sqrt(0.2), math.sqrt(0.55)]),
    (sp.Abs(sp.sin(10 * t)), [math.pi / 10, 2 * math.pi / 10, 3 * math.pi / 10]),
    (sp.floor(2 * sp.sin(3 * t)), [math.pi / 18, 5 * math.pi / 18]),
    (sp.Abs(sp.Abs(t - R(1, 2)) - R(1, 4)), [0.25, 0.5, 0.75]),
    (PW((1, sp.exp(-(((t - 0.3) / 1e-7) ** 2)) > R(1, 2)), (2, True)),
     [0.3 - 1e-7 * math.sqrt(math.log(2)), 0.3 + 1e-7 * math.sqrt(math.log(2))]),
    (PW((1, sp.log(t - R(1, 2)) < -1), (2, True)), [0.5 + math.exp(-1)]),
], ids=str)  # fmt: skip
def test_break_points_are_solved_for(expr, expected):
    found = break_points([expr], {p: 0.1}, 1.0)
    for time in expected:
        assert abs(found - time).min() <= 4e-15
    # More of them do no harm; those above are all that rounding does not double.
    assert all(abs(time - np.array([*expected, 0.0, 0.5, math.pi / 6, 1.0])).min() < 1e-7 for time in found)


def test_break_points_of_every_entry_of_a_tensor():
    entries = np.array([[0.2], [0.3], [0.7]])
    linear = break_points([PW((1, t < p), (2, True))], {p: entries}, 1.0)
    curved = break_points([PW((1, t**2 < p), (2, True))], {p: entries}, 1.0)
    np.testing.assert_allclose(linear, [0.2, 0.3, 0.7], rtol=1e-15)
    np.testing.assert_allclose(curved, np.sqrt([0.2, 0.3, 0.7]), rtol=1e-15)


@pytest.mark.parametrize("condition", [
    t < p, p < t, (t > p / 2) & (t < p), 3 * p * t < p, sp.Abs(t - p) < p / 2, sp.sin(5 * t) < p,
], ids=str)  # fmt: skip
def test_a_parameter_in_a_condition_keeps_its_digits(condition):
    def variance(value):
        g = sp.sqrt(PW((1 + 10**4, condition), (1, True)))
        return at(SDE(-x, g, params={p: value} if value is not None else {}))[1]

    plain = at(SDE(-x, sp.sqrt(PW((1 + 10**4, condition.subs(p, R(1, 10))), (1, True)))))[1]
    tensor = torch.tensor(0.1, dtype=torch.float64)
    for value in (0.1, torch.nn.Parameter(tensor.reshape(1, 1))):
        assert variance(value) == pytest.approx(plain, rel=1e-12)


def test_parameters_that_move_a_break_point_are_followed():
    value = torch.nn.Parameter(torch.tensor([0.2, 0.4], dtype=torch.float64))
    sde = SDE(-x, sp.sqrt(PW((1 + 10**4, t < p), (1, True))), params={p: value})
    for moved in ([0.2, 0.4], [0.123456789, 0.9]):
        with torch.no_grad():
            value.copy_(torch.tensor(moved, dtype=torch.float64))
            std = sde.kernel.numbers.of_kernel(torch.tensor(1.0, dtype=torch.float64))[1]
        for ours, edge in zip(std.tolist(), moved, strict=True):
            assert ours**2 == pytest.approx(exposed(0, 1) + 1e4 * exposed(0, edge), rel=1e-11)


@pytest.mark.parametrize("g", [
    PW((1, t < R(1, 3)), (1000, True)), sp.sqrt(pulse(0.3137, 0.3138, 10**6)),
    sp.sqrt(1 + 1e5 * sp.exp(-(((t - 0.31371) / 1e-5) ** 2))), 1 + sp.floor(7 * t) + sp.Abs(sp.sin(40 * t)),
], ids=["jump", "pulse", "spike", "steps"])  # fmt: skip
def test_time_of_inverts_the_log_snr_across_features(g):
    kernel = SDE(-x, g).kernel
    breaks = kernel.numbers.breaks
    near = [0.3137, 0.31371, 0.3137 + 3e-6, 1 / 3, 1 / 3 + 1e-9, *breaks[:20], *np.linspace(0.01, 1, 50)]
    times = torch.tensor(sorted(near), dtype=torch.float64)
    with torch.no_grad():
        levels = kernel.half_log_snr(times)
        back = kernel.time_of(levels)
        np.testing.assert_allclose(kernel.half_log_snr(back), levels, rtol=0, atol=3e-13)
    np.testing.assert_allclose(back, times, rtol=1e-11)


# ------------------------------------------------------------------ parts that are infinite at an edge


def bump(width, centre):
    """The standard mollifier: smooth, and 0 outside of centre - width, centre + width."""
    u = (t - centre) / width
    return PW((100 * sp.exp(-1 / (1 - u**2)), sp.Abs(u) < 1), (0, True))


MOLLIFIER = 0.4439938161680794  # the integral of exp(-1/(1 - u²)) over |u| < 1
_u, _v = 2 * t - R(1, 2), t - R(1, 3)  # a step from t = 1/4 to 3/4, and what starts at 1/3
EDGES = {  # pulses and their integrals over [0, 1]
    "bump": (bump(R(121, 1250), R(6, 13)), 9.68 * MOLLIFIER),  # 1 - u² is not 0 at the rounded edge
    "narrow bump": (bump(R(1, 10**5), R(1, 3)), 1e-3 * MOLLIFIER),
    "bump up to T": (sp.exp(-1 / (4 * t - 4 * t**2)), 0.5 * MOLLIFIER),
    "step": (PW((0, _u <= 0), (1 / (1 + sp.exp(1 / _u - 1 / (1 - _u))), _u < 1), (1, True)), 0.5),
    "0 times infinity": (PW((sp.exp(-1 / _v) / _v**2, _v > 0), (0, True)), math.exp(-1.5)),
    "0 / 0": (PW((sp.sin(9 * _v) / _v + 5, sp.Ne(_v, 0)), (14, True)), float(sp.Si(3) + sp.Si(6)) + 5),
    "poles below": (1 / (1 + sp.tan(9 * t) ** 2), 0.5 + math.sin(18) / 36),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_bounded_functions_of_what_is_infinite_at_an_edge(name):
    pulse, area = EDGES[name]
    assert at(SDE(0, sp.sqrt(1 + pulse)))[1] == pytest.approx(1 + area, rel=1e-12)


@pytest.mark.parametrize("pulse", [sp.exp(_v) * _v / _v**2, 1 + sp.exp(1 / (1 - (3 * _v) ** 2))], ids=["pole", "power"])
def test_what_grows_without_bound_at_an_edge_is_refused(pulse):
    with pytest.raises(ScheduleError, match=r"singular|not finite"):
        SDE(0, sp.sqrt(1 + PW((pulse, (_v > 0) & (_v < R(1, 3))), (0, True))))


# ------------------------------------------------------------------ bounds

SHAPES = [
    sp.exp(-(((t - R(3, 10)) * 100) ** 2)), 1 / (1 + (100 * t - 30) ** 2), sp.tanh(100 * t - 30), sp.erf(4 * t),
    sp.sech(9 * t - 3) ** 2, 1 / sp.cosh(9 * t - 3), sp.sqrt(1 + t), t ** R(3, 2), sp.log(1 + t), sp.tan(t),
    sp.atan(5 * t), sp.sin(30 * t) * sp.cos(t), sp.asin(t / 2), sp.acos(t / 2), 1 / (1 + sp.exp(6 - 12 * t)),
    sp.coth(1 + t), sp.acosh(2 + t), sp.atanh(t / 3), sp.asinh(3 * t), (1 + t) ** t, sp.cot(1 + t), sp.csc(1 + t),
    sp.sec(t), sp.erfc(t), (1 + t) ** 5, sp.csch(1 + t), sp.sinh(3 * t), (2 + t) ** -3, 2**t,
]  # fmt: skip


@pytest.mark.parametrize("expr", SHAPES, ids=str)
def test_discs_contain_the_values(expr):
    """At complex points of discs, by mpmath; and not much more than them."""
    import mpmath

    rng = np.random.default_rng(0)
    function, enclosure, tightness = sp.lambdify(t, expr, "mpmath"), Enclosure([expr], {}), []
    for _ in range(30):
        centre = rng.uniform(0.05, 0.95)
        radius = centre * 10 ** rng.uniform(-3, -0.3)
        value, bound = (float(part[0, 0]) for part in enclosure(np.array([centre]), np.array([radius])))
        assert value == pytest.approx(float(function(mpmath.mpf(centre))), rel=1e-12, abs=1e-14)
        if not math.isfinite(bound):
            continue
        circle = [mpmath.mpc(centre + radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(0, math.pi, 9)]
        distance = max(abs(complex(function(z)) - value) for z in circle)
        assert distance <= bound * (1 + 1e-9)
        tightness.append(bound / max(distance, 1e-14 * max(1, abs(value))))
    assert len(tightness) >= 10 and np.median(tightness) < 5


@pytest.mark.parametrize("expr", SHAPES, ids=str)
def test_ranges_contain_the_values(expr):
    """The real ones on intervals; and not much more than them."""
    rng = np.random.default_rng(0)
    function = sp.lambdify(t, expr, ["scipy", "numpy"])
    left = rng.uniform(0.02, 0.9, 40)
    right = np.minimum(left + 10 ** rng.uniform(-3, -0.3, 40), 0.98)
    (low,), (high,) = Enclosure([expr], {}).between(left, right)
    values = function(np.linspace(left, right, 201))
    least, most, rounding = values.min(0), values.max(0), 1e-11 * (1 + abs(values).max(0))
    assert (low <= least + rounding).all() and (high >= most - rounding).all()
    assert np.median((high - low) / (most - least + rounding)) < 3


def test_rounding_is_bounded():
    expr = 10**8 * (sp.sin(7 * t) ** 2 + sp.cos(7 * t) ** 2 - 1) + t
    points = np.linspace(0.1, 0.9, 50)
    values, error = Enclosure([expr], {})(points, np.zeros_like(points), analytic=False)
    assert (abs(values[0] - points) <= error[0]).all() and error.max() < 1e-6


def test_the_derivative_of_a_fit_is_the_derivative():
    """Panel by panel, on panels of different widths."""
    curve = PiecewiseChebyshev.fit(lambda points: np.sin(points)[None], np.array([0.0, 0.3, 1.0, 3.0]))
    points = torch.linspace(0.05, 2.95, 40, dtype=torch.float64)
    torch.testing.assert_close(curve.derivative()(points)[0], points.cos(), rtol=0, atol=1e-9)


ENDS = {  # alpha at T = 1 of f = -a x, whose a ends with an infinite slope, or is exactly 0 for a while
    "Max": (sp.sqrt(sp.Max(t - R(1, 3), 0)), (2 / 3) ** 2.5),
    "Min": (sp.sqrt(1 - sp.Min(1, 3 * t)), 2 / 9),
    "asin": (sp.asin(t), math.pi / 2 - 1),
    "acos": (sp.acos(t), 1.0),
    "acosh": (sp.acosh(1 + t), 2 * math.acosh(2) - math.sqrt(3)),
    "acosh at T": (sp.acosh(2 - t), 2 * math.acosh(2) - math.sqrt(3)),
    "both ends": (sp.asin(2 * t - 1), 0.0),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_coefficient_may_end_with_an_infinite_slope(name):
    a, integral = ENDS[name]
    assert float(SDE(-a * x, 1).kernel.coefficients(1.0)[0]) == pytest.approx(math.exp(-integral), rel=1e-10)


@pytest.mark.parametrize(("amount", "power", "wave", "T"), [(50, 1000, 1000, 1.0), (1000, 10**7, 3, 2.0)])
def test_peaks_of_a_high_power_are_found(amount, power, wave, T):
    """Peaks of cos**n are exp(-n u²/2) (1 - n u⁴/12 + ...): wider than 1e-6 T, and found however high the power."""
    sigma = SDE(-x, sp.sqrt(1 + amount * sp.cos(wave * t) ** power), T=T).kernel.coefficients(T)[1]
    width = 1.0 / (wave * math.sqrt(power))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    total = 0.5 * (1 - math.exp(-2 * T))
    for peak in np.arange(0.0, T + 12 * width, math.pi / wave):
        low, high = max(peak - 12 * width, 0.0), min(peak + 12 * width, T)
        u = 0.5 * (low + high) + 0.5 * (high - low) * nodes
        shape = np.exp(power * np.log(np.abs(np.cos(wave * (u - peak)))) - 2 * (T - u))
        total += amount * 0.5 * (high - low) * float(weights @ shape)
    assert float(sigma**2) == pytest.approx(total, rel=1e-9)
