"""Gradients that are stored and summed over their rows: in one kernel against two.

    python -m benchmarks.store_and_reduce [--write]

What a bias's gradient behind a GELU, and a batch norm's gradients behind a ReLU or a SiLU, take with and without
`memplan.passes.store_and_reduce`: all kernels of the function, one after the other, in the first configuration of each.
Caches are flushed before each run, and the median counts. What is stored has the same bits; the order in which a part
is summed depends on the block. Needs one NVIDIA GPU; half a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from .merged_kernels import Case, Function, compare

RESULT = Path(__file__).parent / "results" / "store_and_reduce.md"
aten = torch.ops.aten


def bias_behind_gelu(grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    g = aten.gelu_backward(grad, x)
    return g, g.sum(0)


def norm_behind_relu(grad: Tensor, result: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
    g = aten.threshold_backward(grad, result, 0)
    return g, g.sum(0, dtype=torch.float32), (g * (x - mean)).sum(0)


def norm_behind_silu(grad: Tensor, normal: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
    g = aten.silu_backward(grad, normal)
    return g, g.sum(0, dtype=torch.float32), (g * (x - mean)).sum(0)


def case(function: Function, rows: int, columns: int) -> Case:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    def make(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(columns, device=device) if n == "mean" else torch.randn(rows, columns, device=device).bfloat16()
            for n in names
        )

    return Case(function, rows, columns, make)


CASES = (
    case(bias_behind_gelu, 12608, 4096), case(bias_behind_gelu, 8192, 4096), case(bias_behind_gelu, 12544, 2048),
    case(bias_behind_gelu, 200704, 512),
    case(norm_behind_relu, 12544, 2048), case(norm_behind_relu, 50176, 1024), case(norm_behind_relu, 200704, 512),
    case(norm_behind_relu, 802816, 256),
    case(norm_behind_silu, 20736, 816), case(norm_behind_silu, 82944, 288), case(norm_behind_silu, 331776, 144),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store_and_reduce", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {RESULT.name}")
    given = parser.parse_args()
    text = compare("Rows stored and summed in one kernel", CASES, "store_and_reduce")
    print(text)
    if given.write:
        RESULT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
