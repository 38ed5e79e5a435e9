"""A report in a terminal: summary, peak, buffers, waterfall."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import activations
from .cells import Place
from .measured import farthest
from .model import Buffer, Graph, Measurement, Report, WaterfallStep, once
from .query import GroupBy, grouped, room
from .text import clean, code, line_of, percent, reached, shape, short, signed, size, step_title, whereabouts

_BAR = 24
_SPARK = "▁▂▃▄▅▆▇█"
#: What plans note of calls whose scratch nobody could measure: sizes that vary, no memory to try them in.
UNCOUNTED = "not known and not counted"
PHASES = {"inference": "inference", "forward": "forward", "backward": "backward", "step": "forward and backward"}


class PlainConsole(Console):
    """A console that prints names as they are (no markup, emoji, highlighting) and outlives a closed pipe.

    When the reader of a pipe goes away, the rest of the output goes nowhere and the command still ends with its own
    exit code: a gate must not seem to pass or fail because somebody piped it into ``head``.
    """

    def on_broken_pipe(self) -> None:
        silence()


def silence(stream: TextIO | None = None) -> None:
    """Let everything written to a stream (standard output) from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, (stream or sys.stdout).fileno())
    os.close(nowhere)


def console(width: int | None = None) -> Console:
    """The console that all commands print to; rich itself honours ``NO_COLOR`` and plain files."""
    return PlainConsole(markup=False, emoji=False, highlight=False, width=width)


def rendered(*parts: RenderableType, width: int = 100) -> str:
    """Plain text, whatever the surroundings: in a notebook rich would show it at once instead of giving it back."""
    out = io.StringIO()
    plain = Console(
        file=out, width=width, markup=False, emoji=False, highlight=False, no_color=True, force_jupyter=False,
        force_terminal=False,
    )  # fmt: skip
    for part in parts:
        plain.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def write(text: str) -> None:
    """Text as it is to standard output (JSON, CSV, Markdown); a closed pipe ends it quietly."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence()


def summary(report: Report, *, by: GroupBy = "line", top: int = 8) -> RenderableType:
    """The report on one screen: the peak, who is to blame, how near the optimum, predicted against measured."""
    parts: list[RenderableType] = [headline(report), Text()]
    parts.append(peak_groups(report.step, by=by, top=top))
    parts += [Text(), curve(report.step)]
    parts += [measured_curve(report.step, m) for m in report.measured if m.timeline]
    if report.activations:
        parts += [Text(), activations.table(report, top)]
    for title, stages in waterfalls(report):
        parts += [Text(), waterfall(stages, title)]
    parts += [Text(), graph_table(report)]
    if any(g.arenas for g in report.graphs):
        parts += [Text(), arena_table(report)]
    facts = certificates(report)
    if facts:
        parts += [Text(), *facts]
    return Group(*parts)


def headline(report: Report) -> Text:
    """Predicted peak, measured peak, and the line that holds most of it."""
    graph = report.step
    text = Text()
    text.append("Peak memory ", style="bold")
    text.append(size(graph.peak), style="bold green")
    text.append(" above what was there before the step")
    if report.target:
        text.append(f"  ({clean(report.target)})", style="dim")
    if graph.steps:
        text.append(f"\n{reached(graph)}")
    for m in report.measured:
        predicted = report.predicted.get(m.device, graph.peak)
        text.append(f"\nmeasured on {clean(m.device)}: {size(m.peak_allocated)}, ")
        text.append(f"predicted {size(predicted)} ({_off(predicted, m.peak_allocated)})")
        if m.workspace:
            text.append(f", libraries' workspaces {size(m.workspace)} apart")
        if m.peak_reserved is not None:
            text.append(f", reserved {size(m.peak_reserved)}")
    for device, found in graph.reserved.items():
        text.append(f"\nreserved on {clean(device)}: predicted {size(found.reserved)}, with {size(found.resident)} of ")
        text.append(f"parameters and batch; {found.reserved / found.live if found.live else 1:.2f} times what is alive")
    unknown = list(dict.fromkeys(name for g in report.graphs for name, note in g.notes if UNCOUNTED in note))
    if unknown:
        names = ", ".join(map(clean, unknown[:3])) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        text.append(f"\nnot counted, since it is not known: the scratch of {names}", style="yellow")
    held = graph.held_by_caller
    if held:
        text.append("\nheld by the caller, not in the peak: ", style="dim")
        text.append(", ".join(f"{clean(k)}s {size(v)}" for k, v in held.items()), style="dim")
    return text


def _off(predicted: int, measured: int) -> str:
    return f"{100 * (predicted - measured) / measured:+.2f}%" if measured else "nothing measured"


def peak_groups(graph: Graph, *, step: int | None = None, by: GroupBy = "line", top: int = 8) -> RenderableType:
    """What is alive at a step (the peak), grouped; its bytes sum to what is allocated there."""
    at = graph.peak_step if step is None else step
    rows = grouped(graph, graph.alive_at(at), at, by)
    total = graph.allocated[at] if at < len(graph.steps) else 0
    kind = "your line" if by == "line" else by
    table = _table("bytes", "share", kind, "what", justify={0: "right", 1: "right"}, fixed=(2,) if by != "line" else ())
    table.title = Text("Alive at the peak" if at == graph.peak_step else f"Alive at step {at}", style="bold")
    for row in rows[:top]:
        table.add_row(
            size(row.nbytes),
            percent(row.nbytes, total),
            Place(clean(row.key)) if by == "line" else clean(row.key, 48),
            _what(row.largest, row.count),
        )
    rest = rows[top:]
    if rest:
        nbytes = sum(r.nbytes for r in rest)
        table.add_row(size(nbytes), percent(nbytes, total), f"{len(rest)} more", "", style="dim")
    _remainder(table, graph, at, total)
    return table


def _remainder(table: Table, graph: Graph, at: int, total: int) -> None:
    """Scratch of the running operation, and room in pools, so that the rows sum to what is allocated."""
    if at < len(graph.steps) and graph.steps[at].scratch:
        step = graph.steps[at]
        what = Text(f"scratch of {clean(step.name)}, while it runs", overflow="fold")
        table.add_row(size(step.scratch), percent(step.scratch, total), Place(line_of(step)), what)
    spare = room(graph, at)
    if spare:
        table.add_row(size(spare), percent(spare, total), "", "rounding, and room in pools", style="dim")


def _what(largest: Buffer, count: int) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    if code(largest.origin):
        text.append(code(largest.origin), style="cyan")
        text.append("  ")
    text.append(f"{clean(largest.kind)} {shape(largest)}", style="dim")
    if count > 1:
        text.append(f" and {count - 1} more", style="dim")
    return text


def peak(graph: Graph, *, step: int | None = None, top: int = 20) -> RenderableType:
    """Every buffer alive at the peak, or at a step, with the user's line."""
    at = graph.peak_step if step is None else step
    title = Text(f"Step {at} of {len(graph.steps)}", style="bold")
    if at < len(graph.steps):
        title.append(f": {step_title(graph.steps[at])}")
        title.append(f"\n{size(graph.allocated[at])} allocated, {size(graph.live[at])} live", style="")
    alive = graph.alive_at(at)
    total = graph.allocated[at] if at < len(graph.steps) else 0
    table = _table("bytes", "share", "your line", "what, where", justify={0: "right", 1: "right"})
    for s in alive[:top]:
        b = graph.shown_at(s, at)
        table.add_row(size(s.nbytes), percent(s.nbytes, total), _place(b), _buffer(graph, b))
    rest = alive[top:]
    if rest:
        nbytes = sum(s.nbytes for s in rest)
        table.add_row(size(nbytes), percent(nbytes, total), f"{len(rest)} more", style="dim")
    _remainder(table, graph, at, total)
    return Group(title, table)


