"""Tensors made from nothing: fills, ranges, identity, triangles; and `empty`, which runs nothing."""

from __future__ import annotations

import sympy
import torch

from ..ir.loops import Scalar
from .arithmetic import moved
from .builder import KernelBuilder, Value, opmath
from .call_site import SUPPORTED, CallSite, Operations, lowers
from .pointwise import pointwise_kernel

#: calls that make room and write nothing
EMPTY = (
    "aten.empty.memory_format", "aten.empty_like.default", "aten.empty_strided.default", "aten.empty_permuted.default",
    "aten.new_empty.default", "aten.new_empty_strided.default",
)  # fmt: skip


@lowers(*EMPTY)
def _empty(site: CallSite) -> Operations | None:
    return ()


def filled(site: CallSite, value: Scalar | sympy.Expr) -> Operations:
    """A kernel that sets every element of the result."""
    dtype = site.result.dtype

    def body(builder: KernelBuilder) -> Value:
        if isinstance(value, sympy.Expr):
            return builder.index(value).cast(dtype)
        return builder.constant(value, dtype)

    return pointwise_kernel(site, site.result, body)


@lowers("aten.full.default", "aten.full_like.default", "aten.new_full.default")
def _full(site: CallSite) -> Operations | None:
    return filled(site, site.number("fill_value"))


@lowers("aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default", "aten.zero.default")
def _zeros(site: CallSite) -> Operations | None:
    return filled(site, 0)


@lowers("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default")
def _ones(site: CallSite) -> Operations | None:
    return filled(site, 1)


@lowers("aten.scalar_tensor.default")
def _scalar_tensor(site: CallSite) -> Operations | None:
    return filled(site, site.number("s"))


@lowers("aten.fill.Scalar")
def _fill(site: CallSite) -> Operations | None:
    return filled(site, site.number("value"))


@lowers("aten.fill.Tensor")
def _fill_tensor(site: CallSite) -> Operations | None:
    return pointwise_kernel(site, site.result, lambda b: moved(b, site.view("value"), site.result.dtype))


def progression(
    builder: KernelBuilder, start: Scalar | sympy.Expr, step: Scalar | sympy.Expr, dtype: torch.dtype
) -> Value:
    """``start + step * i`` along the only dimension."""
    (position,) = builder.outer_coordinates
    whole = all(isinstance(v, (int, sympy.Expr)) for v in (start, step))
    if whole:
        value = builder.index(sympy.sympify(start) + sympy.sympify(step) * position)
        return value.cast(opmath(dtype))
    compute = torch.float64 if dtype in (torch.float32, torch.float64) or not dtype.is_floating_point else torch.float32
    first, by = (
        builder.index(v).cast(compute) if isinstance(v, sympy.Expr) else builder.constant(v, compute)
        for v in (start, step)
    )
    return (first + by * builder.index(position).cast(compute)).cast(opmath(dtype))


@lowers("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(site: CallSite) -> Operations | None:
    start = site.number("start") if "start" in site else 0
    step = site.number("step") if "step" in site else 1
    dtype = site.result.dtype
    if not dtype.is_floating_point:
        # torch truncates both ends before it counts
        start, step = (int(v) if isinstance(v, float) else v for v in (start, step))
    return pointwise_kernel(site, site.result, lambda b: progression(b, start, step, dtype))


@lowers("prims.iota.default")
def _iota(site: CallSite) -> Operations | None:
    start, step = site.number("start"), site.number("step")
    return pointwise_kernel(site, site.result, lambda b: progression(b, start, step, site.result.dtype))


def diagonal_test(builder: KernelBuilder, op: str, diagonal: int | sympy.Expr) -> Value:
    """``column - row <op> diagonal`` in the last two dimensions."""
    row, column = builder.outer_coordinates[-2:]
    return builder.index(column - row).call(op, builder.index(diagonal))


@lowers("aten.eye.default", "aten.eye.m")
def _eye(site: CallSite) -> Operations | None:
    dtype = site.result.dtype

    def body(builder: KernelBuilder) -> Value:
        return diagonal_test(builder, "eq", 0).where(builder.constant(1, dtype), 0)

    return pointwise_kernel(site, site.result, body)


@lowers("aten.tril.default", "aten.triu.default")
def _triangle(site: CallSite) -> Operations | None:
    self, dtype = site.view("self"), site.result.dtype
    op = "le" if ".tril." in site.op.target else "ge"
    if dtype not in SUPPORTED:
        return None

    def body(builder: KernelBuilder) -> Value:
        inside = diagonal_test(builder, op, site.size("diagonal"))
        return inside.where(builder.load_broadcast(self, builder.outer_coordinates), builder.constant(0, dtype))

    return pointwise_kernel(site, site.result, body)
