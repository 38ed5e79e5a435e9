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

from .remat_timeline import backward_peak

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
#: Bytes that one would keep, whatever share of the time is allowed, to save the time in which the device moves one:
#: what frees a byte by moving over three is not done again. A pass that writes what another keeps frees one by moving
#: two or less; sums over the results of many layers, from which a residual can be had again, move up to fifty.
WORTH = 0.3
#: How much dearer recomputation becomes from one try to the next while it takes too much time.
_DEARER = 4.0
_TRIES = 12
#: Prices of a microsecond of products, in what the device moves in one, between which is searched.
_CHEAPEST_PRODUCT, _DEAREST_PRODUCT = 0.01, 8.0
#: Places at which the layers whose products are done again may end, and how many of them are simulated.
_CUTS, _SEVERED = 96, 6
#: Numbers of sections between which the residual may be kept, and how far of a section's length their ends may move.
_SECTIONS = (2, 3, 4, 5, 6, 8, 12, 24)
_SLACK = 0.2


@dataclass(frozen=True, slots=True)
class Prices:
    """What recomputation costs in bytes.

    ``weight``: bytes that one would keep to save a microsecond; infinite: only what is free is done twice.
    ``preference``: bytes for a byte of the largest tensor that a recomputed node touches, whatever its time.
    ``expensive``: whether products, convolutions and attention may be done twice too.
    ``products``: what a microsecond of those costs where it is not ``weight``.
    """

    weight: float
    preference: float = PREFERENCE
    expensive: bool = False
    products: float | None = None

    def price(self, graph: JointGraph, k: int) -> float | None:
        """Bytes that computing node ``k`` again is worth; None: never."""
        node = graph.nodes[k]
        if node.again is None or not (node.cheap or self.expensive):
            return None
        if node.again == 0:
            return 0.0
        if math.isinf(self.weight):
            return None
        weight = self.weight if node.cheap or self.products is None else self.products
        return weight * node.again + self.preference * node.moved


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


def choose_within(
    graph: JointGraph, fraction: float, figures: DeviceFigures, *, products: float = 0.0
) -> tuple[int, ...]:
    """The least that must be kept if recomputation may add ``fraction`` of the step's estimated time.

    What fuses into one pass is done again at first for little more than its bytes; while that takes too long, at
    ever more bytes a microsecond, so that what frees most bytes in a microsecond goes first. Layers that are alike are
    worth the same; of them the first ones are recomputed, whose values would be alive longest. Where all of that has
    room, convolutions, matrix products and attention may add the part ``products`` more.
    """
    limit = max(fraction * graph.microseconds, figures.launch) if fraction > 0 else 0.0
    kept = choose_joint(graph, Prices(math.inf))
    if fraction <= 0:
        return kept
    first = weight = WORTH * figures.bandwidth
    dearer = kept
    for _ in range(_TRIES):
        less = choose_joint(graph, Prices(weight))
        if graph.added_microseconds(less) <= limit:
            if weight > first:
                less = _mixed(graph, dearer, less, limit)
            elif products > 0:
                less = _with_products(graph, less, products * graph.microseconds, figures)
            return _in_sections(graph, less)
        dearer, weight = less, weight * _DEARER
    return _in_sections(graph, _mixed(graph, dearer, kept, limit))


def _in_sections(graph: JointGraph, kept: tuple[int, ...]) -> tuple[int, ...]:
    """`kept`, with what sections of the forward hand on to the next one kept too if the backward's peak is lower so.

    A residual is had again from the results of all layers before it. The backward begins with the last layer, for which
    it computes the residuals of all layers, and where these have a wider type than the results that they are the sums
    of they take more room than those did. With the residual kept between sections, those of one section are alive at a
    time. Sections as equal as possible suit a chain of equal layers (Chen et al., 2016).
    """
    again = [k for k in graph.recomputed(kept) if graph.nodes[k].side is Side.FORWARD]
    if not again:
        return kept
    position = {k: n for n, k in enumerate(again)}
    made = np.zeros(len(again) + 1)
    alive = np.zeros(len(again) + 1)  # bytes that cross to each entry of `again` and those after it
    last: dict[int, int] = {}
    for n, k in enumerate(again):
        last.update((graph.nodes[i].storage, n) for i in graph.nodes[k].inputs)
    for root, n in last.items():
        if root in position:
            made[position[root]] += graph.nodes[root].nbytes
            alive[position[root] + 1] += graph.nodes[root].nbytes
            alive[n + 1 if n + 1 < len(alive) else n] -= graph.nodes[root].nbytes
    alive = np.cumsum(alive)
    share = np.cumsum(made) / max(1.0, made.sum())
    found = [kept]
    for sections in _SECTIONS:
        handed: set[int] = set()
        for part in range(1, sections):
            low, high = np.searchsorted(share, ((part - _SLACK) / sections, (part + _SLACK) / sections))
            if low < high < len(again):
                cut = int(low + np.argmin(alive[low:high]))
                handed.update(_handed_on(graph, again, again[cut]))
        choice = _pruned(graph, [*kept, *handed])
        if choice not in found:
            found.append(choice)
    return min(found, key=lambda choice: backward_peak(graph, choice))


