"""Ends a process whose operations on symmetric memory wait for a rank that is no more.

Their kernels spin at a barrier until every peer comes; when one was killed that is for ever, and nothing in the process
can be told: the host waits for the device. As torch's own watchdog of NCCL does, a thread looks from time to time
whether the device gets on, and ends the process when it has not for as long as the group's timeout.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

log = logging.getLogger(__name__)

#: Gives what says whether the work of all calls so far is done; None if there was no call since.
Mark = Callable[[], Callable[[], bool] | None]


def stream_at(device: torch.device, raw: int) -> torch.cuda.Stream:
    """The stream of this address (for 0, `torch.cuda.ExternalStream` would give another one)."""
    if raw == 0:
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(raw, device=device)  # type: ignore[no-untyped-call]


def end_process(message: str) -> None:
    """Say why, and abort: no exception reaches a thread that waits for the device."""
    log.critical(message)
    print(f"memplan: {message}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)


@dataclass
class Watch:
    """Looks after one arena.

    Attributes
    ----------
    mark:
        See `Mark`.
    alive:
        Whether there is still something to look after.
    seconds:
        Without progress for so long, ``give_up`` is called.
    """

    what: str
    mark: Mark
    seconds: float
    alive: Callable[[], bool] = lambda: True
    give_up: Callable[[str], None] = end_process
    stopped: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin to look, in a thread that does not keep the process alive."""
        threading.Thread(target=self.run, name=f"memplan watch {self.what}", daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()

    def run(self) -> None:
        """What the thread does."""
        interval = min(max(self.seconds / 20, 0.02), 5.0)
        while not self.stopped.wait(interval) and self.alive():
            query = self.mark()
            try:
                if query is not None and not self.reached(query, interval):
                    return
            except RuntimeError as error:  # the device has failed: who uses it is told by torch
                log.warning("the watch over %s ends: %s", self.what, error)
                return

    def reached(self, query: Callable[[], bool], interval: float) -> bool:
        """Wait until the mark is reached; False if the watch is over."""
        begun = time.monotonic()
        while not query():
            if time.monotonic() - begun > self.seconds:
                self.give_up(
                    f"{self.what}: the device has not got on for {self.seconds:g} s, the timeout of the process group. "
                    "A rank must have died or taken another way: its peers wait for it inside a kernel"
                )
                return False
            if self.stopped.wait(interval):
                return False
        return True
