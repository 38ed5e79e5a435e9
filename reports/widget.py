"""The canvas module as a notebook widget (anywidget: Jupyter, VS Code, Colab, marimo). Needs the extra ``notebook``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import anywidget
import traitlets

from .page import module_source
from .payload import Payload


class MemoryView(anywidget.AnyWidget):
    """One graph, or two side by side; ``data`` holds their columns, ``headers`` says where each begins."""

    _esm = module_source()
    headers = traitlets.Unicode("[]").tag(sync=True)
    data = traitlets.Bytes(b"").tag(sync=True)


def view(payloads: Sequence[Payload]) -> MemoryView:
    """A widget that draws these graphs."""
    headers, data = [], b""
    for p in payloads:
        # a block starts at a multiple of eight, so that its columns stay aligned
        data += b"\0" * (-len(data) % 8)
        headers.append({**p.header, "range": (len(data), len(data) + len(p.data))})
        data += p.data
    return MemoryView(headers=json.dumps(headers), data=data)
