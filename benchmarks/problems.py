"""Problems with known answers for the benchmarks: exact scores, and their probability flows solved to convergence.

Two laws of the data, ``ring`` (2-D, eight Gaussians of std 0.1 on the unit circle) and ``g64`` (64-D, ten Gaussians
of std about 0.3 whose means have spread 1), under three schedules, ``VP`` (beta linear from 0.1 to 20), ``VE`` (sigma
geometric from 0.01 to 50) and ``cos`` (alpha = cos πt/2). The scores are those of ``sdeflow.scores.GaussianMixture``.

With z = x/alpha and u = log(sigma/alpha) the flow of each of them is

    dz/du = z - D(z, u),        D = E[x_0 | x_t],

which :func:`converged` solves with many steps of the classical Runge-Kutta method in float64; :func:`disagreement` is
its distance to SciPy's DOP853 in t, which shares neither the variable nor the method with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import scipy.integrate
import torch
from torch import Tensor

import sdeflow

BETA_MIN, BETA_MAX = 0.1, 20.0
SIGMA_MIN, SIGMA_MAX = 0.01, 50.0
LAWS = ("g64", "ring")
SCHEDULES = ("VP", "VE", "cos")


class CountedMixture(sdeflow.scores.GaussianMixture):
    """The exact score, which counts its calls in ``calls`` and keeps the time of each in ``times``."""

    def start(self) -> None:
        """Begins to count."""
        self.calls, self.times = 0, []

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        self.calls += 1
        self.times.append(float(torch.as_tensor(t).reshape(-1)[0]))
        return super().forward(x, t)


@dataclass(frozen=True)
class Schedule:
    """A declaration, and its coefficients typed in as the users of other libraries have to.

    Attributes:
        sde: the declaration.
        drift: t -> f(x, t) / x.
        diffusion: t -> g(t)².
        kernel: t -> alpha, sigma.
    """

    sde: sdeflow.SDE
    drift: Callable[[Tensor], Tensor]
    diffusion: Callable[[Tensor], Tensor]
    kernel: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Problem:
    """Data, a schedule and the exact score.

    Attributes:
        law: the data's name.
        schedule: the schedule's name.
        by_hand: its coefficients.
        score: exact, counted.
        x_T: (batch, d) in float32, draws from p(x_T).
    """

    law: str
    schedule: str
    by_hand: Schedule
    score: CountedMixture
    x_T: Tensor

    @property
    def name(self) -> str:
        """As in the tables: the data under the schedule."""
        return f"{self.law} {self.schedule}"

    @property
    def sde(self) -> sdeflow.SDE:
        """The declaration."""
        return self.by_hand.sde

    @property
    def span(self) -> tuple[float, float]:
        """The times T and cutoff between which everyone integrates."""
        return float(self.sde.kernel.T), float(self.sde.kernel.cutoff)

    @property
    def levels(self) -> tuple[float, float]:
        """sigma/alpha at T and at the cutoff."""
        T, cutoff = torch.exp(-self.sde.kernel.half_log_snr(torch.tensor(self.span, dtype=torch.float64))).tolist()
        return T, cutoff

    def flow(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt of the probability flow, for t ()."""
        return (self.by_hand.drift(t) * x - 0.5 * self.by_hand.diffusion(t) * self.score_by_hand(x, t)).to(x.dtype)

    def score_by_hand(self, x: Tensor, t: Tensor) -> Tensor:
        """-E[eps | x_t] / sigma, as one writes it for a network that predicts the noise.

        The network answers at times outside [cutoff, T] as well; what sigma(t) is there, is the caller's matter.
        """
        T, cutoff = self.span
        _, sigma = self.by_hand.kernel(t.double())
        return (-self.score.noise(x, t.double().clamp(cutoff, T)) / sigma).to(x.dtype)

    def denoise(self, z: Tensor, level: Tensor | float) -> Tensor:
        """E[x_0 | x_t = alpha z] where sigma/alpha is ``level``, a number or the same one (batch,) times."""
        level = torch.as_tensor(level, dtype=torch.float64).reshape(-1)[0]
        t = self.sde.kernel.time_of(-torch.log(level))
        alpha, _ = self.by_hand.kernel(t)
        return self.score.denoise((alpha * z).to(z.dtype), t)

    def to_z(self, x_T: Tensor) -> Tensor:
        """x / alpha at T."""
        return x_T / float(self.by_hand.kernel(torch.tensor(self.span[0], dtype=torch.float64))[0])

    def from_z(self, z: Tensor) -> Tensor:
        """x at the cutoff."""
        return z * float(self.by_hand.kernel(torch.tensor(self.span[1], dtype=torch.float64))[0])

    @cached_property
    def converged(self) -> Tensor:
        """x at the cutoff from x_T, (batch, d) in float64."""
        return converged(self)

    def distance(self, x: Tensor) -> float:
        """Root mean square, over samples and coordinates, of the distance to the converged solution."""
        return math.sqrt(float((x.double() - self.converged).square().mean()))

    def truth(self, n: int, seed: int) -> Tensor:
        """n draws of p(x) at the cutoff, (n, d) in float32."""
        x_0 = self.score.sample(n, seed=seed, dtype=torch.float64)
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        alpha, sigma = self.by_hand.kernel(torch.tensor(self.span[1], dtype=torch.float64))
        return (alpha * x_0 + sigma * noise).float()


