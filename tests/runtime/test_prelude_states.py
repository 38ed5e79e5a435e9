"""The C++ prelude's random numbers, reduction states, atomics and special functions; that its loops vectorise."""

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
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.special
import torch

from memplan.runtime.build import BuildJob, compile_command
from memplan.runtime.toolchain import find_toolchain

if TYPE_CHECKING:
    from .conftest import Loops

F32, F64, I32, I64 = torch.float32, torch.float64, torch.int32, torch.int64
SAMPLES = 1_000_000

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


@pytest.fixture(scope="module")
def loops(loops_type: type[Loops]) -> Loops:
    made = loops_type(EXTRA)
    for name in SCALAR_SPECIAL:
        made.map(f"{name}_float32", f"mp::{name}(a)", (F32,), F32)
        made.map(f"{name}_float64", f"mp::{name}(a)", (F64,), F64)
    for name, expression, output in [
        ("philox_a", "int32_t(mp::philox(a, b).a)", I32), ("philox_b", "int32_t(mp::philox(a, b).b)", I32),
        ("rand", "mp::rand(a, b)", F32), ("randn", "mp::randn(a, b)", F32), ("randint64", "mp::randint64(a, b)", I64),
    ]:  # fmt: skip
        made.map(name, expression, (I64, I64), output)
    made.build()
    return made


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
    """Philox 2x32-10 in Python's integers, from the paper's definition."""
    mask = 2**32 - 1
    c = [offset & mask, (offset ^ seed) >> 32]
    for k in range(10):
        product = 0xD256D193 * c[0]
        c = [(product >> 32) ^ c[1] ^ (seed + k * 0x9E3779B9) & mask, product & mask]
    return c


def test_philox_by_definition(loops: Loops) -> None:
    pairs = [(0, 0), (1, 0), (0, 1), (2**63 - 1, 2**40 + 5), (123456789, 2**32), (42, 2**31)]
    seeds, offsets = (torch.tensor(side) for side in zip(*pairs, strict=True))
    words = [loops(f"philox_{word}", seeds, offsets, output=I32).numpy().view(np.uint32) for word in "ab"]
    for position, pair in enumerate(pairs):
        assert [int(word[position]) for word in words] == _reference_philox(*pair)
    both = (words[1].astype(np.uint64) << np.uint64(32)) | words[0]
    assert np.array_equal(loops("randint64", seeds, offsets, output=I64).numpy().view(np.uint64), both)


TRITON_SCRIPT = """
import sys, torch, triton, triton.language as tl
{functions}
@triton.jit
def kernel(out_i, out_u, out_n, seeds, start, n: tl.constexpr):
    offset = start + tl.arange(0, n).to(tl.int64)
    at = tl.arange(0, n)
    seed = tl.load(seeds)
    tl.store(out_i + at, random_int64(seed, offset))
    tl.store(out_u + at, random_uniform(seed, offset))
    tl.store(out_n + at, random_normal(seed, offset))
results = []
for seed, start in [(0, 0), (12345, 7), (2**40 + 3, 2**33), (-5, 1)]:
    i, u, x = torch.empty(512, dtype=torch.int64), torch.empty(512), torch.empty(512)
    kernel[(1,)](i, u, x, torch.tensor([seed]), start, 512)
    results.append((seed, start, i, u, x))
torch.save(results, sys.argv[1])
"""


def test_random_numbers_are_the_same_in_both_languages(loops: Loops, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from memplan.codegen.triton_device_functions import DEVICE_FUNCTIONS

    names = ("random_int64", "random_uniform", "random_normal")
    script = tmp_path / "script.py"
    script.write_text(TRITON_SCRIPT.format(functions="".join(f"@triton.jit{DEVICE_FUNCTIONS[n]}" for n in names)))
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path / "out")], check=True, env=environment)
    for seed, start, integers, uniform, normal in torch.load(tmp_path / "out"):
        seeds, offsets = torch.full((512,), seed), torch.arange(512) + start
        assert torch.equal(loops("randint64", seeds, offsets, output=I64), integers)
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
def test_vectorises(tmp_path: Path, prelude_text: str, expression: str) -> None:
    assert _vectorises(prelude_text + VECTORISED.replace("EXPRESSION", expression), tmp_path)


@pytest.mark.skipif("g++" not in find_toolchain().version, reason="asks g++ for its report")
@pytest.mark.parametrize("dtype", ["mp::bfloat16", "mp::float16"])
def test_half_loops_vectorise(tmp_path: Path, prelude_text: str, dtype: str) -> None:
    assert _vectorises(prelude_text + HALVES.replace("TYPE", dtype), tmp_path)


@pytest.mark.skipif("g++" not in find_toolchain().version, reason="asks g++ for its report")
def test_the_report_tells_a_scalar_loop(tmp_path: Path, prelude_text: str) -> None:
    assert not _vectorises(prelude_text + VECTORISED.replace("EXPRESSION", "mp::nextafter(a[i], b[i])"), tmp_path)


def _vectorises(source: str, folder: Path) -> bool:
    """Whether g++ vectorised the loop over the elements (it is the only one; inlined lines are reported as theirs)."""
    (folder / "f.cpp").write_text(source)
    command = [*compile_command(BuildJob(source, "f"), find_toolchain()), "-fopt-info-vec", "-c", "f.cpp", "-o", "f.o"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return "loop vectorized" in done.stderr


def test_prelude_compiles_fast(tmp_path: Path, prelude_text: str) -> None:
    (tmp_path / "f.cpp").write_text(prelude_text + VECTORISED.replace("EXPRESSION", "a[i] + b[i]"))
    command = compile_command(BuildJob("", "f"), find_toolchain())
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([*command, "-c", "f.cpp", "-o", "f.o"], cwd=tmp_path, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0  # 0.1 s on an idle machine; a <cmath> that slipped in would not be seen on a loaded one
    assert re.findall(r"#include\s*<(.*?)>", prelude_text) == ["stdint.h"]
