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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from .ir.errors import CompilerError, PlanningError
from .passes import allocator_replay, order_search, pack_search
from .passes.allocator_replay import NativeReplay
from .passes.order import OrderResult, order_ops
from .passes.order_model import InPlacePair, OrderBuffer, OrderGraph, is_order, peak_bytes
from .passes.order_search import OrderSearch
from .passes.pack import Packing, PackProblem, pack_buffers
from .passes.pack_search import PackSearch
from .runtime.build import build_library

_UNLIMITED_WORK = 10**15
_WIDEST_BEAM = 4096
#: Update operations that `graph_from_data` appends consume outputs of more than this (a scalar loss has none).
_SMALLEST_UPDATED = 4


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


@functools.cache
def _pack_library() -> tuple[PackSearch | None, str]:
    try:
        return PackSearch(build_library(pack_search.SOURCE.read_text(), name="memplan_pack", openmp=False)), ""
    except CompilerError as error:
        return None, str(error).splitlines()[0]


@functools.cache
def _order_library() -> tuple[OrderSearch | None, str]:
    try:
        return OrderSearch(build_library(order_search.SOURCE.read_text(), name="memplan_order", openmp=False)), ""
    except CompilerError as error:
        return None, str(error).splitlines()[0]


@functools.cache
def _replay_library() -> tuple[NativeReplay | None, str]:
    try:
        source = allocator_replay.SOURCE.read_text()
        return NativeReplay(build_library(source, name="memplan_replay", openmp=False)), ""
    except CompilerError as error:
        return None, str(error).splitlines()[0]


def planner_libraries() -> PlannerLibraries:
    """Build the searches, or take them from the cache; without a compiler the heuristics in Python have to do."""
    packed, reason = _pack_library()
    ordered, _ = _order_library()
    replay, _ = _replay_library()
    return PlannerLibraries(packed, ordered, replay, reason)


def pack(
    buffers: PackProblem | Iterable[tuple[int, int, int]],
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
        A lifetime is empty, a size is negative, or the sizes overflow.

    Examples
    --------
    >>> pack([(0, 2, 8), (1, 3, 4), (2, 4, 8)]).arena
    12
    """
    if not isinstance(buffers, PackProblem):
        rows = list(buffers)
        columns = tuple(zip(*rows, strict=True)) if rows else ((), (), ())
        lower, upper, size = (tuple(int(value) for value in column) for column in columns)
        buffers = PackProblem(lower, upper, size, align)
    native, reason = _pack_library()
    packing = pack_buffers(buffers, work_limit=_UNLIMITED_WORK, capacity=capacity, seconds=time_limit, native=native)
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
        The graph has a cycle.
    """
    native, reason = _order_library()
    result = order_ops(
        graph,
        work_limit=_UNLIMITED_WORK,
        tolerance=tolerance,
        widest=_WIDEST_BEAM,
        seconds=time_limit,
        native=native,
    )
    return replace(result, note=f"{result.note} ({reason})") if reason else result


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanningError(f"{what} must be a whole number, found {value!r}")
    return value


def _sequence(value: object, what: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise PlanningError(f"{what} must be a list, found {type(value).__name__}")
    return value


def _buffer(entry: object, index: int, inputs: Inputs) -> OrderBuffer:
    what = f"bufs[{index}]"
    if not isinstance(entry, Mapping):
        raise PlanningError(f"{what} must be an object, found {type(entry).__name__}")
    missing = [key for key in ("size", "prod", "cons", "out") if key not in entry]
    if missing:
        raise PlanningError(f"{what} has no {missing[0]!r}")
    size, producer = _integer(entry["size"], f"{what}.size"), _integer(entry["prod"], f"{what}.prod")
    if size < 0:
        raise PlanningError(f"{what}: negative size {size}")
    if not isinstance(entry["out"], bool):
        raise PlanningError(f"{what}.out must be true or false, found {entry['out']!r}")
    consumers = tuple(_integer(op, f"{what}.cons") for op in _sequence(entry["cons"], f"{what}.cons"))
    is_input = producer == -1
    return OrderBuffer(
        size=0 if is_input and inputs is Inputs.OUTSIDE else size,
        producer=producer,
        consumers=consumers,
        kept=entry["out"] or (is_input and inputs is Inputs.STAY),
    )


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
    if ops < 0:
        raise PlanningError(f"n must not be negative, found {ops}")
    buffers = [_buffer(entry, index, inputs) for index, entry in enumerate(_sequence(data["bufs"], "bufs"))]
    edges: list[tuple[int, int]] = []
    for index, edge in enumerate(_sequence(data["edges"], "edges")):
        ends = _sequence(edge, f"edges[{index}]")
        if len(ends) != 2:
            raise PlanningError(f"edges[{index}] must be a pair, found {len(ends)} entries")
        edges.append((_integer(ends[0], f"edges[{index}]"), _integer(ends[1], f"edges[{index}]")))
    if optimizer:
        updated = ops
        for index, buffer in enumerate(buffers):
            if buffer.kept and buffer.producer >= 0 and buffer.size > _SMALLEST_UPDATED:
                buffers[index] = replace(buffer, consumers=(*buffer.consumers, updated), kept=False)
                updated += 1
        OrderGraph(ops, (), tuple(edges))  # an edge may not name an update
        ops = updated
    return OrderGraph(ops, tuple(buffers), tuple(edges))


__all__ = [
    "InPlacePair", "Inputs", "OrderBuffer", "OrderGraph", "OrderResult", "PackProblem", "Packing",
    "PlannerLibraries", "graph_from_data", "is_order", "order", "pack", "peak_bytes", "planner_libraries",
]  # fmt: skip
