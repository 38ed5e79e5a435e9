"""Extern calls through torch's small C interface: which functions it has, and an operation's arguments as C++ text.

The functions are read off the headers that torch itself brings (``c_shim_cpu.h``, ``c_shim_cuda.h``), so that what is
printed fits the torch that is installed. A call whose arguments cannot be written exactly is not one of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from ..ir.errors import UnsupportedError
from ..ir.loops import Size
from ..ir.program import Argument, Contract, Extern, Literal, Symbolic, Tuple, View

#: c10::ScalarType, an enumeration that never changes
DTYPE_CODES: Mapping[torch.dtype, int] = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.complex32: 8,
    torch.complex64: 9,
    torch.complex128: 10,
    torch.bool: 11,
    torch.bfloat16: 15,
    torch.float8_e5m2: 23,
    torch.float8_e4m3fn: 24,
    torch.float8_e5m2fnuz: 25,
    torch.float8_e4m3fnuz: 26,
    torch.uint16: 27,
    torch.uint32: 28,
    torch.uint64: 29,
}


@dataclass(frozen=True, slots=True)
class Shim:
    """A function of torch's C interface: its parameters as (C type, name)."""

    name: str
    parameters: tuple[tuple[str, str], ...]

    @property
    def signature(self) -> str:
        return "(" + ", ".join(kind for kind, _ in self.parameters) + ")"


class NoShimError(UnsupportedError):
    """The call cannot be made through the C interface; the host makes it."""


_DECLARATION = re.compile(r"AOTITorchError\s+(aoti_torch_\w+)\(([^)]*)\);")


@cache
def shims(device: str) -> Mapping[str, Shim]:
    """The operators' functions for a type of device; none where torch came without its headers."""
    folder = os.path.join(os.path.dirname(torch.__file__), "include/torch/csrc/inductor/aoti_torch/generated")
    path = os.path.join(folder, f"c_shim_{device}.h")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        text = file.read()
    found = {}
    for name, arguments in _DECLARATION.findall(text):
        parameters = []
        for argument in filter(None, (a.strip() for a in arguments.split(","))):
            kind, _, own = argument.rpartition(" ")
            parameters.append((kind.strip(), own))
        found[name] = Shim(name, tuple(parameters))
    return found


def shim_of(op: Extern) -> Shim:
    """The function that makes the call.

    Raises
    ------
    NoShimError
        If there is none.
    """
    if op.target.startswith("callable:") or op.symbols or op.contract not in (Contract.OUT, Contract.FRESH):
        raise NoShimError(f"{op.target} has no function in torch's C interface")
    if op.mutates:
        raise NoShimError(f"{op.target} changes its arguments")
    namespace, name, overload = op.target.split(".")
    device = op.device.partition(":")[0]
    full = f"aoti_torch_{device}_{name}" + ("" if overload == "default" else f"_{overload}")
    found = shims(device).get(full) if namespace == "aten" else None
    if found is None:
        raise NoShimError(f"{op.target} has no function in torch's C interface")
    return found


