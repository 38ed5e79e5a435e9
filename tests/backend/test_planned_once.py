"""What a search for a budget has planned is what runs: verified, and not planned a second time but for a dump."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import memplan
import memplan.backend
import memplan.compilation
import memplan.step_planning
from memplan.budget import Budget, Modules, Planned


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return x.square().mean()


def analyzed(**options: object) -> tuple[memplan.CompiledGraph, ...]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return memplan.analyze(Stack(), (torch.randn(64, 32),), options={"budget": "1GB", **options})


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the programs that passes run over, a search's trials aside."""
    names: list[str] = []
    original = memplan.step_planning.prepare_program

    def prepare(program: object, *args: object) -> object:
        names.append(program.name)  # type: ignore[attr-defined]
        return original(program, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(memplan.step_planning, "prepare_program", prepare)
    return names


def test_the_plan_that_a_search_takes_is_not_made_again(prepared: list[str]) -> None:
    graphs = analyzed()
    assert [g.plan.program.phase.value for g in graphs] == ["forward", "backward"]
    assert prepared == []


def test_it_is_what_planning_again_would_make(tmp_path: Path, prepared: list[str]) -> None:
    found = analyzed()
    again = analyzed(dump=str(tmp_path))  # a dump shows every pass
    assert len(prepared) == 2
    for a, b in zip(found, again, strict=True):
        assert (a.plan.order, a.plan.placements, a.plan.pools) == (b.plan.order, b.plan.placements, b.plan.pools)
        assert a.waterfall == b.waterfall


def test_another_program_than_was_planned_is_planned(monkeypatch: pytest.MonkeyPatch, prepared: list[str]) -> None:
    original = Budget.search

    def search(self: Budget) -> tuple[Modules, Planned]:
        modules, planned = original(self)
        assert planned.ahead is not None
        programs = tuple(replace(p, notes=(*p.notes, ("x", "other"))) for p in planned.ahead.programs)
        return modules, replace(planned, ahead=replace(planned.ahead, programs=programs))  # type: ignore[arg-type]

    monkeypatch.setattr(Budget, "search", search)
    analyzed()
    assert len(prepared) == 2


def test_what_a_search_made_is_verified_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Budget.search

    def search(self: Budget) -> tuple[Modules, Planned]:
        modules, planned = original(self)
        assert planned.ahead is not None
        wrong = tuple(
            replace(p, plan=replace(p.plan, order=tuple(reversed(p.plan.order)))) for p in planned.ahead.planned
        )
        return modules, replace(planned, ahead=replace(planned.ahead, planned=wrong))

    monkeypatch.setattr(Budget, "search", search)
    with pytest.raises(Exception, match=r"VerificationError: .* runs only at step"):
        analyzed()
    analyzed(verify=False)
