"""The kernels that `cpu_kernels.py` measures: each as data and as a PyTorch function.

Buffers ``in0, in1, ...`` are the function's arguments, ``out0, ...`` its results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
import torch.nn.functional as F

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
    Store,
    outer_symbol,
    row_symbol,
    value_symbol,
)

f32, bf16, i64 = torch.float32, torch.bfloat16, torch.int64


@dataclass(frozen=True, slots=True)
class Case:
    """``function(*inputs())`` is what ``kernel`` computes."""

    name: str
    kernel: Kernel
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: Callable[[], list[torch.Tensor]]


class Build:
    """A kernel under construction; values are node numbers."""

    def __init__(self, outer: tuple[int, ...], row: tuple[int, ...] = ()) -> None:
        self.outer = tuple(Range(outer_symbol(k), n) for k, n in enumerate(outer))
        self.row = tuple(Range(row_symbol(k), n) for k, n in enumerate(row))
        self.nodes: list[Node] = []
        self.stores: list[Store] = []

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def load(self, buffer: str, index: sympy.Expr, dtype: torch.dtype = f32) -> int:
        return self.add(Load(buffer, sympy.sympify(index), dtype))

    def constant(self, value: float) -> int:
        return self.add(Constant(value, f32))

    def call(self, op: str, *args: int | float) -> int:
        nodes = tuple(a if isinstance(a, int) else self.constant(a) for a in args)
        return self.add(Call(op, nodes, f32))

    def reduce(self, op: str, *args: int) -> int:
        return self.add(Reduce(op, args, i64 if op.startswith("arg") else f32))  # type: ignore[arg-type]

    def item(self, node: int, item: int) -> int:
        return self.add(Item(node, item, f32))

    def store(self, buffer: str, index: sympy.Expr, value: int, dtype: torch.dtype = f32, **more: object) -> None:
        self.stores.append(Store(buffer, sympy.sympify(index), value, dtype, **more))  # type: ignore[arg-type]

    def kernel(self) -> Kernel:
        return Kernel(self.outer, self.row, tuple(self.nodes), tuple(self.stores))


x0, x1, x2, x3 = (outer_symbol(k) for k in range(4))
r0, r1 = row_symbol(0), row_symbol(1)


def randn(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def _gelu(b: Build, x: int) -> int:
    half = b.call("mul", x, 0.5)
    return b.call("mul", half, b.call("add", b.call("erf", b.call("mul", x, 0.7071067811865476)), 1.0))


def gelu(dtype: torch.dtype, rows: int, columns: int) -> Case:
    b = Build((rows, columns))
    at = columns * x0 + x1
    b.store("out0", at, _gelu(b, b.load("in0", at, dtype)), dtype)
    return Case(
        f"gelu {_name(dtype)} {rows}x{columns}", b.kernel(), F.gelu, lambda: [randn(rows, columns, dtype=dtype)]
    )


def bias_gelu_backward(rows: int, columns: int) -> Case:
    """d/dx gelu(x + bias) times the gradient."""
    b = Build((rows, columns))
    at = columns * x0 + x1
    x = b.call("add", b.load("in0", at), b.load("in1", x1))
    cdf = b.call("mul", b.call("add", b.call("erf", b.call("mul", x, 0.7071067811865476)), 1.0), 0.5)
    pdf = b.call("mul", b.call("exp", b.call("mul", b.call("mul", x, x), -0.5)), 0.3989422804014327)
    slope = b.call("add", cdf, b.call("mul", x, pdf))
    b.store("out0", at, b.call("mul", b.load("in2", at), slope))

    def function(x: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(grad, x + bias)

    name = f"bias + gelu backward {rows}x{columns}"
    return Case(name, b.kernel(), function, lambda: [randn(rows, columns), randn(columns), randn(rows, columns)])


def layer_norm(dtype: torch.dtype, rows: int, columns: int) -> Case:
    b = Build((rows,), (columns,))
    at = columns * x0 + r0
    x = b.load("in0", at, dtype)
    w = b.reduce("welford", x)
    mean, m2 = b.item(w, 0), b.item(w, 1)
    rstd = b.call("rsqrt", b.call("add", b.call("div", m2, float(columns)), 1e-5))
    normal = b.call("mul", b.call("sub", x, mean), rstd)
    y = b.call("add", b.call("mul", normal, b.load("in1", r0, dtype)), b.load("in2", r0, dtype))
    b.store("out0", at, y, dtype)
    b.store("out1", x0, mean)
    b.store("out2", x0, rstd)

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, mean, rstd = torch.ops.aten.native_layer_norm(x, (columns,), weight, bias, 1e-5)
        return y, mean.float(), rstd.float()

    name = f"layer norm {_name(dtype)} {rows}x{columns}"
    return Case(name, b.kernel(), function, lambda: [randn(s, dtype=dtype) for s in ()] + _norm(rows, columns, dtype))


def _norm(rows: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [randn(rows, columns, dtype=dtype), randn(columns, dtype=dtype), randn(columns, dtype=dtype)]


def layer_norm_backward(rows: int, columns: int) -> Case:
    """Gradient of the input, from x, weight, grad, mean, rstd."""
    b = Build((rows,), (columns,))
    at = columns * x0 + r0
    mean, rstd = b.load("in3", x0), b.load("in4", x0)
    normal = b.call("mul", b.call("sub", b.load("in0", at), mean), rstd)
    g = b.call("mul", b.load("in2", at), b.load("in1", r0))
    first = b.call("div", b.reduce("sum", g), float(columns))
    second = b.call("div", b.reduce("sum", b.call("mul", g, normal)), float(columns))
    inner = b.call("sub", b.call("sub", g, first), b.call("mul", normal, second))
    b.store("out0", at, b.call("mul", rstd, inner))

    def function(x, weight, grad, mean, rstd):  # type: ignore[no-untyped-def]
        normal = (x - mean) * rstd
        g = grad * weight
        return rstd * (g - g.mean(1, keepdim=True) - normal * (g * normal).mean(1, keepdim=True))

    def inputs() -> list[torch.Tensor]:
        return [randn(rows, columns), randn(columns), randn(rows, columns), randn(rows, 1), randn(rows, 1).abs()]

    return Case(f"layer norm backward, input {rows}x{columns}", b.kernel(), function, inputs)


def layer_norm_backward_weight(rows: int, columns: int) -> Case:
    b = Build((columns,), (rows,))
    at = columns * r0 + x0
    normal = b.call("mul", b.call("sub", b.load("in0", at), b.load("in2", r0)), b.load("in3", r0))
    g = b.load("in1", at)
    b.store("out0", x0, b.reduce("sum", b.call("mul", g, normal)))
    b.store("out1", x0, b.reduce("sum", g))

    def function(x, grad, mean, rstd):  # type: ignore[no-untyped-def]
        return (grad * ((x - mean) * rstd)).sum(0), grad.sum(0)

    def inputs() -> list[torch.Tensor]:
        return [randn(rows, columns), randn(rows, columns), randn(rows, 1), randn(rows, 1).abs()]

    return Case(f"layer norm backward, weight and bias {rows}x{columns}", b.kernel(), function, inputs)


def softmax(dtype: torch.dtype, rows: int, columns: int) -> Case:
    b = Build((rows,), (columns,))
    at = columns * x0 + r0
    x = b.load("in0", at, dtype)
    e = b.call("exp", b.call("sub", x, b.reduce("max", x)))
    b.store("out0", at, b.call("div", e, b.reduce("sum", e)), dtype)
    name = f"softmax {_name(dtype)} {rows}x{columns}"
    return Case(name, b.kernel(), lambda x: F.softmax(x, -1), lambda: [randn(rows, columns, dtype=dtype)])


def softmax_backward(rows: int, columns: int) -> Case:
    b = Build((rows,), (columns,))
    at = columns * x0 + r0
    p = b.call("mul", b.load("in0", at), b.load("in1", at))
    b.store("out0", at, b.call("sub", p, b.call("mul", b.load("in1", at), b.reduce("sum", p))))

    def function(grad: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._softmax_backward_data(grad, y, -1, f32)

    name = f"softmax backward {rows}x{columns}"
    return Case(name, b.kernel(), function, lambda: [randn(rows, columns), F.softmax(randn(rows, columns), -1)])


def cross_entropy(rows: int, columns: int) -> Case:
    b = Build((rows,), (columns,))
    x = b.load("in0", columns * x0 + r0)
    top = b.reduce("max", x)
    total = b.reduce("sum", b.call("exp", b.call("sub", x, top)))
    target = b.load("in1", x0, i64)
    own = b.load("in0", columns * x0 + value_symbol(target))
    b.store("out0", x0, b.call("sub", b.call("add", b.call("log", total), top), own))

    def function(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, target, reduction="none")

    def inputs() -> list[torch.Tensor]:
        return [randn(rows, columns), torch.randint(0, columns, (rows,))]

    return Case(f"cross entropy {rows}x{columns}", b.kernel(), function, inputs)


def cast(source: torch.dtype, target: torch.dtype, n: int) -> Case:
    b = Build((n,))
    b.store("out0", x0, b.add(Cast(b.load("in0", x0, source), target)), target)
    name = f"cast {_name(source)} to {_name(target)} {n}"
    return Case(name, b.kernel(), lambda x: x.to(target), lambda: [randn(n, dtype=source)])


def transpose(n: int) -> Case:
    b = Build((n, n))
    b.store("out0", n * x0 + x1, b.load("in0", n * x1 + x0))
    return Case(f"transpose {n}x{n}", b.kernel(), lambda x: x.t().contiguous(), lambda: [randn(n, n)])


def transpose_add(n: int) -> Case:
    b = Build((n, n))
    b.store("out0", n * x0 + x1, b.call("add", b.load("in0", n * x1 + x0), b.load("in1", n * x0 + x1)))
    return Case(f"x.T + y {n}x{n}", b.kernel(), lambda x, y: y + x.t(), lambda: [randn(n, n), randn(n, n)])


def heads(batch: int, length: int, heads: int, width: int) -> Case:
    """(batch, length, heads, width) to (batch, heads, length, width)."""
    b = Build((batch, heads, length, width))
    source = ((batch and length * x0 + x2) * heads + x1) * width + x3
    b.store("out0", ((heads * x0 + x1) * length + x2) * width + x3, b.load("in0", sympy.expand(source)))
    name = f"heads to front {batch}x{length}x{heads}x{width}"
    return Case(
        name, b.kernel(), lambda x: x.permute(0, 2, 1, 3).contiguous(), lambda: [randn(batch, length, heads, width)]
    )


def channels_last(batch: int, channels: int, side: int) -> Case:
    """NCHW to NHWC memory."""
    area = side * side
    b = Build((batch, area, channels))
    b.store("out0", (x0 * area + x1) * channels + x2, b.load("in0", (x0 * channels + x2) * area + x1))
    name = f"to channels last {batch}x{channels}x{side}x{side}"

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    return Case(name, b.kernel(), function, lambda: [randn(batch, channels, side, side)])


def column_sum(rows: int, columns: int) -> Case:
    b = Build((columns,), (rows,))
    b.store("out0", x0, b.reduce("sum", b.load("in0", columns * r0 + x0)))
    return Case(f"column sum {rows}x{columns}", b.kernel(), lambda x: x.sum(0), lambda: [randn(rows, columns)])


def total_sum(n: int) -> Case:
    b = Build((), (n,))
    b.store("out0", sympy.Integer(0), b.reduce("sum", b.load("in0", r0)))
    return Case(f"sum of all {n}", b.kernel(), lambda x: x.sum(), lambda: [randn(n)])


def row_maximum(rows: int, columns: int) -> Case:
    b = Build((rows,), (columns,))
    x = b.load("in0", columns * x0 + r0)
    b.store("out0", x0, b.reduce("argmax", x, b.add(Index(r0))), i64)
    return Case(f"argmax {rows}x{columns}", b.kernel(), lambda x: x.argmax(1), lambda: [randn(rows, columns)])


def batch_norm(batch: int, channels: int, side: int, last: bool) -> Case:
    """Mean and variance of every channel."""
    area = side * side
    b = Build((channels,), (batch, area))
    at = (r0 * area + r1) * channels + x0 if last else (r0 * channels + x0) * area + r1
    w = b.reduce("welford", b.load("in0", sympy.expand(at)))
    b.store("out0", x0, b.item(w, 0))
    b.store("out1", x0, b.call("div", b.item(w, 1), float(batch * area)))

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, var

    def inputs() -> list[torch.Tensor]:
        layout = torch.channels_last if last else torch.contiguous_format
        return [randn(batch, channels, side, side).contiguous(memory_format=layout)]

    name = f"batch norm statistics {batch}x{channels}x{side}x{side}{' channels last' if last else ''}"
    return Case(name, b.kernel(), function, inputs)


def adam(n: int) -> Case:
    b = Build((n,))
    p, g, m, v = (b.load(f"in{k}", x0) for k in range(4))
    m = b.call("add", b.call("mul", m, 0.9), b.call("mul", g, 0.1))
    v = b.call("add", b.call("mul", v, 0.999), b.call("mul", b.call("mul", g, g), 0.001))
    step = b.call("div", b.call("mul", m, 0.01), b.call("add", b.call("sqrt", v), 1e-8))
    for k, value in enumerate((b.call("sub", p, step), m, v)):
        b.store(f"out{k}", x0, value)

    def function(p, g, m, v):  # type: ignore[no-untyped-def]
        m = m * 0.9 + g * 0.1
        v = v * 0.999 + g * g * 0.001
        return p - m * 0.01 / (v.sqrt() + 1e-8), m, v

    return Case(f"adam {n}", b.kernel(), function, lambda: [randn(n), randn(n), randn(n), randn(n).abs()])


def embedding(rows: int, columns: int, vocabulary: int) -> Case:
    b = Build((rows, columns))
    at = b.load("in1", x0, i64)
    b.store("out0", columns * x0 + x1, b.load("in0", columns * value_symbol(at) + x1))

    def inputs() -> list[torch.Tensor]:
        return [randn(vocabulary, columns), torch.randint(0, vocabulary, (rows,))]

    name = f"embedding {rows}x{columns}"
    return Case(name, b.kernel(), lambda w, i: F.embedding(i, w), inputs)


def dropout(n: int) -> Case:
    """Random numbers made in the kernel; nothing is kept, so that the answers can be compared."""
    b = Build((n,))
    seed = b.add(Constant(1234, i64))
    uniform = b.add(Random("rand", seed, b.add(Index(x0)), f32))
    keep = b.add(Call("gt", (uniform, b.constant(2.0)), torch.bool))
    b.store("out0", x0, b.add(Call("where", (keep, b.load("in0", x0), b.constant(0.0)), f32)))
    return Case(f"dropout {n}", b.kernel(), lambda x: F.dropout(x, 1.0 - 1e-12), lambda: [randn(n)])


def _name(dtype: torch.dtype) -> str:
    return {f32: "float32", bf16: "bfloat16"}[dtype]


CASES = (
    gelu(f32, 2048, 3072),
    gelu(bf16, 2048, 3072),
    bias_gelu_backward(2048, 3072),
    layer_norm(f32, 4096, 768),
    layer_norm(bf16, 4096, 768),
    layer_norm_backward(4096, 768),
    layer_norm_backward_weight(4096, 768),
    softmax(f32, 4096, 1024),
    softmax(bf16, 4096, 1024),
    softmax(f32, 32768, 49),
    softmax_backward(4096, 1024),
    cross_entropy(256, 50257),
    cast(f32, bf16, 4194304),
    cast(bf16, f32, 4194304),
    transpose(2048),
    transpose_add(2048),
    heads(8, 256, 12, 64),
    channels_last(16, 64, 56),
    column_sum(8192, 768),
    column_sum(65536, 32),
    total_sum(8388608),
    row_maximum(4096, 1024),
    batch_norm(16, 64, 56, False),
    batch_norm(16, 64, 56, True),
    batch_norm(64, 256, 7, False),
    adam(4194304),
    embedding(8192, 768, 50257),
    dropout(4194304),
)
