"""Moves a temporary into the buffer that it is copied to: its producer writes there, its other readers read there.

What passes decide with it: which copy to do without. What it decides: whether that is right (nobody changes either
while the other is used, every access has the layout that its user takes) and what it costs (the larger buffer may
have to exist earlier or longer, which the simulated timeline of live bytes must allow).

Library calls are asked more of than kernels: they may write into a slice only if they are known to take strides there,
and what they read must be laid out as before, or in a way that they are known to take.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import replace

import sympy

from ..ir.index import expand
from ..ir.loops import Level, Size
from ..ir.program import (
    EXTERNAL_KINDS,
    BufferKind,
    Contract,
    Extern,
    KernelOp,
    Operation,
    Program,
    UserKernel,
    View,
    argument_views,
    evaluate,
)
from .kernel_access import spoiled_by_error
from .relocation import CopyForm, Relocation, relocation_of_source, touched_buffers
from .schedule import rounded

#: Calls into BLAS: matrices with one stride of 1 and the other at least the extent go in and out as they lie.
_MATRIX = frozenset({"mm", "addmm", "bmm", "baddbmm"})


class Mover:
    """One program being changed; `result` gives the new one."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.buffers = program.buffers
        self.operations: list[Operation | None] = list(program.operations)
        self.dtypes: dict[str, object] = {b.name: b.dtype for b in program.buffers.values()}
        self.leaving = program.output_buffers
        self.touching: dict[str, list[int]] = {}
        for position, op in enumerate(program.operations):
            for b in touched_buffers(op):
                self.touching.setdefault(b, []).append(position)
        self.live = self.simulate()
        self.peak = max(self.live, default=0)
        self.notes: list[tuple[str, str]] = []
        self.changes = 0

    def result(self) -> Program:
        """The program with what was moved; the very same where nothing was."""
        if not self.changes:
            return self.program if not self.notes else replace(self.program, notes=self.all_notes)
        operations = tuple(op for op in self.operations if op is not None)
        return replace(self.program, notes=self.all_notes).with_operations(operations)

    @property
    def all_notes(self) -> tuple[tuple[str, str], ...]:
        return (*self.program.notes, *self.notes)

    # -- time -------------------------------------------------------------------------------------------------------

    def span(self, buffer: str) -> tuple[int, int]:
        """First and one past the last step at which the buffer exists, in program order."""
        places = [p for p in self.touching[buffer] if self.operations[p] is not None]
        last = len(self.operations) + 1 if buffer in self.leaving else places[-1] + 1
        return places[0], last

    def size(self, buffer: str) -> int:
        return rounded(self.program.nbytes(buffer), self.buffers[buffer].device)

    def simulate(self) -> list[int]:
        """Live bytes at each step of what the program makes."""
        change = [0] * (len(self.operations) + 2)
        for name in self.touching:
            if self.buffers[name].kind not in EXTERNAL_KINDS:
                start, stop = self.span(name)
                change[start] += self.size(name)
                change[stop] -= self.size(name)
        live, out = 0, []
        for step, op in enumerate(self.operations):
            live += change[step]
            scratch = evaluate(op.scratch, self.program.hints) if isinstance(op, Extern) else 0
            out.append(live + scratch)
        return out

    # -- whether ----------------------------------------------------------------------------------------------------

    def may_move(self, copy: CopyForm) -> bool:
        """Whether the source is a temporary of its own, and the target something that may be written."""
        source, target = self.buffers[copy.source], self.buffers[copy.target]
        return (
            source.kind is BufferKind.TEMPORARY
            and target.kind is not BufferKind.CONSTANT
            and source.device == target.device
            and copy.source not in self.leaving
            and not source.zero_fill
            and not target.zero_fill
        )

    def at(self, position: int) -> Operation:
        op = self.operations[position]
        assert op is not None
        return op

    def uses(self, buffer: str) -> list[int]:
        return [p for p in self.touching[buffer] if self.operations[p] is not None]

    def move(self, copy: CopyForm, position: int, remainder: Operation | None = None) -> str:
        """Do without the copy at ``position``, or say why not.

        ``remainder`` is what stays of the operation there (a kernel with its other stores), None for nothing.
        """
        source = self.buffers[copy.source]
        uses = self.uses(copy.source)
        dense = expand(copy.count * source.dtype.itemsize - source.nbytes) == 0
        if not dense and not self.all_that_is_written(copy, uses):
            return f"only a part of {copy.source!r} is copied"
        reason = self.changes_between(copy, position, uses)
        if reason:
            return reason
        relocation = relocation_of_source(copy)
        moved: dict[int, Operation] = {}
        for p in uses:
            if p == position:
                continue
            op = relocation.operation(self.at(p))
            if op is None:
                return f"{_named(self.at(p))} uses it in a layout that {copy.target!r} does not have"
            refusal = _refusal(self.at(p), op, relocation) or self.spoils(op, copy.target)
            if refusal:
                return refusal
            if copy.source in self.at(p).writes and copy.target in self.at(position).mutates:
                op = replace(op, mutates=(*op.mutates, copy.target))
            moved[p] = op
        if remainder is not None:
            moved[position] = remainder
        elif not any(copy.source in self.at(p).writes for p in moved):
            return "nothing in the program writes it"
        return self.apply(copy, position, moved)

    def spoils(self, op: Operation, target: str) -> str:
        """Why an operation that may raise must not write there while it does not know yet that it will not."""
        if isinstance(op, KernelOp) and target in spoiled_by_error(op.kernel, op.device, self.buffers):
            return f"an index out of range in {_named(op)} would spoil {target!r}, which is the caller's"
        return ""

    def all_that_is_written(self, copy: CopyForm, uses: Sequence[int]) -> bool:
        """Whether one operation writes the source (with gaps in it), and no more elements than are copied."""
        writers = [op for p in uses if copy.source in (op := self.at(p)).writes]
        if len(writers) != 1:
            return False
        writer = writers[0]
        if isinstance(writer, KernelOp):
            stores = [s for s in writer.kernel.stores if s.buffer == copy.source]
            point = writer.kernel.store_level(stores[0]) is Level.POINT
            ranges = (*writer.kernel.outer, *(writer.kernel.row if point else ()))
            written = product(r.size for r in ranges)
            return len(stores) == 1 and stores[0].mask is None and bool(expand(written - copy.count) == 0)
        if isinstance(writer, UserKernel):
            return False
        views = (
            [v for v in _views(writer) if v.buffer == copy.source] if isinstance(writer, Extern) else [writer.target]
        )
        return len(views) == 1 and bool(expand(product(views[0].sizes) - copy.count) == 0)

    def changes_between(self, copy: CopyForm, position: int, uses: Sequence[int]) -> str:
        """Who changes one of the two while the other is used, or needs the target's old value."""
        for p in uses:
            if copy.source in self.at(p).mutates:
                return f"{_named(self.at(p))} changes it"
        overwrites = copy.target in self.at(position).mutates
        for p in self.uses(copy.target):
            if p == position or not uses[0] <= p <= uses[-1]:
                continue
            if copy.target in self.at(p).mutates:
                return f"{_named(self.at(p))} changes {copy.target!r} while it is still read"
            if overwrites and p < position:
                return f"{_named(self.at(p))} needs the old value of {copy.target!r}"
        return ""

    def apply(self, copy: CopyForm, position: int, moved: dict[int, Operation]) -> str:
        """Make the change if the timeline allows it."""
        old, new = copy.source, copy.target
        live = self.live.copy()
        start, end = self.span(old)
        steps = range(start, min(end, len(live)))
        if self.buffers[new].kind not in EXTERNAL_KINDS:
            first, stop = self.span(new)
            for step in (s for s in steps if not first <= s < stop):
                live[step] += self.size(new)
        for step in steps:
            live[step] -= self.size(old)
        if max((live[s] for s in steps), default=0) > self.peak:
            step = max(steps, key=lambda s: live[s])
            return (
                f"{new!r} would exist from {_named(self.at(start))} on, and at step {step} "
                f"{live[step]} bytes would be live; the peak is {self.peak}"
            )
        self.live = live
        self.operations[position] = None
        for p, op in moved.items():
            self.operations[p] = op
        places = self.touching[new]
        for p in moved:
            if p not in places:
                bisect.insort(places, p)
        del self.touching[old]
        self.changes += 1
        return ""


