"""What happens when things go wrong: an exception that names the fault, a documented result, never silence or a hang.

``REFUSED`` holds what must be refused, with the words that the message must hold, by where it enters: a declaration, a
score network, training, sampling, log p. The other faults have documented results, and a test each.
"""

import ast
import functools
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from problems import cpu_seconds, training_times
from scipy.integrate import solve_ivp
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import sdeflow
from sdeflow import SDE, Gaussian, NotAffineError, Score, SdeflowError, catalog, fit, t, x, x_0
from sdeflow.errors import (
    CheckpointError,
    CheckpointMismatch,
    DataError,
    DataScaleWarning,
    DeclarationError,
    MaxStepsError,
    MissingPriorError,
    NonFiniteStateError,
    PriorMismatchWarning,
    ScheduleError,
    ScoreError,
    SolverError,
    StepUnderflowError,
    TraceErrorWarning,
    TrainingDivergedError,
    UnsafeExpressionError,
)
from sdeflow.numerics.noise import NoiseStream
from sdeflow.numerics.traces import spread_dof, widening
from sdeflow.scores import GaussianMixture
from sdeflow.solvers import Clock, Diffusion, Field, Problem, Torchdiffeq, Torchsde, Watch
from sdeflow.symbolic.symbols import s
from sdeflow.training.checkpoint import latest_checkpoint, write_checkpoint

D = 3
PACKAGE = Path(sdeflow.__file__).parent
STANDARD = Gaussian(0.0, 1.0)
k = sp.Symbol("k", positive=True)
j = sp.Symbol("j", positive=True)


@pytest.fixture(autouse=True)
def watchdog():
    """No test of this file may take a minute of processor time: a loop without an end is a failure."""

    def bark(signum, frame):
        raise TimeoutError("the watchdog's 60 seconds of processor time are over")

    before = signal.signal(signal.SIGPROF, bark)
    signal.setitimer(signal.ITIMER_PROF, 60)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


# ------------------------------------------------------------------ what the tests are made of


@functools.cache
def ou():
    """dx = -x/2 dt + dw, under which N(0, 1) data stay N(0, 1): the exact score is -x at all times."""
    return SDE(f=-x / 2, g=1, T=3)


@functools.cache
def cubic():
    return SDE(f=-(x**3), g=1, T=1)


def lotka():
    return SDE(f=lambda a, b, t: [a * (1 - b), b * (a - 1)], g=[1, 1], state=("a", "b"))


def exact(x, t):
    return -x


def mixture(sde=None, d=D):
    means = torch.stack([torch.full((d,), -0.7), torch.full((d,), 0.4)])
    return GaussianMixture(sde or ou(), means, torch.tensor([0.3, 0.2]))


def reverse(score=exact, sde=None):
    return (sde or ou()).reverse(score, prior=STANDARD)


def flow(score=exact, sde=None):
    return (sde or ou()).flow_ode(score, prior=STANDARD)


def states(n=4, d=D, dtype=torch.float32):
    return NoiseStream(0, "test").normal((n, d), dtype)


class Net(nn.Module):
    """A small trainable network for vectors."""

    def __init__(self, width=8, d=D, middle=None):
        super().__init__()
        self.first, self.last = nn.Linear(d + 1, width), nn.Linear(width, d)
        self.middle = middle or nn.Identity()

    def forward(self, x, t):
        return self.last(self.middle(torch.tanh(self.first(torch.cat([x, t[:, None] / 10], dim=1)))))