def _place(b: Buffer) -> Place:
    """The user's line, and its text."""
    return Place(whereabouts(b.origin), code(b.origin))


def _buffer(graph: Graph, b: Buffer, *more: str) -> RenderableType:
    """Shape and kind; below it, on as many lines as it takes, name, life and what else there is to say."""
    kept = "until the end" if b.death > len(graph.steps) else f"to {b.death}"
    rest = ", ".join((f"{clean(b.name)}, steps {b.birth} {kept}", *more))
    return Group(
        Text(f"{shape(b)} {clean(b.kind)}", overflow="fold"),
        Padding(Text(rest, style="dim", overflow="fold"), (0, 0, 0, 2)),
    )


def buffers(graph: Graph, rows: Sequence[Buffer], *, top: int = 40) -> RenderableType:
    """A table of buffers: bytes, your line, shape; then where they lie, how long, made by what."""
    table = _table("bytes", "your line", "what, where", justify={0: "right"})
    for b in rows[:top]:
        by = (f"by {short(b.origin.op)}",) if b.origin.op else ()
        table.add_row(size(b.nbytes), _place(b), _buffer(graph, b, clean(placed(b)), *by))
    count = Text(f"{len(rows)} buffers, {size(sum(b.nbytes for b in rows))}", style="dim")
    if len(rows) > top:
        count.append(f"; the first {top} are shown (--top)")
    return Group(table, count)


def placed(b: Buffer) -> str:
    """Where a buffer's bytes are, in words."""
    match b.placement:
        case "external":
            return "donated by the caller" if b.donated else "the caller's"
        case "own":
            return "own allocation"
        case "pool":
            return f"{b.pool} + {b.offset}"
        case "arena":
            return f"{b.arena} + {b.offset}"
        case "in_place":
            return f"in place of {b.in_place_of}"


def waterfalls(report: Report) -> list[tuple[str, tuple[WaterfallStep, ...]]]:
    """The step's waterfall, or else that of each graph which has one, with titles."""
    if report.waterfall:
        return [("the step", report.waterfall)]
    return [(g.name, g.waterfall) for g in report.graphs if g.waterfall]


