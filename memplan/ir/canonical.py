"""Kernels renamed so that equal loops are equal data: one source, one build, for all layers of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from .loops import Kernel, Load, Range, outer_symbol, row_symbol, walk_expressions


@dataclass(frozen=True)
class CanonicalKernel:
    """A kernel over buffers ``b0, b1, ...`` with outer ranges ``x0, ...`` and row ranges ``r0, ...``.

    ``buffers[k]`` is what ``b<k>`` was called; ``symbols`` the size symbols that the kernel takes as int64 arguments,
    after the buffers, in this order. Emitters print ``kernel`` and nothing of the rest.
    """

    kernel: Kernel
    buffers: tuple[str, ...]
    symbols: tuple[sympy.Symbol, ...]


def canonicalize(kernel: Kernel) -> CanonicalKernel:
    """Rename ranges and buffers by order of first appearance (loads before stores)."""
    names = tuple(dict.fromkeys((*kernel.read_buffers, *kernel.written_buffers)))
    renamed = {name: f"b{k}" for k, name in enumerate(names)}
    ranges: dict[sympy.Symbol, sympy.Symbol] = {}
    outer = tuple(_rename(r, outer_symbol(k), ranges) for k, r in enumerate(kernel.outer))
    row = tuple(_rename(r, row_symbol(k), ranges) for k, r in enumerate(kernel.row))
    moved = {a: b for a, b in ranges.items() if a != b}

    def index(expr: sympy.Expr) -> sympy.Expr:
        return expr.xreplace(moved) if moved else expr

    nodes = []
    for node in kernel.nodes:
        if isinstance(node, Load):
            node = replace(node, buffer=renamed[node.buffer], index=index(node.index))
        elif hasattr(node, "expr"):
            node = replace(node, expr=index(node.expr))
        nodes.append(node)
    stores = tuple(replace(s, buffer=renamed[s.buffer], index=index(s.index)) for s in kernel.stores)
    out = Kernel(outer, row, tuple(nodes), stores)
    return CanonicalKernel(out, names, size_symbols(out))


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
