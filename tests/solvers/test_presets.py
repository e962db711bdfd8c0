"""Published samplers against the solvers that stand for them, number for number.

Each reference below is written as its paper writes it, one loop in float64, and shares nothing with sdeflow but the
values of alpha and sigma: the denoiser is Bayes' rule for a mixture of Gaussians. The references are tested first on
their own (orders, weak orders, each other); then the library's presets have to give the same numbers.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import sympy as sp
import torch
from torch import Tensor

from sdeflow import SDE, catalog, solvers, x
from sdeflow.laws.gaussian import Gaussian
from sdeflow.numerics.noise import NoiseStream, resolve_seed
from sdeflow.scores import GaussianMixture

# ------------------------------------------------------------------------------------------------ the problem

MEANS = torch.tensor([[-1.0, 0.2], [0.6, 0.9], [0.8, -0.7]], dtype=torch.float64)
VARIANCES = torch.tensor([0.02, 0.05, 0.10], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def bayes(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x_0 | x_t = x] for the mixture above."""
    total = alpha**2 * VARIANCES + sigma**2
    away = x[:, None] - alpha * MEANS
    log_weight = WEIGHTS.log() - away.square().sum(-1) / (2 * total) - total.log()  # two dimensions: 2 · ½ log
    each = MEANS + (alpha * VARIANCES / total)[:, None] * away
    return (torch.softmax(log_weight, 1)[..., None] * each).sum(1)


@dataclass(frozen=True)
class Path:
    """alpha and sigma at times from T down to the cutoff, and E[x_0 | x_t] there."""

    alpha: list[float]
    sigma: list[float]
    denoiser: Callable[[Tensor, float, float], Tensor] = bayes

    @property
    def steps(self) -> int:
        return len(self.alpha) - 1

    @cached_property
    def half_log_snr(self) -> list[float]:
        return [math.log(a / s) for a, s in zip(self.alpha, self.sigma, strict=True)]

    def data(self, x: Tensor, i: int) -> Tensor:
        return self.denoiser(x, self.alpha[i], self.sigma[i])

    def noise(self, x: Tensor, i: int) -> Tensor:
        return (x - self.alpha[i] * self.data(x, i)) / self.sigma[i]


def path(sde: SDE, times: Tensor, denoiser: Callable[[Tensor, float, float], Tensor] = bayes) -> Path:
    """The path at increasing ``times``, turned round."""
    alpha, sigma, _ = sde.kernel.coefficients(times.flip(0))
    return Path(alpha.tolist(), sigma.tolist(), denoiser)


# ------------------------------------------------------------------------------------------------ the papers


