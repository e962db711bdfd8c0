"""SymPy expressions to torch functions: one walk over the tree builds closures.

No text is printed or evaluated. Each node becomes a Python closure over the slots of its arguments, equal
sub-expressions share a slot, and constants are folded in float64. The walk rewrites terms that would cancel near t = 0:

    c - c exp(z)   ->  -c expm1(z)          log(1 + z)  ->  log1p(z)
    c - c cos(z)   ->  2 c sin(z/2)^2       c - c cos(z)^2  ->  c sin(z)^2

Functions of time alone that torch lacks (Bessel, incomplete gamma, Lambert W, ...) are evaluated once by SciPy at
Chebyshev points and interpolated.

On a horizon [0, T] an expression that jumps at 0 or T has there its limit from inside, whatever the declaration says of
that one instant: a step that ends at T knows nothing of what f and g are after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar, overload

import numpy as np
import sympy as sp
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanAtom, BooleanFunction
from torch import Tensor

from sdeflow.errors import DeclarationError, ScheduleError
from sdeflow.numerics.breakpoints import break_points
from sdeflow.numerics.chebyshev import PiecewiseChebyshev, geometric_edges
from sdeflow.symbolic.enclosure import Enclosure, NoEnclosure
from sdeflow.symbolic.patience import small
from sdeflow.symbolic.schedule import CALLS, Schedule
from sdeflow.symbolic.special import special_functions
from sdeflow.symbolic.switches import JUMPING
from sdeflow.symbolic.symbols import t as time_symbol

__all__ = ["Compiled", "compile_expressions"]

Value: TypeAlias = Tensor | float
# A slot holds a tensor, or a float if it is a constant. This is known when an instruction is made, so calls do not
# check it, and types do not express it.
Slots: TypeAlias = list[Any]
Instruction: TypeAlias = Callable[[Slots], Value]
Result = TypeVar("Result")

_UNARY: dict[type, Callable[[Tensor], Tensor]] = {
    sp.exp: torch.exp, sp.log: torch.log, sp.Abs: torch.abs, sp.sign: torch.sign,
    sp.sin: torch.sin, sp.cos: torch.cos, sp.tan: torch.tan,
    sp.asin: torch.asin, sp.acos: torch.acos, sp.atan: torch.atan,
    sp.sinh: torch.sinh, sp.cosh: torch.cosh, sp.tanh: torch.tanh,
    sp.asinh: torch.asinh, sp.acosh: torch.acosh, sp.atanh: torch.atanh,
    sp.sec: lambda u: 1.0 / torch.cos(u), sp.csc: lambda u: 1.0 / torch.sin(u),
    sp.cot: lambda u: 1.0 / torch.tan(u), sp.coth: lambda u: 1.0 / torch.tanh(u),
    sp.sech: lambda u: 1.0 / torch.cosh(u), sp.csch: lambda u: 1.0 / torch.sinh(u),
    sp.floor: torch.floor, sp.ceiling: torch.ceil, sp.frac: lambda u: u - torch.floor(u),
    sp.erf: torch.erf, sp.erfc: torch.erfc, sp.loggamma: torch.lgamma,
    sp.gamma: lambda u: torch.exp(torch.lgamma(u)),
}  # fmt: skip

_BINARY: dict[type, Callable[[Tensor, Tensor], Tensor]] = {sp.Mod: torch.remainder, sp.atan2: torch.atan2}

_BESIDE = 1e-13  # of the horizon: how far inside its ends a limit from inside is taken
_ROUNDINGS = 4.0  # of a time in less than float64, likewise
_FURTHER, _JUMP = 64.0, 10.0  # a jump is so much larger than the change from there to so many times as far inside

_RELATIONS = {
    sp.Lt: torch.lt, sp.Le: torch.le, sp.Gt: torch.gt, sp.Ge: torch.ge, sp.Eq: torch.eq, sp.Ne: torch.ne,
}  # fmt: skip


@overload
def compile_expressions(
    expressions: list[sp.Expr] | tuple[sp.Expr, ...],
    arguments: Sequence[sp.Expr],
    values: Mapping[sp.Symbol, float | Tensor] | None = None,
    horizon: float | None = None,
) -> Compiled[tuple[Tensor, ...]]: ...


@overload
def compile_expressions(
    expressions: sp.Expr,
    arguments: Sequence[sp.Expr],
    values: Mapping[sp.Symbol, float | Tensor] | None = None,
    horizon: float | None = None,
) -> Compiled[Tensor]: ...


def compile_expressions(
    expressions: sp.Expr | Sequence[sp.Expr],
    arguments: Sequence[sp.Expr],
    values: Mapping[sp.Symbol, float | Tensor] | None = None,
    horizon: float | None = None,
) -> Compiled:
    """A torch function of ``arguments`` that returns the value of each expression.

    Args:
        expressions: one expression, or several; common parts are computed once.
        arguments: the symbols (or applied functions, such as s(x, t)) that become arguments, in order.
        values: numbers or tensors for the other symbols. Numbers become constants. Tensors are read at each call, in
            the dtype and on the device of the last argument, so gradients flow to them. They broadcast with the
            arguments.
        horizon: the end of the range [0, horizon] of time. It is needed for functions that are interpolated, and for
            limits from inside where an expression jumps at 0 or at the horizon.

    Raises:
        DeclarationError: if neither torch nor an interpolant can evaluate a function.
        ScheduleError: if a constant is not a finite real number.
    """
    return Compiled(expressions, tuple(arguments), dict(values or {}), horizon)


class Compiled(Generic[Result]):
    """A compiled SymPy expression: pure, differentiable, on any device.

    Attributes:
        expr: the expression that it computes, or the tuple of expressions.
        source: its instructions as text, for reading; this text is never executed.
    """

    def __init__(
        self,
        expressions: sp.Expr | Sequence[sp.Expr],
        arguments: tuple[sp.Expr, ...],
        values: dict[sp.Symbol, float | Tensor],
        horizon: float | None,
        limits: bool = True,
    ) -> None:
        self.single = isinstance(expressions, sp.Basic)
        self.expr = expressions if self.single else tuple(expressions)
        self.arguments = arguments
        self._values = {symbol: value for symbol, value in values.items() if not isinstance(value, Tensor)}
        self._tensors = {symbol: value for symbol, value in values.items() if isinstance(value, Tensor)}
        self._horizon = horizon
        self._slots: dict[sp.Basic, int] = {argument: i for i, argument in enumerate((*arguments, *self._tensors))}
        self._constants: dict[int, float] = {}
        self._instructions: list[tuple[int, Instruction]] = []
        self._lines: list[str] = []
        self._count = len(self._slots)
        self._outputs = [self._emit(e) for e in ((expressions,) if self.single else expressions)]
        # The slots after those of the arguments, before a call.
        first = len(arguments) + len(self._tensors)
        self._template = [self._constants.get(slot, 0.0) for slot in range(first, self._count)]
        del self._slots
        self._jumps = (False, False)
        if limits and horizon and time_symbol in arguments:
            self._jumps = self._jumps_at_ends(horizon)

    def __call__(self, *arguments: Tensor) -> Result:
        """The values, broadcast from the shapes of the arguments; a constant takes the shape of the last argument."""
        if any(self._jumps):
            i = self.arguments.index(time_symbol)
            arguments = (*arguments[:i], self._inside(arguments[i], self._horizon or 0.0), *arguments[i + 1 :])
        like = arguments[-1]
        tensors = (value.to(dtype=like.dtype, device=like.device) for value in self._tensors.values())
        slots: Slots = [*arguments, *tensors, *self._template]
        for slot, instruction in self._instructions:
            slots[slot] = instruction(slots)
        outputs = tuple(
            value if isinstance(value := slots[slot], Tensor) else _constant_like(like, value) for slot in self._outputs
        )
        return outputs[0] if self.single else outputs  # type: ignore[return-value]  # Result is a tensor where single

    def _jumps_at_ends(self, end: float) -> tuple[bool, bool]:
        """Whether what depends on t alone jumps at 0, and at the horizon.

        A value there that belongs to what is singular beside it, as 0 for t^(-1/4), is no jump: it has no limit.
        """
        others = [argument for argument in self.arguments if argument != time_symbol]
        wholes: Sequence[sp.Basic] = (self.expr,) if isinstance(self.expr, sp.Basic) else self.expr
        parts = {part for whole in wholes if whole.has(*JUMPING) for part in _parts_without(whole, others)}
        parts = {part for part in parts if part.has(time_symbol) and part.has(*JUMPING)}
        near, far = _BESIDE * end, _FURTHER * _BESIDE * end
        points = torch.tensor([[0.0, near, far], [end, end - near, end - far]], dtype=torch.float64)
        found = torch.zeros(2, dtype=torch.bool)
        with torch.no_grad():
            for part in sorted(parts, key=sp.default_sort_key):
                function: Compiled[Tensor] = Compiled(part, (time_symbol,), self._given, end, limits=False)
                sides = max((value.ndim for value in self._tensors.values()), default=0)
                values = function(points.reshape(2, 3, *(1,) * sides)).to(torch.float64)
                at, beside, further = values.reshape(2, 3, -1).unbind(1)
                rounding = _BESIDE * (at.abs() + beside.abs())
                found |= ((at - beside).abs() > _JUMP * (beside - further).abs() + rounding).any(1)
        return bool(found[0]), bool(found[1])

    def _inside(self, t: Tensor, end: float) -> Tensor:
        """``t`` with an end at which there is a jump moved inside, by no more than rounding."""
        own = _ROUNDINGS * torch.finfo(t.dtype).eps if t.dtype != torch.float64 else 0.0
        inside = max(_BESIDE, own) * end
        low, high = (inside if self._jumps[0] else None, end - inside if self._jumps[1] else None)
        return t + (t.clamp(low, high) - t).detach()

    @property
    def source(self) -> str:
        """The instructions in order, as readable text."""
        names = ", ".join(str(argument) for argument in self.arguments)
        returned = ", ".join(self._name(slot) for slot in self._outputs)
        body = "".join(f"    {line}\n" for line in self._lines)
        return f"def compiled({names}):\n{body}    return {returned}\n"

    @property
    def _given(self) -> dict[sp.Symbol, float | Tensor]:
        return {**self._values, **self._tensors}

    def __repr__(self) -> str:
        return f"Compiled({self.expr})"

    def _name(self, slot: int) -> str:
        inputs = (*self.arguments, *self._tensors)
        if slot < len(inputs):
            return str(inputs[slot])
        return repr(self._constants[slot]) if slot in self._constants else f"v{slot}"

    def _emit(self, expr: sp.Basic) -> int:
        """The slot that holds ``expr``; adds the instructions that fill it, if they do not exist yet."""
        if expr not in self._slots:
            self._slots[expr] = self._constant(expr) if self._is_constant(expr) else self._operation(expr)
        return self._slots[expr]

    def _is_constant(self, expr: sp.Basic) -> bool:
        free = expr.free_symbols | {a for a in self.arguments if not a.is_Symbol and expr.has(a)}
        varying = {*self.arguments, *self._tensors}
        unknown = free - varying - set(self._values)
        if unknown:
            raise DeclarationError(f"{expr} holds {', '.join(map(str, unknown))}, which has no value.")
        return not free & varying and not isinstance(expr, Relational | BooleanFunction | BooleanAtom)

    def _constant(self, expr: sp.Expr) -> int:
        number = expr.xreplace({k: sp.Float(v, 30) for k, v in self._values.items()}).evalf(20)
        if not number.is_number or number.is_real is False or not math.isfinite(float(number)):
            raise ScheduleError(f"{expr} = {number!s} is not a finite real number.")
        slot = self._new_slot()
        self._constants[slot] = float(number)
        return slot

    def _new_slot(self) -> int:
        self._count += 1
        return self._count - 1

    def _add(self, instruction: Instruction, text: str) -> int:
        slot = self._new_slot()
        self._instructions.append((slot, instruction))
        self._lines.append(f"v{slot} = {text}")
        return slot

    def _operation(self, expr: sp.Basic) -> int:
        if isinstance(expr, BooleanAtom):
            slot = self._new_slot()
            self._constants[slot] = float(bool(expr))
            return slot
        for kinds, rule in _RULES:
            if isinstance(expr, kinds):
                return rule(self, expr)
        if type(expr) in _UNARY:
            return self._call(_UNARY[type(expr)], expr, type(expr).__name__)
        if type(expr) in _BINARY:
            return self._call(_BINARY[type(expr)], expr, type(expr).__name__)
        if type(expr) in special_functions():
            return self._interpolated(expr)
        if isinstance(expr, sp.DiracDelta):
            raise DeclarationError(
                f"{expr}: f and g are functions, and DiracDelta is none. For a kick at t = c of size a write a narrow "
                "Gaussian in its place, a*exp(-((t - c)/w)**2/2)/(w*sqrt(2*pi)) with w = T/1000, say."
            )
        raise DeclarationError(f"{expr}: the function {type(expr).__name__} cannot be computed.")

    def _call(self, function: Callable[..., Tensor], expr: sp.Basic, name: str) -> int:
        slots = [self._emit(argument) for argument in expr.args]
        text = f"{name}({', '.join(self._name(i) for i in slots)})"
        if len(slots) == 1:
            (i,) = slots
            return self._add(lambda v: function(v[i]), text)

        def instruction(v: Slots) -> Value:
            like = next(v[i] for i in slots if isinstance(v[i], Tensor))
            return function(*(v[i] if isinstance(v[i], Tensor) else torch.full_like(like, v[i]) for i in slots))

        return self._add(instruction, text)

    def _sum(self, expr: sp.Add) -> int:
        stable = _without_cancellation(expr)
        if stable is not None:
            return self._terms(stable)
        return self._terms(expr.args)

    def _terms(self, terms: Sequence[sp.Expr]) -> int:
        slots = [self._emit(term) for term in terms]
        if len(slots) == 1:
            return slots[0]
        if len(slots) == 2:
            i, j = slots
            return self._add(lambda v: v[i] + v[j], f"{self._name(i)} + {self._name(j)}")
        first, *rest = slots

        def instruction(v: Slots) -> Value:
            total = v[first]
            for i in rest:
                total = total + v[i]
            return total

        return self._add(instruction, " + ".join(self._name(i) for i in slots))

    def _product(self, expr: sp.Mul) -> int:
        factors = list(expr.args)
        constants = [factor for factor in factors if self._is_constant(factor)]
        if len(constants) > 1:
            factors = [sp.Mul(*constants, evaluate=False), *(f for f in factors if f not in constants)]
            self._slots[factors[0]] = self._constant(sp.Mul(*constants))
        slot = self._emit(factors[0])
        for factor in factors[1:]:
            i, j = slot, self._emit(factor)
            slot = self._add(_times(i, j), f"{self._name(i)} * {self._name(j)}")
        return slot

    def _power(self, expr: sp.Pow) -> int:
        base, exponent = expr.args
        if self._is_constant(exponent):
            i, n = self._emit(base), self._constants[self._emit(exponent)]
            name = self._name(i)
            if n in _POWERS:
                function, text = _POWERS[n]
                return self._add(lambda v: function(v[i]), text.format(name))
            return self._add(lambda v: torch.pow(v[i], n), f"{name} ** {n:g}")
        if self._is_constant(base):
            c, i = self._constants[self._emit(base)], self._emit(exponent)
            if c <= 0:
                raise ScheduleError(f"{expr}: a base of {c:g} has no real powers.")
            log_c = math.log(c)
            return self._add(lambda v: torch.exp(v[i] * log_c), f"exp({log_c:.6g} * {self._name(i)})")
        i, j = self._emit(base), self._emit(exponent)
        return self._add(lambda v: torch.pow(v[i], v[j]), f"{self._name(i)} ** {self._name(j)}")

    def _logarithm(self, expr: sp.log) -> int:
        (argument,) = expr.args
        if argument.is_Add and 1 in argument.args:
            i = self._emit(argument - 1)
            return self._add(lambda v: torch.log1p(v[i]), f"log1p({self._name(i)})")
        return self._call(torch.log, expr, "log")

    def _expm1(self, expr: _Expm1) -> int:
        return self._call(torch.expm1, expr, "expm1")

    def _extremum(self, expr: sp.Max | sp.Min) -> int:
        function, name = (torch.maximum, "maximum") if isinstance(expr, sp.Max) else (torch.minimum, "minimum")
        first, *rest = sorted(expr.args, key=self._is_constant)  # a tensor first, to compare numbers with
        slot = self._emit(first)
        for argument in rest:
            i, j = slot, self._emit(argument)

            def instruction(v: Slots, i: int = i, j: int = j) -> Value:
                like = v[i] if isinstance(v[i], Tensor) else v[j]
                return function(*(torch.as_tensor(v[k], dtype=like.dtype, device=like.device) for k in (i, j)))

            slot = self._add(instruction, f"{name}({self._name(i)}, {self._name(j)})")
        return slot

    def _relation(self, expr: Relational) -> int:
        function = _RELATIONS[type(expr)]
        i, j = (self._emit(argument) for argument in expr.args)

        def instruction(v: Slots) -> Value:
            if isinstance(v[i], Tensor):
                return function(v[i], v[j])
            # In the precision of the other operand: a number alone would become float32.
            dtype = v[j].dtype if isinstance(v[j], Tensor) else torch.float64
            return function(torch.as_tensor(v[i], dtype=dtype), v[j])

        return self._add(instruction, f"{self._name(i)} {expr.rel_op} {self._name(j)}")

    def _logic(self, expr: BooleanFunction) -> int:
        slots = [self._emit(argument) for argument in expr.args]
        text = f"{type(expr).__name__}({', '.join(self._name(i) for i in slots)})"
        if isinstance(expr, sp.Not):
            (i,) = slots
            return self._add(lambda v: torch.logical_not(v[i]), text)
        combine = torch.logical_and if isinstance(expr, sp.And) else torch.logical_or

        def instruction(v: Slots) -> Value:
            total = v[slots[0]]
            for i in slots[1:]:
                total = combine(total, v[i])
            return total

        return self._add(instruction, text)

    def _heaviside(self, expr: sp.Heaviside) -> int:
        i, at_zero = self._emit(expr.args[0]), float(expr.args[1])
        return self._add(
            lambda v: torch.heaviside(v[i], torch.full_like(v[i], at_zero)), f"heaviside({self._name(i)}, {at_zero})"
        )

    def _piecewise(self, expr: sp.Piecewise) -> int:
        """torch.where, with each branch computed at safe arguments where its condition is false.

        Otherwise a branch that is singular where it is not used, such as sqrt(t) at 0, would turn the gradient of the
        other branch into NaN.
        """
        conditions = [self._emit(condition) for _, condition in expr.args]
        branches: list[Compiled[Tensor]] = [
            Compiled(e, self.arguments, self._given, self._horizon, limits=False) for e, _ in expr.args
        ]
        safe = [_safe_arguments(branch) for branch in branches]
        n = len(self.arguments)

        def instruction(v: Slots) -> Value:
            arguments = torch.broadcast_tensors(*v[:n])
            total = torch.full_like(arguments[-1], math.nan)
            for condition, branch, at in reversed(list(zip(conditions, branches, safe, strict=True))):
                taken = v[condition]
                if not isinstance(taken, Tensor):
                    taken = torch.full_like(total, taken) > 0
                masked = [torch.where(taken, a, torch.full_like(a, at)) for a in arguments]
                total = torch.where(taken, branch(*masked), total)
            return total

        text = ", ".join(f"{e} if {c}" for e, c in expr.args)
        return self._add(instruction, f"where({text})")

    def _interpolated(self, expr: sp.Function) -> int:
        """A function of time alone that torch lacks, as an interpolant over [0, horizon]."""
        function = special_functions()[type(expr)]
        return self._table(expr, lambda *arguments: function(*arguments))

    def _schedule(self, expr: Schedule) -> int:
        """A schedule without a formula, or a derivative of one, as an interpolant over [0, horizon]."""
        # The derivatives of a table are known; others are those of an interpolant.
        return self._table(expr, expr.values, 0 if expr.known else expr.order)

    def _table(self, expr: sp.Function, function: Callable[..., np.ndarray], order: int = 0) -> int:
        if not expr.free_symbols <= {time_symbol, *self._values} or self._horizon is None:
            raise DeclarationError(
                f"{expr}: torch lacks {type(expr).__name__}; an interpolant serves only functions of t alone, "
                "without tensors among its parameters."
            )
        inner: Compiled[tuple[Tensor, ...]] = Compiled(
            expr.args, (time_symbol,), dict(self._values), self._horizon, limits=False
        )

        def values(points: np.ndarray) -> np.ndarray:
            return np.asarray(function(*(a.numpy() for a in inner(torch.as_tensor(points)))))[None]

        # A derivative amplifies rounding by 1 / width, so its panels are as wide as possible.
        start = np.linspace(0.0, self._horizon, 65) if order else geometric_edges(0.0, self._horizon)
        try:
            bound = Enclosure([expr], self._values, self._horizon)
        except NoEnclosure:  # such as a derivative: the samples decide
            bound = None
        edges = np.union1d(start, break_points([expr], self._values, self._horizon))
        table = PiecewiseChebyshev.fit(values, edges, bound=bound, name=str(expr))
        for _ in range(order):
            table = table.derivative()
        i = self._slots[time_symbol]
        return self._add(lambda v: table(v[i])[0].to(v[i].dtype), f"interpolant of {expr}")


class _Expm1(sp.Function):
    """e^z - 1; only the compiler makes this node."""

    nargs = 1


def _without_cancellation(expr: sp.Add) -> list[sp.Expr] | None:
    """The terms of ``expr`` rewritten without cancellation near 0, or None if no rewriting applies."""
    exponentials, others = [], []
    for term in expr.args:
        found = [f for f in sp.Mul.make_args(term) if isinstance(f, sp.exp) or (f.is_Pow and f.exp.free_symbols)]
        if len(found) == 1 and (
            isinstance(found[0], sp.exp) or (found[0].base.is_number and found[0].base.is_positive)
        ):
            power = found[0]
            z = power.args[0] if isinstance(power, sp.exp) else power.exp * sp.log(power.base)
            rest = [factor for factor in sp.Mul.make_args(term) if factor != power]
            exponentials.append((sp.Mul(*rest), z))
        else:
            others.append(term)
    if exponentials and others and _vanishes(sp.Add(*others, *(c for c, _ in exponentials))):
        return [c * _Expm1(z) for c, z in exponentials]
    if len(expr.args) == 2:
        for constant, term in (expr.args, expr.args[::-1]):
            for cosine in term.atoms(sp.cos):
                (z,) = cosine.args
                if _vanishes(constant + term / cosine):
                    return [2 * constant * sp.sin(z / 2) ** 2]
                if _vanishes(constant + term / cosine**2):
                    return [constant * sp.sin(z) ** 2]
    return None


def _vanishes(expr: sp.Expr) -> bool:
    """Whether ``expr`` is 0 after expansion; an expression too large to expand counts as not 0."""
    return expr == 0 or (small(expr) and sp.expand(expr) == 0)


def _with_tensors(function: Callable, points: np.ndarray) -> np.ndarray:
    """The values at times (n,) of a schedule's function that takes only tensors."""
    with torch.no_grad():
        return torch.as_tensor(function(torch.tensor(points))).detach().double().cpu().numpy()


