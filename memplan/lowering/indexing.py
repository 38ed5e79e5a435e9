"""Reading at computed positions: embedding, gather, index, index_select, take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ir.index import FloorDiv, Mod
from ..ir.loops import CHECKED_INDEX, IndexExpr, Size
from ..ir.program import View
from .builder import ZERO, KernelBuilder, Value
from .call_site import CallSite, Operations, lowers
from .pointwise import is_empty, pointwise_kernel

INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.int8})


def wrapped(value: Value, size: Size) -> Value:
    """A position that may count from the end."""
    value = value.cast(torch.int64)
    end = value.builder.index(size)
    return (value < 0).where(value + end, value)


def load_position(builder: KernelBuilder, view: View, coordinates: Sequence[IndexExpr]) -> Value:
    return builder.load_broadcast(view, coordinates).cast(torch.int64)


def in_range(site: CallSite, position: Value, size: Size) -> Value:
    """A position that eager would refuse unless it is below ``size`` and not negative."""
    if not site.context.config.check_indices:
        return position
    return position.call(CHECKED_INDEX, position.builder.index(size))


def unchanged(position: Value, checked: Value) -> Value | None:
    """Whether a checked position is the one that was given; None where nothing was checked.

    Stores happen where it is: nothing is written elsewhere, whatever error follows.
    """
    return None if checked.position == position.position else position.equals(checked)


@lowers("aten.embedding.default")
def _embedding(site: CallSite) -> Operations | None:
    weight, indices = site.view("weight"), site.view("indices")
    if is_empty(weight):
        return None

    def body(builder: KernelBuilder) -> Value:
        row = in_range(site, load_position(builder, indices, builder.outer_coordinates[:-1]), weight.sizes[0])
        return builder.load(weight, (row.symbol(), builder.outer_coordinates[-1]))

    return pointwise_kernel(site, site.result, body)


@lowers("aten.gather.default")
def _gather(site: CallSite) -> Operations | None:
    source, index, result = site.view("self"), site.view("index"), site.result
    dim = site.dim("dim", len(source.sizes))

    def body(builder: KernelBuilder) -> Value:
        where = builder.outer_coordinates
        position = builder.load(index, where).cast(torch.int64) if where else builder.load(index, ())
        if not source.sizes:
            return builder.load(source, ())
        symbol = in_range(site, position.cast(torch.int64), source.sizes[dim]).symbol()
        return builder.load(source, [symbol if d == dim else c for d, c in enumerate(where or (ZERO,))])

    if len(index.sizes) != len(source.sizes) or is_empty(source):
        return None
    return pointwise_kernel(site, result, body)


@lowers("aten.index_select.default")
def _index_select(site: CallSite) -> Operations | None:
    source, index = site.view("self"), site.view("index")
    dim = site.dim("dim", len(source.sizes))
    if not source.sizes:
        return pointwise_kernel(site, site.result, lambda b: b.load(source, ()))
    if is_empty(source):
        return None

    def body(builder: KernelBuilder) -> Value:
        where = list(builder.outer_coordinates)
        at = (where[dim],) if index.sizes else ()
        where[dim] = in_range(site, load_position(builder, index, at), source.sizes[dim]).symbol()
        return builder.load(source, where)

    return pointwise_kernel(site, site.result, body)


def advanced_positions(
    site: CallSite,
    builder: KernelBuilder,
    source: View,
    indices: Sequence[View | None],
    coordinates: Sequence[IndexExpr],
) -> tuple[list[IndexExpr], Value | None]:
    """Coordinates in ``source`` of the point ``coordinates`` of the indexed result, by numpy's rules.

    They are checked unless the operator says that it is unsafe; with them comes whether all of them are in range (None
    without a check). The index tensors broadcast together; their dimensions stand where the first of them stood if
    they are next to each other, and in front otherwise.
    """
    present = [d for d, v in enumerate(indices) if v is not None]
    rank = max((len(v.sizes) for v in indices if v is not None), default=0)
    adjacent = present == list(range(present[0], present[-1] + 1))
    start = present[0] if adjacent else 0
    block = coordinates[start : start + rank]
    rest = iter([*coordinates[:start], *coordinates[start + rank :]])
    out: list[IndexExpr] = []
    inside: Value | None = None
    for d, size in enumerate(source.sizes):
        view = indices[d] if d < len(indices) else None
        if view is None:
            out.append(next(rest))
        else:
            position = wrapped(load_position(builder, view, block), size)
            unsafe = site.op.target.startswith("aten._unsafe_")
            checked = position if unsafe else in_range(site, position, size)
            same = unchanged(position, checked)
            inside = same if inside is None or same is None else inside.both(same)
            out.append(checked.symbol())
    return out, inside


def index_views(site: CallSite) -> list[View | None] | None:
    """The index tensors; None where one is a mask (its result's size is known only afterwards)."""
    found = site["indices"]
    assert isinstance(found, tuple)
    views = [v if isinstance(v, View) else None for v in found]
    if any(v is not None and v.dtype not in INDEX_DTYPES for v in views) or all(v is None for v in views):
        return None
    return views


@lowers("aten.index.Tensor", "aten._unsafe_index.Tensor")
def _index(site: CallSite) -> Operations | None:
    source, indices = site.view("self"), index_views(site)
    if indices is None or is_empty(source):
        return None

    def body(builder: KernelBuilder) -> Value:
        where, _ = advanced_positions(site, builder, source, indices, builder.outer_coordinates)
        return builder.load(source, where)

    return pointwise_kernel(site, site.result, body)


@lowers("aten._unsafe_masked_index.default")
def _masked_index(site: CallSite) -> Operations | None:
    source, indices, mask = site.view("self"), index_views(site), site.view("mask")
    if indices is None or any(v is None for v in indices):
        return None
    fill = site.scalar("fill")

    def body(builder: KernelBuilder) -> Value:
        inside = builder.load_broadcast(mask, builder.outer_coordinates)
        where, _ = advanced_positions(site, builder, source, indices, builder.outer_coordinates)
        return builder.load(source, where, inside, fill)

    return pointwise_kernel(site, site.result, body)


@lowers("aten.take.default")
def _take(site: CallSite) -> Operations | None:
    source, index = site.view("self"), site.view("index")
    if is_empty(source) or not all(isinstance(s, int) for s in source.sizes):
        return None

    def body(builder: KernelBuilder) -> Value:
        position = wrapped(builder.load(index, builder.outer_coordinates), source.numel)
        position = in_range(site, position, source.numel)
        return builder.load(source, row_major(builder, position.symbol(), source.sizes))

    return pointwise_kernel(site, site.result, body)


def row_major(builder: KernelBuilder, position: IndexExpr, sizes: Sequence[Size]) -> list[IndexExpr]:
    """Coordinates of row-major ``position``, by floor divisions and moduli."""
    out: list[IndexExpr] = []
    stride: Size = 1
    for d in range(len(sizes) - 1, -1, -1):
        size = sizes[d]
        inner = FloorDiv(position, stride)
        out.append(ZERO if size == 1 else inner if d == 0 else Mod(inner, size))
        stride = stride * size
    return [builder.simplify(e) for e in reversed(out)]
