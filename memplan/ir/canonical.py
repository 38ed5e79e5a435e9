"""Kernels renamed so that equal loops are equal data: one source, one build, for all layers of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import sympy

from .loops import Kernel, Load, Range, Store, outer_symbol, row_symbol, walk_expressions


@dataclass(frozen=True)
class CanonicalKernel:
    """A kernel over buffers ``b0, b1, ...`` with outer ranges ``x0, ...`` and row ranges ``r0, ...``.

    ``buffers[k]`` is what ``b<k>`` was called; ``symbols`` the size symbols that the kernel takes as int64 arguments,
    after the buffers, in this order. Emitters print ``kernel`` and nothing of the rest. ``offsets`` are the bytes that
    the caller adds to each buffer's address (see `hoist_offsets`); empty for none.
    """

    kernel: Kernel
    buffers: tuple[str, ...]
    symbols: tuple[sympy.Symbol, ...]
    offsets: tuple[int, ...] = ()


def canonicalize(kernel: Kernel) -> CanonicalKernel:
    """Rename ranges and buffers by order of first appearance (loads before stores)."""
    found = _canonical(kernel.anonymous)
    return CanonicalKernel(found.kernel, kernel.buffers, found.symbols)


@lru_cache(maxsize=1 << 14)
def _canonical(kernel: Kernel) -> CanonicalKernel:
    """`canonicalize` for a kernel whose buffers have canonical names."""
    ranges: dict[sympy.Symbol, sympy.Symbol] = {}
    outer = tuple(_rename(r, outer_symbol(k), ranges) for k, r in enumerate(kernel.outer))
    row = tuple(_rename(r, row_symbol(k), ranges) for k, r in enumerate(kernel.row))
    moved = {a: b for a, b in ranges.items() if a != b}

    def index(expr: sympy.Expr) -> sympy.Expr:
        return expr.xreplace(moved) if moved else expr

    nodes = []
    for node in kernel.nodes:
        if isinstance(node, Load):
            node = replace(node, index=index(node.index))
        elif hasattr(node, "expr"):
            node = replace(node, expr=index(node.expr))
        nodes.append(node)
    stores = tuple(replace(s, index=index(s.index)) for s in kernel.stores)
    out = Kernel(outer, row, tuple(nodes), stores)
    return CanonicalKernel(out, kernel.buffers, size_symbols(out))


#: Bytes that every offset is a multiple of, so that addresses stay aligned as kernels expect.
OFFSET_UNIT = 16


def hoist_offsets(canonical: CanonicalKernel) -> CanonicalKernel:
    """The kernel with what all indices of a buffer have in common as an offset of the buffer's address.

    Slices of one tensor then run one kernel. Each access reaches the same byte as before, so what was known about
    overlaps, races and bounds of the kernel still holds.
    """
    kernel, offsets = _hoisted(canonical.kernel)
    return canonical if kernel is canonical.kernel else replace(canonical, kernel=kernel, offsets=offsets)


@lru_cache(maxsize=1 << 14)
def _hoisted(body: Kernel) -> tuple[Kernel, tuple[int, ...]]:
    """`hoist_offsets` of a canonical kernel: the kernel and the bytes for each buffer."""
    offsets = dict.fromkeys(body.buffers, 0)
    every: list[Load | Store] = [*body.loads, *body.stores]
    for name in offsets:
        accesses = [a for a in every if a.buffer == name]
        itemsizes = {a.dtype.itemsize for a in accesses}
        if len(itemsizes) == 1:
            (itemsize,) = itemsizes
            common = min(_constant_part(a.index) for a in accesses)
            offsets[name] = common * itemsize // OFFSET_UNIT * OFFSET_UNIT
    if not any(offsets.values()):
        return body, ()

    def moved(index: sympy.Expr, buffer: str, itemsize: int) -> sympy.Expr:
        return index - offsets[buffer] // itemsize if offsets[buffer] else index

    nodes = tuple(
        replace(n, index=moved(n.index, n.buffer, n.dtype.itemsize)) if isinstance(n, Load) else n for n in body.nodes
    )
    stores = tuple(replace(s, index=moved(s.index, s.buffer, s.dtype.itemsize)) for s in body.stores)
    return Kernel(body.outer, body.row, nodes, stores), tuple(offsets.values())


@lru_cache(maxsize=1 << 14)
def _constant_part(index: sympy.Expr) -> int:
    """The constant of a sum whose other terms only add to it; 0 where there is none or something is subtracted."""
    constant, rest = index.as_coeff_Add()
    if not constant.is_Integer or constant <= 0:
        return 0
    if any(term.as_coeff_Mul()[0] < 0 for term in sympy.Add.make_args(rest)):
        return 0
    return int(constant)


def size_symbols(kernel: Kernel) -> tuple[sympy.Symbol, ...]:
    """Size symbols of a kernel: free symbols that are neither ranges nor values, sorted by name."""
    own = {r.symbol for r in (*kernel.outer, *kernel.row)}
    found: set[sympy.Symbol] = set()
    for expr in walk_expressions(kernel):
        found |= expr.free_symbols
    for r in (*kernel.outer, *kernel.row):
        if not isinstance(r.size, int):
            found |= r.size.free_symbols
    found -= own
    return tuple(sorted((s for s in found if not (s.name[0] == "v" and s.name[1:].isdigit())), key=lambda s: s.name))


def _rename(r: Range, symbol: sympy.Symbol, ranges: dict[sympy.Symbol, sympy.Symbol]) -> Range:
    ranges[r.symbol] = symbol
    return Range(symbol, r.size)
