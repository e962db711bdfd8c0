"""What the tests of kernels that are not Gaussian ask of a density in one dimension, and of draws."""

from types import SimpleNamespace

import numpy as np
import sympy as sp
import torch

from sdeflow import t, x


def case(f, g, start, to_x, slope, ends, steady=True):
    """dx = f dt + g dw from ``start``; z -> x with its slope covers the domain as z runs between ``ends``."""
    return SimpleNamespace(f=f, g=g, start=start, to_x=to_x, slope=slope, ends=ends, steady=steady)


def log_density(kernel, states, start, time):
    """log p(x_t | x_0) for arrays of states, starts and times."""
    states, start, time = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in (states, start, time)))
    columns = (torch.tensor(a.reshape(-1, 1)) for a in (states, start))
    return kernel.log_prob(*columns, torch.tensor(time.reshape(-1))).numpy().reshape(states.shape)


def quadrature(example, pieces=60):
    """States over the domain with the weights of Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    edges = np.linspace(*example.ends, pieces + 1)
    half = 0.5 * np.diff(edges)[:, None]
    z = (edges[:-1, None] + half + half * nodes).reshape(-1)
    return example.to_x(z), (half * weights).reshape(-1) * np.abs(example.slope(z))


def numbers_of(kernel, start, time, example):
    """Mass, mean and standard deviation of the kernel's density, by quadrature."""
    states, weights = quadrature(example)
    p = weights * np.exp(log_density(kernel, states, start, time))
    mean = (p * states).sum()
    return p.sum(), mean, np.sqrt((p * (states - mean) ** 2).sum())


def bulk(kernel, start, time):
    """States drawn from the kernel, the step of a stencil there, and the standard deviation.

    States next to an end of the domain, where p has no Taylor series, are left out.
    """
    x_start = torch.tensor([[start]], dtype=torch.float64)
    mean, std = (float(m) for m in kernel.moments(x_start, time))
    states, step = kernel.sample(x_start.expand(24, 1), time, seed=1).numpy()[:, 0], 4e-3 * min(std, abs(mean))
    far = np.isfinite(log_density(kernel, states + np.array([[40], [-40]]) * step, start, time)).all(0)
    return states[far], step, std


def fokker_planck_residual(kernel, f, g, start, time, values):
    """Median of |∂p/∂t + ∂(f p)/∂x - ½ ∂²(g² p)/∂x²| relative to its largest term, around the bulk of the kernel.

    By sixth-order stencils; f and g are evaluated by SymPy's lambdify, which shares no code with the kernel.
    """
    (at, h, _), k = bulk(kernel, start, time), 4e-3 * time
    f, g = (sp.lambdify((x, t), e.subs(values), "numpy") for e in (f, g))
    first, second = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}, {0: -49 / 18, 1: 3 / 2, 2: -3 / 20, 3: 1 / 90}

    def p(states, s):
        return np.exp(log_density(kernel, states, start, s))

    def flux(shift):
        return f(at + shift, time) * p(at + shift, time)

    def spread(shift):
        return 0.5 * g(at + shift, time) ** 2 * p(at + shift, time)

    dt = sum(c * (p(at, time + i * k) - p(at, time - i * k)) for i, c in first.items()) / k
    drift = sum(c * (flux(i * h) - flux(-i * h)) for i, c in first.items()) / h
    noise = sum(c * (spread(i * h) + spread(-i * h)) / (2 if i == 0 else 1) for i, c in second.items()) / h**2
    terms = np.stack([dt, drift, -noise])
    return np.median(np.abs(terms.sum(0)) / np.abs(terms).max(0))


def score_error(kernel, start, time):
    """The score's largest distance from the sixth-order difference of log p, in units of 1 / std."""
    at, h, std = bulk(kernel, start, time)
    states = torch.tensor(at)[:, None]
    stencil = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    shifted = {i: log_density(kernel, at + i * h, start, time) for i in (*stencil, *(-i for i in stencil))}
    slope = sum(c * (shifted[i] - shifted[-i]) for i, c in stencil.items()) / h
    return np.abs(slope - kernel.score(states, torch.full_like(states, start), time).numpy()[:, 0]).max() * std


def require_draws(kernel, start, n, seed, time=0.3):
    """The kernel's seeded draws (n, 1), whose mean and variance are its moments within four standard errors."""
    begins = torch.full((n, 1), start, dtype=torch.float64)
    states = kernel.sample(begins, time, seed=seed)
    mean, std = (float(m[0]) for m in kernel.moments(begins[:1], time))
    squared = (states - mean).square()
    assert abs(float(states.mean()) - mean) < 4 * std / n**0.5
    assert abs(float(squared.mean()) - std**2) < 4 * float(squared.std()) / n**0.5
    return states
