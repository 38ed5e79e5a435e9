"""A kernel over other ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy

from .index import ranges_of, simplify
from .loops import Index, IndexExpr, Kernel, Load, Node, Range


def over_ranges(
    kernel: Kernel, values: Mapping[sympy.Symbol, sympy.Expr], outer: tuple[Range, ...], row: tuple[Range, ...]
) -> Kernel:
    """The kernel over other ranges, its old symbols replaced by ``values``, index expressions simplified."""
    ranges = ranges_of((*outer, *row))

    def index(expr: IndexExpr) -> IndexExpr:
        return simplify(sympy.sympify(expr).xreplace(values) if values else sympy.sympify(expr), ranges)

    nodes: list[Node] = []
    for node in kernel.nodes:
        if isinstance(node, Load):
            node = replace(node, index=index(node.index))
        elif isinstance(node, Index):
            node = replace(node, expr=index(node.expr))
        nodes.append(node)
    stores = tuple(replace(s, index=index(s.index)) for s in kernel.stores)
    return Kernel(outer, row, tuple(nodes), stores)