def product(sizes: Iterable[Size]) -> sympy.Expr:
    out: sympy.Expr = sympy.Integer(1)
    for n in sizes:
        out = out * n
    return expand(out)


def _refusal(before: Operation, after: Operation, relocation: Relocation) -> str:
    """Why a library call (or a copy) may not use the slice as it used the part."""
    if not isinstance(before, Extern) or not isinstance(after, Extern):
        return ""
    if relocation.source in before.writes and before.contract is not Contract.OUT:
        return f"{before.target} ({before.name!r}) allocates its own result"
    for old, new in zip(_views(before), _views(after), strict=True):
        if old.buffer != relocation.source or old.strides == new.strides:
            continue
        if not (_is_matrix_call(before) and _blas_takes(new)):
            return f"{before.target} ({before.name!r}) is not known to take the strides that it would have"
    return ""


def _views(op: Extern) -> list[View]:
    keywords: Iterable[View] = argument_views(tuple(a for _, a in op.kwargs))
    return [*argument_views(op.args), *keywords, *(v for v in op.results if v is not None)]


def _is_matrix_call(op: Extern) -> bool:
    namespace, _, rest = op.target.partition(".")
    return namespace == "aten" and rest.partition(".")[0] in _MATRIX


def _blas_takes(view: View) -> bool:
    """The last two strides are those of a matrix stored by rows, with room between rows."""
    if len(view.sizes) < 2 or not all(isinstance(n, int) for n in (*view.sizes, *view.strides)):
        return False
    sizes: Sequence[int] = view.sizes
    strides: Sequence[int] = view.strides
    return strides[-1] == 1 and strides[-2] >= max(1, sizes[-1]) and min(sizes) > 0


def _named(op: Operation) -> str:
    where = next((o.location for o in op.origins if o.location), "")
    return f"{op.name!r} ({where})" if where else repr(op.name)
