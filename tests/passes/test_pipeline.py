"""The pipeline: requirements, options, dumps, verification."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from memplan.ir.config import Config
from memplan.ir.errors import VerificationError
from memplan.ir.program import Program
from memplan.ir.verify import verify_program
from memplan.passes.cleanup import Cleanup
from memplan.passes.fusion import Fusion
from memplan.passes.pipeline import PASS_NAMES, PASSES, check_requirements, collector_paused, run_pipeline
from tests.passes.test_fusion import softmax


class Broken:
    """A pass that loses an operation."""

    name: ClassVar[str] = "broken"
    requires: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def configured(cls, config: Config) -> Broken:
        return cls()

    def run(self, program: Program) -> Program:
        return replace(program, operations=program.operations[1:])


def test_requirements() -> None:
    check_requirements(PASSES)
    assert set(PASS_NAMES) >= {"cleanup", "fusion"}
    with pytest.raises(ValueError, match="'fusion' needs cleanup"):
        check_requirements((Fusion, Cleanup))
    with pytest.raises(ValueError, match="two passes"):
        check_requirements((Cleanup, Cleanup))


def test_disable_and_dump(tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []
    config = Config(disable=("fusion",), dump=str(tmp_path))
    passes = (Cleanup, Fusion)
    after = run_pipeline(
        softmax(), config, verify_program, lambda name, a, b: seen.append((name, a is not b)), passes=passes
    )
    assert len(after.operations) == 5
    assert [name for name, _ in seen] == ["cleanup", "fusion"]
    assert not seen[1][1]
    files = sorted(p.name for p in (tmp_path / "p").iterdir())
    assert files == ["00-captured.txt", "01-cleanup.txt", "02-fusion.txt"]
    assert (tmp_path / "p" / "02-fusion.txt").read_text() == "(unchanged)\n"
    assert "reduce_max" in (tmp_path / "p" / "00-captured.txt").read_text()


def test_a_wrong_pass_is_named() -> None:
    with pytest.raises(VerificationError, match="pass 'broken' made a wrong program"):
        run_pipeline(softmax(), Config(), verify_program, passes=(Cleanup, Broken))
    # without verification nobody looks
    run_pipeline(softmax(), Config(verify=False), verify_program, passes=(Cleanup, Broken))


def test_the_collector_is_back_after_an_exception_and_once_the_last_thread_is_done():
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with collector_paused():
            inside.set()
            leave.wait(10)

    assert gc.isenabled()
    thread = threading.Thread(target=other)

    def interrupted() -> None:
        with collector_paused():
            thread.start()
            inside.wait(10)
            with collector_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert not gc.isenabled()  # the other thread still plans
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
