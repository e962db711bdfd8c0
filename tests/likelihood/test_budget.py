"""The error budget of log p: its bars cover the truth, and each part is what it says."""

import math

import pytest
import torch
from problems import ring

import sdeflow
from sdeflow import SDE, catalog, x
from sdeflow.laws.stationary import stationary_law
from sdeflow.likelihood import LogProb, budget
from sdeflow.scores import GaussianMixture

NAMES = ["VP", "VE", "SubVP", "CosineVP"]


def mixture(sde, d):
    """Five or six Gaussians of different widths in 2 or more dimensions."""
    if d == 2:
        angle = torch.arange(5) * 2 * math.pi / 5
        return GaussianMixture(sde, torch.stack([angle.cos(), angle.sin()], 1), torch.linspace(0.02, 0.1, 5))
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(6, d, generator=draw, dtype=torch.float64)
    return GaussianMixture(sde, means, 0.02 + 0.2 * torch.rand(6, d, generator=draw, dtype=torch.float64))


def of_data(x, d):
    """log p of the mixture itself, without any noise: at t = 0 of an SDE without P0."""
    return mixture(catalog.VP(), d).log_prob(x)


def covered(found, truth, bar):
    return float(((found.value - truth).abs() <= 2 * bar).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 64])
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_covers_the_truth(name, d):
    """Within two bars for 95 % of the samples and more, at the cutoff and of the data, for a solver error of 0.01."""
    sde = getattr(catalog, name)()
    exact = mixture(sde, d)
    flow, data = sde.flow_ode(exact), exact.sample(60 if d == 2 else 20, seed=0, dtype=torch.float64)
    points = sde.kernel.sample(data, sde.cutoff, seed=1)
    found, truth = flow.log_prob(points, atol=0.01, full=True), exact.log_prob(points, sde.cutoff)
    without_cutoff = (found.stderr.square() + found.solver_error.square() + found.prior_mismatch.square()).sqrt()
    assert covered(found, truth, without_cutoff) >= 0.95
    assert covered(found, of_data(points, d), found.error) >= 0.95
    assert bool((found.solver_error <= 0.01).all()) and float(found.error.max()) < 0.2
    found = flow.log_prob(data, atol=0.01, full=True, at="data")
    assert covered(found, of_data(data, d), found.error) >= 0.95
    assert float(found.truncation.max()) < (5e-3 if sde.cutoff == 0 else 1e-5)  # P0 is a wider blur


@pytest.mark.slow
@pytest.mark.parametrize(("d", "atol"), [(2, 0.01), (64, 0.3)])
def test_the_budget_of_critically_damped_langevin(d, atol):
    sde = catalog.CriticallyDampedLangevin()
    exact = mixture(sde, d)
    data = sde.lift(exact.sample(40 if d == 2 else 6, seed=0, dtype=torch.float64)[:, 0], seed=1)
    points = sde.kernel.sample(data, sde.cutoff, seed=2)
    found = sde.flow_ode(exact).log_prob(points, atol=atol, full=True)
    assert covered(found, exact.log_prob(points, sde.cutoff), found.error) >= 0.95
    assert not found.truncation.any()
    with pytest.raises(ValueError, match="data_log_prob"):
        sde.flow_ode(exact).log_prob(points, at="data")


def test_bars_of_a_trace_cover_too():
    sde = catalog.VP()
    exact = mixture(sde, 24)
    flow, data = sde.flow_ode(exact), exact.sample(100, seed=0, dtype=torch.float64)
    truth = exact.log_prob(data)
    for options in (
        {"steps": 60, "trace": "hutchinson"},
        {"atol": 0.05, "trace": "hadamard", "probes": 8},
        {"steps": 60, "probes": "auto"},
    ):
        found = flow.log_prob(data, full=True, at="data", seed=0, **options)
        assert float(found.stderr.min()) > 0
        assert covered(found, truth, found.error) >= 0.92  # 0.95, less 1.5 standard errors of 100 samples


@pytest.mark.parametrize("name", ["VP", "SubVP", "CosineVP"])
def test_truncation_is_the_difference_of_the_two_densities(name):
    """Of first order where it is reported, with a second-order remainder; of second where it is applied."""
    sde = getattr(catalog, name)()
    exact = mixture(sde, 6)
    data = exact.sample(30, seed=0, dtype=torch.float64)
    rows = torch.arange(30)
    with torch.no_grad():
        change, _ = budget.truncation(
            sde.flow_ode(exact).model, data, sdeflow.numerics.traces.Exact(), seed=0, rows=rows
        )
    truth = exact.log_prob(data) - exact.log_prob(data, sde.cutoff)
    assert float((change - truth).abs().max()) < 0.03 * float(truth.abs().max())
    y, volume = budget.mean_path(sde.flow_ode(exact).model, data)
    applied, left = budget.truncation(
        sde.flow_ode(exact).model, data, sdeflow.numerics.traces.Exact(), seed=0, rows=rows, from_data=True
    )
    truth = exact.log_prob(data) - exact.log_prob(y, sde.cutoff) - volume
    assert bool(((applied - truth).abs() <= left + 1e-9).all())


