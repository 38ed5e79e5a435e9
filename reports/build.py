"""Plan -> report: every buffer with its place, its life and whom it is for; several graphs on one timeline."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir import plan as ir_plan
from ..ir import program as ir
from .allocation import live_bytes
from .model import (
    RUN,
    Activation,
    Arena,
    Buffer,
    Certificate,
    Graph,
    Measurement,
    Origin,
    Placement,
    Pool,
    Report,
    Reserved,
    Step,
    StepRecord,
    WaterfallStep,
)
from .shapes import shapes_of
from .step_waterfall import step_waterfall
from .whole import Join, whole_step

#: Dynamo's name for the module that was compiled, before the path inside it: ``L['self'].layers.0``.
_ROOT = re.compile(r"^L\[['\"][^'\"]*['\"]\]\.?")


def build_report(
    plans: Sequence[ir_plan.Plan],
    *,
    joins: Sequence[tuple[str, str]] = (),
    measured: Measurement | None = None,
    waterfall: Sequence[tuple[str, int]] = (),
    environment: Mapping[str, str] | None = None,
    target: str = "",
) -> Report:
    """The report of one compiled model: an inference graph, or a forward graph and its backward.

    Parameters
    ----------
    plans:
        In the order they run.
    joins:
        (buffer of the forward, input of the backward that receives it); see `StepRecord`.
    waterfall:
        (stage, simulated peak in bytes after it). Where the last is not the plan's peak, a last stage
        ``"unattributed"`` closes the gap, so that the stages always sum to it.
    """
    record = StepRecord(tuple(plans), tuple(waterfall), measured, dict(environment or {}), tuple(joins))
    return report_of([record], target=target)


def report_of(records: Sequence[StepRecord], *, target: str = "") -> Report:
    """One report of several compiled graphs (graph breaks): forwards in order, then backwards in reverse order.

    Of what was compiled again for other sizes, the step has the compilation that needs the most bytes.
    """
    entries = _in_order(records)
    names = _unique([e.plan.program.name or e.plan.program.phase.value for e in entries])
    graphs = [graph_of(e.plan, name, e.stages) for e, name in zip(entries, names, strict=True)]
    joins = _joins(records, entries, graphs)
    whole: Graph | None = None
    waterfall: tuple[WaterfallStep, ...] = ()
    ways = steps_of(records)
    chosen: tuple[int, ...] = tuple(range(len(records)))
    if len(graphs) > 1 or any(len(way) > 1 for way in ways):
        chosen, inside, whole = _chosen_step(ways, entries, graphs, joins)
        waterfall = step_waterfall(whole, inside, [records[k].eager for k in chosen])
    elif graphs:
        waterfall = step_waterfall(graphs[0], graphs, ())
    peak = (whole or graphs[0]).peak if graphs else 0
    environment: dict[str, str] = {}
    for record in records:
        environment.update({str(k): str(v) for k, v in record.environment.items()})
    return Report(
        target=target,
        graphs=tuple(graphs),
        whole=whole,
        waterfall=_closed(_waterfall(records), peak) or waterfall,
        measured=tuple(r.measured for r in records if r.measured is not None),
        activations=_activations(chosen, records, entries, names),
        environment=environment,
    )


def steps_of(records: Sequence[StepRecord]) -> list[tuple[int, ...]]:
    """The ways in which a step can run: the records in the order of their forwards, some perhaps more than once.

    Steps as they were seen to run, with what was never seen to run in none of them; where none were seen, the
    `compilations`.
    """
    seen: dict[int, dict[int, int]] = {}
    for k, record in enumerate(records):
        for number, place in record.runs:
            seen.setdefault(number, {})[place] = k
    steps = [tuple(places[n] for n in sorted(places)) for _, places in sorted(seen.items())]
    return list(dict.fromkeys(steps)) or compilations([r.compilation for r in records])


def _chosen_step(
    ways: Sequence[tuple[int, ...]], entries: Sequence[_Entry], graphs: Sequence[Graph], joins: Sequence[Join]
) -> tuple[tuple[int, ...], list[Graph], Graph]:
    """The way that needs most; its graphs in the order in which they run, and all on one timeline."""
    found = []
    for way in ways:
        inside, joined = _laid_out(way, entries, graphs, joins)
        found.append((way, inside, whole_step(inside, joined)))
    return max(found, key=lambda one: one[2].peak)


def _laid_out(
    way: Sequence[int], entries: Sequence[_Entry], graphs: Sequence[Graph], joins: Sequence[Join]
) -> tuple[list[Graph], list[Join]]:
    """The graphs of a step: forwards in order, then the backwards, the last forward's first. What runs again has the
    number of its run in its name."""
    ahead: list[Graph] = []
    behind: list[Graph] = []
    found: list[Join] = []
    times: dict[int, int] = {}
    for k in way:
        times[k] = times.get(k, 0) + 1
        suffix = f"{RUN}{times[k]}" if times[k] > 1 else ""
        for e, g in zip(entries, graphs, strict=True):
            if e.record == k:
                backward = e.plan.program.phase is ir.Phase.BACKWARD
                (behind if backward else ahead).append(_named(g, f"{g.name}{suffix}"))
                own = (j for j in joins if j.forward == g.name)
                found += [replace(j, forward=f"{j.forward}{suffix}", backward=f"{j.backward}{suffix}") for j in own]
    return ahead + behind[::-1], found


def _named(graph: Graph, name: str) -> Graph:
    """The graph under another name."""
    if name == graph.name:
        return graph
    steps = tuple(s.model_copy(update={"graph": name}) for s in graph.steps)
    return graph.model_copy(update={"name": name, "steps": steps})


def compilations(known: Sequence[tuple[int, int] | None]) -> list[tuple[int, ...]]:
    """The ways in which a step can run: positions, with one compilation of each frame.

    Frames that were compiled again, each time together as a rule, go through their compilations side by side.
    """
    frames: dict[object, list[int]] = {}
    for k, compilation in enumerate(known):
        frames.setdefault(k if compilation is None else (compilation[0],), []).append(k)
    times = max(map(len, frames.values()), default=0)
    ways = [tuple(sorted(ks[min(n, len(ks) - 1)] for ks in frames.values())) for n in range(times)]
    return list(dict.fromkeys(ways))


@dataclass(frozen=True, slots=True)
class _Entry:
    record: int
    plan: ir_plan.Plan
    stages: tuple[tuple[str, int], ...]


def _in_order(records: Sequence[StepRecord]) -> list[_Entry]:
    """Forwards in order of compilation, then the backwards, the last forward's first."""
    entries = [
        _Entry(k, plan, record.stages[n] if n < len(record.stages) else ())
        for k, record in enumerate(records)
        for n, plan in enumerate(record.plans)
    ]
    ahead = [e for e in entries if e.plan.program.phase is not ir.Phase.BACKWARD]
    behind = [e for e in entries if e.plan.program.phase is ir.Phase.BACKWARD]
    return ahead + behind[::-1]


