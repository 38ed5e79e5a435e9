"""`options={"wrapper": "cpp"}`: the wrapper lines of a plan printed as C++, built, and joined to the built kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .codegen.cpp_wrapper import CPP_WRAPPER_FLAGS, print_cpp
from .codegen.wrapper_lines import WrapperProgram
from .ir.config import Config
from .ir.errors import UnsupportedError
from .kernels import BuiltKernels
from .runtime.cache import Cache
from .runtime.cpp_wrapper import KernelRow, build_wrapper, load_wrapper


@dataclass(frozen=True)
class WrappedInCpp:
    """The callable, and the C++ text that it runs."""

    call: Callable[..., object]
    source: str


def wrap_in_cpp(lines: WrapperProgram, kernels: BuiltKernels, config: Config) -> WrappedInCpp:
    """The program as a library of its own, called through the native host.

    Raises
    ------
    UnsupportedError
        For what only the Python wrapper does, naming it.
    CompilerError, CacheError
        If the library cannot be built.
    """
    if lines.plan.arenas:
        raise UnsupportedError(
            "wrapper='cpp' does not take symmetric memory yet; use 'auto' or 'python', or "
            "communication={'all_reduce': 'library'}",
            where=lines.name,
        )
    printed = print_cpp(lines, kernels.emitted, poison=config.poison)
    cache = Cache(config.cache_dir) if config.cache_dir else Cache()
    path = build_wrapper(printed, lines.name, CPP_WRAPPER_FLAGS, cache)
    program = lines.plan.program
    call = load_wrapper(
        printed,
        path,
        {
            name: kernels.launchers[name].row if name in kernels.launchers else partial(_cpu_row, function)
            for name, function in kernels.callables.items()
        },
        callables=program.callables,
        constants=program.constants,
        python_kernels=kernels.callables,
        cache=cache,
    )
    return WrappedInCpp(call, printed.source)


def _cpu_row(function: Callable[..., object]) -> KernelRow:
    return (ctypes.cast(function, ctypes.c_void_p).value or 0, 0, 0, 0, 0, 0, 0, 0)  # type: ignore[arg-type]
