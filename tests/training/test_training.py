"""fit: what it learns, what it is given, and what it leaves behind."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import sdeflow
from sdeflow import Score, catalog, fit


def small(sde, **options):
    torch.manual_seed(0)
    return Score(sdeflow.nets.MLP(2, width=64, depth=2), sde, **options)


@pytest.mark.slow
@pytest.mark.parametrize("predicts", ["edm", "noise", "velocity"])
def test_a_trained_score_approaches_the_exact_one(predicts):
    """The data is a mixture: the trained score must explain most of what a Gaussian of its moments leaves over."""
    sde = catalog.VP()
    exact = sdeflow.scores.GaussianMixture(sde, torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.1, 0.2]))
    score = small(sde, predicts=predicts)
    fit(score, exact.sample(4096, seed=0), 600, batch_size=256, lr=3e-3, seed=0)
    data = exact.sample(2000, seed=1)
    blind = Score(lambda u, _: torch.zeros_like(u), sde, data_mean=score.data_mean, data_std=score.data_std)
    ours, theirs = 0.0, 0.0
    for time in (0.02, 0.1, 0.3):
        state = sde.kernel.sample(data, time, seed=2)
        truth = exact.noise(state, time)
        with torch.no_grad():
            ours += float((score.noise(state, time) - truth).square().mean())
            theirs += float((blind.noise(state, time) - truth).square().mean())
    assert ours < 0.15 * theirs


def test_data_sets_loaders_and_labels():
    sde = catalog.VP()
    data = torch.randn(64, 2)
    labels = torch.randint(0, 3, (64,))
    assert len(fit(small(sde), data, 3).losses) == 3
    assert len(fit(small(sde), TensorDataset(data), 3, batch_size=16).losses) == 3
    assert len(fit(small(sde), DataLoader(TensorDataset(data), batch_size=32), 5).losses) == 5
    conditional = Score(sdeflow.nets.MLP(2, width=16, depth=1, classes=3), sde)
    assert len(fit(conditional, TensorDataset(data, labels), 3, batch_size=16).losses) == 3


def test_moments_are_measured_unless_given():
    sde = catalog.VP()
    data = 3 + 2 * torch.randn(512, 2)
    score = small(sde)
    fit(score, data, 1)
    assert abs(float(score.data_mean) - float(data.mean())) < 1e-5
    assert abs(float(score.data_std) - float(data.std(correction=0))) < 1e-5
    given = small(sde, data_mean=0.5, data_std=1.5)
    fit(given, data, 1)
    assert (float(given.data_mean), float(given.data_std)) == (0.5, 1.5)


def test_the_average_is_what_remains():
    """Without an average (ema=0) the last weights remain; with one, the weights lag behind."""
    sde, data = catalog.VP(), torch.randn(64, 2)
    plain, averaged = small(sde), small(sde)
    fit(plain, data, 30, ema=0.0, schedule="constant")
    fit(averaged, data, 30, ema=0.999, schedule="constant")
    start = small(sde)
    moved = sum(float((p - q).square().sum()) for p, q in zip(plain.parameters(), start.parameters(), strict=True))
    lagged = sum(float((p - q).square().sum()) for p, q in zip(averaged.parameters(), start.parameters(), strict=True))
    assert 0 < lagged < moved
    assert not averaged.training


@pytest.mark.parametrize("weighting", ["score", "likelihood", lambda time: time])
def test_weightings_train(weighting):
    losses = fit(small(catalog.VP()), torch.randn(64, 2), 5, weighting=weighting, times="t").losses
    assert all(torch.isfinite(torch.tensor(losses)))


def test_bfloat16_stays_finite():
    losses = fit(small(catalog.VP()), torch.randn(64, 2), 20, mixed_precision="bf16").losses
    assert all(torch.isfinite(torch.tensor(losses)))


def test_images_train_a_unet():
    score = Score(sdeflow.nets.UNet(1, width=8, multipliers=(1, 1)), catalog.CosineVP())
    losses = fit(score, torch.rand(32, 1, 8, 8), 4, batch_size=8).losses
    assert len(losses) == 4


def test_a_used_folder_is_not_written_over(tmp_path):
    sde, data = catalog.VP(), torch.randn(64, 2)
    fit(small(sde), data, 4, out=tmp_path, checkpoint_every=2)
    with pytest.raises(sdeflow.errors.CheckpointError, match="earlier run"):
        fit(small(sde), data, 4, out=tmp_path)
    with pytest.raises(sdeflow.errors.CheckpointMismatch, match="more than steps=2"):
        fit(small(sde), data, 2, out=tmp_path, resume=True)
    for changed, options in ((data * 3, {}), (data, {"lr": 1.0})):
        with pytest.raises(sdeflow.errors.CheckpointMismatch, match="another run"):
            fit(small(sde), changed, 6, out=tmp_path, resume=True, **options)


def test_moments_are_those_of_all_the_data():
    score = small(catalog.VP())
    fit(score, torch.cat([torch.randn(10_000, 2), torch.randn(10_000, 2) + 10]), 1)
    assert abs(float(score.data_mean) - 5) < 0.05
    assert abs(float(score.data_std) - 26**0.5) < 0.05


def test_moments_keep_their_shape_and_digits(tmp_path):
    sde = catalog.VP()
    score = small(sde, data_mean=torch.tensor([0.1, 0.2]), data_std=torch.tensor([1.0, 3.0]))
    fresh = small(sde)
    fresh.load_state_dict(score.state_dict())
    assert torch.equal(fresh.data_std, score.data_std)
    assert torch.equal(fresh.to(torch.bfloat16).data_mean, score.data_mean)
