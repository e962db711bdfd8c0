r"""Priors p(x_T) of SDEs without a Gaussian kernel: pushed forward, stationary, or fitted to simulated states.

**Pushed forward.** Of an SDE that a change of the state y = H(x, t) makes affine, p(x_T) is that of X(y_T) with y_T
Gaussian, whose moments are read off the score at T: s_y = s_x X' + X'' / X' is -(y - m) / v.

**Stationary law.** Where f and g are free of t (:mod:`sdeflow.laws.stationary`). How far p(x_T) is from the law of
Boltzmann is read off paths simulated from its 2 % and its 98 % quantile.

**Fitted prior.** A mixture of Gaussians fitted to states simulated from the data (:mod:`sdeflow.laws.fitted`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.errors import DataError, NonFiniteStateError, PriorMismatchWarning, warn
from sdeflow.kernels.reducible import PushForward, ReducibleKernel
from sdeflow.laws.boltzmann import BoltzmannLaw
from sdeflow.laws.fitted import FittedPrior
from sdeflow.laws.gaussian import Gaussian
from sdeflow.laws.stationary import StationaryLaw, stationary_law
from sdeflow.numerics.checks import checked_count, checked_data
from sdeflow.numerics.noise import NoiseStream
from sdeflow.scores import DeclaredSDE, ScoreFunction, evaluating
from sdeflow.solving.prior_of import READ, fitted_moments
from sdeflow.solving.simulate import simulate, start

__all__ = ["default_prior", "fit_prior"]

_MISMATCH = 0.05  # of total variation
_PATHS, _PATH_STEPS, _UNREACHED = 512, 2000, 0.12  # of the law of Boltzmann; 0.12 is exceeded by chance 1 in 10⁶ times


def default_prior(
    sde: DeclaredSDE, score: ScoreFunction, like: Tensor
) -> PushForward | StationaryLaw | BoltzmannLaw | None:
    """Of a reducible SDE a Gaussian pushed forward, else the stationary law; None where there is neither.

    A warning says where p(x_T) has not reached the stationary law.
    """
    moments = score.data_moments()
    if isinstance(score.kernel, ReducibleKernel) and not score.kernel.reduction.map.fold:
        pushed = _pushed_forward(score, score.kernel, like)
        if pushed is not None:
            return pushed
    near = None if moments is None or sde.declaration.coupled else float(moments[0].mean())
    law = stationary_law(sde, near)
    if law is None:
        return None
    if isinstance(law, BoltzmannLaw):
        _warn_where_unreached(sde, law)
        return law
    distance = law.distance_at(sde.declaration.T, *(moments or (None, None)))
    if distance > _MISMATCH:
        data = "data of the score's mean and std" if moments is not None else "data anywhere in the law's bulk"
        warn(
            f"the prior is the stationary law, from which p(x_T) of {data} is {distance:.2g} away in total variation "
            f"(its relaxation time is {law.relaxation_time:.3g}, T = {sde.declaration.T:g}): raise T, or pass "
            "prior=sde.fit_prior(data).",
            PriorMismatchWarning,
        )
    return law


def _warn_where_unreached(sde: DeclaredSDE, law: BoltzmannLaw) -> None:
    """Warns where paths from two far positions have not both reached the law of Boltzmann at T."""
    level = torch.tensor([0.02, 0.98], dtype=torch.float64).repeat_interleave(_PATHS)
    x_0 = torch.zeros(2 * _PATHS, 2, 1, dtype=torch.float64)
    x_0[:, law.position, 0] = law.of_position.quantile(level)
    T = sde.declaration.T
    try:
        x_T = simulate(sde, x_0, [T], steps=_PATH_STEPS, seed=0, progress=False)[0, :, law.position, 0]
    except NonFiniteStateError:
        reached = f"could not be compared with p(x_T), for {_PATH_STEPS} steps of Euler-Maruyama do not reach T = {T:g}"
    else:
        below = law.of_position.cdf(x_T.reshape(2, _PATHS)).sort(dim=1).values
        distance = float((below - (torch.arange(_PATHS) + 0.5) / _PATHS).abs().max())
        if distance < _UNREACHED:
            return
        reached = (
            f"is {distance:.2g} away (Kolmogorov-Smirnov) from p(x_T) of its own 2 % or 98 % quantile at T = {T:g}"
        )
    warn(
        f"the prior is the law of Boltzmann, which {reached}: raise T, or pass prior=sde.fit_prior(data).",
        PriorMismatchWarning,
    )


def _pushed_forward(score: ScoreFunction, kernel: ReducibleKernel, like: Tensor) -> PushForward | None:
    """x_T = X(y_T) with y_T Gaussian, its moments read off the score at T; None where s_y is not that of a Gaussian."""
    moments, centre, spread = score.data_moments(), 0.0, 1.0
    if moments is not None:
        mean, std = (m.mean().reshape(1, 1) for m in moments)
        try:
            near = kernel.transport(torch.cat([mean - 0.5 * std, mean, mean + 0.5 * std]), 0.0)
        except DataError:  # data of this mean and spread would leave the domain
            near = kernel.transport(torch.cat([0.9 * mean, mean, 1.1 * mean]), 0.0)
        centre, spread = float(near[1]), float((near[2] - near[0]).abs())
    start = kernel.inner.marginal(centre, spread, kernel.T)
    line = start.sample((READ, *like.shape[1:]), seed=0, dtype=torch.float64, device=like.device)
    x = kernel.restore(line, kernel.T).to(like.dtype)
    with torch.no_grad(), evaluating(score):
        line, gradient = kernel.line_score(x, score(x, kernel.T), kernel.T)
    mean, std, near = fitted_moments(line, gradient[None], start)
    return PushForward(kernel, Gaussian(mean[0].cpu(), std[0].cpu()), kernel.T) if near else None


def fit_prior(
    sde: DeclaredSDE,
    data: Tensor,
    n: int = 10_000,
    *,
    components: int = 8,
    steps: int = 500,
    seed: int | torch.Generator | None = None,
) -> FittedPrior:
    """p(x_T) of ``data``, as a mixture of Gaussians fitted to simulated states.

    Args:
        sde: the declaration.
        data: (rows, *event); of a coupled state with several data components (rows, k, *event).
        n: how many paths are simulated, each from a row of the data; a fifth of them tests the fit.
        components: of the mixture.
        steps: of Euler-Maruyama over [0, T].
        seed: of the paths.

    Raises:
        DataError: for data that is not a finite floating tensor (rows, *event).
        ValueError: for numbers that make no sense.
        NonFiniteStateError: where a path explodes.
    """
    for name, value, least in (("n", n, 50), ("components", components, 1)):
        checked_count(value, name, least)
    noise = NoiseStream(seed, "fit prior")
    data = checked_data(data)
    rows = (noise.uniform((n,), torch.float64) * len(data)).long().clamp_max(len(data) - 1)
    x_0 = start(sde.declaration, data[rows.to(data.device)].double(), noise)
    x_T = simulate(sde, x_0, [sde.declaration.T], steps=steps, seed=noise.seed)[0].cpu()
    fitted = n - n // 5
    return FittedPrior(x_T[:fitted], x_T[fitted:], components, sde.declaration.coupled)
