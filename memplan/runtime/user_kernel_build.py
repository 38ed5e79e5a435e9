"""User kernels from their data: `KernelSource` -> Triton's `JITFunction`, in any process.

The functions are compiled from their stored source under the user's file name and line numbers, so that errors and
profiles show the user's lines, and Triton's cache on disk knows them already where they ran uncompiled.
"""

from __future__ import annotations
import __future__

import importlib
import linecache
import threading
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Protocol, cast

from memplan.ir.user_kernel import (
    Constexpr,
    FixedValue,
    FunctionReference,
    FunctionSource,
    Import,
    KernelSource,
    Known,
    Namespace,
    TritonType,
    Value,
)

_LOCK = threading.RLock()


class BuiltKernel:
    """The live functions of a `KernelSource`: ``entry`` is the one to launch."""

    def __init__(self, source: KernelSource) -> None:
        self.source = source
        self.functions: dict[str, object] = {}
        self.scopes: dict[str, dict[str, object]] = {}
        for function in source.functions:
            self.scopes[function.key] = {"__name__": function.module, "__builtins__": __builtins__}
        # functions name one another: all exist before any scope is filled, but defaults are evaluated at once
        for function in reversed(source.functions):
            for name, known in function.names:
                if not _mentions(known):
                    self.scopes[function.key][name] = self.known(known)
        for function in reversed(source.functions):
            self.functions[function.key] = _define(function, self.scopes[function.key])
        for function in source.functions:
            for name, known in function.names:
                if _mentions(known):
                    self.scopes[function.key][name] = self.known(known)
        self.entry = self.functions[source.entry]

    def known(self, known: Known) -> object:
        match known:
            case Import(module, attribute):
                found: object = importlib.import_module(module)
                for part in attribute.split(".") if attribute else ():
                    found = getattr(found, part)
                return found
            case Namespace(name, members):
                made = ModuleType(name)
                for member, value in members:
                    setattr(made, member, self.known(value))
                return made
            case FunctionReference(key):
                return self.functions[key]
            case Value(value):
                return self.value(value)

    def value(self, value: FixedValue) -> object:
        """A constant as Triton takes it."""
        import triton.language as tl

        match value:
            case TritonType(name):
                return tl.dtype(name)
            case FunctionReference(key):
                return self.functions[key]
            case Constexpr(inner):
                return tl.constexpr(self.value(inner))
            case tuple():
                return tuple(self.value(v) for v in value)
            case _:
                return value


def _mentions(known: Known) -> bool:
    """Whether a function of the kernel's own is in it."""
    match known:
        case FunctionReference():
            return True
        case Namespace(_, members):
            return any(_mentions(m) for _, m in members)
        case Value(value):
            return _holds_function(value)
        case _:
            return False


def _holds_function(value: FixedValue) -> bool:
    if isinstance(value, tuple):
        return any(_holds_function(v) for v in value)
    if isinstance(value, Constexpr):
        return _holds_function(value.value)
    return isinstance(value, FunctionReference)


def _define(function: FunctionSource, scope: dict[str, object]) -> object:
    """The function, decorated by ``triton.jit``."""
    import triton

    filename = f"<memplan user kernel {function.key} {abs(hash(function)):x}>"
    first = function.line + function.head
    text = "\n" * (first - 1) + function.source
    # Triton reads the source of what it decorates from here
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    flags = __future__.annotations.compiler_flag if function.future_annotations else 0
    exec(compile(text, filename, "exec", flags=flags, dont_inherit=True), scope)
    python = scope[function.name]
    assert isinstance(python, FunctionType)
    python.__qualname__ = function.qualname
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in function.options}
    decorate = cast("Callable[..., Callable[[FunctionType], _Jit]]", triton.jit)
    jit = decorate(**options)(python)
    if hasattr(jit, "raw_src"):  # the interpreter's functions have none
        jit.raw_src = ["\n"] * function.head + list(jit.raw_src)
        jit.starting_line_number = function.line
    python.__code__ = python.__code__.replace(co_filename=function.file)
    scope[function.name] = jit
    return jit


class _Jit(Protocol):
    """What `triton.jit` makes of a function."""

    raw_src: list[str]
    starting_line_number: int


@lru_cache(maxsize=1024)
def _built(source: KernelSource) -> BuiltKernel:
    return BuiltKernel(source)


def build_kernel(source: KernelSource) -> BuiltKernel:
    """The live kernel; equal sources are built once."""
    with _LOCK:
        return _built(source)
