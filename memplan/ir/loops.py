"""Kernels as data: loops over outer and row ranges, and an expression DAG inside.

One `Kernel` iterates over all points of ``outer x row``. Values are a DAG in static single assignment: ``nodes[k]``
names its operands by their position, always smaller than ``k``. A value is of one of three levels, which
`Kernel.levels` computes:

* *constant*: depends on no range;
* *outer*: the same for a whole row (a `Reduce` is always at this level; so is what is computed from it alone);
* *point*: differs along the row.

A kernel without row ranges is pointwise. A kernel may reduce several times over the same row (softmax, LayerNorm):
a point value may use an outer value that a reduction made. Emitters cut it into passes over the row where it does
not fit into a block; what may be written over what depends on them. A reduction is made in the first pass that can. A
store at the points is made in the last pass that computes all the point values it needs anyway, for reductions or, in
the last pass of all, for stores that no earlier one can make; where no pass does, in the first that can. So the sum
that a LayerNorm of a sum stores besides is stored when its terms are read for the last time. An emitter may store later
than that, where it reads nothing more for it.

Index expressions are sympy expressions over the range symbols (``x0, x1, ...`` outer, ``r0, r1, ...`` row), size
symbols (dynamic shapes) and ``v<k>``, the integer value of ``nodes[k]`` (indirect access). They count elements of the
buffer's dtype from the start of its storage. Functions used in them: `FloorDiv`, `Mod` of `memplan.ir.index`.

Number semantics: a node of dtype float16 or bfloat16 is computed in float32 and not rounded, except by `Cast` and
by storing, which round to nearest even; float64 and integers are computed in their own type, integers wrap around.
Maxima and minima propagate NaN. Half-open ranges everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from typing import Literal, TypeAlias

import sympy
import torch

Size: TypeAlias = int | sympy.Expr
IndexExpr: TypeAlias = sympy.Expr
Scalar: TypeAlias = bool | int | float


@dataclass(frozen=True, slots=True)
class Range:
    """One loop dimension: the symbol runs over ``0 <= symbol < size``."""

    symbol: sympy.Symbol
    size: Size


@dataclass(frozen=True, slots=True)
class Load:
    """Read one element. Where ``mask`` (a boolean node) is false nothing is read and the value is ``other``."""

    buffer: str
    index: IndexExpr
    dtype: torch.dtype
    mask: int | None = None
    other: Scalar = 0


@dataclass(frozen=True, slots=True)
class Index:
    """An index expression as a value (iota, positions, symbolic scalars); dtype is integral."""

    expr: IndexExpr
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A literal (infinities and NaN are allowed for floating dtypes).

    Equal are literals of one text: -0.0 is not 0.0, True is not 1, and a NaN is a NaN.
    """

    value: Scalar
    dtype: torch.dtype

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return NotImplemented
        return self.dtype is other.dtype and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash((repr(self.value), self.dtype))


@dataclass(frozen=True, slots=True)
class Call:
    """A pointwise function of `OPERATIONS`; operand dtypes are already what the function works in."""

    op: str
    args: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Cast:
    """Conversion with C semantics for values in range; to bool it is ``!= 0``; to float16/bfloat16 it rounds."""

    arg: int
    dtype: torch.dtype


ReduceOp = Literal["sum", "prod", "max", "min", "any", "all", "argmax", "argmin", "welford", "welford_combine"]


@dataclass(frozen=True, slots=True)
class Reduce:
    """A reduction of point values over the whole row; the result is at outer level.

    ``sum, prod, max, min, any, all`` take one operand. ``argmax, argmin`` take (value, index): the index belonging
    to the first largest (smallest) value, NaN counting as largest (smallest), ties to the smallest index.
    ``welford`` takes one operand and gives (mean, m2, weight), m2 the sum of squared deviations;
    ``welford_combine`` takes (mean, m2, weight) and gives the same of the union. Items of the multi-result ones are
    read with `Item`. ``dtype`` is the accumulator's and the result's type (float32 for half inputs).
    """

    op: ReduceOp
    args: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Item:
    """Result number ``item`` of a reduction with several (welford: mean, m2, weight)."""

    arg: int
    item: int
    dtype: torch.dtype


RandomKind = Literal["rand", "randn", "randint64"]


@dataclass(frozen=True, slots=True)
class Random:
    """A draw of Philox 2x32-10: a function of (seed, offset) alone.

    The key is the seed's low word, the counter the offset, its high word XORed with the seed's. ``rand`` is float32 in
    [0, 1) of the first word, ``randn`` Box and Muller's cosine of both, ``randint64`` both, the first one low. ``seed``
    is an int64 node, ``offset`` an integer node that is not negative (the element's flat position).
    """

    kind: RandomKind
    seed: int
    offset: int
    dtype: torch.dtype


Node = Load | Index | Constant | Call | Cast | Reduce | Item | Random


