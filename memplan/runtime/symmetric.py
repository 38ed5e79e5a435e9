"""Symmetric memory: what the ranks of a group read and write at one another, and where it comes from."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from .peers import Symmetric


class SymmetricBackend(Protocol):
    """Where symmetric memory of one type of device comes from."""

    def obstacle(self, group: dist.ProcessGroup, device: torch.device) -> str:
        """Why this process sees no way to have it for the group, "" if it does; asks no other rank."""
        ...

    def multicast_obstacle(self, device: torch.device) -> str:
        """The same of multicast: one address that stands for the memory of all ranks, which switches add up behind."""
        ...

    def allocate(self, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Symmetric:
        """``nbytes`` bytes that the group's operations can use; called on all ranks with the same number."""
        ...


class TorchSymmetricMemory:
    """Torch's own, over NVLink or PCIe peer access inside one host."""

    def obstacle(self, group: dist.ProcessGroup, device: torch.device) -> str:
        """See `SymmetricBackend`."""
        if group.size() < 2:
            return "the group has one rank"
        if not dist.is_nccl_available() or dist.get_backend(group) == "fake":
            return f"the group's backend is {dist.get_backend(group)}"
        try:
            from torch._C._distributed_c10d import _SymmetricMemory
        except ImportError:
            return "this build of torch has no symmetric memory"
        if not hasattr(_SymmetricMemory, "empty_strided_p2p"):
            return "this build of torch has no symmetric memory"
        peers = [k for k in range(torch.cuda.device_count()) if k != device.index]
        visible = [k for k in peers if torch.cuda.can_device_access_peer(device.index, k)]
        # a process that sees one GPU alone cannot say: then the trial allocation does
        return f"GPU {device.index} cannot access its peers' memory" if peers and not visible else ""

    def multicast_obstacle(self, device: torch.device) -> str:
        """See `SymmetricBackend`."""
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _SymmetricMemory

        if _SymmetricMemory.has_multicast_support(DeviceType.CUDA, device.index):
            return ""
        return f"GPU {device.index} has no NVLink multicast, or TORCH_SYMM_MEM_DISABLE_MULTICAST turns it off"

    def allocate(self, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Symmetric:
        """See `SymmetricBackend`."""
        from torch._C._distributed_c10d import _SymmetricMemory
        from torch.distributed import _symmetric_memory as symmetric

        made: torch.Tensor = _SymmetricMemory.empty_strided_p2p((nbytes,), [1], torch.uint8, device, group.group_name)
        joined = symmetric.rendezvous(made, group.group_name)
        ranks = [joined.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size())]
        return Symmetric(made, ranks, group.rank(), joined.barrier, multicast=joined.multicast_ptr != 0)


#: by type of device; tests put a simulated one here
BACKENDS: dict[str, SymmetricBackend] = {"cuda": TorchSymmetricMemory()}
