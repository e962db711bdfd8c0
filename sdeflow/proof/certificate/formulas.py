r"""Every formula that is shown, read as it stands and compared with the oracle's numbers.

A closed formula is read in 30 digits by SymPy. One that holds integrals is read by Gauss's rule on the oracle's
panels, and a function Φ_ij(t) or Φ_ij(t, u) that stands for the solution of Φ' = F Φ is the oracle's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import sympy as sp
from sympy.core.function import AppliedUndef

from sdeflow.proof.certificate.moments import fisher
from sdeflow.proof.certificate.oracle import Oracle, ratio, sizes
from sdeflow.proof.certificate.report import Check
from sdeflow.proof.certificate.subject import Subject, tensor, transposed
from sdeflow.symbolic.evaluate import UnknownValue, Value, evaluate, number_at
from sdeflow.symbolic.patience import operations, within
from sdeflow.symbolic.schedule import Schedule
from sdeflow.symbolic.symbols import data_symbols
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Reader", "identities", "path", "reader_of", "shown", "weightings"]

_CLOSED, _INTEGRATED = 1e-9, 1e-8
_SYMBOLIC_SECONDS = 0.4
_SMALL = 80  # operations, which SymPy expands at once
_LARGE = 4000  # operations, beyond which 30 digits take seconds
_CONDITION = 1e8  # of Φ(u), by whose inverse Φ(t, u) is had
_SMALLEST = 1e-290

Array = np.ndarray


class Reader:
    """Formulas in t, the parameters and other symbols as numbers, integrals included.

    Args:
        oracle: of one set of parameters.
        numbers: the parameters.
    """

    def __init__(self, oracle: Oracle, numbers: dict[sp.Symbol, float]) -> None:
        self.oracle, self.numbers = oracle, numbers
        self._times, self._phis = np.zeros(0), np.zeros((0, oracle.k, oracle.k))  # Φ as far as it is known
        self._between: dict[tuple[bytes, bytes], Array] = {}
        self._plain: dict[sp.Expr, tuple[dict[sp.Basic, sp.Dummy], sp.Expr]] = {}
        self._rising: dict[tuple[sp.Expr, sp.Symbol], Callable[[Array], Array]] = {}

    def at(self, shown: sp.Expr | sp.MatrixBase, time: float, more: dict[sp.Symbol, float] | None = None) -> Array:
        """The entries of a formula at one time, in 30 digits where it is closed."""
        entries = list(shown) if isinstance(shown, sp.MatrixBase) else [shown]
        point = {**self.numbers, **(more or {})}
        closed = not any(entry.has(sp.Integral, AppliedUndef) for entry in entries)
        if closed and sum(map(operations, entries)) < _LARGE:
            return np.array([number_at(entry, point, time) for entry in entries])
        return np.array([float(self(entry, {**point, time_symbol: np.float64(time)})) for entry in entries])

    def __call__(self, expr: sp.Expr, at: dict[sp.Symbol, Array | float]) -> Array:
        """The values of a formula at arrays of its symbols."""
        if expr in at:
            return np.asarray(at[expr])
        if expr not in self._plain:
            holes = {node: sp.Dummy(real=True) for node in _outermost(expr)}
            self._plain[expr] = holes, expr.xreplace(holes)
        known, (holes, plain) = dict(at), self._plain[expr]
        for node, hole in holes.items():
            known[hole] = self._integral(node, at) if isinstance(node, sp.Integral) else self._solution(node, at)
        return evaluate(plain, known)

    def _integral(self, node: sp.Integral, at: dict[sp.Symbol, Array | float]) -> Array:
        if len(node.limits) != 1 or len(node.limits[0]) != 3:
            raise UnknownValue(f"{node} is no definite integral.")
        variable, *ends = node.limits[0]
        low, high = np.broadcast_arrays(*(self(end, at) for end in ends))
        if node.function.free_symbols <= {variable, *self.numbers} and not _outermost(node.function):
            key = node.function, variable
            if key not in self._rising:
                self._rising[key] = self.oracle.antiderivative(*key)
            rising = self._rising[key]
            return rising(high) - rising(low)
        shared = {symbol: np.broadcast_to(value, low.shape) for symbol, value in at.items()}
        total = np.empty(low.shape)
        for place in np.ndindex(low.shape):
            nodes, weights = self.oracle.rule(float(low[place]), float(high[place]))
            point: dict[sp.Symbol, Value] = {symbol: float(value[place]) for symbol, value in shared.items()}
            point[variable] = nodes
            total[place] = (self(node.function, point) * weights).sum()
        return total

    def _solution(self, node: AppliedUndef, at: dict[sp.Symbol, Array | float]) -> Array:
        """Φ_ij(t) or Φ_ij(t, u)."""
        name = node.func.__name__
        if isinstance(node, Schedule) or not name.startswith("Phi_"):
            raise UnknownValue(f"{node} is known to the library alone.")
        i, j = (int(digit) - 1 for digit in name.removeprefix("Phi_"))
        times = np.broadcast_arrays(*(self(argument, at) for argument in node.args))
        return self._phi(*(time.reshape(-1) for time in times))[:, i, j].reshape(times[0].shape)

    def _phi(self, later: Array, earlier: Array | None = None) -> Array:
        """Φ(t) or Φ(t, u) at times (n,), (n, k, k)."""
        if earlier is None:
            return self._phi_from_0(later)
        key = later.tobytes(), earlier.tobytes()
        if key not in self._between:
            whole, part = self._phi_from_0(later), self._phi_from_0(earlier)
            if np.linalg.cond(part).max() > _CONDITION:
                raise UnknownValue("Φ(t, u) is lost in the rounding of Φ(u).")
            self._between[key] = transposed(np.linalg.solve(transposed(part), transposed(whole)))
        return self._between[key]

    def _phi_from_0(self, times: Array) -> Array:
        new = np.setdiff1d(times, self._times)
        if len(new):
            known = np.concatenate([self._times, new])
            order = np.argsort(known)
            self._times = known[order]
            self._phis = np.concatenate([self._phis, self.oracle.law(new).phi[:, 0]])[order]
        return self._phis[np.searchsorted(self._times, times)]


def reader_of(subject: Subject, entry: int) -> Reader:
    """The reader of one of the subject's entries, with what it has solved before."""
    if entry not in subject.readers:
        subject.readers[entry] = Reader(subject.oracle(entry), subject.numbers_of(entry))
    return subject.readers[entry]


