"""What docs/architecture.rst says under "To add an objective", followed: a user's own objective and callback."""

import math

import pytest
import torch
from scipy import integrate
from scipy.stats import norm

import sdeflow
from sdeflow import Score, catalog, fit


class Huber(sdeflow.objectives.Denoising):
    """Denoising with Huber's loss of the error of eps, which outliers in the data move less."""

    def __init__(self, delta=1.0, **options):
        super().__init__(**options)
        self.delta = delta

    def loss(self, score, batch, y=None):
        x_0, t, eps = batch
        error = score.noise(score.kernel.sample(x_0, t, noise=eps), t, y) - eps
        return torch.nn.functional.huber_loss(error, 0 * error, reduction="none", delta=self.delta).flatten(1).mean(1)


class EarlyStop:
    """Ends a run when the mean of the last ``window`` losses is above ``share`` of the mean of those before."""

    def __init__(self, window, share=1.0):
        self.window, self.share, self.latest = window, share, []

    def after_step(self, run, loss):
        self.latest = [*self.latest, loss][-2 * self.window :]
        before, after = self.latest[: self.window], self.latest[self.window :]
        if len(after) == self.window and sum(after) > self.share * sum(before):
            run.stop()

    def state_dict(self):
        return {"latest": self.latest}

    def load_state_dict(self, state):
        self.latest = state["latest"]


def small(**options):
    torch.manual_seed(0)
    return Score(sdeflow.nets.MLP(2, width=16, depth=1), catalog.VP(), **options)


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_the_value_of_a_users_objective_is_its_integral(delta):
    """A network that returns 0 has eps as its error: (T - cutoff) E huber(z), z ~ N(0, 1)."""
    sde = catalog.VP()
    blind = Score(lambda x, t: 0 * x, sde, predicts="noise")
    inner = integrate.quad(lambda z: z**2 * norm.pdf(z), 0, delta)[0]
    outer = integrate.quad(lambda z: 2 * delta * (z - delta / 2) * norm.pdf(z), delta, math.inf)[0]
    mean, error = Huber(delta).value(blind, torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)))
    assert error < 0.02
    assert abs(mean - (sde.T - sde.cutoff) * (inner + outer)) < 4 * error


def test_a_users_objective_trains():
    data = torch.randn(512, 2, generator=torch.Generator().manual_seed(0)) * 0.3 + 1.0
    objective, score = Huber(0.5), small(predicts="noise")
    blind = Score(lambda x, t: 0 * x, catalog.VP(), predicts="noise")
    run = fit(score, data, 200, 64, objective=objective, validation=data, lr=1e-2, progress=False)
    value, error = objective.value(score, data)
    assert run.validation[-1] == (200, value, error)
    assert value < 0.7 * objective.value(blind, data)[0]


def test_a_users_callback_ends_a_run_and_goes_on_where_it_stopped(tmp_path):
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    options = {"batch_size": 16, "objective": Huber(), "progress": False, "seed": 1}
    whole = EarlyStop(5)
    run = fit(small(), data, 60, callbacks=[whole], **options)
    assert 10 <= run.steps == len(run.losses) < 60
    assert sum(run.losses[-5:]) > sum(run.losses[-10:-5])

    class Kill(Exception):
        pass

    class KillAt7:
        def after_step(self, run, loss):
            if run.step == 7:
                raise Kill

    with pytest.raises(Kill):
        fit(small(), data, 60, callbacks=[EarlyStop(5), KillAt7()], out=tmp_path, **options)
    later = EarlyStop(5)
    rest = fit(small(), data, 60, callbacks=[later], out=tmp_path, resume=True, **options)
    assert rest.losses == run.losses
    assert later.latest == whole.latest
    with pytest.raises(sdeflow.errors.CheckpointMismatch, match=r"delta: 1\.0 there, 2\.0 here"):
        fit(small(), data, 60, out=tmp_path, resume=True, **{**options, "objective": Huber(2.0)})
