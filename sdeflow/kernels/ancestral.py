r"""The number of lineages in Kingman's coalescent with mutation, behind every Jacobi (Wright-Fisher) diffusion.

A pure death process that starts from infinity and goes from k to k - 1 at the rate d_k = ½ k (k - 1 + θ) has M lineages
left at the time tau, with the probability

    q_m = P(M = m) = 1/(2πi) ∫ e^{s tau} / (s + d_m) Π_{k>m} d_k / (d_k + s) ds,
    P(M <= m) = 1/(2πi) ∫ e^{s tau} / s Π_{k>m} d_k / (d_k + s) ds,
    Π_{k>m} d_k / (d_k + s) = Γ(m + 1 - r_1) Γ(m + 1 - r_2) / (Γ(m + 1) Γ(m + θ)),     r_1 + r_2 = 1 - θ, r_1 r_2 = 2 s,

and a Jacobi diffusion is a mixture over M (Griffiths 1979; Jenkins & Spanò, arXiv:1506.06998). The known series for
q_m alternates, and loses all digits at small tau; here the integral is taken along a parabola through its saddle point,
on which nothing oscillates, by the trapezoidal rule. q_m then has 1e-10 of its own size, however small it is, and is a
smooth function of real m >= 0.

Given M = m and the start u_0, the diffusion is at a Beta(A + l, B + m - l) variable, l ~ Binomial(m, u_0), so that

    p(u | u_0) = Σ_m q_m Σ_l C(m, l) u_0^l (1 - u_0)^(m - l) Beta(u; A + l, B + m - l),

whose terms are all positive: it keeps its digits in the far tails and under a strong drift. The terms are nearly a
Gaussian in (m, l), and where that is wide, every second, third, ... of them serves as a trapezoidal rule.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

__all__ = ["draw_count", "log_count", "mixture", "typical_count"]

_STEP, _NODES = 0.25, 64  # of the trapezoidal rule, in units of the integrand's width
_ROUNDS, _BISECTIONS = 60, 16
_FEW = 64  # draws of one law, each of which is searched for
_OWN = 8  # terms of a sum before it is taken as an integral
_GAUSS = np.polynomial.legendre.leggauss(16)
Array = np.ndarray


def typical_count(tau: Array, theta: Array) -> tuple[Array, Array]:
    """The mean of M where the death process is followed as a flow, and about its standard deviation."""
    a = 0.5 * (theta - 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        n = np.where(np.abs(a * tau) < 1e-8, 2.0 / tau, a / np.tanh(0.5 * a * tau))
    mean = np.maximum(n - 0.5 - a, 0.0)
    n = mean + 0.5 + a
    _, curvature, _ = _shape(np.zeros_like(n), mean + 1.0, theta)
    rate = 0.5 * (mean + 1.0) * np.maximum(mean + theta, 0.5)
    return mean, np.sqrt(curvature) * rate + 0.5


def log_count(m: Array, tau: Array, theta: Array, rates: bool = False) -> tuple[Array, ...]:
    """log q_m for real m >= 0, and with ``rates`` its derivatives in tau and theta; arguments of one shape."""
    s, weight = _contour(_saddle(m, tau, theta), m, theta)
    m, tau, theta = (part[..., None] for part in (m, tau, theta))
    exponent = s * tau + _log_product(s, m, theta) - np.log(s + _rate(m, theta))
    peak = exponent.real.max(-1, keepdims=True)
    terms = np.exp(exponent - peak) * weight
    total = terms.imag.sum(-1)
    log_q = np.log(total / np.pi) + peak[..., 0]
    if not rates:
        return (log_q,)
    of_tau = (terms * s).imag.sum(-1) / total
    slope = _theta_rate(s, m, theta) - 0.5 * m / (s + _rate(m, theta))
    return log_q, of_tau, (terms * slope).imag.sum(-1) / total


def _rough_log_count(m: Array, tau: Array, theta: Array) -> Array:
    """log q_m by the saddle point alone, which finds the largest terms."""
    s = _saddle(m, tau, theta)
    exponent = s * tau + _log_product(s, m, theta).real - np.log(s + _rate(m, theta))
    return exponent - 0.5 * np.log(2.0 * np.pi * _shape(s, m, theta)[1])


def draw_count(level: Array, tau: Array, theta: Array) -> Array:
    """The M whose distribution function first reaches ``level``; arguments of one shape, (n,)."""
    level = np.clip(level, 1e-15, 1.0 - 1e-15)
    drawn, left = np.empty_like(level), np.ones(len(level), dtype=bool)
    laws, law_of, counts = np.unique(np.stack([tau, theta]), axis=1, return_inverse=True, return_counts=True)
    for i in np.flatnonzero(counts > _FEW):  # many draws of one law: from a table of its distribution function
        rows = np.flatnonzero(law_of.reshape(-1) == i)
        mean, std = (float(part) for part in typical_count(laws[0, i], laws[1, i]))
        m = np.arange(max(0.0, math.floor(mean - 7.0 * std)), math.ceil(mean + 7.0 * std) + 1.0)
        if len(m) > len(rows):
            continue
        with np.errstate(all="ignore"):
            own = np.full(len(m), laws[0, i]), np.full(len(m), laws[1, i])
            table = _excess(m, *own, np.full(len(m), 0.5))
        if not (np.diff(table) > 0).all():  # late, when hardly a lineage is left, its far tails are lost
            continue
        place = np.searchsorted(table, special.ndtri(level[rows]))
        inside = (place < len(m)) & ((place > 0) | (m[0] == 0.0))
        drawn[rows[inside]], left[rows[inside]] = m[place[inside]], False
    if left.any():
        drawn[left] = _searched(level[left], tau[left], theta[left])
    return drawn


def _searched(level: Array, tau: Array, theta: Array) -> Array:
    mean, std = typical_count(tau, theta)
    at_zero = _excess(np.zeros_like(mean), tau, theta, level)
    m, before = np.maximum(mean + std * special.ndtri(level), 0.0), mean
    low, high = np.zeros_like(mean), np.full_like(mean, np.inf)
    excess_before = _excess(before, tau, theta, level)
    left = np.flatnonzero(at_zero < 0)
    for _ in range(_ROUNDS):
        if not left.size:
            break
        excess = _excess(m[left], tau[left], theta[left], level[left])
        low[left] = np.where(excess < 0, m[left], low[left])
        high[left] = np.where(excess < 0, high[left], m[left])
        with np.errstate(divide="ignore", invalid="ignore"):
            step = -excess * (m[left] - before[left]) / (excess - excess_before[left])
        step = np.where(np.isfinite(step), step, np.where(excess < 0, std[left], -std[left]))
        ahead = m[left] + np.clip(step, -4.0 * std[left], 4.0 * std[left])
        outside = (ahead < low[left]) | (ahead > high[left])
        middle = np.where(np.isinf(high[left]), m[left] + std[left], 0.5 * (low[left] + high[left]))
        before[left], excess_before[left] = m[left], excess
        m[left] = np.where(outside, middle, ahead)
        left = left[(np.abs(m[left] - before[left]) > 1e-7) & (np.ceil(low[left]) != np.ceil(high[left]))]
    return np.where(at_zero >= 0, 0.0, np.ceil(m))


def _excess(m: Array, tau: Array, theta: Array, level: Array) -> Array:
    """Φ⁻¹(P(M <= m)) - Φ⁻¹(level), from whichever of the two tails is the smaller."""
    saddle, (_, at_zero, _) = _saddle(m + 1.0, tau, theta), _shape(np.zeros_like(m), m + 1.0, theta)
    upper = saddle * np.sqrt(at_zero) < -2.0  # there 1 - P, whose contour lies on the other side of the pole at 0
    centre = np.where(upper, saddle, np.maximum(saddle, 1.2 / np.sqrt(at_zero)))
    s, weight = _contour(centre, m + 1.0, theta)
    m, tau, theta = (part[..., None] for part in (m, tau, theta))
    terms = np.exp(s * tau + _log_product(s, m, theta)) / s * weight
    tail = np.clip(np.where(upper, -1.0, 1.0) * terms.imag.sum(-1) / np.pi, 1e-300, 1.0 - 1e-16)
    return np.where(upper, -special.ndtri(tail), special.ndtri(tail)) - special.ndtri(level)


def _rate(k: Array, theta: Array) -> Array:
    return 0.5 * k * (k - 1.0 + theta)


def _roots(s: Array, theta: Array) -> tuple[Array, Array]:
    middle, half = 0.5 * (1.0 - theta), 0.5 * np.sqrt((theta - 1.0) ** 2 - 8.0 * s + 0j)
    return middle + half, middle - half


def _log_product(s: Array, m: Array, theta: Array) -> Array:
    """log Π_{k>m} d_k / (d_k + s)."""
    first, second = _roots(s, theta)
    own = special.loggamma(m + 1.0 - first) + special.loggamma(m + 1.0 - second)
    return own - special.gammaln(m + 1.0) - special.gammaln(m + theta)


def _theta_rate(s: Array, m: Array, theta: Array) -> Array:
    """The derivative of :func:`_log_product` in theta: Σ_{k>m} (½ k / d_k - ½ k / (d_k + s))."""
    first, second = _roots(s, theta)
    gap = first - second
    gap = np.where(
        np.abs(gap) < 1e-6, 1e-6, gap
    )  # dr_1/dθ = r_1 / (r_2 - r_1), from r_1 r_2 = 2 s and r_1 + r_2 = 1 - θ
    of_first = special.digamma(m + 1.0 - first) * first / gap
    of_second = special.digamma(m + 1.0 - second) * second / gap
    return of_first - of_second - special.digamma(m + theta)


def _saddle(m: Array, tau: Array, theta: Array) -> Array:
    """About the s at which Σ_{k>=m} 1 / (d_k + s) = tau, by Newton's method on the convex sum."""
    least = -_rate(m, theta) + 1.0 / tau  # where the first term alone is tau
    centre = np.maximum(_saddle_of_integral(m, tau, theta), least)
    for _ in range(8):
        total, second, _ = _shape(centre, m, theta)
        centre = np.maximum(centre + (total - tau) / second, least)
    return centre


