"""torch's memory snapshot of a planned step, for ``torch.cuda._memory_viz`` and pytorch.org/memory_viz.

What readers insist on: pickle protocol 4 and builtin types; addresses below 2**53; blocks that tile their segment
exactly; each free as a request and its completion; no two live blocks at one address (so a storage is one block,
whatever is written in place in it); and one event of category "unknown", without which older viewers stop.
"""

from __future__ import annotations

import pickle

from .layout import Lane, Layout, Placed, layout
from .model import Buffer, Graph, Origin
from .text import clean

_BASE = 1 << 40
_GAP = 1 << 32
Frame = dict[str, str | int]
Event = dict[str, object]


def snapshot(graph: Graph) -> bytes:
    """The pickled snapshot: one segment for each pool and one for the own allocations of each device."""
    plan = layout(graph)
    addresses = _addresses(plan)
    devices = sorted({lane.device for lane in plan.lanes}) or ["cuda:0"]
    traces: list[list[Event]] = [[_unknown()] for _ in devices]
    at_step = _by_step(plan, len(graph.steps))
    time = 1
    for k, changes in enumerate(at_step):
        for kind, index in changes:
            for event in _events(graph, plan, addresses, kind, index, k):
                lane = plan.lanes[index if kind.startswith("segment") else plan.placed[index].lane]
                traces[devices.index(lane.device)].append({**event, "time_us": time})
                time += 1
    end = len(graph.steps)
    segments = [
        _segment(graph, plan, addresses, k, devices.index(lane.device), end)
        for k, lane in enumerate(plan.lanes)
        if lane.death > end
    ]
    data = {
        "segments": segments,
        "device_traces": traces,
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "", "expandable_segments": False},
        "external_annotations": [],
    }
    return pickle.dumps(data, protocol=4)


def _addresses(plan: Layout) -> list[int]:
    """A start for each lane, far apart, all below 2**53."""
    out, at = [], _BASE
    for lane in plan.lanes:
        out.append(at)
        at += -(-(lane.nbytes + _GAP) // _GAP) * _GAP
    return out


def _by_step(plan: Layout, steps: int) -> list[list[tuple[str, int]]]:
    """What happens at each step (and after the last), in order: segments, allocations, then frees, then segments."""
    begin: list[list[tuple[str, int]]] = [[] for _ in range(steps + 1)]
    finish: list[list[tuple[str, int]]] = [[] for _ in range(steps + 1)]
    for k, lane in enumerate(plan.lanes):
        begin[min(lane.birth, steps)].append(("segment_alloc", k))
    for k, item in enumerate(plan.placed):
        begin[min(item.storage.birth, steps)].append(("alloc", k))
        if item.storage.death <= steps:
            finish[item.storage.death - 1].append(("free", k))
    for k, lane in enumerate(plan.lanes):
        if lane.death <= steps:
            finish[lane.death - 1].append(("segment_free", k))
    return [b + f for b, f in zip(begin, finish, strict=True)]


def _events(graph: Graph, plan: Layout, addresses: list[int], kind: str, index: int, step: int) -> list[Event]:
    if kind.startswith("segment"):
        lane = plan.lanes[index]
        return [_event(kind, addresses[index], max(lane.nbytes, 1), [_title(lane)])]
    item = plan.placed[index]
    frames = _frames(graph, item, step)
    address = addresses[item.lane] + item.offset
    actions = ["alloc"] if kind == "alloc" else ["free_requested", "free_completed"]
    return [_event(action, address, max(item.storage.nbytes, 1), frames) for action in actions]


def _event(action: str, address: int, nbytes: int, frames: list[Frame]) -> Event:
    return {"action": action, "addr": address, "size": nbytes, "stream": 0, "frames": frames, "category": "unknown"}


def _unknown() -> Event:
    """A first event that all viewers read."""
    return {**_event("snapshot", 0, 0, []), "time_us": 0}


def _title(lane: Lane) -> Frame:
    return {"filename": "memplan", "line": 0, "name": clean(lane.name)}


def _frames(graph: Graph, item: Placed, step: int) -> list[Frame]:
    """The user's line first, then the FX node and the module, of the buffer that the storage holds."""
    b = graph.shown_at(item.storage, step)
    o = b.origin
    frames: list[Frame] = []
    if o.file:
        frames.append(_frame(o, o.file, o.line, o.code.strip() or o.node))
    if o.module:
        frames.append(_frame(o, o.module, 0, o.node or b.name))
    frames.append(_frame(o, "memplan", 0, f"{b.name} ({_what(b)})"))
    return frames


def _what(b: Buffer) -> str:
    return f"{b.kind} {b.dtype}" + (str(list(b.shape)) if b.shape is not None else "")


def _frame(o: Origin, filename: str, line: int, name: str) -> Frame:
    return {
        "filename": clean(filename, 500),
        "line": line,
        "name": clean(name),
        "fx_node_op": clean(o.op),
        "fx_node_name": clean(o.node),
        "fx_original_trace": "",
    }


def _segment(graph: Graph, plan: Layout, addresses: list[int], lane: int, device: int, end: int) -> dict[str, object]:
    """A segment as it stands after the step: what outlives it is active, the rest inactive, tiled exactly."""
    left = sorted((p for p in plan.placed if p.lane == lane and p.storage.death > end), key=lambda p: p.offset)
    total = max(plan.lanes[lane].nbytes, 1)
    blocks: list[dict[str, object]] = []
    at = 0
    for item in left:
        nbytes = max(item.storage.nbytes, 1)
        if item.offset > at:
            blocks.append(_block(addresses[lane] + at, item.offset - at, "inactive", []))
        blocks.append(_block(addresses[lane] + item.offset, nbytes, "active_allocated", _frames(graph, item, end)))
        at = item.offset + nbytes
    if at < total:
        blocks.append(_block(addresses[lane] + at, total - at, "inactive", []))
    active = sum(max(p.storage.nbytes, 1) for p in left)
    return {
        "device": device,
        "address": addresses[lane],
        "total_size": total,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, lane if plan.lanes[lane].pool else 0),
        "allocated_size": active,
        "active_size": active,
        "requested_size": active,
        "frames": [_title(plan.lanes[lane])],
        "blocks": blocks,
    }


def _block(address: int, nbytes: int, state: str, frames: list[Frame]) -> dict[str, object]:
    requested = nbytes if state == "active_allocated" else 0
    return {"size": nbytes, "requested_size": requested, "address": address, "state": state, "frames": frames}
