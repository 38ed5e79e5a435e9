"""Random programs of kernels and extern calls over small tensors, for checking passes against the program runner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import sympy
import torch
from hypothesis import strategies as st

from memplan.ir.index import flat_index
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
    StoreMode,
    outer_symbol,
    row_symbol,
    value_symbol,
)
from memplan.ir.program import (
    Buffer,
    BufferKind,
    Contract,
    Extern,
    KernelOp,
    Operation,
    Phase,
    Program,
    TensorInput,
    View,
)

F32 = torch.float32
SIZES = (2, 3, 4)
UNARY = ("neg", "exp", "tanh", "abs", "square")
BINARY = ("add", "sub", "mul", "maximum")


def dense(name: str, sizes: tuple[int, ...], dtype: torch.dtype = F32) -> View:
    strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    return View(name, dtype, sizes, tuple(strides))


@dataclass
class Generator:
    """Draws operations one at a time; ``values`` are what later operations may read."""

    draw: st.DrawFn
    buffers: dict[str, Buffer] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    inputs: list[TensorInput] = field(default_factory=list)
    values: list[View] = field(default_factory=list)
    mutated: set[str] = field(default_factory=set)

    def pick(self, choices: object) -> object:
        return self.draw(st.sampled_from(choices))

    def new(self, sizes: tuple[int, ...], kind: BufferKind = BufferKind.TEMPORARY, dtype: torch.dtype = F32) -> View:
        name = f"b{len(self.buffers)}"
        nbytes = math.prod(sizes) * dtype.itemsize
        self.buffers[name] = Buffer(name, nbytes, dtype, "cpu", kind)
        return dense(name, sizes, dtype)

    def input(self) -> None:
        view = self.new(tuple(self.pick(SIZES) for _ in range(self.draw(st.integers(1, 3)))), BufferKind.INPUT)
        self.inputs.append(TensorInput(len(self.inputs), view))
        self.values.append(view)

    def emit(self, kernel: Kernel, mutates: tuple[str, ...] = ()) -> None:
        self.operations.append(KernelOp(f"k{len(self.operations)}", kernel, "cpu", mutates=mutates))

    # --- reading -----------------------------------------------------------------------------------------------

    def seen(self, view: View) -> View:
        """The view as it is, transposed, sliced, or flattened."""
        how = self.pick(("plain", "plain", "plain", "transpose", "slice", "flat"))
        if how == "transpose":
            order = self.draw(st.permutations(range(len(view.sizes))))
            return View(
                view.buffer,
                view.dtype,
                tuple(view.sizes[k] for k in order),
                tuple(view.strides[k] for k in order),
                view.offset,
            )
        if how == "slice" and view.sizes[0] > 1:
            return View(view.buffer, view.dtype, (view.sizes[0] - 1, *view.sizes[1:]), view.strides, view.strides[0])
        if how == "flat" and view == dense(view.buffer, view.sizes, view.dtype):
            return dense(view.buffer, (math.prod(view.sizes),), view.dtype)
        return view

    def value(self) -> View:
        return self.seen(self.pick([v for v in self.values if v.sizes]))

    def partner(self, sizes: tuple[int, ...]) -> tuple[View, tuple[int, ...]] | None:
        """A value that broadcasts against ``sizes``, and where its dimensions go."""
        found = []
        for v in self.values:
            if v.sizes == sizes:
                found.append((v, tuple(range(len(sizes)))))
            for k in range(len(sizes)):
                if v.sizes == (sizes[k],):
                    found.append((v, (k,)))
                if v.sizes == sizes[:k] + sizes[k + 1 :]:
                    found.append((v, tuple(i for i in range(len(sizes)) if i != k)))
        return self.pick(found) if found else None

    # --- operations --------------------------------------------------------------------------------------------

    def pointwise(self) -> None:
        a = self.value()
        symbols = [outer_symbol(k) for k in range(len(a.sizes))]
        ranges = tuple(Range(s, n) for s, n in zip(symbols, a.sizes, strict=True))
        nodes: list[Node] = [Load(a.buffer, flat_index(symbols, a.strides, a.offset), a.dtype)]
        nodes.append(Call(self.pick(UNARY), (0,), a.dtype))
        other = self.partner(a.sizes)
        if other is not None:
            view, where = other
            index = flat_index([symbols[k] for k in where], view.strides, view.offset)
            nodes.append(Load(view.buffer, index, view.dtype))
            nodes.append(Call(self.pick(BINARY), (1, 2), a.dtype))
        if self.draw(st.booleans()):
            nodes += [Constant(0.5, F32), Call("mul", (len(nodes) - 1, len(nodes)), F32)]
        dtype = self.pick((F32, F32, F32, torch.bfloat16))
        if dtype is not F32 and self.draw(st.booleans()):  # else the store rounds
            nodes.append(Cast(len(nodes) - 1, dtype))
        out = self.new(a.sizes, dtype=dtype)
        self.emit(
            Kernel(
                ranges, (), tuple(nodes), (Store(out.buffer, flat_index(symbols, out.strides), len(nodes) - 1, dtype),)
            )
        )
        if dtype is F32:
            self.values.append(out)
        else:
            self.widen(out)

    def widen(self, view: View) -> None:
        """Back to float32, by a kernel of its own."""
        symbols = [outer_symbol(k) for k in range(len(view.sizes))]
        ranges = tuple(Range(s, n) for s, n in zip(symbols, view.sizes, strict=True))
        out, index = self.new(view.sizes), flat_index(symbols, view.strides)
        nodes = (Load(view.buffer, index, view.dtype), Cast(0, F32))
        self.emit(Kernel(ranges, (), nodes, (Store(out.buffer, index, 1, F32),)))
        self.values.append(out)

    def reduction(self) -> None:
        a = self.value()
        axis = self.draw(st.integers(0, len(a.sizes) - 1))
        row = row_symbol(0)
        outer = [k for k in range(len(a.sizes)) if k != axis]
        symbols: list[sympy.Symbol] = [row] * len(a.sizes)
        for position, k in enumerate(outer):
            symbols[k] = outer_symbol(position)
        ranges = tuple(Range(symbols[k], a.sizes[k]) for k in outer)
        op = self.pick(("sum", "max", "welford"))
        nodes: list[Node] = [Load(a.buffer, flat_index(symbols, a.strides, a.offset), F32), Reduce(op, (0,), F32)]
        if op == "welford":
            nodes.append(Item(1, 1, F32))
        out = self.new(tuple(a.sizes[k] for k in outer))
        index = flat_index([symbols[k] for k in outer], out.strides)
        store = Store(out.buffer, index, len(nodes) - 1, F32)
        self.emit(Kernel(ranges, (Range(row, a.sizes[axis]),), tuple(nodes), (store,)))
        self.values.append(out)

    def concatenate(self) -> None:
        a = self.value()
        fits = [v for v in self.values if v.sizes[1:] == a.sizes[1:] and len(v.sizes) == len(a.sizes)]
        if not fits:
            return
        b = self.pick(fits)
        out = self.new((a.sizes[0] + b.sizes[0], *a.sizes[1:]))
        offset = 0
        for part in (a, b):
            symbols = [outer_symbol(k) for k in range(len(part.sizes))]
            ranges = tuple(Range(s, n) for s, n in zip(symbols, part.sizes, strict=True))
            load = Load(part.buffer, flat_index(symbols, part.strides, part.offset), F32)
            store = Store(out.buffer, flat_index(symbols, out.strides, offset), 0, F32)
            self.emit(Kernel(ranges, (), (load,), (store,)))
            offset += part.sizes[0] * out.strides[0]
        self.values.append(out)

    def shifted(self) -> None:
        """``out[i] = a[i - 1]`` with a zero in front: a masked load."""
        a = self.value()
        n = a.sizes[0]
        symbols = [outer_symbol(k) for k in range(len(a.sizes))]
        ranges = tuple(Range(s, k) for s, k in zip(symbols, a.sizes, strict=True))
        nodes: tuple[Node, ...] = (
            Index(symbols[0]),
            Constant(0, torch.int64),
            Call("gt", (0, 1), torch.bool),
            Load(a.buffer, flat_index([symbols[0] - 1, *symbols[1:]], a.strides, a.offset), F32, 2, 0.0),
        )
        if n > 1:
            out = self.new(a.sizes)
            self.emit(Kernel(ranges, (), nodes, (Store(out.buffer, flat_index(symbols, out.strides), 3, F32),)))
            self.values.append(out)

    def gathered(self) -> None:
        """``out[i, ...] = a[|i - n + 1|, ...]`` through a computed index, and sums scattered with atomics."""
        a = self.value()
        n = a.sizes[0]
        symbols = [outer_symbol(k) for k in range(len(a.sizes))]
        ranges = tuple(Range(s, k) for s, k in zip(symbols, a.sizes, strict=True))
        nodes: list[Node] = [Index(n - 1 - symbols[0]), Call("abs", (0,), torch.int64)]
        index = flat_index([value_symbol(1), *symbols[1:]], a.strides, a.offset)
        nodes.append(Load(a.buffer, index, F32))
        out = self.new(a.sizes)
        self.emit(Kernel(ranges, (), tuple(nodes), (Store(out.buffer, flat_index(symbols, out.strides), 2, F32),)))
        self.values.append(out)

    def mutation(self) -> None:
        """Add a value, or scatter it with atomics, into an input or a temporary that holds something."""
        targets = [v for v in self.values if v.sizes and v == dense(v.buffer, v.sizes)]
        target = self.pick(targets)
        fits = [v for v in self.values if v.sizes == target.sizes and v.buffer != target.buffer]
        if not fits:
            return
        a = self.pick(fits)
        symbols = [outer_symbol(k) for k in range(len(a.sizes))]
        ranges = tuple(Range(s, k) for s, k in zip(symbols, a.sizes, strict=True))
        here = flat_index(symbols, target.strides)
        load = Load(a.buffer, flat_index(symbols, a.strides, a.offset), F32)
        if self.draw(st.booleans()):
            nodes: tuple[Node, ...] = (load, Load(target.buffer, here, F32), Call("add", (0, 1), F32))
            kernel = Kernel(ranges, (), nodes, (Store(target.buffer, here, 2, F32),))
        else:
            zeroed = flat_index([sympy.Integer(0), *symbols[1:]], target.strides)
            kernel = Kernel(ranges, (), (load,), (Store(target.buffer, zeroed, 0, F32, StoreMode.ADD),))
        self.emit(kernel, (target.buffer,))
        self.mutated.add(target.buffer)

    def extern(self) -> None:
        a = self.value()
        out = self.new(a.sizes)
        name = f"e{len(self.operations)}"
        self.operations.append(Extern(name, "aten.relu.default", (a,), (), (out,), Contract.FRESH, "cpu"))
        self.values.append(out)

    def program(self) -> Program:
        read = {b for op in self.operations for b in op.reads}
        last = [v for v in self.values if v.buffer not in read]
        kept = [v for v in self.values if self.draw(st.integers(0, 4)) == 0]
        outputs = tuple(dict.fromkeys((*last, *kept)))
        buffers = dict(self.buffers)
        for v in outputs:
            b = buffers[v.buffer]
            if b.kind is BufferKind.TEMPORARY:
                buffers[v.buffer] = Buffer(b.name, b.nbytes, b.dtype, b.device, BufferKind.OUTPUT)
        return Program("generated", Phase.INFERENCE, buffers, tuple(self.operations), tuple(self.inputs), outputs)


@st.composite
def programs(draw: st.DrawFn, *, most: int = 14) -> Program:
    """A program of up to ``most`` operations over one to three inputs."""
    g = Generator(draw)
    for _ in range(draw(st.integers(1, 3))):
        g.input()
    kinds = (
        *(g.pointwise,) * 6,
        *(g.reduction,) * 4,
        *(g.concatenate, g.shifted, g.gathered, g.mutation, g.extern),
    )
    for _ in range(draw(st.integers(2, most))):
        draw(st.sampled_from(kinds))()
    return g.program()
