"""Time of one call of a graph of many tiny kernels that cannot fuse, on the CPU: what launching costs.

Every link of the chain sums over one dimension and adds the sum along the other, so that it needs all of the link
before it. Run it as ``python benchmarks/launch_overhead.py [links]``; kernels per call are counted in the wrappers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

import memplan
from memplan.ir.program import KernelOp


def chain(links: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        for k in range(links):
            x = x.t() - x.sum(k % 2, keepdim=True)
        return x

    return run


def seconds(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, repeats: int = 200) -> float:
    """The best of seven averages."""
    call(x)
    best = float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(repeats):
            call(x)
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best


def main(links: int) -> None:
    x = torch.randn(4, 4) * 1e-3
    rows: list[tuple[str, str, float]] = []
    with torch.no_grad():
        for wrapper in ("python", "cpp"):
            torch._dynamo.reset()
            with memplan.record() as recording:
                call = torch.compile(chain(links), backend="memplan", options={"wrapper": wrapper})
                call(x)
            count = sum(isinstance(op, KernelOp) for op in recording.plans[0].program.operations)
            rows.append((f"memplan {wrapper}", str(count), seconds(call, x)))
        for cpp in (False, True):
            torch._dynamo.reset()
            torch._inductor.metrics.reset()
            call = torch.compile(chain(links), backend="inductor", options={"cpp_wrapper": cpp})
            call(x)
            count = torch._inductor.metrics.generated_kernel_count
            rows.append((f"inductor {'cpp' if cpp else 'python'}", str(count), seconds(call, x)))
    print(f"{'wrapper':<18}{'kernels':>8}{'us a call':>12}{'to memplan cpp':>16}")
    for name, kernels, taken in rows:
        print(f"{name:<18}{kernels:>8}{taken * 1e6:>12.1f}{taken / rows[1][2]:>16.2f}")


if __name__ == "__main__":
    import torch._inductor.metrics

    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
