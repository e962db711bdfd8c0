"""Every declared SDE is sampled right by default and on every grid: by exact propagation of Gaussian data."""

import math
import os
import warnings
from contextlib import contextmanager

import pytest
import sympy as sp
import torch

import sdeflow.solving.run
from sdeflow import SDE, catalog, errors, t, x
from sdeflow.numerics.noise import NoiseStream
from sdeflow.solvers import AnnealedLangevin, Exponential, Torchdiffeq, Torchsde, make_clock

double = torch.float64
R = sp.Rational
CORRELATED = torch.tensor([[0.5, 0.45], [0.45, 0.5]], dtype=double)
LONG = bool(os.environ.get("SDEFLOW_LONG"))


def pieces(*values):
    """A function of t with these values before these times."""
    return sp.Piecewise(*((value, True if until is None else t < until) for value, until in values))


def each(f, g, *values, **options):
    c = sp.Symbol("c", positive=True)
    return SDE(f(c), g(c), params={"c": torch.tensor(values, dtype=double)}, **options)


def pair(g, **options):
    return SDE(lambda a, b, t: [b, -a - 2 * b], [0, g], state=("a", "b"), P0=[1e-3, 1], **options)


# Every kind of end, of pause and of schedule.
ENDS = {
    "EDM with a floor": lambda: SDE(0, sp.sqrt(2 * t), T=80, P0=4e-6),
    "VP from beta = 0": lambda: SDE(-10 * t * x, sp.sqrt(20 * t), P0=1e-4),
    "c sqrt(2t)": lambda: SDE(0, 5 * sp.sqrt(2 * t), P0=1e-4),
    "per coordinate": lambda: each(lambda c: 0, lambda c: c * sp.sqrt(2 * t), 1.0, 10.0, P0=1e-4),
    "a drift at g(0) = 0": lambda: SDE(-x, t, P0=1e-4, T=2),
    "g(0) = 0 without P0": lambda: SDE(-x, 3 * t**2),
    "g(0) infinite": lambda: SDE(-x / sp.sqrt(t), t ** R(-1, 4), P0=1e-4),
    "g(0) infinite without P0": lambda: SDE(-x / sp.sqrt(t), t ** R(-1, 4)),
    "a pause": lambda: SDE(-x, pieces((1, 0.3), (0, 0.6), (2, None)), P0=1e-3),
    "a pause, no P0": lambda: SDE(-x, pieces((1, 0.3), (0, 0.6), (2, None))),
    "a pause at the data": lambda: SDE(-x, pieces((0, 0.3), (2, None)), P0=1e-3),
    "a pause at T": lambda: SDE(-x, pieces((2, 0.7), (0, None)), P0=1e-3),
    "nearly a pause": lambda: SDE(-x, pieces((1, 0.3), (R(1, 10**4), 0.6), (2, None)), P0=1e-3),
    "nearly a pause at the data": lambda: SDE(-x, pieces((R(1, 10**5), 0.3), (2, None)), P0=1e-3),
    "a lull": lambda: SDE(-x, 2 * (t - R(1, 2)) ** 4 + R(1, 10**6)),
    "a pulse": lambda: SDE(-x / 2, pieces((0, 0.3), (5, 0.4), (0, None)), P0=1e-3),
    "a smooth pulse": lambda: SDE(-x / 2, 3 * sp.exp(-(((t - 0.5) / 0.05) ** 2)), P0=1e-3),
    "steep": lambda: SDE(0, sp.sqrt(2 * sp.log(10**5)) * R(1, 1000) * 10 ** (5 * t), P0=1e-6),
    "singular T": lambda: SDE(-x / (1 - t), 1 / sp.sqrt(1 - t), T=0.9999, P0=1e-3),
    "flow matching to 0.99999": lambda: catalog.FlowMatching(T=0.99999),
    "T = 1000": lambda: SDE(-x / 500, sp.sqrt(t) / 250, T=1000, P0=1e-4),
    "an offset": lambda: SDE(3 - x, t, P0=1e-4, T=2),
    "pauses per coordinate": lambda: each(
        lambda c: -x, lambda c: sp.Piecewise((2, t < c), (0, t < 0.6), (2, True)), 0.2, 0.4, P0=1e-3
    ),
    "nearly without noise": lambda: SDE(-x, pieces((1, R(1, 4)), (R(1, 10**6), R(3, 4)), (2, None))),
    "a pulse of the drift": lambda: SDE(-x * (1 + 100 * sp.exp(-(((t - 0.5) / 0.01) ** 2))), 1),
    "T = 1e6": lambda: SDE(-x, 1, T=1e6),
    "T = 1e6, an offset": lambda: SDE(5 - x, 1, T=1e6, P0=1e-4),
    "stiff": lambda: SDE(-(10**6) * x, 1),
    "coupled": lambda: pair(2 * sp.sqrt(t), T=3),
    "coupled, a pause": lambda: pair(pieces((2, 1), (0, R(3, 2)), (2, None)), T=3),
    "coupled, nearly a pause": lambda: pair(pieces((2, 1), (R(1, 10**4), R(3, 2)), (2, None)), T=3),
    "undamped": lambda: SDE(lambda a, b, t: [b, -9 * a], [0, 1], state=("a", "b"), P0=[1e-3, 1], T=3),
    "weakly driven": lambda: SDE(
        lambda a, b, t: [b, -4 * a - b / 5], [0, R(3, 10)], state=("a", "b"), P0=[1e-3, 1], T=5
    ),
    "weak and free": lambda: SDE(lambda a, b, t: [b, -a], [0, R(1, 10)], state=("a", "b"), P0=[1e-3, 1], T=3),
    "coupled, jumps": lambda: pair(pieces((2, 1), (R(1, 2), R(3, 2)), (2, None)), T=3),
}  # fmt: skip
SHORT = [
    "EDM with a floor", "per coordinate", "g(0) infinite", "a pause at T", "T = 1e6", "coupled, jumps",
    "coupled, a pause", "weakly driven",
]  # fmt: skip
NAMES = list(ENDS) if LONG else SHORT


