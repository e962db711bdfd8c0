"""What docs/architecture.rst says under "To add", followed: an SDE, a parametrisation and a kernel."""

import math

import pytest
import sympy as sp
import torch
from scipy import integrate

import sdeflow
from sdeflow import SDE, NotAffineError, Score, fit, t, x
from sdeflow.kernels import kinds
from sdeflow.kernels.notgaussian import NotGaussian
from sdeflow.numerics.noise import NoiseStream
from sdeflow.scores import GaussianMixture, Readout

double = torch.float64

# ---------------------------------------------------------------- an SDE


def Logistic(rate=4.0, T=1.0):
    """Variance preserving, its noise switched on by a logistic function of time."""
    beta = 12 / (1 + sp.exp(-rate * (2 * t / T - 1)))
    return SDE(f=-beta * x / 2, g=sp.sqrt(beta), T=T)


def test_an_sde():
    sde = Logistic()
    alpha, sigma, _ = sde.kernel.coefficients(torch.tensor(0.7, dtype=double))
    B = integrate.quad(lambda s: 12 / (1 + math.exp(-4 * (2 * s - 1))), 0, 0.7, epsabs=1e-14)[0]
    assert abs(float(alpha) - math.exp(-B / 2)) < 1e-12
    assert abs(float(sigma) - math.sqrt(-math.expm1(-B))) < 1e-12
    exact = GaussianMixture(sde, torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.04, 0.01]))
    points = sde.flow_ode(exact).sample((64, 2), steps=40, seed=0)
    error = sde.flow_ode(exact).log_prob(points) - exact.log_prob(points, sde.cutoff)
    assert float(error.abs().median()) < 1e-3


# ---------------------------------------------------------------- a parametrisation


class Whitened(Score):
    """The network returns sqrt(alpha² + sigma²) eps, and sees the state as it is."""

    def __init__(self, net, sde, **options):
        super().__init__(net, sde, predicts="noise", **options)

    def readout(self, path, like, time):
        total = (path.alpha.values.square() + path.sigma.values.square()).sqrt()
        return Readout(output=path.sigma.scaled(1.0 / (total * path.sigma.values)))


@pytest.mark.parametrize("sde", [sdeflow.catalog.VE(), sdeflow.catalog.SubVP()], ids=["VE", "sub-VP"])
def test_a_parametrisation(sde):
    """The exact network in it gives the exact score, sample by sample and on the grids of solvers."""
    exact = GaussianMixture(sde, torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.04, 0.01]))

    def net(state, time):
        alpha, sigma, _ = sde.kernel.coefficients(time.double())
        total = (alpha.square() + sigma.square()).sqrt().to(state.dtype)[:, None]
        return total * exact.noise(state, time.double())

    score = Whitened(net, sde, time="t")
    states, times = 2.0 * torch.randn(16, 2), torch.linspace(0.05, 0.9, 16)
    torch.testing.assert_close(score(states, times), exact(states, times), rtol=1e-4, atol=1e-4)
    z = sde.prior.sample((8, 2), seed=1)
    ours, truth = (sde.flow_ode(s, prior=sde.prior).decode(z, steps=20) for s in (score, exact))
    torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3)
    z = torch.randn(64, 2)
    run = fit(Whitened(sdeflow.nets.MLP(2, width=8, depth=1), sde), z, 3, 16, progress=False)
    assert all(math.isfinite(loss) for loss in run.losses)


# ---------------------------------------------------------------- a kernel


