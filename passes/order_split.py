"""Graphs that fall into stretches: orders of each stretch by itself.

Where an operation has all others before or after it, what runs before it is the same in every order: the order of each
stretch between two such operations is a problem of its own, the peak is the largest of theirs, and so is the bound.
Inference graphs of stages are of this kind; what a forward saves for its backward leads past every operation between
them, so training graphs are not.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .order_model import Adjacency, InPlacePair, OrderBuffer, OrderGraph
from .order_search import OrderSearch, SearchedOrder

#: Graphs of fewer operations are searched as a whole.
SMALLEST = 257
#: Short stretches that follow each other are one of at least so many operations.
SHORTEST = 64
#: A graph is split where its largest stretch has at most this part of its operations.
LARGEST_PART = 0.75


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of the graph that runs without a break: its problem, and which operation each of its own is."""

    graph: OrderGraph
    ops: tuple[int, ...]


def stretch_starts(near: Adjacency, program: Sequence[int]) -> tuple[int, ...]:
    """Steps of a valid order at which its stretches begin; none where to split it would not help."""
    ops = len(program)
    if ops < SMALLEST:
        return ()
    place = _places(program)
    starts = _starts(near, program, place)
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], ops], strict=True)]
    return () if max(lengths) > LARGEST_PART * ops else tuple(starts)


def _places(program: Sequence[int]) -> list[int]:
    place = [0] * len(program)
    for step, op in enumerate(program):
        place[op] = step
    return place


def _starts(near: Adjacency, program: Sequence[int], place: Sequence[int]) -> list[int]:
    """Steps at which a stretch begins: the first one, and some past which no edge leads."""
    count = len(program)
    spanned = [0] * (count + 1)  # change of the number of edges that lead past the step
    for op in program:
        step = place[op]
        earlier = [place[u] for u in near.before[op]] or [-1]  # what needs nothing can run first of all
        later = () if near.after[op] else (count,)  # and what nothing needs, last
        for low, high in (*((low, step) for low in earlier), *((step, high) for high in later)):
            if high - low > 1:
                spanned[low + 1] += 1
                spanned[high] -= 1
    found: list[int] = []
    passing = 0
    for step in range(count):
        passing += spanned[step]
        if step == 0 or (passing == 0 and step - found[-1] >= SHORTEST):
            found.append(step)
    return found


def stretches(graph: OrderGraph, program: Sequence[int], starts: Sequence[int]) -> tuple[Stretch, ...]:
    """The graph in stretches that begin at these steps of a valid order, in the order in which they run."""
    place = _places(program)
    part_of = [bisect_right(starts, step) - 1 for step in place]
    count = len(starts)
    crossing = [0] * (count + 1)  # change of bytes that live while a stretch runs and that it does not touch
    buffers: list[list[OrderBuffer]] = [[] for _ in range(count)]
    numbers: list[dict[int, int]] = [{} for _ in range(count)]
    for index, buffer in enumerate(graph.buffers):
        inside: dict[int, list[int]] = {}
        for op in buffer.consumers:
            inside.setdefault(part_of[op], []).append(place[op] - starts[part_of[op]])
        is_input = buffer.producer < 0
        born = -1 if is_input else part_of[buffer.producer]
        stays = buffer.kept or (is_input and not buffer.consumers)
        last = count - 1 if stays else max([*inside, born])
        crossing[born + 1] += buffer.size
        crossing[last + 1] -= buffer.size
        touched = {*inside, *(() if is_input else (born,))}
        for part in touched:
            made = part == born
            if not made:  # it is counted as an input of the stretch
                crossing[part] -= buffer.size
                crossing[part + 1] += buffer.size
            numbers[part][index] = len(buffers[part])
            producer = place[buffer.producer] - starts[part] if made else -1
            consumers = tuple(inside.get(part, ()))
            buffers[part].append(OrderBuffer(buffer.size, producer, consumers, stays or last > part))
    edges: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for earlier, later in graph.edges:
        part = part_of[later]
        if part_of[earlier] == part:
            edges[part].append((place[earlier] - starts[part], place[later] - starts[part]))
    pairs: list[list[InPlacePair]] = [[] for _ in range(count)]
    for pair in graph.in_place:
        part = part_of[pair.op]
        at = numbers[part]
        pairs[part].append(InPlacePair(place[pair.op] - starts[part], at[pair.output], at[pair.input]))
    found, bytes_across = [], 0
    for part, (start, stop) in enumerate(zip(starts, [*starts[1:], graph.ops], strict=True)):
        bytes_across += crossing[part]
        ops = tuple(program[start:stop])
        across = OrderBuffer(bytes_across, -1, (), True)
        scratch = tuple(graph.scratch[op] for op in ops) if graph.scratch else ()
        problem = OrderGraph(len(ops), (*buffers[part], across), tuple(edges[part]), scratch, tuple(pairs[part]))
        found.append(Stretch(problem, ops))
    return tuple(found)


@dataclass
class _State:
    """What was found for a stretch, in how many searches."""

    stretch: Stretch
    found: SearchedOrder
    searches: int = 0


def order_stretches(
    parts: Sequence[Stretch],
    native: OrderSearch,
    *,
    tolerance: float,
    widest: int,
    work: int,
    seconds: float,
    exact: bool,
) -> SearchedOrder:
    """Always the stretch with the highest peak is searched, until that is near the bound or cannot be lowered.

    The first search of each has its share of the limits, a second one all that is left.
    """
    started, left = time.monotonic(), work
    states = []
    for part in parts:
        given = tuple(range(part.graph.ops))
        states.append(_State(part, native.run(part.graph, given, tolerance=1e9, widest=0, work=0, exact=False)))
    program_peak = max(state.found.program_peak for state in states)
    while True:
        bound = max(state.found.lower_bound for state in states)
        highest = max(states, key=lambda state: state.found.peak)
        remaining = seconds - (time.monotonic() - started) if seconds > 0 else 0.0
        out = left <= 0 or (seconds > 0 and remaining <= 0)
        if out or highest.searches > 1 or highest.found.peak - bound <= tolerance * bound:
            break
        waiting = sum(not state.searches and state.found.peak > bound for state in states)
        share = 1.0 if highest.searches else 1 / waiting
        found = native.run(
            highest.stretch.graph, tuple(range(highest.stretch.graph.ops)), tolerance=tolerance, widest=widest,
            work=int(share * left), seconds=share * remaining, exact=exact, bound=bound,
        )  # fmt: skip
        left -= found.work
        highest.searches += 1
        if found.peak < highest.found.peak or found.lower_bound > highest.found.lower_bound:
            best = min(found, highest.found, key=lambda f: f.peak)
            least = max(found.lower_bound, highest.found.lower_bound)
            highest.found = replace(best, lower_bound=least)
    order = tuple(state.stretch.ops[k] for state in states for k in state.found.order)
    peak = max(state.found.peak for state in states)
    return SearchedOrder(order, peak, program_peak, min(bound, peak), work - left)
