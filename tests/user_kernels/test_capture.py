"""User kernels captured, compiled and planned as operations of their own: torch's samples and ours, without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import memplan
from memplan.ir.plan import Plan
from memplan.ir.program import Copy, Extern, KernelOp, UserKernel
from memplan.user_kernels import build_user_kernels
from tests.user_kernels.pretended_gpu import pretended_gpu

if TYPE_CHECKING:
    from tests.user_kernels.cases import Case

with pretended_gpu():
    from tests.user_kernels.cases import CASES


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with pretended_gpu():
        yield


def plans(case: Case) -> list[Plan]:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        arguments = case.make("cpu")
        graphs = memplan.analyze(case.function, arguments, dynamic=case.dynamic)
    return [g.plan for g in graphs]


def clones(plan: Plan) -> list[str]:
    """Operations that copy one buffer to another."""
    found = []
    for op in plan.program.operations:
        called = isinstance(op, Copy) or (isinstance(op, Extern) and "clone" in op.target)
        kernel = op.kernel if isinstance(op, KernelOp) else None
        if called or (kernel is not None and not kernel.row and len(kernel.nodes) == len(kernel.loads) == 1):
            found.append(op.name)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_sample_is_planned_and_compiled(case: Case) -> None:
    torch._dynamo.reset()
    found = plans(case)
    launches = [op for p in found for op in p.program.operations if isinstance(op, UserKernel)]
    assert len(launches) == case.launches
    assert sum(len(clones(p)) for p in found) == case.clones, [clones(p) for p in found]
    assert not any(isinstance(op, Extern) and "triton" in op.target for p in found for op in p.program.operations)
    for plan in found:
        build_user_kernels(plan.program)
