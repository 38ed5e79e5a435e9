"""A picture without a drawing library: address over time and the curves above it, written as PNG with zlib."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from .colours import colour_of, rgb
from .layout import boxes, layout
from .model import Graph

Image = npt.NDArray[np.uint8]
WIDTH, CURVES, LANES, MARGIN, GAP = 1200, 160, 440, 12, 6
_LIVE, _ALLOCATED, _PEAK = "#0072b2", "#bbbbbb", "#000000"


def picture(graph: Graph) -> bytes:
    """Above: allocated (grey) and live (blue) bytes by step. Below: one lane per pool, own allocations last.

    Colours are those of `memplan.reports.colours`; a black line marks the peak.
    """
    image: Image = np.full((CURVES + LANES + 3 * MARGIN, WIDTH, 3), 255, dtype=np.uint8)
    steps = len(graph.steps)
    if steps:
        _curves(image, graph)
        _lanes(image, graph)
        x = _column(graph.peak_step, steps)
        image[MARGIN:-MARGIN, x : x + 2] = rgb(_PEAK)
    return encode(image)


def _column(step: int, steps: int) -> int:
    return MARGIN + round(min(step, steps) * (WIDTH - 2 * MARGIN) / steps)


def _curves(image: Image, graph: Graph) -> None:
    inner = WIDTH - 2 * MARGIN
    highest = max(graph.peak, 1)
    edges = np.linspace(0, len(graph.steps), inner + 1)
    for series, colour in ((graph.allocated, _ALLOCATED), (graph.live, _LIVE)):
        values = np.asarray(series, dtype=np.float64)
        for x in range(inner):
            a = int(edges[x])
            height = round(values[a : max(a + 1, int(edges[x + 1]))].max() / highest * CURVES)
            if height:
                image[MARGIN + CURVES - height : MARGIN + CURVES, MARGIN + x] = rgb(colour)


def _lanes(image: Image, graph: Graph) -> None:
    plan, steps = layout(graph), len(graph.steps)
    total = sum(max(lane.nbytes, 1) for lane in plan.lanes)
    space = LANES - GAP * max(0, len(plan.lanes) - 1)
    scale = max(space, 1) / max(total, 1)
    tops, y = [], float(CURVES + 2 * MARGIN)
    for lane in plan.lanes:
        tops.append(y)
        height = max(lane.nbytes, 1) * scale
        left, right = _column(lane.birth, steps), _column(lane.death, steps)
        image[round(y) : round(y + height), left:right] = 240
        y += height + GAP
    for box in boxes(graph, plan):
        top = tops[box.lane] + box.offset * scale
        left, right = _column(box.birth, steps), max(_column(box.death, steps), _column(box.birth, steps) + 1)
        a, b = round(top), max(round(top + box.nbytes * scale), round(top) + 1)
        image[a:b, left:right] = rgb(colour_of(box.buffer.kind))
        if b - a > 3 and right - left > 3:
            image[a, left:right] = 255
            image[a:b, left] = 255


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
