"""States without centre of mass: noise, priors, densities and samples on the subspace, against closed forms."""

import math

import pytest
import torch

import sdeflow
from sdeflow import DataError, catalog
from sdeflow.numerics.basis import CentreOfMassFree

double = torch.float64
N, S = 4, 0.6  # particles, and the standard deviation of Gaussian data on the subspace


def states(n=6, particles=N, seed=0):
    x = S * torch.randn(n, particles, 3, generator=torch.Generator().manual_seed(seed), dtype=double)
    return x - x.mean(1, keepdim=True)


def log_normal(x, variance):
    """arXiv:2203.17003, eq. 5: N(0, variance) on the subspace of mean 0, of (n - 1) · 3 dimensions."""
    d = (x.shape[1] - 1) * 3
    return -0.5 * x.flatten(1).square().sum(1) / variance - 0.5 * d * math.log(2 * math.pi * variance)


@pytest.mark.parametrize("particles", [2, 3, 17])
def test_coordinates_are_an_isometry_of_the_subspace(particles):
    space, x = CentreOfMassFree(particles), states(particles=particles)
    assert float((space.matrix @ space.matrix.mT - torch.eye(particles - 1, dtype=double)).abs().max()) < 1e-14
    assert float(space.matrix.sum(1).abs().max()) < 1e-14
    u = space.forward(x + 5.0)
    assert u.shape == (6, particles - 1, 3)
    torch.testing.assert_close(space.inverse(u), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(u.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-13, atol=0)


def test_white_noise_of_coordinates_is_projected_white_noise():
    """Covariance δ_ij - 1/n between particles, and a prior of n - 1 particles' dimensions."""
    space, n = CentreOfMassFree(N), 40_000
    x = space.inverse(sdeflow.Gaussian(0.0, 1.0).sample((n, N - 1, 3), seed=0, dtype=double))
    assert float(x.mean(1).abs().max()) < 1e-14
    found = torch.einsum("bic,bjc->ij", x, x) / (3 * n)
    expected = torch.eye(N, dtype=double) - 1.0 / N
    assert float((found - expected).abs().max()) < 4.5 * math.sqrt(2.0 / (3 * n))
    log_p = sdeflow.Gaussian(0.0, 1.0).log_prob(space.forward(x[:9]))
    torch.testing.assert_close(log_p, log_normal(x[:9], 1.0), rtol=1e-12, atol=0)


def gaussian_flow(sde, space):
    """A score of whole states: ∇ log N(0, alpha² S² + sigma²), and a part along the centre of mass that is left out."""

    def score(x, t):
        alpha, sigma = (m.to(x).reshape(-1, 1, 1) for m in sde.kernel.moments(torch.ones(len(x), 1, 1).to(x), t))
        return -x / (alpha**2 * S**2 + sigma**2) + 3.0

    return sde.flow_ode(space.wrap(score), prior=sde.prior_for(0.0, S))


def test_log_prob_is_the_density_on_the_subspace():
    sde, space, x = catalog.VP(), CentreOfMassFree(N), states()
    alpha, sigma = (float(m) for m in sde.kernel.moments(torch.ones(1, 1, dtype=double), torch.tensor([sde.cutoff])))
    found = gaussian_flow(sde, space).log_prob(space.forward(x))
    torch.testing.assert_close(found, log_normal(x, alpha**2 * S**2 + sigma**2), rtol=0, atol=2e-3)


def test_log_prob_does_not_know_rotations_and_permutations():
    space, x = CentreOfMassFree(N), states()
    sde = catalog.VP()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=double))[0]

    def score(x, t):  # pulls each pair together: equivariant
        gaps = x[:, :, None] - x[:, None]
        return -x - (gaps * torch.exp(-gaps.square().sum(-1, keepdim=True))).sum(2)

    flow = sde.flow_ode(space.wrap(score), prior=sdeflow.Gaussian(0.0, 1.0))
    of_x, turned, swapped = (
        flow.log_prob(space.forward(y), steps=30) for y in (x, x @ turn, x[:, torch.tensor([2, 0, 3, 1])])
    )
    torch.testing.assert_close(turned, of_x, rtol=0, atol=1e-9)
    torch.testing.assert_close(swapped, of_x, rtol=0, atol=1e-9)


def test_the_density_of_two_particles_on_a_line_integrates_to_one():
    sde, space = catalog.VP(), CentreOfMassFree(2)
    exact = sdeflow.scores.GaussianMixture(sde, torch.tensor([[[-1.0]], [[0.8]]], dtype=double), [0.1, 0.2])
    flow = sde.flow_ode(
        space.wrap(lambda x, t: space.inverse(exact(space.forward(x), t))), prior=exact_prior(sde, exact)
    )
    r = torch.linspace(-3.5, 3.5, 141, dtype=double)  # of the distance: x = (r, -r) / √2 has length |r|
    x = torch.stack([r, -r], dim=1)[..., None] / math.sqrt(2.0)
    density = flow.log_prob(space.forward(x), steps=60).exp()
    assert abs(float(density.sum() * (r[1] - r[0])) - 1.0) < 2e-3


def exact_prior(sde, exact):
    return sde.prior_for(*exact.data_moments())


def test_training_and_sampling_keep_the_centre_of_mass():
    sde, space = catalog.VP(), CentreOfMassFree(N)
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = sdeflow.nets.MLP(3 * N, 32)

        def forward(self, x, t):
            seen.append(float(x.mean(1).abs().max()))
            return self.inner(x.flatten(1), t).reshape(x.shape)

    score = sdeflow.Score(space.wrap(Net()), sde)
    sdeflow.fit(score, space.forward(states(512).float() + 3.0), 20, batch_size=64, seed=0)
    for bound in (sde.reverse(score), sde.flow_ode(score)):
        u = bound.sample((100, N - 1, 3), steps=10, seed=0)
        x = space.inverse(u)
        assert x.shape == (100, N, 3) and float(x.mean(1).abs().max()) < 1e-6
    assert max(seen) < 1e-4  # of states up to some ten wide, in float32


def test_what_does_not_fit_is_refused():
    for wrong in (1, 2.0, True):
        with pytest.raises(ValueError, match="at least 2"):
            CentreOfMassFree(wrong)
    with pytest.raises(sdeflow.DeclarationError, match=r"basis\.forward"):
        sdeflow.SDE("-x", 1, basis=CentreOfMassFree(4))
    with pytest.raises(DataError, match=r"\(batch, 4"):
        CentreOfMassFree(4).forward(torch.zeros(2, 3, 3))
    with pytest.raises(DataError, match=r"\(batch, 3"):
        CentreOfMassFree(4).inverse(torch.zeros(2, 4, 3))
