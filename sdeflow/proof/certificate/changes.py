r"""Kernels behind a change of the state, and of the Pearson class: what is theirs alone.

The line behind a reducible SDE: x = X(y), y = H(x), and the score of y is s X' + X'' / X'. The square root diffusion
with g² = s (x - l) and drift a x + b has, for u = ±(x - l), delta = 4 (a l + b) / s, and alpha, v of
dz = ½ a z dt + ½ √s dw, the density of v times a noncentral chi²,

    p(u | u_0) = (1 / 2v) (u / (alpha² u_0))^{nu / 2} exp(-(u + alpha² u_0) / 2v) I_nu(r),
    r = √(u u_0) alpha / v,    nu = delta / 2 - 1,

which mpmath computes in as many digits as it takes, in each branch of the Bessel function.

Either is conditioned on its end by Bayes: p(x_t | x_0, x_T) = p(x_t | x_0) p(x_T | x_t) / p(x_T | x_0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import mpmath
import numpy as np
import sympy as sp
import torch

from sdeflow.errors import ScheduleError
from sdeflow.kernels.bridge import SquareRootBridge
from sdeflow.proof.certificate.density import domain, expanded, noise_of, require_quick, start
from sdeflow.proof.certificate.draws import integrated, levels_are_uniform
from sdeflow.proof.certificate.formulas import Reader
from sdeflow.proof.certificate.oracle import Oracle, ratio
from sdeflow.proof.certificate.subject import Subject, tensor
from sdeflow.symbolic.conditioned import end_symbols, horizon, named_drift
from sdeflow.symbolic.evaluate import DIFFERENCES, UnknownValue, Value, evaluate
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["bessel", "bridge", "clock", "line", "square_root_bridge"]

_PATHS = 20_000
_CUTOFF_NOISE, _CUTOFF_CLOCK = 2e-3, 1e-4

Array = np.ndarray
Answer = TypeVar("Answer")


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
    drift = evaluate(
        conditioned.drift, {**point, horizon(declaration): subject.T, end_symbols(declaration)[0]: float(end)}
    )
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


class _SquareRoot:
    """A square-root diffusion in the standard form of the module's text: u = side (x - origin)."""

    def __init__(self, subject: Subject) -> None:
        low, high = domain(subject, 0.0)
        if np.isfinite(high - low):
            raise UnknownValue("this is of square-root diffusions, and the SDE is one of Jacobi's.")
        self.origin, self.side = (low, 1.0) if np.isfinite(low) else (high, -1.0)
        self.behind, declaration = _behind(subject), subject.declaration
        _, q_1, _ = noise_of(subject)
        point = {**subject.numbers_of(0), declaration.state[0]: self.origin, time_symbol: 0.5 * subject.T}
        self.delta = 4.0 * float(evaluate(declaration.f, point) / evaluate(q_1, point))

    def moments(self, s: float, t: float) -> tuple[float, float]:
        """alpha and v of the way from s to t."""
        law = self.behind.law(np.array([t]), s)
        return float(law.phi[0, 0, 0, 0]), float(law.cov[0, 0, 0, 0])

    def log_density(self, x: float, x_0: float, s: float, t: float) -> mpmath.mpf:
        """log p(x at t | x_0 at s)."""
        u, u_0 = (self.side * (state - self.origin) for state in (x, x_0))
        return _of_bessel(_log_chi_squared, u, u_0, *self.moments(s, t), self.delta)

    def slope(self, x: float, x_0: float, s: float, t: float) -> float:
        """∂ log p(x at t | x_0 at s) / ∂x_0, by differences in 50 digits."""
        alpha, v = self.moments(s, t)
        u, u_0 = (self.side * (state - self.origin) for state in (x, x_0))

        def slope(*numbers: float) -> mpmath.mpf:
            u, u_0, *rest = numbers
            return mpmath.diff(lambda start: _log_chi_squared(u, start, *rest), u_0)

        return self.side * float(_of_bessel(slope, u, u_0, alpha, v, self.delta))


def bessel(subject: Subject) -> None:
    """The square-root kernel's density and score against mpmath, from arguments of the Bessel function of 1 to 1e9."""
    if np.isfinite(domain(subject, 0.0)).all():
        return
    process, at = _SquareRoot(subject), 0.5 * subject.T
    origin, side, delta = process.origin, process.side, process.delta
    alpha, v = process.moments(0.0, at)
    for size in (0.3, 30.0, 1e4, 1e9):
        # u_0 such that r is about ``size`` where u is its mean alpha² u_0 + delta v and a width on either side of it.
        l = 0.5 * (-delta + np.sqrt(delta**2 + 4.0 * size**2))
        u_0 = l * v / alpha**2
        width = v * np.sqrt(2.0 * (2.0 * l + delta))
        u = np.maximum((l + delta) * v + np.array([-1.0, 0.4, 2.0]) * width, 0.05 * v)
        x, x_0 = (tensor((origin + side * w).reshape(-1, 1)) for w in (u, np.full(3, u_0)))
        u, u_0 = np.abs(x.numpy()[:, 0] - origin), abs(float(x_0[0, 0]) - origin)  # as rounded
        exact = np.array([[float(part) for part in _of_bessel(_chi_squared, w, u_0, alpha, v, delta)] for w in u])
        found = subject.kernel.log_prob(x, x_0, at).numpy()
        score = side * subject.kernel.score(x, x_0, at).numpy()[:, 0]
        lost = 1e-15 * abs(origin) / width + 2e-15 * size * (size > 1e6) + 1e-15 * (delta + l)
        subject.note(
            "kernel.log_prob", f"= mpmath's, Bessel's argument {size:.0e}", found - exact[:, 0], 1e-8, at, doubt=lost
        )
        unit = (score - exact[:, 1]) * width
        subject.note("kernel.score", f"= mpmath's, Bessel's argument {size:.0e}", unit, 1e-6, at, doubt=10 * lost)


