"""Kernels as fusion makes them, for the tests and measurements of every emitter, with the sizes as parameters."""

from __future__ import annotations

import sympy
import torch

from memplan.ir.index import FloorDiv
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
    Range,
    Reduce,
    Scalar,
    Size,
    Store,
    StoreMode,
    outer_symbol,
    row_symbol,
    value_symbol,
)

F32, F16, BF16, I64, BOOL = torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool
X = tuple(outer_symbol(k) for k in range(4))
R = tuple(row_symbol(k) for k in range(3))


class Builder:
    """A kernel written down node by node; every method gives the position of its node."""

    def __init__(self, outer: tuple[Size, ...], row: tuple[Size, ...] = ()) -> None:
        self.outer = tuple(Range(X[k], n) for k, n in enumerate(outer))
        self.row = tuple(Range(R[k], n) for k, n in enumerate(row))
        self.nodes: list[Node] = []
        self.stores: list[Store] = []

    def add(self, node: Node) -> int:
        if node in self.nodes:
            return self.nodes.index(node)
        self.nodes.append(node)
        return len(self.nodes) - 1

    def load(
        self, buffer: str, index: sympy.Expr | int, dtype: torch.dtype = F32, mask: int | None = None, other: Scalar = 0
    ) -> int:
        return self.add(Load(buffer, sympy.sympify(index), dtype, mask, other))

    def call(self, op: str, *args: int, dtype: torch.dtype | None = None) -> int:
        return self.add(Call(op, args, dtype or self.nodes[args[-1]].dtype))

    def const(self, value: Scalar, dtype: torch.dtype = F32) -> int:
        return self.add(Constant(value, dtype))

    def cast(self, arg: int, dtype: torch.dtype) -> int:
        return self.add(Cast(arg, dtype))

    def index(self, expr: sympy.Expr | int, dtype: torch.dtype = I64) -> int:
        return self.add(Index(sympy.sympify(expr), dtype))

    def reduce(self, op: str, *args: int, dtype: torch.dtype = F32) -> int:
        return self.add(Reduce(op, args, dtype))  # type: ignore[arg-type]

    def item(self, arg: int, item: int, dtype: torch.dtype = F32) -> int:
        return self.add(Item(arg, item, dtype))

    def random(self, kind: str, seed: int, offset: int, dtype: torch.dtype = F32) -> int:
        return self.add(Random(kind, seed, offset, dtype))  # type: ignore[arg-type]

    def store(
        self,
        buffer: str,
        index: sympy.Expr | int,
        value: int,
        dtype: torch.dtype = F32,
        mode: StoreMode = StoreMode.SET,
        mask: int | None = None,
    ) -> None:
        self.stores.append(Store(buffer, sympy.sympify(index), value, dtype, mode, mask))

    def done(self) -> Kernel:
        return Kernel(self.outer, self.row, tuple(self.nodes), tuple(self.stores))


def bias_gelu(rows: Size, columns: Size, dtype: torch.dtype = BF16) -> Kernel:
    """out = gelu(a + bias), over rows and columns."""
    k = Builder((rows, columns))
    x = k.call("add", k.load("a", X[0] * columns + X[1], dtype), k.load("bias", X[1], dtype))
    erf = k.call("erf", k.call("mul", x, k.const(0.7071067811865476, dtype)))
    out = k.call("mul", k.call("mul", x, k.const(0.5, dtype)), k.call("add", erf, k.const(1.0, dtype)))
    k.store("out", X[0] * columns + X[1], out, dtype)
    return k.done()


def add_relu(n: Size, dtype: torch.dtype = BF16) -> Kernel:
    k = Builder((n,))
    k.store("out", X[0], k.call("relu", k.call("add", k.load("a", X[0], dtype), k.load("b", X[0], dtype))), dtype)
    return k.done()


