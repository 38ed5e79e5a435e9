"""A kernel evaluated literally on torch CPU tensors, straight from the data model: the judge of every emitter.

All nodes are evaluated for all points first, all stores follow in order: a kernel means "read everything, then write".
Values of float16, bfloat16 and float8 nodes are held in float32 and rounded by `Cast` and by stores alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import sympy
import torch

from memplan.ir.index import FloorDiv, Mod
from memplan.ir.loops import (
    Call,
    Cast,
    Constant,
    Index,
    Item,
    Kernel,
    Load,
    Node,
    Random,
    Reduce,
    Store,
    StoreMode,
)
from memplan.ir.program import evaluate

Tensor = torch.Tensor


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """What a node of this dtype is computed in: float32 for everything smaller that floats."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def run_reference(
    kernel: Kernel, buffers: Mapping[str, Tensor], hints: Mapping[sympy.Symbol, int] | None = None
) -> None:
    """Run ``kernel`` over flat 1-D storages, writing its stores in place.

    ``buffers`` maps each name to a contiguous 1-D tensor, the whole storage; an access of another dtype sees the
    same bytes. ``hints`` are the values of the size symbols.
    """
    _Evaluation(kernel, buffers, hints or {}).run()


class _Evaluation:
    """Values have shape ``[outer points, row points]``, either of them 1 where a value does not vary."""

    def __init__(self, kernel: Kernel, buffers: Mapping[str, Tensor], hints: Mapping[sympy.Symbol, int]) -> None:
        self.kernel = kernel
        self.buffers = buffers
        outer = [evaluate(r.size, hints) for r in kernel.outer]
        row = [evaluate(r.size, hints) for r in kernel.row]
        self.shape = (math.prod(outer), math.prod(row))
        self.symbols: dict[sympy.Symbol, Tensor] = {s: torch.tensor([[v]]) for s, v in hints.items()}
        for ranges, sizes, shape in ((kernel.outer, outer, (-1, 1)), (kernel.row, row, (1, -1))):
            flat, stride = torch.arange(math.prod(sizes)), math.prod(sizes)
            for r, size in zip(ranges, sizes, strict=True):
                stride //= max(size, 1)
                self.symbols[r.symbol] = (flat // max(stride, 1) % max(size, 1)).reshape(shape)
        self.values: list[Tensor] = []
        self.items: dict[int, tuple[Tensor, ...]] = {}

    def run(self) -> None:
        for position, node in enumerate(self.kernel.nodes):
            value = self.node(position, node)
            want = compute_type(node.dtype)
            assert value.dtype == want, f"node {position} {node} gave {value.dtype}, not {want}"
            self.values.append(value)
        for store in self.kernel.stores:
            self.store(store)

    def index(self, expr: sympy.Expr) -> Tensor:
        if expr.is_Integer:
            return torch.tensor([[int(expr)]])
        if expr.is_Symbol:
            if expr in self.symbols:
                return self.symbols[expr]
            return self.values[int(expr.name[1:])].to(torch.int64)
        args = [self.index(a) for a in expr.args]
        if isinstance(expr, FloorDiv):
            return torch.div(args[0], args[1], rounding_mode="floor")
        if isinstance(expr, Mod):
            return torch.remainder(args[0], args[1])
        fold: dict[type, Callable[[Tensor, Tensor], Tensor]] = {
            sympy.Add: torch.add,
            sympy.Mul: torch.mul,
            sympy.Pow: torch.pow,
            sympy.Max: torch.maximum,
            sympy.Min: torch.minimum,
        }
        out = args[0]
        for a in args[1:]:
            out = fold[expr.func](out, a)
        return out

    def storage(self, buffer: str, dtype: torch.dtype) -> Tensor:
        flat = self.buffers[buffer]
        assert flat.dim() == 1, f"{buffer} is not flat"
        assert flat.is_contiguous(), f"{buffer} is not contiguous"
        return flat if flat.dtype == dtype else flat.view(dtype)

    def node(self, position: int, node: Node) -> Tensor:
        match node:
            case Load():
                return self.load(node)
            case Index():
                return self.index(node.expr).to(node.dtype)
            case Constant():
                return (
                    torch.tensor([[node.value]]).to(compute_type(node.dtype))
                    if isinstance(node.value, bool)
                    else torch.tensor([[node.value]], dtype=compute_type(node.dtype))
                )
            case Call():
                return call(node.op, [self.values[a] for a in node.args], compute_type(node.dtype))
            case Cast():
                return cast(self.values[node.arg], node.dtype)
            case Reduce():
                return self.reduce(position, node)
            case Item():
                return self.items[node.arg][node.item].to(compute_type(node.dtype))
            case Random():
                return random(node, self.values[node.seed], self.values[node.offset])

    def load(self, node: Load) -> Tensor:
        source, index = self.storage(node.buffer, node.dtype), self.index(node.index)
        if node.mask is None:
            self.check(node.buffer, index, source)
            return _take(source, index).to(compute_type(node.dtype))
        index, mask = torch.broadcast_tensors(index, self.values[node.mask])
        self.check(node.buffer, index[mask], source)
        out = torch.full(index.shape, node.other, dtype=compute_type(node.dtype))
        out[mask] = _take(source, index[mask]).to(out.dtype)
        return out

    def check(self, buffer: str, index: Tensor, storage: Tensor) -> None:
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < storage.numel()):
            found = f"{int(index.min())}..{int(index.max())}"
            raise IndexError(f"{buffer} has {storage.numel()} elements and is accessed at {found}")

    def reduce(self, position: int, node: Reduce) -> Tensor:
        want = compute_type(node.dtype)
        points = [self.values[a].expand(self.shape) for a in node.args]
        if node.op in ("welford", "welford_combine"):
            self.items[position] = _welford(node.op, [p.to(want) for p in points])
            return self.items[position][0].to(want)
        if node.op in ("argmax", "argmin"):
            return _argument(node.op, points[0], points[1]).to(want)
        x = points[0].to(torch.bool if node.op in ("any", "all") else want)
        empty = self.shape[1] == 0
        match node.op:
            case "sum":
                return x.sum(1, keepdim=True, dtype=want)
            case "prod":
                return x.prod(1, keepdim=True, dtype=want)
            case "any":
                return x.any(1, keepdim=True).to(want)
            case "all":
                return x.all(1, keepdim=True).to(want)
            case "max" | "min":
                assert not empty, "a maximum of nothing"
                return (x.amax if node.op == "max" else x.amin)(1, keepdim=True)
        raise AssertionError(node.op)

    def store(self, store: Store) -> None:
        target, index = self.storage(store.buffer, store.dtype), self.index(store.index)
        value = self.values[store.value]
        parts = [index, value] + ([] if store.mask is None else [self.values[store.mask]])
        if store.mode is not StoreMode.SET or store.index.free_symbols & {r.symbol for r in self.kernel.outer}:
            parts.append(torch.zeros(self.shape[0], 1))
        full = torch.broadcast_tensors(*parts)
        at, what = full[0].reshape(-1), full[1].reshape(-1).to(store.dtype)
        if store.mask is not None:
            chosen = full[2].reshape(-1)
            at, what = at[chosen], what[chosen]
        self.check(store.buffer, at, target)
        match store.mode:
            case StoreMode.SET:
                _bytes(target)[at] = _bytes(what)
            case StoreMode.ADD:
                target.index_add_(0, at, what)
            case StoreMode.MAX:
                target.index_reduce_(0, at, what, "amax")
            case StoreMode.MIN:
                target.index_reduce_(0, at, what, "amin")
            case StoreMode.TOTAL:
                target[at] = 0
                target.index_add_(0, at, what)


