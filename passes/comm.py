"""Communication memory: which all-reduce runs how, which buffers lie in symmetric memory, and where.

`Communication` runs when kernels and calls are what they will be. An all-reduce whose size, dtype and group allow it
becomes an operation on symmetric memory, which peers read and write directly: nothing is copied in or out, since the
operations that make its argument write into the arena, and those that use the result read from it. Two forms:

* in place (two-shot): the buffer itself lies in the arena, before and after;
* from the arena into another buffer (one-shot, and wherever the result may not stay in the arena since it outlives the
  call): what holds the argument is a buffer of its own, in the arena, up to the all-reduce.

What cannot (a call allocates the argument itself, it is the caller's, its size is known only at the call) is left to
the library, and the program's notes say why. `place_in_arenas` packs the buffers of each group into one arena.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..ir.communication import SYMMETRIC_DTYPES, GroupFacts, Memory
from ..ir.communication_options import CommunicationOptions
from ..ir.config import Config
from ..ir.in_flight import Collective, Wait
from ..ir.loops import Kernel, Load
from ..ir.plan import Lifetime, Pool
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
from .pack import PackProblem, pack_buffers
from .pack_search import PackSearch
from .schedule import Storage, rounded

_ALL_REDUCE = "_c10d_functional.all_reduce_.default"
_IN_PLACE = "symm_mem.two_shot_all_reduce_.default"
_INTO = {"one_shot": "symm_mem.one_shot_all_reduce_out.default", "two_shot": "symm_mem.two_shot_all_reduce_out.default"}
#: ranks for which torch has built the two-shot form that writes elsewhere
_TWO_SHOT_OUT_SIZES = (2, 4, 8)
#: Offsets in an arena, and what the end of a message is rounded to, in bytes.
ALIGNMENT = 256
#: Messages have to be a whole number of these bytes.
_GRANULE = 4


@dataclass(frozen=True, slots=True)
class Communication:
    """The pass. Without facts of a group, its collectives are left as they are."""

    name: ClassVar[str] = "comm"
    requires: ClassVar[tuple[str, ...]] = ()
    groups: Mapping[str, GroupFacts] = field(default_factory=dict)
    options: CommunicationOptions = field(default_factory=CommunicationOptions)
    #: why nothing may be on symmetric memory, "" where it may
    refused: str = ""

    @classmethod
    def configured(cls, config: Config) -> Communication:
        return cls({}, config.communication)

    def run(self, program: Program) -> Program:
        rewriting = _Rewriting(program)
        for position, op in enumerate(program.operations):
            if isinstance(op, Collective):
                reason = self.rewrite(rewriting, op, position)
                if reason:
                    rewriting.notes.append((op.name, f"{op.target} runs on unregistered memory: {reason}"))
        return rewriting.result()

    def rewrite(self, rewriting: _Rewriting, op: Collective, position: int) -> str:
        """Put an operation on symmetric memory in place of the collective, or say why not."""
        if op.target != _ALL_REDUCE:
            return "only all-reduce has a form on symmetric memory here"
        if self.refused:
            return self.refused
        if self.options.all_reduce == "library":
            return "the options ask for the library"
        facts = self.groups.get(op.group)
        if facts is None or facts.obstacle:
            return "nothing is known of its group" if facts is None else facts.obstacle
        view, reduction = op.args[0], op.args[1]
        assert isinstance(view, View)
        if reduction != Literal("sum"):
            return f"only sums can, not {reduction.value if isinstance(reduction, Literal) else reduction!r}"
        if str(view.dtype) not in SYMMETRIC_DTYPES:
            return f"only float32 and bfloat16 can, not {view.dtype}"
        nbytes = rewriting.whole_bytes(view)
        if nbytes is None:
            return "its size is known only at the call, or it is a part of a buffer"
        if nbytes == 0 or nbytes % _GRANULE:
            return f"{nbytes} bytes are no multiple of {_GRANULE}"
        algorithm = self.algorithm(facts, nbytes)
        if algorithm == "library":
            return f"the library is taken for {nbytes} bytes on {facts.size} ranks"
        reason = rewriting.fixed(view.buffer, position)
        if reason:
            return reason
        if algorithm == "two_shot" and rewriting.may_stay(view.buffer):
            rewriting.in_place(op, view, position)
        elif algorithm == "two_shot" and facts.size not in _TWO_SHOT_OUT_SIZES:
            return f"its result is returned, and two-shot does not write elsewhere on {facts.size} ranks"
        else:
            rewriting.from_arena(op, view, position, _INTO[algorithm])
        return ""

    def algorithm(self, facts: GroupFacts, nbytes: int) -> str:
        if self.options.all_reduce != "auto":
            return self.options.all_reduce
        one = self.options.one_shot_bytes
        two = self.options.two_shot_bytes
        if nbytes <= (facts.thresholds.one_shot_bytes if one is None else one):
            return "one_shot"
        return "two_shot" if nbytes <= (facts.thresholds.two_shot_bytes if two is None else two) else "library"


class _Rewriting:
    """A program being changed; ``operations`` holds None where one has gone."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.buffers = dict(program.buffers)
        self.operations: list[Operation | None] = list(program.operations)
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
        operations = tuple(op for op in self.operations if op is not None)
        return replace(program, buffers=self.buffers).with_operations(operations)

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

    def before(self, buffer: str, position: int) -> list[int]:
        return [p for p in self.uses[buffer] if p < position and self.operations[p] is not None]

    def fixed(self, buffer: str, position: int) -> str:
        """Why what makes the argument cannot write into an arena."""
        b = self.buffers[buffer]
        if b.kind in EXTERNAL_KINDS:
            return f"{buffer!r} is the caller's"
        if b.memory is not Memory.PLAIN:
            return f"{buffer!r} is in the {b.memory.value} memory of group {b.group!r} already"
        for p in self.before(buffer, position):
            op = self.operations[p]
            fresh = isinstance(op, Extern) and op.contract in (Contract.FRESH, Contract.DYNAMIC)
            if fresh and op is not None and buffer in op.writes:
                return f"{getattr(op, 'target', op.name)} ({op.name!r}) allocates its argument itself"
            if isinstance(op, (Collective, Wait)):
                return f"{op.name!r} uses its argument as well"
        return ""

    def may_stay(self, buffer: str) -> bool:
        """Whether the result may lie in the arena: it dies inside the program, and no other collective is given it."""
        b = self.buffers[buffer]
        leaves = b.kind is not BufferKind.TEMPORARY or buffer in self.program.output_buffers
        given = [op for p in self.uses[buffer] if isinstance(op := self.operations[p], Collective)]
        return not leaves and len(given) == 1

    def in_place(self, op: Collective, view: View, position: int) -> None:
        self.buffers[view.buffer] = replace(self.buffers[view.buffer], memory=Memory.SYMMETRIC, group=op.group)
        args = (view, Literal("sum"), Literal(op.group))
        self.operations[position] = Extern(
            op.name, _IN_PLACE, args, (), (view,), Contract.MUTATE, op.device, op.origins, (view.buffer,), effect=True
        )
        self.land(view.buffer, position)

    def from_arena(self, op: Collective, view: View, position: int, target: str) -> None:
        """Up to the all-reduce the buffer is another one, in the arena."""
        old = self.buffers[view.buffer]
        there = replace(
            old, name=f"{old.name}_comm", kind=BufferKind.COMM, memory=Memory.SYMMETRIC, group=op.group,
            alignment=max(old.alignment, ALIGNMENT),
        )  # fmt: skip
        self.buffers[there.name] = there
        self.buffers[old.name] = replace(old, zero_fill=False)
        for p in self.before(old.name, position):
            found = self.operations[p]
            assert found is not None
            self.operations[p] = renamed(found, old.name, there.name)
        args = (replace(view, buffer=there.name), Literal("sum"), Literal(op.group))
        self.operations[position] = Extern(
            op.name, target, args, (), (view,), Contract.OUT, op.device, op.origins, effect=True,
            mutates=(there.name,) if target == _INTO["two_shot"] else (),
        )  # fmt: skip
        self.land(old.name, position)

    def land(self, buffer: str, position: int) -> None:
        """The operation runs on the current stream: there is nothing to wait for."""
        for p in (p for p in self.uses[buffer] if p > position):
            if isinstance(self.operations[p], Wait):
                self.operations[p] = None
                break
        self.changes += 1


