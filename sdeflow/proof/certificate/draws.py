"""Seeded draws against the distribution function of what they are drawn from.

The distance of Kolmogorov and Smirnov between n draws and their law exceeds sqrt(log(2 / p) / (2n)) with a
probability of at most p (Massart 1990). With p = 1e-10 and 20,000 draws that is 0.024: a width that is off by 10 %
or a mean by 0.06 widths is found. The residual is what exceeds it; smaller mistakes show where noise is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import sympy as sp
import torch

from sdeflow.errors import ScheduleError
from sdeflow.proof.certificate.density import HIDDEN, domain, require_quick, require_seen, start
from sdeflow.proof.certificate.oracle import Law
from sdeflow.proof.certificate.subject import Subject, product
from sdeflow.symbolic.evaluate import UnknownValue

__all__ = ["gaussian_draws", "integrated", "jacobian", "levels_are_uniform", "lifted", "other_draws"]

_DRAWS = 20_000
_CHANCE = 1e-10
_UNSEEN = 1e-3  # of the draws

Array = np.ndarray


def levels_are_uniform(subject: Subject, name: str, identity: str, levels: Array, at: float) -> None:
    """Notes how far the distribution of levels (n, ...), which should be uniform on [0, 1], is from that."""
    each = levels.reshape(len(levels), -1)
    excess = 0.0
    for columns in (each, each.reshape(-1, 1)):  # each coordinate by itself, and all together
        n = len(columns)
        columns, steps = np.sort(columns, axis=0), np.arange(1, n + 1)[:, None] / n
        distance = float(np.maximum(steps - columns, columns - steps + 1.0 / n).max())
        allowed = math.sqrt(math.log(2.0 * columns.shape[1] / _CHANCE) / (2.0 * n))
        excess = max(excess, distance - allowed) if math.isfinite(distance) else math.inf
    subject.note(name, f"{identity}, beyond what chance explains", excess, 0.0, at)


def gaussian_draws(subject: Subject) -> None:
    """kernel.sample, and the prior's samples, by seed: whitened by the oracle they are standard normal."""
    from scipy.special import ndtr  # slow to import

    kernel, T = subject.kernel, subject.T
    d = math.prod(subject.event)
    n = max(2000, _DRAWS // max(1, d))
    at = float(subject.rng.uniform(max(subject.cutoff, 0.2 * T), T))
    x_0 = subject.states(1)
    law = subject.law(np.array([at, T]))
    drawn = kernel.sample(x_0.expand(n, *subject.event), at, seed=11)
    _uniform(subject, "kernel.sample", ndtr, kernel.to_basis(drawn), kernel.to_basis(x_0), law, 0, at)
    if hasattr(subject.sde, "prior"):
        drawn = subject.sde.prior.sample((n, *subject.event), seed=12, dtype=torch.float64)
        _uniform(subject, "prior.sample", ndtr, kernel.to_basis(drawn), torch.zeros_like(x_0), law, 1, T)


def _uniform(
    subject: Subject,
    name: str,
    ndtr: Callable[[Array], Array],
    u: torch.Tensor,
    x_0: torch.Tensor,
    law: Law,
    i: int,
    at: float,
) -> None:
    """Levels of whitened draws; and that components and coordinates are independent of each other."""
    if subject.coupled:
        rows, first = (v.reshape(len(v), 1, subject.k).numpy() for v in (u, x_0))
    else:
        rows, first = (subject.of_entries(v)[..., None] for v in (u, x_0))
    root = np.linalg.cholesky(law.cov[i])
    white = np.linalg.solve(root[None], (rows - product(law.phi[i], first) - law.offset[i])[..., None])[..., 0]
    white = white.reshape(len(white), -1)[:, :64]
    levels_are_uniform(subject, name, "seeded draws have the law", ndtr(white), at)
    n, k = white.shape
    if k > 1:
        correlation = white.T @ white / n - np.eye(k)
        np.fill_diagonal(correlation, 0.0)
        excess = max(0.0, float(np.abs(correlation).max()) - math.sqrt(2.0 * math.log(2.0 * k * k / _CHANCE) / n))
        subject.note(name, "seeded draws are independent, beyond what chance explains", excess, 0.0, at)


def lifted(subject: Subject) -> None:
    """sde.lift: the data stays, the auxiliary components are drawn from P0."""
    from scipy.special import ndtr

    auxiliary = list(subject.declaration.auxiliary)
    if not auxiliary or subject.k - len(auxiliary) != 1:
        return
    data = torch.full((_DRAWS, 1), 0.3, dtype=torch.float64)
    states = subject.sde.lift(data, seed=13)[..., 0].numpy()
    kept = [i for i in range(subject.k) if i not in auxiliary]
    subject.note("lift", "the data stays", states[:, kept] - 0.3, 0.0)
    covariance: sp.ImmutableMatrix = subject.declaration.P0
    P0 = np.array(covariance.tolist(), dtype=float)[np.ix_(auxiliary, auxiliary)]
    white = np.linalg.solve(np.linalg.cholesky(P0), states[:, auxiliary].T).T
    levels_are_uniform(subject, "lift", "auxiliary components have the law N(0, P0)", ndtr(white), 0.0)


def other_draws(subject: Subject) -> None:
    """A kernel that is not Gaussian: seeded draws against the integral of its density."""
    require_quick(subject, 3000)
    x_0 = torch.as_tensor(start(subject))
    for at in (0.25 * subject.T, subject.T):
        try:
            drawn = subject.kernel.sample(x_0.expand(_DRAWS, 1), at, seed=14).numpy()[:, 0]
        except ScheduleError as error:
            raise UnknownValue(f"they are refused: {error}") from error
        subject.note("kernel.sample", "draws are finite", np.where(np.isfinite(drawn), 0.0, 1.0), 0.0, at)

        def density(x: torch.Tensor, at: float = at) -> torch.Tensor:
            return subject.kernel.log_prob(x, x_0.expand(len(x), 1), at)

        levels, _, _ = integrated(subject, drawn, at, density)
        levels_are_uniform(subject, "kernel.sample", "seeded draws have the law", levels, at)


def integrated(
    subject: Subject, drawn: Array, at: float, log_density: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Array, float, float]:
    """∫ p dx up to each of some draws (n,), and the mean and standard deviation of p, by Gauss's rule.

    Its panels lie between quantiles of the draws, and shrink towards an end, where the density may be a power.
    """
    low, high = domain(subject, at)
    knots = np.unique(np.sort(drawn)[np.unique(np.linspace(0, len(drawn) - 1, 400).astype(int))])
    width = knots[-1] - knots[0]
    near, far = np.geomspace(1e-14, 1.0, 120), np.geomspace(1e-3, 1e3, 80)
    tiny = [[sign * np.geomspace(1e-300, 1e-14, 660)] if end == 0 else [] for end, sign in ((low, 1), (high, -1))]
    middle = knots[len(knots) // 2]
    left, right = knots[0] - width * far, knots[-1] + width * far
    if math.isfinite(low):
        left = np.concatenate([left[left > low], low + (middle - low) * near, *tiny[0]])
    if math.isfinite(high):
        right = np.concatenate([right[right < high], high - (high - middle) * near, *tiny[1]])
    if (drawn <= left.min()).mean() + (drawn >= right.max()).mean() > _UNSEEN and math.isfinite(max(low, -high)):
        raise UnknownValue(HIDDEN)
    edges = np.unique(np.clip(np.concatenate([[low, high], left, knots, right]), left.min(), right.max()))
    nodes, weights = np.polynomial.legendre.leggauss(8)
    half = 0.5 * np.diff(edges)
    x = np.clip(edges[:-1, None] + half[:, None] * (1 + nodes), np.nextafter(low, high), np.nextafter(high, low))
    log_p = log_density(torch.as_tensor(x.reshape(-1, 1))).numpy()
    p = np.where(np.isfinite(log_p), np.exp(log_p), 0.0).reshape(x.shape) * weights * half[:, None]
    total = np.concatenate([[0.0], np.cumsum(p.sum(1))])
    hidden, end = 0.0, low if math.isfinite(low) else high
    mean = float((p * x).sum())
    if math.isfinite(end):  # what lies between an end and the first number beyond it
        hidden = max(0.0, 1.0 - total[-1])
        mean += hidden * end
    var = float((p * (x - mean) ** 2).sum()) + (hidden * (end - mean) ** 2 if hidden else 0.0)
    levels = np.interp(drawn, edges, total + (hidden if end == low else 0.0))
    return np.clip(levels, 0.0, 1.0), mean, math.sqrt(var)


def jacobian(subject: Subject) -> None:
    """Draws x(z) of given noise have the kernel's density, p(x) |dx/dz| = φ(z) for monotone x(z)."""
    kernel, x_0 = subject.kernel, torch.as_tensor(start(subject))
    if subject.kind == "reducible" and subject.reducible.reduction.map.fold:
        return  # two draws lead to one state; their seeded draws are compared whole
    z = torch.tensor([-1.0, -0.3, 0.4, 1.2], dtype=torch.float64)[:, None]
    x_0 = x_0.expand(len(z), 1)
    for at in (0.25 * subject.T, subject.T):
        try:
            require_seen(subject, x_0[:1], at, 1.4)
            end = _end(subject, at)
            h = 0.05 if end is None else 0.025  # a law that gathers at its end bends there
            moved = {o: kernel.sample(x_0, at, noise=z + o * h) for o in (-4, -3, -2, -1, 0, 1, 2, 3, 4)}
        except ScheduleError as error:
            raise UnknownValue(f"they are refused: {error}") from error
        weights = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
        # The states' logarithm from the end is smooth where the state itself is a steep power of the noise.
        ahead = {o: (v - end).abs().log() for o, v in moved.items()} if end is not None else moved
        slope = torch.as_tensor(sum(w * (ahead[o] - ahead[-o]) for o, w in weights.items())) / h
        slope = slope * (moved[0] - end).abs() if end is not None else slope
        log_p = kernel.log_prob(moved[0], x_0, at)
        log_normal = -0.5 * z[:, 0].square() - 0.5 * math.log(2.0 * math.pi)
        # Quantiles of a Jacobi diffusion are found to 1e-6 in probability, which the difference divides by h.
        residual = (log_p + slope.abs().log()[:, 0] - log_normal).numpy()
        subject.note("kernel.sample", "p(x(z)) |dx/dz| = φ(z)", residual, 1e-3, at)


def _end(subject: Subject, at: float) -> float | None:
    """The one finite end of the domain, or None."""
    finite = [end for end in domain(subject, at) if math.isfinite(end)]
    return finite[0] if len(finite) == 1 else None
