"""The C++ prelude against torch: special values, accuracy in ulps over all exponents, types, random numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from memplan.ir.loops import OPERATIONS

if TYPE_CHECKING:
    from .conftest import Loops

C_TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bool: "bool", torch.uint8: "uint8_t", torch.int8: "int8_t",
    torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t", torch.bfloat16: "mp::bfloat16",
    torch.float16: "mp::float16",
}  # fmt: skip


def all_bit_patterns(count: int, seed: int = 0) -> torch.Tensor:
    """Float32 of random bits: every exponent, quiet NaN, infinities and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    floats = bits.view(torch.float32)
    return torch.where(floats.isnan(), NAN, floats)


INF, NAN = float("inf"), float("nan")
SPECIAL_FLOATS = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, INF, -INF, NAN, 1e-45, -1e-45, 1e-40, -1e-40, 1.1754944e-38,
     3.4e38, -3.4e38, 1e20, -1e20, 5e8, 88.0, 88.7, 88.72284, 88.73, 89.5, -87.0, -87.5, -100.0, -103.97, -103.98,
     -104.5, 0.9999999, 1.0000001, -0.9999999, 1e-8, -1e-8, 0.95, 4.0, 4.1, 9.3, 10.05, 10.2, 11.0, 0.70710677,
     0.7071068, 16777216.0, 16777217.0, 2147483648.0, 255.0, 256.0, 65504.0, 65520.0, 65536.0, 6e-8, 2.9e-8, 3.0e-8,
     6.1e-5]
)  # fmt: skip


def ulps(result: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Distance of float32 results from float64 references, in units in the last place; infinite where the kinds
    (NaN, infinity, sign of zero) differ."""
    rounded = exact.to(torch.float32)
    spacing = torch.nextafter(rounded.abs(), torch.tensor(INF)).double() - rounded.abs().double()
    distance = (result.double() - exact).abs() / spacing
    same = (result == rounded) & (torch.signbit(result) == torch.signbit(rounded)) | (result.isnan() & rounded.isnan())
    plain = torch.isfinite(rounded) & torch.isfinite(result) & (rounded != 0)
    # A result next to the overflow or underflow threshold may fall on either side of it.
    edge = (rounded == 0) & (result.abs() <= 1e-44) & (exact != 0)
    return torch.where(plain, distance, torch.where(same | edge, 0.0, INF).double())


F32, F64, I32, I64, BOOL = torch.float32, torch.float64, torch.int32, torch.int64, torch.bool
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
SAMPLES = 1_000_000

Function = Callable[..., torch.Tensor]

# Largest error in ulps allowed; the functions of the first line are our own, the others libm's and libmvec's.
ACCURACY: dict[str, tuple[float, Function]] = {
    "exp": (1.1, torch.exp), "expm1": (1.5, torch.expm1), "log": (1.1, torch.log), "log1p": (1.5, torch.log1p),
    "tanh": (2.5, torch.tanh), "sigmoid": (2.5, torch.sigmoid), "erf": (1.5, torch.erf), "erfc": (5.0, torch.erfc),
    "sin": (4.0, torch.sin), "cos": (4.0, torch.cos), "tan": (4.0, torch.tan), "asin": (4.0, torch.asin),
    "acos": (4.0, torch.acos), "atan": (4.0, torch.atan), "sinh": (4.0, torch.sinh), "cosh": (4.0, torch.cosh),
    "asinh": (4.0, torch.asinh), "acosh": (4.0, torch.acosh), "atanh": (4.0, torch.atanh), "exp2": (4.0, torch.exp2),
    "log2": (4.0, torch.log2), "log10": (4.0, torch.log10), "sqrt": (0.5, torch.sqrt), "rsqrt": (2.0, torch.rsqrt),
}  # fmt: skip
EXACT_UNARY: dict[str, Function] = {
    "neg": torch.neg, "abs": torch.abs, "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc,
    "round": torch.round, "square": torch.square, "sign": torch.sign, "relu": torch.relu,
    "reciprocal": torch.reciprocal,
}  # fmt: skip
PREDICATES: dict[str, Function] = {
    "isnan": torch.isnan, "isinf": torch.isinf, "signbit": torch.signbit, "logical_not": torch.logical_not,
}  # fmt: skip


def _fmod(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """numpy's: eager's vector version gives NaN for subnormal divisors."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.fmod(a.numpy(), b.numpy()))


def _mod(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.mod(a.numpy(), b.numpy()))


EXACT_BINARY: dict[str, Function] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin, "copysign": torch.copysign, "fmod": _fmod,
    "mod": _mod, "floordiv": torch.floor_divide, "nextafter": torch.nextafter,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}  # fmt: skip
