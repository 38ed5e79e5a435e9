"""What a kernel's integer arguments may hold while it is timed: values whose every use as an index is in range.

An index is in range if it is a checked one, and what leads to it from a loaded value is simple enough to be worked out:
casts, constants, comparisons, sums (a position that counts from the end). Of such a kernel the loads' largest values
are known. Any other kernel that computes where it reads or writes is not timed at all: on made-up numbers it might
touch memory that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy

from ..ir.loops import CHECKED_INDEX, Call, Cast, Constant, Index, Kernel, Load, Node, operands, value_references
from ..ir.program import evaluate

_INTEGERS: Mapping[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "where": lambda c, a, b: a if c else b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "logical_and": lambda a, b: bool(a and b),
    "logical_or": lambda a, b: bool(a or b),
    "logical_not": lambda a: not a,
    "maximum": max,
    "minimum": min,
}


def index_limits(kernel: Kernel, hints: Mapping[sympy.Symbol, int]) -> dict[str, int] | None:
    """For each buffer whose values decide an index, the number that they must stay below (from 0 up).

    None where that cannot be known.
    """
    nodes = kernel.nodes
    checks = {k: n for k, n in enumerate(nodes) if isinstance(n, Call) and n.op == CHECKED_INDEX}
    found: dict[str, int] = {}
    for node in checks.values():
        position, size = node.args
        limit = _constant(nodes[size], hints)
        loads = _loads(kernel, position)
        if limit is None or limit < 1 or len(loads) > 1:
            return None
        for value in (0, 1, limit // 2, limit - 1):
            at = _value(kernel, position, value % limit, hints)
            if at is None or not 0 <= at < limit:
                return None
        for k in loads:
            load = nodes[k]
            assert isinstance(load, Load)
            found[load.buffer] = min(found.get(load.buffer, limit), limit)
    known = set(checks) | {n.args[0] for n in checks.values()}
    used = [e.index for e in kernel.loads] + [e.index for e in kernel.stores]
    used += [n.expr for n in nodes if isinstance(n, Index)]
    for reference in {r for expr in used for r in value_references(expr)}:
        if reference not in known and _loads(kernel, reference):
            return None
    return found


def _loads(kernel: Kernel, root: int) -> frozenset[int]:
    """The loads whose values a node is computed from, not those that only say where to load."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        k = pending.pop()
        if k in seen:
            continue
        seen.add(k)
        if not isinstance(kernel.nodes[k], Load):
            pending.extend(operands(kernel.nodes[k]))
    return frozenset(k for k in seen if isinstance(kernel.nodes[k], Load))


def _constant(node: Node, hints: Mapping[sympy.Symbol, int]) -> int | None:
    if isinstance(node, Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, Index) and not value_references(node.expr):
        try:
            return evaluate(node.expr, hints)
        except KeyError:  # it depends on where in the loops it is
            return None
    return None


def _value(kernel: Kernel, k: int, loaded: int, hints: Mapping[sympy.Symbol, int]) -> int | None:
    """The value of a node where every load gives ``loaded``; None where these few functions do not say."""
    node = kernel.nodes[k]
    match node:
        case Load():
            return loaded
        case Constant() | Index():
            return _constant(node, hints)
        case Cast(arg, dtype) if not dtype.is_floating_point:
            return _value(kernel, arg, loaded, hints)
        case Call(op, args) if op in _INTEGERS:
            given = [_value(kernel, a, loaded, hints) for a in args]
            return None if None in given else int(_INTEGERS[op](*given))
    return None
