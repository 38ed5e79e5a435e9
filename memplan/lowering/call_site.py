"""What a lowering sees: one extern call with its arguments by name, and where new buffers and kernels go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

import sympy
import torch

from ..ir.config import Config
from ..ir.loops import Kernel, Scalar, Size
from ..ir.program import (
    Argument,
    Buffer,
    BufferKind,
    Extern,
    KernelOp,
    Literal,
    Origin,
    Program,
    Symbolic,
    Tuple,
    View,
    evaluate,
)
from .builder import KernelBuilder

Operand: TypeAlias = View | Scalar | sympy.Expr

#: dtypes that kernels load, store and compute with
SUPPORTED = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an operator's schema."""

    name: str
    default: object
    positional: bool


@lru_cache(maxsize=4096)
def resolve(target: str) -> torch._ops.OpOverload | None:
    """The overload that ``namespace.name.overload`` names, or None (a higher-order operator, or not registered)."""
    parts = target.split(".")
    if len(parts) != 3:
        return None
    namespace, name, overload = parts
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else getattr(packet, overload, None)


@lru_cache(maxsize=4096)
def parameters(target: str) -> tuple[Parameter, ...] | None:
    """The schema's parameters in order; None where the operator is not known."""
    overload = resolve(target)
    if not isinstance(overload, torch._ops.OpOverload):
        return None
    schema = overload._schema.arguments
    return tuple(
        Parameter(a.name, a.default_value if a.has_default_value() else None, not a.kwarg_only) for a in schema
    )


@dataclass
class Context:
    """What lowerings of one program share: its buffers, the options, names that are taken, temporaries made."""

    buffers: Mapping[str, Buffer]
    hints: Mapping[sympy.Symbol, int]
    config: Config
    deterministic: bool = False
    #: names of operations that read each buffer, and whether every reader can become a kernel
    kernel_readers: Mapping[str, bool] = field(default_factory=dict)
    #: buffers that a call makes which stays one, and can write where it is told
    made_by_calls: frozenset[str] = frozenset()
    added: dict[str, Buffer] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, config: Config) -> Context:
        """The context of a program; asks torch whether deterministic algorithms are demanded."""
        return cls(program.buffers, program.hints, config, torch.are_deterministic_algorithms_enabled())

    def hint(self, size: Size) -> int:
        """The integer that ``size`` was when tracing."""
        return evaluate(size, self.hints)

    def temporary(self, name: str, sizes: Sequence[Size], dtype: torch.dtype, device: str, origin: Origin) -> View:
        """A new contiguous buffer of its own."""
        strides: list[Size] = []
        numel: Size = 1
        for size in reversed(sizes):
            strides.append(numel)
            numel = numel * size
        unique, k = name, 0
        while unique in self.buffers or unique in self.added:
            k += 1
            unique = f"{name}_{k}"
        nbytes = numel * dtype.itemsize
        self.added[unique] = Buffer(unique, nbytes, dtype, device, BufferKind.TEMPORARY, origin)
        return View(unique, dtype, tuple(sizes), tuple(reversed(strides)))


