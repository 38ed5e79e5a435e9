"""A report as a still picture: whose the peak is, the curves, and every buffer at its address, as the view draws it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .colours import colour_of
from .glyphs import HEIGHT, WIDTH, fitted
from .layout import Box, boundaries, boxes, layout
from .model import Graph, Report
from .png import Image, Raster, encode
from .query import grouped
from .text import clean, code, percent, reached, size

PAGE, LEFT, RIGHT = 1000, 96, 16
#: Rows of the page: heading (title, where, whose), curves, lanes, steps, legend; in pixels.
HEADING, CURVES, LANES, STEPS, LEGEND = 124, 150, 400, 38, 26
#: Lines of the user's that are named, and the pixels between two lanes.
NAMED, GAP = 3, 6
_INK, _SOFT, _GRID, _LANE = "#1c1c1c", "#6a6a6a", "#dddddd", "#f0f0f0"
_LIVE, _ALLOCATED, _MEASURED = "#0072b2", "#c8c8c8", "#d55e00"


@dataclass(frozen=True, slots=True)
class Scale:
    """Bytes that the curves reach, and that all lanes hold together: one for two pictures that are compared."""

    highest: int
    together: int


def picture(report: Report, graph: Graph | None = None, other: Report | None = None) -> bytes:
    """The step (or one graph) as PNG; with ``other``, its step below, on one scale of bytes.

    Colours are those of `memplan.reports.colours`, letters those of `memplan.reports.glyphs`.
    """
    if other is None:
        charts = [_Chart(report, graph or report.step)]
    else:
        charts = [_Chart(report, report.step, "before: "), _Chart(other, other.step, "after: ")]
    scale = Scale(max(c.highest for c in charts), max(c.together for c in charts))
    return encode(np.concatenate([c.drawn(scale) for c in charts], axis=0))


def ticks(highest: float, at_most: int) -> list[int]:
    """Bytes from 0 to ``highest``, a power of two apart, at most that many above 0."""
    step = 1
    while highest >= step * (at_most + 1):
        step *= 2
    return list(range(0, int(highest) + 1, step))


def numbers(last: int, at_most: int) -> range:
    """Round numbers of steps from 0 to ``last``, at most that many above 0."""
    step = 1
    for k in range(20):
        step = (1, 2, 5)[k % 3] * 10 ** (k // 3)
        if last < step * (at_most + 1):
            break
    return range(0, last + 1, step)


def tick(nbytes: int) -> str:
    """A size without zeros behind its point."""
    return re.sub(r"\.0+(?= )", "", size(nbytes)) if nbytes else "0"


class _Chart:
    """One graph of a report, about to be drawn."""

    def __init__(self, report: Report, graph: Graph, name: str = "") -> None:
        self.graph, self.plan, self.steps = graph, layout(graph), len(graph.steps)
        self.title = f"{name}{clean(report.target or graph.name, 80)}"
        self.measured = report.measured if graph is report.step else ()
        tops = [max(s, default=0) for s in (graph.allocated, graph.live)]
        self.highest = max(1, *tops, *(m.peak_allocated for m in self.measured))
        self.together = sum(max(lane.nbytes, 1) for lane in self.plan.lanes)
        self.paper = Raster(PAGE, HEADING + CURVES + LANES + STEPS + LEGEND)

    def drawn(self, scale: Scale) -> Image:
        self.heading()
        if self.steps:
            self.curves(scale)
            self.lanes(scale)
            self.marks()
        self.legend()
        return self.paper.image

    def x(self, step: float) -> float:
        """The column where a step begins."""
        return LEFT + min(step, self.steps) * (PAGE - LEFT - RIGHT) / self.steps

    def heading(self) -> None:
        """What was planned, where its peak is, and the user's lines that hold most of it."""
        paper, graph, at = self.paper, self.graph, self.graph.peak_step
        paper.text(12, 8, fitted(f"{self.title}: peak {size(graph.peak)}", PAGE - 24), bold=True)
        if not self.steps:
            paper.text(12, 26, "no steps: nothing runs", _SOFT)
            return
        paper.text(12, 26, fitted(reached(graph), PAGE - 24), _SOFT)
        for k, row in enumerate(grouped(graph, graph.alive_at(at), at, "line")[:NAMED]):
            y, share = 44 + 16 * k, percent(row.nbytes, graph.allocated[at])
            paper.text(12, y, f"{size(row.nbytes):>8} {share:>6}")
            x = paper.text(12 + 17 * WIDTH, y, fitted(clean(row.key), 330), bold=True) + 2 * WIDTH
            paper.text(x, y, fitted(code(row.largest.origin), int(PAGE - 12 - x)))

    def curves(self, scale: Scale) -> None:
        """Allocated bytes grey, live ones as a blue line, measured ones orange; bytes on the left."""
        paper, floor = self.paper, HEADING + CURVES
        high = (CURVES - 4) / scale.highest
        for nbytes in ticks(scale.highest, 4):
            paper.across(LEFT, PAGE - RIGHT, floor - nbytes * high, _GRID)
            paper.text(LEFT - WIDTH, floor - nbytes * high - HEIGHT // 2, tick(nbytes), _SOFT, align="right")
        for x, value in self.columns(self.graph.allocated):
            paper.fill(x, floor - value * high, x + 1, floor, _ALLOCATED)
        self.line(self.graph.live, high, _LIVE)
        for m in self.measured:
            if m.timeline:
                self.line(m.timeline, high, _MEASURED)
            y = floor - m.peak_allocated * high
            paper.across(LEFT, PAGE - RIGHT, y, _MEASURED, dash=5)

    def columns(self, series: Sequence[int | None]) -> Iterator[tuple[int, int]]:
        """The largest value in each column of pixels; none where nothing was seen."""
        edges = np.linspace(0, self.steps, PAGE - LEFT - RIGHT + 1)
        for k in range(len(edges) - 1):
            a = int(edges[k])
            seen = [v for v in series[a : max(a + 1, int(edges[k + 1]))] if v is not None]
            if seen:
                yield LEFT + k, max(seen)

    def line(self, series: Sequence[int | None], high: float, colour: str) -> None:
        floor, before = HEADING + CURVES, None
        for x, value in self.columns(series):
            y = floor - value * high
            a, b = (y, y) if before is None or before[0] != x - 1 else sorted((y, before[1]))
            self.paper.fill(x, a - 1, x + 1, b + 1, colour)
            before = (x, y)

    def lanes(self, scale: Scale) -> None:
        """A lane for each pool and for own allocations, a box for each buffer, with its line where there is room."""
        paper, lanes = self.paper, self.plan.lanes
        gap = min(GAP, LANES / (2 * max(len(lanes), 1)))
        high = (LANES - gap * len(lanes)) / max(scale.together, 1)
        tops, y = [], HEADING + CURVES + 12.0
        for lane in lanes:
            tops.append(y)
            height = max(lane.nbytes, 1) * high
            paper.fill(self.x(lane.birth), y, self.x(lane.death), y + height, _LANE)
            self.lane_labels(lane.short, y, lane.nbytes, high)
            y += height + gap
        names = [self.box(box, tops[box.lane], high) for box in boxes(self.graph, self.plan)]
        for x, top, text in filter(None, names):
            paper.text(x, top, text)

    def lane_labels(self, name: str, y: float, nbytes: int, high: float) -> None:
        """The lane's name, and below it bytes from its start."""
        right = LEFT - WIDTH
        if nbytes * high < HEIGHT - 2:
            return
        self.paper.text(right, y - 1, fitted(name, right - 4), _INK, align="right")
        for value in ticks(nbytes, max(int(nbytes * high / 32), 1)):
            if value * high >= HEIGHT + 6:
                self.paper.fill(LEFT - 5, y + value * high, LEFT, y + value * high + 1, _SOFT)
                self.paper.text(right, y + value * high - HEIGHT // 2, tick(value), _SOFT, align="right")

    def box(self, box: Box, y: float, high: float) -> tuple[float, float, str] | None:
        """A buffer; what is to be written on it once all are there, and where."""
        top, bottom = round(y + box.offset * high), round(y + (box.offset + box.nbytes) * high)
        left, right = round(self.x(box.birth)), round(self.x(box.death))
        bottom, right = max(bottom, top + 1), max(right, left + 1)
        self.paper.fill(left, top, right, bottom, colour_of(box.buffer.kind))
        if bottom - top <= 3 or right - left <= 3:
            return None
        self.paper.fill(left, top, right, top + 1, "#ffffff")
        self.paper.fill(left, top, left + 1, bottom, "#ffffff")
        if bottom - top < HEIGHT + 4 or right - left < 10 * WIDTH:
            return None
        text = f"{size(box.buffer.nbytes)}  {code(box.buffer.origin) or clean(box.buffer.name)}"
        return left + 5, top + 3, fitted(text, right - left - 8)

    def marks(self) -> None:
        """Steps below, where each graph begins, and the peak."""
        paper, graph, floor = self.paper, self.graph, HEADING + CURVES + 12 + LANES
        paper.across(LEFT, PAGE - RIGHT, floor, _SOFT)
        for k in numbers(self.steps, 10):
            paper.fill(self.x(k), floor, self.x(k) + 1, floor + 4, _SOFT)
            inside = PAGE - 4 - len(str(k)) * WIDTH / 2
            paper.text(min(self.x(k), inside), floor + 6, str(k), _SOFT, align="middle")
        paper.text(LEFT - WIDTH, floor + 6, "step", _SOFT, align="right")
        for step, name in boundaries(graph):
            x = self.x(step)
            paper.fill(x, HEADING - 28, x + 1, floor, _SOFT)
            paper.text(x + 4, HEADING - 30, fitted(name, int(PAGE - RIGHT - x - 4)), _SOFT, paper="#ffffff")
        x = self.x(graph.peak_step + 0.5)
        paper.fill(x, HEADING - 14, x + 2, floor, _INK)
        text = f"peak {size(graph.peak)}, step {graph.peak_step}"
        late = x + 6 + len(text) * WIDTH > PAGE - RIGHT
        paper.text(x - 5 if late else x + 7, HEADING - 14, text, bold=True, align="right" if late else "left")

    def legend(self) -> None:
        """Colours that are there, and what the curves are."""
        y, x = self.paper.height - LEGEND + 4, float(LEFT)
        held: dict[str, int] = {}
        for item in self.plan.placed:
            kind = self.graph.by_name[item.storage.name].kind
            held[kind] = held.get(kind, 0) + item.storage.nbytes
        entries = [(colour_of(kind), clean(kind, 20), 11) for kind in sorted(held, key=lambda k: -held[k])]
        entries += [(_LIVE, "live", 3), (_ALLOCATED, "with rounding and room in pools", 11)]
        if self.measured:
            entries.append((_MEASURED, "measured", 3))
        for colour, text, high in entries:
            middle = y + HEIGHT // 2
            self.paper.fill(x, middle - high // 2, x + 11, middle - high // 2 + high, colour)
            x = self.paper.text(x + 16, y, text, _SOFT) + 2 * WIDTH