def integral(f: Callable[[np.ndarray], np.ndarray], a: float, b: float) -> float:
    """∫_a^b f to rounding, by Gauss and Legendre on panels of at most one unit."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(a, b, 1 + math.ceil(abs(b - a)))
    return sum(float((q - p) / 2 * weights @ f((p + q) / 2 + (q - p) / 2 * nodes)) for p, q in pairwise(edges))


def lagrange(nodes: list[float], j: int) -> Callable[[np.ndarray], np.ndarray]:
    """The polynomial that is 1 at the j-th of ``nodes`` and 0 at the others."""
    others = [node for k, node in enumerate(nodes) if k != j]
    return lambda v: np.prod([(v - node) / (nodes[j] - node) for node in others], axis=0) * np.ones_like(v)


def phi(k: int, z: float) -> float:
    """∫_0^1 e^{(1-u) z} u^{k-1} / (k-1)! du, whose recursion φ_{k+1} = (φ_k - 1/k!) / z cancels."""
    return integral(lambda u: np.exp((1 - u) * z) * u ** (k - 1) / math.factorial(k - 1), 0.0, 1.0)


def variance_preserving(p: Path, i: int) -> tuple[float, float, float]:
    """ᾱ, 1 - ᾱ (with all its digits) and the scale of the state that DDPM and DDIM would have."""
    total = p.alpha[i] ** 2 + p.sigma[i] ** 2
    return p.alpha[i] ** 2 / total, p.sigma[i] ** 2 / total, math.sqrt(total)


def ddim(p: Path, x: Tensor, xi: list[Tensor] | None = None, eta: float = 0.0) -> Tensor:
    """Song, Meng & Ermon 2021 (arXiv:2010.02502), equations 12 and 16, whose alpha is ᾱ."""
    for i in range(p.steps):
        (now, noisy, scale), (then, left, next_scale) = variance_preserving(p, i), variance_preserving(p, i + 1)
        x_0, beta = p.data(x, i), (noisy - left) / then  # 1 - ᾱ_t / ᾱ_{t-1}
        epsilon = (x / scale - math.sqrt(now) * x_0) / math.sqrt(noisy)
        std = eta * math.sqrt(left / noisy) * math.sqrt(beta)
        x = math.sqrt(then) * x_0 + math.sqrt(left - std**2) * epsilon
        x = next_scale * (x if xi is None else x + std * xi[i])
    return x


def ddpm(p: Path, x: Tensor, xi: list[Tensor], posterior: bool = True) -> Tensor:
    """Ho, Jain & Abbeel 2020 (arXiv:2006.11239), equations 6 and 7; the variance is β̃, or β without ``posterior``."""
    for i in range(p.steps):
        (now, noisy, scale), (then, left, next_scale) = variance_preserving(p, i), variance_preserving(p, i + 1)
        beta = (noisy - left) / then
        mean = math.sqrt(then) * beta / noisy * p.data(x, i) + math.sqrt(now / then) * left / noisy * x / scale
        x = next_scale * (mean + math.sqrt(beta * (left / noisy if posterior else 1.0)) * xi[i])
    return x


def dpm_solver_pp_2m(p: Path, x: Tensor, half: float = 0.5) -> Tensor:
    """Lu et al. 2022 (arXiv:2211.01095), algorithm 2, where ``half`` is ½."""
    l, past = p.half_log_snr, None
    for i in range(p.steps):
        h, x_0 = l[i + 1] - l[i], p.data(x, i)
        D = x_0
        if i:
            r = (l[i] - l[i - 1]) / h
            D = (1 + half / r) * x_0 - half / r * past
        x = p.sigma[i + 1] / p.sigma[i] * x - p.alpha[i + 1] * math.expm1(-h) * D
        past = x_0
    return x


def dpm_solver_pp_3m_published(p: Path, x: Tensor, second: str = "midpoint", halved: bool = True) -> Tensor:
    """DPM-Solver++(3M) as the authors' and k-diffusion's code has it, with half of the second derivative.

    The authors take the ``second`` step by "midpoint" (their default for 2M), k-diffusion by "taylor".
    """
    l, past = p.half_log_snr, []
    for i in range(p.steps):
        h = l[i + 1] - l[i]
        past = [p.data(x, i), *past][:3]
        phi_1, phi_2, phi_3 = math.expm1(-h), -h * phi(2, -h), h * phi(3, -h)
        x = p.sigma[i + 1] / p.sigma[i] * x - p.alpha[i + 1] * phi_1 * past[0]
        if i:
            r0 = (l[i] - l[i - 1]) / h
            D1_0 = (past[0] - past[1]) / r0
        if i == 1:
            x = x - p.alpha[i + 1] * (phi_1 / 2 if second == "midpoint" else phi_2) * D1_0
        if i > 1:
            r1 = (l[i - 1] - l[i - 2]) / h
            D1_1 = (past[1] - past[2]) / r1
            D1 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1)
            D2 = (D1_0 - D1_1) / (r0 + r1) * (1 if halved else 2)
            x = x - p.alpha[i + 1] * (phi_2 * D1 - phi_3 * D2)
    return x


def dpm_solver_pp_exact(p: Path, x: Tensor, order: int = 3) -> Tensor:
    """arXiv:2211.01095, equation 8: x_t = σ_t/σ_s x_s + σ_t ∫ e^λ x_θ dλ, x_θ a polynomial through the last values."""
    l, past = p.half_log_snr, []
    for i in range(p.steps):
        past = [p.data(x, i), *past][:order]
        nodes = [l[i - k] for k in range(len(past))]
        x = p.sigma[i + 1] / p.sigma[i] * x
        for j, x_0 in enumerate(past):
            ell = lagrange(nodes, j)
            weight = integral(lambda v, l_=l[i + 1], ell=ell: np.exp(v - l_) * ell(v), l[i], l[i + 1])
            x = x + p.alpha[i + 1] * weight * x_0  # σ_t e^{λ_t} = alpha_t
    return x


def sde_dpm_solver_pp_2m(
    p: Path, x: Tensor, xi: list[Tensor] | None = None, tau: float = 1.0, half: float = 0.5
) -> Tensor:
    """SDE-DPM-Solver++(2M), "midpoint" (arXiv:2211.01095, appendix; ``tau`` = 1); k-diffusion's eta is tau²."""
    l, past = p.half_log_snr, None
    for i in range(p.steps):
        h, x_0 = l[i + 1] - l[i], p.data(x, i)
        full = -math.expm1(-(1 + tau**2) * h)
        x = p.sigma[i + 1] / p.sigma[i] * math.exp(-(tau**2) * h) * x + p.alpha[i + 1] * full * x_0
        if i:
            r = (l[i] - l[i - 1]) / h
            x = x + half * p.alpha[i + 1] * full * (x_0 - past) / r
        if xi is not None:
            x = x + p.sigma[i + 1] * math.sqrt(-math.expm1(-2 * tau**2 * h)) * xi[i]
        past = x_0
    return x


