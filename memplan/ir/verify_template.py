"""Rules of templates and their workspaces. Shares no code with a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .errors import VerificationError
from .program import Buffer, BufferKind, Operation, Program
from .template import ACCUMULATOR, Product, Template
from .verify_kernel import verify_kernel

Fail = Callable[[str, Operation], VerificationError]


def check_template(op: Template, program: Program, fail: Fail, where: str) -> None:
    """A template computes what its data says, and has the workspaces that its configuration needs.

    Raises
    ------
    VerificationError
        By ``fail``, naming the buffer.
    """
    product = op.product
    if product is None:
        raise fail("it is a template of nothing", op)
    _check_factors(op, product, fail)
    written = tuple(v.buffer for v in op.results if v is not None)
    spaces = op.workspace_buffers
    if product.workspaces() != op.workspaces or len(spaces) != len(op.workspaces):
        raise fail(f"it has the workspaces {op.workspaces}, its configuration needs {product.workspaces()}", op)
    for space, name in zip(op.workspaces, spaces, strict=True):
        b = program.buffers[name]
        if b.kind is not BufferKind.WORKSPACE or b.zero_fill != space.zero_fill:
            filled = "filled with zeros" if space.zero_fill else "not filled"
            raise fail(f"its {space.role} are {name!r} ({b.kind.value}), which should be a workspace, {filled}", op)
        if b.nbytes != space.count:
            raise fail(f"its {space.role} need {space.count} bytes, {name!r} has {b.nbytes}", op)
    stored = tuple(dict.fromkeys(product.epilogue.written_buffers))
    if set(stored) != set(written) - set(spaces):
        raise fail(f"it declares that it writes {written}, and its epilogue writes {stored}", op)
    read = set(product.epilogue.read_buffers) - {ACCUMULATOR}
    if not read <= set(op.reads):
        raise fail(f"its epilogue reads {sorted(read - set(op.reads))}, which it does not declare", op)
    if set(stored) & set(op.reads):
        raise fail(f"it reads {sorted(set(stored) & set(op.reads))} in one tile while another writes it", op)
    batch, rows, columns, _ = product.sizes
    dtype = next(n.dtype for n in product.epilogue.loads if n.buffer == ACCUMULATOR)
    nbytes = batch * rows * columns * dtype.itemsize
    held = Buffer(ACCUMULATOR, nbytes, dtype, op.device, BufferKind.TEMPORARY)
    verify_kernel(product.epilogue, {**program.buffers, ACCUMULATOR: held}, program.hints, name=op.name, where=where)


def _check_factors(op: Template, product: Product, fail: Fail) -> None:
    a, b = product.a, product.b
    if len(a.sizes) != 3 or len(b.sizes) != 3 or a.sizes[0] != b.sizes[0] or a.sizes[2] != b.sizes[1]:
        raise fail(f"its factors have the shapes {a.sizes} and {b.sizes}", op)
    expected = tuple(r.size for r in product.epilogue.outer)
    if expected != (a.sizes[0], a.sizes[1], b.sizes[2]) or product.epilogue.row:
        raise fail(f"its epilogue runs over {expected}, the product has {(a.sizes[0], a.sizes[1], b.sizes[2])}", op)
    given = (a, b) if product.bias is None else (a, b, product.bias)
    if tuple(op.args[: len(given)]) != given:
        raise fail("its factors are not its first arguments", op)


def check_workspaces(program: Program, fail: Fail) -> None:
    """A workspace belongs to one template, and to nobody else; nothing of it leaves the program.

    Raises
    ------
    VerificationError
        By ``fail``, naming the buffer and who uses it besides.
    """
    owners: Mapping[str, str] = {
        n: op.name for op in program.operations if isinstance(op, Template) for n in op.workspace_buffers
    }
    for b in program.buffers.values():
        if b.kind is not BufferKind.WORKSPACE:
            continue
        users = [op for op in program.operations if b.name in (*op.reads, *op.writes, *op.mutates)]
        for op in users:
            if owners.get(b.name) != op.name:
                promise = ", and nobody promises to leave it zero" if b.zero_fill else ""
                raise fail(f"it uses the workspace {b.name!r}, which is not its own{promise}", op)
        if b.name in program.output_buffers and users:
            raise fail(f"its workspace {b.name!r} leaves the program", users[0])


__all__ = ["check_template", "check_workspaces"]
