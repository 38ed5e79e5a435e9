"""The planner by itself: offsets for buffers with fixed lifetimes, and orders of operations, with certificates.

>>> from memplan.planner import pack
>>> packing = pack([(0, 3, 4), (3, 9, 4), (0, 9, 4), (9, 21, 4), (0, 21, 4)], capacity=12)
>>> packing.arena, packing.max_live, packing.optimal
(12, 12, True)

Two operations read an input and one adds their results; running the one with the large scratch first is better:

>>> from memplan.planner import InPlacePair, OrderBuffer, OrderGraph, order
>>> graph = OrderGraph(
...     ops=3,
...     buffers=(
...         OrderBuffer(size=100, producer=0, consumers=(2,)),
...         OrderBuffer(size=10, producer=1, consumers=(2,)),
...         OrderBuffer(size=10, producer=2, kept=True),
...     ),
...     scratch=(0, 500, 0),
... )
>>> result = order(graph)
>>> result.order, result.peak, result.program_peak, result.optimal
((1, 0, 2), 510, 610, True)
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import SupportsIndex

from .ir.errors import CacheError, CompilerError, PlanningError
from .passes import allocator_replay, order_search, pack_search
from .passes.allocator_replay import NativeReplay
from .passes.order import OrderResult, order_ops
from .passes.order_model import LARGEST_TOTAL, InPlacePair, OrderBuffer, OrderGraph, is_order, peak_bytes
from .passes.order_search import OrderSearch
from .passes.pack import Packing, PackProblem, pack_buffers
from .passes.pack_search import PackSearch
from .runtime.build import build_library

_UNLIMITED_WORK = 10**15
_WIDEST_BEAM = 4096
#: Update operations that `graph_from_data` appends consume outputs of more than this (a scalar loss has none).
_SMALLEST_UPDATED = 4
#: A graph file names its operations by a number alone: beyond this, lists of them do not fit a machine's memory.
LARGEST_OPS = 4_000_000
#: Seconds that clocks count in 64 bits; a longer limit is this one.
_LONGEST = 1e8


class Inputs(Enum):
    """How the inputs of a graph file count.

    ``OUTSIDE``: not at all; they are the caller's, and no operation allocates them. ``DIE``: live from the start,
    freed after their last consumer. ``STAY``: live throughout.
    """

    OUTSIDE = "outside"
    DIE = "die"
    STAY = "stay"


@dataclass(frozen=True, slots=True)
class PlannerLibraries:
    """The compiled searches, or None and the reason why there are none."""

    pack: PackSearch | None
    order: OrderSearch | None
    replay: NativeReplay | None = None
    note: str = ""


#: no compiler, nowhere to write, or a library that the loader refuses
_NOT_BUILT = (CompilerError, CacheError, OSError)


def _in_a_line(error: Exception) -> str:
    """The message; a line that announces others is joined with them, what can be done about it is left out."""
    first, *rest = str(error).splitlines()
    listed = itertools.takewhile(lambda line: line.startswith(" "), rest)
    return f"{first} {'; '.join(map(str.strip, listed))}" if first.endswith(":") else first


@functools.cache
def _pack_library() -> tuple[PackSearch | None, str]:
    try:
        return PackSearch(build_library(pack_search.source(), name="memplan_pack", openmp=False)), ""
    except _NOT_BUILT as error:
        return None, _in_a_line(error)


@functools.cache
def _order_library() -> tuple[OrderSearch | None, str]:
    try:
        return OrderSearch(build_library(order_search.source(), name="memplan_order", openmp=False)), ""
    except _NOT_BUILT as error:
        return None, _in_a_line(error)


@functools.cache
def _replay_library() -> tuple[NativeReplay | None, str]:
    try:
        source = allocator_replay.SOURCE.read_text()
        return NativeReplay(build_library(source, name="memplan_replay", openmp=False)), ""
    except _NOT_BUILT as error:
        return None, _in_a_line(error)


def planner_libraries() -> PlannerLibraries:
    """Build the searches, or take them from the cache; without a compiler the heuristics in Python have to do."""
    packed, no_pack = _pack_library()
    ordered, no_order = _order_library()
    replay, no_replay = _replay_library()
    return PlannerLibraries(packed, ordered, replay, no_pack or no_order or no_replay)


def _seconds(time_limit: float) -> float:
    """The limit as the searches take it, to which no seconds would mean no limit."""
    if not time_limit > 0:
        raise PlanningError(f"time_limit must be a number of seconds above zero, found {time_limit}")
    return min(time_limit, _LONGEST)


def _row(row: Iterable[SupportsIndex], index: int) -> tuple[int, int, int]:
    """Whole numbers of any kind; a fraction is refused rather than cut."""
    try:
        lower, upper, size = map(operator.index, row)
    except (TypeError, ValueError) as error:
        raise PlanningError(f"buffer {index}: expected whole numbers (lower, upper, size), found {row!r}") from error
    return lower, upper, size


def pack(
    buffers: PackProblem | Iterable[Iterable[SupportsIndex]],
    *,
    capacity: int | None = None,
    align: int = 1,
    time_limit: float = 15.0,
) -> Packing:
    """Give offsets in one arena to buffers with fixed lifetimes.

    Parameters
    ----------
    buffers
        ``(lower, upper, size)`` each: alive in the half-open ``[lower, upper)``, ``size`` in bytes. Or a
        `PackProblem`, whose alignment then counts.
    capacity
        Bytes to fit into; the search stops when it does. Without it, the arena is made as small as possible.
    align
        Bytes; every offset is a multiple of it.
    time_limit
        Seconds.

    Returns
    -------
    Packing
        ``offsets`` in the order of ``buffers``, ``arena``, ``max_live``, ``lower_bound``, ``optimal``, ``gap``.

    Raises
    ------
    PlanningError
        A buffer is not of three whole numbers, a lifetime is empty, a size is negative, the sizes overflow, or the time
        limit is not above zero.

    Examples
    --------
    >>> pack([(0, 2, 8), (1, 3, 4), (2, 4, 8)]).arena
    12
    """
    if not isinstance(buffers, PackProblem):
        rows = [_row(row, index) for index, row in enumerate(buffers)]
        lower, upper, size = zip(*rows, strict=True) if rows else ((), (), ())
        buffers = PackProblem(lower, upper, size, align)
    seconds = _seconds(time_limit)
    native, reason = _pack_library()
    packing = pack_buffers(buffers, work_limit=_UNLIMITED_WORK, capacity=capacity, seconds=seconds, native=native)
    return replace(packing, note=f"{packing.note} ({reason})") if reason else packing


def order(graph: OrderGraph, *, time_limit: float = 5.0, tolerance: float = 1e-5) -> OrderResult:
    """Put the operations of a graph in an order whose peak of live bytes is small; never worse than the given one.

    Parameters
    ----------
    graph
        Operations in program order, and their buffers in bytes.
    time_limit
        Seconds.
    tolerance
        Relative gap to the lower bound at which the search is content.

    Returns
    -------
    OrderResult
        ``order``, ``peak``, ``program_peak``, ``lower_bound``, ``gap``, ``optimal``.

    Raises
    ------
    PlanningError
        The graph has a cycle, or the time limit is not above zero.
    """
    seconds = _seconds(time_limit)
    native, reason = _order_library()
    result = order_ops(
        graph,
        work_limit=_UNLIMITED_WORK,
        tolerance=tolerance,
        widest=_WIDEST_BEAM,
        seconds=seconds,
        native=native,
    )
    return replace(result, note=f"{result.note} ({reason})") if reason else result


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanningError(f"{what} must be a whole number, found {value!r}")
    return value


def _operation(value: object, what: str, ops: int, first: int = 0) -> int:
    op = _integer(value, what)
    if not first <= op < ops:
        raise PlanningError(f"{what}: there is no operation {op}, they are numbered from 0 to {ops - 1}")
    return op


def _sequence(value: object, what: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise PlanningError(f"{what} must be a list, found {type(value).__name__}")
    return value


def _buffer(entry: object, index: int, ops: int, inputs: Inputs) -> OrderBuffer:
    what = f"bufs[{index}]"
    if not isinstance(entry, Mapping):
        raise PlanningError(f"{what} must be an object, found {type(entry).__name__}")
    missing = [key for key in ("size", "prod", "cons", "out") if key not in entry]
    if missing:
        raise PlanningError(f"{what} has no {missing[0]!r}")
    size, producer = _integer(entry["size"], f"{what}.size"), _operation(entry["prod"], f"{what}.prod", ops, -1)
    if not 0 <= size < LARGEST_TOTAL:
        found = f"negative size {size}" if size < 0 else f"size {size} does not fit 64-bit sums (at most 2**61)"
        raise PlanningError(f"{what}.size: {found}")
    if not isinstance(entry["out"], bool):
        raise PlanningError(f"{what}.out must be true or false, found {entry['out']!r}")
    consumers = _sequence(entry["cons"], f"{what}.cons")
    is_input = producer == -1
    return OrderBuffer(
        size=0 if is_input and inputs is Inputs.OUTSIDE else size,
        producer=producer,
        consumers=tuple(_operation(op, f"{what}.cons[{k}]", ops) for k, op in enumerate(consumers)),
        kept=entry["out"] or (is_input and inputs is Inputs.STAY),
    )


def _buffers(entries: Sequence[object], ops: int, inputs: Inputs) -> list[OrderBuffer]:
    found: list[OrderBuffer] = []
    total = 0
    for index, entry in enumerate(entries):
        found.append(_buffer(entry, index, ops, inputs))
        total += found[-1].size
        if total >= LARGEST_TOTAL:
            raise PlanningError(f"bufs[{index}].size: the sizes up to here add up to more than 64-bit sums can hold")
    return found


def _edge(entry: object, index: int, ops: int) -> tuple[int, int]:
    ends = _sequence(entry, f"edges[{index}]")
    if len(ends) != 2:
        raise PlanningError(f"edges[{index}] must be a pair, found {len(ends)} entries")
    earlier, later = (_operation(end, f"edges[{index}][{k}]", ops) for k, end in enumerate(ends))
    return earlier, later


def graph_from_data(data: object, *, optimizer: bool = False, inputs: Inputs = Inputs.OUTSIDE) -> OrderGraph:
    """The graph in a decoded graph file: ``{n, edges: [[from, to]], bufs: [{size, prod, cons, out}]}``.

    With ``optimizer``, each output of more than 4 bytes gets an update operation that consumes it and frees it,
    numbered from ``n`` in the order of the buffers.

    Raises
    ------
    PlanningError
        Something is missing, of the wrong type or out of range; the message names the entry.
    """
    if not isinstance(data, Mapping):
        raise PlanningError("the graph must be an object with n, edges and bufs")
    missing = [key for key in ("n", "edges", "bufs") if key not in data]
    if missing:
        raise PlanningError(f"the graph has no {missing[0]!r}")
    ops = _integer(data["n"], "n")
    if not 0 <= ops <= LARGEST_OPS:
        found = "must not be negative" if ops < 0 else f"may be {LARGEST_OPS:,} operations at most"
        raise PlanningError(f"n {found}, found {ops}")
    buffers = _buffers(_sequence(data["bufs"], "bufs"), ops, inputs)
    edges = [_edge(entry, index, ops) for index, entry in enumerate(_sequence(data["edges"], "edges"))]
    if optimizer:
        updated = ops
        for index, buffer in enumerate(buffers):
            if buffer.kept and buffer.producer >= 0 and buffer.size > _SMALLEST_UPDATED:
                buffers[index] = replace(buffer, consumers=(*buffer.consumers, updated), kept=False)
                updated += 1
        ops = updated
    return OrderGraph(ops, tuple(buffers), tuple(edges))


__all__ = [
    "InPlacePair", "Inputs", "OrderBuffer", "OrderGraph", "OrderResult", "PackProblem", "Packing",
    "PlannerLibraries", "graph_from_data", "is_order", "order", "pack", "peak_bytes", "planner_libraries",
]  # fmt: skip
