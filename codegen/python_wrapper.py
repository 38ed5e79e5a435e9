"""The Python printer of wrapper lines.

The text it prints is one function ``call(args)`` over a boxed argument list. Names it uses are provided by
`memplan.runtime.python_runtime`: allocation, views, kernels and operators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..ir.communication import Memory
from ..ir.in_flight import InFlight, Wait
from ..ir.loops import Size
from ..ir.plan import InPlaceOf, InPool, Pool
from ..ir.program import (
    Argument,
    Buffer,
    BufferKind,
    Contract,
    Copy,
    Extern,
    Literal,
    OpaqueInput,
    ProgramOutput,
    Symbolic,
    SymbolInput,
    TensorInput,
    Tuple,
    UserKernel,
    View,
)
from ..ir.user_kernel import Fixed
from .printers import pexpr
from .wrapper_lines import (
    Align,
    Allocate,
    AllocatePool,
    CallExtern,
    Comment,
    CopyInto,
    End,
    Forget,
    Free,
    FreePool,
    GiveBack,
    Launch,
    LaunchUser,
    Line,
    Place,
    Return,
    Reuse,
    WrapperProgram,
    Zero,
    ZeroWorkspace,
)


@dataclass(frozen=True)
class PythonWrapper:
    """Source of ``call``, and the operators and constants that its global names stand for."""

    source: str
    operators: Mapping[str, str]  # name in the source -> torch operator
    starts: tuple[int, ...] = ()  # the number of each step's first source line, counted from 1


@dataclass
class _Printer:
    program: WrapperProgram
    poison: bool
    out: list[str] = field(default_factory=list)
    operators: dict[str, str] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    typed_pools: set[tuple[str, str]] = field(default_factory=set)
    views: dict[str, int] = field(default_factory=dict)  # numbers of buffers in arenas
    tensors: set[str] = field(default_factory=set)  # names that exist as tensor variables
    makers: dict[str, str] = field(default_factory=dict)  # device -> what allocates there fastest

    def __post_init__(self) -> None:
        gpus = _gpus(self.program)
        # the current GPU: the program's own where it has one
        self.makers = {"cpu": "empty_cpu"} | ({gpus[0]: "empty_cuda"} if len(gpus) == 1 else {})

    def line(self, text: str) -> None:
        self.out.append("    " + text)

    # -- small texts --

    def size(self, value: Size) -> str:
        return str(value) if isinstance(value, int) else pexpr(value)

    def sizes(self, values: tuple[Size, ...]) -> str:
        inner = ", ".join(self.size(v) for v in values)
        return f"({inner},)" if len(values) == 1 else f"({inner})"

    def operator(self, target: str) -> str:
        name = target.replace("callable:", "hop_").replace(".", "_").replace("::", "_")
        self.operators[name] = target
        return name

    def address(self, buffer: str) -> str:
        """The address of a buffer's first byte, as Python text."""
        storage = self.program.plan.storage_of(buffer)
        placement = self.program.plan.placements[storage]
        if isinstance(placement, InPool) and buffer not in self.tensors:
            offset = self.size(placement.offset)
            return f"{placement.pool}_p" if offset == "0" else f"{placement.pool}_p + {offset}"
        return f"{buffer}.data_ptr()"

    def tensor(self, view: View) -> str:
        """A tensor with the view's sizes and strides."""
        base = self.program.base[view.buffer]
        self.need_tensor(view.buffer)
        if view == base or (
            view.dtype == base.dtype and view.sizes == base.sizes and view.strides == base.strides and view.offset == 0
        ):
            return view.buffer
        source = view.buffer
        if view.dtype != base.dtype:
            itemsize = view.dtype.itemsize
            return (
                f"reinterpret_as({source}, {view.dtype}, {self.sizes(view.sizes)}, {self.sizes(view.strides)}, "
                f"{self.size(view.offset * itemsize)})"
            )
        return f"reinterpret({source}, {self.sizes(view.sizes)}, {self.sizes(view.strides)}, {self.size(view.offset)})"

    def in_place(self, new: str, old: str) -> bool:
        placement = self.program.plan.placements[new]
        return isinstance(placement, InPlaceOf) and placement.buffer == old

    def need_tensor(self, name: str) -> None:
        """Make the tensor variable of a buffer that so far is only an address in a pool."""
        if name in self.tensors:
            return
        plan = self.program.plan
        placement = plan.placements[plan.storage_of(name)]
        assert isinstance(placement, InPool), f"{name} is used before it exists"
        self.line(f"{name} = {self.in_pool(placement.pool, name, placement.offset)}")
        self.tensors.add(name)

    def in_pool(self, pool: str, buffer: str, offset: Size) -> str:
        """The tensor of a buffer in a pool. Arenas keep theirs from call to call."""
        base = self.program.base[buffer]
        place = f"{base.dtype}, {self.sizes(base.sizes)}, {self.sizes(base.strides)}, {self.size(offset)}"
        if self.program.plan.program.buffers[buffer].memory is Memory.PLAIN:
            return f"in_pool({pool}, {place})"
        number = self.views.setdefault(buffer, len(self.views))
        return f"{pool}_memory.view({number}, {place})"

    def argument(self, a: Argument) -> str:
        match a:
            case View():
                return self.tensor(a)
            case Symbolic(expr):
                return pexpr(expr)
            case Tuple(items):
                return "[" + ", ".join(self.argument(i) for i in items) + "]"
            case Literal(value):
                return literal(value)

    # -- lines --

    def print_line(self, line: Line) -> None:
        match line:
            case Comment(origins):
                for text in dict.fromkeys(origin_text(o.node, o.op, o.location, o.code) for o in origins[:6]):
                    self.line(f"# {text}")
            case AllocatePool(pool):
                made = f"allocate_pool({self.size(pool.nbytes)}, {self.device(pool.device)})"
                if pool.memory is not Memory.PLAIN:
                    made = f"{pool.name}_memory()"
                self.line(f"{pool.name} = {made}")
                self.line(f"{pool.name}_p = {pool.name}.data_ptr()")
                if self.poison:
                    self.line(f"poison_tensor({pool.name})")
            case FreePool(pool):
                self.line(f"del {pool.name}")
            case Allocate(buffer, view):
                self.allocate(buffer, view)
            case Place(buffer, pool, offset):
                if self.program.plan.placements[buffer.name] and buffer.name in self.program.tensors:
                    self.place(buffer, pool, offset)
            case Reuse(buffer, old):
                self.reuse(buffer, old)
            case Zero(buffer):
                self.need_tensor(buffer.name)
                self.line(f"{buffer.name}.zero_()")
            case Launch(_, kernel, buffers, symbols, device, offsets, checks):
                args = [self.address(b) for b in buffers]
                for k, offset in enumerate(offsets):
                    args[k] += f" + {offset}" if offset else ""
                args += [pexpr(s) for s in symbols]
                stream = [] if device == "cpu" else [f"stream{_index(device)}"]
                launch = f"{kernel}({', '.join(stream + args)})"
                self.line(f"all_in_range({launch}, {checks!r})" if checks else launch)
            case ZeroWorkspace(buffer):
                where = f"{buffer.device!r}, stream{_index(buffer.device)}"
                self.line(f"{buffer.name} = zero_workspace({self.size(buffer.nbytes)}, {where})")
                self.tensors.add(buffer.name)
            case LaunchUser(op, kernel, tensors):
                self.launch_user(op, kernel, tensors)
            case CallExtern(op):
                self.extern(op)
            case CopyInto(op):
                self.copy(op)
            case Free(buffer):
                if buffer.name in self.tensors:
                    theirs = buffer.kind in (BufferKind.INPUT, BufferKind.PARAMETER) and not buffer.donated
                    if self.poison and buffer.kind is BufferKind.WORKSPACE and buffer.zero_fill:
                        self.line(f"left_zero({buffer.name}, {buffer.name!r})")
                    elif self.poison and not theirs:
                        self.line(f"poison_tensor({buffer.name})")
                    self.line(f"del {buffer.name}")
                    self.tensors.discard(buffer.name)
            case End(buffer):
                self.end(buffer)
            case Forget(buffer):
                if buffer.name in self.tensors:
                    self.line(f"del {buffer.name}")
                    self.tensors.discard(buffer.name)
            case Return(outputs):
                self.returns(outputs)
            case Align(buffers, changed):
                self.align(buffers, changed)
            case GiveBack(changed):
                for name in changed:
                    self.line(f"if given_{name} is not {name}: given_{name}.copy_({name})")

    def launch_user(self, op: UserKernel, kernel: str, tensors: frozenset[str]) -> None:
        """``kernel(stream, grids, arguments...)``: what is no constant, in the order of the kernel's parameters."""
        args = []
        for name, value in op.arguments:
            match value:
                case View() if name in tensors:
                    args.append(self.tensor(value))
                case View():
                    offset = self.size(value.offset * value.dtype.itemsize)
                    args.append(self.address(value.buffer) + (f" + {offset}" if offset != "0" else ""))
                case Symbolic(expr):
                    args.append(pexpr(expr))
                case Fixed():
                    pass
        made = [f"({self.sizes(d.sizes)}, {self.sizes(d.block)}, {self.size(d.itemsize)})" for _, d in op.descriptors]
        grids = "".join(f"{self.sizes(g)}, " for g in op.grids)
        stream = "0" if op.device == "cpu" else f"stream{_index(op.device)}"
        self.line(f"{kernel}({', '.join([stream, f'({grids})', *args, *made])})")

    def device(self, device: str) -> str:
        return repr(device)

    def allocate(self, buffer: Buffer, view: View) -> None:
        maker = self.makers.get(buffer.device)
        sizes, strides = self.sizes(view.sizes), self.sizes(view.strides)
        if maker is None:
            self.line(
                f"{buffer.name} = torch.empty_strided({sizes}, {strides}, dtype={view.dtype}, device={buffer.device!r})"
            )
        else:
            self.line(f"{buffer.name} = {maker}({sizes}, {strides}, {view.dtype})")
        self.tensors.add(buffer.name)
        if self.poison:
            self.line(f"poison_tensor({buffer.name})")

    def align(self, buffers: tuple[str, ...], changed: tuple[str, ...]) -> None:
        """One test for all, true once in a blue moon; what is changed is known under its old name until the end."""
        for name in changed:
            self.line(f"given_{name} = {name}")
        for group in (buffers[k : k + 8] for k in range(0, len(buffers), 8)):
            self.line(f"if ({' | '.join(f'{b}.data_ptr()' for b in group)}) & 15:")
            for name in group:
                self.line(f"    {name} = aligned({name})")

    def place(self, buffer: Buffer, pool: Pool, offset: Size) -> None:
        self.line(f"{buffer.name} = {self.in_pool(pool.name, buffer.name, offset)}")
        self.tensors.add(buffer.name)

    def reuse(self, buffer: Buffer, old: Buffer) -> None:
        plan = self.program.plan
        placement = plan.placements[plan.storage_of(buffer.name)]
        base = self.program.base[buffer.name]
        if isinstance(placement, InPool) and old.name not in self.tensors:
            if buffer.name in self.program.tensors:
                self.need_tensor(buffer.name)
            return
        self.line(
            f"{buffer.name} = reinterpret_as({old.name}, {base.dtype}, {self.sizes(base.sizes)}, "
            f"{self.sizes(base.strides)}, 0)  # in place of {old.name}"
        )
        self.tensors.add(buffer.name)

    def copy(self, op: Copy) -> None:
        target, source = self.tensor(op.target), self.tensor(op.source)
        self.line(f"{target}.copy_({source})")

    def extern(self, op: Extern) -> None:
        args = [self.argument(a) for a in (op.args[:1] if isinstance(op, Wait) else op.args)]
        args += [f"{k}={self.argument(a)}" for k, a in op.kwargs]
        name = self.operator(op.target)
        if op.contract is Contract.OUT:
            outs = [self.tensor(v) for v in op.results if v is not None]
            first, result = op.args[0] if op.args else None, op.results[0]
            temporary = False
            if isinstance(first, View) and result is not None and self.in_place(result.buffer, first.buffer):
                # one tensor for both: torch copies the first argument into another one
                self.line(f"out = {outs[0]}")
                args[0] = outs[0] = "out"
                temporary = True
            names = _out_names(op.target, len(outs))
            self.line(f"{name}({', '.join([*args, *(f'{n}={o}' for n, o in zip(names, outs, strict=True))])})")
            if temporary:
                self.line("del out")
            return
        call = f"{name}({', '.join(args)})"
        mutated = set(op.mutates)
        fresh = [(k, v) for k, v in enumerate(op.results) if v is not None and v.buffer not in mutated]
        # torch's own operators return allocations of their own; others may return a slice that starts anywhere
        # and nothing may copy what is still in flight
        laid_out = (
            "in_flight"
            if isinstance(op, InFlight)
            else "laid_out"
            if op.target.startswith(("aten.", "prims.", "memplan."))
            else "laid_out_aligned"
        )
        if not fresh and not op.symbols:
            self.line(call)
            return
        if len(op.results) == 1 and not op.symbols and not op.target.startswith("callable:"):
            view = fresh[0][1]
            self.line(f"{view.buffer} = {laid_out}({call}, {self.sizes(view.sizes)}, {self.sizes(view.strides)})")
        else:
            self.line(f"r = flatten({call})")
            for text, symbol in op.symbols:
                self.line(f"{symbol} = r{text}")
            for k, view in fresh:
                self.line(f"{view.buffer} = {laid_out}(r[{k}], {self.sizes(view.sizes)}, {self.sizes(view.strides)})")
            self.line("del r")
        self.tensors.update(view.buffer for _, view in fresh)

    def end(self, buffer: Buffer) -> None:
        plan = self.program.plan
        placement = plan.placements[plan.storage_of(buffer.name)]
        if self.poison and isinstance(placement, InPool):
            self.line(f"poison_range({placement.pool}, {self.size(placement.offset)}, {self.size(buffer.nbytes)})")
        if buffer.name in self.tensors:
            self.line(f"del {buffer.name}")
            self.tensors.discard(buffer.name)

    def returns(self, outputs: tuple[ProgramOutput, ...]) -> None:
        texts = []
        for out in outputs:
            match out:
                case View():
                    texts.append(self.tensor(out))
                case Symbolic(expr):
                    texts.append(pexpr(expr))
                case Literal(value):
                    texts.append(literal(value))
        inner = ", ".join(texts)
        self.line(f"return ({inner},)" if len(texts) == 1 else f"return ({inner})")