class Moody(nn.Module):
    """Batch normalisation and dropout, of which one part is kept in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.frozen = nn.BatchNorm1d(D), nn.Dropout(0.5), nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.frozen.training = False
        return self

    def forward(self, x, t):
        return self.scale * self.frozen(self.drop(self.norm(x)))


class Recorder:
    """A score that notes the times at which it is asked."""

    def __init__(self, function=exact):
        self.function, self.times = function, []

    def __call__(self, x, t):
        self.times.append(float(t[0]))
        return self.function(x, t)


def small_score(seed=0, sde=None, predicts="noise", net=None, **options):
    torch.manual_seed(seed)
    return Score(net or Net(**options), sde or ou(), predicts=predicts)


def train(score, data=None, steps=4, **options):
    options = {"batch_size": 8, "progress": False, **options}
    return fit(score, states(32) if data is None else data, steps=steps, **options)


def after(time, value):
    """A score that is exact until time (backwards), and then returns ``value``."""

    def score(x, t):
        return torch.where(t[:, None] <= time, torch.full_like(x, value), -x)

    return score


def sick_row(row=17, time=0.5):
    """NaN in one row for t <= time."""

    def score(x, t):
        out = -x
        if len(x) > row:
            out[row] = torch.where(t[row] <= time, math.nan, out[row])
        return out

    return score


def blocked(x, t):
    with torch.no_grad():
        return -x


def narrow_late(x, t):
    """(B, 1) for t < 1 only: a check at the first call does not see it."""
    return -x if float(t[0]) >= 1 else -x[:, :1]


def broken_part(shape):
    def score(x, t):
        return torch.zeros(shape)

    return score


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def with_nan(n=32, row=5, value=math.nan):
    data = states(n).clone()
    data[row, 1] = value
    return data


SYMBOL_X = sp.Symbol("x")
SYMBOL_T = sp.Symbol("t", real=True)
HOSTILE = "open('marker','w').write('x')"
MATRIX = sp.Matrix([[x]])
PLAIN = {"f": -x / 2, "g": 1}


def declare(**options):
    return SDE(**{**PLAIN, **options})


# ------------------------------------------------------------------ what is refused

DECLARATION = [
    # text, read by a grammar and never evaluated; tests/symbolic/test_text.py has the attacks
    ("text builtin", lambda: declare(f="__import__('os').getpid()"), UnsafeExpressionError, "__import__"),
    ("text call", lambda: declare(f=HOSTILE), UnsafeExpressionError, "open"),
    ("text g", lambda: declare(g=HOSTILE), UnsafeExpressionError, "open"),
    ("text attribute", lambda: declare(f="x.__class__"), UnsafeExpressionError, "grammar", "__class__"),
    ("text from a function", lambda: declare(f=lambda x, t: HOSTILE), DeclarationError, "f"),
    ("text as value", lambda: declare(g=k, params={"k": HOSTILE}), DeclarationError, "the parameter k", "open("),
    ("text as T", lambda: declare(T=HOSTILE), DeclarationError, "T must be a finite real number", "open("),
    ("text as P0", lambda: declare(P0="1"), DeclarationError, "P0 must be a finite real number"),
    ("parameter name", lambda: declare(params={HOSTILE: 1.0}), UnsafeExpressionError, "name must match", "open("),
    ("parameter symbol", lambda: declare(g=sp.Symbol(HOSTILE), params={sp.Symbol(HOSTILE): 1.0}),
     UnsafeExpressionError, "name must match", "open("),
    ("parameter newline", lambda: declare(params={"k\n": 1.0}), UnsafeExpressionError, "name must match"),
    ("parameter too long", lambda: declare(params={"k" * 33: 1.0}), UnsafeExpressionError, "name must match", "32"),
    ("parameter empty", lambda: declare(params={"": 1.0}), UnsafeExpressionError, "name must match"),
    ("symbol in f", lambda: declare(f=-x * sp.Symbol(HOSTILE)), UnsafeExpressionError, "name must match", "open("),
    ("function in g", lambda: declare(g=sp.Function(HOSTILE)(t)), UnsafeExpressionError, "name must match", "open("),
    ("tower of powers", lambda: declare(f="9**9**9"), UnsafeExpressionError, "a power of", "at most 64"),
    ("deep text", lambda: declare(f="(" * 9000 + "x" + ")" * 9000), UnsafeExpressionError, "deep"),
    ("long text", lambda: declare(g="+".join(["x"] * 10**5)), UnsafeExpressionError, "at most 20000 characters"),
    # symbols
    ("unknown symbol", lambda: declare(f=-k * x), DeclarationError, "symbol k", "params="),
    ("unknown in g", lambda: declare(g=sp.Symbol("beta")), DeclarationError, "g holds", "symbol beta"),
    ("undefined function", lambda: declare(g=sp.Function("beta")(t)), DeclarationError, "beta(t)"),
    ("the score itself", lambda: declare(f=-x + s), DeclarationError, "s(x, t)"),
    ("x_0", lambda: declare(f=x_0 - x), DeclarationError, "symbol x_0"),
    ("parameter without value", lambda: declare(f=-k * x, params={k: None}), DeclarationError, "parameter k"),
    ("parameter nan", lambda: declare(f=-k * x, params={k: math.nan}), DeclarationError, "parameter k", "nan"),
    ("parameter is x", lambda: declare(params={"x": 1.0}), DeclarationError, "x is the state"),
    ("parameter is t", lambda: declare(params={t: 1.0}), DeclarationError, "t is the time"),
    ("parameters no dict", lambda: declare(params=[("k", 1.0)]), DeclarationError, "params must be a dict"),
    ("parameter key", lambda: declare(params={3: 1.0}), DeclarationError, "key of params", "3"),
    ("with unknown params", lambda: declare(g=k, params={k: 1}).with_params(q=2), DeclarationError, "q", "k"),
    ("other x", lambda: declare(f=-SYMBOL_X), DeclarationError, "different Symbol('x')", "sdeflow.x"),
    ("other t", lambda: declare(g=1 + SYMBOL_T), DeclarationError, "different Symbol('t')", "sdeflow.t"),
    ("both x", lambda: declare(f=-SYMBOL_X - x), DeclarationError, "different Symbol('x')"),
    ("other parameter", lambda: declare(g=k, params={sp.Symbol("k"): 1.0}), DeclarationError, "Symbol('k')"),
    # schedules that do not exist on the horizon
    ("complex g", lambda: declare(g=sp.sqrt(t - sp.Rational(1, 2))), ScheduleError, "complex", "t = ", "I"),
    ("complex f", lambda: declare(f=-x * sp.log(t - sp.Rational(1, 2))), ScheduleError, "complex", "t = ", "I"),
    ("imaginary in part", lambda: catalog.VP(beta_min=-1.0), ScheduleError, "complex", "t = ", "I"),
    ("imaginary", lambda: declare(f=-sp.I * x), ScheduleError, "I"),
    ("complex general", lambda: declare(f=-(x**3), g=sp.sqrt(t - sp.Rational(1, 3))), ScheduleError, "t = "),
    ("nan", lambda: declare(f=sp.nan), ScheduleError, "f", "not finite"),
    ("zoo", lambda: declare(g=sp.zoo * t), ScheduleError, "g", "not finite"),
    ("no default", lambda: declare(g=sp.Piecewise((1, t < sp.Rational(1, 2)))), ScheduleError, "t = 0.5"),
    ("overflow", lambda: declare(g=sp.exp(sp.exp(10 * t))), ScheduleError, "t = "),
    ("nan general", lambda: declare(f=-(x**3) * sp.Piecewise((1, t < sp.Rational(1, 2)))), ScheduleError, "t = 0.5"),
    ("pole inside f", lambda: declare(f=-x / (t - sp.Rational(3, 10))), ScheduleError, "t = 0.3"),
    ("pole inside g", lambda: declare(g=1 / (t - sp.Rational(3, 10))), ScheduleError, "t = 0.3"),
    ("cosine", lambda: catalog.CosineVP(T=1), ScheduleError, "t = ", "1", "T = 0.999"),
    ("flow matching", lambda: catalog.FlowMatching(T=1), ScheduleError, "t = ", "1", "T = 0.999"),
    ("bridge", lambda: declare(f=-x / (1 - t)), ScheduleError, "t = ", "1", "T = 0.999"),
    ("beyond the pole", lambda: catalog.CosineVP(T=1.5), ScheduleError, "t = 1"),
    ("delta", lambda: declare(f=-x * sp.DiracDelta(t - sp.Rational(1, 2))), DeclarationError, "narrow Gaussian"),
    ("table with a jump", lambda: sdeflow.schedule(([0, 0.5, 0.5, 1], [1, 1, 2, 2])), DeclarationError,
     "t = 0.5 is there twice", "Piecewise"),
    ("path with a jump", lambda: SDE.from_kernel(([0, 0.5, 0.5, 1], [1, 0.8, 0.5, 0.1])), DeclarationError,
     "t = 0.5 is there twice", "alpha is continuous"),
    ("zero", lambda: declare(g=0), ScheduleError, "no noise"),
    ("zero float", lambda: declare(g=0.0), ScheduleError, "no noise"),
    ("zero in disguise", lambda: declare(g=sp.sin(t) ** 2 + sp.cos(t) ** 2 - 1), ScheduleError, "noise"),
    ("zero by value", lambda: declare(g=k, params={k: 0.0}), ScheduleError, "noise"),
    ("zero until T", lambda: declare(g=sp.Piecewise((0, t <= 1), (1, True))), ScheduleError, "noise"),
    ("zero general", lambda: declare(f=-(x**3), g=0), ScheduleError, "no noise"),
    ("score at 0", lambda: ou().kernel.score(states(), states(), 0.0), ScheduleError, "t = 0", "sigma = 0"),
    ("log prob at 0", lambda: ou().kernel.log_prob(states(), states(), 0.0), ScheduleError, "t = 0", "sigma = 0"),
    ("network at 0", lambda: small_score()(states(), 0.0), ScheduleError, "[cutoff, T]", "asked for 0"),
    ("network row at 0", lambda: small_score()(states(), torch.tensor([1, 0, 1, 1.0])), ScheduleError, "for 0"),
    ("network nan", lambda: small_score()(states(), math.nan), ScheduleError, "[cutoff, T]", "nan"),
    ("network after T", lambda: small_score()(states(), 3.5), ScheduleError, "[cutoff, T]", "3.5"),
    ("denoise at 0", lambda: small_score(predicts="data").denoise(states(), 0.0), ScheduleError, "asked for 0"),
    ("score of points at 0", lambda: GaussianMixture(ou(), states(2), torch.zeros(2))(states(), 0.0),
     ScheduleError, "0"),
    ("mixture after T", lambda: mixture()(states(), 4.0), ScheduleError, "4"),
    ("mixture before 0", lambda: mixture()(states(), -0.1), ScheduleError, "-0.1"),
    ("moments before 0", lambda: ou().kernel.moments(states(), -0.1), ScheduleError, "[0, T]", "-0.1"),
    ("moments after T", lambda: ou().kernel.moments(states(), 3.1), ScheduleError, "[0, T]", "3.1"),
    ("moments nan", lambda: ou().kernel.moments(states(), math.nan), ScheduleError, "[0, T]", "nan"),
    ("cutoff too small", lambda: declare(cutoff=1e-80), ScheduleError, "smallest usable cutoff", "1e-80"),
    ("cutoff 0", lambda: declare(cutoff=0), ScheduleError, "smallest usable cutoff", "sigma = 0"),
    ("cutoff in silence", lambda: declare(g=sp.Piecewise((0, t < sp.Rational(1, 5)), (1, True)), cutoff=0.1),
     ScheduleError, "smallest usable cutoff is about 0.2"),
    ("too little noise", lambda: declare(g=sp.Rational(1, 10**6)), ScheduleError, "too little noise"),
    ("cutoff is T", lambda: declare(cutoff=1.0), DeclarationError, "cutoff", "[0, T)"),
    ("cutoff negative", lambda: declare(cutoff=-0.1), DeclarationError, "cutoff", "-0.1"),
    ("cutoff nan", lambda: declare(cutoff=math.nan), DeclarationError, "cutoff", "nan"),
    ("T 0", lambda: declare(T=0), DeclarationError, "T must be positive", "0"),
    ("T negative", lambda: declare(T=-1), DeclarationError, "T must be positive", "-1"),
    ("T inf", lambda: declare(T=math.inf), DeclarationError, "T must be a finite real number", "inf"),
    ("T nan", lambda: declare(T=math.nan), DeclarationError, "T must be a finite real number", "nan"),
    ("T oo", lambda: declare(T=sp.oo), DeclarationError, "T must be a finite real number", "oo"),
    ("T none", lambda: declare(T=None), DeclarationError, "T must be a finite real number", "None"),
    ("T bool", lambda: declare(T=True), DeclarationError, "T must be a finite real number", "True"),
    ("P0 negative", lambda: declare(P0=-1.0), DeclarationError, "P0", "-1"),
    ("P0 nan", lambda: declare(P0=math.nan), DeclarationError, "P0", "nan"),
    ("calculus", lambda: declare(calculus="itoh"), DeclarationError, "stratonovich", "itoh"),
    ("explosive", lambda: declare(f=20 * x), ScheduleError, "explosive", "t = "),
    ("alpha that overflows", lambda: declare(f=x * sp.exp(6 * t**2)), ScheduleError, "explosive", "t = "),
    ("integer parameter", lambda: declare(g=k, params={k: torch.tensor([1, 2])}),
     DeclarationError, "parameter k", "floating tensor"),
    ("nan parameter", lambda: declare(g=k, params={k: nn.Parameter(torch.tensor(math.nan))}),
     DeclarationError, "parameter k", "finite"),
    ("shapes that do not broadcast", lambda: declare(f=-j * x, g=k, params={k: torch.ones(3), j: torch.ones(2)}),
     DeclarationError, "broadcast", "(3,)", "(2,)"),
    *((f"{name}-as-{which}", functools.partial(declare, **{which: value}), DeclarationError, which, word)
      for which in "fg"
      for name, value, word in (
          ("none", None, "None"), ("bool", True, "bool"), ("list", [x], "list"), ("matrix", MATRIX, "Matrix"),
          ("relation", x > 0, "x > 0"), ("sympy-bool", sp.true, "True"), ("tensor", torch.ones(3), "Tensor"),
          ("array", np.ones(3), "array"), ("complex", 1j, "1j"), ("nan", math.nan, "nan"),
          ("object", object(), "object"),
          ("function-of-one", lambda x: -x, "(x, t)"), ("function-to-none", lambda x, t: None, "None"),
          ("type", sp.Symbol, "f" if which == "f" else "g"),
      )),
]  # fmt: skip

NETWORK = [
    ("columns", lambda: small_score(net=broken_part((4, 1)))(states(), 1.0), ScoreError, "(4, 1)", "(4, 3)"),
    ("axis", lambda: small_score(net=broken_part((4, 3, 1)))(states(), 1.0), ScoreError, "(4, 3, 1)", "(4, 3)"),
    ("scalar", lambda: small_score(net=broken_part(()))(states(), 1.0), ScoreError, "()", "(4, 3)"),
    ("late sde", lambda: reverse(narrow_late).sample((4, D), "euler", 20, seed=0), ScoreError, "(4, 1)", "(4, 3)"),
    ("late ode", lambda: flow(narrow_late).sample((4, D), "euler", 20, seed=0), ScoreError, "(4, 1)", "(4, 3)"),
    ("late adaptive", lambda: flow(narrow_late).sample((4, D), seed=0), ScoreError, "(4, 1)", "(4, 3)"),
    ("log prob", lambda: flow(narrow_late).log_prob(states()), ScoreError, "(64, 1)", "(64, 3)"),
    ("dtype", lambda: small_score(net=lambda x, t: x.double())(states(), 1.0), ScoreError, "float64", "float32"),
    ("integers", lambda: small_score(net=lambda x, t: x.long())(states(), 1.0), ScoreError, "int64", "float32"),
    ("dtype solve", lambda: flow(lambda x, t: -x.double()).sample((4, D), seed=0), ScoreError, "float64", "float32"),
    ("device", lambda: small_score(net=lambda x, t: x.to("meta"))(states(), 1.0), ScoreError, "meta", "cpu"),
    ("tuple", lambda: small_score(net=lambda x, t: (x, t))(states(), 1.0), ScoreError, "tensor", "tuple"),
    ("none", lambda: small_score(net=lambda x, t: None)(states(), 1.0), ScoreError, "tensor", "NoneType"),
    ("array", lambda: small_score(net=lambda x, t: x.numpy())(states(), 1.0), ScoreError, "tensor", "ndarray"),
    ("solve", lambda: reverse(lambda x, t: None).sample((4, D), seed=0), ScoreError, "tensor", "NoneType"),
    ("not callable", lambda: Score(3, ou()), ScoreError, "callable", "3"),
    ("score not callable", lambda: ou().reverse(torch.ones(3)), ScoreError, "callable"),
    ("no score", lambda: ou().flow_ode().sample((4, D)), ScoreError, "no score"),
    ("time of other length", lambda: small_score()(states(4), torch.ones(3)), DataError, "(4,)", "(3,)"),
    ("time column", lambda: small_score()(states(4), torch.ones(4, 1)), DataError, "(4,)", "(4, 1)"),
    ("kernel time length", lambda: ou().kernel.moments(states(4), torch.ones(3)), DataError, "(4,)", "(3,)"),
    ("fit without parameters", lambda: train(Score(lambda x, t: x, ou())), ScoreError, "no parameters"),
    ("fit frozen", lambda: train(small_score().requires_grad_(False)), ScoreError, "no parameters"),
    ("fit a function", lambda: train(exact), ScoreError, "function"),
    ("fit general as noise", lambda: train(Score(Net(), cubic(), predicts="noise")), NotAffineError, "x**3"),
    ("predicts", lambda: small_score(predicts="epsilon"), ValueError, "epsilon", "noise", "velocity"),
    ("time", lambda: Score(Net(), ou(), time="sigma"), ValueError, "sigma", "log_snr"),
    ("score of another sde", lambda: catalog.VP().reverse(mixture()), ValueError, "another SDE", "-x/2"),
    ("score of another T", lambda: SDE(f=-x / 2, g=1, T=2).flow_ode(mixture()), ValueError, "T = 3", "T = 2"),
    ("general predicts noise", lambda: Score(Net(), cubic(), predicts="noise"), NotAffineError, "noise", "x**3"),
    ("data std", lambda: Score(Net(), ou(), data_std=0.0), ValueError, "data_std", "0.0"),
]  # fmt: skip

TRAINING = [
    ("nan", lambda: train(small_score(), with_nan(row=5)), DataError, "not finite", "[5]"),
    ("inf", lambda: train(small_score(), with_nan(row=31, value=math.inf)), DataError, "not finite", "[31]"),
    ("nan far in a tensor", lambda: train(small_score(), with_nan(20_000, 15_001)), DataError, "[15001]"),
    ("nan in a dataset", lambda: train(small_score(), Rows(list(with_nan(row=7)))), DataError, "[7]"),
    ("nan in a large dataset", lambda: train(small_score(), Rows(list(with_nan(1030, 1))), 200), DataError, "1"),
    ("nan in a later batch", lambda: train(small_score(), DataLoader(with_nan(32, 20), batch_size=8), 8),
     DataError, "not finite"),
    ("uint8", lambda: train(small_score(), torch.zeros(32, D, dtype=torch.uint8)), DataError, "uint8", "convert",
     "dequantise"),
    ("bool", lambda: train(small_score(), torch.zeros(32, D, dtype=torch.bool)), DataError, "bool"),
    ("uint8 dataset", lambda: train(small_score(), Rows(list(torch.zeros(32, D, dtype=torch.uint8)))), DataError,
     "uint8", "convert"),
    ("uint8 loader", lambda: train(small_score(), DataLoader(torch.zeros(32, D, dtype=torch.uint8), 8)), DataError,
     "uint8", "convert"),
    ("one axis", lambda: train(small_score(), torch.randn(32)), DataError, "(32,)", "(n, *event)"),
    ("empty", lambda: train(small_score(), torch.zeros(0, D)), DataError, "(0, 3)"),
    ("empty dataset", lambda: train(small_score(), Rows([])), DataError, "empty"),
    ("empty stream", lambda: train(small_score(), Stream([])), DataError, "empty"),
    ("drop last", lambda: train(small_score(), DataLoader(states(5), batch_size=8, drop_last=True)), DataError,
     "empty"),
    ("ragged", lambda: train(small_score(), Rows([torch.ones(3), torch.ones(2)])), DataError, "different shapes"),
    ("ragged in a later batch",
     lambda: train(small_score(), DataLoader(Rows([torch.ones(3) * i for i in range(8)] + [torch.ones(2)] * 8), 8)),
     DataError, "(8, 2)"),
    ("other width than the network", lambda: train(small_score(), torch.randn(32, 5)), SdeflowError, "5"),
    ("a dict", lambda: train(small_score(), {"x": 1}), DataError, "dict"),
    ("a number", lambda: train(small_score(), 3.0), DataError, "float"),
    ("constant", lambda: train(small_score(), torch.full((32, D), 2.0)), DataError, "constant", "2"),
    *((f"{name}-{value}", functools.partial(lambda **kw: train(small_score(), **kw), **{name: value}), ValueError,
       name, str(value))
      for name, value in (("steps", 0), ("steps", 1.5), ("steps", True), ("batch_size", 0), ("lr", 0.0),
                          ("lr", math.nan), ("ema", 1.0), ("clip", 0.0), ("clip", math.nan), ("times", "sigma"),
                          ("checkpoint_every", 0), ("schedule", "linear"), ("weighting", "uniform"))),
]  # fmt: skip

BAD_SHAPES = {
    "negative": (-1, D), "float": (4.0, D), "bool": (True, D), "text": "(4, 3)", "number": 5, "none": None,
    "no-event": (4,), "empty-event": (4, 0), "nan": (math.nan, D),
}  # fmt: skip
BAD_STEPS = {"0": 0, "negative": -5, "nan": math.nan, "float": 10.0, "bool": True, "text": "10"}
BAD_TOLERANCES = {"0": 0.0, "negative": -1e-3, "below-eps": 1e-9, "nan": math.nan, "inf": math.inf, "text": "1e-3"}

SAMPLING = [
    *((f"{name}-{kind}", functools.partial(lambda make, shape: make().sample(shape, steps=2, seed=0), make, shape),
       ValueError, "shape", repr(shape))
      for kind, make in (("sde", reverse), ("ode", flow)) for name, shape in BAD_SHAPES.items()),
    *((f"{name}-{kind}",
       functools.partial(lambda make, steps: make().sample((2, D), steps=steps, seed=0), make, steps),
       ValueError, "steps", repr(steps))
      for kind, make in (("sde", reverse), ("ode", flow)) for name, steps in BAD_STEPS.items()),
    ("over budget", lambda: reverse().sample((2, D), "euler", 100, max_calls=10), ValueError, "100", "max_calls=10"),
    ("over budget ode", lambda: flow().sample((2, D), "rk4", 100, max_calls=10), ValueError, "400", "max_calls=10"),
    ("budget 0", lambda: flow().sample((2, D), max_calls=0), ValueError, "max_calls", "0"),
    *((f"{which}-{name}-{kind}",
       functools.partial(lambda make, **kw: make().sample((2, D), seed=0, **kw), make, **{which: value}),
       ValueError, which, repr(value))
      for kind, make in (("sde", reverse), ("ode", flow)) for which in ("rtol", "atol")
      for name, value in BAD_TOLERANCES.items()),
    ("log prob", lambda: flow().log_prob(states(), rtol=0.0), ValueError, "rtol", "0.0"),
    ("float64", lambda: flow().decode(states(dtype=torch.float64), rtol=1e-17), ValueError, "rtol", "1e-17"),
    ("unknown sde", lambda: reverse().sample((2, D), "leapfrog", 5), ValueError, "leapfrog", *Torchsde.methods),
    ("unknown ode", lambda: flow().sample((2, D), "leapfrog"), ValueError, "leapfrog", *Torchdiffeq.methods),
    ("ode name for sde", lambda: reverse().sample((2, D), "dopri5"), ValueError, "dopri5", "milstein"),
    ("sde name for ode", lambda: flow().sample((2, D), "milstein", 5), ValueError, "milstein", "dopri5"),
    ("ode object for sde", lambda: reverse().sample((2, D), Torchdiffeq(), 5), ValueError, "dopri5", "milstein"),
    ("sde object for ode", lambda: flow().sample((2, D), Torchsde(), 5), ValueError, "euler", "dopri5"),
    ("number as solver", lambda: flow().sample((2, D), 5), ValueError, "5", "dopri5"),
    ("torchsde method", lambda: Torchsde("leapfrog"), ValueError, "leapfrog", *Torchsde.methods),
    ("torchdiffeq method", lambda: Torchdiffeq("leapfrog"), ValueError, "leapfrog", *Torchdiffeq.methods),
    ("encode", lambda: flow().encode(states(), "leapfrog"), ValueError, "leapfrog", "dopri5"),
    ("log prob", lambda: flow().log_prob(states(), solver="leapfrog"), ValueError, "leapfrog", "dopri5"),
    ("steps for adaptive", lambda: flow().sample((2, D), "dopri5", 10), ValueError, "dopri5", "steps=10", "rtol"),
    ("fixed without steps", lambda: flow().sample((2, D), "rk4"), ValueError, "rk4", "steps="),
    ("fixed without steps sde", lambda: reverse().sample((2, D), "srk"), ValueError, "srk", "steps="),
    ("option sde", lambda: reverse().sample((2, D), steps=5, min_step=1), TypeError, "min_step"),
    ("option ode", lambda: flow().sample((2, D), min_step=0.1), TypeError, "min_step"),
    ("option log prob", lambda: flow().log_prob(states(), max_num_steps=5), TypeError, "max_num_steps"),
    ("grid", lambda: reverse().sample((2, D), steps=5, grid="spline"), ValueError, "spline", "angle", "log_snr"),
    ("grid ends", lambda: flow().sample((2, D), steps=5, grid=torch.linspace(0, 3, 5)), ValueError, "cutoff", "0"),
    ("grid nan", lambda: flow().sample((2, D), steps=5, grid=torch.tensor([ou().cutoff, math.nan, 3.0])), ValueError,
     "grid", "finite"),
    ("grid equal", lambda: flow().sample((2, D), steps=5, grid=torch.tensor([1.0, 1.0, 3.0])), ValueError, "grid",
     "followed by 1"),
    ("grid general", lambda: flow(sde=cubic()).sample((2, D), steps=5, grid="angle"), ValueError, "angle", "kernel"),
    ("missing prior", lambda: lotka().reverse(lambda u, t: -u).sample((2, 2, D), steps=5),
     MissingPriorError, "prior=", "fit_prior"),
    *((f"seed {seed!r}", functools.partial(lambda seed: reverse().sample((2, D), steps=5, seed=seed), seed),
       TypeError, "seed", repr(seed)) for seed in (1.5, "0", True)),
]  # fmt: skip

LIKELIHOOD = [
    ("nan", lambda: flow().log_prob(with_nan(8, 5)), DataError, "not finite", "[5]"),
    ("inf", lambda: flow().log_prob(with_nan(8, 2, math.inf)), DataError, "not finite", "[2]"),
    ("one axis", lambda: flow().log_prob(torch.ones(4)), DataError, "(batch, *event)", "(4,)"),
    ("integers", lambda: flow().log_prob(torch.ones(4, D, dtype=torch.long)), DataError, "int64", "bits_per_dim"),
    ("text", lambda: flow().log_prob([["a", "b"]]), DataError, "tensor", "a"),
    ("other event", lambda: flow(mixture()).log_prob(torch.ones(4, 5)), DataError, "(3,)", "(batch, 5)"),
    ("encode nan", lambda: flow().encode(with_nan(8, 5)), DataError, "[5]"),
    ("decode nan", lambda: flow().decode(with_nan(8, 5)), DataError, "[5]"),
    ("decode integers", lambda: flow().decode(torch.ones(4, D, dtype=torch.long)), DataError, "int64"),
    ("exact too large", lambda: flow().log_prob(torch.zeros(1, 4097), trace="exact"), ValueError, "4097",
     "hutchinson"),
    *((f"probes {n!r}", functools.partial(lambda n: flow().log_prob(states(), probes=n), n), ValueError, "probes",
       repr(n)) for n in (0, -1, 1.5, True, "8")),
    ("trace name", lambda: flow().log_prob(states(), trace="hutch"), ValueError, "hutch", "hutchinson", "exact"),
    ("probe name", lambda: flow().log_prob(states(), probes=1, probe="sphere"), ValueError, "sphere", "rademacher"),
    ("exact with probes", lambda: flow().log_prob(states(), trace="exact", probes=2), ValueError, "exact", "probes"),
    ("no grad", lambda: flow(blocked).log_prob(states()), ScoreError, "no gradient"),
    ("detach", lambda: flow(lambda x, t: -x.detach()).log_prob(states()), ScoreError, "no gradient"),
    ("hutchinson", lambda: flow(blocked).log_prob(states(), probes=2), ScoreError, "no gradient"),
    ("constant", lambda: flow(lambda x, t: torch.zeros_like(x)).log_prob(states()), ScoreError, "no gradient"),
    *((f"without {name}",
       functools.partial(lambda kw: flow().bits_per_dim(torch.zeros(2, D, dtype=torch.long), **kw),
                         {n: v for n, v in (("levels", 2), ("low", 0.0), ("high", 1.0)) if n != name}),
       TypeError, name) for name in ("levels", "low", "high")),
    ("floats", lambda: flow().bits_per_dim(states(), levels=2, low=0.0, high=1.0), DataError, "integer", "log_prob"),
    ("above", lambda: flow().bits_per_dim(torch.full((2, D), 256), levels=256, low=0.0, high=1.0), DataError, "256",
     "0 .. 255"),
    ("below", lambda: flow().bits_per_dim(torch.full((2, D), -1), levels=256, low=0.0, high=1.0), DataError, "-1"),
    ("one level", lambda: flow().bits_per_dim(torch.zeros(2, D, dtype=torch.long), levels=1, low=0.0, high=1.0),
     ValueError, "levels"),
    ("levels and a half", lambda: flow().bits_per_dim(torch.zeros(2, D, dtype=torch.long), levels=2.5, low=0.0,
                                                         high=1.0), ValueError, "levels", "2.5"),
    ("empty range", lambda: flow().bits_per_dim(torch.zeros(2, D, dtype=torch.long), levels=2, low=1.0, high=1.0),
     ValueError, "low < high"),
    ("endless range", lambda: flow().bits_per_dim(torch.zeros(2, D, dtype=torch.long), levels=2, low=0.0,
                                                     high=math.inf), ValueError, "high"),
    ("budget", lambda: flow(mixture()).log_prob(states(), max_calls=9), MaxStepsError, "budget of 9"),
    ("nan", lambda: flow(after(2.0, math.nan)).log_prob(states()), NonFiniteStateError, "not finite at t = "),
    ("nan fixed", lambda: flow(lambda x, t: x * math.nan).log_prob(states(), solver="rk4", steps=3),
     NonFiniteStateError, "not finite at t = "),
    ("scipy", lambda: flow(lambda x, t: -x * t[:, None] * math.nan).log_prob(states(), solver="scipy_solver"),
     SolverError, "t = "),
]  # fmt: skip


LARGE = ("tower of powers", "deep text", "long text")
REFUSED = {
    "declared": DECLARATION, "network": NETWORK, "training": TRAINING, "sampling": SAMPLING, "log p": LIKELIHOOD,
}  # fmt: skip


def table():
    return [
        pytest.param(attempt, error, wanted, id=f"{where}: {name}")
        for where, rows in REFUSED.items()
        for name, attempt, error, *wanted in rows
    ]


@pytest.mark.parametrize(("attempt", "error", "wanted"), table())
def test_refused(attempt, error, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        attempt()
    message = str(caught.value)
    missing = [word for word in wanted if word not in message]
    assert not missing, f"{missing} not in {message!r}"
    assert not (tmp_path / "marker").exists(), "text was evaluated"


def test_every_error_is_one_of_sdeflow_and_of_a_builtin():
    for name in sdeflow.errors.__all__:
        kind = getattr(sdeflow.errors, name)
        if issubclass(kind, SdeflowError) and kind is not SdeflowError:
            assert issubclass(kind, ValueError | TypeError | RuntimeError), name
        assert kind is SdeflowError or issubclass(kind, SdeflowError | UserWarning), name


@pytest.mark.parametrize("attempt", [row[1] for row in DECLARATION if row[0] in LARGE])
def test_large_text_is_refused_at_once(attempt):
    start = cpu_seconds()
    with pytest.raises(UnsafeExpressionError) as caught:
        attempt()
    assert cpu_seconds() - start < 1.0
    assert len(str(caught.value)) < 500


# ------------------------------------------------------------------ declaration

NOT_AFFINE = {
    "cubic": -(x**3), "sine": sp.sin(x), "bilinear": -x * t - x**2 * t, "reciprocal": 1 / (2 + x**2),
    "tan of tan": sp.atan(sp.tan(x)), "abs": -sp.Abs(x), "max": sp.Max(x, 0), "min": sp.Min(x, t),
    "piecewise": sp.Piecewise((-x, x > 0), (-2 * x, True)), "sign": -sp.sign(x), "floor": -sp.floor(x),
    "mod": -sp.Mod(x, 1), "heaviside": -x * sp.Heaviside(x),
}  # fmt: skip


@pytest.mark.parametrize("f", NOT_AFFINE.values(), ids=NOT_AFFINE.keys())
def test_nonlinear_drift_declares_but_has_no_kernel(f):
    sde = SDE(f=f, g=1)
    assert sde.kind == "general"
    assert sde.reverse().drift == f - s
    assert sde.flow_ode().drift == f - s / 2
    for ask in (
        lambda: sde.kernel.alpha, lambda: sde.weighting, lambda: sde.likelihood_weighting,
        lambda: Score(Net(), sde, predicts="noise"),
        lambda: GaussianMixture(sde, states(2), torch.ones(2)),
    ):  # fmt: skip
        with pytest.raises(NotAffineError, match="Still available") as caught:
            ask()
        assert str(f) in str(caught.value)
        assert "sample()" in str(caught.value) and "log_prob()" in str(caught.value)
    for ask in (lambda: sde.prior, lambda: sde.prior_for(0.0, 1.0)):
        with pytest.raises(MissingPriorError, match="fit_prior"):
            ask()


def test_nonlinear_drift_can_be_solved_with_a_score_and_a_prior():
    sde = cubic()  # whose stationary density is proportional to exp(-x^4 / 2)
    x_0 = sde.reverse(lambda x, t: -2 * x**3, prior=Gaussian(0.0, 0.6)).sample((4, D), steps=20, seed=0)
    assert x_0.shape == (4, D) and bool(torch.isfinite(x_0).all())
    with pytest.warns(PriorMismatchWarning, match="stationary law"):  # T = 1 is its relaxation time
        sde.flow_ode(exact).sample((4, D), seed=0, steps=2)


@pytest.mark.parametrize(
    "f",
    [
        x**2 - (x + 1) ** 2,
        -x * (sp.sin(x) ** 2 + sp.cos(x) ** 2),
        sp.Piecewise((-x, t < 1), (-2 * x, True)),
        -x * abs(t),
    ],
    ids=["square cancels", "pythagoras", "piecewise in t", "abs of t"],
)
def test_affine_in_disguise_is_affine(f):
    assert SDE(f=f, g=1).kind == "affine"


@pytest.mark.parametrize("g", [t + x**2, sp.sqrt(1 + x**2), t + sp.Abs(x)], ids=["square", "root", "abs"])
def test_noise_that_depends_on_the_state_is_read_as_ito(g):
    sde = SDE(f=-x, g=g)
    assert sde.kind == "general"
    assert sp.simplify(sde.reverse().drift - (-x - sp.diff(g**2, x) - g**2 * s)) == 0
    with pytest.raises(NotAffineError, match="Itô") as caught:
        sde.kernel.alpha  # noqa: B018
    assert "depends on the state" in str(caught.value) and "Still available" in str(caught.value)


def test_negative_diffusion_is_its_modulus():
    plus, minus = SDE(f=-x / 2, g=1 + t), SDE(f=-x / 2, g=-1 - t)
    times = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    for one, other in zip(plus.kernel.coefficients(times), minus.kernel.coefficients(times), strict=True):
        assert torch.equal(one, other)
    for solver in ("euler", "srk", "midpoint"):
        samples = [reverse(sde=sde).sample((4, D), solver, 10, seed=0) for sde in (plus, minus)]
        assert torch.equal(*samples), solver


def test_sigma_0_at_the_start_is_a_point():
    x_0 = states()
    mean, std = ou().kernel.moments(x_0, 0.0)
    assert torch.equal(mean, x_0) and bool((std == 0).all())
    assert ou().cutoff > 0
    for time_ in (ou().cutoff, 3.0):
        assert bool(torch.isfinite(small_score()(x_0, time_)).all())


def test_a_mixture_of_spread_components_has_a_density_at_0():
    assert bool(torch.isfinite(mixture()(states(), 0.0)).all())


def test_smallest_usable_cutoff_as_named_is_usable():
    with pytest.raises(ScheduleError) as caught:
        declare(cutoff=1e-80)
    named = float(str(caught.value).split("smallest usable cutoff is about ")[1].split(";")[0])
    sde = declare(cutoff=2 * named)
    _, std, _ = sde.kernel.coefficients(torch.tensor(sde.cutoff, dtype=torch.float64))
    assert float(std.float()) >= torch.finfo(torch.float32).tiny


def test_prior_far_from_the_marginal_warns():
    score = mixture()
    with pytest.warns(PriorMismatchWarning, match="nats per dimension"):
        ou().reverse(score, prior=Gaussian(0.0, 2.0))
    with pytest.warns(PriorMismatchWarning, match="nats per dimension"):
        ou().flow_ode(score, prior=Gaussian(1.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ou().reverse(score, prior=ou().prior_for(*score.data_moments()))


def test_score_that_is_no_gaussian_at_T_warns():
    with pytest.warns(PriorMismatchWarning, match="prior="):
        ou().reverse(lambda x, t: x).sample((2, D), steps=2, seed=0)


def _vp(beta, T=1, **options):
    return lambda: SDE(f=-beta * x / 2, g=sp.sqrt(beta), T=T, **options)


def _q(a, b=1):
    return sp.Rational(a, b)


_lo, _hi = sp.symbols("beta_lo beta_hi", positive=True)
_plain = {"lo": sp.Symbol("lo"), "hi": sp.Symbol("hi")}
_B, _Bf = t / 10 + _q(199, 20) * t**2, 0.1 * t + 9.95 * t**2
SCHEDULES = {
    "vp-floats": _vp(0.1 + 19.9 * t),
    "vp-rational": _vp(_q(1, 10) + _q(199, 10) * t),
    "vp-symbolic": _vp(_lo + (_hi - _lo) * t, params={"beta_lo": 0.1, "beta_hi": 20.0}),
    "vp-plain-symbols": _vp(_plain["lo"] + _plain["hi"] * t, params={"lo": 0.1, "hi": 19.9}),
    "subvp-rational": lambda: catalog.SubVP(),
    "subvp-floats": lambda: SDE(-(0.1 + 19.9 * t) * x / 2, sp.sqrt((0.1 + 19.9 * t) * (1 - sp.exp(-2 * _Bf)))),
    "ve": lambda: catalog.VE(),
    "ve-floats-without-P0": lambda: SDE(0, 0.01 * 5000.0**t * math.sqrt(2 * math.log(5000.0))),
    "edm": lambda: catalog.EDM(),
    "vp-cosine": lambda: catalog.CosineVP(),
    "vp-cosine-shifted": _vp(sp.pi / _q(1008, 1000) * sp.tan(sp.pi / 2 * (t + _q(1, 125)) / _q(1008, 1000)), T=0.99),
    "vp-cosine-shifted-floats": _vp(3.1166 * sp.tan(1.5583 * (t + 0.008)), T=0.99),
    "vp-sigmoid": _vp(_q(1, 10) + 20 / (1 + sp.exp(6 - 12 * t))),
    "vp-sigmoid-floats": _vp(0.1 + 20.0 / (1 + sp.exp(6.0 - 12.0 * t))),
    "vp-sigmoid-symbolic": _vp(_lo + _hi / (1 + sp.exp(6 - 12 * t)), params={"beta_lo": 0.1, "beta_hi": 20.0}),
    "piecewise-beta": _vp(sp.Piecewise((1 + t, t < _q(1, 3)), (_q(4, 3), t < _q(2, 3)), (9 * t - _q(14, 3), True))),
    "gompertz": _vp(sp.exp(-sp.exp(-3 * t))),
    "gauss-beta": _vp(sp.exp(-(t**2))),
    "sine-beta": _vp(1 + sp.sin(sp.pi * t)),
    "sine-squared": lambda: SDE(-(1 + sp.sin(3 * t) ** 2) * x / 2, sp.sqrt(1 + sp.cos(t))),
    "reciprocal": _vp(1 / (1 + t)),
    "log-drift": lambda: SDE(-sp.log(1 + t) * x, sp.sqrt(t)),
    "tanh-drift": lambda: SDE(-sp.tanh(t) * x, 1),
    "square-drift": lambda: SDE(-(t**2) * x, 1),
    "root-drift": lambda: SDE(-sp.sqrt(t) * x, 1),
    "power-drift": lambda: SDE(-(t ** _q(3, 2)) * x, 1),
    "bridge": lambda: SDE(-x / (1 - t), 1, T=0.99),
    "flow-matching": lambda: catalog.FlowMatching(),
    "quadratic-beta": _vp(_q(1, 10) + t + 19 * t**2),
    "degree-5": _vp(1 + t - t**2 + 3 * t**3 - t**4 + 2 * t**5),
    "abs": _vp(1 + sp.Abs(t - _q(1, 2))),
    "max": _vp(sp.Max(_q(1, 2), 10 * t)),
    "offset": lambda: SDE(-(1 + sp.sin(3 * t) ** 2) * x / 2 + sp.exp(-(t**2)), sp.sqrt(1 + sp.cos(t))),
    "bessel": _vp(1 + sp.besselj(0, 5 * t) ** 2),
    "long-sum": _vp(1 + sum(_q(1, n**3) * sp.cos(n * t) ** 2 for n in range(1, 60))),
}  # fmt: skip


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=[f"{name}" for name in SCHEDULES])
def test_schedules_on_which_sympy_hangs_or_fails(make):
    start = cpu_seconds()
    sde = make()
    assert cpu_seconds() - start < 3.0
    assert sde.kernel.form in ("closed", "quadrature")
    a, b = sde.declaration.affine
    numbers = [sp.lambdify(t, e.subs(sde.values), "scipy") for e in (a, b, sde.declaration.g**2)]

    def moments(at, y):
        a, b, q = (float(f(at)) for f in numbers)
        return [a, a * y[1] + b, 2 * a * y[2] + q]

    ends = [1e-6 * sde.T, sde.T / 3, sde.T]
    alpha, std, offset = sde.kernel.coefficients(torch.tensor(ends, dtype=torch.float64))
    start_at = [math.log(float(alpha[0])), float(offset[0]), float(std[0]) ** 2]
    truth = solve_ivp(moments, (ends[0], ends[-1]), start_at, "DOP853", t_eval=ends[1:], rtol=1e-11, atol=1e-16)
    assert truth.success
    np.testing.assert_allclose(alpha[1:], np.exp(truth.y[0]), rtol=2e-8)
    np.testing.assert_allclose(std[1:], np.sqrt(truth.y[2]), rtol=2e-8)
    np.testing.assert_allclose(offset[1:], truth.y[1], rtol=2e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["vp-sigmoid", "sine-squared"])
def test_display_ends_too(name):
    kernel = SCHEDULES[name]().kernel
    start = cpu_seconds()
    shown = str(kernel)
    assert cpu_seconds() - start < 10.0
    assert "p(x_t | x_0)" in shown and kernel.form in shown


def test_closed_form_that_disagrees_is_discarded(monkeypatch):
    derive = sdeflow.kernels.gaussian.derive_moments
    right = SDE(f=-x / 2, g=1, T=3).kernel
    assert right.form == "closed"

    def wrong(*arguments):
        from dataclasses import replace

        moments = derive(*arguments)
        return replace(moments, var=moments.var * (1 + 1e-6 * t))

    monkeypatch.setattr(sdeflow.kernels.gaussian, "derive_moments", wrong)
    kernel = SDE(f=-x / 2, g=1, T=3).kernel
    assert kernel.form == "quadrature"
    times = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(kernel.coefficients(times)[1], right.coefficients(times)[1], rtol=1e-11, atol=0)


def test_parameters_take_new_values_without_the_old_ones():
    sde = SDE(f=-k * x, g=sp.sqrt(2 * k), T=1, params={"k": 1.0})
    other = sde.with_params(k=2.0)
    for bound, value in ((sde, 1.0), (other, 2.0)):
        alpha, _, _ = bound.kernel.coefficients(torch.tensor(1.0, dtype=torch.float64))
        assert float(alpha) == pytest.approx(math.exp(-value), rel=1e-12)


def test_noise_that_pauses_can_be_solved():
    pause = sp.Piecewise((1, t < _q(3, 10)), (0, t < _q(6, 10)), (2, True))
    sde = SDE(f=-x / 2, g=pause, T=1)
    score = mixture(sde)
    x_0 = sde.reverse(score).sample((64, D), steps=60, seed=0)
    assert bool(torch.isfinite(x_0).all())
    z = states(dtype=torch.float64)
    back = sde.flow_ode(score).encode(sde.flow_ode(score).decode(z, rtol=1e-8, atol=1e-8), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back, z, rtol=1e-4, atol=1e-4)
    level = sde.kernel.half_log_snr(torch.linspace(sde.cutoff, 1, 200, dtype=torch.float64))
    there = sde.kernel.time_of(level)
    torch.testing.assert_close(sde.kernel.half_log_snr(there), level, rtol=1e-9, atol=1e-9)
    drawn = training_times(sde.kernel, 256, "log_snr", 0)
    assert sde.cutoff <= float(drawn.min()) and float(drawn.max()) <= 1.0


@pytest.mark.parametrize("grid", ["angle", "log_snr"])
def test_grids_over_a_pause_are_refused_by_name_or_skip_it(grid):
    sde = SDE(f=-x / 2, g=sp.Piecewise((1, t < _q(3, 10)), (0, t < _q(6, 10)), (2, True)), T=1)
    equation = sde.flow_ode(mixture(sde))
    try:
        x_0 = equation.sample((4, D), steps=40, grid=grid, seed=0)
    except ValueError as error:
        assert grid in str(error) and 'grid="t"' in str(error)
    else:
        reference = equation.sample((4, D), grid="t", seed=0)
        torch.testing.assert_close(x_0, reference, rtol=0.1, atol=0.1)


# ------------------------------------------------------------------ score network

FIXED_ODE = [m for m in Torchdiffeq.methods if not Torchdiffeq(m).adaptive]
ADAPTIVE_ODE = [m for m in Torchdiffeq.methods if Torchdiffeq(m).adaptive]
OPTIONS = {"seed": 0, "dtype": torch.float64}
SOLVES = {
    **{f"sde-{m}": lambda sc, n, m=m: reverse(sc).sample((n, D), m, 30, **OPTIONS) for m in Torchsde.methods},
    **{f"sde-{m}-adaptive": lambda sc, n, m=m: reverse(sc).sample((n, D), m, rtol=0.1, atol=0.1, **OPTIONS)
       for m in ("euler", "milstein", "midpoint")},
    **{f"ode-{m}": lambda sc, n, m=m: flow(sc).sample((n, D), m, 30, **OPTIONS) for m in FIXED_ODE},
    **{f"ode-{m}": lambda sc, n, m=m: flow(sc).sample((n, D), m, rtol=1e-4, atol=1e-4, max_calls=600, **OPTIONS)
       for m in ADAPTIVE_ODE},
}  # fmt: skip


@pytest.mark.parametrize("solve", SOLVES.values(), ids=[f"{name}" for name in SOLVES])
def test_one_bad_row_is_named_with_its_time(solve, request):
    value = math.inf if "milstein" in request.node.name or "bosh3" in request.node.name else math.nan

    def score(x, t):
        out = -x
        out[17] = torch.where(t[17] <= 0.5, value, out[17])
        return out

    recorder = Recorder(score)
    with pytest.raises(NonFiniteStateError) as caught:
        solve(recorder, 32)
    error = caught.value
    assert error.bad_rows == [17]
    first = next(at for at in recorder.times if at <= 0.5)
    assert error.t == pytest.approx(first, rel=1e-12)
    assert f"t = {first:.6g}" in str(error) and "[17]" in str(error) and "1 of 32" in str(error)
    assert 1 <= error.nfe <= len(recorder.times) + 1
    assert error.partial.shape[0] == 32


def test_log_prob_names_the_row_too():
    with pytest.raises(NonFiniteStateError) as caught:
        flow(sick_row(17, 5.0)).log_prob(states(32))
    assert caught.value.bad_rows == [17] and "[17]" in str(caught.value)


MOODY = {
    "reverse": lambda sc: ou().reverse(sc).sample((5, D), steps=4, seed=0),
    "flow": lambda sc: ou().flow_ode(sc).sample((5, D), steps=4, seed=0),
    "encode": lambda sc: flow(sc).encode(states(5)),
    "decode": lambda sc: flow(sc).decode(states(5), denoise=True),
    "log_prob": lambda sc: flow(sc).log_prob(states(5)),
    "hutchinson": lambda sc: flow(sc).log_prob(states(5), probes=2, seed=0),
    "bits": lambda sc: flow(sc).bits_per_dim(torch.ones(5, D, dtype=torch.long), levels=4, low=-1.0, high=1.0, seed=0),
}


@pytest.mark.parametrize(
    "wrap", [lambda net: Score(net, ou(), predicts="noise"), lambda net: net], ids=["Score", "callable"]
)
@pytest.mark.parametrize("act", MOODY.values(), ids=[f"{name}" for name in MOODY])
@pytest.mark.filterwarnings("ignore::sdeflow.errors.PriorMismatchWarning")
def test_networks_run_in_eval_mode_and_are_put_back(act, wrap):
    net = Moody()
    score = wrap(net)
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert modes.count(True) == 3 and not net.frozen.training
    first, second = act(score), act(score)
    assert torch.equal(first, second), "dropout was on"
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    net.eval()
    assert torch.equal(act(score), first)


def test_modes_are_put_back_after_an_error():
    net = Moody()
    for act in (
        lambda: reverse(net).sample((4, D), "euler", 3, dtype=torch.float64),
        lambda: flow(net).log_prob(with_nan()),
    ):
        with pytest.raises((RuntimeError, SdeflowError)):
            act()
        assert net.training and net.norm.training and net.drop.training and not net.frozen.training


@pytest.mark.parametrize("n", [1, D, 5])
def test_networks_see_one_time_per_sample(n):
    seen = []

    def net(x, t):
        seen.append((tuple(x.shape), tuple(t.shape), x.dtype, t.dtype))
        return -x * t[:, None]

    times = torch.linspace(0.5, 2.5, n, dtype=torch.float64)
    x = states(n)
    for score in (Score(net, ou(), predicts="noise"), ou().reverse(net).model.score):
        together = score(x, times)
        alone = torch.cat([score(x[i : i + 1], float(times[i])) for i in range(n)])
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    reverse(net).sample((n, D), steps=3, seed=0)
    flow(net).log_prob(x)
    assert all(of_t == (of_x[0],) and of_x[1:] == (D,) and a == b for of_x, of_t, a, b in seen)


@pytest.mark.parametrize("n", [1, D, 5])
def test_kernel_takes_one_time_per_sample(n):
    times = torch.linspace(0.5, 2.5, n, dtype=torch.float64)
    mean, std = ou().kernel.moments(states(n), times)
    for i in range(n):
        torch.testing.assert_close(mean[i], states(n)[i] * math.exp(-float(times[i]) / 2), rtol=1e-6, atol=0)
        assert float(std.expand(n, D)[i, 0]) == pytest.approx(math.sqrt(-math.expm1(-float(times[i]))), rel=1e-6)


@pytest.mark.parametrize(
    "act",
    [lambda sc: flow(sc).sample((4, D), seed=0, max_calls=400), lambda sc: flow(sc).log_prob(states(), max_calls=400)],
    ids=["sample", "log_prob"],
)
def test_random_network_in_an_adaptive_method_meets_the_budget(act):
    generator = torch.Generator().manual_seed(0)

    def score(x, t):
        return -x * (1 + torch.rand(x.shape, generator=generator))

    with pytest.raises(MaxStepsError, match="randomness") as caught:
        act(score)
    error = caught.value
    if error.bad_rows:  # log p on finer and finer grids
        assert error.nfe <= 400 and error.bad_rows == [0, 1, 2, 3]
    else:
        assert error.nfe == 400 and ou().cutoff <= error.t <= 3 and error.partial is not None


def test_network_that_changes_x_changes_nothing():
    def rude(x, t):
        return x.mul_(-1.0)

    for predicts in ("score", "noise", "data", "v", "velocity", "edm"):
        x = states()
        polite = Score(lambda x, t: -x, ou(), predicts=predicts)(states(), 1.0)
        assert torch.equal(Score(rude, ou(), predicts=predicts)(x, 1.0), polite), predicts
        assert torch.equal(x, states()), predicts
    assert torch.equal(reverse(rude).sample((4, D), steps=5, seed=0), reverse().sample((4, D), steps=5, seed=0))
    assert torch.equal(flow(rude).sample((4, D), seed=0), flow().sample((4, D), seed=0))
    x = states()
    torch.testing.assert_close(flow(rude).log_prob(x), flow().log_prob(states()))
    assert torch.equal(x, states())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time_is", ["t", "log_snr"])
def test_network_that_changes_its_time_changes_nothing(time_is, dtype):
    def rude(x, t):
        return -x * t.mul_(2.0)[:, None]

    times = torch.linspace(0.5, 2.5, 4, dtype=dtype)
    score = Score(rude, ou(), predicts="noise", time=time_is)
    polite = Score(lambda x, t: -x * 2 * t[:, None], ou(), predicts="noise", time=time_is)
    assert torch.equal(score(states(dtype=dtype), times), polite(states(dtype=dtype), times))
    assert torch.equal(times, torch.linspace(0.5, 2.5, 4, dtype=dtype))
    assert torch.equal(score(states(dtype=dtype), 1.0), polite(states(dtype=dtype), 1.0))


def test_frozen_network_samples():
    score = small_score().requires_grad_(False)
    assert bool(torch.isfinite(reverse(score).sample((4, D), steps=5, seed=0)).all())
    assert bool(torch.isfinite(flow(score).log_prob(states())).all())


# ------------------------------------------------------------------ training


class Stop(Exception):
    pass


def stop_at(step, steps):
    def schedule(done):
        if round(done * steps) == step:
            raise Stop
        return 1.0

    return schedule


def steady(done):
    return 1.0


def weights(score):
    return {name: value.clone() for name, value in score.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_unscaled_data_warns():
    with pytest.warns(DataScaleWarning, match="standard deviation is"):
        train(small_score(), states(32) * 100 + 3, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataScaleWarning)
        train(small_score(), states(32), steps=1)


class Sick(nn.Module):
    """NaN (or an infinite gradient) at the given calls in training."""

    def __init__(self, net, calls, backward=False):
        super().__init__()
        self.net, self.calls, self.backward, self.count = net, calls, backward, 0

    def forward(self, x, t):
        out = self.net(x, t)
        if not self.training:
            return out
        self.count += 1
        if self.count - 1 not in self.calls:
            return out
        if self.backward:
            out.register_hook(lambda gradient: gradient * math.inf)
            return out
        return out * math.nan


@pytest.mark.parametrize("backward", [False, True], ids=["loss", "gradient"])
def test_one_bad_step_is_skipped(backward):
    score = small_score(net=Sick(Net(), {2}, backward))
    result = train(score, steps=6)
    assert result.skipped == 1 and result.steps == 6
    assert [math.isnan(loss) for loss in result.losses] == [i == 2 for i in range(6)]
    assert all(bool(torch.isfinite(value).all()) for value in weights(score).values() if value.is_floating_point())


@pytest.mark.parametrize("backward", [False, True], ids=["loss", "gradient"])
def test_bad_steps_update_nothing(backward, tmp_path):
    torch.manual_seed(0)
    score = small_score(net=Sick(Net(), range(3, 99), backward))
    seen = []

    def schedule(done):
        seen.append(weights(score.net))
        return 1.0

    with pytest.raises(TrainingDivergedError, match="10 steps") as caught:
        train(score, steps=50, schedule=schedule, out=tmp_path / "run", checkpoint_every=1)
    assert "step 12" in str(caught.value) and str(tmp_path / "run") in str(caught.value)
    assert len(seen) == 13
    assert not same(seen[2], seen[3])
    assert all(same(seen[3], later) for later in seen[4:])
    assert not score.training and bool(torch.isfinite(score(states(), 1.0)).all())  # the average is what remains


def test_no_checkpoint_is_named_where_there_is_none(tmp_path):
    score = small_score(net=Sick(Net(), range(99)))
    with pytest.raises(TrainingDivergedError) as caught:
        train(score, steps=50, out=tmp_path / "run")
    assert "the last checkpoint is in" not in str(caught.value)


def test_bad_step_does_not_poison_buffers():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.net, self.count = nn.BatchNorm1d(D), Net(), 0

        def forward(self, x, t):
            self.count += self.training
            return self.net(self.norm(x * (math.nan if self.count == 3 and self.training else 1.0)), t)

    score = small_score(net=Early())
    result = train(score, steps=6)
    assert result.skipped == 1
    assert bool(torch.isfinite(score.net.norm.running_mean).all())
    assert bool(torch.isfinite(score(states(), 1.0)).all())


def _killed_at(line, action):
    """Runs ``action`` in a process that is killed at its ``line``-th line; whether it got that far."""
    child = os.fork()
    if child == 0:
        files, count = (sdeflow.training.checkpoint.__file__, shutil.__file__), 0

        def trace(frame, event, arg):
            nonlocal count
            if frame.f_code.co_filename not in files:
                return None
            count += event == "line"
            if count == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step"])
def test_kill_at_any_line_of_a_save_leaves_a_whole_checkpoint(step, tmp_path):
    old, new = torch.zeros(64), torch.ones(64)

    def save():
        write_checkpoint(folder, step, {"identity": {}}, {"a": {"w": new}, "b": {"w": new}})

    line, killed = 1, 0
    while True:
        folder = tmp_path / str(line)
        write_checkpoint(folder, 1, {"identity": {}}, {"a": {"w": old}, "b": {"w": old}})
        if not _killed_at(line, save):
            break
        killed += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = latest_checkpoint(folder)
        assert found is not None, f"killed at line {line}: nothing left"
        values = {float(group["w"].mean()) for group in found[1].values()}
        assert values in ({0.0}, {1.0}), f"killed at line {line}: a mixture of two checkpoints"
        line += 1 if line < 30 else 9
    assert killed > 20
    state, tensors = latest_checkpoint(folder)
    assert state["step"] == step and torch.equal(tensors["a"]["w"], new)


def test_half_written_file_is_passed_over(tmp_path):
    write_checkpoint(tmp_path, 1, {}, {"a": {"w": torch.zeros(64)}})
    last = write_checkpoint(tmp_path, 2, {}, {"a": {"w": torch.ones(64)}})
    whole = (last / "a.safetensors").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (last / "a.safetensors").write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="step-00000002"):
            state, _ = latest_checkpoint(tmp_path)
        assert state["step"] == 1


def score_with_everything(seed=0):
    torch.manual_seed(seed)
    return small_score(seed, net=Net(middle=nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3))))


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["tensor", "dataset"])
def test_resumed_run_is_the_uninterrupted_one(stop, kind, tmp_path):
    rows = states(20)
    data = rows if kind == "tensor" else Rows(list(rows))
    whole = score_with_everything()
    expected = train(whole, data, steps=6, schedule=steady)
    score = score_with_everything()
    with pytest.raises(Stop):
        train(score, data, steps=6, schedule=stop_at(stop, 6), out=tmp_path, checkpoint_every=1)
    again = score_with_everything(seed=5)
    options = {"schedule": steady, "allow": ["schedule"], "checkpoint_every": 1}
    result = train(again, data, steps=6, out=tmp_path, resume=True, **options)
    assert result.steps == 6 and result.losses == expected.losses
    assert same(weights(again), weights(whole))


CHANGES = {
    "sde": (lambda: small_score(sde=SDE(f=-x, g=1, T=3)), {}, "f:"),
    "horizon": (lambda: small_score(sde=SDE(f=-x / 2, g=1, T=2)), {}, "T:"),
    "cutoff": (lambda: small_score(sde=SDE(f=-x / 2, g=1, T=3, cutoff=0.01)), {}, "cutoff"),
    "batch-size": (small_score, {"batch_size": 16}, "batch_size: 8 there, 16 here"),
    "seed": (small_score, {"seed": 1}, "seed: 0 there, 1 here"),
    "network": (lambda: small_score(width=9), {}, "network"),
    "predicts": (lambda: small_score(predicts="v"), {}, "predicts: 'noise' there, 'v' here"),
}


@pytest.mark.parametrize("name", CHANGES, ids=[f"{34 if n == 'predicts' else 50}-{n}" for n in CHANGES])
def test_resuming_another_run_lists_the_differences(name, tmp_path):
    train(small_score(), steps=2, out=tmp_path)
    make, options, words = CHANGES[name]
    score = make()
    before = weights(score.net)
    with pytest.raises(CheckpointMismatch) as caught:
        train(score, steps=4, out=tmp_path, resume=True, **options)
    assert words in str(caught.value)
    assert same(before, weights(score.net)), "the network was changed all the same"


def test_second_run_in_one_folder_is_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def second():
        try:
            train(small_score(), steps=1, out=tmp_path)
            sender.send(None)
        except Exception as error:
            sender.send((isinstance(error, CheckpointError), str(error)))

    def schedule(done):
        if done == 0.5:
            process = context.Process(target=second)
            process.start()
            process.join(30)
        return 1.0

    train(small_score(), steps=4, schedule=schedule, out=tmp_path, checkpoint_every=1)
    assert receiver.poll(1)
    outcome = receiver.recv()
    assert outcome is not None, "two runs wrote one folder"
    assert outcome[0] and str(tmp_path) in outcome[1]


def test_average_has_the_buffers():
    data = states(64) * 2 + 5
    net = nn.BatchNorm1d(D, momentum=0.5)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.net = net, Net()

        def forward(self, x, t):
            return self.net(self.norm(x), t)

    sde = SDE(f=-x / 1000, g=_q(1, 10), T=1)  # barely moves the data: the running mean is the data's
    score = small_score(sde=sde, net=Normed(), predicts="score")
    train(score, data, steps=40, ema=0.5)
    assert int(score.net.norm.num_batches_tracked) == 40
    torch.testing.assert_close(score.net.norm.running_mean, data.mean(0), rtol=0.25, atol=0)


def test_resuming_twice_from_one_checkpoint_gives_one_result(tmp_path):
    with pytest.raises(Stop):
        train(small_score(), steps=6, schedule=stop_at(3, 6), out=tmp_path / "run", checkpoint_every=1)
    results = []
    for i in range(2):
        shutil.copytree(tmp_path / "run", tmp_path / str(i))
        score = small_score(seed=i)
        train(score, steps=6, schedule=steady, out=tmp_path / str(i), resume=True, allow=["schedule"])
        results.append(weights(score))
    assert same(*results)


@pytest.mark.parametrize("sde", [ou, catalog.VP, catalog.VE, catalog.FlowMatching], ids=["OU", "VP", "VE", "FM"])
def test_training_times_stay_in_the_horizon(sde):
    score = Score(Net(), sde(), predicts="noise")
    cutoff, T = score.kernel.cutoff, score.kernel.T
    for times, n in (("t", 2**20), ("log_snr", 2**16)):
        drawn = torch.cat([training_times(score.kernel, n, times, seed) for seed in range(2)])
        assert cutoff <= float(drawn.min()) and float(drawn.max()) <= T
        assert float(drawn.min()) < cutoff + 1e-3 * T and float(drawn.max()) > T * (1 - 1e-3)
        score.kernel.require_times(drawn.float())


# ------------------------------------------------------------------ sampling


def test_nothing_asked_nothing_returned():
    for make in (reverse, flow):
        for dtype in (torch.float32, torch.float64):
            out = make().sample((0, 2, D), seed=0, dtype=dtype)
            assert out.shape == (0, 2, D) and out.dtype == dtype
    assert flow().encode(torch.zeros(0, D)).shape == flow().decode(torch.zeros(0, D)).shape == (0, D)
    assert flow().log_prob(torch.zeros(0, D)).shape == (0,)
    assert flow().log_prob(torch.zeros(0, D), probes=2, full=True).value.shape == (0,)
    assert mixture().sample(0, seed=0).shape == (0, D)
    assert ou().kernel.sample(torch.zeros(0, D), 1.0, seed=0).shape == (0, D)


def test_options_are_checked_even_so():
    with pytest.raises(ValueError, match="leapfrog"):
        flow().sample((0, D), "leapfrog")
    with pytest.raises(ValueError, match="leapfrog"):
        reverse().sample((0, D), "leapfrog", 5)


@pytest.mark.parametrize(
    "solve",
    [
        lambda: flow(mixture()).sample((4, D), seed=0, rtol=1e-6, atol=1e-6, max_calls=15),
        lambda: flow(mixture()).encode(states(), "dopri8", rtol=1e-6, atol=1e-6, max_calls=15),
        lambda: flow(mixture()).decode(states(), "scipy_solver", rtol=1e-6, atol=1e-6, max_calls=15),
        lambda: reverse(mixture()).sample((4, D), seed=0, rtol=1e-2, atol=1e-2, max_calls=15),
    ],
    ids=["dopri5", "dopri8", "scipy", "torchsde"],
)
def test_budget(solve):
    with pytest.raises(MaxStepsError, match="budget of 15 calls") as caught:
        solve()
    error = caught.value
    assert error.nfe == 15 and ou().cutoff <= error.t <= 3 and error.partial.shape == (4, D)
    assert f"t = {error.t:.6g}" in str(error)


def explosive(x, t):
    return 1e4 * x


def blow_up(x, t):
    return x**3


def stiff(x, t):
    return -1e9 * (x - torch.cos(100 * t)[:, None])


TROUBLE = {"explosive": explosive, "blow-up": blow_up}


@pytest.mark.parametrize("score", TROUBLE.values(), ids=TROUBLE.keys())
@pytest.mark.parametrize("solve", SOLVES.values(), ids=[f"{name}" for name in SOLVES])
def test_explosion_is_an_error_with_its_time(solve, score):
    with pytest.raises(SolverError) as caught:
        solve(lambda x, t: score(x, t) + (x if score is blow_up else 0), 4)
    error = caught.value
    assert ou().cutoff <= error.t <= 3 and error.nfe >= 1 and f"t = {error.t:.6g}" in str(error)


@pytest.mark.parametrize("method", ADAPTIVE_ODE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stiffness_is_an_error_or_the_truth(method, dtype):
    try:
        out = flow(stiff).decode(states(dtype=dtype), method, max_calls=600)
    except (StepUnderflowError, MaxStepsError, NonFiniteStateError) as error:
        assert ou().cutoff <= error.t <= 3 and error.nfe <= 600
    else:  # the slow manifold
        assert float((out - 1).abs().max()) < 1e-2


@pytest.mark.parametrize("scipy_method", ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"])
def test_scipy_never_returns_the_start_as_the_end(scipy_method):
    solver = Torchdiffeq("scipy_solver", scipy_method)
    with pytest.raises(SolverError) as caught:
        flow(explosive).decode(states(2, dtype=torch.float64), solver, max_calls=600)
    assert "t = " in str(caught.value)
    z = states(2, dtype=torch.float64)
    truth = flow().decode(z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow().decode(z, solver, rtol=1e-7, atol=1e-7), truth, rtol=1e-4, atol=1e-4)


HORIZONS = {"VP": catalog.VP, "FlowMatching": catalog.FlowMatching, "VE": catalog.VE, "EDM": catalog.EDM}
ALL_METHODS = [
    *(("sde", m, False) for m in Torchsde.methods),
    *(("sde", m, True) for m in Torchsde.methods),
    *(("ode", m, Torchdiffeq(m).adaptive) for m in Torchdiffeq.methods),
]


@functools.cache
def horizon(name):
    sde = HORIZONS[name]()
    return sde, mixture(sde, 1)


@pytest.mark.parametrize(
    ("kind", "method", "adaptive"),
    ALL_METHODS,
    ids=[f"{k}-{m}{'-adaptive' if a else ''}" for k, m, a in ALL_METHODS],
)
def test_times_stay_in_the_horizon(kind, method, adaptive):
    options = {"rtol": 1e-2, "atol": 1e-2, "max_calls": 3000} if adaptive else {"steps": 7}
    if method in ("implicit_adams", "fixed_adams"):  # whose inner iteration must converge
        options = {"rtol": 1e-1, "atol": 1e-1, "steps": 60}
    for name in ("VP", "FlowMatching") if kind == "sde" and adaptive else HORIZONS:
        sde, truth = horizon(name)
        seen = []

        def score(x, t, truth=truth, seen=seen):
            seen.extend((float(t.min()), float(t.max())))
            return truth(x, t)

        prior = sde.prior_for(*truth.data_moments())
        if kind == "sde":
            sde.reverse(score, prior=prior).sample((2, 1), method, seed=0, dtype=torch.float64, **options)
        else:
            flow = sde.flow_ode(score, prior=prior)
            back = flow.sample((2, 1), method, seed=0, dtype=torch.float64, **options)
            flow.encode(back, method, grid="t" if name == "VP" else None, **options)
        assert len(seen) > 10
        assert sde.cutoff <= min(seen) and max(seen) <= sde.T, name


@pytest.mark.parametrize("method", Torchsde.methods)
def test_sample_does_not_depend_on_its_batch(method):
    few = reverse().sample((5, D), method, 8, seed=3)
    many = reverse().sample((1500, D), method, 8, seed=3)
    again = reverse().sample((1500, D), method, 8, seed=3)
    assert torch.equal(many, again)
    assert torch.equal(few, many[:5])
    assert not torch.equal(few, reverse().sample((5, D), method, 8, seed=4))
    assert len({float(v) for v in many[:, 0]}) == 1500


@pytest.mark.parametrize("method", FIXED_ODE)
def test_flow_sample_does_not_depend_on_its_batch(method):
    few, many = (flow().sample((n, D), method, 8, seed=3) for n in (5, 1500))
    assert torch.equal(few, many[:5])


@pytest.mark.parametrize("method", [m for m in ADAPTIVE_ODE if m != "scipy_solver"])
def test_adaptive_flow_depends_on_its_batch_by_the_tolerance_only(method):
    truth = mixture()
    few, many = (ou().flow_ode(truth).sample((n, D), method, seed=3, dtype=torch.float64) for n in (5, 200))
    assert float((few - many[:5]).abs().max()) < 1e-3


def test_adaptive_sde_is_reproducible():
    one, two = (reverse().sample((4, D), rtol=0.05, atol=0.05, seed=3) for _ in range(2))
    assert torch.equal(one, two)


def test_generator_and_global_seed_are_seeds_too():
    by_generator = [reverse().sample((4, D), steps=5, seed=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*by_generator)
    by_global = []
    for _ in range(2):
        torch.manual_seed(11)
        by_global.append(reverse().sample((4, D), steps=5))
    assert torch.equal(*by_global) and not torch.equal(by_global[0], reverse().sample((4, D), steps=5))


def test_other_noise_with_the_same_seed():
    prior, path = (NoiseStream(0, purpose).normal((1000, 1))[:, 0] for purpose in ("prior", "path"))
    assert abs(float(torch.corrcoef(torch.stack([prior, path]))[0, 1])) < 0.15


RANDOM = {
    "declare": lambda: SDE(f=-x / 2 * (1 + t), g=1),
    "reverse": lambda: reverse().sample((4, D), steps=3, seed=0),
    "reverse-generator": lambda: reverse().sample((4, D), steps=3, seed=torch.Generator().manual_seed(0)),
    "reverse-srk": lambda: reverse().sample((4, D), "srk", 3, seed=0),
    "reverse-adaptive": lambda: reverse().sample((4, D), rtol=0.1, atol=0.1, seed=0),
    "prior-read-off": lambda: ou().reverse(exact).sample((4, D), steps=3, seed=0),
    "flow": lambda: flow().sample((4, D), seed=0),
    "log-prob-exact": lambda: flow().log_prob(states()),
    "log-prob-hutchinson": lambda: flow().log_prob(states(), probes=2, seed=0),
    "bits": lambda: flow().bits_per_dim(torch.ones(4, D, dtype=torch.long), levels=4, low=-1.0, high=1.0, seed=0),
    "kernel": lambda: ou().kernel.sample(states(), 1.0, seed=0),
    "mixture": lambda: mixture().sample(4, seed=0),
    "fit": None,
}


@pytest.mark.parametrize("act", RANDOM.values(), ids=[f"{name}" for name in RANDOM])
def test_global_random_states_stay_as_they_were(act, request):
    if "fit" in request.node.name:  # the network's initial weights are the user's own draw
        act = functools.partial(train, score_with_everything(), steps=2, seed=0)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    act()
    assert torch.equal(before[0], torch.get_rng_state()), "torch"
    assert before[1] == np.random.get_state()[1].tolist(), "numpy"
    assert before[2] == random.getstate(), "random"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_integrated_in_float32(dtype):
    z = states(8)
    narrow = flow(mixture()).decode(z.to(dtype))
    wide = flow(mixture()).decode(z.to(dtype).float())
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.float(), wide, rtol=0.03, atol=0.03)
    for solver, steps in (("euler", 200), ("srk", 50)):
        narrow = reverse(mixture()).sample((8, D), solver, steps, seed=0, dtype=dtype)
        assert narrow.dtype == dtype and bool(torch.isfinite(narrow).all())
    value = flow(mixture()).log_prob(z.to(dtype))
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, flow(mixture()).log_prob(z.to(dtype).float()), rtol=0.05, atol=0.1)


@pytest.mark.slow
def test_100_000_steps_need_no_stack_and_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = Problem(
        Field(lambda y, t: -y, Diffusion(lambda y, t: torch.ones_like(y))), Clock(0.0, 1.0), backward=True,
        watch=Watch(100_001), noise=NoiseStream(0, "path"),
    )  # fmt: skip
    out = Torchsde("euler").solve(problem, torch.ones(1, 1), 100_000, 1e-3, 1e-3)
    assert 100_000 <= problem.nfe <= 100_001
    assert bool(torch.isfinite(out).all())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30_000, f"{grown} kB"


def test_adaptive_solve_needs_no_stack():
    solver = Torchsde("euler", adaptive=True, initial_steps=20_000)
    with pytest.raises(MaxStepsError):  # torchsde's own Brownian motion would raise RecursionError at call 101
        reverse().sample((1, 1), solver, seed=0, max_calls=1000)


OPTIMISED = """
    import math, sys, torch, signal
    signal.setitimer(signal.ITIMER_PROF, 60)  # seconds of processor time, which end the process
    torch.set_num_threads(1)
    assert False, "this runs without -O"
    from sdeflow import SDE, Gaussian, x
    from sdeflow.errors import *
    sde, prior = SDE(f=-x / 2, g=1, T=3), Gaussian(0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    def nan(x, t): return torch.where(t[:, None] <= 0.5, torch.full_like(x, math.nan), -x)
    def explosive(x, t): return 1e4 * x
    def stiff(x, t): return -1e9 * (x - torch.cos(100 * t)[:, None])
    def noisy(x, t): return -x * (1 + torch.rand(x.shape, generator=generator))
    def check(name, kinds, act):
        try:
            out = act()
        except kinds as error:
            if not (isinstance(error, ValueError) or sde.cutoff <= error.t <= 3):
                raise
            print("ok", name)
        else:
            print("SILENT", name, out)
    gone = (NonFiniteStateError, StepUnderflowError, MaxStepsError)
    for m in ("dopri5", "scipy_solver"):
        flow = lambda score: sde.flow_ode(score, prior=prior)
        check("nan " + m, NonFiniteStateError, lambda: flow(nan).sample((4, 3), m, seed=0))
        check("explosive " + m, gone, lambda: flow(explosive).sample((4, 3), m, seed=0, max_calls=400))
        check("stiff " + m, gone, lambda: flow(stiff).sample((4, 3), m, seed=0, max_calls=400))
        check("budget " + m, MaxStepsError, lambda: flow(noisy).sample((4, 3), m, seed=0, max_calls=100))
    for m in ("euler", "rk4"):
        check("nan " + m, NonFiniteStateError, lambda: flow(nan).sample((4, 3), m, 60, seed=0))
        check("explosive " + m, gone, lambda: flow(explosive).sample((4, 3), m, 60, seed=0))
    for m in ("euler", "srk", "midpoint"):
        rev = lambda score: sde.reverse(score, prior=prior)
        check("nan sde " + m, NonFiniteStateError, lambda: rev(nan).sample((4, 3), m, 60, seed=0))
        check("explosive sde " + m, gone, lambda: rev(explosive).sample((4, 3), m, 60, seed=0))
    for score, name in ((nan, "nan"), (explosive, "explosive"), (noisy, "noisy")):
        adaptive = lambda: rev(score).sample((4, 3), rtol=1e-3, atol=1e-3, seed=0, max_calls=200)
        check(name + " adaptive sde", gone, adaptive)
    check("log_prob", gone, lambda: flow(explosive).log_prob(torch.ones(4, 3), max_calls=400))
    check("steps", ValueError, lambda: flow(nan).sample((4, 3), "rk4", 0))
    check("tolerance", ValueError, lambda: flow(nan).sample((4, 3), rtol=0.0))
    check("data", ValueError, lambda: flow(nan).log_prob(torch.full((4, 3), math.nan)))
    print("end")
"""


@pytest.mark.slow
def test_faults_are_found_under_python_O():
    done = subprocess.run(
        [sys.executable, "-O", "-c", textwrap.dedent(OPTIMISED)],
        capture_output=True, text=True, cwd=PACKAGE.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1:] == ["end"], done.stdout + done.stderr
    assert all(line.startswith("ok") for line in lines[:-1]), done.stdout
    assert len(lines) == 8 + 4 + 6 + 3 + 4 + 1


def test_nothing_is_validated_by_assert():
    for path in PACKAGE.rglob("*.py"):
        asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not asserts, f"{path}: assert in lines {asserts}"


# ------------------------------------------------------------------ likelihood


def test_large_events_are_estimated_by_default():
    result = flow().log_prob(torch.zeros(2, 4097), solver="rk4", steps=2, full=True, seed=0)
    assert result.value.shape == (2,) and bool(torch.isfinite(result.value).all())
    assert bool((result.stderr >= 0).all())


def swirl(x, t):
    """A score with a Jacobian of which Hutchinson's estimate has a spread."""
    return -x + 0.3 * torch.tanh(x.roll(1, 1)) * torch.exp(-t)[:, None]


def test_hutchinson_is_calibrated():
    x, n = states(2, 6, torch.float64), 100
    truth = flow(swirl).log_prob(x, trace="exact")
    for probe in ("rademacher", "gaussian"):  # each repeated sample has probes of its own
        result = flow(swirl).log_prob(x.repeat(n, 1), probes=8, probe=probe, seed=0, full=True, rtol=1e-4, atol=1e-4)
        values, errors = result.value.reshape(n, 2), result.stderr.reshape(n, 2)
        # A bar is a standard error, widened by Student's t; it is the former that has to be the values' spread.
        spread = errors.square().mean(0).sqrt() / widening(torch.tensor(spread_dof(8), dtype=torch.float64))
        assert bool((spread > 1e-3).all()), probe
        assert bool(((values.mean(0) - truth).abs() < 4 * spread / math.sqrt(n)).all()), probe
        assert bool((values.std(0) < 2 * spread).all() and (values.std(0) > spread / 2).all()), probe
        covered = ((values - truth).abs() <= 2 * errors).double().mean()
        assert float(covered) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / values.numel()), probe