def _bytes(x: Tensor) -> Tensor:
    """float8 and unsigned types cannot be indexed everywhere: go through integers of the same size."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def _take(source: Tensor, index: Tensor) -> Tensor:
    return _bytes(source)[index].view(source.dtype)


def _welford(op: str, points: list[Tensor]) -> tuple[Tensor, ...]:
    if op == "welford":
        x = points[0].double()
        mean = x.mean(1, keepdim=True) if x.shape[1] else torch.zeros(x.shape[0], 1, dtype=torch.float64)
        return mean, (x - mean).square().sum(1, keepdim=True), torch.full_like(mean, x.shape[1])
    means, m2, weight = (p.double() for p in points)
    total = weight.sum(1, keepdim=True)
    mean = torch.where(total == 0, 0.0, (means * weight).sum(1, keepdim=True) / total)
    return mean, (m2 + weight * (means - mean).square()).sum(1, keepdim=True), total


def _argument(op: str, value: Tensor, index: Tensor) -> Tensor:
    best = value.amax(1, keepdim=True) if op == "argmax" else value.amin(1, keepdim=True)
    equal = value == best
    if value.dtype.is_floating_point:
        equal = equal | (value.isnan() & best.isnan())
    return torch.where(equal, index, torch.iinfo(index.dtype).max).amin(1, keepdim=True)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Conversion as `Cast` means it; halves are rounded and then held in float32."""
    return x.to(dtype).to(compute_type(dtype))


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in [
            "neg",
            "abs",
            "sqrt",
            "rsqrt",
            "exp",
            "exp2",
            "expm1",
            "log",
            "log2",
            "log10",
            "log1p",
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "sinh",
            "cosh",
            "tanh",
            "asinh",
            "acosh",
            "atanh",
            "erf",
            "erfc",
            "erfinv",
            "lgamma",
            "digamma",
            "sigmoid",
            "relu",
            "floor",
            "ceil",
            "trunc",
            "round",
            "sign",
            "signbit",
            "reciprocal",
            "square",
            "logical_not",
            "bitwise_not",
            "isnan",
            "isinf",
            "i0",
        ]
    },
    **{
        name: getattr(torch.special, name)
        for name in ["i0e", "i1", "i1e", "ndtri", "log_ndtr", "bessel_j0", "bessel_j1"]
    },
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in [
            "add",
            "sub",
            "mul",
            "div",
            "fmod",
            "pow",
            "maximum",
            "minimum",
            "fmax",
            "fmin",
            "atan2",
            "hypot",
            "copysign",
            "nextafter",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "logical_and",
            "logical_or",
            "logical_xor",
            "bitwise_and",
            "bitwise_or",
            "bitwise_xor",
        ]
    },
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "mod": torch.remainder,
    "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift,
    "checked_index": lambda p, n: torch.where((p >= 0) & (p < n), p, torch.zeros_like(p)),
}