def waterfall(stages: Sequence[WaterfallStep], title: str) -> RenderableType:
    """The peak after each stage: the changes sum to the difference of first and last."""
    table = _table("stage", "change", "peak", "", justify={1: "right", 2: "right"})
    table.title = Text(f"What each stage does to the peak of {clean(title)}", style="bold")
    largest = max((s.peak for s in stages), default=0)
    before: int | None = None
    for s in stages:
        change = "" if before is None else signed(s.peak - before) if s.peak != before else "-"
        style = "" if before is None or s.peak == before else "green" if s.peak < before else "red"
        table.add_row(clean(s.name), Text(change, style=style), size(s.peak), Text(bar(s.peak, largest), style="blue"))
        before = s.peak
    return table


def bar(value: int, largest: int, width: int = _BAR) -> str:
    """A bar of eighths of a character, ``width`` characters for ``largest``."""
    eighths = round(8 * width * value / largest) if largest else 0
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def curve(graph: Graph, width: int = 72) -> Text:
    """Allocated bytes over the steps as one line of characters; a caret stands under the peak."""
    count = len(graph.steps)
    if not count:
        return Text("no steps: nothing runs", style="dim")
    width = min(width, count)
    edges = [k * count // width for k in range(width + 1)]
    heights = [max(graph.allocated[a:b]) for a, b in itertools.pairwise(edges)]
    top = max(heights) or 1
    text = Text("Allocated, step by step\n", style="bold")
    text.append("".join(_SPARK[min(7, h * 8 // (top + 1))] for h in heights), style="blue")
    column = next(c for c in range(width) if edges[c] <= graph.peak_step < edges[c + 1])
    text.append(f"\n{' ' * column}^ step {graph.peak_step}: {size(graph.peak)}", style="")
    return text


def measured_curve(graph: Graph, measured: Measurement, width: int = 72) -> Text:
    """The measured bytes over the same steps and on the same scale as `curve`; dots where no step was seen."""
    width = min(width, len(graph.steps))
    edges = [k * len(graph.steps) // width for k in range(width + 1)]
    top = max((graph.peak, *(v for v in measured.timeline if v is not None)))
    text = Text(f"Measured on {clean(measured.device)}, step by step\n", style="bold")
    for a, b in itertools.pairwise(edges):
        seen = [v for v in measured.timeline[a:b] if v is not None]
        text.append(_SPARK[min(7, max(seen) * 8 // (top + 1))] if seen else "·", style="yellow")
    off = farthest(graph.allocated, measured.timeline)
    return text.append(f"\nthe step that is farthest from its plan: {signed(off)}", style="")


def graph_table(report: Report) -> RenderableType:
    """One row per compiled graph; those that the step does not run (compiled again for other sizes), or runs more than
    once (layers of one class share a graph), say so."""
    times = Counter(map(once, dict.fromkeys(s.graph for s in report.step.steps)))
    table = _table(
        "graph", "phase", "steps", "buffers", "in place", "pools", "peak", justify=dict.fromkeys(range(2, 7), "right")
    )
    for g in (*report.graphs, *([report.whole] if report.whole is not None else [])):
        in_place = sum(b.placement == "in_place" for b in g.buffers)
        counts = [str(n) for n in (len(g.steps), len(g.buffers), in_place, len(g.pools))]
        apart = ""
        if g.steps and g.phase != "step" and times[g.name] != 1:
            apart = f" ({times[g.name]} times)" if times[g.name] else " (another compilation)"
        table.add_row(clean(g.name), PHASES[g.phase] + apart, *counts, size(g.peak))
    return table


def arena_table(report: Report) -> RenderableType:
    """Communication memory: in no peak, there from call to call, shared by the graphs of one group and device."""
    table = _table(
        "graph",
        "arena",
        "memory",
        "group",
        "device",
        "buffers",
        "bytes",
        "apart",
        justify=dict.fromkeys((5, 6, 7), "right"),
    )
    table.title = Text("Communication memory, beside the peak; graphs of one group share it", style="bold")
    for g in report.graphs:
        for a in g.arenas:
            counts = (str(len(a.buffers)), size(a.nbytes), size(a.apart))
            table.add_row(clean(g.name), clean(a.name), a.memory, clean(a.group), a.device, *counts)
    return table


def certificates(report: Report) -> list[Text]:
    """How near each plan is to the proven bounds, one line a graph."""
    lines = []
    for g in report.graphs:
        c = g.certificate
        if c is None:
            continue
        text = Text.assemble((f"{clean(g.name)}: ", "bold"))
        text.append(f"live peak {size(c.peak)}; no order of this program needs less than {size(c.order_bound)}")
        gap = c.peak - c.order_bound
        text.append(" (optimal)" if gap <= 0 else f" (gap {percent(gap, c.peak)})", style="dim")
        text.append(f"; in program order {size(c.program_peak)}")
        if c.note:
            text.append(f"; {clean(c.note)}")
        lines.append(text)
    return lines


def _table(*columns: str, justify: dict[int, str] | None = None, fixed: tuple[int, ...] = ()) -> Table:
    """A table without lines; numbers (and ``fixed`` columns) keep their width, the others give way."""
    table = Table(box=None, pad_edge=False, title_justify="left", header_style="dim", collapse_padding=True)
    for k, title in enumerate(columns):
        right = (justify or {}).get(k) == "right"
        table.add_column(title, justify="right" if right else "left", no_wrap=right or k in fixed)
    return table
