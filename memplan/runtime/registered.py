"""Memory that NCCL knows beforehand: its collectives read and write it in place, without buffers of their own between.

A ``torch.cuda.MemPool`` over NCCL's allocator, registered with the group's communicator. NVLink multicast is not needed
for it, and nothing here switches it on.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


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
