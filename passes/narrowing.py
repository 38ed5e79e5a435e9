"""Temporaries stored in the narrower type that all their readers convert them to.

A residual's gradient is summed in float32 and read by kernels that round it to bfloat16 at once: then the rounded value
is what is stored, in half the bytes. The value is the same, bit for bit: it is rounded once, before the store instead
of after the loads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import sympy
import torch

from memplan.ir.config import Config
from memplan.ir.loops import Cast, Kernel, Load, Node, StoreMode, operands
from memplan.ir.program import EXTERNAL_KINDS, Buffer, KernelOp, Program

from .fuse_body import moved_node, renamed_values, swept


@dataclass(frozen=True, slots=True)
class Narrowing:
    """The pass after fusion: only then is it known what is stored at all. It has no options."""

    name: ClassVar[str] = "narrowing"
    requires: ClassVar[tuple[str, ...]] = ("fusion",)

    @classmethod
    def configured(cls, config: Config) -> Narrowing:
        return cls()

    def run(self, program: Program) -> Program:
        chosen = narrowed_types(program)
        if not chosen:
            return program
        buffers = dict(program.buffers)
        for name, dtype in chosen.items():
            buffers[name] = _narrowed_buffer(buffers[name], dtype)
        operations = tuple(_narrowed(op, chosen) if isinstance(op, KernelOp) else op for op in program.operations)
        return replace(program, buffers=buffers, operations=operations)


def narrowed_types(program: Program) -> dict[str, torch.dtype]:
    """The new type of each buffer that may be narrowed.

    Such a buffer is made inside of the program and stays there, is only touched by plain stores and by loads of its own
    type in kernels, and every load of it is only used by conversions to one narrower type.
    """
    fixed = set(program.output_buffers)
    fixed |= {b.name for b in program.buffers.values() if b.kind in EXTERNAL_KINDS or b.zero_fill}
    wanted: dict[str, torch.dtype] = {}
    for op in program.operations:
        if not isinstance(op, KernelOp):
            fixed.update(op.reads, op.writes, op.mutates)
            continue
        fixed.update(op.mutates)
        fixed.update(
            s.buffer
            for s in op.kernel.stores
            if s.mode is not StoreMode.SET or s.dtype is not program.buffers[s.buffer].dtype
        )
        for load, dtype in _conversions(op.kernel):
            own = program.buffers[load.buffer].dtype
            narrower = dtype is not None and dtype.itemsize < own.itemsize and load.dtype is own
            if dtype is None or not narrower or load.other != 0 or wanted.setdefault(load.buffer, dtype) is not dtype:
                fixed.add(load.buffer)
    return {b: d for b, d in wanted.items() if b not in fixed}


def _conversions(kernel: Kernel) -> list[tuple[Load, torch.dtype | None]]:
    """Each load, and the type that all that uses it converts it to (None: something uses it as it is)."""
    types: dict[int, set[torch.dtype | None]] = {k: set() for k, n in enumerate(kernel.nodes) if isinstance(n, Load)}
    for node in kernel.nodes:
        for k in operands(node):
            if k in types:
                types[k].add(node.dtype if isinstance(node, Cast) else None)
    for s in kernel.stores:
        for used in (s.value, s.mask):
            if used in types:
                # a store rounds too
                types[used].add(s.dtype if used == s.value and used != s.mask else None)
    found: list[tuple[Load, torch.dtype | None]] = []
    for k, uses in types.items():
        load = kernel.nodes[k]
        assert isinstance(load, Load)
        found.append((load, next(iter(uses)) if len(uses) == 1 else None))
    return found


def _narrowed_buffer(buffer: Buffer, dtype: torch.dtype) -> Buffer:
    elements = sympy.sympify(buffer.nbytes) / buffer.dtype.itemsize
    nbytes = sympy.expand(elements * dtype.itemsize)
    return replace(buffer, nbytes=int(nbytes) if nbytes.is_Integer else nbytes, dtype=dtype)


def _narrowed(op: KernelOp, chosen: dict[str, torch.dtype]) -> KernelOp:
    kernel = op.kernel
    if not any(b in chosen for b in (*kernel.read_buffers, *kernel.written_buffers)):
        return op
    moved = list(range(len(kernel.nodes)))
    nodes: list[Node] = []
    for k, node in enumerate(kernel.nodes):
        if isinstance(node, Cast):
            source = kernel.nodes[node.arg]
            if isinstance(source, Load) and source.buffer in chosen:
                moved[k] = node.arg  # the load has this type now
        node = moved_node(node, moved)
        if isinstance(node, Load) and node.buffer in chosen:
            node = replace(node, dtype=chosen[node.buffer])
        nodes.append(node)
    stores = []
    for s in kernel.stores:
        mask = None if s.mask is None else moved[s.mask]
        s = replace(s, value=moved[s.value], mask=mask, index=renamed_values(s.index, moved))
        if s.buffer in chosen:
            value = _converted(nodes, _converted(nodes, s.value, s.dtype), chosen[s.buffer])
            s = replace(s, value=value, dtype=chosen[s.buffer])
        stores.append(s)
    return replace(op, kernel=swept(Kernel(kernel.outer, kernel.row, tuple(nodes), tuple(stores))))


def _converted(nodes: list[Node], value: int, dtype: torch.dtype) -> int:
    """The value as a buffer of ``dtype`` would hold it; values of half types are not rounded until they are stored."""
    if nodes[value].dtype is dtype and (dtype.itemsize >= 4 or isinstance(nodes[value], (Load, Cast))):
        return value
    nodes.append(Cast(value, dtype))
    return len(nodes) - 1
