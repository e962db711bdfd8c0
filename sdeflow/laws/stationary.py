r"""The stationary law of an SDE whose f and g do not depend on t.

In one dimension the Fokker-Planck equation is ∂_t p = -∂_x J with the flux J = f p - ½ ∂_x (g² p). The stationary law
without flux is

    p(x) = exp(∫ 2 f / g² dx) / (Z g²)

if it can be normalised (Karlin & Taylor 1981, 15.5); if not, there is none (Brownian motion, geometric Brownian
motion). It is tabulated on the interval around the data on which g² > 0, in a variable u that maps this interval to the
real line: x = sinh u, a ± e^u or a + (b - a) / (1 + e^-u). The table ends where p dx/du is e^46 times smaller than its
peak.

The same table gives the speed of convergence of p_t. The generator is symmetric in L²(1/p), and the cells of a
finite-volume scheme exchange probability at the rates 1 / ∫ 2 dx / (g² p), which are exact for the stationary law. The
spectrum of this scheme gives the relaxation rates, and carries any law from time 0 to T.

For underdamped Langevin dynamics, of a position and a velocity, the stationary law is Boltzmann's
exp(-Φ(x) - v² / (2 θ)) (``sdeflow.symbolic.langevin``). The law of the position is found as above, with the drift -Φ'
and the noise √2.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sdeflow.laws.boltzmann import BoltzmannLaw
from sdeflow.laws.drawn import DrawnLaw
from sdeflow.numerics.checks import checked_point
from sdeflow.numerics.compile import compile_expressions
from sdeflow.numerics.noise import NoiseStream
from sdeflow.numerics.parameters import Declared, Values
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.langevin import find_langevin
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["StationaryLaw", "stationary_law"]

_FALL = 46.0  # nats below the peak where a tail is cut: e^-46 = 1e-20
_FURTHEST = 40.0  # the largest |u| of the table: |x| up to 1e17
_LEAST_FALL, _LEAST_RATE = 14.0, 0.1  # required there, in nats and in nats per unit of u: mass left out e^-14 / 0.1
_OVERFLOW = 1e100  # a coefficient above it overflows farther out
_LOOK = 16  # nodes of the first table
_NODES = 4097
_GAUSS, _COARSE = np.polynomial.legendre.leggauss(6), np.polynomial.legendre.leggauss(3)
_CELLS, _TAIL = 400, 1e-4
_STARTS = (0.0, 1.0, 0.5, -1.0, 0.1, 2.0, 10.0, -0.5, 100.0)


def stationary_law(sde: Declared, near: float | None = None) -> StationaryLaw | BoltzmannLaw | None:
    """The stationary law of an elementwise SDE or of Langevin dynamics, if f and g do not depend on t; None if unknown.

    Args:
        sde: the declaration.
        near: a state in the interval of the law. By default the first of 0, 1, 0.5, -1, ... at which g is not zero.
    """
    declaration = sde.declaration
    depends = any(e.has(time_symbol) for e in (*declaration.drifts, *declaration.diffusions))
    if depends or sde.values.shape or getattr(sde, "basis", None) is not None:
        return None
    if declaration.coupled:
        return _boltzmann(declaration, sde.values, near)
    return _elementwise(declaration, sde.values, near)


def _elementwise(declaration: Declaration, values: Values, near: float | None) -> StationaryLaw | None:
    coefficients = _Coefficients(declaration, values)
    for state in _STARTS if near is None else (near,):
        f, g = (float(v[0]) for v in coefficients(np.array([state])))
        if math.isfinite(f) and math.isfinite(g) and g != 0:
            return _on_interval(declaration, coefficients, state)
    return None


def _boltzmann(declaration: Declaration, values: Values, near: float | None) -> BoltzmannLaw | None:
    """Boltzmann's law of underdamped Langevin dynamics; None for another SDE, or if its mass is infinite."""
    found = find_langevin(declaration)
    if found is None:
        return None
    time = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        temperature = float(compile_expressions(found.temperature, (time_symbol,), values, declaration.T)(time))
    of_position = _elementwise(found.overdamped(declaration), values, near) if temperature > 0 else None
    return None if of_position is None else BoltzmannLaw(of_position, temperature, found.position, found.velocity)


