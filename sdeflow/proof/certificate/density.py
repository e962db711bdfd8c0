r"""Densities: the Gaussian kernel's against a normal law of the oracle's moments, others by their mass and moments.

An SDE with drift a x + b and g² = q_0 + q_1 x + q_2 x² has moments of its own, whatever its law:

    m' = a m + b,        v' = (2a + q_2) v + q_0 + q_1 m + q_2 m².
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import sympy as sp
import torch
from typing_extensions import assert_never

from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.local import LocalKernel
from sdeflow.kernels.pearson import PearsonKernel
from sdeflow.kernels.reducible import ReducibleKernel
from sdeflow.proof.certificate.oracle import Oracle, ratio
from sdeflow.proof.certificate.subject import Subject, product, tensor, transposed
from sdeflow.symbolic.evaluate import UnknownValue, evaluate
from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = [
    "HIDDEN",
    "domain",
    "gaussian",
    "mass",
    "moment_equations",
    "noise_of",
    "require_quick",
    "require_seen",
    "start",
]

_TOLERANCE = 1e-9
_PROBABILITY = 1e-7
_SLOW, _SECONDS = 2e-3, 3.0  # of a density, and of all that are needed at once

_TERMS = 200  # by which the power of a density near an end is told
_MOST_HIDDEN = 1e-2  # of the mass
_INDISTINCT = 1e-13  # relative distance from an end
HIDDEN = "too much of the law lies closer to an end of the domain than numbers can tell."

Array = np.ndarray


def gaussian(subject: Subject) -> None:
    """sample, moments, log_prob and score at states of known noise, against the oracle's normal law."""
    kernel = subject.kernel
    times = np.concatenate(
        [np.geomspace(subject.first, subject.T, 5), subject.rng.uniform(subject.first, subject.T, 4)]
    )
    x_0, noise, at = subject.states(len(times)), subject.states(len(times)), torch.as_tensor(times)
    law = subject.law(times)
    x_t = kernel.sample(x_0, at, noise=noise)
    mean, spread = kernel.moments(x_0, at)
    start_, eps, drawn, told = (_rows(subject, kernel.to_basis(v)) for v in (x_0, noise, x_t, mean))
    level = product(law.phi, start_) + law.offset
    size = product(abs(law.phi), abs(start_)) + law.reach + np.sqrt(_diagonal(law.cov))
    doubt = law.phi_doubt + law.offset_doubt + law.cov_doubt
    basis = 1.0 if subject.basis is None else 1e3  # a basis mixes coordinates of all sizes
    subject.note(
        "kernel.moments", "mean = alpha x_0 + offset", ratio(told - level, size), basis * _TOLERANCE, times, doubt=doubt
    )
    if not subject.coupled:
        entries = bool(subject.values.shape)
        std = subject.pick(spread.expand(len(times), *subject.event)) if entries else spread.flatten(1)[:, :1].numpy()
        error = ratio(std - np.sqrt(law.cov[..., 0, 0]), np.sqrt(law.cov[..., 0, 0]))
    else:
        cov = spread.reshape(len(times), 1, subject.k, subject.k).numpy()
        scale = np.sqrt(_diagonal(law.cov))
        error = ratio(cov - law.cov, scale[..., :, None] * scale[..., None, :])
    subject.note("kernel.moments", "its spread", error, _TOLERANCE, times, doubt=law.cov_doubt)
    if subject.coupled:
        root = np.linalg.cholesky(law.cov)
    else:
        root = np.sqrt(law.cov)
    made = level + product(root, eps)
    subject.note("sample", "x_t = mean + sigma eps", ratio(drawn - made, size), basis * 1e-8, times, doubt=doubt)
    d, each = math.prod(subject.event), math.prod(subject.event) / eps.shape[1] / subject.k
    log_det = each * np.linalg.slogdet(root)[1].sum(1)
    if len(subject.rows) == np.prod(subject.values.shape or (1,)):
        whole = kernel.to_basis(noise).flatten(1).square().sum(1).numpy()
        normal = -0.5 * whole - log_det - 0.5 * d * math.log(2 * math.pi)
        log_p = kernel.log_prob(x_t, x_0, at).numpy()
        # The state is rounded before the noise is read off it again: |mean| / sigma digits are lost.
        lost = 1e-13 * (1 + abs(level).max()) / _narrowest(root)
        error = (log_p - normal) / (1 + abs(normal))
        subject.note("kernel.log_prob", "= log N(x_t; mean, sigma sigmaᵀ)", error, 1e-8, times, doubt=lost + doubt)
    score = _rows(subject, kernel.to_basis(kernel.score(x_t, x_0, at)))
    error = product(transposed(root), score) + eps
    lost = 1e-12 * (1 + abs(level).max()) / _narrowest(root)
    subject.note("kernel.score", "sigmaᵀ ∇ log p = -eps", error, basis * 1e-8, times, doubt=lost + 10 * doubt)


