"""Models wrapped by torch to train on several ranks, compiled and as they are."""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import memplan
from tests.tolerances import assert_near

OPTIONS = {"poison": True}
STEPS = 2


class Net(nn.Module):
    """Residual blocks, one of them recomputed, running statistics, and a head that may stay unused."""

    def __init__(self, *, unused: bool) -> None:
        super().__init__()
        widths = (nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32))
        self.blocks = nn.ModuleList(copy.deepcopy(nn.Sequential(*widths)) for _ in range(2))
        self.norm, self.head, self.other = nn.BatchNorm1d(32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.unused = unused

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = x + (checkpoint(block, x, use_reentrant=False) if k == 1 else block(x))
        x = self.norm(x)
        out: Tensor = self.head(x)
        return out if self.unused else out + self.other(x)


def _trained(net: nn.Module, call: nn.Module, wrapped: nn.Module, parts: int) -> list[Tensor]:
    """Losses, the last gradients, then parameters and buffers after steps with gradients of ``parts`` batches each."""
    found: list[Tensor] = []
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        optimiser.zero_grad()
        for part in range(parts):
            waits = part < parts - 1 and isinstance(wrapped, DistributedDataParallel)
            with wrapped.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                loss = call(torch.randn(6, 32, generator=generator)).square().mean()
                loss.backward()
            found.append(loss.detach())
        optimiser.step()
    tensors = [p.grad for p in net.parameters() if p.grad is not None] + list(net.state_dict().values())
    return found + [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


def buckets(unused: bool, parts: int, settings: dict[str, bool]) -> int:
    """DDP with buckets so small that Dynamo cuts the model in several graphs; how many forwards it compiled."""
    torch.manual_seed(0)
    net, results = Net(unused=unused), []
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 4096), memplan.record() as recording:
        for compiled in (False, True):
            own = copy.deepcopy(net)
            wrapped = DistributedDataParallel(own, bucket_cap_mb=0.01, **settings)  # type: ignore[arg-type]
            call = torch.compile(wrapped, backend="memplan", options=OPTIONS) if compiled else wrapped
            results.append(_trained(own, call, wrapped, parts))
    for k, (found, want) in enumerate(zip(results[1], results[0], strict=True)):
        assert_near(found, want, f"leaf {k}")
    return sum(p.program.phase.value == "forward" for p in recording.plans)


def shards() -> None:
    """FSDP2, each block a shard of its own."""
    torch.manual_seed(0)
    net, results = Net(unused=False), []
    for compiled in (False, True):
        own, mesh = copy.deepcopy(net), init_device_mesh("cpu", (dist.get_world_size(),))
        for block in own.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(own, mesh=mesh)
        if compiled:
            own.compile(backend="memplan", options=OPTIONS)
        results.append(_trained(own, own, own, 2))
    for k, (found, want) in enumerate(zip(results[1], results[0], strict=True)):
        assert_near(found, want, f"leaf {k}")
