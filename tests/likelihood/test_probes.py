"""Probes that are handed over: against log p by hand for a linear score, in every way of integrating it."""

import math

import pytest
import torch

import sdeflow
from sdeflow import catalog
from sdeflow.numerics.traces import Given, widening

D = 3
M = torch.tensor([[0.8, 0.5, -0.2], [0.1, 1.1, 0.3], [-0.4, 0.2, 0.9]], dtype=torch.float64)
WAYS = {
    "default": {}, "steps": {"steps": 150}, "tolerance": {"atol": 1e-7}, "dopri5": {"rtol": 1e-9, "atol": 1e-9},
    "rk4": {"solver": "rk4", "steps": 30},
}  # fmt: skip


def setting(shape=(4, D)):
    sde = catalog.VP(0.1, 4.0)
    flow = sde.flow_ode(
        lambda x, t: (x.flatten(1) @ M.mT.to(x) * -1.0).reshape(x.shape), prior=sdeflow.Gaussian(0.0, 1.0)
    )
    x = torch.linspace(-1.5, 1.5, math.prod(shape), dtype=torch.float64).reshape(shape)
    B = sum(c * (1.0**n - sde.cutoff**n) for n, c in ((1, 0.1), (2, 1.95)))  # ∫ beta from the cutoff to 1
    return flow, x, B


def by_hand(x, B, vectors):
    """log π(x_T) + ∫ div f dt + ½ B vᵀ M v, (m, batch), for s = -M x: dx/dt = ½ beta (M - 1) x."""
    x_T = x.flatten(1) @ torch.matrix_exp(0.5 * B * (M - torch.eye(D, dtype=torch.float64))).mT
    prior = -0.5 * x_T.square().sum(1) - 0.5 * D * math.log(2 * math.pi)
    v = vectors.flatten(-1) if vectors.ndim == 2 else vectors.reshape(len(vectors), -1, D)
    v = v[:, None] if v.ndim == 2 else v
    return prior - 0.5 * B * D + 0.5 * B * torch.einsum("mbi,ij,mbj->mb", v, M, v)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("each", [False, True], ids=["for all", "for each sample"])
def test_log_prob_with_probes_is_what_one_finds_by_hand(way, each):
    flow, x, B = setting()
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(5, *((len(x),) if each else ()), D, generator=generator, dtype=torch.float64)
    expected = by_hand(x, B, vectors)
    found = flow.log_prob(x, trace=vectors, full=True, **WAYS[way])
    torch.testing.assert_close(found.value, expected.mean(0), rtol=0, atol=2e-5)
    spread = expected.expand(5, len(x)).std(0) / math.sqrt(5) * widening(torch.tensor(4.0))
    torch.testing.assert_close(found.stderr, spread, rtol=1e-4, atol=1e-6)
    same = flow.log_prob(x, probes=vectors, chunk=3, full=True, **WAYS[way])
    torch.testing.assert_close(same.value, found.value, rtol=0, atol=1e-5)


def test_unit_vectors_give_the_exact_trace_and_one_probe_no_error():
    flow, x, _ = setting()
    unit = math.sqrt(D) * torch.eye(D, dtype=torch.float64)  # the mean of vᵀ J v over them is tr J
    exact = flow.log_prob(x, steps=60)
    torch.testing.assert_close(flow.log_prob(x, trace=unit, steps=60, warn_above=10.0), exact, rtol=0, atol=1e-10)
    assert bool(flow.log_prob(x, trace=unit[:1], steps=60, full=True).stderr.isnan().all())


def test_probes_of_a_basis_are_in_the_states_own_coordinates():
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    plain, x, B = setting()
    beta = sdeflow.SDE("-(0.1 + 3.9*t)*x/2", "sqrt(0.1 + 3.9*t)", basis=sdeflow.basis.Orthogonal(turn))
    flow = beta.flow_ode(
        plain.model.score.function if hasattr(plain.model.score, "function") else (lambda x, t: -(x @ M.mT)),
        prior=sdeflow.Gaussian(0.0, 1.0),
    )
    vectors = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.2, -1.0]], dtype=torch.float64)
    for way in ("steps", "dopri5"):
        found = flow.log_prob(x, trace=vectors, warn_above=100.0, **WAYS[way])
        torch.testing.assert_close(found, by_hand(x, B, vectors).mean(0), rtol=0, atol=2e-5)


def test_a_gradient_goes_through_given_probes():
    flow, x, B = setting()
    vectors = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    (expected,) = torch.autograd.grad(by_hand(x.requires_grad_(True), B, vectors).sum(), x)
    for gradient in ("adjoint", "backprop"):
        value = flow.log_prob(x, trace=vectors, steps=100, gradient=gradient, full=True).value
        (found,) = torch.autograd.grad(value.sum(), x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_probes_that_do_not_fit_are_refused():
    flow, x, _ = setting()
    for wrong, message in (
        (torch.ones(2, D + 1, dtype=torch.float64), r"\(m, 3\)"),
        (torch.ones(2, 5, D, dtype=torch.float64), r"\(m, 4, 3\)"),
        (torch.ones(2, D, dtype=torch.long), "floating"),
        (torch.full((2, D), math.nan), "finite"),
        (torch.ones(0, D), "m >= 1"),
    ):
        with pytest.raises(sdeflow.DataError, match=message):
            flow.log_prob(x, trace=wrong)
    with pytest.raises(ValueError, match="alone"):
        flow.log_prob(x, trace="hutchinson", probes=torch.ones(2, D))
    with pytest.raises(ValueError, match="own number"):
        flow.log_prob(x, trace=Given(torch.ones(2, D)), probes=4)
