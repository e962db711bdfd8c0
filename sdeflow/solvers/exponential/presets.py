r"""The published samplers as options of :class:`~sdeflow.solvers.Exponential`: the same numbers to rounding.

Each is its paper's step on whatever grid it is given. What the papers' code adds around it (a last step to sigma = 0,
lower orders at the end of short solves) is left to ``denoise=True`` and to the grid.
"""

from __future__ import annotations

import numpy as np

from sdeflow.numerics.checks import checked_choice, checked_count, checked_flag
from sdeflow.solvers.exponential.singlestep import SingleStep
from sdeflow.solvers.exponential.solver import Exponential

__all__ = [
    "ddim", "ddpm", "deis", "dpmpp2m", "dpmpp2s", "dpmpp3m", "dpmpp3s", "dpmpp_sde", "er_sde", "sa_solver", "unipc",
]  # fmt: skip


def ddim(eta: float = 0.0) -> Exponential:
    """DDIM (Song et al. 2020, arXiv:2010.02502): order 1; ``eta`` times the posterior's standard deviation as noise."""
    return Exponential(1, "data", corrector=False, eta=eta, variance="posterior")


def ddpm() -> Exponential:
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239), with the posterior's variance: eta = 1, order 1."""
    return Exponential(1, "data", corrector=False, eta=1.0)


def dpmpp2m() -> Exponential:
    """DPM-Solver++(2M) as published, with its midpoint weights (Lu et al. 2022, arXiv:2211.01095)."""
    return Exponential(2, "data", corrector=False, rule="midpoint")


def dpmpp3m(published: bool = False) -> Exponential:
    """DPM-Solver++(3M). ``published`` as released, with half the second difference, which is of order 2."""
    checked_flag(published, "published")
    return Exponential(3, "data", corrector=False, rule="half_curvature" if published else "exact")


def dpmpp2s(ratio: float = 0.5) -> SingleStep:
    """DPM-Solver++(2S), two calls a step, with its published weights (arXiv:2211.01095)."""
    return SingleStep(2, "data", rule="midpoint", ratio=ratio)


def dpmpp3s() -> SingleStep:
    """DPM-Solver++(3S), three calls a step (arXiv:2211.01095)."""
    return SingleStep(3, "data")


def dpmpp_sde(eta: float = 1.0) -> Exponential:
    """SDE-DPM-Solver++(2M), of the reverse SDE (arXiv:2211.01095). k-diffusion's ``eta`` is the square of this one."""
    return Exponential(2, "data", corrector=False, eta=eta, rule="midpoint")


def unipc(order: int = 3, variant: str = "bh2") -> Exponential:
    """UniPC (Zhao et al. 2023, arXiv:2302.04867): UniP-p with UniC-p. ``variant`` "bh1" or "bh2" is its B(h).

    B(h) matters only in formulas with two nodes, where the paper's code sets rho = ½.
    """
    checked_choice(variant, "variant", ("bh1", "bh2"))
    return Exponential(order, "data", corrector=True, rule="midpoint" if variant == "bh2" else "half_step")


def deis(order: int = 3) -> Exponential:
    """DEIS, Adams-Bashforth in log rho on the noise (Zhang & Chen 2022, arXiv:2204.13902)."""
    return Exponential(order, "noise", corrector=False)


def sa_solver(predictor: int = 2, corrector: int = 2, tau: float = 1.0) -> Exponential:
    """SA-Solver (Xue et al. 2023, arXiv:2309.05019): stochastic Adams, tau its eta.

    ``corrector`` counts the values of the corrector with the new one, 0 for none.
    """
    if checked_count(corrector, "corrector", 0) not in (0, 2, 3, 4, 5):
        raise ValueError(f"corrector must be 0 or 2 to 5 values, not {corrector!r}.")
    corrector = max(corrector, 1)
    return Exponential(predictor, "data", corrector=corrector - 1, eta=tau, rule="half_step")


def er_sde(order: int = 3) -> Exponential:
    r"""ER-SDE (Cui et al. 2023, arXiv:2309.06169), orders 1 to 3, with its noise phi(zeta) = zeta (e^{zeta^0.3} + 10).

    phi stands for exp(-∫ (1 + eta²) dlambda), so that eta² = dlog phi / dlog zeta - 1; predictions are polynomials in
    zeta, and order 3 leaves out the correction of the first derivative, as published.
    """
    if checked_count(order, "order") > 3:
        raise ValueError(f"order must be 1, 2 or 3, not {order!r}.")
    return Exponential(order, "data", corrector=False, eta=_er_sde_eta, variable="ratio", rule="uncentred")


def _er_sde_eta(half_log_snr: np.ndarray) -> np.ndarray:
    power = np.exp(-0.3 * half_log_snr)
    return np.sqrt(0.3 * power / (1.0 + 10.0 * np.exp(-power)))