class CallSite:
    """One `Extern` with its arguments bound to the schema's names.

    The accessors raise `TypeError` where an argument is not what they say: a lowering that asks for the wrong kind
    is our own mistake.
    """

    def __init__(self, op: Extern, context: Context, bound: dict[str, object]) -> None:
        self.op = op
        self.context = context
        self._bound = bound

    @classmethod
    def of(cls, op: Extern, context: Context) -> CallSite | None:
        """None where the operator's schema is not known."""
        schema = parameters(op.target)
        if schema is None:
            return None
        bound: dict[str, object] = {p.name: p.default for p in schema}
        for parameter, argument in zip(schema, op.args, strict=False):
            bound[parameter.name] = plain(argument)
        for name, argument in op.kwargs:
            bound[name] = plain(argument)
        return cls(op, context, bound)

    def __getitem__(self, name: str) -> object:
        return self._bound[name]

    def __contains__(self, name: str) -> bool:
        return name in self._bound

    @property
    def device(self) -> str:
        return self.op.device

    @property
    def results(self) -> tuple[View | None, ...]:
        return self.op.results

    @property
    def result(self) -> View:
        """The only result, or the first."""
        view = self.op.results[0]
        if view is None:
            raise TypeError(f"{self.op.name}: the first result of {self.op.target} is no tensor")
        return view

    def view(self, name: str) -> View:
        value = self._bound[name]
        if not isinstance(value, View):
            raise TypeError(f"{self.op.name}: {name} of {self.op.target} is {value!r}, not a tensor")
        return value

    def optional_view(self, name: str) -> View | None:
        return None if self._bound[name] is None else self.view(name)

    def operand(self, name: str) -> Operand:
        """A tensor, number or size expression."""
        value = self._bound[name]
        if isinstance(value, (View, bool, int, float, sympy.Expr)):
            return value
        raise TypeError(f"{self.op.name}: {name} of {self.op.target} is {value!r}, not an operand")

    def views(self, name: str) -> tuple[View, ...]:
        value = self._bound[name]
        if not isinstance(value, tuple) or not all(isinstance(v, View) for v in value):
            raise TypeError(f"{self.op.name}: {name} of {self.op.target} is {value!r}, not a list of tensors")
        return value

    def size(self, name: str) -> Size:
        value = self._bound[name]
        if isinstance(value, (int, sympy.Expr)) and not isinstance(value, bool):
            return value
        raise TypeError(f"{self.op.name}: {name} of {self.op.target} is {value!r}, not a size")

    def integer(self, name: str) -> int:
        value = self._bound[name]
        if isinstance(value, (int, sympy.Integer)) and not isinstance(value, bool):
            return int(value)
        raise TypeError(f"{self.op.name}: {name} of {self.op.target} is {value!r}, not an integer")

    def sizes(self, name: str) -> tuple[Size, ...]:
        value = self._bound[name]
        if isinstance(value, (int, sympy.Expr)):
            return (value,)
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{self.op.name}: {name} of {self.op.target} is {value!r}, not a list of sizes")
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        return tuple(int(v) for v in self.sizes(name))

    def number(self, name: str) -> Scalar | sympy.Expr:
        value = self._bound[name]
        if isinstance(value, (bool, int, float, sympy.Expr)):
            return value
        raise TypeError(f"{self.op.name}: {name} of {self.op.target} is {value!r}, not a number")

    def scalar(self, name: str) -> Scalar:
        """A number that is known; sizes that are not raise."""
        value = self.number(name)
        if isinstance(value, sympy.Expr):
            return int(value)
        return value

    def real(self, name: str) -> float:
        return float(self.scalar(name))

    def flag(self, name: str) -> bool:
        return bool(self._bound[name])

    def text(self, name: str) -> str:
        value = self._bound[name]
        if not isinstance(value, str):
            raise TypeError(f"{self.op.name}: {name} of {self.op.target} is {value!r}, not text")
        return value

    def dims(self, name: str, rank: int) -> tuple[int, ...]:
        """Dimensions counted from the front; all of them where none are named."""
        value = self._bound.get(name)
        if value is None or value == () or value == []:
            return tuple(range(rank))
        return tuple(sorted({d % max(rank, 1) for d in self.integers(name)}))

    def dim(self, name: str, rank: int) -> int:
        return self.integer(name) % max(rank, 1)

    def kernel(self, builder: KernelBuilder, suffix: str = "", mutates: tuple[str, ...] = ()) -> KernelOp:
        """The finished kernel as an operation named after the call."""
        return self.operation(builder.build(), suffix, mutates)

    def operation(self, kernel: Kernel, suffix: str = "", mutates: tuple[str, ...] = ()) -> KernelOp:
        name = f"{self.op.name}_{suffix}" if suffix else self.op.name
        return KernelOp(name, kernel, self.op.device, self.op.origins, mutates)

    def temporary(self, suffix: str, sizes: Sequence[Size], dtype: torch.dtype) -> View:
        """A new buffer for a value between two kernels of this call."""
        origin = self.op.origins[0] if self.op.origins else Origin()
        return self.context.temporary(f"{self.op.name}_{suffix}", sizes, dtype, self.op.device, origin)


def plain(argument: Argument) -> object:
    """The argument as Python and sympy values; views stay."""
    if isinstance(argument, Literal):
        return argument.value
    if isinstance(argument, Symbolic):
        return int(argument.expr) if argument.expr.is_Integer else argument.expr
    if isinstance(argument, Tuple):
        return tuple(plain(a) for a in argument.items)
    return argument


Operations: TypeAlias = tuple[KernelOp, ...]
Lowering: TypeAlias = Callable[[CallSite], Operations | None]

#: the lowering of each operator overload, by its target
LOWERINGS: dict[str, Lowering] = {}


def lowers(*targets: str) -> Callable[[Lowering], Lowering]:
    """Register a lowering for targets such as ``aten.relu.default``; each may have one."""

    def register(lowering: Lowering) -> Lowering:
        for target in targets:
            assert target not in LOWERINGS, target
            LOWERINGS[target] = lowering
        return lowering

    return register
