"""Mistakes planted in copies of the package, one at a time: which of them do certificates and tests find?

    python tests/mutations.py                 every mutation; prints a line for each and the share that is found
    python tests/mutations.py bridge edm      those whose name or file holds one of the words
    python tests/mutations.py --jobs 2        two at a time
    python tests/mutations.py --list          what there is

Each entry replaces a piece of text that stands exactly once in its file. First ``verify()`` runs over a few small SDEs,
in order, until a certificate fails; where none does, the tests named run until one fails. A mutation that both leave
standing is a survivor, and needs a test, or a reason (``hidden``) why no user sees it. The copy is made in a temporary
folder, and each mutation runs in a process of its own that is forked from one in which torch and SymPy are loaded.

At the end the certificates and tests that found something run once more on a copy without a mutation: what fails there
has found nothing. The last lines are the share that is found, the survivors with their reasons, and what could not be
judged, such as an entry whose text has gone. It ends with 1 where less than 95 % are found or something went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # of process time that a mutation may take
ENOUGH = 95.0  # per cent of the mutations that a user sees
_ANSWER = "found.json"


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
        "square root, of time": lambda: SDE((1 + t) * (R(2, 5) - x), sp.sqrt((1 + t) * x)),
        "CIR from above": lambda: SDE(R(1, 2) - x, R(3, 5) * sp.sqrt(2 - x)),
        "Jacobi": lambda: SDE(R(6, 5) * (R(7, 10) - x), R(4, 5) * sp.sqrt(x * (1 - x))),
        "Jacobi on [1, 3]": lambda: SDE(R(6, 5) * (R(9, 4) - x), R(4, 5) * sp.sqrt((x - 1) * (3 - x))),
        "VP": catalog.VP,
    }  # fmt: skip


def _m(*args: object, **options: object) -> Mutation:
    return Mutation(*args, **options)


MUTATIONS = (
    # -------------------------------------------------------------------- formulas by SymPy
    _m("mean reversion", "symbolic/moments.py", "return level * (1 - alpha), ", "return level * (1 + alpha), ",
       ("offset",), ("tests/symbolic/test_antiderivative.py", "tests/proof/test_derivation.py",
       "tests/kernels/test_kernel.py")),
    _m("P0 alpha", "symbolic/moments.py", "level + (P0 - level) * alpha**2, rule", "level + (P0 - level) * alpha, rule",
       ("initial variance",), ("tests/symbolic/test_antiderivative.py", "tests/kernels/test_kernel.py",
       "tests/proof/test_derivation.py")),
    _m("P0 alpha under an integral", "symbolic/moments.py", "var = P0 * alpha**2 + sp.Integral(",
       "var = P0 * alpha + sp.Integral(", ("quadrature",)),
    _m("exp of half the integral", "symbolic/moments.py", "sp.exp(2 * since)", "sp.exp(since)", ("quadrature",)),
    _m("alpha for alpha² before the integral", "symbolic/moments.py", "_tidy(alpha**2 * (P0 + integral))",
       "_tidy(alpha * (P0 + integral))", (),
       ("tests/symbolic/test_antiderivative.py", "tests/kernels/test_kernel.py", "tests/proof/test_derivation.py")),
    _m("the power of alpha", "symbolic/moments.py", "return power + P0 * alpha**2, ", "return power - P0 * alpha**2, ",
       (),
       ("tests/symbolic/test_antiderivative.py", "tests/kernels/test_kernel.py", "tests/proof/test_derivation.py",
       "tests/test_faults.py"), ),
    _m("antiderivative of sin", "symbolic/antiderivative.py", "sp.sin: lambda u: -sp.cos(u)",
       "sp.sin: lambda u: sp.cos(u)", (),
       ("tests/symbolic/test_antiderivative.py", "tests/kernels/test_kernel.py", "tests/proof/test_derivation.py")),
    _m("antiderivative by parts", "symbolic/antiderivative.py", "sign, derivative = -sign, sp.diff(derivative, t)",
       "sign, derivative = sign, sp.diff(derivative, t)", (),
       ("tests/symbolic/test_antiderivative.py", "tests/kernels/test_kernel.py", "tests/proof/test_derivation.py")),
    _m("Phi S Phi", "symbolic/coupled.py", "(S - phi * (S - P0) * phi.T)", "(S - phi * (S - P0) * phi)",
       ("turning",), ("tests/kernels/test_coupled.py",)),
    _m("Phi Q Phi", "symbolic/coupled.py", "since * Q.subs(t, u) * since.T", "since * Q.subs(t, u) * since",
       ("not commuting",)),
    _m("Phi P0 Phi", "symbolic/coupled.py", "phi * P0 * phi.T + noise", "phi * P0 * phi + noise", ("not commuting",)),
    _m("Cholesky's pivot", "symbolic/coupled.py", "rest / L[j, j]", "rest / L[i, i]", ("noise matrix",),
       ("tests/kernels/test_coupled.py",)),
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
    _m("dimension of a square root process", "symbolic/pearson.py", "dimension = 4 * (a * origin + b) / slope",
       "dimension = 2 * (a * origin + b) / slope", ("CIR",)),
    _m("A of a Jacobi process", "symbolic/pearson.py", "(\"A\", 2 * (a * p + b) / (length * s))",
       "(\"A\", (a * p + b) / (length * s))", ("Jacobi",)),
    # -------------------------------------------------------------------- moments as numbers
    _m("noise of a panel", "numerics/quadrature.py", "growth.square() * own_v", "growth * own_v",
       ("quadrature",)),
    _m("offset across panels", "numerics/quadrature.py", "m + torch.exp(A) * m0", "m + m0", ("quadrature",)),
    _m("G N G", "numerics/quadrature.py", "N + G @ N0 @ G.mT", "N + G @ N0 @ G", ("turning",)),
    _m("push of a panel", "numerics/quadrature.py", "integral(inverse @ b[..., None]", "integral(phi @ b[..., None]",
       ("turning",)),
    _m("rate of the log-SNR", "kernels/coefficients.py", "-0.5 * self.of_sde(t)[2] / std.square()",
       "-self.of_sde(t)[2] / std.square()", ("offset",)),
    _m("rate of the information", "kernels/coefficients.py", "0.5 * rate / information", "rate / information",
       ("noise matrix",)),
    _m("P⁻¹ in the information", "kernels/coefficients.py", "solve_triangular(root.mT, whitened, upper=True)",
       "solve_triangular(root, whitened, upper=False)", ("noise matrix",)),
    # -------------------------------------------------------------------- the Gaussian kernel
    _m("offset of a transition", "kernels/gaussian.py", "offset - alpha * before", "offset + 0 * before",
       ("offset",)),
    _m("noise of a transition", "kernels/gaussian.py", "-torch.expm1(2.0 * (change", "-torch.expm1((change",
       ("initial variance",)),
    _m("score without transpose", "kernels/gaussian.py", "-path.sigma.T.inverse(whitened)",
       "-path.sigma.inverse(whitened)",
       ("noise matrix",)),
    _m("constant of a density", "kernels/gaussian.py", "0.5 * d * math.log(2.0 * math.pi)",
       "d * math.log(2.0 * math.pi)",
       ("offset",)),
    _m("log-SNR that is shown", "kernels/gaussian.py", "2 * self.shown.log_alpha - sp.log(self.var)",
       "self.shown.log_alpha - sp.log(self.var)", ("offset",)),
    _m("information that is shown", "symbolic/coupled.py",
        "(column.T * covariance.adjugate() * column)",
        "(column.T * covariance * column)", ("noise matrix",)),
    _m("mean that is shown", "kernels/gaussian.py", "self.alpha * data[0] + self.offset",
       "self.alpha * data[0] - self.offset",
       ("offset",)),
    _m("root of a marginal", "kernels/gaussian.py", "path.sigma @ spread.root_of_one_plus_gram", "path.sigma",
       ("offset",)),
    _m("lift", "kernels/gaussian.py", "state[:, self.numbers.data[0]] += data",
       "state[:, self.numbers.data[0]] -= data",
       ("Langevin",)),
    _m("A Aᵀ in a root", "numerics/linear.py", "self.one.values + self.values @ self.values.mT",
       "self.one.values + self.values.mT @ self.values",
       ("noise matrix",)),
    _m("mean of a prior's draws", "laws/gaussian.py", "self._mean_for(noise) + self.root.to(noise.device)(noise)",
       "self.root.to(noise.device)(noise)", ("offset",)),
    _m("constant of a Gaussian", "laws/gaussian.py", "- log_det - 0.5 * d", "- log_det - d",
       (), ("tests/likelihood/test_likelihood.py", "-k", "gaussian_data_is_exact")),
    # -------------------------------------------------------------------- random numbers
    _m("counter of a draw", "numerics/noise.py", "(0, 0, self._draws, self._block + block)",
       "(0, 0, 0, self._draws + self._block + block)", (), ("tests/numerics/test_noise.py",)),
    _m("blocks before the first row", "numerics/noise.py", "self._block + block)", "block)", (),
       ("tests/numerics/test_noise.py", "-k", "first_rows")),
    _m("purpose of a stream", "numerics/noise.py", 'key_of(f"{self.seed}/{purpose}")', 'key_of(f"{self.seed}")', (),
       ("tests/numerics/test_noise.py",)),
    _m("angle of a normal number", "numerics/noise.py", "dtype(math.pi * 2.0**-31)", "dtype(math.pi * 2.0**-32)", (),
       ("tests/numerics/test_noise.py",)),
    _m("middles of cells", "numerics/noise.py", "out += dtype(0.5)", "out += dtype(0.0)", (),
       ("tests/numerics/test_noise.py",)),
    _m("noise of a half", "numerics/brownian.py", "math.sqrt(self.h / 16.0) * z", "math.sqrt(self.h / 12.0) * z", (),
       ("tests/numerics/test_brownian.py",)),
    _m("area of a half", "numerics/brownian.py", "0.25 * self.H - 0.5 * Z + 0.5 * N", "0.25 * self.H - 0.5 * Z + N", (),
       ("tests/numerics/test_brownian.py",)),
    _m("integral at the middle", "numerics/brownian.py", "half * (self.start + 0.5 * W + H)",
       "half * (self.start + 0.5 * W)",
       (), ("tests/numerics/test_brownian.py",)),
    _m("area backwards in time", "numerics/brownian.py", "math.copysign(1.0, b - a) * (I_b - I_a)", "(I_b - I_a)", (),
       ("tests/numerics/test_brownian.py",)),
    _m("mirror at a lower end", "solving/boundary.py", "2.0 * low - x", "low - x", (),
       ("tests/solving/test_boundary.py",)),
    _m("a path that was absorbed", "solving/boundary.py", "x = torch.where(stopped, where, x)",
       "x = torch.where(stopped, x, x)", (), ("tests/solving/test_boundary.py",)),
    _m("ends that move", "solving/boundary.py", "end = root(time).to(part)", "end = root(0.0 * time).to(part)", (),
       ("tests/solving/test_boundary.py",)),
    # -------------------------------------------------------------------- bridges
    _m("transpose of a bridge's gain", "kernels/bridge.py", "now.sigma(W.T(surprise))", "now.sigma(W(surprise))",
       ("noise matrix",)),
    _m("offset in a bridge's surprise", "kernels/bridge.py", "whole.alpha(start) - whole.offset)",
       "whole.alpha(start))",
       ("offset",)),
    _m("transpose of a bridge's noise", "kernels/bridge.py", "V.T.root_of_one_plus_gram.T.inverse",
       "V.T.root_of_one_plus_gram.inverse", ("noise matrix",)),
    _m("transpose in a bridge's drift", "symbolic/conditioned.py", "declaration.gram * across.T * inverse",
       "declaration.gram * across * inverse", ("noise matrix",)),
    _m("offset in a bridge's drift", "symbolic/conditioned.py", "(sp.Matrix(declaration.state) - m)",
       "sp.Matrix(declaration.state)", ("noise matrix",)),
    _m("rest of a bridge's drift", "symbolic/conditioned.py", "across * P * across.T", "across * P * across",
       ("noise matrix",)),
    _m("a bridge's steps from known states", "kernels/bridge.py", "s, exactly = t, True", "s, exactly = t, False",
       ("initial variance",), ("tests/kernels/test_kernel.py", "-k", "bridge")),
    # -------------------------------------------------------------------- kernels of a state
    _m("score of the line", "kernels/reducible.py", "score.to(torch.float64) * slope + curvature",
       "score.to(torch.float64) * slope - curvature", ("geometric",)),
    _m("tanh of the fold", "kernels/reducible.py", "torch.tanh(line * mean / var)",
       "torch.tanh(2.0 * line * mean / var)",
       ("folds",)),
    _m("branches of the fold", "kernels/reducible.py", "softplus(-2.0 * line", "softplus(-1.0 * line", ("folds",)),
    _m("curvature of the map", "kernels/reducible.py", "((mean - line) / var - curvature)",
       "((mean - line) / var + curvature)",
       ("geometric",)),
    _m("constant of Debye's expansion", "numerics/noncentral.py", "- 0.5 * torch.log(8.0 * math.pi * z)",
       "- 0.5 * torch.log(4.0 * math.pi * z)", ("CIR of dimension 60",)),
    _m("sign of 1/r in Debye's expansion", "numerics/noncentral.py", "-a * n / 2 - 5 * a / (8 * (n + 3))",
       "-a * n / 2 + 5 * a / (8 * (n + 3))", ("CIR of dimension 60",)),
    _m("slope of Debye's expansion", "numerics/noncentral.py", "(rate / value - 0.5 / z)", "(rate / value + 0.5 / z)",
       ("CIR of dimension 60",)),
    _m("power series of Bessel's function", "numerics/noncentral.py", "(y / (k * (nu + k)))",
       "(y / (k * (nu + k + 1)))", ("CIR",)),
    _m("draws of CIR", "kernels/square_root.py", "count = _poisson(as_array(level), as_array(0.5 * noncentrality",
       "count = _poisson(as_array(level), as_array(noncentrality", ("CIR",)),
    _m("draws of CIR far from 0", "kernels/square_root.py", "0.5 * (delta - 1.0).clamp_min(1e-3)",
       "0.5 * (delta - 2.0).clamp_min(1e-3)", (), ("tests/kernels/test_square_root.py",)),
    _m("spread of a square-root bridge", "kernels/square_root.py", "self.tau = v_1 * v_2 / v",
       "self.tau = v_1 * v_2 / v_2", ("CIR",)),
    _m("noncentrality of a square-root bridge", "kernels/square_root.py", "(alpha_2 / v_2).square() * self.tau * end",
       "(alpha_1 / v_2).square() * self.tau * end", ("CIR",)),
    _m("mean of a square-root bridge", "kernels/square_root.py", "self.delta + 4.0 * count", "self.delta + 2.0 * count",
       ("CIR",)),
    _m("variance of a square-root bridge", "kernels/square_root.py", "16.0 * spread", "4.0 * spread", ("CIR",)),
    _m("draws of a square-root bridge", "kernels/square_root.py", "(delta + 4.0 * count,)", "(delta + 2.0 * count,)",
       ("CIR",)),
    _m("Bessel's distribution", "kernels/square_root.py", "torch.lgamma(n + nu_ + 1.0)", "torch.lgamma(n + 1.0)",
       ("CIR",)),
    _m("density of a square-root bridge", "kernels/square_root.py", "self.before.at(u)) + density(onward)",
       "self.before.at(u)) - density(onward)", ("CIR",)),
    _m("the way onward of a square-root bridge", "kernels/square_root.py", "self._alpha_var(x_s, self.T, t)",
       "self._alpha_var(x_s, self.T - t)", ("CIR", "square root, of time")),
    _m("order in a square-root bridge's drift", "symbolic/conditioned.py", "sp.besseli(order + 1, argument)",
       "sp.besseli(order + 2, argument)", ("CIR",)),
    _m("sign of a square-root bridge's drift", "symbolic/conditioned.py", "* ratio - across) / form.scale",
       "* ratio - across) / sp.Abs(form.scale)", ("CIR from above",)),
    _m("argument in a square-root bridge's drift", "symbolic/conditioned.py", "across * sp.sqrt(u * end) / rest",
       "sp.sqrt(u * end) / rest", ("CIR",)),
    _m("time in a reducible bridge's drift", "symbolic/conditioned.py", "alpha.subs(t, T) / alpha\n    mean",
       "alpha\n    mean", ("geometric", "folds")),
    _m("eigenvalues of Jacobi", "kernels/jacobi.py", "eigenvalue = (n + 1) * (n + A + B) / 2",
       "eigenvalue = (n + 1) * (n + A + B + 1) / 2", ("Jacobi",)),
    _m("change of variables", "kernels/pearson.py", "self._log_density(law) - scale.abs().log()",
       "self._log_density(law)",
       ("Jacobi on [1, 3]",)),
    _m("score in x", "kernels/pearson.py", "self._slope(law) / scale", "self._slope(law) * scale",
       ("Jacobi on [1, 3]",)),
    _m("gradient of a quantile", "kernels/pearson.py", "u = u - torch.where(noisy, rate / density",
       "u = u + torch.where(noisy, rate / density", (), ("tests/kernels/test_square_root.py", "-k", "gradients")),
    _m("½ of a distribution function", "kernels/jacobi.py", "0.5 * u * (1.0 - u) * weight", "u * (1.0 - u) * weight",
       ("Jacobi",), ("tests/kernels/test_jacobi.py",)),
    _m("slope at the upper end", "kernels/jacobi.py", "(B - 1.0) / (1.0 - law.u)", "B / (1.0 - law.u)", ("Jacobi",)),
    _m("lineages of the second kind", "kernels/jacobi.py", "B + lineages - left", "B + lineages", ("Jacobi",),
       ("tests/kernels/test_jacobi.py", "tests/solving/test_boundary.py")),
    _m("terms that a stride skips", "kernels/ancestral.py", "np.log(total * step * stride)", "np.log(total * step)", (),
       ("tests/kernels/test_jacobi.py",)),
    _m("lineages rounded down", "kernels/ancestral.py", "np.where(at_zero >= 0, 0.0, np.ceil(m))",
       "np.where(at_zero >= 0, 0.0, np.floor(m))", (), ("tests/kernels/test_jacobi.py",)),
    _m("rate of theta", "kernels/ancestral.py", "of_first - of_second - special.digamma(m + theta)",
       "of_first - of_second + special.digamma(m + theta)", (), ("tests/kernels/test_jacobi.py",)),
    _m("rate of coalescence", "kernels/ancestral.py", "return 0.5 * k * (k - 1.0 + theta)",
       "return 0.5 * k * (k + theta)",
       (), ("tests/kernels/test_jacobi.py",)),
    # -------------------------------------------------------------------- which kernel an SDE has
    _m("Pearson's class before a change of the state", "kernels/kinds.py", "(_gaussian, _reducible, _pearson)",
       "(_gaussian, _pearson, _reducible)", (), ("tests/kernels/test_kinds.py",)),
    _m("jumps of sigma alone unseen", "kernels/continuity.py", "return off | (",
       "return off & (", (), ("tests/symbolic/test_kinked_paths.py",)),
    _m("a jump at its second time", "kernels/continuity.py", "(low, middle) if exact.apart(middle) else (middle, high)",
       "(middle, high) if exact.apart(middle) else (low, middle)", (), ("tests/symbolic/test_kinked_paths.py",)),
    _m("no room beside a ramp", "kernels/continuity.py", "steep = _APART + 4.0 * _ROUNDING * high",
       "steep = _APART + 0.0 * high", (), ("tests/symbolic/test_kinked_paths.py",)),
    _m("a rise that is none", "kernels/continuity.py", "if after[0] * abs(before[1]) > before[0] * abs(after[1])",
       "if after[0] * abs(before[1]) < before[0] * abs(after[1])", (), ("tests/symbolic/test_kinked_paths.py",)),
    _m("the slope of Mod", "symbolic/path.py", "lambda u, p: u - p * sp.floor(u / p)",
       "lambda u, p: p * sp.floor(u / p)", (), ("tests/symbolic/test_kinked_paths.py",)),
    _m("a refusal left out", "kernels/kinds.py", "        if found not in refusals:", "        if not refusals:", (),
       ("tests/kernels/test_kinds.py",)),
    _m("form at present values for a tensor", "kernels/reducible.py",
       "if found.at_values and values.tensors else found",
       "if False else found", (), ("tests/kernels/test_pearson.py", "-k", "tensor_parameter")),
    _m("what a local kernel cannot tell", "kernels/local.py", '"numbers", "components",', '"numbers",', (),
       ("tests/kernels/test_kinds.py",)),
    _m("refusals lost with the cutoff", "kernels/local.py", "LocalKernel(declaration, self.values, self.refusals)",
       "LocalKernel(declaration, self.values)", (), ("tests/kernels/test_kinds.py",)),
    _m("a score of a general SDE from its cutoff on", "kernels/local.py", "        return 0.0\n\n    @cached_property",
       "        return self.cutoff\n\n    @cached_property", (), ("tests/kernels/test_kinds.py",)),
    _m("another cutoff, the change of state kept", "kernels/reducible.py",
       "ReducibleKernel(declaration, self.values, like=self.reduction)",
       "ReducibleKernel(self.declaration, self.values, like=self.reduction)", (), ("tests/kernels/test_kinds.py",)),
    # -------------------------------------------------------------------- which solver an equation has
    _m("the forward SDE for methods of a kernel", "solvers/base.py",
       'lambda solver: "sde" in solver.kinds and not solver.needs_kernel,', 'lambda solver: "sde" in solver.kinds,', (),
       ("tests/solving/test_simulation.py", "-k", "refused")),
    _m("the divergence of any method", "solvers/base.py", "lambda solver: solver.integrates_divergence,",
       "lambda solver: True,", (), ("tests/test_recipe_solver.py",)),
    _m("elementwise methods for coupled states", "solvers/base.py", "lambda solver: not solver.elementwise,",
       "lambda solver: True,", (), ("tests/test_recipe_solver.py",)),
    _m("diagonal methods for shared noise", "solvers/base.py", "lambda solver: not solver.diagonal,",
       "lambda solver: True,", (), ("tests/solvers/test_exponential.py", "-k", "names_and")),
    _m("a path for methods that draw their own noise", "solvers/base.py",
       "lambda solver: solver.follows_path, \"noise=", "lambda solver: True, \"noise=", (),
       ("tests/numerics/test_brownian.py",)),
    _m("chunks of a solver with steps for the batch", "solvers/base.py", "return self.adaptive and not self.per_sample",
       "return self.adaptive and self.per_sample", (), ("tests/solving/test_sampling.py", "-k", "chunks")),
    _m("a class without its kinds", "solvers/base.py", "set(kinds) <= set(_KINDS)", "True", (),
       ("tests/test_recipe_solver.py",)),
    _m("kernel methods for every SDE", "solvers/registry.py", '"no kernel": not with_kernel', '"no kernel": False', (),
       ("tests/solvers/test_exponential.py", "-k", "names_and")),
    _m("shared noise of every matrix", "solvers/registry.py",
       "not declaration.diagonal and declaration.state_dependent_noise", "not declaration.diagonal", (),
       ("tests/solvers/test_exponential.py", "-k", "names_and")),
    _m("another solver under a name", "solvers/registry.py", '"euler": EulerMaruyama(),',
       '"euler": Torchsde("milstein"),', (), ("tests/solvers/test_exponential.py", "-k", "names_and")),
    _m("the published third order by default", "solvers/registry.py", "presets.dpmpp3m(),",
       "presets.dpmpp3m(published=True),", (), ("tests/solvers/test_presets.py",)),
    _m("noise in the flow of EDM", "solvers/registry.py", '"edm": StochasticHeun(S_churn=40.0)',
       '"edm": StochasticHeun()', (),
       ("tests/solvers/test_samplers.py", "tests/solvers/test_presets.py", "-k", "edm or churn or named or promises")),
    _m("a class for an object", "solvers/registry.py", "if isinstance(solver, type):", "if False:", (),
       ("tests/test_recipe_solver.py",)),
    _m("P0 lost on the way", "kernels/kinds.py", 'Gaussian start" if declaration.P0 > 0',
       'Gaussian start" if False', (),
       ("tests/kernels/test_kinds.py",)),
    # -------------------------------------------------------------------- the prior of a solve
    _m("the given prior left out", "solving/prior_of.py",
       "if self.given is None else self.given\n        if known is not None:\n            return known\n        score",
       "\n        if known is not None:\n            return known\n        score", (),
       ("tests/likelihood/test_budget.py", "-k", "prior")),
    _m("the score in the prior's units", "solving/mismatch.py", "e = prior.root.to(x.device).T(s) + z",
       "e = s + z", (), ("tests/solving/test_mismatch.py",)),
    _m("Fisher's divergence by half", "solving/mismatch.py", "0.5 * e.square().mean(0)", "0.25 * e.square().mean(0)",
       (), ("tests/solving/test_mismatch.py",)),
    _m("the variance of a sloped score", "solving/mismatch.py", "1.0 / (1.0 - slope), torch.inf",
       "1.0 - slope, torch.inf", (), ("tests/solving/test_mismatch.py",)),
    _m("a mismatch told every time", "solving/mismatch.py", "known[key] = None", "pass",
       (), ("tests/solving/test_mismatch.py", "-k", "once")),
    _m("the prior of other samples", "solving/prior_of.py", "return replace(self, index=ours[index])",
       "return replace(self, index=ours[: len(ours[index])])", (), ("tests/scores/test_rows.py",)),
    _m("a variance for a standard deviation", "solving/prior_of.py", "return mean, variance.sqrt(), _near",
       "return mean, variance, _near", (), ("tests/scores/test_rows.py", "-k", "prior_of_each")),
    _m("sign of what a coupled score says", "solving/prior_of.py", "precision = -(of_score",
       "precision = (of_score", (),
       ("tests/kernels/test_coupled.py", "-k", "prior")),
    _m("mean of a coupled prior", "solving/prior_of.py", "[..., None] + covariance @ gradient",
       "[..., None] - covariance @ gradient", (), ("tests/kernels/test_coupled.py", "-k", "prior")),
    _m("silence about a wrong prior", "solving/prior_of.py", "if not kl <= _MISMATCH:", "if kl <= _MISMATCH:", (),
       ("tests/test_faults.py", "-k", "prior or gaussian_at_T")),
    _m("a score that is no Gaussian at T", "solving/prior_of.py", "(variance > 0.1 * usual) & (variance < 10 * usual)",
       "True", (), ("tests/test_faults.py", "-k", "prior or gaussian_at_T")),
    _m("the first sample of each condition", "solving/prior_of.py", "torch.arange(len(x)), \"amin\")",
       "torch.arange(len(x)), \"amax\")", (), ("tests/scores/test_rows.py",),
       hidden="every sample of a condition has the same score"),
    _m("conditions mixed up", "solving/prior_of.py", "EachGaussian(mean, std, conditions[1], kernel.basis)",
       "EachGaussian(mean, std, conditions[1].flip(0), kernel.basis)", (),
       ("tests/scores/test_rows.py", "-k", "prior_of_each")),
    _m("redrawn samples in wrong places", "solving/support.py", "x[rows[found]] = again.x[found]",
       "x[rows[found]] = again.x[found].flip(0)", (), ("tests/solving/test_support.py", "-k", "condition or batch")),
    _m("redrawn samples of other noise", "numerics/noise.py", "drawn_rows[wanted]", "drawn_rows[: len(wanted)]", (),
       ("tests/solving/test_support.py", "-k", "batch")),
    # -------------------------------------------------------------------- rows of a score
    _m("rows of rows", "scores/function.py", "return self._of(part.size, ours[index])",
       "return self._of(part.size, torch.arange(part.size)[index])", (), ("tests/scores/test_rows.py",)),
    _m("where a tied function puts its states", "scores/function.py", '"the score")[at])',
       '"the score")[: len(at)])', (),
       ("tests/scores/test_rows.py",)),
    _m("the order of repeated samples", "scores/function.py", "torch.cat(order).argsort()", "torch.cat(order)", (),
       ("tests/scores/test_rows.py",)),
    _m("repeats of a sample in one call", "scores/function.py", "rank[order] = torch.arange(len(order)) - first",
       "rank[order] = torch.arange(len(order)) * 0", (), ("tests/scores/test_rows.py",)),
    _m("a wrapped score keeps all samples", "scores/function.py", "return self.around(self.score.rows(index))",
       "return self", (), ("tests/scores/test_rows.py",)),
    _m("a score of another SDE", "scores/function.py", "return (ours, self.values, self.basis) ==",
       "return (ours, self.values) != (theirs, None) or (ours, self.values, self.basis) ==", (),
       ("tests/test_faults.py", "tests/scores/test_scores.py", "-k", "another or belongs or other_sde")),
    _m("modes of the parts of a network", "scores/function.py",
       "del _evaluated[part]\n                    part.training = True",
       "del _evaluated[part]", (), ("tests/scores/test_scores.py", "tests/training/test_runs.py",
       "tests/training/test_objectives.py", "-k", "mode or seed_and_data or eval")),
    # -------------------------------------------------------------------- scores and losses
    _m("variance of a mixture", "scores/mixture.py", "alpha.square() * self.variances + sigma.square()",
       "alpha * self.variances + sigma.square()", ("offset",)),
    _m("gradient of a mixture", "scores/mixture.py", "gradient = -deviation / variance",
       "gradient = -deviation / variance.sqrt()", ("offset",)),
    _m("noise to data", "scores/network.py", "path.alpha.inverse(centred - path.sigma(eps))",
       "path.alpha.inverse(centred + path.sigma(eps))", (), ("tests/scores/test_scores.py",)),
    _m("Tweedie's sign", "scores/function.py", "centred + path.sigma.gram(", "centred - path.sigma.gram(",
       (), ("tests/scores/test_scores.py",)),
    _m("noise of a coupled score", "scores/function.py", "-path.sigma.T(kernel.to_basis(self(x, t)))",
       "-path.sigma(kernel.to_basis(self(x, t)))", (), ("tests/kernels/test_coupled.py", "-k", "mixture_score_is")),
    _m("guidance on a grid", "scores/conditional.py",
       "torch.lerp(without, with_y, self.strength)\n\n        return GridScore",
       "torch.lerp(with_y, without, self.strength)\n\n        return GridScore", (),
       ("tests/scores/test_conditions.py", "-k", "guidance")),
    _m("guidance outside its interval", "scores/conditional.py",
       "torch.where(inside, self.strength, 1.0)", "torch.where(inside, self.strength, 0.0)", (),
       ("tests/scores/test_conditions.py", "-k", "guidance")),
    _m("conditions of a part of a batch", "scores/conditional.py", "Held(picked(self.y, index))",
       "Held(picked(self.y, torch.arange(len(torch.arange(self.samples or 0)[index]))))", (),
       ("tests/scores/test_rows.py", "-k", "given and chunks")),
    _m("prior of a condition", "scores/conditional.py", "return moments if float(", "return moments if True or float(",
       (),
       ("tests/scores/test_conditions.py", "-k", "prior_of_a_condition")),
    _m("share of dropped conditions", "training/run.py", "torch.float64)[:, 0] < share", "torch.float64)[:, 0] > share",
       (), ("tests/scores/test_conditions.py", "-k", "label_dropout_drops")),
    _m("a condition is needed", "scores/network.py", "if not self._unconditional:",
       "if False and not self._unconditional:",
       (), ("tests/scores/test_conditions.py", "-k", "without_label_dropout")),
    _m("likelihood weighting", "training/weightings.py", "whiten @ kernel.equation(x, t)[2] @ whiten.T",
       "whiten @ kernel.equation(x, t)[2] @ whiten", (), ("tests/training/test_weightings.py", "-k",
       "in_the_likelihood")),
    _m("half of the likelihood weighting", "training/weightings.py", '0.5 if weighting == "likelihood" else 1.0',
       '1.0 if weighting == "likelihood" else 1.0', (), ("tests/training/test_weightings.py",)),
    _m("min-SNR", "training/weightings.py", "torch.exp(-2.0 * kernel.half_log_snr(t))).clamp_max",
       "torch.exp(-kernel.half_log_snr(t))).clamp_max", (), ("tests/training/test_weightings.py",)),
    _m("EDM's weight", "training/weightings.py", "(1.0 + (2.0 * log_zeta).exp() / data_std**2)",
       "(1.0 + (2.0 * log_zeta).exp() / data_std)", (), ("tests/training/test_weightings.py",)),
    _m("root of a loss", "training/losses.py", "root.T(score(x_t, t, *", "root(score(x_t, t, *",
       (), ("tests/solving/test_simulation.py",)),
    _m("samples meet times in their own order", "training/objectives/base.py",
       "order = stream.uniform((1, n), torch.float64)[0].argsort(stable=True).tolist()", "order = list(range(n))",
       (), ("tests/training/test_objectives.py", "-k", "sorted")),
    _m("strata of a value in order of the data", "training/objectives/base.py", ".argsort(stable=True).tolist()",
       ".argsort(stable=True).argsort().mul(0).add(torch.arange(n)).tolist()", (), ("tests/training/test_objectives.py",
       "-k", "sorted or seed_and")),
    _m("what an objective needs", "training/objectives/base.py", "score.kernel.exact and not gaussian",
       "score.kernel.exact", (), ("tests/training/test_objectives.py", "-k", "says_what")),
    _m("likelihood without its ½", "training/objectives/base.py", "torch.full_like(t, self.share)",
       "torch.ones_like(t)", (),
       ("tests/training/test_objectives.py", "tests/training/test_weightings.py")),
    _m("the default weighting of fit", "training/objectives/__init__.py", '"likelihood" if kind is Denoising else',
       '"score" if kind is Denoising else', (), ("tests/training/test_objectives.py", "-k", "mean_the_same")),
    _m("simulated pairs where a kernel is exact", "training/objectives/__init__.py",
       "KernelMatching if score.kernel.exact else LocalMatching", "LocalMatching", (),
       ("tests/training/test_objectives.py", "-k", "mean_the_same")),
    _m("options of other objectives in silence", "training/objectives/__init__.py",
       "    elif counts:\n", "    elif False:\n", (),
       ("tests/training/test_objectives.py", "-k", "says_what")),
    _m("labels of an objective", "training/objectives/denoising.py", "self.weighting, y)", "self.weighting, None)", (),
       ("tests/training/test_objectives.py", "-k", "labelled")),
    _m("gap of an objective", "training/objectives/matching.py", "self.gap, self.simulation_steps))",
       "_GAP, self.simulation_steps))", (), ("tests/training/test_objectives.py", "-k", "mean_the_same")),
    _m("error of a value", "training/objectives/base.py", "values.diff().square().sum()) / (2 * (n - 1))",
       "values.diff().square().sum()) / (n - 1)", (), ("tests/training/test_objectives.py", "-k", "integral")),
    _m("what a sample counts in a value", "training/objectives/base.py", "weight[part] * loss.double()",
       "loss.double()", (), ("tests/training/test_objectives.py", "-k", "integral")),
    _m("state of callbacks", "training/callbacks.py",
       'callback.load_state_dict(unpacked(kept.pop(place)[1], tensors["callbacks"]))', "pass",
       (), ("tests/test_recipe_objective.py", "-k", "goes_on")),
    _m("learning rates after a resume", "training/run.py", "group[\"lr\"] = rate * factor", "group[\"lr\"] *= factor",
       (), ("tests/training/test_objectives.py", "-k", "is_the_one_that_steps")),
    _m("state of an optimiser", "training/callbacks.py",
       "return unpacked(state[\"optimiser\"], tensors[\"optimiser\"])", "return run.optimiser.state_dict()",
       (), ("tests/training/test_objectives.py", "-k", "any_optimiser")),
    _m("a step lost by a callback's error", "training/run.py", "self.checkpoints.rescue(self)", "pass",
       (), ("tests/training/test_objectives.py", "-k", "loses_nothing")),
    _m("validation of the last weights", "training/callbacks.py",
       "run.objective.value(run.average.score, self.data", "run.objective.value(run.score, self.data",
       (), ("tests/training/test_objectives.py", "-k", "disturbs_nothing")),
    _m("target of a local step", "training/pairs.py", "target = -root.T.inverse(eps)", "target = -root.inverse(eps)",
       (), ("tests/solving/test_simulation.py",)),
    _m("shift of a readout", "scores/readout.py", "moved = -readout.state(", "moved = readout.state(", (),
       ("tests/solvers/test_exponential.py", "-k", "every_parametrisation")),
    _m("p2", "training/weightings.py", "torch.sigmoid(-2.0 * kernel", "torch.sigmoid(2.0 * kernel", (),
       ("tests/training/test_weightings.py",)),
    _m("mean over coordinates", "training/weightings.py", "trace(tuple(x.shape[1:])) / math.prod(x.shape[1:])",
       "trace(tuple(x.shape[1:]))", (), ("tests/training/test_weightings.py",)),
    _m("Jacobian of the log-SNR", "training/times.py", "density * self._kernel.half_log_snr_rate(t).abs()",
       "density / self._kernel.half_log_snr_rate(t).abs()", (), ("tests/training/test_weightings.py",)),
    _m("noise levels of EDM", "training/times.py", "(-levels - EDM_MEAN)", "(levels - EDM_MEAN)", (),
       ("tests/training/test_weightings.py", "-k", "levels_of_edm")),
    _m("strata", "training/times.py", "dtype=torch.float64) / n) % 1.0", "dtype=torch.float64) / (n + 1)) % 1.0", (),
       ("tests/training/test_weightings.py", "-k", "stratified or laws_of_times")),
    _m("moving average", "training/ema.py", "weight = 1.0 - min(decay,", "weight = min(decay,", (),
       ("tests/training/test_training.py", "-k", "average or ema or loss")),
    _m("a short step's second derivative", "kernels/local.py", "f + 0.25 * length * c", "f + 0.5 * length * c", (),
       ("tests/solving/test_simulation.py", "-k", "local_law")),
    _m("noise of a short step", "kernels/local.py", "Q * _phi(2.0 * z)", "Q * _phi(z)", (),
       ("tests/solving/test_simulation.py", "-k", "local_law")),
    _m("law of a mixture at T", "scores/mixture.py", "path.alpha(kernel.to_basis(x_0)) + path.offset + path.sigma(eps)",
       "path.alpha(kernel.to_basis(x_0)) + path.sigma(eps)", (), ("tests/scores/test_scores.py", "-k", "horizon")),
    _m("what the noise leaves of data", "kernels/gaussian.py", "left = path.sigma.inverse @ path.alpha @",
       "left = path.sigma.inverse @", (), ("tests/scores/test_scores.py", "-k", "horizon")),
    # -------------------------------------------------------------------- solvers
    _m("churn over N + 1", "solvers/edm.py", "self.S_churn / len(begins)", "self.S_churn / (len(begins) + 1)",
       (), ("tests/solvers/test_presets.py", "-k", "churn")),
    _m("Heun of EDM", "solvers/edm.py", "0.5 * (first + second)", "first", (),
       ("tests/solvers/test_samplers.py", "-k", "edm or heun")),
    _m("Heun", "solvers/euler.py", "y + 0.5 * (slope + ahead)", "y + slope", (),
       ("tests/solvers/test_grids.py", "-k", "jumps and heun")),
    _m("b(t) between given times", "solving/fields.py", "+ b.to(dtype=x.dtype", "+ 0 * b.to(dtype=x.dtype",
       (), ("tests/solvers/test_grids.py", "-k", "by_hand")),
    _m("b(t) between given times, for log p", "likelihood/continuous.py", "model = model.carried_by(plan, clock)",
       "pass", (), ("tests/solvers/test_grids.py", "-k", "log_prob")),
    _m("width of Langevin's noise", "solvers/langevin.py", "math.sqrt(2.0 * step), x.dtype",
       "math.sqrt(step), x.dtype", (), ("tests/solvers/test_samplers.py",)),
    _m("the step of an snr", "solvers/langevin.py", "(2.0 * kept * self.snr**2 * ratio)",
       "(kept * self.snr**2 * ratio)",
       (), ("tests/solvers/test_samplers.py",)),
    _m("NCSNv2's excess", "solvers/langevin.py", "(1.0 - left) * e / (2.0 - e)", "(1.0 - left) * e / (1.0 - e)",
       (), ("tests/solvers/test_samplers.py",)),
    _m("weights of a multistep method", "solvers/exponential/weights.py", "moments[:, 2] + back * moments[:, 1]",
       "moments[:, 2] - back * moments[:, 1]", (), ("tests/solvers/test_presets.py",
       "tests/solvers/test_exponential.py")),
    _m("noise of an exponential step", "solvers/exponential/weights.py", "(measure * 2.0 * (one - 1.0)",
       "(measure * (one - 1.0)",
       (), ("tests/solvers/test_exponential.py",)),
    _m("force of a coupled step", "solvers/exponential/weights.py", "force = 0.5 * (1.0 + panels.spread)",
       "force = (1.0 + panels.spread)", (), ("tests/solvers/test_exponential.py", "tests/kernels/test_coupled.py")),
    _m("eta of DDIM", "solvers/exponential/solver.py", "kept = -0.5 * np.log1p(", "kept = -np.log1p(", (),
       ("tests/solvers/test_exponential.py", "tests/solvers/test_presets.py")),
    _m("flow in a restart", "solvers/restart.py", "q.scaled(0.5)(problem.score(u, t))", "q(problem.score(u, t))",
       (), ("tests/solvers/test_samplers.py", "-k", "restart")),
    _m("thresholded score", "scores/thresholded.py", "(sigma.T.inverse @ sigma.inverse @ alpha)(change)",
       "(sigma.T.inverse @ sigma.inverse)(change)", (), ("tests/solving/test_sampling.py", "-k", "thresh")),
    _m("noise of a part of a step", "solvers/exponential/singlestep.py", "fresh.add_(multiplied(keep[n], noise))",
       "fresh.add_(noise)", (), ("tests/solvers/test_exponential.py", "-k", "weak_order and single")),
    _m("nodes of a stage", "solvers/exponential/singlestep.py", "[list(use)] / end", "[list(use)]", (),
       ("tests/solvers/test_exponential.py", "-k", "single_steps")),
    _m("mean of two steps", "solvers/gotta_go_fast.py", "return euler, 0.5 * (euler + again)", "return euler, again",
       (), ("tests/solvers/test_samplers.py", "-k", "gotta_go_fast_samples")),
    _m("bridge of a rejected step", "solvers/gotta_go_fast.py", "(step * (1.0 - share)).clamp_min(0.0)",
       "step.clamp_min(0.0)", (), ("tests/solvers/test_samplers.py", "-k",
       "one_brownian_motion or gotta_go_fast_samples")),
    _m("space-time integral", "solvers/adapters/torchsde.py", "0.5 * self._w + self._h", "self._w + self._h", (),
       ("tests/numerics/test_brownian.py", "-k", "strong_orders")),
    _m("root of the clock's rate", "solvers/problem.py", "(self._g(y, t) * math.sqrt(rate))",
       "(self._g(y, t) * rate)", (), ("tests/solvers/test_solvers.py", "-k",
       "500_euler or propagation_predicts")),
    _m("Itô and Stratonovich", "solvers/problem.py", "return value - self.to_rows(rate * self._correction",
       "return value + self.to_rows(rate * self._correction", (),
       ("tests/solvers/test_solvers.py", "-k", "in_its_own_sense")),
    _m("eta of ER-SDE", "solvers/exponential/presets.py", "np.sqrt(0.3 * power /", "np.sqrt(power /", (),
       ("tests/solvers/test_presets.py", "-k", "er_sde")),
    _m("mean of the data in a step", "solvers/exponential/program.py", "(alpha_1 - keep @ alpha_0).at_each(like)",
       "alpha_1.at_each(like)", (), ("tests/solvers/test_exponential.py", "-k", "reference_is_exact or offset")),
    _m("pauses of a clock", "solvers/clock.py", "rate / (1.0 + 2.0 * _OF_TIME)", "rate", (),
       ("tests/solvers/test_pauses.py", "-k", "plain_methods")),
    # -------------------------------------------------------------------- likelihoods
    _m("reference's growth", "solving/reference.py", "return last - first", "return first - last", (),
       ("tests/likelihood/test_likelihood.py",)),
    _m("known part of the integral", "likelihood/nodes.py", "reference_growth(model, x[:1].detach()) + integrand.known",
       "reference_growth(model, x[:1].detach()) - integrand.known", (), ("tests/likelihood/test_density.py",)),
    _m("half of the divergence", "likelihood/continuous.py", "change, spread = -0.5 * (divergence + known)",
       "change, spread = -1.0 * (divergence + known)", (), ("tests/likelihood/test_likelihood.py",)),
    _m("extrapolation to the data", "likelihood/budget.py", "return first + half, ", "return first - half, ",
       (), ("tests/likelihood/test_budget.py",)),
    _m("normaliser of the auxiliary part", "likelihood/measure.py", "0.5 * level[0].numel() * math.log(2.0 * math.pi)",
       "level[0].numel() * math.log(2.0 * math.pi)", (),
       ("tests/kernels/test_coupled.py", "-k", "nearly_tight")),
    _m("variance of normal probes", "numerics/traces/standard_error.py", "2.0 * self.squares / self.count",
       "self.squares / self.count", (),
       ("tests/numerics/test_traces.py", "-k", "bar_of_hutchinson")),
    _m("deflation of Hutch++", "numerics/traces/hutchpp.py", "math.sqrt(self.d - self._rank)", "math.sqrt(self.d)", (),
       ("tests/numerics/test_traces.py",)),
    _m("the decoder's variance in the ELBO", "likelihood/bounds.py", "return value, excess.var(0) / draws",
       "return value, excess.var(0)", (), ("tests/likelihood/test_bounds.py",)),
    _m("the prior's variance in the ELBO", "likelihood/bounds.py", "gain.var(0) / len(gain)", "gain.var(0)", (),
       ("tests/likelihood/test_bounds.py",)),
    _m("½ of the ELBO", "likelihood/bounds.py", "(0.5 * self.rate * (a * self.metric(b))",
       "(self.rate * (a * self.metric(b))",
       (), ("tests/likelihood/test_bounds.py",)),
    _m("mass of a truncated normal", "likelihood/dequantisation.py", "- tau * density - math.log(2.0 * tau)",
       "+ tau * density - math.log(2.0 * tau)", (), ("tests/likelihood/test_dequantisation.py",)),
    _m("density of a learned dequantisation", "likelihood/dequantisation.py", "- log_std + softplus(-z) + softplus(z)",
       "+ log_std + softplus(-z) + softplus(z)", (), ("tests/likelihood/test_dequantisation.py",)),
    _m("mean of importance weights", "likelihood/dequantisation.py", "torch.logsumexp(log_w, dim=0) - math.log(draws)",
       "torch.logsumexp(log_w, dim=0)", (), ("tests/likelihood/test_dequantisation.py",)),
    _m("nats and bits", "likelihood/bits.py", "nats = d * math.log(2.0)", "nats = d", (),
       ("tests/likelihood/test_density.py", "-k", "bits")),
    _m("volume of the mean path", "likelihood/measure.py", "found.value + volume", "found.value - volume", (),
       ("tests/likelihood/test_budget.py", "-k", "volume")),
    _m("½ of the deblurring", "likelihood/budget.py", "-0.5 * kernel.from_basis(noise(",
       "-1.0 * kernel.from_basis(noise(", (), ("tests/likelihood/test_budget.py", "-k", "truncation_is or blur")),
    _m("drift before the cutoff", "likelihood/budget.py", "moved + 0.5 * cutoff * mass", "moved + cutoff * mass", (),
       ("tests/likelihood/test_not_gaussian.py", "-k", "step_from")),
    _m("twice the noise", "likelihood/budget.py", "half_log_snr(time) - 0.5 * math.log(2.0)",
       "half_log_snr(time) - math.log(2.0)", (), ("tests/likelihood/test_budget.py", "-k", "second_order or volume")),
    _m("half of a ray", "likelihood/budget.py", "rate = 0.5 * (s * way)", "rate = (s * way)", (),
       ("tests/likelihood/test_budget.py", "-k", "prior_mismatch")),
    _m("divergence in the Hamiltonian", "likelihood/adjoint.py", "- (self.weight * divergence).sum()",
       "+ (self.weight * divergence).sum()", (), ("tests/likelihood/test_gradients.py", "-k", "in_x_is_the_score")),
    _m("transpose in the adjoint equation", "likelihood/adjoint.py", "return G.detach(), -M.T(by_u)",
       "return G.detach(), -M(by_u)", (), ("tests/likelihood/test_gradients.py", "-k", "coupled_state")),
    _m("order of a pilot grid", "solving/pilot.py", "size ** (1.0 / (order + 1))", "size ** (1.0 / order)", (),
       ("tests/solvers/test_exponential.py", "-k", "pilot_grid_reaches")),
    _m("grids that agree by chance", "likelihood/exponential.py", "torch.fmax(change, by_chance)",
       "change", (), ("tests/likelihood/test_density.py", "-k", "two_equal_values")),
    _m("width of a bin", "likelihood/dequantisation.py", "return d * math.log(self.width)",
       "return math.log(self.width)", (),
       ("tests/likelihood/test_dequantisation.py", "-k", "two_dimensions")),
    _m("density of a truncated normal", "likelihood/dequantisation.py", "d * (math.log(2.0 * tau) - 0.5",
       "d * (math.log(tau) - 0.5", (), ("tests/likelihood/test_dequantisation.py", "-k", "truncated_normal")),
    # -------------------------------------------------------------------- priors, latents
    _m("potential of a stationary law", "laws/stationary.py", "return 2.0 * f / g**2 * dx", "return f / g**2 * dx",
       (), ("tests/solving/test_simulation.py",)),
    _m("density of a stationary law", "laws/stationary.py", "- 2.0 * np.log(np.abs(self.g))",
       "- np.log(np.abs(self.g))", (), ("tests/solving/test_simulation.py",)),
    _m("spherical interpolation", "solving/latents.py", "(tau * angle).sin() / sine", "tau", (),
       ("tests/solving/test_latents.py",)),
    _m("relaxation", "laws/stationary.py", "2.0 * table.dx**2 / (table.g**2 * self._p)",
       "table.dx**2 / (table.g**2 * self._p)",
       (), ("tests/solving/test_simulation.py", "-k", "default_prior_is or stationary")),
    _m("scale of a fitted prior", "laws/fitted.py", "(log_p - self._scale.log().sum(2))", "log_p", (),
       ("tests/solving/test_simulation.py", "-k", "fitted")),
    _m("roots of a fitted prior", "laws/fitted.py", "self._roots[index, chosen] @ z",
       "self._roots[index, chosen].mT @ z", (), ("tests/solving/test_simulation.py", "-k", "fitted")),
    _m("components of a fitted prior", "laws/fitted.py", "weights.log() - log_det - 0.5 *",
       "weights.log() + log_det - 0.5 *", (), ("tests/solving/test_simulation.py", "-k", "fitted")),
    _m("an interval without a lower end", "laws/stationary.py", "self.high - np.exp(-u), np.exp(-u)",
       "self.high - np.exp(u), np.exp(u)", (), ("tests/solving/test_simulation.py", "-k", "stationary_laws")),
    _m("width of velocities", "laws/boltzmann.py", "math.sqrt(self.temperature) * noise.normal",
       "self.temperature * noise.normal", (), ("tests/solving/test_simulation.py", "-k", "oltzmann")),
    _m("density of velocities", "laws/boltzmann.py", "2.0 * math.pi * self.temperature", "2.0 * math.pi", (),
       ("tests/solving/test_simulation.py", "-k", "oltzmann")),
    _m("temperature", "symbolic/langevin.py", "sp.expand(square) / (2 * friction)", "sp.expand(square) / friction", (),
       ("tests/solving/test_simulation.py", "-k", "oltzmann")),
    _m("KL of Gaussians", "laws/gaussian.py", "(ratio + shift - 1.0 - torch.log(ratio))",
       "(ratio + shift - 1.0 + torch.log(ratio))", (), ("tests/solving/test_latents.py", "-k", "divergence")),
    _m("KL of coupled Gaussians", "laws/gaussian.py", "(0.5 * (trace - k) - log_det)",
       "(0.5 * (trace - k - log_det))", (),
       ("tests/solving/test_latents.py", "-k", "divergence")),
    _m("normalisation of a normal density", "laws/gaussian.py", "- torch.log(std) - 0.5 *", "- 0.5 *", ("geometric",)),
    _m("mean read off a score", "solving/prior_of.py", "mean = x.mean(0) + variance * gradient.mean(1)",
       "mean = x.mean(0) - variance * gradient.mean(1)", (), ("tests/solvers/test_solvers.py", "-k", "prior_read_off")),
    # -------------------------------------------------------------------- bases, the catalogue, declarations
    _m("root mean square of a round trip", "dynamics.py", "flatten(1).square().mean(1).sqrt()",
       "flatten(1).square().sum(1).sqrt()", (), ("tests/solving/test_latents.py", "-k", "round")),
    _m("derivative on a panel", "numerics/chebyshev.py", "axis=-1) * (2.0 / width)[:, None]",
       "axis=-1) * (1.0 / width)[:, None]", (), ("tests/kernels/test_narrow_features.py", "-k", "derivative_of_a_fit")),
    _m("constant cosine", "numerics/basis.py", "matrix[0] /= math.sqrt(2.0)", "matrix[0] /= 2.0", (),
       ("tests/numerics/test_parameters.py", "-k", "cosine")),
    _m("frequencies of a basis", "numerics/basis.py", "dtype=torch.float64) / size) ** 2",
       "dtype=torch.float64)) ** 2", (),
       ("tests/numerics/test_parameters.py", "-k", "blurring")),
    _m("score in what a method makes of Gaussian data", "solvers/resolution.py",
       "share = 1.0 if plain.stochastic else 0.5",
       "share = 1.0", (), ("tests/solvers/test_solvers.py", "-k", "said_of")),
    _m("noise between stages", "solvers/schemes.py", "np.concatenate([np.zeros_like(F), G], axis=-1))",
       "np.concatenate([np.zeros_like(F), 0.5 * G], axis=-1))", (), ("tests/solvers/test_solvers.py", "-k", "said_of")),
    _m("Adams over a break point", "solvers/schemes.py", "[] if step in restarts else slopes[:3]", "slopes[:3]", (),
       ("tests/solvers/test_solvers.py", "-k", "said_of")),
    _m("length of a step", "solvers/clock.py", "return t, rate * length", "return t, rate", (),
       ("tests/solvers/test_solvers.py", "-k", "said_of")),
    _m("a spread too small", "solvers/resolution.py", "return abs(math.log(ratio))",
       "return math.log(ratio)", (), ("tests/solvers/test_solvers.py", "-k", "said_of")),
    _m("a spread of 5", "solvers/resolution.py", "_logarithm(furthest) > max(_MOST",
       "_logarithm(furthest) > max(1.6", (),
       ("tests/solvers/test_solvers.py", "-k", "said_of")),
    _m("Helmert's matrix", "numerics/basis.py", "torch.where(i == k, -k, 0.0)", "torch.where(i == k, -1.0, 0.0)", (),
       ("tests/numerics/test_centre_of_mass.py", "-k", "isometry")),
    _m("sub-VP", "catalog.py", "1 - sp.exp(-2 * integral)", "1 + sp.exp(-2 * integral)", (),
       ("tests/kernels/test_kernel.py", "-k", "literature")),
    _m("VE", "catalog.py", "sp.sqrt(2 * sp.log(ratio))", "sp.sqrt(sp.log(ratio))", (),
       ("tests/kernels/test_kernel.py", "-k", "literature")),
    _m("velocities of Langevin dynamics", "catalog.py", "P0=[0, _exact(gamma) * M]", "P0=[0, _exact(gamma)]", (),
       ("tests/kernels/test_coupled.py", "-k", "literature")),
    _m("heat in a blur", "catalog.py", "(_exact(blur) * sp.sin(phase) ** 2) ** 2 / 2",
       "(_exact(blur) * sp.sin(phase) ** 2) ** 2", (), ("tests/numerics/test_parameters.py", "-k", "blurring")),
    _m("g² of a path", "symbolic/path.py", "_slope(sigma) - 2 * rate * sigma**2",
       "_slope(sigma) - rate * sigma**2", (), ("tests/symbolic/test_tables.py",
       "tests/numerics/test_parameters.py")),
    _m("the start of a table", "symbolic/path.py", "early = (speed, -2 * speed * level,",
       "early = (speed, -speed * level,", (), ("tests/symbolic/test_tables.py", "-k", "starts_below")),
    _m("jumps where there is no kernel", "solving/fields.py", "scale, Features(self).breaks)", "scale)", (),
       ("tests/solving/test_leaving_domains.py", "-k", "jump_is_an_end")),
    _m("steps that leave the domain", "solvers/watch.py", "torch.full_like(error, _REFUSED)",
       "torch.zeros_like(error)", (), ("tests/solving/test_leaving_domains.py", "-k", "stay_inside")),
    _m("lengths of given steps", "solvers/clock.py", "return at, np.abs(np.diff(ends)) + np.zeros_like(at)",
       "return at, np.ones_like(at)", (), ("tests/solvers/test_grids.py", "-k", "one_row")),
    _m("the side of an end", "numerics/compile.py", "low, high = (inside if self._jumps[0]",
       "low, high = (-inside if self._jumps[0]", (), ("tests/solvers/test_ends.py", "-k", "limits")),
    _m("what a jump is", "numerics/compile.py", "(at - beside).abs() > _JUMP * (beside - further).abs()",
       "(at - further).abs() > _JUMP * (at - beside).abs()", (), ("tests/solvers/test_ends.py", "-k", "limits")),
    _m("the side of a cutoff", "solvers/problem.py", "short * (from_break or low > self.clock.cutoff)",
       "short * (low > self.clock.cutoff)", (), ("tests/solvers/test_ends.py", "-k", "cutoff")),
    _m("1 - cos without cancellation", "numerics/compile.py", "2 * constant * sp.sin(z / 2) ** 2",
       "constant * sp.sin(z / 2) ** 2", (), ("tests/numerics/test_compile.py", "-k", "nothing_cancels")),
    _m("rule of powers", "symbolic/derivative.py", "return power * base ** (power - 1)", "return base ** (power - 1)",
       ("folds",), ("tests/symbolic/test_declaration.py",)),
    _m("½ of Stratonovich's correction", "symbolic/declaration.py", "for n in range(m)) / 2", "for n in range(m))", (),
       ("tests/symbolic/test_declaration.py", "-k", "stratonovich")),
    _m("ends of a quadratic", "symbolic/domain.py", "sp.sqrt(b**2 - 4 * a * c) / (2 * a)",
       "sp.sqrt(b**2 - 4 * a * c) / a", (), ("tests/solving/test_boundary.py",)),
    _m("where a line meets a level", "numerics/breakpoints.py", "(Fraction(level) - start) / slope",
       "(Fraction(level) + start) / slope", (), ("tests/kernels/test_narrow_features.py", "-k", "break_points")),
    _m("disc of a square", "symbolic/enclosure.py", "u.radius * (2.0 * size + u.radius)", "u.radius * size", (),
       ("tests/kernels/test_narrow_features.py", "-k", "discs")),
    _m("a zero up to rounding at an edge", "symbolic/ranges.py", "0.0, low)", "low, low)", (),
       ("tests/kernels/test_narrow_features.py", "-k", "infinite_at_an_edge")),
    _m("range of a modulus", "symbolic/ranges.py", "return Range(low, np.maximum(", "return Range(low, np.minimum(", (),
       ("tests/kernels/test_narrow_features.py", "-k", "ranges")),
    _m("the Fokker-Planck equation that is shown", "symbolic/derivation/gaussian.py",
       "spread = (score.T * Q * score)[0] / 2", "spread = (score.T * Q * score)[0]", (),
       ("tests/proof/test_derivation.py",)),
    _m("the variance equation that is shown", "symbolic/derivation/pearson.py", "2 * sp.diff(f, x) * var + mean_square",
       "sp.diff(f, x) * var + mean_square", (), ("tests/proof/test_derivation.py",)),
    _m("names that say nothing", "symbolic/arguments.py", "(not known and len(symbols) > 1)", "False", (),
       ("tests/test_entrances.py", "-k", "do_not_show")),
    _m("an offset in brackets", "symbolic/affine.py", "inner[0]), scale * inner[1]", "inner[0]), inner[1]",
       (), ("tests/symbolic/test_declaration.py", "-k", "affine_drifts_split")),
)  # fmt: skip


def misplaced(root: Path = ROOT) -> list[str]:
    """The mutations whose text does not stand exactly once in its file, or whose tests are in no file."""
    return [f"{mutation.name}: {wrong}" for mutation in MUTATIONS if (wrong := _wrong(mutation, root))]


def _wrong(mutation: Mutation, root: Path = ROOT) -> str:
    """Why a mutation cannot be planted or judged; "" where it can."""
    path = root / "sdeflow" / mutation.file
    count = path.read_text().count(mutation.old) if path.exists() else 0
    if count != 1:
        return f"{mutation.old!r} stands {count} times in {mutation.file}"
    lost = [part for part in mutation.tests if part.endswith(".py") and not (root / part).exists()]
    if lost or not (mutation.sdes or mutation.tests):
        return f"there is no {', '.join(lost)}" if lost else "nothing is to find it"
    return ""


# -------------------------------------------------------------------- one mutation


def _verified(names: Iterable[str]) -> Iterator[str]:
    """The SDEs whose certificates fail, or cannot be made, each with what fails."""
    import sdeflow.kernels.gaussian
    import sdeflow.proof.certificate
    import sdeflow.symbolic.conditioned

    if hasattr(sdeflow.kernels.gaussian, "integrate_within"):
        sdeflow.kernels.gaussian.integrate_within = lambda *args, **options: None  # integrals stay: no seconds of SymPy
    sdeflow.symbolic.conditioned._SECONDS = sdeflow.proof.certificate._SECONDS = 60.0  # however slow the machine is
    warnings.simplefilter("ignore")
    made = sdes()
    for name in names:
        try:
            certificate = made[name]().verify()
        except Exception as error:  # a mistake may well break what it is in
            yield f"{name}: {type(error).__name__}"
        else:
            if not certificate:
                yield f"{name}: {[*certificate.missing, *(check.name for check in certificate.failures)][-1]}"


def _tested(arguments: Iterable[str]) -> tuple[list[str], int]:
    """The tests that fail, and how pytest ends."""
    import pytest

    class Failed:
        def __init__(self) -> None:
            self.names: list[str] = []

        def pytest_runtest_logreport(self, report: object) -> None:
            if report.failed:
                self.names.append(report.nodeid)

    failed = Failed()
    quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=no", "--rootdir=."]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = pytest.main([*quiet, *arguments], plugins=[failed])
    return failed.names, int(code)


def _judged(mutation: Mutation) -> tuple[str, str]:
    """Who finds a mutation in the copy that is the working folder, and where."""
    for found in _verified(mutation.sdes):
        return "verify", found
    if not mutation.tests:
        return "", ""
    failed, code = _tested(["-x", *mutation.tests])
    if failed:
        return "tests", failed[0]
    if code in (4, 5):
        return "ERROR", f"no test is picked by {' '.join(mutation.tests)}"
    return ("tests", f"pytest ends with {code}") if code else ("", "")


def _fails_without(sdes_: Iterable[str], tests: Iterable[str]) -> list[str]:
    """The SDEs and tests that fail in the copy that is the working folder, without a mutation."""
    names = [found.partition(":")[0] for found in _verified(sdes_)]
    if tests:
        failed, code = _tested(tests)
        names += failed or ([f"pytest ends with {code}"] if code else [])
    return names


def _in_copy(mutation: Mutation | None, folder: Path, judge: Callable[[], object], seconds: int) -> int:
    """The process that calls ``judge`` in a copy made in ``folder``, and writes what it returns to a file there."""
    for part in ("sdeflow", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutation is not None:
        path = folder / "sdeflow" / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
    if child := os.fork():
        return child
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        answer = judge()
    except BaseException:  # such as of an import that the mutation breaks
        answer = "verify", traceback.format_exc().splitlines()[-1]
    (folder / _ANSWER).write_text(json.dumps(answer))
    os._exit(0)


def _ended(folder: Path, status: int, seconds: float) -> object:
    """What a process found, from its folder and how it ended."""
    try:
        return json.loads((folder / _ANSWER).read_text())
    except (OSError, ValueError):
        end = "is too slow" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU else "breaks off"
        return "end", f"the process {end} after {seconds:.0f} s"


class Verdict(NamedTuple):
    """Who ("verify", "tests", "end", "ERROR" or "") found a mutation, and where."""

    mutation: Mutation
    who: str
    where: str

    @property
    def judge(self) -> str:
        """The SDE or the test that found it, which can be asked again."""
        return self.where.partition(":")[0] if self.who == "verify" else self.where


def _verdicts(mutations: list[Mutation], jobs: int) -> Iterator[tuple[Verdict, float]]:
    """Each verdict as it is found, with the seconds of process time that it took; ``jobs`` processes at once."""
    waiting, running = mutations[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutation = waiting.pop()
            if wrong := _wrong(mutation):
                yield Verdict(mutation, "ERROR", wrong), 0.0
                continue
            folder = tempfile.TemporaryDirectory()
            child = _in_copy(mutation, Path(folder.name), functools.partial(_judged, mutation), SECONDS)
            running[child] = mutation, folder
        if not running:
            return
        child, status, usage = os.wait3(0)
        mutation, folder = running.pop(child)
        seconds = usage.ru_utime + usage.ru_stime
        who, where = _ended(Path(folder.name), status, seconds)
        folder.cleanup()
        yield Verdict(mutation, who, where), seconds


def _unsound(verdicts: list[Verdict]) -> tuple[list[str], float]:
    """What found mutations, and fails without one too; and the seconds that it took."""
    sdes_ = dict.fromkeys(v.judge for v in verdicts if v.who == "verify" and v.judge in v.mutation.sdes)
    tests = dict.fromkeys(v.judge for v in verdicts if v.who == "tests" and "::" in v.judge)
    with tempfile.TemporaryDirectory() as folder:
        child = _in_copy(None, Path(folder), functools.partial(_fails_without, list(sdes_), list(tests)), 10 * SECONDS)
        _, status, usage = os.wait4(child, 0)
        seconds = usage.ru_utime + usage.ru_stime
        return list(_ended(Path(folder), status, seconds)), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names or files of the mutations to run; all by default")
    parser.add_argument("--list", action="store_true", help="print the mutations and end")
    parser.add_argument("--verify", action="store_true", help="run no tests, and nothing that verify() does not visit")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    chosen = parser.parse_args()
    mutations = [m for m in MUTATIONS if not chosen.words or any(w in f"{m.name} {m.file}" for w in chosen.words)]
    if chosen.verify:
        mutations = [m._replace(tests=()) for m in mutations if m.sdes]
    if chosen.list:
        print("\n".join(f"{m.file:28s} {m.name}" for m in mutations))
        return 0
    # Loaded once, forked often.
    import mpmath, numpy, pytest, scipy.integrate, scipy.interpolate, scipy.stats, sympy, torch  # noqa: E401, F401, I001
    import torchdiffeq, torchsde  # noqa: E401, F401

    torch.set_num_threads(1)
    verdicts, spent = [], 0.0
    for verdict, seconds in _verdicts(mutations, chosen.jobs):
        verdicts.append(verdict)
        spent += seconds
        mutation, who, where = verdict
        print(f"{who or 'ALIVE':7s} {mutation.file:28s} {mutation.name:40s} {where} ({seconds:.0f} s)", flush=True)
    unsound, seconds = _unsound(verdicts)
    return _summary(verdicts, unsound, spent + seconds)


def _summary(verdicts: list[Verdict], unsound: list[str], spent: float) -> int:
    """Prints the share found and who survived; 0 where it is enough and nothing went wrong."""
    errors = [v for v in verdicts if v.who == "ERROR"]
    alive = [v.mutation for v in verdicts if not v.who]
    seen = [v for v in verdicts if v.who != "ERROR" and (v.who or not v.mutation.hidden)]
    found = [v for v in seen if v.who and v.judge not in unsound]
    counts = Counter(v.who for v in found)
    share = 100 * len(found) / max(len(seen), 1)
    print(
        f"\nfound: {len(found)} of {len(seen)} that a user sees ({share:.1f} %; {counts['verify']} by verify(), "
        f"{counts['tests']} by tests, {counts['end']} by the end of the process), in {spent:.0f} s of process time"
    )
    for mutation in alive:
        print(f"alive: {mutation.file}: {mutation.name}. {mutation.hidden or 'A test is missing.'}")
    for verdict in found:
        if verdict.mutation.hidden:
            print(f"found after all: {verdict.mutation.file}: {verdict.mutation.name}, by {verdict.where}")
    for verdict in errors:
        print(f"not judged: {verdict.mutation.file}: {verdict.mutation.name}: {verdict.where}")
    for name in unsound:
        print(f"fails without a mutation, so what it found does not count: {name}")
    return int(share < ENOUGH or bool(errors or unsound))


if __name__ == "__main__":
    sys.exit(main())
