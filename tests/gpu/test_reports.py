"""Measured on a GPU: the peak of a step and every step of its plan, beside what was planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.small_transformer import Model
from memplan.reports.answers import compare_with_eager
from memplan.reports.measure import measured
from memplan.reports.target import Made, Request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="measuring device memory needs a GPU")


def transformer() -> Made:
    torch.manual_seed(0)
    return Made(Model(width=256, depth=4).cuda(), (torch.randn(16, 128, 256, device="cuda"),), {})


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_the_peak_and_every_step_are_as_planned(wrapper: str) -> None:
    report = measured(transformer(), Request(fake=False, options={"wrapper": wrapper}), "transformer")
    (found,) = report.measured
    assert found.device == "cuda:0"
    assert found.peak_reserved is not None
    predicted = report.predicted["cuda:0"]
    assert abs(predicted - found.peak_allocated) <= 0.01 * found.peak_allocated
    assert len(found.timeline) == len(report.step.steps)
    seen = [
        (planned, got) for planned, got in zip(report.step.allocated, found.timeline, strict=True) if got is not None
    ]
    assert len(seen) >= 0.9 * len(report.step.steps)
    assert max(abs(planned - got) for planned, got in seen) <= 0.01 * predicted
    assert json.loads(report.model_dump_json())["measured"][0]["timeline"] == list(found.timeline)


def test_poison_changes_nothing() -> None:
    assert compare_with_eager(transformer(), Request(fake=False), "transformer").right


def test_the_command_prints_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memplan.reports.cli import main

    (tmp_path / "gpu_target.py").write_text(
        "import torch\nfrom examples.small_transformer import Model\n"
        "def make():\n    return Model().cuda(), (torch.randn(8, 128, 128, device='cuda'),)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["report", "gpu_target.py:make", "--measure"])
    out = capsys.readouterr().out
    assert left.value.code in (0, None), out
    assert "measured on cuda:0" in out
    assert "Measured on cuda:0, step by step" in out
