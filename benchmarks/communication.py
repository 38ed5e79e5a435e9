"""Tensor parallelism on the GPUs of one host: eager, Inductor, Inductor with ``_collective.auto_select``, memplan.

``torchrun --nproc-per-node 2 -m benchmarks.communication`` (``--device cpu`` for a small run over gloo). A Llama-style
block and a model of 16 of them, sharded by `parallelize_module`, each for a decode step (a few tokens) and a prefill.
Every line is printed by rank 0 as soon as it is measured: milliseconds a step, the largest difference from eager,
bytes of live and reserved memory above those before. Then some iterations of memplan with random delays on each rank,
which have to be bitwise equal to those without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

SYSTEMS = ("eager", "inductor", "inductor-auto", "memplan")
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


def build(args: argparse.Namespace, mesh: DeviceMesh, layers: int) -> nn.Module:
    """The sharded model, with the same weights on every rank."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.device(args.device):
        model = Model(layers, args.width, args.heads, args.hidden).to(dtype)
    for block in model.blocks:
        parallelize_module(block, mesh, PLAN)
    return model.requires_grad_(False).eval()


def compiled(model: nn.Module, system: str) -> Step:
    """What is measured under this name."""
    torch._dynamo.reset()
    match system:
        case "eager":
            return model
        case "memplan":
            return torch.compile(model, backend="memplan", dynamic=False)  # type: ignore[no-any-return]
        case _:
            options = {"_collective.auto_select": True} if system == "inductor-auto" else None
            return torch.compile(model, backend="inductor", dynamic=False, options=options)  # type: ignore[no-any-return]


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def times(step: Step, x: torch.Tensor, device: str, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` batches of 10 steps, by step; ranks start each batch together."""
    out = []
    for _ in range(repeats):
        dist.barrier()
        sync(device)
        started = time.perf_counter()
        for _ in range(10):
            step(x)
        sync(device)
        out.append((time.perf_counter() - started) * 100)
    return out


@contextlib.contextmanager
def symmetric_memory(enabled: bool) -> Iterator[None]:
    """Inductor's selection asks for the group to be enabled beforehand."""
    if enabled:
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        enable_symm_mem_for_group(dist.group.WORLD.group_name)
    yield


def memory(step: Step, x: torch.Tensor, device: str) -> dict[str, int]:
    """Bytes above those before the step: live, and taken from the device (symmetric memory is only in the latter)."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(x)
    torch.cuda.synchronize()
    return {"peak": torch.cuda.max_memory_allocated() - before, "reserved": torch.cuda.memory_reserved()}


def case(args: argparse.Namespace, mesh: DeviceMesh, layers: int, tokens: int) -> None:
    """All systems on one model and one number of tokens."""
    model = build(args, mesh, layers)
    torch.manual_seed(1)
    x = torch.randn(1, tokens, args.width, device=args.device, dtype=next(model.parameters()).dtype)
    want: torch.Tensor | None = None
    for system in args.systems:
        row: dict[str, object] = {"layers": layers, "tokens": tokens, "system": system, "world": dist.get_world_size()}
        try:
            with symmetric_memory(system == "inductor-auto" and args.device == "cuda"), torch.no_grad():
                begun = time.perf_counter()
                free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 0
                step = compiled(model, system)
                got = step(x).float().clone()
                sync(args.device)
                row["compile_s"] = round(time.perf_counter() - begun, 2)
                want = got if want is None else want
                row["difference"] = float((got - want).abs().max())
                row["largest"] = float(want.abs().max())
                for _ in range(3):
                    step(x)
                row |= memory(step, x, args.device)
                found = times(step, x, args.device, args.repeats)
                row["ms"] = round(statistics.median(found), 4)
                row["ms_least"] = round(min(found), 4)
                if args.device == "cuda":
                    row["device_bytes"] = free - torch.cuda.mem_get_info()[0]
                if system == "memplan" and args.delays:
                    row["delayed_equal"] = delayed(step, x, args)
        except Exception as error:  # one system's failure is a line of the table, not the end of it
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        report(row)


def delayed(step: Step, x: torch.Tensor, args: argparse.Namespace) -> bool:
    """Whether ``args.delays`` iterations with random waits on each rank all give the first one's bits."""
    want = step(x).clone()
    rng = random.Random(dist.get_rank())
    equal = torch.ones((), dtype=torch.bool, device=args.device)
    for _ in range(args.delays):
        if rng.random() < 0.25:
            if args.device == "cuda":
                torch.cuda._sleep(int(rng.random() * 200_000))
            else:
                time.sleep(rng.random() * 1e-3)
        equal &= (step(x) == want).all()
    return bool(equal)


def report(row: dict[str, object]) -> None:
    """Rank 0 prints the line; an error of any rank is printed by that rank."""
    if dist.get_rank() == 0 or "error" in row:
        print(json.dumps({"rank": dist.get_rank(), **row}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2048], help="tokens of decode and of prefill")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=11008)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--delays", type=int, default=500, help="iterations with random delays (10,000 for the record)")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    mesh = init_device_mesh(args.device, (dist.get_world_size(),))
    for layers in args.layers:
        for tokens in args.tokens:
            case(args, mesh, layers, tokens)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
