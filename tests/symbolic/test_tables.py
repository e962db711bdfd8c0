"""Tables of alpha, as discrete models have them, and cutoffs that the user gives."""

import json

import numpy as np
import pytest
import sympy as sp
import torch
from problems import cpu_seconds

import sdeflow
from sdeflow import SDE, scores, t, x
from sdeflow.errors import DeclarationError, ScheduleError

CATALOGUE = ("VP", "SubVP", "VE", "CosineVP", "OU", "EDM", "FlowMatching", "CriticallyDampedLangevin")
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # DDPM's linear table
TIMES = np.arange(1, 1001) / 1000


def moments(sde, times):
    alpha, sigma, _ = sde.kernel.coefficients(torch.as_tensor(times))
    return alpha.numpy(), sigma.numpy()


@pytest.fixture(scope="module")
def ddpm():
    before = cpu_seconds()
    sde = SDE.from_kernel(np.sqrt(ALPHA_BAR))
    assert cpu_seconds() - before < 2.5  # 1,000 knots
    return sde


def test_the_table_of_ddpm_is_its_kernel_at_its_times(ddpm):
    assert (ddpm.T, ddpm.cutoff, ddpm.kernel.form) == (1.0, 1e-3, "closed")
    alpha, sigma = moments(ddpm, TIMES)
    assert np.abs(alpha**2 / ALPHA_BAR - 1).max() < 1e-12
    assert np.abs(sigma**2 / (1 - ALPHA_BAR) - 1).max() < 2e-12
    # Before the first entry -log alpha² is linear, from 0.
    early = np.array([0.1, 0.25, 0.5, 0.75, 0.9]) * 1e-3
    alpha, sigma = moments(ddpm, early)
    assert np.allclose(-2 * np.log(alpha), -np.log(ALPHA_BAR[0]) * early / 1e-3, rtol=1e-11, atol=0)
    assert np.allclose(alpha**2 + sigma**2, 1, rtol=1e-14, atol=0)
    a, _, q = ddpm.kernel.sde_coefficients(torch.as_tensor(TIMES[1:] - 2.5e-4))
    assert float((a + q / 2).abs().max()) < 1e-12


def test_the_forms_of_a_table_are_one(ddpm):
    pairs = np.stack([TIMES, np.sqrt(ALPHA_BAR)])
    for table in (pairs, pairs.T, torch.as_tensor(np.sqrt(ALPHA_BAR)), np.sqrt(ALPHA_BAR).tolist()):
        assert SDE.from_kernel(table).declaration == ddpm.declaration
    longer = SDE.from_kernel(np.sqrt(ALPHA_BAR), T=1000.0)
    assert (longer.T, longer.cutoff) == (1000.0, 1.0)
    assert np.allclose(moments(longer, 1000 * TIMES[::50])[0], np.sqrt(ALPHA_BAR[::50]), rtol=1e-12, atol=0)


def test_a_schedule_that_starts_below_one_is_continued_too():
    """alpha(0) = 0.99995 at t = 0 itself: its continuation takes a thousandth of the first step, up to the cutoff."""
    times = np.linspace(0, 1, 101)
    alpha = np.sqrt(ALPHA_BAR[9::10])[: len(times) - 1]
    alpha = np.concatenate([[0.99995], alpha])
    a = sdeflow.schedule((times, alpha), "a")
    for sde, s in (
        (SDE.from_kernel(a(t)), lambda v: np.sqrt(1 - v**2)),
        (SDE.from_kernel(a(t), 2 * sp.sqrt(1 - a(t) ** 2)), lambda v: 2 * np.sqrt(1 - v**2)),
        (SDE.from_kernel((times, alpha)), lambda v: np.sqrt(1 - v**2)),
    ):
        assert sde.cutoff == pytest.approx(1e-5)
        found, sigma = moments(sde, times[1:])
        assert np.abs(found / alpha[1:] - 1).max() < 1e-11
        assert np.abs(sigma / s(alpha[1:]) - 1).max() < 1e-10
        assert moments(sde, np.zeros(1))[0] == 1.0
        assert moments(sde, np.array([1e-5]))[0] == pytest.approx(0.99995, abs=1e-6)
        assert SDE.from_dict(json.loads(json.dumps(sde.to_dict()))).declaration == sde.declaration


