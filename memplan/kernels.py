"""Kernels of a program from data to callables: named, deduplicated, printed, built and loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy
import torch

from .codegen.cpp_kernel import BUILD_FLAGS, emit_cpp_library
from .codegen.printers import pexpr
from .codegen.triton_kernel import TritonKernel, emit_triton
from .ir.canonical import CanonicalKernel, canonicalize
from .ir.config import Config
from .ir.loops import Kernel
from .ir.program import KernelOp, Program
from .runtime.build import build_library
from .runtime.cache import Cache
from .runtime.cpp_launch import load_kernels
from .runtime.triton_build import Target, compile_kernels
from .runtime.triton_launch import Launcher

Callables = Mapping[str, Callable[..., object]]


@dataclass(frozen=True)
class KernelArguments:
    """How one kernel operation is called: its source's name, buffers and size symbols in argument order."""

    source: str
    buffers: tuple[str, ...]
    symbols: tuple[sympy.Symbol, ...]


@dataclass(frozen=True)
class KernelSet:
    """All kernels of a program: for each operation its arguments, for each source its canonical kernel."""

    arguments: Mapping[str, KernelArguments]
    sources: Mapping[str, tuple[str, CanonicalKernel]]  # name -> (device type, kernel)
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
        canonical = canonicalize(op.kernel)
        device = op.device.partition(":")[0]
        key = (device, canonical.kernel)
        if key not in names:
            names[key] = f"k{len(names)}_{_describe(op)}"
            sources[names[key]] = (device, canonical)
        name = names[key]
        arguments[op.name] = KernelArguments(name, canonical.buffers, canonical.symbols)
        users.setdefault(name, []).append(op)
    return KernelSet(arguments, sources, {k: tuple(v) for k, v in users.items()})


def _describe(op: KernelOp) -> str:
    """A short identifier from the operators that the kernel came from."""
    seen = dict.fromkeys(o.op.split(".")[1] if o.op.count(".") == 2 else o.op for o in op.origins if o.op)
    text = "_".join(re.sub(r"\W+", "_", s).strip("_") for s in list(seen)[:4]) or "kernel"
    return text[:60]


def build_cpu(kernels: KernelSet, program: Program, config: Config) -> tuple[Callables, str]:
    """Build and load the CPU kernels; returns them and their source.

    Raises
    ------
    CompilerError
        Without a working compiler, or if it refuses the source.
    """
    mine = [(n, k) for n, (device, k) in kernels.sources.items() if device == "cpu"]
    if not mine:
        return {}, ""
    source = emit_cpp_library(mine, program.hints, deterministic=torch.are_deterministic_algorithms_enabled())
    cache = Cache(config.cache_dir) if config.cache_dir else None
    path = build_library(source, name=program.name, flags=BUILD_FLAGS, cache=cache)
    return load_kernels(path, {n: (len(k.buffers), len(k.symbols)) for n, k in mine}), source


def build_cuda(kernels: KernelSet, program: Program, config: Config) -> tuple[Callables, str]:
    """Build the GPU kernels and make launchers; returns them and their sources.

    Raises
    ------
    CompilerError
        If Triton refuses a kernel.
    """
    found = [
        emit_triton(k, name=n, hints=program.hints, deterministic=torch.are_deterministic_algorithms_enabled())
        for n, (device, k) in kernels.sources.items()
        if device == "cuda"
    ]
    if not found:
        return {}, ""
    compiled = compile_kernels(found, Target.current())
    launchers: dict[str, Callable[..., object]] = {}
    for kernel, built in zip(found, compiled, strict=True):
        launchers[kernel.name] = Launcher(built, _grid(kernel), kernel.pointers)
    return launchers, "\n".join(k.source for k in found)


def _grid(kernel: TritonKernel) -> int | Callable[..., int]:
    """The number of program instances: a number, or a function of the kernel's size arguments."""
    size = kernel.grid(kernel.configs[0])
    if isinstance(size, int) or size.is_Integer:
        return int(size)
    names = ", ".join(str(s) for s in kernel.symbols)
    code = compile(f"lambda {names}: {pexpr(size)}", f"<memplan grid of {kernel.name}>", "eval")
    return eval(code)  # type: ignore[no-any-return]


def build(kernels: KernelSet, program: Program, config: Config) -> tuple[dict[str, Callable[..., object]], str]:
    """All kernels of the program as callables, and their source text."""
    cpu, cpp_source = build_cpu(kernels, program, config)
    cuda, triton_source = build_cuda(kernels, program, config)
    return {**cpu, **cuda}, cpp_source + triton_source


