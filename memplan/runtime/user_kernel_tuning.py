"""Choosing a configuration of a user's autotuned kernel at its first call, on the arguments of that call.

Every run that is timed starts from what the first one started from: what the kernel changes is saved once and put back
before each, and what the user wants zeroed (``reset_to_zero``) is zeroed on the very buffer that is timed. Nothing that
the kernel only reads is copied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from memplan.ir.errors import CompilerError, MemplanError

_log = logging.getLogger("memplan.triton")
_REPEATS = 5

#: ``timer(run)``: the time that a run takes, in any unit
Timer = Callable[[Callable[[], None]], float]


@dataclass(frozen=True, slots=True)
class Changed:
    """An argument that the kernel changes: its position among the values.

    ``zeroed``: filled with zeros before every run. ``saved``: it holds something that must be put back.
    """

    position: int
    name: str
    zeroed: bool
    saved: bool


def device_timer() -> Timer:
    """Times by events of the current stream, in milliseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def time(run: Callable[[], None]) -> float:
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return time


def choose_config(
    count: int, run: Callable[[int], None], changed: Sequence[Changed], values: Sequence[object], timer: Timer
) -> int:
    """Position of the fastest of ``count`` configurations; afterwards all arguments hold what they held before.

    Except those of ``reset_to_zero``, which hold zeros: Triton's autotuner leaves them so for the run that counts.

    Parameters
    ----------
    run:
        Launches one configuration.
    values:
        The arguments; those in ``changed`` are tensors.

    Raises
    ------
    CompilerError
        If no configuration can be launched: the last one's error.
    """
    tensors = {c.position: _tensor(values[c.position]) for c in changed}
    saved = {c.position: _saved(tensors[c.position]) for c in changed if c.saved and not c.zeroed}

    def reset() -> None:
        for c in changed:
            if c.zeroed:
                tensors[c.position].zero_()
            elif c.position in saved:
                tensors[c.position].copy_(saved[c.position])

    times: list[float] = []
    failure: Exception | None = None
    for number in range(count):
        best = float("inf")
        try:
            for repeat in range(_REPEATS + 1):
                reset()
                taken = timer(lambda number=number: run(number))  # type: ignore[misc]
                best = min(best, taken) if repeat else best  # the first run loads the kernel
        except Exception as error:
            if not _cannot_run(error):
                reset()
                raise
            failure = error
            _log.info("configuration %d is left out: %s", number, error)
        times.append(best)
    reset()
    if failure is not None and min(times) == float("inf"):
        raise failure if isinstance(failure, MemplanError) else CompilerError(str(failure)) from failure
    return min(range(count), key=times.__getitem__)


def _cannot_run(error: Exception) -> bool:
    """Whether it says that a configuration asks too much of the device or does not compile."""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources | CompilerError)


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


def _saved(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device, or in the host's memory where the device has no room."""
    try:
        return tensor.clone()
    except torch.OutOfMemoryError:
        return tensor.to("cpu")
