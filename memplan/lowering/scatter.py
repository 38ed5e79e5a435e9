"""Writing at computed positions: scatter, index_put, the gradients of embedding and of indexing.

Each is a copy (or a fill) of what was there, then a kernel that changes it, so that clone elimination can leave out
the copy. Accumulation is atomic; where deterministic algorithms are demanded, eager's own call runs instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..ir.loops import StoreMode
from ..ir.program import View
from .arithmetic import converted_kernel
from .builder import KernelBuilder, Value
from .call_site import SUPPORTED, CallSite, Operations, lowers
from .creation import filled
from .indexing import advanced_positions, in_range, index_views, load_position, unchanged
from .pointwise import is_empty

#: dtypes that atomic addition exists for on every device, in the precision that eager adds in
ATOMIC = frozenset({torch.float32, torch.float64, torch.int32, torch.int64})
_MODES = {"sum": StoreMode.ADD, "amax": StoreMode.MAX, "amin": StoreMode.MIN, "add": StoreMode.ADD}


def scatter_kernel(
    site: CallSite, index: View, value: Callable[[KernelBuilder], Value], mode: StoreMode
) -> Operations | None:
    """The result already holds what was there; write ``value`` of every point of ``index`` along ``dim``."""
    result = site.result
    if len(index.sizes) != len(result.sizes):
        return None
    builder = KernelBuilder(index.sizes)
    where = list(builder.outer_coordinates)
    inside = None
    if result.sizes:
        dim = site.dim("dim", len(result.sizes))
        position = load_position(builder, index, builder.outer_coordinates)
        checked = in_range(site, position, result.sizes[dim])
        inside, where[dim] = unchanged(position, checked), checked.symbol()
    builder.store(result, where, value(builder).cast(result.dtype), mode, inside)
    return (site.kernel(builder, mutates=(result.buffer,)),)


def _scattered(site: CallSite, value: Callable[[KernelBuilder], Value], mode: StoreMode) -> Operations | None:
    self, index = site.view("self"), site.view("index")
    if self.dtype not in SUPPORTED or site.context.deterministic or is_empty(self):
        return None
    if mode is not StoreMode.SET and self.dtype not in ATOMIC:
        return None
    copy = converted_kernel(site, self, site.result, "copy")
    if is_empty(index):
        return copy
    written = scatter_kernel(site, index, value, mode)
    return None if written is None else (*copy, *written)


@lowers("aten.scatter.src", "aten.scatter_add.default")
def _scatter(site: CallSite) -> Operations | None:
    mode = StoreMode.ADD if "scatter_add" in site.op.target else StoreMode.SET
    source = site.view("src")
    return _scattered(site, lambda b: b.load(source, b.outer_coordinates), mode)


@lowers("aten.scatter.value")
def _scatter_value(site: CallSite) -> Operations | None:
    return _scattered(site, lambda b: b.constant(site.scalar("value"), site.result.dtype), StoreMode.SET)


@lowers("aten.scatter.reduce")
def _scatter_reduce_old(site: CallSite) -> Operations | None:
    mode = _MODES.get(site.text("reduce"))
    source = site.view("src")
    return None if mode is None else _scattered(site, lambda b: b.load(source, b.outer_coordinates), mode)


@lowers("aten.scatter_reduce.two")
def _scatter_reduce(site: CallSite) -> Operations | None:
    mode, source = _MODES.get(site.text("reduce")), site.view("src")
    if mode is None or not site.flag("include_self"):
        return None
    if mode is not StoreMode.ADD and source.dtype.is_floating_point:
        return None  # an atomic extremum would lose NaN
    return _scattered(site, lambda b: b.load(source, b.outer_coordinates), mode)


# -- index_put ----------------------------------------------------------------------------------------------------


@lowers("aten.index_put.default", "aten._unsafe_index_put.default")
def _index_put(site: CallSite) -> Operations | None:
    self, values, indices = site.view("self"), site.view("values"), index_views(site)
    accumulate = site.flag("accumulate")
    if indices is None or self.dtype not in SUPPORTED or site.context.deterministic or is_empty(self):
        return None
    if accumulate and self.dtype not in ATOMIC:
        return None
    copy = converted_kernel(site, self, site.result, "copy")
    sizes = indexed_sizes(self, indices)
    if any(s == 0 for s in sizes):
        return copy
    if len(values.sizes) > len(sizes):
        return None
    builder = KernelBuilder(sizes)
    where, inside = advanced_positions(site, builder, self, indices, builder.outer_coordinates)
    value = builder.load_broadcast(values, builder.outer_coordinates).cast(self.dtype)
    builder.store(site.result, where, value, StoreMode.ADD if accumulate else StoreMode.SET, inside)
    return (*copy, site.kernel(builder, mutates=(site.result.buffer,)))


def indexed_sizes(source: View, indices: list[View | None]) -> list[object]:
    """Sizes of ``source[indices]``."""
    present = [d for d, v in enumerate(indices) if v is not None]
    rank = max(len(v.sizes) for v in indices if v is not None)
    block: list[object] = [1] * rank
    for view in indices:
        if view is not None:
            for k, size in enumerate(view.sizes, start=rank - len(view.sizes)):
                block[k] = size if block[k] == 1 else block[k]
    rest = [s for d, s in enumerate(source.sizes) if d >= len(indices) or indices[d] is None]
    adjacent = present == list(range(present[0], present[-1] + 1))
    start = present[0] if adjacent else 0
    return [*rest[:start], *block, *rest[start:]]


@lowers("aten.index_add.default")
def _index_add(site: CallSite) -> Operations | None:
    self, index, source = site.view("self"), site.view("index"), site.view("source")
    if self.dtype not in ATOMIC or site.context.deterministic or not self.sizes or is_empty(self):
        return None
    if len(index.sizes) != 1 or len(source.sizes) != len(self.sizes):
        return None
    copy = converted_kernel(site, self, site.result, "copy")
    if is_empty(source):
        return copy
    dim = site.dim("dim", len(self.sizes))
    builder = KernelBuilder(source.sizes)
    where = list(builder.outer_coordinates)
    value = builder.load(source, where).cast(self.dtype)
    alpha = site.scalar("alpha")
    position = load_position(builder, index, (where[dim],))
    checked = in_range(site, position, self.sizes[dim])
    where[dim] = checked.symbol()
    inside = unchanged(position, checked)
    builder.store(site.result, where, value * alpha if alpha != 1 else value, StoreMode.ADD, inside)
    return (*copy, site.kernel(builder, mutates=(site.result.buffer,)))


# -- gradient of embedding ----------------------------------------------------------------------------------------


@lowers("aten.embedding_dense_backward.default")
def _embedding_dense_backward(site: CallSite) -> Operations | None:
    grad, indices, result = site.view("grad_output"), site.view("indices"), site.result
    if result.dtype not in ATOMIC or site.context.deterministic or site.flag("scale_grad_by_freq"):
        return None
    fill = filled(site, 0)
    fill = tuple(site.operation(op.kernel, "fill") for op in fill)
    if is_empty(grad):
        return fill
    builder = KernelBuilder(grad.sizes)
    where = builder.outer_coordinates
    row = load_position(builder, indices, where[:-1])
    checked = in_range(site, row, result.sizes[0])
    mask = unchanged(row, checked)
    padding = site.integer("padding_idx")
    if padding >= 0:
        differs = row.differs(padding)
        mask = differs if mask is None else mask.both(differs)
    builder.store(result, (checked.symbol(), where[-1]), builder.load(grad, where), StoreMode.ADD, mask)
    return (*fill, site.kernel(builder, mutates=(result.buffer,)))
