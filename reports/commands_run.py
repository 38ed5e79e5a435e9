"""Commands about a run and about the machine: run, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from . import command_options as given
from . import terminal
from .model import write_report
from .text import clean


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(
        "run",
        epilog="Example: memplan run -o step.json train.py --epochs 1",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    )(run)
    app.command("doctor", epilog="Example: memplan doctor")(doctor)


def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="The script; what follows it is passed on.", show_default=False)],
    output: given.Output = None,
    backend_override: Annotated[
        bool, typer.Option("--backend-override", help="Send every torch.compile in it to memplan.")
    ] = False,
    group_by: Annotated[given.By, typer.Option("--group-by", help="Group what is alive at the peak.")] = given.By.line,
) -> None:
    """Run a script and report all that it compiles with this backend."""
    from .run_script import run_script
    from .target import TargetError

    report, failure = run_script(script, context.args, override=backend_override)
    if report is not None:
        if output is not None:
            write_report(report, output)
        terminal.console().print(terminal.summary(report, by=group_by.value))
    if failure:
        raise TargetError(failure)


def doctor() -> None:
    """What works on this machine, and what to do about what does not."""
    from .doctor import findings

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    colours = {"ok": "green", "note": "yellow", "BAD": "bold red"}
    found = findings()
    for f in found:
        text = Text(clean(f.detail, 400), overflow="fold")
        if f.remedy:
            text.append(f"\n-> {clean(f.remedy, 400)}", style="cyan")
        table.add_row(Text(f.state, style=colours[f.state]), f.title, text)
    terminal.console().print(table)
    if any(f.state == "BAD" for f in found):
        raise typer.Exit(1)
