"""Expressions as plain data and exactly back: a tree of allowed nodes that JSON can hold.

One node is one dict. Nothing else is read, and no text is evaluated:

    {"int": 3}   {"rational": [1, 3]}   {"float": "0x1999999999999ap-56", "precision": 53}   {"bool": true}
    {"symbol": "x"}   {"constant": "pi"}   {"call": "beta", "args": [...]}   {"matrix": [[...], ...]}
    {"op": "Add", "args": [...]}, with "evaluate": false if SymPy would rewrite the stored expression

``op`` is Add, Mul, Pow, a name of :data:`FUNCTIONS`, a relation such as "<", And, Or, Not, or Piecewise (value,
condition, value, condition, ...). ``call`` is a function that the application defines. A matrix is allowed only at the
top.

A tree from an unknown source is checked completely before anything is built. It is then built from the leaves upwards,
because SymPy computes while it builds: 2**(2**40) has five nodes, and so has 2**(2**40*t)**(1/t), whose exponent is a
number only after t has cancelled. So before each step its arguments, as SymPy has rewritten them, are compared with the
limits, and after the step the result is, so that no step starts from a large expression.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import sympy as sp
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanAtom

from sdeflow.errors import DeclarationError, UnsafeExpressionError
from sdeflow.symbolic.patience import growth

__all__ = [
    "FUNCTIONS",
    "MAX_DEPTH",
    "MAX_EXPONENT",
    "MAX_INTEGER",
    "MAX_NODES",
    "OF_TIME_ALONE",
    "from_tree",
    "to_tree",
]

MAX_NODES = 2000
MAX_DEPTH = 64
MAX_INTEGER = 2**63
MAX_EXPONENT = 64

# SymPy's numerical evaluation of a larger constant, such as exp(exp(exp(9))), would use any amount of memory.
_LARGEST, _SMALLEST = 1e300, 1e-300
_MAX_CONSTANT = 250
# Functions of two arguments are expanded order by order.
_LARGEST_ORDER = 20
_MAX_OF_TWO = 8
# SymPy compares the arguments of Max and Min in pairs.
_MAX_EXTREMUM = 16
_MAX_JUDGED = 40  # the largest growth of an expression that it compares
_MAX_ROOT_BITS = 14
# SymPy factors the product of the arguments of roots.
_MAX_RADICAL_BITS = 1024
_MAX_PRECISION = 1024

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}\Z")
_FLOAT = re.compile(r"(-?)0x([0-9a-f]{1,256})p(-?[0-9]{1,4})\Z")

# SymPy writes these at integers as exact numbers or sums, whose length grows with the integer.
_SPECIAL = (
    sp.gamma, sp.loggamma, sp.besselj, sp.bessely, sp.besseli, sp.besselk, sp.lowergamma, sp.uppergamma, sp.LambertW,
    sp.erfi, sp.erfinv, sp.Ei, sp.expint, sp.digamma, sp.zeta, sp.Si, sp.Ci, sp.Shi, sp.Chi, sp.fresnels, sp.fresnelc,
    sp.elliptic_k, sp.beta, sp.airyai, sp.airybi,
)  # fmt: skip
_ELEMENTARY = (
    sp.exp, sp.log, sp.Abs, sp.sign, sp.sin, sp.cos, sp.tan, sp.asin, sp.acos, sp.atan, sp.sinh, sp.cosh, sp.tanh,
    sp.asinh, sp.acosh, sp.atanh, sp.sec, sp.csc, sp.cot, sp.coth, sp.sech, sp.csch, sp.floor, sp.ceiling, sp.frac,
    sp.Mod, sp.atan2, sp.Max, sp.Min, sp.Heaviside, sp.erf, sp.erfc,
)  # fmt: skip

_ROUNDING = (sp.floor, sp.ceiling, sp.frac, sp.Mod)
_EXPONENTIAL = (sp.exp, sp.sinh, sp.cosh, sp.gamma, sp.erfi)
_HYPERBOLIC = (sp.sinh, sp.cosh, sp.tanh, sp.coth, sp.sech, sp.csch)

FUNCTIONS: dict[str, type[sp.Basic]] = {function.__name__: function for function in _ELEMENTARY + _SPECIAL}
"""The functions that are allowed in trees and text: the compiler can compute all of them."""

OF_TIME_ALONE = tuple(function for function in _SPECIAL if function not in (sp.gamma, sp.loggamma))
"""The functions that torch lacks: their arguments must not contain the state."""

_RELATIONS = {"<": sp.Lt, "<=": sp.Le, ">": sp.Gt, ">=": sp.Ge, "==": sp.Eq, "!=": sp.Ne}
_LOGIC = {"And": sp.And, "Or": sp.Or, "Not": sp.Not}
_ARITHMETIC = {"Add": sp.Add, "Mul": sp.Mul, "Pow": sp.Pow, **FUNCTIONS}
_OPERATIONS = {**_ARITHMETIC, **_RELATIONS, **_LOGIC, "Piecewise": sp.Piecewise}
_OPERATION_NAMES = {function: name for name, function in _OPERATIONS.items()}
_CONSTANTS = {"pi": sp.pi, "E": sp.E, "EulerGamma": sp.EulerGamma, "GoldenRatio": sp.GoldenRatio}
_CONSTANT_NAMES = {constant: name for name, constant in _CONSTANTS.items()}
_NOT_REAL = (sp.I, sp.nan, sp.zoo, sp.oo, -sp.oo)


def to_tree(expr: sp.Basic | sp.MatrixBase, functions: Mapping[str, type[sp.Function]] | None = None) -> object:
    """``expr`` as plain data that JSON can hold; :func:`from_tree` returns an equal expression from it.

    Args:
        expr: an expression that the compiler supports, or a matrix of such expressions.
        functions: the functions of the application by name; by default those that ``expr`` applies.

    Raises:
        UnsafeExpressionError: if the limits or the list of allowed nodes exclude a part of it.
        DeclarationError: if it could not be restored exactly.
    """
    if not isinstance(expr, sp.Basic | sp.MatrixBase):
        raise DeclarationError(f"a SymPy expression or matrix is needed, not {type(expr).__name__}: {expr!r}")
    writer = _Writer(functions or {})
    tree = writer.whole(expr)
    again = from_tree(tree, writer.names, writer.functions)
    # SymPy's == ignores the precision of a Float; a comparison of the trees does not.
    if again != expr or _Writer(writer.functions).whole(again) != tree:
        raise DeclarationError(f"{expr} cannot be stored: what is read back is {again}.")
    return tree


def from_tree(
    tree: object, names: Mapping[str, sp.Basic], functions: Mapping[str, type[sp.Function]] | None = None
) -> sp.Basic:
    """The expression that :func:`to_tree` stored.

    Args:
        tree: plain data from any source; it is not trusted.
        names: the symbols by name.
        functions: the functions of the application by name.

    Raises:
        UnsafeExpressionError: if it is not such a tree, or exceeds the limits.
        DeclarationError: if ``names`` lacks one of its symbols.
    """
    functions = functions or {}
    checker = _Checker(names, functions)
    if type(tree) is not dict:
        raise _malformed(tree, "each node is a dict")
    if set(tree) != {"matrix"}:
        checker.check(tree, 1)
        built = _build(tree, names, functions, _Builder(functions))
        _require_low_tower(built)
        return built
    rows = tree["matrix"]
    if not (type(rows) is list and rows and all(type(row) is list and row for row in rows)):
        raise _malformed(tree, "a matrix is a list of rows")
    if len({len(row) for row in rows}) != 1:
        raise _malformed(tree, "the rows of a matrix are equally long")
    for entry in (entry for row in rows for entry in row):
        if checker.check(entry, 2) is not sp.Expr:
            raise _malformed(entry, "an entry of a matrix is a value, not a condition")
    builder = _Builder(functions)
    built = sp.ImmutableMatrix([[_build(entry, names, functions, builder) for entry in row] for row in rows])
    for entry in built:
        _require_low_tower(entry)
    return built


def _malformed(tree: object, reason: str) -> UnsafeExpressionError:
    shown = ", ".join(repr(key)[:20] for key in list(tree)[:4] if type(key) is str) if type(tree) is dict else ""
    return UnsafeExpressionError(f"not an expression: {reason} (at a {type(tree).__name__} of {shown or 'no keys'}).")


class _Checker:
    """Checks a tree: its format, the list of allowed nodes, and the limits. It builds nothing."""

    def __init__(self, names: Mapping[str, sp.Basic], functions: Mapping[str, type[sp.Function]]) -> None:
        self._names, self._functions = names, functions
        self._nodes = 0

    def check(self, tree: object, depth: int) -> type:
        """The kind of a tree: ``Expr`` for a value, ``Boolean`` for a condition."""
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise UnsafeExpressionError(f"an expression has at most {MAX_NODES} nodes, nested {MAX_DEPTH} deep.")
        if type(tree) is not dict:
            raise _malformed(tree, "each node is a dict")
        if set(tree) in ({"op", "args"}, {"op", "args", "evaluate"}, {"call", "args"}):
            return self._operation(tree, depth)
        if set(tree) == {"bool"} and type(tree["bool"]) is bool:
            return Boolean
        if not _is_leaf(tree):
            raise _malformed(tree, "unknown or badly filled node")
        if "symbol" in tree and tree["symbol"] not in self._names:
            raise DeclarationError(f"unknown symbol {tree['symbol']!r}; known are {', '.join(self._names) or 'none'}.")
        return sp.Expr

    def _operation(self, tree: dict, depth: int) -> type:
        name, args = tree.get("op", tree.get("call")), tree["args"]
        known = _OPERATIONS if "op" in tree else self._functions
        if type(name) is not str or not (name in _OPERATIONS if "op" in tree else _NAME.match(name)):
            raise _malformed(tree, f"{name[:40]!r} is no operation" if type(name) is str else "an operation is a name")
        if name not in known:
            raise UnsafeExpressionError(f"the function {name} is not known here; known: {', '.join(known) or 'none'}.")
        if type(args) is not list or not args or tree.get("evaluate", False) is not False:
            raise _malformed(tree, "args is a list that is not empty, and evaluate, if there, is false")
        found = [self.check(argument, depth + 1) for argument in args]
        if name == "Piecewise" and "op" in tree:
            wanted, kind = [sp.Expr, Boolean] * ((len(args) + 1) // 2), sp.Expr
        else:
            wanted = [Boolean if name in _LOGIC and "op" in tree else sp.Expr] * len(args)
            kind = Boolean if "op" in tree and name in (*_LOGIC, *_RELATIONS) else sp.Expr
        if found != wanted:
            raise _malformed(tree, f"{name} was given a condition for a value or the reverse")
        if name in (*_RELATIONS, "Pow", "Not") and "op" in tree and len(args) != (1 if name == "Not" else 2):
            raise _malformed(tree, f"{name} does not take {len(args)} arguments")
        return kind


def _is_leaf(tree: dict) -> bool:
    """Whether ``tree`` is a number, constant or symbol within the limits."""
    match tree:
        case {"float": digits, "precision": precision}:
            return len(tree) == 2 and type(digits) is str and type(precision) is int and _is_float(digits, precision)
        case _ if len(tree) != 1:
            return False
        case {"int": value}:
            return _is_integer(value)
        case {"rational": value}:
            return type(value) is list and len(value) == 2 and all(map(_is_integer, value)) and value[1] > 0
        case {"symbol": value}:
            return type(value) is str and _NAME.match(value) is not None
        case {"constant": value}:
            return type(value) is str and value in _CONSTANTS
    return False


def _is_float(digits: str, precision: int) -> bool:
    """Whether ``digits`` are sign, mantissa and exponent, in lowest terms, of a number of moderate size or of 0."""
    parts = _FLOAT.match(digits)
    if parts is None or not 1 <= precision <= _MAX_PRECISION:
        return False
    mantissa, exponent = int(parts[2], 16), int(parts[3])
    bits = mantissa.bit_length()
    normal = mantissa % 2 == 1 and bits <= precision and abs(bits + exponent) < math.log2(_LARGEST)
    return normal or digits == "0x0p0"


def _is_integer(value: object) -> bool:
    return type(value) is int and abs(value) < MAX_INTEGER


def _build(
    tree: dict, names: Mapping[str, sp.Basic], functions: Mapping[str, type[sp.Function]], builder: _Builder
) -> sp.Basic:
    """The expression of a checked tree."""
    match tree:
        case {"int": value}:
            return sp.Integer(value)
        case {"rational": [p, q]}:
            return sp.Rational(p, q)
        case {"float": digits, "precision": precision}:
            match = _FLOAT.match(digits)
            if match is None:
                raise _malformed(tree, "a float is sign, mantissa and exponent")
            sign, mantissa, exponent = match.groups()
            man = int(mantissa, 16)
            value = (int(sign == "-"), man, int(exponent), man.bit_length()) if man else 0.0
            return sp.Float(value, precision=precision)
        case {"bool": value}:
            return sp.true if value else sp.false
        case {"symbol": name}:
            return names[name]
        case {"constant": name}:
            return _CONSTANTS[name]
    args = [_build(argument, names, functions, builder) for argument in tree["args"]]
    function = _OPERATIONS[tree["op"]] if "op" in tree else functions[tree["call"]]
    return builder.apply(function, args, tree.get("evaluate", True))


class _Writer:
    """Turns SymPy nodes into trees, and collects their symbols and functions."""

    def __init__(self, functions: Mapping[str, type[sp.Function]]) -> None:
        self.names: dict[str, sp.Basic] = {}
        self.functions = dict(functions)
        self._builder = _Builder(self.functions)
        self._nodes = 0

    def whole(self, expr: sp.Basic | sp.MatrixBase) -> dict:
        if isinstance(expr, sp.MatrixBase):
            return {"matrix": [[self.write(entry, 2) for entry in row] for row in expr.tolist()]}
        return self.write(expr, 1)

    def write(self, expr: sp.Basic, depth: int) -> dict:
        """The tree of an expression at the depth ``depth``."""
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise UnsafeExpressionError(f"an expression has at most {MAX_NODES} nodes, nested {MAX_DEPTH} deep.")
        leaf = self._leaf(expr)
        if leaf is not None:
            return leaf
        if expr.func in _OPERATION_NAMES:
            args = [e for pair in expr.args for e in pair.args] if expr.func is sp.Piecewise else expr.args
            tree = {"op": _OPERATION_NAMES[expr.func], "args": [self.write(e, depth + 1) for e in args]}
            return tree if self._builder.apply(expr.func, args, True) == expr else {**tree, "evaluate": False}
        name = expr.func.__name__
        own = isinstance(expr, sp.Function) and not str(expr.func.__module__).startswith("sympy.")
        if not own or self.functions.setdefault(name, expr.func) != expr.func:
            raise UnsafeExpressionError(f"{expr}: {name} is not among the functions that can be stored.")
        return {"call": name, "args": [self.write(e, depth + 1) for e in expr.args]}

    def _leaf(self, expr: sp.Basic) -> dict | None:
        if isinstance(expr, sp.Symbol):
            self.names[expr.name] = expr
            return {"symbol": expr.name}
        if isinstance(expr, sp.Integer):
            return {"int": int(expr)}
        if isinstance(expr, sp.Rational):
            return {"rational": [int(expr.p), int(expr.q)]}
        if isinstance(expr, sp.Float):
            sign, mantissa, exponent, _ = expr._mpf_
            return {"float": f"{'-' if sign else ''}0x{int(mantissa):x}p{exponent}", "precision": expr._prec}
        if isinstance(expr, BooleanAtom):
            return {"bool": bool(expr)}
        if expr in _CONSTANT_NAMES:
            return {"constant": _CONSTANT_NAMES[expr]}
        return None


class _Builder:
    """Applies SymPy's functions to arguments that are built, and refuses steps of unbounded cost."""

    def __init__(self, functions: Mapping[str, type[sp.Function]]) -> None:
        # Functions of the application, about which nothing is known.
        self._functions = functions
        self._sizes: dict[sp.Basic, int] = {}

    def apply(self, function: type[sp.Basic], args: Sequence[sp.Basic], evaluate: bool) -> sp.Basic:
        try:
            self._before(function, args)
            result = _construct(function, args, evaluate)
            self._after(result)
        except UnsafeExpressionError:
            raise
        except Exception as error:  # SymPy raises all kinds of errors: a wrong arity, an undecidable order
            name = _OPERATION_NAMES.get(function, function.__name__)
            raise UnsafeExpressionError(f"SymPy cannot build {name} of these {len(args)} arguments: {error}") from error
        return result

    def _before(self, function: type[sp.Basic], args: Sequence[sp.Basic]) -> None:
        if function in (sp.Add, sp.Mul):
            # In steps, because a common denominator of a thousand fractions takes seconds.
            total = sp.Integer(function is sp.Mul)
            for number in (a for a in args if a.is_Rational):
                total = total + number if function is sp.Add else total * number
                _require_short(total)
            if function is sp.Mul and sum(map(_radical_bits, args)) > _MAX_RADICAL_BITS:
                raise UnsafeExpressionError("a product of so many roots of integers is too long.")
        elif function in (sp.Pow, sp.exp):
            _require_tame_power(*((sp.E, *args) if function is sp.exp else args))
        elif function in (sp.Max, sp.Min):
            if sum(len(a.args) if isinstance(a, sp.Max | sp.Min) else 1 for a in args) > _MAX_EXTREMUM:
                raise UnsafeExpressionError(f"Max and Min take at most {_MAX_EXTREMUM} arguments.")
        elif function in _SPECIAL:
            for number in (a for a in args if a.is_number):
                # SymPy evaluates two numbers by series whose length it does not limit.
                limit = _MAX_OF_TWO if len(args) > 1 and all(a.is_number for a in args) else MAX_EXPONENT
                moderate = number == 0 or 1 / limit**2 <= _size(number) <= limit
                if not moderate or number.has(*_SPECIAL) or (limit == _MAX_OF_TWO and number.is_negative):
                    raise UnsafeExpressionError(
                        f"{function.__name__} of the number {number}: it is too large, too small "
                        "or too slow to compute."
                    )
        elif function in _HYPERBOLIC and not (args[0].is_extended_real or _is_simple(args[0])):
            raise UnsafeExpressionError(
                f"{function.__name__}({args[0]}): the argument is not known to be real; declare its symbols real=True."
            )
        elif function in _ROUNDING:
            for number in (a for a in args if a.is_number and _size(a) >= MAX_INTEGER):
                raise UnsafeExpressionError(f"{number} is too large to be rounded to an integer.")

    def _after(self, result: sp.Basic) -> None:
        fresh: list[sp.Basic] = []
        if self._size(result, fresh) > MAX_NODES:
            raise UnsafeExpressionError(f"SymPy expands the expression to more than {MAX_NODES} nodes.")
        constant = isinstance(result, sp.Expr) and result.is_number and not result.is_Rational
        if constant and not (self._functions and result.has(*self._functions.values())):
            _require_moderate(result, self._sizes[result])
        for node in fresh:
            _require_finite(node)

    def _size(self, node: sp.Basic, fresh: list[sp.Basic]) -> int:
        """The number of nodes of ``node``, with copies: tan(acos(u)) contains u twice, and a chain of them more."""
        if node not in self._sizes:
            self._sizes[node] = 1 + sum(self._size(argument, fresh) for argument in node.args)
            fresh.append(node)
        return self._sizes[node]


