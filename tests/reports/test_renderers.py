"""What people read, as goldens; and that nothing hostile in a name reaches them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

import memplan.call_scratch
import memplan.convolutions
from memplan.reports import compare, dot, page, perfetto, picture, tables, terminal
from memplan.reports.build import build_report
from memplan.reports.commands_gate import show_comparison
from memplan.reports.model import Measurement, Report, schema
from memplan.reports.query import selected
from memplan.reports.text import clean, percent, size
from tests.reports import plans

Golden = Callable[[str, str], None]
HOSTILE = "\x1b[31mred\x07\u202egnp.<script>alert(1)</script>`|[b](x)\n@everyone"


def training_report() -> Report:
    forward, backward, joins = plans.training()
    return build_report(
        [forward, backward],
        joins=joins,
        waterfall=[("eager", 4_000_000), ("fusion", 2_500_000), ("reorder", 2_500_000)],
        measured=Measurement(device="cuda:0", peak_allocated=1_905_000, peak_reserved=4 << 20),
        target="train.py:make",
    )


def rendered(item: RenderableType, width: int = 110) -> str:
    return terminal.rendered(item, width=width)


def test_summary(golden: Golden) -> None:
    golden("summary.txt", rendered(terminal.summary(training_report())))


def test_summary_narrow(golden: Golden) -> None:
    golden("summary-60.txt", rendered(terminal.summary(training_report(), by="module"), width=60))


def test_peak(golden: Golden) -> None:
    golden("peak.txt", rendered(terminal.peak(training_report().step, top=2)))


def test_another_step(golden: Golden) -> None:
    golden("step.txt", rendered(terminal.peak(training_report().step, step=5)))


def test_buffers(golden: Golden) -> None:
    graph = training_report().step
    table = terminal.buffers(graph, selected(graph, where=["size>1KiB"]), top=5)
    golden("buffers.txt", rendered(table, width=140))
    golden("buffers-80.txt", rendered(table, width=80))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_that_matters_is_cut(width: int) -> None:
    """Bytes, the user's line, shape and kind, name and place are all there, however narrow the terminal."""
    origin = plans.Origin(op="aten._native_batch_norm_legit_functional.default", file="/home/ann/train.py", line=12)
    name, pool = "native_batch_norm_backward_17", "pool_of_the_backward"
    made = [plans.Made(name, 1024, plans.BufferKind.TEMPORARY, 0, 2, plans.InPool(pool, 16781312), origin)]
    pools = (plans.Pool(pool, 1 << 25, "cuda:0", plans.Lifetime(0, 2)),)
    graph = build_report([plans.make_plan("g", plans.Phase.INFERENCE, made, 2, pools)]).step
    for title, table in (("buffers", terminal.buffers(graph, graph.buffers)), ("peak", terminal.peak(graph))):
        text = rendered(table, width=width)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        words = "".join(text.split())
        place = [f"{pool}+16781312", "by_native_batch_norm_legit_functional"] if title == "buffers" else []
        for part in ("4.00KiB", "/home/ann/train.py:12", "float32[1024]temporary", name, "steps0to2", *place):
            assert part in words, f"{part} at {width} columns:\n{text}"


def test_scratch_that_is_not_counted_is_named() -> None:
    """In the words in which both stages note it (a change there has to be one here)."""
    report = training_report()
    assert "not counted" not in rendered(terminal.summary(report))
    notes = tuple(
        (f"conv_{k}", f"aten.convolution.default: its scratch on the CPU is {terminal.UNCOUNTED}") for k in range(5)
    )
    graph = report.graphs[0].model_copy(update={"notes": notes})
    text = rendered(terminal.summary(report.model_copy(update={"graphs": (graph, *report.graphs[1:])})))
    assert "not counted, since it is not known: the scratch of conv_0, conv_1, conv_2 and 2 more" in text
    for stage in (memplan.call_scratch, memplan.convolutions):
        assert terminal.UNCOUNTED in Path(str(stage.__file__)).read_text(encoding="utf-8")


