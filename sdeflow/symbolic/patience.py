"""Calls of SymPy with a time limit: small ones run here, others in a forked process that is ended after some seconds.

``integrate``, ``simplify``, ``expand`` of (1 + t)**64, and even the question whether a polynomial is positive can take
minutes and cannot be interrupted from within. So all that rewrites an expression goes through :func:`patiently`. If the
arguments are :func:`small`, it runs at once. If not, it runs in a fork of this process, which the operating system ends
when its *processor* time is used up, also on a busy machine. The caller then does without the result: a formula keeps
its integral sign, and numbers come from quadrature in any case.

The fork is made by ``os.fork`` and not by ``multiprocessing``, whose daemonic workers may not have children. Without
fork (on Windows), only small calls are made.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from multiprocessing.connection import Connection, Pipe
from typing import TypeVar, overload

import sympy as sp

__all__ = ["budget", "deadline", "growth", "operations", "patiently", "rehearsed", "small", "time_left", "within"]

Result = TypeVar("Result")
Other = TypeVar("Other")

_SECONDS = 0.5
_LARGEST_HERE = 40  # the largest growth; SymPy's time grows like its square and is 0.3 s at the limit
_LARGEST_RESULT = 4000  # nodes of a result
_HUGE = 1e9
_WAVES = (sp.sin, sp.cos, sp.sinh, sp.cosh)
_COMPARING = (sp.Max, sp.Min, sp.Piecewise, sp.Mod)

_left: ContextVar[list[float] | None] = ContextVar("left", default=None)
_end: ContextVar[float] = ContextVar("end", default=math.inf)


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """A context with ``seconds`` of processor time for all its forks; inside another budget, with the rest of that."""
    outer = _left.get()
    token = _left.set([seconds]) if outer is None else None
    try:
        yield
    finally:
        if token is not None:
            _left.reset(token)


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """A context that may use ``seconds`` of processor time, forks included; :func:`time_left` says how much is left.

    Forks are ended at the deadline; code in this process must ask. Inside another deadline the earlier one holds.
    """
    token = _end.set(min(_end.get(), _used() + seconds))
    try:
        yield
    finally:
        _end.reset(token)


def time_left() -> float:
    """Seconds until the :func:`deadline`; infinite without one."""
    return math.inf if _end.get() == math.inf else _end.get() - _used()


def _used() -> float:
    """The processor time of this thread (there may be many others) and of the children that have ended."""
    return time.thread_time() + sum(os.times()[2:4])


@overload
def patiently(
    function: Callable[..., Result], *arguments: object, otherwise: None = None, seconds: float = _SECONDS
) -> Result | None: ...


@overload
def patiently(
    function: Callable[..., Result], *arguments: object, otherwise: Other, seconds: float = _SECONDS
) -> Result | Other: ...


def patiently(
    function: Callable[..., object], *arguments: object, otherwise: object = None, seconds: float = _SECONDS
) -> object:
    """``function(*arguments)``: here if all expressions in the arguments are small, else :func:`within` ``seconds``.

    Args:
        function: a function of the top level of a module; its result None counts as a failure.
        arguments: expressions, matrices, dataclasses and dicts of these, and anything else.
        otherwise: the result if it takes too long or fails in the other process.
        seconds: the limit of processor time.
    """
    if small(*arguments):
        try:
            found = function(*arguments)
        except Exception:  # as in a separate process
            found = None
    else:
        found = within(seconds, function, *arguments)
    return otherwise if found is None else found


def within(seconds: float, function: Callable[..., Result], *arguments: object) -> Result | None:
    """``function(*arguments)`` in a separate process; None if it takes longer, fails, or returns a huge result."""
    left = _left.get()
    seconds = min(seconds, time_left(), math.inf if left is None else left[0])
    if seconds < 0.01 or not hasattr(os, "fork"):
        return None
    receiver, sender = Pipe(duplex=False)
    with warnings.catch_warnings():  # about threads; they hold no lock that SymPy needs
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        receiver.close()
        _answer(sender, seconds, function, arguments)
    sender.close()
    try:
        # Processor time counts. The wall clock is for a child that waits for a lock held at the fork.
        return receiver.recv() if receiver.poll(30 + 30 * seconds) else None
    except Exception:  # the child has died, or its result cannot be rebuilt
        return None
    finally:
        receiver.close()
        used = _ended(child)
        if left is not None:
            left[0] -= used


def rehearsed(seconds: float, function: Callable[..., object], *arguments: object) -> bool:
    """Whether ``function(*arguments)`` ends within ``seconds``, with or without an error: tried in another process.

    For work that must be done in this process afterwards and cannot be interrupted there. True if there is no fork.
    """
    return not hasattr(os, "fork") or within(seconds, _ends, function, arguments) is not None


def _ends(function: Callable[..., object], arguments: tuple) -> bool:
    with contextlib.suppress(Exception):
        function(*arguments)
    return True


def _answer(sender: Connection, seconds: float, function: Callable[..., object], arguments: tuple) -> None:
    """All that the child does."""
    try:
        gc.disable()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        signal.setitimer(signal.ITIMER_PROF, seconds)
        result = function(*arguments)
        sender.send(result if all(_nodes(e) <= _LARGEST_RESULT for e in _expressions([result])) else None)
    except BaseException:  # after any failure of SymPy the integral sign stays
        with contextlib.suppress(BaseException):
            sender.send(None)
    finally:
        os._exit(0)  # without the parent's exit handlers and buffers


def _ended(child: int) -> float:
    """Ends the child and returns its processor time."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    try:
        usage = os.wait4(child, 0)[2]
    except ChildProcessError:  # other code has waited for it
        return 0.0
    return usage.ru_utime + usage.ru_stime


