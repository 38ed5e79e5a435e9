"""The command line as a process: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.reports.build import build_report
from memplan.reports.model import write_report
from tests.reports import plans

SCRIPT = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
step = torch.compile(model, backend={backend!r})
step(torch.randn(32, 8)).sum().backward()
print("arguments", sys.argv[1:])
{end}
"""


def memplan(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "100", "MEMPLAN_CACHE_DIR": str(cwd / "cache"), **environment}
    command = [sys.executable, "-m", "memplan.reports.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    forward, backward, joins = plans.training()
    write_report(build_report([forward, backward], joins=joins, target="train"), tmp_path / "train.json")
    write_report(build_report([plans.inference()], target="small"), tmp_path / "small.json")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("report", "train.json"), 0, "Peak memory 1.81 MiB"),
        (("report", "train.json", "--format", "md"), 0, "### Peak memory"),
        (("peak", "train.json", "--at", "5"), 0, "backward0:buf1"),
        (("buffers", "train.json", "--where", "kind=saved", "--format", "csv"), 0, "forward0:buf0,1048576,float32"),
        (("diff", "small.json", "train.json"), 0, "+1.77 MiB"),
        (("check", "train.json", "--max-peak", "2MiB"), 0, "pass peak"),
        (("check", "train.json", "--max-peak", "1MiB"), 1, "FAIL peak: 1.81 MiB of at most 1.00 MiB"),
        (("check", "train.json", "--baseline", "small.json", "--max-growth", "2%"), 1, "FAIL growth"),
        (("fit", "train.json", "--budget", "1GiB"), 0, "It fits"),
        (("fit", "train.json", "--budget", "1MiB"), 1, "does not fit"),
        (("check", "train.json"), 2, "nothing to check"),
        (("buffers", "train.json", "--where", "sise>1"), 2, "did you mean 'size'"),
        (("report",), 2, "Missing argument"),
        (("report", "train.json", "--top", "none"), 2, "Invalid value"),
        (("report", "nowhere.json"), 4, "cannot read the report"),
        (("check", "train.json", "--baseline", "nowhere.json"), 4, "--update"),
        (("report", "train.json:thing"), 3, "cannot import"),
        (("report", "no_such_module:make"), 3, "no_such_module"),
        (("run", "nowhere.py"), 3, "no script"),
    ],
)
def test_exit_codes(folder: Path, arguments: tuple[str, ...], code: int, expected: str) -> None:
    done = memplan(*arguments, cwd=folder)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr + done.stdout
    assert expected in " ".join((done.stdout if code < 2 else done.stderr).split()), done.stdout + done.stderr


def test_the_cache_is_shown_and_cleared(folder: Path) -> None:
    from memplan.runtime.cache import Cache

    cache = Cache(folder / "cache")
    cache.put("a" * 64, b"x" * 2048, suffix=".plan")
    cache.put("b" * 64, b"y" * 1024, suffix="-k.so")
    shown = memplan("cache", "info", cwd=folder)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert str(folder / "cache") in shown.stdout
    rows = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert "1 2.00 KiB plans and the code that runs them" in rows
    assert "2 3.00 KiB in all" in rows
    assert memplan("cache", "clear", "--dir", str(folder / "elsewhere"), cwd=folder).returncode == 0
    assert cache.info().entries == 2
    assert "2 entries, 3.00 KiB deleted" in memplan("cache", "clear", cwd=folder).stdout
    assert cache.info().entries == 0