def _rows(subject: Subject, states: torch.Tensor) -> Array:
    """States (n, *event) as (n, e, k)."""
    if subject.coupled:
        return states.reshape(len(states), 1, subject.k).numpy()
    return subject.of_entries(states)[..., None]


def _narrowest(root: Array) -> Array:
    """The smallest width of each law, (n,)."""
    return (1.0 / np.abs(np.linalg.inv(root)).max((-1, -2))).min(1)


def _diagonal(P: Array) -> Array:
    return np.diagonal(P, axis1=-2, axis2=-1)


# -------------------------------------------------------------------- laws that are not Gaussian


def start(subject: Subject) -> Array:
    """An x_0 in the domain, (1, k)."""
    kernel = subject.kernel
    match kernel:
        case Kernel() | LocalKernel():
            return np.linspace(0.7, -0.3, subject.k)[None]
        case ReducibleKernel():
            return kernel.restore(torch.full((1, 1), 0.7, dtype=torch.float64), 0.0).numpy()
        case PearsonKernel():
            return _within_the_domain(subject)
        case _:
            assert_never(kernel)


def _within_the_domain(subject: Subject) -> Array:
    """An x_0 of a Pearson diffusion."""
    low, high = domain(subject, 0.0)
    if math.isfinite(high - low):
        return np.array([[low + 0.4 * (high - low)]])
    end, side = (low, 1.0) if math.isfinite(low) else (high, -1.0)
    return np.array([[end + side * 0.6 * max(1.0, _level(subject))]])


def _level(subject: Subject) -> float:
    """How far from the end the drift rests: a start far below it takes all its time to come there."""
    numbers, T = subject.numbers_of(0), subject.T
    f = subject.declaration.f
    a = float(
        evaluate(
            sp.diff(f, subject.declaration.state[0]), {**numbers, subject.declaration.state[0]: 1.0, time_symbol: T}
        )
    )
    low, high = domain(subject, T)
    end = low if math.isfinite(low) else high
    pull = float(evaluate(f, {**numbers, subject.declaration.state[0]: end, time_symbol: T}))
    return abs(pull / a) if a and math.isfinite(pull / a) else 1.0


def domain(subject: Subject, at: float) -> tuple[float, float]:
    """The ends of the state's domain."""
    numbers = subject.numbers_of(0)
    if subject.kind == "reducible":
        change = subject.reducible.reduction.map
        lower, upper = (float(evaluate(e, {**numbers, time_symbol: at})) if e.is_finite is not False else
                        (-math.inf if e == -sp.oo else math.inf) for e in (change.lower, change.upper))  # fmt: skip
        return lower, upper
    ends = sorted(_zeros_of_noise(subject))
    if len(ends) == 2:
        return ends[0], ends[1]
    x = subject.declaration.state[0]
    above = float(evaluate(subject.declaration.g**2, {**numbers, x: ends[0] + 1.0, time_symbol: 0.5 * subject.T}))
    return (ends[0], math.inf) if above > 0 else (-math.inf, ends[0])


def _zeros_of_noise(subject: Subject) -> list[float]:
    """Where g² of a Pearson diffusion vanishes."""
    q_0, q_1, q_2 = _quadratic(subject, 0.5 * subject.T)
    if q_2 == 0:
        return [-q_0 / q_1]
    return np.roots([q_2, q_1, q_0]).real.tolist()


def _quadratic(subject: Subject, at: float) -> list[float]:
    point = {**subject.numbers_of(0), time_symbol: at}
    return [float(evaluate(e, point)) for e in noise_of(subject)]


def noise_of(subject: Subject) -> tuple[sp.Expr, sp.Expr, sp.Expr]:
    """q_0, q_1, q_2 of g²."""
    declaration = subject.declaration
    (x,) = declaration.state
    q = expanded(declaration.g**2)
    return q.coeff(x, 0), q.coeff(x, 1), q.coeff(x, 2)


def expanded(expr: sp.Expr) -> sp.Expr:
    """``expr`` multiplied out.

    Raises:
        UnknownValue: where that takes too long.
    """
    found = patiently(sp.expand, expr)
    if found is None:
        raise UnknownValue("SymPy takes too long to multiply out f and g².")
    return found


