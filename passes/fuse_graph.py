"""The program while it is being fused: groups of operations in an order, their dependencies, and live bytes.

A group is one operation of the result. Groups sit in *slots*: their order is a valid order of the program at all
times, and it is the order of the result. Emptied slots stay, so that positions need no renumbering.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from memplan.ir.index import ranges_of
from memplan.ir.loops import Range, Size
from memplan.ir.program import EXTERNAL_KINDS, Extern, KernelOp, Operation, Program, evaluate

from .fuse_mapping import count

#: live bytes of consecutive slots
Bytes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]
#: groups looked at to see whether a path leads from a producer to a consumer around the edge between them
_MOST_VISITED = 4000
#: slots that a merge may reorder
_WIDEST_REGION = 400


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One operation; ``points`` and ``rows`` count the outer and row points of a kernel."""

    number: int
    op: Operation
    reads: frozenset[str]
    writes: frozenset[str]
    mutates: frozenset[str]
    points: Size | None
    rows: Size | None

    @property
    def changes(self) -> frozenset[str]:
        return self.writes | self.mutates


def make_group(number: int, op: Operation) -> Group:
    kernel = op.kernel if isinstance(op, KernelOp) else None
    return Group(
        number,
        op,
        frozenset(op.reads),
        frozenset(op.writes),
        frozenset(op.mutates),
        None if kernel is None else _points(kernel.outer),
        None if kernel is None else _points(kernel.row),
    )


def _points(ranges: tuple[Range, ...]) -> Size:
    """Number of points, as an integer where it is known: it is compared with others again and again."""
    found = count(ranges_of(ranges))
    return int(found) if found.is_Integer else found


@dataclass(frozen=True, slots=True)
class Placement:
    """New slots of groups (a slot of -1: gone)."""

    slots: Mapping[int, int]


