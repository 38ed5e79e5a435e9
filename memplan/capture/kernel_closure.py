"""A live Triton kernel (``@triton.jit``, perhaps autotuned) as a `KernelSource`: everything that building it reads.

The functions are found as Triton's own dependency finder finds them: by the names in their source, in the scope of the
function, and through the attributes of modules.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

import torch

from ..ir.errors import UnsupportedError
from ..ir.user_kernel import (
    Constexpr,
    FixedValue,
    FunctionReference,
    FunctionSource,
    Import,
    KernelConfig,
    KernelSource,
    Known,
    Namespace,
    TritonType,
    Value,
)

if TYPE_CHECKING:
    from triton.runtime.autotuner import Autotuner, Config
    from triton.runtime.jit import JITFunction

#: modules that are whole in every process that has torch and Triton
_COMMON = ("triton", "torch", "math", "copy")


def kernel_source(
    kernel: object, constants: Mapping[str, object] = MappingProxyType({})
) -> tuple[KernelSource, dict[str, FixedValue]]:
    """The kernel as data, and constant arguments of it.

    Parameters
    ----------
    kernel:
        A `JITFunction`, or an `Autotuner` over one.
    constants:
        Arguments by name; functions among them become functions of the kernel's.

    Raises
    ------
    UnsupportedError
        If it has hooks, or uses something that is no data (an object of the user's own), with the kernel's line.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    function = kernel
    while isinstance(function, Autotuner):
        function = function.fn
    if not isinstance(function, JITFunction):
        raise UnsupportedError(f"a Triton kernel wrapped in {type(function).__name__}")
    closure = _Closure()
    entry = closure.function(function)
    found = KernelSource(entry.key, (), tuple(function.arg_names))
    where = f"{entry.file}:{entry.line + entry.head}"
    if isinstance(kernel, Autotuner):
        found = _autotuned(kernel, found, closure, where)
    fixed = dict(closure.values(constants, where))
    return replace(found, functions=tuple(closure.functions.values())), fixed


def _autotuned(kernel: Autotuner, found: KernelSource, closure: _Closure, where: str) -> KernelSource:
    for kind in ("pre_hook", "post_hook"):
        if getattr(kernel, f"user_defined_{kind}", False):
            raise UnsupportedError(
                f"@triton.autotune({kind}=...) runs the user's Python code around every timed launch, which a compiled "
                f"model cannot honour: leave {kind} out, or call the kernel outside of the compiled region",
                where=where,
            )
    return replace(
        found,
        configs=tuple(_config(c, closure, where) for c in kernel.configs),
        key=tuple(kernel.keys or ()),
        restore_value=tuple(kernel.restore_value),
        reset_to_zero=tuple(kernel.reset_to_zero),
    )


def _config(config: Config, closure: _Closure, where: str) -> KernelConfig:
    if config.pre_hook is not None:
        raise UnsupportedError(
            "triton.Config(pre_hook=...) runs the user's Python code before every launch, which a compiled model "
            "cannot honour: leave it out, or call the kernel outside of the compiled region",
            where=where,
        )
    constants = dict(config.kwargs)
    options = {k: v for k, v in config.all_kwargs().items() if k not in constants and v is not None}
    return KernelConfig(closure.values(constants, where), closure.values(options, where))


def fixed_value(value: object, closure: _Closure | None = None) -> FixedValue:
    """A constant as data.

    Raises
    ------
    UnsupportedError
        If it is an object that no text stands for.
    """
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    match value:
        case None | bool() | int() | float() | str() | torch.dtype():
            return value
        case tuple() | list():
            return tuple(fixed_value(v, closure) for v in value)
        case tl.constexpr():
            return Constexpr(fixed_value(value.value, closure))
        case tl.dtype():
            return TritonType(value.name)
        case JITFunction() if closure is not None:
            return FunctionReference(closure.function(value).key)
    raise UnsupportedError(f"a Triton kernel uses {value!r}, which is no constant")


class _Closure:
    """Functions by key, in the order in which they are found."""

    def __init__(self) -> None:
        self.functions: dict[str, FunctionSource] = {}
        self.keys: dict[int, str] = {}

    def values(self, given: Mapping[str, object], where: str) -> tuple[tuple[str, FixedValue], ...]:
        try:
            return tuple((k, fixed_value(v, self)) for k, v in given.items())
        except UnsupportedError as error:
            raise UnsupportedError(str(error), where=where) from error

    def function(self, jit: JITFunction[object]) -> FunctionSource:
        if id(jit) not in self.keys:
            self.add(jit)
        return self.functions[self.keys[id(jit)]]

    def add(self, jit: JITFunction[object]) -> None:
        python = jit.fn
        key = f"{python.__module__}.{python.__qualname__}"
        while key in self.functions:
            key += "'"
        self.keys[id(jit)] = key
        raw = list(jit.raw_src)
        head = next((k for k, line in enumerate(raw) if line.lstrip().startswith("def ")), 0)
        where = f"{python.__code__.co_filename}:{jit.starting_line_number + head}"
        if jit.pre_run_hooks:
            raise UnsupportedError("a Triton kernel with pre-run hooks", where=where)
        options = {
            "do_not_specialize": tuple(jit.do_not_specialize),
            "do_not_specialize_on_alignment": tuple(jit.do_not_specialize_on_alignment),
            "debug": jit.debug,
            "noinline": jit.noinline,
        }
        found = FunctionSource(
            key,
            python.__name__,
            python.__qualname__,
            python.__module__,
            jit.src,
            python.__code__.co_filename,
            jit.starting_line_number,
            head,
            (),
            self.values({k: v for k, v in options.items() if v}, where),
            bool(python.__code__.co_flags & __future__.annotations.compiler_flag),
        )
        self.functions[key] = found  # first, so that it may name itself
        names = tuple(self.names(jit, where))
        self.functions[key] = replace(found, names=names)

    def names(self, jit: JITFunction[object], where: str) -> Iterator[tuple[str, Known]]:
        nonlocals = inspect.getclosurevars(jit.fn).nonlocals
        scope = {**jit.fn.__globals__, **nonlocals}
        chains: dict[str, set[tuple[str, ...]]] = {}
        tree = ast.parse(jit.src)
        for node in ast.walk(tree):
            chain = _chain(node)
            if chain and chain[0] in scope:
                chains.setdefault(chain[0], set()).add(chain[1:])
        local = _locals(tree)
        for name in sorted(chains):
            try:
                yield name, self.known(scope[name], chains[name])
            except UnsupportedError as error:
                if name not in local:
                    raise UnsupportedError(str(error), where=f"{where} ({name})") from error

    def known(self, value: object, chains: set[tuple[str, ...]]) -> Known:
        """What a global is, of which the source uses these attributes."""
        from triton.runtime.jit import JITFunction

        if isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] in _COMMON:
                return Import(value.__name__)
            members = []
            for name in sorted({c[0] for c in chains if c}):
                if hasattr(value, name):
                    rest = {c[1:] for c in chains if c and c[0] == name}
                    members.append((name, self.known(getattr(value, name), rest)))
            return Namespace(value.__name__, tuple(members))
        if isinstance(value, JITFunction):
            common = value.fn.__module__.partition(".")[0] in _COMMON
            return _importable(value) if common else FunctionReference(self.function(value).key)
        try:
            return Value(fixed_value(value, self))
        except UnsupportedError:
            return _importable(value)


def _importable(value: object) -> Import:
    """Where a function or class can be imported from."""
    inner = getattr(value, "fn", value)
    module, name = getattr(inner, "__module__", None), getattr(inner, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str) and module != "__main__":
        try:
            found: object = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            found = None
        if found is value:
            return Import(module, name)
    raise UnsupportedError(f"a Triton kernel uses {value!r}, which cannot be imported")


def _chain(node: ast.AST) -> tuple[str, ...]:
    """``a.b.c`` as ("a", "b", "c"); empty for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) else ()


def _locals(tree: ast.AST) -> set[str]:
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return assigned | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
