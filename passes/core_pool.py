"""A pool of what lives across calls that allocate their own results.

Such a call (attention, a convolution's gradients) takes its room from the device's allocator. A pool of everything has
no room to give while it runs, and holds what it gained by that on top; own allocations of everything leave holes of
wrong sizes. So the *core*, what lives on from before such a call until after it, lies in one pool, made first so that
it lies at the end of a segment; the rest comes and goes between the calls, and finds the same room in every layer.

The core's room is not full in the first and the last layers, where the pool would make the peak: there others are
moved into it, and members in their way out of it, for as long as that lowers the peak.

A *wide* pool has one more place, for what comes between the calls beside something large: the result of a product that
a normalisation is written over, and that the next, four times as large, is made from. Where such lay now here, now
there, the large one would find no room in one piece.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from ..ir.plan import Lifetime, Pool
from .pack import PackProblem, pack_buffers
from .pack_search import PackSearch
from .pools import ALIGNMENT, Pooled, aligned
from .schedule import Storage, rounded

#: Moves into the pool, the storages that are tried for each, at so many places; storages that may fill gaps: bounds on
#: the work, so that it grows with the program's length alone.
MOST_MOVES, MOST_TRIED, MOST_PLACES, MOST_FILLED = 16, 6, 32, 128
#: The moves into a wide pool: what uses its further place in every layer.
MOST_MOVES_WIDE = 96


def core_pool(
    movable: Sequence[Storage],
    calls: Sequence[int],
    alive: NDArray[np.int64],
    device: str,
    *,
    native: PackSearch | None,
    name: str,
    wide: bool = False,
) -> Pooled:
    """The pool of a program's core on one device; none for a core of one storage, if the pool is not wide, or of none.

    Parameters
    ----------
    movable:
        What may lie in a pool.
    calls:
        Steps whose calls allocate their own results.
    alive:
        Bytes alive in each step, with every storage its own allocation.
    wide:
        With room for what lives across a call and one more of the most common size, not for all that ever meets.
    """
    before = np.zeros(len(alive) + 2, dtype=np.int64)
    before[np.asarray(calls, dtype=np.int64) + 1] = 1
    before = np.cumsum(before)  # calls before each step
    core = [s for s in movable if before[max(s.lifetime.stop - 1, s.lifetime.start + 1)] > before[s.lifetime.start + 1]]
    if len(core) < (1 if wide else 2):
        return Pooled()
    if wide:
        found = _Core(movable, alive.copy(), rounded(_across(core, calls) + _common(movable), device))
        found.fill(sorted(core, key=lambda s: (-s.nbytes * (s.lifetime.stop - s.lifetime.start), s.root)))
    else:
        starts, stops = (tuple(getattr(s.lifetime, end) for s in core) for end in ("start", "stop"))
        problem = PackProblem(starts, stops, tuple(aligned(s.nbytes) for s in core), ALIGNMENT)
        packing = pack_buffers(problem, native=native)
        found = _Core(movable, alive.copy(), rounded(packing.arena, device))
        for s, offset in zip(core, packing.offsets, strict=True):
            found.add(s, offset)
    for _ in range(MOST_MOVES_WIDE if wide else MOST_MOVES):
        if not found.move():
            break
    found.fill(found.others())
    if len(found.members) < 2:
        return Pooled()
    offsets = {root: (name, offset) for root, (_, offset) in found.members.items()}
    return Pooled((Pool(name, found.size, device, Lifetime(0, found.stop)),), offsets)


def _across(core: Sequence[Storage], calls: Sequence[int]) -> int:
    """The most bytes of the core that are alive before, in and after one of the calls."""
    load = np.zeros(max(max(s.lifetime.stop for s in core), *calls) + 2, dtype=np.int64)
    for s in core:
        load[s.lifetime.start + 1] += aligned(s.nbytes)
        load[max(s.lifetime.stop - 1, s.lifetime.start + 1)] -= aligned(s.nbytes)
    return int(np.cumsum(load)[np.asarray(calls, dtype=np.int64)].max())


def _common(movable: Sequence[Storage]) -> int:
    """The size of most bytes."""
    found: Counter[int] = Counter()
    for s in movable:
        found[aligned(s.nbytes)] += s.nbytes
    return max(found.items(), key=itemgetter(1, 0))[0]


@dataclass
class _Core:
    movable: Sequence[Storage]
    #: bytes alive in each step outside of the pool
    outside: NDArray[np.int64]
    size: int
    members: dict[str, tuple[Storage, int]] = field(default_factory=dict)

    def add(self, one: Storage, place: int) -> None:
        self.members[one.root] = (one, place)
        self.outside[one.lifetime.start : one.lifetime.stop] -= one.nbytes

    def drop(self, one: Storage) -> None:
        del self.members[one.root]
        self.outside[one.lifetime.start : one.lifetime.stop] += one.nbytes

    @property
    def stop(self) -> int:
        return max((s.lifetime.stop for s, _ in self.members.values()), default=0)

    def total(self) -> NDArray[np.int64]:
        """Bytes alive in each step; the pool is made at the start."""
        total = self.outside.copy()
        total[: self.stop] += self.size
        return total

    def move(self) -> bool:
        """Put one storage that is alive at the peak into the pool, whatever is in its way out: if the peak is lower."""
        total = self.total()
        peak, step = int(total.max()), int(total.argmax())
        fitting = [
            s
            for s in self.movable
            if s.lifetime.start <= step < s.lifetime.stop
            and s.root not in self.members
            and aligned(s.nbytes) <= self.size
        ]
        best, least = None, (peak, int(np.count_nonzero(total == peak)))
        for one in sorted(fitting, key=lambda s: (-s.nbytes, s.root))[:MOST_TRIED]:
            for place, out in self.places(one):
                changed = self.changed(one, out)
                rank = (int(changed.max()), int(np.count_nonzero(changed >= peak)))
                if rank < least:
                    best, least = (one, place, out), rank
        if best is None:
            return False
        one, place, out = best
        for s in out:
            self.drop(s)
        self.add(one, place)
        return True

    def places(self, one: Storage) -> list[tuple[int, list[Storage]]]:
        """Where a storage could lie, at the start or next to a member, and the members that would have to go."""
        besides, length = self.besides(one), aligned(one.nbytes)
        edges = {0, *itertools.chain.from_iterable((at, at + aligned(s.nbytes)) for s, at in besides)}
        places = sorted(p for p in edges if p + length <= self.size)[:MOST_PLACES]
        return [(p, [s for s, at in besides if at < p + length and p < at + aligned(s.nbytes)]) for p in places]

    def changed(self, one: Storage, out: Sequence[Storage]) -> NDArray[np.int64]:
        """`total` with one more member, and without some."""
        gone = {s.root for s in out}
        stop = max(one.lifetime.stop, *(s.lifetime.stop for s, _ in self.members.values() if s.root not in gone), 0)
        total = self.outside.copy()
        total[:stop] += self.size
        total[one.lifetime.start : one.lifetime.stop] -= one.nbytes
        for s in out:
            total[s.lifetime.start : s.lifetime.stop] += s.nbytes
        return total

    def others(self) -> list[Storage]:
        """What may fill gaps, the largest first."""
        stop = self.stop
        others = [s for s in self.movable if s.root not in self.members and s.lifetime.stop <= stop]
        return sorted(others, key=lambda s: (-s.nbytes, s.root))[:MOST_FILLED]

    def fill(self, order: Sequence[Storage]) -> None:
        """What fits into the gaps lies there."""
        for one in order:
            place = 0
            for s, at in sorted(self.besides(one), key=itemgetter(1)):
                if place + aligned(one.nbytes) <= at:
                    break
                place = max(place, at + aligned(s.nbytes))
            if place + aligned(one.nbytes) <= self.size:
                self.add(one, place)

    def besides(self, one: Storage) -> list[tuple[Storage, int]]:
        """The members that are alive with it, and where they lie."""
        life = one.lifetime
        return [m for m in self.members.values() if m[0].lifetime.start < life.stop and life.start < m[0].lifetime.stop]
