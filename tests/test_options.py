"""Every option of every public function changes the result, or stands here with the reason why it does not.

The table is compared with the signatures: a new option without an entry fails, and so does an entry without an option.
"""

import ast
import functools
import importlib
import inspect
import math
import re
import warnings
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from problems import ring
from torch import nn

import sdeflow
from sdeflow import SDE, Gaussian, Kernel, Score, catalog, fit, x
from sdeflow import t as time
from sdeflow.dynamics import FlowODE, ReverseSDE
from sdeflow.kernels.bridge import Bridge
from sdeflow.kernels.local import LocalKernel
from sdeflow.kernels.pearson import PearsonKernel
from sdeflow.kernels.reducible import PushForward, ReducibleKernel
from sdeflow.laws.boltzmann import BoltzmannLaw
from sdeflow.laws.fitted import FittedPrior
from sdeflow.laws.stationary import StationaryLaw
from sdeflow.likelihood import bits_per_dim, data_log_prob, log_prob
from sdeflow.likelihood.bounds import elbo, kl_bound
from sdeflow.likelihood.dequantisation import TruncatedNormal, Uniform, Variational, bits_from
from sdeflow.likelihood.dequantisation import bits_per_dim as bits_of_density
from sdeflow.likelihood.options import LogProbOptions
from sdeflow.numerics.basis import DCT
from sdeflow.numerics.traces import Hadamard, Hutchinson, HutchPP
from sdeflow.scores import GaussianMixture
from sdeflow.scores.thresholded import Thresholded
from sdeflow.solvers import AnnealedLangevin, Exponential, Torchdiffeq, Torchsde, annealed_langevin, langevin, presets
from sdeflow.solving.priors import fit_prior
from sdeflow.solving.simulate import simulate
from sdeflow.solving.solution import Solution
from sdeflow.symbolic.schedule import table_of
from sdeflow.training.callbacks import Checkpoints, Validation
from sdeflow.training.losses import denoising_score_matching
from sdeflow.training.objectives import Denoising, KernelMatching, LocalMatching, Objective
from sdeflow.training.run import Run, drawn_steps

k = sp.Symbol("k", positive=True)
D = 2
PACKAGE = Path(sdeflow.__file__).parent
X = torch.tensor([[0.2, 0.7], [-0.5, 0.3], [0.9, -0.6]])
EIGHT = torch.linspace(-1, 1, 8).reshape(1, 8)
LABELS = torch.tensor([0, 1, 2])
IMAGES = torch.tensor([[0, 3], [2, 1], [1, 1]])

SHOWN = "what is shown on the way, and no result"
DEVICE = "where it is computed, and no result: the numbers are the same everywhere"
CHUNK = "memory, and no result: samples do not depend on chunks"


@functools.cache
def ou():
    return SDE(-x, sp.sqrt(2), T=2)


@functools.cache
def exact():
    return ring(ou(), modes=3, std=0.4)


@functools.cache
def reverse():
    return ou().reverse(exact())


@functools.cache
def flow():
    return ou().flow_ode(exact())


@functools.cache
def in_many():
    draw = torch.Generator().manual_seed(0)
    return ou().flow_ode(GaussianMixture(ou(), torch.randn(3, 8, generator=draw), torch.rand(3, 8, generator=draw)))


@functools.cache
def cld():
    sde = catalog.CriticallyDampedLangevin()
    return sde.flow_ode(GaussianMixture(sde, torch.tensor([[0.5], [-0.5]]), torch.tensor([0.2, 0.3])))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.label = nn.Linear(D + 1, D), nn.Embedding(3, D)

    def forward(self, x, t, y=None):
        out = self.layer(torch.cat([x, t[:, None] / 10], 1))
        return out if y is None else out + self.label(y)


def network(**options):
    return Score(Net(), ou(), **{"data_mean": 0.0, "data_std": 1.0, **options})


def solver(kind):
    """What samples with a solver of this kind and its options look like."""

    def sampled(**options):
        chosen, draws = kind(**options), "eta" in options and options["eta"] > 0
        steps = {} if chosen.adaptive else {"steps": 4}
        if draws or kind in (sdeflow.solvers.PredictorCorrector, sdeflow.solvers.StochasticHeun, AnnealedLangevin):
            return reverse().sample((3, D), chosen, seed=0, **steps)
        return flow().decode(X, chosen, **steps)

    return sampled


WIDE = {"wide": True, "steps": 6}


def log_p(wide=False, **options):
    equation, states = (in_many(), EIGHT) if wide else (flow(), X)
    return equation.log_prob(states, **{"seed": 0, **options})


def of_trace(kind):
    return lambda **options: log_p(**WIDE, trace=kind(**options))


def trained(score=None, **options):
    score = score or Score(Net(), ou(), predicts="noise")
    data = torch.randn(64, D, generator=torch.Generator().manual_seed(0)) + 1.0
    run = fit(score, options.pop("data", data), **{"steps": 12, "batch_size": 8, "progress": False, **options})
    return torch.tensor(run.losses), torch.cat([p.detach().flatten() for p in score.parameters()])


class OfLabels(Net):
    classes = 3

    def forward(self, x, t, y):
        return super().forward(x, t) + y[:, None]


def by_label():
    score = Score(OfLabels(), ou(), predicts="noise", data_mean=0.0, data_std=1.0)
    score.learns(LABELS, 0.1)
    return score


def by_simulation(**options):
    score = Score(Net(), SDE(-(x**3), 1), predicts="score")
    return LocalMatching(**{"simulation_steps": 6, "gap": 2, **options}).value(score, X)


def validated(**options):
    held_out = Validation(X, 2, **options)
    return fit(Score(Net(), ou(), predicts="noise"), X, 4, 2, callbacks=[held_out], progress=False).validation


def declared(**options):
    sde = SDE(**{"f": -x, "g": 1, **options})
    kernel = sde.kernel if sde.kind == "affine" else None
    points = torch.tensor([[1.0, 2.0]]) if not sde.declaration.coupled else torch.tensor([[[1.0], [2.0]]])
    moments = None if kernel is None else kernel.moments(points, 0.5)
    prior = str(sde.flow_ode(lambda x, t: -x).model.known_prior) if options.get("prior") else ""
    return str(sde.declaration.f), str(sde.declaration.g), sde.T, sde.cutoff, moments, prior


def of_path(**options):
    sde = SDE.from_kernel(**{"alpha": 1 - time, "sigma": time, "T": 0.9, **options})
    return sde.T, sde.cutoff, sde.kernel.moments(torch.tensor([[1.0, 2.0]]), 0.5)


