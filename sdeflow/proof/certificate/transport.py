r"""The equations that solvers integrate: their drifts and noise, and how they carry laws that are known.

With the law's score s = ∇ log p and Q = g gᵀ,

    Fokker-Planck ∂ log p/∂t + ∇·f + f·s = ½ [∂∂:Q + 2 (∂·Q)·s + Q:(∇s + s sᵀ)]
    flow          ∂ log p/∂t + ∇·v + v·s = 0                            with the compiled drift v
    reverse       ∂ log p/∂t + ∇·r + r·s = -½ [∂∂:Q + 2 (∂·Q)·s + Q:(∇s + s sᵀ)]     with the compiled drift r and noise

for each p in turn: the kernel from one x_0, and a mixture of two Gaussians diffused. They are divided by their largest
term. An SDE without a kernel has no such p; there the drifts alone are compared with f - ½ ∇·Q - ½ Q s and
f - ∇·Q - Q s, the divergence by central differences of eighth order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from sdeflow.proof.certificate.density import require_quick, start
from sdeflow.proof.certificate.oracle import ratio, sizes
from sdeflow.proof.certificate.subject import Subject, product, tensor, transposed
from sdeflow.scores import GaussianMixture
from sdeflow.symbolic.equations import probability_flow, reverse_time
from sdeflow.symbolic.evaluate import Declared, UnknownValue, evaluate
from sdeflow.symbolic.symbols import score_symbols
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["drifts", "laws", "shown_equations"]

# A difference in t divides the kernel's 1e-12 by a step of 1e-4 of the horizon, and a formula's lost digits likewise.
_DIFFERENCED = 1e-6
_MOST_DOUBT = 1e-3  # beyond which a difference says nothing
_TIMES = 8
_OFFSETS = np.arange(-4, 5)
_FIRST = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5, 0, 4 / 5, -1 / 5, 4 / 105, -1 / 280])
_OTHER = np.array([0, -1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60, 0])  # of sixth order
_SECOND = np.array([-1 / 560, 8 / 315, -1 / 5, 8 / 5, -205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560])

Array = np.ndarray
Field = Callable[[Array, Array], Array]
"""A function of states (n, k) and times (n,)."""


class Law(NamedTuple):
    """A family of densities p_t that the SDE moves, as numbers."""

    name: str
    log_prob: Field
    score: Field
    states: Array  # (times, points, k)
    step: Array  # of differences, likewise


class _Compiled:
    """The equations as solvers have them, as functions of arrays."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.fields, self.coupled, self.k = subject, subject.fields, subject.coupled, subject.k
        self.event = (self.k, 1) if self.coupled else subject.values.shape or (1,)
        self.equations = {"flow": probability_flow(subject.declaration), "reverse": reverse_time(subject.declaration)}

    def drift(self, name: str, x: Array, at: float, s: Array) -> Array:
        """The drift at states (n, k), one time and scores (n, k), for each entry of the parameters, (n, e, k)."""
        subject, offset, motion = self.subject, 0.0, 0.0
        if (
            subject.kind == "affine"
        ):  # compiled for the centred state, whose drift lacks the offset's own motion F m + b
            now = np.array([at])
            parts = [oracle.coefficients(now)[:2] for oracle in subject.oracles]
            F, b = (np.concatenate(v)[:, 0] for v in zip(*parts, strict=True))
            offset = subject.law(now).offset[0]
            motion = product(F, offset) + b
        state, score = self._states(x[:, None] - offset), self._states(s[:, None] + 0 * np.asarray(offset))
        value = self.fields.drift(self.equations[name])(state, torch.tensor(at, dtype=torch.float64), score)
        return self._rows(value.expand(state.shape)) + motion

    def gram(self, x: Array, at: float) -> Array:
        """The noise squared, (n, e, k, k)."""
        state = self._states(x[:, None])
        diffusion = self.fields.diffusion(self.equations["reverse"], self.event)
        value = diffusion.g(state.flatten(1), torch.tensor(at, dtype=torch.float64))
        if diffusion.components:
            return (value @ value.mT).numpy()[:, None]
        value = value.expand(len(x), *self.event) if value.ndim == 0 else value.reshape(-1, *self.event)
        rows = self._rows(value.expand(len(x), *self.event))
        return rows[..., :, None] * rows[..., None, :] * np.eye(self.k)

    def _states(self, rows: Array) -> Tensor:
        """(n, e or 1, k) as states (n, *event); entries that are not compared take the first one's value."""
        if self.coupled:
            return tensor(rows[:, 0]).reshape(-1, *self.event)
        flat = np.repeat(rows[:, :1, 0], int(np.prod(self.event)), axis=1)
        flat[:, self.subject.rows] = rows[..., 0]
        return tensor(flat).reshape(-1, *self.event)

    def _rows(self, states: Tensor) -> Array:
        if self.coupled:
            return states.flatten(1).numpy()[:, None]
        return states.flatten(1).numpy()[:, self.subject.rows][..., None]


