"""Kernels that go over rows and sum their columns: numbers through the interpreter, and what is built for an H100."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from reference_kernel import run_reference
from sample_kernels import F32, R, X, layer_norm_backward
from small_kernels import norm_gradients

from memplan.codegen.cpp_kernel import emit_cpp
from memplan.codegen.triton_kernel import emit_triton
from memplan.ir.canonical import canonicalize
from memplan.ir.errors import LoweringError, UnsupportedError, VerificationError
from memplan.ir.index import FloorDiv
from memplan.ir.loops import Kernel
from memplan.ir.program import Buffer, BufferKind
from memplan.ir.verify_kernel import verify_kernel


@pytest.mark.parametrize("config", [0, -1])
@pytest.mark.parametrize(("rows", "columns", "together"), [(7, 40, 3), (12, 64, 4), (5, 33, 2), (24, 128, 8)])
def test_numbers(rows: int, columns: int, together: int, config: int, check) -> None:
    kernel, buffers = norm_gradients(rows, columns, together)
    groups = -(-rows // together)
    emitted = check.numbers(kernel, buffers, config=config, rtol=1e-5, atol=1e-5)
    assert emitted.grid(emitted.configs[config]) == groups
    assert "atomic" not in emitted.source


def test_they_are_the_sums_of_columns() -> None:
    kernel, buffers = norm_gradients(10, 6, 4)
    run_reference(kernel, buffers)
    dy = buffers["dy"].view(10, 6)
    xhat = (buffers["x"].view(10, 6) - buffers["mean"][:, None]) * buffers["rstd"][:, None]
    torch.testing.assert_close(buffers["dbias"].view(3, 6).sum(0), dy.sum(0))
    torch.testing.assert_close(buffers["dweight"].view(3, 6).sum(0), (dy * xhat).sum(0))


@pytest.mark.parametrize(("rows", "columns"), [(200_704, 128), (16_384, 768), (12_608, 1024), (8192, 4096)])
def test_builds_without_spills(rows: int, columns: int, check) -> None:
    found = check.builds(layer_norm_backward(rows, columns, together=24))
    assert found.spilled_bytes == 0, found
    assert found.registers <= 128, found


def test_what_is_the_same_for_all_rows_is_loaded_once() -> None:
    source = emit_triton(canonicalize(layer_norm_backward(64, 128, F32, together=8)), name="kernel", hints={}).source
    loop = source.index("for xoffset")
    weight = source.index("evict_last")
    assert weight < loop
    assert source.count("tl.load", 0, loop) == 1


def with_place(index: sympy.Expr) -> Kernel:
    kernel = layer_norm_backward(16, 8, F32, together=4)
    stores = (*kernel.stores[:-1], replace(kernel.stores[-1], index=index))
    return replace(kernel, stores=stores)


@pytest.mark.parametrize(
    "index",
    [X[0] * 8 + R[0], FloorDiv(X[0] + 1, 4) * 8 + R[0], X[0] + FloorDiv(X[0], 4) + R[0], FloorDiv(X[0], 2) * 8 + R[0]],
)
def test_totals_that_are_not_of_consecutive_rows_are_refused(index: sympy.Expr) -> None:
    kernel = with_place(index)
    with pytest.raises(LoweringError, match="totals"):
        emit_triton(canonicalize(kernel), name="kernel", hints={})
    with pytest.raises(VerificationError, match="totals"):
        verify(kernel)


def test_columns_that_share_a_total_are_refused() -> None:
    verify(with_place(FloorDiv(X[0], 4) * 8 + R[0]))
    for index in (FloorDiv(X[0], 4), FloorDiv(X[0], 4) * 4 + R[0]):
        with pytest.raises(VerificationError, match="one total"):
            verify(with_place(index))


def verify(kernel: Kernel) -> None:
    sizes = {"dweight": 4 * 8, "dbias": 256, "mean": 16, "rstd": 16, "weight": 8}
    buffers = {b: Buffer(b, 4 * sizes.get(b, 128), F32, "cuda:0", BufferKind.TEMPORARY) for b in kernel.buffers}
    verify_kernel(kernel, buffers)


def test_cpus_have_none() -> None:
    with pytest.raises(UnsupportedError, match="totals"):
        emit_cpp(canonicalize(layer_norm_backward(16, 8, F32, together=4)), name="kernel", hints={}, threads=False)