COMPARISONS: dict[str, Function] = {
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_xor": torch.logical_xor,
}  # fmt: skip
INTEGER_BINARY: dict[str, Function] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum,
    "fmod": torch.fmod, "mod": torch.remainder, "floordiv": torch.floor_divide,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "bitwise_and": torch.bitwise_and,
    "bitwise_or": torch.bitwise_or, "bitwise_xor": torch.bitwise_xor,
    "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift, "pow": torch.pow,
}  # fmt: skip
INTEGER_UNARY: dict[str, Function] = {
    "neg": torch.neg, "abs": torch.abs, "bitwise_not": torch.bitwise_not, "square": torch.square, "sign": torch.sign,
    "relu": torch.relu, "floor": lambda a: a, "round": lambda a: a,
}  # fmt: skip


def _suffix(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(scope="module")
def loops(loops_type: type[Loops]) -> Loops:
    made = loops_type()
    for name in [*ACCURACY, *EXACT_UNARY]:
        for dtype in (F32, F64):
            made.map(f"{name}_{_suffix(dtype)}", f"mp::{name}(a)", (dtype,), dtype)
    for name in [*EXACT_BINARY, "pow", "atan2", "hypot"]:
        for dtype in (F32, F64):
            made.map(f"{name}_{_suffix(dtype)}", f"mp::{name}(a, b)", (dtype, dtype), dtype)
    for name in PREDICATES:
        made.map(f"{name}_float32", f"mp::{name}(a)", (F32,), BOOL)
    for name in COMPARISONS:
        made.map(f"{name}_float32", f"mp::{name}(a, b)", (F32, F32), BOOL)
    for dtype in INTEGERS:
        for name in INTEGER_BINARY:
            made.map(f"{name}_{_suffix(dtype)}", f"mp::{name}(a, b)", (dtype, dtype), dtype)
        for name in INTEGER_UNARY:
            made.map(f"{name}_{_suffix(dtype)}", f"mp::{name}(a)", (dtype,), dtype)
    made.map("where_float32", "mp::where(a != 0.0f, a, b)", (F32, F32), F32)
    made.map("fma_float32", "mp::fma(a, b, c)", (F32, F32, F32), F32)
    made.map("not_bool", "mp::bitwise_not(a)", (BOOL,), BOOL)
    for source in C_TYPES:
        for target in C_TYPES:
            half = target in (torch.float16, torch.bfloat16)
            expression = f"mp::rounded<{C_TYPES[target]}>(float(a))" if half else f"mp::cast<{C_TYPES[target]}>(a)"
            made.map(f"cast_{_suffix(source)}_{_suffix(target)}", expression, (source,), target)
    made.build()
    return made


@pytest.fixture(scope="module")
def portable(loops_type: type[Loops]) -> Loops:
    """Without -march=native: no FMA, no AVX."""
    made = loops_type()
    for name in ["exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "erfc"]:
        made.map(f"{name}_float32", f"mp::{name}(a)", (F32,), F32)
    made.build(native=False)
    return made


def _same(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    if result.is_floating_point():
        number = ~result.isnan()
        assert torch.equal(torch.signbit(result)[number], torch.signbit(expected)[number])


def test_every_operation_has_a_function(prelude_text: str, special_text: str) -> None:
    text = prelude_text + special_text
    missing = [name for name in OPERATIONS if not re.search(rf"\b{name}\(|[(]{name}[,)]", text)]
    assert missing == []


def _own_distance(name: str, values: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    exact = ACCURACY[name][1](values.double())
    distance = ulps(result, exact)
    if name == "sigmoid":  # as eager's: no subnormal results
        distance = torch.where(values < -87.0, 0.0, distance)
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=2e-38, equal_nan=True)
    if name == "erfc":
        distance = torch.where((exact > 0) & (exact < 2.0**-120), 0.0, distance)
        torch.testing.assert_close(result.double(), exact, rtol=2e-6, atol=2e-44, equal_nan=True)
    return distance


@pytest.mark.parametrize("name", ACCURACY)
def test_accuracy_in_ulps(loops: Loops, name: str) -> None:
    allowed, reference = ACCURACY[name]
    normal = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(1)) * 8
    values = torch.cat([SPECIAL_FLOATS, all_bit_patterns(SAMPLES), normal])
    result = loops(f"{name}_float32", values, output=F32)
    exact = reference(values.double())
    distance = _own_distance(name, values, result)
    worst = int(distance.argmax())
    assert distance[worst] <= allowed, (values[worst].item(), result[worst].item(), exact[worst].item())


@pytest.mark.parametrize("name", ACCURACY)
def test_same_value_same_result_in_double_and_tail(loops: Loops, name: str) -> None:
    _, reference = ACCURACY[name]
    values = torch.cat([SPECIAL_FLOATS, torch.randn(1000) * 4]).double()
    torch.testing.assert_close(
        loops(f"{name}_float64", values, output=F64), reference(values), rtol=3e-15, atol=1e-300, equal_nan=True
    )


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "erfc"])
def test_own_functions_do_not_depend_on_the_position(loops: Loops, name: str) -> None:
    values = torch.cat([SPECIAL_FLOATS, all_bit_patterns(1000)])
    whole = loops(f"{name}_float32", values, output=F32)
    single = torch.cat([loops(f"{name}_float32", values[i : i + 1], output=F32) for i in range(len(values))])
    _same(single, whole)


