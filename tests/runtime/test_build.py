"""The native build: libraries, caching, broken sources, missing and broken compilers, parallel builds."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memplan.ir.errors import CompilerError
from memplan.runtime import build as build_module
from memplan.runtime import toolchain as toolchain_module
from memplan.runtime.build import BuildJob, build_library, build_many, load_library
from memplan.runtime.cache import Cache
from memplan.runtime.toolchain import available_cpus, find_toolchain

SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Forget which compiler was found, before and after."""
    toolchain_module._found.clear()
    yield
    toolchain_module._found.clear()


def test_build_load_call(shared_cache: Cache) -> None:
    path = build_library(SOURCE, name="answer", cache=shared_cache)
    assert path.name.endswith("-answer.so")
    assert load_library(path).answer() == 42
    assert load_library(path) is load_library(path)


def test_second_build_compiles_nothing(shared_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_library(SOURCE, name="answer", cache=shared_cache)

    def never(*arguments: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build_module, "run_compiler", never)
    assert build_library(SOURCE, name="answer", cache=Cache(shared_cache.root)) == first
    with pytest.raises(AssertionError, match="compiled again"):
        build_library(SOURCE, name="answer", flags=("-DX",), cache=shared_cache)
    with pytest.raises(AssertionError, match="compiled again"):
        build_library(SOURCE, name="answer", native=False, cache=shared_cache)
    with pytest.raises(AssertionError, match="compiled again"):
        build_library(SOURCE, name="answer", extra_key=("torch 3",), cache=shared_cache)


def test_damaged_library_is_built_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    path = build_library(SOURCE, name="answer", cache=cache)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = build_library(SOURCE, name="answer", cache=cache)
    assert again.read_bytes() == whole  # the build is reproducible, so the name is the same


def test_refused_source_says_why_and_keeps_it(shared_cache: Cache) -> None:
    with pytest.raises(CompilerError, match="undeclared_thing") as caught:
        build_library("int f() { return undeclared_thing; }", name="broken", cache=shared_cache)
    kept = str(caught.value).split("source: ")[1].splitlines()[0]
    assert Path(kept).read_text() == "int f() { return undeclared_thing; }"
    assert "broken" in str(caught.value)


def test_include_dirs_flags_and_libraries(shared_cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "seven.h").write_text("#define SEVEN 7\n")
    lower = build_library('extern "C" int base() { return 10; }', name="base", cache=shared_cache)
    source = '#include "seven.h"\nextern "C" int base(); extern "C" int f() { return base() + SEVEN + EIGHT; }'
    path = build_library(
        source, name="uses", flags=("-DEIGHT=8",), libraries=(str(lower),), include_dirs=(str(tmp_path),),
        cache=shared_cache,
    )  # fmt: skip
    assert load_library(path).f() == 25


IEEE = """
extern "C" void ieee(const float* a, float* out, int n) {
    #pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = a[i] * 0.0f + (a[i] - a[i]);
}
extern "C" float contract(float a, float b, float c) { return a * b + c; }
extern "C" float order(float a, float b) { return (a + b) - a; }
extern "C" int is_nan(float a) { return a != a; }
"""


def test_flags_keep_ieee_results(shared_cache: Cache) -> None:
    library = load_library(build_library(IEEE, name="ieee", cache=shared_cache))
    values = (ctypes.c_float * 16)(*([-1.0, float("inf"), float("nan"), 0.0] * 4))
    out = (ctypes.c_float * 16)()
    library.ieee(values, out, 16)
    assert str(list(out)[:4]) == "[0.0, nan, nan, 0.0]"
    negative = (ctypes.c_float * 16)(*([-0.0] * 16))
    library.ieee(negative, out, 16)
    assert str(out[0]) == "0.0"
    for function in (library.contract, library.order):
        function.restype = ctypes.c_float
    x = 1.0 + 2.0**-12
    arguments = [ctypes.c_float(value) for value in (x, x, -(1.0 + 2.0**-11))]
    assert library.contract(*arguments) == 0.0  # a fused multiply-add would keep 2^-24
    assert library.order(ctypes.c_float(1e8), ctypes.c_float(1.0)) == 0.0
    assert library.is_nan(ctypes.c_float(float("nan"))) == 1


def test_build_many_keeps_order(shared_cache: Cache) -> None:
    jobs = [BuildJob(f'extern "C" int f() {{ return {number}; }}', f"number{number}") for number in range(5)]
    assert [load_library(path).f() for path in build_many(jobs, cache=shared_cache)] == list(range(5))
    assert build_many([], cache=shared_cache) == []


def test_build_many_finishes_the_others_and_raises_the_first_error(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    find_toolchain(cache=cache)
    before = cache.info().entries
    jobs = [BuildJob(source, f"job{number}") for number, source in enumerate(["int a;", "first!", "second!", "int b;"])]
    with pytest.raises(CompilerError, match="job1"):
        build_many(jobs, cache=cache)
    assert cache.info().entries == before + 2


@pytest.mark.usefixtures("forgetful")
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerError, match=r"g\+\+: not found") as caught:
        build_library(SOURCE, name="answer", cache=Cache(tmp_path / "c"))
    assert "apt install" in str(caught.value)
    assert "clang++: not found" in str(caught.value)


@pytest.mark.usefixtures("forgetful")
def test_named_compiler_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerError, match="no-such-compiler: not found"):
        build_library(SOURCE, name="answer", cache=Cache(tmp_path))


