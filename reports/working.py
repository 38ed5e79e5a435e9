"""A progress bar on standard error for what takes long; nothing where that is not a terminal."""

from __future__ import annotations

import atexit
import gc
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
    with working(f"planning {target}"), _few_collections():
        return report_for(target, request)


@contextmanager
def _few_collections() -> Iterator[None]:
    """The garbage collector looks for cycles seldom: what imports, tracing and planning make is kept to the end.

    With Python's own thresholds a fifth of the time of ``memplan report`` on a GPT-2 of 12 layers went to collections
    that found nothing. Nothing runs here whose memory is measured. The collection when Python ends is spared too.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        atexit.unregister(gc.freeze)  # once is enough
        atexit.register(gc.freeze)
