"""Rewriting of a kernel's ranges for a CPU: unit ranges dropped, divisions split away, order chosen, ranges merged.

Every rewriting gives an equal kernel: the same points, values and stores, in another order of loops. Sums over the
row may be added in another order for it, as in any parallel sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy

from memplan.ir.index import FloorDiv, Mod, Ranges, affine, expand, ranges_of, stride_of
from memplan.ir.loops import (
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
    Range,
    Reduce,
    Size,
    Store,
    free_symbols,
    operands,
    value_references,
    value_symbol,
)
from memplan.ir.over_ranges import over_ranges

Hints = Mapping[sympy.Symbol, int]
_ZERO = sympy.Integer(0)


def hinted(size: Size, hints: Hints) -> int:
    """The size at the hinted values; symbols without a hint (unbacked sizes) count as 8192."""
    if isinstance(size, int) or size.is_Integer:
        return int(size)
    return int(size.xreplace({s: sympy.Integer(hints.get(s, 8192)) for s in size.free_symbols}))


@lru_cache(maxsize=4096)
def prepare(kernel: Kernel) -> Kernel:
    """Index expressions simplified, unit ranges and equal nodes gone, ranges split at divisions."""
    kernel = over_ranges(kernel, {}, kernel.outer, kernel.row)
    outer = tuple(r for r in kernel.outer if r.size != 1)
    # a row of one point stays a row: its reductions need one
    row = tuple(r for r in kernel.row if r.size != 1) or kernel.row[-1:]
    gone = {r.symbol: _ZERO for r in (*kernel.outer, *kernel.row) if r not in outer and r not in row}
    if gone:
        kernel = over_ranges(kernel, gone, outer, row)
    return _split_divisions(share(kernel))


def share(kernel: Kernel) -> Kernel:
    """Equal nodes become one, and nodes that no store needs go."""
    needed: set[int] = set()
    stack = [k for s in kernel.stores for k in store_operands(s)]
    while stack:
        k = stack.pop()
        if k not in needed:
            needed.add(k)
            stack.extend(operands(kernel.nodes[k]))
    moved: dict[int, int] = {}
    nodes: list[Node] = []
    seen: dict[tuple[str, Node], int] = {}
    for k, node in enumerate(kernel.nodes):
        if k not in needed:
            continue
        node = renumber(node, moved)
        position = seen.setdefault((_scalar_text(node), node), len(nodes))
        if position == len(nodes):
            nodes.append(node)
        moved[k] = position
    stores = tuple(renumber_store(s, moved) for s in kernel.stores)
    return Kernel(kernel.outer, kernel.row, tuple(nodes), stores)


def _scalar_text(node: Node) -> str:
    """The scalar of a node as text, which tells -0.0 from 0.0 and 1 from True: they compare equal."""
    match node:
        case Constant(value):
            return repr(value)
        case Load(other=other):
            return repr(other)
        case _:
            return ""


def store_operands(store: Store) -> tuple[int, ...]:
    """Nodes that a store uses: value, indirect index, mask."""
    own = (store.value, *value_references(store.index))
    return own if store.mask is None else (*own, store.mask)


def renumber(node: Node, moved: Mapping[int, int]) -> Node:
    """The node with its operands renamed."""

    def index(expr: IndexExpr) -> IndexExpr:
        return expr.xreplace({value_symbol(k): value_symbol(moved[k]) for k in value_references(expr)})

    match node:
        case Load():
            mask = None if node.mask is None else moved[node.mask]
            return replace(node, index=index(node.index), mask=mask)
        case Index():
            return replace(node, expr=index(node.expr))
        case Call() | Reduce():
            return replace(node, args=tuple(moved[k] for k in node.args))
        case Cast() | Item():
            return replace(node, arg=moved[node.arg])
        case Random():
            return replace(node, seed=moved[node.seed], offset=moved[node.offset])
        case _:
            return node


def renumber_store(store: Store, moved: Mapping[int, int]) -> Store:
    """The store with its operands renamed."""
    names = {value_symbol(k): value_symbol(moved[k]) for k in value_references(store.index)}
    mask = None if store.mask is None else moved[store.mask]
    return replace(store, value=moved[store.value], mask=mask, index=store.index.xreplace(names))


def expressions(kernel: Kernel) -> list[sympy.Expr]:
    """Every index expression of the kernel."""
    found = [n.index if isinstance(n, Load) else n.expr for n in kernel.nodes if isinstance(n, (Load, Index))]
    return found + [s.index for s in kernel.stores]


# ---- divisions ------------------------------------------------------------------------------------------------------


def _split_divisions(kernel: Kernel) -> Kernel:
    """Cut ranges so that ``x // 64`` and ``x % 64`` become loop symbols of their own."""
    for _ in range(8):
        found = _a_split(kernel)
        if found is None:
            return kernel
        kernel = found
    return kernel