class FusionGraph:
    """Groups, dependencies, slots and the simulated timeline of live bytes at the hinted sizes.

    ``live[k]``: bytes of temporaries, outputs and donated inputs that exist while slot ``k`` runs (without reuse in
    place), and that operation's scratch.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.groups: dict[int, Group] = {}
        self.slot: dict[int, int] = {}
        self.order: list[int | None] = []
        self.before: dict[int, set[int]] = {}
        self.after: dict[int, set[int]] = {}
        self.readers: dict[str, set[int]] = {}
        self.writers: dict[str, set[int]] = {}
        self._bytes: dict[str, int] = {}
        self._next = 0
        self.counted = frozenset(b.name for b in program.buffers.values() if b.kind not in EXTERNAL_KINDS or b.donated)
        self.donated = frozenset(b.name for b in program.buffers.values() if b.kind in EXTERNAL_KINDS and b.donated)
        self.droppable = (
            frozenset(b.name for b in program.buffers.values() if b.kind not in EXTERNAL_KINDS) - program.output_buffers
        )
        by_name: dict[str, int] = {}
        for op in program.operations:
            group = self._insert(op)
            by_name[op.name] = group.number
            self.slot[group.number] = len(self.order)
            self.order.append(group.number)
        for name, earlier in program.dependencies.items():
            for e in earlier:
                self._edge(by_name[e], by_name[name])
        self.mutated = frozenset(b for g in self.groups.values() for b in g.mutates)
        self.live = self._timeline()

    def _insert(self, op: Operation) -> Group:
        group = make_group(self._next, op)
        self._next += 1
        self.groups[group.number] = group
        self.before[group.number] = set()
        self.after[group.number] = set()
        self._register(group)
        return group

    def _register(self, group: Group) -> None:
        for b in group.reads:
            self.readers.setdefault(b, set()).add(group.number)
        for b in group.changes:
            self.writers.setdefault(b, set()).add(group.number)

    def _unregister(self, group: Group) -> None:
        for b in group.reads:
            self.readers[b].discard(group.number)
        for b in group.changes:
            self.writers[b].discard(group.number)

    def _edge(self, before: int, after: int) -> None:
        if before != after:
            self.before[after].add(before)
            self.after[before].add(after)

    def nbytes(self, buffer: str) -> int:
        """Bytes at the hinted sizes."""
        found = self._bytes.get(buffer)
        if found is None:
            found = self._bytes[buffer] = self.program.nbytes(buffer)
        return found

    # --- order -------------------------------------------------------------------------------------------------

    def placement(self, producer: int, consumer: int) -> list[Placement] | None:
        """Orders in which the two are one step, or None where a third must run between them.

        The producer moves down to the consumer if nothing between waits for it; the consumer up to the producer if
        it waits for nothing between; otherwise what waits for the producer moves behind.
        """
        first, last = self.slot[producer], self.slot[consumer]
        waiting = self._reach(producer, self.after, first, last)
        if waiting is None or waiting & self.before[consumer]:
            return None
        needed = self._reach(consumer, self.before, first, last)
        if needed is None:
            return None
        ends = [Placement({producer: s, consumer: s}) for s, free in ((last, not waiting), (first, not needed)) if free]
        if ends or last - first > _WIDEST_REGION:
            return ends or None
        inside = [g for g in self.order[first + 1 : last] if g is not None]
        slots = dict(zip([g for g in inside if g not in waiting], range(first, last), strict=False))
        merged = first + len(slots)
        slots |= {producer: merged, consumer: merged}
        slots |= dict(zip([g for g in inside if g in waiting], range(merged + 1, last + 1), strict=False))
        return [Placement(slots)]

    def _reach(self, start: int, edges: Mapping[int, set[int]], first: int, last: int) -> set[int] | None:
        """Groups strictly between two slots reached from ``start``; None if there are too many to look at."""
        found: set[int] = set()
        stack = [start]
        while stack:
            for g in edges[stack.pop()]:
                if first < self.slot[g] < last and g not in found:
                    found.add(g)
                    stack.append(g)
            if len(found) > _MOST_VISITED:
                return None
        return found

    def ordered(self, groups: Iterable[int]) -> list[int]:
        return sorted(groups, key=lambda g: self.slot[g])

    def operations(self) -> Iterator[Operation]:
        for number in self.order:
            if number is not None:
                yield self.groups[number].op

    # --- live bytes --------------------------------------------------------------------------------------------

    def _timeline(self) -> Bytes:
        change = np.zeros(len(self.order) + 1, dtype=np.int64)
        for b in self.program.buffers:
            span = self.span(b, {})
            if span is not None:
                change[span[0]] += self.nbytes(b)
                change[span[1] + 1] -= self.nbytes(b)
        live = np.cumsum(change)[:-1]
        for number, slot in self.slot.items():
            live[slot] += self.scratch(number)
        return live

    def scratch(self, number: int) -> int:
        op = self.groups[number].op
        return evaluate(op.scratch, self.program.hints) if isinstance(op, Extern) else 0

    def span(
        self,
        buffer: str,
        slots: Mapping[int, int],
        readers: Iterable[int] | None = None,
        writers: Iterable[int] | None = None,
    ) -> tuple[int, int] | None:
        """First and last slot at which a counted buffer lives, with some groups in other slots."""
        if buffer not in self.counted:
            return None
        users = self.readers.get(buffer, ()) if readers is None else readers
        makers = self.writers.get(buffer, ()) if writers is None else writers
        slot = self.slot
        uses = [slots[g] if g in slots else slot[g] for g in users] if slots else [slot[g] for g in users]
        made = [slots[g] if g in slots else slot[g] for g in makers] if slots else [slot[g] for g in makers]
        if buffer in self.donated:
            return (0, max((*uses, *made, 0))) if uses or made else None
        if not made:
            return None
        last = len(self.order) - 1 if buffer in self.program.output_buffers else max((*uses, *made))
        return min(made), last

    def try_change(
        self,
        spans: Iterable[tuple[int, tuple[int, int] | None, tuple[int, int] | None]],
        *,
        ceiling: int,
    ) -> tuple[int, Bytes] | None:
        """The new live bytes of a stretch of slots (its first slot, the values), or None if memory forbids it.

        ``spans`` are (bytes, old span, new span). Refused is what rises anywhere, and there above ``ceiling``.
        """
        changed = [(n, a, b) for n, a, b in spans if a != b]
        ends = [x for _, a, b in changed for s in (a, b) if s is not None for x in s]
        if not ends:
            return 0, self.live[:0]
        low, high = min(ends), max(ends) + 1
        delta = np.zeros(high - low, dtype=np.int64)
        for nbytes, old, new in changed:
            if old is not None:
                delta[old[0] - low : old[1] + 1 - low] -= nbytes
            if new is not None:
                delta[new[0] - low : new[1] + 1 - low] += nbytes
        rising = delta > 0
        values = self.live[low:high] + delta
        if rising.any() and int(values[rising].max()) > ceiling:
            return None
        return low, values

    # --- changes -----------------------------------------------------------------------------------------------

    def merge_spans(
        self, producer: int, consumer: int, place: Placement, dropped: frozenset[str]
    ) -> list[tuple[int, tuple[int, int] | None, tuple[int, int] | None]]:
        """How lifetimes change when the two become one step at that placement."""
        moving = [self.groups[g] for g, slot in place.slots.items() if slot != self.slot[g]]
        touched = dropped.union(*(g.reads for g in moving), *(g.changes for g in moving)) & self.counted
        spans: list[tuple[int, tuple[int, int] | None, tuple[int, int] | None]] = []
        for b in sorted(touched):
            old = self.span(b, {})
            new = None if b in dropped else self.span(b, place.slots)
            spans.append((self.nbytes(b), old, new))
        for g, slot in place.slots.items():
            if scratch := self.scratch(g):
                spans.append((scratch, (self.slot[g], self.slot[g]), (slot, slot)))
        return spans

    def apply_merge(self, producer: int, consumer: int, place: Placement, op: Operation) -> Group:
        """Replace the two groups by one."""
        a, b = self.groups[producer], self.groups[consumer]
        group = self._replace((a, b), op)
        moved = {g: s for g, s in place.slots.items() if g not in (producer, consumer)}
        self.order[self.slot[producer]] = None
        self.order[self.slot[consumer]] = None
        for g in moved:
            self.order[self.slot[g]] = None
        moved[group.number] = place.slots[producer]
        for old in (producer, consumer):
            del self.slot[old]
        for g, s in moved.items():
            self.slot[g] = s
            self.order[s] = g
        return group

    def _replace(self, old: tuple[Group, ...], op: Operation) -> Group:
        """A new group with the old ones' edges."""
        group = self._insert(op)
        numbers = {g.number for g in old}
        for g in old:
            self._unregister(g)
            for e in self.before[g.number]:
                self.after[e].discard(g.number)
                if e not in numbers:
                    self._edge(e, group.number)
            for e in self.after[g.number]:
                self.before[e].discard(g.number)
                if e not in numbers:
                    self._edge(group.number, e)
        for g in old:
            del self.groups[g.number], self.before[g.number], self.after[g.number]
        return group

    def update(self, number: int, op: Operation) -> Group:
        """Another operation in a group's place, with the same edges."""
        slot = self.slot.pop(number)
        group = self._replace((self.groups[number],), op)
        self.slot[group.number] = slot
        self.order[slot] = group.number
        return group

    def inherit(self, producer: int, consumer: int) -> None:
        """The consumer now also waits for what the producer waits for."""
        for e in self.before[producer]:
            self._edge(e, consumer)

    def remove(self, number: int) -> None:
        """Drop a group that nothing needs any more; what came after it still comes after what came before it."""
        group = self.groups.pop(number)
        self._unregister(group)
        for e in self.before[number]:
            self.after[e].discard(number)
        for e in self.after[number]:
            self.before[e].discard(number)
        del self.before[number], self.after[number]
        self.order[self.slot.pop(number)] = None

    def accept(self, low: int, values: Bytes) -> None:
        """Take over the live bytes that `try_change` computed."""
        self.live[low : low + len(values)] = values
