"""What every score is: a function of (x, t) bound to a declared SDE."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sdeflow.errors import DataError, ScoreError
from sdeflow.kernels.gaussian import Kernel, Path
from sdeflow.kernels.kinds import AnyKernel
from sdeflow.laws.each import Law
from sdeflow.numerics.basis import Basis
from sdeflow.numerics.checks import checked_state, checked_time
from sdeflow.numerics.linear import levels, multiplied
from sdeflow.numerics.parameters import Declared
from sdeflow.scores.readout import GridScore, Readout

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CallableScore", "DeclaredSDE", "ScoreFunction", "Wrapping", "as_score", "evaluating"]

_evaluated: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""Parts of networks that are in training, and in eval mode for so many solves."""
_evaluated_lock = threading.Lock()
_NETS = "sdeflow.nets"  # whose modules are networks, and no scores
_LOW_PRECISION = (torch.float16, torch.bfloat16)


class DeclaredSDE(Declared, Protocol):
    """What a score needs of an SDE: its declaration, and its kernel."""

    @property
    def kernel(self) -> AnyKernel: ...


class ScoreFunction(nn.Module):
    """A score of a declared SDE: ``score(x, t)`` -> ∇ log p_t(x). Abstract; see its subclasses.

    A subclass defines ``forward``. One that holds something for each sample of a batch (a condition, a measurement)
    also overrides :meth:`rows`; every call of the library that solves a part of a batch goes through it.

    Attributes:
        declaration: the SDE it belongs to.
        kernel: the SDE's kernel, of whichever kind.
    """

    def __init__(self, sde: DeclaredSDE) -> None:
        super().__init__()
        if not hasattr(sde, "declaration"):
            raise ScoreError(
                f"a score belongs to an SDE, not to {type(sde).__name__}: the order is sdeflow.Score(net, sde) and "
                "GaussianMixture(sde, means, covariances)."
            )
        self.declaration = sde.declaration
        self.schedule = nn.ParameterDict(sde.values.learned)  # so that score.parameters() holds a learned schedule
        self.values = sde.values
        self.basis: Basis | None = getattr(sde, "basis", None)
        self.kernel = sde.kernel

    @property
    def gaussian(self) -> Kernel | None:
        """The kernel, where it is Gaussian."""
        return self.kernel.gaussian

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """∇ log p_t(x), shaped as x, for x (batch, *event) and t a number, () or (batch,)."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, t)")

    if TYPE_CHECKING:  # torch's own is Callable[..., Any]

        def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
            """:meth:`forward`, by way of the module's hooks."""

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[eps | x_t] = -sigmaᵀ s, shaped as x."""
        x, t = self._entered(x, t)
        kernel, path = self._path(x, t)
        return kernel.from_basis(-path.sigma.T(kernel.to_basis(self(x, t))))

    def denoise(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[x_0 | x_t] = alpha⁻¹ (x - offset + sigma sigmaᵀ s) (Tweedie), shaped as x."""
        x, t = self._entered(x, t)
        kernel, path = self._path(x, t)
        centred = kernel.to_basis(x) - path.offset.to(x.dtype)
        return kernel.from_basis(path.alpha.inverse(centred + path.sigma.gram(kernel.to_basis(self(x, t)))))

    def data_moments(self) -> tuple[Tensor, Tensor] | None:
        """The data's mean and standard deviation (each () or *event) where they are known, else None."""
        return None

    def prior_moments(self) -> tuple[Tensor, Tensor] | None:
        """The moments of the data whose diffusion this score is of, from which p(x_T) follows; None where unknown."""
        return self.data_moments()

    def marginal_law(self, t: float) -> Law | None:
        """p_t itself, where this score knows it better than by :meth:`prior_moments`; else None."""
        return None

    def rows(self, index: Tensor | slice) -> Self:
        """The score of some samples of the batch: its sample i is sample ``index[i]`` of this score.

        A score that is the same for all samples is returned as it is. What holds something for each sample returns
        another score, of the samples asked for::

            def rows(self, index):
                return type(self)(self.sde, self.measurements[index])

        Args:
            index: (n,) numbers of samples on the CPU, in any order, which may repeat; or a slice.
        """
        return self

    def of_batch(self, samples: int) -> Self:
        """This score for a batch of ``samples`` samples; a solve calls it once, before anything else.

        Raises:
            DataError: where it holds conditions of another number of samples.
        """
        return self

    @property
    def samples(self) -> int | None:
        """The number of samples that it holds conditions for; None where it serves a batch of any size."""
        return None

    def conditions(self, x: Tensor) -> Tensor | None:
        """The samples of a batch x (batch, *event) grouped by condition: (batch,), equal numbers for equal conditions.

        None where all samples have the same score. By default that is where :meth:`rows` returns the score itself;
        where it returns another one, each sample is a group of its own.
        """
        return None if self.rows(slice(0, len(x))) is self else torch.arange(len(x))

    @property
    def bare(self) -> object:
        """The user's own score, without what a solve wraps around it. Pilot grids are kept for as long as it lives."""
        return self

    @property
    def wrapping(self) -> tuple[object, ...]:
        """A key of what is wrapped around :attr:`bare`: two scores with the same of both are equal."""
        return ()

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the network behind this score; None where there is none."""
        of_schedule = {id(parameter) for parameter in self.schedule.values()}
        own = (p for p in self.parameters() if p.is_floating_point() and id(p) not in of_schedule)
        return next((parameter.dtype for parameter in own), None)

    def same_sde(self, sde: DeclaredSDE) -> bool:
        """Whether it belongs to that SDE, whatever the cutoff: declaration, values of the parameters and basis."""
        ours, theirs = (declaration.with_cutoff(None) for declaration in (self.declaration, sde.declaration))
        return (ours, self.values, self.basis) == (theirs, sde.values, getattr(sde, "basis", None))

    def readout(self, path: Path, like: Tensor, time: Tensor) -> Readout:
        """How eps follows from what is called: here from the score, eps = -sigmaᵀ s."""
        return Readout(path.sigma.T.scaled(-1.0))

    def on_grid(self, times: Tensor, like: Tensor, dtype: torch.dtype) -> GridScore:
        """The score at fixed ``times`` (n,), for solver states like ``like`` (batch, *event), called in ``dtype``."""
        kernel = self._require_kernel("a score on a grid")
        path = kernel.path(like, times)
        call = on_states(kernel, path, like, dtype, lambda x, i, kept: self(x, times[i]))
        return GridScore(ScoreFunction.readout(self, path, like, times), call)

    def _entered(self, x: Tensor, t: Tensor | float, least: float | None = None) -> tuple[Tensor, Tensor]:
        """x as a state of this SDE, and t as float64, () or (batch,), within [cutoff, T]: see
        :mod:`sdeflow.numerics.checks`.

        Args:
            x: (batch, *event).
            t: a number or (batch,).
            least: the first time at which this score is defined, where that is not the cutoff.
        """
        x = checked_state(x, dtype=None if isinstance(x, Tensor) else self.dtype)
        declaration = self.declaration
        if declaration.coupled and x.shape[1] != len(declaration.state):
            names = ", ".join(symbol.name for symbol in declaration.state)
            raise DataError(
                f"x is of shape {tuple(x.shape)}; a state of this SDE is (batch, {len(declaration.state)}, *event), "
                f"its components {names} along the second axis."
            )
        if least is None:
            least = self.kernel.score_from
        what = f"the score is defined for t in {'[cutoff, T]' if least else '[0, T]'}"
        time = checked_time(t, len(x), least, declaration.T, what)
        return x, time.to(x.device) if time.ndim else time

    def _path(self, x: Tensor, t: Tensor) -> tuple[Kernel, Path]:
        """The Gaussian kernel, and its alpha, sigma and offset ready for x."""
        kernel = self._require_kernel("noise and denoise")
        return kernel, kernel.path(x, t)

    def _require_kernel(self, purpose: str) -> Kernel:
        """The Gaussian kernel; a :class:`~sdeflow.errors.NotAffineError` about ``purpose`` where there is none."""
        return self.kernel.require_gaussian(purpose)


class Wrapping(ScoreFunction):
    """A score that changes another one, ``score``, sample by sample. Questions about samples are passed on to that."""

    def __init__(self, score: ScoreFunction) -> None:
        super().__init__(score)
        self.score = score

    def around(self, score: ScoreFunction) -> Self:
        """The same around another score of the same SDE."""
        if score is self.score:
            return self
        other = copy.copy(self)
        other._modules = {**self._modules, "score": score}
        return other

    def rows(self, index: Tensor | slice) -> Self:
        return self.around(self.score.rows(index))

    def of_batch(self, samples: int) -> Self:
        return self.around(self.score.of_batch(samples))

    @property
    def samples(self) -> int | None:
        return self.score.samples

    def conditions(self, x: Tensor) -> Tensor | None:
        return self.score.conditions(x)

    @property
    def bare(self) -> object:
        return self.score.bare

    @property
    def wrapping(self) -> tuple[object, ...]:
        return self.score.wrapping

    def data_moments(self) -> tuple[Tensor, Tensor] | None:
        return self.score.data_moments()

    def prior_moments(self) -> tuple[Tensor, Tensor] | None:
        return self.score.prior_moments()

    def marginal_law(self, t: float) -> Law | None:
        return self.score.marginal_law(t)


class _Part(NamedTuple):
    """The samples of a batch that a function is asked for."""

    size: int  # of the batch
    chosen: Tensor | None = None  # the numbers of the samples; None for all in their order


class CallableScore(ScoreFunction):
    """Any function (x, t) -> ∇ log p_t(x) as a score. It sees x (batch, *event) and t (batch,).

    A function may be tied to the n samples of its batch, because it holds a condition for each. Such a function cannot
    be asked for some of the samples: it is called with n states, and the other values are dropped. A sample that is
    asked for m times takes m calls. A function counts as tied if it fails for a batch of another size; this is tried
    once for each n.

    A function that takes any batch, but has a condition for sample i, is not recognised, and is wrong where a solve is
    cut into chunks. Make it a :class:`ScoreFunction` with ``rows``.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], sde: DeclaredSDE) -> None:
        super().__init__(sde)
        self.function = function
        self._tied: dict[int, bool] = {}  # by the size of the batch, shared by all parts
        self._part: _Part | None = None  # None: of no batch in particular

    def of_batch(self, samples: int) -> Self:
        part = self._part
        return self if part is not None and (part.chosen is not None or part.size == samples) else self._of(samples)

    def rows(self, index: Tensor | slice) -> Self:
        part = self._part
        if part is None or part.size == 1:
            return self
        ours = torch.arange(part.size) if part.chosen is None else part.chosen
        return self._of(part.size, ours[index])

    def _of(self, size: int, index: Tensor | None = None) -> Self:
        other = copy.copy(self)
        other._part = _Part(size, index)
        return other

    def conditions(self, x: Tensor) -> Tensor | None:
        part = self._part
        if part is None or not self._is_tied(part.size, x, torch.tensor(self.declaration.T, dtype=torch.float64)):
            return None
        return torch.arange(len(x)) if part.chosen is None else part.chosen

    @property
    def bare(self) -> object:
        return self.function

    @property
    def wrapping(self) -> tuple[object, ...]:
        part = self._part
        if part is None or not self._tied.get(part.size, part.chosen is not None):
            return ()
        return ("batch", part.size, *(() if part.chosen is None else part.chosen.tolist()))

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        x, time = self._entered(x, t)
        return self._value(x.clone(), network_time(time, x))

    def _value(self, x: Tensor, time: Tensor) -> Tensor:
        """The function's value, checked, for a state that it may change, and (batch,) times."""
        size, index = self._part or (0, None)
        if index is None:
            return checked(self.function(x, time), x, "the score")
        if size not in self._tied and len(x) != size:
            value = self._tried(size, x, time)
            if value is not None:
                return value
        if not self._is_tied(size, x, time):
            return checked(self.function(x, time), x, "the score")
        values, order = [], []
        for part in _without_repeats(index):
            at = index[part].to(x.device)
            states, times = (v[:1].detach().expand(size, *v.shape[1:]).clone() for v in (x, time))
            states[at], times[at] = x[part.to(x.device)], time[part.to(x.device)]
            values.append(checked(self.function(states.clone(), times), states, "the score")[at])
            order.append(part)
        return torch.cat(values)[torch.cat(order).argsort().to(x.device)]

    def _is_tied(self, size: int, x: Tensor, time: Tensor) -> bool:
        """Whether the function takes no batch of another size than ``size``: tried with one sample."""
        if size == 1 or not len(x):
            return False
        if size not in self._tied:
            with torch.no_grad(), evaluating(self):
                self._tried(size, x[:1].detach(), network_time(time.reshape(-1)[:1], x[:1]))
        return self._tied[size]

    def _tried(self, size: int, x: Tensor, time: Tensor) -> Tensor | None:
        """The function's value for another number of samples than ``size``; None where it takes only that."""
        value = None
        with suppress(Exception):  # whatever it is, the call with the whole batch shows it where it is not the size
            value = checked(self.function(x.clone(), time), x, "the score")
        self._tied[size] = value is None
        return value

    def on_grid(self, times: Tensor, like: Tensor, dtype: torch.dtype) -> GridScore:
        kernel = self._require_kernel("a score on a grid")
        path = kernel.path(like, times)
        clock = network_times(times, like.to(dtype)).unbind()

        def evaluate(x: Tensor, i: int, kept: bool) -> Tensor:
            return self._value(x.clone() if kept else x, clock[i].expand(len(x)).clone())

        call = on_states(kernel, path, like, dtype, evaluate)
        return GridScore(self.readout(path, like, times), call)


