"""Chrome trace JSON of a step, for ui.perfetto.dev: counters of bytes, and buffers as asynchronous slices."""

from __future__ import annotations

import json

from .model import Graph
from .text import clean, line, line_of, shape

#: Microseconds drawn for a step: a plan knows order, not time.
STEP_US = 1000


def trace(graph: Graph) -> bytes:
    """Steps as slices of one thread, live and allocated bytes as counters, every counted storage as a slice.

    Buffers are asynchronous slices (``b``/``e`` with an id of their own): plain slices of one thread must nest,
    lifetimes do not.
    """
    events: list[dict[str, object]] = [
        _meta("process_name", 0, f"memplan: {clean(graph.name)}"),
        _meta("thread_name", 0, "operations (one step each)"),
    ]
    for k, step in enumerate(graph.steps):
        place = line_of(step)
        events.append(
            {
                "ph": "X", "pid": 1, "tid": 0, "ts": k * STEP_US, "dur": STEP_US, "name": clean(step.name),
                "args": {"target": clean(step.target), "line": place, "graph": clean(step.graph)},
            }
        )  # fmt: skip
        values = {"live": graph.live[k], "allocated": graph.allocated[k]}
        for name, value in values.items():
            events.append({"ph": "C", "pid": 1, "ts": k * STEP_US, "name": f"{name} bytes", "args": {"bytes": value}})
    for number, s in enumerate(s for s in graph.storages if s.counted):
        b = graph.by_name[s.name]
        common = {"cat": clean(b.kind), "id": number, "pid": 1, "tid": 1, "name": clean(b.name)}
        args = {
            "bytes": s.nbytes, "shape": shape(b), "line": line(b.origin), "module": clean(b.origin.module),
            "node": clean(b.origin.node), "in place": [clean(m) for m in s.members[1:]],
        }  # fmt: skip
        events.append({**common, "ph": "b", "ts": s.birth * STEP_US, "args": args})
        events.append({**common, "ph": "e", "ts": s.death * STEP_US})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()


def _meta(name: str, thread: int, text: str) -> dict[str, object]:
    return {"ph": "M", "pid": 1, "tid": thread, "name": name, "args": {"name": text}}
