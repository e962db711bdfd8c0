"""Forward paths, what is learned from them, and the priors of SDEs without a Gaussian kernel."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import sympy as sp
import torch

import sdeflow
from sdeflow import SDE, Score, catalog, errors, state, t, x
from sdeflow.kernels.local import LocalLaw
from sdeflow.laws.stationary import stationary_law
from sdeflow.numerics.noise import NoiseStream
from sdeflow.solvers import Torchsde
from sdeflow.solving.simulate import start
from sdeflow.training.losses import KernelPairs
from sdeflow.training.pairs import SimulatedPairs

R = sp.Rational
PULSE = sp.Piecewise((10**5, sp.And(t > R(1, 3), t < R(1, 3) + R(1, 10**4))), (0, True))
DOUBLE_WELL = SDE(x - x**3, 1, T=2)
MEAN, STD = 0.3, 0.2  # of its data


def lorenz():
    u, v, w = state("u v w")
    return SDE([10 * (v - u), u * (28 - w) - v, u * v - R(8, 3) * w], [2, 2, 2], T=R(1, 2))


def lotka_volterra():
    u, v = state("u v")
    return SDE([u * (1 - v), v * (u - 1)], [u / 5, v / 5], T=2)


def well_with_friction():
    """Langevin in a double well: noise in the velocity alone."""
    q, v = state("q v")
    return SDE([v, q - q**3 - v], [0, 1], T=2, P0=[0, 1])


def fokker_planck(times, start=None, cells=500, reach=3.2):
    """p_t of the double well on a grid, by the scheme of Chang and Cooper."""
    edges = np.linspace(-reach, reach, cells + 1)
    grid, h = 0.5 * (edges[1:] + edges[:-1]), edges[1] - edges[0]
    z = 2.0 * (edges[1:-1] - edges[1:-1] ** 3) * h
    share = np.where(np.abs(z) < 1e-8, 1.0 - 0.5 * z, z / np.expm1(np.where(z == 0, 1.0, z)))
    left, right = 0.5 / h**2 * share, 0.5 / h**2 * (share + z)
    root = np.exp(0.5 * np.concatenate([[0.0], np.cumsum(np.log(right / left))]))
    out = np.concatenate([right, [0.0]]) + np.concatenate([[0.0], left])
    rates, vectors = scipy.linalg.eigh_tridiagonal(-out, np.sqrt(left * right))
    p = scipy.stats.norm(MEAN, STD).pdf(grid) if start is None else (np.abs(grid - start) < 0.51 * h) / h
    return grid, [root * (vectors @ (np.exp(rates * t) * (vectors.T @ (p / root)))) for t in times]


def near(values, exact, std=None):
    """Whether the mean of ``values`` is within 4 standard errors of ``exact``."""
    values = values.double()
    return abs(float(values.mean()) - exact) < 4 * float(values.std()) / math.sqrt(len(values))


# -------------------------------------------------------------------- simulate


def test_affine_paths_have_the_kernels_moments():
    sde = catalog.VP()
    paths = sde.simulate(torch.full((8000, 1), 1.5), [0.0, 0.3, 1.0], steps=400, seed=0)
    assert paths.shape == (3, 8000, 1)
    assert bool((paths[0] == 1.5).all())
    for time, states in ((0.3, paths[1]), (1.0, paths[2])):
        mean, std = sde.kernel.moments(torch.tensor([[1.5]], dtype=torch.float64), time)
        assert near(states[:, 0], float(mean))
        assert near((states[:, 0].double() - float(mean)).square(), float(std) ** 2)


@pytest.mark.parametrize("method", Torchsde.methods)
def test_every_method_gives_the_moments_of_geometric_brownian_motion(method):
    sde = SDE(x / 4, x / 2, T=1)
    found = sde.simulate(torch.ones(6000, 1, dtype=torch.float64), [1.0], method, steps=60, seed=1)[0, :, 0]
    assert near(found, math.exp(0.25))
    assert near(found.square(), math.exp(0.5 + 0.25))


def test_a_matrix_of_noise_and_a_degenerate_one():
    u, v = state("u v")
    sde = SDE([-u, -2 * v], [[1, R(1, 2)], [0, 1]], T=1)
    found = sde.simulate(torch.zeros(8000, 2), [1.0], steps=200, seed=0)[0].double()
    covariance = {
        (0, 0): 1.25 * (1 - math.exp(-2)) / 2,
        (0, 1): 0.5 * (1 - math.exp(-3)) / 3,
        (1, 1): (1 - math.exp(-4)) / 4,
    }
    for (i, j), exact in covariance.items():
        assert near(found[:, i] * found[:, j], exact)
    q, v = state("q v")
    cld = SDE([v, -q - 2 * v], [0, 2], T=1, P0=[0, R(1, 25)])
    lifted = cld.lift(torch.full((8000, 1), 0.7), seed=0)
    found = cld.simulate(lifted, [0.5], steps=400, seed=0)[0].double()
    mean, cov = cld.kernel.moments(cld.kernel.lift(torch.full((1, 1), 0.7, dtype=torch.float64), noisy=False), 0.5)
    for i in range(2):
        assert near(found[:, i, 0], float(mean[0, i, 0]))
        assert near((found[:, i, 0] - mean[0, i, 0]).square(), float(cov.reshape(2, 2)[i, i]))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("milstein", 1), ("midpoint", 2), ("heun", 2)])
def test_weak_order_of_the_mean(method, order):
    """With noise of 1e-9 the mean is the state: dx = -x + sin(3t) has a known solution."""
    sde = SDE(-x + sp.sin(3 * t), R(1, 10**9), T=1, cutoff=0.1)
    x_0 = torch.ones(1, 1, dtype=torch.float64)
    exact = 1.3 * math.exp(-1) + (math.sin(3) - 3 * math.cos(3)) / 10
    coarse, fine = (abs(float(sde.simulate(x_0, [1.0], method, steps=n, seed=0)) - exact) for n in (20, 40))
    assert order - 0.15 < math.log2(coarse / fine) < order + 0.15


def test_paths_do_not_depend_on_company_or_on_who_looks():
    x_0 = torch.linspace(-1, 1, 3000)[:, None]
    paths = DOUBLE_WELL.simulate(x_0, [0.5, 2.0], steps=100, seed=3)
    assert torch.equal(DOUBLE_WELL.simulate(x_0[:7], [0.5, 2.0], steps=100, seed=3), paths[:, :7])
    assert torch.allclose(DOUBLE_WELL.simulate(x_0, [2.0], steps=100, seed=3)[0], paths[1], atol=1e-5)
    assert not torch.equal(DOUBLE_WELL.simulate(x_0, [0.5, 2.0], steps=100, seed=4), paths)
    state_before = torch.get_rng_state()
    DOUBLE_WELL.simulate(x_0, [2.0], steps=10, seed=3)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert DOUBLE_WELL.simulate(x_0[:0], [1.0]).shape == (1, 0, 1)
    assert DOUBLE_WELL.simulate(x_0[:4].half(), [1.0], steps=20, seed=0).dtype == torch.float16
    adaptive = DOUBLE_WELL.simulate(
        x_0[:50], [0.5, 1.0], Torchsde("milstein", adaptive=True), rtol=1e-2, atol=1e-2, seed=0
    )
    assert bool(torch.isfinite(adaptive).all())


def test_a_basis_is_a_change_of_coordinates():
    """In an orthogonal basis the increments rotate; Brownian motion alone does not show it, so the drift does."""
    rotation = sdeflow.basis.Orthogonal(torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))
    rates = torch.tensor([0.0, 3.0])
    sde = SDE(-sp.Symbol("k") * x, R(1, 10**6), params={"k": rates}, basis=rotation, cutoff=0.1)
    found = sde.simulate(torch.tensor([[1.0, 2.0]], dtype=torch.float64), [1.0], "heun", steps=400, seed=0)[0]
    u = rotation.forward(torch.tensor([[1.0, 2.0]], dtype=torch.float64)) * torch.exp(-rates)
    assert torch.allclose(found, rotation.inverse(u), atol=1e-4)


@pytest.mark.parametrize("ts", [[], [1.0, 0.5], [0.5, 0.5], [-0.1], [2.5], [math.nan], [[1.0]]])
def test_times_are_checked(ts):
    with pytest.raises(ValueError, match="increasing times in"):
        DOUBLE_WELL.simulate(torch.zeros(2, 1), ts)


def test_states_and_explosions_are_checked():
    with pytest.raises(errors.DataError):
        DOUBLE_WELL.simulate(torch.tensor([[math.nan]]), [1.0])
    with pytest.raises(errors.DataError, match=r"\(batch, 3, \*event\)"):
        lorenz().simulate(torch.zeros(4, 2), [0.1])
    with pytest.raises(errors.NonFiniteStateError):
        SDE(x**3, 1, T=2).simulate(torch.full((4, 1), 3.0), [2.0], steps=100, seed=0)
    with pytest.raises(ValueError, match="steps"):
        DOUBLE_WELL.simulate(torch.zeros(2, 1), [1.0], steps=0)


# -------------------------------------------------------------------- the local law


def van_loan(F, Q, h):
    k = len(F)
    E = scipy.linalg.expm(np.block([[-F, Q], [np.zeros((k, k)), F.T]]) * h)
    return E[k:, k:].T, E[k:, k:].T @ E[:k, k:]


@pytest.mark.parametrize("h", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("matrix", [[[0, 1], [0, 0]], [[-1, 2], [0, -3]], [[0, 1], [-4, -4]], [[R(1, 2), -1], [1, 0]]])
def test_the_local_law_of_a_linear_sde_is_exact(matrix, h):
    """Singular, triangular, defective and rotating J, with a constant drift."""
    u, v = state("u v")
    F = sp.Matrix(matrix)
    sde = SDE(list(F * sp.Matrix([u, v]) + sp.Matrix([1, -2])), [[0, R(1, 2)], [1, 1]], T=5, P0=1)
    law = LocalLaw(sde)
    states, times = torch.tensor([[0.3, -1.2], [2.0, 0.5]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    mean, root = law(states, times, times + h)
    F, b, g = np.array(F, dtype=float), np.array([1.0, -2.0]), np.array([[0, 0.5], [1, 1]])
    _, P = van_loan(F, g @ g.T, h)
    augmented = scipy.linalg.expm(np.block([[F, b[:, None]], [np.zeros((1, 3))]]) * h)
    exact = states.numpy() @ augmented[:2, :2].T + augmented[:2, 2]
    assert np.allclose(mean.numpy(), exact, rtol=1e-12, atol=1e-12)
    assert np.allclose(root.gram.values.numpy(), P, rtol=1e-11, atol=1e-13)


def test_the_local_law_is_stable_where_the_drift_is_stiff():
    u, v = state("u v")
    sde = SDE([-200 * u, -v], [1, 1], T=5)
    times = torch.zeros(1, dtype=torch.float64)
    _, P = LocalLaw(sde).moments(torch.ones(1, 2, dtype=torch.float64), times, times + 3)
    exact = torch.tensor([[1 / 400, 0.0], [0.0, (1 - math.exp(-6)) / 2]], dtype=torch.float64)
    assert torch.allclose(P[0], exact, rtol=1e-12, atol=1e-15)


def test_the_local_law_has_second_order_moments():
    """From a point, mean and variance of the double well are right to O(h³): halving h must gain a factor near 8."""
    law, (grid, _) = LocalLaw(DOUBLE_WELL), fokker_planck([0.0])
    start = grid[np.abs(grid - 0.7).argmin()]
    found = []
    for h in (0.1, 0.05):
        _, (p,) = fokker_planck([h], start=start, cells=500)
        width = grid[1] - grid[0]
        mean = np.sum(p * grid) * width
        variance = np.sum(p * (grid - mean) ** 2) * width
        time = torch.zeros(1, dtype=torch.float64)
        m, P = law.moments(torch.tensor([[start]]), time, time + h)
        found.append((abs(float(m) - mean), abs(float(P) - variance)))
    (mean_coarse, var_coarse), (mean_fine, var_fine) = found
    assert mean_fine < 2e-4 and mean_coarse / mean_fine > 5
    assert var_fine < 2e-3 and var_coarse / var_fine > 5


def test_a_gap_of_one_is_a_step_of_euler():
    law = LocalLaw(lotka_volterra())
    states = torch.tensor([[1.2, 0.7], [0.4, 2.0]], dtype=torch.float64)
    time = torch.zeros(2, dtype=torch.float64)
    mean, root = law.euler(states, time, time + 0.01)
    u, v = states.T
    assert torch.allclose(mean, states + 0.01 * torch.stack([u * (1 - v), v * (u - 1)], dim=1))
    assert torch.allclose(root.gram.values, torch.diag_embed(0.01 * states.square() / 25))
    drawn = law.increment(states, time, time + 0.01, torch.zeros_like(states))
    assert torch.allclose(states + drawn, mean)


def regression(pairs, sigma=4.0):
    """target = A x + b by least squares in the pairs' own weight: coefficients and their standard errors."""
    inputs = torch.cat([pairs.x_t.flatten(1).double(), torch.ones(len(pairs.x_t), 1, dtype=torch.float64)], dim=1)
    target = pairs.target.flatten(1).double()
    solution = torch.linalg.lstsq(inputs, target).solution
    residual = (target - inputs @ solution).square().mean(0)
    error = (torch.linalg.inv(inputs.T @ inputs).diagonal()[:, None] * residual).sqrt()
    return solution, error


