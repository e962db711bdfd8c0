"""Mistakes planted in copies of the package, one at a time: which of them do certificates and tests find?

    python tests/mutations.py                 every mutation; prints a line for each and the share that is found
    python tests/mutations.py bridge edm      those whose name or file holds one of the words
    python tests/mutations.py --list          what there is

Each entry replaces a piece of text that stands exactly once in its file. First ``verify()`` runs over a few small SDEs,
in order, until a certificate fails; where none does, the tests named run until one fails. A mutation that both leave
standing is a survivor, and needs a test, or a reason (``hidden``) why no user sees it. The copy is made in a temporary
folder, and each mutation runs in a process of its own that is forked from one in which torch and SymPy are loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # of process time that a mutation may take


class Mutation(NamedTuple):
    """``old`` in ``file`` becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    sdes: tuple[str, ...] = ()  # over which verify() runs
    tests: tuple[str, ...] = ()  # arguments of pytest
    hidden: str = ""  # why no user sees it


ELEMENTWISE = ("initial variance", "offset", "quadrature")
COUPLED = ("turning", "noise matrix", "not commuting")
ALL = (*ELEMENTWISE, *COUPLED)


def sdes() -> dict:
    """Small SDEs whose certificates visit every formula."""
    import sympy as sp
    import torch

    from sdeflow import SDE, catalog, t, x

    R, k = sp.Rational, sp.Symbol("k")
    return {
        "initial variance": lambda: SDE(-x, sp.sqrt(2 * t), P0=0.3),
        "offset": lambda: SDE(2 * (3 - x), R(1, 2), T=2),
        "quadrature": lambda: SDE(-(1 + sp.sin(3 * t) ** 2) * x + sp.cos(t), sp.sqrt(1 + sp.cos(t)), P0=0.2),
        "tensor": lambda: SDE(-k * x + t, sp.sqrt(k), params={k: torch.linspace(0.5, 3, 6).reshape(2, 3)}),
        "turning": lambda: SDE(
            lambda a, v, t: [v + 1, -a - 2 * v], [R(1, 10), 1], P0=[[1, R(1, 4)], [R(1, 4), R(1, 2)]], T=2,
            state=("a", "v"),
        ),
        "noise matrix": lambda: SDE(
            lambda a, v, t: [-a + v, -v + 1], [[1, R(1, 2), 0], [R(1, 2), 1, t]], state=("a", "v")
        ),
        "not commuting": lambda: SDE(
            lambda a, v, t: [(1 + t) * v - t * a, -a - 2 * v + sp.cos(t)], [[R(1, 10), 0, t], [0, 1, R(1, 2)]],
            P0=[[R(1, 2), R(1, 5)], [R(1, 5), R(1, 3)]], state=("a", "v"),
        ),
        "Langevin": catalog.CriticallyDampedLangevin,
        "geometric": lambda: SDE(x / 10, x / 2),
        "folds": lambda: SDE(R(1, 16) - x, sp.sqrt(x) / 2),
        "CIR": lambda: SDE(R(6, 5) * (R(7, 10) - x), R(4, 5) * sp.sqrt(x)),
        "CIR of dimension 60": lambda: SDE(30 - x, sp.sqrt(2 * x), T=2),
        "Jacobi": lambda: SDE(R(6, 5) * (R(7, 10) - x), R(4, 5) * sp.sqrt(x * (1 - x))),
        "VP": catalog.VP,
    }  # fmt: skip


def _m(*args: object, **options: object) -> Mutation:
    return Mutation(*args, **options)


