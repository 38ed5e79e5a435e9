"""Packing: brute force on small problems, properties on random ones, and the public instances."""

from __future__ import annotations

import csv
import dataclasses
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import planner
from memplan.ir.errors import CacheError, CompilerError, PlanningError
from memplan.passes import pack
from memplan.passes.pack import NO_COMPILER, PackProblem, pack_buffers

from .exhaustive import least_arena, overlaps

DATA = Path(__file__).parents[1] / "data" / "planner"
buffer = st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(0, 30)).map(lambda t: (t[0], t[0] + t[1], t[2]))


def problem_of(buffers, align=1):
    lower, upper, size = (tuple(column) for column in zip(*buffers, strict=True))
    return PackProblem(lower, upper, size, align)


def read(name):
    with (DATA / f"{name}.csv").open() as stream:
        return [(int(r["lower"]), int(r["upper"]), int(r["size"])) for r in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def native():
    search = planner.planner_libraries().pack
    if search is None:
        pytest.skip(f"no C++ compiler: {planner.planner_libraries().note}")
    return search


@settings(max_examples=60, deadline=None)
@given(st.lists(buffer, min_size=1, max_size=6), st.sampled_from([1, 4]))
def test_small_problems_are_packed_optimally(native, buffers, align):
    packing = pack_buffers(problem_of(buffers, align), native=native)
    least = least_arena(buffers, align)
    assert overlaps(buffers, packing.offsets) == []
    assert packing.arena == max(o + s for o, (_, _, s) in zip(packing.offsets, buffers, strict=True))
    assert packing.lower_bound <= least <= packing.arena
    assert all(offset % align == 0 for offset in packing.offsets)
    if align == 1:
        assert packing.arena == least
        assert packing.optimal


@settings(max_examples=40, deadline=None)
@given(st.lists(buffer, min_size=1, max_size=60), st.sampled_from([1, 8, 512]))
def test_any_problem_gets_valid_offsets_with_and_without_a_compiler(native, buffers, align):
    problem = problem_of(buffers, align)
    for search in (native, None):
        packing = pack_buffers(problem, work_limit=20_000, native=search)
        assert overlaps(buffers, packing.offsets) == []
        assert all(offset >= 0 and offset % align == 0 for offset in packing.offsets)
        assert packing.max_live <= packing.lower_bound <= packing.arena
        assert packing == pack_buffers(problem, work_limit=20_000, native=search)
    assert packing.note == NO_COMPILER


def test_the_checker_sees_an_overlap():
    assert overlaps([(0, 2, 4), (1, 3, 4)], [0, 3]) == [(0, 1)]
    assert overlaps([(0, 2, 4), (1, 3, 4)], [0, 4]) == []
    assert overlaps([(0, 2, 4), (2, 3, 4)], [0, 0]) == []


@pytest.mark.parametrize(
    ("name", "capacity"),
    [(f"minimalloc-{c}", 1_048_576) for c in "ADEGIK"] + [("minimalloc-C", 1_039_360), ("minimalloc-input12", 12)],
)
def test_minimalloc_instances_fit(native, name, capacity):
    buffers = read(name)
    # Work instead of seconds, so that a busy machine does not change what is tested.
    packing = pack_buffers(problem_of(buffers), work_limit=60_000_000, capacity=capacity, native=native)
    assert overlaps(buffers, packing.offsets) == []
    assert packing.arena <= capacity


@pytest.mark.parametrize("name", ["somas-resnet50", "idealloc-G1", "somas-pangu2.6b"])
def test_training_instances_reach_the_most_alive_at_once_inside_a_compilation(native, name):
    buffers = read(name)
    packing = pack_buffers(problem_of(buffers), native=native)
    assert overlaps(buffers, packing.offsets) == []
    assert packing.arena == packing.max_live
    assert packing.optimal


@pytest.mark.parametrize(("name", "most"), [("somas-resnet50", 0.01), ("idealloc-G1", 0.0), ("minimalloc-C", 0.5)])
def test_without_a_compiler_the_heuristics_hold(name, most):
    buffers = read(name)
    packing = pack_buffers(problem_of(buffers), native=None)
    assert overlaps(buffers, packing.offsets) == []
    assert packing.gap <= most


def test_without_a_compiler_dives_go_on_to_the_time_limit():
    """A hard instance: one start after the other, for as long as there is time."""
    rows = read("minimalloc-A")
    at_once = pack_buffers(problem_of(rows), capacity=1_048_576)
    started = time.monotonic()
    found = pack_buffers(problem_of(rows), capacity=1_048_576, seconds=2.0, work_limit=10**12)
    assert 2.0 <= time.monotonic() - started < 3.0
    assert found.arena < 0.95 * at_once.arena
    assert not overlaps(rows, found.offsets)
    assert found.note == NO_COMPILER


@settings(max_examples=40, deadline=None)
@given(st.lists(buffer, min_size=1, max_size=30), st.randoms())
def test_the_dive_in_numpy_is_the_compiled_one(native, buffers, chance):
    units = pack._units(problem_of([b for b in buffers if b[2]] or [(0, 1, 1)]))
    order = np.array(chance.sample(range(len(units.size)), len(units.size)), dtype=np.int32)
    arena, offsets = pack._lowest_floor(units.lower, units.upper, units.size, order)
    expected, at = native.lowest_floor(units.lower, units.upper, units.size, order)
    assert arena == expected
    assert offsets.tolist() == at.tolist()


def test_impossible_capacities_are_proved(native):
    # Three buffers of 2 and one hole of 1 at each end of time: the most alive at once is 4, but 5 are needed.
    buffers = [(0, 2, 2), (1, 3, 2), (2, 4, 2), (0, 1, 2), (3, 4, 2)]
    packing = pack_buffers(problem_of(buffers), native=native)
    assert packing.lower_bound <= least_arena(buffers) == packing.arena
    assert packing.optimal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0,), (0,), (1,)), "is empty"),
        (((0,), (1,), (-1,)), "negative size"),
        (((0,), (1,), (2**62,)), "64-bit"),
        (((0,), (1,), (float("nan"),)), "buffer 0: whole numbers"),
        (((0,), (float("nan"),), (1,)), "buffer 0: whole numbers"),
        (((0, 1), (1,), (1,)), "one entry"),
        (((0,), (1,), (1,), 0), "alignment"),
        (((0,), (1,), (1,), 2**61), "alignment"),
    ],
)
def test_bad_problems_are_refused(arguments, message):
    with pytest.raises(PlanningError, match=message):
        PackProblem(*arguments)


