r"""The compiled numbers of an affine SDE against the oracle's: coefficients, moments, transitions, priors, log-SNR.

moments       Φ' = F Φ,  P' = F P + P Fᵀ + Q,  m' = F m + b,  from 1, P0, 0 at t = 0
transition    the same from 1, 0, 0 at s
marginal      N(Φ mean + m, Φ diag(std²) Φᵀ + P)
log-SNR       log(alpha / sigma), of a coupled state ½ log J of its data, J = diag(Φᵀ P⁻¹ Φ); its rate is
              -½ diag(Φᵀ P⁻¹ Q P⁻¹ Φ) / J
"""

from __future__ import annotations

import numpy as np
import torch

from sdeflow.laws.gaussian import Gaussian
from sdeflow.proof.certificate.oracle import Law, ratio, sizes
from sdeflow.proof.certificate.subject import Subject, product, transposed
from sdeflow.symbolic.evaluate import UnknownValue, in_digits

__all__ = [
    "basis",
    "coefficients",
    "cutoff_rule",
    "fisher",
    "information",
    "log_snr",
    "marginals",
    "moments",
    "transitions",
]

_TOLERANCE = 1e-9  # the kernel promises 1e-10; the rest is what cancels in a formula that was not rewritten
_CUTOFF_NOISE = 2e-3
_UNSEEN = 1e-6  # widths of the law: an offset far below is the tail of a pulse that has yet to come, and moves nothing
_SMALLEST = 1e-290  # what is less has fewer digits

Array = np.ndarray


def coefficients(subject: Subject) -> None:
    """F, b and g gᵀ: of all entries against NumPy's reading of f and g, of some against 30 digits."""
    times = subject.apart(subject.times)
    F, b, Q = _compiled(subject, times)
    laws = [oracle.coefficients(times) for oracle in subject.oracles]
    expected = [np.concatenate(parts, axis=0).swapaxes(0, 1) for parts in zip(*laws, strict=True)]
    few = np.concatenate([np.geomspace(subject.first, subject.T, 4), subject.rng.uniform(0, subject.T, 3)])
    few = subject.apart(few)
    states = subject.rng.normal(size=(len(few), subject.k))
    for entry in subject.some_entries:
        F_, b_, Q_ = (v[:, entry] for v in _compiled(subject, few))
        f, gram = in_digits(subject.declaration, subject.numbers_of(entry), few, states)
        size = product(abs(F_), abs(states)) + abs(b_)
        error = abs(product(F_, states) + b_ - f)
        if not (ratio(error, size) <= _TOLERANCE).all():
            beside, _ = in_digits(subject.declaration, subject.numbers_of(entry), few * (1.0 - 4e-16), states)
            # What the rounding of t moves, as near a zero of a sawtooth.
            error = np.maximum(error - abs(beside - f), 0.0)
        subject.note("f", "compiled F x + b = f(x, t)", ratio(error, size), _TOLERANCE, few, states)
        subject.note("g", "compiled Q = g gᵀ", ratio(Q_ - gram, sizes(gram)), _TOLERANCE, few)
    if subject.values.shape:
        errors = (ratio(F - expected[0], abs(F)), ratio(b - expected[1], abs(b)))
        subject.note("f", "all entries", np.maximum(errors[0][..., 0], errors[1]), 1e-8, times)
        subject.note("g", "all entries", ratio(Q - expected[2], abs(Q)), 1e-8, times)


def moments(subject: Subject) -> None:
    """Φ, P and the offset at all times of the subject, entry by entry."""
    times = subject.dense if len(subject.rows) <= 64 else subject.times
    law, (phi, P, m) = subject.law(times), subject.gaussian(times)
    _compare(subject, ("alpha", "sigma²", "offset"), law, phi, P, m, times)


