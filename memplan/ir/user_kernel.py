"""A user's Triton kernel as data: the source of every function it reaches, its constants and its autotuner's fields.

Nothing here is a live object, so that caching, printing and code generation read the program alone, and a kernel can
be built again in another process. `KernelSource.digest` follows what Triton's own hash follows: every function and
constant that the kernel reaches, also through modules (``helpers.scale``). Triton's hash itself depends on what was
hashed before in the process (3.6, 3.7: a callee's constants are missed the first time), so it is no key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TritonType:
    """A type of Triton's as a value: ``tl.float32`` is ``TritonType("fp32")``."""

    name: str


@dataclass(frozen=True, slots=True)
class FunctionReference:
    """One of the functions of the same `KernelSource`, by its key."""

    key: str


@dataclass(frozen=True, slots=True)
class Constexpr:
    """A value that the user wrapped in ``tl.constexpr``."""

    value: FixedValue


Plain = None | bool | int | float | str | torch.dtype
FixedValue = Plain | TritonType | FunctionReference | Constexpr | tuple["FixedValue", ...]


@dataclass(frozen=True, slots=True)
class Import:
    """Something to import: a module (``attribute`` empty), or a name in it."""

    module: str
    attribute: str = ""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A module of the user's, with the members that the kernel uses and no others."""

    name: str
    members: tuple[tuple[str, Known], ...]


@dataclass(frozen=True, slots=True)
class Value:
    """A global that is a plain value."""

    value: FixedValue


Known = Import | Namespace | Value | FunctionReference


@dataclass(frozen=True, slots=True)
class FunctionSource:
    """One ``@triton.jit`` function.

    ``source`` begins at its ``def`` and has no decorators; ``line`` is the first line of the decorated function in
    ``file``, ``head`` the number of lines before the ``def`` (its decorators). ``names`` are the globals that it uses.
    """

    key: str
    name: str
    qualname: str
    module: str
    source: str
    file: str
    line: int
    head: int
    names: tuple[tuple[str, Known], ...]
    options: tuple[tuple[str, FixedValue], ...] = ()
    future_annotations: bool = False


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One configuration: values of constexpr parameters, and options of the compiler (warps, stages, ...)."""

    constants: tuple[tuple[str, FixedValue], ...] = ()
    options: tuple[tuple[str, FixedValue], ...] = ()


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A kernel: its functions, and what ``@triton.autotune`` said of it.

    Attributes
    ----------
    entry:
        Key of the function that is launched.
    parameters:
        Its parameters in order.
    configs:
        What to choose from at run time, pruned and with heuristics applied; one alone where there is no autotuner.
    key:
        Parameters whose values decide when to choose anew.
    restore_value, reset_to_zero:
        Tensors to restore after, and to fill with zeros before, each timed run.
    """

    entry: str
    functions: tuple[FunctionSource, ...]
    parameters: tuple[str, ...]
    configs: tuple[KernelConfig, ...] = (KernelConfig(),)
    key: tuple[str, ...] = ()
    restore_value: tuple[str, ...] = ()
    reset_to_zero: tuple[str, ...] = ()

    @property
    def function(self) -> FunctionSource:
        return next(f for f in self.functions if f.key == self.entry)

    @property
    def location(self) -> str:
        """``file:line`` of the ``def``."""
        return f"{self.function.file}:{self.function.line + self.function.head}"

    @property
    def imported(self) -> frozenset[str]:
        """Packages of which something is imported, whose source is not here."""
        pending = [known for f in self.functions for _, known in f.names]
        found: set[str] = set()
        while pending:
            known = pending.pop()
            if isinstance(known, Import):
                found.add(known.module.partition(".")[0])
            elif isinstance(known, Namespace):
                pending.extend(member for _, member in known.members)
        return frozenset(found)

    def digest(self) -> str:
        """A hash of everything here but where the files lie: equal kernels of two processes have equal digests."""
        functions = [(f.key, f.source, f.names, f.options, f.future_annotations) for f in self.functions]
        parts = (
            functions, self.entry, self.parameters, self.configs, self.key, self.restore_value, self.reset_to_zero,
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Fixed:
    """A constant argument of a kernel."""

    value: FixedValue


def format_fixed(value: FixedValue) -> str:
    """A constant as a person would write it."""
    match value:
        case TritonType(name):
            return f"tl.{name}"
        case FunctionReference(key):
            return key.rpartition(".")[2]
        case Constexpr(inner):
            return format_fixed(inner)
        case tuple():
            return f"({', '.join(format_fixed(v) for v in value)})"
        case _:
            return repr(value)
