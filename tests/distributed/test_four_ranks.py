"""More than two ranks, and groups that are a part of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.symmetric_forms import ALL_SYMMETRIC

FORMS, MESH = "tests.distributed.symmetric_forms", "tests.distributed.mesh_cases"
TWO_SHOT, TAKE = "symm_mem.two_shot_all_reduce_.default", "memplan.peer_broadcast_.default"
GATHER, SCATTER = "memplan.peer_all_gather.out", "symm_mem.reduce_scatter_out.default"


@pytest.mark.parametrize("name", ["coalesced", "all_to_all", "broadcast_returned", "gather_after_sum"])
def test_four_ranks(four_ranks: Ranks, tmp_path: Path, name: str) -> None:
    for targets, notes, copies, _ in four_ranks.run(FORMS, "run", str(tmp_path), name, ALL_SYMMETRIC, "python"):
        assert all(t.startswith(("symm_mem.", "memplan.peer_")) for t in targets), notes
        assert not copies


def test_the_library_on_four_ranks(four_ranks: Ranks) -> None:
    for name in ("reduce_scatter", "all_to_all"):
        four_ranks.run("tests.distributed.cases", "form", name, {"poison": True, "pools": "always"})


@pytest.mark.parametrize(
    ("members", "scatter", "targets"),
    [
        ([1, 2, 3], False, [TWO_SHOT, GATHER, TAKE]),
        # torch has built no reduce-scatter for three
        ([0, 2, 3], True, [TWO_SHOT, GATHER, "_c10d_functional.reduce_scatter_tensor_out.default", TAKE]),
        ([1, 3], True, [TWO_SHOT, GATHER, SCATTER, TAKE]),
    ],
)
def test_a_part_of_the_ranks(
    four_ranks: Ranks, tmp_path: Path, members: list[int], scatter: bool, targets: list[str]
) -> None:
    for rank, found in enumerate(four_ranks.run(FORMS, "in_part", str(tmp_path), members, scatter)):
        assert found == (targets if rank in members else None)


def test_rows_and_columns_of_a_mesh_agree_whatever_order_ranks_name_them_in(four_ranks: Ranks) -> None:
    assert four_ranks.run(MESH, "crossed", True) == [""] * 4


def test_without_a_common_order_they_would_wait_in_a_cycle(four_ranks: Ranks) -> None:
    assert all("did not come" in str(text) for text in four_ranks.run(MESH, "crossed", False))


def test_arenas_of_rows_and_columns(four_ranks: Ranks, tmp_path: Path) -> None:
    for targets, held in four_ranks.run(MESH, "two_arenas", str(tmp_path)):
        assert targets == ["symm_mem.one_shot_all_reduce_out.default"] * 2
        assert held == 2
