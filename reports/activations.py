"""What became of every value that the backward reads: the table, in a terminal and as rows for other formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .cells import Place
from .model import Activation, Report
from .text import clean, line, short, size

FATES = ("saved", "narrowed", "chunked", "offloaded", "recomputed")


@dataclass(frozen=True, slots=True)
class Row:
    """Values of one line of the user's with one fate: how many, their bytes, microseconds of computing them again."""

    fate: str
    place: str
    what: str
    count: int
    nbytes: int
    microseconds: float | None


def by_line(activations: Sequence[Activation]) -> list[Row]:
    """Rows with the most bytes first."""
    groups: dict[tuple[str, str, str], list[Activation]] = {}
    for a in activations:
        groups.setdefault((a.fate, line(a.origin), a.origin.op), []).append(a)
    rows = [
        Row(
            fate,
            place,
            op,
            len(members),
            sum(a.nbytes for a in members),
            None if any(a.microseconds is None for a in members) else sum(a.microseconds or 0.0 for a in members),
        )
        for (fate, place, op), members in groups.items()
    ]
    return sorted(rows, key=lambda r: (-r.nbytes, FATES.index(r.fate), r.place, r.what))


def totals(activations: Sequence[Activation]) -> str:
    """One sentence: bytes by fate, and the time that recomputation takes."""
    parts = []
    for fate in FATES:
        mine = [a for a in activations if a.fate == fate]
        if mine:
            text = f"{fate} {size(sum(a.nbytes for a in mine))} in {len(mine)}"
            if fate in ("offloaded", "recomputed"):
                beside = " of copies beside it" if fate == "offloaded" else ""
                text += f" for about {milliseconds(sum(a.microseconds or 0.0 for a in mine))} a step{beside}"
            parts.append(text)
    return ", ".join(parts)


def milliseconds(microseconds: float | None) -> str:
    """Text; a dash for what cannot be computed again."""
    if microseconds is None:
        return "-"
    value = microseconds / 1e3
    if value >= 100 or not value:
        return f"{value:.0f} ms"
    return f"{value:.3g} ms" if value >= 0.001 else "< 0.001 ms"


def table(report: Report, top: int) -> RenderableType:
    """Kept and recomputed values by the user's line."""
    head = Text.assemble(("What the backward needs of the forward", "bold"), f"  {totals(report.activations)}")
    out = Table(box=None, pad_edge=False, header_style="dim")
    out.add_column("")
    for title in ("bytes", "number", "again"):
        out.add_column(title, justify="right", no_wrap=True)
    out.add_column("your line")
    out.add_column("what", overflow="fold")
    rows = by_line(report.activations)
    for r in rows[:top]:
        counts = (size(r.nbytes), str(r.count), milliseconds(r.microseconds))
        out.add_row(r.fate, *counts, Place(clean(r.place)), short(r.what))
    if len(rows) > top:
        rest = rows[top:]
        out.add_row("", size(sum(r.nbytes for r in rest)), str(sum(r.count for r in rest)), "", "", f"{len(rest)} more")
    return Group(head, out)
