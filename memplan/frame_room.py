"""Room for Python's own frames while a model is compiled.

CPython keeps frames in chunks of 16 KiB (``DATA_STACK_CHUNK_SIZE``), maps a chunk when a call does not fit into the
last one and unmaps it when that call returns. A loop whose calls happen to cross the end of a chunk so asks the system
for memory, and faults it in, at every call: half of the time of planning a GPT-2 of 12 layers, measured in a virtual
machine, where a page fault is dear. A frame that is larger than a chunk gets one of its own, of the next power of two;
what it leaves free then serves the calls inside it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Slots of 8 bytes: just over 2 MiB, so that the chunk has 4 and the calls inside get the other 2; they are mapped, and
#: take memory only as far as they are used.
_SLOTS = (1 << 18) + 64


def with_frame_room(function: Callable[P, R]) -> Callable[P, R]:
    """The function, called from a frame that leaves 2 MiB for those of all that it calls.

    Examples
    --------
    >>> @with_frame_room
    ... def depth(n: int) -> int:
    ...     return 1 + depth(n - 1) if n else 0
    >>> depth(3)
    3
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    code = call.__code__.replace(co_stacksize=_SLOTS)
    roomy = types.FunctionType(code, globals(), function.__name__, None, call.__closure__)
    return functools.wraps(function)(roomy)
