"""Triton sources to cubins, in parallel, also for a GPU that is not there.

Triton's own cache on disk is the only one: worker processes compile into it and the caller then loads from it.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from memplan.ir.errors import CompilerError

from . import triton_worker
from .early_launch import waits_first

_log = logging.getLogger("memplan.triton")

_SERIAL_KERNELS = 4
"""So few kernels compile faster here (0.2 to 0.6 s each) than in processes that are yet to start."""


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
    @property
    def checks(self) -> bool: ...


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
    checks: bool = False

    @property
    def request(
        self,
    ) -> tuple[str, str, tuple[tuple[str, str], ...], tuple[bool, ...], tuple[tuple[str, int], ...], int, int, bool]:
        """What `triton_worker.build` takes."""
        return (
            self.name,
            self.source,
            self.arguments,
            self.aligned,
            self.blocks,
            self.num_warps,
            self.num_stages,
            self.checks,
        )

    @staticmethod
    def of(kernel: KernelSource, config: Configuration) -> Build:
        return Build(
            kernel.name,
            kernel.source,
            kernel.arguments,
            kernel.aligned,
            config.blocks,
            config.num_warps,
            config.num_stages,
            kernel.checks,
        )


@dataclass(frozen=True)
class Compiled:
    """A built kernel.

    ``handle`` is Triton's `CompiledKernel`; ``shared_bytes`` per program instance; ``scratch_bytes`` of global memory
    per program instance that the caller has to give (zero for every kernel that memplan emits). ``early``: whether it
    waits for the kernel before it, so that it may be launched early (`memplan.ir.early_launch`).
    """

    build: Build
    handle: object
    cubin: bytes
    shared_bytes: int
    scratch_bytes: int
    early: bool = False


@dataclass(frozen=True, slots=True)
class Resources:
    """What ``cuobjdump -res-usage`` says of a cubin: registers and bytes of local memory, for each thread."""

    registers: int
    spilled_bytes: int


def compile_one(build: Build, target: Target) -> Compiled:
    """Compile one kernel here, or load it from Triton's cache.

    Raises
    ------
    CompilerError
        If Triton refuses it, with the kernel's name and Triton's message; or it waits too late for the one before it.
    """
    try:
        handle = triton_worker.build(*build.request, target=(target.backend, target.arch, target.warp_size))
    except Exception as error:
        raise CompilerError(f"Triton could not build {build.name}: {type(error).__name__}: {error}") from error
    metadata = handle.metadata  # type: ignore[attr-defined]
    return Compiled(
        build,
        handle,
        handle.asm["cubin"],  # type: ignore[attr-defined]
        int(metadata.shared),
        int(getattr(metadata, "global_scratch_size", 0) or 0),
        waits_first(handle.asm["ptx"], build.name),  # type: ignore[attr-defined]
    )


def compile_builds(
    builds: Sequence[Build], target: Target, *, workers: int | None = None
) -> list[Compiled | CompilerError]:
    """Compile many kernels, equal ones once; a failed one gives its error in its place.

    ``workers``: processes to use; None takes what the machine has, 1 compiles here.
    """
    distinct = list(dict.fromkeys(builds))
    count = min(workers or _processors(), len(distinct))
    if count > 1 and len(distinct) > _SERIAL_KERNELS:
        _POOL.compile(distinct, target, count)
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


def resources(cubin: bytes) -> Resources:
    """Registers and spilled bytes of a cubin with one kernel, as ``cuobjdump -res-usage`` of Triton's package tells.

    Raises
    ------
    CompilerError
        If the tool is missing or refuses the cubin.
    """
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompilerError(f"cannot read the resources of a cubin: {error}") from error
    registers = re.search(r"REG:(\d+)", done.stdout)
    # what does not fit into registers lies on the thread's stack: arrays indexed at run time, and spills
    stack = re.search(r"STACK:(\d+)", done.stdout)
    local = re.search(r"LOCAL:(\d+)", done.stdout)
    if registers is None or stack is None or local is None:
        raise CompilerError(f"cuobjdump says nothing of registers: {done.stdout!r}")
    return Resources(int(registers[1]), int(stack[1]) + int(local[1]))


class _Worker:
    """One process that compiles into Triton's cache; it ends when this process does."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, triton_worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def compile(self, build: Build, target: Target) -> None:
        """Compile one kernel there. That it failed is not looked at: the caller meets the error when it loads it."""
        from triton import knobs

        request = [knobs.cache.dir, *build.request, [target.backend, target.arch, target.warp_size]]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise ConnectionError("a compiling process ended")

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class _Pool:
    """Processes that are kept between builds."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self.lock = threading.Lock()
        self.owner = os.getpid()

    def grow(self, count: int) -> list[_Worker]:
        if self.owner != os.getpid():  # after a fork the processes are the parent's
            self.workers, self.owner = [], os.getpid()
        self.workers = [w for w in self.workers if w.alive()]
        self.workers.extend(_Worker() for _ in range(count - len(self.workers)))
        return self.workers[:count]

    def compile(self, builds: Sequence[Build], target: Target, count: int) -> None:
        with self.lock:
            pending = iter(builds)
            take = threading.Lock()

            def serve(worker: _Worker) -> None:
                while True:
                    with take:
                        build = next(pending, None)
                    if build is None:
                        return
                    worker.compile(build, target)

            with concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="memplan-triton") as threads:
                for future in [threads.submit(serve, worker) for worker in self.grow(count)]:
                    try:
                        future.result()
                    except (OSError, ValueError) as error:
                        _log.warning("a Triton compiling process failed (%s); the rest is compiled here", error)

    def close(self) -> None:
        if self.owner == os.getpid():
            for worker in self.workers:
                worker.close()
        self.workers = []


_POOL = _Pool()
atexit.register(_POOL.close)


def start_workers(count: int | None = None) -> None:
    """Start the compiling processes beforehand, while something else is still being done."""
    with _POOL.lock:
        _POOL.grow(count or _processors())


def _processors() -> int:
    return len(os.sched_getaffinity(0))