def _saddle_of_integral(m: Array, tau: Array, theta: Array) -> Array:
    """The same with the sum as the integral from m - ½ on."""
    n = m - 0.5 + 0.5 * (theta - 1.0)
    target = 0.5 * n * tau  # z / tanh(z) where it is above 1, with w = -(2 z / tau)², else z / tan(z) and +(2 z / tau)²
    low, high = np.zeros_like(n), np.where(target > 1.0, target + 1.0, np.pi - 1e-9)
    for _ in range(_BISECTIONS):
        z = 0.5 * (low + high)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.where(target > 1.0, z / np.tanh(z), z / np.tan(z))
        above = np.where(target > 1.0, value > target, value < target)
        low, high = np.where(above, low, z), np.where(above, z, high)
    w = np.where(target > 1.0, -1.0, 1.0) * (2.0 * z / tau) ** 2
    return 0.5 * (w + 0.25 * (theta - 1.0) ** 2)


def _shape(s: Array, first: Array, theta: Array) -> tuple[Array, Array, Array]:
    """Σ 1 / (d_k + s), Σ 1 / (d_k + s)² and Σ 1 / (d_k + s)³ over k >= ``first``: some terms, and about the rest."""
    n = first + _OWN - 0.5 + 0.5 * (theta - 1.0)  # the rest is an integral from first + _OWN - ½ on
    w = 2.0 * s - 0.25 * (theta - 1.0) ** 2
    nodes, weights = _GAUSS  # in 1 / z
    v = 0.5 * (nodes + 1.0) / n[..., None]
    inverse = 2.0 * v**2 / np.maximum(1.0 + w[..., None] * v**2, 1e-12)
    measure = 0.5 * weights / n[..., None] / v**2
    own = 1.0 / np.maximum(_rate(first[..., None] + np.arange(_OWN), theta[..., None]) + s[..., None], 1e-300)
    return tuple((own**p).sum(-1) + (inverse**p * measure).sum(-1) for p in (1, 2, 3))