def _compare(
    subject: Subject, names: tuple[str, str, str], law: Law, phi: Array, P: Array, m: Array, times: Array,
    since: str = "from its value at t = 0", tolerance: float = _TOLERANCE,
) -> None:  # fmt: skip
    """Notes how far Φ, P and the offset are from the oracle's, on the scale of each entry."""
    departure = np.abs(law.phi - np.eye(subject.k)).max((-1, -2), keepdims=True)
    size = np.abs(law.phi) + (1e-3 * departure if subject.coupled else 0.0) + _SMALLEST
    # What the oracle doubts is relative to the largest entry.
    largest = np.abs(law.phi).max((-1, -2), keepdims=True)
    size = size + largest * law.phi_doubt.reshape(-1, 1, 1, 1) / tolerance
    of_phi = ratio(phi - law.phi, size)
    doubt = law.phi_doubt + 1e-11 * np.abs(law.log_phi).max(1)  # of exp(log alpha) the digits of the logarithm
    subject.note(names[0], f"alpha' = F alpha, {since}", of_phi, tolerance, times, doubt=doubt)
    of_P = ratio(P - law.cov, sizes(law.cov) + _SMALLEST)
    subject.note(names[1], f"P' = F P + P Fᵀ + g gᵀ, {since}", of_P, tolerance, times, doubt=law.cov_doubt)
    width = np.sqrt(np.abs(np.diagonal(law.cov, axis1=-2, axis2=-1)))
    scale = law.reach + 1e-3 * law.reach.max(-1, keepdims=True) + _UNSEEN * width + _SMALLEST
    of_m = ratio(m - law.offset, scale)
    subject.note(names[2], f"m' = F m + b, {since}", of_m, tolerance, times, doubt=law.offset_doubt)


def transitions(subject: Subject) -> None:
    """p(x_t | x_s) from random times to later ones, from t = 0 with P0 and from a known state without."""
    kernel, T, low = subject.affine, subject.T, max(subject.cutoff, 1e-3 * subject.T)
    random = np.sort(subject.rng.uniform(low, T, size=(3, 2)), axis=1).tolist()
    pairs = [(0.0, 0.5 * T), (low, 0.4 * T), (0.3 * T, 0.7 * T), (0.5 * T, 0.51 * T), (0.6 * T, T), *random]
    x = torch.zeros(1, *subject.event, dtype=torch.float64)
    for s, t in zip(*(subject.apart(np.array(ends)).tolist() for ends in zip(*pairs, strict=True)), strict=True):
        for known in (False, True) if s == 0 and any(subject.declaration.initial_variances) else (False,):
            if not s < t:
                continue
            law = subject.law(np.array([t]), s, known)
            path = kernel.transition(x, s, t, exactly=True) if known else kernel.transition(x, s, t)
            whole = subject.law(np.array([t]))
            left = sizes(law.cov) + 1e-6 * sizes(whole.cov)  # the noise since s is a difference of two variances
            sigma = subject.map(path.sigma, x)
            residual = (
                ratio(subject.map(path.alpha, x) - law.phi[0], abs(law.phi[0]) + 1e-3 * abs(law.phi[0]).max()),
                ratio(sigma @ transposed(sigma) - law.cov[0], left[0] + _SMALLEST),
                ratio(subject.level(path.offset, x) - law.offset[0], law.reach[0] + whole.reach[0] + _SMALLEST),
            )
            doubt = float(law.phi_doubt[0] + law.cov_doubt[0] + law.offset_doubt[0] + whole.cov_doubt[0])
            doubt += 1e-11 * float(np.abs(whole.log_phi).max())
            worst = max(float(np.nan_to_num(part, nan=np.inf).max()) for part in residual)
            subject.note("transition", f"p(x_t | x_s) from s = {s:.3g}", worst, 1e-8, t, doubt=doubt)


