"""Addresses to draw and to export: pools at their planned offsets, own allocations first fit beside them."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from .allocation import rounded
from .model import Graph, Storage


@dataclass(frozen=True, slots=True)
class Lane:
    """A stretch of addresses: a pool, or all own allocations of a device. ``[birth, death)`` in steps."""

    name: str
    device: str
    nbytes: int
    birth: int
    death: int
    pool: bool


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


def first_fit(storages: list[Storage]) -> tuple[list[int], int]:
    """The lowest free offset for each storage, in order of birth; and the bytes that all of them span."""
    taken: list[tuple[int, int, int]] = []  # (offset, end, death), by offset, of what is alive
    deaths: list[int] = []  # of what is alive, sorted, to know when a sweep is due
    offsets, top = [], 0
    for s in storages:
        if deaths and deaths[0] <= s.birth:
            taken = [t for t in taken if t[2] > s.birth]
            deaths = deaths[bisect.bisect_right(deaths, s.birth) :]
        need = max(rounded(s.nbytes, s.device), 1)
        offset = 0
        for start, stop, _ in taken:
            if start - offset >= need:
                break
            offset = max(offset, stop)
        bisect.insort(taken, (offset, offset + need, s.death))
        bisect.insort(deaths, s.death)
        offsets.append(offset)
        top = max(top, offset + need)
    return offsets, top
