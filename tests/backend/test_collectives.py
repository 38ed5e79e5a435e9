"""Programs with collectives: their buffers are allocations of their own, neither reused in place nor put in a pool."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

import memplan
from memplan.ir.plan import InPlaceOf
from tests.tolerances import assert_near


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reduced(x: Tensor, w: Tensor) -> Tensor:
    h = torch.relu(x @ w)
    out = collectives.all_reduce(h, "sum", dist.group.WORLD)
    later = (x * 2).exp() @ w  # could be written where the collective still reads
    return torch.softmax(out + later, -1) @ w.t()


def test_buffers_of_collectives_are_not_shared(group) -> None:
    torch._dynamo.reset()
    x, w = torch.randn(64, 32), torch.randn(32, 48)
    with memplan.record() as recording, torch.no_grad():
        found = torch.compile(reduced, backend="memplan")(x, w)
    assert_near(found, reduced(x, w), "result")
    plans = [g.plan for g in recording.graphs]
    assert plans
    for plan in plans:
        assert any("all_reduce" in op.name for op in plan.program.operations)
        assert not plan.pools
        assert not any(isinstance(p, InPlaceOf) for p in plan.placements.values())