def unipc(p: Path, x: Tensor, order: int = 3, variant: str = "bh2", corrector: bool = True) -> Tensor:
    """Zhao et al. 2023 (arXiv:2302.04867), data prediction, as in the authors' multistep_uni_pc_bh_update.

    Where one unknown is left the authors hard-code rho = ½, which is where B(h) begins to matter.
    """
    l, past = p.half_log_snr, [p.data(x, 0)]
    for i in range(p.steps):
        h, k = l[i + 1] - l[i], min(order, i + 1)
        B = -h if variant == "bh1" else math.expm1(-h)
        r = np.array([(l[i - m] - l[i]) / h for m in range(1, k)] + [1.0])
        D = [(past[m] - past[0]) / r[m - 1] for m in range(1, k)]
        R = np.stack([r**n for n in range(k)])
        b = np.array([-h * math.factorial(n) * phi(n + 1, -h) / B for n in range(1, k + 1)])
        rho_p = np.array([0.5]) if k == 2 else np.linalg.solve(R[:-1, :-1], b[:-1]) if k > 2 else []
        rho_c = np.array([0.5]) if k == 1 else np.linalg.solve(R, b)
        linear = p.sigma[i + 1] / p.sigma[i] * x - p.alpha[i + 1] * math.expm1(-h) * past[0]
        x = linear - p.alpha[i + 1] * B * sum(rho * d for rho, d in zip(rho_p, D, strict=True))
        if i + 1 < p.steps:  # nothing is evaluated after the last step
            new = p.data(x, i + 1)
            if corrector:
                change = sum(rho * d for rho, d in zip(rho_c, [*D, new - past[0]], strict=True))
                x = linear - p.alpha[i + 1] * B * change
            past = [new, *past][:order]
    return x


def deis(p: Path, x: Tensor, order: int = 3, log: bool = True) -> Tensor:
    """Zhang & Chen 2023 (arXiv:2204.13902), AB-DEIS with polynomials in log ρ, ρ = σ/α (or in ρ): equations 14, 15."""
    rho, past = [s / a for a, s in zip(p.alpha, p.sigma, strict=True)], []
    variable = np.log if log else (lambda v: v)
    for i in range(p.steps):
        past = [p.noise(x, i), *past][:order]
        nodes = [float(variable(rho[i - k])) for k in range(len(past))]
        y = x / p.alpha[i]
        for j, epsilon in enumerate(past):
            ell = lagrange(nodes, j)
            weight = integral(  # ∫ l_j dρ, with ρ = e^u
                lambda u, ell=ell: np.exp(u) * ell(variable(np.exp(u))), math.log(rho[i]), math.log(rho[i + 1])
            )
            y = y + weight * epsilon
        x = p.alpha[i + 1] * y
    return x


def sa_solver(
    p: Path,
    x: Tensor,
    xi: list[Tensor] | None = None,
    predictor: int = 2,
    corrector: int = 2,
    tau: float = 1.0,
    tweak: bool = True,
) -> Tensor:
    """Xue et al. 2023 (arXiv:2309.05019), data prediction, PEC, constant tau.

    A corrector of order c has c nodes, the new one among them. With two nodes diffusers' SASolverScheduler replaces the
    first moment of e^{(1+τ²)λ} by h²/2 (``tweak``). The corrector takes the predictor's noise and its evaluation.
    """
    l, past, a = p.half_log_snr, [p.data(x, 0)], 1 + tau**2

    def weights(nodes: list[float], s: float, end: float) -> list[float]:
        ells = [lagrange(nodes, j) for j in range(len(nodes))]
        found = [integral(lambda v, ell=ell: a * np.exp(a * (v - end)) * ell(v), s, end) for ell in ells]
        if tweak and len(nodes) == 2:
            h = end - s
            change = a * (h**2 / 2 - (a * h + math.expm1(-a * h)) / a**2) / (nodes[0] - nodes[1])
            found = [found[0] + change, found[1] - change]
        return found

    for i in range(p.steps):
        h = l[i + 1] - l[i]
        kept = p.sigma[i + 1] / p.sigma[i] * math.exp(-(tau**2) * h) * x
        if xi is not None:
            kept = kept + p.sigma[i + 1] * math.sqrt(-math.expm1(-2 * tau**2 * h)) * xi[i]
        known = min(predictor, i + 1)
        b = weights([l[i - k] for k in range(known)], l[i], l[i + 1])
        x = kept + p.alpha[i + 1] * sum(w * D for w, D in zip(b, past[:known], strict=True))
        if i + 1 < p.steps:
            new = p.data(x, i + 1)
            if corrector:
                nodes = min(corrector, i + 2)
                b = weights([l[i + 1 - k] for k in range(nodes)], l[i], l[i + 1])
                x = kept + p.alpha[i + 1] * sum(w * D for w, D in zip(b, [new, *past][:nodes], strict=True))
            past = [new, *past][: max(predictor, corrector)]
    return x


def noise_scale(zeta: float) -> float:
    """phi of "SDE_5", the authors' recommendation."""
    return zeta * (math.exp(zeta**0.3) + 10)


