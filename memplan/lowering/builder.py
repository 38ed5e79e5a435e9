"""Building a `Kernel`: nodes in static single assignment, equal nodes made once, views turned into index expressions.

A `Value` is one node with its dtype; Python's operators on values make nodes, so that a formula reads as it is
written in mathematics. Half types (float16, bfloat16) are cast to float32 by whoever computes with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TypeAlias

import sympy
import torch

from ..ir.index import flat_index, simplify
from ..ir.loops import (
    OPERATIONS,
    Call,
    Cast,
    Constant,
    Index,
    IndexExpr,
    Item,
    Kernel,
    Load,
    Node,
    Random,
    RandomKind,
    Range,
    Reduce,
    ReduceOp,
    Scalar,
    Size,
    Store,
    StoreMode,
    operands,
    outer_symbol,
    row_symbol,
    value_references,
    value_symbol,
)
from ..ir.program import View

ZERO = sympy.Integer(0)
COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
BOOLEAN = COMPARISONS | {"logical_and", "logical_or", "logical_xor", "logical_not", "isnan", "isinf", "signbit"}
HALF = frozenset({torch.float16, torch.bfloat16})
_IDENTITY: dict[str, Scalar] = {"sum": 0, "prod": 1, "any": False, "all": True}

Coordinates: TypeAlias = tuple[IndexExpr, ...]


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The type that eager computes in: float32 for half types, else the type itself."""
    return torch.float32 if dtype in HALF else dtype


@cache
def _outer(position: int) -> sympy.Symbol:
    return outer_symbol(position)


@cache
def _row(position: int) -> sympy.Symbol:
    return row_symbol(position)


@lru_cache(maxsize=65536)
def element_index(coordinates: Coordinates, strides: tuple[Size, ...], offset: Size) -> IndexExpr:
    """Element offset of a point of a strided view; remembered, since all layers of a model ask for the same ones."""
    return flat_index(coordinates, strides, offset)


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """Node number ``position`` of a kernel that is being built."""

    builder: KernelBuilder
    position: int
    dtype: torch.dtype

    def call(self, op: str, *others: Value | Scalar) -> Value:
        """The function ``op`` of this value and the others; numbers take this value's dtype."""
        return self.builder.call(op, self, *others)

    def cast(self, dtype: torch.dtype) -> Value:
        return self.builder.cast(self, dtype)

    def constant(self, value: Scalar) -> Value:
        """A literal of this value's dtype."""
        return self.builder.constant(value, self.dtype)

    def where(self, yes: Value | Scalar, no: Value | Scalar) -> Value:
        """``yes`` where this boolean is true, else ``no``; at least one of them is a value."""
        return self.builder.where(self, yes, no)

    def logical_not(self) -> Value:
        return self.builder.call("logical_not", self)

    def both(self, other: Value) -> Value:
        return self.builder.call("logical_and", self, other)

    def either(self, other: Value) -> Value:
        return self.builder.call("logical_or", self, other)

    def symbol(self) -> sympy.Symbol:
        """The symbol that stands for this integer in index expressions."""
        assert not self.dtype.is_floating_point
        assert self.dtype is not torch.bool
        return value_symbol(self.position)

    def __add__(self, other: Value | Scalar) -> Value:
        return self.call("add", other)

    def __radd__(self, other: Scalar) -> Value:
        return self.constant(other).call("add", self)

    def __sub__(self, other: Value | Scalar) -> Value:
        return self.call("sub", other)

    def __rsub__(self, other: Scalar) -> Value:
        return self.constant(other).call("sub", self)

    def __mul__(self, other: Value | Scalar) -> Value:
        return self.call("mul", other)

    def __rmul__(self, other: Scalar) -> Value:
        return self.constant(other).call("mul", self)

    def __truediv__(self, other: Value | Scalar) -> Value:
        return self.call("div", other)

    def __rtruediv__(self, other: Scalar) -> Value:
        return self.constant(other).call("div", self)

    def __neg__(self) -> Value:
        return self.call("neg")

    def __lt__(self, other: Value | Scalar) -> Value:
        return self.call("lt", other)

    def __le__(self, other: Value | Scalar) -> Value:
        return self.call("le", other)

    def __gt__(self, other: Value | Scalar) -> Value:
        return self.call("gt", other)

    def __ge__(self, other: Value | Scalar) -> Value:
        return self.call("ge", other)

    def equals(self, other: Value | Scalar) -> Value:
        return self.call("eq", other)

    def differs(self, other: Value | Scalar) -> Value:
        return self.call("ne", other)


