"""The simulator of the CUDA caching allocator: its rules one by one, invariants, and recorded traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.errors import PlanningError
from memplan.passes.allocator import MIB, AllocatorEvent, AllocatorRules, CachingAllocator, replay

TRACES = sorted((Path(__file__).parents[1] / "data" / "allocator").glob("*.json.gz"))


def test_requests_are_rounded_and_small_ones_share_a_segment():
    allocator = CachingAllocator()
    for size in (1, 512, 513):
        allocator.alloc(size)
    assert (allocator.stats.allocated, allocator.stats.requested) == (512 + 512 + 1024, 1026)
    assert allocator.stats.reserved == 2 * MIB
    allocator.alloc(MIB)
    allocator.alloc(MIB)
    assert allocator.stats.reserved == 4 * MIB


@pytest.mark.parametrize(
    ("size", "reserved"),
    [(MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)],
)
def test_segments_by_size(size, reserved):
    allocator = CachingAllocator()
    allocator.alloc(size)
    assert allocator.stats.reserved == reserved


def test_large_blocks_keep_remainders_of_at_most_one_mebibyte():
    allocator = CachingAllocator()
    allocator.alloc(11 * MIB)
    assert allocator.stats.allocated == 12 * MIB
    other = CachingAllocator()
    other.alloc(11 * MIB - 512)
    assert other.stats.allocated == 11 * MIB - 512


def test_the_smallest_block_that_fits_is_taken_and_neighbours_merge():
    allocator = CachingAllocator()
    handles = [allocator.alloc(size * MIB) for size in (4, 2, 6, 2)]
    allocator.free(handles[0])
    allocator.free(handles[2])
    allocator.alloc(4 * MIB)  # into the hole of 4, leaving that of 6
    sixth = allocator.alloc(6 * MIB)
    assert allocator.stats.reserved == 20 * MIB
    allocator.free(sixth)
    allocator.free(handles[1])  # 2 + 6 merge
    allocator.alloc(8 * MIB)
    assert allocator.stats.reserved == 20 * MIB


def test_cached_segments_go_back_only_when_memory_is_short():
    allocator = CachingAllocator(device_bytes=50 * MIB)
    allocator.free(allocator.alloc(30 * MIB))
    assert allocator.stats.reserved == 30 * MIB
    allocator.alloc(40 * MIB)
    assert allocator.stats.reserved == 40 * MIB
    with pytest.raises(PlanningError, match="out of memory"):
        allocator.alloc(20 * MIB)


def test_streams_do_not_share_blocks():
    allocator = CachingAllocator()
    allocator.free(allocator.alloc(12 * MIB))
    allocator.alloc(12 * MIB, stream=1)
    assert allocator.stats.reserved == 24 * MIB


def test_expandable_segments_grow_at_the_end():
    allocator = CachingAllocator(AllocatorRules(expandable=True))
    first = allocator.alloc(15 * MIB)
    allocator.alloc(15 * MIB)
    assert allocator.stats.reserved == 40 * MIB
    allocator.free(first)
    allocator.alloc(25 * MIB)  # 10 free at the end, 15 more mapped in one page of 20
    assert allocator.stats.reserved == 60 * MIB
    allocator.alloc(15 * MIB)
    assert allocator.stats.reserved == 60 * MIB


def test_expandable_segments_give_pages_back():
    allocator = CachingAllocator(AllocatorRules(expandable=True), device_bytes=100 * MIB)
    kept, freed = allocator.alloc(15 * MIB), allocator.alloc(60 * MIB)
    assert allocator.stats.reserved == 80 * MIB
    allocator.free(freed)
    allocator.empty_cache()
    assert allocator.stats.reserved == 20 * MIB
    allocator.alloc(70 * MIB)
    assert allocator.stats.reserved == 100 * MIB
    allocator.free(kept)


def test_wrong_use_is_refused():
    allocator = CachingAllocator()
    with pytest.raises(PlanningError, match="negative"):
        allocator.alloc(-1)
    with pytest.raises(PlanningError, match="no allocation"):
        allocator.free(5)
    with pytest.raises(PlanningError, match="not live"):
        replay((AllocatorEvent(0, None),), allocator)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40 * MIB), st.integers(0, 30)), max_size=60),
    st.booleans(),
)
def test_counts_stay_consistent(steps, expandable):
    rules = AllocatorRules(expandable=expandable)
    allocator = CachingAllocator(rules)
    held: list[tuple[int, int]] = []
    for size, which in steps:
        if held and which < len(held):
            allocator.free(held.pop(which)[0])
        held.append((allocator.alloc(size), size))
        now = allocator.stats
        assert now.requested == sum(size for _, size in held)
        assert sum(rules.rounded(size) for _, size in held if size) <= now.allocated <= now.reserved
        assert now.peak_reserved >= now.reserved
    for handle, _ in held:
        allocator.free(handle)
    assert allocator.stats.allocated == allocator.stats.requested == 0
    allocator.empty_cache()
    assert allocator.stats.reserved == 0


@pytest.mark.skipif(not TRACES, reason="no recorded traces in tests/data/allocator (record them on a GPU machine)")
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name.partition(".")[0])
def test_recorded_traces_are_reproduced(path):
    data = json.loads(gzip.decompress(path.read_bytes()))
    rules = AllocatorRules(expandable=data["expandable"])
    allocator = CachingAllocator(rules, addresses=data.get("segments", ()))
    handles: dict[int, int] = {}
    done = 0
    for count, expected in data["checks"]:
        for key, size, stream in data["events"][done:count]:
            if size is None:
                allocator.free(handles.pop(key))
            else:
                handles[key] = allocator.alloc(size, stream=stream)
        done = count
        found = {name: getattr(allocator.stats, name) for name in expected}
        assert found == expected, f"after {count} events"
