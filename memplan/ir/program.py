"""The program: operations over buffers, and the dependency graph they make.

A `Program` is one graph that AOTAutograd hands over (a forward, a backward or an inference graph) as a sequence of
operations in program order. The dependency graph (`Program.graph`, a `networkx.MultiDiGraph`) is derived from it:
nodes are ``("op", name)`` and ``("buffer", name)``, edges are typed ``read``, ``write``, ``mutate`` and ``order``, and
hold no fact that the payloads do not.

Sizes are bytes or elements as named; a size is an int or a sympy expression of the size symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

import networkx as nx
import sympy
import torch

from .canonical import size_symbols
from .communication import Memory
from .index import evaluate as evaluate
from .loops import Kernel, Size, free_symbols
from .user_kernel import Fixed, FixedValue, KernelSource


@dataclass(frozen=True, slots=True)
class Origin:
    """Where something comes from, for people: FX node, its operation, the module path and the user's line."""

    node: str = ""
    op: str = ""
    module: str = ""
    file: str = ""
    line: int = 0
    code: str = ""

    @property
    def location(self) -> str:
        """``file:line`` of the user's code, or an empty string."""
        return f"{self.file}:{self.line}" if self.file else ""


class BufferKind(Enum):
    INPUT = "input"
    PARAMETER = "parameter"
    CONSTANT = "constant"
    TEMPORARY = "temporary"
    SAVED = "saved"
    OUTPUT = "output"
    WORKSPACE = "workspace"
    COMM = "comm"


#: Kinds whose storage comes from outside of the program.
EXTERNAL_KINDS = (BufferKind.INPUT, BufferKind.PARAMETER, BufferKind.CONSTANT)


@dataclass(frozen=True, slots=True)
class Buffer:
    """One storage.

    ``kind`` SAVED means: made by the forward program and kept for the backward; OUTPUT: returned to the caller (both
    leave the program alive). In the backward program, what the forward saved is INPUT with ``donated=True`` where it
    may be freed or overwritten once its last reader has run. ``memory``: what kind of memory its collectives want,
    ``group`` the process group whose symmetric memory that is.
    """

    name: str
    nbytes: Size
    dtype: torch.dtype
    device: str
    kind: BufferKind
    origin: Origin = Origin()
    alignment: int = 64
    donated: bool = False
    zero_fill: bool = False
    memory: Memory = Memory.PLAIN
    group: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """A buffer seen with sizes, strides and offset, all in elements of ``dtype``."""

    buffer: str
    dtype: torch.dtype
    sizes: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = 0

    @property
    def numel(self) -> Size:
        out: Size = 1
        for s in self.sizes:
            out = out * s
        return out


Atom = None | bool | int | float | complex | str | torch.dtype | torch.device | torch.layout | torch.memory_format


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant argument of an extern call."""

    value: Atom


@dataclass(frozen=True, slots=True)
class Symbolic:
    """A size expression as an argument (an integer once the sizes are known)."""

    expr: sympy.Expr


@dataclass(frozen=True, slots=True)
class Tuple:
    """A list or tuple argument."""

    items: tuple[Argument, ...]


Argument = View | Literal | Symbolic | Tuple


class Contract(Enum):
    """What an extern call does with memory."""

    OUT = "out"  # writes into the given buffers and allocates nothing
    FRESH = "fresh"  # returns allocations of its own, of known size
    DYNAMIC = "dynamic"  # returns allocations of a size known only afterwards
    ALIAS = "alias"  # returns views of its inputs, allocates nothing
    MUTATE = "mutate"  # writes its inputs in place; returns nothing new


@dataclass(frozen=True)
class KernelOp:
    """One of our kernels. Reads and writes are what the kernel's loads and stores say.

    ``mutates`` names buffers that the kernel changes though they held a value before (scatter, in-place update);
    the rest of what it stores is freshly written and each element of it is written.
    """

    name: str
    kernel: Kernel
    device: str
    origins: tuple[Origin, ...] = ()
    mutates: tuple[str, ...] = ()

    @cached_property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.kernel.read_buffers, *self.mutates)))

    @cached_property
    def writes(self) -> tuple[str, ...]:
        return tuple(b for b in self.kernel.written_buffers if b not in self.mutates)


@dataclass(frozen=True)
class Extern:
    """A call of a torch operator.

    ``target`` is ``namespace.name.overload`` (``aten.mm.default``), or ``callable:<key>`` for a higher-order operator
    held in `Program.callables`. ``results`` are the views that the call's flat results become (None: unused or no
    tensor). ``symbols`` are the size symbols that become known by the call: (accessor, symbol) with the accessor a
    suffix to the call's flat results list ``r``, for example ``[0].size(0)`` or ``[0]``. ``scratch`` is the bytes it
    takes while it runs and gives back. ``effect``: keeps its order among such (random numbers, side effects).
    """

    name: str
    target: str
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    results: tuple[View | None, ...]
    contract: Contract
    device: str
    origins: tuple[Origin, ...] = ()
    mutates: tuple[str, ...] = ()
    scratch: Size = 0
    symbols: tuple[tuple[str, sympy.Symbol], ...] = ()
    effect: bool = False

    @cached_property
    def reads(self) -> tuple[str, ...]:
        seen = {v.buffer: None for v in argument_views(self.args)}
        for _, a in self.kwargs:
            seen.update({v.buffer: None for v in argument_views((a,))})
        seen.update(dict.fromkeys(self.mutates))
        return tuple(seen)

    @cached_property
    def writes(self) -> tuple[str, ...]:
        if self.contract is Contract.ALIAS:
            return ()
        found = dict.fromkeys(v.buffer for v in self.results if v is not None)
        return tuple(b for b in found if b not in self.mutates)


@dataclass(frozen=True)
class Copy:
    """``target.copy_(source)``: equal shapes; ``target``'s buffer is mutated (or written, where it is fresh)."""

    name: str
    source: View
    target: View
    device: str
    origins: tuple[Origin, ...] = ()
    mutates: tuple[str, ...] = ()

    @cached_property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.source.buffer, *self.mutates)))

    @cached_property
    def writes(self) -> tuple[str, ...]:
        return () if self.target.buffer in self.mutates else (self.target.buffer,)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """How a tensor argument of a user's kernel becomes a TMA descriptor just before the launch.

    ``block`` is the shape of a tile. The older interface of Triton also wants ``sizes`` and ``itemsize``; in the newer
    one (both empty) the tensor's own shape counts.
    """

    block: tuple[Size, ...]
    sizes: tuple[Size, ...] = ()
    itemsize: Size = 0


