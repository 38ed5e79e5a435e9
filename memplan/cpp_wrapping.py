"""`options={"wrapper": "cpp"}`: the wrapper lines of a plan printed as C++, built, and joined to the built kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import partial

from .artifact import Linked
from .codegen.cpp_wrapper import CPP_WRAPPER_FLAGS, CppWrapper, GridKernel, print_cpp
from .codegen.wrapper_lines import WrapperProgram
from .ir.config import Config
from .runtime.cache import Cache
from .runtime.cpp_wrapper import KernelRow, build_wrapper, load_wrapper


def print_in_cpp(
    lines: WrapperProgram,
    grids: Mapping[str, GridKernel],
    config: Config,
    users: Mapping[str, tuple[int | None, ...]] | None = None,
) -> CppWrapper:
    """The program's wrapper as C++; ``users`` as `print_cpp` has them.

    Raises
    ------
    UnsupportedError
        For what only the Python wrapper does, naming it.
    """
    return print_cpp(lines, grids, users=users, poison=config.poison)


def load_in_cpp(
    printed: CppWrapper,
    name: str,
    linked: Linked,
    config: Config,
) -> Callable[..., object]:
    """The wrapper as a library of its own, called through the native host.

    Raises
    ------
    CompilerError, CacheError
        If the library cannot be built.
    """
    cache = Cache(config.cache_dir) if config.cache_dir else Cache()
    path = build_wrapper(printed, name, CPP_WRAPPER_FLAGS, cache)
    launchers = linked.launchers
    arenas = {} if linked.communicating is None else linked.communicating.names()
    return load_wrapper(
        printed,
        path,
        {
            name: launchers[name].row if name in launchers else partial(_cpu_row, function)
            for name, function in linked.kernels.items()
        },
        callables=linked.callables,
        constants=linked.constants,
        python_kernels={**linked.kernels, **arenas},
        cache=cache,
    )


def _cpu_row(function: Callable[..., object]) -> KernelRow:
    return (ctypes.cast(function, ctypes.c_void_p).value or 0, 0, 0, 0, 0, 0, 0, 0, 0)  # type: ignore[arg-type]
