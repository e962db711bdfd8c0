"""The declaration that users hold: ``SDE(f, g, T)``, and all that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypedDict

import sympy as sp
import torch
from typing_extensions import Unpack

from sdeflow.dynamics import AnyScore, FlowODE, ReverseSDE
from sdeflow.errors import (
    DeclarationError,
    MissingPriorError,
    ScheduleError,
    UnsafeExpressionError,
    UnusedParameterWarning,
    warn,
)
from sdeflow.kernels.bridge import Bridge, ReducibleBridge, SquareRootBridge, bridge_of
from sdeflow.kernels.kinds import AnyKernel, find_kernel
from sdeflow.kernels.reducible import PushForward
from sdeflow.laws.boltzmann import BoltzmannLaw
from sdeflow.laws.fitted import FittedPrior
from sdeflow.laws.gaussian import Gaussian
from sdeflow.laws.stationary import StationaryLaw
from sdeflow.numerics.basis import Basis, CentreOfMassFree
from sdeflow.numerics.brownian import BrownianPath
from sdeflow.numerics.checks import OF_BASIS, OF_PRIOR, checked_methods
from sdeflow.numerics.compile import Compiled, compile_expressions
from sdeflow.numerics.noise import NoiseStream
from sdeflow.numerics.options import named
from sdeflow.numerics.parameters import Values
from sdeflow.proof.certificate import Certificate, certify
from sdeflow.proof.derivation import Derivation, derive
from sdeflow.proof.explanation import explain
from sdeflow.scores import ScoreFunction, as_score
from sdeflow.solvers import Solver
from sdeflow.solving.boundary import states_to_try
from sdeflow.solving.prior_of import Prior
from sdeflow.solving.priors import default_prior, fit_prior
from sdeflow.solving.simulate import simulate, start
from sdeflow.storage import from_dict, to_dict
from sdeflow.symbolic.declaration import Coefficient, Declaration, declare, parameter_symbols
from sdeflow.symbolic.equations import Equation, forward, probability_flow
from sdeflow.symbolic.path import declare_path, is_table
from sdeflow.symbolic.patience import budget, deadline, rehearsed, small
from sdeflow.symbolic.symbols import t

__all__ = ["SDE"]

_SECONDS = 0.8  # of SymPy's work on what is not small: in a declaration, and in the search for another exact kernel
_LONGEST = 2.4  # of all work on a declaration, after which panels are halved no further
_SHORT = 120  # characters of text that is read without a rehearsal
_SHORT_TREES = 4000  # the same of stored expressions


class SimulateOptions(TypedDict, total=False):
    """The options of :meth:`SDE.simulate`; see :func:`sdeflow.solving.simulate.simulate`."""

    noise: BrownianPath | None
    rtol: float | None
    atol: float | None
    dtype: torch.dtype | None
    boundary: str | None
    gradient: str | None
    max_calls: int | None
    progress: bool | None


class SDE:
    r"""dx = f(x, t) dt + g(x, t) dw on [0, T], data at t = 0; everything else is derived.

    Args:
        f: the drift: a SymPy expression in ``sdeflow.x`` and ``sdeflow.t``, a function of (x, t), or a number.
        g: the diffusion, likewise; its sign does not matter.
        T: the horizon, the last time at which f and g are finite.
        cutoff: the first time that training, solvers and likelihood visit. None: 0 where P0 > 0, else the
            time at which sigma / alpha = 2e-3 (without a kernel: T / 1000), which moves with learned ``params``.
        params: values of the other symbols in f and g, keyed by Symbol or name: numbers, tensors that broadcast
            to an event, or nn.Parameters, which ``score.parameters()`` then holds.
        P0: the kernel's variance at t = 0 (a list or matrix for a coupled state); the model is then of data plus
            N(0, P0). Where only some components have one, they are auxiliary: no data, but noise from the start.
        calculus: "ito", or "stratonovich" for a declaration in that sense, which is converted.
        prior: p(x_T), where it should not follow from the kernel, the data and the score.
        state: names of the components, where f and g are text or functions of several.
        basis: an orthogonal transform of events (:mod:`sdeflow.numerics.basis`) in which the declaration holds,
            coefficient by coefficient.

    Attributes:
        declaration: what was declared, frozen.
        kind: "affine", with a Gaussian perturbation kernel; "reducible" to that by a change of the state; "pearson",
            with an exact kernel in special functions; or "general".
        T, cutoff: as above.

    Raises:
        DeclarationError: for what is not a scalar SDE in x, t and the parameters.
        ScheduleError: for coefficients that are singular, complex, explosive or without noise on the horizon.

    Warns:
        UnusedParameterWarning: for a parameter in neither f nor g.

    Example:
        >>> import sympy as sp
        >>> from sdeflow import SDE, t, x
        >>> sde = SDE(f=-x, g=sp.sqrt(2), T=5)
        >>> sde
        SDE(dx = [-x] dt + sqrt(2) dw on [0, 5])
        >>> sde.kernel.mean, sde.kernel.var
        (x_0*exp(-t), 1 - exp(-2*t))
        >>> sde.flow_ode()
        FlowODE(dx/dt = -x - s(x, t))
    """

    @named
    def __init__(
        self,
        f: Coefficient,
        g: Coefficient,
        T: float = 1.0,
        cutoff: float | None = None,
        params: Mapping[sp.Symbol | str, float | torch.Tensor] | None = None,
        P0: object = 0.0,
        calculus: str = "ito",
        prior: Prior | None = None,
        *,
        state: Sequence[str] | None = None,
        basis: Basis | None = None,
    ) -> None:
        resolved = parameter_symbols(params, f, g)
        with _limits():
            arguments = (f, g, T, cutoff, resolved, P0, calculus, state)
            self._set_up(_manageable(declare, *arguments), Values(resolved), prior, basis)

    def _set_up(self, declaration: Declaration, values: Values, prior: Prior | None, basis: Basis | None) -> None:
        checked_methods(basis, "basis", *OF_BASIS)
        if isinstance(basis, CentreOfMassFree):
            raise DeclarationError(
                f"{basis} changes the shape of a state, which basis= may not: declare the SDE of its coordinates, and "
                "pass data through basis.forward, networks through basis.wrap, and samples through basis.inverse."
            )
        if basis is not None and declaration.affine is None:
            raise DeclarationError(
                f"a basis needs an affine SDE, coefficient by coefficient, and here {declaration.obstacle}."
            )
        self.declaration, self.values, self.basis = declaration, values, basis
        if unused := [symbol.name for symbol in declaration.parameters if symbol not in declaration.held]:
            warn(
                f"params: not in f or g, and so without effect: {', '.join(unused)}. Leave out what is not needed, or "
                "write it in f or g.",
                UnusedParameterWarning,
            )
        self._prior = checked_methods(prior, "prior", *OF_PRIOR)
        self._score: AnyScore = None
        if self.declaration.affine is not None:
            self.kernel  # noqa: B018  derived now, so that what is wrong with a schedule is said here
        else:
            self._require_finite_somewhere()

    @classmethod
    def from_kernel(
        cls,
        alpha: Coefficient | Sequence[float] | torch.Tensor,
        sigma: Coefficient | None = None,
        T: float | None = None,
        cutoff: float | None = None,
        params: Mapping[sp.Symbol | str, float | torch.Tensor] | None = None,
        basis: Basis | None = None,
    ) -> SDE:
        """The SDE of a declared Gaussian path x_t = alpha(t) x_0 + sigma(t) eps.

        f = alpha'/alpha x and g² = 2 sigma sigma' - 2 (alpha'/alpha) sigma², so that flow matching, say, is
        ``SDE.from_kernel(alpha=1 - t, sigma=t, T=0.999)``. sigma(0)² becomes P0.

        A table of alpha, such as DDPM's (arXiv:2006.11239), may start at alpha < 1: it is continued to the data at
        t = 0 linearly in -log alpha², and the cutoff is its first entry. Of n values alone, i is at (i + 1) T / n (at
        i T / (n - 1) where the first is 1)::

            alphas = torch.cumprod(1 - betas, 0).sqrt()        # √ᾱ
            sde = SDE.from_kernel(alphas)                      # cutoff = 1 / n; moments are the table's at its times

        Args:
            alpha: of t: an expression, text, a function such as ``lambda t: sp.cos(t)`` that is called once with the
                symbol, or ``sdeflow.schedule(function)(t)`` for one of numbers; or a table of falling values: (times,
                values), rows of (time, value), or values alone.
            sigma: of t; None is √(1 - alpha²), variance preserving.
            T: the horizon; by default the last time of a table, else 1.
            cutoff: as of :class:`SDE`; of a table that starts at alpha < 1, its first time.
            params, basis: as of :class:`SDE`.

        Raises:
            DeclarationError: for a path that depends on x or does not start at alpha = 1.
            ScheduleError: for one that jumps, or whose signal-to-noise ratio rises somewhere, for then g² < 0.
        """
        resolved = parameter_symbols(params, *(e for e in (alpha, sigma) if e is not None and not is_table(e)))
        sde = object.__new__(cls)
        with _limits():
            declaration = _manageable(declare_path, alpha, sigma, T, cutoff, resolved)
            sde._set_up(declaration, Values(resolved), None, basis)
        return sde

    def with_cutoff(self, cutoff: float | None) -> SDE:
        """The same SDE, its derivation and its kernel's numbers included, with another first time.

        Training, solvers and likelihood then start at ``cutoff``, and ``log_prob`` is of the data noised until then.

        Args:
            cutoff: a time in [0, T); None finds it anew, see :class:`SDE`.

        Raises:
            DeclarationError: for a time outside [0, T).
            ScheduleError: for one at which sigma cannot be told from 0.
        """
        other = self._copy()
        other.declaration = self.declaration.with_cutoff(cutoff)
        if "kernel" in vars(self):
            other.kernel = self.kernel.with_cutoff(other.declaration)
        return other

    def to_dict(self) -> dict[str, Any]:
        """The declaration and its parameters' values as JSON-able data; :meth:`from_dict` is exactly the inverse.

        Raises:
            DeclarationError: for what has no such form: a prior of one's own, a schedule that is a Python function.
        """
        if self._prior is not None:
            raise DeclarationError(
                "an SDE with prior= is not stored whole: pass the prior to reverse() and flow_ode()."
            )
        return to_dict(self.declaration, self.values, self.basis)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SDE:
        """The SDE of which ``data`` is the :meth:`to_dict`; nothing in it is evaluated as text.

        Raises:
            UnsafeExpressionError: for data that holds anything but allowed nodes.
        """
        sde = object.__new__(cls)
        with _limits():
            trees = [data.get(key) for key in ("f", "g", "path")] if isinstance(data, Mapping) else []
            if len(repr(trees)) > _SHORT_TREES and not rehearsed(_SECONDS, from_dict, data):
                raise UnsafeExpressionError("SymPy needs too long to build the expressions of this declaration.")
            declaration, values, basis = from_dict(data)
            sde._set_up(_manageable(lambda: declaration), values, None, basis)
        return sde

    def with_params(self, **values: float) -> SDE:
        """The same declaration, its affine split included, with other values of some parameters.

        Raises:
            DeclarationError: for a name that is not a parameter.
        """
        by_name = {symbol.name: symbol for symbol in self.declaration.parameters}
        unknown = set(values) - set(by_name)
        if unknown:
            raise DeclarationError(
                f"{', '.join(sorted(unknown))} is no parameter; there are: {', '.join(by_name) or 'none'}."
            )
        other = self._copy()
        other.values = self.values.replaced({by_name[name]: value for name, value in values.items()})
        vars(other).pop("kernel", None)
        shared = self.kernel.with_values(other.values)
        if shared is not None:  # else the values make it another SDE, which is classified anew
            other.kernel = shared
        return other

    def bind(self, score: AnyScore) -> SDE:
        """A copy that carries ``score``: its ``reverse()`` and ``flow_ode()`` need none."""
        other = self._copy()
        other._score = None if score is None else as_score(score, self)
        return other

    @property
    def kind(self) -> str:
        """ "affine", "reducible" to an affine SDE by a change of the state, "pearson", or "general"."""
        return self.kernel.kind

    @property
    def T(self) -> float:
        """The horizon."""
        return self.declaration.T

    @property
    def cutoff(self) -> float:
        """The first time that training, solvers and likelihood visit; one that is not given follows the parameters."""
        return self.kernel.cutoff

    @cached_property
    def kernel(self) -> AnyKernel:
        """p(x_t | x_0), by the first way of :mod:`sdeflow.kernels.kinds` that serves this SDE.

        Gaussian, one behind a change of the state, of the Pearson class, or known for short steps alone: what such a
        :class:`~sdeflow.kernels.local.LocalKernel` cannot tell (``alpha``, ``sample``, ``score``, ...) raises a
        NotAffineError when it is asked for.
        """
        with _limits():
            return find_kernel(self.declaration, self.values, self.basis)

    @property
    def weighting(self) -> sp.Expr:
        """lambda(t) = 1 / E|∇ log p(x_t | x_0)|² per coordinate, which is sigma(t)², of a Gaussian kernel.

        For a coupled state the matrix with lambda E[∇ log p ∇ log pᵀ] = 1, the covariance.
        In SymPy; its numbers at times ts are those of sigma² with ``alpha, sigma, offset = kernel.coefficients(ts)``.
        """
        return self.kernel.require_gaussian("The weighting").var

    @property
    def likelihood_weighting(self) -> sp.Expr:
        """g(t)², under which score matching bounds the likelihood (arXiv:2101.09258).

        In SymPy; its numbers at times ts are ``kernel.sde_coefficients(ts)[2]``.
        """
        self.kernel.require_gaussian("The likelihood weighting")
        gram = self.declaration.gram
        return gram if self.declaration.coupled else gram[0, 0]

    @property
    def prior(self) -> Gaussian:
        """p(x_T | x_0 = 0) = N(offset(T), sigma(T)²); :meth:`prior_for` matches the data as well."""
        return self.prior_for(0.0, 0.0)

    def prior_for(self, mean: torch.Tensor | float, std: torch.Tensor | float) -> Gaussian:
        """p(x_T) for data with this mean and standard deviation: N(alpha m + offset, alpha² c² + sigma²) at T."""
        if self.kernel.gaussian is None:
            raise MissingPriorError(
                f"p(x_T) of this SDE is not Gaussian, for {self.declaration.obstacle}: fit_prior(data) fits it, and "
                "reverse() and flow_ode() find a stationary or pushed-forward one where there is one."
            )
        return self.kernel.marginal(mean, std, self.T)

    def lift(self, data: torch.Tensor, seed: int | torch.Generator | None = None) -> torch.Tensor:
        """States (batch, k, *event) from data (batch, *event): the auxiliary components are drawn from P0.

        Where there are none, the data itself.
        """
        gaussian = self.kernel.gaussian
        return (
            start(self.declaration, data, NoiseStream(seed, "lift")) if gaussian is None else gaussian.lift(data, seed)
        )

    def bridge(self, x_T: torch.Tensor | float) -> Bridge | ReducibleBridge | SquareRootBridge:
        """This SDE conditioned on x_T: linear, reducible and square-root ones; see :mod:`sdeflow.kernels.bridge`.

        Raises:
            NotAffineError: for any other SDE.
            DataError: for an x_T outside the domain.
        """
        return bridge_of(self.kernel, x_T)

    def simulate(
        self, x_0: torch.Tensor, ts: Sequence[float] | torch.Tensor, solver: str | Solver = "euler",
        steps: int | None = None, *, seed: int | torch.Generator | None = None, **options: Unpack[SimulateOptions],
    ) -> torch.Tensor:  # fmt: skip
        """States of this SDE at the times ``ts``, (len(ts), batch, *event), from x_0 at t = 0.

        For the options see :func:`sdeflow.solving.simulate.simulate`.
        """
        return simulate(self, x_0, ts, solver, steps, seed=seed, **options)

    def fit_prior(
        self, data: torch.Tensor, n: int = 10_000, *, components: int = 8, steps: int = 500,
        seed: int | torch.Generator | None = None,
    ) -> FittedPrior:  # fmt: skip
        """p(x_T) of ``data`` as a mixture of Gaussians fitted to n simulated states; see
        :func:`sdeflow.solving.priors.fit_prior`."""
        return fit_prior(self, data, n, components=components, steps=steps, seed=seed)

    def default_prior(
        self, score: ScoreFunction | Callable[[torch.Tensor, torch.Tensor], torch.Tensor], like: torch.Tensor
    ) -> PushForward | StationaryLaw | BoltzmannLaw | None:
        """The prior of an SDE without a Gaussian kernel where none was given, or None where none follows.

        Args:
            score: a score of this SDE.
            like: a state (batch, *event).
        """
        return default_prior(self, as_score(score, self), like)

    def reverse(self, score: AnyScore = None, prior: Prior | None = None) -> ReverseSDE:
        """The reverse-time SDE; without a score, the equation itself."""
        return ReverseSDE(self, *self._bound(score, prior))

    def flow_ode(self, score: AnyScore = None, prior: Prior | None = None) -> FlowODE:
        """The probability-flow ODE; without a score, the equation itself."""
        return FlowODE(self, *self._bound(score, prior))

    def _bound(self, score: AnyScore, prior: Prior | None) -> tuple[AnyScore, Prior | None]:
        """What was given, or else what this SDE carries."""
        return self._score if score is None else score, self._prior if prior is None else prior

    def verify(self) -> Certificate:
        """Which identities the derived objects satisfy, and to which residual: :mod:`sdeflow.proof.certificate`.

        It tests the compiled numbers that solvers use, in about a second (with many components or parameters in up to
        ten), and is true where every identity holds. It is not true where the time (8 s) did not suffice for the
        kernel's moments, or f and g: it then says so.
        """
        return certify(self)

    def derivation(self) -> Derivation:
        """Every step from f and g to the kernel, reverse SDE, flow and likelihood, each checked by substitution."""
        return derive(self)

    def explain(self) -> str:
        """Which way serves this SDE (closed form, quadrature, Lamperti, Pearson, ...), why, and what is available."""
        return explain(self)

    @property
    def equation(self) -> Equation:
        """dx = f dt + g dw."""
        return forward(self.declaration)

    def __repr__(self) -> str:
        P0 = self.declaration.P0
        noise = "" if not any(self.declaration.initial_variances) else f", P0 = {_plain(P0)}"
        basis = "" if self.basis is None else f", basis = {self.basis}"
        return f"SDE({self.equation} on [0, {self.T:g}]{noise}{f', {self.values}' if self.values else ''}{basis})"

    def _repr_latex_(self) -> str:
        return rf"$\displaystyle {self.equation.latex()}, \quad t \in [0, {self.T:g}]$"

    def _copy(self) -> SDE:
        other = object.__new__(SDE)
        other.__dict__.update(self.__dict__)
        return other

    def _require_finite_somewhere(self) -> None:
        """f and g of a general SDE must be finite at every time for some state."""
        declaration, numbers = self.declaration, self.values.numbers
        times = torch.linspace(0.0, self.T, 1025, dtype=torch.float64)[1:]
        probes = torch.tensor([-1.7, -0.6, 0.3, 0.9, 2.1], dtype=torch.float64)
        usual = [probes.roll(i)[:, None].expand(-1, len(times)) for i in range(len(declaration.state))]
        named = [*(("f", e) for e in declaration.drifts), *(("g", e) for e in declaration.diffusions)]
        for name, expr in named:
            compiled = compile_expressions(expr, (t, *declaration.state), numbers, self.T)
            bad = times[_nowhere_finite(compiled, times, usual)]
            if len(bad):
                bad = bad[_nowhere_finite(compiled, bad, states_to_try(declaration, numbers, bad))]
            if len(bad):
                raise ScheduleError(
                    f"{name} = {expr} is not finite and real at t = {float(bad[0]):.4g}, for any of the states tried: "
                    "those beside the ends of its domain, as far as these are found, and all sizes from 1e-6 to 1e6."
                )


def _nowhere_finite(compiled: Compiled[torch.Tensor], times: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
    """At which times a function of t and the components is finite for none of the states (n, len(times))."""
    return ~torch.isfinite(compiled(times.expand(len(states[0]), -1), *states)).any(0)


@contextmanager
def _limits() -> Iterator[None]:
    """The processor time of a declaration, and of SymPy's part in it."""
    with budget(_SECONDS), deadline(_LONGEST):
        yield


def _manageable(make: Callable[..., Declaration], *arguments: object) -> Declaration:
    """``make(*arguments)``, whose equations SymPy can write in good time.

    Text is read, and what is large is derived, in another process first: nothing can stop SymPy in this one.

    Raises:
        DeclarationError: for f and g too large for that.
    """
    declaration = None
    if not any(isinstance(text, str) and len(text) > _SHORT for text in _flat(arguments)):
        declaration = make(*arguments)
        if small(declaration):
            return declaration
    if not rehearsed(_SECONDS, _written, make, arguments, declaration):
        raise DeclarationError(
            "f and g are too large: SymPy takes too long over their sums, powers and fractions. Nest them less deeply, "
            "or make of what depends on t alone a function of numbers: beta = sdeflow.schedule(lambda t: ...)."
        )
    return make(*arguments) if declaration is None else declaration


def _written(make: Callable[..., Declaration], arguments: tuple[object, ...], declaration: Declaration | None) -> bool:
    """Writes what every SDE writes, once."""
    declaration = declaration or make(*arguments)
    probability_flow(declaration)
    # Of a coupled state nothing multiplies g gᵀ further before it is asked for a formula.
    gram = declaration.gram if declaration.coupled else declaration.gram**2
    return declaration.affine is not None and bool(gram)


def _flat(values: Iterable[object]) -> Iterator[object]:
    """What stands in (nested) lists and tuples."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _plain(P0: float | sp.ImmutableMatrix) -> str:
    """P0 as it was given: a number, a list of variances, or a matrix."""
    if not isinstance(P0, sp.MatrixBase):
        return f"{P0:g}"
    if P0.is_diagonal():
        return f"[{', '.join(f'{float(P0[i, i]):g}' for i in range(P0.shape[0]))}]"
    return str([[float(entry) for entry in row] for row in P0.tolist()])
