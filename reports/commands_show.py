"""Commands that show: report, peak, buffers, waterfall, export, schema."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..ir.errors import OptionError
from . import command_options as given
from . import tables, terminal
from .activations import table as activation_table
from .model import Report, dump_report, schema, write_report
from .query import selected
from .target import Request, make
from .text import size
from .working import planned, working


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("report", epilog="Example: memplan report train.py:make --group-by module -o before.json")(report)
    app.command("peak", epilog="Example: memplan peak before.json --top 5")(peak)
    app.command("buffers", epilog="Example: memplan buffers before.json --where 'size>1MiB' --where kind=saved")(
        buffers
    )
    app.command("activations", epilog="Example: memplan activations train.py:make --top 30")(activations)
    app.command("waterfall", epilog="Example: memplan waterfall train.py:make")(waterfall)
    app.command("export", epilog="Example: memplan export train.py:make --to html -o step.html")(export)
    app.command("schema", epilog="Example: memplan schema > memplan-report.schema.json")(print_schema)


def report(
    target: given.Target,
    output: given.Output = None,
    fake: given.Fake = True,
    measure: Annotated[bool, typer.Option("--measure", help="Run one step as well, and measure its peak.")] = False,
    backward: given.Backward = None,
    dynamic: given.Dynamic = False,
    option: given.Options = None,
    group_by: Annotated[given.By, typer.Option("--group-by", help="Group what is alive at the peak.")] = given.By.line,
    top: given.Top = 8,
    format: Annotated[given.Format, typer.Option("--format", help="How to print.")] = given.Format.rich,
) -> None:
    """Where the memory of a step goes: its peak, the lines of your code that hold it, and how near the bound it is."""
    request = given.request(fake and not measure, backward, dynamic, option)
    found = measured_report(target, request) if measure else planned(target, request)
    if output is not None:
        write_report(found, output)
    match format:
        case given.Format.rich:
            terminal.console().print(terminal.summary(found, by=group_by.value, top=top))
        case given.Format.json:
            terminal.write(dump_report(found))
        case given.Format.md:
            terminal.write(tables.markdown(found, by=group_by.value, top=top))
        case given.Format.csv:
            terminal.write(tables.groups_csv(found, group_by.value))


def measured_report(target: str, request: Request) -> Report:
    """Compile, run one step, and report plan and measurement."""
    from .measure import STAGES, measured
    from .target import is_saved

    if is_saved(target):
        raise OptionError(f"{target!r} is a saved report: only a MODULE:FACTORY can be run and measured")
    with working(f"compiling {target}", parts=STAGES) as begin:
        return measured(make(target, request.batch), request, target, begin)


def peak(
    target: given.Target,
    at: Annotated[int | None, typer.Option("--at", help="Another step than the peak.", min=0)] = None,
    top: given.Top = 20,
    graph: given.GraphName = "step",
    backward: given.Backward = None,
    option: given.Options = None,
) -> None:
    """Every buffer alive at the peak, largest first, with the line of your code that made it."""
    chosen = planned(target, given.request(backward=backward, options=option)).graph(graph)
    if at is not None and at >= len(chosen.steps):
        raise OptionError(f"no step {at}; steps are 0 to {len(chosen.steps) - 1}")
    terminal.console().print(terminal.peak(chosen, step=at, top=top))


def buffers(
    target: given.Target,
    sort: Annotated[given.Sort, typer.Option("--sort", help="Order of the rows.")] = given.Sort.size,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="CONDITION", help="size>1MiB, kind=saved, module~layers.0; all must hold."),
    ] = None,
    live_at: Annotated[int | None, typer.Option("--live-at", help="Only what is alive at this step.", min=0)] = None,
    top: given.Top = 40,
    graph: given.GraphName = "step",
    format: Annotated[given.Format, typer.Option("--format", help="How to print.")] = given.Format.rich,
    backward: given.Backward = None,
    option: given.Options = None,
) -> None:
    """The buffers of a step: size, life, place, what made them, and your line."""
    chosen = planned(target, given.request(backward=backward, options=option)).graph(graph)
    rows = selected(chosen, where=where or (), live_at=live_at, sort=sort.value)
    match format:
        case given.Format.rich:
            terminal.console().print(terminal.buffers(chosen, rows, top=top))
        case given.Format.json:
            terminal.write(json.dumps([b.model_dump() for b in rows[:top]]) + "\n")
        case given.Format.md:
            terminal.write(tables.buffers_markdown(rows[:top]))
        case given.Format.csv:
            terminal.write(tables.buffers_csv(rows[:top]))


def activations(
    target: given.Target, top: given.Top = 40, backward: given.Backward = None, option: given.Options = None
) -> None:
    """What the backward needs of the forward: saved, narrowed, made in slices, or recomputed, by your lines."""
    found = planned(target, given.request(backward=backward, options=option))
    out = terminal.console()
    if not found.activations:
        out.print("This report knows of no activations: nothing in it has a backward.")
        return
    out.print(activation_table(found, top))


def waterfall(target: given.Target, backward: given.Backward = None, option: given.Options = None) -> None:
    """What each stage of the compiler does to the peak, from eager on."""
    found = planned(target, given.request(backward=backward, options=option))
    stages = terminal.waterfalls(found)
    out = terminal.console()
    if not stages:
        out.print("This report has no waterfall: its plan was made without recording the passes.")
    for title, rows in stages:
        out.print(terminal.waterfall(rows, title))


class To(StrEnum):
    """Formats of `memplan export`."""

    memviz = "memviz"
    perfetto = "perfetto"
    html = "html"
    png = "png"
    md = "md"
    dot = "dot"
    json = "json"


SUFFIX = {"memviz": ".pickle", "perfetto": ".perfetto.json"}


def export(
    target: given.Target,
    to: Annotated[To, typer.Option("--to", help="Format.")],
    output: given.OutputFile = None,
    graph: given.GraphName = "step",
    backward: given.Backward = None,
    option: given.Options = None,
) -> None:
    """Write the step for another tool: torch's MemoryViz, Perfetto, a browser, a picture, a pull request, Graphviz."""
    from .export import exported

    found = planned(target, given.request(backward=backward, options=option))
    data = exported(found, found.graph(graph), to.value)
    path = output or Path(f"memplan{SUFFIX.get(to.value, '.' + to.value)}")
    if str(path) == "-":
        if to in (To.memviz, To.png):
            raise OptionError(f"{to.value} is not text: give a file with -o")
        terminal.write(data.decode())
        return
    path.write_bytes(data)
    terminal.write(f"{path}: {size(len(data))}\n")


def print_schema() -> None:
    """The JSON schema of saved reports."""
    terminal.write(json.dumps(schema(), indent=2, sort_keys=True) + "\n")
