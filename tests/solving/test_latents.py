"""Latents: ways through them, their density, and what is lost on the way there and back; parts of large sets."""

import math
import warnings

import pytest
import torch
from problems import correlated, ring

import sdeflow
from sdeflow import SDE, catalog, x
from sdeflow.errors import PriorMismatchWarning
from sdeflow.scores import GaussianMixture
from sdeflow.solving.latents import spherical


def pair(exact, n=4):
    data = exact.sample(2 * n, seed=0, dtype=torch.float64)
    return data[:n], data[n:]


def test_the_ends_come_back_and_the_way_stays_on_the_sphere():
    sde = catalog.VP()
    exact = GaussianMixture(sde, torch.randn(5, 48, generator=torch.Generator().manual_seed(0)), torch.full((5,), 0.05))
    flow, (a, b) = sde.flow_ode(exact), pair(exact)
    path = flow.interpolate(a, b, points=7, steps=80)
    assert path.shape == (7, 4, 48) and path.dtype == torch.float64
    assert float((path[0] - a).abs().max()) < 1e-3 and float((path[-1] - b).abs().max()) < 1e-3
    norms = flow.prior.whitened(flow.encode(path.flatten(0, 1), steps=80)).norm(dim=1).reshape(7, 4)
    low, high = torch.minimum(norms[0], norms[-1]), torch.maximum(norms[0], norms[-1])
    assert bool((norms > 0.97 * low).all() and (norms < 1.03 * high).all())
    straight = flow.prior.whitened(0.5 * (flow.encode(a, steps=80) + flow.encode(b, steps=80))).norm(dim=1)
    assert bool((straight < 0.85 * low).all())


def test_the_formula_of_the_sphere():
    prior = sdeflow.Gaussian(torch.tensor([1.0, -1.0]), 2.0)
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    two = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    path = torch.stack([prior.whitened(z) for z in spherical(prior, prior.coloured(one), prior.coloured(two), 3)])
    torch.testing.assert_close(path[0], one)
    torch.testing.assert_close(path[2], two)
    half = math.sqrt(0.5)
    middle = torch.tensor([[half, half], [0.0, 0.0], [2.5, 0.0]], dtype=torch.float64)  # a line where Ω is 0 or π
    torch.testing.assert_close(path[1], middle, rtol=0, atol=1e-12)


def test_latents_of_a_coupled_state_and_with_labels():
    sde = catalog.CriticallyDampedLangevin()
    exact = GaussianMixture(sde, torch.tensor([[-0.6, 0.0], [0.6, 0.4]]), torch.tensor([0.3, 0.2]))
    a, b = (sde.lift(part[:, 0], seed=1) for part in pair(exact, 3))
    path = sde.flow_ode(exact).interpolate(a, b, points=3, steps=200)
    assert path.shape == (3, 3, 2, 2) and float((path[0] - a).abs().max()) < 0.02

    class Net(torch.nn.Module):
        def forward(self, state, time, y):
            return 0.1 * torch.sin(state + y[:, None])

    vp = catalog.VP()
    score = sdeflow.Score(Net(), vp, data_mean=0.0, data_std=1.0)
    a, b, y = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 1, 2])
    whole = vp.flow_ode(score.given(y)).interpolate(a, b, points=4, steps=12)
    alone = vp.flow_ode(score.given(y[1:2])).interpolate(a[1:2], b[1:2], points=4, steps=12)
    torch.testing.assert_close(whole[:, 1:2], alone)


def test_log_prob_of_latents_is_the_priors():
    sde = catalog.VP()
    exact = correlated(sde)
    flow = sde.flow_ode(exact)
    z = flow.encode(exact.sample(5, seed=0, dtype=torch.float64))
    torch.testing.assert_close(flow.latent_log_prob(z), flow.model.prior_for(z).log_prob(z))


def test_the_divergence_of_gaussians_is_torchs():
    generator = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    std, wide = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.5
    found = sdeflow.Gaussian(mean, std).kl_per_dimension(sdeflow.Gaussian(other, wide))
    laws = (torch.distributions.Normal(mean, std), torch.distributions.Normal(other, wide))
    assert found == pytest.approx(float(torch.distributions.kl_divergence(*laws).mean()), rel=1e-12)


@pytest.mark.parametrize("event", [(), (1,), (3,), (2, 3)], ids=str)
def test_the_divergence_of_coupled_gaussians_is_torchs(event):
    """Of data of this event, and of a prior whose moments are one for all its sides."""
    sde = catalog.CriticallyDampedLangevin()
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.rand(2, *event, generator=generator, dtype=torch.float64) for _ in range(2))
    near, far = sde.kernel.marginal(mean, std, 0.5), sde.kernel.marginal(-0.4, 1.1, 0.5)
    laws = (
        torch.distributions.MultivariateNormal(
            law.mean.reshape(2, *law.mean.shape[1:], *(1,) * (len(event) + 1 - law.mean.ndim)).movedim(0, -1),
            scale_tril=law.root.values,
        )
        for law in (near, far)
    )
    expected = float(torch.distributions.kl_divergence(*laws).mean()) / 2
    assert near.kl_per_dimension(far) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("event", [(1,), (3,), (4,)], ids=str)