def test_tables_that_are_none_are_refused():
    for table, error in (
        ([0.9, 0.95, 0.2], ScheduleError), ([1.2, 0.5], ScheduleError), ([0.9, 0.5, 0.0], ScheduleError),
        (([0.1, 0.2], [0.9]), DeclarationError), (([-0.1, 0.2], [0.9, 0.8]), DeclarationError),
    ):  # fmt: skip
        with pytest.raises(error):
            SDE.from_kernel(table)
    with pytest.raises(ScheduleError, match=r"entry 2, 0\.9, is not below its entry 1, 0\.9 "):
        SDE.from_kernel([0.99, 0.9, 0.9, 0.5, 0.1])
    with pytest.raises(ScheduleError, match="leave out the last entry and pass the times"):
        SDE.from_kernel([0.9, 0.5, 0.0])
    with pytest.raises(DeclarationError, match="sigma = sqrt"):
        SDE.from_kernel([0.9, 0.5], t)
    with pytest.raises(DeclarationError, match="alpha\\(0\\) must be 1"):
        SDE.from_kernel(sp.Rational(99, 100) * sp.cos(t), t)  # a formula that starts below 1 is a mistake


def test_a_stored_table_with_a_cutoff_comes_back(ddpm):
    for sde in (ddpm, ddpm.with_cutoff(0.01), ddpm.with_cutoff(None)):
        again = SDE.from_dict(json.loads(json.dumps(sde.to_dict())))
        assert again.declaration == sde.declaration
        assert again.cutoff == pytest.approx(sde.cutoff, rel=1e-9)
    k = sp.Symbol("k", positive=True)
    slow = SDE.from_kernel(sp.exp(-k * t), params={k: 2.0}, cutoff=0.01).with_params(k=3.0)
    assert slow.cutoff == 0.01
    assert moments(slow, np.array([0.5]))[0] == pytest.approx(np.exp(-1.5), rel=1e-13)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_of_the_catalogue_takes_a_cutoff(name):
    sde = getattr(sdeflow.catalog, name)(cutoff=0.02)
    assert sde.cutoff == sde.flow_ode(lambda x, t: -x).model.cutoff == 0.02
    plain = getattr(sdeflow.catalog, name)()
    other = plain.with_cutoff(0.02)
    assert other.declaration == sde.declaration
    assert (other.cutoff, plain.with_cutoff(None).cutoff) == (0.02, plain.cutoff)
    assert other.kernel.numbers.table is plain.kernel.numbers.table


def test_with_cutoff_of_sdes_with_other_kernels():
    for sde in (SDE(-x, x), SDE(1 - x, sp.sqrt(x)), SDE(x - x**3, 1)):
        assert sde.with_cutoff(0.03).cutoff == 0.03
        assert sde.with_cutoff(0.03).kind == sde.kind
    for wrong in (-0.1, 1.0, "1"):
        with pytest.raises(DeclarationError):
            sdeflow.catalog.VP().with_cutoff(wrong)
    with pytest.raises(ScheduleError, match="cannot be told from 0"):
        sdeflow.catalog.VP().with_cutoff(0.0)


def test_solves_end_at_the_cutoff_and_a_score_serves_every_later_one():
    sde = sdeflow.catalog.SubVP(cutoff=1e-5)  # as published checkpoints have it
    mean = torch.tensor([[1.0], [-1.0]])
    score = scores.GaussianMixture(sde, mean, torch.tensor([0.1, 0.1]))
    for cutoff in (1e-5, 0.05):
        seen = []

        def watched(x, time, seen=seen):
            seen.append(time.min())
            return score(x, time)

        flow = sde.with_cutoff(cutoff).flow_ode(watched, prior=sde.prior_for(0.0, 1.0))
        for options in (
            {"steps": 8}, {"steps": 8, "solver": "euler"}, {"steps": 8, "grid": "log_snr"},
            {"steps": 8, "grid": "karras"}, {"steps": 8, "grid": "t", "solver": "heun"},
        ):  # fmt: skip
            seen.clear()
            flow.sample((2, 1), seed=0, **options)
            assert min(seen) >= cutoff * (1 - 1e-6)
        z = torch.tensor([[0.3]], dtype=torch.float64)
        back = flow.encode(flow.decode(z, rtol=1e-8, atol=1e-8), rtol=1e-8, atol=1e-8)
        assert float((back - z).abs()) < 1e-5
    late = sde.with_cutoff(0.05).flow_ode(score)
    assert float(late.log_prob(mean[:1].double(), steps=40)) == pytest.approx(
        float(score.log_prob(mean[:1].double(), 0.05)), abs=5e-3
    )
    with pytest.raises(ValueError, match="cutoff asked for"):
        sdeflow.catalog.SubVP(cutoff=1e-6).flow_ode(score)


def test_a_table_of_values_that_starts_with_the_data_begins_at_time_zero():
    alphas = np.sqrt(ALPHA_BAR[::100])
    sde = SDE.from_kernel(np.concatenate([[1.0], alphas]))
    alpha, _ = moments(sde, np.arange(1, len(alphas) + 1) / len(alphas))
    assert np.abs(alpha - alphas).max() < 1e-10
    assert sde.verify()
    with pytest.raises(ScheduleError, match="only t = 0 may have it"):
        SDE.from_kernel(([0.1, 0.5, 1.0], [1.0, 0.5, 0.1]))