def _handed_on(graph: JointGraph, again: Sequence[int], cut: int) -> set[int]:
    """Of what is computed ``again``, what the forward's nodes from ``cut`` on need of those before it."""
    nodes = graph.nodes
    members = frozenset(again)
    found: set[int] = set()
    stack = [i for k in again if k >= cut and nodes[k].side is Side.FORWARD for i in nodes[k].inputs if i < cut]
    while stack:
        i = stack.pop()
        if i in members and i not in found:
            if nodes[i].keep is None:
                stack.extend(nodes[i].inputs)
            else:
                found.add(i)
    return found


def _pruned(graph: JointGraph, kept: Sequence[int]) -> tuple[int, ...]:
    """`kept` without what neither the backward nor what it computes again reads then."""
    read = {i for k in graph.recomputed(kept) for i in graph.nodes[k].inputs}
    return tuple(sorted({k for k in kept if graph.needed[k] or k in read}))


def _with_products(graph: JointGraph, kept: tuple[int, ...], room: float, figures: DeviceFigures) -> tuple[int, ...]:
    """`kept` with products done again for at most ``room`` microseconds more: those that free most bytes in one.

    A convolution to many channels that writes faster than it computes frees a hundred times the bytes of a product of
    wide matrices in the same time. What is computed again in a chain is alive together, so of the choices within
    ``room`` the one is taken whose backward's simulated peak times the step's time is least: what frees a smaller part
    of the peak than it takes of the time is not done again. A residual that is had again from the
    results of all layers before it would have their products done again before the backward of the last layer: where
    only some are done again, the residual between these and the others may be kept instead.
    """
    limit = graph.added_microseconds(kept) + room
    values, positions = joint_values(graph, Prices(math.inf))
    network = Cut(values)
    found = [kept]
    for part in np.geomspace(_DEAREST_PRODUCT, _CHEAPEST_PRODUCT, _TRIES):
        prices = Prices(WORTH * figures.bandwidth, expensive=True, products=float(part) * figures.bandwidth)
        less = tuple(positions[v] for v in network.solve([prices.price(graph, k) for k in positions]).kept)
        if graph.added_microseconds(less) > limit:
            found += [_mixed(graph, less, found[-1], limit), *_severed(graph, less, found[-1], limit)]
            break
        if less != found[-1]:
            found.append(less)
    time = graph.microseconds
    return min(found, key=lambda kept: backward_peak(graph, kept) * (time + graph.added_microseconds(kept)))


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


def _severed(graph: JointGraph, head: Sequence[int], tail: Sequence[int], limit: float) -> list[tuple[int, ...]]:
    """Like `_mixed`, with what the rest needs of the first nodes kept: those that keep least within ``limit``."""
    nodes = graph.nodes
    found: dict[tuple[int, ...], float] = {}
    for cut in np.linspace(0, len(nodes), _CUTS + 1, dtype=int)[1:-1].tolist():
        kept = graph.completed([*(k for k in head if k < cut), *(k for k in tail if k >= cut)])
        crossing = _handed_on(graph, graph.recomputed(kept), cut)
        choice = graph.completed([*kept, *crossing])
        if crossing and graph.added_microseconds(choice) <= limit:
            found[choice] = sum(nodes[k].keep or 0.0 for k in choice)
    return sorted(found, key=lambda choice: found[choice])[:_SEVERED]


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
    return Cut(values).solve([v.again for v in values])


