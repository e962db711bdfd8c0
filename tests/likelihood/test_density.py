"""log p by exponential steps: orders, tolerances in nats, error bars that cover, and independence of the batch."""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from problems import correlated, gaussian, ring

import sdeflow
from sdeflow import SDE, catalog, t, x
from sdeflow.likelihood import exponential
from sdeflow.likelihood.nodes import quadrature_weights
from sdeflow.numerics import traces
from sdeflow.scores import GaussianMixture
from sdeflow.solvers import Exponential


def at_cutoff(sde, exact, n, seed=0):
    data = exact.sample(n, seed=seed, dtype=torch.float64)
    return sde.kernel.sample(data, sde.cutoff, seed=seed + 2)


def test_the_quadrature_is_exact_to_degree_four_and_of_order_five():
    nodes = np.array([2.0, 1.7, 1.1, 0.9, 0.2, -0.1, -1.0, -1.3])
    weights = quadrature_weights(nodes)
    for k in range(5):
        assert abs(weights @ nodes**k - (nodes[-1] ** (k + 1) - nodes[0] ** (k + 1)) / (k + 1)) < 1e-12
    errors = [
        abs(quadrature_weights(u) @ np.exp(u) - (math.e - 1)) for u in (np.linspace(0, 1, n) for n in (9, 17, 33))
    ]
    assert math.log2(errors[0] / errors[1]) > 4.5 and math.log2(errors[1] / errors[2]) > 4.5
    assert len(quadrature_weights(np.array([0.0, 1.0]))) == 2


@pytest.mark.parametrize("name", ["VP", "VE", "SubVP", "CosineVP", "EDM", "FlowMatching"])
def test_gaussian_data_are_exact_in_one_step(name):
    sde = getattr(catalog, name)()
    exact = gaussian(sde, std=0.7, d=5)
    exact.data_std = torch.tensor(0.7, dtype=torch.float64)
    points = at_cutoff(sde, exact, 6)
    value = sde.flow_ode(exact).log_prob(points, steps=2)
    torch.testing.assert_close(value, exact.log_prob(points, sde.cutoff), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", ["VP", "VE", "CosineVP", "CriticallyDampedLangevin"])
def test_the_error_of_log_p_is_held_and_its_bar_covers(name):
    """To ``atol`` in nats for each sample, against a solve that is twenty times finer; bars of 2 cover 95 %."""
    sde = getattr(catalog, name)()
    exact = ring(sde) if name != "CriticallyDampedLangevin" else _ring_of(sde)
    flow, points = sde.flow_ode(exact), at_cutoff(sde, exact, 60)
    truth = flow.log_prob(points, steps=500, grid="pilot")
    for atol in (0.1, 0.01):
        found = flow.log_prob(points, atol=atol, full=True)
        error = (found.value - truth).abs()
        assert float((error <= atol).double().mean()) >= 0.95
        assert float((error <= 2 * found.solver_error).double().mean()) >= 0.95
        assert bool((found.solver_error <= atol).all())


def _ring_of(sde):
    angle = torch.arange(8) * math.pi / 4
    return GaussianMixture(sde, torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.01))


def test_calls_of_the_design_on_the_ring():
    """PERFORMANCE.md, section 4: 0.01 nats in 28 calls and 0.001 in 40 on the pilot grid, against the exact density."""
    sde = catalog.VP()
    exact = ring(sde, std=0.1)
    flow, points = sde.flow_ode(exact), at_cutoff(sde, exact, 64)
    truth = exact.log_prob(points, sde.cutoff)
    for calls, bound in ((30, 1e-2), (42, 1e-3)):
        assert float((flow.log_prob(points, steps=calls, grid="pilot") - truth).square().mean().sqrt()) < bound


