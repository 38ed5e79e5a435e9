"""Triton sources to cubins, in parallel, also for a GPU that is not there.

Triton's own cache on disk is the only one: worker processes compile into it and the caller then loads from it.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import linecache
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Protocol

from memplan.ir.errors import CompilerError

_SERIAL_KERNELS = 4
"""So few kernels compile faster here (0.2 to 0.6 s each) than after starting processes."""


class Configuration(Protocol):
    """Block sizes by name, warps and stages: what a kernel is built for."""

    @property
    def blocks(self) -> tuple[tuple[str, int], ...]: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...


class KernelSource(Protocol):
    """What a build needs to know of an emitted kernel."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def arguments(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def blocks(self) -> tuple[str, ...]: ...
    @property
    def aligned(self) -> tuple[bool, ...]: ...
    @property
    def configs(self) -> Sequence[Configuration]: ...


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU to build for: ``Target("cuda", 90)`` is an H100."""

    backend: str = "cuda"
    arch: int = 90
    warp_size: int = 32

    @staticmethod
    def current() -> Target:
        """The GPU that is current in this process."""
        from triton.runtime import driver

        found = driver.active.get_current_target()
        return Target(found.backend, int(found.arch), found.warp_size)


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel in one configuration: all that the compiler is told, and so the key of a build."""

    name: str
    source: str
    arguments: tuple[tuple[str, str], ...]
    aligned: tuple[bool, ...]
    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    @staticmethod
    def of(kernel: KernelSource, config: Configuration) -> Build:
        return Build(
            kernel.name, kernel.source, kernel.arguments, kernel.aligned, config.blocks, config.num_warps, config.num_stages
        )


@dataclass(frozen=True)
class Compiled:
    """A built kernel.

    ``handle`` is Triton's `CompiledKernel`; ``shared_bytes`` per program instance; ``scratch_bytes`` of global memory
    per program instance that the caller has to give (zero for every kernel that memplan emits).
    """

    build: Build
    handle: object
    cubin: bytes
    shared_bytes: int
    scratch_bytes: int


@dataclass(frozen=True, slots=True)
class Resources:
    """What ``cuobjdump -res-usage`` says of a cubin, per thread."""

    registers: int
    spilled_bytes: int


@lru_cache(maxsize=4096)
def load_module(source: str, name: str) -> ModuleType:
    """The module of a kernel's source text. Its lines show in tracebacks and profilers under a name of their own."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    filename = f"<memplan {name} {digest}>"
    module = ModuleType(f"memplan_kernel_{digest}")
    module.__file__ = filename
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    sys.modules[module.__name__] = module
    exec(compile(source, filename, "exec"), module.__dict__)
    return module


def _compile(build: Build, target: Target) -> object:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load_module(build.source, build.name), build.name)
    signature = dict(build.arguments) | {block: "constexpr" for block, _ in build.blocks}
    attrs = {(k,): [["tt.divisibility", 16]] for k, aligned in enumerate(build.aligned) if aligned}
    source = ASTSource(function, signature, constexprs=dict(build.blocks), attrs=attrs)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)


def compile_one(build: Build, target: Target) -> Compiled:
    """Compile one kernel here, or load it from Triton's cache.

    Raises
    ------
    CompilerError
        If Triton refuses it, with the kernel's name and Triton's message.
    """
    try:
        handle = _compile(build, target)
    except Exception as error:
        raise CompilerError(f"Triton could not build {build.name}: {type(error).__name__}: {error}") from error
    metadata = handle.metadata  # type: ignore[attr-defined]
    return Compiled(
        build,
        handle,
        handle.asm["cubin"],  # type: ignore[attr-defined]
        int(metadata.shared),
        int(getattr(metadata, "global_scratch_size", 0) or 0),
    )


def compile_builds(builds: Sequence[Build], target: Target, *, workers: int | None = None) -> list[Compiled | CompilerError]:
    """Compile many kernels, equal ones once; a failed one gives its error in its place.

    ``workers``: processes to use; None takes what the machine has, 1 compiles here.
    """
    distinct = list(dict.fromkeys(builds))
    count = min(workers or _processors(), len(distinct))
    if count > 1 and len(distinct) > _SERIAL_KERNELS:
        _warm_cache(distinct, target, count)
    results: dict[Build, Compiled | CompilerError] = {}
    for build in distinct:
        try:
            results[build] = compile_one(build, target)
        except CompilerError as error:
            results[build] = error
    return [results[b] for b in builds]


def compile_kernels(kernels: Sequence[KernelSource], target: Target, *, workers: int | None = None) -> list[Compiled]:
    """Compile kernels, each in its first configuration.

    Raises
    ------
    CompilerError
        For the first that fails.
    """
    out = []
    for found in compile_builds([Build.of(k, k.configs[0]) for k in kernels], target, workers=workers):
        if isinstance(found, CompilerError):
            raise found
        out.append(found)
    return out


def _warm_cache(builds: Sequence[Build], target: Target, workers: int) -> None:
    """Compile into Triton's cache with several threads (the compiler's own work runs outside of the interpreter's lock).

    A failure is not looked at: the caller meets it again when it compiles that kernel.
    """
    with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="memplan-triton") as pool:
        concurrent.futures.wait([pool.submit(_compile, build, target) for build in builds])


def _processors() -> int:
    return len(os.sched_getaffinity(0))
