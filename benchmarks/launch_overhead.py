"""What launching costs: the time of one call of a graph of many tiny kernels that cannot fuse.

    python -m benchmarks.launch_overhead [--device cpu|cuda] [--links 200] [--only TEXT] [--write]

memplan's and Inductor's wrappers, in Python and in C++, at equal numbers of launches, which are shown: counted in the
wrappers' text on a CPU, as kernel nodes of the recorded CUDA graph on a GPU. On a CPU every second link is a product,
since Inductor makes one function of all loops between two products; on a GPU all are kernels (softmax over rows and
columns in turn), and the recorded graph is also replayed. Rounds are interleaved, garbage collection is off; the best
average of each counts. On a CPU it is the time of the calling thread, so that other work on the machine is not in it.

On a GPU a graph of as many kernels that do next to nothing is replayed too (`benchmarks.empty_graph`): what the device
itself takes from one kernel to the next, whoever launches.

A line is printed as soon as a wrapper is compiled and was called: what takes long, or fails, hides no other. Inductor's
C++ comes last, as it compiles longest; the rounds in which all take turns end after ``--seconds``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import memplan
from benchmarks import empty_graph
from memplan.ir.program import Extern, KernelOp

RESULTS = Path(__file__).parent / "results"
Call = Callable[[torch.Tensor], torch.Tensor]


def alone(run: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """The function with code of its own: Dynamo keeps what it compiled by code object, and no wrapper shall have to
    look past another's entry, nor be compiled again because a later one began from nothing."""
    run.__code__ = run.__code__.replace()
    return run


def products(links: int, device: str) -> Call:
    """A pointwise kernel and a product in turn."""
    weight = torch.eye(16, device=device)

    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(links // 2):
            x = torch.mm(x.sin(), weight)
        return x

    return alone(run)


def norms(links: int, device: str) -> Call:
    """Every link needs all of the one before it."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for k in range(links):
            x = torch.softmax(x, k % 2)
        return x

    return alone(run)


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
    call = torch.compile(make(links, device), backend="memplan", options={"wrapper": wrapper})
    begin = time.perf_counter()
    with memplan.record() as recording:
        call(x)
    operations = recording.plans[0].program.operations
    launches = sum(isinstance(op, (KernelOp, Extern)) for op in operations)
    return Row(f"memplan, {wrapper}", call, launches, time.perf_counter() - begin)


def inductor_row(make: Callable[[int, str], Call], links: int, device: str, cpp: bool, x: torch.Tensor) -> Row:
    from torch._inductor.utils import run_and_get_code

    call = torch.compile(make(links, device), backend="inductor", options={"cpp_wrapper": cpp})
    begin = time.perf_counter()
    _, (code, *_) = run_and_get_code(call, x)
    took, name = time.perf_counter() - begin, f"Inductor, {'cpp' if cpp else 'python'}"
    if device == "cuda":
        return Row(name, call, 0, took)  # counted in the recorded graph
    text = code.split("inductor_entry_impl" if cpp else "def call(", 1)[1]
    kernels = re.findall(r"^\s+cpp_fused_\w+\(", text, re.MULTILINE)
    calls = re.findall(r"extern_kernels\.\w+\(|aoti_torch_cpu_mm_out\(", text)
    return Row(name, call, len(kernels) + len(calls), took)


def launched(graph: torch.cuda.CUDAGraph) -> int:
    """Kernels that a replay of the graph runs.

    Raises
    ------
    RuntimeError
        If the driver cannot say.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_size_t()
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    failed = driver.cuGraphGetNodes(raw, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    failed = failed or driver.cuGraphGetNodes(raw, nodes, ctypes.byref(count))
    kinds = [ctypes.c_int(-1) for _ in nodes]
    for node, kind in zip(nodes, kinds, strict=True):
        failed = failed or driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind))
    if failed:
        raise RuntimeError(f"the driver cannot list the nodes of the recorded graph: error {failed}")
    return sum(kind.value == 0 for kind in kinds)  # CU_GRAPH_NODE_TYPE_KERNEL


def once(call: Callable[[], object], device: str, repeats: int) -> float:
    clock = time.perf_counter if device == "cuda" else time.thread_time
    synchronize(device)
    begin = clock()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (clock() - begin) / repeats * 1e6


