"""The shapes of a plan's buffers, as somebody sees them whole."""

from __future__ import annotations

import math

from ..ir import program as ir
from ..ir.loops import Kernel, Store


def shapes_of(program: ir.Program) -> dict[str, tuple[int, ...]]:
    """The shape of a buffer as its writer or a reader sees it whole; failing both, as the loops run that write it."""
    found: dict[str, tuple[int, ...]] = {}

    def see(view: ir.View) -> None:
        if view.buffer in program.buffers and view.buffer not in found:
            buffer = program.buffers[view.buffer]
            sizes = tuple(ir.evaluate(s, program.hints) for s in view.sizes)
            if math.prod(sizes) * view.dtype.itemsize == program.nbytes(buffer.name):
                found[view.buffer] = sizes

    for op in program.operations:
        if isinstance(op, ir.Extern):
            for result in op.results:
                if result is not None:
                    see(result)
        elif isinstance(op, ir.Copy):
            see(op.target)
    for given in program.inputs:
        if isinstance(given, ir.TensorInput):
            see(given.view)
    for output in program.outputs:
        if isinstance(output, ir.View):
            see(output)
    for op in program.operations:
        if isinstance(op, ir.Extern):
            for view in ir.argument_views((*op.args, *(a for _, a in op.kwargs))):
                see(view)
    for op in program.operations:
        if isinstance(op, ir.KernelOp):
            for store in op.kernel.stores:
                if store.buffer not in found:
                    written = stored_shape(op.kernel, store, program)
                    if written is not None:
                        found[store.buffer] = written
    return found


def stored_shape(kernel: Kernel, store: Store, program: ir.Program) -> tuple[int, ...] | None:
    """Sizes of the loops that write a whole buffer without gaps, outermost first; None for any other store."""
    sizes = {r.symbol: ir.evaluate(r.size, program.hints) for r in (*kernel.outer, *kernel.row)}
    index = store.index.subs({s: h for s, h in program.hints.items() if s not in sizes})
    strides = {s: index.coeff(s) for s in sizes}
    if not all(c.is_Integer for c in strides.values()):
        return None
    if (index - sum(c * s for s, c in strides.items())).expand() != 0:
        return None
    shape: list[int] = []
    for symbol in sorted((s for s in sizes if strides[s] != 0), key=lambda s: int(strides[s])):
        if strides[symbol] != math.prod(shape):
            return None
        shape.append(sizes[symbol])
    whole = math.prod(shape) * store.dtype.itemsize == program.nbytes(store.buffer)
    return tuple(reversed(shape)) if whole else None