def renamed(op: Operation, old: str, new: str) -> Operation:
    """The operation with another name for one buffer, of the same size and layout."""
    mutates = tuple(new if b == old else b for b in op.mutates)

    def view(v: View) -> View:
        return replace(v, buffer=new) if v.buffer == old else v

    def argument(a: Argument) -> Argument:
        if isinstance(a, View):
            return view(a)
        return Tuple(tuple(argument(i) for i in a.items)) if isinstance(a, Tuple) else a

    match op:
        case KernelOp():
            nodes = tuple(
                replace(n, buffer=new) if isinstance(n, Load) and n.buffer == old else n for n in op.kernel.nodes
            )
            stores = tuple(replace(s, buffer=new) if s.buffer == old else s for s in op.kernel.stores)
            return replace(op, kernel=Kernel(op.kernel.outer, op.kernel.row, nodes, stores), mutates=mutates)
        case Copy():
            return replace(op, source=view(op.source), target=view(op.target), mutates=mutates)
        case Extern():
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


def place_in_arenas(
    program: Program, steps: int, stores: Sequence[Storage], native: PackSearch | None
) -> tuple[tuple[Pool, ...], dict[str, tuple[str, int]]]:
    """One arena for each device and group, and for each storage in one: (arena, offset in bytes).

    Lifetimes in it are those of the plan: every operation on symmetric memory ends with a barrier of all ranks, so
    what is dead here is not read there.
    """
    wanted: dict[tuple[str, str], list[Storage]] = {}
    for s in stores:
        b = program.buffers[s.root]
        if b.memory is Memory.SYMMETRIC:
            wanted.setdefault((b.device, b.group), []).append(s)
    pools: list[Pool] = []
    offsets: dict[str, tuple[str, int]] = {}
    for number, ((device, group), inside) in enumerate(sorted(wanted.items())):
        problem = PackProblem(
            tuple(s.lifetime.start for s in inside),
            tuple(s.lifetime.stop for s in inside),
            tuple(-(-s.nbytes // ALIGNMENT) * ALIGNMENT for s in inside),
            ALIGNMENT,
        )
        packing = pack_buffers(problem, native=native)
        name = f"arena{number}"
        nbytes = rounded(packing.arena, device)
        pools.append(Pool(name, nbytes, device, Lifetime(0, steps + 1), Memory.SYMMETRIC, group))
        offsets.update((s.root, (name, at)) for s, at in zip(inside, packing.offsets, strict=True))
    return tuple(pools), offsets
