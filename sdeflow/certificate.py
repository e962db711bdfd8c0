r"""The certificate: which identities the derived objects satisfy, each checked, and to which residual.

What solvers, scores and likelihoods *use* is tested: the compiled coefficients, kernel and drifts. What they are
tested *with* shares no code with them: f and g as declared, read by SymPy's ``evalf`` and by
:mod:`sdeflow.symbolic.evaluate`, Gauss-Legendre integration, and central differences of eighth order. With
dx = (F x + b) dt + g dw, Q = g gᵀ and the law's score s = ∇ log p:

    moments       Φ_t - Φ_s = ∫ F Φ,   m_t - m_s = ∫ (F m + b),   P_t - P_s = ∫ (F P + P Fᵀ + Q), from 1, 0, P0 at t = 0
    composition   Φ_t = Φ_ts Φ_s,      m_t = Φ_ts m_s + m_ts,     P_t = Φ_ts P_s Φ_tsᵀ + P_ts  (Chapman-Kolmogorov)
    log-SNR       log(alpha / sigma) (½ log of the Fisher information), falling, undone by time_of
    Fokker-Planck ∂ log p/∂t + ∇·f + f·s = ½ [∂∂:Q + 2 (∂·Q)·s + Q:(∇s + s sᵀ)]
    flow          ∂ log p/∂t + ∇·v + v·s = 0                            with the compiled drift v
    reverse       ∂ log p/∂t + ∇·r + r·s = -½ [∂∂:Q + 2 (∂·Q)·s + Q:(∇s + s sᵀ)]     with the compiled drift r and noise

The last three hold for each p in turn: the kernel from one x_0, and a mixture of two Gaussians diffused. They are
divided by their largest term. An SDE without a kernel has no such p; there the drifts are compared with
f - ½ ∇·Q - ½ Q s and f - ∇·Q - Q s, the divergence by differences, and the certificate says what stays unchecked.

A certificate is of the SDE with its present parameter values, at the points visited: a proof only where it says
"symbolic".
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DataError, SdeflowError
from sdeflow.model import Model
from sdeflow.scores import DeclaredSDE, GaussianMixture
from sdeflow.symbolic.equations import Equation, probability_flow, reverse_time
from sdeflow.symbolic.evaluate import Declared, UnknownValue, by_sympy, evaluate, number_at
from sdeflow.symbolic.patience import within
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Certificate", "Check", "certify"]

# Compiled numbers differ from the plain reading by rounding, 1e-16 times the cancellation in a formula that was not
# rewritten: sub-VP's g² loses 3 digits at its cutoff, a stiff drift as many.
_EXACT = 1e-10
# The kernel promises 1e-11 relative; the rest is for Gauss's rule on the same panels and for what cancels in g.
_INTEGRATED = 1e-9
# A difference in t divides the kernel's 1e-12 by a step of 1e-4 of the horizon, and a formula's lost digits likewise.
_DIFFERENCED = 1e-6
_SYMBOLIC_SECONDS = 0.4
_SMALLEST = 1e-290  # what is less has fewer digits
_SMALL = 80  # operations, which SymPy expands at once
_ENTRIES = 3  # of tensor parameters
_TIMES = 8
_OFFSETS = np.arange(-4, 5)
_FIRST = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5, 0, 4 / 5, -1 / 5, 4 / 105, -1 / 280])
_SECOND = np.array([-1 / 560, 8 / 315, -1 / 5, 8 / 5, -205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560])

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A function of states (n, k) and times (n,)."""


@dataclass(frozen=True)
class Check:
    """One identity.

    Attributes:
        name: the derived object.
        identity: what it must satisfy.
        method: "symbolic" where SymPy reduced the residual to 0, else "numeric".
        residual: the largest one found, relative unless the identity says otherwise.
        tolerance: what rounding and conditioning explain.
        where: the point of the largest residual.
    """

    name: str
    identity: str
    method: str
    residual: float
    tolerance: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """Whether the residual is within the tolerance."""
        return self.residual <= self.tolerance


def _excess(check: Check) -> float:
    """A residual in units of its tolerance."""
    if check.tolerance:
        return check.residual / check.tolerance
    return math.inf if check.residual else 0.0


