"""How a kernel's loops run on a CPU: which range is vectorised, what is cut into threads, what happens in which pass.

Three forms:

* *pointwise*: one nest, the innermost range vectorised;
* *row*: the outer loops hold, per outer point, one pass over the row for every reduction that needs an earlier one's
  result; the innermost row range is vectorised, a reduction accumulating in ``lanes`` independent partial results;
* *column*: the innermost outer range is contiguous and the row is not (sums of columns, channels-last statistics):
  tiles of ``lanes`` outer points accumulate side by side while the loops run over the row.

Cutting a long row into chunks gives partial results that are combined in order, whoever computed them: the answer
depends neither on the number of threads nor on their timing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import sympy

from memplan.ir.loops import CHECKED_INDEX, Call, Kernel, Level, Load, Random, Range, Store, operands

from .cpp_loops import (
    Access,
    Hints,
    accesses,
    by_stride,
    contiguous_bytes,
    dependencies,
    hinted,
    merge,
    prepare,
    share,
    store_operands,
)
from .cpp_owners import owns_its_elements, updates
from .cpp_reductions import in_two_passes
from .cpp_tiles import COLUMNS, Tiles, find_tiles
from .point_costs import DEAR, EXPENSIVE, point_cost
from .row_schedule import depths, schedule

#: points (weighted by what they cost) from which a parallel region pays: waking threads takes 2 to 5 microseconds
PARALLEL_WORK = 32768
#: tasks that a parallel loop should have at least, so that the load is even on a usual number of threads
WANTED_TASKS = 16
#: elements of a row in the arrays that keep values from one pass to the next: 128 KiB of stack, half a usual L2 cache
MOST_KEPT = 32768
#: elements of the vectorised range in the arrays of values that depend on it alone: 16 KiB of stack, half an L1 cache
MOST_COLUMNS = 4096
#: times that such a value is used again, from which an array pays
LEAST_REUSE = 16
#: a row is cut into at most this many chunks
MOST_CHUNKS = 64
#: elements that one thread owns at least: a cache line of float32, so that threads do not write to one another's
OWNED_ELEMENTS = 16


class Form(Enum):
    POINTWISE = "pointwise"
    ROW = "row"
    COLUMN = "column"


class Threads(Enum):
    """Which loops are spread over threads."""

    NONE = "none"
    OUTER = "outer"
    ROW = "row"
    OWNERS = "owners"  # the vectorised range of a pointwise kernel, each part walking over all the others


@dataclass(frozen=True, slots=True)
class Pass:
    """One walk over the row: the reductions (node numbers) and the stores it makes."""

    reductions: tuple[int, ...]
    stores: tuple[Store, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A kernel whose ranges stand in loop order, and how its loops run.

    ``lanes`` is the vectorised step: independent accumulators of a row, or outer points of a column tile. ``collapse``
    outer loops (column: with the loop over tiles, pointwise: with the one over blocks) form the parallel loop.
    ``block`` cuts the vectorised loop of a pointwise kernel (elements; 0: whole). ``chunk`` cuts the first row range
    (points; 0: whole). ``work`` is the number of points, for the run-time threshold where sizes are dynamic.
    ``kept`` are point values that a row form computes in one pass and reads in later ones from an array of the row;
    ``tiles`` says which loads of a pointwise kernel are transposed through tiles. ``apart``: no two values of the
    vectorised range ever write to the same element. ``columns`` are values of a pointwise kernel that depend on the
    vectorised range alone and are worth computing once, before the loops, into arrays over it.
    """

    kernel: Kernel
    form: Form
    threads: Threads
    lanes: int
    collapse: int
    block: int
    chunk: int
    passes: tuple[Pass, ...]
    point_cost: int
    stage: tuple[int, ...]
    kept: tuple[int, ...] = ()
    tiles: Tiles | None = None
    apart: bool = False
    columns: tuple[int, ...] = ()

    @property
    def vector(self) -> Range:
        """The vectorised range."""
        return self.kernel.row[-1] if self.form is Form.ROW else self.kernel.outer[-1]