def _joins(records: Sequence[StepRecord], entries: list[_Entry], graphs: list[Graph]) -> list[Join]:
    found: list[Join] = []
    for k, record in enumerate(records):
        mine = [(e.plan.program.phase, g) for e, g in zip(entries, graphs, strict=True) if e.record == k]
        before = [g.name for phase, g in mine if phase is not ir.Phase.BACKWARD]
        after = [g.name for phase, g in mine if phase is ir.Phase.BACKWARD]
        if before and after:
            found += [Join(before[0], saved, after[0], received) for saved, received in record.joins]
    return found


def _activations(
    way: Sequence[int], records: Sequence[StepRecord], entries: Sequence[_Entry], names: Sequence[str]
) -> tuple[Activation, ...]:
    """What became of what the backwards of a step need, under the name of the graph that makes it."""
    found = []
    for k in way:
        record = records[k]
        graph = next((name for e, name in zip(entries, names, strict=True) if e.record == k), "")
        found += [
            Activation(
                name=a.name,
                graph=graph,
                fate=a.fate.value,
                nbytes=a.nbytes,
                microseconds=a.microseconds,
                origin=_origin(a.origin),
            )
            for a in record.activations
        ]
    return tuple(found)


def _waterfall(records: Sequence[StepRecord]) -> list[tuple[str, int]]:
    """Of one record as it is; of several, only what a single timeline can be compared with: nothing."""
    return list(records[0].waterfall) if len(records) == 1 else []


