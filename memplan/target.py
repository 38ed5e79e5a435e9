"""Plans for a GPU that is not here: programs traced on the CPU, as if their tensors had been on it.

What tracing itself decides by the device stays as on the CPU: attention is the CPU's call, convolutions keep their
layout, and their scratch is not known.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .ir.config import Config
from .ir.program import Argument, Extern, Literal, Program, Tuple

DEVICE = "cuda:0"


def on_target(program: Program, config: Config) -> Program:
    """The program on the GPU of option ``target``; as it is where none is asked for."""
    return program if config.target is None else on_gpu(program)


def on_gpu(program: Program) -> Program:
    """The program as if its CPU tensors had been on the first GPU."""

    def argument(a: Argument) -> Argument:
        if isinstance(a, Literal) and a.value == torch.device("cpu"):
            return Literal(torch.device(DEVICE))
        return Tuple(tuple(map(argument, a.items))) if isinstance(a, Tuple) else a

    operations = []
    for op in program.operations:
        if isinstance(op, Extern):
            kwargs = tuple((k, argument(a)) for k, a in op.kwargs)
            op = replace(op, args=tuple(map(argument, op.args)), kwargs=kwargs)
        operations.append(replace(op, device=DEVICE))
    # a number in memory stays where it is: cuda programs have such constants on the CPU too
    buffers = {n: b if n in program.constants else replace(b, device=DEVICE) for n, b in program.buffers.items()}
    return replace(program, buffers=buffers, operations=tuple(operations))