@dataclass
class Marshaller:
    """The arguments of one call as C++ text.

    ``tensor`` makes a handle of a view, ``number`` prints a size, ``array`` gives the name of an array of them;
    ``outs`` are handles of the results that the call writes into. What is made by the call goes into ``results``:
    variables by the position of the result.
    """

    op: Extern
    shim: Shim
    tensor: Callable[[View], str]
    number: Callable[[Size], str]
    array: Callable[[Sequence[Size]], str]
    local: Callable[[str, str], str]  # (C type with [] where it is one, initialiser) -> name of a new variable
    outs: Mapping[str, str]
    results: dict[int, str] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """One text for each parameter.

        Raises
        ------
        NoShimError
            If an argument cannot be written exactly.
        """
        given = self.given()
        kinds = {a.name: str(a.type) for a in self.schema().arguments}
        texts: list[str] = []
        lengths: dict[str, int] = {}
        for kind, name in self.shim.parameters:
            made = re.fullmatch(r"ret(\d+)", name)
            if name in self.outs:
                texts.append(self.outs[name])
            elif made:
                texts.append(self.result(kind, int(made[1])))
            elif name.endswith("_len_") and name.removesuffix("_len_") in given:
                texts.append(str(lengths[name.removesuffix("_len_")]))
            elif name in given:
                value = given[name]
                lengths[name] = len(value.items) if isinstance(value, Tuple) else 0
                texts.append(self.value(kind, kinds[name], value))
            else:
                raise self.refuse(name)
        return texts

    def schema(self) -> torch._C.FunctionSchema:
        return self.schema_of(self.op)

    @staticmethod
    def schema_of(op: Extern) -> torch._C.FunctionSchema:
        namespace, name, overload = op.target.split(".")
        schema: torch._C.FunctionSchema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema
        return schema

    def given(self) -> dict[str, Argument]:
        """Arguments by name, defaults among them."""
        found: dict[str, Argument] = {}
        keywords = dict(self.op.kwargs)
        for position, a in enumerate(self.schema().arguments):
            if not a.kwarg_only and position < len(self.op.args):
                found[a.name] = self.op.args[position]
            elif a.name in keywords:
                found[a.name] = keywords[a.name]
            elif a.has_default_value():
                found[a.name] = _default(a.default_value)
        return found

    def refuse(self, name: str) -> NoShimError:
        return NoShimError(f"argument {name!r} of {self.op.target} has no exact form in {self.shim.name}")

    def result(self, kind: str, position: int) -> str:
        if kind == "AtenTensorHandle*":
            name = self.local("AtenTensorHandle", "nullptr")
            self.results[position] = name
        else:
            name = self.local(kind.removesuffix("*"), "0")
        return f"&{name}"

    def value(self, kind: str, schema: str, value: Argument) -> str:
        absent = isinstance(value, Literal) and value.value is None
        match kind:
            case "AtenTensorHandle" if isinstance(value, View):
                return self.tensor(value)
            case "AtenTensorHandle*" if absent:
                return "nullptr"
            case "AtenTensorHandle*" if isinstance(value, View):
                return "&" + self.local("AtenTensorHandle", self.tensor(value))
            case "const AtenTensorHandle*" if isinstance(value, Tuple):
                items = [self.tensor(i) for i in value.items if isinstance(i, View)]
                if items and len(items) == len(value.items):
                    return self.local("const AtenTensorHandle[]", "{" + ", ".join(items) + "}")
            case "int64_t" | "double" | "int32_t":
                return self.scalar(kind, schema, value)
            case "int64_t*" | "double*" | "int32_t*":
                inner = kind.removesuffix("*")
                return "nullptr" if absent else "&" + self.local(inner, self.scalar(inner, schema, value))
            case "const int64_t*" if isinstance(value, Tuple):
                return self.integers(value)
            case "const int32_t*" if isinstance(value, Tuple):
                items = [self.scalar("int32_t", "bool", i) for i in value.items]
                return self.local("const int32_t[]", "{" + ", ".join(items) + "}") if items else "nullptr"
            case "const int64_t**" if absent:
                return "nullptr"
            case "const int64_t**" if isinstance(value, Tuple):
                return "&" + self.local("const int64_t*", self.integers(value))
            case _:
                pass
        raise self.refuse(f"{kind} {value}")

    def integers(self, value: Tuple) -> str:
        sizes: list[Size] = []
        for item in value.items:
            if isinstance(item, Symbolic):
                sizes.append(item.expr)
            elif isinstance(item, Literal) and isinstance(item.value, int) and not isinstance(item.value, bool):
                sizes.append(item.value)
            else:
                raise self.refuse(str(item))
        return self.array(sizes)

    def scalar(self, kind: str, schema: str, value: Argument) -> str:
        """A number; a Scalar is a double in the C interface, which is exact where the tensors are of floats."""
        if isinstance(value, Symbolic):
            if kind == "int64_t":
                return self.number(value.expr)
            raise self.refuse(str(value))
        held = value.value if isinstance(value, Literal) else None
        if isinstance(held, torch.dtype) and kind == "int32_t" and held in DTYPE_CODES:
            return str(DTYPE_CODES[held])
        if isinstance(held, bool):
            if kind == "int32_t" and "bool" in schema:
                return "1" if held else "0"
        elif isinstance(held, int) and kind == "int64_t":
            return self.number(held)
        elif isinstance(held, (int, float)) and kind == "double":
            views = [v for v in (*self.op.results, *self.op.args) if isinstance(v, View)]
            if isinstance(held, float) or all(v.dtype.is_floating_point for v in views):
                return _double(float(held))
        raise self.refuse(f"{kind} {held!r}")


def _double(value: float) -> str:
    if value != value:
        return '__builtin_nan("")'
    if value in (float("inf"), float("-inf")):
        return "__builtin_inf()" if value > 0 else "-__builtin_inf()"
    return value.hex()


def _default(value: object) -> Argument:
    if isinstance(value, (list, tuple)):
        return Tuple(tuple(_default(v) for v in value))
    return Literal(value)  # type: ignore[arg-type]
