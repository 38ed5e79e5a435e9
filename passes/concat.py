"""Concatenation without copies, and results written where they belong.

Two passes over copies that are left after lowering and after fusion:

* `Concat`, before fusion: a concatenation (a stack, a slice assignment into something fresh) is one copy per part.
  Where a part is a temporary that is copied whole, its producer writes into the slice, and its other readers read from
  there. The same for what a library call makes and is then copied back into an input: it is written there at once.
  The largest part goes first.
* `SingleStore`, after fusion: a kernel that stores one value twice, to a temporary and to where that was copied,
  stores it once, and the temporary's readers read the other.

Both only where the simulated timeline does not rise above the program's peak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.config import Config
from ..ir.index import Ranges, ranges_of
from ..ir.loops import Kernel, Level, Store, StoreMode, value_references
from ..ir.program import EXTERNAL_KINDS, Extern, KernelOp, Operation, Program
from .moving import Mover
from .relocation import CopyForm, copy_form


@dataclass(frozen=True, slots=True)
class Concat:
    """The pass before fusion. It has no options."""

    name: ClassVar[str] = "concat"
    requires: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def configured(cls, config: Config) -> Concat:
        return cls()

    def run(self, program: Program) -> Program:
        mover = Mover(program)
        copies = []
        for position, op in enumerate(program.operations):
            copy = copy_form(op, mover.dtypes)
            if copy is not None and mover.may_move(copy):
                copies.append((position, copy))
        copies.sort(key=lambda item: (-program.nbytes(item[1].source), item[0]))
        for position, _ in copies:
            left = mover.operations[position]
            copy = None if left is None else copy_form(left, mover.dtypes)  # its source may have moved since
            if copy is None or not mover.may_move(copy):
                continue
            # a kernel's result that goes to an input and is read besides is fusion's: it keeps it in registers
            outside = program.buffers[copy.target].kind in EXTERNAL_KINDS
            by_calls = _made_by_calls(mover, copy)
            if outside and not by_calls and not _only_for_this(mover, copy, position):
                continue
            reason = mover.move(copy, position)
            if reason and (by_calls or not outside):
                mover.notes.append((copy.source, f"copied into {copy.target!r}: {reason}"))
        return mover.result()


def _made_by_calls(mover: Mover, copy: CopyForm) -> bool:
    return all(isinstance(op, Extern) for op in _writers(mover, copy))


def _only_for_this(mover: Mover, copy: CopyForm, position: int) -> bool:
    """Whether nothing but the copy reads its source."""
    writers = _writers(mover, copy)
    return [p for p in mover.uses(copy.source) if all(mover.at(p) is not w for w in writers)] == [position]


def _writers(mover: Mover, copy: CopyForm) -> list[Operation]:
    return [op for p in mover.uses(copy.source) if copy.source in (op := mover.at(p)).writes]


@dataclass(frozen=True, slots=True)
class SingleStore:
    """The pass after fusion. It has no options."""

    name: ClassVar[str] = "single_store"
    requires: ClassVar[tuple[str, ...]] = ("fusion",)

    @classmethod
    def configured(cls, config: Config) -> SingleStore:
        return cls()

    def run(self, program: Program) -> Program:
        mover = Mover(program)
        for position, op in enumerate(program.operations):
            if isinstance(op, KernelOp) and len(op.kernel.stores) > 1:
                self.thin(mover, position)
        return mover.result()

    def thin(self, mover: Mover, position: int) -> None:
        """Drop stores of the kernel at ``position`` while another store of the same value can stand for them."""
        refused: set[tuple[str, str]] = set()
        while True:
            op = mover.at(position)
            assert isinstance(op, KernelOp)
            found = next(_doubles(op, mover, position, refused), None)
            if found is None:
                return
            copy, remainder = found
            reason = mover.move(copy, position, remainder)
            if reason:
                refused.add((copy.source, copy.target))
                mover.notes.append((copy.source, f"stored again in {copy.target!r}: {reason}"))


def _doubles(
    op: KernelOp, mover: Mover, position: int, refused: set[tuple[str, str]]
) -> Iterator[tuple[CopyForm, KernelOp]]:
    """Pairs of stores of one value, as the copy that they amount to, and the kernel without the first of them.

    Left out are the ``refused`` pairs of buffers.
    """
    kernel = op.kernel
    times = Counter(s.value for s in kernel.stores)
    for a in kernel.stores:
        if times[a.value] == 1:
            continue
        space = _space(kernel, a)
        if space is None or a.buffer in op.mutates or sum(s.buffer == a.buffer for s in kernel.stores) > 1:
            continue
        if a.buffer in kernel.read_buffers:
            continue
        for b in kernel.stores:
            if b.buffer == a.buffer or b.value != a.value or b.dtype is not a.dtype or (a.buffer, b.buffer) in refused:
                continue
            if _space(kernel, b) != space:
                continue
            copy = CopyForm(op.name, a.buffer, b.buffer, space, a.index, b.index, a.dtype.itemsize)
            dtypes = {mover.dtypes[a.buffer], mover.dtypes[b.buffer]}
            if len(dtypes) == 1 and mover.may_move(copy) and mover.uses(a.buffer)[0] == position:
                stores = tuple(s for s in kernel.stores if s is not a)
                yield copy, replace(op, kernel=Kernel(kernel.outer, kernel.row, kernel.nodes, stores))


def _space(kernel: Kernel, store: Store) -> Ranges | None:
    """The points at which the store happens, or None where each point's element is not its own."""
    if store.mode is not StoreMode.SET or store.mask is not None or value_references(store.index):
        return None
    point = kernel.store_level(store) is Level.POINT
    ranges = (*kernel.outer, *kernel.row) if point else kernel.outer
    return ranges_of(ranges)
