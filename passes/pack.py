"""Offsets for buffers with fixed lifetimes inside one arena.

Best fit in several orders (the largest load over the lifetime, then size; size; load, width, area), the squeaky wheel
on each, a lowest-floor dive, and an exact search where a gap to the bound is left. The largest sum of sizes alive at
one time is a lower bound on every arena, so an arena equal to it is proved optimal.

References: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020), for greedy by size;
Moffitt, "MiniMalloc" (ASPLOS 2023), for the exact search; Joslin and Clements, "Squeaky Wheel Optimization" (1999).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..ir.errors import PlanningError
from .pack_search import Int32, Int64, PackSearch, SearchOutcome
from .pack_sweep import sweep

#: Work inside a compilation: some tenths of a second where the heuristics leave a gap; more on large problems.
COMPILE_WORK = 300_000
COMPILE_WORK_PER_BUFFER = 200
#: Entries that best fit looks at in the time of one step of search.
ENTRIES_PER_WORK = 500
#: Sums of sizes stay below this, so that 64-bit arithmetic never overflows.
LARGEST_TOTAL = 2**61
#: A pass of best fit in numpy is quadratic; above this many buffers only the sweep by time runs without a compiler.
LARGEST_NUMPY = 20_000
#: The exact search keeps all pairs that overlap; above this many buffers only heuristics run.
LARGEST_SEARCH = 4_000
#: Below this many buffers the exact search does better with the time.
SMALLEST_LOWERED = 500
#: Dives have one part in so many of the time and the work, and end after so many of them that found nothing better.
DIVES, MOST_IDLE = 3, 200
#: (lower, upper, size, order) to (arena, offsets): always place, of what could lie lowest, the earliest in the order.
LowestFloor = Callable[[Int32, Int32, Int64, Int32], tuple[int, Int64]]
NO_COMPILER = "no C++ compiler: heuristics in numpy only, no exact search"


@dataclass(frozen=True, slots=True)
class PackProblem:
    """Buffers to be given offsets in one arena.

    Parameters
    ----------
    lower, upper
        Half-open lifetimes ``[lower, upper)`` in any unit of time, one entry a buffer.
    size
        Bytes, one entry a buffer.
    alignment
        Bytes; every offset is a multiple of it.

    Raises
    ------
    PlanningError
        Lengths differ, a number is not whole, a lifetime is empty, a size is negative, or the sizes overflow 64 bits.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    size: tuple[int, ...]
    alignment: int = 1

    def __post_init__(self) -> None:
        if not len(self.lower) == len(self.upper) == len(self.size):
            raise PlanningError("lower, upper and size must have one entry for each buffer")
        if not 1 <= self.alignment < LARGEST_TOTAL:
            raise PlanningError(f"alignment must be at least 1 byte and below 2**61, found {self.alignment}")
        total = 0
        for index, (lower, upper, size) in enumerate(zip(self.lower, self.upper, self.size, strict=True)):
            if isinstance(lower, float) or isinstance(upper, float) or isinstance(size, float):
                raise PlanningError(f"buffer {index}: whole numbers are needed, found {(lower, upper, size)}")
            if lower >= upper:
                raise PlanningError(f"buffer {index}: the lifetime [{lower}, {upper}) is empty")
            if size < 0:
                raise PlanningError(f"buffer {index}: negative size {size}")
            total += size + self.alignment
        if total >= LARGEST_TOTAL:
            raise PlanningError(f"the sizes add up to {total} bytes, more than 64-bit offsets can hold safely")

    def __len__(self) -> int:
        return len(self.size)


@dataclass(frozen=True, slots=True)
class Packing:
    """Offsets, and what is proved about them. All in bytes.

    ``arena`` is the highest end of a buffer, ``max_live`` the largest sum of sizes alive at one time, ``lower_bound``
    what no packing can go below (``max_live``, more where alignment or the exact search prove more). ``note`` says
    what could not be tried.
    """

    offsets: tuple[int, ...]
    arena: int
    max_live: int
    lower_bound: int
    work: int = 0
    note: str = ""

    @property
    def optimal(self) -> bool:
        """Whether no packing needs less."""
        return self.arena <= self.lower_bound

    @property
    def gap(self) -> float:
        """``arena / max_live - 1``."""
        return self.arena / self.max_live - 1 if self.max_live else 0.0

    @property
    def alignment_gap(self) -> float:
        """The part of the gap that is proved unavoidable (alignment, or exhausted search)."""
        return self.lower_bound / self.max_live - 1 if self.max_live else 0.0


