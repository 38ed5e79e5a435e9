"""Two reports held against each other, and the gates of ``memplan check``."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from ..ir.config import parse_bytes
from ..ir.errors import OptionError
from .model import Buffer, Graph, Report
from .query import GroupBy, group_key, room
from .text import percent, signed, size

Key = tuple[str, int, str, str, tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes alive at the peak under one key, before and after."""

    key: str
    before: int
    after: int

    @property
    def difference(self) -> int:
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class Comparison:
    """``changes`` sum to the difference of the two peaks; ``gone`` and ``new`` are buffers without a match."""

    before: int
    after: int
    changes: tuple[Change, ...]
    gone: tuple[Buffer, ...]
    new: tuple[Buffer, ...]
    same: int


def compare(before: Report, after: Report, by: GroupBy = "line") -> Comparison:
    """Match two reports: what is alive at either peak by ``by``, buffers by the user's line, operation and shape."""
    a, b = before.step, after.step
    at_a, at_b = _at_peak(a, by), _at_peak(b, by)
    changes = [Change(k, at_a.get(k, 0), at_b.get(k, 0)) for k in dict.fromkeys((*at_a, *at_b))]
    changes.sort(key=lambda c: (-abs(c.difference), c.key))
    gone, new, same = _matched(a, b)
    return Comparison(a.peak, b.peak, tuple(changes), gone, new, same)


def _at_peak(graph: Graph, by: GroupBy) -> dict[str, int]:
    at, found = graph.peak_step, Counter[str]()
    for s in graph.alive_at(at):
        found[group_key(graph.shown_at(s, at), by)] += s.nbytes
    if graph.steps and graph.steps[at].scratch:
        found["(scratch)"] += graph.steps[at].scratch
    if room(graph, at):
        found["(rounding, and room in pools)"] += room(graph, at)
    return dict(found)


def match_key(b: Buffer) -> Key:
    """What makes two buffers of different compilations the same: line, operation, shape, bytes."""
    return (b.origin.file, b.origin.line, b.origin.op, b.dtype, b.shape or (), b.nbytes)


def _matched(a: Graph, b: Graph) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...], int]:
    left, right = Counter(map(match_key, a.buffers)), Counter(map(match_key, b.buffers))
    same = sum((left & right).values())
    return _unmatched(a, left - right), _unmatched(b, right - left), same


def _unmatched(graph: Graph, extra: Counter[Key]) -> tuple[Buffer, ...]:
    remaining, found = Counter(extra), []
    for b in sorted(graph.buffers, key=lambda b: (-b.nbytes, b.name)):
        if remaining[match_key(b)] > 0:
            remaining[match_key(b)] -= 1
            found.append(b)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Gate:
    """One thing that ``memplan check`` looks at."""

    title: str
    passed: bool
    detail: str


def gates(
    report: Report, baseline: Report | None, max_growth: str | None = None, max_peak: str | None = None
) -> list[Gate]:
    """Whether the peak stays within the limits.

    Parameters
    ----------
    max_growth:
        Allowed growth over the baseline's peak: ``"2%"`` or a number of bytes (``"10MiB"``).

    Raises
    ------
    OptionError
        If a limit cannot be read, or there is a growth limit and no baseline.
    """
    found, peak = [], report.step.peak
    if max_peak is not None:
        limit = parse_bytes(max_peak)
        found.append(Gate("peak", peak <= limit, f"{size(peak)} of at most {size(limit)}"))
    if baseline is not None:
        before = baseline.step.peak
        allowed = growth(max_growth or "0%", before)
        grown = f"{size(before)} -> {size(peak)} ({signed(peak - before)}, {percent(peak - before, before)})"
        found.append(Gate("growth", peak - before <= allowed, f"{grown}; at most {signed(allowed)} allowed"))
    elif max_growth is not None:
        raise OptionError("--max-growth needs a --baseline to grow from")
    if not found:
        raise OptionError("nothing to check: give --baseline FILE or --max-peak BYTES")
    return found


def growth(text: str, before: int) -> int:
    """Bytes of growth that ``"2%"`` or ``"10MiB"`` allow over ``before``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match:
        return int(before * float(match.group(1)) / 100)
    return 0 if text.strip() == "0" else parse_bytes(text)
