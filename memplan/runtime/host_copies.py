"""Copies between a GPU and pinned memory of its host, on streams of their own: one in each direction and device.

``memplan.offload(tensor)`` returns a pinned tensor that is being filled; ``memplan.prefetch.out(host, out=tensor)``
fills a tensor; ``memplan.wait_copy(tensor)`` makes the current stream wait until a copy into that tensor has ended. A
copy begins when what was on the current stream before it has run, so it reads what was written and writes over
nothing that is still read.

Pinned memory comes from torch's caching allocator of the host: what a step gives back, the next one gets again, and
only when the copies that used it have ended. A pinned tensor is held by the saved state of the call that made it and by
nothing else; so several forwards before a backward, ``retain_graph=True`` and a backward that never comes need no
bookkeeping.

On a CPU the same operators copy at once: there the plans can be tried.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("memplan", "FRAGMENT")  # type: ignore[no-untyped-call]

#: called with (stream, its direction) before a copy is put on it; tests delay copies by it
before_copy: list[Callable[[torch.cuda.Stream, str], None]] = []
_streams: dict[tuple[int, str], torch.cuda.Stream] = {}
_lock = threading.Lock()


class _Flying(threading.local):
    """Copies that this thread has started and not waited for: the event at the end, by the target's address."""

    def __init__(self) -> None:
        self.events: dict[tuple[str, int], torch.cuda.Event] = {}


_flying = _Flying()


def stream_of(device: torch.device, direction: str) -> torch.cuda.Stream:
    """The stream of copies ``"out"`` of a device, or ``"in"``."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        found = _streams.get((index, direction))
        if found is None:
            found = _streams[index, direction] = torch.cuda.Stream(device=index)  # type: ignore[no-untyped-call]
        return found


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))


def _offload(tensor: Tensor) -> Tensor:
    gpu = tensor.is_cuda
    host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=gpu)
    _copy(host, tensor, tensor.device, "out")
    return host


def _prefetch(host: Tensor, *, out: Tensor) -> Tensor:
    _copy(out, host, out.device, "in")
    return out


def _copy(target: Tensor, source: Tensor, device: torch.device, direction: str) -> None:
    if device.type != "cuda":
        _flat(target).copy_(_flat(source))
        return
    stream = stream_of(device, direction)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for called in before_copy:
            called(stream, direction)
        _flat(target).copy_(_flat(source), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
    _flying.events[str(target.device), target.data_ptr()] = event


def _wait_copy(tensor: Tensor) -> None:
    event = _flying.events.pop((str(tensor.device), tensor.data_ptr()), None)
    if event is None:
        return
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).wait_event(event)
    else:  # the host goes on; what runs on the stream after this may reuse what was copied
        torch.cuda.current_stream().wait_event(event)


if not hasattr(torch.ops.memplan, "wait_copy"):
    LIBRARY.define("offload(Tensor tensor) -> Tensor")  # type: ignore[no-untyped-call]
    LIBRARY.define("prefetch.out(Tensor host, *, Tensor(a!) out) -> Tensor(a!)")  # type: ignore[no-untyped-call]
    LIBRARY.define("wait_copy(Tensor(a!) tensor) -> ()")  # type: ignore[no-untyped-call]
    for _name, _function in (("offload", _offload), ("prefetch.out", _prefetch), ("wait_copy", _wait_copy)):
        LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def settled(call: Callable[..., object]) -> Callable[..., object]:
    """The call; if it raises, the current stream first waits for the copies that it has started.

    Otherwise their memory would be given to somebody else while they still read and write it.
    """

    def run(args: list[object]) -> object:
        try:
            return call(args)
        except BaseException:
            for event in _flying.events.values():
                event.synchronize()
            _flying.events.clear()
            raise

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def finish_copies() -> None:
    """Wait on the host until all that was copied there is there: before saved-tensor hooks look at it."""
    with _lock:
        streams = [s for (_, direction), s in _streams.items() if direction == "out"]
    for stream in streams:
        stream.synchronize()
