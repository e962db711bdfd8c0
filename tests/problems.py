"""Problems with known answers, shared by the tests."""

import os

import sympy as sp
import torch

from sdeflow import SDE, catalog, state, t, x
from sdeflow.numerics.noise import NoiseStream
from sdeflow.scores import GaussianMixture
from sdeflow.training.times import WeightedTimes

R = sp.Rational

CATALOGUE = {
    "VP": catalog.VP,
    "SubVP": catalog.SubVP,
    "VE": catalog.VE,
    "CosineVP": catalog.CosineVP,
    "OU": catalog.OU,
    "EDM": catalog.EDM,
    "FlowMatching": catalog.FlowMatching,
}


def _preserving(beta):
    return SDE(-beta * x / 2, sp.sqrt(beta))


# Schedules on which sympy.integrate hangs, crashes or turns complex, and others that are awkward.
AWKWARD = {
    "VP with floats": lambda: _preserving(0.1 + 19.9 * t),
    "sub-VP with floats": lambda: SDE(
        -(0.1 + 19.9 * t) * x / 2, sp.sqrt((0.1 + 19.9 * t) * (1 - sp.exp(-0.2 * t - 19.9 * t**2)))
    ),
    "sigmoid": lambda: _preserving(R(1, 10) + 20 / (1 + sp.exp(6 - 12 * t))),
    "sigmoid with floats": lambda: _preserving(0.1 + 20 / (1 + sp.exp(6.0 - 12.0 * t))),
    "sine squared": lambda: SDE(-(1 + sp.sin(3 * t) ** 2) / 2 * x, sp.sqrt(1 + sp.cos(t))),
    "logarithmic drift": lambda: SDE(-sp.log(1 + t) * x, t),
    "tanh drift": lambda: SDE(-sp.tanh(t) * x, 1),
    "t^2 drift": lambda: SDE(-(t**2) * x, 1),
    "sqrt(t) drift": lambda: SDE(-sp.sqrt(t) * x, 1),
    "t^1.5 drift": lambda: SDE(-(t ** R(3, 2)) * x, 1),
    "singular at 0": lambda: SDE(-x / sp.sqrt(t), t ** R(-1, 4)),
    "Gompertz": lambda: SDE(-sp.exp(-sp.exp(-t)) * x, sp.exp(-sp.exp(-t))),
    "Gaussian bump": lambda: SDE(-sp.exp(-(t**2)) * x, sp.exp(-(t**2) / 2)),
    "piecewise": lambda: SDE(
        -sp.Piecewise((1, t < R(1, 3)), (5, True)) * x, sp.Piecewise((1, t < R(1, 2)), (2, True))
    ),
    "modulus": lambda: SDE(-sp.Abs(t - R(1, 3)) * x, sp.Abs(t - R(3, 10)) + R(1, 10)),
    "Bessel": lambda: SDE(-(1 + sp.besselj(0, 5 * t)) * x, sp.sqrt(1 + t)),
    "incomplete gamma": lambda: SDE(-sp.lowergamma(R(3, 2), t) * x, 1, T=3),
    "1 + sin": lambda: _preserving(1 + sp.sin(sp.pi * t)),
    "1 / (1 + t)": lambda: SDE(-x / (1 + t), 1),
    "degree five": lambda: SDE(-(1 + t + t**5) * x / 2, sp.sqrt(1 + t**2)),
    "bridge": lambda: SDE(-x / (1 - t), 1, T=0.99),
    "offset drift": lambda: SDE(-x + sp.sin(3 * t) + t, 1, T=2),
    "mean reversion": lambda: SDE(2 * (3 - x), R(1, 2), T=2),
    "exponential offset": lambda: SDE(-2 * x + sp.exp(-t), 1),
    "initial variance": lambda: SDE(-x, sp.sqrt(2 * t), P0=0.04),
    "growing": lambda: SDE(x, 1, T=2),
    "parameters": lambda: SDE(-sp.Symbol("k") * x, sp.Symbol("c") * sp.exp(t), params={"k": 1.5, "c": 0.3}),
}  # fmt: skip


