"""Colours that the colour-blind can tell apart (Okabe and Ito, "Color Universal Design", 2008)."""

from __future__ import annotations

import zlib

KIND = {
    "input": "#999999",
    "parameter": "#666666",
    "constant": "#666666",
    "temporary": "#56b4e9",
    "saved": "#d55e00",
    "output": "#009e73",
    "workspace": "#f0e442",
    "comm": "#cc79a7",
}
CYCLE = ("#56b4e9", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#0072b2", "#f0e442")


def colour_of(name: str) -> str:
    """The colour of a kind; of any other name one of the cycle, always the same."""
    return KIND.get(name) or CYCLE[zlib.crc32(name.encode("utf-8", "replace")) % len(CYCLE)]


def rgb(colour: str) -> tuple[int, int, int]:
    """``#rrggbb`` as three numbers."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
