r"""Propagators and weights of exponential integrators, derived from the perturbation kernel alone.

With s = X F - Y u, a prediction F that changes slowly, and Q = g gᵀ,

    u_t = Ψ(t, s) u_s - ½ ∫_s^t (1 + eta²) Ψ(t, τ) Q X F dτ + noise,      dΨ/dt = [a + ½ (1 + eta²) Q Y] Ψ,
    M_k = -½ ∫_s^t (1 + eta²) Ψ(t, τ) Q X θ(τ)^k dτ,                      θ(s) = 0, θ(t) = 1.

Elementwise, with zeta = sigma / alpha, lambda = -log zeta and the scale rho(zeta) of the prediction (zeta for "data", 1
for "noise", 1 + zeta for "velocity", √(c² + zeta²) for "reference"),

    M_k = alpha_t ∫ (rho_t / rho)^{1 + eta²} (1 + eta²) (zeta / rho) θ^k dlambda,
    noise variance = alpha_t² ∫ (rho_t / rho)^{2 + 2 eta²} 2 eta² zeta² dlambda.

The page :doc:`theory_solvers` derives both, with X, Y and F of coupled states. Integrals are Gauss-Legendre sums over
panels of the half-log-SNR; small matrix equations are solved by collocation at the same nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sdeflow.kernels.gaussian import FORGOTTEN, Kernel
from sdeflow.numerics.linear import Blocks

__all__ = ["PREDICTIONS", "RULES", "VARIABLES", "Eta", "Rule", "Transfer", "derive", "weights"]

Rule = Callable[[Tensor, np.ndarray, Tensor | None], Tensor]
"""(moments (n, c, *shape), nodes θ (n, c), length (n, *shape)) -> the moments that a formula takes."""

Eta = float | np.ndarray | Callable[[np.ndarray], np.ndarray]

_NODES = 20
_PANEL = 1.5  # of half-log-SNR, or of log t; the integrands have poles at a distance of π/2
_EXPONENT = 8.0  # of (1 + eta²) half-log-SNR
_TURN = 2.0  # of the norm of ∫ a dt

# rho and dlog rho / dlog zeta, as functions of zeta and of the data's scale c.
_SCALES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "data": (lambda zeta, c: zeta, lambda zeta, c: torch.ones_like(zeta)),
    "noise": (lambda zeta, c: torch.ones_like(zeta), lambda zeta, c: torch.zeros_like(zeta)),
    "velocity": (lambda zeta, c: 1 + zeta, lambda zeta, c: zeta / (1 + zeta)),
    "reference": (
        lambda zeta, c: torch.sqrt(c.square() + zeta.square()),
        lambda zeta, c: zeta.square() / (c.square() + zeta.square()),
    ),
}
PREDICTIONS = tuple(_SCALES)

# The variable in which F is taken to be a polynomial, as a function of the half-log-SNR and t.
VARIABLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "log_snr": lambda half_log_snr, t: half_log_snr,
    "ratio": lambda half_log_snr, t: np.exp(-half_log_snr),
    "t": lambda half_log_snr, t: t,
}


@dataclass(frozen=True)
class Transfer:
    """What n steps from ``start`` to ``stop`` need, float64: numbers, tensors like an event, or k x k matrices.

    Attributes:
        start, stop: the interpolation variable at the ends of each step, (n,).
        length: alpha ∫ (1 + eta²) dlambda over each step, alpha at its end, (n, *shape); elementwise alone.
        state: Ψ of each step, (n, *shape).
        moments: M_k of each step, (n, orders, *shape).
        noise: a square root of the noise's covariance of each step, (n, *shape); None for the flow.
        of_state, of_noise: F = of_state u + of_noise eps at each step's start, (n, *shape).
        alpha: at each step's start and stop, (2, n, *shape).
    """

    start: np.ndarray
    stop: np.ndarray
    length: Tensor | None
    state: Tensor
    moments: Tensor
    noise: Tensor | None
    of_state: Tensor
    of_noise: Tensor
    alpha: Tensor


def derive(
    kernel: Kernel,
    start: np.ndarray,
    stop: np.ndarray,
    prediction: str,
    scale: Tensor,
    eta: Eta = 0.0,
    orders: int = 4,
    variable: str = "log_snr",
) -> Transfer:
    """The propagators and moments of n steps.

    Args:
        kernel: the perturbation kernel.
        start, stop: the times at which each step starts and stops, (n,).
        prediction: one of ``PREDICTIONS``.
        scale: the data's standard deviation c, () or one for each coordinate; for "reference".
        eta: the stochasticity: a number, one for each step, or a function of the half-log-SNR.
        orders: how many moments.
        variable: one of ``VARIABLES``, in which F is taken to be a polynomial.

    Raises:
        ValueError: for a prediction that coupled states do not have.
    """
    panels = _Panels(kernel, start, stop, eta, orders, variable)
    with torch.no_grad():
        if kernel.coupled:
            return _derive_coupled(kernel, panels, prediction, scale)
        return _derive_elementwise(kernel, panels, prediction, scale)


def weights(moments: Tensor, nodes: np.ndarray) -> Tensor:
    """Weights (n, c, *shape) of the values of F at ``nodes`` θ (n, c) of n steps: ∫ of the polynomial through them.

    Σ_j w_j θ_j^k = M_k for k = 0 .. c - 1, for ``moments`` (n, c, *shape).
    """
    vandermonde = torch.as_tensor(nodes[:, None, :] ** np.arange(nodes.shape[1])[:, None])
    return torch.linalg.solve(vandermonde, moments.flatten(2) if moments.ndim > 2 else moments[..., None]).reshape(
        moments.shape
    )


def _midpoint(moments: Tensor, nodes: np.ndarray, length: Tensor | None) -> Tensor:
    return _replaced(moments, 1, 0.5 * moments[:, 0]) if nodes.shape[1] == 2 else moments


def _half_step(moments: Tensor, nodes: np.ndarray, length: Tensor | None) -> Tensor:
    if length is None:
        raise ValueError('rule="half_step" is of elementwise SDEs, not of coupled states.')
    return _replaced(moments, 1, 0.5 * length) if nodes.shape[1] == 2 else moments


def _half_curvature(moments: Tensor, nodes: np.ndarray, length: Tensor | None) -> Tensor:
    if nodes.shape[1] != 3:
        return _midpoint(moments, nodes, length)
    return _replaced(moments, 2, 0.5 * moments[:, 2])


def _uncentred(moments: Tensor, nodes: np.ndarray, length: Tensor | None) -> Tensor:
    if nodes.shape[1] != 3:
        return moments
    back = torch.as_tensor(nodes[:, 1]).reshape(-1, *(1,) * (moments.ndim - 2))
    return _replaced(moments, 2, moments[:, 2] + back * moments[:, 1])


def _replaced(moments: Tensor, k: int, value: Tensor) -> Tensor:
    """``moments`` (n, c, *shape) with M_k replaced."""
    return torch.cat([moments[:, :k], value[:, None], moments[:, k + 1 :]], dim=1)


RULES: dict[str, Rule] = {
    "exact": lambda moments, nodes, length: moments,
    "midpoint": _midpoint,
    "half_step": _half_step,
    "half_curvature": _half_curvature,
    "uncentred": _uncentred,
}
"""Moments as published formulas have them. Those with two nodes replace M_1 by M_0 / 2 ("midpoint") or by half the step
("half_step"); "half_curvature" halves M_2 (DPM-Solver++(3M) as released), "uncentred" leaves out the first derivative's
correction (ER-SDE-3). "exact" is right to its full order."""


class _Panels:
    """Gauss-Legendre nodes over every step: in the half-log-SNR, and for coupled states in log t.

    A coupled state's log-SNR may nearly stand still while the state goes on turning, so that it is no variable to
    integrate in; F is still a polynomial in it.

    Attributes:
        start, stop: the steps' times (n,), and ``first``, ``last`` the interpolation variable there.
        lam, t: at the nodes, (n, panels, nodes).
        width: of each step's panels in the variable of integration, signed, (n,).
        weight: of dlambda at the nodes, for coupled states of dt, (n, panels, nodes).
        powers: θ^k, (n, orders, panels, nodes).
        spread: eta² at the nodes.
        eta: for each step, (n,), or None where it varies within.
        forgotten: where the half-log-SNR at the step's start is bounded, (n,).
    """

    def __init__(
        self, kernel: Kernel, start: np.ndarray, stop: np.ndarray, eta: Eta, orders: int, variable: str
    ) -> None:
        self.start, self.stop = torch.as_tensor(start), torch.as_tensor(stop)
        begin, end = (kernel.bounded_log_snr(t).detach().numpy() for t in (self.start, self.stop))
        self.forgotten = torch.as_tensor(begin <= FORGOTTEN)
        self.eta = None if callable(eta) else torch.as_tensor(np.broadcast_to(np.float64(eta), begin.shape).copy())
        most = 1.0 + (_of_log_snr(eta, np.concatenate([begin, end])) if callable(eta) else np.asarray(eta)).max() ** 2
        points, mass, _ = _gauss_legendre(_NODES)
        if kernel.coupled:
            earliest = _earliest(kernel)
            low, high = np.log(np.asarray(start) + earliest), np.log(np.asarray(stop) + earliest)
            count = _panels_of_coupled(kernel, self.start, self.stop, np.abs(high - low), most)
        else:
            low, high = begin, end
            span = float(np.abs(end - begin).max())
            count = max(1, math.ceil(span / _PANEL), math.ceil(most * span / _EXPONENT))
        step = high - low
        inside = (np.arange(count)[:, None] + points) / count  # in [0, 1]
        at = low[:, None, None] + step[:, None, None] * inside
        self.width = torch.as_tensor(step / count)
        weight = (self.width[:, None, None] * torch.as_tensor(mass)).expand(-1, count, -1)
        if kernel.coupled:
            self.t = torch.as_tensor(np.exp(at) - earliest).clamp(kernel.cutoff, kernel.T)
            self.weight = weight * torch.as_tensor(np.exp(at))
            lam = kernel.half_log_snr(self.t).detach().numpy()
        else:
            lam, self.weight = at, weight
            needs_times = kernel.values.shape or variable == "t"
            at = torch.as_tensor(lam)
            self.t = kernel.time_of(at) if needs_times else torch.zeros_like(at)
        psi = VARIABLES[variable]
        self.first, self.last = psi(begin, np.asarray(start)), psi(end, np.asarray(stop))
        width = np.where(self.last == self.first, 1.0, self.last - self.first)  # no noise in it: θ is 0, and so are M_k
        theta = (psi(lam, self.t.numpy()) - self.first[:, None, None]) / width[:, None, None]
        self.lam = torch.as_tensor(lam)
        self.powers = torch.as_tensor(np.stack([theta**k for k in range(orders)], axis=1))
        each = _of_log_snr(eta, lam) if callable(eta) else np.reshape(np.float64(eta), (-1, 1, 1))
        self.spread = torch.as_tensor(np.square(np.broadcast_to(each, lam.shape)))

    @property
    def noiseless(self) -> bool:
        """Whether eta is 0."""
        return not bool((self.spread > 0).any())


def _of_log_snr(eta: Callable[[np.ndarray], np.ndarray], half_log_snr: np.ndarray) -> np.ndarray:
    """eta as a function of the half-log-SNR, checked."""
    value = np.asarray(eta(half_log_snr), dtype=np.float64)
    if value.shape not in ((), half_log_snr.shape) or not (np.isfinite(value) & (value >= 0)).all():
        raise ValueError("eta must map an array of half-log-SNR to as many finite numbers >= 0.")
    return np.broadcast_to(value, half_log_snr.shape)


def _earliest(kernel: Kernel) -> float:
    """What is added to t before its logarithm is taken: 0, but where solves go down to t = 0."""
    if kernel.cutoff > 0:
        return 0.0
    _, _, q = kernel.sde_coefficients(torch.zeros((), dtype=torch.float64))
    spread = [float(variance) / max(float(q.max()), 1e-300) for variance in kernel.declaration.initial_variances]
    return min([1e-4 * kernel.T, *(time for time in spread if time > 0)])


def _panels_of_coupled(kernel: Kernel, start: Tensor, stop: Tensor, span: np.ndarray, most: float) -> int:
    """How many panels resolve the longest step: of log t, and of the drift's own turning."""
    between = start[:, None] + (stop - start)[:, None] * torch.linspace(0, 1, 9, dtype=torch.float64)
    a = kernel.sde_coefficients(between)[0]
    turn = (torch.linalg.matrix_norm(a).amax(1) * (stop - start).abs()).max()
    return max(1, math.ceil(float(span.max()) / _PANEL * max(1.0, most / 3.0)), math.ceil(float(turn) / _TURN))