def test_truncation_is_of_second_order_in_the_noise():
    """Twice the cutoff's noise makes what is left four times for the first order, and eight for the second."""
    errors = []
    for cutoff in (1e-3, 2e-3):
        sde = SDE(0, 1, T=4.0, cutoff=cutoff)  # variance t
        exact = mixture(sde, 2)
        data = exact.sample(50, seed=0, dtype=torch.float64)
        model = sde.flow_ode(exact).model
        rows = torch.arange(50)
        with torch.no_grad():
            applied, left = budget.truncation(
                model, data, sdeflow.numerics.traces.Exact(), seed=0, rows=rows, from_data=True
            )
        truth = exact.log_prob(data) - exact.log_prob(data, cutoff)
        errors.append((float((applied - truth).abs().mean()), float(left.mean()), float(truth.abs().mean())))
    (second, first, whole), (second_2, first_2, whole_2) = errors
    assert 1.8 < whole_2 / whole < 2.2 and 3.3 < first_2 / first < 4.5 and 5.5 < second_2 / second < 9.5


def test_data_without_a_density_are_told_by_the_truncation():
    """Points have no density: each of their dimensions adds half a nat and more to what the cutoff is said to hide."""
    sde = catalog.VP()
    exact = GaussianMixture(sde, torch.tensor([[0.5, -0.5, 0.0]]), torch.zeros(1))
    found = sde.flow_ode(exact).log_prob(torch.tensor([[0.5, -0.5, 0.0]], dtype=torch.float64), full=True)
    assert float(found.truncation) > 1.4


def test_the_density_of_the_data_counts_the_volume_of_the_mean_path():
    """Under a strong drift the cutoff lies at alpha = 0.9: of normal data the rest is of third order in the noise."""
    sde = SDE(-5 * x, 1, T=1.0, cutoff=0.02)
    flow = sde.flow_ode(GaussianMixture(sde, torch.zeros(1, 2), torch.ones(1)))
    points = torch.tensor([[0.0, 0.0], [1.0, -0.5], [-1.5, 1.0]], dtype=torch.float64)
    found = flow.log_prob(points, steps=20, at="data")
    truth = torch.distributions.Normal(0.0, 1.0).log_prob(points).sum(1)
    assert float((found - truth).abs().max()) < 1e-4


def test_the_blur_of_the_initial_noise_is_told_and_taken_off():
    """P0 of VE is noise too: at t = 0 the density is that of data plus N(0, 0.05²)."""
    sde = catalog.VE(sigma_min=0.05)
    assert sde.cutoff == 0
    exact = mixture(sde, 2)
    data = exact.sample(50, seed=0, dtype=torch.float64)
    truth, flow = of_data(data, 2), sde.flow_ode(exact)
    blurred, sharp = (flow.log_prob(data, atol=1e-3, full=True, at=at) for at in ("cutoff", "data"))
    assert float((blurred.value - truth).abs().max()) > 0.05
    assert covered(blurred, truth, blurred.error) >= 0.95
    assert float((sharp.value - truth).abs().mean()) < 0.2 * float((blurred.value - truth).abs().mean())
    assert covered(sharp, truth, sharp.error) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False], ids=["moments", "read-off"])
def test_the_prior_is_matched_and_what_is_left_is_told(known):
    """A 48-D mixture under VP 0.2 to 16, whose prior costs 0.027 nats if it is not matched to the data."""
    sde = catalog.VP(0.2, 16.0)
    exact = mixture(sde, 48)
    points = sde.kernel.sample(exact.sample(40, seed=0, dtype=torch.float64), sde.cutoff, seed=1)
    truth = exact.log_prob(points, sde.cutoff)
    score = exact if known else (lambda state, time: exact(state, time))
    found = sde.flow_ode(score).log_prob(points, steps=90, grid="pilot", full=True)
    error = found.value - truth
    assert float(error.square().mean().sqrt()) < 4e-3
    assert float((error + found.prior_mismatch).abs().max()) < 2e-3 < 0.4 * float(error.abs().max())
    unmatched = sde.flow_ode(score, prior=sde.prior_for(0.0, 0.0)).log_prob(points, steps=90, grid="pilot", full=True)
    assert float((unmatched.value - truth).square().mean().sqrt()) > 0.01
    assert float((unmatched.value + unmatched.prior_mismatch - truth).abs().max()) < 3e-3


