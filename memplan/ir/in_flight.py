"""Calls that return while their buffers are still in use: collectives, copies to and from the host, and their waits."""

from __future__ import annotations

from dataclasses import dataclass

from .communication import collective_form
from .program import Contract, Extern


@dataclass(frozen=True, slots=True)
class InFlight(Extern):
    """A call that returns while its buffers are still read and written, until a `Wait`."""

    @property
    def in_flight_results(self) -> tuple[str, ...]:
        """Buffers that hold nothing defined until the wait."""
        return tuple(dict.fromkeys((*self.mutates, *(v.buffer for v in self.results if v is not None))))

    @property
    def in_flight_arguments(self) -> tuple[str, ...]:
        """Buffers that must keep their contents until the wait."""
        if self.reads_at_once:
            return ()
        results = self.in_flight_results
        return tuple(b for b in self.reads if b not in results)

    @property
    def reads_at_once(self) -> bool:
        """Whether the arguments may change as soon as the call has returned."""
        return False


@dataclass(frozen=True, slots=True)
class HostCopy(InFlight):
    """A copy between a device and pinned memory of its host, on a stream of its own, until a `Wait`.

    An *offload* (contract FRESH) allocates the pinned buffer that it returns; a *prefetch* (contract OUT) writes a
    buffer of the device. ``device`` is the GPU, or what stands for one; ``microseconds`` is how long it was planned to
    take.
    """

    microseconds: float = 0.0

    @property
    def offloads(self) -> bool:
        """Whether it goes to the host."""
        return self.contract is Contract.FRESH


@dataclass(frozen=True, slots=True)
class Collective(InFlight):
    """What processes of ``group`` do together, in flight until a `Wait`."""

    group: str = ""

    @property
    def reads_at_once(self) -> bool:
        form = collective_form(self.target)
        return form is not None and form.copies


@dataclass(frozen=True, slots=True)
class Wait(Extern):
    """The current stream (on a CPU: the caller) waits for what is in flight to the first argument.

    It changes the first argument's buffer, which only now holds the result. The other arguments are not given to the
    operator: they are what the collective or the copy reads until now.
    """
