"""What calls on a CPU take beside their results: counted before the run, as the allocator then sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import memplan
from memplan import call_scratch
from memplan.call_scratch import count_scratch, decides, scratch_of
from memplan.ir.config import Config
from memplan.ir.program import Extern
from memplan.plan_cache import find_entry
from memplan.reports.build import report_of
from memplan.reports.model import StepRecord


class Net(nn.Module):
    """Convolutions whose operands oneDNN reorders: the first from a plain layout, the last depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.last = nn.Conv2d(32, 32, 5, padding=2, groups=32)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x))))).sigmoid().mean()


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    call_scratch._known.clear()
    yield
    call_scratch._known.clear()


def peak_of(step: Callable[[], object]) -> int:
    """Largest sum of what the CPU's allocator gives and takes within a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        live += e.nbytes()
        peak = max(peak, live)
    return peak


def externs(recording: memplan.Recording, part: str) -> list[Extern]:
    return [op for p in recording.plans for op in p.program.operations if isinstance(op, Extern) and part in op.target]


def predicted(recording: memplan.Recording) -> int:
    joins = tuple(dict.fromkeys(pair for g in recording.graphs for pair in g.joins))
    report = report_of([StepRecord(tuple(g.plan for g in recording.graphs), joins=joins)])
    return max(report.predicted.values())


@pytest.mark.parametrize("training", [True, False])
def test_predicted_peak_of_convolutions(training: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 48, 48)
    compiled = torch.compile(model, backend="memplan")

    def step() -> None:
        if not training:
            with torch.no_grad():
                compiled(x)
            return
        compiled(x).backward()
        model.zero_grad()

    with memplan.record() as recording:
        step()
    step()
    calls = externs(recording, "convolution")
    assert len(calls) == (6 if training else 3)
    assert all(op.scratch > 0 for op in calls[:2])  # copies in a blocked layout
    measured = peak_of(step)
    assert abs(predicted(recording) - measured) <= 0.01 * measured


def test_scratch_of_products_of_halves() -> None:
    a, b = torch.randn(96, 64, dtype=torch.bfloat16), torch.randn(64, 80, dtype=torch.bfloat16)
    compiled = torch.compile(lambda a, b: a @ b, backend="memplan")
    with memplan.record() as recording:
        compiled(a, b)
    (call,) = externs(recording, ".mm.")
    out = torch.empty(96, 80, dtype=torch.bfloat16)
    torch.mm(a, b, out=out)
    assert call.scratch == peak_of(lambda: torch.mm(a, b, out=out))


def test_scratch_of_attention() -> None:
    q = torch.randn(2, 4, 96, 32, requires_grad=True)
    attention = nn.functional.scaled_dot_product_attention
    compiled = torch.compile(lambda q: attention(q, q, q).sum(), backend="memplan")
    with memplan.record() as recording:
        compiled(q).backward()
    forward, backward = externs(recording, "attention")
    results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q.detach(), q.detach(), q.detach())
    made = sum(r.untyped_storage().nbytes() for r in results)
    call = lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q.detach(), q.detach(), q.detach())  # noqa: E731
    assert forward.scratch == peak_of(call) - made > 0
    assert backward.scratch >= 0


def test_a_users_profiler_sees_nothing_of_it() -> None:
    x = torch.randn(4, 3, 48, 48)
    compiled = torch.compile(nn.Conv2d(3, 32, 3), backend="memplan", options={"plan_cache": False})
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        compiled(x)
    names = [e.name() for e in seen.profiler.kineto_results.events()]
    assert names.count("aten::mkldnn_convolution") == 1


def program_of(options: dict[str, object] | None = None) -> tuple[memplan.ir.program.Program, Extern]:
    options = {"disable": ["scratch"], **(options or {})}
    with memplan.record() as recording, torch.no_grad():
        torch.compile(nn.Conv2d(3, 32, 3), backend="memplan", options=options)(torch.randn(2, 3, 20, 20))
    torch._dynamo.reset()
    (call,) = externs(recording, "convolution")
    return recording.plans[0].program, call


def test_it_can_be_switched_off() -> None:
    assert program_of()[1].scratch == 0


def test_what_is_not_measured_is_said() -> None:
    graphs = memplan.analyze(Net(), (torch.randn(1, 3, 19, 23),), backward=False, options={"plan_cache": False})
    notes = [text for _, text in graphs[0].plan.notes if "not counted" in text]
    assert len(notes) == 3
    with memplan.record() as recording, torch.no_grad():
        torch.compile(nn.Conv2d(3, 32, 3), backend="memplan", dynamic=True)(torch.randn(2, 3, 20, 20))
    (call,) = externs(recording, "convolution")
    assert call.scratch == 0
    assert any("not counted" in text for _, text in recording.plans[0].notes)


def test_no_room_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = program_of()
    monkeypatch.setattr(call_scratch, "_free_memory", lambda: 1 << 20)
    assert scratch_of(call, Config(cache_dir=None, plan_cache=False)) is None


def test_a_call_that_fails_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, call = program_of()
    x, w, *rest = call.args
    wrong = replace(call, args=(x, replace(w, sizes=(32, 4, 3, 3), strides=(36, 9, 3, 1)), *rest))  # type: ignore[type-var]
    with caplog.at_level("WARNING"):
        assert scratch_of(wrong, Config(cache_dir=str(tmp_path))) is None
    assert "cannot be measured" in caplog.text


def test_it_is_kept_and_measured_again_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = program_of()
    config = Config(cache_dir=str(tmp_path))
    found = scratch_of(call, config)
    runs: list[Extern] = []

    def measured(op: Extern, config: Config) -> int:
        runs.append(op)
        return 17

    monkeypatch.setattr(call_scratch, "_measured", measured)
    call_scratch._known.clear()
    assert scratch_of(call, config) == found
    assert not runs
    with torch.backends.mkldnn.flags(enabled=False):
        assert scratch_of(call, config) == 17
    assert len(runs) == 1
    for kept in tmp_path.rglob("*.json"):
        json.loads(kept.read_text())


def test_the_plans_key_has_what_decides_it(tmp_path: Path) -> None:
    program, call = program_of()
    config = Config(cache_dir=str(tmp_path))
    before = find_entry(program, config)
    with torch.backends.mkldnn.flags(enabled=False):
        other = find_entry(program, config)
    again = find_entry(program, config)
    assert before is not None
    assert other is not None
    assert again is not None
    assert before.key == again.key != other.key
    assert decides(program)
    assert not decides(program.with_operations(()))
    counted = count_scratch(program, config, lambda op, config: 4096)
    assert next(op for op in counted.operations if op.name == call.name).scratch == 4096  # type: ignore[union-attr]