def shown(make):
    """What is declared."""
    found = {}

    def declared(**options):
        if str(options) not in found:
            sde = make(**options)
            found[str(options)] = str(sde.declaration), str(sde.values)
        return found[str(options)]

    return declared


def shapes(make):
    """The layout of a net and of its parts."""

    def found(**options):
        net = make(**options)
        return [tuple(p.shape) for p in net.parameters()], [
            (str(part), getattr(part, "heads", None)) for part in net.modules()
        ]

    return found


def geometric_paths(learned=False, **options):
    sde = SDE(-k * x, 1, params={"k": nn.Parameter(torch.tensor(1.0))}) if learned else SDE(x, x / 2)
    return simulate(sde, torch.ones(3, 1), [0.5, 1.0], **{"steps": 4, "seed": 0, **options})


def of_draws(**options):
    drawn = Uniform().sample(IMAGES, levels=4, low=-1.0, high=1.0, seed=0, draws=2)
    bits = bits_from(drawn, torch.linspace(-1, 1, 6).double().reshape(2, 3), **options)
    return bits.value, bits.stderr


def fitted(**options):
    return str(fit_prior(SDE(-x, 1), X, **{"n": 60, "steps": 4, "seed": 0, "components": 2, **options}))


GRID = torch.tensor([ou().cutoff, 0.1, 0.4, 1.0, 2.0])
ADAPTIVE = {"solver": "dopri5"}
CONFIGURED = {
    "solver": ({"steps": 4}, {"solver": "heun"}),
    "steps": ({"solver": "euler", "steps": 4}, {"steps": 5}),
    "grid": ({"solver": "euler", "steps": 4}, {"grid": GRID}),
    "max_calls": (ADAPTIVE, {"max_calls": 3}),
    "rtol": (ADAPTIVE, {"rtol": 1e-2}),
    "atol": (ADAPTIVE, {"atol": 1e-2}),
    "trajectory": ({"solver": "euler", "steps": 4}, {"trajectory": True}),
    "threshold": ({"solver": "euler", "steps": 4}, {"threshold": (-0.1, 0.1)}),
    "callback": ({"solver": "euler", "steps": 4}, {"callback": print}),
    "chunk": CHUNK,
    "progress": SHOWN,
}
DENOISED = {
    "denoise": ({"solver": "euler", "steps": 4}, {"denoise": True}),
    "return_denoised": ({"solver": "euler", "steps": 4}, {"return_denoised": True}),
}
OF_STATE = {"dtype": ({"steps": 4}, {"dtype": torch.float64}), "device": DEVICE}
BOUNDED = {
    "support": ({"steps": 4}, {"support": lambda x: x[:, 0] > 0, "reject": True}),
    "reject": ({"steps": 4, "support": lambda x: x[:, 0] > 0}, {"reject": True}),
}


def calls(run):
    """``callback=`` is counted: what it sees is its result."""

    def counted(callback=None, **options):
        seen = []
        found = run(callback=None if callback is None else lambda *args: seen.append(args[0]), **options)
        return found, seen

    return counted


AS_ENCODE = dict.fromkeys({*CONFIGURED, "gradient"} - {"solver", "trajectory"}, "as FlowODE.encode")
LEARNED = {"learned": True, "solver": "euler", "steps": 2}


def chosen(learned):
    return ou().flow_ode(network()) if learned else flow()


def stochastic(**options):
    return calls(reverse().sample)(shape=(3, D), **{"seed": 0, **options})


TORCHSDE = {"solver": Torchsde("euler", adaptive=True), "rtol": 1e-1, "atol": 1e-1}


@functools.cache
def fitted_prior():
    return fit_prior(SDE(-(x**3), 1), X, n=60, steps=4, seed=0)


@functools.cache
def stationary_law():
    return SDE(-(x**3), 1, T=3).flow_ode(lambda x, t: -x).model.prior_for(torch.ones(1, D))


@functools.cache
def pushed_prior():
    return SDE(x, x / 2).flow_ode(lambda x, t: -(torch.log(x) + 1) / x).model.prior_for(torch.ones(1, D))


@functools.cache
def boltzmann_law():
    q, v = sdeflow.state("q v")
    sde = SDE([v, q - q**3 - 2 * v], [0, 2], T=20, P0=[0, 1])
    return sde.flow_ode(lambda x, t: -x).model.prior_for(torch.ones(1, 2, 1))


def drawn_of(law):
    return lambda **o: law().sample((3, 2, 1) if law is boltzmann_law else (3, D), **{"seed": 0, **o})


@functools.cache
def geometric_kernel():
    return SDE(x, x / 2).kernel


@functools.cache
def square_root_kernel():
    return SDE(1 - x, sp.sqrt(x)).kernel


AS_LOG_PROB = dict.fromkeys(LogProbOptions.__annotations__, "as log_prob")


# (the function whose signature it is, how it is called, its options: what to set, and what to change then, or a reason)
def clock(**options):
    """Of a clock what its options change: break points are named where there is no kernel."""
    grid, kernel = ("t", None) if "breaks" in options else ("angle", ou().kernel)
    made = sdeflow.solvers.make_clock(grid, kernel, ou().cutoff, 2.0, **options)
    return *made(0.5), float(len(made.breaks))


