"""Arenas of symmetric memory on two ranks, simulated by files that both map."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import Ranks

CASES = "tests.distributed.symmetric_cases"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot", "auto"])
def test_no_copies_and_one_small_arena(ranks: Ranks, tmp_path: Path, algorithm: str, grad: bool) -> None:
    for targets, arena, apart, copies in ranks.run(CASES, "runs", str(tmp_path), {"all_reduce": algorithm}, grad):
        assert len(targets) == 3
        assert all(t.startswith("symm_mem.") for t in targets)
        assert not copies
        assert arena * 2 <= max(apart, 1024)  # three call sites share it


def test_memory_goes_with_the_last_program(ranks: Ranks, tmp_path: Path) -> None:
    for held in ranks.run(CASES, "released", str(tmp_path)):
        assert held == (1000, 1000, 0)


def test_an_arena_grows_once(ranks: Ranks, tmp_path: Path) -> None:
    for sizes, count in ranks.run(CASES, "grows", str(tmp_path)):
        assert count == 1
        assert len(sizes) == 2
        assert sizes[1] > sizes[0]


def test_other_plans_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    for text in ranks.run(CASES, "other_plans", str(tmp_path)):
        assert "rank 1" in text
        assert "64 of torch.float32" in text
        assert "80 of torch.float32" in text


def test_a_rank_alone_is_told(ranks: Ranks, tmp_path: Path) -> None:
    text, _ = ranks.run(CASES, "one_rank_only", str(tmp_path))
    assert "rank 1" in str(text)
    assert "did not come" in str(text)


def test_a_rank_without_symmetric_memory_sends_all_to_the_library(ranks: Ranks, tmp_path: Path) -> None:
    for targets, notes in ranks.run(CASES, "fallback", str(tmp_path)):
        assert targets == ["_c10d_functional.all_reduce_.default"] * 3
        assert any("rank 1: its GPU is too old" in text for _, text in notes)


def test_tensor_parallel_training(ranks: Ranks, tmp_path: Path) -> None:
    for graphs in ranks.run(CASES, "tensor_parallel", str(tmp_path)):
        reduces = [t for targets, _ in graphs for t in targets]
        assert len(reduces) == 3  # one of the forward; of the backward one for each layer that takes the input
        assert all(t.startswith("symm_mem.") for t in reduces)


def test_sharded_weights_training(ranks: Ranks, tmp_path: Path) -> None:
    for graphs in ranks.run(CASES, "sharded_weights", str(tmp_path)):
        assert graphs


def test_dynamic_sizes_go_to_the_library(ranks: Ranks, tmp_path: Path) -> None:
    for targets, notes in ranks.run(CASES, "dynamic", str(tmp_path)):
        assert targets == ["_c10d_functional.all_reduce_.default"] * 3
        assert any("known only at the call" in text for _, text in notes)


def test_a_group_that_was_destroyed_is_named(ranks: Ranks, tmp_path: Path) -> None:
    for text in ranks.run(CASES, "group_that_goes", str(tmp_path)):
        assert "does not exist" in text
