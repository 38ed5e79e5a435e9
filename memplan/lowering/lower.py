"""Lowering of a whole program: every extern call that has a lowering becomes kernels, the rest stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from ..ir.config import Config
from ..ir.errors import LoweringError
from ..ir.program import (
    Contract,
    Copy,
    Extern,
    KernelOp,
    Operation,
    Program,
    Symbolic,
    Tuple,
    UserKernel,
    View,
    argument_views,
)

# registers the lowerings
from . import (  # noqa: F401
    activations,
    arithmetic,
    creation,
    foreach,
    indexing,
    loss,
    pooling,
    random,
    reductions,
    scatter,
    shapes,
    softmax,
    special,
    upsample,
)
from .builder import KernelBuilder
from .call_site import LOWERINGS, SUPPORTED, CallSite, Context
from .contracts import contract
from .creation import EMPTY


@dataclass(frozen=True, slots=True)
class Kept:
    """Operations that stay calls though there is a lowering: those of some FX nodes, and all of some devices.

    ``devices`` are types (``"cpu"``), without an index.
    """

    nodes: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()

    def __contains__(self, op: Operation) -> bool:
        if op.device.partition(":")[0] in self.devices:
            return True
        return op.name in self.nodes or any(o.node in self.nodes for o in op.origins)


NOTHING_KEPT = Kept()


def lower_program(program: Program, config: Config, kept: Kept = NOTHING_KEPT) -> Program:
    """The same program with kernels wherever there is a lowering.

    Parameters
    ----------
    kept:
        Operations that stay as they are.

    Returns
    -------
    A program whose results, buffers and order are the same; temporaries between the kernels of one call are added.

    Raises
    ------
    LoweringError
        If lowerings fail: the first failure, with the others in ``others``.
    """
    context = Context.of(program, config)
    context.kernel_readers = _kernel_readers(program, kept)
    context.made_by_calls = frozenset(
        buffer
        for op in program.operations
        if isinstance(op, Extern) and (op.target not in LOWERINGS or op in kept)
        if contract(op.target, op.device.partition(":")[0]).contract is Contract.OUT
        for buffer in op.writes
    )
    operations: list[Operation] = []
    failures: list[LoweringError] = []
    for op in program.operations:
        try:
            operations.extend((op,) if op in kept else lower_one(op, context))
        except LoweringError as error:
            failures.append(error)
    if failures:
        failures[0].others = tuple(failures[1:])
        raise failures[0]
    buffers = {**program.buffers, **context.added}
    return replace(program, buffers=buffers).with_operations(without_empties(tuple(operations)))


def without_empties(operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """Without the calls that only make room: what is named by something else besides gets its place from the plan."""
    empties = {k: op for k, op in enumerate(operations) if isinstance(op, Extern) and op.target in EMPTY}
    if not empties:
        return operations
    named = {b for k, op in enumerate(operations) if k not in empties for b in (*op.reads, *op.writes, *op.mutates)}
    return tuple(op for k, op in enumerate(operations) if k not in empties or not named.issuperset(op.writes))


def lower_one(op: Operation, context: Context) -> tuple[Operation, ...]:
    """The operation's kernels, or the operation itself."""
    found: tuple[Operation, ...] | None = None
    if isinstance(op, Extern):
        found = lower_operation(op, context)
    elif isinstance(op, Copy):
        found = lower_copy(op, context)
    return (op,) if found is None else found


def lower_operation(op: Extern, context: Context) -> tuple[Operation, ...] | None:
    """The kernels that do what the call does, or None where it stays an ATen call.

    Raises
    ------
    LoweringError
        If a lowering fails: our own mistake, with the operation and the user's line.
    """
    lowering = LOWERINGS.get(op.target)
    if lowering is None or op.effect or op.mutates or op.symbols:
        return None
    if not _is_plain(op, context) or not _counts_only(op):
        return None
    site = CallSite.of(op, context)
    if site is None:
        return None
    try:
        found = lowering(site)
        # no kernel has anything to write in an empty result: the call itself makes it
        return None if found == () and any(v is not None for v in op.results) else found
    except (TypeError, ValueError, KeyError, IndexError, AssertionError, AttributeError) as error:
        where = op.origins[0].location if op.origins else ""
        message = f"{op.target} ({op.name}) cannot be lowered: {error!r}"
        raise LoweringError(message, where=where, operation=op.name) from error


def _counts_only(op: Extern) -> bool:
    """Whether all that is not known before the run is a whole number: kernels take no other arguments beside memory.

    Floats and truth values that come out of tensors (``x.sum().item()``) are none, nor is what is computed of them.
    """
    pending: list[object] = [*op.args, *(a for _, a in op.kwargs), *op.results]
    while pending:
        match pending.pop():
            case Tuple(items):
                pending += items
            case Symbolic(expr):
                if expr.is_Boolean or expr.is_Relational or not all(s.is_integer for s in expr.free_symbols):
                    return False
            case View() as v:
                numbers = [n for n in (*v.sizes, *v.strides, v.offset) if isinstance(n, sympy.Expr)]
                if not all(s.is_integer for n in numbers for s in n.free_symbols):
                    return False
            case _:
                pass
    return True


def _is_plain(op: Extern, context: Context) -> bool:
    """Whether every tensor is of a dtype that kernels know, seen as its buffer's own dtype, on one device."""
    views = [v for v in op.results if v is not None]
    views += argument_views(op.args)
    for _, argument in op.kwargs:
        views += argument_views((argument,))
    for view in views:
        buffer = context.buffers[view.buffer]
        if view.dtype is not buffer.dtype or view.dtype not in SUPPORTED or buffer.device != op.device:
            return False
    return True


def lower_copy(op: Copy, context: Context) -> tuple[Operation, ...] | None:
    """A copy as a kernel, so that what makes its source can write there itself."""
    source, target = op.source, op.target
    for view in (source, target):
        buffer = context.buffers[view.buffer]
        if view.dtype is not buffer.dtype or view.dtype not in SUPPORTED or buffer.device != op.device:
            return None
    if source.buffer == target.buffer or any(s == 0 for s in target.sizes):
        return None
    builder = KernelBuilder(target.sizes)
    value = builder.load_broadcast(source, builder.outer_coordinates)
    builder.store(target, builder.outer_coordinates, value)
    return (KernelOp(op.name, builder.build(), op.device, op.origins, op.mutates),)


def _kernel_readers(program: Program, kept: Kept) -> dict[str, bool]:
    """For each buffer that is read, whether all that reads it has a lowering and it does not leave the program."""
    found: dict[str, bool] = {}
    for op in program.operations:
        lowered = not isinstance(op, Extern | UserKernel)
        if isinstance(op, Extern):
            lowered = op.target in LOWERINGS and op not in kept
        for buffer in op.reads:
            found[buffer] = found.get(buffer, True) and lowered
    for output in program.outputs:
        if isinstance(output, View):
            found[output.buffer] = False
    return found