def plan_loops(kernel: Kernel, hints: Hints, *, threads: bool = True, in_order: bool = False) -> Schedule:
    """Decide how ``kernel`` runs; ``threads=False`` keeps all loops on the calling thread, ``in_order`` the additions
    into one element in program order."""
    kernel = _as_pointwise(prepare(kernel))
    found = accesses(kernel, hints)
    if not kernel.row:
        return _pointwise(kernel, found, hints, threads, in_order)
    threads = threads and not in_order
    sizes = {r.symbol: hinted(r.size, hints) for r in (*kernel.outer, *kernel.row)}
    scores = {s: contiguous_bytes(found, s, n, hints) for s, n in sizes.items()}
    best_row = max(kernel.row, key=lambda r: scores[r.symbol])
    best_outer = max(kernel.outer, key=lambda r: scores[r.symbol], default=None)
    form = Form.ROW
    if best_outer is not None and scores[best_outer.symbol] > 1.05 * scores[best_row.symbol]:
        form = Form.COLUMN
    row = _last(by_stride(kernel.row, found, hints), best_row if form is Form.ROW else None)
    outer = _last(by_stride(kernel.outer, found, hints), best_outer if form is Form.COLUMN else None)
    kernel = Kernel(outer, row, kernel.nodes, kernel.stores)
    kernel = merge(merge(kernel, lambda k: k.row), lambda k: k.outer)
    return _row(kernel, form, hints, threads)


def _as_pointwise(kernel: Kernel) -> Kernel:
    """Row ranges become outer ones where no reduction and no store once a row needs them as a row."""
    if not kernel.row or kernel.reductions or any(kernel.store_level(s) is not Level.POINT for s in kernel.stores):
        return kernel
    return Kernel((*kernel.outer, *kernel.row), (), kernel.nodes, kernel.stores)


def _last(ranges: tuple[Range, ...], chosen: Range | None) -> tuple[Range, ...]:
    return ranges if chosen is None else (*(r for r in ranges if r != chosen), chosen)