@lru_cache(maxsize=4)
def _gauss_legendre(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1], and the matrix of ∫_{node i}^1 of the Lagrange polynomials."""
    points, mass = np.polynomial.legendre.leggauss(count)
    points, mass = 0.5 * (points + 1.0), 0.5 * mass
    # ∫_p^1 of each Lagrange polynomial by the same rule, moved to [p, 1]: exact for these degrees.
    barycentric = np.array([1.0 / np.prod((p - np.delete(points, i)) * 4.0) for i, p in enumerate(points)])
    onward = np.empty((count, count))
    for i, p in enumerate(points):
        moved = p + (1.0 - p) * points
        terms = barycentric / (moved[:, None] - points)
        onward[i] = (1.0 - p) * mass @ (terms / terms.sum(1, keepdims=True))
    return points, mass, onward


def _derive_elementwise(kernel: Kernel, panels: _Panels, prediction: str, scale: Tensor) -> Transfer:
    sides = len(kernel.values.shape)
    rho_of, slope_of = _SCALES[prediction]
    (alpha_0, sigma_0, _), (alpha_1, sigma_1, _) = (kernel.coefficients(t) for t in (panels.start, panels.stop))
    if not sides:
        alpha_0, alpha_1 = (
            torch.maximum(a, s * math.exp(FORGOTTEN)) for a, s in ((alpha_0, sigma_0), (alpha_1, sigma_1))
        )
    if sides:
        alpha, sigma, _ = kernel.coefficients(panels.t)
        zeta = sigma / alpha
        own = -0.5 * kernel.sde_coefficients(panels.t)[2] / sigma.square()  # dlambda/dt of each coordinate
        rate = _sided(kernel.half_log_snr_rate(panels.t), sides)
        speed = torch.where(rate < 0, own / rate, 0.0)  # steps in a pause have no length
    else:
        zeta, speed = torch.exp(-panels.lam), torch.ones_like(panels.lam)
    c = scale.to(torch.float64).cpu()
    extra = max(c.ndim, sides)  # sides of the result behind the step, panel and node
    alpha_0, sigma_0, alpha_1, sigma_1 = (_padded(v, 1, extra) for v in (alpha_0, sigma_0, alpha_1, sigma_1))
    zeta, speed = _padded(zeta, 3, extra), _padded(speed, 3, extra)
    rho, rho_0, rho_1 = rho_of(zeta, c), rho_of(sigma_0 / alpha_0, c), rho_of(sigma_1 / alpha_1, c)
    one = _sided(1.0 + panels.spread, extra)
    if panels.eta is not None:
        onward = one * (rho_1[:, None, None] / rho).log()
        whole = _sided(1.0 + panels.eta.square(), extra) * (rho_1 / rho_0).log()
    else:
        onward, whole = _with_varying_eta(panels, slope_of(zeta, c), speed, extra)
    measure = _sided(panels.weight, extra) * speed
    density = measure * one * (zeta / rho) * onward.exp()
    moments = alpha_1[:, None] * torch.einsum("npi...,nkpi->nk...", density, panels.powers)
    noise = None
    if not panels.noiseless:
        variance = (measure * 2.0 * (one - 1.0) * zeta.square() * (2.0 * onward).exp()).sum((1, 2))
        noise = alpha_1 * variance.clamp_min(0.0).sqrt()
    slope_0 = slope_of(sigma_0 / alpha_0, c)
    of_state, of_noise = rho_0 * slope_0 / sigma_0, -rho_0
    if not sides:  # where x_0 is forgotten eps is u / sigma, and what differs from it is rounding
        forgotten = _padded(panels.forgotten, 1, extra)
        of_state = torch.where(forgotten, rho_0 * (slope_0 - 1.0) / sigma_0, of_state)
        of_noise = torch.where(forgotten, 0.0, of_noise)
    return Transfer(
        panels.first, panels.last, alpha_1 * (measure * one).sum((1, 2)), alpha_1 / alpha_0 * whole.exp(), moments,
        noise, of_state, of_noise, torch.stack([alpha_0, alpha_1]),
    )  # fmt: skip


def _with_varying_eta(panels: _Panels, slope: Tensor, speed: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """-∫ (1 + eta²) dlog rho / dlog zeta dlambda from each node to the end of its step, and over the step."""
    _, _, onward = _gauss_legendre(_NODES)
    rate = -(_sided(1.0 + panels.spread, extra) * slope * speed)
    rate = rate.expand(*panels.lam.shape, *rate.shape[3:])
    within = torch.einsum("ij,npj...->npi...", torch.as_tensor(onward), rate) * _sided(panels.width, extra + 2)
    panel = (rate * _sided(panels.weight, extra)).sum(2)
    later = panel.flip(1).cumsum(1).flip(1) - panel
    return within + later[:, :, None], panel.sum(1)


def _derive_coupled(kernel: Kernel, panels: _Panels, prediction: str, scale: Tensor) -> Transfer:
    if prediction == "velocity":
        raise ValueError('prediction="velocity" is of elementwise SDEs; take "data", "noise" or "reference".')
    if scale.ndim:
        raise ValueError("the reference of a coupled SDE takes one scale for all coordinates.")
    phi, root, _ = kernel.coefficients(panels.t)
    a, _, q = kernel.sde_coefficients(panels.t)
    dt = panels.weight[..., None, None]
    force = 0.5 * (1.0 + panels.spread)[..., None, None] * q
    X, Y = _split(kernel, phi, root, prediction, scale)
    inner, ends = _collocation((a + force @ Y) * (dt / _mass()))  # Ψ from the panel's start, at nodes and at its end
    onward, whole = _onward(inner, ends)
    (phi_0, root_0, _), (phi_1, _, _) = (kernel.coefficients(t) for t in (panels.start, panels.stop))
    X_0, Y_0 = _split(kernel, phi_0, root_0, prediction, scale)
    if prediction == "noise":
        X, X_0 = (-torch.linalg.inv(R).mT for R in _smooth_roots(a, q, root, dt, root_0[0], panels))
    moments = torch.einsum("npiab,nkpi->nkab", -dt * (onward @ force @ X), panels.powers)
    noise = None
    if not panels.noiseless:
        spread = panels.spread[..., None, None] * dt.abs() * q
        covariance = (onward @ spread @ onward.mT).sum((1, 2))
        noise = Blocks(0.5 * (covariance + covariance.mT)).root.values
    inverse = torch.linalg.inv(X_0)
    of_noise = -inverse @ torch.linalg.inv(root_0).mT
    return Transfer(
        panels.first, panels.last, None, whole, moments, noise, inverse @ Y_0, of_noise, torch.stack([phi_0, phi_1])
    )


def _onward(inner: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Ψ from each node to the end of its step (n, panels, nodes, k, k), and over the whole step (n, k, k)."""
    whole = torch.eye(ends.shape[-1], dtype=ends.dtype).expand(len(ends), *ends.shape[-2:])
    beyond = []
    for panel in range(ends.shape[1] - 1, -1, -1):
        beyond.append(whole)
        whole = whole @ ends[:, panel]
    after = torch.stack(beyond[::-1], dim=1) @ ends
    return after[:, :, None] @ torch.linalg.inv(inner), whole


