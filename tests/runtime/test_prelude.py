"""The C++ prelude against torch: special values, accuracy in ulps over all exponents, types, random numbers."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch

from memplan.ir.loops import OPERATIONS
from memplan.runtime.build import BuildJob, build_library, compile_command, load_library
from memplan.runtime.toolchain import find_toolchain

FOLDER = Path(__file__).resolve().parents[2] / "codegen"
PRELUDE = (FOLDER / "cpp_prelude.h").read_text(encoding="utf-8").replace("#pragma once\n", "")
SPECIAL = (FOLDER / "cpp_special.h").read_text(encoding="utf-8").replace("#pragma once\n", "")

C_TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bool: "bool", torch.uint8: "uint8_t", torch.int8: "int8_t",
    torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t", torch.bfloat16: "mp::bfloat16",
    torch.float16: "mp::float16",
}  # fmt: skip


class Loops:
    """Collects loops, builds them once into one library, and calls them by name."""

    def __init__(self, extra: str = "") -> None:
        self.lines = [PRELUDE, SPECIAL, extra, 'extern "C" {']
        self.known: set[str] = set()

    def map(self, name: str, expression: str, inputs: tuple[torch.dtype, ...], output: torch.dtype) -> None:
        """A loop ``out[i] = expression`` where ``a``, ``b``, ``c`` are the inputs' elements and ``i`` the index."""
        names = "abc"[: len(inputs)]
        parameters = "".join(
            f"const {C_TYPES[t]}* __restrict p{n}, " for n, t in zip(names, inputs, strict=True)
        )  # fmt: skip
        loads = " ".join(f"auto {n} = mp::load(&p{n}[i]);" for n in names)
        half = output in (torch.float16, torch.bfloat16)
        store = f"mp::store(&out[i], {'float' if half else C_TYPES[output]}({expression}));"
        self.lines.append(
            f"void {name}({parameters}{C_TYPES[output]}* __restrict out, int64_t n) {{\n"
            f"#pragma omp simd\nfor (int64_t i = 0; i < n; ++i) {{ {loads} {store} }} }}"
        )
        self.known.add(name)

    def build(self, native: bool = True) -> ctypes.CDLL:
        source = "\n".join([*self.lines, "}"])
        self.library = load_library(build_library(source, name="prelude_test", native=native))
        return self.library

    def __call__(self, name: str, *inputs: torch.Tensor, output: torch.dtype, size: int | None = None) -> torch.Tensor:
        assert name in self.known
        count = inputs[0].numel() if size is None else size
        out = torch.empty(count, dtype=output)
        function = getattr(self.library, name)
        pointers = [ctypes.c_void_p(t.contiguous().data_ptr()) for t in (*inputs, out)]
        function(*pointers, ctypes.c_int64(count))
        return out


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
SCALAR_SPECIAL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "lgamma": scipy.special.gammaln, "digamma": scipy.special.digamma, "erfinv": scipy.special.erfinv,
    "i0": scipy.special.i0, "i1": scipy.special.i1, "i0e": scipy.special.i0e, "i1e": scipy.special.i1e,
    "ndtri": scipy.special.ndtri, "log_ndtr": scipy.special.log_ndtr, "bessel_j0": scipy.special.j0,
    "bessel_j1": scipy.special.j1,
}  # fmt: skip