def call(op: str, args: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One pointwise function of `memplan.ir.loops.OPERATIONS` on tensors that broadcast."""
    if op == "where":
        return torch.where(args[0], args[1], args[2]).to(dtype)
    if op == "fma":
        return (args[0].double() * args[1].double() + args[2].double()).to(dtype)
    if op in ("rsqrt", "reciprocal") and dtype == torch.float32:
        return _UNARY[op](args[0].double()).to(dtype)
    return (_UNARY[op](args[0]) if len(args) == 1 else _BINARY[op](args[0], args[1])).to(dtype)


_WORD = 0xFFFFFFFF


def philox(seed: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Philox 2x32-10 with counter (offset low, offset high ^ seed high) and key seed low: two words in int64 tensors.

    After J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    seed, offset = torch.broadcast_tensors(seed.long(), offset.long())
    c0, c1 = offset & _WORD, ((offset >> 32) & _WORD) ^ ((seed >> 32) & _WORD)
    for k in range(10):
        high, low = _multiply(0xD256D193, c0)
        c0, c1 = high ^ c1 ^ ((seed + k * 0x9E3779B9) & _WORD), low
    return c0, c1


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 by 32 bit product, in signed 64-bit arithmetic."""
    low, high = x & 0xFFFF, x >> 16
    first, second = constant * low, constant * high  # each below 2**48
    total = first + ((second & 0xFFFF) << 16)
    return (second >> 16) + (total >> 32), total & _WORD


def _uniform(word: Tensor) -> Tensor:
    signed = torch.where(word >= 1 << 31, word - (1 << 32), word)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10


def random(node: Random, seed: Tensor, offset: Tensor) -> Tensor:
    """``rand``: word 0; ``randn``: Box-Muller of words 0 and 1, the cosine; ``randint64``: word 0 | word 1 << 32."""
    w0, w1 = philox(seed, offset)
    if node.kind == "rand":
        return _uniform(w0).to(compute_type(node.dtype))
    if node.kind == "randint64":
        return (w0 | (w1 << 32)).to(node.dtype)
    u = _uniform(w0).clamp(min=1.0e-7)
    return (torch.sqrt(-2.0 * torch.log(u)) * torch.cos(6.283185307179586 * _uniform(w1))).to(compute_type(node.dtype))