class KernelBuilder:
    """Collects nodes and stores over given ranges.

    Parameters
    ----------
    outer, row:
        Sizes in elements. A dimension of size 1 gets no range: its coordinate is 0. ``outer_coordinates`` and
        ``row_coordinates`` have one expression per given size.
    """

    def __init__(self, outer: Sequence[Size], row: Sequence[Size] = ()) -> None:
        self.outer_ranges, self.outer_coordinates = _ranges(outer, _outer)
        self.row_ranges, self.row_coordinates = _ranges(row, _row)
        self.nodes: list[Node] = []
        self.stores: list[Store] = []
        self._positions: dict[tuple[object, ...], int] = {}

    @property
    def ranges(self) -> tuple[tuple[sympy.Symbol, Size], ...]:
        """(symbol, size) pairs as `memplan.ir.index.simplify` takes them."""
        return tuple((r.symbol, r.size) for r in (*self.outer_ranges, *self.row_ranges))

    def simplify(self, expr: IndexExpr) -> IndexExpr:
        """The expression with floor divisions and moduli removed where the ranges prove it."""
        return simplify(expr, self.ranges)

    def _add(self, node: Node, dtype: torch.dtype, key: tuple[object, ...] | None = None) -> Value:
        key = (type(node), node) if key is None else key
        position = self._positions.get(key)
        if position is None:
            position = len(self.nodes)
            self.nodes.append(node)
            self._positions[key] = position
        return Value(self, position, dtype)

    def load(self, view: View, coordinates: Sequence[IndexExpr], mask: Value | None = None, other: Scalar = 0) -> Value:
        """The element of ``view`` at ``coordinates`` (one per dimension); ``other`` where ``mask`` is false."""
        index = element_index(tuple(coordinates), view.strides, view.offset)
        return self.load_flat(view.buffer, index, view.dtype, mask, other)

    def load_flat(
        self, buffer: str, index: IndexExpr, dtype: torch.dtype, mask: Value | None = None, other: Scalar = 0
    ) -> Value:
        """The element at ``index`` from the start of the buffer."""
        position = None if mask is None else mask.position
        node = Load(buffer, index, dtype, position, other)
        return self._add(node, dtype, (Load, buffer, index, dtype, position, repr(other)))

    def load_broadcast(self, view: View, coordinates: Sequence[IndexExpr]) -> Value:
        """The element that ``view``, broadcast to the space of ``coordinates``, has there."""
        skip = len(coordinates) - len(view.sizes)
        own = tuple(ZERO if size == 1 else coordinates[skip + k] for k, size in enumerate(view.sizes))
        return self.load(view, own)

    def constant(self, value: Scalar, dtype: torch.dtype) -> Value:
        if dtype is torch.bool:
            value = bool(value)
        elif dtype.is_floating_point:
            value = float(value)
        else:
            value = int(value)
        # keyed by text: 0.0 equals -0.0, and NaN differs from itself
        return self._add(Constant(value, dtype), dtype, (Constant, repr(value), dtype))

    def index(self, expr: IndexExpr | int, dtype: torch.dtype = torch.int64) -> Value:
        """An index expression as a value; integral dtypes only."""
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return self.constant(int(expr), dtype)
        return self._add(Index(expr, dtype), dtype)

    def call(self, op: str, first: Value, *others: Value | Scalar) -> Value:
        args = (first, *(o if isinstance(o, Value) else self.constant(o, first.dtype) for o in others))
        assert OPERATIONS[op] == len(args), op
        assert all(a.dtype is first.dtype for a in args), (op, [a.dtype for a in args])
        folded = self._fold(op, args)
        if folded is not None:
            return folded
        dtype = torch.bool if op in BOOLEAN else first.dtype
        return self._add(Call(op, tuple(a.position for a in args), dtype), dtype)

    def _fold(self, op: str, args: tuple[Value, ...]) -> Value | None:
        """Trivial identities that are exact for every value of the other operand."""
        if op in ("mul", "div") and self.literal(args[1]) == 1 and args[1].dtype is not torch.bool:
            return args[0]
        if op == "mul" and self.literal(args[0]) == 1 and args[0].dtype is not torch.bool:
            return args[1]
        if op in ("add", "sub") and self.literal(args[1]) == 0 and not args[0].dtype.is_floating_point:
            return args[0]
        if op in ("logical_and", "logical_or") and args[0].dtype is torch.bool:
            for one, other in (args, args[::-1]):
                literal = self.literal(one)
                if literal is not None:
                    return other if bool(literal) == (op == "logical_and") else one
        return None

    def literal(self, value: Value) -> Scalar | None:
        """The number, if the value is a literal."""
        node = self.nodes[value.position]
        return node.value if isinstance(node, Constant) else None

    def where(self, condition: Value, yes: Value | Scalar, no: Value | Scalar) -> Value:
        if not isinstance(yes, Value):
            assert isinstance(no, Value)
            yes = self.constant(yes, no.dtype)
        if not isinstance(no, Value):
            no = self.constant(no, yes.dtype)
        assert condition.dtype is torch.bool, condition.dtype
        assert yes.dtype is no.dtype, (yes.dtype, no.dtype)
        literal = self.literal(condition)
        if literal is not None:
            return yes if literal else no
        if yes.position == no.position:
            return yes
        args = (condition.position, yes.position, no.position)
        return self._add(Call("where", args, yes.dtype), yes.dtype)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        if value.dtype is dtype:
            return value
        node = self.nodes[value.position]
        if isinstance(node, Constant) and not _rounds(node.value, dtype):
            return self.constant(node.value, dtype)
        if isinstance(node, Index) and dtype in (torch.int32, torch.int64):
            return self.index(node.expr, dtype)
        return self._add(Cast(value.position, dtype), dtype)

    def compute(self, value: Value) -> Value:
        """The value in the type that it is computed in (float32 for half types)."""
        return self.cast(value, opmath(value.dtype))

    def reduce(self, op: ReduceOp, *args: Value) -> Value:
        """A reduction over the whole row with one result. A row of one point is that point."""
        dtype = args[0].dtype
        if op in ("any", "all"):
            args = tuple(a if a.dtype is torch.bool else a.differs(0) for a in args)
            dtype = torch.bool
        elif op in ("argmax", "argmin"):
            dtype = torch.int64
        if self.row_is_empty:
            return self.constant(_IDENTITY[op], dtype)
        if not self.row_ranges:
            return args[1] if op in ("argmax", "argmin") else args[0]
        return self._add(Reduce(op, tuple(a.position for a in args), dtype), dtype)

    def welford(self, op: ReduceOp, *args: Value) -> tuple[Value, Value, Value]:
        """(mean, sum of squared deviations, weight) over the row, for ``welford`` or ``welford_combine``."""
        dtype = args[0].dtype
        if self.row_is_empty:
            return self.constant(math.nan, dtype), self.constant(0, dtype), self.constant(0, dtype)
        if not self.row_ranges:
            if op == "welford_combine":
                return args[0], args[1], args[2]
            return args[0], args[0] - args[0], self.constant(1, dtype)
        whole = self._add(Reduce(op, tuple(a.position for a in args), dtype), dtype)
        mean, m2, weight = (self._add(Item(whole.position, k, dtype), dtype) for k in range(3))
        return mean, m2, weight

    @property
    def row_is_empty(self) -> bool:
        return any(r.size == 0 for r in self.row_ranges)

    @property
    def row_numel(self) -> Size:
        """Points of a row."""
        out: Size = 1
        for r in self.row_ranges:
            out = out * r.size
        return out

    def random(self, kind: RandomKind, seed: Value, offset: Value, dtype: torch.dtype) -> Value:
        return self._add(Random(kind, seed.position, offset.position, dtype), dtype)

    def store(
        self,
        view: View,
        coordinates: Sequence[IndexExpr],
        value: Value,
        mode: StoreMode = StoreMode.SET,
        mask: Value | None = None,
    ) -> None:
        """Write ``value`` to the element of ``view`` at ``coordinates``."""
        index = element_index(tuple(coordinates), view.strides, view.offset)
        if view.dtype is torch.bool and value.dtype is not torch.bool:
            value = value.differs(0)
        position = None if mask is None else mask.position
        self.stores.append(Store(view.buffer, index, value.position, view.dtype, mode, position))

    def build(self) -> Kernel:
        """The kernel without what its stores do not need (an empty row leaves no trace)."""
        row = () if self.row_is_empty else self.row_ranges
        live = _live_positions(self.nodes, self.stores)
        if len(live) == len(self.nodes):
            return Kernel(self.outer_ranges, row, tuple(self.nodes), tuple(self.stores))
        moved = {old: new for new, old in enumerate(sorted(live))}
        symbols = {value_symbol(old): value_symbol(new) for old, new in moved.items() if old != new}
        nodes = tuple(_renumbered(self.nodes[old], moved, symbols) for old in sorted(live))
        stores = tuple(
            replace(
                s,
                index=s.index.xreplace(symbols),
                value=moved[s.value],
                mask=None if s.mask is None else moved[s.mask],
            )
            for s in self.stores
        )
        return Kernel(self.outer_ranges, row, nodes, stores)


