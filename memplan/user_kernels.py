"""The user's Triton kernels of a program, compiled and ready to launch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from .codegen.wrapper_lines import tensor_parameters
from .ir.errors import CompilerError
from .ir.program import EXTERNAL_KINDS, Operation, Program, UserKernel, View
from .ir.user_kernel import Fixed
from .runtime.cuda_launch import native_launch
from .runtime.python_runtime import reinterpret_as
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


def with_chosen_configs(program: Program) -> Program:
    """The program with one configuration for each of its users' kernels, where it fixes all that choosing looks at.

    Configurations are timed now, on the GPU, as at a kernel's first call, but on tensors made for it and freed after:
    floating-point ones hold random numbers, all others zeros, so that what indexes stays in range. A kernel with sizes
    that change or TMA descriptors keeps its configurations.

    Raises
    ------
    CompilerError
        If no configuration of a kernel compiles or runs.
    """
    _, first = named_user_kernels(program)
    chosen: dict[UserKernel, UserKernel] = {}
    for op, empty in first.values():
        if len(op.kernel.configs) > 1 and not op.descriptors and _is_static(op):
            number = _fastest(op, empty, program)
            kernel = replace(op.kernel, configs=(op.kernel.configs[number],))
            chosen[_without_names(op)] = replace(op, kernel=kernel, grids=(op.grids[number],))
    if not chosen:
        return program

    def fixed(op: Operation) -> Operation:
        found = chosen.get(_without_names(op)) if isinstance(op, UserKernel) else None
        if found is None or not isinstance(op, UserKernel):
            return op
        return replace(op, kernel=found.kernel, grids=found.grids)

    return program.with_operations(tuple(map(fixed, program.operations)))


def _is_static(op: UserKernel) -> bool:
    numbers = [s for v in op.views for s in (*v.sizes, *v.strides, v.offset)] + [s for grid in op.grids for s in grid]
    fixed = all(isinstance(a, View | Fixed) for _, a in op.arguments)
    return fixed and all(isinstance(s, int) or s.is_Integer for s in numbers)


def _fastest(op: UserKernel, empty: frozenset[str], program: Program) -> int:
    """Position of the configuration that is fastest on tensors made for it."""
    launcher = UserLauncher(op, frozenset(n for n, a in op.arguments if isinstance(a, View)), empty)
    launcher.prepare(program.hints)
    device = torch.device(op.device)
    generator = torch.Generator(device).manual_seed(0)
    memory: dict[str, torch.Tensor] = {}
    tensors = []
    for name in launcher.names:
        view = dict(op.arguments)[name]
        assert isinstance(view, View)
        if view.buffer not in memory:
            dtype = view.dtype
            made = torch.zeros(-(-program.nbytes(view.buffer) // dtype.itemsize), dtype=dtype, device=device)
            random = dtype.is_floating_point and dtype.itemsize > 1
            memory[view.buffer] = made.normal_(generator=generator) if random else made
        sizes, strides = ([int(s) for s in given] for given in (view.sizes, view.strides))
        offset = int(view.offset) * view.dtype.itemsize
        tensors.append(reinterpret_as(memory[view.buffer], view.dtype, sizes, strides, offset))
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else 0
        launcher(stream, [tuple(int(s) for s in grid) for grid in op.grids], *tensors)  # type: ignore[misc]
    return launcher.chosen.get((), 0)  # nothing is timed where all grids are empty


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
