"""Declarations as plain data and exactly back, for ``SDE.to_dict`` and ``SDE.from_dict``.

    {"format": 1, "f": tree, "g": tree, "T": 1.0, "cutoff": None, "P0": 0.0, "state": None, "path": None,
     "parameters": {name: {"assumptions": {...}, "value": number or {"data", "shape", "dtype", "learned"}}},
     "schedules": {name: [times, values]}, "basis": None}

Expressions are trees of allowed nodes (:mod:`sdeflow.symbolic.tree`): no text in such a dict is ever evaluated.
Floats are Python floats, whose JSON form is exact. Declarations are stored in the sense of Itô.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy as sp
import torch
from torch import Tensor, nn

from sdeflow.errors import DeclarationError, UnsafeExpressionError
from sdeflow.numerics.basis import DCT, Basis, Orthogonal
from sdeflow.numerics.parameters import Values
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.schedule import Schedule, schedule
from sdeflow.symbolic.symbols import require_plain, state, t, x
from sdeflow.symbolic.tree import from_tree, to_tree

__all__ = ["from_dict", "tables_of", "to_dict"]

_FORMAT = 1
_KEYS = {"format", "f", "g", "T", "cutoff", "P0", "state", "path", "parameters", "schedules", "basis"}
_ASSUMPTIONS = ("real", "positive", "negative", "nonnegative", "nonpositive", "nonzero", "integer", "finite")
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LARGEST_TENSOR = 2**24


def tables_of(declaration: Declaration) -> dict[str, list | str]:
    """The tables of a declaration's schedules, by name; for a Python function, its name."""
    expressions = [*declaration.drifts, *declaration.diffusions, *(declaration.path or ())]
    kinds = {type(call) for e in expressions for call in e.atoms(Schedule)}
    return {
        kind.__name__: "a function" if kind.table is None else [part.tolist() for part in kind.table] for kind in kinds
    }


def to_dict(declaration: Declaration, values: Values, basis: Basis | None) -> dict:
    """The declaration with its parameters' values as JSON-able data.

    Raises:
        DeclarationError: if a schedule is a Python function, or the basis is a class of the user's; both cannot be
            stored.
    """
    expressions = [*declaration.drifts, *declaration.diffusions, *(declaration.path or ())]
    schedules = {type(call).__name__: type(call) for e in expressions for call in e.atoms(Schedule)}
    tables = {name.removesuffix("_t" * kind.order): _table(kind) for name, kind in schedules.items()}
    return {
        "format": _FORMAT,
        "f": to_tree(declaration.f, schedules),
        "g": to_tree(declaration.g, schedules),
        "T": declaration.T,
        "cutoff": declaration.cutoff,
        "P0": _variance_out(declaration.P0),
        "state": [component.name for component in declaration.state] if declaration.coupled else None,
        "path": None if declaration.path is None else [to_tree(e, schedules) for e in declaration.path],
        "parameters": {
            symbol.name: {"assumptions": _assumptions(symbol), "value": _value_out(values[symbol])}
            for symbol in declaration.parameters
        },
        "schedules": tables,
        "basis": _basis_out(basis),
    }


def from_dict(data: Mapping) -> tuple[Declaration, Values, Basis | None]:
    """The declaration, values and basis from the data of :func:`to_dict`, of which it is the inverse.

    Raises:
        UnsafeExpressionError: if this version does not understand the data; nothing is built from it then.
        DeclarationError: if the declaration is inconsistent.
    """
    if not isinstance(data, Mapping) or type(data.get("format")) is not int or data["format"] != _FORMAT:
        given = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise UnsafeExpressionError(f"a declaration of format {_FORMAT} is expected, not {given!r}.")
    unknown = set(data) - _KEYS
    if unknown:
        raise UnsafeExpressionError(f"a stored declaration has no {', '.join(sorted(map(repr, unknown)))}.")
    try:
        names = data["state"]
        components = (x,) if names is None else state(list(names))
        stored = {require_plain(name): entry for name, entry in data["parameters"].items()}
        symbols = {name: sp.Symbol(name, **_checked_assumptions(e["assumptions"])) for name, e in stored.items()}
        values = Values({symbols[name]: _value_in(entry["value"], name) for name, entry in stored.items()})
        functions = _schedules(data["schedules"])
        known = {**symbols, "t": t, **{component.name: component for component in components}}
        if len(known) != len(symbols) + 1 + len(components):
            raise UnsafeExpressionError("a parameter has the name of the state or the time.")
        f, g = (from_tree(data[key], known, functions) for key in ("f", "g"))
        path = None if data["path"] is None else tuple(from_tree(e, known, functions) for e in data["path"])
        basis = _basis_in(data["basis"])
        T, cutoff, P0 = _number(data["T"]), data["cutoff"], data["P0"]
        P0 = sp.ImmutableMatrix([[sp.Float(_number(e)) for e in row] for row in P0]) if names else _number(P0)
        cutoff = None if cutoff is None else _number(cutoff)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, DeclarationError):
            raise
        raise UnsafeExpressionError(f"this is not a stored declaration: {type(error).__name__}: {error}") from error
    return _checked(Declaration(f, g, T, cutoff, P0, tuple(symbols.values()), components, path)), values, basis


