"""Concatenation without copies: what is copied into a part of a result is written there in the first place.

After lowering, a concatenation (a stack, a slice assignment into something fresh) is one copy per part. Where a part
is a temporary that is copied whole, its producer can write into the slice, and its other readers can read from there:
the part is no buffer any more, and the copy is gone. The result then exists from the first part on, which may be much
earlier than the copy; so it is done only where the simulated timeline of live bytes does not rise above the program's
peak, part after part, the largest first.

Library calls are asked more of: they may write into a slice only if they are known to take strides there, and what
they read must be laid out as before, or in a way that they are known to take.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.config import Config
from ..ir.index import expand
from ..ir.program import (
    EXTERNAL_KINDS,
    BufferKind,
    Contract,
    Extern,
    Operation,
    Program,
    View,
    argument_views,
    evaluate,
)
from .relocation import CopyForm, Relocation, copy_form, relocation_of_source, touched_buffers
from .schedule import rounded

#: Calls into BLAS: matrices with one stride of 1 and the other at least the extent go in and out as they lie.
_MATRIX = frozenset({"mm", "addmm", "bmm", "baddbmm"})


@dataclass(frozen=True, slots=True)
class Concat:
    """The pass. It has no options."""

    name: ClassVar[str] = "concat"
    requires: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def configured(cls, config: Config) -> Concat:
        return cls()

    def run(self, program: Program) -> Program:
        work = _Work(program)
        work.run()
        if not work.changes:
            return program if not work.notes else replace(program, notes=(*program.notes, *work.notes))
        return work.result()


class _Work:
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

    def run(self) -> None:
        copies = [
            (position, copy)
            for position, op in enumerate(self.program.operations)
            if (copy := copy_form(op, self.dtypes)) is not None and self.is_part(copy)
        ]
        copies.sort(key=lambda item: (-self.program.nbytes(item[1].source), item[0]))
        for position, _ in copies:
            op = self.operations[position]
            copy = None if op is None else copy_form(op, self.dtypes)  # its source may have moved since
            if copy is None or not self.is_part(copy):
                continue
            reason = self.move(copy, position)
            if reason:
                self.notes.append((copy.source, f"copied into {copy.target!r}: {reason}"))

    def result(self) -> Program:
        operations = tuple(op for op in self.operations if op is not None)
        program = replace(self.program, notes=(*self.program.notes, *self.notes))
        return program.with_operations(operations)

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

    def is_part(self, copy: CopyForm) -> bool:
        """A temporary copied into a slice of (or all of) something that the program makes."""
        source, target = self.buffers[copy.source], self.buffers[copy.target]
        return (
            source.kind is BufferKind.TEMPORARY
            and target.kind not in EXTERNAL_KINDS
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

    def move(self, copy: CopyForm, position: int) -> str:
        """Do without the copy, or say why not."""
        source = self.buffers[copy.source]
        if expand(copy.count * source.dtype.itemsize - source.nbytes) != 0:
            return f"only a part of {copy.source!r} is copied"
        uses = self.uses(copy.source)
        changed = [p for p in uses if copy.source in self.at(p).mutates]
        if changed:
            return f"{_named(self.at(changed[0]))} changes it"
        if copy.target in self.at(position).mutates:
            return f"{copy.target!r} holds another value before"
        last = max(uses)
        for p in self.uses(copy.target):
            if copy.target in self.at(p).mutates and p <= last:
                return f"{_named(self.at(p))} changes {copy.target!r} while it is still read"
        relocation = relocation_of_source(copy)
        moved: dict[int, Operation] = {}
        for p in uses:
            if p == position:
                continue
            op = relocation.operation(self.at(p))
            if op is None:
                return f"{_named(self.at(p))} uses it in a layout that the slice does not have"
            refusal = _refusal(self.at(p), op, relocation)
            if refusal:
                return refusal
            moved[p] = op
        if not any(copy.source in self.at(p).writes for p in moved):
            return "nothing in the program writes it"
        return self.apply(copy, position, moved)

    def apply(self, copy: CopyForm, position: int, moved: dict[int, Operation]) -> str:
        """Make the change if the timeline allows it."""
        old, new = copy.source, copy.target
        live = self.live.copy()
        first, stop = self.span(new)
        start, end = self.span(old)
        for step in range(min(start, first), min(first, len(live))):
            live[step] += self.size(new)
        for step in range(stop, min(end, len(live))):
            live[step] += self.size(new)  # a reader of the part that outlives the result
        for step in range(start, min(end, len(live))):
            live[step] -= self.size(old)
        touched = range(min(start, first), min(max(end, stop), len(live)))
        if max((live[s] for s in touched), default=0) > self.peak:
            step = max(touched, key=lambda s: live[s])
            return (
                f"{new!r} would exist from {_named(self.at(min(moved)))} on, and at step {step} "
                f"{live[step]} bytes would be live; the peak is {self.peak}"
            )
        self.live = live
        for p, op in moved.items():
            self.operations[p] = op
        self.operations[position] = None
        places = self.touching[new]
        for p in moved:
            if p not in places:
                bisect.insort(places, p)
        del self.touching[old]
        self.changes += 1
        return ""


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
            return f"{before.target} ({before.name!r}) is not known to take the slice's strides"
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
    sizes: Sequence[int] = view.sizes  # type: ignore[assignment]
    strides: Sequence[int] = view.strides  # type: ignore[assignment]
    return strides[-1] == 1 and strides[-2] >= max(1, sizes[-1]) and min(sizes) > 0


def _named(op: Operation) -> str:
    where = next((o.location for o in op.origins if o.location), "")
    return f"{op.name!r} ({where})" if where else repr(op.name)
