"""The memory snapshot, read back by torch's own reader; and what the canvas is given to draw."""

from __future__ import annotations

import array
import io
import pickle
import pickletools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.cuda import _memory_viz

from memplan.out_of_memory import Remedy, Shortage
from memplan.reports import memviz, structured
from memplan.reports.build import build_report
from memplan.reports.model import Graph
from memplan.reports.oom import explain_oom
from memplan.reports.payload import payload
from tests.reports import plans


def training() -> Graph:
    forward, backward, joins = plans.training()
    return build_report([forward, backward], joins=joins).step


def replayed_peak(snapshot: dict[str, list[list[dict[str, int]]]]) -> int:
    """The largest number of bytes allocated, by the events alone; every free must match what lives at its address."""
    live: dict[int, int] = {}
    peak = 0
    for event in snapshot["device_traces"][0]:
        if event["action"] == "alloc":  # type: ignore[comparison-overlap]
            ends = [(a, a + n) for a, n in live.items()]
            assert not any(a < event["addr"] + event["size"] and event["addr"] < b for a, b in ends), (
                "two at one address"
            )
            live[event["addr"]] = event["size"]
        elif event["action"] == "free_completed":  # type: ignore[comparison-overlap]
            assert live.pop(event["addr"]) == event["size"]
        peak = max(peak, sum(live.values()))
    return peak


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_replaying_the_snapshot_gives_the_live_peak(seed: int) -> None:
    graph = build_report([plans.random_plan(seed)]).step
    scratch = max(s.scratch for s in graph.steps)
    peak = replayed_peak(pickle.loads(memviz.snapshot(graph)))
    assert graph.live_peak - scratch <= peak <= graph.live_peak


def test_torchs_own_reader_reads_it() -> None:
    data = pickle.loads(memviz.snapshot(training()))
    assert "total_allocated: 256.0KiB" in _memory_viz.segsum(data)
    text = _memory_viz.trace(data)
    assert "cudaMalloc(1099511627776, 768.0KiB)" in text
    assert "[524288:256.0KiB]" in text, "the offset in the pool"
    assert "<html" in _memory_viz.trace_plot(data).lower() or "<!doctype" in _memory_viz.trace_plot(data).lower()
    assert "<html" in _memory_viz.segment_plot(data).lower() or "<!doctype" in _memory_viz.segment_plot(data).lower()
    # the flame graph's own script would be fetched from the network: its input is what the reader makes of ours
    assert "train.py:12:qkv = self.qkv(x) 262144" in _memory_viz.memory(data, format_flamegraph=str)


def test_the_snapshot_keeps_to_what_viewers_can_read() -> None:
    raw = memviz.snapshot(training())
    assert next(pickletools.genops(raw))[1] == 4
    names = {op.name for op, _, _ in pickletools.genops(raw)}
    assert not names & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ"}, "something that is not builtin"
    data = pickle.loads(raw)
    for segment in data["segments"]:
        at = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == at
            at += block["size"]
        assert at == segment["address"] + segment["total_size"]
    events = data["device_traces"][0]
    assert all(0 <= e["addr"] < 2**53 for e in events)
    assert any(e["category"] == "unknown" for e in events)
    actions = [e["action"] for e in events]
    for k, action in enumerate(actions):
        assert action != "free_requested" or actions[k + 1] == "free_completed"


def test_the_users_line_is_the_first_frame() -> None:
    data = pickle.loads(memviz.snapshot(training()))
    alloc = next(e for e in data["device_traces"][0] if e["action"] == "alloc" and e["size"] == 1 << 20)
    assert (alloc["frames"][0]["filename"], alloc["frames"][0]["line"]) == ("/home/ann/train.py", 12)
    assert alloc["frames"][0]["fx_node_name"] == "mm"


def column(name: str, graph: Graph) -> list[float]:
    made = payload(build_report([plans.inference()]), graph)
    kind, at, length = made.header["columns"][name]  # type: ignore[index]
    values = array.array({"f8": "d", "i4": "i"}[kind])
    values.frombytes(made.data[at : at + length * values.itemsize])
    return list(values)