@dataclass(slots=True)
class _Limits:
    work: int
    seconds: float
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds left; 0 means that there is no time limit."""
        return max(1e-3, self.seconds - (time.monotonic() - self.started)) if self.seconds > 0 else 0.0

    def spent(self) -> bool:
        return self.work <= 0 or (self.seconds > 0 and time.monotonic() - self.started >= self.seconds)


@dataclass(frozen=True, slots=True)
class _Units:
    """The problem in sections of time and units of alignment; buffers of no bytes left out."""

    kept: Int64
    lower: Int32
    upper: Int32
    size: Int64
    load: Int64  # units alive in each section
    peak: Int64  # the largest load over each buffer's lifetime
    width: Int64  # lifetime in the caller's unit of time

    @property
    def bound(self) -> int:
        return int(self.load.max(initial=0))


def _loads(lower: Int32, upper: Int32, size: Int64, sections: int) -> Int64:
    change = np.zeros(sections + 1, dtype=np.int64)
    np.add.at(change, lower, size)
    np.add.at(change, upper, -size)
    return np.cumsum(change)[:-1]


def _range_maximum(values: Int64, lower: Int32, upper: Int32) -> Int64:
    """Largest of ``values[lower:upper]`` for each pair, by a sparse table."""
    levels = [values]
    while 2 ** len(levels) <= len(values):
        half = 2 ** (len(levels) - 1)
        levels.append(np.maximum(levels[-1][:-half], levels[-1][half:]))
    result = np.zeros(len(lower), dtype=np.int64)
    exponent = np.frexp((upper - lower).astype(np.float64))[1] - 1
    for level in np.unique(exponent):
        mask = exponent == level
        table = levels[int(level)]
        result[mask] = np.maximum(table[lower[mask]], table[upper[mask] - 2 ** int(level)])
    return result


def _times(values: tuple[int, ...]) -> Int64:
    """Times as ranks: only their order matters, so that ends beyond 64 bits do too."""
    if max(values, default=0) < 2**63 and min(values, default=0) >= -(2**63):
        return np.unique(np.array(values, dtype=np.int64), return_inverse=True)[1].astype(np.int64)
    rank = {value: index for index, value in enumerate(sorted(set(values)))}
    return np.array([rank[value] for value in values], dtype=np.int64)


def _units(problem: PackProblem) -> _Units:
    ranks = _times(problem.lower + problem.upper)
    size = np.array(problem.size, dtype=np.int64)
    kept = np.flatnonzero(size > 0)
    lower, upper = ranks[: len(problem)][kept], ranks[len(problem) :][kept]
    used, flat = np.unique(np.concatenate([lower, upper]), return_inverse=True)
    low, high = flat[: len(kept)].astype(np.int32), flat[len(kept) :].astype(np.int32)
    units = -(-size[kept] // problem.alignment)
    load = _loads(low, high, units, max(0, len(used) - 1))
    width = np.array([min(problem.upper[i] - problem.lower[i], 2**40) for i in kept], dtype=np.int64)
    return _Units(kept, low, high, units, load, _range_maximum(load, low, high), width)


def _orders(units: _Units) -> dict[str, Int32]:
    """Orders of placement: T is the largest load over the lifetime, Z the size, W the width, A the area."""
    index = np.arange(len(units.size))
    area = units.width.astype(np.float64) * units.size
    keys = {
        "TZ": (-units.peak, -units.size),
        "TWA": (-units.peak, -units.width, -area),
        "size": (-units.size, -units.width),
        "WAT": (-units.width, -area, -units.peak),
    }
    return {name: np.lexsort((index, *reversed(key))).astype(np.int32) for name, key in keys.items()}


def _best_fit(units: _Units, order: Int32) -> tuple[int, Int64]:
    """Best fit in numpy: one pass over what is placed, in the order of offsets, for each buffer."""
    count = len(order)
    offsets = np.zeros(count, dtype=np.int64)
    low, high = np.empty(count, np.int32), np.empty(count, np.int32)
    bottom, top = np.empty(count, np.int64), np.empty(count, np.int64)
    arena = 0
    for placed, buffer in enumerate(order):
        alive = (low[:placed] < units.upper[buffer]) & (high[:placed] > units.lower[buffer])
        below = bottom[:placed][alive]
        above = np.maximum.accumulate(top[:placed][alive])
        floor = np.concatenate([[0], above])
        gaps = below - floor[:-1]
        size = units.size[buffer]
        fits = np.flatnonzero(gaps >= size)
        offset = int(floor[fits[np.argmin(gaps[fits])]]) if len(fits) else int(floor[-1])
        offsets[buffer] = offset
        arena = max(arena, offset + int(size))
        at = int(np.searchsorted(bottom[:placed], offset, side="right"))
        for array, value in ((low, units.lower[buffer]), (high, units.upper[buffer]), (bottom, offset)):
            array[at + 1 : placed + 1] = array[at:placed]
            array[at] = value
        top[at + 1 : placed + 1] = top[at:placed]
        top[at] = offset + size
    return arena, offsets


def _squeaky(units: _Units, order: Int32, target: int, passes: int, limits: _Limits) -> tuple[int, Int64]:
    best, offsets = _best_fit(units, order)
    trial = offsets
    for _ in range(passes):
        if best <= target or limits.spent():
            break
        high = trial[order] + units.size[order] > target
        if high.all():
            break
        order = np.concatenate([order[high], order[~high]])
        arena, trial = _best_fit(units, order)
        if arena < best:
            best, offsets = arena, trial
    return best, offsets


@dataclass(slots=True)
class _Best:
    arena: int
    offsets: Int64
    bound: int

    def offer(self, arena: int, offsets: Int64) -> None:
        if arena < self.arena:
            self.arena, self.offsets = arena, offsets


def _heuristics(
    units: _Units, orders: dict[str, Int32], best: _Best, goal: int, limits: _Limits, native: PackSearch | None
) -> None:
    count = len(units.size)
    if native is not None:
        best.offer(*native.sweep(units.lower, units.upper, units.size))
    else:
        swept = np.array(sweep(units.lower.tolist(), units.upper.tolist(), units.size.tolist()), dtype=np.int64)
        best.offer(int((swept + units.size).max()), swept)
        if count > LARGEST_NUMPY:
            return
    for name in ("TZ", "TWA", "size"):
        if best.arena <= goal or limits.spent():
            return
        if native is not None:
            arena, offsets, work = native.squeaky(
                units.lower, units.upper, units.size, orders[name],
                target=goal, passes=50, work=limits.work * ENTRIES_PER_WORK // 4, seconds=limits.left() / 2,
            )  # fmt: skip
            limits.work -= work // ENTRIES_PER_WORK
            if arena >= 0:
                best.offer(arena, offsets)
        else:
            best.offer(*_squeaky(units, orders[name], goal, 3, limits))
            if count > 5_000:
                return  # a pass in numpy is quadratic
    if native is None and count <= LARGEST_SEARCH and limits.seconds > 0:
        _dive_until_the_end(units, orders, best, goal, limits)
    if native is not None and count <= LARGEST_SEARCH and best.arena > goal:
        for name in ("TWA", "TZ"):
            best.offer(*native.lowest_floor(units.lower, units.upper, units.size, orders[name]))
    if native is not None and SMALLEST_LOWERED <= count <= LARGEST_SEARCH and best.arena > goal:
        _dive(units, orders["TWA"], best, goal, limits, native.lowest_floor)
    if native is not None and count >= SMALLEST_LOWERED:
        _lower(units, orders["TWA"], best, goal, limits, native)


def _dive(units: _Units, order: Int32, best: _Best, goal: int, limits: _Limits, lowest_floor: LowestFloor) -> None:
    """Lowest floor again and again: what ended high comes earlier from then on, by a weight that only grows."""
    count = len(order)
    place, weight = np.empty(count, np.int64), np.zeros(count, np.int64)
    place[order] = np.arange(count)
    cost = max(1, count * count // (2 * ENTRIES_PER_WORK))
    least, end, idle = limits.work - limits.work // DIVES, time.monotonic() + limits.left() / DIVES, 0
    while best.arena > goal and idle < MOST_IDLE and limits.work > least:
        if limits.seconds > 0 and time.monotonic() >= end:
            return
        arena, offsets = lowest_floor(
            units.lower, units.upper, units.size, np.argsort(place - weight, kind="stable").astype(np.int32)
        )
        limits.work -= cost
        idle = 0 if arena < best.arena else idle + 1
        best.offer(arena, offsets)
        weight[offsets + units.size > best.arena - (best.arena - goal) * 3 // 5] += max(1, count * 3 // 100)


def _dive_until_the_end(units: _Units, orders: dict[str, Int32], best: _Best, goal: int, limits: _Limits) -> None:
    """What the time allows where there is no exact search: dives from each order, then from mixtures of them."""
    ranks = [np.argsort(order) for order in orders.values()]
    chance = np.random.default_rng(0)
    starts = [orders["TWA"], orders["WAT"], orders["TZ"]]
    while best.arena > goal and not limits.spent():
        if starts:
            order = starts.pop(0)
        else:
            shares = chance.dirichlet(np.ones(len(ranks)))
            mixed = sum(share * rank for share, rank in zip(shares, ranks, strict=True))
            order = np.argsort(mixed + chance.normal(scale=len(mixed) / 50, size=len(mixed))).astype(np.int32)
        _dive(units, order, best, goal, limits, _lowest_floor)


def _lowest_floor(lower: Int32, upper: Int32, size: Int64, order: Int32) -> tuple[int, Int64]:
    """As `PackSearch.lowest_floor`, in numpy."""
    count = len(order)
    offsets = np.zeros(count, dtype=np.int64)
    low, high, sizes = lower[order], upper[order], size[order]
    floor = np.zeros(count, dtype=np.int64)
    never = np.iinfo(np.int64).max
    arena = 0
    for _ in range(count):
        first = int(np.argmin(floor))  # of equals the earliest in the order
        top = int(floor[first] + sizes[first])
        offsets[order[first]] = floor[first]
        arena = max(arena, top)
        besides = (low < high[first]) & (high > low[first]) & (floor != never)
        floor[besides] = np.maximum(floor[besides], top)
        floor[first] = never
    return arena, offsets


def _lower(units: _Units, order: Int32, best: _Best, goal: int, limits: _Limits, native: PackSearch) -> None:
    """The squeaky wheel with targets that come down from what was found: with the goal itself as the target nearly all
    buffers of a large problem end above it, and promoting them all changes nothing."""
    while best.arena > goal and not limits.spent():
        target = best.arena - (best.arena - goal) // 5 - 1
        arena, offsets, work = native.squeaky(
            units.lower, units.upper, units.size, order,
            target=target, passes=200, work=limits.work * ENTRIES_PER_WORK // 4, seconds=limits.left() / 3,
        )  # fmt: skip
        limits.work -= max(1, work // ENTRIES_PER_WORK)
        if not 0 <= arena < best.arena:
            return
        best.offer(arena, offsets)


def _search(
    units: _Units, orders: dict[str, Int32], best: _Best, goal: int | None, limits: _Limits, native: PackSearch
) -> None:
    """Exact search: at the bound first, where cuts are sharpest, then at the goal or by halving the gap."""
    sequences = [orders["TWA"], orders["WAT"], orders["TZ"]]

    def attempt(capacity: int, work: int, seconds: float) -> SearchOutcome:
        found = native.search(
            units.lower, units.upper, units.size, sequences, capacity=capacity, work=work, seconds=seconds
        )
        limits.work -= max(1, found.work)
        if found.outcome is SearchOutcome.FITS:
            best.offer(int((found.offsets + units.size).max()), found.offsets)
        elif found.outcome is SearchOutcome.IMPOSSIBLE:
            best.bound = max(best.bound, capacity + 1)
        return found.outcome

    if goal is not None:
        share = 40_000 * max(1, len(units.size) // 64)
        while best.arena > goal and best.bound <= goal and not limits.spent():
            if goal > best.bound:
                attempt(best.bound, min(share // 4, limits.work), limits.left())
            if best.arena > goal and not limits.spent():
                attempt(goal, min(share, limits.work) if goal > best.bound else limits.work, limits.left())
            share *= 2
        return
    attempt(best.bound, max(1, limits.work // 2), 0.7 * limits.left())
    floor = best.bound  # the exact bound, or what the search gave up on
    share = max(1, limits.work // 6)
    while best.arena - floor > 1 and best.arena > best.bound and not limits.spent():
        middle = (floor + best.arena) // 2
        if attempt(middle, min(share, limits.work), limits.left() / 4) is not SearchOutcome.FITS:
            floor = middle


def _max_live(problem: PackProblem) -> int:
    """Bytes: the largest sum of unrounded sizes alive at one time."""
    if not len(problem):
        return 0
    ranks = _times(problem.lower + problem.upper).astype(np.int32)
    count = len(problem)
    load = _loads(ranks[:count], ranks[count:], np.array(problem.size, dtype=np.int64), int(ranks.max()))
    return int(load.max(initial=0))


def pack_buffers(
    problem: PackProblem,
    *,
    work_limit: int | None = None,
    capacity: int | None = None,
    seconds: float = 0.0,
    native: PackSearch | None = None,
) -> Packing:
    """Give every buffer an offset; deterministic unless ``seconds`` sets a time limit.

    Parameters
    ----------
    work_limit
        Steps of search (a million or two a second); by default what is fit for use inside a compilation.
    capacity
        Bytes. With it, the search stops as soon as the arena is within it; without, it goes on to the bound.
    seconds
        Time limit; 0 for none.
    native
        The compiled search; without it numpy heuristics run and the result's note says so.
    """
    max_live = _max_live(problem)
    units = _units(problem)
    note = "" if native is not None else NO_COMPILER
    if not len(units.size):
        return Packing((0,) * len(problem), 0, max_live, 0, note=note)
    if work_limit is None:
        work_limit = COMPILE_WORK + COMPILE_WORK_PER_BUFFER * max(0, len(problem) - LARGEST_SEARCH)
    limits = _Limits(work_limit, seconds)
    alignment = problem.alignment
    orders = _orders(units)
    total = int(units.size.sum())
    stacked = np.cumsum(units.size) - units.size
    best = _Best(total, stacked, units.bound)
    goal = None if capacity is None or capacity // alignment < units.bound else capacity // alignment
    _heuristics(units, orders, best, units.bound if goal is None else goal, limits, native)
    # A capacity below the bound cannot be met by searching.
    hopeless = capacity is not None and goal is None
    open_gap = best.arena > (best.bound if goal is None else goal) and not hopeless
    if native is not None and open_gap and len(units.size) <= LARGEST_SEARCH and not limits.spent():
        _search(units, orders, best, goal, limits, native)
    size = np.array(problem.size, dtype=np.int64)
    # What lies topmost needs no rounding: upside down, another buffer does, and the arena may end lower.
    height = int((best.offsets + units.size).max())
    placed = (best.offsets, height - best.offsets - units.size) if alignment > 1 else (best.offsets,)
    ends = [int((at * alignment + size[units.kept]).max()) for at in placed]
    arena = min(ends)
    offsets = np.zeros(len(problem), dtype=np.int64)
    offsets[units.kept] = placed[ends.index(arena)] * alignment
    # The topmost buffer needs no rounding, so the bound in units overstates by less than one unit.
    slack = int((units.size * alignment - size[units.kept]).max())
    bound = max(max_live, best.bound * alignment - slack)
    return Packing(tuple(int(offset) for offset in offsets), arena, max_live, bound, work_limit - limits.work, note)
