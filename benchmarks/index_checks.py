"""What it costs to check indices: the same functions compiled with and without `check_indices`.

    python -m benchmarks.index_checks [--device cuda] [--seconds 1.0] [--write]

The calls of both are interleaved and the fastest of each counts, as other load only ever adds: on a CPU the CPU time of
one thread, on a GPU the time between two events around ten calls.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], object]


def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, weight) * 2


def embedding_gradient(weight: Tensor, tokens: Tensor, grad: Tensor) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(grad, tokens, weight.shape[0], -1, False)


def gather_last(x: Tensor, index: Tensor) -> Tensor:
    return F.gelu(torch.gather(x, 1, index), approximate="tanh")


def index_rows(x: Tensor, index: Tensor) -> Tensor:
    return x[index] * 2


def index_points(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return x[rows, columns] * 2


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def scatter_add(x: Tensor, index: Tensor, source: Tensor) -> Tensor:
    return x.scatter_add(1, index, source)


def cases(device: str) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Functions with their arguments."""
    torch.manual_seed(0)
    with torch.device(device):
        weight, tokens = torch.randn(50257, 768), torch.randint(0, 50257, (8192,))
        x, wide = torch.randn(4096, 1000), torch.randint(0, 1000, (4096, 1000))
        flat = torch.randint(0, 1000, (2**20,))
        logits, target = torch.randn(512, 32000), torch.randint(0, 32000, (512,))
        return {
            "embedding 8192x768": (embedding, (weight, tokens)),
            "gradient of embedding 8192x768": (embedding_gradient, (weight, tokens, torch.randn(8192, 768))),
            "gather 4096x1000, gelu": (gather_last, (x, wide)),
            "rows x[i] 4096x1000": (index_rows, (x, torch.randint(0, 4096, (4096,)))),
            "points x[i, j] 1048576": (index_points, (x, flat, flat)),
            "cross entropy 512x32000": (cross_entropy, (logits, target)),
            "scatter_add 4096x1000": (scatter_add, (x, wide, torch.randn(4096, 1000))),
        }


def seconds_of(call: Call, device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e4


def compiled(function: Callable[..., Tensor], arguments: tuple[Tensor, ...], *, checks: bool) -> Call:
    torch._dynamo.reset()
    call = torch.compile(function, backend="memplan", dynamic=False, options={"check_indices": checks})
    call(*arguments)
    return lambda: call(*arguments)


def measure(function: Callable[..., Tensor], arguments: tuple[Tensor, ...], device: str, seconds: float) -> list[float]:
    """Seconds of the fastest call without and with checks."""
    calls = [compiled(function, arguments, checks=checks) for checks in (False, True)]
    fastest = [float("inf")] * 2
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 20:
        for k, call in enumerate(calls):
            fastest[k] = min(fastest[k], seconds_of(call, device))
        rounds += 1
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index_checks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=2.0, help="time to measure a function")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/index_checks-DEVICE.md")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.machine()}, one thread, CPU time"
    lines = [
        "# Checking indices\n",
        f"Milliseconds of the fastest of interleaved calls; torch {torch.__version__}, {machine}. Written by",
        f"`python -m benchmarks.index_checks --device {given.device} --write`.\n",
        "| function | unchecked | checked | checked / unchecked |",
        "|---|---|---|---|",
    ]
    ratios = []
    for name, (function, arguments) in cases(given.device).items():
        without, checked = measure(function, arguments, given.device, given.seconds)
        ratios.append(checked / without)
        lines.append(f"| {name} | {1e3 * without:.3f} | {1e3 * checked:.3f} | {ratios[-1]:.3f} |")
        print(lines[-1], flush=True)
    lines.append(f"\nGeometric mean {statistics.geometric_mean(ratios):.3f}, largest {max(ratios):.3f}.")
    print(lines[-1])
    if given.write:
        (RESULTS / f"index_checks-{given.device}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