def drifts(subject: Subject) -> None:
    """The compiled drifts and noise at random states, times and scores, against f, g and differences of g gᵀ."""
    n, places = 12, []
    found: dict[str, list[Array]] = {"flow": [], "reverse": [], "noise": []}
    compiled = _Compiled(subject)
    for at in np.maximum(
        subject.apart(np.linspace(max(subject.cutoff, 1e-3 * subject.T), subject.T, 4)), subject.cutoff
    ):
        x, s = _some_states(subject, at, n), subject.rng.normal(size=(n, subject.k))
        drift = {name: compiled.drift(name, x, at, s) for name in compiled.equations}
        gram = compiled.gram(x, at)
        places += [(at, *row) for row in x]
        parts: dict[str, list[Array]] = {name: [] for name in found}
        for entry in range(len(subject.rows)) if len(subject.rows) <= 64 else subject.some_entries:
            f, Q, dQ, size = subject.truth(entry).local(x, at)
            size = size + np.einsum("nij,nj->ni", abs(Q), abs(s))
            for name, share in (("flow", 0.5), ("reverse", 1.0)):
                expected = f - share * (dQ + product(Q, s))
                parts[name].append(ratio(drift[name][:, entry] - expected, size))
            parts["noise"].append(ratio(gram[:, entry if len(gram[0]) > 1 else 0] - Q, sizes(Q)))
        for name, rows in parts.items():
            found[name].append(np.max(rows, axis=0).reshape(n, -1).max(1))
    where = np.array(places)
    tolerance = 1e-7 if subject.declaration.state_dependent_noise else 1e-8
    for name, identity in (
        ("flow", "compiled drift = f - ½ ∇·(g gᵀ) - ½ g gᵀ s"),
        ("reverse", "compiled drift = f - ∇·(g gᵀ) - g gᵀ s"),
        ("noise", "compiled noise squared = g gᵀ"),
    ):
        subject.note(name, identity, np.concatenate(found[name]), tolerance, where[:, 0], where[:, 1:])


def shown_equations(subject: Subject) -> None:
    """The equations as they are printed: their drift and diffusion as SymPy, read by NumPy."""
    if not hasattr(subject.sde, "reverse"):
        return
    truth, at = subject.truth(), float(subject.rng.uniform(max(subject.cutoff, 0.2 * subject.T), subject.T))
    x, s = _some_states(subject, at, 6), subject.rng.normal(size=(6, subject.k))
    f, Q, dQ, size = truth.local(x, at)
    size = size + np.einsum("nij,nj->ni", abs(Q), abs(s))
    state = subject.declaration.state
    point = {
        **subject.numbers_of(0), **dict(zip(state, x.T, strict=True)),
        **dict(zip(score_symbols(state), s.T, strict=True)), time_symbol: at,
    }  # fmt: skip

    def read(shown: sp.Expr | sp.MatrixBase) -> Array:
        entries = list(shown) if isinstance(shown, sp.MatrixBase) else [shown]
        return np.stack([evaluate(entry, point) for entry in entries], -1)

    shown = (("flow", subject.sde.flow_ode(), 0.5, 0.0), ("reverse", subject.sde.reverse(), 1.0, 1.0))
    for name, equation, share, noisy in (*shown, ("equation", subject.sde.equation, 0.0, 1.0)):
        error = ratio(read(equation.drift) - (f - share * (dQ + product(Q, s))), size)
        subject.note(name, "the drift that is shown", error, 1e-7, at, x)
        g = read(equation.diffusion).reshape(len(x), *((subject.k, -1) if noisy else (1, 1)))
        gram = g @ transposed(g)
        error = ratio(gram - Q, sizes(Q)) if noisy else gram
        subject.note(name, "the diffusion that is shown", error, 1e-9, at, x)


