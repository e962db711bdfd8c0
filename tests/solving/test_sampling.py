"""Sampling as its user sees it: trajectories, callbacks, denoised predictions, thresholds, chunks and bad options."""

import math
from functools import cache

import pytest
import sympy as sp
import torch
from problems import COUPLED, correlated, gaussian, ring
from torch import nn

import sdeflow
from sdeflow import SDE, catalog, t, x
from sdeflow.numerics.noise import BLOCK, NoiseStream
from sdeflow.scores import GaussianMixture, ScoreFunction
from sdeflow.scores.thresholded import Thresholded
from sdeflow.solvers import Torchsde
from sdeflow.solving import run as sampling

N = 3000  # three chunks, the last of them not whole


@cache
def vp():
    return catalog.VP()


@cache
def exact():
    return ring(vp(), modes=3)


def reverse():
    return vp().reverse(exact())


def flow():
    return vp().flow_ode(exact())


def well():
    """A general SDE: no kernel."""
    return SDE(x - x**3, 1, T=2, cutoff=0.01)


class LogNormal:
    """exp of N(0, 5/4)."""

    def sample(self, shape, seed, dtype, device):
        return (math.sqrt(1.25) * NoiseStream(seed, "prior").normal(shape, dtype, device)).exp()

    def log_prob(self, state):
        return torch.distributions.LogNormal(0.0, math.sqrt(1.25)).log_prob(state).flatten(1).sum(1)


def growing_noise():
    """The reverse of geometric Brownian motion: noise that depends on the state."""
    sde = SDE(x / 2, x, T=1, cutoff=1e-2)
    return sde.reverse(lambda u, time: -(u.log() / (0.25 + time[:, None]) + 1) / u, prior=LogNormal())


# ---------------------------------------------------------------------- trajectories

OBSERVABLE = {
    "euler": lambda **o: reverse().sample((5, 2), "euler", 12, seed=0, **o),
    "without a solver": lambda **o: reverse().sample((5, 2), steps=12, seed=0, **o),
    **{
        f"torchsde {m}": lambda m=m, **o: reverse().sample((5, 2), Torchsde(m), 12, seed=0, **o)
        for m in Torchsde.methods
        if m != "log_ode"  # unstable in 12 steps
    },
    "state-dependent noise": lambda **o: growing_noise().sample((5, 2), "euler", 12, seed=0, **o),
    **{
        f"flow {m}": lambda m=m, **o: flow().sample((5, 2), m, 12, seed=0, **o)
        for m in ("rk4", "euler", "heun2", "explicit_adams")
    },
    "flow without a solver": lambda **o: flow().sample((5, 2), steps=24, seed=0, **o),
    "flow dopri5": lambda **o: flow().sample((5, 2), "dopri5", rtol=1e-3, atol=1e-3, seed=0, **o),
    "flow in bfloat16": lambda **o: flow().sample((5, 2), "rk4", 12, seed=0, dtype=torch.bfloat16, **o),
}


@pytest.mark.parametrize("name", OBSERVABLE)
def test_a_trajectory_runs_from_T_to_the_plain_result(name):
    plain = OBSERVABLE[name]()
    states, times = OBSERVABLE[name](trajectory=True)
    assert states.shape == (len(times), *plain.shape) and states.dtype == plain.dtype
    assert torch.equal(states[-1], plain)
    assert times.dtype == torch.float64 and bool((times.diff() < 0).all())
    sde = growing_noise().model if name == "state-dependent noise" else vp()
    assert (float(times[0]), float(times[-1])) == (sde.T, sde.cutoff)
    assert bool((states[1:] != states[:-1]).any(-1).any(-1).all())
    if name in ("euler", "flow rk4", "state-dependent noise"):
        assert len(times) == 13


@pytest.mark.parametrize("sde", [vp(), SDE(2 * (3 - x), 1, T=2, P0=0.01)], ids=["VP", "offset"])
@pytest.mark.parametrize(
    "options", [{"solver": "rk4", "steps": 60}, {"rtol": 1e-6, "atol": 1e-6}], ids=["rk4", "dopri5"]
)
def test_states_belong_to_their_times(sde, options):
    """The flow of Gaussian data is x_t = mean_t + (S_t / S_T) (x_T - mean_T), at every time."""
    bound = sde.flow_ode(GaussianMixture(sde, torch.tensor([[0.5]]), torch.tensor([0.3**2])))
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    states, times = bound.decode(z, trajectory=True, **options)

    def truth(times):
        laws = [sde.kernel.marginal(0.5, 0.3, float(time)) for time in times]
        mean, std = (torch.stack([getattr(law, part).double() for law in laws]) for part in ("mean", "std"))
        return mean.reshape(-1, 1, 1) + (std / std[0]).reshape(-1, 1, 1) * (z - mean[0])

    assert float((states - truth(times)).abs().max()) < 1e-4
    late = torch.cat([times[:1], times[:-1]])  # the mistake of one step in the times
    assert float((states[1:] - truth(late)[1:]).abs().max()) > 1e-2

    up, rising = bound.encode(states[-1], trajectory=True, **options)
    assert bool((rising.diff() > 0).all()) and torch.equal(up[0], states[-1])
    assert float((up[-1] - z).abs().max()) < 1e-4


