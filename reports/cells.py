"""Cells of tables that stay readable where their column is narrow."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

#: Characters that a place is never squeezed below: a file's name and a line as a rule.
_LEAST = 26


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the user's code, and below it the source text.

    Of a place that is too long the start of the path goes: the line, at its end, is what people look for.
    """

    place: str
    code: str = ""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = max(len(self.place), len(self.code) + 2 if self.code else 0)
        return Measurement(min(len(self.place), _LEAST), widest).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(cropped(self.place, options.max_width), no_wrap=True, overflow="crop")
        if self.code:
            yield Text(f"  {self.code}", style="cyan", no_wrap=True, overflow="ellipsis")


def cropped(place: str, width: int) -> str:
    """The end of a place, ``width`` characters at most."""
    return place if len(place) <= width else f"…{place[len(place) - max(width - 1, 1) :]}"
