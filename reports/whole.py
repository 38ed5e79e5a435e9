"""Several graphs that run one after another, as one graph on one timeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.errors import ReportError
from .allocation import allocated_bytes, live_bytes, residue
from .model import Arena, Buffer, Graph, Pool, Step


@dataclass(frozen=True, slots=True)
class Join:
    """Buffer ``saved`` of graph ``forward`` is input ``received`` of graph ``backward``: the same bytes."""

    forward: str
    saved: str
    backward: str
    received: str


@dataclass(frozen=True, slots=True)
class _Timeline:
    """Where each graph starts, and what its buffers are called on the common timeline."""

    starts: Mapping[str, int]
    total: int
    names: Mapping[tuple[str, str], str]
    #: allocations of a forward under the names that its backward has for them
    slabs: Mapping[str, str]

    def pool(self, graph: Graph, name: str) -> str:
        """What a pool is called on the common timeline."""
        return self.slabs.get(f"{graph.name}:{name}", f"{graph.name}:{name}")

    def stop(self, graph: Graph, death: int) -> int:
        """A death on the common timeline; what outlives its graph lives to the end of the step."""
        return self.total + 1 if death > len(graph.steps) else self.starts[graph.name] + death


def whole_step(graphs: Sequence[Graph], joins: Sequence[Join]) -> Graph:
    """The graphs in the order given, on one timeline.

    A joined buffer lives from its birth in the forward until the backward lets go of it: at the end of its donated
    input's lifetime, or with the backward call where it is not donated. What a graph returns to the user, and what it
    saves for a backward that is not there, lives to the end of the step.

    Raises
    ------
    ReportError
        If a join names a graph or a buffer that is not there.
    """
    timeline = _timeline(graphs, joins)
    rows: dict[str, Buffer] = {}
    for g in graphs:
        for b in g.buffers:
            name = timeline.names[g.name, b.name]
            rows[name] = _received(rows[name], b, g, timeline) if name in rows else _moved(b, g, timeline)
    buffers = tuple(b.model_copy(update={"storage": _root(b, rows)}) for b in rows.values())
    pools = _lasting(
        tuple(_moved_pool(p, g, timeline) for g in graphs for p in g.pools if _own(p, g, timeline)), buffers
    )
    steps = tuple(_moved_step(s, g, timeline) for g in graphs for s in g.steps)
    unexplained = [value for g in graphs for value in residue(g)]
    known = allocated_bytes(buffers, pools, steps)
    allocated = tuple(max(0, value + rest) for value, rest in zip(known, unexplained, strict=True))
    devices = sorted({b.device for b in buffers if b.counted} | {p.device for p in pools})
    predicted = {d: max(allocated_bytes(buffers, pools, steps, d), default=0) for d in devices}
    if len(devices) == 1:
        predicted = {devices[0]: max(allocated, default=0)}
    return Graph(
        name="step",
        phase="step",
        steps=steps,
        buffers=buffers,
        pools=pools,
        arenas=tuple(_moved_arena(a, g, timeline) for g in graphs for a in g.arenas),
        live=live_bytes(buffers, steps),
        allocated=allocated,
        predicted_peak=predicted,
        reserved={device: found for g in graphs for device, found in g.reserved.items()},
        notes=tuple(n for g in graphs for n in g.notes),
    )


def _root(b: Buffer, rows: Mapping[str, Buffer]) -> str:
    """The storage of a buffer across graphs: a backward may work in place on what the forward made in place."""
    name = b.storage
    while name in rows and rows[name].storage != name:
        name = rows[name].storage
    return name


def _timeline(graphs: Sequence[Graph], joins: Sequence[Join]) -> _Timeline:
    starts: dict[str, int] = {}
    total = 0
    for g in graphs:
        starts[g.name] = total
        total += len(g.steps)
    names = {(g.name, b.name): f"{g.name}:{b.name}" for g in graphs for b in g.buffers}
    for j in joins:
        for pair in ((j.forward, j.saved), (j.backward, j.received)):
            if pair not in names:
                raise ReportError(f"a join names buffer {pair[1]!r} of graph {pair[0]!r}, which is not there")
        if starts[j.forward] >= starts[j.backward] + 1:
            raise ReportError(f"a join goes from {j.forward!r} back to {j.backward!r}, which runs before it")
        names[j.backward, j.received] = names[j.forward, j.saved]
    pool_of = {(g.name, b.name): b.pool for g in graphs for b in g.buffers if b.pool is not None}
    slabs = {}
    for j in joins:
        ahead, behind = pool_of.get((j.forward, j.saved)), pool_of.get((j.backward, j.received))
        if ahead is not None and behind is not None:
            slabs[f"{j.backward}:{behind}"] = f"{j.forward}:{ahead}"
    return _Timeline(starts, total, names, slabs)


def _own(p: Pool, g: Graph, t: _Timeline) -> bool:
    """Whether the graph made the pool itself."""
    return f"{g.name}:{p.name}" not in t.slabs


def _moved(b: Buffer, g: Graph, t: _Timeline) -> Buffer:
    start = t.starts[g.name]
    return b.model_copy(
        update={
            "name": t.names[g.name, b.name],
            "birth": start + min(b.birth, len(g.steps)),
            "death": max(t.stop(g, b.death), start + b.birth + 1),
            "storage": t.names[g.name, b.storage],
            "in_place_of": None if b.in_place_of is None else t.names[g.name, b.in_place_of],
            "pool": None if b.pool is None else t.pool(g, b.pool),
            "arena": None if b.arena is None else f"{g.name}:{b.arena}",
        }
    )


def _received(held: Buffer, b: Buffer, g: Graph, t: _Timeline) -> Buffer:
    """The forward's buffer, living until this graph lets go of it."""
    if held.kind == "output" or not held.counted:
        return held
    stop = t.starts[g.name] + (min(b.death, len(g.steps)) if b.donated else len(g.steps))
    if b.death > len(g.steps) and b.donated:
        stop = t.total + 1
    return held.model_copy(update={"death": max(stop, held.birth + 1), "donated": b.donated})


def _moved_pool(p: Pool, g: Graph, t: _Timeline) -> Pool:
    start = t.starts[g.name]
    return p.model_copy(update={"name": f"{g.name}:{p.name}", "birth": start + p.birth, "death": t.stop(g, p.death)})


def _moved_arena(a: Arena, g: Graph, t: _Timeline) -> Arena:
    """All programs of a group share one arena, each with its own view of it."""
    names = tuple(t.names[g.name, b] for b in a.buffers)
    return a.model_copy(update={"name": f"{g.name}:{a.name}", "buffers": names})


def _lasting(pools: tuple[Pool, ...], buffers: Sequence[Buffer]) -> tuple[Pool, ...]:
    """A pool that outlived its graph ends with the last buffer in it."""
    last: dict[str, int] = {}
    for b in buffers:
        if b.pool is not None:
            last[b.pool] = max(last.get(b.pool, 0), b.death)
    return tuple(p.model_copy(update={"death": min(p.death, last.get(p.name, p.death))}) for p in pools)


def _moved_step(s: Step, g: Graph, t: _Timeline) -> Step:
    return s.model_copy(
        update={
            "reads": tuple(t.names.get((g.name, b), f"{g.name}:{b}") for b in s.reads),
            "writes": tuple(t.names.get((g.name, b), f"{g.name}:{b}") for b in s.writes),
        }
    )
