"""Commands about the cache of traces, plans and built kernels: cache info, cache clear."""

from __future__ import annotations

from typing import Annotated

import typer

from . import terminal
from .text import size

#: What entries are, by the ending of their files' names.
KINDS = {
    ".plan": "plans and the code that runs them",
    ".trace": "traced graphs",
    ".so": "built libraries",
    ".json": "what compilers can do",
}

Directory = Annotated[
    str | None,
    typer.Option("--dir", help="Another directory than the one that compiling uses (MEMPLAN_CACHE_DIR sets that)."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Traces, plans and built kernels that are kept on disk.")
    group.command("info", epilog="Example: memplan cache info")(info)
    group.command("clear", epilog="Example: memplan cache clear")(clear)
    app.add_typer(group, name="cache")


def info(directory: Directory = None) -> None:
    """Where the cache is, and what is in it."""
    from ..cache_directory import cache_directory

    cache = cache_directory(directory)
    found = cache.info()
    terminal.write(f"{found.path}\n")
    for suffix, part in cache.kinds().items():
        terminal.write(f"{part.entries:6d}  {size(part.bytes):>10}  {KINDS.get(suffix, 'other')}\n")
    terminal.write(f"{found.entries:6d}  {size(found.bytes):>10}  in all\n")


def clear(directory: Directory = None) -> None:
    """Delete all of it. Processes that run keep what they have loaded."""
    from ..cache_directory import cache_directory

    found = cache_directory(directory).clear()
    terminal.write(f"{found.path}: {found.entries} entries, {size(found.bytes)} deleted\n")
