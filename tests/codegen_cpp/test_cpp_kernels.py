"""CPU kernels one property at a time: forms, special values, dynamic and empty sizes, atomics, threads, in place."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from cpp_running import compare, run_cpp
from reference_kernel import run_reference
from sample_kernels import layer_norm

from memplan.codegen.cpp_kernel import emit_cpp, safe_in_place
from memplan.codegen.cpp_schedule import Form, Threads, plan_loops
from memplan.ir.canonical import canonicalize
from memplan.ir.errors import UnsupportedError
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
    Range,
    Reduce,
    Size,
    Store,
    StoreMode,
    outer_symbol,
    row_symbol,
    value_symbol,
)

x0, x1, x2 = (outer_symbol(k) for k in range(3))
r0, r1 = row_symbol(0), row_symbol(1)
f32 = torch.float32
S0, S1 = sympy.symbols("s0 s1", integer=True, positive=True)


def row_kernel(rows: Size, columns: Size, *nodes: Node, point: int | None = None, once: int | None = None) -> Kernel:
    """Node 0 is the load of ``a``; ``point`` is stored to ``o`` at every point, ``once`` to ``m`` once a row."""
    at = sympy.sympify(columns) * x0 + r0
    stores = () if point is None else (Store("o", at, point, f32),)
    stores += () if once is None else (Store("m", x0, once, f32),)
    return Kernel((Range(x0, rows),), (Range(r0, columns),), (Load("a", at, f32), *nodes), stores)


def softmax(rows: Size, columns: Size) -> Kernel:
    nodes = (Reduce("max", (0,), f32), Call("sub", (0, 1), f32), Call("exp", (2,), f32))
    return row_kernel(rows, columns, *nodes, Reduce("sum", (3,), f32), Call("div", (3, 4), f32), point=5)


@pytest.mark.parametrize("columns", [1, 3, 49, 1000])
def test_softmax(columns: int) -> None:
    compare(softmax(20, columns), {"a": torch.randn(20 * columns), "o": torch.empty(20 * columns).fill_(-1)})


def test_dynamic_sizes_are_right_for_all_values() -> None:
    kernel = softmax(S0, S1)
    for rows, columns in ((1, 1), (3, 7), (40, 1111), (2, 70000)):
        buffers = {"a": torch.randn(rows * columns), "o": torch.zeros(rows * columns)}
        expected = torch.softmax(buffers["a"].view(rows, columns), 1).flatten()
        run_cpp(kernel, buffers, {S0: rows, S1: columns}, planned={S0: 64, S1: 512})
        torch.testing.assert_close(buffers["o"], expected)


@pytest.mark.parametrize("few", [False, True])
def test_dynamic_sums_of_columns_and_of_everything(few: bool) -> None:
    columns = Kernel((Range(x0, S1),), (Range(r0, S0),), (Load("a", S1 * r0 + x0, f32), Reduce("sum", (0,), f32)),
                     (Store("o", x0, 1, f32),))  # fmt: skip
    hint = {S0: 100000, S1: 8} if few else {S0: 300, S1: 5000}
    for rows, width in ((1, 1), (1000, 33), (9999, 70)):
        a = torch.randn(rows * width)
        out = torch.zeros(width)
        run_cpp(columns, {"a": a, "o": out}, {S0: rows, S1: width}, planned=hint)
        torch.testing.assert_close(out, a.view(rows, width).sum(0), rtol=1e-4, atol=1e-3)


def test_empty_sizes_run_nothing_and_empty_rows_give_the_neutral_value() -> None:
    kernel = row_kernel(S0, S1, Reduce("sum", (0,), f32), once=1)
    out = torch.full((4,), 7.0)
    run_cpp(kernel, {"a": torch.zeros(0), "m": out}, {S0: 0, S1: 5}, planned={S0: 4, S1: 5})
    assert out.tolist() == [7.0] * 4
    run_cpp(kernel, {"a": torch.zeros(0), "m": out}, {S0: 4, S1: 0}, planned={S0: 4, S1: 5})
    assert out.tolist() == [0.0] * 4
    static = row_kernel(0, 5, Reduce("sum", (0,), f32), once=1)
    assert emit_cpp(canonicalize(static), name="k", hints={}).endswith("{\n}\n")


@pytest.mark.parametrize("op", ["max", "min", "argmax", "argmin", "sum"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_special_values_in_reductions(op: str, layout: str) -> None:
    columns = 70
    a = torch.randn(6, columns)
    a[0, 33], a[1, 3], a[1, 60], a[2, 5], a[2, 40] = math.nan, math.inf, math.inf, -math.inf, -math.inf
    a[3, :] = math.nan
    a[4, :] = -math.inf
    a[5, 20:] = a[5, :].max() + 1
    held = torch.int64 if op.startswith("arg") else f32
    at = columns * x0 + r0 if layout == "rows" else 6 * r0 + x0
    operands = (0, 1) if held is torch.int64 else (0,)
    nodes = (Load("a", at, f32), Index(r0), Reduce(op, operands, held))  # type: ignore[arg-type]
    kernel = Kernel((Range(x0, 6),), (Range(r0, columns),), nodes, (Store("o", x0, 2, held),))
    source = a if layout == "rows" else a.t().contiguous()
    out = torch.zeros(6, dtype=held)
    run_cpp(kernel, {"a": source.flatten(), "o": out})
    function = {"max": torch.amax, "min": torch.amin}.get(op) or getattr(torch, op)
    torch.testing.assert_close(out, function(a, 1), equal_nan=True)


@pytest.mark.parametrize("op", ["all", "any"])
@pytest.mark.parametrize("columns", [70, 0])
def test_whether_all_or_any_hold(op: str, columns: int) -> None:
    """As integers in the loops, so that g++ vectorises them; an empty row has all and none."""
    a = torch.randn(5, columns)
    if columns:
        a[0], a[1], a[2, 40], a[3, 69] = 1.0, -1.0, -50.0, 50.0
        a[2, :40], a[2, 41:], a[3, :69] = 1.0, 1.0, -1.0
    nodes = (Load("a", S1 * x0 + r0, f32), Constant(0.0, f32), Call("gt", (0, 1), torch.bool))
    nodes += (Reduce(op, (2,), torch.bool),)  # type: ignore[arg-type]
    kernel = Kernel((Range(x0, 5),), (Range(r0, S1),), nodes, (Store("o", x0, 3, torch.bool),))
    out = torch.zeros(5, dtype=torch.bool)
    run_cpp(kernel, {"a": a.flatten(), "o": out}, {S1: columns}, planned={S1: 70})
    assert torch.equal(out, getattr(torch, op)(a > 0, 1))
    assert "bool a" not in emit_cpp(canonicalize(kernel), name="k", hints={S1: 70})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32, torch.uint8, torch.bfloat16, torch.float16])
def test_transposes_of_every_item_size(dtype: torch.dtype) -> None:
    held = torch.float32 if dtype.itemsize == 2 else dtype
    load: tuple[Node, ...] = (Load("a", 45 * x1 + x0, dtype), Load("b", 70 * x0 + x1, dtype))
    load += (Call("add", (0, 1), dtype),)
    kernel = Kernel((Range(x0, 45), Range(x1, 70)), (), load, (Store("o", 70 * x0 + x1, 2, dtype),))
    assert plan_loops(kernel, {}).tiles is not None
    a, b = (torch.randint(0, 100, (3150,)).to(dtype) for _ in range(2))
    out = torch.zeros(3150, dtype=dtype)
    run_cpp(kernel, {"a": a, "b": b, "o": out})
    want = a.view(70, 45).t().to(held) + b.view(45, 70).to(held)
    torch.testing.assert_close(out, want.to(dtype).flatten())


def test_loads_through_reshapes_need_no_division_in_the_loop() -> None:
    flat = 768 * x0 + x1
    source = 64 * 12 * FloorDiv(flat, 768) + 64 * Mod(FloorDiv(flat, 64), 12) + Mod(flat, 64)
    permuted = 64 * Mod(x0, 128) + 64 * 128 * FloorDiv(x1, 64) + Mod(x1, 64) + 64 * 128 * 12 * FloorDiv(x0, 128)
    kernel = Kernel((Range(x0, 256), Range(x1, 768)), (), (Load("a", source, f32), Load("b", permuted, f32),
                    Call("add", (0, 1), f32)), (Store("o", flat, 2, f32),))  # fmt: skip
    text = emit_cpp(canonicalize(kernel), name="k", hints={})
    body = text[text.index("#pragma omp simd") :]
    assert not {"/", "%"} & set(body), text
    compare(kernel, {"a": torch.randn(256 * 768), "b": torch.randn(256 * 768), "o": torch.zeros(256 * 768)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_atomic_additions(dtype: torch.dtype) -> None:
    nodes = (Load("i", x0, torch.int64), Load("a", 64 * x0 + x1, dtype))
    target = 64 * value_symbol(0) + x1
    kernel = Kernel((Range(x0, 2000), Range(x1, 64)), (), nodes, (Store("o", target, 1, dtype, StoreMode.ADD),))
    rows, a = torch.randint(0, 10, (2000,)), torch.randint(-2, 3, (2000 * 64,)).to(dtype)
    out = torch.zeros(640, dtype=dtype)
    run_cpp(kernel, {"i": rows, "a": a, "o": out})
    want = torch.zeros(10, 64, dtype=torch.float64).index_add_(0, rows, a.view(2000, 64).double())
    tolerance = 0.1 if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(out.double(), want.flatten(), rtol=tolerance, atol=10 * tolerance)
    text = emit_cpp(canonicalize(kernel), name="k", hints={}, deterministic=True)
    assert "omp parallel" in text  # threads own columns, so that additions keep their order
    assert "atomic" not in text


@pytest.mark.parametrize("columns", [1, 16, 17, 40, 200])
def test_additions_by_owners_of_columns_have_the_same_bits_on_any_number_of_threads(columns: int) -> None:
    nodes = (Load("i", x0, torch.int64), Load("a", columns * x0 + x1, f32))
    store = Store("o", columns * value_symbol(0) + x1 + 3, 1, f32, StoreMode.ADD)
    kernel = Kernel((Range(x0, 4000), Range(x1, columns)), (), nodes, (store,))
    planned = plan_loops(kernel, {})
    assert (planned.threads is Threads.OWNERS) == (columns > 16)
    rows, a = torch.randint(0, 10, (4000,)), torch.randn(4000 * columns)
    one, many = torch.zeros(10 * columns + 3), torch.zeros(10 * columns + 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run_cpp(kernel, {"i": rows, "a": a, "o": one})
        torch.set_num_threads(3)
        run_cpp(kernel, {"i": rows, "a": a, "o": many})
    finally:
        torch.set_num_threads(threads)
    want = torch.zeros(10, columns, dtype=torch.float64).index_add_(0, rows, a.view(4000, columns).double())
    torch.testing.assert_close(many[3:].double(), want.flatten(), rtol=1e-3, atol=1e-3)
    assert columns <= 16 or torch.equal(one, many)


@pytest.mark.parametrize(
    "target",
    [
        value_symbol(0) + x1,  # rows overlap
        40 * value_symbol(0) + x1,  # a row is longer than the step between rows
        value_symbol(1),  # the column itself is computed
        64 * value_symbol(0) + 2 * x1,  # twice the step: 2 * 63 reaches into the next row
    ],
)
def test_threads_own_no_columns_where_two_may_meet(target: sympy.Expr) -> None:
    nodes = (Load("i", x0, torch.int64), Load("j", 64 * x0 + x1, torch.int64), Load("a", 64 * x0 + x1, f32))
    kernel = Kernel((Range(x0, 2000), Range(x1, 64)), (), nodes, (Store("o", target, 2, f32, StoreMode.ADD),))
    assert plan_loops(kernel, {}).threads is not Threads.OWNERS
    rows, columns = torch.randint(0, 10, (2000,)), torch.randint(0, 50, (128000,))
    compare(kernel, {"i": rows, "j": columns, "a": torch.randint(-3, 4, (128000,)).float(), "o": torch.zeros(900)})
    text = emit_cpp(canonicalize(kernel), name="k", hints={}, deterministic=True)
    assert "omp parallel" not in text


@pytest.mark.parametrize("mode", [StoreMode.MAX, StoreMode.MIN])
def test_atomic_extremes_keep_nan(mode: StoreMode) -> None:
    kernel = Kernel((Range(x0, 60000),), (), (Load("i", x0, torch.int64), Load("a", x0, f32)),
                    (Store("o", value_symbol(0), 1, f32, mode),))  # fmt: skip
    index, a = torch.randint(0, 9, (60000,)), torch.randn(60000)
    a[77] = math.nan
    compare(kernel, {"i": index, "a": a, "o": torch.zeros(9)})


def test_masked_loads_and_stores() -> None:
    inside = (Index(x1 - 2), Constant(0, torch.int64), Call("ge", (0, 1), torch.bool), Constant(50, torch.int64),
              Call("lt", (0, 3), torch.bool), Call("logical_and", (2, 4), torch.bool))  # fmt: skip
    nodes = (*inside, Load("a", 50 * x0 + x1 - 2, f32, 5, -1.5), Cast(6, torch.bool))
    kernel = Kernel((Range(x0, 30), Range(x1, 54)), (), nodes,
                    (Store("o", 54 * x0 + x1, 6, f32), Store("p", 54 * x0 + x1, 6, f32, StoreMode.SET, 4)))  # fmt: skip
    compare(kernel, {"a": torch.randn(1500), "o": torch.zeros(1620), "p": torch.full((1620,), 9.0)})


@pytest.mark.parametrize("kind", ["rand", "randn", "randint64"])
def test_random_numbers(kind: str) -> None:
    held = torch.int64 if kind == "randint64" else f32
    nodes = (Load("s", sympy.Integer(0), torch.int64), Index(x0), Random(kind, 0, 1, held))  # type: ignore[arg-type]
    kernel = Kernel((Range(x0, 5000),), (), nodes, (Store("o", x0, 2, held),))
    buffers = {"s": torch.tensor([-(2**40) + 12345]), "o": torch.zeros(5000, dtype=held)}
    expected = {n: t.clone() for n, t in buffers.items()}
    run_reference(kernel, expected)
    run_cpp(kernel, buffers)
    torch.testing.assert_close(buffers["o"], expected["o"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 300000), (3, 100000), (70000, 4)])
def test_answers_do_not_depend_on_threads(shape: tuple[int, int]) -> None:
    rows, columns = shape
    row = row_kernel(rows, columns, Reduce("sum", (0,), f32), Reduce("welford", (0,), f32), Item(2, 1, f32),
                     Call("add", (1, 3), f32), once=4)  # fmt: skip
    a = torch.randn(rows * columns)
    one, many = torch.zeros(rows), torch.zeros(rows)
    run_cpp(row, {"a": a, "m": many})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_cpp(row, {"a": a, "m": one})
    torch.set_num_threads(threads)
    assert torch.equal(one, many)
    double = a.view(rows, columns).double()
    want = double.sum(1) + double.var(1, correction=0) * columns
    torch.testing.assert_close(many.double(), want, rtol=1e-4, atol=1e-2)


def test_forms() -> None:
    def form(kernel: Kernel) -> tuple[Form, Threads]:
        planned = plan_loops(kernel, {})
        return planned.form, planned.threads

    def column(rows: int, columns: int) -> Kernel:
        load = Load("a", columns * r0 + x0, f32)
        nodes = (load, Reduce("sum", (0,), f32))
        return Kernel((Range(x0, columns),), (Range(r0, rows),), nodes, (Store("o", x0, 1, f32),))

    assert form(softmax(64, 1000)) == (Form.ROW, Threads.OUTER)
    assert form(softmax(2, 10)) == (Form.ROW, Threads.NONE)
    assert form(softmax(1, 100000)) == (Form.ROW, Threads.ROW)
    assert form(column(100000, 16)) == (Form.COLUMN, Threads.ROW)
    assert form(column(100, 100000)) == (Form.COLUMN, Threads.OUTER)


def test_softmax_over_the_first_dimension() -> None:
    nodes = softmax(1, 1).nodes[1:]
    at = 130 * r0 + x0
    kernel = Kernel((Range(x0, 130),), (Range(r0, 300),), (Load("a", at, f32), *nodes), (Store("o", at, 5, f32),))
    compare(kernel, {"a": torch.randn(39000), "o": torch.zeros(39000)})


def test_types_that_kernels_do_not_have_are_refused() -> None:
    kernel = Kernel((Range(x0, 4),), (), (Load("a", x0, torch.complex64),), (Store("o", x0, 0, torch.complex64),))
    with pytest.raises(UnsupportedError, match="complex64"):
        emit_cpp(canonicalize(kernel), name="k", hints={})


# ---- in place -------------------------------------------------------------------------------------------------------


def test_in_place_pointwise() -> None:
    at = 8 * x0 + x1
    both = (Range(x0, 6), Range(x1, 8))

    def kernel(index: sympy.Expr, dtype: torch.dtype = f32) -> Kernel:
        nodes = (Load("a", index, dtype), Load("b", x1, f32), Cast(0, f32), Call("add", (2, 1), f32))
        return Kernel(both, (), nodes, (Store("o", at, 3, f32),))

    assert safe_in_place(kernel(at), "a", "o")
    assert safe_in_place(kernel(at, torch.int32), "a", "o")
    assert not safe_in_place(kernel(at), "b", "o")  # eight rows read it
    assert not safe_in_place(kernel(6 * x1 + x0), "a", "o")
    assert not safe_in_place(kernel(at, torch.int16), "a", "o")
    assert not safe_in_place(kernel(at), "c", "o")


def test_in_place_rows_depend_on_the_last_pass_that_reads() -> None:
    assert safe_in_place(softmax(10, 33), "a", "o")
    cheap = row_kernel(10, 33, Reduce("max", (0,), f32), Call("sub", (0, 1), f32), Reduce("sum", (2,), f32),
                       Call("neg", (0,), f32), point=4, once=3)  # fmt: skip
    assert safe_in_place(cheap, "a", "o")
    dear = row_kernel(10, 33, Reduce("max", (0,), f32), Call("sub", (0, 1), f32), Reduce("sum", (2,), f32),
                      Call("exp", (0,), f32), point=4, once=3)  # fmt: skip
    assert not safe_in_place(dear, "a", "o"), "exponentials are not computed once more"
    mean = row_kernel(10, 33, Reduce("welford", (0,), f32), Item(1, 1, f32), Call("exp", (0,), f32), point=3, once=2)
    assert not safe_in_place(mean, "a", "o"), "the deviations may be a second pass"


@pytest.mark.parametrize("columns", [33, 40_000])
def test_a_residual_sum_in_place_of_a_term_of_it(columns: int) -> None:
    """It is stored by the last pass over the row, which reads the terms once more; so do rows cut into chunks."""
    kernel = layer_norm(5, columns, f32, residual=True)
    assert safe_in_place(kernel, "a", "sum")
    assert safe_in_place(kernel, "b", "sum")
    sizes = {"a": 5 * columns, "b": 5 * columns, "weight": columns, "bias": columns}
    given = {n: torch.randn(k) for n, k in sizes.items()}
    made = {"sum": torch.zeros(5 * columns), "out": torch.zeros(5 * columns)}
    made |= {"mean": torch.zeros(5), "rstd": torch.zeros(5)}
    apart = {**given, **made}
    run_cpp(kernel, apart)
    shared = {**given, "mean": torch.zeros(5), "rstd": torch.zeros(5)}
    shared |= {"a": given["a"].clone(), "b": given["b"].clone()}
    shared |= {"sum": shared["a"], "out": shared["b"]}
    run_cpp(kernel, shared)
    assert all(torch.equal(shared[n], apart[n]) for n in made)


def test_in_place_softmax_gives_the_same_bytes() -> None:
    kernel = softmax(50, 1003)
    a = torch.randn(50 * 1003)
    fresh, same = torch.zeros_like(a), a.clone()
    run_cpp(kernel, {"a": a, "o": fresh})
    run_cpp(kernel, {"a": same, "o": same})
    assert torch.equal(fresh, same)
