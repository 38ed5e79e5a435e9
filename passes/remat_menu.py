"""What each run of segments may keep: a menu of minimum cuts at several prices, with their bytes, time and peaks.

Within a run everything may be computed again from what enters it, products too; what later segments read is kept. Runs
that do the same on the same sizes (the layers of a model) share one menu.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from memplan.ir.device import DeviceFigures
from memplan.ir.joint import JointGraph, NodeKind, Side

from .remat_segments import PROMINENCE, Segments, find_segments
from .remat_timeline import peak_of
from .rematerialize import PREFERENCE, Cut, Prices, Value

#: Numbers of segments that are chosen for together.
RUNS = (1, 2, 3, 4, 6, 8, 12, 16)
#: The same where hardly two segments are alike, so that there are many menus to make.
_FEWER_RUNS = (1, 2, 4, 8)
_MOST_MENUS = 280
#: Prices of a microsecond, in what the device moves in one: from nothing done twice to everything.
_WEIGHTS = (math.inf, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01, 0.0)
#: Long runs are only worth having where nearly everything is computed again.
_LOW_WEIGHTS = (0.5, 0.12, 0.03, 0.0)
_SHORT = 4


@dataclass(frozen=True, slots=True)
class Item:
    """One way to run a run of segments.

    Attributes
    ----------
    kept:
        Places of the kept nodes among the run's nodes (`run_nodes`).
    nbytes:
        Bytes kept from the run's forward to its backward.
    microseconds:
        What its recomputation takes.
    forward, backward:
        Largest live bytes of its own while its forward and its backward run, what is kept of it included.
    """

    kept: tuple[int, ...]
    nbytes: int
    microseconds: float
    forward: int
    backward: int


def run_nodes(segments: Segments, start: int, length: int) -> tuple[int, ...]:
    """Nodes of a run: the forward's and either side's in graph order, then the backward's in its order."""
    members = [k for s in range(start, start + length) for k in segments.members[s]]
    nodes = segments.graph.nodes
    return tuple(sorted(members, key=lambda k: (nodes[k].side is Side.BACKWARD, k)))


def make_menus(graph: JointGraph, figures: DeviceFigures) -> Menus:
    """Menus over segments as fine as there is work for: the more of them are alike, the more are told apart."""
    prominence = PROMINENCE
    while True:
        segments = find_segments(graph, prominence)
        for runs in (RUNS, _FEWER_RUNS):
            menus = Menus(segments, figures, runs)
            if len(menus.distinct()) <= _MOST_MENUS or segments.count <= len(_FEWER_RUNS):
                return menus
        prominence *= 1.4


@dataclass
class Menus:
    """Menus of all runs, made when they are asked for."""

    segments: Segments
    figures: DeviceFigures
    runs: tuple[int, ...] = RUNS
    #: False: only what is one pass over memory is computed again
    expensive: bool = True
    _made: dict[object, tuple[Item, ...]] = field(default_factory=dict)

    def distinct(self) -> set[object]:
        """What tells the menus apart."""
        count = self.segments.count
        return {self._key(s, n) for n in self.runs for s in range(count - n + 1)}

    def _key(self, start: int, length: int) -> object:
        end = start + length
        carried = tuple(
            (self.segments.graph.nodes[k].nbytes, made >= start, last < end)
            for k, (made, last) in self.segments.carried.items()
            if made < end and last >= start and (made < start or last >= end)
        )
        return self.segments.kinds[start:end], self.segments.passed[end], carried

    def menu(self, start: int, length: int) -> tuple[Item, ...]:
        """The items for segments ``[start, start + length)``, none of them worse than another in every respect."""
        key = self._key(start, length)
        if key not in self._made:
            self._made[key] = self._make(start, length)
        return self._made[key]

    def _make(self, start: int, length: int) -> tuple[Item, ...]:
        run = _Run(self.segments, start, length, run_nodes(self.segments, start, length))
        weights = _WEIGHTS if length <= _SHORT else _LOW_WEIGHTS
        prices = [
            Prices(w * self.figures.bandwidth if w else 0.0, PREFERENCE * min(1.0, w / PREFERENCE), self.expensive)
            for w in weights
        ]
        cuts = {0: run.cut(prices[0]), len(prices) - 1: run.cut(prices[-1])}
        _between(run, prices, cuts, 0, len(prices) - 1)
        found = {kept: run.item(kept) for kept in dict.fromkeys(cuts[k] for k in sorted(cuts))}
        return _undominated(list(found.values()))


def _between(run: _Run, prices: list[Prices], cuts: dict[int, tuple[int, ...]], low: int, high: int) -> None:
    """Cuts at the prices between two, where they differ: as recomputation gets cheaper less is kept."""
    if high - low > 1 and cuts[low] != cuts[high]:
        middle = (low + high) // 2
        cuts[middle] = run.cut(prices[middle])
        _between(run, prices, cuts, low, middle)
        _between(run, prices, cuts, middle, high)


def _undominated(items: list[Item]) -> tuple[Item, ...]:
    """Items that no other one is at least as good as in every respect; the fastest first."""
    items.sort(key=lambda i: (i.microseconds, i.nbytes, i.backward, i.forward))
    out: list[Item] = []
    for item in items:
        if not any(o.nbytes <= item.nbytes and o.backward <= item.backward and o.forward <= item.forward for o in out):
            out.append(item)
    return tuple(out)


