"""Slices of one tensor run one kernel: what their indices have in common is added to the address."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor

from memplan import kernels as kernel_sets
from memplan.ir.canonical import canonicalize, hoist_offsets
from memplan.ir.loops import Kernel
from memplan.ir.program import Program
from tests.models.against_eager import compare_trees
from tests.sample_kernels import F16, F32, Builder, X


def doubled(*starts: int, dtype: torch.dtype = F32, step: int = 1) -> Kernel:
    """``out[i] = 2 * (a[start0 + i] + a[start1 + i] + ...)``."""
    k = Builder((8,))
    total = k.load("a", step * X[0] + starts[0], dtype)
    for start in starts[1:]:
        total = k.call("add", total, k.load("a", step * X[0] + start, dtype))
    k.store("out", X[0], k.call("add", total, total))
    return k.done()


@pytest.mark.parametrize(
    ("kernel", "offset"),
    [
        (doubled(0), 0),
        (doubled(3), 0),  # less than 16 bytes
        (doubled(8), 32),
        (doubled(10), 32),
        (doubled(10, 4), 16),
        (doubled(8, dtype=F16), 16),
        (doubled(64, 0), 0),
        (doubled(64, step=-1), 0),  # would leave an index below zero
    ],
)
def test_the_common_part_is_hoisted(kernel: Kernel, offset: int) -> None:
    plain = canonicalize(kernel)
    hoisted = hoist_offsets(plain)
    assert hoisted.offsets == ((offset, 0) if offset else ())
    for before, after in zip(plain.kernel.loads, hoisted.kernel.loads, strict=True):
        assert sympy.expand(before.index - after.index) * before.dtype.itemsize == offset


def test_equal_after_hoisting() -> None:
    first, second = (hoist_offsets(canonicalize(doubled(n, n + 3))) for n in (16, 160))
    assert first.kernel == second.kernel
    assert first.offsets != second.offsets


def test_slices_share_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    sets: list[kernel_sets.KernelSet] = []
    collect = kernel_sets.collect

    def watched(program: Program) -> kernel_sets.KernelSet:
        sets.append(collect(program))
        return sets[-1]

    monkeypatch.setattr(kernel_sets, "collect", watched)

    def sums(x: Tensor) -> list[Tensor]:
        return [torch.softmax(x[16 * k : 16 * k + 16], 1) @ x[:5].T for k in range(6)]

    x = torch.randn(96, 12)
    compare_trees(torch.compile(sums, backend="memplan")(x), sums(x), "result")
    (found,) = sets
    assert len(found.arguments) == 6
    assert len(found.sources) == 1
