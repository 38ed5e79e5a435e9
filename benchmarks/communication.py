"""Tensor parallelism on the GPUs of one host: eager, Inductor with and without ``_collective.auto_select``, memplan.

``torchrun --nproc-per-node 2 -m benchmarks.communication --results benchmarks/results`` (``--device cpu`` for a small
run over gloo). A Llama-style block and a model of 16 of them, sharded by `parallelize_module`, each for a decode step
(one token) and a prefill. Rank 0 prints every line as soon as it is measured, and at the end writes
``communication.json`` and ``communication.md``:

* milliseconds a step, by itself and with the systems in turns; the largest difference from the library's all-reduce in
  the same compiler, and whether all bits are equal; bytes asked of the symmetric allocator; device copies in one step,
  as the profiler counts them;
* iterations with random delays on each rank, on inputs that change: all bits as without delays;
* a rank with another plan, which has to be refused;
* a rank that is killed, in processes of their own: the other one has to end within the group's timeout.

What does not fit into ``--seconds`` is left out and said. NVLink multicast stays off.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import argparse
import contextlib
import gc
import itertools
import json
import random
import statistics
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import memplan
from memplan.runtime.process_groups import group_timeout

SYSTEMS = ("eager", "inductor", "inductor-auto", "memplan-library", "memplan-registered", "memplan-python", "memplan")
CHECKS = ("delays", "another-plan", "killed-rank")
Step = Callable[[torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Attention and a gated MLP with residuals; ``heads`` are those of this rank."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        h = self.norm1(x)
        q, k, v = (p(h).view(batch, tokens, -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1)
        x = x + self.o(a.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """A stack of blocks."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


PLAN = {
    **dict.fromkeys(("q", "k", "v", "gate", "up"), ColwiseParallel()),
    **dict.fromkeys(("o", "down"), RowwiseParallel()),
}


class SymmetricBytes:
    """Counts what is asked of torch's symmetric allocator: each allocation id once, as it is kept under it."""

    def __init__(self) -> None:
        self.by_id: dict[object, int] = {}
        self.numbers = itertools.count()
        kind = torch._C._distributed_c10d._SymmetricMemory
        real = kind.empty_strided_p2p

        def counted(size, stride, dtype, device, *rest, **named):  # type: ignore[no-untyped-def]
            nbytes = dtype.itemsize
            for n in size:
                nbytes *= n
            key = named.get("alloc_id") or (rest[1] if len(rest) > 1 else None) or ("own", next(self.numbers))
            self.by_id[key] = nbytes
            made = real(size, stride, dtype, device, *rest, **named)
            if isinstance(key, tuple):  # nobody keeps it but the tensor
                weakref.finalize(made, self.by_id.pop, key, None)
            return made

        kind.empty_strided_p2p = staticmethod(counted)

    @property
    def total(self) -> int:
        return sum(self.by_id.values())


