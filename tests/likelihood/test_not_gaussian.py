"""log p under SDEs without a Gaussian kernel, on log-normal data of a geometric Brownian motion, whose p_t is known."""

import math

import pytest
import torch

import sdeflow
from sdeflow import SDE, x

GBM = SDE(x / 10, 3 * x / 10)
POINTS = torch.tensor([[0.3], [0.6], [0.9], [1.0], [1.5], [3.0]], dtype=torch.float64)


class LogNormal:
    """The law at t of data with log x_0 ~ N(0, 0.04): log x_t ~ N(0.055 t, 0.04 + 0.09 t)."""

    def __init__(self, t=1.0):
        self.t = t

    def sample(self, shape, seed=None, dtype=None, device=None):
        normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (0.055 * self.t + math.sqrt(0.04 + 0.09 * self.t) * normal).exp().to(dtype)

    def log_prob(self, x):
        mean, var = 0.055 * self.t, 0.04 + 0.09 * self.t
        return (-0.5 * (x.log() - mean) ** 2 / var - 0.5 * math.log(2 * math.pi * var) - x.log()).sum(1)


def score(x, t):
    t = t[:, None] if isinstance(t, torch.Tensor) and t.ndim else t
    return -(1 + (x.log() - 0.055 * t) / (0.04 + 0.09 * t)) / x


FLOW, AT_CUTOFF = GBM.flow_ode(score, prior=LogNormal()), LogNormal(GBM.cutoff)


@pytest.mark.parametrize("atol", [0.1, 1e-2, 1e-3, 1e-5])
def test_atol_alone_is_the_error_of_log_p(atol):
    found, truth = FLOW.log_prob(POINTS, atol=atol, full=True), AT_CUTOFF.log_prob(POINTS)
    assert bool(((found.value - truth).abs() <= atol).all())
    assert bool((found.solver_error <= atol).all()) and bool(
        ((found.value - truth).abs() <= 2 * found.solver_error).all()
    )
    torch.testing.assert_close(FLOW.log_prob(POINTS, atol=atol), found.value)


def test_atol_alone_with_a_gradient_and_with_probes():
    y = POINTS.clone().requires_grad_(True)
    value = FLOW.log_prob(y, atol=1e-4)
    (gradient,) = torch.autograd.grad(value.sum(), y)
    torch.testing.assert_close(gradient, score(POINTS, GBM.cutoff), rtol=1e-3, atol=1e-3)
    probed = FLOW.log_prob(POINTS, atol=1e-4, probes="auto", seed=0)  # one dimension: every sign gives the trace
    torch.testing.assert_close(probed, value.detach(), rtol=0, atol=2e-4)


def test_an_atol_out_of_reach_is_told():
    rough = GBM.flow_ode(lambda x, t: score(x.float(), t).to(x.dtype), prior=LogNormal())
    with pytest.warns(sdeflow.errors.ToleranceWarning, match=r"no closer than"):
        found = rough.log_prob(POINTS[2:4].float(), atol=2e-7, full=True)
    assert float(found.solver_error.max()) > 2e-7
    with pytest.raises(sdeflow.errors.MaxStepsError):
        FLOW.log_prob(POINTS, atol=1e-6, max_calls=40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": "hadamard", "steps": 20}, "needs a Gaussian kernel"),
        ({"trace": "hutch++", "atol": 0.1}, "needs a Gaussian kernel"),
        ({"grid": "pilot", "steps": 20}, 'grid="pilot" needs a Gaussian kernel'),
        ({"gradient": "adjoint"}, "needs a Gaussian kernel"),
        ({"grid": "angel", "steps": 20}, r'grid must be "t" \(all that this SDE has\)'),
    ],
)
def test_a_refusal_names_what_this_sde_has(options, message):
    with pytest.raises(ValueError, match=message):
        FLOW.log_prob(POINTS, **options)


def test_the_step_from_the_cutoff_to_the_data_is_told_and_taken():
    """To first order where it is told, to second where it is taken.

    Ten times the cutoff leave 100 and 1000 times as much.
    ."""
    left = []
    for cutoff in (0.001, 0.01):
        flow, truth = GBM.with_cutoff(cutoff).flow_ode(score, prior=LogNormal()), LogNormal(0.0).log_prob(POINTS)
        change = truth - LogNormal(cutoff).log_prob(POINTS)
        told = flow.log_prob(POINTS, atol=1e-6, full=True).truncation
        taken = flow.log_prob(POINTS, atol=1e-6, full=True, at="data")
        rest = (taken.value - truth).abs()
        assert bool((rest <= 2 * taken.truncation + 1e-6).all())
        left.append((float((told - change).abs().max()), float(rest.max())))
        assert left[-1][0] < 0.03 * float(change.abs().max())
    assert 80 < left[1][0] / left[0][0] < 120 and 700 < left[1][1] / left[0][1] < 1200


def test_an_exact_prior_has_a_small_bar():
    found = FLOW.log_prob(POINTS, atol=1e-6, full=True)
    assert float(found.prior_mismatch.abs().max()) < 5e-3 and float(found.prior_error.max()) < 5e-3
    assert bool(found.error.isfinite().all())
    wrong = GBM.flow_ode(score, prior=LogNormal(0.5)).log_prob(POINTS, atol=1e-6, full=True)
    off = LogNormal(GBM.cutoff).log_prob(POINTS) - wrong.value  # log p_T - log π at x_T
    assert bool(((wrong.prior_mismatch - off).abs() <= 2 * wrong.prior_error).all()) and float(off.abs().max()) > 0.3
