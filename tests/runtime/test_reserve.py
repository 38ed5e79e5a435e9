"""What is made free before a step, on a device that is made up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import sympy
import torch

from memplan.ir.program import Program
from memplan.passes.schedule import make_plan
from memplan.runtime import reserve
from tests.programs import ProgramBuilder

MIB = 2**20
GPU = torch.device("cuda:0")


@dataclass
class FakeGpu:
    """Counts of an allocator, and the requests that it was sent."""

    held: int = 0
    used: int = 0
    left: int = 2**40
    capturing: bool = False
    fails: bool = False
    asked: list[int] = field(default_factory=list)

    def empty(self, nbytes: int, **_: object) -> object:
        if self.fails:
            raise torch.OutOfMemoryError("no")
        self.asked.append(nbytes)
        return object()

    def stats(self, device: torch.device) -> dict[str, dict[str, dict[str, int]]]:
        assert device == GPU
        counts = {"reserved_bytes": self.held, "allocated_bytes": self.used}
        return {k: {"all": {"current": v}} for k, v in counts.items()}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(reserve, "_native_allocator", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", fake.stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (fake.left, 2**40))
    monkeypatch.setattr(torch, "empty", fake.empty)
    return fake


def test_what_is_lacking_is_asked_for_once(gpu: FakeGpu) -> None:
    gpu.held, gpu.used = 30 * MIB, 20 * MIB
    reserve.make_free(GPU, 101 * MIB)
    assert gpu.asked == [90 * MIB]  # 91 are lacking; whole multiples of 2 MiB
    gpu.held += 90 * MIB
    reserve.make_free(GPU, 101 * MIB)
    assert gpu.asked == [90 * MIB]


def test_not_while_a_graph_is_captured(gpu: FakeGpu) -> None:
    gpu.capturing = True
    reserve.make_free(GPU, 100 * MIB)
    assert gpu.asked == []


def test_not_where_the_device_has_too_little(gpu: FakeGpu) -> None:
    gpu.left = 50 * MIB
    reserve.make_free(GPU, 100 * MIB)
    assert gpu.asked == []
    gpu.left, gpu.fails = 2**40, True
    reserve.make_free(GPU, 100 * MIB)  # a limit that only the allocator knows: the step is tried all the same


def _program() -> tuple[Program, sympy.Symbol]:
    p = ProgramBuilder()
    s = p.symbol("s0", 3)
    x = p.input("x", (s, 4))
    return p.program(p.pointwise("y", "neg", x)), s


def test_the_call_reserves_by_its_sizes(gpu: FakeGpu) -> None:
    program, s = _program()
    plan = make_plan(program, ("y",), in_place={})

    def call(args: list[object]) -> object:
        return args[0]

    assert reserve.reserving(call, reserve.reserves_of(plan)) is call
    run = reserve.reserving(call, reserve.reserves_of(replace(plan, reserve={"cuda:0": 2 * MIB * s})))
    assert run([5, None]) == 5
    assert gpu.asked == [10 * MIB]
