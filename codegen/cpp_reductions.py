"""Reductions rewritten as simpler ones over a row that stays in cache: vector code for what is slow lane by lane.

* Welford's update divides at every point; two passes (the mean, then the squared deviations from it) do not, and
  are at least as accurate.
* An argmax carries a value and a 64-bit position; the maximum and then the least position that holds it do not.
* Truth values that are carried keep g++ from vectorising their loop, and those that read what came out of it, too:
  whether all hold is the least of them as integers.
"""

from __future__ import annotations

import math

import torch

from memplan.ir.loops import Call, Cast, Constant, Index, Item, Kernel, Node, Random, Reduce, operands

from .cpp_loops import renumber, renumber_store
from .point_costs import EXPENSIVE

#: functions whose float versions the prelude computes itself
_OWN = frozenset(["exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "erfc", "mod", "floordiv"])
_INT32_MAX = 2**31 - 1
_REWRITTEN = frozenset(["argmax", "argmin", "welford", "all", "any"])


def in_two_passes(kernel: Kernel, *, welford: bool) -> Kernel:
    """``argmax`` and ``argmin`` in two passes, and (``welford``, rows of static length only) Welford reductions too;
    ``all`` and ``any`` as integers."""
    if not any(isinstance(n, Reduce) and n.op in _REWRITTEN for n in kernel.nodes):
        return kernel
    return _Rewriting(kernel, welford).run()


def _same_bits(node: Call) -> bool:
    return node.op not in EXPENSIVE or (node.op in _OWN and node.dtype is not torch.float64)


class _Rewriting:
    def __init__(self, kernel: Kernel, welford: bool) -> None:
        self.kernel = kernel
        self.nodes: list[Node] = []
        self.moved: dict[int, int] = {}
        self.items: dict[tuple[int, int], int] = {}
        sizes = [r.size for r in kernel.row]
        self.length = math.prod(int(n) for n in sizes) if all(isinstance(n, int) for n in sizes) else None
        self.welford = welford and bool(self.length)

    def run(self) -> Kernel:
        for k, node in enumerate(self.kernel.nodes):
            if isinstance(node, Item) and (node.arg, node.item) in self.items:
                self.moved[k] = self.items[node.arg, node.item]
                continue
            node = renumber(node, self.moved)
            if isinstance(node, Reduce) and node.op in ("argmax", "argmin") and self.repeatable(node.args[0]):
                self.moved[k] = self.argument(node)
            elif isinstance(node, Reduce) and node.op in ("all", "any"):
                self.moved[k] = self.truth(node)
            elif isinstance(node, Reduce) and node.op == "welford" and self.welford:
                self.moved[k] = self.moments(k, node)
            else:
                self.moved[k] = self.add(node)
        stores = tuple(renumber_store(s, self.moved) for s in self.kernel.stores)
        return Kernel(self.kernel.outer, self.kernel.row, tuple(self.nodes), stores)

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def repeatable(self, k: int) -> bool:
        """Whether computing node ``k`` again gives the same bits: libm's vector and scalar functions differ."""
        stack = [k]
        while stack:
            node = self.nodes[stack.pop()]
            if isinstance(node, Random) or (isinstance(node, Call) and not _same_bits(node)):
                return False
            if not isinstance(node, Reduce):
                stack.extend(operands(node))
        return True

    def truth(self, node: Reduce) -> int:
        (x,) = node.args
        x = x if self.nodes[x].dtype is torch.bool else self.add(Cast(x, torch.bool))
        if node.op == "any":  # not all of them are false: right for an empty row, too
            x = self.add(Call("logical_not", (x,), torch.bool))
        least = self.add(Reduce("min", (self.add(Cast(x, torch.int32)),), torch.int32))
        found = self.add(Cast(least, torch.bool))
        return self.add(Call("logical_not", (found,), torch.bool)) if node.op == "any" else found

    def moments(self, k: int, node: Reduce) -> int:
        (x,), dtype = node.args, node.dtype
        assert self.length is not None
        if self.nodes[x].dtype is not dtype:
            x = self.add(Cast(x, dtype))
        weight = self.add(Constant(self.length, dtype))
        total = self.add(Reduce("sum", (x,), dtype))
        mean = self.add(Call("div", (total, weight), dtype))
        deviation = self.add(Call("sub", (x, mean), dtype))
        m2 = self.add(Reduce("sum", (self.add(Call("mul", (deviation, deviation), dtype)),), dtype))
        self.items |= {(k, 0): mean, (k, 1): m2, (k, 2): weight}
        return mean

    def argument(self, node: Reduce) -> int:
        value, at = node.args
        held = self.nodes[value].dtype
        best = self.add(Reduce("max" if node.op == "argmax" else "min", (value,), held))
        found = self.add(Call("eq", (value, best), torch.bool))
        if held.is_floating_point:
            # where there is a NaN, it is the maximum, which equals nothing
            found = self.add(Call("logical_or", (found, self.add(Call("isnan", (value,), torch.bool))), torch.bool))
        position = self.nodes[at]
        narrow = (
            isinstance(position, Index)
            and self.length is not None
            and self.length <= _INT32_MAX
            and position.expr.free_symbols <= {r.symbol for r in self.kernel.row}
        )
        dtype = torch.int32 if narrow else torch.int64
        at = self.add(Cast(at, dtype)) if narrow else at
        none = self.add(Constant(torch.iinfo(dtype).max, dtype))
        candidate = self.add(Call("where", (found, at, none), dtype))
        least = self.add(Reduce("min", (candidate,), dtype))
        return least if node.dtype is dtype else self.add(Cast(least, node.dtype))
