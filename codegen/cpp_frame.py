"""The function that a C++ wrapper becomes, while it is printed: its names, and the small texts that lines are made of.

A long program is cut into several functions, since compilers take more than linear time for a long one; so everything
that outlives a line is a member of a frame (``t`` handles, ``p`` addresses, ``s`` sizes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import sympy
import torch

from ..ir.errors import UnsupportedError
from ..ir.loops import Size
from ..ir.plan import InPlaceOf, InPool
from ..ir.program import View
from .cpp_wrapper_externs import DTYPE_CODES, Shim
from .printers import cexpr
from .wrapper_lines import WrapperProgram


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
    #: whether calls that go well run it; the rest say what is wrong, or mend a layout that nobody expects
    needed: bool = True


_KEYWORD_TEXT = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
    const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false
    float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq
    private protected public register reinterpret_cast return short signed sizeof static static_assert static_cast
    struct switch template this thread_local throw true try typedef typeid typename union unsigned using virtual
    void volatile wchar_t while xor xor_eq
"""
_KEYWORDS = frozenset(_KEYWORD_TEXT.split())


def identifier(name: str) -> str:
    text = "".join(c if c.isascii() and (c.isalnum() or c == "_") else f"_{ord(c):x}_" for c in name)
    return text + "_" if text in _KEYWORDS else text


def dtype_code(dtype: torch.dtype) -> int:
    """torch's number of a dtype.

    Raises
    ------
    UnsupportedError
        If the C interface has none.
    """
    if dtype not in DTYPE_CODES:
        raise UnsupportedError(f"the C++ wrapper does not know {dtype}")
    return DTYPE_CODES[dtype]


@dataclass
class Frame:
    """What is known of the function so far."""

    program: WrapperProgram
    grids: Mapping[str, GridKernel]
    users: Mapping[str, tuple[int | None, ...]]
    poison: bool
    parts: list[list[str]] = field(default_factory=lambda: [[]])
    tensors: set[str] = field(default_factory=set)  # buffers that exist as handles
    addressed: set[str] = field(default_factory=set)  # buffers whose address is known
    first: dict[str, str] = field(default_factory=dict)  # whose handle a buffer took over with its storage
    handed: set[str] = field(default_factory=set)  # buffers whose handle another one took over
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
    gpus: dict[int, None] = field(default_factory=dict)  # indices of those that kernels are launched on
    outputs: list[tuple[str, object]] = field(default_factory=list)
    locals: int = 0
    views: int = 0
    steps: int = 0

    def lines_unneeded_from(self, start: int) -> None:
        """Lines of Python from this one on are not run by calls that go well."""
        self.lines[start:] = [replace(line, needed=False) for line in self.lines[start:]]

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
        text = identifier(name)
        self.members[text] = None
        return f"t.{text}"

    def handle(self, buffer: str) -> str:
        """The handle of a buffer that exists."""
        buffer = self.first.get(buffer, buffer)
        if buffer in self.inputs:
            return f"in[input::{identifier(buffer)}]"
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
            base = f"p.{identifier(place.pool)}"
            return base if offset == "0L" else f"{base} + {offset}"
        buffer = self.first.get(buffer, buffer)
        name = identifier(buffer)
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
            code = dtype_code(view.dtype)
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
        call = f"{pool}, {offset}, {dtype_code(base.dtype)}, {shape}, &{self.member(name)}"
        self.line(f"MP(aoti_torch__alloc_from_pool({call}));")
        self.tensors.add(name)

    # -- lines --

    def take_over(self, new: str, old: str) -> None:
        """The handle of ``old`` is that of ``new`` from here on; ``old`` is another name for it until it ends."""
        self.first[new] = self.first.get(old, old)
        self.handed.add(old)
        self.tensors.add(new)

    def same_base(self, first: str, second: str) -> bool:
        """Whether both are allocated in the same shape."""
        a, b = self.program.base[first], self.program.base[second]
        return (a.dtype, a.sizes, a.strides) == (b.dtype, b.sizes, b.strides)

    def in_place(self, new: str, old: str) -> bool:
        placement = self.program.plan.placements[new]
        return isinstance(placement, InPlaceOf) and placement.buffer == old

    def is_base(self, view: View) -> bool:
        base = self.program.base[view.buffer]
        return (view.dtype, view.sizes, view.strides, view.offset) == (base.dtype, base.sizes, base.strides, 0)
