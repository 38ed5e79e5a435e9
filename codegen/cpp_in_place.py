"""Whether an emitted CPU kernel may write a buffer over one that it reads."""

from __future__ import annotations

import sympy

from memplan.ir.index import expand, is_nonnegative
from memplan.ir.loops import Kernel, Level, Range, StoreMode

from .cpp_loops import stride
from .cpp_schedule import pass_variants, point_buffers_by_pass


def safe_in_place(kernel: Kernel, load_buffer: str, store_buffer: str) -> bool:
    """Whether ``store_buffer`` may be given the storage of ``load_buffer`` (which nobody reads afterwards).

    True only if every element is read by the very point that writes it, and in no later pass over the row than the one
    that writes it: items of equal size, one index for all loads and stores of the two, which no two points share.
    Row kernels keep a row inside one thread, or synchronise all threads between passes, so a row may be overwritten in
    the last pass that reads it. Holds whatever sizes the kernel is emitted for.
    """
    loads = [n for n in kernel.loads if n.buffer == load_buffer]
    stores = [s for s in kernel.stores if s.buffer == store_buffer]
    if not loads or not stores or store_buffer in kernel.read_buffers or load_buffer in kernel.written_buffers:
        return False
    if any(s.mode is not StoreMode.SET for s in stores):
        return False
    if len({n.dtype.itemsize for n in loads} | {s.dtype.itemsize for s in stores}) != 1:
        return False
    return all(_safe(variant, load_buffer, store_buffer) for variant in pass_variants(kernel))


def _safe(kernel: Kernel, load_buffer: str, store_buffer: str) -> bool:
    """The test on one normal form of the kernel (equal loads are one load in it)."""
    stores = [s for s in kernel.stores if s.buffer == store_buffer]
    indices = {n.index for n in kernel.loads if n.buffer == load_buffer} | {s.index for s in stores}
    if len(indices) > 1:
        return False
    levels = {kernel.store_level(s) for s in stores}
    if len(levels) > 1:
        return False
    per_point = levels == {Level.POINT}
    ranges = (*kernel.outer, *kernel.row) if per_point else kernel.outer
    (index,) = indices
    if not distinct(index, ranges):
        return False
    if not per_point:
        return True
    return _never_read_later(kernel, load_buffer, store_buffer)


def _never_read_later(kernel: Kernel, load_buffer: str, store_buffer: str) -> bool:
    written = False
    for read, stored in point_buffers_by_pass(kernel):
        if written and load_buffer in read:
            return False
        written = written or store_buffer in stored
    return True


def distinct(index: sympy.Expr, ranges: tuple[Range, ...]) -> bool:
    """Whether no two points of the ranges have the same index (strides nest); False if that cannot be proved."""
    strides: list[tuple[sympy.Expr, Range]] = []
    for r in ranges:
        if r.size == 1:
            continue
        step = stride(index, r.symbol)
        if step is None or step == 0 or not is_nonnegative(step):
            return False
        strides.append((step, r))
    extent = sympy.Integer(1)
    while strides:
        found = next((p for p in strides if all(is_nonnegative(q[0] - p[0]) for q in strides)), None)
        if found is None or not is_nonnegative(expand(found[0] - extent)):
            return False
        strides.remove(found)
        extent = expand(extent + found[0] * (sympy.sympify(found[1].size) - 1))
    return True
