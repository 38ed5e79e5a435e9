"""A kernel's body under construction: nodes of other kernels copied into new ranges, equal nodes made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

import sympy
import torch

from memplan.ir.index import Ranges, bounds, expand, is_nonnegative, simplify
from memplan.ir.loops import (
    CHECKED_INDEX,
    Call,
    Cast,
    Constant,
    Index,
    Item,
    Kernel,
    Load,
    Node,
    Random,
    Range,
    Reduce,
    Store,
    operands,
    value_references,
    value_symbol,
)

Mapping_ = Mapping[sympy.Symbol, sympy.Expr]
#: what a load of the copied kernel becomes: the position of a value that is there already, or None for a load
Forward = Callable[[Load], int | None]


@lru_cache(maxsize=1 << 16)
def _substituted(expr: sympy.Expr, mapping: tuple[tuple[sympy.Symbol, sympy.Expr], ...], ranges: Ranges) -> sympy.Expr:
    return simplify(expr.xreplace(dict(mapping)), ranges)


class Body:
    """Nodes and stores over given ranges, in the making.

    Equal nodes share a position (common subexpressions and duplicate loads go). That is right because a kernel means
    "read everything, then write": no store of a kernel changes what its loads see.
    """

    def __init__(self, outer: tuple[Range, ...], row: tuple[Range, ...]) -> None:
        self.outer = outer
        self.row = row
        self.ranges: Ranges = tuple((r.symbol, r.size) for r in (*outer, *row))
        self.nodes: list[Node] = []
        self.stores: list[Store] = []
        self._known: dict[object, int] = {}
        #: index expressions that are known in the new ranges already (used with an empty mapping)
        self.rewritten: Mapping[sympy.Expr, sympy.Expr] = {}
        #: coordinates in use for the moment, and what they stand for
        self.coordinates: Mapping[sympy.Symbol, sympy.Expr] = {}

    def add(self, node: Node) -> int:
        """The position of this node, a new one if there is no equal one yet."""
        # 0.0 == -0.0 == False and nan != nan, so a literal is told apart by its text
        key: object = ("constant", repr(node.value), node.dtype) if isinstance(node, Constant) else node
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self.nodes)
            self.nodes.append(node)
        return found

    def index(
        self, expr: sympy.Expr, mapping: tuple[tuple[sympy.Symbol, sympy.Expr], ...], moved: list[int]
    ) -> sympy.Expr:
        """An index expression with ranges and values renamed."""
        if expr.is_Integer:
            return expr
        expr = self.rewritten.get(expr, expr)
        references = value_references(expr)
        if references:
            values = tuple((value_symbol(k), value_symbol(moved[k])) for k in references if moved[k] != k)
            # one simultaneous substitution: new value numbers may coincide with old ones
            expr = simplify(expr.xreplace({**dict(mapping), **dict(values)}), self.ranges)
        elif mapping:
            expr = _substituted(expr, mapping, self.ranges)
        return expand(expr.xreplace(self.coordinates)) if self.coordinates else expr

    def embed(
        self,
        kernel: Kernel,
        mapping: Mapping_,
        *,
        forward: Forward | None = None,
        only: frozenset[int] | None = None,
        mask: int | None = None,
    ) -> list[int]:
        """Copy a kernel's nodes, its range symbols replaced; gives each old position its new one.

        ``only`` limits it to these positions (the others get -1). With ``mask`` (a boolean node here) all copied
        loads read only where it is true.
        """
        pairs = tuple((s, e) for s, e in mapping.items() if s != e)
        moved: list[int] = []
        for k, node in enumerate(kernel.nodes):
            if only is not None and k not in only:
                moved.append(-1)
                continue
            moved.append(self._copy(node, pairs, moved, forward, mask))
        return moved

    def _copy(
        self,
        node: Node,
        mapping: tuple[tuple[sympy.Symbol, sympy.Expr], ...],
        moved: list[int],
        forward: Forward | None,
        mask: int | None,
    ) -> int:
        match node:
            case Load():
                own = None if node.mask is None else moved[node.mask]
                if mask is not None:
                    own = mask if own is None else self.add(Call("logical_and", (mask, own), torch.bool))
                load = Load(node.buffer, self.index(node.index, mapping, moved), node.dtype, own, node.other)
                if forward is not None:
                    found = forward(load)
                    if found is not None:
                        return found
                return self.add(load)
            case Index():
                return self.add(Index(self.index(node.expr, mapping, moved), node.dtype))
            case Call(op) if op == CHECKED_INDEX:
                return self._checked(moved[node.args[0]], moved[node.args[1]], mask)
            case _:
                return self.add(renumber(node, moved))

    def _checked(self, position: int, size: int, mask: int | None) -> int:
        """A checked index: itself where it cannot be out of range; where a mask is false, nothing is to be checked."""
        found, end = self.nodes[position], self.nodes[size]
        if isinstance(found, Index) and isinstance(end, Constant):
            known = bounds(found.expr, self.ranges)
            if known is not None and all(is_nonnegative(expand(e)) for e in (known[0], end.value - 1 - known[1])):
                return position
        if mask is not None:
            zero = self.add(Constant(0, torch.int64))
            position = self.add(Call("where", (mask, position, zero), torch.int64))
        return self.add(Call(CHECKED_INDEX, (position, size), torch.int64))

    def embed_stores(self, kernel: Kernel, mapping: Mapping_, moved: list[int]) -> list[Store]:
        """A kernel's stores over the new ranges and values (not yet added)."""
        pairs = tuple((s, e) for s, e in mapping.items() if s != e)
        return [
            replace(
                s,
                index=self.index(s.index, pairs, moved),
                value=moved[s.value],
                mask=None if s.mask is None else moved[s.mask],
            )
            for s in kernel.stores
        ]

    def rounded(self, value: int, dtype: torch.dtype) -> int:
        """The value as a buffer of ``dtype`` would give it back: stores round, so forwarding rounds too."""
        node = self.nodes[value]
        exact = node.dtype == dtype and (dtype.itemsize >= 4 or not dtype.is_floating_point)
        if exact or (node.dtype == dtype and isinstance(node, (Load, Cast))):
            return value
        return self.add(Cast(value, dtype))

    def kernel(self) -> Kernel:
        return swept(Kernel(self.outer, self.row, tuple(self.nodes), tuple(self.stores)))