@pytest.mark.parametrize("solver", ["euler", Torchsde("euler")], ids=str)
def test_a_trajectory_holds_the_states_that_the_score_saw(solver):
    seen = []

    def score(u, time):
        seen.append((float(time[0]), u.clone()))
        return -u

    states, times = vp().reverse(score, prior=vp().prior).sample((3, 2), solver, 8, seed=0, trajectory=True)
    assert len(seen) == 8
    for (time, u), state, expected in zip(seen, states, times.tolist(), strict=False):
        assert abs(time - expected) < 1e-6
        torch.testing.assert_close(u, state)


def test_coupled_trajectories_are_states_of_the_user():
    sde = COUPLED["noise matrix"]()
    exact = GaussianMixture(sde, torch.randn(2, 2, 3), torch.tensor([0.1, 0.2]))
    seen = []
    states, times = sde.reverse(exact).sample(
        (4, 2, 3), "euler", 9, seed=0, trajectory=True, callback=lambda step, t, x: seen.append(x)
    )
    assert states.shape == (10, 4, 2, 3) and len(times) == 10
    assert torch.equal(torch.stack(seen), states[1:])


# ---------------------------------------------------------------------- callbacks


@pytest.mark.parametrize("name", ["euler", "torchsde srk", "flow rk4", "flow dopri5", "flow in bfloat16"])
def test_callbacks_come_after_every_step_in_order(name):
    states, times = OBSERVABLE[name](trajectory=True)
    seen = []

    def callback(step, t, x):
        assert not torch.is_grad_enabled()
        seen.append((step, t, x.clone()))
        x.zero_()  # the solver's own state is another
        return "ignored"

    plain = OBSERVABLE[name](callback=callback)
    assert torch.equal(plain, states[-1])
    assert [step for step, _, _ in seen] == list(range(1, len(times)))
    torch.testing.assert_close(torch.tensor([t for _, t, _ in seen], dtype=torch.float64), times[1:])
    torch.testing.assert_close(torch.stack([x for *_, x in seen]), states[1:])


def test_callbacks_are_called_while_the_solve_goes_on():
    events = []

    def score(u, time):
        events.append("call")
        return -u

    for solver in ("euler", "heun2"):
        events.clear()
        bound = vp().flow_ode(score, prior=vp().prior)
        bound.sample((2, 1), solver, 2, seed=0, callback=lambda step, t, x: events.append(step))
        calls = 1 if solver == "euler" else 2
        assert events == ["call"] * calls + [1] + ["call"] * calls + [2]


@pytest.mark.parametrize("name", ["euler", "torchsde euler", "flow rk4", "flow dopri5"])
@pytest.mark.parametrize("kind", [ValueError, AssertionError, UserWarning, KeyboardInterrupt, StopIteration])
def test_what_a_callback_raises_passes_through_unharmed(name, kind):
    error = kind("mine")

    def callback(step, t, x):
        if step == 2:
            raise error

    with pytest.raises(kind) as caught:
        OBSERVABLE[name](callback=callback)
    assert caught.value is error and error.args == ("mine",) and error.__cause__ is None


def test_an_interrupted_solve_restores_the_modes():
    score = sdeflow.Score(sdeflow.nets.MLP(2), vp(), data_mean=0.0, data_std=1.0).train()
    with pytest.raises(ZeroDivisionError):
        vp().flow_ode(score).sample((2, 2), "rk4", 3, callback=lambda step, t, x: 1 / 0)
    assert all(part.training for part in score.modules())


# ---------------------------------------------------------------------- denoised predictions


def test_denoised_predictions_are_those_of_the_states():
    states, times, denoised = flow().sample((5, 2), "rk4", 6, seed=0, trajectory=True, return_denoised=True)
    for u, time, D in zip(states, times.tolist(), denoised, strict=True):
        torch.testing.assert_close(D, exact().denoise(u, time))
    end, last = flow().sample((5, 2), "rk4", 6, seed=0, return_denoised=True)
    assert torch.equal(end, states[-1]) and torch.equal(last, denoised[-1])
    assert not torch.equal(end, last)


