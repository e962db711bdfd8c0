"""What ``solve`` returns: against counted calls, given times and the tensors of ``sample``; how options are named."""

import inspect
import re

import pytest
import torch
from torch import nn

import sdeflow
from sdeflow import Gaussian, Score, catalog
from sdeflow.dynamics import FlowODE, ReverseSDE
from sdeflow.errors import OptionError
from sdeflow.likelihood.options import BitsOptions, DataOptions, LogProbOptions
from sdeflow.solvers import Exponential, Heun, Restart, Torchsde, resolve
from sdeflow.solving.options import DrawOptions, NoiseOptions, SolveOptions, WayOptions

SDE = catalog.VP()
PRIOR = Gaussian(0.0, 1.0)
Z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))


class Counted(nn.Module):
    """A linear net of noise that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls, self.scale = 0, nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t):
        self.calls += 1
        return self.scale * x


def counted():
    net = Counted()
    return net, Score(net, SDE, predicts="noise", data_mean=0.0, data_std=1.0)


def found(kind, solver, **options):
    """A solution, and the calls that the network has counted."""
    net, score = counted()
    method = resolve(solver or "euler", kind)
    steps = {} if method.adaptive else {"steps": 12}
    tolerances = {"rtol": 0.1, "atol": 0.1} if method.adaptive or method.iterates else {}
    if kind == "sde":
        return SDE.reverse(score, PRIOR).solve((5, 2), solver, seed=0, **steps, **tolerances, **options), net.calls
    return SDE.flow_ode(score, PRIOR).solve(Z, solver, **steps, **tolerances, **options), net.calls


NAMES = [(kind, name) for kind, names in sdeflow.solvers.available(SDE).items() for name in (None, *names)]


@pytest.mark.parametrize(("kind", "solver"), NAMES)
def test_calls_are_those_of_the_network(kind, solver):
    solution, calls = found(kind, solver)
    assert solution.calls == calls > 0
    assert solver is None or solution.solver == resolve(solver, kind)


@pytest.mark.parametrize(
    "options",
    [
        {"denoise": True}, {"return_denoised": True}, {"trajectory": True, "return_denoised": True, "denoise": True},
        {"chunk": 2, "denoise": True}, {"chunk": 2, "trajectory": True, "return_denoised": True},
        {"threshold": (-1.0, 1.0)}, {"gradient": "backprop"},
    ],
)  # fmt: skip
def test_calls_beside_the_solver_count_too(options):
    solution, calls = found("ode", "heun", **options)
    assert solution.calls == calls
    beside = {"denoise": 1, "return_denoised": 1, "trajectory": 13}
    most = max((beside.get(name, 0) for name in options), default=0)
    chunks = 3 if "chunk" in options else 1
    assert calls == chunks * (24 + (most if "denoise" in options or "return_denoised" in options else 0))


def test_calls_of_an_input_with_a_gradient_count_the_check_of_its_reach():
    net, score = counted()
    solution = SDE.flow_ode(score, PRIOR).solve(Z.clone().requires_grad_(), "euler", 6)
    assert solution.calls == net.calls == 7 and solution.x.requires_grad


def test_calls_of_restarts_and_of_own_steps():
    for solver in (Restart(Heun(), [(0.1, 0.5, 2, 4)]), Torchsde("euler", adaptive=True)):
        net, score = counted()
        steps = {"steps": 40} if isinstance(solver, Restart) else {"rtol": 0.1, "atol": 0.1}
        solution = SDE.reverse(score, PRIOR).solve((5, 2), solver, seed=0, **steps)
        assert solution.calls == net.calls > 0 and solution.solver == solver


def test_a_measured_grid_does_not_count():
    net, score = counted()
    flow = SDE.flow_ode(score, PRIOR)
    measured = flow.pilot((2,)).calls
    solution = flow.solve((5, 2), Exponential(), 10, grid="pilot", seed=0)
    assert solution.calls == 10 == net.calls - measured and solution.grid == "pilot"


def test_what_was_not_asked_for_is_none():
    plain, _ = found("ode", "euler")
    assert plain.states is plain.times is plain.denoised is None
    assert plain.grid == "angle" and plain.seconds > 0
    one, _ = found("sde", "euler", return_denoised=True)
    assert one.states is one.times is None and one.denoised.shape == (5, 2)


@pytest.mark.parametrize("encode", [False, True])
def test_states_and_times_begin_and_end_where_the_solve_does(encode):
    flow = SDE.flow_ode(counted()[1], PRIOR)
    times = torch.tensor([SDE.cutoff, 0.1, 0.4, 1.0], dtype=torch.float64)
    solution = flow.solve(Z, "euler", grid=times, encode=encode, trajectory=True)
    assert torch.equal(solution.times, times if encode else times.flip(0)) and torch.equal(solution.grid, times)
    assert torch.equal(solution.states[0], Z) and torch.equal(solution.states[-1], solution.x)
    way = flow.encode if encode else flow.decode
    assert torch.equal(way(Z, "euler", grid=times), solution.x) and not torch.equal(solution.x, Z)
    states, visited = way(Z, "euler", grid=times, trajectory=True)
    assert torch.equal(states, solution.states) and torch.equal(visited, solution.times)


def test_a_shape_means_draws_from_the_prior():
    _, score = counted()
    for equation in (SDE.flow_ode(score, PRIOR), SDE.reverse(score, PRIOR)):
        for shape in ((5, 2), torch.Size([5, 2]), [5, 2]):
            solution = equation.solve(shape, steps=8, seed=3, return_denoised=True)
            x, denoised = equation.sample((5, 2), steps=8, seed=3, return_denoised=True)
            assert torch.equal(solution.x, x) and torch.equal(solution.denoised, denoised)
    listed = SDE.flow_ode(score, PRIOR).solve(Z.tolist(), steps=8).x
    assert torch.equal(listed, SDE.flow_ode(score, PRIOR).solve(Z, steps=8).x)


def test_an_empty_batch_takes_no_calls():
    net, score = counted()
    solution = SDE.flow_ode(score, PRIOR).solve(Z[:0], "euler", 4, trajectory=True)
    assert solution.calls == net.calls == 0 and solution.states.shape == (5, 0, 2) and len(solution.times) == 5


def test_a_solution_is_readable():
    solution, _ = found("ode", "euler", trajectory=True)
    text = re.sub(r"in \S+ s", "in 1 s", repr(solution)).splitlines()
    assert text == [
        "Solution", "  x: (5, 2) in float32", "  states: (13, 5, 2) in float32, at 13 times from 1 to 3.984e-05",
        '  12 calls of the score in 1 s, by Euler() on grid "angle"',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("z", "options", "name"),
    [
        ((5, 2), {"encode": True}, "encode"), ((5, 2), {"gradient": "backprop"}, "gradient"), (Z, {"seed": 0}, "seed"),
        (Z, {"dtype": torch.float64}, "dtype"), (Z, {"device": "cpu"}, "device"),
        (Z, {"encode": True, "denoise": True}, "denoise"),
        (Z, {"encode": True, "return_denoised": True}, "return_denoised"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_for_a_solve_are_refused(z, options, name):
    _, score = counted()
    with pytest.raises(OptionError, match=f"^{name} means nothing for"):
        SDE.flow_ode(score, PRIOR).solve(z, steps=3, **options)


# ------------------------------------------------------------------ names of options

OF_LOG_PROB = {"full", *LogProbOptions.__annotations__}
OF_SOLVE = {"solver", "steps", "trajectory", *SolveOptions.__annotations__}
OF_STATES = {*OF_SOLVE, "denoise", "return_denoised"}
OF_DRAWS = {"seed", "dtype", "device", "support", "reject"}
SIGNATURES = {
    ReverseSDE.solve: {"shape", *OF_STATES, *OF_DRAWS, "noise"},
    ReverseSDE.sample: {"shape", *OF_STATES, *OF_DRAWS, "noise"},
    FlowODE.solve: {"z", *OF_STATES, *OF_DRAWS, "gradient", "encode"},
    FlowODE.sample: {"shape", *OF_STATES, *OF_DRAWS},
    FlowODE.decode: {"z", *OF_STATES, "gradient"},
    FlowODE.encode: {"x", *OF_SOLVE, "gradient"},
    FlowODE.interpolate: {"x_a", "x_b", "points", *OF_SOLVE, "gradient"} - {"trajectory"},
    FlowODE.round_trip_error: {"x", *OF_SOLVE, "gradient"} - {"trajectory"},
    FlowODE.log_prob: {"x", *OF_LOG_PROB},
    FlowODE.likelihood: {"x", *OF_LOG_PROB} - {"full"},
    FlowODE.data_log_prob: {"x", "samples", *OF_LOG_PROB},
    FlowODE.bits_per_dim: {
        "images", "levels", "low", "high", "samples", "dequantise", "draws", "importance", *OF_LOG_PROB,
    },
    ReverseSDE.elbo: {"x", "at", "draws", "times", "seed", "progress"},
    ReverseSDE.kl_bound: {"data", "score_of_data", "draws", "times", "seed", "progress"},
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_help_lists_every_option_and_no_other_name_is_taken(function):
    listed = inspect.signature(function).parameters
    assert set(listed) - {"self"} == SIGNATURES[function]
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in listed.values())
    first = next(name for name in listed if name != "self")
    with pytest.raises(
        OptionError, match=rf"^{function.__name__} has no option progres. Did you mean progress\? It ta"
    ):
        function(None, **{first: None, "progres": True})
    with pytest.raises(TypeError, match=r"has no option qqq. It takes .*progress"):
        function(None, **{first: None, "qqq": True})


@pytest.mark.parametrize(
    ("options", "base"),
    [
        (SolveOptions, None), (WayOptions, SolveOptions), (DrawOptions, SolveOptions), (NoiseOptions, DrawOptions),
        (LogProbOptions, None), (DataOptions, LogProbOptions), (BitsOptions, DataOptions),
    ],
)  # fmt: skip
def test_every_option_has_its_meaning_in_one_place(options, base):
    named = re.findall(r"^ {8}(\w+):", options.__doc__, re.M)
    assert sorted(named) == sorted(set(options.__annotations__) - set(getattr(base, "__annotations__", ())))


def test_the_likelihood_says_its_unit():
    _, score = counted()
    flow = SDE.flow_ode(score, PRIOR)
    info, same = flow.likelihood(Z, steps=8), flow.log_prob(Z, steps=8, full=True)
    assert torch.equal(info.value, same.value) and torch.equal(info.error, same.error) and info.unit == "nats"
    images = torch.tensor([[0, 3], [2, 1]])
    bits = flow.bits_per_dim(images, levels=4, low=-1.0, high=1.0, steps=8, seed=0, full=True)
    assert bits.unit == "bits per dimension"
