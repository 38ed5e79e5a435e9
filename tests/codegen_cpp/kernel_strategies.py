"""Random kernels: pointwise and row kernels of several dtypes, layouts, reductions and indirect loads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
import torch
from hypothesis import strategies as st

from memplan.ir.index import FloorDiv, Mod
from memplan.ir.loops import (
    Call,
    Cast,
    Constant,
    Index,
    Item,
    Kernel,
    Load,
    Node,
    Range,
    Reduce,
    Store,
    outer_symbol,
    row_symbol,
    value_symbol,
)

FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOADED = (*FLOATS, torch.int32, torch.int64, torch.bool, torch.uint8, torch.int8)
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNARY = ["neg", "abs", "exp", "tanh", "sigmoid", "relu", "square", "sqrt", "erf"]
BINARY = ["add", "sub", "mul", "maximum", "minimum"]


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel and fresh buffers for it (``seed`` decides their contents)."""

    kernel: Kernel
    sizes: tuple[tuple[str, torch.dtype, int], ...]
    seed: int

    def buffers(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: _filled(dtype, size, generator) for name, dtype, size in self.sizes}


def _filled(dtype: torch.dtype, size: int, generator: torch.Generator) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.randint(0, 2, (size,), generator=generator).to(dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 5, (size,), generator=generator).to(dtype)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * 1.5).to(dtype)


class _Builder:
    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.nodes: list[Node] = []
        self.stores: list[Store] = []
        self.sizes: list[tuple[str, torch.dtype, int]] = []
        count = draw(st.integers(0, 3))
        length = st.sampled_from([1, 2, 3, 4, 7, 8, 16, 33, 40])
        self.outer = tuple(Range(outer_symbol(k), draw(length)) for k in range(count))
        rows = draw(st.integers(0 if count else 1, 2))
        row_length = st.sampled_from([1, 2, 3, 5, 8, 16, 31, 64, 100])
        self.row = tuple(Range(row_symbol(k), draw(row_length)) for k in range(rows))

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def buffer(self, dtype: torch.dtype, size: int) -> str:
        name = f"buf{len(self.sizes)}"
        self.sizes.append((name, dtype, size))
        return name

    def layout(self, ranges: list[Range]) -> tuple[sympy.Expr, int]:
        """A dense index over the ranges in some order, and its extent."""
        order = self.draw(st.permutations(ranges)) if len(ranges) > 1 else ranges
        index, extent = sympy.Integer(0), 1
        for r in order:
            index += extent * r.symbol
            extent *= int(r.size)
        return index, extent

    def load(self, ranges: tuple[Range, ...]) -> int:
        chosen = [r for r in ranges if self.draw(st.integers(0, 3))]
        index, extent = self.layout(chosen)
        kind = self.draw(st.integers(0, 9))
        divisor = self.draw(st.sampled_from([2, 3, 8, 16]))
        if kind == 0:
            index = FloorDiv(index, divisor)
        elif kind == 1:
            index = Mod(index, divisor)
        elif kind == 2:
            index = extent - 1 - index
        elif kind == 3:
            at = self.add(Load(self.buffer(torch.int64, extent), index, torch.int64))
            index, extent = value_symbol(at) * 3 + 1, 16
        dtype = self.draw(st.sampled_from(LOADED))
        mask = None
        if kind == 4 and ranges:
            position = self.add(Index(self.draw(st.sampled_from(ranges)).symbol))
            limit = self.add(Constant(self.draw(st.integers(0, 9)), torch.int64))
            mask = self.add(Call("lt", (position, limit), torch.bool))
        found = self.add(Load(self.buffer(dtype, extent), index, dtype, mask))
        held = torch.float32 if dtype.itemsize < 4 or not dtype.is_floating_point else dtype
        return found if dtype == held else self.add(Cast(found, held))

    def same(self, a: int, b: int) -> tuple[int, int, torch.dtype]:
        dtypes = {self.nodes[a].dtype, self.nodes[b].dtype}
        if len(dtypes) == 1:
            return a, b, dtypes.pop()
        return self.add(Cast(a, torch.float64)), self.add(Cast(b, torch.float64)), torch.float64

    def combine(self, values: list[int]) -> int:
        """Some function of the values."""
        result = values[0]
        for v in values[1:]:
            a, b, dtype = self.same(result, v)
            result = self.add(Call(self.draw(st.sampled_from(BINARY)), (a, b), dtype))
        for _ in range(self.draw(st.integers(0, 2))):
            op = self.draw(st.sampled_from(UNARY))
            if op in ("sqrt", "exp"):
                result = self.add(Call("sigmoid", (result,), self.nodes[result].dtype))
            result = self.add(Call(op, (result,), self.nodes[result].dtype))
        if self.draw(st.integers(0, 3)) == 0:
            zero = self.add(Constant(0.25, self.nodes[result].dtype))
            above = self.add(Call("gt", (result, zero), torch.bool))
            result = self.add(Call("where", (above, result, zero), self.nodes[result].dtype))
        if self.draw(st.integers(0, 5)) == 0:
            result = self.add(Cast(self.add(Cast(result, torch.bfloat16)), torch.float32))
        return result

    def reduce(self, value: int) -> int:
        op = self.draw(st.sampled_from(["sum", "max", "min", "welford", "argmax", "argmin", "any", "prod"]))
        if op in ("argmax", "argmin", "any"):
            # jumps where values are rounded differently: only of values that are exact on both sides
            value = self.load((*self.outer, *self.row))
        dtype = self.nodes[value].dtype
        if op == "welford":
            both = self.add(Reduce(op, (value,), dtype))
            return self.add(Item(both, self.draw(st.integers(0, 1)), dtype))
        if op in ("argmax", "argmin"):
            position, _ = sympy.Integer(0), 1
            for r in self.row:
                position = position * r.size + r.symbol
            at = self.add(Index(position))
            return self.add(Cast(self.add(Reduce(op, (value, at), torch.int64)), torch.float32))
        if op == "any":
            zero = self.add(Constant(1.0, dtype))
            above = self.add(Call("gt", (value, zero), torch.bool))
            return self.add(Cast(self.add(Reduce(op, (above,), torch.bool)), torch.float32))
        if op == "prod":
            value = self.add(Call("sigmoid", (value,), dtype))
        return self.add(Reduce(op, (value,), dtype))

    def store(self, value: int, ranges: tuple[Range, ...]) -> None:
        index, extent = self.layout(list(ranges))
        dtype = self.draw(st.sampled_from(STORED))
        self.stores.append(Store(self.buffer(dtype, extent), index, value, dtype))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A kernel with up to two dependent reductions."""
    b = _Builder(draw)
    everything = (*b.outer, *b.row)
    value = b.combine([b.load(everything) for _ in range(draw(st.integers(1, 3)))])
    if b.row:
        for _ in range(draw(st.integers(1, 2))):
            reduced = b.reduce(value)
            if draw(st.booleans()):
                b.store(reduced, b.outer)
            value = b.combine([value, reduced])
        if draw(st.booleans()):
            b.store(b.combine([reduced, b.load(b.outer)]), b.outer)
    if draw(st.integers(0, 3)) or not b.stores:
        b.store(value, everything)
    kernel = Kernel(b.outer, b.row, tuple(b.nodes), tuple(b.stores))
    assert math.prod(int(r.size) for r in everything) > 0
    return Case(kernel, tuple(b.sizes), draw(st.integers(0, 1000)))