UserArgument = View | Symbolic | Fixed


@dataclass(frozen=True, slots=True)
class UserKernel:
    """A launch of a user's Triton kernel.

    Attributes
    ----------
    arguments:
        (parameter, value) in the order of the kernel's parameters; those that a configuration gives are not among them.
    grids:
        For each configuration the number of program instances along three axes; where one is 0 nothing is launched.
    mutates:
        Buffers that it may change; what else it is given it only reads. A kernel may reach bytes of a buffer that its
        view does not show, so its arguments keep their strides wherever they are moved.
    descriptors:
        (parameter, what to make of its tensor).
    options:
        Further options of the launch.
    """

    name: str
    kernel: KernelSource
    arguments: tuple[tuple[str, UserArgument], ...]
    grids: tuple[tuple[Size, Size, Size], ...]
    device: str
    origins: tuple[Origin, ...] = ()
    mutates: tuple[str, ...] = ()
    descriptors: tuple[tuple[str, Descriptor], ...] = ()
    options: tuple[tuple[str, FixedValue], ...] = ()

    @property
    def views(self) -> tuple[View, ...]:
        return tuple(a for _, a in self.arguments if isinstance(a, View))

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*(v.buffer for v in self.views), *self.mutates)))

    @property
    def writes(self) -> tuple[str, ...]:
        return ()


Operation = KernelOp | Extern | Copy | UserKernel


@dataclass(frozen=True, slots=True)
class TensorInput:
    """Positional input number ``position``: the tensor has this view; ``mutated`` if the program changes it."""

    position: int
    view: View


@dataclass(frozen=True, slots=True)
class SizeSource:
    """``(size of dimension dim of tensor input number position - offset) / factor``; of its stride if ``stride``."""

    position: int
    dim: int
    factor: int = 1
    offset: int = 0
    stride: bool = False


@dataclass(frozen=True, slots=True)
class SymbolInput:
    """Positional input number ``position`` is an integer: the value of ``symbol``.

    With a ``source`` no argument of the caller's gives it: it is read there, and stands after all that are given.
    """

    position: int
    symbol: sympy.Symbol
    source: SizeSource | None = None


@dataclass(frozen=True, slots=True)
class OpaqueInput:
    """An input that is neither tensor nor integer (a script object, a generator, None); passed on as it is."""

    position: int
    name: str


ProgramInput = TensorInput | SymbolInput | OpaqueInput
ProgramOutput = View | Symbolic | Literal


