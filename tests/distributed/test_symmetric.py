"""Arenas of symmetric memory on two ranks, simulated by files that both map."""

from __future__ import annotations

from pathlib import Path

import pytest

from memplan.runtime.communication_times import thresholds_from
from tests.distributed.ranks import Ranks

CASES = "tests.distributed.symmetric_cases"


@pytest.mark.parametrize(
    ("algorithm", "grad", "wrapper"),
    [
        ("one_shot", False, "python"),
        ("one_shot", True, "python"),
        ("two_shot", False, "cpp"),
        ("two_shot", True, "python"),
        ("auto", False, "python"),
        ("one_shot", True, "cpp"),
    ],
)
def test_no_copies_and_one_small_arena(ranks: Ranks, tmp_path: Path, algorithm: str, grad: bool, wrapper: str) -> None:
    outcomes = ranks.run(CASES, "runs", str(tmp_path), {"all_reduce": algorithm}, grad, wrapper)
    for targets, arena, apart, copies in outcomes:
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


@pytest.mark.parametrize(
    ("longer", "hint"),
    [
        (False, "the program before, which communicates alike; but arenas are agreed on by all ranks"),
        (True, "16 of torch.float32 at 0 of the symmetric arena, sum' where the program before had"),
    ],
)
def test_a_rank_that_compiles_again_alone_is_told_what_that_means(
    ranks: Ranks, tmp_path: Path, longer: bool, hint: str
) -> None:
    first, second = ranks.run(CASES, "compiled_alone", str(tmp_path), longer)
    assert "rank 1" in first
    assert "did not come" in first
    assert "only this rank compiled again" in first
    assert hint in first
    assert "rank 0" in second
    assert "gave up before rank 1 came" in second


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


def test_sharded_weights_in_the_graph(ranks: Ranks, tmp_path: Path) -> None:
    for targets in ranks.run(CASES, "sharded_in_the_graph", str(tmp_path)):
        gathers = [t for t in targets if "all_gather" in t]
        scatters = [t for t in targets if "reduce_scatter" in t]
        assert len(gathers) >= 2  # of the caller's own rows: by the library
        assert scatters == ["symm_mem.reduce_scatter_out.default"] * 2


def test_sequence_parallel_training(ranks: Ranks, tmp_path: Path) -> None:
    for targets in ranks.run(CASES, "sequence_parallel", str(tmp_path)):
        assert any("all_gather" in t for t in targets), targets
        assert any("reduce_scatter" in t for t in targets), targets


def test_dynamic_sizes_go_to_the_library(ranks: Ranks, tmp_path: Path) -> None:
    for targets, notes in ranks.run(CASES, "dynamic", str(tmp_path)):
        assert targets == ["_c10d_functional.all_reduce_.default"] * 3
        assert any("known only at the call" in text for _, text in notes)


def test_a_group_that_was_destroyed_is_named(ranks: Ranks, tmp_path: Path) -> None:
    for text in ranks.run(CASES, "group_that_goes", str(tmp_path)):
        assert "does not exist" in text


def test_a_world_that_is_made_anew(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    try:
        for alive, error in ranks.run(CASES, "starts_again", str(tmp_path)):
            assert alive == [1, 0, 1]
            assert "'0'" in error
            assert "another size; compile again" in error
    finally:
        ranks.close()


def test_calibration_is_kept_and_common(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(CASES, "calibrated", str(tmp_path))
    assert first == second
    assert first[0] == first[1]


@pytest.mark.parametrize(
    ("times", "thresholds"),
    [
        ({1: (1, 2, 3), 4: (2, 2, 3), 16: (3, 2, 4), 64: (9, 5, 4)}, (4, 16)),
        ({1: (3, 2, 1), 4: (9, 9, 9)}, (0, 0)),
        ({1: (3, 1, 2), 4: (9, 9, 9)}, (0, 4)),
    ],
)
def test_thresholds_come_from_times(times: dict[int, tuple[float, ...]], thresholds: tuple[int, int]) -> None:
    named = {n: dict(zip(("one_shot", "two_shot", "library"), t, strict=True)) for n, t in times.items()}
    found = thresholds_from({"all_reduce": named})
    assert (found.one_shot_bytes, found.two_shot_bytes) == thresholds


def test_thresholds_of_the_other_kinds_come_from_times() -> None:
    slower, faster = {"symmetric": 3.0, "library": 2.0}, {"symmetric": 1.0, "library": 2.0}
    gathers = {1: faster, 4: slower, 16: faster, 64: faster, 256: slower}
    found = thresholds_from({"all_reduce": {}, "all_gather": gathers, "reduce_scatter": {1: {"library": 2.0}}})
    assert [n for n in (15, 16, 64, 65) if found.on_symmetric("all_gather", n)] == [16, 64]
    assert not found.on_symmetric("reduce_scatter", 1)


def test_registered_memory_is_taken_from_where_it_is_faster_on() -> None:
    slower, same, faster = ({"registered": t, "library": 2.0} for t in (3.0, 1.95, 1.8))
    found = thresholds_from({
        "all_reduce": {}, "all_gather": {1: faster, 4: slower, 16: faster, 64: faster},
        "all_to_all": {1: faster, 4: faster, 16: same},
    })  # fmt: skip
    assert [n for n in (1, 15, 16, 64, 1024) if found.on_registered("all_gather", n)] == [16, 64, 1024]
    assert not found.on_registered("all_to_all", 16)  # no more than times vary
    assert not found.on_registered("all_reduce", 16)
    assert found.any_registered
    assert not thresholds_from({"all_reduce": {}, "all_gather": {1: {"library": 2.0}}}).any_registered


def test_a_model_that_communicates_is_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    for text in ranks.run(CASES, "saved", str(tmp_path)):
        assert "communicates" in text
