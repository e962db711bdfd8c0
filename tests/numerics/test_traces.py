"""Trace estimators against exact traces: bias, variance, the coverage of their intervals, and planted mistakes."""

import math

import pytest
import torch
from scipy.stats import t as student

import sdeflow
from sdeflow import catalog
from sdeflow.errors import ScoreError
from sdeflow.numerics import traces
from sdeflow.numerics.traces import (
    Estimate,
    Exact,
    Hadamard,
    Hutchinson,
    HutchPP,
    cycled,
    hutchinson,
    pool,
    products,
    until,
)

NODES = 48
ALL = [Exact(), Hutchinson(3), Hutchinson(3, fresh=False), Hutchinson(3, "gaussian"), Hadamard(3), HutchPP(6)]


def along(trace, jacobians, weights, *, batch=None, **options):
    """The estimate for the linear fields x -> J_n x, J (nodes, d, d) or (nodes, batch, d, d)."""
    if jacobians.ndim == 3:
        jacobians = jacobians[:, None].expand(-1, batch, -1, -1)
    batch, d = jacobians.shape[1:3]
    integral = trace.start((batch, d), weights, **options)
    x = torch.randn(batch if options.get("rows") is None else len(options["rows"]), d, dtype=jacobians.dtype)
    x.requires_grad_(True)
    for jacobian in jacobians:
        part = jacobian if options.get("rows") is None else jacobian[options["rows"]]
        integral.add(torch.einsum("bij,bj->bi", part, x), x)
    return integral.result()


def matrix(d, seed=0, symmetric=False):
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.mT) / 2 if symmetric else a


def trace_of(jacobians, weights):
    return torch.einsum("n,n...ii->...", torch.as_tensor(weights, dtype=torch.float64), jacobians)


# ---------------------------------------------------------------- bias and variance


def moments_agree(trace, expected_variance, d=12, batch=20000):
    """Whether the mean and the variance over many samples are right, within five standard errors of each."""
    jacobian = matrix(d)[None]
    value = along(trace, jacobian, [1.0], batch=batch, seed=0).value
    error = value - jacobian[0].trace()
    variance = error.square().mean()
    unbiased = abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(batch)
    expected = expected_variance((jacobian[0] + jacobian[0].mT) / 2)
    return unbiased and abs(float(variance - expected)) < 5 * float(error.square().std()) / math.sqrt(batch)


def rademacher_variance(probes):
    return lambda s: 2 * (s.square().sum() - s.diagonal().square().sum()) / probes


@pytest.mark.parametrize("probes", [1, 3])
def test_the_variances_of_hutchinson_are_the_formulas(probes):
    """For a Jacobian that is not symmetric; S is its symmetric part."""
    assert moments_agree(Hutchinson(probes), rademacher_variance(probes))
    assert moments_agree(Hutchinson(probes, "gaussian"), lambda s: 2 * s.square().sum() / probes)


@pytest.mark.parametrize("probe", ["gaussian", "rademacher"])
def test_the_bar_of_hutchinson_is_the_formula(probe):
    """Its square is unbiased for the variance, 2 ‖S‖² / 3 of three normal probes of a symmetric Jacobian."""
    symmetric = matrix(9) + matrix(9).mT
    found = along(Hutchinson(3, probe, distinct=False), symmetric[None], [1.0], batch=4000).stderr.square()
    parts = symmetric.square().sum() - (symmetric.diagonal().square().sum() if probe == "rademacher" else 0.0)
    assert abs(float(found.mean() - 2 * parts / 3)) < 5 * float(found.std()) / math.sqrt(4000)


def test_the_variance_of_hadamard_columns_is_the_formula():
    """At one node, with the dimension padded from 12 to 16: (16 / 3 - 1) / 15 of a single column's.

    All samples share the order of the columns, so it is an average over orders.
    """
    jacobian = matrix(12)[None]
    values = torch.cat([along(Hadamard(3), jacobian, [1.0], batch=50, seed=seed).value for seed in range(300)])
    error = values - jacobian[0].trace()
    expected = float(rademacher_variance(1)((jacobian[0] + jacobian[0].mT) / 2)) * (16 / 3 - 1) / 15
    assert abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(len(error))
    assert abs(float(error.square().mean()) / expected - 1) < 0.1


