"""How long each operation of a program takes, in microseconds, by the device's figures.

A kernel of ours moves what it loads and stores, each distinct access once, and does one operation a node and point; a
call moves its operands and results and does the operations of torch's own formulas.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memplan.ir.call_work import call_work
from memplan.ir.device import DeviceFigures, Unit, Work
from memplan.ir.in_flight import HostCopy, Wait
from memplan.ir.index import ranges_of
from memplan.ir.loops import Call, Constant, Index, Load, Random, Reduce
from memplan.ir.program import (
    Argument,
    Contract,
    Copy,
    Extern,
    KernelOp,
    Literal,
    Operation,
    Program,
    Symbolic,
    UserKernel,
    View,
    argument_views,
    evaluate,
)
from memplan.ir.program import Tuple as Items
from memplan.ir.template import Product, Template

from .fuse_costs import load_bytes
from .fuse_mapping import count

#: Scalar operations of what is not one instruction (a Philox draw is ten rounds).
_WEIGHTS = {"exp": 4, "log": 4, "tanh": 8, "erf": 8, "sigmoid": 6, "pow": 8, "sin": 6, "cos": 6, "div": 2}
_RANDOM = 20


def step_microseconds(program: Program, figures: DeviceFigures) -> dict[str, float]:
    """Estimated microseconds of every operation, by name."""
    return {op.name: figures.microseconds(work_of(op, program)) for op in program.operations}


def work_of(op: Operation, program: Program) -> Work:
    """Bytes and operations of one operation, at the hinted sizes."""
    match op:
        case KernelOp():
            return _kernel_work(op, program)
        case Copy():
            return Work(2 * _view_bytes(op.target, program))
        case Template(product=Product() as product):
            batch, rows, columns, inner = product.sizes
            moved = sum(program.nbytes(b) for b in (*op.reads, *op.writes))
            return Work(moved, 2 * batch * rows * columns * inner, Unit.PRODUCT, product.a.dtype.itemsize)
        case HostCopy() | Wait():  # beside the rest, on streams of their own
            return Work(0, launches=0)
        case Extern():
            return _call_work(op, program)
        case UserKernel():  # what it computes nobody knows; what it is given it reads, and what it changes it writes
            given = sum(_view_bytes(v, program) for v in op.views)
            return Work(given + sum(_view_bytes(v, program) for v in op.views if v.buffer in op.mutates))


def _kernel_work(op: KernelOp, program: Program) -> Work:
    kernel = op.kernel
    outer = evaluate(count(ranges_of(kernel.outer)), program.hints)
    points = outer * evaluate(count(ranges_of(kernel.row)), program.hints)
    written = 0
    for store in kernel.stores:
        happens = points if kernel.row and kernel.store_level(store).value == 2 else outer if kernel.row else points
        written += min(program.nbytes(store.buffer), happens * store.dtype.itemsize)
    operations = 0
    for node in kernel.nodes:
        if isinstance(node, (Load, Constant, Index)):
            continue
        operations += _RANDOM if isinstance(node, Random) else _WEIGHTS.get(node.op, 1) if isinstance(node, Call) else 1
    passes = 1 + (len([n for n in kernel.nodes if isinstance(n, Reduce)]) > 1 and _row_bytes(op, program) > _RESIDENT)
    return Work(load_bytes(kernel, program) * passes + written, operations * points)


#: Bytes of a row that one program instance keeps at hand between two reductions over it.
_RESIDENT = 1 << 17


def _row_bytes(op: KernelOp, program: Program) -> int:
    points = evaluate(count(ranges_of(op.kernel.row)), program.hints)
    return points * max((n.dtype.itemsize for n in op.kernel.loads), default=1)


def _call_work(op: Extern, program: Program) -> Work:
    views = [*argument_views((*op.args, *(a for _, a in op.kwargs))), *(v for v in op.results if v is not None)]
    if op.contract is Contract.ALIAS:
        return Work(0, launches=0)
    distinct = {(v.buffer, v.offset, v.sizes): v for v in views}
    nbytes = sum(min(_view_bytes(v, program), program.nbytes(v.buffer)) for v in distinct.values())
    itemsize = min((v.dtype.itemsize for v in views if v.dtype.is_floating_point), default=4)
    elements = max((_elements(v, program) for v in views), default=0)
    overload = _overload(op)
    args = [_value(a, program) for a in op.args]
    taken = set() if overload is None else {a.name for a in overload._schema.arguments if a.is_out}
    kwargs = {k: _value(a, program) for k, a in op.kwargs if k not in taken}
    outs = [None if v is None else _meta(v, program) for v in op.results]
    result = outs if len(outs) > 1 else outs[0] if outs else None
    return call_work(overload, args, kwargs, result, nbytes=nbytes, itemsize=itemsize, elements=elements)


def _overload(op: Extern) -> torch._ops.OpOverload | None:
    """ATen's overload that is called, or whose work a call of ours does."""
    if not op.target.startswith(("aten.", "memplan.convolution.")):
        return None
    _, name, overload = op.target.split(".")
    packet = getattr(torch.ops.aten, name, None)
    return None if packet is None else getattr(packet, overload, None)


def _value(argument: Argument, program: Program) -> object:
    match argument:
        case View():
            return _meta(argument, program)
        case Literal():
            return argument.value
        case Symbolic():
            return evaluate(argument.expr, program.hints)
        case Items():
            return [_value(a, program) for a in argument.items]


def _meta(view: View, program: Program) -> torch.Tensor:
    return torch.empty(tuple(_sizes(view, program)), dtype=view.dtype, device="meta")


def _sizes(view: View, program: Program) -> Iterator[int]:
    return (evaluate(s, program.hints) for s in view.sizes)


def _elements(view: View, program: Program) -> int:
    out = 1
    for s in _sizes(view, program):
        out *= s
    return out


def _view_bytes(view: View, program: Program) -> int:
    return _elements(view, program) * view.dtype.itemsize