def test_a_damaged_report(folder: Path) -> None:
    text = (folder / "train.json").read_text()
    (folder / "cut.json").write_text(text[: len(text) // 2])
    done = memplan("report", "cut.json", cwd=folder)
    assert done.returncode == 4
    assert "damaged" in done.stderr


def test_no_colours_where_nobody_wants_them(folder: Path) -> None:
    plain = memplan("report", "train.json", cwd=folder)
    assert "\x1b" not in plain.stdout
    forced = memplan("report", "train.json", cwd=folder, FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[" in forced.stdout
    refused = memplan("report", "train.json", cwd=folder, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color")
    assert "\x1b[3" not in refused.stdout


def test_names_cannot_command_the_terminal(folder: Path) -> None:
    origin = plans.Origin(node="\x1b]0;owned\x07", file="/tmp/\x1b[2J.py", line=3, code="\x1b[31m")
    made = [plans.Made("\x1b[2J", 4096, plans.BufferKind.TEMPORARY, 0, 1, plans.Own(), origin)]
    write_report(build_report([plans.make_plan("g", plans.Phase.INFERENCE, made, 1)]), folder / "evil.json")
    for command in ("report", "peak", "buffers"):
        assert "\x1b" not in memplan(command, "evil.json", cwd=folder).stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [("buffers train.json", 0), ("check train.json --max-peak 1MiB", 1), ("pack buffers.csv", 0)],
)
def test_a_closed_pipe_is_no_error_and_changes_no_verdict(folder: Path, arguments: str, code: int) -> None:
    (folder / "buffers.csv").write_text("id,lower,upper,size\na,0,2,8\nb,1,3,8\n")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "memplan.reports.cli", *arguments.split()]
    done = subprocess.run(command, cwd=folder, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert done.returncode == code, done.stderr
    assert done.stderr == ""


def test_the_baseline_is_updated(folder: Path) -> None:
    assert memplan("check", "train.json", "--baseline", "base.json", "--update", cwd=folder).returncode == 0
    assert memplan("check", "train.json", "--baseline", "base.json", cwd=folder).returncode == 0
    assert memplan("check", "train.json", "--update", cwd=folder).returncode == 2


def test_exports(folder: Path) -> None:
    for to, start in [("html", b"<!doctype html>"), ("png", b"\x89PNG"), ("dot", b"digraph"), ("md", b"### Peak")]:
        assert memplan("export", "train.json", "--to", to, "-o", f"out.{to}", cwd=folder).returncode == 0
        assert (folder / f"out.{to}").read_bytes().startswith(start)
    assert memplan("export", "train.json", "--to", "memviz", "-o", "-", cwd=folder).returncode == 2


def test_help_has_an_example_for_every_command(folder: Path) -> None:
    listed = memplan("--help", cwd=folder).stdout
    for command in (
        "report",
        "peak",
        "buffers",
        "activations",
        "waterfall",
        "export",
        "run",
        "diff",
        "check",
        "fit",
        "verify",
        "doctor",
    ):
        assert f" {command} " in listed
        assert f"memplan {command}" in memplan(command, "--help", cwd=folder).stdout


ODD = """
import torch
from torch import nn

class Asks(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x.sin()

def asks(): return Asks(), (torch.ones(4),)
def other_sizes(): return nn.Sequential(nn.Linear(3, 4)), (torch.randn(2, 5),)
def idle(): return (lambda x: x), (torch.ones(4),)
def good(): return nn.Linear(3, 4), (torch.randn(2, 3),)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("odd.py:asks",), 3, "odd.py:7 asks for the values of a tensor"),
        (("odd.py:asks", "--real"), 0, "Peak memory"),
        (("odd.py:other_sizes",), 3, "a and b must have same reduction dim"),
        (("odd.py:idle",), 3, "there is nothing to plan"),
        (("odd.py:good", "--option", "wraper=cpp"), 2, "did you mean 'wrapper'"),
        (("odd.py:good", "--option", "target=h300"), 2, "'target' is one of"),
    ],
)
def test_odd_targets_say_what_is_odd(folder: Path, arguments: tuple[str, ...], code: int, expected: str) -> None:
    """In a few lines: neither our own frames nor what torch logs beside its error."""
    (folder / "odd.py").write_text(ODD)
    done = memplan("report", *arguments, cwd=folder)
    assert done.returncode == code, done.stderr
    assert expected in (done.stdout if code == 0 else done.stderr)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 25


def test_a_scripts_failure_starts_at_the_script(folder: Path) -> None:
    (folder / "script.py").write_text("def work():\n    raise ValueError('no data')\nwork()\n")
    done = memplan("run", "script.py", cwd=folder)
    assert done.returncode == 3
    assert done.stderr.startswith('Traceback (most recent call last):\n  File "script.py", line 3')
    assert "runpy" not in done.stderr


def test_an_error_that_nobody_reads_keeps_its_code(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "memplan.reports.cli", "report", "nowhere.json"]
    done = subprocess.run(command, cwd=folder, stdout=writing, stderr=writing, timeout=120)
    os.close(writing)
    assert done.returncode == 4


def test_a_script_is_run_and_reported(folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT.format(backend="memplan", end=""))
    done = memplan("run", "-o", "out.json", "script.py", "--epochs", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "arguments ['--epochs', '3']" in done.stdout
    report = json.loads((folder / "out.json").read_text())
    assert [g["phase"] for g in report["graphs"]] == ["forward", "backward"]
    assert report["whole"]["phase"] == "step"


def test_a_script_that_fails_still_has_its_report(folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT.format(backend="memplan", end="raise ValueError('late')"))
    done = memplan("run", "script.py", cwd=folder)
    assert done.returncode == 3
    assert "ValueError: late" in done.stderr
    assert "Peak memory" in done.stdout


def test_every_compile_of_a_script_comes_here_if_asked(folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT.format(backend="aot_eager", end=""))
    nothing = memplan("run", "script.py", cwd=folder)
    assert nothing.returncode == 3
    assert "--backend-override" in nothing.stderr
    assert "Peak memory" in memplan("run", "--backend-override", "script.py", cwd=folder).stdout


def test_two_reports_on_one_page(folder: Path) -> None:
    done = memplan("diff", "small.json", "train.json", "-o", "both.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "both.html").read_text()
    assert '"title": "before: small"' in page
    assert '"title": "after: train"' in page
    refused = memplan("diff", "small.json", "--against", "eager", "-o", "both.html", cwd=folder)
    assert (refused.returncode, "no chart" in refused.stderr) == (2, True)


def test_outputs_that_cannot_be_written_are_refused_beforehand(folder: Path) -> None:
    for path, message in (("nowhere/x.json", "there is no folder"), (".", "is a folder")):
        for before, after in (("report train.json", ""), ("export train.json --to html", ""), ("run", "x.py")):
            done = memplan(*before.split(), "-o", path, *after.split(), cwd=folder)
            assert done.returncode == 2, done.stderr
            assert message in " ".join(done.stderr.split())
    full = memplan("report", "train.json", "-o", "/dev/full", cwd=folder)
    assert (full.returncode, "Traceback" in full.stderr) == (2, False), full.stderr
    assert "No space left" in full.stderr


def test_a_bar_in_a_terminal_and_none_elsewhere(folder: Path) -> None:
    """Long work shows what it is at on standard error, where that is a terminal."""
    code = """
import time
from memplan.progress import working_on
from memplan.reports.working import working
with working("planning <b>[red]", parts=2) as begin:
    begin("first")
    working_on("forward0: fusion done")
    time.sleep(0.3)
    begin("second")
    time.sleep(0.3)
"""
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (plain.returncode, plain.stdout, plain.stderr) == (0, "", "")
    main, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=terminal, stdout=subprocess.PIPE)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(main, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert done.wait(timeout=120) == 0
    text = shown.decode()
    assert "first" in text
    assert "forward0: fusion done" in text
    assert "1/2" in text
    assert done.stdout is not None
    assert done.stdout.read() == b""


def test_a_report_of_another_version_and_absurd_numbers(folder: Path) -> None:
    report = json.loads((folder / "small.json").read_text())
    for change in ({"version": 999}, {"graphs": [{**report["graphs"][0], "live": [-5]}]}):
        (folder / "odd.json").write_text(json.dumps({**report, **change}))
        for command in ("report", "peak", "export"):
            done = memplan(command, "odd.json", *(["--to", "html"] if command == "export" else []), cwd=folder)
            assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr


def test_nothing_compiled_says_what_to_do(folder: Path) -> None:
    (folder / "plain.py").write_text("import torch\ntorch.ones(2).sum()\n")
    done = memplan("run", "plain.py", cwd=folder)
    assert done.returncode == 3
    assert "torch.compile" in done.stderr


def test_file_names_cannot_command_the_terminal(folder: Path) -> None:
    name = "\x1b]0;owned\x07.csv"
    (folder / name).write_text("id,lower,upper,size\na,2,1,8\n")
    for command in (("pack", name), ("order", name), ("report", name), ("run", f"{name}.py"), ("bisect", f"{name}.py")):
        done = memplan(*command, cwd=folder)
        assert done.returncode in (2, 3, 4), done.stderr
        assert "owned" in done.stderr
        assert "\x1b" not in done.stdout + done.stderr, command


def test_the_choices_of_order_are_the_planners() -> None:
    """They are written twice, so that no command but ``order`` has to load the planner."""
    from memplan import planner
    from memplan.reports.planner_commands import Inputs

    assert [i.value for i in Inputs] == [i.value for i in planner.Inputs]


def test_commands_start_without_torch_and_the_planner() -> None:
    code = (
        "import sys, memplan.reports.cli; print([m for m in ('torch', 'scipy', 'memplan.planner') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