EXTRA = """
extern "C" void atomics_float(float* t, const int64_t* where, const float* v, int64_t n) {
#pragma omp parallel for num_threads(4)
    for (int64_t i = 0; i < n; ++i) mp::atomic_add(&t[where[i]], v[i]);
}
extern "C" void atomics_half(mp::float16* t, const int64_t* where, const float* v, int64_t n) {
#pragma omp parallel for num_threads(4)
    for (int64_t i = 0; i < n; ++i) mp::atomic_add(&t[where[i]], mp::float16(v[i]));
}
extern "C" void atomics_max(float* t, const int64_t* where, const float* v, int64_t n) {
#pragma omp parallel for num_threads(4)
    for (int64_t i = 0; i < n; ++i) mp::atomic_max(&t[where[i]], v[i]);
}
extern "C" void atomics_min(int8_t* t, const int64_t* where, const int8_t* v, int64_t n) {
#pragma omp parallel for num_threads(4)
    for (int64_t i = 0; i < n; ++i) mp::atomic_min(&t[where[i]], v[i]);
}
extern "C" void atomics_int(int64_t* t, const int64_t* where, const int64_t* v, int64_t n) {
#pragma omp parallel for num_threads(4)
    for (int64_t i = 0; i < n; ++i) mp::atomic_add(&t[where[i]], v[i]);
}
extern "C" void row(const float* a, double* out, int64_t n) {
    mp::Welford<float> one{0, 0, 0}, wide{0, 0, 0};
    float greatest = -mp::infinity, least = mp::infinity;
    mp::Arg<float> high{0, -1}, low{0, -1};
    for (int64_t i = 0; i < n; ++i) {
        one = mp::welford_update(one, a[i]);
        high = mp::argmax_combine(high, mp::Arg<float>{a[i], i});
        low = mp::argmin_combine(low, mp::Arg<float>{a[i], i});
    }
#pragma omp simd reduction(mp_welford : wide)
    for (int64_t i = 0; i < n; ++i) wide = mp::welford_update(wide, a[i]);
#pragma omp simd reduction(mp_max : greatest) reduction(mp_min : least)
    for (int64_t i = 0; i < n; ++i) { greatest = mp::maximum(greatest, a[i]); least = mp::minimum(least, a[i]); }
    double all[] = {one.mean, one.m2, one.weight, wide.mean, wide.m2, wide.weight, greatest, least,
                    double(high.index), double(low.index)};
    for (int k = 0; k < 10; ++k) out[k] = all[k];
}
"""


def _suffix(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(scope="module")
def loops() -> Loops:
    made = Loops(EXTRA)
    for name in [*ACCURACY, *EXACT_UNARY, *SCALAR_SPECIAL]:
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
    for name, expression, output in [
        ("philox_a", "int32_t(mp::philox(a, b).a)", I32), ("philox_b", "int32_t(mp::philox(a, b).b)", I32),
        ("philox_c", "int32_t(mp::philox(a, b).c)", I32), ("philox_d", "int32_t(mp::philox(a, b).d)", I32),
        ("rand", "mp::rand(a, b)", F32), ("randn", "mp::randn(a, b)", F32), ("randint64", "mp::randint64(a, b)", I64),
    ]:  # fmt: skip
        made.map(name, expression, (I64, I64), output)
    made.build()
    return made


@pytest.fixture(scope="module")
def portable() -> Loops:
    """Without -march=native: no FMA, no AVX."""
    made = Loops()
    for name in ["exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "erfc"]:
        made.map(f"{name}_float32", f"mp::{name}(a)", (F32,), F32)
    made.build(native=False)
    return made


def _same(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    if result.is_floating_point():
        number = ~result.isnan()
        assert torch.equal(torch.signbit(result)[number], torch.signbit(expected)[number])


def test_every_operation_has_a_function() -> None:
    text = PRELUDE + SPECIAL
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


@pytest.mark.parametrize("name", SCALAR_SPECIAL)
def test_special_functions(loops: Loops, name: str) -> None:
    points = [0.0, 1.0, -1.0, 0.5, -0.5, 1e-12, 1e-5, 0.1, 0.9, 0.999, 0.999999, 1.5, 2.0, 3.7, -3.7, 9.99, 10.0,
              25.0, 29.9, 30.1, 50.0, -50.0, 300.0, 700.0, -2.0, math.inf, -math.inf, math.nan, -0.3, -30.0,
              1e-300]  # fmt: skip
    values = torch.cat([torch.tensor(points, dtype=F64), torch.rand(500, dtype=F64), torch.randn(500, dtype=F64) * 5])
    expected = torch.from_numpy(SCALAR_SPECIAL[name](values.numpy()))
    if name in ("lgamma", "digamma"):  # at the poles, eager's convention
        expected = getattr(torch, name)(values)
    result = loops(f"{name}_float64", values, output=F64)
    atol = 1e-13 if name in ("digamma", "lgamma", "bessel_j0", "bessel_j1") else 1e-307
    torch.testing.assert_close(result, expected, rtol=2e-12, atol=atol, equal_nan=True)
    single = loops(f"{name}_float32", values.float(), output=F32)
    assert torch.equal(single.isnan(), loops(f"{name}_float64", values.float().double(), output=F64).isnan())


def _reference_philox(seed: int, offset: int) -> list[int]:
    """Philox 4x32-10 in Python's integers, from the paper's definition."""
    mask = 2**32 - 1
    c, k = [offset & mask, offset >> 32, 0, 0], [seed & mask, seed >> 32]
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right & mask, (left >> 32) ^ c[3] ^ k[1], left & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def test_philox_by_definition(loops: Loops) -> None:
    pairs = [(0, 0), (1, 0), (0, 1), (2**63 - 1, 2**40 + 5), (123456789, 2**32), (42, 2**31)]
    seeds, offsets = (torch.tensor(side) for side in zip(*pairs, strict=True))
    words = [loops(f"philox_{word}", seeds, offsets, output=I32).numpy().view(np.uint32) for word in "abcd"]
    for position, pair in enumerate(pairs):
        assert [int(word[position]) for word in words] == _reference_philox(*pair)
    both = (words[1].astype(np.uint64) << np.uint64(32)) | words[0]
    assert np.array_equal(loops("randint64", seeds, offsets, output=I64).numpy().view(np.uint64), both)


TRITON_SCRIPT = """
import sys, torch, triton, triton.language as tl
@triton.jit
def kernel(out_i, out_u, out_n, seed, start, n: tl.constexpr):
    at = tl.arange(0, n)
    offset = start + at.to(tl.int64)
    a, b, c, d = tl.randint4x(seed, offset)
    tl.store(out_i + at, a.to(tl.int32, bitcast=True)); tl.store(out_i + n + at, b.to(tl.int32, bitcast=True))
    tl.store(out_i + 2 * n + at, c.to(tl.int32, bitcast=True))
    tl.store(out_i + 3 * n + at, d.to(tl.int32, bitcast=True))
    tl.store(out_u + at, tl.rand(seed, offset)); tl.store(out_n + at, tl.randn(seed, offset))
results = []
for seed, start in [(0, 0), (12345, 7), (2**40 + 3, 2**33)]:
    i, u, x = torch.empty(4, 512, dtype=torch.int32), torch.empty(512), torch.empty(512)
    kernel[(1,)](i, u, x, seed, start, 512)
    results.append((seed, start, i, u, x))
torch.save(results, sys.argv[1])
"""


def test_random_numbers_are_tritons(loops: Loops, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "script.py"
    script.write_text(TRITON_SCRIPT)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path / "out")], check=True, env=environment)
    for seed, start, integers, uniform, normal in torch.load(tmp_path / "out"):
        seeds, offsets = torch.full((512,), seed), torch.arange(512) + start
        for number, word in enumerate("abcd"):
            assert torch.equal(loops(f"philox_{word}", seeds, offsets, output=I32), integers[number])
        assert torch.equal(loops("rand", seeds, offsets, output=F32), uniform)
        torch.testing.assert_close(loops("randn", seeds, offsets, output=F32), normal, rtol=2e-6, atol=2e-6)


def test_random_numbers_are_distributed_as_they_should(loops: Loops) -> None:
    seeds, offsets = torch.full((SAMPLES,), 7), torch.arange(SAMPLES)
    uniform = loops("rand", seeds, offsets, output=F32)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.double().mean() - 0.5) < 2e-3
    normal = loops("randn", seeds, offsets, output=F32).double()
    assert abs(normal.mean()) < 5e-3
    assert abs(normal.var() - 1) < 1e-2


