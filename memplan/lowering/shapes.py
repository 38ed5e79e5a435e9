"""Moving elements: concatenation, padding, flips, rolls, repeats, and slices written into a copy."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from ..ir.index import FloorDiv, Mod
from ..ir.loops import IndexExpr, Scalar, Size
from ..ir.program import View
from .arithmetic import converted_kernel
from .builder import ZERO, KernelBuilder, Value
from .call_site import SUPPORTED, CallSite, Operations, lowers
from .pointwise import is_empty, pointwise_kernel

SELECT_PARTS = 4  #: a concatenation of at most this many parts may be one kernel that selects


def contiguous_strides(sizes: Sequence[Size]) -> tuple[Size, ...]:
    out: list[Size] = []
    stride: Size = 1
    for size in reversed(sizes):
        out.append(stride)
        stride = stride * size
    return tuple(reversed(out))


# -- concatenation ------------------------------------------------------------------------------------------------


@lowers("aten.cat.default")
def _cat(site: CallSite) -> Operations | None:
    parts = [v for v in site.views("tensors") if v.sizes != (0,)]
    if not parts:
        return None
    dim = site.dim("dim", len(site.result.sizes))
    return concatenated(site, parts, dim)


@lowers("aten.stack.default")
def _stack(site: CallSite) -> Operations | None:
    result = site.result
    dim = site.dim("dim", len(result.sizes))
    parts = [
        View(v.buffer, v.dtype, (*v.sizes[:dim], 1, *v.sizes[dim:]), (*v.strides[:dim], 1, *v.strides[dim:]), v.offset)
        for v in site.views("tensors")
    ]
    return concatenated(site, parts, dim)


def concatenated(site: CallSite, parts: Sequence[View], dim: int) -> Operations | None:
    """One kernel a part, writing into its slice; or one that selects, where consumers can take that in.

    A kernel per part lets producers write straight into their slice. Where only kernels read the result, one
    selecting kernel can be fused into these, and the result itself is never written.
    """
    result = site.result
    if any(p.dtype not in SUPPORTED for p in parts):
        return None
    if is_empty(result):
        return ()
    if 1 < len(parts) <= SELECT_PARTS and site.context.kernel_readers.get(result.buffer, False):
        return selected(site, parts, dim)
    out: list[Operations] = []
    start: Size = 0
    for k, part in enumerate(parts):
        size = part.sizes[dim]
        if not is_empty(part):
            piece = View(
                result.buffer,
                result.dtype,
                (*result.sizes[:dim], size, *result.sizes[dim + 1 :]),
                result.strides,
                result.offset + start * result.strides[dim],
            )
            out.append(converted_kernel(site, part, piece, f"part{k}"))
        start = start + size
    return tuple(op for group in out for op in group)


def selected(site: CallSite, parts: Sequence[View], dim: int) -> Operations:
    """One kernel over the whole result, each part read where its mask holds."""
    result = site.result

    def body(builder: KernelBuilder) -> Value:
        where = list(builder.outer_coordinates)
        along = where[dim]
        position = builder.index(along)
        pieces: list[tuple[Value, Value]] = []
        start: Size = 0
        for k, part in enumerate(parts):
            stop = start + part.sizes[dim]
            below = position < builder.index(stop)
            mask = below if k == 0 else position >= builder.index(start)
            inside = mask if k in (0, len(parts) - 1) else mask.both(below)
            # of a part that is one thick only one place is read: said so, it keeps the address's alignment provable
            where[dim] = ZERO if part.sizes[dim] == 1 else along - start
            pieces.append((below, builder.load(part, where, inside).cast(result.dtype)))
            start = stop
        value = pieces[-1][1]
        for below, piece in reversed(pieces[:-1]):
            value = below.where(piece, value)
        return value

    return pointwise_kernel(site, result, body)


# -- padding ------------------------------------------------------------------------------------------------------


def load_padded(
    builder: KernelBuilder,
    source: View,
    where: Sequence[IndexExpr],
    before: Sequence[Size],
    room: Sequence[Size],
    fill: Scalar,
) -> Value:
    """``source`` at ``where - before``, and ``fill`` outside of it; ``room`` are the sizes of the padded space."""
    point: list[IndexExpr] = []
    inside: Value | None = None
    for c, low, size, whole in zip(where, before, source.sizes, room, strict=True):
        point.append(c - low)
        tests = []
        if low != 0:
            tests.append(builder.index(c - low) >= 0)
        if size + low != whole:
            tests.append(builder.index(c - low) < builder.index(size))
        for test in tests:
            inside = test if inside is None else inside.both(test)
    return builder.load(source, point, inside, fill)


@lowers("aten.constant_pad_nd.default")
def _constant_pad(site: CallSite) -> Operations | None:
    source, result, pad = site.view("self"), site.result, site.sizes("pad")
    if source.dtype not in SUPPORTED:
        return None
    fill = site.scalar("value")
    rank = len(source.sizes)
    before: list[Size] = [0] * rank
    for k in range(len(pad) // 2):
        before[rank - 1 - k] = pad[2 * k]
    fill = bool(fill) if source.dtype is torch.bool else fill if source.dtype.is_floating_point else int(fill)
    pieces = _padded_rows(site, source, before, fill)
    if pieces is not None:
        return pieces

    def body(builder: KernelBuilder) -> Value:
        if is_empty(source):
            return builder.constant(fill, source.dtype)
        return load_padded(builder, source, builder.outer_coordinates, before, result.sizes, fill)

    return pointwise_kernel(site, result, body)


def _padded_rows(site: CallSite, source: View, before: Sequence[Size], fill: Scalar) -> Operations | None:
    """Rows above and below as kernels of their own, so that the call that makes ``source`` can write between them.

    None where it could not: `Concat` moves what a call makes only whole, and a product writes badly into rows that are
    padded at their ends. Not where kernels alone read the result either, which take the padding in themselves.
    """
    result = site.result
    padded = [d for d, (a, b) in enumerate(zip(source.sizes, result.sizes, strict=True)) if a != b or before[d] != 0]
    if len(padded) != 1 or padded[0] == len(source.sizes) - 1 or source.buffer not in site.context.made_by_calls:
        return None
    (dim,) = padded
    start, stop = before[dim], before[dim] + source.sizes[dim]
    sizes = [start, result.sizes[dim] - stop]
    if any(not isinstance(n, int) or n < 0 for n in sizes) or is_empty(source):
        return None
    if source.dtype is not result.dtype or site.context.kernel_readers.get(result.buffer, False):
        return None

    def rows(first: Size, count: Size) -> View:
        shape = (*result.sizes[:dim], count, *result.sizes[dim + 1 :])
        return View(result.buffer, result.dtype, shape, result.strides, result.offset + first * result.strides[dim])

    out = converted_kernel(site, source, rows(start, source.sizes[dim]), "inside")
    for name, first, count in (("above", 0, sizes[0]), ("below", stop, sizes[1])):
        if count:
            out += pointwise_kernel(
                site, rows(first, count), lambda builder: builder.constant(fill, source.dtype), name
            )
    return out


def reflected(builder: KernelBuilder, position: IndexExpr, size: Size) -> IndexExpr:
    """``position`` folded back at both ends: ``size - 1 - |size - 1 - |position||``."""
    inner = builder.index(position).call("abs")
    return (builder.index(size - 1) - (builder.index(size - 1) - inner).call("abs")).symbol()


def replicated(builder: KernelBuilder, position: IndexExpr, size: Size) -> IndexExpr:
    """``position`` held within the ends."""
    return builder.index(position).call("maximum", 0).call("minimum", builder.index(size - 1)).symbol()


@lowers(
    "aten.reflection_pad1d.default", "aten.reflection_pad2d.default", "aten.reflection_pad3d.default",
    "aten.replication_pad1d.default", "aten.replication_pad2d.default", "aten.replication_pad3d.default",
)  # fmt: skip
def _mirrored_pad(site: CallSite) -> Operations | None:
    source, pad = site.view("self"), site.sizes("padding")
    if source.dtype not in SUPPORTED or is_empty(source):
        return None
    fold = reflected if "reflection" in site.op.target else replicated

    def body(builder: KernelBuilder) -> Value:
        where = list(builder.outer_coordinates)
        rank = len(where)
        for k in range(len(pad) // 2):
            d = rank - 1 - k
            where[d] = fold(builder, where[d] - pad[2 * k], source.sizes[d])
        return builder.load(source, where)

    return pointwise_kernel(site, site.result, body)


# -- permutations of elements -------------------------------------------------------------------------------------


@lowers("aten.flip.default", "prims.rev.default")
def _flip(site: CallSite) -> Operations | None:
    source = site.view("self" if "self" in site else "a")
    dims = {d % len(source.sizes) for d in site.integers("dims")} if source.sizes else set()

    def body(builder: KernelBuilder) -> Value:
        where = [source.sizes[d] - 1 - c if d in dims else c for d, c in enumerate(builder.outer_coordinates)]
        return builder.load(source, where)

    return pointwise_kernel(site, site.result, body)


@lowers("aten.roll.default")
def _roll(site: CallSite) -> Operations | None:
    source, shifts, dims = site.view("self"), site.sizes("shifts"), site.integers("dims")
    if not dims or not source.sizes:
        return None
    total: dict[int, Size] = {}
    for shift, dim in zip(shifts, dims, strict=True):
        total[dim % len(source.sizes)] = total.get(dim % len(source.sizes), 0) + shift

    def body(builder: KernelBuilder) -> Value:
        where = list(builder.outer_coordinates)
        for d, shift in total.items():
            size = source.sizes[d]
            if size != 1:
                where[d] = Mod(where[d] + Mod(-sympy.sympify(shift), size), size)
        return builder.load(source, where)

    return pointwise_kernel(site, site.result, body)


@lowers("aten.repeat.default")
def _repeat(site: CallSite) -> Operations | None:
    source, result = site.view("self"), site.result
    skip = len(result.sizes) - len(source.sizes)

    def body(builder: KernelBuilder) -> Value:
        where = [
            ZERO if size == 1 else c if size == whole else Mod(c, size)
            for c, size, whole in zip(builder.outer_coordinates[skip:], source.sizes, result.sizes[skip:], strict=True)
        ]
        return builder.load(source, where)

    return pointwise_kernel(site, result, body)


# -- a part written into a copy -----------------------------------------------------------------------------------


def written_into_copy(site: CallSite, source: View, part: View, target: View) -> Operations | None:
    """A copy of ``source`` as the result, then ``part`` written into ``target``, a view of the result.

    Two kernels, so that clone elimination can leave out the copy where nothing else needs ``source``.
    """
    if source.dtype not in SUPPORTED:
        return None
    whole = converted_kernel(site, source, site.result, "copy")
    if is_empty(target):
        return whole

    def body(builder: KernelBuilder) -> Value:
        return builder.load_broadcast(part, builder.outer_coordinates)

    builder = KernelBuilder(target.sizes)
    value = body(builder).cast(target.dtype)
    builder.store(target, builder.outer_coordinates, value)
    return (*whole, site.kernel(builder, mutates=(target.buffer,)))


def slice_bounds(site: CallSite, size: Size) -> tuple[Size, Size, Size]:
    """(start, length, step) of a slice; None where symbols leave it open."""
    step = site.size("step")
    start: Size = 0 if site["start"] is None else site.size("start")
    stop: Size = size if site["end"] is None else site.size("end")
    if isinstance(start, int) and start < 0:
        start = start + size
    if isinstance(stop, int) and stop < 0:
        stop = stop + size
    if isinstance(size, int):
        start = min(max(start, 0), size) if isinstance(start, int) else start
        stop = min(max(stop, start), size) if isinstance(stop, int) and isinstance(start, int) else stop
    elif isinstance(stop, int) and stop > 2**60:
        stop = size
    return start, stop - start, step


@lowers("aten.slice_scatter.default")
def _slice_scatter(site: CallSite) -> Operations | None:
    source, part, result = site.view("self"), site.view("src"), site.result
    dim = site.dim("dim", len(source.sizes))
    start, _, step = slice_bounds(site, source.sizes[dim])
    target = View(
        result.buffer,
        result.dtype,
        (*result.sizes[:dim], part.sizes[dim], *result.sizes[dim + 1 :]),
        (*result.strides[:dim], result.strides[dim] * step, *result.strides[dim + 1 :]),
        result.offset + start * result.strides[dim],
    )
    return written_into_copy(site, source, part, target)


@lowers("aten.select_scatter.default")
def _select_scatter(site: CallSite) -> Operations | None:
    source, result = site.view("self"), site.result
    dim = site.dim("dim", len(source.sizes))
    index = site.size("index")
    if isinstance(index, int) and index < 0:
        index = index + source.sizes[dim]
    target = View(
        result.buffer,
        result.dtype,
        (*result.sizes[:dim], *result.sizes[dim + 1 :]),
        (*result.strides[:dim], *result.strides[dim + 1 :]),
        result.offset + index * result.strides[dim],
    )
    return written_into_copy(site, source, site.view("src"), target)


@lowers("aten.diagonal_scatter.default")
def _diagonal_scatter(site: CallSite) -> Operations | None:
    source, part, result = site.view("self"), site.view("src"), site.result
    rank = len(source.sizes)
    one, two, offset = site.dim("dim1", rank), site.dim("dim2", rank), site.integer("offset")
    start = offset * result.strides[two] if offset >= 0 else -offset * result.strides[one]
    rest = [d for d in range(rank) if d not in (one, two)]
    target = View(
        result.buffer,
        result.dtype,
        part.sizes,
        (*(result.strides[d] for d in rest), result.strides[one] + result.strides[two]),
        result.offset + start,
    )
    return written_into_copy(site, source, part, target)


@lowers("aten.as_strided_scatter.default")
def _as_strided_scatter(site: CallSite) -> Operations | None:
    source, result = site.view("self"), site.result
    if result.strides != source.strides or source.offset != 0 or result.offset != 0:
        return None  # the offsets in the arguments mean the source's storage
    offset: Size = 0 if site["storage_offset"] is None else site.size("storage_offset")
    sizes, strides = site.sizes("size"), site.sizes("stride")
    if any(s == 0 and n != 1 for n, s in zip(sizes, strides, strict=True)) or not _nested(sizes, strides):
        return None  # several points write one element: eager's order decides
    return written_into_copy(site, source, site.view("src"), View(result.buffer, result.dtype, sizes, strides, offset))


def _nested(sizes: Sequence[Size], strides: Sequence[Size]) -> bool:
    """Whether no two points of the view are the same element, for known sizes."""
    pairs = [(s, n) for n, s in zip(sizes, strides, strict=True) if n != 1]
    if not all(isinstance(s, int) and isinstance(n, int) for s, n in pairs):
        return False
    extent = 1
    for stride, size in sorted(pairs):
        if stride < extent:
            return False
        extent = stride * (size - 1) + extent
    return True


# -- gradients of views -------------------------------------------------------------------------------------------


@lowers("aten.slice_backward.default")
def _slice_backward(site: CallSite) -> Operations | None:
    grad, result = site.view("grad_output"), site.result
    dim = site.dim("dim", len(result.sizes))
    start, _, step = slice_bounds(site, result.sizes[dim])
    if grad.dtype not in SUPPORTED:
        return None
    if step == 1:
        before = [start if d == dim else 0 for d in range(len(result.sizes))]
        return pointwise_kernel(
            site, result, lambda b: load_padded(b, grad, b.outer_coordinates, before, result.sizes, 0)
        )

    def body(builder: KernelBuilder) -> Value:
        where = list(builder.outer_coordinates)
        distance = where[dim] - start
        inside = builder.index(builder.simplify(Mod(distance, step))).equals(0)
        inside = inside.both(builder.index(distance) >= 0)
        where[dim] = FloorDiv(distance, step)
        inside = inside.both(builder.index(where[dim]) < builder.index(grad.sizes[dim]))
        return builder.load(grad, where, inside, 0)

    return pointwise_kernel(site, result, body)


@lowers("aten.select_backward.default")
def _select_backward(site: CallSite) -> Operations | None:
    grad, result = site.view("grad_output"), site.result
    dim, index = site.dim("dim", len(result.sizes)), site.size("index")
    if grad.dtype not in SUPPORTED:
        return None
    if isinstance(index, int) and index < 0:
        index = index + result.sizes[dim]

    def body(builder: KernelBuilder) -> Value:
        where = builder.outer_coordinates
        here = builder.index(where[dim]).equals(builder.index(index))
        return builder.load(grad, [*where[:dim], *where[dim + 1 :]], here, 0)

    return pointwise_kernel(site, result, body)
