"""``memplan.report(...)``: a report that shows itself, in a terminal, in a notebook, and where no script runs."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from rich.console import Console, ConsoleOptions, RenderResult

from ..ir.plan import Plan
from . import tables, terminal
from .model import Report, dump_report, read_report, write_report
from .page import html
from .payload import pair, payload
from .picture import picture
from .target import CompiledGraph, report_from


@runtime_checkable
class Recorded(Protocol):
    """What ``memplan.record()`` gives: it has the compiled graphs."""

    @property
    def graphs(self) -> Iterable[CompiledGraph]: ...


@dataclass(frozen=True)
class Still:
    """The picture of a report, or of two, alone."""

    report: Report
    other: Report | None = None

    def _repr_png_(self) -> bytes:
        return picture(self.report, other=self.other)


@dataclass(frozen=True)
class ShownReport:
    """A `Report` with a face.

    ``print`` and a REPL show the summary; rich renders it; notebooks get the interactive view (with anywidget) and a
    still picture beside it, which stays when the notebook is read where no script runs.
    """

    report: Report
    other: Report | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield terminal.summary(self.report)

    def __repr__(self) -> str:
        return terminal.rendered(terminal.summary(self.report)).rstrip()

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None
    ) -> tuple[dict[str, object], dict[str, object]]:
        bundle: dict[str, object] = {
            "image/png": base64.b64encode(picture(self.report, other=self.other)).decode(),
            "text/plain": repr(self),
        }
        if importlib.util.find_spec("anywidget") is None:
            return bundle, {}
        view, metadata = widget_bundle(self.widget())
        return bundle | view, metadata

    def _display_(self) -> object:
        """What marimo shows: the view (with anywidget), else the picture."""
        return self.widget() if importlib.util.find_spec("anywidget") is not None else Still(self.report, self.other)

    def widget(self) -> object:
        """The interactive view as an anywidget.

        Raises
        ------
        ImportError
            Without anywidget (``pip install 'memplan[notebook]'``).
        """
        from .widget import view

        shown = [payload(self.report, self.report.step)] if self.other is None else pair(self.report, self.other)
        return view(shown)

    def save(self, path: Path | str) -> None:
        """Write the report: ``.json`` to be read again, ``.html``, ``.png`` or ``.md`` to be looked at."""
        path = Path(path)
        match path.suffix:
            case ".html":
                path.write_text(html(self.report, other=self.other), encoding="utf-8")
            case ".png":
                path.write_bytes(picture(self.report, other=self.other))
            case ".md":
                path.write_text(tables.markdown(self.report), encoding="utf-8")
            case ".json":
                write_report(self.report, path)
            case other:
                raise ValueError(
                    f"cannot write a report as {other or 'a file without suffix'!r}; use .json, .html, .png, .md"
                )

    def json(self) -> str:
        """The report as JSON text."""
        return dump_report(self.report)


def widget_bundle(widget: object) -> tuple[dict[str, object], dict[str, object]]:
    """What a widget says of itself to a notebook, and the metadata without which Colab does not find its module."""
    made = widget._repr_mimebundle_()  # type: ignore[attr-defined]
    found, metadata = made if isinstance(made, tuple) else (made, {})
    return {k: v for k, v in (found or {}).items() if k.startswith("application/")}, metadata


Source = Report | ShownReport | Recorded | CompiledGraph | Plan | Path | str


def report(source: Source | Iterable[CompiledGraph | Plan], other: Source | None = None) -> ShownReport:
    """The report of a recording, of plans, or of a saved file; with ``other``, both side by side.

    Examples
    --------
    >>> import memplan
    >>> with memplan.record() as recording:  # doctest: +SKIP
    ...     compiled(inputs)
    >>> memplan.report(recording)  # doctest: +SKIP

    Raises
    ------
    ReportError
        If a saved report cannot be read.
    TargetError
        If nothing was compiled in a recording.
    """
    return ShownReport(_report(source), None if other is None else _report(other))


def _report(source: Source | Iterable[CompiledGraph | Plan]) -> Report:
    match source:
        case Report():
            return source
        case ShownReport():
            return source.report
        case str() | Path():
            return read_report(source)
        case Plan() | CompiledGraph():
            return report_from([source])
        case Recorded():
            return report_from(source.graphs)
        case _:
            return report_from(source)
