"""Objectives as objects, optimisers that are given, callbacks: values, resumption, what is refused."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from problems import gaussian
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sdeflow
from sdeflow import SDE, Score, catalog, errors, fit, x
from sdeflow.scores.thresholded import Thresholded
from sdeflow.training.callbacks import Validation
from sdeflow.training.checkpoint import latest_checkpoint, packed, unpacked
from sdeflow.training.objectives import Denoising, KernelMatching, LocalMatching, Objective

STD = 0.4
WELL = SDE(x - x**3, 1, T=2)
GEOMETRIC = SDE(x / 4, x / 2, T=1)


def draw(n, seed=0, d=2):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def small(sde=None, d=2, dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    return Score(sdeflow.nets.MLP(d, width=16, depth=1, dropout=dropout), sde or catalog.VP(), **options)


def trained(score=None, steps=12, data=None, **options):
    score = small() if score is None else score
    run = fit(score, draw(64) if data is None else data, steps, 16, progress=False, **options)
    return run.losses, [p.detach().clone() for p in score.parameters()]


def same(one, other):
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


# ------------------------------------------------------------------ objectives


@pytest.mark.parametrize("weighting", ["score", "likelihood", "edm"])
def test_the_value_is_the_integral_and_its_error_is_right(weighting):
    """The exact score of N(0, STD²) leaves the variance of eps given x_t: 1 / (1 + zeta² / STD²)."""
    sde = catalog.VP()
    score = gaussian(sde, STD, d=2)
    t = torch.as_tensor(np.geomspace(sde.cutoff, sde.T, 20_001))
    log_zeta = -sde.kernel.half_log_snr(t)
    zeta = log_zeta.exp()  # sigma / alpha
    left = 1 / (1 + zeta**2 / STD**2)
    if weighting == "score":
        expected = float(torch.trapezoid(left, t))
    elif weighting == "likelihood":  # over log zeta, in closed form
        expected = float((0.5 * torch.log(1 + STD**2 / zeta**2))[[0, -1]].diff().neg())
    else:
        density = torch.exp(-0.5 * ((log_zeta + 1.2) / 1.2) ** 2) / (1.2 * math.sqrt(2 * math.pi))
        expected = float(torch.trapezoid(density * (1 + zeta**2 / STD**2) * left, log_zeta))
    objective = Denoising(weighting)
    deviations = []
    for seed in range(150):
        mean, error = objective.value(score, STD * draw(200, seed), seed=seed)
        deviations.append((mean - expected) / error)
    deviations = np.array(deviations)  # of 150 standard normal numbers: mean 0 ± 0.08, rms 1 ± 0.06, each 4 times
    assert abs(deviations.mean()) < 4 / 150**0.5
    assert abs(np.sqrt(np.mean(deviations**2)) - 1) < 4 / 300**0.5


def test_the_value_depends_on_seed_and_data_alone():
    score, data = small(dropout=0.5), draw(100)
    score.train()
    score.net.eval()
    objective = Denoising("likelihood")
    before = torch.get_rng_state()
    first = objective.value(score, data, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert score.training and not score.net.training
    assert objective.value(score, data, seed=3) == first
    assert objective.value(score, data, seed=4) != first
    assert objective.value(score, TensorDataset(data), seed=3) == first
    assert objective.value(score, data.numpy(), seed=3) == first
    assert math.isnan(objective.value(score, data[:1])[1])
    with pytest.raises(errors.DataError, match="DataLoader"):
        objective.value(score, DataLoader(TensorDataset(data)))


def test_the_error_of_sorted_data_is_right():
    """Samples meet times at random. eps - sigma x_t leaves alpha⁴ + alpha² sigma² x_0² of variance under s = -x."""
    sde = catalog.VP()
    score, objective = gaussian(sde, 1.0), Denoising()
    data = torch.cat([draw(400, d=1) * 0.1 - 3, draw(400, 1, d=1) * 0.1])
    t = torch.as_tensor(np.linspace(sde.cutoff, sde.T, 20_001))
    alpha_2 = torch.sigmoid(2 * sde.kernel.half_log_snr(t))  # alpha² + sigma² = 1
    square = float(data.double().square().mean())
    expected = float(torch.trapezoid(alpha_2**2 + alpha_2 * (1 - alpha_2) * square, t))
    found = [objective.value(score, data, seed=seed) for seed in range(60)]
    deviations = np.array([(mean - expected) / error for mean, error in found])
    assert abs(deviations.mean()) < 4 / 60**0.5
    assert np.sqrt(np.mean(deviations**2)) < 1 + 4 / 120**0.5  # smaller, for the data are always these


def test_a_value_of_labelled_data():
    torch.manual_seed(0)
    score = Score(sdeflow.nets.MLP(2, width=16, depth=1, classes=3), catalog.VP())
    with torch.no_grad():
        for parameter in score.parameters():
            parameter.normal_()
    labels = torch.arange(64) % 3
    value = Denoising().value(score, (draw(64), labels))
    assert value != Denoising().value(score, (draw(64), (labels + 1) % 3))
    assert value == Denoising().value(score, TensorDataset(draw(64), labels))


def test_a_wrapped_score_has_the_scale_of_its_data():
    """A range that nothing leaves changes nothing, and "edm" knows the data's standard deviation all the same."""
    exact = gaussian(catalog.VP(), STD, d=2)
    wrapped = Thresholded(exact, (-1e3, 1e3))
    assert Denoising("edm").value(wrapped, draw(50)) == Denoising("edm").value(exact, draw(50))