class BenesKernel(NotGaussian):
    """dx = tanh(x) dt + dw: p(x_t | x_0) = cosh(x_t) / cosh(x_0) e^{-t/2} N(x_t; x_0, t) (Beneš 1981)."""

    kind = "Beneš"
    form = "closed"
    attained = unbounded = False  # paths meet no end of a domain

    def __init__(self, declaration, values):
        self.declaration, self.values, self.T = declaration, values, declaration.T

    @property
    def cutoff(self):
        return 1e-3 * self.T if self.declaration.cutoff is None else self.declaration.cutoff

    @staticmethod
    def way(declaration, values, basis):
        """The kernel, or in a clause why it does not serve."""
        ours = not declaration.coupled and declaration.f == sp.tanh(x) and declaration.g == 1 and declaration.P0 == 0
        return BenesKernel(declaration, values) if ours else "its drift is not tanh(x)"

    def with_values(self, values):
        return BenesKernel(self.declaration, values)

    def with_cutoff(self, declaration):
        return BenesKernel(declaration, self.values)

    def _law(self, x_0, t, like):
        t = torch.as_tensor(t, dtype=double, device=like.device)
        t = t.reshape(-1, *(1,) * (like.ndim - 1)) if t.ndim else t
        return x_0.double(), t, torch.sigmoid(2 * x_0.double())  # the weight of the mean x_0 + t

    def moments(self, x_0, t):
        """The mean and standard deviation of x_t given x_0."""
        x, t, up = self._law(x_0, t, x_0)
        mean = x + t * (2 * up - 1)
        return mean.to(x_0.dtype), (t + 4 * up * (1 - up) * t**2).sqrt().to(x_0.dtype)

    def sample(self, x_0, t, seed=None, noise=None):
        """A draw of x_t given x_0."""
        x, t, up = self._law(x_0, t, x_0)
        stream = NoiseStream(seed, "kernel")
        side = torch.where(stream.uniform(tuple(x_0.shape), double) < up, 1.0, -1.0)
        eps = stream.normal(tuple(x_0.shape), double) if noise is None else noise.double()
        return (x + side * t + t.sqrt() * eps).to(x_0.dtype)

    def log_prob(self, x_t, x_0, t):
        """log p(x_t | x_0) in nats, (batch,)."""
        x_0, t, _ = self._law(x_0, t, x_t)
        gaussian = -0.5 * ((x_t.double() - x_0) ** 2 / t + torch.log(2 * math.pi * t))
        log_p = torch.log(torch.cosh(x_t.double()) / torch.cosh(x_0)) - 0.5 * t + gaussian
        return log_p.flatten(1).sum(1)

    def score(self, x_t, x_0, t):
        """∇ log p(x_t | x_0)."""
        x_0, t, _ = self._law(x_0, t, x_t)
        return (torch.tanh(x_t.double()) - (x_t.double() - x_0) / t).to(x_t.dtype)


@pytest.fixture
def benes(monkeypatch):
    monkeypatch.setattr(kinds, "WAYS", (*kinds.WAYS, BenesKernel.way))
    return SDE(sp.tanh(x), 1, T=2)


def test_without_the_kernel_the_sde_is_general():
    sde = SDE(sp.tanh(x), 1, T=2)
    assert sde.kind == "general"
    with pytest.raises(NotAffineError, match="kernel"):
        sde.kernel.sample(torch.zeros(1, 1), 1.0)


def density(kernel, v, x_0):
    """p(x_1.3 = v | x_0)."""
    return math.exp(float(kernel.log_prob(torch.tensor([[v]], dtype=double), x_0[None], 1.3)))


def test_a_kernel(benes):
    assert benes.kind == "Beneš"
    start = torch.tensor([[-0.3], [0.8]], dtype=double)
    for x_0 in start:
        mass, mean, second = (
            integrate.quad(lambda v, k=k, a=x_0: v**k * density(benes.kernel, v, a), -12, 12)[0] for k in range(3)
        )
        found = benes.kernel.moments(x_0[None], 1.3)
        assert abs(mass - 1) < 1e-8
        assert abs(mean - float(found[0])) < 1e-7
        assert abs(second - mean**2 - float(found[1]) ** 2) < 1e-6
    paths = benes.simulate(start.repeat_interleave(20_000, 0), [1.3], steps=200, seed=0)[0].reshape(2, -1)
    mean, std = benes.kernel.moments(start, 1.3)
    assert float(((paths.mean(1) - mean[:, 0]) / std[:, 0]).abs().max()) < 4 / math.sqrt(20_000) + 0.005  # Euler's bias
    assert SDE(sp.tanh(2 * x), 1, T=2).kind == "general"
    assert "its drift is not tanh(x)" in " ".join(SDE(sp.tanh(2 * x), 1, T=2).explain().split())


def test_a_score_is_trained_by_the_kernel(benes):
    """Data at one point: the score of p_t is the kernel's own."""
    data = torch.full((256, 1), 0.5) + 1e-3 * torch.randn(256, 1)
    torch.manual_seed(0)
    score = Score(sdeflow.nets.MLP(1, width=32, depth=2), benes, predicts="score")
    fit(score, data, 400, 128, weighting="likelihood", lr=5e-3, seed=0, progress=False)
    states = torch.linspace(-2, 3, 41)[:, None]
    with torch.no_grad():
        found = score(states, 1.5)
    truth = benes.kernel.score(states, torch.full_like(states, 0.5), 1.5)
    weight = benes.kernel.log_prob(states, torch.full_like(states, 0.5), 1.5).exp()
    error = ((found - truth).square().sum(1) * weight).sum() / (truth.square().sum(1) * weight).sum()
    assert float(error) < 0.1