def _construct(function: type[sp.Basic], args: Sequence[sp.Basic], evaluate: bool) -> sp.Basic:
    if function is sp.Piecewise:
        conditions = args[1::2]
        # SymPy solves compound conditions for their symbol, which may never end.
        evaluate = evaluate and all(isinstance(c, Relational | BooleanAtom) for c in conditions)
        args = tuple(zip(args[::2], conditions, strict=True))
    elif function in (sp.Mod, sp.lowergamma, sp.uppergamma, sp.digamma):
        # SymPy expands the arguments of Mod for a common divisor, expands gamma functions at integers,
        # and writes digamma as a polygamma, which the compiler does not know.
        evaluate = evaluate and all(a.is_Rational for a in args)
    elif function in (sp.Max, sp.Min, sp.Abs, sp.sign, sp.Heaviside):
        # SymPy tries to prove which argument is the largest, and whether one is positive.
        evaluate = evaluate and sum(map(growth, args)) <= _MAX_JUDGED
    return function(*args) if evaluate else function(*args, evaluate=False)


def _require_moderate(constant: sp.Expr, size: int) -> None:
    """Refuses constants that are complex, very large or long, or a hidden 0, which SymPy would try to prove."""
    if size > _MAX_CONSTANT:
        raise UnsafeExpressionError(f"a constant that is not a fraction has at most {_MAX_CONSTANT} nodes, not {size}.")
    value = constant.evalf(15)
    if not (value.is_Number and (value == 0 or _SMALLEST < abs(value) < _LARGEST)):
        raise UnsafeExpressionError(f"{constant} is not a real number of reasonable size.")
    if constant.is_Add and (value == 0 or value._prec == 1):
        raise UnsafeExpressionError(f"{constant} cancels to 0, or nearly so: write 0.")


