"""What launching costs: the time of one call of a graph of many tiny kernels that cannot fuse.

    python -m benchmarks.launch_overhead [--device cpu|cuda] [--links 200] [--write]

memplan's and Inductor's wrappers, in Python and in C++, at equal numbers of launches, which are shown: counted in the
wrappers' text on a CPU, by the profiler on a GPU. On a CPU every second link is a product, since Inductor makes one
function of all loops between two products; on a GPU all are kernels (softmax over rows and columns in turn), and each
call is also recorded as a CUDA graph and replayed. Rounds are interleaved, garbage collection is off; the best average
of each counts. On a CPU it is the time of the calling thread, so that other work on the machine is not in it.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import memplan
from memplan.ir.program import Extern, KernelOp

RESULTS = Path(__file__).parent / "results"
Call = Callable[[torch.Tensor], torch.Tensor]


def products(links: int, device: str) -> Call:
    """A pointwise kernel and a product in turn."""
    weight = torch.eye(16, device=device)

    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(links // 2):
            x = torch.mm(x.sin(), weight)
        return x

    return run


def norms(links: int, device: str) -> Call:
    """Every link needs all of the one before it."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for k in range(links):
            x = torch.softmax(x, k % 2)
        return x

    return run


@dataclass
class Row:
    """One way to run the graph; times in microseconds, of a whole call."""

    name: str
    call: Call
    launches: int
    first: float
    took: float = float("inf")
    replayed: float | None = None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memplan_row(make: Callable[[int, str], Call], links: int, device: str, wrapper: str, x: torch.Tensor) -> Row:
    torch._dynamo.reset()
    call = torch.compile(make(links, device), backend="memplan", options={"wrapper": wrapper})
    begin = time.perf_counter()
    with memplan.record() as recording:
        call(x)
    operations = recording.plans[0].program.operations
    launches = sum(isinstance(op, (KernelOp, Extern)) for op in operations)
    return Row(f"memplan, {wrapper}", call, launches, time.perf_counter() - begin)


def inductor_row(make: Callable[[int, str], Call], links: int, device: str, cpp: bool, x: torch.Tensor) -> Row:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    call = torch.compile(make(links, device), backend="inductor", options={"cpp_wrapper": cpp})
    begin = time.perf_counter()
    _, (code, *_) = run_and_get_code(call, x)
    text = code.split("inductor_entry_impl" if cpp else "def call(", 1)[1]
    kernels = re.findall(r"^\s+cpp_fused_\w+\(", text, re.MULTILINE)
    calls = re.findall(r"extern_kernels\.\w+\(|aoti_torch_cpu_mm_out\(", text)
    return Row(f"Inductor, {'cpp' if cpp else 'python'}", call, len(kernels) + len(calls), time.perf_counter() - begin)


def launched(call: Call, x: torch.Tensor) -> int:
    """Kernels that one call runs on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call(x)
        torch.cuda.synchronize()
    found = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memset", "Memcpy")) for e in found)


def once(call: Callable[[], object], device: str, repeats: int) -> float:
    clock = time.perf_counter if device == "cuda" else time.thread_time
    synchronize(device)
    begin = clock()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (clock() - begin) / repeats * 1e6


def replay(call: Call, x: torch.Tensor) -> Callable[[], object]:
    """The call, recorded as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call(x)

    def run(held: torch.Tensor = held) -> None:
        graph.replay()

    return run


def measure(links: int, device: str, rounds: int, repeats: int) -> list[Row]:
    make = norms if device == "cuda" else products
    x = torch.randn(16, 16, device=device)
    rows = []
    with torch.no_grad():
        for wrapper in ("cpp", "python"):
            rows.append(memplan_row(make, links, device, wrapper, x))
        for cpp in (True, False):
            rows.append(inductor_row(make, links, device, cpp, x))
        gc.collect()
        gc.disable()
        for _ in range(rounds):
            for row in rows:
                row.took = min(row.took, once(lambda row=row: row.call(x), device, repeats))  # type: ignore[misc]
        if device == "cuda":
            for row in rows:
                row.launches = launched(row.call, x)
                graph = replay(row.call, x)
                row.replayed = min(once(graph, device, repeats) for _ in range(rounds))
        gc.enable()
    return rows


def table(rows: Sequence[Row], device: str, links: int) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    out = [
        f"# {links} tiny kernels that cannot fuse, one call ({where}, torch {torch.__version__})",
        "",
        "| | launches | us a call | us a launch | to memplan, cpp | replayed, us a launch | first call, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        replayed = "" if row.replayed is None else f"{row.replayed / row.launches:.2f}"
        out.append(
            f"| {row.name} | {row.launches} | {row.took:.1f} | {row.took / row.launches:.3f} "
            f"| {row.took / rows[0].took:.2f} | {replayed} | {row.first:.1f} |"
        )
    return "\n".join(out) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--links", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    given = parser.parse_args(arguments)
    text = table(measure(given.links, given.device, given.rounds, given.repeats), given.device, given.links)
    print(text)
    if given.write:
        (RESULTS / f"launch_overhead-{given.device}.md").write_text(text)


if __name__ == "__main__":
    main()
