"""Coupled linear SDEs: kernels against moment ODEs, and everything downstream against exact mixtures."""

import copy
import math

import declarations
import numpy as np
import pytest
import sympy as sp
import torch
from problems import COUPLED
from scipy.integrate import solve_ivp

import sdeflow
from sdeflow import SDE, DataError, DeclarationError, ScheduleError, catalog, state, t, x
from sdeflow.nets import MLP
from sdeflow.numerics.linear import maps_of
from sdeflow.proof.certificate.oracle import Oracle
from sdeflow.scores import GaussianMixture
from sdeflow.symbolic.coupled import stationary_covariance

CUT = {name: make for name, make in COUPLED.items() if name not in ("integrated noise",)}


def moment_ode(sde, end):
    """Φ, P and the offset at ``end`` by DOP853 from f and g, evaluated by SymPy alone."""
    declaration = sde.declaration
    k = len(declaration.state)
    F, b = declaration.affine
    numeric = [sp.lambdify(t, e, "numpy") for e in (F, b, declaration.gram)]

    def rhs(s, y):
        F, b, Q = (np.array(function(s), dtype=float) for function in numeric)
        phi, P, m = y[: k * k].reshape(k, k), y[k * k : 2 * k * k].reshape(k, k), y[2 * k * k :]
        return np.concatenate([(F @ phi).ravel(), (F @ P + P @ F.T + Q).ravel(), F @ m + b.ravel()])

    P0 = np.array(declaration.P0.tolist(), dtype=float)
    start = np.concatenate([np.eye(k).ravel(), P0.ravel(), np.zeros(k)])
    y = solve_ivp(rhs, (0, end), start, method="DOP853", rtol=1e-13, atol=1e-18).y[:, -1]
    return y[: k * k].reshape(k, k), y[k * k : 2 * k * k].reshape(k, k), y[2 * k * k :]


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("fraction", [1e-3, 0.2, 1.0])
def test_moments_solve_the_moment_ode(name, fraction):
    sde = COUPLED[name]()
    phi, root, offset = sde.kernel.coefficients(torch.tensor(fraction * sde.T, dtype=torch.float64))
    true_phi, true_P, true_offset = moment_ode(sde, fraction * sde.T)
    scale = np.sqrt(np.diag(true_P))
    assert np.abs(phi.numpy() - true_phi).max() < 1e-10
    assert (np.abs((root @ root.T).numpy() - true_P) / np.outer(scale, scale)).max() < 1e-10
    assert np.abs(offset.numpy() - true_offset).max() < 1e-10
    assert torch.equal(root, root.tril()) and bool((root.diagonal() > 0).all())


@pytest.mark.parametrize("name", ["critically damped", "known velocity", "integrated noise"])
def test_every_entry_keeps_its_digits_near_zero(name):
    """P_xx ~ t³ (or t²): against 60 digits of the closed form, where float64 has lost all of its own."""
    sde = COUPLED[name]()
    assert sde.kernel.form == "closed"
    for at in (1e-6, 1e-4, 1e-2):
        _, root, _ = sde.kernel.coefficients(torch.tensor(at, dtype=torch.float64))
        exact = sde.kernel.var.subs(t, sp.Float(at, 60)).evalf(60)
        found = (root @ root.T).numpy()
        for i in range(2):
            for j in range(2):
                assert abs(found[i, j] / float(exact[i, j]) - 1) < 1e-9, (at, i, j)
        schur = float((exact[1, 1] - exact[0, 1] ** 2 / exact[0, 0]).evalf(30))
        assert abs(float(root[1, 1]) ** 2 / schur - 1) < 1e-8  # what is left of v once x is known