@lru_cache(maxsize=65536)
def _references(expr: IndexExpr) -> tuple[int, ...]:
    return value_references(expr)


def _used(node: Node) -> tuple[int, ...]:
    """`operands`, with what index expressions refer to remembered."""
    match node:
        case Load():
            own = _references(node.index)
            return own if node.mask is None else (*own, node.mask)
        case Index():
            return _references(node.expr)
        case _:
            return operands(node)


def _live_positions(nodes: Sequence[Node], stores: Sequence[Store]) -> set[int]:
    live: set[int] = set()
    for store in stores:
        live.add(store.value)
        live.update(_references(store.index))
        if store.mask is not None:
            live.add(store.mask)
    for position in range(len(nodes) - 1, -1, -1):
        if position in live:
            live.update(_used(nodes[position]))
    return live


def _renumbered(node: Node, moved: dict[int, int], symbols: dict[sympy.Symbol, sympy.Symbol]) -> Node:
    match node:
        case Load():
            mask = None if node.mask is None else moved[node.mask]
            return replace(node, index=node.index.xreplace(symbols), mask=mask)
        case Index():
            return replace(node, expr=node.expr.xreplace(symbols))
        case Constant():
            return node
        case Call() | Reduce():
            return replace(node, args=tuple(moved[a] for a in node.args))
        case Cast() | Item():
            return replace(node, arg=moved[node.arg])
        case Random():
            return replace(node, seed=moved[node.seed], offset=moved[node.offset])


def _ranges(sizes: Sequence[Size], symbol: Callable[[int], sympy.Symbol]) -> tuple[tuple[Range, ...], Coordinates]:
    ranges: list[Range] = []
    coordinates: list[IndexExpr] = []
    for size in sizes:
        if size == 1:
            coordinates.append(ZERO)
            continue
        ranges.append(Range(symbol(len(ranges)), size))
        coordinates.append(ranges[-1].symbol)
    return tuple(ranges), tuple(coordinates)


def _rounds(value: Scalar, dtype: torch.dtype) -> bool:
    """Whether a literal changes when it becomes ``dtype`` in a way that Python's own conversion would not show."""
    if dtype in HALF or (dtype is torch.float32 and not isinstance(value, bool)):
        if not math.isfinite(value):
            return False
        return float(torch.tensor(value, dtype=dtype)) != value
    if dtype.is_floating_point or dtype is torch.bool:
        return False
    return not math.isfinite(value) or not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max
