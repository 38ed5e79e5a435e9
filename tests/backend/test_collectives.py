"""Programs with collectives in a group of one: what is in flight keeps its place until the wait."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

import memplan
from memplan.ir.in_flight import Collective, Wait
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


def test_a_buffer_in_flight_lives_until_the_wait(group) -> None:
    torch._dynamo.reset()
    x, w = torch.randn(64, 32), torch.randn(32, 48)
    with memplan.record() as recording, torch.no_grad():
        found = torch.compile(reduced, backend="memplan")(x, w)
    assert_near(found, reduced(x, w), "result")
    (graph,) = recording.graphs
    program = graph.plan.program
    started = next(op for op in program.operations if isinstance(op, Collective))
    waited = next(op for op in program.operations if isinstance(op, Wait))
    assert started.target == "_c10d_functional.all_reduce_.default"  # in place: nothing reads the value before
    steps = {name: k for k, name in enumerate(graph.plan.order)}
    for name in started.in_flight_results:
        life = graph.plan.lifetimes[name]
        assert life.start <= steps[started.name] < steps[waited.name] < life.stop
