"""A user's own Accelerator: accumulation, trackers, precision. Memory that runs out says what to do."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, on_main_process
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sdeflow
from sdeflow import Score, catalog, fit
from sdeflow.errors import DataScaleWarning, ScoreError


@pytest.fixture(autouse=True)
def accelerate_left_alone():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def small(**net):
    torch.manual_seed(0)
    return Score(sdeflow.nets.MLP(2, width=8, depth=1, **net), catalog.VP())


def draw(n=64):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def weights(score):
    return torch.cat([parameter.detach().flatten() for parameter in score.parameters()])


@pytest.mark.parametrize("parts", [2, 3, 40])
@pytest.mark.parametrize("loader", [False, True])
def test_accumulated_gradients_make_the_same_step(parts, loader):
    """16 samples in 2 parts of 8, in 3 uneven ones, and in more parts than there are samples."""
    found = []
    for accelerator in (None, Accelerator(cpu=True, gradient_accumulation_steps=parts)):
        score, data = small(condition=1), (draw(), draw()[:, :1])
        data = DataLoader(TensorDataset(*data), batch_size=16) if loader else data
        run = fit(score, data, 8, 16, accelerator=accelerator, progress=False)
        found.append((weights(score), torch.tensor(run.losses)))
    for plain, accumulated in zip(*found, strict=True):
        torch.testing.assert_close(accumulated, plain, rtol=2e-4, atol=2e-6)


class Kept(GeneralTracker):
    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    @on_main_process
    def store_init_configuration(self, values):
        pass

    @on_main_process
    def log(self, values, step=None, **options):
        self.rows.append((step, values))


def test_trackers_are_told_of_each_step():
    tracker = Kept()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("run")
    run = fit(small(), draw(), 20, 16, validation=draw(32), accelerator=accelerator, progress=False)
    assert [step for step, _ in tracker.rows] == [*range(1, 21)]
    assert [values["loss"] for _, values in tracker.rows] == run.losses
    assert [
        (s, v["validation"], v["validation_stderr"]) for s, v in tracker.rows if "validation" in v
    ] == run.validation
    rates = [values["lr"] for _, values in tracker.rows]
    assert rates[-1] < rates[5] <= 1e-3


def test_precision_is_the_accelerators():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, t):
            out = self.layer(x)
            seen.append(out.dtype)
            return out

    fit(
        Score(Net(), catalog.VP()), draw(), 2, accelerator=Accelerator(cpu=True, mixed_precision="bf16"), progress=False
    )
    assert seen[-1] == torch.bfloat16
    with pytest.raises(ValueError, match="yours has its own precision"):
        fit(small(), draw(), 2, accelerator=Accelerator(cpu=True, mixed_precision="bf16"), mixed_precision="bf16")


# ------------------------------------------------------------------ memory


class Full(nn.Module):
    """A network for which memory runs out at a batch of more than some."""

    def __init__(self, most):
        super().__init__()
        self.layer, self.most = nn.Linear(2, 2), most

    def forward(self, x, t):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.layer(x)


def test_a_step_that_does_not_fit_says_what_to_do(tmp_path):
    score = Score(Full(8), catalog.VP())
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)CUDA out of memory.*lower batch_size.*accumulation"):
        fit(score, draw(), 3, 16, out=tmp_path, progress=False)
    assert not score.training
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert fit(score, draw(), 3, 16, accelerator=accelerator, progress=False).steps == 3
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\.$"):
        fit(Score(Full(0), catalog.VP()), draw(), 3, progress=False)  # the network alone


def test_a_solve_that_does_not_fit_says_what_to_do():
    flow = catalog.VP().flow_ode(Score(Full(8), catalog.VP(), data_mean=0.0, data_std=1.0))
    for solve in (lambda **o: flow.sample((16, 2), steps=4, **o), lambda **o: flow.log_prob(draw(16), steps=4, **o)):
        with pytest.raises(torch.OutOfMemoryError, match="pass chunk="):
            solve()
        assert len(solve(chunk=8)) == 16


# ------------------------------------------------------------------ data and weights that mean something else


def test_constant_coordinates_and_channels_warn():
    data = draw()
    data[:, 1] = 3.0
    with pytest.warns(DataScaleWarning, match=r"coordinates \[1\] of the data are constant in all 64 samples"):
        fit(small(), data, 1, progress=False)
    images = torch.randn(8, 2, 4, 4)
    images[:, 0] = 0.0
    with pytest.warns(DataScaleWarning, match=r"channels \[0\]"):
        fit(Score(sdeflow.nets.UNet(2, width=8), catalog.VP()), images, 1, progress=False)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["module.", "net._orig_mod."])
def test_a_state_of_a_wrapped_module_is_refused(prefix, strict):
    state = {
        name.replace("net.", prefix) if "orig" in prefix else prefix + name: v
        for name, v in small().state_dict().items()
    }
    with pytest.raises(ScoreError, match=r"no weight of the network.*remove the prefix"):
        small().load_state_dict(state, strict=strict)


def test_integers_are_no_weights():
    state = {k: v.to(torch.int8) if k.startswith("net.blocks") else v for k, v in small().state_dict().items()}
    with pytest.raises(ScoreError, match=r"net.blocks.*is torch.int8 in this state, and torch.float32 here"):
        small().load_state_dict(state)
