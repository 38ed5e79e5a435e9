"""Which language a plan's wrapper is in, and which wrapper a call takes."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from .codegen.cpp_wrapper import CPP_WRAPPER_FLAGS, CppWrapper, GridKernel
from .codegen.wrapper_lines import WrapperProgram
from .cpp_wrapping import print_in_cpp
from .ir.config import Config
from .ir.errors import CacheError, CompilerError, UnsupportedError
from .ir.in_flight import HostCopy
from .runtime.cache import Cache
from .runtime.cpp_wrapper import build_wrapper
from .runtime.cpp_wrapper_host import host
from .runtime.toolchain import find_toolchain

log = logging.getLogger(__name__)
Call = Callable[..., object]

#: why a wrapper cannot be had in C++
REASONS = (UnsupportedError, CompilerError, CacheError)


def choose_wrapper(
    lines: WrapperProgram,
    grids: Mapping[str, GridKernel],
    config: Config,
    users: Mapping[str, tuple[int | None, ...]] | None = None,
) -> CppWrapper | None:
    """The wrapper in C++ where it is wanted and can be had; None where Python runs the plan.

    ``grids``: GPU kernels by name, as they were emitted. ``users``: users' kernels of one variant, as `print_cpp` has
    them.

    Raises
    ------
    UnsupportedError
        If C++ was asked for by name, for what only the Python wrapper does.
    """
    if config.wrapper == "python":
        return None
    copies = any(isinstance(op, HostCopy) for op in lines.plan.program.operations)
    if copies and config.wrapper == "cpp":
        raise UnsupportedError("option 'offload' needs the Python wrapper: leave 'wrapper' at \"auto\"")
    if copies:
        return None
    if config.wrapper == "cpp":
        return print_in_cpp(lines, grids, config, users)
    try:
        find_toolchain(cache=_cache(config))
        return print_in_cpp(lines, grids, config, users)
    except REASONS as error:
        say_python(str(error))
        return None


@functools.cache
def say_python(reason: str) -> None:
    """Say once for each reason that the wrapper is Python."""
    log.warning("wrapper='auto' is Python, which calls kernels more slowly: %s", reason)


def _cache(config: Config) -> Cache:
    return Cache(config.cache_dir) if config.cache_dir else Cache()


_builder = ThreadPoolExecutor(1, thread_name_prefix="memplan-wrapper")


def build_ahead(printed: CppWrapper, name: str, config: Config) -> None:
    """Build a wrapper's library, and the host that calls it, beside the kernels. What fails is met again when it is
    loaded: both builds are of one key in the cache."""

    def build() -> None:
        try:
            host(_cache(config))
            build_wrapper(printed, name, CPP_WRAPPER_FLAGS, _cache(config))
        except REASONS as error:
            log.debug("building %s ahead failed, and is tried again: %s", name, error)

    _builder.submit(build)


def watched(count: int) -> bool:
    """Whether one of the active modes is the user's: AOTAutograd checks custom operators by one of its own."""
    modes = map(torch._C._get_dispatch_stack_at, range(count))
    return any(not type(mode).__module__.startswith("torch._functorch.") for mode in modes)


def seen_by_modes(native: Call, make_python: Callable[[], Call]) -> Call:
    """The call in C++; in Python while a `TorchDispatchMode` is active, which does not see torch's C functions.

    (Dynamo itself runs no compiled forward under such a mode; a compiled backward may be called under one.)
    """
    count = torch._C._len_torch_dispatch_stack
    made: list[Call] = []
    lock = threading.Lock()

    def call(args: list[object]) -> object:
        if not count() or not watched(count()):
            return native(args)
        with lock:
            if not made:
                made.append(make_python())
        return made[0](args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call
