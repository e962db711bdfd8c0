"""Two error bars hold the truth for 95 % of the samples, in a slice of what benchmarks/coverage.py shows."""

import importlib.util
import math
import sys
import warnings
from pathlib import Path

import pytest
import sympy as sp
import torch

from sdeflow import SDE, catalog, t, x
from sdeflow.errors import LongSolveWarning
from sdeflow.likelihood import budget, exponential
from sdeflow.numerics.traces import Hutchinson, HutchPP, widening
from sdeflow.scores import GaussianMixture
from sdeflow.solvers import Exponential, Torchdiffeq

_path = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
_spec = importlib.util.spec_from_file_location("coverage_of_bars", _path)
bars = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = bars
_spec.loader.exec_module(bars)

pytestmark = pytest.mark.filterwarnings("ignore::sdeflow.errors.PriorMismatchWarning")  # some do not fit, on purpose
SAMPLES = 60
PROBLEMS = ("sub-VP, two modes, d = 3", "VE, scales, d = 4", "OU to T = 0.5, wide, d = 8")


@pytest.fixture(scope="module")
def problems():
    return [problem for problem in bars.problems(SAMPLES) if problem.name in PROBLEMS]


def covers(parts):
    """At least 95 % less three binomial standard errors, by bars of at most ten median errors."""
    counts = [bars.coverage(part) for part in parts]
    n = sum(count for _, count in counts)
    enough = sum(k for k, _ in counts) / n >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / n)
    narrow = all(float(bar.median()) <= 10 * float(error.abs().median()) + 1e-6 for error, bar in parts)
    return enough and narrow


def covers_of(found):
    k, n = bars.coverage(found)
    return k / n


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["``steps=4``", "``steps=10``", "``steps=20``", '``steps=20, grid="pilot"``', "``atol=0.1``", "default",
             '``Torchdiffeq("euler")``, 5 steps', "dopri5, tolerance 0.01", "fehlberg2, tolerance 0.1",
             "dopri8, tolerance 0.01"],
)  # fmt: skip
def test_the_solver(mode, problems):
    assert covers([bars.SOLVERS[mode](problem) for problem in problems])


def test_adaptive_heun(problems):
    """Its many steps, on one problem."""
    assert covers([bars.SOLVERS["adaptive_heun, tolerance 0.01"](problems[2])])


@pytest.mark.parametrize(
    "mode", ["hutchinson, 2 probes", "hutchinson, 8 probes", "hadamard, 4 columns", "hutch++, 6 products"]
)
def test_the_trace(mode, problems):
    assert covers([bars.TRACES[mode](problem) for problem in problems])


@pytest.mark.parametrize(
    "mode", ["``steps=20``", "``steps=20``, hadamard, 2", "dopri5, 8 fixed probes", "the prior's part"]
)
def test_all_of_it(mode, problems):
    assert covers([bars.ALL[mode](problem) for problem in problems])


