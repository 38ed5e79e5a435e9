"""Questions to a graph: what is alive, grouped by what, sorted how, and which buffers match."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..ir.config import parse_bytes
from ..ir.errors import OptionError
from .model import Buffer, Graph, Storage
from .text import line, short

GroupBy = Literal["line", "op", "module", "dtype", "kind", "device"]
SortBy = Literal["size", "birth", "death", "life", "name", "line", "offset"]
_TEXT_FIELDS: dict[str, Callable[[Buffer], str]] = {
    "name": lambda b: b.name,
    "kind": lambda b: b.kind,
    "dtype": lambda b: b.dtype,
    "device": lambda b: b.device,
    "placement": lambda b: b.placement,
    "pool": lambda b: b.pool or "",
    "module": lambda b: b.origin.module,
    "node": lambda b: b.origin.node,
    "op": lambda b: b.origin.op,
    "file": lambda b: b.origin.file,
    "code": lambda b: b.origin.code,
    "decided_by": lambda b: b.decided_by,
}
_NUMBER_FIELDS: dict[str, Callable[[Buffer], int]] = {
    "size": lambda b: b.nbytes,
    "birth": lambda b: b.birth,
    "death": lambda b: b.death,
    "life": lambda b: b.death - b.birth,
    "line": lambda b: b.origin.line,
    "offset": lambda b: -1 if b.offset is None else b.offset,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*([a-z_]+)\s*(>=|<=|!=|!~|=|~|>|<)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Bytes alive at the asked step that share a key."""

    key: str
    nbytes: int
    count: int
    largest: Buffer


def group_key(buffer: Buffer, by: GroupBy) -> str:
    """What a buffer is grouped under; text as it stands in the report for names, as people write it for places."""
    o = buffer.origin
    match by:
        case "line":
            return line(o) or (f"module {o.module}" if o.module else "") or f"node {o.node or buffer.name}"
        case "op":
            return short(o.op) or "?"
        case "module":
            return o.module or "(no module)"
        case "dtype":
            return buffer.dtype
        case "kind":
            return buffer.kind
        case "device":
            return buffer.device


def grouped(graph: Graph, storages: Iterable[Storage], step: int, by: GroupBy) -> list[GroupRow]:
    """Storages by key, most bytes first. A storage counts for the buffer that it holds at ``step``."""
    found: dict[str, list[tuple[int, Buffer]]] = {}
    for s in storages:
        b = graph.shown_at(s, step)
        found.setdefault(group_key(b, by), []).append((s.nbytes, b))
    rows = [
        GroupRow(key, sum(n for n, _ in items), len(items), max(items, key=lambda i: (i[0], i[1].name))[1])
        for key, items in found.items()
    ]
    return sorted(rows, key=lambda r: (-r.nbytes, r.key))


def room(graph: Graph, step: int) -> int:
    """Bytes allocated but not live at a step: rounding, and room in pools (0 if there is no such step)."""
    return graph.allocated[step] - graph.live[step] if step < len(graph.steps) else 0


def selected(
    graph: Graph, *, where: Sequence[str] = (), live_at: int | None = None, sort: SortBy = "size"
) -> list[Buffer]:
    """Buffers that meet every condition, sorted (sizes and lives from large to small, the rest ascending).

    ``where`` items read ``field operator value``: ``size>1MiB``, ``module~layers.0``, ``kind=saved``; ``~`` is a
    case-insensitive part of the text.

    Raises
    ------
    OptionError
        For a condition that cannot be read, or a step that is not there.
    """
    if live_at is not None and not 0 <= live_at < max(1, len(graph.steps)):
        raise OptionError(f"no step {live_at}; steps are 0 to {len(graph.steps) - 1}")
    tests = [condition(w) for w in where]
    found = [
        b for b in graph.buffers if (live_at is None or b.birth <= live_at < b.death) and all(test(b) for test in tests)
    ]
    orders: dict[SortBy, Callable[[Buffer], tuple[object, ...]]] = {
        "size": lambda b: (-b.nbytes, b.birth, b.name),
        "birth": lambda b: (b.birth, -b.nbytes, b.name),
        "death": lambda b: (b.death, -b.nbytes, b.name),
        "life": lambda b: (b.birth - b.death, -b.nbytes, b.name),
        "name": lambda b: (b.name,),
        "line": lambda b: (b.origin.file, b.origin.line, -b.nbytes, b.name),
        "offset": lambda b: (b.pool or "~", b.offset or 0, b.birth, b.name),
    }
    return sorted(found, key=orders[sort])


def condition(text: str) -> Callable[[Buffer], bool]:
    """One ``field operator value`` as a test."""
    match = _CONDITION.fullmatch(text)
    fields = [*_TEXT_FIELDS, *_NUMBER_FIELDS]
    if match is None:
        raise OptionError(f"cannot read the condition {text!r}; write for example 'size>1MiB' or 'module~layers.0'")
    name, sign, value = match.groups()
    if name in _TEXT_FIELDS:
        return _text_test(_TEXT_FIELDS[name], sign, value, text)
    if name in _NUMBER_FIELDS and sign in _COMPARE:
        get, compare = _NUMBER_FIELDS[name], _COMPARE[sign]
        number = 0 if value == "0" else parse_bytes(value) if name in ("size", "offset") else _integer(value, text)
        return lambda b: compare(get(b), number)
    if name in _NUMBER_FIELDS:
        raise OptionError(f"{name} is a number: {sign!r} does not go with it in {text!r}")
    near = difflib.get_close_matches(name, fields, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise OptionError(f"no field {name!r}{hint}; fields are {', '.join(fields)}")


def _text_test(get: Callable[[Buffer], str], sign: str, value: str, text: str) -> Callable[[Buffer], bool]:
    part = value.casefold()
    match sign:
        case "=":
            return lambda b: get(b) == value
        case "!=":
            return lambda b: get(b) != value
        case "~":
            return lambda b: part in get(b).casefold()
        case "!~":
            return lambda b: part not in get(b).casefold()
        case _:
            raise OptionError(f"{sign!r} does not go with text in {text!r}; use =, !=, ~ (contains) or !~")


def _integer(value: str, text: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise OptionError(f"{value!r} is not a whole number in {text!r}") from None


def group_names() -> tuple[str, ...]:
    """What one can group by."""
    return get_args(GroupBy)