def _pointwise(kernel: Kernel, found: list[Access], hints: Hints, threads: bool, in_order: bool) -> Schedule:
    ordered = by_stride(kernel.outer, found, hints)
    if ordered:
        scores = {r: contiguous_bytes(found, r.symbol, hinted(r.size, hints), hints) for r in ordered}
        ordered = _last(ordered, max(reversed(ordered), key=lambda r: scores[r]))
    kernel = merge(Kernel(ordered, (), kernel.nodes, kernel.stores), lambda k: k.outer)
    if updates(kernel) and kernel.outer and owns_its_elements(kernel, kernel.outer[-1]):
        return _owned(kernel, hints, threads)
    threads = threads and not in_order
    tiled = find_tiles(kernel, hints)
    if tiled is not None:
        return _tiled(*tiled, hints, threads)
    sizes = [hinted(r.size, hints) for r in kernel.outer]
    cost = point_cost(kernel)
    parallel = threads and math.prod(sizes) * cost >= PARALLEL_WORK and bool(sizes)
    collapse, block = 0, 0
    if parallel:
        collapse = _collapse(sizes[:-1])
        tasks = math.prod(sizes[:collapse])
        if collapse == len(sizes) - 1 and tasks < WANTED_TASKS and sizes[-1] >= 512:
            block = max(256, min(8192, sizes[-1] * max(tasks, 1) // WANTED_TASKS // 64 * 64))
            collapse += 1
        elif tasks < 2:
            parallel, collapse = False, 0
    chosen = Threads.OUTER if parallel else Threads.NONE
    passes, stage, columns = (Pass((), kernel.stores),), (0,) * len(kernel.nodes), _columns(kernel, sizes)
    return Schedule(kernel, Form.POINTWISE, chosen, 1, collapse, block, 0, passes, cost, stage, columns=columns)


def _columns(kernel: Kernel, sizes: list[int]) -> tuple[int, ...]:
    """Values of the vectorised range alone, as a channel's reciprocal deviation in channels-last layout, that have a
    root, a division or worse in them and that values of other ranges use."""
    if len(sizes) < 2 or math.prod(sizes[:-1]) < LEAST_REUSE or not isinstance(kernel.outer[-1].size, int):
        return ()
    depends, alone = dependencies(kernel), {kernel.outer[-1].symbol}
    dear: set[int] = set()
    leaving = {k for s in kernel.stores for k in store_operands(s)}
    for k, node in enumerate(kernel.nodes):
        if depends[k] != alone:
            leaving.update(operands(node))
        elif isinstance(node, Call) and (node.op in DEAR or any(o in dear for o in operands(node))):
            dear.add(k)
    checked = any(isinstance(n, Call) and n.op == CHECKED_INDEX for n in kernel.nodes)
    found = tuple(sorted(dear & leaving))
    return () if checked or len(found) * int(kernel.outer[-1].size) > MOST_COLUMNS else found


def _owned(kernel: Kernel, hints: Hints, threads: bool) -> Schedule:
    """A scatter whose threads each own a part of the vectorised range; a range of one cache line has one owner."""
    sizes = [hinted(r.size, hints) for r in kernel.outer]
    cost = point_cost(kernel)
    parallel = threads and math.prod(sizes) * cost >= PARALLEL_WORK and sizes[-1] > OWNED_ELEMENTS
    chosen = Threads.OWNERS if parallel else Threads.NONE
    collapse = 1 if parallel else 0
    passes, stage = (Pass((), kernel.stores),), (0,) * len(kernel.nodes)
    return Schedule(kernel, Form.POINTWISE, chosen, 1, collapse, 0, 0, passes, cost, stage, apart=True)


def _tiled(kernel: Kernel, tiles: Tiles, hints: Hints, threads: bool) -> Schedule:
    sizes = [hinted(r.size, hints) for r in kernel.outer]
    cost = point_cost(kernel)
    blocks = [*sizes[:-2], -(-sizes[-2] // tiles.rows), -(-sizes[-1] // COLUMNS)]
    parallel = threads and math.prod(sizes) * cost >= PARALLEL_WORK
    chosen = Threads.OUTER if parallel else Threads.NONE
    collapse = _collapse(blocks) if parallel else 0
    stage = (0,) * len(kernel.nodes)
    passes = (Pass((), kernel.stores),)
    return Schedule(kernel, Form.POINTWISE, chosen, 1, collapse, 0, 0, passes, cost, stage, (), tiles)


def _collapse(sizes: list[int]) -> int:
    """How many leading loops make enough tasks."""
    tasks = 1
    for k, n in enumerate(sizes):
        if tasks >= WANTED_TASKS:
            return k
        tasks *= max(n, 1)
    return len(sizes)


def _row(kernel: Kernel, form: Form, hints: Hints, threads: bool) -> Schedule:
    short = math.prod(r.size if isinstance(r.size, int) else MOST_KEPT for r in kernel.row) < MOST_KEPT
    kernel = share(in_two_passes(kernel, welford=short and form is Form.ROW))
    stage = depths(kernel)
    passes = _passes(kernel)
    outer = [hinted(r.size, hints) for r in kernel.outer]
    row = [hinted(r.size, hints) for r in kernel.row]
    cost = point_cost(kernel)
    reductions = max(len(p.reductions) for p in passes) if passes else 0
    if form is Form.ROW:
        lanes = _row_lanes(row[-1])
    else:
        lanes = min(max(64, 2048 // max(reductions, 1)), 512)
        lanes = min(lanes, 2 ** max(3, (outer[-1] - 1).bit_length()))
    tiles = [*outer[:-1], -(-outer[-1] // lanes)] if form is Form.COLUMN else outer
    work = math.prod(outer) * math.prod(row) * cost
    chosen = Threads.NONE
    if threads and work >= PARALLEL_WORK:
        enough = math.prod(tiles) >= WANTED_TASKS // 2
        chosen = Threads.ROW if not enough and math.prod(row) >= 4096 else Threads.OUTER
        if chosen is Threads.OUTER and math.prod(tiles) < 2:
            chosen = Threads.NONE
    chunk = 0
    static_start = isinstance(kernel.row[0].size, int)
    # columns add into one partial sum each, so they are cut sooner than rows for the sake of accuracy
    long = row[0] >= 1024 if form is Form.COLUMN else math.prod(row) >= 65536
    if chosen is Threads.ROW or (long and static_start):
        least = 4096 if form is Form.ROW else 256
        chunk = _chunk(row, lanes if form is Form.ROW and len(row) == 1 else 1, least)
    collapse = _collapse(tiles) if chosen is Threads.OUTER else 0
    kept = _kept(kernel, passes) if form is Form.ROW else ()
    return Schedule(kernel, form, chosen, lanes, collapse, 0, chunk, passes, cost, stage, kept)


def _kept(kernel: Kernel, passes: tuple[Pass, ...]) -> tuple[int, ...]:
    """Values worth an array: expensive, computed in one pass and used again in a later one, while a row is short."""
    length = math.prod(r.size if isinstance(r.size, int) else MOST_KEPT for r in kernel.row)
    row = {r.symbol for r in kernel.row}
    depends = dependencies(kernel)
    computed: list[set[int]] = []
    for step in passes:
        seen: set[int] = set()
        stack = [o for k in step.reductions for o in operands(kernel.nodes[k])]
        stack += [k for s in step.stores for k in store_operands(s)]
        while stack:
            k = stack.pop()
            if k not in seen and depends[k] & row:
                seen.add(k)
                stack.extend(operands(kernel.nodes[k]))
        computed.append(seen)
    found: list[int] = []
    for number, nodes in enumerate(computed):
        later = set().union(*computed[number + 1 :])
        wanted = {k for k in nodes & later if _expensive(kernel, k, depends, row)}
        # of a chain of wanted values only the last is read again, unless something else uses an earlier one
        inner = {o for k in wanted for o in operands(kernel.nodes[k]) if not _used_beside(kernel, o, wanted, later)}
        found.extend(k for k in sorted(wanted - inner) if k not in found)
    return tuple(found) if length * len(found) < MOST_KEPT else ()


def _used_beside(kernel: Kernel, k: int, wanted: set[int], later: set[int]) -> bool:
    if any(k in store_operands(s) for s in kernel.stores):
        return True
    return any(k in operands(kernel.nodes[u]) for u in later - wanted)


def _expensive(kernel: Kernel, k: int, depends: tuple[frozenset[sympy.Symbol], ...], row: set[sympy.Symbol]) -> bool:
    stack, seen = [k], {k}
    while stack:
        node = kernel.nodes[stack.pop()]
        if isinstance(node, Random) or (isinstance(node, Call) and node.op in EXPENSIVE):
            return True
        for o in operands(node):
            if o not in seen and depends[o] & row:
                seen.add(o)
                stack.append(o)
    return False


def _row_lanes(length: int) -> int:
    # folding many partial results costs more than it gains in a short row (measured: 49 points, 3.2 against 4.8 ms)
    return 32 if length >= 256 else 16 if length >= 128 else 8 if length >= 8 else 4 if length >= 4 else 1


def _chunk(row: list[int], multiple: int, least: int) -> int:
    """Points of the first row range in a chunk: at least ``least`` of the row, at most `MOST_CHUNKS` chunks."""
    inner = max(1, math.prod(row[1:]))
    wanted = max(1, least // inner, -(-row[0] // MOST_CHUNKS))
    return -(-wanted // multiple) * multiple


def _passes(kernel: Kernel) -> tuple[Pass, ...]:
    return tuple(Pass(s.reductions, tuple(kernel.stores[k] for k in s.stores)) for s in schedule(kernel).sections)


@lru_cache(maxsize=4096)
def pass_variants(kernel: Kernel) -> tuple[Kernel, ...]:
    """The normal forms that a kernel may be emitted in, whatever the sizes."""
    plain = _as_pointwise(prepare(kernel))
    return (plain, in_two_passes(plain, welford=False), in_two_passes(plain, welford=True))


@lru_cache(maxsize=4096)
def point_buffers_by_pass(kernel: Kernel) -> tuple[tuple[frozenset[str], frozenset[str]], ...]:
    """For every pass over the row the buffers that it loads from point by point, and those that it stores to."""
    found = []
    for section in schedule(kernel).sections:
        read = [n.buffer for k in section.points if isinstance(n := kernel.nodes[k], Load)]
        found.append((frozenset(read), frozenset(kernel.stores[k].buffer for k in section.stores)))
    return tuple(found)