@pytest.mark.parametrize("size", [1, 7, 64, 1003])
def test_row_reductions(loops: Loops, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) + 100
    out = torch.empty(10, dtype=F64)

    def run() -> list[float]:
        loops.library.row(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(size))
        return out.tolist()

    got = run()
    exact = values.double()
    for mean, m2, weight in (got[:3], got[3:6]):
        assert math.isclose(mean, exact.mean(), rel_tol=1e-6)
        assert math.isclose(m2, exact.var(unbiased=False) * size, rel_tol=1e-4, abs_tol=1e-9)
        assert weight == size
    assert got[6:8] == [exact.max(), exact.min()]
    assert got[8:] == [exact.argmax(), exact.argmin()]
    values[size // 2] = math.nan
    got = run()
    assert all(math.isnan(value) for value in got[6:8])
    assert got[8:] == [size // 2] * 2
    values.fill_(3.0)
    assert run()[8:] == [0, 0]
    values.fill_(-math.inf)
    assert run()[6:] == [-math.inf, -math.inf, 0, 0]


def test_atomics(loops: Loops) -> None:
    count = 100_000
    generator = torch.Generator().manual_seed(0)
    where = torch.randint(0, 16, (count,), generator=generator)

    def run(name: str, target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (target, where, values)]
        getattr(loops.library, name)(*pointers, ctypes.c_int64(count))
        return target

    whole = torch.randint(-4, 5, (count,), generator=generator)
    expected = torch.zeros(16, dtype=I64).index_add(0, where, whole)
    assert torch.equal(run("atomics_float", torch.zeros(16), whole.float()), expected.float())
    assert torch.equal(run("atomics_int", torch.zeros(16, dtype=I64), whole), expected)
    ones = torch.where(torch.arange(count) < 30_000, 1.0, 0.0)
    halves = torch.zeros(16).index_add(0, where, ones).half()
    assert halves.max() <= 2048  # where float16 still counts exactly
    assert torch.equal(run("atomics_half", torch.zeros(16, dtype=torch.float16), ones), halves)
    values = torch.randn(count, generator=generator)
    greatest = torch.full((16,), -math.inf).scatter_reduce(0, where, values, "amax")
    assert torch.equal(run("atomics_max", torch.full((16,), -math.inf), values), greatest)
    small = whole.to(torch.int8)
    least = torch.full((16,), 100, dtype=torch.int8).scatter_reduce(0, where, small, "amin")
    assert torch.equal(run("atomics_min", torch.full((16,), 100, dtype=torch.int8), small), least)


HALVES = """
extern "C" void halves(const TYPE* __restrict a, TYPE* __restrict out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) mp::store(&out[i], mp::rounded<TYPE>(mp::load(&a[i]) + 1.0f));
}
"""
VECTORISED = """
extern "C" void f(const float* __restrict a, const float* __restrict b, float* __restrict out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = EXPRESSION;
}
"""


@pytest.mark.skipif("g++" not in find_toolchain().version, reason="asks g++ for its report")
@pytest.mark.parametrize(
    "expression",
    ["mp::exp(a[i])", "mp::expm1(a[i])", "mp::log(a[i])", "mp::log1p(a[i])", "mp::tanh(a[i])", "mp::sigmoid(a[i])",
     "mp::erf(a[i])", "mp::erfc(a[i])", "mp::rsqrt(a[i])", "mp::floor(a[i])", "mp::round(a[i])", "mp::sign(a[i])",
     "mp::maximum(a[i], b[i])", "mp::fmin(a[i], b[i])", "mp::rand(3, i)", "float(mp::float16(a[i]))",
     "float(mp::bfloat16(a[i]))", "mp::where(a[i] > b[i], mp::exp(a[i]), b[i])", "mp::relu(a[i])",
     "float(mp::cast<int32_t>(a[i]))", "mp::square(a[i]) * mp::copysign(a[i], b[i])"],
)  # fmt: skip
def test_vectorises(tmp_path: Path, expression: str) -> None:
    assert _vectorises(PRELUDE + VECTORISED.replace("EXPRESSION", expression), tmp_path)


@pytest.mark.skipif("g++" not in find_toolchain().version, reason="asks g++ for its report")
@pytest.mark.parametrize("dtype", ["mp::bfloat16", "mp::float16"])
def test_half_loops_vectorise(tmp_path: Path, dtype: str) -> None:
    assert _vectorises(PRELUDE + HALVES.replace("TYPE", dtype), tmp_path)


@pytest.mark.skipif("g++" not in find_toolchain().version, reason="asks g++ for its report")
def test_the_report_tells_a_scalar_loop(tmp_path: Path) -> None:
    assert not _vectorises(PRELUDE + VECTORISED.replace("EXPRESSION", "mp::nextafter(a[i], b[i])"), tmp_path)


def _vectorises(source: str, folder: Path) -> bool:
    """Whether g++ vectorised the loop over the elements (it is the only one; inlined lines are reported as theirs)."""
    (folder / "f.cpp").write_text(source)
    command = [*compile_command(BuildJob(source, "f"), find_toolchain()), "-fopt-info-vec", "-c", "f.cpp", "-o", "f.o"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return "loop vectorized" in done.stderr


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "erfc"])
def test_accuracy_without_fused_multiply_add(portable: Loops, name: str) -> None:
    values = torch.cat([SPECIAL_FLOATS, all_bit_patterns(50_000), torch.linspace(-20, 20, 50_000)])
    result = portable(f"{name}_float32", values, output=F32)
    distance = _own_distance(name, values, result)
    assert distance.max() <= ACCURACY[name][0]


def test_prelude_compiles_fast(tmp_path: Path) -> None:
    (tmp_path / "f.cpp").write_text(PRELUDE + VECTORISED.replace("EXPRESSION", "a[i] + b[i]"))
    command = compile_command(BuildJob("", "f"), find_toolchain())
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([*command, "-c", "f.cpp", "-o", "f.o"], cwd=tmp_path, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0  # 0.1 s on an idle machine; a <cmath> that slipped in would not be seen on a loaded one
    assert re.findall(r"#include\s*<(.*?)>", PRELUDE) == ["stdint.h"]