@pytest.mark.parametrize("row", [(0, 1.5, 8), (0, float("nan"), 8), (0, 1), (0, 1, 8, 9), (0, 1, "8"), 7])
def test_rows_that_are_not_three_whole_numbers_are_refused(row):
    with pytest.raises(PlanningError, match="buffer 1: expected whole numbers"):
        planner.pack([(0, 1, 8), row])


def test_numbers_of_numpy_are_whole_numbers():
    assert planner.pack(np.array([[0, 2, 8], [1, 3, 4]], dtype=np.int32)).arena == 12


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_no_time_is_refused(limit):
    with pytest.raises(PlanningError, match="time_limit"):
        planner.pack([(0, 1, 8)], time_limit=limit)
    with pytest.raises(PlanningError, match="time_limit"):
        planner.order(planner.OrderGraph(1, (planner.OrderBuffer(8, 0),)), time_limit=limit)


def test_more_seconds_than_a_clock_counts_are_no_reason_to_search_without_end(native):
    """The end of the limit overflowed, so that each search stopped at once and was started again for ever."""
    assert planner.pack(read("minimalloc-C"), capacity=1_039_360, time_limit=1e308).arena <= 1_039_360


def test_the_topmost_buffer_takes_no_rounding():
    """4 bytes rounded to 6, and 8 rounded to 9: the short one on top ends at 13, the long one at 14."""
    assert planner.pack([(0, 3, 4), (1, 2, 8)], align=3).arena == least_arena([(0, 3, 4), (1, 2, 8)], 3) == 13


def test_empty_and_sizeless_problems():
    assert planner.pack([]).arena == 0
    assert planner.pack([(0, 1, 0), (0, 5, 0)]).offsets == (0, 0)
    assert dataclasses.replace(planner.pack([(0, 10**40, 8)]), note="").arena == 8


def test_targets_that_come_down_pack_many_buffers_lower(native, monkeypatch):
    draw = random.Random(7)
    starts = [draw.randrange(3000) for _ in range(3000)]
    buffers = [(at, at + 1 + int(draw.expovariate(1 / 60)), draw.randint(1, 10**6)) for at in starts]
    packing = pack_buffers(problem_of(buffers), work_limit=2_000_000, native=native)
    assert overlaps(buffers, packing.offsets) == []
    monkeypatch.setattr(pack, "SMALLEST_LOWERED", 10_000)
    assert packing.arena < pack_buffers(problem_of(buffers), work_limit=2_000_000, native=native).arena


def test_repeated_dives_pack_dense_problems_lower(native, monkeypatch):
    draw = random.Random(1)
    starts = [draw.randrange(800) for _ in range(800)]
    buffers = [(at, at + 1 + draw.randrange(200), draw.randint(1, 10**6)) for at in starts]
    packing = pack_buffers(problem_of(buffers), native=native)
    assert overlaps(buffers, packing.offsets) == []
    assert packing == pack_buffers(problem_of(buffers), native=native)
    monkeypatch.setattr(pack, "MOST_IDLE", 0)
    assert packing.arena < pack_buffers(problem_of(buffers), native=native).arena


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("no place", "no place"),
        ("no compiler. Looked for:\n  g++: not found\n  c++: not found\nInstall one.",
         "no compiler. Looked for: g++: not found; c++: not found"),
        ("it failed\n  at line 3", "it failed"),
    ],
)  # fmt: skip
def test_the_reason_is_a_whole_line(message, line):
    assert planner._in_a_line(CompilerError(message)) == line


@pytest.mark.parametrize("error", [CompilerError("no compiler"), CacheError("no place"), None])
def test_without_the_compiled_search_there_is_a_reason(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bad.so").write_bytes(b"for another machine")

    def build(*args: object, **kwargs: object) -> Path:
        if error is not None:
            raise error
        return tmp_path / "bad.so"

    monkeypatch.setattr(planner, "build_library", build)
    found, reason = planner._pack_library.__wrapped__()
    assert found is None
    assert (str(error) if error else "bad.so") in reason
