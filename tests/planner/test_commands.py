"""`memplan pack` and `memplan order`: what they print, write and refuse."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from memplan.reports.planner_commands import register

DATA = Path(__file__).parents[1] / "data" / "planner"
HEADER = "id,lower,upper,size\n"
app = typer.Typer()
register(app)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_pack_writes_offsets_and_json(tmp_path):
    out = tmp_path / "out.csv"
    result = run("pack", DATA / "minimalloc-input12.csv", "--capacity", 12, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    assert list(table) == ["buffers", "peak", "max_live", "gap", "optimal", "fits", "seconds"]
    assert (table["buffers"], table["peak"], table["optimal"], table["fits"]) == (5, 12, True, True)
    with out.open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["id", "lower", "upper", "size", "offset"]
    assert max(int(row["offset"]) + int(row["size"]) for row in rows) == 12


@pytest.mark.parametrize("capacity", [11, 3])
def test_pack_says_that_it_does_not_fit(tmp_path, capacity):
    out = tmp_path / "out.csv"
    result = run("pack", DATA / "minimalloc-input12.csv", "--capacity", capacity, "--json", "-o", out)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["fits"] is False
    assert not out.exists()
    assert ("line 2" if capacity == 3 else "at least 12") in result.stderr


def test_pack_aligns():
    result = run("pack", DATA / "minimalloc-input12.csv", "--align", 8, "--json")
    assert json.loads(result.stdout)["peak"] == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1"),
        (b"a,b\n", "line 1"),
        (HEADER.encode() + b"0,0,1,4\n0,0,1,4\n", "line 3"),
        (HEADER.encode() + b"0,0,1,-4\n", "line 2: negative"),
        (HEADER.encode() + b"0,0,1,nan\n", "line 2: size must be"),
        (HEADER.encode() + b"0,0,1,1e9\n", "line 2: size must be"),
        (HEADER.encode() + b"0,0,1," + b"9" * 30 + b"\n", "line 2"),
        (HEADER.encode() + b"0,0,1," + b"9" * 19 + b"\n", "line 2"),
        (HEADER.encode() + b"0,3,3,4\n", "line 2: the lifetime"),
        (HEADER.encode() + b"0,0,1\n", "line 2: expected 4 fields"),
        (HEADER.encode() + b"0,0,1,4\n\xff,0,1,4\n", "UTF-8"),
        (HEADER.encode() + b'0,0,1,"4\n', "line"),
    ],
)
def test_malformed_buffers_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "in.csv"
    path.write_bytes(content)
    result = run("pack", path)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_missing_file_and_bad_options_are_refused(tmp_path):
    assert run("pack", tmp_path / "none.csv").exit_code == 2
    assert run("pack", DATA / "minimalloc-A.csv", "--time-limit", "nan").exit_code == 2
    assert run("pack", DATA / "minimalloc-A.csv", "--align", 0).exit_code == 2
    assert run("order", tmp_path / "none.json").exit_code == 2


@pytest.mark.parametrize("optimizer", [False, True])
def test_order_writes_a_valid_order(tmp_path, optimizer):
    out = tmp_path / "order.json"
    flags = ["--optimizer"] if optimizer else []
    result = run("order", DATA / "resnet50_train.json.gz", "-o", out, "--json", *flags)
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    assert list(table) == ["ops", "peak", "program_peak", "lower_bound", "gap", "seconds"]
    order = json.loads(out.read_text())
    assert sorted(order) == list(range(table["ops"]))
    data = json.loads(gzip.decompress((DATA / "resnet50_train.json.gz").read_bytes()))
    place = {op: k for k, op in enumerate(order)}
    assert all(place[a] < place[b] for a, b in data["edges"])
    assert table["lower_bound"] <= table["peak"] <= table["program_peak"]
    assert table["gap"] <= 0.002


def test_order_counts_inputs_as_asked(tmp_path):
    path = tmp_path / "graph.json"
    graph = {"n": 1, "edges": [], "bufs": [{"size": 8, "prod": -1, "cons": [0], "out": False},
                                           {"size": 2, "prod": 0, "cons": [], "out": True}]}  # fmt: skip
    path.write_text(json.dumps(graph))
    peaks = {kind: json.loads(run("order", path, "--inputs", kind, "--json").stdout)["peak"]
             for kind in ("outside", "die", "stay")}  # fmt: skip
    assert peaks == {"outside": 2, "die": 10, "stay": 10}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", "line 2"),
        ("[]", "must be an object"),
        ('{"n": 1, "edges": []}', "'bufs'"),
        ('{"n": 2, "edges": [[0, 1], [1, 0]], "bufs": []}', "cycle"),
        ('{"n": 2, "edges": [[0, 0]], "bufs": []}', "cycle"),
        ('{"n": 1, "edges": [[0, 7]], "bufs": []}', "edge"),
        ('{"n": 1, "edges": [], "bufs": [{"size": NaN, "prod": 0, "cons": [], "out": true}]}', "bufs[0].size"),
        ('{"n": 1, "edges": [], "bufs": [{"size": -1, "prod": 0, "cons": [], "out": true}]}', "negative"),
        (
            '{"n": 1, "edges": [], "bufs": [{"size": 99999999999999999999, "prod": 0, "cons": [], "out": true}]}',
            "64-bit",
        ),
        ('{"n": 1e9, "edges": [], "bufs": []}', "n must be"),
    ],
)
def test_malformed_graphs_are_refused(tmp_path, content, message):
    path = tmp_path / "graph.json"
    path.write_text(content)
    result = run("order", path)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_damaged_gzip_is_refused(tmp_path):
    path = tmp_path / "graph.json.gz"
    path.write_bytes(gzip.compress(b"{}" * 1000)[:40])
    assert run("order", path).exit_code == 2
