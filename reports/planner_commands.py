"""The planner's commands: ``memplan pack`` for offsets, ``memplan order`` for orders of operations.

Exit codes: 0 well; 1 the buffers do not fit the capacity; 2 a malformed file or wrong usage.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..ir.errors import MemplanError, PlanningError
from . import terminal
from .command_options import writable
from .planner_files import BufferTable, read_buffers, read_json, write_buffers, write_json
from .text import clean

if TYPE_CHECKING:
    from .. import planner

EXIT_DOES_NOT_FIT = 1
EXIT_MALFORMED = 2


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("pack", epilog="Example: memplan pack buffers.csv --capacity 1048576 -o offsets.csv")(pack)
    app.command("order", epilog="Example: memplan order graph.json.gz --optimizer -o order.json")(order)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except MemplanError as error:
        typer.echo(f"error: {_clean(str(error))}", err=True)
        raise typer.Exit(EXIT_MALFORMED) from error


def _clean(text: str) -> str:
    """A message whose file names cannot command the terminal."""
    return "\n".join(clean(line, 2000) for line in text.splitlines())


def _positive(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise typer.BadParameter("must be a number of seconds above zero")
    return value


def _print(table: dict[str, int | float | bool], as_json: bool, lines: list[str]) -> None:
    terminal.write((json.dumps(table) if as_json else "\n".join(lines)) + "\n")


def _refuse_the_input(source: Path, output: Path | None) -> None:
    """A result over its own input would lose what it was made from, and a second run would find no input."""
    if output is not None and output.exists() and source.exists() and output.samefile(source):
        raise typer.BadParameter(f"{str(output)!r} is the input; name another file", param_hint="'-o' / '--output'")


def _too_large(table: BufferTable, path: Path, capacity: int) -> str | None:
    """Names the first buffer that no packing fits into the capacity."""
    for index, (_, _, size) in enumerate(table.buffers):
        if size > capacity:
            where = f"{path}, line {table.lines[index]}"
            return f"{where}: buffer {table.name(index)[:60]!r} of {size} bytes is larger than the capacity {capacity}"
    return None


TimeLimit = Annotated[float, typer.Option("--time-limit", metavar="S", help="Seconds.", callback=_positive)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def pack(
    source: Annotated[Path, typer.Argument(metavar="IN.csv", help="id,lower,upper,size; lifetimes are half-open.")],
    capacity: Annotated[
        int | None, typer.Option("--capacity", metavar="BYTES", min=0, help="Stop when the buffers fit into this.")
    ] = None,
    align: Annotated[int, typer.Option("--align", metavar="BYTES", min=1, help="Offsets are multiples of it.")] = 1,
    time_limit: TimeLimit = 15.0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT.csv", help="The same columns and offset.", callback=writable),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give buffers with fixed lifetimes offsets in one arena, as small as can be found or proved."""
    from .. import planner  # half of the time that every command would take to start

    _refuse_the_input(source, output)
    started = time.monotonic()
    with _errors():
        table = read_buffers(source)
        packing = planner.pack(table.buffers, capacity=capacity, align=align, time_limit=time_limit)
        fits = capacity is None or packing.arena <= capacity
        if output is not None and fits:
            write_buffers(output, table, packing.offsets)
    seconds = time.monotonic() - started
    result: dict[str, int | float | bool] = {
        "buffers": len(table.buffers),
        "peak": packing.arena,
        "max_live": packing.max_live,
        "gap": packing.gap,
        "optimal": packing.optimal,
        "fits": fits,
        "seconds": round(seconds, 3),
    }
    proof = (
        "proved optimal" if packing.optimal else f"at most {_over(packing.arena, packing.lower_bound)} above the least"
    )
    lines = [
        f"{len(table.buffers):,} buffers in {packing.arena:,} bytes; most alive at once {packing.max_live:,} ({proof})",
        f"{seconds:.2f} s",
    ]
    _print(result, as_json, lines)
    if packing.note:
        typer.echo(f"note: {packing.note}", err=True)
    if not fits and capacity is not None:
        typer.echo(f"error: {_clean(_why_not(table, source, capacity, packing))}", err=True)
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _over(value: int, bound: int) -> str:
    return f"{(value / bound - 1) * 100:.3f} %" if bound else "0 %"


def _why_not(table: BufferTable, path: Path, capacity: int, packing: planner.Packing) -> str:
    too_large = _too_large(table, path, capacity)
    if too_large is not None:
        return too_large
    if packing.lower_bound > capacity:
        return f"{path}: nothing fits into {capacity} bytes; at least {packing.lower_bound} are needed"
    return f"{path}: found {packing.arena} bytes within the time, not {capacity}; nothing written"


class Inputs(StrEnum):
    """How the inputs of a graph file count: `memplan.planner.Inputs`."""

    outside = "outside"
    die = "die"
    stay = "stay"


def order(
    source: Annotated[Path, typer.Argument(metavar="GRAPH.json.gz", help="n, edges, bufs; gzipped or not.")],
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Append an update that consumes each output of more than 4 bytes.")
    ] = False,
    inputs: Annotated[
        Inputs,
        typer.Option(help="Inputs are outside the count, die after their last use, or stay to the end."),
    ] = Inputs.outside,
    time_limit: TimeLimit = 5.0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="ORDER.json", help="A list of operation indices.", callback=writable),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put the operations of a graph in an order with a small peak of live bytes, and say how far from the least."""
    from .. import planner

    _refuse_the_input(source, output)
    started = time.monotonic()
    with _errors():
        data = read_json(source)
        try:
            graph = planner.graph_from_data(data, optimizer=optimizer, inputs=planner.Inputs(inputs.value))
            result = planner.order(graph, time_limit=time_limit)
        except PlanningError as error:
            raise PlanningError(f"{source}: {error}") from error
        if output is not None:
            write_json(output, list(result.order))
    seconds = time.monotonic() - started
    table: dict[str, int | float | bool] = {
        "ops": graph.ops,
        "peak": result.peak,
        "program_peak": result.program_peak,
        "lower_bound": result.lower_bound,
        "gap": result.gap,
        "seconds": round(seconds, 3),
    }
    proof = "proved optimal" if result.optimal else f"at most {_over(result.peak, result.lower_bound)} above the least"
    lines = [
        f"{graph.ops:,} operations, peak {result.peak:,} bytes ({proof})",
        f"program order {result.program_peak:,} bytes, {_over(result.program_peak, result.peak)} above it",
        f"{seconds:.2f} s",
    ]
    _print(table, as_json, lines)
    if result.note:
        typer.echo(f"note: {result.note}", err=True)