class Cut:
    """The network of some values, for cuts at several costs of computing them again."""

    def __init__(self, values: Sequence[Value]) -> None:
        self.values = values
        self.relevant = _ancestors(values)
        number = {v: k for k, v in enumerate(self.relevant)}
        count = len(self.relevant)
        source, sink = 2 * count, 2 * count + 1
        # keep edges first, then edges of computing again, then those of infinite capacity
        tails = [*(2 * k for k in range(count)), *(source for _ in range(count))]
        heads = [*(2 * k + 1 for k in range(count)), *(2 * k for k in range(count))]
        for k, v in enumerate(self.relevant):
            if values[v].needed:
                tails.append(2 * k + 1)
                heads.append(sink)
            for i in dict.fromkeys(values[v].inputs):
                if i in number:
                    tails.append(2 * number[i] + 1)
                    heads.append(2 * k)
        self._tails, self._heads = np.array(tails, dtype=np.int32), np.array(heads, dtype=np.int32)
        self._ends = (source, sink)
        # every edge with its reverse, so that the solver's flow has the structure of our capacities
        n = 2 * count + 2
        there = self._tails.astype(np.int64) * n + self._heads
        keys = np.concatenate((there, self._heads.astype(np.int64) * n + self._tails))
        self._keys, self._slots = np.unique(keys, return_inverse=True)
        self._indptr = np.searchsorted(self._keys // n, np.arange(n + 1)).astype(np.int32)
        self._columns = (self._keys % n).astype(np.int32)

    def solve(self, again: Sequence[float | None]) -> Kept:
        """`choose_kept` with other costs of computing the values again, in their order."""
        values, relevant = self.values, self.relevant
        if not relevant:
            return Kept((), (), 0.0)
        _check_possible(values, again)
        total = sum((values[v].keep or 0.0) + (again[v] or 0.0) for v in relevant)
        # a power of two, so that whole bytes stay whole
        scale = 2.0 ** (math.frexp((_LIMIT - len(relevant) * 4) / max(1.0, total))[1] - 1)
        given = [values[v].keep for v in relevant] + [again[v] for v in relevant]
        capacities = np.full(len(self._tails), _LIMIT, dtype=np.int64)
        capacities[: len(given)] = [_LIMIT if c is None else math.ceil(c * scale) for c in given]
        side = self._sink_side(capacities)
        kept: list[int] = []
        recomputed: list[int] = []
        for k, v in enumerate(relevant):
            inside, outside = side[2 * k], side[2 * k + 1]
            if outside and not inside:
                assert values[v].keep is not None, f"the cut goes through {values[v].name}, which cannot be kept"
                kept.append(v)
            elif inside:
                recomputed.append(v)
        return Kept(tuple(kept), tuple(recomputed), sum(values[v].keep or 0.0 for v in kept))

    def _sink_side(self, capacities: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[bool]:
        """Nodes that can still reach the sink after a maximum flow: the sink's side of the cut nearest to the sink."""
        n = len(self._indptr) - 1
        merged = np.zeros(len(self._keys), dtype=np.int64)
        np.add.at(merged, self._slots[: len(capacities)], capacities)
        data = np.minimum(merged, _LIMIT).astype(np.int32)
        graph = scipy.sparse.csr_matrix((data, self._columns, self._indptr), shape=(n, n))
        source, sink = self._ends
        flow = scipy.sparse.csgraph.maximum_flow(graph, source, sink, method="dinic").flow
        left = np.flatnonzero(data.astype(np.int64) - flow.data > 0)
        rows = (self._keys[left] // n).astype(np.int32)
        backwards = scipy.sparse.csr_matrix((np.ones(len(left)), (self._columns[left], rows)), shape=(n, n))
        order = scipy.sparse.csgraph.breadth_first_order(backwards, sink, directed=True, return_predecessors=False)
        reached = np.zeros(n, dtype=np.bool_)
        reached[order] = True
        return reached.tolist()


def _check_possible(values: Sequence[Value], costs: Sequence[float | None]) -> None:
    """Raise ValueError if the backward needs what it cannot have even if all that can be kept is kept."""
    had: list[bool] = []
    for value, cost in zip(values, costs, strict=True):
        again = cost is not None and all(had[i] for i in value.inputs)
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
