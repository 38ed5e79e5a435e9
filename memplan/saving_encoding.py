"""Plans as JSON: only the classes of `memplan.ir`, torch's dtypes and integer expressions can be written or made.

A document is ``{"table": [...], "root": ...}``. A value is an atom (text, integer, boolean, null), or ``[k]``: entry
``k`` of the table. An entry is ``[tag, ...]`` whose values refer to entries before it, so that what is equal is stored
once, reading is one walk, and a document cannot refer to itself. Reading runs nothing but the constructors named here.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import sympy
import torch
from sympy.functions.elementary.piecewise import ExprCondPair
from torch.utils._sympy import functions as torch_functions
from torch.utils._sympy.numbers import int_oo

from .ir import in_flight, index, loops, plan, program, template, user_kernel
from .ir.errors import SavedModelError

_CLASSES: dict[str, type] = {
    c.__name__: c
    for module in (loops, program, in_flight, plan, template, user_kernel)
    for c in vars(module).values()
    if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__module__ == module.__name__
}
_ENUMS: dict[str, type[Enum]] = {
    c.__name__: c
    for module in (loops, program, template)
    for c in vars(module).values()
    if isinstance(c, type) and issubclass(c, Enum) and c is not Enum
}
_FUNCTIONS: dict[str, Callable[..., sympy.Expr]] = {
    "Add": sympy.Add,
    "Mul": sympy.Mul,
    "Pow": sympy.Pow,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "FloorDiv": index.FloorDiv,
    "Mod": index.Mod,
    "Abs": sympy.Abs,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Piecewise": sympy.Piecewise,
    "ExprCondPair": ExprCondPair,
    **{
        name: getattr(torch_functions, name)
        for name in (
            *("PythonMod", "CleanDiv", "CeilDiv", "ModularIndexing", "Identity", "Where", "PowByNatural", "FloatPow"),
            *("LShift", "RShift", "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or", "BitwiseFn_bitwise_xor"),
            *("ToFloat", "IntTrueDiv", "FloatTrueDiv"),
            *("TruncToInt", "TruncToFloat", "FloorToInt", "CeilToInt", "RoundToInt"),
        )
    },
}
#: What is made as it stands: sympy might find it true or false of symbols of which it is known elsewhere.
_CONDITIONS: dict[str, Callable[..., sympy.Basic]] = {
    c.__name__: c
    for c in (
        *(sympy.Eq, sympy.Ne, sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt),
        *(sympy.And, sympy.Or, sympy.Not),
    )
}
_SINGLE: dict[str, sympy.Basic] = {
    type(v).__name__: v for v in (sympy.oo, -sympy.oo, sympy.nan, sympy.true, sympy.false, int_oo, -int_oo)
}
#: bits of a double's mantissa
_DOUBLE = 53
_SIGNS = ("nonnegative", "positive", "negative", "zero")
_TORCH = {str(v): v for v in vars(torch).values() if isinstance(v, (torch.dtype, torch.layout, torch.memory_format))}


def allow(kind: type) -> None:
    """Let documents hold one more dataclass, which stays the only one of its name."""
    assert dataclasses.is_dataclass(kind)
    assert _CLASSES.setdefault(kind.__name__, kind) is kind


def is_data(value: object) -> bool:
    """Whether the value is of one of the classes of `memplan.ir` that documents may hold."""
    return _CLASSES.get(type(value).__name__) is type(value)


class Writer:
    """One document being written; a subclass may write some classes in a way of its own (`entry`)."""

    def __init__(self, origins: Mapping[program.Origin, int] | None = None) -> None:
        self.origins = origins or {}
        self.table: list[list[object]] = []
        self.known: dict[str, int] = {}
        self.seen: dict[int, tuple[object, list[int]]] = {}  # keeps the objects alive, so that ids stay theirs

    def value(self, v: object) -> object:
        if v is None or type(v) in (bool, int, str):
            return v
        found = self.seen.get(id(v))
        if found is None:
            entry = self.entry(v)
            key = json.dumps(entry)
            if key not in self.known:
                self.known[key] = len(self.table)
                self.table.append(entry)
            found = self.seen[id(v)] = (v, [self.known[key]])
        return found[1]

    def entry(self, v: object) -> list[object]:
        match v:
            case float():
                return ["float", repr(v)]
            case complex():
                return ["complex", repr(v.real), repr(v.imag)]
            case bytes():
                return ["bytes", base64.b64encode(v).decode()]
            case tuple() | list():
                return ["tuple", *(self.value(i) for i in v)]
            case frozenset():
                return ["set", *(self.value(i) for i in sorted(v))]
            case Enum():
                return ["enum", type(v).__name__, v.value]
            case torch.dtype() | torch.layout() | torch.memory_format():
                return ["torch", str(v)]
            case torch.device():
                return ["device", str(v)]
            case Mapping():
                return ["map", *(self.value(i) for pair in v.items() for i in pair)]
            case sympy.Basic():
                return self.expression(v)
            case program.Origin() if v in self.origins:
                return ["origin", self.origins[v]]
        if dataclasses.is_dataclass(v) and type(v).__name__ in _CLASSES:
            values = (getattr(v, f.name) for f in dataclasses.fields(v))
            return ["data", type(v).__name__, *(self.value(i) for i in values)]
        raise SavedModelError(f"a plan with a {type(v).__name__} in it cannot be saved")

    def expression(self, e: sympy.Basic) -> list[object]:
        if isinstance(e, sympy.Symbol):
            told = ("integer", "nonnegative", "positive") if e.is_integer is not None else ("real", *_SIGNS)
            given = sorted((k, v) for k, v in e.assumptions0.items() if k in told)
            return ["symbol", e.name, *(i for pair in given for i in pair)]
        if isinstance(e, sympy.Integer):
            return ["integer", str(int(e))]
        if isinstance(e, sympy.Rational):
            return ["rational", str(e.p), str(e.q)]
        if isinstance(e, sympy.Float) and e._prec <= _DOUBLE:
            return ["real", repr(float(e)), int(e._prec)]
        if type(e).__name__ in _SINGLE:
            return ["single", type(e).__name__]
        if type(e).__name__ in _CONDITIONS:
            return ["condition", type(e).__name__, *(self.value(a) for a in e.args)]
        if type(e).__name__ in _FUNCTIONS:
            return ["call", type(e).__name__, *(self.value(a) for a in e.args)]
        raise SavedModelError(f"a size with {type(e).__name__} in it cannot be saved: {e}")

    def document(self, value: object) -> bytes:
        """The value as JSON; deterministic."""
        root = self.value(value)
        return json.dumps({"table": self.table, "root": root}, separators=(",", ":")).encode()


def encode(value: object, origins: Mapping[program.Origin, int] | None = None) -> bytes:
    """The value as JSON; deterministic.

    Parameters
    ----------
    origins:
        Origins to write as their number; the reader gives what each stands for.

    Raises
    ------
    SavedModelError
        If something in it is no data of `memplan.ir`.
    """
    return Writer(origins).document(value)


def decode(data: bytes, origins: Sequence[program.Origin] = ()) -> object:
    """What `encode` was given; ``origins`` has what the numbers stand for that were written instead of origins.

    Raises
    ------
    SavedModelError
        If the document is not one that `encode` writes.
    """
    try:
        document = json.loads(data)
        made: list[object] = []
        for entry in document["table"]:
            made.append(origins[entry[1]] if entry[0] == "origin" else _make(entry, made))
        return _read(document["root"], made)
    except SavedModelError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise SavedModelError(f"not a plan that this version of memplan can read: {error!r}") from error


def _read(value: object, made: list[object]) -> object:
    return made[value[0]] if isinstance(value, list) else value


def _make(entry: list[object], made: list[object]) -> object:
    tag, *rest = entry
    values = [_read(v, made) for v in rest]
    match tag:
        case "float":
            number = float(str(values[0]))
            return math.nan if math.isnan(number) else number
        case "complex":
            return complex(float(str(values[0])), float(str(values[1])))
        case "bytes":
            return base64.b64decode(str(values[0]), validate=True)
        case "tuple":
            return tuple(values)
        case "set":
            return frozenset(values)
        case "enum":
            return _ENUMS[str(values[0])](values[1])
        case "torch":
            return _TORCH[str(values[0])]
        case "device":
            return torch.device(str(values[0]))
        case "map":
            return dict(zip(values[::2], values[1::2], strict=True))
        case "symbol":
            return sympy.Symbol(str(values[0]), **{str(k): v for k, v in zip(values[1::2], values[2::2], strict=True)})
        case "integer":
            return sympy.Integer(int(str(values[0])))
        case "rational":
            return sympy.Rational(int(str(values[0])), int(str(values[1])))
        case "real":
            return sympy.Float(float(str(values[0])), precision=values[1])
        case "single":
            return _SINGLE[str(values[0])]
        case "condition":
            return _CONDITIONS[str(values[0])](*values[1:], evaluate=False)
        case "call":
            return _FUNCTIONS[str(values[0])](*values[1:])
        case "data":
            return _CLASSES[str(values[0])](*values[1:])
        case _:
            raise SavedModelError(f"unknown entry {tag!r} in a saved plan")
