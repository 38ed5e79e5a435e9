"""What runs a plan, as data: the wrapper's text and the built kernels. It is cached, saved and loaded as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from .codegen.cpp_wrapper import CppWrapper, PythonLine
from .codegen.python_wrapper import PythonWrapper
from .communicating import Communicating
from .ir.loops import Size
from .ir.plan import Reserve
from .runtime.cache import Cache, key_of
from .runtime.cpp_launch import CpuLibrary, Signatures, load_kernels
from .runtime.triton_build import Build, Compiled
from .runtime.triton_launch import GridKernel, Launcher, make_launcher, widening
from .runtime.user_kernel_direct import Direct, DirectLauncher
from .saving_encoding import allow

#: What the name of a kernel ends with that counts in 64 bits, where there is one beside it that does not.
WIDE = "@wide"

Callables = Mapping[str, Callable[..., object]]


@dataclass(frozen=True, slots=True)
class CachedLibrary:
    """A library of kernels by its key in the cache."""

    key: str
    signatures: Signatures


@dataclass(frozen=True, slots=True)
class GpuKernel:
    """A built kernel of a GPU: what its grid is made of, and its cubin.

    ``index``: of the GPU that it runs on. ``entry``: the function that is in the cubin. ``fixed``: of a user kernel the
    bits of its arguments, as `memplan.runtime.user_kernel_direct.Direct` has them; None for our own. The rest as in
    `memplan.codegen.triton_kernel.TritonKernel` and `memplan.runtime.triton_build.Compiled`.
    """

    name: str
    index: int
    arguments: tuple[tuple[str, str], ...]
    symbols: tuple[sympy.Symbol, ...]
    axes: tuple[tuple[Size, str], ...]
    index_limit: tuple[sympy.Expr, ...]
    build: Build
    entry: str
    cubin: bytes
    shared_bytes: int
    fixed: tuple[int | None, ...] | None = None
    early: bool = False

    @staticmethod
    def of(name: str, index: int, grid: GridKernel, compiled: Compiled) -> GpuKernel:
        entry = str(compiled.handle.name)  # type: ignore[attr-defined]
        limits = tuple(grid.index_limit)
        given = (grid.arguments, grid.symbols, grid.axes, limits, compiled.build, entry)
        return GpuKernel(name, index, *given, compiled.cubin, compiled.shared_bytes, early=compiled.early)

    @staticmethod
    def of_user(name: str, index: int, user: Direct) -> GpuKernel:
        """A user's kernel of one variant."""
        entry = str(user.compiled.handle.name)  # type: ignore[attr-defined]
        build = user.compiled.build
        given = (build.arguments, (), (), (), build, entry, user.compiled.cubin, user.compiled.shared_bytes)
        return GpuKernel(name, index, *given, user.fixed)

    def launcher(self) -> Launcher:
        """Its launcher; the cubin is not loaded yet."""
        compiled = Compiled(self.build, _Entry(self.entry), self.cubin, self.shared_bytes, 0, self.early)
        return make_launcher(self, compiled, self.index)


@dataclass(frozen=True, slots=True)
class _Entry:
    """As much of Triton's handle as loading a cubin through the driver takes."""

    name: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled program.

    Attributes
    ----------
    python, cpp:
        The wrapper in each language; the C++ one runs where there is one.
    library:
        Kernels of the CPU; None without any.
    gpu:
        Kernels of GPUs.
    waterfall:
        (name of a decision, peak of live bytes after it).
    reserves:
        What is made free in device memory before each call.
    """

    python: PythonWrapper
    cpp: CppWrapper | None
    library: CachedLibrary | None
    gpu: tuple[GpuKernel, ...]
    waterfall: tuple[tuple[str, int], ...]
    reserves: tuple[Reserve, ...] = ()


for _class in (Artifact, CachedLibrary, GpuKernel, Build, PythonWrapper, CppWrapper, PythonLine):
    allow(_class)


@dataclass(frozen=True)
class Linked:
    """What a wrapper calls and reads, under the names that it uses."""

    kernels: Callables
    launchers: Mapping[str, Launcher]
    callables: Mapping[str, object]
    constants: Mapping[str, torch.Tensor]
    communicating: Communicating | None = None


def cached(library: CpuLibrary | None) -> CachedLibrary | None:
    """A built library by its key."""
    return None if library is None else CachedLibrary(key_of(library.path), library.signatures)


def load_cached(library: CachedLibrary | None, store: Cache) -> Callables | None:
    """The kernels of a library in the cache; None if it is not there any more.

    Raises
    ------
    CompilerError
        If the loader refuses it.
    """
    if library is None:
        return {}
    path = store.get(library.key)
    return None if path is None else load_kernels(path, library.signatures)


def load_gpu(
    kernels: Sequence[GpuKernel], make_wide: Callable[[str], Launcher]
) -> tuple[dict[str, Callable[..., object]], dict[str, Launcher]]:
    """GPU kernels as the Python wrapper calls them, and their launchers; loaded onto their GPUs.

    Parameters
    ----------
    make_wide:
        Gives the kernel of a name that counts in 64 bits, where sizes come that need it.

    Raises
    ------
    RuntimeError
        If the driver refuses a cubin.
    CompilerError
        Where there is no compiler for the module that loads them.
    """
    launchers = {k.name: k.launcher() for k in kernels}
    callables: dict[str, Callable[..., object]] = {}
    for kernel in kernels:
        launcher = launchers[kernel.name]
        launcher.function()
        if kernel.fixed is not None:
            callables[kernel.name] = DirectLauncher(launcher, kernel.fixed)
            continue
        wide = (lambda name: lambda: make_wide(name))(kernel.name)
        callables[kernel.name] = widening(launcher, wide) if kernel.index_limit else launcher.bound()
    return callables, launchers