class Gaussians:
    """An SDE with the exact score of Gaussian data in two dimensions, its marginals, and its law at T as prior."""

    def __init__(self, name):
        self.sde = ENDS[name]()
        self.event = (2, 1) if self.sde.declaration.coupled else (2,)
        self.data = torch.diag(torch.tensor([0.5, 0.0], dtype=double)) if len(self.event) > 1 else CORRELATED

    def law(self, time):
        """Mean and covariance at a time."""
        one = torch.eye(2, dtype=double).reshape(2, *self.event)
        path = self.sde.kernel.path(one, torch.as_tensor(time, dtype=double))
        alpha, sigma = (part(one).reshape(2, 2).mT for part in (path.alpha, path.sigma))
        return path.offset.expand(1, *self.event).reshape(2), alpha @ self.data @ alpha.mT + sigma @ sigma.mT

    def score(self, state, time):
        mean, covariance = self.law(float(time[0]))
        return -torch.linalg.solve(covariance, (state.flatten(1) - mean).mT).mT.reshape(state.shape)

    def sample(self, shape, seed, dtype, device):
        mean, covariance = self.law(self.sde.T)
        normal = torch.randn(shape[0], 2, dtype=double, generator=torch.Generator().manual_seed(seed))
        return (mean + normal @ torch.linalg.cholesky(covariance).mT).reshape(shape).to(dtype)

    def log_prob(self, state, time=None):
        mean, covariance = self.law(self.sde.T if time is None else time)
        return torch.distributions.MultivariateNormal(mean, covariance).log_prob(state.flatten(1))


class Rows(NoiseStream):
    """Starts and noise as unit vectors: row 0 gets none, the next two a start each, then two rows for each draw."""

    seed = 0

    def __init__(self, draws):
        self.draws, self.drawn = draws, 0

    def sample(self, shape, seed, dtype, device):
        rows = torch.zeros(3 + 2 * self.draws, 2, dtype=dtype)
        rows[1:3] = torch.eye(2, dtype=dtype)
        return rows.reshape(-1, *shape[1:])

    def normal(self, shape, dtype=None, device="cpu"):
        self.drawn += 1
        out = torch.zeros(shape, dtype=dtype)
        rows = out[1 + 2 * self.drawn : 3 + 2 * self.drawn].flatten(1)
        if len(rows):
            out[1 + 2 * self.drawn : 3 + 2 * self.drawn] = torch.eye(2, dtype=dtype)[:, : rows.shape[1]].reshape(
                2, *shape[1:]
            )
        return out


