"""Sums over the rows of a matrix: which blocks, warps and number of parts read fastest.

    python -m benchmarks.column_sums [--write]

What a bias's gradient (``sums``) and the gradients of a layer norm's weight and bias (``norms``) take, as
`memplan.passes.split_reductions` makes them: the first of two kernels, which sums parts of the rows. Caches are flushed
before each launch, and the median counts. Needs one NVIDIA GPU; under a minute, as all kernels are built in parallel.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

RESULT = Path(__file__).parent / "results" / "column_sums.md"
SHAPES = (
    ("sums", 12608, 4096), ("sums", 12608, 3072), ("sums", 12608, 1024), ("norms", 12608, 1024),
    ("sums", 16384, 768), ("norms", 16384, 768), ("sums", 8192, 4096),
)  # fmt: skip
MULTIPROCESSORS = 132
#: program instances for each multiprocessor
INSTANCES = (4, 8, 16, 32)
#: elements of the block that a thread holds: fewer leave too little in flight, more spill
LEAST, MOST = 8, {"sums": 32, "norms": 16}


@dataclass(frozen=True, slots=True)
class Tried:
    """A block of ``columns`` by ``rows``, warps, and the parts of the rows for so many instances."""

    columns: int
    rows: int
    warps: int
    instances: int

    def parts(self, width: int) -> int:
        return max(1, self.instances * MULTIPROCESSORS * self.columns // width)


@triton.jit
def sums(x, out, WIDTH: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):  # fmt: skip # noqa: E501
    position = (tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK))[:, None]
    column, part = position % WIDTH, position // WIDTH
    total = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    for begin in range(0, PART, RBLOCK):
        row = begin + tl.arange(0, RBLOCK)[None, :]
        inside = (row < PART) & (row + PART * part < ROWS)
        total += tl.load(x + (column + WIDTH * (row + PART * part)), inside, other=0.0).to(tl.float32)
    tl.store(out + position, tl.sum(total, 1)[:, None])


@triton.jit
def norms(grad, x, mean, rstd, weights, biases, WIDTH: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):  # fmt: skip # noqa: E501
    position = (tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK))[:, None]
    column, part = position % WIDTH, position // WIDTH
    weight = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    bias = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    for begin in range(0, PART, RBLOCK):
        row = begin + tl.arange(0, RBLOCK)[None, :]
        inside = (row < PART) & (row + PART * part < ROWS)
        at = column + WIDTH * (row + PART * part)
        g = tl.load(grad + at, inside, other=0.0).to(tl.float32)
        normal = tl.load(x + at, inside, other=0.0) - tl.load(mean + (row + PART * part), inside, other=0.0)
        weight += g * (normal * tl.load(rstd + (row + PART * part), inside, other=0.0))
        bias += g
    tl.store(weights + position, tl.sum(weight, 1)[:, None])
    tl.store(biases + position, tl.sum(bias, 1)[:, None])


def trials(kind: str, rows: int, width: int) -> Iterator[Tried]:
    for columns, block, warps, instances in itertools.product(
        (32, 64, 128, 256), (8, 16, 32, 64, 128), (4, 8, 16), INSTANCES
    ):
        t = Tried(columns, block, warps, instances)
        if LEAST <= columns * block // (32 * warps) <= MOST[kind] and rows >= 2 * block * t.parts(width):
            yield t


def launch(kind: str, rows: int, width: int, t: Tried, arguments: tuple[object, ...], *, build_only: bool) -> None:
    """Run a kernel, or only build it, of arguments that are dtypes then."""
    kernel = {"sums": sums, "norms": norms}[kind]
    parts = t.parts(width)
    sizes = {"WIDTH": width, "ROWS": rows, "PART": -(-rows // parts), "XBLOCK": t.columns, "RBLOCK": t.rows}
    grid = (width * parts // t.columns,)
    if build_only:
        kernel.warmup(*arguments, **sizes, num_warps=t.warps, num_stages=1, grid=grid)
    else:
        kernel[grid](*arguments, **sizes, num_warps=t.warps, num_stages=1)


def build(job: tuple[str, int, int, Tried]) -> None:
    dtypes = (torch.bfloat16, *[torch.float32] * (1 if job[0] == "sums" else 5))
    launch(*job, dtypes, build_only=True)


def measure(kind: str, rows: int, width: int, flush: Tensor) -> dict[Tried, float]:
    """Microseconds of each trial, whose answers are compared with torch's."""
    grad = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    x, mean, rstd = torch.randn(rows, width, device="cuda"), torch.randn(rows, device="cuda"), torch.rand(rows, device="cuda")  # fmt: skip # noqa: E501
    normal = grad.double() if kind == "sums" else grad.double() * ((x - mean[:, None]) * rstd[:, None])
    found: dict[Tried, float] = {}
    for t in trials(kind, rows, width):
        out, other = (torch.empty(t.parts(width), width, device="cuda") for _ in range(2))
        arguments = (grad, out) if kind == "sums" else (grad, x, mean, rstd, out, other)
        found[t] = timed(lambda t=t, given=arguments: launch(kind, rows, width, t, given, build_only=False), flush)  # type: ignore[misc]
        torch.testing.assert_close(out.double().sum(0), normal.sum(0), rtol=1e-3, atol=1e-2 * math.sqrt(rows))
    return found


def timed(call: Callable[[], object], flush: Tensor) -> float:
    call()
    pairs = []
    for _ in range(7):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3


def table(results: dict[tuple[str, int, int], dict[Tried, float]]) -> str:
    """Trials that every shape had, by how far from each shape's best they are in the geometric mean."""
    ratios: defaultdict[Tried, list[float]] = defaultdict(list)
    for found in results.values():
        least = min(found.values())
        for t, us in found.items():
            ratios[t].append(us / least)
    rows = {t: r for t, r in ratios.items() if len(r) == len(results)}
    lines = ["| columns | rows | warps | instances | over the best | at most |", "|---|---|---|---|---|---|"]
    means = {t: statistics.geometric_mean(r) for t, r in rows.items()}
    for t, r in sorted(rows.items(), key=lambda row: means[row[0]]):
        lines.append(f"| {t.columns} | {t.rows} | {t.warps} | {t.instances} | {means[t]:.3f} | {max(r):.3f} |")
    shapes = ", ".join(f"{kind} {rows}x{width} {min(f.values()):.1f} us" for (kind, rows, width), f in results.items())
    return f"Best of each: {shapes}.\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.column_sums", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {RESULT.name}")
    given = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        list(pool.map(build, [(*shape, t) for shape in SHAPES for t in trials(*shape)], chunksize=8))
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    text = f"# Sums over rows on {torch.cuda.get_device_name()}, torch {torch.__version__}\n\n"
    text += table({shape: measure(*shape, flush) for shape in SHAPES})
    print(text)
    if given.write:
        RESULT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