def test_objects_names_and_options_mean_the_same():
    usual = trained()
    for objective in ("denoising", Denoising("likelihood"), Denoising("likelihood", "log_snr")):
        assert same(usual, trained(objective=objective))
    assert same(trained(weighting="edm"), trained(objective=Denoising("edm")))
    assert same(trained(weighting="p2", times="t"), trained(objective="denoising", weighting="p2", times="t"))
    assert not same(usual, trained(objective=Denoising()))  # whose weighting is "score"
    one = 0.2 * draw(64, d=1).abs() + 0.5
    geometric = functools.partial(trained, data=one, steps=3)
    assert same(
        geometric(small(GEOMETRIC, 1, predicts="score")),
        geometric(small(GEOMETRIC, 1, predicts="score"), objective=KernelMatching()),
    )
    options = {"gap": 2, "simulation_steps": 10}
    by_options = geometric(small(WELL, 1, predicts="score"), **options)
    assert same(by_options, geometric(small(WELL, 1, predicts="score"), objective=LocalMatching(**options)))
    assert same(by_options, geometric(small(WELL, 1, predicts="score"), objective="local_matching", **options))


def test_simulated_pairs_serve_an_affine_sde_too():
    """Both objectives have the exact score as their minimiser, so a wrong score is worse under both."""
    sde = SDE(-x, 1, T=1)
    exact, data = gaussian(sde, STD), STD * draw(4000, d=1)
    wrong = gaussian(sde, 1.5 * STD)
    local = LocalMatching(simulation_steps=20, gap=2)
    (better, a), (worse, b) = (local.value(score, data, seed=1) for score in (exact, wrong))
    assert worse - better > 0  # at the same draws
    assert a < better and b < worse


def test_an_objective_says_what_it_needs():
    for objective, sde in ((Denoising(), WELL), (Denoising(), GEOMETRIC), (KernelMatching(), catalog.VP())):
        with pytest.raises(errors.NotAffineError, match=type(objective).__name__):
            trained(small(sde, predicts="score"), objective=objective)
        with pytest.raises(errors.NotAffineError, match="kernel"):
            objective.value(small(sde, predicts="score"), draw(4))
    with pytest.raises(errors.NotAffineError, match="exact kernel, but not a Gaussian one"):
        trained(objective="kernel_matching")
    for make in (lambda: Denoising("uniform"), lambda: KernelMatching("edm"), lambda: LocalMatching(times="log_snr")):
        with pytest.raises(ValueError, match=r"weighting|times"):
            make()
    with pytest.raises(ValueError, match="objective must be"):
        trained(objective="score matching")
    with pytest.raises(ValueError, match="weighting and times belong to the objective"):
        trained(objective=Denoising(), weighting="edm", times="t")
    with pytest.raises(ValueError, match="simulated paths"):
        trained(objective="denoising", gap=3)
    with pytest.raises(TypeError, match="abstract"):
        Objective()
    assert repr(LocalMatching(gap=3)) == (
        "LocalMatching(weighting='score', times='t', gap=3, simulation_steps=200)"
    )  # fmt: skip


# ------------------------------------------------------------------ optimisers