def _is_simple(expr: sp.Expr) -> bool:
    """Whether SymPy expands little to decide if the complex ``expr`` is real."""
    nodes = list(sp.preorder_traversal(expr))
    exponents = [node.args[-1] for node in nodes if isinstance(node, sp.Pow | sp.exp)]
    return len(nodes) <= 32 and all(max(abs(n.p), n.q) <= 4 for e in exponents for n in e.atoms(sp.Rational))


def _require_short(number: sp.Rational) -> None:
    if abs(number.p) >= MAX_INTEGER or number.q >= MAX_INTEGER:
        shown = f"about 2**{number.p.bit_length() - number.q.bit_length()}" if number.p else "0"
        raise UnsafeExpressionError(f"a number ({shown}) needs integers of 2**63 or more: use fewer digits.")


def _require_finite(node: sp.Basic) -> None:
    """Checks the limits on numbers for one node, without its arguments."""
    if node.is_Rational:
        _require_short(node)
    elif node in _NOT_REAL:
        raise UnsafeExpressionError(f"a part of the expression is {node}, which is not a finite real number.")
    elif isinstance(node, sp.exp):
        _require_tame_power(sp.E, node.args[0])
    elif isinstance(node, sp.Pow):
        _require_tame_power(node.base, node.exp)
        # Complex: SymPy would expand its squared magnitude.
        if node.base.is_number and node.base.is_negative and not node.exp.is_integer:
            raise UnsafeExpressionError(f"{node}: a negative number has no real powers.")


