r"""The oracle: the moments of an affine SDE from f and g alone, by an integration that shares nothing with the library.

With dx = (F x + b) dt + g dw and Q = g gᵀ, the maps over one panel [s, s + h],

    Φ = Φ(s + h, s),     d = ∫ Φ(s + h, u) b(u) du,     D = ∫ Φ(s + h, u) Q(u) Φ(s + h, u)ᵀ du,

come from Gauss-Legendre collocation of Φ' = F Φ (for one component from ∫ F) and Gauss's rule, and are composed one
after the other. F, b and Q are read from f and g by NumPy (:mod:`sdeflow.symbolic.evaluate`). The panels

- end where a condition, a step, a kink or a knot of the declaration stands
  (:func:`~sdeflow.proof.certificate.intervals.breaks`),
- are halved where bounds of a coefficient, or of its slope, over a panel exceed what points of the panel show, so that
  no narrow feature lies between points, nor hides in what varies slowly beside it,
- and are halved until two halves give what the whole gives.

The oracle says how far the last two of these differ, and its values are compared within that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import sympy as sp

from sdeflow.proof.certificate.intervals import breaks, conditions, enclose
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.evaluate import UnknownValue, evaluate
from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.schedule import Schedule
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Law", "Oracle", "linear_part", "ratio", "sizes"]

_STAGES = 8
_ACCURACY = 1e-12  # of a panel's share of a moment
_LEVELS = 48  # halvings of a panel
_MOST_PANELS = 40_000
_MOST_BOXES = 256  # that are halved at once
_START = 120  # panels that double towards later times, the first of them 2^-120 of the horizon
_REMEMBERED = 60.0  # nats of decay after which the state is forgotten
_LARGEST_CHANGE = 2.0  # of ∫ F over a panel

Array = np.ndarray
Value = float | Array


@lru_cache(maxsize=16)
def linear_part(declaration: Declaration) -> tuple[list[sp.Expr], list[sp.Expr], list[sp.Expr]]:
    """The slopes ∂f_i/∂x_j, f, and the entries of g, by SymPy's own derivative.

    Raises:
        UnknownValue: where that takes too long.
    """
    slopes = patiently(_slopes, list(declaration.drifts), declaration.state)
    if slopes is None:
        raise UnknownValue("SymPy takes too long over the derivatives of f.")
    return slopes, list(declaration.drifts), list(declaration.diffusions)


def _slopes(drifts: list[sp.Expr], state: tuple[sp.Symbol, ...]) -> list[sp.Expr]:
    return [sp.diff(f, component) for f in drifts for component in state]


class Law(NamedTuple):
    """Moments at n times, for e entries of tensor parameters."""

    phi: Array  # (n, e, k, k)
    cov: Array  # (n, e, k, k)
    offset: Array  # (n, e, k)
    reach: Array  # (n, e, k): the size of what the offset is the sum of
    log_phi: Array  # (n, e) of one component, whose Φ may underflow
    phi_doubt: Array  # (n,): how far the oracle itself may be off, relative
    cov_doubt: Array
    offset_doubt: Array


class _State(NamedTuple):
    """Moments at some times, with more dimensions in front."""

    phi: Array  # (e, k, k)
    cov: Array  # (e, k, k)
    offset: Array  # (e, k)
    reach: Array  # (e, k)
    log_phi: Array  # (e,)
    most: Array  # (3,): the largest rate of the panels before


class Panels(NamedTuple):
    """Intervals [low, high], (p,), with their maps, (e, p, ...)."""

    low: Array
    high: Array
    growth: Array  # of one component ∫ F (e, p), else Φ (e, p, k, k)
    push: Array
    noise: Array
    plain: tuple[Array, Array]  # ∫ b and ∫ Q without Φ
    rate: Array  # (3, p): the largest |F|, |b|, |Q| seen, times the time


def _gauss(count: int) -> tuple[Array, Array, Array]:
    """Nodes and weights on [0, 1], and the weights of integrals from 0 to each node."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    nodes, weights = 0.5 * (1 + nodes), 0.5 * weights
    powers = np.arange(1, count + 1)
    running = (nodes[:, None] ** powers / powers) @ np.linalg.inv(nodes[:, None] ** (powers - 1))
    return nodes, weights, running