def _split(kernel: Kernel, phi: Tensor, root: Tensor, prediction: str, scale: Tensor) -> tuple[Tensor, Tensor]:
    """X and Y of s = X F - Y u; X of "noise" is another matter."""
    precision = torch.linalg.inv(root).mT @ torch.linalg.inv(root)
    if prediction == "noise":
        return precision, torch.zeros_like(precision)
    if prediction == "data":
        return precision @ phi, precision
    c = torch.diag(kernel.of_state(scale.to(torch.float64).cpu()))
    spread = phi @ c @ c @ phi.mT + root @ root.mT
    return precision @ phi, torch.linalg.inv(spread)


def _smooth_roots(
    a: Tensor, q: Tensor, root: Tensor, dt: Tensor, first: Tensor, panels: _Panels
) -> tuple[Tensor, Tensor]:
    """R at the nodes and at each step's start, from the Cholesky factor at the first of them."""
    if not bool((panels.start[1:] == panels.stop[:-1]).all()):
        raise ValueError('prediction="noise" of a coupled SDE needs steps that follow one another; take "data".')
    inverse = torch.linalg.inv(root)
    inner, ends = _collocation((a + 0.5 * q @ inverse.mT @ inverse) * (dt / _mass()))
    nodes, points, R = [], [], first
    for step in range(len(ends)):
        points.append(R)
        for panel in range(ends.shape[1]):
            nodes.append(inner[step, panel] @ R)
            R = ends[step, panel] @ R
    return torch.stack(nodes).reshape(inner.shape), torch.stack(points)