def _require_low_tower(expr: sp.Basic) -> None:
    """Refuses towers such as exp(exp(exp(t))), which at some t are numbers too large for any memory."""
    heights: dict[sp.Basic, int] = {}
    for node in sp.postorder_traversal(expr):
        inner = max((heights.get(argument, 0) for argument in node.args), default=0)
        grows = isinstance(node, _EXPONENTIAL) or (node.is_Pow and not node.exp.is_number)
        if isinstance(node, sp.Pow) and node.base is sp.E:
            grows = True
        if isinstance(node, sp.log):
            inner -= 1
        limit = 1 if isinstance(node, (sp.gamma, *_ROUNDING)) else 2
        if (grows and inner >= limit) or (isinstance(node, _ROUNDING) and inner > limit):
            raise UnsafeExpressionError(f"{type(node).__name__} of a tower of exponentials grows beyond any number.")
        heights[node] = max(inner, 0) + grows
        order = [argument for argument in node.args if isinstance(node, _SPECIAL) and argument.is_number]
        if len(node.args) == 2 and any(_size(number) > _LARGEST_ORDER for number in order):
            raise UnsafeExpressionError(f"{node}: an order above {_LARGEST_ORDER} is expanded without end.")


def _size(number: sp.Expr) -> float:
    """The magnitude of a constant; 1 for a function of the application, about which nothing is known."""
    value = number.evalf(15)
    return float(abs(value)) if value.is_Number else 1.0


