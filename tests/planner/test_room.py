"""What is made free before a step whose allocator is in a state that no plan knew of."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import memplan
from memplan.ir.plan import RESERVE_STEP, Room, Segment
from memplan.passes.allocator import MIB, CachingAllocator
from memplan.passes.allocator_replay import FREE
from memplan.passes.room import MOST_TRIED, _sizes, best_room
from tests.models.blocks import FeedForward

Requests = list[tuple[int, int]]
LLAMA = Path(__file__).parents[1] / "data" / "room" / "llama_states.json.gz"


def after(segments: Sequence[Segment], requests: Requests, room: Room) -> int:
    """Reserved bytes after the step, when what the room says has been done."""
    allocator = CachingAllocator.from_segments(segments)
    if room.give_back:
        allocator.empty_cache()
    if room.nbytes:
        allocator.free(allocator.alloc(room.nbytes))
    live: dict[int, int] = {}
    for key, size in requests:
        if size == FREE:
            allocator.free(live.pop(key))
        else:
            live[key] = allocator.alloc(size)
    return allocator.stats.reserved


def test_an_optimisers_states_across_the_first_steps_piece() -> None:
    """An H200's allocator before the second step of Llama with AdamW (torch 2.11), and that step's requests."""
    data = json.loads(gzip.decompress(LLAMA.read_bytes()))
    segments = [Segment(at, tuple((size, bool(live)) for size, live in blocks)) for at, blocks in data["segments"]]
    requests = [(key, size) for key, size in data["requests"]]
    found = best_room(requests, segments)
    assert found.reserved == after(segments, requests, found) == 11549016064
    assert after(segments, requests, Room(0, False, 0)) == 12270436352
    # what is lacking in sum, in one piece: a slab of 604 MB is left over, as on the device
    assert after(segments, requests, Room(3485466624, True, 0)) == 11970543616


def test_nothing_is_done_where_nothing_is_lacking() -> None:
    segments = [Segment(1 << 30, ((100 * MIB, True), (60 * MIB, False))), Segment(1 << 33, ((40 * MIB, False),))]
    requests = [(0, 50 * MIB), (1, 30 * MIB), (0, FREE), (2, 40 * MIB), (1, FREE), (2, FREE)]
    assert best_room(requests, segments) == Room(0, False, 200 * MIB)


def test_small_segments_are_joined_for_what_fits_into_none_of_them() -> None:
    segments = [Segment(k << 40, ((20 * MIB, False),)) for k in range(10)]
    requests = [(0, 150 * MIB), (1, 40 * MIB), (0, FREE), (1, FREE)]
    found = best_room(requests, segments)
    assert found.give_back
    assert found.reserved == after(segments, requests, found) == 190 * MIB
    assert after(segments, requests, Room(0, False, 0)) == 390 * MIB


SIZES = st.integers(MIB // 512 + 1, 30 * MIB // 512).map(lambda k: k * 512)
STEPS = st.lists(st.tuples(SIZES, st.integers(0, 20)), min_size=1, max_size=25)


def drawn(steps: list[tuple[int, int]], first: int = 0) -> Requests:
    """Allocations, each with the free of an earlier one, and of all that is left at the end."""
    live: list[int] = []
    out: Requests = []
    for k, (size, which) in enumerate(steps, first):
        if which < len(live):
            out.append((live.pop(which), FREE))
        out.append((k, size))
        live.append(k)
    return out + [(k, FREE) for k in live]


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sets(st.integers(0, 24)), STEPS)
def test_never_worse_than_nothing_and_as_said(
    before: list[tuple[int, int]], kept: set[int], step: list[tuple[int, int]]
) -> None:
    allocator, live = CachingAllocator(), {}
    for key, size in drawn(before):
        if size != FREE:
            live[key] = allocator.alloc(size)
        elif key not in kept:
            allocator.free(live.pop(key))
    segments, requests = allocator.segments(), drawn(step)
    assert sum(s.nbytes for s in segments) == allocator.stats.reserved
    found = best_room(requests, segments)
    assert found.reserved == after(segments, requests, found) <= after(segments, requests, Room(0, False, 0))
    assert found.nbytes % RESERVE_STEP == 0
    assert len(_sizes(segments, requests, sum(size for _, size in requests if size > 0))) <= MOST_TRIED + 2


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(0, 60), STEPS)
def test_segments_are_the_whole_state(steps: list[tuple[int, int]], stop: int, more: list[tuple[int, int]]) -> None:
    """An allocator made from another's segments goes on as that one does."""
    allocator, live = CachingAllocator(), {}
    for key, size in drawn(steps)[:stop]:
        if size == FREE:
            allocator.free(live.pop(key))
        else:
            live[key] = allocator.alloc(size)
    copy = CachingAllocator.from_segments(allocator.segments())
    assert copy.segments() == allocator.segments()
    assert copy.stats.reserved == allocator.stats.reserved
    assert copy.stats.allocated == allocator.stats.allocated
    handles: dict[int, tuple[int, int]] = {}
    for key, size in drawn(more, 1000):
        if size == FREE:
            for one, handle in zip((allocator, copy), handles.pop(key), strict=True):
                one.free(handle)
        else:
            handles[key] = (allocator.alloc(size), copy.alloc(size))
        assert copy.stats.reserved == allocator.stats.reserved
    for one in (allocator, copy):
        one.empty_cache()
    assert copy.stats.reserved == allocator.stats.reserved


@pytest.mark.parametrize(("rows", "backward", "known"), [(4096, True, True), (4, True, False), (4096, False, False)])
def test_plans_of_training_steps_worth_a_reserve_say_their_large_requests(
    rows: int, backward: bool, known: bool
) -> None:
    with FakeTensorMode():
        graphs = memplan.analyze(
            FeedForward(512), (torch.empty(rows, 512, requires_grad=True),), backward=backward,
            options={"target": "h100", "plan_cache": False},
        )  # fmt: skip
    requests = graphs[0].plan.requests.get("cuda:0", ())
    assert bool(requests) == known
    assert not any(g.plan.requests for g in graphs[1:])
    live: dict[int, int] = {}
    for key, size in requests:
        if size == FREE:
            live.pop(key)
        else:
            assert key not in live
            assert size > MIB
            live[key] = size
    assert not live
