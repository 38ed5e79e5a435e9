"""Building: in processes and here, into Triton's cache, and what fails."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sample_kernels as s
import torch

from memplan.codegen.triton_kernel import emit_triton
from memplan.ir.canonical import canonicalize
from memplan.ir.errors import CompilerError
from memplan.runtime.build import build_library
from memplan.runtime.cuda_launch import build_module
from memplan.runtime.triton_build import Build, Compiled, Target, compile_builds, compile_kernels, compile_one
from memplan.runtime.triton_launch import Launcher, make_launcher


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def emitted(n: int):
    return emit_triton(canonicalize(s.add_relu(n)), name=f"add_relu_{n}", hints={})


def test_processes_fill_the_cache_that_is_loaded_from(cache: Path) -> None:
    """Each kernel is compiled once: what a process made is found here under the same key."""
    kernels = [emitted(1000 * k + 7) for k in range(1, 7)]
    built = compile_kernels([*kernels, *kernels], Target(), workers=2)
    assert len(built) == 12
    assert [b.cubin for b in built[:6]] == [b.cubin for b in built[6:]]
    assert len(list(cache.rglob("*.cubin"))) == 6


def test_entry_and_parameters_are_what_launching_assumes(cache: Path) -> None:
    """The kernel is called as its function; after its arguments come two pointers to scratch memory."""
    kernel = emitted(1 << 20)
    built = compile_kernels([kernel], Target())[0]
    assert built.handle.name == kernel.name
    ptx = built.handle.asm["ptx"]
    assert len(re.findall(rf"\.param .*{kernel.name}_param_\d+,?$", ptx, re.MULTILINE)) == len(kernel.arguments) + 2
    assert not built.handle.metadata.launch_pdl
    assert not built.handle.metadata.launch_cooperative_grid
    assert built.handle.metadata.num_ctas == 1


def test_failed_build_is_an_error_in_its_place(cache: Path) -> None:
    good = emitted(100)
    source = good.source.replace("tl.load", "tl.no_such_function")
    bad = Build(good.name, source, good.arguments, good.aligned, good.configs[0].blocks, 4, 1, False)
    found = compile_builds([Build.of(good, good.configs[0]), *[bad] * 3], Target(), workers=1)
    assert isinstance(found[0], Compiled)
    assert all(isinstance(f, CompilerError) for f in found[1:])
    assert "add_relu_100" in str(found[1])
    assert "no_such_function" in str(found[1])
    refused = replace(good, source=source)
    with pytest.raises(CompilerError):
        compile_kernels([refused], Target())


def test_a_dead_process_loses_nothing(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    from memplan.runtime import triton_build

    triton_build.start_workers(2)
    for worker in triton_build._POOL.workers:
        worker.process.kill()
        worker.process.wait()
    found = compile_builds([Build.of(k, k.configs[0]) for k in map(emitted, range(500, 506))], Target(), workers=2)
    assert all(isinstance(f, Compiled) for f in found)
    assert os.environ["TRITON_CACHE_DIR"] == str(cache)


DRIVER = r"""
#include <cstdint>
#include <cstring>
extern "C" {
uint64_t record[16];
int status = 0;
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  uint64_t head[] = {(uint64_t)f, gx, gy * gz, bx, by * bz, shared, (uint64_t)stream};
  std::memcpy(record, head, sizeof head);
  for (int i = 0; i < 5; ++i) std::memcpy(&record[7 + i], parameters[i], 8);
  return status;
}
int version = 12030;
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  int* attributes;
  unsigned count;
};
int cuLaunchKernelEx(const Config* c, void* f, void** parameters, void** extra) {
  record[12] = c->count == 1 ? c->attributes[0] << 8 | c->attributes[2] : 0;
  return cuLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
                        c->stream, parameters, extra);
}
int cuDriverGetVersion(int* found) { *found = version; return 0; }
int cuGetErrorString(int, const char** text) { *text = "too bad"; return 0; }
void* current = (void*)6;
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int* value, int, int) { *value = 100000; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)6; return 0; }
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxPushCurrent_v2(void* context) { record[14] = (uint64_t)context; return 0; }
int cuCtxPopCurrent_v2(void**) { record[15] = 1; return 0; }
int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)image;
  return *(char*)image == 'x' ? 200 : 0;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char*) { *function = (void*)77; return 0; }
