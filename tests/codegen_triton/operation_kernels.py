"""Kernels that hold every pointwise function and every reduction once for each kind of number, and their inputs."""

from __future__ import annotations

import torch
from sample_kernels import BF16, BOOL, F16, F32, I64, Builder, R, X

from memplan.ir.loops import CHECKED_INDEX, OPERATIONS, Kernel

Buffers = dict[str, torch.Tensor]
Case = tuple[str, Kernel, Buffers]

F64, I32, I8, U8 = torch.float64, torch.int32, torch.int8, torch.uint8

#: without a Triton form: `test_operations` holds that they are refused
REFUSED = frozenset(["i0e", "i1e"])
_TO_BOOL = frozenset(
    [
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_and",
        "logical_or",
        "logical_xor",
        "logical_not",
        "isnan",
        "isinf",
        "signbit",
    ]
)
_FLOATS_ONLY = frozenset(
    [
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
        "reciprocal",
        "isnan",
        "isinf",
        "i0",
        "i1",
        "ndtri",
        "log_ndtr",
        "bessel_j0",
        "bessel_j1",
        "div",
        "fmax",
        "fmin",
        "atan2",
        "hypot",
        "copysign",
        "nextafter",
        "round",
        "trunc",
        "floor",
        "ceil",
        "fma",
    ]
)
_INTEGERS_ONLY = frozenset(["bitwise_not", "bitwise_and", "bitwise_or", "bitwise_xor", "shl", "shr"])
_BOOLS = frozenset(
    [
        "add",
        "mul",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_and",
        "logical_or",
        "logical_xor",
        "logical_not",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "bitwise_not",
        "maximum",
        "minimum",
        "where",
    ]
)
#: relative and absolute error where float32's own is not reached (libdevice's documented bounds, series)
_LOOSE = {"lgamma": 1e-4, "digamma": 1e-4, "i0": 2e-5, "i1": 2e-5, "bessel_j0": 2e-5, "bessel_j1": 2e-5, "ndtri": 1e-4,
          "erfinv": 1e-5, "log_ndtr": 1e-5, "pow": 1e-5, "tan": 1e-5, "sinh": 1e-5, "cosh": 1e-5}  # fmt: skip


def tolerance(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Arguments of `assert_close` for a result of a kernel called ``name``."""
    if not dtype.is_floating_point:
        return {"rtol": 0.0, "atol": 0.0}
    op = name.split(" ")[-1]
    if dtype in (F32, F64) and op in _LOOSE:
        return {"rtol": _LOOSE[op], "atol": _LOOSE[op]}
    return {
        F32: {"rtol": 2e-6, "atol": 1e-5},
        F64: {"rtol": 1e-7, "atol": 1e-7},
        BF16: {"rtol": 1.6e-2, "atol": 1e-5},
    }.get(dtype, {"rtol": 1e-3, "atol": 1e-5})


def operations(dtype: torch.dtype) -> list[str]:
    """The functions that a type has."""
    if dtype == BOOL:
        return sorted(_BOOLS)
    if dtype.is_floating_point:
        # the neighbour of a half type's number is another in float32, where it is computed
        without = {CHECKED_INDEX} | REFUSED | _INTEGERS_ONLY | ({"nextafter"} if dtype.itemsize < 4 else set())
        return [op for op in OPERATIONS if op not in without]
    floats = {CHECKED_INDEX} | _FLOATS_ONLY | {"i0e", "i1e"}
    return [
        op for op in OPERATIONS if op not in floats and not (dtype == U8 and op in ("neg", "abs", "sign", "signbit"))
    ]


def _domain(op: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands that are inside of a function's domain, or specials where it takes all."""
    g = torch.Generator().manual_seed(len(op))
    a, b = torch.randn(n, generator=g, dtype=F64) * 3, torch.randn(n, generator=g, dtype=F64) * 2
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 2.5, float("inf"), float("-inf"), float("nan")], dtype=F64)
    match op:
        case "asin" | "acos" | "atanh" | "erfinv":
            a = torch.rand(n, generator=g, dtype=F64) * 1.9 - 0.95
        case "ndtri":
            a = torch.rand(n, generator=g, dtype=F64) * 0.9 + 0.05
        case "sqrt" | "rsqrt" | "log" | "log2" | "log10" | "lgamma" | "digamma" | "pow":
            a = a.abs() + 0.01
        case "log1p":
            a = a.abs() * 0.01
        case "acosh":
            a = a.abs() + 1.01
        case "floordiv" | "mod" | "fmod" | "truncdiv" | "div":
            b = torch.where(b.abs() < 0.1, 0.7, b)
        case "tan" | "digamma" | "log_ndtr":
            a = a / 3
        case "i0" | "i1":
            a = a / 3
            a[: len(special)] = special
        case _:
            a[: len(special)] = special
            b[5 : 5 + len(special)] = special
    return a, b


