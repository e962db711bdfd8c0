"""How many samples the error bars cover: within two bars of the truth, in every mode that returns a bar.

    python benchmarks/coverage.py [--samples 80] [--write]

Exact mixtures of Gaussians, whose log-density at the cutoff is known, in 2 to 12 dimensions, under long and short
schedules. For each mode the part of the samples of all problems that is within two bars, the least of it in a problem,
and the median bar over the median error. ``--write`` renews the table in docs/benchmarks/coverage.inc.
"""

from __future__ import annotations

import argparse
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import sdeflow
from sdeflow import SDE, catalog
from sdeflow.dynamics import FlowODE
from sdeflow.errors import PriorMismatchWarning
from sdeflow.likelihood.bounds import Elbo
from sdeflow.likelihood.budget import prior_mismatch
from sdeflow.likelihood.dequantisation import TruncatedNormal, Uniform
from sdeflow.likelihood.dequantisation import bits_per_dim as bits_of
from sdeflow.scores import GaussianMixture
from sdeflow.solvers import Torchdiffeq

Found = tuple[Tensor, Tensor]  # errors and bars, (samples,) each
LOG2 = math.log(2.0)


class Learned(GaussianMixture):
    """An exact score that is known as a network is, by the data's moments: they give the prior."""

    def marginal_law(self, t: float) -> None:
        return None


@dataclass(frozen=True)
class Problem:
    """A mixture under an SDE, and ``samples`` points of its law at the cutoff."""

    name: str
    sde: SDE
    exact: GaussianMixture
    samples: int

    @functools.cached_property
    def flow(self) -> FlowODE:
        return self.sde.flow_ode(self.exact)

    @functools.cached_property
    def data(self) -> Tensor:
        return self.exact.sample(self.samples, seed=0, dtype=torch.float64)

    @functools.cached_property
    def points(self) -> Tensor:
        sde = self.sde
        states = sde.lift(self.data[:, 0], seed=2) if sde.declaration.auxiliary else self.data
        return sde.kernel.sample(states, sde.cutoff, seed=1)

    @functools.cached_property
    def density(self) -> Tensor:
        """log p of the points at the cutoff, exactly."""
        return self.exact.log_prob(self.points, self.sde.cutoff)

    @functools.cached_property
    def converged(self) -> Tensor:
        """log p of the points as an exact solve of the flow from its prior gives it."""
        return self.flow.log_prob(self.points, rtol=1e-8, atol=1e-8)

    @functools.cached_property
    def bound(self) -> Elbo:
        """The bound of very many draws."""
        return self.sde.reverse(self.exact).elbo(self.data, draws=1024, seed=9)

    @functools.cache  # noqa: B019
    def value(self, steps: int) -> Tensor:
        """log p on one grid with the exact trace."""
        return self.flow.log_prob(self.points, steps=steps)