_NODES, _WEIGHTS, _RUNNING = _gauss(_STAGES)


def _slope(expression: sp.Expr) -> sp.Expr:
    """d/dt of an expression between its jumps; of hyperbolic functions in a form that does not overflow.

    0 where it holds a function of the user's, of which values are all that is known.
    """
    if any(node.table is None for node in expression.atoms(Schedule)):
        return sp.Integer(0)
    expression = expression.replace(sp.Mod, lambda a, p: a - p * sp.floor(a / p))
    expression = expression.replace(sp.frac, lambda u: u - sp.floor(u))
    steps = {node: sp.Dummy() for node in expression.atoms(sp.floor, sp.ceiling, sp.sign, sp.Heaviside)}
    back = {dummy: node for node, dummy in steps.items()}
    slope = sp.diff(expression.xreplace(steps), time_symbol).xreplace(back)
    return slope.replace(sp.sinh, lambda u: sp.tanh(u) * sp.cosh(u))


class Oracle:
    """The moments of an affine declaration for its parameters' values.

    Args:
        declaration: affine.
        numbers: the parameters; of tensors the entries, (e,).
        first: the earliest time at which small moments matter; before it only their sum does.

    Raises:
        UnknownValue: where an integration to 1e-9 takes more than 40,000 panels.
    """

    def __init__(self, declaration: Declaration, numbers: Mapping[sp.Symbol, Value], first: float = 0.0) -> None:
        self.declaration, self.T, self.k = declaration, declaration.T, len(declaration.state)
        self.numbers = {symbol: np.asarray(value, dtype=float)[..., None] for symbol, value in numbers.items()}
        self.entries = max((value.size for value in self.numbers.values()), default=1)
        self.numbers = {symbol: v if v.shape[0:-1] else v[0] for symbol, v in self.numbers.items()}
        self.first = first
        self._slopes, self._drifts, self._noises = linear_part(declaration)
        P0 = declaration.P0
        self._laws: dict[tuple[bytes, float, bytes], Law] = {}
        self._at_edges: dict[bytes, _State] = {}
        self.P0 = np.array(P0.tolist() if isinstance(P0, sp.MatrixBase) else [[P0]], dtype=float)

    # ---------------------------------------------------------------- f and g as numbers

    def coefficients(self, times: Array) -> tuple[Array, Array, Array]:
        """F (e, n, k, k), b (e, n, k) and Q (e, n, k, k) at times (n,)."""
        at, k = np.asarray(times, dtype=float)[None, :], self.k
        shape = (self.entries, at.shape[1])

        def read(expressions: list[sp.Expr], state: float) -> Array:
            point: dict[sp.Symbol, Value] = {**self.numbers, **dict.fromkeys(self.declaration.state, state)}
            point[time_symbol] = at
            values = {e: np.broadcast_to(evaluate(e, point), shape) for e in set(expressions)}
            return np.stack([values[e] for e in expressions], -1)

        F, b = read(self._slopes, 0.0), read(self._drifts, 0.0)
        if not np.isfinite(F).all():
            F = np.where(np.isfinite(F), F, read(self._slopes, 1.0))
        F = F.reshape(*shape, k, k)
        if not np.isfinite(b).all():  # f may be written so that it is 0/0 at x = 0
            b = np.where(np.isfinite(b), b, read(self._drifts, 1.0) - F.sum(-1))
        g = read(self._noises, 1.0).reshape(*shape, k, -1)
        return F, b, g @ g.swapaxes(-1, -2)

    @cached_property
    def breaks(self) -> Array:
        """Where the declaration is not smooth, as its conditions say."""
        return self.jumps[self.jumps < self.T]

    @cached_property
    def jumps(self) -> Array:
        """The same, of all entries, and at the horizon too."""
        parts = [*self._drifts, *self._noises]
        symbols = [s for s in self.numbers if any(s in inner.free_symbols for inner in conditions(parts))]
        values = [np.broadcast_to(np.ravel(self.numbers[s]), (self.entries,)) for s in symbols]
        rows = np.unique(np.stack(values, -1), axis=0) if symbols else np.zeros((1, 0))
        found = [
            breaks(parts, self.T * (1.0 + 1e-8), {**self._chosen[0], **dict(zip(symbols, row.tolist(), strict=True))})
            for row in rows
        ]
        return np.unique(np.concatenate(found))

    @cached_property
    def _chosen(self) -> list[dict[sp.Symbol, float]]:
        """Numbers of some entries: both ends of each tensor, and a few between."""
        if self.entries == 1:
            return [{symbol: float(np.ravel(value)[0]) for symbol, value in self.numbers.items()}]
        flat = {symbol: np.broadcast_to(np.ravel(v), (self.entries,)) for symbol, v in self.numbers.items()}
        ends = {int(f(values)) for values in flat.values() for f in (np.argmin, np.argmax)}
        rows = sorted(ends | set(np.random.default_rng(1).integers(0, self.entries, 6).tolist()))
        return [{symbol: float(values[row]) for symbol, values in flat.items()} for row in rows]

    # ---------------------------------------------------------------- panels

    @cached_property
    def panels(self) -> Array:
        """Edges of panels on which everything is resolved; see the module."""
        edges = np.unique(np.concatenate([self.T * 2.0 ** -np.arange(_START + 1.0), [0.0], self.breaks]))
        return self._halved(self._bounded(edges))

    def _bounded(self, edges: Array) -> Array:
        """Edges such that bounds of f, g and their slopes over each interval are what its points show."""
        states = {component: sp.Float(0.7548 + 0.5698 * i) for i, component in enumerate(self.declaration.state)}
        for expression in dict.fromkeys([*self._drifts, *self._noises]):
            expression = expression.xreplace(states)
            if expression.has(time_symbol):
                for numbers in self._chosen:
                    edges = self._bounded_for(expression, numbers, edges)
        return edges

    def _bounded_for(self, expression: sp.Expr, numbers: dict[sp.Symbol, float], edges: Array) -> Array:
        low, high, slope, total = edges[:-1], edges[1:], _slope(expression), None
        extra, points = [], np.sort(np.random.default_rng(2).uniform(0.02, 0.98, 9))
        for _ in range(_LEVELS):
            width = high - low
            hidden, seen, size = self._hidden(expression, numbers, low, high, points)
            total = float((size * width).sum()) if total is None else total
            steep, steep_seen, steepness = self._hidden(slope, numbers, low, high, points)
            area = hidden * width  # of what the points may have missed
            of_slopes = np.minimum((hidden + seen) * width, steep * width**2)  # or where a step is
            split = (hidden > 8.0 * seen + 1e-3 * size) & (area > 1e-11 * total)
            split |= (steep > 8.0 * steep_seen + steepness) & (of_slopes > 1e-11 * total)
            if split.sum() > _MOST_BOXES:  # bounds that are wider than what the expression does: the widest first
                split = np.isin(
                    np.arange(len(low)),
                    np.argsort(-np.where(split, np.maximum(area, of_slopes), 0.0))[: _MOST_BOXES // 2],
                )
            if not split.any():
                break
            low, high = low[split], high[split]
            middle = 0.5 * (low + high)
            extra.append(middle)
            low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
        return np.unique(np.concatenate([edges, *extra]))

    def _hidden(
        self, expression: sp.Expr, numbers: dict[sp.Symbol, float], low: Array, high: Array, points: Array
    ) -> tuple[Array, Array, Array]:
        """By how much bounds over each interval exceed what points show, how far these vary, and how large they are."""
        width = high - low
        values = evaluate(expression, {**numbers, time_symbol: low + points[:, None] * width})
        values = np.broadcast_to(values, (len(points), len(low)))
        least, most = np.sort(values, axis=0)[[1, -2]]  # one point may have hit a narrow feature by luck
        with np.errstate(invalid="ignore"):
            seen = np.nan_to_num(most - least, nan=0.0)
        size = np.nan_to_num(np.abs(values).max(0), posinf=1e300, nan=0.0)
        if any(node.table is None for node in expression.atoms(Schedule)):
            # A function of the user's: all there is to look at are its values, at many points.
            hidden = np.where(width > self.T / 1024, np.inf, seen)
        else:
            slack = 1e-12 * width
            below, above = enclose(expression, low + slack, high - slack, numbers)
            with np.errstate(invalid="ignore"):
                hidden = np.maximum(above - most, least - below)
        return np.nan_to_num(hidden, nan=1e150, posinf=1e150), np.minimum(seen, 1e100), np.minimum(size, 1e100)

    def _halved(self, edges: Array) -> Array:
        """Edges of panels whose halves give what the whole gives, but for rounding."""
        low, high = edges[:-1], edges[1:]
        whole, before, done = self._maps(low, high), np.full(len(low), np.inf), [edges]
        self._doubts = []
        for _ in range(_LEVELS):
            middle = 0.5 * (low + high)
            left, right = self._maps(low, middle), self._maps(middle, high)
            error, growth = self._difference(whole, left, right)
            rounding = (error > 0.2 * before) & (error < 1e-7)
            again = ~((error <= _ACCURACY) | rounding | (high - low <= 4e-16 * high))
            self._doubts.append((low[~again], error[~again] * _largest(whole.noise)[~again], growth[~again]))
            done.append(middle)
            if not again.any():
                break
            if sum(map(len, done)) > _MOST_PANELS:
                raise UnknownValue(f"an integration of f and g takes more than {_MOST_PANELS} panels.")
            low, high = np.concatenate([low[again], middle[again]]), np.concatenate([middle[again], high[again]])
            whole = _joined(_taken(left, again), _taken(right, again))
            before = np.tile(error[again], 2)
        return np.unique(np.concatenate(done))

    # ---------------------------------------------------------------- maps of panels

    def _maps(self, low: Array, high: Array) -> Panels:
        width, k, n = high - low, self.k, len(low)
        times = low[:, None] + width[:, None] * _NODES
        F, b, Q = (v.reshape(self.entries, n, _STAGES, *v.shape[2:]) for v in self.coefficients(times.reshape(-1)))
        if not all(np.isfinite(v).all() for v in (F, b, Q)):
            raise UnknownValue("f and g are not finite everywhere on the horizon.")
        rate = np.stack([_largest(v) for v in (F, b, Q)]) * high
        weights = _WEIGHTS * width[:, None]
        plain = np.einsum("pj,npja->npa", weights, b), np.einsum("pj,npjab->npab", weights, Q)
        if k == 1:
            F, b, Q = F[..., 0, 0], b[..., 0], Q[..., 0, 0]
            total = (F * weights).sum(-1)
            with np.errstate(over="ignore"):
                left = np.exp(total[..., None] - (F @ _RUNNING.T) * width[:, None])
            push, noise = (b * left * weights).sum(-1), (Q * left**2 * weights).sum(-1)
            return Panels(low, high, total, push[..., None], noise[..., None, None], plain, rate)
        # Φ at the nodes: Y_i = 1 + h Σ_j r_ij F_j Y_j.
        blocks = np.einsum("ij,npjab->npiajb", _RUNNING, F * width[:, None, None, None])
        system = np.eye(_STAGES * k) - blocks.reshape(self.entries, n, _STAGES * k, _STAGES * k)
        Y = np.linalg.solve(system, np.tile(np.eye(k), (_STAGES, 1))).reshape(self.entries, n, _STAGES, k, k)
        total = np.eye(k) + np.einsum("pj,npjab,npjbc->npac", weights, F, Y)
        left = np.linalg.solve(Y.swapaxes(-1, -2), total.swapaxes(-1, -2)[:, :, None]).swapaxes(-1, -2)
        push = np.einsum("pj,npjab,npjb->npa", weights, left, b)
        noise = np.einsum("pj,npjab,npjbc,npjdc->npad", weights, left, Q, left, optimize=True)
        return Panels(low, high, total, push, noise, plain, rate)

    def _difference(self, whole: Panels, left: Panels, right: Panels) -> tuple[Array, Array]:
        """How far the maps of two halves, composed, are from those of the whole, and of Φ alone, (p,), relative

        Before ``first`` a share of the noise counts for what it adds to the sum.
        """
        if self.k == 1:
            total, (push, noise) = left.growth + right.growth, map(np.add, left.plain, right.plain)
            of_whole = whole.plain
            growth = np.abs(total - whole.growth) / (1.0 + np.abs(total))
        else:
            total = right.growth @ left.growth
            push = np.einsum("npab,npb->npa", right.growth, left.push) + right.push
            noise = right.growth @ left.noise @ right.growth.swapaxes(-1, -2) + right.noise
            of_whole = whole.push, whole.noise
            growth = np.abs(total - whole.growth) / (1.0 + np.abs(total).max((-1, -2), keepdims=True))
        pushed = (
            np.abs(push - of_whole[0]),
            np.abs(push).max(-1, keepdims=True) + np.abs(left.push) + np.abs(right.push),
        )
        noised = np.abs(noise - of_whole[1]), sizes(noise)
        early = whole.high <= self.first
        errors = [_largest(growth)]
        for error, size in (pushed, noised):
            size = np.broadcast_to(size, error.shape)
            if early.any():
                least = np.where(early, _largest(size)[early].max(), 0.0)
                size = np.maximum(size, least.reshape(1, -1, *(1,) * (size.ndim - 2)))
            errors.append(_largest(ratio(error, size)))
        return np.max(errors, axis=0), errors[0]

    @cached_property
    def _of_panels(self) -> Panels:
        return self._maps(self.panels[:-1], self.panels[1:])

    def _maps_between(self, edges: Array) -> Panels:
        """The maps between edges, those of whole panels computed once."""
        base, low, high = self.panels, edges[:-1], edges[1:]
        at = np.clip(np.searchsorted(base, low), 0, len(base) - 2)
        known = (base[at] == low) & (base[at + 1] == high)
        if known.all():
            return _taken(self._of_panels, at)
        new = self._maps(low[~known], high[~known])
        order = np.argsort(np.concatenate([np.flatnonzero(known), np.flatnonzero(~known)]))
        return _taken(_joined(_taken(self._of_panels, at[known]), new), order)

    # ---------------------------------------------------------------- moments

    def law(self, times: Array, since: float = 0.0, cov: Array | None = None) -> Law:
        """The moments at times from ``since`` on, from Φ = 1, offset 0 and ``cov`` (P0 at t = 0, 0 later) there."""
        times = np.asarray(times, dtype=float)
        start = (self.P0 if since == 0.0 else 0.0 * self.P0) if cov is None else cov
        key = times.tobytes(), since, start.tobytes()
        if key not in self._laws:
            gentle = self.k > 1 or np.abs(self._of_panels.growth).max() <= _LARGEST_CHANGE
            law = self._from_edges(times, start) if since == 0.0 and gentle else self._composed(times, since, start)
            self._laws[key] = law
        return self._laws[key]

    def _from_edges(self, times: Array, start: Array) -> Law:
        """From the moments at the last edge before each time on: what leads to the edges is composed once."""
        key = start.tobytes()
        if key not in self._at_edges:
            self._at_edges[key] = self._states(self._of_panels, start)
        before = np.searchsorted(self.panels, times, "right") - 1
        state = _State(*(part[before] for part in self._at_edges[key]))
        on = np.flatnonzero(self.panels[before] < times)
        if len(on):
            rest = self._maps(self.panels[before[on]], times[on])
            growth, push, noise = (np.moveaxis(part, 1, 0) for part in (rest.growth, rest.push, rest.noise))
            moved = self._onward(_State(*(part[on] for part in state)), growth, push, noise, rest.rate.T)
            for part, later in zip(state, moved, strict=True):
                part[on] = later
        return self._law(times, state)

    def _composed(self, times: Array, since: float, start: Array) -> Law:
        """Panel after panel from ``since`` on."""
        inside = self.panels[(self.panels > since) & (self.panels < times.max())]
        edges = np.unique(np.concatenate([[since], inside, times]))
        edges = self._remembered(edges, times) if self.k == 1 else edges
        panels = self._maps_between(edges)
        if self.k == len(times) == 1:
            last = self._by_twos(panels, start)
            if np.isfinite(last.cov).all() and np.isfinite(last.offset).all():
                return self._law(times, _State(*(part[None] for part in last)))
        states = self._states(panels, start)
        return self._law(times, _State(*(part[np.searchsorted(edges, times)] for part in states)))

    def _remembered(self, edges: Array, times: Array) -> Array:
        """Edges of panels short enough for the decay; where all is forgotten by the times asked for they stay long."""
        growth = self._maps_between(edges).growth
        level = np.concatenate([np.zeros((self.entries, 1)), np.cumsum(growth, 1)], 1)
        extra = [edges]
        for j in np.flatnonzero(np.abs(growth).max(0) > _LARGEST_CHANGE):
            later = np.searchsorted(edges, times[times >= edges[j + 1]])
            if (level[:, later] - level[:, [j + 1]]).max(initial=-np.inf) < -_REMEMBERED:
                continue
            reach = min(1.0, _REMEMBERED / float(np.abs(growth[:, j]).min()))
            count = math.ceil(reach * float(np.abs(growth[:, j]).max()) / _LARGEST_CHANGE)
            if count + sum(map(len, extra)) > _MOST_PANELS:
                raise UnknownValue("the drift is too fast for the horizon.")
            extra.append(edges[j + 1] - (edges[j + 1] - edges[j]) * reach * np.arange(1, count + 1) / count)
        return np.unique(np.concatenate(extra))

    def _begin(self, start: Array) -> _State:
        k, e = self.k, self.entries
        one, zero = np.broadcast_to(np.eye(k), (e, k, k)), np.zeros((e, k))
        return _State(one, np.broadcast_to(start, (e, k, k)), zero, zero, np.zeros(e), np.zeros(3))

    def _states(self, panels: Panels, start: Array) -> _State:
        """The moments at the p + 1 ends of panels that follow each other."""
        if self.k == self.entries == 1:
            return self._of_numbers(panels, float(start[0, 0]))
        state = self._begin(start)
        states = [state]
        for i in range(len(panels.low)):
            maps = panels.growth[:, i], panels.push[:, i], panels.noise[:, i]
            state = self._onward(state, *maps, panels.rate[:, i])
            states.append(state)
        return _State(*(np.stack(parts) for parts in zip(*states, strict=True)))

    def _onward(self, state: _State, growth: Array, push: Array, noise: Array, rate: Array) -> _State:
        """The moments one panel later; all may have more dimensions in front."""
        phi, P, m, reach, log_phi, most = state
        most = np.maximum(most, rate)
        if self.k > 1:
            phi, P = growth @ phi, growth @ P @ growth.swapaxes(-1, -2) + noise
            m, reach = ((a @ v[..., None])[..., 0] for a, v in ((growth, m), (np.abs(growth), reach)))
            return _State(phi, P, m + push, reach + np.abs(push), log_phi, most)
        step = np.exp(growth)[..., None]
        wide = step[..., None]
        m, reach = step * m + push, step * reach + np.abs(push)
        return _State(wide * phi, wide * P * wide + noise, m, reach, log_phi + growth, most)

    def _by_twos(self, panels: Panels, start: Array) -> _State:
        """The moments of one component after all panels, which are composed in log2(p) steps."""
        growth, push, noise = panels.growth, panels.push[..., 0], panels.noise[..., 0, 0]
        reach = np.abs(push)
        with np.errstate(over="ignore", invalid="ignore"):
            while growth.shape[1] > 1:
                if growth.shape[1] % 2:
                    growth, push, noise, reach = (np.pad(v, ((0, 0), (1, 0))) for v in (growth, push, noise, reach))
                step = np.exp(growth[:, 1::2])
                push, reach = (step * v[:, ::2] + v[:, 1::2] for v in (push, reach))
                noise = step * noise[:, ::2] * step + noise[:, 1::2]
                growth = growth[:, ::2] + growth[:, 1::2]
            state = self._onward(self._begin(start), growth[:, 0], push, noise[..., None], panels.rate.max(1))
        return state._replace(reach=reach)

    def _of_numbers(self, panels: Panels, P: float) -> _State:
        """The same of one component with one entry, in plain numbers: there may be thousands of panels."""
        phi, m, reach, log_phi = 1.0, 0.0, 0.0, 0.0
        found = [(phi, P, m, reach, log_phi)]
        maps = panels.growth[0], np.exp(panels.growth[0]), panels.push[0, :, 0], panels.noise[0, :, 0, 0]
        for rate, step, push, noise in zip(*(v.tolist() for v in maps), strict=True):
            log_phi, phi, P = log_phi + rate, step * phi, step * P * step + noise
            m, reach = step * m + push, step * reach + abs(push)
            found.append((phi, P, m, reach, log_phi))
        of_phi, of_P, of_m, of_reach, of_log = np.array(found).T[..., None]
        most = np.maximum.accumulate(np.concatenate([np.zeros((3, 1)), panels.rate], 1), 1)
        matrices = of_phi[..., None, None], of_P[..., None, None]
        return _State(*matrices, of_m[..., None], of_reach[..., None], of_log, most.T)

    def _law(self, times: Array, state: _State) -> Law:
        """The moments with how far Φ, P and the offset may be off, relative, (n,).

        A time is a rounded number, and so is a break: what a coefficient does in some units of their last place is
        not to be told. To that what the last halving changed.
        """
        most = state.most.T * 2e-15
        low, doubts, growth = (np.concatenate(parts) for parts in zip(*self._doubts, strict=True))
        doubt, of_phi = (np.array([part[low < at].sum() for at in times]) for part in (doubts, growth))
        size, shift = (np.abs(v).reshape(len(times), -1).max(1) + 1e-300 for v in (state.cov, state.reach))
        of_cov = 2 * most[0] + (most[2] + 10 * doubt) / size
        return Law(*state[:5], most[0] + of_phi, of_cov, most[0] + most[1] / shift)

    def rule(self, low: float, high: float) -> tuple[Array, Array]:
        """Gauss's nodes and weights for integrals over [low, high] that end in a moment at ``high``."""
        inside = self.panels[(self.panels > max(low, 2.0**-64 * self.T)) & (self.panels < high)]
        edges = np.unique(np.concatenate([[low], inside, [high]]))
        edges = self._remembered(edges, np.array([high])) if self.k == 1 and len(edges) > 1 else edges
        width = np.diff(edges)
        return (edges[:-1, None] + width[:, None] * _NODES).reshape(-1), (width[:, None] * _WEIGHTS).reshape(-1)

    def antiderivative(self, expression: sp.Expr, variable: sp.Symbol) -> Callable[[Array], Array]:
        """∫_0^u of an expression of one variable and the parameters, as a function of arrays u in [0, T]."""
        edges = self.panels

        def values(at: Array) -> Array:
            return evaluate(expression, {**self._chosen[0], variable: at})

        width = np.diff(edges)
        parts = (values(edges[:-1, None] + width[:, None] * _NODES) * _WEIGHTS).sum(-1) * width
        total = np.concatenate([[0.0], np.cumsum(parts)])

        def integral(u: Array) -> Array:
            u = np.clip(np.asarray(u, dtype=float), 0.0, self.T)
            i = np.clip(np.searchsorted(edges, u, "right") - 1, 0, len(width) - 1)
            rest = u - edges[i]
            mean = (values(edges[i][..., None] + rest[..., None] * _NODES) * _WEIGHTS).sum(-1)
            return total[i] + np.where(rest > 0, mean, 0.0) * rest  # at 0 itself it may be infinite

        return integral


def ratio(error: Array, size: Array) -> Array:
    """|error| / size, and 0 where both are 0."""
    error, size = np.broadcast_arrays(np.abs(error), size)
    return np.where(error == 0, 0.0, error / np.where(size > 0, size, 1e-300))


def sizes(P: Array) -> Array:
    """sqrt(P_ii P_jj), the size of a covariance's entries."""
    d = np.sqrt(np.abs(np.diagonal(P, axis1=-2, axis2=-1)))
    return d[..., :, None] * d[..., None, :]


def _largest(values: Array) -> Array:
    """The largest modulus of (e, p, ...) in each panel, (p,)."""
    return np.abs(np.moveaxis(values, 1, 0)).reshape(values.shape[1], -1).max(1)


def _taken(panels: Panels, rows: Array) -> Panels:
    low, high, growth, push, noise, plain, rate = panels
    plain = plain[0][:, rows], plain[1][:, rows]
    return Panels(low[rows], high[rows], growth[:, rows], push[:, rows], noise[:, rows], plain, rate[:, rows])


def _joined(a: Panels, b: Panels) -> Panels:
    def both(x: Array, y: Array) -> Array:
        return np.concatenate([x, y], 0 if x.ndim == 1 else 1)

    plain = both(a.plain[0], b.plain[0]), both(a.plain[1], b.plain[1])
    low, high, growth, push, noise = (both(x, y) for x, y in zip(a[:5], b[:5], strict=True))
    return Panels(low, high, growth, push, noise, plain, both(a.rate, b.rate))
