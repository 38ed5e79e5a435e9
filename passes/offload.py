"""Saved tensors in pinned memory of the host: copies out in the forward, copies in in the backward, and when.

`offload_saved` and `prefetch_received` put the copies into captured programs; `schedule_copies` says, in the order in
which operations run, when each copy starts and when it is waited for, on a timeline in which operations take their
estimated microseconds and copies of one direction follow one another at the device's measured bandwidth:

* an offload starts behind what makes its tensor and is waited for before the first operation that begins when the copy
  has ended (at the end of the program at the latest), so that nothing waits; the tensor's memory is free from there on;
* a prefetch ends when its first reader begins, or earlier where another prefetch needs the stream then; it starts
  behind the last operation that begins before it has to, so that nothing waits and nothing arrives early.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from memplan.ir.communication import Memory
from memplan.ir.device import DeviceFigures
from memplan.ir.in_flight import Collective, HostCopy, Wait
from memplan.ir.program import Buffer, BufferKind, Contract, Operation, Program, TensorInput, View, evaluate

from .costs import step_microseconds

OFFLOAD, PREFETCH, WAIT = "memplan.offload.default", "memplan.prefetch.out", "memplan.wait_copy.default"
#: Microseconds from the start of a copy's call to its first byte, and from its last byte to the wait.
LATENCY = 15.0
#: How much longer than estimated operations before a prefetch's reader may be too short for: prefetches start earlier.
SLACK = 1.1


def host_name(buffer: str) -> str:
    """The name of a buffer's copy on the host."""
    return f"{buffer}_host"


def can_offload(program: Program, position: int) -> bool:
    """Whether result ``position`` of a forward may go to the host: a saved tensor, whole, dense, of its own, static."""
    out = program.outputs[position]
    if not isinstance(out, View) or out.offset != 0:
        return False
    buffer = program.buffers[out.buffer]
    once = sum(isinstance(o, View) and o.buffer == out.buffer for o in program.outputs) == 1
    sizes = (*out.sizes, *out.strides, buffer.nbytes)
    return (
        once
        and buffer.kind is BufferKind.SAVED
        and buffer.memory is Memory.PLAIN
        and all(isinstance(n, int) for n in sizes)
        and _dense(out)
        and evaluate(out.numel, {}) * out.dtype.itemsize == buffer.nbytes
        and buffer.nbytes > 0
    )