def renumber(node: Node, moved: list[int]) -> Node:
    """The node with its operands at their new positions (for nodes without index expressions)."""
    match node:
        case Call():
            return Call(node.op, tuple([moved[k] for k in node.args]), node.dtype)
        case Reduce():
            return Reduce(node.op, tuple([moved[k] for k in node.args]), node.dtype)
        case Cast():
            return Cast(moved[node.arg], node.dtype)
        case Item():
            return Item(moved[node.arg], node.item, node.dtype)
        case Random():
            return Random(node.kind, moved[node.seed], moved[node.offset], node.dtype)
        case Constant():
            return node
        case Load() | Index():
            raise TypeError(f"{node} has an index expression")


def needed(kernel: Kernel, roots: Iterable[int]) -> frozenset[int]:
    """Positions that these nodes depend on, themselves included."""
    found: set[int] = set()
    stack = list(roots)
    while stack:
        k = stack.pop()
        if k not in found:
            found.add(k)
            stack.extend(operands(kernel.nodes[k]))
    return frozenset(found)


def store_operands(store: Store) -> tuple[int, ...]:
    """Positions that a store uses: its value, its mask, indirect indices."""
    mask = () if store.mask is None else (store.mask,)
    return (store.value, *mask, *value_references(store.index))


def swept(kernel: Kernel) -> Kernel:
    """The kernel without nodes that no store needs."""
    live = needed(kernel, [k for s in kernel.stores for k in store_operands(s)])
    if len(live) == len(kernel.nodes):
        return kernel
    moved = [-1] * len(kernel.nodes)
    nodes: list[Node] = []
    for k, node in enumerate(kernel.nodes):
        if k in live:
            moved[k] = len(nodes)
            nodes.append(moved_node(node, moved))
    stores = tuple(
        replace(
            s,
            index=renamed_values(s.index, moved),
            value=moved[s.value],
            mask=None if s.mask is None else moved[s.mask],
        )
        for s in kernel.stores
    )
    return Kernel(kernel.outer, kernel.row, tuple(nodes), stores)


def moved_node(node: Node, moved: list[int]) -> Node:
    """The node with its operands, indirect indices and mask at their new positions."""
    if isinstance(node, Load):
        mask = None if node.mask is None else moved[node.mask]
        index = renamed_values(node.index, moved)
        return node if mask == node.mask and index is node.index else replace(node, index=index, mask=mask)
    if isinstance(node, Index):
        return replace(node, expr=renamed_values(node.expr, moved))
    return renumber(node, moved)


def renamed_values(expr: sympy.Expr, moved: list[int]) -> sympy.Expr:
    """The expression with its references to values at their new positions."""
    references = value_references(expr)
    if all(moved[k] == k for k in references):
        return expr
    return expr.xreplace({value_symbol(k): value_symbol(moved[k]) for k in references})