def test_closed_forms_are_those_of_the_literature():
    x_, v = state("x v")
    B = sp.Symbol("B")
    kernel = SDE(f=[4 * v, -x_ - 4 * v], g=[0, sp.sqrt(2)], T=1).kernel
    decay = sp.exp(-2 * t)
    assert sp.simplify(kernel.alpha - decay * sp.Matrix([[1 + 2 * t, 4 * t], [-t, 1 - 2 * t]])) == sp.zeros(2)
    P = sp.Matrix([[1 - decay**2 * (8 * B**2 + 4 * B + 1), 4 * B**2 * decay**2], [0, 0]]).subs(B, t)
    P[1, 0] = P[0, 1]
    P[1, 1] = (1 - decay**2 * (8 * t**2 - 4 * t + 1)) / 4
    assert sp.simplify(kernel.var - P) == sp.zeros(2)
    assert sp.simplify(kernel.std * kernel.std.T - P) == sp.zeros(2)
    langevin = catalog.CriticallyDampedLangevin().declaration  # beta = 4, M = 1/4, gamma = 0.04 and so Γ = 1
    assert langevin.drifts == (16 * v, -4 * x_ - 16 * v)
    assert (langevin.gram - sp.diag(0, 8)).is_zero_matrix
    assert (langevin.P0 - sp.diag(0, sp.Rational(1, 100))).is_zero_matrix


@pytest.mark.parametrize("name", COUPLED)
def test_what_closes_and_what_says_by_quadrature(name):
    kernel = COUPLED[name]().kernel
    by_quadrature = {"rotation": 0, "not commuting": 0, "all components data": 0, "offset": 1, "noise matrix": None}
    assert len(kernel.rules) == 3
    if name in by_quadrature and by_quadrature[name] is not None:
        assert kernel.form == "quadrature" and "by quadrature" in kernel.rules[by_quadrature[name]]
    elif name != "third order":  # whether SymPy finds its exponential in time is SymPy's affair
        assert kernel.form == "closed" and not any("quadrature" in rule for rule in kernel.rules)


def test_the_recipe_is_stationary():
    S = sp.Matrix([[1, sp.Rational(1, 4)], [sp.Rational(1, 4), 2]])
    sde = catalog.from_recipe([[1, 0], [0, 3]], [[0, -2], [2, 0]], S, T=30)
    F, _ = sde.declaration.affine
    assert sp.simplify(F * S + S * F.T + sde.declaration.gram) == sp.zeros(2)
    assert stationary_covariance(F, sde.declaration.gram) == S
    end = sde.kernel.marginal(0.0, 1.0, sde.T).root.values
    assert torch.allclose((end @ end.mT).squeeze(), torch.tensor(S.tolist(), dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"D": [[1, 2], [0, 1]], "Q": sp.zeros(2)},
        {"D": sp.eye(2), "Q": sp.eye(2)},
        {"D": sp.eye(2), "Q": sp.zeros(2), "S": [[1, 2], [2, 1]]},
        {"D": [[1, 2], [2, 1]], "Q": sp.zeros(2)},
        {"D": sp.eye(3), "Q": sp.zeros(2)},
    ],
)
def test_a_recipe_with_wrong_ingredients_is_refused(options):
    with pytest.raises(DeclarationError):
        catalog.from_recipe(**options)


@pytest.mark.parametrize("name", CUT)
def test_composition_and_bridge_agree_with_the_joint_gaussian(name):
    """p(t | s) p(s | 0) = p(t | 0), and the bridge is the conditional of the joint law of (x_s, x_T)."""
    sde = CUT[name]()
    kernel, k = sde.kernel, sde.kernel.components
    at = [0.4 * sde.T, sde.T]
    like = torch.zeros(1, k, dtype=torch.float64)
    (phi_s, root_s, m_s), (phi_T, root_T, m_T) = (kernel.coefficients(torch.tensor(v, dtype=torch.float64)) for v in at)
    step = kernel.transition(like, *at)
    across, extra = step.alpha.values, step.sigma.gram.values
    assert torch.allclose(across @ phi_s, phi_T, atol=1e-10)
    assert torch.allclose(across @ root_s @ root_s.T @ across.T + extra, root_T @ root_T.T, atol=1e-10)
    assert torch.allclose(across @ m_s + step.offset.flatten(), m_T, atol=1e-10)
    cross = root_s @ root_s.T @ across.T
    y, start = torch.linspace(0.3, 1.0, k, dtype=torch.float64), torch.linspace(-0.5, 0.5, k, dtype=torch.float64)
    gain = cross @ torch.linalg.inv(root_T @ root_T.T)
    mean, covariance = sde.bridge(y).moments(start[None], at[0])
    # The gain is ill conditioned where the end barely remembers some direction.
    assert torch.allclose(mean[0], phi_s @ start + m_s + gain @ (y - phi_T @ start - m_T), atol=1e-7)
    assert torch.allclose(covariance.squeeze(), root_s @ root_s.T - gain @ cross.T, atol=1e-7)


