"""Typical CPU kernels: memplan's C++ against eager PyTorch and Inductor, in one process, interleaved.

    python benchmarks/cpu_kernels.py [--filter NAME] [--seconds 0.5] [--write]

Each case is one kernel as data and the same function in PyTorch; the answers are compared first. A round times each
of the three once, in turn, and the fastest of all rounds is reported, as other load on the machine only ever adds.
With ``--threads 1`` the process's CPU time is measured, which other load hardly changes.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cpu_kernel_cases import CASES, Case

from memplan.codegen.cpp_kernel import BUILD_FLAGS, emit_cpp_library
from memplan.ir.canonical import canonicalize
from memplan.runtime.build import build_library, load_library

RESULTS = Path(__file__).parent / "results" / "cpu_kernels.md"


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of the fastest call."""

    name: str
    eager: float
    inductor: float
    ours: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to measure per case")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/cpu_kernels.md")
    parser.add_argument("--threads", type=int, default=0, help="1: one thread, CPU time; default: PyTorch's threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    cases = [c for c in CASES if options.filter in c.name]
    timings = []
    for case in cases:
        timings.append(measure(case, options.seconds, clock))
        print(row(timings[-1]), flush=True)
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(table(timings), encoding="utf-8")


def measure(case: Case, seconds: float, clock: Callable[[], float]) -> Timing:
    """Time one case; raises AssertionError where the answers differ."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    inputs = case.inputs()
    compiled = torch.compile(case.function)
    expected = case.function(*(t.clone() for t in inputs))
    expected = expected if isinstance(expected, tuple) else (expected,)
    outputs = [torch.empty(t.numel(), dtype=t.dtype) for t in expected]
    ours = launcher(case, inputs, outputs)
    ours()
    for found, want in zip(outputs, expected, strict=True):
        tolerance = 2e-2 if any(t.dtype is torch.bfloat16 for t in (want, *inputs)) else 2e-4
        torch.testing.assert_close(found, flat(want), rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        calls = [lambda: case.function(*inputs), lambda: compiled(*inputs), ours]
        fastest = interleaved(calls, seconds, clock)
    return Timing(case.name, *fastest)


def flat(t: torch.Tensor) -> torch.Tensor:
    """A tensor's elements in the order of its storage."""
    return torch.as_strided(t, (t.numel(),), (1,))


def launcher(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> Callable[[], None]:
    """A call of our kernel on these tensors."""
    canonical = canonicalize(case.kernel)
    source = emit_cpp_library([("kernel", canonical)], {})
    library = load_library(build_library(source, name=case.name, flags=BUILD_FLAGS))
    by_name = {f"in{i}": t for i, t in enumerate(inputs)} | {f"out{i}": t for i, t in enumerate(outputs)}
    arguments = [ctypes.c_void_p(by_name[b].data_ptr()) for b in canonical.buffers]
    return lambda: library.kernel(*arguments)


def interleaved(calls: list[Callable[[], object]], seconds: float, clock: Callable[[], float]) -> list[float]:
    """Milliseconds of each call's fastest run, one after the other in every round."""
    for call in calls:
        for _ in range(3):
            call()
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(samples[0]) < 7:
        for call, found in zip(calls, samples, strict=True):
            start = clock()
            call()
            found.append(clock() - start)
    return [1e3 * min(s) for s in samples]


def row(t: Timing) -> str:
    ratios = f"{t.eager / t.ours:.2f} | {t.inductor / t.ours:.2f}"
    return f"| {t.name} | {t.eager:.3f} | {t.inductor:.3f} | {t.ours:.3f} | {ratios} |"


def table(timings: list[Timing]) -> str:
    """The committed page."""
    against = [t.inductor / t.ours for t in timings]
    mean = statistics.geometric_mean(against)
    head = (
        "# CPU kernels\n\n"
        "Milliseconds per call, fastest of interleaved calls; ratios above 1 mean that memplan is faster. Written by\n"
        "`python benchmarks/cpu_kernels.py --write`.\n\n"
        f"{'CPU time on one thread. ' if torch.get_num_threads() == 1 else ''}"
        f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads, "
        f"{cpu_model()}.\n\n"
        f"Inductor's time over memplan's, geometric mean: {mean:.2f}; lowest {min(against):.2f}.\n\n"
        "| kernel | eager | Inductor | memplan | eager / memplan | Inductor / memplan |\n|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(row(t) for t in timings) + "\n"


def cpu_model() -> str:
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