def test_steps_count_calls_and_a_wrong_score_is_found():
    sde, calls = catalog.VP(), []
    exact = correlated(sde)

    def score(state, time):
        calls.append(1)
        return 0.95 * exact(state, time)

    points = at_cutoff(sde, exact, 8)
    flow = sde.flow_ode(score, prior=sde.prior_for(*exact.data_moments()))
    off = flow.log_prob(points, steps=60) - exact.log_prob(points, sde.cutoff)
    assert len(calls) == 60
    assert float(off.abs().mean()) > 0.05


@pytest.mark.parametrize(
    "trace", ["hutchinson", "hadamard", "hutch++", traces.Hutchinson(8, fresh=True), traces.Exact()], ids=str
)
def test_every_trace_estimates_the_same_density(trace):
    """Within four of its own standard errors of the exact trace, on average over samples."""
    sde = catalog.VP()
    exact = correlated(sde)
    flow, points = sde.flow_ode(exact), at_cutoff(sde, exact, 40)
    truth = flow.log_prob(points, steps=60)
    probes = {} if isinstance(trace, traces.Trace) else {"probes": 8}
    found = flow.log_prob(points, steps=60, trace=trace, seed=0, full=True, **probes)
    if isinstance(trace, traces.Exact):
        torch.testing.assert_close(found.value, truth)
        return
    z = (found.value - truth) / found.stderr.clamp_min(1e-9)
    assert float(z.abs().median()) < 2.0 and float((z.abs() < 4).double().mean()) > 0.9
    spread = float(found.stderr.square().mean().sqrt()) / math.sqrt(40)
    assert abs(float((found.value - truth).mean())) < 4 * spread + 1e-9


@pytest.mark.parametrize(
    "options", [{"atol": 0.05}, {"steps": 40}, {"steps": 40, "trace": "hadamard", "probes": 4}], ids=str
)
def test_a_sample_alone_and_in_a_batch_agree(options):
    sde = catalog.VP()
    exact = correlated(sde)
    flow, points = sde.flow_ode(exact), at_cutoff(sde, exact, 9)
    whole = flow.log_prob(points, seed=0, warn_above=9, **options)
    torch.testing.assert_close(
        flow.log_prob(points[:4], seed=0, warn_above=9, **options), whole[:4], rtol=1e-9, atol=1e-9
    )


@pytest.mark.slow
def test_labels_follow_the_samples_that_are_solved_again():
    sde = catalog.VP()
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    kernel = sde.kernel

    class Net(torch.nn.Module):
        def forward(self, state, time, y):
            alpha, sigma, _ = (v[:, None] for v in kernel.coefficients(kernel.time_of(0.5 * time.double())))
            bend = 0.3 * torch.sin(3 * state)
            return (-(state - alpha * centres[y]) / (0.04 * alpha**2 + sigma**2) + bend).to(state.dtype)

    score = sdeflow.Score(Net(), sde, predicts="score", data_mean=0.0, data_std=0.7)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    points = centres[y] + 0.2 * torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = sde.flow_ode(score.given(y)).log_prob(points, atol=1e-4)
    alone = [sde.flow_ode(score.given(y[i : i + 1])).log_prob(points[i : i + 1], atol=1e-4) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=3e-4)


