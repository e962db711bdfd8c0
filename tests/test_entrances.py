"""What users hand in: one rule at every entrance, held by a table of (entrance, input).

An entrance is a public function of a state, ``call(x)``, of a time, ``call(t)``, or of an x_0 beside an x_t. What
can be converted gives the tensor's result; everything else is an error that says what was given, and never a number.
"""

import functools
import inspect
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from torch import nn

import sdeflow
from sdeflow import SDE, Gaussian, Score, SdeflowError, catalog, fit, state, t, x
from sdeflow.errors import DataError, DeclarationError, HiddenParametersWarning, ScheduleError, ScoreError
from sdeflow.kernels.bridge import ReducibleBridge
from sdeflow.likelihood.dequantisation import Uniform
from sdeflow.numerics.basis import DCT, Orthogonal
from sdeflow.numerics.checks import checked_start, checked_state, checked_time
from sdeflow.scores import GaussianMixture
from sdeflow.scores.thresholded import Thresholded
from sdeflow.solving.latents import spherical
from sdeflow.symbolic.declaration import declare
from sdeflow.symbolic.path import declare_path
from sdeflow.training.losses import denoising_score_matching

D = 2
HERE = str(Path(__file__))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(D + 1, D)

    def forward(self, x, t, y=None):
        return self.layer(torch.cat([x, t[:, None] / 10], 1))


@functools.cache
def ou():
    return SDE(-x, sp.sqrt(2), T=2)


@functools.cache
def mixture(sde=None):
    return GaussianMixture(sde or ou(), [[0.0, 1.0], [-1.0, 0.5]], [0.3, 0.2])


@functools.cache
def geometric():
    return SDE(x, x / 2).kernel


def geometric_bridge(x_T):
    return ReducibleBridge(geometric(), x_T)


@functools.cache
def cir():
    return SDE(1 - x, sp.sqrt(x)).kernel


@functools.cache
def network():
    return Score(Net(), ou(), data_mean=0.0, data_std=1.0).eval()


@functools.cache
def cld():
    return catalog.CriticallyDampedLangevin()


@functools.cache
def general():
    return SDE(-(x**3), 1, T=3)


@functools.cache
def flow(score=None):
    return ou().flow_ode(score or mixture())


@functools.cache
def reverse():
    return ou().reverse(mixture())


@functools.cache
def fitted():
    return general().fit_prior(torch.randn(100, D, generator=torch.Generator().manual_seed(0)), n=50, steps=60, seed=0)


@functools.cache
def pushed():
    return SDE(x, x / 2).flow_ode(lambda x, t: -(torch.log(x) + 1) / x).model.prior_for(torch.ones(1, D))


@functools.cache
def stationary():
    return general().flow_ode(lambda x, t: -x).model.prior_for(torch.ones(1, D))


def ones(like):
    return torch.ones(len(like), D, dtype=torch.float64)


