"""Values, stores and reduction states of a kernel as C++ text. What stands here knows nothing of loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import assert_never

import numpy
import torch

from memplan.ir.errors import UnsupportedError
from memplan.ir.loops import (
    CHECKED_INDEX,
    OPERATIONS,
    Call,
    Cast,
    Constant,
    Index,
    IndexExpr,
    Item,
    Kernel,
    Load,
    Node,
    Random,
    Reduce,
    Scalar,
    Store,
    StoreMode,
    value_references,
    value_symbol,
)

from .printers import cexpr, cpp_double, cpp_integer

_INTEGERS = {
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.uint8: "uint8_t",
    torch.uint16: "uint16_t",
    torch.uint32: "uint32_t",
    torch.uint64: "uint64_t",
}
# Stored as raw bits: g++ does not vectorise loops that assign structures.
_HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_FLOAT_VALUES = (torch.float16, torch.bfloat16, torch.float32)
_COMPUTE = {
    **_INTEGERS,
    torch.float16: "float",
    torch.bfloat16: "float",
    torch.float32: "float",
    torch.float64: "double",
    torch.bool: "bool",
}
#: functions of ``cpp_special.h``: scalar, seldom used, so their header is included only where they are
SPECIAL = frozenset(
    ["lgamma", "digamma", "erfinv", "i0", "i0e", "i1", "i1e", "ndtri", "log_ndtr", "bessel_j0", "bessel_j1"]
)


def compute_type(dtype: torch.dtype) -> str:
    """The C++ type that a value of this dtype is held in.

    Raises
    ------
    UnsupportedError
        For complex, quantised and 8-bit floating types.
    """
    if dtype not in _COMPUTE:
        raise UnsupportedError(f"CPU kernels have no {dtype} values")
    return _COMPUTE[dtype]


def storage_type(dtype: torch.dtype) -> str:
    """The C++ type of a buffer's elements."""
    compute = compute_type(dtype)
    return "uint8_t" if dtype is torch.bool else "uint16_t" if dtype in _HALVES else compute


def constant_text(value: Scalar, dtype: torch.dtype) -> str:
    """A literal of the dtype's compute type, exactly the value that the dtype's arithmetic gives it."""
    name = compute_type(dtype)
    if name == "bool":
        return "true" if value else "false"
    if name == "double":
        return cpp_double(float(value))
    if name == "float":
        with numpy.errstate(over="ignore"):
            rounded = float(numpy.float32(value))
        text = cpp_double(rounded)
        return f"float({text})" if "builtin" in text else text.rstrip(")") + ("f)" if text.endswith(")") else "f")
    bits = dtype.itemsize * 8
    wrapped = int(value) % 2**bits
    if dtype is torch.uint64:
        return f"{wrapped}UL"
    if name[0] != "u" and wrapped >= 2 ** (bits - 1):
        wrapped -= 2**bits
    return f"{name}({cpp_integer(wrapped)})"