class Stepped:
    """A learning-rate schedule of torch's as a callback."""

    def __init__(self, make):
        self.make, self.scheduler, self.kept = make, None, None

    def after_step(self, run, loss):
        if self.scheduler is None:
            self.scheduler = self.make(run.optimiser.optimizer)
            if self.kept is not None:
                self.scheduler.load_state_dict(self.kept)
        self.scheduler.step()

    def state_dict(self):
        return self.scheduler.state_dict()

    def load_state_dict(self, state):
        self.kept = state


OPTIMISERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "two groups": lambda p: torch.optim.RMSprop([{"params": p[:2]}, {"params": p[2:], "lr": 1e-3}], lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("schedule", [None, "constant"])
def test_a_run_with_any_optimiser_goes_on_where_it_stopped(make, schedule, tmp_path):
    options = {"optimiser": make, "schedule": schedule}
    whole = trained(**options)
    with pytest.raises(KeyboardInterrupt):
        trained(callbacks=[Interrupt(5)], out=tmp_path, **options)
    losses, weights = trained(small(seed=9), out=tmp_path, resume=True, **options)
    assert same(whole, (losses, weights))
    with pytest.raises(errors.CheckpointMismatch, match=r"lr|optimiser"):
        trained(steps=20, out=tmp_path, resume=True)


def test_a_schedule_of_torchs_is_a_callback_with_state(tmp_path):
    def options():
        make = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
        return {"optimiser": OPTIMISERS["sgd"], "callbacks": [Stepped(make)]}

    whole = trained(**options())
    first = options()
    with pytest.raises(KeyboardInterrupt):
        trained(out=tmp_path, optimiser=first["optimiser"], callbacks=[*first["callbacks"], Interrupt(5)])
    rest = trained(small(seed=9), out=tmp_path, resume=True, **options())
    assert same(whole, rest)
    with pytest.raises(errors.CheckpointMismatch, match=r"callbacks: \['Stepped'\] there, None here"):
        trained(steps=20, out=tmp_path, resume=True, optimiser=OPTIMISERS["sgd"])


def test_a_given_optimiser_is_the_one_that_steps():
    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    assert same(trained(lr=3e-3), trained(optimiser=adam, schedule="cosine"))
    score = small()
    optimiser = torch.optim.Adam(score.parameters(), lr=3e-3)
    assert same(trained(lr=3e-3), trained(score, optimiser=optimiser, schedule="cosine"))
    assert optimiser.param_groups[0]["lr"] == 3e-3  # its own again
    # one step of SGD by hand: p - lr g, the gradient of the loss over its value at unit variance, unclipped
    score, seen = small(), {}

    class See:
        def after_step(self, run, loss):
            seen["gradients"] = [p.grad.clone() for p in run.score.parameters()]

    start = [p.detach().clone() for p in score.parameters()]
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    trained(score, 1, optimiser=sgd, callbacks=[See()], ema=0.0, clip=1e9)
    for p, before, gradient in zip(score.parameters(), start, seen["gradients"], strict=True):
        torch.testing.assert_close(p.detach(), before - 0.1 * gradient)
    with pytest.raises(ValueError, match="its own learning rate"):
        trained(optimiser=adam, lr=1e-3)
    with pytest.raises(ValueError, match="LBFGS"):
        trained(optimiser=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="none of the score's"):
        trained(optimiser=torch.optim.SGD(small().parameters(), lr=1.0))
    for wrong in ("adam", lambda p: None):
        with pytest.raises(TypeError, match="torch optimiser"):
            trained(optimiser=wrong)


# ------------------------------------------------------------------ callbacks


class Interrupt:
    def __init__(self, step):
        self.step = step

    def after_step(self, run, loss):
        if run.step == self.step:
            raise KeyboardInterrupt


def test_callbacks_see_each_whole_step():
    seen = []

    class See:
        def after_step(self, run, loss):
            weights = nn.utils.parameters_to_vector(run.score.parameters()).detach()
            seen.append((run.step, loss, run.losses[-1], weights, int(run.average.updates), run.steps))

    losses, _ = trained(callbacks=[See()], steps=4)
    assert [entry[0] for entry in seen] == [entry[4] for entry in seen] == [1, 2, 3, 4]
    assert [entry[1] for entry in seen] == [entry[2] for entry in seen] == losses
    assert all(entry[5] == 4 for entry in seen)
    assert not any(torch.equal(a[3], b[3]) for a, b in itertools.pairwise(seen))
    assert same(trained(), trained(callbacks=[See()]))


def test_a_stopped_run_has_a_checkpoint_and_its_average(tmp_path):
    class Stop:
        def after_step(self, run, loss):
            if run.step == 5:
                run.stop()

    score = small()
    run = fit(score, draw(64), 12, 16, callbacks=[Stop()], out=tmp_path, progress=False)
    assert run.steps == len(run.losses) == 5 and not score.training
    state, tensors = latest_checkpoint(tmp_path)
    assert state["step"] == 5
    assert all(map(torch.equal, score.state_dict().values(), (tensors["average"][k] for k in score.state_dict())))
    whole = trained()
    assert same(whole, trained(small(seed=9), out=tmp_path, resume=True))


def test_an_error_in_a_callback_loses_nothing(tmp_path):
    whole = trained(small(dropout=0.3))
    with pytest.raises(KeyboardInterrupt):
        trained(small(dropout=0.3), callbacks=[Interrupt(7)], out=tmp_path)
    assert latest_checkpoint(tmp_path)[0]["step"] == 7
    assert same(whole, trained(small(dropout=0.3, seed=9), out=tmp_path, resume=True))
    with pytest.raises(KeyboardInterrupt):
        trained(callbacks=[Interrupt(7)])  # without a folder
    assert same(trained(), trained())


def test_what_is_no_callback_is_refused(tmp_path):
    for wrong in (Interrupt(1), [print], [Interrupt], 3):
        with pytest.raises(TypeError, match="callback"):
            trained(callbacks=wrong)

    class Odd(Interrupt):
        def state_dict(self):
            return {"text": "a", "object": object()}

    with pytest.raises(errors.CheckpointError, match="Odd holds a object"):
        trained(callbacks=[Odd(99)], out=tmp_path)


def test_the_state_of_a_checkpoint_is_what_it_was():
    tensors = {}
    state = {0: {"step": torch.tensor(3), "betas": (0.9, 0.999)}, "a": [1, 2.5, None, True, "text", [], {}, ()]}
    plain = packed(state, tensors, "it")
    found = unpacked(plain, tensors)
    assert torch.equal(found[0].pop("step"), state[0].pop("step"))
    assert found == state and isinstance(found[0]["betas"], tuple)


# ------------------------------------------------------------------ validation


def test_validation_is_the_objective_of_the_average_and_disturbs_nothing():
    held_out = draw(200, 5)
    score = small(dropout=0.3)
    run = fit(score, draw(64), 25, 16, validation=held_out, progress=False)
    assert [step for step, *_ in run.validation] == [*range(3, 25, 3), 25]
    assert run.validation[-1] == (25, *Denoising("likelihood").value(score, held_out))
    assert "validation" in repr(run)
    chosen = Validation(held_out, every=10, seed=2)
    again = fit(other := small(dropout=0.3), draw(64), 25, 16, callbacks=[chosen], progress=False)
    assert [step for step, *_ in again.validation] == [10, 20, 25]
    plain = trained(small(dropout=0.3), 25)
    for found, net in ((run, score), (again, other)):
        assert same(plain, (found.losses, list(net.parameters())))
    with pytest.raises(errors.DataError, match="n >= 1"):
        trained(validation=torch.zeros(0, 2))


def test_validation_sees_what_training_does_not():
    """On data of another law the objective is larger, by far more than its error."""
    data = 0.2 * draw(512)
    run = [
        fit(small(), data, 100, 64, validation=rows, lr=1e-2, progress=False).validation[-1]
        for rows in (0.2 * draw(512, 1), 0.2 * draw(512, 1) + 1.0)
    ]
    (_, near, a), (_, far, b) = run
    assert far - near > 5 * math.hypot(a, b)


def test_buffers_of_the_average_are_evaluated():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.net = nn.BatchNorm1d(2), sdeflow.nets.MLP(2, width=8, depth=1)

        def forward(self, x, t):
            return self.net(self.norm(x), t)

    torch.manual_seed(0)
    score = Score(Normed(), catalog.VP())
    run = fit(score, draw(64), 6, 16, validation=draw(32, 1), progress=False)
    assert run.validation[-1][1:] == Denoising("likelihood").value(score, draw(32, 1))
    assert int(score.net.norm.num_batches_tracked) == 6
