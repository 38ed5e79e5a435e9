"""What the device itself takes from one kernel of a CUDA graph to the next: a graph of kernels that do next to nothing.

The kernels are one warp each, in one chain: ``empty`` does nothing, ``add one`` adds one to a number in memory, so that
the last one's answer shows that each waited for the one before it. ``early`` starts each kernel while the one before it
ends (programmatic dependent launch), where it waits itself (``griddepcontrol.wait``). No wrapper is in any of it: the
launches are recorded by calls of the driver alone.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from memplan.runtime.cuda_launch import native_launch
from memplan.runtime.triton_build import Build, Target, compile_one

_SOURCE = """\
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def empty(p):
    pass


@triton.jit
def add_one(p):
    tl.store(p, tl.load(p) + 1)


@triton.jit
def add_one_early(p):
    gdc_launch_dependents()
    gdc_wait()
    tl.store(p, tl.load(p) + 1)
"""
#: cuda.h: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_SERIALIZATION = 6


def build_of(name: str) -> Build:
    """The kernel of this name."""
    return Build(name, _SOURCE, (("p", "*i64"),), (True,), (), 1, 1)


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((f"{kind}_{axis}", ctypes.c_uint) for kind in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Replayed:
    """Microseconds a kernel in a replayed graph, and a launch from Python without one (NaN where not tried)."""

    name: str
    replayed: float
    launched: float


def measure(links: int, repeats: int) -> list[Replayed]:
    """The kinds of kernels that any driver takes, best of five rounds.

    Raises
    ------
    RuntimeError
        If the driver refuses a launch, or a kernel did not wait for the one before it.
    """
    return [
        _measured("empty kernels", "empty", False, links, repeats),
        _measured("kernels that add one", "add_one", False, links, repeats),
    ]


def measure_early(links: int, repeats: int) -> list[Replayed]:
    """Kernels that start while the one before them ends.  Raises RuntimeError as `measure` does."""
    return [_measured("kernels that add one, early", "add_one_early", True, links, repeats)]


def _measured(title: str, name: str, early: bool, links: int, repeats: int) -> Replayed:
    native = native_launch()
    if native is None:
        raise RuntimeError("there is no driver, or no compiler for the module that calls it")
    compiled = compile_one(build_of(name), Target.current())
    function, context = native.load(compiled.cubin, compiled.handle.name, 0, torch.cuda.current_device())  # type: ignore[attr-defined]
    number = torch.zeros(1, dtype=torch.int64, device="cuda")
    plain = native.bind(function, context, 1, 32, 0)
    start = _early(function, number) if early else partial(_plain, plain, number)

    def chain() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for _ in range(links):
            start(stream)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the default one orders itself against others
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    before = int(number)
    graph.replay()
    if name != "empty" and int(number) != before + links:
        raise RuntimeError(f"{title}: {links} of them added {int(number) - before}")
    launched = float("nan") if early else _best(chain, repeats) / links
    return Replayed(title, _best(graph.replay, repeats) / links, launched)


def _plain(launch: Callable[..., None], number: torch.Tensor, stream: int) -> None:
    launch(stream, number.data_ptr())


def _early(function: int, number: torch.Tensor) -> Callable[[int], None]:
    driver = ctypes.CDLL("libcuda.so.1")
    attribute = _Attribute(_SERIALIZATION, b"", 1, b"")

    def launch(stream: int) -> None:
        values = (ctypes.c_uint64 * 3)(number.data_ptr(), 0, 0)  # two pointers to scratch memory follow
        size = ctypes.sizeof(ctypes.c_uint64)
        parameters = (ctypes.c_void_p * 3)(*(ctypes.addressof(values) + k * size for k in range(3)))
        config = _Config(1, 1, 1, 32, 1, 1, 0, stream, ctypes.pointer(attribute), 1)
        status = driver.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), parameters, None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx failed with error {status} of the CUDA driver")

    return launch


def _best(run: Callable[[], None], repeats: int) -> float:
    """Microseconds of a run."""
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - begin) / repeats * 1e6)
    return min(rounds)


def table(rows: list[Replayed]) -> str:
    """Empty where there are none."""
    if not rows:
        return ""
    out = ["| no wrapper at all | replayed, us a kernel | launched one by one from Python, us |", "|---|---|---|"]
    for r in rows:
        launched = "" if r.launched != r.launched else f"{r.launched:.2f}"
        out.append(f"| {r.name} | {r.replayed:.2f} | {launched} |")
    return "\n".join(out)