@dataclass(frozen=True)
class Texts:
    """Texts of one kernel's nodes; ``pointers`` gives each buffer the element type of its pointer."""

    kernel: Kernel
    pointers: Mapping[str, torch.dtype]

    def index(self, expr: IndexExpr) -> str:
        """An index expression, with the values in it widened to 64 bits before any arithmetic."""
        names = {}
        for k in value_references(expr):
            wide = self.kernel.nodes[k].dtype is torch.int64
            names[value_symbol(k)] = f"v{k}" if wide else f"int64_t(v{k})"
        return cexpr(expr, names)

    def element(self, buffer: str, index: IndexExpr, dtype: torch.dtype) -> str:
        """An element of a buffer, seen as ``dtype``."""
        base = buffer
        if self.pointers[buffer] is not dtype:
            base = f"reinterpret_cast<{storage_type(dtype)}*>({buffer})"
        return f"{base}[{self.index(index)}]"

    def value(self, k: int) -> str:
        """The right-hand side that defines node ``k``; operands are variables ``v<k>``."""
        node: Node = self.kernel.nodes[k]
        match node:
            case Load():
                return self._load(node)
            case Index():
                return f"{compute_type(node.dtype)}({self.index(node.expr)})"
            case Constant():
                return constant_text(node.value, node.dtype)
            case Call():
                return self._call(node)
            case Cast():
                return self._cast(f"v{node.arg}", self.dtype(node.arg), node.dtype)
            case Item():
                return f"v{node.arg}_{node.item}"
            case Random():
                text = f"mp::{node.kind}(int64_t(v{node.seed}), int64_t(v{node.offset}))"
                return self._cast(text, torch.int64 if node.kind == "randint64" else torch.float32, node.dtype)
            case Reduce():
                raise AssertionError("a reduction has no one line")
            case _:
                assert_never(node)

    def dtype(self, k: int) -> torch.dtype:
        """The dtype of node ``k``."""
        return self.kernel.nodes[k].dtype

    def _load(self, node: Load) -> str:
        text = self.loaded(self.element(node.buffer, node.index, node.dtype), node.dtype)
        if node.mask is None:
            return text
        return f"(v{node.mask} ? {text} : {constant_text(node.other, node.dtype)})"

    def loaded(self, element: str, dtype: torch.dtype) -> str:
        """An element of a buffer as a value."""
        if dtype is torch.bool:
            return f"({element} != 0)"
        return f"mp::{_HALVES[dtype]}_to_float({element})" if dtype in _HALVES else element

    def _call(self, node: Call) -> str:
        if OPERATIONS.get(node.op) != len(node.args):
            raise UnsupportedError(f"operation {node.op} with {len(node.args)} operands")
        if node.op == "pow":
            exponent = self.kernel.nodes[node.args[1]]
            base = f"v{node.args[0]}"
            if isinstance(exponent, Constant) and exponent.dtype.is_floating_point:
                times = {1.0: 1, 2.0: 2, 3.0: 3}.get(float(exponent.value))
                if times is not None:
                    return " * ".join([base] * times)
        args = ", ".join(f"v{k}" for k in node.args)
        return f"mp::{node.op}({args}{', checks' if node.op == CHECKED_INDEX else ''})"

    def _cast(self, text: str, source: torch.dtype, target: torch.dtype) -> str:
        if target in _HALVES:
            if source is target:
                return text
            return f"mp::{_HALVES[target]}_to_float(mp::float_to_{_HALVES[target]}(float({text})))"
        if compute_type(source) == compute_type(target):
            return text
        return f"mp::cast<{compute_type(target)}>({text})"

    def store(self, store: Store, *, atomic: bool) -> str:
        """The statement of a store; ``atomic`` where several threads run."""
        value = self._stored(store)
        target = self.element(store.buffer, store.index, store.dtype)
        match store.mode:
            case StoreMode.SET:
                text = f"{target} = {value};"
            case StoreMode.ADD | StoreMode.MAX | StoreMode.MIN:
                text = self._update(store, target, value, atomic)
            case StoreMode.TOTAL:
                raise UnsupportedError("totals of columns in a kernel over rows are for GPUs")
            case _:
                assert_never(store.mode)
        return text if store.mask is None else f"if (v{store.mask}) {text}"

    def _update(self, store: Store, target: str, value: str, atomic: bool) -> str:
        name = store.mode.value
        held = compute_type(store.dtype)
        if store.dtype in _HALVES:
            half = f"mp::{_HALVES[store.dtype]}"
            target, value = f"reinterpret_cast<{half}*>(&{target})", f"{half}(float(v{store.value}))"
        else:
            target = f"&{target}"
        if atomic:
            return f"mp::atomic_{name}({target}, {value});"
        if store.mode is StoreMode.ADD:
            return f"*({target}) = mp::plus(*({target}), {value});"
        return f"*({target}) = mp::{name}imum({held}(*({target})), {held}({value}));"

    def _stored(self, store: Store) -> str:
        k = store.value
        node = self.kernel.nodes[k]
        target = storage_type(store.dtype)
        if store.dtype is torch.bool:
            return f"uint8_t(mp::cast<bool>(v{k}))"
        if store.dtype in _HALVES:
            # storing rounds: a value that was rounded just before need not be rounded for it
            if isinstance(node, Cast) and node.dtype is store.dtype and self.dtype(node.arg) in _FLOAT_VALUES:
                k = node.arg
            return f"mp::float_to_{_HALVES[store.dtype]}(float(v{k}))"
        if compute_type(node.dtype) == target:
            return f"v{k}"
        return f"mp::cast<{target}>(v{k})"


