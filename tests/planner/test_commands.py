"""`memplan pack` and `memplan order`: what they print, write and refuse."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from memplan.reports.planner_commands import register

from .exhaustive import overlaps

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
        (HEADER.encode() + b"0,0,1,4.0\n", "line 2: size must be"),
        (HEADER.encode() + b"0,0.5,1,4\n", "line 2: lower must be"),
        (HEADER.encode() + b"0,0,inf,4\n", "line 2: upper must be"),
        (HEADER.encode() + b"0,0,1,4\r\n\r\n1,0,1,x\r\n", "line 4: size must be"),
        (b"0,0,1,4\n1,0,1,4\n", "line 1: expected the header"),
        (HEADER.encode("utf-16"), "line 1: not UTF-8"),
        (HEADER.encode() + b"".join(b"%d,0,1,%d\n" % (k, 2**60) for k in range(3)), "line 3: the sizes up to here"),
    ],
)
def test_malformed_buffers_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "in.csv"
    path.write_bytes(content)
    result = run("pack", path)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfid,lower,upper,size\na,0,3,4\nb,1,2,8\n",
        b"id,lower,upper,size\r\na,0,3,4\r\n\r\nb,1,2,8\r\n",
        b"size,upper,id,lower\n4,3,a,0\n8,2,b,1\n",
        b"id, lower, upper, size\na, 0, 3, 4\nb, 1, 2, 8",
        b"id,lower,upper,size,name\na,0,3,4,x\nb,1,2,8,\n",
        b"id,lower,upper,size\na,-3,0,4\nb,-2,-1,8\nzero,-3,0,0\n",
    ],
)
def test_odd_files_of_buffers_are_read(tmp_path, content):
    path, out = tmp_path / "in.csv", tmp_path / "out.csv"
    path.write_bytes(content)
    result = run("pack", path, "--json", "-o", out)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["peak"] == 12
    with out.open(newline="") as stream:
        rows = [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(stream)]
    assert max(int(row["offset"]) + int(row["size"]) for row in rows) == 12
    assert min(int(row["offset"]) for row in rows) == 0


def test_a_file_of_a_header_alone_has_no_buffers(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text(HEADER)
    assert json.loads(run("pack", path, "--json").stdout)["buffers"] == 0


@pytest.mark.parametrize("command", ["pack", "order"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, command):
    for out in (tmp_path, tmp_path / "none" / "out"):
        # the input does not exist either: it would be the first thing to fail
        result = run(command, tmp_path / "none.csv", "-o", out)
        assert result.exit_code == 2
        assert "none.csv" not in result.stderr
        assert "Traceback" not in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("command", ["pack", "order"])
@pytest.mark.parametrize("linked", [False, True])
def test_the_input_is_not_written_over(tmp_path, command, linked):
    source = tmp_path / "given"
    content = (DATA / ("minimalloc-input12.csv" if command == "pack" else "resnet50_train.json.gz")).read_bytes()
    source.write_bytes(content)
    output = tmp_path / "link" if linked else source
    if linked:
        output.symlink_to(source)
    result = run(command, source, "-o", output)
    assert result.exit_code == 2
    assert "is the input; name another file" in " ".join(result.stderr.replace("\u2502", " ").split())
    assert source.read_bytes() == content


def test_a_full_disk_is_reported(tmp_path):
    result = run("pack", DATA / "minimalloc-input12.csv", "-o", "/dev/full")
    assert result.exit_code == 2
    assert "No space left" in result.stderr


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
        ('{"n": 1, "edges": [[0, 7]], "bufs": []}', "edges[0][1]: there is no operation 7"),
        ('{"n": 1, "edges": [[0, 0, 0]], "bufs": []}', "edges[0] must be a pair"),
        ('{"n": 1, "edges": [], "bufs": [{"size": 1, "prod": 0, "cons": [0, 3], "out": true}]}', "bufs[0].cons[1]"),
        ('{"n": 1, "edges": [], "bufs": [{"size": 1, "prod": 4, "cons": [], "out": true}]}', "bufs[0].prod"),
        ('{"n": 1, "edges": [], "bufs": [{"size": 1.0, "prod": 0, "cons": [], "out": true}]}', "bufs[0].size must be"),
        ('{"n": 1, "edges": [], "bufs": [{"size": 1, "prod": 0, "cons": [], "out": 1}]}', "bufs[0].out"),
        ('{"n": 1, "edges": [], "bufs": [{"size": 1, "prod": 0, "cons": []}]}', "bufs[0] has no 'out'"),
        ('{"n": 1000000000000, "edges": [], "bufs": []}', "n may be"),
        ('{"n": 1, "edges": [[0', "line 1"),
        ("[" * 100_000, "nested too deeply"),
        ('{"n": 1, "edges": [], "bufs": [{"size": NaN, "prod": 0, "cons": [], "out": true}]}', "bufs[0].size"),
        (
            '{"n": 1, "edges": [], "bufs": ['
            + ",".join(['{"size": 1152921504606846976, "prod": 0, "cons": [], "out": true}'] * 3)
            + "]}",
            "bufs[1].size: the sizes up to here",
        ),
        ('{"n": 1, "edges": [], "bufs": [{"size": -1, "prod": 0, "cons": [], "out": true}]}', "negative"),
        (
            '{"n": 1, "edges": [], "bufs": [{"size": 99999999999999999999, "prod": 0, "cons": [], "out": true}]}',
            "64-bit",
        ),
        ('{"n": 1e9, "edges": [], "bufs": []}', "n must be"),
        ('{"n": 1, "n": 2, "edges": [], "bufs": []}', "'n' stands twice"),
    ],
)
def test_malformed_graphs_are_refused(tmp_path, content, message):
    path = tmp_path / "graph.json"
    path.write_text(content)
    result = run("order", path)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("damage", [lambda z: z[: len(z) // 2], lambda z: z[:-8] + b"12345678", lambda z: z + b"more"])
def test_damaged_gzip_is_refused(tmp_path, damage):
    path = tmp_path / "graph.json.gz"
    path.write_bytes(damage(gzip.compress(b'{"n": 0, "edges": [], "bufs": []}' * 10)))
    result = run("order", path)
    assert result.exit_code == 2
    assert "damaged gzip file" in result.stderr


def test_the_commands_as_processes_end_with_their_codes_and_no_traceback(tmp_path):
    """What a shell sees: the entry point, not typer's runner, which catches exceptions."""
    bad = tmp_path / "bad.csv"
    bad.write_text(HEADER + "a,0,1,nan\n")
    cycle = tmp_path / "cycle.json"
    cycle.write_text('{"n": 2, "edges": [[0, 1], [1, 0]], "bufs": []}')
    fits = DATA / "minimalloc-input12.csv"
    cases = [
        (["pack", bad], 2, "line 2"),
        (["pack", fits, "--capacity", "11"], 1, "at least 12"),
        (["pack", fits, "--capacity", "12"], 0, ""),
        (["order", cycle], 2, "0 -> 1 -> 0"),
    ]
    for arguments, code, message in cases:
        done = subprocess.run(
            [sys.executable, "-c", "from memplan.reports.cli import main; main()", *map(str, arguments)],
            capture_output=True, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_many_buffers_are_packed_in_one_sweep_where_time_is_short(tmp_path):
    path, out = tmp_path / "in.csv", tmp_path / "out.csv"
    rows = [(k % 977, k % 977 + 1 + k % 13, 1 + k * 7919 % 65_536) for k in range(50_000)]
    path.write_text(HEADER + "".join(f"{k},{a},{b},{s}\n" for k, (a, b, s) in enumerate(rows)))
    table = json.loads(run("pack", path, "--time-limit", 0.01, "--align", 64, "--json", "-o", out).stdout)
    with out.open() as stream:
        offsets = [int(row["offset"]) for row in csv.DictReader(stream)]
    assert overlaps(rows, offsets) == []
    assert all(offset % 64 == 0 for offset in offsets)
    assert table["peak"] == max(offset + size for offset, (_, _, size) in zip(offsets, rows, strict=True))
    assert table["max_live"] <= table["peak"]
