"""Plans for a GPU that is not here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import memplan
from memplan.ir.config import TARGETS, Config
from memplan.ir.device import DEFAULTS
from memplan.ir.errors import OptionError, UnsupportedError


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))


@pytest.mark.parametrize("target", ["h100", "A100"])
def test_a_model_on_the_cpu_is_planned_for_a_gpu(target: str) -> None:
    graphs = memplan.analyze(model(), (torch.randn(512, 64),), options={"target": target})
    assert [g.plan.program.phase.value for g in graphs] == ["forward", "backward"]
    for graph in graphs:
        program = graph.plan.program
        assert {op.device for op in program.operations} == {"cuda:0"}
        assert {b.device for n, b in program.buffers.items() if n not in program.constants} == {"cuda:0"}
    assert graphs[0].plan.step  # what a GPU's allocator would reserve, which a plan for the CPU does not say


def test_a_budget_is_kept_on_a_gpu_that_is_not_here() -> None:
    (graph,) = memplan.analyze(
        model(), (torch.randn(512, 64),), backward=False, options={"target": "h100", "budget": "64MiB"}
    )
    assert {op.device for op in graph.plan.program.operations} == {"cuda:0"}


def test_nothing_is_built_for_it() -> None:
    compiled = torch.compile(model(), backend="memplan", options={"target": "h100"})
    with pytest.raises(BackendCompilerFailed, match=r"UnsupportedError: .*memplan\.analyze"):
        compiled(torch.randn(4, 64))
    exported = torch.export.export(model(), (torch.randn(4, 64),))
    with pytest.raises(UnsupportedError, match=r"memplan\.analyze"):
        memplan.save(exported, "/nonexistent/model.memplan", options={"target": "h100"})


def test_names() -> None:
    assert set(TARGETS) == set(DEFAULTS) - {"cpu"}
    assert Config.from_options({"target": "h200"}).target == "H200"
    with pytest.raises(OptionError, match=r"H100, H200, A100, not 'H10'.*did you mean 'H100'"):
        Config.from_options({"target": "h10"})
