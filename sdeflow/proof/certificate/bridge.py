r"""Bridges, the SDE conditioned on x_T, against the joint Gaussian law of x_t and x_T given x_s.

x_t | x_s, x_T  ~  N(m_t + C S⁻¹ (x_T - m_T),  P_t - C S⁻¹ Cᵀ),      C = P_t Φ_Ttᵀ,  S = P_T given x_s,
drift           =  f + g gᵀ Φ_Ttᵀ P_T|t⁻¹ (x_T - m_T|t - Φ_Tt x).
"""

from __future__ import annotations

import numpy as np
import sympy as sp
import torch

from sdeflow.proof.certificate.draws import levels_are_uniform
from sdeflow.proof.certificate.formulas import reader_of
from sdeflow.proof.certificate.oracle import ratio, sizes
from sdeflow.proof.certificate.subject import Subject, product, transposed
from sdeflow.symbolic.conditioned import end_symbols, horizon, named_drift
from sdeflow.symbolic.evaluate import UnknownValue
from sdeflow.symbolic.patience import operations

__all__ = ["bridge_drift", "bridge_moments", "bridge_paths"]

_LARGE = 6000  # operations of a drift that is read
_PATHS = 20_000
_MOST_LOST = 1e-3
_ROUNDING = 1e-12  # of a state: less noise than some thousand units of its last place has no law that can be seen
_MOST_NATS, _MOST_CONDITION = 200.0, 1e6  # of Φ_T, which the formula divides

Array = np.ndarray


def bridge_moments(subject: Subject) -> None:
    """Mean and spread of x_t given x_0 and x_T."""
    x_0, x_T = subject.states(2).split(1)
    bridge, like = subject.sde.bridge(x_T[0]), torch.zeros_like(x_0)
    times = np.array([0.23 * subject.T, 0.71 * subject.T, subject.rng.uniform(subject.first, subject.T)])
    for at in subject.apart(times).tolist():
        mean, spread = bridge.moments(x_0, at)
        expected, cov, size, doubt = _conditioned(subject, _rows(subject, x_0)[0], _rows(subject, x_T)[0], 0.0, at)
        found = _rows(subject, mean)[0]
        if subject.coupled:
            told = spread.reshape(1, subject.k, subject.k).numpy()
        else:
            told = subject.level(spread, like)[..., None] ** 2
        subject.note(
            "bridge.moments", "mean of x_t given x_0 and x_T", ratio(found - expected, size), 1e-8, at, doubt=doubt
        )
        subject.note("bridge.moments", "its spread", ratio(told - cov, sizes(cov)), 1e-8, at, doubt=doubt)