def _closed(stages: list[tuple[str, int]], peak: int) -> tuple[WaterfallStep, ...]:
    if stages and stages[-1][1] != peak:
        stages = [*stages, ("unattributed", peak)]
    return tuple(WaterfallStep(name=name, peak=value) for name, value in stages)


def _unique(names: Iterable[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


def graph_of(plan: ir_plan.Plan, name: str | None = None, stages: Sequence[tuple[str, int]] = ()) -> Graph:
    """The report of one plan, at the hinted sizes; ``stages`` is its own waterfall: (stage, peak after it)."""
    program = plan.program
    name = name or program.name
    pools = tuple(
        Pool(
            name=p.name,
            nbytes=ir.evaluate(p.nbytes, program.hints),
            device=p.device,
            birth=p.lifetime.start,
            death=p.lifetime.stop,
        )
        for p in plan.pools
        if p not in plan.arenas
    )
    pools += tuple(
        Pool(name=s.name, nbytes=ir.evaluate(s.nbytes, program.hints), device=s.device, birth=0, death=death)
        for s, death in _slabs(plan)
    )
    notes = _notes(plan)
    shapes = shapes_of(program)
    buffers = tuple(_buffer(plan, b, shapes, notes) for b in _planned(plan))
    steps = tuple(_step(program, program.by_name[op], name, notes) for op in plan.order)
    certificate = plan.certificate
    return Graph(
        name=name,
        phase=program.phase.value,
        steps=steps,
        buffers=buffers,
        pools=pools,
        arenas=tuple(_arena(plan, p) for p in plan.arenas),
        live=live_bytes(buffers, steps),
        allocated=plan.timeline[: len(steps)],
        predicted_peak=dict(plan.predicted_peak),
        reserved={
            device: Reserved(resident=m.resident, live=m.live, reserved=m.reserved) for device, m in plan.step.items()
        },
        waterfall=_closed(list(stages), max(plan.timeline[: len(steps)], default=0)),
        certificate=Certificate(
            program_peak=certificate.program_peak,
            peak=certificate.peak,
            order_bound=certificate.order_bound,
            placed_peak=certificate.placed_peak,
            alignment=certificate.alignment,
            note=certificate.note,
        ),
        notes=plan.notes,
    )


def _arena(plan: ir_plan.Plan, pool: ir_plan.Pool) -> Arena:
    program = plan.program
    inside = [
        n for n, place in plan.placements.items() if isinstance(place, ir_plan.InPool) and place.pool == pool.name
    ]
    return Arena(
        name=pool.name,
        nbytes=ir.evaluate(pool.nbytes, program.hints),
        device=pool.device,
        memory=pool.memory.value,
        group=pool.group,
        buffers=tuple(inside),
        apart=sum(program.nbytes(n) for n in inside),
    )


def _planned(plan: ir_plan.Plan) -> list[ir.Buffer]:
    return [b for b in plan.program.buffers.values() if b.name in plan.lifetimes and b.name in plan.placements]


def _notes(plan: ir_plan.Plan) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, text in plan.notes:
        found[name] = (*found.get(name, ()), text)
    return found


def _origin(origin: ir.Origin) -> Origin:
    return Origin(
        node=origin.node,
        op=origin.op,
        module=_ROOT.sub("", origin.module),
        file=origin.file,
        line=max(0, origin.line),
        code=origin.code,
    )


def _buffer(
    plan: ir_plan.Plan, b: ir.Buffer, shapes: Mapping[str, tuple[int, ...]], notes: Mapping[str, tuple[str, ...]]
) -> Buffer:
    root = plan.storage_of(b.name)
    placement, pool, offset, in_place_of = _place(plan, b.name)
    lifetime = plan.lifetimes[b.name]
    at_root = plan.placements[root]
    arena = pool if pool in {p.name for p in plan.arenas} else None
    owned = not isinstance(at_root, ir_plan.External) or plan.program.buffers[root].donated
    return Buffer(
        name=b.name,
        nbytes=plan.program.nbytes(b.name),
        dtype=str(b.dtype).removeprefix("torch."),
        shape=shapes.get(b.name),
        device=b.device,
        kind=b.kind.value,
        origin=_origin(b.origin),
        birth=lifetime.start,
        death=min(lifetime.stop, len(plan.order) + 1),
        placement="arena" if arena and placement == "pool" else placement,
        pool=None if arena else pool,
        arena=arena,
        offset=offset,
        in_place_of=in_place_of,
        storage=root,
        counted=owned and arena is None,
        donated=b.donated,
        decided_by="comm" if arena else _decided_by(b, placement),
        notes=notes.get(b.name, ()),
    )


def _slabs(plan: ir_plan.Plan) -> list[tuple[ir_plan.Slab, int]]:
    """The allocations that a backward gets from its forward, and the step after which each is freed."""
    ends: dict[str, int] = {}
    for name, life in plan.lifetimes.items():
        root = plan.storage_of(name)
        ends[root] = max(ends.get(root, 0), life.stop)
    found = [(s, max((ends[m] for m in s.members if m in ends), default=0)) for s in plan.slabs]
    return [(s, min(stop, len(plan.order) + 1)) for s, stop in found if stop]


def _place(plan: ir_plan.Plan, name: str) -> tuple[Placement, str | None, int | None, str | None]:
    """Placement; pool and offset, also of what is in place of something in a pool; what it is in place of."""
    own, at_root = plan.placements[name], plan.placements[plan.storage_of(name)]
    pool, offset = None, None
    slab = next((s for s in plan.slabs if plan.storage_of(name) in s.members), None)
    if slab is not None:
        pool, offset = slab.name, slab.offsets[slab.members.index(plan.storage_of(name))]
    if isinstance(at_root, ir_plan.InPool):
        pool, offset = at_root.pool, ir.evaluate(at_root.offset, plan.program.hints)
    match own:
        case ir_plan.External():
            return "external", pool, offset, None
        case ir_plan.Own():
            return "own", None, None, None
        case ir_plan.InPool():
            return "pool", pool, offset, None
        case ir_plan.InPlaceOf():
            return "in_place", pool, offset, own.buffer


def _decided_by(b: ir.Buffer, placement: Placement) -> str:
    if placement == "in_place":
        return "inplace"
    if b.kind is ir.BufferKind.SAVED:
        return "partition"
    return {"pool": "pack", "arena": "comm", "own": "allocator", "external": "caller"}[placement]


def _step(program: ir.Program, op: ir.Operation, graph: str, notes: Mapping[str, tuple[str, ...]]) -> Step:
    match op:
        case ir.KernelOp():
            kind, scratch = "kernel", 0
            target = "reduction" if op.kernel.reductions else "pointwise"
        case ir.Extern():
            kind, target, scratch = "extern", op.target, ir.evaluate(op.scratch, program.hints)
        case ir.Copy():
            kind, target, scratch = "copy", "copy", 0
        case ir.UserKernel():
            kind, target, scratch = "user kernel", op.kernel.function.name, 0
    return Step(
        name=op.name,
        graph=graph,
        kind=kind,
        target=target,
        origins=tuple(_origin(o) for o in op.origins),
        reads=op.reads,
        writes=tuple(dict.fromkeys((*op.writes, *op.mutates))),
        scratch=scratch,
        notes=notes.get(op.name, ()),
    )
