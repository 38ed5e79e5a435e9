"""The C++ printer of wrapper lines: one function over handles of torch's small C interface, in a library of its own.

The text includes no header of torch or Python (see ``cpp_wrapper_prelude.h``). What the C interface cannot do exactly
(operators that it lacks, callables, sizes that a call makes known) is printed as a Python function of its own, by the
Python printer, and called through the host. A long program is cut into several functions, since compilers take more
than linear time for a long one; so everything is a member of a frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Protocol

import sympy
import torch

from ..ir.errors import UnsupportedError
from ..ir.loops import Size
from ..ir.plan import InPlaceOf, InPool
from ..ir.program import (
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
    View,
)
from .cpp_wrapper_externs import DTYPE_CODES, Marshaller, NoShimError, Shim, shim_of
from .printers import cexpr
from .python_wrapper import python_line
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
    Line,
    Place,
    Return,
    Reuse,
    WrapperProgram,
    Zero,
)

#: -O1 is what a sequence of calls can use; more only costs time
CPP_WRAPPER_FLAGS = ("-O1", "-fno-exceptions", "-fvisibility=hidden")
_LINES_A_PART = 400
_INT32_LIMIT = 2**31 - 1


class GridKernel(Protocol):
    """What the printer needs to know of a GPU kernel; its block sizes are filled in after tuning."""

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]: ...
    @property
    def axes(self) -> tuple[tuple[Size, str], ...]: ...
    @property
    def index_limit(self) -> tuple[sympy.Expr, ...]: ...


@dataclass(frozen=True)
class PythonLine:
    """A line that Python runs: ``def line(<names>)`` returning (tensors, then numbers)."""

    source: str


@dataclass(frozen=True)
class CppWrapper:
    """Source of the library, and what the loader has to give to a call of it.

    Attributes
    ----------
    inputs:
        For each positional input ``"tensor"``, ``"empty"`` (without elements; may be None: a token of effects),
        ``"number"`` or ``"object"``.
    outputs:
        For each output ``("tensor", position among tensors)``, ``("number", position)``, ``("object", input)`` or
        ``("literal", value)``.
    kernels, constants:
        Names, in the order of the call's tables.
    lines:
        What Python runs, by number; number 0 is the host's own (an allocation that failed).
    operators:
        Global names of those lines: name -> torch operator.
    """

    source: str
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, object], ...]
    kernels: tuple[str, ...]
    constants: tuple[str, ...]
    lines: tuple[PythonLine, ...]
    operators: Mapping[str, str]
    tensors_out: int
    numbers_out: int


_KEYWORD_TEXT = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
    const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false
    float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq
    private protected public register reinterpret_cast return short signed sizeof static static_assert static_cast
    struct switch template this thread_local throw true try typedef typeid typename union unsigned using virtual
    void volatile wchar_t while xor xor_eq
"""
_KEYWORDS = frozenset(_KEYWORD_TEXT.split())


def _identifier(name: str) -> str:
    text = "".join(c if c.isascii() and (c.isalnum() or c == "_") else f"_{ord(c):x}_" for c in name)
    return text + "_" if text in _KEYWORDS else text


