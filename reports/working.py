"""A progress bar on standard error for what takes long; nothing where that is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from .model import Report
from .target import Request, is_saved, report_for
from .text import clean

#: Told what each part is when it begins.
Begin = Callable[[str], None]


@contextmanager
def working(what: str, parts: int | None = None) -> Iterator[Begin]:
    """A bar that fills with ``parts``, or moves to and fro where their number is not known; what the compiler is at
    stands beside it."""
    err = Console(stderr=True)
    if not err.is_terminal:
        yield lambda text: None
        return
    from ..progress import listening

    count: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),) if parts is not None else ()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), *count, TimeElapsedColumn())
    detail = TextColumn("{task.fields[detail]}", markup=False, style="dim")
    with Progress(*columns, detail, console=err, transient=True) as progress:
        task = progress.add_task(clean(what), total=parts, detail="")

        begun = 0

        def begin(part: str) -> None:
            nonlocal begun
            progress.update(task, description=clean(part), completed=begun, detail="")
            begun += 1

        with listening(lambda now: progress.update(task, detail=clean(now))):
            yield begin


def planned(target: str, request: Request) -> Report:
    """`report_for`, with a bar while it plans."""
    if is_saved(target):
        return report_for(target, request)
    with working(f"planning {target}"):
        return report_for(target, request)