def test_denoise_replaces_the_last_state_everywhere():
    sample = OBSERVABLE["euler"]
    plain, (end, D) = sample(), sample(return_denoised=True)
    torch.testing.assert_close(D, exact().denoise(plain, vp().cutoff))
    assert torch.equal(end, plain)
    assert torch.equal(sample(denoise=True), D)
    clean, again = sample(denoise=True, return_denoised=True)
    assert torch.equal(clean, D) and torch.equal(again, D)
    states, _ = sample(denoise=True, trajectory=True)
    whole, _, denoised = sample(denoise=True, trajectory=True, return_denoised=True)
    assert torch.equal(states, whole) and torch.equal(states[-1], D) and torch.equal(denoised[-1], D)


def test_denoised_predictions_do_not_count_among_the_calls():
    calls = []

    def score(u, time):
        calls.append(float(time[0]))
        return -u

    bound = vp().flow_ode(score, prior=vp().prior)
    bound.sample((2, 1), "rk4", 5, seed=0, max_calls=20, trajectory=True, return_denoised=True)
    assert len(calls) == 20 + 6


# ---------------------------------------------------------------------- thresholds

FAR = torch.tensor([[2.5, 0.0], [-2.0, 2.0], [0.3, -0.2]])


def far(sde=None, shape=None):
    """The exact score of data that leave [-1, 1]."""
    sde = sde or vp()
    means = FAR if shape is None else FAR.repeat_interleave(math.prod(shape) // 2, 1).reshape(3, *shape)
    return GaussianMixture(sde, means, torch.full((3,), 0.01))


def tweedie(score, u, time):
    """E[x_0 | x_t] from the score's own numbers."""
    return ScoreFunction.denoise(score, u, time)


SDES = {
    "VP": (vp(), (2,)),
    "VE": (catalog.VE(), (2,)),
    "offset": (SDE(2 * (3 - x), 1, T=2, P0=0.01), (2,)),
    "coupled": (catalog.CriticallyDampedLangevin(), (2,)),
    "blurring": (catalog.Blurring((4, 4)), (4, 4)),
    "schedules": (SDE("-k*x", "sqrt(2*k)", params={"k": torch.tensor([0.5, 3.0])}, P0=1e-4), (2,)),
}


@pytest.mark.parametrize("name", SDES)
def test_the_prediction_stays_in_range_at_each_step(name):
    sde, event = SDES[name]
    plain = far(sde, event)
    event = (2, *event) if sde.declaration.coupled else event
    score = Thresholded(plain, (-1.0, 1.0))
    states, times = sde.flow_ode(score).sample((40, *event), "euler", 30, seed=0, dtype=torch.float64, trajectory=True)
    left = False
    for u, time in zip(states, times.tolist(), strict=True):
        D, before = tweedie(score, u, time), plain.denoise(u, time)
        data, whole = (D[:, 0], before[:, 0]) if sde.declaration.coupled else (D, before)
        assert float(data.abs().max()) < 1 + 1e-6
        torch.testing.assert_close(data, whole.clamp(-1, 1), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(D, score.denoise(u, time), atol=1e-6, rtol=1e-6)
        if sde.declaration.coupled:
            torch.testing.assert_close(D[:, 1], before[:, 1], atol=1e-6, rtol=1e-6)
        left |= bool((whole.abs() > 1.5).any())
    assert left  # else nothing was tested


def test_a_score_in_range_is_left_alone():
    u = torch.randn(50, 2)
    for rule in ((-1.3, 1.3), 0.9):
        narrow = Thresholded(exact(), rule, None if isinstance(rule, tuple) else (-1.3, 1.3))
        for time in (0.001, 0.1, 1.0):
            kept = (exact().denoise(u, time).abs() < 1.3).all(1)
            assert kept.any()
            assert torch.equal(narrow(u, time)[kept], exact()(u, time)[kept])


def imagen(D, q):
    """Saharia et al. 2022, appendix A.2, as their code has it."""
    s = torch.quantile(D.abs().reshape(len(D), -1), q, dim=1).clamp_min(1.0).reshape(-1, *(1,) * (D.ndim - 1))
    return torch.minimum(torch.maximum(D, -s), s) / s


@pytest.mark.parametrize("q", [0.1, 0.5, 0.73, 0.995])
def test_dynamic_thresholding_is_that_of_imagen(q):
    D = (
        torch.randn(20, 3, 4, 4, dtype=torch.float64)
        * torch.linspace(0.1, 3, 20, dtype=torch.float64)[:, None, None, None]
    )
    wide = Thresholded(gaussian(vp()), q)
    torch.testing.assert_close(wide.in_range(D), imagen(D, q), rtol=1e-14, atol=1e-14)
    assert float(wide.in_range(D).abs().max()) <= 1
    grey = Thresholded(gaussian(vp()), q, data_range=(0, 255))
    torch.testing.assert_close(grey.in_range(127.5 + 127.5 * D), 127.5 + 127.5 * imagen(D, q), rtol=1e-12, atol=1e-12)
    single = D[:1]  # a sample's rule is its own
    torch.testing.assert_close(wide.in_range(D)[:1], wide.in_range(single), rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["euler", "rk4"])
@pytest.mark.parametrize("threshold", [(-1.0, 0.5), 0.9])
def test_threshold_wraps_the_score(solver, threshold):
    bound = vp().reverse if solver == "euler" else vp().flow_ode
    options = {"solver": solver, "steps": 10, "seed": 0}
    given = bound(far()).sample((6, 2), threshold=threshold, **options)
    assert torch.equal(given, bound(Thresholded(far(), threshold)).sample((6, 2), **options))
    assert not torch.allclose(given, bound(far()).sample((6, 2), **options), atol=0.1)
    assert torch.equal(
        bound(far()).sample((6, 2), threshold=(-9.0, 9.0), **options), bound(far()).sample((6, 2), **options)
    )


def test_threshold_reaches_denoised_predictions_and_encode():
    end, D = vp().flow_ode(far()).sample((50, 2), "rk4", 30, seed=0, threshold=(-0.5, 0.5), return_denoised=True)
    assert float(D.abs().max()) <= 0.5
    bound = vp().flow_ode(far())
    z = bound.encode(end.double(), threshold=(-0.5, 0.5), rtol=1e-7, atol=1e-7)
    back = bound.decode(z, threshold=(-0.5, 0.5), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back, end.double(), atol=1e-3, rtol=1e-3)


def test_a_thresholded_score_is_a_score():
    score = Thresholded(far(), (-1.0, 1.0))
    assert score.data_moments() is not None and score.same_sde(vp())
    assert vp().flow_ode(score).prior is not None
    u = torch.randn(3, 2)
    torch.testing.assert_close(score(u, 0.5), score(u, torch.full((3,), 0.5)))
    assert torch.isfinite(vp().flow_ode(Thresholded(exact(), (-5.0, 5.0))).log_prob(u)).all()
    with pytest.raises(TypeError, match="threshold"):
        vp().flow_ode(far()).log_prob(u, threshold=(-1.0, 1.0))
    with pytest.raises(sdeflow.DataError, match="float64"):
        network = sdeflow.Score(sdeflow.nets.MLP(2), vp())
        vp().flow_ode(Thresholded(network, (-1.0, 1.0))).encode(u.double(), "euler", 2)


# ---------------------------------------------------------------------- chunks


@pytest.mark.parametrize("draw", ["normal", "uniform", "rademacher"])
def test_a_stream_from_a_later_block_gives_the_same_numbers(draw):
    for event in ((3,), (2, 5), (1,)):
        whole, part = NoiseStream(7, "path"), NoiseStream(7, "path", rows=2 * BLOCK)
        for _ in range(3):
            a, b = (getattr(s, draw)(shape) for s, shape in ((whole, (N, *event)), (part, (N - 2 * BLOCK, *event))))
            assert torch.equal(a[2 * BLOCK :], b)


@pytest.mark.parametrize("draw", ["normal", "uniform", "rademacher"])
def test_a_stream_from_the_middle_of_a_block_gives_the_same_numbers(draw):
    for first, rows in ((7, 30), (1000, 100), (2 * BLOCK + 3, 5), (1, N - 1)):
        whole, part = NoiseStream(7, "path"), NoiseStream(7, "path", rows=first)
        for _ in range(2):
            a, b = getattr(whole, draw)((N, 3)), getattr(part, draw)((rows, 3))
            assert torch.equal(a[first : first + rows], b)


def _coupled(name, **options):
    sde = COUPLED[name]()
    exact = GaussianMixture(
        sde, torch.tensor([[[0.5, 0.0], [1.0, 0.1]], [[-0.5, 0.1], [0.0, 0.0]]]), torch.tensor([0.1, 0.2])
    )
    return sde.reverse(exact).sample((N, 2, 2), "euler", 6, seed=0, dtype=torch.float64, **options)


SPLIT = {
    "elementwise": lambda **o: reverse().sample((N, 2), "euler", 12, seed=0, dtype=torch.float64, **o),
    "torchsde srk": lambda **o: reverse().sample((N, 2), Torchsde("srk"), 4, seed=0, dtype=torch.float64, **o),
    "without a solver": lambda **o: reverse().sample((N, 2), steps=8, seed=0, dtype=torch.float64, **o),
    "coupled": lambda **o: _coupled("critically damped", **o),
    "noise matrix": lambda **o: _coupled("noise matrix", **o),
    "state-dependent noise": lambda **o: growing_noise().sample((N, 1), "euler", 20, seed=0, dtype=torch.float64, **o),
    "flow": lambda **o: flow().sample((N, 2), "rk4", 4, seed=0, dtype=torch.float64, **o),
    "decode": lambda **o: flow().decode(torch.linspace(-3, 3, 2 * N).double().reshape(N, 2), "rk4", 4, **o),
    "encode": lambda **o: flow().encode(torch.linspace(-1, 1, 2 * N).double().reshape(N, 2), "rk4", 4, **o),
}


@pytest.mark.parametrize("name", SPLIT)
def test_samples_do_not_depend_on_chunks(name):
    whole, split = SPLIT[name](), SPLIT[name](chunk=BLOCK)
    assert whole.shape == split.shape
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-9)


def test_chunks_are_equal_bit_for_bit_where_the_score_is():
    bound = vp().reverse(lambda u, time: -u, prior=vp().prior)
    whole = bound.sample((N, 2, 3), "euler", 10, seed=0)
    assert torch.equal(bound.sample((N, 2, 3), "euler", 10, seed=0, chunk=2 * BLOCK), whole)
    assert torch.equal(bound.sample((BLOCK + 1, 2, 3), "euler", 10, seed=0, chunk=BLOCK), whole[: BLOCK + 1])


def test_chunks_need_not_be_whole_blocks():
    torch.testing.assert_close(SPLIT["elementwise"](chunk=700), SPLIT["elementwise"](), rtol=1e-9, atol=1e-9)


def test_noise_that_forgets_its_block_is_found(monkeypatch):
    whole = SPLIT["elementwise"]()
    monkeypatch.setattr(sampling, "NoiseStream", lambda seed, purpose, block: NoiseStream(seed, purpose))
    split = SPLIT["elementwise"](chunk=BLOCK)
    torch.testing.assert_close(split[:BLOCK], whole[:BLOCK], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(split[BLOCK:], whole[BLOCK:], atol=1e-3)


def test_trajectories_and_predictions_of_chunks_are_joined_along_the_batch():
    options = {"trajectory": True, "return_denoised": True}
    whole, split = SPLIT["flow"](**options), SPLIT["flow"](chunk=BLOCK, **options)
    assert split[0].shape == (5, N, 2)
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    x, D = SPLIT["flow"](chunk=BLOCK, return_denoised=True)
    assert torch.equal(x, split[0][-1]) and torch.equal(D, split[2][-1])


def test_callbacks_go_through_the_chunks_in_turn():
    seen = []
    SPLIT["flow"](chunk=2 * BLOCK, callback=lambda step, t, x: seen.append((step, len(x))))
    assert seen == [(i, 2 * BLOCK) for i in (1, 2, 3, 4)] + [(i, N - 2 * BLOCK) for i in (1, 2, 3, 4)]


def sizes_of(sample):
    """Batch sizes at which the score is called."""
    seen = set()

    def score(u, time):
        seen.add(len(u))
        return -u

    sample(score)
    return seen


def test_large_batches_are_split_by_themselves_unless_steps_depend_on_the_batch(monkeypatch):
    monkeypatch.setattr(sampling, "_LARGEST", 2 * 2 * BLOCK + 5)
    prior = vp().prior

    def ode(shape, *args, **options):
        return lambda score: vp().flow_ode(score, prior=prior).sample(shape, *args, seed=0, **options)

    def sde(shape, *args, **options):
        return lambda score: vp().reverse(score, prior=prior).sample(shape, *args, seed=0, **options)

    assert sizes_of(ode((N, 2), "rk4", 1)) == {2 * BLOCK, N - 2 * BLOCK}
    assert sizes_of(sde((N, 2), "euler", 1)) == {2 * BLOCK, N - 2 * BLOCK}
    assert max(sizes_of(sde((N, 7, 9), "euler", 1))) == (4 * BLOCK + 5) // 63
    assert sizes_of(ode((2 * BLOCK, 2), "rk4", 1)) == {2 * BLOCK}
    assert sizes_of(ode((N, 2), "dopri5", rtol=0.1, atol=0.1)) == {N}
    assert sizes_of(sde((N, 2), Torchsde("euler", adaptive=True), rtol=1.0, atol=1.0)) == {N}


@pytest.mark.parametrize("chunk", [BLOCK, None])
def test_one_bar_counts_all_chunks(monkeypatch, chunk):
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.n, self.disable = total, 0, False
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            self.n += 1

    monkeypatch.setattr(sampling, "tqdm", Bar)
    SPLIT["flow"](chunk=chunk)
    (bar,) = bars
    assert bar.n == bar.total == 16 * (3 if chunk else 1)


def test_errors_name_the_rows_of_the_batch():
    z = torch.zeros(N, 1)
    z[2500] = 5.0
    bound = vp().flow_ode(lambda u, time: torch.where(u > 2, torch.nan, -u), prior=vp().prior)
    with pytest.raises(sdeflow.errors.NonFiniteStateError, match="count from sample 2048") as caught:
        bound.decode(z, "rk4", 3, chunk=2 * BLOCK)
    assert caught.value.bad_rows == [2500]


# ---------------------------------------------------------------------- labels


class ByLabel(nn.Module):
    """E[x_0 | x_t, y] = y, and a note of what it was called with."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, u, time, y):
        self.seen.append(len(y))
        return self.scale * y.to(u.dtype)[:, None].expand_as(u)


def by_label():
    return sdeflow.Score(ByLabel(), vp(), predicts="data", data_mean=0.0, data_std=1.0)


def test_labels_are_cut_with_the_chunks():
    score, y = by_label(), torch.arange(N) % 7 - 3
    for given in (score.given(y), Thresholded(score.given(y), (-9.0, 9.0))):
        for bound in (vp().flow_ode(given), vp().reverse(given)):
            name = "rk4" if bound.equation.diffusion == 0 else "euler"
            options = {"solver": name, "steps": 60, "grid": "log_snr", "seed": 0}
            score.net.seen.clear()
            split = bound.sample((N, 1), chunk=BLOCK, return_denoised=True, **options)[0]
            assert set(score.net.seen) == {BLOCK, N - 2 * BLOCK}
            torch.testing.assert_close(split, bound.sample((N, 1), **options), atol=1e-5, rtol=1e-5)
            assert float((split[:, 0] - y).abs().max()) < 0.1
    one = vp().flow_ode(score.given(2)).sample((N, 1), "rk4", 60, grid="log_snr", seed=0, chunk=BLOCK)
    assert float((one - 2).abs().max()) < 0.1


def test_a_wrong_number_of_labels_is_found_in_chunks_too():
    for labels in (N - 1, N + 1, BLOCK):
        bound = vp().flow_ode(by_label().given(torch.zeros(labels)))
        for chunk in (BLOCK, None):
            with pytest.raises(sdeflow.DataError, match=f"{labels} samples, the batch has {N}"):
                bound.sample((N, 1), "euler", 2, chunk=chunk)


def test_a_prior_is_read_off_a_score_with_labels_for_a_batch():
    score = sdeflow.Score(ByLabel(), vp(), predicts="data")
    bound = vp().flow_ode(score.given(torch.arange(50) % 3 - 1))
    assert bound.sample((50, 1), "euler", 20, seed=0).shape == (50, 1)
    alpha = float(vp().kernel.moments(torch.ones(1, 1), vp().T)[0])
    torch.testing.assert_close(
        bound.prior.mean, alpha * (torch.arange(50) % 3 - 1.0)[:, None], rtol=0, atol=1e-3, check_dtype=False
    )
    assert bound.prior.std.shape == (50, 1) and float((bound.prior.std - 1).abs().max()) < 0.1


# ---------------------------------------------------------------------- modes


def by_energy(u, time):
    """A score that is the gradient of an energy, so it needs autograd inside."""
    with torch.enable_grad():
        u = u.detach().requires_grad_(True)
        energy = -0.5 * u.square().sum()
        return torch.autograd.grad(energy, u)[0]


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_results_are_ordinary_tensors_and_scores_may_use_autograd(outside):
    with outside():
        for bound, solver in ((vp().reverse(by_energy), "euler"), (vp().flow_ode(by_energy), "rk4")):
            result = bound.sample((4, 2), solver, 5, seed=0, trajectory=True, return_denoised=True)
    for tensor in result:
        assert not tensor.is_inference() and not tensor.requires_grad
    w = torch.ones(2, requires_grad=True)
    (result[0][-1] * w).sum().backward()
    assert torch.equal(w.grad, result[0][-1].sum(0))
    u = torch.randn(3, 2, requires_grad=True)
    bound.prior.log_prob(u).sum().backward()  # the prior was read off the score under that mode


# ---------------------------------------------------------------------- grids and solvers


class Probe(sdeflow.solvers.Solver):
    """A solver that notes its problem and returns its state."""

    kinds = ("ode", "sde")
    adaptive = needs_kernel = False
    calls_per_step = 1

    def __init__(self, default_grid=None, **attributes):
        self.default_grid = default_grid
        self.__dict__.update(attributes)

    def __str__(self):
        return "Probe()"

    def solve(self, problem, y, steps, rtol, atol):
        self.problem, self.steps = problem, steps
        return y


def middle(bound, probe, **options):
    """The time in the middle of the clock."""
    bound.sample((2, 2), probe, 4, **options)
    return probe.problem.clock(0.5)[0]


def test_a_solver_may_prefer_a_grid():
    angle, log_snr, plain = (vp().flow_ode(exact()).model.clock(g)(0.5)[0] for g in ("angle", "log_snr", "t"))
    assert middle(flow(), Probe()) == angle
    assert middle(flow(), Probe("log_snr")) == log_snr
    assert middle(flow(), Probe("log_snr"), grid="t") == plain
    assert middle(reverse(), Probe("log_snr")) == log_snr
    general = well().flow_ode(lambda u, time: -u, prior=sdeflow.Gaussian(0.0, 1.0))
    assert middle(general, Probe("log_snr")) == pytest.approx((0.01 + 2) / 2)
    pause = SDE(-x, sp.Piecewise((1, t < 0.5), (0, t < 0.6), (1, True)))
    clock = pause.flow_ode(gaussian(pause, d=2)).model.clock("log_snr")
    assert middle(pause.flow_ode(gaussian(pause, d=2)), Probe("log_snr")) == clock(0.5)[0]
    assert clock(0.0)[0] == pause.cutoff
    assert clock(1.0)[0] == 1.0


def test_a_grid_of_times_gives_the_steps():
    times = torch.tensor([vp().cutoff, 0.01, 0.1, 0.4, 1.0], dtype=torch.float64)
    for sample in (reverse().sample, flow().sample):
        _, visited = sample((2, 2), "euler", grid=times, seed=0, trajectory=True)
        torch.testing.assert_close(visited, times.flip(0))
    _, visited = reverse().sample((2, 2), "euler", 2, grid=times, seed=0, trajectory=True)
    assert len(visited) == 3
    _, visited = flow().sample((2, 2), "dopri5", grid=times, seed=0, trajectory=True)
    assert len(visited) > 5


def test_a_solver_that_needs_a_kernel_says_so_before_any_work():
    def score(u, time):
        raise AssertionError("work was done")

    bound = well().flow_ode(score, prior=sdeflow.Gaussian(0.0, 1.0))
    with pytest.raises(ValueError, match=r"Probe\(\) needs a Gaussian kernel.*dopri5.*rk4"):
        bound.sample((2, 2), Probe(needs_kernel=True), 4)


def test_empty_batches_keep_their_shapes():
    options = {"steps": 4, "seed": 0}
    assert reverse().sample((0, 2), "euler", **options).shape == (0, 2)
    states, times, D = reverse().sample((0, 2), "euler", trajectory=True, return_denoised=True, **options)
    assert states.shape == D.shape == (5, 0, 2) and times.shape == (5,)
    _, visited = reverse().sample((3, 2), "euler", trajectory=True, **options)
    torch.testing.assert_close(times, visited)
    x, D = flow().sample((0, 2), "rk4", return_denoised=True, chunk=BLOCK, **options)
    assert x.shape == D.shape == (0, 2)


# ---------------------------------------------------------------------- what is refused

REFUSED = {
    "trajectory": ({"trajectory": 1}, TypeError, "trajectory must be True or False, not 1"),
    "denoise": ({"denoise": "yes"}, TypeError, "denoise must be"),
    "return_denoised": ({"return_denoised": None}, TypeError, "return_denoised must be"),
    "callback": ({"callback": 3}, TypeError, r"callback must be callable as callback\(step, t, x\), not 3"),
    "progress": ({"progress": "yes"}, TypeError, "progress must be"),
    **{
        f"chunk {bad!r}": ({"chunk": bad}, ValueError, "chunk must be an integer of at least 1")
        for bad in (0, -1024, 1024.0, True, "1024")
    },
    **{
        f"threshold {bad!r}": ({"threshold": bad}, ValueError, r"threshold must be \(low, high\)")
        for bad in (0.0, 1.0, 2, True, (1.0, -1.0), (0.0, math.inf), (1.0,), "0.9", (0.9, "high"), torch.ones(2))
    },
    "unknown": ({"tresholdd": 0.9}, TypeError, "tresholdd"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_make_no_sense_are_refused(name):
    options, kind, message = REFUSED[name]
    z = torch.randn(2, 2)
    for call in (
        lambda: reverse().sample((2, 2), "euler", 2, **options),
        lambda: flow().sample((2, 2), "euler", 2, **options),
        lambda: flow().decode(z, "euler", 2, **options),
    ):
        with pytest.raises(kind, match=message):
            call()
    if not name.startswith(("denoise", "return_denoised")):
        with pytest.raises(kind, match=message):
            flow().encode(z, "euler", 2, **options)


def test_encode_has_no_prediction_at_the_data():
    for option in ("denoise", "return_denoised"):
        with pytest.raises(TypeError, match=option):
            flow().encode(torch.randn(2, 2), "euler", 2, **{option: True})


@pytest.mark.parametrize("options", [{"trajectory": True}, {"callback": print}], ids=["trajectory", "callback"])
def test_solvers_that_do_not_say_when_a_step_ends_are_named(options):
    with pytest.raises(ValueError, match=r"does not say when a step ends; those that do, by name: .*dopri5.*rk4"):
        flow().sample((2, 2), "scipy_solver", **options)
    with pytest.raises(ValueError, match=r"does not say when a step ends; those that do, by name: .*euler"):
        reverse().sample((2, 2), Torchsde("milstein"), rtol=0.1, atol=0.1, **options)


def test_batch_adaptive_solvers_take_no_chunks():
    with pytest.raises(ValueError, match=r"chunk=1024: .*dopri5.*the whole batch"):
        flow().sample((2, 2), "dopri5", chunk=BLOCK)
    with pytest.raises(ValueError, match="the whole batch"):
        reverse().sample((2, 2), Torchsde("euler"), rtol=0.1, atol=0.1, chunk=BLOCK)
    assert flow().sample((2, 2), Probe(adaptive=True, per_sample=True), chunk=BLOCK).shape == (2, 2)


def test_solvers_of_samples_at_different_times_have_no_trajectory():
    with pytest.raises(ValueError, match="times of its own"):
        flow().sample((2, 2), Probe(adaptive=True, per_sample=True), trajectory=True)


def test_a_solver_that_observes_nothing_is_found():
    with pytest.raises(ValueError, match="did not call problem"):
        flow().sample((2, 2), Probe(), 3, trajectory=True)


@pytest.mark.parametrize("options", [{"denoise": True}, {"return_denoised": True}, {"threshold": 0.9}], ids=str)
def test_predictions_need_a_gaussian_kernel_and_say_so_before_any_work(options):
    def score(u, time):
        raise AssertionError("work was done")

    bound = well().flow_ode(score, prior=sdeflow.Gaussian(0.0, 1.0))
    with pytest.raises(sdeflow.NotAffineError, match=next(iter(options))):
        bound.sample((2, 2), "rk4", 3, **options)


def test_thresholded_refuses_what_makes_no_sense():
    with pytest.raises(TypeError, match="a score of sdeflow's"):
        Thresholded(lambda u, time: -u, 0.9)
    with pytest.raises(ValueError, match="data_range"):
        Thresholded(exact(), (-1.0, 1.0), data_range=(0, 1))
    with pytest.raises(ValueError, match="data_range"):
        Thresholded(exact(), 0.9, data_range=(1, 0))
    assert "quantile=0.9, low=0, high=1" in repr(Thresholded(exact(), 0.9, data_range=(0, 1)))


def test_correlated_mixtures_keep_to_the_quantile_rule():
    score = Thresholded(correlated(vp()), 0.5, data_range=(-0.4, 0.4))
    states, times = vp().flow_ode(score).sample((20, 4), "rk4", 20, seed=0, trajectory=True, dtype=torch.float64)
    for u, time in zip(states, times.tolist(), strict=True):
        assert float(tweedie(score, u, time).abs().max()) < 0.4 + 1e-6


def test_a_thresholded_score_predicts_data_in_the_range():
    """D' = alpha⁻¹ (x + sigma² s') is the prediction D, cut off at the ends."""
    score, x = far(), 3.0 * torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bounded = Thresholded(score, (-1.0, 1.0))
    for time in (0.2, 0.6):
        predicted = score.denoise(x, time)
        assert bool((predicted.abs() > 1.0).any())
        alpha, sigma, _ = vp().kernel.coefficients(torch.tensor(time, dtype=torch.float64))
        found = (x + sigma**2 * bounded(x, time)) / alpha
        torch.testing.assert_close(found, predicted.clamp(-1.0, 1.0))
