"""The compiled half of ordering, `order_*.cpp`, through ctypes. See `pack_search` on who builds it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .order_model import OrderGraph

_PARTS = tuple(f"order_{part}" for part in ("graph", "greedy", "local", "bound", "beam", "branch", "exact", "search"))


def source() -> str:
    """The C++ text: its parts one after the other, as each uses those before it."""
    return "\n".join(Path(__file__).with_name(f"{part}.cpp").read_text() for part in _PARTS)


@dataclass(frozen=True, slots=True)
class SearchedOrder:
    """An order, the peaks of it and of the given one, and what no order goes below (bytes); the work done."""

    order: tuple[int, ...]
    peak: int
    program_peak: int
    lower_bound: int
    work: int


def _array(values: list[int], kind: type[np.generic]) -> NDArray[np.generic]:
    return np.array(values, dtype=kind)


class OrderSearch:
    """Portfolio, bounds and beam for a graph whose operations are renumbered to a valid order."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.memplan_order.restype = ctypes.c_int32

    def run(
        self,
        graph: OrderGraph,
        program: tuple[int, ...],
        *,
        tolerance: float,
        widest: int,
        work: int,
        seconds: float = 0.0,
        exact: bool = True,
        bound: int = 0,
    ) -> SearchedOrder:
        """Improve on ``program``, a valid order, until the peak is within ``tolerance`` of the bound or limits end.

        ``bound`` is a peak below which nothing is gained, whatever the reason.
        """
        place = [0] * graph.ops
        for index, op in enumerate(program):
            place[op] = index
        buffers = graph.buffers
        starts = [0]
        consumers: list[int] = []
        for buffer in buffers:
            consumers.extend(place[op] for op in buffer.consumers)
            starts.append(len(consumers))
        arrays = (
            _array([b.size for b in buffers], np.int64),
            _array([place[b.producer] if b.producer >= 0 else -1 for b in buffers], np.int32),
            _array([b.kept for b in buffers], np.uint8),
            _array(starts, np.int32),
            _array(consumers, np.int32),
        )
        edges = _array([place[op] for edge in graph.edges for op in edge], np.int32)
        scratch = _array(list(graph.scratch) or [0] * graph.ops, np.int64)
        pairs = _array([x for p in graph.in_place for x in (place[p.op], p.output, p.input)], np.int32)
        order, bounds = np.zeros(graph.ops, dtype=np.int32), np.array([0, 0, bound], dtype=np.int64)
        used = ctypes.c_int64(work)
        status = self._library.memplan_order(
            ctypes.c_int32(graph.ops), ctypes.c_int32(len(buffers)), *(ctypes.c_void_p(a.ctypes.data) for a in arrays),
            ctypes.c_int32(len(graph.edges)), ctypes.c_void_p(edges.ctypes.data),
            ctypes.c_void_p(scratch.ctypes.data), ctypes.c_int32(len(graph.in_place)),
            ctypes.c_void_p(pairs.ctypes.data), ctypes.c_double(tolerance), ctypes.c_int64(widest),
            ctypes.c_int32(exact), ctypes.c_double(seconds), ctypes.byref(used), ctypes.c_void_p(order.ctypes.data),
            ctypes.c_void_p(bounds.ctypes.data),
        )  # fmt: skip
        assert status == 0, "the program order is not valid"
        peak, program_peak, lower_bound = (int(value) for value in bounds)
        found = tuple(program[index] for index in order.tolist())
        return SearchedOrder(found, peak, program_peak, lower_bound, int(used.value))
