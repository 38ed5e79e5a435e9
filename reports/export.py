"""One table of export formats."""

from __future__ import annotations

from collections.abc import Callable

from . import dot, memviz, page, perfetto, picture, tables
from .model import Graph, Report, dump_report

EXPORTS: dict[str, Callable[[Report, Graph], bytes]] = {
    "memviz": lambda report, graph: memviz.snapshot(graph),
    "perfetto": lambda report, graph: perfetto.trace(graph),
    "png": lambda report, graph: picture.picture(report, graph),
    "dot": lambda report, graph: dot.dot(graph),
    "md": lambda report, graph: tables.markdown(report).encode(),
    "html": lambda report, graph: page.html(report, graph).encode(),
    "json": lambda report, graph: dump_report(report).encode(),
}


def exported(report: Report, graph: Graph, to: str) -> bytes:
    """A graph of a report in one of the formats of `EXPORTS`."""
    return EXPORTS[to](report, graph)