def _contour(centre: Array, first: Array, theta: Array) -> tuple[Array, Array]:
    """Nodes s on the parabola of steepest descent through ``centre``, above the real axis, and ds."""
    _, second, third = _shape(centre, first, theta)
    bend, width = third / (3.0 * second), 1.0 / np.sqrt(second)
    y = ((np.arange(_NODES) + 0.5) * _STEP) * width[..., None]
    bend, width = bend[..., None], width[..., None]
    return centre[..., None] + 1j * y - bend * y**2, (1j - 2.0 * bend * y) * _STEP * width


# -------------------------------------------------------------------- the mixture


def mixture(u: float, u_0: float, tau: float, A: float, B: float) -> tuple[float, np.ndarray]:
    """log p(u | u_0) of the Jacobi diffusion, and its derivatives in u, u_0, tau, A and B."""
    m, step = _window(u, u_0, tau, A, B)
    own = np.full(len(m), tau), np.full(len(m), A + B)
    log_q, of_tau, of_theta = log_count(m, *own, rates=True)
    best = _best(m, u, u_0, A, B)
    curvature = 1.0 / np.maximum(best, 0.5) + 1.0 / np.maximum(m - best, 0.5) + 1.0 / (A + best) + 1.0 / (B + m - best)
    spread = float((1.0 / np.sqrt(curvature)).max())
    stride = max(1.0, np.floor(spread / 2.5))
    offsets = (
        np.arange(-np.ceil(_REACH * (spread + 0.5) / stride), np.ceil(_REACH * (spread + 0.5) / stride) + 1) * stride
    )
    m, left = m[:, None], np.rint(best)[:, None] + offsets
    inside = (left >= 0) & (left <= m)
    left = np.clip(left, 0.0, m)
    terms = np.where(inside, log_q[:, None] + _log_terms(m, left, u, u_0, A, B), -np.inf)
    peak = terms.max()
    share = np.exp(terms - peak)
    total = share.sum()
    share = share / total
    above = special.digamma(A + B + m)
    slopes = (
        (A + left - 1.0) / u - (B + m - left - 1.0) / (1.0 - u),
        _ratio(left, u_0) - _ratio(m - left, 1.0 - u_0),
        of_tau[:, None],
        of_theta[:, None] + np.log(u) + above - special.digamma(A + left),
        of_theta[:, None] + np.log1p(-u) + above - special.digamma(B + m - left),
    )
    return float(peak + np.log(total * step * stride)), np.array([float((share * slope).sum()) for slope in slopes])


