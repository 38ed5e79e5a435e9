"""Emitted kernels: their numbers through Triton's interpreter, and their cubins for an H100."""

from __future__ import annotations

from functools import partial

import pytest
import sample_kernels as s
import torch
from sample_kernels import BF16, F16, F32
from small_kernels import SMALL, norm_buffers, only, zeros

from memplan.codegen.triton_kernel import emit_triton
from memplan.ir.canonical import canonicalize
from memplan.ir.loops import Kernel


@pytest.mark.parametrize("name", SMALL)
def test_numbers(name: str, check) -> None:
    kernel, buffers = SMALL[name]
    check.numbers(kernel, buffers)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm(dtype: torch.dtype, residual: bool, check) -> None:
    kernel = s.layer_norm(6, 40, dtype, residual=residual)
    check.numbers(kernel, only(kernel, norm_buffers(6, 40, dtype)))


def test_layer_norm_backward(check) -> None:
    kernel = s.layer_norm_backward(6, 40, F32)
    check.numbers(kernel, only(kernel, norm_buffers(6, 40, F32)))


#: rows too long for a block: several passes
LONG = {
    "softmax": s.softmax(2, 20_001),
    "layer_norm": s.layer_norm(2, 17_001, F32, residual=True),
    "layer_norm_backward": s.layer_norm_backward(2, 9_000, F32),
    "cross_entropy": s.cross_entropy(2, 17_000),
}


@pytest.mark.parametrize("name", LONG)
def test_numbers_of_several_passes(name: str, check, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are shortened and the block's limit with them: the interpreter is slow."""
    monkeypatch.setattr("memplan.codegen.triton_configs._PERSISTENT_ELEMENTS", 16)
    make = {
        "softmax": s.softmax,
        "cross_entropy": s.cross_entropy,
        "layer_norm": partial(s.layer_norm, residual=True),
        "layer_norm_backward": s.layer_norm_backward,
    }
    rows, columns = 3, 90
    kernel = make[name](rows, columns, F32)
    buffers = {
        **norm_buffers(rows, columns, F32),
        "target": torch.tensor([1, 89, 5]),
        "loss": zeros(3),
        "lse": zeros(3),
    }
    monkeypatch.setattr("memplan.codegen.triton_configs._looped_rows", lambda x, r: (small_loop(),))
    emitted = check.numbers(kernel, only(kernel, buffers))
    assert "for roffset in range(0, 90, RBLOCK):" in emitted.source


def test_softmax_of_extreme_rows(check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of -inf, with +inf, with NaN, of large numbers: as eager has them, though it is one pass less."""
    monkeypatch.setattr("memplan.codegen.triton_configs._PERSISTENT_ELEMENTS", 16)
    monkeypatch.setattr("memplan.codegen.triton_configs._looped_rows", lambda x, r: (small_loop(),))
    a = torch.randn(8, 90) * 50
    a[0], a[1, 3], a[2, 40], a[3, :70], a[4] = float("-inf"), float("inf"), float("nan"), float("-inf"), 3e38
    emitted = check.numbers(s.softmax(8, 90, F32), {"a": a.flatten(), "out": zeros(720)})
    assert emitted.source.count("for roffset") == 2
    assert "online_step" in emitted.source


def small_loop():
    from memplan.codegen.triton_configs import LaunchConfig

    return LaunchConfig((("XBLOCK", 2), ("RBLOCK", 32)), 4)


BIG: dict[str, Kernel] = {
    "bias_gelu": s.bias_gelu(4096, 3072),
    "add_relu": s.add_relu(1 << 24),
    "transpose": s.transpose(4096, 4096, BF16),
    "layer_norm": s.layer_norm(8192, 768),
    "layer_norm_residual": s.layer_norm(8192, 1024, residual=True),
    "layer_norm_wide": s.layer_norm(4096, 4096, residual=True),
    "layer_norm_backward": s.layer_norm_backward(8192, 1024),
    "layer_norm_backward_wide": s.layer_norm_backward(4096, 4096),
    "softmax": s.softmax(8192, 1024),
    "softmax_wide": s.softmax(4096, 8192),
    "cross_entropy": s.cross_entropy(8192, 50257),
    "column_sum": s.column_sum(16384, 768),
    "total_sum": s.total_sum(1000, 1000),
    "batch_norm": s.batch_norm_statistics(64, 256, 3136, F16),
    "embedding": s.embedding(16384, 768, 50257),
    "embedding_backward": s.embedding_backward(16384, 768, BF16),
    "dropout": s.dropout(1 << 22),
    "concatenate": s.concatenate(1024, 300, 212),
    "argmax": s.argmax(4096, 1000),
    "argmax_long": s.argmax(16, 100_000, F16),
    **{f"long_{name}": kernel for name, kernel in LONG.items()},
}


@pytest.mark.parametrize("name", BIG)
def test_builds_without_spills(name: str, check) -> None:
    found = check.builds(BIG[name])
    assert found.spilled_bytes == 0, found
    assert 8 <= found.registers <= 128, found


def test_same_kernel_same_text() -> None:
    first = emit_triton(canonicalize(s.layer_norm(64, 768)), name="k", hints={})
    second = emit_triton(canonicalize(s.layer_norm(64, 768)), name="k", hints={})
    assert first == second