def test_prior_mismatch_is_exact_where_both_are_known():
    sde = SDE(-x / 2, 1, T=1.0)
    exact = mixture(sde, 2)
    points = sde.kernel.sample(exact.sample(20, seed=0, dtype=torch.float64), sde.T, seed=1)
    own, _ = budget.prior_mismatch(sde.flow_ode(exact).model, points, torch.float64)
    assert float(own.abs().max()) < 1e-5  # the prior of the exact score is its own law
    exact.marginal_law = lambda t: None  # as of a network: the prior is that of the data's moments
    model = sde.flow_ode(exact).model
    truth = exact.log_prob(points, sde.T) - model.prior_for(points).log_prob(points)
    found, _ = budget.prior_mismatch(model, points, torch.float64)
    assert float(truth.abs().max()) > 0.01
    difference = found - truth  # the same for all points: the error of the constant, a mean of 64 draws
    assert float(difference.std()) < 1e-5 and abs(float(difference.mean())) < 0.3 * float(truth.std())
    wrong = sde.flow_ode(lambda state, time: 1.1 * exact(state, time), prior=model.prior_for(points)).model
    assert float((budget.prior_mismatch(wrong, points, torch.float64)[0] - truth).abs().mean()) > 0.02


def test_general_equations_know_their_budget():
    """The law of Boltzmann stays as it is: no truncation, no mismatch."""
    sde = SDE(x - x**3, 1, T=1.0, cutoff=0.01)
    found = sde.flow_ode(lambda state, time: 2 * (state - state**3), prior=stationary_law(sde)).log_prob(
        torch.tensor([[0.0], [0.7], [-1.5]], dtype=torch.float64), full=True
    )
    torch.testing.assert_close(found.value, stationary_law(sde).log_prob(torch.tensor([[0.0], [0.7], [-1.5]])))
    assert float(found.error.max()) < 0.02 and float(found.truncation.abs().max()) < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_mistakes_in_the_budget_are_found(monkeypatch, seed):
    """Two bars hold what is left, on any seed; a first order that is wrong is outside of them in most samples."""
    sde = catalog.VP(cutoff=1e-4)
    exact = mixture(sde, 6)
    data = exact.sample(30, seed=seed, dtype=torch.float64)
    flow, truth = sde.flow_ode(exact), exact.log_prob(data)
    found = flow.log_prob(data, steps=200, grid="pilot", at="data", full=True)
    assert covered(found, truth, found.error) >= 0.9  # 27 of 30, where 95 % and more are meant
    change = budget._change
    for planted in (lambda *given, **by: (-change(*given, **by)[0], *change(*given, **by)[1:]),
                    lambda *given, **by: (2 * change(*given, **by)[0], *change(*given, **by)[1:])):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(budget, "_change", planted)
            wrong = flow.log_prob(data, steps=200, grid="pilot", at="data", full=True)
            assert covered(wrong, truth, found.error) < 0.5


def test_the_learned_density_of_a_plane_integrates_to_one():
    """Of any score, right or wrong: the flow carries all of the prior's mass, and no other."""
    sde = catalog.VP()
    exact = ring(sde, std=0.3)

    def bent(state, time):
        return exact(state, time) + 0.05 * torch.sin(2 * state)

    flow = sde.flow_ode(bent, prior=sde.prior_for(*exact.data_moments()))
    side = torch.linspace(-3.6, 3.6, 73, dtype=torch.float64)
    found = flow.log_prob(torch.cartesian_prod(side, side), steps=60, grid="pilot")
    assert abs(float(found.exp().sum() * (side[1] - side[0]) ** 2) - 1) < 2e-5


def test_a_budget_prints_its_first_values_shape_and_unit():
    parts = [torch.arange(250.0, dtype=torch.float64), *torch.zeros(3, 250)]
    shown = repr(LogProb(*parts, nfe=40))
    assert "shape=(250,), unit='nats', nfe=40" in shown and "value          [0, 1, 2, 3, 4, ...]" in shown
    assert len(shown.splitlines()) == 8 and max(map(len, shown.splitlines())) < 100
    assert "value          [7]\n" in repr(LogProb(*torch.tensor([[7.0], [0.0], [0.0]])))
