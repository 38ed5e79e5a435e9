"""What must hold of buffers in pinned memory of the host. Shares no code with a pass.

That nobody reads what a copy still writes, or changes what it still reads, is checked with collectives
(`verify_communication`): a copy is in flight until its wait, and the wait keeps both ends, so that lifetimes, and with
them the reuse of memory, end after it.
"""

from __future__ import annotations

from collections.abc import Callable

from .communication import Memory
from .errors import VerificationError
from .in_flight import HostCopy, Wait
from .program import Buffer, BufferKind, Operation, Program, View, evaluate

Fail = Callable[[str, Operation], VerificationError]


def check_host_copies(program: Program, fail: Fail) -> None:
    """Only copies and their waits touch pinned memory, and copies go between it and their device, whole.

    Raises
    ------
    VerificationError
        Naming the operation and the buffer.
    """
    buffers = program.buffers
    for op in program.operations:
        pinned = [n for n in (*op.reads, *op.writes, *op.mutates) if buffers[n].memory is Memory.PINNED]
        if isinstance(op, HostCopy):
            _check_copy(program, op, fail)
        elif pinned and not isinstance(op, Wait):
            raise fail(f"it uses {pinned[0]!r}, which is in pinned memory of the host", op)
        elif isinstance(op, Wait):
            for name in op.mutates:
                if name in pinned and buffers[name].kind is not BufferKind.SAVED:
                    raise fail(f"it waits for a copy into {name!r}, which the forward's backward may read again", op)


def _check_copy(program: Program, op: HostCopy, fail: Fail) -> None:
    source = op.args[0] if op.args else None
    target = op.results[0] if op.results else None
    if not isinstance(source, View) or target is None or len(op.args) != 1 or len(op.results) != 1:
        raise fail("a copy to or from the host has one source and one target", op)
    ends = [program.buffers[v.buffer] for v in (source, target)]
    host, device = (ends[1], ends[0]) if op.offloads else (ends[0], ends[1])
    if host.memory is not Memory.PINNED or host.device != "cpu":
        raise fail(f"its end on the host, {host.name!r}, is not in pinned memory", op)
    if device.memory is Memory.PINNED or device.device != op.device:
        raise fail(f"its end on {op.device}, {device.name!r}, is not there", op)
    same = (source.dtype, source.sizes, source.strides) == (target.dtype, target.sizes, target.strides)
    if not same or source.offset != 0 or target.offset != 0:
        raise fail(f"it copies {source.buffer!r} to another layout", op)
    for view, buffer in zip((source, target), ends, strict=True):
        if evaluate(view.numel, program.hints) * view.dtype.itemsize != _nbytes(program, buffer):
            raise fail(f"it copies a part of {buffer.name!r}", op)
    if host.donated:
        raise fail(f"{host.name!r} may be read by another backward, and yet it is donated", op)


def _nbytes(program: Program, buffer: Buffer) -> int:
    return evaluate(buffer.nbytes, program.hints)