def _require_tame_power(base: sp.Expr, exponent: sp.Expr) -> None:
    """Refuses large numbers as exponents, also those that may appear over a number after symbols cancel.

    A logarithm in the exponent also brings a number into the base: exp(c log 2) = 2**c. Then the exponents inside the
    base count too, because SymPy multiplies them: exp(c/t)**(t log 2) = 2**c.
    """
    if exponent.is_number and base is not sp.E and _size(exponent) > MAX_EXPONENT:
        raise UnsafeExpressionError(f"a power of {exponent} was asked for: at most {MAX_EXPONENT} is allowed.")
    critical: list[sp.Basic] = []
    if (base.is_number and base is not sp.E) or any(abs(n) != 1 for n in base.atoms(sp.Number)):
        critical += [exponent]
    if exponent.has(sp.log):
        critical += [term for term in sp.Add.make_args(exponent) if term.has(sp.log)]
        critical += [power.args[-1] for power in base.atoms(sp.Pow, sp.exp)]
    if any(_reach(term, False) > math.log2(MAX_EXPONENT) for term in critical):
        raise UnsafeExpressionError(
            f"the power {base}**({exponent}) may become a number to a power above {MAX_EXPONENT}."
        )
    # SymPy takes 12**(p/q) as a root of 2**(2*p % q) * 3**(p % q).
    if any(_root_bits(term) > _MAX_ROOT_BITS for term in critical):
        raise UnsafeExpressionError(f"the power {base}**({exponent}) asks for too high a root: use fewer digits.")