def print_python(program: WrapperProgram, *, poison: bool = False) -> PythonWrapper:
    """The wrapper as Python source; deterministic."""
    p = _Printer(program, poison)
    p.out.append("def call(args):")
    names = []
    for i in program.inputs:
        match i:
            case TensorInput(_, view):
                names.append(view.buffer)
                p.tensors.add(view.buffer)
            case SymbolInput(_, symbol):
                names.append(str(symbol))
            case OpaqueInput(_, name):
                names.append(f"opaque_{name}")
    if names:
        p.line(f"{', '.join(names)}, = args")
    p.line("args.clear()")
    for device in _gpus(program):
        p.line(f"stream{_index(device)} = current_stream({_index(device)})")
    for b in program.plan.program.buffers.values():
        if b.kind is BufferKind.CONSTANT:
            p.tensors.add(b.name)
    starts = []
    for line in program.lines:
        if isinstance(line, Comment):
            starts.append(len(p.out) + 1)
        p.print_line(line)
    return PythonWrapper("\n".join(p.out) + "\n", p.operators, tuple(starts))


def python_line(program: WrapperProgram, line: Line) -> PythonWrapper:
    """One line alone, for a wrapper in another language that lets Python run it: its buffers are tensors already."""
    p = _Printer(program, poison=False)
    p.tensors.update(program.base)
    p.print_line(line)
    return PythonWrapper("\n".join(p.out) + "\n", p.operators)


def literal(value: object) -> str:
    """A constant argument as Python text."""
    match value:
        case float() if math.isnan(value):
            return "float('nan')"
        case float() if math.isinf(value):
            return "float('inf')" if value > 0 else "-float('inf')"
        case torch.device():
            return f"torch.device({str(value)!r})"
        case _:
            return repr(value)


def _gpus(program: WrapperProgram) -> list[str]:
    return sorted({b.device for b in program.plan.program.buffers.values() if b.device.startswith("cuda")})


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def origin_text(node: str, op: str, location: str, code: str) -> str:
    """Where something comes from: the comment above its lines."""
    text = f"{node}: {op}"
    if location:
        text += f"   {location}"
    if code:
        text += f"   {code[:80]}"
    return text.replace("\n", " ")


__all__ = ["PythonWrapper", "literal", "print_python", "python_line"]


def _out_names(target: str, count: int) -> list[str]:
    """What an ``out=`` overload calls the ``count`` tensors that it writes: ``out``, ``out0``, ``indices``, ...

    Some operators take them as the last of their ordinary arguments.
    """
    namespace, name, overload = target.split(".")
    schema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema
    found = [a.name for a in schema.arguments if a.is_out]
    return found or [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write][-count:]
