"""Our solvers beside those of other libraries: the same problems, the same run, one thread, float32.

    python benchmarks/solvers.py                      # everything, about a quarter of an hour on one core
    python benchmarks/solvers.py --quick              # a rough look, about a minute
    python benchmarks/solvers.py --only flow          # a part: overhead flow stochastic
    python benchmarks/solvers.py --write              # also the tables and figures of the documentation

Parts:

    overhead      what a solver costs outside of the network: microseconds per call with a network of one
                  multiplication, whose own time is subtracted; and our adapters against the libraries by hand
    flow          calls needed until the root-mean-square distance to the converged probability flow from the same
                  x_T is below 1e-2 and 1e-3, for six problems with exact scores
    stochastic    calls needed until samples of the reverse SDE are as close to true samples as these to each other

``python -m pip install -c constraints.txt -e ".[bench]"`` installs the peers, and k-diffusion, whose other
dependencies do not go with NumPy 2, follows with ``python -m pip install --no-deps -c constraints.txt k-diffusion``.
The table says of each peer that is missing that it is not installed. ``benchmarks/problems.py`` defines the problems
and ``benchmarks/peers.py`` how each library is called.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import overhead
import peers
import problems
import torch

PARTS = ("overhead", "flow", "stochastic")
PACKAGES = ("torch", "torchsde", "torchdiffeq", "torchode", "azula", "diffusers", "k-diffusion", "scipy", "numpy")
SHAPES = ((4096, 2), (32, 1, 28, 28))
ROUGH, FINE = 1e-2, 1e-3
DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass
class Table:
    """A table for the terminal and for the documentation.

    Attributes:
        title: a line above it.
        columns: the headings; the first is that of the rows' names.
        rows: cells as text.
        ours: the names of the rows that are sdeflow's.
        notes: sentences below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    ours: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """In columns, for the terminal."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.columns))]
        shown = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
        return "\n".join([f"\n{self.title}", *shown, *self.notes])

    def rst(self) -> str:
        """As a list-table, our rows in bold."""
        lines = [f".. list-table:: {self.title}", "   :header-rows: 1", ""]
        for row in (self.columns, *self.rows):
            cells = [f"**{cell}**" if row[0] in self.ours and cell else cell for cell in row]
            lines += [f"   {'* -' if k == 0 else '  -'} {cell}".rstrip() for k, cell in enumerate(cells)]
        notes = [line for note in self.notes for line in ("", note)]
        return "\n".join([*lines, *notes, ""])


def _aligned(cells: Iterable[str], widths: list[int]) -> list[str]:
    return [cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(cells, widths, strict=True))]


def main() -> int:
    """Runs the parts asked for, and prints or writes their tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated; all by default")
    parser.add_argument("--quick", action="store_true", help="few repeats, two problems: a rough look")
    parser.add_argument("--write", action="store_true", help="write them into docs/benchmarks and docs/images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", module="torchode|torchtyping|torchsde|diffusers")
    print(machine())
    run = {"overhead": overhead_part, "flow": flow_part, "stochastic": stochastic_part}
    for part in arguments.only or PARTS:
        tables, figure = run[part](arguments.quick)
        for table in tables:
            print(table.text(), flush=True)
        if arguments.write:
            write(part, tables, figure)
    return 0


# ---------------------------------------------------------------- overhead

Tables = tuple[list[Table], Callable[[Path], None] | None]


def overhead_part(quick: bool) -> Tables:
    """Both shapes, and the adapters."""
    rounds = 5 if quick else 31
    measured = [measure_overhead(shape, rounds) for shape in SHAPES]
    return [overhead_table(measured), adapter_table(0.12 if quick else 1.0)], None


@dataclass(frozen=True)
class Overhead:
    """Microseconds per call outside of the network, one value a round; or why there are none."""

    solver: peers.Free
    rounds: tuple[float, ...] = ()
    missing: str = ""


