"""Where a training step can be cut into segments: few bytes of the forward cross, the backward runs them in reverse.

A segment is a stretch of forward nodes between two places where the bytes that cross have a minimum (the residual
stream of a transformer, the result of a block), and the nodes of the backward that read what the stretch made. What is
alive while the backward runs one segment is then what the segments before it keep, and what it does itself; that is
what makes a choice per segment possible (`remat_choice`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memplan.ir.joint import JointGraph, NodeKind, Side

#: By how much the bytes that cross must rise between two cuts.
PROMINENCE = 1.2
_MOST_SEGMENTS = 400
#: Segments that read a value of no one segment.
_COMMON = 4
#: Farthest segment that counts as near: longest run of segments that is chosen for as one, and its neighbours.
REACH = 16
#: Segment of what is there before the step, or can be had again for nothing.
OUTSIDE = -1


@dataclass(frozen=True)
class Segments:
    """``of[k]`` is the segment of node ``k``, 0 to ``count - 1`` in the forward's order, or `OUTSIDE`."""

    graph: JointGraph
    of: tuple[int, ...]
    count: int

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Nodes of each segment in graph order: what the forward or either side runs, then the backward's."""
        found: list[list[int]] = [[] for _ in range(self.count)]
        for backward in (False, True):
            for k, s in enumerate(self.of):
                if s != OUTSIDE and (self.graph.nodes[k].side is Side.BACKWARD) is backward:
                    found[s].append(k)
        return tuple(map(tuple, found))

    @cached_property
    def again_for_backward(self) -> tuple[bool, ...]:
        """For each node whether its value may be made again in the backward, because something there comes of it.

        What only goes into values that can be kept alone (sums over the slices of a loss) is none of the backward's.
        """
        nodes, users = self.graph.nodes, self.graph.users
        found = [False] * len(nodes)
        for k in range(len(nodes) - 1, -1, -1):
            if nodes[k].side is Side.BACKWARD:
                found[k] = True
            elif nodes[k].again is not None:
                found[k] = self.graph.needed[k] or any(found[u] for u in users[k])
        return tuple(found)

    @cached_property
    def common(self) -> frozenset[int]:
        """Nodes that many segments read (a mask, a table of positions): how far away they are says nothing."""
        users = self.graph.users
        return frozenset(k for k in range(len(self.of)) if len({self.of[u] for u in users[k]}) > _COMMON)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """A number for each segment, equal for those that do the same on the same sizes."""
        place = {k: n for members in self.members for n, k in enumerate(members)}
        numbers: dict[object, int] = {}
        return tuple(numbers.setdefault(self._signature(s, place), len(numbers)) for s in range(self.count))

    def _signature(self, segment: int, place: dict[int, int]) -> object:
        nodes, users = self.graph.nodes, self.graph.users
        rows = []
        for k in self.members[segment]:
            inputs = tuple(
                (nodes[i].kind.value, nodes[nodes[i].storage].nbytes)
                if self.of[i] == OUTSIDE or abs(segment - self.of[i]) > REACH or i in self.common
                else (segment - self.of[i], place[i])
                for i in nodes[k].inputs
            )
            reached = tuple(sorted({max(-REACH - 1, min(REACH + 1, self.of[u] - segment)) for u in users[k]}))
            rows.append((nodes[k].signature, inputs, reached))
        return hash(tuple(rows)), len(rows)

    @cached_property
    def carried(self) -> dict[int, tuple[int, int]]:
        """What the forward hands on from segment to segment without keeping it: storage -> (made in, last read in).

        No later segment that may run again in the backward reads it, or it would be kept (sums over the slices of a
        loss, and what their first slice read).
        """
        nodes, read = self.graph.nodes, self.again_for_backward
        found: dict[int, tuple[int, int]] = {}
        for k, node in enumerate(nodes):
            made = self.of[k]
            if node.side is not Side.FORWARD or not node.nbytes or made == OUTSIDE:
                continue
            later = [u for u in readers(self.graph, k) if nodes[u].side is Side.FORWARD and self.of[u] > made]
            if later and not any(read[u] for u in later):
                found[k] = made, max(self.of[u] for u in later)
        return found

    @cached_property
    def last_read(self) -> dict[int, int]:
        """For each storage the earliest segment (in the backward the last to run) that reads it."""
        nodes = self.graph.nodes
        found: dict[int, int] = {}
        for k, node in enumerate(nodes):
            if self.of[k] == OUTSIDE:
                continue
            for i in node.inputs:
                root = nodes[i].storage
                found[root] = min(found.get(root, self.count), self.of[k])
        return found

    @cached_property
    def born(self) -> tuple[int, ...]:
        """For each boundary ``s``: bytes of results that the backward of segments ``s`` and later has made."""
        made = [0] * (self.count + 1)
        for k, node in enumerate(self.graph.nodes):
            if node.side is Side.BACKWARD and node.result and self.of[k] != OUTSIDE:
                made[self.of[k]] += self.graph.nodes[node.storage].nbytes
        return tuple(np.cumsum(made[::-1])[::-1].tolist())

    @cached_property
    def passed(self) -> tuple[int, ...]:
        """For each boundary ``s``: bytes of gradients made by segments ``s`` and later that earlier ones read."""
        nodes = self.graph.nodes
        results = {n.storage for n in nodes if n.result}
        reads = self.last_read
        change = [0] * (self.count + 1)
        for k, node in enumerate(nodes):
            if node.side is Side.BACKWARD and node.nbytes and self.of[k] != OUTSIDE and k not in results:
                last = reads.get(k, self.of[k])
                if last < self.of[k]:
                    change[self.of[k]] += node.nbytes
                    change[last] -= node.nbytes
        return tuple(np.cumsum(change[::-1])[::-1].tolist())


