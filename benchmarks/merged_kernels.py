"""Functions whose kernels a pass merges: what they take with and without it. For the benchmarks of single passes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import memplan
from memplan.codegen.triton_configs import LaunchConfig
from memplan.codegen.triton_kernel import TritonKernel, emit_triton
from memplan.ir.canonical import canonicalize
from memplan.ir.errors import CompilerError
from memplan.ir.program import KernelOp, Program, TensorInput, View
from memplan.runtime.triton_build import Build, Compiled, Target, compile_builds
from memplan.runtime.triton_launch import make_launcher

from .column_sums import timed

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Case:
    """A function of tensors of (rows, columns); how its arguments are made. ``stored`` results have the same bits."""

    function: Function
    rows: int
    columns: int
    make: Callable[[int, int, str], tuple[Tensor, ...]]
    stored: int = 1

    @property
    def name(self) -> str:
        return self.function.__name__.replace("_", " ")


def programs(case: Case, disabled: str, device: str, **options: object) -> tuple[Program, Program]:
    """The function's program without the pass, and with it."""
    given = case.make(case.rows, case.columns, device)
    found = []
    for off in ([disabled], []):
        (graph,) = memplan.analyze(case.function, given, backward=False, options={"disable": off, **options})
        found.append(graph.plan.program)
        torch._dynamo.reset()
    assert found[1] != found[0], f"{case.name} is not merged"
    return found[0], found[1]


def emitted(program: Program) -> list[tuple[KernelOp, TritonKernel]]:
    """All operations of a program of kernels alone."""
    out = []
    for op in program.operations:
        assert isinstance(op, KernelOp), op.name
        out.append((op, emit_triton(canonicalize(op.kernel), name="kernel", hints={})))
    return out


Choice = tuple[tuple[TritonKernel, LaunchConfig], ...]


def first(program: Program) -> Choice:
    """Every kernel in its first configuration."""
    return tuple((kernel, kernel.configs[0]) for _, kernel in emitted(program))


def build(choices: Sequence[Choice]) -> dict[Build, Compiled]:
    """All kernels of the choices, in parallel.

    Raises
    ------
    CompilerError
        If one cannot be built.
    """
    builds = list(dict.fromkeys(Build.of(*chosen) for choice in choices for chosen in choice))
    built = {}
    for one, found in zip(builds, compile_builds(builds, Target.current()), strict=True):
        if isinstance(found, CompilerError):
            raise found
        built[one] = found
    return built


def runner(
    program: Program, choice: Choice, built: dict[Build, Compiled], tensors: Sequence[Tensor]
) -> tuple[Callable[[], None], list[Tensor]]:
    """What runs the kernels, and the results that it leaves."""
    buffers = {i.view.buffer: tensors[i.position] for i in program.inputs if isinstance(i, TensorInput)}
    launches = []
    for op, (kernel, config) in zip(program.operations, choice, strict=True):
        assert isinstance(op, KernelOp)
        for b in op.kernel.buffers:
            if b not in buffers:
                dtype = program.buffers[b].dtype
                buffers[b] = torch.empty(program.nbytes(b) // dtype.itemsize, dtype=dtype, device="cuda")
        launcher = make_launcher(kernel, built[Build.of(kernel, config)])
        launches.append((launcher, [buffers[b].data_ptr() for b in op.kernel.buffers]))
    stream = torch.cuda.current_stream().cuda_stream

    def run() -> None:
        for launcher, pointers in launches:
            launcher(stream, *pointers)

    return run, [buffers[v.buffer] for v in program.outputs if isinstance(v, View)]


def inputs(program: Program) -> list[Tensor]:
    """Random values for a program's inputs."""
    views = [i.view for i in program.inputs if isinstance(i, TensorInput)]
    return [torch.randn(tuple(map(int, v.sizes)), device="cuda").to(v.dtype) for v in views]


def same(case: Case, answers: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Stored results have the same bits; sums differ by their order."""
    for k, (a, e) in enumerate(zip(answers, expected, strict=True)):
        if k < case.stored:
            assert torch.equal(a, e), case.name
        else:
            torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-3 * math.sqrt(case.rows))


def compare(title: str, cases: Sequence[Case], disabled: str) -> str:
    """A table of all cases, apart and as one."""
    pairs = [programs(case, disabled, "cuda") for case in cases]
    built = build([first(p) for pair in pairs for p in pair])
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    lines = ["| what | rows | columns | apart, us | as one, us | ratio |", "|---|---|---|---|---|---|"]
    ratios = []
    for case, pair in zip(cases, pairs, strict=True):
        tensors = inputs(pair[0])
        times, answers = [], []
        for program in pair:
            run, results = runner(program, first(program), built, tensors)
            times.append(timed(run, flush))
            answers.append([r.clone() for r in results])
        same(case, answers[1], answers[0])
        ratios.append(times[1] / times[0])
        cells = (case.name, case.rows, case.columns, f"{times[0]:.1f}", f"{times[1]:.1f}", f"{ratios[-1]:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    text = f"# {title}, {torch.cuda.get_device_name()}, torch {torch.__version__}\n\n"
    return text + "\n".join(lines) + f"\n\nGeometric mean of the ratios: {statistics.geometric_mean(ratios):.2f}.\n"