def _without_repeats(index: Tensor) -> list[Tensor]:
    """The positions of ``index`` in parts, in each of which no number repeats; as few parts as there can be."""
    order = index.argsort(stable=True)
    counts = torch.unique_consecutive(index[order], return_counts=True)[1]
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - first
    return [(rank == r).nonzero().flatten() for r in range(int(counts.max()))]


def on_states(
    kernel: Kernel,
    path: Path,
    like: Tensor,
    dtype: torch.dtype,
    evaluate: Callable[[Tensor, int, bool], Tensor],
    readout: Readout | None = None,
) -> Callable[[int, Tensor], Tensor]:
    """What a solver calls with (time number, its state), from ``evaluate``, which takes what the score or network sees.

    Args:
        kernel: the kernel, for its basis.
        path: of the grid's times.
        like: solver states (batch, *event).
        dtype: in which the score is called.
        evaluate: (x, i, kept) -> its value; ``kept`` says that x must not be changed, for it is the solver's own.
        readout: where the network sees a whitened state.
    """
    offset = levels(path.offset, like) if kernel.has_offset else None
    entry = None if readout is None or readout.input is None else readout.input.at_each(like)
    shift = None if readout is None or readout.shift is None else levels(readout.shift, like)
    plain = kernel.basis is None and dtype == like.dtype  # nothing to convert on the way

    def call(i: int, u: Tensor) -> Tensor:
        if entry is not None:
            seen = multiplied(entry[i], u if shift is None else u - shift[i])
        else:
            seen = u if offset is None else u + offset[i]
        if plain:
            return evaluate(seen, i, seen is u)
        converted = kernel.from_basis(seen).to(dtype)
        return kernel.to_basis(evaluate(converted, i, converted is u)).to(u.dtype)

    return call


