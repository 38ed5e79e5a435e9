"""Sample kernels at sizes that an interpreter can take, with their buffers."""

from __future__ import annotations

import sample_kernels as s
import torch
from sample_kernels import BF16, BOOL, F16, F32, I64

from memplan.ir.loops import Kernel

Tensors = dict[str, torch.Tensor]


def rand(n: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)


def zeros(n: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype)


def norm_buffers(rows: int, columns: int, dtype: torch.dtype) -> Tensors:
    n = rows * columns
    return {
        **{name: rand(n, dtype) for name in ("a", "dy", "x")},
        "b": rand(n, dtype) * 2,
        "weight": rand(columns, dtype),
        "bias": rand(columns, dtype) + 1,
        "mean": rand(rows),
        "rstd": rand(rows).abs(),
        **{name: zeros(n, dtype) for name in ("out", "sum", "dx")},
    }


def norm_gradients(rows: int, columns: int, together: int) -> tuple[Kernel, Tensors]:
    """All gradients of a layer norm in one kernel; what the sums were before does not matter."""
    kernel = s.layer_norm_backward(rows, columns, F32, together=together)
    sums = {b: torch.full((-(-rows // together) * columns,), float("nan")) for b in ("dweight", "dbias")}
    return kernel, only(kernel, norm_buffers(rows, columns, F32) | sums)


def only(kernel: Kernel, buffers: Tensors) -> Tensors:
    return {b: buffers[b] for b in (*kernel.read_buffers, *kernel.written_buffers)}


SMALL: dict[str, tuple[Kernel, Tensors]] = {
    "bias_gelu": (s.bias_gelu(5, 33), {"a": rand(165, BF16), "bias": rand(33, BF16), "out": zeros(165, BF16)}),
    "bias_gelu_f32": (s.bias_gelu(4, 64, F32), {"a": rand(256), "bias": rand(64), "out": zeros(256)}),
    "add_relu": (s.add_relu(1000, F16), {"a": rand(1000, F16), "b": rand(1000, F16).flip(0), "out": zeros(1000, F16)}),
    "transpose": (s.transpose(40, 24), {"a": rand(960), "out": zeros(960)}),
    "batched_transpose": (s.transpose(17, 24, BF16, 3), {"a": rand(1224, BF16), "out": zeros(1224, BF16)}),
    "softmax": (s.softmax(5, 40), {"a": rand(200, BF16), "out": zeros(200, BF16)}),
    "cross_entropy": (
        s.cross_entropy(6, 50),
        {"a": rand(300, BF16), "target": torch.tensor([0, 49, 3, 7, 11, 2]), "loss": zeros(6), "lse": zeros(6)},
    ),
    "column_sum": (s.column_sum(70, 12), {"a": rand(840, BF16), "out": zeros(12, BF16)}),
    "total_sum": (s.total_sum(30, 7), {"a": rand(210), "out": zeros(1)}),
    "batch_norm": (
        s.batch_norm_statistics(3, 4, 49),
        {"a": rand(588), "mean": zeros(4), "variance": zeros(4), "running": rand(4)},
    ),
    "embedding": (
        s.embedding(6, 24, 10),
        {
            "ids": torch.tensor([0, 9, -1, 3, -10, 5]),
            "table": rand(240, BF16),
            "position": rand(144, BF16),
            "out": zeros(144, BF16),
        },
    ),
    "embedding_backward": (
        s.embedding_backward(6, 24),
        {"ids": torch.tensor([0, 3, 0, 3, 2, 0]), "dy": rand(144), "grad": zeros(120)},
    ),
    "dropout": (
        s.dropout(300),
        {
            "seed": torch.tensor([123456789012345]),
            "a": rand(300, BF16),
            "out": zeros(300, BF16),
            "mask": zeros(300, BOOL),
        },
    ),
    "concatenate": (s.concatenate(9, 5, 7), {"a": rand(45), "b": rand(63), "out": zeros(108)}),
    "argmax": (s.argmax(4, 30), {"a": rand(120).round(), "out": zeros(4, I64)}),
}