TABLE = {
    "SDE": (SDE.__init__, declared, {
        "T": ({}, {"T": 2.0}),
        "cutoff": ({}, {"cutoff": 0.1}),
        "params": ({"f": -k * x, "params": {"k": 1.0}}, {"params": {"k": 2.0}}),
        "P0": ({}, {"P0": 0.5}),
        "calculus": ({"f": x, "g": x / 2}, {"calculus": "stratonovich"}),
        "prior": ({}, {"prior": Gaussian(0.0, 3.0)}),
        "state": ({"f": ["v", "-x"], "g": [1, 1], "state": ("x", "v")}, {"state": ("v", "x")}),
        "basis": ({"f": -k * x, "params": {"k": torch.tensor([1.0, 2.0])}}, {"basis": DCT(1)}),
    }),
    "SDE.from_kernel": (SDE.from_kernel, of_path, {
        "sigma": ({}, {"sigma": time / 2}),
        "T": ({}, {"T": 0.8}),
        "cutoff": ({}, {"cutoff": 0.1}),
        "params": ({"sigma": k * time, "params": {"k": 1.0}}, {"params": {"k": 2.0}}),
        "basis": ({"sigma": k * time, "params": {"k": torch.tensor([1.0, 2.0])}}, {"basis": DCT(1)}),
    }),
    "SDE.reverse": (SDE.reverse, lambda **o: ou().reverse(**o).sample((3, D), steps=2, seed=0), {
        "score": ({"score": exact()}, {"score": lambda x, t: -x}),
        "prior": ({"score": exact()}, {"prior": Gaussian(0.0, 1.0)}),
    }),
    "SDE.flow_ode": (SDE.flow_ode, lambda **o: ou().flow_ode(**o).sample((3, D), steps=2, seed=0), {
        "score": ({"score": exact()}, {"score": lambda x, t: -x}),
        "prior": ({"score": exact()}, {"prior": Gaussian(0.0, 1.0)}),
    }),
    "SDE.lift": (SDE.lift, lambda **o: catalog.CriticallyDampedLangevin().lift(X, **o), {
        "seed": ({"seed": 0}, {"seed": 1}),
    }),
    "simulate": (simulate, geometric_paths, {
        "solver": ({}, {"solver": "milstein"}),
        "steps": ({}, {"steps": 5}),
        "seed": ({}, {"seed": 1}),
        "rtol": ({**TORCHSDE, "steps": None}, {"rtol": 1e-2, "atol": 1e-2}),
        "atol": ({**TORCHSDE, "steps": None, "rtol": 1e-3, "atol": 1e-3}, {"atol": 1.0}),
        "dtype": ({}, {"dtype": torch.float64}),
        "noise": ({}, {"noise": sdeflow.BrownianPath(0)}),
        "gradient": ({"learned": True}, {"gradient": "backprop"}),
        "boundary": "of SDEs whose coefficients end somewhere: tests/solving/test_simulation.py",
        "max_calls": ({**TORCHSDE, "steps": None}, {"max_calls": 2}),
        "progress": SHOWN,
    }),
    "SDE.simulate": (SDE.simulate, None, {"solver": "as simulate", "steps": "as simulate", "seed": "as simulate"}),
    "fit_prior": (fit_prior, fitted, {
        "n": ({}, {"n": 70}),
        "components": ({}, {"components": 3}),
        "steps": ({}, {"steps": 5}),
        "seed": ({}, {"seed": 1}),
    }),
    "SDE.fit_prior": (SDE.fit_prior, None, dict.fromkeys(("n", "components", "steps", "seed"), "as fit_prior")),
    "ReverseSDE.sample": (ReverseSDE.sample, stochastic, {
        **CONFIGURED, **DENOISED, **OF_STATE, **BOUNDED,
        "solver": ({"steps": 4}, {"solver": "euler"}),
        "seed": ({"steps": 4}, {"seed": 1}),
        "noise": ({"steps": 4}, {"noise": sdeflow.BrownianPath(0)}),
        "rtol": (TORCHSDE, {"rtol": 1e-3, "atol": 1e-3}),
        "atol": (TORCHSDE, {"atol": 1e-4}),
        "max_calls": (TORCHSDE, {"max_calls": 2}),
    }),
    "ReverseSDE.solve": (ReverseSDE.solve, None, dict.fromkeys(
        {*CONFIGURED, *DENOISED, *OF_STATE, *BOUNDED, "seed", "noise"}, "as ReverseSDE.sample")),
    "FlowODE.solve": (FlowODE.solve, lambda **o: flow().solve(X, "euler", 4, **o).x, {
        **dict.fromkeys({*CONFIGURED, *DENOISED, *OF_STATE, *BOUNDED, "seed"}, "as FlowODE.sample"),
        "encode": ({}, {"encode": True}),
        "gradient": "as FlowODE.decode",
    }),
    "FlowODE.sample": (FlowODE.sample, lambda **o: calls(flow().sample)(shape=(3, D), **{"seed": 0, **o}), {
        **CONFIGURED, **DENOISED, **OF_STATE, **BOUNDED,
        "seed": ({"steps": 4}, {"seed": 1}),
    }),
    "FlowODE.decode": (FlowODE.decode, lambda learned=False, **o: calls(chosen(learned).decode)(z=X, **o), {
        **CONFIGURED, **DENOISED,
        "gradient": (LEARNED, {"gradient": "backprop"}),
    }),
    "FlowODE.encode": (FlowODE.encode, lambda learned=False, **o: calls(chosen(learned).encode)(x=X, **o), {
        **CONFIGURED,
        "gradient": (LEARNED, {"gradient": "backprop"}),
    }),
    "FlowODE.interpolate": (FlowODE.interpolate, lambda **o: flow().interpolate(X, -X, **{"steps": 4, **o}), {
        **AS_ENCODE,
        "points": ({}, {"points": 4}),
        "solver": ({}, {"solver": "heun"}),
    }),
    "FlowODE.round_trip_error": (FlowODE.round_trip_error, lambda **o: flow().round_trip_error(
        X, **{"steps": 4, **o}), {
        **AS_ENCODE,
        "solver": ({}, {"solver": "heun"}),
    }),
    "FlowODE.pilot": (FlowODE.pilot, lambda **o: str(vars(flow().pilot((D,), **o))), {
        "solver": ({}, {"solver": Exponential(order=4)}),
        "dtype": "in which the pilot is measured, to the digits of a grid",
        "device": DEVICE,
    }),
    "ReverseSDE.pilot": (ReverseSDE.pilot, None, dict.fromkeys(("solver", "dtype", "device"), "as FlowODE.pilot")),
    "log_prob": (log_prob, log_p, {
        "trace": ({**WIDE, "probes": 4}, {"trace": "hadamard"}),
        "probes": ({**WIDE, "probes": 2}, {"probes": 3}),
        "probe": ({**WIDE, "probes": 2}, {"probe": "gaussian"}),
        "solver": ({"steps": 6}, {"solver": "rk4"}),
        "steps": ({"steps": 6}, {"steps": 7}),
        "rtol": ({"rtol": 1e-2}, {"rtol": 1e-4}),
        "atol": ({"rtol": 1e-4, "atol": 1e-4}, {"atol": 1e-2}),
        "grid": ({"steps": 6}, {"grid": "t"}),
        "at": ({"steps": 6}, {"at": "data"}),
        "gradient": ({"steps": 6}, {"gradient": "backprop"}),
        "seed": ({**WIDE, "probes": 2}, {"seed": 1}),
        "first_row": ({**WIDE, "probes": 2}, {"first_row": 5}),
        "chunk": CHUNK,
        "full": ({"steps": 6}, {"full": True}),
        "max_calls": ({"solver": "dopri5"}, {"max_calls": 3}),
        "progress": SHOWN,
        "warn_above": ({**WIDE, "probes": 2, "warn_above": 1e9}, {"warn_above": 1e-9}),
    }),
    "data_log_prob": (data_log_prob, lambda **o: cld().data_log_prob(
        X[:, :1], **{"steps": 4, "seed": 0, "samples": 2, **o}), {
        **AS_LOG_PROB,
        "samples": ({}, {"samples": 3}),
        "seed": ({}, {"seed": 1}),
        "full": ({}, {"full": True}),
    }),
    "bits_per_dim": (bits_per_dim, lambda **o: (cld() if "samples" in o else flow()).bits_per_dim(
        IMAGES[:, :1] if "samples" in o else IMAGES, levels=4, low=-1.0, high=1.0, **{"steps": 4, "seed": 0, **o}), {
        **AS_LOG_PROB,
        "full": ({}, {"full": True}),
        "dequantise": ({}, {"dequantise": TruncatedNormal(0.1)}),
        "draws": ({}, {"draws": 2}),
        "importance": ({"draws": 2}, {"importance": False}),
        "samples": ({"samples": 1}, {"samples": 2}),
        "seed": ({}, {"seed": 1}),
    }),
    "elbo": (elbo, lambda **o: reverse().elbo(X, **{"draws": 4, "seed": 0, **o}).value, {
        "at": ({}, {"at": "cutoff"}),
        "draws": ({}, {"draws": 6}),
        "times": ({}, {"times": "t"}),
        "seed": ({}, {"seed": 1}),
        "progress": SHOWN,
    }),
    "kl_bound": (kl_bound, lambda **o: ou().reverse(lambda x, t: -x, prior=Gaussian(0.0, 1.0)).kl_bound(
        X, **{"draws": 4, "seed": 0, **o}).value, {
        "score_of_data": ({}, {"score_of_data": exact()}),
        "draws": ({}, {"draws": 6}),
        "times": ({}, {"times": "t"}),
        "seed": ({}, {"seed": 1}),
        "progress": SHOWN,
    }),
    "fit": (fit, trained, {
        "batch_size": ({}, {"batch_size": 4}),
        "weighting": ({"weighting": "likelihood"}, {"weighting": "score"}),
        "times": ({"weighting": "likelihood"}, {"times": "t"}),
        "objective": ({}, {"objective": sdeflow.objectives.Denoising("edm")}),
        "optimiser": ({}, {"optimiser": lambda p: torch.optim.SGD(p, lr=1e-2)}),
        "lr": ({}, {"lr": 1e-2}),
        "schedule": ({}, {"schedule": "constant"}),
        "ema": ({}, {"ema": 0.0}),
        "clip": ({"lr": 1e-2}, {"clip": 1e-3}),
        "seed": ({}, {"seed": 1}),
        "label_dropout": "tests/scores/test_conditions.py",
        "out": "where checkpoints are: below",
        "resume": "below",
        "allow": "tests/training/test_runs.py",
        "checkpoint_every": "below",
        "mixed_precision": ({}, {"mixed_precision": "bf16"}),
        "accelerator": "the user's own, for devices and processes: tests/test_faults.py",
        "gap": "below",
        "simulation_steps": "below",
        "callbacks": "tests/training/test_objectives.py",
        "validation": "tests/training/test_objectives.py",
        "progress": SHOWN,
    }),
    "Objective": (Objective.__init__, lambda **o: Denoising(**o).value(exact(), X), {
        "weighting": ({}, {"weighting": "edm"}),
        "times": ({}, {"times": "log_snr"}),
    }),
    "Objective.value": (Objective.value, lambda **o: Denoising().value(exact(), X, **o), {
        "seed": ({}, {"seed": 1}),
        "batch_size": ({}, {"batch_size": 2}),
    }),
    "LocalMatching": (LocalMatching.__init__, by_simulation, {
        "weighting": ({}, {"weighting": lambda at: at}),
        "times": ({}, {"times": lambda at: 1 + at}),
        "gap": ({"simulation_steps": 6}, {"gap": 3}),
        "simulation_steps": ({"gap": 2}, {"simulation_steps": 7}),
    }),
    "Validation": (Validation.__init__, validated, {"seed": ({}, {"seed": 1})}),
    "denoising_score_matching": (denoising_score_matching, lambda **o: denoising_score_matching(
        network(), X, [0.5, 1.0, 1.5], torch.ones(3, D), **o), {
        "weighting": ({}, {"weighting": "likelihood"}),
        "y": ({}, {"y": torch.tensor([0, 1, 2])}),
    }),
    "Score": (Score.__init__, lambda **o: (s := network(**o))(X, 0.5) if o.get("fit") is None else s, {
        "predicts": ({}, {"predicts": "noise"}),
        "data_mean": ({}, {"data_mean": 1.0}),
        "data_std": ({}, {"data_std": 2.0}),
        "time": ({}, {"time": "t"}),
    }),
    "GaussianMixture": (GaussianMixture.__init__, lambda **o: GaussianMixture(
        ou(), [[0.0, 1.0], [1.0, 0.0]], **{"covariances": [[0.1, 0.2], [0.3, 0.1]], **o})(X, 0.5), {
        "weights": ({}, {"weights": [1.0, 2.0]}),
        "full": ({}, {"covariances": torch.tensor([[[0.1, 0.05], [0.05, 0.2]]] * 2), "full": True}),
    }),
    "GaussianMixture.log_prob": (GaussianMixture.log_prob, lambda **o: exact().log_prob(X, **o), {
        "t": ({}, {"t": 0.5}),
    }),
    "GaussianMixture.sample": (GaussianMixture.sample, lambda **o: exact().sample(3, **{"seed": 0, **o}), {
        "seed": ({}, {"seed": 1}), "dtype": ({}, {"dtype": torch.float64}),
    }),
    "Score.forward": (Score.forward, lambda **o: network()(X, 0.5, **o), {"y": ({}, {"y": LABELS})}),
    "Score.noise": (Score.noise, lambda **o: network().noise(X, 0.5, **o), {"y": ({}, {"y": LABELS})}),
    "Score.denoise": (Score.denoise, lambda **o: network().denoise(X, 0.5, **o), {"y": ({}, {"y": LABELS})}),
    "Thresholded": (Thresholded.__init__, lambda **o: Thresholded(exact(), 0.5, **o).denoise(3 * X, 0.1), {
        "data_range": ({}, {"data_range": (-0.1, 0.1)}),
    }),
    "Kernel.sample": (Kernel.sample, lambda **o: ou().kernel.sample(X, 0.5, **o), {
        "seed": ({"seed": 0}, {"seed": 1}), "noise": ({"seed": 0}, {"noise": torch.zeros(3, D)}),
    }),
    "Kernel.lift": (Kernel.lift, lambda **o: cld().model.kernel.lift(X, **{"seed": 0, **o}), {
        "seed": ({}, {"seed": 1}), "noisy": ({}, {"noisy": False}),
    }),
    "Kernel.transition": (Kernel.transition, lambda **o: SDE(-x, 1, P0=0.5).kernel.transition(
        X, 0.0, 0.5, **o).sigma.values, {
        "exactly": ({}, {"exactly": True}),
    }),
    "Bridge.law": (Bridge.law, lambda **o: SDE(-x, 1, P0=0.5).bridge(0.3).law(X, 0.0, 0.5, **o)[0], {
        "exactly": ({}, {"exactly": True}),
    }),
    "Bridge.sample": (Bridge.sample, lambda **o: ou().bridge(0.3).sample(X, 0.5, **o), {
        "seed": ({"seed": 0}, {"seed": 1}),
    }),
    "Bridge.paths": (Bridge.paths, lambda **o: ou().bridge(0.3).paths(X, [0.5], **o), {
        "seed": ({"seed": 0}, {"seed": 1}),
    }),
    "Gaussian": (Gaussian.__init__, lambda **o: Gaussian(0.5, torch.tensor([1.0, 2.0]), **o).log_prob(X), {
        "basis": ({}, {"basis": DCT(1)}),
    }),
    "Gaussian.sample": (Gaussian.sample, lambda **o: Gaussian(0.5, 2.0).sample((3, D), **{"seed": 0, **o}), {
        "seed": ({}, {"seed": 1}), "dtype": ({}, {"dtype": torch.float64}), "device": DEVICE,
    }),
    "bits_of_density": (bits_of_density, lambda **o: bits_of_density(
        lambda x: -x.double().square().sum(1), IMAGES, levels=4, low=-1.0, high=1.0, **{"seed": 0, **o}).value, {
        "dequantise": ({}, {"dequantise": TruncatedNormal(0.1)}),
        "draws": ({}, {"draws": 2}),
        "importance": ({"draws": 2}, {"importance": False}),
        "seed": ({}, {"seed": 1}),
        "dtype": ({}, {"dtype": torch.float64}),
    }),
    "bits_from": (bits_from, of_draws, {
        "log_p_stderr": ({}, {"log_p_stderr": torch.full((2, 3), 50.0)}),
        "importance": ({}, {"importance": False}),
    }),
    "annealed_langevin": (annealed_langevin, lambda **o: annealed_langevin(
        exact(), (3, D), **{"scales": [1.0, 0.3, 0.1], "seed": 0, **o}), {
        "scales": ({}, {"scales": [1.0, 0.4, 0.1]}),
        "steps_per_scale": ({}, {"steps_per_scale": 2}),
        "eps": ({}, {"eps": 1e-3}),
        "seed": ({}, {"seed": 1}),
        "times": ({"scales": None, "times": [1.0, 0.5]}, {"times": [1.0, 0.4]}),
        "denoise": ({}, {"denoise": False}),
        "sde": "names the SDE of a bare function: tests/solvers/test_samplers.py",
        "dtype": ({}, {"dtype": torch.float64}),
        "device": DEVICE,
    }),
    "langevin": (langevin, lambda **o: langevin(exact(), X, 3, 0.1, t=0.5, **o), {"seed": ({"seed": 0}, {"seed": 1})}),
    "Exponential": (Exponential, solver(Exponential), {
        "order": ({}, {"order": 3}),
        "prediction": ({}, {"prediction": "noise"}),
        "corrector": ({}, {"corrector": False}),
        "eta": ({}, {"eta": 1.0}),
        "variance": ({"eta": 1.0}, {"variance": "ddpm"}),
        "variable": ({}, {"variable": "t"}),
        "rule": ({}, {"rule": "b1"}),
        "start": ({"order": 3}, {"start": "graded"}),
        "scale": ({}, {"scale": 0.3}),
        "basis": ({"prediction": "data"}, {"basis": DCT(1)}),
    }),
    "SingleStep": (sdeflow.solvers.SingleStep, solver(sdeflow.solvers.SingleStep), {
        "order": ({}, {"order": 3}),
        "prediction": ({}, {"prediction": "noise"}),
        "eta": ({}, {"eta": 1.0}),
        "rule": ({}, {"rule": "b1"}),
        "ratio": ({}, {"ratio": 0.4}),
    }),
    "GottaGoFast": (sdeflow.solvers.GottaGoFast, lambda **o: reverse().sample(
        (3, D), sdeflow.solvers.GottaGoFast(**o), rtol=0.1, atol=0.1, seed=0), {
        "safety": ({}, {"safety": 0.5}),
        "exponent": ({}, {"exponent": 0.6}),
        "first_step": ({}, {"first_step": 0.05}),
    }),
    "PredictorCorrector": (sdeflow.solvers.PredictorCorrector, solver(sdeflow.solvers.PredictorCorrector), {
        "predictor": ({}, {"predictor": "euler_maruyama"}),
        "corrector_steps": ({}, {"corrector_steps": 2}),
        "snr": ({}, {"snr": 0.1}),
        "step": ({}, {"step": "norms"}),
    }),
    "StochasticHeun": (sdeflow.solvers.StochasticHeun, solver(sdeflow.solvers.StochasticHeun), {
        "S_churn": ({}, {"S_churn": 1.0}),
        "S_min": ({"S_churn": 1.0}, {"S_min": 0.5}),
        "S_max": ({"S_churn": 1.0}, {"S_max": 0.5}),
        "S_noise": ({"S_churn": 1.0}, {"S_noise": 1.1}),
    }),
    "AnnealedLangevin": (AnnealedLangevin, solver(AnnealedLangevin), {
        "steps_per_scale": ({}, {"steps_per_scale": 2}),
        "eps": ({}, {"eps": 1e-3}),
    }),
    "Torchdiffeq": (Torchdiffeq, solver(Torchdiffeq), {
        "method": ({}, {"method": "bosh3"}),
        "scipy": ({"method": "scipy_solver"}, {"scipy": "RK23"}),
    }),
    "Torchsde": (Torchsde, lambda **o: reverse().sample((3, D), Torchsde(**o), seed=0, **(
        {"rtol": 0.1, "atol": 0.1} if o.get("adaptive") else {"steps": 4})), {
        "method": ({}, {"method": "srk"}),
        "adaptive": ({}, {"adaptive": True}),
        "initial_steps": ({"adaptive": True}, {"initial_steps": 7}),
    }),
    "BrownianPath": (sdeflow.BrownianPath, lambda **o: sdeflow.BrownianPath(**o).at(0.5, (3, D)), {
        "seed": ({"seed": 0}, {"seed": 1}),
    }),
    "BrownianPath.rows": (sdeflow.BrownianPath.rows, lambda **o: sdeflow.BrownianPath(0).rows(**o).value(0.5, (3, D)), {
        "first": ({}, {"first": 5}),
    }),
    "names_for": (sdeflow.solvers.names_for, lambda **o: sdeflow.solvers.names_for("ode", **o), {
        "with_kernel": ({}, {"with_kernel": False}),
    }),
    "make_clock": (sdeflow.solvers.make_clock, clock, {
        "scale": ({}, {"scale": 3.0}),
        "breaks": ({"breaks": None}, {"breaks": np.array([1.0])}),
    }),
    "Hadamard": (Hadamard, of_trace(Hadamard), {"probes": ({"probes": 2}, {"probes": 1})}),
    "HutchPP": (HutchPP, of_trace(HutchPP), {
        "probes": ({"probes": 3}, {"probes": 6}),
    }),
    "Hutchinson": (Hutchinson, of_trace(Hutchinson), {
        "probes": ({}, {"probes": 2}),
        "probe": ({}, {"probe": "gaussian"}),
        "fresh": ({"probes": 1}, {"fresh": False}),
        "distinct": ({"probes": 2}, {"distinct": False}),
    }),
    "MLP": (sdeflow.nets.MLP, shapes(functools.partial(sdeflow.nets.MLP, 2)), {
        "width": ({}, {"width": 64}), "depth": ({}, {"depth": 2}), "classes": ({}, {"classes": 3}),
        "condition": ({}, {"condition": 3}), "dropout": ({}, {"dropout": 0.5}),
        "out_features": ({}, {"out_features": 3}),
    }),
    "UNet": (sdeflow.nets.UNet, shapes(functools.partial(sdeflow.nets.UNet, 1)), {
        "width": ({}, {"width": 16}), "multipliers": ({}, {"multipliers": (1, 3)}), "blocks": ({}, {"blocks": 2}),
        "attention": ({}, {"attention": ()}), "spatial_dims": ({}, {"spatial_dims": 1}),
        "classes": ({}, {"classes": 3}), "condition": ({}, {"condition": 3}), "dropout": ({}, {"dropout": 0.5}),
        "out_channels": ({}, {"out_channels": 2}),
        "head_width": ({}, {"head_width": 8}),
    }),
    "Conditioning": (sdeflow.nets.Conditioning, shapes(functools.partial(sdeflow.nets.Conditioning, 4)), {
        "classes": ({}, {"classes": 3}), "condition": ({}, {"condition": 3}),
    }),
    "Score.guided": (Score.guided, lambda **o: by_label().guided(LABELS, **o)(X, 0.5), {
        "strength": ({}, {"strength": 3.0}), "interval": ({}, {"interval": (0.6, 0.9)}),
    }),
    "TimeEmbedding": (sdeflow.nets.TimeEmbedding, lambda **o: sdeflow.nets.TimeEmbedding(4, **o).omega, {
        "frequencies": ({}, {"frequencies": 16}), "lowest": ({}, {"lowest": 0.1}), "highest": ({}, {"highest": 10.0}),
    }),
    "DCT": (DCT, lambda **o: DCT(**o).forward(torch.arange(8.0).reshape(1, 2, 4)), {"sides": ({}, {"sides": 1})}),
    "schedule": (sdeflow.schedule, lambda **o: sdeflow.schedule(([0, 1], [1, 2]), **o).__name__, {
        "name": ({"name": "a"}, {"name": "b"}),
    }),
    **{
        f"catalog.{name}": (getattr(catalog, name), shown(functools.partial(getattr(catalog, name), *arguments)), {
            option: ({}, {option: value}) for option, value in {**options, "cutoff": 0.05}.items()
        })
        for name, arguments, options in (
            ("EDM", (), {"T": 70.0}),
            ("OU", (), {"theta": 2.0, "mu": 1.0, "sigma": 1.0, "T": 4.0}),
            ("VE", (), {"sigma_min": 0.02, "sigma_max": 40.0}),
            ("VP", (), {"beta_min": 0.2, "beta_max": 10.0, "T": 2.0}),
            ("SubVP", (), {"beta_min": 0.2, "beta_max": 10.0, "T": 2.0}),
            ("CosineVP", (), {"T": 0.9}),
            ("FlowMatching", (), {"T": 0.9}),
            ("Blurring", ((8, 8),), {"blur": 10.0, "floor": 0.01, "T": 0.9}),
            ("CriticallyDampedLangevin", (), {"beta": 2.0, "mass": 1.0, "gamma": 0.1, "T": 2.0, "friction": 3.0}),
        )
    },
    **{
        f"{kind.__name__}.sample": (kind.sample, drawn_of(law), {
            "seed": ({}, {"seed": 1}), "dtype": ({}, {"dtype": torch.float64}), "device": DEVICE,
        })
        for kind, law in (
            (FittedPrior, fitted_prior), (StationaryLaw, stationary_law), (PushForward, pushed_prior),
            (BoltzmannLaw, boltzmann_law),
        )
    },
    **{
        f"{kind.__name__}.sample": (kind.sample, lambda kernel=kernel, **o: kernel().sample(
            torch.ones(3, D), 0.5, **o), {
            "seed": ({"seed": 0}, {"seed": 1}), "noise": ({"seed": 0}, {"noise": torch.zeros(3, D)}),
        })
        for kind, kernel in ((ReducibleKernel, geometric_kernel), (PearsonKernel, square_root_kernel))
    },
    **{
        f"presets.{preset.__name__}": (preset, preset, {option: ({}, {option: value})})
        for preset, option, value in (
            (presets.ddim, "eta", 1.0), (presets.deis, "order", 2), (presets.dpmpp2s, "ratio", 0.4),
            (presets.dpmpp3m, "published", True), (presets.dpmpp_sde, "eta", 0.5), (presets.er_sde, "order", 2),
        )
    },
    "presets.unipc": (presets.unipc, presets.unipc, {
        "order": ({}, {"order": 2}), "variant": ({}, {"variant": "bh1"}),
    }),
    "presets.sa_solver": (presets.sa_solver, presets.sa_solver, {
        "predictor": ({}, {"predictor": 3}), "corrector": ({}, {"corrector": 3}), "tau": ({}, {"tau": 0.5}),
    }),
    "catalog.from_recipe": (catalog.from_recipe, lambda **o: repr(catalog.from_recipe(
        **{"D": [[k, 0], [0, 1]], "Q": [[0, -1], [1, 0]], "params": {"k": 1.0}, **o}).declaration), {
        "S": ({}, {"S": [[2, 0], [0, 1]]}), "T": ({}, {"T": 2.0}), "P0": ({}, {"P0": [0, 1]}),
        "cutoff": ({}, {"cutoff": 0.05}),
        "names": ({}, {"names": "a b"}), "params": "values of symbols: above, at SDE",
    }),
}  # fmt: skip