def test_the_drawn_boxes_cover_every_live_byte() -> None:
    graph = training()
    birth, death, nbytes = (column(c, graph) for c in ("birth", "death", "nbytes"))
    for k, step in enumerate(graph.steps):
        drawn = sum(n for b, d, n in zip(birth, death, nbytes, strict=True) if b <= k < d)
        assert drawn + step.scratch == graph.live[k]
    assert column("live", graph) == [float(v) for v in graph.live]


def test_out_of_memory_names_the_line_and_a_change(golden: object) -> None:
    forward, _, _ = plans.training()
    planned = [
        Remedy('options={"budget": 900000}', "the whole step", 800_000, 1_900_000, 12.0),
        Remedy("leaving 'fusion' out of disable", "forward0", 1_700_000, 1_800_000),
    ]
    told: list[int] = []

    def remedies(had: int) -> list[Remedy]:
        told.append(had)
        return planned

    text = explain_oom(forward, Shortage(2, 1 << 30, free=300_000, on_gpu=True), remedies)
    assert "your line: /home/ann/train.py:14    h = F.gelu(self.up(x))" in text
    assert "asking for 1.00 GiB" in text
    # free, buf0 and pool0: what the step itself makes is not counted
    assert told == [300_000 + 1_048_576 + 786_432]
    assert "What would have made it fit" in text
    golden("oom.txt", text + "\n")  # type: ignore[operator]
    nearest = explain_oom(forward, Shortage(2, 1 << 30, free=0, released=True, on_gpu=True), remedies)
    assert "No known change would have made it fit" in nearest
    assert "still 781 KiB more than there were" in nearest
    assert told[-1] == 0
    unknown = explain_oom(forward, Shortage(2), remedies)
    assert 'What would help most:\n    options={"budget": 900000}' in unknown
    with pytest.raises(ValueError, match="no step 9"):
        explain_oom(forward, Shortage(9))


def test_the_widget_holds_what_the_page_holds() -> None:
    pytest.importorskip("anywidget")
    import json

    from memplan.reports.shown import report as shown

    report = build_report([plans.inference()])
    pair = shown(report, report)
    widget = pair.widget()
    headers = json.loads(widget.headers)  # type: ignore[attr-defined]
    assert [h["range"][0] % 8 for h in headers] == [0, 0]
    start, stop = headers[1]["range"]
    assert widget.data[start:stop] == payload(report, report.step).data  # type: ignore[attr-defined]
    bundle, _ = pair._repr_mimebundle_()
    assert {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} <= set(bundle)


def test_a_report_shows_and_saves_itself(tmp_path: object) -> None:
    from pathlib import Path

    from rich.console import Console

    import memplan

    folder = Path(str(tmp_path))
    shown = memplan.report(build_report([plans.inference()]))
    out = io.StringIO()
    Console(file=out, width=100).print(shown)
    assert "Peak memory 48.0 KiB" in out.getvalue()
    assert "Peak memory 48.0 KiB" in repr(shown)
    for suffix in ("json", "html", "png", "md"):
        shown.save(folder / f"r.{suffix}")
    assert memplan.report(folder / "r.json").report == shown.report
    with pytest.raises(ValueError, match=r"\.txt"):
        shown.save(folder / "r.txt")


def test_the_plan_goes_into_the_structured_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, str]] = []

    def note(kind: str, metadata_fn: object, payload_fn: object) -> None:
        seen.append((kind, metadata_fn()["name"], payload_fn()))  # type: ignore[operator]

    monkeypatch.setattr(structured, "trace_structured", note)
    structured.trace_plan(plans.inference())
    kind, name, text = seen[0]
    assert (kind, name) == ("artifact", "memplan_inference0")
    assert "buf1" in text
    assert "/home/ann/train.py:13" in text