def test_coupled_states():
    problem = bars.coupled(SAMPLES // 2)[0]
    problem.__dict__["converged"] = problem.density  # the prior is matched to far less than these errors
    assert covers([bars.COUPLED[mode](problem) for mode in ("``steps=10``", "``steps=60``", "``atol=0.1``")])


@pytest.mark.parametrize("times", ["log_snr", "t"])
def test_the_bound_of_a_sample_under_edm(times):
    """Uniform times alone would miss nearly all of the integral, and not know it."""
    sde = catalog.EDM()
    exact = GaussianMixture(sde, *bars._two(2))
    problem = bars.Problem("EDM", sde, exact, 150)
    assert covers([bars.by_elbo(times, 64)(problem)])


@pytest.mark.parametrize("mode", ["normal, 1/8 of a bin, 16 draws, weights", "uniform, 4 draws, weights"])
def test_bits_per_dimension(mode):
    assert covers([bars.BITS[mode](200)])


@pytest.mark.parametrize("steps", [30, 100])
def test_points_between_narrow_modes_are_covered(steps):
    """Two grids are off by many nats there, and by as much; what the corrector moves the states by tells."""
    sde = catalog.VP()
    exact = GaussianMixture(sde, torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), torch.tensor([0.05, 0.2]))
    points = 2 * torch.randn(80, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sde.flow_ode(exact).log_prob(points, steps=steps, full=True)
    error = found.value - exact.log_prob(points, sde.cutoff)
    assert float(error.abs().max()) > 5
    assert covers([(error, torch.hypot(found.solver_error, found.prior_mismatch))])


def test_the_error_of_the_prior_covers():
    """The constant is a mean over draws: over schedules whose p_T is far from a Gaussian."""
    inside, n = 0, 0
    for T in (0.3, 0.5, 1.0, 2.0):
        for d, law in ((8, bars._wide), (2, bars._ring), (5, bars._wide), (4, bars._two)):
            sde = catalog.OU(T=T)
            exact = GaussianMixture(sde, *law(d))
            x_T = sde.kernel.sample(exact.sample(50, seed=0, dtype=torch.float64), sde.T, seed=1)
            model = sde.flow_ode(exact).model
            found, bar = budget.prior_mismatch(model, x_T, torch.float64)
            error = found - exact.log_prob(x_T, sde.T) + model.prior_for(x_T).log_prob(x_T)
            inside, n = inside + float((error.abs() <= 2 * bar).double().mean()), n + 1
            assert float(bar.median()) < 0.25
    assert inside / n >= 0.9  # of 16 constants, each the same for all of its samples, one may be outside


def test_the_same_trace_on_both_grids():
    """Where the columns are all there are, the trace is exact, and the solver's error does not depend on the seed."""
    sde = catalog.VP()
    exact = GaussianMixture(sde, *bars._scales(4))
    flow, points = sde.flow_ode(exact), exact.sample(20, seed=0, dtype=torch.float64)
    known = flow.log_prob(points, steps=20, full=True)
    for seed in (0, 1):
        found = flow.log_prob(points, steps=20, trace="hadamard", probes=4, seed=seed, full=True)
        torch.testing.assert_close(found.value, known.value, rtol=1e-9, atol=1e-9)
        assert float(found.stderr.max()) == 0
        assert bool((found.solver_error >= 0.99 * (found.value - known.value).abs()).all())
        assert float((found.solver_error / known.solver_error).median()) < 2
    # An estimated trace too: the probes are shared, so what is left of their noise is far below their error.
    noisy = flow.log_prob(points, steps=40, trace="hutch++", probes=6, seed=0, full=True)
    assert float(noisy.solver_error.median()) < 0.2 * float(noisy.stderr.median())


def test_a_solver_without_a_corrector_has_a_bar(problems):
    mode = bars.by_solver(solver=Exponential(2, corrector=False), steps=20)
    assert covers([mode(problem) for problem in problems])


@pytest.mark.slow
@pytest.mark.parametrize("sde", [catalog.VP(), catalog.FlowMatching()], ids=["VP", "FlowMatching"])
def test_every_fixed_step_method_has_a_bar_that_covers(sde):
    """rk4 in as many steps is off by as much as heun3 is, and cannot tell its error."""
    means = torch.tensor([[3.0, 0.0], [-3.0, 1.0], [0.0, -3.0], [1.0, 4.0]], dtype=torch.float64)
    variances = torch.tensor([0.02, 0.1, 0.2, 0.3], dtype=torch.float64)
    problem = bars.Problem("", sde, GaussianMixture(sde, means, variances), 100)
    for method in ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams"):
        found = bars.by_solver(solver=Torchdiffeq(method), steps=20)(problem)
        assert covers_of(found) >= 0.95 and covers([found]), (method, covers_of(found))


def test_loose_tolerances_have_bars_that_cover():
    """There an error does not fall tenfold with the tolerance; modes are ten from the centre."""
    sde = catalog.SubVP()
    direction = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    means = 10 * direction / direction.norm(dim=1, keepdim=True)
    variances = torch.tensor([0.02, 0.3, 1.0], dtype=torch.float64)
    problem = bars.Problem("", sde, GaussianMixture(sde, means, variances), 60)
    for tolerance in (0.1, 0.03, 0.01, 0.003):
        found = bars.by_solver(rtol=tolerance, atol=tolerance)(problem)
        assert covers_of(found) >= 0.95 and covers([found]), (tolerance, covers_of(found))


def test_few_random_signs_are_distinct():
    """Two independent probes in the plane are the same for half of the samples, and know nothing of their error."""
    matrix = torch.tensor([[1.0, 0.7], [0.7, -2.0]], dtype=torch.float64)
    x = torch.zeros(200, 2, dtype=torch.float64, requires_grad=True)
    for trace, spread in ((Hutchinson(2), False), (Hutchinson(2, distinct=False), True)):
        integral = trace.start((200, 2), [1.0], seed=0)
        integral.add(x @ matrix, x)
        found = integral.result()
        error = (found.value - matrix.trace()).abs()
        assert (float(error.max()) > 1) == spread
        if not spread:
            assert float(error.max()) < 1e-12 and float(found.stderr.max()) == 0


def test_the_widening_is_students():
    from scipy.stats import t as student

    dof = torch.tensor([1.0, 2.0, 5.5, 40.0, math.inf], dtype=torch.float64)
    expected = [student.ppf(0.5 + 0.5 * 0.954499736, min(v, 1e6)) / 2 for v in dof.tolist()]
    torch.testing.assert_close(widening(dof), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def test_columns_that_come_round_often_have_narrow_bars(problems):
    """Two of four columns at 45 nodes are off by less than a thousandth of a nat; their bars were 200 times that."""
    found = bars.by_trace(trace="hadamard", probes=2, steps=45)(problems[0])
    assert float(found[1].median()) < 40 * float(found[0].abs().median()) and covers_of(found) >= 0.95


def test_errors_to_a_tolerance_fall_as_the_defects(monkeypatch, problems):
    """Bars from the order alone are too wide, and from two grids that agree by chance too narrow: both are found."""
    mode, right = bars.SOLVERS["``atol=0.1``"], exponential._off_by
    with monkeypatch.context() as patch:
        patch.setattr(exponential, "_off_by", lambda *given: 0.1 * right(*given))
        assert not covers([mode(problem) for problem in problems])
    with monkeypatch.context() as patch:
        patch.setattr(exponential, "_off_by", lambda *given: torch.fmax(right(*given), given[3] / 1.5**3))
        assert not covers([mode(problem) for problem in problems])


def test_planted_mistakes_are_found(monkeypatch, problems):
    """A bar that forgets the defects lies between narrow modes; one of a rougher grid alone, in few steps."""
    right = exponential._compared

    def half(*given):
        return 0.3 * right(*given)

    with monkeypatch.context() as patch:
        patch.setattr(exponential, "_compared", half)
        assert not covers([bars.SOLVERS["``steps=10``"](problem) for problem in problems])

    def without_defects(carrier, model, x, rows, found):
        finer = exponential._alone(exponential.replace(carrier, refined=2), model, x, rows)
        return (found.value.detach() - finer.value).abs()

    monkeypatch.setattr(exponential, "_compared", without_defects)
    with pytest.raises(AssertionError):
        test_points_between_narrow_modes_are_covered(30)


def test_bars_are_finite_for_hutchpp_and_every_number_of_steps(problems):
    problem = problems[0]
    for steps in (1, 2, 3, 9):
        found = problem.flow.log_prob(problem.points[:5], steps=steps, trace=HutchPP(6), seed=0, full=True)
        assert bool(torch.isfinite(found.error).all())


def test_long_work_on_a_large_network_is_told_of(monkeypatch):
    """Once, off a terminal; not where the bar was decided on."""
    sde = catalog.VP()
    net = torch.nn.Sequential(torch.nn.Linear(2, 50_000), torch.nn.Tanh())

    class Score(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, state, _):
            return -state

    monkeypatch.setattr(exponential, "_LONG", 40)
    flow, points = sde.flow_ode(Score(), prior=sde.prior), torch.zeros(2, 2)
    with pytest.warns(LongSolveWarning, match="progress=True") as caught:
        flow.log_prob(points, atol=1e-3)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.log_prob(points, atol=1e-3, progress=False)


@pytest.mark.parametrize(
    "g, T",
    [
        (sp.Piecewise((1, t < sp.Rational(1, 4)), (0, t < sp.Rational(3, 4)), (3, True)), 3),  # a step across the pause
        (sp.sqrt(1 + 100 * sp.exp(-((50 * (t - 1)) ** 2))), 2),  # and across all that follows a pulse
    ],
    ids=["pause", "smooth pulse"],
)
def test_bars_of_steps_that_jump_over_parts_of_a_schedule(g, T):
    sde = SDE(-x, g, T=T)
    means = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = GaussianMixture(sde, means, torch.tensor([0.05, 0.1, 0.3], dtype=torch.float64))
    points = sde.kernel.sample(exact.sample(40, seed=0, dtype=torch.float64), sde.cutoff, seed=1)
    of_flow = sde.flow_ode(exact).log_prob(points, solver="rk4", steps=12, full=True)
    bar = torch.stack([of_flow.solver_error, of_flow.prior_mismatch, of_flow.prior_error]).norm(dim=0)
    found = of_flow.value - exact.log_prob(points, sde.cutoff), bar
    assert covers_of(found) >= 0.95 and covers([found])
