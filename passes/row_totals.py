"""Columns summed by the kernel that goes over the rows: gradients of weights and biases beside that of the input.

The gradient of a layer norm's input reduces along rows, those of its weight and bias over all rows, and so does that of
the bias of the product in front of it. Apart they read the same tensors twice. Here the kernel over rows takes several
rows an instance, one after the other, and keeps the sums of their columns in registers; a second kernel adds up the
sums of all instances. What only the second reading needed, such as a normalised activation, is not stored any more.
torch's Inductor has such kernels too ("mix-order reduction").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import sympy

from memplan.ir.config import Config
from memplan.ir.index import FloorDiv, delinearize, expand, ranges_of, simplify
from memplan.ir.loops import Kernel, Range, Reduce, Store, StoreMode
from memplan.ir.over_ranges import over_ranges
from memplan.ir.program import EXTERNAL_KINDS, Buffer, BufferKind, KernelOp, Origin, Program
from memplan.ir.totals import rows_together

from .fuse_costs import row_is_contiguous
from .fuse_kernels import MergeRules, merge
from .slots import Slots
from .split_reductions import Slot, partials, second_kernel, splittable, subset

#: Instances that the rows are dealt out to: four for each of 132 multiprocessors, as many as registers allow at once.
#: A second kernel reads what each has summed, in one launch up to so many elements (`SplitReductions` makes two of
#: more).
_INSTANCES, _MOST_SUMS = 528, (1 << 20) - 1
#: Instances below which a GPU would be half idle, and rows of one below which there is little to be summed.
_LEAST_INSTANCES, _LEAST_ROWS = 132, 8
#: Elements of a row that are held in registers, and sums beside them.
_LONGEST, _MOST_TOTALS = 4096, 4
#: Bytes below which the caches hold what is read twice; a tensor of less than this part of the largest is small.
_LEAST_BYTES, _LARGE = 4 << 20, 0.125
#: Sums are stored and read again: at most this part of the bytes that are saved.
_SUMS_PART = 0.25


@dataclass(frozen=True, slots=True)
class RowTotals:
    """The pass. It comes before long reductions are split: whole ones are looked for."""

    name: ClassVar[str] = "row_totals"
    requires: ClassVar[tuple[str, ...]] = ("fusion",)

    @classmethod
    def configured(cls, config: Config) -> RowTotals:
        return cls()

    def run(self, program: Program) -> Program:
        summing = _Summing(program)
        for k, op in enumerate(program.operations):
            if isinstance(op, KernelOp) and op.device.startswith("cuda") and _sums_columns(op):
                summing.join(k)
        return summing.result()


def _sums_columns(op: KernelOp) -> bool:
    """Whether a kernel does nothing but sums over columns of static sizes, and what follows from them."""
    kernel = op.kernel
    if op.mutates or not kernel.row or row_is_contiguous(kernel) or not splittable(kernel):
        return False
    sums = [kernel.nodes[k] for k in kernel.reductions]
    return all(isinstance(n, Reduce) and n.op == "sum" and n.dtype.is_floating_point for n in sums)


def _goes_over_rows(op: object, device: str) -> bool:
    """Whether an operation is a kernel over rows of static sizes, each of which lies in one piece."""
    if not isinstance(op, KernelOp) or op.mutates or op.device != device:
        return False
    kernel = op.kernel
    static = all(isinstance(r.size, int) for r in (*kernel.outer, *kernel.row))
    return static and bool(kernel.outer and kernel.reductions) and len(kernel.row) == 1 and row_is_contiguous(kernel)


@dataclass(frozen=True, slots=True)
class _Joined:
    """A kernel with totals, the one that adds them up, and the buffers between the two."""

    rows: KernelOp
    sums: KernelOp
    made: tuple[Buffer, ...]


class _Summing:
    def __init__(self, program: Program) -> None:
        self.slots = Slots(program)
        self.changed = False

    def result(self) -> Program:
        program = self.slots.program
        return program.with_operations(self.slots.flat()) if self.changed else program

    def join(self, at: int) -> None:
        """Have a sum over columns made by the nearest kernel over rows that reads or stores all that is large in it."""
        (op,) = self.slots.operations[at]
        assert isinstance(op, KernelOp)
        nbytes = {b: self.slots.program.nbytes(b) for b in op.reads}
        large = [b for b, n in nbytes.items() if n >= max(nbytes.values()) * _LARGE]
        saved = sum(nbytes[b] for b in large)
        if max(nbytes.values()) < _LEAST_BYTES:
            return
        near = set.intersection(*(self.slots.makers.get(b, set()) | self.slots.readers[b] for b in large)) - {at}
        for other in sorted(near, key=lambda k: abs(k - at)):
            rows = self.slots.operations[other][0]
            if _goes_over_rows(rows, op.device) and self.join_with(other, at, saved):
                return

    def join_with(self, rows_at: int, sums_at: int, saved: int) -> bool:
        rows, sums = self.slots.operations[rows_at][0], self.slots.operations[sums_at][0]
        assert isinstance(rows, KernelOp)
        assert isinstance(sums, KernelOp)
        first, second = min(rows_at, sums_at), max(rows_at, sums_at)
        if rows_at == first:
            place = self.slots.place(first, second)
        else:  # what the rows store would be alive earlier in the place of the sums
            place = second if self.slots.fits_second(first, second) else None
        if place is None:
            return False
        joined = self.joined(rows, sums, saved, rows_first=rows_at < sums_at)
        if joined is None:
            return False
        program = self.slots.program
        self.slots.program = replace(program, buffers={**program.buffers, **{b.name: b for b in joined.made}})
        self.slots.merge(first, second, place, (joined.rows, joined.sums))
        self.changed = True
        return True

    def joined(self, rows: KernelOp, sums: KernelOp, saved: int, *, rows_first: bool) -> _Joined | None:
        over = _over_one_range(rows.kernel)
        (x,), (column,) = over.outer, over.row
        totals = sum(s.mode is StoreMode.TOTAL for s in over.stores)
        slots = partials(sums.kernel)
        together = _together(int(x.size), int(column.size), len(slots), saved)
        if together is None or totals + len(slots) > _MOST_TOTALS:
            return None
        if math.prod(int(r.size) for r in sums.kernel.outer) != column.size:
            return None  # sums of some rows: gradients of positions, over a batch
        together = rows_together(over) or together  # those of an earlier sum
        groups = -(-int(x.size) // together)
        origin = sums.origins[0] if sums.origins else Origin()
        made = tuple(
            Buffer(
                f"{sums.name}_total{k}", groups * int(column.size) * dtype.itemsize, dtype, sums.device,
                BufferKind.TEMPORARY, origin,
            )
            for k, (_, _, dtype) in enumerate(slots)
        )  # fmt: skip
        names = tuple(b.name for b in made)
        if set(names) & set(self.slots.program.buffers):
            return None
        points = _points(sums.kernel, slots, names)
        pair = (over, points) if rows_first else (points, over)
        kernel = merge(*pair, MergeRules(dropped=self.needless(rows, sums)))
        kernel = None if kernel is None else _with_totals(kernel, x, column, names, together)
        if kernel is None:
            return None
        adding = replace(sums, kernel=second_kernel(sums.kernel, groups, slots, names))
        origins = tuple(dict.fromkeys((*rows.origins, *sums.origins)))
        return _Joined(replace(rows, kernel=kernel, origins=origins), adding, made)

    def needless(self, rows: KernelOp, sums: KernelOp) -> frozenset[str]:
        """What the kernel over rows stores for the sums alone."""
        at = {k for b in sums.reads for k in self.slots.readers[b] if sums in self.slots.operations[k]}
        program = self.slots.program
        inside = [b for b in rows.writes if program.buffers[b].kind not in EXTERNAL_KINDS]
        return frozenset(b for b in inside if self.slots.readers.get(b) == at) - program.output_buffers


def _over_one_range(kernel: Kernel) -> Kernel:
    """The same loops with one outer range, where each of a batch of pictures has something of its own."""
    if len(kernel.outer) == 1:
        return kernel
    sizes = tuple(r.size for r in kernel.outer)
    x = Range(kernel.outer[-1].symbol, math.prod(map(int, sizes)))
    coordinates = delinearize(x.symbol, sizes, ranges_of((x,)))
    position = dict(zip((r.symbol for r in kernel.outer), coordinates, strict=True))
    return over_ranges(kernel, position, (x,), kernel.row)


def _together(rows: int, columns: int, sums: int, saved: int) -> int | None:
    """Rows that an instance takes; None where joining does not pay."""
    if columns > _LONGEST:
        return None
    most = min(_INSTANCES, _MOST_SUMS // columns, int(saved * _SUMS_PART) // (8 * columns * sums), rows // _LEAST_ROWS)
    if most < _LEAST_INSTANCES:
        return None
    # blocks of some 2048 elements, of whole rows, come out even (`codegen.triton_configs`)
    unit = max(1, 2048 >> max(columns - 1, 0).bit_length())
    return -(-rows // (most * unit)) * unit


def _points(kernel: Kernel, slots: Sequence[Slot], names: Sequence[str]) -> Kernel:
    """What a kernel sums, stored at every point: row-major, its rows outermost."""
    nodes, renamed = subset(kernel, tuple(a for k, _, _ in slots for a in _operands(kernel, k)), {})
    ranges = (*kernel.row, *kernel.outer)
    flat: sympy.Expr = sympy.Integer(0)
    for r in ranges:
        flat = flat * r.size + r.symbol
    stores = []
    for (k, _, dtype), name in zip(slots, names, strict=True):
        (value,) = _operands(kernel, k)
        stores.append(Store(name, expand(flat), renamed[value], dtype))
    return Kernel(ranges, (), tuple(nodes), tuple(stores))


def _operands(kernel: Kernel, k: int) -> tuple[int, ...]:
    node = kernel.nodes[k]
    assert isinstance(node, Reduce)
    return node.args


def _with_totals(kernel: Kernel, x: Range, column: Range, names: Sequence[str], together: int) -> Kernel | None:
    """A merged kernel with totals in the place of what it stores at every point; None if it goes over other points."""
    if kernel.outer != (x,) or kernel.row != (column,):
        return None
    stores = []
    for s in kernel.stores:
        if s.buffer in names:
            index = simplify(s.index, ranges_of((x, column)))
            if expand(index - x.symbol * column.size - column.symbol) != 0 or s.mask is not None:
                return None
            index = FloorDiv(x.symbol, together) * column.size + column.symbol
            s = replace(s, index=index, mode=StoreMode.TOTAL)
        stores.append(s)
    return replace(kernel, stores=tuple(stores))
