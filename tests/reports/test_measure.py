"""Measuring a step, comparing answers, and the pytest marker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memplan.reports.answers import relative_difference
from memplan.reports.measure import measure, scalar
from memplan.reports.target import TargetError

MARKED = """
import pytest
from memplan import recording
from tests.reports import plans

def compile_something():
    recording.tell(recording.CompiledGraph(plans.inference(), 0))  # 49,152 bytes

@pytest.mark.memplan_limit("48KiB")
def test_fits():
    compile_something()

@pytest.mark.memplan_limit("47KiB")
def test_too_much():
    compile_something()

@pytest.mark.memplan_limit("47KiB")
def test_nothing():
    pass

@pytest.mark.memplan_limit("47KiB")
def test_its_own_failure_is_shown():
    compile_something()
    assert False, "my own"

@pytest.mark.memplan_limit("many")
def test_wrong():
    pass
"""


def test_the_marker(tmp_path: Path) -> None:
    (tmp_path / "test_marked.py").write_text(MARKED)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "--strict-markers", "-v"]
    command += ["-p", "no:cacheprovider", f"--rootdir={tmp_path}", "-o", f"pythonpath={root}", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    out = done.stdout
    assert "test_fits PASSED" in out, out + done.stderr
    assert "1 passed" in out
    assert "the peak is 48.0 KiB, the limit 47.0 KiB" in out
    assert "train.py:13" in out, "the line to blame"
    assert "compiled nothing with memplan" in out
    assert "AssertionError: my own" in out
    assert "'many' is not a number of bytes" in out


def test_a_cpu_step_is_measured_above_what_was_there() -> None:
    kept = torch.zeros(1 << 20)

    def step() -> None:
        a = torch.zeros(1 << 18)
        b = a + 1
        del a
        c = torch.cat([b, b])
        del b, c

    found = measure(step, torch.device("cpu"))
    # one MiB, then two; then one and two together: the cat's result beside its input
    assert found.peak_allocated == 3 << 20
    assert kept.numel() == 1 << 20


def test_differences() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative_difference(a, a.clone()) == 0
    assert relative_difference(torch.tensor([1.0, -3.0]), a) == 0.25
    nan = torch.tensor([1.0, float("nan")])
    assert relative_difference(nan, a) == float("inf"), "poison that shows through"
    assert relative_difference(nan, nan.clone()) == 0
    assert relative_difference(a[:1], a) == float("inf")
    assert relative_difference(torch.tensor([True]), torch.tensor([False])) > 0.02


def test_what_is_differentiated() -> None:
    assert scalar((torch.tensor([1]), torch.tensor([1.0, 2.0]))).item() == 3
    assert scalar({"loss": torch.tensor(2.0)}).item() == 2
    with pytest.raises(TargetError, match="no tensor to differentiate"):
        scalar("text")
