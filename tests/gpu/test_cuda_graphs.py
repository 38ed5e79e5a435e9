"""CUDA graphs against eager, on a GPU: training, accumulation, changing buffers, results that are kept, fallbacks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.models.against_eager import compare_modules
from tests.tolerances import assert_near

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
OPTIONS = {"cuda_graphs": True}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 64))
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.body(x))
        return out


def pair() -> tuple[nn.Module, nn.Module, nn.Module]:
    """(eager, the compiled copy's module, compiled)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Net().cuda()
    ours = copy.deepcopy(eager)
    return eager, ours, torch.compile(ours, backend="memplan", options=OPTIONS)  # type: ignore[return-value]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_steps(accumulate: int) -> None:
    eager, ours, compiled = pair()
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (eager, ours)]
    for step in range(6):
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        for _ in range(accumulate):
            x = torch.randn(16, 64, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            actual, expected = compiled(x), eager(x)
            assert_near(actual, expected, f"result of step {step}")
            actual.square().mean().backward()
            expected.square().mean().backward()
        compare_modules(ours, eager)
        for optimiser in optimisers:
            optimiser.step()


def test_inference_replays_graphs() -> None:
    eager, ours, compiled = pair()
    eager.eval(), ours.eval()
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(16, 64, device="cuda")
            assert_near(compiled(x).clone(), eager(x), "result")
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(0, create_if_none_exists=False)
    assert manager is not None
    assert manager.new_graph_id().id > 0, "nothing was recorded"


def test_inputs_of_another_address_each_time() -> None:
    eager, ours, compiled = pair()
    eager.eval(), ours.eval()
    inputs = [torch.randn(16, 64, device="cuda") for _ in range(4)]
    store = torch.randn(16 * 64 + 1, device="cuda")
    inputs.append(store[1:].view(16, 64))  # at 4 bytes after a multiple of 16
    with torch.no_grad():
        for x in inputs:
            assert_near(compiled(x).clone(), eager(x), "result")


def test_a_changed_input_is_not_recorded_and_right() -> None:
    def step(x: Tensor, total: Tensor) -> Tensor:
        total.add_(x)
        return total * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="memplan", options=OPTIONS)
    x, ours = torch.randn(64, device="cuda"), torch.zeros(64, device="cuda")
    theirs = ours.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            assert_near(compiled(x, ours), step(x, theirs), "result")
            assert_near(ours, theirs, "input")
    told = [str(w.message) for w in caught if "without CUDA graphs" in str(w.message)]
    assert len(told) == 1
    assert "changes its input" in told[0]


def test_retain_graph() -> None:
    eager, ours, compiled = pair()
    for _ in range(4):
        x = torch.randn(16, 64, device="cuda")
        for module, call in ((eager, eager), (ours, compiled)):
            module.zero_grad(set_to_none=True)
            loss = call(x).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
        compare_modules(ours, eager)
