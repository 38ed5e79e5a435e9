"""Pooling in two dimensions, forward by windows, backward by gathering: every input asks the windows that saw it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..ir.index import FloorDiv
from ..ir.loops import IndexExpr, Size
from ..ir.program import View
from . import operators  # noqa: F401  (defines the operators of memplan's own)
from .builder import KernelBuilder, Value
from .call_site import CallSite, Operations, lowers
from .pointwise import is_empty, pointwise_kernel
from .row_space import row_space

UNROLLED = 25  #: windows of at most this many points become straight code
CONTRIBUTIONS = 36  #: windows that one input may lie in, in straight code


@dataclass(frozen=True, slots=True)
class Window:
    """Size, step, padding and dilation of a window in rows and columns."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, site: CallSite) -> Window:
        size = _pair(site.integers("kernel_size"))
        stride = _pair(site.integers("stride")) if site["stride"] else size
        dilation = _pair(site.integers("dilation")) if "dilation" in site else (1, 1)
        return cls(size, stride, _pair(site.integers("padding")), dilation)

    @property
    def points(self) -> int:
        return self.size[0] * self.size[1]

    def offsets(self) -> Iterator[tuple[int, int]]:
        """Positions inside of the window, row-major."""
        for down in range(self.size[0]):
            for along in range(self.size[1]):
                yield down, along

    def reach(self) -> tuple[int, int]:
        """The most windows that one input lies in, by dimension."""
        spans = (((s - 1) * d + 1, t) for s, d, t in zip(self.size, self.dilation, self.stride, strict=True))
        one, two = (-(-span // step) for span, step in spans)
        return one, two


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def within(builder: KernelBuilder, position: IndexExpr, low: Size, high: Size) -> Value:
    """``low <= position < high``, without the tests that always hold for what the ranges say."""
    value = builder.index(position)
    return (value >= builder.index(low)).both(value < builder.index(high))


def input_point(
    builder: KernelBuilder, window: Window, source: View, down: int, along: int
) -> tuple[tuple[IndexExpr, ...], Value | None]:
    """Coordinates of a window's point in the source, and whether it is inside (None: always)."""
    where = builder.outer_coordinates
    row = where[-2] * window.stride[0] + down * window.dilation[0] - window.padding[0]
    column = where[-1] * window.stride[1] + along * window.dilation[1] - window.padding[1]
    inside: Value | None = None
    for c, size, out, d in (
        (row, source.sizes[-2], builder_size(builder, -2), 0),
        (column, source.sizes[-1], builder_size(builder, -1), 1),
    ):
        offset = (down, along)[d] * window.dilation[d] - window.padding[d]
        known = (
            isinstance(size, int)
            and isinstance(out, int)
            and offset >= 0
            and (out - 1) * window.stride[d] + offset < size
        )
        if not known:
            test = within(builder, c, 0, size)
            inside = test if inside is None else inside.both(test)
    return (*where[:-2], row, column), inside


def builder_size(builder: KernelBuilder, dim: int) -> Size:
    """The outer size along a dimension (1 where it has no range)."""
    coordinate = builder.outer_coordinates[dim]
    sizes = {r.symbol: r.size for r in builder.outer_ranges}
    return sizes.get(coordinate, 1)


# -- maxima -------------------------------------------------------------------------------------------------------


def _windowed_maximum(builder: KernelBuilder, window: Window, source: View) -> tuple[Value, Value]:
    """(largest value, its number within the window): the first of equals, the last NaN, as eager's scan finds it."""
    lowest = -math.inf if source.dtype.is_floating_point else torch.iinfo(source.dtype).min
    offset = _first_inside(builder, window)
    best: Value | None = None
    for k, (down, along) in enumerate(window.offsets()):
        point, inside = input_point(builder, window, source, down, along)
        value = builder.compute(builder.load(source, point, inside, lowest))
        if best is None:
            best = value
            continue
        wins = value > best
        if value.dtype.is_floating_point:
            wins = wins.either(value.call("isnan"))
        best, offset = wins.where(value, best), wins.where(builder.constant(k, torch.int32), offset)
    assert best is not None
    return best, offset


def _first_inside(builder: KernelBuilder, window: Window) -> Value:
    """The number of the window's first point that is not padding: it stands where all are the lowest value."""
    offset = builder.constant(0, torch.int64)
    for d, scale in ((0, window.size[1]), (1, 1)):
        if window.padding[d]:
            missing = builder.index(window.padding[d] - builder.outer_coordinates[d - 2] * window.stride[d])
            step = window.dilation[d]
            offset = offset + (missing.call("maximum", 0) + (step - 1)).call("floordiv", step) * scale
    return offset.cast(torch.int32)


@lowers("memplan.max_pool2d.default")
def _max_pool2d(site: CallSite) -> Operations | None:
    source, window = site.view("self"), Window.of(site)
    if window.points > UNROLLED or source.dtype is torch.bool:
        return None
    return _maximum_kernel(site, source, window, lambda builder, offset: offset)


@lowers("aten.max_pool2d_with_indices.default")
def _max_pool2d_with_indices(site: CallSite) -> Operations | None:
    source, window = site.view("self"), Window.of(site)
    if window.points > UNROLLED or source.dtype is torch.bool:
        return None

    def position(builder: KernelBuilder, offset: Value) -> Value:
        return flat_position(builder, window, offset.cast(torch.int64), source.sizes[-1])

    return _maximum_kernel(site, source, window, position)


def _maximum_kernel(
    site: CallSite, source: View, window: Window, index: Callable[[KernelBuilder, Value], Value]
) -> Operations | None:
    values, indices = site.results
    like = values if values is not None else indices
    if like is None or is_empty(source):
        return None
    if is_empty(like):
        return ()
    builder = KernelBuilder(like.sizes)
    best, offset = _windowed_maximum(builder, window, source)
    if values is not None:
        builder.store(values, builder.outer_coordinates, best)
    if indices is not None:
        builder.store(indices, builder.outer_coordinates, index(builder, offset))
    return (site.kernel(builder),)


def flat_position(builder: KernelBuilder, window: Window, offset: Value, width: Size) -> Value:
    """Row-major position in the input's plane of the window's point number ``offset`` (int64)."""
    row, column = builder.outer_coordinates[-2:]
    down, along = offset.call("floordiv", window.size[1]), offset.call("mod", window.size[1])
    rows = builder.index(row * window.stride[0] - window.padding[0]) + down * window.dilation[0]
    columns = builder.index(column * window.stride[1] - window.padding[1]) + along * window.dilation[1]
    return rows * builder.index(width) + columns


@lowers("memplan.pool_positions.default")
def _pool_positions(site: CallSite) -> Operations | None:
    offsets, window = site.view("offsets"), Window.of(site)

    def body(builder: KernelBuilder) -> Value:
        offset = builder.load(offsets, builder.outer_coordinates).cast(torch.int64)
        return flat_position(builder, window, offset, site.size("width"))

    return pointwise_kernel(site, site.result, body)


# -- gradients ----------------------------------------------------------------------------------------------------


def gathered(
    builder: KernelBuilder,
    window: Window,
    output: View,
    contribution: Callable[[tuple[IndexExpr, ...], Value], Value],
) -> Value:
    """The sum of ``contribution(output point, whether it exists)`` over the windows that may hold this input."""
    where = builder.outer_coordinates
    total: Value | None = None
    reach = window.reach()
    # the last window that can hold row i starts at or before i: number floor((i + padding) / stride)
    last = [FloorDiv(where[d] + window.padding[d], window.stride[d]) for d in (-2, -1)]
    for down in range(reach[0]):
        for along in range(reach[1]):
            row, column = builder.simplify(last[0]) - down, builder.simplify(last[1]) - along
            exists = within(builder, row, 0, output.sizes[-2]).both(within(builder, column, 0, output.sizes[-1]))
            part = contribution((*where[:-2], row, column), exists)
            total = part if total is None else total + part
    assert total is not None
    return total


@lowers("aten.max_pool2d_with_indices_backward.default")
def _max_pool2d_backward(site: CallSite) -> Operations | None:
    grad, indices, window = site.view("grad_output"), site.view("indices"), Window.of(site)
    reach = window.reach()
    if reach[0] * reach[1] > CONTRIBUTIONS or is_empty(grad):
        return None
    width = site.result.sizes[-1]

    def body(builder: KernelBuilder) -> Value:
        row, column = builder.outer_coordinates[-2:]
        here = builder.index(row * width + column)

        def contribution(point: tuple[IndexExpr, ...], exists: Value) -> Value:
            chosen = builder.load(indices, point, exists, -1).equals(here)
            return chosen.where(builder.compute(builder.load(grad, point, exists, 0)), 0)

        return gathered(builder, window, grad, contribution)

    return pointwise_kernel(site, site.result, body)


# -- averages -----------------------------------------------------------------------------------------------------


def _divisor(
    builder: KernelBuilder, site: CallSite, window: Window, source: View, point: Sequence[IndexExpr], dtype: torch.dtype
) -> Value:
    """What the window at output ``point`` divides by."""
    override = site["divisor_override"]
    if override is not None:
        return builder.constant(site.integer("divisor_override"), dtype)
    counts: list[Value] = []
    for d in (0, 1):
        size = builder.index(source.sizes[d - 2])
        start = builder.index(point[d - 2] * window.stride[d] - window.padding[d])
        stop = start + window.size[d]
        if site.flag("count_include_pad"):
            counts.append(stop.call("minimum", size + window.padding[d]) - start)
        else:
            counts.append(stop.call("minimum", size) - start.call("maximum", 0))
    return (counts[0] * counts[1]).cast(dtype)


def _plain_divisor(site: CallSite, window: Window) -> bool:
    """Whether every window is whole, so that all divide by its size."""
    if site["divisor_override"] is not None or site.flag("ceil_mode"):
        return False
    return site.flag("count_include_pad") or window.padding == (0, 0)


@lowers("aten.avg_pool2d.default")
def _avg_pool2d(site: CallSite) -> Operations | None:
    source, window = site.view("self"), Window.of(site)
    if window.points > UNROLLED or not source.dtype.is_floating_point or is_empty(source):
        return None

    def body(builder: KernelBuilder) -> Value:
        total: Value | None = None
        for down, along in window.offsets():
            point, inside = input_point(builder, window, source, down, along)
            value = builder.compute(builder.load(source, point, inside, 0))
            total = value if total is None else total + value
        assert total is not None
        if _plain_divisor(site, window):
            return total / window.points
        return total / _divisor(builder, site, window, source, builder.outer_coordinates, total.dtype)

    return pointwise_kernel(site, site.result, body)


@lowers("aten.avg_pool2d_backward.default")
def _avg_pool2d_backward(site: CallSite) -> Operations | None:
    grad, source, window = site.view("grad_output"), site.view("self"), Window.of(site)
    reach = window.reach()
    if reach[0] * reach[1] > CONTRIBUTIONS or not grad.dtype.is_floating_point or is_empty(grad):
        return None

    def body(builder: KernelBuilder) -> Value:
        here = builder.outer_coordinates[-2:]

        def contribution(point: tuple[IndexExpr, ...], exists: Value) -> Value:
            for d in (0, 1):
                beyond = point[d - 2] * window.stride[d] - window.padding[d] + window.size[d]
                exists = exists.both(builder.index(here[d]) < builder.index(beyond))
            value = builder.compute(builder.load(grad, point, exists, 0))
            if _plain_divisor(site, window):
                return value / window.points
            divisor = _divisor(builder, site, window, source, point, value.dtype)
            return exists.where(value / divisor, 0)

        return gathered(builder, window, grad, contribution)

    return pointwise_kernel(site, site.result, body)


# -- adaptive averages --------------------------------------------------------------------------------------------


def _even_windows(source: View, result: View) -> tuple[int, int] | None:
    """The windows' size where they divide the source evenly."""
    out = []
    for d in (-2, -1):
        size, count = source.sizes[d], result.sizes[d]
        if not isinstance(size, int) or not isinstance(count, int) or count == 0 or size % count:
            return None
        out.append(size // count)
    return out[0], out[1]


@lowers("aten._adaptive_avg_pool2d.default")
def _adaptive_avg_pool2d(site: CallSite) -> Operations | None:
    source, result = site.view("self"), site.result
    even = _even_windows(source, result)
    if even is None or not source.dtype.is_floating_point or is_empty(source):
        return None
    lead = len(source.sizes) - 2
    rows, columns = source.strides[-2:]
    # the plane as windows and points within them
    windows = View(
        source.buffer,
        source.dtype,
        (*source.sizes[:-2], result.sizes[-2], even[0], result.sizes[-1], even[1]),
        (*source.strides[:-2], rows * even[0], rows, columns * even[1], columns),
        source.offset,
    )
    space = row_space(windows.sizes, frozenset({lead + 1, lead + 3}))
    total = space.builder.reduce("sum", space.load(windows))
    space.builder.store(result, space.kept, total / (even[0] * even[1]))
    return (site.kernel(space.builder),)


@lowers("aten._adaptive_avg_pool2d_backward.default")
def _adaptive_avg_pool2d_backward(site: CallSite) -> Operations | None:
    grad, result = site.view("grad_output"), site.result
    even = _even_windows(result, grad)
    if even is None or is_empty(grad):
        return None

    def body(builder: KernelBuilder) -> Value:
        where = builder.outer_coordinates
        row, column = (builder.simplify(FloorDiv(where[d], even[d])) for d in (-2, -1))
        return builder.compute(builder.load(grad, (*where[:-2], row, column))) / (even[0] * even[1])

    return pointwise_kernel(site, result, body)
