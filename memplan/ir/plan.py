"""The plan: in which order steps run, how long each buffer lives, and where its bytes are.

All lifetimes are half-open in steps: a buffer with ``[start, stop)`` exists while steps ``start .. stop - 1`` run.
Step ``k`` runs operation ``order[k]``. Externals that the program may not free have lifetime ``[0, len(order))``;
outputs and saved tensors end at ``len(order) + 1``, that is: they outlive the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from .communication import Memory
from .loops import Size
from .program import Program


@dataclass(frozen=True, slots=True)
class Lifetime:
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"lifetime [{self.start}, {self.stop}) is empty or negative")

    def overlaps(self, other: Lifetime) -> bool:
        return self.start < other.stop and other.start < self.stop


@dataclass(frozen=True, slots=True)
class External:
    """The bytes are the caller's (inputs, parameters, constants)."""


@dataclass(frozen=True, slots=True)
class Own:
    """An allocation of its own, made at the lifetime's start; returned by the call for FRESH externs."""


@dataclass(frozen=True, slots=True)
class InPool:
    """At ``offset`` bytes from the start of pool ``pool``."""

    pool: str
    offset: Size


@dataclass(frozen=True, slots=True)
class InPlaceOf:
    """Takes the storage of ``buffer`` (which may itself be in place of another), at the same first byte."""

    buffer: str


Placement = External | Own | InPool | InPlaceOf


@dataclass(frozen=True, slots=True)
class Pool:
    """One allocation that holds many buffers, made at its lifetime's start, freed at its end.

    An *arena* (of communication memory) is there before the program and after it, at the same place in every call, and
    shared by all programs that communicate in its ``group``. Its bytes are in no timeline and no peak.
    """

    name: str
    nbytes: Size
    device: str
    lifetime: Lifetime
    memory: Memory = Memory.PLAIN
    group: str = ""


@dataclass(frozen=True, slots=True)
class Slab:
    """Donated inputs of a backward that lie in one allocation of their forward; the last one to go frees it.

    ``offsets`` are each member's, in bytes.
    """

    name: str
    nbytes: Size
    device: str
    members: tuple[str, ...]
    offsets: tuple[int, ...]


#: A reserve is topped up by whole multiples of so many bytes: the caching allocator's rounding of large segments.
RESERVE_STEP = 2 << 20
#: Free blocks of at least this part of a reserve count towards it. Of a sixteenth, too few did where a model had been
#: cast on the device and an optimiser's states had settled: simulated for Llama, 1.031 of the live bytes, and 1.011.
RESERVE_PART = 64


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes to have free on a device before a call; ``symbols`` are the (symbol, input's position) in ``nbytes``.

    ``requests``: the large allocations of the step and their frees, as in `Plan.requests`.
    """

    device: str
    nbytes: Size
    symbols: tuple[tuple[sympy.Symbol, int], ...] = ()
    requests: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """What the device's caching allocator got from the device in one piece: its blocks in the order of their
    addresses, each (bytes, whether something is in it)."""

    address: int
    blocks: tuple[tuple[int, bool], ...]

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self.blocks)

    @property
    def unused(self) -> bool:
        """Whether it can be given back to the device."""
        return not any(live for _, live in self.blocks)


@dataclass(frozen=True, slots=True)
class Room:
    """What to do before a step: give unused segments back or not, then make one free piece of ``nbytes`` (0: none).

    ``reserved`` is what large segments have in all after the step, by simulation.
    """

    nbytes: int
    give_back: bool
    reserved: int


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of a whole step on one device, with what is resident: parameters and the batch.

    ``live`` is the largest sum of allocations alive at once, ``reserved`` the segments that the device's caching
    allocator holds after some steps, by simulation; ``segments`` are those that it holds for what is resident.
    """

    resident: int
    live: int
    reserved: int
    segments: int = 0

    @property
    def ratio(self) -> float:
        """``reserved / live``; 1 where nothing is allocated."""
        return self.reserved / self.live if self.live else 1.0


@dataclass(frozen=True, slots=True)
class Certificate:
    """How near the optimum the plan is, in bytes at the hinted sizes.

    ``program_peak``: the peak in program order; ``peak``: in the plan's order, of live bytes; ``order_bound``: no
    order of this program can have a lower peak; ``placed_peak``: live own allocations and whole pools;
    ``alignment``: of it, bytes lost to rounding.
    """

    program_peak: int
    peak: int
    order_bound: int
    placed_peak: int
    alignment: int
    note: str = ""

    @property
    def order_gap(self) -> int:
        return self.peak - self.order_bound

    @property
    def packing_gap(self) -> int:
        return self.placed_peak - self.peak - self.alignment


@dataclass(frozen=True)
class Plan:
    """See the module's docstring. ``timeline[k]`` is the bytes held while step ``k`` runs, above the externals that
    the caller keeps (donated inputs count until they are freed): own allocations and whole pools, each rounded as its
    device's allocator rounds, and the step's scratch. A program without operations has one idle step."""

    program: Program
    order: tuple[str, ...]
    lifetimes: Mapping[str, Lifetime]
    placements: Mapping[str, Placement]
    pools: tuple[Pool, ...]
    timeline: tuple[int, ...]
    certificate: Certificate
    #: why a clone, copy or reuse was left as it is: (operation or buffer, reason)
    notes: tuple[tuple[str, str], ...] = ()
    #: bytes at the hinted sizes, rounded as the device allocator rounds them, by device
    predicted_peak: Mapping[str, int] = field(default_factory=dict)
    #: of a backward: inputs that share an allocation, which the timeline counts until the last of them is dropped
    slabs: tuple[Slab, ...] = ()
    #: by device, bytes to have free in its caching allocator when the program starts (see memplan.runtime.reserve)
    reserve: Mapping[str, Size] = field(default_factory=dict)
    #: By device, the large allocations of the whole training step whose forward the program is, and their frees, in
    #: order: (key, bytes), or (key, -1) when it is freed. For what lies about when a later step begins: see
    #: memplan.passes.room.
    requests: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    #: by device, the whole step that the program belongs to; only where a caching allocator is simulated
    step: Mapping[str, StepMemory] = field(default_factory=dict)

    @property
    def arenas(self) -> tuple[Pool, ...]:
        """The pools of communication memory."""
        return tuple(p for p in self.pools if p.memory is not Memory.PLAIN)

    def storage_of(self, buffer: str) -> str:
        """The buffer whose storage ``buffer`` uses, following in-place reuse."""
        placement = self.placements[buffer]
        while isinstance(placement, InPlaceOf):
            buffer = placement.buffer
            placement = self.placements[buffer]
        return buffer