# ---- reductions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One component of a reduction's state: a name suffix, the C++ type, the neutral value."""

    suffix: str
    type: str
    neutral: str


@dataclass(frozen=True, slots=True)
class State:
    """How one reduction accumulates: its components, and statements over component names.

    ``update(target, values)`` takes the components' lvalues and the operands' texts; ``combine(target, other)`` two
    lists of components. ``results`` are the values that the node has, as the components' numbers.
    """

    parts: tuple[Part, ...]
    update: Callable[[tuple[str, ...], tuple[str, ...]], tuple[str, ...]]
    combine: Callable[[tuple[str, ...], tuple[str, ...]], tuple[str, ...]]
    results: tuple[int, ...]


_COMBINE = {
    "sum": "mp::add({0}, {1})",
    "prod": "mp::mul({0}, {1})",
    "max": "mp::maximum({1}, {0})",
    "min": "mp::minimum({1}, {0})",
    "any": "({0} | {1})",
    "all": "({0} & {1})",
}


def reduction_state(texts: Texts, node: Reduce) -> State:
    """The state of one reduction."""
    if node.op in ("argmax", "argmin"):
        return _arg_state(node.op, texts.dtype(node.args[0]))
    held = compute_type(node.dtype)
    if node.op in ("welford", "welford_combine"):
        return _welford_state(held, node.op == "welford")
    neutral = _neutral(node.op, node.dtype)

    def combine(target: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
        return (f"{target[0]} = {_COMBINE[node.op].format(target[0], other[0])};",)

    def update(target: tuple[str, ...], values: tuple[str, ...]) -> tuple[str, ...]:
        source = texts.dtype(node.args[0])
        same = compute_type(source) == held
        return combine(target, (values[0] if same else f"mp::cast<{held}>({values[0]})",))

    return State((Part("", held, neutral),), update, combine, (0,))


def _neutral(op: str, dtype: torch.dtype) -> str:
    if op in ("sum", "any", "prod", "all"):
        return constant_text(op in ("prod", "all"), dtype)
    largest = op == "min"
    if dtype.is_floating_point:
        return constant_text(float("inf") if largest else float("-inf"), dtype)
    if dtype is torch.bool:
        return constant_text(largest, dtype)
    limits = torch.iinfo(dtype)
    return constant_text(limits.max if largest else limits.min, dtype)


def _arg_state(op: str, dtype: torch.dtype) -> State:
    held = compute_type(dtype)

    def combine(target: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
        one, two = (f"mp::Arg<{held}>{{{s[0]}, {s[1]}}}" for s in (target, other))
        call = f"mp::{op}_combine({one}, {two})"
        return (f"const auto best = {call};", f"{target[0]} = best.value;", f"{target[1]} = best.index;")

    def update(target: tuple[str, ...], values: tuple[str, ...]) -> tuple[str, ...]:
        return combine(target, (values[0], f"int64_t({values[1]})"))

    return State((Part("_value", held, f"{held}(0)"), Part("_index", "int64_t", "-1L")), update, combine, (1,))


def _welford_state(held: str, plain: bool) -> State:
    parts = tuple(Part(f"_{name}", held, f"{held}(0)") for name in ("mean", "m2", "weight"))

    def put(target: tuple[str, ...], call: str) -> tuple[str, ...]:
        fields = zip(target, ("mean", "m2", "weight"), strict=True)
        return (f"const auto joined = {call};", *(f"{t} = joined.{f};" for t, f in fields))

    def state(names: tuple[str, ...]) -> str:
        return f"mp::Welford<{held}>{{{', '.join(names)}}}"

    def combine(target: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
        return put(target, f"mp::welford_combine({state(target)}, {state(other)})")

    def update(target: tuple[str, ...], values: tuple[str, ...]) -> tuple[str, ...]:
        if not plain:
            return combine(target, values)
        return put(target, f"mp::welford_update({state(target)}, {values[0]})")

    return State(parts, update, combine, (0, 1, 2))
