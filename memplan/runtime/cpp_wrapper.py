"""From a printed C++ wrapper to a callable: built, loaded, its imports found, its tables filled."""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from memplan.ir.errors import UnsupportedError

from .build import build_library, load_library
from .cache import Cache
from .cpp_wrapper_host import find_symbol, host
from .python_runtime import namespace

#: One row of a call's table of kernels: function, threads, bytes of shared memory, whether it is started early, grid,
#: three block sizes, the GPU's context. What does not apply is zero.
KernelRow = tuple[int, int, int, int, int, int, int, int, int]
_KINDS = {"tensor": 0, "number": 1, "object": 2, "literal": 3}


class Line(Protocol):
    @property
    def source(self) -> str: ...


class Printed(Protocol):
    """What `memplan.codegen.cpp_wrapper.print_cpp` gives."""

    @property
    def source(self) -> str: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[tuple[str, object], ...]: ...
    @property
    def kernels(self) -> tuple[str, ...]: ...
    @property
    def constants(self) -> tuple[str, ...]: ...
    @property
    def lines(self) -> Sequence[Line]: ...
    @property
    def operators(self) -> Mapping[str, str]: ...
    @property
    def tensors_out(self) -> int: ...
    @property
    def numbers_out(self) -> int: ...


class _Import(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("slot", ctypes.POINTER(ctypes.c_void_p))]


def build_wrapper(printed: Printed, name: str, flags: tuple[str, ...], cache: Cache | None = None) -> Path:
    """The wrapper's library, built or from the cache.

    Raises
    ------
    CompilerError, CacheError
        If it cannot be built.
    """
    # a comment that changes, a line number for example, is no new library
    lines = (line for line in printed.source.splitlines() if not line.lstrip().startswith("//"))
    return build_library("\n".join(lines), name=f"{name}_wrapper", flags=flags, openmp=False, native=False, cache=cache)


@functools.cache
def _linked(path: Path) -> ctypes.CDLL:
    """The loaded library with its imports filled in."""
    library = load_library(path)
    count = ctypes.c_int32.in_dll(library, "memplan_import_count").value
    for entry in (_Import * count).in_dll(library, "memplan_imports"):
        name = entry.name.decode()
        found = find_symbol(name)
        if found is None:
            raise UnsupportedError(f"torch {torch.__version__} has no {name}, which the C++ wrapper calls")
        entry.slot[0] = found
    return library


def load_wrapper(
    printed: Printed,
    path: Path,
    kernels: Mapping[str, Callable[[], KernelRow]],
    *,
    callables: Mapping[str, object],
    constants: Mapping[str, torch.Tensor],
    python_kernels: Mapping[str, Callable[..., object]],
    cache: Cache | None = None,
) -> Callable[..., object]:
    """The callable of a built wrapper: takes one boxed list, returns a tuple.

    Parameters
    ----------
    kernels:
        For each kernel its row, asked for at the first call (a GPU's kernels are loaded then).
    python_kernels:
        Kernels as Python callables, for lines that Python runs.

    Raises
    ------
    UnsupportedError
        If torch lacks a function that the wrapper calls.
    """
    module, library = host(cache), _linked(path)
    names: dict[str, object] = {}

    def resolve(number: int) -> Callable[..., object]:
        """A line as a Python function; compiled when it is first wanted."""
        if not number:
            return _allocate_again
        if not names:
            names.update(namespace(printed.operators, callables, constants, python_kernels))
        scope: dict[str, object] = dict(names)
        exec(compile(printed.lines[number - 1].source, f"<memplan line {number}>", "exec"), scope)
        return scope["line"]  # type: ignore[return-value]

    def prepare() -> tuple[KernelRow, ...]:
        return tuple(kernels[k]() for k in printed.kernels)

    from .python_runtime import aligned

    graph: Callable[..., object] = module.graph(
        ctypes.cast(library.memplan_run, ctypes.c_void_p).value,
        "".join(kind[0] for kind in printed.inputs),
        tuple((_KINDS[kind], value) for kind, value in printed.outputs),
        printed.tensors_out,
        printed.numbers_out,
        tuple(aligned(constants[c]) for c in printed.constants),
        len(printed.lines) + 1,
        resolve,
        prepare,
        library,
    )
    graph._boxed_call = True  # type: ignore[attr-defined]
    return graph


def _allocate_again(dtype: int, device: int, index: int, dim: int, *shape: int) -> tuple[torch.Tensor]:
    """An allocation that failed in the C interface, for torch's own error."""
    where = torch.device("cuda", index) if device else torch.device("cpu")
    found = _dtype_codes()[dtype]
    return (torch.empty_strided(shape[:dim], shape[dim:], dtype=found, device=where),)


@functools.cache
def _dtype_codes() -> dict[int, torch.dtype]:
    """torch's number of each dtype, asked of its C interface."""
    found = {}
    for dtype in (d for d in vars(torch).values() if isinstance(d, torch.dtype)):
        address = find_symbol("aoti_torch_dtype_" + str(dtype).removeprefix("torch."))
        if address is not None:
            found[operator.index(ctypes.CFUNCTYPE(ctypes.c_int32)(address)())] = dtype
    return found
