"""Addresses to draw and to export: pools at their planned offsets, own allocations first fit beside them."""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass

from .allocation import rounded
from .model import Buffer, Graph, Storage
from .text import clean

#: An address beyond all that can be asked for.
_END = 1 << 80


@dataclass(frozen=True, slots=True)
class Lane:
    """A stretch of addresses: a pool, or all own allocations of a device. ``[birth, death)`` in steps."""

    name: str
    device: str
    nbytes: int
    birth: int
    death: int
    pool: bool

    @property
    def short(self) -> str:
        """Its name where there is little room."""
        return clean(self.name.rpartition(":")[2] if self.pool else "own", 14)


@dataclass(frozen=True, slots=True)
class Placed:
    """A storage at ``offset`` bytes from the start of lane number ``lane``."""

    storage: Storage
    lane: int
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    lanes: tuple[Lane, ...]
    placed: tuple[Placed, ...]


def layout(graph: Graph) -> Layout:
    """Every counted storage with an address; storages alive at once never overlap outside of pools.

    Offsets of own allocations are ours (lowest free address first), since no plan decides them: the device allocator
    will. Offsets in pools are the plan's.
    """
    end = len(graph.steps) + 1
    lanes = [Lane(p.name, p.device, p.nbytes, p.birth, p.death, True) for p in graph.pools]
    number = {lane.name: k for k, lane in enumerate(lanes)}
    counted = [s for s in graph.storages if s.counted]
    placed = [Placed(s, number[s.pool], s.offset or 0) for s in counted if s.pool is not None]
    for device in dict.fromkeys(s.device for s in counted if s.pool is None):
        mine = [s for s in counted if s.pool is None and s.device == device]
        offsets, top = first_fit(mine)
        placed += [Placed(s, len(lanes), offset) for s, offset in zip(mine, offsets, strict=True)]
        lanes.append(Lane(f"own allocations on {device}", device, top, 0, end, False))
    return Layout(tuple(lanes), tuple(placed))


@dataclass(frozen=True, slots=True)
class Box:
    """One buffer over the steps in which its storage is its own: until it dies or is written over in place."""

    buffer: Buffer
    storage: int
    lane: int
    offset: int
    nbytes: int
    birth: int
    death: int


def boxes(graph: Graph, plan: Layout) -> list[Box]:
    """What is drawn, in the order of ``plan.placed``; ``storage`` numbers those. No two boxes overlap in a lane."""
    found: list[Box] = []
    for number, item in enumerate(plan.placed):
        members = [graph.by_name[m] for m in item.storage.members]
        ends = [m.birth for m in members[1:]] + [item.storage.death]
        for b, end in zip(members, ends, strict=True):
            if end > b.birth:  # else taken over in the step that made it: there is nothing to see
                found.append(Box(b, number, item.lane, item.offset, item.storage.nbytes, b.birth, end))
    return found


def boundaries(graph: Graph) -> list[tuple[int, str]]:
    """The first step and the name of each graph of a whole step; nothing where there is one graph."""
    found: list[tuple[int, str]] = []
    before = ""
    for k, step in enumerate(graph.steps):
        if step.graph != before:
            found.append((k, clean(step.graph)))
            before = step.graph
    return found if len(found) > 1 else []


class FreeList:
    """Free stretches ``[start, stop)`` of an axis without end, by address; neighbours are merged."""

    def __init__(self) -> None:
        self.starts: list[int] = [0]
        self.stops: list[int] = [_END]

    def take(self, nbytes: int) -> int:
        """The lowest address with ``nbytes`` free bytes; they are taken."""
        k = next(k for k, start in enumerate(self.starts) if self.stops[k] - start >= nbytes)
        start = self.starts[k]
        if self.stops[k] - start == nbytes:
            del self.starts[k], self.stops[k]
        else:
            self.starts[k] = start + nbytes
        return start

    def give(self, start: int, stop: int) -> None:
        """Free ``[start, stop)``."""
        k = bisect.bisect_left(self.starts, start)
        if k < len(self.starts) and self.starts[k] == stop:
            self.starts[k] = start
        else:
            self.starts.insert(k, start)
            self.stops.insert(k, stop)
        if k > 0 and self.stops[k - 1] == start:
            self.stops[k - 1] = self.stops[k]
            del self.starts[k], self.stops[k]


def first_fit(storages: list[Storage]) -> tuple[list[int], int]:
    """The lowest free offset for each storage, in order of birth; and the bytes that all of them span."""
    free = FreeList()
    alive: list[tuple[int, int, int]] = []  # a heap of (death, offset, end)
    offsets, top = [], 0
    for s in storages:
        while alive and alive[0][0] <= s.birth:
            _, start, stop = heapq.heappop(alive)
            free.give(start, stop)
        need = max(rounded(s.nbytes, s.device), 1)
        offset = free.take(need)
        heapq.heappush(alive, (s.death, offset, offset + need))
        offsets.append(offset)
        top = max(top, offset + need)
    return offsets, top