def as_score(score: ScoreFunction | Callable[[Tensor, Tensor], Tensor], sde: DeclaredSDE) -> ScoreFunction:
    """``score`` as a score of ``sde``.

    Raises:
        ScoreError: if it is not callable.
        ValueError: if it belongs to another declaration.
    """
    if isinstance(score, ScoreFunction):
        if not score.same_sde(sde):
            raise ValueError(
                f"this score belongs to another SDE, dx = ({score.declaration.f}) dt + ({score.declaration.g}) dw with "
                f"T = {score.declaration.T:g}, than dx = ({sde.declaration.f}) dt + ({sde.declaration.g}) dw with "
                f"T = {sde.declaration.T:g}."
            )
        known, asked = (getattr(kernel.gaussian, "cutoff", 0.0) for kernel in (score.kernel, sde.kernel))
        if asked < known * (1 - 1e-6):
            raise ValueError(
                f"this score is of t from its SDE's cutoff {known:.6g} on, and the cutoff asked for is {asked:.6g}: "
                "make the score of that SDE, as Score(net, sde.with_cutoff(...))."
            )
        return score
    if not callable(score):
        raise ScoreError(f"a score must be callable as score(x, t), not {score!r}.")
    if type(score).__module__.startswith(_NETS):
        raise ScoreError(
            f"{type(score).__name__} is a network, and what it returns is no score yet: write sdeflow.Score(net, sde)."
        )
    return CallableScore(score, sde)