def error(gaussians, kind, monkeypatch, **options):
    """Of the mean and the covariance that a sampler ends with, in units of the standard deviations."""
    sde = gaussians.sde

    def run(rows):
        monkeypatch.setattr(sdeflow.solving.run, "NoiseStream", lambda *given: rows)
        equation = (sde.reverse if kind == "sde" else sde.flow_ode)(gaussians.score, prior=rows)
        return equation.sample((2, *gaussians.event), seed=0, dtype=double, **options).flatten(1)

    counted = Rows(0)
    out = run(counted)
    out = run(Rows(counted.drawn)) if counted.drawn else out
    zero, moved = out[0], out[1:] - out[0]
    (mean, start), (true_mean, truth) = gaussians.law(sde.T), gaussians.law(sde.cutoff)
    found = moved[:2].mT @ start @ moved[:2] + moved[2:].mT @ moved[2:]
    size = truth.diag().sqrt()
    of_mean = (zero + moved[:2].mT @ mean - true_mean) / size
    return max(float(((found - truth) / torch.outer(size, size)).abs().max()), float(of_mean.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_right_by_default(name, monkeypatch):
    gaussians = Gaussians(name)
    assert error(gaussians, "sde", monkeypatch) < 0.02
    assert error(gaussians, "ode", monkeypatch) < 0.01
    assert error(gaussians, "ode", monkeypatch, steps=50) < 0.02


ADAPTIVE = ["nearly without noise", "a pause", "a lull", "a pulse of the drift", "T = 1e6", "pauses per coordinate",
            "coupled, a pause"]  # fmt: skip


@pytest.mark.parametrize("name", list(ENDS) if LONG else ADAPTIVE)
def test_adaptive_flows_reach_their_tolerance_and_in_few_calls(name):
    gaussians, calls = Gaussians(name), []

    def score(state, time):
        calls.append(float(time[0]))
        return gaussians.score(state, time)

    sde, size = gaussians.sde, gaussians.law(gaussians.sde.cutoff)[1].diag().sqrt().reshape(gaussians.event)
    flow, watched = (sde.flow_ode(s, prior=gaussians) for s in (gaussians.score, score))
    z = gaussians.sample((8, *gaussians.event), 0, double, None)
    found = watched.decode(z)
    assert len(calls) < (320 if name in ("undamped", "weakly driven") else 200)  # those turn
    assert sde.cutoff <= min(calls) <= max(calls) <= sde.T
    assert float(((found - flow.decode(z, Exponential(3), steps=200)) / size).abs().max()) < 5e-4


def test_trajectories_and_calls_of_adaptive_flows_pass_through_break_points():
    gaussians = Gaussians("pauses per coordinate")
    flow = gaussians.sde.flow_ode(gaussians.score, prior=gaussians)
    z = gaussians.sample((2, 2), 0, double, None)
    states, times = flow.decode(z, trajectory=True)
    assert bool((times.diff() < 0).all())
    for time in (0.2, 0.4, 0.6):
        assert float((times - time).abs().min()) < 1e-9
    torch.testing.assert_close(states[-1], flow.decode(z))
    gaussians = Gaussians("a pause")
    flow = gaussians.sde.flow_ode(gaussians.score, prior=gaussians)
    states, times = flow.decode(z, trajectory=True)
    torch.testing.assert_close(states[0], z)
    middle = len(times) // 2
    there = gaussians.law(float(times[middle]))[1].diag().sqrt()
    assert float((flow.encode(states[-1]) - z).abs().max()) < 1e-3
    assert bool((states[middle].abs() < 6 * there).all())


def test_a_grid_of_many_scales_has_the_break_points_among_its_times():
    for name, ends in (("coupled, a pause", (1.0, 1.5)), ("pauses per coordinate", (0.2, 0.4, 0.6))):
        kernel = ENDS[name]().kernel
        times = make_clock(None, kernel, kernel.cutoff, kernel.T).times(20)
        assert len(times) == 21
        assert (times[1:] > times[:-1]).all()
        assert set(ends) <= set(times.tolist())
        few = make_clock(None, kernel, kernel.cutoff, kernel.T).times(2)
        assert len(few) == 3


GRIDS = ("angle", "log_snr", "karras", "t")
# What a grid may refuse, at some numbers of steps: never a wrong number. See docs/times.rst.
SINGULAR = ("g(0) infinite", "g(0) infinite without P0")
NEVER_PLAIN = ("T = 1e6", "T = 1e6, an offset", "stiff", "a pulse of the drift")
NEVER_IN_T = (*SINGULAR, "T = 1e6", "T = 1e6, an offset", "stiff")
SELDOM_IN_T = ("EDM with a floor", "a pulse", "a pause at the data", "nearly a pause at the data", "a pause at T",
               "pauses per coordinate")  # fmt: skip
NOT_PLAIN_IN_T = ("coupled, a pause", "coupled, nearly a pause", "coupled, jumps")
TURNING = ("undamped", "weakly driven", "weak and free")  # where Euler moves outwards, as without a score
CASES = [(name, grid) for name in NAMES for grid in GRIDS]


def refusable(name, grid, plain):
    return (plain and name in NEVER_PLAIN) or (
        grid == "t" and name in (*NEVER_IN_T, *SELDOM_IN_T, *(NOT_PLAIN_IN_T if plain else ()))
    )


TOLD = (ValueError, errors.CoarseStepsWarning)  # that a grid cannot serve, or hardly


@contextmanager
def told(match):
    with warnings.catch_warnings(), pytest.raises(TOLD, match=match):
        warnings.simplefilter("error", errors.CoarseStepsWarning)
        yield


def error_or_refusal(name, gaussians, kind, monkeypatch, grid, **options):
    """The error; None where the grid refuses what it may refuse, or warns of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", errors.CoarseStepsWarning)
            return error(gaussians, kind, monkeypatch, grid=grid, **options)
    except TOLD as refusal:
        assert f'grid="{grid}"' in str(refusal)
        assert refusable(name, grid, "solver" in options), str(refusal)
        return None


@pytest.mark.parametrize(("name", "grid"), CASES if LONG else [("EDM with a floor", "angle"), ("a pause", "karras")])
def test_samples_are_right_on_every_grid(name, grid, monkeypatch):
    gaussians = Gaussians(name)
    for kind, bound, options in (("sde", 0.05, {}), ("ode", 0.05, {"steps": 60}), ("ode", 0.03, {})):
        if name in SINGULAR and grid == "t" and kind == "ode" and not options:
            continue  # an adaptive method asks for the drift at t = 0, where it is infinite
        found = error_or_refusal(name, gaussians, kind, monkeypatch, grid, **options)
        assert found is None or found < bound


PLAIN = [("coupled, a pause", "log_snr"), ("pauses per coordinate", "angle"), ("g(0) = 0 without P0", "angle")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "grid"), [case for case in CASES if case[0] not in TURNING] if LONG else PLAIN)
def test_plain_methods_converge_on_every_grid(name, grid, monkeypatch):
    gaussians = Gaussians(name)
    for kind, solver, numbers, bound in (("ode", "heun", (40, 120), 0.06), ("sde", "euler", (100, 300), 0.04)):
        few, many = (
            error_or_refusal(name, gaussians, kind, monkeypatch, grid, solver=solver, steps=n) for n in numbers
        )
        assert many is None or many < bound
        assert few is None or many is None or many < 0.7 * few + 1e-3


@pytest.mark.parametrize("solver", ["midpoint", "rk4"])
def test_methods_of_others_have_nodes_at_the_break_points(solver, monkeypatch):
    gaussians = Gaussians("a pulse")
    assert error(gaussians, "ode", monkeypatch, grid="log_snr", solver=Torchdiffeq(solver), steps=60) < 0.005


def test_grids_that_cannot_serve_are_refused_and_say_what_serves():
    """However many steps, or few, are asked for; your own times are always taken."""
    at, z = {}, torch.zeros(1, 2)
    for name in ("g(0) infinite", "stiff", "EDM with a floor", "a pulse of the drift"):
        sde = ENDS[name]()
        at[name] = sde.flow_ode(lambda x, t: -x, prior=sde.prior)
    for name in ("g(0) infinite", "stiff"):
        for solver, steps in ((None, 30), ("heun", 300)):
            with told('"angle" or "log_snr"'):
                at[name].decode(z, solver, steps=steps, grid="t")
    with told(r"from t = 0 to 0\.8 alone takes 0\.67 of the 1\.57 rad"):
        at["EDM with a floor"].decode(z, "heun", steps=100, grid="t")
    at["EDM with a floor"].decode(z, "heun", grid=torch.linspace(0, 80, 101))
    for grid in GRIDS:
        with told(f'grid="{grid}".*the default solver'):
            at["a pulse of the drift"].decode(z, "heun", steps=100, grid=grid)


# Solver, steps, and whether that is too few: a warning, and a variance that is off by more than 30 %, go together.
TURNS = {
    "undamped": [("ode", "euler", 200, True), ("ode", "heun", 50, True), ("ode", "heun", 100, False),
                 ("sde", Torchsde("heun"), 50, True), ("ode", "rk4", 50, False)],
    "weakly driven": [("ode", Torchdiffeq("euler"), 100, True), ("sde", "euler", 100, True),
                      ("sde", Torchsde("heun"), 100, False)],
    "weak and free": [("ode", "euler", 100, False), ("sde", "euler", 100, False)],
    "critically damped": [("ode", "euler", 100, True), ("ode", "heun", 50, False), ("sde", "euler", 50, False)],
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_plain_steps_too_long_for_a_turning_state_are_warned_of(name, monkeypatch):
    monkeypatch.setitem(ENDS, "critically damped", catalog.CriticallyDampedLangevin)
    gaussians = Gaussians(name)
    for kind, solver, steps, coarse in TURNS[name]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", errors.CoarseStepsWarning)
            found = error(gaussians, kind, monkeypatch, solver=solver, steps=steps)
        told = [str(entry.message) for entry in caught if entry.category is errors.CoarseStepsWarning]
        assert bool(told) == (found > 0.3) == coarse, (kind, solver, steps, found, told)
        assert all('grid="log_snr"' in message and "turns" in message for message in told)


def test_what_is_said_of_a_turning_state_is_its_error(monkeypatch):
    """Euler's flow of an oscillator, whose amplitude grows by exp(½ Σ (h ω)²): ω = 3, T = 3."""
    oscillator = SDE(lambda a, b, t: [3 * b, -3 * a], [0, R(1, 10)], state=("a", "b"), P0=[R(1, 2), 1], T=3)
    monkeypatch.setitem(ENDS, "oscillator", lambda: oscillator)
    gaussians = Gaussians("oscillator")
    for steps in (50, 100):
        with pytest.warns(errors.CoarseStepsWarning, match="turns") as caught:
            found = error(gaussians, "ode", monkeypatch, solver="euler", steps=steps, grid="t")
        said = float(str(caught[0].message).split("about ")[1].split()[0])
        assert abs(said / (0.5 * 81 / steps) - 1.0) < 0.1
        assert abs(0.5 * math.log1p(found) / said - 1.0) < 0.1


@pytest.mark.parametrize("name", NAMES if LONG else ["a pause at T", "a pause at the data", "coupled, a pause"])
def test_the_pilot_grid_is_right_too(name):
    """A kink of the grid beside a break point, not at it, left rk4 off by 0.16 at any number of steps."""
    gaussians = Gaussians(name)
    flow = gaussians.sde.flow_ode(gaussians.score, prior=gaussians)
    z = gaussians.sample((16, *gaussians.event), 0, double, None)
    truth = flow.decode(z, Exponential(3), steps=200)
    assert float((flow.decode(z, Exponential(3), steps=60, grid="pilot") - truth).abs().max()) < 0.02
    if name in NEVER_PLAIN:
        with told("too long for this solver"):
            flow.decode(z, "rk4", steps=60, grid="pilot")
        return
    error = float((flow.decode(z, "rk4", steps=60, grid="pilot") - truth).abs().max())
    assert error < (0.005 if name in ("a pause at the data", "coupled, a pause") else 0.1)


MODES = {
    "by default": ({}, 3e-3),
    "to a tolerance": ({"atol": 0.02}, 0.02),
    "in steps": ({"steps": 50}, 0.02),
    "in steps of the angle": ({"steps": 60, "grid": "angle"}, 0.1),
    "dopri5": ({"rtol": 1e-6, "atol": 1e-6}, 0.01),
    "rk4": ({"solver": Torchdiffeq("rk4"), "steps": 80}, 0.15),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES if LONG else ["EDM with a floor", "nearly a pause", "coupled, a pause"])
def test_log_prob_is_right_in_every_mode(name):
    gaussians = Gaussians(name)
    flow = gaussians.sde.flow_ode(gaussians.score, prior=gaussians)
    points = torch.tensor([[0.5, 0.3], [-0.2, 0.1], [1.0, 0.9]], dtype=double)
    truth = gaussians.log_prob(points, gaussians.sde.cutoff)
    for mode, (options, bound) in MODES.items():
        if mode == "rk4" and name in NEVER_PLAIN:
            with told("too long for this solver"):
                flow.log_prob(points.reshape(-1, *gaussians.event), **options)
            continue
        found = flow.log_prob(points.reshape(-1, *gaussians.event), **options)
        assert float((found - truth).abs().max()) < bound, mode


def test_the_gradient_of_log_prob_where_the_noise_begins_at_nothing():
    gaussians = Gaussians("EDM with a floor")
    flow = gaussians.sde.flow_ode(gaussians.score, prior=gaussians)
    points = torch.tensor([[0.5, 0.3], [-0.2, 0.1]], dtype=double, requires_grad=True)
    (found,) = torch.autograd.grad(flow.log_prob(points, steps=60).sum(), points)
    truth = gaussians.score(points.detach(), torch.zeros(2, dtype=double))
    assert float((found - truth).abs().max()) < 0.02 * float(truth.abs().max())
    with pytest.raises(ValueError, match="stands still"):
        flow.log_prob(points, steps=60, gradient="adjoint")


def test_propagation_finds_planted_mistakes(monkeypatch):
    """A score 3 % too large, noise 3 % too large, and a clock that skips the pause."""
    gaussians = Gaussians("a pause")
    right = gaussians.score
    gaussians.score = lambda state, time: 1.03 * right(state, time)
    assert error(gaussians, "ode", monkeypatch) > 0.02
    gaussians.score = right
    normal = Rows.normal
    monkeypatch.setattr(Rows, "normal", lambda *given, **options: 1.03 * normal(*given, **options))
    assert error(gaussians, "sde", monkeypatch) > 0.02
    monkeypatch.undo()
    sound = error(gaussians, "ode", monkeypatch, grid="angle", solver="heun", steps=200)
    gaussians = Gaussians("a pause")  # a kernel keeps its clocks
    monkeypatch.setattr("sdeflow.solvers.clock._OF_TIME", 1e-5)
    assert error(gaussians, "ode", monkeypatch, grid="angle", solver="heun", steps=200) > 10.0 * sound


@pytest.mark.parametrize(("scales", "steps", "excess"), [(300, 5, 0.14), (100, 5, 0.20), (300, 1, 1.08)])
def test_annealed_langevin_is_biased_as_the_guide_says(scales, steps, excess, monkeypatch):
    """The relative excess of the variance of Gaussian data, exactly; see docs/solvers.rst."""
    sde = catalog.VP()

    class Isotropic(Gaussians):
        def __init__(self):
            self.sde, self.event, self.data = sde, (2,), 0.25 * torch.eye(2, dtype=double)

    found = error(Isotropic(), "sde", monkeypatch, solver=AnnealedLangevin(steps), steps=scales, grid="log_snr")
    assert abs(found - excess) < 0.01
