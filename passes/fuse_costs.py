"""What fusion costs: recomputation, re-reading, and parallelism lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import sympy

from memplan.ir.index import ranges_of, stride_of
from memplan.ir.loops import Call, Kernel, Level, Load, Random, Reduce, free_symbols, operands
from memplan.ir.program import Program, evaluate

from .fuse_body import needed, store_operands
from .fuse_mapping import count

if TYPE_CHECKING:
    from .fuse_graph import Group

_EXPENSIVE = frozenset(
    (
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "sigmoid", "hypot"),
        *("sin", "cos", "tan", "asin", "acos", "atan", "atan2"),
        *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
        *("erf", "erfc", "erfinv", "lgamma", "digamma", "ndtri", "log_ndtr"),
        *("i0", "i0e", "i1", "i1e", "bessel_j0", "bessel_j1"),
        *("fmod", "mod", "floordiv", "truncdiv"),
    )
)
#: expensive functions that may be evaluated a second time instead of storing their result
_MOST_EXPENSIVE = 3
#: Loads of a value that is made a second time: of what is not small beside it, and of all. A batch norm reads one
#: tensor and four numbers a channel.
_MOST_LOADS, _MOST_OF_ALL = 4, 8
#: bytes that move in less time than a launch takes
SMALL = 1 << 14
_MOST_COPIED = 32


@dataclass(frozen=True, slots=True)
class Limits:
    max_buffers: int
    max_nodes: int
    hints: Mapping[sympy.Symbol, int]


@dataclass(frozen=True, slots=True)
class InlineGain:
    """``nbytes`` of traffic saved; ``inputs``: what the consumers read instead."""

    nbytes: int
    inputs: frozenset[str]


def inline_gain(
    kernel: Kernel,
    buffer: str,
    consumers: list[Group],
    whole: bool,
    vanishes: bool,
    trivial: bool,
    limits: Limits,
    program: Program,
    group: Group,
) -> InlineGain | None:
    """Whether replaying the producer in these consumers pays, and what it saves.

    ``whole``: the buffer goes altogether; ``vanishes``: and the producer with it; ``trivial``: allow only what costs
    no arithmetic worth naming and no more reads than the buffer itself.
    """
    (store,) = [s for s in kernel.stores if s.buffer == buffer]
    nodes = [kernel.nodes[k] for k in needed(kernel, store_operands(store))]
    loads = [n for n in nodes if isinstance(n, Load)]
    expensive = sum(isinstance(n, Random) or (isinstance(n, Call) and n.op in _EXPENSIVE) for n in nodes)
    points = evaluate(count(ranges_of(kernel.outer)), limits.hints)
    evaluations = 0
    widened = False
    for c in consumers:
        assert c.points is not None
        assert c.rows is not None
        indices = {n.index for n in c.op.kernel.loads if n.buffer == buffer}  # type: ignore[union-attr]
        evaluations += len(indices)
        widened = widened or evaluate(c.points * c.rows, limits.hints) > points
    if trivial and (expensive or len(loads) > 1):
        return None
    moved = evaluations == 1 and not widened and vanishes
    large = sum(8 * program.nbytes(n.buffer) >= program.nbytes(buffer) for n in loads)
    if not moved and (len(nodes) > _MOST_COPIED or large > _MOST_LOADS or len(loads) > _MOST_OF_ALL):
        return None
    if (widened and (expensive or len(loads) > 2)) or (not moved and expensive * evaluations > _MOST_EXPENSIVE):
        return None
    return _traffic(kernel, buffer, loads, consumers, whole, vanishes, points, program, group)


def _traffic(
    kernel: Kernel,
    buffer: str,
    loads: list[Load],
    consumers: list[Group],
    whole: bool,
    vanishes: bool,
    points: int,
    program: Program,
    group: Group,
) -> InlineGain | None:
    inputs = frozenset(n.buffer for n in loads)
    reads = {n: min(program.nbytes(n), points * program.buffers[n].dtype.itemsize) for n in group.reads | inputs}
    saved = program.nbytes(buffer) * (len(consumers) + whole)
    saved += sum(reads[b] for b in group.reads) if vanishes else 0
    cost = sum(reads[b] for c in consumers for b in inputs if b not in c.reads)
    if whole:
        return InlineGain(saved - cost, inputs) if saved >= cost else None
    # the buffer is stored all the same: worth it only where reading its inputs is clearly less than reading it
    return InlineGain(saved - cost, inputs) if 2 * cost <= saved else None


def load_bytes(kernel: Kernel, program: Program) -> int:
    """Bytes that a kernel reads if each distinct access moves each of its elements once."""
    points = evaluate(count(ranges_of(kernel.outer)) * count(ranges_of(kernel.row)), program.hints)
    reads = {(n.buffer, n.index): n.dtype.itemsize for n in kernel.loads}
    return sum(min(program.nbytes(b), points * size) for (b, _), size in reads.items())


def pays_together(first: Kernel, second: Kernel, merged: Kernel, program: Program) -> bool:
    """Whether two kernels with no flow between them read clearly less as one: at the same points, not just the same
    buffers. A row-wise and a column-wise pass over one matrix share nothing."""
    if set(first.written_buffers) & set(second.written_buffers):
        return True  # parts of one buffer
    if first.row and second.row and row_is_contiguous(first) != row_is_contiguous(second):
        return False
    before = load_bytes(first, program), load_bytes(second, program)
    if not first.row and not second.row and max(before) <= SMALL:
        return True
    return 4 * (sum(before) - load_bytes(merged, program)) >= min(before)


def keeps_parallel(kernel: Kernel, device: str, limits: Limits, parts: tuple[Kernel, ...]) -> bool:
    """Whether a kernel that uses a reduction's result along the same row still occupies the device.

    A reduction whose row feeds nothing at the points of the row can be split over many blocks or threads; one that
    is followed by point values cannot. So with few rows, or with rows that are long and strided, the two stay apart.
    """
    if not kernel.row or not _uses_result_along_row(kernel) or any(_uses_result_along_row(p) for p in parts if p.row):
        return True
    rows = evaluate(count(ranges_of(kernel.outer)), limits.hints)
    length = evaluate(count(ranges_of(kernel.row)), limits.hints)
    gpu = device.startswith("cuda")
    if length <= 1024:
        return True
    if not row_is_contiguous(kernel):
        return length <= (1024 if gpu else 4096)
    if length > 65536:
        return rows >= (1024 if gpu else 64)
    return rows >= (16 if gpu else 2) or length <= 8192


def _uses_result_along_row(kernel: Kernel) -> bool:
    """Whether a value of a point depends on a reduction over the row."""
    return _feeds_back(kernel.anonymous)


@lru_cache(maxsize=1 << 14)
def _feeds_back(kernel: Kernel) -> bool:
    """`_uses_result_along_row` for all kernels that are equal but for their buffers' names."""
    reduced = [False] * len(kernel.nodes)
    for k, node in enumerate(kernel.nodes):
        reduced[k] = isinstance(node, Reduce) or any(reduced[a] for a in operands(node))
        if reduced[k] and kernel.levels[k] is Level.POINT:
            return True
    return any(reduced[k] and kernel.store_level(s) is Level.POINT for s in kernel.stores for k in store_operands(s))


def row_is_contiguous(kernel: Kernel) -> bool:
    """Whether the bytes loaded along the row come mostly from accesses that step by one element along it.

    A value for each row or column (a mean, a weight) counts by its few elements, so that it does not decide. Sizes that
    are not known count as 64.
    """
    return _row_is_contiguous(kernel.anonymous)


@lru_cache(maxsize=1 << 14)
def _row_is_contiguous(kernel: Kernel) -> bool:
    row = {r.symbol for r in kernel.row if r.size != 1}
    if not row:
        return True
    sizes = {r.symbol: r.size if isinstance(r.size, int) else 64 for r in (*kernel.outer, *kernel.row)}
    balance = 0
    for index, itemsize in {n.index: n.dtype.itemsize for n in kernel.loads}.items():
        symbols = [s for s in free_symbols(index) if s in sizes]
        if not row.intersection(symbols):
            continue
        inner = [s for s in symbols if stride_of(index, s) == 1]
        if inner:
            nbytes = itemsize * math.prod(sizes[s] for s in symbols)
            balance += nbytes if row.intersection(inner) else -nbytes
    return balance >= 0
