"""What a training step takes when it runs operation by operation, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EagerMemory:
    """Bytes of a training step run in program order, each result freed after its last use.

    Attributes
    ----------
    forward, backward:
        The peak of either, with what the forward left.
    between:
        Alive after the forward: results, and what the backward reads.
    after:
        Alive after the backward: results and gradients.
    """

    forward: int
    between: int
    backward: int
    after: int
