"""The compiled half of packing, `pack_*.cpp`, through ctypes.

Passes do not build libraries. Whoever does hands the path of the built library to `PackSearch`; without one,
`memplan.passes.pack` goes on with its heuristics in numpy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

_PARTS = ("pack_fit", "pack_exact", "pack_search")


def source() -> str:
    """The C++ text: its parts one after the other, as each uses those before it."""
    return "\n".join(Path(__file__).with_name(f"{part}.cpp").read_text() for part in _PARTS)


class SearchOutcome(Enum):
    """What a search for one capacity ended with."""

    FITS = 1
    IMPOSSIBLE = 0
    UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Found:
    """Result of `PackSearch.search`: offsets in units where it fits, and the work that was done."""

    outcome: SearchOutcome
    offsets: Int64
    work: int


def _pointer(array: Int32 | Int64) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class PackSearch:
    """Best fit, squeaky wheel, lowest floor and exact search over arrays (int32 times, int64 sizes in any unit)."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("memplan_sweep", "memplan_squeaky", "memplan_lowest_floor"):
            getattr(self._library, name).restype = ctypes.c_int64
        self._library.memplan_pack_search.restype = ctypes.c_int32

    def sweep(self, lower: Int32, upper: Int32, size: Int64) -> tuple[int, Int64]:
        """By time, the best fitting hole, as an allocator would. O(n log n)."""
        offsets = np.zeros(len(size), dtype=np.int64)
        arena = self._library.memplan_sweep(
            ctypes.c_int32(len(size)), _pointer(lower), _pointer(upper), _pointer(size), _pointer(offsets)
        )
        return int(arena), offsets

    def squeaky(
        self,
        lower: Int32,
        upper: Int32,
        size: Int64,
        order: Int32,
        *,
        target: int,
        passes: int,
        work: int,
        seconds: float = 0.0,
    ) -> tuple[int, Int64, int]:
        """Best fit in ``order``, then up to ``passes`` rounds of promoting what ended above ``target``.

        Returns the arena (-1 if the limits ended the first pass), the offsets, and the work that was done.
        """
        offsets = np.zeros(len(size), dtype=np.int64)
        left = ctypes.c_int64(work)
        arena = self._library.memplan_squeaky(
            ctypes.c_int32(len(size)), _pointer(lower), _pointer(upper), _pointer(size), _pointer(order),
            ctypes.c_int64(target), ctypes.c_int64(passes), ctypes.byref(left), ctypes.c_double(seconds),
            _pointer(offsets),
        )  # fmt: skip
        return int(arena), offsets, work - int(left.value)

    def lowest_floor(self, lower: Int32, upper: Int32, size: Int64, order: Int32) -> tuple[int, Int64]:
        """Always place, of the buffers that could lie lowest, the earliest in ``order``. Quadratic."""
        offsets = np.zeros(len(size), dtype=np.int64)
        arena = self._library.memplan_lowest_floor(
            ctypes.c_int32(len(size)), _pointer(lower), _pointer(upper), _pointer(size), _pointer(order),
            _pointer(offsets),
        )  # fmt: skip
        return int(arena), offsets

    def search(
        self,
        lower: Int32,
        upper: Int32,
        size: Int64,
        orders: Sequence[Int32],
        *,
        capacity: int,
        work: int,
        seconds: float = 0.0,
    ) -> Found:
        """Offsets within ``capacity``, or the proof that there are none, or neither within the limits."""
        offsets = np.zeros(len(size), dtype=np.int64)
        stacked = np.ascontiguousarray(np.concatenate(list(orders)).astype(np.int32))
        used = ctypes.c_int64(work)
        outcome = self._library.memplan_pack_search(
            ctypes.c_int32(len(size)), _pointer(lower), _pointer(upper), _pointer(size), ctypes.c_int32(len(orders)),
            _pointer(stacked), ctypes.c_int64(capacity), ctypes.c_double(seconds), ctypes.byref(used),
            _pointer(offsets),
        )  # fmt: skip
        return Found(SearchOutcome(outcome), offsets, int(used.value))
