"""What Python runs of a C++ wrapper: operators without a C function, callables, sizes that a call makes known.

Such a line is a Python function of its own, printed by the Python printer and called through the host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import sympy

from ..ir.errors import UnsupportedError
from ..ir.program import Contract, Extern
from .cpp_frame import Frame, PythonLine, identifier
from .python_wrapper import python_line
from .wrapper_lines import CallExtern


def through_python(frame: Frame, line: CallExtern, op: Extern, into: Mapping[int, str] | None = None) -> None:
    """The whole call as a Python function; its fresh results go to ``into`` or to their buffers."""
    printed = python_line(frame.program, line)
    frame.operators.update(printed.operators)
    mutated = set(op.mutates)
    results = {}
    if op.contract is not Contract.OUT:
        results = {k: v.buffer for k, v in enumerate(op.results) if v is not None and v.buffer not in mutated}
    for _, symbol in op.symbols:
        if not symbol.is_integer:
            raise UnsupportedError(f"the C++ wrapper cannot hold the number {symbol} of {op.target}")
        frame.symbols.setdefault(symbol, f"s.{identifier(str(symbol))}")
    made = {b: (into[k] if into is not None else frame.member(b)) for k, b in results.items()}
    python_body(frame, printed.source, made, tuple(s for _, s in op.symbols), tuple(op.mutates))
    if into is None:
        frame.tensors.update(made)


def python_body(
    frame: Frame, body: str, made: Mapping[str, str], known: tuple[sympy.Symbol, ...], mutated: tuple[str, ...]
) -> None:
    """Call a body whose free names are buffers, symbols and opaque inputs."""
    words = set(re.findall(r"\b\w+\b", body))
    buffers = [b for b in frame.program.base if b in words and b not in made and b not in frame.constants]
    for b in buffers:
        frame.need_tensor(b)
    symbols = [(str(s), text) for s, text in frame.symbols.items() if str(s) in words and s not in known]
    objects = [(f"opaque_{n}", k) for n, k in frame.objects.items() if f"opaque_{n}" in words]
    names = [*buffers, *(n for n, _ in symbols), *(n for n, _ in objects)]
    results = [*made, *(str(s) for s in known)]
    if results:
        body += f"    return ({', '.join(results)},)\n"
    call_python(
        frame,
        body,
        names,
        [frame.handle(b) for b in buffers],
        [text for _, text in symbols],
        [str(k) for _, k in objects],
        list(made.values()),
        [frame.symbols[s] for s in known],
    )
    frame.addressed.difference_update(mutated)


def call_python(
    frame: Frame,
    body: str,
    names: Sequence[str],
    tensors: Sequence[str],
    numbers: Sequence[str],
    objects: Sequence[str],
    made: Sequence[str],
    known: Sequence[str],
) -> None:
    """Call ``def line(<names>): <body>`` with tensors, numbers and objects; results go to ``made``, then ``known``."""
    frame.lines.append(PythonLine(f"def line({', '.join(names)}):\n{body}"))

    def table(kind: str, texts: Iterable[str]) -> tuple[str, int]:
        items = list(texts)
        return (frame.local(f"{kind}[]", "{" + ", ".join(items) + "}"), len(items)) if items else ("nullptr", 0)

    frame.line("{")
    t, n = table("const AtenTensorHandle", tensors), table("const int64_t", numbers)
    o = table("const int32_t", objects)
    m, k = table("AtenTensorHandle", ["nullptr"] * len(made)), table("int64_t", ["0"] * len(known))
    parts = ", ".join(f"{name}, {count}" for name, count in (t, n, o, m, k))
    frame.line(f"MP_HOST(f.call->host->python(f.call, {len(frame.lines)}, {parts}));")
    for position, text in enumerate(made):
        frame.line(f"{text} = {m[0]}[{position}];")
    for position, text in enumerate(known):
        frame.line(f"{text} = {k[0]}[{position}];")
    frame.line("}")