MUTATIONS = (
    # -------------------------------------------------------------------- formulas by SymPy
    _m("mean reversion", "symbolic/moments.py", "return level * (1 - alpha), ", "return level * (1 + alpha), ",
       ("offset",), ("tests/test_antiderivative.py", "tests/test_derivation.py", "tests/test_kernel.py")),
    _m("P0 alpha", "symbolic/moments.py", "level + (P0 - level) * alpha**2, rule", "level + (P0 - level) * alpha, rule",
       ("initial variance",), ("tests/test_antiderivative.py", "tests/test_kernel.py", "tests/test_derivation.py")),
    _m("P0 alpha under an integral", "symbolic/moments.py", "var = P0 * alpha**2 + sp.Integral(",
       "var = P0 * alpha + sp.Integral(", ("quadrature",)),
    _m("exp of half the integral", "symbolic/moments.py", "sp.exp(2 * since)", "sp.exp(since)", ("quadrature",)),
    _m("alpha for alpha² before the integral", "symbolic/moments.py", "_tidy(alpha**2 * (P0 + integral))",
       "_tidy(alpha * (P0 + integral))", (),
       ("tests/test_antiderivative.py", "tests/test_kernel.py", "tests/test_derivation.py")),
    _m("the power of alpha", "symbolic/moments.py", "return power + P0 * alpha**2, ", "return power - P0 * alpha**2, ",
       (),
       ("tests/test_antiderivative.py", "tests/test_kernel.py", "tests/test_derivation.py", "tests/test_faults.py"), ),
    _m("antiderivative of sin", "symbolic/antiderivative.py", "sp.sin: lambda u: -sp.cos(u)",
       "sp.sin: lambda u: sp.cos(u)", (),
       ("tests/test_antiderivative.py", "tests/test_kernel.py", "tests/test_derivation.py")),
    _m("antiderivative by parts", "symbolic/antiderivative.py", "sign, derivative = -sign, sp.diff(derivative, t)",
       "sign, derivative = sign, sp.diff(derivative, t)", (),
       ("tests/test_antiderivative.py", "tests/test_kernel.py", "tests/test_derivation.py")),
    _m("Phi S Phi", "symbolic/coupled.py", "(S - phi * (S - P0) * phi.T)", "(S - phi * (S - P0) * phi)",
       ("turning",), ("tests/test_coupled.py",)),
    _m("Phi Q Phi", "symbolic/coupled.py", "since * Q.subs(t, u) * since.T", "since * Q.subs(t, u) * since",
       ("not commuting",)),
    _m("Phi P0 Phi", "symbolic/coupled.py", "phi * P0 * phi.T + noise", "phi * P0 * phi + noise", ("not commuting",)),
    _m("Cholesky's pivot", "symbolic/coupled.py", "rest / L[j, j]", "rest / L[i, i]", ("noise matrix",),
       ("tests/test_coupled.py",)),
    _m("share of the reverse SDE", "symbolic/equations.py", "sp.Integer(1)), declaration.g",
       "sp.Rational(1, 2)), declaration.g", ("offset",)),
    _m("share of the flow", "symbolic/equations.py", "sp.Rational(1, 2)), sp.Integer(0)",
       "sp.Rational(1, 3)), sp.Integer(0)", ("offset",)),
    _m("divergence", "symbolic/equations.py", "[derivative(gram[i, j], state[j]) +",
       "[2 * derivative(gram[i, j], state[j]) +",
       ("geometric",)),
    _m("Itô's term of a change of state", "symbolic/lamperti.py", "sp.diff(slope, line) / slope / 2",
       "sp.diff(slope, line) / slope", ("geometric", "folds")),
    _m("mean of a lognormal", "symbolic/lamperti.py", "sp.exp(line_mean + line_var / 2)",
       "sp.exp(line_mean + line_var)",
       ("geometric",)),
    _m("variance of a lognormal", "symbolic/lamperti.py", "sp.exp(2 * line_mean + line_var)",
       "sp.exp(2 * line_mean + 2 * line_var)", ("geometric",)),
    _m("variance of a square root process", "symbolic/pearson.py", "2 * spread * (2 * u_0 + delta * spread)",
       "2 * spread * (u_0 + delta * spread)", ("CIR",)),
    _m("dimension of a square root process", "symbolic/pearson.py", "_constant(4 * (a * origin + b) / slope)",
       "_constant(2 * (a * origin + b) / slope)", ("CIR",)),
    _m("A of a Jacobi process", "symbolic/pearson.py", "_constant(2 * (a * p + b) / (length * s))",
       "_constant((a * p + b) / (length * s))", ("Jacobi",)),
    # -------------------------------------------------------------------- moments as numbers
    _m("noise of a panel", "quadrature.py", "growth.square() * own_v", "growth * own_v",
       ("quadrature",)),
    _m("offset across panels", "quadrature.py", "m + torch.exp(A) * m0", "m + m0", ("quadrature",)),
    _m("G N G", "quadrature.py", "N + G @ N0 @ G.mT", "N + G @ N0 @ G", ("turning",)),
    _m("push of a panel", "quadrature.py", "integral(inverse @ b[..., None])", "integral(phi @ b[..., None])",
       ("turning",)),
    _m("rate of the log-SNR", "coefficients.py", "-0.5 * self.of_sde(t)[2] / std.square()",
       "-self.of_sde(t)[2] / std.square()", ("offset",)),
    _m("rate of the information", "coefficients.py", "0.5 * rate / information", "rate / information",
       ("noise matrix",)),
    _m("P⁻¹ in the information", "coefficients.py", "solve_triangular(root.mT, whitened, upper=True)",
       "solve_triangular(root, whitened, upper=False)", ("noise matrix",)),
    # -------------------------------------------------------------------- the Gaussian kernel
    _m("offset of a transition", "kernel.py", "later.offset - alpha.values * earlier.offset", "later.offset",
       ("offset",)),
    _m("noise of a transition", "kernel.py", "kept = 2.0 * (change", "kept = (change", ("initial variance",)),
    _m("score without transpose", "kernel.py", "-path.sigma.T.inverse(whitened)", "-path.sigma.inverse(whitened)",
       ("noise matrix",)),
    _m("constant of a density", "kernel.py", "0.5 * d * math.log(2.0 * math.pi)", "d * math.log(2.0 * math.pi)",
       ("offset",)),
    _m("log-SNR that is shown", "kernel.py", "2 * self._shown.log_alpha - sp.log(self.var)",
       "self._shown.log_alpha - sp.log(self.var)", ("offset",)),
    _m("information that is shown", "symbolic/coupled.py",
        "(column.T * covariance.adjugate() * column)",
        "(column.T * covariance * column)", ("noise matrix",)),
    _m("mean that is shown", "kernel.py", "self.alpha * data[0] + self.offset", "self.alpha * data[0] - self.offset",
       ("offset",)),
    _m("root of a marginal", "kernel.py", "path.sigma @ spread.root_of_one_plus_gram", "path.sigma", ("offset",)),
    _m("lift", "kernel.py", "state[:, self.numbers.data[0]] += data", "state[:, self.numbers.data[0]] -= data",
       ("Langevin",)),
    _m("A Aᵀ in a root", "linear.py", "one + self.values @ self.values.mT", "one + self.values.mT @ self.values",
       ("noise matrix",)),
    _m("mean of a prior's draws", "gaussian.py", "self._level(noise) + self._moved(noise.device)(noise)",
       "self._moved(noise.device)(noise)", ("offset",)),
    _m("constant of a Gaussian", "gaussian.py", "- log_det - 0.5 * d", "- log_det - d",
       (), ("tests/test_likelihood.py", "tests/test_density.py")),
    # -------------------------------------------------------------------- bridges
    _m("transpose of a bridge's gain", "bridge.py", "now.sigma(W.T(surprise))", "now.sigma(W(surprise))",
       ("noise matrix",)),
    _m("offset in a bridge's surprise", "bridge.py", "whole.alpha(start) - whole.offset)", "whole.alpha(start))",
       ("offset",)),
    _m("transpose of a bridge's noise", "bridge.py", "V.T.root_of_one_plus_gram.T.inverse",
       "V.T.root_of_one_plus_gram.inverse", ("noise matrix",)),
    _m("transpose in a bridge's drift", "bridge.py", "declaration.gram * across.T * inverse",
       "declaration.gram * across * inverse", ("noise matrix",)),
    _m("offset in a bridge's drift", "bridge.py", "across * (x - m)", "across * x", ("noise matrix",)),
    _m("rest of a bridge's drift", "bridge.py", "across * P * across.T", "across * P * across", ("noise matrix",)),
    _m("a bridge's steps from known states", "bridge.py", "s, exactly = t, True", "s, exactly = t, False",
       ("initial variance",), ("tests/test_kernel.py", "-k", "bridge")),
    # -------------------------------------------------------------------- kernels of a state
    _m("score of the line", "reducible.py", "score.to(torch.float64) * slope + curvature",
       "score.to(torch.float64) * slope - curvature", ("geometric",)),
    _m("tanh of the fold", "reducible.py", "torch.tanh(line * mean / var)", "torch.tanh(2.0 * line * mean / var)",
       ("folds",)),
    _m("branches of the fold", "reducible.py", "softplus(-2.0 * line", "softplus(-1.0 * line", ("folds",)),
    _m("curvature of the map", "reducible.py", "((mean - line) / var - curvature)", "((mean - line) / var + curvature)",
       ("geometric",)),
    _m("constant of Debye's expansion", "noncentral.py", "- 0.5 * torch.log(8.0 * math.pi * z)",
       "- 0.5 * torch.log(4.0 * math.pi * z)", ("CIR of dimension 60",)),
    _m("sign of 1/r in Debye's expansion", "noncentral.py", "-a * n / 2 - 5 * a / (8 * (n + 3))",
       "-a * n / 2 + 5 * a / (8 * (n + 3))", ("CIR of dimension 60",)),
    _m("slope of Debye's expansion", "noncentral.py", "(rate / value - 0.5 / z)", "(rate / value + 0.5 / z)",
       ("CIR of dimension 60",)),
    _m("power series of Bessel's function", "noncentral.py", "(y / (k * (nu + k)))",
       "(y / (k * (nu + k + 1)))", ("CIR",)),
    _m("draws of CIR", "square_root.py", "count = _poisson(as_array(level), as_array(0.5 * noncentrality",
       "count = _poisson(as_array(level), as_array(noncentrality", ("CIR",)),
    _m("draws of CIR far from 0", "square_root.py", "0.5 * (delta - 1.0).clamp_min(1e-3)",
       "0.5 * (delta - 2.0).clamp_min(1e-3)", (), ("tests/test_square_root.py",)),
    _m("eigenvalues of Jacobi", "jacobi.py", "eigenvalue = (n + 1) * (n + A + B) / 2",
       "eigenvalue = (n + 1) * (n + A + B + 1) / 2", ("Jacobi",)),
    # -------------------------------------------------------------------- scores and losses
    _m("variance of a mixture", "scores/mixture.py", "alpha.square() * self.variances + sigma.square()",
       "alpha * self.variances + sigma.square()", ("offset",)),
    _m("gradient of a mixture", "scores/mixture.py", "gradient = -deviation / variance",
       "gradient = -deviation / variance.sqrt()", ("offset",)),
    _m("noise to data", "scores/network.py", "path.alpha.inverse(centred - path.sigma(eps))",
       "path.alpha.inverse(centred + path.sigma(eps))", (), ("tests/test_scores.py",)),
    _m("Tweedie's sign", "scores/function.py", "centred + path.sigma.gram(", "centred - path.sigma.gram(",
       (), ("tests/test_scores.py",)),
    _m("noise of a coupled score", "scores/function.py", "-path.sigma.T(kernel.to_basis(self(x, t)))",
       "-path.sigma(kernel.to_basis(self(x, t)))", (), ("tests/test_coupled.py", "tests/test_exponential.py")),
    _m("likelihood weighting", "weightings.py", "whiten @ kernel.equation(x, t)[2] @ whiten.T",
       "whiten @ kernel.equation(x, t)[2] @ whiten", (), ("tests/test_weightings.py", "tests/test_coupled.py")),
    _m("half of the likelihood weighting", "weightings.py", '0.5 if weighting == "likelihood" else 1.0',
       '1.0 if weighting == "likelihood" else 1.0', (), ("tests/test_weightings.py",)),
    _m("min-SNR", "weightings.py", "torch.exp(-2.0 * kernel.half_log_snr(t))).clamp_max",
       "torch.exp(-kernel.half_log_snr(t))).clamp_max", (), ("tests/test_weightings.py",)),
    _m("EDM's weight", "weightings.py", "(1.0 + (2.0 * log_zeta).exp() / data_std**2)",
       "(1.0 + (2.0 * log_zeta).exp() / data_std)", (), ("tests/test_weightings.py",)),
    _m("root of a loss", "losses.py", "root.T(score(x_t, t, y) - target)", "root(score(x_t, t, y) - target)",
       (), ("tests/test_simulation.py",)),
    _m("target of a local step", "simulation.py", "target = -root.T.inverse(eps)", "target = -root.inverse(eps)",
       (), ("tests/test_simulation.py",)),
    # -------------------------------------------------------------------- solvers
    _m("churn over N + 1", "solvers/edm.py", "self.S_churn / len(begins)", "self.S_churn / (len(begins) + 1)",
       (), ("tests/test_presets.py", "-k", "churn")),
    _m("Heun of EDM", "solvers/edm.py", "0.5 * (first + second)", "first", (),
       ("tests/test_samplers.py", "-k", "edm or heun")),
    _m("Heun", "solvers/euler.py", "y + 0.5 * (slope + ahead)", "y + slope", (), ("tests/test_solvers.py",)),
    _m("width of Langevin's noise", "solvers/langevin.py", "math.sqrt(2.0 * step), x.dtype",
       "math.sqrt(step), x.dtype", (), ("tests/test_samplers.py",)),
    _m("the step of an snr", "solvers/langevin.py", "(2.0 * kept * self.snr**2 * ratio)",
       "(kept * self.snr**2 * ratio)",
       (), ("tests/test_samplers.py",)),
    _m("NCSNv2's excess", "solvers/langevin.py", "(1.0 - left) * e / (2.0 - e)", "(1.0 - left) * e / (1.0 - e)",
       (), ("tests/test_samplers.py",)),
    _m("weights of a multistep method", "solvers/weights.py", "moments[:, 2] + back * moments[:, 1]",
       "moments[:, 2] - back * moments[:, 1]", (), ("tests/test_presets.py", "tests/test_exponential.py")),
    _m("noise of an exponential step", "solvers/weights.py", "(measure * 2.0 * (one - 1.0)", "(measure * (one - 1.0)",
       (), ("tests/test_exponential.py",)),
    _m("force of a coupled step", "solvers/weights.py", "force = 0.5 * (1.0 + panels.spread)",
       "force = (1.0 + panels.spread)", (), ("tests/test_exponential.py", "tests/test_coupled.py")),
    _m("eta of DDIM", "solvers/exponential.py", "kept = -0.5 * np.log1p(", "kept = -np.log1p(", (),
       ("tests/test_exponential.py", "tests/test_presets.py")),
    _m("flow in a restart", "solvers/restart.py", "q.scaled(0.5)(problem.score(u, t))", "q(problem.score(u, t))",
       (), ("tests/test_presets.py", "-k", "estart")),
    _m("denoised by a solver", "solvers/problem.py", "alpha.inverse(u + sigma.gram(self.score(u, t)))",
       "alpha.inverse(u - sigma.gram(self.score(u, t)))", (), ("tests/test_sampling.py", "-k", "denois")),
    _m("thresholded score", "thresholding.py", "(sigma.T.inverse @ sigma.inverse @ alpha)(change)",
       "(sigma.T.inverse @ sigma.inverse)(change)", (), ("tests/test_sampling.py", "-k", "thresh")),
    # -------------------------------------------------------------------- likelihoods
    _m("reference's growth", "reference.py", "return last - first", "return first - last", (),
       ("tests/test_likelihood.py",)),
    _m("known part of the integral", "likelihood/nodes.py", "reference_growth(model, x[:1].detach()) + integrand.known",
       "reference_growth(model, x[:1].detach()) - integrand.known", (), ("tests/test_density.py",)),
    _m("half of the divergence", "likelihood/continuous.py", "change, spread = -0.5 * (divergence + known)",
       "change, spread = -1.0 * (divergence + known)", (), ("tests/test_likelihood.py",)),
    _m("extrapolation to the data", "likelihood/budget.py", "return first + half, ", "return first - half, ",
       (), ("tests/test_budget.py",)),
    _m("normaliser of the auxiliary part", "likelihood/measure.py", "0.5 * level[0].numel() * math.log(2.0 * math.pi)",
       "level[0].numel() * math.log(2.0 * math.pi)", (),
       ("tests/test_coupled.py", "tests/test_budget.py", "tests/test_likelihood.py")),
    _m("deflation of Hutch++", "traces.py", "math.sqrt(self.d - self._rank)", "math.sqrt(self.d)", (),
       ("tests/test_traces.py",)),
    _m("the decoder's variance in the ELBO", "bounds.py", "return value, excess.var(0) / draws",
       "return value, excess.var(0)", (), ("tests/test_bounds.py",)),
    _m("the prior's variance in the ELBO", "bounds.py", "gain.var(0) / len(gain)", "gain.var(0)", (),
       ("tests/test_bounds.py",)),
    _m("½ of the ELBO", "bounds.py", "(0.5 * self.rate * (a * self.metric(b))", "(self.rate * (a * self.metric(b))",
       (), ("tests/test_bounds.py",)),
    _m("mass of a truncated normal", "dequantisation.py", "- tau * density - math.log(2.0 * tau)",
       "+ tau * density - math.log(2.0 * tau)", (), ("tests/test_dequantisation.py",)),
    _m("density of a learned dequantisation", "dequantisation.py", "- log_std + softplus(-z) + softplus(z)",
       "+ log_std + softplus(-z) + softplus(z)", (), ("tests/test_dequantisation.py",)),
    _m("mean of importance weights", "dequantisation.py", "torch.logsumexp(log_w, dim=0) - math.log(draws)",
       "torch.logsumexp(log_w, dim=0)", (), ("tests/test_dequantisation.py",)),
    # -------------------------------------------------------------------- priors, latents
    _m("potential of a stationary law", "priors.py", "return 2.0 * f / g**2 * dx", "return f / g**2 * dx", (),
       ("tests/test_simulation.py",)),
    _m("density of a stationary law", "priors.py", "- 2.0 * np.log(np.abs(self.g))", "- np.log(np.abs(self.g))",
       (), ("tests/test_simulation.py",)),
    _m("spherical interpolation", "latents.py", "(tau * angle).sin() / sine", "tau", (), ("tests/test_latents.py",)),
)  # fmt: skip