def _checked(declaration: Declaration) -> Declaration:
    """The declaration, after a check that shapes, times and covariance are consistent."""
    k = len(declaration.state)
    matrices = [e for e in (declaration.f, declaration.g) if isinstance(e, sp.MatrixBase)]
    if len(matrices) != (2 if declaration.coupled else 0):
        raise UnsafeExpressionError("f and g must be matrices for a coupled state, and expressions otherwise.")
    entries = [*declaration.drifts, *declaration.diffusions, *(declaration.path or ())]
    if not all(isinstance(entry, sp.Expr) for entry in entries):
        raise UnsafeExpressionError("f, g and path must be values, not conditions.")
    if declaration.path is not None and (len(declaration.path) != 2 or any(e.has(x) for e in declaration.path)):
        raise UnsafeExpressionError("a path is alpha and sigma, functions of t.")
    if declaration.coupled and (
        declaration.f.shape != (k, 1) or declaration.g.shape[0] != k or not _is_square(declaration.P0, k)
    ):
        raise UnsafeExpressionError(f"f, g and P0 do not have the {k} components of the state.")
    if not declaration.T > 0 or not (declaration.cutoff is None or 0 <= declaration.cutoff < declaration.T):
        raise UnsafeExpressionError(f"T = {declaration.T} and cutoff = {declaration.cutoff} are not consistent.")
    if min(declaration.initial_variances) < 0:
        raise UnsafeExpressionError("P0 must not be negative.")
    return declaration


def _variance_out(P0: float | sp.ImmutableMatrix) -> float | list[list[float]]:
    return [[float(e) for e in row] for row in P0.tolist()] if isinstance(P0, sp.MatrixBase) else P0


def _is_square(P0: float | sp.ImmutableMatrix, k: int) -> bool:
    return isinstance(P0, sp.MatrixBase) and P0.shape == (k, k)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnsafeExpressionError(f"a finite number is expected, not {value!r}.")
    return float(value)


def _integer(value: object) -> int:
    if type(value) is not int:
        raise UnsafeExpressionError(f"an integer is expected, not {value!r}.")
    return value


def _assumptions(symbol: sp.Symbol) -> dict[str, bool]:
    """The assumptions that the user gave for a symbol, without those that SymPy derives from them."""
    given = {name: value for name, value in symbol._assumptions_orig.items() if name != "commutative"}
    unknown = sorted(set(given) - set(_ASSUMPTIONS))
    if unknown:
        raise DeclarationError(f"the parameter {symbol} has assumptions that are not stored: {', '.join(unknown)}.")
    return given


def _checked_assumptions(given: Mapping) -> dict[str, bool]:
    if not set(given) <= set(_ASSUMPTIONS) or not all(isinstance(value, bool) for value in given.values()):
        raise UnsafeExpressionError(f"unknown assumptions: {given!r}.")
    return dict(given)


def _value_out(value: float | Tensor) -> float | dict:
    if isinstance(value, float):
        return value
    data = value.detach().cpu()
    return {
        "data": data.double().flatten().tolist(), "shape": list(data.shape),
        "dtype": str(data.dtype).removeprefix("torch."), "learned": isinstance(value, nn.Parameter),
    }  # fmt: skip


def _value_in(value: object, name: str) -> float | Tensor:
    if not isinstance(value, Mapping):
        return _number(value)
    shape = [_integer(size) for size in value["shape"]]
    if value["dtype"] not in _DTYPES or not isinstance(value["learned"], bool) or any(size < 0 for size in shape):
        raise UnsafeExpressionError(f"the parameter {name} is not a stored tensor.")
    if math.prod(shape) != len(value["data"]) or math.prod(shape) > _LARGEST_TENSOR:
        raise UnsafeExpressionError(f"the parameter {name} holds {len(value['data'])} numbers for the shape {shape}.")
    numbers = [_number(number) for number in value["data"]]
    tensor = torch.tensor(numbers, dtype=torch.float64).reshape(shape).to(_DTYPES[value["dtype"]])
    return nn.Parameter(tensor) if value["learned"] else tensor


def _table(kind: type[Schedule]) -> list[list[float]]:
    if kind.table is None:
        raise DeclarationError(
            f"the schedule {kind.__name__} is a Python function, which is not stored: make it of (times, values)."
        )
    return [part.tolist() for part in kind.table]


def _schedules(tables: Mapping) -> dict[str, type[Schedule]]:
    """The schedules and their first two derivatives, by name."""
    found: dict[str, type[Schedule]] = {}
    for name, table in tables.items():
        kind = schedule([[_number(v) for v in part] for part in table], require_plain(name))
        for _ in range(3):
            found[kind.__name__] = kind
            kind = kind.derivative()
    return found


def _basis_out(basis: Basis | None) -> dict | None:
    if basis is None:
        return None
    if isinstance(basis, DCT):
        return {"DCT": basis.sides}
    if isinstance(basis, Orthogonal):
        return {"Orthogonal": basis.matrix.tolist()}
    raise DeclarationError(f"the basis {basis!r} is neither a DCT nor an Orthogonal matrix, and is not stored.")


def _basis_in(data: object) -> Basis | None:
    if data is None:
        return None
    if not isinstance(data, Mapping):
        raise UnsafeExpressionError(f"a stored basis is a name with its value, not {data!r}.")
    ((kind, value),) = data.items()
    if kind == "DCT":
        return DCT(_integer(value))
    if kind == "Orthogonal":
        return Orthogonal(torch.tensor([[_number(v) for v in row] for row in value], dtype=torch.float64))
    raise UnsafeExpressionError(f"unknown basis {kind!r}.")
