"""Fusion: kernels that share data become one kernel, where that saves traffic and does not raise the peak.

Three moves, best first by bytes saved, until nothing changes:

* *merge* a producer with a consumer, or two kernels that read the same, over one iteration space;
* *inline* a pointwise producer into all its consumers, so that its result is never stored;
* *inline* it into some of them, where its inputs are smaller than its result.

A move is made only if the simulated timeline of live bytes allows it: first moves that raise nothing above what the
two steps held before, then those that stay below the peak of the whole program. Buffers that nobody reads afterwards
are gone. The order of the result is the program's order but for what the moves displace.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from memplan.ir.config import Config
from memplan.ir.loops import Kernel, Size
from memplan.ir.program import KernelOp, Operation, Origin, Phase, Program, evaluate

from .cleanup import normalise
from .fuse_costs import SMALL, Limits, inline_gain, keeps_parallel, pays_together, row_is_contiguous
from .fuse_graph import Bytes, FusionGraph, Group, Placement
from .fuse_kernels import MergeRules, inline, merge, stored_value, updates_once_a_row, without_stores
from .kernel_access import spoiled_by_error

#: of a buffer's many readers, those considered as partners: the nearest ones in program order
_NEAREST = 6
#: what one launch less is worth, in bytes of traffic
_LAUNCH_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Fusion:
    """The pass. ``max_buffers`` and ``max_nodes`` bound one kernel; ``max_passes`` bounds the rounds."""

    name: ClassVar[str] = "fusion"
    requires: ClassVar[tuple[str, ...]] = ("cleanup",)
    max_buffers: int = 24
    max_nodes: int = 240
    max_rounds: int = 4

    @classmethod
    def configured(cls, config: Config) -> Fusion:
        return cls(max_buffers=config.max_fused_buffers)

    def run(self, program: Program) -> Program:
        if sum(isinstance(op, KernelOp) for op in program.operations) < 2:
            return program
        fuser = Fuser(program, Limits(self.max_buffers, self.max_nodes, program.hints))
        fuser.inline_all(trivial=True)
        for _ in range(self.max_rounds):
            changes = fuser.changes
            # what ends a buffer comes first: a kernel that has taken in a sibling may fit its consumer no longer
            fuser.merge_all(strict=True, dropping=True)
            fuser.merge_all(strict=False, dropping=True)
            fuser.inline_all(trivial=False)
            fuser.merge_all(strict=True, dropping=False)
            fuser.merge_all(strict=False, dropping=False)
            if fuser.changes == changes:
                break
        if not fuser.changes:
            return program
        return program.with_operations(tuple(_normalised(op) for op in fuser.graph.operations()))


def _normalised(op: Operation) -> Operation:
    return replace(op, kernel=normalise(op.kernel)) if isinstance(op, KernelOp) else op


class Fuser:
    """The greedy search over one program."""

    def __init__(self, program: Program, limits: Limits) -> None:
        self.program = program
        self.limits = limits
        self.graph = FusionGraph(program)
        self.changes = 0
        self._refused: set[tuple[int, int]] = set()
        #: points of groups at the hinted sizes, and whether they are small; a group's number is given once
        self._points: dict[int, int] = {}
        self._small: dict[int, bool] = {}

    # --- merging -----------------------------------------------------------------------------------------------

    def merge_all(self, *, strict: bool, dropping: bool) -> None:
        """Merge pairs, the most bytes saved first, until no pair is left that can be merged.

        ``strict``: nothing may rise above what the two steps hold now; ``dropping``: only producers and consumers
        whose merging ends a buffer.
        """
        heap: list[tuple[int, ...]] = []
        seen: set[tuple[int, int]] = set()
        for number in self.graph.ordered(self.graph.groups):
            self._propose(number, heap, seen, dropping)
        while heap:
            *_, producer, consumer = heapq.heappop(heap)
            if producer in self.graph.groups and consumer in self.graph.groups:
                merged = self._merge(producer, consumer, strict=strict)
                if merged is not None:
                    self._propose(merged.number, heap, seen, dropping)

    def _propose(self, number: int, heap: list[tuple[int, ...]], seen: set[tuple[int, int]], dropping: bool) -> None:
        group = self.graph.groups[number]
        if group.points is None:
            return
        slot = self.graph.slot
        for other in self._partners(group):
            pair = (number, other) if slot[number] < slot[other] else (other, number)
            if pair in seen or pair in self._refused:
                continue
            seen.add(pair)
            first, second = self.graph.groups[pair[0]], self.graph.groups[pair[1]]
            if not _same_space(first, second) or first.op.device != second.op.device:
                continue
            if dropping and not any(self._drops(b, first, second) for b in first.changes & second.reads):
                continue
            gain = self._merge_gain(first, second)
            if gain > 0:
                # what changes a buffer in place fits into no row kernel any more, so it is taken last
                late = int(bool(first.mutates or second.mutates))
                heapq.heappush(heap, (late, -gain, slot[pair[1]] - slot[pair[0]], slot[pair[0]], *pair))

    def _partners(self, group: Group) -> list[int]:
        """Kernels that read what this one writes, write what it reads, or read and write the same buffers."""
        found: dict[int, None] = {}
        for b in sorted(group.changes):
            found.update(dict.fromkeys(self._nearest(self.graph.readers.get(b, ()), group)))
            found.update(dict.fromkeys(self._nearest(self.graph.writers.get(b, ()), group)))
        for b in sorted(group.reads):
            found.update(dict.fromkeys(self._nearest(self.graph.writers.get(b, ()), group)))
            found.update(dict.fromkeys(self._nearest(self.graph.readers.get(b, ()), group)))
            if self.graph.nbytes(b) <= SMALL:
                for w in sorted(self.graph.writers.get(b, ())):
                    for sibling in sorted(self.graph.groups[w].changes):
                        found.update(dict.fromkeys(self._nearest(self.graph.readers.get(sibling, ()), group)))
        found.pop(group.number, None)
        return [g for g in found if self.graph.groups[g].points is not None]

    def _nearest(self, groups: object, group: Group) -> list[int]:
        numbers: list[int] = list(groups)  # type: ignore[call-overload]
        if len(numbers) <= _NEAREST + 1:
            return numbers  # all of them; in what order they are proposed does not matter
        slot = self.graph.slot
        here = slot[group.number]
        numbers.sort(key=lambda g: (abs(slot[g] - here), g))
        return numbers[: _NEAREST + 1]

    def _merge_gain(self, first: Group, second: Group) -> int:
        """Bytes of traffic saved: reads that become values, stores that nobody needs, inputs read once."""
        gain = 0
        for b in first.changes & second.reads:
            gain += self.traffic(b, second) * (2 if self._drops(b, first, second) else 1)
        for b in (first.reads & second.reads) - first.changes:
            gain += min(self.traffic(b, first), self.traffic(b, second))
        for b in first.writes & second.writes:
            gain += 1 if b in self.graph.droppable else 0
        if gain:
            return gain + _LAUNCH_BYTES
        small = self._is_small(first) and self._is_small(second) and first.rows == second.rows == 1
        return _LAUNCH_BYTES if small else 0

    def _is_small(self, group: Group) -> bool:
        """Whether the launch costs more than the work."""
        found = self._small.get(group.number)
        if found is None:
            found = all(self.traffic(b, group) <= SMALL for b in group.reads | group.changes)
            self._small[group.number] = found
        return found

    def traffic(self, buffer: str, group: Group) -> int:
        """Bytes that a kernel moves to or from a buffer: no more than an element a point."""
        points = self._points.get(group.number)
        if points is None:
            assert group.points is not None
            assert group.rows is not None
            points = self._points[group.number] = evaluate(group.points * group.rows, self.program.hints)
        return min(self.graph.nbytes(buffer), points * self.program.buffers[buffer].dtype.itemsize)

    def _drops(self, buffer: str, first: Group, second: Group) -> bool:
        """Whether nobody but these two would touch the buffer."""
        if buffer not in self.graph.droppable:
            return False
        pair, graph = {first.number, second.number}, self.graph
        return all(users <= pair for users in (graph.readers.get(buffer, set()), graph.writers.get(buffer, set())))

    def _merge(self, producer: int, consumer: int, *, strict: bool) -> Group | None:
        """Merge two groups if their kernels, their order and memory allow it."""
        graph = self.graph
        if graph.slot[producer] > graph.slot[consumer]:
            producer, consumer = consumer, producer
        if (producer, consumer) in self._refused:
            return None
        first, second = graph.groups[producer], graph.groups[consumer]
        dropped = frozenset(b for b in first.changes if self._drops(b, first, second))
        buffers = (first.reads | second.reads | first.changes | second.changes) - dropped
        if len(buffers) > self.limits.max_buffers:
            return None
        places = graph.placement(producer, consumer)
        if places is None:
            return None
        chosen = self._affordable(producer, consumer, places, dropped, strict=strict)
        if chosen is None:
            return None
        kernel = self._merged_kernel(first, second, dropped)
        if kernel is None:
            self._refused.add((producer, consumer))
            return None
        place, low, values = chosen
        graph.accept(low, values)
        self.changes += 1
        return graph.apply_merge(producer, consumer, place, _merged_op(first, second, kernel))

    def _affordable(
        self, producer: int, consumer: int, places: list[Placement], dropped: frozenset[str], *, strict: bool
    ) -> tuple[Placement, int, Bytes] | None:
        graph = self.graph
        if strict:
            ceiling = int(max(graph.live[graph.slot[producer]], graph.live[graph.slot[consumer]]))
        else:
            ceiling = int(graph.live.max())
        for place in places:
            found = graph.try_change(graph.merge_spans(producer, consumer, place, dropped), ceiling=ceiling)
            if found is not None:
                return place, *found
        return None

    def _merged_kernel(self, first: Group, second: Group, dropped: frozenset[str]) -> Kernel | None:
        a, b = _kernel(first), _kernel(second)
        if len(a.nodes) + len(b.nodes) > self.limits.max_nodes:
            return None
        along_row = bool(a.row) != bool(b.row) and first.points != second.points
        if not dropped and along_row and any(k.row and not row_is_contiguous(k) for k in (a, b)):
            return None  # stores along a strided row, in a reduction that wants to be cut along it
        kernel = merge(a, b, MergeRules(first.mutates | second.mutates, dropped))
        if kernel is None or not keeps_parallel(kernel, first.op.device, self.limits, (a, b)):
            return None
        if self._spoils(kernel, (first, second)):
            return None
        flows = first.changes & second.reads
        return kernel if flows or pays_together(a, b, kernel, self.program) else None

    # --- inlining ----------------------------------------------------------------------------------------------

    def inline_all(self, *, trivial: bool) -> None:
        """Inline pointwise producers, in program order, where that saves bytes (``trivial``: where it is free).

        A consumer that something was inlined into is a new group, in the same slot. In training it has its turn in the
        same round: of a sum of a layer's results, its terms are read again rather than stored. In an inference it has
        been merged with what reduces it before its turn comes: the sum lies in one place from the first layer on, and
        every layer needs the same room (`memplan.passes.core_pool`; else ViT-L reserves 1.05 of what it needs, and is
        estimated 0.2 % faster).
        """
        groups = self.graph.ordered(self.graph.groups)
        if self.program.phase is Phase.INFERENCE:
            for number in groups:
                self._inline_from(number, trivial=trivial)
        else:
            for slot in [self.graph.slot[number] for number in groups]:
                self._inline_from(self.graph.order[slot], trivial=trivial)

    def _inline_from(self, number: int | None, *, trivial: bool) -> None:
        if number is None or number not in self.graph.groups:
            return
        for buffer in sorted(self.graph.groups[number].writes):
            if number in self.graph.groups:
                number = self._inline(number, buffer, trivial=trivial)

    def _inline(self, number: int, buffer: str, *, trivial: bool) -> int:
        """Inline one buffer's producer into its consumers; gives the producer's number afterwards."""
        graph = self.graph
        group = graph.groups[number]
        if group.points is None or group.rows != 1 or buffer in graph.mutated or graph.writers[buffer] != {number}:
            return number
        kernel = _kernel(group)
        if stored_value(kernel, buffer) is None or self.program.buffers[buffer].zero_fill:
            return number
        readers = graph.ordered(graph.readers.get(buffer, ()))
        consumers = [graph.groups[r] for r in readers if graph.groups[r].points is not None]
        if not consumers:
            return number
        whole = buffer in graph.droppable and len(consumers) == len(readers)
        vanishes = whole and len(group.changes) == 1
        gain = inline_gain(kernel, buffer, consumers, whole, vanishes, trivial, self.limits, self.program, group)
        if gain is None:
            return number
        if gain.inputs & (graph.mutated | group.writes):
            return number
        if gain.inputs and any(c.op.device != group.op.device for c in consumers):
            return number
        spans = self._inline_spans(group, buffer, consumers, gain.inputs, whole=whole, vanishes=vanishes)
        found = graph.try_change(spans, ceiling=int(graph.live.max()))
        if found is None:
            return number
        replaced = self._inlined_kernels(kernel, buffer, consumers)
        if replaced is None:
            return number
        graph.accept(*found)
        self.changes += 1
        for consumer, new in zip(consumers, replaced, strict=True):
            graph.inherit(number, consumer.number)
            graph.update(consumer.number, replace(_op(consumer), kernel=new, origins=_origins(group, consumer)))
        if vanishes:
            graph.remove(number)
        elif whole:
            return graph.update(number, replace(_op(group), kernel=without_stores(kernel, frozenset({buffer})))).number
        return number

    def _inlined_kernels(self, kernel: Kernel, buffer: str, consumers: list[Group]) -> list[Kernel] | None:
        out: list[Kernel] = []
        for c in consumers:
            new = inline(kernel, _kernel(c), buffer)
            if new is None or len(new.nodes) > self.limits.max_nodes:
                return None
            touched = {*new.read_buffers, *new.written_buffers}
            if len(touched) > max(self.limits.max_buffers, len(c.reads | c.changes)):
                return None
            if touched - c.reads - c.changes and not updates_once_a_row(new):
                return None
            if self._spoils(new, (c,)):
                return None
            out.append(new)
        return out

    def _spoils(self, kernel: Kernel, parts: Sequence[Group]) -> bool:
        """Whether an index out of range would spoil more that is the caller's than it does in the kernel's parts."""
        buffers = self.program.buffers
        before = [b for p in parts for b in spoiled_by_error(_kernel(p), p.op.device, buffers)]
        return not spoiled_by_error(kernel, parts[0].op.device, buffers) <= frozenset(before)

    def _inline_spans(
        self,
        group: Group,
        buffer: str,
        consumers: list[Group],
        inputs: frozenset[str],
        *,
        whole: bool,
        vanishes: bool,
    ) -> list[tuple[int, tuple[int, int] | None, tuple[int, int] | None]]:
        """How lifetimes change: the buffer goes, what it is made of lives until the last consumer."""
        graph = self.graph
        added = {c.number for c in consumers}
        spans = []
        for b in sorted(inputs | (group.reads if vanishes else frozenset())):
            readers = graph.readers[b] - ({group.number} if vanishes else set())
            readers = readers | added if b in inputs else readers
            spans.append((graph.nbytes(b), graph.span(b, {}), graph.span(b, {}, readers)))
        if whole:
            spans.append((graph.nbytes(buffer), graph.span(buffer, {}), None))
        elif buffer not in self.program.output_buffers:
            readers = graph.readers[buffer] - added
            spans.append((graph.nbytes(buffer), graph.span(buffer, {}), graph.span(buffer, {}, readers)))
        return spans


def _op(group: Group) -> KernelOp:
    assert isinstance(group.op, KernelOp)
    return group.op


def _kernel(group: Group) -> Kernel:
    return _op(group).kernel


def _same_space(a: Group, b: Group) -> bool:
    """Whether the counts of points allow a common iteration space."""
    assert a.points is not None
    assert b.points is not None
    if a.points == b.points and (a.rows == b.rows or a.rows == 1 or b.rows == 1):
        return True
    if a.rows == 1 and b.rows != 1:
        return bool(a.points == _product(b))
    if b.rows == 1 and a.rows != 1:
        return bool(b.points == _product(a))
    return False


def _product(group: Group) -> Size:
    """Points of the whole space."""
    assert group.points is not None
    assert group.rows is not None
    found = group.points * group.rows
    return found if isinstance(found, int) else found.expand()


def _merged_op(first: Group, second: Group, kernel: Kernel) -> KernelOp:
    assert isinstance(second.op, KernelOp)
    mutates = [b for b in first.op.mutates if b in kernel.written_buffers]
    mutates += [b for b in second.op.mutates if b not in first.writes and b in kernel.written_buffers]
    return replace(second.op, kernel=kernel, origins=_origins(first, second), mutates=tuple(dict.fromkeys(mutates)))


def _origins(first: Group, second: Group) -> tuple[Origin, ...]:
    return tuple(dict.fromkeys((*first.op.origins, *second.op.origins)))
