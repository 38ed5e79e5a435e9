"""Slow and obvious answers to small planning problems, and checks that share no code with the planner."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

Interval = tuple[int, int, int]


def overlaps(buffers: Sequence[Interval], offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs that share a time and a byte; by a sweep over time with neighbours in the order of offsets."""
    events = sorted(
        [(lower, 1, i) for i, (lower, _, size) in enumerate(buffers) if size]
        + [(upper, 0, i) for i, (_, upper, size) in enumerate(buffers) if size]
    )
    alive: list[tuple[int, int]] = []
    found: list[tuple[int, int]] = []
    for _, starts, index in events:
        entry = (offsets[index], index)
        if not starts:
            alive.remove(entry)
            continue
        at = bisect.bisect_left(alive, entry)
        if at and alive[at - 1][0] + buffers[alive[at - 1][1]][2] > offsets[index]:
            found.append((alive[at - 1][1], index))
        if at < len(alive) and offsets[index] + buffers[index][2] > alive[at][0]:
            found.append((index, alive[at][1]))
        alive.insert(at, entry)
    return found


def least_arena(buffers: Sequence[Interval], align: int = 1) -> int:
    """Try every order of placement, each buffer as low as the earlier ones let it: one of them is optimal."""
    best = sum(-(-size // align) * align for _, _, size in buffers)
    for order in itertools.permutations(range(len(buffers))):
        placed: list[tuple[int, int]] = []
        arena = 0
        for index in order:
            lower, upper, size = buffers[index]
            taken = [(at, at + buffers[j][2]) for j, at in placed if buffers[j][0] < upper and lower < buffers[j][1]]
            spots = [0, *(-(-end // align) * align for _, end in taken)]
            offset = min(
                s for s in spots if all(s + size <= low or high <= s or not size or low == high for low, high in taken)
            )
            placed.append((index, offset))
            arena = max(arena, offset + size)
        best = min(best, arena)
    return best


def peak_of(
    buffers: Sequence[tuple[int, int, tuple[int, ...], bool]],
    order: Sequence[int],
    scratch: Sequence[int],
    pairs: Sequence[tuple[int, int, int]],
) -> int:
    """Peak of an order, recomputed from sets at each step. Buffers are (size, producer, consumers, kept)."""
    place = {op: k for k, op in enumerate(order)}
    peak = sum(size for size, producer, _, _ in buffers if producer < 0)
    for k, op in enumerate(order):
        live = scratch[op]
        dying = set()
        for index, (size, producer, consumers, kept) in enumerate(buffers):
            start = place[producer] if producer >= 0 else -1
            end = max((place[c] for c in consumers), default=start)
            forever = kept or (producer < 0 and not consumers)
            if start <= k and (forever or k <= end):
                live += size
            if op in consumers and end == k and not kept:
                dying.add(index)
        used: set[int] = set()
        for at, output, source in pairs:
            if at == op and source in dying and not used & {output, source}:
                used |= {output, source}
                live -= min(buffers[output][0], buffers[source][0])
        peak = max(peak, live)
    return peak


def least_peak(
    ops: int,
    buffers: Sequence[tuple[int, int, tuple[int, ...], bool]],
    edges: Sequence[tuple[int, int]],
    scratch: Sequence[int],
    pairs: Sequence[tuple[int, int, int]],
) -> int:
    """The least peak over every valid order."""
    before = {(p, c) for _, p, consumers, _ in buffers if p >= 0 for c in consumers} | set(edges)
    return min(
        peak_of(buffers, order, scratch, pairs)
        for order in itertools.permutations(range(ops))
        if all(order.index(a) < order.index(b) for a, b in before)
    )
