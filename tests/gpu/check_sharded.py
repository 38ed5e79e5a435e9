"""FSDP2 on several GPUs: blocks that memplan compiled against eager's, and against Inductor's.

``torchrun --nproc-per-node 2 -m tests.gpu.check_sharded`` (``--device cpu`` over gloo). `fully_shard` of every block of
a Llama-style model, three steps of SGD; each system's losses and gradients against eager's in float32, then peak memory
and the fastest of five steps. Rank 0 prints one row a system; a difference that is too large ends with an error.
"""

from __future__ import annotations

import os

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import argparse
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import memplan  # noqa: F401  (registers the backend)
from benchmarks.communication import Block

#: float32 sums in another order, three steps long
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    hidden: int
    tokens: int


@dataclass(frozen=True)
class Trained:
    """What three steps left: losses of this rank and the last gradients of all, then bytes and milliseconds."""

    losses: tuple[float, ...]
    gradients: tuple[Tensor, ...]
    peak: int
    step_ms: float


def train(system: str, shape: Shape, mesh: DeviceMesh, device: torch.device) -> Trained:
    """Three steps, and five more to be timed."""
    torch.manual_seed(0)
    net = nn.Sequential(*[Block(shape.width, shape.heads, shape.hidden) for _ in range(shape.layers)]).to(device)
    for block in net:
        if system != "eager":
            block.compile(backend=system)
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    x = torch.randn(2, shape.tokens, shape.width, generator=generator).to(device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = net(x).square().mean()
        loss.backward()
        return loss.detach()

    losses = []
    for _ in range(3):
        losses.append(step().item())
        optimizer.step()
    gradients = tuple(p.grad.full_tensor().cpu() for p in net.parameters())  # type: ignore[union-attr]
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    fastest = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        step().item()
        fastest = min(fastest, time.perf_counter() - begin)
    return Trained(tuple(losses), gradients, torch.cuda.max_memory_allocated() if on_gpu else 0, 1e3 * fastest)


def difference(found: Trained, want: Trained) -> float:
    """The largest one, relative to the largest value of each loss or gradient."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(found.losses, want.losses, strict=True))
    for a, b in zip(found.gradients, want.gradients, strict=True):
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--systems", nargs="+", default=["memplan", "inductor"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2816)
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    shape = Shape(given.layers, given.width, given.heads, given.hidden, given.tokens)
    device = torch.device(given.device, int(os.environ["LOCAL_RANK"]) if given.device == "cuda" else 0)
    if given.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    mesh = init_device_mesh(given.device, (dist.get_world_size(),))
    wrong = []
    want = train("eager", shape, mesh, device)
    for system in ("eager", *given.systems):
        torch.compiler.reset()
        found = want if system == "eager" else train(system, shape, mesh, device)
        worst = difference(found, want)
        if dist.get_rank() == 0:
            print(f"{system}: difference {worst:.1e}, peak {found.peak / 2**20:.0f} MiB, {found.step_ms:.1f} ms")
        if not worst <= TOLERANCE:
            wrong.append(f"{system} on rank {dist.get_rank()}: {worst}")
    dist.destroy_process_group()
    if wrong:
        raise SystemExit("differs from eager: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