def problem(law: str, schedule: str, batch: int | None = None) -> Problem:
    """The problem of that name, with ``batch`` draws of x_T: 256 in two dimensions and 64 in 64 by default."""
    by_hand = schedules()[schedule]
    means, covariances = {"ring": _ring, "g64": _g64}[law]()
    score = CountedMixture(by_hand.sde, means, covariances)
    score.start()
    batch = batch or (256 if law == "ring" else 64)
    x_0 = score.sample(batch, seed=1, dtype=torch.float64)
    x_T = by_hand.sde.kernel.sample(x_0, torch.full((batch,), by_hand.sde.kernel.T, dtype=torch.float64), seed=2)
    return Problem(law, schedule, by_hand, score, x_T.float())


def problems() -> list[Problem]:
    """All six."""
    return [problem(law, schedule) for law in LAWS for schedule in SCHEDULES]


def converged(problem: Problem, steps: int = 1000) -> Tensor:
    """The flow from x_T to the cutoff by ``steps`` Runge-Kutta steps in u = log(sigma/alpha), in float64."""
    first, last = (math.log(level) for level in problem.levels)
    h = (last - first) / steps
    z = problem.to_z(problem.x_T.double())

    def slope(z: Tensor, u: float) -> Tensor:
        return z - problem.denoise(z, math.exp(u))

    for u in (first + h * k for k in range(steps)):
        k1 = slope(z, u)
        k2 = slope(z + 0.5 * h * k1, u + 0.5 * h)
        k3 = slope(z + 0.5 * h * k2, u + 0.5 * h)
        k4 = slope(z + h * k3, u + h)
        z = z + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return problem.from_z(z)


def disagreement(problem: Problem, tolerance: float = 1e-9) -> float:
    """The distance between the converged solution and DOP853's, which integrates in t."""
    x_T = problem.x_T.double()

    def slope(t: float, y: object) -> object:
        x = torch.as_tensor(y).reshape(x_T.shape)
        return problem.flow(torch.tensor(t, dtype=torch.float64), x).flatten().numpy()

    solution = scipy.integrate.solve_ivp(
        slope, problem.span, x_T.flatten().numpy(), method="DOP853", rtol=tolerance, atol=tolerance
    )
    return problem.distance(torch.as_tensor(solution.y[:, -1]).reshape(x_T.shape))


def sliced_w2(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """The 2-Wasserstein distance of two sets of n samples (n, d), root mean square over random directions."""
    rays = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(0))
    rays = rays / rays.norm(dim=0)
    along_a, along_b = ((x @ rays).sort(dim=0).values for x in (a, b))
    return math.sqrt(float((along_a - along_b).square().mean()))


# ---------------------------------------------------------------- laws and schedules


def _ring() -> tuple[Tensor, Tensor]:
    angle = torch.arange(8, dtype=torch.float64) * (2.0 * math.pi / 8.0)
    return torch.stack([angle.cos(), angle.sin()], dim=1), torch.full((8,), 0.1**2, dtype=torch.float64)


def _g64() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(64)
    means = torch.randn(10, 64, generator=generator, dtype=torch.float64)
    stds = 0.3 * torch.exp(0.2 * torch.randn(10, 64, generator=generator, dtype=torch.float64))
    return means, stds.square()


@cache
def schedules() -> dict[str, Schedule]:
    """The three schedules by name."""
    spread, ratio = BETA_MAX - BETA_MIN, SIGMA_MAX / SIGMA_MIN

    def vp_beta(t: Tensor) -> Tensor:
        return BETA_MIN + spread * t

    def vp_kernel(t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * spread * t**2 - 0.5 * BETA_MIN * t
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2.0 * log_alpha))

    def cosine_beta(t: Tensor) -> Tensor:
        return math.pi * torch.tan(0.5 * math.pi * t)

    def ve_kernel(t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), SIGMA_MIN * ratio**t

    return {
        "VP": Schedule(sdeflow.catalog.VP(BETA_MIN, BETA_MAX), lambda t: -0.5 * vp_beta(t), vp_beta, vp_kernel),
        "VE": Schedule(
            sdeflow.catalog.VE(SIGMA_MIN, SIGMA_MAX),
            torch.zeros_like,
            lambda t: 2.0 * math.log(ratio) * (SIGMA_MIN * ratio**t) ** 2,
            ve_kernel,
        ),
        "cos": Schedule(
            sdeflow.catalog.CosineVP(),
            lambda t: -0.5 * cosine_beta(t),
            cosine_beta,
            lambda t: (torch.cos(0.5 * math.pi * t), torch.sin(0.5 * math.pi * t)),
        ),
    }