def measure_overhead(shape: tuple[int, ...], rounds: int) -> list[Overhead]:
    """All solvers in turn, in every round, each less what the network took in the same round."""
    device = torch.device("cpu")
    ready: dict[peers.Free, Callable[[], int]] = {}
    missing: dict[peers.Free, str] = {}
    for solver in (peers.NETWORK, *peers.FREE):
        try:
            solve = solver.prepare(shape)
            solve()
            ready[solver] = solve
        except Exception as error:
            missing[solver] = reason(error)
    times: dict[peers.Free, list[float]] = {solver: [] for solver in ready}
    for repeat in range(rounds):
        for solver in list(ready)[:: 1 if repeat % 2 else -1]:
            start = overhead.now(device)
            calls = ready[solver]()
            times[solver].append((overhead.now(device) - start) / calls * 1e6)
    network = times.pop(peers.NETWORK)
    outside = {solver: tuple(a - b for a, b in zip(values, network, strict=True)) for solver, values in times.items()}
    return [Overhead(solver, outside.get(solver, ()), missing.get(solver, "")) for solver in peers.FREE]


def overhead_table(measured: list[list[Overhead]]) -> Table:
    """Medians and, for ours, the ratio to the best peer of the same rounds."""
    shapes = [str(shape) for shape in SHAPES]
    columns = ("solver", *(cell for shape in shapes for cell in (f"{shape}, µs a call", "to the best peer")))
    table = Table("Outside of the network: microseconds per call, medians", columns)
    best = [_best_peer(results) for results in measured]
    for results in zip(*measured, strict=True):
        solver = results[0].solver
        cells = [cell for result, peer in zip(results, best, strict=True) for cell in _overhead_cells(result, peer)]
        table.rows.append((solver.name, *cells))
        if solver.ours:
            table.ours.add(solver.name)
    names = " and ".join(f"{peer.solver.name} at {shape}" for peer, shape in zip(best, shapes, strict=True) if peer)
    table.notes.append(
        "Whole solves divided by their calls, less the time of the network alone, all solvers in turn in every round; "
        "the median over the rounds, with quartiles, of each round's time and of its ratio to the best peer "
        f"({names or 'none installed'})."
    )
    return table


def _best_peer(results: list[Overhead]) -> Overhead | None:
    installed = [r for r in results[1:] if r.rounds and not r.solver.ours]  # the first is the bare loop
    return min(installed, key=lambda result: statistics.median(result.rounds), default=None)


def _overhead_cells(result: Overhead, best: Overhead | None) -> tuple[str, str]:
    if not result.rounds:
        return result.missing, ""
    low, middle, high = overhead._quartiles(list(result.rounds))
    if best is None:
        return f"{middle:.0f} ({low:.0f} .. {high:.0f})", ""
    ratios = [a / b for a, b in zip(result.rounds, best.rounds, strict=True)]
    return f"{middle:.0f} ({low:.0f} .. {high:.0f})", f"{statistics.median(ratios):.2f}"


def adapter_table(share: float) -> Table:
    """``benchmarks/overhead.py solvers``: our adapters against torchsde and torchdiffeq by hand."""
    columns = ("adapter", "sdeflow, µs a call", "by hand", "ratio", "quartiles", "target")
    table = Table("Our adapters against the libraries called by hand", columns)
    for row in overhead.solver_rows(torch.device("cpu"), share):
        target = "" if row.target is None else f"{row.target:.2f}"
        quartiles = f"{row.low:.2f} .. {row.high:.2f}"
        table.rows.append((row.name, f"{row.ours:.0f}", f"{row.theirs:.0f}", f"{row.value:.2f}", quartiles, target))
    return table


# ---------------------------------------------------------------- flow


@dataclass(frozen=True)
class Point:
    """The error of one solve.

    Attributes:
        setting: the number of calls asked for, or the tolerance.
        calls: of the score, counted.
        error: root-mean-square distance to the converged solution; infinite where the solve failed.
        failure: why it failed.
    """

    setting: float
    calls: int
    error: float
    failure: str = ""


