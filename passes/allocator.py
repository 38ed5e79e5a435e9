"""What the CUDA caching allocator would reserve for a sequence of allocations and frees.

The rules are those of PyTorch's c10/cuda/CUDACachingAllocator.cpp with default settings: requests are rounded up to
512 bytes; up to 1 MiB they come from the small pool, in segments of 2 MiB; larger ones from the large pool, in
segments of 20 MiB below 10 MiB and otherwise of their own size rounded up to 2 MiB. The smallest free block that fits
is taken, the one at the lowest address among equals, and split if enough remains. A freed block merges with its free
neighbours. Segments go back to the device only when an allocation fails. Streams do not share blocks.

With expandable segments each pool is one segment that grows by pages at its end, and every remainder is split off.
Not modelled: memory used on a second stream (`record_stream`), private pools of CUDA graphs, settings by environment.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.errors import PlanningError
from ..ir.plan import Segment

KIB, MIB = 1 << 10, 1 << 20
#: made-up addresses of segments are this power of two apart: more than any of them has
_APART = 44


@dataclass(frozen=True, slots=True)
class AllocatorRules:
    """Sizes in bytes that the allocator goes by; the defaults are PyTorch's."""

    rounding: int = 512
    largest_small: int = MIB
    small_segment: int = 2 * MIB
    large_segment: int = 20 * MIB
    smallest_own_segment: int = 10 * MIB
    own_segment_rounding: int = 2 * MIB
    expandable: bool = False

    def rounded(self, size: int) -> int:
        """What a request of ``size`` bytes takes of a block."""
        return max(self.rounding, -(-size // self.rounding) * self.rounding)

    def segment_bytes(self, rounded: int) -> int:
        """The segment that is made for a rounded request that no free block holds."""
        if rounded <= self.largest_small:
            return self.small_segment
        if rounded < self.smallest_own_segment:
            return self.large_segment
        return -(-rounded // self.own_segment_rounding) * self.own_segment_rounding

    def splits(self, remaining: int, small: bool) -> bool:
        """Whether a block is split when ``remaining`` bytes of it would be left."""
        return remaining >= self.rounding if small or self.expandable else remaining > self.largest_small


@dataclass(frozen=True, slots=True)
class AllocatorStats:
    """Bytes, as `torch.cuda.memory_stats` counts them in ``allocated_bytes.all`` and its like."""

    allocated: int = 0
    requested: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_requested: int = 0
    peak_reserved: int = 0


@dataclass(eq=False, slots=True)
class _Block:
    address: int
    size: int
    pool: _Pool
    segment: int
    requested: int | None = None  # bytes asked for; None while free
    before: _Block | None = None
    after: _Block | None = None


@dataclass(eq=False, slots=True)
class _Pool:
    small: bool
    free: list[tuple[int, int]] = field(default_factory=list)  # (size, address), sorted
    blocks: dict[int, _Block] = field(default_factory=dict)  # free blocks by address
    last: _Block | None = None  # the end of the one expandable segment

    def put(self, block: _Block) -> None:
        bisect.insort(self.free, (block.size, block.address))
        self.blocks[block.address] = block

    def take(self, block: _Block) -> None:
        at = bisect.bisect_left(self.free, (block.size, block.address))
        assert self.free[at] == (block.size, block.address)
        del self.free[at]
        del self.blocks[block.address]


class CachingAllocator:
    """Simulates one device's caching allocator.

    Parameters
    ----------
    rules
        Sizes to go by.
    device_bytes
        What the device can give out; None for any amount. Where a segment does not fit, cached segments are released,
        and if it still does not, `alloc` raises.
    addresses
        Where the device put each segment, in the order in which they are made, as a trace tells; without, every segment
        lies above those before it. It decides between free blocks of equal size.

    Examples
    --------
    >>> allocator = CachingAllocator()
    >>> first = allocator.alloc(3 * MIB)
    >>> allocator.stats.allocated, allocator.stats.reserved
    (3145728, 20971520)
    >>> allocator.free(first)
    >>> allocator.stats.allocated, allocator.stats.reserved
    (0, 20971520)
    """

    def __init__(
        self,
        rules: AllocatorRules | None = None,
        *,
        device_bytes: int | None = None,
        addresses: Sequence[int] = (),
    ) -> None:
        self._addresses = addresses
        self._rules = rules or AllocatorRules()
        self._device_bytes = device_bytes
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._live: dict[int, _Block] = {}
        self._next_handle = 0
        self._next_segment = 0
        self._allocated = self._requested = self._reserved = 0
        self._peak_allocated = self._peak_requested = self._peak_reserved = 0

    @classmethod
    def from_segments(cls, segments: Sequence[Segment], rules: AllocatorRules | None = None) -> CachingAllocator:
        """An allocator that has these segments of its large pool; what is live in them stays.

        Segments that it makes lie above them. Not for expandable segments.
        """
        made = cls(rules)
        pool = made._pools.setdefault((0, False), _Pool(False))
        for segment in segments:
            address, before = segment.address, None
            for size, live in segment.blocks:
                block = _Block(address, size, pool, segment.address, requested=size if live else None, before=before)
                if before is not None:
                    before.after = block
                if live:
                    made._live[made._next_handle] = block
                    made._next_handle += 1
                else:
                    pool.put(block)
                address, before = address + size, block
            held = sum(size for size, live in segment.blocks if live)
            made._count(held, held, segment.nbytes)
            made._next_segment = max(made._next_segment, (address >> _APART) + 1)
        return made

    def segments(self) -> tuple[Segment, ...]:
        """The segments of the large pool, as `from_segments` takes them."""
        found: dict[int, dict[int, tuple[int, bool]]] = {}
        blocks = [b for b in self._live.values() if not b.pool.small]
        blocks += [b for (_, small), pool in self._pools.items() if not small for b in pool.blocks.values()]
        for b in blocks:
            found.setdefault(b.segment, {})[b.address] = (b.size, b.requested is not None)
        return tuple(Segment(at, tuple(found[at][k] for k in sorted(found[at]))) for at in sorted(found))

    @property
    def stats(self) -> AllocatorStats:
        """What is held now, and the most that was."""
        return AllocatorStats(
            self._allocated,
            self._requested,
            self._reserved,
            self._peak_allocated,
            self._peak_requested,
            self._peak_reserved,
        )

    def free_in_blocks(self, least: int) -> int:
        """Bytes of free blocks of ``least`` bytes or more each, those for small requests not among them."""
        pools = [pool.free for (_, small), pool in self._pools.items() if not small]
        return sum(size for free in pools for size, _ in free[bisect.bisect_left(free, (least, -1)) :])

    def alloc(self, size: int, *, stream: int = 0) -> int:
        """Allocate ``size`` bytes; returns a handle for `free`. A request of no bytes takes nothing.

        Raises
        ------
        PlanningError
            The size is negative, or the device has too little memory left.
        """
        if size < 0:
            raise PlanningError(f"negative allocation of {size} bytes")
        handle = self._next_handle
        self._next_handle += 1
        if size == 0:
            return handle
        rounded = self._rules.rounded(size)
        small = rounded <= self._rules.largest_small
        pool = self._pools.setdefault((stream, small), _Pool(small))
        block = self._best_fit(pool, rounded)
        if block is not None:
            pool.take(block)
        else:
            block = self._grow(pool, rounded) if self._rules.expandable else self._new_segment(pool, rounded)
        if self._rules.splits(block.size - rounded, small):
            self._split(block, rounded)
        block.requested = size
        self._live[handle] = block
        self._count(block.size, size, 0)
        return handle

    def free(self, handle: int) -> None:
        """Free what `alloc` returned.

        Raises
        ------
        PlanningError
            The handle was freed already or never given out.
        """
        if not 0 <= handle < self._next_handle:
            raise PlanningError(f"there is no allocation {handle}")
        block = self._live.pop(handle, None)
        if block is None:
            return
        assert block.requested is not None
        self._count(-block.size, -block.requested, 0)
        block.requested = None
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.requested is None:
                block.pool.take(neighbour)
                self._merge(block, neighbour)
        block.pool.put(block)

    def empty_cache(self) -> None:
        """Give segments without a live block back to the device."""
        for pool in self._pools.values():
            for block in list(pool.blocks.values()):
                if block.before is None and block.after is None:
                    pool.take(block)
                    if pool.last is block:
                        pool.last = None
                    self._count(0, 0, -block.size)
                elif self._rules.expandable and block.after is None:
                    self._shrink(pool, block)

    def reset_peaks(self) -> None:
        """Start counting peaks from what there is now."""
        self._peak_allocated, self._peak_requested = self._allocated, self._requested
        self._peak_reserved = self._reserved

    def _count(self, allocated: int, requested: int, reserved: int) -> None:
        self._allocated += allocated
        self._requested += requested
        self._reserved += reserved
        self._peak_allocated = max(self._peak_allocated, self._allocated)
        self._peak_requested = max(self._peak_requested, self._requested)
        self._peak_reserved = max(self._peak_reserved, self._reserved)

    def _best_fit(self, pool: _Pool, rounded: int) -> _Block | None:
        at = bisect.bisect_left(pool.free, (rounded, -1))
        if at == len(pool.free):
            return None
        block = pool.blocks[pool.free[at][1]]
        # The block at the end of an expandable segment counts as large as it could become: any other is better.
        if block is pool.last and at + 1 < len(pool.free):
            block = pool.blocks[pool.free[at + 1][1]]
        return block

    def _reserve(self, size: int) -> None:
        if self._device_bytes is not None and self._reserved + size > self._device_bytes:
            self.empty_cache()
            if self._reserved + size > self._device_bytes:
                raise PlanningError(
                    f"out of memory: {size} bytes more do not fit beside {self._reserved} reserved"
                    f" of {self._device_bytes}"
                )
        self._count(0, 0, size)

    def _segment_address(self) -> int:
        self._next_segment += 1
        if self._next_segment <= len(self._addresses):
            return self._addresses[self._next_segment - 1]
        return self._next_segment << _APART  # in the order in which they are made

    def _new_segment(self, pool: _Pool, rounded: int) -> _Block:
        size = self._rules.segment_bytes(rounded)
        self._reserve(size)
        address = self._segment_address()
        return _Block(address, size, pool, address)

    def _grow(self, pool: _Pool, rounded: int) -> _Block:
        """Map as many pages at the end of the pool's one segment as the request needs beyond the free end."""
        page = self._rules.small_segment if pool.small else self._rules.large_segment
        last = pool.last
        have = last.size if last is not None and last.requested is None else 0
        size = -(-(rounded - have) // page) * page
        self._reserve(size)
        last = pool.last  # releasing the cache may have taken the end away
        if last is not None and last.requested is None:
            pool.take(last)
            if last.size < have:
                missing = -(-(rounded - last.size) // page) * page - size
                self._reserve(missing)
                size += missing
            last.size += size
            return last
        if last is None:
            address = self._segment_address()
            missing = -(-rounded // page) * page - size
            if missing > 0:
                self._reserve(missing)
            block = _Block(address, size + missing, pool, address)
        else:
            block = _Block(last.address + last.size, size, pool, last.segment, before=last)
            last.after = block
        pool.last = block
        return block

    def _shrink(self, pool: _Pool, block: _Block) -> None:
        """Unmap the whole pages of the free end of an expandable segment."""
        page = self._rules.small_segment if pool.small else self._rules.large_segment
        end = block.address + block.size - block.segment
        keep = -(-(block.address - block.segment) // page) * page
        if end <= keep:
            return
        pool.take(block)
        self._count(0, 0, -(end - keep))
        block.size -= end - keep
        if block.size:
            pool.put(block)
            return
        pool.last = block.before
        if block.before is not None:
            block.before.after = None

    def _split(self, block: _Block, rounded: int) -> None:
        rest = _Block(
            block.address + rounded, block.size - rounded, block.pool, block.segment, before=block, after=block.after
        )
        if block.after is not None:
            block.after.before = rest
        block.after = rest
        block.size = rounded
        if block.pool.last is block:
            block.pool.last = rest
        block.pool.put(rest)

    def _merge(self, block: _Block, neighbour: _Block) -> None:
        """Add the free ``neighbour`` to ``block``."""
        if neighbour is block.before:
            block.address = neighbour.address
            block.before = neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block
        block.size += neighbour.size
        if block.pool.last is neighbour:
            block.pool.last = block


@dataclass(frozen=True, slots=True)
class AllocatorEvent:
    """One step of a trace: ``size`` bytes allocated under ``key``, or, with ``size`` None, what ``key`` names freed."""

    key: int
    size: int | None
    stream: int = 0


def replay(events: tuple[AllocatorEvent, ...], allocator: CachingAllocator) -> AllocatorStats:
    """Feed a trace to an allocator. Frees of what the trace did not allocate are an error.

    Raises
    ------
    PlanningError
        A key is freed that is not live, or allocated twice.
    """
    handles: dict[int, int] = {}
    for index, event in enumerate(events):
        if event.size is None:
            if event.key not in handles:
                raise PlanningError(f"event {index} frees {event.key}, which is not live")
            allocator.free(handles.pop(event.key))
        else:
            if event.key in handles:
                raise PlanningError(f"event {index} allocates {event.key}, which is live")
            handles[event.key] = allocator.alloc(event.size, stream=event.stream)
    return allocator.stats