class _Coefficients:
    """f and g as functions of arrays."""

    def __init__(self, declaration: Declaration, values: Values) -> None:
        self._given = declaration, values
        self._compiled = compile_expressions((declaration.f, declaration.g), declaration.state, values, declaration.T)

    def __reduce__(self) -> tuple:
        return _Coefficients, self._given

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            f, g = self._compiled(torch.as_tensor(np.array(x, dtype=np.float64)))
        return f.numpy(), g.numpy()

    def g(self, x: Tensor) -> Tensor:
        """g at states in float64."""
        return self._compiled(x)[1]


class _Interval:
    """The map x(u) of the real line onto (low, high); either end may be infinite."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def state(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x and dx/du."""
        if math.isinf(self.low) and math.isinf(self.high):
            return np.sinh(u), np.cosh(u)
        if math.isinf(self.high):
            return self.low + np.exp(u), np.exp(u)
        if math.isinf(self.low):
            return self.high - np.exp(-u), np.exp(-u)
        length, part = self.high - self.low, 1.0 / (1.0 + np.exp(-u))
        return np.where(u < 0, self.low + length * part, self.high - length * (1.0 - part)), length * part * (1 - part)

    def line(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u and log dx/du, for x inside the interval."""
        if math.isinf(self.low) and math.isinf(self.high):
            return torch.asinh(x), 0.5 * torch.log1p(x * x)
        if math.isinf(self.high):
            u = torch.log(x - self.low)
            return u, u
        if math.isinf(self.low):
            u = -torch.log(self.high - x)
            return u, -u
        left, right = torch.log(x - self.low), torch.log(self.high - x)
        return left - right, left + right - math.log(self.high - self.low)

    def __repr__(self) -> str:
        return f"({self.low:g}, {self.high:g})"


def _edge(coefficients: _Coefficients, inside: float, direction: float) -> float:
    """The nearest point in one direction where g is zero, changes its sign or is not finite; else infinity."""
    first = float(coefficients(np.array([inside]))[1][0])

    def is_inside(x: np.ndarray) -> np.ndarray:
        f, g = coefficients(x)
        return (g * first > 0) & np.isfinite(g) & np.isfinite(f) & (np.abs(g) > 1e-12 * abs(first))

    scan = inside + direction * np.concatenate([np.linspace(0, 4, 4001)[1:], np.geomspace(4, 1e6, 4000)[1:]])
    outside = np.flatnonzero(~is_inside(scan))
    if not len(outside) or abs(scan[outside[0]]) > 1e5:  # an overflow far out is not an end of the interval
        return direction * math.inf
    good, end = (inside if outside[0] == 0 else scan[outside[0] - 1]), scan[outside[0]]
    for _ in range(100):  # bisection
        middle = 0.5 * (good + end)
        good, end = (middle, end) if is_inside(np.array([middle]))[0] else (good, middle)
    if max(abs(float(value[0])) for value in coefficients(np.array([good]))) > _OVERFLOW:
        return direction * math.inf  # such as sinh(x) at 710
    return float(round(end, 10))


def _on_interval(declaration: Declaration, coefficients: _Coefficients, inside: float) -> StationaryLaw | None:
    """The law on the interval around ``inside``, tabulated where it is not negligible; None if not normalisable."""
    interval = _Interval(*(_edge(coefficients, inside, direction) for direction in (-1.0, 1.0)))
    centre = float(interval.line(torch.tensor(inside, dtype=torch.float64))[0])
    with np.errstate(all="ignore"):
        u = centre + np.linspace(-_FURTHEST, _FURTHEST, 5121)
        table = _Table(coefficients, interval, u, len(u) // 2)
    log_p, finite = table.log_p, np.isfinite(table.log_p) & table.resolved
    left, right = _finite_run(finite, len(u) // 2)
    peak = log_p[left:right].max() if right > left else -math.inf
    high = left + np.flatnonzero(log_p[left:right] > peak - _FALL)
    if not len(high):
        return None
    first, last = max(high[0] - 1, left), min(high[-1] + 1, right - 1)
    for end, inwards in ((first, 1), (last, -1)):  # is p small at the ends of the table, and does it fall?
        rate = (log_p[end + inwards * _LOOK] - log_p[end]) / (_LOOK * (u[1] - u[0])) if last - first > _LOOK else 0.0
        if not (log_p[end] < peak - _LEAST_FALL and rate > _LEAST_RATE):
            return None
    u = np.linspace(u[first], u[last], _NODES)
    return StationaryLaw(declaration, coefficients, interval, _Table(coefficients, interval, u, _NODES // 2))


def _finite_run(finite: np.ndarray, middle: int) -> tuple[int, int]:
    """The bounds of the run of finite entries around the middle one."""
    left, right = np.flatnonzero(~finite[: middle + 1]), np.flatnonzero(~finite[middle:])
    return (left[-1] + 1 if len(left) else 0), (middle + right[0] if len(right) else len(finite))


class _Table:
    """On nodes u: the potential ∫ 2 f / g² dx from the node ``origin``, its slope in u, and log(Z p dx/du)."""

    def __init__(self, coefficients: _Coefficients, interval: _Interval, u: np.ndarray, origin: int) -> None:
        self.u = u
        steps, rough = (self._integrals(coefficients, interval, u, rule) for rule in (_GAUSS, _COARSE))
        resolved = np.abs(steps - rough) < 0.05 + 0.01 * np.abs(steps)  # false for a drift that oscillates far out
        self.resolved = np.concatenate([resolved[:1], resolved[1:] & resolved[:-1], resolved[-1:]])
        self.potential = np.concatenate([-np.cumsum(steps[:origin][::-1])[::-1], [0.0], np.cumsum(steps[origin:])])
        self.slope = self._slope(coefficients, interval, u)
        self.x, self.dx = interval.state(u)
        self.g = coefficients(self.x)[1]
        self.log_p = self.potential + np.log(self.dx) - 2.0 * np.log(np.abs(self.g))

    def _integrals(
        self, coefficients: _Coefficients, interval: _Interval, u: np.ndarray, rule: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        half, (nodes, weights) = 0.5 * np.diff(u)[:, None], rule
        middles = 0.5 * (u[1:] + u[:-1])[:, None]
        return (half * self._slope(coefficients, interval, middles + half * nodes) * weights).sum(1)

    @staticmethod
    def _slope(coefficients: _Coefficients, interval: _Interval, u: np.ndarray) -> np.ndarray:
        x, dx = interval.state(u)
        f, g = coefficients(x)
        return 2.0 * f / g**2 * dx


class StationaryLaw(DrawnLaw):
    """The stationary law p ∝ exp(∫ 2 f / g²) / g² of an elementwise SDE; coordinates are independent.

    Attributes:
        low, high: the ends of its interval.
        mean, std: its moments.
    """

    def __init__(
        self, declaration: Declaration, coefficients: _Coefficients, interval: _Interval, table: _Table
    ) -> None:
        self.declaration, self._interval, self._table = declaration, interval, table
        self._coefficients = coefficients
        self.low, self.high = interval.low, interval.high
        p = np.exp(table.log_p - table.log_p.max())
        mass = np.maximum(_panels(p, table.u), 0.0)
        self._mass, self._p = mass / mass.sum(), p / mass.sum()
        self._cumulative = np.concatenate([[0.0], np.cumsum(self._mass)])
        self._log_z = table.log_p.max() + math.log(mass.sum())
        self.mean = float(_panels(self._p * table.x, table.u).sum())
        self.std = math.sqrt(float(_panels(self._p * (table.x - self.mean) ** 2, table.u).sum()))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (batch,) in float64, for x (batch, *event); -inf outside the interval."""
        x = checked_point(x, sides=2).to(torch.float64)
        inside = (x > self.low) & (x < self.high)
        safe = torch.where(inside, x, torch.full_like(x, float(self._table.x[_NODES // 2])))
        u, _ = self._interval.line(safe)
        g = self._coefficients.g(safe)
        log_p = self._potential(u) - 2.0 * g.abs().log() - self._log_z
        return torch.where(inside, log_p, -math.inf).flatten(1).sum(1)

    def drawn(self, shape: tuple[int, ...], noise: NoiseStream) -> Tensor:
        """By inversion of the distribution function."""
        return self.quantile(noise.uniform(shape, torch.float64))

    def quantile(self, probability: Tensor) -> Tensor:
        """The quantile function, the inverse of :meth:`cdf`, in the shape of ``probability``, in float64."""
        u = np.interp(probability.double().cpu().numpy(), self._cumulative, self._table.u)
        return torch.as_tensor(self._interval.state(u)[0])

    def cdf(self, x: Tensor) -> Tensor:
        """The distribution function, in the shape of ``x``, in float64."""
        inside = x.double().cpu().clamp(self._table.x[0], self._table.x[-1])
        return torch.as_tensor(np.interp(self._interval.line(inside)[0].numpy(), self._table.u, self._cumulative))

    @property
    def relaxation_time(self) -> float:
        """1 / the smallest rate at which p_t converges to this law."""
        return float(-1.0 / np.sort(self._spectrum[0])[-2])

    def distance_at(self, time: float, mean: Tensor | float | None, std: Tensor | float | None) -> float:
        """The total variation distance between this law and x_t of N(mean, std²) data; the largest over coordinates.

        Without moments, data at the 2 % quantile and at the 98 % quantile of this law is taken.
        """
        edges = self._interval.state(self._table.u[self._edges])[0]
        if mean is None or std is None:
            cdf = self._cumulative[self._edges]
            start = np.stack([(cdf[1:] >= q) & (cdf[:-1] < q) for q in (0.02, 0.98)], axis=1).astype(float)
        else:
            m, s = (np.atleast_1d(np.asarray(torch.as_tensor(v).double().cpu()).reshape(-1)) for v in (mean, std))
            below = 0.5 * (1.0 + torch.erf(torch.as_tensor((edges[:, None] - m) / (math.sqrt(2.0) * s)))).numpy()
            below[0], below[-1] = 0.0, 1.0
            start = np.diff(below, axis=0)
        rates, vectors, mass = self._spectrum
        root = np.sqrt(mass)[:, None]
        later = root * (vectors @ (np.exp(rates * time)[:, None] * (vectors.T @ (start / root))))
        return float(0.5 * np.abs(later - mass[:, None]).sum(0).max())

    @cached_property
    def _edges(self) -> np.ndarray:
        """Nodes that bound the cells. Each tail is one cell, because the rates near an end are unbounded."""
        first, last = np.searchsorted(self._cumulative, [_TAIL, 1.0 - _TAIL])
        inner = np.unique(np.linspace(first, last, _CELLS + 1).round().astype(int))
        return np.concatenate([[0], inner, [_NODES - 1]])

    @cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues (not positive) and eigenvectors of the symmetrised generator, and the masses of the cells."""
        from scipy.linalg import eigh_tridiagonal

        table, edges = self._table, self._edges
        mass = np.add.reduceat(self._mass, edges[:-1])
        density = 2.0 * table.dx**2 / (table.g**2 * self._p)
        resistance = 0.5 * (density[1:] + density[:-1]) * (table.u[1] - table.u[0])
        middles = (edges[1:] + edges[:-1]) // 2
        middles[0], middles[-1] = 2 * edges[1] - middles[1], 2 * edges[-2] - middles[-2]  # a tail's mass is at its edge
        exchange = 1.0 / np.add.reduceat(resistance[: middles[-1]], middles[:-1])
        out = np.concatenate([exchange, [0.0]]) + np.concatenate([[0.0], exchange])
        rates, vectors = eigh_tridiagonal(-out / mass, exchange / np.sqrt(mass[1:] * mass[:-1]))
        return np.minimum(rates, 0.0), vectors, mass

    def _potential(self, u: Tensor) -> Tensor:
        """The potential, by cubic Hermite interpolation in the table and linear extrapolation outside of it."""
        nodes, values, slopes = (
            torch.as_tensor(v, device=u.device) for v in (self._table.u, self._table.potential, self._table.slope)
        )
        h = nodes[1] - nodes[0]
        inside = u.clamp(nodes[0], nodes[-1])
        i = ((inside - nodes[0]) / h).floor().long().clamp(0, len(nodes) - 2)
        r = (inside - nodes[i]) / h
        left = (1 + 2 * r) * (1 - r) ** 2 * values[i] + r * (1 - r) ** 2 * h * slopes[i]
        right = r**2 * (3 - 2 * r) * values[i + 1] + r**2 * (r - 1) * h * slopes[i + 1]
        return left + right + (u - inside) * torch.where(u < inside, slopes[0], slopes[-1])

    def __repr__(self) -> str:
        f, g = self.declaration.f, self.declaration.g
        return (
            f"StationaryLaw(dx = [{f}] dt + {g} dw on {self._interval}, mean={self.mean:.6g}, std={self.std:.6g}, "
            f"relaxation time {self.relaxation_time:.3g})"
        )


def _panels(values: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The integral over each panel, by a cubic through four nodes; values outside of the table are 0."""
    padded = np.concatenate([[0.0], values, [0.0]])
    return (u[1] - u[0]) * (13.0 * (values[1:] + values[:-1]) - padded[:-3] - padded[3:]) / 24.0
