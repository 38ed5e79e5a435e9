"""A pointwise kernel and the first half of a split reduction over what it stores, as one kernel.

A gradient is stored for the products that read it, and summed over its rows for a bias or a batch norm. Fusion keeps
the two apart, since a reduction that stores along its row cannot be split over the whole device. Once it has been
split (`memplan.passes.split_reductions`), the kernel that reduces parts of the rows can store them as well: they are
read once less. Measured on an H200 for 73 pairs of seven models (`benchmarks/results/store_and_reduce.md`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from memplan.ir.config import Config
from memplan.ir.loops import Kernel, Level, StoreMode
from memplan.ir.program import EXTERNAL_KINDS, KernelOp, Operation, Program

from .fuse_costs import row_is_contiguous
from .fuse_kernels import MergeRules, merge

#: Large tensors that such a kernel may read and store. With more of them a pointwise kernel is up to 1.6 times as fast
#: as one that goes through columns.
_MOST_LOADS, _MOST_STORES = 7, 2
#: Of the bytes of the largest one: what is smaller does not count.
_LARGE = 0.125
#: Bytes below which the caches hold what is stored.
_LEAST_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class StoreAndReduce:
    """The pass. It comes after long reductions have been split: whole ones are not merged with what stores rows."""

    name: ClassVar[str] = "store_and_reduce"
    requires: ClassVar[tuple[str, ...]] = ("split_reductions",)

    @classmethod
    def configured(cls, config: Config) -> StoreAndReduce:
        return cls()

    def run(self, program: Program) -> Program:
        merging = _Merging(program)
        for op in program.operations:
            if isinstance(op, KernelOp) and op.device.startswith("cuda") and _only_reduces(op.kernel):
                merging.merge(op.name)
        if None not in merging.operations:
            return program
        return replace(program, operations=tuple(op for op in merging.operations if op is not None))


def _only_reduces(kernel: Kernel) -> bool:
    """Whether a kernel reduces columns and stores nothing along them."""
    if not kernel.row or not kernel.reductions or row_is_contiguous(kernel):
        return False
    return all(kernel.store_level(s) is not Level.POINT and s.mode is StoreMode.SET for s in kernel.stores)


class _Merging:
    """Operations in their slots; those that were merged into others leave theirs empty."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.operations: list[Operation | None] = list(program.operations)
        self.slots = {op.name: k for k, op in enumerate(program.operations)}
        self.makers: dict[str, set[int]] = {}
        for k, op in enumerate(program.operations):
            for b in (*op.writes, *op.mutates):
                self.makers.setdefault(b, set()).add(k)

    def merge(self, name: str) -> None:
        """Merge one reduction with the kernel that stores the largest tensor that it reads, where that is possible."""
        at = self.slots[name]
        reduction = self.operations[at]
        assert isinstance(reduction, KernelOp)
        read = sorted(reduction.kernel.read_buffers, key=lambda b: (-self.program.nbytes(b), b))
        for buffer in read:
            if self.program.nbytes(buffer) < _LEAST_BYTES:
                return
            made_at = self.maker(buffer, at)
            if made_at is not None and self.merge_with(made_at, at):
                return

    def maker(self, buffer: str, before: int) -> int | None:
        """The kernel that makes all of a buffer, if it is pointwise or has been merged with a reduction."""
        makers = self.makers.get(buffer, ())
        if len(makers) != 1 or (found := next(iter(makers))) > before:
            return None
        op, reduction = self.operations[found], self.operations[before]
        assert reduction is not None
        plain = isinstance(op, KernelOp) and not op.mutates and op.device == reduction.device
        return found if plain else None

    def merge_with(self, made_at: int, reduced_at: int) -> bool:
        first, second = self.operations[made_at], self.operations[reduced_at]
        assert isinstance(first, KernelOp)
        assert isinstance(second, KernelOp)
        if first.kernel.row and not first.name.endswith(_SUFFIX):
            return False
        place = self.place(made_at, reduced_at)
        kernel = None if place is None else merge(first.kernel, second.kernel, MergeRules())
        if place is None or kernel is None or not self.pays(kernel):
            return False
        name = first.name if first.name.endswith(_SUFFIX) else f"{first.name}{_SUFFIX}"
        if self.slots.get(name, made_at) != made_at:
            return False
        merged = replace(
            first, name=name, kernel=kernel, origins=tuple(dict.fromkeys((*first.origins, *second.origins)))
        )
        self.operations[made_at] = self.operations[reduced_at] = None
        self.operations[place] = merged
        self.slots[name] = place
        for b in (*first.writes, *second.writes):
            self.makers[b] = {place}
        return True

    def place(self, made_at: int, reduced_at: int) -> int | None:
        """Where the two can run as one.

        At the first, if nothing that the second needs is made or changed between. At the second, if nobody between
        needs what the first makes, nothing that it reads is changed, and what it reads for the last time is not more
        than what it makes: it would be alive between in its place.
        """
        first, second = self.operations[made_at], self.operations[reduced_at]
        assert first is not None
        assert second is not None
        between = [op for op in self.operations[made_at + 1 : reduced_at] if op is not None]
        changed = {b for op in between for b in (*op.writes, *op.mutates)}
        if not changed.intersection(second.reads):
            return made_at
        touched = {b for op in between for b in (*op.reads, *op.mutates, *op.writes)}
        if touched.intersection(first.writes) or changed.intersection(first.reads):
            return None
        needed = {b for op in self.operations[made_at + 1 :] if op is not None for b in op.reads}
        dying = sum(self.program.nbytes(b) for b in first.reads if b not in needed and self.frees(b))
        return reduced_at if dying <= sum(map(self.program.nbytes, first.writes)) else None

    def frees(self, buffer: str) -> bool:
        """Whether the program may free a buffer."""
        found = self.program.buffers[buffer]
        return found.kind not in EXTERNAL_KINDS or found.donated

    def pays(self, kernel: Kernel) -> bool:
        sizes = {b: self.program.nbytes(b) for b in kernel.buffers}
        least = max(sizes.values()) * _LARGE
        loads = {(n.buffer, n.index) for n in kernel.loads if sizes[n.buffer] >= least}
        stores = [s for s in kernel.stores if sizes[s.buffer] >= least and kernel.store_level(s) is Level.POINT]
        return len(loads) <= _MOST_LOADS and len(stores) <= _MOST_STORES


#: What the names of merged kernels end in.
_SUFFIX = "_and_sums"