def er_sde(
    p: Path,
    x: Tensor,
    xi: list[Tensor] | None = None,
    order: int = 3,
    scale: Callable[[float], float] = noise_scale,
    second: float = 2.0,
) -> Tensor:
    """Cui et al. 2023 (arXiv:2309.06169), VP ER-SDE-Solver-1 to 3 (the authors' vp_3_order_taylor), ``second`` = 2.

    The first difference stays where it is when the second one comes in, so that order 3 is a name.
    """
    zeta, past, slopes = [s / a for a, s in zip(p.alpha, p.sigma, strict=True)], [], []

    def quad(f: Callable[[float], float], a: float, b: float) -> float:
        return scipy.integrate.quad(lambda u: f(math.exp(u)) * math.exp(u), math.log(a), math.log(b), epsrel=1e-13)[0]

    for i in range(p.steps):
        start, end, a = zeta[i], zeta[i + 1], p.alpha[i + 1]
        past = [p.data(x, i), *past][:2]
        r = scale(end) / scale(start)
        x = a / p.alpha[i] * r * x + a * (1 - r) * past[0]
        if xi is not None:
            x = x + a * math.sqrt(end**2 - (start * r) ** 2) * xi[i]
        if i >= 1 and order >= 2:
            s_int = quad(lambda v: 1 / scale(v), end, start)
            slopes = [(past[0] - past[1]) / (start - zeta[i - 1]), *slopes][:2]
            x = x + a * (end - start + s_int * scale(end)) * slopes[0]
        if i >= 2 and order >= 3:
            s_d_int = quad(lambda v, start=start: (v - start) / scale(v), end, start)
            curvature = second * (slopes[0] - slopes[1]) / (start - zeta[i - 2])
            x = x + a * ((end - start) ** 2 / 2 + s_d_int * scale(end)) * curvature
    return x


# ------------------------------------------------------------------------------ the references, without the library


@cache
def smooth() -> SDE:
    """Short enough that orders show at a few dozen steps."""
    return SDE(-x, sp.sqrt(2), T=2, cutoff=0.05)


def uniform(sde: SDE, steps: int) -> Tensor:
    """Increasing times, uniform in half log-SNR."""
    ends = sde.kernel.half_log_snr(torch.tensor([sde.kernel.T, sde.kernel.cutoff], dtype=torch.float64))
    times = sde.kernel.time_of(torch.linspace(*ends.tolist(), steps + 1, dtype=torch.float64)).flip(0)
    times[0], times[-1] = sde.kernel.cutoff, sde.kernel.T
    return times


def jittered(sde: SDE, steps: int, seed: int = 0) -> Tensor:
    """Increasing times with no two steps alike: ratios from one to three."""
    generator = np.random.default_rng(seed)
    position = np.concatenate([[0.0], np.cumsum(generator.uniform(0.5, 1.5, steps))])
    ends = sde.kernel.half_log_snr(torch.tensor([sde.kernel.T, sde.kernel.cutoff], dtype=torch.float64)).tolist()
    levels = ends[0] + (ends[1] - ends[0]) * torch.as_tensor(position / position[-1])
    times = sde.kernel.time_of(levels).flip(0)
    times[0], times[-1] = sde.kernel.cutoff, sde.kernel.T
    return times


def start(sde: SDE, n: int = 16) -> Tensor:
    """States at T, on the scale of sigma."""
    _, sigma, _ = sde.kernel.coefficients(torch.tensor(sde.kernel.T, dtype=torch.float64))
    return sigma * torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@cache
