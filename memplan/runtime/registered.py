"""Memory that is registered with a group's library, whose kernels then work in it instead of in buffers of their own.

NCCL takes what its own allocator gave and what was registered with the group's communicator (a *user buffer*, NCCL
2.19): its kernels copy straight between the ranks' buffers. Every rank has to give registered memory to a collective or
none: so plans hold it in arenas that all ranks agree on. When a collective may read and write is the library's
business, as with any memory: after its wait nobody looks at it.

Symmetric windows (NCCL 2.27) are left alone: on two H200s they made large all-reduces and reduce-scatters slower, and a
broadcast of 8 MiB out of one ended in an illegal memory access (``benchmarks/results/collectives.md``).
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from . import library_calls  # noqa: F401  (defines operators)
from .process_groups import resolve

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Registered:
    """One registered allocation, as one rank has it.

    Attributes
    ----------
    own:
        This rank's bytes.
    unregister:
        Tells the library that they go.
    """

    own: torch.Tensor
    unregister: Callable[[], None]

    def close(self) -> None:
        """Called once, when nothing on the device can still use the memory."""
        self.unregister()


class LibraryBackend(Protocol):
    """Where registered memory of one type of device comes from."""

    def obstacle(self, group: dist.ProcessGroup, device: torch.device) -> str:
        """Why this process sees no way to have it for the group, "" if it does; asks no other rank."""
        ...

    def allocate(self, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Registered:
        """``nbytes`` registered bytes; called on all ranks with the same number."""
        ...


class NcclMemory:
    """NCCL's allocator behind a pool of torch's, all of whose memory is registered."""

    def obstacle(self, group: dist.ProcessGroup, device: torch.device) -> str:
        """See `LibraryBackend`."""
        if group.size() < 2:
            return "the group has one rank"
        try:
            backend = group._get_backend(device)
        except RuntimeError:
            return f"the group has no backend for {device.type}"
        if not hasattr(backend, "register_mem_pool"):
            return f"{type(backend).__name__} registers no memory in this build of torch"
        if torch.cuda.nccl.version() < (2, 19):  # type: ignore[no-untyped-call]
            return "NCCL registers users' buffers from 2.19 on"
        return ""

    def allocate(self, nbytes: int, group: dist.ProcessGroup, device: torch.device) -> Registered:
        """See `LibraryBackend`.

        Raises
        ------
        RuntimeError
            If NCCL refuses: `torch.distributed.DistBackendError` is one.
        """
        backend = group._get_backend(device)
        with torch.cuda.device(device):
            # registering asks for a communicator, which the first collective makes
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            torch.cuda.synchronize(device)
            pool = torch.cuda.MemPool(backend.mem_allocator)
            with torch.cuda.use_mem_pool(pool, device):
                # the pool's first: it lies where its segment begins, on every rank
                own = torch.empty(nbytes, dtype=torch.uint8, device=device)
            backend.register_mem_pool(pool)  # type: ignore[attr-defined]
        name, members = group.group_name, weakref.ref(group)

        def unregister() -> None:
            if resolve(name) is members() is not None:
                backend.deregister_mem_pool(pool)  # type: ignore[attr-defined]
                return
            # torch (2.11) throws in the destructor of a pool that a communicator knew which is no more, which ends the
            # process: such a pool is never destroyed
            log.warning("%d bytes stay: process group %r went before its registered memory", own.numel(), name)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))

        return Registered(own, unregister)


#: by type of device; tests put a simulated one here
LIBRARIES: dict[str, LibraryBackend] = {"cuda": NcclMemory()}
