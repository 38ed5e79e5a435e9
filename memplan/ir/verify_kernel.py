"""Rules of a single kernel: single assignment, types, levels, bounds, and races between its own points.

Nothing here is shared with a pass. An index is first bounded by interval arithmetic on plain integers; where that
does not prove it in bounds, single points are computed, so that a rejection always names a point that is outside.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

import sympy
import torch

from .errors import LoweringError, VerificationError
from .index import FloorDiv, Mod
from .loops import (
    CHECKED_INDEX,
    OPERATIONS,
    Call,
    Cast,
    Constant,
    Index,
    Item,
    Kernel,
    Level,
    Load,
    Node,
    Random,
    Range,
    Reduce,
    Size,
    Store,
    StoreMode,
    free_symbols,
    operands,
    value_references,
)
from .program import Buffer
from .totals import GROUP, by_group, rows_together

_LOGICAL = "eq ne lt le gt ge logical_and logical_or logical_xor logical_not isnan isinf"
_BOOLEAN_RESULTS = frozenset(_LOGICAL.split())
_REDUCE_ARITY = {"argmax": 2, "argmin": 2, "welford": 1, "welford_combine": 3}
_RANGE_NAME = re.compile(r"[xr]\d+")
_SAMPLED_POINTS = 256  # single points tried where interval arithmetic proves nothing
_ENUMERATED_POINTS = 2048  # a store's points, where its strides do not prove them distinct


def verify_kernel(
    kernel: Kernel,
    buffers: Mapping[str, Buffer],
    hints: Mapping[sympy.Symbol, int] | None = None,
    *,
    name: str = "kernel",
    where: str = "",
) -> None:
    """Check one kernel against the buffers it names.

    Parameters
    ----------
    hints:
        Value of every size symbol; bounds are checked at these.
    name, where:
        The operation's name and the user's line, for the message.

    Raises
    ------
    VerificationError
        Naming the kernel, the node or store, the buffer, and the point at which it goes wrong.
    """
    names = kernel.buffers
    values = tuple((hints or {}).items())
    known = tuple((f"b{k}", b.dtype, b.nbytes) for k, n in enumerate(names) if (b := buffers.get(n)) is not None)
    if not _fault(kernel.anonymous, known, values):
        return
    # said once more with the program's own names
    known = tuple((b.name, b.dtype, b.nbytes) for n in names if (b := buffers.get(n)) is not None)
    found = _fault(kernel, known, values)
    if found:
        raise VerificationError(f"kernel {name!r}: {found}", where=where)


@lru_cache(maxsize=1 << 15)
def _fault(
    kernel: Kernel,
    buffers: tuple[tuple[str, torch.dtype, Size], ...],
    hints: tuple[tuple[sympy.Symbol, int], ...],
) -> str:
    """What is wrong with the kernel, or "". Remembered: most kernels stay as they are from pass to pass."""
    try:
        _Check(kernel, {n: (dtype, nbytes) for n, dtype, nbytes in buffers}, dict(hints)).run()
    except _FaultFound as fault:
        return str(fault)
    return ""


class _FaultFound(Exception):
    """Carries the text of the first rule broken."""


class _Check:
    def __init__(
        self,
        kernel: Kernel,
        buffers: Mapping[str, tuple[torch.dtype, Size]],
        hints: Mapping[sympy.Symbol, int],
    ) -> None:
        self.kernel = kernel
        self.buffers = buffers
        self.hints = hints
        self.ranges = {r.symbol for r in (*kernel.outer, *kernel.row)}
        self.sizes: dict[sympy.Symbol, int] = {}

    def fail(self, message: str) -> _FaultFound:
        return _FaultFound(message)

    def run(self) -> None:
        self.check_ranges()
        for k, node in enumerate(self.kernel.nodes):
            self.check_node(k, node)
        if not self.kernel.stores:
            raise self.fail("it stores nothing")
        for store in self.kernel.stores:
            self.check_store(store)
        if all(self.sizes.values()):
            self.check_bounds()
            for store in self.kernel.stores:
                self.check_written_once(store)

    # -- structure --------------------------------------------------------------------------------------------------

    def check_ranges(self) -> None:
        for r in (*self.kernel.outer, *self.kernel.row):
            if r.symbol in self.sizes:
                raise self.fail(f"two ranges have the symbol {r.symbol}")
            size = r.size if isinstance(r.size, int) else self.value_of(r.size, f"the size of range {r.symbol}")
            if size < 0:
                raise self.fail(f"range {r.symbol} has size {size}")
            self.sizes[r.symbol] = size

    def value_of(self, size: sympy.Expr, what: str) -> int:
        for symbol in size.free_symbols:
            if symbol not in self.hints:
                raise self.fail(f"{what} uses the symbol {symbol}, which is no size symbol of the program")
        return evaluate_index(size, self.hints)

    def check_node(self, k: int, node: Node) -> None:
        for used in operands(node):
            if not 0 <= used < k:
                raise self.fail(f"node v{k} uses v{used}, which is not before it")
        match node:
            case Load():
                self.check_access(f"node v{k}", node.buffer, node.dtype, node.index, k)
                self.check_mask(f"node v{k}", node.mask)
            case Index():
                if node.dtype.is_floating_point or node.dtype.is_complex:
                    raise self.fail(f"node v{k} is an index of dtype {node.dtype}")
                self.check_symbols(f"node v{k}", node.expr)
            case Call():
                self.check_call(k, node)
            case Reduce():
                if not self.kernel.row:
                    raise self.fail(f"node v{k} reduces ({node.op}), but the kernel has no row range")
                expected = _REDUCE_ARITY.get(node.op, 1)
                if len(node.args) != expected:
                    raise self.fail(f"node v{k}: {node.op} takes {expected} operands, not {len(node.args)}")
            case Item():
                self.check_item(k, node)
            case Constant() | Cast() | Random():
                pass
        if not isinstance(node, Item):
            for used in operands(node):
                self.check_single_result(f"node v{k}", used)

    def check_single_result(self, what: str, used: int) -> None:
        operand = self.kernel.nodes[used]
        if isinstance(operand, Reduce) and operand.op in ("welford", "welford_combine"):
            raise self.fail(f"{what} uses v{used} ({operand.op}), which has several results, without an Item")

    def check_call(self, k: int, node: Call) -> None:
        if node.op not in OPERATIONS:
            raise self.fail(f"node v{k} calls the unknown function {node.op!r}")
        if len(node.args) != OPERATIONS[node.op]:
            raise self.fail(f"node v{k}: {node.op} takes {OPERATIONS[node.op]} operands, not {len(node.args)}")
        if node.op in _BOOLEAN_RESULTS and node.dtype is not torch.bool:
            raise self.fail(f"node v{k}: {node.op} gives bool, not {node.dtype}")
        if node.op == CHECKED_INDEX and any(self.kernel.nodes[a].dtype is not torch.int64 for a in node.args):
            raise self.fail(f"node v{k}: {node.op} takes a position and a size of int64")
        if node.op == "where" and self.kernel.nodes[node.args[0]].dtype is not torch.bool:
            raise self.fail(f"node v{k}: the condition v{node.args[0]} of where is not bool")

    def check_item(self, k: int, node: Item) -> None:
        operand = self.kernel.nodes[node.arg]
        if not isinstance(operand, Reduce) or operand.op not in ("welford", "welford_combine"):
            raise self.fail(f"node v{k} takes item {node.item} of v{node.arg}, which has one result")
        if not 0 <= node.item < 3:
            raise self.fail(f"node v{k} takes item {node.item} of v{node.arg}, which has 3")

    def check_mask(self, what: str, mask: int | None) -> None:
        if mask is not None and self.kernel.nodes[mask].dtype is not torch.bool:
            raise self.fail(f"{what}: the mask v{mask} is {self.kernel.nodes[mask].dtype}, not bool")

    def check_store(self, store: Store) -> None:
        what = f"the store to {store.buffer!r}"
        used = [store.value, *value_references(store.index), *([] if store.mask is None else [store.mask])]
        for k in used:
            if not 0 <= k < len(self.kernel.nodes):
                raise self.fail(f"{what} uses v{k}, which does not exist")
            self.check_single_result(what, k)
        self.check_access(what, store.buffer, store.dtype, store.index, len(self.kernel.nodes))
        self.check_mask(what, store.mask)

    def check_access(self, what: str, buffer: str, dtype: torch.dtype, index: sympy.Expr, position: int) -> None:
        if buffer not in self.buffers:
            raise self.fail(f"{what} names the buffer {buffer!r}, which does not exist")
        known = self.buffers[buffer][0]
        if dtype.itemsize != known.itemsize:
            raise self.fail(f"{what} accesses {buffer!r} as {dtype}; the buffer's elements are {known}")
        self.check_symbols(what, index)

    def check_symbols(self, what: str, expr: sympy.Expr) -> None:
        for k in value_references(expr):
            dtype = self.kernel.nodes[k].dtype
            if dtype.is_floating_point or dtype.is_complex:
                raise self.fail(f"{what} is indexed by v{k}, which is {dtype}")
        for symbol in free_symbols(expr):
            if symbol in self.ranges or _is_value(symbol):
                continue
            if _RANGE_NAME.fullmatch(symbol.name):
                raise self.fail(f"{what} uses the range symbol {symbol}, over which the kernel does not run")
            if symbol not in self.hints:
                raise self.fail(f"{what} uses the symbol {symbol}, which is no size symbol of the program")

    # -- bounds -----------------------------------------------------------------------------------------------------

    def check_bounds(self) -> None:
        accesses: list[tuple[str, str, sympy.Expr]] = [
            (f"node v{k} reads", n.buffer, n.index)
            for k, n in enumerate(self.kernel.nodes)
            if isinstance(n, Load) and n.mask is None
        ]
        accesses += [("it writes", s.buffer, s.index) for s in self.kernel.stores if s.mask is None]
        for what, name, index in accesses:
            dtype, nbytes = self.buffers[name]
            nbytes = nbytes if isinstance(nbytes, int) else self.value_of(nbytes, f"the size of {name!r}")
            elements = nbytes // dtype.itemsize
            point = self.point_outside(sympy.sympify(index), elements)
            if point is not None:
                position, at = point
                raise self.fail(
                    f"{what} element {position} of {name!r}, which has {elements} "
                    f"({elements * dtype.itemsize} bytes), at {at} of index {index}"
                )

    def point_outside(self, index: sympy.Expr, elements: int) -> tuple[int, str] | None:
        if value_references(index):
            return None
        found = interval(index, self.sizes, self.hints)
        if found is not None and found[0] >= 0 and found[1] < elements:
            return None
        for point in self.sample(index):
            position = evaluate_index(index, {**self.hints, **point})
            if not 0 <= position < elements:
                return position, ", ".join(f"{s}={v}" for s, v in point.items()) or "its only point"
        return None

    def sample(self, index: sympy.Expr) -> Iterator[dict[sympy.Symbol, int]]:
        """Corners of the space first, then points inside, at most `_SAMPLED_POINTS`."""
        symbols = sorted((s for s in index.free_symbols if s in self.sizes), key=lambda s: s.name)
        corners = itertools.product(*[sorted({0, self.sizes[s] - 1}) for s in symbols])
        inside = itertools.product(*[sorted({n // 3, n // 2, max(n - 2, 0)}) for n in (self.sizes[s] for s in symbols)])
        for point in itertools.islice(itertools.chain(corners, inside), _SAMPLED_POINTS):
            yield dict(zip(symbols, point, strict=True))

    # -- races ------------------------------------------------------------------------------------------------------

    def check_written_once(self, store: Store) -> None:
        """No two points may set one element (the last would win, whichever that is)."""
        if store.mode is StoreMode.TOTAL:
            self.check_totals(store)
        if store.mode is not StoreMode.SET or store.mask is not None:
            return
        ranges: tuple[Range, ...] = self.kernel.outer
        if self.kernel.store_level(store) is Level.POINT:
            ranges = (*ranges, *self.kernel.row)
        wide = [r.symbol for r in ranges if self.sizes[r.symbol] > 1]
        reached = self.reach(store.index)
        for symbol in wide:
            if symbol not in reached:
                raise self.fail(
                    f"all {self.sizes[symbol]} points along {symbol} set the same element of {store.buffer!r} "
                    f"(index {store.index})"
                )
        if value_references(store.index) or self.nested_strides(store.index, wide):
            return
        clash = self.enumerated_clash(store.index, wide)
        if clash is not None:
            raise self.fail(f"two points set element {clash} of {store.buffer!r} (index {store.index})")

    def check_totals(self, store: Store) -> None:
        """Only consecutive rows may share an element of totals, and no two columns."""
        if store.mask is not None:
            raise self.fail(f"its store of totals to {store.buffer!r} is masked")
        try:
            rows = rows_together(self.kernel)
        except LoweringError as error:
            raise self.fail(str(error)) from None
        index = by_group(store, rows)
        (x,) = self.kernel.outer
        self.ranges |= {GROUP}
        self.sizes[GROUP] = -(-self.sizes[x.symbol] // rows)
        wide = [s for s in (GROUP, *(r.symbol for r in self.kernel.row)) if self.sizes[s] > 1]
        if not self.nested_strides(index, wide):
            raise self.fail(
                f"columns or groups of rows may have one total in {store.buffer!r} together (index {store.index})"
            )

    def reach(self, expr: sympy.Expr) -> frozenset[sympy.Symbol]:
        """Range symbols that an index depends on, through loaded values too."""
        found = set(free_symbols(expr)) & self.ranges
        todo, seen = list(value_references(expr)), set()
        row = {r.symbol for r in self.kernel.row}
        while todo:
            k = todo.pop()
            if k in seen:
                continue
            seen.add(k)
            node = self.kernel.nodes[k]
            own = node.index if isinstance(node, Load) else node.expr if isinstance(node, Index) else None
            if own is not None:
                found |= free_symbols(own) & self.ranges
            if isinstance(node, Reduce):
                found |= set(self.ranges) - row  # a row's value differs from row to row
            else:
                todo.extend(operands(node))
        return frozenset(found)

    def nested_strides(self, index: sympy.Expr, wide: list[sympy.Symbol]) -> bool:
        """Whether the index is affine with each stride at least the extent of all smaller ones."""
        strides: list[tuple[int, int]] = []
        for term in sympy.Add.make_args(index):
            symbols = [s for s in term.free_symbols if s in self.ranges]
            if not symbols:
                continue
            if len(symbols) > 1 or term.has(FloorDiv, Mod) or term.has(sympy.Pow):
                return False
            stride = evaluate_index(term, {**self.hints, symbols[0]: 1})
            if symbols[0] in wide:
                strides.append((abs(stride), self.sizes[symbols[0]]))
        extent = 1
        for stride, size in sorted(strides):
            if stride < extent:
                return False
            extent = stride * (size - 1) + extent
        return len(strides) == len(wide)

    def enumerated_clash(self, index: sympy.Expr, wide: list[sympy.Symbol]) -> int | None:
        points = 1
        for s in wide:
            points *= self.sizes[s]
        if points > _ENUMERATED_POINTS:
            return None
        rest = dict.fromkeys((s for s in self.ranges if s not in wide), 0)
        seen: set[int] = set()
        for point in itertools.product(*[range(self.sizes[s]) for s in wide]):
            position = evaluate_index(index, {**self.hints, **rest, **dict(zip(wide, point, strict=True))})
            if position in seen:
                return position
            seen.add(position)
        return None


def _is_value(symbol: sympy.Symbol) -> bool:
    return bool(symbol.name[0] == "v" and symbol.name[1:].isdigit())


def evaluate_index(expr: Size, values: Mapping[sympy.Symbol, int]) -> int:
    """The integer value of an index or size expression; every symbol must have a value."""
    if isinstance(expr, int):
        return expr
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return values[expr]
    args = [evaluate_index(a, values) for a in expr.args]
    if expr.is_Add:
        return sum(args)
    if expr.is_Mul:
        out = 1
        for a in args:
            out *= a
        return out
    if isinstance(expr, FloorDiv):
        return args[0] // args[1]
    if isinstance(expr, Mod):
        return args[0] % args[1]
    if expr.is_Pow:
        return int(args[0] ** args[1])
    if isinstance(expr, sympy.Max):
        return max(args)
    if isinstance(expr, sympy.Min):
        return min(args)
    return int(expr.xreplace({s: sympy.Integer(values[s]) for s in expr.free_symbols}))


def interval(
    expr: Size, sizes: Mapping[sympy.Symbol, int], hints: Mapping[sympy.Symbol, int]
) -> tuple[int, int] | None:
    """Inclusive bounds of an index over ``0 <= symbol < sizes[symbol]``; wide where terms depend on one another."""
    if isinstance(expr, int) or expr.is_Integer:
        return int(expr), int(expr)
    if expr.is_Symbol:
        if expr in sizes:
            return 0, sizes[expr] - 1
        return (hints[expr], hints[expr]) if expr in hints else None
    parts = [interval(a, sizes, hints) for a in expr.args]
    if any(p is None for p in parts):
        return None
    known = [p for p in parts if p is not None]
    if expr.is_Add:
        return sum(p[0] for p in known), sum(p[1] for p in known)
    if expr.is_Mul:
        low, high = 1, 1
        for a, b in known:
            products = (low * a, low * b, high * a, high * b)
            low, high = min(products), max(products)
        return low, high
    if expr.is_Pow and known[0][0] >= 0 and known[1][0] == known[1][1] >= 0:
        return known[0][0] ** known[1][0], known[0][1] ** known[1][0]
    if isinstance(expr, (FloorDiv, Mod)) and known[1][0] == known[1][1] > 0:
        divisor = known[1][0]
        if isinstance(expr, FloorDiv):
            return known[0][0] // divisor, known[0][1] // divisor
        return known[0] if known[0][0] >= 0 and known[0][1] < divisor else (0, divisor - 1)
    return None
