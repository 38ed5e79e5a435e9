"""Packing by time, as an allocator does that knows nothing of the future: the fallback for large problems."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


class _Holes:
    """Free ranges below the top, by size and by address."""

    def __init__(self) -> None:
        self.top = 0
        self._by_size: list[tuple[int, int]] = []  # (size, offset), sorted
        self._size_at: dict[int, int] = {}
        self._end_at: dict[int, int] = {}  # end -> offset

    def _add(self, offset: int, size: int) -> None:
        bisect.insort(self._by_size, (size, offset))
        self._size_at[offset] = size
        self._end_at[offset + size] = offset

    def _remove(self, offset: int) -> int:
        size = self._size_at.pop(offset)
        del self._end_at[offset + size]
        del self._by_size[bisect.bisect_left(self._by_size, (size, offset))]
        return size

    def take(self, size: int) -> int:
        """The offset of the smallest hole that holds ``size``, or the top."""
        at = bisect.bisect_left(self._by_size, (size, 0))
        if at == len(self._by_size):
            offset = self.top
            self.top += size
            return offset
        offset = self._by_size[at][1]
        room = self._remove(offset)
        if room > size:
            self._add(offset + size, room - size)
        return offset

    def give(self, offset: int, size: int) -> None:
        """Free a range, merging it with the holes beside it or with what lies above the top."""
        if offset + size in self._size_at:
            size += self._remove(offset + size)
        if offset in self._end_at:
            before = self._end_at[offset]
            size += self._remove(before)
            offset = before
        if offset + size == self.top:
            self.top = offset
        else:
            self._add(offset, size)


def sweep(lower: Sequence[int], upper: Sequence[int], size: Sequence[int]) -> list[int]:
    """Offsets for buffers of sizes above zero alive in ``[lower, upper)``; of those that begin together, the longest
    lived first."""
    starts = sorted(range(len(size)), key=lambda i: (lower[i], -upper[i], i))
    ends = sorted(range(len(size)), key=lambda i: (upper[i], i))
    offsets = [0] * len(size)
    holes = _Holes()
    ended = 0
    for index in starts:
        while upper[ends[ended]] <= lower[index]:
            holes.give(offsets[ends[ended]], size[ends[ended]])
            ended += 1
        offsets[index] = holes.take(size[index])
    return offsets