@pytest.mark.parametrize("trace", ALL, ids=str)
def test_unbiased_for_jacobians_that_are_not_symmetric(trace):
    jacobians = torch.stack([matrix(11, seed) for seed in range(3)])
    weights = [0.5, -1.0, 2.0]
    error = along(trace, jacobians, weights, batch=6000, seed=1).value - trace_of(jacobians, weights)
    assert abs(float(error.mean())) <= 5 * float(error.std()) / math.sqrt(len(error)) + 1e-10


def test_rademacher_is_exact_for_diagonals_and_the_exact_trace_always():
    diagonal = torch.diag(torch.arange(5.0, dtype=torch.float64))[None]
    for trace in (Hutchinson(1), Hadamard(1), Exact()):
        torch.testing.assert_close(
            along(trace, diagonal, [2.0], batch=3, seed=0).value, torch.full((3,), 20.0).double()
        )
    estimate = along(Exact(), matrix(9)[None], [1.0], batch=3)
    torch.testing.assert_close(estimate.value, matrix(9).trace().expand(3))
    assert float(estimate.stderr.max()) == 0
    assert bool(estimate.dof.isinf().all())
    assert estimate.products == 9


def test_hutchpp_is_exact_where_the_sketch_holds_everything():
    """Rank 2, or a multiple of the identity; where little is left, little is the error."""
    basis = torch.linalg.qr(matrix(32))[0][:, :2]
    low = 3 * basis @ torch.diag(torch.tensor([5.0, -2.0]).double()) @ basis.mT
    error = along(HutchPP(6), low[None], [1.0], batch=50, seed=0).value - low.trace()
    assert float(error.abs().max()) < 1e-9
    small = 15 * basis[:, :1] @ basis[:, :1].mT + 0.01 * matrix(32, 1, symmetric=True)
    ours, theirs = (
        (along(trace, small[None], [1.0], batch=500, seed=0).value - small.trace()).std()
        for trace in (HutchPP(6), Hutchinson(6))
    )
    assert float(ours) < 0.1 * float(theirs)
    shifted = torch.eye(32, dtype=torch.float64)[None]
    assert float((along(HutchPP(6), shifted, [1.0], batch=50, seed=0).value - 32).abs().max()) < 1e-9


# ---------------------------------------------------------------- Hadamard


@pytest.mark.parametrize("d", [1, 2, 12, 16, 100])
def test_a_full_cycle_of_columns_is_exact(d):
    padded = 1 << (d - 1).bit_length()
    probes = min(4, padded)
    nodes = padded // probes
    estimate = along(Hadamard(probes), matrix(d)[None].expand(nodes, -1, -1), torch.ones(nodes), batch=3, seed=0)
    torch.testing.assert_close(estimate.value, nodes * matrix(d).trace().expand(3))
    # one node less is not
    if nodes > 1:
        rest = along(
            Hadamard(probes), matrix(d)[None].expand(nodes - 1, -1, -1), torch.ones(nodes - 1), batch=3, seed=0
        )
        assert float((rest.value - (nodes - 1) * matrix(d).trace()).abs().max()) > 1e-3


def test_hadamard_entries():
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    index = torch.arange(32)
    assert torch.equal(traces.hadamard(index, index).double(), h)
    large = torch.tensor([2**40 + 5, 2**62])
    assert traces.hadamard(large, torch.tensor([2**40 + 4, 2**62 + 2**40])).tolist() == [[1, 1], [-1, -1]]
    values = matrix(32)[:3]
    torch.testing.assert_close(traces.walsh_hadamard(values), values @ h)


# ---------------------------------------------------------------- intervals along a trajectory