def _ring(d: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(6, dtype=torch.float64) * math.pi / 3
    means = torch.zeros(6, d, dtype=torch.float64)
    means[:, 0], means[:, 1] = angle.cos(), angle.sin()
    return means, torch.linspace(0.01, 0.05, 6, dtype=torch.float64)


def _wide(d: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(d)
    means = torch.randn(4, d, generator=draw, dtype=torch.float64)
    return means, 0.1 + 0.5 * torch.rand(4, d, generator=draw, dtype=torch.float64)


def _scales(d: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(d)
    means = torch.randn(3, d, generator=draw, dtype=torch.float64)
    return means, 10.0 ** (-3.0 * torch.rand(3, d, generator=draw, dtype=torch.float64))


def _two(d: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([[-1.0] * d, [1.0] * d], dtype=torch.float64), torch.tensor([0.04, 0.01], dtype=torch.float64)


def problems(samples: int) -> list[Problem]:
    """Six of elementwise SDEs."""
    given = {
        "VP, ring, d = 2": (catalog.VP(), _ring(2)),
        "sub-VP, two modes, d = 3": (catalog.SubVP(), _two(3)),
        "VE, scales, d = 4": (catalog.VE(), _scales(4)),
        "flow matching, scales, d = 6": (catalog.FlowMatching(), _scales(6)),
        "OU to T = 0.5, wide, d = 8": (catalog.OU(T=0.5), _wide(8)),
        "VP, wide, d = 12": (catalog.VP(), _wide(12)),
    }
    return [Problem(name, sde, Learned(sde, *law), samples) for name, (sde, law) in given.items()]


def coupled(samples: int) -> list[Problem]:
    """Two of critically damped Langevin dynamics."""
    sde = catalog.CriticallyDampedLangevin()
    laws = {"ring, d = 2": _ring(2), "wide, d = 4": _wide(4)}
    return [Problem(name, sde, Learned(sde, *law), samples) for name, law in laws.items()]


def by_solver(**options: object) -> Callable[[Problem], Found]:
    """The solver's error, against the converged flow."""

    def found(problem: Problem) -> Found:
        found = problem.flow.log_prob(problem.points, full=True, **options)
        return found.value - problem.converged, found.solver_error

    return found


def by_trace(steps: int = 20, **options: object) -> Callable[[Problem], Found]:
    """The trace's error in so many calls, against the exact trace on the same grid."""

    def found(problem: Problem) -> Found:
        found = problem.flow.log_prob(problem.points, steps=steps, full=True, seed=3, **options)
        # In so few dimensions some probes are the exact trace, to rounding.
        return found.value - problem.value(steps), found.stderr + 1e-9

    return found


def by_all(**options: object) -> Callable[[Problem], Found]:
    """Everything between log p at the cutoff and the truth."""

    def found(problem: Problem) -> Found:
        found = problem.flow.log_prob(problem.points, full=True, seed=4, **options)
        parts = (found.stderr, found.solver_error, found.prior_mismatch, found.prior_error)
        return found.value - problem.density, torch.stack(parts).norm(dim=0)

    return found


def by_prior(problem: Problem) -> Found:
    """The prior's part itself at T, for a dozen mixtures like this one: its constant is one draw for each of them."""
    sde, exact, errors, bars = problem.sde, problem.exact, [], []
    draw = torch.Generator().manual_seed(0)
    for _ in range(12):
        means = exact.means + 0.3 * torch.randn(exact.means.shape, generator=draw, dtype=torch.float64)
        other = Learned(sde, means, exact.variances)
        x_T = sde.kernel.sample(other.sample(8, seed=0, dtype=torch.float64), sde.T, seed=1)
        model = sde.flow_ode(other).model
        found, bar = prior_mismatch(model, x_T, torch.float64)
        errors.append(found - other.log_prob(x_T, sde.T) + model.prior_for(x_T).log_prob(x_T))
        bars.append(bar + 1e-12)
    return torch.cat(errors), torch.cat(bars)


def by_elbo(times: str, draws: int) -> Callable[[Problem], Found]:
    """The bound of a sample, against one of very many draws."""

    def found(problem: Problem) -> Found:
        many = problem.bound
        few = problem.sde.reverse(problem.exact).elbo(problem.data, times=times, draws=draws, seed=5)
        return few.value - many.value, torch.hypot(few.error, many.stderr)

    return found


def by_kl_bound(problem: Problem) -> Found:
    """The bound of the divergence from 32 samples, for a score that is off by a tenth."""
    exact = problem.exact
    reverse = problem.sde.reverse(lambda x, t: 0.9 * exact(x, t), prior=problem.sde.prior_for(*exact.data_moments()))
    truth = reverse.kl_bound(exact.sample(4096, seed=1, dtype=torch.float64), exact, draws=8, seed=1)
    few = [
        reverse.kl_bound(exact.sample(32, seed=s, dtype=torch.float64), exact, draws=4, seed=s)
        for s in range(2, 2 + problem.samples // 3)
    ]
    found = torch.tensor([[bound.value - truth.value, bound.error] for bound in few], dtype=torch.float64)
    return found[:, 0], found[:, 1]


def by_dequantisation(scheme: str, draws: int, importance: bool) -> Callable[[int], Found]:
    """Bits per dimension of images of two pixels under a known mixture, against the mass of their bins."""

    def found(samples: int) -> Found:
        levels, width = 8, 0.25
        centres = torch.tensor([-0.4, 0.3], dtype=torch.float64)
        images = torch.randint(1, 7, (samples, 2), generator=torch.Generator().manual_seed(0))

        def log_prob(x: Tensor) -> Tensor:
            each = torch.distributions.Normal(centres, width).log_prob(x[..., None])
            return (torch.logsumexp(each, -1) - LOG2).sum(-1)

        step = 2.0 / levels
        laws = {"uniform": Uniform(), "eighth": TruncatedNormal(step / 8.0), "half": TruncatedNormal(step / 2.0)}
        options = {"levels": levels, "low": -1.0, "high": 1.0, "dequantise": laws[scheme], "dtype": torch.float64}
        bits = bits_of(log_prob, images, draws=draws, importance=importance, seed=1, **options)
        if importance:
            edges = torch.special.ndtr((-1.0 + step * torch.stack([images, images + 1])[..., None] - centres) / width)
            truth = -(edges[1] - edges[0]).mean(-1).log().sum(-1) / (2.0 * LOG2)
        else:
            truth = bits_of(log_prob, images, draws=4096, importance=False, seed=2, **options).value
        return bits.value - truth, bits.stderr

    return found


SOLVERS = {
    **{f"``steps={n}``": by_solver(steps=n) for n in (3, 4, 6, 8, 10, 12, 16, 20, 30, 40)},
    **{f'``steps={n}, grid="pilot"``': by_solver(steps=n, grid="pilot") for n in (10, 20, 40)},
    "default": by_solver(),
    **{f"``atol={atol}``": by_solver(atol=atol) for atol in (0.3, 0.1, 0.01)},
    **{f'``Torchdiffeq("{m}")``, {n} steps': by_solver(solver=Torchdiffeq(m), steps=n)
       for m, n in (("euler", 5), ("euler", 30), ("heun2", 5), ("heun2", 20), ("rk4", 5), ("rk4", 15))},
    **{f"dopri5, tolerance {tol:g}": by_solver(rtol=tol, atol=tol) for tol in (1e-2, 1e-3, 1e-5)},
    **{f"{m}, tolerance {tol:g}": by_solver(solver=Torchdiffeq(m), rtol=tol, atol=tol)
       for m, tol in (("adaptive_heun", 1e-2), ("fehlberg2", 1e-1), ("fehlberg2", 1e-3), ("bosh3", 1e-2),
                      ("dopri8", 1e-2), ("dopri8", 1e-5))},
}  # fmt: skip
TRACES = {
    **{f"hutchinson, {m} probes": by_trace(trace="hutchinson", probes=m) for m in (2, 4, 8, 16)},
    **{f"hutchinson, {m} normal probes": by_trace(trace="hutchinson", probe="gaussian", probes=m) for m in (4,)},
    **{f"hadamard, {m} columns": by_trace(trace="hadamard", probes=m) for m in (2, 4, 8)},
    **{f"hutch++, {m} products": by_trace(trace="hutch++", probes=m) for m in (6, 12)},
}
ALL = {
    "``steps=20``": by_all(steps=20),
    "``steps=8``": by_all(steps=8),
    **{f"``steps=20``, {trace}, {m}": by_all(steps=20, trace=trace, probes=m)
       for trace, m in (("hutchinson", 4), ("hadamard", 2), ("hutch++", 6))},
    **{f"dopri5, {m} fixed probes": by_all(rtol=1e-3, atol=1e-3, probes=m) for m in (2, 4, 8)},
    "``atol=0.05``, hadamard, 2": by_all(atol=0.05, trace="hadamard", probes=2),
    "the prior's part": by_prior,
}  # fmt: skip
COUPLED = {
    **{f"``steps={n}``": by_solver(steps=n) for n in (10, 20, 40, 60)},
    "``atol=0.1``": by_solver(atol=0.1),
}
BOUNDS = {
    **{f'elbo, ``times="{times}"``, {n} draws': by_elbo(times, n) for times in ("log_snr", "t") for n in (4, 16, 64)},
    "kl_bound, 32 samples": by_kl_bound,
}
BITS = {
    f"{name}, {draws} draws, {'weights' if importance else 'mean'}": by_dequantisation(scheme, draws, importance)
    for scheme, name in (
        ("uniform", "uniform"),
        ("eighth", "normal, 1/8 of a bin"),
        ("half", "normal, 1/2 of a bin"),
    )
    for importance in (True, False)
    for draws in (4, 16)
}


def coverage(found: Found) -> tuple[int, int]:
    """How many errors are within two bars, and of how many."""
    error, bar = found
    return int((error.abs() <= 2.0 * bar).sum()), len(error)


def row(name: str, parts: list[Found]) -> tuple[str, str, str, str]:
    """What the table says of a mode."""
    counts = [coverage(part) for part in parts]
    share = sum(k for k, _ in counts) / sum(n for _, n in counts)
    least = min(k / n for k, n in counts)
    ratios = [float(bar.median() / error.abs().median()) for error, bar in parts if float(error.abs().median()) > 1e-8]
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else ""
    return name, f"{100 * share:.1f} %", f"{100 * least:.0f} %", spread


def table(samples: int, only: str = "") -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """All rows, by groups."""
    plain, pair = problems(samples), coupled(samples)
    groups = [
        ("the solver", SOLVERS, plain),
        ("the trace, 20 calls", TRACES, plain),
        ("all of it, at the cutoff", ALL, plain),
        ("coupled states, the solver", COUPLED, pair),
        ("bounds", BOUNDS, plain),
        ("bits per dimension", BITS, [samples]),
    ]
    result = []
    for title, modes, where in groups:
        if only not in title:
            continue
        rows = []
        for name, mode in modes.items():
            rows.append(row(name, [mode(problem) for problem in where]))
            print(f"{title}: {'  '.join(rows[-1])}", flush=True)
        result.append((title, rows))
    return result


def rst(groups: list[tuple[str, list[tuple[str, str, str, str]]]]) -> str:
    """The table as reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 52 16 16 16", ""]
    lines += ["   * - mode", "     - within two bars", "     - least of a problem", "     - bar / error, medians"]
    for title, rows in groups:
        lines += [f"   * - **{title}**", "     -", "     -", "     -"]
        for cells in rows:
            lines += [f"   * - {cells[0]}", *(f"     - {cell}".rstrip() for cell in cells[1:])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--only", default="", help="groups whose title has this in it")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/coverage.inc")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PriorMismatchWarning)  # some do not fit, on purpose
    groups = table(options.samples, options.only)
    if options.write:
        path = Path(__file__).parent.parent / "docs" / "benchmarks" / "coverage.inc"
        path.write_text(rst(groups))
        print(f"sdeflow {sdeflow.__version__}: {path}")


if __name__ == "__main__":
    main()
