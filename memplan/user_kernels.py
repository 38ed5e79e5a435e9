"""The user's Triton kernels of a program, compiled and ready to launch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .codegen.wrapper_lines import tensor_parameters
from .ir.errors import CompilerError
from .ir.program import EXTERNAL_KINDS, Program, UserKernel, View
from .runtime.cuda_launch import native_launch
from .runtime.triton_launch import Launcher
from .runtime.user_kernel_direct import Direct, DirectLauncher, direct
from .runtime.user_kernel_launch import UserLauncher


@dataclass(frozen=True)
class UserKernels:
    """What each launch calls (by operation), and the launchers by that name.

    ``direct``: kernels of which one variant serves all calls, on the GPU of that index.
    """

    names: Mapping[str, str]
    launchers: Mapping[str, Callable[..., object]]
    direct: Mapping[str, tuple[int, Direct]] = field(default_factory=dict)

    @property
    def fixed(self) -> dict[str, tuple[int | None, ...]]:
        """The arguments of those, as the C++ wrapper prints them."""
        return {n: found.fixed for n, (_, found) in self.direct.items()}

    @property
    def loaders(self) -> dict[str, Launcher]:
        """What loads those."""
        return {n: k.launcher for n, k in self.launchers.items() if isinstance(k, DirectLauncher)}


def named_user_kernels(program: Program) -> tuple[dict[str, str], dict[str, tuple[UserKernel, frozenset[str]]]]:
    """For each launch the name of what it calls, and for each name a launch of it and its arguments that hold nothing.

    Launches that differ in their buffers alone have one name, and so one launcher and its tuning.
    """
    names: dict[str, str] = {}
    known: dict[tuple[UserKernel, frozenset[str]], str] = {}
    first: dict[str, tuple[UserKernel, frozenset[str]]] = {}
    filled: set[str] = {b.name for b in program.buffers.values() if b.kind in EXTERNAL_KINDS or b.zero_fill}
    for op in program.operations:
        if isinstance(op, UserKernel):
            empty = frozenset(n for n, a in op.arguments if isinstance(a, View) and a.buffer not in filled)
            key = (_without_names(op), empty)
            if key not in known:
                known[key] = f"u{len(known)}_{re.sub(r'[^0-9A-Za-z_]', '_', op.kernel.function.name)[:60]}"
                first[known[key]] = (op, empty)
            names[op.name] = known[key]
        filled.update(op.writes)
        filled.update(op.mutates)
    return names, first


def build_user_kernels(program: Program) -> UserKernels:
    """Compile the user's kernels.

    Raises
    ------
    CompilerError
        With Triton's message and the user's line; also where the driver refuses what Triton built.
    """
    names, first = named_user_kernels(program)
    launchers: dict[str, Callable[..., object]] = {}
    found: dict[str, tuple[int, Direct]] = {}
    for name, (op, empty) in first.items():
        launcher = UserLauncher(op, tensor_parameters(op), empty)
        values = launcher.prepare(program.hints)
        launchers[name] = launcher
        one = direct(launcher, name, values)
        if one is not None and native_launch() is not None:
            index = int(op.device.partition(":")[2] or 0)
            found[name] = (index, one)
            launchers[name] = DirectLauncher(_loaded(op, one, index), one.fixed)
    return UserKernels(names, launchers, found)


def _loaded(op: UserKernel, one: Direct, index: int) -> Launcher:
    """What launches it, loaded now: not while somebody records a CUDA graph."""
    launcher = Launcher(one.compiled, 1, len(one.fixed), device=index)
    try:
        launcher.function()
    except RuntimeError as error:
        where = next((o.location for o in op.origins if o.location), op.kernel.location)
        kernel = f"{op.kernel.function.name} ({op.kernel.location})"
        raise CompilerError(f"the Triton kernel {kernel} cannot be loaded: {error}", where=where) from error
    return launcher


def _without_names(op: UserKernel) -> UserKernel:
    """The launch with its buffers numbered and its origins gone."""
    numbers: dict[str, str] = {}

    def number(buffer: str) -> str:
        return numbers.setdefault(buffer, f"b{len(numbers)}")

    arguments = tuple((n, replace(a, buffer=number(a.buffer)) if isinstance(a, View) else a) for n, a in op.arguments)
    return replace(op, name="", origins=(), arguments=arguments, mutates=tuple(sorted(number(b) for b in op.mutates)))
