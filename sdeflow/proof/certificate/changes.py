r"""Kernels behind a change of the state, and of the Pearson class: what is theirs alone.

The line behind a reducible SDE: x = X(y), y = H(x), and the score of y is s X' + X'' / X'. The square root diffusion
with g² = s (x - l) and drift a x + b has, for u = ±(x - l), delta = 4 (a l + b) / s, and alpha, v of
dz = ½ a z dt + ½ √s dw, the density of v times a noncentral chi²,

    p(u | u_0) = (1 / 2v) (u / (alpha² u_0))^{nu / 2} exp(-(u + alpha² u_0) / 2v) I_nu(r),
    r = √(u u_0) alpha / v,    nu = delta / 2 - 1,

which mpmath computes in as many digits as it takes, in each branch of the Bessel function.
"""

from __future__ import annotations

from dataclasses import replace

import mpmath
import numpy as np
import sympy as sp
import torch

from sdeflow.proof.certificate.density import domain, expanded, noise_of, start
from sdeflow.proof.certificate.draws import integrated, levels_are_uniform
from sdeflow.proof.certificate.oracle import Oracle, ratio
from sdeflow.proof.certificate.subject import Subject, tensor
from sdeflow.symbolic.conditioned import end_symbols, horizon
from sdeflow.symbolic.evaluate import DIFFERENCES, UnknownValue, Value, evaluate
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["bessel", "bridge", "clock", "line"]

_PATHS = 20_000
_CUTOFF_NOISE, _CUTOFF_CLOCK = 2e-3, 1e-4

Array = np.ndarray


def line(subject: Subject) -> None:
    """transport and restore are inverse to each other; line_score is the gradient of y's log-density."""
    kernel, at = subject.reducible, float(0.6 * subject.T)
    x_0 = torch.as_tensor(start(subject)).expand(5, 1)
    noise = torch.tensor([[-1.1], [-0.4], [0.2], [0.8], [1.5]], dtype=torch.float64)
    x = kernel.sample(x_0, at, noise=noise)
    y = kernel.transport(x, at)
    subject.note(
        "transport", "restore(transport(x)) = x", ratio((kernel.restore(y, at) - x).numpy(), abs(x.numpy())), 1e-9, at
    )
    h = 1e-3 * float((y.max() - y.min()).abs())

    def density(line: torch.Tensor) -> torch.Tensor:
        """log p of y, of that branch of the map on which it lies, up to a constant."""
        slope = torch.as_tensor(sum(w * kernel.restore(line + o * h, at) for o, w in DIFFERENCES))
        return kernel.log_prob(kernel.restore(line, at), x_0, at) + (slope / h).abs().log()[:, 0]

    found, gradient = kernel.line_score(x, kernel.score(x, x_0, at), at)
    wide = 8.0 * h
    slope = torch.as_tensor(sum(w * density(y + o * wide) for o, w in DIFFERENCES)) / wide
    scale = 1.0 / float((y.max() - y.min()).abs())
    subject.note("line_score", "y = H(x)", ratio((found - y).numpy(), abs(y.numpy()) + 1 / scale), 1e-9, at)
    error = ratio((gradient[:, 0] - slope).numpy(), abs(slope.numpy()) + scale)
    subject.note("line_score", "= d log p / dy", error, 1e-5, at)


def bridge(subject: Subject) -> None:
    """A bridge of an SDE free of t by Bayes: p(x_t | x_0, x_T) = p(x_t | x_0) p(x_T | x_t) / p(x_T | x_0)."""
    declaration, kernel = subject.declaration, subject.kernel
    if not hasattr(subject.sde, "bridge"):
        return
    if declaration.f.has(time_symbol) or declaration.g.has(time_symbol):
        raise UnknownValue("the density of x_T given a later state than x_0 is not known.")
    (state,), T = declaration.state, subject.T
    x_0, at = torch.as_tensor(start(subject)), 0.45 * subject.T
    end = kernel.sample(x_0, T, noise=torch.full((1, 1), 0.6, dtype=torch.float64))
    conditioned = subject.sde.bridge(end[0])

    def onward(x: torch.Tensor) -> torch.Tensor:
        return kernel.log_prob(end.expand(len(x), 1), x, T - at)

    def density(x: torch.Tensor) -> torch.Tensor:
        return kernel.log_prob(x, x_0.expand(len(x), 1), at) + onward(x) - kernel.log_prob(end, x_0, T)

    paths = conditioned.paths(x_0.expand(_PATHS, 1), [at, T], seed=16).numpy()[..., 0]
    levels, mean, std = integrated(subject, paths[0], at, density)
    levels_are_uniform(subject, "bridge.paths", "the law by Bayes", levels, at)
    subject.note(
        "bridge.paths", "they end in x_T", ratio(paths[1] - float(end), np.asarray(1 + abs(float(end)))), 1e-9, T
    )
    told = [float(moment) for moment in conditioned.moments(x_0, at)]
    subject.note(
        "bridge.moments", "mean and spread by Bayes", np.array([told[0] - mean, told[1] - std]) / std, 1e-5, at
    )
    x = torch.as_tensor(np.quantile(paths[0], [0.1, 0.4, 0.8])[:, None])
    h = torch.full_like(x, 0.02 * std)
    for limit in domain(subject, at):  # the difference takes four steps to either side, and stays inside
        h = torch.minimum(h, 0.1 * (x - limit).abs())
    slope = (torch.as_tensor(sum(w * onward(x + o * h) for o, w in DIFFERENCES)) / h[:, 0]).numpy()
    point: dict[sp.Symbol, Value] = {**subject.numbers_of(0), state: x.numpy()[:, 0], time_symbol: at}
    drift = evaluate(conditioned.drift, {**point, horizon: subject.T, end_symbols(declaration)[0]: float(end)})
    f, gram = evaluate(declaration.f, point), evaluate(declaration.g, point) ** 2
    size = np.abs(f) + np.abs(gram * slope) + np.sqrt(gram / T)
    subject.note("bridge.drift", "f + g² ∂ log p(x_T | x_t) / ∂x_t", ratio(drift - f - gram * slope, size), 1e-6, at)