@pytest.mark.parametrize("gap", [1, 5, 20])
def test_local_targets_are_unbiased_on_a_linear_sde(gap):
    """E[target | x_t] is the score -(x - m) / V; what Euler's steps change of V is less than the standard error."""
    sde = SDE(-x, 1, T=2)
    pairs = SimulatedPairs(sde, "score", gap, 200)
    data = 1.0 + 0.5 * torch.randn(20_000, 1, dtype=torch.float64)
    time = torch.full((20_000,), 1.0, dtype=torch.float64)
    solution, error = regression(pairs(data, time, NoiseStream(0, "test")))
    mean, variance = math.exp(-1), 0.25 * math.exp(-2) + (1 - math.exp(-2)) / 2
    exact = torch.tensor([[-1 / variance], [mean / variance]], dtype=torch.float64)
    assert bool(((solution - exact).abs() < 4 * error).all())


def test_local_targets_where_noise_drives_the_velocity_alone():
    """Langevin in a parabola, its velocity from P0: the 2 x 2 score, both of its rows."""
    q, v = state("q v")
    sde = SDE([v, -q - v + q**3 / 10**9], [0, 1], T=2, P0=[0, 1])  # the cube makes it general
    n = 20_000
    data = 0.8 * torch.randn(n, 1, dtype=torch.float64)
    pairs = SimulatedPairs(sde, "score", 20, 100)(
        data, torch.full((n,), 1.0, dtype=torch.float64), NoiseStream(0, "test")
    )
    solution, error = regression(pairs)
    F = np.array([[0.0, 1.0], [-1.0, -1.0]])
    Phi, P = van_loan(F, np.diag([0.0, 1.0]), 1.0)
    exact = torch.as_tensor(-np.linalg.inv(Phi @ np.diag([0.64, 1.0]) @ Phi.T + P).T)
    assert bool(((solution[:2] - exact).abs() < 4 * error[:2] + 0.01).all())
    whitened = pairs.root.T(pairs.target)
    assert 0.8 < float(whitened.square().mean()) < 1.3  # the loss is well scaled