def _some_states(subject: Subject, at: float, n: int) -> Array:
    """Random states around which f and g are finite."""
    if subject.kind in ("affine", "general"):
        wide = subject.rng.normal(size=(8 * n, subject.k))
        candidates = np.concatenate([wide, subject.rng.uniform(0.1, 0.9, size=(n, subject.k))])
    else:
        noise = torch.as_tensor(subject.rng.normal(size=(4 * n, 1)))
        x_0 = torch.as_tensor(start(subject)).expand(len(noise), 1)
        candidates = subject.kernel.sample(x_0, 0.5 * subject.T, noise=noise).numpy()
    truth: Declared = subject.truth()
    finite = np.all(
        [np.isfinite(value).reshape(len(candidates), -1).all(1) for value in truth.local(candidates, at)], axis=0
    )
    if finite.sum() < n:
        raise UnknownValue(f"at t = {at:g} f and g are finite at too few of the states tried.")
    return candidates[finite][:n]


# -------------------------------------------------------------------- laws that are known


def laws(subject: Subject) -> None:
    """Fokker-Planck of the declared equation, and of the compiled flow and reverse SDE, for laws that are known."""
    if subject.kind == "affine" and (subject.values.shape or subject.basis is not None):
        subject.unchecked.append(
            "Fokker-Planck for whole events of tensor parameters or of a basis; entries are checked"
        )
        return
    if subject.kind == "pearson":
        require_quick(subject, 700)
    times, h = _smooth_times(subject)
    for law in (_point_law(subject, times), _mixture_law(subject, times) if subject.kind == "affine" else None):
        if law is not None:
            _transport(subject, law, times, h)


def no_law(subject: Subject) -> None:
    """That no law is compared."""
    subject.unchecked.append("any density: this SDE has no kernel, and no law of it is known")


