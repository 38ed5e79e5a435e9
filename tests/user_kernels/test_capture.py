"""User kernels captured, compiled and planned as operations of their own: torch's samples and ours, without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import memplan
from memplan.capture.kernel_closure import kernel_source
from memplan.ir.plan import Plan
from memplan.ir.program import Copy, Extern, KernelOp, UserKernel
from memplan.runtime.user_kernel_build import build_kernel
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


def test_what_is_built_from_data_has_tritons_hash_of_what_the_user_wrote() -> None:
    """In a process in which nothing was hashed before: else Triton hashes a callee's constants as well."""
    from torch.testing._internal import triton_utils as samples
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    found = [k for k in vars(samples).values() if isinstance(k, JITFunction | Autotuner)]
    assert len(found) > 30
    for kernel in found:
        source, _ = kernel_source(kernel)
        function = kernel.fn if isinstance(kernel, Autotuner) else kernel
        assert build_kernel(source).entry.cache_key == function.cache_key  # type: ignore[attr-defined]


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
