"""memplan: a graph-level memory optimiser for PyTorch.

Names are imported when they are first used: ``memplan --help`` and reading a saved report need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .analysis import analyze as analyze
    from .communicating import calibrate_communication as calibrate_communication
    from .loading import load as load
    from .planner import order as order
    from .planner import pack as pack
    from .recording import record as record
    from .reports.shown import report as report
    from .saving import save as save

_PUBLIC = {
    "analyze": ".analysis",
    "calibrate_communication": ".communicating",
    "load": ".loading",
    "order": ".planner",
    "pack": ".planner",
    "record": ".recording",
    "report": ".reports.shown",
    "save": ".saving",
}


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)
