"""Small programs and plans by hand, for the tests of verifiers and passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch

from memplan.ir.index import flat_index
from memplan.ir.loops import (
    Call,
    Cast,
    Constant,
    Kernel,
    Load,
    Node,
    Range,
    Reduce,
    Size,
    Store,
    outer_symbol,
    row_symbol,
)
from memplan.ir.plan import Certificate, External, InPlaceOf, InPool, Lifetime, Own, Placement, Plan, Pool
from memplan.ir.program import (
    EXTERNAL_KINDS,
    Argument,
    Buffer,
    BufferKind,
    Contract,
    Copy,
    Extern,
    KernelOp,
    Literal,
    Operation,
    Origin,
    Phase,
    Program,
    ProgramInput,
    ProgramOutput,
    Symbolic,
    SymbolInput,
    TensorInput,
    Tuple,
    View,
    evaluate,
)

F32 = torch.float32


def contiguous(sizes: Sequence[Size]) -> tuple[Size, ...]:
    strides: list[Size] = []
    step: Size = 1
    for n in reversed(sizes):
        strides.append(step)
        step = step * n
    return tuple(reversed(strides))


def argument(value: object) -> Argument:
    """A Python value as an extern's argument."""
    if isinstance(value, (View, Literal, Symbolic, Tuple)):
        return value
    if isinstance(value, (list, tuple)):
        return Tuple(tuple(argument(v) for v in value))
    if isinstance(value, sympy.Expr):
        return Symbolic(value)
    return Literal(value)  # type: ignore[arg-type]


@dataclass
class ProgramBuilder:
    """Collects operations; every one has a made-up user line ``model.py:<number>``."""

    name: str = "test"
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    inputs: list[ProgramInput] = field(default_factory=list)

    def origin(self, name: str) -> Origin:
        return Origin(node=name, file="model.py", line=len(self.operations) + 1)

    def buffer(
        self,
        name: str,
        sizes: Sequence[Size],
        kind: BufferKind = BufferKind.TEMPORARY,
        dtype: torch.dtype = F32,
        **fields: object,
    ) -> View:
        """A contiguous buffer; the view of all of it."""
        count: Size = 1
        for n in sizes:
            count = count * n
        self.buffers[name] = Buffer(name, count * dtype.itemsize, dtype, "cpu", kind, **fields)  # type: ignore[arg-type]
        return View(name, dtype, tuple(sizes), contiguous(sizes))

    def input(
        self,
        name: str,
        sizes: Sequence[Size],
        *,
        dtype: torch.dtype = F32,
        kind: BufferKind = BufferKind.INPUT,
        donated: bool = False,
    ) -> View:
        view = self.buffer(name, sizes, kind, dtype, donated=donated)
        self.inputs.append(TensorInput(len(self.inputs), view))
        return view

    def symbol(self, name: str, hint: int) -> sympy.Symbol:
        symbol = sympy.Symbol(name, integer=True, positive=True)
        self.hints[symbol] = hint
        self.inputs.append(SymbolInput(len(self.inputs), symbol))
        return symbol

    def extern(
        self,
        name: str,
        target: str,
        args: Sequence[object],
        sizes: Sequence[Size] | None = None,
        *,
        contract: Contract = Contract.FRESH,
        kwargs: Mapping[str, object] | None = None,
        mutates: tuple[str, ...] = (),
        result: View | None = None,
        dtype: torch.dtype = F32,
        effect: bool = False,
        scratch: Size = 0,
    ) -> View:
        if result is None and sizes is not None:
            result = self.buffer(name, sizes, dtype=dtype)
        arguments = tuple(argument(a) for a in args)
        keywords = tuple((k, argument(v)) for k, v in (kwargs or {}).items())
        self.operations.append(
            Extern(
                name,
                target,
                arguments,
                keywords,
                () if result is None else (result,),
                contract,
                "cpu",
                (self.origin(name),),
                mutates,
                scratch,
                effect=effect,
            )
        )
        return result if result is not None else View(mutates[0], dtype, (), ())

    def copy(self, name: str, source: View, target: View, *, fresh: bool = False) -> View:
        mutates = () if fresh else (target.buffer,)
        self.operations.append(Copy(name, source, target, "cpu", (self.origin(name),), mutates))
        return target

    def kernel(self, name: str, kernel: Kernel, mutates: tuple[str, ...] = ()) -> None:
        self.operations.append(KernelOp(name, kernel, "cpu", (self.origin(name),), mutates))

    def pointwise(
        self,
        name: str,
        op: str,
        *inputs: View,
        dtype: torch.dtype = F32,
        into: View | None = None,
        mutates: bool = False,
    ) -> View:
        """A kernel that applies ``op`` to equally shaped views."""
        out = into or self.buffer(name, inputs[0].sizes, dtype=dtype)
        self.kernel(name, pointwise_kernel(op, inputs, out), (out.buffer,) if mutates else ())
        return out

    def softmax(self, name: str, x: View) -> View:
        out = self.buffer(name, x.sizes)
        self.kernel(name, softmax_kernel(x, out))
        return out

    def program(self, *outputs: ProgramOutput, phase: Phase = Phase.INFERENCE) -> Program:
        for o in outputs:
            if isinstance(o, View) and self.buffers[o.buffer].kind is BufferKind.TEMPORARY:
                self.buffers[o.buffer] = replace(self.buffers[o.buffer], kind=BufferKind.OUTPUT)
        return Program(
            self.name, phase, dict(self.buffers), tuple(self.operations), tuple(self.inputs), outputs, dict(self.hints)
        )


