"""Bytes and seconds of one step, on a GPU or a CPU.

Bytes are live bytes above those before the step: on a GPU the caching allocator's own counters, on a CPU every
allocation and free that PyTorch's allocator reports to the profiler, added up in order. Beside them, what the process
takes from the machine: reserved segments and the device's used memory; on a CPU the peak resident set.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


def measure(
    step: Step, device: str, *, repeats: int, seconds: float, used: Callable[[], int | None] = lambda: None,
    resident: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Memory of one step, then the median time of several.

    Parameters
    ----------
    step:
        Runs one step, warm, and leaves nothing behind but what was there before.
    repeats, seconds:
        At most so many timed steps, and no new one after so many seconds (three at least).
    used:
        Bytes of a GPU that this process holds, or None where nobody can say.
    resident:
        Of a GPU: `resident_bytes` before the step's first time; what is reserved is also said beyond them.
    """
    step()
    if device == "cuda":
        found = _cuda_memory(step, used)
        found["reserved_above"] = found["reserved"] - resident
    else:
        found = cpu_memory(step)
    found |= _cuda_time(step, repeats, seconds) if device == "cuda" else _cpu_time(step, repeats, seconds)
    return found


def resident_bytes(device: str) -> int:
    """What the caching allocator of a GPU holds for parameters, batch and cuBLAS' workspaces, gaps between them too.

    0 on a CPU.
    """
    if device != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _cuda_memory(step: Step, used: Callable[[], int | None]) -> dict[str, float]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # before the steps, never inside one
    before = torch.cuda.memory_allocated()
    peaks = []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    device_used = used()
    return {
        "before": before,
        "peak": max(peaks) - before,
        "peak_total": max(peaks),
        "reserved": torch.cuda.max_memory_reserved(),
        **({} if device_used is None else {"device_used": device_used}),
        "left_behind": torch.cuda.memory_allocated() - before,
    }


def _cuda_time(step: Step, repeats: int, seconds: float) -> dict[str, float]:
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - started < seconds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return _summary(times)


def cpu_memory(step: Step) -> dict[str, float]:
    """Live bytes of one step at its peak, from the allocator's events, and the resident set at its peak in another."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident_before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    step()
    resident = status_bytes("VmHWM")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as p:
        step()
    events = p.profiler.kineto_results.events()  # type: ignore[union-attr]
    moves = sorted((e.start_ns(), k, e.nbytes()) for k, e in enumerate(events) if e.name() == "[memory]")
    live = peak = 0
    for _, _, nbytes in moves:
        live += nbytes
        peak = max(peak, live)
    return {
        "peak": peak,
        "allocations": sum(nbytes > 0 for _, _, nbytes in moves),
        "left_behind": live,
        "resident": resident,
        "resident_above": resident - resident_before,
    }


def _cpu_time(step: Step, repeats: int, seconds: float) -> dict[str, float]:
    times: list[float] = []
    busy: list[float] = []
    started = time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - started < seconds):
        begin, begin_busy = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - begin) * 1e3)
        busy.append((time.process_time() - begin_busy) * 1e3)
    return {**_summary(times), "cpu_ms": min(busy)}


def _summary(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times), "ms_least": min(times), "ms_most": max(times), "repeats": len(times)}


def status_bytes(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
