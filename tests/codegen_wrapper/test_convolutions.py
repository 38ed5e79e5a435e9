"""Convolutions of a GPU that write into planned buffers, and their scratch in plans (a GPU that is not there)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import memplan
import memplan.compilation
from memplan import convolutions
from memplan.convolutions import BACKWARD, FORWARD, OUT, Facts
from memplan.ir.config import Config
from memplan.ir.plan import InPool
from memplan.ir.program import Contract, Extern
from memplan.passes.reserved import step_memory
from memplan.runtime import cuda_launch
from memplan.runtime.convolution import allows_tf32, convolution_out, cudnn_flags
from tests.fake_gpu import make_fake_gpu

SCRATCH = 3 << 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.last = nn.Conv1d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))).flatten(2)).sigmoid().mean()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every convolution is cuDNN's; run without cuDNN, they come from the CPU."""
    make_fake_gpu(monkeypatch)

    def facts(op: Extern, config: Config) -> Facts:
        return Facts(convolutions.CUDNN, SCRATCH, op.target == FORWARD)

    monkeypatch.setattr(convolutions, "facts_of", facts)
    with torch.backends.cudnn.flags(enabled=False):
        yield
    monkeypatch.undo()
    cuda_launch.native_launch.cache_clear()


def externs(plan: memplan.ir.plan.Plan) -> list[Extern]:
    return [op for op in plan.program.operations if isinstance(op, Extern) and "convolution" in op.target]


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_results_in_pools_and_scratch_in_the_plan(fake: None, wrapper: str) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 16, 16)
    model(x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="memplan", options={"wrapper": wrapper, "pools": "always", "poison": True})
    with memplan.record() as recording:
        loss = compiled(x)
        loss.backward()
    torch.testing.assert_close(loss, model(x))
    for p, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted)

    forward, backward = recording.plans
    calls = externs(forward)
    assert [(op.target, op.contract) for op in calls] == [(OUT, Contract.OUT)] * 3
    places = [forward.placements[forward.storage_of(op.results[0].buffer)] for op in calls if op.results[0]]
    assert any(isinstance(p, InPool) for p in places)
    assert {op.target for op in externs(backward)} == {BACKWARD}
    for plan in recording.plans:
        steps = [k for k, name in enumerate(plan.order) if plan.program.by_name[name] in externs(plan)]
        assert all(plan.timeline[k] >= SCRATCH for k in steps)
    operations = tuple(replace(op, scratch=0) if isinstance(op, Extern) else op for op in forward.program.operations)
    bare = replace(forward, program=forward.program.with_operations(operations))
    assert step_memory([forward]).live - step_memory([bare]).live > SCRATCH // 2


def test_unknown_scratch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    make_fake_gpu(monkeypatch)
    with memplan.record() as recording, torch.no_grad():
        torch.compile(nn.Conv2d(3, 4, 3), backend="memplan")(torch.randn(1, 3, 8, 8))
    (plan,) = recording.plans
    (call,) = externs(plan)
    assert (call.target, call.contract, call.scratch) == (FORWARD, Contract.FRESH, 0)
    assert any("not counted" in note for name, note in plan.notes if name == call.name)


def test_it_can_be_switched_off(fake: None) -> None:
    options = {"disable": ["convolutions"]}
    with memplan.record() as recording, torch.no_grad():
        torch.compile(nn.Conv2d(3, 4, 3), backend="memplan", options=options)(torch.randn(1, 3, 8, 8))
    (call,) = externs(recording.plans[0])
    assert (call.target, call.scratch) == (FORWARD, 0)


def test_facts_are_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    config, facts = Config(cache_dir=str(tmp_path)), Facts("Cudnn", 512, True)
    convolutions._keep("device", "about", facts, config)
    assert convolutions._stored("device", "about", config) == facts
    assert convolutions._stored("device", "another", config) is None
    monkeypatch.setattr(torch.version, "cuda", "another")
    assert convolutions._stored("device", "about", config) is None


def test_flags_are_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []

    def record(*args: object, out: Tensor) -> Tensor:
        seen.append(args[2:])
        return out

    monkeypatch.setattr(torch.ops.aten.cudnn_convolution, "out", record)
    x, w, out = torch.randn(1, 2, 5), torch.randn(3, 2, 3), torch.zeros(1, 3, 3)
    call = (x, w, None, [1], [0], [1], False, [0], 1)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=False):
        convolution_out(*call, out=out)
        assert not allows_tf32()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
        convolution_out(*call, out=out)
        assert cudnn_flags() == (False, False, True)
    geometry = ((0, 0), (1, 1), (1, 1), 1)
    assert seen == [(*geometry, True, True, False), (*geometry, False, False, True)]


@pytest.mark.parametrize("bias", [True, False])
def test_without_cudnn_the_answer_is_eagers(bias: bool) -> None:
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    b = torch.randn(4) if bias else None
    out = torch.empty(2, 4, 6, 6)
    with torch.backends.cudnn.flags(enabled=False):
        convolution_out(x, w, b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, out=out)
    assert torch.equal(out, torch.nn.functional.conv2d(x, w, b))