@dataclass
class Curve:
    """Error against calls of one solver on one problem, from few calls (a loose tolerance) to many.

    Attributes:
        solver: whose.
        points: sorted by setting, loosest first.
        missing: why there are none.
        pilot: calls that the first solve took beyond those it was asked for, once per score.
    """

    solver: peers.Flow
    points: list[Point] = field(default_factory=list)
    missing: str = ""
    pilot: int = 0

    def needed(self, tolerance: float) -> Point | None:
        """The first point from which on the error stays within the tolerance."""
        first = None
        for point in reversed(self.points):
            if point.failure:
                continue
            if not point.error <= tolerance:
                break
            first = point
        return first

    @property
    def failures(self) -> list[str]:
        """What went wrong, once each."""
        return sorted({point.failure for point in self.points if point.failure})


def flow_part(quick: bool) -> Tables:
    """All problems (two of them under ``quick``)."""
    limit = 60 if quick else 250
    chosen = [problems.problem("g64", "VP"), problems.problem("ring", "VE")] if quick else problems.problems()
    curves: dict[str, list[Curve]] = {}
    gaps = []
    for problem in chosen:
        gaps.append(problems.disagreement(problem))
        curves[problem.name] = [flow_curve(solver, problem, limit) for solver in peers.FLOWS]
    return [flow_table(curves, limit, max(gaps))], lambda path: draw_flows(curves, path)


def flow_curve(solver: peers.Flow, problem: problems.Problem, limit: int) -> Curve:
    """Coarsely until three errors in a row are small enough, then call by call where a tolerance is crossed."""
    curve = Curve(solver)
    try:
        curve.pilot = _pilot_calls(solver, problem)
        curve.points = list(_coarse(solver, problem, limit))
    except (ImportError, AttributeError) as error:
        curve.missing = reason(error)
        return curve
    if not solver.adaptive:
        for tolerance in (ROUGH, FINE):
            _refine(curve, problem, tolerance)
    return curve


def _pilot_calls(solver: peers.Flow, problem: problems.Problem) -> int:
    """Of ours: the calls of a first solve beyond those it was asked for, which later solves of the score save."""
    if not solver.ours:
        return 0
    problem.score.start()
    solver.solve(problem, 20)
    return problem.score.calls - 20


def _coarse(solver: peers.Flow, problem: problems.Problem, limit: int) -> Iterator[Point]:
    settings = (10 ** (-k / 4) for k in range(4, 33)) if solver.adaptive else _numbers(limit, solver.calls_per_step)
    good = 0
    for setting in settings:
        point = flow_point(solver, problem, setting)
        if point.calls > limit:
            return
        yield point
        good = good + 1 if point.error <= FINE else 0
        if good == 3 and not solver.adaptive:
            return