def find_segments(graph: JointGraph, prominence: float = PROMINENCE) -> Segments:
    """Cut a joint graph into segments, between whose ends the bytes that cross rise by the factor ``prominence``."""
    free = _free(graph)
    forward = [k for k, n in enumerate(graph.nodes) if n.side is Side.FORWARD and not free[k]]
    cuts = _cuts(graph, forward, free, prominence)
    of = [OUTSIDE] * len(graph.nodes)
    index = 0
    for n, k in enumerate(forward):
        node = graph.nodes[k]
        # a view, or an item of a call's results, belongs to what it shows
        source = of[node.inputs[0]] if node.kind is NodeKind.VIEW and node.inputs else OUTSIDE
        of[k] = index if source == OUTSIDE else source
        if index < len(cuts) and n == cuts[index]:
            index += 1
    count = len(cuts) + 1
    _place_backward(graph, of, count, free)
    return Segments(graph, tuple(of), count)


def _free(graph: JointGraph) -> list[bool]:
    """What is there before the step, and what comes of it for nothing: views and literals."""
    found: list[bool] = []
    for node in graph.nodes:
        if node.kind is NodeKind.INPUT:
            found.append(True)
        else:
            trivial = node.again == 0 and node.side is Side.FORWARD and node.microseconds == 0
            found.append(trivial and all(found[i] for i in node.inputs))
    return found


def _cuts(graph: JointGraph, forward: list[int], free: list[bool], prominence: float) -> list[int]:
    """Positions in ``forward`` after which few bytes cross."""
    place = {k: n for n, k in enumerate(forward)}
    change = np.zeros(len(forward) + 1, dtype=np.int64)
    for n, k in enumerate(forward):
        node = graph.nodes[k]
        if node.nbytes and node.storage == k:
            last = max((place[u] for u in readers(graph, k) if u in place), default=n)
            change[n] += node.nbytes
            change[last] -= node.nbytes
    crossing = np.cumsum(change)[:-1]
    while True:
        cuts = _valleys(crossing, prominence)
        if len(cuts) < _MOST_SEGMENTS:
            return cuts
        prominence *= 1.3


def readers(graph: JointGraph, k: int) -> list[int]:
    """All that read a node's storage, through views."""
    found: list[int] = []
    stack = [k]
    while stack:
        for u in graph.users[stack.pop()]:
            found.append(u)
            if graph.nodes[u].storage == graph.nodes[k].storage:
                stack.append(u)
    return found


def _valleys(crossing: np.ndarray[tuple[int], np.dtype[np.int64]], prominence: float) -> list[int]:
    """Positions of minima between rises and falls by the factor ``prominence``; the ends do not count."""
    found: list[int] = []
    best, lowest, highest, falling = 0, 0, 0, False
    for n, value in enumerate(crossing.tolist()):
        if falling:
            if value < lowest:
                best, lowest = n, value
            elif value > lowest * prominence + 1:
                found.append(best)
                falling, highest = False, value
        elif value > highest:
            highest = value
        elif value * prominence + 1 < highest:
            falling, best, lowest = True, n, value
    return found


def _place_backward(graph: JointGraph, of: list[int], count: int, free: list[bool]) -> None:
    """Fill in the segments of the backward's nodes, and of those of either side."""
    nodes = graph.nodes
    crosses = [False] * len(nodes)
    for k, node in enumerate(nodes):
        if node.side is Side.FORWARD and not free[k]:
            crosses[k] = any(nodes[u].side is Side.FORWARD and of[u] > of[k] for u in graph.users[k])
    need = [count] * len(nodes)  # earliest segment whose values, that nothing later in the forward reads, are read
    for k, node in enumerate(nodes):
        if node.side is Side.FORWARD:
            need[k] = count if free[k] or crosses[k] else of[k]
        else:
            need[k] = min((need[i] for i in node.inputs if nodes[i].side is not Side.BACKWARD), default=count)
    backward = [k for k, n in enumerate(nodes) if n.side is Side.BACKWARD and n.kind is not NodeKind.INPUT]
    wanted = np.array([need[k] for k in backward], dtype=np.int64)
    position = len(backward)
    starts = [0] * (count + 1)  # segment s runs over backward[starts[s + 1] : starts[s]]
    starts[0] = position
    for s in range(1, count):
        # the place before which most nodes read segments from s on, and after which most read earlier ones
        early = np.concatenate(([0], np.cumsum(wanted < s)))
        late = np.concatenate(([0], np.cumsum((wanted >= s) & (wanted < count))))
        wrong = early + (late[-1] - late)
        starts[s] = int(np.argmin(wrong[: starts[s - 1] + 1]))
    for s in range(count):
        for n in range(starts[s + 1], starts[s]):
            of[backward[n]] = s
    for k in range(len(nodes) - 1, -1, -1):
        if nodes[k].side is Side.EITHER and nodes[k].kind is not NodeKind.INPUT:
            of[k] = max((of[u] for u in graph.users[k]), default=count - 1)
            of[k] = count - 1 if of[k] == OUTSIDE else of[k]
