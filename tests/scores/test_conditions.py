"""Conditions: what a network is given besides x and t, in training and in every call."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sdeflow import DataError, Score, ScoreError, catalog, fit, nets
from sdeflow.numerics.conditions import distinct, from_named_leaves, key_of, named_leaves, of_samples, picked
from sdeflow.scores import ScoreFunction

SDE = catalog.VP()


class Spy(nn.Module):
    """Learns nothing much, and remembers what it is given."""

    classes = 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x, t, y=None):
        self.seen.append(y)
        label = y["label"] if isinstance(y, dict) else y
        label = torch.zeros(len(x)) if label is None else label
        return self.weight * x + label.reshape(len(x), -1).float().mean(1, keepdim=True)


def data(n=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator)
    return x, {"label": torch.arange(n) % 4, "vector": torch.randn(n, 3, generator=generator)}


def trained(dropout, steps=3, **options):
    score = Score(Spy(), SDE, predicts="noise")
    fit(score, data(), steps, batch_size=32, seed=0, progress=False, label_dropout=dropout, **options)
    return score


def test_conditions_of_any_structure_are_cut_and_compared():
    y = {"a": torch.arange(6) % 3, "b": (torch.arange(12.0).reshape(6, 2) % 4, torch.tensor(2.0))}
    assert [name for name, _ in named_leaves(y)] == ["y-a", "y-b-0", "y-b-1"]
    again = from_named_leaves(dict(named_leaves(y)))
    assert key_of(again) == key_of(y)
    part = picked(y, torch.tensor([4, 0]))
    assert part["a"].tolist() == [1, 0] and part["b"][0].tolist() == [[0, 1], [0, 1]] and part["b"][1] == 2
    assert distinct(y).tolist() == distinct(y)[torch.arange(6)].tolist() and len(distinct(y).unique()) == 6
    assert distinct(picked(y, torch.tensor([1, 1, 0]))).tolist() == [1, 1, 0]
    assert distinct({"a": torch.tensor(1)}) is None
    assert of_samples(y, 6)["b"][1].shape == (6,)
    with pytest.raises(DataError, match="6 samples, the batch has 5"):
        of_samples(y, 5)
    with pytest.raises(DataError, match="parts of y are of 2 and 3 samples"):
        of_samples((torch.zeros(2), torch.zeros(3)), 3)


def test_without_label_dropout_a_condition_is_needed():
    """5 % of the samples lay near any mode, for the token of no label was never trained."""
    score = trained(0.0)
    y = data(4)[1]
    calls = (
        lambda s: SDE.flow_ode(s).sample((4, 2), steps=3),
        lambda s: SDE.reverse(s).sample((4, 2), steps=3),
        lambda s: SDE.flow_ode(s).encode(torch.zeros(4, 2), steps=3),
        lambda s: SDE.flow_ode(s).log_prob(torch.zeros(4, 2), steps=10),
        lambda s: s(torch.zeros(4, 2), 0.5),
        lambda s: s.denoise(torch.zeros(4, 2), 0.5),
    )
    for call in calls:
        with pytest.raises(ScoreError, match="label_dropout"):
            call(score)
    assert torch.isfinite(calls[0](score.given(y))).all() and torch.isfinite(calls[-1](score.given(y))).all()
    for refused in (lambda: score.given(None), lambda: score.guided(y)):
        with pytest.raises(ScoreError, match="label_dropout"):
            refused()


def test_a_network_trained_without_conditions_takes_none():
    torch.manual_seed(0)
    score = Score(nets.MLP(2, width=8, depth=1, classes=3), catalog.VP())
    score.given(1)  # what an untrained network makes of it is its user's
    data = torch.randn(32, 2)
    fit(score, data, 1, progress=False)
    with pytest.raises(ScoreError, match="trained without conditions"):
        score.given(1)
    fit(score, (data, torch.arange(32) % 3), 1, progress=False)
    score.given(1)


def test_labels_that_mean_no_label_are_no_data():
    data, score = torch.randn(32, 2), Score(nets.MLP(2, width=8, depth=1, classes=3), catalog.VP())
    for labels, said in ((1 + torch.arange(32) % 3, "count them from 0"), (torch.arange(32) % 3 - 1, r"\[-1, 1\]")):
        with pytest.raises(DataError, match=said):
            fit(score, (data, labels), 1, label_dropout=0.1, progress=False)
    fit(score, (data, (torch.arange(32) % 3).to(torch.uint8)), 1, label_dropout=0.1, progress=False)
    assert torch.equal(
        score(data[:1], 0.5, torch.tensor([2], dtype=torch.int16)), score(data[:1], 0.5, torch.tensor([2]))
    )


def test_vectors_of_integers_say_what_to_write():
    score = Score(nets.MLP(2, width=8, depth=1, condition=2), catalog.VP())
    with pytest.raises((TypeError, DataError), match=r"pass y\.float\(\)"):
        fit(score, (torch.randn(32, 2), torch.randint(9, (32, 2))), 1, progress=False)


def test_label_dropout_drops_its_share_alike_after_a_resume(tmp_path):
    score = trained(0.3, steps=40)
    seen = [y for y in score.net.seen if y is not None and len(y["label"]) == 32]
    labels, vectors = torch.cat([y["label"] for y in seen]), torch.cat([y["vector"] for y in seen])
    gone = labels == Spy.classes
    assert torch.equal(gone, (vectors == 0).all(1))
    assert abs(float(gone.double().mean()) - 0.3) < 5 * (0.21 / len(gone)) ** 0.5
    halves = trained(0.3, steps=20, out=tmp_path / "run", checkpoint_every=20)
    assert halves.net.seen[-1]["label"].tolist() == seen[19]["label"].tolist()


@pytest.mark.parametrize("kind", ["dataset", "loader", "tuple"])
def test_conditions_come_from_datasets(kind):
    x, y = data()

    class Items(Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            one = {name: leaf[i] for name, leaf in y.items()}
            return x[i], one if kind != "tuple" else tuple(one.values())

    score = Score(Spy() if kind != "tuple" else _OfTuple(), SDE, predicts="noise")
    given = DataLoader(Items(), batch_size=16) if kind == "loader" else Items()
    fit(score, given, 2, batch_size=16, seed=0, progress=False)
    shown = score.null.value
    shapes = [leaf.shape for _, leaf in named_leaves(shown)]
    assert isinstance(shown, dict if kind != "tuple" else tuple) and shapes == [(1,), (1, 3)]


class _OfTuple(Spy):
    def forward(self, x, t, y=None):
        return super().forward(x, t, None if y is None else y[0])


def test_the_unconditional_score_sees_what_stands_for_no_condition():
    score, x = trained(0.2), torch.randn(3, 2)
    for call in (lambda: score(x, 0.5), lambda: score.given(None)(x, 0.5)):
        call()
        assert score.net.seen[-1]["label"].tolist() == [4, 4, 4] and not score.net.seen[-1]["vector"].any()
    assert torch.equal(score.given({"label": 4, "vector": torch.zeros(3)})(x, 0.5), score(x, 0.5))
    with pytest.raises(DataError, match="different structure"):
        score.given(torch.zeros(3))
    with pytest.raises(DataError, match="trained with"):
        score.given({"label": torch.zeros(3, 2, 2), "vector": torch.zeros(3)})
    with pytest.raises(DataError, match="not finite in samples \\[1\\]"):
        score.given({"label": 1, "vector": torch.tensor([[0.0, 1, 2], [0, 1, float("nan")]])})


def test_what_was_trained_is_saved_with_the_weights():
    score, other = trained(0.2), Score(Spy(), SDE, predicts="noise")
    other.load_state_dict(score.state_dict())
    assert other.conditional and key_of(other.null.value) == key_of(score.null.value)
    assert torch.equal(copy.deepcopy(score).given(None)(torch.ones(2, 2), 0.5), other(torch.ones(2, 2), 0.5))
    strict = Score(Spy(), SDE, predicts="noise")
    strict.load_state_dict(trained(0.0).state_dict())
    with pytest.raises(ScoreError, match="never without"):
        strict(torch.ones(2, 2), 0.5)
    assert strict.to(torch.float64).null.value["label"].dtype == torch.long


def test_guidance_is_the_formula_in_every_call():
    score, x, y = trained(0.2), torch.randn(4, 2), data(4)[1]
    inside = torch.tensor([0.1, 0.3, 0.5, 0.7])
    for name in ("forward", "noise", "denoise"):
        unconditional, conditional = getattr(score, name), getattr(score.given(y), name)
        guided = getattr(score.guided(y, 3.0, (0.2, 0.6)), name)
        for t, strength in ((0.1, 1.0), (0.5, 3.0), (inside, torch.tensor([1.0, 3.0, 3.0, 1.0])[:, None])):
            want = unconditional(x, t) + strength * (conditional(x, t) - unconditional(x, t))
            torch.testing.assert_close(guided(x, t), want, rtol=1e-4, atol=1e-4)
    options = {"shape": (4, 2), "steps": 8, "seed": 0}
    flow = SDE.flow_ode(score.guided(y, 2.5, (0.2, 0.6)))

    class ByHand(ScoreFunction):
        def forward(self, x, t):
            given = score.given(y)(x, t)
            return score(x, t) + 2.5 * (given - score(x, t)) if 0.2 <= float(t) <= 0.6 else given

        def data_moments(self):
            return score.data_moments()

    theirs = SDE.flow_ode(ByHand(SDE))
    for solver in ("rk4", "ddim"):
        ours = flow.sample(solver=solver, **options)
        torch.testing.assert_close(ours, theirs.sample(solver=solver, **options), rtol=1e-3, atol=1e-3)
    chunked = flow.sample(solver="rk4", chunk=3, **options)
    torch.testing.assert_close(chunked, flow.sample(solver="rk4", **options), rtol=1e-4, atol=1e-4)
    for strength, interval in ((float("nan"), None), (2.0, (0.6, 0.2)), (2.0, 3)):
        with pytest.raises(ValueError, match=r"strength|interval"):
            score.guided(y, strength, interval)


def test_the_prior_of_a_condition_is_not_that_of_all_data():
    """Under a short horizon each condition has a p(x_T) of its own; under VP's all are N(0, 1)."""
    short = catalog.OU(T=0.5)

    def exact(x, t, y):
        alpha, sigma, _ = (v.to(x.dtype).reshape(-1, 1) for v in short.kernel.coefficients(t.double()))
        return -(x - alpha * y) / (alpha**2 * 0.01 + sigma**2)

    score = Score(exact, short, predicts="score", time="t", data_mean=0.0, data_std=1.0)
    y = torch.tensor([[-2.0], [3.0]])
    flow = short.flow_ode(score.given(y))
    z = flow.encode(torch.tensor([[-2.0], [3.0]]))
    alpha, sigma, _ = (float(v) for v in short.kernel.coefficients(torch.tensor(0.5, dtype=torch.float64)))
    law = torch.distributions.Normal(alpha * y.double(), (alpha**2 * 0.01 + sigma**2) ** 0.5)
    torch.testing.assert_close(flow.latent_log_prob(z), law.log_prob(z.double())[:, 0], rtol=1e-3, atol=1e-3)
    assert (
        score.given(y).prior_moments() is None
        and trained(0.0).given({"label": 0, "vector": torch.zeros(3)}).prior_moments() is not None
    )


@pytest.mark.parametrize("make", [lambda **o: nets.MLP(2, 16, 1, **o), lambda **o: nets.UNet(1, width=8, **o)])
def test_networks_take_vectors_labels_and_both(make):
    x = torch.randn(3, 2) if isinstance(make(), nets.MLP) else torch.randn(3, 1, 4, 4)
    t, labels, vectors = torch.rand(3), torch.tensor([0, 1, 2]), 100 + 50 * torch.randn(3, 4)
    cases = (({"classes": 3}, labels), ({"condition": 4}, vectors), ({"classes": 3, "condition": 4}, (labels, vectors)))
    for options, y in cases:
        net = make(**options)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
        net.measure_condition(y)
        assert not torch.allclose(net(x, t, y), net(x, t))
        torch.testing.assert_close(net(x, t, net.null(y)), net(x, t))
    assert abs(float(net.conditioning.mean.mean()) - 100) < 100 and float(net.conditioning.std.min()) > 1
    net(x, t, net.null(y)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="tuple"):
        net(x, t, labels)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        net(x, t, (labels, vectors[:, :2]))