def square_root_bridge(subject: Subject) -> None:
    """A square-root bridge by Bayes, by mpmath's densities; its moments and paths by the integral of its density."""
    if not hasattr(subject.sde, "bridge"):
        return
    if np.isfinite(domain(subject, 0.0)).all():
        raise UnknownValue("none is known of a Jacobi diffusion.")
    require_quick(subject, 3000)
    process, kernel, T = _SquareRoot(subject), subject.kernel, subject.T
    x_0 = torch.as_tensor(start(subject))
    x_T = kernel.sample(x_0, T, noise=torch.full((1, 1), 0.6, dtype=torch.float64))
    conditioned, (begin, end) = subject.sde.bridge(x_T[0]), (float(x_0), float(x_T))
    if not isinstance(conditioned, SquareRootBridge):
        raise UnknownValue("its bridge has no density.")
    times = (0.31 * T, 0.77 * T)
    try:
        *drawn, ended = conditioned.paths(x_0.expand(_PATHS, 1), [*times, T], seed=16).numpy()[..., 0]
    except ScheduleError as error:
        raise UnknownValue(f"its paths are refused: {error}") from error
    subject.note("bridge.paths", "they end in x_T", ratio(ended - end, np.asarray(1 + abs(end))), 1e-9, T)
    whole = process.log_density(end, begin, 0.0, T)
    for at, states in zip(times, drawn, strict=True):

        def density(x: torch.Tensor, at: float = at) -> torch.Tensor:
            return conditioned.log_prob(x, x_0.expand(len(x), 1), at)

        levels, mean, std = integrated(subject, states, at, density)
        levels_are_uniform(subject, "bridge.paths", "they have the bridge's density", levels, at)
        told = [float(moment) for moment in conditioned.moments(x_0, at)]
        off = np.array([told[0] - mean, told[1] - std]) / std
        subject.note("bridge.moments", "mean and spread of its density", off, 1e-5, at)
        x = np.quantile(states, [0.02, 0.2, 0.5, 0.8, 0.98])
        ways = [(process.log_density(w, begin, 0.0, at), process.log_density(end, w, at, T)) for w in x.tolist()]
        exact = np.array([float(before + after - whole) for before, after in ways])
        lost = 1e-14 * max(abs(float(part)) for part in (*ways[0], whole))
        found = density(torch.as_tensor(x[:, None])).numpy()
        subject.note("bridge.log_prob", "p(x_t | x_0) p(x_T | x_t) / p(x_T | x_0)", found - exact, 1e-8, at, doubt=lost)
        _drift_to_the_end(subject, process, conditioned.drift, x[1:4], end, at)


def _drift_to_the_end(subject: Subject, process: _SquareRoot, drift: sp.Expr, x: Array, end: float, at: float) -> None:
    """The drift that is shown, at states (n,)."""
    declaration, numbers = subject.declaration, subject.numbers_of(0)
    if drift == named_drift(declaration):
        raise UnknownValue("SymPy takes too long to write its drift.")
    (state,), reader = declaration.state, Reader(process.behind, numbers)
    ends = {horizon(declaration): subject.T, end_symbols(declaration)[0]: end}
    found = np.concatenate([reader.at(drift, at, {state: w, **ends}) for w in x.tolist()])
    point: dict[sp.Symbol, Value] = {**numbers, state: x, time_symbol: at}
    f, gram = evaluate(declaration.f, point), evaluate(declaration.g, point) ** 2
    pull = gram * np.array([process.slope(end, w, at, subject.T) for w in x.tolist()])
    size = np.abs(f) + np.abs(pull) + np.sqrt(gram / subject.T)
    subject.note("bridge.drift", "f + g² ∂ log p(x_T | x_t) / ∂x_t", ratio(found - f - pull, size), 1e-6, at)


def _of_bessel(function: Callable[..., Answer], *numbers: float) -> Answer:
    """A function of (u, u_0, alpha, v, delta) in 50 digits.

    Raises:
        UnknownValue: where mpmath does not sum the Bessel function.
    """
    with mpmath.workdps(50):
        try:
            return function(*map(mpmath.mpf, numbers))
        except (ZeroDivisionError, mpmath.libmp.NoConvergence) as error:
            order = 0.5 * numbers[-1] - 1.0
            raise UnknownValue(f"mpmath has no Bessel function of the order {order:.3g}.") from error


def _log_chi_squared(u: mpmath.mpf, u_0: mpmath.mpf, alpha: mpmath.mpf, v: mpmath.mpf, delta: mpmath.mpf) -> mpmath.mpf:
    """log p(u | u_0)."""
    nu, l = delta / 2 - 1, alpha**2 * u_0
    value = mpmath.besseli(nu, mpmath.sqrt(u * l) / v)
    return nu / 2 * mpmath.log(u / l) - (u + l) / (2 * v) + mpmath.log(value) - mpmath.log(2 * v)


def _chi_squared(
    u: mpmath.mpf, u_0: mpmath.mpf, alpha: mpmath.mpf, v: mpmath.mpf, delta: mpmath.mpf
) -> tuple[mpmath.mpf, mpmath.mpf]:
    """log p(u | u_0) and its derivative in u."""
    nu, l = delta / 2 - 1, alpha**2 * u_0
    r = mpmath.sqrt(u * l) / v
    ahead = mpmath.besseli(nu + 1, r) / mpmath.besseli(nu, r) + nu / r  # I' / I
    score = nu / (2 * u) - 1 / (2 * v) + ahead * mpmath.sqrt(l / u) / (2 * v)
    return _log_chi_squared(u, u_0, alpha, v, delta), score