# Functions of one state (3, 2) of numbers between 0 and 1. Each returns a tensor, or a tuple of them.
STATES = {
    "mixture": lambda x: mixture()(x, 0.5),
    "mixture.denoise": lambda x: mixture().denoise(x, 0.5),
    "mixture.noise": lambda x: mixture().noise(x, 0.5),
    "mixture.log_prob": lambda x: mixture().log_prob(x, 0.5),
    "callable": lambda x: ou().bind(lambda x, t: -x)._score(x, 0.5),
    "callable.denoise": lambda x: ou().bind(lambda x, t: -x)._score.denoise(x, 0.5),
    "callable of a general SDE": lambda x: general().bind(lambda x, t: -x)._score(x, 0.5),
    "network": lambda x: network()(x, 0.5),
    "network.denoise": lambda x: network().denoise(x, 0.5),
    "network.noise": lambda x: network().noise(x, 0.5),
    "network.given": lambda x: network().given(0)(x, 0.5),
    "thresholded": lambda x: Thresholded(mixture(), (-1, 1))(x, 0.5),
    "thresholded.denoise": lambda x: Thresholded(mixture(), (-1, 1)).denoise(x, 0.5),
    "thresholded.in_range": lambda x: Thresholded(mixture(), (-1, 1)).in_range(x),
    "kernel.moments": lambda x: ou().kernel.moments(x, 0.5),
    "kernel.sample": lambda x: ou().kernel.sample(x, 0.5, seed=0),
    "kernel.sample, noise": lambda x: ou().kernel.sample(torch.zeros(3, D), 0.5, noise=x),
    "kernel.log_prob": lambda x: ou().kernel.log_prob(x, 0.5, 0.5),
    "kernel.score": lambda x: ou().kernel.score(x, 0.5, 0.5),
    "kernel.log_prob, x_0": lambda x: ou().kernel.log_prob(torch.zeros(3, D), x, 0.5),
    "kernel.score, x_0": lambda x: ou().kernel.score(torch.zeros(3, D), x, 0.5),
    "kernel.lift": lambda x: ou().kernel.lift(x),
    "lift": lambda x: ou().lift(x),
    "lift, coupled": lambda x: cld().lift(x, seed=0),
    "lift, general": lambda x: general().lift(x),
    "geometric.moments": lambda x: geometric().moments(x, 0.5),
    "geometric.sample": lambda x: geometric().sample(x, 0.5, seed=0),
    "geometric.log_prob": lambda x: geometric().log_prob(x, 0.5, 0.5),
    "geometric.score": lambda x: geometric().score(x, 0.5, 0.5),
    "geometric.score, x_0": lambda x: geometric().score(torch.ones(3, D), x, 0.5),
    "geometric.transport": lambda x: geometric().transport(x, 0.5),
    "geometric.restore": lambda x: geometric().restore(x, 0.5),
    "CIR.moments": lambda x: cir().moments(x, 0.5),
    "CIR.sample": lambda x: cir().sample(x, 0.5, seed=0),
    "CIR.log_prob": lambda x: cir().log_prob(x, 0.5, 0.5),
    "CIR.score": lambda x: cir().score(x, 0.5, 0.5),
    "CIR.score, x_0": lambda x: cir().score(torch.ones(3, D), x, 0.5),
    "bridge.moments": lambda x: ou().bridge(0.3).moments(x, 0.5),
    "bridge.sample": lambda x: ou().bridge(0.3).sample(x, 0.5, seed=0),
    "bridge.paths": lambda x: ou().bridge(0.3).paths(x, [0.5, 1.0], seed=0),
    "bridge, x_T": lambda x: ou().bridge(x).moments(torch.zeros(3, D), 0.5),
    "bridge of geometric": lambda x: geometric_bridge(0.3).moments(x, 0.5),
    "bridge of geometric, x_T": lambda x: geometric_bridge(x).moments(torch.ones(3, D), 0.5),
    "simulate": lambda x: ou().simulate(x, [0.1, 0.2], steps=2, seed=0),
    "decode": lambda x: flow().decode(x, "euler", steps=2),
    "encode": lambda x: flow().encode(x, "euler", steps=2),
    "encode, network": lambda x: flow(network()).encode(x, "euler", steps=2),
    "round_trip_error": lambda x: flow().round_trip_error(x, "euler", steps=2),
    "interpolate": lambda x: flow().interpolate(x, torch.zeros(3, D), 3, "euler", steps=2),
    "latent_log_prob": lambda x: flow().latent_log_prob(x),
    "log_prob": lambda x: flow().log_prob(x, steps=3),
    "log_prob, network": lambda x: flow(network()).log_prob(x, steps=3),
    "data_log_prob": lambda x: flow().data_log_prob(x, steps=3),
    "elbo": lambda x: reverse().elbo(x, draws=2, seed=0).value,
    "kl_bound": lambda x: torch.tensor(reverse().kl_bound(x, draws=2, seed=0).value),
    "Gaussian.log_prob": lambda x: Gaussian(0.1, 2.0).log_prob(x),
    "Gaussian.whitened": lambda x: Gaussian(0.1, 2.0).whitened(x),
    "Gaussian.coloured": lambda x: Gaussian(0.1, 2.0).coloured(x),
    "FittedPrior.log_prob": lambda x: fitted().log_prob(x),
    "StationaryLaw.log_prob": lambda x: stationary().log_prob(x),
    "PushForward.log_prob": lambda x: pushed().log_prob(x),
    "spherical": lambda x: spherical(Gaussian(0.0, 1.0), x, torch.ones(3, D), 3),
    "DCT.forward": lambda x: DCT(1).forward(x),
    "DCT.inverse": lambda x: DCT(1).inverse(x),
    "Orthogonal.forward": lambda x: Orthogonal(torch.eye(D)).forward(x),
    "Orthogonal.inverse": lambda x: Orthogonal(torch.eye(D)).inverse(x),
    "denoising_score_matching": lambda x: denoising_score_matching(network(), x, [0.5] * 3, torch.zeros(3, D)),
    "MLP": lambda x: sdeflow.nets.MLP(D)(x, torch.ones(3)),
}  # fmt: skip
# Where one number may stand for all, or an event without a side is a state too.
ALSO_NUMBERS = {
    "bridge, x_T",
    "bridge of geometric, x_T",
    "geometric.transport",
    *(n for n in STATES if n.endswith("x_0")),
}
ALSO_FLAT = {
    n for n in STATES if n.startswith(("kernel.", "geometric.", "CIR.", "bridge.", "bridge of", "Gaussian."))
} - {
    "kernel.lift",
    *ALSO_NUMBERS,
}
DRAWN = re.compile("sample|paths|simulate|coupled|elbo|kl_bound")  # noise is another in another dtype
X = torch.tensor([[0.2, 0.7], [0.5, 0.3], [0.9, 0.6]])

BAD_STATES = {
    "long": X.long(), "int32": X.int(), "uint8": X.to(torch.uint8), "bool": X > 0.4, "complex": X.to(torch.complex64),
    "int array": np.ones((3, D), dtype=int), "bool array": np.ones((3, D), dtype=bool),
    "complex array": np.ones((3, D), dtype=complex), "object array": np.array([[None, 1.0]] * 3),
    "list of bool": [[True, False]] * 3, "list of complex": [[1j, 2.0]] * 3, "ragged": [[1.0, 2.0], [1.0]],
    "text": "0.5", "list of text": [["0.5", "1"]] * 3, "none": None, "dict": {"x": X}, "function": lambda: X,
    "set": {0.5}, "float8": X.to(torch.float8_e5m2), "list of int": [[1] * D] * 3,
    "masked array": np.ma.array(X.numpy(), mask=X.numpy() > 0.5), "long doubles": X.numpy().astype(np.longdouble),
    "sparse": X.to_sparse(),
}  # fmt: skip