def mixture_jacobians(full):
    """J_n of E[x_0 | x] in x / alpha along 6 noisy paths of a 64-D mixture, (NODES, 6, 64, 64), and their weights."""
    sde = catalog.VP()
    generator = torch.Generator().manual_seed(64)
    means = torch.randn(10, 64, generator=generator, dtype=torch.float64)
    spread = 1.2 if full else 0.2
    stds = 0.3 * torch.exp(spread * torch.randn(10, 64, generator=generator, dtype=torch.float64))
    if full:
        rotations = torch.linalg.qr(torch.randn(10, 64, 64, generator=generator, dtype=torch.float64))[0]
        covariances = rotations @ torch.diag_embed(stds.square()) @ rotations.mT
    else:
        covariances = stds.square()
    exact = sdeflow.scores.GaussianMixture(sde, means, covariances, full=full)
    x_0 = exact.sample(6, seed=3, dtype=torch.float64)
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    times = torch.tensor([sde.cutoff, float(sde.T)], dtype=torch.float64)
    log_levels = -sde.kernel.half_log_snr(times)
    levels = torch.linspace(float(log_levels[0]) + 1e-6, float(log_levels[1]) - 1e-6, NODES, dtype=torch.float64).exp()
    weights = torch.full((NODES,), float(levels[1].log() - levels[0].log()), dtype=torch.float64)
    weights[0] = weights[-1] = weights[0] / 2
    jacobians = []
    for level in levels:
        t = sde.kernel.time_of(-level.log())
        alpha = float(sde.kernel.moments(torch.ones(1, 1, dtype=torch.float64), t.reshape(1))[0])
        z = (x_0 + level * noise).requires_grad_(True)
        rows = torch.eye(64, dtype=torch.float64)[:, None].expand(64, len(z), 64)
        (gradient,) = torch.autograd.grad(exact.denoise(alpha * z, t), z, rows, is_grads_batched=True)
        jacobians.append(gradient.transpose(0, 1))
    jacobians = torch.stack(jacobians)
    return torch.where(jacobians.abs() < 1e-30, 0.0, jacobians), weights  # denormal numbers are slow


@pytest.fixture(scope="module", params=[False, True], ids=["diagonal", "full"])
def trajectory(request):
    jacobians, weights = mixture_jacobians(request.param)
    return jacobians.repeat(1, 10, 1, 1), weights


def repeated(trace, trajectory, passes=5):
    """Errors, standard errors and degrees of freedom of passes x 60 estimates."""
    jacobians, weights = trajectory
    truth = trace_of(jacobians, weights)
    results = [along(trace, jacobians, weights, seed=seed) for seed in range(passes)]
    return torch.cat([r.value - truth for r in results]), *(
        torch.cat([getattr(r, name) for r in results]) for name in ("stderr", "dof")
    )


def calibrated(trace, trajectory, conservative=False):
    """Whether intervals cover 95 % (four binomial standard deviations) and standard errors have the right size."""
    error, stderr, dof = repeated(trace, trajectory)
    n = len(error)
    half = torch.as_tensor(student.ppf(0.975, dof.numpy())) * stderr
    coverage = float((error.abs() <= half).double().mean())
    ratio = float(stderr.square().mean().sqrt() / error.square().mean().sqrt())
    return coverage > 0.95 - 4 * math.sqrt(0.95 * 0.05 / n) and 0.8 < ratio < (1.8 if conservative else 1.35)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trace",
    [Hutchinson(4), Hutchinson(16, fresh=False), Hutchinson(4, "gaussian"), HutchPP(6)],
    ids=str,
)
def test_intervals_of_independent_probes_cover(trace, trajectory):
    """Fewer fixed probes cover less where one pair of modes makes a form of rank one, which is far from normal."""
    assert calibrated(trace, trajectory)


@pytest.mark.slow
@pytest.mark.parametrize("probes", [2, 4, 16])
def test_intervals_of_hadamard_columns_cover(probes, trajectory):
    """From 8 columns on the cancellation is deeper than can be told, and the standard error is on the safe side.

    So it is of this mixture; of others see sdeflow.numerics.traces.
    """
    assert calibrated(Hadamard(probes), trajectory, conservative=probes >= 8)


def test_one_probe_knows_nothing_of_its_error():
    for trace in (Hutchinson(1), Hutchinson(1, fresh=False), Hadamard(1), HutchPP(3)):
        assert bool(
            along(trace, matrix(8)[None].expand(3, -1, -1), torch.ones(3), batch=2, seed=0).stderr.isnan().all()
        )


@pytest.mark.slow
def test_hadamard_beats_fresh_probes_beat_fixed_ones(trajectory):
    """Standard deviations at 4 probes on the whole trajectory, as in the table of the documentation."""
    fixed, fresh, columns = (
        float(repeated(trace, trajectory)[0].square().mean().sqrt())
        for trace in (Hutchinson(4, fresh=False), Hutchinson(4), Hadamard(4))
    )
    assert columns < 0.95 * fresh < fixed
    assert fixed > 1.6 * fresh


# ---------------------------------------------------------------- planted mistakes


