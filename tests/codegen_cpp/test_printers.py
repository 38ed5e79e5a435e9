"""`pexpr` and `cexpr` against the integer meaning of random expressions."""

from __future__ import annotations

import ctypes

import pytest
import sympy
import torch.utils._sympy.functions as torch_functions
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memplan.codegen.cpp_kernel import prelude
from memplan.codegen.printers import cexpr, pexpr
from memplan.ir.errors import UnsupportedError
from memplan.ir.index import FloorDiv, Mod
from memplan.runtime.build import build_library, load_library

SYMBOLS = sympy.symbols("a b c", integer=True)
POSITIVE = sympy.symbols("p q", integer=True, positive=True)
NAMES = [s.name for s in (*SYMBOLS, *POSITIVE)]
values = st.tuples(*[st.integers(-40, 40)] * 3, *[st.integers(1, 30)] * 2)


def _leaf() -> st.SearchStrategy[sympy.Expr]:
    return st.sampled_from([*SYMBOLS, *POSITIVE]) | st.integers(-9, 9).map(sympy.Integer)


def _nonzero(e: sympy.Expr) -> sympy.Expr:
    """An expression that is never zero, of either sign."""
    return 2 * e + 1


def _extend(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        pair.map(lambda p: p[0] + p[1]),
        pair.map(lambda p: p[0] - 3 * p[1]),
        pair.map(lambda p: p[0] * p[1]),
        pair.map(lambda p: FloorDiv(p[0], _nonzero(p[1]))),
        pair.map(lambda p: Mod(p[0], _nonzero(p[1]))),
        pair.map(lambda p: torch_functions.PythonMod(p[0], _nonzero(p[1]))),
        pair.map(lambda p: torch_functions.Max(p[0], p[1])),
        pair.map(lambda p: torch_functions.Min(p[0], p[1])),
        inner.map(lambda e: torch_functions.FloorDiv(e, POSITIVE[0])),
        inner.map(lambda e: FloorDiv(e, 4)),
        inner.map(lambda e: e**2),
        pair.map(lambda p: torch_functions.Where(sympy.Lt(p[0], p[1]), p[1], p[0] + 1)),
    )


expressions = st.recursive(_leaf(), _extend, max_leaves=8)


def meaning(expr: sympy.Basic, at: dict[sympy.Symbol, int]) -> int:
    """The integer an expression stands for: its own few lines, nothing shared with the printers."""
    if expr.is_Symbol:
        return at[expr]
    if expr.is_Integer:
        return int(expr)
    name = type(expr).__name__
    if name == "Where":
        condition, yes, no = expr.args
        holds = condition if condition in (sympy.true, sympy.false) else _holds(condition, at)
        return meaning(yes if holds else no, at)
    args = [meaning(a, at) for a in expr.args]
    match name:
        case "Add":
            return sum(args)
        case "Mul":
            out = 1
            for a in args:
                out *= a
            return out
        case "Pow":
            return args[0] ** args[1]
        case "FloorDiv":
            return args[0] // args[1]
        case "Mod" | "PythonMod":
            return args[0] % args[1]
        case "Max":
            return max(args)
        case "Min":
            return min(args)
    raise AssertionError(name)


def _holds(condition: sympy.Basic, at: dict[sympy.Symbol, int]) -> bool:
    left, right = (meaning(a, at) for a in condition.args)
    return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[condition.rel_op]


@given(expressions, values)
@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_python_text_has_the_expressions_value(expr: sympy.Expr, at: tuple[int, ...]) -> None:
    point = dict(zip((*SYMBOLS, *POSITIVE), at, strict=True))
    assert eval(pexpr(expr), dict(zip(NAMES, at, strict=True))) == meaning(expr, point)


@given(st.lists(expressions, min_size=60, max_size=60), st.lists(values, min_size=20, max_size=20))
@settings(
    max_examples=3, deadline=None, derandomize=True, database=None, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_cpp_text_has_the_expressions_value(batch: list[sympy.Expr], points: list[tuple[int, ...]]) -> None:
    parameters = ", ".join(f"int64_t {n}" for n in NAMES)
    functions = [f'extern "C" int64_t f{i}({parameters}) {{ return {cexpr(e)}; }}' for i, e in enumerate(batch)]
    library = load_library(build_library("\n".join([prelude(), *functions]), name="printers", openmp=False))
    for i, expr in enumerate(batch):
        function = getattr(library, f"f{i}")
        function.restype = ctypes.c_int64
        for at in points:
            want = meaning(expr, dict(zip((*SYMBOLS, *POSITIVE), at, strict=True)))
            if abs(want) < 2**40:
                assert function(*(ctypes.c_int64(v) for v in at)) == want, f"{expr} at {at}: {cexpr(expr)}"


def test_literals() -> None:
    assert cexpr(2**63 - 1) == "9223372036854775807L"
    assert cexpr(-(2**63)) == "(-9223372036854775807L - 1)"
    for outside in (2**63, -(2**63) - 1, 3 * 2**62 * POSITIVE[0]):
        with pytest.raises(UnsupportedError, match="64 bits"):
            cexpr(outside)
    assert pexpr(2**70) == str(2**70)


def test_nonnegative_operands_divide_plainly() -> None:
    p, q = POSITIVE
    assert cexpr(FloorDiv(p, q)) == "(p / q)"
    assert cexpr(FloorDiv(SYMBOLS[0], q)) == "mp::floordiv<int64_t>(a, q)"


INEXACT = [SYMBOLS[0] / 2, sympy.Rational(1, 3), SYMBOLS[0] ** SYMBOLS[1], sympy.sin(SYMBOLS[0])]


@pytest.mark.parametrize("expr", INEXACT)
def test_inexact_or_unknown_is_refused(expr: sympy.Expr) -> None:
    for printer in (pexpr, cexpr):
        with pytest.raises(UnsupportedError):
            printer(expr)


def test_other_size_functions() -> None:
    p, q = POSITIVE
    point = {"p": 13, "q": 4}
    cases = [
        (torch_functions.ModularIndexing(p, 2, 5), (13 // 2) % 5),
        (torch_functions.CeilDiv(p, q), 4),
        (torch_functions.CleanDiv(4 * p, 2), 26),
        (torch_functions.LShift(p, q), 13 << 4),
        (torch_functions.RShift(p, q), 0),
        (torch_functions.PowByNatural(p, q), 13**4),
        (torch_functions.BitwiseFn_bitwise_and(p, q), 13 & 4),
        (torch_functions.BitwiseFn_bitwise_or(p, q), 13 | 4),
        (torch_functions.BitwiseFn_bitwise_xor(p, q), 13 ^ 4),
        (torch_functions.TruncToInt(torch_functions.ToFloat(p) * 1.5), 19),
        (torch_functions.CeilToInt(torch_functions.IntTrueDiv(p, q)), 4),
        (torch_functions.Identity(p + q), 17),
        (sympy.floor(p / 4), 3),
        (sympy.ceiling(p / 4), 4),
    ]
    source = [
        f'extern "C" int64_t g{i}(int64_t p, int64_t q) {{ return {cexpr(e)}; }}' for i, (e, _) in enumerate(cases)
    ]
    library = load_library(build_library("\n".join([prelude(), *source]), name="printers", openmp=False))
    for i, (expr, want) in enumerate(cases):
        assert eval(pexpr(expr), dict(point)) == want, expr
        function = getattr(library, f"g{i}")
        function.restype = ctypes.c_int64
        assert function(ctypes.c_int64(13), ctypes.c_int64(4)) == want, cexpr(expr)