def misplaced(root: Path = ROOT) -> list[str]:
    """The mutations whose text does not stand exactly once in its file."""
    wrong = []
    for mutation in MUTATIONS:
        path = root / "sdeflow" / mutation.file
        count = path.read_text().count(mutation.old) if path.exists() else 0
        if count != 1:
            wrong.append(f"{mutation.name}: {mutation.old!r} stands {count} times in {mutation.file}")
    return wrong


# -------------------------------------------------------------------- one mutation


def _verified(names: tuple[str, ...]) -> str:
    """The first SDE whose certificate fails, or cannot be made, with what fails."""
    import sdeflow.certificate.bridge
    import sdeflow.kernel

    if hasattr(sdeflow.kernel, "integrate_within"):
        sdeflow.kernel.integrate_within = lambda *args, **options: None  # integrals stay: no seconds of SymPy
    sdeflow.certificate.bridge._SECONDS = 60.0  # however busy the machine is
    warnings.simplefilter("ignore")
    made = sdes()
    for name in names:
        try:
            certificate = made[name]().verify()
        except Exception as error:  # a mistake may well break what it is in
            return f"{name}: {type(error).__name__}"
        if not certificate:
            return f"{name}: {certificate.failures[0].name}"
    return ""


def _tested(arguments: tuple[str, ...]) -> str:
    """The first test that fails."""
    import pytest

    class First:
        name = ""

        def pytest_runtest_logreport(self, report: object) -> None:
            if report.failed and not self.name:
                self.name = report.nodeid

    first = First()
    quiet = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=no", "--rootdir=."]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = pytest.main([*quiet, *arguments], plugins=[first])
    return first.name or ("" if code in (0, 5) else f"pytest ends with {int(code)}")