def test_comparison(golden: Golden) -> None:
    out = io.StringIO()
    found = compare.compare(build_report([plans.inference()]), training_report())
    console = Console(file=out, width=100, markup=False, emoji=False, highlight=False, no_color=True)
    show_comparison(console, found, 3)
    golden("diff.txt", "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n")


def test_markdown(golden: Golden) -> None:
    golden("summary.md", tables.markdown(training_report()))


def test_csv(golden: Golden) -> None:
    golden("buffers.csv", tables.buffers_csv(training_report().step.buffers))


def test_dot(golden: Golden) -> None:
    golden("inference.dot", dot.dot(build_report([plans.inference()]).step).decode())


def test_perfetto(golden: Golden) -> None:
    data = json.loads(perfetto.trace(build_report([plans.inference()]).step))
    golden("perfetto.json", json.dumps(data, indent=1) + "\n")


def test_the_published_schema_is_the_one_that_is_checked(golden: Golden) -> None:
    golden("report-v3.schema.json", json.dumps(schema(), indent=2, sort_keys=True) + "\n")


def test_a_graph_without_steps_has_a_report() -> None:
    report = build_report([plans.make_plan("empty", plans.Phase.INFERENCE, [], 0)])
    assert "no steps" in rendered(terminal.summary(report))
    assert "Peak memory: 0 B" in tables.markdown(report)
    assert picture.picture(report).startswith(b"\x89PNG")
    assert json.loads(perfetto.trace(report.step))["traceEvents"]


def hostile_report() -> Report:
    origin = plans.Origin(node=HOSTILE, op=HOSTILE, module=HOSTILE, file=HOSTILE, line=1, code=HOSTILE)
    made = [plans.Made(f"b{HOSTILE}", 4096, plans.BufferKind.TEMPORARY, 0, 2, plans.Own(), origin)]
    return build_report([plans.make_plan(HOSTILE, plans.Phase.INFERENCE, made, 2)], target=HOSTILE)


@pytest.mark.parametrize("by", ["line", "op", "module", "dtype", "kind", "device"])
def test_no_control_character_reaches_the_terminal(by: str) -> None:
    report = hostile_report()
    text = rendered(terminal.summary(report, by=by))  # type: ignore[arg-type]
    text += rendered(terminal.peak(report.step)) + rendered(terminal.buffers(report.step, report.step.buffers))
    text += dot.dot(report.step).decode() + tables.buffers_csv(report.step.buffers) + tables.markdown(report)
    assert not [c for c in text if not c.isprintable() and c != "\n"]


def test_markdown_shows_markup_as_text() -> None:
    text = tables.markdown(hostile_report(), by="module")
    outside_code = re.sub(r"`[^`]*`", "", text)
    assert "<script" not in outside_code
    assert "@everyone" not in outside_code
    assert "](x)" not in outside_code.replace("\\]\\(", "")


def test_the_page_cannot_be_left_by_a_name() -> None:
    text = page.html(hostile_report())
    assert "<script>alert" not in text
    headers = re.search(r'id="headers">(.*?)</script>', text, re.DOTALL)
    assert headers is not None
    assert any("<script>alert(1)</script>" in s for s in json.loads(headers.group(1))[0]["strings"])


def test_no_cell_is_a_formula() -> None:
    origin = plans.Origin(node="=HYPERLINK()", module="+1", op="-x", file="@y", line=1)
    made = [plans.Made("=cmd", 1, plans.BufferKind.TEMPORARY, 0, 1, plans.Own(), origin)]
    report = build_report([plans.make_plan("g", plans.Phase.INFERENCE, made, 1)])
    rows = list(csv.reader(io.StringIO(tables.buffers_csv(report.step.buffers))))
    assert rows[1][0] == "'=cmd"
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in rows[1])


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536 << 10, "1.50 MiB"), (-5 << 30, "-5.00 GiB"), (1023 << 20, "1023 MiB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_small_things() -> None:
    assert percent(1, 0) == "-"
    assert clean("a\tb\x1b[0m\u202e") == "a\\x09b\\x1b[0m\\u202e"
    assert clean("x" * 300, 10) == "x" * 10 + "…"
