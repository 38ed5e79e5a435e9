"""The memory snapshot, read back by torch's own reader; and what the canvas is given to draw."""

from __future__ import annotations

import array
import io
import pickle
import pickletools
import sys

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

#: Opcodes that the unpickler in MemoryViz's page knows (torch/utils/viz/MemoryViz.js).
READ_BY_MEMORY_VIZ = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "NONE", "NEWTRUE",
    "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_LIST",
    "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3",
}  # fmt: skip


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
    assert names <= READ_BY_MEMORY_VIZ
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


def test_colab_is_told_where_its_widget_manager_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colab loads the module of a widget only if the output's metadata says so; anywidget does, and we pass it on."""
    util = pytest.importorskip("anywidget._util")
    import types

    from memplan.reports.shown import report as shown

    enabled: list[bool] = []
    widgets = types.SimpleNamespace(_installed_url="https://colab.example/manager.js")
    output = types.SimpleNamespace(enable_custom_widget_manager=lambda: enabled.append(True), _widgets=widgets)
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    util.enable_custom_widget_manager_once.cache_clear()
    bundle, metadata = shown(build_report([plans.inference()]))._repr_mimebundle_()
    assert enabled == [True]
    kind = "application/vnd.jupyter.widget-view+json"
    assert metadata == {kind: {"colab": {"custom_widget_manager": {"url": widgets._installed_url}}}}
    assert {kind, "image/png", "text/plain"} == set(bundle), "what shows where the widget cannot be loaded"


def test_the_widget_speaks_the_protocol_of_jupyters_widgets() -> None:
    """What VS Code, Colab and every other host get: a model of anywidget's, the module as text, the data as binary."""
    pytest.importorskip("anywidget")
    from ipywidgets.widgets.widget import _remove_buffers

    from memplan.reports.page import module_source
    from memplan.reports.shown import report as shown

    widget = shown(build_report([plans.inference()])).widget()
    state, paths, buffers = _remove_buffers(widget.get_state())  # type: ignore[attr-defined]
    assert (state["_model_module"], state["_model_name"], state["_view_name"]) == ("anywidget", "AnyModel", "AnyView")
    assert state["_esm"] == module_source()
    assert paths == [["data"]]
    assert bytes(buffers[0]) == widget.data  # type: ignore[attr-defined]


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