@pytest.mark.slow
def test_planted_mistakes_are_found(monkeypatch, trajectory):
    signs = traces.Integral._signs
    dot = hutchinson.dot
    with monkeypatch.context() as patch:
        patch.setattr(traces.Integral, "_signs", lambda self, *shape: 1.1**0.5 * signs(self, *shape))
        assert not moments_agree(Hutchinson(3), rademacher_variance(3))
    with monkeypatch.context() as patch:
        patch.setattr(traces.Integral, "_signs", lambda self, *shape: torch.ones_like(signs(self, *shape)))
        error = along(Hadamard(3), matrix(12)[None], [1.0], batch=50, seed=0).value - matrix(12).trace()
        assert float(error.std()) < 1e-12 < float(error.abs().min())  # without signs it is one biased number
    with monkeypatch.context() as patch:  # the square of the gradient: a biased form
        patch.setattr(hutchinson, "dot", lambda a, b: dot(a, a))
        assert not moments_agree(Hutchinson(3), rademacher_variance(3))
    with monkeypatch.context() as patch:  # Var of a value, not of the mean of the probes
        error = hutchinson.Nodewise.error
        patch.setattr(hutchinson.Nodewise, "error", lambda self: (2 * error(self)[0], error(self)[1]))
        assert not calibrated(Hutchinson(4), trajectory)
    with monkeypatch.context() as patch:  # columns taken as independent over the nodes
        patch.setattr(cycled, "_fitted", lambda scale, products, weights: torch.diag_embed(scale))
        assert not calibrated(Hadamard(16), trajectory)


# ---------------------------------------------------------------- batches, graphs, dtypes


@pytest.mark.parametrize("trace", ALL, ids=str)
def test_a_sample_does_not_depend_on_its_batch(trace):
    jacobians = torch.stack([torch.stack([matrix(8, 10 * n + b) for b in range(7)]) for n in range(6)])
    weights = torch.ones(6)
    whole = along(trace, jacobians, weights, seed=5)
    first = along(trace, jacobians[:, :3], weights, seed=5)
    picked = along(trace, jacobians, weights, seed=5, rows=torch.tensor([6, 2]))
    for name in ("value", "stderr", "dof"):
        torch.testing.assert_close(getattr(first, name), getattr(whole, name)[:3])
        torch.testing.assert_close(getattr(picked, name), getattr(whole, name)[[6, 2]])
    if not isinstance(trace, Exact):
        other = along(trace, jacobians, weights, seed=5, round=1)
        assert float((other.value - whole.value).abs().min()) > 1e-9
        assert not torch.equal(along(trace, jacobians, weights, seed=6).value, whole.value)