int cuFuncSetAttribute(void*, int, int value) { record[13] = value; return 0; }
}
"""


def test_native_launch_hands_the_driver_what_it_was_given() -> None:
    """A driver that writes down how it was called stands in for the real one."""
    path = build_library(DRIVER, name="recording_driver", openmp=False, native=False)
    module = build_module()
    module.open_driver(str(path))
    driver = ctypes.CDLL(str(path))
    record = (ctypes.c_uint64 * 16).in_dll(driver, "record")
    module.bind(1 << 45, 6, 77, 128, 4096, False)(9, 1 << 40, (1 << 63) + 5, 3)
    assert list(record[:12]) == [1 << 45, 77, 1, 128, 1, 4096, 9, 1 << 40, (1 << 63) + 5, 3, 0, 0]
    module.launch(5, 6, 3, 32, 0, False, 8, 1, 2, -1)
    assert list(record[:12]) == [5, 3, 1, 32, 1, 0, 8, 1, 2, (1 << 64) - 1, 0, 0]
    module.launch(5, 6, 0, 32, 0, False, 1, 4, 4, 4)
    assert record[6] == 8, "an empty grid is not launched"
    assert record[12] == 0, "nothing was started early so far"
    given = (1 << 45, 6, 77, 128, 4096, True)
    for start in (module.bind(*given), partial(module.launch, *given)):
        record[0] = record[12] = 0
        start(9, 1 << 40, 2, 3)
        assert list(record[:13]) == [1 << 45, 77, 1, 128, 1, 4096, 9, 1 << 40, 2, 3, 0, 0, 6 << 8 | 1]
    assert module.launches_early()
    ctypes.c_int.in_dll(driver, "version").value = 12020
    assert not module.launches_early(), "drivers before CUDA 12.3 record no early launches"
    ctypes.c_int.in_dll(driver, "status").value = 700
    with pytest.raises(RuntimeError, match="error 700 of the CUDA driver: too bad"):
        module.launch(5, 6, 3, 32, 0, False, 8, 1, 2, 3)
    ctypes.c_int.in_dll(driver, "status").value = 0
    with pytest.raises(TypeError):
        module.launch(5, 6, 3, 32, 0, False, 8, "x", 2, 3)
    with pytest.raises(OverflowError, match="3000000000 program instances"):
        module.launch(5, 6, 3_000_000_000, 32, 0, False, 8, 1)
    assert list(record[13:16]) == [0, 0, 0], "the context was the right one"
    module.launch(5, 9, 3, 32, 0, False, 8, 1, 2, 3)
    assert list(record[14:16]) == [9, 1], "another GPU's context is current for the launch"
    assert module.load(b"good", "kernel", 60_000, 0) == (77, 6)
    assert record[13] == 60_000, "more than 48 KiB of shared memory has to be asked for"
    with pytest.raises(RuntimeError, match="cuModuleLoadData failed with error 200"):
        module.load(b"x", "kernel", 0, 0)
    with pytest.raises(RuntimeError, match="kernel needs 200000 bytes of shared memory, and cuda:1 has 100000"):
        module.load(b"good", "kernel", 200_000, 1)
    with pytest.raises(OSError, match="no CUDA driver"):
        module.open_driver("libnothing.so")


def test_launch_through_triton(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch hands to Triton's handle where there is no compiler, with a handle that records it."""
    monkeypatch.setattr("memplan.runtime.triton_launch.native_launch", lambda: None)
    kernel = emitted(5000)
    built = compile_kernels([kernel], Target())[0]
    calls: list[tuple[object, ...]] = []

    class Handle:
        function, packed_metadata = 11, (4, 1, 0)
        run = staticmethod(lambda *args: calls.append(args))

    launcher = make_launcher(kernel, Compiled(built.build, Handle(), built.cubin, built.shared_bytes, 0))
    launcher(7, 1 << 40, 2 << 40, 3 << 40)
    block = kernel.configs[0].block("XBLOCK")
    grid = -(-5000 // block)
    assert calls == [(grid, 1, 1, 7, 11, (4, 1, 0), None, None, None, 1 << 40, 2 << 40, 3 << 40, block)]
    Launcher(Compiled(built.build, Handle(), b"", 0, 0), lambda n: n, 3)(7, 1, 2, 3, 0)
    assert len(calls) == 1


def test_means_of_doubles_are_counted_in_doubles(cache: Path) -> None:
    """An inverse count in float32 would put the error of a float32 into every mean of a loop."""
    k = s.Builder((64,), (100_000,))
    w = k.reduce("welford", k.load("a", s.R[0] * 64 + s.X[0], torch.float64), dtype=torch.float64)
    k.store("mean", s.X[0], k.item(w, 0))
    kernel = emit_triton(canonicalize(k.done()), name="means", hints={})
    assert "_count += 1.0" in kernel.source, "the reduction is to be a loop"
    assert "_count = tl.full([], 0.0, tl.float64)" in kernel.source
    assert isinstance(compile_kernels([kernel], Target())[0], Compiled)


def test_the_kernels_that_measure_the_device_itself_build() -> None:
    from benchmarks.empty_graph import build_of

    for name in ("empty", "add_one", "add_one_early"):
        found = compile_one(build_of(name), Target())
        assert (b"griddepcontrol.wait" in found.handle.asm["ptx"].encode()) == (name == "add_one_early")  # type: ignore[attr-defined]
