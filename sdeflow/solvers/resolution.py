r"""Whether the steps of a grid serve an SDE: a grid that cannot is refused, and one that hardly can is warned of.

None of what is asked of a kernel and the times of a solve needs the score. Refused are, since no number of steps helps
or the state explodes:

  - uniform steps in t where f or g is infinite at t = 0, however near to it the cutoff is;
  - for a coupled state, which moves on while the log-SNR of its data hardly does, and a method that does not know the
    kernel: uniform steps in t longer than a quarter of the time in which the reverse equation contracts e-fold, 1 over
    the largest eigenvalue of Σ⁻¹ g gᵀ with Σ = alpha C alphaᵀ + sigma sigmaᵀ, C = c² for the data's components;
  - for such a method elementwise: steps longer than that time, sigma² / g², where x_0 is forgotten.

Warned of are uniform steps in t of which one covers more than a quarter of a radian of the angle
atan2(sigma, alpha c), of which all together cover at most π/2 (of a coupled state with the half-log-SNR for
log(alpha / sigma)); and, for methods that do not know the kernel, steps in which data is moved far, steps in which
a coupled state turns so far that all of them together change its size by a quarter, and steps after which Gaussian data
of the scale c has another spread: its flow and its reverse SDE are linear, and what a method makes of them is known
(:mod:`sdeflow.solvers.schemes`). In few steps, more is allowed: they are coarse on any grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.errors import CoarseStepsWarning, warn
from sdeflow.kernels.gaussian import FORGOTTEN, Kernel
from sdeflow.solvers.schemes import Scheme, carried

__all__ = ["Plain", "require_given", "require_plain", "require_resolved"]

_MOST, _FEW, _FEW_COUPLED, _FEW_DRIFT = 0.25, 4.0, 16.0, 60.0  # the last three over the number of steps
_SINGULAR = 1e-12  # of the largest eigenvalue of Σ
_NOISE = -1.0  # the half-log-SNR from which on data counts as noise


@dataclass(frozen=True)
class Plain:
    """A method that does not know the kernel, and where it goes.

    Attributes:
        order: in smooth equations.
        stochastic: whether it solves an SDE.
        backward: whether t falls.
        scheme: its tableau, where it has one.
        restarts: the steps that begin at a break point of f or g, where methods forget earlier steps.
        stages: places c in the steps -> the times there and dt/dr, each (len(c), steps), in the order of the solve.
    """

    order: int
    stochastic: bool
    backward: bool
    scheme: Scheme | None
    restarts: frozenset[int]
    stages: Callable[[tuple[float, ...]], tuple[np.ndarray, np.ndarray]]


def require_resolved(kernel: Kernel, scale: float, times: np.ndarray, plain: Plain | None) -> None:
    """A ValueError where steps between uniform ``times`` cannot serve, a warning where they hardly can.

    Args:
        kernel: the kernel.
        scale: the data's scale c.
        times: rising, (n,).
        plain: the method; None where it knows the kernel, and takes what is linear in the state exactly.

    Warns:
        CoarseStepsWarning: where one step takes much of the way between data and noise, and as the checks below warn.

    Raises:
        ValueError: with the grids that serve.
    """
    remedy = 'leave grid out, or name "angle" or "log_snr".'
    with torch.no_grad():
        if not all(bool(torch.isfinite(value).all()) for value in kernel.sde_coefficients(torch.zeros(()).double())):
            raise ValueError(
                f'grid="t": f or g is infinite at t = 0, which no uniform steps in t come near to; {remedy}'
            )
        t, steps = torch.as_tensor(times), len(times) - 1
        _tell_widest(
            kernel, scale, times, f'grid="t": {steps} uniform steps in t are long here.',
            f"{remedy} More steps, or your own times in a tensor, serve too.",
        )  # fmt: skip
        if plain is None or kernel.values.shape:
            return
        if not kernel.coupled:
            require_plain(kernel, "t", scale, times, plain)
            return
        rate, at = _contraction(kernel, t, scale).max(0)
        length = (times[-1] - times[0]) / steps
        if float(rate) * length > max(_MOST, _FEW_COUPLED / steps):
            raise ValueError(
                f'grid="t": {steps} uniform steps in t are too long for this solver. At t = {times[int(at)]:.4g} the '
                f"reverse equation contracts at a rate of {float(rate):.3g}, and a step is {length:.3g}; {remedy} More "
                "steps, your own times in a tensor, or the default solver serve too."
            )
        require_plain(kernel, "t", scale, times, plain)


def require_given(kernel: Kernel, scale: float, times: np.ndarray, plain: Plain | None) -> None:
    """A warning where steps between ``times`` that were given cannot serve a method that does not know the kernel."""
    if plain is None:
        return
    with torch.no_grad():
        told = _tell_widest(
            kernel, scale, times, "the given times are far apart.", "set more there, or leave grid out."
        )
    if not told:
        _require_spread(kernel, None, scale, times, plain)


def _tell_widest(kernel: Kernel, scale: float, times: np.ndarray, what: str, remedy: str) -> bool:
    """Whether one of the steps takes much of the way between data and noise, of which it then warns."""
    widest, at = _angles(kernel, torch.as_tensor(times), scale).max(0)
    told = float(widest) > max(_MOST, _FEW / (len(times) - 1))
    if told:
        warn(
            f"{what} The step from t = {times[int(at)]:.4g} to {times[int(at) + 1]:.4g} alone takes "
            f"{float(widest):.2f} of the {math.pi / 2:.2f} rad between data and noise; {remedy}",
            CoarseStepsWarning,
        )
    return told


def require_plain(kernel: Kernel, grid: str, scale: float, times: np.ndarray, plain: Plain | None) -> None:
    """A warning or a ValueError where a method that does not know the kernel cannot do with these steps.

    Args:
        kernel: the kernel, of one schedule for all coordinates.
        grid: the name of the grid.
        scale: the data's scale c.
        times: rising, (n,).
        plain: the method; None where it knows the kernel: nothing is asked of it then.

    Warns:
        CoarseStepsWarning: where the data is moved far within a step, where a coupled state turns so far that its size
            changes by a quarter, or where Gaussian data does not keep its spread.

    Raises:
        ValueError: where x_0 is forgotten and steps are longer than the contraction allows.
    """
    if plain is None:
        return
    told = (_require_turning if kernel.coupled else _require_stable)(kernel, grid, scale, times, plain)
    if not told and (plain.backward or not plain.stochastic):  # the forward SDE has no score
        _require_spread(kernel, grid, scale, times, plain)


def _require_stable(kernel: Kernel, grid: str, scale: float, times: np.ndarray, plain: Plain) -> bool:
    """A warning or a ValueError where a method that does not know the kernel jumps over what f does, elementwise.

    Its steps are to be short against the time in which the flow of data of the scale c moves it e-fold, 1 over S' / S
    with S² = alpha² c² + sigma², where the data is not yet noise (f alone may be large, as noise makes up for it in a
    variance-preserving SDE; a pulse of f alone is not made up for), and against the time in which the
    reverse equation contracts e-fold, sigma² / g², where x_0 is forgotten. Whether it has warned.
    """
    steps, probes = len(times) - 1, kernel.numbers.probes
    with torch.no_grad():
        level = kernel.half_log_snr(probes)
        length = torch.as_tensor(np.diff(times)[np.searchsorted(times, probes.numpy()).clip(1, steps) - 1])
        near = torch.minimum(length, probes)  # where f is infinite at t = 0, its integral is not
        (alpha, sigma, _), (a, _, gram) = kernel.coefficients(probes), kernel.sde_coefficients(probes)
        growth = a + 0.5 * gram / ((alpha * scale).square() + sigma.square())
        drift = torch.where(level > _NOISE, near * growth.abs(), 0.0)
        contraction = torch.where(level < FORGOTTEN, length * -2.0 * kernel.half_log_snr_rate(probes), 0.0)
    forgetting, moving = (
        _too_long(grid, steps, probes, moved, most)
        for moved, most in ((contraction, 1.0), (drift, max(_MOST, _FEW_DRIFT / steps)))
    )
    if forgetting:
        raise ValueError(forgetting)
    if moving:
        warn(moving, CoarseStepsWarning)
    return bool(moving)


def _require_turning(kernel: Kernel, grid: str, scale: float, times: np.ndarray, plain: Plain) -> bool:
    r"""A warning where a method that does not know the kernel loses its way as a coupled state turns.

    In coordinates z = L⁻¹ x in which data of the scale c has unit covariance, Σ = L Lᵀ, the flow only turns it, by the
    matrix K = ½ (W - Wᵀ), W = L⁻¹ A L, A the matrix of f; the score has no part in it. A method of order p is off
    by (h \|K\|)^{p+1} / (p+1)! in a step of length h. These errors add up, but along the reverse equation each
    falls on as exp(-∫ tr(L⁻¹ g gᵀ L⁻ᵀ) / k dt) until the end. Whether it has warned, where the sum is more than a
    quarter of the state's size.
    """
    with torch.no_grad():
        t, steps = torch.as_tensor(times), len(times) - 1
        middle, length = 0.5 * (t[1:] + t[:-1]), t.diff()
        size, axes = torch.linalg.eigh(_covariance(kernel, middle, scale))
        size = size.clamp(min=_SINGULAR * size.amax(-1, keepdim=True)).sqrt()
        whitened = axes.mT / size[..., None]  # L⁻¹
        a, _, gram = kernel.sde_coefficients(middle)
        w = whitened @ a @ (axes * size[..., None, :])
        turned = length * torch.linalg.matrix_norm(0.5 * (w - w.mT), ord=2)
        error = turned ** (plain.order + 1) / math.factorial(plain.order + 1)
        if plain.stochastic:
            forgotten = (whitened @ gram @ whitened.mT).diagonal(dim1=-2, dim2=-1).mean(-1) * length
            error = error * torch.exp(forgotten - forgotten.cumsum(0))
        total, (furthest, at) = float(error.sum()), turned.max(0)
    if coarse := total > max(_MOST, _FEW / steps):
        warn(
            f'grid="{grid}": {steps} steps are long for this solver. The state turns by up to {float(furthest):.2g} '
            f"rad in one, at t = {float(middle[at]):.4g}, and will be off by about {total:.2g} of its size; take more "
            "steps, a method of higher order, or the default solver, which is exact in what is linear in the state.",
            CoarseStepsWarning,
        )
    return coarse


def _require_spread(kernel: Kernel, grid: str | None, scale: float, times: np.ndarray, plain: Plain) -> None:
    r"""A warning where Gaussian data of the scale c ends with another spread than it should.

    With the score -Σ⁻¹ x its flow is dx = (A + ½ g gᵀ Σ⁻¹) x dt, its reverse SDE dx = (A + g gᵀ Σ⁻¹) x dt + g dw. Both
    are linear, and so is the recursion that a method makes of them. What it spoils here is spoilt for other data too.
    ``grid`` is None where the times were given one by one.
    """
    if plain.scheme is None:
        return
    with torch.no_grad():
        at, rate = (torch.as_tensor(part) for part in plain.stages(plain.scheme.c))
        a, _, gram = kernel.sde_coefficients(at)
        if not kernel.coupled:
            a, gram = a[..., None, None], gram[..., None, None]
        here, ends = (_covariance(kernel, t, scale) for t in (at, torch.as_tensor(times[[0, -1]])))
        if not all(bool(torch.isfinite(part).all()) for part in (a, gram, here)):
            return  # as at t = 0, where f or g may be infinite
        rate = rate[..., None, None]
        share = 1.0 if plain.stochastic else 0.5
        drift = rate * (a + share * gram @ torch.linalg.pinv(here, hermitian=True))
        size, axes = torch.linalg.eigh(rate * gram if plain.stochastic else torch.zeros_like(gram))
        root = axes * size.clamp_min(0.0).sqrt()[..., None, :] @ axes.mT
        begin, end = (ends[1], ends[0]) if plain.backward else (ends[0], ends[1])
    with np.errstate(all="ignore"):
        parts = (-drift if plain.backward else drift).numpy(), root.expand_as(drift).numpy(), begin.numpy()
        found = carried(plain.scheme, *parts, plain.restarts)
        seen = [i for i in range(len(found)) if i not in kernel.declaration.auxiliary]
        ratios = np.sqrt(np.diagonal(found)[seen] / np.diagonal(end.numpy())[seen])
    furthest, steps = max(ratios.tolist(), key=_logarithm), at.shape[1]
    if _logarithm(furthest) > max(_MOST, _FEW / steps):
        named = "the given times" if grid is None else f'grid="{grid}"'
        warn(
            f"{named}: {steps} steps are long for this solver. Gaussian data of the scale {scale:.3g} ends "
            f"with {furthest:.3g} times the spread that it should have; take more steps, or the default solver, which "
            "is exact in what is linear in the state.",
            CoarseStepsWarning,
        )


def _logarithm(ratio: float) -> float:
    """How far a ratio is from 1; infinite where it is no number."""
    return abs(math.log(ratio)) if 0.0 < ratio < math.inf else math.inf


def _too_long(grid: str, steps: int, probes: Tensor, moved: Tensor, most: float) -> str:
    """What to say where some step moves the logarithm of the state by more than ``most``; empty where none does."""
    largest, at = moved.max(0)
    if float(largest) <= most:
        return ""
    return (
        f'grid="{grid}": {steps} steps are too long for this solver. At t = {float(probes[at]):.4g} the drift '
        f"moves the state e-fold {float(largest):.3g} times in one step; take more steps, a shorter T, "
        "or the default solver, which is exact in what is linear in the state."
    )


def _angles(kernel: Kernel, t: Tensor, scale: float) -> Tensor:
    """What each step covers of the angle, (n - 1,)."""
    if kernel.coupled:
        angle = torch.atan(torch.exp(-kernel.half_log_snr(t)) / scale)
    else:
        alpha, sigma, _ = kernel.coefficients(t)
        angle = torch.atan2(sigma, alpha * scale)
    return angle.diff(dim=0).abs().flatten(1).amax(1) if angle.ndim > 1 else angle.diff().abs()


def _covariance(kernel: Kernel, t: Tensor, scale: float) -> Tensor:
    """Σ at each time, (*t.shape, k, k)."""
    alpha, sigma, _ = kernel.coefficients(t)
    if not kernel.coupled:
        return ((alpha * scale).square() + sigma.square())[..., None, None]
    of_data = [0.0 if i in kernel.declaration.auxiliary else scale**2 for i in range(kernel.components)]
    return alpha @ torch.diag(torch.tensor(of_data, dtype=torch.float64)) @ alpha.mT + sigma @ sigma.mT


def _contraction(kernel: Kernel, t: Tensor, scale: float) -> Tensor:
    """The largest eigenvalue of Σ⁻¹ g gᵀ at each time, (n,)."""
    inverse = torch.linalg.pinv(_covariance(kernel, t, scale), hermitian=True)
    return torch.linalg.eigvals(inverse @ kernel.sde_coefficients(t)[2]).real.amax(-1)