@pytest.mark.parametrize(
    "options",
    [{"atol": 0.0}, {"atol": math.nan}, {"atol": True}, {"steps": 0}, {"steps": 10, "trace": "wrong"},
     {"solver": Exponential(2)}, {"solver": Exponential(2), "steps": 5, "atol": 0.1},
     {"solver": Exponential(2, eta=1.0), "steps": 5}, {"steps": 9, "trace": traces.Exact(), "probes": 3},
     {"solver": "dopri5", "trace": "hadamard"}],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense_are_errors(options):
    sde = catalog.VP()
    with pytest.raises(ValueError):
        sde.flow_ode(ring(sde)).log_prob(torch.zeros(2, 2, dtype=torch.float64), **options)


def test_budgets_and_empty_batches():
    sde = catalog.VP()
    flow = sde.flow_ode(ring(sde, std=0.1))
    with pytest.raises(sdeflow.errors.MaxStepsError, match="budget of 60 calls") as caught:
        flow.log_prob(torch.full((2, 2), 0.3, dtype=torch.float64), atol=1e-9, max_calls=60)
    assert caught.value.bad_rows == [0, 1] and caught.value.partial.isnan().all()
    assert flow.log_prob(torch.zeros(0, 2), atol=0.1).shape == (0,)
    general = SDE(x - x**3, 1, T=1).flow_ode(lambda s, time: -s, prior=sdeflow.Gaussian(0.0, 1.0))
    assert general.log_prob(torch.zeros(2, 1), steps=8).shape == (2,)  # by torchdiffeq, as before


def test_bounds_are_of_the_reverse_sde():
    sde = catalog.VP()
    exact = gaussian(sde, std=0.5, d=2)
    data = exact.sample(50, seed=0, dtype=torch.float64)
    bound = sde.reverse(exact).elbo(data, seed=0)
    torch.testing.assert_close(bound.value, exact.log_prob(data), rtol=1e-6, atol=1e-6)
    assert not hasattr(sde.flow_ode(exact), "elbo")
    other = GaussianMixture(sde, torch.full((1, 2), 0.2), torch.tensor([0.3]))
    found = sde.reverse(other).kl_bound(data, exact, seed=0)
    truth = 2 * 0.5 * (0.25 / 0.3 - 1 - math.log(0.25 / 0.3)) + 0.5 * 2 * 0.04 / 0.3
    assert abs(float(found.value) - truth) < 5 * float(found.stderr) + 0.02 * truth


def test_bits_tighten_with_importance_weighted_draws():
    """The discrete probability itself is known: the mass of each bin, by a fine grid over u."""
    sde = catalog.VP()
    exact = GaussianMixture(sde, torch.tensor([[-0.4], [0.5]]), torch.tensor([0.02, 0.05]))
    flow, images = sde.flow_ode(exact), torch.tensor([[0], [1], [2], [3]])
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    truth = []
    for k in range(4):
        points = (-1.0 + 2.0 * (k + u) / 4)[:, None]
        truth.append(-math.log2(float(exact.log_prob(points, sde.cutoff).exp().mean()) * 0.5))
    options = {"levels": 4, "low": -1.0, "high": 1.0, "steps": 50, "grid": "pilot"}
    one = torch.stack([flow.bits_per_dim(images, seed=s, **options) for s in range(24)])
    many = flow.bits_per_dim(images, seed=0, draws=200, full=True, **options)
    truth = torch.tensor(truth, dtype=torch.float64)
    assert bool((one.mean(0) > truth - 4 * one.std(0) / math.sqrt(24)).all())
    assert bool(((many.value - truth).abs() < 4 * many.stderr + 2e-3).all())
    assert float((one.mean(0) - many.value).max()) > 0.05


def test_the_budget_of_bits_is_that_of_nats_in_bits_per_dimension():
    sde = catalog.VP()
    flow, images = sde.flow_ode(ring(sde)), torch.tensor([[0, 3], [2, 1], [1, 1]])
    options = {"steps": 8, "seed": 4, "full": True}
    bits = flow.bits_per_dim(images, levels=4, low=-1.0, high=1.0, **options)
    drawn = sdeflow.likelihood.dequantisation.Uniform().sample(
        images, levels=4, low=-1.0, high=1.0, seed=4, dtype=torch.float32
    )
    nats = flow.log_prob(drawn.x[0], **options)
    torch.testing.assert_close(bits.value, -(nats.value / 2 + math.log(0.5)) / math.log(2))
    for name in ("solver_error", "truncation", "prior_mismatch", "prior_error"):
        torch.testing.assert_close(2 * math.log(2) * getattr(bits, name), getattr(nats, name))


@pytest.mark.slow
def test_a_score_that_rounds_is_told_of_and_one_that_draws_is_refused():
    """Grids that stop coming closer: a warning with what was reached, and an error where that is far from atol."""
    sde = catalog.VP()
    exact = ring(sde)

    def rounded(state, time):
        s = exact(state, time)
        return s + ((8 * s).round() / 8 - s).detach()

    points, prior = at_cutoff(sde, exact, 4), sde.prior_for(*exact.data_moments())
    with pytest.warns(sdeflow.errors.ToleranceWarning, match="rounds"):
        found = sde.flow_ode(rounded, prior=prior).log_prob(points, atol=1e-4, full=True)
    assert 1e-4 < float(found.solver_error.max()) < 1e-2
    draw = torch.Generator().manual_seed(0)
    noisy = sde.flow_ode(
        lambda state, time: exact(state, time) * (1 + torch.rand(state.shape, generator=draw)), prior=prior
    )
    with pytest.raises(sdeflow.errors.MaxStepsError, match="randomness"):
        noisy.log_prob(points)


@pytest.mark.parametrize("name", ["VP", "VE", "CosineVP"])
def test_the_pilot_of_the_likelihood_is_its_own_and_closer_at_the_same_calls(name):
    sde = getattr(catalog, name)()
    exact = ring(sde, std=0.1)
    flow, points = sde.flow_ode(exact), at_cutoff(sde, exact, 1024, seed=1)
    truth = flow.log_prob(points, steps=200, grid="pilot")
    of_samples = flow.pilot((2,), Exponential(3), dtype=torch.float64)
    assert of_samples.calls == 32
    distances = torch.tensor([of_samples.clock(v)[0] for v in np.linspace(0, 1, 24)], dtype=torch.float64)
    # The 99th of a hundred, which ten points of a thousand tell; a mean square is that of the single worst one.
    in_nats, in_distances = (
        float((flow.log_prob(points, steps=24, grid=grid) - truth).abs().quantile(0.99))
        for grid in ("pilot", distances)
    )
    assert in_nats < 0.85 * in_distances and in_nats < 0.03, (in_nats, in_distances)


def test_a_solver_with_a_reference_along_the_data_measures_the_same_density():
    sde = catalog.VP()
    root = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    covariance = root @ torch.diag(torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)) @ root.mT
    exact = GaussianMixture(sde, torch.zeros(1, 4), covariance[None], full=True)
    flow, points = sde.flow_ode(exact), at_cutoff(sde, exact, 9)
    solver = Exponential.along(exact.sample(4000, seed=1, dtype=torch.float64), order=3)
    found = flow.log_prob(points, solver=solver, steps=120, grid="pilot")
    torch.testing.assert_close(found, exact.log_prob(points, sde.cutoff), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["VP", "VE"])