class _Spread(Oracle):
    """v' = (2a + q_2) v + q_0 + q_1 m + q_2 m², read as the variance of a linear SDE."""

    def __init__(self, mean: Oracle, x_0: float, noise: tuple[sp.Expr, ...], numbers: dict[sp.Symbol, float]) -> None:
        at_start = sp.sqrt(sum(abs(q) * abs(sp.Float(x_0)) ** i for i, q in enumerate(noise)))
        super().__init__(replace(mean.declaration, g=at_start), numbers, mean.first)
        self.mean, self.x_0, self.noise, self.at = mean, x_0, noise, numbers

    def coefficients(self, times: Array) -> tuple[Array, Array, Array]:
        F, b, _ = super().coefficients(times)
        law = self.mean.law(times)
        m = law.phi[:, 0, 0, 0] * self.x_0 + law.offset[:, 0, 0]
        q_0, q_1, q_2 = (np.broadcast_to(evaluate(q, {**self.at, time_symbol: times}), m.shape) for q in self.noise)
        Q = q_0 + q_1 * m + q_2 * m**2
        return F + 0.5 * q_2[None, :, None, None], b, Q[None, :, None, None]


def moment_equations(subject: Subject) -> None:
    """The kernel's mean and standard deviation against the moments' own equations, where these are closed."""
    declaration = subject.declaration
    if declaration.coupled or subject.values.shape:
        return
    (x,) = declaration.state
    f, q = expanded(declaration.f), expanded(declaration.g**2)
    if not (f.is_polynomial(x) and q.is_polynomial(x) and sp.degree(f, x) <= 1 and sp.degree(q, x) <= 2):
        return
    numbers, x_0 = subject.numbers_of(0), float(start(subject)[0, 0])
    first = Oracle(replace(declaration, g=sp.Integer(1)), numbers, 0.5 * subject.first)
    times = np.array([subject.first, 0.1 * subject.T, 0.6 * subject.T, subject.T])
    law = first.law(times)
    mean = law.phi[:, 0, 0, 0] * x_0 + law.offset[:, 0, 0]

    spread = _Spread(first, x_0, noise_of(subject), numbers)
    std = np.sqrt(spread.law(times).cov[:, 0, 0, 0])
    found, width = (
        v.flatten().numpy() for v in subject.kernel.moments(tensor(np.full((4, 1), x_0)), torch.as_tensor(times))
    )
    size = np.abs(law.phi[:, 0, 0, 0] * x_0) + law.reach[:, 0, 0]
    subject.note("kernel.moments", "m' = a m + b", ratio(found - mean, size), _TOLERANCE, times)
    identity = "v' = (2a + q₂) v + q₀ + q₁ m + q₂ m² for g² = q₀ + q₁ x + q₂ x²"
    subject.note("kernel.moments", identity, ratio(width - std, std), 1e-8, times)


def require_quick(subject: Subject, points: int) -> None:
    """Raises an UnknownValue where a density at so many points would take seconds, as sums in many digits do."""
    if not subject.cost:
        for n in (1, 6, 60):  # the first call may prepare tables; then what a call costs, and what a point does
            x_0 = torch.as_tensor(start(subject)).expand(n, 1)
            noise = torch.linspace(-3.0, 3.0, n, dtype=torch.float64)[:, None]
            begin = time.process_time()
            subject.kernel.log_prob(subject.kernel.sample(x_0, 0.3 * subject.T, noise=noise), x_0, 0.3 * subject.T)
            subject.cost[:] = [(time.process_time() - begin) / n]
            if n > 1 and subject.cost[0] > 10 * _SLOW:
                break
    if subject.cost[0] > _SLOW and subject.cost[0] * points > _SECONDS:
        raise UnknownValue(f"a density takes {subject.cost[0]:.2g} s, and {points} are needed.")


def require_seen(subject: Subject, x_0: torch.Tensor, at: float, level: float) -> None:
    """Raises an UnknownValue where the states of noise ``level`` or -``level`` are an end of the domain to rounding."""
    noise = torch.tensor([[-level], [level]], dtype=torch.float64)
    states = subject.kernel.sample(x_0.expand(2, 1), at, noise=noise)
    for end in domain(subject, at):  # near 0 there are numbers enough
        if math.isfinite(end) and end != 0 and bool(((states - end).abs() <= _INDISTINCT * abs(end)).any()):
            raise UnknownValue(HIDDEN)


