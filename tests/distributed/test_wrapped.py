"""DistributedDataParallel and fully_shard around compiled models: training steps equal to eager's."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import Ranks

CASES = "tests.distributed.wrapped_cases"


@pytest.mark.parametrize(
    ("unused", "parts", "settings"),
    [(False, 1, {"static_graph": True}), (True, 2, {"find_unused_parameters": True})],
    ids=["static", "unused"],
)
def test_several_graphs_of_one_model(ranks: Ranks, unused: bool, parts: int, settings: dict[str, bool]) -> None:
    """With a checkpointed block, and gradients accumulated under ``no_sync`` (not for static graphs)."""
    for graphs in ranks.run(CASES, "buckets", unused, parts, settings):
        assert graphs > 1  # type: ignore[operator]


def test_shards(ranks: Ranks) -> None:
    ranks.run(CASES, "shards")