def clock(subject: Subject) -> None:
    """The default cutoff: sigma / alpha = 2e-3 of the SDE behind the square root, a clock of 1e-4 of Jacobi's."""
    if subject.declaration.cutoff is not None:
        return
    behind = _behind(subject)
    law = behind.law(np.array([subject.cutoff]))
    if np.isfinite(domain(subject, 0.0)).all():
        subject.note("cutoff", "∫ s dt = 1e-4", law.cov[0, 0, 0, 0] / _CUTOFF_CLOCK - 1.0, 1e-6, subject.cutoff)
        return
    noise, most = (np.sqrt(v.cov[0, 0, 0, 0]) / v.phi[0, 0, 0, 0] for v in (law, behind.law(np.array([subject.T]))))
    if most < _CUTOFF_NOISE:
        subject.note(
            "cutoff", "T / 1000 where sigma / alpha stays below 2e-3", 1e3 * subject.cutoff / subject.T - 1.0, 1e-9
        )
        return
    subject.note("cutoff", "sigma / alpha = 2e-3", noise / _CUTOFF_NOISE - 1.0, 1e-6, subject.cutoff)


def _behind(subject: Subject) -> Oracle:
    """The affine SDE behind a Pearson diffusion: dz = ½ a z dt + ½ √s dw, or dz = √s dw."""
    declaration = subject.declaration
    (x,) = declaration.state
    a, (_, q_1, q_2) = sp.diff(expanded(declaration.f), x), noise_of(subject)
    if q_2 != 0:
        inner = replace(declaration, f=sp.Integer(0), g=sp.sqrt(-q_2))
    else:
        inner = replace(declaration, f=a * x / 2, g=sp.sqrt(sp.Abs(q_1)) / 2)
    return Oracle(inner, subject.numbers_of(0), 0.5 * subject.first)


def bessel(subject: Subject) -> None:
    """The square-root kernel's density and score against mpmath, from arguments of the Bessel function of 1 to 1e9."""
    low, high = domain(subject, 0.0)
    if np.isfinite(high - low):
        return
    origin, side = (low, 1.0) if np.isfinite(low) else (high, -1.0)
    behind, declaration = _behind(subject), subject.declaration
    _, q_1, _ = noise_of(subject)
    at = 0.5 * subject.T
    (state,), point = declaration.state, {**subject.numbers_of(0), time_symbol: at}
    delta = 4.0 * float(evaluate(declaration.f, {**point, state: origin}) / evaluate(q_1, point))
    law = behind.law(np.array([at]))
    alpha, v = float(law.phi[0, 0, 0, 0]), float(law.cov[0, 0, 0, 0])
    for size in (0.3, 30.0, 1e4, 1e9):
        # u_0 such that r is about ``size`` where u is its mean alpha² u_0 + delta v and a width on either side of it.
        l = 0.5 * (-delta + np.sqrt(delta**2 + 4.0 * size**2))
        u_0 = l * v / alpha**2
        width = v * np.sqrt(2.0 * (2.0 * l + delta))
        u = np.maximum((l + delta) * v + np.array([-1.0, 0.4, 2.0]) * width, 0.05 * v)
        x, x_0 = (tensor((origin + side * w).reshape(-1, 1)) for w in (u, np.full(3, u_0)))
        u, u_0 = np.abs(x.numpy()[:, 0] - origin), abs(float(x_0[0, 0]) - origin)  # as rounded
        try:
            exact = np.array([_chi_squared(w, u_0, alpha, v, delta) for w in u])
        except (ZeroDivisionError, mpmath.libmp.NoConvergence) as error:
            raise UnknownValue(f"mpmath has no Bessel function of the order {0.5 * delta - 1.0:.3g}.") from error
        found = subject.kernel.log_prob(x, x_0, at).numpy()
        score = side * subject.kernel.score(x, x_0, at).numpy()[:, 0]
        lost = 1e-15 * abs(origin) / width + 2e-15 * size * (size > 1e6) + 1e-15 * (delta + l)
        subject.note(
            "kernel.log_prob", f"= mpmath's, Bessel's argument {size:.0e}", found - exact[:, 0], 1e-8, at, doubt=lost
        )
        unit = (score - exact[:, 1]) * width
        subject.note("kernel.score", f"= mpmath's, Bessel's argument {size:.0e}", unit, 1e-6, at, doubt=10 * lost)


def _chi_squared(u: float, u_0: float, alpha: float, v: float, delta: float) -> tuple[float, float]:
    """log p(u | u_0) and its derivative in u."""
    with mpmath.workdps(50):
        u, u_0, alpha, v, delta = map(mpmath.mpf, (u, u_0, alpha, v, delta))
        nu, l = delta / 2 - 1, alpha**2 * u_0
        r = mpmath.sqrt(u * l) / v
        value = mpmath.besseli(nu, r)
        log_p = nu / 2 * mpmath.log(u / l) - (u + l) / (2 * v) + mpmath.log(value) - mpmath.log(2 * v)
        ahead = mpmath.besseli(nu + 1, r) / value + nu / r  # I' / I
        score = nu / (2 * u) - 1 / (2 * v) + ahead * mpmath.sqrt(l / u) / (2 * v)
        return float(log_p), float(score)