def marginals(subject: Subject) -> None:
    """The prior, that of data moments, and marginals of Gaussian data at other times."""
    sde, kernel, T = subject.sde, subject.affine, subject.T
    data = np.array([i not in subject.declaration.auxiliary for i in range(subject.k)], dtype=float)
    middle = float(subject.rng.uniform(max(subject.cutoff, 0.1 * T), T))
    mean, std = (torch.as_tensor(subject.rng.uniform(*ends, size=subject.event)) for ends in ((-1.0, 1.0), (0.2, 2.0)))
    found: list[tuple[torch.Tensor | float, torch.Tensor | float, float, Gaussian]]
    found = [(0.0, 0.0, T, kernel.marginal(0.0, 0.0, T)), (mean, std, middle, kernel.marginal(mean, std, middle))]
    if subject.basis is None:
        found.append((0.7, 0.4, T, kernel.marginal(0.7, 0.4, T)))
    if hasattr(sde, "prior_for"):
        found += [(0.0, 0.0, T, sde.prior), (mean, std, T, sde.prior_for(mean, std))]
    for centre, width, at, gaussian in found:
        law = subject.law(np.array([at]))
        like = torch.zeros(1, *subject.event, dtype=torch.float64)
        if isinstance(centre, float) or isinstance(width, float):
            m, c = float(centre) * data[None], float(width) * data[None]
        else:  # moments of whole states, the auxiliary components' too
            m, c = subject.level(kernel.to_basis(centre[None]), like), subject.level(width[None], like)
        expected = product(law.phi[0], m) + law.offset[0]
        spread = law.phi[0] @ (c[:, :, None] * np.eye(subject.k) * c[:, None]) @ transposed(law.phi[0]) + law.cov[0]
        level, root = _of_gaussian(subject, gaussian, like)
        shift = ratio(level - expected, product(abs(law.phi[0]), abs(m)) + law.reach[0] + np.sqrt(_diagonal(spread)))
        error = ratio(root @ transposed(root) - spread, sizes(spread))
        worst = max(float(np.nan_to_num(v, nan=np.inf).max()) for v in (shift, error))
        doubt = float(law.cov_doubt[0] + law.phi_doubt[0] + law.offset_doubt[0])
        shown = f"N({centre:g}, {width:g}²)" if isinstance(centre, float) else "random moments"
        subject.note("prior", f"p(x_t) of data {shown}", worst, _TOLERANCE, at, doubt=doubt)


def _of_gaussian(subject: Subject, gaussian: Gaussian, like: torch.Tensor) -> tuple[Array, Array]:
    """Mean (e, k) and root (e, k, k) of a Gaussian, in the basis."""
    root = gaussian.root.values
    if subject.coupled:
        mean = gaussian.mean.reshape(subject.k, -1)[:, :1].reshape(1, subject.k)
        return mean.numpy(), root.reshape(-1, subject.k, subject.k)[:1].numpy()
    return subject.level(gaussian.mean, like), subject.level(root, like)[..., None]


def _diagonal(P: Array) -> Array:
    return np.diagonal(P, axis1=-2, axis2=-1)


# -------------------------------------------------------------------- the log-SNR


def information(subject: Subject, times: Array) -> tuple[Array, Array, Array]:
    """The half-log-SNR at times (n,), its rate, and the rounding of P⁻¹, each (n,)."""
    log_J, rate, doubt = fisher(subject, times)
    return 0.5 * log_J.mean((1, 2)), rate.mean((1, 2)), doubt


def fisher(subject: Subject, times: Array) -> tuple[Array, Array, Array]:
    """log J of each entry and data component and half its rate, (n, e, data), and the rounding of P⁻¹, (n,)."""
    law = subject.law(times)
    Q = np.concatenate([oracle.coefficients(times)[2] for oracle in subject.oracles]).swapaxes(0, 1)
    if not subject.coupled:
        P = law.cov[..., 0, 0]
        log_J, rate = 2.0 * law.log_phi - np.log(P), -0.5 * Q[..., 0, 0] / P
        return log_J[..., None], rate[..., None], law.phi_doubt + law.cov_doubt
    data = [i for i in range(subject.k) if i not in subject.declaration.auxiliary]
    scale = np.sqrt(_diagonal(law.cov))
    correlation = law.cov / (scale[..., :, None] * scale[..., None, :])
    white = np.linalg.solve(correlation, law.phi / scale[..., None]) / scale[..., None]  # P⁻¹ Φ
    J = np.einsum("neij,neij->nej", law.phi, white)[..., data]
    rate = -0.5 * np.einsum("neij,neil,nelj->nej", white, Q, white)[..., data] / J
    condition = np.linalg.cond(correlation).max(1)
    return np.log(J), rate, condition * (1e-12 + law.cov_doubt + law.phi_doubt)