class StoreMode(Enum):
    """What a store does with what is there."""

    SET = "set"
    ADD = "add"  # atomic
    MAX = "max"  # atomic
    MIN = "min"  # atomic
    TOTAL = "total"  # sets the element to the sum of what all points with its index store


@dataclass(frozen=True, slots=True)
class Store:
    """Write node ``value`` (cast to ``dtype``, the buffer's) to ``index`` where ``mask`` is true.

    A store whose index and value are both free of the row ranges happens once per outer point. One of mode ``TOTAL``
    happens at the points, and those that share an index are consecutive along the kernel's one outer range
    (`memplan.ir.totals`).
    """

    buffer: str
    index: IndexExpr
    value: int
    dtype: torch.dtype
    mode: StoreMode = StoreMode.SET
    mask: int | None = None


class Level(Enum):
    CONSTANT = 0
    OUTER = 1
    POINT = 2


# Pointwise functions that a Call may name, with their number of operands. Comparisons and `logical_*`, `isnan`,
# `isinf` give bool; `where` takes (bool, a, b). `div` is true division of floats; `floordiv`, `truncdiv` and `mod`
# (sign of the divisor, as Python), `fmod` (sign of the dividend) work on integers and floats. `maximum`, `minimum`
# propagate NaN, `fmax`, `fmin` ignore it. Shifts: `shr` is arithmetic on signed types. `round` is to even.
# `checked_index` takes a position and a size (int64): it is the position where ``0 <= position < size``, and elsewhere
# 0 and an error of the kernel, which its caller raises once the kernel is done. Nobody may use it where the program
# itself would not: a mask around it has to make the position one that is inside.
CHECKED_INDEX = "checked_index"
OPERATIONS: dict[str, int] = {
    **dict.fromkeys(
        [
            "neg",
            "abs",
            "sqrt",
            "rsqrt",
            "exp",
            "exp2",
            "expm1",
            "log",
            "log2",
            "log10",
            "log1p",
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "sinh",
            "cosh",
            "tanh",
            "asinh",
            "acosh",
            "atanh",
            "erf",
            "erfc",
            "erfinv",
            "lgamma",
            "digamma",
            "sigmoid",
            "relu",
            "floor",
            "ceil",
            "trunc",
            "round",
            "sign",
            "signbit",
            "reciprocal",
            "square",
            "logical_not",
            "bitwise_not",
            "isnan",
            "isinf",
            "i0",
            "i0e",
            "i1",
            "i1e",
            "ndtri",
            "log_ndtr",
            "bessel_j0",
            "bessel_j1",
        ],
        1,
    ),
    **dict.fromkeys(
        [
            "add",
            "sub",
            "mul",
            "div",
            "floordiv",
            "truncdiv",
            "mod",
            "fmod",
            "pow",
            "maximum",
            "minimum",
            "fmax",
            "fmin",
            "atan2",
            "hypot",
            "copysign",
            "nextafter",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "logical_and",
            "logical_or",
            "logical_xor",
            "bitwise_and",
            "bitwise_or",
            "bitwise_xor",
            "shl",
            "shr",
            CHECKED_INDEX,
        ],
        2,
    ),
    "where": 3,
    "fma": 3,
}