class Stubborn(torch.autograd.Function):
    """x³, whose backward leaves torch, so that vmap over it fails."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(gradient.numpy() * 3 * x.numpy() ** 2)


@pytest.mark.parametrize("trace", ALL, ids=str)
def test_networks_that_cannot_be_batched_go_one_by_one(trace):
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    values = []
    for cube in (Stubborn.apply, lambda x: x**3):
        integral = trace.start((4, 2, 3), [0.5, 0.5], seed=0)
        for _ in range(2):
            integral.add(cube(x), x)
        values.append(integral.result().value)
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("trace", ALL, ids=str)
def test_values_are_differentiable_when_asked(trace):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    integral = trace.start((3, 6), [1.0, 0.5], seed=0, create_graph=True)
    for _ in range(2):
        integral.add(scale * (x @ matrix(6)), x)
    estimate = integral.result()
    (gradient,) = torch.autograd.grad(estimate.value.sum(), scale)
    torch.testing.assert_close(gradient, estimate.value.detach().sum() / 2)
    assert not estimate.stderr.requires_grad


@pytest.mark.parametrize("trace", ALL, ids=str)
def test_float32_fields_sum_in_float64(trace):
    double, single = (
        along(trace, torch.stack([matrix(8, n) for n in range(4)]).to(dtype), torch.ones(4), batch=3, seed=0)
        for dtype in (torch.float64, torch.float32)
    )
    assert single.value.dtype == torch.float64
    torch.testing.assert_close(single.value, double.value, rtol=1e-4, atol=1e-4)


def test_chunks_change_nothing(monkeypatch):
    jacobians = torch.stack([matrix(8, n) for n in range(5)])
    before = [along(trace, jacobians, torch.ones(5), batch=3, seed=0) for trace in ALL]
    monkeypatch.setattr(products, "_CHUNK", 2 * 3 * 8)
    after = [along(trace, jacobians, torch.ones(5), batch=3, seed=0) for trace in ALL]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one.value, other.value)
        torch.testing.assert_close(one.stderr, other.stderr, equal_nan=True)
        assert one.products == other.products


@pytest.mark.parametrize("trace", ALL, ids=str)
def test_an_empty_batch(trace):
    estimate = along(trace, matrix(4)[None], [1.0], batch=0, seed=0)
    assert estimate.value.shape == estimate.stderr.shape == estimate.dof.shape == (0,)


# ---------------------------------------------------------------- several passes


def test_pooled_passes_are_as_good_as_their_sum():
    jacobians = torch.stack([matrix(16, n, symmetric=True) for n in range(20)])
    weights = torch.ones(20) / 20
    passes = [along(Hutchinson(2), jacobians, weights, batch=2000, seed=0, round=r) for r in range(4)]
    error = pool(passes).value - trace_of(jacobians, weights)
    assert pool(passes).products == 4 * 40
    stderr, dof = pool(passes).stderr, pool(passes).dof
    assert abs(float(stderr.square().mean() / error.square().mean()) - 1) < 0.15
    assert float(dof.mean()) > float(passes[0].dof.mean())
    # one probe each: the spread of the passes tells their error
    single = pool([along(Hutchinson(1), jacobians, weights, batch=4000, seed=1, round=r) for r in range(5)])
    error = single.value - trace_of(jacobians, weights)
    assert abs(float(single.stderr.square().mean() / error.square().mean()) - 1) < 0.15
    assert bool((single.dof == 4).all())
    exact = along(Exact(), jacobians, weights, batch=2)
    assert float(pool([exact, exact]).stderr.max()) == 0


def test_passes_until_a_standard_error():
    jacobians = torch.stack([torch.stack([b * matrix(16, n) for b in (0.2, 1.0, 2.0)]) for n in range(10)])
    weights = torch.ones(10) / 10
    calls = []

    def run(number, rows, keep=slice(None)):
        calls.append(rows.tolist())
        return along(Hutchinson(4), jacobians[:, keep], weights, seed=0, round=number, rows=rows)

    done = until(run, 3, target=1.0, rounds=64)
    assert float(done.stderr.max()) <= 1.0
    assert calls[0] == [0, 1, 2] and calls[-1] == [2]
    assert bool(((done.value - trace_of(jacobians, weights)).abs() < 5 * done.stderr).all())
    alone = until(lambda number, rows: run(number, rows, slice(0, 2)), 2, target=1.0, rounds=64)
    torch.testing.assert_close(alone.value, done.value[:2])
    torch.testing.assert_close(alone.stderr, done.stderr[:2])
    assert until(run, 3, target=1e-9, rounds=2).products == 2 * 4 * 10


# ---------------------------------------------------------------- mistakes of the caller


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="at least 1"):
        Hutchinson(0)
    with pytest.raises(ValueError, match="gaussian"):
        Hutchinson(1, "uniform")
    with pytest.raises(ValueError, match="at least 3"):
        HutchPP(2)
    with pytest.raises(ValueError, match="nodes"):
        Exact().start((2, 3), [])
    with pytest.raises(ValueError, match="at least one"):
        pool([])
    with pytest.raises(ValueError, match="positive standard error"):
        until(lambda *_: Estimate(*torch.zeros(3, 1), 1), 1, target=0.0)
    x = torch.ones(2, 3, requires_grad=True)
    integral = Hutchinson(2).start((2, 3), [1.0, 1.0], seed=0)
    with pytest.raises(ScoreError, match="no gradient"):
        integral.add(x.detach(), x)
    with pytest.raises(ScoreError, match="does not depend"):
        integral.add(torch.ones(2, 3, requires_grad=True) * 2, x)
    with pytest.raises(ValueError, match="expected"):
        integral.add(x[:1] * 2, x)
    integral = Hutchinson(2).start((2, 3), [1.0, 1.0], seed=0)
    integral.add(x * 2, x)
    with pytest.raises(ValueError, match="1 of 2 nodes"):
        integral.result()
    integral.add(x * 2, x)
    with pytest.raises(ValueError, match="all 2 nodes"):
        integral.add(x * 2, x)