@pytest.mark.parametrize("weighting", ["score", "likelihood", lambda time: 1 + time])
def test_weights_know_x_t_alone(weighting):
    """Geometric Brownian motion: weighted least squares must find the score, both for its kernel and for simulation.

    The residuals' variance depends on x, so that the standard errors are White's, (AᵀA)⁻¹ Aᵀ diag(r²) A (AᵀA)⁻¹. Local
    targets add what Euler's 200 steps and x > 0.05 change.
    """
    sde = SDE(x / 4, x / 2, T=1)
    general = SDE(x / 4 + x**3 / 10**9, x / 2, T=1)
    n, spread, time = 40_000, 0.4, 0.5
    data = torch.exp(spread * torch.randn(n, 1, dtype=torch.float64))
    times = torch.full((n,), time, dtype=torch.float64)
    variance, mean = spread**2 + time / 4, time * (1 / 4 - 1 / 8)
    exact = torch.tensor([-1 / variance, mean / variance - 1], dtype=torch.float64)  # s = (a log x + b) / x
    kernel = KernelPairs(Score(lambda u, _: u, sde, predicts="score", time="t"), weighting)
    for draw, bias in ((kernel, 0.0), (SimulatedPairs(general, weighting, 5, 200), 0.15)):
        x_t, _, target, root = draw(data, times, NoiseStream(2, "test"))
        kept = x_t[:, 0] > 0.05
        weight, y = root.values.expand_as(x_t)[kept].double(), x_t[kept].double()
        inputs = torch.cat([y.log() / y, 1 / y], dim=1) * weight
        weighted = target[kept].double() * weight
        solution = torch.linalg.lstsq(inputs, weighted).solution[:, 0]
        bread = torch.linalg.inv(inputs.T @ inputs)
        filling = inputs * (weighted - inputs @ solution[:, None])
        error = (bread @ (filling.T @ filling) @ bread).diagonal().sqrt()
        assert bool(((solution - exact).abs() < 4.5 * error + bias).all()), (solution, exact, error)


