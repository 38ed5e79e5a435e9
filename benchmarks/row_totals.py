"""Gradients of norms: kernels over rows that sum their columns, against rows and sums apart.

    python -m benchmarks.row_totals [--sweep] [--write]

What the gradients of a layer norm and of a norm by the root of the mean square take with and without
`memplan.passes.row_totals`, and of a layer norm behind a residual with the bias of the product before it: all kernels
of the function, one after the other, in the first configuration of each. ``--sweep`` tries other numbers of instances
and blocks besides. Caches are flushed before each run, and the median counts. The gradient of the input has the same
bits; the order of the sums differs. Needs one NVIDIA GPU; a minute.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from memplan.codegen.triton_configs import LaunchConfig
from memplan.codegen.triton_kernel import TritonKernel
from memplan.ir.program import Program
from memplan.ir.totals import rows_together
from memplan.passes import row_totals

from .column_sums import timed
from .merged_kernels import Case, Choice, build, compare, emitted, first, inputs, programs, runner, same

RESULT = Path(__file__).parent / "results" / "row_totals.md"
#: program instances, elements of a block, and warps
INSTANCES, ELEMENTS, WARPS = (264, 396, 528, 792, 1056), (1024, 2048, 4096), (2, 4, 8, 16)


def layer_norm(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    normal = (x - mean) * rstd
    g = grad * weight
    dx = rstd * (g - g.mean(1, keepdim=True) - normal * (g * normal).mean(1, keepdim=True))
    return dx.to(grad.dtype), (grad * normal).sum(0), grad.sum(0, dtype=torch.float32)


def residual_layer_norm(
    grad: Tensor, above: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    normal = (x.float() - mean) * rstd
    g = grad * weight
    dx = above + rstd * (g - g.mean(1, keepdim=True) - normal * (g * normal).mean(1, keepdim=True))
    low = dx.to(grad.dtype)
    sums = ((grad * normal).sum(0), grad.sum(0, dtype=torch.float32), low.sum(0, dtype=torch.float32))
    return low, dx, *sums


def rms_norm(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    normal = x * rstd
    g = grad * weight
    dx = rstd * (g - normal * (g * normal).mean(1, keepdim=True))
    return dx.to(grad.dtype), (grad * normal).sum(0)


def _rows(rows: int, columns: int, device: str, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(rows, columns, device=device).to(t) for t in dtypes)


def _layer_norm(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
    mean, rstd = _rows(rows, 1, device, torch.float32, torch.float32)
    return (
        *_rows(rows, columns, device, torch.bfloat16, torch.bfloat16),
        mean,
        rstd,
        torch.randn(columns, device=device),
    )


def _residual(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
    grad, x, *rest = _layer_norm(rows, columns, device)
    return (grad, *_rows(rows, columns, device, torch.float32), x, *rest)


def _rms_norm(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
    grad, x, _, rstd, weight = _layer_norm(rows, columns, device)
    return grad, x, rstd, weight


CASES = (
    Case(layer_norm, 12608, 1024, _layer_norm), Case(layer_norm, 16384, 768, _layer_norm),
    Case(layer_norm, 200704, 128, _layer_norm), Case(layer_norm, 50176, 256, _layer_norm),
    Case(layer_norm, 3136, 1024, _layer_norm), Case(layer_norm, 8192, 4096, _layer_norm),
    Case(residual_layer_norm, 12608, 1024, _residual, 2), Case(residual_layer_norm, 16384, 768, _residual, 2),
    Case(residual_layer_norm, 8192, 1024, _residual, 2),
    Case(rms_norm, 8192, 2048, _rms_norm), Case(rms_norm, 8192, 4096, _rms_norm),
)  # fmt: skip


def variants(case: Case, device: str, **options: object) -> Iterator[tuple[tuple[int, int, int], Program, Choice]]:
    """The merged program with other instances, blocks and warps of the kernel over rows."""
    for instances in INSTANCES:
        with mock.patch.object(row_totals, "_INSTANCES", instances):
            _, program = programs(case, "row_totals", device, **options)
        kernels = emitted(program)
        for elements, warps in itertools.product(ELEMENTS, WARPS):
            choice = [_changed(rows_together(op.kernel), kernel, elements, warps) for op, kernel in kernels]
            if all(choice):
                yield (instances, elements, warps), program, tuple(c for c in choice if c)


def _changed(
    together: int, kernel: TritonKernel, elements: int, warps: int
) -> tuple[TritonKernel, LaunchConfig] | None:
    """A kernel with totals in another block; None if its rows would not come out even. Others as they are."""
    if not together:
        return kernel, kernel.configs[0]
    length = kernel.configs[0].block("RBLOCK")
    rows = max(1, min(elements // length, 1 << together.bit_length() - 1))
    config = LaunchConfig((("XBLOCK", rows), ("RBLOCK", length), ("XGROUP", together)), warps)
    return None if together % rows else (replace(kernel, configs=(config,)), config)


def sweep() -> str:
    """Over the best of each case, the geometric mean over all cases of each number of instances, block and warps."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    tried = [list(variants(case, "cuda")) for case in CASES]
    built = build([choice for found in tried for _, _, choice in found])
    over: defaultdict[tuple[int, int, int], list[float]] = defaultdict(list)
    for case, found in zip(CASES, tried, strict=True):
        plain, _ = programs(case, "row_totals", "cuda")
        tensors = inputs(plain)
        run, results = runner(plain, first(plain), build([first(plain)]), tensors)
        run()
        expected = [r.clone() for r in results]
        times = {}
        for key, program, choice in found:
            run, results = runner(program, choice, built, tensors)
            times[key] = timed(run, flush)
            same(case, results, expected)
        best = min(times.values())
        for key, time in times.items():
            over[key].append(time / best)
    lines = ["| instances | elements | warps | over the best | worst |", "|---|---|---|---|---|"]
    complete = {key: found for key, found in over.items() if len(found) == len(CASES)}
    for key, found in sorted(complete.items(), key=lambda item: statistics.geometric_mean(item[1]))[:20]:
        cells = (*key, f"{statistics.geometric_mean(found):.3f}", f"{max(found):.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row_totals", description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="other instances and blocks")
    parser.add_argument("--write", action="store_true", help=f"keep the tables in {RESULT.name}")
    given = parser.parse_args()
    text = compare("Gradients of norms, rows and sums apart and as one", CASES, "row_totals")
    if given.sweep:
        text += f"\nInstances, elements of a block and warps, of all kernels over the best of each:\n\n{sweep()}"
    print(text)
    if given.write:
        RESULT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
