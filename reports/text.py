"""Text that is safe to show: sizes for people, names without control characters, places in the user's code.

A name in a report may come from anybody. Nothing of it reaches a terminal, a page or a table but through `clean`.
"""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from pathlib import PurePath

from .model import Buffer, Graph, Origin, Step

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def clean(text: str, limit: int = 200) -> str:
    """The text on one line, what is not printable written as escapes, cut to ``limit`` characters.

    Not printable are controls, bidirectional and zero-width characters, separators of lines, surrogates.
    """
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else _escape(c) for c in shown)
    return shown if len(text) <= limit else shown + "…"


def _escape(character: str) -> str:
    if unicodedata.category(character) == "Zs":
        return " "
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def size(nbytes: int) -> str:
    """Bytes with a binary unit and at least three digits: ``1.50 GiB``."""
    value, unit = float(abs(nbytes)), 0
    while value >= 1023.995 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    sign = "-" if nbytes < 0 else ""
    if unit == 0:
        return f"{nbytes} B"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{sign}{value:.{digits}f} {_UNITS[unit]}"


def signed(nbytes: int) -> str:
    """As `size`, with a plus sign where it grows."""
    return f"+{size(nbytes)}" if nbytes > 0 else size(nbytes)


def percent(part: int, whole: int) -> str:
    """``part`` of ``whole`` as a percentage, one digit behind the point; a dash where there is no whole."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def shape(buffer: Buffer) -> str:
    """``float32[8, 128]``; without a known shape ``float32``."""
    if buffer.shape is None:
        return clean(buffer.dtype)
    return f"{clean(buffer.dtype)}[{', '.join(str(s) for s in buffer.shape)}]"


def path(file: str) -> str:
    """A file's path for people: relative to the working folder if below it, else its last three parts."""
    return _path(file, os.getcwd().rstrip("/") + "/")


@lru_cache(maxsize=4096)
def _path(file: str, here: str) -> str:
    if not file:
        return ""
    if file.startswith(here):
        return clean(file[len(here) :])
    parts = PurePath(file).parts
    return clean(file if len(parts) <= 4 else "…/" + "/".join(parts[-3:]))


def line(origin: Origin) -> str:
    """``file:line`` of the user's code, or an empty string."""
    return f"{path(origin.file)}:{origin.line}" if origin.file else ""


def whereabouts(origin: Origin) -> str:
    """The best known place: the user's line, else the module, else the FX node, else a dash."""
    return line(origin) or clean(origin.module) or clean(origin.node) or "-"


def code(origin: Origin) -> str:
    """The user's source text, stripped."""
    return clean(origin.code.strip(), 100)


def step_title(step: Step) -> str:
    """What runs at a step: operation name and target."""
    return f"{clean(step.name)} ({clean(step.target)})"


def line_of(step: Step) -> str:
    """The user's line that a step stems from, first of all that it does; or an empty string."""
    return next((line(o) for o in step.origins if o.file), "")


def reached(graph: Graph) -> str:
    """At which step a graph's peak is, what runs there, and the user's line of it."""
    step = graph.steps[graph.peak_step]
    place = line_of(step)
    where = f"reached at step {graph.peak_step} of {len(graph.steps)}, {clean(step.graph)}: {step_title(step)}"
    return f"{where}, {place}" if place else where


def short(name: str) -> str:
    """An FX operator's name without its namespace and ``default`` overload."""
    return clean(name.removeprefix("aten.").removesuffix(".default"))