CALLS.append(_with_tensors)


def _times(i: int, j: int) -> Instruction:
    return lambda v: v[i] * v[j]


def _constant_like(tensor: Tensor, value: float) -> Tensor:
    """``value`` in the shape of ``tensor``, without its memory."""
    return tensor.new_full((), value).expand(tensor.shape)


def _parts_without(expr: sp.Basic, others: Sequence[sp.Expr]) -> Iterator[sp.Basic]:
    """The largest parts of an expression, and conditions in it, in which none of ``others`` occurs."""
    if isinstance(expr, sp.Expr | Boolean) and not expr.has(*others):
        yield expr
        return
    for part in expr.args:
        yield from _parts_without(part, others)


def _safe_arguments(branch: Compiled[Tensor]) -> float:
    """A number at which ``branch`` is finite when all arguments take it."""
    for candidate in (1.0, 0.5, -0.5, 2.0, -2.0, 0.1, 0.0):
        point = [torch.tensor(candidate, dtype=torch.float64)] * len(branch.arguments)
        if bool(torch.isfinite(branch(*point)).all()):
            return candidate
    return 1.0


_POWERS: dict[float, tuple[Callable[[Tensor], Tensor], str]] = {
    2.0: (lambda u: u * u, "{0} * {0}"),
    -1.0: (torch.reciprocal, "1 / {0}"),
    0.5: (torch.sqrt, "sqrt({0})"),
    -0.5: (torch.rsqrt, "1 / sqrt({0})"),
}

_RULES: tuple[tuple[tuple[type, ...], Callable[[Compiled, sp.Basic], int]], ...] = (
    ((sp.Add,), Compiled._sum),
    ((sp.Mul,), Compiled._product),
    ((sp.Pow,), Compiled._power),
    ((_Expm1,), Compiled._expm1),
    ((sp.log,), Compiled._logarithm),
    ((sp.Max, sp.Min), Compiled._extremum),
    ((Relational,), Compiled._relation),
    ((sp.And, sp.Or, sp.Not), Compiled._logic),
    ((sp.Piecewise,), Compiled._piecewise),
    ((sp.Heaviside,), Compiled._heaviside),
    ((Schedule,), Compiled._schedule),
)