@cache
def _header(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8").replace("#pragma once\n", "")


@dataclass
class _Printer:
    program: WrapperProgram
    grids: Mapping[str, GridKernel]
    poison: bool
    parts: list[list[str]] = field(default_factory=lambda: [[]])
    tensors: set[str] = field(default_factory=set)  # buffers that exist as handles
    addressed: set[str] = field(default_factory=set)  # buffers whose address is known
    members: dict[str, None] = field(default_factory=dict)  # of the frame: handles
    addresses: dict[str, None] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    symbols: dict[sympy.Symbol, str] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    arrays: dict[tuple[int, ...], str] = field(default_factory=dict)
    lines: list[PythonLine] = field(default_factory=list)
    operators: dict[str, str] = field(default_factory=dict)
    shims: dict[str, Shim] = field(default_factory=dict)
    streams: dict[int, None] = field(default_factory=dict)
    outputs: list[tuple[str, object]] = field(default_factory=list)
    locals: int = 0
    views: int = 0

    # -- small texts --

    def line(self, text: str) -> None:
        self.parts[-1].append("    " + text)

    def size(self, value: Size) -> str:
        if isinstance(value, int):
            return cexpr(value)
        missing = [s for s in value.free_symbols if s not in self.symbols]
        if missing:
            raise UnsupportedError(f"the size symbol {missing[0]} is not known in the C++ wrapper")
        return cexpr(value, self.symbols)

    def array(self, values: Sequence[Size]) -> str:
        """The name of an array; equal constant ones are one."""
        if not values:
            return "nullptr"
        if all(isinstance(v, (int, sympy.Integer)) for v in values):
            key = tuple(int(v) for v in values)
            return self.arrays.setdefault(key, f"n{len(self.arrays)}")
        return self.local("const int64_t[]", "{" + ", ".join(self.size(v) for v in values) + "}")

    def local(self, kind: str, value: str) -> str:
        self.locals += 1
        name = f"l{self.locals}"
        if kind.endswith("[]"):
            self.line(f"{kind.removesuffix('[]')} {name}[] = {value};")
        else:
            self.line(f"{kind} {name} = {value};")
        return name

    def member(self, name: str) -> str:
        text = _identifier(name)
        self.members[text] = None
        return f"t.{text}"

    def handle(self, buffer: str) -> str:
        """The handle of a buffer that exists."""
        if buffer in self.inputs:
            return f"in[input::{_identifier(buffer)}]"
        if buffer in self.constants:
            return f"constants[{self.constants[buffer]}]"
        return self.member(buffer)

    def pool_place(self, buffer: str) -> InPool | None:
        plan = self.program.plan
        placement = plan.placements[plan.storage_of(buffer)]
        return placement if isinstance(placement, InPool) else None

    def address(self, buffer: str) -> str:
        place = self.pool_place(buffer)
        if place is not None:
            offset = self.size(place.offset)
            base = f"p.{_identifier(place.pool)}"
            return base if offset == "0L" else f"{base} + {offset}"
        name = _identifier(buffer)
        self.addresses[name] = None
        if buffer not in self.addressed:
            self.line(f"MP(aoti_torch_get_data_ptr({self.handle(buffer)}, (void**)&p.{name}));")
            self.addressed.add(buffer)
        return f"p.{name}"

    def new_view(self) -> str:
        name = self.member(f"mp_view{self.views}")
        self.views += 1
        return name

    def tensor(self, view: View) -> str:
        """A handle with the view's sizes and strides, good until the end of the line."""
        base = self.program.base[view.buffer]
        self.need_tensor(view.buffer)
        handle = self.handle(view.buffer)
        same = view.dtype == base.dtype
        if same and (view.sizes, view.strides, view.offset) == (base.sizes, base.strides, 0):
            return handle
        name = self.new_view()
        self.make_view(handle, base.dtype, view, name)
        return name

    def make_view(self, handle: str, held: torch.dtype, view: View, name: str) -> None:
        shape = f"{len(view.sizes)}, {self.array(view.sizes)}, {self.array(view.strides)}"
        if held == view.dtype:
            offset = self.size(view.offset)
            self.line(f"MP(aoti_torch__reinterpret_tensor({handle}, {shape}, {offset}, &{name}));")
        else:
            offset = self.size(view.offset * view.dtype.itemsize)
            code = _code(view.dtype)
            self.line(f"MP(mp::reinterpret_as({handle}, {held.itemsize}, {offset}, {code}, {shape}, &{name}));")

    def drop_views(self) -> None:
        for k in range(self.views):
            self.line(f"mp::drop(t.mp_view{k});")
        self.views = 0

    def need_tensor(self, name: str) -> None:
        if name in self.tensors:
            return
        place = self.pool_place(name)
        assert place is not None, f"{name} is used before it exists"
        base = self.program.base[name]
        shape = f"{len(base.sizes)}, {self.array(base.sizes)}, {self.array(base.strides)}"
        pool, offset = self.member(place.pool), self.size(place.offset)
        call = f"{pool}, {offset}, {_code(base.dtype)}, {shape}, &{self.member(name)}"
        self.line(f"MP(aoti_torch__alloc_from_pool({call}));")
        self.tensors.add(name)

    # -- lines --

    def print_line(self, line: Line) -> None:
        match line:
            case Comment(origins):
                if len(self.parts[-1]) > _LINES_A_PART:
                    self.parts.append([])
                for text in dict.fromkeys(f"{o.node}: {o.op}   {o.location}" for o in origins[:6]):
                    self.line("// " + re.sub(r"[^\x20-\x7e]", "?", text).replace("\\", "/").rstrip())
            case AllocatePool(pool):
                name = self.member(pool.name)
                self.allocate(pool.device, torch.uint8, (pool.nbytes,), (1,), name)
                self.addresses[_identifier(pool.name)] = None
                self.line(f"MP(aoti_torch_get_data_ptr({name}, (void**)&p.{_identifier(pool.name)}));")
            case FreePool(pool):
                self.line(f"mp::drop({self.member(pool.name)});")
            case Allocate(buffer, view):
                self.allocate(buffer.device, view.dtype, view.sizes, view.strides, self.member(buffer.name))
                self.tensors.add(buffer.name)
                self.poisoned(buffer.name)
            case Place(buffer):
                if buffer.name in self.program.tensors:
                    self.need_tensor(buffer.name)
            case Reuse(buffer, old):
                self.reuse(buffer, old)
            case Zero(buffer):
                self.need_tensor(buffer.name)
                self.line(f"MP(aoti_torch_zero_({self.handle(buffer.name)}));")
            case Launch():
                self.launch(line)
            case CallExtern(op):
                self.extern(line, op)
            case CopyInto(op):
                self.copy(op)
            case Free(buffer) | Forget(buffer) | End(buffer):
                self.ends(line, buffer)
            case Return(outputs):
                self.returns(outputs)
            case Align(buffers):
                self.align(buffers)
            case GiveBack(changed):
                for name in changed:
                    copy = self.member(f"aligned_{name}")
                    self.line(f"if ({copy}) MP(aoti_torch_copy_(f.given[input::{_identifier(name)}], {copy}, 0));")

    def allocate(
        self, device: str, dtype: torch.dtype, sizes: tuple[Size, ...], strides: tuple[Size, ...], name: str
    ) -> None:
        kind, _, index = device.partition(":")
        if kind not in ("cpu", "cuda"):
            raise UnsupportedError(f"the C++ wrapper does not know the device {device!r}")
        where = f"{_code(dtype)}, {int(kind == 'cuda')}, {index or (0 if kind == 'cuda' else -1)}"
        shape = f"{len(sizes)}, {self.array(sizes)}, {self.array(strides)}"
        self.line(f"MP_HOST(mp::empty(*f.call, {where}, {shape}, &{name}));")

    def poisoned(self, buffer: str) -> None:
        if self.poison:
            self.python(f"    poison_tensor({buffer})\n", {}, (), ())

    def reuse(self, buffer: Buffer, old: Buffer) -> None:
        if self.pool_place(buffer.name) is not None and old.name not in self.tensors:
            if buffer.name in self.program.tensors:
                self.need_tensor(buffer.name)
            return
        base, held, name = self.program.base[buffer.name], self.program.base[old.name], self.member(buffer.name)
        if self.poison or buffer.name in self.program.tensors:
            self.make_view(
                self.handle(old.name), held.dtype, View(buffer.name, base.dtype, base.sizes, base.strides), name
            )
        else:  # only its address is wanted
            self.line(f"MP(aoti_torch_new_tensor_handle({self.handle(old.name)}, &{name}));")
        self.tensors.add(buffer.name)

    def launch(self, line: Launch) -> None:
        args = [self.address(b) for b in line.buffers]
        for k, offset in enumerate(line.offsets):
            args[k] += f" + {offset}" if offset else ""
        index = self.kernels.setdefault(line.kernel, len(self.kernels))
        numbers = [self.size(s) for s in line.symbols]
        if line.device == "cpu":
            kinds = ", ".join(["char*"] * len(args) + ["int64_t"] * len(numbers))
            self.line(
                f"((void (*)({kinds}))kernels[{index}].function)({', '.join([*args, *numbers])});  // {line.kernel}"
            )
            return
        device = int(line.device.partition(":")[2] or 0)
        self.streams[device] = None
        kernel = self.grids[line.kernel]
        names = {s: self.size(v) for s, v in zip(kernel.symbols, line.symbols, strict=True)}
        grid = "*".join(
            f"((({cexpr(numel, names)}) + kernels[{index}].blocks[{k}] - 1) / kernels[{index}].blocks[{k}])"
            for k, (numel, _) in enumerate(kernel.axes)
        )
        values = [f"(uint64_t)({a})" for a in (*args, *numbers)] + ["0", "0"]
        array = self.local("uint64_t[]", "{" + ", ".join(values) + "}")
        start = f"MP(mp::launch(kernels[{index}], {grid or '1L'}, f.stream{device}, {array}));  // {line.kernel}"
        if not kernel.index_limit:
            self.line(start)
            return
        fits = " && ".join(f"({cexpr(e, names)}) <= {_INT32_LIMIT}L" for e in kernel.index_limit)
        self.line(f"if ({fits}) {{ {start[: start.index('  //')]} }} else {{")
        given = [f"a{k}" for k in range(len(args) + len(numbers))]
        text = f"    {line.kernel}({', '.join([f'current_stream({device})', *given])})\n"
        texts = [*(f"(int64_t)({a})" for a in args), *numbers]
        self.call_python(text, given, [], texts, [], [], [])
        self.line("}")

    def copy(self, op: Copy) -> None:
        target, source = self.tensor(op.target), self.tensor(op.source)
        self.line(f"MP(aoti_torch_copy_({target}, {source}, 0));")
        self.drop_views()

    def ends(self, line: Free | Forget | End, buffer: Buffer) -> None:
        name = buffer.name
        if self.poison and isinstance(line, End):
            place = self.pool_place(name)
            if place is not None:
                numbers = [self.size(place.offset), self.size(buffer.nbytes)]
                self.call_python(
                    "    poison_range(pool, a0, a1)\n",
                    ["pool", "a0", "a1"],
                    [self.member(place.pool)],
                    numbers,
                    [],
                    [],
                    [],
                )
        if name not in self.tensors:
            return
        self.tensors.discard(name)
        self.addressed.discard(name)
        if self.poison and isinstance(line, Free) and buffer.kind not in (BufferKind.INPUT, BufferKind.PARAMETER):
            self.tensors.add(name)
            self.poisoned(name)
            self.tensors.discard(name)
        if name in self.inputs:
            self.line(f"f.call->host->release(f.call, input::{_identifier(name)});")
            if f"aligned_{_identifier(name)}" in self.members:
                self.line(f"mp::drop({self.member(f'aligned_{name}')});")
        elif name not in self.constants:
            self.line(f"mp::drop({self.handle(name)});")

    def align(self, buffers: tuple[str, ...]) -> None:
        for name in buffers:
            made = self.member(f"aligned_{name}")
            self.line(f"if (mp::misaligned({self.handle(name)})) {{")
            self.call_python(f"    return (aligned({name}),)\n", [name], [self.handle(name)], [], [], [made], [])
            self.line(f"    {self.handle(name)} = {made};")
            self.line("}")

    # -- externs --

    def extern(self, line: CallExtern, op: Extern) -> None:
        before, locals_before, views_before = len(self.parts[-1]), self.locals, self.views
        known = set(self.tensors)
        try:
            self.native(line, op, shim_of(op))
        except NoShimError:
            # what was printed of it so far is taken back
            del self.parts[-1][before:]
            self.locals, self.views, self.tensors = locals_before, views_before, known
            self.through_python(line, op)
        self.drop_views()

    def native(self, line: CallExtern, op: Extern, shim: Shim) -> None:
        outs: dict[str, str] = {}
        override: dict[View, str] = {}
        if op.contract is Contract.OUT:
            views = [v for v in op.results if v is not None]
            names = [a.name for a in Marshaller.schema_of(op).arguments if a.is_out]
            if len(names) != len(views):
                raise NoShimError(f"{op.target} writes {len(names)} results")
            outs = {n: self.tensor(v) for n, v in zip(names, views, strict=True)}
            first, result = op.args[0] if op.args else None, op.results[0]
            if isinstance(first, View) and result is not None and self.in_place(result.buffer, first.buffer):
                # one tensor for both: torch copies the first argument into another one
                override[first] = outs[names[0]]
        m = Marshaller(op, shim, lambda v: override.get(v) or self.tensor(v), self.size, self.array, self.local, outs)
        call = f"{shim.name}({', '.join(m.texts())})"
        self.shims[shim.name] = shim
        self.line(f"if (__builtin_expect({call} != 0, 0)) {{  // Python says what is wrong")
        made = dict(m.results)
        self.through_python(line, op, {k: made[k] for k, v in enumerate(op.results) if v is not None and k in made})
        self.line("}")
        for k, name in made.items():
            view = op.results[k] if k < len(op.results) else None
            if op.contract is Contract.OUT or view is None:
                self.line(f"mp::drop({name});")
                continue
            target = self.member(view.buffer)
            self.line(f"{target} = {name};")
            shape = f"{len(view.sizes)}, {self.array(view.sizes)}, {self.array(view.strides)}"
            self.line(f"if (__builtin_expect(!mp::laid_out({target}, {shape}), 0)) {{")
            self.relay(view, target)
            self.line("}")
            self.tensors.add(view.buffer)

    def relay(self, view: View, target: str) -> None:
        """The result is laid out as the plan says, or refused."""
        old = self.local("AtenTensorHandle", target)
        shape = [f"a{k}" for k in range(2 * len(view.sizes))]
        sizes, strides = shape[: len(view.sizes)], shape[len(view.sizes) :]
        text = (
            f"    return (laid_out(r, ({''.join(s + ', ' for s in sizes)}), ({''.join(s + ', ' for s in strides)})),)\n"
        )
        numbers = [self.size(n) for n in (*view.sizes, *view.strides)]
        self.call_python(text, ["r", *shape], [old], numbers, [], [target], [])
        self.line(f"mp::drop({old});")

    def in_place(self, new: str, old: str) -> bool:
        placement = self.program.plan.placements[new]
        return isinstance(placement, InPlaceOf) and placement.buffer == old

    def through_python(self, line: CallExtern, op: Extern, into: Mapping[int, str] | None = None) -> None:
        """The whole call as a Python function; its fresh results go to ``into`` or to their buffers."""
        printed = python_line(self.program, line)
        self.operators.update(printed.operators)
        mutated = set(op.mutates)
        results = {}
        if op.contract is not Contract.OUT:
            results = {k: v.buffer for k, v in enumerate(op.results) if v is not None and v.buffer not in mutated}
        for _, symbol in op.symbols:
            if not symbol.is_integer:
                raise UnsupportedError(f"the C++ wrapper cannot hold the number {symbol} of {op.target}")
            self.symbols.setdefault(symbol, f"s.{_identifier(str(symbol))}")
        made = {b: (into[k] if into is not None else self.member(b)) for k, b in results.items()}
        self.python(printed.source, made, tuple(s for _, s in op.symbols), tuple(op.mutates))
        if into is None:
            self.tensors.update(made)

    def python(
        self, body: str, made: Mapping[str, str], known: tuple[sympy.Symbol, ...], mutated: tuple[str, ...]
    ) -> None:
        """Call a body whose free names are buffers, symbols and opaque inputs."""
        words = set(re.findall(r"\b\w+\b", body))
        buffers = [b for b in self.program.base if b in words and b not in made and b not in self.constants]
        for b in buffers:
            self.need_tensor(b)
        symbols = [(str(s), text) for s, text in self.symbols.items() if str(s) in words and s not in known]
        objects = [(f"opaque_{n}", k) for n, k in self.objects.items() if f"opaque_{n}" in words]
        names = [*buffers, *(n for n, _ in symbols), *(n for n, _ in objects)]
        results = [*made, *(str(s) for s in known)]
        if results:
            body += f"    return ({', '.join(results)},)\n"
        self.call_python(
            body,
            names,
            [self.handle(b) for b in buffers],
            [text for _, text in symbols],
            [str(k) for _, k in objects],
            list(made.values()),
            [self.symbols[s] for s in known],
        )
        self.addressed.difference_update(mutated)

    def call_python(
        self,
        body: str,
        names: Sequence[str],
        tensors: Sequence[str],
        numbers: Sequence[str],
        objects: Sequence[str],
        made: Sequence[str],
        known: Sequence[str],
    ) -> None:
        self.lines.append(PythonLine(f"def line({', '.join(names)}):\n{body}"))

        def table(kind: str, texts: Iterable[str]) -> tuple[str, int]:
            items = list(texts)
            return (self.local(f"{kind}[]", "{" + ", ".join(items) + "}"), len(items)) if items else ("nullptr", 0)

        self.line("{")
        t, n = table("const AtenTensorHandle", tensors), table("const int64_t", numbers)
        o = table("const int32_t", objects)
        m, k = table("AtenTensorHandle", ["nullptr"] * len(made)), table("int64_t", ["0"] * len(known))
        parts = ", ".join(f"{name}, {count}" for name, count in (t, n, o, m, k))
        self.line(f"MP_HOST(f.call->host->python(f.call, {len(self.lines)}, {parts}));")
        for position, text in enumerate(made):
            self.line(f"{text} = {m[0]}[{position}];")
        for position, text in enumerate(known):
            self.line(f"{text} = {k[0]}[{position}];")
        self.line("}")

    # -- the end --

    def returns(self, outputs: tuple[ProgramOutput, ...]) -> None:
        views = [o for o in outputs if isinstance(o, View)]
        whole = {v.buffer: k for k, v in enumerate(views) if self.is_base(v)}
        taken, tensors, numbers = [], 0, 0
        for out in outputs:
            match out:
                case View():
                    self.need_tensor(out.buffer)
                    target, handle = f"f.call->outputs[{tensors}]", self.handle(out.buffer)
                    held = out.buffer in self.inputs or out.buffer in self.constants
                    if not self.is_base(out):
                        self.make_view(handle, self.program.base[out.buffer].dtype, out, target)
                    elif held or whole[out.buffer] != tensors:
                        self.line(f"MP(aoti_torch_new_tensor_handle({handle}, &{target}));")
                    else:
                        taken.append(f"{target} = mp::take({handle});")
                    self.outputs.append(("tensor", tensors))
                    tensors += 1
                case Symbolic(expr) if str(expr).removeprefix("opaque_") in self.objects and expr.is_Symbol:
                    self.outputs.append(("object", self.objects[str(expr).removeprefix("opaque_")]))
                case Symbolic(expr):
                    if not expr.is_integer:
                        raise UnsupportedError(f"the C++ wrapper cannot return {expr}, which is no integer")
                    self.line(f"f.call->numbers_out[{numbers}] = {self.size(expr)};")
                    self.outputs.append(("number", numbers))
                    numbers += 1
                case Literal(value):
                    self.outputs.append(("literal", value))
        for text in taken:
            self.line(text)

    def is_base(self, view: View) -> bool:
        base = self.program.base[view.buffer]
        return (view.dtype, view.sizes, view.strides, view.offset) == (base.dtype, base.sizes, base.strides, 0)

    def source(self) -> str:
        """The whole translation unit."""
        cuda = bool(self.streams)
        out = [_header("cpp_wrapper_prelude.h"), *([_header("cpp_wrapper_cuda.h")] if cuda else [])]
        shims = [f"static int32_t(*{s.name}){s.signature};" for s in self.shims.values()]
        out += shims
        names = [*self.shims, *(["cuLaunchKernel", "aoti_torch_get_current_cuda_stream"] if cuda else [])]
        imports = "".join(f'    {{"{n}", (void**)&{n}}},\n' for n in names)
        visible = '__attribute__((visibility("default")))'
        out.append(f'extern "C" {{\n{visible} Import memplan_imports[] = {{MP_TORCH(MP_IMPORT)\n{imports}}};')
        out.append(f"{visible} int32_t memplan_import_count = sizeof memplan_imports / sizeof *memplan_imports;\n}}")
        out += [f"static const int64_t {n}[] = {{{', '.join(map(cexpr, k))}}};" for k, n in self.arrays.items()]
        inputs = [f"constexpr int32_t {_identifier(n)} = {k};" for n, k in self.inputs.items()]
        out.append("namespace input {\n" + "\n".join(inputs) + "\n}")
        symbols = [f"int64_t {text.removeprefix('s.')};" for text in self.symbols.values()]
        out.append(_struct("Tensors", [f"AtenTensorHandle {n};" for n in self.members]))
        out.append(_struct("Addresses", [f"char* {n};" for n in self.addresses]))
        out.append(_struct("Symbols", symbols))
        streams = [f"void* stream{d};" for d in self.streams]
        given = [f"AtenTensorHandle given[{max(1, len(self.program.inputs))}];"]
        out.append(_struct("Frame", ["Call* call;", "Tensors t;", "Addresses p;", "Symbols s;", *given, *streams]))
        for k, part in enumerate(self.parts):
            out.append(f"static int32_t part{k}(Frame& f) {{")
            out.append(
                "    auto &t = f.t; auto &p = f.p; auto &s = f.s; auto* in = f.call->inputs; (void)t, (void)p, (void)s;"
            )
            out.append("    auto *kernels = f.call->kernels; auto *constants = f.call->constants;")
            out.append("    (void)in, (void)kernels, (void)constants;")
            out += [*part, "    return 0;", "}"]
        out.append(self.entry(visible))
        return "\n".join(out) + "\n"

    def entry(self, visible: str) -> str:
        begin = [
            "    Frame f;",
            "    __builtin_memset(&f, 0, sizeof f);",
            "    f.call = call;",
            f"    __builtin_memcpy(f.given, call->inputs, sizeof(AtenTensorHandle) * {len(self.program.inputs)});",
        ]
        for i in self.program.inputs:
            if isinstance(i, SymbolInput):
                begin.append(f"    f.{self.symbols[i.symbol]} = call->numbers[{i.position}];")
        for device in self.streams:
            begin.append(f"    MP(aoti_torch_get_current_cuda_stream({device}, &f.stream{device}));")
        parts = " || ".join(f"part{k}(f)" for k in range(len(self.parts)))
        count = len(self.members)
        end = [f"    const int32_t status = {parts};"]
        if count:
            end.append("    auto* held = reinterpret_cast<AtenTensorHandle*>(&f.t);")
            end.append(f"    for (int i = 0; i < {count}; ++i) mp::drop(held[i]);")
        return "\n".join(
            [f'extern "C" {visible} int32_t memplan_run(Call* call) {{', *begin, *end, "    return status;", "}"]
        )


def _struct(name: str, members: Sequence[str]) -> str:
    return f"struct {name} {{\n" + "".join(f"    {m}\n" for m in members) + "};"


def _code(dtype: torch.dtype) -> int:
    if dtype not in DTYPE_CODES:
        raise UnsupportedError(f"the C++ wrapper does not know {dtype}")
    return DTYPE_CODES[dtype]


def print_cpp(
    program: WrapperProgram, grids: Mapping[str, GridKernel] | None = None, *, poison: bool = False
) -> CppWrapper:
    """The wrapper as C++ source; deterministic.

    Parameters
    ----------
    grids:
        For each GPU kernel, what its grid is computed from.

    Raises
    ------
    UnsupportedError
        For what only the Python wrapper can do, naming it.
    """
    p = _Printer(program, grids or {}, poison)
    kinds = []
    for i in program.inputs:
        match i:
            case TensorInput(position, view):
                p.inputs[view.buffer] = position
                p.tensors.add(view.buffer)
                kinds.append("empty" if view.numel == 0 else "tensor")
            case SymbolInput(_, symbol):
                if symbol.is_integer is False:
                    raise UnsupportedError(f"the C++ wrapper cannot take the number {symbol}, which is no integer")
                p.symbols[symbol] = f"s.{_identifier(str(symbol))}"
                kinds.append("number")
            case OpaqueInput(position, name):
                p.objects[name] = position
                kinds.append("object")
    for b in program.plan.program.buffers.values():
        if b.kind is BufferKind.CONSTANT:
            p.constants[b.name] = len(p.constants)
            p.tensors.add(b.name)
    for line in program.lines:
        p.print_line(line)
    count = {kind: sum(k == kind for k, _ in p.outputs) for kind in ("tensor", "number")}
    return CppWrapper(
        p.source(),
        tuple(kinds),
        tuple(p.outputs),
        tuple(p.kernels),
        tuple(p.constants),
        tuple(p.lines),
        p.operators,
        count["tensor"],
        count["number"],
    )


__all__ = ["CPP_WRAPPER_FLAGS", "CppWrapper", "GridKernel", "PythonLine", "print_cpp"]
