"""Random affine declarations with narrow features, each written twice: in SymPy, and as a plain function of a float.

The second is integrated by DOP853 from one break point to the next, with further stops around each spike. The
generator places all features, so it knows where they are; nothing of sdeflow is used for it.
"""

import math
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import numpy as np
import sympy as sp
import torch
from scipy.integrate import solve_ivp
from scipy.interpolate import PchipInterpolator

import sdeflow
from sdeflow import SDE, state, t, x


@dataclass
class Term:
    """A function of t: SymPy, a function of a float, its break points, and its spikes (centre, width)."""

    expr: sp.Expr
    value: object
    breaks: tuple = ()
    spikes: tuple = ()
    widths: tuple = ()
    params: dict = field(default_factory=dict)

    def __add__(self, other):
        return Term(
            self.expr + other.expr, lambda s: self.value(s) + other.value(s), self.breaks + other.breaks,
            self.spikes + other.spikes, self.widths + other.widths, {**self.params, **other.params},
        )  # fmt: skip

    def times(self, number):
        factor = float(number)
        return Term(
            number * self.expr, lambda s: factor * self.value(s), self.breaks, self.spikes, self.widths, self.params
        )


class Random:
    """Draws terms on [0, T]; numbers in SymPy are floats or fractions, at random."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.T = float(10 ** self.rng.uniform(-3, 3))
        self.count = 0

    def number(self, value):
        """``value`` in SymPy, exactly."""
        return sp.Rational(float(value)) if self.rng.random() < 0.5 else sp.Float(float(value))

    def between(self, low, high):
        return float(self.rng.uniform(low, high))

    def width(self, narrowest=-9):
        return self.T * 10 ** self.between(narrowest, -2)

    def parameter(self, value):
        """A symbol with a value: a number, a tensor or an nn.Parameter."""
        self.count += 1
        symbol = sp.Symbol(f"p{self.count}", real=True)
        held = self.rng.integers(3)
        tensor = torch.tensor(value, dtype=torch.float64)
        return symbol, {symbol: value if held == 0 else tensor if held == 1 else torch.nn.Parameter(tensor)}

    # ------------------------------------------------------------ positive terms of size 1 outside their features

    def smooth(self):
        w, k = self.between(0.5, 8) / self.T, self.between(0, 0.9)
        W, K = self.number(w), self.number(k)
        return [
            lambda: Term(sp.Integer(1) + 0 * t, lambda s: 1.0),
            lambda: Term(1 + K * sp.sin(W * t), lambda s: 1 + k * math.sin(w * s)),
            lambda: Term(sp.exp(-W * t), lambda s: math.exp(-w * s)),
            lambda: Term(1 + (W * t) ** 2, lambda s: 1 + (w * s) ** 2),
        ][self.rng.integers(4)]()

    def feature(self, largest=1e7):
        names = ["pulse", "jump", "spike", "step", "table", "rounded", "modulus", "extremum", "nested", "conditional"]
        return getattr(self, names[self.rng.integers(len(names))])(largest)

    def pulse(self, largest):
        w = self.width()
        c = self.between(0.05, 0.9) * self.T
        h = min(largest, self.between(0.1, 3) * self.T / w)
        left, right = c, c + w
        L, R = self.number(left), self.number(right)
        inside = [sp.And(t > L, t < R), sp.Not(sp.Or(t <= L, t >= R)), sp.Abs(t - (L + R) / 2) < (R - L) / 2]
        which = self.rng.integers(3)
        if which == 2:
            left, right = (float(e) for e in (sp.Rational(left), sp.Rational(right)))
        return Term(
            sp.Piecewise((self.number(h), inside[which]), (0, True)),
            lambda s: h if left < s < right else 0.0, (left, right), (), (w,),
        )  # fmt: skip

    def jump(self, largest):
        c, h = self.between(0.05, 0.95) * self.T, 10 ** self.between(-3, math.log10(largest))
        C, H = self.number(c), self.number(h)
        expr = [
            H * sp.Heaviside(t - C), sp.Piecewise((0, t < C), (H, True)), H * (1 + sp.sign(t - C)) / 2,
            H * sp.Heaviside(sp.exp(t / self.number(self.T)) - sp.exp(C / self.number(self.T))),
        ][self.rng.integers(4)]  # fmt: skip
        return Term(expr, lambda s: h if s > c else 0.0, (c,), (), (1e-3 * self.T,))

    def spike(self, largest):
        w, c = self.width(), self.between(0.05, 0.95) * self.T
        h = min(largest, self.between(0.1, 3) * self.T / w)
        u = (t - self.number(c)) / self.number(w)
        shape, value = [
            (sp.exp(-(u**2)), lambda v: math.exp(-v * v)),
            (1 / (1 + u**2), lambda v: 1 / (1 + v * v)),
            (sp.sech(u) ** 2, lambda v: 1 / math.cosh(v) ** 2 if abs(v) < 300 else 0.0),
            (1 / sp.cosh(u), lambda v: 1 / math.cosh(v) if abs(v) < 700 else 0.0),
            (sp.exp(-(u**2)) * (1 + sp.sin(u) ** 2), lambda v: math.exp(-v * v) * (1 + math.sin(v) ** 2)),
        ][self.rng.integers(5)]
        return Term(self.number(h) * shape, lambda s: h * value((s - c) / w), (), ((c, w),), (w,))

    def step(self, largest):
        w, c, h = self.width(), self.between(0.05, 0.95) * self.T, 10 ** self.between(-2, math.log10(largest))
        u = (t - self.number(c)) / self.number(w)
        which = self.rng.integers(2)
        expr = [1 + sp.tanh(u), 2 / (1 + sp.exp(-2 * u))][which]
        return Term(
            self.number(h) * expr, lambda s: h * (1 + math.tanh((s - c) / w)), (), ((c, w),), (w,)
        )  # fmt: skip

    def table(self, largest):
        n = int(self.rng.integers(3, 12))
        times = np.sort(np.concatenate([[0.0, self.T], self.rng.uniform(0, self.T, n)]))
        values = 10 ** self.rng.uniform(-2, min(2, math.log10(largest)), n + 2)
        curve = PchipInterpolator(times, values)
        self.count += 1
        beta = sdeflow.schedule((times, values), name=f"table{self.count}_{self.rng.integers(1 << 30)}")
        return Term(beta(t), lambda s: float(curve(s)), tuple(times[1:-1]), (), (1e-3 * self.T,))

    def rounded(self, largest):
        n, shift, h = self.between(1, 20) / self.T, self.between(0, 1), self.between(0.1, min(10, largest))
        N, S, H = self.number(n), self.number(shift), self.number(h)
        ends = np.arange(math.ceil(shift), math.floor(shift + n * self.T) + 1)
        breaks = tuple(float((sp.Rational(int(k)) - sp.Rational(shift)) / sp.Rational(n)) for k in ends)
        u = N * t + S
        # How many integers v has passed is told by the break points, where rounding might err.
        expr, value = [
            (sp.floor(u), lambda v, base: base),
            (sp.ceiling(u), lambda v, base: base + 1),
            (sp.frac(u), lambda v, base: v - base),
            (sp.Mod(u, 1) ** 2, lambda v, base: (v - base) ** 2),
            (sp.Mod(t, 1 / N) * N, lambda v, base: v - base),
        ][which := self.rng.integers(5)]
        if which == 4:
            shift, breaks = 0.0, tuple(float(k / sp.Rational(n)) for k in range(1, math.floor(n * self.T) + 1))
        first = math.floor(shift)
        return Term(
            H * expr, lambda s: h * value(n * s + shift, first + int(np.searchsorted(breaks, s))), breaks, (),
            (1e-3 * self.T,),
        )  # fmt: skip

    def modulus(self, largest):
        w, c = self.between(3, 60) / self.T, self.between(0, 1) * self.T
        h = self.between(0.1, min(10, largest))
        W, C, H = self.number(w), self.number(c), self.number(h)
        k = np.arange(math.ceil(-w * c / math.pi), math.floor(w * (self.T - c) / math.pi) + 1)
        breaks = tuple(c + np.pi * k / w)
        if self.rng.random() < 0.5:
            expr, value = sp.Abs(sp.sin(W * (t - C))), lambda s: abs(math.sin(w * (s - c)))
        else:
            expr, value, breaks = sp.Abs(W * (t - C)), lambda s: abs(w * (s - c)), (c,)
        return Term(H * expr, lambda s: h * value(s), breaks, (), (1e-3 * self.T,))

    def extremum(self, largest):
        c, h = self.between(0.1, 0.9), self.between(0.1, min(10, largest))
        C, H, U = self.number(c), self.number(h), t / self.number(self.T)
        expr, value, breaks = [
            (sp.Max(U, C), lambda u: max(u, c), (c,)),
            (sp.Min(U, C), lambda u: min(u, c), (c,)),
            (sp.Max(U**2, C, 1 - U), lambda u: max(u * u, c, 1 - u), (1 - c, math.sqrt(c), (math.sqrt(5) - 1) / 2)),
        ][self.rng.integers(3)]
        return Term(H * expr, lambda s: h * value(s / self.T), tuple(b * self.T for b in breaks), (), (1e-3 * self.T,))

    def nested(self, largest):
        """|u - |u - c|| < d, and a pulse train: features inside features."""
        c, d, h = self.between(0.3, 0.9), self.between(0.02, 0.2), self.between(0.1, min(1e3, largest))
        C, D, H, U = self.number(c), self.number(d), self.number(h), t / self.number(self.T)
        if self.rng.random() < 0.5:
            # u - |u - c| is 2u - c below c, and c above.
            low, high = (c - d) / 2, (c + d) / 2
            expr = sp.Piecewise((H, sp.Abs(U - sp.Abs(U - C)) < D), (1, True))
            left, right = low * self.T, high * self.T
            return Term(expr, lambda s: h if left < s < right else 1.0, (left, right), (), (1e-3 * self.T,))
        n = int(self.rng.integers(2, 9))
        angle = math.asin(d)
        k = np.arange(0, 2 * n + 1)
        breaks = np.sort(np.concatenate([(2 * k * math.pi + angle), ((2 * k + 1) * math.pi - angle)])) / (math.pi * n)
        breaks = breaks[breaks < 1] * self.T
        expr = sp.Piecewise((H, sp.sin(sp.pi * n * U) > D), (sp.Rational(1, 2), True))
        return Term(
            expr, lambda s: h if np.searchsorted(breaks, s) % 2 else 0.5, tuple(breaks), (), (1e-3 * self.T,)
        )  # fmt: skip

    def conditional(self, largest):
        """A condition that holds a parameter."""
        c, h = self.between(0.1, 0.9) * self.T, 10 ** self.between(-1, min(4, math.log10(largest)))
        H = self.number(h)
        which = self.rng.integers(3)
        if which == 2:
            symbol, params = self.parameter(c)
            w = self.width(-6)
            left, right = c, float(sp.Rational(c) + sp.Rational(w))
            expr = sp.Piecewise((H, (t > symbol) & (t < symbol + self.number(w))), (1, True))
            return Term(expr, lambda s: h if left < s < right else 1.0, (left, right), (), (w,), params)
        symbol, params = self.parameter(c if which == 0 else 1 / c)
        if which == 1:
            c = float(1 / sp.Rational(1 / c))
        expr = sp.Piecewise((H, t < symbol if which == 0 else symbol * t < 1), (1, True))
        return Term(expr, lambda s: h if s < c else 1.0, (c,), (), (1e-3 * self.T,), params)

    # ------------------------------------------------------------ coefficients

    def positive(self, features=None, largest=1e7):
        count = self.rng.integers(0, 3) if features is None else features
        scale = self.between(0.2, 3)
        parts = [self.smooth(), *(self.feature(largest).times(self.number(self.between(0.1, 2))) for _ in range(count))]
        return reduce(Term.__add__, parts).times(self.number(scale))

    def rate(self):
        """A contraction: narrow features may take log alpha by some units, wide ones are small."""
        rate = 1 / self.T
        term = self.smooth().times(self.number(self.between(0.2, 2)))
        if self.rng.random() < 0.6:
            term = term + self.feature(largest=30).times(self.number(self.between(0.1, 1)))
        return term.times(self.number(-rate))


def elementwise(seed):
    """An SDE with its terms a, b, q, P0 and T."""
    random = Random(seed)
    a, q = random.rate(), random.positive()
    b = random.positive(largest=1e4).times(random.number(random.between(-2, 2))) if random.rng.random() < 0.6 else None
    P0 = float(random.rng.choice([0.0, 0.0, 0.04, 1.0]))
    q = q.times(random.number(10 ** random.between(-2, 2) / random.T))
    if b is not None:
        b = b.times(random.number(1 / random.T))
    params = {**a.params, **q.params, **(b.params if b else {})}
    f = a.expr * x + (b.expr if b else 0)
    sde = lambda: SDE(f, sp.sqrt(q.expr), T=random.T, P0=P0, params=params)  # noqa: E731
    return random, sde, a, b or Term(sp.Integer(0), lambda s: 0.0), q, P0


def coupled(seed):
    """A coupled SDE of two components with its terms: F rows, b and the entries of g."""
    random = Random(seed)
    rng, rate = random.rng, 1 / random.T
    one, two, turn = random.rate(), random.rate(), random.smooth().times(random.number(rate * random.between(-2, 2)))
    if rng.random() < 0.5:
        turn = turn + random.feature(largest=10).times(random.number(rate))
    level = random.smooth().times(random.number(rate))
    g1, g2 = (random.positive(largest=1e3).times(random.number(math.sqrt(rate))) for _ in range(2))
    mixed = random.number(random.between(-0.5, 0.5))
    params = {k: v for term in (one, two, turn, level, g1, g2) for k, v in term.params.items()}
    u, v = state("u v")
    f = [one.expr * u + turn.expr * v + level.expr, -turn.expr * u + two.expr * v]
    g = [[g1.expr, mixed * g2.expr], [0, g2.expr]]
    sde = lambda: SDE(f, g, T=random.T, params=params)  # noqa: E731

    def functions(s):
        c, h1, h2 = turn.value(s), g1.value(s), g2.value(s)
        G = np.array([[h1, float(mixed) * h2], [0.0, h2]])
        return np.array([[one.value(s), c], [-c, two.value(s)]]), np.array([level.value(s), 0.0]), G @ G.T

    return random, sde, (one, two, turn, level, g1, g2), functions


def stops(terms, T):
    """The break points of all terms, and times around their spikes in geometric progression."""
    found = {0.0, T}
    for term in terms:
        found.update(s for s in term.breaks if 0 < s < T)
        for centre, width in term.spikes:
            distances = [0.0, *(width * 0.5 * 3.0**k for k in range(40))]
            found.update(s for d in distances for s in (centre - d, centre + d) if 0 < s < T)
    return sorted(found)


def integrate(right, y, terms, T, times):
    """y' = right(s, y) from 0 on, at the given times, restarted at each stop; and the largest |y| so far."""
    found, largest, reached = {}, np.abs(y), {}
    edges = sorted({*stops(terms, T), *times})
    for left, end in pairwise(edges):
        length = end - left
        if length <= 4e-16 * end:
            y = y + length * right(0.5 * (left + end), y)
        else:
            # Inside the open interval: a stage at its end would see the next branch.
            inside = lambda s, y, l=left, e=end: right(min(max(s, np.nextafter(l, e)), np.nextafter(e, l)), y)  # noqa: E731
            small = 1e-15 * (np.abs(y) + length * np.abs(inside(0.5 * (left + end), y))) + 1e-30
            solved = solve_ivp(inside, (left, end), y, "DOP853", rtol=3e-14, atol=small)
            assert solved.success
            y = solved.y[:, -1]
        largest = np.maximum(largest, np.abs(y))
        found[end], reached[end] = y, largest
    return [found[s] for s in times], [reached[s] for s in times]
