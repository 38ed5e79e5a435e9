"""What the canvas module draws: a JSON header, and one binary block of typed columns."""

from __future__ import annotations

import array
import re
import sys
from dataclasses import dataclass

from .layout import Layout, boundaries, boxes, layout
from .model import Buffer, Graph, Report
from .terminal import placed
from .text import clean, code, line, line_of, shape, short, step_title

Header = dict[str, object]


#: A number in a module path: layers of one kind get one colour.
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class Strings:
    """Each different text once; index 0 is the empty one."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {"": 0}

    def __call__(self, text: str) -> int:
        return self.index.setdefault(text, len(self.index))


@dataclass(frozen=True, slots=True)
class Payload:
    """``header`` says where in ``data`` (little endian) each column lies: name -> (type, byte offset, length)."""

    header: Header
    data: bytes


def payload(report: Report, graph: Graph) -> Payload:
    """Boxes of a graph: one per buffer, from its birth until its storage is taken over or let go."""
    plan = layout(graph)
    strings = Strings()
    columns = _boxes(graph, plan, strings)
    columns["live"] = ("f8", [float(v) for v in graph.live])
    columns["allocated"] = ("f8", [float(v) for v in graph.allocated])
    columns["step_name"] = ("i4", [strings(step_title(s)) for s in graph.steps])
    columns["step_line"] = ("i4", [strings(line_of(s)) for s in graph.steps])
    seen = next((m.timeline for m in report.measured if m.timeline), ()) if graph is report.step else ()
    columns["measured"] = ("f8", [-1.0 if v is None else float(v) for v in seen])
    table, data = _packed(columns)
    measured = max((m.peak_allocated for m in report.measured), default=0) if graph is report.step else 0
    header: Header = {
        "title": clean(report.target or graph.name),
        "steps": len(graph.steps),
        "peak": graph.peak_step,
        "peak_bytes": graph.peak,
        "measured": measured,
        "lanes": [
            {
                "name": clean(lane.name),
                "short": lane.short,
                "nbytes": lane.nbytes,
                "pool": lane.pool,
                "birth": lane.birth,
                "death": lane.death,
            }
            for lane in plan.lanes
        ],
        "boundaries": [{"step": step, "name": name} for step, name in boundaries(graph)],
        "strings": list(strings.index),
        "columns": table,
    }
    return Payload(header, data)


def pair(before: Report, after: Report) -> list[Payload]:
    """Two reports to be drawn side by side (the module draws both on one scale)."""
    both = [("before", payload(before, before.step)), ("after", payload(after, after.step))]
    return [Payload({**p.header, "title": f"{name}: {p.header['title']}"}, p.data) for name, p in both]


Columns = dict[str, tuple[str, list[int] | list[float]]]


def _boxes(graph: Graph, plan: Layout, strings: Strings) -> Columns:
    whole: dict[str, list[int]] = {name: [] for name in ("birth", "death", "lane", "storage")}
    real: dict[str, list[float]] = {"offset": [], "nbytes": []}
    text: dict[str, list[int]] = {
        name: []
        for name in (
            "name",
            "kind",
            "module",
            "layer",
            "dtype",
            "line",
            "node",
            "op",
            "shape",
            "code",
            "decided",
            "note",
            "graph",
        )
    }
    for box in boxes(graph, plan):
        for name in whole:
            whole[name].append(getattr(box, name))
        real["offset"].append(float(box.offset))
        real["nbytes"].append(float(box.nbytes))
        for name, value in _texts(box.buffer).items():
            text[name].append(strings(value))
    columns: Columns = {name: ("i4", values) for name, values in (*whole.items(), *text.items())}
    return {**columns, **{name: ("f8", values) for name, values in real.items()}}


def _texts(b: Buffer) -> dict[str, str]:
    o = b.origin
    return {
        "name": clean(b.name),
        "kind": clean(b.kind),
        "module": clean(o.module),
        "layer": _NUMBER.sub(".*", clean(o.module)),
        "dtype": clean(b.dtype),
        "line": line(o),
        "node": clean(o.node),
        "op": short(o.op),
        "shape": shape(b),
        "code": code(o),
        "decided": clean(b.decided_by),
        "note": clean("; ".join((placed(b), *b.notes))),
        "graph": clean(b.name.partition(":")[0]) if ":" in b.name else "",
    }


def _packed(columns: Columns) -> tuple[dict[str, tuple[str, int, int]], bytes]:
    """Columns of eight bytes first, so that all are aligned."""
    table: dict[str, tuple[str, int, int]] = {}
    data = bytearray()
    for kind, code_of in (("f8", "d"), ("i4", "i")):
        for name, (column, values) in columns.items():
            if column == kind:
                block = array.array(code_of, values)
                if sys.byteorder == "big":
                    block.byteswap()
                table[name] = (kind, len(data), len(values))
                data += block.tobytes()
    return table, bytes(data)