def test_a_prior_far_from_the_data_of_a_coupled_state_is_told(event):
    sde = catalog.CriticallyDampedLangevin(T=0.1)
    exact = GaussianMixture(sde, torch.zeros(1, *event), torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sde.reverse(exact, prior=sde.prior_for(0.0, 1.0))
    with pytest.warns(PriorMismatchWarning, match="per dimension"):
        sde.reverse(exact, prior=sde.prior_for(5.0, 1.0))


def test_the_round_trip_is_measured():
    sde = catalog.VP()
    exact = ring(sde)
    flow, data = sde.flow_ode(exact), exact.sample(9, seed=0, dtype=torch.float64)
    coarse, fine = (flow.round_trip_error(data, steps=n) for n in (12, 80))
    assert fine.shape == (9,) and float(fine.max()) < 1e-3 < float(coarse.mean())
    by_hand = (flow.decode(flow.encode(data, steps=12), steps=12) - data).square().mean(1).sqrt()
    torch.testing.assert_close(coarse, by_hand)
    assert float(flow.round_trip_error(data, rtol=1e-8, atol=1e-8).max()) < 1e-5


def test_latents_that_make_no_sense_are_errors():
    sde = catalog.VP()
    flow = sde.flow_ode(ring(sde))
    good = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="points"):
        flow.interpolate(good, good, points=1)
    with pytest.raises(sdeflow.errors.DataError, match="one shape"):
        flow.interpolate(good, good[:1])
    general = SDE(x - x**3, 1, T=12.0).flow_ode(lambda state, time: 2 * (state - state**3))
    with pytest.raises(ValueError, match="Gaussian prior"):
        general.interpolate(good[:, :1], good[:, :1] + 0.1, rtol=1e-2, atol=1e-2)


# -------------------------------------------------------------------- parts of large sets


@pytest.mark.parametrize(
    "options",
    [{"steps": 24}, {"steps": 24, "trace": "hadamard", "probes": 2}, {"steps": 24, "trace": "hutchinson", "probes": 3},
     {"steps": 24, "trace": "hutch++", "probes": 6}, {"atol": 0.05, "trace": "hadamard", "probes": 2},
     {"steps": 24, "probes": "auto", "warn_above": 0.3}, {"solver": "heun2", "steps": 12, "probes": 3},
     {"steps": 24, "at": "data", "full": True, "trace": "hadamard", "probes": 2}],
    ids=str,
)  # fmt: skip
def test_chunks_and_shards_change_nothing(options):
    """A sample's number is the same alone, in a batch, in chunks, and as a part of a set by ``first_row``."""
    sde = catalog.VP()
    exact = GaussianMixture(sde, torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.2))
    flow, data = sde.flow_ode(exact), exact.sample(11, seed=0, dtype=torch.float64)
    options = {"warn_above": 9.0, **options, "seed": 5}

    def values(part, **more):
        found = flow.log_prob(part, **options, **more)
        return found if isinstance(found, torch.Tensor) else torch.stack([found.value, found.stderr, found.truncation])

    whole = values(data)
    torch.testing.assert_close(values(data, chunk=4), whole, rtol=1e-9, atol=1e-9)
    shards = [values(data[:3]), values(data[3:8], first_row=3), values(data[8:], first_row=8)]
    torch.testing.assert_close(torch.cat(shards, -1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values(data[6:7], first_row=6), whole[..., 6:7], rtol=1e-9, atol=1e-9)


def test_shards_of_bits_and_of_auxiliary_components():
    sde = catalog.CriticallyDampedLangevin()
    exact = GaussianMixture(sde, torch.tensor([[-0.6, 0.0], [0.6, 0.4]]), torch.tensor([0.3, 0.2]))
    flow, images = sde.flow_ode(exact), torch.tensor([[0, 3], [2, 1], [1, 1], [3, 0], [2, 2]])
    options = {"levels": 4, "low": -1.0, "high": 1.0, "steps": 30, "seed": 2, "samples": 3, "draws": 2}
    whole = flow.bits_per_dim(images, **options)
    parts = [flow.bits_per_dim(images[:2], **options), flow.bits_per_dim(images[2:], first_row=2, **options)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.bits_per_dim(images, chunk=4, **options), whole, rtol=1e-9, atol=1e-9)