def _a_split(kernel: Kernel) -> Kernel | None:
    for symbol, divisor in _candidates(kernel):
        split = _split(kernel, symbol, divisor)
        if _divisions(split) < _divisions(kernel):
            return split
    return None


def _divisions(kernel: Kernel) -> int:
    return sum(len(e.atoms(FloorDiv, Mod)) for e in expressions(kernel))


def _candidates(kernel: Kernel) -> list[tuple[sympy.Symbol, int]]:
    """Pairs (range symbol, divisor of its size) that some division suggests, larger divisors first."""
    sizes = {r.symbol: r.size for r in (*kernel.outer, *kernel.row)}
    found: dict[tuple[sympy.Symbol, int], None] = {}
    for expr in expressions(kernel):
        for atom in expr.atoms(FloorDiv, Mod):
            base, divisor = atom.args
            if not divisor.is_Integer:
                continue
            for term in sympy.Add.make_args(base):
                coefficient, symbol = term.as_coeff_Mul()
                size = sizes.get(symbol)
                if not isinstance(size, int) or not coefficient.is_Integer or coefficient <= 0:
                    continue
                cut, rest = divmod(int(divisor), int(coefficient))
                if not rest and 1 < cut < size and size % cut == 0:
                    found[symbol, cut] = None
    return sorted(found, key=lambda pair: (-pair[1], pair[0].name))


