"""The report: what a plan says, as plain data that is saved, read back and compared.

A `Report` holds one `Graph` per compiled graph and, where there is more than one, the whole step as a graph of its
own on one timeline. All sizes are bytes, all lifetimes half-open in steps; a buffer whose ``death`` is ``len(steps) +
1`` outlives its graph. The JSON form carries ``format`` and ``version``; `read_report` refuses what it does not know.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..ir.errors import ReportError, SavedModelError

if TYPE_CHECKING:
    from ..ir.activation import Activation as PlannedActivation
    from ..ir.eager import EagerMemory
    from ..ir.plan import Plan

FORMAT = "memplan-report"
VERSION = 3
#: Versions that are read: 1 knew no activations, 2 no measured timelines.
READABLE = (1, 2, 3)

Bytes = Annotated[int, Field(ge=0, lt=2**62)]
SignedBytes = Annotated[int, Field(gt=-(2**62), lt=2**62)]
StepIndex = Annotated[int, Field(ge=0, lt=2**31)]
Phase = Literal["inference", "forward", "backward", "step"]
Placement = Literal["external", "own", "pool", "arena", "in_place"]


class Model(BaseModel):
    """Base of the report's models: frozen, strict (no text where a number belongs), no unknown fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Origin(Model):
    """Where something comes from: FX node, its operator, module path, the user's file, line and source text."""

    node: str = ""
    op: str = ""
    module: str = ""
    file: str = ""
    line: StepIndex = 0
    code: str = ""


class Buffer(Model):
    """One buffer of a plan.

    ``birth`` and ``death`` are steps, half-open. ``storage`` names the buffer whose bytes it uses (itself, unless it
    is written in place of another). ``counted``: its bytes belong to the step, not to the caller. ``decided_by`` names
    the stage that gave it its place or its end.
    """

    name: str
    nbytes: Bytes
    dtype: str
    shape: tuple[Bytes, ...] | None = None
    device: str
    kind: str
    origin: Origin = Origin()
    birth: StepIndex
    death: StepIndex
    placement: Placement
    pool: str | None = None
    arena: str | None = None
    offset: Bytes | None = None
    in_place_of: str | None = None
    storage: str
    counted: bool = True
    donated: bool = False
    decided_by: str = ""
    notes: tuple[str, ...] = ()


