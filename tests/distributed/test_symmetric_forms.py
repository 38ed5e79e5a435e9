"""Every kind of collective out of symmetric memory: eager's numbers, whatever ranks tarry, and no copies beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.symmetric_forms import ALL_SYMMETRIC

CASES = "tests.distributed.symmetric_forms"
ONE_SHOT, SCATTER = "symm_mem.one_shot_all_reduce_out.default", "symm_mem.reduce_scatter_out.default"
GATHER, EXCHANGE = "memplan.peer_all_gather.out", "memplan.peer_all_to_all.out"
TAKE, TAKE_INTO = "memplan.peer_broadcast_.default", "memplan.peer_broadcast.out"


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("all_reduce", [ONE_SHOT]),
        ("reduce_scatter", [SCATTER]),
        ("all_gather", [GATHER]),
        ("all_to_all", [EXCHANGE]),
        ("broadcast", [TAKE]),
        ("broadcast_inside", [TAKE]),
        ("broadcast_returned", [TAKE_INTO]),
        ("coalesced", [ONE_SHOT, ONE_SHOT, GATHER, GATHER, SCATTER, SCATTER]),
        ("hand_written", [ONE_SHOT, GATHER, SCATTER, EXCHANGE]),
        ("gather_after_sum", [ONE_SHOT, GATHER]),
        ("gather_integers", [GATHER]),
    ],
)
@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_out_of_the_arena(ranks: Ranks, tmp_path: Path, name: str, targets: list[str], wrapper: str) -> None:
    for found, notes, copies, waits in ranks.run(CASES, "run", str(tmp_path), name, ALL_SYMMETRIC, wrapper):
        assert found == targets, notes
        assert not copies
        assert not waits


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("scatter_unlike", "are not 2 times a multiple of 16"),
        ("scatter_largest", "only sums can, not 'max'"),
        ("gather_given", "is the caller's"),
        ("gather_returned", "outlives the program, or other collectives use it"),
        ("uneven", "ranks may give and take different numbers of elements"),
        ("twice", "it is given one buffer twice"),
        ("changes_input", "is the caller's"),
    ],
)
def test_what_cannot_is_left_to_the_library(ranks: Ranks, tmp_path: Path, name: str, reason: str) -> None:
    for found, notes, *_ in ranks.run(CASES, "run", str(tmp_path), name, ALL_SYMMETRIC, "python"):
        assert all(target.startswith("_c10d_functional.") for target in found)
        assert any("runs on unregistered memory" in text and reason in text for text in notes), notes


MULTICAST = {**ALL_SYMMETRIC, "multicast": True}
SUM, SUM_INTO = "symm_mem.multimem_all_reduce_.default", "symm_mem.multimem_one_shot_all_reduce_out.default"
TO_ALL = "symm_mem.multimem_all_gather_out.default"


@pytest.mark.parametrize(
    ("name", "all_reduce", "targets"),
    [
        ("all_reduce", "one_shot", [SUM_INTO]),
        ("all_reduce", "two_shot", [SUM]),
        ("all_reduce_returned", "two_shot", [SUM_INTO]),
        ("all_gather", "one_shot", [TO_ALL]),
        ("gather_after_sum", "one_shot", [SUM_INTO, TO_ALL]),
        ("gather_integers", "one_shot", [TO_ALL]),
        ("reduce_scatter", "one_shot", [SCATTER]),
        ("broadcast", "one_shot", [TAKE]),
    ],
)
@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_through_multicast(
    ranks: Ranks, tmp_path: Path, name: str, all_reduce: str, targets: list[str], wrapper: str
) -> None:
    options = {**MULTICAST, "all_reduce": all_reduce}
    for found, notes, copies, _ in ranks.run(CASES, "run", str(tmp_path), name, options, wrapper):
        assert found == targets, notes
        assert not any("without multicast" in text for text in notes)
        assert not copies


@pytest.mark.parametrize(
    ("name", "target", "no_multicast", "reason"),
    [
        ("all_reduce", ONE_SHOT, ("", "its switch is too old"), "rank 1: its switch is too old"),
        ("all_gather", GATHER, ("", "its switch is too old"), "rank 1: its switch is too old"),
        ("gather_given_back", GATHER, ("", ""), "its buffers cannot be as that needs them"),
    ],
)
def test_without_multicast_it_runs_as_before_and_says_so(
    ranks: Ranks, tmp_path: Path, name: str, target: str, no_multicast: tuple[str, str], reason: str
) -> None:
    for found, notes, *_ in ranks.run(CASES, "run", str(tmp_path), name, MULTICAST, "python", no_multicast):
        assert found == [target]
        assert f"{target} runs without multicast: {reason}" in notes


def test_multicast_is_not_used_unless_asked_for(ranks: Ranks, tmp_path: Path) -> None:
    for found, notes, *_ in ranks.run(CASES, "run", str(tmp_path), "all_reduce", ALL_SYMMETRIC, "python"):
        assert found == [ONE_SHOT]
        assert not any("multicast" in text for text in notes)


def test_long_messages_go_to_the_library(ranks: Ranks, tmp_path: Path) -> None:
    """The message of an all-gather is its result: 8 x 6 of float32 from each of two ranks."""
    for most, target in ((384, GATHER), (383, "_c10d_functional.all_gather_into_tensor_out.default")):
        folder = tmp_path / str(most)
        folder.mkdir()
        for found, *_ in ranks.run(CASES, "run", str(folder), "all_gather", {"symmetric_bytes": most}, "python"):
            assert found == [target]