def _smooth_times(subject: Subject) -> tuple[Array, Array]:
    """Times away from kinks and from features, and steps of differences."""
    times = np.unique(np.concatenate([
        np.geomspace(max(subject.cutoff, 1e-5 * subject.T), subject.T, _TIMES // 2 + 2)[1:-1],
        np.linspace(0.0, subject.T, _TIMES // 2 + 2)[1:-1],
    ]))  # fmt: skip
    if subject.kind == "affine":
        panels = subject.oracles[0].panels
        edges = np.unique(np.concatenate([panels, subject.T * 2.0 ** -np.arange(24.0)]))
    else:
        edges = np.unique(
            np.concatenate([[0.0], subject.T * 2.0 ** -np.arange(24.0), subject.T * np.arange(1, 65) / 64])
        )
    width, middle = np.diff(edges), 0.5 * (edges[1:] + edges[:-1])
    wide = (middle >= max(subject.cutoff, 1e-6 * subject.T)) & (width >= 0.05 * np.minimum(middle, subject.T / 64))
    if not wide.any():
        raise UnknownValue("f and g are smooth nowhere for long enough.")
    width, middle = width[wide], middle[wide]
    nearest = np.unique([int(np.abs(np.log(middle / at)).argmin()) for at in times])
    return middle[nearest], np.minimum(width[nearest], 0.2 * middle[nearest]) / 40


def _transport(subject: Subject, law: Law, times: Array, wait: Array) -> None:
    """The three transport equations for one law, all their differences taken from one batch of states."""
    truth, k, points = subject.truth(), subject.k, law.states.shape[1]
    x, at, step = law.states.reshape(-1, k), times.repeat(points), law.step.reshape(-1, k)
    around = x + np.einsum("o,ij,nj->ionj", _OFFSETS, np.eye(k), step)
    states, now = around.reshape(-1, k), np.broadcast_to(at, around.shape[:3]).reshape(-1)

    def grid(values: Array) -> Array:
        return values.reshape(*around.shape[:3], *values.shape[1:])

    def slopes(values: Array, weights: Array = _FIRST, order: int = 1) -> Array:
        """The derivative along each axis, (n, ..., axes), of values on the grid."""
        found = np.moveaxis(np.einsum("o,ion...->in...", weights, values), 0, -1)
        return found / step.reshape(len(x), *(1,) * (found.ndim - 2), k) ** order

    scores = law.score(states, now)
    s, d_s = grid(scores)[0, 4], slopes(grid(scores))
    # No longer than the drift takes to move the state by a step, nor than a panel resolves.
    speed = np.abs(truth.f(x, at))
    wait = np.minimum(wait.repeat(points), (step / np.maximum(speed, 1e-300)).min(1))

    def over_time(wait: Array) -> Array:
        return sum(w * law.log_prob(x, at + o * wait) for o, w in zip(_OFFSETS, _FIRST, strict=True) if w) / wait

    d_t = over_time(wait)
    gradient = slopes(grid(law.log_prob(states, now)))
    subject.note(f"score ({law.name})", "= ∇ log p", ratio(gradient - s, abs(s) + 0.01 / step), _DIFFERENCED, at, x)
    compiled = _compiled_fields(subject, states, now, scores)
    declared = truth.f(states, now), truth.gram(states, now)
    for title, identity, drift, gram, sign in (
        ("Fokker-Planck", "∂p/∂t = -∇·(f p) + ½ ∂∂:(g gᵀ p)", *declared, -0.5),
        ("flow", "∂p/∂t = -∇·(v p)", compiled[0], compiled[2], 0.0),
        ("reverse", "∂p/∂t = -∇·(r p) - ½ ∂∂:(g gᵀ p)", compiled[1], compiled[2], 0.5),
    ):
        drift, gram = grid(drift), grid(gram)
        Q, d_Q = gram[0, 4], np.einsum("nijj->ni", slopes(gram))
        # ∂∂:Q by second differences along each axis: a law is known only where Q is free of x, or k = 1.
        dd_Q = np.einsum("niii->n", slopes(gram, _SECOND, 2))
        terms = [d_t, (drift[0, 4] * s).sum(1), *np.einsum("nii->in", slopes(drift))]
        of_noise = (
            dd_Q,
            2.0 * (d_Q * s).sum(1),
            np.einsum("nij,nij->n", Q, d_s),
            np.einsum("nij,ni,nj->n", Q, s, s),
        )
        terms += [sign * term for term in of_noise]
        # Added: a thousandth of the slowest motion, for a law at rest has terms at rounding; and what the last
        # digits of the states do to log p, where their components are all but determined by each other.
        rounding = 1e-15 * (np.abs(x) / step).max(1) / wait
        size = np.abs(terms).max(0) + 1e-3 / subject.T + rounding / _DIFFERENCED
        error = sum(terms) / size
        doubt = 0.0
        if np.abs(error).max() > _DIFFERENCED:
            # Where log p and its score have lost digits themselves, another difference gives another value.
            of_drift = np.einsum("nii->n", slopes(drift) - slopes(drift, _OTHER))
            of_score = np.einsum("nij,nij->n", Q, d_s - slopes(grid(scores), _OTHER))
            doubt = np.abs(over_time(0.6 * wait) - d_t) + np.abs(of_drift) + np.abs(sign * of_score)
            doubt = np.minimum(8.0 * doubt / size, _MOST_DOUBT)
        subject.note(f"{title} ({law.name})", identity, error, _DIFFERENCED, at, x, doubt=doubt)


def _compiled_fields(subject: Subject, x: Array, at: Array, s: Array) -> list[Array]:
    """The compiled drifts of the flow and the reverse SDE, and the noise squared, at rows of several times."""
    where, compiled = [np.flatnonzero(at == now) for now in np.unique(at)], _Compiled(subject)
    back = np.argsort(np.concatenate(where))
    fields = [[compiled.drift(name, x[i], at[i[0]], s[i])[:, 0] for i in where] for name in ("flow", "reverse")]
    fields.append([compiled.gram(x[i], at[i[0]])[:, 0] for i in where])
    return [np.concatenate(parts)[back] for parts in fields]


def _point_law(subject: Subject, times: Array) -> Law:
    """The kernel from one x_0, at states whose noise is known."""
    kernel, event = subject.kernel, subject.event
    begin, affine = start(subject), subject.kind == "affine"
    z = np.array([-1.3, -0.4, 0.3, 0.9, 1.6])
    noise = np.stack([np.roll(z, 2 * i) for i in range(subject.k)], -1)

    def kernel_at(method: Callable[..., Tensor], x: Array, at: Array) -> Array:
        state = tensor(x).reshape(-1, *event)
        x_0 = torch.as_tensor(begin).reshape(1, *event).expand(state.shape)
        return method(state, x_0, torch.as_tensor(at)).numpy()

    def drawn(eps: Array) -> Array:
        time, noise = torch.as_tensor(times.repeat(len(z))), torch.as_tensor(np.tile(eps, (len(times), 1)))
        x_0 = torch.as_tensor(begin).reshape(1, *event).expand(len(time), *event)
        return kernel.sample(x_0, time, noise=noise.reshape(-1, *event)).numpy().reshape(len(times), len(z), subject.k)

    states = drawn(noise)
    if affine:
        root = subject.affine.coefficients(torch.as_tensor(times))[1].numpy().reshape(len(times), subject.k, subject.k)
        step = 0.05 * _conditional(root)[:, None].repeat(len(z), 1)
    else:  # as wide as the law is at each state: an eighth part of the noise around it
        step = 0.01 * abs(drawn(noise + 0.25) - drawn(noise - 0.25))
    law = Law(
        "kernel",
        lambda x, at: kernel_at(kernel.log_prob, x, at),
        lambda x, at: kernel_at(kernel.score, x, at).reshape(-1, subject.k),
        states,
        step,
    )
    return law if affine else _away_from_ends(law, times)


def _mixture_law(subject: Subject, times: Array) -> Law:
    """Two Gaussians as data."""
    event = subject.event
    means = torch.tensor([[-0.6], [0.8]], dtype=torch.float64)
    data = [i for i in range(subject.k) if i not in subject.declaration.auxiliary]
    if subject.coupled:
        means = torch.zeros(2, *event, dtype=torch.float64)
        means[:, data] = torch.tensor([-0.6, 0.8], dtype=torch.float64)[:, None, None]
    variances = torch.zeros(2, *event, dtype=torch.float64) if subject.coupled else torch.zeros_like(means)
    variances[(slice(None), data) if subject.coupled else ...] = 0.2
    mixture = GaussianMixture(subject.sde, means, variances, torch.tensor([0.4, 0.6]))
    law = subject.law(times)
    phi, P, m = law.phi[:, 0], law.cov[:, 0], law.offset[:, 0]
    V = phi @ np.diag(variances[0].numpy().reshape(subject.k)) @ transposed(phi) + P
    z = np.array([-1.1, -0.2, 0.6, 1.4])
    noise = np.stack([np.roll(z, i) for i in range(subject.k)], -1)
    centres = np.einsum("tij,cj->tci", phi, means.numpy().reshape(2, subject.k)) + m[:, None]
    states = centres[:, [0, 1, 0, 1]] + np.einsum("tij,nj->tni", np.linalg.cholesky(V), noise)
    step = 0.03 * _conditional(np.linalg.cholesky(V))[:, None].repeat(len(z), 1)

    def rows(method: Callable[..., Tensor], x: Array, at: Array) -> Array:
        """By times, at which a coupled mixture shares its factorisations."""
        found = [(np.flatnonzero(at == now), now) for now in np.unique(at)]
        parts = [method(torch.as_tensor(x[where]).reshape(-1, *event), float(now)).numpy() for where, now in found]
        return np.concatenate(parts)[np.argsort(np.concatenate([where for where, _ in found]))]

    return Law(
        "mixture",
        lambda x, at: rows(mixture.log_prob, x, at),
        lambda x, at: rows(mixture, x, at).reshape(-1, subject.k),
        states,
        step,
    )


def _away_from_ends(law: Law, times: Array) -> Law:
    """The law with states next to an end of the domain, where p has no Taylor series, moved to a neighbour."""
    states, step = law.states.copy(), law.step.copy()
    k = states.shape[-1]
    at = times.repeat(states.shape[1])
    far = np.all([np.isfinite(law.log_prob((states + o * step).reshape(-1, k), at)) for o in (-40, 0, 40)], axis=0)
    far = far.reshape(states.shape[:2]) & (step[..., 0] > 0)
    if not far.any(1).all():
        raise UnknownValue("every state tried lies next to an end of the domain.")
    for row, good in enumerate(far):
        states[row], step[row] = (v[row][np.where(good, np.arange(len(good)), good.argmax())] for v in (states, step))
    return law._replace(states=states, step=step)


def _conditional(root: Array) -> Array:
    """The standard deviation of each component given the others, on whose scale a density varies, (n, k)."""
    return 1.0 / np.sqrt((np.linalg.inv(root) ** 2).sum(-2))
