"""The networks: shapes, errors, what they respond to, and that torch's transforms apply to them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from sdeflow.nets import MLP, TimeEmbedding, UNet

CLASSES = 3

# One small net of each kind, with the event that it takes.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP(5, width=16, depth=2, classes=CLASSES), (5,)),
    "unet-1d": (lambda: UNet(2, width=8, spatial_dims=1, classes=CLASSES), (2, 6)),
    "unet-2d": (lambda: UNet(1, width=8, blocks=2, attention=(0, 1), classes=CLASSES), (1, 4, 6)),
    "unet-3d": (
        lambda: UNet(3, width=8, multipliers=(1, 1, 2), spatial_dims=3, classes=CLASSES),
        (3, 4, 4, 8),
    ),
}
RANGES = {
    "time": torch.linspace(0, 1, 101),
    "noise level": torch.logspace(-1.7, 1.9, 80),
    "log-SNR": torch.arange(-14, 14, 0.05),
}

each_net = pytest.mark.parametrize("name", NETS)
each_range = pytest.mark.parametrize("times", RANGES.values(), ids=RANGES)


def fresh(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[name][0]()


def perturbed(net: nn.Module) -> nn.Module:
    """The net in float64, its weights of zero replaced: what a little training does."""
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.1 * noise)
    return net.double()


def inputs(name: str, batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, *NETS[name][1], generator=generator, dtype=torch.float64)
    t = torch.rand(batch, generator=generator, dtype=torch.float64)
    return x, t, torch.arange(batch) % CLASSES


@each_net
def test_an_untrained_net_returns_zeros_shaped_as_its_input(name: str) -> None:
    x, t, y = inputs(name)
    out = fresh(name)(x.float(), t.float(), y)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert not out.any()


@each_net
def test_the_seed_fixes_the_weights(name: str) -> None:
    one, same, other = (fresh(name, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@each_net
def test_the_output_depends_on_state_time_and_label(name: str) -> None:
    net = perturbed(fresh(name))
    x, t, y = inputs(name)
    out = net(x, t, y)
    assert out.dtype == torch.float64
    for changed in (net(x + 0.1, t, y), net(x, t + 0.1, y), net(x, t, (y + 1) % CLASSES)):
        moved = (changed - out).flatten(1).abs().amax(dim=1)
        assert (moved > 1e-3).all()


@each_net
def test_no_label_is_the_label_after_the_last(name: str) -> None:
    net = perturbed(fresh(name))
    x, t, y = inputs(name)
    assert torch.equal(net(x, t), net(x, t, torch.full_like(y, CLASSES)))
    assert not torch.allclose(net(x, t), net(x, t, y))


@each_net
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    net = perturbed(fresh(name))
    x, t, y = inputs(name)
    out = net(x, t, y)
    for i in range(len(x)):
        torch.testing.assert_close(net(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], out[i])


@each_net
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    net = perturbed(fresh(name))
    net(*inputs(name)).square().sum().backward()
    still = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@each_net
def test_dropout_acts_in_training_only(name: str) -> None:
    net = perturbed(fresh(name))
    x, t, y = inputs(name)
    out = net(x, t, y)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert not torch.allclose(net(x, t, y), out)
    assert torch.equal(net.eval()(x, t, y), out)


@each_net
def test_derivatives_of_both_modes_and_of_second_order(name: str) -> None:
    net = perturbed(fresh(name))
    x, t, y = inputs(name)

    def f(x: Tensor) -> Tensor:
        return net(x, t, y)

    u, v = torch.randn_like(x), torch.randn_like(x)
    step = 1e-5
    difference = (f(x + step * v) - f(x - step * v)) / (2 * step)
    forward = jvp(f, (x,), (v,))[1]
    torch.testing.assert_close(forward, difference, rtol=1e-5, atol=1e-7)
    backward = vjp(f, x)[1]
    torch.testing.assert_close((backward(u)[0] * v).sum(), (u * forward).sum())
    probes = torch.stack([u, v])
    torch.testing.assert_close(vmap(backward)(probes)[0][1], backward(v)[0])
    torch.testing.assert_close(vmap(lambda v: jvp(f, (x,), (v,))[1])(probes)[1], forward)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()


@each_net
def test_vmap_over_samples_and_labels(name: str) -> None:
    net = perturbed(fresh(name))
    x, t, y = inputs(name)
    single = vmap(lambda x, t, y: net(x[None], t[None], y[None])[0])
    torch.testing.assert_close(single(x, t, y), net(x, t, y))


@pytest.mark.parametrize("name", ["mlp", "unet-2d"])
def test_compiles_without_graph_breaks(name: str) -> None:
    net = perturbed(fresh(name))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x, t, y = inputs(name)
    torch.testing.assert_close(compiled(x, t, y), net(x, t, y))


@each_range
def test_the_embedding_tells_times_apart_and_stays_bounded(times: Tensor) -> None:
    torch.manual_seed(0)
    e = TimeEmbedding(64)(times)
    distance = torch.cdist(e, e).fill_diagonal_(torch.inf)
    assert e.abs().max() < 3
    assert distance.min() > 0.02 * e.norm(dim=1).mean()


@each_range
@each_net
def test_a_net_resolves_every_scale_of_time(name: str, times: Tensor) -> None:
    net = perturbed(fresh(name))
    x = inputs(name, batch=1)[0].expand(len(times), *NETS[name][1])
    with torch.no_grad():
        out = net(x, times.double()).flatten(1)
    scale = out.norm(dim=1).mean()
    assert out.norm(dim=1).max() < 10 * scale
    # Median over the range: a smooth function has places where it stands still.
    assert (out[1:] - out[:-1]).norm(dim=1).median() > 1e-3 * scale


def test_half_precision_keeps_the_phase() -> None:
    net = perturbed(fresh("unet-2d")).bfloat16()
    x, t, y = inputs("unet-2d")
    out = net(x.bfloat16(), t.float(), y)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    t = torch.tensor([13.95, 14.0])
    assert not torch.equal(*TimeEmbedding(8).bfloat16()(t))


def test_a_long_sequence_takes_the_fused_attention_to_the_same_result() -> None:
    net = perturbed(UNet(1, width=8, spatial_dims=1, attention=(0,)))
    x = torch.randn(2, 1, 64, dtype=torch.float64)
    t = torch.rand(2, dtype=torch.float64)
    out = net(x, t)
    for block in net.decoder:
        if isinstance(block.attention, nn.Module) and hasattr(block.attention, "fused_above"):
            block.attention.fused_above = 16
    torch.testing.assert_close(net(x, t), out)


@pytest.mark.parametrize("width", [4, 7, 12, 36, 40])
def test_any_width_finds_groups_and_heads_that_divide_it(width: int) -> None:
    net = UNet(1, width=width, multipliers=(1, 3), attention=(0, 1))
    assert net(torch.zeros(1, 1, 4, 4), torch.zeros(1)).shape == (1, 1, 4, 4)


def test_the_output_may_have_other_channels() -> None:
    x, t = torch.randn(2, 3, 4, 4), torch.rand(2)
    assert UNet(3, width=8, out_channels=6)(x, t).shape == (2, 6, 4, 4)
    assert MLP(3, out_features=1)(x[:, :, 0, 0], t).shape == (2, 1)


def test_state_dict_round_trip() -> None:
    net, other = perturbed(fresh("unet-2d")), fresh("unet-2d", seed=5).double()
    other.load_state_dict(net.state_dict())
    x, t, y = inputs("unet-2d")
    assert torch.equal(net(x, t, y), other(x, t, y))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet(1, spatial_dims=4), "spatial_dims=4"),
        (lambda: UNet(0), "positive"),
        (lambda: UNet(1, multipliers=()), "at least one multiplier"),
        (lambda: UNet(1, dropout=1.0), "dropout=1.0"),
        (lambda: UNet(1, attention=(2,)), r"attention=\(2,\).*2 levels"),
        (lambda: UNet(1, classes=-1), "classes=-1"),
        (lambda: MLP(0), "positive"),
        (lambda: MLP(2, dropout=-0.1), "dropout"),
        (lambda: TimeEmbedding(8, frequencies=1), "frequencies=1"),
        (lambda: TimeEmbedding(8, lowest=2.0, highest=1.0), "lowest=2.0"),
    ],
)
def test_arguments_out_of_range(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 4), r"\(2, 3, 4, 4\).*\(batch, 1, height, width\)"),
        ((2, 1, 4), r"\(2, 1, 4\)"),
        ((2, 1, 6, 4), r"size \(6, 4\).*multiple of 4"),
    ],
)
def test_states_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    net = UNet(1, width=8, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(shape), torch.zeros(2))


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 1), (3,)])
def test_vectors_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(batch, 3\)"):
        MLP(3)(torch.zeros(shape), torch.zeros(2))


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.zeros(1), torch.zeros(2, 1)])
def test_times_that_do_not_fit(t: Tensor) -> None:
    with pytest.raises(ValueError, match=r"t has shape .*\(2,\).*expand"):
        MLP(3)(torch.zeros(2, 3), t)


@pytest.mark.parametrize("label", [-1, CLASSES + 1])
def test_labels_out_of_range(label: int) -> None:
    with pytest.raises(ValueError, match="0 to 2, and 3 for no label"):
        MLP(3, classes=CLASSES)(torch.zeros(2, 3), torch.zeros(2), torch.tensor([0, label]))


def test_labels_that_do_not_fit() -> None:
    x, t, y = torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="classes="):
        MLP(3)(x, t, y)
    with pytest.raises(ValueError, match="one label per sample"):
        MLP(3, classes=CLASSES)(x, t, y[:1])
    with pytest.raises(TypeError, match="integers"):
        MLP(3, classes=CLASSES)(x, t, y.float())