class Step(Model):
    """One operation of the plan's order. ``scratch`` is what it takes while it runs and gives back, in bytes."""

    name: str
    graph: str
    kind: str
    target: str
    origins: tuple[Origin, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    scratch: Bytes = 0
    notes: tuple[str, ...] = ()


class Pool(Model):
    """One allocation that holds many buffers, over steps ``[birth, death)``."""

    name: str
    nbytes: Bytes
    device: str
    birth: StepIndex
    death: StepIndex


class Arena(Model):
    """Communication memory that stays from call to call, shared by the programs of its process group.

    ``memory`` is its type (``"symmetric"``, ``"registered"``). Its bytes are in no peak. ``buffers`` lie in it one
    after another and beside one another; apart they would take ``apart`` bytes.
    """

    name: str
    nbytes: Bytes
    device: str
    memory: str
    group: str
    buffers: tuple[str, ...] = ()
    apart: Bytes = 0


class Certificate(Model):
    """How near to the optimum a plan is, in bytes. See `memplan.ir.plan.Certificate`."""

    program_peak: Bytes
    peak: Bytes
    order_bound: Bytes
    placed_peak: Bytes
    alignment: Bytes
    note: str = ""


class WaterfallStep(Model):
    """The peak in bytes, simulated after the stage of this name; the first is where one starts from (eager)."""

    name: str
    peak: Bytes


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that one or more buffers use one after another (in place); alive over ``[birth, death)``.

    ``nbytes`` is the largest member's. ``counted``: the bytes belong to the step, not to the caller.
    """

    name: str
    members: tuple[str, ...]
    nbytes: Bytes
    device: str
    birth: StepIndex
    death: StepIndex
    pool: str | None
    offset: Bytes | None
    counted: bool


class Reserved(Model):
    """What a device's caching allocator is predicted to hold for the whole step, by simulation of its rules.

    Both with ``resident``: the parameters and the batch.
    """

    resident: Bytes
    live: Bytes
    reserved: Bytes


class Graph(Model):
    """One compiled graph, or the whole step.

    ``live[k]`` is the bytes in use while step ``k`` runs, above what the caller keeps: exactly the sum of the counted
    storages alive then and the step's scratch. ``allocated[k]`` is what is held of the device allocator: pools whole,
    own allocations rounded; its maximum is the predicted peak.
    """

    name: str
    phase: Phase
    rank: StepIndex = 0
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    pools: tuple[Pool, ...] = ()
    arenas: tuple[Arena, ...] = ()
    live: tuple[Bytes, ...]
    allocated: tuple[Bytes, ...]
    predicted_peak: dict[str, Bytes] = Field(default_factory=dict)
    reserved: dict[str, Reserved] = Field(default_factory=dict)
    certificate: Certificate | None = None
    waterfall: tuple[WaterfallStep, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Graph:
        count = len(self.steps)
        for title, series in (("live", self.live), ("allocated", self.allocated)):
            if len(series) != count:
                raise ValueError(f"graph {self.name!r}: {title} has {len(series)} entries for {count} steps")
        pools = {p.name: p for p in self.pools}
        names = {b.name for b in self.buffers}
        if len(names) != len(self.buffers) or len(pools) != len(self.pools):
            raise ValueError(f"graph {self.name!r}: two buffers or pools of one name")
        lives = [(b.name, b.birth, b.death) for b in self.buffers] + [(p.name, p.birth, p.death) for p in self.pools]
        for name, birth, death in lives:
            if not birth < death <= count + 1:
                raise ValueError(f"{name!r}: lifetime [{birth}, {death}) is not within {count} steps")
        for b in self.buffers:
            if b.storage not in names or (b.in_place_of is not None and b.in_place_of not in names):
                raise ValueError(f"buffer {b.name!r}: storage {b.storage!r} is not a buffer of the graph")
            if b.pool is not None:
                if b.pool not in pools or b.offset is None:
                    raise ValueError(f"buffer {b.name!r}: pool {b.pool!r} is not there, or no offset")
                if b.offset + b.nbytes > pools[b.pool].nbytes:
                    raise ValueError(f"buffer {b.name!r}: ends beyond pool {b.pool!r}")
            if b.arena is not None and (b.counted or b.arena not in {a.name for a in self.arenas}):
                raise ValueError(f"buffer {b.name!r}: arena {b.arena!r} is not there, or its bytes are counted")
        known = attribution(storages_of(self.buffers), count)
        for k, step in enumerate(self.steps):
            if self.live[k] != known[k] + step.scratch:
                raise ValueError(
                    f"graph {self.name!r}: {self.live[k]} bytes live at step {k}, its buffers sum to "
                    f"{known[k] + step.scratch}"
                )
        return self

    @cached_property
    def by_name(self) -> dict[str, Buffer]:
        return {b.name: b for b in self.buffers}

    @cached_property
    def storages(self) -> tuple[Storage, ...]:
        """The storages in order of birth, largest first within a step."""
        return tuple(sorted(storages_of(self.buffers), key=lambda s: (s.birth, -s.nbytes, s.name)))

    @cached_property
    def peak_step(self) -> int:
        """The step that shows the peak: the first of most live bytes that holds it to a 256th.

        A pool holds its bytes as long as it stands, so that the very largest step may be one in which it is nearly
        empty and a scalar came on top: that would tell nothing of what the pool is for. 0 if there are no steps.
        """
        near = self.peak - self.peak // 256
        steps = (k for k, held in enumerate(self.allocated) if held >= near)
        return max(steps, key=lambda k: (self.live[k], -k), default=0)

    @property
    def live_peak(self) -> int:
        """The largest number of live bytes."""
        return max(self.live, default=0)

    @property
    def peak(self) -> int:
        """The largest number of bytes as the device allocator counts them: what ought to be measured."""
        return max(self.allocated, default=0)

    def alive_at(self, step: int) -> tuple[Storage, ...]:
        """Counted storages alive while ``step`` runs, largest first."""
        found = (s for s in self.storages if s.counted and s.birth <= step < s.death)
        return tuple(sorted(found, key=lambda s: (-s.nbytes, s.name)))

    def shown_at(self, storage: Storage, step: int) -> Buffer:
        """The buffer that stands for a storage at a step: the one written last of those that have been born."""
        members = [self.by_name[m] for m in storage.members]
        born = [b for b in members if b.birth <= step] or members[:1]
        return max(born, key=lambda b: (b.birth, b.name))

    @cached_property
    def held_by_caller(self) -> dict[str, int]:
        """Bytes that the caller keeps, by kind of buffer."""
        found: dict[str, int] = {}
        for s in self.storages:
            if not s.counted:
                kind = self.by_name[s.name].kind
                found[kind] = found.get(kind, 0) + s.nbytes
        return dict(sorted(found.items()))


class Measurement(Model):
    """What a run measured on one device, in bytes above what was there before the step.

    ``timeline``, where there is one: for every step of the report's step the most bytes held while it ran, to be held
    against its ``allocated``; None where the step was not seen.
    """

    device: str
    peak_allocated: Bytes
    peak_reserved: Bytes | None = None
    baseline: Bytes = 0
    workspace: Bytes = 0
    timeline: tuple[Bytes | None, ...] = ()


class Activation(Model):
    """A value of the forward that the backward reads.

    ``fate``: kept as it is, kept narrower, made by a loss in slices in place of its logits,
    kept on the host in between, or computed again.
    ``nbytes``: what it takes from the forward to the backward (a recomputed one: what it does not take).
    ``microseconds``: estimated time of computing it again; None if it must not be.
    """

    name: str
    graph: str
    fate: Literal["saved", "narrowed", "chunked", "offloaded", "recomputed"]
    nbytes: Bytes
    microseconds: Annotated[float, Field(ge=0)] | None
    origin: Origin = Origin()


class Report(Model):
    """All that is known about a step. ``whole`` is the step on one timeline where there are several graphs."""

    format: Literal["memplan-report"] = "memplan-report"
    version: Literal[1, 2, 3] = 3
    target: str = ""
    graphs: tuple[Graph, ...]
    whole: Graph | None = None
    waterfall: tuple[WaterfallStep, ...] = ()
    measured: tuple[Measurement, ...] = ()
    activations: tuple[Activation, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_graphs(self) -> Report:
        if not self.graphs:
            raise ValueError("the report has no graphs")
        for m in self.measured:
            if m.timeline and len(m.timeline) != len(self.step.steps):
                raise ValueError(f"measured: {len(m.timeline)} steps, the step has {len(self.step.steps)}")
        return self

    @property
    def step(self) -> Graph:
        """The whole step, or the only graph."""
        return self.whole if self.whole is not None else self.graphs[0]

    @cached_property
    def predicted(self) -> dict[str, int]:
        """Predicted peak of allocated bytes by device, as `torch.cuda.max_memory_allocated` counts."""
        return dict(self.step.predicted_peak) or {"all devices": self.step.peak}

    def graph(self, name: str) -> Graph:
        """The graph of this name (``step`` for the whole one).

        Raises
        ------
        ReportError
            If there is none.
        """
        if name in ("step", self.step.name):
            return self.step
        for g in self.graphs:
            if g.name == name:
                return g
        raise ReportError(f"no graph {name!r} in the report; graphs are {', '.join(g.name for g in self.graphs)}")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What was compiled for one call of a model, and what its run measured.

    ``joins`` pairs a buffer that the forward keeps with the backward's input that receives it, as (name in the
    forward plan, name in the backward plan). ``waterfall`` is (stage, peak in bytes after it), eager first.
    """

    plans: tuple[Plan, ...]
    waterfall: tuple[tuple[str, int], ...] = ()
    measured: Measurement | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    joins: tuple[tuple[str, str], ...] = ()
    #: the waterfall of each plan by itself, in the order of ``plans``; may be shorter
    stages: tuple[tuple[tuple[str, int], ...], ...] = ()
    activations: tuple[PlannedActivation, ...] = ()
    #: (frame, how often it was compiled before): of records of one frame a step runs one
    compilation: tuple[int, int] | None = None
    eager: EagerMemory | None = None
    #: (step, place in it) of its calls; empty where none were seen
    runs: tuple[tuple[int, int], ...] = ()


#: Between the name of a graph and the number of its run, in a step that runs it more than once.
RUN = "@"


def once(name: str) -> str:
    """The name of a graph, of whichever run."""
    return name.partition(RUN)[0]


def attribution(storages: Sequence[Storage], steps: int) -> list[int]:
    """Bytes of counted storages alive at each of ``steps`` steps."""
    change = [0] * (steps + 1)
    for s in storages:
        if s.counted:
            change[min(s.birth, steps)] += s.nbytes
            change[min(s.death, steps)] -= s.nbytes
    total, out = 0, []
    for k in range(steps):
        total += change[k]
        out.append(total)
    return out


def storages_of(buffers: Sequence[Buffer]) -> list[Storage]:
    """The storages that buffers use, in the buffers' order."""
    members: dict[str, list[Buffer]] = {}
    for b in buffers:
        members.setdefault(b.storage, []).append(b)
    roots = {b.name: b for b in buffers}
    return [_storage(roots[root], group) for root, group in members.items()]


def _storage(root: Buffer, members: list[Buffer]) -> Storage:
    ordered = sorted(members, key=lambda b: (b.birth, b.name))
    return Storage(
        name=root.name,
        members=tuple(b.name for b in ordered),
        nbytes=max(b.nbytes for b in members),
        device=root.device,
        birth=ordered[0].birth,
        death=max(b.death for b in members),
        pool=root.pool,
        offset=root.offset,
        counted=root.counted,
    )


def schema() -> dict[str, object]:
    """The JSON schema of a saved report."""
    return {"$id": f"memplan-report-v{VERSION}", **Report.model_json_schema()}


def write_report(report: Report, path: Path | str) -> None:
    """Save a report as JSON."""
    Path(path).write_text(dump_report(report), encoding="utf-8")


def dump_report(report: Report) -> str:
    """The JSON text of a report, one line, ending in a line feed."""
    return report.model_dump_json() + "\n"


def read_report(path: Path | str) -> Report:
    """Read and validate a saved report, or the one inside a saved model (``.memplan``).

    Raises
    ------
    ReportError
        If the file is not there, damaged, of another version, or contradicts itself.
    """
    try:
        if zipfile.is_zipfile(path):
            from ..package import read

            with read(Path(path)) as package:
                return parse_report(package.read("report.json").decode(), str(path))
        text = Path(path).read_text(encoding="utf-8")
    except SavedModelError as error:
        raise ReportError(f"cannot read the report in {str(path)!r}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"cannot read the report {str(path)!r}: {error}") from error
    return parse_report(text, str(path))


def _known() -> str:
    return f"{', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}"


def parse_report(text: str, where: str = "") -> Report:
    """`read_report` of text already in memory."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"the report is damaged (no complete JSON): {error}", where=where) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ReportError(f'not a memplan report (no "format": "{FORMAT}")', where=where)
    if data.get("version") not in READABLE:
        found = repr(data.get("version"))[:40]
        raise ReportError(
            f"the report is of version {found}, this memplan reads versions {_known()}; "
            "make it again with "
            "`memplan report TARGET -o FILE`",
            where=where,
        )
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(p) for p in first["loc"])
        count = error.error_count()
        message = f"the report contradicts itself or its schema ({count} fault{'s' if count > 1 else ''})"
        raise ReportError(f"{message}: {place + ': ' if place else ''}{first['msg'][:300]}", where=where) from error