@pytest.mark.usefixtures("forgetful")
def test_broken_compiler_is_named_with_its_output(tmp_path: Path) -> None:
    broken = tmp_path / "broken-g++"
    broken.write_text(f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv: print('broken 1')\n"
                      "else: sys.exit('error: internal compiler error')\n")  # fmt: skip
    broken.chmod(0o755)
    with pytest.raises(CompilerError, match="internal compiler error"):
        build_library(SOURCE, name="answer", cache=Cache(tmp_path / "c"), cxx=str(broken))


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("written", [None, b"ELF for another machine"])
def test_a_compiler_that_builds_nothing_to_load_is_no_compiler(tmp_path: Path, written: bytes | None) -> None:
    broken = tmp_path / "silent-g++"
    writes = f"open(sys.argv[sys.argv.index('-o') + 1], 'wb').write({written!r})" if written else "pass"
    broken.write_text(
        f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv: print('silent 1')\nelse: {writes}\n"
    )
    broken.chmod(0o755)
    with pytest.raises(CompilerError, match="what it builds cannot be loaded"):
        build_library(SOURCE, name="answer", cache=Cache(tmp_path / "c"), cxx=str(broken))


@pytest.mark.usefixtures("forgetful")
def test_a_compiler_that_stops_writing_is_an_error(tmp_path: Path, shared_cache: Cache) -> None:
    real = find_toolchain(cache=shared_cache).command[0]
    broken = tmp_path / "sometimes-g++"
    broken.write_text(f'#!/bin/sh\ncase "$*" in *kernel.cpp*) ;; *) exec {real} "$@" ;; esac\n')
    broken.chmod(0o755)
    with pytest.raises(CompilerError, match="wrote nothing for answer"):
        build_library(SOURCE, name="answer", cache=Cache(tmp_path / "c"), cxx=str(broken))


@pytest.mark.usefixtures("forgetful")
def test_probe_is_kept_on_disk_and_missed_by_a_changed_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    cache = Cache(tmp_path / "c")
    real = find_toolchain(cache=cache)
    compiler = tmp_path / "my-g++"
    compiler.write_text(f'#!/bin/sh\nexec {real.command[0]} "$@"\n')
    compiler.chmod(0o755)
    probed: list[tuple[str, ...]] = []
    original = toolchain_module._try_flags
    monkeypatch.setattr(
        toolchain_module, "_try_flags", lambda command, version: probed.append(command) or original(command, version)
    )
    first = find_toolchain(str(compiler), cache=cache)
    assert len(probed) == 1
    toolchain_module._found.clear()
    assert find_toolchain(str(compiler), cache=cache) == first
    assert len(probed) == 1
    os.utime(compiler, (1, 1))
    toolchain_module._found.clear()
    find_toolchain(str(compiler), cache=cache)
    assert len(probed) == 2


def test_command_with_arguments(shared_cache: Cache) -> None:
    compiler = find_toolchain(cache=shared_cache).command[0]
    path = build_library(
        'extern "C" int f() { return FROM_CXX; }', name="args", cache=shared_cache, cxx=f"{compiler} -DFROM_CXX=5"
    )
    assert load_library(path).f() == 5


def test_unloadable_library(tmp_path: Path) -> None:
    (tmp_path / "bad.so").write_bytes(b"not a library")
    with pytest.raises(CompilerError, match=r"bad\.so"):
        load_library(tmp_path / "bad.so")


def test_available_cpus_follows_affinity() -> None:
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, everything)
    assert available_cpus() == len(everything)
