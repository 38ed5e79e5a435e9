"""memplan's own torch operators: random numbers as functions of a seed and a position.

``memplan::seeds(n, device)`` draws ``n`` int64 seeds from torch's generator (once per graph call, on the device);
``memplan::rand(seeds, index, size)`` gives float32 numbers in [0, 1), the same for the same seed: Philox 2x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one multiplication a round where the 4x32 of
Triton's ``tl.rand`` has two, of whose four words one would be used. So the backward pass recomputes a dropout mask from
8 bytes instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_LIBRARY = torch.library.Library("memplan", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "seeds(int n, *, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "rand(Tensor seeds, int index, SymInt[] size) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)

_MULTIPLIER, _WEYL = 0xD256D193, 0x9E3779B9
_LOW = 0xFFFFFFFF


def _seeds(n: int, *, device: torch.device) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (n,), dtype=torch.int64, device=device)


def _seeds_fake(n: int, *, device: torch.device) -> torch.Tensor:
    return torch.empty((n,), dtype=torch.int64, device=device)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the product of two unsigned 32-bit numbers (held in int64)."""
    # split so that no partial product passes 2**63
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a
    low_total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (low_total >> 32)) & _LOW, low_total & _LOW


def philox(seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """First 32-bit word (in int64) of the draw of each offset (`memplan.ir.loops.Random`)."""
    first, second = offset & _LOW, ((offset ^ seed) >> 32) & _LOW
    key = seed & _LOW
    for _ in range(10):
        high, low = _multiply(_MULTIPLIER, first)
        first, second = high ^ key ^ second, low
        key = (key + _WEYL) & _LOW
    return first


def uniform(word: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1) from a 32-bit word, as Triton does it."""
    signed = torch.where(word >= 2**31, word - 2**32, word)
    magnitude = torch.where(signed < 0, -signed - 1, signed)
    return magnitude.to(torch.float32) * 4.6566127342e-10


def _rand(seeds: torch.Tensor, index: int, size: Sequence[int]) -> torch.Tensor:
    count = 1
    for n in size:
        count *= n
    offsets = torch.arange(count, dtype=torch.int64, device=seeds.device)
    return uniform(philox(seeds[index], offsets)).reshape(tuple(size))


def _rand_fake(seeds: torch.Tensor, index: int, size: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(size), dtype=torch.float32, device=seeds.device)


_LIBRARY.impl("seeds", _seeds, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("rand", _rand, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("memplan::seeds", _seeds_fake, lib=_LIBRARY)
torch.library.register_fake("memplan::rand", _rand_fake, lib=_LIBRARY)
