"""Planned bytes held against measured ones."""

from __future__ import annotations

from collections.abc import Sequence


def farthest(planned: Sequence[int], measured: Sequence[int | None]) -> int:
    """The largest difference of a step's bytes, measured less planned; 0 where nothing was seen."""
    found = [m - p for p, m in zip(planned, measured, strict=True) if m is not None]
    return max(found, key=abs, default=0)