def log_snr(subject: Subject) -> None:
    """Its value, its rate, that it falls, and its inverse."""
    kernel = subject.affine
    if len(subject.rows) < np.prod(subject.values.shape or (1,)):
        raise UnknownValue("the log-SNR is a mean over more entries than are compared.")
    times = np.unique(np.concatenate([np.geomspace(subject.first, subject.T, 33), subject.times]))
    times = np.clip(times, subject.cutoff, subject.T)
    times = np.unique(np.maximum(subject.apart(times), subject.cutoff))
    expected, slope, doubt = information(subject, times)
    at = torch.as_tensor(times)
    value, rate = kernel.half_log_snr(at), kernel.half_log_snr_rate(at)
    told = np.isfinite(expected) & (np.abs(expected) < 600.0)
    if not told.any():
        raise UnknownValue("the log-SNR is finite nowhere.")
    size = 1.0 + 0.01 * np.abs(expected)
    error = (value.numpy() - expected) / size
    subject.note("half_log_snr", "= log(alpha / sigma)", error[told], _TOLERANCE, times[told], doubt=doubt[told])
    rated = ratio(rate.numpy() - slope, np.abs(slope) + 1e-6 / subject.T)
    subject.note("half_log_snr_rate", "= d half_log_snr / dt", rated[told], 1e-7, times[told], doubt=10 * doubt[told])
    subject.note("half_log_snr", "falls", value.diff().clamp_min(0.0), 1e-10 * float(1 + value.abs().max()), times[1:])
    back = kernel.time_of(value)
    # Where it is flat any time will do, so the time's error counts by what it does to the log-SNR.
    error = (back - at).abs() * rate.abs() + (kernel.half_log_snr(back) - value).abs()
    subject.note("time_of", "time_of(half_log_snr(t)) = t, in units of log-SNR", error, _TOLERANCE, times)


def cutoff_rule(subject: Subject) -> None:
    """The default cutoff: sigma / alpha = 2e-3, of a coupled state that of its first data component."""
    if subject.declaration.cutoff is not None:
        return
    if all(variance > 0 for variance in subject.declaration.initial_variances):
        subject.note("cutoff", "0 where P0 > 0", subject.cutoff, 0.0)
        return
    if len(subject.rows) < np.prod(subject.values.shape or (1,)):
        raise UnknownValue("the cutoff is by a mean over more entries than are compared.")
    law = subject.law(np.array([subject.cutoff]))
    i = next(i for i in range(subject.k) if i not in subject.declaration.auxiliary)
    log_alpha = law.log_phi[0] if not subject.coupled else np.log(np.abs(law.phi[0, :, i, i]))
    noise = np.exp(np.mean(0.5 * np.log(law.cov[0, :, i, i]) - log_alpha))
    subject.note("cutoff", "sigma / alpha = 2e-3", noise / _CUTOFF_NOISE - 1.0, 1e-6, subject.cutoff)


def basis(subject: Subject) -> None:
    """That the basis is orthogonal."""
    if subject.basis is None:
        return
    x = subject.states(4)
    u = subject.affine.to_basis(x)
    subject.note("basis", "|B x| = |x|", (u.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1) - 1).abs(), 1e-6)
    subject.note("basis", "B⁻¹ B x = x", subject.affine.from_basis(u) - x, 1e-6)


def _compiled(subject: Subject, times: Array) -> tuple[Array, Array, Array]:
    """The kernel's F (n, e, k, k), b (n, e, k) and g gᵀ (n, e, k, k)."""
    values = subject.affine.sde_coefficients(torch.as_tensor(times))
    if subject.coupled:
        F, b, Q = (v.numpy()[:, None] for v in values)
        return F, b, Q
    F, b, Q = (subject.pick(v)[..., None] for v in values)
    return F[..., None], b, Q[..., None]