@dataclass(frozen=True)
class _Run:
    segments: Segments
    start: int
    length: int
    nodes: tuple[int, ...]

    @property
    def graph(self) -> JointGraph:
        return self.segments.graph

    def inside(self, k: int) -> bool:
        return self.start <= self.segments.of[k] < self.start + self.length

    @cached_property
    def own(self) -> list[int]:
        """What the forward and either side run: first in `nodes`, so that a place among them is one in the run."""
        return [k for k in self.nodes if self.graph.nodes[k].side is not Side.BACKWARD]

    @cached_property
    def forced(self) -> list[bool]:
        """What other segments read must be there when the backward runs them again, so it is kept if it can be."""
        read = self.segments.again_for_backward
        return [any(not self.inside(u) and read[u] for u in self.graph.users[k]) for k in self.own]

    @cached_property
    def network(self) -> Cut:
        graph = self.graph
        number = {k: n for n, k in enumerate(self.own)}
        return Cut(
            [
                Value(
                    graph.nodes[k].name,
                    graph.nodes[k].keep,
                    None,
                    tuple(number[i] for i in graph.nodes[k].inputs if i in number),
                    forced or graph.needed[k],
                )
                for k, forced in zip(self.own, self.forced, strict=True)
            ]
        )

    def cut(self, prices: Prices) -> tuple[int, ...]:
        """Places of the nodes to keep at the given prices."""
        graph = self.graph
        again = [
            None if forced and graph.nodes[k].keep is not None else prices.price(graph, k)
            for k, forced in zip(self.own, self.forced, strict=True)
        ]
        return self.network.solve(again).kept

    def item(self, kept: tuple[int, ...]) -> Item:
        graph = self.graph
        nodes = graph.nodes
        chosen = {self.nodes[n] for n in kept}
        roots = {nodes[k].storage for k in chosen if nodes[nodes[k].storage].nbytes}
        held = {r: nodes[r].nbytes for r in roots}
        forward = [k for k in self.nodes if nodes[k].side is Side.FORWARD]
        either = [k for k in self.nodes if nodes[k].side is Side.EITHER and k in chosen]
        results = {nodes[k].storage for k in self.nodes if nodes[k].result}
        sequence, again = self.backward(chosen)
        microseconds = sum(nodes[k].again or 0.0 for k in again)
        passing = self.incoming()
        lasting = results | {r for r in passing if self.outlives(r)} | self.outgoing()
        end = self.start + self.length
        rest = max(0, self.segments.passed[end] - sum(passing.values()))
        carried, onward, past = self.carried()
        return Item(
            kept,
            sum(held.values()),
            microseconds,
            past + peak_of(graph, forward + sorted(either), carried, roots | results | onward),
            rest + peak_of(graph, sequence, {**held, **passing}, lasting),
        )

    def backward(self, chosen: set[int]) -> tuple[list[int], list[int]]:
        """The order in which the backward runs, recomputation where it is first needed; and what is recomputed."""
        nodes = self.graph.nodes
        done: set[int] = set()
        sequence: list[int] = []
        again: list[int] = []

        def need(k: int) -> None:
            stack, found = [k], []
            while stack:
                i = stack.pop()
                if i in done or i in chosen or not self.inside(i) or nodes[i].side is Side.BACKWARD:
                    continue
                done.add(i)
                found.append(i)
                stack.extend(nodes[i].inputs)
            found.sort()
            sequence.extend(found)
            again.extend(found)

        for k in self.nodes:
            if nodes[k].side is Side.BACKWARD and nodes[k].kind is not NodeKind.INPUT:
                for i in nodes[k].inputs:
                    need(i)
                sequence.append(k)
            elif nodes[k].side is Side.EITHER and nodes[k].result:
                need(k)
        return sequence, again

    def incoming(self) -> dict[int, int]:
        """Storages of gradients that later segments made and the run reads."""
        nodes = self.graph.nodes
        found = {}
        for k in self.nodes:
            for i in nodes[k].inputs:
                root = nodes[i].storage
                later = self.segments.of[root] >= self.start + self.length
                if nodes[root].side is Side.BACKWARD and nodes[root].nbytes and later and not nodes[root].result:
                    found[root] = nodes[root].nbytes
        return found

    def carried(self) -> tuple[dict[int, int], set[int], int]:
        """What the forward hands on: bytes of what the run reads, what is read after it, and bytes that pass it by."""
        nodes, end = self.graph.nodes, self.start + self.length
        reads = {nodes[i].storage for k in self.own for i in nodes[k].inputs}
        held, onward, past = {}, set(), 0
        for root, (made, last) in self.segments.carried.items():
            if made < self.start <= last and root in reads:
                held[root] = nodes[root].nbytes
            elif made < self.start and last >= end:
                past += nodes[root].nbytes
            if made < end <= last:
                onward.add(root)
        return held, onward, past

    def outlives(self, root: int) -> bool:
        return self.segments.last_read.get(root, self.start) < self.start

    def outgoing(self) -> set[int]:
        """Gradients that the run makes for earlier segments."""
        nodes = self.graph.nodes
        return {k for k in self.nodes if nodes[k].side is Side.BACKWARD and nodes[k].nbytes and self.outlives(k)}


def kept_nodes(segments: Segments, choice: list[tuple[int, int, Item]]) -> tuple[int, ...]:
    """Positions in the graph of what a choice of (start, length, item) keeps, and what is needed besides."""
    kept = [run_nodes(segments, start, length)[n] for start, length, item in choice for n in item.kept]
    return segments.graph.completed(kept)
