"""Where FX nodes come from: the user's file and line, the module, the operation."""

from __future__ import annotations

import os
import re
from functools import lru_cache

import torch
import torch.fx

from ..ir.program import Origin

_FRAME = re.compile(r'^\s*File "(?P<file>.+?)", line (?P<line>\d+)', re.MULTILINE)
_TORCH = os.path.dirname(torch.__file__) + os.sep


@lru_cache(maxsize=8192)
def _user_frame(trace: str) -> tuple[str, int, str]:
    """Innermost frame outside of torch: (file, line, source text)."""
    best = ("", 0, "")
    lines = trace.splitlines()
    for k, text in enumerate(lines):
        m = _FRAME.match(text)
        if m is None or m["file"].startswith(_TORCH):
            continue
        code = lines[k + 1].strip() if k + 1 < len(lines) and not _FRAME.match(lines[k + 1]) else ""
        best = (m["file"], int(m["line"]), code)
    return best


def origin_of(node: torch.fx.Node) -> Origin:
    """The origin of an FX node; backward nodes carry the forward's stack trace."""
    trace = node.meta.get("stack_trace")
    file, line, code = _user_frame(trace) if isinstance(trace, str) else ("", 0, "")
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    module = ""
    if stack:
        last = list(stack.values())[-1]
        module = last[0] if isinstance(last, tuple) else str(last)
        module = re.sub(r"^L\['self'\]\.?", "", module)
        module = re.sub(r"\._modules\['([^']*)'\]", r".\1", module).lstrip(".")
    original = node.meta.get("original_aten")
    target = node.target if original is None else original
    return Origin(node.name, operator_name(target), module, file, line, code)


def operator_name(target: object) -> str:
    """``aten.mm.default`` for an overload, the plain name for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", None)
    return str(name) if name else str(target)
