"""What is made free before a step, on a device that is made up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import sympy
import torch

from memplan.ir.plan import Room, Segment
from memplan.ir.program import Program
from memplan.passes.schedule import make_plan
from memplan.runtime import reserve
from tests.programs import ProgramBuilder

MIB = 2**20
GPU = torch.device("cuda:0")


@dataclass
class FakeGpu:
    """An allocator's segments, each a list of blocks (bytes, whether something is in it), and the requests it got."""

    segments: list[list[tuple[int, bool]]] = field(default_factory=list)
    stream: int = 0
    pool: tuple[int, int] = (0, 0)
    emptied: int = 0
    walked: int = 0
    left: int = 2**40
    capturing: bool = False
    fails: bool = False
    asked: list[int] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def empty(self, nbytes: int, **_: object) -> object:
        if self.fails:
            raise torch.OutOfMemoryError("no")
        self.asked.append(nbytes)
        self.segments.append([(nbytes, False)])
        return object()

    def empty_cache(self) -> None:
        self.emptied += 1
        self.segments = [blocks for blocks in self.segments if any(live for _, live in blocks)]

    def stats(self, device: torch.device) -> dict[str, dict[str, dict[str, int]]]:
        assert device == GPU
        blocks = [(size, live, len(segment) > 1) for segment in self.segments for size, live in segment]
        counts = {
            "reserved_bytes": sum(size for size, _, _ in blocks),
            "allocated_bytes": sum(size for size, live, _ in blocks if live),
            "inactive_split_bytes": sum(size for size, live, parts in blocks if parts and not live),
        }
        # what is small lies in segments of its own and changes all the time
        small = next(self.numbers)
        return {k: {"large_pool": {"current": v}, "all": {"current": v + small}} for k, v in counts.items()}

    def snapshot(self) -> list[dict[str, object]]:
        self.walked += 1
        return [
            {
                "address": k << 40, "device": 0, "stream": self.stream, "segment_type": "large",
                "segment_pool_id": self.pool,
                "blocks": [{"size": n, "state": "active_allocated" if live else "inactive"} for n, live in blocks],
            }
            for k, blocks in enumerate(self.segments)
        ]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(reserve, "_native_allocator", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", fake.stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (fake.left, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", fake.snapshot)
    monkeypatch.setattr(torch.cuda, "empty_cache", fake.empty_cache)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch, "empty", fake.empty)
    monkeypatch.setattr(reserve, "_enough", {})
    return fake


def test_what_is_lacking_is_asked_for_once(gpu: FakeGpu) -> None:
    gpu.segments = [[(20 * MIB, True), (10 * MIB, False)]]
    reserve.make_free(GPU, 101 * MIB)
    assert gpu.asked == [90 * MIB]  # 91 are lacking; whole multiples of 2 MiB
    reserve.make_free(GPU, 100 * MIB)
    assert gpu.asked == [90 * MIB]


def test_gaps_are_no_room(gpu: FakeGpu) -> None:
    gpu.segments = [[(12 * MIB, True), (8 * MIB, False)] for _ in range(80)]
    reserve.make_free(GPU, 512 * MIB)
    assert gpu.asked == []  # a 64th of it each: room for its small requests
    reserve.make_free(GPU, 640 * MIB)
    assert gpu.asked == [640 * MIB]


@pytest.mark.parametrize("elsewhere", [{"stream": 7}, {"pool": (0, 1)}])
def test_what_others_have_free_is_no_room(gpu: FakeGpu, elsewhere: dict[str, object]) -> None:
    gpu.segments = [[(200 * MIB, False), (2 * MIB, True)]]
    for name, value in elsewhere.items():
        setattr(gpu, name, value)
    reserve.make_free(GPU, 100 * MIB)
    assert gpu.asked == [100 * MIB]


def test_blocks_are_walked_through_once_for_each_state_of_a_loop(gpu: FakeGpu) -> None:
    gpu.segments = [[(2 * MIB, True), (200 * MIB, False)]]
    for _ in range(5):
        reserve.make_free(GPU, 100 * MIB)
        gpu.segments[0] = [(90 * MIB, True), (112 * MIB, False)]  # gradients are kept
        reserve.make_free(GPU, 100 * MIB)
        gpu.segments[0] = [(2 * MIB, True), (200 * MIB, False)]
    assert gpu.walked == 2
    assert gpu.asked == []