def _outermost(expr: sp.Basic) -> dict[sp.Basic, None]:
    """Integrals and undefined functions that stand in no other of them."""
    if isinstance(expr, sp.Integral) or (isinstance(expr, AppliedUndef) and not isinstance(expr, Schedule)):
        return {expr: None}
    found: dict[sp.Basic, None] = {}
    for argument in expr.args:
        found.update(_outermost(argument))
    return found


def shown(subject: Subject) -> None:
    """alpha, var, offset, std, mean and log_snr as they are printed."""
    kernel, low = subject.affine, max(subject.cutoff, 1e-3 * subject.T)
    closed = kernel.form == "closed"
    times = np.geomspace(low, subject.T, 4) if closed else np.array([0.37 * (subject.T - low) + low, subject.T])
    if subject.coupled and not closed:
        phi = subject.law(times).phi[:, 0]
        times = times[np.linalg.cond(phi) < _CONDITION]
        if not len(times):
            raise UnknownValue("Φ(t, u) is lost in the rounding of Φ(u).")
    formulas = {"alpha": kernel.alpha, "var": kernel.var, "offset": kernel.offset, "std": kernel.std}
    formulas |= {"mean": kernel.mean, "log_snr": kernel.log_snr}
    start = np.linspace(0.7, -0.3, subject.k)
    data = dict(zip(data_symbols(subject.declaration.state), start.tolist(), strict=True))
    law = subject.law(times)
    for entry in subject.some_entries:
        reader = reader_of(subject, entry)
        phi, P, m, reach = (v[:, min(entry, v.shape[1] - 1)] for v in (law.phi, law.cov, law.offset, law.reach))
        size = np.sqrt(np.abs(np.diagonal(P, axis1=-2, axis2=-1)))
        level = np.abs(phi) @ np.abs(start) + reach
        expected = {
            "alpha": (phi, np.abs(phi) + 1e-3 * np.abs(phi).max((-1, -2), keepdims=True)),
            "var": (P, sizes(P)),
            "offset": (m, reach + 1e-3 * level),
            "std": (np.linalg.cholesky(P), size[..., None] + 0 * P),
            "mean": (phi @ start + m, level),
        }
        log_J, _, doubt = fisher(subject, times)  # that of the first data component is shown
        log_snr = log_J[:, min(entry, log_J.shape[1] - 1), 0]
        expected["log_snr"] = log_snr, 1 + np.abs(log_snr)
        tolerance = _CLOSED if closed else _INTEGRATED
        for name, (exact, scale) in expected.items():
            try:
                found = np.array([reader.at(formulas[name], at, data) for at in times]).reshape(exact.shape)
            except UnknownValue as error:
                subject.unchecked.append(f"kernel.{name} as it is shown: {error}")
                continue
            doubts = law.cov_doubt + law.phi_doubt + law.offset_doubt + (doubt if name == "log_snr" else 0.0)
            off = ratio(found - exact, scale + _SMALLEST)
            subject.note(f"kernel.{name}", "the formula that is shown", off, tolerance, times, doubt=doubts)