def pointwise_kernel(op: str, inputs: Sequence[View], out: View) -> Kernel:
    ranges = tuple(Range(outer_symbol(k), n) for k, n in enumerate(out.sizes))
    point = [r.symbol for r in ranges]
    nodes: list[Node] = [Load(v.buffer, flat_index(point, v.strides, v.offset), v.dtype) for v in inputs]
    nodes.append(Call(op, tuple(range(len(inputs))), inputs[0].dtype))
    if out.dtype is not inputs[0].dtype:
        nodes.append(Cast(len(nodes) - 1, out.dtype))
    store = Store(out.buffer, flat_index(point, out.strides, out.offset), len(nodes) - 1, out.dtype)
    return Kernel(ranges, (), tuple(nodes), (store,))


def softmax_kernel(x: View, out: View) -> Kernel:
    """Over the last dimension: a maximum, a sum, a point value of both."""
    outer = tuple(Range(outer_symbol(k), n) for k, n in enumerate(x.sizes[:-1]))
    row = Range(row_symbol(0), x.sizes[-1])
    point = [r.symbol for r in outer] + [row.symbol]
    nodes: tuple[Node, ...] = (
        Load(x.buffer, flat_index(point, x.strides, x.offset), F32),
        Reduce("max", (0,), F32),
        Call("sub", (0, 1), F32),
        Call("exp", (2,), F32),
        Reduce("sum", (3,), F32),
        Call("div", (3, 4), F32),
    )
    return Kernel(outer, (row,), nodes, (Store(out.buffer, flat_index(point, out.strides, out.offset), 5, F32),))


def fill_kernel(out: View, value: float) -> Kernel:
    ranges = tuple(Range(outer_symbol(k), n) for k, n in enumerate(out.sizes))
    index = flat_index([r.symbol for r in ranges], out.strides, out.offset)
    return Kernel(ranges, (), (Constant(value, out.dtype),), (Store(out.buffer, index, 0, out.dtype),))


def plan_of(
    program: Program,
    *,
    order: Sequence[str] | None = None,
    in_place: Mapping[str, str] | None = None,
    pooled: bool = True,
) -> Plan:
    """A correct, wasteful plan: every temporary at an offset of its own in one pool, outputs by themselves."""
    order = tuple(order or [op.name for op in program.operations])
    in_place = in_place or {}
    steps = len(order)
    position = {n: k for k, n in enumerate(order)}
    lifetimes: dict[str, Lifetime] = {}
    for b in program.buffers.values():
        uses = [position[o.name] for o in program.operations if b.name in (*o.reads, *o.writes, *o.mutates)]
        external = b.kind in EXTERNAL_KINDS
        start = 0 if external else min(uses, default=0)
        stop = max(uses, default=start) + 1
        if external and not b.donated:
            stop = max(steps, 1)
        elif b.name in program.output_buffers or b.kind in (BufferKind.OUTPUT, BufferKind.SAVED):
            stop = steps + 1
        lifetimes[b.name] = Lifetime(start, stop)
    own = {
        n
        for o in program.operations
        if isinstance(o, Extern) and o.contract in (Contract.FRESH, Contract.DYNAMIC)
        for n in o.writes
    }
    placements: dict[str, Placement] = {}
    top: Size = 0
    for b in program.buffers.values():
        if b.kind in EXTERNAL_KINDS:
            placements[b.name] = External()
        elif b.name in in_place:
            placements[b.name] = InPlaceOf(in_place[b.name])
        elif b.name in own or lifetimes[b.name].stop > steps or not pooled:
            placements[b.name] = Own()
        else:
            placements[b.name] = InPool("pool", top)
            top = top + rounded(b.nbytes, b.alignment)
    pools = (Pool("pool", top, "cpu", Lifetime(0, max(steps, 1))),) if top != 0 else ()
    return with_claims(Plan(program, order, lifetimes, placements, pools, (), Certificate(0, 0, 0, 0, 0)))


def with_claims(plan: Plan) -> Plan:
    """The plan with a true timeline and certificate, counted buffer by buffer and step by step."""
    program = plan.program
    live, held = [], []
    roots = {n: plan.storage_of(n) for n in plan.placements}
    for step in range(max(1, len(plan.order))):
        op = program.by_name[plan.order[step]] if plan.order else None
        counts = [op.scratch if isinstance(op, Extern) else 0] * 2
        for root in set(roots.values()):
            b = program.buffers[root]
            lives = [plan.lifetimes[n] for n in roots if roots[n] == root]
            if b.kind in EXTERNAL_KINDS and not b.donated:
                continue
            if min(x.start for x in lives) <= step < max(x.stop for x in lives):
                size = math.ceil(program.nbytes(root) / 64) * 64
                counts[0] += size
                counts[1] += 0 if isinstance(plan.placements[root], InPool) else size
        for p in plan.pools:
            if p.lifetime.start <= step < p.lifetime.stop:
                counts[1] += math.ceil(evaluate(p.nbytes, program.hints) / 64) * 64
        live.append(evaluate(counts[0], program.hints))
        held.append(evaluate(counts[1], program.hints))
    certificate = Certificate(max(live), max(live), 0, max(held), 0)
    return replace(plan, timeline=tuple(held), certificate=certificate, predicted_peak={"cpu": max(held)})


def rounded(size: Size, alignment: int) -> Size:
    """The next multiple of ``alignment``; for symbolic sizes ``size * alignment``, which is one."""
    if isinstance(size, int):
        return math.ceil(size / alignment) * alignment
    return size * alignment
