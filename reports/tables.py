"""A report as Markdown and as CSV: for pull requests and for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from .activations import by_line, milliseconds, totals
from .model import Buffer, Report
from .query import GroupBy, grouped, room
from .terminal import PHASES, placed, waterfalls
from .text import clean, code, line_of, percent, shape, signed, size, step_title, whereabouts

#: What a spreadsheet would take for a formula at the start of a cell.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;", "`": "&#96;"}
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\*_{}[]()#+!|~$"} | _ENTITIES)


def escaped(text: str) -> str:
    """Text that Markdown shows as it stands: no markup, no HTML, no mention of a user."""
    return clean(text).translate(_MARKDOWN)


def as_code(text: str) -> str:
    """Text as inline code in a table cell."""
    shown = clean(text).replace("`", "ˋ").replace("|", "∣")
    return f"`{shown}`" if shown else ""


def markdown(report: Report, *, by: GroupBy = "line", top: int = 10) -> str:
    """The summary as Markdown: the peak, whose it is, the stages and the graphs."""
    graph = report.step
    title = f" of {as_code(report.target)}" if report.target else ""
    lines = [f"### Peak memory{title}: {size(graph.peak)}", ""]
    if graph.steps:
        step = graph.steps[graph.peak_step]
        lines += [f"Reached at step {graph.peak_step} of {len(graph.steps)}, {as_code(step_title(step))}.", ""]
    for m in report.measured:
        predicted = report.predicted.get(m.device, graph.peak)
        off = f"{100 * (predicted - m.peak_allocated) / m.peak_allocated:+.2f}%" if m.peak_allocated else "-"
        lines += [
            f"Measured on {as_code(m.device)}: {size(m.peak_allocated)}; predicted {size(predicted)} ({off}).",
            "",
        ]
    lines += _peak_rows(report, by, top)
    if report.activations:
        lines += [f"**What the backward needs of the forward**: {escaped(totals(report.activations))}", ""]
        kept = [
            (r.fate, size(r.nbytes), str(r.count), milliseconds(r.microseconds), as_code(r.place), as_code(r.what))
            for r in by_line(report.activations)[:top]
        ]
        lines += [*_rows(("", "bytes", "number", "again", "your line", "what"), kept, right={1, 2, 3}), ""]
    for name, stages in waterfalls(report):
        lines += [f"**What each stage does to the peak of {escaped(name)}**", ""]
        before = [None, *(s.peak for s in stages)]
        rows = [
            (escaped(s.name), "" if b is None else signed(s.peak - b), size(s.peak))
            for s, b in zip(stages, before, strict=False)
        ]
        lines += [*_rows(("stage", "change", "peak"), rows, right={1, 2}), ""]
    graphs = (*report.graphs, *([report.whole] if report.whole is not None else []))
    table = [(escaped(g.name), PHASES[g.phase], str(len(g.steps)), str(len(g.buffers)), size(g.peak)) for g in graphs]
    lines += _rows(("graph", "phase", "steps", "buffers", "peak"), table, right={2, 3, 4})
    return "\n".join(lines) + "\n"


def _peak_rows(report: Report, by: GroupBy, top: int) -> list[str]:
    graph, at = report.step, report.step.peak_step
    groups = grouped(graph, graph.alive_at(at), at, by)
    rows = [
        (size(g.nbytes), percent(g.nbytes, graph.peak), escaped(g.key), as_code(code(g.largest.origin)), str(g.count))
        for g in groups[:top]
    ]
    rest = sum(g.nbytes for g in groups[top:])
    if rest:
        rows.append((size(rest), percent(rest, graph.peak), f"{len(groups) - top} more", "", ""))
    if graph.steps and graph.steps[at].scratch:
        step = graph.steps[at]
        what = f"scratch of {step.name}" + (f", {line_of(step)}" if line_of(step) else "")
        rows.append((size(step.scratch), percent(step.scratch, graph.peak), escaped(what), "", ""))
    if room(graph, at):
        rows.append(
            (size(room(graph, at)), percent(room(graph, at), graph.peak), "rounding, and room in pools", "", "")
        )
    return [*_rows(("bytes", "share", by, "code", "buffers"), rows, right={0, 1, 4}), ""]


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]], right: set[int]) -> list[str]:
    line = ["---:" if k in right else "---" for k in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, line, *rows)]


COLUMNS = (
    "name", "nbytes", "dtype", "shape", "device", "kind", "birth", "death", "placement", "pool", "offset",
    "in_place_of", "node", "op", "module", "file", "line", "code", "decided_by",
)  # fmt: skip


def buffers_csv(rows: Iterable[Buffer]) -> str:
    """Every buffer as a line of CSV; text that a spreadsheet would run as a formula gets an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for b in rows:
        o = b.origin
        sizes = "x".join(str(s) for s in b.shape) if b.shape is not None else ""
        cells = (
            b.name, b.nbytes, b.dtype, sizes, b.device, b.kind, b.birth, b.death, b.placement, b.pool or "",
            "" if b.offset is None else b.offset, b.in_place_of or "", o.node, o.op, o.module, o.file, o.line, o.code,
            b.decided_by,
        )  # fmt: skip
        writer.writerow([harmless(c) if isinstance(c, str) else c for c in cells])
    return out.getvalue()


def harmless(text: str) -> str:
    """A cell that no spreadsheet takes for a formula and no terminal for a command."""
    shown = clean(text, 1000)
    return f"'{shown}" if text.startswith(_FORMULA) else shown


def buffers_markdown(rows: Sequence[Buffer]) -> str:
    """Buffers as a Markdown table."""
    cells = [
        (
            size(b.nbytes),
            escaped(whereabouts(b.origin)),
            as_code(code(b.origin)),
            as_code(shape(b)),
            escaped(b.kind),
            as_code(b.name),
            escaped(placed(b)),
        )
        for b in rows
    ]
    return "\n".join(_rows(("bytes", "your line", "code", "shape", "kind", "buffer", "place"), cells, right={0})) + "\n"


def groups_csv(report: Report, by: GroupBy) -> str:
    """What is alive at the peak, grouped, as CSV."""
    graph = report.step
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((by, "nbytes", "buffers"))
    for row in grouped(graph, graph.alive_at(graph.peak_step), graph.peak_step, by):
        writer.writerow((harmless(row.key), row.nbytes, row.count))
    return out.getvalue()