def small(*values: object) -> bool:
    """Whether the expressions in ``values`` have so few terms, also after expansion, that SymPy needs little time.

    A matrix larger than 2 x 2 is not small, because its inverse alone may take SymPy minutes. An integral is not small
    either, because SymPy evaluates it numerically to find its sign.
    """
    if any(isinstance(value, sp.MatrixBase) and min(value.shape) > 2 for value in values):
        return False
    expressions = list(_expressions(values))
    if any(e.has(sp.Integral) for e in expressions):
        return False
    return sum(growth(e) for e in expressions) + _degree(expressions) <= _LARGEST_HERE


def _degree(expressions: list[sp.Basic]) -> float:
    """The degree of the polynomial that SymPy makes from powers, exponentials, sines and cosines.

    It is 1000 for t**1000, for t**(1/1000), and for exp(-t) and exp(-1000 t), and 64 for sin(64 t), whose angle SymPy
    halves as often as possible. Even t**1000 > 0 is a question of this degree: SymPy stores every power up to it.
    """
    numbers: dict[sp.Basic, set[sp.Rational]] = {}
    halved = 1
    exponents = [power.exp for power in set().union(*(e.atoms(sp.Pow) for e in expressions))]
    powers = max((max(abs(e.p), e.q) for e in exponents if isinstance(e, sp.Rational)), default=1)
    for function in set().union(*(e.atoms(sp.exp, *_WAVES) for e in expressions)):
        for term in sp.Add.make_args(function.args[0]):
            number, rest = term.as_coeff_Mul()
            if not isinstance(number, sp.Rational):
                continue
            if isinstance(function, sp.exp):
                numbers.setdefault(rest, set()).add(abs(number))
            else:
                halved = max(halved, number.p & -number.p)  # the largest power of 2 in it
    degrees = (float(max(own) / sp.gcd_list(sorted(own))) for own in numbers.values())
    return max(degrees, default=0.0) + float(min(halved, _HUGE)) + float(min(powers, _HUGE)) - 2.0


def growth(expr: sp.Basic) -> float:
    """An estimate of the number of terms of ``expr`` and of all its parts after expansion."""
    terms: dict[sp.Basic, float] = {}

    def of(node: sp.Basic) -> float:
        if node not in terms:
            terms[node] = min(_HUGE, _terms(node, [of(argument) for argument in node.args]))
        return terms[node]

    of(expr)
    return sum(terms.values())


def operations(expr: sp.Basic) -> int:
    """How many operations ``expr`` is written with; ``sp.count_ops``, which asks for signs, takes much longer."""
    counts: dict[sp.Basic, int] = {}

    def of(node: sp.Basic) -> int:
        if node not in counts:
            counts[node] = sum(map(of, node.args), max(1, len(node.args) - 1)) if node.args else 0
        return counts[node]

    return of(expr)


def _terms(node: sp.Basic, inner: list[float]) -> float:
    """The number of terms of a node whose arguments have ``inner`` terms."""
    if isinstance(node, sp.Rational):
        return 1.0 + max(abs(node.p).bit_length(), node.q.bit_length()) / 32
    if isinstance(node, sp.Mul):
        return min(_HUGE, math.prod(inner))
    if isinstance(node, _COMPARING):
        return len(inner) * sum(inner)
    if isinstance(node, sp.Pow) and node.exp.is_Rational and inner[0] < _HUGE:
        n = max(1, abs(node.exp.p))
        return _binomial(inner[0] + n - 1, n)
    return max(1.0, sum(inner))


def _binomial(n: float, k: float) -> float:
    """n over k; a sum of n - k + 1 terms to the power k has so many terms."""
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log) if log < math.log(_HUGE) else _HUGE


def _nodes(expr: sp.Basic) -> int:
    """The number of nodes of ``expr``, with copies, counted up to the limit."""
    count = 0
    for _ in sp.preorder_traversal(expr):
        count += 1
        if count > _LARGEST_RESULT:
            break
    return count


def _expressions(values: Iterable[object]) -> Iterator[sp.Basic]:
    """The SymPy expressions in (nested) tuples, lists, dicts, matrices and dataclasses."""
    for value in values:
        if isinstance(value, sp.MatrixBase):
            yield from value
        elif isinstance(value, sp.Basic):
            yield value
        elif isinstance(value, Mapping):
            yield from _expressions(value.values())
        elif isinstance(value, list | tuple):
            yield from _expressions(value)
        elif is_dataclass(value) and not isinstance(value, type):
            yield from _expressions(getattr(value, field.name) for field in fields(value))