def network_time(t: Tensor, x: Tensor) -> Tensor:
    """t as a network gets it: a tensor of its own, (batch,), in the dtype of x (float32 under half precision)."""
    return network_times(t, x).expand(len(x)).clone()


def network_times(t: Tensor, x: Tensor) -> Tensor:
    """Times in the dtype that a network for states like ``x`` gets, on its device."""
    return t.to(device=x.device, dtype=torch.float32 if x.dtype in _LOW_PRECISION else x.dtype)


def checked(output: object, x: Tensor, who: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ScoreError(f"{who} must return a tensor, not {type(output).__name__}.")
    if output.shape != x.shape:
        raise ScoreError(f"{who} returned shape {tuple(output.shape)} for a state of shape {tuple(x.shape)}.")
    if output.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ScoreError(f"{who} returned {output.dtype} for a state of {x.dtype}.")
    if output.device != x.device:
        raise ScoreError(f"{who} returned a tensor on {output.device} for a state on {x.device}.")
    return output.to(x.dtype)


@contextmanager
def evaluating(score: object) -> Iterator[None]:
    """A score that is a module in eval mode, each part's own mode restored afterwards.

    Threads that ask one network at the same time share its parts: they come back when the last of the threads is done.
    """
    parts = list(score.modules()) if isinstance(score, nn.Module) else []
    with _evaluated_lock:
        ours = [part for part in parts if part.training or part in _evaluated]
        for part in ours:
            _evaluated[part] = _evaluated.get(part, 0) + 1
            part.training = False
    try:
        yield
    finally:
        with _evaluated_lock:
            for part in ours:
                _evaluated[part] -= 1
                if not _evaluated[part]:
                    del _evaluated[part]
                    part.training = True
