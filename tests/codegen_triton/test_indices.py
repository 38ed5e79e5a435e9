"""Index text, merged loops, sizes as arguments, and what may be done in place."""

from __future__ import annotations

import pytest
import sample_kernels as s
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_kernel import run_reference
from sample_kernels import BF16, F32, I64, Builder, R, X

from memplan.codegen.triton_device_functions import DEVICE_FUNCTIONS
from memplan.codegen.triton_kernel import emit_triton, safe_in_place
from memplan.codegen.triton_loops import arrange
from memplan.codegen.triton_printer import IndexPrinter, texpr
from memplan.ir.canonical import canonicalize
from memplan.ir.errors import LoweringError
from memplan.ir.index import FloorDiv, Mod
from memplan.ir.loops import CHECKED_INDEX, StoreMode
from memplan.runtime.triton_build import Build, Target, compile_one
from memplan.runtime.triton_launch import make_launcher

A, B = X[0], X[1]
S = sympy.Symbol("s0", integer=True, positive=True)
VALUE = sympy.Symbol("v0", integer=True)


class TruncatingInt(int):
    """An integer that divides as Triton's do: towards zero."""

    def __floordiv__(self, other: int) -> TruncatingInt:
        q = abs(int(self)) // abs(int(other))
        return TruncatingInt(q if (self < 0) == (other < 0) else -q)

    def __rfloordiv__(self, other: int) -> TruncatingInt:
        return TruncatingInt(other) // self

    def __mod__(self, other: int) -> TruncatingInt:
        return TruncatingInt(int(self) - int(self // other) * int(other))

    def __rmod__(self, other: int) -> TruncatingInt:
        return TruncatingInt(other) % self


def _keep_type(name: str) -> None:
    plain = getattr(int, name)
    setattr(TruncatingInt, name, lambda self, *a: TruncatingInt(plain(int(self), *(int(x) for x in a))))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "neg"):
    _keep_type(f"__{_name}__")


def evaluate_text(text: str, values: dict[str, int]) -> int:
    """Triton's meaning of the text: C division, and the device functions as they are written."""

    class Language:
        where = staticmethod(lambda c, a, b: a if c else b)
        maximum = staticmethod(max)
        minimum = staticmethod(min)

    scope: dict[str, object] = {"tl": Language}
    for name in ("floor_divide", "floor_modulo"):
        exec(DEVICE_FUNCTIONS[name], scope)
    return int(eval(text, scope, {k: TruncatingInt(v) for k, v in values.items()}))


def expressions() -> st.SearchStrategy[sympy.Expr]:
    leaves = st.sampled_from([A, B, VALUE, S]) | st.integers(-9, 9).map(sympy.Integer)

    def grow(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
        divisor = st.integers(1, 9).map(sympy.Integer) | st.just(S)
        return st.one_of(
            st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
            st.tuples(inner, inner).map(lambda p: p[0] - p[1]),
            st.tuples(inner, inner).map(lambda p: p[0] * p[1]),
            st.tuples(inner, divisor).map(lambda p: FloorDiv(*p)),
            st.tuples(inner, divisor).map(lambda p: Mod(*p)),
            st.tuples(inner, inner).map(lambda p: sympy.Max(*p)),
            st.tuples(inner, inner).map(lambda p: sympy.Min(*p)),
            inner.map(lambda e: e**3),
        )

    return st.recursive(leaves, grow, max_leaves=8)


def value_of(expr: sympy.Expr, values: dict[sympy.Symbol, int]) -> int:
    """Python's meaning of an expression, node by node."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return values[expr]
    args = [value_of(a, values) for a in expr.args]
    if isinstance(expr, FloorDiv):
        return args[0] // args[1]
    if isinstance(expr, Mod):
        return args[0] % args[1]
    if isinstance(expr, sympy.Max):
        return max(args)
    if isinstance(expr, sympy.Min):
        return min(args)
    if expr.is_Pow:
        return int(args[0] ** args[1])
    out = args[0]
    for a in args[1:]:
        out = out + a if expr.is_Add else out * a
    return out


@settings(max_examples=300, deadline=None)
@given(expressions(), st.integers(0, 6), st.integers(0, 10), st.integers(-20, 20), st.integers(1, 12))
def test_text_means_what_the_expression_means(expr: sympy.Expr, a: int, b: int, v: int, size: int) -> None:
    printer = IndexPrinter(((A, 7), (B, 11)), lambda symbol: symbol.name)
    values = {A: a, B: b, VALUE: v, S: size}
    text = texpr(expr, printer)
    assert evaluate_text(text, {symbol.name: n for symbol, n in values.items()}) == value_of(expr, values), text


def test_text_of_plain_expressions() -> None:
    printer = IndexPrinter(((A, 7), (B, 11)), lambda symbol: symbol.name)
    assert texpr(3 * FloorDiv(A, 2) + B - 5, printer) in ("3*(x0 // 2) + x1 - 5", "x1 + 3*(x0 // 2) - 5")
    assert texpr(FloorDiv(VALUE, 2), printer) == "floor_divide(v0, 2)"
    assert texpr(FloorDiv(A - 1, 2), printer) == "floor_divide(x0 - 1, 2)"
    assert printer.used == {"floor_divide"}
    with pytest.raises(LoweringError, match="sin"):
        texpr(sympy.sin(A), printer)


@st.composite
def strided_kernels(draw: st.DrawFn) -> tuple[s.Kernel, dict[str, torch.Tensor]]:
    """Three buffers laid out in any order of the dimensions, read and written under loops in any order."""
    sizes = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 8]), min_size=2, max_size=4)))
    reduces = draw(st.booleans())
    k = Builder(sizes[:-1], sizes[-1:]) if reduces else Builder(sizes)
    symbols = [*X[: len(sizes) - 1], R[0]] if reduces else list(X[: len(sizes)])
    total = 1
    for n in sizes:
        total *= n

    def layout(dims: list[int], name: str) -> sympy.Expr:
        order = draw(st.permutations(dims))
        index, stride = sympy.Integer(0), 1
        for d in order:
            index += symbols[d] * stride
            stride *= sizes[d]
        return index

    every = list(range(len(sizes)))
    buffers = {name: torch.randn(total) for name in ("a", "b")}
    a = k.load("a", layout(every, "a"))
    some = draw(st.lists(st.sampled_from(every), unique=True))
    value = k.call("add", a, k.load("b", layout(some, "b")))
    flat = sum(symbols[d] * int(torch.tensor(sizes[d + 1 :]).prod()) for d in every)
    split = draw(st.sampled_from([2, 3, 4]))
    value = k.call("add", value, k.cast(k.index(Mod(FloorDiv(sympy.sympify(flat), split), 5)), F32))
    if reduces:
        k.store("row", layout(every[:-1], "row"), k.reduce("sum", value))
        buffers["row"] = torch.zeros(total // sizes[-1])
    k.store("out", layout(every, "out"), value)
    buffers["out"] = torch.zeros(total)
    return k.done(), buffers


@settings(max_examples=60, deadline=None)
@given(strided_kernels())
def test_arranged_loops_mean_the_same(case: tuple[s.Kernel, dict[str, torch.Tensor]]) -> None:
    kernel, buffers = case
    expected = {name: b.clone() for name, b in buffers.items()}
    found = {name: b.clone() for name, b in buffers.items()}
    run_reference(kernel, expected)
    run_reference(arrange(kernel, {}).kernel, found)
    for name in buffers:
        torch.testing.assert_close(found[name], expected[name])


@settings(max_examples=25, deadline=None)
@given(case=strided_kernels())
def test_strided_numbers(interpreter, case: tuple[s.Kernel, dict[str, torch.Tensor]]) -> None:
    kernel, buffers = case
    canonical = canonicalize(kernel)
    emitted = emit_triton(canonical, name="kernel", hints={})
    expected = {name: b.clone() for name, b in buffers.items()}
    run_reference(kernel, expected)
    for config in range(min(len(emitted.configs), 2)):
        found = interpreter.run(emitted, config, [buffers[b].clone() for b in canonical.buffers], {})
        for name, got in zip(canonical.buffers, found, strict=True):
            torch.testing.assert_close(got, expected[name], msg=lambda m: f"{m}\n{emitted.source}")


def test_contiguous_dimensions_merge() -> None:
    k = Builder((4, 5, 6))
    k.store("out", X[0] * 30 + X[1] * 6 + X[2], k.load("a", X[0] * 30 + X[1] * 6 + X[2]))
    assert [r.size for r in arrange(k.done(), {}).axes[0].ranges] == [120]


def test_channels_last_output_needs_no_division() -> None:
    k = Builder((2, 3, 4, 5))
    at = X[0] * 60 + X[1] + X[2] * 15 + X[3] * 3
    k.store("out", at, k.load("a", at))
    emitted = emit_triton(canonicalize(k.done()), name="kernel", hints={})
    assert "%" not in emitted.source
    assert "//" not in emitted.source


SIZED = {
    "bias_gelu": (s.bias_gelu(S, 24, F32), lambda n: {"a": n * 24, "bias": 24, "out": n * 24}),
    "columns": (s.bias_gelu(6, S, F32), lambda n: {"a": n * 6, "bias": n, "out": n * 6}),
    "softmax": (s.softmax(3, S, F32), lambda n: {"a": 3 * n, "out": 3 * n}),
    "rows": (s.softmax(S, 10, F32), lambda n: {"a": 10 * n, "out": 10 * n}),
    "column_sum": (s.column_sum(S, 12, F32), lambda n: {"a": 12 * n, "out": 12}),
    "transpose": (s.transpose(S, 16), lambda n: {"a": 16 * n, "out": 16 * n}),
}


@pytest.mark.parametrize("size", [1, 13, 40])
@pytest.mark.parametrize("name", SIZED)
def test_sizes_as_arguments(name: str, size: int, check) -> None:
    """Emitted for one size, right for all."""
    kernel, sizes = SIZED[name]
    canonical = canonicalize(kernel)
    emitted = emit_triton(canonical, name="kernel", hints={S: 20})
    assert emitted.arguments[-1] == ("s0", "i64")
    buffers = {b: torch.randn(n) for b, n in sizes(size).items()}
    expected = {b: t.clone() for b, t in buffers.items()}
    run_reference(kernel, expected, {S: size})
    found = check.interpreter.run(emitted, 0, [buffers[b].clone() for b in canonical.buffers], {S: size})
    for b, got in zip(canonical.buffers, found, strict=True):
        torch.testing.assert_close(got, expected[b], msg=lambda m: f"{m}\n{emitted.source}")
    check.builds(kernel, {S: 20})


def test_wide_indices(check) -> None:
    kernel = s.bias_gelu(5, 33, F32)
    buffers = {"a": torch.randn(165), "bias": torch.randn(33), "out": torch.zeros(165)}
    assert "tl.int64" in check.numbers(kernel, buffers, wide=True).source
    assert "tl.int64" not in emit_triton(canonicalize(kernel), name="k", hints={}).source
    large = emit_triton(canonicalize(s.add_relu(2**31 + 8)), name="k", hints={})
    assert "tl.program_id(0).to(tl.int64)" in large.source


def test_grid_function_refuses_sizes_beyond_32_bits() -> None:
    emitted = emit_triton(canonicalize(s.add_relu(S)), name="kernel", hints={S: 4096})
    built = compile_one(Build.of(emitted, emitted.configs[0]), Target())
    launcher = make_launcher(emitted, built)
    block = emitted.configs[0].block("XBLOCK")
    assert launcher._grid_of is not None
    assert launcher._grid_of(block * 3 + 1) == 4
    assert launcher._grid_of(0) == 0
    with pytest.raises(Exception, match="32 bits"):
        launcher._grid_of(2**31)


def test_buffer_seen_as_two_types(check) -> None:
    k = Builder((32,))
    bits = k.load("a", X[0], torch.int32)
    k.store("out", X[0], k.call("add", k.cast(bits, F32), k.load("a", X[0], F32)))
    check.numbers(k.done(), {"a": torch.randn(32), "out": torch.zeros(32)})
    check.builds(k.done())


def test_atomics_are_refused_where_determinism_is_asked_for() -> None:
    with pytest.raises(LoweringError, match="deterministic"):
        emit_triton(canonicalize(s.embedding_backward(8, 8)), name="k", hints={}, deterministic=True)
    k = Builder((8,))
    k.store("out", X[0], k.load("a", X[0], torch.int8), torch.int8, StoreMode.ADD)
    with pytest.raises(LoweringError, match="int8"):
        emit_triton(canonicalize(k.done()), name="k", hints={})


def test_in_place() -> None:
    gelu = s.bias_gelu(8, 16)
    assert safe_in_place(gelu, "a", "out")
    assert not safe_in_place(gelu, "bias", "out")
    assert not safe_in_place(gelu, "out", "a")
    assert not safe_in_place(s.transpose(16, 16), "a", "out")
    assert not safe_in_place(s.dropout(64), "a", "mask")
    assert safe_in_place(s.softmax(4, 100_000), "a", "out")
    residual = s.layer_norm(4, 100_000, residual=True)
    assert safe_in_place(residual, "a", "out")
    assert safe_in_place(residual, "b", "sum")
    assert not safe_in_place(residual, "weight", "out")
    # the loss reads its row at a computed place too
    assert not safe_in_place(s.cross_entropy(4, 64), "a", "loss")
    assert not safe_in_place(s.batch_norm_statistics(2, 4, 8), "running", "mean")


def test_not_in_place_under_a_later_pass() -> None:
    """A store in the first pass, because its value needs a load that later passes do without."""
    k = Builder((4,), (64,))
    at = X[0] * 64 + R[0]
    a, b = k.load("a", at), k.load("b", at)
    k.store("early", at, k.call("mul", a, b))
    total = k.reduce("sum", k.call("mul", a, b))
    k.store("out", at, k.call("sub", a, total))
    assert not safe_in_place(k.done(), "a", "early")
    assert safe_in_place(k.done(), "b", "early")
    assert safe_in_place(k.done(), "a", "out")


def test_a_residual_sum_in_place_of_a_term_of_it(interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in one block and a row that is looped over: there the last loop stores it, once all have left the first."""
    rows, columns = 3, 90
    kernel = s.layer_norm(rows, columns, F32, residual=True)
    canonical = canonicalize(kernel)
    assert safe_in_place(kernel, "a", "sum")
    given = {n: torch.randn(rows * columns) for n in ("a", "b")}
    given |= {n: torch.randn(columns) for n in ("weight", "bias")}
    for looped in (False, True):
        if looped:
            monkeypatch.setattr("memplan.codegen.triton_configs._PERSISTENT_ELEMENTS", 16)
        emitted = emit_triton(canonical, name="kernel", hints={})
        made = {n: torch.zeros(rows * columns) for n in ("sum", "out")} | {
            n: torch.zeros(rows) for n in ("mean", "rstd")
        }
        apart = interpreter.run(emitted, 0, [{**given, **made}[n].clone() for n in canonical.buffers], {})
        old = given["a"].clone()
        shared = {**given, **made, "a": old, "sum": old}
        together = interpreter.run(emitted, 0, [shared[n] for n in canonical.buffers], {})
        for n, expected, got in zip(canonical.buffers, apart, together, strict=True):
            assert n == "a" or torch.equal(expected, got), n
        assert torch.equal(together[canonical.buffers.index("a")], apart[canonical.buffers.index("sum")])
        if looped:
            first, barrier, last = emitted.source.partition("tl.debug_barrier()")
            assert barrier
            assert (first.count("for roffset"), last.count("for roffset")) == (1, 1)
            assert (first.count("tl.store"), last.count("tl.store")) == (0, 4)
        else:
            assert "barrier" not in emitted.source


def test_mutation_of_what_is_read(check) -> None:
    """A softmax written over its input: the same buffer in the kernel itself, over several passes."""
    k = Builder((3,), (40,))
    at = X[0] * 40 + R[0]
    x = k.load("a", at)
    e = k.call("exp", k.call("sub", x, k.reduce("max", x)))
    k.store("a", at, k.call("div", e, k.reduce("sum", e)))
    check.numbers(k.done(), {"a": torch.randn(120)})


def test_rows_without_reductions_are_plain_points(check) -> None:
    k = Builder((6,), (40,))
    at = X[0] * 40 + R[0]
    k.store("out", at, k.call("add", k.load("a", at), k.load("b", X[0])))
    emitted = check.numbers(k.done(), {"a": torch.randn(240), "b": torch.randn(6), "out": torch.zeros(240)})
    assert "RBLOCK" not in emitted.source
    k.store("copy", X[0], k.load("b", X[0]))
    check.numbers(
        k.done(), {"a": torch.randn(240), "b": torch.randn(6), "out": torch.zeros(240), "copy": torch.zeros(6)}
    )


@pytest.mark.parametrize("mode", [StoreMode.ADD, StoreMode.MAX, StoreMode.MIN])
@pytest.mark.parametrize("dtype", [F32, torch.int32, I64])
def test_atomics(mode: StoreMode, dtype: torch.dtype, check) -> None:
    """At computed places with collisions, at one place, under a mask, and once a row."""
    k = Builder((9,), (20,))
    x = k.load("a", X[0] * 20 + R[0], dtype)
    at = k.load("at", X[0] * 20 + R[0], I64)
    k.store("spread", VALUE.xreplace({VALUE: s.value_symbol(at)}), x, dtype, mode)
    k.store("one", 0, x, dtype, mode, k.call("gt", x, k.const(0, dtype), dtype=torch.bool))
    k.store("rows", FloorDiv(X[0], 2), k.reduce("max", x, dtype=dtype), dtype, mode)
    k.store("count", 0, k.const(1, dtype), dtype, mode)
    data = (torch.randn(180) * 9).to(dtype)
    buffers = {"a": data, "at": torch.randint(0, 7, (180,)), "spread": torch.zeros(7, dtype=dtype)}
    buffers |= {"one": torch.zeros(1, dtype=dtype), "rows": torch.zeros(5, dtype=dtype)}
    check.numbers(k.done(), {**buffers, "count": torch.zeros(1, dtype=dtype)}, rtol=1e-5, atol=1e-5)
    check.builds(k.done())


def test_half_precision_is_not_rounded_between(check) -> None:
    k = Builder((64,))
    x = k.load("a", X[0], BF16)
    y = k.call("mul", x, k.const(1.001953125, BF16))
    k.store("out", X[0], k.call("sub", y, x), BF16)
    k.store("rounded", X[0], k.call("sub", k.cast(y, BF16), x), BF16)
    check.numbers(
        k.done(),
        {"a": torch.randn(64).to(BF16), "out": torch.zeros(64).to(BF16), "rounded": torch.zeros(64).to(BF16)},
        rtol=1e-2,
        atol=0,
    )


@pytest.mark.parametrize("kind", ["rand", "randn", "randint64"])
def test_random(kind: str, check) -> None:
    k = Builder((70,))
    dtype = I64 if kind == "randint64" else F32
    offset = k.call("add", k.index(X[0]), k.const(1 << 33, I64))
    k.store("out", X[0], k.random(kind, k.load("seed", 0, I64), offset, dtype), dtype)
    buffers = {"seed": torch.tensor([-(2**40) + 12345]), "out": torch.zeros(70, dtype=dtype)}
    check.numbers(k.done(), buffers, rtol=1e-5, atol=1e-6)
    check.builds(k.done())


def _checked(size: int, rows: int = 20) -> Builder:
    """``out[x] = table[index[x]]``, checked."""
    k = Builder((rows,))
    position = k.call(CHECKED_INDEX, k.load("index", X[0], I64), k.const(size, I64), dtype=I64)
    k.store("out", X[0], k.load("table", sympy.Symbol(f"v{position}", integer=True)))
    return k


def test_checked_indices(check) -> None:
    """Lanes behind the end, where a masked load gives what would be out of range, are not asked."""
    kernel = _checked(7).done()
    buffers = {"index": torch.randint(0, 7, (20,)), "table": torch.randn(7), "out": torch.zeros(20)}
    emitted = check.numbers(kernel, buffers)
    assert emitted.checks
    assert "tl.device_assert" in emitted.source
    assert "| ~(xmask)" in emitted.source
    assert b"__assertfail" in compile_one(Build.of(emitted, emitted.configs[0]), Target()).cubin
    plain = emit_triton(canonicalize(s.add_relu(20)), name="kernel", hints={})
    assert not plain.checks
    assert b"__assertfail" not in compile_one(Build.of(plain, plain.configs[0]), Target()).cubin


def test_an_index_out_of_range_fails_in_the_interpreter(check) -> None:
    buffers = {"index": torch.full((20,), 7), "table": torch.randn(9), "out": torch.zeros(20)}
    with pytest.raises(Exception, match="index is out of range"):
        check.numbers(_checked(7).done(), buffers)
