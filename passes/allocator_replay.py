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


@dataclass(frozen=True, slots=True)
class Requests:
    """One step: ``sizes[k] >= 0`` allocates that many bytes under ``keys[k]``, ``FREE`` frees the key again, and
    ``RESERVE`` makes the reserve free, see `top_up`.

    ``resident`` is allocated before the first step and stays. A step that is repeated frees all its keys.
    """

    resident: tuple[int, ...]
    keys: tuple[int, ...]
    sizes: tuple[int, ...]
    #: keys of what an optimiser takes, in its order
    gradients: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, resident: Sequence[int], events: Sequence[tuple[Hashable, int]], gradients: Sequence[Hashable] = ()
    ) -> Requests:
        """From (any key, bytes or ``FREE`` or ``RESERVE``) pairs."""
        numbers: dict[Hashable, int] = {}
        keys = tuple(numbers.setdefault(key, len(numbers)) for key, _ in events)
        return cls(tuple(resident), keys, tuple(size for _, size in events), tuple(numbers[key] for key in gradients))

    def accumulated(self, *, steps: int = 3, passes: int = 2, states: int = 2) -> Requests:
        """Some steps one after the other, each of which accumulates the gradients of some passes and then updates.

        As in `memplan.passes.reserved.optimizer_step_memory`: the gradients of the first pass are held, those of a
        later one all live before they are added; the optimiser makes its states in the first step, which stay, and in
        each one a temporary for each gradient.
        """
        keys, sizes = np.array(self.keys, dtype=np.int64), np.array(self.sizes, dtype=np.int64)
        taken = np.array(self.gradients, dtype=np.int64)
        count = int(keys.max(initial=-1)) + 1
        made = np.zeros(count, dtype=np.int64)
        made[keys[sizes >= 0]] = sizes[sizes >= 0]
        holds = (sizes == FREE) & np.isin(keys, taken)
        pieces: list[tuple[Int64, Int64]] = []
        for step in range(steps):
            pieces += [(keys[~holds], sizes[~holds])]
            pieces += [(keys + count, sizes)] * (passes - 1)
            if step == 0:
                state = taken[:, None] + (2 + np.arange(states)) * count
                pieces.append((state.ravel(), made[taken].repeat(states)))
            update, free = taken + (2 + states) * count, np.full(len(taken), FREE)
            pieces += [(update, made[taken]), (update, free), (taken, free)]
        all_keys, all_sizes = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Requests(self.resident, tuple(all_keys.tolist()), tuple(all_sizes.tolist()))


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
        keys = np.array(requests.keys, dtype=np.int32)
        sizes = np.array(requests.sizes, dtype=np.int64)
        resident = np.array(requests.resident, dtype=np.int64)
        out = np.zeros(2, dtype=np.int64)
        self._library.memplan_replay(
            ctypes.c_int32(len(keys)), ctypes.c_void_p(keys.ctypes.data), ctypes.c_void_p(sizes.ctypes.data),
            ctypes.c_int32(max(requests.keys, default=-1) + 1), ctypes.c_int32(len(resident)),
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
    for size in requests.resident:
        allocator.alloc(size)
    live: dict[int, int] = {}
    for _ in range(steps):
        for key, size in zip(requests.keys, requests.sizes, strict=True):
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
