"""Certified lower bounds on the peak of any order, in Python.

When operation v runs, what has run before is closed under predecessors, contains v's ancestors and none of its
descendants. The least live bytes over all such sets, found as a minimum cut, plus v's own outputs, bound every order.
Bytes are scaled down and rounded down to fit the 32-bit flow of scipy, so the bound stays below the true cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from .order_model import Adjacency, OrderGraph

_LARGEST_FLOW = 2**30


def _reach(start: int, neighbours: tuple[tuple[int, ...], ...]) -> set[int]:
    found: set[int] = set()
    stack = [start]
    while stack:
        for op in neighbours[stack.pop()]:
            if op not in found:
                found.add(op)
                stack.append(op)
    return found


@dataclass(frozen=True, slots=True)
class _Parts:
    """Bytes live at v in every order, and the arcs of the cut for the rest."""

    fixed: int
    free: tuple[int, ...]
    held: tuple[tuple[int, int, tuple[int, ...]], ...]  # bytes live once `producer` (-1: at once) ran, until all of ...
    lasting: tuple[tuple[int, int], ...]  # bytes live from the time that `producer` ran


def _parts(graph: OrderGraph, near: Adjacency, v: int) -> _Parts:
    ancestors, later = _reach(v, near.before), _reach(v, near.after) | {v}
    free = tuple(op for op in range(graph.ops) if op not in ancestors and op not in later)
    inside = set(free)
    fixed = graph.scratch[v] if graph.scratch else 0
    held: list[tuple[int, int, tuple[int, ...]]] = []
    lasting: list[tuple[int, int]] = []
    for buffer in graph.buffers:
        if buffer.producer == v:
            fixed += buffer.size
            continue
        if buffer.producer in later:
            continue
        begun = buffer.producer < 0 or buffer.producer in ancestors
        stays = buffer.kept or any(op in later for op in buffer.consumers) or (begun and not buffer.consumers)
        if begun and buffer.producer >= 0 and not buffer.consumers and not buffer.kept:
            continue
        if stays and begun:
            fixed += buffer.size
        elif stays:
            lasting.append((buffer.size, buffer.producer))
        else:
            waiting = tuple(op for op in dict.fromkeys(buffer.consumers) if op in inside)
            if waiting:
                held.append((buffer.size, -1 if begun else buffer.producer, waiting))
    for output in near.outputs[v]:  # the most that writing over a dying input can save
        savings = [
            min(graph.buffers[pair.input].size, graph.buffers[output].size)
            for pair in graph.in_place
            if pair.op == v and pair.output == output and not graph.buffers[pair.input].kept
        ]
        fixed -= max(savings, default=0)
    return _Parts(fixed, free, tuple(held), tuple(lasting))


def forced_bound(graph: OrderGraph, near: Adjacency, v: int) -> int:
    """Bytes that are live in every order while ``v`` runs."""
    return _parts(graph, near, v).fixed


def cut_bound(graph: OrderGraph, near: Adjacency, v: int) -> int:
    """Least bytes that are live while ``v`` runs, over all sets of operations that may have run before it."""
    parts = _parts(graph, near, v)
    if not parts.held:
        return parts.fixed
    total = sum(size for size, _, _ in parts.held) + sum(size for size, _ in parts.lasting)
    scale = total // _LARGEST_FLOW + 1
    node = {op: index + 2 for index, op in enumerate(parts.free)}  # 0 is the source, 1 the sink
    arcs: dict[tuple[int, int], int] = {}
    count = len(node) + 2
    unlimited = min(_LARGEST_FLOW, total // scale + 1)
    for op in parts.free:
        for earlier in near.before[op]:
            if earlier in node:
                arcs[node[op], node[earlier]] = unlimited
    for size, producer in parts.lasting:
        arcs[node[producer], 1] = arcs.get((node[producer], 1), 0) + size // scale
    for size, producer, waiting in parts.held:
        arcs[node[producer] if producer >= 0 else 0, count] = size // scale
        for op in waiting:
            arcs[count, node[op]] = unlimited
        count += 1
    ends = np.array(list(arcs), dtype=np.int64)
    weights = np.array(list(arcs.values()), dtype=np.int32)
    network = csr_matrix((weights, (ends[:, 0], ends[:, 1])), shape=(count, count))
    return parts.fixed + int(maximum_flow(network, 0, 1).flow_value) * scale