def _dense(view: View) -> bool:
    expected = 1
    for stride, size in sorted((int(s), int(n)) for n, s in zip(view.sizes, view.strides, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def communicates(program: Program) -> bool:
    """Whether it has collectives: their streams and the copies' are not planned together."""
    return any(isinstance(op, Collective) for op in program.operations)


def offload_saved(program: Program, positions: Sequence[int], bandwidth: float) -> Program:
    """The forward that returns copies on the host of some of what it saves; bytes per microsecond of the bus."""
    buffers = dict(program.buffers)
    operations = list(program.operations)
    outputs = list(program.outputs)
    for position in positions:
        view = program.outputs[position]
        if not can_offload(program, position) or not isinstance(view, View):
            raise ValueError(f"result {position} of {program.name} cannot be offloaded")
        old = buffers[view.buffer]
        host = replace(view, buffer=host_name(old.name))
        buffers[host.buffer] = replace(old, name=host.buffer, device="cpu", memory=Memory.PINNED)
        buffers[old.name] = replace(old, kind=BufferKind.TEMPORARY)
        origins = (old.origin,)
        spent = program.nbytes(old.name) / bandwidth
        copy = HostCopy(f"{old.name}_offload", OFFLOAD, (view,), (), (host,), Contract.FRESH, old.device, origins)
        operations.append(replace(copy, microseconds=spent))
        operations.append(_wait(f"{old.name}_offloaded", host, view, old.device, old))
        outputs[position] = host
    return replace(program, buffers=buffers, operations=tuple(operations), outputs=tuple(outputs))


def prefetch_received(program: Program, names: Sequence[str], bandwidth: float) -> Program:
    """The backward that is given copies on the host of some of its inputs; bytes per microsecond of the bus."""
    buffers = dict(program.buffers)
    inputs = list(program.inputs)
    copies: list[Operation] = []
    for k, given in enumerate(inputs):
        if not isinstance(given, TensorInput) or given.view.buffer not in names:
            continue
        view = given.view
        old = buffers[view.buffer]
        host = replace(view, buffer=host_name(old.name))
        buffers[host.buffer] = replace(
            old, name=host.buffer, device="cpu", memory=Memory.PINNED, donated=False, kind=BufferKind.INPUT
        )
        buffers[old.name] = replace(old, kind=BufferKind.TEMPORARY, donated=False)
        origins = (old.origin,)
        spent = program.nbytes(old.name) / bandwidth
        copy = HostCopy(f"{old.name}_prefetch", PREFETCH, (host,), (), (view,), Contract.OUT, old.device, origins)
        copies.append(replace(copy, microseconds=spent))
        copies.append(_wait(f"{old.name}_prefetched", view, host, old.device, old))
        inputs[k] = replace(given, view=host)
    return replace(program, buffers=buffers, operations=(*copies, *program.operations), inputs=tuple(inputs))


def _wait(name: str, target: View, source: View, device: str, buffer: Buffer) -> Wait:
    views = (target, source)
    return Wait(name, WAIT, views, (), (target,), Contract.MUTATE, device, (buffer.origin,), mutates=(target.buffer,))


@dataclass(frozen=True, slots=True)
class Clock:
    """When each step begins, in microseconds, the end of the last one at the end."""

    starts: tuple[float, ...]

    @classmethod
    def of(cls, program: Program, order: Sequence[str], figures: DeviceFigures) -> Clock:
        spent = step_microseconds(program, figures)
        return cls(tuple(itertools.accumulate((spent[n] for n in order), initial=0.0)))

    @property
    def end(self) -> float:
        return self.starts[-1]

    def first_from(self, moment: float) -> int:
        """The first step that begins at ``moment`` or later; past the last one where none does."""
        return bisect.bisect_left(self.starts, moment)

    def last_until(self, moment: float) -> int:
        """The last step that begins at ``moment`` or earlier; the first one where none does."""
        return max(self.first_from(moment + 1e-9) - 1, 0)


@dataclass(frozen=True, slots=True)
class Flight:
    """One copy on a timeline: it starts before step ``issue`` and is waited for before step ``wait``."""

    name: str
    issue: int
    wait: int


def outward(clock: Clock, copies: Sequence[tuple[str, int, float]]) -> tuple[list[Flight], float]:
    """Copies (name, step that makes the tensor, microseconds) to the host, in order; microseconds waited at the end."""
    flights, free = [], 0.0
    steps = len(clock.starts) - 1
    for name, made, spent in sorted(copies, key=lambda c: (c[1], c[0])):
        free = max(free, clock.starts[made + 1]) + spent + LATENCY
        flights.append(Flight(name, made + 1, min(max(clock.first_from(free), made + 1), steps)))
    return flights, max(0.0, free - clock.end)


def inward(clock: Clock, copies: Sequence[tuple[str, int, float]]) -> tuple[list[Flight], float]:
    """Copies (name, step that reads first, microseconds) from the host, in order of need; microseconds of waiting."""
    flights: list[Flight] = []
    busy = float("inf")
    ordered = sorted(copies, key=lambda c: (c[1], c[0]))
    for name, need, spent in reversed(ordered):
        busy = min(busy, clock.starts[need]) - spent * SLACK - LATENCY
        flights.append(Flight(name, min(clock.last_until(busy), need), need))
    flights.reverse()
    # how it really goes: a copy starts when its step does and the stream is free, the reader waits for it
    free = late = 0.0
    times = {name: spent for name, _, spent in ordered}
    for flight in flights:
        free = max(free, clock.starts[flight.issue] + late) + times[flight.name] + LATENCY
        late = max(late, free - clock.starts[flight.wait])
    return flights, max(0.0, late)


def schedule_copies(program: Program, order: Sequence[str], figures: DeviceFigures) -> tuple[str, ...]:
    """The order with the copies to and from the host moved to where their streams are best used."""
    copies = [op for op in program.operations if isinstance(op, HostCopy)]
    if not copies:
        return tuple(order)
    waits = {op.mutates[0]: op for op in program.operations if isinstance(op, Wait)}
    moved = {op.name for op in copies} | {waits[c.in_flight_results[0]].name for c in copies}
    rest = [n for n in order if n not in moved]
    place = {n: k for k, n in enumerate(rest)}
    readers = _readers(program)
    clock = Clock.of(program, rest, figures)
    outs, ins = [], []
    for op in copies:
        if op.offloads:
            made = max((place[n] for n in program.dependencies[op.name] if n in place), default=-1)
            outs.append((op.name, made, op.microseconds))
        else:
            used = [place[n] for n in readers.get(op.in_flight_results[0], ()) if n in place]
            ins.append((op.name, min(used, default=len(rest)), op.microseconds))
    flights = [*outward(clock, outs)[0], *inward(clock, ins)[0]]
    return _with_flights(rest, flights, {op.name: waits[op.in_flight_results[0]].name for op in copies})


def _readers(program: Program) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for op in program.operations:
        if not isinstance(op, (HostCopy, Wait)):
            for name in (*op.reads, *op.mutates):
                found.setdefault(name, []).append(op.name)
    return found


def _with_flights(rest: Sequence[str], flights: Sequence[Flight], wait_of: Mapping[str, str]) -> tuple[str, ...]:
    """Before each step first the waits, which may free memory, then the starts; but a wait never before its start."""
    before: dict[int, list[str]] = {}
    for flight in flights:
        if flight.wait > flight.issue:
            before.setdefault(flight.wait, []).append(wait_of[flight.name])
    for flight in flights:
        before.setdefault(flight.issue, []).append(flight.name)
        if flight.wait <= flight.issue:
            before[flight.issue].append(wait_of[flight.name])
    out: list[str] = []
    for k in range(len(rest) + 1):
        out += before.get(k, [])
        out += rest[k : k + 1]
    return tuple(out)