def test_a_weight_that_knows_x_0_would_be_wrong():
    """The check above can fail: in units of the kernel's standard deviation at x_0 the minimiser is another."""
    n, time = 40_000, 0.5
    sde = SDE(x / 4, x / 2, T=1)
    data = torch.exp(0.4 * torch.randn(n, 1, dtype=torch.float64))
    x_t = sde.kernel.sample(data, time, seed=0)
    weight = sde.kernel.moments(data, time)[1]
    inputs = torch.cat([x_t.log() / x_t, 1 / x_t], dim=1) * weight
    solution = torch.linalg.lstsq(inputs, sde.kernel.score(x_t, data, time) * weight).solution[:, 0]
    exact = -1 / (0.16 + time / 4)
    assert abs(float(solution[0]) - exact) + abs(float(solution[1]) - (-1 - exact * time / 8)) > 0.3


def test_pairs_say_what_they_cannot_do():
    with pytest.raises(errors.ScheduleError, match="gap >= 2"):
        SimulatedPairs(well_with_friction(), "score", 1, 100)
    u, v = state("u v")
    unreached = SDE([-(u**3), -v], [1, 0], T=1)
    with pytest.raises(errors.ScheduleError, match="no density"):
        SimulatedPairs(unreached, "score", 5, 20)(torch.zeros(4, 2), torch.full((4,), 0.5), NoiseStream(0, "test"))
    with pytest.raises(ValueError, match="gap"):
        SimulatedPairs(DOUBLE_WELL, "score", 0, 100)
    with pytest.raises(ValueError, match="weighting"):
        SimulatedPairs(DOUBLE_WELL, "scores", 5, 100)
    with pytest.raises(errors.NonFiniteStateError, match="simulation_steps"):
        pairs = SimulatedPairs(SDE(x**3, 1, T=2), "score", 5, 50)
        pairs(torch.full((4, 1), 3.0), torch.full((4,), 2.0).double(), NoiseStream(0, "test"))


def test_data_starts_with_its_noise():
    declaration = well_with_friction().declaration
    states = start(declaration, torch.full((4000, 1), 0.5), NoiseStream(0, "test"))
    assert states.shape == (4000, 2, 1)
    assert bool((states[:, 0] == 0.5).all())
    assert abs(float(states[:, 1].std()) - 1) < 0.05
    noisy = SDE(x - x**3, 1, P0=R(1, 4)).declaration
    assert abs(float(start(noisy, torch.zeros(4000, 1), NoiseStream(0, "test")).std()) - 0.5) < 0.03


# -------------------------------------------------------------------- training


def small(sde, features, width=32):
    torch.manual_seed(0)
    return Score(sdeflow.nets.MLP(features, width=width, depth=2), sde, predicts="score", time="t")


class FlowNet(torch.nn.Module):
    """s = 2 (f - v), v the flow's velocity: where nothing was learned, no rest of the cubic drift throws paths away."""

    def __init__(self):
        super().__init__()
        self.velocity = sdeflow.nets.MLP(1, width=48, depth=2)

    def forward(self, u, time):
        return 2 * (u - u**3 - self.velocity(u, time))