def _mass() -> Tensor:
    return torch.as_tensor(_gauss_legendre(_NODES)[1])[:, None, None]


def _collocation(generator: Tensor) -> tuple[Tensor, Tensor]:
    """Ψ at Gauss-Legendre nodes and at 1, of dΨ/dθ = G(θ) Ψ on [0, 1], Ψ(0) = 1, for G (..., nodes, k, k).

    By collocation, of order twice the number of nodes.
    """
    _, weight, onward = _gauss_legendre(_NODES)
    mass = torch.as_tensor(weight)
    running = mass - torch.as_tensor(onward)  # ∫_0^{node i} of the Lagrange polynomials
    *lead, n, k, _ = generator.shape
    one = torch.eye(k, dtype=generator.dtype)
    system = torch.eye(n * k, dtype=generator.dtype) - torch.einsum("ij,...jab->...iajb", running, generator).reshape(
        *lead, n * k, n * k
    )
    inner = torch.linalg.solve(system, one.repeat(n, 1).expand(*lead, n * k, k)).reshape(*lead, n, k, k)
    return inner, one + torch.einsum("j,...jab,...jbc->...ac", mass, generator, inner)


def _sided(value: Tensor, sides: int) -> Tensor:
    """``value`` with ``sides`` more sides of one at its end."""
    return value.reshape(*value.shape, *(1,) * sides)


def _padded(value: Tensor, lead: int, sides: int) -> Tensor:
    """``value`` (lead sides, *shape) with ones before ``shape``, until it has ``sides`` sides there."""
    shape = value.shape[lead:]
    return value.reshape(*value.shape[:lead], *(1,) * (sides - len(shape)), *shape)
