"""A picture of pixels, and its PNG: what `memplan.reports.picture` draws with, without a drawing library."""

from __future__ import annotations

import struct
import zlib
from typing import Literal

import numpy as np
import numpy.typing as npt

from . import glyphs
from .colours import rgb

Image = npt.NDArray[np.uint8]
Align = Literal["left", "middle", "right"]


class Raster:
    """White paper of ``width`` by ``height`` pixels; x to the right, y down. What falls beside it is not drawn."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.image: Image = np.full((height, width, 3), 255, dtype=np.uint8)

    def fill(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        """The pixels of ``[x0, x1)`` by ``[y0, y1)``, rounded."""
        a, b, c, d = (max(round(v), 0) for v in (x0, x1, y0, y1))
        self.image[c:d, a:b] = rgb(colour)

    def across(self, x0: float, x1: float, y: float, colour: str, dash: int = 0) -> None:
        """A line of one pixel from left to right; with ``dash``, pieces of that length and as much between them."""
        x = x0
        while x < x1:
            self.fill(x, y, min(x + dash, x1) if dash else x1, y + 1, colour)
            x += 2 * dash if dash else x1 - x0

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = "#1c1c1c",
        *,
        bold: bool = False,
        align: Align = "left",
        paper: str = "",
    ) -> float:
        """A line of text whose top is ``y``; ``paper`` is laid under it. Where it ends."""
        mask = glyphs.mask(text, bold=bold)
        left = round(x) - {"left": 0, "middle": mask.shape[1] // 2, "right": mask.shape[1]}[align]
        if paper:
            self.fill(left - 2, y - 1, left + mask.shape[1] + 2, y + glyphs.HEIGHT, paper)
        a, top = max(left, 0), max(round(y), 0)
        part = self.image[top : round(y) + glyphs.HEIGHT, a : max(left + mask.shape[1], 0)]
        inked = mask[top - round(y) :, a - left :][: part.shape[0], : part.shape[1]]
        part[inked] = rgb(colour)
        return float(left + mask.shape[1])


def encode(image: Image) -> bytes:
    """PNG (ISO/IEC 15948) of an array (height, width, 3), 8 bits a channel."""
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 1:] = image.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 9)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", body), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
