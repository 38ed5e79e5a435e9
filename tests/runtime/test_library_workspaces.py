"""cuBLAS' workspaces are made before the first step: why, in the simulated allocator, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memplan.passes.allocator import CachingAllocator
from memplan.runtime import library_workspaces
from memplan.runtime.library_workspaces import product_gpus, with_workspaces
from tests.programs import ProgramBuilder

MIB = 2**20
WORKSPACE = 32 * MIB


def _step(allocator: CachingAllocator, middle: bool) -> None:
    """400 MiB, freed, then 100 cut from their segment; the workspace is cut from it, too, where asked."""
    allocator.free(allocator.alloc(400 * MIB))
    small = allocator.alloc(100 * MIB)
    if middle:
        allocator.alloc(WORKSPACE)
    allocator.free(small)


@pytest.mark.parametrize("middle", [False, True])
def test_a_workspace_made_inside_a_step_costs_a_segment(middle: bool) -> None:
    allocator = CachingAllocator()
    if not middle:
        allocator.alloc(WORKSPACE)
    _step(allocator, middle)
    allocator.empty_cache()
    for _ in range(3):
        _step(allocator, middle=False)
    held = allocator.stats.reserved - WORKSPACE
    assert (held == 400 * MIB) is not middle
    assert held == (400 + 400 - 32 if middle else 400) * MIB


def test_made_once_for_each_thread_stream_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, bool]] = []
    streams = {0: 7, 1: 8}
    capturing = [True]
    monkeypatch.setattr(library_workspaces, "_there", set())
    monkeypatch.setattr(library_workspaces, "make_workspaces", lambda gpu, trains: made.append((gpu, trains)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.__getitem__, raising=False)

    def call(args: list[object]) -> object:
        return args[0]

    trains = with_workspaces(call, lambda: frozenset({1, 0}), trains=True)
    assert trains([5]) == 5
    assert made == []  # not while a graph is captured, whose memory is its own
    capturing[0] = False
    assert [trains([k]) for k in range(3)] == [0, 1, 2]
    assert made == [(0, True), (1, True)]
    streams[1] = 9
    trains([0])
    with_workspaces(call, lambda: frozenset({0}), trains=False)([0])
    assert made[2:] == [(1, True), (0, False)]


def test_only_where_products_are_called() -> None:
    p = ProgramBuilder()
    x = p.input("x", (4, 4))
    y = p.extern("y", "aten.mm.default", (x, x), (4, 4))
    program = p.program(p.extern("z", "aten.sort.default", (y,), (4, 4)))
    assert product_gpus(program) == frozenset()  # on a CPU
    for device, found in (("cuda:1", {1}), ("cuda", {0})):
        moved = tuple(replace(op, device=device) for op in program.operations)
        assert product_gpus(replace(program, operations=moved)) == found
        assert product_gpus(replace(program, operations=moved[1:])) == frozenset()