@dataclass(frozen=True)
class Kernel:
    """Loops with a body. See the module's docstring for the meaning."""

    outer: tuple[Range, ...]
    row: tuple[Range, ...]
    nodes: tuple[Node, ...]
    stores: tuple[Store, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.outer, self.row, self.nodes, self.stores))

    def __hash__(self) -> int:
        """Remembered: kernels are keys of many caches, and their hash walks the whole body."""
        return self._hash

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: what is remembered (hashes of text differ from process to process) is not pickled."""
        return {"outer": self.outer, "row": self.row, "nodes": self.nodes, "stores": self.stores}

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Every buffer once, in order of first appearance, loads before stores."""
        return tuple(dict.fromkeys((*self.read_buffers, *self.written_buffers)))

    @cached_property
    def anonymous(self) -> Kernel:
        """The same loops over buffers ``b0, b1, ...``, which stand for `buffers` in that order.

        One object for all kernels that are equal but for their buffers' names: what a function finds out about it, it
        finds out once for all layers of a model.
        """
        names = tuple([f"b{k}" for k in range(len(self.buffers))])
        return _interned(self if names == self.buffers else self._renamed(names))

    def over(self, buffers: tuple[str, ...]) -> Kernel:
        """The same loops over other buffers, all different: ``buffers[k]`` in place of ``self.buffers[k]``."""
        if buffers == self.buffers:
            return self
        made = self._renamed(buffers)
        made.__dict__.update(anonymous=self.anonymous, buffers=buffers)  # as if `cached_property` had asked
        return made

    def numbered_over(self, buffers: tuple[str, ...]) -> Kernel:
        """For loops over some of ``b0, b1, ...``: the same over ``buffers[k]`` in place of ``b<k>``."""
        return self.over(tuple([buffers[int(b[1:])] for b in self.buffers]))

    def _renamed(self, buffers: tuple[str, ...]) -> Kernel:
        names = dict(zip(self.buffers, buffers, strict=True))
        nodes = tuple(
            [Load(names[n.buffer], n.index, n.dtype, n.mask, n.other) if isinstance(n, Load) else n for n in self.nodes]
        )
        stores = tuple([Store(names[s.buffer], s.index, s.value, s.dtype, s.mode, s.mask) for s in self.stores])
        return Kernel(self.outer, self.row, nodes, stores)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The level of every node, in order."""
        if self.anonymous is not self:
            return self.anonymous.levels
        row = {r.symbol for r in self.row}
        outer = {r.symbol for r in self.outer}
        levels: list[Level] = []
        for node in self.nodes:
            if isinstance(node, Reduce):
                levels.append(Level.OUTER)
                continue
            level = max((levels[k].value for k in operands(node)), default=0)
            for symbol in index_symbols(node):
                if symbol in row:
                    level = max(level, Level.POINT.value)
                elif symbol in outer:
                    level = max(level, Level.OUTER.value)
            levels.append(Level(level))
        return tuple(levels)

    def store_level(self, store: Store) -> Level:
        """POINT if the store happens at every point, OUTER if once a row."""
        row = {r.symbol for r in self.row}
        deps = [store.value, *value_references(store.index), *([] if store.mask is None else [store.mask])]
        point = any(self.levels[k] is Level.POINT for k in deps) or bool(free_symbols(store.index) & row)
        return Level.POINT if point else Level.OUTER

    @cached_property
    def loads(self) -> tuple[Load, ...]:
        return tuple(n for n in self.nodes if isinstance(n, Load))

    @cached_property
    def read_buffers(self) -> tuple[str, ...]:
        """Names of buffers loaded from, in order of first appearance."""
        return tuple(dict.fromkeys(n.buffer for n in self.loads))

    @cached_property
    def written_buffers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.buffer for s in self.stores))

    @cached_property
    def checks_indices(self) -> bool:
        """Whether running it may end with an index out of range."""
        return any(isinstance(n, Call) and n.op == CHECKED_INDEX for n in self.nodes)

    @cached_property
    def reductions(self) -> tuple[int, ...]:
        return tuple(k for k, n in enumerate(self.nodes) if isinstance(n, Reduce))


@lru_cache(maxsize=1 << 14)
def _interned(kernel: Kernel) -> Kernel:
    """The first of all equal kernels that was asked for."""
    return kernel


def operands(node: Node) -> tuple[int, ...]:
    """Positions of the nodes that ``node`` uses, indirect indices and masks among them."""
    match node:
        case Load():
            own = value_references(node.index)
            return own if node.mask is None else (*own, node.mask)
        case Index():
            return value_references(node.expr)
        case Constant():
            return ()
        case Call() | Reduce():
            return node.args
        case Cast() | Item():
            return (node.arg,)
        case Random():
            return (node.seed, node.offset)


def index_symbols(node: Node) -> frozenset[sympy.Symbol]:
    """Free symbols of the node's own index expression (ranges, sizes and ``v<k>``)."""
    match node:
        case Load():
            return free_symbols(node.index)
        case Index():
            return free_symbols(node.expr)
        case _:
            return frozenset()


@lru_cache(maxsize=1 << 16)
def free_symbols(expr: sympy.Expr) -> frozenset[sympy.Symbol]:
    """``expr.free_symbols``, remembered: sympy walks the expression every time."""
    return frozenset(expr.free_symbols)


def value_symbol(position: int) -> sympy.Symbol:
    """The symbol ``v<position>`` that stands for the integer value of ``nodes[position]`` in an index."""
    return sympy.Symbol(f"v{position}", integer=True)


@lru_cache(maxsize=1 << 16)
def value_references(expr: sympy.Expr) -> tuple[int, ...]:
    """Positions of the nodes that ``expr`` refers to by `value_symbol`."""
    if isinstance(expr, (int, sympy.Integer)):
        return ()
    found = (s.name for s in expr.free_symbols)
    return tuple(sorted(int(n[1:]) for n in found if n[0] == "v" and n[1:].isdigit()))


def outer_symbol(position: int) -> sympy.Symbol:
    return sympy.Symbol(f"x{position}", integer=True, nonnegative=True)


def row_symbol(position: int) -> sympy.Symbol:
    return sympy.Symbol(f"r{position}", integer=True, nonnegative=True)


def walk_expressions(kernel: Kernel) -> Iterator[sympy.Expr]:
    """Every index expression of the kernel, stores last."""
    for node in kernel.nodes:
        if isinstance(node, Load):
            yield node.index
        elif isinstance(node, Index):
            yield node.expr
    for store in kernel.stores:
        yield store.index
