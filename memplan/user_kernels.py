"""The user's Triton kernels of a program, compiled and ready to launch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .codegen.wrapper_lines import tensor_parameters
from .ir.program import EXTERNAL_KINDS, Program, UserKernel, View
from .runtime.user_kernel_launch import UserLauncher


@dataclass(frozen=True)
class UserKernels:
    """What each launch calls (by operation), and the launchers by that name."""

    names: Mapping[str, str]
    launchers: Mapping[str, Callable[..., object]]


def build_user_kernels(program: Program) -> UserKernels:
    """Compile the user's kernels; launches that differ in their buffers alone share a launcher and its tuning.

    Raises
    ------
    CompilerError
        With Triton's message and the user's line.
    """
    names: dict[str, str] = {}
    known: dict[tuple[UserKernel, frozenset[str]], str] = {}
    launchers: dict[str, UserLauncher] = {}
    filled: set[str] = {b.name for b in program.buffers.values() if b.kind in EXTERNAL_KINDS or b.zero_fill}
    for op in program.operations:
        if isinstance(op, UserKernel):
            empty = frozenset(n for n, a in op.arguments if isinstance(a, View) and a.buffer not in filled)
            key = (_without_names(op), empty)
            if key not in known:
                known[key] = f"u{len(known)}_{re.sub(r'[^0-9A-Za-z_]', '_', op.kernel.function.name)[:60]}"
                launcher = UserLauncher(op, tensor_parameters(op), empty)
                launcher.prepare(program.hints)
                launchers[known[key]] = launcher
            names[op.name] = known[key]
        filled.update(op.writes)
        filled.update(op.mutates)
    return UserKernels(names, launchers)


def _without_names(op: UserKernel) -> UserKernel:
    """The launch with its buffers numbered and its origins gone."""
    numbers: dict[str, str] = {}

    def number(buffer: str) -> str:
        return numbers.setdefault(buffer, f"b{len(numbers)}")

    arguments = tuple((n, replace(a, buffer=number(a.buffer)) if isinstance(a, View) else a) for n, a in op.arguments)
    return replace(op, name="", origins=(), arguments=arguments, mutates=tuple(sorted(number(b) for b in op.mutates)))