class Run:
    """One process's part in the measurement."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begun = args, time.monotonic()
        self.device: str = args.device
        self.rows: list[dict[str, object]] = []
        # control messages go over the CPU: they disturb nothing that is measured
        self.control = dist.new_group(backend="gloo")
        self.mesh = init_device_mesh(args.device, (dist.get_world_size(),))
        self.symmetric = SymmetricBytes()

    def time_left(self, needed: float) -> bool:
        """Whether rank 0 still has so many seconds, told to all."""
        flag = torch.tensor([self.args.seconds - (time.monotonic() - self.begun) > needed], dtype=torch.int32)
        dist.broadcast(flag, 0, group=self.control)
        return bool(flag.item())

    def report(self, row: dict[str, object]) -> None:
        """Rank 0 keeps and prints the line; another rank prints its own errors."""
        if dist.get_rank() == 0:
            self.rows.append(row)
            write(self.args, self)
        if dist.get_rank() == 0 or "error" in row:
            print(
                json.dumps({"rank": dist.get_rank(), "at_s": round(time.monotonic() - self.begun, 1), **row}),
                flush=True,
            )

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def build(self, layers: int) -> nn.Module:
        """The sharded model, with the same weights on every rank."""
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        with torch.device(self.device):
            model = Model(layers, self.args.width, self.args.heads, self.args.hidden).to(dtype)
        for block in model.blocks:
            parallelize_module(block, self.mesh, PLAN)
        return model.requires_grad_(False).eval()

    def inputs(self, tokens: int) -> list[torch.Tensor]:
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(1)
        shape = (1, tokens, self.args.width)
        return [torch.randn(shape, generator=generator).to(self.device, dtype) for _ in range(3)]

    # -- one model, one size ------------------------------------------------------------------------------------------

    def case(self, layers: int, tokens: int) -> None:
        """All systems."""
        model = self.build(layers)
        xs = self.inputs(tokens)
        exact: torch.Tensor | None = None
        steps: dict[str, Step] = {}
        for system in self.args.systems:
            if system == "memplan-library" and layers == 1:
                continue
            row: dict[str, object] = {"layers": layers, "tokens": tokens, "system": system}
            if not self.time_left(self.args.spare):
                self.report({**row, "left out": "no time"})
                continue
            try:
                with torch.no_grad(), symmetric_memory(system == "inductor-auto" and self.device == "cuda"):
                    exact, steps[system] = self.measure(row, system, model, xs, exact)
            except Exception as error:  # one system's failure is a line of the table, not the end of it
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            self.report(row)
        if self.args.rounds and len(steps) > 1 and self.time_left(self.args.spare / 2):
            with torch.no_grad():
                self.report({"layers": layers, "tokens": tokens, **self.turns(steps, xs[0])})

    def turns(self, steps: Mapping[str, Step], x: torch.Tensor) -> dict[str, object]:
        """Milliseconds of the systems in turns, the median over all rounds: a host that is slower for a while is so for
        all of them."""
        found: dict[str, list[float]] = {system: [] for system in steps}
        for number in range(self.args.rounds):
            for system in sorted(steps) if number % 2 else sorted(steps, reverse=True):
                steps[system](x)
                found[system] += self.times(steps[system], x, batches=2)
        return {"in turns, ms": {system: round(statistics.median(times), 4) for system, times in found.items()}}

    def measure(
        self, row: dict[str, object], system: str, model: nn.Module, xs: list[torch.Tensor], exact: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, Step]:
        gc.collect()  # programs of other lines would have a say in the size of the arena
        before = self.symmetric.total
        begun = time.perf_counter()
        step = compiled(model, system)
        with memplan.record() as recording:
            got = step(xs[0]).float().clone()
        self.sync()
        row |= planned(recording)
        row["first_s"] = round(time.perf_counter() - begun, 2)
        if exact is None and system in ("eager", "memplan-library"):
            exact = got
        if system == "memplan-library":
            exact = got  # the same kernels, the library's sums
        if exact is not None:
            row["difference"] = float((got - exact).abs().max())
            row["equal bits"] = bool(torch.equal(got, exact))
            row["largest"] = float(exact.abs().max())
        for _ in range(5):
            step(xs[0])
        self.sync()
        row["symmetric bytes"] = self.symmetric.total - before
        row |= self.memory(step, xs[0])
        found = self.times(step, xs[0])
        row["ms"], row["ms_least"] = round(statistics.median(found), 4), round(min(found), 4)
        if self.device == "cuda":
            row |= profiled(step, xs[0])
        return exact, step

    def times(self, step: Step, x: torch.Tensor, batches: int = 0) -> list[float]:
        """Milliseconds a step, of each of several batches of 10; ranks start each batch together."""
        out = []
        for _ in range(batches or self.args.repeats):
            dist.barrier(self.control)
            self.sync()
            started = time.perf_counter()
            for _ in range(10):
                step(x)
            self.sync()
            out.append((time.perf_counter() - started) * 100)
        return out

    def memory(self, step: Step, x: torch.Tensor) -> dict[str, object]:
        """Peak of live bytes above those before the step (symmetric memory is not in it)."""
        if self.device != "cuda":
            return {}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(x)
        torch.cuda.synchronize()
        return {"peak": torch.cuda.max_memory_allocated() - before}

    # -- what may go wrong --------------------------------------------------------------------------------------------

    def delays(self, layers: int, tokens: int, iterations: int) -> None:
        """Iterations with random waits on each rank, on three inputs in turn: the bits of those without."""
        row: dict[str, object] = {"check": "delays", "layers": layers, "tokens": tokens}
        try:
            with torch.no_grad():
                step = compiled(self.build(layers), "memplan")
                xs = self.inputs(tokens)
                want = [step(x).clone() for x in xs]
                rng = random.Random(dist.get_rank())
                wrong = torch.zeros((), dtype=torch.int64, device=self.device)
                self.sync()
                begun = time.monotonic()
                for k in range(iterations):
                    if rng.random() < 0.25:
                        self.tarry(rng)
                    wrong += (step(xs[k % 3]) != want[k % 3]).any()
                self.sync()
            row |= {"iterations": iterations, "wrong": int(wrong), "seconds": round(time.monotonic() - begun, 1)}
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        self.report(row)

    def tarry(self, rng: random.Random) -> None:
        if self.device == "cuda":
            torch.cuda._sleep(int(rng.random() * 200_000))
        else:
            time.sleep(rng.random() * 1e-3)

    def other_plan(self) -> None:
        """Rank 1 has another number of tokens."""
        row: dict[str, object] = {"check": "another plan"}
        options = {"communication": {"timeout": 60}}
        try:
            torch._dynamo.reset()
            step = torch.compile(self.build(1), backend="memplan", dynamic=False, options=options)
            with torch.no_grad():
                step(self.inputs(2 + dist.get_rank())[0])
            row["refused"] = False
        except Exception as error:
            row |= {"refused": type(error).__name__ == "CommunicationError", "message": str(error)[:400]}
        self.report(row)

    def killed_rank(self) -> None:
        """In processes of their own, on the same devices: rank 1 kills itself; how rank 0 ends."""
        row: dict[str, object] = {"check": "a killed rank", "timeout_s": KILL_TIMEOUT}
        context = torch.multiprocessing.get_context("spawn")
        dist.barrier(self.control)
        path = [str(Path(tempfile.gettempdir()) / f"memplan-killed-{os.getpid()}")]
        dist.broadcast_object_list(path, 0, group=self.control)
        child = context.Process(target=_child, args=(dist.get_rank(), dist.get_world_size(), path[0], self.args))
        begun = time.monotonic()
        child.start()
        child.join(KILL_TIMEOUT * 2 + 60)
        if child.is_alive():
            child.kill()
            row["error"] = "it hangs"
        started = Path(f"{path[0]}-killed")
        since = time.time() - started.stat().st_mtime if started.exists() else time.monotonic() - begun
        row |= {"exit code": child.exitcode, "seconds after the kill": round(since, 1)}
        dist.barrier(self.control)
        self.report(row)


KILL_TIMEOUT = 15
_numbers = itertools.count()
#: by name in `SYSTEMS`
MEMPLAN_OPTIONS: Mapping[str, Mapping[str, object]] = {
    "memplan": {},
    "memplan-python": {"wrapper": "python"},
    "memplan-library": {"communication": {"all_reduce": "library"}},
    "memplan-registered": {"communication": {"all_reduce": "library", "registered": "on"}},
}


def _child(rank: int, world: int, path: str, args: argparse.Namespace) -> None:
    """A small tensor-parallel model; the last rank kills itself after some steps."""
    import signal

    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if args.device == "cuda" else "gloo", init_method=f"file://{path}", rank=rank, world_size=world,
        timeout=timedelta(seconds=KILL_TIMEOUT),
    )  # fmt: skip
    run = Run(args)
    step = compiled(run.build(1), "memplan")
    x = run.inputs(1)[0]
    with torch.no_grad():
        for _ in range(5):
            step(x)
        run.sync()
        seconds = group_timeout(dist.group.WORLD)
        print(json.dumps({"rank": rank, "check": "before the kill", "group's timeout": seconds}), flush=True)
        dist.barrier(run.control)
        if rank == world - 1:
            Path(f"{path}-killed").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(20):
            step(x)
        run.sync()


def compiled(model: nn.Module, system: str) -> Step:
    """What is measured under this name: a function of its own, so that systems that take turns do not share what
    Dynamo keeps for one."""
    if system == "eager":
        return model

    def step(x: torch.Tensor) -> torch.Tensor:
        return model(x)  # type: ignore[no-any-return]

    step.__code__ = step.__code__.replace(co_name=f"step_{next(_numbers)}")
    match system:
        case "inductor" | "inductor-auto":
            selection = {"_collective.auto_select": True} if system == "inductor-auto" else {}
            return torch.compile(step, backend="inductor", dynamic=False, options=selection)  # type: ignore[no-any-return]
        case _:
            options = MEMPLAN_OPTIONS[system]
            return torch.compile(step, backend="memplan", dynamic=False, options=dict(options))  # type: ignore[no-any-return]


@contextlib.contextmanager
def symmetric_memory(enabled: bool) -> Iterator[None]:
    """Inductor's selection asks for the group to be enabled beforehand."""
    if enabled:
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        enable_symm_mem_for_group(dist.group.WORLD.group_name)
    yield


