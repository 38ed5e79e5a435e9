"""What the device itself takes from one kernel of a CUDA graph to the next: a graph of kernels that do next to nothing.

The kernels are one warp each, in one chain: ``empty`` does nothing, ``add one`` adds one to a number in memory, so that
the last one's answer shows that each waited for the one before it. ``early`` starts each kernel while the one before it
ends (programmatic dependent launch), where it waits itself (``griddepcontrol.wait``). No wrapper is in any of it: the
launches are recorded by calls of the driver alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from memplan.runtime.cuda_launch import native_launch
from memplan.runtime.triton_build import Build, Target, compile_one
from memplan.runtime.triton_launch import Launcher

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


def build_of(name: str) -> Build:
    """The kernel of this name."""
    return Build(name, _SOURCE, (("p", "*i64"),), (True,), (), 1, 1)


@dataclass(frozen=True)
class Replayed:
    """Microseconds a kernel in a replayed graph, and a launch from Python without one."""

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
        _measured("empty kernels", "empty", links, repeats),
        _measured("kernels that add one", "add_one", links, repeats),
    ]


def measure_early(links: int, repeats: int) -> list[Replayed]:
    """Kernels that start while the one before them ends.  Raises RuntimeError as `measure` does."""
    return [_measured("kernels that add one, early", "add_one_early", links, repeats)]


def _measured(title: str, name: str, links: int, repeats: int) -> Replayed:
    if native_launch() is None:
        raise RuntimeError("there is no driver, or no compiler for the module that calls it")
    number = torch.zeros(1, dtype=torch.int64, device="cuda")
    start = Launcher(compile_one(build_of(name), Target.current()), 1, 1).bound()

    def chain() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for _ in range(links):
            start(stream, number.data_ptr())

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
    return Replayed(title, _best(graph.replay, repeats) / links, _best(chain, repeats) / links)


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
        out.append(f"| {r.name} | {r.replayed:.2f} | {r.launched:.2f} |")
    return "\n".join(out)
