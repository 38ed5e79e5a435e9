"""``memplan bisect``: halving finds the pass, whichever it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from memplan.compilation import PASS_NAMES
from memplan.reports import cli
from memplan.reports.bisect_command import halve


@pytest.mark.parametrize("guilty", PASS_NAMES)
def test_halving_finds_each_pass(guilty: str) -> None:
    found = halve(PASS_NAMES, lambda disabled: guilty not in disabled)
    assert found is not None
    assert found.culprit == guilty
    assert found.alone
    assert found.before == PASS_NAMES[: PASS_NAMES.index(guilty)]
    assert found.runs <= 3 + len(PASS_NAMES).bit_length()


def test_halving_of_two_guilty_passes_names_the_first_and_says_so() -> None:
    found = halve("abcdef", lambda disabled: not {"b", "e"} <= disabled)
    assert found is not None
    assert (found.culprit, found.alone) == ("b", False)


def test_a_script_that_always_fails_and_one_that_never_does() -> None:
    assert halve("abc", lambda disabled: False) is None
    found = halve("abc", lambda disabled: True)
    assert found is not None
    assert found.culprit is None


# a script that compiles nothing (torch alone takes seconds to load): its answer is wrong with one pass
SCRIPT = """
import os, sys
sys.exit(GUILTY not in os.environ["MEMPLAN_DISABLE"].split(","))
"""


def test_the_command_names_the_pass(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(SCRIPT.replace("GUILTY", repr("inplace")))
    result = CliRunner().invoke(cli.app, ["bisect", str(script)])
    assert result.exit_code == 1
    assert "It fails from pass inplace on" in result.output
    assert 'options={"disable": ["inplace"]}' in result.output


COMPILED = """
import torch
import memplan.compilation as compilation
from memplan.passes.concat import Concat

run = Concat.run
def broken(self, program):
    raise AssertionError("this pass is broken")
Concat.run = broken
f = torch.compile(lambda x: torch.cat([x.sin(), x.cos()]), backend="memplan")
x = torch.randn(8)
assert torch.allclose(f(x), torch.cat([x.sin(), x.cos()]), atol=1e-5)
"""


def test_a_broken_pass_is_found_in_a_script_that_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "check.py"
    script.write_text(COMPILED)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # what is off stays off, which also spares this test most of the runs
    monkeypatch.setenv("MEMPLAN_DISABLE", ",".join(p for p in PASS_NAMES if p not in ("concat", "inplace")))
    result = CliRunner().invoke(cli.app, ["bisect", str(script)])
    assert "It fails from pass concat on" in result.output, result.output
    assert "fusion" not in result.output