def test_two_grids_that_agree_by_chance_are_not_believed(name):
    """Of 400 samples of an easy mixture nearly all are within two bars, and within the default tolerance."""
    sde = getattr(catalog, name)()
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    exact = GaussianMixture(sde, means, torch.tensor([0.04, 0.01]), weights=torch.tensor([0.3, 0.7]))
    points = at_cutoff(sde, exact, 400)
    found = sde.flow_ode(exact).log_prob(points, full=True)
    error = (found.value - exact.log_prob(points, sde.cutoff)).abs()
    assert float((error <= 2 * found.error).double().mean()) >= 0.98
    assert float((error <= 1e-3).double().mean()) >= 0.99 and float(error.max()) < 3e-3


def test_two_equal_values_after_a_great_change_have_an_error(monkeypatch):
    """Values 0, ½, ½, ½, ... of finer and finer grids whose defects are halved: these promise no such agreement."""
    sde = catalog.VP()
    exact = ring(sde)
    points = at_cutoff(sde, exact, 1)
    right, seen = exponential._alone, []

    def scripted(*args):
        seen.append(0.5 if seen else 0.0)
        value, defect = torch.tensor([[seen[-1]], [0.5 ** len(seen)]], dtype=torch.float64)
        return right(*args)._replace(value=value, defect=defect)

    monkeypatch.setattr(exponential, "_alone", scripted)
    found = sde.flow_ode(exact).log_prob(points, atol=0.01, full=True)
    assert len(seen) >= 3 and float(found.solver_error) > 1e-3


