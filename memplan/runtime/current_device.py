"""The device that is current while a compiled program runs.

Wrappers allocate on the current device, which is the fastest way to allocate, and so may what they call. A model on
another GPU than the current one therefore runs with its own as the current one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

Call = Callable[[list[object]], object]


def gpu_index(device: str) -> int:
    """Of ``"cuda:1"``; ``"cuda"`` is the first."""
    return int(device.partition(":")[2] or 0)


def on_own_device(call: Call, devices: Iterable[str]) -> Call:
    """The call with the GPU among the devices as the current one; as it is where there is nothing to choose.

    A program that computes on several GPUs says where it allocates.
    """
    gpus = {gpu_index(d) for d in devices if d.startswith("cuda")}
    if len(gpus) != 1 or torch.cuda.device_count() < 2:
        return call
    (index,) = gpus
    current = torch.cuda.current_device

    def guarded(args: list[object]) -> object:
        if current() == index:
            return call(args)
        with torch.cuda.device(index):
            return call(args)

    guarded._boxed_call = True  # type: ignore[attr-defined]
    return guarded
