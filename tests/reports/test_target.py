"""Factories as targets: with an `analyze` that plans by hand, so that what is tested is the way to it and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import memplan
from memplan.ir.activation import Activation
from memplan.ir.eager import EagerMemory
from memplan.ir.errors import LoweringError, OptionError
from memplan.ir.plan import Plan
from memplan.reports.command_options import parse_options
from memplan.reports.fit import changes, default_batch, largest_batch
from memplan.reports.target import Request, TargetError, make, report_for, report_from
from tests.reports import plans

FACTORY = """
import torch
def make(batch=4):
    return torch.nn.Linear(2, 2), torch.zeros(batch, 2)
def named():
    return torch.nn.Linear(2, 2).eval(), {"input": torch.zeros(1, 2)}
def wrong():
    return 3
def fails():
    raise ValueError("no data")
"""


@dataclass(frozen=True)
class Compiled:
    plan: Plan
    group: int
    joins: tuple[tuple[str, str], ...] = ()
    waterfall: tuple[tuple[str, int], ...] = ()
    activations: tuple[Activation, ...] = ()
    compilation: tuple[int, int] | None = None
    eager: EagerMemory | None = None
    runs: tuple[tuple[int, int], ...] = ()


def planned(model: object, args: Sequence[object], kwargs: object = None, **how: object) -> list[Compiled]:
    """A plan of 4096 bytes for each row of the batch, half of it under a budget; LoweringError for 13 rows."""
    batch = int(args[0].shape[0]) if args else 1  # type: ignore[attr-defined]
    if batch == 13:
        raise LoweringError("thirteen rows", where="train.py:1")
    options = how["options"]
    share = 0.5 if isinstance(options, dict) and "budget" in options else 1
    made = [plans.Made("b", int(1024 * batch * share), plans.BufferKind.TEMPORARY, 0, 1, plans.Own())]
    phase = plans.Phase.FORWARD if how["backward"] else plans.Phase.INFERENCE
    return [Compiled(plans.make_plan("g", phase, made, 1), 0)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "things_to_make.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memplan, "analyze", planned, raising=False)
    return tmp_path


@pytest.mark.parametrize("place", ["things_to_make", "things_to_make.py"])
def test_a_factory_is_analysed(place: str) -> None:
    report = report_for(f"{place}:make")
    assert report.step.peak == 4 * 4096
    assert report.step.phase == "forward", "a module in training mode is planned with its backward"
    assert "torch" in report.environment
    assert report_for(f"{place}:named").step.phase == "inference"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("things_to_make:wrong", "must return \\(model, example_inputs\\), not int"),
        ("things_to_make:fails", "ValueError: no data"),
        ("things_to_make:mike", "it has make, named, wrong, fails"),
        ("nowhere.py:make", "no file"),
    ],
)
def test_what_is_wrong_with_a_factory_is_said(target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        report_for(target)


def test_a_model_that_cannot_be_compiled() -> None:
    with pytest.raises(TargetError, match=r"thirteen rows\n  at train.py:1"):
        report_for("things_to_make:make", Request(batch=13))
    with pytest.raises(TargetError, match="takes no argument 'batch'"):
        report_for("things_to_make:named", Request(batch=2))


def test_nothing_compiled_says_what_to_do() -> None:
    with pytest.raises(TargetError, match="--backend-override"):
        report_from([])


def test_the_largest_batch() -> None:
    def plan(request: Request) -> object:
        return report_for("things_to_make:make", replace(request))

    largest, found = largest_batch(plan, Request(), 100 * 4096 + 5)  # type: ignore[arg-type]
    assert found is not None
    assert (largest, found.peak) == (100, 100 * 4096)
    assert largest_batch(plan, Request(), 4095) == (0, None)  # type: ignore[arg-type]


def test_changes_are_tried_from_cheap_to_dear() -> None:
    def plan(request: Request) -> object:
        return report_for("things_to_make:make", request)

    request = Request(batch=default_batch(make.__globals__["factory_of"]("things_to_make:make")))
    assert request.batch == 4
    found = changes(plan, request, 2 * 4096, 4096, print)  # type: ignore[arg-type]
    assert [a.title for a in found] == ["recompute what it takes (budget=4096)"]
    told: list[str] = []
    found = changes(plan, request, 4096, 4096, told.append)  # type: ignore[arg-type]
    assert "alone are more than the budget" in told[0]
    assert found[-1].title == "batch size 1"
    assert found[-1].total == 4096


def test_options_of_the_command_line() -> None:
    assert parse_options(["disable=inplace,reorder", "recompute_time=0.5", "poison=true", "budget=12GiB"]) == {
        "disable": ["inplace", "reorder"],
        "recompute_time": 0.5,
        "poison": True,
        "budget": "12GiB",
    }
    with pytest.raises(OptionError, match="NAME=VALUE"):
        parse_options(["poison"])
