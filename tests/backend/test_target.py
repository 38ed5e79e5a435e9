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


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_slice_of_a_loss_has_its_logits_in_float32(reduction: str, weighted: bool) -> None:
    """The softmax of a slice and its gradient are one kernel, which takes and gives bfloat16: the last slice's too."""
    tokens, features, vocabulary, rows = 8192, 64, 32000, 4096
    weights = torch.rand(vocabulary) if weighted else None

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(features, vocabulary, bias=False, dtype=torch.bfloat16)

        def forward(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            logits = self.head(nn.functional.layer_norm(hidden, [features])).float()
            shifted = nn.functional.pad(target, (0, 1), value=-100)[..., 1:]  # as transformers does it
            return nn.functional.cross_entropy(
                logits.view(-1, vocabulary), shifted.reshape(-1), weight=weights, reduction=reduction
            )

    hidden = torch.randn(4, tokens // 4, features, dtype=torch.bfloat16, requires_grad=True)
    batch = (hidden, torch.randint(0, vocabulary, (4, tokens // 4)))
    options = {"target": "h100", "loss_chunk": rows * vocabulary * 2}
    forward = memplan.analyze(Loss(), batch, options=options)[0].plan
    sizes = [forward.program.nbytes(n) for n in forward.lifetimes if forward.program.buffers[n].dtype is torch.float32]
    assert sizes
    assert max(sizes) < rows * vocabulary * 4


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
