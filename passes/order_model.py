"""Graphs of operations and buffers to be put in order, and the peak of live bytes that an order has.

The model: running an operation allocates its outputs and its scratch while its inputs live; a buffer is freed after
its last consumer unless it is kept; an output may take the storage of an input that dies at that operation.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.errors import PlanningError

LARGEST_TOTAL = 2**61


@dataclass(frozen=True, slots=True)
class OrderBuffer:
    """One storage.

    Parameters
    ----------
    size
        Bytes.
    producer
        Index of the operation that writes it first; -1 for an input, which is live before the first operation.
    consumers
        Operations that need it, views included.
    kept
        Stays live after its last consumer (an output, or an input that the caller keeps). An input without consumers
        stays live too: nothing frees it. To leave inputs out of the count, give them no bytes.
    """

    size: int
    producer: int
    consumers: tuple[int, ...] = ()
    kept: bool = False


@dataclass(frozen=True, slots=True)
class InPlacePair:
    """``output`` may take over the storage of ``input`` at ``op``, if ``input`` dies there (indices of buffers)."""

    op: int
    output: int
    input: int


@dataclass(frozen=True, slots=True)
class OrderGraph:
    """Operations ``0 .. ops - 1`` in program order, and their buffers.

    Parameters
    ----------
    edges
        Pairs ``(earlier, later)`` beyond those that producers and consumers imply.
    scratch
        Bytes that each operation takes while it runs; empty for none.
    in_place
        Which outputs may take over which inputs; at one operation each output and each input is used at most once.
        They are put in the order in which they are used: what saves most first, between equals as they are given. So
        to free more before an operation never costs memory there, which the exact searches build upon.

    Raises
    ------
    PlanningError
        An index is out of range, a size is negative or no whole number, or the sizes overflow 64 bits.
    """

    ops: int
    buffers: tuple[OrderBuffer, ...]
    edges: tuple[tuple[int, int], ...] = ()
    scratch: tuple[int, ...] = ()
    in_place: tuple[InPlacePair, ...] = ()

    def __post_init__(self) -> None:
        if self.scratch and len(self.scratch) != self.ops:
            raise PlanningError(f"scratch has {len(self.scratch)} entries for {self.ops} operations")
        if min(self.scratch, default=0) < 0:
            raise PlanningError("scratch must not be negative")
        total = sum(self.scratch)
        for index, buffer in enumerate(self.buffers):
            if isinstance(buffer.size, float):
                raise PlanningError(f"buffer {index}: the size must be a whole number, found {buffer.size}")
            if buffer.size < 0:
                raise PlanningError(f"buffer {index}: negative size {buffer.size}")
            if not -1 <= buffer.producer < self.ops:
                raise PlanningError(f"buffer {index}: there is no operation {buffer.producer}")
            for consumer in buffer.consumers:
                if not 0 <= consumer < self.ops:
                    raise PlanningError(f"buffer {index}: there is no operation {consumer}")
            total += buffer.size
        if total >= LARGEST_TOTAL:
            raise PlanningError(f"the sizes add up to {total} bytes, more than 64-bit sums can hold safely")
        for edge in self.edges:
            if not all(0 <= end < self.ops for end in edge):
                raise PlanningError(f"edge {edge}: there is no such operation")
        self._check_in_place()

    def _check_in_place(self) -> None:
        for pair in self.in_place:
            if not (0 <= pair.output < len(self.buffers) and 0 <= pair.input < len(self.buffers)):
                raise PlanningError(f"in-place pair {pair}: there is no such buffer")
            if self.buffers[pair.output].producer != pair.op or pair.op not in self.buffers[pair.input].consumers:
                raise PlanningError(f"in-place pair {pair}: the operation does not write the one and read the other")
        used = sorted(self.in_place, key=lambda p: -min(self.buffers[p.input].size, self.buffers[p.output].size))
        object.__setattr__(self, "in_place", tuple(used))

    def initial_bytes(self) -> int:
        """Bytes live before the first operation."""
        return sum(buffer.size for buffer in self.buffers if buffer.producer < 0)


@dataclass(frozen=True, slots=True)
class Adjacency:
    """Neighbours of each operation, without repetition, in rising order."""

    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


def adjacency(graph: OrderGraph) -> Adjacency:
    """Predecessors, successors, buffers read and buffers made, by operation."""
    before: list[set[int]] = [set() for _ in range(graph.ops)]
    inputs: list[list[int]] = [[] for _ in range(graph.ops)]
    outputs: list[list[int]] = [[] for _ in range(graph.ops)]
    for index, buffer in enumerate(graph.buffers):
        if buffer.producer >= 0:
            outputs[buffer.producer].append(index)
        for consumer in dict.fromkeys(buffer.consumers):
            inputs[consumer].append(index)
            if buffer.producer >= 0:
                before[consumer].add(buffer.producer)
    for earlier, later in graph.edges:
        before[later].add(earlier)
    after: list[list[int]] = [[] for _ in range(graph.ops)]
    for op, earlier_ops in enumerate(before):
        for earlier in earlier_ops:
            after[earlier].append(op)
    return Adjacency(
        tuple(tuple(sorted(ops)) for ops in before),
        tuple(tuple(ops) for ops in after),
        tuple(map(tuple, inputs)),
        tuple(map(tuple, outputs)),
    )


def topological_order(graph: OrderGraph, near: Adjacency | None = None) -> tuple[int, ...]:
    """The order of operations closest to their numbering: always the smallest index that is ready.

    Raises
    ------
    PlanningError
        The graph has a cycle; the message shows one.
    """
    near = near or adjacency(graph)
    waiting = [len(ops) for ops in near.before]
    ready = [op for op in range(graph.ops) if waiting[op] == 0]
    order: list[int] = []
    while ready:
        op = heapq.heappop(ready)
        order.append(op)
        for later in near.after[op]:
            waiting[later] -= 1
            if waiting[later] == 0:
                heapq.heappush(ready, later)
    if len(order) < graph.ops:
        cycle = _cycle(near, [op for op in range(graph.ops) if waiting[op] > 0])
        raise PlanningError("the graph has a cycle: " + " -> ".join(map(str, cycle)))
    return tuple(order)


def _cycle(near: Adjacency, blocked: Sequence[int]) -> list[int]:
    """A cycle among operations that each wait for another of them."""
    stuck = set(blocked)
    seen: dict[int, int] = {}
    walk: list[int] = []
    op = blocked[0]
    while op not in seen:
        seen[op] = len(walk)
        walk.append(op)
        op = next(earlier for earlier in near.before[op] if earlier in stuck)
    found = walk[seen[op] :]
    shown = found if len(found) <= 12 else found[:12]
    return [op, *reversed(shown)]


def is_order(graph: OrderGraph, order: Sequence[int]) -> bool:
    """Whether ``order`` runs every operation once and none before what it needs."""
    place = {op: index for index, op in enumerate(order)}
    if len(place) != graph.ops or len(order) != graph.ops:
        return False
    return all(place[a] < place[b] for b, ops in enumerate(adjacency(graph).before) for a in ops)


class Walk:
    """Live bytes while operations run one after the other."""

    def __init__(self, graph: OrderGraph, near: Adjacency) -> None:
        self._graph = graph
        self._near = near
        self._left = [len(set(buffer.consumers)) for buffer in graph.buffers]
        self._pairs: dict[int, list[InPlacePair]] = {}
        for pair in graph.in_place:
            self._pairs.setdefault(pair.op, []).append(pair)
        self.live = graph.initial_bytes()

    def left(self, buffer: int) -> int:
        """Consumers of ``buffer`` that have not run."""
        return self._left[buffer]

    def effect(self, op: int) -> tuple[int, int]:
        """``(transient, net)`` of running ``op`` now: bytes above the live ones while it runs, and change after it."""
        buffers = self._graph.buffers
        transient = self._graph.scratch[op] if self._graph.scratch else 0
        net = 0
        for index in self._near.outputs[op]:
            buffer = buffers[index]
            transient += buffer.size
            if buffer.kept or self._left[index]:
                net += buffer.size
        for index in self._near.inputs[op]:
            if self._left[index] == 1 and not buffers[index].kept:
                net -= buffers[index].size
        taken: set[int] = set()
        for pair in self._pairs.get(op, ()):
            if self._left[pair.input] != 1 or buffers[pair.input].kept or taken & {pair.input, pair.output}:
                continue
            taken |= {pair.input, pair.output}
            transient -= min(buffers[pair.input].size, buffers[pair.output].size)
        return transient, net

    def run(self, op: int) -> int:
        """Run ``op``; returns the bytes live while it ran."""
        transient, net = self.effect(op)
        during = self.live + transient
        self.live += net
        for index in self._near.inputs[op]:
            self._left[index] -= 1
        return during


def live_bytes(graph: OrderGraph, order: Sequence[int], near: Adjacency | None = None) -> list[int]:
    """Bytes live while each step of ``order`` runs."""
    walk = Walk(graph, near or adjacency(graph))
    return [walk.run(op) for op in order]


def peak_bytes(graph: OrderGraph, order: Sequence[int], near: Adjacency | None = None) -> int:
    """The largest of `live_bytes`, or the bytes live before the first step where those are more."""
    return max([graph.initial_bytes(), *live_bytes(graph, order, near)])
