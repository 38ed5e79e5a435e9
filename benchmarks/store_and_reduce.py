"""Gradients that are stored and summed over their rows: in one kernel against two.

    python -m benchmarks.store_and_reduce [--write]

What a bias's gradient behind a GELU, and a batch norm's gradients behind a ReLU or a SiLU, take with and without
`memplan.passes.store_and_reduce`: all kernels of the function, one after the other, in the first configuration of each.
Caches are flushed before each run, and the median counts. What is stored has the same bits; the order in which a part
is summed depends on the block. Needs one NVIDIA GPU; half a minute.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import memplan
from memplan.codegen.triton_kernel import TritonKernel, emit_triton
from memplan.ir.canonical import canonicalize
from memplan.ir.errors import CompilerError
from memplan.ir.program import KernelOp, Program, TensorInput, View
from memplan.runtime.triton_build import Build, Compiled, Target, compile_builds
from memplan.runtime.triton_launch import make_launcher

from .column_sums import timed

RESULT = Path(__file__).parent / "results" / "store_and_reduce.md"
aten = torch.ops.aten
Function = Callable[..., tuple[Tensor, ...]]


def bias_behind_gelu(grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    g = aten.gelu_backward(grad, x)
    return g, g.sum(0)


def norm_behind_relu(grad: Tensor, result: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
    g = aten.threshold_backward(grad, result, 0)
    return g, g.sum(0, dtype=torch.float32), (g * (x - mean)).sum(0)


def norm_behind_silu(grad: Tensor, normal: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
    g = aten.silu_backward(grad, normal)
    return g, g.sum(0, dtype=torch.float32), (g * (x - mean)).sum(0)


CASES: tuple[tuple[Function, int, int], ...] = (
    (bias_behind_gelu, 12608, 4096), (bias_behind_gelu, 8192, 4096), (bias_behind_gelu, 12544, 2048),
    (bias_behind_gelu, 200704, 512),
    (norm_behind_relu, 12544, 2048), (norm_behind_relu, 50176, 1024), (norm_behind_relu, 200704, 512),
    (norm_behind_relu, 802816, 256),
    (norm_behind_silu, 20736, 816), (norm_behind_silu, 82944, 288), (norm_behind_silu, 331776, 144),
)  # fmt: skip


def programs(function: Function, rows: int, columns: int, device: str) -> tuple[Program, Program]:
    """The function's program with reductions left alone, and as the passes make it."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    given = [
        torch.randn(columns, device=device) if n == "mean" else torch.randn(rows, columns, device=device).bfloat16()
        for n in names
    ]
    found = []
    for disabled in (["store_and_reduce"], []):
        (graph,) = memplan.analyze(function, tuple(given), backward=False, options={"disable": disabled})
        found.append(graph.plan.program)
        torch._dynamo.reset()
    return found[0], found[1]


def emitted(program: Program) -> list[tuple[KernelOp, TritonKernel]]:
    """All operations of a program of kernels alone."""
    out = []
    for op in program.operations:
        assert isinstance(op, KernelOp), op.name
        out.append((op, emit_triton(canonicalize(op.kernel), name="kernel", hints={}, deterministic=True)))
    return out


def runner(
    program: Program, built: dict[Build, Compiled], tensors: Sequence[Tensor]
) -> tuple[Callable[[], None], list[Tensor]]:
    """What runs the kernels, and the results that it leaves."""
    buffers = {i.view.buffer: tensors[i.position] for i in program.inputs if isinstance(i, TensorInput)}
    launches = []
    for op, kernel in emitted(program):
        for b in op.kernel.buffers:
            if b not in buffers:
                dtype = program.buffers[b].dtype
                buffers[b] = torch.empty(program.nbytes(b) // dtype.itemsize, dtype=dtype, device="cuda")
        launcher = make_launcher(kernel, built[Build.of(kernel, kernel.configs[0])])
        launches.append((launcher, [buffers[b].data_ptr() for b in op.kernel.buffers]))
    stream = torch.cuda.current_stream().cuda_stream

    def run() -> None:
        for launcher, pointers in launches:
            launcher(stream, *pointers)

    return run, [buffers[v.buffer] for v in program.outputs if isinstance(v, View)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store_and_reduce", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {RESULT.name}")
    given = parser.parse_args()
    pairs = [programs(*case, "cuda") for case in CASES]
    builds = [Build.of(k, k.configs[0]) for pair in pairs for p in pair for _, k in emitted(p)]
    built = {}
    for build, found in zip(builds, compile_builds(builds, Target.current()), strict=True):
        if isinstance(found, CompilerError):
            raise found
        built[build] = found
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    lines = ["| what | rows | columns | apart, us | as one, us | ratio |", "|---|---|---|---|---|---|"]
    ratios = []
    for (function, rows, columns), pair in zip(CASES, pairs, strict=True):
        assert len(pair[1].operations) < len(pair[0].operations), f"{function.__name__} is not made one"
        inputs = [i for i in pair[0].inputs if isinstance(i, TensorInput)]
        tensors = [torch.randn(tuple(map(int, i.view.sizes)), device="cuda").to(i.view.dtype) for i in inputs]
        times, answers = [], []
        for program in pair:
            run, results = runner(program, built, tensors)
            times.append(timed(run, flush))
            answers.append([r.clone() for r in results])
        (stored, *sums), (expected, *others) = answers
        assert torch.equal(stored, expected), function.__name__
        for a, b in zip(sums, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * math.sqrt(rows))
        ratios.append(times[1] / times[0])
        name = function.__name__.replace("_", " ")
        lines.append(f"| {name} | {rows} | {columns} | {times[0]:.1f} | {times[1]:.1f} | {ratios[-1]:.2f} |")
    text = f"# Rows stored and summed in one kernel, {torch.cuda.get_device_name()}, torch {torch.__version__}\n\n"
    text += "\n".join(lines) + f"\n\nGeometric mean of the ratios: {statistics.geometric_mean(ratios):.2f}.\n"
    print(text)
    if given.write:
        RESULT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