def profiled(step: Step, x: torch.Tensor) -> dict[str, object]:
    """Of one step: kernels on the device, of them copies, and microseconds in all-reduces."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step(x)
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [e for e in events if "memcpy dtod" in e.name.lower() or "copy_kernel" in e.name.lower()]
    reduces = [e for e in events if "allreduce" in e.name.lower() or "all_reduce" in e.name.lower()]
    return {
        "device operations": len(events),
        "copies": len(copies),
        "all-reduces": len(reduces),
        "all-reduce_us": round(sum(e.device_time_total for e in reduces), 1),
    }


def planned(recording: memplan.Recording) -> dict[str, object]:
    """What memplan's plans say of communication: arenas' bytes, all-reduces in them, and why others are not."""
    if not recording.plans:
        return {}
    symmetric = sum("symm_mem." in getattr(op, "target", "") for p in recording.plans for op in p.program.operations)
    reasons = {why for p in recording.plans for _, why in p.notes if "unregistered memory" in why}
    arenas = sum(int(a.nbytes) for p in recording.plans for a in p.arenas)
    return {"arena": arenas, "symmetric operations": symmetric, "left to the library": sorted(reasons)[:2]}


def write(args: argparse.Namespace, run: Run) -> None:
    """The lines as JSON and as tables."""
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    about = {"device": device, "ranks": dist.get_world_size(), "torch": torch.__version__}
    (folder / "communication.json").write_text(json.dumps({**about, "rows": run.rows}, indent=1) + "\n")
    columns = ("layers", "tokens", "system", "ms", "ms_least", "difference", "equal bits", "symmetric bytes", "arena",
               "peak", "copies", "all-reduce_us", "first_s", "error", "left out")  # fmt: skip
    lines = [f"# Tensor parallelism: {about['ranks']} x {device}, torch {torch.__version__}", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in run.rows:
        if "system" in row:
            lines.append("| " + " | ".join(str(row.get(c, "")) for c in columns) + " |")
    lines += ["", *(f"- {json.dumps(row)}" for row in run.rows if "system" not in row), ""]
    (folder / "communication.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--layers", nargs="+", type=int, default=[16, 1])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2048], help="tokens of decode and of prefill")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=11008)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10, help="in which the systems take turns, once all are compiled")
    parser.add_argument("--checks", nargs="*", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--delays", type=int, default=10_000, help="iterations with random delays")
    parser.add_argument("--seconds", type=float, default=330, help="what does not fit is left out")
    parser.add_argument("--spare", type=float, default=25, help="seconds that have to be left for a line to begin")
    parser.add_argument("--results", default="communication-results", help="folder for JSON and Markdown")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))  # a failure on one rank is not to last
    run = Run(args)
    every = (lambda: run.delays(1, args.tokens[0], args.delays), run.other_plan, run.killed_rank)
    checks = [check for name, check in zip(CHECKS, every, strict=True) if name in args.checks]
    for layers in args.layers:
        for tokens in args.tokens:
            run.case(layers, tokens)
        if checks and layers == args.layers[0]:
            while checks:
                checks.pop(0)()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