def test_few_steps_have_an_error_too():
    sde = catalog.VP()
    exact = ring(sde)
    points = at_cutoff(sde, exact, 5)
    for steps in (1, 2, 3):
        found = sde.flow_ode(exact).log_prob(points, steps=steps, full=True)
        assert bool((found.solver_error > 0.01).all())


def test_what_an_error_has_found_of_the_others_is_kept():
    """A point that is far away takes more calls than there are; the others' values are in ``partial``."""
    sde = catalog.VP()
    exact = ring(sde)
    flow, points = sde.flow_ode(exact), at_cutoff(sde, exact, 4)
    with pytest.raises(sdeflow.errors.MaxStepsError) as caught:
        flow.log_prob(torch.cat([points, torch.tensor([[90.0, 90.0]], dtype=torch.float64)]), atol=1e-3, max_calls=700)
    assert caught.value.bad_rows == [4] and bool(caught.value.partial[4].isnan())
    torch.testing.assert_close(caught.value.partial[:4], flow.log_prob(points, atol=1e-3), rtol=0, atol=0)


def test_labels_make_a_prior_and_a_grid_of_their_own():
    """Nothing that is read off the score depends on which labels share a batch."""
    sde = catalog.VP(0.1, 5.0)
    centres = torch.tensor([-2.0, 0.5, 1.5], dtype=torch.float64)

    class Net(torch.nn.Module):
        def forward(self, state, time, y):
            alpha, sigma, _ = (v[:, None] for v in sde.kernel.coefficients(time.double()))
            return -(state - alpha * centres[y][:, None]) / (0.25 * alpha**2 + sigma**2)

    score = sdeflow.Score(Net(), sde, predicts="score", time="t")
    y = torch.tensor([2, 0, 1, 0, 2, 1])
    points = centres[y][:, None] + 0.5 * torch.randn(
        6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    truth = torch.distributions.Normal(centres[y][:, None], 0.5).log_prob(points).sum(1)
    found = sde.flow_ode(score.given(y)).log_prob(points, at="data", full=True)
    torch.testing.assert_close(found.value, truth, rtol=0, atol=2e-3)
    assert float(found.prior_mismatch.abs().max()) < 1e-3
    torch.testing.assert_close(
        sde.flow_ode(score.given(y)).log_prob(points, at="data", chunk=2), found.value, rtol=1e-9, atol=1e-9
    )


@pytest.mark.slow
def test_points_between_narrow_modes_are_right():
    """There the flow contracts faster than the steps of a grid can follow, and dopri5 takes over."""
    sde = catalog.VP()
    exact = GaussianMixture(sde, torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), torch.tensor([0.05, 0.2]))
    points = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [0.0, 3.0], [3.0, 0.1]], dtype=torch.float64)
    flow, truth = sde.flow_ode(exact), exact.log_prob(points, sde.cutoff)
    assert float((flow.log_prob(points, steps=100, grid="pilot") - truth).abs().max()) > 1.0
    found = flow.log_prob(points, full=True)
    assert float((found.value - truth).abs().max()) < 1e-3 and bool((found.solver_error <= 2e-3).all())
    points.requires_grad_(True)
    (gradient,) = torch.autograd.grad(flow.log_prob(points).sum(), points)
    torch.testing.assert_close(gradient, exact(points.detach(), sde.cutoff), rtol=2e-3, atol=2e-3)


def test_a_log_snr_that_stands_still_at_the_start_is_left_to_torchdiffeq():
    sde = SDE(-x, sp.sqrt(2 * t), P0=0.04, T=3.0)  # g(0) = 0
    exact = GaussianMixture(sde, torch.tensor([[-0.5], [0.5]]), torch.tensor([0.1, 0.1]))
    points = torch.tensor([[-0.4], [0.1]], dtype=torch.float64)
    found = sde.flow_ode(exact).log_prob(points)
    torch.testing.assert_close(found, exact.log_prob(points, 0.0), rtol=0, atol=2e-2)
