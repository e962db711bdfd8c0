r"""The coefficients of a Gaussian kernel as functions of t: alpha, sigma, offset, and the log-SNR with its inverse.

Their numbers come by quadrature, or from a closed form that was compared with it on the whole horizon (1e-11 relative).
They are float64, and follow parameters that are tensors: a value that changed in place is seen at the next call, and
gradients flow to those that need one.

half_log_snr is log(alpha / sigma) elementwise, and in general the mean over the data's components and
coordinates of ½ log J, J = diag(Φᵀ P⁻¹ Φ) the Fisher information that the state holds of x_0: it falls
in time for every SDE.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from sdeflow.errors import DeclarationError, ScheduleError, TooLargeError
from sdeflow.kernels.continuity import Readings, require_continuous
from sdeflow.numerics.breakpoints import break_points
from sdeflow.numerics.chebyshev import NODES, geometric_edges, nodes_of
from sdeflow.numerics.checks import checked_numbers
from sdeflow.numerics.compile import Compiled, compile_expressions
from sdeflow.numerics.parameters import Values
from sdeflow.numerics.quadrature import (
    MomentTable,
    integrate_coupled,
    integrate_elementwise,
    panel_edges,
    with_resolved_roots,
)
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.enclosure import Enclosure, NoEnclosure
from sdeflow.symbolic.exact import value_at, without_poles
from sdeflow.symbolic.moments import Moments, square_root
from sdeflow.symbolic.switches import jumps
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Coefficients"]

_CUTOFF_NOISE = 2e-3  # sigma / alpha at the default cutoff
_AGREEMENT = 1e-11  # of closed forms with quadrature, relative
_ROUNDING = 16 * float(torch.finfo(torch.float64).eps)  # of a time, and of the functions of it in a formula
_STEP_ROUNDING = 2 * float(torch.finfo(torch.float64).eps)
_EARLIEST_PIECE = 1e-12  # of the horizon: no piece of a path is looked for before
_LARGEST = float(torch.finfo(torch.float32).max)
_SMALLEST_STD = float(torch.finfo(torch.float32).tiny)
_SAMPLES = 2**16  # times from which the inverse of the log-SNR starts, at most
_LARGEST_TABLE = 4_000_000  # numbers for break points that entries of tensor parameters move
_PURPOSE = "The perturbation kernel"  # of what asks for an affine drift
_REPRESENTATIVES = 32  # entries of tensor parameters from which the panels are chosen


class _Panels(NamedTuple):
    """The panels of a table."""

    version: tuple[object, ...]  # of the values that they were made for
    edges: np.ndarray
    resolved: bool  # whether they resolve the root of a coupled state's covariance


class Coefficients:
    """alpha(t), sigma(t), offset(t) and the SDE's own a(t), b(t), g(t)², compiled.

    Args:
        declaration: an affine declaration.
        values: its parameters.
        derived: the closed form to try, or None.

    Attributes:
        table: the moments by quadrature.
        breaks: the times at which f or g may not be smooth, increasing; edges of the table's panels.
        closed: the compiled closed form, where it agrees with the table; else None.

    Raises:
        ScheduleError: for coefficients that are singular, complex or explosive on the horizon.
    """

    def __init__(self, declaration: Declaration, values: Values, derived: Moments | None) -> None:
        self.declaration = declaration
        self.values = values
        self.T = declaration.T
        self.coupled = declaration.coupled
        self.components = len(declaration.state)
        self.data = tuple(i for i in range(len(declaration.state)) if i not in declaration.auxiliary)
        self._panels: _Panels | None = None
        self._is_null: Tensor | None = None
        self._compiled = compile_expressions(_entries(declaration), (time_symbol,), values, horizon=self.T)
        self._require_end_is_regular()
        with torch.no_grad():
            even = torch.linspace(0.0, self.T, 258, dtype=torch.float64)[1:-1]
            self._require_noise_at(even, everywhere=False)
            self.table = self._integrate()
            self._require_continuous_path(self.table)
            self._require_noise_at(self.table.times[:, ::5].reshape(-1), everywhere=True)
            self._require_no_overflow()
            self._version = values.version
            self.closed = None if derived is None or self.coupled else self._compile_closed_form(derived)
            self._times, self._half_log_snrs = self._monotone_samples()
            self._cutoff = self._first_time()
            self._require_usable_cutoff()

    def with_cutoff(self, declaration: Declaration) -> Coefficients:
        """The same functions with the cutoff of another declaration of the same SDE."""
        self._refresh()
        other = copy.copy(self)
        other.declaration = declaration
        with torch.no_grad():
            other._cutoff = other._first_time()
            other._require_usable_cutoff()
        return other

    @property
    def cutoff(self) -> float:
        """The first time that training and solvers visit; one that is not given follows the parameters."""
        self._refresh()
        return self._cutoff

    def of_sde(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a(t), b(t) and g(t)² of dx = (a x + b) dt + g dw, (*t.shape, *parameters), float64.

        For a coupled state the matrices F and g gᵀ (*t.shape, k, k), and b (*t.shape, k).
        """
        values = self._evaluated(self._compiled, checked_numbers(t, "t"))
        if not self.coupled:
            a, b, q = values
            return a, b if self._is_null is None else torch.zeros_like(b), q.clamp_min(0.0)
        k = self.components
        entries = torch.stack(values, dim=-1)
        F, b, Q = entries.split([k * k, k, k * k], dim=-1)
        b = b if self._is_null is None else b.masked_fill(self._is_null.to(b.device), 0.0)
        return F.unflatten(-1, (k, k)), b, Q.unflatten(-1, (k, k))

    def of_kernel(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and offset at t, (*t.shape, *parameters), float64; for a coupled state Φ, its Cholesky
        factor (*t.shape, k, k), and the offset (*t.shape, k)."""
        t = checked_numbers(t, "t")
        if self.closed is not None:
            alpha, offset, std, _ = self._evaluated(self.closed, t)
            return alpha, std, offset
        if self.coupled:
            return self._current_table()(t)
        log_alpha, var, offset = self._current_table()(t)
        return torch.exp(log_alpha), torch.sqrt(var), offset

    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha at t of one component, (*t.shape, *parameters), float64; finite where alpha itself underflows."""
        return self._current_table()(t)[0] if self.closed is None else self._evaluated(self.closed, t)[3]

    def half_log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha / sigma) at t, shaped as t, float64: the mean where it differs between coordinates."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if self.coupled:
            return self._over_event(0.5 * torch.log(self._information(t)[0]), t)
        log_alpha, std = self._of_one_component(t)
        return self._over_event(log_alpha - torch.log(std), t)

    def half_log_snr_rate(self, t: Tensor) -> Tensor:
        """d/dt of half_log_snr, elementwise -g² / (2 sigma²); never positive. Shaped as t."""
        return self.half_log_snr_and_rate(t)[1]

    def half_log_snr_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`half_log_snr` and :meth:`half_log_snr_rate` from one evaluation of the moments."""
        if self.coupled:
            information, rate = self._information(t)
            half, rate = 0.5 * torch.log(information), 0.5 * rate / information
        else:
            log_alpha, std = self._of_one_component(t)
            half, rate = log_alpha - torch.log(std), -0.5 * self.of_sde(t)[2] / std.square()
        return self._over_event(half, t), self._over_event(rate, t)

    def _of_one_component(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha and sigma at t, (*t.shape, *parameters) in float64."""
        t = t.to(torch.float64)
        if self.closed is not None:
            _, _, std, log_alpha = self._evaluated(self.closed, t)
            return log_alpha, std
        log_alpha, var, _ = self._current_table()(t)
        return log_alpha, torch.sqrt(var)

    @property
    def probes(self) -> Tensor:
        """Times inside (cutoff, T), some evenly spaced and some on every panel, so that narrow features are visited."""
        even = torch.linspace(self.cutoff, self.T, 513, dtype=torch.float64)
        times = torch.cat([even, self.table.times[:, 4::8].reshape(-1)]).unique()
        return times[(times > self.cutoff) & (times < self.T)]

    def _information(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """J = diag(Φᵀ P⁻¹ Φ) of the data's components and dJ/dt = -diag(Φᵀ P⁻¹ g gᵀ P⁻¹ Φ), (*t.shape, data)."""
        phi, root, _ = self.of_kernel(t)
        _, _, Q = self.of_sde(t)
        data = list(self.data)
        whitened = torch.linalg.solve_triangular(root, phi[..., data], upper=False)
        precise = torch.linalg.solve_triangular(root.mT, whitened, upper=True)
        return whitened.square().sum(-2), -(precise * (Q @ precise)).sum(-2)

    def time_of(self, half_log_snr: Tensor | float) -> Tensor:
        """The time at which half_log_snr takes the given value, in [cutoff, T], float64.

        By bracketed Newton steps to rounding. Values outside the range give its ends. Where g = 0 on an
        interval, the log-SNR is flat there and any of its times may come back.
        """
        self._refresh()
        target = torch.as_tensor(half_log_snr, dtype=torch.float64)
        times, falling = (table.to(target.device) for table in (self._times, -self._half_log_snrs))
        upper = torch.searchsorted(falling, -target.contiguous()).clamp(1, len(times) - 1)
        low, high = times[upper - 1], times[upper]
        t = low + (high - low) * ((-target - falling[upper - 1]) / (falling[upper] - falling[upper - 1])).clamp(0, 1)
        found = torch.zeros((), dtype=torch.bool, device=t.device)
        with torch.no_grad():
            for _ in range(self._newton_steps):
                level, rate = self.half_log_snr_and_rate(t)
                excess = level - target
                low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
                step, before = t - excess / rate, t
                t = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
                t = torch.where(found, before, t)
                found = found | ((t - before).abs() <= _STEP_ROUNDING * t).all()
                if t.device.type == "cpu" and bool(found):  # an accelerator is not waited for
                    break
        return t.clamp(self.cutoff, self.T)

    def compile_closed(self, moments: Moments) -> Compiled[tuple[Tensor, ...]]:
        """alpha, offset, sigma and log alpha of closed moments."""
        middle = {**self.values.numbers, time_symbol: self.T / 2}
        outputs = moments.alpha, moments.offset, square_root(moments.var, middle), moments.log_alpha
        return compile_expressions(outputs, (time_symbol,), self.values, self.T)

    def agrees(self, compiled: Compiled[tuple[Tensor, ...]], points: np.ndarray, tolerance: float) -> bool:
        """Whether a compiled closed form gives the table's numbers at ``points``, relatively.

        Besides ``tolerance`` they may differ by what the rounding of t moves them: where alpha falls to nothing at the
        end of a path, as cos(πt/2) does at 1, its last digits are those of 1 - t.
        """
        t = torch.as_tensor(points)
        with torch.no_grad():
            alpha, offset, std, log_alpha = self._evaluated(compiled, t)
            true_log_alpha, true_var, true_offset = self.table(t)
            a, b, q = self.of_sde(t)
        true_alpha, true_std = true_log_alpha.exp(), true_var.sqrt()
        moved = _ROUNDING * t.reshape(-1, *(1,) * (a.ndim - 1))
        # An offset may cross 0: 1e-4 of what it has reached before is then the measure.
        scale = true_offset.abs() + 1e-4 * true_offset.abs().cummax(0).values
        return bool(
            ((alpha - true_alpha).abs() <= (tolerance + moved * a.abs()) * true_alpha).all()
            and ((std - true_std).abs() <= (tolerance + moved * (a.abs() + 0.5 * q / true_var)) * true_std).all()
            and ((offset - true_offset).abs() <= tolerance * scale + moved * (a * true_offset + b).abs()).all()
            and ((log_alpha - true_log_alpha).abs() <= tolerance * (1 + true_log_alpha.abs()) + moved * a.abs()).all()
        )

    def _evaluated(self, compiled: Compiled[tuple[Tensor, ...]], t: Tensor) -> tuple[Tensor, ...]:
        """Functions of t and the parameters, (*t.shape, *parameters) each."""
        t = t.to(torch.float64)
        if not self.values.tensors:
            return compiled(t)
        sides = len(self.values.shape)
        values = compiled(t.reshape((*t.shape, *(1,) * sides)))
        return tuple(value.expand((*t.shape, *self.values.shape)) for value in values)

    def _over_event(self, values: Tensor, t: Tensor) -> Tensor:
        return values if values.ndim == t.ndim else values.flatten(t.ndim).mean(-1)

    def _integrate(self) -> MomentTable:
        """The moments' table for the current values; differentiable in them where a gradient is asked for."""
        with torch.no_grad():
            panels = self._current_panels()
        if not self.coupled or panels.resolved:
            return self._integrate_on(panels.edges)
        edges, table = with_resolved_roots(panels.edges, self._integrate_on)
        self._panels = _Panels(panels.version, edges, resolved=True)
        return table

    def from_point(self, s: float, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """The table's rows at t for a state that is known exactly at s < t, integrated from s on: nothing cancels."""
        self._refresh()
        with torch.no_grad():
            own = self._current_panels().edges
        edges = np.concatenate([[s], own[(own > s) & (own < t)], [t]])
        return self._integrate_on(edges, 0.0)(torch.tensor(t, dtype=torch.float64))

    def _integrate_on(self, edges: np.ndarray, initial: float = 1.0) -> MomentTable:
        """The moments on panels from edges[0] on, where the covariance is P0 times ``initial``."""
        table_times = torch.as_tensor(nodes_of(edges))
        a, b, q = self.of_sde(table_times)
        if self.coupled:
            P0 = initial * torch.tensor(self.declaration.initial_covariance, dtype=torch.float64)
            return integrate_coupled(edges, a, b, q, P0)
        sides = range(2, 2 + len(self.values.shape))
        a, b, q = (v.permute((*sides, 0, 1)) for v in (a, b, q))
        return integrate_elementwise(edges, a, b, q, initial * self.declaration.P0)

    def _current_panels(self) -> _Panels:
        """Panels for the current values: break points are edges, and bounds say that nothing is missed."""
        version = self.values.version
        if self._panels is not None and self._panels.version == version:
            return self._panels
        entries, numbers = _entries(self.declaration), self.values.entries()
        try:
            bound = Enclosure(entries, numbers, self.T)
        except NoEnclosure:  # such as the derivative of a table: the samples decide
            bound = None
        self.breaks = break_points(entries, numbers, self.T)
        self._require_small_table(len(self.breaks) + len(geometric_edges(0.0, self.T)))
        components, P0 = (self.components, 0.0) if self.coupled else (None, self.declaration.P0)
        edges = panel_edges(self._sampled_rows, self.T, components, P0, self.breaks, bound)
        self._require_small_table(len(edges) - 1)
        self._panels = _Panels(version, edges, resolved=False)
        self._is_null = self._disguised(edges)
        return self._panels

    def _require_small_table(self, panels: int) -> None:
        """A break point, and all panels beside it, are those of every entry of tensor parameters: a thousand of each
        are gigabytes, and seconds."""
        entries, few = math.prod(self.values.shape), len(geometric_edges(0.0, self.T))
        if self.values.shape and len(self.breaks) and (panels - few) * NODES * entries > _LARGEST_TABLE:
            raise TooLargeError(
                f"the {entries:,} entries of params have {len(self.breaks):,} break points together, and need "
                f"{panels:,} panels, each of which is one for every entry: let fewer entries move them, or write "
                "smooth steps, such as (1 + tanh((t - p) / width)) / 2."
            )

    def _disguised(self, edges: np.ndarray) -> Tensor | None:
        """Which entries of b are 0 in disguise: nothing but rounding at all times. None where there are none."""
        _, b = self.declaration.require_affine(_PURPOSE)
        offsets = tuple(b) if self.coupled else (b,)
        points = nodes_of(edges)[:, ::5].reshape(-1)
        null = torch.tensor([self._is_rounding(entry, points) for entry in offsets])
        return null if bool(null.any()) else None

    def _is_rounding(self, entry: sp.Expr, points: np.ndarray) -> bool:
        """Whether an expression in t takes values at times (n,) that are not 0, but no more than rounding."""
        if not entry.has(time_symbol):
            return False
        values, error = self._with_rounding((entry,), points)
        return bool(values.any() and (np.abs(values) <= error).all())

    def _current_table(self) -> MomentTable:
        """The table, with a graph where the values need a gradient, and never out of date."""
        if self.values.needs_grad:
            self._require_breaks_stay()
            return self._integrate()
        self._refresh()
        return self.table

    @cached_property
    def _moves_jumps(self) -> dict[sp.Symbol, sp.Expr]:
        """Parameters that move the time of a jump, each with what jumps where it crosses a level."""
        return {symbol: jump.expr for jump in jumps(_entries(self.declaration)) for symbol in jump.expr.free_symbols}

    def _require_breaks_stay(self) -> None:
        """The panels' edges carry no graph: the gradient would miss the jump times the speed of its break point."""
        for symbol, expr in self._moves_jumps.items():
            value = self.values.get(symbol)
            if isinstance(value, Tensor) and value.requires_grad:
                raise ScheduleError(
                    f"the parameter {symbol} requires a gradient and moves a break point of the coefficients, where "
                    f"{expr} switches: moments have no gradient with respect to the time of a jump. Write a smooth "
                    f"step, such as (1 + tanh((t - {symbol}) / width)) / 2, or Max and Min for what is continuous; or "
                    f"give {symbol} as a number, or a tensor without requires_grad."
                )

    def _require_continuous_path(self, table: MomentTable) -> None:
        """A ScheduleError where a declared path jumps, which f and g, and so the table, do not hold."""
        path = self.declaration.path
        if path is None:
            return
        try:
            declared = compile_expressions(path, (time_symbol,), self.values, self.T)
        except DeclarationError:  # such as 0/0 at these values of the parameters
            return

        def read(points: np.ndarray) -> Readings:
            t = torch.as_tensor(points)
            log_alpha, var, _ = table(t)
            a, _, q = self.of_sde(t)
            rows = *self._evaluated(declared, t), log_alpha.exp(), var, a, q
            return Readings(*(row.detach().cpu().reshape(len(points), -1).numpy() for row in rows))

        pieces = np.concatenate([[0.0], break_points(path, self.values.entries(), self.T), [self.T]])
        times = np.union1d(table.times[:, ::5].reshape(-1).numpy(), 0.5 * (pieces[1:] + pieces[:-1]))
        require_continuous(path, times[times >= _EARLIEST_PIECE * self.T], read, self.values.numbers_at)

    def _refresh(self) -> None:
        """Follows values that were changed in place, as by an optimiser."""
        if self._version == self.values.version:
            return
        self._version = self.values.version
        with torch.no_grad():
            if self.declaration.path is not None and self._moves_jumps:
                self._require_continuous_path(self._integrate())
            rows = () if self.closed is None else self._evaluated(self.closed, self.table.times)
            if rows and all(bool(torch.isfinite(row).all()) for row in rows):
                _, offset, std, log_alpha = rows
                order = (*range(2, 2 + len(self.values.shape)), 0, 1)
                moments = log_alpha.permute(order), std.square().permute(order), offset.permute(order)
                self.table = MomentTable(self.table.edges.numpy(), moments)
            else:  # such as a logarithm whose argument has changed its sign
                self.closed, self.table = None, self._integrate()
            self._times, self._half_log_snrs = self._monotone_samples()
            self._cutoff = self._first_time()

    def _sampled_rows(self, points: np.ndarray) -> np.ndarray:
        """The coefficients at points as rows, of some entries of the tensor parameters only."""
        values = self._evaluated(self._compiled, torch.as_tensor(points))
        rows = [v.detach().reshape(len(points), -1) for v in values]
        count = rows[0].shape[1]
        if count > 1:
            ranked = torch.stack([row[len(points) // 2] for row in rows]).sum(0).argsort()
            chosen = ranked[torch.linspace(0, count - 1, min(count, _REPRESENTATIVES)).long()]
            rows = [row[:, chosen] for row in rows]
        sampled = torch.cat([row.mT for row in rows]).numpy()
        self._require_finite(points, sampled)
        return sampled

    def _require_finite(self, points: np.ndarray, rows: np.ndarray) -> None:
        """A ScheduleError with the first bad time and the exact value there."""
        bad = ~np.isfinite(rows).all(0)
        if not self.coupled and (rows[2 * len(rows) // 3 :] < 0).any():
            below = -rows[2 * len(rows) // 3 :].min(0)
            bad |= below > 0
            bad[bad] = ~(below[bad] <= self._rounding_of_noise(points[bad]))  # a 0 that is rounded is no root of -1
        if bad.any():
            at = float(points[bad].min())
            point = {**self.values.numbers, time_symbol: sp.Float(at)}
            exact = [(name, value_at(entry, point, 6)) for name, entry in self._named_entries()]
            shown = ", ".join(f"{name} = {value!s}" for name, value in exact)  # SymPy formats no infinity
            kind = "complex" if any(value.has(sp.I) for _, value in exact) else "not finite"
            if self.declaration.path is not None:
                alpha, sigma = self.declaration.path
                raise ScheduleError(
                    f"no SDE has the path alpha = {alpha}, sigma = {sigma}: its signal-to-noise ratio alpha / sigma "
                    f"must fall in time, and g² = 2 sigma sigma' - 2 (alpha'/alpha) sigma² is not positive and "
                    f"finite at t = {at:.6g} ({shown})."
                )
            raise ScheduleError(
                f"a coefficient is {kind} at t = {at:.6g}: {shown}. f and g must be real and finite on (0, T]."
            )

    def _named_entries(self) -> list[tuple[str, sp.Expr]]:
        declaration = self.declaration
        entries = [*(("f", e) for e in declaration.drifts), *(("g", e) for e in declaration.diffusions)]
        return [(name, entry) for name, entry in entries if entry != 0 or not self.coupled]

    def _require_end_is_regular(self) -> None:
        """A pole exactly at T escapes rounding (tan(pi/2) is 1.6e16 in float64): SymPy evaluates there."""
        for name, e in self._named_entries():
            if without_poles(e):
                continue
            at_end = value_at(e, {**self.values.numbers, time_symbol: sp.nsimplify(self.T, rational=True)})
            if at_end.has(sp.zoo, sp.oo, -sp.oo):
                raise ScheduleError(f"{name} is singular at t = T = {self.T:g}; use T = {0.999 * self.T:g}, say.")

    def _require_noise_at(self, points: Tensor, everywhere: bool) -> None:
        """A g that is 0 in disguise, such as sin² + cos² - 1, leaves nothing but rounding.

        What is 0 as it stands may be noise elsewhere, unless the points are ``everywhere``.
        """
        noise = self.of_sde(points)[2].abs().reshape(len(points), -1).amax(-1).numpy()
        seen = noise > self._rounding_of_noise(points.numpy())
        if not seen.any() and (everywhere or noise.any()):
            raise ScheduleError(f"g = {self.declaration.g} is 0 on the whole horizon: no noise, so no kernel.")

    def _with_rounding(self, entries: Sequence[sp.Expr], points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (rows, n) of entries at times (n,), for all parameters, and bounds of what rounding makes of them."""
        try:
            values, error = Enclosure(entries, self.values.entries(), self.T)(
                points, np.zeros_like(points), analytic=False
            )
        except NoEnclosure:
            return np.ones((1, len(points))), np.zeros((1, len(points)))
        return values, 8.0 * np.where(np.isfinite(error), error, 0.0)

    def _rounding_of_noise(self, points: np.ndarray) -> np.ndarray:
        """A bound of the error that rounding makes in g² at times (n,)."""
        return self._with_rounding(tuple(self.declaration.gram), points)[1].max(0)

    def _require_no_overflow(self) -> None:
        """States are float32 by default; the mean and the standard deviation must be finite there."""
        *_, spread, offset = self.table.rows if self.coupled else (None, self.table.rows[1].sqrt(), self.table.rows[2])
        for name, row in (("sigma", spread), ("the offset", offset)):
            if not bool((row.abs() <= _LARGEST).all()):
                largest = float(row.abs().nan_to_num(math.inf).max())
                raise ScheduleError(
                    f"{name} overflows: it reaches {largest:.3g} on [0, {self.T:g}], and float32 ends at "
                    f"{_LARGEST:.3g}. Choose a smaller T, or smaller f and g."
                )

    def _monotone_samples(self) -> tuple[Tensor, Tensor]:
        """Times and their half log-SNR, falling; the inverse starts from them."""
        edges = self.table.edges.numpy()
        # The edges too: between two of these times the log-SNR has no kink.
        nodes = np.union1d(self.table.times.reshape(-1).numpy(), edges[1:])
        if all(variance > 0 for variance in self.declaration.initial_variances):
            nodes = np.concatenate([[0.0], nodes])
        if len(nodes) > _SAMPLES:  # a panel's polynomial is smooth: a few of its many nodes do
            nodes = np.union1d(nodes[:: math.ceil(len(nodes) / _SAMPLES)], [nodes[0], *edges[1:]])
        # Dense enough for 4 Newton steps to end at rounding; the nodes alone, and 8 steps, where these are many.
        per_node = 1 if self.values.shape or self.coupled else min(8, max(1, _SAMPLES // len(nodes)))
        self._newton_steps = 4 if per_node == 8 else 8
        fine = np.arange((len(nodes) - 1) * per_node + 1) / float(per_node)
        if math.prod(self.values.shape) > _REPRESENTATIVES:  # each time costs a schedule for every coordinate
            fine = np.union1d(fine[::8], fine[-1:])
        times = torch.as_tensor(np.interp(fine, np.arange(len(nodes)), nodes))
        with torch.no_grad():
            if self.coupled:
                half_log_snr = self.half_log_snr(times)
            else:
                log_alpha, var, _ = self.table(times)
                half_log_snr = self._over_event(log_alpha - 0.5 * torch.log(var), times)
        finite = torch.isfinite(half_log_snr)
        if not bool(finite.any()):
            raise ScheduleError(
                "the noise never reaches some component, so that the kernel has no density: give it noise or P0."
                if self.coupled
                else "g is 0 on the whole horizon: no noise, so no kernel."
            )
        times, half_log_snr = times[finite], half_log_snr[finite]
        falls = torch.cat([torch.ones(1, dtype=torch.bool), half_log_snr[1:] < half_log_snr.cummin(0).values[:-1]])
        return times[falls], half_log_snr[falls]

    def _noise_to_signal(self, t: Tensor) -> Tensor:
        """sigma / alpha at t; of a coupled state, that of its data component alone."""
        if self.coupled:
            phi, root = self.table.of_component(self.data[0], t)
            return root.norm(dim=-1) / phi.abs()
        log_alpha, var, _ = self.table(t)
        return torch.exp(-self._over_event(log_alpha - 0.5 * torch.log(var), t))

    def _first_time(self) -> float:
        """The cutoff as given, or as found for the parameters' present values."""
        return self._find_cutoff() if self.declaration.cutoff is None else self.declaration.cutoff

    def _find_cutoff(self) -> float:
        if all(variance > 0 for variance in self.declaration.initial_variances):
            return 0.0
        ratios = self._noise_to_signal(self._times) if self.coupled else torch.exp(-self._half_log_snrs)
        reached = (ratios >= _CUTOFF_NOISE).nonzero()
        if not len(reached):
            raise ScheduleError(
                f"sigma / alpha reaches only {float(ratios.max()):.3g} at T = {self.T:g}, too "
                f"little noise to start from (with {_CUTOFF_NOISE:g} at the cutoff). Choose a larger T or g, or give "
                "cutoff= or P0=."
            )
        after = int(reached[0])
        low, high = float(self._times[max(after - 1, 0)]), float(self._times[after])
        for _ in range(60):  # bisection in the table, to rounding: the closed form is not verified yet
            middle = 0.5 * (low + high)
            ratio = float(self._noise_to_signal(torch.tensor(middle, dtype=torch.float64)))
            low, high = (middle, high) if ratio < _CUTOFF_NOISE else (low, middle)
        return high

    def _require_usable_cutoff(self) -> None:
        """sigma at the cutoff must be a normal number in float32, and t must be where the table resolves it."""
        smallest = math.sqrt(min(self.declaration.initial_variances))
        if self.cutoff == 0 and smallest >= _SMALLEST_STD:
            return
        resolved = self._times[self._times >= self.table.edges[1]]
        std = 0.0
        if self.cutoff >= float(resolved[0]):
            std = float(self._smallest_std(torch.tensor(self.cutoff, dtype=torch.float64)))
        if not std >= _SMALLEST_STD:
            enough = resolved[self._smallest_std(resolved) >= _SMALLEST_STD]
            raise ScheduleError(
                f"sigma = {std:.3g} at cutoff = {self.cutoff:g} cannot be told from 0 in float32; the smallest "
                f"usable cutoff is about {float(enough[0]):.3g}; None takes sigma/alpha = {_CUTOFF_NOISE:g}."
                if len(enough)
                else "the noise never reaches some component, so that the kernel has no density: give it noise or P0."
            )

    def _smallest_std(self, t: Tensor) -> Tensor:
        if self.coupled:
            return self.table(t)[1].diagonal(dim1=-2, dim2=-1).amin(-1)
        std = self.table(t)[1].clamp_min(0).sqrt()
        return std if std.ndim == t.ndim else std.flatten(t.ndim).amin(-1)

    def _compile_closed_form(self, derived: Moments) -> Compiled[tuple[Tensor, ...]] | None:
        """The rules' closed form compiled, if its numbers agree with quadrature on [cutoff, T]; else None."""
        if not derived.closed:
            return None
        try:
            compiled = self.compile_closed(derived)
        except DeclarationError:  # such as 0/0 at these values of the parameters
            return None
        nodes = self.table.times.reshape(-1).numpy()
        inside = nodes[nodes >= 1e-12 * self.T]
        points = np.concatenate([inside[inside < 0.1 * self.T][::4], inside[:: max(1, len(inside) // 512)], [self.T]])
        return compiled if self.agrees(compiled, np.sort(points), _AGREEMENT) else None


def _entries(declaration: Declaration) -> tuple[sp.Expr, ...]:
    """a, b and g², or the entries of F, b and g gᵀ, for one compilation."""
    a, b = declaration.require_affine(_PURPOSE)
    if declaration.coupled:
        return (*a, *b, *declaration.gram)
    return a, b, declaration.g**2
