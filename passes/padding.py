"""Row strides that matrix units can load from: matrices with odd row lengths get padded rows.

A product with a matrix whose rows do not start at multiples of 16 bytes runs several times slower on a GPU (measured on
an H100: logits of 50,257 columns in bfloat16, 35 ms of GPT-2's step instead of 6). The matrix keeps its shape; only its
row stride grows, so nothing is copied, and every kernel that touches it addresses it as it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..ir.program import (
    Argument,
    Buffer,
    BufferKind,
    Copy,
    Extern,
    Operation,
    Program,
    Tuple,
    UserKernel,
    View,
    argument_views,
)

_PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.mm.dtype")
#: Bytes that a row's start must be a multiple of.
ROW_ALIGNMENT = 16
#: Smaller matrices do not repay the trouble.
_LEAST_COLUMNS = 256
_LEAST_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Rows:
    """A buffer of rows: ``columns`` elements each, to be ``padded`` apart."""

    columns: int
    padded: int


def pad_rows(program: Program, writes_strided: Callable[[str], bool]) -> Program:
    """The program with padded rows where a matrix product on a GPU gains by it.

    Parameters
    ----------
    writes_strided:
        Whether an operator can write its result with any row stride (it becomes one of our kernels).
    """
    wanted = _wanted(program)
    if not wanted:
        return program
    touching: dict[str, list[Operation]] = {name: [] for name in wanted}
    for op in program.operations:
        views = op.views if isinstance(op, UserKernel) else _views(op)
        for name in {*op.reads, *op.writes, *op.mutates, *(v.buffer for v in views)} & wanted.keys():
            touching[name].append(op)
    kept = {b: r for b, r in wanted.items() if _possible(program, b, r, touching[b], writes_strided)}
    if not kept:
        return program
    buffers = {n: _padded_buffer(b, kept[n]) if n in kept else b for n, b in program.buffers.items()}
    operations = tuple(_padded_operation(op, kept) for op in program.operations)
    return replace(program, buffers=buffers, operations=operations)


def _wanted(program: Program) -> dict[str, _Rows]:
    """Temporaries that a product on a GPU reads or writes as a matrix with rows at odd places."""
    found: dict[str, _Rows] = {}
    for op in program.operations:
        if not isinstance(op, Extern) or op.target not in _PRODUCTS or not op.device.startswith("cuda"):
            continue
        for view in [*argument_views(op.args), *(v for v in op.results if v is not None)]:
            b = program.buffers[view.buffer]
            rows = _rows_of(view, b)
            if rows is not None and b.kind is BufferKind.TEMPORARY:
                found.setdefault(b.name, rows)
    return found


def _rows_of(view: View, b: Buffer) -> _Rows | None:
    if len(view.sizes) != 2 or not all(isinstance(s, int) for s in (*view.sizes, *view.strides)):
        return None
    sizes, strides = view.sizes, view.strides
    if strides[1] == 1:
        count, columns, stride = sizes[0], sizes[1], strides[0]
    elif strides[0] == 1:
        count, columns, stride = sizes[1], sizes[0], strides[1]
    else:
        return None
    assert isinstance(columns, int)
    assert isinstance(stride, int)
    assert isinstance(count, int)
    per_row = ROW_ALIGNMENT // b.dtype.itemsize
    if stride != columns or columns < _LEAST_COLUMNS or count < _LEAST_ROWS or columns % per_row == 0:
        return None
    return _Rows(columns, -(-columns // per_row) * per_row)


def _possible(
    program: Program, name: str, rows: _Rows, touching: Iterable[Operation], writes_strided: Callable[[str], bool]
) -> bool:
    """Whether every access can be moved to the padded rows, and whoever writes the buffer can write it so."""
    b = program.buffers[name]
    if not isinstance(b.nbytes, int) or b.nbytes % (rows.columns * b.dtype.itemsize) or name in program.output_buffers:
        return False
    for op in touching:
        if isinstance(op, UserKernel) and any(v.buffer == name for v in op.views):
            return False
        touched = [v for v in _views(op) if v.buffer == name]
        if any(v.dtype != b.dtype or _moved(v, rows) is None for v in touched):
            return False
        if name in op.writes and not (isinstance(op, Extern) and (op.target in _PRODUCTS or writes_strided(op.target))):
            return False
        if name in op.mutates:
            return False
    return True


def _views(op: Operation) -> Iterable[View]:
    if isinstance(op, Extern):
        yield from argument_views(op.args)
        for _, a in op.kwargs:
            yield from argument_views((a,))
        yield from (v for v in op.results if v is not None)
    elif isinstance(op, Copy):
        yield op.source
        yield op.target


def _moved(view: View, rows: _Rows) -> View | None:
    """The view over padded rows; None if it crosses rows."""
    columns, padded = rows.columns, rows.padded
    if not all(isinstance(v, int) for v in (*view.sizes, *view.strides, view.offset)):
        return None
    assert isinstance(view.offset, int)
    start_row, inside = divmod(view.offset, columns)
    reach = inside
    strides: list[int] = []
    for size, stride in zip(view.sizes, view.strides, strict=True):
        assert isinstance(size, int)
        assert isinstance(stride, int)
        if size == 1:
            strides.append(stride // columns * padded if stride % columns == 0 else stride)
        elif stride % columns == 0:
            strides.append(stride // columns * padded)
        else:
            reach += (size - 1) * stride
            strides.append(stride)
    if reach >= columns:
        return None
    return replace(view, strides=tuple(strides), offset=start_row * padded + inside)


def _padded_buffer(b: Buffer, rows: _Rows) -> Buffer:
    assert isinstance(b.nbytes, int)
    return replace(b, nbytes=b.nbytes // rows.columns * rows.padded)


def _padded_operation(op: Operation, kept: dict[str, _Rows]) -> Operation:
    def view(v: View) -> View:
        if v.buffer not in kept:
            return v
        moved = _moved(v, kept[v.buffer])
        assert moved is not None
        return moved

    def argument(a: Argument) -> Argument:
        if isinstance(a, View):
            return view(a)
        if isinstance(a, Tuple):
            return Tuple(tuple(argument(i) for i in a.items))
        return a

    if isinstance(op, Extern):
        return replace(
            op,
            args=tuple(argument(a) for a in op.args),
            kwargs=tuple((k, argument(a)) for k, a in op.kwargs),
            results=tuple(None if v is None else view(v) for v in op.results),
        )
    if isinstance(op, Copy):
        return replace(op, source=view(op.source), target=view(op.target))
    return op
