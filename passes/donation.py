"""Programs that leave their inputs to the owner, though they were made to free and overwrite them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import sympy

from ..ir.index import expand
from ..ir.program import Buffer, BufferKind, Copy, Operation, Program, TensorInput, View
from .comm_rewriting import renamed


def without_donation(program: Program) -> Program:
    """The same program with every input left to its owner. No pass may have made use of the donation yet."""
    buffers = {n: replace(b, donated=False) for n, b in program.buffers.items()}
    return replace(program, buffers=buffers)


def keeping_inputs(program: Program) -> Program:
    """The program that passes have made, with the same kernels and calls, changing no input that was donated to it.

    Where clone elimination has an operation change a donated input, that operation and all after it get a copy.
    """
    given = {i.view.buffer: i.view for i in program.inputs if isinstance(i, TensorInput)}
    operations, buffers = list(program.operations), dict(program.buffers)
    for name, view in given.items():
        first = next((k for k, op in enumerate(operations) if name in (*op.mutates, *op.writes)), None)
        if first is None or not buffers[name].donated:
            continue
        copy = _copy_of(buffers[name], buffers)
        buffers[copy.name] = copy
        after = [renamed(op, name, copy.name) for op in operations[first:]]
        operations[first:] = [_copying(view, buffers[name], copy, operations[first]), *after]
    return without_donation(replace(program, operations=tuple(operations), buffers=buffers))


def _copy_of(old: Buffer, taken: Container[str]) -> Buffer:
    name = f"{old.name}_kept"
    while name in taken:
        name += "_"
    return replace(old, name=name, kind=BufferKind.TEMPORARY, donated=False)


def _copying(view: View, old: Buffer, copy: Buffer, changing: Operation) -> Copy:
    """A copy of all elements, and of what lies between them where there are gaps: users' kernels have a pointer."""
    count = expand(sympy.sympify(old.nbytes) / old.dtype.itemsize)
    if expand(count - view.numel) != 0:
        view = replace(view, sizes=(int(count) if count.is_Integer else count,), strides=(1,))
    return Copy(f"{copy.name}_copy", view, replace(view, buffer=copy.name), old.device, changing.origins)
