"""Arguments that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..ir.errors import OptionError
from .target import Request

TARGET_HELP = "A saved report (FILE.json), or MODULE:FACTORY (also FILE.py:FACTORY) returning (model, example_inputs)."

Target = Annotated[str, typer.Argument(help=TARGET_HELP, metavar="TARGET", show_default=False)]
Fake = Annotated[bool, typer.Option("--fake/--real", help="Trace with fake tensors: nothing is computed or allocated.")]
Backward = Annotated[
    bool | None,
    typer.Option(
        "--backward/--no-backward",
        help="Plan the training step. By default if the model is in training mode and has parameters to train.",
        show_default=False,
    ),
]
Dynamic = Annotated[bool, typer.Option("--dynamic", help="Let sizes be symbols.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", metavar="NAME=VALUE", help="An option of the backend, e.g. disable=inplace."),
]


def writable(path: Path | None) -> Path | None:
    """Refuses, before the work is done, a file that cannot be written when it is."""
    if path is None or str(path) == "-":
        return path
    if path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"{str(path)!r} may not be written")
    return path


Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Save the report as JSON here, too.", callback=writable)
]
OutputFile = Annotated[
    Path | None, typer.Option("-o", "--output", help="File to write; '-' for standard output.", callback=writable)
]
OutputPage = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Also both charts side by side, as an HTML page.", callback=writable),
]
Top = Annotated[int, typer.Option(help="How many rows.", min=1, max=100_000)]
GraphName = Annotated[str, typer.Option("--graph", help="Which graph; 'step' is all of them on one timeline.")]


class By(StrEnum):
    """What to group by."""

    line = "line"
    op = "op"
    module = "module"
    dtype = "dtype"
    kind = "kind"
    device = "device"


class Sort(StrEnum):
    """What to sort by."""

    size = "size"
    birth = "birth"
    death = "death"
    life = "life"
    name = "name"
    line = "line"
    offset = "offset"


class Format(StrEnum):
    """How to print."""

    rich = "rich"
    json = "json"
    md = "md"
    csv = "csv"


def request(
    fake: bool = True,
    backward: bool | None = None,
    dynamic: bool = False,
    options: Sequence[str] | None = None,
    batch: int | None = None,
) -> Request:
    """What the shared arguments ask for."""
    return Request(fake=fake, backward=backward, dynamic=dynamic, batch=batch, options=parse_options(options or ()))


def parse_options(items: Sequence[str]) -> dict[str, object]:
    """``name=value`` items; true, false, none and numbers are read as such, ``disable`` as a comma-separated list.

    Raises
    ------
    OptionError
        If an item has no ``=``.
    """
    found: dict[str, object] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise OptionError(f"option {item!r} does not read NAME=VALUE")
        name = name.strip()
        found[name] = [t for t in text.split(",") if t] if name == "disable" else _value(text.strip())
    return found


def _value(text: str) -> object:
    match text.lower():
        case "true":
            return True
        case "false":
            return False
        case "none":
            return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