def options_of(function):
    """The names of its arguments that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_holds_every_option(name):
    function, _, entries = TABLE[name]
    assert options_of(function) == set(entries)


INTERNAL = {  # what users do not call, or what takes no option that changes a result of its own
    "Clock", "Problem", "Diffusion", "Field", "View", "Watch",
    "Solver", "Readout", "GridScore", "DeclaredSDE", "Basis", "Dequantisation", "Estimate",
    "Integral", "Products", "Trace", "Given", "pool", "until", "Grid", "Bits", "Dequantised", "Fit",
    "KernelPairs", "LogProb", "Spread", "score_error", "weighted_error", "BrownianRows", "pearson_kernel",
    "stationary_law", "start",
}  # fmt: skip


def test_the_table_holds_every_public_name():
    modules = (
        sdeflow, sdeflow.solvers, sdeflow.scores, sdeflow.nets, sdeflow.catalog, sdeflow.basis, sdeflow.losses,
        sdeflow.objectives, sdeflow.callbacks,
        sdeflow.numerics.traces, sdeflow.likelihood.dequantisation, sdeflow.likelihood, sdeflow.likelihood.bounds,
    )  # fmt: skip
    missing = []
    known = {getattr(f, "__init__", f) if inspect.isclass(f) else f for f, _, _ in TABLE.values()}
    for module in modules:
        for name in module.__all__:
            public = getattr(module, name)
            if name in INTERNAL or not (inspect.isclass(public) or inspect.isfunction(public)):
                continue
            if inspect.isclass(public) and issubclass(public, Exception | Warning):
                continue
            own = [public]
            if inspect.isclass(public) and not is_dataclass(public):
                methods = inspect.getmembers(public, inspect.isfunction)
                mine = [(n, m) for n, m in methods if n in vars(public)]
                own = [m for n, m in mine if n == "__init__" or (not n.startswith("_") and n != "forward")]
            for function in own:
                if function in SKIPPED or not options_of(function):
                    continue
                initialised = getattr(function, "__init__", function) if inspect.isclass(function) else function
                if initialised not in known:
                    missing.append(f"{module.__name__}.{name}: {function.__qualname__}")
    assert not missing


# What takes **options, and whose options they are; None where they are no options.
FORWARDED = {
    "SDE.simulate": "simulate", "Exponential.along": "Exponential",
    "SDE.with_params": None,
}  # fmt: skip
SAME = {  # methods whose options are those of another, which the table holds
    "_Bridge.sample": "Bridge.sample", "_Bridge.paths": "Bridge.paths",
    "FlowODE.log_prob": "log_prob", "FlowODE.likelihood": "log_prob", "FlowODE.data_log_prob": "data_log_prob",
    "FlowODE.bits_per_dim": "bits_per_dim", "ReverseSDE.elbo": "elbo", "ReverseSDE.kl_bound": "kl_bound",
    "FlowODE.__init__": "SDE.flow_ode", "ReverseSDE.__init__": "SDE.reverse",
}  # fmt: skip
# Modules of the reference whose parts are called by the library: what users hand in reaches them through the others.
PARTS = {
    "numerics.checks", "numerics.compile", "numerics.linear", "numerics.noise", "numerics.noncentral",
    "numerics.traces", "kernels.kinds", "kernels.coefficients", "kernels.square_root", "kernels.jacobi",
    "kernels.ancestral", "solving.boundary", "solving.pilot", "solving.options",
    "likelihood.options", "storage", "symbolic.declaration", "symbolic.arguments",
    "symbolic.grammar", "symbolic.tree", "symbolic.equations", "likelihood", "likelihood.nodes", "likelihood.adjoint",
    "likelihood.budget", "likelihood.dequantisation", "solvers.exponential.weights", "solvers.clock",
    "solvers.problem", "solvers.watch",
    "training.weightings", "training.times", "proof.explanation", "proof.derivation",
    "proof.certificate", "errors", "scores.function",
}  # fmt: skip


def documented():
    """The functions and methods of the reference's modules that users call, by their qualified names."""
    reference = (Path(__file__).parent.parent / "docs" / "api.rst").read_text()
    modules = re.findall(r"automodule:: sdeflow\.([\w.]+)", reference)
    for module in (importlib.import_module(f"sdeflow.{name}") for name in modules if name not in PARTS):
        for name in getattr(module, "__all__", ()):  # the networks' modules have none: sdeflow.nets is walked above
            public = getattr(module, name)
            if inspect.isfunction(public) and name not in INTERNAL:
                yield public
            elif inspect.isclass(public) and name not in INTERNAL and not issubclass(public, sp.Basic):
                for base in public.__mro__:
                    if base.__module__.startswith("sdeflow"):
                        found = (getattr(member, "__func__", member) for member in vars(base).values())
                        yield from (f for f in found if inspect.isfunction(f) and shown_to_users(f))