@pytest.mark.parametrize("name", EXACT_UNARY)
def test_exact_unary(loops: Loops, name: str) -> None:
    values = torch.cat([SPECIAL_FLOATS, all_bit_patterns(20_000), torch.arange(-8, 8) + 0.5])
    for dtype in (F32, F64):
        result = loops(f"{name}_{_suffix(dtype)}", values.to(dtype), output=dtype)
        expected = EXACT_UNARY[name](values.to(dtype))
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        if name not in ("relu", "sign"):
            _same(result, expected)


def _pairs() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.cartesian_prod(SPECIAL_FLOATS, SPECIAL_FLOATS).unbind(1)
    generator = torch.Generator().manual_seed(3)
    small = torch.randint(-20, 20, (2, 2000), generator=generator).float()
    return (
        torch.cat([a, all_bit_patterns(5000, 1), small[0], torch.randn(2000, generator=generator)]).contiguous(),
        torch.cat([b, all_bit_patterns(5000, 2), small[1], torch.randn(2000, generator=generator)]).contiguous(),
    )


@pytest.mark.parametrize("name", EXACT_BINARY)
def test_exact_binary(loops: Loops, name: str) -> None:
    for dtype in (F32, F64):
        a, b = (side.to(dtype) for side in _pairs())
        result = loops(f"{name}_{_suffix(dtype)}", a, b, output=dtype)
        expected = EXACT_BINARY[name](a, b)
        # Of maximum(0.0, -0.0) either zero will do; where division is not defined, eager's own kernels disagree.
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["pow", "atan2", "hypot"])
def test_binary_of_libm(loops: Loops, name: str) -> None:
    a, b = _pairs()
    exact = getattr(torch, name)(a.double(), b.double())
    distance = ulps(loops(f"{name}_float32", a, b, output=F32), exact)
    worst = int(distance.argmax())
    assert distance[worst] <= 4.0, (a[worst].item(), b[worst].item(), exact[worst].item())
    double = loops(f"{name}_float64", a.double(), b.double(), output=F64)
    torch.testing.assert_close(double, exact, rtol=1e-14, atol=1e-300, equal_nan=True)


@pytest.mark.parametrize("name", PREDICATES)
def test_predicates(loops: Loops, name: str) -> None:
    assert torch.equal(loops(f"{name}_float32", SPECIAL_FLOATS, output=BOOL), PREDICATES[name](SPECIAL_FLOATS))


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(loops: Loops, name: str) -> None:
    a, b = _pairs()
    assert torch.equal(loops(f"{name}_float32", a, b, output=BOOL), COMPARISONS[name](a, b))


