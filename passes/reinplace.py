"""Mutated-input clone elimination: what functionalisation made of mutation is undone wherever that is safe.

Functionalisation turns ``x.index_put_(...)`` into a clone of ``x``, a change of the clone, and, for an input, a copy
back at the end. First the clones that calls make inside themselves are brought to light (`expose_clones`); then each
clone that is changed later is not made, if nobody needs the value that it is a clone of:

* a temporary (or a donated input) that nothing reads afterwards;
* an input or a buffer of the model that is not read again before the clone is copied back to it.

"Nobody" includes the operation that changes the clone: in ``y = x.clone(); op(y, x)`` the clone stays, since ``op``
would read from ``x`` what it has just written there. For every clone that stays, the program's notes say why.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import ClassVar

import sympy

from ..ir.config import Config
from ..ir.index import expand, simplify, stride_of
from ..ir.program import EXTERNAL_KINDS, Buffer, BufferKind, Operation, Program, TensorInput, UserKernel, View
from .expose_clones import expose_clones
from .relocation import CopyForm, Relocation, copy_form, relocation_of_target, touched_buffers

_LEAVING = frozenset({BufferKind.OUTPUT, BufferKind.SAVED})


@dataclass(frozen=True, slots=True)
class Reinplace:
    """The pass. It has no options."""

    name: ClassVar[str] = "reinplace"
    requires: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def configured(cls, config: Config) -> Reinplace:
        return cls()

    def run(self, program: Program) -> Program:
        exposed = expose_clones(program)
        elimination = _Elimination(exposed)
        elimination.run()
        if not elimination.changes:
            # a clone brought to light and kept costs what it cost inside of its call; the call stays as it was
            return program if not elimination.notes else replace(program, notes=(*program.notes, *elimination.notes))
        return elimination.result()


class _Elimination:
    """Clones are taken in program order; ``operations`` holds None where one has gone."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.operations: list[Operation | None] = list(program.operations)
        self.buffers: dict[str, Buffer] = dict(program.buffers)
        self.outputs = list(program.outputs)
        self.dtypes: dict[str, object] = {b.name: b.dtype for b in program.buffers.values()}
        self.notes: list[tuple[str, str]] = []
        self.changes = 0
        self.elements = {i.view.buffer: i.view.numel for i in program.inputs if isinstance(i, TensorInput)}
        self.touching: dict[str, list[int]] = {}
        for position, op in enumerate(program.operations):
            for b in touched_buffers(op):
                self.touching.setdefault(b, []).append(position)

    def run(self) -> None:
        """Sweep until nothing changes: a clone of a clone is changed only once the second is not made."""
        before = -1
        while self.changes != before:
            before = self.changes
            self.notes.clear()
            self.sweep()

    def sweep(self) -> None:
        for position in range(len(self.operations)):
            op = self.operations[position]
            if op is None:
                continue
            clone = copy_form(op, self.dtypes)
            if clone is None or clone.target not in op.writes or not self.changed_later(clone.target, position):
                continue
            reason = self.eliminate(clone, position)
            if reason:
                self.notes.append((clone.target, f"the clone of {clone.source!r} stays: {reason}"))

    def result(self) -> Program:
        operations = tuple(op for op in self.operations if op is not None)
        program = replace(
            self.program,
            buffers=self.buffers,
            outputs=tuple(self.outputs),
            notes=(*self.program.notes, *self.notes),
        )
        return program.with_operations(operations)

    # -- whether ----------------------------------------------------------------------------------------------------

    def later(self, buffer: str, position: int) -> list[int]:
        """Positions after ``position`` of operations that name the buffer."""
        places = self.touching.get(buffer, [])
        return [p for p in places[bisect.bisect_right(places, position) :] if self.operations[p] is not None]

    def at(self, position: int) -> Operation:
        op = self.operations[position]
        assert op is not None
        return op

    def changed_later(self, buffer: str, position: int) -> bool:
        return any(buffer in self.at(p).mutates for p in self.later(buffer, position))

    def eliminate(self, clone: CopyForm, position: int) -> str:
        """Do without the clone, or say why not."""
        base, copy = self.buffers[clone.source], self.buffers[clone.target]
        reason = self.kinds_forbid(base, copy)
        if reason:
            return reason
        writers = [
            p for p in self.touching[copy.name] if copy.name in (op.writes if (op := self.operations[p]) else ())
        ]
        if writers != [position]:
            return f"{copy.name!r} is written by several operations"
        relocation = relocation_of_target(clone)
        back = self.next_use(clone, relocation, position)
        if isinstance(back, str):
            return back
        return self.apply(relocation, position, back)

    def kinds_forbid(self, base: Buffer, copy: Buffer) -> str:
        if base.kind is BufferKind.CONSTANT:
            return f"{base.name!r} is a constant"
        if copy.kind in _LEAVING and base.kind in EXTERNAL_KINDS:
            return f"{copy.name!r} is returned, and may not be the caller's {base.name!r}"
        if copy.kind in _LEAVING and self.returned(base):
            return f"{base.name!r} is returned as it was, and {copy.name!r} besides"
        if copy.zero_fill or copy.alignment > base.alignment:
            return f"{copy.name!r} needs a storage of its own (alignment {copy.alignment})"
        return ""

    def returned(self, base: Buffer) -> bool:
        """Whether it is made here and leaves the program."""
        return base.kind not in EXTERNAL_KINDS and any(
            isinstance(o, View) and o.buffer == base.name for o in self.outputs
        )

    def next_use(self, clone: CopyForm, relocation: Relocation, position: int) -> int | str | None:
        """Position of the copy back that goes with the clone, None where there is none, or why the clone must stay."""
        base, copy = self.buffers[clone.source], self.buffers[clone.target]
        uses = self.later(base.name, position)
        whole = self.covers(base, clone)
        if not uses:
            if self.returned(base):
                return f"{base.name!r} is returned as it was"
            if base.kind in EXTERNAL_KINDS and not base.donated:
                return f"the caller keeps {base.name!r}, which is not changed"
            return None if whole else f"it is a part of {base.name!r}, which would be kept for it"
        first = self.at(uses[0])
        back = copy_form(first, self.dtypes)
        if back is None or back.target != base.name:
            return f"{_named(first)} uses {base.name!r} as it was"
        if back.source != copy.name:
            # overwritten in full by something else: free until then
            if not whole or not self.covers(base, back):
                return f"{_named(first)} writes a part of {base.name!r}"
            if copy.kind in _LEAVING or any(p >= uses[0] for p in self.later(copy.name, position)):
                return f"{copy.name!r} is still used when {_named(first)} writes {base.name!r}"
            return None
        if not self.same_region(relocation, back, position):
            return f"{_named(first)} copies it back to another place"
        for p in self.later(copy.name, uses[0]):
            if copy.name in self.at(p).mutates:
                return f"{_named(self.at(p))} changes {copy.name!r} after it was copied back"
        for p in uses[1:]:
            changes = base.name in self.at(p).mutates
            if changes and (any(q >= p for q in self.later(copy.name, uses[0])) or copy.kind in _LEAVING):
                return f"{copy.name!r} is still used when {_named(self.at(p))} changes {base.name!r}"
        return uses[0]

    def covers(self, buffer: Buffer, copy: CopyForm) -> bool:
        """Whether the copy touches every element of the buffer (of an input: every element of the tensor)."""
        if expand(copy.count * buffer.dtype.itemsize - buffer.nbytes) == 0:
            return True
        elements = self.elements.get(buffer.name)
        return elements is not None and bool(expand(copy.count - elements) == 0)

    def same_region(self, relocation: Relocation, back: CopyForm, position: int) -> bool:
        """Whether the copy back writes each element to where it has been all the time, and all that were changed."""
        moved = relocation.index(back.read, back.space)
        if moved is None or simplify(expand(moved - back.write), back.space) != 0:
            return False
        count = expand(_count(relocation) - back.count)
        return bool(count == 0) or self.changed_within(back, position)

    def changed_within(self, back: CopyForm, position: int) -> bool:
        """Whether only users' kernels change the clone, and those just the elements that are copied back.

        A kernel is given a pointer, so its clone has what lies between the elements of a strided view as well.
        """
        dimensions = sorted((stride_of(back.read, s), n) for s, n in back.space if n != 1)
        start = back.read.xreplace({s: sympy.Integer(0) for s, _ in back.space})
        for p in self.later(back.source, position):
            op = self.at(p)
            if back.source not in op.mutates:
                continue
            if not isinstance(op, UserKernel):
                return False
            for view in op.views:
                if view.buffer != back.source:
                    continue
                own = sorted((sympy.sympify(t), n) for t, n in zip(view.strides, view.sizes, strict=True) if n != 1)
                if own != dimensions or expand(start - view.offset) != 0:
                    return False
        return True

    # -- doing it ---------------------------------------------------------------------------------------------------

    def apply(self, relocation: Relocation, position: int, back: int | None) -> str:
        """Move the clone's contents to where they came from; nothing is changed if one access cannot be moved."""
        old, new = relocation.source, relocation.target
        moved: dict[int, Operation] = {}
        for p in self.later(old, position):
            if p == back:
                continue
            op = relocation.operation(self.at(p))
            if op is None:
                return f"{_named(self.at(p))} uses it in a layout that {new!r} does not have"
            moved[p] = op
        outputs = []
        for o in self.outputs:
            view = relocation.view(o) if isinstance(o, View) and o.buffer == old else o
            if view is None:
                return f"it is returned in a layout that {new!r} does not have"
            outputs.append(view)
        self.outputs = outputs
        for p, op in moved.items():
            self.operations[p] = op
        self.operations[position] = None
        if back is not None:
            self.operations[back] = None
        if self.buffers[old].kind in _LEAVING:
            self.buffers[new] = replace(self.buffers[new], kind=self.buffers[old].kind)
        self.touching[new] = sorted({*self.touching[new], *moved})
        del self.touching[old]
        self.changes += 1
        return ""


def _count(relocation: Relocation) -> sympy.Expr:
    out: sympy.Expr = sympy.Integer(1)
    for _, n in relocation.space:
        out = out * n
    return out


def _named(op: Operation) -> str:
    where = next((o.location for o in op.origins if o.location), "")
    return f"{op.name!r} ({where})" if where else repr(op.name)
