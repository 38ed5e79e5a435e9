"""Greedy orders in Python: what is left to do without a compiler, and an independent second for the compiled ones."""

from __future__ import annotations

import heapq

from .order_model import Adjacency, OrderGraph, Walk


def least_peak_first(graph: OrderGraph, near: Adjacency, threshold: int) -> tuple[int, ...]:
    """Run what lowers live bytes most among what does not raise the peak; else what raises it least.

    Two heaps with stale entries: O((n + e) log n) but for the entries passed over because they do not fit.
    """
    walk = Walk(graph, near)
    waiting = [len(ops) for ops in near.before]
    version = [0] * graph.ops
    done = [False] * graph.ops
    by_net: list[tuple[int, int, int, int]] = []
    by_transient: list[tuple[int, int, int, int]] = []

    def enter(op: int) -> None:
        transient, net = walk.effect(op)
        version[op] += 1
        heapq.heappush(by_net, (net, op, transient, version[op]))
        heapq.heappush(by_transient, (transient, net, op, version[op]))

    def choose(room: int) -> int:
        passed: list[tuple[int, int, int, int]] = []
        chosen = -1
        while by_net and len(passed) < 64:
            entry = heapq.heappop(by_net)
            if done[entry[1]] or entry[3] != version[entry[1]]:
                continue
            passed.append(entry)
            if entry[2] <= room:
                chosen = entry[1]
                break
        for entry in passed:
            heapq.heappush(by_net, entry)
        while chosen < 0:
            _, _, op, stamp = by_transient[0]
            if done[op] or stamp != version[op]:
                heapq.heappop(by_transient)
            else:
                chosen = op
        return chosen

    for op in range(graph.ops):
        if waiting[op] == 0:
            enter(op)
    order: list[int] = []
    peak = max(threshold, walk.live)
    while len(order) < graph.ops:
        op = choose(peak - walk.live)
        done[op] = True
        order.append(op)
        peak = max(peak, walk.run(op))
        for buffer in near.inputs[op]:
            if walk.left(buffer) == 1:
                for other in set(graph.buffers[buffer].consumers):
                    if not done[other] and waiting[other] == 0:
                        enter(other)
        for later in near.after[op]:
            waiting[later] -= 1
            if waiting[later] == 0:
                enter(later)
    return tuple(order)


def depth_first(graph: OrderGraph, near: Adjacency) -> tuple[int, ...]:
    """Each operation right after what it needs, from the last operations back."""
    order: list[int] = []
    seen = [False] * graph.ops
    for root in range(graph.ops):
        if seen[root] or near.after[root]:
            continue
        seen[root] = True
        stack = [(root, iter(near.before[root]))]
        while stack:
            op, earlier = stack[-1]
            following = next((u for u in earlier if not seen[u]), None)
            if following is None:
                order.append(op)
                stack.pop()
            else:
                seen[following] = True
                stack.append((following, iter(near.before[following])))
    return tuple(order)


def breadth_first(graph: OrderGraph, near: Adjacency) -> tuple[int, ...]:
    """In rounds: everything that is ready, in the order in which it became so."""
    waiting = [len(ops) for ops in near.before]
    order = [op for op in range(graph.ops) if waiting[op] == 0]
    for op in order:
        for later in near.after[op]:
            waiting[later] -= 1
            if waiting[later] == 0:
                order.append(later)
    return tuple(order)