def fitted_double_well(steps=500):
    score = Score(FlowNet(), DOUBLE_WELL, predicts="score", time="t")
    data = MEAN + STD * torch.randn(8192, 1)
    sdeflow.fit(score, data, steps, batch_size=256, lr=5e-3, seed=0)
    return score


def score_errors(score, times):
    """Root mean square error under p_t over the score's own root mean square."""
    grid, densities = fokker_planck(times)
    found = []
    for time, p in zip(times, densities, strict=True):
        exact = np.gradient(np.log(np.maximum(p, 1e-300)), grid[1] - grid[0])
        with torch.no_grad():
            learned = score(torch.as_tensor(grid, dtype=torch.float32)[:, None], time)[:, 0].double().numpy()
        found.append(float(np.sqrt(np.sum(p * (learned - exact) ** 2) / np.sum(p * exact**2))))
    return found


@pytest.mark.slow
def test_the_score_of_the_double_well_is_learned():
    score = fitted_double_well()
    assert max(score_errors(score, (0.1, 0.3, 1.0, 2.0))) < 0.25
    prior = DOUBLE_WELL.fit_prior(torch.randn(2000, 1) * STD + MEAN, n=4000, seed=0)
    back = DOUBLE_WELL.reverse(score, prior=prior).sample((2000, 1), steps=200, seed=0)
    assert abs(float(back.mean()) - MEAN) < 0.1
    assert abs(float(back.std()) - STD) < 0.1