def test_bridges_where_the_noise_has_ended():
    """From there on the state follows from x_T, and from any state there; in one component, it does in that one."""
    half = sp.Piecewise((1, t < sp.Rational(1, 2)), (0, True))
    decay, one = SDE(-x, half), torch.zeros(3, 1, dtype=torch.float64)
    later = decay.bridge(0.05).paths(one, [0.2, 0.5, 0.7, 0.9], seed=0)[1:, :, 0]
    expected = 0.05 * torch.exp(torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64))
    torch.testing.assert_close(later, expected[:, None].expand(3, 3))
    assert float(decay.bridge(0.05).moments(one, 0.9)[1]) == 0.0
    assert decay.verify()
    a, v = state("a v")
    turning, end = SDE([v, -a - v], [0, half], P0=[0, 0.5]), torch.tensor([[0.1], [0.2]], dtype=torch.float64)
    paths = turning.bridge(end).paths(torch.zeros(2, 2, 1, dtype=torch.float64), [0.3, 0.6, 0.9], seed=0)
    flow = torch.linalg.matrix_exp(-0.4 * torch.tensor([[0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64))
    torch.testing.assert_close(paths[1], (flow @ end).expand(2, 2, 1))
    apart, (steady, ending) = SDE([-a, -v], [1, half]), (SDE(-x, 1), decay)
    x_0 = torch.tensor([[[0.4], [-0.3]]], dtype=torch.float64)
    for s, at in ((0.0, 0.3), (0.0, 0.7), (0.6, 0.8)):
        mean, root = apart.bridge(end).law(x_0, s, at)
        for i, sde in enumerate((steady, ending)):
            own, spread = sde.bridge(end[i]).law(x_0[:, i], s, at)
            torch.testing.assert_close(mean[:, i], own)
            torch.testing.assert_close(root.gram.values[..., i, i].squeeze(), spread.gram.values, atol=1e-14, rtol=1e-7)


def ring(sde, std=0.1):
    angle = torch.arange(8) * 2 * torch.pi / 8
    return GaussianMixture(sde, torch.stack([angle.cos(), angle.sin()], dim=1), torch.full((8,), std**2))


@pytest.mark.parametrize("name", ["critically damped", "underdamped", "third order"])
def test_mixture_score_is_the_gradient_and_tweedie_the_mean(name):
    sde = COUPLED[name]()
    exact = ring(sde)
    u = sde.kernel.sample(exact.sample(50, seed=0, dtype=torch.float64), 0.3 * sde.T, seed=1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(exact.log_prob(u, 0.3 * sde.T).sum(), u)
    assert torch.allclose(exact(u, 0.3 * sde.T), gradient, atol=1e-9)
    # E[eps | x_t] = E[sigma⁻¹ (x_t - alpha x_0 - offset) | x_t]
    path = sde.kernel.path(u, torch.tensor(0.3 * sde.T, dtype=torch.float64))
    eps = path.sigma.inverse(u - path.alpha(exact.denoise(u, 0.3 * sde.T)) - path.offset)
    assert torch.allclose(exact.noise(u, 0.3 * sde.T), eps, atol=1e-8)


@pytest.mark.parametrize("predicts", ["score", "noise", "data", "edm"])
def test_parametrisations_of_a_coupled_score_agree(predicts):
    sde = catalog.CriticallyDampedLangevin()
    truth = GaussianMixture(sde, torch.zeros(1, 3), torch.tensor([0.49], dtype=torch.float64))

    def net(z, time):
        if predicts == "edm":
            return torch.zeros_like(z)  # exact for Gaussian data
        assert z.shape[1:] == (6,)  # components folded into channels
        function = {"score": truth, "noise": truth.noise, "data": truth.denoise}[predicts]
        return function(z.reshape(-1, 2, 3), float(time[0])).reshape(z.shape)

    score = sdeflow.Score(net, sde, predicts=predicts, data_mean=0.0, data_std=0.7, time="t")
    u = torch.randn(20, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for at in (sde.cutoff, 0.1, 1.0):
        for method in ("__call__", "noise", "denoise"):
            ours, theirs = getattr(score, method)(u, at), getattr(truth, method)(u, at)
            assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max())), (at, method)


def test_parametrisations_that_make_no_sense_are_refused():
    sde = catalog.CriticallyDampedLangevin()
    for predicts in ("v", "velocity"):
        with pytest.raises(ValueError, match=predicts):
            sdeflow.Score(lambda x, t: x, sde, predicts=predicts)


@pytest.mark.parametrize("name", ["critically damped", "underdamped"])
def test_flow_density_against_the_exact_mixture(name):
    sde = COUPLED[name]()
    exact = ring(sde)
    u = sde.kernel.sample(exact.sample(40, seed=0, dtype=torch.float64), sde.cutoff, seed=1)
    ours = sde.flow_ode(exact).log_prob(u, rtol=1e-6, atol=1e-6)
    error = ours - exact.log_prob(u, sde.cutoff)
    # What is left is the prior's mismatch: a ring seen through e^{-..} at T is not quite Gaussian.
    prior = sde.flow_ode(exact).prior
    far = sde.kernel.sample(exact.sample(4000, seed=2, dtype=torch.float64), sde.T, seed=3)
    mismatch = (prior.log_prob(far) - exact.log_prob(far, sde.T)).abs().max()
    assert error.abs().max() < 2e-3 + mismatch


def test_samples_of_flow_and_reverse_sde_are_the_data():
    sde = catalog.CriticallyDampedLangevin()
    exact = ring(sde)
    truth = sde.kernel.sample(exact.sample(4000, seed=0, dtype=torch.float64), sde.cutoff, seed=1)
    for samples in (
        sde.flow_ode(exact).sample((2000, 2, 2), seed=0, dtype=torch.float64, rtol=1e-4, atol=1e-4),
        sde.reverse(exact).sample((2000, 2, 2), seed=0, dtype=torch.float64, steps=400),
    ):
        for component in range(2):
            a, b = samples[:, component], truth[:, component]
            scale = b.std(0)
            assert ((a.mean(0) - b.mean(0)) / scale).abs().max() < 4 * math.sqrt(1 / 2000 + 1 / 4000)
            # Var of a variance: (kurtosis - 1) / n <= 2 / n for these.
            assert ((a.var(0) - b.var(0)) / scale**2).abs().max() < 4 * math.sqrt(2 / 2000 + 2 / 4000) + 0.02


def test_data_log_prob_is_a_bound_that_is_nearly_tight():
    sde = catalog.CriticallyDampedLangevin()
    exact = ring(sde)
    data = exact.sample(30, seed=0, dtype=torch.float64)[:, 0]
    bound = sde.flow_ode(exact).data_log_prob(data, samples=8, seed=0, full=True, rtol=1e-4, atol=1e-4)
    phi, root, _ = sde.kernel.coefficients(torch.tensor(sde.cutoff, dtype=torch.float64))
    # The data component at the cutoff: x = Φ_xx x_0 + N(0, P_xx).
    means = exact.means.reshape(8, 2, 2)[:, 0] * phi[0, 0]
    spread = phi[0, 0] ** 2 * 0.01 + root[0, 0] ** 2
    log_p = torch.distributions.Normal(means, spread.sqrt()).log_prob(data[:, None]).sum(2)
    truth = torch.logsumexp(log_p, 1) - math.log(8)
    gap = truth - bound.value
    assert gap.mean() > -3 * bound.stderr.mean() / math.sqrt(30) - 2e-3
    assert gap.abs().max() < 0.05 + 4 * bound.stderr.max()


def test_lift_draws_auxiliary_components_from_P0():
    sde = catalog.CriticallyDampedLangevin(gamma=0.04, mass=0.25)
    data = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    u = sde.lift(data, seed=0)
    assert u.shape == (20_000, 2, 3) and torch.equal(u[:, 0], data)
    assert abs(float(u[:, 1].var()) / 0.01 - 1) < 4 * math.sqrt(2 / 60_000)
    assert torch.equal(u, sde.lift(data, seed=0)) and torch.equal(u[:5], sde.lift(data[:5], seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["critically damped", "not commuting"])
def test_training_takes_coupled_states(name):
    sde = COUPLED[name]()
    data = torch.randn(256, 2, generator=torch.Generator().manual_seed(0)).sign()  # far from a Gaussian
    data = data if sde.declaration.auxiliary else data[:, :, None].expand(-1, -1, 3)
    width = 4 if sde.declaration.auxiliary else 6
    torch.manual_seed(0)
    score = sdeflow.Score(MLP(width, 64), sde)
    untrained = copy.deepcopy(score)
    sdeflow.fit(score, data, 150, batch_size=128, seed=0, lr=3e-3)
    before, after = (  # of the same batches, times and noise, so that their difference varies little
        torch.tensor(sdeflow.fit(one, data, 30, batch_size=128, seed=1, lr=1e-12).losses) for one in (untrained, score)
    )
    gain = before - after
    assert float(gain.mean()) > 4.0 * float(gain.std()) / math.sqrt(len(gain))
    shape = (4, 2, 2) if sde.declaration.auxiliary else (4, 2, 3)
    assert torch.isfinite(sde.reverse(score).sample(shape, steps=20, seed=0)).all()
    assert torch.isfinite(sde.flow_ode(score).log_prob(torch.zeros(shape), steps=10)).all()


def test_prior_is_read_off_a_plain_score():
    sde = catalog.CriticallyDampedLangevin()
    exact = GaussianMixture(sde, torch.full((1, 2), 0.5), torch.tensor([0.3]))
    flow = sde.flow_ode(lambda u, time: exact(u, time))
    flow.log_prob(torch.zeros(2, 2, 2, dtype=torch.float64), steps=10)
    read, known = flow.prior, sde.flow_ode(exact).prior
    assert torch.allclose(read.mean, known.mean, atol=1e-6)
    assert torch.allclose(read.root.values, known.root.values, atol=1e-6)


def test_noise_matrices_reach_every_torchsde_method():
    """A noise that mixes components: the covariance of the reverse SDE's samples, by every method that takes it."""
    sde = COUPLED["noise matrix"]()
    truth = GaussianMixture(sde, torch.zeros(1, 2, 1), torch.tensor([0.2], dtype=torch.float64))
    root = sde.kernel.marginal(0.0, math.sqrt(0.2), sde.cutoff).root.values
    expected = (root @ root.mT).squeeze()
    for method in ("euler", "milstein", "srk", "heun", "midpoint", "euler_heun"):
        samples = sde.reverse(truth).sample((4000, 2, 1), solver=method, steps=200, seed=0, dtype=torch.float64)
        found = torch.cov(samples[:, :, 0].T)
        assert (found - expected).abs().max() < (4 * math.sqrt(2 / 4000) + 0.03) * expected.max(), method


def test_velocity_in_the_flow_is_the_equation():
    """The compiled drift is F u - ½ g gᵀ s, with components coupled."""
    sde = COUPLED["offset"]()
    flow = sde.flow_ode(lambda u, time: -u)
    u = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drift = flow.model.drift(flow.equation)(u, torch.tensor(0.3, dtype=torch.float64), -u)
    F = torch.tensor([[0.0, 1.0], [-1.0, -2.0]], dtype=torch.float64)
    Q = torch.diag(torch.tensor([0.01, 1.0], dtype=torch.float64))
    assert torch.allclose(drift, torch.einsum("ij,bjn->bin", F + 0.5 * Q, u))


def test_declarations_that_mix_states_are_refused():
    x_, v = state("x v")
    a, *_ = state("a b c")
    cases = [
        (lambda: SDE(f=[v, -x], g=[0, 1]), "beside the state"),
        (lambda: SDE(f=[v, -a], g=[0, 1]), "mix"),
        (lambda: SDE(f=[v, -x_, 0], g=[0, 1]), "f must have 2 components"),
        (lambda: SDE(f=[v, -x_], g=[0, 1, 2]), "g must be a list of 2"),
        (lambda: SDE(f=[v, -x_], g=1), "g must be a list of 2"),
        (lambda: SDE(f=v, g=[0, 1]), "f must have 2 components"),
        (lambda: SDE(f=[v, -x_], g=[[0], [1, 2]]), "one length"),
        (lambda: SDE(f=["v", "-x"], g=[0, 1]), 'state=\\("x", "v"\\)'),
        (lambda: SDE(f=[v, -x_], g=[0, 1], P0=[1, 2, 3]), "P0 must be"),
        (lambda: SDE(f=[v, -x_], g=[0, 1], P0=[[1, 2], [2, 1]]), "P0 is a covariance"),
        (lambda: SDE(f=[v, -x_], g=[0, 1], params={"v": 1}), "is the state"),
    ]
    for declare, message in cases:
        with pytest.raises(DeclarationError, match=message):
            declare()
    with pytest.raises(ScheduleError, match="no noise"):
        SDE(f=[v, -x_], g=[0, 0])
    with pytest.raises(ScheduleError, match="never reaches"):
        SDE(f=[-x_, -v], g=[1, 0], cutoff=0.1)
    assert SDE(f=["v", "-x - 2*v"], g=[0, 1], state=("x", "v")).declaration == SDE([v, -x_ - 2 * v], [0, 1]).declaration
    assert state("x v")[0] != x and state("x v")[0] != state("x w")[0] and state("x v") == (x_, v)


def test_components_are_ordered_by_the_state_and_never_by_name():
    z, a = state("z a")
    sde = SDE(f=[a, -z - 2 * a], g=[0, 1])
    assert sde.declaration.state == (z, a)
    F, _ = sde.declaration.affine
    assert sp.ImmutableMatrix([[0, 1], [-1, -2]]) == F


def test_a_state_of_the_wrong_shape_is_told_its_components():
    sde = catalog.CriticallyDampedLangevin()
    with pytest.raises(DataError, match=r"components x, v.*lift"):
        sde.kernel.sample(torch.zeros(4, 3), 0.5)
    with pytest.raises(DataError, match="components"):
        sde.flow_ode(lambda u, time: -u).sample((4, 3))


@pytest.mark.parametrize("coupled", [True, False])
def test_linear_maps_obey_their_algebra(coupled):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 5, 1, 3, 3) if coupled else (2, 5, 3, 1)
    a, b = (maps_of(coupled)(torch.randn(*shape, dtype=torch.float64, generator=generator) + 2) for _ in range(2))
    x_ = torch.randn(5, 3, 4, dtype=torch.float64, generator=generator)
    a, b = (m.of(m.values[0]) for m in (a, b))
    assert torch.allclose((a @ b)(x_), a(b(x_)))
    assert torch.allclose(a.inverse(a(x_)), x_)
    root = a.root_of_one_plus_gram
    assert torch.allclose(root.gram(x_), x_ + a.gram(x_))
    dense = torch.autograd.functional.jacobian(lambda v: a(v), x_)[0, :, :, 0].reshape(12, 12)
    assert torch.allclose(torch.linalg.slogdet(dense)[1], a.log_det((3, 4))[0])
    assert torch.allclose(dense.trace(), a.trace((3, 4))[0])
    y = torch.randn(5, 3, 4, dtype=torch.float64, generator=generator)
    assert torch.allclose((a(x_) * y).sum(), (x_ * a.T(y)).sum())


def test_a_mistake_in_the_kernel_is_seen_by_the_moment_ode():
    """The check itself can fail: half a per cent on one entry of F."""
    sde = COUPLED["critically damped"]()
    x_, v = state("x v")
    wrong = SDE(f=[16 * v, -16 * v - sp.Float(4.02) * x_], g=[0, sp.sqrt(8)], P0=[0, 0.01])
    phi, _, _ = wrong.kernel.coefficients(torch.tensor(0.5, dtype=torch.float64))
    assert np.abs(phi.numpy() - moment_ode(sde, 0.5)[0]).max() > 1e-4


def test_the_first_noise_of_coupled_states_is_resolved():
    """The factor of P grows like a square root from t = 0, while the components turn: it was off by 4e-9."""
    sde = declarations.coupled(131)[1]()
    times = np.linspace(0.0075, 0.0295, 40)
    P = Oracle(sde.declaration, {}, 1e-6).law(times).cov[:, 0]
    _, root, _ = sde.kernel.coefficients(torch.tensor(times))
    assert np.abs((root @ root.mT).numpy() / P - 1).max() < 1e-10


def test_coupled_runs_are_stored_and_resumed(tmp_path):
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    weights = []
    for steps in ((6,), (3, 6)):
        for done, until in enumerate(steps):
            torch.manual_seed(0)
            score = sdeflow.Score(MLP(4, 8), catalog.CriticallyDampedLangevin())
            folder = tmp_path / str(len(steps))
            sdeflow.fit(
                score, data, until, 16, seed=0, out=folder, resume=done > 0, schedule="constant", checkpoint_every=3
            )
        weights.append(torch.cat([p.flatten() for p in score.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("event", [(2,), (3,), (1, 4, 4)])
def test_moments_of_the_data_broadcast_to_the_data_s_event(event):
    sde = catalog.CriticallyDampedLangevin(T=2)
    mean = torch.linspace(-2, 2, event[-1]).expand(event) if len(event) == 1 else torch.ones(event)
    score = sdeflow.Score(lambda z, time: torch.zeros_like(z), sde, data_mean=mean, data_std=0.5)
    samples = sde.flow_ode(score).sample((2000, 2, *event), seed=0)
    assert (samples[:, 0].mean(0) - mean).abs().max() < 4 * 0.5 / math.sqrt(2000) + 1e-2
    assert sde.prior_for(mean, torch.full(event, 0.5)).mean.shape == (2, *event)


def test_labels_and_bits_of_the_data_component():
    sde = catalog.CriticallyDampedLangevin()
    net = sdeflow.nets.UNet(2, width=8, classes=3)
    score = sdeflow.Score(net, sde, data_mean=0.0, data_std=0.5)
    data = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"samples": 2, "steps": 6, "probes": 2, "seed": 0, "warn_above": 1e9}
    flow = sde.flow_ode(score.given(torch.tensor([0, 1])))
    assert flow.data_log_prob(data, **options).shape == (2,)
    images = torch.randint(0, 16, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    bits = flow.bits_per_dim(images, levels=16, low=-1.0, high=1.0, **options)
    assert bits.shape == (2,) and torch.isfinite(bits).all()