class Phase(Enum):
    INFERENCE = "inference"
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Program:
    """Operations in program order over named buffers.

    ``hints`` gives each size symbol the value seen when tracing; ``callables`` holds what is not data (higher-order
    operators' subgraphs, constants are in ``constants``).
    """

    name: str
    phase: Phase
    buffers: Mapping[str, Buffer]
    operations: tuple[Operation, ...]
    inputs: tuple[ProgramInput, ...]
    outputs: tuple[ProgramOutput, ...]
    hints: Mapping[sympy.Symbol, int] = field(default_factory=dict)
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    callables: Mapping[str, object] = field(default_factory=dict)
    #: why a clone, copy or reuse was left as it is: (operation or buffer, reason)
    notes: tuple[tuple[str, str], ...] = ()

    @cached_property
    def output_buffers(self) -> frozenset[str]:
        """Buffers that leave the program alive through its outputs."""
        return frozenset(o.buffer for o in self.outputs if isinstance(o, View))

    @cached_property
    def graph(self) -> nx.MultiDiGraph[tuple[str, str]]:
        """The dependency graph. ``order`` edges serialise a mutation against earlier readers and writers."""
        g: nx.MultiDiGraph[tuple[str, str]] = nx.MultiDiGraph()
        for b in self.buffers.values():
            g.add_node(("buffer", b.name), payload=b)
        for op in self.operations:
            g.add_node(("op", op.name), payload=op)
            for name in op.reads:
                g.add_edge(("buffer", name), ("op", op.name), key="read")
            for name in op.writes:
                g.add_edge(("op", op.name), ("buffer", name), key="write")
            for name in op.mutates:
                g.add_edge(("op", op.name), ("buffer", name), key="mutate")
        for before, after in order_edges(self.operations):
            g.add_edge(("op", before), ("op", after), key="order")
        return g

    @cached_property
    def dependencies(self) -> dict[str, frozenset[str]]:
        """For each operation, the operations that must run before it (direct ones)."""
        found: dict[str, set[str]] = {op.name: set() for op in self.operations}
        for before, after in order_edges(self.operations):
            found[after].add(before)
        return {k: frozenset(v) for k, v in found.items()}

    @cached_property
    def by_name(self) -> dict[str, Operation]:
        return {op.name: op for op in self.operations}

    def nbytes(self, buffer: str) -> int:
        """Bytes of a buffer at the hinted sizes."""
        return evaluate(self.buffers[buffer].nbytes, self.hints)

    def with_operations(self, operations: tuple[Operation, ...], *, drop_unused: bool = True) -> Program:
        """The same program with other operations; buffers that nothing names any more are dropped."""
        if not drop_unused:
            return replace(self, operations=operations)
        used = set(self.output_buffers) | {i.view.buffer for i in self.inputs if isinstance(i, TensorInput)}
        for op in operations:
            used.update(op.reads)
            used.update(op.writes)
            used.update(all_views_buffers(op))
        buffers = {n: b for n, b in self.buffers.items() if n in used}
        return replace(self, operations=operations, buffers=buffers)


def order_edges(operations: tuple[Operation, ...]) -> Iterator[tuple[str, str]]:
    """Pairs (before, after) that data flow, a mutation or a side effect forces.

    A reader comes after every earlier writer and mutation of its buffer. Several operations may write one fresh
    buffer in parts (slices of a concatenation): they are free among themselves, and a reader waits for those before
    it. A mutation of a buffer comes after every earlier reader, writer and mutation of it, and before every later
    one. Operations with side effects keep their order among themselves. What computes with a size comes after the call
    that makes it known.
    """
    makers = {s: op.name for op in operations if isinstance(op, Extern) for _, s in op.symbols}
    known: set[sympy.Symbol] = set()
    mutation: dict[str, str] = {}
    changes: dict[str, list[str]] = {}
    readers: dict[str, list[str]] = {}
    effect: str | None = None
    for op in operations:
        for b in op.reads:
            for c in changes.get(b, ()):
                yield c, op.name
        for b in op.mutates:
            for r in readers.get(b, ()):
                if r != op.name:
                    yield r, op.name
        for b in op.mutates:
            mutation[b] = op.name
            changes[b] = [op.name]
            readers[b] = []
        for b in op.reads:
            if b not in op.mutates:
                readers.setdefault(b, []).append(op.name)
        for b in op.writes:
            if b in mutation:
                yield mutation[b], op.name
            changes.setdefault(b, []).append(op.name)
        if isinstance(op, Extern) and op.effect:
            if effect is not None:
                yield effect, op.name
            effect = op.name
        if makers:
            for symbol in used_sizes(op) & known:
                yield makers[symbol], op.name
            known.update(s for s, maker in makers.items() if maker == op.name)


def used_sizes(op: Operation) -> frozenset[sympy.Symbol]:
    """Size symbols that an operation computes with."""
    match op:
        case KernelOp():
            return frozenset(size_symbols(op.kernel))
        case Extern():
            values: tuple[object, ...] = (op.args, tuple(a for _, a in op.kwargs), op.results, op.scratch)
        case Copy():
            values = (op.source, op.target)
        case UserKernel():
            values = (tuple(a for _, a in op.arguments), op.grids)
    return frozenset(_symbols(values))


def _symbols(value: object) -> Iterator[sympy.Symbol]:
    """Symbols in sizes, arguments and tuples of them."""
    match value:
        case sympy.Expr():
            yield from free_symbols(value)
        case Symbolic():
            yield from free_symbols(value.expr)
        case View():
            yield from _symbols((value.sizes, value.strides, value.offset))
        case Tuple():
            yield from _symbols(value.items)
        case tuple():
            for item in value:
                yield from _symbols(item)
        case _:
            pass


def argument_views(args: tuple[Argument, ...]) -> Iterator[View]:
    """All views in (nested) arguments."""
    for a in args:
        if isinstance(a, View):
            yield a
        elif isinstance(a, Tuple):
            yield from argument_views(a.items)


def all_views_buffers(op: Operation) -> Iterator[str]:
    """Buffers that an operation names in any way (results that alias inputs among them)."""
    if isinstance(op, Extern):
        for v in op.results:
            if v is not None:
                yield v.buffer
    yield from op.mutates
