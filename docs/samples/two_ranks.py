"""A tensor-parallel block on two processes: what is planned of its communication, and ranks that differ."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import memplan
from memplan.ir.errors import CommunicationError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
block = parallelize_module(Block().eval(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
model = torch.compile(block, backend="memplan", options={"communication": {"registered": "on"}})
tokens = 8 + dist.get_rank() if "--differ" in sys.argv else 8
try:
    with torch.no_grad(), memplan.record() as recording:
        model(torch.randn(tokens, 64))
    if dist.get_rank() == 0:
        for place, note in recording.plans[0].notes:
            print(f"{place}: {note}")
except CommunicationError as error:
    if dist.get_rank() == 0:
        print(error)
dist.destroy_process_group()
