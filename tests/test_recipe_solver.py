"""What docs/architecture.rst says under "To add", done as a user would: from the public names alone."""

from dataclasses import dataclass

import pytest
import torch

import sdeflow
from sdeflow.solvers import Exponential, Heun, Solver, available

double = torch.float64


@dataclass(frozen=True)
class Ralston(Solver):
    """Ralston's method of order 2 in the clock's variable: a second slope after 2/3 of the step, of weight 3/4."""

    kinds = ("ode",)
    needs_kernel = False
    adaptive = False
    calls_per_step = 2

    def solve(self, problem, y, steps, rtol, atol):
        for k, begin, end in problem.steps(problem.start(y, steps, order=2)):
            h = end - begin
            first = problem.drift(begin, y, h)
            second = problem.drift(begin + 2 / 3 * h, y + 2 / 3 * first, h)
            y = y + 0.25 * first + 0.75 * second
            problem.observe(k, float(problem.time(end)[0]), y)
        return problem.finish(y)


@dataclass(frozen=True)
class EulerInU(Solver):
    """Euler's method for the flow from the kernel itself: du/dt = a u - ½ g gᵀ s, in steps of t."""

    kinds = ("ode",)
    needs_kernel = True
    adaptive = False
    calls_per_step = 1
    default_grid = "log_snr"

    def solve(self, problem, y, steps, rtol, atol):
        problem.start(y, steps)
        u, times = y.reshape(-1, *problem.event), problem.times(steps)
        for k in range(steps):
            t = torch.tensor(times[k], dtype=double)
            a, _, q = problem.kernel.equation(u, t)
            u = u + (times[k + 1] - times[k]) * (a(u) - q.scaled(0.5)(problem.score(u, t)))
            problem.observe(k + 1, float(times[k + 1]), u)
        return problem.finish(u.flatten(1))


def mixture(sde):
    return sdeflow.scores.GaussianMixture(sde, [[-1.0, 0.0], [1.0, 0.5]], [0.05, 0.1])


def flow():
    sde = sdeflow.catalog.VP()
    return sde.flow_ode(mixture(sde))


@pytest.mark.parametrize(("solver", "order"), [(Ralston(), 2), (EulerInU(), 1)], ids=["Ralston", "EulerInU"])
def test_a_solver_of_ones_own_has_its_order(solver, order):
    bound = flow()
    z = torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=double)
    truth = bound.decode(z, Exponential(4), steps=800)
    errors = [float((bound.decode(z, solver, steps=n) - truth).norm()) for n in (100, 200, 400)]
    rates = [errors[0] / errors[1], errors[1] / errors[2]]
    assert all(2 ** (order - 0.3) < rate < 2 ** (order + 0.5) for rate in rates), rates


@pytest.mark.parametrize("solver", [Ralston(), EulerInU()], ids=["Ralston", "EulerInU"])
def test_a_solver_of_ones_own_serves_in_every_call(solver):
    bound, seen, calls = flow(), [], []
    plain = bound.sample((5, 2), solver, steps=12, seed=1)
    states, times = bound.sample((5, 2), solver, steps=12, seed=1, trajectory=True)
    assert states.shape == (13, 5, 2) and torch.equal(states[-1], plain)
    assert bool((times.diff() < 0).all()) and times[0] == bound.model.T and times[-1] == bound.model.cutoff
    bound.sample((5, 2), solver, steps=12, seed=1, callback=lambda step, t, x: seen.append((step, t)))
    assert [step for step, _ in seen] == list(range(1, 13))
    torch.testing.assert_close(bound.sample((5, 2), solver, steps=12, seed=1, chunk=2), plain)
    back = bound.decode(bound.encode(plain.double(), solver, steps=400), solver, steps=400)
    torch.testing.assert_close(back, plain.double(), rtol=0.1, atol=0.1)

    def score(x, t):
        calls.append(t)
        return -x

    prior = sdeflow.Gaussian(0.0, 1.0)
    sdeflow.catalog.VP().flow_ode(score, prior=prior).sample((3, 2), solver, steps=7)
    assert len(calls) == 7 * solver.calls_per_step
    with pytest.raises(ValueError, match=f"take {7 * solver.calls_per_step} calls, over max_calls=5"):
        bound.sample((3, 2), solver, steps=7, max_calls=5)


