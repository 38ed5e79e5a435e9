"""Fused and unfused programs give the same, on programs that nobody thought of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memplan.ir.printing import format_program
from memplan.ir.program import Program
from memplan.ir.verify import verify_program
from memplan.passes.cleanup import Cleanup
from memplan.passes.fuse_graph import FusionGraph
from memplan.passes.fusion import Fusion
from tests.passes.generated_kernels import programs
from tests.program_runner import copy_inputs, make_inputs, run_program

CHECKS = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def assert_same(before: Program, after: Program, seed: int = 0) -> None:
    """Equal outputs and equal mutated inputs."""
    inputs = make_inputs(before, seed=seed)
    again = copy_inputs(inputs)
    expected, found = run_program(before, inputs), run_program(after, again)
    for k, (a, b) in enumerate(zip([*expected, *inputs], [*found, *again], strict=True)):
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        where = f"value {k}\n{format_program(before)}\n{format_program(after)}"
        # sums may be taken in another order; everything else is bit for bit
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, w=where: f"{m}\n{w}")


@CHECKS
@given(programs())
def test_cleanup_keeps_meaning(program: Program) -> None:
    verify_program(program)
    after = Cleanup().run(program)
    verify_program(after)
    assert_same(program, after)


@CHECKS
@given(programs(), st.sampled_from([4, 24]))
def test_fusion_keeps_meaning_and_peak(program: Program, most: int) -> None:
    before = Cleanup().run(program)
    after = Fusion(max_buffers=most).run(before)
    verify_program(after)
    assert_same(program, after)
    assert FusionGraph(after).live.max(initial=0) <= FusionGraph(before).live.max(initial=0)


@pytest.mark.parametrize("seed", range(1))
@CHECKS
@given(programs(most=30))
def test_fusing_again_changes_no_results(seed: int, program: Program) -> None:
    once = Fusion().run(Cleanup().run(program))
    twice = Fusion().run(once)
    assert len(twice.operations) <= len(once.operations)
    assert_same(program, twice, seed)