def recorded(call: Call, x: torch.Tensor) -> torch.cuda.CUDAGraph:
    """The call, recorded as a CUDA graph whose nodes can be listed."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call(x)
    graph.instantiate()
    return graph


def tried(make_row: Callable[[], Row], device: str, x: torch.Tensor, repeats: int) -> Row | None:
    """Compile and call once, count, time a first round, and say so; None where it fails, with the traceback printed."""
    try:
        row = make_row()
        row.took = min(once(lambda: row.call(x), device, repeats) for _ in range(3))
        if device == "cuda":
            graph = recorded(row.call, x)
            row.launches = launched(graph)
            once(graph.replay, device, 2)
            row.replayed = min(once(graph.replay, device, repeats) for _ in range(3))
    except Exception:
        traceback.print_exc(limit=-6)
        return None
    print(line(row, None), flush=True)
    return row


def measure(
    links: int, device: str, rounds: int, repeats: int, seconds: float, only: str = ""
) -> tuple[list[Row], int]:
    """The rows whose name contains ``only``, and how many failed."""
    end = time.perf_counter() + seconds
    make = norms if device == "cuda" else products
    x = torch.randn(16, 16, device=device)
    makers = {
        "memplan, cpp": lambda: memplan_row(make, links, device, "cpp", x),
        "memplan, python": lambda: memplan_row(make, links, device, "python", x),
        "Inductor, python": lambda: inductor_row(make, links, device, False, x),
        "Inductor, cpp": lambda: inductor_row(make, links, device, True, x),
    }
    with torch.no_grad():
        tries = [tried(maker, device, x, repeats) for name, maker in makers.items() if only in name]
        rows = [row for row in tries if row is not None]
        gc.collect()
        gc.disable()
        for k in range(rounds):
            if k >= 2 and time.perf_counter() > end:
                break
            for row in rows:
                row.took = min(row.took, once(lambda row=row: row.call(x), device, repeats))  # type: ignore[misc]
        gc.enable()
    return rows, len(tries) - len(rows)


def line(row: Row, first: Row | None) -> str:
    """A row of the table, against the first where it is known."""
    launches = max(1, row.launches)
    replayed = "" if row.replayed is None else f"{row.replayed / launches:.2f}"
    ratio = "" if first is None else f"{row.took / first.took:.2f}"
    return (
        f"| {row.name} | {row.launches} | {row.took:.1f} | {row.took / launches:.3f} | {ratio} | {replayed} "
        f"| {row.first:.1f} |"
    )


def table(rows: Sequence[Row], device: str, links: int) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    out = [
        f"# {links} tiny kernels that cannot fuse, one call ({where}, torch {torch.__version__})",
        "",
        "| | launches | us a call | us a launch | to memplan, cpp | replayed, us a launch | first call, s |",
        "|---|---|---|---|---|---|---|",
    ]
    out += [line(row, rows[0]) for row in rows]
    return "\n".join(out) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--links", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=50, help="no further round after this long; two are measured")
    parser.add_argument("--only", default="", help='rows whose name contains this: "cpp" for both C++ wrappers')
    parser.add_argument("--write", action="store_true", help="keep the table in results/launch_overhead-{cpu,gpu}.md")
    given = parser.parse_args(arguments)
    bare = empty_graph.measure(given.links, given.repeats) if given.device == "cuda" else []
    if bare:
        print(empty_graph.table(bare), flush=True)
    rows, failed = measure(given.links, given.device, given.rounds, given.repeats, given.seconds, given.only)
    report(rows, bare, given, failed)
    if bare:  # last: whatever the driver makes of an early launch, everything else has been said and kept
        try:
            bare += empty_graph.measure_early(given.links, given.repeats)
        except Exception:
            traceback.print_exc(limit=-6)
            return failed + 1
        report(rows, bare, given, failed)
    return failed


def report(rows: Sequence[Row], bare: list[empty_graph.Replayed], given: argparse.Namespace, failed: int) -> None:
    """Print the table, and keep it where that is wanted and nothing is missing."""
    if not rows:
        return
    text = table(rows, given.device, given.links) + ("\n" + empty_graph.table(bare) + "\n" if bare else "")
    print("\n" + text, flush=True)
    if given.write and not failed and not given.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"launch_overhead-{'gpu' if given.device == 'cuda' else 'cpu'}.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