def test_before_the_first_step_what_lies_about_goes_back_to_the_device(gpu: FakeGpu) -> None:
    gpu.segments = [[(20 * MIB, False)] for _ in range(5)] + [[(14 * MIB, True), (6 * MIB, False)]]
    reserve.make_free(GPU, 400 * MIB, first=True)
    assert gpu.asked == [400 * MIB]
    assert [len(blocks) for blocks in gpu.segments] == [2, 1]
    reserve.make_free(GPU, 400 * MIB, first=True)
    assert gpu.emptied == 1


def test_segments_that_have_become_useless_go_back_before_more_is_asked_for(gpu: FakeGpu) -> None:
    """After the first step an optimiser's states lie in the one piece; what was cached beside it adds to the next."""
    gpu.segments = [[(300 * MIB, True), (100 * MIB, False)], *([(20 * MIB, False)] for _ in range(5))]
    assert reserve.make_free(GPU, 400 * MIB)
    assert gpu.asked == [300 * MIB]
    assert [len(blocks) for blocks in gpu.segments] == [2, 1]
    assert not reserve.make_free(GPU, 400 * MIB)
    assert gpu.emptied == 1


def test_a_loop_that_takes_ever_more_room_does_not_wait_for_the_device_in_every_step(gpu: FakeGpu) -> None:
    program, s = _program()
    plan = replace(make_plan(program, ("y",), in_place={}), reserve={"cuda:0": 2 * MIB * s})
    run = reserve.reserving(lambda args: args[0], reserve.reserves_of(plan))
    for step in range(1, 20):
        run([50, None])
        gpu.segments = [[(100 * MIB * step, True)]]
    assert len(gpu.asked) == 19
    assert gpu.emptied == reserve._MOST_GIVEN_BACK


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


def _found(nbytes: int, give_back: bool, asked: list[int]) -> reserve.FindRoom:
    def find(requests: Sequence[tuple[int, int]], segments: Sequence[Segment]) -> Room:
        assert requests == ((0, 5 * MIB), (0, -1))
        asked.append(sum(s.nbytes for s in segments))
        return Room(nbytes, give_back, 0)

    return find


def test_room_for_a_later_step_is_found_in_each_new_state(gpu: FakeGpu) -> None:
    """The first step has the plan's reserve; nothing is found again in a state that a loop comes back to."""
    asked: list[int] = []
    wanted = (reserve.Reserve("cuda:0", 100 * MIB, requests=((0, 5 * MIB), (0, -1))),)
    run = reserve.reserving(lambda args: args[0], wanted, _found(30 * MIB, True, asked))
    run([1])
    assert (gpu.asked, asked, gpu.emptied) == ([100 * MIB], [], 1)
    for _ in range(3):
        gpu.segments = [[(90 * MIB, True), (10 * MIB, False)], [(20 * MIB, False)]]
        run([1])
        gpu.segments = [[(90 * MIB, True), (10 * MIB, False)], [(30 * MIB, False)]]
        run([1])
    assert asked == [120 * MIB] * 3  # what was made free was thrown away each time, which no loop does
    assert gpu.asked[1:] == [30 * MIB] * 3
    assert gpu.emptied == 4


def test_steps_without_a_reserve_find_room_too(gpu: FakeGpu) -> None:
    asked: list[int] = []
    wanted = (reserve.Reserve("cuda:0", 0, requests=((0, 5 * MIB), (0, -1))),)
    run = reserve.reserving(lambda args: args[0], wanted, _found(0, False, asked))
    run([1])
    assert (gpu.asked, asked) == ([], [])
    gpu.segments = [[(90 * MIB, True), (10 * MIB, False)]]
    for _ in range(3):
        run([1])
    assert (gpu.asked, asked, gpu.emptied) == ([], [100 * MIB], 0)


def test_a_loop_without_a_steady_state_stops_looking(gpu: FakeGpu) -> None:
    asked: list[int] = []
    wanted = (reserve.Reserve("cuda:0", 0, requests=((0, 5 * MIB), (0, -1))),)
    run = reserve.reserving(lambda args: args[0], wanted, _found(0, True, asked))
    for step in range(1, 40):
        gpu.segments = [[(100 * MIB * step, True)]]
        run([1])
    assert len(asked) == gpu.emptied == reserve._MOST_GIVEN_BACK


def test_a_loop_in_which_no_state_comes_back_stops_simulating(gpu: FakeGpu) -> None:
    asked: list[int] = []
    wanted = (reserve.Reserve("cuda:0", 0, requests=((0, 5 * MIB), (0, -1))),)
    run = reserve.reserving(lambda args: args[0], wanted, _found(0, False, asked))
    for step in range(1, 80):
        gpu.segments = [[(100 * MIB * step, True)]]
        run([1])
    assert len(asked) == reserve._MOST_SIMULATED
    assert gpu.emptied == 0
