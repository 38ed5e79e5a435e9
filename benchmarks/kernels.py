"""Where a step's time goes, kernel by kernel."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 3

#: The first pattern that a kernel's name matches gives its category.
CATEGORIES = (
    ("triton", r"^triton_|^k\d+_"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("gemm", r"gemm|cutlass|cublas|nvjet|ampere_|sm90_xmma_gemm|splitk|gemv"),
    ("conv", r"conv|cudnn|dgrad|wgrad|fprop|winograd|implicit"),
    ("copies", r"memcpy|memset|copy|CatArray|fill"),
    ("eager", r"at::native|vectorized_elementwise|reduce_kernel|softmax|layer_norm"),
)


def category(name: str) -> str:
    """Which kind of kernel this is."""
    return next((kind for kind, pattern in CATEGORIES if re.search(pattern, name, re.IGNORECASE)), "other")


def kernel_times(step: Callable[[], object], device: str) -> dict[str, object]:
    """Milliseconds a step and launches a step by kernel (on a CPU: by operator, its own time)."""
    for _ in range(3):
        step()
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[ProfilerActivity.CPU, kind] if device == "cuda" else [kind], acc_events=False) as p:
        for _ in range(STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    times: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    for e in p.key_averages():
        on_device = e.device_type == DeviceType.CUDA
        if on_device != (device == "cuda"):
            continue
        spent = e.self_device_time_total if device == "cuda" else e.self_cpu_time_total
        times[e.key] += spent / 1e3 / STEPS
        counts[e.key] += e.count / STEPS
    return {"kernels": [[name, ms, counts[name]] for name, ms in sorted(times.items(), key=lambda x: -x[1])]}


def side_by_side(results: dict[str, list[tuple[str, float, float]]], top: int = 40) -> str:
    """A markdown section: totals by category for each system, then each system's dearest kernels."""
    systems = list(results)
    totals = {s: _totals(results[s]) for s in systems}
    kinds = sorted({k for t in totals.values() for k in t}, key=lambda k: -max(_of(t, k)[0] for t in totals.values()))
    lines = ["| category | " + " | ".join(f"{s} ms (launches)" for s in systems) + " |"]
    lines.append("|---" * (len(systems) + 1) + "|")
    for kind in kinds:
        cells = [f"{ms:.2f} ({n:.0f})" for ms, n in (_of(totals[s], kind) for s in systems)]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    sums = [f"{sum(ms for _, ms, _ in results[s]):.2f} ({sum(n for _, _, n in results[s]):.0f})" for s in systems]
    lines.append("| all | " + " | ".join(sums) + " |")
    for s in systems:
        lines += ["", f"### {s}", "", "| kernel | category | ms | launches |", "|---|---|---|---|"]
        lines += [f"| `{name[:90]}` | {category(name)} | {ms:.3f} | {n:.1f} |" for name, ms, n in results[s][:top]]
    return "\n".join(lines) + "\n"


def _of(totals: dict[str, tuple[float, float]], kind: str) -> tuple[float, float]:
    return totals.get(kind, (0.0, 0.0))


def _totals(rows: list[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    out: dict[str, tuple[float, float]] = {}
    for name, ms, count in rows:
        kind = category(name)
        held = _of(out, kind)
        out[kind] = (held[0] + ms, held[1] + count)
    return out