def _numbers(limit: int, step: int) -> Iterator[int]:
    """Multiples of ``step`` from 4 calls to the limit, about an eighth apart."""
    n = max(4, step)
    while n <= limit:
        yield n
        n += step * max(1, n // (8 * step))


def _refine(curve: Curve, problem: problems.Problem, tolerance: float) -> None:
    """Adds the numbers of calls just below the first good one, as long as they are good."""
    first = curve.needed(tolerance)
    if first is None:
        return
    known = {point.setting for point in curve.points}
    n = first.setting - curve.solver.calls_per_step
    while n >= curve.solver.calls_per_step and n not in known:
        point = flow_point(curve.solver, problem, n)
        curve.points.append(point)
        if not point.error <= tolerance:
            break
        n -= curve.solver.calls_per_step
    curve.points.sort(key=lambda point: point.setting)


def flow_point(solver: peers.Flow, problem: problems.Problem, setting: float) -> Point:
    """One solve; what it raises, other than not being installed, is its result."""
    problem.score.start()
    x, failure = None, ""
    try:
        x = solver.solve(problem, setting)
    except (ImportError, AttributeError):
        raise
    except Exception as raised:
        failure = reason(raised)
    calls = problem.score.calls
    error = math.inf if x is None else problem.distance(x)
    if x is not None and not math.isfinite(error):
        error, failure = math.inf, "not finite"
    return Point(setting, calls, error, failure)


def flow_table(curves: dict[str, list[Curve]], limit: int, gap: float) -> Table:
    """calls to 1e-2 / calls to 1e-3, for each solver and problem."""
    table = Table("Probability flow: calls to an RMS distance of 1e-2 / 1e-3", ("solver", *curves))
    failures: dict[str, set[str]] = {}
    for row in zip(*curves.values(), strict=True):
        solver = row[0].solver
        table.rows.append((solver.name, *(_flow_cell(curve, limit) for curve in row)))
        if solver.ours:
            table.ours.add(solver.name)
        for curve in row:
            failures.setdefault(solver.name, set()).update(curve.failures)
    table.notes.append(
        "The smallest number of calls from which on the error stays within the tolerance, for every number tried up to "
        f"{limit}; of adaptive solvers the calls of the loosest tolerance, of a scan by quarters of a decade. Two "
        f"converged solutions, Runge-Kutta in log-SNR and DOP853 in t, are {gap:.0e} apart at most."
    )
    table.notes.append(
        "From 64 draws of x_T on g64 and 256 on the ring. On g64 the error of a larger batch is that of the few "
        "samples that start near the boundary between two modes: every solver needs more calls for it."
    )
    for name, reasons in failures.items():
        if reasons:
            table.notes.append(f"\\* {name} failed at some settings: {'; '.join(sorted(reasons))}.")
    pilots = sorted({curve.pilot for row in curves.values() for curve in row if curve.pilot > 0})
    if pilots:
        span = f"{pilots[0]}" if len(pilots) == 1 else f"{pilots[0]} to {pilots[-1]}"
        table.notes.append(f"A pilot run takes {span} more calls of few samples once per score, not counted here.")
    return table


def _flow_cell(curve: Curve, limit: int) -> str:
    if curve.missing:
        return curve.missing
    beyond = "fails" if curve.failures else f">{limit}"
    needed = [curve.needed(tolerance) for tolerance in (ROUGH, FINE)]
    shown = "/".join(beyond if point is None else str(point.calls) for point in needed)
    return f"{shown}*" if curve.failures else shown


# ---------------------------------------------------------------- stochastic


@dataclass
class Sampler:
    """Sliced W2 against calls of one sampler on one problem.

    Attributes:
        sampler: whose.
        distances: calls -> the mean over seeds.
        missing: why there are none.
    """

    sampler: peers.Stochastic
    distances: dict[int, float] = field(default_factory=dict)
    missing: str = ""


@dataclass
class Truth:
    """True samples, and how far apart sets of them are.

    Attributes:
        samples: (n, d).
        noise: the sliced W2 between ``samples`` and further sets of as many, sorted.
    """

    samples: torch.Tensor
    noise: list[float]

    @property
    def threshold(self) -> float:
        """What 95 % of true sets stay below."""
        return self.noise[math.ceil(0.95 * len(self.noise)) - 1]


def stochastic_part(quick: bool) -> Tables:
    """The ring and g64 under VP."""
    size, seeds, limit = (1000, 1, 60) if quick else (2000, 4, 250)
    chosen = [problems.problem(law, "VP") for law in problems.LAWS]
    truths = {problem.name: true_samples(problem, size) for problem in chosen}
    results = {
        problem.name: [sampler_curve(s, problem, truths[problem.name], seeds, limit) for s in peers.STOCHASTIC]
        for problem in chosen
    }
    return [stochastic_table(results, truths, seeds, limit)], lambda path: draw_samplers(results, truths, path)


def true_samples(problem: problems.Problem, size: int, sets: int = 40) -> Truth:
    """``size`` true samples, and ``sets`` more of them to compare with."""
    samples = problem.truth(size, seed=0)
    noise = sorted(problems.sliced_w2(samples, problem.truth(size, seed=seed)) for seed in range(1, sets + 1))
    return Truth(samples, noise)


def sampler_curve(
    sampler: peers.Stochastic, problem: problems.Problem, truth: Truth, seeds: int, limit: int
) -> Sampler:
    """Until two numbers of calls in a row are within the noise."""
    result, good = Sampler(sampler), 0
    for calls in (n for n in _ladder(limit) if n % sampler.calls_per_step == 0):
        try:
            result.distances[calls] = statistics.fmean(
                _sample_distance(sampler, problem, truth, calls, seed) for seed in range(seeds)
            )
        except Exception as error:
            result.missing = reason(error)
            return result
        good = good + 1 if result.distances[calls] <= truth.threshold else 0
        if good == 2:
            break
    return result


def _sample_distance(
    sampler: peers.Stochastic, problem: problems.Problem, truth: Truth, calls: int, seed: int
) -> float:
    samples = sampler.sample(problem, calls, len(truth.samples), seed)
    if not bool(torch.isfinite(samples).all()):
        return math.inf
    return problems.sliced_w2(truth.samples, samples)


def _ladder(limit: int) -> list[int]:
    return [n for n in (6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 250) if n <= limit]


def stochastic_table(results: dict[str, list[Sampler]], truths: dict[str, Truth], seeds: int, limit: int) -> Table:
    """Calls needed, and the distance there."""
    table = Table("Reverse SDE: calls until samples are within the noise of true ones", ("sampler", *results))
    for row in zip(*results.values(), strict=True):
        sampler = row[0].sampler
        cells = [_sampler_cell(result, truths[name], limit) for name, result in zip(results, row, strict=True)]
        table.rows.append((sampler.name, *cells))
        if sampler.ours:
            table.ours.add(sampler.name)
    size = len(next(iter(truths.values())).samples)
    levels = ", ".join(f"{truth.threshold:.3g} for {name}" for name, truth in truths.items())
    table.notes.append(
        f"Within the noise: the sliced W2 of {size:,} samples to {size:,} true ones (128 directions), averaged over "
        f"{seeds} seeds, is below what 95 % of {len(next(iter(truths.values())).noise)} other true sets reach "
        f"({levels}), at this number of calls and the next one tried."
    )
    return table


def _sampler_cell(result: Sampler, truth: Truth, limit: int) -> str:
    if result.missing:
        return result.missing
    within = None
    for calls in reversed(result.distances):
        if not result.distances[calls] <= truth.threshold:
            break
        within = calls
    return f">{limit}" if within is None else str(within)


# ---------------------------------------------------------------- figures

# Colours that stay apart for colour-blind readers (Okabe and Ito, 2008); ours are the two strong ones.
_COLOURS = {
    "torchdiffeq rk4 in t": "#999999",
    "azula DDIM": "#56B4E9",
    "azula vAB3": "#0072B2",
    "k-diffusion dpmpp_2m, Karras": "#E69F00",
    "diffusers UniPC3, uniform log-SNR": "#CC79A7",
    "sdeflow order 2, pilot": "#009E73",
    "sdeflow order 3, pilot": "#D55E00",
    "Euler-Maruyama in t": "#999999",
    "torchsde srk in t": "#56B4E9",
    "k-diffusion dpmpp_2m_sde, Karras": "#E69F00",
    "sdeflow order 2, eta 1, log-SNR": "#009E73",
    "sdeflow order 2, eta 1, pilot": "#D55E00",
}


def draw_flows(curves: dict[str, list[Curve]], path: Path) -> None:
    """Error against calls, one panel a problem."""
    figure, axes = _panels(len(curves))
    for (name, row), ax in zip(curves.items(), axes, strict=True):
        for curve in row:
            points = [(point.calls, point.error) for point in curve.points if math.isfinite(point.error)]
            _draw_line(ax, curve.solver.name, curve.solver.ours, points)
        for tolerance in (ROUGH, FINE):
            ax.axhline(tolerance, color="0.7", linewidth=0.8, linestyle=":")
        ax.set(title=name, xscale="log", yscale="log", xlim=(5, 200), ylim=(2e-4, 1))
    _finish(figure, axes, "RMS distance to the converged flow", path)


def draw_samplers(results: dict[str, list[Sampler]], truths: dict[str, Truth], path: Path) -> None:
    """Sliced W2 against calls, one panel a problem, with the band of the noise."""
    figure, axes = _panels(len(results))
    for (name, row), ax in zip(results.items(), axes, strict=True):
        for result in row:
            points = [(calls, value) for calls, value in result.distances.items() if math.isfinite(value)]
            _draw_line(ax, result.sampler.name, result.sampler.ours, points)
        noise = truths[name].noise
        ax.axhspan(noise[0], truths[name].threshold, color="0.9", zorder=0)
        ax.text(6, noise[0], "true samples", fontsize=7, color="0.4", va="bottom")
        ax.set(title=name, xscale="log", yscale="log", xlim=(5, 300))
    _finish(figure, axes, "sliced W2 to true samples", path)


def _draw_line(ax, name: str, ours: bool, points: list[tuple[float, float]]) -> None:
    if name in _COLOURS and points:
        ax.plot(
            *zip(*points, strict=True),
            color=_COLOURS[name], label=name, marker="o", markersize=2.5, linewidth=2.2 if ours else 1.1,
            zorder=3 if ours else 2,
        )  # fmt: skip


def _panels(n: int) -> tuple:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(n, 3)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.8 * rows + 0.6), sharex=True, sharey=rows > 1, squeeze=False
    )
    return figure, list(axes.flat)[:n]