def transpose(rows: Size, columns: Size, dtype: torch.dtype = F32, batch: Size = 1) -> Kernel:
    """out[b, j, i] = 2 * a[b, i, j]; the loops run in the order of the output."""
    k = Builder((batch, columns, rows))
    value = k.load("a", X[0] * rows * columns + X[2] * columns + X[1], dtype)
    k.store("out", X[0] * rows * columns + X[1] * rows + X[2], k.call("mul", value, k.const(2.0, dtype)), dtype)
    return k.done()


def layer_norm(rows: Size, columns: Size, dtype: torch.dtype = BF16, *, residual: bool = False) -> Kernel:
    """Layer norm with weight and bias, mean and rstd kept; with ``residual``, of a + b, which is stored too."""
    k = Builder((rows,), (columns,))
    at = X[0] * columns + R[0]
    x = k.cast(k.load("a", at, dtype), F32)
    if residual:
        x = k.call("add", x, k.cast(k.load("b", at, dtype), F32))
        k.store("sum", at, x, dtype)
    w = k.reduce("welford", x)
    variance = k.call("div", k.item(w, 1), k.item(w, 2))
    rstd = k.call("rsqrt", k.call("add", variance, k.const(1e-5)))
    y = k.call("mul", k.call("sub", x, k.item(w, 0)), rstd)
    y = k.call("mul", y, k.cast(k.load("weight", R[0], dtype), F32))
    y = k.call("add", y, k.cast(k.load("bias", R[0], dtype), F32))
    k.store("out", at, y, dtype)
    k.store("mean", X[0], k.item(w, 0))
    k.store("rstd", X[0], rstd)
    return k.done()


def layer_norm_backward(rows: Size, columns: Size, dtype: torch.dtype = BF16, *, together: int = 0) -> Kernel:
    """Gradient of the input: rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)).

    ``together``: and partial sums of the gradients of weight and bias, over so many rows each.
    """
    k = Builder((rows,), (columns,))
    at = X[0] * columns + R[0]
    dy = k.cast(k.load("dy", at, dtype), F32)
    wdy = k.call("mul", dy, k.cast(k.load("weight", R[0], dtype), F32))
    x = k.cast(k.load("x", at, dtype), F32)
    xhat = k.call("mul", k.call("sub", x, k.load("mean", X[0])), k.load("rstd", X[0]))
    n = k.cast(k.index(columns), F32)
    first = k.call("div", k.reduce("sum", wdy), n)
    second = k.call("div", k.reduce("sum", k.call("mul", wdy, xhat)), n)
    out = k.call("sub", k.call("sub", wdy, first), k.call("mul", xhat, second))
    k.store("dx", at, k.call("mul", out, k.load("rstd", X[0])), dtype)
    if together:
        place = FloorDiv(X[0], together) * columns + R[0]
        k.store("dweight", place, k.call("mul", dy, xhat), mode=StoreMode.TOTAL)
        k.store("dbias", place, dy, mode=StoreMode.TOTAL)
    return k.done()


def softmax(rows: Size, columns: Size, dtype: torch.dtype = BF16) -> Kernel:
    k = Builder((rows,), (columns,))
    at = X[0] * columns + R[0]
    x = k.cast(k.load("a", at, dtype), F32)
    e = k.call("exp", k.call("sub", x, k.reduce("max", x)))
    k.store("out", at, k.call("div", e, k.reduce("sum", e)), dtype)
    return k.done()


def cross_entropy(rows: Size, classes: Size, dtype: torch.dtype = BF16) -> Kernel:
    """loss[i] = logsumexp(a[i, :]) - a[i, target[i]], and the logsumexp for the backward."""
    k = Builder((rows,), (classes,))
    x = k.cast(k.load("a", X[0] * classes + R[0], dtype), F32)
    top = k.reduce("max", x)
    total = k.reduce("sum", k.call("exp", k.call("sub", x, top)))
    lse = k.call("add", k.call("log", total), top)
    target = k.load("target", X[0], I64)
    chosen = k.cast(k.load("a", X[0] * classes + value_symbol(target), dtype), F32)
    k.store("loss", X[0], k.call("sub", lse, chosen))
    k.store("lse", X[0], lse)
    return k.done()