def test_probes_are_fixed_over_a_solve():
    x = states(4, 6)
    exact_calls = flow(swirl).log_prob(x, trace="exact", full=True).nfe
    for probe in ("rademacher", "gaussian"):
        result = flow(swirl).log_prob(x, probes=1, probe=probe, seed=0, full=True)
        assert result.nfe < 5 * exact_calls  # redrawn at each call, they would take tens of thousands
        assert bool(torch.isnan(result.stderr).all()), "one probe says nothing of its error"
    one, two = (flow(swirl).log_prob(x, probes=2, seed=0) for _ in range(2))
    assert torch.equal(one, two)


def test_noisy_trace_warns():
    def rough(x, t):
        return -x + 3 * torch.tanh(x.roll(1, 1))

    with pytest.warns(TraceErrorWarning, match="nats"):
        flow(rough).log_prob(states(4, 40), probes=2, seed=0, rtol=1e-3, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow(rough).log_prob(states(4, 6), trace="exact", rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"probes": 2, "seed": 0}, {"probes": 1, "seed": 0}], ids=["exact", "two", "one"]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_log_prob_where_gradients_are_off(mode, options):
    score = small_score()
    expected = flow(score).log_prob(states(), **options)
    with mode():
        inside = flow(score).log_prob(states(), **options)
        x = states() + 0.0
    assert torch.equal(expected, inside)
    assert torch.equal(expected, flow(score).log_prob(x, **options)), "x made inside"
    assert not expected.requires_grad and all(p.grad is None for p in score.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_solves_where_gradients_are_off(mode):
    score, images = small_score(), torch.ones(4, D, dtype=torch.long)
    acts = (
        lambda: reverse(score).sample((4, D), steps=3, seed=0),
        lambda: flow(score).sample((4, D), steps=4, seed=0),
        lambda: flow(score).bits_per_dim(images, levels=4, low=-1.0, high=1.0, seed=0),
        lambda: ou().flow_ode(exact).log_prob(states()),
    )
    for act in acts:
        expected = act()
        with mode():
            assert torch.equal(expected, act())


def test_log_prob_leaves_x_alone():
    x = states().requires_grad_(True)
    flow(small_score()).log_prob(x)
    assert x.grad is None and x.requires_grad


def test_bits_have_no_hidden_offset():
    levels, low, high = 32, -4.0, 4.0
    images = torch.arange(12, 20)[:, None].expand(-1, D).contiguous()
    edges = low + (high - low) * torch.arange(levels + 1, dtype=torch.float64) / levels
    mass = torch.special.ndtr(edges[1:]) - torch.special.ndtr(edges[:-1])
    bits = flow().bits_per_dim(images, levels=levels, low=low, high=high, seed=0)
    assert bits.shape == (8,)
    expected = -mass[images[:, 0]].log2()
    # Within a bin of 1/4 log p varies by no more than 1/4 nat; three coordinates are averaged.
    assert float((bits - expected).abs().max()) < 0.25
    assert float((bits - expected).mean().abs()) < 0.05


def test_solver_that_does_not_converge_gives_no_number():
    for solver in ("dopri5", "scipy_solver", "bosh3"):
        with pytest.raises(SolverError) as caught:
            flow(stiff).log_prob(states(), solver=solver, max_calls=600)
        assert caught.value.nfe >= 1
    with pytest.raises(SolverError):
        flow(stiff).log_prob(states(), solver="implicit_adams", steps=5)


def test_error_of_a_loose_solve_is_reported():
    result = flow(mixture()).log_prob(states(8), rtol=1e-2, atol=1e-2, full=True)
    tight = flow(mixture()).log_prob(states(8).double(), rtol=1e-8, atol=1e-8)
    assert bool((result.solver_error > 0).all())
    assert float((result.value - tight).abs().max()) < 10 * float(result.solver_error.max())


@pytest.mark.parametrize("method", ["rk4", "dopri5", "euler"])
def test_an_error_of_the_users_own_arrives_as_it_is(method):
    def score(state, time):
        assert state.shape[1] == 7, "my network wants 7 channels"
        return -state

    options = {} if method == "dopri5" else {"steps": 4}
    with pytest.raises(AssertionError, match="7 channels"):
        catalog.VP().flow_ode(score, prior=catalog.VP().prior).sample((2, 2), method, **options)
    with pytest.raises(AssertionError, match="7 channels"):
        catalog.VP().reverse(score, prior=catalog.VP().prior).sample((2, 2), "heun", steps=4)