def _coupled(f, g, **options):
    return SDE(f=f(*state("x v"), t), g=g, **options)


# Coupled linear SDEs: constant, time-changed, and F(t) that does not commute with itself.
COUPLED = {
    "critically damped": catalog.CriticallyDampedLangevin,
    "time-changed": lambda: catalog.CriticallyDampedLangevin(beta=1 + 4 * t),
    "underdamped": lambda: _coupled(lambda x, v, t: [3 * v, -3 * x - v], [0, sp.sqrt(2)], P0=[0, 1], T=3),
    "overdamped": lambda: _coupled(lambda x, v, t: [v, -x - 5 * v], [0, sp.sqrt(10)], P0=[0, 1], T=3),
    "known velocity": lambda: _coupled(lambda x, v, t: [v, -v], [0, 1], T=2),
    "integrated noise": lambda: _coupled(lambda x, v, t: [v, 0], [0, 1], T=2),
    "offset": lambda: _coupled(lambda x, v, t: [v + 1, -x - 2 * v + sp.sin(t)], [R(1, 10), 1], T=2),
    "noise matrix": lambda: _coupled(lambda x, v, t: [-x, -v], [[1, R(1, 2), 0], [R(1, 2), 1, t]]),
    "rotation": lambda: catalog.from_recipe([[2, 1], [1, 1]], [[0, -t], [t, 0]]),
    "not commuting": lambda: _coupled(
        lambda x, v, t: [(1 + t) * v - t * x, -x - (2 + sp.sin(t)) * v + sp.cos(t)],
        [[R(1, 10), 0, t], [0, 1, R(1, 2)]], T=2,
    ),
    "stiff": lambda: _coupled(lambda x, v, t: [100 * v, -100 * x - 1000 * v], [0, 40], P0=[0, 1]),
    "third order": lambda: catalog.from_recipe(
        sp.diag(0, 0, 6), [[0, -2, 0], [2, 0, -4], [0, 4, 0]], P0=[0, 1, 1], names="x v a"
    ),
    "all components data": lambda: SDE(
        lambda a, b, c, t: [t * b - a, c - 2 * b, -c - a], [1, R(1, 2), 1], state=("a", "b", "c")
    ),
}  # fmt: skip


def gaussian(sde, std=0.1, d=1):
    """The exact score of N(0, std^2) data."""
    return GaussianMixture(sde, torch.zeros(1, d), torch.tensor([std**2]))


def ring(sde, modes=8, radius=1.0, std=0.1):
    """The exact score of a ring of Gaussians in two dimensions."""
    angle = torch.arange(modes) * 2 * torch.pi / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(sde, means, torch.full((modes,), std**2))


def correlated(sde, d=4, n=3, seed=0):
    """The exact score of a mixture with full covariances."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, d, d, generator=generator, dtype=torch.float64) / d
    covariances = factor @ factor.mT + 0.05 * torch.eye(d, dtype=torch.float64)
    means = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return GaussianMixture(sde, means, covariances, weights=torch.tensor([0.5, 0.3, 0.2]), full=True)


class OneAtATime:
    """A noise stream of unit impulses: row k gets a 1 in draw k and nothing else, to propagate moments exactly."""

    seed, draws = 0, 0

    def normal(self, shape, dtype=None, device="cpu"):
        self.draws += 1
        out = torch.zeros(shape, dtype=dtype)
        out[self.draws] = 1.0
        return out


def training_times(kernel, n, times, seed):
    """n times as fit draws them for the likelihood, (n,)."""
    law = WeightedTimes(times, kernel, lambda at: kernel.half_log_snr_rate(at).abs(), 1.0, gaussian=True)
    return law.draw(n, NoiseStream(seed, "test"))[0]


_SECONDS_OF_A_SUM = 0.15


def cpu_seconds():
    """What this process and its ended children have computed so far: no test is slower for a busy machine."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def slowness():
    """How many times slower this machine is than the one on which limits of processor time were set, at least 1."""
    before = cpu_seconds()
    sum(i * i for i in range(2_000_000))
    return max(1.0, (cpu_seconds() - before) / _SECONDS_OF_A_SUM)
