"""`pexpr` and `cexpr` against the integer meaning of random expressions."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction

import pytest
import sympy
import torch.utils._sympy.functions as torch_functions
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from memplan.codegen.cpp_kernel import prelude
from memplan.codegen.cpp_wrapper_source import _header
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


def _small(e: sympy.Expr) -> sympy.Expr:
    """An expression from 0 to 4, for exponents and shifts."""
    return Mod(e, 5)


def _conditions(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Basic]:
    kinds = st.sampled_from([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne])
    plain = st.tuples(kinds, inner, inner).map(lambda c: c[0](c[1], c[2]))
    pairs = st.tuples(st.sampled_from([sympy.And, sympy.Or]), plain, plain).map(lambda c: c[0](c[1], c[2]))
    return st.one_of(plain, pairs, pairs.map(sympy.Not))


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
        st.tuples(_conditions(inner), inner, inner).map(lambda p: torch_functions.Where(*p)),
        pair.map(lambda p: torch_functions.BitwiseFn_bitwise_and(p[0], p[1])),
        pair.map(lambda p: torch_functions.BitwiseFn_bitwise_or(p[0], p[1])),
        pair.map(lambda p: torch_functions.BitwiseFn_bitwise_xor(p[0], p[1])),
        pair.map(lambda p: torch_functions.LShift(p[0], _small(p[1]))),
        pair.map(lambda p: torch_functions.RShift(p[0], _small(p[1]))),
        pair.map(lambda p: torch_functions.PowByNatural(p[0], _small(p[1]))),
        inner.map(lambda e: torch_functions.CeilDiv(e, POSITIVE[1])),
        inner.map(lambda e: torch_functions.CleanDiv(6 * e, 3)),
        pair.map(lambda p: torch_functions.ModularIndexing(p[0], 3, 1 + _small(p[1]))),
        # of what sympy does not know to be whole, as bit operations, no quotient is exact
        inner.map(lambda e: sympy.floor(e / 3) if e.is_integer else e),
        inner.map(lambda e: sympy.ceiling(e / POSITIVE[0]) if e.is_integer else e),
        inner.map(sympy.Abs),
    )


expressions = st.one_of(
    st.recursive(_leaf(), _extend, max_leaves=8),
    # a Piecewise holds leaves and stands outside: sympy takes no quotients of polynomials in one
    st.tuples(_leaf(), _conditions(_leaf()), _leaf()).map(lambda p: sympy.Piecewise((p[0], p[1]), (p[2], True))),
)


#: what lies beyond is not computed in C++: the same with an operand of another magnitude would leave 64 bits
LARGE = 2**50


def meaning(expr: sympy.Basic, at: dict[sympy.Symbol, int]) -> int | Fraction:
    """The number an expression stands for: its own few lines, nothing shared with the printers.

    Raises
    ------
    OverflowError
        If one of its parts is beyond `LARGE`.
    """
    found = _meaning(expr, at)
    if abs(found) > LARGE:
        raise OverflowError(f"{expr} is {found}")
    return found


def _meaning(expr: sympy.Basic, at: dict[sympy.Symbol, int]) -> int | Fraction:
    if expr.is_Symbol:
        return at[expr]
    if expr.is_Rational:
        return Fraction(int(expr.p), int(expr.q))
    name = type(expr).__name__
    if name == "Where":
        condition, yes, no = expr.args
        return meaning(yes if _holds(condition, at) else no, at)
    if name == "Piecewise":
        return meaning(next(value for value, condition in expr.args if _holds(condition, at)), at)
    args = [meaning(a, at) for a in expr.args]
    match name:
        case "Add":
            return sum(args)
        case "Mul":
            return math.prod(args)
        case "Pow" | "PowByNatural":
            return Fraction(args[0]) ** int(args[1])
        case "FloorDiv":
            return args[0] // args[1]
        case "CleanDiv":
            assert args[0] % args[1] == 0
            return args[0] // args[1]
        case "Mod" | "PythonMod":
            return args[0] % args[1]
        case "ModularIndexing":
            return args[0] // args[1] % args[2]
        case "Max":
            return max(args)
        case "Min":
            return min(args)
        case "Abs":
            return abs(args[0])
        case "floor":
            return math.floor(args[0])
        case "ceiling":
            return math.ceil(args[0])
        case "BitwiseFn_bitwise_and":
            return int(args[0]) & int(args[1])
        case "BitwiseFn_bitwise_or":
            return int(args[0]) | int(args[1])
        case "BitwiseFn_bitwise_xor":
            return int(args[0]) ^ int(args[1])
    raise AssertionError(name)


def _holds(condition: sympy.Basic, at: dict[sympy.Symbol, int]) -> bool:
    if condition in (sympy.true, sympy.false):
        return condition == sympy.true
    match type(condition).__name__:
        case "And":
            return all(_holds(a, at) for a in condition.args)
        case "Or":
            return any(_holds(a, at) for a in condition.args)
        case "Not":
            return not _holds(condition.args[0], at)
    left, right = (meaning(a, at) for a in condition.args)
    equal = {"==": left == right, "!=": left != right}
    order = {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}
    return (order | equal)[condition.rel_op]


@given(expressions, values)
@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_python_text_has_the_expressions_value(expr: sympy.Expr, at: tuple[int, ...]) -> None:
    point = dict(zip((*SYMBOLS, *POSITIVE), at, strict=True))
    try:
        want = meaning(expr, point)
    except OverflowError:
        assume(False)
    assert eval(pexpr(expr), dict(zip(NAMES, at, strict=True))) == want, pexpr(expr)


@given(st.lists(expressions, min_size=60, max_size=60), st.lists(values, min_size=20, max_size=20))
@settings(
    max_examples=3, deadline=None, derandomize=True, database=None, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_cpp_text_has_the_expressions_value(batch: list[sympy.Expr], points: list[tuple[int, ...]]) -> None:
    parameters = ", ".join(f"int64_t {n}" for n in NAMES)
    functions = [f'extern "C" int64_t f{i}({parameters}) {{ return {cexpr(e)}; }}' for i, e in enumerate(batch)]
    library = load_library(build_library("\n".join([prelude(), *functions]), name="printers", openmp=False))
    compared = 0
    for i, expr in enumerate(batch):
        function = getattr(library, f"f{i}")
        function.restype = ctypes.c_int64
        for at in points:
            try:
                want = meaning(expr, dict(zip((*SYMBOLS, *POSITIVE), at, strict=True)))
            except OverflowError:
                continue
            compared += 1
            assert function(*(ctypes.c_int64(v) for v in at)) == want, f"{expr} at {at}: {cexpr(expr)}"
    assert compared > 0.9 * len(batch) * len(points)


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


edges = st.sampled_from([0, 1, 2**31, 2**53, 2**53 + 1, 2**62, 2**63 - 1])
whole = st.builds(lambda n, sign, off: max(-(2**63), min(2**63 - 1, sign * n + off)), edges, st.sampled_from([1, -1]),
                  st.integers(-3, 3)) | st.integers(-(2**63), 2**63 - 1)  # fmt: skip


@given(st.lists(st.tuples(whole, whole, st.integers(0, 200)), min_size=400, max_size=400))
@settings(
    max_examples=10, deadline=None, derandomize=True, database=None, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@pytest.mark.parametrize("where", ["kernel", "wrapper"])
def test_all_of_64_bits_is_divided_and_shifted_as_python_does(where: str, rows: list[tuple[int, int, int]]) -> None:
    a, b, count = SYMBOLS[0], SYMBOLS[1], sympy.Symbol("c", integer=True, nonnegative=True)
    two = torch_functions.PowByNatural(sympy.Integer(2), count)
    whole_results = {
        torch_functions.RShift(a, count): lambda x, y, n: x >> n,
        torch_functions.FloorDiv(a, two): lambda x, y, n: x // 2**n,
        torch_functions.RShift(a, 70): lambda x, y, n: x >> 70,
        torch_functions.RShift(a, 63): lambda x, y, n: x >> 63,
        FloorDiv(a, sympy.Integer(2**64)): lambda x, y, n: x // 2**64,
        Mod(sympy.Abs(FloorDiv(a, 2)), two): lambda x, y, n: abs(x // 2) % 2**n,
        Mod(a, torch_functions.PowByNatural(sympy.Integer(2), Mod(count, 63))): lambda x, y, n: x % 2 ** (n % 63),
    }
    quotient = torch_functions.IntTrueDiv(a, b)
    given_names = "int64_t a, int64_t b, int64_t c"
    source = [
        f'extern "C" int64_t w{i}({given_names}) {{ return {cexpr(e)}; }}' for i, e in enumerate(whole_results)
    ] + [f'extern "C" double q({given_names}) {{ return {cexpr(quotient)}; }}']
    headers = prelude() if where == "kernel" else _header("cpp_wrapper_prelude.h") + _header("cpp_sizes.h")
    library = load_library(build_library("\n".join([headers, *source]), name="printers", openmp=False))
    library.q.restype = ctypes.c_double
    for x, y, n in rows:
        arguments = [ctypes.c_int64(v) for v in (x, y, n)]
        for i, (expr, want) in enumerate(whole_results.items()):
            function = getattr(library, f"w{i}")
            function.restype = ctypes.c_int64
            assert function(*arguments) == want(x, y, n), f"{expr} at {x}, {n}: {cexpr(expr)}"
            assert eval(pexpr(expr), {"a": x, "b": y, "c": n}) == want(x, y, n), pexpr(expr)
        if y:
            assert library.q(*arguments) == x / y, f"{x} / {y}"


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
