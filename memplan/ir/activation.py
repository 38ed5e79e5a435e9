"""What became of every value that the backward reads: said in reports, decided in the partition."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .program import Origin


class Fate(Enum):
    SAVED = "saved"  # kept as it is
    NARROWED = "narrowed"  # kept in a narrower dtype, from which the wide one comes again
    CHUNKED = "chunked"  # a gradient that a loss in slices made in the forward, instead of its logits
    OFFLOADED = "offloaded"  # kept in pinned memory of the host in between
    RECOMPUTED = "recomputed"  # computed again in the backward


@dataclass(frozen=True, slots=True)
class Activation:
    """One value of the forward that the backward needs.

    Attributes
    ----------
    nbytes:
        Bytes that it takes from the forward to the backward; of a recomputed or offloaded one, that it does not take.
    microseconds:
        Estimated time of computing it again; None if it must not be. Of an offloaded one that of its copies, there and
        back, beside which the device computes.
    """

    name: str
    fate: Fate
    nbytes: int
    microseconds: float | None
    origin: Origin
