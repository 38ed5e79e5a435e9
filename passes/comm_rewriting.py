"""What `passes.comm` does to a program: operations on symmetric memory in place of collectives, buffers in arenas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.communication import Memory
from ..ir.in_flight import Collective, Wait
from ..ir.program import (
    EXTERNAL_KINDS,
    Argument,
    BufferKind,
    Contract,
    Copy,
    Extern,
    KernelOp,
    Literal,
    Operation,
    Program,
    Tuple,
    UserKernel,
    View,
)
from ..ir.template import Product, Template
from .fuse_kernels import renamed_buffers

#: Offsets in an arena, and what the end of a message is rounded to, in bytes.
ALIGNMENT = 256


class Rewriting:
    """A program being changed; ``operations`` holds at each position what is there instead of the one before."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.buffers = dict(program.buffers)
        self.operations: list[tuple[Operation, ...]] = [(op,) for op in program.operations]
        self.notes: list[tuple[str, str]] = []
        self.changes = 0
        self.uses: dict[str, list[int]] = {}
        for position, op in enumerate(program.operations):
            for name in dict.fromkeys((*op.reads, *op.writes, *op.mutates)):
                self.uses.setdefault(name, []).append(position)

    def result(self) -> Program:
        program = self.program
        if self.notes:
            program = replace(program, notes=(*program.notes, *self.notes))
        if not self.changes:
            return program
        operations = tuple(op for ops in self.operations for op in ops)
        return replace(program, buffers=self.buffers).with_operations(operations)

    # -- what may be done ---------------------------------------------------------------------------------------------

    def whole_bytes(self, view: View) -> int | None:
        """The bytes of a view that shows all of its buffer, in order; None for any other."""
        b = self.buffers[view.buffer]
        step = 1
        for size, stride in zip(reversed(view.sizes), reversed(view.strides), strict=True):
            if not isinstance(size, int) or (size != 1 and stride != step):
                return None
            step *= size
        same = view.offset == 0 and b.nbytes == step * view.dtype.itemsize and b.dtype is view.dtype
        return step * view.dtype.itemsize if same else None

    def fixed(self, buffer: str, position: int, group: str) -> str:
        """Why what makes the argument cannot write into the arena of the group."""
        b = self.buffers[buffer]
        if b.kind in EXTERNAL_KINDS:
            return f"{buffer!r} is the caller's"
        if b.memory is not Memory.PLAIN and (b.memory is not Memory.SYMMETRIC or b.group != group):
            return f"{buffer!r} is in the {b.memory.value} memory of group {b.group!r} already"
        for op in (op for p in self.uses[buffer] if p < position for op in self.operations[p]):
            fresh = isinstance(op, Extern) and op.contract in (Contract.FRESH, Contract.DYNAMIC)
            if fresh and buffer in op.writes:
                return f"{getattr(op, 'target', op.name)} ({op.name!r}) allocates its argument itself"
            if isinstance(op, (Collective, Wait)):
                return f"{op.name!r} uses its argument as well"
        return ""

    def may_stay(self, buffer: str) -> bool:
        """Whether the buffer may lie in the arena for good: it dies in the program, and one collective is given it."""
        given = [op for p in self.uses[buffer] for op in self.operations[p] if isinstance(op, Collective)]
        return not self.leaves(buffer) and len(given) == 1

    def leaves(self, buffer: str) -> bool:
        """Whether the buffer is somebody else's before the program or after it."""
        return self.buffers[buffer].kind is not BufferKind.TEMPORARY or buffer in self.program.output_buffers

    # -- doing it -----------------------------------------------------------------------------------------------------

    def replaced(self, position: int, operations: Sequence[Operation]) -> None:
        """Put these in the place of the collective. They run on the current stream: nothing is waited for."""
        old = self.program.operations[position]
        self.operations[position] = tuple(operations)
        for result in dict.fromkeys((*old.writes, *old.mutates)):
            self.land(result, position)
        self.changes += 1

    def land(self, buffer: str, position: int) -> None:
        """Drop the first wait for the buffer after the position."""
        for p in (p for p in self.uses[buffer] if p > position):
            if any(isinstance(op, Wait) and op.mutates == (buffer,) for op in self.operations[p]):
                self.operations[p] = ()
                return

    def hold(self, buffer: str, group: str, memory: Memory = Memory.SYMMETRIC) -> None:
        """The buffer lies in an arena of the group."""
        b = self.buffers[buffer]
        alignment = max(b.alignment, ALIGNMENT)
        self.buffers[buffer] = replace(b, memory=memory, group=group, alignment=alignment)

    def in_place(self, op: Collective, target: str, view: View, options: Sequence[Literal]) -> Extern:
        """The operation that changes the buffer where it lies, in the arena."""
        self.hold(view.buffer, op.group)
        args: tuple[Argument, ...] = (view, *options)
        return Extern(
            op.name, target, args, (), (view,), Contract.MUTATE, op.device, op.origins, (view.buffer,), effect=True
        )

    def out_of_arena(self, op: Collective, target: str, view: View, result: View, options: Sequence[Literal]) -> Extern:
        """The operation that leaves its argument, in the arena, as it is, and writes another buffer."""
        self.hold(view.buffer, op.group)
        args: tuple[Argument, ...] = (flat(view), *options)
        return Extern(op.name, target, args, (), (flat(result),), Contract.OUT, op.device, op.origins, effect=True)

    def into_arena(self, op: Collective, target: str, view: View, result: View, options: Sequence[Literal]) -> Extern:
        """The operation that writes its result there on all ranks, from a buffer that lies anywhere."""
        self.hold(result.buffer, op.group)
        args: tuple[Argument, ...] = (flat(view), *options)
        return Extern(op.name, target, args, (), (flat(result),), Contract.OUT, op.device, op.origins, effect=True)

    def from_arena(
        self, op: Collective, position: int, target: str, view: View, options: Sequence[Literal], *, spoils: bool
    ) -> Extern:
        """Up to the collective the buffer is another one, in the arena; ``spoils``: which is changed then."""
        old = self.buffers[view.buffer]
        there = replace(old, name=f"{old.name}_comm", kind=BufferKind.COMM)
        self.buffers[there.name] = there
        self.hold(there.name, op.group)
        self.buffers[old.name] = replace(old, zero_fill=False)
        for p in (p for p in self.uses[old.name] if p < position):
            self.operations[p] = tuple(renamed(found, old.name, there.name) for found in self.operations[p])
        args: tuple[Argument, ...] = (replace(view, buffer=there.name), *options)
        return Extern(
            op.name, target, args, (), (view,), Contract.OUT, op.device, op.origins, effect=True,
            mutates=(there.name,) if spoils else (),
        )  # fmt: skip