def test_training_by_simulation_goes_on_where_it_stopped(tmp_path):
    data = MEAN + STD * torch.randn(64, 1)
    options = {"batch_size": 16, "schedule": "constant", "simulation_steps": 10, "gap": 2, "seed": 0}
    whole, stopped = small(DOUBLE_WELL, 1), small(DOUBLE_WELL, 1)
    before = torch.get_rng_state()
    straight = sdeflow.fit(whole, data, 45, **options)
    assert torch.equal(torch.get_rng_state(), before)
    sdeflow.fit(stopped, data, 20, out=tmp_path, **options)  # within the second block of 16 steps
    rest = sdeflow.fit(stopped, data, 45, out=tmp_path, resume=True, **options)
    assert rest.losses == straight.losses
    for ours, theirs in zip(stopped.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(errors.CheckpointMismatch, match="gap"):
        sdeflow.fit(stopped, data, 50, out=tmp_path, resume=True, **{**options, "gap": 3})


@pytest.mark.parametrize(("build", "shape"), [(lorenz, (3,)), (lotka_volterra, (2,)), (well_with_friction, (1,))])
def test_coupled_sdes_train_and_sample(build, shape):
    sde = build()
    k = len(sde.declaration.state)
    data = 1.0 + 0.2 * torch.randn(256, *shape)
    score = small(sde, k)
    fitted = sdeflow.fit(score, data, 20, batch_size=64, simulation_steps=50, seed=0)
    assert all(math.isfinite(loss) for loss in fitted.losses)
    assert 0.3 < np.mean(fitted.losses) < 3.0  # in units of the step's standard deviation
    prior = sde.fit_prior(data, n=500, steps=100, seed=0)
    event = (k, *shape[1:]) if len(shape) > 1 or shape[0] == k else (k, *shape)
    samples = sde.reverse(score, prior=prior).sample((8, *event), steps=400, seed=0)
    assert samples.shape == (8, *event)
    assert bool(torch.isfinite(samples).all())


def test_an_exact_kernel_is_matched_itself():
    sde = SDE(x / 4, x / 2, T=1)
    score = small(sde, 1)
    fitted = sdeflow.fit(score, torch.rand(512, 1) + 0.5, 60, batch_size=128, seed=0, lr=5e-3)
    assert np.mean(fitted.losses[-10:]) < np.mean(fitted.losses[:10])
    with pytest.raises(ValueError, match="gap"):
        sdeflow.fit(score, torch.rand(64, 1) + 0.5, 1, gap=3)
    with pytest.raises(ValueError, match="log_snr"):
        sdeflow.fit(score, torch.rand(64, 1) + 0.5, 1, times="log_snr")


# -------------------------------------------------------------------- noise that depends on the state, backwards


class LogNormal:
    def __init__(self, mean, variance):
        self.law = scipy.stats.norm(mean, math.sqrt(variance))

    def sample(self, shape, seed=None, dtype=None, device="cpu"):
        noise = NoiseStream(seed, "prior").normal(shape, torch.float64)
        return torch.exp(self.law.mean() + self.law.std() * noise).to(dtype)

    def log_prob(self, u):
        return torch.as_tensor(self.law.logpdf(u.double().log().numpy()) - u.double().log().numpy()).flatten(1).sum(1)


def test_geometric_brownian_motion_comes_back():
    """The divergence of g² matters: without it the reverse log-mean is off by a quarter (MATH: -0.252)."""
    mu, sigma, m, v = 0.3, 0.5, 0.1, 0.16
    sde = SDE(R(3, 10) * x, x / 2, T=1)

    def law(time):
        return LogNormal(m + (mu - sigma**2 / 2) * time, v + sigma**2 * time)

    def score(u, time):
        time = time.reshape(-1, 1)
        return (-(u.log() - m - (mu - sigma**2 / 2) * time) / (v + sigma**2 * time) - 1) / u

    reverse, flow = sde.reverse(score, prior=law(1.0)), sde.flow_ode(score, prior=law(1.0))
    found = reverse.sample((8000, 1), steps=300, seed=0, dtype=torch.float64).log()[:, 0]
    assert near(found, m)
    assert near((found - m).square(), v + sigma**2 * reverse.model.cutoff)
    points = torch.tensor([[0.5], [1.0], [1.5], [3.0]], dtype=torch.float64)
    assert torch.allclose(flow.log_prob(points), law(flow.model.cutoff).log_prob(points), atol=1e-4)


# -------------------------------------------------------------------- priors

STATIONARY = {
    "OU": (SDE(2 - x, 1, T=5), scipy.stats.norm(2, math.sqrt(0.5))),
    "CIR": (SDE(2 * (1 - x), sp.sqrt(x), T=5), scipy.stats.gamma(4, scale=0.25)),
    "CIR below 2": (SDE(2 * (1 - x), sp.sqrt(2 - x), T=5), scipy.stats.pearson3(-1, loc=1, scale=0.5)),
    "CIR that touches 0": (SDE((1 - x) / 5, sp.sqrt(x), T=5), scipy.stats.gamma(0.4, scale=2.5)),
    "Jacobi": (SDE(R(1, 3) - x, sp.sqrt(x * (1 - x)), T=5), scipy.stats.beta(2 / 3, 4 / 3)),
    "logistic": (SDE(x * (1 - x), x / 2), scipy.stats.gamma(7, scale=1 / 8)),
    "Student": (SDE(-x, sp.sqrt(1 + x**2)), scipy.stats.t(3, scale=3**-0.5)),
    "Laplace": (SDE(-sp.sign(x), 1), scipy.stats.laplace(scale=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", STATIONARY)
def test_stationary_laws(name):
    sde, exact = STATIONARY[name]
    law = stationary_law(sde)
    points = torch.as_tensor(exact.ppf([1e-6, 0.01, 0.3, 0.5, 0.9, 0.999, 1 - 1e-6]))[:, None]
    assert np.allclose(law.log_prob(points), exact.logpdf(points[:, 0]), atol=1e-5)
    assert np.allclose(law.cdf(points[1:-1, 0]), exact.cdf(points[1:-1, 0]), atol=1e-5)
    assert abs(law.mean - exact.mean()) < 1e-4 * exact.std()
    drawn = law.sample((4000, 1), seed=0, dtype=torch.float64)
    assert scipy.stats.kstest(drawn[:, 0].numpy(), exact.cdf).pvalue > 1e-3
    assert torch.equal(drawn[:9], law.sample((9, 1), seed=0, dtype=torch.float64))
    outside = law.log_prob(torch.tensor([[-1.0]]))
    assert bool((outside == -math.inf) == (exact.support()[0] == 0))


def test_no_flux_at_rest():
    """f p - ½ (g² p)' = 0 for the double well with noise that depends on x, by differences; and its normalisation."""
    law = stationary_law(SDE(x - x**3, sp.sqrt(1 + x**2 / 2)))
    u = torch.linspace(-3, 3, 20_001, dtype=torch.float64)[:, None]
    p, g2 = law.log_prob(u).exp(), 1 + u[:, 0] ** 2 / 2
    assert abs(float(torch.trapezoid(p, u[:, 0])) - 1) < 1e-3  # its tails are a power
    flux = (u[:, 0] - u[:, 0] ** 3) * p - 0.5 * torch.gradient(g2 * p, spacing=(u[:, 0],))[0]
    assert float(flux[5:-5].abs().max()) < 1e-6


@pytest.mark.parametrize(
    "sde", [SDE(sp.sin(x), 1), SDE(x / 3, x), SDE(x, 1), SDE(-x * t - x**3, 1), lotka_volterra()],
    ids=["sin", "GBM", "unstable", "t", "coupled"],
)  # fmt: skip
def test_where_there_is_no_stationary_law(sde):
    assert stationary_law(sde) is None


def test_relaxation():
    assert abs(stationary_law(SDE(-2 * x, 1)).relaxation_time - 0.5) < 5e-3
    law = stationary_law(DOUBLE_WELL)
    grid, (p,) = fokker_planck([2.0])
    exact = 0.5 * np.sum(np.abs(p - law.log_prob(torch.as_tensor(grid)[:, None]).exp().numpy())) * (grid[1] - grid[0])
    assert abs(law.distance_at(2.0, MEAN, STD) - exact) < 2e-3


def test_the_default_prior_is_the_stationary_law_once_it_is_reached():
    score = Score(lambda u, _: u, SDE(x - x**3, 1, T=12), predicts="score", time="t", data_mean=MEAN, data_std=STD)
    flow = SDE(x - x**3, 1, T=12).flow_ode(score)
    assert "StationaryLaw" in repr(flow.model.prior_for(torch.zeros(1, 1)))
    early = Score(lambda u, _: u, DOUBLE_WELL, predicts="score", time="t", data_mean=MEAN, data_std=STD)
    with pytest.warns(errors.PriorMismatchWarning, match="fit_prior"):
        DOUBLE_WELL.flow_ode(early).model.prior_for(torch.zeros(1, 1))
    sde = lotka_volterra()
    with pytest.raises(errors.MissingPriorError, match="fit_prior"):
        sde.flow_ode(lambda u, _: -u).model.prior_for(torch.zeros(1, 2))


def test_a_fitted_prior_has_the_law_of_x_T():
    data = MEAN + STD * torch.randn(4000, 1)
    prior = DOUBLE_WELL.fit_prior(data, n=8000, steps=200, seed=0)
    grid, (p,) = fokker_planck([2.0])
    q = prior.log_prob(torch.as_tensor(grid)[:, None]).exp().numpy()
    assert np.sum(np.abs(p - q)) * (grid[1] - grid[0]) < 0.08
    assert float(prior.ks.max()) < 1.36 / math.sqrt(prior.tested) + 0.01
    assert "Kolmogorov-Smirnov" in repr(prior)
    drawn = prior.sample((4000, 1), seed=0)
    assert abs(float(drawn.mean()) - np.sum(p * grid) * (grid[1] - grid[0])) < 0.08
    assert torch.equal(drawn[:5], prior.sample((5, 1), seed=0))
    with pytest.raises(errors.DataError):
        prior.log_prob(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="n must be"):
        DOUBLE_WELL.fit_prior(data, n=3)


def test_a_fitted_prior_keeps_components_together():
    u, v = state("u v")
    sde = SDE([-u, u - v], [1, 0], T=3)
    data = torch.randn(1000, 2, 5)
    prior = sde.fit_prior(data, n=3000, components=2, steps=60, seed=0)
    drawn = prior.sample((4000, 2, 5), seed=1, dtype=torch.float64)
    exact = sde.simulate(torch.randn(4000, 2, 5), [3.0], steps=60, seed=5)[0].double()
    ours, theirs = (torch.corrcoef(values[:, :, 2].T)[0, 1] for values in (drawn, exact))
    assert abs(float(ours - theirs)) < 0.08
    assert float((drawn.std((0, 2)) / exact.std((0, 2)) - 1).abs().max()) < 0.06
    points = drawn[:3]
    assert prior.log_prob(points).shape == (3,)


# ------------------------------------------------------------------ the law of Boltzmann

POSITION, VELOCITY = sdeflow.state("position velocity")
FRICTION, TEMPERATURE = sp.Rational(1, 2), sp.Rational(7, 10)
BOLTZMANN = {  # the SDE, its velocity's component, -U' and a such that dx = a v dt
    "double well": (
        SDE([VELOCITY, -FRICTION * VELOCITY - POSITION**3 + POSITION], [0, sp.sqrt(2 * FRICTION * TEMPERATURE)], T=25),
        1, lambda q: q**4 / 4 - q**2 / 2, 0.7,
    ),
    "friction of the position": (
        SDE([VELOCITY, -(1 + POSITION**2) * VELOCITY - sp.sinh(POSITION)], [0, sp.sqrt(2 + 2 * POSITION**2)], T=25),
        1, torch.cosh, 1.0,
    ),
    "velocity first, and a mass": (
        SDE([-2 * POSITION - VELOCITY**3, 3 * POSITION], [2, 0], T=25), 0, lambda q: q**4 / 12, 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOLTZMANN)
def test_the_law_of_boltzmann_is_found_and_stays(name):
    """exp(-(U(x) + v² / 2) / temperature) up to a constant, and N(0, temperature) of v; paths keep its moments."""
    sde, velocity, energy, temperature = BOLTZMANN[name]
    law = stationary_law(sde)
    states = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, q = states[:, velocity], states[:, 1 - velocity]
    rest = law.log_prob(states) + (energy(q) + v**2 / 2) / temperature
    torch.testing.assert_close(rest, rest[:1].expand(6), rtol=1e-8, atol=1e-8)
    of_velocity = law.log_prob(states) - law.of_position.log_prob(q[:, None])
    normal = torch.distributions.Normal(*torch.tensor([0.0, math.sqrt(temperature)], dtype=torch.float64))
    torch.testing.assert_close(of_velocity, normal.log_prob(v), rtol=1e-8, atol=1e-8)
    n = 4000
    start = law.sample((n, 2), seed=0, dtype=torch.float64)
    later = sde.simulate(start, [1.0], steps=400, seed=1)[0]
    for drawn in (start, later):
        assert abs(float(drawn[:, velocity].var()) / temperature - 1) < 4 * math.sqrt(2 / n) + 0.01
    moments = [s[:, 1 - velocity].square() for s in (start, later)]
    assert abs(float(moments[0].mean() - moments[1].mean())) < 4 * float(moments[0].std()) * math.sqrt(2 / n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = sde.default_prior(sdeflow.scores.as_score(lambda x, t: -x, sde), states)
    torch.testing.assert_close(prior.log_prob(states), law.log_prob(states))


def test_no_law_of_boltzmann():
    f = -FRICTION * VELOCITY - POSITION**3
    for wrong in (
        SDE([VELOCITY, f], [0, sp.sqrt(1 + POSITION**2)]),  # a temperature that depends on the position
        SDE([VELOCITY, f], [sp.Rational(1, 2), 1]),  # noise in the position
        SDE([VELOCITY, f - VELOCITY**3], [0, 1]),
        SDE([VELOCITY, -FRICTION * VELOCITY - 1 + POSITION**3 * 0 + sp.sin(POSITION)], [0, 1]),  # no finite mass
        SDE([VELOCITY, f * (1 + sdeflow.t)], [0, 1]),
    ):
        assert stationary_law(wrong) is None


def test_a_horizon_too_short_for_the_law_of_boltzmann_is_told():
    sde = SDE([VELOCITY, -VELOCITY - POSITION**3], [0, 1], T=0.2)
    with pytest.warns(errors.PriorMismatchWarning, match="law of Boltzmann"):
        sde.default_prior(sdeflow.scores.as_score(lambda x, t: -x, sde), torch.zeros(1, 2))


@pytest.mark.parametrize("solver", ["ddpm", "dopri5", sdeflow.solvers.Exponential(eta=1.0)])
def test_a_solver_of_other_equations_is_refused_with_those_that_simulate(solver):
    with pytest.raises(ValueError, match=r"does not simulate the forward SDE; those that do: euler.*exact"):
        catalog.OU().simulate(torch.ones(2, 1), [1.0], solver=solver, steps=5)


@pytest.mark.parametrize("solver", ["euler", "milstein", "srk", "heun"])
def test_a_gradient_that_leads_nowhere_is_refused(solver):
    sde = SDE(-x + sp.sin(x), sp.sqrt(1 + x**2) / 5)
    with pytest.raises(ValueError, match="neither the state nor a parameter"):
        sde.simulate(torch.ones(2, 1), [1.0], solver, steps=3, gradient="backprop")


# ------------------------------------------------------------------ what f and g do in t, between the steps

SPIKE = 10**5 * sp.exp(-((10**5 * (t - R(1, 3))) ** 2))


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 20}, {"solver": "heun", "steps": 50}, {"solver": "srk", "steps": 20}, {"ts": [R(1, 3), 1]}],
)
def test_paths_see_short_pulses(options):
    """Of noise 10⁵ for 10⁻⁴ the variance is that of the kernel, 10 e^(-4/3) more than without; of drift the mean."""
    zeros, ts = torch.zeros(10_000, 1), [float(time) for time in options.pop("ts", [1])]
    noisy, driven = SDE(-x, sp.sqrt(1 + PULSE)), SDE(-x + PULSE / 10, 1)
    states = noisy.simulate(zeros, ts, seed=0, **options)[-1]
    true = 0.5 * (1 - math.exp(-2)) + 10 * math.exp(-4 / 3)
    assert float(states.var()) == pytest.approx(true, rel=4 * math.sqrt(2 / 10_000) + 0.03)
    mean = float(driven.simulate(zeros, ts, seed=0, **options)[-1].mean())
    assert mean == pytest.approx(math.exp(-2 / 3), abs=4 * math.sqrt(0.44 / 10_000) + 0.01)


def test_paths_see_short_pulses_without_a_kernel_and_at_an_end_of_the_domain():
    """The cubic drift is too small to matter; full truncation takes a solve for each step."""
    general = SDE(-x - x**3 / 10**9, sp.sqrt(1 + PULSE))
    true = 0.5 * (1 - math.exp(-2)) + 10 * math.exp(-4 / 3)
    found = general.simulate(torch.zeros(10_000, 1), [1.0], seed=0, steps=60)[-1]
    assert float(found.var()) == pytest.approx(true, rel=4 * math.sqrt(2 / 10_000) + 0.03)
    square_root = SDE(1 - x + PULSE / 10, sp.sqrt(x) / 10)
    ended = square_root.simulate(torch.ones(1000, 1), [1.0], seed=0, steps=60, boundary="truncate")[-1]
    assert float(ended.mean()) == pytest.approx(1 + math.exp(-2 / 3), abs=0.02)


def test_simulated_pairs_see_short_pulses():
    general = SDE(-x - x**3 / 10**9, sp.sqrt(1 + PULSE))
    for gap in (1, 5):
        pairs = SimulatedPairs(general, "score", gap, 40)
        for time in (0.3, 0.34, 1.0):
            times = torch.full((10_000,), time, dtype=torch.float64)
            x_t = pairs(torch.zeros(10_000, 1), times, NoiseStream(0, "pairs"))[0]
            true = 0.5 * (1 - math.exp(-2 * time)) + (time > 1 / 3) * 10 * math.exp(-2 * (time - 1 / 3))
            assert float(x_t.var()) == pytest.approx(true, rel=4 * math.sqrt(2 / 10_000) + 0.03)


def test_steps_that_jump_over_a_smooth_spike_are_warned_of():
    zeros = torch.zeros(10, 1)
    for spiked in (SDE(-x, sp.sqrt(1 + SPIKE)), SDE(-x - x**3 / 10, sp.sqrt(1 + SPIKE)), SDE(-x + SPIKE / 10, 1)):
        with pytest.warns(errors.CoarseStepsWarning, match=r"near t = 0\.3333"):
            spiked.simulate(zeros, [1.0], seed=0, steps=100)
    with pytest.warns(errors.CoarseStepsWarning, match="jump over"):
        SimulatedPairs(SDE(-x - x**3 / 10, sp.sqrt(1 + SPIKE)), "score", 5, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steady in (catalog.VP(), catalog.EDM(), catalog.VE(), SDE(-x, sp.sqrt(1 + PULSE)), DOUBLE_WELL):
            steady.simulate(zeros, [steady.T], seed=0, steps=50)