def values(found):
    return tuple(v.double() for v in (found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize("name", STATES)
def test_what_is_no_state_is_refused_everywhere(name):
    call = STATES[name]
    for what, bad in BAD_STATES.items():
        if what == "none" and name == "kernel.sample, noise":
            continue  # then it is drawn
        with pytest.raises((SdeflowError, TypeError, ValueError)) as caught:
            call(bad)
        assert says_what(caught.value), f"{what}: {caught.value!r}"
    for what, bad in (("number", 0.5), ("vector", X[0]), ("list", [0.2, 0.7]), ("empty list", [])):
        if name in ALSO_NUMBERS or (name in ALSO_FLAT and what != "number"):
            continue
        with pytest.raises((SdeflowError, TypeError, ValueError)) as caught:
            call(bad)
        assert says_what(caught.value), f"{what}: {caught.value!r}"


def says_what(error):
    """Whether a message is ours: raised in the package, and not what a library said of a wrong argument."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return (
        Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(sdeflow.__file__).parent) and len(str(error)) > 15
    )


@pytest.mark.parametrize("name", STATES)
def test_what_can_be_converted_gives_the_tensors_result(name):
    call = STATES[name]
    expected = values(call(X))
    forms = {
        "array": X.numpy(), "list": X.tolist(), "tuple": tuple(map(tuple, X.tolist())), "rows": list(X),
        "rows of arrays": list(X.numpy()), "strided": np.asfortranarray(X.numpy()), "reversed": X.numpy()[::-1][::-1],
        "swapped bytes": X.numpy().astype(">f4"), "parameter": nn.Parameter(X.clone()),
    }  # fmt: skip
    locked = X.numpy().copy()
    locked.flags.writeable = False
    forms["locked"] = locked
    if name == "MLP":  # which leaves this to torch
        del forms["swapped bytes"]
    for what, form in forms.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = values(call(form))
        for ours, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6, msg=lambda m, what=what: f"{what}: {m}")
    if not DRAWN.search(name):
        for found, truth in zip(values(call(X.double().numpy())), expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in STATES if "network" in n or n in ("MLP", "denoising_score_matching")])
def test_a_tensor_in_another_dtype_than_the_network_says_what_to_write(name):
    with pytest.raises((SdeflowError, TypeError, ValueError), match=r"float64.*float32"):
        STATES[name](X.double())


# ------------------------------------------------------------------ times

TIMES = {
    "mixture": lambda time: mixture()(X, time),
    "mixture.log_prob": lambda time: mixture().log_prob(X, time),
    "mixture.denoise": lambda time: mixture().denoise(X, time),
    "callable": lambda time: ou().bind(lambda x, t: -x)._score(X, time),
    "network": lambda time: network()(X, time),
    "network.denoise": lambda time: network().denoise(X, time),
    "network.noise": lambda time: network().noise(X, time),
    "thresholded": lambda time: Thresholded(mixture(), (-1, 1))(X, time),
    "kernel.moments": lambda time: ou().kernel.moments(X, time),
    "kernel.sample": lambda time: ou().kernel.sample(X, time, seed=0),
    "kernel.log_prob": lambda time: ou().kernel.log_prob(X, X, time),
    "kernel.score": lambda time: ou().kernel.score(X, X, time),
    "kernel.half_log_snr": lambda time: ou().kernel.half_log_snr(time),
    "kernel.half_log_snr_rate": lambda time: ou().kernel.half_log_snr_rate(time),
    "kernel.marginal": lambda time: ou().kernel.marginal(0.0, 1.0, time).std,
    "geometric.moments": lambda time: geometric().moments(X, time),
    "geometric.sample": lambda time: geometric().sample(X, time, seed=0),
    "geometric.score": lambda time: geometric().score(X, X, time),
    "geometric.transport": lambda time: geometric().transport(X, time),
    "CIR.moments": lambda time: cir().moments(X, time),
    "CIR.score": lambda time: cir().score(X, X, time),
    "bridge.moments": lambda time: ou().bridge(0.3).moments(X, time),
    "bridge.sample": lambda time: ou().bridge(0.3).sample(X, time, seed=0),
    "bridge.paths": lambda time: ou().bridge(0.3).paths(X, [time], seed=0),
    "bridge of geometric": lambda time: geometric_bridge(0.3).moments(X, time),
    "simulate": lambda time: ou().simulate(X, [time], steps=2, seed=0),
    "denoising_score_matching": lambda time: denoising_score_matching(network(), X, time, X),
}


@pytest.mark.parametrize("name", TIMES)
def test_times_are_numbers_within_the_horizon(name):
    call = TIMES[name]
    expected = values(call(0.5))
    for form in (torch.tensor(0.5), np.float32(0.5), np.array(0.5), sp.Rational(1, 2), torch.tensor([0.5])[0]):
        for found, truth in zip(values(call(form)), expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    for bad in (-0.1, 2.5, math.nan, math.inf, True, 0.5j, "0.5", None, [[0.5]], torch.tensor(True), sp.Symbol("a")):
        if "half_log_snr" in name and bad == [[0.5]]:
            continue  # which takes times of any shape
        with pytest.raises((SdeflowError, TypeError, ValueError)) as caught:
            call(bad)
        assert says_what(caught.value), f"{bad!r}: {caught.value!r}"


@pytest.mark.parametrize(
    "name", [n for n in TIMES if n.startswith(("mixture", "network", "kernel.", "geometric", "CIR"))]
)
def test_one_time_for_each_sample(name):
    if name == "kernel.marginal":
        return
    call, times = TIMES[name], [0.3, 0.5, 0.9]
    expected = values(call(torch.tensor(times, dtype=torch.float64)))
    for form in (times, np.array(times), tuple(times), [torch.tensor(0.3), 0.5, np.float64(0.9)]):
        for found, truth in zip(values(call(form)), expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
    for bad in ([0.3, 0.5], [0.3, 0.5, math.nan], [0.3, 0.5, 2.5], [True, False, True], np.ones((3, 1))):
        if "half_log_snr" in name and (isinstance(bad, np.ndarray) or len(bad) == 2):
            continue  # which takes times of any shape
        with pytest.raises((SdeflowError, TypeError, ValueError)) as caught:
            call(bad)
        assert says_what(caught.value), f"{bad!r}: {caught.value!r}"


@pytest.mark.parametrize("bad", [sp.Symbol("tau"), "0.5", [0.1, "a"], [0.1, [0.2]], None, 1j, torch.tensor(True)])
@pytest.mark.parametrize("name", ["coefficients", "sde_coefficients", "half_log_snr", "half_log_snr_rate", "time_of"])
def test_functions_of_t_alone_refuse_what_is_no_time(name, bad):
    for sde in (ou(), sdeflow.catalog.CriticallyDampedLangevin()):
        with pytest.raises(DataError, match="must be a real number or a tensor of them"):
            getattr(sde.kernel, name)(bad)


@pytest.mark.parametrize("name", ["coefficients", "sde_coefficients", "half_log_snr", "half_log_snr_rate"])
def test_functions_of_t_alone_are_defined_on_the_horizon(name):
    for sde in (ou(), sdeflow.catalog.CriticallyDampedLangevin()):
        for bad in (-1e-9, 1.001 * sde.T, math.nan, [0.5, math.inf], torch.tensor([[0.1, -0.1]])):
            with pytest.raises(ScheduleError, match=r"defined for t in \[0, T\]"):
                getattr(sde.kernel, name)(bad)
        getattr(sde.kernel, name)(torch.tensor([0.0, sde.T]))


def test_a_mixture_has_components_and_symmetric_covariances():
    for means, covariances in ((torch.zeros(0, 2), torch.ones(0)), (torch.zeros(1, 0), torch.ones(1))):
        with pytest.raises(DataError, match="one component at least"):
            GaussianMixture(ou(), means, covariances)
    with pytest.raises(DataError, match="symmetric"):
        GaussianMixture(ou(), torch.zeros(1, 2), torch.tensor([[[1.0, 0.4], [0.3, 1.0]]]), full=True)


def test_one_time_for_all_is_no_list():
    for call in (lambda t: ou().kernel.marginal(0.0, 1.0, t), lambda t: ou().bridge(0.7).moments(torch.zeros(4, 1), t)):
        for bad in ([], [0.5]):
            with pytest.raises(DataError, match="t must be a number, not"):
                call(bad)


def test_a_score_without_a_kernel_has_a_horizon_too():
    score = general().bind(lambda x, t: -x)._score
    for bad in (-0.1, 3.5, math.nan):
        with pytest.raises(ScheduleError, match=r"\[0, T\] = \[0, 3\]"):
            score(X, bad)
    assert torch.equal(score(X, 1), -X)


def test_times_on_an_accelerator_become_nan_outside_of_the_range():
    """On the one device that cannot be read and needs no hardware: nothing is read, so nothing fails."""
    times = checked_time(torch.tensor([0.5, 3.0], device="meta"), 2, 0.0, 1.0, "it is defined for t in [0, T]")
    assert times.device.type == "meta" and times.dtype == torch.float64


@pytest.mark.parametrize("kernel", [lambda: ou().kernel, geometric, cir], ids=["OU", "geometric", "CIR"])
def test_a_transition_and_a_log_snr_refuse_what_is_out_of_order(kernel):
    kernel = kernel()
    kernel = getattr(kernel, "inner", kernel)
    for s, later in ((0.5, 0.4), (-0.1, 0.4), (0.1, 9.0), (math.nan, 0.5), (0.1, math.nan)):
        with pytest.raises(ScheduleError, match="0 <= s <= t <= T"):
            kernel.transition(X, s, later)
    with pytest.raises(DataError, match="half_log_snr must not be NaN"):
        kernel.time_of(math.nan)
    assert float(kernel.time_of([float(kernel.half_log_snr(0.5))])) == pytest.approx(0.5, rel=1e-9)


# ------------------------------------------------------------------ NaN, and parameters


NAN = torch.tensor([[0.2, 0.7], [math.nan, 0.3], [0.9, 0.6]])
OF_SCORES = re.compile("^(callable|network|thresholded|mixture|DCT|Orthogonal|MLP|denoising)")
LAWS = [name for name in STATES if not OF_SCORES.search(name) or name == "mixture.log_prob"]


@pytest.mark.parametrize("name", LAWS)
def test_nan_is_refused_where_data_enter(name):
    """A law is not asked at NaN, nor a solve started from it. A score is a function that solvers call: see below."""
    with pytest.raises(DataError, match=r"NaN|not finite"):
        STATES[name](NAN)


@pytest.mark.parametrize("name", ["callable", "network", "mixture", "thresholded"])
def test_a_score_of_nan_is_nan_in_that_sample_alone(name):
    found = STATES[name](NAN)
    assert bool(found[1].isnan().any()) and bool(torch.isfinite(found[[0, 2]]).all())


def test_parameters_that_are_arrays_say_what_to_write():
    for bad in (np.array([1.0, 2.0]), np.array(1.0), [1.0, 2.0]):
        with pytest.raises(DeclarationError, match=r"torch\.as_tensor\(k"):
            SDE(-sp.Symbol("k") * x, 1, params={"k": bad})
    with pytest.raises(DeclarationError, match=r"k\.double\(\)"):
        SDE(-sp.Symbol("k") * x, 1, params={"k": torch.tensor([1, 2])})
    assert repr(SDE(-x, 1, params=None)) == repr(SDE(-x, 1))


def test_functions_of_t_alone_declare_a_path():
    ours = SDE.from_kernel(lambda t: 1 - t, lambda t: t, T=0.9)
    assert ours.declaration == SDE.from_kernel(1 - t, t, T=0.9).declaration
    both = (SDE.from_kernel(lambda s: sp.cos(s)), SDE.from_kernel(sp.cos(t)))  # simplified as far as time allows
    torch.testing.assert_close(
        *([*sde.kernel.coefficients([0.3]), *sde.kernel.sde_coefficients([0.3])] for sde in both)
    )
    with pytest.raises(DeclarationError, match=r"sp\.cos"):
        SDE.from_kernel(lambda t: np.cos(t))


def test_no_text_enters_a_matrix_of_the_recipe():
    for bad in ([["1", 0], [0, 1]], "[[1, 0], [0, 1]]", [[1, 0]], [[1]] * 2, None):
        with pytest.raises(DeclarationError, match="D must be a square matrix"):
            catalog.from_recipe(bad, [[0, 1], [-1, 0]])


# ------------------------------------------------------------------ x_0


@pytest.mark.parametrize("kernel", [lambda: ou().kernel, geometric, cir], ids=["OU", "geometric", "CIR"])
@pytest.mark.parametrize("what", ["log_prob", "score"])
def test_x_0_is_of_the_shape_of_x_t_or_one_for_all(kernel, what):
    call = getattr(kernel(), what)
    x_t = torch.tensor([[0.2, 0.7], [0.5, 0.3], [0.9, 0.6], [0.4, 1.1]], dtype=torch.float64)
    for shape in ((4, 1), (2,), (1, 1), (4,), (2, 4), (1, 4, 2), (4, 2, 1), (1,), (2, 2), (4, 3), (0, 2)):
        with pytest.raises(DataError) as caught:
            call(x_t, torch.ones(shape), 0.5)
        assert str(shape) in str(caught.value) and "(4, 2)" in str(caught.value)
    for flat, column in ((torch.ones(4), torch.ones(4, 1)), (torch.ones(4, 1), torch.ones(4))):
        with pytest.raises(DataError, match=r"\(4,\)"):
            call(flat, column, 0.5)
    one = torch.tensor([[0.3, 0.8]], dtype=torch.float64)
    assert torch.equal(call(x_t, one, 0.5), call(x_t, one.expand(4, 2), 0.5))
    assert torch.equal(call(x_t, one, [0.1, 0.2, 0.3, 0.4]), call(x_t, one.expand(4, 2), [0.1, 0.2, 0.3, 0.4]))
    assert torch.equal(call(x_t, 0.3, 0.5), call(x_t, torch.full_like(x_t, 0.3), 0.5))
    by_hand = torch.stack([call(x_t[i : i + 1], one, 0.5)[0] for i in range(4)])
    torch.testing.assert_close(call(x_t, one, 0.5), by_hand, rtol=1e-12, atol=1e-12)


def test_what_goes_beside_a_state_is_of_its_shape():
    kernel = ou().kernel
    for noise in (torch.ones(3, 1), torch.ones(2), torch.ones(1, 2), 0.5):
        with pytest.raises(DataError, match=r"noise is of shape .*\(3, 2\)"):
            kernel.sample(X, 0.5, noise=noise)
    for end in (torch.ones(3, 1), torch.ones(3), torch.ones(2, 2), torch.ones(1, 1)):
        with pytest.raises(DataError, match=r"x_T is of shape .*x_0 of \(3, 2\)"):
            ou().bridge(end).moments(X, 0.5)
    one = torch.tensor([0.1, 0.4])
    assert torch.equal(ou().bridge(one).moments(X, 0.5)[0], ou().bridge(one.expand(3, 2)).moments(X, 0.5)[0])
    with pytest.raises(DataError, match=r"must be of one shape"):
        flow().interpolate(X, X[:1], 3, "euler", steps=2)
    with pytest.raises(DataError, match=r"z_b is of shape \(3, 1\)"):
        spherical(Gaussian(0.0, 1.0), X, torch.ones(3, 1), 3)
    with pytest.raises(DataError, match="shape"):
        Gaussian(torch.zeros(3), 1.0).log_prob(X)
    coupled = cld().bind(lambda x, t: -x)._score
    with pytest.raises(DataError, match=r"\(3, 3\).*components x, v"):
        coupled(torch.ones(3, 3), 0.5)


@pytest.mark.parametrize("good", [(), (1, 2), (4, 2)])
def test_checked_start_expands_without_a_copy(good):
    x_0 = torch.ones(good)
    assert checked_start(x_0, torch.ones(4, 2)).shape == (4, 2)
    assert checked_start(x_0, torch.ones(4, 2)).data_ptr() == x_0.data_ptr()


def test_a_good_tensor_is_returned_as_it_is():
    x = torch.ones(3, 2, requires_grad=True)
    assert checked_state(x) is x
    time = torch.tensor(0.5, dtype=torch.float64)
    assert checked_time(time, 3, 0.0, 1.0, "") is time


# ------------------------------------------------------------------ dtypes, numbers, images


DTYPES = {
    "reverse.sample": lambda dtype: reverse().sample((3, D), steps=2, dtype=dtype, seed=0),
    "flow.sample": lambda dtype: flow().sample((3, D), "euler", steps=2, dtype=dtype, seed=0),
    "flow.pilot": lambda dtype: flow().pilot((D,), dtype=dtype) and None,
    "simulate": lambda dtype: ou().simulate(X, [0.1], steps=2, seed=0, dtype=dtype),
    "mixture.sample": lambda dtype: mixture().sample(3, seed=0, dtype=dtype),
    "Gaussian.sample": lambda dtype: Gaussian(0.0, 1.0).sample((3, D), 0, dtype),
    "FittedPrior.sample": lambda dtype: fitted().sample((3, D), 0, dtype),
    "StationaryLaw.sample": lambda dtype: stationary().sample((3, D), 0, dtype),
    "PushForward.sample": lambda dtype: pushed().sample((3, D), 0, dtype),
    "dequantise": lambda dtype: (
        Uniform().sample(torch.ones(3, D).long(), levels=2, low=0.0, high=1.0, seed=0, dtype=dtype).x
    ),
}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_those_of_states(name):
    for bad in (torch.int32, torch.bool, torch.complex64, torch.uint8, torch.float8_e5m2):
        with pytest.raises(DataError, match="floating"):
            DTYPES[name](bad)
    for bad in ("float64", np.float64, 64, float):
        with pytest.raises(TypeError, match=r"torch\.dtype"):
            DTYPES[name](bad)
    found = DTYPES[name](torch.float64)
    assert found is None or found.dtype == torch.float64


def test_moments_weights_and_matrices_are_finite_real_numbers():
    for bad in (math.nan, math.inf, 1j, True, "1", torch.tensor(1j), torch.tensor(True), None):
        for attempt in (
            lambda bad=bad: Gaussian(bad, 1.0),
            lambda bad=bad: Gaussian(0.0, bad),
            lambda bad=bad: GaussianMixture(ou(), [[bad, 0.0]], [1.0]),
            lambda bad=bad: GaussianMixture(ou(), [[0.0, 1.0]], [bad]),
            lambda bad=bad: GaussianMixture(ou(), [[0.0, 1.0]], [1.0], weights=[bad]),
            lambda bad=bad: ou().kernel.marginal(bad, 1.0, 0.5),
            lambda bad=bad: ou().prior_for(0.0, bad),
            lambda bad=bad: ou().bridge(bad),
            lambda bad=bad: Orthogonal([[bad]]),
            *((lambda bad=bad: Score(Net(), ou(), data_mean=bad),) if bad is not None else ()),
            *((lambda bad=bad: Score(Net(), ou(), data_std=bad),) if bad is not None else ()),
        ):
            if bad is None and "weights" in inspect.getsource(attempt):
                continue
            with pytest.raises((SdeflowError, TypeError, ValueError)) as caught:
                attempt()
            assert says_what(caught.value), f"{bad!r}: {caught.value!r}"
    for n in (-1, 1.5, True, "3", None):
        with pytest.raises(ValueError, match="n must be"):
            mixture().sample(n)
    whole = GaussianMixture(ou(), [[0, 1]], torch.tensor([1]), weights=np.array([2]))
    assert torch.equal(whole(X, 0.5), GaussianMixture(ou(), torch.tensor([[0.0, 1.0]]), torch.ones(1))(X, 0.5))


def test_images_are_integers_in_any_form():
    images = torch.tensor([[0, 3], [2, 1], [1, 1]])
    options = {"levels": 4, "low": -1.0, "high": 1.0, "seed": 0, "steps": 5}
    expected = flow().bits_per_dim(images, **options)
    for form in (images.numpy(), images.tolist(), images.numpy().astype(np.uint8), images.to(torch.uint8)):
        assert torch.equal(flow().bits_per_dim(form, **options), expected)
    for bad in (
        images.float(),
        images.double().numpy(),
        images > 1,
        images.to(torch.complex64),
        "12",
        None,
        [[0.5]],
        3,
    ):
        with pytest.raises(DataError, match="integers"):
            flow().bits_per_dim(bad, **options)


# ------------------------------------------------------------------ training


def steps_of(data, score=None, steps=3, **options):
    score = score or Score(Net(), ou())
    return fit(score, data, steps, batch_size=4, progress=False, **options).losses


def test_data_of_any_form_trains_as_its_tensor():
    data = torch.randn(16, D, generator=torch.Generator().manual_seed(0))
    expected = steps_of(data)
    for form in (data.numpy(), data.tolist(), list(data), data.double(), data.double().numpy()):
        assert steps_of(form) == pytest.approx(expected, rel=1e-5)
    labels = torch.arange(16) % 3
    labelled = [steps_of(form) for form in ((data, labels), (data.numpy(), labels.numpy()), (data.tolist(), labels))]
    pairs = [steps_of(torch.utils.data.TensorDataset(data, labels)), steps_of(list(zip(data, labels, strict=True)))]
    assert all(losses == pytest.approx(labelled[0], rel=1e-6) for losses in (*labelled, *pairs))
    for bad in ((data, labels[:5]), (data,), (data, labels, labels), (data.long(), labels), data > 0, [["a", "b"]]):
        with pytest.raises(DataError) as caught:
            steps_of(bad)
        assert says_what(caught.value)
    score, other = Score(Net(), ou()), Score(Net(), ou())
    with torch.no_grad():
        assert steps_of(data, score) == expected
    with torch.inference_mode():
        assert steps_of(data.clone(), other) == expected
        with pytest.raises(ScoreError, match="inference_mode"):
            steps_of(data)


def test_the_labels_of_a_tuple_reach_the_network():
    seen = []

    class Labelled(Net):
        def forward(self, x, t, y=None):
            seen.append(y)
            return super().forward(x, t)

    steps_of((torch.randn(4, D), torch.tensor([5, 6, 7, 8])), Score(Labelled(), ou()), steps=2)
    assert all(sorted(y.tolist()) == [5, 6, 7, 8] for y in seen[1:])


def test_what_a_run_shows_is_short():
    run = fit(Score(Net(), ou()), torch.randn(16, D), 200, batch_size=2, progress=False)
    assert len(run.losses) == 200 and len(repr(run)) < 80 and "steps=200" in repr(run)


def test_out_is_a_path():
    for bad in (3, 1.5, ["a"], True):
        with pytest.raises(TypeError, match="out must be"):
            steps_of(torch.randn(16, D), out=bad)


def test_a_function_that_hides_a_module_says_so():
    unet = Net()
    with pytest.warns(HiddenParametersWarning, match="calls unet") as caught:
        score = Score(lambda x, n: unet(x, n), ou())
    assert caught[0].filename == HERE
    with pytest.raises(ScoreError, match=r"no parameters to train: its net is a function.*nn.Module"):
        steps_of(torch.randn(16, D), score)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Score(unet, ou())
        Score(lambda x, n: -x, ou())


# ------------------------------------------------------------------ declarations by functions


def same(sde, other):
    return (sde.f, sde.g) == (other.f, other.g)


@pytest.mark.parametrize(
    "bad, remedy",
    [
        (np.ma.array(np.ones((3, 2)), mask=[[False, True]] * 3), "filled"),
        ([np.ma.array(np.ones(2), mask=[False, True])], "filled"),
        (np.ones((3, 2), dtype=np.longdouble), "astype('float64')"),
        (torch.ones(3, 2).to_sparse(), "to_dense"),
        ([[1, 2]], "1.0"),
        (np.ones((3, 2), dtype=int), "astype"),
    ],
    ids=["masked", "masked rows", "long doubles", "sparse", "list of int", "int array"],
)
def test_what_would_lose_something_in_silence_says_what_to_write(bad, remedy):
    with pytest.raises(DataError, match=re.escape(remedy)):
        SDE(-x, 1).kernel.sample(bad, 0.5)


def test_numbers_of_thousands_of_digits_are_refused_by_their_size():
    huge = sp.Integer(10) ** 5000
    for call in (
        lambda: SDE(-x, huge * t), lambda: SDE(-x, t / huge), lambda: SDE(-huge * x, 1), lambda: SDE(-x, int(huge)),
        lambda: SDE(-x, sp.exp(-huge * t) + 1), lambda: SDE(-(x**3) * huge, 1), lambda: SDE(-x, 1, T=int(huge)),
        lambda: SDE(-x, sp.Symbol("k"), params={"k": int(huge)}),
    ):  # fmt: skip
        with pytest.raises(DeclarationError, match=r"digits|double precision"):
            call()
    with pytest.raises(DeclarationError, match="masked"):
        SDE.from_kernel(np.ma.array([0.9, 0.5, 0.2], mask=[False, True, False]))


def test_a_function_is_read_by_the_names_of_its_arguments():
    plain = declare(-x / 2 + t, sp.sqrt(1 + t))
    for f, g in (
        (lambda x, t: -x / 2 + t, lambda x, t: sp.sqrt(1 + t)),
        (lambda s, y: -y / 2 + s, lambda s, y: sp.sqrt(1 + s)),
        (lambda t, x: -x / 2 + t, lambda t, x: sp.sqrt(1 + t)),
        (lambda t, y: -y / 2 + t, lambda time, y: sp.sqrt(1 + time)),
        (lambda times, u: -u / 2 + times, lambda T, X: sp.sqrt(1 + T)),
        (lambda ts, xs: -xs / 2 + ts, lambda t_, x_: sp.sqrt(1 + t_)),
        (lambda x0, t0: -x0 / 2 + t0, lambda _, t: sp.sqrt(1 + t)),
        (lambda b, x: -x / 2 + b, lambda t, _: sp.sqrt(1 + t)),
        (lambda *args: -args[0] / 2 + args[1], functools.partial(lambda k, t, x: sp.sqrt(k + t), 1)),
        (lambda x, t, k=2: -x / k + t, lambda x, t, *, k=1: sp.sqrt(k + t)),
    ):
        assert same(declare(f, g), plain)
    a, b = state("a b")
    coupled = declare([b + t, -a], [1, 1 + t])
    for f in (
        lambda a, b, t: [b + t, -a],
        lambda t, a, b: [b + t, -a],
        lambda b, a, t: [b + t, -a],
        lambda p, q, t: [q + t, -p],
        lambda T, x0, x1: [x1 + T, -x0],
        lambda b, t, p: [b + t, -p],
        [lambda t, a, b: b + t, lambda a, b, t: -a],
    ):
        assert same(declare(f, lambda t, a, b: [1, 1 + t], names=("a", "b")), coupled)
    assert same(declare_path(lambda t, x: 1 - t, lambda t, x: t, T=0.9), declare_path(1 - t, t, T=0.9))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x, lambda y, x: x, lambda t, time: t, lambda x, k=2, t=0: x, lambda x, t, time=0: x, lambda: x,
        lambda a, b: a, lambda t, T: t, lambda x, x0: x,
    ],
)  # fmt: skip
def test_names_that_do_not_show_the_time_are_refused(function):
    with pytest.raises(DeclarationError, match=r"\(x, t\)"):
        SDE(function, 1)


@pytest.mark.parametrize(
    ("function", "ours"),
    [
        (lambda x, t: np.sqrt(1 + t), "sp.sqrt"),
        (lambda x, t: torch.sqrt(1 + t), "sp.sqrt"),
        (lambda x, t: math.sqrt(1 + t), "sp.sqrt"),
        (lambda x, t: (1 + t).sqrt(), "sp.sqrt"),
        (lambda x, t: np.exp(-t), "sp.exp"),
        (lambda x, t: torch.exp(-t), "sp.exp"),
        (lambda x, t: 2 if t > 1 else 1, "sp.Piecewise"),
        (lambda x, t: torch.where(t > 1, 2, 1), "sp.Piecewise"),
        (lambda x, t: np.maximum(t, 1), "sp.Max"),
    ],
)
def test_functions_of_numbers_are_told_of_sympys(function, ours):
    with pytest.raises(DeclarationError, match=ours):
        SDE(-x, function)
    with pytest.raises(DeclarationError, match=ours):
        SDE([lambda a, b, t: function(a, t), 0], [1, 1], state=("a", "b"))


# ------------------------------------------------------------------ warnings


def far_prior():
    return ou().flow_ode(mixture(), prior=Gaussian(3.0, 1.0))


def unreadable():
    return ou().flow_ode(lambda x, t: x).latent_log_prob(X)


def unmixed():
    return SDE(-(x**3), 1, T=0.5).flow_ode(lambda x, t: -x).sample((2, 1), "euler", 2)


def unusual():
    return fit(TRAINED, 1000 * torch.randn(16, D), 2, progress=False)


def noisy():
    return flow().log_prob(X, probe="gaussian", probes=2, steps=5, seed=0, warn_above=1e-9)


def noisy_bits():
    options = {"probe": "gaussian", "probes": 2, "steps": 5, "seed": 0, "warn_above": 1e-9}
    return flow().bits_per_dim([[0, 1]], levels=2, low=0.0, high=1.0, **options)


def unreached():
    return ou().flow_ode(rounded, prior=ou().prior_for(0.0, 1.0)).log_prob(X, atol=1e-4)


def rounded(x, t):
    score = mixture()(x, t)
    return score + ((8 * score).round() / 8 - score).detach()


def hidden():
    return Score(lambda x, t: network().net(x, t) if NET is None else NET(x, t), ou())


NET = Net()
TRAINED = Score(NET, ou())


WARNED = (far_prior, unreadable, unmixed, unusual, noisy, noisy_bits, unreached, hidden)


PASSED_THROUGH = {"": lambda f: f, "no_grad": torch.no_grad(), "inference": torch.inference_mode()}


@pytest.mark.parametrize(
    ("call", "through"),
    [(call, through) for call in WARNED for through in PASSED_THROUGH if call is not unreached or not through],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_warnings_point_at_the_users_line(call, through):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PASSED_THROUGH[through](call)()
    ours = [w for w in caught if issubclass(w.category, UserWarning) and "sdeflow" in w.category.__module__]
    assert ours, [str(w.message) for w in caught]
    first = call.__code__.co_firstlineno
    for warning in ours:
        assert warning.filename == HERE
        assert first <= warning.lineno <= first + 2, f"line {warning.lineno}"


def test_every_warning_goes_by_the_same_way():
    package = Path(sdeflow.__file__).parent
    for path in package.rglob("*.py"):
        calls = path.read_text().count("warnings.warn(")
        assert calls == (1 if path.name == "errors.py" and path.parent == package else 0), path


def test_no_test_looks_at_the_clock_on_the_wall():
    for path in Path(__file__).parent.rglob("test_*.py"):
        if path.name != Path(__file__).name:
            assert not re.search(r"perf_counter|monotonic\(|time\.time\(", path.read_text()), path


def of_components(x):
    sde = catalog.CriticallyDampedLangevin()
    exact = GaussianMixture(sde, torch.zeros(1, 2), torch.ones(1))
    return sde.reverse(exact).elbo(x, draws=2)


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D + 1, D)

    def forward(self, t, x):
        return self.layer(torch.cat([x, t[:, None].expand(len(t), 1)], dim=1))


SAID = {
    "Score(sde, net)": (lambda: Score(ou(), Net()), r"Score\(net, sde\)"),
    "GaussianMixture(means, sde)": (lambda: GaussianMixture([[0.0]], ou(), [1.0]), r"GaussianMixture\(sde, means"),
    "fit(net)": (lambda: fit(Net(), torch.zeros(9, 2), steps=1), r"write sdeflow\.Score\(net, sde\)"),
    "fit of numbers": (lambda: fit(Score(Net(), ou()), torch.zeros(9), steps=1), r"data\[:, None\]"),
    "log_prob of numbers": (lambda: flow().log_prob(torch.zeros(4)), r"x\[:, None\]"),
    "sample(method=)": (lambda: reverse().sample((2, D), method="euler"), "Did you mean solver"),
    "elbo(samples=)": (lambda: reverse().elbo(torch.zeros(2, D), samples=3), "Did you mean draws"),
    "sample(y=)": (lambda: reverse().sample((2, D), y=torch.zeros(2)), r"score\.given\(y\)"),
    "g of one argument": (lambda: SDE(-x, lambda t: t), "write lambda x, t"),
    "f in an array": (lambda: SDE(np.array([1, x]), 1), "a list of these"),
    "one-hot labels": (
        lambda: sdeflow.nets.MLP(D, classes=3)(torch.zeros(4, D), torch.zeros(4), torch.eye(4, 3)), r"y\.argmax\(1\)",
    ),
    "fit(optimizer=)": (lambda: fit(Score(Net(), ou()), X, 1, optimizer=None), "Did you mean optimiser"),
    "fit(epochs=)": (lambda: fit(Score(Net(), ou()), X, epochs=1), "fit has no option epochs. Did you mean steps"),
    "SDE(param=)": (lambda: SDE(-x, 1, param={}), "SDE has no option param. Did you mean params"),
    "SDE(p0=)": (lambda: SDE(-x, 1, p0=1), "Did you mean P0"),
    "GaussianMixture(variances=)": (
        lambda: GaussianMixture(ou(), [[0.0]], variances=[1.0]), "option variances. Did you mean covariances",
    ),
    "a network for a score": (lambda: ou().flow_ode(sdeflow.nets.MLP(2)), r"MLP is a network.*Score\(net, sde\)"),
    "a network of (t, x)": (lambda: fit(Score(Swapped(), ou()), X, 1), r"it is called as net\(x, time\)"),
    "log p of the reverse SDE": (lambda: reverse().log_prob(X), r"is of the flow, sde\.flow_ode\(score\)\.log_prob"),
    "elbo of the flow": (lambda: flow().elbo(X), r"that is of the reverse SDE, sde\.reverse\(score\)\.elbo"),
    "grid=": (lambda: flow().sample((2, D), "euler", 2, grid="logsnr"), "log_snr.*pilot"),
    "elbo of states": (lambda: of_components(torch.zeros(3, 2, 2)), "take data, which they lift"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_refusals_say_what_to_write(name):
    call, said = SAID[name]
    with pytest.raises((SdeflowError, TypeError, ValueError, AttributeError), match=said):
        call()


def test_a_bound_is_printed_in_short():
    assert len(repr(reverse().elbo(torch.zeros(300, D), draws=2))) < 1000


def test_a_default_prior_takes_any_score():
    assert SDE(x - x**3, 1, T=20).default_prior(lambda x, t: -x, torch.zeros(1, 1)) is not None