def flat(view: View) -> View:
    """All elements of a dense view in one dimension."""
    return replace(view, sizes=(view.numel,), strides=(1,))


#: coalesced calls, and those of one tensor each that do the same
_SINGLE = {
    "_c10d_functional.all_reduce_coalesced_.default": "_c10d_functional.all_reduce_.default",
    "_c10d_functional.all_gather_into_tensor_coalesced.default": "_c10d_functional.all_gather_into_tensor.default",
    "_c10d_functional.reduce_scatter_tensor_coalesced.default": "_c10d_functional.reduce_scatter_tensor.default",
}


def singles(op: Collective) -> tuple[Collective, ...]:
    """A coalesced call as calls of one tensor each; any other call as it is."""
    target, given = _SINGLE.get(op.target), op.args[0]
    if target is None or not isinstance(given, Tuple):
        return (op,)
    found = []
    for k, (view, result) in enumerate(zip(given.items, op.results, strict=True)):
        assert isinstance(view, View)
        mutates = (view.buffer,) if op.mutates else ()
        args = (view, *op.args[1:])
        found.append(replace(op, name=f"{op.name}_{k}", target=target, args=args, results=(result,), mutates=mutates))
    return tuple(found)


def renamed(op: Operation, old: str, new: str) -> Operation:
    """The operation with another name for one buffer, of the same size and layout."""
    mutates = tuple(new if b == old else b for b in op.mutates)

    def view(v: View) -> View:
        return replace(v, buffer=new) if v.buffer == old else v

    def argument(a: Argument) -> Argument:
        if isinstance(a, View):
            return view(a)
        return Tuple(tuple(argument(i) for i in a.items)) if isinstance(a, Tuple) else a

    def product(p: Product) -> Product:
        bias = None if p.bias is None else view(p.bias)
        return replace(p, a=view(p.a), b=view(p.b), bias=bias, epilogue=renamed_buffers(p.epilogue, {old: new}))

    match op:
        case KernelOp():
            return replace(op, kernel=renamed_buffers(op.kernel, {old: new}), mutates=mutates)
        case Copy():
            return replace(op, source=view(op.source), target=view(op.target), mutates=mutates)
        case Extern():
            if isinstance(op, Template) and op.product is not None:
                op = replace(op, product=product(op.product))
            return replace(
                op,
                args=tuple(argument(a) for a in op.args),
                kwargs=tuple((k, argument(a)) for k, a in op.kwargs),
                results=tuple(None if v is None else view(v) for v in op.results),
                mutates=mutates,
            )
        case UserKernel():
            given = tuple((name, view(a) if isinstance(a, View) else a) for name, a in op.arguments)
            return replace(op, arguments=given, mutates=mutates)