def _inside(mutation: Mutation | None, sdes_: tuple[str, ...], tests: tuple[str, ...], folder: Path, out: int) -> None:
    """What finds ``mutation`` in the copy at ``folder``, written to ``out``; runs in a process of its own."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    try:
        found = _verified(sdes_)
        answer = f"verify\t{found}" if found else ""
        if not answer and tests:
            found = _tested(tests)
            answer = f"tests\t{found}" if found else ""
    except BaseException:
        answer = "verify\t" + traceback.format_exc().splitlines()[-1]
    os.write(out, answer.encode())
    os._exit(0)


def _run(mutation: Mutation | None, sdes_: tuple[str, ...], tests: tuple[str, ...]) -> tuple[str, str, float]:
    """(who, where, seconds) for one mutation; who is "" where nothing finds it."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part in ("sdeflow", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutation is not None:
            path = folder / "sdeflow" / mutation.file
            text = path.read_text()
            if text.count(mutation.old) != 1:
                raise SystemExit(f"{mutation.name}: its text does not stand exactly once in {mutation.file}")
            path.write_text(text.replace(mutation.old, mutation.new))
        before, (read, write) = os.times(), os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            _inside(mutation, sdes_, tests, folder, write)
        os.close(write)
        answer = b""
        while part := os.read(read, 65536):
            answer += part
        os.close(read)
        _, status = os.waitpid(child, 0)
        after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    if status:
        return "verify", f"the process ends with {status} after {seconds:.0f} s", seconds
    who, _, where = answer.decode().partition("\t")
    return who, where, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names or files of the mutations to run; all by default")
    parser.add_argument("--list", action="store_true", help="print the mutations and end")
    parser.add_argument("--verify", action="store_true", help="run no tests, and nothing that verify() does not visit")
    parser.add_argument("--sound", action="store_true", help="check first that nothing fails without a mutation")
    chosen = parser.parse_args()
    if wrong := misplaced():
        raise SystemExit("\n".join(wrong))
    mutations = [m for m in MUTATIONS if not chosen.words or any(w in f"{m.name} {m.file}" for w in chosen.words)]
    if chosen.verify:
        mutations = [m._replace(tests=()) for m in mutations if m.sdes]
    if chosen.list:
        print("\n".join(f"{m.file:28s} {m.name}" for m in mutations))
        return
    import numpy, pytest, scipy.special, scipy.stats, sympy, torch  # noqa: E401, F401, I001  loaded once, forked often

    torch.set_num_threads(1)
    if chosen.sound:
        who, where, seconds = _run(None, tuple(dict.fromkeys(n for m in mutations for n in m.sdes)), ())
        print(f"without a mutation: {where or 'nothing fails'} ({seconds:.0f} s)", flush=True)
    found, seen = 0, 0
    started, survivors = time.time(), []
    for mutation in mutations:
        who, where, seconds = _run(mutation, mutation.sdes, mutation.tests)
        seen += not (mutation.hidden and not who)
        found += bool(who)
        if not who:
            survivors.append(mutation)
        print(f"{who or 'ALIVE':7s} {mutation.file:28s} {mutation.name:40s} {where} ({seconds:.0f} s)", flush=True)
    share, spent = 100 * found / max(seen, 1), time.time() - started
    print(f"\nfound: {found} of {seen} that a user sees ({share:.0f} %), in {spent:.0f} s")
    for mutation in survivors:
        print(f"alive: {mutation.file}: {mutation.name}. {mutation.hidden or 'A test is missing.'}")


if __name__ == "__main__":
    main()