def _finish(figure, axes: list, label: str, path: Path) -> None:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    for ax in axes:
        ax.grid(color="0.93", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_locator(LogLocator(subs=(3.0, 4.0, 6.0, 7.0, 8.0, 9.0)))
        ax.xaxis.set_minor_formatter(lambda value, position: "")
    figure.supxlabel("calls of the network", fontsize=9)
    figure.supylabel(label, fontsize=9)
    entries = {name: line for ax in axes for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        entries.values(), entries, loc="upper center", ncols=min(3, len(axes) + 1), fontsize=8, frameon=False,
        bbox_to_anchor=(0.5, 1.0),
    )  # fmt: skip
    rows = math.ceil(len(entries) / min(3, len(axes) + 1))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.21 * rows / figure.get_figheight()))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- writing


def write(part: str, tables: list[Table], figure: Callable[[Path], None] | None) -> None:
    """docs/benchmarks/solvers_<part>.inc, to be included, and docs/images/solvers_<part>.png."""
    target = DOCS / "benchmarks" / f"solvers_{part}.inc"
    target.parent.mkdir(parents=True, exist_ok=True)
    image = DOCS / "images" / f"solvers_{part}.png"
    source = f".. Written by: python benchmarks/solvers.py --only {part} --write\n"
    blocks = [source, *(table.rst() for table in tables)]
    if figure is not None:
        figure(image)
        blocks.append(f".. image:: /images/{image.name}\n   :alt: {tables[0].title}\n")
    blocks.append(f"Measured: {machine('; ')}.\n")
    target.write_text("\n".join(blocks), encoding="utf-8")
    print(f"wrote {target}")


def machine(separator: str = "\n") -> str:
    """Date, processor, threads and versions."""
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    lines = (
        f"{datetime.date.today().isoformat()}, {overhead._processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread, float32",
        f"sdeflow {_version('sdeflow')}, Python {platform.python_version()}, {versions}",
    )
    return separator.join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def reason(error: Exception) -> str:
    """Why there is no figure, short enough for a cell."""
    if isinstance(error, ImportError):
        return "not there yet" if "not there yet" in str(error) else "not installed"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}".rstrip(": ")


if __name__ == "__main__":
    started = time.perf_counter()
    status = main()
    print(f"\n{time.perf_counter() - started:.0f} s")
    sys.exit(status)