def _split(kernel: Kernel, symbol: sympy.Symbol, inner: int) -> Kernel:
    high, low = _fresh(kernel, 2)

    def cut(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        out: list[Range] = []
        for r in ranges:
            if r.symbol == symbol:
                assert isinstance(r.size, int)
                out += [Range(high, r.size // inner), Range(low, inner)]
            else:
                out.append(r)
        return tuple(out)

    return over_ranges(kernel, {symbol: inner * high + low}, cut(kernel.outer), cut(kernel.row))


def _fresh(kernel: Kernel, count: int) -> list[sympy.Symbol]:
    used = {r.symbol.name for r in (*kernel.outer, *kernel.row)}
    names = (f"y{k}" for k in range(len(used) + 64))
    free = [n for n in names if n not in used]
    return [sympy.Symbol(n, integer=True, nonnegative=True) for n in free[:count]]


# ---- strides --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def stride(expr: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr | None:
    """By how much ``expr`` grows with ``symbol``, where that is the same everywhere; None where it is not."""
    if symbol not in free_symbols(expr):
        return _ZERO
    if affine(expr) is not None:
        return stride_of(expr, symbol)
    difference = expand(expr.xreplace({symbol: symbol + 1}) - expr)
    return None if symbol in difference.free_symbols or difference.has(FloorDiv, Mod) else difference


@dataclass(frozen=True, slots=True)
class Access:
    """A load or store as traffic: ``weight`` is its bytes over the whole kernel (stores doubled)."""

    index: sympy.Expr
    weight: float
    indirect: frozenset[sympy.Symbol]  # range symbols that reach the index through loaded values

    def stride(self, symbol: sympy.Symbol, hints: Hints) -> int | None:
        """Elements from one value of the symbol to the next; None if irregular."""
        if symbol in self.indirect:
            return None
        found = stride(self.index, symbol)
        return None if found is None else hinted(found, hints)


def dependencies(kernel: Kernel) -> tuple[frozenset[sympy.Symbol], ...]:
    """For every node the range symbols that its value depends on (none of the row's for a reduction)."""
    own = {r.symbol for r in (*kernel.outer, *kernel.row)}
    row = {r.symbol for r in kernel.row}
    found: list[frozenset[sympy.Symbol]] = []
    for node in kernel.nodes:
        symbols: set[sympy.Symbol] = set()
        for k in operands(node):
            symbols |= found[k]
        if isinstance(node, Load):
            symbols |= node.index.free_symbols & own
        elif isinstance(node, Index):
            symbols |= node.expr.free_symbols & own
        elif isinstance(node, Reduce):
            symbols -= row
        found.append(frozenset(symbols))
    return tuple(found)


def accesses(kernel: Kernel, hints: Hints) -> list[Access]:
    """Loads and stores with their traffic at the hinted sizes."""
    deps = dependencies(kernel)
    sizes = {r.symbol: hinted(r.size, hints) for r in (*kernel.outer, *kernel.row)}
    out: list[Access] = []
    pairs: list[tuple[sympy.Expr, int, frozenset[sympy.Symbol]]] = []
    for k, node in enumerate(kernel.nodes):
        if isinstance(node, Load):
            pairs.append((node.index, node.dtype.itemsize, deps[k]))
    for s in kernel.stores:
        reached = set(s.index.free_symbols & set(sizes))
        for k in store_operands(s):
            reached |= deps[k]
        pairs.append((s.index, 2 * s.dtype.itemsize, frozenset(reached)))
    for index, nbytes, symbols in pairs:
        points = 1.0
        for symbol in symbols:
            points *= max(sizes[symbol], 1)
        through: frozenset[sympy.Symbol] = frozenset()
        for k in value_references(index):
            through |= deps[k]
        out.append(Access(index, nbytes * points, through))
    return out


def contiguous_bytes(found: Iterable[Access], symbol: sympy.Symbol, size: int, hints: Hints) -> float:
    """Traffic that is contiguous (or the same element) along the symbol, a short range counting for less."""
    total = 0.0
    for access in found:
        step = access.stride(symbol, hints)
        if step == 1:
            total += access.weight
        elif step == 0:
            total += 0.3 * access.weight
        elif step is None:
            total += 0.05 * access.weight
    return total * min(1.0, size / 16)


def by_stride(ranges: Sequence[Range], found: Sequence[Access], hints: Hints) -> tuple[Range, ...]:
    """Ranges from the largest to the smallest stride, averaged over the traffic; ties keep their order."""

    def key(r: Range) -> float:
        total, weight = 0.0, 0.0
        for access in found:
            step = access.stride(r.symbol, hints)
            if step:
                total += access.weight * abs(step)
                weight += access.weight
        return -total / weight if weight else 0.0

    return tuple(sorted(ranges, key=key))


# ---- merging --------------------------------------------------------------------------------------------------------


def merge(kernel: Kernel, group: Callable[[Kernel], tuple[Range, ...]]) -> Kernel:
    """Join neighbouring ranges of one group (outer or row) wherever every index allows it."""
    position = 0
    while position + 1 < len(group(kernel)):
        joined = _join(kernel, *group(kernel)[position : position + 2])
        if joined is None:
            position += 1
        else:
            kernel = joined
            position = max(0, position - 1)
    return kernel


def _join(kernel: Kernel, a: Range, b: Range) -> Kernel | None:
    ranges: Ranges = ranges_of((*kernel.outer, *kernel.row))
    for expr in expressions(kernel):
        if not _joinable(expr, a, b, ranges):
            return None
    (joined,) = _fresh(kernel, 1)
    size = expand(sympy.sympify(a.size) * b.size)
    new = Range(joined, int(size) if size.is_Integer else size)

    def put(old: tuple[Range, ...]) -> tuple[Range, ...]:
        return tuple(new if r.symbol == b.symbol else r for r in old if r.symbol != a.symbol)

    # Every index depends on the two through a * size + b alone, so the first may stand at 0 and the second run on.
    return _rewrite_plain(kernel, {a.symbol: _ZERO, b.symbol: joined}, put(kernel.outer), put(kernel.row))


def _joinable(expr: sympy.Expr, a: Range, b: Range, ranges: Ranges) -> bool:
    if not expr.free_symbols & {a.symbol, b.symbol}:
        return True
    over_a, over_b = stride(expr, a.symbol), stride(expr, b.symbol)
    return over_a is not None and over_b is not None and expand(over_b * b.size - over_a) == 0


def _rewrite_plain(
    kernel: Kernel, values: Mapping[sympy.Symbol, sympy.Expr], outer: tuple[Range, ...], row: tuple[Range, ...]
) -> Kernel:
    """`_rewrite` without simplification: bounds of what is left are those of before."""
    nodes: list[Node] = []
    for node in kernel.nodes:
        if isinstance(node, Load):
            node = replace(node, index=expand(node.index.xreplace(values)))
        elif isinstance(node, Index):
            node = replace(node, expr=expand(node.expr.xreplace(values)))
        nodes.append(node)
    stores = tuple(replace(s, index=expand(s.index.xreplace(values))) for s in kernel.stores)
    return Kernel(outer, row, tuple(nodes), stores)
