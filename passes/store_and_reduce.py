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
from memplan.ir.program import KernelOp, Program

from .fuse_costs import row_is_contiguous
from .fuse_kernels import MergeRules, merge
from .slots import Slots

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
        merging = _Merging(Slots(program))
        for k, op in enumerate(program.operations):
            if isinstance(op, KernelOp) and op.device.startswith("cuda") and _only_reduces(op):
                merging.merge(k)
        operations = merging.slots.flat()
        return program if len(operations) == len(program.operations) else replace(program, operations=operations)


def _only_reduces(op: KernelOp) -> bool:
    """Whether a kernel reduces columns, stores nothing along them and changes nothing."""
    kernel = op.kernel
    if op.mutates or not kernel.row or not kernel.reductions or row_is_contiguous(kernel):
        return False
    return all(kernel.store_level(s) is not Level.POINT and s.mode is StoreMode.SET for s in kernel.stores)


class _Merging:
    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.program = slots.program
        self.names = {op.name for op in self.program.operations}

    def merge(self, at: int) -> None:
        """Merge one reduction with the kernel that stores the largest tensor that it reads, where that is possible."""
        (reduction,) = self.slots.operations[at]
        assert isinstance(reduction, KernelOp)
        read = sorted(reduction.kernel.read_buffers, key=lambda b: (-self.program.nbytes(b), b))
        for buffer in read:
            if self.program.nbytes(buffer) < _LEAST_BYTES:
                return
            made_at = self.maker(buffer, at, reduction.device)
            if made_at is not None and self.merge_with(made_at, at):
                return

    def maker(self, buffer: str, before: int, device: str) -> int | None:
        """The kernel that makes all of a buffer, if it is pointwise or has been merged with a reduction."""
        makers = self.slots.makers.get(buffer, ())
        if len(makers) != 1 or (found := next(iter(makers))) > before:
            return None
        (op,) = self.slots.operations[found]
        return found if isinstance(op, KernelOp) and not op.mutates and op.device == device else None

    def merge_with(self, made_at: int, reduced_at: int) -> bool:
        ((first,), (second,)) = self.slots.operations[made_at], self.slots.operations[reduced_at]
        assert isinstance(first, KernelOp)
        assert isinstance(second, KernelOp)
        if first.kernel.row and not first.name.endswith(_SUFFIX):
            return False
        place = self.slots.place(made_at, reduced_at)
        kernel = None if place is None else merge(first.kernel, second.kernel, MergeRules())
        if place is None or kernel is None or not self.pays(kernel):
            return False
        name = first.name if first.name.endswith(_SUFFIX) else f"{first.name}{_SUFFIX}"
        if name != first.name and name in self.names:
            return False
        self.names.add(name)
        origins = tuple(dict.fromkeys((*first.origins, *second.origins)))
        merged = replace(first, name=name, kernel=kernel, origins=origins)
        self.slots.merge(made_at, reduced_at, place, (merged,))
        return True

    def pays(self, kernel: Kernel) -> bool:
        sizes = {b: self.program.nbytes(b) for b in kernel.buffers}
        least = max(sizes.values()) * _LARGE
        loads = {(n.buffer, n.index) for n in kernel.loads if sizes[n.buffer] >= least}
        stores = [s for s in kernel.stores if sizes[s.buffer] >= least and kernel.store_level(s) is Level.POINT]
        return len(loads) <= _MOST_LOADS and len(stores) <= _MOST_STORES


#: What the names of merged kernels end in.
_SUFFIX = "_and_sums"
