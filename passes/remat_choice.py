"""One item for each run of segments: the least time whose live bytes stay within a limit at every moment.

While the backward of the segments ``[i, j)`` runs, alive are what the segments before ``i`` keep, the run's own bytes
and the results of the segments from ``j`` on, which have run. So whether an item may be taken depends on the rest of
the choice through one number alone, the bytes kept before it, and a dynamic programme over (segment, bytes kept so far)
finds the best choice of runs and items together. States are merged where their bytes differ by less than a part of the
limit, the fastest is kept with its exact bytes: what is found never exceeds the limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .remat_menu import Item, Menus

#: States that are told apart by their bytes.
_STATES = 512
_COARSE_STATES = 64
_PROBES = 24
#: Transitions that one choice may look at: the more options, the fewer states are told apart.
_MOST_WORK = 2_000_000


@dataclass(frozen=True, slots=True)
class Choice:
    """``runs``: (first segment, number of segments, item). ``peak`` in bytes, ``microseconds`` of recomputation."""

    runs: tuple[tuple[int, int, Item], ...]
    peak: int
    microseconds: float


@dataclass
class _Table:
    """The best way to each segment: exact bytes and time by state, and where each came from."""

    nbytes: NDArray[np.int64]
    microseconds: NDArray[np.float64]
    origin: NDArray[np.int64]  # option number
    state: NDArray[np.int64]  # state of the run's start


def _table(states: int) -> _Table:
    whole = np.zeros(states, dtype=np.int64)
    return _Table(whole, np.zeros(states, dtype=np.float64), whole, whole)


@dataclass
class Choices:
    """Choices for any limit, over one set of menus."""

    menus: Menus
    options: list[tuple[int, int, Item]] = field(default_factory=list)
    _by_end: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = self.menus.segments.count
        self._by_end = [[] for _ in range(count + 1)]
        for start in range(count):
            for length in self.menus.runs:
                if start + length <= count:
                    for item in self.menus.menu(start, length):
                        self._by_end[start + length].append(len(self.options))
                        self.options.append((start, length, item))

    @cached_property
    def fastest(self) -> Choice:
        """Without a limit."""
        found = self.within(1 << 62)
        assert found is not None
        return found

    @cached_property
    def least(self) -> Choice:
        """The choice of (nearly) the lowest peak there is."""
        best = self.fastest
        low = 0
        for _ in range(_PROBES):
            middle = (low + best.peak) // 2
            found = self.within(middle, _COARSE_STATES)
            if found is None:
                low = middle
            else:
                best = found
            if best.peak - low <= best.peak // 256:
                break
        return best

    def within(self, limit: int, states: int = _STATES) -> Choice | None:
        """The fastest choice whose peak is at most ``limit`` bytes; None if none was found."""
        states = max(_COARSE_STATES, min(states, _MOST_WORK // max(1, len(self.options))))
        count = self.menus.segments.count
        tables = [_table(1)]
        for end in range(1, count + 1):
            table = self._step(tables, end, limit, states)
            tables.append(table)
        if not len(tables[-1].nbytes):
            return None
        return self._trace(tables)

    def _step(self, tables: list[_Table], end: int, limit: int, states: int) -> _Table:
        parts: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]] = []
        born = self.menus.segments.born
        for number in self._by_end[end]:
            start, _, item = self.options[number]
            source = tables[start]
            room = limit - max(item.forward, item.backward + born[end])
            fits = np.flatnonzero(source.nbytes <= room)
            if len(fits):
                parts.append(
                    (
                        source.nbytes[fits] + item.nbytes,
                        source.microseconds[fits] + item.microseconds,
                        np.full(len(fits), number, dtype=np.int64),
                        fits,
                    )
                )
        if not parts:
            return _table(0)
        nbytes, microseconds, origin, state = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((nbytes, microseconds))
        bucket = nbytes * states // max(1, min(limit, int(nbytes.max()) + 1))
        _, first = np.unique(bucket[order], return_index=True)
        best = order[first]
        # more bytes are only worth having for less time
        keep = best[_improving(microseconds[best])]
        return _Table(nbytes[keep], microseconds[keep], origin[keep], state[keep])

    def _trace(self, tables: list[_Table]) -> Choice:
        end = len(tables) - 1
        state = int(np.lexsort((tables[end].nbytes, tables[end].microseconds))[0])
        microseconds = float(tables[end].microseconds[state])
        runs: list[tuple[int, int, Item]] = []
        while end > 0:
            option = self.options[int(tables[end].origin[state])]
            state = int(tables[end].state[state])
            runs.append(option)
            end = option[0]
        runs.reverse()
        return Choice(tuple(runs), self.peak(runs), microseconds)

    def peak(self, runs: list[tuple[int, int, Item]]) -> int:
        """Largest live bytes of a choice."""
        born = self.menus.segments.born
        before = peak = 0
        for start, length, item in runs:
            peak = max(peak, before + max(item.forward, item.backward + born[start + length]))
            before += item.nbytes
        return peak


def _improving(microseconds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Of entries by rising bytes, those that are faster than all before them."""
    lowest = np.minimum.accumulate(microseconds)
    found = np.ones(len(microseconds), dtype=np.bool_)
    found[1:] = microseconds[1:] < lowest[:-1]
    return found
