"""A user's Triton kernel launched straight through the driver, where the program fixes all that Triton looks at.

Triton compiles a kernel for what its arguments are. Where there is one configuration, every tensor's alignment is known
and every number is a constant of the program, one variant serves all calls: its cubin is data like that of any other
kernel, and a launch is a grid and addresses. (Sizes that change, TMA descriptors and configurations that are timed on
their arguments go through `user_kernel_launch`.)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from memplan.ir.program import View
from memplan.ir.user_kernel import Fixed

from .cuda_launch import native_launch
from .triton_build import Build, Compiled
from .triton_launch import Launcher
from .user_kernel_launch import Grid, UserLauncher

_INTEGERS = frozenset({"i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64"})
_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d", "f64": "<d"}


class _Source(Protocol):
    signature: dict[str, object]


class _Handle(Protocol):
    """What is read of Triton's `CompiledKernel`."""

    src: _Source
    metadata: object
    asm: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Direct:
    """The one variant of a user's kernel.

    ``fixed``: for each argument of the cubin, in order, its bits where the program fixes them; None for an address that
    comes with the call.
    """

    compiled: Compiled
    fixed: tuple[int | None, ...]


def direct(launcher: UserLauncher, name: str, values: Sequence[object]) -> Direct | None:
    """The kernel's only variant; None where there may be several, or it needs what only Triton's launcher gives.

    Parameters
    ----------
    values:
        What it was prepared for.
    """
    op = launcher.op
    given = dict(op.arguments)
    if not op.device.startswith("cuda") or len(launcher.configs) != 1 or launcher.descriptors or launcher.varying:
        return None
    if not all(isinstance(a, View | Fixed) for a in given.values()):
        return None
    handle = cast("_Handle", launcher.compile(0, values))
    data = handle.metadata
    more = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "tensordesc_meta")
    if getattr(data, "num_ctas", 1) != 1 or any(getattr(data, m, None) for m in more):
        return None
    known = dict(zip(op.kernel.parameters, launcher.configs[0].arguments, strict=True))
    fixed: list[int | None] = []
    arguments: list[tuple[str, str]] = []
    for parameter, kind in handle.src.signature.items():
        if kind == "constexpr":
            continue
        if not isinstance(kind, str):
            return None  # a tuple
        bits = None if isinstance(given.get(parameter), View) else _bits(known.get(parameter), kind)
        if bits is None and not isinstance(given.get(parameter), View):
            return None
        arguments.append((parameter, kind))
        fixed.append(bits)
    warps, stages = (int(getattr(data, n)) for n in ("num_warps", "num_stages"))
    build = Build(name, "", tuple(arguments), (False,) * len(arguments), (), warps, stages)
    return Direct(Compiled(build, handle, handle.asm["cubin"], int(getattr(data, "shared")), 0), tuple(fixed))  # noqa: B009


def _bits(value: object, kind: str) -> int | None:
    """A number as the driver takes it, in 64 bits; None for what is no number of a known kind."""
    if kind in _INTEGERS and isinstance(value, int):
        return value & (2**64 - 1)
    if kind in _FLOATS and isinstance(value, int | float):
        return int.from_bytes(struct.pack(_FLOATS[kind], value), "little")
    return None


class DirectLauncher:
    """``launcher(stream, grids, *addresses)``, as `UserLauncher` is called.

    Parameters
    ----------
    launcher:
        Loads the cubin; its grid is not used.
    fixed:
        As in `Direct`.
    """

    __slots__ = ("_fixed", "launcher")

    def __init__(self, launcher: Launcher, fixed: tuple[int | None, ...]) -> None:
        self.launcher = launcher
        self._fixed = fixed

    def __call__(self, stream: int, grids: Sequence[Grid], *addresses: int) -> None:
        x, y, z = grids[0]
        if not (x and y and z):
            return
        native = native_launch()
        function, context = self.launcher.function()
        assert native is not None  # it loaded the function
        rest = iter(addresses)
        arguments = [next(rest) if bits is None else bits for bits in self._fixed]
        shared = self.launcher.compiled.shared_bytes
        native.launch_grid(function, context, x, y, z, self.launcher.threads, shared, stream, *arguments)


__all__ = ["Direct", "DirectLauncher", "direct"]
