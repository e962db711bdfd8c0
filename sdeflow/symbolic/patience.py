"""SymPy with an end to it: what may run here, and what runs in a process of its own with seconds to live.

``integrate``, ``simplify``, ``expand`` of (1 + t)**64, even asking whether a polynomial is positive, can take
minutes and cannot be interrupted from within. So whatever rewrites an expression goes through :func:`patiently`:
what is :func:`small` is done at once; the rest in a fork of this process, which the operating system ends when it
has used up its *processor* time, however busy the machine is. Its caller then does without: a formula keeps its
integral sign, and numbers come by quadrature in any case.

The fork is made by ``os.fork`` and not by ``multiprocessing``, whose daemonic workers may have no children.
Where there is no fork (Windows), what is not small is not done.
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

__all__ = ["budget", "deadline", "growth", "patiently", "rehearsed", "small", "time_left", "within"]

Result = TypeVar("Result")
Other = TypeVar("Other")

_SECONDS = 0.5
_LARGEST_HERE = 40  # of growth; SymPy's time is about its square, 0.3 s at the limit
_LARGEST_RESULT = 4000  # nodes
_HUGE = 1e9
_WAVES = (sp.sin, sp.cos, sp.sinh, sp.cosh)
_COMPARING = (sp.Max, sp.Min, sp.Piecewise, sp.Mod)

_left: ContextVar[list[float] | None] = ContextVar("left", default=None)
_end: ContextVar[float] = ContextVar("end", default=math.inf)


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """What stands inside has ``seconds`` of processor time in all; within another budget, what is left of that."""
    outer = _left.get()
    token = _left.set([seconds]) if outer is None else None
    try:
        yield
    finally:
        if token is not None:
            _left.reset(token)


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """What stands inside is to be done in ``seconds`` of processor time, forks included, as :func:`time_left` tells.

    Forks end with it; what runs here must ask. Within another deadline the earlier of the two holds.
    """
    token = _end.set(min(_end.get(), _used() + seconds))
    try:
        yield
    finally:
        _end.reset(token)


def time_left() -> float:
    """Seconds until the :func:`deadline`; infinite where there is none."""
    return math.inf if _end.get() == math.inf else _end.get() - _used()


def _used() -> float:
    """The processor time of this thread, whose others may be many, and of the children that have ended."""
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
    """``function(*arguments)``: here where all expressions in the arguments are small, else :func:`within` ``seconds``.

    Args:
        function: of the top level of a module; None from it counts as a failure.
        arguments: expressions, matrices, dataclasses and dicts of them, and anything else.
        otherwise: what is returned where it takes too long or fails in the other process.
        seconds: of processor time.
    """
    if small(*arguments):
        try:
            found = function(*arguments)
        except Exception:  # as in a process of its own
            found = None
    else:
        found = within(seconds, function, *arguments)
    return otherwise if found is None else found


def within(seconds: float, function: Callable[..., Result], *arguments: object) -> Result | None:
    """``function(*arguments)`` in a process of its own; None where it takes longer, fails, or returns what is huge."""
    left = _left.get()
    seconds = min(seconds, time_left(), math.inf if left is None else left[0])
    if seconds < 0.01 or not hasattr(os, "fork"):
        return None
    receiver, sender = Pipe(duplex=False)
    with warnings.catch_warnings():  # of threads, which hold nothing that SymPy needs
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        receiver.close()
        _answer(sender, seconds, function, arguments)
    sender.close()
    try:
        # It is the processor time that counts; the clock is for a child that waits for a lock held at the fork.
        return receiver.recv() if receiver.poll(30 + 30 * seconds) else None
    except Exception:  # the child has died, or what it sent cannot be built again
        return None
    finally:
        receiver.close()
        used = _ended(child)
        if left is not None:
            left[0] -= used


def rehearsed(seconds: float, function: Callable[..., object], *arguments: object) -> bool:
    """Whether ``function(*arguments)`` comes to an end, good or bad, within ``seconds``: tried out in another process.

    For what must be done in this process afterwards, and cannot be interrupted there. True where there is no fork.
    """
    return not hasattr(os, "fork") or within(seconds, _ends, function, arguments) is not None


def _ends(function: Callable[..., object], arguments: tuple) -> bool:
    with contextlib.suppress(Exception):
        function(*arguments)
    return True


def _answer(sender: Connection, seconds: float, function: Callable[..., object], arguments: tuple) -> None:
    """The child's whole life."""
    try:
        gc.disable()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        signal.setitimer(signal.ITIMER_PROF, seconds)
        result = function(*arguments)
        sender.send(result if all(_nodes(e) <= _LARGEST_RESULT for e in _expressions([result])) else None)
    except BaseException:  # whatever SymPy stumbles on, the integral sign stays
        with contextlib.suppress(BaseException):
            sender.send(None)
    finally:
        os._exit(0)  # without the parent's exit handlers and buffers


def _ended(child: int) -> float:
    """Ends the child, and returns the processor time that it used."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    try:
        usage = os.wait4(child, 0)[2]
    except ChildProcessError:  # somebody else has waited for it
        return 0.0
    return usage.ru_utime + usage.ru_stime


def small(*values: object) -> bool:
    """Whether the expressions in ``values`` have so few terms, even multiplied out, that SymPy is done at once.

    A matrix of more than two rows and columns is not: its inverse alone may take SymPy minutes. Nor is an integral,
    which SymPy evaluates numerically wherever it asks for a sign.
    """
    if any(isinstance(value, sp.MatrixBase) and min(value.shape) > 2 for value in values):
        return False
    expressions = list(_expressions(values))
    if any(e.has(sp.Integral) for e in expressions):
        return False
    return sum(growth(e) for e in expressions) + _degree(expressions) <= _LARGEST_HERE


def _degree(expressions: list[sp.Basic]) -> float:
    """The degree of the polynomial that SymPy makes of exponentials and waves.

    It is 1000 of exp(-t) and exp(-1000 t), and 64 of sin(64 t), whose angle SymPy halves as long as it can.
    """
    numbers: dict[sp.Basic, set[sp.Rational]] = {}
    halved = 1
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
    return max(degrees, default=0.0) + float(min(halved, _HUGE)) - 1.0


def growth(expr: sp.Basic) -> float:
    """An estimate of the terms of ``expr`` and of all its parts, multiplied out."""
    terms: dict[sp.Basic, float] = {}

    def of(node: sp.Basic) -> float:
        if node not in terms:
            terms[node] = min(_HUGE, _terms(node, [of(argument) for argument in node.args]))
        return terms[node]

    of(expr)
    return sum(terms.values())


def _terms(node: sp.Basic, inner: list[float]) -> float:
    """The terms of one node whose arguments have ``inner`` terms."""
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
    """n over k, of which n - k + 1 is the number of terms of a sum and k its power."""
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log) if log < math.log(_HUGE) else _HUGE


def _nodes(expr: sp.Basic) -> int:
    """The nodes of ``expr``, copies counted, as far as the limit."""
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
