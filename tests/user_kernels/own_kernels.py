# mypy: ignore-errors
"""Kernels such as users write, where torch's own samples have none of the kind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from tests.user_kernels import helper_kernels

HALF = tl.constexpr(0.5)


@triton.jit
def through_a_module(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(out_ptr + at, helper_kernels.scale_and_shift(x, shift) * HALF, mask=at < n)


@triton.jit
def reads_what_it_writes(y_ptr, x_ptr, n, BLOCK: tl.constexpr):
    """``y[i] += x[n - 1 - i]``: wrong if both are one buffer."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(y_ptr + at, tl.load(y_ptr + at, mask=mask) + tl.load(x_ptr + n - 1 - at, mask=mask), mask=mask)


@triton.jit
def converted(x_ptr, out_ptr, n, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n).to(TYPE), mask=at < n)


@triton.autotune(
    configs=[triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((64, 2), (256, 4))],
    key=["n"],
    restore_value=["x_ptr"],
)
@triton.jit
def increment(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1, mask=at < n)


@triton.autotune(
    configs=[triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((64, 2), (256, 4))],
    key=["n"],
    reset_to_zero=["total_ptr"],
)
@triton.jit
def total(x_ptr, total_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + at, mask=at < n, other=0.0)))


def _large_only(configs, named_args, **kwargs):
    return [c for c in configs if c.kwargs["BLOCK"] >= 128]


@triton.autotune(
    configs=[triton.Config({"BLOCK": b}) for b in (64, 128, 256)],
    key=["n"],
    prune_configs_by={"early_config_prune": _large_only},
)
@triton.jit
def pruned(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) * 2, mask=at < n)


@triton.autotune(configs=[triton.Config({"BLOCK": b}) for b in (64, 128)], key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def with_heuristics(x_ptr, out_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(out_ptr + at, tl.load(x_ptr + at) * 2)
    else:
        tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def applied(x_ptr, out_ptr, n, function: tl.constexpr, BLOCK: tl.constexpr):
    """A ``@triton.jit`` function as an argument."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, function(tl.load(x_ptr + at, mask=at < n)), mask=at < n)


@triton.jit
def does_not_compile(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, no_such_name(at))  # noqa: F821


@triton_op("memplan_tests::doubled", mutates_args={})
def doubled(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    n = x.numel()
    wrap_triton(converted)[(triton.cdiv(n, 64),)](x, out, n, BLOCK=64, TYPE=tl.float32)
    return out * 2


@triton_op("memplan_tests::incremented", mutates_args={"x"})
def incremented(x: torch.Tensor) -> None:
    wrap_triton(increment)[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, x.numel())


@triton_op("memplan_tests::scaled", mutates_args={})
def scaled(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    wrap_triton(applied)[(4,)](x, out, x.numel(), helper_kernels.scale, BLOCK=128)
    return out