def bridge_paths(subject: Subject) -> None:
    """Seeded paths: at two times, the later given the earlier, by their distribution function; and where they end."""
    from scipy.special import ndtr

    x_0, x_T = subject.states(2).split(1)
    n = max(1000, _PATHS // int(np.prod(subject.event)))
    early, late = subject.apart(np.array([0.31, 0.77]) * subject.T).tolist()
    paths = subject.sde.bridge(x_T[0]).paths(x_0.expand(n, *subject.event), [early, late, subject.T], seed=15)
    begin, end = _rows(subject, x_0)[0], _rows(subject, x_T)[0]
    rows = [_rows(subject, path) for path in paths]
    for s, start, at, drawn in ((0.0, begin, early, rows[0]), (early, rows[0], late, rows[1])):
        mean, cov, size, _ = _conditioned(subject, start, end, s, at)
        if np.sqrt(_diagonal(cov)).max() <= _ROUNDING * float(size.max()):
            subject.note("bridge.paths", f"the state given that at s = {s:.3g}", ratio(drawn - mean, size), 1e-8, at)
            continue
        white = np.linalg.solve(np.linalg.cholesky(cov), (drawn - mean)[..., None])[..., 0]
        levels = ndtr(white.reshape(n, -1)[:, :64])
        levels_are_uniform(subject, "bridge.paths", f"the law from s = {s:.3g}", levels, at)
    subject.note("bridge.paths", "they end in x_T", ratio(rows[2] - end, 1.0 + abs(end)), 1e-9, subject.T)


def _conditioned(subject: Subject, start: Array, end: Array, s: float, t: float) -> tuple[Array, Array, Array, float]:
    """Mean (..., e, k), covariance (e, k, k), size of the mean's terms, and doubt, of x_t given x_s and x_T."""
    now, whole = (subject.law(np.array([at]), s) for at in (t, subject.T))
    onward = subject.law(np.array([subject.T]), t)
    if not now.cov.any() or not onward.cov.any():  # no noise since s, or none until T: the state is known
        if not now.cov.any():
            mean, size = product(now.phi[0], start) + now.offset[0], product(abs(now.phi[0]), abs(start)) + now.reach[0]
        else:
            back = np.linalg.inv(onward.phi[0])
            mean, size = product(back, end - onward.offset[0]), product(abs(back), abs(end) + onward.reach[0])
        return mean, np.zeros_like(now.cov[0]), size + 1e-300, 1e-12 + now.phi_doubt[0] + onward.phi_doubt[0]
    S, C = whole.cov[0], now.cov[0] @ transposed(onward.phi[0])
    scale = np.sqrt(_diagonal(S))
    correlation = S / (scale[..., :, None] * scale[..., None, :])
    gain = transposed(np.linalg.solve(correlation, transposed(C / scale[..., None, :]))) / scale[..., None, :]
    surprise = end - product(whole.phi[0], start) - whole.offset[0]
    mean = product(now.phi[0], start) + now.offset[0] + product(gain, surprise)
    # P_t - C S⁻¹ Cᵀ = (P_t⁻¹ + Φᵀ P_T|t⁻¹ Φ)⁻¹ = L (1 + Vᵀ V)⁻¹ Lᵀ, which does not cancel towards T.
    try:
        L, onward_root = (np.linalg.cholesky(law.cov[0]) for law in (now, onward))
    except np.linalg.LinAlgError as error:
        raise UnknownValue("some components have no noise for a while, and others have.") from error
    V = np.linalg.solve(onward_root, onward.phi[0] @ L)
    cov = L @ np.linalg.solve(np.eye(subject.k) + transposed(V) @ V, transposed(L))
    size = product(abs(now.phi[0]), abs(start)) + now.reach[0] + product(abs(gain), abs(surprise))
    size = size + np.sqrt(_diagonal(cov))
    doubt = float(sum(v for law in (now, whole, onward) for v in (law.cov_doubt[0], law.phi_doubt[0])))
    doubt = (doubt + 1e-12) * float(np.linalg.cond(correlation).max()) + 1e-12 * float(np.linalg.cond(V).max())
    return mean, cov, size, doubt


def _diagonal(P: Array) -> Array:
    return np.diagonal(P, axis1=-2, axis2=-1)


def _rows(subject: Subject, states: torch.Tensor) -> Array:
    """States (n, *event), in the basis, as (n, e, k)."""
    u = subject.affine.to_basis(states.double())
    if subject.coupled:
        return u.reshape(len(u), 1, subject.k).numpy()
    return subject.of_entries(u)[..., None]


def bridge_drift(subject: Subject) -> None:
    """The conditioned drift as it is shown."""
    if subject.coupled and subject.k > 2:
        raise UnknownValue("the drift of more than two components is a formula of many thousand terms.")
    drift = subject.sde.bridge(0.0).drift
    if drift == named_drift(subject.declaration):
        raise UnknownValue("SymPy takes too long to write it.")
    entries = list(drift) if isinstance(drift, sp.MatrixBase) else [drift]
    if sum(map(operations, entries)) > _LARGE:
        raise UnknownValue("the formula is too long to be read.")
    state = subject.declaration.state
    names = end_symbols(subject.declaration)
    whole = subject.law(np.array([subject.T]))
    if np.abs(whole.log_phi).max() > _MOST_NATS or np.linalg.cond(whole.phi[0]).max() > _MOST_CONDITION:
        raise UnknownValue("Φ_T Φ_t⁻¹ is lost in the rounding of Φ_t.")
    closed = not any(entry.has(sp.Integral) for entry in entries)
    for at in subject.apart(np.array([0.4, 0.8]) * subject.T).tolist():
        x, y = subject.rng.normal(size=(2, subject.k))
        onward = subject.law(np.array([subject.T]), at)
        if any(not covariance.any(-1).all() for covariance in onward.cov[0]):
            raise UnknownValue(f"some component has no noise after t = {at:g}.")
        # A formula takes the noise after t as a difference of two variances, in 30 digits where it is closed.
        lost = (1e-29 if closed else 1e-15) * float((_diagonal(whole.cov) / _diagonal(onward.cov)).max())
        if lost > _MOST_LOST:
            raise UnknownValue(f"the noise after t = {at:g} is lost in the digits of all noise until T.")
        for entry in subject.some_entries:
            row = min(entry, onward.phi.shape[1] - 1)
            phi, P, m = onward.phi[0, row], onward.cov[0, row], onward.offset[0, row]
            f, gram = (v[0] for v in (subject.truth(entry).f(x[None], at), subject.truth(entry).gram(x[None], at)))
            terms = gram @ phi.T @ np.linalg.inv(P)
            expected = f + terms @ (y - m - phi @ x)
            size = abs(f) + abs(terms) @ (abs(y) + abs(m) + abs(phi) @ abs(x))
            reader = reader_of(subject, entry)
            more = {
                horizon(subject.declaration): subject.T,
                **dict(zip(state, x.tolist(), strict=True)),
                **dict(zip(names, y.tolist(), strict=True)),
            }
            found = reader.at(drift, at, more)
            subject.note(
                "bridge.drift", "f + g gᵀ Φ_Ttᵀ P_T|t⁻¹ (x_T - m - Φ_Tt x)", ratio(found - expected, size), 1e-6, at,
                doubt=lost,
            )  # fmt: skip
