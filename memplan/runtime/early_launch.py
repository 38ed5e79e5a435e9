"""Which compiled kernels may be launched early: read off what the compiler made of them (`memplan.ir.early_launch`)."""

from __future__ import annotations

import re

from memplan.ir.errors import CompilerError

_WAIT = "griddepcontrol.wait"
#: the function's lines: what follows the brace after its parameters
_BODY = re.compile(r"\.entry\b.*?\n\{\n(.*)", re.DOTALL)
#: instructions of PTX that touch memory, or after which not every thread goes on; ``ld.param`` is none of them
_TOUCHES = re.compile(
    r"@|(ldu?|st|atom|red|cp|prefetchu?|applypriority|discard|multimem|tensormap|tex|tld4|suld|sust|sured|mbarrier"
    r"|bra|brx|call|ret|exit|trap)\b(?!\.param)"
)
_BLOCK = "$L__BB"  # what is branched to


def waits_first(ptx: str, name: str) -> bool:
    """Whether each thread of the kernel waits for the kernel before it, before it does anything else.

    False for one that does not wait at all, which is launched in the ordinary way.

    Parameters
    ----------
    ptx:
        A module with one kernel.
    name:
        The kernel's, for messages.

    Raises
    ------
    CompilerError
        If it waits, but after something that touches memory or branches: an early launch would be wrong.
    """
    if _WAIT not in ptx:
        return False
    body = _BODY.search(ptx)
    if body is None:
        raise CompilerError(f"no function {name} is found in its PTX, to see whether it waits before all else")
    until = body[1][: body[1].index(_WAIT) + len(_WAIT)]  # the wait itself may stand behind a predicate
    for line in (text.partition("//")[0].strip() for text in until.splitlines()):
        if _TOUCHES.match(line) or line.startswith(_BLOCK):
            raise CompilerError(
                f"{name} waits for the kernel before it too late: `{line}` comes first. Option early_launch='never' "
                "builds it without"
            )
    return True