_REACH = 8.5  # of the windows, in standard deviations
_LOOK = 24


def _ratio(count: Array, probability: float) -> Array:
    return np.where(count > 0, count, 0.0) / max(probability, 1e-300)


def _log_terms(m: Array, left: Array, u: float, u_0: float, A: float, B: float) -> Array:
    """log of C(m, l) u_0^l (1 - u_0)^(m - l) Beta(u; A + l, B + m - l)."""
    right = m - left
    chosen = special.gammaln(m + 1.0) - special.gammaln(left + 1.0) - special.gammaln(right + 1.0)
    chosen = chosen + special.xlogy(left, u_0) + special.xlog1py(right, -u_0)
    density = (A + left - 1.0) * np.log(u) + (B + right - 1.0) * np.log1p(-u)
    return chosen + density + special.gammaln(A + B + m) - special.gammaln(A + left) - special.gammaln(B + right)


def _best(m: Array, u: float, u_0: float, A: float, B: float) -> Array:
    """About the l of the largest term for each m: (m - l) (B + m - l) u_0 u = l (A + l) (1 - u_0) (1 - u)."""
    near, far = u_0 * u, (1.0 - u_0) * (1.0 - u)
    # (near - far) l² - [near (2 m + B) + far A] l + near m (B + m) = 0, in the form that does not cancel
    b, c = near * (2.0 * m + B) + far * A, near * m * (B + m)
    root = np.sqrt(np.maximum(b * b - 4.0 * (near - far) * c, 0.0))
    return np.clip(2.0 * c / np.maximum(b + root, 1e-300), 0.0, m)


def _window(u: float, u_0: float, tau: float, A: float, B: float) -> tuple[Array, float]:
    """The m that matter, and the distance between them."""
    theta = A + B
    mean, std = (float(part) for part in typical_count(np.array(tau), np.array(theta)))

    def profile(m: Array) -> Array:
        log_q = _rough_log_count(m, np.full(len(m), tau), np.full(len(m), theta))
        return log_q + _log_terms(m, _best(m, u, u_0, A, B), u, u_0, A, B)

    low, high = 0.0, 6.0 * (mean + 10.0 * std) + 50.0
    for _ in range(4):
        grid = np.linspace(low, high, _LOOK)
        values = profile(grid)
        best = int(np.nanargmax(values))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, _LOOK - 1)]
        if high - low < 4.0:
            break
    centre = float(grid[best])
    h = max(1.0, 0.05 * std)
    around = profile(np.maximum(np.array([centre - h, centre, centre + h]), 0.0))
    bend = -(around[0] - 2.0 * around[1] + around[2]) / h**2
    spread = 1.0 / np.sqrt(bend) if centre >= h and np.isfinite(bend) and bend > 0 else std
    spread = max(float(spread), 0.5) + 0.5
    step = max(1.0, np.floor(spread / 2.5))
    reach = np.ceil(_REACH * spread / step) * step
    m = np.rint(centre) + np.arange(-reach, reach + step, step)
    return m[m >= 0], float(step)
