"""The sum of one huge row in one launch or in two: whether a semaphore in a workspace pays.

    python -m benchmarks.long_sums [--write]

Split reductions are two kernels: parts of the row, then the parts. In one launch, the last instance to arrive (told by
a counter in a workspace that is zero before and after) adds the parts up, in the same fixed order. Both forms here have
the same parts, and each is a CUDA graph of twenty runs, replayed in turn; beside them what the backend makes of
``x.sum()``, and torch itself. Needs one NVIDIA GPU; about a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from memplan.runtime.cuda_launch import native_launch
from memplan.runtime.triton_build import Build, Target, compile_one

RESULTS = Path(__file__).parent / "results"
SIZES = (131_072, 1_000_000, 10_000_000, 100_000_000)
PARTS = (132, 264, 528, 1056)
_BLOCK = 4096
_MULTIPLE = 256  # elements that a part's length is a multiple of: aligned loads
_RUNS, _ROUNDS = 20, 15

SOURCE = """\
import triton
import triton.language as tl


@triton.jit
def part_of(x, N: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * PART
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, PART, BLOCK):
        at = k + tl.arange(0, BLOCK)
        total += tl.load(x + begin + at, mask=(at < PART) & (begin + at < N), other=0.0)
    return tl.sum(total)


@triton.jit
def sum_of_parts(partials, PARTS: tl.constexpr, ROOM: tl.constexpr):
    at = tl.arange(0, ROOM)
    return tl.sum(tl.load(partials + at, mask=at < PARTS, other=0.0))


@triton.jit
def parts_only(x, partials, N: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(partials + tl.program_id(0), part_of(x, N, PART, BLOCK))


@triton.jit
def then_sum(partials, out, PARTS: tl.constexpr, ROOM: tl.constexpr):
    tl.store(out, sum_of_parts(partials, PARTS, ROOM))


@triton.jit
def in_one(
    x, partials, counter, out,
    N: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr,
):
    tl.store(partials + tl.program_id(0), part_of(x, N, PART, BLOCK))
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == PARTS - 1:
        tl.debug_barrier()
        tl.store(out, sum_of_parts(partials, PARTS, ROOM))
        tl.store(counter, 0)
"""  # fmt: skip
_POINTERS = {"x": "*fp32", "partials": "*fp32", "counter": "*i32", "out": "*fp32"}
_ARGUMENTS = {
    "parts_only": ("x", "partials"),
    "then_sum": ("partials", "out"),
    "in_one": ("x", "partials", "counter", "out"),
}


def constants(name: str, size: int, parts: int) -> dict[str, int]:
    """The compile-time arguments of a kernel."""
    known = {
        "N": size,
        "PART": -(-size // (parts * _MULTIPLE)) * _MULTIPLE,
        "BLOCK": _BLOCK,
        "PARTS": parts,
        "ROOM": 1 << (parts - 1).bit_length(),
    }
    wanted = {"parts_only": ("N", "PART", "BLOCK"), "then_sum": ("PARTS", "ROOM"), "in_one": tuple(known)}
    return {n: known[n] for n in wanted[name]}


def build_of(name: str, size: int, parts: int) -> Build:
    """A kernel for a row of ``size`` elements in so many parts."""
    arguments = tuple((n, _POINTERS[n]) for n in _ARGUMENTS[name])
    blocks = tuple(constants(name, size, parts).items())
    return Build(name, SOURCE, arguments, (True,) * len(arguments), blocks, 8, 1)


def launcher(name: str, size: int, parts: int, tensors: dict[str, torch.Tensor]) -> Callable[[], None]:
    native = native_launch()
    if native is None:
        raise RuntimeError("there is no driver, or no compiler for the module that calls it")
    found = compile_one(build_of(name, size, parts), Target.current())
    device = torch.cuda.current_device()
    function, context = native.load(found.cubin, found.handle.name, found.shared_bytes, device)  # type: ignore[attr-defined]
    bound = native.bind(function, context, 1 if name == "then_sum" else parts, 8 * 32, found.shared_bytes, False)
    addresses = [tensors[n].data_ptr() for n in _ARGUMENTS[name]]
    return lambda: bound(torch.cuda.current_stream().cuda_stream, *addresses)


def recorded(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_RUNS):
            run()
    return graph


def microseconds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians over rounds in which all take turns."""
    graphs = {name: recorded(run) for name, run in runs.items()}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_ROUNDS):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1000 / _RUNS)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def forms(x: torch.Tensor, parts: int) -> dict[str, tuple[Callable[[], None], torch.Tensor, torch.Tensor]]:
    """For each form what runs it, its result, and its counter."""
    found = {}
    for name, kernels in {"two": ("parts_only", "then_sum"), "one": ("in_one",)}.items():
        tensors = {
            "x": x,
            "partials": torch.full((parts,), float("nan"), device="cuda"),
            "counter": torch.zeros(1, dtype=torch.int32, device="cuda"),
            "out": torch.full((1,), float("nan"), device="cuda"),
        }
        launches = [launcher(k, x.numel(), parts, tensors) for k in kernels]

        def run(launches: list[Callable[[], None]] = launches, held: dict[str, torch.Tensor] = tensors) -> None:
            for launch in launches:
                launch()

        found[name] = (run, tensors["out"], tensors["counter"])
    return found


def measure(size: int) -> tuple[list[str], bool]:
    """Rows of the table, and whether every answer was right."""
    torch._dynamo.reset()  # or the second size would be a dynamic one
    torch.manual_seed(0)
    x = torch.rand(size, device="cuda")
    exact = float(x.double().sum())
    compiled = torch.compile(lambda t: t.sum(), backend="memplan", options={"max_autotune": False})
    runs: dict[str, Callable[[], object]] = {"torch": lambda: x.sum(), "memplan": lambda: compiled(x)}
    good = True
    made = {parts: forms(x, parts) for parts in PARTS}
    for parts, found in made.items():
        answers = set()
        for name, (run, out, counter) in found.items():
            runs[f"{name} {parts}"] = run
            for _ in range(50):  # the same bits each time, whoever arrives last
                out.fill_(float("nan"))
                run()
                answers.add(float(out))
            good &= int(counter) == 0
        good &= len(answers) == 1 and abs(answers.pop() - exact) <= 1e-5 * exact
    times = microseconds(runs)
    rows = []
    for parts in PARTS:
        two, one = times[f"two {parts}"], times[f"one {parts}"]
        rows.append(
            f"| {size} | {parts} | {two:.2f} | {one:.2f} | {one / two:.3f} | {times['memplan']:.2f} "
            f"| {times['torch']:.2f} | {'right' if good else 'WRONG'} |"
        )
    return rows, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/long_sums.md")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    lines = [
        f"# One long row of float32 summed, microseconds ({torch.cuda.get_device_name()}, torch {torch.__version__})",
        "",
        "| elements | parts | two launches | one launch | one / two | memplan | torch | answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    right = True
    for size in SIZES:
        rows, good = measure(size)
        right &= good
        lines += rows
        print("\n".join(rows), flush=True)
    if given.write and right:
        (RESULTS / "long_sums.md").write_text("\n".join(lines) + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
