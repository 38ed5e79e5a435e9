"""Kernels of a program from data to callables: named, deduplicated, printed, built and loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import sympy
import torch

from .codegen.cpp_kernel import BUILD_FLAGS, emit_cpp, emit_cpp_library
from .codegen.triton_kernel import TritonKernel, emit_triton
from .fallback import Failure, KernelBuildError, NoCompilerError
from .ir.canonical import CanonicalKernel, canonicalize, hoist_offsets
from .ir.config import Config
from .ir.early_launch import early_launch
from .ir.errors import CacheError, CompilerError, MemplanError
from .ir.loops import Kernel
from .ir.program import KernelOp, Program
from .runtime.build import build_library, load_library
from .runtime.cache import Cache
from .runtime.cpp_launch import CpuLibrary, load_kernels
from .runtime.toolchain import available_cpus, find_toolchain
from .runtime.triton_build import Build, Target, compile_builds
from .runtime.triton_launch import Launcher, make_launcher, widening

Callables = Mapping[str, Callable[..., object]]
#: which configuration each of some emitted kernels is to be built in (the first one where nothing is said)
Choose = Callable[[Mapping[str, TritonKernel]], Mapping[str, int]]


def _first(emitted: Mapping[str, TritonKernel]) -> Mapping[str, int]:
    return {}


@dataclass(frozen=True)
class KernelArguments:
    """How one kernel operation is called: its source's name, buffers and size symbols in argument order.

    ``offsets``: bytes to add to each buffer's address; empty for none.
    """

    source: str
    buffers: tuple[str, ...]
    symbols: tuple[sympy.Symbol, ...]
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True)
class KernelSet:
    """All kernels of a program: for each operation its arguments, for each source its canonical kernel."""

    arguments: Mapping[str, KernelArguments]
    sources: Mapping[str, tuple[str, CanonicalKernel]]  # name -> (device, kernel)
    #: operations that run each source, for messages
    users: Mapping[str, tuple[KernelOp, ...]]


def collect(program: Program) -> KernelSet:
    """Equal kernels (up to names) share one source; names say what the kernel does and are deterministic."""
    names: dict[tuple[str, Kernel], str] = {}
    sources: dict[str, tuple[str, CanonicalKernel]] = {}
    arguments: dict[str, KernelArguments] = {}
    users: dict[str, list[KernelOp]] = {}
    for op in program.operations:
        if not isinstance(op, KernelOp):
            continue
        canonical = hoist_offsets(canonicalize(op.kernel))
        key = (op.device, canonical.kernel)  # a kernel is loaded onto one GPU
        if key not in names:
            names[key] = f"k{len(names)}_{_describe(op)}"
            sources[names[key]] = (op.device, canonical)
        name = names[key]
        arguments[op.name] = KernelArguments(name, canonical.buffers, canonical.symbols, canonical.offsets)
        users.setdefault(name, []).append(op)
    return KernelSet(arguments, sources, {k: tuple(v) for k, v in users.items()})


def _describe(op: KernelOp) -> str:
    """A short identifier from the operators that the kernel came from."""
    seen = dict.fromkeys(o.op.split(".")[1] if o.op.count(".") == 2 else o.op for o in op.origins if o.op)
    text = "_".join(re.sub(r"\W+", "_", s).strip("_") for s in list(seen)[:4]) or "kernel"
    return text[:60]


#: what an emitter may raise: that it cannot, or (our own mistakes) that it did not expect this kernel
_EMITTER_ERRORS = (MemplanError, TypeError, ValueError, KeyError, IndexError, AssertionError, AttributeError)


@dataclass(frozen=True)
class BuiltKernels:
    """Kernels ready to run.

    Attributes
    ----------
    callables:
        For the Python wrapper: functions of addresses and sizes, after the stream where they run on a GPU.
    launchers:
        For the C++ wrapper: what is launched on a GPU, loaded when it is asked for its row.
    emitted:
        GPU kernels as they were printed.
    source:
        The text of all of them.
    library:
        What those of the CPU are in.
    """

    callables: Callables
    source: str
    launchers: Mapping[str, Launcher] = field(default_factory=dict)
    emitted: Mapping[str, TritonKernel] = field(default_factory=dict)
    library: CpuLibrary | None = None


def build_cpu(kernels: KernelSet, program: Program, config: Config) -> BuiltKernels:
    """Build and load the CPU kernels.

    Raises
    ------
    NoCompilerError
        Without a working compiler, or a place to write to.
    KernelBuildError
        If kernels cannot be emitted, or the compiler refuses them.
    """
    mine = [(n, k) for n, (device, k) in kernels.sources.items() if device == "cpu"]
    if not mine:
        return BuiltKernels({}, "")
    store = Cache(config.cache_dir) if config.cache_dir else Cache()
    try:
        find_toolchain(cache=store)
    except (CompilerError, CacheError) as error:
        raise NoCompilerError("cpu", error) from error
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        source = emit_cpp_library(mine, program.hints, deterministic=deterministic)
    except _EMITTER_ERRORS as error:
        failures = _cpp_emission_failures(kernels, mine, program, deterministic)
        if not failures:
            raise
        raise KernelBuildError(failures) from error
    try:
        path = build_library(source, name=program.name, flags=BUILD_FLAGS, cache=store)
        signatures = {n: (len(k.buffers), len(k.symbols), k.kernel.checks_indices) for n, k in mine}
        loaded = load_kernels(path, signatures)
    except CacheError as error:
        raise NoCompilerError("cpu", error) from error
    except CompilerError as error:
        raise KernelBuildError(_cpp_build_failures(kernels, mine, program, deterministic, store, error)) from error
    return BuiltKernels(loaded, source, library=CpuLibrary(path, signatures))


def _cpp_emission_failures(
    kernels: KernelSet, mine: Sequence[tuple[str, CanonicalKernel]], program: Program, deterministic: bool
) -> tuple[Failure, ...]:
    failures = []
    for name, kernel in mine:
        try:
            emit_cpp(kernel, name=name, hints=program.hints, deterministic=deterministic)
        except _EMITTER_ERRORS as error:
            failures.append(Failure(kernels.users[name], error))
    return tuple(failures)


def _cpp_build_failures(
    kernels: KernelSet,
    mine: Sequence[tuple[str, CanonicalKernel]],
    program: Program,
    deterministic: bool,
    store: Cache,
    error: CompilerError,
) -> tuple[Failure, ...]:
    """Which kernels of a library that does not build are to blame: each is built alone. All, if none fails alone."""

    def alone(entry: tuple[str, CanonicalKernel]) -> CompilerError | None:
        source = emit_cpp_library([entry], program.hints, deterministic=deterministic)
        try:
            load_library(build_library(source, name=entry[0], flags=BUILD_FLAGS, cache=store))
        except CompilerError as refused:
            return refused
        return None

    with ThreadPoolExecutor(min(len(mine), available_cpus()), thread_name_prefix="memplan-build") as pool:
        results = list(pool.map(alone, mine))
    failures = tuple(Failure(kernels.users[n], e) for (n, _), e in zip(mine, results, strict=True) if e is not None)
    return failures or (Failure(tuple(u for n, _ in mine for u in kernels.users[n]), error),)


def build_cuda(kernels: KernelSet, program: Program, config: Config, choose: Choose = _first) -> BuiltKernels:
    """Build the GPU kernels, each in the configuration that is chosen for it, and make launchers.

    Raises
    ------
    KernelBuildError
        If kernels cannot be emitted, or Triton refuses them.
    """
    mine = [(n, d, k) for n, (d, k) in kernels.sources.items() if d.startswith("cuda")]
    if not mine:
        return BuiltKernels({}, "")
    hints, deterministic = program.hints, torch.are_deterministic_algorithms_enabled()
    target = Target.current()
    early = early_launch(config.early_launch, target.arch)
    failures: list[Failure] = []
    emitted: dict[str, TritonKernel] = {}
    for name, _, kernel in mine:
        try:
            emitted[name] = emit_triton(kernel, name=name, hints=hints, deterministic=deterministic, early=early)
        except _EMITTER_ERRORS as error:
            failures.append(Failure(kernels.users[name], error))
    chosen = {} if failures else choose(emitted)
    builds = [Build.of(k, k.configs[chosen.get(n, 0)]) for n, k in emitted.items()]
    launchers: dict[str, Launcher] = {}
    for (name, found), built in zip(emitted.items(), compile_builds(builds, target), strict=True):
        if isinstance(built, CompilerError):
            failures.append(Failure(kernels.users[name], built))
            continue
        launchers[name] = make_launcher(found, built, _index(kernels.sources[name][0]))
    if failures:
        raise KernelBuildError(tuple(failures))
    callables: dict[str, Callable[..., object]] = {}
    for name, launcher in launchers.items():
        if emitted[name].index_limit:
            launcher.load()
            make_wide = partial(build_wide, *kernels.sources[name], name, hints, deterministic, config)
            callables[name] = widening(launcher, make_wide)
        else:
            callables[name] = launcher.bound()  # loaded now: not while somebody records a CUDA graph
    return BuiltKernels(callables, "\n".join(k.source for k in emitted.values()), launchers, emitted)


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def build_wide(
    device: str,
    kernel: CanonicalKernel,
    name: str,
    hints: Mapping[sympy.Symbol, int],
    deterministic: bool,
    config: Config,
) -> Launcher:
    """The kernel built to count in 64 bits.  Raises CompilerError if Triton refuses it."""
    target = Target.current()
    early = early_launch(config.early_launch, target.arch)
    emitted = emit_triton(kernel, name=name, hints=hints, deterministic=deterministic, wide=True, early=early)
    built = compile_builds([Build.of(emitted, emitted.configs[0])], target)[0]
    if isinstance(built, CompilerError):
        raise built
    return make_launcher(emitted, built, _index(device))


def build(kernels: KernelSet, program: Program, config: Config, choose: Choose = _first) -> BuiltKernels:
    """All kernels of the program; ``choose`` says which configuration those of a GPU are built in."""
    cpu = build_cpu(kernels, program, config)
    cuda = build_cuda(kernels, program, config, choose)
    callables, source = {**cpu.callables, **cuda.callables}, cpu.source + cuda.source
    return replace(cuda, callables=callables, source=source, library=cpu.library)