def _operands(op: str, dtype: torch.dtype, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    if dtype.is_floating_point:
        a, b = _domain(op, n)
        return a.to(dtype), b.to(dtype)
    g = torch.Generator().manual_seed(len(op))
    if dtype == BOOL:
        return torch.rand(n, generator=g) > 0.5, torch.rand(n, generator=g) > 0.5
    low = 0 if dtype == U8 else -60
    a, b = torch.randint(low, 60, (n,), generator=g), torch.randint(low, 60, (n,), generator=g)
    if op in ("floordiv", "truncdiv", "mod", "fmod"):
        b = torch.where(b == 0, 7, b)
    if op in ("shl", "shr", "pow"):
        b = b.abs() % 7
    return a.to(dtype), b.to(dtype)


def operation(op: str, dtype: torch.dtype, n: int = 100) -> Case:
    """``out = op(a, b, c)``; the third operand of ``fma`` and ``where`` is ``b`` or ``a`` again."""
    k = Builder((n,))
    a, b = _operands(op, dtype, n)
    result = BOOL if op in _TO_BOOL else dtype
    x = k.load("a", X[0], dtype)
    buffers: Buffers = {"a": a}
    if OPERATIONS[op] == 1:
        value = k.call(op, x, dtype=result)
    else:
        buffers["b"] = b
        y = k.load("b", X[0], dtype)
        if op == "where":
            value = k.call(op, k.call("lt", x, y, dtype=BOOL), x, y, dtype=result)
        elif op == "fma":
            value = k.call(op, x, y, x, dtype=result)
        else:
            value = k.call(op, x, y, dtype=result)
    k.store("out", X[0], value, result)
    buffers["out"] = torch.zeros(n, dtype=result)
    return f"{str(dtype).removeprefix('torch.')} {op}", k.done(), buffers


KINDS = (F32, BF16, F64, I32, I64, I8, U8, BOOL)


def operation_cases(dtype: torch.dtype) -> list[Case]:
    return [operation(op, dtype) for op in operations(dtype)]


def reduction(op: str, dtype: torch.dtype, rows: int, columns: int, *, transposed: bool = False) -> Case:
    """One reduction of a matrix along its rows (or along its columns)."""
    k = Builder((rows,), (columns,))
    at = R[0] * rows + X[0] if transposed else X[0] * columns + R[0]
    g = torch.Generator().manual_seed(rows + columns)
    data = torch.randn(rows * columns, generator=g) * 2
    if op in ("prod",):
        data = 1 + data * 0.01 if dtype.is_floating_point else data.sign()
    if op in ("max", "min", "argmax", "argmin") and dtype.is_floating_point:
        data = data.round()  # ties
        data[3] = float("nan")
    if dtype == BOOL:
        data = (data > -1).float()
    buffers: Buffers = {"a": data.round().to(dtype) if not dtype.is_floating_point else data.to(dtype)}
    value = k.load("a", at, dtype)
    accumulator = F32 if dtype in (F16, BF16) else dtype
    match op:
        case "argmax" | "argmin":
            results = [(k.reduce(op, value, k.index(R[0]), dtype=I64), I64)]
        case "welford":
            w = k.reduce(op, k.cast(value, accumulator), dtype=accumulator)
            results = [(k.item(w, i, accumulator), accumulator) for i in range(3)]
        case "welford_combine":
            weight = k.cast(k.call("add", k.index(R[0]), k.const(1, I64)), accumulator)
            w = k.reduce(op, value, k.call("square", value), weight, dtype=accumulator)
            results = [(k.item(w, i, accumulator), accumulator) for i in range(3)]
        case "any" | "all":
            results = [(k.reduce(op, k.cast(value, BOOL), dtype=BOOL), BOOL)]
        case _:
            kind = I64 if dtype == BOOL else accumulator
            results = [(k.reduce(op, k.cast(value, kind), dtype=kind), kind)]
    for i, (node, kind) in enumerate(results):
        k.store(f"out{i}", X[0], node, kind)
        buffers[f"out{i}"] = torch.zeros(rows, dtype=kind)
    where = "columns" if transposed else "rows"
    return f"{str(dtype).removeprefix('torch.')} {rows}x{columns} {where} {op}", k.done(), buffers


REDUCTIONS: tuple[tuple[str, tuple[torch.dtype, ...]], ...] = (
    ("sum", (F32, BF16, F64, I64, I32, BOOL)),
    ("prod", (F32, I64)),
    ("max", (F32, F16, I64, U8)),
    ("min", (F32, I32)),
    ("any", (BOOL, F32)),
    ("all", (BOOL,)),
    ("argmax", (F32, BF16, I64)),
    ("argmin", (F32, I32)),
    ("welford", (F32, F64)),
    ("welford_combine", (F32,)),
)


def reduction_cases(rows: int, columns: int, *, transposed: bool = False) -> list[Case]:
    return [reduction(op, dtype, rows, columns, transposed=transposed) for op, dtypes in REDUCTIONS for dtype in dtypes]


def cases() -> list[Case]:
    """All of them, at sizes for a GPU: persistent, looped and along columns."""
    found = [case for dtype in (F32, BF16, I32, I64, BOOL) for case in operation_cases(dtype)]
    found += reduction_cases(7, 300)
    found += reduction_cases(3, 40_000)
    return found + reduction_cases(70, 500, transposed=True)