def _radical_bits(expr: sp.Basic) -> int:
    """The length in bits of the numbers that are bases in the product ``expr``."""
    if isinstance(expr, sp.Mul):
        return sum(map(_radical_bits, expr.args))
    if isinstance(expr, sp.Pow):
        base = expr.base
        return base.p.bit_length() + base.q.bit_length() if base.is_Rational else _radical_bits(base)
    return 0


def _root_bits(expr: sp.Basic) -> float:
    """An upper bound of log2 q over the numbers p/q that ``expr`` can become when its symbols cancel."""
    if expr.is_Rational:
        return math.log2(expr.q)
    if isinstance(expr, sp.log):
        return 0.0
    if isinstance(expr, sp.Pow) and expr.exp.is_Rational and expr.exp < 0:
        return sum(math.log2(max(abs(n.p), n.q, 1)) for n in sp.preorder_traversal(expr.base) if n.is_Rational)
    return sum(map(_root_bits, expr.args))


def _reach(expr: sp.Basic, inverted: bool) -> float:
    """An upper bound of log2 |c| over the numbers c that ``expr`` can become when its symbols cancel."""
    if expr.is_Number:
        size = abs(expr)
        return max(0.0, float(sp.log(size, 2).evalf(15)) * (-1 if inverted else 1)) if size else 0.0
    if isinstance(expr, sp.log):
        return 0.0
    if isinstance(expr, sp.Pow) and expr.exp.is_Number:
        return float(abs(expr.exp)) * _reach(expr.base, inverted != (expr.exp < 0))
    reaches = [_reach(argument, inverted) for argument in expr.args]
    if isinstance(expr, sp.Mul):
        return sum(reaches)
    return max(reaches, default=0.0) + (math.log2(len(reaches)) if isinstance(expr, sp.Add) else 0.0)
