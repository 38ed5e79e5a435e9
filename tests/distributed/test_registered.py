"""The library's collectives in registered memory, simulated on two ranks by memory of which is kept what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import Ranks

CASES = "tests.distributed.registered_cases"
REDUCE, TAKE = "_c10d_functional.all_reduce_.default", "_c10d_functional.broadcast_.default"
GATHER = "_c10d_functional.all_gather_into_tensor_out.default"
SCATTER = "_c10d_functional.reduce_scatter_tensor_out.default"
EXCHANGE = "memplan.library_all_to_all.out"


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("all_reduce", [REDUCE]),
        ("reduce_scatter", [SCATTER]),
        ("all_gather", [GATHER]),
        ("all_to_all", [EXCHANGE]),
        ("broadcast_inside", [TAKE]),
        ("gather_after_sum", [REDUCE, GATHER]),
        ("gather_integers", [GATHER]),
    ],
)
@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_in_registered_memory(ranks: Ranks, name: str, targets: list[str], wrapper: str) -> None:
    for found, notes, registered, sizes in ranks.run(CASES, "run", name, wrapper):
        assert found == targets, notes
        assert registered == [True] * len(targets)
        assert not any("unregistered" in text for text in notes)
        assert len(sizes) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gather_given", "is the caller's, or outlives the program"),
        ("gather_returned", "is the caller's, or outlives the program"),
        ("scatter_largest", "is the caller's, or outlives the program"),
        ("broadcast_returned", "is the caller's, or outlives the program"),
        ("uneven", "it allocates its result itself"),
        ("twice", "it allocates its result itself"),
    ],
)
def test_what_stays_in_plain_memory_is_said(ranks: Ranks, name: str, reason: str) -> None:
    for _, notes, registered, sizes in ranks.run(CASES, "run", name, "python"):
        assert any("runs on unregistered memory" in text and reason in text for text in notes), notes
        assert not any(registered)
        assert not sizes


def test_training_in_registered_memory(ranks: Ranks) -> None:
    for found in ranks.run(CASES, "training"):
        assert {phase for phase, _ in found} == {"forward", "backward"}
        assert sum(count for _, count in found) >= 4


def test_one_rank_without_it_leaves_all_in_plain_memory(ranks: Ranks) -> None:
    for notes in ranks.run(CASES, "refused"):
        assert any("rank 1: its NCCL is too old" in text for text in notes)


def test_where_nccl_cannot_is_said(ranks: Ranks) -> None:
    for gloo, without, alone in ranks.run(CASES, "obstacles"):
        assert gloo == "ProcessGroupGloo registers no memory in this build of torch"
        assert without == "the group has no backend for cpu"
        assert alone == "the group has one rank"


def test_it_is_off_unless_asked_for(ranks: Ranks) -> None:
    for notes in ranks.run(CASES, "unused", {}):
        assert not any("with the library" in text for text in notes)


def test_auto_takes_it_for_long_messages(ranks: Ranks) -> None:
    """On two ranks it is known to be faster for all-gathers and all-to-alls of 8 MiB and more."""
    for sizes in ranks.run(CASES, "long_gathers"):
        assert sizes == [0, 1]


def test_a_group_that_is_destroyed_gives_it_back_first(ranks: Ranks) -> None:
    for alive in ranks.run(CASES, "destroyed"):
        assert alive == [2, 1, 1]


def test_memory_is_registered_as_long_as_a_program_uses_it(ranks: Ranks) -> None:
    for found in ranks.run(CASES, "released"):
        assert found == [1, 1, 1, 0]


def test_two_types_of_arenas_in_one_group(ranks: Ranks, tmp_path: Path) -> None:
    for targets, memories, shown in ranks.run(CASES, "beside_symmetric", str(tmp_path)):
        assert targets == [REDUCE] * 3
        assert memories == [("registered", True), ("symmetric", True)]
        assert "registered" in shown
        assert "symmetric" in shown