def test_where_fma_and_bool(loops: Loops) -> None:
    a, b = _pairs()
    _same(loops("where_float32", a, b, output=F32), torch.where(a != 0, a, b))
    x = torch.tensor([1 + 2.0**-12])
    assert loops("fma_float32", x, x, -(x * x), output=F32).item() == 2.0**-24
    assert loops("not_bool", torch.tensor([True, False]), output=BOOL).tolist() == [False, True]


def _integers(dtype: torch.dtype) -> torch.Tensor:
    limits = torch.iinfo(dtype)
    edges = [0, 1, 2, 3, 7, 13, 63, 64, limits.max, limits.max - 1, limits.min, limits.max // 2]
    return torch.tensor(edges + [-edge for edge in edges[1:8] if limits.min < 0], dtype=dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", INTEGER_BINARY)
def test_integers(loops: Loops, name: str, dtype: torch.dtype) -> None:
    a, b = (side.contiguous() for side in torch.cartesian_prod(_integers(dtype), _integers(dtype)).unbind(1))
    if name in ("fmod", "mod", "floordiv", "truncdiv"):  # eager raises for 0, and traps for the least number by -1
        keep = (b != 0) & ~((a == torch.iinfo(dtype).min) & (b == -1))
        a, b = a[keep], b[keep]
    if name == "pow":
        a, b = a[b >= 0], b[b >= 0]
    result = loops(f"{name}_{_suffix(dtype)}", a, b, output=dtype)
    assert torch.equal(result, INTEGER_BINARY[name](a, b))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", INTEGER_UNARY)
def test_integers_unary(loops: Loops, name: str, dtype: torch.dtype) -> None:
    a = _integers(dtype)
    assert torch.equal(loops(f"{name}_{_suffix(dtype)}", a, output=dtype), INTEGER_UNARY[name](a))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_division_never_traps(loops: Loops, dtype: torch.dtype) -> None:
    a = torch.tensor([torch.iinfo(dtype).min, 5, torch.iinfo(dtype).min], dtype=dtype)
    b = torch.tensor([0, 0, 255 if dtype is torch.uint8 else -1], dtype=dtype)
    for name in ("fmod", "mod", "floordiv", "truncdiv"):
        result = loops(f"{name}_{_suffix(dtype)}", a, b, output=dtype)
        assert result.shape == (3,)
    assert loops(f"mod_{_suffix(dtype)}", a, b, output=dtype)[1] == 5


@pytest.mark.parametrize("target", C_TYPES)
@pytest.mark.parametrize("source", C_TYPES)
def test_casts(loops: Loops, source: torch.dtype, target: torch.dtype) -> None:
    if source.is_floating_point and target.is_floating_point:
        values = torch.cat([SPECIAL_FLOATS, all_bit_patterns(100_000), torch.arange(0, 65536).float() * 2.0**-25])
    else:
        unsigned = torch.uint8 in (source, target)
        values = torch.tensor(
            [0, 1, 2, 100, 127, *([] if unsigned and source is torch.uint8 else [-1, -100]), 0.75, 3.5]
        )
    values = values.to(source)
    _same(loops(f"cast_{_suffix(source)}_{_suffix(target)}", values, output=target), values.to(target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_half_values(loops: Loops, dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = loops(f"cast_{_suffix(dtype)}_float32", values, output=F32)
    _same(wide, values.float())
    _same(loops(f"cast_float32_{_suffix(dtype)}", wide, output=dtype), values)
    above = torch.nextafter(wide, torch.tensor(math.inf))  # next to every value, and next to the middle of two
    middle = (wide + torch.roll(wide, -1)) / 2
    for near in (above, middle, torch.nextafter(middle, torch.tensor(math.inf))):
        _same(loops(f"cast_float32_{_suffix(dtype)}", near, output=dtype), near.to(dtype))


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "erfc"])
def test_accuracy_without_fused_multiply_add(portable: Loops, name: str) -> None:
    values = torch.cat([SPECIAL_FLOATS, all_bit_patterns(50_000), torch.linspace(-20, 20, 50_000)])
    result = portable(f"{name}_float32", values, output=F32)
    distance = _own_distance(name, values, result)
    assert distance.max() <= ACCURACY[name][0]
