"""Sums that must hold exactly, on plans made at random; reports that contradict themselves are refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.errors import OptionError, ReportError
from memplan.reports.build import build_report
from memplan.reports.compare import compare, growth
from memplan.reports.export import exported
from memplan.reports.layout import FreeList, layout
from memplan.reports.model import Graph, Report, dump_report, parse_report, read_report, write_report
from memplan.reports.query import grouped, room, selected
from memplan.reports.terminal import rendered, summary
from memplan.reports.whole import Join, whole_step
from tests.reports import plans

SEEDS = st.integers(0, 10_000)


def brute_live(graph: Graph, step: int) -> int:
    """Counted storages alive at a step, the slow way."""
    total = graph.steps[step].scratch
    for root in {b.storage for b in graph.buffers}:
        group = [b for b in graph.buffers if b.storage == root]
        if group[0].counted and min(b.birth for b in group) <= step < max(b.death for b in group):
            total += max(b.nbytes for b in group)
    return total


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_what_is_alive_sums_to_what_is_allocated(seed: int) -> None:
    plan = plans.random_plan(seed)
    graph = build_report([plan]).step
    assert graph.allocated == plan.timeline
    for k in range(len(graph.steps)):
        assert graph.live[k] == brute_live(graph, k)
        rows = grouped(graph, graph.alive_at(k), k, "line")
        assert sum(r.nbytes for r in rows) + graph.steps[k].scratch + room(graph, k) == graph.allocated[k]


@given(SEEDS, st.lists(st.integers(0, 10**9), max_size=5))
@settings(max_examples=40, deadline=None)
def test_the_waterfall_sums_to_the_peak(seed: int, peaks: list[int]) -> None:
    report = build_report([plans.random_plan(seed)], waterfall=[(f"pass{k}", p) for k, p in enumerate(peaks)])
    if peaks:
        stages = [s.peak for s in report.waterfall]
        changes = [b - a for a, b in itertools.pairwise(stages)]
        assert stages[0] + sum(changes) == report.step.peak
    else:
        assert report.waterfall == ()


@given(SEEDS, SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_step_is_its_graphs_on_one_timeline(first: int, second: int) -> None:
    forward = plans.random_plan(first, plans.Phase.FORWARD, name="f")
    backward = plans.random_plan(second, plans.Phase.BACKWARD, name="b")
    report = build_report([forward, backward])
    whole, (f, b) = report.step, report.graphs
    assert len(whole.steps) == len(f.steps) + len(b.steps)
    assert whole.live[: len(f.steps)] == f.live
    left = sum(s.nbytes for s in f.storages if s.counted and s.death > len(f.steps))
    assert whole.live[len(f.steps) :] == tuple(v + left for v in b.live)
    assert parse_report(dump_report(report)) == report


def test_saved_buffers_live_until_the_backward_lets_go() -> None:
    forward, backward, joins = plans.training()
    step = build_report([forward, backward], joins=joins).step
    qkv = next(s for s in step.storages if s.name == "forward0:buf0")
    assert (qkv.birth, qkv.death) == (0, 7), "written over in place by the backward, it lives as long as that"
    assert qkv.members == ("forward0:buf0", "backward0:buf1")
    assert "backward0:mm" not in step.by_name
    # by hand: at step 5 the forward's buf0 (1 MiB), buf4 (64 KiB) under buf0, the loss (4 bytes) and 8192 of scratch
    assert step.live[5] == (1 << 20) + (64 << 10) + 4 + 8192


def test_a_saved_buffer_that_is_not_donated_lives_to_the_end_of_the_backward() -> None:
    made = [plans.Made("s", 1024, plans.BufferKind.SAVED, 0, 3, plans.Own())]
    received = [
        plans.Made("r", 1024, plans.BufferKind.INPUT, 0, 3, plans.External()),
        plans.Made("o", 256, plans.BufferKind.OUTPUT, 2, 4, plans.Own()),
    ]
    forward = plans.make_plan("f", plans.Phase.FORWARD, made, 2)
    backward = plans.make_plan("b", plans.Phase.BACKWARD, received, 3)
    step = build_report([forward, backward], joins=[("s", "r")]).step
    assert step.live == (4096, 4096, 4096, 4096, 4096 + 1024)


def test_a_join_that_names_nothing_is_refused() -> None:
    forward, backward, _ = plans.training()
    with pytest.raises(ReportError, match="'nobody' of graph 'forward0'"):
        build_report([forward, backward], joins=[("nobody", "mm")])
    graphs = build_report([forward, backward]).graphs
    with pytest.raises(ReportError, match="runs before"):
        whole_step(graphs, [Join("backward0", "buf2", "forward0", "buf0")])


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_drawn_boxes_do_not_overlap(seed: int) -> None:
    graph = build_report([plans.random_plan(seed, count=20)]).step
    plan = layout(graph)
    own = [p for p in plan.placed if not plan.lanes[p.lane].pool]
    for i, a in enumerate(own):
        assert a.offset + a.storage.nbytes <= plan.lanes[a.lane].nbytes
        for b in own[:i]:
            at_once = a.storage.birth < b.storage.death and b.storage.birth < a.storage.death
            apart = a.offset + a.storage.nbytes <= b.offset or b.offset + b.storage.nbytes <= a.offset
            assert apart or not at_once


def test_the_free_list_merges_on_both_sides() -> None:
    free = FreeList()
    assert [free.take(n) for n in (10, 20, 30)] == [0, 10, 30]
    free.give(0, 10)
    free.give(30, 60)
    free.give(10, 30)
    assert free.starts == [0]


def test_conditions() -> None:
    forward, backward, joins = plans.training()
    step = build_report([forward, backward], joins=joins).step
    assert [b.name for b in selected(step, where=["size>=512KiB", "kind=temporary"], sort="name")] == [
        "backward0:buf1",
        "forward0:buf1",
        "forward0:buf2",
    ]
    assert all("mlp" in b.origin.module for b in selected(step, where=["module~MLP"]))
    assert {b.name for b in selected(step, live_at=6, where=["kind!=parameter"])} == {
        "forward0:buf5",
        "backward0:buf1",
        "backward0:buf2",
    }
    for text, message in [
        ("sise>1", "did you mean 'size'"),
        ("size", "cannot read"),
        ("size~1", "is a number"),
        ("kind>3", "does not go with text"),
        ("line=x", "whole number"),
    ]:
        with pytest.raises(OptionError, match=message):
            selected(step, where=[text])
    with pytest.raises(OptionError, match="no step 99"):
        selected(step, live_at=99)


def test_a_comparison_sums_to_the_difference() -> None:
    a, b = build_report([plans.inference()]), build_report([plans.random_plan(5)])
    found = compare(a, b)
    assert sum(c.difference for c in found.changes) == found.after - found.before
    same = compare(a, a)
    assert (same.gone, same.new) == ((), ())
    assert same.same == len(a.step.buffers)


def test_growth() -> None:
    assert growth("2%", 1000) == 20
    assert growth("1KiB", 1000) == 1024
    assert growth("0", 1000) == 0


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_report(build_report([plans.inference()], target="m:f"), tmp_path / "r.json")
    return tmp_path / "r.json"


def changed(path: Path, **values: object) -> str:
    data = json.loads(path.read_text())
    graph = data["graphs"][0]
    for key, value in values.items():
        (graph if key in graph else data)[key] = value
    return json.dumps(data)


def test_a_report_comes_back_as_it_was(saved: Path) -> None:
    report = read_report(saved)
    assert report == Report.model_validate_json(saved.read_text())
    assert report.target == "m:f"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 4}, "version 4, this memplan reads versions 1, 2 and 3"),
        ({"version": None}, "version None"),
        ({"format": "other"}, "not a memplan report"),
        ({"graphs": []}, "no graphs"),
        ({"live": [1, 2, 3]}, "its buffers sum to"),
        ({"live": [1]}, "1 entries for 3 steps"),
        ({"live": [-1, 0, 0]}, "greater than or equal to 0"),
        ({"live": [10**40, 0, 0]}, "less than"),
        ({"live": ["5", 0, 0]}, "valid integer"),
        ({"surprise": 1}, "surprise"),
        ({"pools": [{"name": "p", "nbytes": 1, "device": "cpu", "birth": 5, "death": 4}]}, "lifetime"),
    ],
)
def test_a_report_that_cannot_be_right_is_refused(saved: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        parse_report(changed(saved, **values))


@pytest.mark.parametrize("field", ["storage", "in_place_of", "pool", "death", "birth"])
def test_a_buffer_that_points_nowhere_is_refused(saved: Path, field: str) -> None:
    data = json.loads(saved.read_text())
    data["graphs"][0]["buffers"][1][field] = 2**30 if field in ("death", "birth") else "nowhere"
    with pytest.raises(ReportError, match="contradicts itself"):
        parse_report(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", '{"a": 1' + "0" * 10_000 + "}", "\x00"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ReportError):
        parse_report(text)


def test_a_report_cut_anywhere_is_refused(saved: Path) -> None:
    text = saved.read_text().rstrip()
    for cut in range(0, len(text), 97):
        with pytest.raises(ReportError):
            parse_report(text[:cut])


def numbers(value: object, before: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where the numbers of a decoded report stand; of long lists in the first three entries."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, (*before, key))
    elif isinstance(value, list):
        for k, inner in enumerate(value[:3]):
            yield from numbers(inner, (*before, k))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield before


@pytest.mark.parametrize("number", ["-1", "1e30", "NaN", "-Infinity", str(2**62), "2.5", "null"])
def test_absurd_numbers_are_refused_or_shown(saved: Path, number: str) -> None:
    """Whatever is read can be shown by every renderer; what contradicts itself is refused."""
    whole = json.loads(saved.read_text())
    places = list(numbers(whole))
    assert len(places) > 30
    refused = 0
    for *path, last in places:
        data = json.loads(saved.read_text())
        inner = data
        for key in path:
            inner = inner[key]
        inner[last] = "@"
        try:
            report = parse_report(json.dumps(data).replace('"@"', number))
        except ReportError:
            refused += 1
            continue
        assert rendered(summary(report))
        for to in ("memviz", "perfetto", "html", "png", "md", "dot", "json"):
            assert exported(report, report.step, to)
    assert refused > 0.7 * len(places)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot read"):
        read_report(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match="cannot read"):
        read_report(tmp_path / "bytes.json")


def test_reserved_bytes_of_the_whole_step_are_in_the_report() -> None:
    from dataclasses import replace

    from rich.console import Console

    from memplan.ir.plan import StepMemory
    from memplan.reports.terminal import headline

    forward, backward, joins = plans.training()
    told = replace(backward, step={"cuda:0": StepMemory(resident=2**20, live=4 * 2**20, reserved=6 * 2**20)})
    report = build_report([forward, told], joins=joins)
    assert report.step.reserved["cuda:0"].reserved == 6 * 2**20
    console = Console(width=200, record=True)
    console.print(headline(report))
    text = console.export_text()
    assert "reserved on cuda:0: predicted 6.00 MiB, with 1.00 MiB of parameters and batch; 1.50 times" in text