def limit() -> Tensor:
    """The probability flow of the smooth problem by SciPy: with y = x/σ, dy/dλ = e^λ E[x_0 | x_t]."""
    p = path(smooth(), uniform(smooth(), 1))
    z = start(smooth()) / p.sigma[0]

    def rate(l: float, y: np.ndarray) -> np.ndarray:
        alpha = 1 / math.sqrt(1 + math.exp(-2 * l))  # this SDE preserves variance
        sigma = math.sqrt(1 - alpha**2)
        return (math.exp(l) * bayes(sigma * torch.as_tensor(y).reshape(-1, 2), alpha, sigma)).numpy().ravel()

    solved = scipy.integrate.solve_ivp(rate, p.half_log_snr, z.ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    return p.sigma[1] * torch.as_tensor(solved.y[:, -1]).reshape(-1, 2)


def slope(reference: Callable[..., Tensor], steps: int) -> float:
    """log2 of what doubling the steps does to the distance from the probability flow."""
    sde = smooth()
    errors = [
        float((reference(path(sde, uniform(sde, n)), start(sde)) - limit()).square().mean().sqrt())
        for n in (steps, 2 * steps)
    ]
    return math.log2(errors[0] / errors[1])


# A corrector adds one to the order: UniPC-p has p + 1, and an SA corrector of c nodes c.
ORDERS = {
    "DDIM": (ddim, 1),
    "DPM-Solver++(2M)": (dpm_solver_pp_2m, 2),
    "DPM-Solver++(3M) as published": (dpm_solver_pp_3m_published, 2),
    "order 2 with exact coefficients": (partial(dpm_solver_pp_exact, order=2), 2),
    "SDE-DPM-Solver++(2M), tau = 0": (partial(sde_dpm_solver_pp_2m, tau=0.0), 2),
    "UniPC-1": (partial(unipc, order=1), 2),
    "UniPC-2": (partial(unipc, order=2), 3),
    "UniP-2": (partial(unipc, order=2, corrector=False), 2),
    "DEIS-2": (partial(deis, order=2), 2),
    "SA-Solver(2, 2), tau = 0": (partial(sa_solver, tau=0.0), 2),
    "ER-SDE-1, phi = zeta": (partial(er_sde, order=1, scale=lambda v: v), 1),
    "ER-SDE-2, phi = zeta": (partial(er_sde, order=2, scale=lambda v: v), 2),
    "ER-SDE-3, phi = zeta": (partial(er_sde, scale=lambda v: v), 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_references_converge_to_the_flow_with_their_order(name):
    reference, order = ORDERS[name]
    assert abs(slope(reference, 96) - order) < 0.2


@pytest.mark.parametrize("name", ["exact coefficients", "DEIS", "UniP", "UniPC"])
def test_third_order_references_beat_second_order_despite_their_first_order_start(name):
    """The first step leaves an error of order 2 (after a corrector 3), which the later steps damp but do not mend."""
    reference = {"DEIS": deis, "UniPC": unipc, "UniP": partial(unipc, corrector=False)}.get(name, dpm_solver_pp_exact)
    assert slope(reference, 48) > (3.2 if name == "UniPC" else 2.2)


def variance_error(reference: Callable[..., Tensor], steps: int, std: float = 0.5) -> float:
    """The relative error of the variance of a sampler for N(0, std²), without Monte Carlo.

    The sampler is linear in x_T and in each step's noise, so it runs once on a batch of unit inputs.
    """

    def linear(x: Tensor, alpha: float, sigma: float) -> Tensor:
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x

    p = path(smooth(), uniform(smooth(), steps), linear)
    first, last = (math.hypot(a * std, s) for a, s in ((p.alpha[0], p.sigma[0]), (p.alpha[-1], p.sigma[-1])))
    units = torch.eye(steps + 1, dtype=torch.float64)[..., None]
    out = reference(p, first * units[0], list(units[1:]))
    return float(out.square().sum()) / last**2 - 1


# Past values of a stochastic solver do not know the noise, so that no order of interpolation gives more than 2.
WEAK_ORDERS = {
    "DDIM, eta = 0.5": (partial(ddim, eta=0.5), 1),
    "DDIM, eta = 1": (partial(ddim, eta=1.0), 1),
    "DDPM": (ddpm, 1),
    "SDE-DPM-Solver++(2M)": (sde_dpm_solver_pp_2m, 2),
    "SDE-DPM-Solver++(2M), tau = 0.5": (partial(sde_dpm_solver_pp_2m, tau=0.5), 2),
    "SA-Solver(2, 2)": (sa_solver, 2),
    "SA-Solver(2, 2), tau = 0.5": (partial(sa_solver, tau=0.5), 2),
    "SA-Solver(2), no corrector": (partial(sa_solver, corrector=0), 2),
    "ER-SDE-1": (partial(er_sde, order=1), 1),
    "ER-SDE-2": (partial(er_sde, order=2), 2),
    "ER-SDE-3": (er_sde, 2),
}


@pytest.mark.parametrize("name", WEAK_ORDERS)
def test_stochastic_references_tend_to_the_right_variance_with_their_weak_order(name):
    reference, order = WEAK_ORDERS[name]
    errors = [variance_error(reference, n) for n in (48, 96)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


def last_step_error(reference: Callable[..., Tensor], power: int, of: str, tau: float = 0.0) -> float:
    """What the last of six steps adds to the error where the prediction is a power of half log-SNR.

    With "data in zeta" it is a power of σ/α. ``tau`` is of the SDE whose mean is taken.
    """
    zeta = [4.0, 2.9, 1.7, 1.1, 0.8, 0.5, 0.3]
    alpha = [1 / math.hypot(1.0, v) for v in zeta]
    sigma = [v * a for v, a in zip(zeta, alpha, strict=True)]

    def polynomial(x: Tensor, a: float, s: float) -> Tensor:
        value = math.log(a / s) ** power
        if of == "noise":
            return (x - s * value) / a
        return torch.full_like(x, value if of == "data" else (s / a) ** power)

    x = torch.ones(1, 1, dtype=torch.float64)
    before = float(reference(Path(alpha[:-1], sigma[:-1], polynomial), x)) / alpha[-2]
    after = float(reference(Path(alpha, sigma, polynomial), x)) / alpha[-1]
    l, end = -math.log(zeta[-2]), -math.log(zeta[-1])
    if of == "noise":  # dz = ε dζ, z = x/α
        truth = before - scipy.integrate.quad(lambda v: v**power * math.exp(-v), l, end, epsabs=1e-14)[0]
    else:  # dz = a (D - z) dλ, a = 1 + τ²
        a = 1 + tau**2
        value = (lambda v: v**power) if of == "data" else (lambda v: math.exp(-power * v))
        added = scipy.integrate.quad(lambda v: a * math.exp(a * (v - end)) * value(v), l, end, epsabs=1e-14)[0]
        truth = math.exp(-a * (end - l)) * before + added
    return abs(after - truth)


EXACT_ON_POLYNOMIALS = {
    "exact coefficients, order 3": (dpm_solver_pp_exact, 2, "data"),
    "UniPC-3, bh1": (partial(unipc, variant="bh1"), 2, "data"),
    "UniPC-3, bh2": (unipc, 2, "data"),
    "DEIS-3": (deis, 2, "noise"),
    "SA-Solver(2), not tweaked": (partial(sa_solver, corrector=0, tweak=False), 1, "data", 1.0),
    "SA-Solver(3)": (partial(sa_solver, predictor=3, corrector=0, tau=0.6), 2, "data", 0.6),
    "ER-SDE-2, phi = zeta": (partial(er_sde, order=2, scale=lambda v: v), 1, "data in zeta"),
    "ER-SDE-2, phi = zeta²": (partial(er_sde, order=2, scale=lambda v: v**2), 1, "data in zeta", 1.0),
}


@pytest.mark.parametrize("name", EXACT_ON_POLYNOMIALS)
def test_references_are_exact_where_the_prediction_is_a_polynomial(name):
    assert last_step_error(*EXACT_ON_POLYNOMIALS[name]) < 1e-13


def test_the_published_third_order_update_misses_half_of_the_second_derivative():
    """A factor of 2 makes it the exact update, from k-diffusion's second step on."""
    mended = partial(dpm_solver_pp_3m_published, halved=False)
    assert last_step_error(mended, 2, "data") < 1e-13
    assert last_step_error(dpm_solver_pp_3m_published, 1, "data") < 1e-13
    assert last_step_error(dpm_solver_pp_3m_published, 2, "data") > 1e-3
    sde, _ = problem("VP")
    p, x = path(sde, jittered(sde, STEPS)), start(sde)
    assert_same(partial(mended, second="taylor")(p, x), dpm_solver_pp_exact(p, x))


def test_the_third_order_of_er_sde_does_not_integrate_a_quadratic():
    assert last_step_error(partial(er_sde, scale=lambda v: v), 1, "data in zeta") < 1e-13
    assert last_step_error(partial(er_sde, scale=lambda v: v), 2, "data in zeta") > 1e-3


def test_references_of_different_papers_agree_where_the_papers_do():
    sde, _ = problem("CosineVP")
    p, x = path(sde, jittered(sde, STEPS)), start(sde)
    xi = normals(STEPS, tuple(x.shape), seed=3)
    assert_same(ddim(p, x), dpm_solver_pp_exact(p, x, order=1))
    assert_same(ddim(p, x), deis(p, x, order=1))
    assert_same(ddim(p, x, xi, eta=1.0), ddpm(p, x, xi))
    assert_same(ddpm(p, x, xi), sa_solver(p, x, xi, predictor=1, corrector=0))
    assert_same(ddpm(p, x, xi), er_sde(p, x, xi, order=1, scale=lambda v: v**2))
    assert_same(dpm_solver_pp_2m(p, x), sde_dpm_solver_pp_2m(p, x, xi, tau=0.0))
    assert_same(dpm_solver_pp_2m(p, x), unipc(p, x, order=2, corrector=False))
    assert_same(dpm_solver_pp_exact(p, x, order=2), sa_solver(p, x, xi, corrector=0, tau=0.0, tweak=False))


# ------------------------------------------------------------------------------------------------ the library

STEPS = 12
SDES = {
    "VP": catalog.VP,
    "VE": catalog.VE,
    "CosineVP": catalog.CosineVP,
    "EDM": catalog.EDM,
    "FlowMatching": catalog.FlowMatching,
}


class Counted(GaussianMixture):
    """The exact score, which counts its calls."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        self.calls += 1
        return super().forward(x, t)


@cache
def problem(name: str) -> tuple[SDE, Counted]:
    sde = SDES[name]()
    return sde, Counted(sde, MEANS, VARIANCES, WEIGHTS)


def preset(name: str, **options: object) -> object:
    from sdeflow.solvers import presets  # here, so that the references' own tests need no presets

    return getattr(presets, name)(**options)


def normals(steps: int, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """The normals that the library draws: one array a step, in their order."""
    stream = NoiseStream(resolve_seed(seed), "path")
    return [stream.normal(shape, torch.float64) for _ in range(steps)]


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-11) -> None:
    """Equal to rounding: relative to the largest entry, which at alpha_T = 1e-3 loses three digits on the way."""
    assert ours.dtype == theirs.dtype == torch.float64
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


DETERMINISTIC = {
    "ddim": (("ddim", {}), ddim),
    "dpmpp2m": (("dpmpp2m", {}), dpm_solver_pp_2m),
    "dpmpp3m": (("dpmpp3m", {}), dpm_solver_pp_exact),
    "dpmpp3m, published": (("dpmpp3m", {"published": True}), dpm_solver_pp_3m_published),
    "unipc": (("unipc", {}), unipc),
    "unipc, bh1": (("unipc", {"variant": "bh1"}), partial(unipc, variant="bh1")),
    "unipc, order 2": (("unipc", {"order": 2}), partial(unipc, order=2)),
    "unipc, order 2, bh1": (("unipc", {"order": 2, "variant": "bh1"}), partial(unipc, order=2, variant="bh1")),
    "unipc, order 1": (("unipc", {"order": 1}), partial(unipc, order=1)),
    "deis": (("deis", {}), deis),
    "deis, order 2": (("deis", {"order": 2}), partial(deis, order=2)),
    "deis, order 1": (("deis", {"order": 1}), partial(deis, order=1)),
}

STOCHASTIC = {
    "ddim, eta 0.4": (("ddim", {"eta": 0.4}), partial(ddim, eta=0.4)),
    "ddim, eta 1": (("ddim", {"eta": 1.0}), partial(ddim, eta=1.0)),
    "ddpm": (("ddpm", {}), ddpm),
    "dpmpp_sde": (("dpmpp_sde", {}), sde_dpm_solver_pp_2m),
    "dpmpp_sde, eta 0.5": (("dpmpp_sde", {"eta": 0.5}), partial(sde_dpm_solver_pp_2m, tau=0.5)),
    "sa_solver": (("sa_solver", {}), sa_solver),
    "sa_solver, tau 0.6": (("sa_solver", {"tau": 0.6}), partial(sa_solver, tau=0.6)),
    "sa_solver, 3 and 3": (
        ("sa_solver", {"predictor": 3, "corrector": 3}),
        partial(sa_solver, predictor=3, corrector=3),
    ),
    "sa_solver, 3 and 4": (
        ("sa_solver", {"predictor": 3, "corrector": 4, "tau": 0.6}),
        partial(sa_solver, predictor=3, corrector=4, tau=0.6),
    ),
    "er_sde": (("er_sde", {}), er_sde),
    "er_sde, order 2": (("er_sde", {"order": 2}), partial(er_sde, order=2)),
    "er_sde, order 1": (("er_sde", {"order": 1}), partial(er_sde, order=1)),
}


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_presets_of_the_flow_reproduce_their_papers(name, sde):
    (solver, options), reference = DETERMINISTIC[name]
    sde, score = problem(sde)
    times, z = jittered(sde, STEPS), start(sde)
    score.calls = 0
    ours = sde.flow_ode(score).decode(z, preset(solver, **options), STEPS, grid=times)
    assert score.calls == STEPS
    assert_same(ours, reference(path(sde, times), z))


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_presets_of_the_reverse_sde_reproduce_their_papers(name, sde):
    (solver, options), reference = STOCHASTIC[name]
    sde, score = problem(sde)
    times, shape = jittered(sde, STEPS), (16, 2)
    reverse = sde.reverse(score)
    x_T = reverse.model.initial_state(shape, 5, torch.float64, None)
    score.calls = 0
    ours = reverse.sample(shape, preset(solver, **options), STEPS, seed=5, dtype=torch.float64, grid=times)
    assert score.calls == STEPS
    assert_same(ours, reference(path(sde, times), x_T, normals(STEPS, shape, seed=5)))


def named_grid(sde: SDE, grid: str | None, steps: int) -> Tensor:
    """What a grid's name means, from cutoff to T."""
    kernel = sde.kernel
    if grid == "t":
        return torch.linspace(kernel.cutoff, kernel.T, steps + 1, dtype=torch.float64)
    if grid != "karras":
        return uniform(sde, steps)
    ends = kernel.half_log_snr(torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64)).neg().exp()
    low, high = (ends ** (1 / 7)).tolist()  # arXiv:2206.00364, equation 5, in σ/α
    times = kernel.time_of(-7 * torch.linspace(low, high, steps + 1, dtype=torch.float64).log())
    times[0], times[-1] = kernel.cutoff, kernel.T
    return times


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("grid", [None, "log_snr", "t", "karras"])
def test_named_grids_are_the_papers(grid, sde):
    """A table between the name and the times may cost some digits, so the times are compared to 1e-8 only."""
    sde, score = problem(sde)
    z = start(sde)
    p = path(sde, named_grid(sde, grid, STEPS))
    for name in ("dpmpp2m", "unipc", "deis"):
        ours = sde.flow_ode(score).decode(z, preset(name), STEPS, grid=grid)
        assert_same(ours, DETERMINISTIC[name][1](p, z), 1e-8)
    reverse, shape = sde.reverse(score), tuple(z.shape)
    x_T = reverse.model.initial_state(shape, 2, torch.float64, None)
    ours = reverse.sample(shape, preset("sa_solver"), STEPS, seed=2, dtype=torch.float64, grid=grid)
    assert_same(ours, sa_solver(p, x_T, normals(STEPS, shape, seed=2)), 1e-8)


NAMES = {
    "ddim": "flow",
    "dpmpp2m": "flow",
    "dpmpp3m": "flow",
    "dpmpp3m_published": "flow",
    "unipc": "flow",
    "deis": "flow",
    "ddpm": "reverse",
    "dpmpp_sde": "reverse",
    "sa_solver": "reverse",
    "er_sde": "reverse",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_preset(name):
    sde, score = problem("VP")
    solver = preset("dpmpp3m", published=True) if name == "dpmpp3m_published" else preset(name)
    if NAMES[name] == "flow":
        flow, z = sde.flow_ode(score), start(sde)
        assert torch.equal(flow.decode(z, name, STEPS), flow.decode(z, solver, STEPS))
    else:
        reverse = sde.reverse(score)
        first, second = (reverse.sample((4, 2), s, STEPS, seed=0, dtype=torch.float64) for s in (name, solver))
        assert torch.equal(first, second)


@pytest.mark.parametrize("sde", ["VP", "FlowMatching"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_presets_reproduce_their_papers_in_no_more_steps_than_their_order(steps, sde):
    """Where every step is one of the start's. One step of h = 13 costs the noise form e^h · 1e-16: hence 1e-9."""
    sde, score = problem(sde)
    times, shape = jittered(sde, steps), (16, 2)
    p, z = path(sde, times), start(sde)
    flow, reverse = sde.flow_ode(score), sde.reverse(score)
    for (solver, options), reference in DETERMINISTIC.values():
        assert_same(flow.decode(z, preset(solver, **options), steps, grid=times), reference(p, z), 1e-9)
    x_T, xi = reverse.model.initial_state(shape, 5, torch.float64, None), normals(steps, shape, seed=5)
    for (solver, options), reference in STOCHASTIC.values():
        ours = reverse.sample(shape, preset(solver, **options), steps, seed=5, dtype=torch.float64, grid=times)
        assert_same(ours, reference(p, x_T, xi), 1e-9)


# ------------------------------------------------------------------------------------------- mistakes are noticed

MISTAKES = {
    "2M, 1/r for 1/(2r)": (dpm_solver_pp_2m, {"half": 1.0}),
    "2M, exact second moment": (dpm_solver_pp_2m, lambda p, x: dpm_solver_pp_exact(p, x, order=2)),
    "3M, second difference doubled": (dpm_solver_pp_3m_published, {"halved": False}),
    "3M, another second step": (dpm_solver_pp_3m_published, {"second": "taylor"}),
    "3M, order 2": (dpm_solver_pp_exact, {"order": 2}),
    "SDE-2M, 1/r for 1/(2r)": (sde_dpm_solver_pp_2m, {"half": 1.0}),
    "SDE-2M, another eta": (sde_dpm_solver_pp_2m, {"tau": 0.999}),
    "UniPC, the other B(h)": (unipc, {"variant": "bh1"}),
    "UniPC, no corrector": (unipc, {"corrector": False}),
    "UniPC, order 2": (unipc, {"order": 2}),
    "DEIS, polynomials in rho": (deis, {"log": False}),
    "DEIS, order 2": (deis, {"order": 2}),
    "DDIM, another eta": (partial(ddim, eta=0.5), {"eta": 0.501}),
    "DDPM, the larger variance": (ddpm, {"posterior": False}),
    "SA, no tweak": (sa_solver, {"tweak": False}),
    "SA, no corrector": (sa_solver, {"corrector": 0}),
    "SA, another tau": (sa_solver, {"tau": 0.999}),
    "ER-SDE, half the curvature": (er_sde, {"second": 1.0}),
    "ER-SDE, another scale": (er_sde, {"scale": lambda v: v * (math.exp(v**0.3) + 9)}),
    "ER-SDE, order 2": (er_sde, {"order": 2}),
    "noise in another order": (ddpm, lambda p, x, xi: ddpm(p, x, xi[::-1])),
}


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparison_notices_mistakes(name, sde):
    """On the very problems of the comparison, with a thousandfold margin."""
    right, change = MISTAKES[name]
    wrong = change if callable(change) else partial(right, **change)
    sde, _ = problem(sde)
    p, x = path(sde, jittered(sde, STEPS)), start(sde)
    noisy = "xi" in inspect.signature(right).parameters
    given = (p, x, normals(STEPS, tuple(x.shape), seed=5)) if noisy else (p, x)
    with pytest.raises(AssertionError):
        assert_same(wrong(*given), right(*given), 1e-8)


def test_churn_is_divided_by_the_number_of_steps():
    """Where the score is 0, a step from t multiplies sigma = t by 1 + S_churn / N and adds that noise alone."""
    sde, steps, churn = catalog.EDM(), 4, 1.0
    times = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.002], dtype=torch.float64)
    prior = Gaussian(0.0, 1e-3)
    reverse = sde.reverse(lambda x, t: torch.zeros_like(x), prior=prior)
    n = 20_000
    x = reverse.sample((n, 1), solver=solvers.StochasticHeun(S_churn=churn), grid=times, seed=3)
    expected = float(times[1:-1].square().sum()) * ((1 + churn / steps) ** 2 - 1)  # T is as far as noise can be raised
    assert abs(float(x.var()) / expected - 1) < 5 * math.sqrt(2 / n)
