"""What a mask says about indices: where a load is masked, its index is only used where the mask is true.

A slice of a concatenation is read as ``a[x - 4] if x >= 4``. Taken over all ``x``, ``x - 4`` may be negative, and
solving for the producer's point leaves divisions that no range can remove. Under the mask ``x - 4`` is a coordinate
``t`` of ``0 <= t < size - 4``, and the same equation has a plain solution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from memplan.ir.index import Ranges, bounds, expand, is_nonnegative, stride_of
from memplan.ir.loops import Call, Constant, Index, Node

_FLIPPED = {"ge": "le", "le": "ge", "gt": "lt", "lt": "gt"}


@dataclass(frozen=True, slots=True)
class Assumption:
    """``forward`` writes a range symbol by new coordinates, ``back`` the coordinates by range symbols; ``ranges`` are
    the old ones with the coordinates'."""

    forward: Mapping[sympy.Symbol, sympy.Expr]
    back: Mapping[sympy.Symbol, sympy.Expr]
    ranges: Ranges


def assume(nodes: Sequence[Node], mask: int, ranges: Ranges) -> Assumption | None:
    """Coordinates that the mask (a conjunction of comparisons of index expressions) bounds; None if it has none."""
    forward: dict[sympy.Symbol, sympy.Expr] = {}
    back: dict[sympy.Symbol, sympy.Expr] = {}
    added: list[tuple[sympy.Symbol, int | sympy.Expr]] = []
    symbols = {s for s, _ in ranges}
    for expr, (low, high) in _intervals(nodes, mask, ranges).items():
        size = expand(high - low + 1)
        pivot = next((s for s in _sorted(expr) if s in symbols and s not in forward and stride_of(expr, s) == 1), None)
        if pivot is None:
            continue
        rest = expand(expr - pivot)
        if pivot in rest.free_symbols or rest.free_symbols & set(forward):
            continue
        if not is_nonnegative(expand(size - 1)):
            continue  # the mask may be false everywhere
        coordinate = sympy.Symbol(f"masked_{pivot.name}", integer=True, nonnegative=True)
        forward[pivot] = expand(coordinate + low - rest)
        back[coordinate] = expand(expr - low)
        added.append((coordinate, int(size) if size.is_Integer else size))
    return Assumption(forward, back, (*ranges, *added)) if forward else None


def _sorted(expr: sympy.Expr) -> list[sympy.Symbol]:
    return sorted(expr.free_symbols, key=lambda s: s.name)


def _intervals(nodes: Sequence[Node], mask: int, ranges: Ranges) -> dict[sympy.Expr, tuple[sympy.Expr, sympy.Expr]]:
    """Inclusive intervals of index expressions where the mask is true."""
    found: dict[sympy.Expr, tuple[sympy.Expr, sympy.Expr]] = {}
    stack = [mask]
    while stack:
        node = nodes[stack.pop()]
        if not isinstance(node, Call):
            continue
        if node.op == "logical_and":
            stack.extend(reversed(node.args))
        elif node.op in _FLIPPED:
            _narrow(found, node.op, _index(nodes[node.args[0]]), _index(nodes[node.args[1]]), ranges)
    return found


def _index(node: Node) -> sympy.Expr | None:
    if isinstance(node, Index):
        return expand(node.expr)
    if isinstance(node, Constant) and isinstance(node.value, int) and not node.dtype.is_floating_point:
        return sympy.Integer(node.value)
    return None


def _narrow(
    found: dict[sympy.Expr, tuple[sympy.Expr, sympy.Expr]],
    op: str,
    left: sympy.Expr | None,
    right: sympy.Expr | None,
    ranges: Ranges,
) -> None:
    """Take a comparison of an expression of the ranges with a bound that has none of them."""
    if left is None or right is None:
        return
    symbols = {s for s, _ in ranges}
    if right.free_symbols & symbols:
        left, right, op = right, left, _FLIPPED[op]
    if right.free_symbols & symbols or not left.free_symbols & symbols:
        return
    known = found.get(left) or bounds(left, ranges)
    if known is None:
        return
    low, high = known
    match op:
        case "ge" | "gt":
            bound = right if op == "ge" else right + 1
            low = bound if is_nonnegative(expand(bound - low)) else low
        case _:
            bound = right if op == "le" else right - 1
            high = bound if is_nonnegative(expand(high - bound)) else high
    found[left] = (low, high)