@dataclass(frozen=True)
class Certificate:
    """What was checked of an SDE, and what was not.

    Attributes:
        subject: the SDE, as it prints.
        checks: one for each identity.
        unchecked: what could not be checked, and why.
    """

    subject: str
    checks: tuple[Check, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.holds)

    @property
    def largest(self) -> Check:
        """The check whose residual is largest for its tolerance."""
        return max(self.checks, key=_excess)

    @property
    def largest_residual(self) -> float:
        """The largest residual of all checks, whatever their tolerances; infinite where one could not be computed."""
        return max(check.residual for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                "ok" if check.holds else "FAILS",
                check.name,
                check.identity,
                "symbolic" if check.method == "symbolic" else f"{check.residual:.1e} <= {check.tolerance:.0e}",
                check.where,
            )
            for check in self.checks
        ]

    def __str__(self) -> str:
        verdict = "every identity holds" if self.ok else f"{len(self.failures)} of {len(self.checks)} identities FAIL"
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([f"{self.subject}: {verdict}", *lines, *(f"not checked: {why}" for why in self.unchecked)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in self._rows())
        rest = "".join(f"<p>not checked: {html.escape(why)}</p>" for why in self.unchecked)
        return f"<p>{html.escape(str(self).splitlines()[0])}</p><table>{rows}</table>{rest}"


class Law(NamedTuple):
    """A family of densities p_t that the SDE moves, as numbers."""

    name: str
    log_prob: Field
    score: Field
    states: np.ndarray  # (times, points, k)
    step: np.ndarray  # of differences, likewise


def certify(sde: DeclaredSDE) -> Certificate:
    """Checks every identity that applies to ``sde``, in about a second.

    Args:
        sde: an SDE; its ``kernel``, ``weighting`` and ``prior`` are tested with its compiled equations.
    """
    with torch.no_grad():
        return _Examination(sde).certificate()


class _Examination:
    """The checks of one SDE."""

    def __init__(self, sde: DeclaredSDE) -> None:
        self.sde, self.declaration, self.values = sde, sde.declaration, sde.values
        self.affine = self.declaration.affine is not None
        self.kernel = sde.kernel if self.affine else getattr(sde, "_exact_kernel", None)
        self.model = Model(sde, None, None)
        self.T, self.cutoff = self.model.T, getattr(self.kernel, "cutoff", self.model.cutoff)
        self.k, self.coupled = len(self.declaration.state), self.declaration.coupled
        self.truth = Declared(self.declaration, self.values.numbers)
        self.checks: list[Check] = []
        self.unchecked: list[str] = []
        self.rng = np.random.default_rng(0)

    def certificate(self) -> Certificate:
        """Every part that this kind of SDE has, one after the other; a part that fails to compute fails."""
        parts = [("f and g", self.coefficients)] if self.affine else []
        if self.affine:
            parts += [("the moments", self.moments), ("the kernel's density", self.density)]
            parts += [("the composition", self.composition), ("the log-SNR", self.log_snr)]
            parts += [("the closed form", self.closed_form), ("the prior", self.marginal)]
        elif self.kernel is not None:
            parts += [("the kernel's mass and moments", self.mass), ("the kernel's draws", self.draws)]
        parts += [("the basis", self.basis)] if getattr(self.kernel, "basis", None) is not None else []
        parts += [("the drifts", self.drifts), ("the laws", self.laws)]
        for name, part in parts:
            with self._allowing(name):
                part()
        return Certificate(repr(self.sde), tuple(self.checks), tuple(self.unchecked))

    @contextmanager
    def _allowing(self, name: str) -> Iterator[None]:
        """What has no independent value to compare with is said; what cannot be computed at all is a failure."""
        try:
            yield
        except UnknownValue as error:
            self.unchecked.append(f"{name}: {error}")
        except SdeflowError as error:
            self.checks.append(Check(name, f"can be computed: {error}", "numeric", math.inf, 0.0))

    def note(
        self,
        name: str,
        identity: str,
        residual: np.ndarray | float,
        tolerance: float,
        times: np.ndarray | float | None = None,
        states: np.ndarray | None = None,
    ) -> None:
        """Records the largest of residuals (n, ...), found at times (n,) and states (n, k); NaN is the largest."""
        residual = np.nan_to_num(np.abs(np.asarray(residual, dtype=float)), nan=np.inf)
        rows = residual.reshape(len(residual), -1).max(1) if residual.ndim else residual.reshape(1)
        worst = int(rows.argmax())
        where = "" if times is None else f"t = {np.broadcast_to(times, rows.shape)[worst]:.4g}"
        if states is not None:
            where += ", x = " + ", ".join(f"{value:.4g}" for value in states.reshape(len(rows), -1)[worst])
        self.checks.append(Check(name, identity, "numeric", float(rows[worst]), tolerance, where))

    # ---------------------------------------------------------------- affine SDEs: functions of t

    def coefficients(self) -> None:
        """The compiled F, b and g gᵀ against SymPy's own evaluation of f and g."""
        times = np.concatenate(
            [np.geomspace(max(self.cutoff, 1e-6 * self.T), self.T, 4), self.rng.uniform(0, self.T, 3)]
        )
        states = self.rng.normal(size=(len(times), self.k))
        for entry, numbers in self._entries():
            F, b, Q = self._compiled(entry, times)
            f, gram = by_sympy(self.declaration, numbers, times, states)
            size = _product(abs(F), abs(states)) + abs(b)
            self.note(
                "f", "compiled F x + b = f(x, t)", _ratio(_product(F, states) + b - f, size), _INTEGRATED, times, states
            )
            self.note("g", "compiled Q = g gᵀ", _ratio(Q - gram, _scale(gram)), _INTEGRATED, times)

    def moments(self) -> None:
        """The compiled moments against the integrals of the moment equations over the panels of [0, T]."""
        edges, points, weights = _panels(self._table.edges.numpy())
        start = int(np.searchsorted(edges, max(0.5 * self.cutoff, 1e-6 * self.T)))
        groups = np.concatenate([[0], np.arange(start, len(edges) - 1)])  # below the start only the total counts
        ends = edges[1:][np.concatenate([groups[1:] - 1, [len(edges) - 2]])]
        zero, P0 = (
            np.zeros((1, self.k)),
            np.array(sp.Matrix([self.declaration.P0]) if not self.coupled else self.declaration.P0),
        )
        first = np.eye(self.k)[None], P0.astype(float).reshape(1, self.k, self.k), zero
        for entry, numbers in self._entries():
            F, b, Q = Declared(self.declaration, numbers).affine(points)
            phi, P, m = self._gaussian(entry, points)
            rates = (
                (F @ phi, abs(F) @ abs(phi)),
                (F @ P + P @ _t(F) + Q, abs(F) @ abs(P) + abs(P) @ _t(abs(F)) + abs(Q)),
                (_product(F, m) + b, _product(abs(F), abs(m)) + abs(b)),
            )
            names = (("alpha", "alpha' = F alpha"), ("sigma²", "P' = F P + P Fᵀ + g gᵀ"), ("offset", "m' = F m + b"))
            for (name, identity), (rate, size), begin, end in zip(
                names, rates, first, self._gaussian(entry, ends), strict=True
            ):
                gain, most = (
                    np.add.reduceat(
                        np.einsum("pn...,pn->p...", r.reshape(*weights.shape, *r.shape[1:]), weights), groups
                    )
                    for r in (rate, size)
                )
                before = np.concatenate([begin, end[:-1]])
                residual = _ratio(end - before - gain, abs(end) + abs(before) + most + _SMALLEST)
                self.note(name, f"{identity}, from its value at t = 0", residual, _INTEGRATED, ends)

    def density(self) -> None:
        """log_prob and score at states sampled with known noise, against a normal law of the compiled moments."""
        kernel, times = self.kernel, np.geomspace(max(self.cutoff, 1e-6 * self.T), self.T, 5)
        event = self._event()
        x_0, z = (torch.as_tensor(self.rng.normal(size=(len(times), *event))) for _ in range(2))
        time = torch.as_tensor(times)
        path = kernel.path(x_0, time)
        x_t = kernel.sample(x_0, time, noise=z)
        mean = path.alpha(kernel.to_basis(x_0)) + path.offset
        u = kernel.to_basis(z)
        d = math.prod(event)
        told = kernel.moments(x_0, time)[0]
        root = path.sigma.values.expand(len(times), *(event if not self.coupled else path.sigma.values.shape[1:]))
        log_det = root.abs().log().flatten(1).sum(1)
        if self.coupled:
            log_det = torch.linalg.slogdet(root)[1].flatten(1).sum(1) * (
                math.prod(event[1:]) / root[0, ..., 0, 0].numel()
            )
        normal = -0.5 * u.square().flatten(1).sum(1) - log_det - 0.5 * d * math.log(2 * math.pi)
        log_p = kernel.log_prob(x_t, x_0, time)
        # The state is rounded before the noise is read off it again: |mean| / sigma digits are lost.
        lost = float((1 + mean.abs().amax()) / root.abs().amax()) if not self.coupled else 1e4
        loose = min(1e-15 * lost * 1e3 + _EXACT, _DIFFERENCED)
        self.note(
            "sample",
            "x_t = mean + sigma eps",
            kernel.to_basis(x_t) - mean - path.sigma(u),
            _EXACT * (1 + float(mean.abs().max())),
            times,
        )
        self.note(
            "kernel.moments",
            "mean = alpha x_0 + offset",
            kernel.to_basis(told) - mean,
            _EXACT * (1 + float(mean.abs().max())),
            times,
        )
        self.note(
            "kernel.log_prob", "= log N(x_t; mean, sigma sigmaᵀ)", (log_p - normal) / (1 + normal.abs()), loose, times
        )
        white = path.sigma.T(kernel.to_basis(kernel.score(x_t, x_0, time)))
        self.note("kernel.score", "sigmaᵀ ∇ log p = -eps", white + u, 10 * loose, times)

    def composition(self) -> None:
        """Transitions from 0 to s and from s to t, against those from 0 to t."""
        x = torch.zeros(1, *self._event(), dtype=torch.float64)
        low = max(self.cutoff, 1e-3 * self.T)
        for s, t in ((low, 0.4 * self.T), (0.3 * self.T, 0.7 * self.T), (0.6 * self.T, self.T)):
            if not s < t:
                continue
            step = self.kernel.transition(x, s, t)
            first, last = (self.kernel.path(x, torch.tensor(v, dtype=torch.float64)) for v in (s, t))
            level = first.offset.expand(x.shape) if self.coupled else first.offset
            pairs = (
                ((step.alpha @ first.alpha).values, last.alpha.values),
                (
                    (step.alpha @ first.sigma.gram @ step.alpha.T).values + step.sigma.gram.values,
                    last.sigma.gram.values,
                ),
                (step.alpha(level) + step.offset, last.offset),
            )
            size = [float(b.abs().max()) + 1e-300 for _, b in pairs]
            size[2] += float(first.offset.abs().max())
            residual = [float((a - b).abs().max()) / n for (a, b), n in zip(pairs, size, strict=True)]
            self.note("transition", "p(t|s) after p(s|0) = p(t|0)", np.array(residual), 10 * _INTEGRATED, t)

    def log_snr(self) -> None:
        """Its value, that it falls, its rate, and its inverse."""
        kernel = self.kernel
        times = torch.as_tensor(np.geomspace(max(self.cutoff, 1e-5 * self.T), self.T, 65).clip(self.cutoff, self.T))
        value = kernel.half_log_snr(times)
        alpha, sigma, _ = kernel.coefficients(times)
        if self.coupled:
            data = [i for i in range(self.k) if i not in self.declaration.auxiliary]
            white = torch.linalg.solve(sigma, alpha)
            expected = 0.5 * white.square().sum(-2)[..., data].log().mean(-1)
        else:
            expected = (alpha / sigma).log().flatten(1).mean(1) if alpha.ndim > 1 else (alpha / sigma).log()
        told = alpha.abs().flatten(1).amin(1) > _SMALLEST if alpha.ndim > 1 else alpha > _SMALLEST
        told = told if not self.coupled else torch.isfinite(expected)
        self.note("half_log_snr", "= log(alpha / sigma)", (value - expected)[told], 10 * _EXACT, times[told].numpy())
        self._rate(float(times[0]))
        self.note("half_log_snr", "falls", value.diff().clamp_min(0.0), _EXACT, times[1:].numpy())
        back = kernel.time_of(value)
        # Where it is flat any time will do, so the time's error counts by what it does to the log-SNR.
        error = (back - times).abs() * kernel.half_log_snr_rate(times).abs() + (kernel.half_log_snr(back) - value).abs()
        self.note("time_of", "time_of(half_log_snr(t)) = t, in units of log-SNR", error, _INTEGRATED, times.numpy())

    def _rate(self, first: float) -> None:
        """The rate of the log-SNR, integrated over each panel, against its change."""
        edges = self._table.edges.numpy()
        edges = edges[edges >= first]
        if len(edges) < 2:
            return
        _, points, weights = _panels(edges)
        rise = self.kernel.half_log_snr(torch.as_tensor(edges)).diff()
        rate = self.kernel.half_log_snr_rate(torch.as_tensor(points)).reshape(weights.shape)
        error = ((rate * torch.as_tensor(weights)).sum(1) - rise) / (1.0 + rise.abs())
        known = torch.isfinite(error)
        if not bool(known.any()):
            raise UnknownValue("the log-SNR is finite nowhere.")
        self.note(
            "half_log_snr_rate", "= d half_log_snr / dt, integrated", error[known], 1e-6, edges[1:][known.numpy()]
        )

    def closed_form(self) -> None:
        """The closed form against quadrature, and its differential equations by SymPy."""
        kernel = self.kernel
        if self.coupled and self.k > 2 and "_coupled_moments" not in vars(kernel):
            self.unchecked.append(
                "the formulas shown for more than two components, which SymPy may take seconds to find"
            )
            return
        if kernel.form != "closed":
            return
        if not self.values.shape:
            times = np.geomspace(max(self.cutoff, 1e-3 * self.T), self.T, 4)
            for name, shown, exact in zip(
                ("alpha", "var", "offset"),
                (kernel.alpha, kernel.var, kernel.offset),
                self._gaussian(None, times),
                strict=True,
            ):
                entries = list(shown) if isinstance(shown, sp.MatrixBase) else [shown]
                numbers = np.array([[number_at(e, self.values.numbers, at) for e in entries] for at in times])
                size = abs(exact).max(axis=tuple(range(1, exact.ndim)), keepdims=True)
                residual = _ratio(numbers.reshape(exact.shape) - exact, size)
                self.note(f"kernel.{name}", "formula = compiled", residual, _INTEGRATED, times)
        self._symbolic_identities()
        with self._allowing("the weighting"):
            self._weighting()

    def _symbolic_identities(self) -> None:
        kernel, matrix = self.kernel, (lambda e: e if self.coupled else sp.ImmutableMatrix([[e]]))
        F, b = (matrix(e) for e in self.declaration.affine)
        phi, P, m = (matrix(e) for e in (kernel.alpha, kernel.var, kernel.offset))
        Q = self.declaration.gram
        identities = {
            "d alpha/dt - F alpha = 0": (phi.diff(time_symbol), -F * phi),
            "dP/dt - F P - P Fᵀ - g gᵀ = 0": (P.diff(time_symbol), -F * P, -P * F.T, -Q),
            "dm/dt - F m - b = 0": (m.diff(time_symbol), -F * m, -b),
        }
        residuals = [sum(terms[1:], terms[0]) for terms in identities.values()]
        proven = [sum(map(sp.count_ops, part)) < _SMALL and _vanishes(part, sp.expand) for part in residuals]
        if not all(proven):  # a process of its own takes longer than most expansions
            proven = within(_SYMBOLIC_SECONDS, _vanish, residuals) or proven
        for (identity, terms), residual, zero in zip(identities.items(), residuals, proven, strict=True):
            if zero:
                self.checks.append(Check("formula", identity, "symbolic", 0.0, 0.0))
                continue
            worst = 0.0
            for at in (0.2 * self.T, 0.9 * self.T) if not self.coupled else (0.6 * self.T,):
                number = [abs(number_at(e, self.values.numbers, at)) for e in residual]
                size = [abs(number_at(e, self.values.numbers, at)) for part in terms for e in part]
                worst = max(worst, max(number) / (max(size) + 1e-300))
            self.note("formula", f"{identity}, in 30 digits", worst, 1e-12)

    def _weighting(self) -> None:
        """lambda E[s sᵀ] = 1 with the compiled score, its mean taken over the noise's unit vectors."""
        if self.values.shape or self.kernel.basis is not None:
            return
        times = np.geomspace(max(self.cutoff, 1e-3 * self.T), self.T, 4)
        residual = []
        for at in times:
            x_0 = torch.zeros(self.k, *self._event(), dtype=torch.float64)
            noise = torch.eye(self.k, dtype=torch.float64).reshape(x_0.shape)
            score = self.kernel.score(self.kernel.sample(x_0, at, noise=noise), x_0, at).reshape(self.k, self.k).numpy()
            shown = self.sde.weighting
            entries = list(shown) if isinstance(shown, sp.MatrixBase) else [shown]
            weight = np.array([number_at(e, self.values.numbers, at) for e in entries]).reshape(self.k, self.k)
            # Whitened: score = -sigma⁻¹, which magnifies the rounding of a nearly singular covariance.
            scale = np.sqrt(np.diag(weight))
            magnified = max(1.0, 1e-7 * np.linalg.cond(weight / np.outer(scale, scale)))
            residual.append((score @ weight @ score.T - np.eye(self.k)) / magnified)
        self.note("weighting", "lambda E[∇ log p ∇ log pᵀ] = 1", np.array(residual), 1e-8, times)

    def marginal(self) -> None:
        """The prior of Gaussian data against alpha m + offset and alpha² c² + sigma²."""
        T = np.array([self.T])
        entry = next(iter(self._entries()))[0]
        phi, P, m = (moment[0] for moment in self._gaussian(entry, T))
        data = np.array([i not in self.declaration.auxiliary for i in range(self.k)], dtype=float)
        for mean, std in ((0.0, 0.0), (0.0 if self.kernel.basis is not None else 0.7, 0.4)):
            prior = (
                self.sde.prior if std == 0.0 and hasattr(self.sde, "prior") else self.kernel.marginal(mean, std, self.T)
            )
            centre = phi @ (mean * data) + m
            spread = phi @ np.diag(std**2 * data) @ phi.T + P
            root = prior.root.values.numpy()
            if self.coupled:
                found, level = root @ root.swapaxes(-1, -2), prior.mean.numpy()
            else:
                index = entry or 0
                found, level = root.reshape(-1)[[index if root.size > 1 else 0]] ** 2, prior.mean.numpy()
                level = level.reshape(-1)[[index if level.size > 1 else 0]]
            error = abs(found.reshape(spread.shape) - spread).max() / abs(spread).max()
            shift = abs(level.reshape(-1) - centre).max() / (1 + abs(centre).max())
            self.note("prior", f"p(x_T) of data N({mean:g}, {std:g}²)", max(error, shift), _INTEGRATED, self.T)

    def basis(self) -> None:
        """That the basis is orthogonal."""
        x = torch.as_tensor(self.rng.normal(size=(4, *self._event())))
        u = self.kernel.to_basis(x)
        self.note("basis", "|B x| = |x|", (u.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1) - 1).abs(), 1e-6)
        self.note("basis", "B⁻¹ B x = x", self.kernel.from_basis(u) - x, 1e-6)

    # ---------------------------------------------------------------- any SDE: functions of the state

    def drifts(self) -> None:
        """The compiled drifts and noise at random states, times and scores, against f, g and differences of g gᵀ."""
        n, times = 12, np.linspace(max(self.cutoff, 1e-3 * self.T), self.T, 4)
        equations = {"flow": probability_flow(self.declaration), "reverse": reverse_time(self.declaration)}
        for entry, _ in self._entries():
            truth, found = self._truth_of(entry), {name: [] for name in (*equations, "noise")}
            where = []
            for at in times:
                x, s = self._some_states(truth, at, n), self.rng.normal(size=(n, self.k))
                f, Q, dQ, size = truth.local(x, at)
                size = size + np.einsum("nij,nj->ni", abs(Q), abs(s))
                where += [(at, *row) for row in x]
                for name, equation in equations.items():
                    share = 0.5 if name == "flow" else 1.0
                    expected = f - share * (dQ + np.einsum("nij,nj->ni", Q, s))
                    found[name].append(_ratio(self._drift(equation, x, at, s, entry) - expected, size))
                found["noise"].append(_ratio(self._gram(x, at, entry) - Q, _scale(Q)))
            where = np.array(where)
            for name, identity in (
                ("flow", "compiled drift = f - ½ ∇·(g gᵀ) - ½ g gᵀ s"),
                ("reverse", "compiled drift = f - ∇·(g gᵀ) - g gᵀ s"),
                ("noise", "compiled noise squared = g gᵀ"),
            ):
                tolerance = 1e-8 if not self.declaration.state_dependent_noise else 1e-7
                self.note(name, identity, np.concatenate(found[name]), tolerance, where[:, 0], where[:, 1:])

    def laws(self) -> None:
        """Fokker-Planck of the declared equation, and of the compiled flow and reverse SDE, for laws that are known."""
        if self.kernel is None:
            self.unchecked.append("any density: this SDE has no kernel, and no law of it is known")
            return
        if self.affine and (self.values.shape or self.kernel.basis is not None):
            self.unchecked.append(
                "Fokker-Planck for whole events of tensor parameters or of a basis; entries are checked"
            )
            return
        times, h = self._smooth_times()
        for law in (self._point_law(times), self._mixture_law(times) if self.affine else None):
            if law is not None:
                self._transport(law, times, h)

    def _transport(self, law: Law, times: np.ndarray, wait: np.ndarray) -> None:
        """The three transport equations for one law, all their differences taken from one batch of states."""
        k, points = self.k, law.states.shape[1]
        x, at, step = law.states.reshape(-1, k), times.repeat(points), law.step.reshape(-1, k)
        around = x + np.einsum("o,ij,nj->ionj", _OFFSETS, np.eye(k), step)
        states, now = around.reshape(-1, k), np.broadcast_to(at, around.shape[:3]).reshape(-1)

        def grid(values: np.ndarray) -> np.ndarray:
            return values.reshape(*around.shape[:3], *values.shape[1:])

        def slopes(values: np.ndarray, weights: np.ndarray = _FIRST, order: int = 1) -> np.ndarray:
            """The derivative along each axis, (n, ..., axes), of values on the grid."""
            found = np.moveaxis(np.einsum("o,ion...->in...", weights, values), 0, -1)
            return found / step.reshape(len(x), *(1,) * (found.ndim - 2), k) ** order

        scores = law.score(states, now)
        s, d_s = grid(scores)[0, 4], slopes(grid(scores))
        # No longer than the drift takes to move the state by a step, nor than a panel resolves.
        speed = np.abs(self.truth.f(x, at))
        wait = np.minimum(wait.repeat(points), (step / np.maximum(speed, 1e-300)).min(1))
        d_t = sum(w * law.log_prob(x, at + o * wait) for o, w in zip(_OFFSETS, _FIRST, strict=True) if w) / wait
        gradient = slopes(grid(law.log_prob(states, now)))
        self.note(f"score ({law.name})", "= ∇ log p", _ratio(gradient - s, abs(s) + 0.01 / step), _DIFFERENCED, at, x)
        compiled = self._compiled_fields(states, now, scores)
        declared = self.truth.f(states, now), self.truth.gram(states, now)
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
            size = np.abs(terms).max(0) + 1e-3 / self.T + rounding / _DIFFERENCED
            self.note(f"{title} ({law.name})", identity, sum(terms) / size, _DIFFERENCED, at, x)

    def _compiled_fields(self, x: np.ndarray, at: np.ndarray, s: np.ndarray) -> list[np.ndarray]:
        """The compiled drifts of the flow and the reverse SDE, and the noise squared, at rows of several times."""
        where = [np.flatnonzero(at == now) for now in np.unique(at)]
        back = np.argsort(np.concatenate(where))
        fields = []
        for equation in (probability_flow(self.declaration), reverse_time(self.declaration)):
            fields.append([self._drift(equation, x[i], at[i[0]], s[i]) for i in where])
        fields.append([self._gram(x[i], at[i[0]]) for i in where])
        return [np.concatenate(parts)[back] for parts in fields]

    def _point_law(self, times: np.ndarray) -> Law:
        """The kernel from one x_0, at states whose noise is known."""
        kernel, event = self.kernel, self._event()
        start = self._start()
        z = np.array([-1.3, -0.4, 0.3, 0.9, 1.6])
        noise = np.stack([np.roll(z, 2 * i) for i in range(self.k)], -1)

        def kernel_at(method: Callable[..., Tensor], x: np.ndarray, at: np.ndarray, *more: Tensor) -> np.ndarray:
            state = torch.as_tensor(np.ascontiguousarray(x)).reshape(-1, *event)
            x_0 = torch.as_tensor(start).reshape(1, *event).expand(state.shape)
            return method(state, x_0, torch.as_tensor(at)).numpy()

        def drawn(eps: np.ndarray) -> np.ndarray:
            time, eps = torch.as_tensor(times.repeat(len(z))), torch.as_tensor(np.tile(eps, (len(times), 1)))
            x_0 = torch.as_tensor(start).reshape(1, *event).expand(len(time), *event)
            return kernel.sample(x_0, time, noise=eps.reshape(-1, *event)).numpy().reshape(len(times), len(z), self.k)

        states = drawn(noise)
        if self.affine:
            root = kernel.coefficients(torch.as_tensor(times))[1].numpy().reshape(len(times), self.k, self.k)
            step = 0.05 * _conditional(root)[:, None].repeat(len(z), 1)
        else:  # as wide as the law is at each state: an eighth part of the noise around it
            step = 0.01 * abs(drawn(noise + 0.25) - drawn(noise - 0.25))
        law = Law(
            "kernel",
            lambda x, at: kernel_at(kernel.log_prob, x, at),
            lambda x, at: kernel_at(kernel.score, x, at).reshape(-1, self.k),
            states,
            step,
        )
        return law if self.affine else _away_from_ends(law, times)

    def _mixture_law(self, times: np.ndarray) -> Law:
        """Two Gaussians as data."""
        event = self._event()
        means = torch.tensor([[-0.6], [0.8]], dtype=torch.float64)
        data = [i for i in range(self.k) if i not in self.declaration.auxiliary]
        if self.coupled:
            means = torch.zeros(2, *event, dtype=torch.float64)
            means[:, data] = torch.tensor([-0.6, 0.8], dtype=torch.float64)[:, None, None]
        variances = torch.zeros(2, *event, dtype=torch.float64) if self.coupled else torch.zeros_like(means)
        variances[(slice(None), data) if self.coupled else ...] = 0.2
        mixture = GaussianMixture(self.sde, means, variances, torch.tensor([0.4, 0.6]))
        phi, P, m = self._gaussian(None, times)
        V = phi @ np.diag(variances[0].numpy().reshape(self.k)) @ _t(phi) + P
        z = np.array([-1.1, -0.2, 0.6, 1.4])
        noise = np.stack([np.roll(z, i) for i in range(self.k)], -1)
        centres = np.einsum("tij,cj->tci", phi, means.numpy().reshape(2, self.k)) + m[:, None]
        states = centres[:, [0, 1, 0, 1]] + np.einsum("tij,nj->tni", np.linalg.cholesky(V), noise)
        step = 0.03 * _conditional(np.linalg.cholesky(V))[:, None].repeat(len(z), 1)

        def rows(method: Callable[..., Tensor], x: np.ndarray, at: np.ndarray) -> np.ndarray:
            """By times, at which a coupled mixture shares its factorisations."""
            found = [(np.flatnonzero(at == now), now) for now in np.unique(at)]
            parts = [method(torch.as_tensor(x[where]).reshape(-1, *event), float(now)).numpy() for where, now in found]
            return np.concatenate(parts)[np.argsort(np.concatenate([where for where, _ in found]))]

        return Law(
            "mixture",
            lambda x, at: rows(mixture.log_prob, x, at),
            lambda x, at: rows(mixture, x, at).reshape(-1, self.k),
            states,
            step,
        )

    def mass(self) -> None:
        """A kernel that is not Gaussian: its mass, mean and variance by trapezoids over the whole domain."""
        kernel, start = self.kernel, torch.as_tensor(self._start())
        for at in (0.25 * self.T, self.T):
            mean, std = (float(v) for v in kernel.moments(start, at))
            around = torch.tensor([[0.0], [-0.5], [0.5]], dtype=torch.float64)
            centre, low, high = kernel.sample(start.expand(3, 1), at, noise=around).flatten().tolist()
            x, slope, rest = _whole_domain(*self._domain(at), centre, abs(high - low))
            log_p = kernel.log_prob(torch.as_tensor(x)[:, None], start.expand(len(x), 1), at).numpy()
            p = np.where(np.isfinite(log_p), np.exp(log_p), 0.0) * slope
            # What lies between the last point and an end that rounding hides.
            tolerance = 1e-7 + 10 * float((p[[0, -1]] * rest).max())
            self.note("kernel.log_prob", "∫ p dx = 1", p.sum() - 1, tolerance, at)
            first = (p * (x - mean)).sum() / std
            second = (p * (x - mean) ** 2).sum() / std**2 - 1
            self.note("kernel.moments", "mean and variance of p", np.array([first, second]), 10 * tolerance, at)

    def draws(self) -> None:
        """A kernel that is not Gaussian: its draws x(z) have its density, p(x) |dx/dz| = φ(z) for monotone x(z)."""
        kernel, start = self.kernel, torch.as_tensor(self._start())
        reduction = getattr(kernel, "reduction", None)
        if reduction is not None and reduction.map.fold:
            self.unchecked.append("draws of a kernel whose map folds, two of which lead to one state")
            return
        h, z = 0.05, torch.tensor([-1.0, -0.3, 0.4, 1.2], dtype=torch.float64)[:, None]
        start = start.expand(len(z), 1)
        for at in (0.25 * self.T, self.T):
            ahead, behind, ahead2, behind2 = (kernel.sample(start, at, noise=z + o * h) for o in (1, -1, 2, -2))
            slope = (8.0 * (ahead - behind) - (ahead2 - behind2)) / (12.0 * h)
            log_p = kernel.log_prob(kernel.sample(start, at, noise=z), start, at)
            log_normal = -0.5 * z[:, 0].square() - 0.5 * math.log(2.0 * math.pi)
            # Quantiles of a Jacobi diffusion are found to 1e-6 in probability, which the difference divides by h.
            residual = (log_p + slope.abs().log()[:, 0] - log_normal).numpy()
            self.note("kernel.sample", "p(x(z)) |dx/dz| = φ(z)", residual, 1e-3, at)

    # ---------------------------------------------------------------- the compiled side, as arrays

    @property
    def _table(self) -> object:
        return getattr(self.kernel, "inner", self.kernel).numbers.table

    def _entries(self) -> Iterator[tuple[int | None, dict[sp.Symbol, float]]]:
        """A few entries of tensor parameters, each with its numbers; else the one set of numbers."""
        if not self.values.shape:
            yield None, self.values.numbers
            return
        full = {
            symbol: value.detach().double().cpu().expand(self.values.shape).reshape(-1)
            if isinstance(value, Tensor)
            else value
            for symbol, value in self.values.items()
        }
        for index in np.unique(np.linspace(0, math.prod(self.values.shape) - 1, _ENTRIES).astype(int)):
            yield int(index), {n: v if isinstance(v, float) else float(v[index]) for n, v in full.items()}

    def _truth_of(self, entry: int | None) -> Declared:
        """f and g with the numbers of one entry of tensor parameters."""
        return self.truth if entry is None else Declared(self.declaration, dict(self._entries())[entry])

    def _compiled(self, entry: int | None, times: np.ndarray) -> list[np.ndarray]:
        """The kernel's F (n, k, k), b (n, k) and g gᵀ (n, k, k)."""
        F, b, Q = self._pick(entry, self.kernel.sde_coefficients(torch.as_tensor(times)), len(times))
        n = len(times)
        return [F.reshape(n, self.k, self.k), b.reshape(n, self.k), Q.reshape(n, self.k, self.k)]

    def _gaussian(self, entry: int | None, times: np.ndarray) -> list[np.ndarray]:
        """The kernel's Φ (n, k, k), covariance (n, k, k) and offset (n, k)."""
        n = len(times)
        alpha, sigma, offset = self._pick(entry, self.kernel.coefficients(torch.as_tensor(times)), n)
        alpha, sigma = (v.reshape(n, self.k, self.k) for v in (alpha, sigma))
        return [alpha, sigma @ _t(sigma), offset.reshape(n, self.k)]

    def _pick(self, entry: int | None, values: tuple[Tensor, ...], n: int) -> list[np.ndarray]:
        arrays = [value.cpu().numpy() for value in values]
        if entry is None:
            return arrays
        return [np.broadcast_to(v, (n, *self.values.shape)).reshape(n, -1)[:, entry] for v in arrays]

    def _drift(
        self, equation: Equation, x: np.ndarray, at: float, s: np.ndarray, entry: int | None = None
    ) -> np.ndarray:
        """The compiled drift at states (n, k), one time and scores (n, k)."""
        event, offset, motion = self._event(small=True), 0.0, 0.0
        if self.affine:  # compiled for the centred state, whose drift lacks the offset's own motion F m + b
            now = np.array([at])
            F, b, _ = self._truth_of(entry).affine(now)
            offset = self._gaussian(entry, now)[2]
            motion = _product(F, offset) + b
        state, score = (self._as_state(v, event) for v in (x - offset, s))
        drift = self.model.drift(equation)(state, torch.tensor(at, dtype=torch.float64), score)
        return self._as_rows(drift.expand(state.shape), entry) + motion

    def _gram(self, x: np.ndarray, at: float, entry: int | None = None) -> np.ndarray:
        """The compiled noise squared, (n, k, k)."""
        event = self._event(small=True)
        state = self._as_state(x, event)
        noise = self.model.noise(reverse_time(self.declaration), event)
        value = noise["diffusion"](state.flatten(1), torch.tensor(at, dtype=torch.float64))
        if "components" in noise:
            return (value @ value.mT).numpy()
        value = value.expand(len(x), *event) if value.ndim == 0 else value.reshape(-1, *event)
        rows = self._as_rows(value.expand(len(x), *event), entry)
        return rows[:, :, None] * rows[:, None] * np.eye(self.k)

    def _as_state(self, rows: np.ndarray, event: tuple[int, ...]) -> Tensor:
        state = torch.as_tensor(np.ascontiguousarray(rows))
        return (
            state.reshape(-1, *event)
            if self.coupled
            else state[:, :1].reshape(-1, *(1,) * len(event)).expand(-1, *event)
        )

    def _as_rows(self, state: Tensor, entry: int | None) -> np.ndarray:
        flat = state.flatten(1).numpy()
        return flat if self.coupled else flat[:, [entry or 0]]

    # ---------------------------------------------------------------- where to look

    def _event(self, small: bool = False) -> tuple[int, ...]:
        """An event that the SDE takes; in a basis, one that it transforms (``small``: one of the drift alone)."""
        basis = None if small else getattr(self.kernel, "basis", None)
        if self.coupled:
            inner = (1,)
        else:
            inner = self.values.shape or (1,)
        shapes = [inner] if basis is None else [inner, (*(1,) * 2, *inner), (8,), (8, 8), (1, 8, 8)]
        if basis is not None and hasattr(basis, "matrix"):
            shapes.append((len(basis.matrix),))
        for shape in shapes:
            event = (self.k, *shape) if self.coupled else shape
            try:
                if basis is not None:
                    basis.forward(torch.zeros(1, *event, dtype=torch.float64))
                return tuple(event)
            except DataError:
                continue
        raise UnknownValue("no event was found that the basis transforms")

    def _smooth_times(self) -> tuple[np.ndarray, np.ndarray]:
        """Times in the middle of wide panels, away from kinks, and steps of differences within them."""
        edges = self._table.edges.numpy()
        low, width = max(self.cutoff, 1e-5 * self.T), np.diff(edges)
        wide = width >= 0.2 * np.minimum(self.T / 256, edges[1:])
        inside = np.flatnonzero((edges[:-1] >= low) & wide)
        middles = 0.5 * (edges[:-1] + edges[1:])[inside]
        early, late = np.geomspace(low, self.T, _TIMES // 2 + 1), np.linspace(0, self.T, _TIMES // 2 + 2)
        nearest = [int(abs(middles - target).argmin()) for target in (*early[1:-1], *late[1:-1])]
        times, steps = middles[nearest], width[inside][nearest] / 40
        times, unique = np.unique(times, return_index=True)
        return times, steps[unique]

    def _some_states(self, truth: Declared, at: float, n: int) -> np.ndarray:
        """Random states around which f and g are finite."""
        if self.kernel is None or self.affine:
            wide = self.rng.normal(size=(8 * n, self.k))
            candidates = np.concatenate([wide, self.rng.uniform(0.1, 0.9, size=(n, self.k))])
        else:
            noise = torch.as_tensor(self.rng.normal(size=(4 * n, 1)))
            start = torch.as_tensor(self._start()).expand(len(noise), 1)
            candidates = self.kernel.sample(start, at, noise=noise).numpy()
        finite = np.all(
            [np.isfinite(value).reshape(len(candidates), -1).all(1) for value in truth.local(candidates, at)], axis=0
        )
        if finite.sum() < n:
            raise UnknownValue(f"at t = {at:g} f and g are finite at too few of the states tried.")
        return candidates[finite][:n]

    def _start(self) -> np.ndarray:
        """An x_0 in the domain, (1, k)."""
        if self.affine:
            return np.linspace(0.7, -0.3, self.k)[None]
        if hasattr(self.kernel, "restore"):
            return self.kernel.restore(torch.full((1, 1), 0.7, dtype=torch.float64), 0.0).numpy()
        low, high = self._domain(0.0)
        inner = (
            low + 0.4 * (high - low) if math.isfinite(high - low) else (low + 0.6 if math.isfinite(low) else high - 0.6)
        )
        return np.array([[inner]])

    def _domain(self, at: float) -> tuple[float, float]:
        """The ends of the state's domain."""
        kernel, numbers = self.kernel, self.values.numbers
        if hasattr(kernel, "reduction"):
            change = kernel.reduction.map
            return tuple(float(evaluate(e, {**numbers, time_symbol: at})) if e.is_finite is not False else
                         (-math.inf if e == -sp.oo else math.inf) for e in (change.lower, change.upper))  # fmt: skip
        return kernel.ends


def _vanish(residuals: list[sp.MatrixBase]) -> list[bool]:
    """Whether each residual simplifies to 0."""
    return [_vanishes(residual, lambda e: sp.simplify(sp.expand(e))) for residual in residuals]


def _vanishes(residual: sp.MatrixBase, rule: Callable[[sp.Expr], sp.Expr]) -> bool:
    return all(rule(e) == 0 for e in residual)


def _panels(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges, and Gauss's points (panels · n,) and weights (panels, n) between them."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    half = 0.5 * np.diff(edges)[:, None]
    return edges, (edges[:-1, None] + half * (1 + nodes)).reshape(-1), half * weights


def _away_from_ends(law: Law, times: np.ndarray) -> Law:
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


def _whole_domain(low: float, high: float, centre: float, width: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States that cover the domain, their trapezoid weights, and the ratio by which an end may hide mass."""
    if math.isfinite(low) and math.isfinite(high):
        w = np.linspace(-80.0, 36.0, 6000)
        u = 1.0 / (1.0 + np.exp(-w))
        return low + (high - low) * u, (high - low) * u * (1.0 - u) * (w[1] - w[0]), np.full(2, 1 / (w[1] - w[0]))
    if math.isinf(low) and math.isinf(high):
        w = np.linspace(-40.0, 40.0, 8001)
        return centre + width * np.sinh(w), width * np.cosh(w) * (w[1] - w[0]), np.zeros(2)
    end, side = (low, 1.0) if math.isfinite(low) else (high, -1.0)
    w = np.linspace(-80.0, 40.0, 6001)
    u = abs(centre - end) * np.exp(w)
    return end + side * u, u * (w[1] - w[0]), np.array([1 / (w[1] - w[0]), 0.0])


def _conditional(root: np.ndarray) -> np.ndarray:
    """The standard deviation of each component given the others, on whose scale a density varies, (n, k)."""
    return 1.0 / np.sqrt((np.linalg.inv(root) ** 2).sum(-2))


def _t(matrices: np.ndarray) -> np.ndarray:
    return matrices.swapaxes(-1, -2)


def _product(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.einsum("nij,nj->ni", matrices, vectors)


def _scale(Q: np.ndarray) -> np.ndarray:
    """The size of a covariance's entries, sqrt(Q_ii Q_jj)."""
    d = np.sqrt(np.abs(np.diagonal(Q, axis1=-2, axis2=-1)))
    return d[..., :, None] * d[..., None, :]


def _ratio(error: np.ndarray, size: np.ndarray) -> np.ndarray:
    """|error| / size, and 0 where both are 0."""
    error, size = np.broadcast_arrays(np.abs(error), size)
    return np.where(error == 0, 0.0, error / np.where(size > 0, size, 1e-300))