def weightings(subject: Subject) -> None:
    """weighting = P, the inverse of E[∇ log p ∇ log pᵀ]; likelihood_weighting = g gᵀ."""
    sde = subject.sde
    if not hasattr(sde, "weighting"):
        return
    times = subject.apart(np.array([max(subject.cutoff, 0.05 * subject.T), 0.6 * subject.T]))
    P = subject.law(times).cov
    Q = np.concatenate([oracle.coefficients(times)[2] for oracle in subject.oracles]).swapaxes(0, 1)
    for entry in subject.some_entries:
        reader = reader_of(subject, entry)
        for name, formula, exact in (
            ("weighting", sde.weighting, P),
            ("likelihood_weighting", sde.likelihood_weighting, Q),
        ):
            exact = exact[:, min(entry, exact.shape[1] - 1)]
            if formula.has(AppliedUndef) and _condition(subject, times) > _CONDITION:
                raise UnknownValue("Φ(t, u) is lost in the rounding of Φ(u).")
            found = np.array([reader.at(formula, at) for at in times]).reshape(exact.shape)
            identity = "lambda E[∇ log p ∇ log pᵀ] = 1" if name == "weighting" else "= g gᵀ"
            doubt = subject.law(times).cov_doubt
            subject.note(
                name, identity, ratio(found - exact, sizes(exact) + _SMALLEST), _INTEGRATED, times, doubt=doubt
            )


def _condition(subject: Subject, times: Array) -> float:
    return float(np.linalg.cond(subject.law(times).phi).max())


def path(subject: Subject) -> None:
    """Of an SDE that was declared by its path: alpha and sigma as they were declared."""
    if subject.declaration.path is None:
        return
    times = subject.times
    alpha, sigma, _ = subject.affine.coefficients(tensor(times))
    for name, values, declared in zip(("alpha", "sigma²"), (alpha, sigma), subject.declaration.path, strict=True):
        point = {n: np.asarray(v)[..., None] if np.ndim(v) else v for n, v in subject.numbers.items()}
        exact = evaluate(declared, {**point, time_symbol: times[None]}).T
        found = subject.pick(values)
        subject.note(name, "= the declared path", ratio(found - exact, np.abs(exact)), 1e-8, times)


def identities(subject: Subject) -> None:
    """The differential equations of the closed formulas, by SymPy where it reduces them to 0, else in 30 digits."""
    kernel = subject.affine
    if kernel.form != "closed" or (subject.coupled and subject.k > 2):
        return
    matrix: Callable[[object], sp.MatrixBase] = (
        (lambda e: e) if subject.coupled else (lambda e: sp.ImmutableMatrix([[e]]))
    )
    F, b = (matrix(e) for e in subject.declaration.require_affine("moments"))
    phi, P, m = (matrix(e) for e in (kernel.alpha, kernel.var, kernel.offset))
    Q = subject.declaration.gram
    equations = {
        "d alpha/dt - F alpha = 0": (phi.diff(time_symbol), -F * phi),
        "dP/dt - F P - P Fᵀ - g gᵀ = 0": (P.diff(time_symbol), -F * P, -P * F.T, -Q),
        "dm/dt - F m - b = 0": (m.diff(time_symbol), -F * m, -b),
    }
    residuals = [sum(terms[1:], terms[0]) for terms in equations.values()]
    proven = [sum(map(operations, part)) < _SMALL and _vanishes(part, sp.expand) for part in residuals]
    if not all(proven):  # a process of its own takes longer than most expansions
        proven = within(_SYMBOLIC_SECONDS, _vanish, residuals) or proven
    for (identity, terms), residual, zero in zip(equations.items(), residuals, proven, strict=True):
        if zero:
            subject.checks.append(Check("formula", identity, "symbolic", 0.0, 0.0))
            continue
        worst, numbers = 0.0, subject.numbers_of(0)
        for at in (0.2 * subject.T, 0.9 * subject.T) if not subject.coupled else (0.6 * subject.T,):
            number = [abs(number_at(e, numbers, at)) for e in residual]
            size = [abs(number_at(e, numbers, at)) for part in terms for e in part]
            worst = max(worst, max(number) / (max(size) + 1e-300))
        subject.note("formula", f"{identity}, in 30 digits", worst, 1e-12)


def _vanish(residuals: list[sp.MatrixBase]) -> list[bool]:
    """Whether each residual simplifies to 0."""
    return [_vanishes(residual, lambda e: sp.simplify(sp.expand(e))) for residual in residuals]


def _vanishes(residual: sp.MatrixBase, rule: Callable[[sp.Expr], sp.Expr]) -> bool:
    return all(rule(e) == 0 for e in residual)
