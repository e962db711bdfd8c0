"""Runs that nothing loses: signals, damaged files, other runs, shared state."""

import copy
import functools
import hashlib
import json
import os
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sdeflow
from sdeflow import Score, catalog, fit
from sdeflow.errors import CheckpointError, CheckpointMismatch, CheckpointVersionError
from sdeflow.numerics.conditions import from_named_leaves, named_leaves
from sdeflow.scores import evaluating
from sdeflow.training import callbacks
from sdeflow.training.checkpoint import FORMAT, latest_checkpoint, run_lock, write_checkpoint
from sdeflow.training.identity import hash_of, shown


def draw(n=64, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def small(seed=0, **options):
    torch.manual_seed(seed)
    return Score(sdeflow.nets.MLP(2, width=8, depth=1), catalog.VP(), **options)


def trained(score=None, steps=6, data=None, **options):
    score = small() if score is None else score
    return fit(score, draw() if data is None else data, steps, 16, progress=False, **options)


# ------------------------------------------------------------------ signals


def forked(function):
    """The number of a process that runs ``function``; its exit status is 7 for a KeyboardInterrupt."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function()
        status = 0
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = 7
    finally:
        os._exit(status)


class Kill:
    def __init__(self, number):
        self.number = number

    def after_step(self, run, loss):
        if run.step == 3:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 7)])
def test_a_signal_finishes_the_step_saves_and_leaves(number, status, tmp_path):
    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not
        try:
            trained(score, steps=12, out=tmp_path, callbacks=[Kill(number)])
        finally:
            assert not score.training

    score = small()
    _, found = os.waitpid(forked(run), 0)
    assert os.waitstatus_to_exitcode(found) == status
    state, _ = latest_checkpoint(tmp_path)
    assert 3 <= state["step"] <= 4
    result = trained(steps=12, out=tmp_path, resume=True)
    assert result.losses == trained(steps=12).losses


def test_handlers_are_left_as_they_were_and_none_is_set_in_other_threads():
    usual = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    seen = []

    class See:
        def after_step(self, run, loss):
            seen.append(signal.getsignal(signal.SIGTERM))

    trained(steps=1, callbacks=[See()])
    thread = threading.Thread(target=lambda: trained(steps=1, callbacks=[See()]))
    thread.start()
    thread.join()
    assert usual == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert seen[0] is not usual[0] and seen[1] is usual[0]


def test_after_an_error_the_network_has_the_average_and_is_in_eval_mode():
    class Fail:
        def after_step(self, run, loss):
            if run.step == 4:
                raise ZeroDivisionError

    score, whole = small(), small()
    with pytest.raises(ZeroDivisionError):
        trained(score, callbacks=[Fail()])
    trained(whole, steps=6, callbacks=[_Stop(4)])
    assert not score.training
    assert all(map(torch.equal, score.state_dict().values(), whole.state_dict().values()))


class _Stop:
    def __init__(self, step):
        self.step = step

    def after_step(self, run, loss):
        if run.step == self.step:
            run.stop()


# ------------------------------------------------------------------ what a checkpoint holds


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.count = nn.Linear(2, 2), nn.Linear(2, 2), 0
        self.second.weight = self.first.weight

    def forward(self, x, t):
        self.count += self.training
        return self.second(self.first(x))

    def get_extra_state(self):
        return {"count": self.count, "at": torch.tensor([1.0, 2.0])}

    def set_extra_state(self, state):
        self.count = state["count"]


def test_tied_weights_and_extra_state_are_saved(tmp_path):
    whole, part = Score(Tied(), catalog.VP(), predicts="noise"), Score(Tied(), catalog.VP(), predicts="noise")
    part.load_state_dict(whole.state_dict())
    start = copy.deepcopy(whole)
    expected = trained(whole, callbacks=[_Stop(99)])
    trained(part, callbacks=[_Stop(3)], out=tmp_path)
    assert latest_checkpoint(tmp_path)[0]["others"]["weights"]
    again = trained(start, out=tmp_path, resume=True)
    assert again.losses == expected.losses
    assert torch.equal(start.net.first.weight, whole.net.first.weight)
    assert start.net.second.weight is start.net.first.weight


def test_what_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    class Odd(Tied):
        def get_extra_state(self):
            return object()

    score = Score(Odd(), catalog.VP(), predicts="noise")
    with pytest.raises(CheckpointError, match="network holds a object"):
        trained(score, out=tmp_path)
    assert score.net.count == 0


def test_the_losses_are_those_of_the_whole_run(tmp_path):
    held_out = draw(32, 5)
    whole = trained(steps=8, validation=held_out, out=tmp_path / "whole")
    trained(small(), steps=8, validation=held_out, callbacks=[_Stop(3)], out=tmp_path / "run")
    result = trained(small(), steps=8, validation=held_out, out=tmp_path / "run", resume=True)
    assert (result.losses, result.validation[-1]) == (whole.losses, whole.validation[-1])
    assert len(repr(result)) < 120


def test_a_run_with_conditions_resumes(tmp_path):
    def conditional(seed=0):
        torch.manual_seed(seed)
        return Score(sdeflow.nets.MLP(2, width=8, depth=1, condition=3), catalog.VP())

    data = draw(), torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    whole = trained(conditional(), data=data, label_dropout=0.3)
    trained(conditional(), data=data, label_dropout=0.3, callbacks=[_Stop(3)], out=tmp_path)
    again = trained(conditional(5), data=data, label_dropout=0.3, out=tmp_path, resume=True)
    assert again.losses == whole.losses
    with pytest.raises(CheckpointMismatch, match="label_dropout"):
        trained(conditional(), data=data, out=tmp_path, resume=True)


# ------------------------------------------------------------------ another run


def _by(factor):
    return lambda done: factor * (1 - done)


_GAIN = 2.0


def _with_global(t):
    return _GAIN * t


OTHERS = {
    "data": ({"data": draw()[:, [1, 0]]}, {}),
    "a row that moments hardly see": ({"data": draw() + torch.eye(64, 2) * 1e-6}, {}),
    "schedule": ({"schedule": _by(0.5)}, {}),
    "weighting": ({"weighting": lambda t: 1 + t}, {}),
    "precision": ({"mixed_precision": "bf16"}, {}),
    "time": ({}, {"time": lambda t: 3 * t}),
    "network": ({}, {"net": nn.Sequential}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_not_resumed_unless_allowed(name, tmp_path):
    key = "data" if " " in name else name
    first = {"schedule": {"schedule": _by(1.0)}, "weighting": {"weighting": lambda t: 1 + 2 * t}}.get(name, {})
    begin = small(time=lambda t: 2 * t) if name == "time" else small()
    trained(begin, callbacks=[_Stop(2)], out=tmp_path, **first)
    options, of_score = OTHERS[name]
    if "net" in of_score:
        torch.manual_seed(0)
        score = Score(_Renamed(2, width=8, depth=1), catalog.VP())
    else:
        score = small(**of_score)
    with pytest.raises(CheckpointMismatch, match=f"{key}:.*allow=\\['{key}'\\]"):
        trained(score, out=tmp_path, resume=True, **options)
    assert trained(score, out=tmp_path, resume=True, allow=[key], **options).steps == 6


class _Renamed(sdeflow.nets.MLP):
    pass


def test_allow_takes_names_that_there_are(tmp_path):
    with pytest.raises(ValueError, match="'datum' is none of them"):
        trained(out=tmp_path, allow=["datum"])


def test_functions_are_told_apart_by_what_they_compute(monkeypatch):
    assert shown(_by(1.0)) == shown(_by(1.0)) != shown(_by(2.0))
    table = np.arange(3.0)
    assert hash_of(lambda t: table * t) != hash_of(lambda t: (table + 1) * t)
    assert hash_of(functools.partial(pow, 2)) != hash_of(functools.partial(pow, 3))
    assert hash_of(nn.Linear(2, 3)) == hash_of(nn.Linear(2, 3)) != hash_of(nn.Linear(2, 4))
    before = hash_of(_with_global)
    monkeypatch.setitem(globals(), "_GAIN", 3.0)
    assert hash_of(_with_global) != before
    data = torch.randn(1000, 3)
    other = data.clone()
    other[997, 1] += 1e-7
    assert hash_of(data) == hash_of(data.clone()) != hash_of(other)


def bumps(*heights):
    def bump(height):
        return lambda t: height * t

    parts = [bump(height) for height in heights]
    return lambda t: sum(part(t) for part in parts)


def test_closures_within_closures_are_told_apart_and_stay_the_same():
    """Parts that live for a moment have the addresses of others that did before."""
    assert len({hash_of(bumps(1.0, 2.0, 3.0, last)) for last in (4.0, 5.0, 400.0)}) == 3
    same = bumps(1.0, 2.0, 3.0, 4.0)
    assert len({hash_of(same) for _ in range(100)}) == 1 == len({hash_of(bumps(1.0, 2.0)) for _ in range(20)})


class OfUser(nn.Module):
    def __init__(self, gain=1.0, act=torch.relu):
        super().__init__()
        self.layer, self.gain, self.act = nn.Linear(2, 2), gain, act

    def forward(self, x, t):
        return self.gain * self.act(self.layer(x))


def test_what_a_user_wrote_in_a_network_is_compared(tmp_path):
    trained(Score(OfUser(), catalog.VP()), out=tmp_path, callbacks=[_Stop(2)])
    for other in (OfUser(gain=-3.0), OfUser(act=torch.sin)):
        with pytest.raises(CheckpointMismatch, match="network"):
            trained(Score(other, catalog.VP()), out=tmp_path, resume=True)
    assert trained(Score(OfUser(), catalog.VP()), out=tmp_path, resume=True).steps == 6


@pytest.mark.parametrize("keys", [None, "ab"])
def test_conditions_of_many_parts_come_back_in_their_order(keys, tmp_path):
    labels, vectors = torch.arange(64) % 3, draw(seed=3)
    parts = tuple(torch.full((2,), float(i)) for i in range(12))
    named = dict(named_leaves(parts))
    shuffled = {name: named[name] for name in sorted(named, reverse=True)}
    assert [float(part[0]) for part in from_named_leaves(shuffled)] == [*range(12)]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.classes = nn.Linear(2, 2), 3

        def forward(self, x, t, y):
            label, vector = (y["b"], y["a"]) if keys else y
            return self.layer(x) + vector * label.to(x)[:, None]

    y = {"b": labels, "a": vectors} if keys else (labels, vectors)
    for steps in (3, 6):
        run = trained(Score(Net(), catalog.VP()), 6, (draw(), y), out=tmp_path, resume=True, label_dropout=0.3,
                      callbacks=[_Stop(steps)])  # fmt: skip
    assert run.steps == 6


def test_the_names_that_an_error_suggests_are_allowed(tmp_path):
    class Counted:
        count = 0

        def after_step(self, run, loss):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    trained(out=tmp_path, callbacks=[_Stop(2), Counted()])
    with pytest.raises(CheckpointMismatch, match=r"allow=\['callbacks'\]"):
        trained(out=tmp_path, resume=True)
    assert trained(steps=4, out=tmp_path, resume=True, allow=["callbacks"]).steps == 4
    other = {"optimiser": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    with pytest.raises(CheckpointMismatch) as caught:
        trained(out=tmp_path, resume=True, **other)
    allow = str(caught.value).split("allow=[")[1].split("]")[0].replace("'", "").split(", ")
    assert trained(out=tmp_path, resume=True, allow=allow, **other).steps == 6


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="resume=True needs out="):
        trained(resume=True)


# ------------------------------------------------------------------ damaged files


def test_each_flipped_bit_falls_back_to_the_checkpoint_before(tmp_path):
    write_checkpoint(tmp_path, 1, {"identity": {}}, {"a": {"w": torch.zeros(8)}})
    last = write_checkpoint(tmp_path, 2, {"identity": {}}, {"a": {"w": torch.ones(8)}})
    generator = np.random.default_rng(0)
    for name in ("state.json", "a.safetensors", "state.sha256"):
        whole = (last / name).read_bytes()
        for position in generator.integers(0, 8 * len(whole), 40):
            flipped = bytearray(whole)
            flipped[position // 8] ^= 1 << (position % 8)
            (last / name).write_bytes(bytes(flipped))
            with pytest.warns(UserWarning, match="step-00000002"):
                assert latest_checkpoint(tmp_path)[0]["step"] == 1
        (last / name).write_bytes(whole)
    assert latest_checkpoint(tmp_path)[0]["step"] == 2
    (last / "state.sha256").unlink()
    with pytest.warns(UserWarning, match=r"state\.sha256 is missing"):
        assert latest_checkpoint(tmp_path)[0]["step"] == 1


def rewritten(path, **values):
    """A checkpoint whose state holds other values, with the hash that belongs to it, as format 1 and 2 had none."""
    state = {**json.loads((path / "state.json").read_text()), **values}
    (path / "state.json").write_text(json.dumps(state))
    (path / "state.sha256").unlink()
    if state["format"] > 2:
        (path / "state.sha256").write_text(hashlib.sha256((path / "state.json").read_bytes()).hexdigest())


def test_older_formats_are_read_and_newer_ones_name_themselves(tmp_path):
    path = write_checkpoint(tmp_path, 4, {"identity": {}}, {"a": {"w": torch.arange(3.0)}})
    for version in (1, 2, FORMAT):
        rewritten(path, format=version)
        state, tensors = latest_checkpoint(tmp_path)
        assert state["step"] == 4 and tensors["a"]["w"].tolist() == [0.0, 1.0, 2.0]
        (path / "state.sha256").touch()
        rewritten(path, format=FORMAT)
    rewritten(path, format=FORMAT + 1)
    with pytest.raises(CheckpointVersionError, match=f"has format {FORMAT + 1}; this sdeflow reads up to {FORMAT}"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd"])
def test_a_checkpoint_names_no_file_elsewhere(name, tmp_path):
    write_checkpoint(tmp_path, 1, {}, {"a": {"w": torch.zeros(1)}})
    path = write_checkpoint(tmp_path, 2, {}, {"a": {"w": torch.zeros(1)}})
    rewritten(path, sha256={name: "0" * 64})
    with pytest.warns(UserWarning, match="names a file"):
        assert latest_checkpoint(tmp_path)[0]["step"] == 1


def test_a_huge_state_is_not_read_whole(tmp_path):
    write_checkpoint(tmp_path, 1, {}, {"a": {"w": torch.zeros(1)}})
    path = write_checkpoint(tmp_path, 2, {}, {"a": {"w": torch.zeros(1)}})
    with open(path / "state.json", "ab") as file:
        file.truncate(2**40)  # a sparse file of a terabyte
    with pytest.warns(UserWarning, match="state.json"):
        assert latest_checkpoint(tmp_path)[0]["step"] == 1


def test_weights_that_are_not_finite_are_refused(tmp_path):
    write_checkpoint(tmp_path, 1, {}, {"weights": {"w": torch.zeros(8)}})
    write_checkpoint(tmp_path, 2, {}, {"weights": {"w": torch.full((8,), float("nan"))}})
    with pytest.warns(UserWarning, match="w of the weights is not finite"):
        assert latest_checkpoint(tmp_path)[0]["step"] == 1


def test_the_lock_dies_with_its_process_and_not_with_its_workers(tmp_path):
    reader, writer = os.pipe()

    def hold():
        with run_lock(tmp_path):
            worker = os.fork()
            if worker:
                os.write(writer, str(worker).encode())
            time.sleep(60)

    holder = forked(hold)
    worker = int(os.read(reader, 100))
    try:
        with pytest.raises(CheckpointError, match="another run"), run_lock(tmp_path):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with run_lock(tmp_path), pytest.raises(CheckpointError, match="another run"), run_lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
    with run_lock(tmp_path):
        pass


# ------------------------------------------------------------------ shared state


def test_the_users_own_accelerator_is_left_as_it_was():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    own = Accelerator(mixed_precision="bf16", cpu=True)
    trained(steps=1)
    assert own.mixed_precision == "bf16" and AcceleratorState().mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
    trained(steps=1, mixed_precision="bf16")
    assert not AcceleratorState._shared_state
    with pytest.raises(ValueError, match="precision"):
        trained(steps=1, mixed_precision="half")


def of_two_ranks(function, folder):
    """What ``function(rank)`` gives in each of two processes that are one process group, through JSON."""

    def run(rank):
        os.environ.pop("LOCAL_RANK", None)
        meeting = f"file://{folder}/meeting"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        (folder / str(rank)).write_text(json.dumps(function(rank)))

    children = [forked(functools.partial(run, rank)) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def test_a_failed_write_ends_the_run_in_all_ranks(tmp_path):
    (tmp_path / "out").mkdir()

    def train(rank):
        def full(*_):
            raise CheckpointError("no space left")

        callbacks.write_checkpoint = full  # in this process alone
        try:
            trained(steps=9, out=tmp_path / "out", checkpoint_every=2)
        except CheckpointError as error:
            return str(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = of_two_ranks(train, tmp_path)
    assert first == "no space left" and "main process could not write 3 checkpoints" in second


def test_ranks_draw_other_noise_for_the_same_weights(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.ones(2)), []

        def forward(self, x, t):
            if self.training:
                self.seen.append([*x[0].tolist(), float(t[0])])
            return self.weight * x

    def train(rank):
        torch.manual_seed(rank)
        score = Score(Net(), catalog.VP())
        trained(score, steps=2)
        return [score.net.seen, score.net.weight.tolist()]

    (first, weight), (second, same) = of_two_ranks(train, tmp_path)
    assert weight == same and all(a != b for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_ranks_of_the_users_own_process_group_share_the_batch(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.ones(2)), 0

        def forward(self, x, t):
            self.seen = len(x)
            return self.weight * x

    def train(rank):
        score = Score(Net(), catalog.VP())
        result = trained(score, steps=3)
        return [score.net.seen, score.net.weight.tolist(), result.losses]

    first, second = of_two_ranks(train, tmp_path)
    assert first[0] == 8 and first == second


def test_threads_that_ask_one_network_leave_it_in_eval_mode_until_the_last_is_done():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    net.train()
    net[0].eval()
    inside, outside, modes = threading.Event(), threading.Event(), []

    def first():
        with evaluating(net):
            inside.set()
            outside.wait(10)
            modes.append([part.training for part in net.modules()])

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with evaluating(net):
        pass
    outside.set()
    thread.join()
    assert modes == [[False, False, False]]
    assert [part.training for part in net.modules()] == [True, False, True]


def test_two_threads_sample_what_one_does():
    score = small()
    for parameter in score.parameters():
        nn.init.normal_(parameter, std=0.3)
    score.net.blocks[0].dropout.p = 0.5
    score.train()
    flow = catalog.VP().flow_ode(score, prior=catalog.VP().prior)
    expected = flow.sample((64, 2), "euler", 30, seed=0)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(flow.sample((64, 2), "euler", 30, seed=0))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for each in found) and score.training


def test_a_dataset_is_told_apart_by_its_length_and_what_is_looked_at(tmp_path):
    trained(data=TensorDataset(draw()), callbacks=[_Stop(2)], out=tmp_path)
    with pytest.raises(CheckpointMismatch, match="64 items of"):
        trained(data=TensorDataset(draw(65)), out=tmp_path, resume=True)
    assert "64 items" in json.loads((tmp_path / "step-00000002" / "state.json").read_text())["identity"]["data"]
