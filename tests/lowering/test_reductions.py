"""Reductions over the layouts that matter: split on a GPU, kept dimensions, empty and single rows, ties and NaN."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from memplan.ir.loops import Reduce
from memplan.ir.program import KernelOp
from memplan.lowering import reductions
from memplan.lowering.row_space import choose_split
from memplan.passes.split_reductions import split
from tests.lowering.harness import check, check_call

aten = torch.ops.aten
INF, NAN = math.inf, math.nan

#: what is split on a GPU, here or after fusion: column sums, few long rows, batch statistics
LONG = {
    "columns": (torch.Size([4096, 24]), [0]),
    "rows": (torch.Size([4, 30000]), [1]),
    "all": (torch.Size([17, 65, 33]), [0, 1, 2]),
    "batch statistics": (torch.Size([32, 8, 32, 32]), [0, 2, 3]),
    "prime": (torch.Size([65537, 3]), [0]),
}
CALLS = {
    "sum": lambda x, dims: (aten.sum.dim_IntList, (x, dims)),
    "mean": lambda x, dims: (aten.mean.dim, (x, dims, True)),
    "amax": lambda x, dims: (aten.amax.default, (x, dims)),
    "any": lambda x, dims: (aten.any.dims, (x, dims)),
    "var_mean": lambda x, dims: (aten.var_mean.correction, (x, dims)),
}


def on_gpu(overload: torch._ops.OpOverload, *args: object) -> tuple[KernelOp, ...] | None:
    """The call lowered as if on a GPU, still checked against eager on the CPU."""
    return check_call(overload, args, {}, overload(*args), "cuda:0")  # type: ignore[return-value]


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_static_sizes_are_split_after_fusion(shape: str, call: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    size, dims = LONG[shape]
    x = torch.rand(size)
    if channels_last:
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    overload, args = CALLS[call](x, dims)
    kernels = on_gpu(overload, *args)
    assert kernels is not None
    assert len(kernels) == 1
    found = split(kernels[0], {}, least_elements=0)
    # Welford's recurrence needs equal parts
    assert (found is not None) == (shape != "prime" or call != "var_mean")
    assert len(check(overload, *args)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("call", CALLS)
def test_sizes_known_at_run_time_are_split_before(shape: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if none were known: the pass after fusion leaves those alone. A prime does not divide into equal parts."""
    monkeypatch.setattr(reductions, "choose_split", functools.partial(choose_split, after_fusion=False))
    torch.manual_seed(0)
    size, dims = LONG[shape]
    overload, args = CALLS[call](torch.rand(size), dims)
    kernels = on_gpu(overload, *args)
    assert kernels is not None
    # Welford's recurrence needs equal parts
    assert len(kernels) == (1 if shape == "prime" and call == "var_mean" else 2)
    assert len({op.name for op in kernels}) == len(kernels)


def test_enough_rows_are_not_split() -> None:
    assert len(on_gpu(aten.sum.dim_IntList, torch.randn(2048, 64), [1])) == 1  # type: ignore[arg-type]


def test_argmax_of_a_long_row_is_split() -> None:
    x = torch.randn(3, 40000)
    x[1, 20000] = x[1, 30000] = 9.0
    x[2, 777] = NAN
    for overload in (aten.max.dim, aten.argmin.default):
        assert len(on_gpu(overload, x, 1)) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("overload", [aten.sum.default, aten.prod.default, aten.any.default, aten.all.default])
def test_whole_tensors(overload: torch._ops.OpOverload, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.rand(3, 4) * 3).to(dtype)
    assert check(overload, x)
    assert check(overload, x.t()[::2])
    assert check(overload, x[0, 0])
    assert check(overload, x[:0])


@pytest.mark.parametrize("keepdim", [False, True])
def test_maxima_with_ties_and_nan(keepdim: bool) -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0], [NAN, 9.0, NAN, 1.0], [-INF, -INF, -INF, -INF]])
    for dim in (0, 1, -1):
        for overload in (aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default):
            assert check(overload, x, dim, keepdim)
    assert check(aten.max.dim, torch.tensor([[False, True], [True, True]]), 1)
    assert check(aten.amax.default, torch.tensor([[False, True], [True, True]]), [0])


@pytest.mark.parametrize("correction", [0, 1, 2.5])
@pytest.mark.parametrize("overload", [aten.var.correction, aten.var_mean.correction, aten.std.correction])
def test_moments(overload: torch._ops.OpOverload, correction: float) -> None:
    x = torch.randn(3, 5, 4) + 100
    assert check(overload, x, [1], correction=correction)
    assert check(overload, x.permute(2, 0, 1), [0, 2], correction=correction, keepdim=True)
    assert check(overload, x[:, :1], [1], correction=correction)
    assert check(overload, x[:, :0], [1], correction=correction)


def test_an_empty_row_leaves_no_reduction() -> None:
    (kernel,) = check(aten.sum.dim_IntList, torch.randn(3, 0), [1])  # type: ignore[misc]
    assert isinstance(kernel, KernelOp)
    assert not any(isinstance(n, Reduce) for n in kernel.kernel.nodes)


def test_softmax_is_one_kernel_each_way() -> None:
    x = torch.randn(3, 5, 7, dtype=torch.bfloat16)
    for forward, backward in (
        (aten._softmax.default, aten._softmax_backward_data.default),
        (aten._log_softmax.default, aten._log_softmax_backward_data.default),
    ):
        for dim in (-1, 0, 1):
            out = forward(x, dim, False)
            assert len(check(forward, x, dim, False)) == 1  # type: ignore[arg-type]
            assert len(check(backward, x, out, dim, x.dtype)) == 1  # type: ignore[arg-type]
