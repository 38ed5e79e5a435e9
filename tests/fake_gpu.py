"""Compiled models on a GPU that is not there: the driver is a fake that computes each launch on the CPU.

Programs are captured on the CPU and planned for ``cuda``; the emitted Triton kernels are built as C++ kernels of the
same data, which take the same arguments. So both wrappers run whole models, and what they launch can be compared.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import memplan.compilation
import memplan.kernels
import memplan.region
from memplan.codegen.cpp_kernel import BUILD_FLAGS, emit_cpp_library
from memplan.codegen.triton_kernel import TritonKernel, emit_triton
from memplan.ir.canonical import CanonicalKernel
from memplan.ir.program import Program
from memplan.runtime import cpp_wrapper, cpp_wrapper_host, cuda_launch, python_runtime
from memplan.runtime.build import build_library
from memplan.runtime.cpp_launch import load_kernels
from memplan.runtime.triton_build import Build, Compiled, Target

#: Bytes of shared memory that each fake build says it needs: more than a kernel gets without asking.
SHARED = 60_000
_WAITS = "    gdc_wait()\n"


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_uint64),
        ("grid", ctypes.c_uint64 * 3),
        ("block", ctypes.c_uint64 * 3),
        ("shared", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("early", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 128),
    ]


@dataclass(frozen=True)
class Launched:
    """One launch as the driver saw it; the arguments are addresses, then sizes."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    context: int
    early: bool
    arguments: tuple[int, ...]


@dataclass
class FakeGpu:
    """What was emitted, built and launched."""

    driver: ctypes.CDLL
    path: Path
    device: str = "cuda:0"
    emitted: dict[str, tuple[CanonicalKernel, TritonKernel]] = field(default_factory=dict)
    names: dict[int, tuple[str, TritonKernel]] = field(default_factory=dict)
    keep: list[object] = field(default_factory=list)

    def launches(self) -> list[Launched]:
        """All launches since `reset`."""
        self.driver.fake_launch.restype = ctypes.POINTER(_Launch)
        found = []
        for k in range(self.driver.fake_launch_count()):
            made = self.driver.fake_launch(ctypes.c_uint64(k)).contents
            values = tuple(made.arguments[: made.count])
            name = self.names[made.kernel][0]
            where = (tuple(made.grid), tuple(made.block), made.shared, made.stream, made.context, bool(made.early))
            found.append(Launched(name, *where, values))
        return found

    def kernel(self, launched: Launched) -> TritonKernel:
        return next(k for name, k in self.names.values() if name == launched.kernel)

    def reset(self) -> None:
        self.driver.fake_reset()

    def allocations(self) -> int:
        return ctypes.c_int64.in_dll(self.driver, "fake_allocations").value

    def fail_with(self, status: int) -> None:
        ctypes.c_int.in_dll(self.driver, "fake_status").value = status

    def emit(self, kernel: CanonicalKernel, *, name: str, **options: object) -> TritonKernel:
        found = emit_triton(kernel, name=name, **options)  # type: ignore[arg-type]
        self.emitted[name] = (kernel, found)
        return found

    def compile_builds(self, builds: Sequence[Build], target: Target) -> list[Compiled]:
        """Kernels of the CPU for what was emitted; the cubin tells the driver which."""
        parts = [(n, self.emitted[n][0]) for n in dict.fromkeys(b.name for b in builds)]
        path = build_library(emit_cpp_library(parts, {}), name="fake_gpu", flags=BUILD_FLAGS)
        functions = load_kernels(path, {n: (len(k.buffers), len(k.symbols), k.kernel.checks_indices) for n, k in parts})
        out = []
        for build in builds:
            function = functions[build.name]
            self.keep.append(function)
            register = self.driver.fake_register
            register.restype = ctypes.c_uint64
            number = register(ctypes.cast(function, ctypes.c_void_p), len(build.arguments))  # type: ignore[arg-type]
            self.names[number] = (build.name, self.emitted[build.name][1])
            cubin = b"\x7fELF" + number.to_bytes(8, "little")
            out.append(Compiled(build, SimpleNamespace(name=build.name), cubin, SHARED, 0, _WAITS in build.source))
        return out

    def on_gpu(self, program: Program) -> Program:
        """The program as if its tensors had been on the GPU; calls that name a device keep the CPU."""
        operations = tuple(replace(op, device=self.device) for op in program.operations)
        buffers = {
            n: b if n in program.constants else replace(b, device=self.device) for n, b in program.buffers.items()
        }
        return replace(program, buffers=buffers, operations=operations)

    def find_symbol(self, name: str) -> int | None:
        try:
            return ctypes.cast(getattr(self.driver, name), ctypes.c_void_p).value
        except AttributeError:
            return cpp_wrapper_host.find_symbol(name.replace("aoti_torch_cuda_", "aoti_torch_cpu_"))

    def namespace(self, *parts: Mapping[str, object]) -> dict[str, object]:
        names = python_runtime.namespace(*parts)  # type: ignore[arg-type]
        return names | {
            "empty_cuda": names["empty_cpu"],
            "current_stream": lambda index: 0x5000 + index,
            "allocate_pool": lambda nbytes, device: python_runtime.allocate_pool(nbytes, "cpu"),
        }


class _UntilUndone(dict[str, Path]):
    """What monkeypatch takes out of it at the end of a test takes the opened fake driver along."""

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        cuda_launch.native_launch.cache_clear()


def make_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Everything that would ask for a GPU asks the fake one until the test ends."""
    source = (Path(__file__).parent / "fake_driver.cpp").read_text()
    path = build_library(source, name="fake_driver", flags=("-O1",), openmp=False, native=False)
    driver = ctypes.CDLL(str(path))
    real = cpp_wrapper_host.find_symbol("aoti_torch_empty_strided")
    ctypes.c_void_p.in_dll(driver, "fake_empty_strided").value = real
    fake = FakeGpu(driver, path)
    fake.reset()
    driver.fake_bind(ctypes.c_void_p(0x1000))
    monkeypatch.setenv("MEMPLAN_PLAN_CACHE", "0")  # a fake cubin means nothing to another process
    capture = memplan.region.capture
    monkeypatch.setattr(memplan.region, "capture", lambda *a, **k: fake.on_gpu(capture(*a, **k)))
    monkeypatch.setattr(memplan.kernels, "emit_triton", fake.emit)
    monkeypatch.setattr(memplan.kernels, "compile_builds", fake.compile_builds)
    monkeypatch.setattr(Target, "current", staticmethod(Target))
    monkeypatch.setattr(cpp_wrapper, "find_symbol", fake.find_symbol)
    monkeypatch.setattr(cpp_wrapper, "namespace", fake.namespace)
    monkeypatch.setattr(memplan.compilation, "namespace", fake.namespace)
    monkeypatch.setattr(cuda_launch, "DRIVER", str(path))
    cuda_launch.native_launch.cache_clear()
    monkeypatch.setitem(_UntilUndone(), "driver", path)
    torch._dynamo.reset()
    return fake
