"""Resizing: nearest neighbours in one to three dimensions, linear interpolation in one and two, and a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ir.index import FloorDiv
from ..ir.loops import IndexExpr, Size
from ..ir.program import View
from .builder import KernelBuilder, Value
from .call_site import CallSite, Operations, lowers, resolve
from .pointwise import is_empty, pointwise_kernel

_SCALES = {1: ("scales",), 2: ("scales_h", "scales_w"), 3: ("scales_d", "scales_h", "scales_w")}


def _given_scales(site: CallSite, rank: int) -> list[float | None]:
    """Factors that the caller stated; they decide in place of the sizes' ratio."""
    return [None if site[name] is None else site.real(name) for name in _SCALES[rank]]


def _known(sizes: Sequence[Size]) -> bool:
    return all(isinstance(s, int) for s in sizes)


def nearest_index(
    builder: KernelBuilder, position: IndexExpr, size: int, count: int, scale: float | None, exact: bool
) -> IndexExpr:
    """The source position of ``position`` of ``count``: ``floor(position * size / count)`` in float32, as eager."""
    if scale is None and not exact and count % size == 0:
        return builder.simplify(FloorDiv(position, count // size))
    ratio = float(torch.tensor(size / count if scale is None or scale <= 0 else 1 / scale, dtype=torch.float32))
    value = builder.index(position).cast(torch.float32)
    if exact:
        value = value + 0.5
    found = (value * ratio).call("floor").cast(torch.int64)
    return found.call("minimum", size - 1).symbol()


def _nearest(site: CallSite, rank: int, exact: bool) -> Operations | None:
    source, result = site.view("self"), site.result
    if not _known(source.sizes[-rank:]) or not _known(result.sizes[-rank:]) or is_empty(source):
        return None
    scales = _given_scales(site, rank)

    def body(builder: KernelBuilder) -> Value:
        where = list(builder.outer_coordinates)
        for k in range(rank):
            d = len(where) - rank + k
            size, count = int(source.sizes[d]), int(result.sizes[d])
            where[d] = nearest_index(builder, where[d], size, count, scales[k], exact)
        return builder.load(source, where)

    return pointwise_kernel(site, result, body)


def _register_nearest() -> None:
    for rank in (1, 2, 3):
        for prefix, exact in (("upsample_nearest", False), ("_upsample_nearest_exact", True)):
            target = f"aten.{prefix}{rank}d.default"
            if resolve(target) is None:
                continue

            def lowering(site: CallSite, rank: int = rank, exact: bool = exact) -> Operations | None:
                return _nearest(site, rank, exact)

            lowers(target)(lowering)


_register_nearest()


@lowers("aten.upsample_nearest2d_backward.default")
def _upsample_nearest2d_backward(site: CallSite) -> Operations | None:
    """By gathering, where every source element has a whole block of outputs."""
    grad, result = site.view("grad_output"), site.result
    if not _known(grad.sizes[-2:]) or not _known(result.sizes[-2:]) or is_empty(grad):
        return None
    if any(s is not None for s in _given_scales(site, 2)):
        return None
    blocks = [int(grad.sizes[d]) // int(result.sizes[d]) for d in (-2, -1)]
    if any(int(grad.sizes[d]) % int(result.sizes[d]) for d in (-2, -1)) or blocks[0] * blocks[1] > 16:
        return None

    def body(builder: KernelBuilder) -> Value:
        where = builder.outer_coordinates
        total: Value | None = None
        for down in range(blocks[0]):
            for along in range(blocks[1]):
                point = (*where[:-2], where[-2] * blocks[0] + down, where[-1] * blocks[1] + along)
                value = builder.compute(builder.load(grad, point))
                total = value if total is None else total + value
        assert total is not None
        return total

    return pointwise_kernel(site, result, body)


# -- linear interpolation -----------------------------------------------------------------------------------------


def linear_points(
    builder: KernelBuilder,
    position: IndexExpr,
    size: int,
    count: int,
    scale: float | None,
    align: bool,
    dtype: torch.dtype,
) -> tuple[Value, Value, Value]:
    """(lower position, upper position, weight of the upper) along one dimension."""
    index = builder.index(position).cast(dtype)
    if align:
        ratio = (size - 1) / (count - 1) if count > 1 else 0.0
        at = index * ratio
    else:
        ratio = size / count if scale is None or scale <= 0 else 1 / scale
        at = ((index + 0.5) * ratio - 0.5).call("maximum", 0)
    low = at.cast(torch.int64).call("minimum", size - 1)
    high = (low + 1).call("minimum", size - 1)
    weight = (at - low.cast(dtype)).call("maximum", 0).call("minimum", 1)
    return low, high, weight


def _linear(site: CallSite, source: View, rank: int) -> Operations | None:
    result = site.result
    if not _known(source.sizes[-rank:]) or not _known(result.sizes[-rank:]) or is_empty(source):
        return None
    if not source.dtype.is_floating_point:
        return None
    scales, align = _given_scales(site, rank), site.flag("align_corners")

    def body(builder: KernelBuilder) -> Value:
        where = builder.outer_coordinates
        lead = where[: len(where) - rank]
        compute = torch.float64 if source.dtype is torch.float64 else torch.float32
        ends = [
            linear_points(
                builder,
                where[d - rank],
                int(source.sizes[d - rank]),
                int(result.sizes[d - rank]),
                scales[d],
                align,
                compute,
            )
            for d in range(rank)
        ]

        def interpolated(fixed: tuple[IndexExpr, ...]) -> Value:
            if len(fixed) == rank:
                return builder.compute(builder.load(source, (*lead, *fixed)))
            low, high, weight = ends[len(fixed)]
            one, other = interpolated((*fixed, low.symbol())), interpolated((*fixed, high.symbol()))
            return one * (1 - weight) + other * weight

        return interpolated(())

    return pointwise_kernel(site, result, body)


@lowers("aten.upsample_linear1d.default")
def _upsample_linear1d(site: CallSite) -> Operations | None:
    return _linear(site, site.view("self"), 1)


@lowers("aten.upsample_bilinear2d.default")
def _upsample_bilinear2d(site: CallSite) -> Operations | None:
    return _linear(site, site.view("self"), 2)
