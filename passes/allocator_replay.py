"""A step's requests in the simulated device allocator, several steps in a row: how much is reserved in the end.

The compiled half is `allocator_replay.cpp` (the same rules as `memplan.passes.allocator`, a test compares them);
without a compiler the simulator in Python does the same, some thirty times slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memplan.ir.plan import RESERVE_PART, RESERVE_STEP

from .allocator import CachingAllocator

Int64 = NDArray[np.int64]
SOURCE = Path(__file__).with_name("allocator_replay.cpp")
#: In place of a size: what is allocated under the key is freed; the reserve is made free.
FREE, RESERVE = -1, -2


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """One step: ``sizes[k] >= 0`` allocates that many bytes under ``keys[k]``, ``FREE`` frees the key again, and
    ``RESERVE`` makes the reserve free, see `top_up`.

    ``resident`` is allocated before the first step and stays. A step that is repeated frees all its keys.
    """

    resident: Int64
    keys: Int64
    sizes: Int64
    #: keys of what an optimiser takes, in its order
    gradients: Int64

    @classmethod
    def of(
        cls, resident: Sequence[int], events: Sequence[tuple[Hashable, int]], gradients: Sequence[Hashable] = ()
    ) -> Requests:
        """From (any key, bytes or ``FREE`` or ``RESERVE``) pairs."""
        numbers: dict[Hashable, int] = {}
        keys = [numbers.setdefault(key, len(numbers)) for key, _ in events]
        columns = (resident, keys, [size for _, size in events], [numbers[key] for key in gradients])
        return cls(*(np.array(column, dtype=np.int64) for column in columns))

    def accumulated(self, *, steps: int = 3, passes: int = 2, states: int = 2) -> Requests:
        """Some steps one after the other, each of which accumulates the gradients of some passes and then updates.

        As in `memplan.passes.reserved.optimizer_step_memory`: the gradients of the first pass are held, those of a
        later one all live before they are added; the optimiser makes its states in the first step, which stay, and in
        each one a temporary for each gradient.
        """
        keys, sizes, taken = self.keys, self.sizes, self.gradients
        count = int(keys.max(initial=-1)) + 1
        made = np.zeros(count, dtype=np.int64)
        made[keys[sizes >= 0]] = sizes[sizes >= 0]
        is_taken = np.zeros(count, dtype=np.bool_)
        is_taken[taken] = True
        goes = (sizes != FREE) | ~is_taken[keys]
        pieces: list[tuple[Int64, Int64]] = []
        for step in range(steps):
            pieces += [(keys[goes], sizes[goes])]
            pieces += [(keys + count, sizes)] * (passes - 1)
            if step == 0:
                state = taken[:, None] + (2 + np.arange(states)) * count
                pieces.append((state.ravel(), made[taken].repeat(states)))
            update, free = taken + (2 + states) * count, np.full(len(taken), FREE)
            pieces += [(update, made[taken]), (update, free), (taken, free)]
        all_keys, all_sizes = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Requests(self.resident, all_keys, all_sizes, taken[:0])

    def allocated(self) -> Int64:
        """For each event the bytes that it makes or, negative, frees."""
        order = np.argsort(self.keys, kind="stable")
        keys, sizes = self.keys[order], self.sizes[order]
        before = np.concatenate(([0], np.where(keys[1:] == keys[:-1], np.maximum(sizes[:-1], 0), 0)))[: len(keys)]
        found = np.zeros(len(keys), dtype=np.int64)
        found[order] = np.where(sizes == FREE, -before, np.maximum(sizes, 0))
        return found


@dataclass(frozen=True, slots=True)
class Replayed:
    """Bytes: the most that segments had, and the most that was allocated at once."""

    reserved: int
    live: int


class NativeReplay:
    """The compiled replay."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.memplan_replay.restype = None

    def run(self, requests: Requests, reserve: int, steps: int) -> Replayed:
        keys, sizes = requests.keys.astype(np.int32), np.ascontiguousarray(requests.sizes)
        resident = np.ascontiguousarray(requests.resident)
        out = np.zeros(2, dtype=np.int64)
        self._library.memplan_replay(
            ctypes.c_int32(len(keys)), ctypes.c_void_p(keys.ctypes.data), ctypes.c_void_p(sizes.ctypes.data),
            ctypes.c_int32(int(keys.max(initial=-1)) + 1), ctypes.c_int32(len(resident)),
            ctypes.c_void_p(resident.ctypes.data), ctypes.c_int64(reserve), ctypes.c_int32(steps),
            ctypes.c_void_p(out.ctypes.data),
        )  # fmt: skip
        return Replayed(int(out[0]), int(out[1]))


def replay_steps(requests: Requests, *, reserve: int = 0, steps: int, native: NativeReplay | None) -> Replayed:
    """Run the step's requests ``steps`` times over.

    Parameters
    ----------
    reserve:
        Bytes that are made free where the requests say so, in one request for what is lacking: see `top_up`.
    """
    if native is not None:
        return native.run(requests, reserve, steps)
    allocator = CachingAllocator()
    for size in requests.resident.tolist():
        allocator.alloc(size)
    live: dict[int, int] = {}
    for _ in range(steps):
        for key, size in zip(requests.keys.tolist(), requests.sizes.tolist(), strict=True):
            if size >= 0:
                live[key] = allocator.alloc(size)
            elif size == FREE:
                allocator.free(live.pop(key))
            else:
                top_up(allocator, reserve)
    return Replayed(allocator.stats.peak_reserved, allocator.stats.peak_allocated)


def top_up(allocator: CachingAllocator, wanted: int) -> None:
    """Have ``wanted`` bytes free in large blocks: what is lacking is allocated in one piece and freed.

    Blocks under a part of what is wanted (`RESERVE_PART`) do not count. They are the gaps between parameters, or what
    small allocations have left, and no large request of the step fits into them. Where something is lacking, segments
    that nothing is in go back to the device first, so that the one piece has their bytes too.
    """
    if wanted > 0 and _lacking(allocator, wanted) > 0:
        allocator.empty_cache()
        allocator.free(allocator.alloc(_lacking(allocator, wanted)))


def _lacking(allocator: CachingAllocator, wanted: int) -> int:
    return (wanted - allocator.free_in_blocks(wanted // RESERVE_PART)) // RESERVE_STEP * RESERVE_STEP