def mass(subject: Subject) -> None:
    """A kernel that is not Gaussian: its mass, mean and variance by trapezoids over the whole domain."""
    require_quick(subject, 400)
    kernel, x_0 = subject.kernel, torch.as_tensor(start(subject))
    for at in (0.25 * subject.T, subject.T):
        require_seen(subject, x_0, at, 2.0)
        mean, std = (float(v) for v in kernel.moments(x_0, at))
        around = torch.tensor([[0.0], [-0.5], [0.5]], dtype=torch.float64)
        centre, before, after = kernel.sample(x_0.expand(3, 1), at, noise=around).flatten().tolist()
        x, slope, rest = _whole_domain(*domain(subject, at), centre, abs(after - before), _reach(subject, x_0, at))
        log_p = kernel.log_prob(torch.as_tensor(x)[:, None], x_0.expand(len(x), 1), at).numpy()
        p = np.where(np.isfinite(log_p), np.exp(log_p), 0.0) * slope
        if rest[0] > 0 and 0 < p[0] < p[1]:  # a power of the distance, whose terms fall geometrically to the low end
            p[0], rest[0] = p[0] + p[0] ** 2 / (p[1] - p[0]), 0.0
        # What lies between the last point and an end that rounding hides.
        tolerance = _PROBABILITY + max(10 * float((p[[0, -1]] * rest).max()), 2 * _beyond(p, rest))
        if tolerance > _MOST_HIDDEN:
            raise UnknownValue(HIDDEN)
        subject.note("kernel.log_prob", "∫ p dx = 1", p.sum() - 1, tolerance, at)
        first = (p * (x - mean)).sum() / std
        second = (p * (x - mean) ** 2).sum() / std**2 - 1
        subject.note("kernel.moments", "mean and variance of p", np.array([first, second]), 10 * tolerance, at)


def _beyond(p: Array, rest: Array) -> float:
    """The mass between the last point and an end: near one p is a power of the distance, and its terms geometric."""
    found = 0.0
    for terms in (side for side, hides in zip((p, p[::-1]), rest, strict=True) if hides):
        some = min(_TERMS, len(terms) - 1)
        if 0 < terms[0] < terms[some]:
            found = max(found, float(terms[0] / math.expm1(math.log(terms[some] / terms[0]) / some)))
    return found


def _reach(subject: Subject, x_0: torch.Tensor, at: float) -> tuple[float, float]:
    """States between which all that counts of a law lies; the whole line where that is not known."""
    reducible = subject.kind == "reducible"
    if reducible and subject.reducible.reduction.map.fold:
        return -math.inf, math.inf
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) * (12.0 if reducible else 7.1)
    states = subject.kernel.sample(x_0.expand(2, 1), at, noise=ends).flatten().tolist()
    return (min(states), max(states)) if all(map(math.isfinite, states)) else (-math.inf, math.inf)


def _whole_domain(
    low: float, high: float, centre: float, width: float, reach: tuple[float, float]
) -> tuple[Array, Array, Array]:
    """States that cover the domain, their trapezoid weights, and the ratio by which an end may hide mass."""
    if low < reach[0] - 2 * width and reach[1] + 2 * width < high and reach[1] - reach[0] < 80 * width:
        # Both ends are far: equal steps, of which a smooth density needs few.
        x = np.linspace(reach[0] - 2 * width, reach[1] + 2 * width, 400)
        return x, np.full(len(x), x[1] - x[0]), np.zeros(2)
    if math.isinf(low) and math.isinf(high):
        w = np.linspace(-40.0, 40.0, 8001)
        return centre + width * np.sinh(w), width * np.cosh(w) * (w[1] - w[0]), np.zeros(2)
    if math.isfinite(low) and math.isfinite(high):
        w = np.linspace(-80.0, 36.0, 6000)
        u = 1.0 / (1.0 + np.exp(-w))
        x, slope, hidden = low + (high - low) * u, (high - low) * u * (1.0 - u), np.full(2, 1.0)
    else:
        w = np.linspace(-80.0, 40.0, 6001)
        end, side = (low, 1.0) if math.isfinite(low) else (high, -1.0)
        u = max(abs(centre - end), width) * np.exp(w)
        x, slope, hidden = end + side * u, u, np.array([1.0, 0.0])
    step = w[1] - w[0]
    kept = (x >= reach[0] - 2 * width) & (x <= reach[1] + 2 * width)
    return x[kept], slope[kept] * step, hidden / step * [kept[0], kept[-1]]