def column_sum(rows: Size, columns: Size, dtype: torch.dtype = BF16) -> Kernel:
    """out[j] = sum over i of a[i, j]: a bias's gradient."""
    k = Builder((columns,), (rows,))
    k.store("out", X[0], k.reduce("sum", k.cast(k.load("a", R[0] * columns + X[0], dtype), F32)), dtype)
    return k.done()


def total_sum(rows: Size, columns: Size, dtype: torch.dtype = F32) -> Kernel:
    k = Builder((), (rows, columns))
    k.store("out", 0, k.reduce("sum", k.load("a", R[0] * columns + R[1], dtype)), F32)
    return k.done()


def batch_norm_statistics(batch: Size, channels: Size, pixels: Size, dtype: torch.dtype = F32) -> Kernel:
    """Mean and variance of every channel of an NCHW tensor, and the running mean changed in place."""
    k = Builder((channels,), (batch, pixels))
    w = k.reduce("welford", k.cast(k.load("a", R[0] * channels * pixels + X[0] * pixels + R[1], dtype), F32))
    k.store("mean", X[0], k.item(w, 0))
    k.store("variance", X[0], k.call("div", k.item(w, 1), k.item(w, 2)))
    old = k.call("mul", k.load("running", X[0]), k.const(0.9))
    k.store("running", X[0], k.call("add", old, k.call("mul", k.item(w, 0), k.const(0.1))))
    return k.done()


def embedding(tokens: Size, width: Size, vocabulary: int, dtype: torch.dtype = BF16) -> Kernel:
    """out[i, j] = table[wrap(ids[i]), j] + position[i, j]."""
    k = Builder((tokens, width))
    ids = k.load("ids", X[0], I64)
    wrapped = k.call("add", ids, k.const(vocabulary, I64))
    row = k.call("where", k.call("lt", ids, k.const(0, I64), dtype=BOOL), wrapped, ids)
    value = k.load("table", value_symbol(row) * width + X[1], dtype)
    at = X[0] * width + X[1]
    k.store("out", at, k.call("add", value, k.load("position", at, dtype)), dtype)
    return k.done()


def embedding_backward(tokens: Size, width: Size, dtype: torch.dtype = F32) -> Kernel:
    """grad[ids[i], j] += dy[i, j], atomically."""
    k = Builder((tokens, width))
    ids = k.load("ids", X[0], I64)
    k.store("grad", value_symbol(ids) * width + X[1], k.load("dy", X[0] * width + X[1], dtype), dtype, StoreMode.ADD)
    return k.done()


def dropout(n: Size, dtype: torch.dtype = BF16, p: float = 0.25) -> Kernel:
    k = Builder((n,))
    drawn = k.random("rand", k.load("seed", 0, I64), k.index(X[0]))
    keep = k.call("gt", drawn, k.const(p), dtype=BOOL)
    scaled = k.call("mul", k.load("a", X[0], dtype), k.const(1 / (1 - p), dtype))
    k.store("out", X[0], k.call("where", keep, scaled, k.const(0.0, dtype)), dtype)
    k.store("mask", X[0], keep, BOOL)
    return k.done()


def concatenate(rows: Size, left: int, right: int, dtype: torch.dtype = F32) -> Kernel:
    """out = cat([a, b], dim=1), by masked loads."""
    k = Builder((rows, left + right))
    inside = k.call("lt", k.index(X[1]), k.const(left, I64), dtype=BOOL)
    outside = k.call("logical_not", inside)
    a = k.load("a", X[0] * left + X[1], dtype, inside)
    b = k.load("b", X[0] * right + X[1] - left, dtype, outside)
    k.store("out", X[0] * (left + right) + X[1], k.call("where", inside, a, b), dtype)
    return k.done()


def argmax(rows: Size, columns: Size, dtype: torch.dtype = F32, op: str = "argmax") -> Kernel:
    k = Builder((rows,), (columns,))
    value = k.load("a", X[0] * columns + R[0], dtype)
    k.store("out", X[0], k.reduce(op, value, k.index(R[0]), dtype=I64), I64)
    return k.done()
