"""How long collectives take on the GPUs of one host: the library, the library on registered memory, symmetric memory.

``torchrun --nproc-per-node 2 -m benchmarks.collectives --results benchmarks/results`` times each kind of collective in
each way that there is, by bytes of the whole message (an all-gather's result, a reduce-scatter's argument), and writes
``collectives.json`` and ``collectives.md``: microseconds a call of 20 calls one after another (the host's time where it
is the longer), and of the same 20 as a CUDA graph (the device's time). The slowest rank counts. Results are compared
with the library's. Multicast stays off.

* ``library``: `torch.distributed` on ordinary tensors;
* ``registered``: the same, on memory of NCCL's allocator that is registered with the communicator;
* ``window``: the same, registered as a symmetric window;
* ``one_shot``, ``two_shot``, ``symmetric``: operations on symmetric memory.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from memplan.runtime.communication_times import collective_call, operands
from memplan.runtime.symmetric import BACKENDS

KINDS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")
WAYS = ("library", "one_shot", "two_shot", "symmetric", "registered", "window")
SIZES = tuple(4096 * 4**k for k in range(9))  # 4 KiB to 256 MiB
CALLS, ROUNDS = 20, 7
Call = Callable[[], object]


def register(
    nbytes: int, group: dist.ProcessGroup, device: torch.device, *, window: bool
) -> tuple[torch.Tensor, object]:
    """Bytes registered with NCCL, and what has to live as long as they do.

    Parameters
    ----------
    window:
        As a symmetric window (a collective call; NCCL 2.27), which has kernels of its own; otherwise as a user buffer.

    Raises
    ------
    RuntimeError
        If this torch or NCCL cannot.
    """
    backend = group._get_backend(device)
    pool = torch.cuda.MemPool(backend.mem_allocator)  # type: ignore[attr-defined]
    with torch.cuda.use_mem_pool(pool):
        made = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if window:
        backend.register_mem_pool(pool, symm=True)  # type: ignore[attr-defined]
    else:
        backend.register_mem_pool(pool)  # type: ignore[attr-defined]
    return made, (pool, backend)


class Run:
    """One process's part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.group = dist.group.WORLD
        assert self.group is not None
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.control = dist.new_group(backend="gloo")
        self.rows: list[dict[str, object]] = []
        # the communicator has to exist before memory is registered with it
        dist.all_reduce(torch.zeros(1, device=self.device))
        self.kept: list[object] = []

    def memory(self, way: str) -> tuple[Tensor, Tensor]:
        """Bytes for the argument and for the result, of the largest message."""
        nbytes = max(self.args.sizes)
        if way == "library":
            return tuple(torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(2))  # type: ignore[return-value]
        if way in ("registered", "window"):
            both, keep = register(2 * nbytes, self.group, self.device, window=way == "window")
            self.kept.append(keep)
            return both[:nbytes], both[nbytes:]
        made = BACKENDS["cuda"].allocate(nbytes, self.group, self.device)
        self.kept.append(made)
        return made.own, torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def way(self, way: str) -> None:
        """All kinds and sizes."""
        try:
            first, second = self.memory(way)
        except (RuntimeError, TypeError, AttributeError) as error:
            traceback.print_exc()
            self.report({"way": way, "error": f"{type(error).__name__}: {str(error)[:300]}"})
            return
        for kind in KINDS:
            for nbytes in self.args.sizes:
                given, out = operands(kind, nbytes, self.ranks, first, second, torch.bfloat16)
                name = "library" if way in ("registered", "window") else way
                call = collective_call(kind, name, given, out, self.group)
                # NCCL 2.28.9 accesses memory that is not there in a broadcast of 8 MiB out of a window
                if call is None or (way == "window" and kind == "broadcast"):
                    continue
                row: dict[str, object] = {"kind": kind, "bytes": nbytes, "way": way}
                try:
                    row |= self.measured(kind, way, given, out, call)
                except RuntimeError as error:
                    traceback.print_exc()
                    row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                self.report(row)

    def measured(self, kind: str, way: str, given: Tensor, out: Tensor, call: Call) -> dict[str, object]:
        in_place = kind in ("all_reduce", "broadcast")
        values = torch.randint(-4, 5, (max(given.numel(), out.numel()),), device=self.device).to(torch.bfloat16)
        values = values * (self.rank + 1)
        changed = given if in_place and way in ("two_shot", "symmetric") else out
        want = torch.empty_like(changed)
        if in_place:
            want.copy_(values[: want.numel()])
            out.copy_(values[: out.numel()])
        given.copy_(values[: given.numel()])
        right = collective_call(kind, "library", values[: given.numel()], want, self.group)
        assert right is not None
        right()
        call()
        torch.cuda.synchronize()
        equal = bool(torch.equal(changed, want))
        given.zero_()
        out.zero_()
        return {"right": equal, "us": self.microseconds(call, CALLS), "graph_us": self.in_graph(call)}

    def microseconds(self, call: Call, calls: int) -> float:
        """Of one call; the median of some rounds, of that the slowest rank's."""
        found = []
        for _ in range(3):
            call()
        for _ in range(ROUNDS):
            dist.barrier(self.control)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
            found.append((time.perf_counter() - begun) / calls * 1e6)
        slowest = torch.tensor([statistics.median(found)])
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self.control)
        return round(float(slowest), 1)

    def in_graph(self, call: Call) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()
        took = self.microseconds(graph.replay, 1) / CALLS
        graph.reset()
        return round(took, 1)

    def report(self, row: dict[str, object]) -> None:
        """Rank 0 keeps and prints it; another rank prints its own errors."""
        if self.rank == 0:
            self.rows.append(row)
            write(self.args, self.rows)
        if self.rank == 0 or "error" in row:
            print(json.dumps({"rank": self.rank, **row}), flush=True)


def write(args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "device": torch.cuda.get_device_name(), "ranks": dist.get_world_size(), "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }  # fmt: skip
    (folder / "collectives.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    lines = [f"# Collectives: {about['ranks']} x {about['device']}, torch {about['torch']}, NCCL {about['nccl']}", ""]
    lines += ["bfloat16, multicast off; microseconds a call, one after another / in a CUDA graph.", ""]
    ways = [w for w in WAYS if any(r["way"] == w and "us" in r for r in rows)]
    lines += ["| kind | bytes | " + " | ".join(ways) + " |", "|" + " --- |" * (len(ways) + 2)]
    for kind in KINDS:
        for nbytes in args.sizes:
            found = {r["way"]: r for r in rows if r.get("kind") == kind and r.get("bytes") == nbytes and "us" in r}
            cells = [f"{found[w]['us']} / {found[w]['graph_us']}" if w in found else "" for w in ways]
            lines.append(f"| {kind} | {nbytes} | " + " | ".join(cells) + " |")
    wrong = [r for r in rows if "error" in r or r.get("right") is False]
    lines += ["", *(f"- {json.dumps(r)}" for r in wrong), ""]
    (folder / "collectives.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="bytes of a message")
    parser.add_argument("--results", default="collectives-results", help="folder for JSON and Markdown")
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=timedelta(seconds=60))
    run = Run(args)
    for way in args.ways:
        run.way(way)
    run.kept.clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