@pytest.mark.parametrize("solver", [Ralston(), EulerInU()], ids=["Ralston", "EulerInU"])
def test_a_score_that_is_not_finite_is_told_with_its_sample_and_time(solver):
    def score(x, t):
        out = -x
        out[3] = torch.where(t[3] < 0.5, torch.nan, out[3])
        return out

    bound = sdeflow.catalog.VP().flow_ode(score, prior=sdeflow.Gaussian(0.0, 1.0))
    with pytest.raises(sdeflow.errors.NonFiniteStateError) as caught:
        bound.sample((6, 2), solver, steps=20, seed=0)
    assert caught.value.bad_rows == [3] and 0 < caught.value.t < 0.5


def test_what_does_not_fit_is_refused_from_the_attributes():
    sde = sdeflow.catalog.VP()
    with pytest.raises(ValueError, match=r"Ralston\(\) does not solve a reverse-time SDE; those that do: .*euler"):
        sde.reverse(mixture(sde)).sample((2, 2), Ralston(), steps=3)
    with pytest.raises(ValueError, match=r"Ralston\(\) takes fixed steps"):
        flow().sample((2, 2), Ralston())
    with pytest.raises(ValueError, match=r"Ralston\(\) does not integrate the divergence; those that do: .*rk4"):
        flow().log_prob(torch.zeros(2, 2), solver=Ralston(), steps=3)
    general = sdeflow.SDE(sdeflow.x - sdeflow.x**3, 1)
    bound = general.flow_ode(lambda x, t: -x, prior=sdeflow.Gaussian(0.0, 1.0))
    assert bool(torch.isfinite(bound.sample((2, 2), Ralston(), steps=50, seed=0)).all())
    with pytest.raises(ValueError, match=r"EulerInU\(\) needs a Gaussian kernel.*those that do not: .*euler"):
        bound.sample((2, 2), EulerInU(), steps=3)


REQUIRED = {"kinds": ("ode",), "needs_kernel": False, "adaptive": False, "calls_per_step": 1, "solve": Ralston.solve}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_solver_that_leaves_something_out_cannot_be_made(name):
    assert type("Whole", (Solver,), REQUIRED)().kinds == ("ode",)
    part = type("Part", (Solver,), {key: value for key, value in REQUIRED.items() if key != name})
    with pytest.raises(TypeError, match=name):
        part()


@pytest.mark.parametrize("kinds", ["ode", (), ("flow",), ["ode"], None])
def test_kinds_are_checked_when_the_class_is_defined(kinds):
    with pytest.raises(ValueError, match=r'Mine.kinds must be a tuple of "sde" and "ode"'):
        type("Mine", (Solver,), {**REQUIRED, "kinds": kinds})


def test_an_object_with_the_attributes_alone_is_told_of_the_base_class():
    alone = type("Alone", (), REQUIRED)()
    with pytest.raises(ValueError, match=r"a subclass of sdeflow.solvers.Solver"):
        flow().sample((2, 2), alone, steps=3)
    with pytest.raises(ValueError, match="not the class itself"):
        flow().sample((2, 2), Ralston, steps=3)


def test_a_coupled_state_is_refused_by_what_is_elementwise_before_any_call():
    def score(x, t):
        raise AssertionError("a call was made")

    u, v = sdeflow.state("u v")
    sde = sdeflow.SDE([v, -u - v], [0, 1], T=1)
    bound = sde.flow_ode(score, prior=sdeflow.Gaussian(0.0, 1.0))
    names = available(sde)["ode"]
    assert "edm" not in names and "heun" in names
    for solver in ("edm", sdeflow.solvers.StochasticHeun(), Exponential(prediction="velocity")):
        with pytest.raises(ValueError, match=r"elementwise SDEs, not of coupled states; those of both: .*heun"):
            bound.sample((2, 2), solver, steps=3)
    restart = sdeflow.solvers.Restart(sdeflow.solvers.StochasticHeun(), [(0.1, 0.5, 1, 1)])
    with pytest.raises(ValueError, match="elementwise SDEs, not of coupled states"):
        sde.reverse(score, prior=sdeflow.Gaussian(0.0, 1.0)).sample((2, 2), restart, steps=9)
    assert not sdeflow.solvers.Restart(Heun(), [(0.1, 0.5, 1, 1)]).elementwise