def shown_to_users(function):
    name = function.__name__
    return name == "__init__" or not (name.startswith("_") or name in ("forward", "on_grid"))


def test_the_table_holds_every_option_of_the_reference():
    known = {getattr(f, "__init__", f) if inspect.isclass(f) else f for f, _, _ in TABLE.values()}
    known |= {getattr(f, "__func__", f) for f, _, _ in TABLE.values()} | SKIPPED
    missing = set()
    for function in documented():
        name = function.__qualname__
        if options_of(function) and function not in known and SAME.get(name) not in TABLE:
            missing.add(f"{function.__module__}.{name}: {sorted(options_of(function))}")
        rest = [p for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
        if rest and name not in FORWARDED:
            missing.add(f"{function.__module__}.{name}: **{rest[0].name}")
    assert not missing, "\n".join(sorted(missing))
    assert {target for target in FORWARDED.values() if target} | set(SAME.values()) <= set(TABLE)


# Methods of protocols and helpers, whose options are those of the function that they stand for.
SKIPPED = {
    Objective.loss, Denoising.loss, KernelMatching.loss, LocalMatching.loss,
    Kernel.__init__, ReducibleKernel.__init__, PearsonKernel.__init__, LocalKernel.__init__,
    Checkpoints.begin, Run.take, drawn_steps, table_of, sdeflow.scores.Guided.__init__,
    Score.on_grid, sdeflow.scores.GaussianMixture.forward, Uniform.sample, TruncatedNormal.sample,
    Variational.sample, sdeflow.likelihood.LogProb.__init__, Solution.__init__, nn.Module.__init__,
    sdeflow.scores.ScoreFunction.__init__,
}  # fmt: skip


def outcome(run, options):
    """What a call returns, warns of or raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", sdeflow.errors.TraceErrorWarning)
        try:
            found = run(**options)
        except (sdeflow.SdeflowError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return found, [str(w.message) for w in caught if w.category is sdeflow.errors.TraceErrorWarning]


def equal(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        return same and bool(torch.equal(a, b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, sdeflow.likelihood.LogProb) or isinstance(b, sdeflow.likelihood.LogProb):
        return type(a) is type(b)
    return type(a) is type(b) and a == b


CASES = [
    (name, option)
    for name, (_, _, entries) in TABLE.items()
    for option, entry in entries.items()
    if not isinstance(entry, str)
]


@pytest.mark.parametrize(("name", "option"), CASES, ids=lambda value: value)
def test_every_option_changes_the_result(name, option):
    _, run, entries = TABLE[name]
    given, changed = entries[option]

    def outcomes(options):
        return outcome(run, dict(options))

    before = outcomes(given)
    assert not isinstance(before, str), before
    assert equal(before, outcomes(given)), "the same call twice"
    assert not equal(before, outcomes({**given, **changed}))


class Stranger:
    """What is no value of any option."""


STRANGERS = {"object": Stranger(), "array": np.array([[[[1j, math.nan]]]]), "nested": {"a": [Stranger()]}}
ANY_VALUE = {"callback"}  # whatever it is, the runs above put a function of their own in its place


@functools.cache
def raised_lines(path):
    """The lines of a file that belong to a raise statement."""
    raises = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.Raise)]
    return {line for node in raises for line in range(node.lineno, node.end_lineno + 1)}


@pytest.mark.parametrize(("name", "option"), CASES, ids=lambda value: value)
def test_what_is_no_value_of_an_option_is_refused_in_our_words(name, option):
    """By an error that is raised on purpose: not by an operator, an attribute or a library that stumbles over it."""
    _, run, entries = TABLE[name]
    for what, stranger in STRANGERS.items():
        if option in ANY_VALUE:
            continue
        with pytest.raises((sdeflow.SdeflowError, TypeError, ValueError)) as caught:
            run(**{**entries[option][0], option: stranger})
        last = caught.traceback[-1]
        assert Path(last.path).is_relative_to(PACKAGE), f"{what}: {caught.value!r}"
        assert last.lineno + 1 in raised_lines(str(last.path)), f"{what}: {caught.value!r}"


@pytest.mark.parametrize("changed", [{"gap": 2}, {"simulation_steps": 20}], ids=str)
def test_options_of_simulated_training(changed):
    def run(**options):
        return trained(Score(Net(), SDE(-(x**3), 1), predicts="score"), steps=2, **options)

    assert not equal(run(gap=1, simulation_steps=10), run(**{"gap": 1, "simulation_steps": 10, **changed}))


def test_folders_of_checkpoints(tmp_path):
    often, seldom, none = tmp_path / "often", tmp_path / "seldom", tmp_path / "none"
    plain = trained()
    assert equal(plain, trained(out=seldom)) and seldom.exists() and not none.exists()
    trained(out=often, checkpoint_every=6)
    assert len(list(often.iterdir())) > len(list(seldom.iterdir()))
    with pytest.raises(sdeflow.errors.CheckpointError):
        trained(out=often)
    assert equal(plain, trained(out=often, resume=True))  # nothing is left to do


@pytest.mark.parametrize("trace", ["exact", "hadamard", "hutch++", Hutchinson(2), Hadamard(2)], ids=str)
def test_a_probe_is_refused_where_none_is_drawn_from_its_law(trace):
    probes = {"probes": 6} if isinstance(trace, str) and trace != "exact" else {}
    with pytest.raises(ValueError, match="Hutchinson's trace"):
        flow().log_prob(X, trace=trace, probe="gaussian", steps=6, **probes)


@pytest.mark.parametrize(
    "options", [{"steps": 6}, {"solver": "rk4", "steps": 4}, {"steps": 6, "probes": "auto"}], ids=str
)
def test_a_probe_alone_chooses_hutchinson(options):
    found = flow().log_prob(X, probe="gaussian", seed=0, full=True, **options)
    assert bool((found.stderr > 0).all())
    if "probes" not in options:
        named = flow().log_prob(X, trace="hutchinson", probes=16, probe="gaussian", seed=0, full=True, **options)
        assert torch.equal(found.value, named.value)


def test_a_moment_that_was_declared_is_kept_by_fit():
    data = 3.0 + 2.0 * torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    measured = (float(data.mean()), float(data.double().std(correction=0)))
    for given, expected in (
        ({}, measured),
        ({"data_mean": 1.0}, (1.0, measured[1])),
        ({"data_std": 5.0}, (measured[0], 5.0)),
        ({"data_mean": 1.0, "data_std": 5.0}, (1.0, 5.0)),
    ):
        score = Score(Net(), ou(), **given)
        assert (score.data_moments() is not None) == (len(given) == 2)
        fit(score, data, 1, progress=False)
        assert tuple(map(float, score.data_moments())) == pytest.approx(expected, rel=1e-6)


def test_numpy_integers_are_integers():
    assert equal(flow().decode(X, "euler", np.int64(4)), flow().decode(X, "euler", 4))
