"""What the forward keeps for the backward, and what the backward computes again: one minimum cut.

Every forward value ``v`` has an edge ``v_in -> v_out`` with the bytes it takes if it is kept, and an edge
``source -> v_in`` with what it costs to compute again, in the same unit. Values that cannot be computed again (matrix
products, random draws, side effects) have an infinite cost, those that cannot be kept (views, tuples) infinite bytes;
what the backward needs is tied to the sink. A value on the sink's side whose ``v_in`` is on the sink's side too is
recomputed; one whose edge is cut is kept. Minimum cuts for this are due to Chen et al. (2016) in spirit and to
functorch's partitioner in form; the cost edges, which make the cut prefer a 2-byte statistic to a pass over a row and
a sum to the terms of a sum, are ours.

Among all minimum cuts the one nearest the backward is taken: it recomputes least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

from memplan.ir.device import DeviceFigures
from memplan.ir.joint import JointGraph, Side

#: Capacities are scaled below this, since the flow solver works in 32 bits.
_LIMIT = 2**30 - 1


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the joint graph.

    Attributes
    ----------
    keep:
        Bytes it takes if it is kept for the backward; 0 for what is alive anyway (inputs, parameters); None if it
        cannot be kept.
    again:
        Cost of computing it again, in bytes; None if it cannot be.
    inputs:
        Positions of the values it is computed from.
    needed:
        The backward reads it.
    """

    name: str
    keep: float | None
    again: float | None
    inputs: tuple[int, ...]
    needed: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Positions of the values to keep, of those recomputed, and the bytes kept."""

    kept: tuple[int, ...]
    recomputed: tuple[int, ...]
    nbytes: float


#: Bytes that one would keep to save moving one byte in a fused recomputation.
PREFERENCE = 0.02
#: How much dearer recomputation becomes from one try to the next while it takes too much time.
_DEARER = 4.0
_TRIES = 12


@dataclass(frozen=True, slots=True)
class Prices:
    """What recomputation costs in bytes.

    ``weight``: bytes that one would keep to save a microsecond; infinite: only what is free is done twice.
    ``preference``: bytes for a byte of the largest tensor that a recomputed node touches, whatever its time.
    ``expensive``: whether products, convolutions and attention may be done twice too.
    """

    weight: float
    preference: float = PREFERENCE
    expensive: bool = False

    def price(self, graph: JointGraph, k: int) -> float | None:
        """Bytes that computing node ``k`` again is worth; None: never."""
        node = graph.nodes[k]
        if node.again is None or not (node.cheap or self.expensive):
            return None
        if node.again == 0:
            return 0.0
        if math.isinf(self.weight):
            return None
        return self.weight * node.again + self.preference * node.moved


def joint_values(graph: JointGraph, prices: Prices) -> tuple[list[Value], list[int]]:
    """The values of the forward and of either side, and their positions in the graph."""
    positions = [k for k, n in enumerate(graph.nodes) if n.side is not Side.BACKWARD]
    number = {k: v for v, k in enumerate(positions)}
    values = []
    for k in positions:
        node = graph.nodes[k]
        inputs = tuple(number[i] for i in node.inputs if i in number)
        values.append(Value(node.name, node.keep, prices.price(graph, k), inputs, graph.needed[k]))
    return values, positions


def choose_joint(graph: JointGraph, prices: Prices) -> tuple[int, ...]:
    """Positions of the nodes to keep at the given prices."""
    values, positions = joint_values(graph, prices)
    return tuple(positions[v] for v in choose_kept(values).kept)


def choose_within(graph: JointGraph, fraction: float, figures: DeviceFigures) -> tuple[int, ...]:
    """The least that must be kept if recomputation may add ``fraction`` of the step's estimated time.

    What fuses into one pass is done again at first for little more than its bytes; while that takes too long, at
    ever more bytes a microsecond, so that what frees most bytes in a microsecond goes first. Layers that are alike are
    worth the same; of them the first ones are recomputed, whose values would be alive longest.
    """
    limit = max(fraction * graph.microseconds, figures.launch) if fraction > 0 else 0.0
    kept = choose_joint(graph, Prices(math.inf))
    if fraction <= 0:
        return kept
    first = weight = PREFERENCE * figures.bandwidth
    dearer = kept
    for _ in range(_TRIES):
        less = choose_joint(graph, Prices(weight))
        if graph.added_microseconds(less) <= limit:
            return less if weight == first else _mixed(graph, dearer, less, limit)
        dearer, weight = less, weight * _DEARER
    return _mixed(graph, dearer, kept, limit)


def _mixed(graph: JointGraph, head: Sequence[int], tail: Sequence[int], limit: float) -> tuple[int, ...]:
    """``head`` for the first nodes and ``tail`` for the rest, for as many as ``limit`` microseconds allow."""

    def mix(cut: int) -> tuple[int, ...]:
        return graph.completed([*(k for k in head if k < cut), *(k for k in tail if k >= cut)])

    low, high = 0, len(graph.nodes)
    while high - low > 1:
        middle = (low + high) // 2
        if graph.added_microseconds(mix(middle)) <= limit:
            low = middle
        else:
            high = middle
    return mix(low)


def choose_kept(values: Sequence[Value]) -> Kept:
    """The cheapest set of values to keep.

    Parameters
    ----------
    values:
        Forward values in topological order.

    Raises
    ------
    ValueError
        If something that the backward needs can neither be kept nor computed again.
    """
    relevant = _ancestors(values)
    if not relevant:
        return Kept((), (), 0.0)
    _check_possible(values)
    number = {v: k for k, v in enumerate(relevant)}
    source, sink = 2 * len(relevant), 2 * len(relevant) + 1
    total = sum((values[v].keep or 0.0) + (values[v].again or 0.0) for v in relevant)
    # a power of two, so that whole bytes stay whole
    scale = 2.0 ** (math.frexp((_LIMIT - len(relevant) * 4) / max(1.0, total))[1] - 1)
    tails: list[int] = []
    heads: list[int] = []
    capacities: list[int] = []

    def edge(tail: int, head: int, capacity: float | None) -> None:
        tails.append(tail)
        heads.append(head)
        capacities.append(_LIMIT if capacity is None else math.ceil(capacity * scale))

    for v in relevant:
        k = number[v]
        value = values[v]
        edge(2 * k, 2 * k + 1, value.keep)
        if value.again is None:
            edge(source, 2 * k, None)
        elif value.again > 0:
            edge(source, 2 * k, value.again)
        if value.needed:
            edge(2 * k + 1, sink, None)
        for i in value.inputs:
            if i in number:
                edge(2 * number[i] + 1, 2 * k, None)
    side = _sink_side(tails, heads, capacities, source, sink)
    kept: list[int] = []
    recomputed: list[int] = []
    for v in relevant:
        inside, outside = side[2 * number[v]], side[2 * number[v] + 1]
        if outside and not inside:
            assert values[v].keep is not None, f"the cut goes through {values[v].name}, which cannot be kept"
            kept.append(v)
        elif inside:
            recomputed.append(v)
    return Kept(tuple(kept), tuple(recomputed), sum(values[v].keep or 0.0 for v in kept))


def _check_possible(values: Sequence[Value]) -> None:
    """Raise ValueError if the backward needs what it cannot have even if all that can be kept is kept."""
    had: list[bool] = []
    for value in values:
        again = value.again is not None and all(had[i] for i in value.inputs)
        had.append(value.keep is not None or again)
        if value.needed and not had[-1]:
            raise ValueError(f"{value.name} is needed by the backward, but can neither be kept nor recomputed")


def _ancestors(values: Sequence[Value]) -> list[int]:
    """Values that the backward needs, directly or through others, in order."""
    wanted = [v.needed for v in values]
    for k in range(len(values) - 1, -1, -1):
        if wanted[k]:
            for i in values[k].inputs:
                wanted[i] = True
    return [k for k, w in enumerate(wanted) if w]


def _sink_side(
    tails: Sequence[int], heads: Sequence[int], capacities: Sequence[int], source: int, sink: int
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Nodes that can still reach the sink after a maximum flow: the sink's side of the cut nearest to the sink."""
    n = max(source, sink) + 1
    merged: dict[tuple[int, int], int] = {}
    for t, h, c in zip(tails, heads, capacities, strict=True):
        merged[t, h] = min(_LIMIT, merged.get((t, h), 0) + c)
    rows = np.fromiter((t for t, _ in merged), dtype=np.int32, count=len(merged))
    columns = np.fromiter((h for _, h in merged), dtype=np.int32, count=len(merged))
    data = np.fromiter(merged.values(), dtype=np.int32, count=len(merged))
    graph = scipy.sparse.csr_matrix((data, (rows, columns)), shape=(n, n), dtype=np.int32)
    flow = scipy.sparse.csgraph.maximum_flow(graph, source, sink, method="dinic").flow
    residual = graph.astype(np.int64) - flow.astype(np.int64)
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    reached = np.zeros(n, dtype=np.bool_)
    order = scipy.sparse.csgraph.breadth_first_order(residual.T.tocsr(), sink, directed=True, return_predecessors=False)
    reached[order] = True
    return reached
