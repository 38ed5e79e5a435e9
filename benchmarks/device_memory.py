"""Bytes of a GPU that this process alone holds, its context and libraries among them.

``mem_get_info`` counts every process on the card. NVML knows them one by one, where the driver tells it (in some
containers it does not); else, where no other benchmark shares the card, the difference to before this process's
context is the same.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch

_NOT_AVAILABLE = 2**64 - 1
_MOST = 256


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


@dataclass(frozen=True)
class DeviceMemory:
    """What was known before the context was made: make one of these first. ``alone``: no other benchmark is there."""

    alone: bool
    used_before: int | None

    @classmethod
    def before_context(cls, *, alone: bool) -> DeviceMemory:
        return cls(alone, _used_by_all() if alone else None)

    def of_this_process(self) -> int | None:
        """Bytes, or None where nobody can say."""
        told = _told_by_nvml()
        if told is not None:
            return told
        if not self.alone or self.used_before is None:
            return None
        free, total = torch.cuda.mem_get_info()
        return total - free - self.used_before


def _nvml() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def _device(library: ctypes.CDLL) -> ctypes.c_void_p | None:
    """NVML's handle of the GPU that is CUDA's device 0: by its UUID where there is a context, else the only one."""
    handle = ctypes.c_void_p()
    if torch.cuda.is_initialized():
        name = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
        return handle if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0 else None
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0 or count.value != 1:
        return None
    return handle if library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0 else None


def _used_by_all() -> int | None:
    library = _nvml()
    handle = _device(library) if library is not None else None
    if library is None or handle is None:
        return None
    found = _Memory()
    return int(found.used) if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(found)) == 0 else None


def _told_by_nvml() -> int | None:
    """This process in NVML's list: by its number, or as the only one (a container's numbers are others)."""
    library = _nvml()
    handle = _device(library) if library is not None else None
    if library is None or handle is None or not hasattr(library, "nvmlDeviceGetComputeRunningProcesses_v3"):
        return None
    count, found = ctypes.c_uint(_MOST), (_Process * _MOST)()
    if library.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), found) != 0:
        return None
    listed = [p for p in found[: count.value] if p.used not in (0, _NOT_AVAILABLE)]
    mine = [p for p in listed if p.pid == os.getpid()]
    if not mine and count.value == 1:
        mine = listed
    return int(mine[0].used) if mine else None
